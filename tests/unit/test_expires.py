"""The contract of `expires` and `configure`, with no watcher around."""

from __future__ import annotations

import decimal
import inspect
import math
import os
import pickle
import pydoc
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import hangwatch
from hangwatch.page import layout
from hangwatch.worker import expiration
from hangwatch.worker.chosen_core import core
from support.pages import quiet_page

pytestmark = pytest.mark.core


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


# -- arguments: what is wrong with them is said when `expires` is called


@pytest.mark.parametrize("after", [0, -1, 0.0, math.nan, math.inf, -math.inf, 10**400])
def test_after_must_be_positive_and_finite(after: float) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        hangwatch.expires(after)


@pytest.mark.parametrize("after", ["1", b"1", None, [], object()])
def test_after_must_be_a_number(after: float) -> None:
    with pytest.raises(TypeError, match="number of seconds"):
        hangwatch.expires(after)


@pytest.mark.parametrize("after", [1, 0.5, True, decimal.Decimal("1.5"), 1e-9, 1e12])
def test_after_may_be_any_number(after: float) -> None:
    with quiet_page() as client, hangwatch.expires(after, "x") as timer:
        assert client.armed() == {"x": 1}
        assert timer.after == float(after)


def test_after_is_read_once() -> None:
    class Tensor:
        value = 60.0

        def __float__(self) -> float:
            return self.value

    after: Any = Tensor()
    block, step = hangwatch.expires(after, "x"), hangwatch.expires(after, "x")
    after.value = -1.0
    with quiet_page() as client:

        @step
        def work() -> dict[str, int]:
            return client.armed()

        with block as timer:
            assert 0 < timer.remaining() <= 60
            after.value = 1e6
            timer.renew()
            assert 0 < timer.remaining() <= 60
        assert work() == {"x": 1}


def test_scope_must_be_a_name() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        hangwatch.expires(1, "")
    scopes: tuple[Any, ...] = (5, b"x", ("a", "b"), ["a"], {"a": 1}, object())
    for scope in scopes:
        with pytest.raises(TypeError, match="must be a string"):
            hangwatch.expires(1, scope)
        with pytest.raises(TypeError, match="must be a string"):
            hangwatch.watch([1], 1, scope)


def test_a_scope_with_a_nul_is_not_cut_there() -> None:
    with quiet_page() as client, hangwatch.expires(60, "rank\0 1"):
        (name,) = client.armed()
    assert name == "rank\\0 1"


def test_a_scope_may_be_of_a_subclass() -> None:
    class Name(str):
        def __hash__(self) -> int:
            raise AssertionError("nobody asks")

        def __eq__(self, other: object) -> bool:
            raise AssertionError("nobody asks")

    with quiet_page() as client:
        for _ in range(2):
            with hangwatch.expires(60, Name("name")):
                assert client.armed() == {"name": 1}


