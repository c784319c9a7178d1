"""What arms a block: the client that it names, or was configured, or the environment names."""

from __future__ import annotations

from hangwatch.errors import NotConfiguredError
from hangwatch.worker.arguments import NOTHING_ASKED, name_of
from hangwatch.worker.blocks import ContractBlock, cannot
from hangwatch.worker.client import address_from_environment, client_at

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from hangwatch.worker.arguments import Asked
    from hangwatch.worker.blocks import ContractClient, Other, Transport
    from hangwatch.worker.core import Expiration


class Configured:
    """Who watches when a block names no client.

    A class, so that the client lasts as long as it can: longer than a module's names.
    """

    client: ContractClient | None = None
    by_environment = True


def configure(client: ContractClient | None) -> None:
    """Set the client of the blocks that name none; None: from now on nobody's."""
    Configured.client, Configured.by_environment = client, False


def begin(block: Expiration, asked: Asked) -> Other | None:
    """Arm a block's timer; if that raises, it isn't armed.

    Raises:
        NotConfiguredError: nobody said who watches.
        UnsupportedError: its client can't do what is asked.
    """
    client = Configured.client if asked.client is None else asked.client
    if client is None and Configured.by_environment:
        return client_at(address_from_environment()).begin(block, asked)
    if client is None:
        raise NotConfiguredError(
            "configure(None) left no client: call configure(client), "
            "or give expires(..., client=...)"
        )
    # Not of the instance: a mock has every attribute that it is asked for.
    transport_of = getattr(type(client), "_hangwatch_transport", None)
    transport: Transport | None = None if transport_of is None else transport_of(client)
    if transport is not None:
        return transport.begin(block, asked)
    if asked._replace(client=None) != NOTHING_ASKED:
        raise cannot(client, "pause, nor take on_expiry, grace or signal")
    return ContractBlock(client, name_of(block), block.after)
