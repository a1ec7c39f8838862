"""The largest eps that is proven, image by image."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from demur.certificates.certify import AT_ONCE, checked_methods, checked_threat, proofs
from demur.certificates.problem import METHODS
from demur.classifier import Classifier, check_classifier, check_counts, check_images, check_labels
from demur.errors import DemurError
from demur.goals import Evade, Goal
from demur.threat import ThreatModel

STEPS = 12


def certified_radius(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    norm: str = "linf",
    *,
    methods: Sequence[str] = METHODS,
    goal: Goal | None = None,
    mask: Tensor | None = None,
    largest: float | None = None,
    steps: int = STEPS,
    batch_size: int = AT_ONCE,
) -> Tensor:
    """Find the largest eps at which each image is certified, by bisection.

    Parameters
    ----------
    classifier, images, labels, methods, batch_size
        As for `certify`.
    norm : {"linf", "l2"}, default "linf"
    goal : Goal, default Evade()
    mask : Tensor that broadcasts to the images, optional
    largest : float, optional
        The largest eps that is tried. Default: 1 in Linf, and the length of the diagonal of the
        pixels in L2.
    steps : int, default 12
        Halvings. The result is at most ``largest / 2**steps`` below the eps at which the methods
        stop proving, where their bounds loosen steadily.

    Returns
    -------
    Tensor of shape (N,), float64
        Every value was proven itself. 0 where nothing was proven, also for images that are wrong
        and accepted without an attack.

    Raises
    ------
    DemurError
        If something does not fit, or a layer has no bounds.

    Examples
    --------
    >>> import torch
    >>> from demur import Classifier
    >>> from demur.certificates import certified_radius
    >>> module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(2, 2, bias=False))
    >>> with torch.no_grad():
    ...     _ = module[1].weight.copy_(torch.eye(2))
    >>> images = torch.tensor([0.75, 0.25]).view(1, 1, 1, 2)
    >>> radius = certified_radius(Classifier(module, 2), images, torch.tensor([0]))
    >>> bool(0.2495 < radius < 0.25)  # half of the difference
    True
    """
    check_classifier(classifier)
    check_images(images)
    check_labels(labels, len(images), classifier.num_classes)
    check_counts(steps=steps)
    chosen = checked_methods(methods)
    if callable(getattr(classifier.module, "smoothed_radii", None)):
        raise DemurError(
            "randomized smoothing bounds its radii itself: see `radii` of the defence."
        )
    wanted = torch.ones(len(images), dtype=torch.bool)
    if largest is None:
        largest = 1.0 if norm == "linf" else float(images[0].numel() ** 0.5)
    start = ThreatModel(norm, largest, goal=Evade() if goal is None else goal, mask=mask)
    threat = checked_threat(start, images)

    def proven(eps: Tensor, some: Tensor) -> Tensor:
        given = replace(threat, eps=eps.to(images.device))
        found = proofs(classifier, images, labels.long(), given, chosen, some, batch_size)
        if found.unsupported is not None:
            raise DemurError(f"nothing can be proven: {found.unsupported} has no bounds.")
        return found.margin > 0

    high = torch.full((len(images),), float(largest), dtype=torch.float64)
    low = torch.zeros_like(high)
    whole = proven(high, wanted)
    low = torch.where(whole, high, low)
    for _ in range(steps):
        middle = (low + high) / 2
        found = proven(middle, ~whole)
        low = torch.where(found & ~whole, middle, low)
        high = torch.where(found, high, middle)
    return low
