"""``python -m hangwatch.integrations.torch``: run a program with hangwatch's timers installed."""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from typing import NoReturn

from hangwatch.folder import REPORT_DIR
from hangwatch.integrations import torch

_USAGE = """\
usage: python -m hangwatch.integrations.torch [--report-dir DIR] (-m MODULE | PROGRAM) [ARGS ...]

Runs a Python program or module, torch.distributed.run for example, with hangwatch's
timers in the place of torch.distributed.elastic.timer.

  --report-dir DIR  keep the newest 100 reports of its timer servers here
"""


def main(words: list[str]) -> None:
    """Run what a command line says.

    Args:
        words: the command line after our own module's name.
    """
    report_dir = REPORT_DIR
    words = list(words)
    while words and words[0].startswith("-") and words[0] != "-m":
        option, _, value = words.pop(0).partition("=")
        if option in ("-h", "--help"):
            print(_USAGE, end="")
            return
        if option != "--report-dir":
            _refuse(f"there is no option {option}")
        value = value or (words.pop(0) if words else "")
        if not value:
            _refuse("--report-dir needs a folder")
        report_dir = os.path.abspath(value)
    is_module = words[:1] == ["-m"]
    words = words[is_module:]
    if not words:
        _refuse("-m needs a module" if is_module else "a program or -m MODULE is missing")
    name = words[0]
    if is_module and not _is_module(name):
        _refuse(f"there is no module {name}")
    if not is_module and not os.path.exists(name):
        _refuse(f"there is no program {name}")
    torch.install(report_dir=report_dir)
    sys.argv = words
    if is_module:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        if not sys.flags.safe_path:
            sys.path[0] = os.path.dirname(os.path.realpath(name))
        runpy.run_path(name, run_name="__main__")


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # a parent is missing, or is no package; "." or ".."
        return False


def _refuse(problem: str) -> NoReturn:
    sys.stderr.write(f"{_USAGE}\nerror: {problem}\n")
    raise SystemExit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
