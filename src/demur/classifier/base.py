"""The class of all classifiers and defences."""

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from demur.classifier.cache import Cache
from demur.classifier.checks import check_counts, check_images, check_labels
from demur.classifier.decisions import decide, outcomes_of
from demur.classifier.guard import Probes, answer_of, table_of
from demur.classifier.modes import device_of, evaluating
from demur.classifier.preprocess import Preprocess
from demur.classifier.provenance import Provenance
from demur.errors import DemurError, ModuleError
from demur.hardware import tuned


class Classifier(nn.Module):
    """A module whose scores decide between classes and, perhaps, rejection.

    The decision is the column with the largest score. Column `num_classes`, if there is one, is the
    reject score. The classifier is an ordinary `nn.Module`: differentiable end to end, saved, moved
    and attacked as a whole.

    Parameters
    ----------
    module : nn.Module
        Maps float images (N, C, H, W) in [0, 1] to scores (N, num_classes) or (N, num_classes + 1).
        Normalisation, centring and filters belong to the module.
    num_classes : int
        Number of classes K, at least 2.
    rejects : bool, optional
        Whether the scores have a reject column. If None, the first forward pass decides.

    Examples
    --------
    >>> import torch
    >>> from demur import Classifier
    >>> module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4))
    >>> classifier = Classifier(module, num_classes=3, rejects=True)
    >>> images = torch.rand(5, 1, 8, 8)
    >>> classifier.predict(images).shape, classifier.predict_proba(images).shape
    (torch.Size([5]), torch.Size([5, 3]))
    >>> classifier.threshold
    0.0

    Attributes
    ----------
    preprocess : Preprocess or None
        How an image file becomes an input, where that is known.
    class_names : tuple of str or None
        Names of the classes, where they are known.
    provenance : Provenance or None
        What the classifier was made from, if `demur.harden` made it.
    """

    preprocess: Preprocess | None = None
    class_names: tuple[str, ...] | None = None
    provenance: Provenance | None = None

    def __init__(self, module: nn.Module, num_classes: int, rejects: bool | None = None) -> None:
        super().__init__()
        check_counts(num_classes=num_classes)
        if num_classes < 2:
            raise DemurError(f"a classifier needs at least 2 classes, not {num_classes}.")
        self.module = module
        self.num_classes = num_classes
        self._columns = Cache(rejects)  # the first forward pass fills it if it is None
        self._probes: Cache[Probes] = Cache({})
        self._threshold = 0.0

    @property
    def rejects(self) -> bool:
        """Whether the scores have a reject column. Raise DemurError if that is not known yet."""
        if self._columns.value is None:
            raise DemurError(
                "whether this classifier rejects is not known before its first forward pass: "
                "give rejects=True or rejects=False, or score some images first."
            )
        return self._columns.value

    @property
    def threshold(self) -> float | None:
        """The smallest reject margin that is accepted, or None if the classifier never rejects.

        The reject margin of an image is its best class score minus its reject score.
        """
        return self._threshold if self.rejects else None

    @property
    def works_in_place(self) -> bool:
        """Whether the module was seen to change its input: then it gets copies of the images."""
        return any(self._probes.value.values())

    def set_threshold(self, value: float) -> None:
        """Change the threshold. Larger values reject more images.

        Parameters
        ----------
        value : float, in score units
            The smallest accepted margin of the best class score over the learned reject score.

        Raises
        ------
        DemurError
            If the classifier never rejects, or the value is not finite.
        """
        if not self.rejects:
            raise DemurError("this classifier has no reject score, so it has no threshold.")
        if not math.isfinite(value):
            raise DemurError(f"a threshold must be a finite number, not {value}.")
        self._move_threshold(float(value))

    def _move_threshold(self, value: float) -> None:
        self._threshold = value

    def _acceptance(self, scores: Tensor) -> Tensor:
        """Give, for scores (N, K + 1), the number (N,) float64 that the threshold is compared with:
        images at least at the threshold are accepted. It does not depend on the threshold.
        """
        best = scores[:, : self.num_classes].amax(1).double()
        return best - (scores[:, -1].double() - self._threshold)

    def _acceptance_of(self, images: Tensor, scores: Tensor) -> Tensor:
        """Give `_acceptance` of images (N, ...) in [0, 1] and their scores. A threshold that is no
        function of the scores needs the images.
        """
        return self._acceptance(scores)

    def _accept_from(self, value: float) -> None:
        """Set the threshold, in the scale of `_acceptance`."""
        self._move_threshold(value)

    def forward(self, images: Tensor) -> Tensor:
        """Compute scores (N, num_classes [+ 1]) of images (N, C, H, W) in the module's precision.

        Raises
        ------
        ModuleError
            If the module fails, does not return one row of scores for each image, or the number of
            columns contradicts `num_classes` and `rejects`.
        """
        answer = answer_of(self.module, images, self._probes.value)
        if torch.compiler.is_exporting() and isinstance(answer, Tensor):
            scores = answer  # the number of images is a symbol: it cannot be checked
        else:
            scores = self._table(answer, len(images))
        if self._threshold and scores.shape[1] > self.num_classes:
            scores = torch.cat([scores[:, :-1], scores[:, -1:] + self._threshold], 1)
        return scores

    def _table(self, answer: object, count: int) -> Tensor:
        """Check the module's answer, and learn from the first one whether it rejects."""
        rejects = self._columns.value
        scores = table_of(answer, count, self.num_classes, rejects)
        if rejects is None:
            self._columns.value = scores.shape[1] > self.num_classes
        return scores

    @torch.no_grad()
    def predict(self, images: Tensor, batch_size: int = 512) -> Tensor:
        """Decide on each image, in evaluation mode.

        Parameters
        ----------
        images : Tensor of shape (N, C, H, W), float in [0, 1]
        batch_size : int, default 512
            Images in one forward pass.

        Returns
        -------
        Tensor of shape (N,), int64
            A class in 0..num_classes-1, or REJECT (-1).

        Raises
        ------
        DemurError
            If the images do not fit, or a score is NaN or infinite.
        """
        return decide(self.scores(images, batch_size), self.num_classes)

    @torch.no_grad()
    def scores(self, images: Tensor, batch_size: int = 512) -> Tensor:
        """Compute scores in evaluation mode and float32, batch by batch, on the module's device.

        Several threads may call it at the same time, also on a classifier in training mode. The
        parameters and errors are those of `predict`.

        Returns
        -------
        Tensor of shape (N, num_classes [+ 1]), float32
            On the device of the images.
        """
        check_images(images)
        check_counts(batch_size=batch_size)
        device = device_of(self, images.device)
        with evaluating(self), tuned(), torch.autocast(device.type, enabled=False):
            # Copies: a module may write all its answers into the same memory.
            batches = [
                self(batch.to(device)).to(images.device, torch.float32, copy=True)
                for batch in torch.split(images, int(batch_size))
            ]
        scores = torch.cat(batches)
        if not bool(torch.isfinite(scores).all()):
            bad = int((~torch.isfinite(scores)).any(dim=1).sum())
            raise DemurError(
                f"the classifier gave NaN or infinite scores for {bad} of {len(images)} images: "
                "no decision can be made on them."
            )
        return scores

    @torch.no_grad()
    def predict_proba(self, images: Tensor, batch_size: int = 512) -> Tensor:
        """Estimate the probability of each class, given that one of them is right.

        The parameters and errors are those of `predict`.

        Returns
        -------
        Tensor of shape (N, num_classes), float32
            Each row sums to 1. The softmax of the class scores, without the reject score.
        """
        scores = self.scores(images, batch_size)
        return self._probabilities(scores[:, : self.num_classes])

    def _probabilities(self, scores: Tensor) -> Tensor:
        """Probabilities (N, K) from class scores (N, K)."""
        inner = self.module
        if isinstance(inner, Classifier) and inner.num_classes == self.num_classes:
            return inner._probabilities(scores)
        return scores.softmax(1)


