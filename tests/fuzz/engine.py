"""One target, fed for some seconds; run by `fuzz.__main__` in a process of its own.

With atheris, inputs that reach code that no other has reached are built upon. Where there is
no atheris for a machine, inputs are built upon those that are kept.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

MOST_MEMORY = 1 << 30
TOO_LONG = 20
"""Seconds until an input counts as one that never ends."""


def guided(name: str, seconds: float, seed: int, scratch: Path) -> None:
    """Fuzz with atheris, which ends this process."""
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["hangwatch"]):
        from fuzz.bounds import in_time
        from fuzz.mutation import mutate
        from fuzz.targets import TARGETS
    target = TARGETS[name]
    for path in target.seeds():
        shutil.copy(path, scratch)

    def mutator(data: bytes, most: int, chosen: int) -> bytes:
        rng = random.Random(chosen)
        if rng.random() < 0.5:
            return bytes(atheris.Mutate(data, most))
        return mutate(data, rng, target.tokens, most)

    atheris.Setup(
        [
            "fuzz",
            f"-max_total_time={seconds:.0f}",
            f"-seed={seed}",
            f"-max_len={target.most}",
            f"-artifact_prefix={target.corpus}/",
            f"-rss_limit_mb={MOST_MEMORY >> 20}",
            f"-timeout={TOO_LONG}",
            "-print_final_stats=1",
            str(scratch),
        ],
        lambda data: in_time(target.check, data),
        custom_mutator=mutator,
    )
    atheris.Fuzz()


def blind(name: str, seconds: float, seed: int) -> int:
    """Fuzz with changes of what is kept; return 1 if an input fails, which is kept then."""
    from fuzz.bounds import in_time
    from fuzz.mutation import mutate
    from fuzz.targets import TARGETS

    def too_long(*unused: object) -> None:
        raise TimeoutError(f"not done within {TOO_LONG} s")

    signal.signal(signal.SIGALRM, too_long)
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    target = TARGETS[name]
    rng = random.Random(seed)
    seeds = [path.read_bytes() for path in target.seeds()]
    until, count = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        count += 1
        data = mutate(rng.choice(seeds), rng, target.tokens, target.most)
        if count % 1000 == 0:
            print(f"#{count}", flush=True)
        try:
            signal.alarm(TOO_LONG)
            in_time(target.check, data)
            signal.alarm(0)
        except Exception:
            traceback.print_exc()
            path = target.corpus / f"crash-{hashlib.sha1(data).hexdigest()}"
            path.write_bytes(data)
            print(f"Test unit written to {path}", flush=True)
            return 1
    print(f"Done {count} runs in {seconds:.0f} second(s)", flush=True)
    return 0


def main() -> int:
    """Fuzz the target that the command line names."""
    name, seconds, seed, scratch = sys.argv[1:]
    logging.disable()
    if importlib.util.find_spec("atheris") is None:
        return blind(name, float(seconds), int(seed))
    guided(name, float(seconds), int(seed), Path(scratch))
    return 0


if __name__ == "__main__":
    sys.exit(main())
