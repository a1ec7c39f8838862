"""The driver that every attack runs on: batches, restarts, per-image draws, costs, what is kept, and what must hold (R1-R6).

An attack is a function of a `Problem`: a batch of images that are not solved yet. It asks the problem for gradients and
evaluations at candidates of its choice; the problem confines, counts, and keeps what succeeds. A loop that carries its own
state passes it through `unsolved`, which drops what belongs to images that are solved:

    def attack(problem):
        images = problem.images
        for _ in range(steps):
            gradient = problem.gradient(images)
            images, gradient = problem.unsolved(images, gradient)
            images = problem.ball.confine(images + step_size * problem.ball.ascent(gradient))
        problem.evaluate(images)
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from demur import seeds
from demur.attacks.goals import Goal
from demur.attacks.norms import Ball, ball_of
from demur.attacks.regions import check_region
from demur.classifier import Classifier, check_images, check_labels, device_of, evaluating
from demur.errors import DemurError
from demur.hardware import tuned
from demur.progress import job


@dataclass(frozen=True)
class AttackResult:
    """What an attack found, in the order of the images, on their device.

    Attributes:
        images: (N, C, H, W); the attacked image where `found`, else the clean one, bit for bit.
        found: (N,) bool; the goal is reached, re-checked by a fresh forward pass at another batch size. An image that
            reaches the goal without a change counts as found (R9).
        attempts: (N, C, H, W); what an attacker would send who cannot check: the best candidate, by success first and then
            by loss. Equals `images` where found.
        forwards, backwards: (N,) int64; passes that the attack spent on the image (the re-check is not the attack's).
        flat: (N,) int64; how many of its gradients were zero or not finite. Where they are many, the attack was blind (R14).
    """

    images: Tensor
    found: Tensor
    attempts: Tensor
    forwards: Tensor
    backwards: Tensor
    flat: Tensor


class _Book:
    """What is known of all images so far."""

    def __init__(self, images: Tensor) -> None:
        count = len(images)
        self.attempts = images.clone()
        self.loss = torch.full((count,), -torch.inf, dtype=torch.float64)
        self.found = torch.zeros(count, dtype=torch.bool)
        self.forwards, self.backwards, self.flat = (torch.zeros(count, dtype=torch.int64) for _ in range(3))


class Problem:
    """A batch of images that an attack is to solve. Its tensors shrink together, in `unsolved`.

    Attributes:
        images, labels: the clean images (n, C, H, W) and their labels (n,), on the classifier's device.
        ball: what is allowed around them.
        keys: a number for each image that depends on its pixels alone.
    """

    def __init__(
        self, classifier: Classifier, goal: Goal, ball: Ball, labels: Tensor, rows: Tensor, book: _Book, seed: tuple[int, int]
    ) -> None:
        self._classifier, self._goal, self._rows, self._book, self._seed = classifier, goal, rows, book, seed
        self.ball, self.labels, self.images = ball, labels, ball.clean
        self.keys = seeds.image_keys(ball.clean)

    def gradient(self, candidates: Tensor, record: bool = True) -> Tensor:
        """Gradient of the goal's loss at the candidates, 0 where it is not finite. One forward and one backward an image.

        With `record` the candidates count as attempts, and as found where they succeed.

        Raises: DemurError if the classifier cannot be differentiated.
        """
        candidates = candidates.detach().requires_grad_()
        with torch.enable_grad():
            scores = self._classifier(candidates)
            loss = self._goal.loss(scores, self.labels, self._classifier.num_classes)
            if not loss.requires_grad:
                raise DemurError("the classifier gives no gradient with respect to its images; use an attack that needs only scores.")
            (gradient,) = torch.autograd.grad(loss.sum(), candidates)
        unusable = ~torch.isfinite(gradient)
        gradient = gradient.masked_fill(unusable, 0)
        flat = ~gradient.flatten(1).any(1) | unusable.flatten(1).any(1)
        self._count(forwards=1, backwards=1, flat=flat)
        if record:
            self._record(candidates.detach(), scores.detach(), loss.detach())
        return gradient

    @torch.no_grad()
    def evaluate(self, candidates: Tensor) -> Tensor:
        """Loss (n,) of the goal at the candidates, which count as attempts, and as found where they succeed. One forward an image."""
        scores = self._classifier(candidates)
        loss = self._goal.loss(scores, self.labels, self._classifier.num_classes)
        self._count(forwards=1)
        self._record(candidates, scores, loss)
        return loss

    def unsolved(self, *state: Tensor) -> tuple[Tensor, ...]:
        """Drop the solved images from the problem, and their rows from the attack's own tensors, which are given back."""
        keep = ~self._book.found[self._rows]
        if bool(keep.all()):
            return state
        index = keep.nonzero().flatten()
        self._rows = self._rows[index]
        self.keys = [self.keys[i] for i in index.tolist()]
        index = index.to(self.labels.device)
        self.ball, self.labels, self._goal = self.ball.select(index), self.labels[index], self._goal.select(index)
        self.images = self.ball.clean
        return tuple(tensor[index] for tensor in state)

    def random_start(self) -> Tensor:
        """Allowed images (n, C, H, W) drawn at random, by image, restart and seed."""
        return self.ball.random(self.keys, *self._seed)

    def _count(self, forwards: int = 0, backwards: int = 0, flat: Tensor | None = None) -> None:
        live = self._rows[~self._book.found[self._rows]]
        self._book.forwards[live] += forwards
        self._book.backwards[live] += backwards
        if flat is not None:
            self._book.flat[self._rows] += flat.cpu() & ~self._book.found[self._rows]

    def _record(self, candidates: Tensor, scores: Tensor, loss: Tensor) -> None:
        """Keep what is better than what is known: the first success, and until then the largest loss (R5)."""
        success = self._goal.success(scores, self.labels, self._classifier.num_classes).cpu()
        loss = loss.double().nan_to_num(nan=-torch.inf).cpu()
        book, rows = self._book, self._rows
        better = ~book.found[rows] & (success | (loss > book.loss[rows]))
        index = better.nonzero().flatten()
        book.attempts[rows[index]] = candidates[index.to(candidates.device)].to(book.attempts)
        book.loss[rows[index]] = loss[index]
        book.found[rows[index]] = success[index]


def drive(
    attack: Callable[[Problem], object],
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    goal: Goal,
    norm: str,
    eps: float | Tensor,
    region: Tensor | None = None,
    restarts: int = 1,
    seed: int = 0,
    batch_size: int = 128,
) -> AttackResult:
    """Run an attack on images (N, C, H, W) in [0, 1] with labels (N,), and give what it found.

    Args:
        attack: see the module's text; its candidates must come from `problem.ball`.
        goal: what counts as success.
        norm, eps, region: what is allowed: `linf` or `l2`, the largest change (one, or (N,) one for each), and where.
        restarts: how often the attack runs on an image that it has not solved; each run has its own draws.
        seed: the draws depend on it, on the image's pixels and on the restart: not on batches, order or other images.
        batch_size: images attacked at once; changes no result beyond float32 rounding.

    Raises: DemurError for input that does not fit (range, dtype, NaN, shape, label, region, eps, goal).
    """
    check_images(images)
    check_labels(labels, len(images), classifier.num_classes)
    if images.dtype not in (torch.float32, torch.float64):
        raise DemurError(f"attacks need float32 or float64 images, not {images.dtype}.")
    if restarts < 1 or batch_size < 1:
        raise DemurError(f"restarts and batch_size must be at least 1, not {restarts} and {batch_size}.")
    images, labels = images.detach(), labels.to(images.device)
    limits, region, kind = check_eps(eps, len(images)), check_region(region, images), ball_of(norm)
    device = device_of(classifier, images.device)
    book = _Book(images.cpu())

    def problem(rows: Tensor, restart: int) -> Problem:
        here = rows.to(images.device)
        ball = kind(images[here].to(device), limits[rows].to(device), None if region is None else region[here].to(device, images.dtype))
        return Problem(classifier, goal.select(here), ball, labels[here].to(device, torch.int64), rows, book, (seed, restart))

    with tuned(), _frozen(classifier), job("attack", restarts * len(images)) as progress:
        goal.check(labels, classifier.num_classes, _columns(classifier, images[:1].to(device)))
        for restart in range(restarts):
            for rows in _batches(~book.found, batch_size):
                attack(problem(rows, restart))
                progress.advance(len(rows))
        # The clean image is always allowed: an attacker who found nothing better still has it.
        attempts = book.attempts.clone()
        for rows in _batches(~book.found, batch_size):
            clean = problem(rows, 0)
            clean.evaluate(clean.images)
        book.attempts = torch.where(_like(book.found, attempts), book.attempts, attempts)
        found = book.found & _recheck(classifier, goal, book, labels, batch_size + 1, device)

    clean_images = images.cpu()
    result = torch.where(_like(found, clean_images), book.attempts, clean_images)
    _hold_invariants(kind, clean_images, (result, book.attempts), limits, None if region is None else region.cpu())
    tensors = (result, found, book.attempts, book.forwards, book.backwards, book.flat)
    return AttackResult(*(tensor.to(images.device) for tensor in tensors))


def check_eps(eps: float | Tensor, count: int) -> Tensor:
    """Limits (count,) in float64 of an eps that is one number or one for each image.

    Raises: DemurError if it is negative, not finite, or of another shape.
    """
    limits = torch.as_tensor(eps, dtype=torch.float64).detach().cpu()
    if limits.ndim > 1 or (limits.ndim == 1 and len(limits) != count):
        raise DemurError(f"eps must be one number, or one for each of the {count} images, not of shape {tuple(limits.shape)}.")
    if not bool(torch.isfinite(limits).all()) or bool((limits < 0).any()):
        raise DemurError("eps must be finite and not negative.")
    return limits.expand(count)


def _batches(chosen: Tensor, batch_size: int) -> list[Tensor]:
    """Indices of the chosen (N,) bool, in batches; none where none is chosen."""
    index = chosen.nonzero().flatten()
    return [index[start : start + batch_size] for start in range(0, len(index), batch_size)]


def _like(flags: Tensor, images: Tensor) -> Tensor:
    return flags.reshape(-1, *[1] * (images.ndim - 1))


@torch.no_grad()
def _columns(classifier: Classifier, image: Tensor) -> int:
    return int(classifier(image).shape[1])


@torch.no_grad()
def _recheck(classifier: Classifier, goal: Goal, book: _Book, labels: Tensor, batch_size: int, device: torch.device) -> Tensor:
    """Whether the found images still reach the goal, in batches of another size (R3): (N,) bool."""
    holds = torch.zeros_like(book.found)
    for rows in _batches(book.found, batch_size):
        here = rows.to(labels.device)
        scores = classifier(book.attempts[rows].to(device))
        holds[rows] = goal.select(here).success(scores, labels[here].to(device, torch.int64), classifier.num_classes).cpu()
    return holds


def _hold_invariants(kind: type[Ball], clean: Tensor, results: Sequence[Tensor], limits: Tensor, region: Tensor | None) -> None:
    """Fail loudly if an attack returns what is not allowed (R1): a fault of the attack, never of its user."""
    for images in results:
        # In pieces: the check works in float64.
        for rows in _batches(torch.ones(len(clean), dtype=torch.bool), 1024):
            ball = kind(clean[rows], limits[rows], None if region is None else region[rows])
            outside = int((~ball.inside(images[rows])).sum())
            if outside:
                raise AssertionError(f"R1: the attack left the allowed region on {outside} of {len(rows)} images.")


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Inside: evaluation mode, and no gradients for the parameters, which halves the backward pass. Restored afterwards."""
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    with evaluating(module):
        for parameter in wanted:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in wanted:
                parameter.requires_grad_(True)
