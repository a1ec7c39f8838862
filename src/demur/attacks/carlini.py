"""The attacks of Carlini & Wagner 2017, for all images of a batch at once: each image has its own constant, and stops on its own.

The constants are those of the authors' code (nn_robust_attacks, l2_attack.py, l0_attack.py, li_attack.py). As there, the change is
made in tanh space, where every value is an allowed pixel. Deviations, each of which makes the changes smaller or the search
shorter: tanh space reaches 1 % beyond the box, whose bounds are then no longer infinitely far away, so that the pixels on them
move at once; in L2, the search begins at the constant that would do for a linear classifier, each of its steps where the last one
ended, and it ends for an image whose constant is known to 5 %; where an image gets no better, its steps first become ten times
finer, and a success in the first tenth of a search step, which a first step too large brings, is kept, but does not count for the
search; in L2 and Linf the best change is at last shortened to the boundary; in L0 a pixel's contribution is taken in pixels and
with the margin's gradient, as the paper's text has it.
The gradient is carried through the tanh by hand. Where gradients are computed in bfloat16, successes are looked for every
`RECORDED` steps.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from demur.attacks.checks import check_counts, check_fractions, check_positive, given_goal
from demur.attacks.driver import AttackResult, GradientPrecision, Problem, drive
from demur.attacks.goals import Goal
from demur.attacks.norms import by_pixel, per_image, spread
from demur.classifier import Classifier
from demur.errors import DemurError

RECORDED = 10
KNOWN = 0.05
RESUMED = 0.01  # where an image is about to be given up, constants so many times as large are tried again, in finer steps
LARGEST_BEGIN = 100.0  # where softmax saturates there is hardly a gradient: what is linear there is far from the truth
TANH_REACH = 0.99


class _Adam:
    """Adam (Kingma & Ba 2015) with a step count of its own for each image, all tensors (n, ...)."""

    def __init__(self, like: Tensor, rate: float) -> None:
        self.first, self.second = torch.zeros_like(like), torch.zeros_like(like)
        self.count = torch.zeros(len(like), device=like.device)
        self.rate, self.finer = rate, torch.ones(len(like), device=like.device)

    def step(self, gradient: Tensor) -> Tensor:
        """What to subtract from the variable."""
        self.count += 1
        self.first.lerp_(gradient, 0.1)
        self.second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        bias = per_image(self.rate * (1 - 0.999**self.count).sqrt() / (1 - 0.9**self.count), gradient)
        return self.first / (self.second.sqrt() + 1e-8) * bias * per_image(self.finer, gradient)

    def reset(self, flags: Tensor) -> None:
        """Begin anew for those images (n,) bool."""
        self.first[flags], self.second[flags], self.count[flags] = 0, 0, 0

    def keep(self, index: Tensor) -> None:
        """Go on with those images alone."""
        self.first, self.second, self.count, self.finer = self.first[index], self.second[index], self.count[index], self.finer[index]


def _to_tanh(images: Tensor) -> Tensor:
    return torch.atanh((2 * images - 1) * TANH_REACH)


def _from_tanh(variable: Tensor, problem: Problem, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The images (n, C, H, W) at that place in tanh space, clean outside the mask, and the derivative of each pixel."""
    bent = torch.tanh(variable)
    images, slope = ((bent / TANH_REACH + 1) / 2).clamp(0, 1), (1 - bent * bent) / (2 * TANH_REACH)
    if mask is None:
        return images, slope
    return torch.where(mask > 0, images, problem.images), slope * mask


