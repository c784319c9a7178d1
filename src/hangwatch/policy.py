"""What an overrun leads to: one frozen value, from the caller's arguments to the watcher's ladder.

A block chooses some of it, the server chooses the rest, and `decide` makes the one policy of an
overrun. What a caller gives is checked here, for `expires` and for a server alike.

A new option touches this file and the one that acts on it: it is a field of `Policy`, an entry of
`OPTIONS`, from which the server's arguments, the command line and what a keeper is told are made,
and its type in `PolicyOptions`. If a block may choose it as well, `to_words` and `from_words`
carry it, and `expires` and `watch` have the argument.

Every worker imports this module: dataclasses and typing take too long to import.
"""

from __future__ import annotations

import signal as signals
from collections import namedtuple
from enum import StrEnum
from math import inf, isfinite

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypedDict

    class PolicyOptions(TypedDict, total=False):
        """A server's policy, as a caller gives it; see `Policy`."""

        on_expiry: str
        grace: float | None
        signal: int | None
        force: bool
        tree: bool
        stacks: bool
        kill_debugged: bool


LAST_SIGNAL = 64
"""The kernel's, on every machine but MIPS; signal(7)."""
NO_SIGNAL = -1
"""Instead of a signal's number: the worker is reported, and never signalled."""
USUAL_GRACE = 5.0
"""Seconds between a step other than SIGKILL and the next one, if nobody chose a grace."""
LONGEST_GRACE = 86400.0
"""Seconds that a page may ask for at most: no worker puts off its end for ever."""


class OnExpiry(StrEnum):
    """What happens to a worker whose block overran; the page counts them in this order, from 1."""

    REPORT = "report"
    """Write down why and leave it alone."""
    RAISE = "raise"
    """Write down why, raise `TimerExpired` in the block; reap it if it stays there."""
    REAP = "reap"
    """Write down why, kill it, confirm its death."""


class Policy(
    namedtuple(
        "Policy",
        ("on_expiry", "grace", "signal", "force", "tree", "stacks", "kill_debugged"),
        defaults=(None, None, None, None, None, None, None),
    )
):
    """What an overrun leads to; None in a field: not chosen.

    Attributes:
        on_expiry: what happens to the worker.
        grace: seconds that each step before SIGKILL has; 0.0: none.
        signal: what is sent first, or `NO_SIGNAL`.
        force: whether the server's `on_expiry` holds whatever a block chose.
        tree: whether the worker's descendants are killed with it.
        stacks: whether a worker is asked for its Python stacks.
        kill_debugged: whether a worker under a debugger is treated as any other.
    """

    __slots__ = ()

    on_expiry: OnExpiry | None
    grace: float | None
    signal: int | None
    force: bool | None
    tree: bool | None
    stacks: bool | None
    kill_debugged: bool | None

    @property
    def first_signal(self) -> int:
        """What is sent first."""
        return self.signal or (signals.SIGTERM if self.grace else signals.SIGKILL)

    @property
    def signal_grace(self) -> float:
        """Seconds that a first signal has before SIGKILL."""
        return USUAL_GRACE if self.grace is None else self.grace

    @property
    def raise_grace(self) -> float:
        """Seconds that `TimerExpired` has before the first signal: it always needs some."""
        return self.grace or USUAL_GRACE


NOTHING_CHOSEN = Policy()


def decide(block: Policy, server: Policy, spared: bool = False) -> Policy:
    """Return what an overrun leads to.

    Args:
        block: what the block chose.
        server: what the server chose.
        spared: whether the worker is one that is never signalled.
    """
    pairs = zip(block, server, strict=True)
    policy = Policy(*(chosen if chosen is not None else default for chosen, default in pairs))
    return policy._replace(on_expiry=OnExpiry.REPORT if spared else happens(block, server))


def happens(block: Policy, server: Policy) -> OnExpiry | None:
    """Return what happens to a worker that is not spared; see `decide`.

    A signal handler calls it: it calls nothing itself.
    """
    if block.signal == NO_SIGNAL:
        return OnExpiry.REPORT
    return server.on_expiry if server.force or block.on_expiry is None else block.on_expiry


# -- in a page


_ON_EXPIRY_BITS = 3
_NO_GRACE = -1.0
_ON_EXPIRY = (None, *OnExpiry)


def to_words(policy: Policy) -> tuple[int, int, float]:
    """Return what a block chose as a page has it: flags (the lowest two bits), signal, grace.

    Layout: 0 in each: not chosen. The flags count `OnExpiry` from 1; a grace of none is -1.0.
    """
    grace = 0.0 if policy.grace is None else policy.grace or _NO_GRACE
    return _ON_EXPIRY.index(policy.on_expiry), policy.signal or 0, grace


