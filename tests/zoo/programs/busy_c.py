"""A busy loop in C, with the GIL held."""

import hangwatch


def stuck_here() -> None:
    sum(range(10**15))


with hangwatch.expires(after=0.4, scope="busy c"):
    stuck_here()
