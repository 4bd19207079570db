"""The verbs that use a trained model on videos: predict, reconstruct.

Parsing and printing; the work is ``mar.inference.Model``'s.
"""

from __future__ import annotations

import csv
import glob
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mar.atomic_dir import atomic_write
from mar.errors import Failure, UserError
from mar.safe_text import cell, printable
from orchestration.cli.options import DEFAULT_STORE, StoreFolder, TrackingUri

if TYPE_CHECKING:
    from mar.inference import Model, Prediction

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help=(
            "A trial's result folder, weights of any layout, organisation/model on Hugging Face, "
            "runs:/RUN_ID or models:/STUDY@best of MLflow; mini ships with mar."
        ),
    ),
]
Videos = Annotated[
    list[str], typer.Argument(metavar="VIDEO…", help='Files, folders, or patterns as "*.mp4".')
]
Setting = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Settings; repeatable.")
]
IsBest = Annotated[
    bool,
    typer.Option("--best", help="MODEL is a study or search: take its best trial in --store."),
]


def predict(
    model: ModelName,
    videos: Videos,
    is_best: IsBest = False,
    setting: Setting = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="File of class names, one a line. Default: the names that the model has.",
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Number of classes to name.")] = 5,
    window: Annotated[
        str | None,
        typer.Option(metavar="SECONDS", help="Classify windows of this length, as 5s."),
    ] = None,
    stride: Annotated[
        str | None,
        typer.Option(
            metavar="SECONDS",
            help="From the start of one window to the next. Default: the window's length.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File to write: .csv or .json.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    store: StoreFolder = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
) -> None:
    """Name the most probable classes of videos, or of windows of long ones."""
    # Checked first: reading the model takes seconds.
    files = list(_files(videos))
    window_s, stride_s = _window(window, stride)
    if output and output.suffix not in (".csv", ".json"):
        raise UserError(f"-o {output}: expected a name that ends in .csv or .json")
    trained = _loaded(model, is_best, setting, store, tracking_uri)
    if labels:
        trained.classes = tuple(labels.read_text(encoding="utf-8").splitlines())
    rows: list[dict[str, Any]] = []
    broken: list[str] = []
    for file in files:
        try:
            for row in _rows(trained, file, window_s, stride_s, top):
                rows.append(row)
                if not as_json:
                    print(printable(_line(row)), flush=True)
        # A video that is broken does not hide the others' predictions.
        except Failure as failure:
            broken.append(str(failure))
    if as_json:
        print(_json(rows, broken))
    if output:
        _write(rows, broken, output)
    if broken:
        raise Failure(f"{len(broken)} could not be decoded; the first: {broken[0]}")


def reconstruct(
    model: ModelName,
    videos: Videos,
    is_best: IsBest = False,
    output: Annotated[Path, typer.Option("-o", "--output", help="Picture to write.")] = Path(
        "reconstructions.png"
    ),
    setting: Setting = None,
    store: StoreFolder = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
) -> None:
    """Draw videos, their parts that the test mask leaves visible, and reconstructions (Fig. 6)."""
    from mar.data.annotations import Video
    from mar.visualization.reconstructions import draw_reconstructions

    files = [Video(str(file), file, 0) for file in _files(videos)]
    trained = _loaded(model, is_best, setting, store, tracking_uri)
    trained.require("decoder")
    draw_reconstructions(trained.settings, trained.network, files, output)
    print(output)


def _files(videos: list[str]) -> Iterator[Path]:
    """Yield the videos that arguments stand for: files, folders and patterns.

    A folder with images in it is one video; of any other folder, the videos below it.

    Raises:
        UserError: there is no such file or folder, or nothing in it.
    """
    from mar.data.video.files import videos_below
    from mar.data.video.paths import is_image

    for name in videos:
        path = Path(name).expanduser()
        # A file may have the characters of a pattern in its name.
        if path.is_file():
            yield path
            continue
        # A video that is a folder of images.
        if path.is_dir() and any(is_image(each.name) for each in path.iterdir()):
            yield path
            continue
        if path.is_dir():
            found = [path / each for each in sorted(videos_below(path))]
        else:
            # Not Path.glob: an absolute pattern is allowed here.
            pattern = glob.glob(str(path), recursive=True)  # noqa: PTH207
            found = [Path(each) for each in sorted(pattern)]
        if not found:
            raise UserError(f"no such video: {name}")
        yield from found


def _window(window: str | None, stride: str | None) -> tuple[float | None, float | None]:
    """Return the length of a window and the distance between two, in seconds.

    Raises:
        UserError: one is not a positive number, or there is a distance without a length.
    """
    stride_s = _seconds("--stride", stride)
    if stride_s is not None and window is None:
        raise UserError(f"--stride {stride}: how long are the windows? Give --window too")
    return _seconds("--window", window), stride_s


def _seconds(option: str, text: str | None) -> float | None:
    """Return the seconds that ``5s`` or ``5`` stands for.

    Raises:
        UserError: it is not a positive number.
    """
    if text is None:
        return None
    try:
        seconds = float(text.removesuffix("s"))
    except ValueError:
        seconds = -1.0
    # Written so that NaN fails, too.
    if not 0 < seconds < float("inf"):
        raise UserError(f"{option} {text}: expected seconds, as 5s")
    return seconds


def _loaded(
    name: str, is_best: bool, setting: list[str] | None, store: Path, tracking_uri: str | None
) -> Model:
    from orchestration.api import load
    from orchestration.stored_results import best_result
    from orchestration.studies.recipe import parse_overrides

    if is_best:
        name = str(best_result(name, store=store, tracking_uri=tracking_uri))
    overrides = parse_overrides(setting or [])
    return load(name, overrides, store=store, tracking_uri=tracking_uri)


def _rows(
    model: Model, file: Path, window_s: float | None, stride_s: float | None, top: int
) -> Iterator[dict[str, Any]]:
    """Yield one row for a video, or one for each of its windows."""
    if window_s is None:
        yield {"video": str(file), "classes": _shares(model.predict(file, top))}
        return
    for part in model.predict_windows(file, window_s, stride_s, top):
        yield {
            "video": str(file),
            "start_s": round(part.start_s, 3),
            "end_s": round(part.end_s, 3),
            "classes": _shares(part.predictions),
        }


def _shares(predictions: list[Prediction]) -> dict[str, float]:
    return {each.name: round(each.probability, 4) for each in predictions}


def _line(row: dict[str, Any]) -> str:
    time = ""
    if "start_s" in row:
        time = f" {row['start_s']:.2f}–{row['end_s']:.2f} s"
    shares = ", ".join(f"{name} {share:.1%}" for name, share in row["classes"].items())
    return f"{row['video']}{time}: {shares}"


def _json(rows: list[dict[str, Any]], broken: list[str]) -> str:
    payload = {"predictions": rows, "broken": broken}
    return json.dumps(payload, indent=1, ensure_ascii=False)


def _write(rows: list[dict[str, Any]], broken: list[str], file: Path) -> None:
    """Write the predictions as JSON, or as csv with a row for each video or window."""
    if file.suffix == ".json":
        atomic_write(file, _json(rows, broken).encode("utf-8", "surrogateescape"))
        return
    columns = [name for name in ("video", "start_s", "end_s") if rows and name in rows[0]]
    count = max((len(row["classes"]) for row in rows), default=0)
    header = list(columns)
    for rank in range(1, count + 1):
        header += [f"class_{rank}", f"probability_{rank}"]
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(header)
    for row in rows:
        values = [cell(row[name]) for name in columns]
        for name, share in row["classes"].items():
            values += [cell(name), share]
        writer.writerow(values)
    atomic_write(file, text.getvalue().encode("utf-8", "surrogateescape"))
