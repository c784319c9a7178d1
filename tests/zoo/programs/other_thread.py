"""A hang in a thread that is not the main one."""

import threading
import time

import hangwatch


def stuck_here() -> None:
    time.sleep(1000)


def run() -> None:
    with hangwatch.expires(after=0.4, scope="other thread"):
        stuck_here()


thread = threading.Thread(target=run, name="loader")
thread.start()
thread.join()
