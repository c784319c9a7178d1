"""A blocking call inside of a coroutine."""

import asyncio
import time

import hangwatch


async def stuck_here() -> None:
    time.sleep(1000)


async def main() -> None:
    with hangwatch.expires(after=0.4, scope="asyncio"):
        await asyncio.gather(stuck_here(), asyncio.sleep(1))


asyncio.run(main())
