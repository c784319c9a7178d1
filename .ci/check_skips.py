"""Fail if a test was skipped for a reason that is not on the list."""

import sys
import xml.etree.ElementTree as ET
from pathlib import Path


def main(results: str, allowed: str) -> int:
    """Compare the skips in a junit file with the allowed reasons."""
    lines = [line.strip() for line in Path(allowed).read_text().splitlines()]
    reasons = [line for line in lines if line and not line.startswith("#")]
    skipped = [
        (f"{case.get('classname')}::{case.get('name')}", skip.get("message", ""))
        for case in ET.parse(results).iter("testcase")
        for skip in case.iter("skipped")
    ]
    bad = [(name, why) for name, why in skipped if why not in reasons]
    for name, why in bad:
        print(f"skipped without leave: {name}: {why}")
    print(f"{len(skipped)} skipped, {len(bad)} of them without leave")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