def carlini_l2(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    goal: Goal | None = None,
    confidence: float | None = None,
    search_steps: int = 9,
    steps: int = 1000,
    learning_rate: float = 0.01,
    initial_const: float | None = None,
    region: Tensor | None = None,
    batch_size: int = 256,
    precision: GradientPrecision = "auto",
) -> AttackResult:
    """Seek the smallest change in L2: minimise ||x' - x||^2 + c * max(confidence - margin, 0), c by ten-fold steps and bisection.

    Carlini & Wagner 2017, sec. V-C and VI-A; `steps` is 10,000 in the authors' code. Each image that has not got better by
    .01 % within a twentieth of the steps ends its search step there ("abort early"), without waiting for the batch.

    Args:
        goal: `Evade()`, or `Target(classes)`, ...; its loss is always the margin.
        confidence: by how much the wanted class must win, in the unit of the scores: both in the loss and for success; the
            goal's if None.
        initial_const: the first c; if None, what would be enough for each image if the margin were linear. .001 in the authors' code.
        region: a mask of 0 and 1.

    Images (N, C, H, W) in [0, 1], labels (N,). `distance` of the result is the L2 length. Raises: DemurError for input that does not fit.
    """
    check_counts(steps=steps, search_steps=search_steps)
    check_positive(learning_rate=learning_rate, initial_const=initial_const)

    def attack(problem: Problem) -> None:
        problem.unsolved()
        const = _linear_const(problem)
        const = const if initial_const is None else torch.full_like(const, initial_const)
        low, high = torch.zeros_like(const), torch.full_like(const, 1e10)
        variable = _to_tanh(problem.images)
        for _ in range(search_steps):
            unknown = high - low > KNOWN * high
            if not bool(unknown.any()):
                break
            part, solved = problem.part(), torch.zeros_like(unknown)
            tried, begin = part.keep(unknown, const, variable)
            solved[unknown], variable[unknown] = _minimise_l2(part, tried, begin, steps, learning_rate)
            high, low = torch.where(solved, const.minimum(high), high), torch.where(unknown & ~solved, const.maximum(low), low)
            const = torch.where(high < 1e9, (low + high) / 2, const * 10)
        problem.shorten()

    sought = _sought(goal, confidence)
    return drive(
        attack, classifier, images, labels, goal=sought, norm="l2", eps=None, region=region, batch_size=batch_size, precision=precision
    )


def _linear_const(problem: Problem) -> Tensor:
    """The constant (n,) at which the minimum of a linear classifier with this margin and gradient reaches the boundary: 2 |m| / |g|^2."""
    seen = problem.differentiate(problem.images)
    square = seen.gradient.flatten(1).square().sum(1).clamp(min=1e-12)
    return (2 * (problem.goal.confidence - seen.loss) / square).clamp(1e-6, LARGEST_BEGIN).nan_to_num(nan=1.0)


