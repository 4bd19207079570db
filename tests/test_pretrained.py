"""Weights in: numbers equal those of transformers' VideoMAE and timm's ViT.

What does not fit is said.
"""

import argparse
import collections
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from checkpoints_of_others import classifying, clips, pretraining, randomised, saved, theirs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    VideoMAEForVideoClassification,
    VideoMAEModel,
)

from mar.config.overrides import build, merge
from mar.config.schema import TrainingConfig
from mar.errors import UserError
from mar.model.decoder import reconstruction_loss, reconstruction_target
from mar.model.encoder import patchify, take
from mar.model.mar import MAR, split_indices
from mar.model.positions import sin_cos_positions
from mar.weights.hub import ABSENT, fetch, fingerprint, locate
from mar.weights.pretrained import check_start, load, model_settings, start
from mar.weights.reading import read_weights

transformers.utils.logging.disable_progress_bar()


def ours(name: str, overrides: dict[str, Any] | None = None) -> tuple[MAR, TrainingConfig]:
    """A model with all that the file has."""
    weights = read_weights(name)
    settings = model_settings(weights, overrides)
    model = MAR(settings).eval()
    has = {name.split(".")[0] for name in weights.tensors}
    load(model, weights, settings, [f"{part}." for part in has])
    return model, settings


def random_mask(num_hidden: int = 20) -> Tensor:
    order = torch.rand(2, 32, generator=torch.Generator().manual_seed(2)).argsort(dim=1)
    return (order < num_hidden).view(2, 2, 4, 4)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_pretraining_loss_is_that_of_transformers(normalize: bool, tmp_path: Path) -> None:
    reference = pretraining(norm_pix_loss=normalize)
    model, settings = ours(saved(reference, tmp_path / "hf"))
    assert settings.reconstruction.normalize_target == normalize
    (pixels, normalised), hidden = clips(), random_mask()
    with torch.no_grad():
        expected = reference(normalised, bool_masked_pos=hidden.flatten(1))
        predicted = model.reconstruct(pixels, hidden)
        target = reconstruction_target(
            take(patchify(pixels, (2, 16, 16)), split_indices(hidden)[1]), normalize
        )
    torch.testing.assert_close(predicted, expected.logits, rtol=1e-4, atol=1e-5)
    loss = reconstruction_loss(predicted, target).mean()
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-5)


def test_the_class_scores_are_those_of_transformers(tmp_path: Path) -> None:
    reference = classifying()
    model, settings = ours(saved(reference, tmp_path / "hf"))
    assert (settings.classifier.norm, settings.test_ratio, settings.data.num_classes) == (
        "pooled",
        0.0,
        5,
    )
    pixels, normalised = clips()
    with torch.no_grad():
        expected = reference(normalised).logits
        scores = model.classify(pixels, torch.zeros(2, 2, 4, 4, dtype=torch.bool))
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


def test_with_the_epsilon_that_transformers_defaults_to_the_scores_are_still_near(
    tmp_path: Path,
) -> None:
    reference = classifying(layer_norm_eps=1e-12)
    for part in reference.modules():
        if isinstance(part, nn.LayerNorm):
            part.eps = 1e-12
    reference.fc_norm.eps = 1e-5
    model, _ = ours(saved(reference, tmp_path / "hf"))
    pixels, normalised = clips()
    with torch.no_grad():
        scores = model.classify(pixels, torch.zeros(2, 2, 4, 4, dtype=torch.bool))
        torch.testing.assert_close(scores, reference(normalised).logits, rtol=0, atol=5e-4)


def test_an_encoder_alone_is_read_too(tmp_path: Path) -> None:
    reference = theirs(VideoMAEModel, use_mean_pooling=False)
    model, _ = ours(saved(reference, tmp_path / "hf"))
    pixels, normalised = clips()
    hidden = random_mask()
    with torch.no_grad():
        expected = reference(normalised, bool_masked_pos=hidden.flatten(1)).last_hidden_state
        tokens = model.encode(pixels, split_indices(hidden)[0])
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)


OFFICIAL = [  # transformers' name -> VideoMAE's, from the facts about its conversion
    ("videomae.encoder.layer.", "encoder.blocks."),
    ("decoder.decoder_layers.", "decoder.blocks."),
    ("videomae.embeddings.patch_embeddings.projection", "encoder.patch_embed.proj"),
    ("videomae.layernorm", "encoder.norm"),
    ("attention.output.dense", "attn.proj"),
    ("attention.attention.", "attn."),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
]


