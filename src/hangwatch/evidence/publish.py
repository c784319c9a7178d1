"""Publish a report: to the log, and into the report folder. Runs in a helper process."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from datetime import UTC, datetime
from pathlib import Path

from hangwatch.evidence import report as writing
from hangwatch.evidence.model import Report
from hangwatch.failpoints import failpoint

KEPT = 100
_MOST_THREADS_IN_LOG = 16
_NAME = re.compile(r"\d{8}T\d{6}\.\d{3}Z-.*-\d+(\.\d+)?")
_DRAFT = re.compile(rf"\.{_NAME.pattern}\.\d+")
_DRAFT_LIVES = 3600.0  # seconds, where it takes milliseconds
_AT_THE_SAME_TIME = 60.0
_log = logging.getLogger("hangwatch.evidence")


def publish(report: Report, directory: str | None) -> None:
    """Log a report as one WARNING record and keep it in `directory`.

    The record's attribute ``hangwatch`` has its `facts`, for handlers that want fields.

    Args:
        report: the report.
        directory: the report folder, made if need be; None keeps nothing. If it can't
            be written, the log gets the whole report and says why.
    """
    failpoint("evidence.publishing")
    place: Path | None = None
    problem = ""
    if directory is not None:
        try:
            place = _keep(report, Path(directory))
        except OSError as error:
            problem = (
                f"report: can't be written to {directory} ({error.strerror}); all of it is here\n"
            )
    text = writing.to_text(report, _MOST_THREADS_IN_LOG if place is not None else None)
    text += problem if place is None else f"report:  {place}\n"
    facts = writing.facts(report, None if place is None else str(place))
    _log.warning("%s", text, extra={"hangwatch": facts})


def _keep(report: Report, directory: Path) -> Path:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    at = datetime.fromtimestamp(report.case.at, UTC)
    stamp = at.strftime("%Y%m%dT%H%M%S.") + f"{at.microsecond // 1000:03d}Z"
    name = f"{stamp}-{slug(report.case.scope.name)}-{report.case.worker.pid}"
    draft = directory / f".{name}.{os.getpid()}"
    draft.mkdir(mode=0o700)
    try:
        for ending, text in (("json", writing.to_json(report)), ("txt", writing.to_text(report))):
            descriptor = os.open(
                draft / f"report.{ending}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600
            )
            with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        # By the clock of the file system: ours may have been set since another began a draft.
        now = draft.stat().st_mtime
        place = directory / name
        for number in range(1, 100):
            try:
                draft.rename(place)
                break
            except OSError:  # two blocks of one worker in one millisecond
                if not place.exists():
                    raise
                place = directory / f"{name}.{number}"
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    _prune(directory, now)
    return place


def slug(scope: str) -> str:
    """Turn a scope into part of a file name, its end kept."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", scope)[-40:].strip("-.") or "scope"


def _prune(directory: Path, now: float) -> None:
    # Only what has our own kind of name and holds a report is ours to delete.
    reports = []
    for entry in os.scandir(directory):
        if _NAME.fullmatch(entry.name):
            try:
                written = os.stat(f"{entry.path}/report.json").st_mtime
            except OSError:  # none, or removed just now
                continue
            # What was written later than now is older: the clock was set back since. Others
            # write at the same time as we do.
            reports.append((written <= now + _AT_THE_SAME_TIME, written, entry.path))
        elif _DRAFT.fullmatch(entry.name):  # perhaps of a helper that was killed
            with contextlib.suppress(OSError):
                if entry.stat(follow_symlinks=False).st_mtime < now - _DRAFT_LIVES:
                    shutil.rmtree(entry.path, ignore_errors=True)
    for _, _, path in sorted(reports)[:-KEPT]:
        shutil.rmtree(path, ignore_errors=True)
