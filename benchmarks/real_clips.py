"""Makes studies of small sets of real clips: UT-Interaction's 20 folds, and UCF101's split 1.

    python benchmarks/real_clips.py ../shared/data mar_data/real_clips
    mar data pack mar_data/real_clips/ut_interaction/recipe.yaml mar_data/real_clips/frames_ut \
        --short-side 54 --format raw
    mar run mar_data/real_clips/ut_interaction/study.yaml data.cache=mar_data/real_clips/frames_ut

The same for ucf101_12. Rows start from scratch; from ``mini``, which ships with mar and was trained
on motion verbs; or from its self-supervised pre-training on the same videos (docs/mini/weights).

UT-Interaction is tested by leaving one sequence out: people, clothes and background are a
sequence's own. The sets' videos are linked, not copied.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import yaml

from orchestration.installation import packaged

SELF_SUPERVISED = Path(__file__).parent.parent / "docs" / "mini" / "weights" / "verbs_vit_b"
STARTS: dict[str, dict[str, Any]] = {
    "from motion verbs, supervised": {"encoder.weights": "mini"},
    "from motion verbs, self-supervised": {"encoder.weights": str(SELF_SUPERVISED.resolve())},
    "from scratch": {"encoder.weights": None},
}
RATIOS: dict[str, dict[str, Any]] = {
    f"{ratio} %": {"mask.ratio": ratio / 100} for ratio in (0, 25, 50, 75)
}


def ut_interaction(source: Path, folder: Path) -> None:
    """Write a list of training and of test clips for each sequence, and the study over them."""
    # Class 6 are clips of no interaction, which are not part of the original set.
    rows = [row for row in _rows(source, folder) if int(row["label"]) < 6]
    folds = sorted({(int(row["set"]), int(row["sequence"])) for row in rows})
    axis: dict[str, dict[str, Any]] = {}
    for number, sequence in folds:
        name = f"set {number}, sequence {sequence}"
        file = f"{number}_{sequence:02}"
        is_test = [(int(row["set"]), int(row["sequence"])) == (number, sequence) for row in rows]
        _write_list(folder / f"train_{file}.txt", rows, [not each for each in is_test])
        _write_list(folder / f"test_{file}.txt", rows, is_test)
        axis[name] = {"data.train": f"train_{file}.txt", "data.val": f"test_{file}.txt"}
    study = {
        "title": "UT-Interaction, leave one sequence out",
        "recipe": "recipes/real_clips.yaml",
        "fixed": {
            "data.root": str(folder),
            "data.num_classes": 6,
            "data.labels": _write_names(folder, rows),
        },
        "axes": {"Start": STARTS, "ρ": RATIOS, "Sequence": axis},
        "table": {
            "columns": ["top1", "shuffled_top1", "gflops"],
            "mean_over": "Sequence",
            "reference": "from motion verbs, supervised / 50 %",
        },
    }
    _write_study(folder, study)
    # For ``mar data pack``: the lists of any fold name all videos.
    lists = {"train": "train_1_01.txt", "val": "test_1_01.txt"}
    _write_recipe(folder, {"root": str(folder), "num_classes": 6, **lists})


def ucf101_12(source: Path, folder: Path) -> None:
    """Write the lists of the official split 1, and the study over them."""
    rows = _rows(source, folder)
    for split in ("train", "test"):
        _write_list(folder / f"{split}.txt", rows, [row["split1"] == split for row in rows])
    study = {
        "title": "Twelve classes of UCF101, split 1",
        "recipe": "recipes/real_clips.yaml",
        "seeds": [0, 1, 2],
        "fixed": {
            "data.root": str(folder),
            "data.num_classes": 12,
            "data.train": "train.txt",
            "data.val": "test.txt",
            "data.labels": _write_names(folder, rows),
        },
        "axes": {"Start": STARTS, "ρ": RATIOS},
        "table": {
            "columns": ["top1", "shuffled_top1", "gflops"],
            "reference": "from motion verbs, supervised / 50 %",
        },
    }
    _write_study(folder, study)
    lists = {"train": "train.txt", "val": "test.txt"}
    _write_recipe(folder, {"root": str(folder), "num_classes": 12, **lists})


def _rows(source: Path, folder: Path) -> list[dict[str, str]]:
    """Return the labels of a set, and link its videos into the study's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "videos"
    if not link.is_symlink():
        link.symlink_to((source / "videos").resolve())
    with (source / "labels.csv").open(encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def _write_list(file: Path, rows: list[dict[str, str]], chosen: list[bool]) -> None:
    lines = [
        f"videos/{row['path'].removeprefix('videos/')} {row['label']}\n"
        for row, is_chosen in zip(rows, chosen, strict=True)
        if is_chosen
    ]
    file.write_text("".join(lines), encoding="utf-8")


def _write_names(folder: Path, rows: list[dict[str, str]]) -> str:
    """Write the classes' names, one a line; return the file's name."""
    names = {int(row["label"]): row["class"].replace("_", " ") for row in rows}
    (folder / "labels.txt").write_text("".join(f"{names[key]}\n" for key in sorted(names)))
    return "labels.txt"


def _write_study(folder: Path, study: dict[str, Any]) -> None:
    text = yaml.safe_dump(study, sort_keys=False, allow_unicode=True)
    (folder / "study.yaml").write_text(text, encoding="utf-8")


def _write_recipe(folder: Path, data: dict[str, Any]) -> None:
    recipe = packaged("search_spaces") / "recipes" / "real_clips.yaml"
    text = yaml.safe_dump({"extends": str(recipe.resolve()), "data": data}, sort_keys=False)
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, help="folder with ut_interaction and ucf101_12")
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    ut_interaction(given.source / "ut_interaction", given.folder / "ut_interaction")
    ucf101_12(given.source / "ucf101_12", given.folder / "ucf101_12")


if __name__ == "__main__":
    main()
