"""`make zoo N=20`: every program of the zoo N times, and how late its verdicts were.

Then those that hang themselves once more as workers of the drop-in pairs, whose servers have
their default ``max_interval``.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

import hangwatch
from support.pairs import Pair, running
from support.watchers import RunningWatcher
from zoo.zoo import ANIMALS, KILLED, meet, meet_in_pair


def main(rounds: int) -> None:
    """Run the zoo and print the lateness of each program's verdicts."""
    console = Console()
    late: dict[str, list[float]] = {animal.name: [] for animal in ANIMALS}
    death: dict[str, list[float]] = {animal.name: [] for animal in ANIMALS}
    with tempfile.TemporaryDirectory(prefix="hw-zoo-") as folder:
        for _ in track(range(rounds), "zoo", console=Console(stderr=True)):
            for animal in ANIMALS:
                reports = Path(folder) / animal.name
                server = hangwatch.SharedMemoryTimerServer(report_dir=reports)
                # One after the other, on a quiet watcher: it is lateness that we measure.
                server.start()
                try:
                    report = meet(animal, RunningWatcher(server, reports))
                finally:
                    server.stop()
                late[animal.name].append(report["scope"]["late_s"])
                death[animal.name].append(report["actions"][-1]["at_s"])
    pairs = {name: _in_pair(name, rounds) for name in ("local", "file")}
    table = Table("program", "late, median", "late, worst", "to death, median")
    for name, times in late.items():
        table.add_row(name, *_ms(times), f"{statistics.median(death[name]) * 1000:.0f} ms")
    console.print(table)
    times = [one for each in late.values() for one in each]
    deaths = [one for each in death.values() for one in each]
    console.print(
        f"{len(times)} hangs, all reaped: late {_ms(times)[0]} in the median, "
        f"{_ms(times)[1]} at worst; dead, with stacks, "
        f"{statistics.median(deaths) * 1000:.0f} ms after the verdict in the median"
    )
    table = Table("pair", "max_interval", "reaped", "late, median", "late, worst")
    table.add_row("shared memory", "-", str(len(times)), *_ms(times))
    for name, (interval, times) in pairs.items():
        table.add_row(name, f"{interval:g} s", str(len(times)), *_ms(times))
    console.print(table)


def _in_pair(name: str, rounds: int) -> tuple[float, list[float]]:
    """Return a pair's default interval, and how late its verdicts were."""
    late = []
    interval = 0.0
    animals = [animal for animal in ANIMALS if animal.status == KILLED]
    for animal in track(animals * rounds, name, console=Console(stderr=True)):
        with tempfile.TemporaryDirectory(prefix="hw-zoo-") as folder:
            with running(Pair(name, Path(folder))) as pair:
                interval = pair.server._max_interval
                report = meet_in_pair(animal, pair, Path(folder) / "reports")
            late.append(report["scope"]["late_s"])
    return interval, late


def _ms(times: list[float]) -> tuple[str, str]:
    return f"{statistics.median(times) * 1000:.2f} ms", f"{max(times) * 1000:.2f} ms"


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
