"""The tests, files and make targets that the pages name are there, and are run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.what_runs import running_tests

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


PROMISES = ["README.md", "ARCHITECTURE.md", "SECURITY.md", "docs/reliability.md"]
SHOWN_OTHERWISE = re.compile(r"`make (?!test`|check`)[\w-]+")
NAMED = re.compile(
    r"`(?P<path>tests/[\w/]+(?:\.py)?)(?:::(?P<of_path>[\w:]+)(?:\[.*?\])?)?`"
    r"|`(?P<name>test_\w+\.py)(?:::(?P<of_name>[\w:]+))?`"
    r"|`::(?P<alone>[\w:]+)"
)


def named_tests(line: str) -> Iterator[tuple[str, list[Path], str]]:
    """Yield what a line names: as it stands there, the test files, and the test; empty: any."""
    files: list[Path] = []
    for found in NAMED.finditer(line):
        if found["path"]:
            path = ROOT / found["path"]
            files = sorted(path.rglob("test_*.py")) if path.is_dir() else [path]
        elif found["name"]:
            files = sorted((ROOT / "tests").rglob(found["name"]))
        test = found["of_path"] or found["of_name"] or found["alone"] or ""
        files = [file for file in files if file.name.startswith("test_")]
        if files:
            yield found[0], files, test


@pytest.mark.parametrize("page", [page for page in PROMISES if (ROOT / page).exists()])
def test_make_test_runs_a_test_of_each_promise(page: str) -> None:
    """Unless its line names another make target that shows it."""
    left_out = [
        f"{line_number}: {name}"
        for line_number, line in enumerate((ROOT / page).read_text().splitlines(), 1)
        if not SHOWN_OTHERWISE.search(line)
        for name, files, test in named_tests(line)
        if not any(runs(file, test) for file in files)
    ]
    assert left_out == []


def runs(file: Path, test: str) -> bool:
    """Tell whether `make test` runs this test of a file; empty: any of them."""
    running = running_tests(file)
    return set(test.split("::")) <= running if test else bool(running)


MARKED = """
import pytest
from support.sizes import LONG

seldom = pytest.mark.long
SIZES = [1, pytest.param(2, marks=pytest.mark.long)]
ALL_LONG = [pytest.param(size, marks=seldom) for size in (1, 2)]
SOME_LONG = [pytest.param(n, marks=seldom if n else ()) for n in (0, 1)]

def test_plain(): ...
@pytest.mark.alone
def test_alone(): ...
@pytest.mark.parametrize("size", SIZES)
def test_some(size): ...
@pytest.mark.parametrize("size", ["short", LONG])
def test_short(size): ...
@pytest.mark.parametrize("size", SOME_LONG)
def test_some_by_condition(size): ...

@pytest.mark.long
def test_long(): ...
@seldom
def test_long_by_name(): ...
@pytest.mark.parametrize("size", [LONG])
def test_long_sizes(size): ...
@pytest.mark.parametrize("size", [*ALL_LONG])
def test_all_sizes_long(size): ...

class TestBoth:
    def test_inside(self): ...
    @pytest.mark.interop
    def test_interop(self): ...

@pytest.mark.long
class TestLong:
    def test_in_a_long_class(self): ...

class TestMarked:
    pytestmark = pytest.mark.long
    def test_in_a_marked_class(self): ...
"""
RUN = {"test_plain", "test_alone", "test_some", "test_short", "test_some_by_condition"}
RUN |= {"TestBoth", "test_inside"}


def test_marks_are_found_wherever_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "test_marked.py"
    file.write_text(MARKED)
    assert running_tests(file) == RUN
    file.write_text(f"{MARKED}\npytestmark = [pytest.mark.timeout(9), pytest.mark.interop]\n")
    assert running_tests(file) == set()
