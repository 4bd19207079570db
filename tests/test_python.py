"""The way in from Python: models, studies and results; and the verbs that are made of it."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import run_mar
from conftest import TINY_STUDY
from study_runs import STUDY, write_studies

import mar
from mar.config.overrides import build, merge
from mar.data.annotations import read_split
from mar.data.dataset import evaluation_views
from mar.data.decoders import decode_with
from mar.data.frame_cache import open_video
from mar.data.motion_verbs import MotionVerbs, make
from mar.evaluation.evaluator import Evaluator, Predictions, write_class_accuracies
from mar.inference import Model
from mar.model.masking import evaluation_mask
from mar.model.pixels import to_pixels
from orchestration.config import LaunchConfig
from orchestration.tracking.models import source_run
from orchestration.tracking.store import Store

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, videos: Path) -> Path:
    """A folder with a study of four trials, of two rows and two seeds, that Python has run."""
    folder = tmp_path_factory.mktemp("python")
    write_studies(folder, videos, {"study.yaml": STUDY, "other.yaml": TINY_STUDY})
    study = mar.Study.read(folder / "study.yaml", store=folder / "store")
    assert study.run(backend="local") is study
    return folder


@pytest.fixture(scope="module")
def study(folder: Path) -> mar.Study:
    return mar.Study.read(folder / "study.yaml", store=folder / "store")


@pytest.fixture(scope="module")
def result(folder: Path, study: mar.Study) -> Path:
    return folder / "store" / "trials" / study.resolved.trials[0].key / "result"


@pytest.fixture(scope="module")
def film(videos: Path) -> Path:
    return sorted((videos / "videos").iterdir())[0]


@pytest.fixture(scope="module")
def model(result: Path) -> Model:
    return mar.load(result)


def test_importing_mar_loads_nothing_heavy_and_names_what_it_offers() -> None:
    code = (
        "import mar, sys; assert {'load', 'Study', 'results', 'Model'} <= set(dir(mar)); "
        "heavy = {'torch', 'ray', 'mlflow', 'pandas', 'numpy', 'pydantic'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        _ = getattr(mar, "lode")  # noqa: B009


def test_the_model_that_ships_knows_its_verbs(tmp_path: Path) -> None:
    make(tmp_path, MotionVerbs(size=36, classes=8, train=8, validation=64, seed=7))
    model = mar.load("mini")
    named = json.loads((tmp_path / "validation.json").read_text())
    right = sum(
        model.predict(tmp_path / "videos" / f"{each['id']}.mp4", top=1)[0].name
        == each["template"].replace("[", "").replace("]", "")
        for each in named
    )
    # Chance level is 8 of 64.
    assert right > 38


def test_views_that_complement_each_other_have_a_mask_each(model: Model) -> None:
    changes = {
        "evaluation.clips": 2,
        "evaluation.crops": 1,
        "evaluation.mask.views": "complementary",
    }
    settings = build(merge(model.settings.model_dump(mode="json"), changes))
    (video,) = read_split(settings.data, "val")[:1]
    tested = Evaluator(settings, [video], CPU, clips=2)(model.network).probabilities
    model.eval()
    with open_video(settings.data, video) as reader:
        pixels = to_pixels(evaluation_views(settings, reader, 2, 1))
    masks = evaluation_mask(settings, views=2)
    assert not torch.equal(masks[0], masks[1])
    with torch.no_grad():
        scores = [
            model.network.classify(pixels[view][None], masks[view][None]) for view in range(2)
        ]
    expected = torch.stack([each.softmax(dim=1) for each in scores]).mean(dim=0)
    torch.testing.assert_close(tested, expected, rtol=1e-5, atol=1e-6)


def test_a_prediction_is_that_of_a_test(model: Model) -> None:
    settings = model.settings
    listed = read_split(settings.data, "val")
    expected = Evaluator(settings, listed, CPU)(model.network).probabilities
    model.eval()
    ours = torch.stack([model.probabilities(video.path) for video in listed])
    # The batch's size changes the order of sums.
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    best = model.predict(listed[0].path)
    assert [each.name for each in best] == [
        model.classes[label] for label in expected[0].argsort(descending=True)
    ]
    assert sum(each.probability for each in best) == pytest.approx(1, abs=1e-5)


def test_frames_in_memory_are_a_video_too(model: Model, film: Path) -> None:
    frames = decode_with("pyav", film)
    assert model.predict(frames) == model.predict(film)
    with pytest.raises(mar.UserError, match="expected uint8, T × H × W × 3"):
        model.predict(frames.astype(np.float32))
    with pytest.raises(mar.UserError, match="expected uint8"):
        model.predict(frames[0])


def test_a_model_is_a_module_of_pixels(model: Model, film: Path) -> None:
    pixels = torch.rand(2, 3, 8, 16, 16)
    assert model(pixels).shape == (2, 2)
    everything = torch.zeros(2, *model.settings.grid, dtype=torch.bool)
    assert not torch.allclose(model(pixels), model(pixels, everything))
    tokens = model.features(film, pooled=False)
    # Half of 4 × 4 × 4 tokens are visible.
    assert tokens.shape == (1, 32, 16)
    torch.testing.assert_close(model.features(film), tokens.mean(dim=(0, 1)))


def test_settings_given_on_loading_win(result: Path, film: Path) -> None:
    model = mar.load(result, {"mask.ratio": 0.75, "evaluation.crops": 3})
    assert model.features(film, pooled=False).shape == (3, 16, 16)


def test_windows_cover_the_whole_video_and_are_predicted_as_videos_are(
    model: Model, film: Path
) -> None:
    frames = np.concatenate([decode_with("pyav", film)] * 4)
    # An array has 25 frames a second: 10 frames a window.
    windows = list(model.predict_windows(frames, window_s=0.4))
    starts = [round(each.start_s * 25) for each in windows]
    ends = [round(each.end_s * 25) for each in windows]
    assert starts[0] == 0 and ends[-1] == len(frames)
    assert all(later <= earlier for later, earlier in zip(starts[1:], ends, strict=False))
    for start, end, window in zip(starts, ends, windows, strict=True):
        assert window.predictions == model.predict(frames[start:end])
    overlapping = list(model.predict_windows(frames, window_s=0.4, stride_s=0.2))
    assert len(overlapping) > len(windows)
    # A video that is shorter than a window is one window.
    (whole,) = model.predict_windows(frames, window_s=60)
    assert whole.end_s * 25 == pytest.approx(len(frames))
    with pytest.raises(mar.UserError, match="must be more than 0"):
        list(model.predict_windows(frames, window_s=0))


def test_reconstructions_are_the_trained_decoders(
    model: Model, result: Path, folder: Path, film: Path, tmp_path: Path
) -> None:
    made = model.reconstruct(film)
    assert made.original.shape == made.masked.shape == made.rebuilt.shape == (3, 8, 16, 16)
    hidden = made.masked != made.original
    torch.testing.assert_close(made.rebuilt[~hidden], made.original[~hidden])
    # The training has drawn the first three test videos with the model that it had in memory.
    shown = [str(video.path) for video in read_split(model.settings.data, "val")]
    output = tmp_path / "again.png"
    run_mar(folder, "reconstruct", str(result), *shown[:3], "-o", str(output))
    assert output.read_bytes() == (result / "reconstructions.png").read_bytes()


def test_what_a_file_does_not_have_is_refused(
    result: Path, model: Model, film: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(result / "model.safetensors")
    encoder = {name: value for name, value in tensors.items() if name.startswith("encoder.")}
    part = tmp_path / "encoder"
    part.mkdir()
    save_file(encoder, part / "model.safetensors")
    (part / "settings.yaml").write_text((result / "settings.yaml").read_text())
    alone = mar.load(part)
    torch.testing.assert_close(alone.features(film), model.features(film))
    with pytest.raises(mar.UserError, match="no classifier: its file has encoder alone"):
        alone.predict(film)
    with pytest.raises(mar.UserError, match="no decoder"):
        alone.reconstruct(film)
    with pytest.raises(mar.UserError, match="nothing is hidden in testing"):
        mar.load(result, {"mask.ratio": 0.0}).reconstruct(film)


def test_a_video_that_cannot_be_read_is_said(model: Model, tmp_path: Path) -> None:
    with pytest.raises(mar.UserError, match=r"no such video: .*gone\.mp4"):
        model.predict(tmp_path / "gone.mp4")
    (tmp_path / "no.mp4").write_text("no video")
    with pytest.raises(mar.Failure, match=r"no\.mp4"):
        model.predict(tmp_path / "no.mp4")


def test_a_study_is_planned_run_and_read(folder: Path, study: mar.Study, tmp_path: Path) -> None:
    plan = study.plan()
    assert list(plan.state) == ["have"] * 4
    other = mar.Study.read(folder / "study.yaml", {"recipe.epochs": 7}, store=folder / "store")
    assert list(other.plan().state) == ["new"] * 4
    nothing = mar.Study.read(folder / "study.yaml", store=tmp_path / "nowhere")
    assert list(nothing.plan().state) == ["new"] * 4
    assert not (tmp_path / "nowhere").exists()
    table = study.table()
    assert list(table.index) == ["50 %", "75 %"]
    assert table.loc["75 %", "top1_paper"] == 69.46
    assert list(table.top1_n) == [2, 2]
    # Two values have a range, as in the printed table; Student's interval of two says nothing.
    assert "top1_half_width" not in table
    assert (table.top1_least <= table.top1).all()
    assert (table.top1_greatest >= table.top1).all()
    found = mar.results(str(folder / "study.yaml"), store=folder / "store")
    tops = found.metrics.loc[found.runs.index[found.runs.trial.str.startswith("50 %")], "test/top1"]
    assert table.loc["50 %", "top1"] == pytest.approx(tops.mean())
    assert study.figure(tmp_path / "f.svg").is_file()
    assert (study.report(tmp_path / "report") / "report.html").is_file()


def test_results_are_frames_of_runs_metrics_and_histories(folder: Path) -> None:
    found = mar.results("study", store=folder / "store")
    assert len(found.runs) == len(found.metrics) == 4
    assert set(found.runs.status) == {"FINISHED"}
    assert list(found.histories.index.names) == ["run_id", "epoch"]
    one = found.runs.index[0]
    assert list(found.histories.loc[one].index) == [1, 2]
    last = found.histories.loc[one]["train/loss"].iloc[-1]
    assert found.metrics.loc[one, "train/loss"] == pytest.approx(last)
    with pytest.raises(mar.UserError, match="no runs of it in the store; it has study"):
        mar.results("other", store=folder / "store")
    with pytest.raises(mar.UserError, match="no tracking store there"):
        mar.results(store=folder / "nowhere")


def test_a_mistake_in_a_call_is_said_in_words(folder: Path, study: mar.Study) -> None:
    with pytest.raises(mar.UserError, match=r"run\(wokers=…\): no such option"):
        study.run(wokers=2)
    with pytest.raises(mar.UserError, match="workers: 0 is less than 1"):
        study.run(workers=0)
    with pytest.raises(mar.UserError, match=r"run\(\): backend: Input should be 'train'"):
        study.run(backend="wrong")
    with pytest.raises(mar.UserError, match=r"run\(\): workers: Input should be a valid integer"):
        study.run(workers="two")
    with pytest.raises(mar.UserError, match=r"run\(\): "):
        study.run(keep="newest")
    with pytest.raises(mar.UserError, match=r"recipe\.epoch"):
        mar.Study.read(folder / "study.yaml", {"recipe.epoch": 2})


def test_a_model_is_loaded_by_its_name_in_mlflow(
    folder: Path, result: Path, model: Model, film: Path
) -> None:
    store = folder / "store"
    key = result.parent.name
    runs = mar.results("study", store=store).runs
    run_id = runs.index[runs.key == key][0]
    expected = model.predict(film)
    assert mar.load(f"runs:/{run_id}", store=store).predict(film) == expected
    models = [mar.load(f"models:/study/{n}", store=store).predict(film) for n in (1, 2, 3, 4)]
    assert expected in models
    for wrong in ("runs:/", "models:/study", "models:/study/", "models:/study/next"):
        with pytest.raises(mar.UserError, match=r"expected runs:/RUN_ID"):
            mar.load(wrong, store=store)
    with pytest.raises(mar.UserError, match="not in sqlite"):
        mar.load("models:/study/99", store=store)
    with pytest.raises(mar.UserError, match="not in sqlite"):
        mar.load(f"runs:/{'0' * 32}", store=store)


def test_the_best_of_a_study_predicts_folders_patterns_and_windows(
    folder: Path, videos: Path, tmp_path: Path
) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for name in ("=a.mp4", "b.mp4"):
        (few / name).write_bytes(sorted((videos / "videos").iterdir())[0].read_bytes())
    best = ["predict", "study.yaml", "--best", "--store", "store", "--top", "1"]
    whole = json.loads(run_mar(folder, *best, str(few), "--json")[0])
    found = mar.results("study", store=folder / "store")
    top = found.metrics["test/top1"]
    assert [Path(row["video"]).name for row in whole["predictions"]] == ["=a.mp4", "b.mp4"]
    folders = found.runs.loc[top.index[top == top.max()], "key"]
    candidates = [mar.load(folder / "store" / "trials" / key / "result") for key in folders]
    given = whole["predictions"][0]["classes"]
    ours = [each.predict(few / "=a.mp4", top=1)[0] for each in candidates]
    assert {name: pytest.approx(share) for name, share in given.items()} in [
        {each.name: round(each.probability, 4)} for each in ours
    ]
    file = tmp_path / "out.csv"
    run_mar(
        folder, *best, str(few / "*.mp4"), "--window", "0.3s", "--stride", "0.2", "-o", str(file)
    )
    with file.open(newline="") as lines:
        rows: list[dict[str, Any]] = list(csv.DictReader(lines))
    assert list(rows[0]) == ["video", "start_s", "end_s", "class_1", "probability_1"]
    assert float(rows[1]["start_s"]) == pytest.approx(0.2, abs=0.05)
    for arguments, message in {
        (str(few / "*.avi"),): "no such video",
        (str(few), "--window", "x"): "--window x: expected seconds",
        (str(few), "--stride", "1s"): "Give --window too",
        (str(few), "-o", "a.txt"): r"expected a name that ends in .csv or .json",
    }.items():
        _, errors = run_mar(folder, *best, *arguments, code=2)
        assert message in errors


def test_what_was_trained_with_other_settings_is_named_and_the_best_of_it_predicts(
    folder: Path, film: Path, tmp_path: Path
) -> None:
    for file, source in {"study.yaml": "other.yaml", "recipe.yaml": "recipe.yaml"}.items():
        (tmp_path / file).write_text((folder / source).read_text())
    run_mar(tmp_path, "run", "study.yaml", "recipe.base_lr=3e-4", "--backend", "local")
    table, errors = run_mar(tmp_path, "table", "study.yaml")
    assert "are finished; –: not available yet" in table
    assert "its 2 finished runs have other settings than were asked for" in errors
    assert "the last launch had recipe.base_lr=3e-4" in errors
    table, errors = run_mar(tmp_path, "table", "study.yaml", "recipe.base_lr=3e-4")
    assert "–" not in table
    assert "other settings" not in errors
    answer, errors = run_mar(tmp_path, "predict", "study.yaml", "--best", str(film))
    assert str(film) in answer
    assert "with the settings of its last launch: recipe.base_lr=3e-4" in errors
    trial = next((tmp_path / "mar_store" / "trials").iterdir())
    _, errors = run_mar(tmp_path, "predict", str(trial), str(film), code=2)
    assert f"the model of this trial is in {trial / 'result'}" in errors


# MLflow warns on loading that a column of paths or arrays has no type that it could check.
@pytest.mark.filterwarnings("ignore:.*Any type hint is inferred:UserWarning")
def test_mlflow_loads_a_result_and_classifies_files_and_arrays(
    folder: Path, study: mar.Study, film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    import pandas as pd

    # Not mlflow.set_tracking_uri(): it sets this variable for all later tests, too.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'store' / 'mlflow.db'}")
    loaded = mlflow.pyfunc.load_model("models:/study@best")
    best = mar.load("models:/study@best", store=folder / "store")
    frames = decode_with("pyav", film)
    expected = best.predict(film)
    for given in (str(film), [str(film)], pd.DataFrame({"video": [frames]})):
        (row,) = loaded.predict(given).to_dict("records")
        assert row["class"] == expected[0].name
        for each in expected:
            assert row[each.name] == pytest.approx(each.probability)
    assert loaded.metadata.signature is not None
    assert loaded.metadata.metadata == {"classes": list(best.classes)}


def test_the_best_model_of_a_study_has_the_alias_best_and_a_run_says_where_it_is_from(
    folder: Path, study: mar.Study
) -> None:
    import getpass

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'store' / 'mlflow.db'}")
    found = mar.results("study", store=folder / "store")
    best = client.get_model_version_by_alias("study", "best")
    tops = found.metrics["test/top1"]
    assert tops[best.run_id] == tops.max()
    latest = client.get_model_version_by_alias("study", "latest")
    assert latest.run_id in found.runs.index
    tags = client.get_run(str(best.run_id)).data.tags
    assert tags["mlflow.user"] == getpass.getuser()
    assert tags["mlflow.source.name"].endswith("study.yaml")
    assert "mar.load" in tags["mlflow.note.content"]
    files = {each.path for each in client.list_artifacts(str(best.run_id), "result")}
    assert {"result/MLmodel", "result/requirements.txt", "result/python_env.yaml"} <= files
    assert not [name for name in files if name.endswith((".pkl", ".pickle"))]


def test_each_class_has_its_accuracy_and_counts_the_same_in_their_mean(
    result: Path, tmp_path: Path
) -> None:
    from sklearn.metrics import balanced_accuracy_score

    labels = torch.tensor([0, 0, 0, 0, 1, 1, 3])
    taken_for = torch.tensor([0, 0, 0, 1, 1, 0, 3])
    probabilities = torch.nn.functional.one_hot(taken_for, 4).float()
    predictions = Predictions(torch.arange(7), labels, probabilities, ())
    expected = 100 * balanced_accuracy_score(labels, taken_for)
    assert predictions.metrics("test")["test/mean_class_top1"] == pytest.approx(expected)
    write_class_accuracies(predictions, ["a", "=b"], tmp_path / "classes.csv")
    lines = (tmp_path / "classes.csv").read_text().splitlines()
    assert lines[1:] == ["0,a,4,75.0000", "1,'=b,2,50.0000", "2,,0,", "3,,1,100.0000"]
    assert "classes.csv" in {file.name for file in result.iterdir()}
    assert "test/mean_class_top1" in json.loads((result / "metrics.json").read_text())


def python_blocks(guide: str) -> list[str]:
    text = (Path(__file__).parent.parent / "docs" / "guides" / guide).read_text()
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_the_guides_examples_run_as_they_are_printed(
    film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("clip.mp4", "long.mp4"):
        (tmp_path / name).write_bytes(film.read_bytes())
    names: dict[str, Any] = {"pixels": torch.rand(2, 3, 8, 36, 36)}
    first, windows, *_ = python_blocks("python.md")
    exec(first, names)
    assert names["model"](names["pixels"]).shape == (2, 8)
    exec(windows, names)
    run_mar(tmp_path, "weights", "export", "mini", "model.onnx")
    capsys.readouterr()
    (onnx,) = python_blocks("weights.md")
    exec(onnx, {})
    assert capsys.readouterr().out.strip() in mar.load("mini").classes


TESTED_TWICE = """\
title: Tested twice
recipe: recipe.yaml
axes:
  test: {as trained: {}, all visible: {evaluation.mask.ratio: 0.0}}
