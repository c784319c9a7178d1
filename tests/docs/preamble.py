"""What the fragments in the documents call without saying where it comes from.

A name that a block uses and does not define is imported from here. What is not here is
missing, and fails the block.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import hangwatch
import hangwatch as timer

__all__ = [
    "ProcessPoolExecutor",
    "all_reduce",
    "asyncio",
    "batch",
    "batches",
    "gradients",
    "guess",
    "hangwatch",
    "loader",
    "os",
    "think_hard",
    "timer",
    "train",
    "train_step",
]

gradients = [0.5, -0.25]
batch = [1.0, 2.0]
batches = [batch, batch]
loader = batches


def all_reduce(*tensors: object) -> None:
    """Be through before long."""


def train_step(batch: list[float]) -> None:
    """Be through before long."""


def train() -> None:
    """Train for a while, in blocks of which none overruns."""
    for batch in _watched():
        with hangwatch.expires(after=60, scope="step"):
            train_step(batch)


def _watched() -> Iterator[list[float]]:
    yield from hangwatch.watch(loader, after=60, scope="next batch")


def think_hard(question: str) -> str:
    """Find no answer."""
    time.sleep(60)
    return question


def guess(question: str) -> str:
    """Answer all the same."""
    return "a guess"
