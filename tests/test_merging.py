"""Merging tokens in testing (ToMe), without training."""

from collections.abc import Callable

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mar.config.overrides import SettingError, build
from mar.config.schema import TrainingConfig
from mar.model.flops import cost
from mar.model.layers import transformer_blocks
from mar.model.mar import MAR
from mar.model.masking import evaluation_mask
from mar.model.merging import _attention, _merged, run_merging
from orchestration.studies.identity import identity, training_identity


def test_tokens_that_are_equal_are_merged_without_a_change() -> None:
    torch.manual_seed(0)
    # Of each pair side by side one is even and one is odd.
    tokens = torch.randn(2, 5, 16).repeat_interleave(2, dim=1)
    blocks = transformer_blocks(16, 1, 2).eval()
    for merge in (1, 5):
        with torch.no_grad():
            torch.testing.assert_close(run_merging(blocks, tokens, merge), blocks(tokens))


def test_a_merged_token_counts_as_often_as_the_tokens_in_it() -> None:
    torch.manual_seed(0)
    attention = transformer_blocks(16, 1, 2)[0].attn
    tokens = torch.randn(1, 3, 16)
    sizes = torch.tensor([2, 1, 3])
    with torch.no_grad():
        merged, _ = _attention(attention, tokens, sizes.float().view(1, 3, 1))
        apart = attention(tokens.repeat_interleave(sizes, dim=1))
    torch.testing.assert_close(merged, apart[:, [0, 2, 3]])


def test_the_most_similar_pair_becomes_its_mean_and_every_token_gets_its_value() -> None:
    torch.manual_seed(0)
    blocks = transformer_blocks(16, 1, 2).eval()
    tokens = torch.randn(1, 7, 16)
    block = blocks[0]
    with torch.no_grad():
        merged = run_merging(blocks, tokens, 1)
        after = tokens + block.attn(block.norm1(tokens))
        width = 16
        keys = block.attn.qkv(block.norm1(tokens))[..., width : 2 * width]
        keys = keys.unflatten(-1, (2, 8)).mean(dim=2)[0]
        pairs = {
            (even, odd): torch.cosine_similarity(keys[even], keys[odd], dim=0).item()
            for even in range(0, 7, 2)
            for odd in range(1, 7, 2)
        }
        one, other = max(pairs, key=lambda pair: pairs[pair])
        after[0, [one, other]] = after[0, [one, other]].mean(dim=0)
        expected = after + block.mlp(block.norm2(after))
    torch.testing.assert_close(merged, expected)


@pytest.mark.parametrize("merge", [0, 3, 1000])
def test_its_operations_are_those_that_pytorch_counts(
    tiny: Callable[..., TrainingConfig], merge: int
) -> None:
    settings = tiny({"evaluation.merge": merge, "encoder.depth": 3})
    model = MAR(settings).eval()
    tubelets = torch.rand(1, 32, 96)
    visible = torch.arange(32)[None]
    # PyTorch counts no operations of the fused attention.
    math = sdpa_kernel(SDPBackend.MATH)
    with math, FlopCounterMode(display=False) as counter, torch.no_grad():
        model.encoder(tubelets, visible)
    width = settings.encoder.dimensions[0]
    # What our count has besides: the embedding of the hidden tokens, and five for a norm's value.
    tokens = [32]
    for _ in range(3):
        tokens.append(tokens[-1] - min(merge, tokens[-1] // 2))
    norms = 5 * width * (sum(tokens[:3]) + sum(tokens[1:]) + 32)
    embedding = 32 * 96 * width
    classifier = cost(tiny({"encoder.depth": 3})).gflops * 1e9 - _encoder(tiny)
    ours = cost(settings).gflops * 1e9 - classifier - norms - embedding
    assert ours == pytest.approx(counter.get_total_flops() / 2)


def _encoder(tiny: Callable[..., TrainingConfig]) -> float:
    """Return the operations of three blocks on 32 of 64 tokens, without merging."""
    width = tiny().encoder.dimensions[0]
    blocks = 3 * (12 * width**2 * 32 + 2 * 32**2 * width + 10 * 32 * width)
    return blocks + 64 * 96 * width + 5 * 32 * width


def test_more_than_there_are_merge_to_one() -> None:
    torch.manual_seed(0)
    blocks = transformer_blocks(16, 6, 2).eval()
    with torch.no_grad():
        merged = run_merging(blocks, torch.randn(2, 9, 16), 1000)
    assert merged.isfinite().all()
    torch.testing.assert_close(merged, merged[:, :1].expand_as(merged))


def test_in_bfloat16_the_same_tokens_are_merged() -> None:
    torch.manual_seed(0)
    # Tokens so similar that bfloat16 cannot tell their similarities apart.
    keys = torch.randn(1, 1, 16) + 0.05 * torch.randn(1, 100, 16)
    values = torch.randn(1, 100, 16)
    sizes = torch.ones(1, 100, 1)
    with torch.autocast("cpu", torch.bfloat16):
        _, _, moved = _merged(values, sizes, keys, 20)
    assert torch.equal(moved, _merged(values, sizes, keys, 20)[2])


def test_it_changes_the_test_and_not_the_training(tiny: Callable[..., TrainingConfig]) -> None:
    plain, merging = tiny(), tiny({"evaluation.merge": 2})
    lines = [identity(each, "data") for each in (plain, merging)]
    assert lines[0] != lines[1]
    assert training_identity(lines[0]) == training_identity(lines[1])
    torch.manual_seed(0)
    one = MAR(plain)
    other = MAR(merging)
    other.load_state_dict(one.state_dict())
    pixels = torch.rand(2, 3, 8, 16, 16)
    hidden = evaluation_mask(plain).expand(2, -1, -1, -1)
    visible = torch.arange(20)[None]
    tubelets = torch.rand(1, 20, 96)
    with torch.no_grad():
        trained = [each.encoder.train()(tubelets, visible) for each in (one, other)]
        tested = [each.eval().classify(pixels, hidden) for each in (one, other)]
    assert torch.equal(*trained)
    assert not torch.equal(*tested)
    assert cost(merging).gflops < cost(plain).gflops
    assert cost(merging).train_gflops == cost(plain).train_gflops


def test_less_than_nothing_is_refused() -> None:
    with pytest.raises(SettingError, match=r"evaluation\.merge"):
        build({"evaluation": {"merge": -1}})
