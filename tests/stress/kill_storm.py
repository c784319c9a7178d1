"""`make stress-kills KILLS=10000`: workers of the Local pair are killed while others arm.

Victims enter and leave blocks as fast as they can, and each is killed at a random time: while
it connects, while it arms, while it hangs. Beside them are survivors. None may be killed, none
may stand still, and whoever hangs, a survivor or a worker that has just been started, must be
killed soon after its deadline. In the end nothing may be left.

Every process writes a log, and `support.checker` judges. The same storm runs over PyTorch's
pair: `--implementation torch.distributed.elastic.timer`.
"""

from __future__ import annotations

import importlib
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from hangwatch import linux
from stress.driver import LEGACY, NATIVE, Plan
from stress.house import keep_house
from stress.workers import Phase
from support.checker import Checker, Rules
from support.clocks import stalls_in
from support.history import Death, History, Life, bury, life_of, read_logs
from support.processes import errors_in, fork

OURS = "hangwatch"
_GIVES_UP_AFTER = 120.0
# A disk that others write to can hold up whoever logs, for seconds.
_IN_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
_WHERE = {
    Phase.STARTS: "starts",
    Phase.CONNECTS: "connects",
    Phase.ENTERS: "enters a block",
    Phase.INSIDE: "is inside of one",
    Phase.LEAVES: "leaves one",
}


@dataclass
class Outcome:
    """What came of one storm.

    Attributes:
        plan: what it was to be.
        seconds: how long it took.
        died: how many victims were killed in each phase.
        history: what happened.
        late: how many seconds after their deadlines those who hung were dead.
        problems: whatever was wrong.
    """

    plan: Plan
    seconds: float
    died: Counter[str]
    history: History
    late: list[float]
    problems: list[str]

    @property
    def shows_something(self) -> bool:
        """Tell whether there was a storm, before which whoever hung was killed."""
        return self.died.total() > 0 and len(self.late) > 1

    def column(self) -> dict[str, str]:
        """Return the figures of the table."""
        whole, late = max(1, self.died.total()), sorted(self.late)
        survivors = [life for life in self.history.lives if life.quick]
        pauses = [until - since for since, until in (life.silent for life in survivors)]

        def count(what: str) -> str:
            return str(sum(what in problem for problem in self.problems))

        overruns = [life for life in self.history.lives if _is_overrun(life) and not life.by_us]
        return {
            "victims killed": f"{self.died.total():,}",
            **{
                f"  while one {where}": f"{100 * self.died[phase.name] / whole:.0f} %"
                for phase, where in _WHERE.items()
            },
            "victims that the server ended": f"{len(overruns):,}",
            "blocks of the survivors": f"{sum(life.quick for life in survivors):,}",
            "a survivor's longest pause": f"{max(pauses, default=0):.2f} s",
            "survivors blocked": count("stood still"),
            "workers killed that overran nothing": count("was killed"),
            "workers that hung, and were killed": f"{len(late):,}",
            "  after their deadline, median": f"{late[len(late) // 2]:.3f} s" if late else "-",
            "  at worst": f"{late[-1]:.3f} s" if late else "-",
            "workers that hung, unprotected": count("was ended"),
            "seconds": f"{self.seconds:.0f}",
            "problems": str(len(self.problems)),
        }


def _is_overrun(life: Life) -> bool:
    return any(block.scope == "overrun" for block in life.blocks.values())


