from __future__ import annotations

import fcntl
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import pytest

import hangwatch
from hangwatch.worker import expiration, transports
from support.sizes import Size
from support.watchers import RunningWatcher, StartWatcher

# A shell's background jobs ignore it, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long a draw takes says how busy the machine is, not how good the test is.
hypothesis.settings.register_profile(
    "busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("busy")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run long tests in their full size")


@pytest.fixture
def size(request: pytest.FixtureRequest) -> Size:
    """Return the size of a test that is marked `support.sizes.short_and_long`."""
    if request.param == "short":
        return Size.SHORT
    return Size.FULL if request.config.getoption("full") else Size.MIDDLE


@pytest.fixture(autouse=True)
def _machine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Share the machine with the tests of other processes, or have it `alone`.

    Who wants it alone keeps the others waiting at the gate until it has had it. Unlocked by
    hand, for children that outlive a test have its descriptors; flock(2).
    """
    alone = request.node.get_closest_marker("alone") is not None
    # xdist's processes have this folder in common.
    folder = tmp_path_factory.getbasetemp().parent
    with (folder / "gate.lock").open("w") as gate, (folder / "machine.lock").open("w") as machine:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(machine, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        yield
        fcntl.flock(machine, fcntl.LOCK_UN)


@contextmanager
def _watchers() -> Iterator[StartWatcher]:
    running: list[hangwatch.SharedMemoryTimerServer] = []
    with tempfile.TemporaryDirectory(prefix="hw-test-") as folder:

        def start(**options: Any) -> RunningWatcher:
            place = Path(folder) / str(len(running))
            place.mkdir(mode=0o700)
            options.setdefault("report_dir", place / "reports")
            server = hangwatch.SharedMemoryTimerServer(place / "sock", **options)
            server.start()
            running.append(server)
            return RunningWatcher(server, Path(options["report_dir"]))

        try:
            yield start
        finally:
            for server in running:
                server.stop()


@pytest.fixture
def start_watcher() -> Iterator[StartWatcher]:
    """Start watchers of one's own; they end with the test."""
    with _watchers() as start:
        yield start


@pytest.fixture(scope="session")
def watcher_with() -> Iterator[StartWatcher]:
    """Return a watcher with certain options, which all tests that ask for the same ones share.

    They don't harm it, and look for reports of their own workers alone.
    """
    shared: dict[str, RunningWatcher] = {}
    with _watchers() as start:

        def with_options(**options: Any) -> RunningWatcher:
            key = repr(sorted(options.items()))
            if key not in shared:
                shared[key] = start(**options)
            return shared[key]

        yield with_options


@pytest.fixture(scope="session")
def watcher(watcher_with: StartWatcher) -> RunningWatcher:
    """Return the watcher with the default options, which many tests share."""
    return watcher_with()


@pytest.fixture(autouse=True)
def no_address(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave no test the address, the client or the slots of another."""
    monkeypatch.delenv("HANGWATCH_ADDRESS", raising=False)
    yield
    transports.Configured.client, transports.Configured.by_environment = None, True
    expiration.forget_keys()
