"""`hangwatch run`: the command, and nothing else different."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from hangwatch.cli import main
from support.namespaces import OWN_FOLDER, prefix
from support.nursery import LIMIT, nursery
from support.watchers import wait_until

RUN = [sys.executable, "-m", "hangwatch", "run"]


def run(*command: str, **options: object) -> subprocess.CompletedProcess[str]:
    options.setdefault("timeout", LIMIT)
    return subprocess.run([*RUN, *command], capture_output=True, text=True, **options)  # type: ignore[call-overload,no-any-return]


long = pytest.mark.long


@pytest.mark.parametrize(
    ("command", "status"),
    [
        pytest.param(["true"], 0, marks=long),
        (["sh", "-c", "exit 7"], 7),
        pytest.param(["sh", "-c", "kill -TERM $$"], 128 + 15, marks=long),
        (["sh", "-c", "kill -KILL $$"], 128 + 9),
        (["/etc/passwd"], 126),
        pytest.param(["/etc"], 126, marks=long),
        (["no-such-command"], 127),
        pytest.param(["/no/such/command"], 127, marks=long),
        ([""], 127),
    ],
    ids=str,
)
def test_the_status_is_the_command_s(tmp_path: Path, command: list[str], status: int) -> None:
    result = run("--", *command, cwd=tmp_path)
    assert result.returncode == status, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == [], "no hang, no report folder"


def test_125_where_hangwatch_itself_fails(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="hw-") as runtime:
        (Path(runtime) / "hangwatch").mkdir()
        (Path(runtime) / "hangwatch").chmod(0o755)
        result = run(
            *("--", "touch", str(tmp_path / "started")),
            env={**os.environ, "XDG_RUNTIME_DIR": runtime},
        )
    assert result.returncode == 125
    assert "the command was not started" in result.stderr
    assert "chmod 700" in result.stderr
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("runtime", ["missing", "x" * 120])
def test_a_runtime_folder_that_can_t_be_used_is_no_obstacle(tmp_path: Path, runtime: str) -> None:
    if runtime != "missing":
        (tmp_path / runtime).mkdir(mode=0o700)
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path / runtime)}
    result = run("--", "sh", "-c", "echo $HANGWATCH_ADDRESS", env=environment)
    assert result.returncode == 0
    assert result.stdout.startswith(f"/tmp/hangwatch-{os.geteuid()}/")


def shell(script: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a shell script in which $RUN is `hangwatch run`."""
    options.setdefault("timeout", LIMIT)
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "RUN": " ".join(RUN)},
        **options,
    )


def test_an_ignored_sigchld_does_no_harm() -> None:
    script = 'import time, hangwatch\\nwith hangwatch.expires(0.2, "stuck"): time.sleep(1000)'
    result = shell(
        f"trap '' CHLD; $RUN --report-dir $(mktemp -d) -- {sys.executable} -c $'{script}'"
    )
    assert result.returncode == 128 + 9, result.stderr
    assert "overran 'stuck'" in result.stderr


@pytest.mark.parametrize(
    "closed", [*(pytest.param(one, marks=long) for one in ("<&-", ">&-", "2>&-")), "<&- >&- 2>&-"]
)
def test_closed_streams_do_no_harm(closed: str) -> None:
    assert shell(f"$RUN -- sh -c 'exit 7' {closed}").returncode == 7
    missing = shell(f"$RUN -- no-such-command {closed}")
    assert (missing.returncode, missing.stdout) == (127, "")


def test_a_command_that_is_stopped_and_continued_is_waited_for() -> None:
    go_on = "until grep -q State:.T /proc/$$/status; do sleep 0.05; done; kill -CONT $$"
    result = shell(f"$RUN -- sh -c '({go_on}) & kill -STOP $$; exit 7'")
    assert result.returncode == 7


def test_a_terminal_that_hangs_up_ends_the_command(tmp_path: Path) -> None:
    pid, master = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as nohup left it, it would be ignored
        script = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(1000)"
        os.execv(sys.executable, [*RUN, "--", sys.executable, "-c", script])
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), "the start")
    os.close(master)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()


@pytest.mark.parametrize(
    "usage", [["--grace", "-1", "true"], ["--on-expiry", "explode", "true"], ["--nonsense"], []]
)
def test_125_for_wrong_usage(usage: list[str]) -> None:
    result = CliRunner().invoke(main, ["run", *usage], prog_name="hangwatch")
    assert result.exit_code == 125
    assert "Usage: " in result.output
    assert "Traceback" not in result.output


