"""A hang in a worker of a process pool."""

import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import hangwatch


def stuck_here() -> None:
    time.sleep(1000)


def run() -> None:
    with hangwatch.expires(after=0.4, scope="executor"):
        stuck_here()


if __name__ == "__main__":
    with ProcessPoolExecutor(1) as pool:
        try:
            pool.submit(run).result()
        except BrokenProcessPool:
            raise SystemExit(0) from None
    raise SystemExit(1)
