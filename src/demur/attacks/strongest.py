"""The strongest answer that demur has: an ensemble of attacks, the worst of which counts, image by image."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from demur import seeds
from demur.attacks.apgd import apgd
from demur.attacks.carlini import carlini_l2
from demur.attacks.checks import check_bonus, check_counts, check_eps, check_request, given_goal
from demur.attacks.driver import AttackResult, GradientPrecision
from demur.attacks.frozen import frozen, kernels, widened
from demur.attacks.goals import Goal, Measure
from demur.attacks.minimum_norm import ddn, fmn, sigma_zero
from demur.attacks.norms import BALLS, Ball, per_image
from demur.attacks.pgd import pgd
from demur.attacks.regions import check_region
from demur.attacks.square import square
from demur.classifier import Classifier, device_of
from demur.errors import DemurError, unknown
from demur.hardware import tuned

WIDER = (0.3, 0.1)  # of gamma: what helped on neural rejection of MNIST and of the embedded digits


@dataclass(frozen=True, eq=False, repr=False)
class Strongest(AttackResult):
    """What the ensemble found. `by` names, for each image, the attack that broke it, or that changed it least; "" if none broke it."""

    by: tuple[str, ...]


@dataclass(frozen=True)
class _Part:
    """One attack of the ensemble: its name, the attack with all but images, goal, eps and region filled in, its loss, and how far
    kernels are widened for it.
    """

    name: str
    attack: Callable[..., AttackResult]
    by: Measure = "margin"
    takes_eps: bool = True
    factor: float = 1.0


def strongest(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    norm: str = "linf",
    eps: float | Tensor | None = None,
    steps: int = 100,
    targets: int = 9,
    queries: int = 5000,
    goal: Goal | None = None,
    region: Tensor | None = None,
    seed: int = 0,
    batch_size: int = 128,
    precision: GradientPrecision = "auto",
) -> Strongest:
    """Attack with one attack after the other, each on the images that are still unbroken; with no eps, keep the smallest change of all.

    With eps, in this order: one step of eps and pgd in 10 steps (most images of an undefended model fall here); then
    - linf, l2: apgd by margin, apgd by cross-entropy, apgd towards each of the `targets` best wanted classes, fmn (l2: ddn), and the
      score-based square with `queries`, which sees what gradients hide;
    - l1: pgd by margin and by cross-entropy from random starts, fmn;
    - l0: sigma_zero, fmn, pgd.
    With no eps: l2 ddn, fmn and carlini_l2; linf and l1 fmn with long and short steps; l0 sigma_zero and fmn. An attack that seeks the
    smallest change breaks an image if that is within eps. A classifier without gradients meets only square; one with kernel machines meets
    most of them thrice, twice with gradients through wider kernels (`widened`).

    Args:
        steps: of each attack; those that seek the smallest change take twice as many (sigma_zero and carlini_l2 ten times).
        goal: `Evade()` if None. Its `by` does not matter: the ensemble tries the losses.

    Images (N, C, H, W) in [0, 1], labels (N,). Passes are summed over the attacks. Raises: DemurError for input that does not fit.
    """
    check_request(classifier, images, labels, goal)
    check_counts(steps=steps, targets=targets, queries=queries, batch_size=batch_size)
    check_bonus(goal, eps)
    goal, region, labels = replace(given_goal(goal), by="margin"), check_region(region, images), labels.to(images.device)
    limits = None if eps is None else check_eps(eps, len(images), norm).to(images.device)
    common = {"batch_size": batch_size, "precision": precision}
    best: AttackResult | None = None
    margins = torch.zeros(0)
    by = [""] * len(images)
    parts = _ensemble(norm, limits is not None, _has_gradient(classifier, images), steps, targets, queries, seed, common)
    if images.ndim != 4 and len(parts) > 1:  # vectors have no squares
        parts = [part for part in parts if part.name != "square"]
    if kernels(classifier):
        parts = [wide for part in parts for wide in _wider(part)]
    for part in parts:
        left = torch.arange(len(images), device=images.device)
        if best is not None and limits is not None:
            left = (~best.found).nonzero().flatten()
            if not len(left):
                break
        options = {} if limits is None or not part.takes_eps else {"eps": limits[left]}
        here = None if region is None else region[left]
        sought = replace(goal.select(left), by=part.by)
        sought = sought if part.takes_eps else replace(sought, bonus=None)  # they follow the boundary alone
        with widened(classifier, part.factor):
            found = part.attack(classifier, images[left], labels[left], goal=sought, region=here, **options)
        if limits is not None and not part.takes_eps:
            found = _within(found, BALLS[norm](images[left], limits[left], here), images[left])
        reach = _margins(classifier, goal.select(left), found, labels[left], batch_size)
        if best is None:
            best, better, margins = found, found.found, reach
        else:
            best, better = _merge(best, found, left, reach > margins[left])
            margins[left] = margins[left].maximum(reach)
        for place in left[better].tolist():
            by[place] = part.name
    assert best is not None
    return Strongest(**vars(best), by=tuple(by))


def _ensemble(
    norm: str, bounded: bool, gradient: bool, steps: int, targets: int, queries: int, seed: int, common: dict[str, Any]
) -> list[_Part]:
    if norm not in BALLS:
        raise unknown("norm", norm, BALLS)
    search = partial(square, norm=norm, queries=queries, seed=seed, batch_size=common["batch_size"])
    if not gradient:
        if not bounded or norm not in ("linf", "l2"):
            raise DemurError("the classifier gives no gradient: only linf and l2, with an eps, can be attacked by its scores (square).")
        return [_Part("square", search)]
    fast = partial(fmn, norm=norm, steps=2 * steps, **common)
    decoupled = _Part("ddn", partial(ddn, steps=2 * steps, seed=seed, **common), takes_eps=False)
    walk = _Part("fmn", fast, takes_eps=False)
    fewest = _Part("sigma_zero", partial(sigma_zero, steps=10 * steps, **common), takes_eps=False)
    if not bounded:
        wide = _Part("fmn, other steps", partial(fast, step_size=1.0 if norm == "linf" else 10.0), takes_eps=False)
        wagner = _Part("carlini_l2", partial(carlini_l2, steps=10 * steps, **common), takes_eps=False)
        return {"l2": [decoupled, walk, wagner], "linf": [walk, wide], "l1": [walk, wide], "l0": [fewest, walk]}[norm]
    climb = partial(pgd, norm=norm, seed=seed, **common)
    leap, quick = _Part("fgs", partial(climb, steps=1)), _Part("pgd, 10 steps", partial(climb, steps=10))
    random = partial(climb, steps=steps, random_start=True, restarts=2)
    if norm == "l1":
        return [leap, quick, _Part("pgd", random), _Part("pgd, cross-entropy", random, "cross_entropy"), walk]
    if norm == "l0":
        return [leap, quick, fewest, walk, _Part("pgd", random)]
    auto = partial(apgd, norm=norm, steps=steps, seed=seed, **common)
    return [
        leap,
        quick,
        _Part("apgd", auto),
        _Part("apgd, cross-entropy", auto, "cross_entropy"),
        _Part("apgd, targeted", partial(auto, targets=targets)),
        decoupled if norm == "l2" else walk,
        _Part("square", search),
    ]


def _wider(part: _Part) -> list[_Part]:
    """The attack as it is, and, if it follows gradients for long enough to need them from afar, through wider kernels too."""
    if part.name in ("fgs", "square", "apgd, targeted", "carlini_l2"):
        return [part]
    return [part, *(replace(part, name=f"{part.name}, kernels {1 / factor:.3g} times as wide", factor=factor) for factor in WIDER)]


def _has_gradient(classifier: Classifier, images: Tensor) -> bool:
    image = images[:1].detach().to(device_of(classifier, images.device)).requires_grad_()
    with frozen(classifier), torch.enable_grad(), torch.random.fork_rng():
        return bool(classifier(image).requires_grad)


def _within(result: AttackResult, ball: Ball, clean: Tensor) -> AttackResult:
    """Take back what is found, but not allowed: the clean image is then the result and the attempt."""
    inside = result.found & ball.inside(result.images)
    images = torch.where(per_image(inside, clean), result.images, clean)
    return replace(result, images=images, attempts=images, found=inside, distance=torch.where(inside, result.distance, torch.inf))


@torch.no_grad()
def _margins(classifier: Classifier, goal: Goal, result: AttackResult, labels: Tensor, batch_size: int) -> Tensor:
    """By how much the best wanted column wins on what failed (N,): which of several failures came closest. Not an attacker's pass."""
    device, images = device_of(classifier, labels.device), result.attempts
    margins = torch.full((len(images),), torch.inf, device=images.device)
    with frozen(classifier), tuned(), torch.autocast(device.type, enabled=False), torch.random.fork_rng():
        torch.manual_seed(seeds.derive(0, "margins"))
        for rows in torch.split((~result.found).nonzero().flatten(), batch_size):
            if not len(rows):
                break
            scores = classifier(images[rows].to(device))
            reach = goal.select(rows).margin(scores, labels[rows].to(device, torch.int64), classifier.num_classes)
            margins[rows] = reach.to(margins).nan_to_num(nan=-torch.inf)
    return margins


def _merge(best: AttackResult, found: AttackResult, rows: Tensor, closer: Tensor) -> tuple[AttackResult, Tensor]:
    """Put what was found on the images of `rows` into the best so far, and the failures that came `closer`; tell what is better."""
    better = found.found & (found.distance < best.distance[rows])
    merged = {field.name: getattr(best, field.name).clone() for field in fields(AttackResult)}
    for name in ("images", "found", "distance"):
        merged[name][rows[better]] = getattr(found, name)[better]
    sent = better | (closer & ~best.found[rows])
    merged["attempts"][rows[sent]] = found.attempts[sent]
    for name in ("forwards", "backwards", "flat"):
        merged[name][rows] += getattr(found, name)
    return AttackResult(**merged), better
