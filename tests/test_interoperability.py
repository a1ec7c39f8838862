"""A Classifier is a plain nn.Module for other attack libraries, with its reject column.

Needs the extra `peers`.
"""

import importlib
import os
from pathlib import Path

import pytest
import torch

from demur import outcomes
from demur.attacks import APGD, Strongest, masks, sizes
from demur.norms import ball_of
from demur.threat import ThreatModel
from models import convolutional, images_of

EPS = 0.1


@pytest.fixture(params=[3, 4], ids=["no reject column", "reject column"])
def attacked(request):
    """A classifier of 3 classes, images, and the columns that it decides on."""
    classifier = convolutional(3, request.param).eval()
    images = images_of(16)
    return classifier, images, classifier(images).argmax(1)


def peer(name):
    """Import another library. Skip if it is not installed, unless DEMUR_PEERS is set."""
    if os.environ.get("DEMUR_PEERS"):
        return importlib.import_module(name)
    return pytest.importorskip(name, reason="the peers extra is not installed")


def holds(classifier, images, attacked_images, columns):
    assert bool((sizes(images, attacked_images)["linf"] <= EPS * (1 + 1e-5)).all())
    assert bool((classifier(attacked_images).argmax(1) != columns).any())


def no_weaker_than(classifier, images, theirs):
    """R18: the ensemble breaks at least as many images as another library's attack."""
    labels = classifier(images)[:, : classifier.num_classes].argmax(1)
    ensemble = Strongest(steps=30, n_queries=200)
    ours = ensemble(classifier, images, labels, ThreatModel("linf", EPS))
    wrong = outcomes(classifier, theirs.clamp(0, 1), labels) == 2
    assert int(ours.success.sum()) >= int(wrong.sum())


@pytest.fixture
def autoattack(monkeypatch):
    """AutoAttack in its authors' code, from the folder that DEMUR_PEERS_PATH names."""
    folder = os.environ.get("DEMUR_PEERS_PATH")
    if not folder:
        pytest.skip("DEMUR_PEERS_PATH is not set")
    monkeypatch.syspath_prepend(str(Path(folder) / "auto-attack"))
    return importlib.import_module("autoattack")


def test_autoattack_breaks_no_more_than_the_ensemble(autoattack):
    """Ten classes, because AutoAttack needs nine targets; without and with a reject column."""
    images = images_of(8)
    for columns in (10, 11):
        classifier = convolutional(10, columns).eval()
        labels = classifier(images).argmax(1)
        attack = autoattack.AutoAttack(
            classifier, norm="Linf", eps=EPS, seed=0, verbose=False, device="cpu"
        )
        attack.square.n_queries = 200
        found = attack.run_standard_evaluation(images, labels)
        holds(classifier, images, found, labels)
        no_weaker_than(classifier, images, found)


def test_foolbox(attacked):
    foolbox = peer("foolbox")
    classifier, images, columns = attacked
    model = foolbox.PyTorchModel(classifier, bounds=(0, 1), device="cpu")
    _, found, _ = foolbox.attacks.LinfPGD()(model, images, columns, epsilons=EPS)
    holds(classifier, images, found, columns)
    no_weaker_than(classifier, images, found)


def test_art(attacked):
    peer("art")
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    classifier, images, columns = attacked
    outputs = classifier(images).shape[1]
    estimator = PyTorchClassifier(
        classifier,
        torch.nn.CrossEntropyLoss(),
        (1, 8, 8),
        outputs,
        clip_values=(0, 1),
        device_type="cpu",
    )
    found = ProjectedGradientDescent(
        estimator, eps=EPS, eps_step=0.02, max_iter=10, verbose=False
    ).generate(images.numpy(), columns.numpy())
    holds(classifier, images, torch.from_numpy(found), columns)
    no_weaker_than(classifier, images, torch.from_numpy(found))


def test_our_check_catches_a_masked_attack_that_leaves_its_mask(attacked):
    """R26: ours does not change a bit outside the mask.

    Negative control: ART's masked APGD moves pixels outside its mask.
    """
    peer("art")
    from art.attacks.evasion import AutoProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    classifier, images, columns = attacked
    outputs = classifier(images).shape[1]
    inside = masks.centre_box((8, 8), 4, 4)
    estimator = PyTorchClassifier(
        classifier,
        torch.nn.CrossEntropyLoss(),
        (1, 8, 8),
        outputs,
        clip_values=(0, 1),
        device_type="cpu",
    )
    options = {
        "eps": EPS,
        "eps_step": 0.03,
        "max_iter": 10,
        "nb_random_init": 2,
        "loss_type": "cross_entropy",
        "verbose": False,
    }
    theirs = torch.from_numpy(
        AutoProjectedGradientDescent(estimator, **options).generate(
            images.numpy(), columns.numpy(), mask=inside[0].numpy()
        )
    )
    ball = ball_of("linf")(
        images, torch.full((len(images),), EPS, dtype=torch.float64), inside.expand_as(images)
    )
    assert not bool(ball.contains(theirs).all())
    threat = ThreatModel("linf", EPS, mask=inside)
    ours = APGD(steps=10)(classifier, images, columns.clamp(max=2), threat)
    assert bool(ball.contains(ours.candidates).all())
    assert bool(((ours.candidates == images) | (inside > 0)).all())


def test_torchattacks_and_its_autoattack(attacked):
    torchattacks = peer("torchattacks")
    classifier, images, columns = attacked
    outputs = classifier(images).shape[1]
    holds(
        classifier,
        images,
        torchattacks.PGD(classifier, eps=EPS, alpha=0.02, steps=10)(images, columns),
        columns,
    )
    holds(
        classifier,
        images,
        torchattacks.APGD(classifier, eps=EPS, steps=5)(images, columns),
        columns,
    )
    if outputs > 3:  # its targeted parts need four columns
        found = torchattacks.AutoAttack(classifier, eps=EPS, n_classes=outputs)(
            images[:6], columns[:6]
        )
        holds(classifier, images[:6], found, columns[:6])
        no_weaker_than(classifier, images[:6], found)
