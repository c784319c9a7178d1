"""A hang 60 frames deep."""

import time

import hangwatch


def stuck_here() -> None:
    time.sleep(1000)


def deeper(levels: int) -> None:
    if levels:
        deeper(levels - 1)
    else:
        stuck_here()


with hangwatch.expires(after=0.4, scope="deep"):
    deeper(60)