def test_a_hang_is_reported_and_the_status_tells(tmp_path: Path) -> None:
    script = (
        "import time, hangwatch\nprint('out', flush=True)\n"
        "with hangwatch.expires(0.2, 'stuck'): time.sleep(1000)"
    )
    result = run("--", sys.executable, "-c", script, cwd=tmp_path)
    assert result.returncode == 128 + 9
    assert result.stdout == "out\n"
    assert "overran 'stuck'" in result.stderr
    (path,) = (tmp_path / "hangwatch-reports").iterdir()
    report = json.loads((path / "report.json").read_text())
    assert (report["outcome"], report["scope"]["name"]) == ("reaped", "stuck")
    assert (path / "report.txt").read_text().startswith("worker ")


KEEPER_KILLER = """
import os, signal, sys, time, hangwatch
launcher = os.getppid()
for pid in open(f"/proc/{launcher}/task/{launcher}/children").read().split():
    if open(f"/proc/{pid}/comm").read() == "hw-keeper\\n":
        keeper = int(pid)
with hangwatch.expires(600, "outer"):
    os.kill(keeper, signal.SIGKILL)
    child = os.fork()
    if child == 0:
        with hangwatch.expires(0.2, "in"):
            time.sleep(1000)
    _, status = os.waitpid(child, 0)
    sys.exit(os.waitstatus_to_exitcode(status) + 20)
"""


def test_the_keeper_s_death_is_said_and_the_watcher_goes_on(tmp_path: Path) -> None:
    result = run("--", sys.executable, "-c", KEEPER_KILLER, cwd=tmp_path)
    assert result.returncode == 20 - 9, result.stderr
    assert "the keeper died; the watcher goes on" in result.stderr
    assert "overran 'in'" in result.stderr


def test_in_a_container_it_may_be_the_first_process(tmp_path: Path) -> None:
    command = prefix()
    if command is None:
        pytest.skip("no pid namespaces: neither root nor user namespaces")
    run_it = f"{OWN_FOLDER}\nimport sys; os.execv(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen(
        [
            *(*command, sys.executable, "-c", run_it, *RUN, "--", "sh", "-c"),
            "(sleep 0.1 &) ; echo $PPID; exec sleep 1000",
        ],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "1\n"
    (first,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(first), signal.SIGTERM)
    assert process.wait(LIMIT) == 128 + signal.SIGTERM
    process.stdout.close()


def test_report_only(tmp_path: Path) -> None:
    script = (
        "import glob, time, hangwatch\nwith hangwatch.expires(0.2, 'slow'):\n"
        "    while not glob.glob('r/[!.]*/report.json'): time.sleep(0.01)"
    )
    result = run(
        *("--on-expiry", "report", "--report-dir", "r", "--", sys.executable, "-c", script),
        cwd=tmp_path,
    )
    assert result.returncode == 0
    (path,) = (tmp_path / "r").iterdir()
    assert json.loads((path / "report.json").read_text())["outcome"] == "reported"


def test_streams_environment_and_options_pass_through_and_nothing_of_ours_is_left() -> None:
    script = (
        "cat -; test -S $HANGWATCH_ADDRESS && ls -ld $HANGWATCH_ADDRESS; echo $0 $1; echo $PPID"
    )
    with tempfile.TemporaryDirectory(prefix="hw-") as runtime:
        result = run(
            *("sh", "-c", script, "--grace", "--help"),
            input="through\n",
            env={**os.environ, "XDG_RUNTIME_DIR": runtime},
        )
        assert result.returncode == 0
        assert list((Path(runtime) / "hangwatch").iterdir()) == []
    through, address, options, launcher = result.stdout.splitlines()
    assert (through, options) == ("through", "--grace --help")
    assert address.startswith("srw-------")
    assert not Path(f"/proc/{launcher}").exists()


