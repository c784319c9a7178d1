"""A regular expression that backtracks for ages."""

import re

import hangwatch


def stuck_here() -> None:
    re.match(r"(a+)+$", "a" * 64 + "b")


with hangwatch.expires(after=0.4, scope="regex"):
    stuck_here()
