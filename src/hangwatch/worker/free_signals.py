"""Signals that nobody in this process uses."""

from __future__ import annotations

import signal

# The top real-time signals, from the second highest down: the lowest belong to the C
# library, the highest is the one that programs pick first.
_REAL_TIME = range(signal.SIGRTMAX - 1, signal.SIGRTMIN + 2, -1)
_HARMLESS = signal.SIGURG
_CANDIDATES = (_HARMLESS, *_REAL_TIME)


def free_signals() -> list[int]:
    """Return real-time signals that this process neither catches nor ignores, the best first."""
    taken = _caught_or_ignored()
    return [number for number in _REAL_TIME if number not in taken]


def harmless_signal() -> int | None:
    """Return a signal that is ignored where nobody catches it, if this process doesn't use it.

    What is sent to a program that another one replaces by exec at this very moment then does
    no harm. Only SIGURG (socket(7)) is seldom enough sent by others. Source: signal(7).
    """
    return None if _HARMLESS in _caught_or_ignored() else int(_HARMLESS)


def _caught_or_ignored() -> set[int]:
    # The kernel also knows the handlers that C libraries installed; proc(5), SigCgt, SigIgn.
    taken = set()
    try:
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith(("SigCgt:", "SigIgn:")):
                    mask = int(line.split()[1], 16)
                    taken |= {number for number in _CANDIDATES if mask >> (number - 1) & 1}
    except OSError:
        taken = {number for number in _CANDIDATES if signal.getsignal(number) != signal.SIG_DFL}
    return taken
