"""Scores that are probabilities, and their logarithms."""

import torch
from torch import Tensor, nn

from demur.classifier import Classifier


def are_probabilities(scores: Tensor, num_classes: int) -> bool:
    """Say whether all scores (n, columns) look like probabilities: the test of AutoAttack.

    Examples
    --------
    >>> are_probabilities(torch.tensor([[0.25, 0.75], [1.0, 0.0]]), 2)
    True
    """
    for part in (scores, scores[:, :num_classes]):
        inside = bool((part < 1 + 1e-5).all()) and bool((part > -1e-5).all())
        if inside and bool(((part.double().sum(1) - 1).abs() < 1e-5).all()):
            return True
    return False


class LogScores(nn.Module):
    """The logarithms of a classifier's scores, which are probabilities. Decisions do not change.

    Parameters
    ----------
    classifier : Classifier
        Its scores are at least 0.

    Examples
    --------
    >>> halves = Classifier(nn.Flatten(), 2)
    >>> LogScores(halves)(torch.tensor([[[[0.5, 0.5]]]]))
    tensor([[-0.6931, -0.6931]])
    """

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logarithms (N, columns)."""
        scores: Tensor = self.classifier(images)
        return scores.clamp(min=torch.finfo(scores.dtype).tiny).log()


def with_logarithms(classifier: Classifier) -> Classifier:
    """Give a classifier with the same decisions, whose scores are the logarithms.

    Examples
    --------
    >>> with_logarithms(Classifier(nn.Flatten(), 2, rejects=False)).rejects
    False
    """
    found = Classifier(LogScores(classifier), classifier.num_classes, classifier._columns.value)
    found.preprocess = classifier.preprocess
    found.class_names = classifier.class_names
    return found.train(classifier.training)