def from_words(flags: int, signal: int, grace: float) -> Policy:
    """Return what a block chose; whatever the page says, what is none of these is not chosen."""
    is_signal = signal == NO_SIGNAL or 0 < signal <= LAST_SIGNAL
    is_grace = isfinite(grace) and grace != 0.0
    return Policy(
        _ON_EXPIRY[flags & _ON_EXPIRY_BITS],
        min(max(grace, 0.0), LONGEST_GRACE) if is_grace else None,
        signal if is_signal else None,
    )


# -- what a caller gives


class Option:
    """One field of a policy, as a caller gives it.

    Attributes:
        check: returns the value as a `Policy` has it; given the option's name and the value.
        default: what a server does that was told nothing; None: what follows from the others.
        help: what the command line says of it.
    """

    __slots__ = ("check", "default", "help")

    def __init__(
        self,
        check: Callable[[str, object], object],
        default: object,
        help: str,  # noqa: A002
    ) -> None:
        self.check = check
        self.default = default
        self.help = help


def checked_on_expiry(name: str, value: object) -> OnExpiry:
    """Return what happens to a worker whose block overran.

    Raises:
        ValueError: it is none of these: the caller's fault.
    """
    on_expiry = known_on_expiry(value)
    if on_expiry is None:
        raise ValueError(f"{name} must be 'report', 'raise' or 'reap', not {value!r:.40}")
    return on_expiry


def known_on_expiry(value: object) -> OnExpiry | None:
    """Return what a value means if it is one of `OnExpiry`, else None."""
    return next((known for known in OnExpiry if known == value), None)


def checked_grace(name: str, value: object) -> float:
    """Return a grace in seconds.

    Raises:
        ValueError, TypeError: it is none: the caller's fault.
    """
    grace = _seconds(name, value)
    if isinstance(value, bool):
        raise TypeError(f"{name} must be a number of seconds, not bool: for none, give 0")
    if not 0 <= grace < inf:
        raise ValueError(
            f"{name} must be a finite number of seconds, 0 or more, not {value!r:.40}: "
            "for a worker that is never killed, on_expiry='report'"
        )
    return grace


def checked_signal(name: str, value: object) -> int:
    """Return the number of a signal.

    Raises:
        ValueError, TypeError: there is no such signal: the caller's fault.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(
            f"{name} must be a signal's number, such as signal.SIGTERM, not {value!r:.40}"
        )
    if not 0 < value <= LAST_SIGNAL:
        raise ValueError(
            f"{name} must be a signal's number, 1 to {LAST_SIGNAL}, not {value!r:.40}: "
            "for no signal at all, on_expiry='report'"
        )
    return int(value)


def checked_flag(name: str, value: object) -> bool:
    """Return what is True or False.

    Raises:
        TypeError: it is neither: the caller's fault.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r:.40}")
    return value


def checked_limit(name: str, value: object, advice: str) -> float:
    """Return a limit in seconds.

    Args:
        name: what the caller calls it.
        value: what the caller gave.
        advice: what to do if there is no limit.

    Raises:
        ValueError, TypeError: it is none: the caller's fault.
    """
    limit = _seconds(name, value)
    if not 0 < limit < inf:
        raise ValueError(f"{name} must be positive and finite, not {value!r:.40}: {advice}")
    return limit


def _seconds(name: str, value: object) -> float:
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        return float(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            f"{name} must be a number of seconds, not {type(value).__name__}: "
            "for a timedelta, give its total_seconds()"
        ) from None
    except OverflowError:
        return inf


OPTIONS = {
    "on_expiry": Option(
        checked_on_expiry,
        "reap",
        "What happens if a block overruns that does not say: kill the worker, "
        "raise TimerExpired in the block first, or only report it.",
    ),
    "grace": Option(
        checked_grace,
        None,
        "Seconds after each step before SIGKILL; the first signal is SIGTERM then.  "
        f"[default: SIGKILL at once, {USUAL_GRACE:g} after a --signal or TimerExpired]",
    ),
    "signal": Option(
        checked_signal, None, "What is sent first.  [default: SIGTERM if there is a grace]"
    ),
    "force": Option(checked_flag, False, "Let --on-expiry override what blocks say."),
    "tree": Option(checked_flag, True, "Kill the worker's descendants, too. [default]"),
    "stacks": Option(
        checked_flag, True, "Ask an overdue worker for its Python stacks, by a signal. [default]"
    ),
    "kill_debugged": Option(checked_flag, False, "Kill workers even if a debugger is attached."),
}


def checked(policy: Policy) -> Policy:
    """Return a policy made of what a caller gave; None stays None.

    Raises:
        ValueError, TypeError: something is none of what it may be: the caller's fault.
    """
    return Policy(
        **{
            name: None if value is None else option.check(name, value)
            for (name, option), value in zip(OPTIONS.items(), policy, strict=True)
        }
    )


DEFAULT = checked(Policy(**{name: option.default for name, option in OPTIONS.items()}))
"""The policy of a server that was told nothing."""
