"""The scale of localized training: what a profile may say."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from demur.studies.fields import (
    INCREASING,
    Count,
    Names,
    PhotographsProfile,
    Strict,
    StrongestProfile,
)

_Linf = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
_Parts = Annotated[tuple[_Linf, ...], INCREASING, Field(min_length=1)]
_Sides = Annotated[tuple[Annotated[int, Field(ge=0)], ...], INCREASING, Field(min_length=1)]
_Multiple = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Curve = Annotated[tuple[_Multiple, ...], INCREASING, Field(min_length=2)]


class SetProfile(Strict):
    """One data set with three models, and how they are trained."""

    name: str = Field(min_length=1)
    data: Names = Field(min_length=1)
    network: Literal["localized", "strided", "resnet9", "wide"] = Field(
        "localized",
        description=(
            '`"localized"`: the two convolutions of the paper; `"strided"`: '
            '`networks.strided_cnn`, with a cyclic learning rate; `"resnet9"`: '
            '`networks.resnet9`, with shifted and mirrored images; `"wide"`: the w32-10 of Madry '
            "et al. | name"
        ),
    )
    paper: Literal["MNIST", "CIFAR-10", ""] = ""
    train_images: Count | None = None
    steps: Count
    batch_size: int = Field(50, ge=2)
    learning_rate: float = Field(
        1e-4,
        gt=0,
        allow_inf_nan=False,
        description="of Adam; of gradient descent for residual networks | number",
    )
    eps: _Linf
    ramp: _Parts = Field(
        (1.0,),
        description=(
            "stages of a training on attacked images, increasing to 1 "
            "| shares of eps and of its step"
        ),
    )
    warm_up: Count | None = Field(
        None,
        description="training steps of all stages but the last | number | all stages are equal",
    )
    attack_steps: Count
    step_size: _Linf
    held_out: Count | None = Field(
        None,
        description=(
            "training images that are left out and, attacked, choose the epoch whose weights are "
            "kept | number | none: the last epoch"
        ),
    )
    boxes: _Sides
    loss_images: Count | None = Field(
        None, description="test images attacked for the loss | number | all of them"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.ramp[-1] != 1:
            raise ValueError("a ramp must end at 1")
        if self.warm_up and (len(self.ramp) == 1 or self.warm_up >= self.steps):
            raise ValueError("warm_up needs a ramp of several stages, and more steps than its own")
        return self


class AttackProfile(Strict):
    """The paper's attack on the models (sec. 5)."""

    images: Count
    calibration_images: Count
    steps: Count
    step_share: float = Field(1 / 30, gt=0, le=1)
    curve: _Curve = (0.0, 0.5, 1.0, 2.0)


class AttackedPhotographs(PhotographsProfile):
    """The attack on networks for ImageNet (sec. 3)."""

    listed: int = Field(9, ge=1)
    eps: _Parts = (2 / 255, 8 / 255)
    steps: Count


class Profile(Strict):
    """The scale of the study."""

    sets: tuple[SetProfile, ...] = Field(min_length=1)
    attack: AttackProfile
    strongest: StrongestProfile
    photographs: AttackedPhotographs | None = None
    gallery: int = Field(48, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if any(one.ramp[-1] != 1 for one in self.sets):
            raise ValueError("a ramp must end at 1")
        if any(
            one.warm_up and not (len(one.ramp) > 1 and one.warm_up < one.steps) for one in self.sets
        ):
            raise ValueError("warm_up needs a ramp, and more steps than its own")
        if len({one.name for one in self.sets}) < len(self.sets):
            raise ValueError("two of the sets have the same name")
        if max(self.strongest.images, self.attack.calibration_images) > self.attack.images:
            raise ValueError(
                "strongest.images and attack.calibration_images cannot be more than attack.images"
            )
        return self
