"""A hang with every signal masked."""

import signal
import time

import hangwatch


def stuck_here() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    time.sleep(1000)


with hangwatch.expires(after=0.4, scope="masked"):
    stuck_here()
