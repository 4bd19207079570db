"""The model gives the released model's numbers for closed-form weights and a closed-form video."""

import json
import math
import zlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mar.errors import UserError
from mar.model.decoder import reconstruction_loss, reconstruction_target
from mar.model.encoder import patchify, take
from mar.model.mar import MAR, split_indices
from mar.model.masking import evaluation_mask
from mar.model.positions import sin_cos_positions
from mar.weights.pretrained import EVERYTHING, load, model_settings
from mar.weights.reading import read_weights

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
RATIOS = [0.25, 0.5, 0.75]


def closed_form_weight(name: str, shape: list[int]) -> Tensor:
    k = torch.arange(math.prod(shape), dtype=torch.float64)
    wave = torch.sin(0.37 * k + 2 * math.pi * (zlib.crc32(name.encode()) % 1000) / 1000)
    scaled = 1 + 0.1 * wave if "norm" in name and name.endswith(".weight") else 0.05 * wave
    return scaled.float().view(shape)


def closed_form_pixels() -> Tensor:
    b, c, t, y, x = torch.meshgrid(
        torch.arange(2.0, dtype=torch.float64),
        torch.arange(3.0, dtype=torch.float64),
        torch.arange(16.0, dtype=torch.float64),
        torch.arange(224.0, dtype=torch.float64),
        torch.arange(224.0, dtype=torch.float64),
        indexing="ij",
    )
    wave = torch.sin(0.11 * x * (1 + 0.2 * c) + 0.07 * y * (1 + 0.1 * b) + 0.5 * t + c + 2 * b)
    return (0.5 + 0.4 * wave).float()


GOLDEN_OVERRIDES = {
    "encoder.heads": 3,
    "encoder.drop_path": 0.0,
    "classifier.heads": 4,
    "classifier.dropout": 0.0,
}


def released_checkpoint(file: Path, shapes: dict[str, list[int]]) -> Path:
    """A checkpoint as the released code writes it, with closed-form weights."""
    state = {name: closed_form_weight(name, shape) for name, shape in shapes.items()}
    torch.save({"model_state": state, "epoch": 3, "cfg": "TRAIN:\n  ENABLE: true\n"}, file)
    return file


@pytest.fixture(scope="module")
def golden_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return released_checkpoint(
        tmp_path_factory.mktemp("released") / "mar.pyth", GOLDEN["parameters"]
    )


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_released_models_numbers_come_out_of_its_checkpoint(
    ratio: float, golden_checkpoint: Path
) -> None:
    weights = read_weights(str(golden_checkpoint))
    settings = model_settings(weights, {**GOLDEN_OVERRIDES, "mask.ratio": ratio})
    expected = GOLDEN["by_mask_ratio"][str(ratio)]
    model = MAR(settings).eval()
    loaded = load(model, weights, settings, EVERYTHING)
    assert not loaded.initialised
    assert set(loaded.left_over) == {"mean", "std", "pos_embed", "cls_head.mask_token"}
    pixels = closed_form_pixels()
    hidden = evaluation_mask(settings).expand(2, -1, -1, -1)
    with torch.no_grad():
        visible_indices, hidden_indices = split_indices(hidden)
        tokens = model.encode(pixels, visible_indices)
        scores = model.classify(pixels, hidden)
        predicted = model.reconstruct(pixels, hidden)
        target = reconstruction_target(
            take(patchify(pixels, (2, 16, 16)), hidden_indices), normalize=True
        )
    ours = {
        "logits_eval": scores,
        "encoder_out_mean": tokens.mean(),
        "encoder_out[0,0,:4]": tokens[0, 0, :4],
        "encoder_out[1,-1,-4:]": tokens[1, -1, -4:],
        "pixel_pred_mean": predicted.mean(),
        "pixel_pred[0,0,:4]": predicted[0, 0, :4],
        "target_mean": target.mean(),
        "target_std": target.std(),
        "target[0,0,:6]": target[0, 0, :6],
        "mse": reconstruction_loss(predicted, target).mean(),
    }
    assert list(predicted.shape) == expected["pixel_pred_shape"]
    assert set(expected) - set(ours) == {
        "pixel_pred_shape",
        "logits_train==eval",
        "max|MAR-order - VideoMAE-order|",
    }
    errors = {
        key: (value - torch.tensor(expected[key])).abs().max().item() for key, value in ours.items()
    }
    for key, error in errors.items():
        print(f"ρ = {ratio:.0%}  {key:<22} largest absolute error {error:.1e}")
    assert max(errors.values()) <= 1e-5


def test_other_sizes_are_read_from_the_checkpoint(tmp_path: Path) -> None:
    shapes = resized(GOLDEN["parameters"])
    weights = read_weights(str(released_checkpoint(tmp_path / "other.pyth", shapes)))
    settings = model_settings(weights, {"encoder.heads": 4, "classifier.heads": 3})
    assert settings.encoder.dimensions == (128, 3, 4)
    assert (settings.classifier.width, settings.classifier.depth, settings.data.num_classes) == (
        96,
        3,
        11,
    )
    assert (
        settings.reconstruction.width,
        settings.reconstruction.depth,
        settings.reconstruction.heads,
    ) == (192, 2, 3)
    model = MAR(settings).eval()
    assert not load(model, weights, settings, EVERYTHING).initialised
    hidden = evaluation_mask(settings).expand(2, -1, -1, -1)
    with torch.no_grad():
        scores = model.classify(closed_form_pixels(), hidden)
    assert scores.shape == (2, 11)
    assert scores.isfinite().all()


def test_heads_that_no_file_tells_must_be_given(golden_checkpoint: Path) -> None:
    with pytest.raises(UserError, match=r"encoder.heads: no file states the number of heads"):
        model_settings(read_weights(str(golden_checkpoint)))


LENGTHS = {  # of the golden checkpoint -> of another one
    "backbone": {96: 128, 288: 384, 384: 512},
    "cls_head": {64: 96, 192: 288, 256: 384, 7: 11},
    "decoder": {384: 192, 1152: 576, 1536: 768},
    "mask_token": {384: 192},
    "pos_embed": {384: 192},
    "encoder_to_decoder": {96: 128, 384: 192},
    "encoder_to_cls_decoder": {96: 128, 64: 96},
}
DEPTHS = {"backbone": 3, "cls_head": 3, "decoder": 2}


def resized(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """The released names with other widths, depths and classes; a patch keeps its 1536 values."""
    others: dict[str, list[int]] = {}
    for name, shape in shapes.items():
        part = name.split(".")[0]
        keeps = {
            "backbone.patch_embed.proj.weight": shape[1:],
            "decoder.head.weight": [1536],
            "decoder.head.bias": [1536],
        }
        lengths = [
            length if length in keeps.get(name, []) else LENGTHS.get(part, {}).get(length, length)
            for length in shape
        ]
        if ".blocks." not in name:
            others[name] = lengths
        elif ".blocks.0." in name:
            others |= {
                name.replace(".blocks.0.", f".blocks.{block}."): lengths
                for block in range(DEPTHS[part])
            }
    return others


@pytest.mark.parametrize("width", [768, 384])
def test_positions_are_the_released_table(width: int) -> None:
    expected, table = GOLDEN["position_embedding"], sin_cos_positions(1568, width)
    torch.testing.assert_close(
        table[1567, :4], torch.tensor(expected[f"{width}[0,1567,:4]"]), rtol=0, atol=1e-6
    )
    assert table.double().sum().item() == pytest.approx(expected[f"{width}.sum"], abs=0.05)
