"""The engine that runs every search attack: batches, restarts, costs, and the checks that must hold
(R1-R6).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from demur import seeds
from demur.attacks.book import Book, Pursuit, Regularizer, clear_margin
from demur.attacks.checks import (
    check_answers,
    check_regularizer,
    check_request,
    check_starting_points,
    check_toward,
    warn_if_blind,
)
from demur.attacks.frozen import channels_last, frozen
from demur.attacks.result import AttackResult
from demur.attacks.state import AttackState
from demur.classifier import Classifier, check_counts, device_of
from demur.errors import DemurError, ModuleError, unknown
from demur.hardware import has_fast_bfloat16, tuned
from demur.masks import check_mask
from demur.norms import Ball, ball_of, per_image
from demur.progress import job
from demur.threat import ThreatModel

if TYPE_CHECKING:
    from demur.attacks.base import SearchAttack

GradientPrecision = Literal["auto", "float32", "bfloat16"]
"""Precision of the passes for gradients: "auto" is bfloat16 where the hardware has it. Decisions
are always made in float32.
"""

MEASURED_AT_ONCE = 1024

TINY = 1e-30
"""Pixels below it are attacked as 0: denormal numbers count as zero during an attack, and no step
should change them.
"""


@dataclass(frozen=True)
class Call:
    """The arguments of one call of an attack; see `SearchAttack.__call__`.

    `only_maximize` gives candidates of the largest loss without a final check.
    """

    seed: int = 0
    batch_size: int = 128
    precision: GradientPrecision = "auto"
    starting_points: Tensor | None = None
    toward: Tensor | None = None
    regularizer: Regularizer | None = None
    only_maximize: bool = False


def run_attack(
    attack: "SearchAttack",
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    call: Call,
) -> AttackResult:
    """Run a search attack, and check what it found.

    Parameters
    ----------
    attack : SearchAttack
        Its `search` gets one `AttackState` for each batch and restart.
    classifier, images, labels, threat
        As in `Attack.__call__`.
    call : Call
        The other arguments of the call.

    Returns
    -------
    AttackResult

    Raises
    ------
    DemurError
        For input that does not fit.
    AssertionError
        If the attack tried an image that is not allowed: a fault of the attack (R1).
    """
    check_request(classifier, images, labels, threat.goal)
    check_counts(restarts=attack.restarts, batch_size=call.batch_size)
    run = _Run(attack, classifier, images.detach(), labels, threat, call)
    # What the caller has switched on decides nothing: no autocast, and random draws of its own.
    float32 = torch.autocast(run.device.type, enabled=False)
    with tuned(), frozen(classifier), float32, torch.random.fork_rng():
        torch.manual_seed(seeds.derive(call.seed, "classifier"))  # for a randomised classifier
        with channels_last(classifier):
            run.search()
        run.restore_tiny_pixels()
        check_answers(run.book.success | run.book.loss.isfinite())
        run.warn_if_blind()
        success = run.success()
    return run.result(success)


class _Run:
    """One call of an attack. The book of all images is on the CPU; a batch has its own on the
    device.
    """

    def __init__(
        self,
        attack: "SearchAttack",
        classifier: Classifier,
        images: Tensor,
        labels: Tensor,
        threat: ThreatModel,
        call: Call,
    ) -> None:
        self.attack = attack
        self.classifier = classifier
        self.given = images
        self.images = images if call.only_maximize else images.masked_fill(images < TINY, 0)
        self.labels = labels.to(images.device)
        self.goal = threat.goal
        self.call = call
        self.kind = ball_of(threat.norm)
        self.mask = check_mask(threat.mask, images)
        self.kind.check_mask(self.mask)
        bounded = threat if attack.needs_eps else None
        self.limits = limits_of(bounded, images, self.kind, self.mask)
        self.starting_points = check_starting_points(call.starting_points, images, attack)
        self.toward = check_toward(call.toward, classifier, self.labels, self.goal)
        check_regularizer(call.regularizer, len(images), attack.minimum_norm)
        self.device = device_of(classifier, images.device)
        self.half = _half(call.precision, self.device)
        self.book = Book.of(images.cpu())
        self.known_keys: dict[int, int] = {}
        self.pursuit = Pursuit(
            loss=attack.loss_in(threat.norm),
            confidence=attack.confidence,
            smallest=attack.minimum_norm,
            keep_maximizing=attack.keep_maximizing or call.only_maximize,
        )

    def batches(self, chosen: Tensor) -> list[Tensor]:
        """Split the indices of the chosen images (N,) bool into batches."""
        return _batches(chosen, self.call.batch_size)

    def ball(self, rows: Tensor, device: torch.device) -> Ball:
        """Give the ball around the images at `rows`."""
        here = rows.to(self.images.device)
        mask = None if self.mask is None else self.mask[here].to(device, self.images.dtype)
        return self.kind(self.images[here].to(device), self.limits[rows].to(device), mask)

    def state(self, rows: Tensor, restart: int) -> tuple[AttackState, Book]:
        """Prepare a batch on the device."""
        here = rows.to(self.images.device)
        book = self.book.read(rows, self.device)
        begin = None
        if restart < len(self.starting_points):
            begin = self.starting_points[restart][here].to(self.device, self.images.dtype)
        regularizer = self.call.regularizer
        state = AttackState(
            self.classifier,
            self.goal.select(rows.to(self.device)),
            self.ball(rows, self.device),
            self.labels[here].to(self.device, torch.int64),
            book,
            self.pursuit,
            starting_points=begin,
            toward=None if self.toward is None else self.toward[here].to(self.device),
            regularizer=None if regularizer is None else regularizer.select(here),
            keys=lambda: self.keys(rows),
            seed=self.call.seed,
            restart=restart,
            half=self.half,
        )
        return state, book

    def keys(self, rows: Tensor) -> list[int]:
        """Give the keys of the images at `rows`; an image is hashed once, when an attack draws."""
        places = rows.tolist()
        missing = [place for place in places if place not in self.known_keys]
        if missing:
            new = seeds.image_keys(self.images[torch.tensor(missing).to(self.images.device)])
            self.known_keys.update(zip(missing, new, strict=True))
        return [self.known_keys[place] for place in places]

    def search(self) -> None:
        """Run the attack on all batches, and again on what is not solved."""
        with job("attack", self.attack.restarts * len(self.images)) as progress:
            if self.pursuit.smallest:
                self.evaluate_clean(~self.book.done)
            for restart in range(self.attack.restarts):
                for rows in self.batches(~self.book.done):
                    state, part = self.state(rows, restart)
                    self.attack.search(state)
                    self.book.write(rows, part)
                    progress.advance(len(rows))
        if self.pursuit.smallest or self.pursuit.keep_maximizing:
            return
        # The clean image is always allowed. An attacker that found nothing better still has it.
        candidates = self.book.candidates.clone()
        self.evaluate_clean(~self.book.success)
        solved = per_image(self.book.success, candidates)
        self.book.candidates = torch.where(solved, self.book.candidates, candidates)

    def evaluate_clean(self, chosen: Tensor) -> None:
        """Evaluate the clean images of the chosen ones."""
        for rows in self.batches(chosen):
            state, part = self.state(rows, 0)
            state.evaluate(state.images)
            self.book.write(rows, part)

    def restore_tiny_pixels(self) -> None:
        """Put the pixels back that were attacked as 0, where the candidates left them there."""
        given = self.given.cpu()
        candidates = self.book.candidates
        left = (given < TINY) & (candidates < TINY)
        self.book.candidates = torch.where(left, given, candidates)
        self.images = self.given

    def warn_if_blind(self) -> None:
        """Warn if most gradients were zero. An attacker that may act nowhere is not blind."""
        if self.mask is None or bool(self.mask.any()):
            warn_if_blind(int(self.book.zero_gradients.sum()), int(self.book.backwards.sum()))

    def check_batches(self, chosen: Tensor) -> list[Tensor]:
        """Split the indices of the chosen (N,) bool into batches that the search did not have: of
        half its size, and each from all over the images. An image that was searched alone comes
        twice.
        """
        index = chosen.nonzero().flatten()
        size = min(self.call.batch_size, len(self.images))
        parts = -(-len(index) // max(1, size // 2))
        batches = [index[start::parts] for start in range(parts)]
        last = len(self.images) - 1
        alone = 0 if size == 1 else last + bool(last % size)  # the first image searched alone
        return [
            rows.expand(2) if len(rows) == 1 and int(rows) >= alone else rows for rows in batches
        ]

    @torch.no_grad()
    def success(self) -> Tensor:
        """Check the successes by a fresh forward pass at another batch size (R3): (N,) bool."""
        checked = known = self.book.success
        if self.call.only_maximize:
            return known
        # A pass in bfloat16 may take a narrow success for a failure.
        missed = self.half and not self.pursuit.smallest
        if self.pursuit.keep_maximizing or missed:
            checked = torch.ones_like(known)
        holds = torch.zeros_like(known)
        for rows in self.check_batches(checked):
            here = rows.to(self.labels.device)
            scores = self.fresh_scores(self.book.candidates[rows].to(self.device))
            about = scores, self.labels[here].to(self.device, torch.int64)
            goal, classes = self.goal.select(here), self.classifier.num_classes
            holds[rows] = goal.success(*about, classes, self.pursuit.confidence).cpu()
            if missed:
                clear = goal.margin(*about, classes) > clear_margin(scores)
                holds[rows] &= known[rows] | clear.cpu()
        return holds

    def fresh_scores(self, images: Tensor) -> Tensor:
        """Score images (n, ...) in float32, in one batch, or one by one if the user's batches have
        one image and the classifier takes no more.
        """
        try:
            together: Tensor = self.classifier(images)
            return together.float()
        except ModuleError:
            if self.call.batch_size > 1 or len(images) == 1:
                raise
        return torch.cat([self.classifier(image).float() for image in torch.split(images, 1)])

    def result(self, success: Tensor) -> AttackResult:
        """Put the result together."""
        clean = self.images.cpu()
        book = self.book
        images = torch.where(per_image(success, clean), book.candidates, clean)
        distance = torch.where(success, self.sizes(images), torch.inf)
        tensors = (
            images,
            success,
            book.candidates,
            distance,
            book.forwards,
            book.backwards,
            book.zero_gradients,
        )
        return AttackResult(*(tensor.to(self.images.device) for tensor in tensors))

    def sizes(self, images: Tensor) -> Tensor:
        """Measure the images (N,). Fail if these or the candidates are not allowed (R1)."""
        sizes = torch.zeros(len(images), dtype=torch.float64)
        if self.call.only_maximize:
            return sizes
        clean = self.images.cpu()
        cpu = torch.device("cpu")
        for rows in _batches(torch.ones(len(images), dtype=torch.bool), MEASURED_AT_ONCE):
            ball = self.ball(rows, cpu)
            for tried in (self.book.candidates, images):
                outside = int((~ball.contains(tried[rows])).sum())
                if outside:
                    raise AssertionError(
                        f"R1: the attack left the allowed set on {outside} of {len(rows)} images."
                    )
            sizes[rows] = ball.size(images[rows].double() - clean[rows].double())
        return sizes


def limits_of(
    threat: ThreatModel | None, images: Tensor, kind: type[Ball], mask: Tensor | None
) -> Tensor:
    """Give the eps of each image, (N,) float64 on the CPU, but none above the largest one that
    matters. The mask has the shape of the images, or is None.

    Raises
    ------
    DemurError
        If the threat has an eps for another number of images.
    """
    eps = torch.inf if threat is None or threat.eps is None else threat.eps
    limits = torch.as_tensor(eps, dtype=torch.float64).cpu()
    count = len(images)
    if limits.ndim == 1 and len(limits) != count:
        raise DemurError(
            f"eps must be one number, or one for each of the {count} images, "
            f"not of shape {tuple(limits.shape)}."
        )
    mask = None if mask is None else mask.to(images.dtype)
    return limits.expand(count).minimum(kind.largest(images, mask).cpu())


def _half(precision: str, device: torch.device) -> bool:
    if precision not in get_args(GradientPrecision):
        raise unknown("precision", precision, get_args(GradientPrecision))
    return precision == "bfloat16" or (precision == "auto" and has_fast_bfloat16(device))


def _batches(chosen: Tensor, batch_size: int) -> list[Tensor]:
    """Split the indices of the chosen (N,) bool into batches; none where none is chosen."""
    index = chosen.nonzero().flatten()
    return [index[start : start + batch_size] for start in range(0, len(index), batch_size)]
