"""Names of folders."""

from __future__ import annotations

import os

REPORT_DIR = "hangwatch-reports"
"""Where reports go if nothing else is said."""


def known_folder() -> str:
    """Return this user's folder whose name every process knows, whatever its environment.

    It may not exist yet, and may be somebody else's.
    """
    return f"/tmp/hangwatch-{os.geteuid()}"
