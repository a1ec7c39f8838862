"""The scale of the study: what a profile's TOML file may say."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from demur.certificates.problem import Method
from demur.studies.fields import INCREASING, Count, Names, Shares, Strict

_Size = Annotated[float, Field(gt=0, le=1)]


class CertifiedProfile(Strict):
    """Certified training: its eps, the passes over the images, and those while eps grows.

    `methods` and `splits` certify the networks that are trained so.
    """

    eps: _Size
    epochs: Count
    ramp: float = Field(gt=0)
    kappa: float = Field(0.5, ge=0, le=1)
    batch_size: int = Field(256, ge=2)
    learning_rate: float = Field(5e-4, gt=0, description="of Adam, before it falls | number")
    column: bool = Field(
        True, description="whether a network with a learned reject column is trained, too | bool"
    )
    methods: tuple[Method, ...] = Field(
        ("ibp", "crown-ibp"),
        min_length=1,
        description="that certify networks with certified training | names",
    )
    splits: Count = Field(
        100, description='splits of each wrong class by the method "branching", at most | number'
    )


class AdversarialProfile(Strict):
    """Adversarial training, for comparison."""

    eps: _Size
    steps: Count
    epochs: Count


class AttackProfile(Strict):
    """The strongest ensemble in Linf, at each eps.

    `few` of the images are for models without certified training: little is proven of them.
    """

    images: Count
    few: Count = Field(description="images for models without certified training | number")
    eps: Annotated[tuple[_Size, ...], INCREASING] = Field(min_length=1)
    steps: Count
    n_targets: Count
    n_queries: Count


class PapersProfile(Strict):
    """The defences of the papers on the same network."""

    made_per_kind: Count
    per_class: int = Field(ge=5)
    C: float = Field(10.0, gt=0)
    sigma: float = Field(1.0, gt=0)


class CaseProfile(Strict):
    """A smoothed classifier, and the threat in L2 that it is measured at."""

    sigma: float = Field(gt=0)
    delta: float = Field(ge=0)
    eps: float = Field(gt=0)
    weight: float = Field(10.0, ge=0)

    @property
    def name(self) -> str:
        """What tables call the model."""
        return f"smoothing, sigma {self.sigma:g}, delta {self.delta:g}"


class SmoothingProfile(Strict):
    """Certified consistency by randomized smoothing, in L2."""

    epochs: Count
    images: Count
    attacked: Count
    draws: Count
    alpha: float = Field(0.001, gt=0, lt=1)
    steps: Count
    cases: tuple[CaseProfile, ...] = Field(min_length=1)


class Profile(Strict):
    """The scale of the study. Without `adversarial`, `papers` or `smoothing`, there are none of
    these models.
    """

    data: Names = Field(min_length=1)
    train_images: int | None = Field(None, ge=1)
    test_images: int | None = Field(None, ge=1)
    epochs: Count
    batch_size: int = Field(128, ge=2)
    deltas: Annotated[tuple[_Size, ...], INCREASING] = (0.1, 0.15)
    rates: Shares = (0.01, 0.02, 0.05)
    denial: _Size = 0.05
    certified: CertifiedProfile
    adversarial: AdversarialProfile | None = None
    attack: AttackProfile
    papers: PapersProfile | None = None
    smoothing: SmoothingProfile | None = None
    gallery: int = Field(24, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.attack.few > self.attack.images:
            raise ValueError("attack.few cannot be more than attack.images")
        return self
