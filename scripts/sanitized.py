"""Run tests over the core in C as AddressSanitizer and UBSan see it: `sanitized.py PYTEST-ARGS...`.

A copy of the package, with a core that was built so, is made in `build/sanitized`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


def compiled(source: Path, target: Path) -> bool:
    """Build the core; tell whether that is possible here."""
    include = sysconfig.get_path("include")
    command = ["gcc", "-std=c11", "-O1", "-g", "-shared", "-fPIC", *SANITIZED, f"-I{include}"]
    result = subprocess.run(
        [*command, str(source), "-o", str(target)], capture_output=True, text=True, check=False
    )
    if result.returncode:
        print(result.stderr, file=sys.stderr)
    return result.returncode == 0


def library(name: str) -> str:
    """Return where gcc has one of its libraries; the name alone: nowhere."""
    command = ["gcc", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main(arguments: list[str]) -> int:
    """Build, and run the tests; return their exit status."""
    libraries = [library(name) for name in ("libasan.so", "libubsan.so")] if has_gcc() else []
    if not libraries or not all(map(os.path.isabs, libraries)):
        print("no sanitizers here: gcc with libasan and libubsan is needed; nothing was run")
        return 0
    package = ROOT / "build" / "sanitized" / "hangwatch"
    shutil.rmtree(package, ignore_errors=True)
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "src" / "hangwatch", package, ignore=ignored)
    worker = package / "worker"
    if not compiled(worker / "_core.c", worker / "_core.abi3.so"):
        return 1
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "PYTHONPATH": str(package.parent),
            "LD_PRELOAD": " ".join(libraries),
            # Python's own allocator would hide what is used after it was freed.
            "PYTHONMALLOC": "malloc",
            "ASAN_OPTIONS": f"detect_leaks=0:log_path={folder}/found",
            "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={folder}/found",
        }
        check = "from hangwatch.worker.chosen_core import core; print(core.__file__)"
        shown = subprocess.check_output([sys.executable, "-c", check], env=environment, text=True)
        assert shown.strip() == str(worker / "_core.abi3.so"), shown
        command = [sys.executable, "-m", "pytest", *arguments]
        status = subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode
        found = sorted(Path(folder).iterdir())
        for path in found:
            print(path.read_text(errors="replace"))
    print(f"sanitizers: {len(found)} of the processes had something to say")
    return 1 if found else status


def has_gcc() -> bool:
    """Tell whether there is a compiler."""
    return shutil.which("gcc") is not None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
