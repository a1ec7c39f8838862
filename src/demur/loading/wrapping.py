"""`wrap`: any module as a classifier, with normalisation inside and the reject column last."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from demur.classifier import Classifier, Preprocess, check_counts, device_of, evaluating
from demur.data.messages import printable
from demur.errors import DemurError
from demur.loading.request import RejectColumn
from demur.loading.user_code import last_line
from demur.networks.adapted import AdaptedNetwork, scores_of

LIBRARIES = (Path(torch.__file__).parent, Path(__file__).parents[1])
"""The folders of torch and demur: their lines say nothing about a user's module."""


class SizeUnknownError(DemurError):
    """Raised where the size of the images is needed to find the number of classes.

    Examples
    --------
    >>> raise SizeUnknownError("the number of classes is not known.")
    Traceback (most recent call last):
    demur.loading.wrapping.SizeUnknownError: the number of classes is not known.
    """


def wrap(
    module: nn.Module,
    *,
    num_classes: int | None = None,
    preprocess: Preprocess | None = None,
    class_names: Sequence[str] | None = None,
    rejects: bool | None = None,
) -> Classifier:
    """Make a classifier of any module that gives scores.

    Parameters
    ----------
    module : nn.Module
        Maps float images (N, C, H, W) to scores (N, columns), or to an object with scores in its
        attribute `logits`. A `Classifier` is returned itself, with the given preprocessing and
        names. A module in half or double precision is copied, and the copy computes in float32.
    num_classes : int, optional
        Number of classes K. By default one forward pass on a black image of `preprocess.size` gives
        it.
    preprocess : Preprocess, optional
        How an image file becomes an input. Normalisation by its mean and std is put in front of the
        module, so that the classifier takes pixels in [0, 1].
    class_names : sequence of str, optional
        Names of the K classes.
    rejects : bool, optional
        Whether the last column is the reject score. By default it is if there are K + 1 columns; if
        `num_classes` is not given, every column is a class.

    Returns
    -------
    Classifier
        It shares the weights of the module.

    Raises
    ------
    DemurError
        If the number of classes is not known, or the module does not give scores of that number.

    Examples
    --------
    >>> import torch
    >>> from demur import wrap
    >>> from demur.classifier import Preprocess
    >>> module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64, 10))
    >>> classifier = wrap(module, preprocess=Preprocess((8, 8), mean=(0.5,), std=(0.25,)))
    >>> classifier.num_classes, classifier.rejects
    (10, False)
    """
    if isinstance(module, Classifier):
        return described(module, num_classes, preprocess, class_names, rejects)
    if not isinstance(module, nn.Module):
        raise DemurError(f"wrap needs an nn.Module or a Classifier, not {type(module).__name__}.")
    if num_classes is not None:
        check_counts(num_classes=num_classes)
    network = in_float32(module)
    return classifier_of(network, num_classes, preprocess, class_names, rejects)


def in_float32(module: nn.Module) -> nn.Module:
    """Give the module, or a copy in float32 if its parameters have another precision."""
    if not precisions(module):
        return module
    try:
        return copy.deepcopy(module).float()
    except (RuntimeError, TypeError) as error:
        raise DemurError(
            f"the module cannot be copied to float32: {printable(error)}. Convert it yourself, "
            "with .float()."
        ) from error


def precisions(module: nn.Module) -> list[str]:
    """Name the floating-point types of the parameters besides float32."""
    kinds = {one.dtype for one in module.parameters() if one.is_floating_point()}
    return sorted(str(kind).removeprefix("torch.") for kind in kinds - {torch.float32})


def channels_of(module: nn.Module) -> int:
    """Guess the channels of the images from the first convolution: 1, or else 3."""
    first = next((one for one in module.modules() if isinstance(one, nn.Conv2d)), None)
    return 1 if first is not None and first.in_channels == 1 else 3


