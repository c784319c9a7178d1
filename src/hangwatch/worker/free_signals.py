"""Real-time signals that nobody in this process uses."""

from __future__ import annotations

import signal

# The top real-time signals, from the second highest down: the lowest belong to the C
# library, the highest is the one that programs pick first.
_CANDIDATES = range(signal.SIGRTMAX - 1, signal.SIGRTMIN + 2, -1)


def free_signals() -> list[int]:
    """Return the signals that this process neither catches nor ignores, the best first."""
    taken = _caught_or_ignored()
    return [number for number in _CANDIDATES if number not in taken]


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
