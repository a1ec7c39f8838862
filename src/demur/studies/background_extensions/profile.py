"""The scale of the study: what a profile's TOML file may say."""

from pydantic import Field

from demur.studies.fields import Count, Names, Strict


class AttackProfile(Strict):
    """How all models are attacked: in Linf, within `eps`."""

    images: Count
    eps: float = Field(0.25, gt=0, le=1)
    steps: Count
    ensemble_steps: Count
    n_targets: Count
    n_queries: Count


class GrownProfile(Strict):
    """How background is grown: rounds of training, and attacked training images of a round."""

    rounds: Count
    images: Count
    steps: Count
    epochs: Count


class Profile(Strict):
    """`keys` and `background` are class names, or a text with a name in each character."""

    data: Names = Field(min_length=1)
    keys: tuple[str, ...] | str
    background: tuple[str, ...] | str
    background_share: float | None = Field(None, gt=0)
    held_out: float = Field(0.1, gt=0, lt=1)
    key_images: Count
    epochs: Count
    batch_size: int = Field(128, ge=2)
    widths: tuple[Count, ...] = Field((8, 16, 32, 64, 128), min_length=1)
    made_per_kind: Count
    strange: Count
    attack: AttackProfile
    grown: GrownProfile
    gallery: int = Field(48, ge=0)
