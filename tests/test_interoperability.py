"""A Classifier is a plain nn.Module to other attack libraries, reject column and all. Needs the `peers` extra."""

import pytest
import torch

from demur.attacks import sizes
from models import convolutional, images_of

EPS = 0.1


@pytest.fixture(params=[3, 4], ids=["no reject column", "reject column"])
def attacked(request):
    """A classifier of 3 classes, images, and the columns that it decides on."""
    classifier = convolutional(3, request.param).eval()
    images = images_of(16)
    return classifier, images, classifier(images).argmax(1)


def holds(classifier, images, attacked_images, columns):
    assert bool((sizes(images, attacked_images)["linf"] <= EPS * (1 + 1e-5)).all())
    assert bool((classifier(attacked_images).argmax(1) != columns).any())


def test_foolbox(attacked):
    foolbox = pytest.importorskip("foolbox", reason="the peers extra is not installed")
    classifier, images, columns = attacked
    model = foolbox.PyTorchModel(classifier, bounds=(0, 1), device="cpu")
    _, found, _ = foolbox.attacks.LinfPGD()(model, images, columns, epsilons=EPS)
    holds(classifier, images, found, columns)


def test_art(attacked):
    pytest.importorskip("art", reason="the peers extra is not installed")
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    classifier, images, columns = attacked
    outputs = classifier(images).shape[1]
    estimator = PyTorchClassifier(classifier, torch.nn.CrossEntropyLoss(), (1, 8, 8), outputs, clip_values=(0, 1), device_type="cpu")
    found = ProjectedGradientDescent(estimator, eps=EPS, eps_step=0.02, max_iter=10, verbose=False).generate(
        images.numpy(), columns.numpy()
    )
    holds(classifier, images, torch.from_numpy(found), columns)


def test_torchattacks_and_its_autoattack(attacked):
    torchattacks = pytest.importorskip("torchattacks", reason="the peers extra is not installed")
    classifier, images, columns = attacked
    outputs = classifier(images).shape[1]
    holds(classifier, images, torchattacks.PGD(classifier, eps=EPS, alpha=0.02, steps=10)(images, columns), columns)
    holds(classifier, images, torchattacks.APGD(classifier, eps=EPS, steps=5)(images, columns), columns)
    if outputs > 3:  # its targeted parts need four columns
        strongest = torchattacks.AutoAttack(classifier, eps=EPS, n_classes=outputs)
        holds(classifier, images[:6], strongest(images[:6], columns[:6]), columns[:6])
