"""docs/events.md shows one line of each kind of event; each looks like a real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from docs.every_event import WORKERS
from docs.fences import ROOT, fences_of, without_numbers
from hangwatch.evidence.model import Outcome
from support.nursery import LIMIT

PAGE = "docs/events.md"
KINDS = {"joined", "left", "expired", "stalled", "restarted", *Outcome}
CONSTANT = ("labels", "scope", "thread", "headline")
"""What is the same in each run, numbers aside."""


def shown_on_the_page() -> dict[str, dict[str, Any]]:
    lines = [fence.text for fence in fences_of(PAGE) if fence.kind == "json"]
    events = {event["event"]: event for event in map(json.loads, lines)}
    assert len(events) == len(lines), "one of each kind"
    return events


def shape(event: dict[str, Any]) -> list[tuple[str, str]]:
    return [(key, type(value).__name__) for key, value in event.items()]


def test_each_kind_of_event_is_as_the_page_shows_it(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "docs.every_event"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    real = {event["event"]: event for event in map(json.loads, done.stdout.splitlines())}
    shown = shown_on_the_page()
    assert shown.keys() == KINDS
    assert real.keys() == KINDS - {"unkillable"}
    assert {*WORKERS, "unkillable"} == {*Outcome}
    for kind, event in real.items():
        assert shape(event) == shape(shown[kind]), kind
        if kind != "joined":  # of the program itself, too, which has no labels
            for key in CONSTANT:
                assert told(event, key) == told(shown[kind], key), kind
    assert shape(shown["unkillable"]) == shape(real["reaped"])


def told(event: dict[str, Any], key: str) -> str:
    return without_numbers(str(event.get(key)), Path("/nowhere"))


def test_the_page_s_table_has_every_key_and_no_other() -> None:
    page = (ROOT / PAGE).read_text()
    table = page[page.index("| key | in |") : page.index("## A worker's")]
    names = {
        word.strip("` ")
        for row in table.splitlines()[2:]
        if row.startswith("|")
        for word in row.split("|")[1].split(",")
    }
    keys = {key for event in shown_on_the_page().values() for key in event}
    assert names == keys - {"for_s", "workers"}, "those two stand beside their events"
