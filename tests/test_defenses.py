"""What all defences have in common, the background class, and the combination of two."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from demur import REJECT, Classifier, DemurError, Outcome, black_box, data, outcomes
from demur.attacks import PGD, ForceReject
from demur.defenses import (
    AdversarialTraining,
    BackgroundClass,
    DeepNeuralRejection,
    Defense,
    EitherRejects,
    GaussianBlur,
    LocalizedAdversarialTraining,
    MedianBlur,
    NeuralRejection,
)
from demur.threat import ThreatModel
from models import convolutional, images_of, linear


def bare(outputs=3):
    return convolutional(3, outputs).module


def unfitted(name):
    attack = PGD(steps=1)
    makers = {
        "BackgroundClass": lambda: BackgroundClass(bare(4), 3),
        "AdversarialTraining": lambda: AdversarialTraining(bare(), 3, attack, "linf:0.1"),
        "LocalizedAdversarialTraining": lambda: LocalizedAdversarialTraining(
            bare(), 3, attack, "linf:0.1", mask=torch.ones(8, 8)
        ),
        "NeuralRejection": lambda: NeuralRejection(bare(), 3, "4"),
        "DeepNeuralRejection": lambda: DeepNeuralRejection(bare(), 3, ["2", "4"]),
    }
    return makers[name]()


LEARNING = [
    "BackgroundClass",
    "AdversarialTraining",
    "LocalizedAdversarialTraining",
    "NeuralRejection",
    "DeepNeuralRejection",
]


def test_all_defences_are_known_by_name():
    others = {"GaussianBlur", "MedianBlur", "EitherRejects", "ConfidenceThreshold"}
    others |= {"CertifiedConsistency"}
    assert set(Defense.kinds) == {*LEARNING, *others}


@pytest.mark.parametrize("name", LEARNING)
def test_an_unfitted_defence_cannot_be_used_in_any_way(name, tmp_path):
    defense = unfitted(name)
    images = images_of(2)
    labels = torch.tensor([0, 1])
    for use in (
        lambda: defense(images),
        lambda: defense.scores(images),
        lambda: defense.predict(images),
        lambda: defense.predict_proba(images),
        lambda: outcomes(defense, images, labels),
        lambda: PGD(steps=2)(defense, images, labels, "linf:0.1"),
        lambda: defense.save(tmp_path / "bundle"),
    ):
        with pytest.raises(DemurError, match=f"{name} is not fitted: call fit"):
            use()
    assert not defense.fitted_ and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", LEARNING[:3])
def test_a_trained_network_is_announced_by_prefit(name):
    with pytest.raises(DemurError, match="prefit=True if the network is trained already"):
        unfitted(name).predict(images_of(1))
    module = bare(4)
    ready = {
        "BackgroundClass": lambda: BackgroundClass(module, 3, prefit=True),
        "AdversarialTraining": lambda: AdversarialTraining(
            module, 3, PGD(), "linf:0.1", prefit=True
        ),
        "LocalizedAdversarialTraining": lambda: LocalizedAdversarialTraining(
            module, 3, PGD(), "linf:0.1", mask=torch.ones(8, 8), prefit=True
        ),
    }[name]()
    expected = Classifier(module, 3).scores(images_of(3))
    assert torch.equal(ready.scores(images_of(3)), expected)
    assert ready.network is module


def test_loading_a_state_does_not_count_as_fitting():
    defense = unfitted("BackgroundClass")
    defense.load_state_dict(defense.state_dict())
    assert not defense.fitted_


@pytest.mark.parametrize("name", LEARNING)
def test_a_fit_that_fails_leaves_it_unfitted(name):
    defense = unfitted(name)
    background = (images_of(2),) if name == "BackgroundClass" else ()
    with pytest.raises(DemurError):
        defense.fit(images_of(4), torch.tensor([0, 1, 2, 3]), *background)
    assert not defense.fitted_
    with pytest.raises(DemurError, match="not fitted"):
        defense.predict(images_of(1))


def test_filters_can_be_used_without_fitting():
    module = bare()
    for defense in (GaussianBlur(module, 3, 1.0), MedianBlur(module, 3, 3)):
        images = images_of(3)
        filtered = Classifier(module, 3).scores(defense.filter(images).clamp(0, 1))
        torch.testing.assert_close(defense.scores(images), filtered)
        assert defense.network is module and defense.threshold is None


def test_a_background_class_learns_to_reject_other_images():
    train, test = data.load("digits", "train"), data.load("digits", "test")
    digits, others = train.select_classes(range(8)), train.select_classes([8, 9])
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 9))
    defense = BackgroundClass(network, 8)
    defense.fit(digits.images, digits.labels, others.images, epochs=10, batch_size=32)
    assert defense.fitted_ and defense.rejects and defense.threshold == 0.0
    assert len(defense.history_) == 10
    known = test.select_classes(range(8))
    found = outcomes(defense, known.to_float(), known.labels)
    assert float((found == Outcome.CORRECT).double().mean()) > 0.85
    rejected = defense.predict(test.select_classes([8, 9]).to_float()) == REJECT
    assert float(rejected.double().mean()) > 0.6
    defense.set_threshold(1e6)
    assert bool((defense.predict(known.to_float()) == REJECT).all())


@pytest.mark.parametrize(
    ("outputs", "labels", "background", "said"),
    [
        (3, [0, 1], images_of(2), r"rejects=True needs \(1, 4\)"),
        (4, [0, 3], images_of(2), r"labels must lie in 0\.\.2"),
        (4, [0, 1], images_of(2, size=9), "same shape"),
        (4, [0, 1], images_of(2).double(), "same shape and dtype"),
        (4, [0, 1], images_of(2)[:0], "at least one background image"),
    ],
)
def test_a_background_class_says_what_does_not_fit(outputs, labels, background, said):
    with pytest.raises(DemurError, match=said):
        BackgroundClass(bare(outputs), 3).fit(
            images_of(2), torch.tensor(labels), background, epochs=1
        )


# EitherRejects


@given(st.integers(0, 99))
def test_either_rejects_where_one_of_them_does_and_answers_as_the_first(seed):
    first, second = linear(4, 64, 3, seed), linear(4, 64, 3, seed + 1)
    both = EitherRejects(first, second)
    images = images_of(40, seed=seed)
    one, other, found = first.predict(images), second.predict(images), both.predict(images)
    rejected = (one == REJECT) | (other == REJECT)
    assert torch.equal(found == REJECT, rejected)
    assert torch.equal(found[~rejected], one[~rejected])
    assert torch.equal(both.scores(images)[:, :3], first.scores(images)[:, :3])
    assert torch.equal(both.predict_proba(images), first.predict_proba(images))


def fixed(scores):
    return black_box(lambda images: scores.numpy(), scores.shape[1] - 1)


def test_a_large_score_swallows_no_small_reject_margin():
    """R23: 20 + 5e-7 is 20 in float32."""
    first = fixed(torch.tensor([[20.0, 0.0, 1.0]]))
    second = fixed(torch.tensor([[0.5, 0.1, 0.5000005]]))
    both = EitherRejects(first, second)
    assert both.predict(images_of(1)).tolist() == [REJECT]
    assert both.scores(images_of(1))[:, :2].tolist() == [[20.0, 0.0]]


@given(st.integers(0, 999), st.integers(-20, 20), st.integers(-20, 20))
def test_either_rejects_at_every_scale_of_the_scores(seed, one_power, other_power):
    """R23: near ties too."""
    generator = torch.Generator().manual_seed(seed)
    powers = (10.0**one_power, 10.0**other_power)
    one, other = (power * torch.randint(-9, 9, (50, 4), generator=generator) for power in powers)
    other = torch.nextafter(other, torch.randn(50, 4, generator=generator).sign() * torch.inf)
    first, second = fixed(one), fixed(other)
    images = images_of(50)
    rejected = (first.predict(images) == REJECT) | (second.predict(images) == REJECT)
    found = EitherRejects(first, second).predict(images)
    assert torch.equal(found == REJECT, rejected)
    assert torch.equal(found[~rejected], first.predict(images)[~rejected])


def test_a_rejection_that_was_swallowed_has_the_gradient_of_the_margin():
    def scores(slope, rows):
        class Rows(nn.Module):
            def forward(self, images):
                change = images.flatten(1).sum(1, keepdim=True)
                return torch.tensor(rows) + (change - change.detach()) * torch.tensor(slope)

        return Classifier(Rows(), 2)

    first = scores([1.0, 2.0, 3.0], [20.0, 0.0, 1.0])
    for rows in ([0.5, 0.1, 0.5000005], [0.5, 0.1, 9.0]):
        images = images_of(2).requires_grad_()
        both = EitherRejects(first, scores([5.0, 7.0, 11.0], rows))
        (gradient,) = torch.autograd.grad(both(images)[:, 2].sum(), images)
        assert torch.equal(gradient, torch.full_like(gradient, 1 + 11 - 5))


def test_its_reject_margin_is_the_smaller_of_the_two():
    first, second = linear(4, 64, 3, 0), linear(4, 64, 3, 1)
    both = EitherRejects(first, second)
    images = images_of(40)

    def margin(classifier):
        scores = classifier.scores(images)
        return scores[:, :3].amax(1) - scores[:, 3]

    torch.testing.assert_close(margin(both), torch.minimum(margin(first), margin(second)))
    both.set_threshold(2.0)
    torch.testing.assert_close(
        margin(both), torch.minimum(margin(first), margin(second)) - 2, atol=1e-5, rtol=1e-5
    )


def test_attacks_see_both_classifiers():
    first, second = linear(4, 64, 3, 0), linear(4, 64, 3, 1)
    both = EitherRejects(first, second)
    images = (0.25 + 0.5 * images_of(20)).requires_grad_()
    both(images)[:, 3].sum().backward()
    assert bool((images.grad != 0).flatten(1).any(1).all())
    clean = images.detach()
    accepted = both.predict(clean)
    clean = clean[accepted != REJECT]
    labels = accepted[accepted != REJECT]
    for threat in (ThreatModel("linf", 0.2), ThreatModel("linf", 0.2, goal=ForceReject())):
        found = PGD(steps=10)(both, clean, labels, threat)
        assert bool(found.success.any())
        given = both.predict(found.images[found.success])
        rejected = given == REJECT
        assert bool(rejected.all() if threat.goal == ForceReject() else (~rejected).all())


def test_either_rejects_refuses_what_cannot_be_combined():
    rejecting, plain = linear(4, 64, 3), linear(3, 64, 3)
    with pytest.raises(DemurError, match="reject column"):
        EitherRejects(rejecting, plain).predict(images_of(1))
    plain.predict(images_of(1))
    with pytest.raises(DemurError, match="never rejects"):
        EitherRejects(rejecting, plain)
    with pytest.raises(DemurError, match="of 3 and 2"):
        EitherRejects(rejecting, linear(3, 64, 2))
    with pytest.raises(DemurError, match="Wrap it"):
        EitherRejects(rejecting, rejecting.module)
    with pytest.raises(DemurError, match="learns nothing"):
        EitherRejects(rejecting, rejecting).fit(images_of(1), torch.tensor([0]))
    with pytest.raises(DemurError, match="BackgroundClass is not fitted"):
        EitherRejects(rejecting, unfitted("BackgroundClass")).predict(images_of(1))


def test_a_combined_rejection_does_not_depend_on_the_sign_of_the_scores():
    """R23: the same decisions where all scores of both classifiers are negative."""
    first, second = linear(4, 64, 3, 0), linear(4, 64, 3, 1)
    images = images_of(200)
    decided = []
    for constant in (0.0, 100.0, -100.0):
        for classifier in (first, second):
            with torch.no_grad():
                classifier.module.bias.fill_(constant)
        decided.append(EitherRejects(first, second).predict(images))
    assert torch.equal(decided[0], decided[1])
    assert torch.equal(decided[0], decided[2])
