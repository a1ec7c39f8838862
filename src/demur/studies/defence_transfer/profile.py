"""The scale of the study: what a profile's TOML file may say."""

from typing import Annotated

from pydantic import AfterValidator, Field

from demur.errors import unknown
from demur.studies import comparison
from demur.studies.defence_transfer.designs import DEFENCES
from demur.studies.fields import Count, Names


def _known(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if name not in DEFENCES:
            raise ValueError(str(unknown("defence", name, DEFENCES)))
        if names.count(name) > 1:
            raise ValueError(f"{name} is named twice")
    return names


class Profile(comparison.Profile):
    """The scale of the study: that of the comparison, a median, and which defences take part."""

    window: Count = 3
    defences: Annotated[Names, AfterValidator(_known)] = Field(tuple(DEFENCES), min_length=2)
