"""Background classes: the "none of the above" of a set of key classes, and its selection.

Source: McCoyd & Wagner 2018, "Background Class Defense Against Adversarial Examples", sections
IV.A and IV.B.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from demur.classifier import check_labels
from demur.data.images import ImageSet
from demur.errors import DemurError
from demur.progress import job
from demur.seeds import derive


def with_background(
    images: ImageSet, keys: Sequence[str], background: Sequence[str], name: str = "background"
) -> ImageSet:
    """Keep the key classes and merge the background classes into one last class.

    Parameters
    ----------
    images : ImageSet
        Images of the key classes and of the background classes. Other images are dropped.
    keys : sequence of str
        Key classes, in the order of the new labels.
    background : sequence of str
        Background classes, at least one.
    name : str, default="background"
        Name of the merged class.

    Returns
    -------
    ImageSet
        Labels 0..K-1 are the key classes, label K is the background.

    Raises
    ------
    DemurError
        For an unknown class, a class that is named twice, no background class, or a key class with
        the name of the merged class.

    Examples
    --------
    >>> from demur import data
    >>> digits = data.load("digits", "test")
    >>> with_background(digits, ["3", "8"], ["0", "1"]).class_names
    ('3', '8', 'background')
    """
    if not background:
        raise DemurError("a background class needs at least one class of background images.")
    if name in keys:
        raise DemurError(f"the background class cannot be called {name!r}: a key class is.")
    groups: dict[str, Sequence[str | int]] = {
        images.class_names[index]: [index] for index in images.class_indices(keys)
    }
    return images.merge_classes({**groups, name: background})


class FitPredict(Protocol):
    """Trains a classifier on one image set and predicts the classes of another."""

    def __call__(
        self, train: ImageSet, test: ImageSet, *, repeat: int, fold: int, seed: int
    ) -> Tensor:
        """Predict the labels of the test images.

        Parameters
        ----------
        train, test : ImageSet
            Images to train on and to predict, with the same classes.
        repeat, fold : int
            Part of the cross-validation, from 0.
        seed : int
            Seed of this part.

        Returns
        -------
        Tensor
            Labels (N,) int64 of the N test images.
        """
        ...


@dataclass(frozen=True)
class CandidateRate:
    """Cross-validated predictions for the images of one candidate class.

    Parameters
    ----------
    name : str
        The candidate class.
    images : int
        Number of its images.
    rate : float
        Fraction of the predictions that are any candidate class.
    confused_with : str or None
        Key class that is predicted most often; None if no key class is predicted.
    confused_rate : float
        Fraction of the predictions that are this key class.
    """

    name: str
    images: int
    rate: float
    confused_with: str | None
    confused_rate: float


@dataclass(frozen=True)
class Selection:
    """Result of `confusing_classes`.

    Parameters
    ----------
    table : tuple of CandidateRate
        The candidates by rate, the highest first.
    cutoff : float
        Smallest rate of a candidate that is kept.
    images : int
        Number of images of keys and candidates.
    """

    table: tuple[CandidateRate, ...]
    cutoff: float
    images: int

    @property
    def kept(self) -> tuple[str, ...]:
        """The candidates that are rarely confused with a key class."""
        return self.at(self.cutoff)

    @property
    def dropped(self) -> tuple[str, ...]:
        """The confusing candidates."""
        return tuple(row.name for row in self.table if row.rate < self.cutoff)

    def at(self, cutoff: float) -> tuple[str, ...]:
        """Return the candidates that are kept at another cutoff, the highest rate first."""
        return tuple(row.name for row in self.table if row.rate >= cutoff)


def confusing_classes(
    images: ImageSet,
    keys: Sequence[str],
    candidates: Sequence[str],
    fit_predict: FitPredict,
    *,
    folds: int = 10,
    repeats: int = 4,
    cutoff: float = 0.98,
    seed: int = 0,
) -> Selection:
    """Find the candidate classes that look like a key class, by repeated cross-validation.

    A classifier of all classes is trained on each training part. A candidate class is kept if at
    least `cutoff` of the predictions for its images, over all folds and repeats, are candidate
    classes (McCoyd & Wagner 2018, section IV.A).

    Parameters
    ----------
    images : ImageSet
        Images of keys and candidates. Other images are left out.
    keys : sequence of str
        Key classes, at least one.
    candidates : sequence of str
        Candidates for the background, at least one.
    fit_predict : FitPredict
        Trains a classifier and predicts the test part.
    folds : int, default=10
        Folds of a cross-validation, from 2 to the number of images of the rarest class.
    repeats : int, default=4
        Number of cross-validations.
    cutoff : float, default=0.98
        Smallest rate of a candidate that is kept, in [0, 1].
    seed : int, default=0
        Seed of the folds and of the trainings.

    Returns
    -------
    Selection
        The candidates by rate, and the cutoff.

    Raises
    ------
    DemurError
        For classes that are unknown, named twice or too rare, and for predictions that are not
        labels of the set.

    Examples
    --------
    >>> from demur import data
    >>> def perfect(train, test, *, repeat, fold, seed):
    ...     return test.labels
    >>> digits = data.load("digits", "test")
    >>> confusing_classes(digits, ["3"], ["8", "9"], perfect, folds=2, repeats=1).kept
    ('8', '9')
    """
    if repeats < 1 or not 0 <= cutoff <= 1:
        raise DemurError(
            f"repeats must be at least 1 and the cutoff in [0, 1], got {repeats} and {cutoff:g}."
        )
    if not keys or not candidates:
        raise DemurError("a selection needs at least one key class and one candidate class.")
    chosen = torch.tensor(images.class_indices([*keys, *candidates]))
    part = images.subset(torch.isin(images.labels, chosen).nonzero().flatten())
    counts = part.counts()
    for label in chosen.tolist():
        if int(counts[label]) < folds:
            raise DemurError(
                f"class {images.class_names[label]!r} of {images.name} has {int(counts[label])} "
                f"images: too few for {folds} folds."
            )
    confusion = _confusion(part, fit_predict, folds, repeats, seed)
    rates = confusion.double() / confusion.sum(dim=1, keepdim=True)
    rows = _rows(part, rates, chosen[: len(keys)], chosen[len(keys) :])
    rows.sort(key=lambda row: (-row.rate, row.name))
    return Selection(tuple(rows), cutoff, len(part))


def _confusion(
    part: ImageSet, fit_predict: FitPredict, folds: int, repeats: int, seed: int
) -> Tensor:
    """Count the predictions (K, K) of each class over all folds and repeats."""
    confusion = torch.zeros(part.num_classes, part.num_classes, dtype=torch.int64)
    with job("selecting background classes", repeats * folds) as progress:
        for repeat in range(repeats):
            for fold, (train, test) in enumerate(part.folds(folds, derive(seed, "repeat", repeat))):
                test_set = part.subset(test)
                own_seed = derive(seed, "selection", repeat, fold)
                predicted = fit_predict(
                    part.subset(train), test_set, repeat=repeat, fold=fold, seed=own_seed
                ).cpu()
                check_labels(predicted, len(test_set), part.num_classes)
                pairs = test_set.labels * part.num_classes + predicted
                confusion += torch.bincount(pairs, minlength=confusion.numel()).view_as(confusion)
                progress.advance(1)
    return confusion


def _rows(part: ImageSet, rates: Tensor, keys: Tensor, candidates: Tensor) -> list[CandidateRate]:
    """Summarise the predicted classes (K, K) of each candidate."""
    rows = []
    for label in candidates.tolist():
        confused = keys[rates[label, keys].argmax()]
        confused_rate = float(rates[label, confused])
        rows.append(
            CandidateRate(
                part.class_names[label],
                int(part.counts()[label]),
                float(rates[label, candidates].sum()),
                part.class_names[confused] if confused_rate else None,
                confused_rate,
            )
        )
    return rows
