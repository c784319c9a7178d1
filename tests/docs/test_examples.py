"""Every example of the documents is run, and does what stands beside it.

`fences` finds the blocks and says what the markers before them mean.

- A ``python`` block is a script, run in a folder of its own, under a watcher that they share. It
  ends with status 0, says nothing on standard error, and overruns nothing, unless its marker says
  otherwise. A
  ``text`` block that follows at once is what it prints. A name that it does not define is from
  `preamble`. One that says itself who watches it (``serve()``, ``configure``) is run without.
- A script that begins with ``# name.py`` has that name in the commands of its page.
- A ``console`` block has commands, each after ``$``, and what they print, both streams, numbers
  aside; a line of ``...`` stands for any lines. What ``echo`` prints is compared to the digit.
- A block without a kind is a picture, or a command for the reader; nothing of it is run.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Container
from pathlib import Path

import pytest

from docs.fences import (
    PAGES,
    ROOT,
    Fence,
    fences_of,
    is_as_shown,
    undefined_names,
    without_numbers,
)
from hangwatch.evidence.model import Outcome
from hangwatch.watcher.events import Event
from support.nursery import LIMIT, Worker, nursery
from support.raw_worker import answer, hello, memfd
from support.watchers import StartWatcher, wait_until

QUOTED = {"docs/custom-pairs.md": "examples/datagram_pair.py"}
"""Pages whose blocks are quotations of a script that has tests of its own (tests/contract)."""
UNRUN = {
    ("docs/custom-pairs.md", "if kind == socket.SCM_CREDENTIALS:"): "a quotation",
    ("docs/custom-pairs.md", "rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("): (
        "a quotation"
    ),
    ("docs/custom-pairs.md", "flag = flags.pop()"): "a quotation",
    ("docs/custom-pairs.md", "if timer.expiration_time <= deadline and not is_ready("): (
        "a quotation"
    ),
    ("docs/custom-pairs.md", "def size(self) -> int:"): "a quotation",
    ("docs/custom-pairs.md", "pidfd = self._pidfds[worker_id]"): "a quotation",
    ("docs/events.md", "$ hangwatch run --events events.jsonl -- torchrun"): "needs torch",
}
"""The examples that are not run: page and the beginning of their first line, and why."""
OURS = ("docs/timers.md", "docs/events.md", "docs/what-this-does-not-protect.md")
KINDS = {"python", "console", "text", "json", ""}
END = "-- end of a command --"

FENCES = [fence for page in PAGES for fence in fences_of(page)]


def why_not_run(fence: Fence) -> str | None:
    return "a quotation" if fence.page in QUOTED else fence.marker.get("unrun")


def to_run(kind: str) -> list[Fence]:
    return [fence for fence in FENCES if fence.kind == kind and why_not_run(fence) is None]


def test_what_is_not_run_is_known() -> None:
    unrun = {
        (fence.page, fence.text.splitlines()[0]): why
        for fence in FENCES
        if fence.kind in ("python", "console") and (why := why_not_run(fence)) is not None
    }
    assert len(unrun) == len(UNRUN)
    for (page, beginning), why in UNRUN.items():
        assert [
            reason
            for (where, first), reason in unrun.items()
            if where == page and first.startswith(beginning)
        ] == [why], beginning


def test_no_example_hides() -> None:
    for page in PAGES:
        lines = (ROOT / page).read_text().splitlines()
        fences = [line for line in lines if line.lstrip().startswith("```")]
        assert len(fences) == 2 * len(fences_of(page)), page
    assert {fence.kind for fence in FENCES} <= KINDS
    for fence in FENCES:
        if fence.page in OURS and not fence.kind:
            assert not re.search(r"^(\$ |hangwatch )", fence.text, re.MULTILINE), (
                f"{fence}: commands belong into a console block"
            )
    assert len(to_run("python")) > 25
    assert len(to_run("console")) > 5


def script_of(fence: Fence) -> str:
    """Return a script: what it does not import, and what lets its long sleeps last, comes first."""
    names = undefined_names(fence.text)
    ours = f"from docs.preamble import {', '.join(names)}\n" if names else ""
    # Who sleeps for a minute lasts long enough as it is.
    lasts = "outcomes" not in fence.marker or "sleep(60)" in fence.text
    sleeps = "" if lasts else "import docs.sleeps\n"
    return f"{sleeps}{ours}{fence.text}"


def environment(folder: Path, **more: str) -> dict[str, str]:
    here = [str(Path(sys.executable).parent), os.environ["PATH"]]
    inherited = {name: value for name, value in os.environ.items() if name[:6] != "PYTHON"}
    return {
        **inherited,
        "PATH": os.pathsep.join(here),
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT / "tests")]),
        "TORCHELASTIC_TIMER_FILE": str(folder / "fifo"),
        **more,
    }


def put_something_in_torch_s_place(folder: Path) -> None:
    """Let the line of PyTorch's import work: what an example shows is the line below."""
    for package in ("torch", "torch/distributed", "torch/distributed/elastic"):
        (folder / package).mkdir()
        (folder / package / "__init__.py").touch()
    (folder / "torch/distributed/elastic/timer.py").touch()


