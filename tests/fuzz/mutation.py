"""Inputs made of other inputs: bytes changed, pieces put in, JSON values replaced."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

_NUMBERS = [0, -1, 1, -0.0, 1e308, -1e308, 5e-324, float("nan"), float("inf"), float("-inf")]
_POWERS = [
    sign * 2**power + more for power in (15, 31, 53, 63, 64) for sign in (1, -1) for more in (-1, 0)
]
_VALUES: list[Any] = [
    *_NUMBERS,
    *_POWERS,
    10**308,
    10**400,
    None,
    True,
    False,
    *("", "\0", "\ud800", "/", "1", "nan", "x" * 300, "ä" * 300, "\U0001f600" * 300, "a" * 5000),
    *([], {}, [1e15] * 60, [[[[]]]], {"a": {"a": {}}}, {str(n): n for n in range(40)}),
]
_PIECES = [json.dumps(value).encode() for value in _VALUES] + [
    b"\xff",
    b"\xed\xa0\x80",
    b"\xf0\x9f",
]

# What targets put a number in for.
_STANDS_FOR = re.compile(rb"(NOW|PARENT)")
_QUOTED = re.compile(rb'"(NOW|PARENT)"')

Way = Callable[[bytes, random.Random, Sequence[bytes]], bytes]


def mutate(data: bytes, rng: random.Random, tokens: Sequence[bytes], most: int) -> bytes:
    """Return `data` with some changes, made of `tokens` too, up to `most` bytes."""
    for _ in range(1 << rng.randrange(4)):
        data = rng.choice(_WAYS)(data, rng, tokens)[:most]  # which repetitions would outgrow
    return data


def _flip(data: bytes, rng: random.Random, tokens: Sequence[bytes]) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]


def _insert(data: bytes, rng: random.Random, tokens: Sequence[bytes]) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice([*tokens, *_PIECES]) + data[at + rng.choice([0, 0, 1, 4]) :]


def _cut(data: bytes, rng: random.Random, tokens: Sequence[bytes]) -> bytes:
    start, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:start] + data[end:]


def _repeat(data: bytes, rng: random.Random, tokens: Sequence[bytes]) -> bytes:
    start, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:end] + data[start:end] * rng.choice([1, 2, 20]) + data[end:]


def _change_word(data: bytes, rng: random.Random, tokens: Sequence[bytes]) -> bytes:
    """Replace one word of a line: a number, mostly."""
    words = data.split(b" ")
    words[rng.randrange(len(words))] = rng.choice([*tokens, *_PIECES])
    return b" ".join(words)


def _change_json(data: bytes, rng: random.Random, tokens: Sequence[bytes]) -> bytes:
    """Replace, remove or add a value of a JSON document, one of a line if there are lines."""
    lines = data.split(b"\n")
    chosen = rng.randrange(len(lines))
    with suppress(ValueError, RecursionError):
        document = json.loads(_STANDS_FOR.sub(rb'"\1"', lines[chosen]))
        places: list[Any] = [document] if isinstance(document, dict | list) else [None]
        for place in places:
            inner = place.values() if isinstance(place, dict) else place or ()
            places += [one for one in inner if isinstance(one, dict | list)]
        place = rng.choice(places)
        value = rng.choice(_VALUES)
        if isinstance(place, dict) and place:
            key = rng.choice([*place, "more"])
            place[key] = value
            if rng.random() < 0.1:
                del place[key]
        elif isinstance(place, list):
            place.insert(0, value)
        text = json.dumps(document, ensure_ascii=rng.random() < 0.5)
        lines[chosen] = _QUOTED.sub(rb"\1", text.encode("utf-8", "surrogatepass"))
    return b"\n".join(lines)


_WAYS: list[Way] = [
    _flip,
    _insert,
    _insert,
    _cut,
    _repeat,
    _change_word,
    _change_json,
    _change_json,
]
