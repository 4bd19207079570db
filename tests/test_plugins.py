"""A package of a user's own adds masks, encoders, classifiers and formats, without a fork."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_tree

from mar.config.schema import TrainingConfig
from mar.model.encoder import patchify
from mar.visualization.masks_and_clips import middle_clip

PACKAGE = Path(__file__).parent / "package"
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, built and installed by pip into a folder of its own."""
    source = Path(shutil.copytree(PACKAGE, tmp_path_factory.mktemp("source") / "package"))
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(folder), str(source)], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, videos: Path) -> Path:
    folder = tmp_path_factory.mktemp("study")
    tree = tiny_tree(videos)
    tree["recipe"]["epochs"] = 1
    tree["data"] = {"format": "pairs", "root": str(folder), "videos": "videos", "num_classes": 2}
    (folder / "videos").symlink_to(videos / "videos")
    names = json.loads((videos / "labels.json").read_text())
    for split, file in {"train": "train.json", "val": "validation.json"}.items():
        listed = json.loads((videos / file).read_text())
        lines = [
            f"{names[each['template'].replace('[', '').replace(']', '')]} -> {each['id']}.mp4"
            for each in listed
        ]
        (folder / f"{split}.pairs").write_text("\n".join(lines))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    (folder / "study.yaml").write_text(
        "title: Stripes\nrecipe: recipe.yaml\naxes:\n  mask:\n"
        "    cell: {}\n    stripes: {mask.strategy: stripes}\n"
        "    wide: {mask.strategy: stripes, mask.options: {width: 2}}\n"
        "table: {columns: [top1]}\n"
    )
    return folder


