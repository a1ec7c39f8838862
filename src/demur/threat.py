"""Threat models: what an attacker wants, and how much an attacker may change."""

import math
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from demur.errors import DemurError
from demur.goals import Evade, Goal, as_goal
from demur.norms import ball_of

LEVELS = 255
SHORT = 6  # an eps is printed as a decimal if that takes at most so many characters


@dataclass(frozen=True, eq=False)
class ThreatModel:
    """What an attacker wants and is allowed. Attacks, training, certificates and reports share it.

    Parameters
    ----------
    norm : {"linf", "l2", "l1", "l0"}
        The norm that measures a change. L0 counts pixels.
    eps : float, Tensor of shape (N,) or None, default None
        The largest allowed change, in the unit of pixels in [0, 1]: one number, or one for each
        image. None asks for the smallest change that succeeds. `inf` allows every image in [0, 1].
    goal : Goal, default Evade()
        Which answers count as success.
    mask : Tensor that broadcasts to the images, optional
        Where the attacker may act. In Linf, a pixel may move by at most eps * mask. In the other
        norms the mask is 0 or 1. A pixel never changes where the mask is 0. None means everywhere.

    Raises
    ------
    DemurError
        If the norm is unknown, eps is negative or NaN, or eps is finite and above 1 in Linf.

    Examples
    --------
    >>> from demur import ThreatModel
    >>> threat = ThreatModel("linf", eps=8 / 255)
    >>> print(threat)
    linf:8/255
    >>> ThreatModel.parse("linf:8/255") == threat
    True
    >>> print(ThreatModel("l2", 1.5), ThreatModel("l2"), ThreatModel("linf", float("inf")))
    l2:1.5 l2 linf:inf
    """

    norm: str
    eps: float | Tensor | None = None
    goal: Goal = field(default_factory=Evade)
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        ball_of(self.norm)
        as_goal(self.goal)
        if self.eps is not None:
            object.__setattr__(self, "eps", _checked(self.eps, self.norm))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a threat model from text, such as "linf:8/255", "l2" or "linf:inf".

        Raises
        ------
        DemurError
            If the text has another form.
        """
        norm, colon, eps = text.strip().partition(":")
        return cls(norm.strip().lower(), _number(eps, text) if colon else None)

    def __str__(self) -> str:
        """Give norm and eps as text that `parse` reads, without the goal and the mask."""
        if self.eps is None:
            return self.norm
        if isinstance(self.eps, Tensor):
            return f"{self.norm}:{float(self.eps.min()):g}..{float(self.eps.max()):g}"
        return f"{self.norm}:{eps_text(self.eps)}"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ThreatModel):
            return NotImplemented
        same = self.norm == other.norm and self.goal == other.goal
        return same and _equal(self.eps, other.eps) and _equal(self.mask, other.mask)

    def __hash__(self) -> int:
        eps = tuple(self.eps.tolist()) if isinstance(self.eps, Tensor) else self.eps
        return hash((self.norm, eps, self.goal, self.mask is None))

    def select(self, index: Tensor, images: Tensor) -> Self:
        """Give the threat model of the images at `index` (n,), out of `images` (N, C, H, W)."""
        eps = self.eps
        if isinstance(eps, Tensor):
            eps = eps.to(index.device)[index]
        mask = self.mask
        if mask is not None and mask.ndim == images.ndim and len(mask) == len(images):
            mask = mask.to(index.device)[index]
        return replace(self, eps=eps, goal=self.goal.select(index), mask=mask)


def as_threat(threat: object) -> ThreatModel:
    """Give the threat model, also from text. Raise DemurError for any other object.

    Examples
    --------
    >>> from demur.threat import as_threat
    >>> as_threat("l2:0.5").eps
    0.5
    """
    if isinstance(threat, str):
        return ThreatModel.parse(threat)
    if not isinstance(threat, ThreatModel):
        raise DemurError(
            f'a threat is ThreatModel(norm, eps=...) or text such as "linf:8/255", not {threat!r}.'
        )
    return threat


def eps_text(eps: float) -> str:
    """Print an eps so that it reads well and parses to the same number: a decimal, or a fraction of
    255 levels.

    Examples
    --------
    >>> from demur.threat import eps_text
    >>> eps_text(8 / 255), eps_text(0.2), eps_text(float("inf"))
    ('8/255', '0.2', 'inf')
    """
    if len(repr(float(eps))) <= SHORT or math.isinf(eps):
        return f"{eps:g}"
    level = round(eps * LEVELS)
    return f"{level}/{LEVELS}" if level / LEVELS == eps else repr(float(eps))


def _number(text: str, whole: str) -> float:
    top, slash, bottom = text.partition("/")
    try:
        return float(top) / float(bottom) if slash else float(top)
    except (ValueError, ZeroDivisionError) as error:
        raise DemurError(
            f"{whole!r} is not a threat model: write NORM or NORM:EPS, "
            "for example linf:8/255 or l2:1.5."
        ) from error


def _checked(eps: object, norm: str) -> float | Tensor:
    """Check an eps; a number becomes a float, a tensor float64."""
    try:
        limits = torch.as_tensor(eps, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DemurError(
            f"eps must be a number, or a tensor with one number for each image, not {eps!r}."
        ) from error
    if limits.ndim > 1:
        raise DemurError(
            "eps must be one number, or a tensor of shape (N,), "
            f"not of shape {tuple(limits.shape)}."
        )
    if bool(limits.isnan().any()) or bool((limits < 0).any()):
        raise DemurError("eps must not be negative or NaN.")
    if norm == "linf" and bool(((limits > 1) & limits.isfinite()).any()):
        raise DemurError(
            f"eps is in the unit of pixels in [0, 1], not {float(limits.max()):g}: "
            "write 8 levels of 255 as 8 / 255."
        )
    return float(limits) if limits.ndim == 0 else limits


def _equal(one: float | Tensor | None, other: float | Tensor | None) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one.cpu(), other.cpu())
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return False
    return one == other
