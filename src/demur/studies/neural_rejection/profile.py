"""The scale of the study: what a profile's TOML file may say."""

from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import Field, model_validator

from demur.data import ImageSet
from demur.studies.fields import INCREASING, Count, Names, Shares, Strict

_Size = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class MachinesProfile(Strict):
    """The RBF machines (sec. 2.4); the paper's are fitted on all that the network is trained on."""

    per_class: int | None = Field(None, ge=5)
    C: _Positive = 0.1
    gamma: _Positive = 0.01
    combiner_C: _Positive = 0.1  # noqa: N815 - C, as everybody calls it
    combiner_gamma: _Positive = 0.01
    threshold: float = Field(0.9, gt=0, lt=1)


class AttackProfile(Strict):
    """The paper's attack (sec. 2.5, 3.5): on how many images, how often, how far."""

    images: Count
    repeats: Count
    eps: Annotated[tuple[_Size, ...], INCREASING] = Field(min_length=2)
    steps: Count
    step_size: _Positive = 0.1
    tolerance: _Positive = 0.01


class StrongestProfile(Strict):
    """How hard the strongest attacker tries; `eps` is where all attacks are compared."""

    steps: Count
    eps: _Positive
    ensemble_steps: Count
    n_targets: Count
    n_queries: Count


class ThresholdsProfile(Strict):
    """The curve against false rejection: at which rates, on how many images."""

    images: Count
    steps: Count
    rates: Shares = Field((0.005, 0.01, 0.02, 0.05, 0.1, 0.2), min_length=2)


class AdversarialProfile(Strict):
    """Adversarial training on every batch, for comparison."""

    eps: _Positive
    steps: Count
    epochs: Count


class RetrainingProfile(AdversarialProfile):
    """Adversarial training in the paper's two steps (sec. 3.4): `attacked` images, once."""

    attacked: Count


class Profile(Strict):
    """The scale of the study."""

    data: Names = Field(min_length=1)
    train_images: Count
    validation_images: Count
    epochs: Count
    batch_size: int = Field(128, ge=2)
    learning_rate: _Positive = 0.1
    machines: MachinesProfile
    attack: AttackProfile
    strongest: StrongestProfile
    thresholds: ThresholdsProfile
    retraining: RetrainingProfile
    adversarial: AdversarialProfile
    gallery: int = Field(48, ge=0)

    @property
    def attacked(self) -> int:
        """The number of attacked images."""
        return self.attack.images * self.attack.repeats

    @model_validator(mode="after")
    def _fit(self) -> Self:
        eps = self.strongest.eps
        if self.attack.eps[0] != 0:
            raise ValueError("attack.eps must increase from 0")
        if not {eps, eps / 2} <= set(self.attack.eps):
            raise ValueError(
                "attack.eps must hold strongest.eps, where attacks are compared, and half of it"
            )
        if self.thresholds.images > self.attacked:
            raise ValueError(
                "thresholds.images cannot be more than attack.images times attack.repeats"
            )
        return self


@dataclass(frozen=True, eq=False)
class Material:
    """The images of a run: no training image is validated on, and none of both is attacked."""

    profile: Profile
    seed: int
    train: ImageSet
    validation: ImageSet
    test: ImageSet
    images: ImageSet
