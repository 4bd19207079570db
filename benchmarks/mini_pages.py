"""Writes docs/mini from a store: a page for each study, and one with every verdict.

    python benchmarks/mini_pages.py mar_store docs/mini

The pages are made from the runs in MLflow alone; nothing in them is written by hand. What they mean
is docs/mini/README.md, which this script leaves as it is.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from PIL import Image

from orchestration.installation import packaged
from orchestration.reporting.significance import claims
from orchestration.reporting.study_report import claim_lines, write_report
from orchestration.reporting.study_results import StudyResults
from orchestration.reporting.table_formats import FORMATS
from orchestration.reporting.tables import table_info
from orchestration.stored_results import file_finder, records_of_store
from orchestration.studies.loader import paper_studies, read_study
from orchestration.studies.trial import Study

WIDEST = 900
"""Width of a picture, pixels."""
PICTURES = {"figure": "The figure", "curves": "Learning curves", "confusion": "Confusion matrix"}
"""Picture of a report -> its heading."""


def main() -> None:
    """Write the pages of the store that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--seeds", type=int, help="Only this many seeds, while the others are not trained yet."
    )
    given = parser.parse_args()
    records = records_of_store(given.store, None)
    file_of = file_finder(given.store, None)
    index = [
        "# Mini: every verdict",
        "",
        "Made by `benchmarks/mini_pages.py` from the runs in MLflow. What it means: "
        "[README.md](README.md).",
        "",
    ]
    beyond = [each.stem for each in sorted(packaged("search_spaces").glob("beyond_*.yaml"))]
    for name in [*paper_studies(), *beyond]:
        study = _of_seeds(read_study(name, ["recipe=mini"]), given.seeds)
        results = StudyResults.match(study, records, file_of)
        finished = sum(row.finished for row in results.rows)
        wanted = sum(row.seeds for row in results.rows)
        page = f"{study.name}.md"
        # A figure of masks needs no training; the others have nothing to show yet. What is beyond
        # the paper shares rows with its tables, and is shown when it is whole.
        is_open = not finished or (name in beyond and finished < wanted)
        if study.trains and is_open:
            index.append(f"- {study.file.title}: {finished} of {wanted} trials yet")
            (given.folder / page).unlink(missing_ok=True)
            continue
        _write_page(results, given.folder, page)
        index.append(f"- [{study.file.title}]({page}): {finished} of {wanted} trials")
        index += [f"  - {line}" for line in claim_lines(claims(results))]
        print(f"{page}: {finished} of {wanted} trials")
    (given.folder / "results.md").write_text("\n".join([*index, ""]), encoding="utf-8")


def _of_seeds(study: Study, count: int | None) -> Study:
    """Return a study with its first seeds alone; None: all."""
    if count is None:
        return study
    seeds = study.file.seeds[:count]
    trials = [trial for trial in study.trials if trial.settings.seed in seeds]
    return replace(study, trials=trials, file=study.file.model_copy(update={"seeds": seeds}))


def _write_page(results: StudyResults, folder: Path, page: str) -> None:
    """Write a study's page and its pictures."""
    study = results.study
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    parts = [f"# {study.file.title}", "", FORMATS["md"](table_info(results)), ""]
    judged = claim_lines(claims(results))
    if judged:
        parts += ["## Claims", "", *(f"- {line}" for line in judged), ""]
    with tempfile.TemporaryDirectory() as temporary:
        write_report(results, Path(temporary))
        for kind, heading in PICTURES.items():
            source = Path(temporary) / f"{kind}.png"
            if source.is_file():
                name = f"pictures/{study.name}_{kind}.png"
                _shrink(source, folder / name)
                parts += [f"## {heading}", "", f"![{heading}]({name})", ""]
    parts += [f"`mar table {study.name} recipe=mini` prints the table.", ""]
    (folder / page).write_text("\n".join(parts), encoding="utf-8")


def _shrink(source: Path, target: Path) -> None:
    """Write a picture with few colours and at most ``WIDEST`` pixels across."""
    with Image.open(source) as picture:
        small = picture.convert("RGB")
    small.thumbnail((WIDEST, 10 * WIDEST), Image.Resampling.LANCZOS)
    small.quantize(64).save(target, optimize=True)


if __name__ == "__main__":
    main()