def official(folder: str) -> dict[str, Tensor]:
    """The same weights as VideoMAE's own code names and groups them."""
    named: dict[str, Tensor] = {}
    for key, value in load_file(Path(folder) / "model.safetensors").items():
        for old, new in OFFICIAL:
            key = key.replace(old, new)
        named[key] = value
    for key in [key for key in named if key.endswith("attn.query.weight")]:
        stem = key.removesuffix("query.weight")
        named[f"{stem}qkv.weight"] = torch.cat(
            [named.pop(f"{stem}{part}.weight") for part in ("query", "key", "value")]
        )
    if "classifier.weight" in named:
        named = {
            key.removeprefix("encoder.").replace("classifier.", "head."): value
            for key, value in named.items()
        }
    return named


def assert_same_tensors(first: str, second: str) -> None:
    one, other = read_weights(first).tensors, read_weights(second).tensors
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("wrapper", ["model", "module", "model_state", "state_dict", None])
@pytest.mark.parametrize("kind", [pretraining, classifying])
def test_videomaes_own_files_give_the_same_weights(
    kind: Callable[[], Any], wrapper: str | None, tmp_path: Path
) -> None:
    reference = saved(kind(), tmp_path / "hf")
    state, file = official(reference), tmp_path / "checkpoint.pth"
    content = (
        {wrapper: state, "epoch": 799, "args": argparse.Namespace(model="vit", lr=1e-3)}
        if wrapper
        else state
    )
    torch.save(content, file)
    assert_same_tensors(reference, str(file))
    layout = "pre-trained" if kind is pretraining else "fine-tuned"
    assert read_weights(str(file)).layout == f"VideoMAE, {layout}"


def test_half_precision_files_and_wrapped_names_are_read(tmp_path: Path) -> None:
    reference = saved(pretraining(), tmp_path / "hf")
    wrapped = {
        f"module._orig_mod.{key}": value.half() for key, value in official(reference).items()
    }
    torch.save({"module": wrapped}, tmp_path / "deepspeed.pt")
    one, other = (
        read_weights(reference).tensors,
        read_weights(str(tmp_path / "deepspeed.pt")).tensors,
    )
    assert all(torch.equal(one[name].half().float(), other[name]) for name in one)


def test_sharded_folders_and_old_ones_are_read(tmp_path: Path) -> None:
    reference = saved(pretraining(), tmp_path / "hf")
    tensors = load_file(Path(reference) / "model.safetensors")
    shards, old = tmp_path / "shards", tmp_path / "old"
    for folder in (shards, old):
        folder.mkdir()
        (folder / "config.json").write_text((Path(reference) / "config.json").read_text())
    names = sorted(tensors)
    where = {
        name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(names)
    }
    for shard in {*where.values()}:
        save_file({name: tensors[name] for name in names if where[name] == shard}, shards / shard)
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    torch.save(tensors, old / "pytorch_model.bin")
    assert_same_tensors(reference, str(shards))
    assert_same_tensors(reference, str(old))
    (shards / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"the shard model-00002-of-00002\.safetensors is missing"):
        read_weights(str(shards))


def test_an_image_vit_inflated_gives_the_image_models_tokens_on_a_still_clip(
    tmp_path: Path,
) -> None:
    image = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, class_token=False, global_pool="avg", fc_norm=False
    )
    image = randomised(image)
    with torch.no_grad():
        image.pos_embed.copy_(sin_cos_positions(16, 192))
    save_file(image.state_dict(), tmp_path / "image.safetensors")
    tree = {
        "encoder.size": "tiny",
        "clip.size": 64,
        "clip.frames": 2,
        "reconstruction.init": "random",
    }
    settings = build(merge({}, {**tree, "encoder.weights": str(tmp_path / "image.safetensors")}))
    model = MAR(settings).eval()
    report = start(model, settings)
    assert "image ViT" in report
    still = torch.rand(2, 3, 1, 64, 64).expand(-1, -1, 2, -1, -1)
    with torch.no_grad():
        tokens = model.encode(still, torch.arange(16).expand(2, -1))
        mean = model.mean.view(3, 1, 1, 1)
        std = model.std.view(3, 1, 1, 1)
        normalised = (still - mean) / std
        expected = image.forward_features(normalised[:, :, 0])
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)


