"""What those who launched a worker said of it: rank, run, restart, where its end is explained.

Only variables on this list are read; a report never holds the environment.
Source: torchrun's, SLURM's and Open MPI's documentation of their environment.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

_VARIABLES = {
    "rank": ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"),
    "local_rank": ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "group_rank": ("GROUP_RANK", "SLURM_NODEID"),
    "world_size": ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"),
    "run_id": ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"),
    "restart_count": ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"),
}


def labels_from(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the labels that `environment` gives; the first variable of a row wins."""
    return {
        label: next(environment[name] for name in names if name in environment)
        for label, names in _VARIABLES.items()
        if any(name in environment for name in names)
    }


def error_file_from(environment: Mapping[str, str]) -> str | None:
    """Return where torchrun looks for the reason of this process's end; None: nowhere."""
    path = environment.get("TORCHELASTIC_ERROR_FILE")
    try:
        return os.path.abspath(path) if path else None
    except OSError:  # relative to a folder that is gone
        return None