def play(implementation: str, plan: Plan, screen: Console) -> Outcome:
    """Have a storm, in a process of its own, and show how far it is; then judge it."""
    module, began = importlib.import_module(implementation), time.monotonic()
    house = fork(lambda: keep_house(module, plan))
    errors, lines, moved_at = [], 0, began
    with Progress(console=screen) as progress:
        task = progress.add_task(f"{plan.road} road", total=plan.kills)
        while not (status := os.waitpid(house, os.WNOHANG))[0]:
            now = plan.log.read_bytes().count(b"\n") if plan.log.exists() else 0
            if now != lines:
                lines, moved_at = now, time.monotonic()
                progress.update(task, completed=min(now, plan.kills))
            if time.monotonic() > moved_at + _GIVES_UP_AFTER + plan.patience:
                errors.append(f"nothing has moved for {_GIVES_UP_AFTER + plan.patience:g} s")
                os.kill(house, signal.SIGKILL)  # and with it all that it has started
                moved_at = time.monotonic()
            time.sleep(0.1)
    code = os.waitstatus_to_exitcode(status[1])
    if code != 0:
        errors.append(f"the server's process ended with {code}")
    return judge(plan, errors, time.monotonic() - began)


def judge(plan: Plan, errors: list[str], seconds: float) -> Outcome:
    """Judge what everybody has logged."""
    house, driver = (
        life_of(path.read_text().splitlines(True)) if path.exists() else None
        for path in (plan.folder / "house.log", plan.log)
    )
    deaths: list[Death] = driver.waited if driver else []
    history = History(read_logs(plan.folder / "logs"), errors=errors)
    history.faults += stalls_in(plan.folder)
    history.faults += driver.faults if driver else []
    history.leaks += house.problems if house else []
    errors += [
        f"process {death.pid} ended with {death.status} before it had a log"
        for death in bury(history.lives, deaths)
        if not death.by_us
    ]
    text = (plan.folder / "stderr").read_text(errors="replace")
    errors += [f"in the log: {line}" for line in text.splitlines() if "failed" in line]
    errors += [f"in the log: {line}" for line in errors_in(text)]
    rules = Rules(within=plan.patience, silent_for=plan.patience, words=False)
    checker = Checker(history, rules)
    problems = checker.problems()
    died = Counter(death.phase for death in deaths if death.by_us and death.phase)
    return Outcome(plan, seconds, died, history, checker.lateness, problems)


def table_of(outcomes: list[Outcome], implementation: str) -> Table:
    """Put the figures side by side."""
    table = Table(title=f"{implementation}: a kill storm")
    table.add_column("")
    for outcome in outcomes:
        table.add_column(f"{outcome.plan.road} road", justify="right")
    columns = [outcome.column() for outcome in outcomes]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    return table


@click.command()
@click.argument("kills", type=click.IntRange(min=1), default=10000)
@click.option("--implementation", default=OURS, help="The module whose Local pair is meant.")
@click.option("--road", type=click.Choice(["both", NATIVE, LEGACY]), default="both")
@click.option("--seed", default=0, help="Of a storm that is to be had again; 0: another one.")
@click.option("--show", is_flag=True, help="Only show what happens: fail if nothing did.")
@click.option("--patience", default=5.0, help="Seconds that survivors may stand still.")
def main(
    kills: int, implementation: str, road: str, seed: int, show: bool, patience: float
) -> None:
    """Have a storm of so many kills; the exit status says whether it was weathered."""
    seed = seed or random.SystemRandom().randrange(1, 10**9)
    console, screen = Console(soft_wrap=True), Console(stderr=True)
    linux.become_subreaper()
    # PyTorch's pair has one road.
    roads = ([NATIVE, LEGACY] if implementation == OURS else [LEGACY]) if road == "both" else [road]
    console.print(f"{implementation}: {kills:,} kills, seed {seed}")
    outcomes = []
    for number, name in enumerate(roads):
        share = kills // len(roads) + (number < kills % len(roads))
        with tempfile.TemporaryDirectory(prefix="hw-storm-", dir=_IN_MEMORY) as folder:
            os.chmod(folder, 0o700)
            plan = Plan(name, share, seed, patience, Path(folder))
            outcomes.append(play(implementation, plan, screen))
    console.print(table_of(outcomes, implementation))
    for outcome in outcomes:
        for problem in outcome.problems[:20]:
            console.print(f"{outcome.plan.road} road: {problem}", markup=False)
    well = all(outcome.shows_something if show else not outcome.problems for outcome in outcomes)
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
