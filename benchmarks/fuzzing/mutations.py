"""Damage to the bytes of files and to the values in them, drawn from a generator."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

HUGE = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)

HOSTILE: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**31, 2**63, 10**400, 1e308, -1e308, float("inf"), float("nan")),
    *("", "x" * 100_000, "[/]", "[bold]", "\x1b[2J\x1b[31m", "../../etc/passwd", "/etc/passwd"),
    *("\ud800", "\x00", "\u202e", [], {}, [[]], {"a": {}}, "nan", "1e999", "9" * 5000),
)
"""Values that a reader may not expect."""


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Damage bytes in one to four places, more often near the beginning and the end."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 5))):
        if data:
            _DAMAGES[int(rng.integers(len(_DAMAGES)))](data, rng)
    return bytes(data)


def _place(data: bytearray, rng: np.random.Generator) -> int:
    where = rng.random()
    near = min(len(data), 96)
    if where < 0.35:
        return int(rng.integers(near))
    if where < 0.5:
        return len(data) - 1 - int(rng.integers(near))
    return int(rng.integers(len(data)))


def _flip(data: bytearray, rng: np.random.Generator) -> None:
    data[_place(data, rng)] ^= 1 << int(rng.integers(8))


def _overwrite(data: bytearray, rng: np.random.Generator) -> None:
    start = _place(data, rng)
    length = int(rng.integers(1, 9))
    data[start : start + length] = rng.bytes(len(data[start : start + length]))


def _truncate(data: bytearray, rng: np.random.Generator) -> None:
    del data[int(rng.integers(len(data))) :]


def _splice(data: bytearray, rng: np.random.Generator) -> None:
    source = int(rng.integers(len(data)))
    target = int(rng.integers(len(data)))
    part = data[source : source + int(rng.integers(1, 65))]
    insert = rng.random() < 0.5
    data[target : target + (0 if insert else len(part))] = part


def _delete(data: bytearray, rng: np.random.Generator) -> None:
    start = _place(data, rng)
    del data[start : start + int(rng.integers(1, 33))]


def _set_length(data: bytearray, rng: np.random.Generator) -> None:
    width = int(rng.choice([1, 2, 4, 8]))
    start = _place(data, rng)
    value = HUGE[int(rng.integers(len(HUGE)))] % (1 << (8 * width))
    written = value.to_bytes(width, "little" if rng.random() < 0.5 else "big")
    data[start : start + width] = written[: len(data[start : start + width])]


_DAMAGES: tuple[Callable[[bytearray, np.random.Generator], None], ...] = (
    *(_flip, _overwrite, _truncate, _splice, _delete, _set_length, _set_length),
)


def damaged_text(text: str, rng: np.random.Generator) -> bytes:
    """Damage a text: its bytes, its numbers, or its depth."""
    kind = rng.random()
    if kind < 0.4:
        return damaged(text.encode(), rng)
    numbers = list(re.finditer(r"\d+", text))
    if kind < 0.8 and numbers:
        chosen = numbers[int(rng.integers(len(numbers)))]
        values = ("-1", "1e999", "inf", "nan", "9" * 5000, str(2**63), "0x7f", "", '"\x1b[2J"')
        value = values[int(rng.integers(len(values)))]
        return (text[: chosen.start()] + value + text[chosen.end() :]).encode()
    where = int(rng.integers(len(text) + 1))
    inserted = ("[" * 5000, "{" * 5000, '"' * 3, "\x00", "x" * 200_000, "\x1b[31m", "\r", ",,,,")
    return (text[:where] + inserted[int(rng.integers(len(inserted)))] + text[where:]).encode()


def damaged_value(value: Any, rng: np.random.Generator) -> Any:
    """Copy a value of dicts and lists with one to three places changed."""
    for _ in range(int(rng.integers(1, 4))):
        value = _changed(value, rng)
    return value


def _changed(value: Any, rng: np.random.Generator) -> Any:
    inside = isinstance(value, dict | list) and len(value) > 0 and rng.random() < 0.9
    if not inside:
        return HOSTILE[int(rng.integers(len(HOSTILE)))]
    if isinstance(value, list):
        copy = list(value)
        place = int(rng.integers(len(copy)))
        if rng.random() < 0.1:
            return [*copy, copy[place]]
        copy[place] = _changed(copy[place], rng)
        return copy
    keys = list(value)
    key = keys[int(rng.integers(len(keys)))]
    if rng.random() < 0.1:
        return {other: one for other, one in value.items() if other != key}
    if rng.random() < 0.05:
        return {**value, "\x1b[2J[/]": 1}
    return {**value, key: _changed(value[key], rng)}
