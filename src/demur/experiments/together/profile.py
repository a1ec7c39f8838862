"""The scale of the comparison: what a profile's TOML file may say."""

from pydantic import BaseModel, ConfigDict, Field

from demur.experiments.fields import Names

_STRICT = ConfigDict(extra="forbid", frozen=True)
_Count = Field(ge=1)


class AttackProfile(BaseModel):
    """How all models are attacked: in Linf, within `eps`."""

    model_config = _STRICT
    images: int = _Count
    eps: float = Field(gt=0, le=1, allow_inf_nan=False)
    steps: int = _Count
    ensemble_steps: int = _Count
    targets: int = _Count
    queries: int = _Count


class Profile(BaseModel):
    """The scale of the comparison."""

    model_config = _STRICT
    data: Names = Field(min_length=1)
    train_images: int | None = Field(None, ge=1)
    epochs: int = _Count
    batch_size: int = Field(64, ge=2)
    attacked_epochs: int = _Count
    attack_steps: int = _Count
    box: int = Field(ge=1)
    made_per_kind: int = _Count
    per_class: int = Field(ge=5)
    C: float = Field(10.0, gt=0, allow_inf_nan=False)
    false_rejection: float = Field(0.02, ge=0, lt=1)
    sigma: float = Field(1.5, gt=0, allow_inf_nan=False)
    attack: AttackProfile
    gallery: int = Field(48, ge=0)
