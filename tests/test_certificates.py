"""Certificates: statuses, rules of rejection, radii, and agreement with attacks."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from demur import Classifier, DemurError, ThreatModel, data
from demur.attacks import APGD, PGD, Square
from demur.bounds.curved import Rectifier
from demur.certificates import (
    METHODS,
    Status,
    UnsoundBoundError,
    certified_radius,
    certify,
)
from demur.defenses import (
    CertifiedConsistency,
    ConfidenceThreshold,
    DeepNeuralRejection,
    EitherRejects,
    GaussianBlur,
    MedianBlur,
    NeuralRejection,
)
from demur.goals import AnyError, Evade, ForceReject, Target
from demur.networks import AdaptedNetwork, certified_cnn
from demur.networks.certified import certified_weights
from demur.training import certified_fit

SIZE = 8
COUNT = 60


@pytest.fixture(scope="module")
def material():
    """Digits of 8 x 8 pixels, and a network that is trained for certificates in seconds."""

    def small(split):
        found = data.load("digits", split)
        pixels = nn.functional.avg_pool2d(found.to_float()[..., 2:26, 2:26], 3)
        return pixels, found.labels

    images, labels = small("train")
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )
    options = {"eps": 0.06, "epochs": 12, "batch_size": 64, "ramp": 5, "learning_rate": 5e-3}
    certified_fit(network, images, labels, **options)
    test = small("test")
    return network, (images, labels), (test[0][:COUNT], test[1][:COUNT])


def rejecting(network, seed=0):
    """A learned reject column: the network with one more output, which is a mean of others."""
    wide = nn.Sequential(*network)
    last = nn.Linear(32, 11)
    with torch.no_grad():
        last.weight.copy_(torch.cat([network[-1].weight, network[-1].weight.mean(0)[None]]))
        last.bias.copy_(torch.cat([network[-1].bias, network[-1].bias.mean()[None] + 4]))
    wide[-1] = last
    return Classifier(wide, 10, rejects=True).eval()


def classifiers(network, train):
    machines = {"C": 10.0, "gamma": 0.05, "scores": "decision", "threshold": 0.0}
    some = (train[0][:500], train[1][:500])
    return {
        "plain": Classifier(network, 10),
        "column": rejecting(network),
        "moved": _moved(rejecting(network)),
        "max-prob": ConfidenceThreshold(network, 10, threshold=0.9),
        "margin": ConfidenceThreshold(network, 10, score="margin", threshold=2.0),
        "energy": ConfidenceThreshold(network, 10, score="energy", threshold=3.0),
        "consistency": CertifiedConsistency(network, 10, 0.03),
        "pgd": CertifiedConsistency(network, 10, 0.03, "pgd"),
        "crown check": CertifiedConsistency(network, 10, 0.03, "crown-ibp"),
        "machines": NeuralRejection(network, 10, "6", **machines).fit(*some),
        "deep": DeepNeuralRejection(
            network, 10, ["3", "6"], C=10.0, gamma=0.05, combiner_gamma=1.0, threshold=0.6
        ).fit(*some),
        "either": EitherRejects(rejecting(network), CertifiedConsistency(network, 10, 0.03)),
        "gaussian": GaussianBlur(ConfidenceThreshold(network, 10, threshold=0.9), 10, 0.4),
        "median": MedianBlur(network, 10, 3),
        "adapted": Classifier(AdaptedNetwork(network, (0.0,), (1.0,), reject_column=None), 10),
        "turned": Classifier(
            AdaptedNetwork(rejecting(network).module, (0.1,), (0.9,), reject_column=3), 10
        ),
    }


def _moved(classifier):
    classifier.set_threshold(-1.5)
    return classifier


@pytest.fixture(scope="module")
def made(material):
    network, train, _ = material
    return classifiers(network, train)


KINDS = ["plain", "column", "moved", "max-prob", "margin", "energy", "consistency", "pgd"]
KINDS += ["crown check", "machines", "deep", "either", "gaussian", "median", "adapted", "turned"]
GOALS = {"evade": Evade(), "any": AnyError(), "reject": ForceReject(), "target": Target(3)}
ATTACKS = (PGD(steps=15), APGD(steps=15), Square(n_queries=150))
FEW_PROVEN = {"machines", "deep", "median", "gaussian", "turned"}
QUICK = {"plain", "column", "max-prob", "consistency", "machines", "adapted", "turned"}


def marked(kinds, quick):
    return [kind if kind in quick else pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


def attacked(classifier, images, labels, threat, result=None):
    """Certify against all attacks: a contradiction raises."""
    statuses = []
    for attack in ATTACKS:
        result = attack(classifier, images, labels, threat)
        statuses.append(certify(classifier, images, labels, threat, ("ibp", "crown-ibp"), result))
    return statuses


@pytest.mark.parametrize("eps", [0.02, 0.06])
@pytest.mark.parametrize("kind", marked(KINDS, QUICK))
def test_no_image_is_certified_and_broken(kind, eps, made, material):
    """R13: three attacks, one of them without gradients, on every rule of rejection."""
    _, _, (images, labels) = material
    found = attacked(made[kind], images[:32], labels[:32], ThreatModel("linf", eps))
    assert all(one.unsupported is None for one in found), found[0].unsupported
    if eps == 0.02 and kind not in FEW_PROVEN:
        assert int((found[0].status == Status.CERTIFIED).sum()) > 16
    for one in found:
        bounds = one.bounds()
        assert bounds.low <= bounds.proven <= bounds.not_broken <= bounds.high


@pytest.mark.parametrize("goal", ["any", "reject", "target"])
@pytest.mark.parametrize(
    "kind",
    marked(["plain", "column", "margin", "energy", "max-prob", "consistency"], {"plain", "column"}),
)
def test_other_goals_are_excluded_too(kind, goal, made, material):
    if kind == "plain" and goal == "reject":
        pytest.skip("it never rejects")
    _, _, (images, labels) = material
    keep = labels != 3
    images, labels = images[keep][:30], labels[keep][:30]
    threat = ThreatModel("linf", 0.015, goal=GOALS[goal])
    found = attacked(made[kind], images, labels, threat)
    assert int((found[0].status == Status.CERTIFIED).sum()) > 5
    if goal != "target":
        wide = attacked(made[kind], images, labels, replace(threat, eps=0.1))
        assert int((wide[0].status == Status.BROKEN).sum()) > 0


def test_l2_certificates_agree_with_attacks(made, material):
    _, _, (images, labels) = material
    for kind in ("plain", "consistency", "margin"):
        threat = ThreatModel("l2", 0.2)
        result = APGD(steps=20)(made[kind], images, labels, threat)
        found = certify(made[kind], images, labels, threat, ("ibp", "crown-ibp"), result)
        assert int((found.status == Status.CERTIFIED).sum()) > 10


def test_a_certificate_of_consistency_is_the_networks_at_the_smaller_radius(made, material):
    """The lemma: r + delta."""
    network, _, (images, labels) = material
    plain = Classifier(network, 10)
    for eps, delta in ((0.05, 0.03), (0.06, 0.06), (0.02, 0.04)):
        consistent = CertifiedConsistency(network, 10, delta)
        found = certify(consistent, images, labels, ThreatModel("linf", eps), "ibp")
        inner = certify(plain, images, labels, ThreatModel("linf", max(0.0, eps - delta)), "ibp")
        right = inner.status == Status.CERTIFIED
        assert torch.equal(found.status == Status.CERTIFIED, right)
        whole = ThreatModel("linf", eps, goal=AnyError())
        kept = certify(consistent, images, labels, whole, "ibp").status == Status.CERTIFIED
        wide = certify(plain, images, labels, ThreatModel("linf", eps + delta), "ibp")
        assert bool((kept <= (wide.status == Status.CERTIFIED)).all()) and int(kept.sum()) > 3
    unproven = CertifiedConsistency(network, 10, 0.05, "pgd")
    nothing = certify(unproven, images, labels, ThreatModel("linf", 0.06), "ibp")
    plain_at = certify(plain, images, labels, ThreatModel("linf", 0.06), "ibp")
    assert torch.equal(
        nothing.status == Status.CERTIFIED, plain_at.status == Status.CERTIFIED
    )  # an attack as a check adds no proof


def test_a_rejection_adds_to_the_proofs(made, material):
    _, _, (images, labels) = material
    threat = ThreatModel("linf", 0.06)
    counts = {
        kind: int((certify(made[kind], images, labels, threat, "ibp").status == 0).sum())
        for kind in ("plain", "column", "max-prob", "consistency")
    }
    assert min(counts["max-prob"], counts["consistency"], counts["column"]) > counts["plain"]


def test_the_margins_of_the_methods_are_those_of_the_best(made, material):
    _, _, (images, labels) = material
    threat = ThreatModel("linf", 0.08)
    one = certify(made["plain"], images, labels, threat, "ibp")
    best = certify(made["plain"], images, labels, threat)
    assert bool((best.margin >= one.margin).all())
    assert int((best.status == 0).sum()) >= int((one.status == 0).sum())
    proven = best.status == Status.CERTIFIED
    assert all(bool(name) == bool(flag) for name, flag in zip(best.by, proven, strict=True))
    assert set(best.by) - {""} <= set(METHODS)
    assert torch.equal(best.probability, proven.double())
    assert repr(best).startswith(f"Certificate({int(proven.sum())} certified")


def test_wrong_and_accepted_clean_images_are_broken_and_rejected_ones_are_not(material):
    network, _, (images, labels) = material
    plain = Classifier(network, 10)
    wrong = (labels + 1) % 10
    assert set(certify(plain, images, wrong, "linf:0.0", "ibp").status.tolist()) <= {1, 2}
    reject_all = ConfidenceThreshold(network, 10, score="margin", threshold=1e6)
    found = certify(reject_all, images, wrong, "linf:1", "ibp")
    assert found.status.tolist() == [0] * len(images)  # everything is rejected, everywhere


def test_an_unsound_bound_is_an_error_in_us(made, material, monkeypatch):
    """Negative control: rectifiers that forget the upper bound."""
    _, _, (images, labels) = material
    original = Rectifier.interval

    def wrong(self, tensors, given):
        low, high = original(self, tensors, given)
        return type(given[0])((low + high) / 2, (low + high) / 2)

    threat = ThreatModel("linf", 0.1)
    result = APGD(steps=20)(made["plain"], images, labels, threat)
    monkeypatch.setattr(Rectifier, "interval", wrong)
    with pytest.raises(UnsoundBoundError, match="is broken, and ibp proves it"):
        certify(made["plain"], images, labels, threat, "ibp", result)


def test_a_result_of_a_larger_threat_breaks_nothing(made, material):
    _, _, (images, labels) = material
    result = PGD(steps=10)(made["plain"], images, labels, ThreatModel("linf", 0.3))
    assert int(result.success.sum()) > 30
    found = certify(made["plain"], images, labels, "linf:0.01", "ibp", result)
    clean = certify(made["plain"], images, labels, "linf:0.01", "ibp")
    assert torch.equal(found.status, clean.status)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_radii_are_proven_and_end_where_proofs_end(norm, made, material):
    _, _, (images, labels) = material
    few = (images[:12], labels[:12])
    for kind in ("plain", "consistency"):
        radius = certified_radius(made[kind], *few, norm, methods="ibp")
        assert float(radius.max()) > 0.03
        found = certify(made[kind], *few, ThreatModel(norm, radius), "ibp")
        assert bool(((found.status == 0) == (radius > 0)).all())
        largest = 1.0 if norm == "linf" else 64**0.5
        above = ThreatModel(norm, (radius + 2 * 64**0.5 / 2**12).clamp(max=largest))
        assert not bool((certify(made[kind], *few, above, "ibp").status == 0)[radius > 0].any())


def test_a_mask_shrinks_the_box_and_the_radius_grows(made, material):
    _, _, (images, labels) = material
    mask = torch.zeros(1, 1, SIZE, SIZE)
    mask[..., :3, :] = 1
    few = (images[:12], labels[:12])
    whole = certified_radius(made["plain"], *few, methods="ibp")
    part = certified_radius(made["plain"], *few, methods="ibp", mask=mask)
    assert bool((part >= whole).all()) and float((part - whole).mean()) > 0.01
    threat = ThreatModel("linf", 0.15, mask=mask)
    result = APGD(steps=20)(made["consistency"], images, labels, threat)
    found = certify(made["consistency"], images, labels, threat, ("ibp", "crown-ibp"), result)
    assert int((found.status == 0).sum()) > int(
        (certify(made["consistency"], images, labels, "linf:0.15", ("ibp",)).status == 0).sum()
    )


def test_each_image_has_its_own_eps(made, material):
    _, _, (images, labels) = material
    eps = torch.linspace(0, 0.1, COUNT)
    together = certify(made["plain"], images, labels, ThreatModel("linf", eps), "ibp")
    alone = certify(
        made["plain"], images[7:8], labels[7:8], ThreatModel("linf", float(eps[7])), "ibp"
    )
    assert math.isclose(float(together.margin[7]), float(alone.margin[0]), rel_tol=1e-9) or (
        together.status[7] == alone.status[0] == Status.BROKEN
    )


def test_layers_without_bounds_are_named(material):
    _, _, (images, labels) = material
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 10)).eval()
    found = certify(Classifier(network, 10), images, labels, "linf:0.1")
    assert found.unsupported == "module.2: the operation gelu"
    assert Status.CERTIFIED not in found.status.tolist() and found.by == ("",) * COUNT
    with pytest.raises(DemurError, match=r"module\.2: the operation gelu has no bounds"):
        certified_radius(Classifier(network, 10), images, labels)
    noisy = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    noisy.register_forward_hook(lambda module, given, output: output + torch.rand(1, 10))
    found = certify(Classifier(noisy, 10), images, labels, "linf:0.0")
    assert found.unsupported == "the model itself: a random draw at prediction"
    inner = GaussianBlur(CertifiedConsistency(certified_cnn(10, size=8), 10, 0.1), 10, 0.4)
    fine = certify(inner, images[:2], labels[:2], "linf:0.1", "ibp")
    assert fine.unsupported is None  # its balls are not balls of images: no radius is added


def test_requests_that_do_not_fit_are_refused(made, material):
    _, _, (images, labels) = material
    plain = made["plain"]
    for threat, methods, said in (
        ("linf", METHODS, "needs an eps"),
        ("l1:1", METHODS, "linf and l2, not l1"),
        ("linf:0.1", (), "at least one method"),
        ("linf:0.1", "crwn", "Did you mean 'crown'"),
        (ThreatModel("linf", torch.ones(3)), METHODS, "3 numbers for 60 images"),
        (ThreatModel("linf", 0.1, goal=ForceReject()), METHODS, "reject"),
    ):
        with pytest.raises(DemurError, match=said):
            certify(plain, images, labels, threat, methods)
    result = PGD(steps=1)(plain, images[:3], labels[:3], ThreatModel("linf", 0.1))
    with pytest.raises(DemurError, match="the result is of images"):
        certify(plain, images, labels, "linf:0.1", result=result)


def test_initial_weights_keep_the_width_of_intervals():
    network = certified_cnn(10).eval()
    stds = [
        float(one.weight.std() * one.weight[0].numel())
        for one in network
        if isinstance(one, nn.Conv2d | nn.Linear)
    ]
    assert all(abs(one - math.sqrt(2 * math.pi)) < 0.3 for one in stds[1:-1])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layer = nn.Linear(4, 4)
        certified_weights(layer)
    assert layer.bias.tolist() == [0.0] * 4
