"""Pictures for the gallery: which of many, and what is said of each."""

from collections.abc import Iterator
from itertools import zip_longest
from typing import Literal

from torch import Tensor

from demur.attacks import sizes
from demur.classifier import Classifier, Outcome, decide, outcomes_of
from demur.data import ImageSet, as_floats
from demur.experiments.results import Picture

_NAMES: tuple[Literal["correct", "rejected", "wrong"], ...] = ("correct", "rejected", "wrong")  # in the order of Outcome


def mixed(outcomes: Tensor, start: int) -> list[int]:
    """Indices of all outcomes (N,), in turn a rejected, a wrong and a correct one for as long as there are such.

    The first is number `start` of its outcome, so that not all attacks begin with the same image.
    """
    found = [(outcomes == outcome).nonzero().flatten() for outcome in (Outcome.REJECTED, Outcome.WRONG, Outcome.CORRECT)]
    by_outcome = [index.roll(-start).tolist() for index in found]
    return [index for turn in zip_longest(*by_outcome) for index in turn if index is not None]


def describe(
    classifier: Classifier, model: str, attack: str, attacker: str, clean: ImageSet, attacked: Tensor, probabilities: bool = False
) -> Iterator[Picture]:
    """Say of each picture what the model answered before and after.

    The score is the softmax of the answer's column, or the column itself where scores are `probabilities`.
    """
    before, after = classifier.scores(clean.floats()), classifier.scores(as_floats(attacked))
    sure = [scores if probabilities else scores.softmax(1) for scores in (before, after)]
    decided = decide(after, classifier.num_classes)
    became = outcomes_of(decided, clean.labels)
    moved = sizes(clean.floats(), as_floats(attacked))
    names = [*clean.class_names, "reject"]  # REJECT is -1: the last
    for row, label in enumerate(clean.labels.tolist()):
        yield Picture(
            label=names[label],
            model=model,
            attack=attack,
            attacker=attacker,
            clean_decision=names[int(decide(before, classifier.num_classes)[row])],
            clean_score=float(sure[0][row].max()),
            decision=names[int(decided[row])],
            score=float(sure[1][row].max()),
            outcome=_NAMES[int(became[row])],
            l2=float(moved["l2"][row]),
            linf=float(moved["linf"][row]),
        )
