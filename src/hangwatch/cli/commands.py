"""The commands and their options."""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

import click

import hangwatch
from hangwatch.errors import HangwatchError
from hangwatch.folder import REPORT_DIR
from hangwatch.policy import (
    LAST_SIGNAL,
    OPTIONS,
    OnExpiry,
    Option,
    checked_flag,
    checked_grace,
    checked_on_expiry,
    checked_signal,
)
from hangwatch.watcher.settings import checked_settings
from hangwatch.watcher.users import checked_uid

if TYPE_CHECKING:
    from hangwatch.watcher.settings import Options

_F = TypeVar("_F", bound=Callable[..., Any])


class _Seconds(click.ParamType[float]):
    name = "seconds"

    def __init__(self, at_least: str = "0 or more") -> None:
        self._at_least = at_least

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        try:
            seconds = float(str(value))
        except ValueError:
            seconds = math.nan
        if not 0 <= seconds < math.inf or (seconds == 0 and self._at_least != "0 or more"):
            self.fail(f"{value!r} is not a number of seconds, {self._at_least}", param, ctx)
        return seconds


class _Signal(click.ParamType[int]):
    name = "signal"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        text = str(value).upper()
        names = {known.name: int(known) for known in signal.Signals}
        number = names.get(text) or names.get(f"SIG{text}")
        if number is None:
            number = int(text) if text.isdecimal() else 0
        if not 0 < number <= LAST_SIGNAL:
            self.fail(f"{value!r} is no signal's name or number: SIGTERM, TERM or 15", param, ctx)
        return number


class _User(click.ParamType[int]):
    name = "uid"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        try:
            return checked_uid(value if isinstance(value, int) else str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


_TYPES: dict[object, click.ParamType[Any]] = {
    checked_on_expiry: click.Choice([choice.value for choice in OnExpiry]),
    checked_grace: _Seconds(),
    checked_signal: _Signal(),
}


def _policy_options(but: str = "") -> Callable[[_F], _F]:
    """Give a command an option for each of `policy.OPTIONS`, `but` for one."""

    def add(command: _F) -> _F:
        for name, option in reversed(OPTIONS.items()):
            if name != but:
                command = _policy_option(name, option)(command)
        return command

    return add


def _policy_option(name: str, option: Option) -> Callable[[_F], _F]:
    words = f"--{name.replace('_', '-')}"
    if option.check is checked_flag:
        if option.default:
            words += f"/--no-{name.replace('_', '-')}"
        return click.option(words, name, is_flag=True, default=option.default, help=option.help)
    return click.option(
        words,
        name,
        type=_TYPES[option.check],
        default=option.default,
        show_default=option.default is not None,
        help=option.help,
    )


def _settings_options(command: _F) -> _F:
    options = [
        click.option(
            "--gap",
            type=_Seconds("more than 0"),
            help="Seconds that a connected worker may stay outside of every block.  "
            "[default: for ever]",
        ),
        click.option(
            "--allow-uid",
            "allow_uids",
            type=_User(),
            multiple=True,
            help="Watch this user's processes, too, a number or a name; only root can. "
            "May be given more than once.",
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
@click.option("--events", metavar="FILE", help="Append what happens here, as lines of JSON.")
@_policy_options(but="force")
@_settings_options
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(command: tuple[str, ...], events: str | None, **options: Unpack[Options]) -> None:
    """Run COMMAND with a watcher beside it.

    With --on-expiry report nothing is ever killed, whatever a block asks for.

    Exits with the command's own status: 128+n if signal n ended it, 126 if it can't be
    executed, 127 if it isn't found, 125 if hangwatch itself failed before it was started.
    """
    from hangwatch.cli.run import run_watched

    options["force"] = options["on_expiry"] == OnExpiry.REPORT
    try:
        settings = checked_settings(**options)
    except HangwatchError as error:
        click.echo(f"hangwatch: {error}; the command was not started", err=True)
        sys.exit(125)
    sys.exit(run_watched(list(command), settings, events))


@main.command()
@click.option("--address", metavar="PATH", help="Listen at this path.")
@click.option("--report-dir", metavar="DIR", help="Keep the newest 100 reports here.")
@_policy_options()
@_settings_options
def serve(address: str | None, **options: Unpack[Options]) -> None:
    """Watch the workers that connect, until told to stop.

    Listens on the socket that systemd passed, at --address, or in the user's own folder
    under $XDG_RUNTIME_DIR or /tmp.
    """
    from hangwatch.keep.serve import serve as watch

    try:
        watch(address, checked_settings(**options))
    except HangwatchError as error:
        raise click.ClickException(str(error)) from None


@main.command()
def demo() -> None:
    """Watch four workers pass numbers round a ring until one hangs in C."""
    from hangwatch.cli.demo import run_demo

    sys.exit(run_demo())
