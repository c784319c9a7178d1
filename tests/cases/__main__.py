"""Run the self-judging programs of a folder on each Python that is here: `make cases`.

Each version gets a copy of its interpreter that other users can read (cases start programs as
other users, who can't enter root's home), and an environment with hangwatch and what the cases
import. All of it is removed at the end.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).parents[2]
VERSIONS = ("3.11", "3.12", "3.13")
NEEDED = ("trio", "joblib", "pytest")
# Large, and no case imports them.
LEFT_OUT = ("site-packages", "test", "tests", "__pycache__", "idlelib", "tkinter", "*.a")


@dataclass(frozen=True, slots=True)
class Interpreter:
    """A Python of one version, copied.

    Attributes:
        version: major and minor, "3.12".
        python: the environment's interpreter.
        library: the folder with its shared library.
    """

    version: str
    python: Path
    library: Path


def base_prefix(version: str) -> Path | None:
    """Return where the Python of a version is installed; None: there is none.

    It is looked for in PATH, then among pyenv's.
    """
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    names = [f"python{version}", *sorted(pyenv.glob(f"{version}.*/bin/python{version}"))]
    for name in names:
        try:
            result = subprocess.run(
                [str(name), "-c", "import sys; print(sys.base_prefix)"],
                capture_output=True,
                text=True,
                check=False,
            )
        except OSError:
            continue
        if result.returncode == 0:  # pyenv's own python3.12 may say that there is none
            return Path(result.stdout.strip())
    return None


def prepare(version: str, prefix: Path, folder: Path) -> Interpreter:
    """Copy an interpreter and make an environment of it."""
    copy, environment = folder / f"python{version}", folder / f"venv{version}"
    copy.mkdir()
    for part in ("bin", "lib", "include"):
        shutil.copytree(
            prefix / part, copy / part, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT)
        )
    interpreter = Interpreter(version, environment / "bin" / "python", copy / "lib")
    settings = {**os.environ, "LD_LIBRARY_PATH": str(interpreter.library)}
    install = ("pip", "install", "-qq", "--disable-pip-version-check")
    for command in (
        [copy / "bin" / f"python{version}", "-m", "venv", environment],
        [interpreter.python, "-m", *install, PROJECT, *NEEDED],
    ):
        subprocess.run(list(map(str, command)), env=settings, check=True)
    return interpreter


def run(cases: Path, pattern: str, jobs: int, chosen: list[str]) -> int:
    """Run the cases on each version; the status is 0 if all of them were shown and hold."""
    prefixes = {v: found for v in VERSIONS if (found := base_prefix(v)) is not None}
    missing = [v for v in chosen if v not in prefixes]
    if missing:
        print(f"Python {', '.join(missing)} is not here; its cases are not shown.")
    shown = {}
    with tempfile.TemporaryDirectory(prefix="hangwatch-cases-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        interpreters = []
        for version, prefix in prefixes.items():
            print(f"copying Python {version} and installing into it ...", flush=True)
            interpreters.append(prepare(version, prefix, folder))
        settings = {
            **os.environ,
            "LD_LIBRARY_PATH": ":".join(str(one.library) for one in interpreters),
            **{f"PYTHON{one.version.replace('.', '')}": str(one.python) for one in interpreters},
        }
        for one in interpreters:
            if one.version not in chosen:
                continue
            print(f"\nPython {one.version}", flush=True)
            command = [str(one.python), str(cases / "run-cases"), "-j", str(jobs), pattern]
            with subprocess.Popen(
                command, env=settings, cwd=folder, stdout=subprocess.PIPE, text=True
            ) as running:
                assert running.stdout is not None
                line = ""
                for line in running.stdout:
                    print(line, end="", flush=True)
            shown[one.version] = line.strip()
    print()
    for version, line in shown.items():
        print(f"cases on {version}: {line}")
    return int(bool(missing) or not all(map(all_hold, shown.values())))


def all_hold(last_line: str) -> bool:
    """Tell from the last line of a run whether each case was shown and holds."""
    return last_line.endswith(" ok, 0 FAIL, 0 skipped")


def main() -> int:
    """Read the command line and run the cases."""
    parser = argparse.ArgumentParser(prog="make cases", description=__doc__)
    parser.add_argument("folder", type=Path, help="the folder with the cases and run-cases")
    parser.add_argument("pattern", nargs="?", default="*", help="of the cases' names")
    parser.add_argument("-j", dest="jobs", type=int, default=1, help="so many at once")
    parser.add_argument("--python", nargs="+", choices=VERSIONS, default=list(VERSIONS))
    options = parser.parse_args()
    if not (options.folder / "run-cases").is_file():
        print(
            f"There are no cases in {options.folder}. They are a folder of their own, beside the "
            "project's: name it with 'make cases CASES=FOLDER'.",
            file=sys.stderr,
        )
        return 2
    return run(options.folder.resolve(), options.pattern, options.jobs, options.python)


if __name__ == "__main__":
    sys.exit(main())