table: {columns: [top1]}
"""


def test_the_best_of_a_study_whose_rows_share_a_model_is_that_model(
    tmp_path: Path, videos: Path, film: Path
) -> None:
    write_studies(tmp_path, videos, {"twice.yaml": TESTED_TWICE})
    store = tmp_path / "store"
    mar.Study.read(tmp_path / "twice.yaml", store=store).run(backend="local", keep="last=1")
    # One was trained; the other was tested with the first one's model.
    records = mar.results("twice", store=store).records
    (trained,) = [record for record in records if record.has_model]
    (tested,) = [record for record in records if not record.has_model]
    opened = Store(LaunchConfig(store))
    assert source_run(tested, opened) == source_run(trained, opened) == trained
    version = opened.client.get_model_version_by_alias("twice", "best")
    assert version.run_id == trained.run_id
    expected = mar.load(f"runs:/{trained.run_id}", store=store).predict(film)
    assert mar.load(f"runs:/{tested.run_id}", store=store).predict(film) == expected
    (parent,) = opened.client.search_runs([trained.experiment_id], "tags.`mar.kind` = 'study'")
    with pytest.raises(mar.UserError, match="a study's run, which has no model"):
        mar.load(f"runs:/{parent.info.run_id}", store=store)


def test_a_result_that_came_without_its_model_is_a_run_and_no_model(
    folder: Path, tmp_path: Path
) -> None:
    script = Path(__file__).parent.parent / "benchmarks" / "archive_results.py"
    archive = str(tmp_path / "results.tar.gz")
    for arguments in (("pack", str(folder / "store"), archive), ("unpack", archive, "store")):
        subprocess.run([sys.executable, script, *arguments], check=True, cwd=tmp_path)
    run_mar(tmp_path, "recover", "--store", "store")
    opened = Store(LaunchConfig(tmp_path / "store"))
    assert len(opened.trials()) == 4
    assert not opened.client.search_model_versions()
    # What is to be tested with such a training is trained: its model is not there.
    study = mar.Study.read(
        folder / "study.yaml", {"evaluation.mask.start": 1}, store=tmp_path / "store"
    )
    assert {*study.plan()["state"]} == {"new"}
    # Also where the run itself is a row of the study: two seeds, as it is and from another state.
    both = "title: Both\nrecipe: recipe.yaml\nseeds: [0, 1]\naxes:\n  start:\n"
    both += "    A: {mask.ratio: 0.5}\n    B: {mask.ratio: 0.5, evaluation.mask.start: 1}\n"
    both += "table: {columns: [top1]}\n"
    (folder / "both.yaml").write_text(both)
    planned = mar.Study.read(folder / "both.yaml", store=tmp_path / "store").plan()
    assert sorted(planned["state"]) == ["have", "have", "new", "new"]
