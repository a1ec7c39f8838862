"""Kinds of value that profiles of several studies hold."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


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


Count = Annotated[int, Field(ge=1)]
"""A number of things, at least one."""


class Strict(BaseModel):
    """A part of a profile without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class StrongestProfile(Strict):
    """The size of the strongest ensemble, and the number of images that it attacks."""

    images: Count
    steps: Count
    n_targets: Count
    n_queries: Count

    @property
    def passes(self) -> int:
        """About how many passes over its images the ensemble makes."""
        return self.steps * (4 + self.n_targets) + self.n_queries


class PhotographsProfile(Strict):
    """Which photographs, and which networks for ImageNet."""

    folder: str = "imagenet/photos"
    networks: Names = Field(min_length=1)
    images: Count
