"""Fail if a test was skipped for a reason that is not on the list."""

import re
import sys
from pathlib import Path

# As pytest's -ra tells of them: how many, where, why.
_SKIPPED = re.compile(r"^SKIPPED \[(\d+)\] (\S+?\.py(?::\d+)?): (.*)$", re.MULTILINE)


def main(log: str, allowed: str) -> int:
    """Compare the skips that a log tells of, of any number of runs, with the allowed reasons."""
    lines = [line.strip() for line in Path(allowed).read_text().splitlines()]
    reasons = [line for line in lines if line and not line.startswith("#")]
    skipped = _SKIPPED.findall(Path(log).read_text(errors="replace"))
    bad = [(where, why) for _, where, why in skipped if why not in reasons]
    for where, why in bad:
        print(f"skipped without leave: {where}: {why}")
    print(f"{sum(int(count) for count, *_ in skipped)} skipped, {len(bad)} reasons without leave")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
