"""The contract of `expires` and `configure`, with no watcher around."""

from __future__ import annotations

import decimal
import math
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import hangwatch
from hangwatch.page import layout
from support.pages import quiet_page


class Recorder(hangwatch.TimerClient):
    """A client as people write them."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.expiration = 0.0

    def acquire(self, scope_id: str, expiration_time: float) -> None:
        self.calls.append(("acquire", scope_id))
        self.expiration = expiration_time

    def release(self, scope_id: str) -> None:
        self.calls.append(("release", scope_id))


BOTH = [("acquire", "x"), ("release", "x")]


@pytest.mark.parametrize("after", [0, -1, 0.0, math.nan, math.inf, -math.inf, 10**400])
def test_after_must_be_positive_and_finite(after: float) -> None:
    with (
        quiet_page(),
        pytest.raises(ValueError, match="positive and finite"),
        hangwatch.expires(after),
    ):
        pass


@pytest.mark.parametrize("after", ["1", b"1", None, [], object()])
def test_after_must_be_a_number(after: float) -> None:
    with (
        quiet_page(),
        pytest.raises(TypeError, match="number of seconds"),
        hangwatch.expires(after),
    ):
        pass


@pytest.mark.parametrize("after", [1, 0.5, True, decimal.Decimal("1.5"), 1e-9, 1e12])
def test_after_may_be_any_number(after: float) -> None:
    with quiet_page() as client, hangwatch.expires(after, "x"):
        assert client.armed() == {"x": 1}


def test_scope_must_be_a_name() -> None:
    with quiet_page():
        with pytest.raises(ValueError, match="must not be empty"), hangwatch.expires(1, ""):
            pass
        scopes: tuple[Any, ...] = (5, b"x", ("a", 1), [])
        for scope in scopes:
            with (
                pytest.raises(TypeError, match="must be a string"),
                hangwatch.expires(1, scope),
            ):
                pass


def test_a_bad_block_is_bad_even_after_a_good_one_of_its_scope() -> None:
    with quiet_page():
        with hangwatch.expires(1, "x"):
            pass
        with pytest.raises(ValueError, match="positive"), hangwatch.expires(-1, "x"):
            pass


def test_default_scope_is_the_callers_file_and_line() -> None:
    with quiet_page() as client:
        line = sys._getframe().f_lineno + 1
        with hangwatch.expires(60), hangwatch.expires(60):
            (scope,) = client.armed()
            assert scope == f"{__file__}#{line}" or scope.endswith(f"#{line}")
            assert client.armed()[scope] == 2


def test_a_long_scope_is_cut_with_a_mark() -> None:
    with quiet_page() as client, hangwatch.expires(60, "ä" * 1000):
        (scope,) = client.armed()
        assert scope.startswith("äää")
        assert scope.endswith("…")
        assert len(scope.encode()) <= layout._SCOPE_BYTES


def test_a_long_default_scope_keeps_its_end(tmp_path: Path) -> None:
    folder = tmp_path / ("d" * 200)
    folder.mkdir()
    code = compile(
        "with hangwatch.expires(60):\n    seen.append(client.armed())", str(folder / "x.py"), "exec"
    )
    with quiet_page() as client:
        seen: list[dict[str, int]] = []
        exec(code, {"hangwatch": hangwatch, "seen": seen, "client": client})
    (scope,) = seen[0]
    assert scope.startswith("…")
    assert scope.endswith("d/x.py#1")


def test_the_body_s_exception_propagates_and_disarms() -> None:
    with quiet_page() as client:
        with pytest.raises(KeyError), hangwatch.expires(60, "x"):
            raise KeyError
        assert client.armed() == {}


def test_without_an_address_the_error_names_the_three_ways_out() -> None:
    with pytest.raises(hangwatch.NotConfiguredError) as caught, hangwatch.expires(1):
        pass
    assert isinstance(caught.value, RuntimeError)
    for way in ("hangwatch run", "hangwatch.serve()", "HANGWATCH_ADDRESS=off"):
        assert way in str(caught.value)


def test_off_makes_a_block_a_no_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HANGWATCH_ADDRESS", "off")
    ran = 0
    for _ in range(3):
        with hangwatch.expires(0.001, "x"), hangwatch.expires(0.001):
            time.sleep(0.002)
            ran += 1
    assert ran == 3
    with pytest.raises(ValueError, match="positive"), hangwatch.expires(0):
        pass


def test_configure_none_wins_over_the_environment() -> None:
    with quiet_page():
        with hangwatch.expires(60, "x"):
            pass
        hangwatch.configure(None)
        with pytest.raises(RuntimeError, match="configure"), hangwatch.expires(60, "x"):
            pass


def test_configure_wants_a_client() -> None:
    with pytest.raises(TypeError, match="acquire"):
        hangwatch.configure("localhost")  # type: ignore[arg-type]


@pytest.mark.parametrize("given", ["configured", "explicit"])
def test_a_client_of_ones_own_is_called_once_a_block(given: str) -> None:
    client = Recorder()
    hangwatch.configure(client if given == "configured" else None)
    block = hangwatch.expires(5, "x", client=client if given == "explicit" else None)
    before = time.time()
    with block:
        assert client.calls == BOTH[:1]
    assert client.calls == BOTH
    assert before + 5 <= client.expiration <= time.time() + 5
    with block:
        pass
    assert client.calls == BOTH * 2


def test_a_body_s_exception_wins_over_a_failing_release() -> None:
    class Failing(Recorder):
        def release(self, scope_id: str) -> None:
            raise OSError("release failed")

    with pytest.raises(KeyError), hangwatch.expires(5, "x", client=Failing()):
        raise KeyError
    with (
        pytest.raises(OSError, match="release failed"),
        hangwatch.expires(5, "x", client=Failing()),
    ):
        pass


def test_a_failing_acquire_raises_and_nothing_is_released() -> None:
    class Failing(Recorder):
        def acquire(self, scope_id: str, expiration_time: float) -> None:
            raise OSError("acquire failed")

    client = Failing()
    with pytest.raises(OSError, match="acquire failed"), hangwatch.expires(5, "x", client=client):
        pass
    assert client.calls == []


def test_a_native_client_s_methods_are_called_where_they_are_replaced() -> None:
    calls = []

    class Overriding(hangwatch.SharedMemoryTimerClient):
        def acquire(self, scope_id: str, expiration_time: float) -> None:
            calls.append("overridden")
            super().acquire(scope_id, expiration_time)

    client = hangwatch.SharedMemoryTimerClient("off")
    with hangwatch.expires(5, "x", client=client):
        pass
    client.acquire = lambda *_: calls.append("replaced")  # type: ignore[method-assign]
    with hangwatch.expires(5, "x", client=client):
        pass
    del client.acquire
    with hangwatch.expires(5, "x", client=client):
        pass
    with hangwatch.expires(5, "x", client=Overriding("off")):
        pass
    assert calls == ["replaced", "overridden"]


def test_importing_loads_nothing_heavy() -> None:
    code = (
        "import sys, socket, mmap, threading; before = set(sys.modules); import hangwatch;"
        "print(*sorted(name for name in set(sys.modules) - before if '.' not in name))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"ctypes", "logging", "subprocess", "json", "click", "rich", "psutil", "asyncio"}
    heavy |= {"dataclasses", "inspect", "re", "multiprocessing", "typing"}
    loaded = set(out.stdout.split())
    assert "hangwatch" in loaded
    assert not loaded & heavy


@pytest.mark.parametrize("name", [n for n in hangwatch.__all__ if n.endswith("Error")])
def test_errors_pickle_and_share_a_base(name: str) -> None:
    kind = getattr(hangwatch, name)
    error = kind("what happened: what to do")
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, hangwatch.HangwatchError)
    assert str(again) == str(error)


def test_version_is_the_distribution_s() -> None:
    from importlib.metadata import version

    assert hangwatch.__version__ == version("hangwatch")
    assert os.path.exists(Path(hangwatch.__file__).parent / "py.typed")
