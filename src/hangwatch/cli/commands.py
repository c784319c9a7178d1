"""The commands and their options."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

import hangwatch
from hangwatch.errors import HangwatchError
from hangwatch.folder import REPORT_DIR
from hangwatch.watch.settings import OnExpiry, Settings

_F = TypeVar("_F", bound=Callable[..., Any])


class _Seconds(click.ParamType[float]):
    name = "seconds"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        try:
            seconds = float(str(value))
        except ValueError:
            seconds = math.nan
        if not 0 <= seconds < math.inf:
            self.fail(f"{value!r} is not a number of seconds, 0 or more", param, ctx)
        return seconds


def _expiry_options(command: _F) -> _F:
    options = [
        click.option(
            "--on-expiry",
            type=click.Choice([choice.value for choice in OnExpiry]),
            default=OnExpiry.REAP.value,
            show_default=True,
            help="Kill a worker whose block overran, or only report it.",
        ),
        click.option(
            "--grace",
            type=_Seconds(),
            default=0.0,
            show_default=True,
            help="Seconds between SIGTERM and SIGKILL; 0 means SIGKILL at once.",
        ),
        click.option(
            "--tree/--no-tree", default=True, help="Kill the worker's descendants, too. [default]"
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.group()
@click.version_option(hangwatch.__version__, prog_name="hangwatch")
def main() -> None:
    """Expiration timers for worker processes.

    A worker says how long a block may take; a watcher in another process ends the worker
    that overruns, and writes down why.
    """


class _Run(click.Command):
    """A command whose own wrong usage must not look like a status of what it runs."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            error.show()
            ctx.exit(125)


@main.command(cls=_Run, context_settings={"allow_interspersed_args": False})
@click.option(
    "--report-dir",
    default=REPORT_DIR,
    show_default=True,
    metavar="DIR",
    help="Keep the newest 100 reports here.",
)
@_expiry_options
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(
    command: tuple[str, ...], report_dir: str, on_expiry: str, grace: float, tree: bool
) -> None:
    """Run COMMAND with a watcher beside it.

    Exits with the command's own status: 128+n if signal n ended it, 126 if it can't be
    executed, 127 if it isn't found, 125 if hangwatch itself failed before it was started.
    """
    from hangwatch.cli.run import run_watched

    sys.exit(run_watched(list(command), report_dir, on_expiry, grace, tree))


@main.command()
@click.option("--address", metavar="PATH", help="Listen at this path.")
@click.option("--report-dir", metavar="DIR", help="Keep the newest 100 reports here.")
@_expiry_options
@click.option("--lifeline", type=int, hidden=True)
@click.option("--events", type=int, hidden=True)
@click.option("--spare", type=int, default=0, hidden=True)
def serve(
    address: str | None,
    report_dir: str | None,
    on_expiry: str,
    grace: float,
    tree: bool,
    lifeline: int | None,
    events: int | None,
    spare: int,
) -> None:
    """Watch the workers that connect, until told to stop.

    Listens on the socket that systemd passed, at --address, or in the user's own folder
    under $XDG_RUNTIME_DIR or /tmp.
    """
    from hangwatch.keep.serve import serve as watch

    settings = Settings(
        on_expiry=OnExpiry(on_expiry),
        grace=grace,
        tree=tree,
        report_dir=None if report_dir is None else os.path.abspath(report_dir),
        allowed_uids=frozenset({os.geteuid()}),
        spared_pid=spare,
    )
    try:
        watch(address, settings, lifeline, events)
    except HangwatchError as error:
        raise click.ClickException(str(error)) from None


@main.command()
def demo() -> None:
    """Watch four workers pass numbers round a ring until one hangs in C."""
    from hangwatch.cli.demo import run_demo

    sys.exit(run_demo())
