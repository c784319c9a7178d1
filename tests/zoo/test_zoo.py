from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.nursery import Worker
from support.watchers import RunningWatcher
from zoo.zoo import ANIMALS, Animal, meet

NEIGHBOUR = """
import time, hangwatch
print("ready", flush=True)
while True:
    with hangwatch.expires(after=600, scope="healthy"):
        time.sleep(0.01)
"""


@pytest.fixture(scope="module")
def neighbour(watcher: RunningWatcher) -> Iterator[Worker]:
    process = watcher.worker(NEIGHBOUR)
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    process.close()


@pytest.mark.parametrize("animal", ANIMALS, ids=lambda animal: animal.name)
def test_hang_is_found_explained_and_ended(
    animal: Animal, watcher: RunningWatcher, neighbour: Worker
) -> None:
    report = meet(animal, watcher)
    assert report["scope"]["late_s"] >= 0
    assert report["scope"]["inside_s"] >= 0.4
    assert neighbour.poll() is None, "a healthy neighbour was hurt"
    assert not [one for one in watcher.reports() if one["worker"]["pid"] == neighbour.pid]
    others = {other["pid"]: other for other in report["others"]}
    assert {scope["name"] for scope in others[neighbour.pid]["scopes"]} <= {"healthy"}
