"""The public names: which there are, where they are found, and what importing them loads."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys

import pytest

import hangwatch
import hangwatch.timer
from support.torch_names import OF_TORCH


def python(script: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("module", OF_TORCH)
def test_names_are_where_a_torch_user_looks_for_them(module: str) -> None:
    found = importlib.import_module(module)
    assert OF_TORCH[module] <= set(found.__all__)
    assert all(hasattr(found, name) for name in found.__all__)


@pytest.mark.parametrize("name", hangwatch.timer.__all__)
def test_the_package_has_the_same_objects(name: str) -> None:
    assert getattr(hangwatch, name) is getattr(hangwatch.timer, name)


@pytest.mark.parametrize(
    "name", ["api", "local_timer", "file_based_local_timer", "debug_info_logging", "pairs"]
)
def test_there_is_one_path_to_each_module(name: str) -> None:
    assert importlib.util.find_spec(f"hangwatch.{name}") is None


ROOMS = ("cli", "evidence", "integrations", "keep", "timer", "watcher")


def test_importing_hangwatch_loads_the_worker_s_side_alone() -> None:
    script = f"""
import sys, hangwatch
def loaded():
    return sorted({{name.split(".")[1] for name in sys.modules if name.startswith("hangwatch.")}}
                  & {set(ROOMS)!r})
with hangwatch.expires(60, client=type("Client", (), dict(acquire=print, release=print))()): pass
print(loaded(), "hangwatch.timer.local_timer" in sys.modules)
dir(hangwatch), hasattr(hangwatch, "no_such_name")
print(loaded())
hangwatch.LocalTimerServer
print(loaded(), "hangwatch.timer.local_timer" in sys.modules)
"""
    first, second, third = python(script).splitlines()[-3:]
    assert first == "[] False"
    assert second == "[]", "neither dir() nor a wrong name loads anything"
    assert third == "['timer'] True"


def test_importing_the_timers_loads_no_watcher() -> None:
    script = "import sys, hangwatch.timer; print(*sorted(sys.modules))"
    loaded = {name for name in python(script).split() if name.startswith("hangwatch.")}
    assert "hangwatch.timer.local_timer" in loaded
    assert not {name for name in loaded if name.split(".")[1] in {*ROOMS} - {"timer"}}


def test_a_lazy_name_is_looked_up_once() -> None:
    script = """
import hangwatch
found = hangwatch.serve
print(vars(hangwatch)["serve"] is found is hangwatch.serve)
"""
    assert python(script) == "True\n"


def test_the_timers_are_an_attribute_from_the_start() -> None:
    assert (
        python("import hangwatch; print(hangwatch.timer.api.__name__)") == "hangwatch.timer.api\n"
    )


def test_dir_has_every_public_name() -> None:
    assert set(hangwatch.__all__) <= set(dir(hangwatch))
    assert dir(hangwatch) == sorted(set(dir(hangwatch)))
    assert list(hangwatch.__all__) == sorted(hangwatch.__all__)


def test_star_imports_every_public_name() -> None:
    script = """
from hangwatch import *
import hangwatch
print({name: globals()[name] for name in hangwatch.__all__}
      == {name: getattr(hangwatch, name) for name in hangwatch.__all__})
"""
    assert python(script) == "True\n"


def test_a_wrong_name_raises_python_s_usual_errors() -> None:
    with pytest.raises(AttributeError) as caught:
        hangwatch.LocalTimerServe  # type: ignore[attr-defined]  # noqa: B018
    assert str(caught.value) == "module 'hangwatch' has no attribute 'LocalTimerServe'"
    assert (caught.value.name, caught.value.obj) == ("LocalTimerServe", hangwatch)
    with pytest.raises(ImportError, match="cannot import name 'nothing' from 'hangwatch'"):
        from hangwatch import nothing  # type: ignore[attr-defined]  # noqa: F401


def test_python_suggests_the_name_that_was_meant() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "import hangwatch; hangwatch.LocalTimerServe"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Did you mean: 'LocalTimerServer'?" in result.stderr
