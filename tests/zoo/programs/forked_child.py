"""A hang in a forked child, of a parent that is healthy and inside of a block itself."""

import os
import time

import hangwatch


def stuck_here() -> None:
    time.sleep(1000)


with hangwatch.expires(after=600, scope="parent"):
    child = os.fork()
    if child == 0:
        with hangwatch.expires(after=0.4, scope="forked child"):
            stuck_here()
    _, status = os.waitpid(child, 0)
raise SystemExit(os.waitstatus_to_exitcode(status) != -9)
