from __future__ import annotations

from pathlib import Path

import pytest

from support.pairs import Pair


@pytest.fixture(params=["local", "file"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Pair:
    """A drop-in pair, its server not started."""
    return Pair(request.param, tmp_path)
