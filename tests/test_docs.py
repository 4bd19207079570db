"""What README and docs say is there, is there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from commands import run_mar

from mar.config.overrides import SETTING_PATHS
from mar.config.reference import branches, settings_below
from orchestration.cli.app import app

ROOT = Path(__file__).parent.parent
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *GUIDES,
    ROOT / "cluster" / "README.md",
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        # The reference's pages are written from the code when the site is built.
        if not target.startswith(("http", "reference/", "../reference/")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_designs_tree_lists_every_package_and_nothing_else() -> None:
    design = (ROOT / "docs" / "design.md").read_text()
    tree = re.search(r"## The tree\n\n```\n(mar/.*?)```", design, re.DOTALL)
    assert tree
    listed: set[str] = set()
    folder = ""
    for line in tree.group(1).splitlines():
        names = line[:32].replace(",", " ").split()
        if not line.startswith(" "):
            folder = names[0]
            assert (ROOT / folder).is_dir(), line
            continue
        for name in names:
            assert (ROOT / folder / name).exists(), line
            listed.add(folder + name)
    for package in ("mar", "orchestration"):
        inside = (ROOT / package).iterdir()
        parts = [
            path for path in inside if path.suffix == ".py" or (path / "__init__.py").is_file()
        ]
        names = {f"{package}/{path.name}{'/' if path.is_dir() else ''}" for path in parts}
        names -= {f"{package}/__init__.py", f"{package}/__main__.py"}
        assert names <= listed, f"not in the design's tree: {names - listed}"


def test_every_verb_in_the_readme_exists() -> None:
    program = "from orchestration.cli.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "--help"], capture_output=True, text=True, check=True
    )
    verbs = set(re.findall(r"^│ (\w+)", done.stdout, re.MULTILINE))
    used = set(re.findall(r"^(?:\$ )?mar (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert used
    assert used <= verbs


def commands(page: Path) -> list[list[str]]:
    """Return the words of each line of a page that calls mar."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()]
    called = [re.match(r"(?:\$ |\t@?\$\(BIN\)/)?(mar .*)", line) for line in lines]
    # After two spaces a line says what it does.
    return [shlex.split(re.split(r"  +#? ?", found[1])[0]) for found in called if found]


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "docs" / "index.md", *GUIDES], ids=lambda page: page.name
)
def test_every_command_of_a_guide_is_one_that_mar_takes(page: Path) -> None:
    top: Any = typer.main.get_command(app)
    for words in commands(page):
        command = top
        rest = words[1:]
        while hasattr(command, "commands"):
            assert rest and rest[0] in command.commands, words
            command = command.commands[rest.pop(0)]
        # ``run`` is parsed by its own parser inside ``submit``.
        if words[1] == "submit":
            continue
        # Parsed, not run: a wrong option, value or number of arguments is an error here.
        command.make_context(" ".join(words), list(rest))


def test_every_setting_key_and_verb_is_in_the_reference(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "reference_pages.py"
    subprocess.run([sys.executable, script, tmp_path], check=True, cwd=ROOT)
    settings = (tmp_path / "settings.md").read_text()
    for path in SETTING_PATHS:
        name = path.split(".", 1)[-1]
        if path not in branches() and path != "evaluation.mask":
            assert f"| `{name}` |" in settings, path
    # A setting without a meaning helps nobody.
    assert not re.findall(r"^\| `[^|]*\|  \|$", settings, re.MULTILINE)
    assert all(each.meaning for each in settings_below())
    command = (tmp_path / "command.md").read_text()
    assert {"run", "predict", "settings"} <= set(
        re.findall(r"^## mar (\w+)", command, re.MULTILINE)
    )
    python = (tmp_path / "python.md").read_text()
    for name in ("load", "Model", "Study", "results"):
        assert f"## mar.{name}\n" in python


def test_mar_settings_explains_a_setting(tmp_path: Path) -> None:
    output, _ = run_mar(tmp_path, "settings", "mask.ratio")
    assert "mask.ratio = 0.5" in output and "share of hidden tokens" in output
    assert "mask.cell" not in output
    _, error = run_mar(tmp_path, "settings", "mask.ratoi", code=2)
    assert "did you mean mask.ratio" in error
