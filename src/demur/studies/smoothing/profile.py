"""The scale of the smoothing study: what a profile's TOML file may contain."""

from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from demur.studies.fields import (
    INCREASING,
    Count,
    Names,
    PhotographsProfile,
    Strict,
    StrongestProfile,
)

_Linf = Field(gt=0, le=1, allow_inf_nan=False)


def _odd(value: int) -> int:
    if value % 2 == 0:
        raise ValueError("must be odd")
    return value


_Sigmas = Annotated[tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], INCREASING]
_Sizes = Annotated[tuple[Annotated[int, Field(ge=3), AfterValidator(_odd)], ...], INCREASING]


class SetProfile(Strict):
    """Networks of one data set, each behind another filter."""

    name: str = Field(min_length=1)
    data: Names = Field(min_length=1)
    train_images: int | None = Field(None, ge=1)
    epochs: Count
    batch_size: int = Field(64, ge=2)
    gaussian: _Sigmas = (0.5, 1.0, 1.5, 2.0)
    median: _Sizes = (3, 5)
    eps: float = _Linf


class AttackProfile(Strict):
    """The paper's targeted attack, and the attackers at a fixed eps."""

    images: Count
    step_size: float = Field(0.1, gt=0, allow_inf_nan=False)
    targeted_steps: int = Field(1000, ge=1)
    steps: Count


class TargetedPhotographs(PhotographsProfile):
    """The targeted attack on networks for ImageNet."""

    step_size: float = Field(0.1, gt=0, allow_inf_nan=False)
    steps: int = Field(1000, ge=1)


class TuningProfile(Strict):
    """Transfer learning: a network for ImageNet, tuned with and without a filter."""

    data: Names = Field(min_length=1)
    network: str = Field(min_length=1)
    size: int = Field(ge=32)
    sigma: float = Field(1.5, gt=0, allow_inf_nan=False)
    train_images: int | None = Field(None, ge=1)
    epochs: Count
    batch_size: int = Field(32, ge=2)
    learning_rate: float = Field(0.01, gt=0, allow_inf_nan=False)
    images: Count
    eps: float = _Linf
    steps: Count


class Profile(Strict):
    """The scale of the study."""

    sets: tuple[SetProfile, ...] = Field(min_length=1)
    attack: AttackProfile
    strongest: StrongestProfile
    photographs: TargetedPhotographs | None = None
    tuning: TuningProfile | None = None
    gallery: int = Field(48, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not all(one.gaussian or one.median for one in self.sets):
            raise ValueError("each of the sets needs a filter")
        names = [one.name for one in self.sets]
        if len(set(names)) < len(names):
            raise ValueError("two of the sets have the same name")
        if self.strongest.images > self.attack.images:
            raise ValueError("strongest.images cannot be more than attack.images")
        return self