def test_the_image_mae_of_timm_loads_but_for_its_class_token(tmp_path: Path) -> None:
    image = timm.create_model("vit_base_patch16_224.mae", pretrained=False, num_classes=0, depth=1)
    torch.save({"model": image.state_dict()}, tmp_path / "mae.pth")
    weights = read_weights(str(tmp_path / "mae.pth"))
    assert weights.layout == "image ViT"
    assert set(weights.unused) == {"cls_token", "pos_embed"}
    model, _ = ours(str(tmp_path / "mae.pth"), {"encoder.heads": 12})
    kernel = model.encoder.embed.weight.unflatten(1, (3, 2, 16, 16))
    torch.testing.assert_close(kernel.sum(dim=2), image.patch_embed.proj.weight)


def weights_settings(name: str, overrides: dict[str, Any] | None = None) -> TrainingConfig:
    known = model_settings(read_weights(name)).model_dump(mode="json")
    return build(merge(known, {"encoder.weights": name, **(overrides or {})}))


def test_training_starts_from_encoder_and_decoder_and_says_what_it_left(tmp_path: Path) -> None:
    name = saved(pretraining(), tmp_path / "hf")
    settings = weights_settings(name)
    model = MAR(settings)
    report = start(model, settings)
    there = read_weights(name).tensors
    assert torch.equal(model.decoder.mask_token, there["decoder.mask_token"])
    assert torch.equal(model.encoder.norm.weight, there["encoder.norm.weight"])
    assert re.search(r"loaded +encoder: 28 tensors, 0\.13 M values; decoder: 30 tensors", report)
    assert re.search(r"at random +classifier\.… \(29 tensors\)", report)
    random = weights_settings(name, {"reconstruction.init": "random"})
    model = MAR(random)
    assert re.search(r"left over +decoder\.… \(30 tensors\): not asked for", start(model, random))
    assert not torch.equal(model.decoder.mask_token, there["decoder.mask_token"])


def test_a_fine_tuned_model_lacks_the_last_norm_and_the_report_says_so(tmp_path: Path) -> None:
    name = saved(classifying(), tmp_path / "hf")
    overrides = {"classifier.kind": "bridging", "classifier.norm": "tokens", "classifier.heads": 4}
    settings = weights_settings(name, {**overrides, "mask.ratio": 0.5})
    model = MAR(settings)
    report = start(model, settings)
    assert re.search(
        r"at random +encoder\.norm\.weight, encoder\.norm\.bias, classifier\.…", report
    )
    assert re.search(
        r"left over +classifier\.… \(4 tensors\)|left over +classifier\.norm\.weight, "
        r"classifier\.norm\.bias",
        report,
    )
    reconstructing = weights_settings(
        name, {**overrides, "mask.ratio": 0.5, "reconstruction.weight": 0.1}
    )
    with pytest.raises(UserError, match=r"has no decoder: set reconstruction\.init: random"):
        start(MAR(reconstructing), reconstructing)


