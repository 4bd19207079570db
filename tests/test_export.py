"""Weights out: what was written comes back exactly, here, in transformers and in onnxruntime."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from checkpoints_of_others import classifying, clips, pretraining, saved
from transformers import VideoMAEForPreTraining, VideoMAEForVideoClassification

from mar import RESULT_DIR
from mar.config.overrides import build, merge, without_paths
from mar.config.schema import TrainingConfig
from mar.errors import Failure, UserError
from mar.model.mar import MAR
from mar.model.masking import evaluation_mask
from mar.model.pixels import IMAGENET_MEAN
from mar.weights.export import write_hugging_face, write_model
from mar.weights.onnx_export import write_onnx
from mar.weights.pretrained import EVERYTHING, load, model_settings
from mar.weights.reading import Weights, read_weights
from orchestration.cli.app import main
from orchestration.installation import packaged
from orchestration.studies.loader import read_study

SMALL = {
    "clip": {"frames": 4, "size": 64},
    "encoder": {"size": "custom", "width": 48, "depth": 2, "heads": 3},
    "classifier": {"width": 32, "depth": 1, "heads": 2},
    "reconstruction": {"width": 24, "depth": 1, "heads": 2},
    "data": {"num_classes": 5},
}


def weights_of(settings: TrainingConfig) -> Weights:
    """A model whose weights are random everywhere, key biases and norms too."""
    torch.manual_seed(0)
    state = {
        name: value + 0.1 * torch.randn_like(value)
        for name, value in MAR(settings).state_dict().items()
    }
    return Weights("a test", "mar", state, {}, {})


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"reconstruction.weight": 0.0},
        {"classifier.kind": "linear"},
        {"classifier.kind": "mlp", "classifier.depth": 2},
        {"classifier.mask_tokens": True, "classifier.positions": True},
        {"encoder.tubelet": [2, 8, 8], "mask.ratio": 0.75},
        {"encoder": {"size": "tiny", "width": None, "depth": None, "heads": None}},
    ],
)
def test_a_written_model_comes_back_exactly(overrides: dict[str, object], tmp_path: Path) -> None:
    settings = build(merge(SMALL, overrides))
    weights = weights_of(settings)
    write_model(tmp_path / "model", weights, settings)
    back = read_weights(str(tmp_path / "model"))
    assert back.tensors.keys() == weights.tensors.keys()
    assert all(torch.equal(back.tensors[name], weights.tensors[name]) for name in back.tensors)
    assert without_paths(model_settings(back)) == without_paths(settings)
    assert not load(MAR(settings), back, settings, EVERYTHING).initialised
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"{settings.test_ratio:.0%}" in card
    assert card.startswith("---\nlibrary_name: mar\n")


def test_hugging_faces_checkpoint_goes_round_and_transformers_reads_it(tmp_path: Path) -> None:
    reference = pretraining()
    first = read_weights(saved(reference, tmp_path / "theirs"))
    write_model(tmp_path / "ours", first, model_settings(first))
    ours = read_weights(str(tmp_path / "ours"))
    assert write_hugging_face(tmp_path / "back", ours, model_settings(ours)) == []
    again = VideoMAEForPreTraining.from_pretrained(tmp_path / "back").eval()
    processor = json.loads((tmp_path / "back" / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == list(IMAGENET_MEAN)
    assert "library_name: transformers\n" in (tmp_path / "back" / "README.md").read_text()
    state, expected = again.state_dict(), reference.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    _, normalised = clips()
    hidden = (torch.arange(32) % 2 == 0).expand(2, -1)
    with torch.no_grad():
        loss, wanted = (
            model(normalised, bool_masked_pos=hidden).loss for model in (again, reference)
        )
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-5)


def test_a_linear_classifier_goes_to_transformers_and_a_bridging_one_is_said_to_stay(
    tmp_path: Path,
) -> None:
    reference = classifying()
    weights = read_weights(saved(reference, tmp_path / "theirs"))
    assert write_hugging_face(tmp_path / "back", weights, model_settings(weights)) == []
    again = VideoMAEForVideoClassification.from_pretrained(tmp_path / "back").eval()
    _, normalised = clips()
    with torch.no_grad():
        scores, wanted = again(normalised).logits, reference(normalised).logits
    torch.testing.assert_close(scores, wanted, rtol=1e-4, atol=1e-4)
    bridging = build(SMALL)
    left = write_hugging_face(tmp_path / "bridging", weights_of(bridging), bridging)
    assert left
    assert all(name.startswith("classifier.") for name in left)
    VideoMAEForPreTraining.from_pretrained(tmp_path / "bridging")


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"mask.ratio": 0.0},
        {"classifier.kind": "linear", "mask.ratio": 0.75},
        {"classifier.kind": "linear", "classifier.norm": "pooled", "mask.ratio": 0.0},
        {"classifier.mask_tokens": True, "classifier.positions": True},
        {"evaluation.merge": 5},
        {"classifier.kind": "attentive"},
    ],
)
def test_onnxruntime_gives_the_scores_for_any_number_of_clips(
    overrides: dict[str, object], tmp_path: Path
) -> None:
    settings = build(merge(SMALL, overrides))
    weights = weights_of(settings)
    names = ("up", "down, slowly", "<b>", "é", "5")
    assert write_onnx(tmp_path / "model.onnx", replace(weights, classes=names), settings) < 1e-5
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    assert tuple(json.loads(session.get_modelmeta().custom_metadata_map["classes"])) == names
    pixels = torch.rand(3, 3, 4, 64, 64)
    (scores,) = session.run(None, {"pixels": pixels.numpy()})
    model = MAR(settings).eval()
    load(model, weights, settings, EVERYTHING)
    with torch.no_grad():
        expected = model.classify(pixels, evaluation_mask(settings).expand(3, -1, -1, -1))
    np.testing.assert_allclose(scores, expected.numpy(), rtol=1e-4, atol=1e-5)
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path: Path) -> None:
    settings = build(SMALL)
    weights = weights_of(settings)
    (tmp_path / "there").mkdir()
    (tmp_path / "there.onnx").write_text("precious")
    with pytest.raises(UserError, match="exists already"):
        write_model(tmp_path / "there", weights, settings)
    with pytest.raises(UserError, match="exists already"):
        write_onnx(tmp_path / "there.onnx", weights, settings)
    assert (tmp_path / "there.onnx").read_text() == "precious"
    wider = build(merge(SMALL, {"encoder.width": 96}))
    for write in (write_model, write_hugging_face):
        with pytest.raises(UserError, match="other shapes: encoder"):
            write(tmp_path / "new", weights, wider)
    assert not (tmp_path / "new").exists()


def test_a_models_folder_says_what_it_is(tmp_path: Path) -> None:
    write_model(tmp_path / "model", weights_of(build(SMALL)), build(SMALL))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["model_type"] == "mar"
    assert config["settings"]["encoder"]["width"] == 48
    assert sorted(each.name for each in (tmp_path / "model").iterdir()) == [
        "README.md",
        "config.json",
        "manifest.json",
        "model.safetensors",
    ]
    assert "root" not in config["settings"]["data"]


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run the command; returns its exit code, what it printed and what it complained of."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr("sys.argv", ["mar", *arguments])
        main()
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


def test_the_command_shows_converts_and_exports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = saved(classifying(), tmp_path / "theirs")
    capsys.readouterr()
    code, out, _ = command(capsys, "weights", "show", theirs)
    assert code == 0
    assert "(Hugging Face VideoMAE)" in out
    assert "encoder.width=48, encoder.depth=2, encoder.heads=3" in out
    code, out, _ = command(capsys, "weights", "show", theirs, "--json")
    assert json.loads(out)["settings"]["classifier.norm"] == "pooled"
    code, out, _ = command(capsys, "weights", "convert", theirs, str(tmp_path / "ours"))
    assert (code, out.splitlines()[-1]) == (0, f"written    {tmp_path / 'ours'}")
    code, out, _ = command(
        capsys, "weights", "export", str(tmp_path / "ours"), str(tmp_path / "model.onnx")
    )
    assert code == 0
    assert "onnxruntime and PyTorch differ by at most" in out
    code, _, complaint = command(capsys, "weights", "convert", theirs, str(tmp_path / "ours"))
    assert (code, "exists already" in complaint) == (2, True)
    code, _, complaint = command(
        capsys, "weights", "convert", theirs, str(tmp_path / "new"), "encoder.heads=5"
    )
    assert (code, "encoder" in complaint) == (2, True)
    code, _, complaint = command(capsys, "cost", "quickstart", "--memory")
    assert (code, "no CUDA device" in complaint) == (2, True)


def test_a_model_that_differs_in_onnx_is_not_written(tmp_path: Path) -> None:
    settings = build(SMALL)
    weights = weights_of(settings)
    weights.tensors["classifier.head.bias"][0] = float("nan")
    with pytest.raises(
        Failure, match=r"onnxruntime and PyTorch differ by nan; .*model\.onnx was not written"
    ):
        write_onnx(tmp_path / "model.onnx", weights, settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"encoder.depth": 1}, r"too many: encoder\.blocks\.1\."),
        ({"encoder.depth": 3}, r"missing: encoder\.blocks\.2\..* The file has encoder\.depth=2"),
        ({"encoder.heads": 4}, r"other settings: encoder\.heads"),
        ({"reconstruction.weight": 0.0}, r"too many: decoder\."),
    ],
)
def test_settings_that_do_not_fit_a_folder_of_ours_are_said(
    overrides: dict[str, object], message: str, tmp_path: Path
) -> None:
    settings = build(SMALL)
    write_model(tmp_path / "model", weights_of(settings), settings)
    weights = read_weights(str(tmp_path / "model"))
    with pytest.raises(UserError, match=message):
        write_model(tmp_path / "new", weights, model_settings(weights, overrides))


def test_a_fine_tuned_model_does_not_lose_its_norm_on_the_way_out(tmp_path: Path) -> None:
    weights = read_weights(saved(classifying(), tmp_path / "theirs"))
    settings = model_settings(weights, {"classifier.norm": "tokens"})
    with pytest.raises(
        UserError, match=r"missing: encoder\.norm\.weight, .*too many: classifier\.norm"
    ):
        write_onnx(tmp_path / "model.onnx", weights, settings)


def test_a_recipes_training_is_converted_by_the_recipes_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(json.dumps(SMALL), encoding="utf-8")
    store = tmp_path / "store"
    words = ["weights", "convert", str(recipe), str(tmp_path / "out"), "--store", str(store)]
    code, _, complaint = command(capsys, *words)
    assert code == 2 and "no finished training of it" in complaint
    (trial,) = read_study(str(recipe)).trials
    settings = build(SMALL)
    write_model(store / "trials" / trial.key / RESULT_DIR, weights_of(settings), settings)
    code, _, complaint = command(capsys, *words)
    assert code == 0, complaint
    written = read_weights(str(tmp_path / "out")).tensors
    expected = weights_of(settings).tensors
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    study = str(packaged("search_spaces") / "quickstart.yaml")
    code, _, complaint = command(capsys, "weights", "convert", study, str(tmp_path / "other"))
    assert code == 2 and "is a study of 4 trials" in complaint


def test_a_pre_training_has_nothing_to_export_to_onnx(
    tiny: Callable[..., TrainingConfig], tmp_path: Path
) -> None:
    settings = tiny({"recipe.objective": "reconstruction"})
    weights = Weights("pretrained", "mar", dict(MAR(settings).state_dict()), {}, {})
    with pytest.raises(UserError, match="has no classifier: it was pre-trained only"):
        write_onnx(tmp_path / "model.onnx", weights, settings)
