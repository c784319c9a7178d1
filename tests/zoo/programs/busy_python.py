"""A busy loop in Python."""

import hangwatch


def stuck_here() -> None:
    while True:
        pass


with hangwatch.expires(after=0.4, scope="busy python"):
    stuck_here()
