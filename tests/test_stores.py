"""Stores: any path, moved and copied, with one half lost; what studies are called in them."""

import shutil
from pathlib import Path

import pytest
from commands import run_mar as mar
from study_runs import write_studies

from orchestration.config import LaunchConfig, sqlite_address
from orchestration.secrets import without_secrets
from orchestration.studies.names import name_in_store, name_of
from orchestration.tracking.store import Store

STUDY = """
title: Two
recipe: recipe.yaml
axes:
  mask: {"50": {mask.ratio: 0.5}, "25": {mask.ratio: 0.25}}
table: {columns: [top1], reference: "50"}
claims: {"less is better": ["25 > 50"]}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, videos: Path) -> Path:
    """A folder with a study of two trials that has run, in ``store``."""
    folder = tmp_path_factory.mktemp("studies")
    write_studies(folder, videos, {"two.yaml": STUDY})
    mar(folder, "run", "two.yaml", "--backend", "local", "--store", "store")
    return folder


@pytest.fixture
def store(folder: Path, tmp_path: Path) -> Path:
    """A copy of the store, in a place of its own."""
    return Path(shutil.copytree(folder / "store", tmp_path / "copy"))


@pytest.fixture
def lost(folder: Path, tmp_path: Path) -> Path:
    """A copy of the store without its database."""
    return Path(
        shutil.copytree(
            folder / "store", tmp_path / "lost", ignore=shutil.ignore_patterns("mlflow.db")
        )
    )


def table(folder: Path, store: Path | str) -> str:
    return mar(folder, "table", "two.yaml", "--store", str(store))[0]


@pytest.mark.parametrize(
    "name", ["what?a", "a%25b#c", "with space", "quote'\"s", "ünï", "a&b=c;d", "st:ore"]
)
def test_a_store_may_have_any_name(folder: Path, tmp_path: Path, name: str) -> None:
    other = tmp_path / f"{name}x"
    shutil.copytree(folder / "store", tmp_path / name)
    shutil.copytree(folder / "store", other)
    arguments = (
        "--backend",
        "local",
        "--store",
        str(tmp_path / name),
        "--filter",
        "mask=50",
        "recipe.base_lr=0.005",
    )
    mar(folder, "run", "two.yaml", *arguments)
    records = {
        workdir: len(Store(LaunchConfig(store=workdir)).trials())
        for workdir in (tmp_path / name, other)
    }
    assert records == {tmp_path / name: 3, other: 2}
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted([name, other.name]), (
        "nothing beside them"
    )


def test_an_address_of_a_plain_path_is_plain() -> None:
    assert sqlite_address(Path("/a/b.db")) == "sqlite:////a/b.db"


@pytest.mark.parametrize("how", ["moved", "copied", "through a link"])
def test_a_store_that_is_elsewhere_now_keeps_its_artifacts_below_it(
    folder: Path, tmp_path: Path, how: str
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(folder / "store", first)
    table(folder, first)
    if how == "moved":
        first.rename(second)
    elif how == "copied":
        shutil.copytree(first, second)
    else:
        second.symlink_to(first)
    before = {file: file.stat().st_mtime_ns for file in first.rglob("*")} if how == "copied" else {}
    mar(
        folder,
        "run",
        "two.yaml",
        "--backend",
        "local",
        "--store",
        str(second),
        "--filter",
        "mask=50",
        "recipe.base_lr=0.005",
    )
    shutil.rmtree(second / "trials")
    assert "| 50" in table(folder, second)
    client = Store(LaunchConfig(store=second)).client
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    root = second.resolve().as_uri()
    assert {run.info.artifact_uri.startswith(f"{root}/") for run in runs} == {True}
    if how == "moved":
        assert not first.exists(), "nothing is written to the old place"
    if how == "copied":
        assert {file: file.stat().st_mtime_ns for file in first.rglob("*")} == before


def test_artifacts_lie_below_the_store_where_an_sqlite_address_is_given(
    folder: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "here"
    workdir.mkdir()
    arguments = (
        "--backend",
        "local",
        "--store",
        str(tmp_path / "store"),
        "--tracking-uri",
        f"sqlite:///{tmp_path}/runs.db",
    )
    mar(workdir, "run", str(folder / "two.yaml"), *arguments, "--filter", "mask=50")
    assert list((tmp_path / "store" / "artifacts").rglob("metrics.json"))
    assert not list(workdir.iterdir())


def test_with_the_trials_folder_lost_everything_is_read_from_mlflow(
    folder: Path, store: Path
) -> None:
    expected = table(folder, store)
    shutil.rmtree(store / "trials")
    assert table(folder, store) == expected, "the comparison with the reference too"
    mar(folder, "report", "two.yaml", "--store", str(store))
    output, _ = mar(folder, "run", "two.yaml", "--store", str(store), "--backend", "local")
    assert "2 trials, 2 finished before, 0 to train" in output


def test_with_the_database_lost_recover_writes_the_runs_again(folder: Path, lost: Path) -> None:
    store = lost
    expected = table(folder, folder / "store")
    before = {run.key: run for run in Store(LaunchConfig(store=folder / "store")).trials()}
    _, error = mar(folder, "table", "two.yaml", "--store", str(store), code=2)
    assert f"mar recover --store {store}" in error
    output, _ = mar(folder, "recover", "--store", str(store))
    assert "2 recovered, 0 known before, 0 damaged" in output
    assert table(folder, store) == expected
    after = {run.key: run for run in Store(LaunchConfig(store=store)).trials()}
    assert after.keys() == before.keys()
    for key, run in after.items():
        assert run.experiment == "two" and run.status == "FINISHED"
        assert run.identity == before[key].identity
        known = {
            name: value
            for name, value in before[key].metrics.items()
            if not name.startswith("cost/")
        }
        assert {name: run.metrics[name] for name in known} == known
    assert "0 recovered, 2 known before" in mar(folder, "recover", "--store", str(store))[0]


def test_a_result_is_not_recovered_under_another_name_than_what_was_trained(
    folder: Path, lost: Path
) -> None:
    first, second = sorted((lost / "trials").iterdir())
    (first / "trial.json").write_text("{half")  # its settings and its data tell it all the same
    first.rename(
        lost / "trials" / "0123456789ab"
    )  # as another version's key, or other data's, would be
    (second / "trial.json").unlink()
    output, _ = mar(folder, "recover", "--store", str(lost), code=1)
    assert f"recovered  {second.name} (recovered)" in output
    assert "0123456789ab/result: its settings cannot be identified" in output


def test_with_the_database_lost_a_run_takes_the_results_and_trains_nothing(
    folder: Path, lost: Path
) -> None:
    store = lost
    expected = table(folder, folder / "store")
    models = {
        file: file.stat().st_mtime_ns for file in (store / "trials").rglob("model.safetensors")
    }
    _, error = mar(folder, "run", "two.yaml", "--store", str(store), "--backend", "local")
    assert "2 finished results" in error and "mar recover" in error
    assert table(folder, store) == expected
    assert {
        file: file.stat().st_mtime_ns for file in (store / "trials").rglob("model.safetensors")
    } == models


def test_a_damaged_result_is_named_and_not_trained_again(
    folder: Path, lost: Path, tmp_path: Path
) -> None:
    store = lost
    model = next((store / "trials").rglob("model.safetensors"))
    model.write_bytes(model.read_bytes() + b"x")
    output, _ = mar(folder, "recover", "--store", str(store), code=1)
    assert f"damaged    {model.parent}: model.safetensors changed" in output
    again = shutil.copytree(lost, tmp_path / "again", ignore=shutil.ignore_patterns("mlflow.db"))
    output, _ = mar(folder, "run", "two.yaml", "--store", str(again), "--backend", "local", code=1)
    assert "is damaged" in output and "remove that folder" in output
    assert model.read_bytes().endswith(b"x")


def test_two_studies_of_one_file_name_are_told_apart(
    folder: Path, store: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(folder / "recipe.yaml", other)
    (other / "two.yaml").write_text(STUDY.replace("title: Two", "title: Another"))
    mar(other, "run", "two.yaml", "--backend", "local", "--store", str(store))
    assert sorted(path.name for path in (store / "reports").iterdir()) == ["other_two", "two"]
    assert "**Two**" in (store / "reports" / "two" / "table.md").read_text()
    assert "**Another**" in (store / "reports" / "other_two" / "table.md").read_text()
    assert name_of(str(other / "two.yaml"), store) == "other_two", "mar stop finds it too"
    assert name_of(str(folder / "two.yaml"), store) == "two"


def test_a_study_whose_file_was_moved_keeps_its_name(tmp_path: Path) -> None:
    file, moved = tmp_path / "a" / "s.yaml", tmp_path / "b" / "s.yaml"
    for each in (file, moved):
        each.parent.mkdir()
        each.write_text(STUDY)
    store = tmp_path / "store"
    assert name_in_store("s", file, store, claims=True) == "s"
    assert name_in_store("s", moved, store) == "b_s"
    file.unlink()
    assert name_in_store("s", moved, store) == "s"


def test_a_recipe_is_stopped_by_the_name_that_its_run_has(folder: Path, tmp_path: Path) -> None:
    assert name_of(str(folder / "recipe.yaml"), tmp_path) == f"{folder.name}_recipe"
    assert name_of("quickstart", tmp_path) == "quickstart"
    assert name_of("a name that is no file", tmp_path) == "a name that is no file"


def test_passwords_are_left_out_of_every_address() -> None:
    text = "postgresql://user:s3cr/et@db:5432/x and http://me:p@ss@host/ fail"
    assert without_secrets("http://user:s3cr3t@127.0.0.1:9/ fails") == "http://127.0.0.1:9/ fails"
    assert "p@ss" not in without_secrets(text) and "me:" not in without_secrets(text)


def test_no_password_is_printed(folder: Path, tmp_path: Path) -> None:
    arguments = ("--tracking-uri", "http://user:s3cr3t@127.0.0.1:9/")
    for verb in ("table", "run", "plan"):
        output, error = mar(folder, verb, "two.yaml", "--store", str(tmp_path), *arguments, code=1)
        assert "s3cr3t" not in output + error
        assert "http://127.0.0.1:9/" in error


@pytest.mark.parametrize(
    "word",
    [
        "clip.frames=010",
        "recipe.base_lr=1:30",
        "recipe.base_lr=.inf",
        "recipe.epochs=1_0",
        "recipe.epochs=0x10",
    ],
)
def test_a_number_that_a_person_did_not_mean_is_refused(folder: Path, word: str) -> None:
    _, error = mar(folder, "plan", "two.yaml", word, code=2)
    assert "is not a plain decimal number" in error and word.split("=")[0] in error


def test_such_a_number_in_a_file_is_named_with_its_line(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "recipe.yaml", tmp_path)
    (tmp_path / "two.yaml").write_text(STUDY.replace("mask.ratio: 0.25", "clip.frames: 010"))
    _, error = mar(tmp_path, "plan", "two.yaml", code=2)
    assert "two.yaml:5" in error and "010" in error


# What a person is told of their files


def test_one_name_means_one_file_in_every_verb_and_every_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: recipes/quickstart\nseed: 3\n")
    (tmp_path / "s.yaml").write_text("title: S\nrecipe: mine\naxes: {x: {a: {}}}\n")
    shown = {
        mar(tmp_path, "show", name)[0]
        for name in (
            "recipes/quickstart",
            "recipes/quickstart.yaml",
            "quickstart",
            "mine",
            "mine.yaml",
        )
    }
    assert len(shown) == 2 and any("seed: 3" in text for text in shown)
    planned = {
        mar(tmp_path, "plan", name)[0] for name in ("recipes/quickstart", "recipes/quickstart.yaml")
    }
    assert len(planned) == 1
    assert mar(tmp_path, "plan", "s")[0] == mar(tmp_path, "plan", "s.yaml")[0]


def test_listed_values_of_a_setting_are_an_axis(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "recipe.yaml", tmp_path)
    (tmp_path / "s.yaml").write_text(
        "title: S\nrecipe: recipe\naxes:\n  mask.ratio: [0.25, 0.5]\n  mask.cell: [[2, 2], [1, "
        "2]]\n"
    )
    planned, _ = mar(tmp_path, "plan", "s")
    assert all(
        row in planned for row in ("0.25 / [2, 2]", "0.25 / [1, 2]", "0.5 / [2, 2]", "0.5 / [1, 2]")
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "title: T\nrecipe: recipe\naxis: {x: {a: {}}}\n",
            "s.yaml:3: axis: no such key; did you mean axes?",
        ),
        (
            "title: T\nrecipe: recipe\naxes: {x: {a: {}}}\ntabel: {}\n",
            "s.yaml:4: tabel: no such key; did you mean table?",
        ),
        (
            "title: T\nrecipe: recipe\naxes: {x: {a: {}}}\ntable: {colums: [top1]}\n",
            "did you mean columns?",
        ),
        (
            "title: T\nrecipe: recipe\naxes:\n  mask.ratoi: [0.5]\n",
            "s.yaml:4: axes.mask.ratoi: a list of values needs",
        ),
        ("title: T\nrecipe: recipe\naxes: [0.5]\n", "axes: must be a mapping"),
        ("title: T\naxes: {x: {a: {}}}\n", "recipe: is missing"),
    ],
)
def test_a_mistake_in_a_studys_file_is_named_with_what_was_meant(
    folder: Path, tmp_path: Path, text: str, message: str
) -> None:
    shutil.copy(folder / "recipe.yaml", tmp_path)
    (tmp_path / "s.yaml").write_text(text)
    _, error = mar(tmp_path, "plan", "s.yaml", code=2)
    assert message in error


def test_other_mistakes_have_words_too(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "recipe.yaml", tmp_path)
    shutil.copy(folder / "two.yaml", tmp_path)
    said = {
        ("plan", "two.yaml", "mask.cell=4,4"): "mask.cell: must be a list, as [2, 2], not '4,4'",
        (
            "plan",
            "two.yaml",
            "mask=0.5",
        ): "mask: is a group of settings, set one of them (mask.strategy",
        ("show", "two.yaml"): "is a study, not a recipe; its settings are in recipe.yaml",
        ("plan", str(tmp_path)): "is a folder (recipe.yaml, two.yaml); name a file",
        ("plan", "twoo.yaml"): "no study 'twoo.yaml'",
        ("predict", "nowhere", "gone.mp4"): "no such video: gone.mp4",
        ("run", "two.yaml", "--device", "v100"): "give --budget too",
    }
    for command, expected in said.items():
        _, error = mar(tmp_path, *command, code=2)
        assert expected in error, command


def test_a_search_is_planned_by_its_first_points(tmp_path: Path) -> None:
    output, error = mar(tmp_path, "plan", "search_quickstart")
    assert "mask.ratio=0.5" in output
    assert "that it will propose" in error


def test_a_model_has_its_classes_names_and_predict_says_them(
    folder: Path, tmp_path: Path, videos: Path
) -> None:
    import json

    model = next((folder / "store" / "trials").glob("*/result"))
    film = next((videos / "videos").iterdir())
    output, _ = mar(folder, "predict", str(model), str(film))
    assert "Moving something to the right" in output and "Moving something to the left" in output
    mar(folder, "weights", "convert", str(model), str(tmp_path / "converted"))
    config = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert config["id2label"] == {
        "0": "Moving something to the right",
        "1": "Moving something to the left",
    }
    assert "Moving something to the right" in (tmp_path / "converted" / "README.md").read_text()
    again, _ = mar(folder, "predict", str(tmp_path / "converted"), str(film))
    assert again == output
    given = tmp_path / "names.txt"
    given.write_text("one\nother\n")
    assert "one" in mar(folder, "predict", str(model), str(film), "--labels", str(given))[0]