def run(
    folder: Path, packages: Path, *arguments: str, code: int = 0
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [BIN / "mar", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(packages)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_a_packages_mask_and_format_are_used_in_a_study(study: Path, installed: Path) -> None:
    printed = run(study, installed, "run", "study.yaml", "--backend", "local").stdout
    assert re.search(r"\| stripes +\| \d", printed) and re.search(r"\| wide +\| \d", printed)
    masks = json.loads(
        run(study, installed, "mask", "recipe.yaml", "mask.strategy=stripes", "--json").stdout
    )
    drawn = json.dumps(masks)
    assert "[1, 0, 1, 0]" in drawn or "[0, 1, 0, 1]" in drawn


def test_a_packages_mask_sees_the_clip(
    study: Path, installed: Path, videos: Path, tiny: Callable[..., TrainingConfig]
) -> None:
    film = min((videos / "videos").glob("*.mp4"))
    command = ["mask", "recipe.yaml", "--json", "--clips", "0", "--video", str(film)]
    shown = json.loads(run(study, installed, *command, "mask.strategy=bright").stdout)
    hidden = torch.tensor(shown["evaluation"]).bool().flatten()
    settings = tiny()
    pixels = middle_clip(settings, film)
    bright = patchify(pixels[None], settings.encoder.tubelet)[0].mean(dim=-1)
    assert hidden.sum() == 32
    assert bright[~hidden].min() >= bright[hidden].max() - 1e-6
    run(study, installed, "run", "recipe.yaml", "mask.strategy=bright", "--backend", "local")
    wrong = run(study, installed, *command, "mask.strategy=misshapen", code=2)
    assert "of the package my-masks 1.0: expected a score for each token" in wrong.stderr
    unseen = run(study, installed, "mask", "recipe.yaml", "mask.strategy=bright", code=2)
    assert "bright sees the clip: which? Give --video FILE" in unseen.stderr


MODELS = """\
title: Models of a package
recipe: recipe.yaml
fixed: {mask.strategy: stripes}
axes:
  model:
    ours: {}
    mixer: {encoder: {size: mixer, width: null, depth: null, heads: null}}
    wide: {encoder: {size: mixer, width: null, depth: null, heads: null, options: {width: 32}}}
    max-pool: {classifier.kind: max-pool}
table: {columns: [top1, gflops, params]}
"""


@pytest.fixture(scope="module")
def models(study: Path, installed: Path) -> str:
    """What a run prints whose rows are a package's models."""
    (study / "models.yaml").write_text(MODELS)
    return run(study, installed, "run", "models.yaml", "--backend", "local").stdout


def test_a_packages_encoder_and_classifier_are_trained(models: str) -> None:
    rows = dict(re.findall(r"^\| (\S+) +\| (\d.*)\|$", models, re.MULTILINE))
    assert {*rows} == {"ours", "mixer", "wide", "max-pool"}


def test_their_cost_is_counted(study: Path, installed: Path) -> None:
    """A linear layer's multiply-adds are its inputs times its outputs, for each token."""
    mixer = (
        "encoder={size: mixer, width: null, depth: null, heads: null, tubelet: [2, 8, 8], "
        "options: {width: 16, depth: 2}}"
    )
    pooled = "classifier={kind: max-pool}"
    clip = "clip={frames: 4, size: 32}"
    printed = run(study, installed, "cost", "recipe.yaml", mixer, pooled, clip, "--json").stdout
    tokens = 2 * 4 * 4
    patch = 3 * 2 * 8 * 8
    embedding = tokens // 2 * patch * 16
    blocks = 2 * tokens // 2 * 32 * 16
    assert json.loads(printed)["gflops"] * 1e9 == embedding + blocks + 16 * 2
    parameters = (patch + 1) * 16 + tokens * 16 + 2 * (32 + 1) * 16 + (16 + 1) * 2
    assert json.loads(printed)["params_m"] * 1e6 == pytest.approx(parameters)


def test_their_result_predicts_and_can_be_started_from(
    study: Path, installed: Path, models: str
) -> None:
    best = run(study, installed, "predict", "models.yaml", "--best", "videos", "--json").stdout
    assert json.loads(best)
    settings = {
        file.parent: yaml.safe_load(file.read_text())
        for file in (study / "mar_store").rglob("settings.yaml")
    }
    result = next(
        folder for folder, tree in settings.items() if tree["encoder"]["options"].get("width") == 16
    )
    shown = run(study, installed, "weights", "show", str(result)).stdout
    assert "encoder.size=mixer" in shown
    again = ["encoder.size=mixer", "encoder.width=null", "encoder.depth=null", "encoder.heads=null"]
    changes = [*again, f"encoder.weights={result}", "reconstruction.init=random"]
    started = run(study, installed, "run", "recipe.yaml", *changes, "--backend", "local")
    assert "encoder: 7 tensors" in started.stdout + started.stderr
    run(study, installed, "weights", "export", str(result), "mixer.onnx")
    assert (study / "mixer.onnx").stat().st_size > 1000
    refused = run(
        study, installed, "weights", "convert", str(result), "out", "--to", "huggingface", code=2
    )
    assert "is of a package" in refused.stderr


def test_its_version_is_part_of_the_trials_identity(
    study: Path, installed: Path, tmp_path: Path
) -> None:
    before = json.loads(run(study, installed, "plan", "study.yaml", "--json").stdout)
    later = Path(shutil.copytree(installed, tmp_path / "later"))
    (facts,) = later.glob("*.dist-info/METADATA")
    facts.write_text(facts.read_text().replace("Version: 1.0", "Version: 1.1"))
    after = json.loads(run(study, later, "plan", "study.yaml", "--json").stdout)
    assert all(one["key"] != other["key"] for one, other in zip(before, after, strict=True))
    # An option that is written out as its default is the same trial.
    same = run(
        study,
        installed,
        "plan",
        "study.yaml",
        "axes.mask.stripes.mask.options={width: 1}",
        "--json",
    )
    assert [line["key"] for line in json.loads(same.stdout)] == [line["key"] for line in before]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["mask.strategy=zigzag"], r"must be 'cell', .* or of an installed package: .*'stripes'"),
        (
            ["mask.strategy=stripes", "mask.options={widht: 1}"],
            r"options\.widht: Extra inputs .*\(the package my-masks 1\.0\)",
        ),
        (["mask.options={width: 1}"], r"options: cell has none"),
        (["mask.strategy=lost"], r"of the package my-masks 1\.0: AttributeError: .*nowhere"),
        (
            ["encoder={size: mixer, width: null, depth: null, heads: null, options: {widht: 1}}"],
            r"options\.widht: Extra inputs .*\(the package my-masks 1\.0\)",
        ),
        (
            ["encoder={size: a_mask, width: null, depth: null, heads: null}"],
            r"a_mask, of the package my-masks 1\.0, is not a mar\.plugins\.EncoderFactory",
        ),
        (["classifier.options={width: 1}"], r"options: bridging has none"),
        (["classifier.kind=nearest"], r"or of an installed package: .*'max-pool'"),
        (["mask.strategy=broken"], r"of the package my-masks 1\.0: expected \d+ boolean masks"),
    ],
)
def test_a_mistake_names_the_package(
    study: Path, installed: Path, changes: list[str], message: str
) -> None:
    done = run(study, installed, "mask", "recipe.yaml", *changes, code=2)
    assert re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["encoder={size: narrow, width: null, depth: null, heads: null}"],
            r"narrow \(mar\.encoders\), of the package my-masks 1\.0: its output for two clips is "
            r"2 × \d+ × 16; expected 2 × \d+ × 17",
        ),
        (
            ["classifier.kind=transposed"],
            r"transposed \(mar\.classifiers\), of the package my-masks 1\.0: RuntimeError",
        ),
    ],
)
def test_a_model_that_does_not_fit_is_refused_before_it_is_trained(
    study: Path, installed: Path, changes: list[str], message: str
) -> None:
    done = run(study, installed, "cost", "recipe.yaml", *changes, code=2)
    assert re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr


def test_without_the_package_the_error_says_what_there_is(study: Path, tmp_path: Path) -> None:
    done = run(
        study, tmp_path, "mask", "recipe.yaml", "data.format=list", "mask.strategy=stripes", code=2
    )
    assert "no package adds one (mar.masks)" in done.stderr
