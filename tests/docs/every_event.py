"""One event of each kind, as lines of JSON: a program with workers that end in every way.

``unkillable`` is not among them: a process that does not die of SIGKILL can't be had everywhere.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import psutil

import hangwatch
from hangwatch.watcher.events import Event
from support.watchers import wait_until

BEGINNING = "import hangwatch, os, time\nblock = hangwatch.expires(after=0.3, scope='read batch'"
WORKERS = {
    "reaped": ")\nwith block: time.sleep(60)",
    "reported": ", on_expiry='report')\nwith block: time.sleep(1)",
    "raised": ", on_expiry='raise')\n"
    "try:\n    with block: time.sleep(60)\nexcept hangwatch.TimerExpired: pass",
    # Those two are races: somewhere between the verdict and the kill.
    "recovered": ")\nwith block: time.sleep(0.315)\ntime.sleep(0.3)",
    "gone": ")\nwith block:\n    time.sleep(0.315)\n    os._exit(1)",
}


def main() -> None:
    """Have every kind of event, and print each as it comes."""
    told: list[str] = []

    def notice(event: Event) -> None:
        told.append(event["event"])
        print(json.dumps(event), flush=True)

    with hangwatch.serve(on_event=notice, report_dir=None) as server:
        for outcome, rest in WORKERS.items():
            # What is a race goes that way sooner or later.
            while outcome not in told:
                work(BEGINNING + rest)
                wait_for_end_of_incident(told)
        stall(psutil.Process(server.pid))
        wait_until(lambda: "stalled" in told, "the event")
        replace(psutil.Process(server.pid))
        wait_until(lambda: "restarted" in told, "the event")


def work(script: str) -> None:
    labelled = {**os.environ, "RANK": "1", "WORLD_SIZE": "4"}
    subprocess.run([sys.executable, "-c", script], env=labelled, check=False)


def wait_for_end_of_incident(told: list[str]) -> None:
    ends = set(WORKERS)
    wait_until(
        lambda: sum(event in ends for event in told) == told.count("expired"), "the incident's end"
    )


def stall(keeper: psutil.Process) -> None:
    """Let neither keeper nor watcher run for a while."""
    [watcher] = keeper.children()
    keeper.suspend()
    watcher.suspend()
    time.sleep(1.5)
    watcher.resume()
    keeper.resume()


def replace(keeper: psutil.Process) -> None:
    """Kill the watcher while a worker is connected."""
    with hangwatch.expires(after=60, scope="read batch"):
        [watcher] = keeper.children()
        watcher.kill()
        watcher.wait()


if __name__ == "__main__":
    main()
