"""All rows, in the contract's order."""

from __future__ import annotations

from conformance import killing, lateness, scopes, service, transport
from conformance.row import Outcome, Row
from conformance.stage import SOON, Stage

_ORDER = (
    *("scope-name", "scope-cost", "threads", "recursion", "gil-arm", "queue-lock", "false-kill"),
    *("server-gil", "late", "wall-clock", "pid-reuse", "forged", "agent-suicide", "masked-error"),
    *("slow-server", "hold-open", "garbage", "retry", "lifecycle", "log-storm", "scan", "silent"),
)


def _plain_hang(stage: Stage) -> Outcome:
    stage.play(stage.hang_after(1), max_interval=SOON)
    return stage.must_be_killed()


CONTROL = Row("plain-hang", "A hang is ended.", _plain_hang)
"""What every implementation does, or else nothing that the rows show means anything."""

ROWS = sorted(
    [*scopes.ROWS, *lateness.ROWS, *transport.ROWS, *killing.ROWS, *service.ROWS],
    key=lambda row: _ORDER.index(row.id),
)
assert tuple(row.id for row in ROWS) == _ORDER


def row_of(row_id: str) -> Row:
    """Return the row of that name."""
    (found,) = (row for row in [*ROWS, CONTROL] if row.id == row_id)
    return found
