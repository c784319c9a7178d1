from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from support.watchers import RunningWatcher
from zoo.zoo import ANIMALS, Animal, meet

NEIGHBOUR = """
import time, hangwatch
print("ready", flush=True)
while True:
    with hangwatch.expires(after=20, scope="healthy"):
        time.sleep(0.001)
"""


@pytest.fixture(scope="module")
def neighbour(watcher: RunningWatcher) -> Iterator[subprocess.Popen[str]]:
    process = watcher.worker(NEIGHBOUR)
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("animal", ANIMALS, ids=lambda animal: animal.name)
def test_hang_is_found_explained_and_ended(
    animal: Animal, watcher: RunningWatcher, neighbour: subprocess.Popen[str]
) -> None:
    report = meet(animal, watcher)
    assert 0 <= report["scope"]["late_s"] < 10
    assert report["scope"]["inside_s"] >= 0.4
    assert neighbour.poll() is None, "a healthy neighbour was hurt"
    assert not [one for one in watcher.reports() if one["worker"]["pid"] == neighbour.pid]
    others = {other["pid"]: other for other in report["others"]}
    assert {scope["name"] for scope in others[neighbour.pid]["scopes"]} <= {"healthy"}
