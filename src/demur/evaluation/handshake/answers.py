"""The points of a handshake that need forward passes: scores, batches, gradients, operations."""

from typing import Final

import torch
from torch import Tensor

from demur.attacks import KernelMachine
from demur.classifier import Classifier, decide
from demur.data.messages import printable
from demur.errors import DemurError
from demur.evaluation.handshake.errors import explained
from demur.evaluation.handshake.lines import Line, Sample, percent, shape_of
from demur.evaluation.handshake.logarithms import are_probabilities, with_logarithms
from demur.evaluation.handshake.operations import suspicious_operations
from demur.evaluation.handshake.running import (
    Runner,
    default_batch_size,
    fitting_batch_size,
    images_per_second,
)
from demur.loading.wrapping import precisions

PASSES: Final = 5
"""Forward passes that must agree, or else the model is randomised."""
REPEATED: Final = 16
"""Images of these passes."""
ALONE: Final = 8
"""Images that are also scored one at a time."""
DIFFERENT: Final = 1e-4
"""Of the spread of the scores: the largest difference between batch sizes."""
DEPENDENT: Final = 0.02
"""Of the spread: scores that differ by more depend on the other images of the batch."""
RANDOM: Final = 1e-5
"""Of the spread: the largest difference between equal passes."""
GRADIENTS: Final = 8
"""Images whose gradients are looked at."""


def compare_size(sample: Sample) -> list[Line]:
    """The images have the size that the model was made for."""
    known = sample.classifier.preprocess
    given = tuple(sample.images.shape[2:])
    if known is None or known.size is None or known.size == given:
        return []
    text = f"the model was made for {shape_of(known.size)} pixels; these have {shape_of(given)}."
    return [Line("size", "note", text)]


def find_batch_size(sample: Sample, runner: Runner, batch_size: int | None) -> tuple[Line, int]:
    """Halve the batch size until a forward and a backward pass fit into memory."""
    wanted = default_batch_size(sample.images) if batch_size is None else int(batch_size)

    def passes(size: int) -> None:
        images, labels = sample.batch(size)
        try:
            runner.gradient(images, labels)
        except DemurError:  # gradients are looked at later
            runner.scores(images, size)

    size = fitting_batch_size(passes, wanted)
    if size < wanted:
        text = f"{size}: {wanted} images do not fit into memory at once."
        return Line("batch size", "note", text), size
    return Line("batch size", "ok", f"{size} images."), size


def check_finite(classifier: Classifier, scores: Tensor) -> None:
    """Raise DemurError if a score is NaN or infinite."""
    bad = (~scores.isfinite()).any(1)
    if not bool(bad.any()):
        return
    half = "float16" in precisions(classifier)
    remedy = (
        "float16 may overflow: convert the model with .float()"
        if half
        else "repair the model, or leave these images out"
    )
    raise DemurError(
        f"the model gives NaN or infinite scores for {int(bad.sum())} of {len(bad)} images (the "
        f"first is number {int(bad.int().argmax())}), so there is no decision on them; {remedy}."
    )


def logits(classifier: Classifier, scores: Tensor) -> tuple[Line, Classifier]:
    """Give the classifier to attack: with logarithms where the scores are probabilities."""
    count = classifier.num_classes
    columns = f"{count} classes" + (" and a reject score" if scores.shape[1] > count else "")
    # Kernel machines are attacked through wider kernels (R20).
    kernels = any(isinstance(part, KernelMachine) for part in classifier.modules())
    if kernels or not are_probabilities(scores, count):
        return Line("scores", "ok", f"{columns}; the scores are logits."), classifier
    text = (
        f"{columns}; the scores are probabilities: demur attacks their logarithms. Remove the "
        "softmax from the model if you can: where it saturates, gradients vanish."
    )
    if bool(((scores == 0) | (scores == 1)).all()):
        text += " All of them are 0 or 1: attacks with gradients are blind."
    return Line("scores", "note", text), with_logarithms(classifier)


def check_repeated(sample: Sample, runner: Runner, batch_size: int) -> tuple[Line, bool]:
    """Say whether equal passes give different scores."""
    images = sample.images[: min(REPEATED, batch_size)]
    passes = [runner.scores(images, batch_size) for _ in range(PASSES)]
    count = sample.classifier.num_classes
    worst = max(_difference(passes[0], other, count) for other in passes[1:])
    if worst <= RANDOM:
        return Line("repeated passes", "ok", f"{PASSES} passes agree."), False
    decisions = torch.stack([decide(one, count) for one in passes])
    changed = int((decisions != decisions[0]).any(0).sum())
    text = (
        f"{PASSES} passes over the same images differ by {percent(worst)} of the spread of the "
        f"scores, and {changed} of {len(images)} decisions change: the model is randomised, so "
        "attacks use the mean over several draws. If that is not intended, a dropout is active."
    )
    return Line("repeated passes", "note", text), True


