import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mar.config.canonical import canonical
from mar.config.mask_settings import MaskConfig
from mar.config.overrides import SettingError, build
from mar.model.mar import split_indices
from mar.model.masking import _run_cells, evaluation_mask, training_mask

# States A, B, C, D: top left, top right, bottom left, bottom right; 1 is hidden.
RELEASED_STATES = {
    0.25: ["1000", "0100", "0010", "0001"],
    0.5: ["1100", "0110", "0011", "1001"],
    0.75: ["1110", "0111", "1011", "1101"],
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cell_states(mask: torch.Tensor) -> list[str]:
    """The top left cell of each slice."""
    return ["".join(str(int(hidden)) for hidden in tokens[:2, :2].flatten()) for tokens in mask]


@pytest.mark.parametrize("start", range(4))
@pytest.mark.parametrize("ratio", RELEASED_STATES)
def test_the_mask_of_evaluation_runs_through_the_released_states(ratio: float, start: int) -> None:
    mask = evaluation_mask(
        build({"mask": {"ratio": ratio}, "evaluation": {"mask": {"start": start}}})
    )[0]
    states = RELEASED_STATES[ratio]
    assert cell_states(mask) == [states[(slice_ + start) % 4] for slice_ in range(8)]
    assert torch.equal(mask, mask[:, :2, :2].repeat(1, 7, 7))


@pytest.mark.parametrize("cell", [(14, 14), (7, 7), (7, 2), (2, 7), (2, 2)])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_cells_of_every_size_of_table_iv_keep_the_token_count(
    cell: tuple[int, int], ratio: float
) -> None:
    mask = MaskConfig(cell=cell, ratio=ratio)
    drawn = training_mask(mask, (8, 14, 14), 4, generator())
    assert drawn.flatten(1).sum(dim=1).tolist() == [int(ratio * 1568)] * 4


def released_state(area: int, num_hidden: int) -> torch.Tensor | None:
    """State A of a cell as the released code for larger cells has it; none where it crashes."""
    visible = area - num_hidden
    rarer = num_hidden if num_hidden <= visible else visible
    positions = list(range(0, area, -(-area // rarer))) if rarer else []
    if len(positions) < rarer:
        return None
    chosen = torch.zeros(area, dtype=torch.bool)
    chosen[positions[:rarer]] = True
    return chosen if num_hidden <= visible else ~chosen


@given(
    cell=st.sampled_from(
        [(14, 14), (7, 7), (7, 2), (2, 7), (1, 4), (4, 2), (2, 14), (7, 1), (4, 4)]
    ),
    num_hidden=st.integers(0, 196),
    slice_=st.integers(0, 7),
    start=st.integers(0, 195),
)
@settings(max_examples=100, deadline=None)
def test_states_of_other_cells_are_the_released_ones_where_a_cells_share_is_whole(
    cell: tuple[int, int], num_hidden: int, slice_: int, start: int
) -> None:
    area = cell[0] * cell[1]
    num_hidden, start = num_hidden % area, start % area
    expected = released_state(area, num_hidden)
    mask = MaskConfig(cell=cell, ratio=num_hidden / area)
    grid = (8, 28 // cell[0] * cell[0], 28 // cell[1] * cell[1])
    if mask.num_hidden(grid) != num_hidden * grid[0] * grid[1] * grid[2] // area:
        return  # the ratio is not exact in floating point
    starts = torch.full((1, grid[1] // cell[0], grid[2] // cell[1]), start)
    drawn = _run_cells(mask, grid, cell, mask.num_hidden(grid), starts)
    assert drawn.sum() == mask.num_hidden(grid)
    if expected is not None:
        state = expected.roll(start + slice_).view(cell)
        assert torch.equal(drawn[0, slice_], state.repeat(grid[1] // cell[0], grid[2] // cell[1]))


def test_half_of_a_2_by_7_cell_is_a_checkerboard_and_of_a_7_by_2_cell_stripes() -> None:
    wide = evaluation_mask(build({"mask": {"cell": [2, 7]}}))[0]
    assert wide[0, :2, :7].int().tolist() == [[1, 0, 1, 0, 1, 0, 1], [0, 1, 0, 1, 0, 1, 0]]
    tall = evaluation_mask(build({"mask": {"cell": [7, 2]}}))[0]
    assert torch.equal(tall[0], (torch.arange(14) % 2 == 0).expand(14, 14))
    assert torch.equal(tall, evaluation_mask(build({"mask": {"cell": [14, 14]}}))[0])


@pytest.mark.parametrize("ratio", RELEASED_STATES)
@given(seed=st.integers(0, 10_000), spatial=st.sampled_from(["repeated", "random"]))
@settings(max_examples=15, deadline=None)
def test_cells_drawn_in_training_run_through_the_released_states(
    ratio: float, seed: int, spatial: str
) -> None:
    states = RELEASED_STATES[ratio]
    mask = MaskConfig.model_validate({"ratio": ratio, "spatial": spatial, "temporal": "fixed"})
    clip = training_mask(mask, (8, 14, 14), 1, generator(seed))[0]
    cells = clip.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3).flatten(1, 2)
    for cell in cells.transpose(0, 1):
        seen = ["".join(str(int(hidden)) for hidden in tokens) for tokens in cell]
        start = states.index(seen[0])
        assert seen == [states[(start + slice_) % 4] for slice_ in range(8)]
    if spatial == "repeated":
        assert torch.equal(cells, cells[:, :1].expand_as(cells))


def test_half_of_a_large_cell_is_striped_not_a_block() -> None:
    mask = evaluation_mask(build({"mask": {"cell": [14, 14]}}))[0]
    stripes = torch.arange(14) % 2 == 0
    assert torch.equal(mask[0], stripes.expand(14, 14))
    assert torch.equal(mask[1], ~mask[0])


def test_each_place_of_a_running_cell_is_hidden_in_two_of_four_slices() -> None:
    mask = training_mask(MaskConfig(spatial="random"), (8, 14, 14), 3, generator())
    assert mask.sum(dim=1).unique().tolist() == [4]
    fixed = training_mask(MaskConfig(temporal="fixed"), (8, 14, 14), 3, generator())
    assert fixed[:, :4].sum(dim=1).unique().tolist() == [2]


def test_shuffling_permutes_whole_slices_and_starts_are_drawn_for_each_clip() -> None:
    shuffled = training_mask(MaskConfig(), (8, 4, 4), 64, generator())
    states = {state for clip in shuffled for state in cell_states(clip)[:1]}
    assert states == set(RELEASED_STATES[0.5])
    assert all(sorted(cell_states(clip)) == sorted(RELEASED_STATES[0.5] * 2) for clip in shuffled)
    assert any(cell_states(clip)[:4] != cell_states(clip)[4:] for clip in shuffled)


def test_a_mask_at_rest_is_the_same_in_every_slice_and_a_running_one_is_not() -> None:
    for strategy in ("cell", "random", "block", "uniform"):
        running = training_mask(
            MaskConfig(strategy=strategy, temporal="fixed"), (8, 14, 14), 2, generator()
        )
        assert not torch.equal(running[:, 0], running[:, 1])
    for strategy in ("cell", "block", "uniform", "tube"):
        resting = training_mask(
            MaskConfig(strategy=strategy, motion="standard"), (8, 14, 14), 2, generator()
        )
        assert torch.equal(resting, resting[:, :1].expand_as(resting))


def test_a_running_mask_is_the_slice_before_it_moved_one_column() -> None:
    for strategy in ("random", "block"):
        mask = training_mask(MaskConfig(strategy=strategy), (8, 14, 14), 2, generator())
        assert torch.equal(mask[:, 1:], mask[:, :-1].roll(1, dims=3))


def test_a_frame_mask_hides_whole_slices_and_a_block_is_one_piece() -> None:
    frame = training_mask(
        MaskConfig(strategy="frame", motion="standard"), (8, 4, 4), 8, generator()
    )
    assert set(frame.flatten(2).sum(dim=2).unique().tolist()) == {0, 16}
    block = training_mask(
        MaskConfig(strategy="block", motion="standard", ratio=0.25), (8, 14, 14), 8, generator()
    )
    for clip in block[:, 0]:
        rows, columns = clip.any(dim=1).nonzero().flatten(), clip.any(dim=0).nonzero().flatten()
        area = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        assert clip.sum() > 0.8 * area


def test_another_ratio_in_testing_changes_the_mask_of_evaluation_only() -> None:
    chosen = build({"mask": {"ratio": 0.5}, "evaluation": {"mask": {"ratio": 0.75}}})
    assert evaluation_mask(chosen).sum() == 1176
    assert training_mask(chosen.mask, chosen.grid, 1, generator()).sum() == 784


def test_visible_and_hidden_places_are_in_order_and_complete() -> None:
    mask = training_mask(
        MaskConfig(strategy="random", motion="standard"), (4, 4, 4), 3, generator()
    )
    visible, hidden = split_indices(mask)
    assert torch.equal(visible, visible.sort(dim=1).values)
    assert torch.equal(
        torch.cat([visible, hidden], dim=1).sort(dim=1).values, torch.arange(64).expand(3, -1)
    )
    assert mask.flatten(1).gather(1, hidden).all()
    assert not mask.flatten(1).gather(1, visible).any()


def complementary(ratio: float, cell: tuple[int, int], views: int, start: int = 0) -> torch.Tensor:
    mask = {"start": start, "views": "complementary"}
    tree = {"mask": {"ratio": ratio, "cell": cell}, "evaluation": {"mask": mask}}
    return evaluation_mask(build(tree), views=views)


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("cell", [(14, 14), (7, 2), (2, 7), (2, 2)])
def test_two_complementary_views_see_everything_once_at_half(
    cell: tuple[int, int], start: int
) -> None:
    """States A and C of a 2 × 2 cell; the two colours of a checkerboard in the larger ones."""
    first, second = complementary(0.5, cell, 2, start)
    assert torch.equal(first, ~second)


@pytest.mark.parametrize("start", range(4))
def test_four_complementary_views_see_everything_once_at_three_quarters(start: int) -> None:
    masks = complementary(0.75, (2, 2), 4, start)
    assert ((~masks).sum(dim=0) == 1).all()
    same = evaluation_mask(
        build({"mask": {"ratio": 0.75}, "evaluation": {"mask": {"start": start}}})
    )
    assert torch.equal(masks[:1], same)


@pytest.mark.parametrize("ratio", [0.25, 0.4, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("cell", [(14, 14), (7, 7), (2, 2)])
def test_complementary_views_hide_as_many_tokens_each(ratio: float, cell: tuple[int, int]) -> None:
    masks = complementary(ratio, cell, 6)
    assert masks.flatten(1).sum(dim=1).tolist() == [int(ratio * 1568)] * 6


def test_views_of_one_mask_are_that_mask() -> None:
    one = evaluation_mask(build({}))
    assert torch.equal(evaluation_mask(build({}), views=3), one.expand(3, -1, -1, -1))


def test_complementary_views_need_cells() -> None:
    tree = {"mask": {"strategy": "random"}, "evaluation": {"mask": {"views": "complementary"}}}
    with pytest.raises(
        SettingError, match=r"'complementary' needs mask\.strategy: cell or uniform"
    ):
        build(tree)


@pytest.mark.parametrize(
    ("change", "is_same"),
    [({"clips": 1, "crops": 1}, True), ({"clips": 2, "crops": 1}, False)],
)
def test_one_view_complements_nothing(change: dict[str, int], is_same: bool) -> None:
    plain = build({"evaluation": change})
    other = build({"evaluation": {**change, "mask": {"views": "complementary"}}})
    assert (canonical(plain) == canonical(other)) is is_same
