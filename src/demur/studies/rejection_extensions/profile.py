"""The scale of the study: what a profile's TOML file may say."""

from typing import Annotated

from pydantic import Field

from demur.studies.fields import Count, Names, Strict

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class AttackProfile(Strict):
    """How all models are attacked: in L2, within `eps`."""

    images: Count
    eps: _Positive
    steps: Count
    ensemble_steps: Count
    n_targets: Count
    n_queries: Count
    densities: tuple[_Positive, ...] = Field((0.01, 0.1, 1.0, 10.0), min_length=1)


class GeneratorProfile(Strict):
    """How generators are trained, and how often their images train the machines."""

    images: Count
    epochs: Count
    rounds: tuple[Count, ...] = (1, 5)


class SearchProfile(Strict):
    """The values of the grid search over C and gamma, on `per_class` images of each class."""

    per_class: int = Field(ge=5)
    C: tuple[_Positive, ...] = Field((0.1, 1.0, 10.0), min_length=1)
    gamma: tuple[_Positive, ...] = Field((0.001, 0.01, 0.1), min_length=1)


class Profile(Strict):
    """The scale of the study."""

    data: Names = Field(min_length=1)
    train_images: Count
    validation_images: Count
    epochs: Count
    batch_size: int = Field(128, ge=2)
    learning_rate: _Positive = 0.1
    per_class: int = Field(ge=5)
    C: _Positive = 0.1
    gamma: _Positive = 0.01
    false_rejection: float = Field(0.02, ge=0, lt=1)
    attack: AttackProfile
    generator: GeneratorProfile
    search: SearchProfile
    gallery: int = Field(48, ge=0)
