"""Kinds of value that profiles of several experiments hold."""

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field


def _listed(value: object) -> object:
    """A single name is not taken for the list of its characters, nor for a list of one."""
    if isinstance(value, str):
        raise ValueError(f'a list of names is wanted: ["{value}"]')
    return value


Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]
"""Names in a profile."""


def _increase(values: tuple[float, ...]) -> tuple[float, ...]:
    if list(values) != sorted(set(values)):
        raise ValueError("must increase")
    return values


INCREASING = AfterValidator(_increase)
"""Annotates numbers that increase."""

Shares = Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], ...], INCREASING]
"""Shares below 1 that increase."""
