"""Encoders whose positions are not VideoMAE's: V-JEPA 2 and 2.1 (rotary), resized tables."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints_of_others import clips, pretraining, randomised, saved
from safetensors.torch import load_file, save_file
from test_pretrained import vit_names
from torch import Tensor
from transformers import VJEPA2Config, VJEPA2Model

from mar.config.canonical import canonical
from mar.config.overrides import SettingError, build
from mar.errors import UserError
from mar.model.encoder import patchify, unpatchify
from mar.model.mar import MAR
from mar.model.positions import (
    interpolated_positions,
    rotated,
    rotations,
    sin_cos_positions,
)
from mar.training.checkpoint import Progress, State, save
from mar.training.optim import build_optimizer
from mar.training.retention import RetentionPolicy
from mar.weights.pretrained import fitting, load, model_settings
from mar.weights.reading import Weights, read_weights

SIZES: dict[str, Any] = {
    "crop_size": 64,
    "frames_per_clip": 4,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "pred_hidden_size": 24,
    "pred_num_attention_heads": 2,
    "pred_num_hidden_layers": 1,
}


def v_jepa(**overrides: Any) -> Any:
    torch.manual_seed(0)
    return randomised(VJEPA2Model(VJEPA2Config(**{**SIZES, **overrides})))


def ours(weights: Weights, **overrides: Any) -> MAR:
    settings = model_settings(
        weights,
        {
            "clip": {"size": 64, "frames": 4},
            "mask": {"ratio": 0.0},
            "reconstruction": {"weight": 0.0},
            **overrides,
        },
    )
    model = MAR(settings).eval()
    load(model, weights, settings, ("encoder.",))
    return model


def its_tokens(model: Any, pixels: Tensor, visible: Tensor) -> Tensor:
    """The tokens of V-JEPA's own encoder, which sees those of ``visible`` alone."""
    encoder = model.encoder
    tokens = encoder.embeddings(pixels)
    tokens = tokens.gather(1, visible[..., None].expand(-1, -1, tokens.shape[-1]))
    for layer in encoder.layer:
        tokens = layer(tokens, position_mask=visible)[0]
    return encoder.layernorm(tokens)


@pytest.mark.parametrize("mlp_ratio", [4.0, 48 / 11], ids=["usual MLP", "giant's MLP"])
@pytest.mark.parametrize("visible", [32, 12], ids=["all tokens", "some tokens"])
@torch.no_grad()
def test_the_tokens_are_those_of_transformers(
    visible: int, mlp_ratio: float, tmp_path: Path
) -> None:
    theirs = v_jepa(mlp_ratio=mlp_ratio)
    theirs.save_pretrained(tmp_path)
    weights = read_weights(str(tmp_path))
    assert weights.layout == "Hugging Face V-JEPA 2"
    assert weights.settings["encoder.positions"] == "rotary_vjepa2"
    pixels, normalised = clips()
    generator = torch.Generator().manual_seed(3)
    indices = torch.stack([torch.randperm(32, generator=generator)[:visible] for _ in pixels])
    indices = indices.sort(dim=1).values
    expected = its_tokens(theirs, normalised, indices)
    if visible == 32:
        whole = theirs(normalised, skip_predictor=True).last_hidden_state
        torch.testing.assert_close(expected, whole, rtol=0, atol=1e-5)
    tokens = ours(weights).encode(pixels, indices)
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5)


def test_its_own_files_give_the_weights_that_hugging_face_has(tmp_path: Path) -> None:
    """The average of the encoder is taken; DDP's and its own wrapper's names are removed."""
    names = vit_names("module.backbone.")
    content = {
        "encoder": {name: 2 * value for name, value in names.items()},
        "predictor": {"module.backbone.norm.weight": torch.rand(24)},
        "target_encoder": names,
        "epoch": 90,
    }
    torch.save(content, tmp_path / "vitl.pt")
    weights = read_weights(str(tmp_path / "vitl.pt"))
    assert weights.layout == "V-JEPA 2"
    assert not weights.unused
    assert torch.equal(weights.tensors["encoder.norm.weight"], names["module.backbone.norm.weight"])
    torch.save({"vjepa": 1, **content, "ema_encoder": vit_names("")}, tmp_path / "ema.pt")
    averaged = read_weights(str(tmp_path / "ema.pt"))
    assert not torch.equal(
        averaged.tensors["encoder.norm.weight"], weights.tensors["encoder.norm.weight"]
    )


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.backbone.", "encoder."])
def test_its_encoder_alone_is_what_the_config_beside_it_says(prefix: str, tmp_path: Path) -> None:
    torch.save(vit_names(prefix), tmp_path / "encoder.pth")
    (tmp_path / "config.json").write_text('{"model_type": "vjepa2"}')
    weights = read_weights(str(tmp_path / "encoder.pth"))
    assert weights.layout == "V-JEPA 2"
    assert len(weights.tensors) == 28
    assert not weights.unused


