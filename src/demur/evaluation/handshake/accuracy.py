"""The clean accuracy of a model, and why it is low."""

import re
from typing import Final

from torch import Tensor

from demur.classifier import REJECT, decide
from demur.errors import DemurError
from demur.evaluation.handshake.labels import Relabelled, permuted_classes, share, shifted_labels
from demur.evaluation.handshake.lines import Line, Sample, State, pairs_of, percent
from demur.evaluation.handshake.normalisation import better_normalisation
from demur.evaluation.handshake.running import Runner
from demur.metrics.intervals import clopper_pearson

DOUBTFUL: Final = 0.5
"""Below this accuracy, and for few classes below a higher one, a normalisation that is surely
better is an error. Above it, it is a note.
"""

_EXPECTED: Final = re.compile(r"\s*([0-9.]+)\s*(?:\+-|\+/-|±)\s*([0-9.]+)\s*")


def expected_accuracy(text: str) -> tuple[float, float]:
    """Read an expected accuracy and its tolerance.

    Raises
    ------
    DemurError
        If the text has another form, or a number is not in [0, 1].

    Examples
    --------
    >>> expected_accuracy("0.76+-0.02")
    (0.76, 0.02)
    """
    found = _EXPECTED.fullmatch(text)
    try:
        numbers = [float(part) for part in found.groups()] if found else []
    except ValueError:
        numbers = []
    if len(numbers) != 2 or max(numbers) > 1:
        raise DemurError(
            "an expected accuracy is a share and a tolerance such as 0.76+-0.02, "
            f"not {text[:40]!r}."
        )
    return numbers[0], numbers[1]


def is_low(hits: int, count: int, num_classes: int) -> bool:
    """Say whether an accuracy is below twice chance, or, for few classes, nearer to chance than to
    1. One hit by luck does not count.

    Examples
    --------
    >>> is_low(19, 100, 10), is_low(21, 100, 10), is_low(74, 100, 2), is_low(1, 200, 1000)
    (True, False, True, True)
    """
    chance = 1 / num_classes
    limit = min(2 * chance, (1 + chance) / 2)
    return hits < max(limit * count, min(2.0, count / 10))


def check_accuracy(
    sample: Sample,
    runner: Runner,
    scores: Tensor,
    batch_size: int,
    expected: tuple[float, float] | None,
) -> tuple[Line, float]:
    """Compute the clean accuracy, compare it with the expected one, and look for the cause if it is
    low.

    Parameters
    ----------
    sample : Sample
    runner : Runner
    scores : Tensor of shape (n, columns)
        Of the images of the sample.
    batch_size : int
    expected : (float, float), optional
        The accuracy and its tolerance.

    Returns
    -------
    Line, float
        The line, and the share that is answered correctly and accepted.

    Raises
    ------
    DemurError
        If the accuracy is not the expected one; or no accuracy is expected, and other labels are
        clearly better, or the accuracy is low and another normalisation is surely better.
    """
    num_classes = sample.classifier.num_classes
    answers = decide(scores, num_classes)
    correct = answers == sample.labels
    accuracy = share(correct)
    low, high = clopper_pearson(int(correct.sum()), len(correct))
    text = (
        f"{percent(accuracy)} on {len(correct)} images (95 % interval {percent(low)} to "
        f"{percent(high)})"
    )
    rejected = share(answers == REJECT)
    if rejected:
        text += f", {percent(rejected)} rejected"
    missed = expected is not None and abs(accuracy - expected[0]) > expected[1] + 1e-9
    classes = scores[:, :num_classes].argmax(1)
    reason, fault = _reason(sample, runner, classes, batch_size)
    because = f" {reason}" if reason else ""
    if expected is not None and missed:
        wanted = f"{expected[0]:g}+-{expected[1]:g}"
        raise DemurError(f"clean accuracy is {text}; expected was {wanted}.{because}")
    if fault and expected is None:
        raise DemurError(f"{reason} If the accuracy is right, give --expect-accuracy.")
    low_accuracy = is_low(int((classes == sample.labels).sum()), len(classes), num_classes)
    if low_accuracy:
        text += f"; guessing reaches {percent(1 / num_classes)}, so an audit says little"
    elif rejected == 1:
        text += ": every image is rejected"
    doubtful = reason or low_accuracy or rejected == 1
    state: State = "note" if doubtful else "ok"
    return Line("clean accuracy", state, f"{text}.{because}"), accuracy


def _reason(sample: Sample, runner: Runner, classes: Tensor, batch_size: int) -> tuple[str, bool]:
    """Say why the accuracy is lower than it could be: labels, class order, normalisation, or
    nothing that is known. The second value says whether it is surely a mistake.
    """
    num_classes = sample.classifier.num_classes
    shifted = shifted_labels(classes, sample.labels, num_classes)
    if shifted is not None:
        return _relabelled("the labels are shifted by one", shifted, sample), True
    permuted = permuted_classes(classes, sample.labels, num_classes)
    if permuted is not None:
        return _relabelled("the class order differs", permuted, sample), True

    def answer(images: Tensor) -> Tensor:
        return runner.scores(images, batch_size)[:, :num_classes].nan_to_num().argmax(1)

    hits = classes == sample.labels
    preprocess = sample.classifier.preprocess
    found = better_normalisation(answer, sample.images, sample.labels, hits, preprocess)
    if found is None or is_low(round(found.after * len(hits)), len(hits), num_classes):
        return "", False  # a network that knows nothing guesses another class
    flags = f"with {found.normalisation} ({found.normalisation.name})"
    accuracy = f"accuracy is {percent(found.after)} instead of {percent(found.before)}"
    low = found.before < DOUBTFUL or is_low(int(hits.sum()), len(hits), num_classes)
    if low and found.sure:
        return f"{flags} {accuracy}: give these flags.", True
    counts = f"{found.gained} become correct, {found.lost} become wrong"
    return (
        f"Warning: {flags}, {accuracy} on the same images ({counts}). If the network was trained "
        "with this normalisation, give these flags."
    ), False


def _relabelled(fault: str, found: Relabelled, sample: Sample) -> str:
    others = sample.classifier.class_names or sample.class_names
    pairs = pairs_of(found.pairs, sample.class_names, others)
    return (
        f"{fault} ({pairs}): accuracy is {percent(found.before)}, and {percent(found.after)} with "
        "the other labels; give --label-map."
    )
