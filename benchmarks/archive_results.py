"""Keeps the results of a store in one small file, without models and pictures, and puts them back.

A long experiment (docs/mini) can so be continued on another machine: its finished trials are not
trained again, and tables and tests read them as if they had been trained there.

    python benchmarks/archive_results.py pack mar_store docs/mini/results.tar.gz --family mini
    python benchmarks/archive_results.py unpack docs/mini/results.tar.gz mar_store
    mar recover --store mar_store

Rows that only test another row's model need that row's model: they are trained where the model is.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from pathlib import Path

from mar import MANIFEST, RESULT_DIR
from mar.atomic_dir import read_atomic_dir
from mar.safe_input import below
from orchestration.installation import packaged
from orchestration.stored_results import records_of_store
from orchestration.studies.loader import paper_studies, read_study
from orchestration.studies.matching import match

KEPT = ("classes.json", "correctness.npz", "history.csv", "metrics.json", "settings.yaml")
"""Files of a result that tables, tests and curves read."""
RECORD = "trial.json"


def pack(store: Path, archive: Path, family: str | None = None) -> int:
    """Write the finished results of a store; return their number.

    With a ``family`` of recipes, those that its studies have today; others are left out.
    """
    results = sorted((store / "trials").glob(f"*/{RESULT_DIR}/{MANIFEST}"))
    if family is not None:
        wanted = _keys_of(store, family)
        results = [each for each in results if each.parent.parent.name in wanted]
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz") as tar:
        for manifest_file in results:
            result = manifest_file.parent
            trial = result.parent
            manifest = read_atomic_dir(result)
            # The manifest names what is here, so that the folder counts as complete.
            manifest["files"] = {
                name: facts for name, facts in manifest["files"].items() if name in KEPT
            }
            for name in manifest["files"]:
                _add(tar, f"{trial.name}/{RESULT_DIR}/{name}", (result / name).read_bytes())
            text = json.dumps(manifest, indent=1, ensure_ascii=False)
            _add(tar, f"{trial.name}/{RESULT_DIR}/{MANIFEST}", text.encode())
            _add(tar, f"{trial.name}/{RECORD}", (trial / RECORD).read_bytes())
    return len(results)


def _keys_of(store: Path, family: str) -> set[str]:
    """Return the keys of the finished trials of every study that ships, on a family's recipes."""
    records = records_of_store(store, None)
    names = [*paper_studies()]
    names += [each.stem for each in packaged("search_spaces").glob("beyond_*.yaml")]
    found: set[str] = set()
    for name in names:
        study = read_study(name, [f"recipe={family}"])
        found |= {record.key for record in match(study.trials, records).values()}
    return found


def unpack(archive: Path, store: Path) -> int:
    """Put results into a store that lacks them; return their number."""
    trials = store / "trials"
    trials.mkdir(parents=True, exist_ok=True)
    present = {folder.name for folder in trials.iterdir() if (folder / RESULT_DIR).is_dir()}
    added: set[str] = set()
    with tarfile.open(archive) as tar:
        for member in tar:
            key = member.name.split("/")[0]
            content = tar.extractfile(member)
            # Only plain files, and only where this store has no result of its own.
            if content is None or key in present:
                continue
            # ``below`` refuses a name that leads out of the folder.
            file = below(trials, member.name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content.read())
            added.add(key)
    return len(added)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("verb", choices=["pack", "unpack"])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--family", help="Pack the results of these recipes alone, as mini.")
    given = parser.parse_args()
    if given.verb == "pack":
        print(f"{pack(given.source, given.target, given.family)} results in {given.target}")
    else:
        print(f"{unpack(given.source, given.target)} results added to {given.target}")


if __name__ == "__main__":
    main()
