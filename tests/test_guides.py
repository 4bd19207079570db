"""The commands of the guides, run in a folder as they describe it.

What takes a cluster, an official data set or hours is left out; tests/test_docs.py parses it.
"""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from commands import run_mar
from conftest import TINY_VERBS

from mar.data.motion_verbs import MotionVerbs, make

GUIDES = Path(__file__).parent.parent / "docs" / "guides"
LEFT_OUT = {
    "mar plan --all --device v100": "needs the official data sets to say more than that",
    "mar cost paper/ssv2_vit_b --memory": "needs a GPU",
    "mar bench step": "takes minutes: ViT-B",
    "mar report --all": "the other studies have no runs here",
    "mar ui": "serves until it is stopped",
    # A minute or two each; tests/test_search.py and tests/test_train.py run others like them.
    "mar run search_quickstart": "eight trials",
}
STAND_INS = {
    "STUDY": "study.yaml",
    "mar_store/trials/KEY/result": "a_result",
    "OWNER/NAME": "me/it",
    "my_study.yaml": "pretrained.yaml",
}
"""What a guide writes in capitals, or leaves to the reader -> what it is here."""


def commands(page: Path) -> list[str]:
    """Return the commands of a page; of a transcript those after a ``$``."""
    found: list[str] = []
    fenced = re.findall(r"^```([a-z]*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    for language, block in fenced:
        lines = block.splitlines()
        typed = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        if not typed:
            typed = [line for line in lines if line.startswith("mar ")]
        if not language:
            found += [each for each in typed if each not in LEFT_OUT]
    assert found
    return found


def yaml_of(page: str, start: str) -> str:
    """Return the YAML file of a page that starts so."""
    text = (GUIDES / page).read_text()
    (found,) = re.findall(rf"^```yaml\n({start}.*?)^```", text, re.DOTALL | re.MULTILINE)
    return found


@pytest.fixture(autouse=True)
def _token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token for the hub, which a dry run asks for and does not send."""
    monkeypatch.setenv("HF_TOKEN", "of nobody")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, videos: Path) -> Path:
    """The files that the guides speak of: clips, a study, the quickstart's data."""
    folder = tmp_path_factory.mktemp("workplace")
    make(folder / "mar_data" / "motion-verbs", MotionVerbs(train=32, validation=8))
    clips = sorted((videos / "videos").glob("*.mp4"))
    for name, clip in zip(("clip.mp4", "folder/1.mp4", "more/2.mp4"), clips, strict=False):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(clip, folder / name)
    make(folder / "long", MotionVerbs(**{**TINY_VERBS.__dict__, "frames": 90, "train": 2}))
    shutil.copy(min((folder / "long" / "videos").glob("*.mp4")), folder / "long.mp4")
    make(folder / "many", MotionVerbs(**{**TINY_VERBS.__dict__, "train": 44, "validation": 2}))
    clips = sorted((folder / "many" / "videos").glob("*.mp4"))
    lists: dict[str, list[str]] = {"train": [], "val": []}
    for number in range(44):
        name = f"{'ab'[number % 2]}/walk_{number:03}.mp4"
        (folder / "clips" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clips[number], folder / "clips" / name)
        lists["val" if number >= 36 else "train"].append(f"{name} {number % 2}")
    for split, lines in lists.items():
        (folder / "clips" / f"{split}.txt").write_text("\n".join(lines))
    study = yaml_of("ablation.md", "title")
    (folder / "study.yaml").write_text(study)
    (folder / "mine.yaml").write_text(yaml_of("videos.md", "# mine.yaml"))
    tree = yaml.safe_load(study)
    one = {"title": "One", "recipe": tree["recipe"], "axes": {"ρ": {"50 %": {}}}}
    (folder / "pretrained.yaml").write_text(yaml.safe_dump({**one, "table": {"columns": ["top1"]}}))
    return folder


def follow(page: str, workplace: Path, epochs: int | None = None) -> str:
    """Run a guide's commands one after another; return what they printed.

    Every ``mar run`` is without Ray, which other tests start; with ``epochs`` it trains for so
    many: the guide's are for more videos.
    """
    printed = ""
    for command in commands(GUIDES / page):
        for written, here in STAND_INS.items():
            command = command.replace(written, here)
        words = shlex.split(command)[1:]
        if words[0] == "run":
            words += ["--backend", "local"]
        if words[0] == "run" and epochs:
            words.append(f"recipe.epochs={epochs}")
        printed += run_mar(workplace, *words)[0]
    return printed


@pytest.fixture(scope="module")
def quickstart(workplace: Path) -> Path:
    """The folder, where the quickstart has run."""
    run_mar(workplace, "run", "quickstart", "--backend", "local")
    (workplace / "a_result").symlink_to(next(workplace.glob("mar_store/trials/*/result")))
    return workplace


def test_predict(quickstart: Path) -> None:
    follow("predict.md", quickstart)
    assert "folder/1.mp4" in (quickstart / "predictions.csv").read_text()
    assert (quickstart / "picture.png").stat().st_size > 1000


def test_an_ablation_its_cost_and_its_results(workplace: Path) -> None:
    assert r"\toprule" in follow("ablation.md", workplace)
    assert "GFLOPs a view" in follow("cost.md", workplace)
    follow("results.md", workplace)
    assert (workplace / "figure.pdf").read_bytes().startswith(b"%PDF")


def test_your_own_videos(workplace: Path) -> None:
    follow("videos.md", workplace, epochs=1)


def test_pre_training_and_weights(quickstart: Path) -> None:
    follow("pretraining.md", quickstart)
    assert (quickstart / "my-weights" / "model.safetensors").is_file()
    convert = ["weights", "convert", "my-weights", "videomae-base", "--to", "huggingface"]
    run_mar(quickstart, *convert)
    assert "not sent" in follow("weights.md", quickstart)


def test_beyond_the_paper(workplace: Path) -> None:
    follow("beyond.md", workplace)
    assert (workplace / "motion.png").stat().st_size > 1000


def test_a_search(workplace: Path) -> None:
    follow("search.md", workplace)