def _minimise_l2(problem: Problem, const: Tensor, variable: Tensor, steps: int, rate: float) -> tuple[Tensor, Tensor]:
    """One search step; tells which images (n,) it found a success for, and where in tanh space (n, C, H, W) it ended."""
    rows, solved, last = torch.arange(len(const), device=const.device), torch.zeros_like(const, dtype=torch.bool), variable.clone()
    adam, before, confidence = _Adam(variable, rate), torch.full_like(const, torch.inf), problem.goal.confidence
    every, settled = RECORDED if problem.half else 1, min(max(1, steps // 10), steps - 1)
    interval = max(RECORDED, steps // 20 // RECORDED * RECORDED)
    for step in range(steps):
        candidates, slope = _from_tanh(variable, problem, problem.ball.region)
        recorded = step % every == 0 or step == steps - 1
        seen = problem.differentiate(candidates, record=recorded)
        if recorded and step >= settled:
            solved[rows[seen.success]] = True
        change = candidates - problem.images
        if step % interval == 0:
            total = change.flatten(1).square().sum(1) + const * (confidence - seen.loss).clamp(min=0)
            stalled = total > 0.9999 * before
            going = ~stalled | (adam.finer == 1)
            adam.finer = torch.where(stalled, 0.1, adam.finer)
            before = total
            if not bool(going.all()):
                last[rows[~going]] = variable[~going]
                if not bool(going.any()):
                    return solved, last
                adam.keep(going)
                rows, const, before, variable, change, slope = problem.keep(going, rows, const, before, variable, change, slope)
                seen = seen.keep(going)
        pull = per_image(const * (seen.loss < confidence), change)
        variable = variable - adam.step((2 * change - pull * seen.gradient) * slope)
    last[rows] = variable
    return solved, last


def carlini_linf(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    goal: Goal | None = None,
    confidence: float | None = None,
    steps: int = 1000,
    learning_rate: float = 5e-3,
    initial_const: float = 1e-5,
    largest_const: float = 20.0,
    decrease: float = 0.9,
    region: Tensor | None = None,
    batch_size: int = 256,
    precision: GradientPrecision = "auto",
) -> AttackResult:
    """Seek the smallest change in Linf: minimise c * max(confidence - margin, 0) + sum of max(|x' - x| - tau, 0), and lower tau.

    Carlini & Wagner 2017, sec. V-E. Where the sum is reached at a tau, tau falls to `decrease` times the largest change, which
    is how fine the search is; where not, c doubles, up to `largest_const`. It ends at 1/256, a level of an 8-bit image. A stage
    ends early, for each image alone, where it gets no better; where the constant would be too large, the search goes on once more
    in steps ten times finer. Arguments as in `carlini_l2`.
    """
    check_counts(steps=steps)
    check_positive(learning_rate=learning_rate, initial_const=initial_const, largest_const=largest_const)
    check_fractions(decrease=decrease)

    def penalty(change: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        over = change.abs() - per_image(tau, change)
        return over.clamp(min=0).flatten(1).sum(1), change.sign() * (over > 0)

    def reached(total: Tensor, const: Tensor, hinge: Tensor) -> Tensor:
        return total < 1e-4 * const

    def lower(change: Tensor, gradient: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        tau = decrease * tau.minimum(change.flatten(1).abs().amax(1))
        return tau, tau < 1 / 256

    def attack(problem: Problem) -> None:
        region = problem.ball.region
        if region is not None and not bool(((region == 0) | (region == 1)).all()):
            raise DemurError("carlini_linf takes a region of 0 and 1: its tau is one number for all pixels. fmn takes one that scales eps.")
        problem.unsolved()
        tau = torch.ones(len(problem.images), device=problem.images.device)
        _in_stages(problem.part(), tau, penalty, reached, lower, steps, learning_rate, initial_const, largest_const)
        problem.shorten()

    sought = _sought(goal, confidence)
    return drive(
        attack, classifier, images, labels, goal=sought, norm="linf", eps=None, region=region, batch_size=batch_size, precision=precision
    )


def carlini_l0(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    goal: Goal | None = None,
    confidence: float | None = None,
    steps: int = 1000,
    learning_rate: float = 0.01,
    initial_const: float = 1e-3,
    largest_const: float = 2e6,
    region: Tensor | None = None,
    batch_size: int = 256,
    precision: GradientPrecision = "auto",
) -> AttackResult:
    """Seek the fewest changed pixels: attack in L2, take away the pixels that contribute least, and attack with the rest.

    Carlini & Wagner 2017, sec. V-D, and sec. II.B of the background-class paper. A pixel's contribution is its change times the
    gradient of the loss there, each summed over channels; at most .3 sqrt(changed pixels) go at once, and none after one that
    contributes .01, as in the authors' code. A stage ends early, for each image alone, where it gets no better. Arguments as in
    `carlini_l2`.
    """
    check_counts(steps=steps)
    check_positive(learning_rate=learning_rate, initial_const=initial_const, largest_const=largest_const)

    def penalty(change: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return change.flatten(1).square().sum(1), 2 * change

    def reached(total: Tensor, const: Tensor, hinge: Tensor) -> Tensor:
        return hinge < 1e-4

    def eliminate(change: Tensor, gradient: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        allowed = by_pixel(mask).amax(2) > 0
        share = by_pixel(change).abs().sum(2) * by_pixel(gradient).abs().sum(2)
        changed = (by_pixel(change).abs().amax(2) >= 1e-4).sum(1, keepdim=True)
        ranked, order = share.masked_fill(~allowed, torch.inf).sort(dim=1)
        place = torch.arange(share.shape[1], device=share.device)
        earlier = torch.cat([torch.zeros_like(ranked[:, :1]), ranked[:, :-1]], 1)
        goes = (place < (0.3 * changed.sqrt()).ceil().clamp(min=1)) & (earlier <= 0.01) & ranked.isfinite()
        left = allowed & ~torch.zeros_like(allowed).scatter(1, order, goes)
        return spread(left, change).to(mask.dtype) * mask, ~left.any(1)

    def attack(problem: Problem) -> None:
        problem.unsolved()
        mask = torch.ones_like(problem.images) if problem.ball.region is None else problem.ball.region.clone()
        _in_stages(problem.part(), mask, penalty, reached, eliminate, steps, learning_rate, initial_const, largest_const)

    sought = _sought(goal, confidence)
    return drive(
        attack, classifier, images, labels, goal=sought, norm="l0", eps=None, region=region, batch_size=batch_size, precision=precision
    )


def _in_stages(
    problem: Problem,
    stage: Tensor,
    penalty: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    reached: Callable[[Tensor, Tensor, Tensor], Tensor],
    harder: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    steps: int,
    rate: float,
    initial_const: float,
    largest_const: float,
) -> None:
    """Minimise c * hinge + penalty, each image in a stage of its own.

    A stage (tau (n,), or a mask of the images' shape) that is `reached` and holds in float32 becomes `harder`, from where it is; one
    that is not, after `steps` or without getting better, begins again with twice the constant. An image ends where the
    constant is too large, or where nothing harder is left.
    """
    const = torch.full((len(problem.images),), initial_const, device=problem.images.device)
    variable = _to_tanh(problem.images)
    begin, before = variable.clone(), torch.full_like(const, torch.inf)
    adam, masks = _Adam(variable, rate), stage.ndim > 1
    slack, confidence = 0.01 if masks else 0.0, problem.goal.confidence
    while len(const):
        candidates, slope = _from_tanh(variable, problem, stage if masks else problem.ball.region)
        seen = problem.differentiate(candidates, record=False)
        change = candidates - problem.images
        extra, push = penalty(change, stage)
        hinge = (confidence + slack - seen.loss).clamp(min=0)
        total = const * hinge + extra
        success = reached(total, const, hinge)
        denied = torch.zeros_like(success)
        if bool(success.any()):
            part = problem.part()
            # What has hardly moved has not moved: a pixel is off by rounding when it comes back from tanh space.
            still = torch.where(change.abs() < 1e-6, problem.images, candidates)
            (tried,) = part.keep(success, still)
            success[success.clone()] = part.evaluate(tried).success
            denied = reached(total, const, hinge) & ~success
        check = adam.count % max(1, steps // 10) == 0
        stuck = ~success & ((check & (total >= 0.9999 * before)) | (adam.count >= steps))
        before = torch.where(check, total, before)
        over = torch.zeros_like(success)
        if bool(success.any()):
            stage[success], over[success] = harder(change[success], seen.gradient[success], stage[success])
            begin[success] = variable[success]
        const = torch.where(stuck, const * 2, const)
        if not masks:  # a step of the learning rate is as large as what there is still to gain: finer ones, before an image is given up
            finer = (const > largest_const) & (adam.finer == 1)
            adam.finer, const = torch.where(finer, 0.1, adam.finer), torch.where(finer, RESUMED * const, const)
        over |= const > largest_const
        pull = per_image(const * ((seen.loss < confidence + slack) | denied), change)
        step = adam.step((push - pull * seen.gradient) * slope)
        anew = success | stuck
        variable = torch.where(per_image(anew, variable), begin, variable - step)
        adam.reset(anew)
        before = before.masked_fill(anew, torch.inf)
        if bool(over.any()):
            adam.keep(~over)
            stage, const, variable, begin, before = problem.keep(~over, stage, const, variable, begin, before)


def _sought(goal: Goal | None, confidence: float | None) -> Goal:
    goal = given_goal(goal)
    return replace(goal, by="margin", confidence=goal.confidence if confidence is None else confidence)