def classifier_of(
    network: nn.Module,
    num_classes: int | None,
    preprocess: Preprocess | None,
    class_names: Sequence[str] | None,
    rejects: bool | None,
    reject_column: RejectColumn = None,
) -> Classifier:
    """Make a classifier of a module in float32; it is tried on a black image of a known size.

    The parameters are those of `wrap`. `reject_column` is the column of the reject score.
    """
    rejects = True if reject_column is not None else rejects
    answer = None
    columns = None
    if preprocess is not None and preprocess.size is not None:
        answer = _answer(network, (1, preprocess.channels, *preprocess.size))
        columns = scores_of(answer).shape[1]
    num_classes, rejects = _counted(num_classes, columns, rejects)
    moved = None
    if isinstance(reject_column, int):
        if reject_column > num_classes:
            raise DemurError(
                f"reject_column is {reject_column}, but the columns are 0 to {num_classes}."
            )
        moved = None if reject_column == num_classes else reject_column
    mean = preprocess.mean if preprocess else ()
    std = preprocess.std if preprocess else ()
    # Untried, a module may return an object with logits. demur's own networks do not: a bundle
    # describes them, so they stay as they are.
    untried = answer is None and not hasattr(network, "architecture")
    if mean or moved is not None or untried or not isinstance(answer, Tensor | None):
        network = AdaptedNetwork(network, mean, std, moved)
    classifier = Classifier(network, num_classes, rejects)
    classifier.preprocess = preprocess
    classifier.class_names = _names(class_names, num_classes, rejects, reject_column)
    return classifier


def _answer(network: nn.Module, shape: tuple[int, ...]) -> object:
    """Give the module's answer to a black image, and check its shape."""
    image = torch.zeros(shape, device=device_of(network, torch.device("cpu")))
    with torch.no_grad(), evaluating(network), failing_on(shape):
        answer: object = network(image)
    scores = scores_of(answer)
    if scores.ndim != 2 or len(scores) != 1:
        raise DemurError(
            f"the module gave {tuple(scores.shape)} for one image, and a classifier gives "
            "(1, columns): demur audits classifiers."
        )
    return answer


@contextmanager
def failing_on(shape: tuple[int, ...]) -> Iterator[None]:
    """Turn the error of a module into one line that names the images it failed on."""
    try:
        yield
    except DemurError:
        raise
    except Exception as error:  # a module may fail with any error
        place = last_line(error, lambda file: not any(map(file.is_relative_to, LIBRARIES)))
        raise DemurError(
            f"the module fails on an image of shape {shape}{f' ({place})' if place else ''}: "
            f"{type(error).__name__}: {printable(error).rstrip('.')}. Does it take that size?"
        ) from error


def _counted(
    num_classes: int | None, columns: int | None, rejects: bool | None
) -> tuple[int, bool | None]:
    """Give the number of classes, and whether there is a reject column."""
    if columns is None:
        if num_classes is None:
            raise SizeUnknownError(
                "the number of classes is not known: give the size of the images (--img-size N; "
                "preprocess in Python), on which demur tries the module, or the number "
                "(--num-classes K; num_classes in Python)."
            )
        return num_classes, rejects
    if num_classes is None:
        num_classes = columns - bool(rejects)
        rejects = bool(rejects)
    if rejects is None:
        rejects = columns == num_classes + 1
    if columns != num_classes + rejects:
        kind = "and a reject column" if rejects else "without a reject column"
        raise DemurError(
            f"the module gives {columns} scores, but {num_classes} classes {kind} need "
            f"{num_classes + rejects}."
        )
    return num_classes, rejects


def _names(
    given: Sequence[str] | None,
    num_classes: int,
    rejects: bool | None,
    reject_column: RejectColumn = None,
) -> tuple[str, ...] | None:
    """Give the names of the classes, without the name of the reject column."""
    if given is None:
        return None
    names = [str(name) for name in given]
    if rejects and len(names) == num_classes + 1:
        del names[reject_column if isinstance(reject_column, int) else -1]
    if len(names) != num_classes:
        raise DemurError(f"there are {len(given)} class_names for {num_classes} classes.")
    return tuple(names)


def described(
    classifier: Classifier,
    num_classes: int | None,
    preprocess: Preprocess | None,
    class_names: Sequence[str] | None,
    rejects: bool | None,
) -> Classifier:
    """Set the preprocessing and the names of a classifier, and check what else is said of it."""
    if num_classes not in (None, classifier.num_classes):
        raise DemurError(
            f"num_classes is {num_classes}, but the classifier has {classifier.num_classes}."
        )
    known = classifier._columns.value
    if rejects is not None and known is not None and rejects != known:
        raise DemurError(f"rejects is {rejects}, but the classifier says {known}.")
    if preprocess is not None:
        own = classifier.preprocess or Preprocess(channels=preprocess.channels)
        if (preprocess.mean, preprocess.std) not in (((), ()), (own.mean, own.std)):
            raise DemurError(
                "a Classifier takes pixels in [0, 1] and normalises inside: leave mean and std "
                "out, or give the bare module."
            )
        classifier.preprocess = preprocess
    if class_names is not None:
        classifier.class_names = _names(class_names, classifier.num_classes, known)
    return classifier
