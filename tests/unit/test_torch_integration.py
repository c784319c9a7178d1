"""`hangwatch.integrations.torch` against a package of torch's name and shape."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.torch_names import OF_TORCH

TIMER = "torch.distributed.elastic.timer"
NAMES = sorted(OF_TORCH["hangwatch.timer"])


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder to import a stand-in for torch from."""
    package = tmp_path / "torch" / "distributed" / "elastic" / "timer"
    package.mkdir(parents=True)
    for folder in (package.parents[2], package.parents[1], package.parents[0]):
        (folder / "__init__.py").write_text("")
    (package / "__init__.py").write_text("".join(f"{name} = {name!r}\n" for name in NAMES))
    (package.parents[1] / "run.py").write_text(
        f"import sys\nimport {TIMER} as timer\nfrom program import say\n"
        "if __name__ == '__main__': say(timer, sys.argv)\n"
    )
    (tmp_path / "program.py").write_text(
        f"import sys\nimport {TIMER} as timer\n"
        "def say(timer, argv): print(timer.FileTimerServer.__mro__, argv[1:], sys.path[0])\n"
        "if __name__ == '__main__': say(timer, sys.argv)\n"
    )
    return tmp_path


def run(site: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], cwd=site, capture_output=True, text=True, check=False
    )


def python(site: Path, script: str) -> str:
    result = run(site, "-c", script)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_hangwatch_imports_no_torch(site: Path) -> None:
    assert python(site, "import sys, hangwatch; print('torch' in sys.modules)") == "False\n"


def test_without_torch_the_error_says_so(tmp_path: Path) -> None:
    result = run(
        tmp_path,
        "-c",
        "import sys; sys.modules['torch'] = None; import hangwatch.integrations.torch",
    )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        "ImportError: hangwatch.integrations.torch needs PyTorch: install torch"
    )


def test_every_name_is_replaced_twice_does_no_harm_and_all_can_be_put_back(site: Path) -> None:
    script = f"""
import hangwatch, hangwatch.timer, {TIMER} as timer
from hangwatch.integrations.torch import install, uninstall
names = {NAMES!r}
for options in ({{}}, {{}}, {{"report_dir": "elsewhere"}}):
    install(**options)
    for name in names:
        ours, there = getattr(hangwatch.timer, name), getattr(timer, name)
        assert there is ours or issubclass(there, ours) and options, name
assert timer.FileTimerServer.__name__ == "FileTimerServer"
install()
assert timer.FileTimerServer is hangwatch.FileTimerServer
for _ in range(2):
    uninstall()
    assert all(getattr(timer, name) == name for name in names)
install()
assert timer.expires is hangwatch.expires
"""
    python(site, script)


def test_servers_keep_their_reports_where_install_said(site: Path) -> None:
    script = f"""
import inspect, {TIMER} as timer
from hangwatch.integrations.torch import install
install(report_dir=None)
server = timer.FileTimerServer(file_path="fifo", run_id="", max_interval=0.1, daemon=True)
print(server._report_dir)
server.stop()
server = timer.FileTimerServer("fifo", report_dir="mine")
print(server._report_dir)
server.stop()
"""
    assert python(site, script) == "None\nmine\n"


@pytest.mark.parametrize(
    ("options", "program"),
    [
        ([], ["-m", "torch.distributed.run"]),
        (["--report-dir", "r"], ["-m", "program"]),
        (["--report-dir=r"], ["program.py"]),
    ],
)
def test_it_runs_a_program_as_python_would(
    site: Path, program: list[str], options: list[str]
) -> None:
    result = run(
        site,
        *("-m", "hangwatch.integrations.torch", *options, *program),
        *("-m", "x", "--report-dir", "y"),
    )
    assert result.returncode == 0, result.stderr
    assert "hangwatch.timer.file_based_local_timer.FileTimerServer" in result.stdout
    assert "['-m', 'x', '--report-dir', 'y']" in result.stdout
    assert result.stdout.endswith(f" {site}\n")


def test_a_wrong_command_line_is_explained(site: Path) -> None:
    result = run(site, "-m", "hangwatch.integrations.torch", "missing.py")
    assert result.returncode == 2
    assert result.stderr.endswith("error: there is no program missing.py\n")
    wrong = {
        "": "a program or -m MODULE is missing",
        "-m": "-m needs a module",
        "-m torch.no.such": "there is no module torch.no.such",
        "-m ..": "there is no module ..",
        "missing.py": "there is no program missing.py",
        "--what -m x": "there is no option --what",
        "--report-dir": "--report-dir needs a folder",
    }
    script = f"""
import contextlib, io, json
from hangwatch.integrations.torch.__main__ import main
for line in {list(wrong)!r}:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try: main(line.split())
        except SystemExit as end: status = end.code
    print(json.dumps([line, status, said.getvalue()]))
"""
    for line, status, said in map(json.loads, python(site, script).splitlines()):
        assert status == 2
        assert said.startswith("usage: python -m hangwatch.integrations.torch ")
        assert said.endswith(f"error: {wrong.pop(line)}\n")
    assert wrong == {}


def test_help(site: Path) -> None:
    result = run(site, "-m", "hangwatch.integrations.torch", "--help")
    assert result.returncode == 0
    assert "--report-dir DIR" in result.stdout


def test_the_program_s_exit_status_is_ours(site: Path) -> None:
    (site / "ends.py").write_text("raise SystemExit(7)")
    assert run(site, "-m", "hangwatch.integrations.torch", "ends.py").returncode == 7