@pytest.mark.parametrize(("frames", "size"), [(4, 96), (8, 64), (16, 32)])
def test_other_clip_sizes_and_frame_counts_load_exactly(
    frames: int, size: int, tmp_path: Path
) -> None:
    name = saved(pretraining(), tmp_path / "hf")
    settings = weights_settings(name, {"clip.frames": frames, "clip.size": size})
    model = MAR(settings)
    start(model, settings)
    assert torch.equal(
        model.encoder.positions, sin_cos_positions(frames // 2 * (size // 16) ** 2, 48)
    )


def test_a_checkpoint_that_fits_badly_is_an_error_that_names_the_first_keys(tmp_path: Path) -> None:
    name = saved(pretraining(), tmp_path / "hf")
    wider = build(merge({}, {"encoder.weights": name, "clip.size": 64, "clip.frames": 4}))
    with pytest.raises(
        UserError,
        match=r"missing: encoder\.blocks\.2\.\S+, .* and \d+ more; other shapes: encoder\.embed",
    ) as error:
        start(MAR(wider), wider)
    assert "48 × 1536 in the file, 768 × 1536 in the model" in str(error.value)
    assert "encoder.width=48" in str(error.value)
    file = Path(name) / "model.safetensors"
    tensors = load_file(file)
    del tensors["videomae.encoder.layer.1.output.dense.weight"]
    save_file(tensors, file)
    settings = weights_settings(name)
    with pytest.raises(UserError, match=r"missing: encoder\.blocks\.1\.mlp\.fc2\.weight\b"):
        start(MAR(settings), settings)


class RunsACommand:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path: Path) -> None:
    file, trace = tmp_path / "evil.pth", tmp_path / "it-ran"
    torch.save({"model": {"weight": torch.zeros(1)}, "args": RunsACommand(trace)}, file)
    with pytest.raises(
        UserError,
        match=r"evil\.pth: refused, because opening it could run code: it would call \S*\.system",
    ):
        read_weights(str(file))
    assert not trace.exists()
    torch.load(file, weights_only=False)
    assert trace.exists(), "the file is not malicious, so this test proves nothing"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda file: file.write_bytes(b""), "not a whole PyTorch checkpoint"),
        (lambda file: file.write_bytes(b"no checkpoint at all"), "not a whole PyTorch checkpoint"),
        (
            lambda file: torch.save({"model": {"a": torch.zeros(1)}}, file),
            r"not a layout that mar knows .* first keys: a",
        ),
        (lambda file: torch.save([1, 2], file), "no tensors in it"),
    ],
)
def test_what_is_no_checkpoint_is_said(
    make: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "some.pth"
    make(file)
    with pytest.raises(UserError, match=message):
        read_weights(str(file))


def test_a_file_without_tensors_is_said(tmp_path: Path) -> None:
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(UserError, match="not a layout that mar knows"):
        read_weights(str(tmp_path / "empty.safetensors"))


def test_a_truncated_file_is_said(tmp_path: Path) -> None:
    folder = Path(saved(pretraining(), tmp_path / "hf"))
    torch.save({"model": official(str(folder))}, tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="not a whole PyTorch checkpoint"):
        read_weights(str(tmp_path / "cut.pth"))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        read_weights(str(folder))


def test_names_that_lead_nowhere_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("./nothing.pth", "weights/here/none", "nothing.safetensors"):
        with pytest.raises(UserError, match="no such file or folder of weights"):
            read_weights(name)
    for name in ("nobody/nothing", "vit_base_patch16_224.mae"):
        with pytest.raises(UserError, match="no such file here, and the hub gave no"):
            read_weights(name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no weights in it"):
        read_weights(str(tmp_path / "empty"))


def test_a_model_in_hugging_faces_cache_is_found_without_asking_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = cache / "models--someone--videomae-tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    reference = saved(pretraining(), snapshot)
    assert fetch("someone/videomae-tiny").resolve() == Path(reference).resolve()
    assert_same_tensors("someone/videomae-tiny", reference)
    assert fingerprint("someone/videomae-tiny") == fingerprint(reference)


def test_the_fingerprint_is_of_the_content_wherever_it_lies(tmp_path: Path) -> None:
    one, other = saved(pretraining(), tmp_path / "one"), saved(pretraining(), tmp_path / "other")
    assert fingerprint(one) == fingerprint(other)
    assert fingerprint(fingerprint(one)) == fingerprint(one)
    changed = load_file(Path(other) / "model.safetensors")
    changed["mask_token"] += 1
    save_file(changed, Path(other) / "model.safetensors")
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(str(tmp_path / "none.pth")) == f"{ABSENT}{tmp_path / 'none.pth'}"


@pytest.mark.parametrize(
    "overrides",
    [
        {"encoder.heads": 4},
        {"reconstruction.heads": 3},
        {"encoder.tubelet": [8, 8, 8], "clip.frames": 8},
    ],
)
def test_heads_and_tubelets_that_the_file_contradicts_are_refused(
    overrides: dict[str, Any], tmp_path: Path
) -> None:
    settings = weights_settings(saved(pretraining(), tmp_path / "hf"), overrides)
    with pytest.raises(UserError, match=f"other settings: {next(iter(overrides))}"):
        start(MAR(settings), settings)
    with pytest.raises(UserError, match="other settings"):
        check_start(settings)


def test_a_named_size_states_its_heads(tmp_path: Path) -> None:
    named = {"hidden_size": 192, "num_hidden_layers": 12, "intermediate_size": 768}
    file = saved(pretraining(**named), tmp_path / "hf")
    assert weights_settings(file).encoder.size == "tiny"
    other_heads = {"size": "custom", "width": 192, "depth": 12, "heads": 4}
    settings = weights_settings(file, {"encoder": other_heads})
    with pytest.raises(UserError, match=r"other settings: encoder\.heads"):
        check_start(settings)


def test_a_missing_attention_bias_is_missing_unless_the_model_has_none(tmp_path: Path) -> None:
    state = official(saved(pretraining(), tmp_path / "hf"))
    del state["encoder.blocks.0.attn.v_bias"]
    torch.save({"model": state}, tmp_path / "lacks.pth")
    with pytest.raises(UserError, match=r"missing: encoder\.blocks\.0\.attn\.qkv\.bias\b"):
        ours(
            str(tmp_path / "lacks.pth"),
            {"encoder.heads": 3, "reconstruction.heads": 4, "clip.size": 64},
        )
    without = {key: value for key, value in state.items() if not key.endswith(("q_bias", "v_bias"))}
    torch.save({"model": without}, tmp_path / "none.pth")
    model, _ = ours(
        str(tmp_path / "none.pth"), {"encoder.heads": 3, "reconstruction.heads": 4, "clip.size": 64}
    )
    assert not model.encoder.blocks[0].attn.qkv.bias.any()


@pytest.mark.parametrize("options", [{"init_values": 1e-5}, {"qk_norm": True}])
def test_another_kind_of_block_is_refused_not_half_loaded(
    options: dict[str, Any], tmp_path: Path
) -> None:
    image = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, **options)
    save_file(image.state_dict(), tmp_path / "other.safetensors")
    overrides = {
        "encoder.size": "custom",
        "encoder.width": 192,
        "encoder.depth": 2,
        "encoder.heads": 3,
    }
    name = str(tmp_path / "other.safetensors")
    settings = build(
        merge({}, {**overrides, "reconstruction.init": "random", "encoder.weights": name})
    )
    with pytest.raises(UserError, match=r"too many: blocks\.0\.\S+"):
        start(MAR(settings), settings)


def test_a_checkpoint_deeper_than_the_model_is_not_cut(tmp_path: Path) -> None:
    settings = weights_settings(saved(pretraining(), tmp_path / "hf"), {"encoder.depth": 1})
    with pytest.raises(UserError, match=r"too many: encoder\.blocks\.1\."):
        start(MAR(settings), settings)


def test_a_config_that_computes_something_else_is_refused_or_its_classifier_left(
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match="its activation is relu"):
        read_weights(saved(classifying(hidden_act="relu"), tmp_path / "relu"))
    first = theirs(VideoMAEForVideoClassification, use_mean_pooling=False, num_labels=5)
    weights = read_weights(saved(first, tmp_path / "first"))
    assert (
        weights.unused["classifier.head.weight"]
        == "its classifier reads the first token, and ours the average"
    )
    assert not any(name.startswith("classifier.") for name in weights.tensors)


def test_a_strangers_config_beside_a_file_is_not_believed(tmp_path: Path) -> None:
    torch.save({"model": official(saved(pretraining(), tmp_path / "hf"))}, tmp_path / "some.pth")
    (tmp_path / "config.json").write_text('{"num_attention_heads": 12, "model_type": "bert"}')
    assert "encoder.heads" not in read_weights(str(tmp_path / "some.pth")).settings


@pytest.mark.parametrize("text", ["[1, 2]", "null", "", "{", '{"settings": "x"}'])
def test_a_damaged_config_is_said(text: str, tmp_path: Path) -> None:
    folder = Path(saved(pretraining(), tmp_path / "hf"))
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json: not a model's settings"):
        read_weights(str(folder))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_malicious_pickle_of_any_protocol_is_refused(protocol: int, tmp_path: Path) -> None:
    file, trace = tmp_path / "evil.pth", tmp_path / "it-ran"
    torch.save({"args": RunsACommand(trace)}, file, pickle_protocol=protocol)
    with pytest.raises(UserError, match=r"evil\.pth: refused, because") as error:
        read_weights(str(file))
    assert "weights_only" not in str(error.value)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1", "git-LFS pointer"),
        (b"<!DOCTYPE html>", "not a PyTorch checkpoint but a web page"),
        (b"\x80\x04.", "not a whole PyTorch checkpoint|refused"),
    ],
)
def test_files_that_are_often_taken_for_weights_are_named(
    content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / "some.pth").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_weights(str(tmp_path / "some.pth"))


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_damaged_file_never_ends_in_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    file = tmp_path_factory.mktemp("damaged") / "some.pth"
    torch.save({"model": {"encoder.patch_embed.proj.weight": torch.zeros(4, 3, 2, 2, 2)}}, file)
    content = bytearray(file.read_bytes())
    for workdir in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=6)):
        content[workdir] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    with suppress(UserError):
        read_weights(str(file))