def test_a_table_of_positions_is_that_of_videomae_or_refused(tmp_path: Path) -> None:
    """The V-JEPA before had a table of its own; a file of it has the keys of the later ones."""
    table = torch.rand(1, 32, 48)
    file = tmp_path / "vitl16.pth.tar"
    names = vit_names("") | {"pos_embed": table}
    torch.save({"encoder": names, "predictor": vit_names(""), "target_encoder": names}, file)
    with pytest.raises(UserError, match=r"has a table of positions, as V-JEPA \(1\) has"):
        read_weights(str(file))
    torch.save(names, file)
    with pytest.raises(UserError, match=r"table of positions \(1 × 32 × 48\) that is not the"):
        read_weights(str(file))
    torch.save(names | {"pos_embed": sin_cos_positions(32, 48)[None]}, file)
    assert read_weights(str(file)).settings.get("encoder.positions", "computed") == "computed"


def test_the_vector_of_videos_of_v_jepa_2_1_is_added_to_the_bias(tmp_path: Path) -> None:
    names = {
        name: value
        for name, value in vit_names("module.").items()
        if not name[7:].startswith("norm.")
    }
    for block in range(4):
        names[f"module.norms_block.{block}.weight"] = torch.rand(48)
        names[f"module.norms_block.{block}.bias"] = torch.rand(48)
    names["module.video_mod_embed"] = torch.rand(1, 1, 48)
    names["module.img_mod_embed"] = torch.rand(1, 1, 48)
    names["module.patch_embed_img.proj.weight"] = torch.rand(48, 3, 1, 16, 16)
    file = tmp_path / "vjepa2_1_vitb.pt"
    torch.save({"encoder": {}, "predictor": {}, "ema_encoder": names}, file)
    weights = read_weights(str(file))
    assert weights.settings["encoder.positions"] == "rotary_vjepa2_1"
    torch.testing.assert_close(
        weights.tensors["encoder.embed.bias"],
        names["module.patch_embed.proj.bias"] + names["module.video_mod_embed"].flatten(),
    )
    assert torch.equal(weights.tensors["encoder.norm.bias"], names["module.norms_block.3.bias"])
    assert "not known" not in weights.unused.values()
    model = ours(weights, encoder={"heads": 3})
    assert model.encoder.rotations is not None


def test_rotations_of_v_jepa_2_1_are_multiplications_by_complex_numbers() -> None:
    """Channels 2i and 2i + 1 are a complex number; its angle grows by the place, times 10⁻⁴ⁱ/ⁿ."""
    settings = build(
        {
            "encoder": {
                "size": "custom", "width": 48, "depth": 1, "heads": 3,
                "positions": "rotary_vjepa2_1",
            },
            "clip": {"frames": 4, "size": 64},
            "mask": {"cell": [2, 2]},
        }
    )  # fmt: skip
    grid = (2, 4, 4)
    table = rotations(settings.encoder, grid)[:, None, None]
    x = torch.randn(1, 1, 32, 16, dtype=torch.float64)
    turned = rotated(x, table.double())
    # Rows and columns span those of 256 pixels, 0 to 15.
    place = torch.cartesian_prod(
        torch.arange(2.0), torch.linspace(0, 15, 4), torch.linspace(0, 15, 4)
    )
    for axis in range(3):
        pairs = torch.view_as_complex(x[..., 4 * axis : 4 * axis + 4].unflatten(-1, (2, 2)))
        angle = place[:, axis, None] * torch.tensor([1.0, 10000**-0.5])
        expected = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle))
        torch.testing.assert_close(
            turned[..., 4 * axis : 4 * axis + 4], expected.flatten(-2), rtol=0, atol=1e-5,
            check_dtype=False,
        )  # fmt: skip
    assert torch.equal(turned[..., 12:], x[..., 12:])


def test_weights_and_settings_of_other_positions_do_not_fit(tmp_path: Path) -> None:
    v_jepa().save_pretrained(tmp_path)
    weights = read_weights(str(tmp_path))
    flat = {"clip.size": 64, "clip.frames": 4, "encoder.positions": "computed"}
    settings = model_settings(weights, flat)
    with pytest.raises(UserError, match=r"encoder\.positions.*encoder\.positions=rotary_vjepa2"):
        fitting(MAR(settings), weights, settings, ("encoder.",))
    torch.save(vit_names("", "q_bias"), tmp_path / "videomae.pth")
    weights = read_weights(str(tmp_path / "videomae.pth"))
    settings = model_settings(
        weights, {**flat, "encoder.heads": 3, "encoder.positions": "rotary_vjepa2"}
    )
    with pytest.raises(UserError, match=r"encoder\.positions.*encoder\.positions=computed"):
        fitting(MAR(settings), weights, settings, ("encoder.",))