class _BlackBox(nn.Module):
    def __init__(self, function: Callable[[NDArray[np.float32]], NDArray[np.floating]]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        given = self.function(images.detach().cpu().numpy().astype(np.float32))
        try:
            answer = np.asarray(given)
        except ValueError:
            raise ModuleError("the black box gave rows of different lengths.") from None
        if answer.dtype.kind not in "fiu" or answer.shape[:1] != (len(images),):
            raise ModuleError(
                f"the black box gave {answer.dtype} of shape {answer.shape} for {len(images)} "
                "images; it must give one row of numbers for each image."
            )
        return torch.as_tensor(answer, dtype=images.dtype, device=images.device)


def black_box(
    function: Callable[[NDArray[np.float32]], NDArray[np.floating]], num_classes: int
) -> Classifier:
    """Make a classifier of a function without gradients: an HTTP endpoint, an ONNX session.

    Parameters
    ----------
    function : callable
        Maps a float32 array (N, C, H, W) in [0, 1] to scores (N, num_classes [+ 1]). If it takes
        one image at a time, score it with `batch_size=1`.
    num_classes : int
        Number of classes.

    Returns
    -------
    Classifier
        Attacks that need gradients refuse it. `Square`, `RandomNoise` and `Transfer` accept it.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from demur import black_box
    >>> classifier = black_box(lambda images: images.reshape(len(images), -1)[:, :2], 2)
    >>> classifier.predict(torch.tensor([[0.1, 0.9], [0.8, 0.2]]))
    tensor([1, 0])
    """
    return Classifier(_BlackBox(function), num_classes)


def outcomes(
    classifier: Classifier, images: Tensor, labels: Tensor, batch_size: int = 512
) -> Tensor:
    """Find the outcome of each image.

    Parameters
    ----------
    classifier : Classifier
    images : Tensor of shape (N, C, H, W), float in [0, 1]
    labels : Tensor of shape (N,), integers in 0..num_classes-1
    batch_size : int, default 512
        Images in one forward pass.

    Returns
    -------
    Tensor of shape (N,), int64
        Values of `Outcome`.

    Raises
    ------
    DemurError
        If the classifier, the images or the labels do not fit.

    Examples
    --------
    >>> import torch
    >>> from demur import black_box, outcomes
    >>> classifier = black_box(lambda images: images.reshape(len(images), -1), 2)
    >>> images = torch.tensor([[0.9, 0.1, 0.2], [0.1, 0.2, 0.9], [0.1, 0.9, 0.2]])
    >>> outcomes(classifier, images, torch.tensor([0, 0, 0]))
    tensor([0, 1, 2])
    """
    check_classifier(classifier)
    check_labels(labels, len(images), classifier.num_classes)
    return outcomes_of(classifier.predict(images, batch_size), labels)


def check_classifier(classifier: object) -> None:
    """Raise DemurError unless the object is a Classifier."""
    if not isinstance(classifier, Classifier):
        bare = isinstance(classifier, nn.Module)
        remedy = " Wrap it: Classifier(module, num_classes=...)." if bare else ""
        raise DemurError(f"a demur Classifier is needed, not {type(classifier).__name__}.{remedy}")