def test_an_archive_of_a_later_format_is_refused_in_words(tmp_path: Path) -> None:
    file = tmp_path / "some.pth"
    torch.save({"model": {"encoder.patch_embed.proj.weight": torch.zeros(4, 3, 2, 2, 2)}}, file)
    content = bytearray(file.read_bytes())
    # The first entry of the archive's list; six bytes in is the version that it needs.
    content[content.index(b"PK\x01\x02") + 6] = 64
    file.write_bytes(content)
    with pytest.raises(UserError, match="not a whole PyTorch checkpoint"):
        read_weights(str(file))


def test_a_download_cut_short_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = cache / "models--org--sharded" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (cache / "models--org--sharded" / "refs").mkdir()
    (cache / "models--org--sharded" / "refs" / "main").write_text("0" * 40)
    (snapshot / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'
    )
    assert locate("org/sharded") is None
    assert fingerprint("org/sharded") == f"{ABSENT}org/sharded"


def vit_names(prefix: str, bias: str = "qkv.bias") -> dict[str, Tensor]:
    """A video ViT of two blocks without a table of positions, as V-JEPA names it."""
    tensors = {"patch_embed.proj.weight": torch.rand(48, 3, 2, 16, 16)}
    tensors["patch_embed.proj.bias"] = torch.rand(48)
    for block in range(2):
        shapes = {
            "norm1": (48,),
            "norm2": (48,),
            "attn.qkv": (144, 48),
            "attn.proj": (48, 48),
            "mlp.fc1": (192, 48),
            "mlp.fc2": (48, 192),
        }
        for part, shape in shapes.items():
            tensors[f"blocks.{block}.{part}.weight"] = torch.rand(shape)
            if part != "attn.qkv" or bias == "qkv.bias":
                tensors[f"blocks.{block}.{part}.bias"] = torch.rand(shape[0])
        if bias != "qkv.bias":
            for each in ("q_bias", "v_bias"):
                tensors[f"blocks.{block}.attn.{each}"] = torch.rand(48)
    tensors |= {"norm.weight": torch.rand(48), "norm.bias": torch.rand(48)}
    return {f"{prefix}{name}": value for name, value in tensors.items()}


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.backbone.", "encoder."])
def test_a_model_that_says_nothing_of_its_positions_is_refused(prefix: str, tmp_path: Path) -> None:
    """V-JEPA's have the names of VideoMAE's, and would load with positions of another kind."""
    file = tmp_path / "encoder.pth"
    torch.save(vit_names(prefix), file)
    with pytest.raises(UserError, match=r"says nothing of its positions\. .*V-JEPA.*config\.json"):
        read_weights(str(file))
    (tmp_path / "config.json").write_text('{"model_type": "videomae"}')
    assert "encoder.blocks.1.mlp.fc2.weight" in read_weights(str(file)).tensors
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match=r"config\.json beside it says that it is a vit, which mar"):
        read_weights(str(file))


