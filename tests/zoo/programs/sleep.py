"""A plain sleep."""

import time

import hangwatch


def stuck_here() -> None:
    time.sleep(1000)


with hangwatch.expires(after=0.4, scope="sleep"):
    stuck_here()
