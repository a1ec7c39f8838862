"""The scale of the localized experiment: what a profile's TOML file may say."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from demur.studies.fields import INCREASING, Names, PhotographsProfile, StrongestProfile

_STRICT = ConfigDict(extra="forbid", frozen=True)
_Count = Field(ge=1)
_Linf = Field(gt=0, le=1, allow_inf_nan=False)
_Side = Annotated[int, Field(ge=0)]


class SetProfile(BaseModel):
    """Three models of one data set: trained on its images, on images attacked everywhere, and on images attacked around a box."""

    model_config = _STRICT
    name: str = Field(min_length=1)
    data: Names = Field(min_length=1)
    network: Literal["localized", "wide"] = "localized"
    paper: Literal["MNIST", "CIFAR-10", ""] = ""
    train_images: int | None = Field(None, ge=1)
    steps: int = _Count
    batch_size: int = Field(50, ge=2)
    learning_rate: float = Field(1e-4, gt=0, allow_inf_nan=False)
    eps: float = _Linf
    ramp: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], INCREASING] = Field(
        (1.0,), min_length=1
    )
    attack_steps: int = _Count
    step_size: float = _Linf
    boxes: Annotated[tuple[_Side, ...], INCREASING] = Field(min_length=1)


class AttackProfile(BaseModel):
    """The attack that models are tested with (sec. 5): on how many test images, and in how many steps."""

    model_config = _STRICT
    images: int = _Count
    calibration_images: int = _Count
    steps: int = _Count
    step_share: float = Field(1 / 30, gt=0, le=1)
    curve: Annotated[tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...], INCREASING] = (
        Field((0.0, 0.5, 1.0, 2.0), min_length=2)
    )

    @field_validator("curve")
    @classmethod
    def _from_0(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if values[0] != 0:
            raise ValueError("must increase from 0")
        return values


class AttackedPhotographs(PhotographsProfile):
    """The attack on networks for ImageNet (sec. 3): which photographs and networks, and how far."""

    listed: int = Field(9, ge=1)
    eps: Annotated[tuple[Annotated[float, _Linf], ...], INCREASING] = Field(
        (2 / 255, 8 / 255), min_length=1
    )
    steps: int = _Count


class Profile(BaseModel):
    """The scale of the experiment."""

    model_config = _STRICT
    sets: tuple[SetProfile, ...] = Field(min_length=1)
    attack: AttackProfile
    strongest: StrongestProfile
    photographs: AttackedPhotographs | None = None
    gallery: int = Field(48, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if any(one.ramp[-1] != 1 for one in self.sets):
            raise ValueError("a ramp must end at 1")
        names = [one.name for one in self.sets]
        if len(set(names)) < len(names):
            raise ValueError("two of the sets have the same name")
        if max(self.strongest.images, self.attack.calibration_images) > self.attack.images:
            raise ValueError(
                "strongest.images and attack.calibration_images cannot be more than attack.images"
            )
        return self