def check_batches(sample: Sample, runner: Runner, batch_size: int, randomised: bool) -> Line:
    """Scores do not depend on the other images of a batch."""
    name = "other batches"
    size = min(batch_size, len(sample.images))
    if randomised or size == 1:
        reason = "the model is randomised" if randomised else "a batch has one image"
        return Line(name, "note", f"not compared: {reason}.")
    together = runner.scores(sample.images[:size], size)[:ALONE]
    alone = runner.scores(sample.images[: len(together)], 1)
    count = sample.classifier.num_classes
    worst = _difference(together, alone, count)
    changed = int((decide(together, count) != decide(alone, count)).sum())
    weights = [one for one in sample.classifier.parameters() if one.is_floating_point()]
    eps = max((torch.finfo(one.dtype).eps for one in weights), default=0.0)
    if worst <= max(DIFFERENT, 16 * eps):
        return Line(name, "ok", f"images alone and in a batch of {size} have equal scores.")
    text = (
        f"scores of images alone and in a batch of {size} differ by {percent(worst)} of their "
        f"spread, and {changed} of {len(alone)} decisions change"
    )
    if worst > DEPENDENT or changed:
        raise DemurError(
            f"{text}: scores depend on the other images of the batch. Probably a batch norm is in "
            "training mode, or has no running statistics."
        )
    return Line(name, "note", f"{text}: a decision near the boundary may depend on the batch.")


def _difference(one: Tensor, other: Tensor, num_classes: int) -> float:
    """Give the largest difference, in units of the usual spread of an image's class scores."""
    classes = one[:, :num_classes]
    spread = float((classes.amax(1) - classes.amin(1)).median())
    difference = float((one - other).abs().max())
    return difference / max(spread, torch.finfo(torch.float32).tiny) if difference else 0.0


def check_gradients(sample: Sample, runner: Runner) -> tuple[Line, bool]:
    """Say whether the images have gradients."""
    name = "gradients"
    none = "the audit uses scores only, and attacks with gradients do not run"
    try:
        found = runner.gradient(sample.images[:GRADIENTS], sample.labels[:GRADIENTS])
    except DemurError as error:
        return Line(name, "note", f"the backward pass fails: {error} So {none}."), False
    if found is None:
        text = f"the scores have no gradient with respect to the images: {none}."
        return Line(name, "note", text), False
    flat = found.flatten(1)
    bad = int((~flat.isfinite()).any(1).sum())
    zero = int((flat == 0).all(1).sum())
    if not bad and not zero:
        return Line(name, "ok", f"finite and not zero on {len(flat)} images."), True
    text = (
        f"of {len(flat)} images, {zero} have a gradient of zero, and {bad} one that is NaN or "
        "infinite: attacks with gradients are blind there."
    )
    return Line(name, "note", text), True


def measure(
    sample: Sample, runner: Runner, batch_size: int, differentiable: bool
) -> tuple[Line, float, float]:
    """Measure the throughput of forward passes, and of forward and backward passes."""
    images, labels = sample.batch(batch_size)
    device = sample.device
    forwards = images_per_second(lambda: runner.scores(images, batch_size), batch_size, device)
    text = f"{forwards:,.0f} images a second"
    gradients = 0.0
    if differentiable:
        gradients = images_per_second(lambda: runner.gradient(images, labels), batch_size, device)
        text += f", {gradients:,.0f} gradients"
    return Line("throughput", "ok", f"{text}."), forwards, gradients


def look_for_operations(sample: Sample) -> tuple[Line, tuple[str, ...]]:
    """Name operations without useful gradients."""
    name = "operations"
    one = sample.images[:1].to(sample.device)
    try:
        with explained(sample.classifier, one):
            found = suspicious_operations(sample.classifier, one)
    except (DemurError, RuntimeError, MemoryError):
        # A compiled or exported model may refuse to be recorded.
        return Line(name, "note", "the operations of the model cannot be recorded."), ()
    if not found:
        return Line(name, "ok", "no operation without useful gradients was found."), ()
    text = f"{', '.join(map(printable, found))}: gradients through these may say little."
    return Line(name, "note", text), found