@pytest.mark.parametrize("prefix", ["", "backbone.", "encoder."])
def test_an_encoder_of_videomae_alone_is_known_by_its_biases(prefix: str, tmp_path: Path) -> None:
    torch.save(vit_names(prefix, "q_bias"), tmp_path / "encoder.pth")
    assert len(read_weights(str(tmp_path / "encoder.pth")).tensors) == 28


def test_several_models_in_one_file_are_named(tmp_path: Path) -> None:
    torch.save({"student": vit_names(""), "teacher": vit_names(""), "epoch": 1}, tmp_path / "j.pt")
    with pytest.raises(UserError, match=r"it has 2 state dictionaries: student, teacher\. Save"):
        read_weights(str(tmp_path / "j.pt"))


def test_harmless_data_beside_weights_is_no_obstacle(tmp_path: Path) -> None:
    counts: collections.defaultdict[str, list[int]] = collections.defaultdict(list)
    counts["a"].append(1)
    beside = {
        "loss": np.float64(0.5),
        "step": np.int64(7),
        "best": np.float32(0.25),
        "is_last": np.bool_(True),
        "path": Path("/data/kinetics"),
        "counts": counts,
        "args": argparse.Namespace(lr=1e-3),
        "names": {1, 2},
    }
    torch.save({"model": vit_names("", "q_bias"), **beside}, tmp_path / "whole.pth")
    assert len(read_weights(str(tmp_path / "whole.pth")).tensors) == 28


def test_one_more_module_of_a_training_is_left_out(tmp_path: Path) -> None:
    state = vit_names("model.", "q_bias") | {"criterion.weight": torch.rand(5)}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "lightning.ckpt")
    weights = read_weights(str(tmp_path / "lightning.ckpt"))
    assert len(weights.tensors) == 28
    assert set(weights.unused) == {"criterion.weight"}
