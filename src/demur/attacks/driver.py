"""The driver that every attack runs on: batches, restarts, per-image draws, costs, what is kept, and what must hold (R1-R6).

An attack is a function of a `Problem`: a batch of images that are not solved yet. It asks the problem to differentiate or
evaluate candidates of its choice; the problem counts, and keeps what succeeds: the first success within eps, or, where the
smallest change is sought, the smallest. A loop that carries its own state passes it through `unsolved`, which drops what belongs
to images that need no more work:

    def attack(problem):
        images = problem.images
        for _ in range(steps):
            gradient = problem.differentiate(images).gradient
            images, gradient = problem.unsolved(images, gradient)
            images = problem.ball.confine(images + step_size * problem.ball.ascent(gradient))
        problem.evaluate(images)
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from demur import seeds
from demur.attacks.checks import check_answers, check_bonus, check_counts, check_eps, check_request, warn_if_blind
from demur.attacks.frozen import channels_last, frozen
from demur.attacks.goals import NEVER, Goal
from demur.attacks.norms import Ball, ball_of, per_image
from demur.attacks.regions import check_region
from demur.classifier import Classifier, check_images, device_of
from demur.errors import DemurError, unknown
from demur.hardware import has_fast_bfloat16, tuned
from demur.progress import job

GradientPrecision = Literal["auto", "float32", "bfloat16"]
"""In what the passes for gradients compute: `auto` is bfloat16 where the hardware has it. Decisions are always made in float32."""

# A change that is sought to be small ends at the very boundary, where the next batch size rounds it to the other side.
DECISIVE = 1e-5
NO_GRADIENT = "the classifier gives no gradient with respect to its images; use an attack that needs only scores."


@dataclass(frozen=True, eq=False, repr=False)
class AttackResult:
    """What an attack found, in the order of the images, on their device.

    Attributes:
        images: (N, C, H, W); the attacked image where `found`, else the clean one, bit for bit.
        found: (N,) bool; the goal is reached, re-checked by a fresh forward pass at another batch size. An image that
            reaches the goal without a change counts as found (R9).
        attempts: (N, C, H, W); what an attacker would send who cannot check: the best candidate, by success first and then
            by loss. Equals `images` where found.
        distance: (N,) float64; size of the change in the attack's norm, infinite where not found. Where the region scales eps, the
            smallest eps that allows the change.
        forwards, backwards: (N,) int64; passes that the attack spent on the image (the re-check is not the attack's).
        flat: (N,) int64; how many of its gradients were zero or not finite. Where they are many, the attack was blind (R14).
    """

    images: Tensor
    found: Tensor
    attempts: Tensor
    distance: Tensor
    forwards: Tensor
    backwards: Tensor
    flat: Tensor

    def __repr__(self) -> str:
        """One line, without the tensors."""
        found = int(self.found.sum())
        middle = f", median distance {float(self.distance[self.found].median()):.4g}" if found else ""
        passes = f"{float(self.forwards.double().mean()):.0f} forwards and {float(self.backwards.double().mean()):.0f} backwards an image"
        flat = int(self.flat.sum()) / max(1, int(self.backwards.sum()))
        blind = f", {flat:.0%} of them without a gradient" if flat >= 0.005 else ""
        return f"{type(self).__name__}({found} of {len(self.found)} found{middle}; {passes}{blind})"


class Seen(NamedTuple):
    """What candidates came to: the goal's loss (n,), whether they succeed (n,), the gradient (empty if not asked for), and the scores."""

    loss: Tensor
    success: Tensor
    gradient: Tensor
    scores: Tensor

    def keep(self, keep: Tensor) -> "Seen":
        """What the candidates of `keep` (n,) bool came to."""
        return Seen(*(tensor[keep] for tensor in self))


class _Book:
    """What is known of all images so far."""

    def __init__(self, images: Tensor, smallest: bool) -> None:
        count = len(images)
        self.smallest = smallest
        self.attempts = images.clone()
        self.loss = torch.full((count,), -torch.inf, dtype=torch.float64)
        self.distance = torch.full((count,), torch.inf, dtype=torch.float64)
        self.found, self.done = torch.zeros(count, dtype=torch.bool), torch.zeros(count, dtype=torch.bool)
        self.forwards, self.backwards, self.flat = (torch.zeros(count, dtype=torch.int64) for _ in range(3))


class Problem:
    """A batch of images that an attack is to solve. Its tensors shrink together, in `unsolved`.

    Attributes:
        images, labels: the clean images (n, C, H, W) and their labels (n,), on the classifier's device.
        start: where the caller wants the attack to start (n, C, H, W): the clean images if nowhere else.
        goal: what counts as success.
        ball: what is allowed around the images.
        keys: a number for each image that depends on its pixels alone.
        seed, names: with the key, what an image's draws depend on; the first name is the `restart`, counted from 0.
        half: whether gradients are computed in bfloat16.
    """

    def __init__(
        self,
        classifier: Classifier,
        goal: Goal,
        ball: Ball,
        labels: Tensor,
        start: Tensor | None,
        rows: Tensor,
        book: _Book,
        seed: tuple[int, int],
        half: bool,
    ) -> None:
        self._classifier, self._rows, self._book, self.half = classifier, rows, book, half
        self.goal, self.ball, self.labels, self.images = goal, ball, labels, ball.clean
        self.num_classes = classifier.num_classes
        self.start = ball.clean if start is None else ball.confine(start)
        self.keys = seeds.image_keys(ball.clean)
        self.seed, self.restart = seed
        self.names: tuple[object, ...] = (self.restart,)

    def differentiate(self, candidates: Tensor, record: bool = True) -> Seen:
        """Loss, success and gradient at the candidates, the gradient 0 where it is not finite or the region is 0.

        One forward and one backward an image. With `record` the candidates count as attempts, and as found where they succeed. Where
        gradients are computed in bfloat16, a success that would be kept is looked at again in float32, for one more forward.

        Raises: DemurError if the classifier cannot be differentiated.
        """
        candidates = candidates.detach().requires_grad_()
        kind = candidates.device.type
        with torch.enable_grad(), torch.autocast(kind, torch.bfloat16, enabled=self.half):
            given = candidates.clone(memory_format=torch.channels_last) if candidates.ndim == 4 else candidates
            scores = self._classifier(given)
            bonus = None if self.goal.bonus is None else self.goal.bonus(given)
        with torch.enable_grad():
            scores = scores if scores.dtype == torch.float64 else scores.float()
            loss = self.goal.loss(scores, self.labels, self.num_classes)
            loss = loss if bonus is None else loss + bonus.to(loss)
            if not loss.requires_grad:
                raise DemurError(NO_GRADIENT)
            (gradient,) = torch.autograd.grad(loss.sum(), candidates, allow_unused=True)
            if gradient is None:
                raise DemurError(NO_GRADIENT)
        unusable, region = ~torch.isfinite(gradient), self.ball.region
        gradient = gradient.masked_fill(unusable if region is None else unusable | (region == 0), 0).contiguous()
        flat = ~gradient.flatten(1).any(1) | unusable.flatten(1).any(1)
        self._count(forwards=1, backwards=1, flat=flat)
        candidates, scores, loss = candidates.detach(), scores.detach(), loss.detach()
        success = self._record(candidates, scores, loss, self.half) if record else self._success(scores)
        return Seen(loss, success, gradient, scores)

    @torch.no_grad()
    def evaluate(self, candidates: Tensor) -> Seen:
        """Loss and success at the candidates, which count as attempts, and as found where they succeed. One forward an image."""
        scores = self._classifier(candidates)
        loss = self.goal.loss(scores, self.labels, self.num_classes)
        loss = loss if self.goal.bonus is None else loss + self.goal.bonus(candidates).to(loss)
        self._count(forwards=1)
        return Seen(loss, self._record(candidates, scores, loss, False), torch.zeros_like(candidates[:0]), scores)

    def unsolved(self, *state: Tensor) -> tuple[Tensor, ...]:
        """Drop the solved images from the problem, and their rows from the attack's own tensors, which are given back."""
        keep = ~self._book.done[self._rows]
        return state if bool(keep.all()) else self.keep(keep, *state)

    def keep(self, keep: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """Go on with the images of `keep` (n,) bool alone: the attack has nothing more to try on the others."""
        index = keep.nonzero().flatten()
        self._rows = self._rows[index.cpu()]
        self.keys = [self.keys[i] for i in index.tolist()]
        index = index.to(self.labels.device)
        self.ball, self.labels, self.goal = self.ball.select(index), self.labels[index], self.goal.select(index)
        self.images, self.start = self.ball.clean, self.start[index]
        return tuple(tensor[index] for tensor in state)

    def part(self, *names: object) -> "Problem":
        """Give a problem of the same images that may `keep` fewer, for what an attack tries in between; `names` tell its draws apart."""
        part = copy(self)
        part.names = (*self.names, *names)
        return part

    def random_start(self) -> Tensor:
        """Allowed images (n, C, H, W) drawn at random, by image, restart and seed."""
        return self.ball.random(self.keys, self.seed, *self.names)

    def best(self) -> tuple[Tensor, Tensor]:
        """Give the best candidates so far (n, C, H, W), and their size in the norm (n,): infinite where none succeeded."""
        where = self.images.device
        return self._book.attempts[self._rows].to(self.images), self._book.distance[self._rows].to(where)

    def shorten(self, steps: int = 10) -> None:
        """Bisect between the best candidates and the clean images for the smallest success on that line."""
        best, _ = self.best()
        found = self._book.found[self._rows].to(best.device)
        low, high = torch.zeros(len(best), device=best.device), torch.ones(len(best), device=best.device)
        for _ in range(steps):
            middle = (low + high) / 2
            there = self.images + (best - self.images) * per_image(middle, best).to(best.dtype)
            success = self.evaluate(torch.where(per_image(found, best), there, best)).success
            low, high = torch.where(success, low, middle), torch.where(success, middle, high)

    def _success(self, scores: Tensor) -> Tensor:
        return self.goal.success(scores, self.labels, self.num_classes)

    def _holds(self, goal: Goal, scores: Tensor, labels: Tensor) -> Tensor:
        """Tell which succeed (n,); where the smallest change is sought, clearly so: the next batch size rounds otherwise."""
        success = goal.success(scores, labels, self.num_classes)
        if not self._book.smallest:
            return success
        margin = goal.margin(scores, labels, self.num_classes) - goal.confidence
        return success & (margin >= DECISIVE * scores.abs().amax(1))

    def _count(self, forwards: int = 0, backwards: int = 0, flat: Tensor | None = None) -> None:
        live, passes = self._rows[~self._book.done[self._rows]], 1 if self.goal.bonus is None else 2
        self._book.forwards[live] += passes * forwards
        self._book.backwards[live] += passes * backwards
        if flat is not None:
            self._book.flat[self._rows] += flat.cpu() & ~self._book.done[self._rows]

    @torch.no_grad()
    def _record(self, candidates: Tensor, scores: Tensor, loss: Tensor, tentative: bool) -> Tensor:
        """Keep what is better than what is known, by success first, and then by size or by loss (R5); give what succeeds (n,)."""
        book, rows = self._book, self._rows
        success, known = self._success(scores), book.found[rows]
        distance = self.ball.radius(candidates - self.images).cpu() if book.smallest else torch.zeros(len(rows), dtype=torch.float64)
        if book.smallest:
            success = success & (self._holds(self.goal, scores, self.labels) | (distance == 0).to(success.device))
        better = success.cpu() & ((distance < book.distance[rows]) if book.smallest else ~known)
        if tentative and bool(better.any()):
            index = better.nonzero().flatten().to(candidates.device)
            again = self._classifier(candidates[index])
            holds = self._holds(self.goal.select(index), again, self.labels[index])
            book.forwards[rows[better]] += 1
            success = success.index_put((index,), holds)
            better[better.clone()] = holds.cpu()
        loss = loss.double().nan_to_num(nan=-torch.inf).cpu()
        closer = ~known & ~better & (loss > book.loss[rows])
        index = (better | closer).nonzero().flatten()
        book.attempts[rows[index]] = candidates[index.to(candidates.device)].to(book.attempts)
        book.loss[rows[closer]] = loss[closer]
        book.found[rows[better]], book.distance[rows[better]] = True, distance[better]
        book.done[rows[better]] = True if not book.smallest else distance[better] == 0
        return success


def drive(
    attack: Callable[[Problem], object],
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    goal: Goal,
    norm: str,
    eps: float | Tensor | None,
    region: Tensor | None = None,
    restarts: int = 1,
    seed: int = 0,
    batch_size: int = 128,
    start: Tensor | None = None,
    precision: GradientPrecision = "float32",
) -> AttackResult:
    """Run an attack on images (N, C, H, W) in [0, 1] with labels (N,), and give what it found.

    Args:
        attack: see the module's text; its candidates must come from `problem.ball`.
        goal: what counts as success.
        norm, eps, region: what is allowed: `linf`, `l2`, `l1` or `l0`, the largest change (one, or (N,) one for each), and where.
            With no eps the smallest change is sought, and an image is solved only if it needs none.
        restarts: how often the attack runs on an image that it has not solved; each run has its own draws.
        seed: the draws depend on it, on the image's pixels and on the restart: not on batches, order or other images.
        batch_size: images attacked at once; changes no result beyond rounding.
        start: (N, C, H, W) where the first run starts, moved to the nearest allowed image; or (R, N, C, H, W), where the first R runs do.
        precision: of the passes for gradients. Decisions are made in float32, whatever it is.

    Raises: DemurError for input that does not fit (range, dtype, NaN, shape, label, region, eps, goal).
    """
    check_request(classifier, images, labels, goal)
    check_bonus(goal, eps)
    check_counts(restarts=restarts, batch_size=batch_size)
    starts = [] if start is None else [start] if start.ndim == images.ndim else list(start)
    if len(starts) > restarts:
        raise DemurError(f"there are {len(starts)} starts, but restarts is {restarts}: each start is a run's.")
    for one in starts:
        check_images(one)
        if one.shape != images.shape:
            raise DemurError(f"the attack's start has shape {tuple(one.shape)}, the images {tuple(images.shape)}.")
    images, labels, kind = images.detach(), labels.to(images.device), ball_of(norm)
    limits, region = check_eps(kind.largest(images) if eps is None else eps, len(images), norm), check_region(region, images)
    device = device_of(classifier, images.device)
    half = _half(precision, device)
    book = _Book(images.cpu(), smallest=eps is None)

    def problem(rows: Tensor, restart: int) -> Problem:
        here = rows.to(images.device)
        ball = kind(images[here].to(device), limits[rows].to(device), None if region is None else region[here].to(device, images.dtype))
        begin = starts[restart][here].to(device, images.dtype) if restart < len(starts) else None
        there = labels[here].to(device, torch.int64)
        return Problem(classifier, goal.select(here), ball, there, begin, rows, book, (seed, restart), half)

    float32, forked = torch.autocast(device.type, enabled=False), torch.random.fork_rng()  # whatever the caller has switched on
    with tuned(), frozen(classifier), float32, forked, job("attack", restarts * len(images)) as progress:
        torch.manual_seed(seeds.derive(seed, "classifier"))  # for what a randomised classifier draws
        with channels_last(classifier):
            if book.smallest:
                for rows in _batches(~book.done, batch_size):
                    problem(rows, 0).evaluate(images[rows.to(images.device)].to(device))
            for restart in range(restarts):
                for rows in _batches(~book.done, batch_size):
                    attack(problem(rows, restart))
                    progress.advance(len(rows))
            # The clean image is always allowed: an attacker who found nothing better still has it.
            attempts = book.attempts.clone()
            endless = book.smallest or goal.confidence >= NEVER  # nothing is to be found on the clean image
            for rows in [] if endless else _batches(~book.found, batch_size):
                clean = problem(rows, 0)
                clean.evaluate(clean.images)
            book.attempts = torch.where(per_image(book.found, attempts), book.attempts, attempts)
        check_answers(book.found | book.loss.isfinite())
        if region is None or bool(region.any()):  # an attacker who may act nowhere is not blind
            warn_if_blind(int(book.flat.sum()), int(book.backwards.sum()))
        found = book.found & _recheck(classifier, goal, book, labels, batch_size + 1, device)

    clean_images = images.cpu()
    result = torch.where(per_image(found, clean_images), book.attempts, clean_images)
    radius = _measure(kind, clean_images, (book.attempts, result), limits, None if region is None else region.cpu())
    distance = torch.where(found, radius, torch.inf)
    tensors = (result, found, book.attempts, distance, book.forwards, book.backwards, book.flat)
    return AttackResult(*(tensor.to(images.device) for tensor in tensors))


def _half(precision: str, device: torch.device) -> bool:
    if precision not in get_args(GradientPrecision):
        raise unknown("precision", precision, get_args(GradientPrecision))
    return precision == "bfloat16" or (precision == "auto" and has_fast_bfloat16(device))


def _batches(chosen: Tensor, batch_size: int) -> list[Tensor]:
    """Indices of the chosen (N,) bool, in batches; none where none is chosen."""
    index = chosen.nonzero().flatten()
    return [index[start : start + batch_size] for start in range(0, len(index), batch_size)]


@torch.no_grad()
def _recheck(classifier: Classifier, goal: Goal, book: _Book, labels: Tensor, batch_size: int, device: torch.device) -> Tensor:
    """Whether the found images still reach the goal, in batches of another size (R3): (N,) bool."""
    holds = torch.zeros_like(book.found)
    for rows in _batches(book.found, batch_size):
        here = rows.to(labels.device)
        scores = classifier(book.attempts[rows].to(device))
        holds[rows] = goal.select(here).success(scores, labels[here].to(device, torch.int64), classifier.num_classes).cpu()
    return holds


def _measure(kind: type[Ball], clean: Tensor, results: Sequence[Tensor], limits: Tensor, region: Tensor | None) -> Tensor:
    """Radius (N,) of the last results. Fails loudly if an attack returns what is not allowed (R1): its fault, never its user's."""
    radius = torch.zeros(len(clean), dtype=torch.float64)
    for rows in _batches(torch.ones(len(clean), dtype=torch.bool), 1024):  # in pieces: it works in float64
        ball = kind(clean[rows], limits[rows], None if region is None else region[rows])
        for images in results:
            outside = int((~ball.inside(images[rows])).sum())
            if outside:
                raise AssertionError(f"R1: the attack left the allowed region on {outside} of {len(rows)} images.")
            radius[rows] = ball.radius(images[rows].double() - clean[rows].double())
    return radius
