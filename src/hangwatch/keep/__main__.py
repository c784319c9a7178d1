"""``python -m hangwatch.keep ADDRESS DESCRIPTOR``: a keeper, as `launch` starts it.

People use `hangwatch serve`.
"""

from __future__ import annotations

import sys

from hangwatch.errors import HangwatchError
from hangwatch.keep import startup
from hangwatch.keep.serve import serve


def main(arguments: list[str]) -> None:
    """Keep a watcher that listens at an address, told the rest by a descriptor."""
    try:
        address, number = arguments
        descriptor = int(number)
    except ValueError:
        sys.exit(
            "usage: python -m hangwatch.keep ADDRESS DESCRIPTOR\n"
            "Hangwatch itself starts keepers this way: to start a watcher, use 'hangwatch serve'"
        )
    try:
        told = startup.read(descriptor)
        serve(address, told.settings, told.lifeline, told.events)
    except HangwatchError as error:
        sys.exit(f"hangwatch: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