def test_a_client_must_be_one() -> None:
    client: Any = "localhost"
    with pytest.raises(TypeError, match="acquire"):
        hangwatch.expires(1, client=client)
    with pytest.raises(TypeError, match="acquire"):
        hangwatch.paused("upload", 1, client)


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ({"on_expiry": "kill"}, ValueError, "on_expiry"),
        ({"grace": -1}, ValueError, "grace"),
        ({"grace": "1"}, TypeError, "grace"),
        ({"signal": 65}, ValueError, "signal"),
        ({"raises": "TimeoutError"}, TypeError, "must be an exception class"),
        ({"raises": TimeoutError()}, TypeError, "must be an exception class"),
        ({"raises": int}, TypeError, "must be an exception class"),
        ({"raises": TimeoutError, "on_expiry": "report"}, ValueError, "goes with on_expiry"),
        ({"raises": TimeoutError, "on_expiry": "reap"}, ValueError, "goes with on_expiry"),
        ({"unknown": 1}, TypeError, "unknown"),
    ],
    ids=str,
)
def test_what_an_overrun_leads_to_is_checked(
    wrong: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        hangwatch.expires(60, **wrong)
    with pytest.raises(error, match=says):
        hangwatch.watch([], 60, **wrong)


def test_raises_alone_means_raise() -> None:
    with quiet_page() as client:
        for choices in ({}, {"on_expiry": "raise"}):
            with hangwatch.expires(60, "x", raises=TimeoutError, **choices):  # type: ignore[arg-type]
                reader = client.reader()
                (slot,) = reader.armed()
                assert reader.read_details(slot.index).policy.on_expiry == "raise"
                reader.close()


def test_a_bad_block_is_bad_even_after_a_good_one_of_its_scope() -> None:
    with quiet_page():
        with hangwatch.expires(1, "x"):
            pass
        with pytest.raises(ValueError, match="positive"):
            hangwatch.expires(-1, "x")


def test_it_has_a_signature_and_a_description() -> None:
    declared = inspect.signature(expiration.hooks.declare)
    signature = inspect.signature(hangwatch.expires)
    assert [(one.name, one.default, one.kind) for one in signature.parameters.values()] == [
        (one.name, one.default, one.kind) for one in declared.parameters.values()
    ]
    shown = pydoc.plain(pydoc.render_doc(hangwatch.expires))
    assert hangwatch.expires.__name__ == "expires"
    assert "expires(after" in "".join(shown.split())
    assert "raises" in str(signature)
    for part in (
        "takes at most `after` seconds",
        "Args:",
        "more than 0",
        "Raises:",
        "entered once",
    ):
        assert part in shown
    assert hangwatch.expires.__doc__ == expiration.hooks.declare.__doc__, "all of it"


@pytest.mark.parametrize("name", ["_new", "_frame", "_largest", "new", "frame_of", "largest"])
def test_it_takes_no_argument_that_its_signature_does_not_have(name: str) -> None:
    named: dict[str, Any] = {name: object}
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        hangwatch.expires(5, "x", **named)


def test_renew_has_a_signature_and_a_description() -> None:
    renew = hangwatch.Expiration.renew
    assert inspect.signature(renew).parameters["after"].default is None
    shown = pydoc.plain(pydoc.render_doc(renew))
    for part in ("a heartbeat", "seconds of this interval", "Raises:", "HangwatchError"):
        assert part in shown


def test_renew_refuses_what_it_does_not_take() -> None:
    with quiet_page(), hangwatch.expires(5, "x") as block:
        for arguments, named in (((1, 2), {}), ((), {"limit": 1}), ((1,), {"after": 1})):
            with pytest.raises(TypeError):
                block.renew(*arguments, **named)
        block.renew(**{"".join(("af", "ter")): 50})
        assert block.remaining() > 40


# -- blocks


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


def test_an_exception_without_a_truth_value_is_not_replaced() -> None:
    class AmbiguousError(Exception):
        def __bool__(self) -> bool:
            raise RuntimeError("the truth value of an array is ambiguous")

    @hangwatch.expires(60, "decorated")
    def fail() -> None:
        raise AmbiguousError

    with quiet_page() as client:
        for _ in range(2):
            with pytest.raises(AmbiguousError), hangwatch.expires(60, "with"):
                raise AmbiguousError
            with pytest.raises(AmbiguousError):
                fail()
            with pytest.raises(AmbiguousError), hangwatch.paused("pause", 60):
                raise AmbiguousError
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

    @hangwatch.expires(5, "x", client=client if given == "explicit" else None)
    def work() -> None:
        assert client.calls[-1] == BOTH[0]

    for count in (1, 2):
        before = time.time()
        work()
        assert client.calls == BOTH * count
        assert before + 5 <= client.expiration <= time.time() + 5


def test_only_leaving_releases_what_a_client_of_ones_own_acquired() -> None:
    client = Recorder()
    block = hangwatch.expires(5, "x", client=client).__enter__()
    del block
    assert client.calls == BOTH[:1], "as its author expects: each is called once a block, by `with`"


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
    heavy = {"ctypes", "logging", "subprocess", "click", "rich", "psutil", "asyncio"}
    heavy |= {"dataclasses", "inspect", "multiprocessing", "typing"}
    if core.__name__ == "hangwatch.worker.core":
        heavy.remove("ctypes")  # without which it can't make a page private after a fork
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
