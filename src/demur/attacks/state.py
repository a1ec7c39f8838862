"""The state of an attack on one batch: candidates are evaluated here, counted, and the best are
kept (R5).

All tensors of a batch stay on the device. A pass waits for the device at most once: in
`drop_solved`, which must know how many images are left, or where a success that bfloat16 gradients
found is checked in float32.
"""

from collections.abc import Callable, Sequence
from copy import copy
from typing import cast

import torch
from torch import Tensor

from demur import seeds
from demur.attacks.book import (
    Book,
    Evaluation,
    Pursuit,
    Regularizer,
    Ts,
    clear_margin,
    first_flagged,
    precise,
    rows_at,
)
from demur.attacks.checks import NO_GRADIENT
from demur.classifier import Classifier, raising_module_errors
from demur.errors import DemurError
from demur.goals import Goal
from demur.norms import Ball, per_image


class AttackState:
    """A batch of images that an attack works on. Its tensors shrink together in `drop_solved` and
    `select`.

    Attributes
    ----------
    images, labels : Tensor of shape (n, C, H, W) and (n,)
        Clean images and true classes, on the classifier's device.
    starting_points : Tensor of shape (n, C, H, W)
        Where the caller wants this run to start; the clean images if nowhere else.
    started : bool
        Whether the caller gave a starting point for this run.
    goal : Goal
        What counts as success.
    toward : Tensor of shape (n,) or None
        The wanted column that the loss raises.
    ball : Ball
        What is allowed around the images.
    num_classes : int
    restart : int
        Number of this run, from 0.
    seed : int
    names : tuple
        What random draws depend on, beside the seed and the image; the first name is the restart.
    half : bool
        Whether gradients are computed in bfloat16. An attack may set it to False for its last
        steps.
    """

    def __init__(
        self,
        classifier: Classifier,
        goal: Goal,
        ball: Ball,
        labels: Tensor,
        book: Book,
        pursuit: Pursuit,
        *,
        starting_points: Tensor | None,
        toward: Tensor | None,
        regularizer: Regularizer | None,
        keys: Callable[[], Sequence[int]],
        seed: int,
        restart: int,
        half: bool,
    ) -> None:
        self._classifier = classifier
        self._book = book
        self._rows = torch.arange(len(labels), device=labels.device)
        self._keys = keys
        self._zero_gradients: int | None = None
        self._dropped_at = -1
        self.pursuit = pursuit
        self.goal = goal
        self.ball = ball
        self.images = ball.clean
        self.labels = labels
        self.toward = toward
        self.regularizer = regularizer
        self.num_classes = classifier.num_classes
        self.started = starting_points is not None
        self.starting_points = (
            ball.clean if starting_points is None else ball.project(starting_points)
        )
        self.seed = seed
        self.restart = restart
        self.names: tuple[object, ...] = (restart,)
        self.half = half

    @property
    def keys(self) -> Sequence[int]:
        """One number for each image that depends on its pixels alone. Computed only when drawn."""
        keys = self._keys()
        if len(keys) == len(self._rows):
            return keys
        return [keys[row] for row in self._rows.tolist()]

    def uniform(self, shape: Sequence[int], *names: object) -> Tensor:
        """Draw uniformly from [0, 1): (n, *shape), by image, seed, restart and names."""
        return seeds.uniform(self.keys, shape, self.seed, *self.names, *names).to(self.images)

    def random_start(self) -> Tensor:
        """Draw one allowed image for each image: (n, C, H, W), by image, seed and restart."""
        return self.ball.random(self.keys, self.seed, *self.names)

    def value_and_gradient(self, candidates: Tensor, record: bool = True) -> Evaluation:
        """Compute loss, success and gradient at candidates: one forward and one backward pass.

        Parameters
        ----------
        candidates : Tensor of shape (n, C, H, W)
            Images in the ball.
        record : bool, default True
            Whether the candidates count: the best of them are kept. A success of bfloat16 gradients
            that would be kept is evaluated again in float32, for one more forward pass.

        Returns
        -------
        Evaluation
            The gradient is 0 where it is not finite and where the mask is 0.

        Raises
        ------
        DemurError
            If the classifier cannot be differentiated.
        """
        candidates = candidates.detach().requires_grad_()
        with torch.enable_grad():
            scores, loss = self._forward(candidates)
            if not loss.requires_grad:
                raise DemurError(NO_GRADIENT)
            with raising_module_errors(candidates):
                (gradient,) = torch.autograd.grad(loss.sum(), candidates, allow_unused=True)
        if gradient is None:
            raise DemurError(NO_GRADIENT)
        unusable = ~torch.isfinite(gradient)
        outside = unusable if self.ball.mask is None else unusable | (self.ball.mask == 0)
        gradient = gradient.masked_fill(outside, 0).contiguous()
        zero = ~gradient.flatten(1).any(1) | unusable.flatten(1).any(1)
        self._count(forwards=1, backwards=1, zero_gradients=zero)
        self._zero_gradients = None
        candidates = candidates.detach()
        scores = scores.detach()
        loss = loss.detach()
        success = self._success(scores)
        if record:
            success = self._record(candidates, scores, loss, success, zero if self.half else None)
        return Evaluation(loss, success, gradient, scores)

    def has_zero_gradients(self, gradient: Tensor) -> bool:
        """Say whether a gradient (n, ...) of the last pass is zero for an image."""
        if self._zero_gradients is None:
            self._zero_gradients = int((~gradient.flatten(1).any(1)).sum())
        return self._zero_gradients > 0

    def _forward(self, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """Compute scores (n, columns) and loss (n,) with their graph."""
        with torch.autocast(candidates.device.type, torch.bfloat16, enabled=self.half):
            given = candidates
            if candidates.ndim == 4:
                given = candidates.clone(memory_format=torch.channels_last)
            scores = self._classifier(given)
            extra = None if self.regularizer is None else self.regularizer(given)
        scores = precise(scores)
        loss = self._loss(scores)
        return scores, loss if extra is None else loss + extra.to(loss)

    @torch.no_grad()
    def evaluate(
        self, candidates: Tensor, record: bool = True, scores: Tensor | None = None
    ) -> Evaluation:
        """Compute loss and success at candidates (n, C, H, W) in float32: one forward pass, or none
        where the scores are known. With `record`, the best of them are kept.
        """
        if scores is None:
            scores = precise(self._classifier(candidates))
            self._count(forwards=1)
        loss = self._loss(scores)
        if self.regularizer is not None:
            loss = loss + self.regularizer(candidates).to(loss)
        success = self._success(scores)
        if record:
            success = self._record(candidates, scores, loss, success)
        return Evaluation(loss, success, torch.zeros_like(candidates[:0]), scores)

    def drop_solved(self, *rows: *Ts, stop: Tensor | None = None) -> tuple[*Ts]:
        """Go on with the images that need more work.

        Parameters
        ----------
        *rows : Tensor or Rows
            The attack's own tensors, with one row for each image.
        stop : Tensor of shape (n,), bool, optional
            Images that the attack gives up.

        Returns
        -------
        tuple of Tensor or Rows
            The rows that are left.
        """
        if self._dropped_at == self._book.version and stop is None:
            return rows
        self._dropped_at = self._book.version
        keep = ~self._book.done[self._rows]
        keep = keep if stop is None else keep & ~stop
        count = int(keep.sum())
        return rows if count == len(keep) else self.select(first_flagged(keep, count), *rows)

    def select(self, index: Tensor, *rows: *Ts) -> tuple[*Ts]:
        """Go on with the images at `index`, and give their rows."""
        self._rows = self._rows[index]
        self.ball = self.ball.select(index)
        self.images = self.ball.clean
        self.labels = self.labels[index]
        self.goal = self.goal.select(index)
        self.toward = None if self.toward is None else self.toward[index]
        self.regularizer = None if self.regularizer is None else self.regularizer.select(index)
        self.starting_points = self.starting_points[index]
        return cast(tuple[*Ts], tuple(rows_at(row, index) for row in rows))

    def part(self, *names: object) -> "AttackState":
        """Give a state of the same images that may drop images for itself; `names` tell its draws
        apart.
        """
        part = copy(self)
        part.names = (*self.names, *names)
        return part

    def best(self) -> tuple[Tensor, Tensor]:
        """Give the best candidates so far (n, C, H, W), and their size (n,), infinite where none
        succeeded.
        """
        return self._book.candidates[self._rows], self._book.distance[self._rows]

    def shorten(self, steps: int = 10) -> None:
        """Bisect between the best candidates and the clean images for the smallest success on that
        line.
        """
        best, _ = self.best()
        found = self._book.success[self._rows]
        low = torch.zeros(len(best), device=best.device)
        high = torch.ones(len(best), device=best.device)
        for _ in range(steps):
            middle = (low + high) / 2
            there = self.images + (best - self.images) * per_image(middle, best).to(best.dtype)
            success = self.evaluate(torch.where(per_image(found, best), there, best)).success
            low = torch.where(success, low, middle)
            high = torch.where(success, middle, high)

    def _loss(self, scores: Tensor) -> Tensor:
        return self.goal.loss(scores, self.labels, self.num_classes, self.pursuit.loss, self.toward)

    def _success(self, scores: Tensor) -> Tensor:
        if self.pursuit.keep_maximizing:
            return torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
        return self.goal.success(scores, self.labels, self.num_classes, self.pursuit.confidence)

    def _decisive(self, goal: Goal, scores: Tensor, labels: Tensor) -> Tensor:
        """Flag the successes (n,); where the smallest change is sought, the clear ones."""
        confidence = self.pursuit.confidence
        success = goal.success(scores, labels, self.num_classes, confidence)
        if not self.pursuit.smallest:
            return success
        margin = goal.margin(scores, labels, self.num_classes) - confidence
        return success & (margin >= clear_margin(scores))

    def _count(
        self, forwards: int = 0, backwards: int = 0, zero_gradients: Tensor | None = None
    ) -> None:
        book = self._book
        live = ~book.done[self._rows]
        passes = live * (1 if self.regularizer is None else 2)
        book.forwards[self._rows] += passes * forwards
        if backwards:
            book.backwards[self._rows] += passes * backwards
        if zero_gradients is not None:
            book.zero_gradients[self._rows] += zero_gradients & live

    @torch.no_grad()
    def _record(
        self,
        candidates: Tensor,
        scores: Tensor,
        loss: Tensor,
        success: Tensor,
        zero: Tensor | None = None,
    ) -> Tensor:
        """Keep the better candidates, by success first, then by size or loss (R5).

        `zero` flags zero gradients of bfloat16 passes, whose successes are checked in float32.
        Gives what succeeds.
        """
        book = self._book
        rows = self._rows
        known = book.success[rows]
        if self.pursuit.smallest:
            distance = self.ball.size(candidates - self.images)
            clear = self._decisive(self.goal, scores, self.labels)
            success = success & (clear | (distance == 0))
            better = success & (distance < book.distance[rows])
        else:
            distance = torch.zeros_like(book.distance[rows])
            better = success & ~known
        if zero is not None:
            success, better = self._confirmed(candidates, success, better, zero)
        else:
            book.version += 1
        loss = loss.double().nan_to_num(nan=-torch.inf)
        closer = ~known & ~better & (loss > book.loss[rows])
        kept = per_image(better | closer, candidates)
        book.candidates[rows] = torch.where(
            kept, candidates.to(book.candidates.dtype), book.candidates[rows]
        )
        book.loss[rows] = torch.where(closer, loss, book.loss[rows])
        book.success[rows] = known | better
        book.distance[rows] = torch.where(better, distance, book.distance[rows])
        book.done[rows] = book.done[rows] | (
            better & (distance == 0) if self.pursuit.smallest else better
        )
        return success

    def _confirmed(
        self, candidates: Tensor, success: Tensor, better: Tensor, zero: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Evaluate the better candidates again in float32; take back what does not hold."""
        # One read for both: it waits for the device.
        count, self._zero_gradients = torch.stack([better.sum(), zero.sum()]).tolist()
        if not count:
            return success, better
        self._book.version += 1
        index = first_flagged(better, count)
        again = precise(self._classifier(candidates[index]))
        holds = self._decisive(self.goal.select(index), again, self.labels[index])
        self._book.forwards[self._rows[index]] += 1
        return success.index_put((index,), holds), better.index_put((index,), holds)
