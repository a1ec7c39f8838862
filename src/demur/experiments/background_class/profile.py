"""The scale of the background-class experiment: what a profile's TOML file may say."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from demur.studies.fields import INCREASING, Names, Shares

_STRICT = ConfigDict(extra="forbid", frozen=True)
_Count = Field(ge=1)


class SelectionProfile(BaseModel):
    """How the confusing kinds of background image are found (sec. IV.A)."""

    model_config = _STRICT
    data: Names = ()
    per_class: int = _Count
    folds: int = Field(ge=2)
    repeats: int = _Count
    epochs: int = _Count
    cutoff: float = Field(0.98, gt=0, le=1)


class CurveProfile(BaseModel):
    """On how many images the curves are drawn: against eps, and against the false rejection rate."""

    model_config = _STRICT
    images: int = _Count
    eps: Annotated[tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...], INCREASING] = (
        Field(min_length=2)
    )
    rejected: Shares = Field((0.005, 0.01, 0.02, 0.05, 0.1, 0.2), min_length=2)


class TradeOffProfile(BaseModel):
    """How many kinds of background image are kept, least confusing first, in the trade-off (end of sec. IV.B)."""

    model_config = _STRICT
    kept: tuple[Annotated[int, _Count], ...] = Field(min_length=1)
    key_images: int = _Count
    repeats: int = _Count
    epochs: int = _Count


class CarliniProfile(BaseModel):
    """On how many images of each class the attack of Carlini & Wagner runs, and how long."""

    model_config = _STRICT
    per_class: int = _Count
    steps: int = _Count
    search_steps: int = Field(9, ge=1)


class Profile(BaseModel):
    """The scale of the experiment. `keys` and `background` are class names, or a text with a name in each character;
    a background of "selected" is what the selection keeps.
    """

    model_config = _STRICT
    data: Names = Field(min_length=1)
    keys: tuple[str, ...] | str
    background: tuple[str, ...] | str
    background_share: float | None = Field(None, gt=0)
    splits: int = _Count
    held_out: float = Field(0.1, gt=0, lt=1)
    epochs: int = _Count
    batch_size: int = Field(128, ge=2)
    attacked: int | None = Field(None, ge=1)
    fgs_eps: float = Field(0.25, gt=0, le=1)
    fg_eps: float = Field(6.79, gt=0)
    noise_draws: int = Field(10, ge=1)
    made_per_kind: int = Field(0, ge=0)
    selection: SelectionProfile
    curve: CurveProfile
    trade_off: TradeOffProfile
    carlini: CarliniProfile
    gallery: int = Field(96, ge=0)
