"""The models of an audit as nodes: the audited one, its mean, and the undefended ones."""

from collections.abc import Callable
from functools import partial
from typing import Final

from torch import Tensor, nn

from demur.attacks import expectation_over_transformation
from demur.attacks.frozen import kernel_machines
from demur.classifier import Classifier
from demur.data import ImageSource, without
from demur.defenses.base import Defense
from demur.errors import amount
from demur.evaluation.audit_plan import Target
from demur.evaluation.code import PACKAGE, code_fingerprint
from demur.evaluation.handshake import Handshake
from demur.evaluation.nodes import Load
from demur.files import digest
from demur.loading import LoadedModel

DRAWS: Final = 10
"""Of a randomised model, for the mean that attacks see."""


def target_of(
    classifier: Classifier,
    images: ImageSource,
    shake: Handshake,
    name: str,
    fingerprint: str,
    base: LoadedModel | None,
) -> Target:
    """Make the nodes of the models, from what the handshake found."""
    model = node_of(classifier, fingerprint, name)
    attacked = model
    if shake.randomised:
        mean = expectation_over_transformation(classifier, DRAWS)
        attacked = node_of(mean, digest(fingerprint, "mean", str(DRAWS)), f"{name} (mean)")
    undefended = None
    if classifier.rejects and shake.gradients_per_second:
        alone = without_rejection(classifier)
        undefended = node_of(alone, digest(fingerprint, "undefended"), f"{name} without rejection")
    other = None
    if base is not None:
        other = node_of(base.classifier, base.fingerprint, f"{base.source} (base)")
    return Target(
        model=model,
        attacked=attacked,
        images=images,
        rejects=classifier.rejects,
        undefended=undefended,
        base=other,
        suspicious=bool(shake.suspicious),
        gradients=shake.gradients_per_second > 0,
        kernels=bool(kernel_machines(classifier)),
    )


def unseen(images: ImageSource, classifier: Classifier) -> tuple[ImageSource, list[str]]:
    """Leave out the images that the model was made with (R17), and say how many they are."""
    if classifier.provenance is None:
        return images, []
    rest, count = without(images, classifier.provenance.images)
    return rest, [f"Left out: {amount(count, 'image')} that the model was made with."] * bool(count)


def node_of(classifier: Classifier, fingerprint: str, name: str) -> Load:
    """Make the node of a model that is in memory."""
    source: Callable[[], Classifier] = partial(_given, classifier)
    return Load(source, fingerprint, name=name)


def _given(classifier: Classifier) -> Classifier:
    return classifier


def code_of(classifier: Classifier) -> str:
    """Digest the code of the parts of demur that the classifier is made of."""
    kinds = {type(one) for one in classifier.modules()}
    return code_fingerprint(one for one in kinds if one.__module__.split(".")[0] == PACKAGE)


class _ClassesAlone(nn.Module):
    """A classifier without its reject column."""

    def __init__(self, classifier: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.classifier = classifier
        self.num_classes = num_classes

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.classifier(images)
        return scores[:, : self.num_classes]


def without_rejection(classifier: Classifier) -> Classifier:
    """Give the undefended model: the network of a defence, or the class scores alone.

    Parameters
    ----------
    classifier : Classifier
        With a reject column.

    Returns
    -------
    Classifier
        It never rejects.
    """
    inner: nn.Module = classifier
    if isinstance(classifier, Defense) and _gives_scores(classifier.network, classifier):
        inner = classifier.network
    alone = _ClassesAlone(inner, classifier.num_classes)
    return Classifier(alone, classifier.num_classes, rejects=False).eval()


def _gives_scores(network: nn.Module, classifier: Classifier) -> bool:
    """Say whether the last layer of a network has as many columns as there are classes."""
    if isinstance(network, Classifier):
        return network.num_classes == classifier.num_classes
    linear = [one for one in network.modules() if isinstance(one, nn.Linear)]
    columns = (classifier.num_classes, classifier.num_classes + 1)
    return bool(linear) and linear[-1].out_features in columns
