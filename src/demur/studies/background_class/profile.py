"""The scale of the background-class study: what the TOML file of a profile may say."""

from typing import Annotated

from pydantic import Field

from demur.studies.fields import INCREASING, Count, Names, Shares, Strict


class SelectionProfile(Strict):
    """How the confusing kinds of background image are found (sec. IV.A)."""

    data: Names = ()
    per_class: Count
    folds: int = Field(ge=2)
    repeats: Count
    epochs: Count
    cutoff: float = Field(0.98, gt=0, le=1)


class CurveProfile(Strict):
    """The curves against eps and against the false rejection rate, and their number of images."""

    images: Count
    eps: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], INCREASING] = Field(
        min_length=2
    )
    rejected: Shares = Field((0.005, 0.01, 0.02, 0.05, 0.1, 0.2), min_length=2)


class TradeOffProfile(Strict):
    """How many kinds of background image are kept, the least confusing first (sec. IV.B)."""

    kept: tuple[Count, ...] = Field(min_length=1)
    key_images: Count
    repeats: Count
    epochs: Count


class CarliniProfile(Strict):
    """The size of the attack of Carlini & Wagner, and its images of each class."""

    per_class: Count
    steps: Count
    search_steps: int = Field(9, ge=1)


class Profile(Strict):
    """`keys` and `background` are class names, or a text with a name in each character.

    A background of "selected" is what the selection keeps.
    """

    data: Names = Field(min_length=1)
    keys: tuple[str, ...] | str
    background: tuple[str, ...] | str
    background_share: float | None = Field(None, gt=0)
    splits: Count
    held_out: float = Field(0.1, gt=0, lt=1)
    epochs: Count
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
