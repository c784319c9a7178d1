"""That the clocks of a soak or a storm notice a CPU that stands still."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from support.clocks import Clocks, stalls_in
from support.watchers import wait_until


def test_a_cpu_that_stood_still_is_told(tmp_path: Path) -> None:
    clocks = Clocks(tmp_path)
    try:
        wait_until(lambda: len(list(tmp_path.iterdir())) == len(clocks.pids), "each has its log")
        before = clocks.stood_still()
        os.kill(clocks.pids[0], signal.SIGSTOP)  # our child, not waited for
        time.sleep(0.5)
        os.kill(clocks.pids[0], signal.SIGCONT)
        wait_until(lambda: clocks.stood_still() >= before + 0.4, "what was missed is noticed")
    finally:
        clocks.close()
    assert max(stall.costs for stall in stalls_in(tmp_path)) >= 0.4