def test_a_resized_table_is_the_old_one_at_its_own_size_and_between_its_rows_elsewhere() -> None:
    table = sin_cos_positions(4 * 6 * 6, 32)
    assert torch.equal(interpolated_positions((4, 6, 6), (4, 6, 6), 32), table)
    # Twice as many slices: the values between two of them, at a quarter and at three quarters.
    twice = interpolated_positions((4, 6, 6), (8, 6, 6), 32).unflatten(0, (8, 36))
    slices = table.unflatten(0, (4, 36))
    torch.testing.assert_close(twice[1], 0.75 * slices[0] + 0.25 * slices[1])
    torch.testing.assert_close(twice[2], 0.25 * slices[0] + 0.75 * slices[1])
    # Half the rows and columns: channels that hardly change over the grid stay as they were.
    half = interpolated_positions((4, 6, 6), (4, 3, 3), 32)
    assert half.shape == (36, 32)
    slowest = table.unflatten(0, (4, 6, 6))[..., -1]
    centres = slowest.unflatten(1, (3, 2)).unflatten(3, (3, 2)).mean(dim=(2, 4))
    torch.testing.assert_close(half[:, -1], centres.flatten(), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": {"positions": "interpolated"}}, "needs pretrained_grid"),
        ({"encoder": {"pretrained_grid": [8, 14, 14]}}, "positions: interpolated"),
        (
            {"encoder": {"positions": "rotary_vjepa2"}, "evaluation": {"merge": 2}},
            "needs positions that are added",
        ),
        (
            {
                "encoder": {
                    "size": "custom", "width": 16, "depth": 1, "heads": 4,
                    "positions": "rotary_vjepa2",
                }
            },
            "at least 6 channels in a head",
        ),
        (
            {
                "encoder": {
                    "size": "custom", "width": 42, "depth": 1, "heads": 6,
                    "positions": "rotary_vjepa2",
                }
            },
            "an even number of at least 6 channels in a head, two for each axis; it has 7",
        ),
        ({"encoder": {"mlp_ratio": 0.0001}}, "mlp_ratio: 0.0001 of 768 is no channel"),
        (
            {"encoder": {"positions": "interpolated", "pretrained_grid": [4096, 64, 64]}},
            "more than 262144 tokens",
        ),
    ],
)  # fmt: skip
def test_settings_of_positions_that_contradict_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingError, match=message):
        build(changes)


def test_resized_positions_of_the_same_grid_are_the_computed_ones() -> None:
    same = build({"encoder": {"positions": "interpolated", "pretrained_grid": [8, 14, 14]}})
    assert canonical(same) == canonical(build({}))


def test_our_own_weights_say_their_positions_or_are_refused(tmp_path: Path) -> None:
    v_jepa().save_pretrained(tmp_path / "theirs")
    weights = read_weights(str(tmp_path / "theirs"))
    settings = model_settings(
        weights, {"clip": {"size": 64, "frames": 4}, "mask": {"cell": [2, 2]}}
    )
    model = MAR(settings)
    optimizer = build_optimizer(model, settings.recipe)
    state = State(model.state_dict(), optimizer.state_dict(), Progress())
    checkpoint = save(tmp_path, settings, state, RetentionPolicy())
    assert read_weights(str(checkpoint)).settings["encoder.positions"] == "rotary_vjepa2"
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(checkpoint / "model.safetensors", alone)
    with pytest.raises(UserError, match="mar's own weights without their settings"):
        read_weights(str(alone))


def test_a_model_of_another_kind_with_videomaes_names_is_refused(tmp_path: Path) -> None:
    """ViViT's names are those of Hugging Face's VideoMAE, and its positions are learned."""
    saved(pretraining(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "vivit"}))
    with pytest.raises(UserError, match="says that it is a vivit, which mar does not read"):
        read_weights(str(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["embeddings.position_embeddings"] = torch.rand(1, 33, 48)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"table of positions \(1 × 33 × 48\) that is not the"):
        read_weights(str(tmp_path))


@pytest.mark.parametrize("shape", [(), (3,)])
def test_a_table_without_rows_is_no_table(shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.save(vit_names("", "q_bias") | {"pos_embed": torch.rand(shape)}, tmp_path / "odd.pth")
    with pytest.raises(UserError, match="has a table of positions"):
        read_weights(str(tmp_path / "odd.pth"))


def test_hidden_tokens_are_dropped_before_anything_turns(tmp_path: Path) -> None:
    """The model's own mask: what is hidden changes no token that is visible."""
    v_jepa().save_pretrained(tmp_path)
    model = ours(read_weights(str(tmp_path)), mask={"ratio": 0.5, "cell": [2, 2]})
    pixels, _ = clips()
    visible = torch.arange(0, 32, 2).expand(2, -1)
    before = model.encode(pixels, visible)
    tubelets = patchify(pixels, model.tubelet)
    hidden = torch.ones(32, dtype=torch.bool)
    hidden[visible[0]] = False
    tubelets[:, hidden] = 0.7
    changed = model.encode(unpatchify(tubelets, model.grid, model.tubelet), visible)
    assert torch.equal(before, changed)
