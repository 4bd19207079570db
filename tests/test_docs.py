"""What README and docs say is there, is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "cluster" / "README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readmes_tree_lists_every_package_and_nothing_else() -> None:
    tree = re.search(r"```\n(mar/.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
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
        assert names <= listed, f"not in the README's tree: {names - listed}"


def test_every_verb_in_the_readme_exists() -> None:
    program = "from orchestration.cli.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "--help"], capture_output=True, text=True, check=True
    )
    verbs = set(re.findall(r"^│ (\w+)", done.stdout, re.MULTILINE))
    used = set(re.findall(r"^(?:\$ )?mar (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert used
    assert used <= verbs
