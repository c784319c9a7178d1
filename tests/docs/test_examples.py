"""Every example of the documents is run, and does what stands beside it.

`fences` finds the blocks and says what the markers before them mean.

- A ``python`` block is a script, run under a watcher in a folder of its own. It ends with status
  0, says nothing on standard error, and overruns nothing, unless its marker says otherwise. A
  ``text`` block that follows at once is what it prints. A name that it does not define is from
  `preamble`. One that says itself who watches it (``serve()``, ``configure``) is run without.
- A script that begins with ``# name.py`` has that name in the commands of its page.
- A ``console`` block has commands, each after ``$``, and what they print, both streams, numbers
  aside; a line of ``...`` stands for any lines. What ``echo`` prints is compared to the digit.
- A block without a kind is a picture, or a command for the reader; nothing of it is run.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

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
from support.nursery import LIMIT
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
    names = undefined_names(fence.text)
    return f"from docs.preamble import {', '.join(names)}\n{fence.text}" if names else fence.text


def environment(folder: Path, **more: str) -> dict[str, str]:
    here = [str(Path(sys.executable).parent), os.environ["PATH"]]
    inherited = {name: value for name, value in os.environ.items() if name[:6] != "PYTHON"}
    return {
        **inherited,
        "PATH": os.pathsep.join(here),
        "PYTHONPATH": str(ROOT / "tests"),
        "TORCHELASTIC_TIMER_FILE": str(folder / "fifo"),
        **more,
    }


def put_something_in_torch_s_place(folder: Path) -> None:
    """Let the line of PyTorch's import work: what an example shows is the line below."""
    for package in ("torch", "torch/distributed", "torch/distributed/elastic"):
        (folder / package).mkdir()
        (folder / package / "__init__.py").touch()
    (folder / "torch/distributed/elastic/timer.py").touch()


def outcomes_in(report_dir: Path) -> list[str]:
    paths = sorted(report_dir.glob("[!.]*/report.json"))
    return [json.loads(path.read_text())["outcome"] for path in paths]


def finish(worker: subprocess.Popen[str], fence: Fence, report_dir: Path) -> tuple[str, str]:
    """Type what is to be typed; return what the script said on both streams."""
    try:
        typed = fence.marker.get("types")
        if typed is not None:
            wait_until(lambda: outcomes_in(report_dir), f"a report of {fence}")
        return worker.communicate(None if typed is None else f"{typed}\n", timeout=LIMIT)
    finally:
        worker.kill()
        worker.communicate()


@pytest.mark.parametrize("fence", to_run("python"), ids=str)
def test_script(fence: Fence, start_watcher: StartWatcher, tmp_path: Path) -> None:
    for left in reversed(range(int(fence.marker.get("tries", 1)))):
        folder = tmp_path / str(left)
        folder.mkdir()
        with contextlib.suppress(AssertionError) if left else contextlib.nullcontext():
            run_script(fence, start_watcher, folder)
            return


def run_script(fence: Fence, start_watcher: StartWatcher, folder: Path) -> None:
    script = folder / (fence.file or "example.py")
    script.write_text(script_of(fence))
    if "import torch" in fence.text:
        put_something_in_torch_s_place(folder)
    options: dict[str, Any] = {
        "cwd": folder,
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    command = [sys.executable, "-W", "error", str(script)]
    if fence.watches_itself:
        report_dir = folder / "hangwatch-reports"
        worker = subprocess.Popen(command, env=environment(folder), **options)
        said, complained = finish(worker, fence, report_dir)
        assert "Traceback" not in complained, complained
    else:
        watcher = start_watcher(**({"gap": float(gap)} if (gap := fence.marker.get("gap")) else {}))
        report_dir = watcher.report_dir
        addressed = environment(folder, HANGWATCH_ADDRESS=watcher.address)
        worker = subprocess.Popen(command, env=addressed, **options)
        said, complained = finish(worker, fence, report_dir)
        watcher.server.stop()  # returns when every report is complete
        assert complained == ""
    assert worker.returncode == int(fence.marker.get("status", 0)), complained
    expected = fence.marker.get("outcomes")
    assert outcomes_in(report_dir) == ([] if expected is None else expected.split(","))
    if fence.output is not None:
        assert said == fence.output


@pytest.mark.parametrize("fence", to_run("console"), ids=str)
def test_console(fence: Fence, tmp_path: Path) -> None:
    for left in reversed(range(int(fence.marker.get("tries", 1)))):
        folder = tmp_path / str(left)
        folder.mkdir()
        with contextlib.suppress(AssertionError) if left else contextlib.nullcontext():
            run_commands(fence, folder)
            return


def run_commands(fence: Fence, folder: Path) -> None:
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
        assert is_as_shown(got, shown), f"{command}\n{part}"
