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


def test_every_file_in_the_readmes_tree_exists() -> None:
    tree = re.search(r"```\n(mar/.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert tree
    folder = ""
    for line in tree.group(1).splitlines():
        name = line.split()[0] if line.strip() else ""
        folder = name if name.endswith("/") and not line.startswith(" ") else folder
        path = ROOT / (folder + name if line.startswith(" ") else name)
        assert not name or path.exists(), line
    listed = {line.split()[0] for line in tree.group(1).splitlines() if line.startswith(" ")}
    for package in ("mar", "orchestration"):
        modules = {path.name for path in (ROOT / package).glob("*.py")} - {"__init__.py"}
        assert modules <= listed, f"not in the README's tree: {modules - listed}"


def test_every_verb_in_the_readme_exists() -> None:
    program = "from orchestration.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", program, "--help"], capture_output=True, text=True, check=True)
    verbs = set(re.findall(r"^│ (\w+)", done.stdout, re.MULTILINE))
    used = set(re.findall(r"^(?:\$ )?mar (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert used
    assert used <= verbs
