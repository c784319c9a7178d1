"""Hangwatch in the place of `torch.distributed.elastic.timer`, with no edit to PyTorch's files.

torchrun's agent looks its timer server up in that package when it starts workers, so
whoever installs ours before that has the workers watched by it:

    TORCHELASTIC_ENABLE_FILE_TIMER=1 \
        python -m hangwatch.integrations.torch -m torch.distributed.run ... train.py

Workers are processes of their own, in which nothing is replaced: they use
`hangwatch.timer.FileTimerClient`, or PyTorch's as before.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType

from hangwatch import timer as hangwatch_timer
from hangwatch.folder import REPORT_DIR

__all__ = ["install", "uninstall"]

_TIMER = "torch.distributed.elastic.timer"
_SERVERS = ("FileTimerServer", "LocalTimerServer")
# All public names of the package. Some of them alone would mix: our `expires` does not
# ask PyTorch's `configure`.
_NAMES = (
    *_SERVERS,
    "FileTimerClient",
    "FileTimerRequest",
    "LocalTimerClient",
    "TimerClient",
    "TimerRequest",
    "TimerServer",
    "configure",
    "expires",
)
_BEFORE = "_before_hangwatch"

if importlib.util.find_spec("torch") is None:
    raise ImportError("hangwatch.integrations.torch needs PyTorch: install torch", name="torch")


def install(*, report_dir: str | os.PathLike[str] | None = REPORT_DIR) -> None:
    """Put hangwatch's classes and functions into `torch.distributed.elastic.timer`.

    Call it before anything is imported from that package, and before a client is
    configured. Its submodules stay as they are. A second call replaces the first.

    Args:
        report_dir: folder of the newest 100 reports of the servers that are made without
            one; None keeps none.

    Raises:
        ImportError: PyTorch has no such package, or it can't be imported.
    """
    timer = _package()
    before: dict[str, object] = vars(timer).setdefault(_BEFORE, {})
    for name in _NAMES:
        before.setdefault(name, getattr(timer, name))
        ours = getattr(hangwatch_timer, name)
        setattr(timer, name, _keeping(ours, report_dir) if name in _SERVERS else ours)


def uninstall() -> None:
    """Put back what `install` replaced; servers and clients that were made go on."""
    timer = _package()
    before: dict[str, object] = vars(timer).pop(_BEFORE, {})
    for name, value in before.items():
        setattr(timer, name, value)


def _package() -> ModuleType:
    try:
        return importlib.import_module(_TIMER)
    except ImportError as error:
        raise ImportError(f"this PyTorch has no usable {_TIMER}: {error}") from error


def _keeping(server: type, report_dir: str | os.PathLike[str] | None) -> type:
    """Return the server class, or one derived from it, whose reports go to `report_dir`."""
    if report_dir == REPORT_DIR:
        return server
    initialize = functools.partialmethod(vars(server)["__init__"], report_dir=report_dir)
    return type(server.__name__, (server,), {"__init__": initialize, "__doc__": server.__doc__})
