"""`certify`: a proof, an attack that breaks it, or neither, for each image."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from demur.attacks import AttackResult
from demur.bounds import UnsupportedLayerError
from demur.certificates.problem import ALL_METHODS, METHODS, SPLITS, Method, Problem
from demur.certificates.status import Certificate, Status, UnsoundBoundError
from demur.classifier import (
    Classifier,
    check_classifier,
    check_counts,
    check_images,
    check_labels,
    device_of,
    evaluating,
)
from demur.errors import DemurError, unknown
from demur.goals import AnyError, ForceReject
from demur.hardware import tuned
from demur.masks import check_mask
from demur.norms import TOLERANCE, ball_of
from demur.progress import job
from demur.threat import ThreatModel, as_threat

AT_ONCE = 32


def certify(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel | str,
    methods: Sequence[str] = METHODS,
    result: AttackResult | None = None,
    *,
    batch_size: int = AT_ONCE,
    splits: int = SPLITS,
) -> Certificate:
    """Prove, image by image, that an attacker cannot reach the goal.

    The bounds are computed in float64, with an outward slack of 2^-19 relative to the sum of the
    sizes of their terms. They hold for attacks that exceed eps by 1e-6 of it, as attacks may (R1).

    Parameters
    ----------
    classifier : Classifier
        With any rule of rejection that has bounds: a learned reject column, a confidence threshold,
        certified consistency, machines with an RBF kernel.
    images : Tensor of shape (N, C, H, W), float in [0, 1]
    labels : Tensor of shape (N,), integers in 0..num_classes-1
    threat : ThreatModel or str
        Norm "linf" or "l2", with an eps. The goal says what is excluded; a mask shrinks the box.
    methods : sequence of str, default ("ibp", "crown-ibp", "crown")
        They run in this order, each on the images that are not proven yet. Two slower ones are
        "alpha-crown", which optimises the lower lines of rectifiers, and "branching", which also
        splits rectifiers. `CertifiedConsistency` by randomized smoothing is certified by smoothing
        alone.
    result : AttackResult, optional
        Of an attack on the same images. Where it succeeded within the threat, the image is BROKEN.
    batch_size : int, default 32
        Images at a time, at most: fewer where their intervals would take more than half a gigabyte.
    splits : int, default 100
        How many times "branching" splits the region for a wrong class, at most.

    Returns
    -------
    Certificate
        Where a layer has no bounds, every image is UNKNOWN or BROKEN, and `unsupported` names it.

    Raises
    ------
    DemurError
        If the threat has no eps or another norm, or something does not fit.
    UnsoundBoundError
        If an image is proven and broken.

    Examples
    --------
    >>> from demur import Classifier, data, networks
    >>> from demur.certificates import certify
    >>> test = data.load("digits", "test")
    >>> classifier = Classifier(networks.certified_cnn(10), 10)
    >>> certify(classifier, test.to_float()[:4], test.labels[:4], "linf:0.1", ("ibp",)).status.shape
    torch.Size([4])

    Notes
    -----
    IBP: Gowal et al. 2018. CROWN: Zhang et al. 2018. CROWN-IBP: Zhang et al. 2020. alpha-CROWN: Xu
    et al. 2021. Branching: Wang et al. 2021. Rejection: see docs/certificates.md.
    """
    check_classifier(classifier)
    check_images(images)
    check_labels(labels, len(images), classifier.num_classes)
    check_counts(batch_size=batch_size, splits=splits)
    chosen = checked_methods(methods)
    threat = checked_threat(threat, images)
    labels = labels.long()
    if callable(getattr(classifier.module, "smoothed_radii", None)):
        return certify_smoothed(classifier, images, labels, threat, result)
    scores = classifier.scores(images)
    threat.goal.check(labels, classifier.num_classes, scores.shape[1])
    broken = threat.goal.success(scores, labels.to(scores.device), classifier.num_classes).cpu()
    if result is not None:
        broken |= _broken_by(classifier, images, labels, threat, result)
    found = proofs(classifier, images, labels, threat, chosen, ~broken, batch_size, splits)
    if result is not None or bool(broken.any()):
        _check_sound(classifier, images, labels, threat, broken, chosen, batch_size, splits)
    status = torch.where(found.margin > 0, int(Status.CERTIFIED), int(Status.UNKNOWN))
    status = torch.where(broken, int(Status.BROKEN), status)
    proven = status == Status.CERTIFIED
    return Certificate(status, found.margin, found.by, proven.double(), found.unsupported)


def certify_smoothed(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    result: AttackResult | None,
) -> Certificate:
    """Certify certified consistency by randomized smoothing, with draws of its own.

    An image is certified for `Evade` and `Target` if the smoothed classifier is right within R, and
    R + delta is above eps; in Linf, above the length of the diagonal of the box.
    """
    scores = classifier.scores(images)
    classes = classifier.num_classes
    threat.goal.check(labels, classes, scores.shape[1])
    broken = threat.goal.success(scores, labels.to(scores.device), classes).cpu()
    if result is not None:
        broken |= _broken_by(classifier, images, labels, threat, result)
    device = device_of(classifier, images.device)
    module: Any = classifier.module
    with evaluating(classifier):
        answers, radii, delta, alpha = module.smoothed_radii(images.to(device))
    eps = torch.as_tensor(threat.eps).cpu() * (1 + TOLERANCE)
    eps = eps if threat.norm == "l2" else eps * images[0].numel() ** 0.5
    margin = radii.cpu() - (eps - delta).clamp(min=0)
    right = (answers.cpu() == labels.cpu()) & (radii.cpu() > 0)
    hidden = isinstance(threat.goal, AnyError | ForceReject)
    margin = margin.masked_fill(~right | hidden, -torch.inf)
    proven = margin > 0
    status = torch.where(proven, int(Status.CERTIFIED), int(Status.UNKNOWN))
    status = torch.where(broken, int(Status.BROKEN), status)
    certified = status == Status.CERTIFIED
    by = tuple("smoothing" if one else "" for one in certified.tolist())
    both = int((proven & broken).sum())
    return Certificate(status, margin, by, certified.double() * (1 - alpha), None, both)


@dataclass(frozen=True)
class Proofs:
    """Margins (N,) float64, the method that proved each image, and the layer without bounds."""

    margin: Tensor
    by: tuple[str, ...]
    unsupported: str | None


def proofs(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    methods: Sequence[Method],
    wanted: Tensor,
    batch_size: int,
    splits: int = SPLITS,
) -> Proofs:
    """Bound the margins of the images that are wanted (N,)."""
    margin = torch.full((len(images),), -torch.inf, dtype=torch.float64)
    by = [""] * len(images)
    device = device_of(classifier, images.device)
    try:
        problem = Problem.of(classifier, images[:2].to(device), splits)
        precise = torch.autocast(device.type, enabled=False)
        with torch.no_grad(), tuned(), precise, job("certificates", len(methods)) as progress:
            for method in methods:
                left = (wanted & ~(margin > 0)).nonzero().flatten()
                if not len(left):
                    break
                for index in torch.split(left, min(batch_size, problem.at_once)):
                    some = threat.select(index.to(images.device), images)
                    given = images[index.to(images.device)].to(device)
                    true = labels[index.to(labels.device)].to(device)
                    found = problem.margin(given, true, some, method).cpu()
                    found = found.nan_to_num(-torch.inf, torch.inf, -torch.inf)
                    margin[index] = torch.maximum(margin[index], found)
                    for place in index[found > 0].tolist():
                        by[place] = by[place] or method
                progress.advance(1, method)
    except UnsupportedLayerError as error:
        nothing = torch.full_like(margin, -torch.inf)
        return Proofs(nothing, ("",) * len(images), f"{error.layer}: {error.reason}")
    return Proofs(margin, tuple(by), None)


def checked_methods(methods: Sequence[str]) -> tuple[Method, ...]:
    """Give the methods, or raise DemurError."""
    named = [methods] if isinstance(methods, str) else list(methods)
    if not named:
        raise DemurError(f"name at least one method: {', '.join(ALL_METHODS)}.")
    known: dict[str, Method] = {one: one for one in ALL_METHODS}
    for one in named:
        if one not in known:
            raise unknown("method of certificates", str(one), ALL_METHODS)
    return tuple(known[one] for one in named)


def checked_threat(threat: ThreatModel | str, images: Tensor) -> ThreatModel:
    """Give a threat whose eps is one number for each image, or raise DemurError."""
    threat = as_threat(threat)
    if threat.norm not in ("linf", "l2"):
        raise DemurError(f"certificates know the norms linf and l2, not {threat.norm}.")
    if threat.eps is None:
        raise DemurError(
            f"a certificate needs an eps: write {threat.norm}:EPS, or ask certified_radius for the "
            "largest eps that is proven."
        )
    eps = torch.as_tensor(threat.eps, dtype=torch.float64).cpu()
    if eps.ndim and len(eps) != len(images):
        raise DemurError(f"eps has {len(eps)} numbers for {len(images)} images.")
    ball_of(threat.norm).check_mask(threat.mask)
    mask = check_mask(threat.mask, images)
    return replace(threat, eps=eps.expand(len(images)).to(images.device), mask=mask)


def _broken_by(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    result: AttackResult,
) -> Tensor:
    """Flag the images that a result breaks within the threat, decided again."""
    if result.images.shape != images.shape:
        raise DemurError(
            f"the result is of images {tuple(result.images.shape)}, not of {tuple(images.shape)}."
        )
    attacked = result.images.to(images)
    eps = torch.as_tensor(threat.eps).to(images.device)
    ball = ball_of(threat.norm)(images, eps, threat.mask)
    inside = result.success.to(images.device) & ball.contains(attacked)
    scores = classifier.scores(attacked)
    reached = threat.goal.success(scores, labels.to(scores.device), classifier.num_classes)
    return (inside & reached).cpu()


def _check_sound(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    broken: Tensor,
    methods: Sequence[Method],
    batch_size: int,
    splits: int,
) -> None:
    """Raise UnsoundBoundError if a broken image is proven by one of the methods."""
    found = proofs(classifier, images, labels, threat, methods, broken, batch_size, splits)
    both = (broken & (found.margin > 0)).nonzero().flatten().tolist()
    if both:
        raise UnsoundBoundError(
            f"image {both[0]} is broken, and {found.by[both[0]]} proves it: a bound of demur is "
            "wrong. Please report the model and the image."
        )
