"""`make zoo N=20`: every program of the zoo N times, and how late its verdicts were."""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

import hangwatch
from support.watchers import RunningWatcher
from zoo.zoo import ANIMALS, meet


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


def _ms(times: list[float]) -> tuple[str, str]:
    return f"{statistics.median(times) * 1000:.2f} ms", f"{max(times) * 1000:.2f} ms"


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