def test_signals_to_run_alone_reach_the_command_once() -> None:
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    script = (
        # A print here could meet one that is under way.
        "import os, signal, sys\n"
        f"for number in {[int(number) for number in numbers]}:\n"
        "    signal.signal(number, lambda number, _: os.write(1, b'got %d\\n' % number))\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()"
    )
    with subprocess.Popen(
        [*RUN, "--", sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for number in numbers:
            process.send_signal(number)
            assert process.stdout.readline() == f"got {int(number)}\n"
        out, _ = process.communicate("end\n", timeout=LIMIT)
    assert out == "", "none came twice"
    assert process.returncode == 0


def test_what_the_command_left_behind_is_ended(tmp_path: Path) -> None:
    """A daemon, forked twice, out of its session; and one that ignores SIGTERM."""
    script = """
import os, signal, subprocess, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        open("daemon", "w").write(str(os.getpid()))
        os.close(1)
        time.sleep(1000)
    os._exit(0)
while not os.path.exists("daemon") or not open("daemon").read(): time.sleep(0.01)
"""
    result = run("--", sys.executable, "-c", script, cwd=tmp_path)
    assert result.returncode == 0
    daemon = int((tmp_path / "daemon").read_text())
    assert not Path(f"/proc/{daemon}").exists(), "neither orphan nor zombie"


class Terminal:
    """A shell with job control on a terminal of its own."""

    def __init__(self, cwd: Path) -> None:
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            os.chdir(cwd)
            os.environ["PS1"] = "$ "
            os.execvp("bash", ["bash", "--norc", "--noprofile", "-i"])
        os.set_blocking(self.master, False)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def see(self, text: str, count: int = 1) -> None:
        wait_until(lambda: self._read().count(text) >= count, f"{text!r} in {self.seen!r}")

    def _read(self) -> str:
        with contextlib.suppress(OSError):
            self.seen += os.read(self.master, 65536).decode(errors="replace")
        return self.seen

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.master)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    terminal = Terminal(tmp_path)
    yield terminal
    terminal.close()


COUNTER = """
import os, signal, sys
hits = 0
def hit(*_):
    global hits
    hits += 1
    os.write(1, b"h" + b"it")
signal.signal(signal.SIGINT, hit)
print("re" + "ady", flush=True)
line = sys.stdin.readline()
print(f"hits={hits} line={line.strip()}", flush=True)
"""


def test_ctrl_c_reaches_the_command_once_and_stdin_works(
    terminal: Terminal, tmp_path: Path
) -> None:
    (tmp_path / "counter.py").write_text(COUNTER)
    terminal.type(f"{' '.join(RUN)} -- {sys.executable} counter.py; echo status=$?\n")
    terminal.see("ready")
    terminal.type("\x03")
    terminal.see("hit")
    terminal.type("typed\n")
    terminal.see("hits=1 line=typed")
    terminal.see("status=0")


JOB = """
import os, sys, hangwatch
with hangwatch.expires(600, "job"):
    print("re" + "ady", os.getppid(), os.environ["HANGWATCH_ADDRESS"], ".", flush=True)
    print("line=" + sys.stdin.readline(), flush=True)
"""
OVERRUNS = """
import time, hangwatch
with hangwatch.expires(0.2, "overdue"):
    print(time.monotonic(), flush=True)
    time.sleep(1000)
"""


def test_ctrl_z_stops_the_job_pauses_watching_and_fg_goes_on(
    terminal: Terminal, tmp_path: Path
) -> None:
    (tmp_path / "job.py").write_text(JOB)
    terminal.type(f"{' '.join(RUN)} -- {sys.executable} job.py; echo status=$?\n")
    terminal.see(" .")
    found = re.search(r"ready (\d+) (\S+) \.", terminal.seen)
    assert found is not None
    launcher, address = found.groups()
    terminal.type("\x1a")
    terminal.see("Stopped")
    status = Path(f"/proc/{launcher}/status")
    wait_until(lambda: "\nState:\tT" in status.read_text(), "its launcher is stopped, too")
    reports = tmp_path / "hangwatch-reports"
    # Another worker of its watcher is not stopped, and overruns its block.
    with nursery().fork(OVERRUNS, env={**os.environ, "HANGWATCH_ADDRESS": address}) as worker:
        assert worker.stdout is not None
        entered = float(worker.stdout.readline())
        wait_until(lambda: time.monotonic() > entered + 0.5, "that it is overdue")
        went_on = time.monotonic()
        terminal.type("fg\n")
        assert worker.wait() == -signal.SIGKILL
    wait_until(lambda: list(reports.glob("[!.]*/report.json")), "the report")
    (path,) = reports.glob("[!.]*/report.json")
    report = json.loads(path.read_text())
    killed = report["scope"]["inside_s"] + report["actions"][0]["at_s"]
    assert killed > went_on - entered, "nobody is ended while the job is stopped"
    terminal.type("soon\n")
    terminal.see("line=soon")
    terminal.see("status=", 2)
