"""The scale of the study: what a profile's TOML file may say."""

from typing import Annotated

from pydantic import Field

from demur.studies.fields import Count, Names, Strict

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class SeparationProfile(Strict):
    """The contrastive term: its weight, its temperature, and the attack of its attacked images."""

    weight: _Positive = 0.5
    temperature: _Positive = 0.1
    steps: Count


class AttackProfile(Strict):
    """How all models are attacked: in Linf, and the paper's targeted steps without a limit."""

    images: Count
    eps: float = Field(gt=0, le=1)
    steps: Count
    targeted_steps: Count = 200
    step_size: _Positive = 0.05
    ensemble_steps: Count
    n_targets: Count
    n_queries: Count


class Profile(Strict):
    """The scale of the study."""

    data: Names = Field(min_length=1)
    train_images: int | None = Field(None, ge=1)
    epochs: Count
    batch_size: int = Field(128, ge=2)
    gaussian: tuple[_Positive, ...] = (1.0, 2.0)
    median: tuple[Count, ...] = (3,)
    separation: SeparationProfile
    attack: AttackProfile
    gallery: int = Field(48, ge=0)
