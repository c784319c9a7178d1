"""What a launcher tells the keeper that it starts: JSON in a sealed memfd that the keeper inherits.

Nothing of it stands on the command line: no length is too long, no byte has to be escaped, and
what only a launcher can say is no option of a public command.

Layout: {"hangwatch": version, "options": see `Settings.options`, "spared_pid": int,
"lifeline": int, "events": int or null}; the last two are descriptors that are inherited, too.

Source: memfd_create(2), fcntl(2) on file seals.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import dataclass, replace

import hangwatch
from hangwatch.errors import LaunchError
from hangwatch.watcher.settings import Settings, checked_settings

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
_ADVICE = "only hangwatch itself starts a keeper this way: use 'hangwatch serve'"


@dataclass(frozen=True, slots=True)
class Startup:
    """What a keeper needs to begin.

    Attributes:
        settings: the watcher's.
        lifeline: a descriptor whose end of file says that the launcher has gone.
        events: a socket that the launcher hears `Event`s from; None: it hears none.
    """

    settings: Settings
    lifeline: int
    events: int | None = None


def write(startup: Startup) -> int:
    """Write what a keeper needs to begin.

    Returns:
        The descriptor to inherit, close-on-exec; the caller owns it.

    Raises:
        OSError: the kernel has no memory or no descriptor left.
    """
    content = json.dumps(
        {
            "hangwatch": hangwatch.__version__,
            "options": startup.settings.options(),
            "spared_pid": startup.settings.spared_pid,
            "lifeline": startup.lifeline,
            "events": startup.events,
        }
    ).encode("ascii")
    descriptor = os.memfd_create("hangwatch-startup", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read(descriptor: int) -> Startup:
    """Read what `write` wrote in the process that started this one, and close it.

    Raises:
        LaunchError: it is something else, or another version's.
    """
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except (OSError, OverflowError, ValueError):
        seals = 0
    # Anything else might block, or change, or be the caller's own file.
    if seals != _SEALS:
        raise LaunchError(f"descriptor {descriptor} is no sealed memfd; {_ADVICE}")
    with open(descriptor, "rb") as file:
        file.seek(0)  # the launcher's own offset
        content = file.read()
    try:
        fields = json.loads(content)
        version = fields.pop("hangwatch")
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
        raise LaunchError(
            f"descriptor {descriptor} holds nothing that a launcher writes; {_ADVICE}"
        ) from None
    if version != hangwatch.__version__:
        raise LaunchError(
            f"the program that starts this keeper runs hangwatch {version}, installed is "
            f"{hangwatch.__version__}: restart that program"
        )
    try:
        return _startup(**fields)
    except (TypeError, ValueError, OSError) as error:
        raise LaunchError(
            f"what the launcher wrote in descriptor {descriptor} is malformed ({error}); {_ADVICE}"
        ) from None


def _startup(
    options: dict[str, object], spared_pid: int, lifeline: int, events: int | None
) -> Startup:
    settings = checked_settings(**options)  # type: ignore[arg-type]
    startup = Startup(replace(settings, spared_pid=int(spared_pid)), lifeline, events)
    inherited = (lifeline,) if events is None else (lifeline, events)
    # Last: what is malformed may name a descriptor that is the caller's own.
    for descriptor in inherited:
        os.fstat(descriptor)
    for descriptor in inherited:
        os.set_inheritable(descriptor, False)
    return startup
