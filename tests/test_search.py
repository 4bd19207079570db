"""Searches: what is proposed, what is never trained, what is remembered."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from conftest import tiny_tree
from optuna.trial import TrialState

from mar.errors import Failure, UserError
from mar.model.flops import cost
from orchestration.reporting.search_report import best_trials, found_text, write_search_report
from orchestration.search.optuna_search import OptunaSearch, open_search
from orchestration.search.price_pruning import Curve, is_behind
from orchestration.search.schema import Dimension, read_search
from orchestration.studies.recipe import read_recipe
from orchestration.studies.trial import Trial

SEARCH: dict[str, Any] = {
    "title": "Tiny search",
    "recipe": "recipe.yaml",
    "space": {
        "mask.ratio": {"low": 0.0, "high": 0.75, "step": 0.25},
        "mask.cell": {"choices": [[2, 2], [4, 4]]},
        "classifier.kind": {"choices": ["linear", "bridging"]},
        "classifier.width": {
            "choices": [8, 16, 32],
            "condition": {"classifier.kind": ["bridging"]},
        },
        "reconstruction.weight": {"low": 0.01, "high": 1.0, "log": True},
    },
    "objectives": {"top1": "max", "gflops": "min"},
    "constraints": ["gflops <= 0.0004"],
    "trials": 8,
    "initial_points": [
        {
            "mask.ratio": 0.5,
            "mask.cell": [2, 2],
            "classifier.kind": "bridging",
            "classifier.width": 16,
            "reconstruction.weight": 0.1,
        }
    ],
}


@dataclass
class Run:
    identity: str
    metrics: dict[str, float]
    run_id: str
    status: str = "FINISHED"
    weights: str | None = None
    has_model: bool = True
    was_trained: bool = True


Open = Callable[..., OptunaSearch]


@pytest.fixture
def open_(tmp_path: Path, videos: Path) -> Open:
    """Open the search as ``mar run`` does, with changes to its file."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_tree(videos)))

    def opened(records: list[Run] | None = None, **changes: Any) -> OptunaSearch:
        (tmp_path / "search.yaml").write_text(
            yaml.safe_dump({**SEARCH, **changes}, sort_keys=False)
        )
        return open_search(
            read_search(str(tmp_path / "search.yaml")), tmp_path / "search.db", records or []
        )

    return opened


def accuracy(trial: Trial) -> dict[str, float]:
    """A stand-in for training: more hidden is worse, a wide bridging classifier is better."""
    settings = trial.settings
    bonus = settings.classifier.width / 10 if settings.classifier.kind == "bridging" else 0.0
    return {"test/top1": 80 - 20 * settings.mask.ratio + bonus}


def answer(proposer: OptunaSearch, most: int = 1000) -> list[Trial]:
    """Train, as it were, what is proposed."""
    trained: list[Trial] = []
    while len(trained) < most and (trial := proposer.next()) is not None:
        proposer.finished(trial.key, accuracy(trial), trial.settings)
        trained.append(trial)
    return trained


def test_the_papers_point_comes_first_and_what_breaks_a_constraint_is_never_trained(
    open_: Open,
) -> None:
    proposer = open_(trials=10)
    trained = answer(proposer)
    first = trained[0].settings
    assert (
        first.mask.ratio,
        first.mask.cell,
        first.classifier.width,
        first.reconstruction.weight,
    ) == (
        0.5,
        (2, 2),
        16,
        0.1,
    )
    from mar.model.flops import cost

    assert all(cost(trial.settings).gflops <= 0.0004 for trial in trained)
    rejected = [each for each in proposer.study.trials if "infeasible" in each.user_attrs]
    assert rejected and all(each.state == TrialState.PRUNED for each in rejected)
    assert proposer.num_done == 10


def test_a_condition_is_kept_and_no_trial_is_trained_twice(open_: Open) -> None:
    proposer = open_(trials=16)
    trained = answer(proposer)
    assert len({trial.key for trial in trained}) == len(trained)
    for each in proposer.study.trials:
        if "classifier.kind" in each.params:
            assert ("classifier.width" in each.params) == (
                each.params["classifier.kind"] == "bridging"
            )


