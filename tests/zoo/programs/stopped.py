"""A process that somebody stopped."""

import os
import signal

import hangwatch


def stuck_here() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


with hangwatch.expires(after=0.4, scope="stopped"):
    stuck_here()
