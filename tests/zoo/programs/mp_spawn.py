"""A hang in a multiprocessing child, started by spawn."""

import multiprocessing
import time

import hangwatch


def stuck_here() -> None:
    time.sleep(1000)


def run() -> None:
    with hangwatch.expires(after=0.4, scope="mp spawn"):
        stuck_here()


if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=run)
    process.start()
    process.join()
    raise SystemExit(process.exitcode != -9)
