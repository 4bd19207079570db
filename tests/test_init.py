"""``mar init``: from a folder of videos to a recipe that runs."""

import json
import re
import shutil
from pathlib import Path

import pytest
from commands import run_mar

from mar.config.overrides import build
from mar.data.annotations import read_split
from mar.data.decoders import decode_with, write_video
from mar.data.new_recipe import write_recipe
from mar.errors import UserError
from orchestration.studies.recipe import recipe_tree


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory, videos: Path) -> Path:
    """Twenty-four videos in a folder for each of two classes; a path has a space and a quote."""
    root = tmp_path_factory.mktemp("films")
    for file in ("train.json", "validation.json"):
        for each in json.loads((videos / file).read_text()):
            name = 'to the "left"' if each["template"].endswith("left") else "to the right"
            (root / name).mkdir(exist_ok=True)
            shutil.copy(videos / "videos" / f"{each['id']}.mp4", root / name)
    return root


def test_a_folder_of_classes_becomes_a_recipe_that_trains(films: Path, tmp_path: Path) -> None:
    printed, _ = run_mar(tmp_path, "init", str(films), "-o", "mine")
    assert re.search(r"2 classes: to the \"left\", to the right", printed)
    assert "one video of five of each class for testing" in printed
    settings = build(recipe_tree(str(tmp_path / "mine" / "recipe.yaml")))
    train, test = (read_split(settings.data, split) for split in ("train", "val"))
    assert len(train) + len(test) == 24 and len(test) == 6
    assert not {each.name for each in train} & {each.name for each in test}
    assert all(each.path.is_file() for each in [*train, *test])
    assert {each.label for each in test} == {0, 1}
    check, _ = run_mar(tmp_path, "data", "check", "mine/recipe.yaml")
    assert re.search(r"^train +18( +0){7}$", check, re.MULTILINE)
    assert re.search(r"^val +6( +0){7}$", check, re.MULTILINE)
    short = ["recipe.epochs=1", "recipe.warmup_epochs=0", "evaluation.every_epochs=1"]
    table, _ = run_mar(tmp_path, "run", "mine/recipe.yaml", *short, "--backend", "local")
    assert re.search(r"\| mine/recipe +\| \d", table)
    _, error = run_mar(tmp_path, "init", str(films), "-o", "mine", code=2)
    assert "exists already" in error


def test_clips_of_one_recording_are_on_one_side(films: Path, tmp_path: Path) -> None:
    film = sorted(films.rglob("*.mp4"))[0]
    for name in ("Archery", "Biking"):
        (tmp_path / "ucf" / name).mkdir(parents=True)
        for number in range(18):
            clip = f"v_{name}_g{number // 3 + 1:02}_c{number % 3 + 1:02}.mp4"
            shutil.copy(film, tmp_path / "ucf" / name / clip)
    # A link's own name is the recipe's, not that of the folder it leads to.
    (tmp_path / "linked").symlink_to(tmp_path / "ucf")
    printed, _ = run_mar(tmp_path, "init", "linked")
    assert "one recording of five of each class for testing" in printed
    settings = build(recipe_tree(str(tmp_path / "linked_recipe" / "recipe.yaml")))
    sides = [
        {video.name[: -len("_c01.mp4")] for video in read_split(settings.data, split)}
        for split in ("train", "val")
    ]
    assert not sides[0] & sides[1]
    assert len(sides[1]) == 2
    # A class of one recording could not be on both sides: its clips are divided as any videos.
    (tmp_path / "ucf" / "Rowing").mkdir()
    for number in range(6):
        clip = tmp_path / "ucf" / "Rowing" / f"v_Rowing_g01_c{number + 1:02}.mp4"
        shutil.copy(film, clip)
    found = write_recipe(tmp_path / "ucf", tmp_path / "again")
    assert found.divided_by == "videos"
    assert {label for _, label in found.test} == {0, 1, 2}


def test_a_split_of_its_own_is_kept_and_long_videos_are_sampled_densely(
    films: Path, tmp_path: Path
) -> None:
    film = decode_with("pyav", sorted(films.rglob("*.mp4"))[0])
    for split in ("train", "val"):
        for name in ("a", "b"):
            folder = tmp_path / "long" / split / name
            folder.mkdir(parents=True)
            for number in range(2):
                write_video(folder / f"{number}.mp4", film.repeat(20, axis=0), 12)
    found = write_recipe(tmp_path / "long", tmp_path / "mine")
    assert found.divided_by == "folders" and found.seconds is not None and found.seconds > 6
    settings = build(recipe_tree(str(tmp_path / "mine" / "recipe.yaml")))
    # Two seconds of twelve frames each, in eight steps.
    assert (settings.clip.sampling, settings.clip.stride) == ("dense", 3)
    assert read_split(settings.data, "val")[0].name.startswith("val/a/")
    assert settings.recipe.batch_size == 4


def test_what_is_no_such_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        write_recipe(tmp_path / "nowhere", tmp_path / "mine")
    (tmp_path / "empty" / "a").mkdir(parents=True)
    with pytest.raises(UserError, match=r"a folder for each class.*found 0 classes"):
        write_recipe(tmp_path / "empty", tmp_path / "mine")
    assert not (tmp_path / "mine").exists()
