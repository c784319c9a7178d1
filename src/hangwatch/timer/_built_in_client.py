"""What hangwatch's own clients have in common."""

from __future__ import annotations

from hangwatch.timer.api import TimerClient
from hangwatch.worker.expiration import forget_keys


class BuiltInClient(TimerClient):
    """A client whose blocks call `acquire` and `release` only if somebody replaced these."""

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if not name.startswith("_") or name == "_send_request":
            forget_keys()

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        forget_keys()
