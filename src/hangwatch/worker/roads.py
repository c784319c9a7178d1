"""Who watches: the client that was configured, or the watcher that the environment names."""

from __future__ import annotations

from hangwatch.errors import NotConfiguredError
from hangwatch.worker.arguments import check_client
from hangwatch.worker.client import address_from_environment, client_at

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from typing import Any

    from hangwatch.worker.blocks import ContractClient, Road


class Configured:
    """Who watches when a block names no client. One object, replaced field by field."""

    client: ContractClient | None = None
    by_environment = True


def find_road(client: object) -> tuple[Any, Road | None]:
    """Find where a block is armed.

    Args:
        client: the client that it names; None: none.

    Returns:
        Its client, None for the environment's watcher; and where its blocks are armed, None if
        they are acquired and released by calls of the client.

    Raises:
        TypeError: `client` is no client: the caller's fault.
        NotConfiguredError: nobody said who watches.
    """
    if client is not None:
        check_client(client)
    else:
        client = Configured.client
    if client is None:
        if not Configured.by_environment:
            raise NotConfiguredError(
                "configure(None) left no client: call configure(client), "
                "or give expires(..., client=...)"
            )
        return None, client_at(address_from_environment())
    # Not of the instance: a mock has every attribute that it is asked for.
    road_of = getattr(type(client), "_road", None)
    return client, None if road_of is None else road_of(client)
