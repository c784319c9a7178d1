from __future__ import annotations

import pytest

from conformance.contract import CASES
from conformance.row import OURS, TORCH
from conformance.table import PAGE, cases_in, table_of, with_table
from conformance.theatre import Result


def results(version: str = "2.13.0") -> list[Result]:
    return [
        Result(row.id, pair, who, version, f"figure of {row.id}")
        for row, pair in CASES
        for who in (OURS, TORCH)
    ]


def test_the_page_s_table_has_every_row_of_the_suite_once() -> None:
    assert cases_in(PAGE.read_text()) == [(row.id, pair) for row, pair in CASES]


def test_a_new_table_replaces_the_old_one_and_nothing_else() -> None:
    page = PAGE.read_text()
    new = with_table(page, table_of(results()))
    assert cases_in(new) == cases_in(page)
    assert "figure of forged" in new
    assert with_table(new, "no table").replace("no table", table_of(results())) == new


def test_no_table_is_made_of_half_the_results() -> None:
    with pytest.raises(SystemExit, match="no results of silent local"):
        table_of([result for result in results() if result.row_id != "silent"])
    with pytest.raises(SystemExit, match="with one"):
        table_of(results()[:2] + results("2.14.0")[2:])
