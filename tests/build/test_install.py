"""What is built of the project, installed and used: with a compiler, and without."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from hangwatch.page import layout

ROOT = Path(__file__).parents[2]
PYENV = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

BLOCK = """
import hangwatch
from hangwatch.worker.chosen_core import core
with hangwatch.expires(60, "x") as block:
    assert block.place is not None
    block.renew()
print(core.__name__.rpartition(".")[2])
"""


def run(*command: str | Path, **environment: str) -> str:
    result = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env={**os.environ, "HANGWATCH_ADDRESS": "off", "PYTHONPATH": "", **environment},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a source distribution of a clean copy, and a wheel of that; return their folder."""
    folder = tmp_path_factory.mktemp("built")
    copy, python = folder / "copy", folder / "venv" / "bin" / "python"
    ignored = shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT / "src", copy / "src", ignore=ignored)
    for name in SOURCES:
        shutil.copy(ROOT / name, copy)
    run(sys.executable, "-m", "venv", folder / "venv")
    run(python, "-m", "pip", "install", "--quiet", "setuptools>=77")
    build = "from setuptools.build_meta import build_sdist; build_sdist({!r})"
    code = f"import os; os.chdir({str(copy)!r}); {build.format(str(folder))}"
    run(python, "-c", code)
    wheel(folder, folder)
    return folder


def wheel(built: Path, target: Path, **environment: str) -> Path:
    """Build a wheel of the source distribution, with the setuptools that is there."""
    (source,) = built.glob("hangwatch-*.tar.gz")
    pip = (built / "venv" / "bin" / "python", "-m", "pip", "wheel", "--quiet", "--no-deps")
    run(*pip, "--no-build-isolation", "--wheel-dir", target, source, **environment)
    (made,) = target.glob("hangwatch-*.whl")
    return made


def unpacked(wheel: Path, folder: Path) -> Path:
    """Install a wheel into a folder."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def interpreters() -> list[str]:
    """Return this Python, and those of the other versions that are here."""
    others = [sorted(PYENV.glob(f"3.{minor}.*/bin/python")) for minor in (12, 13)]
    return [sys.executable, *(str(found[-1]) for found in others if found)]


def test_the_source_distribution_has_the_core_in_c(built: Path) -> None:
    (source,) = built.glob("hangwatch-*.tar.gz")
    with tarfile.open(source) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert "src/hangwatch/worker/_core.c" in names
    assert "setup.py" in names
    assert not [name for name in names if name.endswith(".so")]


def test_the_wheel_is_of_the_stable_abi(built: Path) -> None:
    (made,) = built.glob("hangwatch-*.whl")
    assert "-cp311-abi3-linux" in made.name
    with zipfile.ZipFile(made) as archive:
        assert "hangwatch/worker/_core.abi3.so" in archive.namelist()


@pytest.mark.parametrize("python", interpreters())
def test_one_wheel_is_for_every_version(python: str, built: Path, tmp_path: Path) -> None:
    (made,) = built.glob("hangwatch-*.whl")
    folder = unpacked(made, tmp_path)
    assert run(python, "-W", "error", "-c", BLOCK, PYTHONPATH=str(folder)) == "_core\n"


SUBINTERPRETERS = """
import sys
try:
    import _interpreters as interpreters
    made = {"legacy": interpreters.create("legacy"), "isolated": interpreters.create("isolated")}
    def run(which, code):
        failed = interpreters.exec(made[which], code)
        assert failed is None, failed
except ImportError:
    import _xxsubinterpreters as interpreters
    made = {"legacy": interpreters.create(isolated=False), "isolated": interpreters.create()}
    def run(which, code):
        interpreters.run_string(made[which], code)
in_c = sys.version_info < (3, 12)  # where the other one has no GIL of its own
import hangwatch
with hangwatch.expires(60, "main"):
    run("legacy", BLOCK + "assert core.__name__.endswith('_core')")
    for turn in range(2):
        # CPython 3.12 has no ctypes there, without which nothing can be watched.
        block = BLOCK.replace("assert", "import sys; assert sys.version_info < (3, 13) or")
        run("isolated", block + f"assert core.__name__.endswith('_core') is {in_c}")
        with hangwatch.expires(60, "between"):
            pass
for name in made.values():
    interpreters.destroy(name)
with hangwatch.expires(60, "main"):
    pass
print("held")
"""


@pytest.mark.parametrize("python", interpreters())
def test_subinterpreters_have_a_core_each(python: str, built: Path, tmp_path: Path) -> None:
    """One with a GIL of its own has that in Python, and says so."""
    (made,) = built.glob("hangwatch-*.whl")
    folder = unpacked(made, tmp_path)
    code = f"BLOCK = {BLOCK!r}\n{SUBINTERPRETERS}"
    said = run(python, "-W", "ignore", "-c", code, PYTHONPATH=str(folder))
    assert "held\n" in said


def test_without_a_compiler_it_is_installed_and_works(built: Path, tmp_path: Path) -> None:
    made = wheel(built, tmp_path / "made", CC="/bin/false")
    folder = unpacked(made, tmp_path / "installed")
    assert not list(folder.glob("hangwatch/worker/*.so"))
    libraries = os.pathsep.join([str(folder), sysconfig.get_path("purelib")])
    assert run(sys.executable, "-W", "error", "-c", BLOCK, PYTHONPATH=libraries) == "core\n"
    tests = (ROOT / "tests/property/test_slots.py", "-p", "no:cacheprovider", "-n", "2")
    run(
        *(sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT),
        *("-m", "core and not long", *tests),
        PYTHONPATH=libraries,
    )


def test_a_stale_build_is_refused_with_one_warning(built: Path, tmp_path: Path) -> None:
    (made,) = built.glob("hangwatch-*.whl")
    folder = unpacked(made, tmp_path)
    path = folder / "hangwatch/page/layout.py"
    text = path.read_text()
    path.write_text(
        text.replace(f"VERSION = {layout.VERSION}\n", f"VERSION = {layout.VERSION + 1}\n")
    )
    said = run(sys.executable, "-c", BLOCK, PYTHONPATH=str(folder)).splitlines()
    assert len(said) == 2, said
    assert "core" in said
    (warning,) = [line for line in said if line != "core"]
    assert f"writes layout {layout.VERSION} of a page, not {layout.VERSION + 1}" in warning
    assert "install hangwatch anew" in warning
