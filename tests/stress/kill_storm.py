"""`make stress-kills KILLS=10000`: workers of the Local pair are killed while others arm.

Victims enter and leave blocks as fast as they can, and each is killed at a random time: while
it connects, while it arms, while it hangs. Beside them are survivors. None may be killed, none
may stand still, and whoever hangs, a survivor or a worker that has just been started, must be
killed soon after its deadline. In the end nothing may be left.

The same storm runs over PyTorch's pair: `--implementation torch.distributed.elastic.timer`.
It ends as soon as something is wrong.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from hangwatch import linux
from stress.storm_board import Board, Phase, fork, new_board
from stress.storm_house import LEGACY, NATIVE, Plan, keep_house
from stress.storm_nursery import Figures

OURS = "hangwatch"
_GIVES_UP_AFTER = 120.0


@dataclass
class Outcome:
    """What came of one storm.

    Attributes:
        plan: what it was to be.
        board: what its processes showed.
        seconds: how long it took.
        figures: of the survivors.
        problems: whatever was wrong.
    """

    plan: Plan
    board: Board
    seconds: float
    figures: Figures = field(default_factory=Figures)
    problems: list[str] = field(default_factory=list)

    @property
    def shows_something(self) -> bool:
        """Tell whether there was a storm, before which whoever hung was killed."""
        return self.board.kills > 0 and len(self.figures.late) > 1


def play(implementation: str, plan: Plan, screen: Console) -> Outcome:
    """Have a storm, in a process of its own, and show how far it is."""
    module, board = importlib.import_module(implementation), new_board()
    began = time.monotonic()
    house = fork(lambda: keep_house(module, plan, board))
    last, moved_at = 0, began
    problems: list[str] = []
    with Progress(console=screen) as progress:
        task = progress.add_task(f"{plan.road} road", total=plan.kills)
        while True:
            dead, status = os.waitpid(house, os.WNOHANG)
            if dead:
                break
            if board.kills != last:
                last, moved_at = board.kills, time.monotonic()
                progress.update(task, completed=last)
            if time.monotonic() - moved_at > _GIVES_UP_AFTER:
                problems.append(f"nothing has moved for {_GIVES_UP_AFTER:g} s")
                os.kill(house, signal.SIGKILL)  # and with it all that it has started
                _, status = os.waitpid(house, 0)
                break
            time.sleep(0.05)
    if status != 0 and not problems:
        problems.append(f"the server's process ended with {os.waitstatus_to_exitcode(status)}")
    outcome = Outcome(plan, board, time.monotonic() - began, problems=problems)
    outcome.problems += _lines(plan.folder / "problems")
    outcome.problems += [
        f"in the log: {line}"
        for line in _lines(plan.folder / "log")
        if "Error:" in line or "failed" in line
    ]
    if (plan.folder / "figures").exists():
        outcome.figures = Figures(**json.loads((plan.folder / "figures").read_text()))
    return outcome


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines() if path.exists() else []


def table_of(outcomes: list[Outcome], implementation: str) -> Table:
    """Put the figures side by side."""
    table = Table(title=f"{implementation}: a kill storm")
    table.add_column("")
    for outcome in outcomes:
        table.add_column(f"{outcome.plan.road} road", justify="right")
    columns = [_column(outcome) for outcome in outcomes]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    return table


def _column(outcome: Outcome) -> dict[str, str]:
    board, figures = outcome.board, outcome.figures
    late = sorted(figures.late)
    died = [sum(forker.died[phase] for forker in board.forkers) for phase in Phase]
    whole = max(1, board.kills)
    return {
        "victims killed": f"{board.kills:,}",
        **{
            f"  while one {name}": f"{100 * died[phase] / whole:.0f} %"
            for phase, name in (
                (Phase.STARTS, "starts"),
                (Phase.FIRST, "connects"),
                (Phase.ENTERS, "enters a block"),
                (Phase.INSIDE, "is inside of one"),
                (Phase.LEAVES, "leaves one"),
            )
        },
        "victims that the server ended": f"{sum(one.ended for one in board.forkers):,}",
        "blocks of the survivors": f"{sum(one.blocks for one in board.survivors):,}",
        "a survivor's longest pause": f"{figures.longest:.2f} s",
        "survivors blocked": str(figures.blocked),
        "survivors killed": str(figures.killed),
        "workers that hung, and were killed": f"{len(figures.late):,}",
        "  after their deadline, median": f"{late[len(late) // 2]:.3f} s" if late else "-",
        "  at worst": f"{late[-1]:.3f} s" if late else "-",
        "workers that hung, unprotected": str(figures.unprotected),
        "seconds": f"{outcome.seconds:.0f}",
        "problems": str(len(outcome.problems)),
    }


@click.command()
@click.argument("kills", type=click.IntRange(min=1), default=10000)
@click.option("--implementation", default=OURS, help="The module whose Local pair is meant.")
@click.option("--road", type=click.Choice(["both", NATIVE, LEGACY]), default="both")
@click.option("--seed", default=0, help="Of a storm that is to be had again; 0: another one.")
@click.option("--show", is_flag=True, help="Only show what happens: fail if nothing did.")
def main(kills: int, implementation: str, road: str, seed: int, show: bool) -> None:
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
        with tempfile.TemporaryDirectory(prefix="hw-storm-") as folder:
            os.chmod(folder, 0o700)
            plan = Plan(name, share, max(10, share // 100), seed, Path(folder))
            outcomes.append(play(implementation, plan, screen))
    console.print(table_of(outcomes, implementation))
    for outcome in outcomes:
        for problem in outcome.problems[:20]:
            console.print(f"{outcome.plan.road} road: {problem}", markup=False)
    well = all(outcome.shows_something if show else not outcome.problems for outcome in outcomes)
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
