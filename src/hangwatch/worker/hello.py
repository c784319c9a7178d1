"""What a process says of itself when it connects; of its launcher's words, a few.

Those are rank, run and restart, and where its end is explained. Only variables on this list are
read; a report never holds the environment.
Source: torchrun's, SLURM's and Open MPI's documentation of their environment.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping
from time import monotonic

from hangwatch import wire

_VARIABLES = {
    "rank": ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"),
    "local_rank": ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "group_rank": ("GROUP_RANK", "SLURM_NODEID"),
    "world_size": ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"),
    "run_id": ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"),
    "restart_count": ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"),
}


def hello_of(page_descriptor: int, stacks: wire.StackChannel | None, fenced: bool) -> wire.Hello:
    """Return this process's hello.

    Args:
        page_descriptor: the page's memfd.
        stacks: its stack channel, if it has one.
        fenced: whether the watcher's memory fence reaches it.
    """
    return wire.Hello(
        page_fd=page_descriptor,
        monotonic=monotonic(),
        fenced=fenced,
        labels=labels_from(os.environ),
        command=list(sys.orig_argv),
        python=".".join(map(str, sys.version_info[:3])),
        stacks=stacks,
        error_file=_error_file_from(os.environ),
        pid=os.getpid(),
        main_ident=threading.main_thread().ident or 0,
    )


def labels_from(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the labels that `environment` gives; the first variable of a row wins."""
    return {
        label: next(environment[name] for name in names if name in environment)
        for label, names in _VARIABLES.items()
        if any(name in environment for name in names)
    }


def _error_file_from(environment: Mapping[str, str]) -> str | None:
    """Return where torchrun looks for the reason of this process's end; None: nowhere."""
    path = environment.get("TORCHELASTIC_ERROR_FILE")
    try:
        return os.path.abspath(path) if path else None
    except OSError:  # relative to a folder that is gone
        return None
