"""The model gives the released model's numbers for closed-form weights and a closed-form video."""

import json
import math
import zlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mar.config import ExperimentConfig
from mar.decoder import reconstruction_loss, reconstruction_target
from mar.encoder import flat_conv_weight
from mar.layers import sin_cos_positions
from mar.masking import evaluation_mask
from mar.model import MAR, split_places
from mar.settings import build

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


RENAMED = [
    ("backbone.patch_embed.proj", "encoder.embed"),
    ("backbone.", "encoder."),
    ("encoder_to_decoder", "decoder.project"),
    ("encoder_to_cls_decoder", "classifier.project"),
    ("cls_head.", "classifier."),
    (".norm_ffn.", ".norm2."),
    (".ffn.net.0.", ".mlp.fc1."),
    (".ffn.net.3.", ".mlp.fc2."),
    (".attn.to_qkv.", ".attn.qkv."),
]


def released_weights() -> dict[str, Tensor]:
    """Our names for the released checkpoint's tensors."""
    released = {
        name: closed_form_weight(name, shape)
        for name, shape in GOLDEN["parameters"].items()
        if name not in ("mean", "std", "pos_embed", "cls_head.mask_token")
    }
    ours: dict[str, Tensor] = {"decoder.mask_token": released.pop("mask_token")}
    for name, value in released.items():
        if name.endswith("v_bias"):
            continue
        if name.endswith("q_bias"):
            v_bias = released[name.replace("q_bias", "v_bias")]
            name, value = name.replace("q_bias", "qkv.bias"), torch.cat([value, torch.zeros_like(value), v_bias])
        for old, new in RENAMED:
            name = name.replace(old, new) if not old.startswith("backbone") else name.replace(old, new, 1)
        if name.startswith("classifier.blocks."):
            name = name.replace(".norm.", ".norm1.")
        ours[name] = flat_conv_weight(value) if value.ndim == 5 else value
    return ours


def golden_settings(ratio: float) -> ExperimentConfig:
    return build(
        {
            "data": {"num_classes": 7},
            "encoder": {"size": "custom", "width": 96, "depth": 2, "heads": 3, "drop_path": 0.0},
            "classifier": {"width": 64, "dropout": 0.0},
            "mask": {"ratio": ratio},
        }
    )


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_released_models_numbers_come_out(ratio: float) -> None:
    settings, expected = golden_settings(ratio), GOLDEN["by_mask_ratio"][str(ratio)]
    model = MAR(settings).eval()
    model.load_state_dict(released_weights())
    pixels = closed_form_pixels()
    hidden = evaluation_mask(settings).expand(2, -1, -1, -1)
    with torch.no_grad():
        visible_places, hidden_places = split_places(hidden)
        tokens = model.encoder((pixels - model.mean) / model.std, visible_places)
        scores = model.classify(pixels, hidden)
        predicted = model.reconstruct(pixels, hidden)
        target = reconstruction_target(pixels, hidden_places, (2, 16, 16), normalize=True)
    near = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(scores, torch.tensor(expected["logits_eval"]), **near)
    torch.testing.assert_close(tokens[0, 0, :4], torch.tensor(expected["encoder_out[0,0,:4]"]), **near)
    torch.testing.assert_close(tokens[1, -1, -4:], torch.tensor(expected["encoder_out[1,-1,-4:]"]), **near)
    for name, tensor in (("pixel_pred", predicted), ("target", target)):
        for key, values in expected.items():
            if key.startswith(f"{name}[0,0"):
                torch.testing.assert_close(tensor[0, 0, : len(values)], torch.tensor(values), **near)
    loss = reconstruction_loss(predicted, target).mean().item()
    assert loss == pytest.approx(next(v for k, v in expected.items() if "mse" in k.lower()), abs=1e-5)


@pytest.mark.parametrize("width", [768, 384])
def test_positions_are_the_released_table(width: int) -> None:
    expected, table = GOLDEN["position_embedding"], sin_cos_positions(1568, width)
    torch.testing.assert_close(table[1567, :4], torch.tensor(expected[f"{width}[0,1567,:4]"]), rtol=0, atol=1e-6)
    assert table.double().sum().item() == pytest.approx(expected[f"{width}.sum"], abs=0.05)
