"""Recipes that extend recipes, and what two of them differ in."""

import json
from pathlib import Path

import pytest

from mar.errors import UserError
from orchestration.cli.app import main
from orchestration.installation import packaged
from orchestration.reporting.paper_costs import cost_frame, write_page
from orchestration.studies.diff import differences
from orchestration.studies.recipe import read_recipe

NAMES = ["ssv2_vit_b", "ssv2_vit_l", "k400_vit_b", "k400_vit_l"]


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(
        "recipe:\n  epochs: 5\n  base_lr: 1.0e-3  # as printed\nmask: {ratio: 0.5, cell: [2, 2]}\n"
    )
    (tmp_path / "other.yaml").write_text(
        'extends: base.yaml\nrecipe.base_lr: 2.0e-3  # "measured", not # printed\nmask.ratio: '
        "0.75\n"
    )
    return tmp_path


def test_a_recipe_has_what_it_extends_and_the_last_word(recipes: Path) -> None:
    settings = read_recipe(str(recipes / "other.yaml"))
    assert (settings.recipe.epochs, settings.recipe.base_lr, settings.mask.ratio) == (5, 2e-3, 0.75)


def test_differences_are_named_with_the_reasons_the_recipes_give(recipes: Path) -> None:
    found = differences(str(recipes / "base.yaml"), str(recipes / "other.yaml"))
    assert [(each.setting, each.first, each.second) for each in found] == [
        ("mask.ratio", 0.5, 0.75),
        ("recipe.base_lr", 1e-3, 2e-3),
    ]
    assert [each.reason for each in found] == ["", 'as printed; "measured", not # printed']


def test_a_mistake_is_blamed_on_the_file_that_made_it(recipes: Path) -> None:
    (recipes / "base.yaml").write_text("recipe:\n  epochs: none\n")
    with pytest.raises(UserError, match=r"base\.yaml:2: recipe\.epochs"):
        read_recipe(str(recipes / "other.yaml"))
    (recipes / "other.yaml").write_text("extends: base.yaml\nrecipe: {epochs: 1}\nmask.rato: 1\n")
    with pytest.raises(
        UserError, match=r"other\.yaml:3: mask\.rato: no such setting; did you mean mask\.ratio"
    ):
        read_recipe(str(recipes / "other.yaml"))


def test_a_recipe_cannot_extend_itself_or_nothing(recipes: Path) -> None:
    (recipes / "base.yaml").write_text("extends: other.yaml\n")
    with pytest.raises(UserError, match=r"base\.yaml:1: extends: other\.yaml extends itself"):
        read_recipe(str(recipes / "other.yaml"))
    (recipes / "base.yaml").write_text("extends: none.yaml\n")
    with pytest.raises(UserError, match=r"base\.yaml:1: extends: no recipe 'none\.yaml'"):
        read_recipe(str(recipes / "base.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_paper_and_release_differ_in_settings_that_all_have_a_reason(name: str) -> None:
    found = differences(f"paper/{name}", f"released/{name}")
    assert {"recipe.weight_decay", "recipe.lr_scaling", "recipe.cosine_from"} <= {
        each.setting for each in found
    }
    assert all(each.reason for each in found), [each.setting for each in found if not each.reason]


def test_the_released_files_say_only_what_differs() -> None:
    for name in NAMES:
        own = (packaged("search_spaces") / "recipes" / "released" / f"{name}.yaml").read_text()
        said = {line.split(":")[0].strip() for line in own.splitlines() if line.startswith("  ")}
        assert said == {
            each.setting.rsplit(".")[-1]
            for each in differences(f"paper/{name}", f"released/{name}")
        }


def test_diff_prints_for_people_and_for_programs(
    recipes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(recipes / "base.yaml"), str(recipes / "other.yaml")]
    run("diff", *files)
    out = capsys.readouterr().out
    assert "mask.ratio        0.5   0.75\n" in out
    assert out.endswith("2 settings differ\n")
    run("diff", *files, "--json")
    assert json.loads(capsys.readouterr().out)[0]["setting"] == "mask.ratio"
    run("diff", files[0], files[0])
    assert capsys.readouterr().out == "equal: no setting differs\n"


def run(*arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr("sys.argv", ["mar", *arguments])
        main()
    assert not ended.value.code


def test_every_cost_that_the_paper_prints_is_reproduced() -> None:
    frame = cost_frame()
    printed = frame[frame["GFLOPs, paper"].notna()]
    assert len(printed) == 46
    assert set(printed["agrees"]) == {"within 0.01", "rounded"}
    counted = frame[frame["Param (M), paper"].notna()]
    assert all(
        0 <= row["Param (M), paper"] - row["Param (M), ours"] < 1 for _, row in counted.iterrows()
    )


def test_the_page_of_costs_is_what_the_command_makes() -> None:
    page = Path(__file__).parent.parent / "docs" / "cost.md"
    assert page.read_text() == write_page(None), "run: mar cost --paper -o docs/cost.md"


def test_the_guide_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    run("diff", "paper/ssv2_vit_b", "released/ssv2_vit_b")
    guide = Path(__file__).parent.parent / "docs" / "guides" / "paper.md"
    assert capsys.readouterr().out in guide.read_text()