def test_a_search_that_was_stopped_goes_on_with_what_it_had_proposed(open_: Open) -> None:
    proposer = open_()
    before = answer(proposer, most=3)
    lost = proposer.next()
    assert lost
    again = open_()
    assert again.num_done == 3
    rest = answer(again)
    assert rest[0].key == lost.key
    keys = [trial.key for trial in [*before, *rest]]
    assert len(set(keys)) == len(keys)
    assert again.num_done == 8
    assert open_().next() is None


def test_two_goals_make_a_front_and_the_best_is_a_recipe_ready_to_run(
    open_: Open, tmp_path: Path
) -> None:
    proposer = open_(trials=12)
    answer(proposer)
    front = [trial.values for trial in best_trials(proposer)]
    assert len(front) > 1
    assert front == sorted(front)
    assert [gflops for _, gflops in front] == sorted(gflops for _, gflops in front), (
        "more accuracy costs more, on a front"
    )
    write_search_report(proposer, tmp_path / "report")
    best = read_recipe(str(tmp_path / "report" / "best.yaml"))
    assert accuracy(Trial({}, best, ""))["test/top1"] == front[-1][0]
    names = {path.name for path in (tmp_path / "report").iterdir()}
    pictures = {
        "pareto_front.png",
        "history.png",
        "slice.png",
        "parallel_coordinates.png",
        "importances.png",
    }
    assert pictures | {"best.yaml", "front.csv", "trials.csv", "report.md"} <= names
    assert "Importance of each setting" in found_text(proposer)


def test_finished_trials_of_other_studies_are_known_and_not_trained_again(open_: Open) -> None:
    first = open_(constraints=[])
    known = [
        first.search.settings({"mask.ratio": ratio, "reconstruction.weight": 0.2})
        for ratio in (0.25, 0.75)
    ]
    other = first.search.settings({"mask.ratio": 0.5, "recipe.epochs": 2})
    trials = [Trial({}, settings, first.fingerprint) for settings in (*known, other)]
    records = [
        Run(trial.identity, accuracy(trial), f"run{workdir}")
        for workdir, trial in enumerate(trials)
    ]
    optuna.delete_study(study_name=first.study.study_name, storage=first.study._storage)
    proposer = open_(records, constraints=[])
    offered = [each for each in proposer.study.trials if "run" in each.user_attrs]
    assert [each.user_attrs["run"] for each in offered] == ["run0", "run1"], (
        "run2 has another setting that is not searched"
    )
    assert proposer.num_done == 0
    params = {
        "mask.ratio": 0.75,
        "mask.cell": "[2, 2]",
        "classifier.kind": "bridging",
        "classifier.width": 16,
    }
    proposer.study.enqueue_trial({**params, "reconstruction.weight": 0.2})
    keys = {trial.key for trial in answer(proposer)}
    assert trials[1].key not in keys
    assert proposer.known >= 1


def test_what_is_known_of_other_studies_must_keep_the_constraints_too(open_: Open) -> None:
    first = open_()
    cheap, dear = (
        first.search.settings({"mask.ratio": ratio, "reconstruction.weight": 0.2})
        for ratio in (0.75, 0.0)
    )
    trials = [Trial({}, settings, first.fingerprint) for settings in (cheap, dear)]
    records = [
        Run(trial.identity, accuracy(trial), f"run{workdir}")
        for workdir, trial in enumerate(trials)
    ]
    optuna.delete_study(study_name=first.study.study_name, storage=first.study._storage)
    offered = [
        each.user_attrs["run"] for each in open_(records).study.trials if "run" in each.user_attrs
    ]
    assert offered == ["run0"]


@pytest.mark.parametrize("step", [0.05, 0.1, 0.15, 0.3, 1e-3])
def test_every_point_that_a_stepped_range_draws_lies_in_it(step: float) -> None:
    dimension = Dimension(low=0.0, high=0.9, step=step)
    drawn = {
        optuna.create_study(sampler=optuna.samplers.RandomSampler(seed))
        .ask()
        .suggest_float("x", 0.0, 0.9, step=step)
        for seed in range(50)
    }
    assert all(dimension.holds(value) for value in drawn | {step, 2 * step, 3 * step})
    assert not dimension.holds(step * 1.5)


