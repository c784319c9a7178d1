"""The tests, files and make targets that the pages name are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "docs/*.md", "docs/decisions/*.md"]
# Not where the wheel is tested: the project around it is missing there.
PAGES += ["ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md"]
FOUND = sorted(page for pattern in PAGES for page in ROOT.glob(pattern))

TEST_FILE = re.compile(r"`(tests/[\w/]+(?:\.py)?)(?:::([\w:\[\]-]+))?`")
NAME_ALONE = re.compile(r"`::(\w+)(?:::(\w+))?`")
OTHER_FILE = re.compile(r"\b(test_\w+\.py)(?:::(\w+)(?:::(\w+))?)?")


def _names_in(files: list[Path]) -> set[str]:
    text = "\n".join(path.read_text() for path in files)
    return set(re.findall(r"^\s*(?:async )?(?:def|class) (\w+)", text, re.M))


@pytest.mark.parametrize("page", FOUND, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    missing = []
    named = set()
    for path, test in TEST_FILE.findall(text):
        named.add(path)
        if not (ROOT / path).exists():
            missing.append(path)
        elif test and not set(test.split("::")) <= _names_in([ROOT / path]):
            missing.append(f"{path}::{test}")
    everywhere = sorted((ROOT / "tests").rglob("*.py"))
    for name, *tests in OTHER_FILE.findall(text):
        files = [path for path in everywhere if path.name == name]
        if not files or not {test for test in tests if test} <= _names_in(files):
            missing.append("::".join([name, *tests]))
    for names in NAME_ALONE.findall(text):
        files = [ROOT / path for path in named if path.endswith(".py")]
        if not {name for name in names if name} <= _names_in(files):
            missing.append("::".join(names))
    makefile = ROOT / "Makefile"
    if makefile.exists():
        targets = set(re.findall(r"^([\w-]+):", makefile.read_text(), re.M))
        missing += sorted(set(re.findall(r"`make ([\w-]+)", text)) - targets)
    assert missing == []
