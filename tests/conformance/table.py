"""`python -m conformance.table RESULTS PAGE`: write the table of both figures into a page.

The figures are those that the tests left in the folder RESULTS; see `conformance.theatre`.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from conformance.contract import CASES
from conformance.row import OURS, TORCH
from conformance.theatre import Result

BEGIN = "<!-- conformance table: written by make conformance-table -->"
END = "<!-- end of the conformance table -->"
PAGE = Path(__file__).parents[2] / "docs" / "migrating-from-torch.md"


def table_of(results: list[Result]) -> str:
    """Make the table.

    Raises:
        SystemExit: a result is missing, or they are of several versions.
    """
    found = {(result.row_id, result.pair, result.implementation): result for result in results}
    wanted = [(row.id, pair, who) for row, pair in CASES for who in (TORCH, OURS)]
    missing = [" ".join(case) for case in wanted if case not in found]
    if missing:
        raise SystemExit(f"no results of {', '.join(missing)}: run these tests first")
    versions = {found[case].version for case in wanted if case[2] == TORCH}
    if len(versions) != 1:
        raise SystemExit(f"results of PyTorch {' and '.join(versions)}: run all tests with one")
    lines = [
        f"| id | pair | promise | PyTorch {versions.pop()} | hangwatch |",
        "|---|---|---|---|---|",
    ]
    for row, pair in CASES:
        theirs, ours = (found[row.id, pair, who].figure for who in (TORCH, OURS))
        lines.append(f"| {row.id} | {pair} | {row.promise} | {theirs} | {ours} |")
    return "\n".join(lines)


def with_table(page: str, table: str) -> str:
    """Return the page with this table between its two marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"the page has no place for the table: mark it by {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def cases_in(page: str) -> list[tuple[str, str]]:
    """Return the row and pair of each line of the page's table."""
    table = page.partition(BEGIN)[2].partition(END)[0]
    return re.findall(r"^\| ([a-z-]+) \| (local|file) \|", table, re.MULTILINE)


def main(results: str, page: str) -> None:
    """Read the results, and rewrite the page's table."""
    found = [Result(**json.loads(path.read_text())) for path in Path(results).glob("*.json")]
    path = Path(page)
    path.write_text(with_table(path.read_text(), table_of(found)))


if __name__ == "__main__":
    main(*sys.argv[1:])
