"""What a server logs of expired timers; a module of its own, so that it can be replaced."""

from __future__ import annotations

__all__ = ["log_debug_info_for_expired_timers"]


def log_debug_info_for_expired_timers(run_id: str, expired_timers: dict[int, list[str]]) -> None:
    """Log which timers have expired.

    Args:
        run_id: the run that the server was given.
        expired_timers: each worker's pid, and its expired timers as JSON.
    """
    if expired_timers:
        import logging  # takes long, and a worker needs none of it

        logging.getLogger("hangwatch").info("expired timers of run %r: %s", run_id, expired_timers)