EVENTS: list[Event] = []
"""All that the shared watchers tell."""


def told(kinds: Container[str], label: str) -> list[Event]:
    """Return what was told of the workers with a label."""
    return [
        event
        for event in list(EVENTS)
        if event["event"] in kinds and event["labels"].get("run_id") == label
    ]


def outcomes_of(label: str, address: str) -> list[str]:
    """Wait for the ends of the incidents of the workers with a label; return them in order."""
    # What was told of workers that came before this connection has been told before it.
    assert answer(address, hello(labels={"run_id": f"after {label}"}), [memfd()]) is None
    wait_until(lambda: told({"joined"}, f"after {label}"), "the last connection")
    came = told({"joined"}, label)
    wait_until(lambda: len(told({"left"}, label)) == len(came), "the end of its workers")
    expired = told({"expired"}, label)
    wait_until(lambda: len(told({*Outcome}, label)) == len(expired), "the end of all incidents")
    return [event["event"] for event in told({*Outcome}, label)]


def outcomes_in(report_dir: Path) -> list[str]:
    paths = sorted(report_dir.glob("[!.]*/report.json"))
    return [json.loads(path.read_text())["outcome"] for path in paths]


def finish(worker: Worker, fence: Fence, label: str) -> tuple[str, str]:
    """Type what is to be typed; return what the script said on both streams."""
    try:
        typed = fence.marker.get("types")
        if typed is not None:
            wait_until(lambda: told({*Outcome}, label), f"a report of {fence}")
        return worker.communicate(None if typed is None else f"{typed}\n")
    finally:
        worker.kill()


@pytest.mark.parametrize("fence", to_run("python"), ids=str)
def test_script(fence: Fence, watcher_with: StartWatcher, tmp_path: Path) -> None:
    script = tmp_path / (fence.file or "example.py")
    script.write_text(script_of(fence))
    if "import torch" in fence.text:
        put_something_in_torch_s_place(tmp_path)
    label = str(fence)
    watcher = None
    addressed = {}
    if not fence.watches_itself:
        gap = fence.marker.get("gap")
        watcher = watcher_with(on_event=EVENTS.append, **({"gap": float(gap)} if gap else {}))
        addressed = {
            "HANGWATCH_ADDRESS": watcher.address,
            "TORCHELASTIC_RUN_ID": label,
            "HANGWATCH_TEST_REPORTS": str(watcher.report_dir),
        }
    worker = nursery().fork(
        f"import warnings; warnings.simplefilter('error')\n{script.read_text()}",
        file=str(script),
        cwd=tmp_path,
        env=environment(tmp_path, **addressed),
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    said, complained = finish(worker, fence, label)
    if watcher is None:
        outcomes = outcomes_in(tmp_path / "hangwatch-reports")
        assert "Traceback" not in complained, complained
    else:
        outcomes = outcomes_of(label, watcher.address)
        assert complained == ""
    if "race" in fence.marker:
        end = worker.returncode, outcomes
        assert end in [(0, []), (0, ["recovered"]), (-signal.SIGKILL, ["reaped"])]
        return
    expected = fence.marker.get("outcomes")
    assert outcomes == ([] if expected is None else expected.split(",")), complained
    assert str(worker.returncode) in fence.marker.get("status", "0").split(","), complained
    if fence.output is not None:
        assert said == fence.output


@pytest.mark.parametrize("fence", to_run("console"), ids=str)
def test_console(fence: Fence, tmp_path: Path) -> None:
    folder = tmp_path
    for other in fences_of(fence.page):
        if other.kind == "python" and other.file is not None:
            (folder / other.file).write_text(script_of(other))
    lines = [f"{command}; status=$?; echo '{END}'; (exit $status)" for command, _ in fence.commands]
    shell = subprocess.Popen(
        ["bash", "-c", "\n".join(lines)],
        cwd=folder,
        env=environment(folder),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed = shell.communicate(timeout=LIMIT)[0]
    except subprocess.TimeoutExpired:
        os.killpg(shell.pid, signal.SIGTERM)  # `hangwatch run` ends its watcher
        raise
    parts = printed.split(f"{END}\n")
    assert len(parts) == len(fence.commands) + 1, printed
    for (command, shown), part in zip(fence.commands, parts, strict=False):
        got = part.splitlines()
        if not command.startswith("echo "):
            got = [without_numbers(line, folder) for line in got]
            shown = [without_numbers(line, folder) for line in shown]
        if "race" in fence.marker and not is_as_shown(got, shown):
            # Either there was no verdict yet, or it says the same of the overrun.
            assert not got or got[0].startswith(shown[0].partition(";")[0]), part
            continue
        assert is_as_shown(got, shown), f"{command}\n{part}"
