"""What a certificate says of each image, and of the share of all images."""

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from demur.metrics import clopper_pearson


class Status(IntEnum):
    """Whether an attacker can reach the goal on an image.

    Examples
    --------
    >>> int(Status.CERTIFIED), int(Status.UNKNOWN), int(Status.BROKEN)
    (0, 1, 2)
    """

    CERTIFIED = 0
    UNKNOWN = 1
    BROKEN = 2


class UnsoundBoundError(RuntimeError):
    """An image is proven and broken: a bound of demur is wrong. Report it.

    Examples
    --------
    >>> issubclass(UnsoundBoundError, RuntimeError)
    True
    """


@dataclass(frozen=True)
class ProvenBounds:
    """Two-sided bounds of the share of images on which an attacker cannot reach the goal.

    Attributes
    ----------
    proven : float
        Share of these images that is certified. The true share of these images is at least this.
    not_broken : float
        Share that is not broken. The true share of these images is at most this.
    low, high : float
        Bounds for images drawn like these: the lower Clopper-Pearson bound of `proven` and the
        upper one of `not_broken`, together at the confidence that was asked for.
    n : int
        Number of images.

    Examples
    --------
    >>> print(ProvenBounds(0.9, 0.95, 0.81, 0.99, 50))
    90.0 % proven, 95.0 % not broken (n = 50; 81.0 to 99.0 %)
    """

    proven: float
    not_broken: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        """Give one line."""
        return (
            f"{100 * self.proven:.1f} % proven, {100 * self.not_broken:.1f} % not broken "
            f"(n = {self.n}; {100 * self.low:.1f} to {100 * self.high:.1f} %)"
        )


@dataclass(frozen=True, eq=False, repr=False)
class Certificate:
    """The result of `certify`, in the order of the images, on the CPU.

    Attributes
    ----------
    status : Tensor of shape (N,), int64
        Values of `Status`.
    margin : Tensor of shape (N,), float64
        The best lower bound of what must be above 0 for a proof: a difference of scores. Minus
        infinity where no method gave a bound.
    by : tuple of str
        The first method that proved the image, or "".
    probability : Tensor of shape (N,), float64
        How sure a proof is: 1 for a deterministic one, 1 - alpha by randomized smoothing; 0 where
        there is no proof.
    unsupported : str or None
        The layer that has no bounds, and why. Nothing is proven then.
    contradictions : int
        Images that randomized smoothing certified and an attack broke. They count as BROKEN.
        Expect at most a share alpha of all images.

    Examples
    --------
    >>> import torch
    >>> from demur import Classifier
    >>> from demur.certificates import certify
    >>> module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    >>> with torch.no_grad():
    ...     _ = module[1].weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]))
    ...     _ = module[1].bias.zero_()
    >>> images = torch.tensor([0.9, 0.1, 0.5, 0.5]).view(1, 1, 2, 2)
    >>> certify(Classifier(module, 2), images, torch.tensor([0]), "linf:0.3")
    Certificate(1 certified, 0 unknown, 0 broken of 1)
    """

    status: Tensor
    margin: Tensor
    by: tuple[str, ...]
    probability: Tensor
    unsupported: str | None = None
    contradictions: int = 0

    def __repr__(self) -> str:
        """Give counts, without the tensors."""
        counts = torch.bincount(self.status, minlength=3).tolist()
        said = "" if self.unsupported is None else f"; unsupported: {self.unsupported}"
        return (
            f"Certificate({counts[0]} certified, {counts[1]} unknown, {counts[2]} broken of "
            f"{len(self.status)}{said})"
        )

    def bounds(self, confidence: float = 0.95) -> ProvenBounds:
        """Bound the share of images on which an attacker cannot reach the goal.

        Parameters
        ----------
        confidence : float in (0, 1), default 0.95

        Returns
        -------
        ProvenBounds
        """
        n = len(self.status)
        proven = int((self.status == Status.CERTIFIED).sum())
        unbroken = int((self.status != Status.BROKEN).sum())
        each = (1 + confidence) / 2
        return ProvenBounds(
            proven / max(n, 1),
            unbroken / max(n, 1),
            clopper_pearson(proven, n, each, "lower")[0],
            clopper_pearson(unbroken, n, each, "upper")[1],
            n,
        )
