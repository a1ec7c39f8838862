"""The scale of the rejection experiment: what a profile's TOML file may say."""

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from demur.studies.fields import INCREASING, Names, Shares

_STRICT = ConfigDict(extra="forbid", frozen=True)
_Count = Field(ge=1)
_Positive = Field(gt=0, allow_inf_nan=False)
_Size = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class MachinesProfile(BaseModel):
    """The RBF machines (sec. 2.4); the paper's are fitted on all that the network is trained on."""

    model_config = _STRICT
    per_class: int | None = Field(None, ge=5)
    C: float = Field(0.1, gt=0, allow_inf_nan=False)
    gamma: float = Field(0.01, gt=0, allow_inf_nan=False)
    combiner_C: float = Field(0.1, gt=0, allow_inf_nan=False)  # noqa: N815 - C, as everybody calls it
    combiner_gamma: float = Field(0.01, gt=0, allow_inf_nan=False)
    threshold: float = Field(0.9, gt=0, lt=1)


class AttackProfile(BaseModel):
    """The paper's attack (sec. 2.5, 3.5): on how many images, how often, how far."""

    model_config = _STRICT
    images: int = _Count
    repeats: int = _Count
    eps: Annotated[tuple[_Size, ...], INCREASING] = Field(min_length=2)
    steps: int = _Count
    step_size: float = Field(0.1, gt=0, allow_inf_nan=False)
    tolerance: float = Field(0.01, gt=0, allow_inf_nan=False)

    @field_validator("eps")
    @classmethod
    def _from_0(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if values[0] != 0:
            raise ValueError("must increase from 0")
        return values


class StrongestProfile(BaseModel):
    """How hard the strongest attacker tries; `eps` is where all attacks are compared."""

    model_config = _STRICT
    steps: int = _Count
    eps: float = _Positive
    ensemble_steps: int = _Count
    n_targets: int = _Count
    n_queries: int = _Count


class ThresholdsProfile(BaseModel):
    """The curve against false rejection: at which rates, on how many images."""

    model_config = _STRICT
    images: int = _Count
    steps: int = _Count
    rates: Shares = Field((0.005, 0.01, 0.02, 0.05, 0.1, 0.2), min_length=2)


class RetrainingProfile(BaseModel):
    """Adversarial training in the paper's two steps (sec. 3.4): how many images are attacked, how far, and how long it trains on."""

    model_config = _STRICT
    attacked: int = _Count
    eps: float = _Positive
    steps: int = _Count
    epochs: int = _Count


class AdversarialProfile(BaseModel):
    """Adversarial training on every batch, for comparison."""

    model_config = _STRICT
    eps: float = _Positive
    steps: int = _Count
    epochs: int = _Count


class Profile(BaseModel):
    """The scale of the experiment."""

    model_config = _STRICT
    data: Names = Field(min_length=1)
    train_images: int = _Count
    validation_images: int = _Count
    epochs: int = _Count
    batch_size: int = Field(128, ge=2)
    learning_rate: float = Field(0.1, gt=0, allow_inf_nan=False)
    machines: MachinesProfile
    attack: AttackProfile
    strongest: StrongestProfile
    thresholds: ThresholdsProfile
    retraining: RetrainingProfile
    adversarial: AdversarialProfile
    gallery: int = Field(48, ge=0)

    @model_validator(mode="after")
    def _compared_on_the_curve(self) -> Self:
        if (
            self.strongest.eps not in self.attack.eps
            or self.strongest.eps / 2 not in self.attack.eps
        ):
            raise ValueError(
                "attack.eps must hold strongest.eps, where attacks are compared, and half of it"
            )
        if self.thresholds.images > self.attack.images * self.attack.repeats:
            raise ValueError(
                "thresholds.images cannot be more than attack.images times attack.repeats"
            )
        return self