def test_a_search_that_was_killed_while_it_began_gets_all_of_its_first_points(
    open_: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    enqueue = optuna.Study.enqueue_trial
    left = 1

    def killed(study: optuna.Study, *args: Any, **options: Any) -> None:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        enqueue(study, *args, **options)

    points = [{"mask.ratio": 0.5}, {"mask.ratio": 0.75}]
    monkeypatch.setattr(optuna.Study, "enqueue_trial", killed)
    with pytest.raises(KeyboardInterrupt):
        open_(initial_points=points)
    monkeypatch.undo()
    waiting = open_(initial_points=points).study.get_trials(states=[TrialState.WAITING])
    fixed = [trial.system_attrs["fixed_params"]["mask.ratio"] for trial in waiting]
    assert fixed == [0.5, 0.75]


def test_another_goal_or_setting_is_another_search(open_: Open, tmp_path: Path) -> None:
    answer(open_(trials=3))
    assert open_(trials=3).next() is None
    assert open_(trials=5).num_done == 3, "more trials are more of the same search"
    assert open_(trials=3, constraints=["gflops <= 0.0005"]).num_done == 0
    assert open_(trials=3, fixed={"recipe.base_lr": 0.1}).num_done == 0


def test_a_space_of_few_points_is_tried_out_and_then_the_search_ends(open_: Open) -> None:
    few = {
        "mask.ratio": {"choices": [0.25, 0.5, 0.75]},
        "classifier.kind": {"choices": ["linear", "bridging"]},
    }
    proposer = open_(space=few, initial_points=[], constraints=[], trials=20)
    trained = answer(proposer)
    assert len({trial.key for trial in trained}) == len(trained) == 6
    assert proposer.num_done == 6, "what was found trained is not counted as trained"
    assert len({tuple(trial.values) for trial in best_trials(proposer)}) == len(
        best_trials(proposer)
    )
    assert (
        f"6 trials finished, 0 ended early, 0 failed or were proposed twice, {proposer.known} were "
        "already trained" in found_text(proposer)
    )


def test_a_search_with_all_points_under_way_waits_for_none(open_: Open) -> None:
    two = {"mask.ratio": {"choices": [0.5, 0.75]}}
    proposer = open_(space=two, initial_points=[], constraints=[], trials=5)
    assert proposer.next() and proposer.next()
    assert proposer.next() is None


def test_a_search_whose_trials_all_fail_ends(open_: Open) -> None:
    proposer, failed = open_(constraints=[], trials=100), list[str]()
    while (trial := proposer.next()) is not None:
        failed.append(trial.key)
        proposer.failed(trial.key)
    assert len(set(failed)) == len(failed) == 3


def test_a_condition_may_look_at_what_the_recipe_leaves_at_its_default(open_: Open) -> None:
    space = {
        "mask.cell": {"choices": [[2, 2], [4, 4]], "condition": {"classifier.mask_tokens": [False]}}
    }
    trial = open_(space=space, initial_points=[], constraints=[]).next()
    assert trial
    assert (
        "mask.cell" in open_(space=space, initial_points=[], constraints=[]).study.trials[0].params
    )


def test_whole_ends_of_a_fraction_are_a_range(open_: Open) -> None:
    proposer = open_(
        space={"reconstruction.weight": {"low": 0, "high": 1}},
        initial_points=[],
        constraints=[],
        trials=4,
    )
    drawn = [trial.settings.reconstruction.weight for trial in answer(proposer)]
    assert len(drawn) == 4 and any(0 < weight < 1 for weight in drawn)


def test_a_goal_that_was_not_measured_is_named(open_: Open) -> None:
    proposer = open_(objectives={"memory_gib": "min"}, constraints=[])
    trial = proposer.next()
    assert trial
    with pytest.raises(Failure, match="no memory/batch_of_1_gib"):
        proposer.finished(trial.key, accuracy(trial), trial.settings)


@pytest.mark.parametrize(
    ("word", "output"),
    [
        ("sampler=foo", "sampler=foo: Input should be"),
        ("trials=abc", "trials=abc: Input should be a valid integer"),
        ("trials=0", "trials=0: Input should be greater than 0"),
        ("recipe=5", "no recipe '5'"),
        ("mask.ration=0.5", "mask.ration: no such setting"),
    ],
)
def test_a_mistake_on_the_command_line_of_a_search_is_named(
    open_: Open, tmp_path: Path, word: str, output: str
) -> None:
    open_()
    with pytest.raises(UserError) as caught:
        read_search(str(tmp_path / "search.yaml"), [word])
    assert output in str(caught.value)


def test_a_trial_that_is_worse_than_others_were_is_ended_early(open_: Open) -> None:
    proposer = open_(objectives={"top1": "max"}, pruner="median", trials=12, constraints=[])
    for _ in range(6):
        trial = proposer.next()
        assert trial
        assert not any(
            proposer.should_prune(trial.key, epoch, {"val/top1": 50.0 + epoch})
            for epoch in (1, 2, 3)
        )
        proposer.finished(trial.key, {"test/top1": 53.0}, trial.settings)
    bad = proposer.next()
    assert bad
    pruned = [proposer.should_prune(bad.key, epoch, {"val/top1": 10.0}) for epoch in (1, 2, 3)]
    # The first epoch is still in warm-up; a pruned trial is not asked about again.
    assert pruned == [False, True, False]
    assert bad.key in proposer.pruned
    assert proposer.study.trials[-1].state == TrialState.PRUNED


def test_a_trial_that_has_only_its_test_before_it_is_not_ended(open_: Open) -> None:
    proposer = open_(objectives={"top1": "max"}, pruner="median", trials=12, constraints=[])
    for _ in range(6):
        trial = proposer.next()
        assert trial
        last = trial.settings.recipe.epochs
        proposer.should_prune(trial.key, last, {"val/top1": 50.0})
        proposer.finished(trial.key, {"test/top1": 53.0}, trial.settings)
    bad = proposer.next()
    assert bad
    assert not proposer.should_prune(bad.key, last, {"val/top1": 10.0})


def test_a_trial_is_compared_with_those_that_cost_no_more() -> None:
    cheap = [Curve([1.0, 5.0], {2: accuracy}) for accuracy in (40.0, 42.0, 44.0, 46.0)]
    dear = [Curve([9.0, 9.0], {2: accuracy}) for accuracy in (80.0, 81.0, 82.0, 83.0)]
    # As good as the median of what costs no more: it goes on, though all dear ones are better.
    assert not is_behind(Curve([1.0, 5.0], {2: 42.0}), 2, [*cheap, *dear], 0.5)
    assert is_behind(Curve([1.0, 5.0], {2: 41.0}), 2, [*cheap, *dear], 0.5)
    assert not is_behind(Curve([1.0, 5.0], {2: 41.0}), 2, [*cheap, *dear], 0.25)
    # A dear one is compared with all of them.
    assert is_behind(Curve([9.0, 9.0], {2: 45.0}), 2, [*cheap, *dear], 0.5)
    # One that costs less in one of two is no more than it, and not compared: too few are left.
    assert not is_behind(Curve([0.5, 9.0], {2: 1.0}), 2, [*cheap, *dear], 0.5)
    # The first epoch is warm-up, and others must have reached the same epoch.
    assert not is_behind(Curve([9.0, 9.0], {1: 0.0}), 1, [*cheap, *dear], 0.5)
    assert not is_behind(Curve([9.0, 9.0], {3: 0.0}), 3, [*cheap, *dear], 0.5)


def test_a_search_of_several_objectives_prunes_by_price_and_remembers_it(open_: Open) -> None:
    changes: dict[str, Any] = {"pruner": "price", "trials": 40, "sampler": "random"}
    proposer = open_(**changes)
    for _ in range(6):
        trial = proposer.next()
        assert trial
        for epoch in (1, 2):
            assert not proposer.should_prune(trial.key, epoch, {"val/top1": 50.0})
        proposer.finished(trial.key, {"test/top1": 53.0}, trial.settings)
    # Killed while four ran: these are proposed again, and are no others to compare with.
    killed = [trial for trial in (proposer.next() for _ in range(4)) if trial]
    for trial in killed:
        for epoch in (1, 2):
            proposer.should_prune(trial.key, epoch, {"val/top1": 99.0})
    # Resumed: what the others reached is in Optuna's storage.
    proposer = open_(**changes)
    again = proposer.next()
    assert again and again.key in {trial.key for trial in killed}
    for epoch in (1, 2):
        assert not proposer.should_prune(again.key, epoch, {"val/top1": 51.0})
    asked = [trial for trial in (proposer.next() for _ in range(12)) if trial]
    dearest = max(asked, key=lambda trial: cost(trial.settings).gflops)
    number = proposer.asked[dearest.key].number
    assert not proposer.should_prune(dearest.key, 1, {"val/top1": 10.0})
    assert proposer.should_prune(dearest.key, 2, {"val/top1": 10.0})
    assert dearest.key in proposer.pruned
    stored = proposer.study.trials[number]
    assert stored.state == TrialState.PRUNED
    assert stored.user_attrs["accuracies"] == {"1": 10.0, "2": 10.0}
    # Its constraints are known to the sampler all the same.
    assert any("constraint" in name for name in stored.system_attrs), stored.system_attrs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives": {"top2": "max"}}, "no metric 'top2'"),
        (
            {"constraints": ["top1 >= 50"]},
            "'top1 >= 50': expected a cost and a bound, as 'gflops <= 90'",
        ),
        (
            {"space": {"mask.ration": {"low": 0, "high": 1}}, "initial_points": []},
            "mask.ration: no such setting",
        ),
        (
            {"space": {"mask.ratio": {"low": 0.1}}, "initial_points": []},
            "mask.ratio: expected low and high, or choices",
        ),
        (
            {"initial_points": [{"clip.frames": 8}]},
            "initial point 1: clip.frames is not in the space",
        ),
        ({"pruner": "asha"}, "pruner: asha needs one objective, there are 2; for several: price"),
        (
            {"pruner": "price", "objectives": {"top1": "max", "time_s": "min"}},
            "costs that are known before training (min); time_s does not fit",
        ),
        (
            {"pruner": "price", "objectives": {"gflops": "min"}},
            "'price' compares top1 (max) at costs",
        ),
        ({"pruner": "price", "quantile": 1.0}, "quantile: must be less than 1"),
        ({"sampler": "magic"}, "sampler: must be"),
        ({"space": {}, "initial_points": []}, "a search needs a space and objectives"),
        ({"objectives": {}}, "a search needs a space and objectives"),
        (
            {"space": {"seed": {"low": 0, "high": 3}}, "initial_points": []},
            "seed: no such setting to search",
        ),
        ({"initial_points": [{"mask.ratio": 0.9}]}, "initial point 1: mask.ratio cannot be 0.9"),
        (
            {"initial_points": [{"mask.cell": [3, 3]}]},
            "initial point 1: mask.cell cannot be [3, 3]",
        ),
        (
            {
                "space": {"mask.cell": {"choices": [[2, 2]], "condition": {"mask.ration": [0.5]}}},
                "initial_points": [],
            },
            "mask.cell: condition: mask.ration: no such setting",
        ),
    ],
)
def test_a_mistake_in_a_search_file_is_named(
    open_: Open, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        open_(**changes)
    assert message in str(caught.value)
    assert "search.yaml" in str(caught.value)


@pytest.mark.parametrize("name", ["search_quickstart", "search_accuracy_and_cost"])
def test_a_shipped_search_is_sound_and_begins_within_its_constraints(name: str) -> None:
    search = read_search(name)
    assert all(
        excess <= 0
        for point in search.file.initial_points
        for excess in search.excess(search.settings(point))
    )


@pytest.mark.parametrize("sampler", ["random", "nsga2", "nsga3", "gp", "qmc"])
def test_every_sampler_finds_its_number_of_trials(open_: Open, sampler: str) -> None:
    proposer = open_(sampler=sampler, trials=4, constraints=[])
    answer(proposer)
    assert proposer.num_done == 4


def test_a_mask_cell_is_kept_as_text_and_is_a_pair_again(open_: Open) -> None:
    settings = open_().search.settings({"mask.cell": json.dumps([4, 4])})
    assert settings.mask.cell == (4, 4)
