"""The handshake before an audit: each mistake that users make is one line with its remedy, and
honest models pass. R3, R6, R16.
"""

import copy
import math
from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from demur import Classifier, DemurError, black_box, data
from demur.attacks import PGD
from demur.classifier import Preprocess
from demur.defenses import ConfidenceThreshold, MedianBlur
from demur.evaluation.handshake import (
    HandshakeError,
    Line,
    handshake,
    running,
    suspicious_operations,
)
from demur.evaluation.handshake.accuracy import expected_accuracy, is_low
from demur.evaluation.handshake.errors import is_out_of_memory
from demur.evaluation.handshake.labels import permuted_classes, shifted_labels
from demur.evaluation.handshake.logarithms import are_probabilities, with_logarithms
from demur.evaluation.handshake.normalisation import better_normalisation
from demur.loading import wrap
from demur.training import fit
from models import convolutional, images_of


def network_of(*layers, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(*[layer() if isinstance(layer, type) else layer for layer in layers])


@pytest.fixture(scope="module")
def digits():
    """A network for digits, and 200 test images."""
    train, test = data.load("digits", "train"), data.load("digits", "test")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.AvgPool2d(2), nn.Flatten(), nn.Linear(196, 64), nn.ReLU(), nn.Linear(64, 10)
    network = nn.Sequential(*layers)
    fit(network, train.images, train.labels, epochs=15, batch_size=32)
    return network.eval(), test.to_float()[:200], test.labels[:200]


class Through(nn.Module):
    """A network, with a change of what goes in or comes out."""

    def __init__(self, network, before=lambda images: images, after=lambda scores: scores):
        super().__init__()
        self.network = network
        self.before = before
        self.after = after

    def forward(self, images):
        return self.after(self.network(self.before(images)))


def classifier(module, num_classes=10, **about):
    made = Classifier(module, num_classes)
    for name, value in about.items():
        setattr(made, name, value)
    return made


def refused(said, *arguments, **options):
    """The one line of a handshake that fails."""
    with pytest.raises(DemurError, match=said) as caught:
        handshake(*arguments, **options)
    text = str(caught.value)
    assert "\n" not in text and text.isprintable() and len(text) < 600
    assert text.endswith(".") and "Traceback" not in text
    if isinstance(caught.value, HandshakeError):
        assert caught.value.lines[-1].state == "failed" and caught.value.lines[-1].text == text
        assert all(line.state != "failed" for line in caught.value.lines[:-1])
    return caught.value


def noted(found):
    return {line.name: line.text for line in found.lines if line.state == "note"}


# What passes


def test_a_good_model_has_no_note_and_figures_that_can_be_used(digits):
    network, images, labels = digits
    made = classifier(network)
    found = handshake(made, images, labels)
    assert noted(found) == {}
    assert found.classifier is made and not found.randomised and found.suspicious == ()
    correct = (network(images).argmax(1) == labels).float().mean()
    assert found.accuracy == pytest.approx(float(correct)) and found.accuracy > 0.85
    assert found.batch_size == 128
    assert found.images_per_second > 0 and found.gradients_per_second > 0
    names = [line.name for line in found.lines]
    assert names[:4] == ["pixels", "labels", "evaluation mode", "device"]
    assert {"clean accuracy", "gradients", "throughput", "operations"} <= set(names)
    assert all(asdict(line).keys() == {"name", "state", "text"} for line in found.lines)


def test_nothing_of_the_caller_is_changed(digits):
    """Weights, modes, gradients of parameters, random state, images and labels."""
    _, images, labels = digits
    made = convolutional(10, size=28)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    modes = [part.training for part in made.modules()]
    state = torch.get_rng_state()
    given, numbers = images.clone(), labels.clone()
    handshake(made, images, labels)
    assert [part.training for part in made.modules()] == modes and modes[0]
    assert all(torch.equal(before[name], value) for name, value in made.state_dict().items())
    assert all(one.requires_grad and one.grad is None for one in made.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(images, given) and torch.equal(labels, numbers)


def test_a_rejecting_model_is_counted_by_its_three_outcomes(digits):
    network, images, labels = digits
    defense = ConfidenceThreshold(network, 10, threshold=0.9)
    found = handshake(defense, images, labels)
    predicted = defense.predict(images)
    assert found.accuracy == pytest.approx(float((predicted == labels).float().mean()))
    assert "rejected" in next(line.text for line in found.lines if line.name == "clean accuracy")
    everything = ConfidenceThreshold(network, 10, score="margin", threshold=1e6)
    found = handshake(everything, images, labels)
    assert found.accuracy == 0 and "every image is rejected" in noted(found)["clean accuracy"]


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_an_untrained_model_is_honest(classes):
    """Low accuracy is a note: the model is not refused for it."""
    network = network_of(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, classes)).eval()
    labels = torch.randint(classes, (200,), generator=torch.Generator().manual_seed(1))
    found = handshake(classifier(network, classes), images_of(200), labels)
    assert "guessing reaches" in noted(found)["clean accuracy"]


def test_a_black_box_is_audited_by_scores_only():
    box = black_box(lambda images: images.reshape(len(images), -1)[:, :4], 4)
    images = images_of(40, size=2)
    found = handshake(box, images, images.flatten(1).argmax(1))
    assert found.gradients_per_second == 0 and found.accuracy == 1
    assert "scores only" in noted(found)["gradients"]


# Pixels


def test_normalised_images_and_bytes_are_told_apart(digits):
    network, images, labels = digits
    made = classifier(network)
    normalised = (images - 0.1307) / 0.3081
    refused(r"the images are normalised; demur wants .*\(--mean --std", made, normalised, labels)
    refused("divide them by 255", made, images * 255, labels)
    refused("divided by 255 twice", made, images / 255, labels)
    spoiled = images.clone()
    spoiled[3] = math.nan
    refused("NaN or infinite pixels", made, spoiled, labels)
    refused("float tensor", made, (images * 255).to(torch.uint8), labels)
    refused(r"shape \(n, C, H, W\)", made, images.flatten(1), labels)


# Labels


def test_labels_that_do_not_fit_are_named(digits):
    network, images, labels = digits
    made = classifier(network)
    refused("labels run from 1 to 10.*shifted by one", made, images, labels + 1)
    refused("reach from 0 to 90.*--label-map", made, images, labels * 10)
    refused("reach from -1 to 8", made, images, labels - 1)
    refused("integer tensor", made, images, labels.float())
    refused("200 images and labels of shape", made, images, labels[:5])
    refused("12 classes, and the model 10", made, images, labels, class_names=["x"] * 12)


def test_labels_that_are_shifted_within_the_range_are_found_by_the_accuracy(digits):
    """Classes 0 to 8 as 1 to 9, and 1 to 9 as 0 to 8."""
    network, images, labels = digits
    made = classifier(network)
    for shift, left_out in ((1, 9), (-1, 0)):
        kept = labels != left_out
        said = refused("shifted by one", made, images[kept], labels[kept] + shift)
        assert f"{1 if shift == 1 else 0} is {0 if shift == 1 else 1}" in str(said)
        assert "--label-map" in str(said)


def test_another_class_order_is_named_with_its_first_pairs(digits):
    network, images, labels = digits
    order = torch.tensor([3, 4, 5, 6, 7, 8, 9, 0, 1, 2])
    names = [f"digit {number}" for number in range(10)]
    said = str(
        refused(
            "class order differs", classifier(network), images, order[labels], class_names=names
        )
    )
    assert said.count(" is ") >= 4 and "and 7 more" in said and "--label-map" in said
    assert "3 ('digit 3') is 0 ('digit 0')" in said
    swapped = Through(network, after=lambda scores: scores[:, [1, 0]])
    two = labels < 2
    refused("class order differs", classifier(swapped, 2), images[two], labels[two])


def test_names_in_another_order_are_found_without_a_forward_pass(digits):
    network, images, labels = digits
    names = tuple(f"n{number}" for number in range(10))
    made = classifier(network, class_names=names)
    other = (names[1], names[0], *names[2:])
    refused(r"class order differs .*0 \('n1'\) is 1", made, images, labels, class_names=other)
    assert handshake(made, images, labels, class_names=names).accuracy > 0.85
    bad = ("\x1b[31mred\n" * 50, names[0], *names[2:])
    made.class_names = (names[0], bad[0], *names[2:])
    refused("class order", made, images, labels, class_names=bad)


def constant(count, value):
    return torch.full((count,), value)


def random_labels(count, classes, seed):
    return torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed))


@given(st.sampled_from([2, 3, 10, 100, 1000]), st.integers(0, 9999), st.integers(20, 256))
def test_honest_answers_are_never_called_permuted_or_shifted(classes, seed, count):
    """Random answers; the same answer always; a good model; unequal classes; a few classes."""
    labels = random_labels(count, classes, seed)
    unequal = (random_labels(count, 10, seed + 1) == 0).long()
    good = torch.where(random_labels(count, 5, seed + 3) > 0, labels, classes - 1 - labels)
    cases = [
        (random_labels(count, classes, seed + 2), labels),
        (constant(count, classes - 1), labels),
        (constant(count, 1), unequal),
        (constant(count, 0), 1 - unequal),
        (good, labels),
        (labels, labels),
        (labels.clamp(max=1), labels),
    ]
    for answers, given_labels in cases:
        assert shifted_labels(answers, given_labels, classes) is None
        assert permuted_classes(answers, given_labels, classes) is None


@given(
    st.sampled_from([2, 3, 10, 100]),
    st.integers(0, 9999),
    st.floats(0.8, 1.0),
    st.integers(60, 256),
)
def test_permuted_answers_are_found_where_there_is_evidence(classes, seed, accuracy, count):
    generator = torch.Generator().manual_seed(seed)
    labels = random_labels(count, classes, seed)
    order = (torch.arange(classes) + 1) % classes
    right = torch.rand(count, generator=generator) < accuracy
    answers = torch.where(right, order[labels], random_labels(count, classes, seed + 1))
    found = permuted_classes(answers, labels, classes)
    enough = count >= 20 * min(classes, 10) and classes <= 10
    if enough or found is not None:
        assert found is not None and found.after > found.before
        assert all(other == (one + 1) % classes for one, other in found.pairs[:3])


def test_one_image_of_each_class_is_no_evidence_for_another_order():
    labels = torch.arange(200) * 5
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    assert permuted_classes(order[labels], labels, 1000) is None


def test_an_expected_accuracy_is_compared_and_settles_doubts(digits):
    network, images, labels = digits
    made = classifier(network)
    assert handshake(made, images, labels, expect_accuracy="0.9+-0.1").accuracy > 0.8
    refused(
        r"clean accuracy is .* expected was 0.5\+-0.02",
        made,
        images,
        labels,
        expect_accuracy="0.5+-0.02",
    )
    kept = labels != 9
    shifted = images[kept], labels[kept] + 1
    refused("expected was.*shifted by one", made, *shifted, expect_accuracy="0.9+-0.05")
    found = handshake(made, *shifted, expect_accuracy="0.05 ± 0.05")
    assert "shifted by one" in noted(found)["clean accuracy"]
    for text in ("76", "0.76", "0.76+-2", "76%+-2%", "", "0.7.6+-0.1", "x" * 500):
        refused("0.76", made, images, labels, expect_accuracy=text)
    assert expected_accuracy("0.76+-0.02") == expected_accuracy(" 0.76 +/- 0.02 ") == (0.76, 0.02)


def test_low_is_below_twice_chance_or_nearer_to_chance_than_to_one():
    assert is_low(19, 100, 10) and not is_low(21, 100, 10)
    assert is_low(74, 100, 2) and not is_low(76, 100, 2)
    assert is_low(1, 200, 1000) and not is_low(2, 200, 1000)  # one may be luck
    assert not is_low(1, 1, 1000) and is_low(0, 1, 1000)


# Normalisation


class Nearest(nn.Module):
    """The class whose mean colour is nearest, in normalised pixels."""

    def __init__(self, colours, mean, std):
        super().__init__()
        self.register_buffer("means", (colours - mean) / std)

    def forward(self, images):
        return -torch.cdist(images.mean((2, 3)), self.means).square()


def colours_of(mean, std, channels=3, count=10):
    """A model that wants pixels normalised by mean and std, and images of ten colours."""
    colours = torch.rand(count, channels, generator=torch.Generator().manual_seed(2)) * 0.5 + 0.5
    labels = torch.arange(120) % count
    noise = torch.rand(120, channels, 8, 8, generator=torch.Generator().manual_seed(3)) - 0.5
    images = (colours[labels][:, :, None, None] + 0.02 * noise).clamp(0, 1)
    return Nearest(colours, torch.tensor(mean), torch.tensor(std)), images, labels


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FLAGS = r"--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 \(ImageNet\) accuracy is 100.0 %"


@pytest.mark.parametrize(
    "inside", [((), ()), ((0.5,) * 3, (0.5,) * 3), ((0.0,) * 3, (1 / 255,) * 3), ((0.9,), (0.1,))]
)
def test_a_missing_or_wrong_normalisation_is_found_and_the_flags_suggested(inside):
    module, images, labels = colours_of(*IMAGENET)
    made = wrap(module, num_classes=10, preprocess=Preprocess(mean=inside[0], std=inside[1]))
    said = refused(FLAGS, made, images, labels)
    assert "give these flags" in str(said)
    right = wrap(module, num_classes=10, preprocess=Preprocess(mean=IMAGENET[0], std=IMAGENET[1]))
    assert handshake(right, images, labels).accuracy == 1


def test_pixels_from_0_to_255_and_grey_images_have_flags_too():
    module, images, labels = colours_of((0.0,) * 3, (1 / 255,) * 3)
    refused(r"--mean 0,0,0 --std 0.00392157", classifier(module), images, labels)
    module, images, labels = colours_of((0.1307,), (0.3081,), channels=1, count=4)
    refused(r"--mean 0.1307 --std 0.3081 \(MNIST\)", classifier(module, 4), images, labels)


class Brittle(nn.Module):
    """Reads the class from row 0. It wants pixels normalised by mean .5 and std .5: in other pixels
    it is wrong on the images whose pixel (1, 0) is bright, and in these on those with pixel (1, 1).
    """

    def forward(self, images):
        wanted = images.amin((1, 2, 3)) < -0.9
        pixels = torch.where(wanted[:, None, None, None], images * 0.5 + 0.5, images)[:, 0]
        spoilt = torch.where(wanted, pixels[:, 1, 1], pixels[:, 1, 0]) > 0.5
        return torch.where(spoilt[:, None], pixels[:, 0].roll(1, 1), pixels[:, 0])


def brittle(count, gained, lost):
    """Images of four classes: the right normalisation gains some, and loses others."""
    labels = torch.arange(count) % 4
    images = torch.zeros(count, 1, 2, 4)
    images[torch.arange(count), 0, 0, labels] = 1
    images[:gained, 0, 1, 0] = 1
    images[gained : gained + lost, 0, 1, 1] = 1
    return images, labels


@pytest.mark.parametrize(
    ("count", "gained", "lost", "warns"),
    [(200, 30, 0, True), (200, 40, 6, True), (200, 8, 0, False), (200, 40, 26, False)],
)
def test_a_high_accuracy_that_another_normalisation_raises_is_a_warning(count, gained, lost, warns):
    """A network without its normalisation may still be right on 85 %. Differences that may be
    chance are not named: McNemar's test, with a correction for the normalisations tried.
    """
    images, labels = brittle(count, gained, lost)
    found = handshake(classifier(Brittle(), 4), images, labels)
    assert found.accuracy == pytest.approx(1 - gained / count)
    said = noted(found).get("clean accuracy", "")
    assert ("--mean 0.5 --std 0.5" in said) == warns
    assert not warns or f"{gained} become correct, {lost} become wrong" in said
    right = wrap(
        Brittle(), num_classes=4, preprocess=Preprocess(mean=(0.5,), std=(0.5,), channels=1)
    )
    assert "--mean" not in noted(handshake(right, images, labels)).get("clean accuracy", "")


def test_networks_that_take_only_pixels_of_their_range_are_not_refused():
    """The other normalisations are tries: an error of the network on them says nothing."""
    images, labels = brittle(60, 12, 0)

    def checked(images):
        assert images.amin() >= 0 and images.amax() <= 1, "pixels out of range"
        return images

    made = classifier(Through(Brittle(), before=checked), 4)
    assert handshake(made, images, labels).accuracy == pytest.approx(0.8)


def test_equal_normalisations_are_seldom_named():
    """The rate of false alarms is at most 1 %: a model whose errors are chance, in all pixels."""
    labels = torch.arange(120) % 4
    images = nn.functional.one_hot(labels, 4).float().view(120, 1, 1, 4)
    alarms = 0
    for seed in range(300):
        draws = torch.Generator().manual_seed(seed)

        def answer(given, draws=draws):
            right = given[:, 0, 0].argmax(1)
            wrong = torch.rand(len(given), generator=draws) < 0.2
            return torch.where(wrong, (right + 1) % 4, right)

        correct = answer(images) == labels
        alarms += better_normalisation(answer, images, labels, correct, None) is not None
    assert alarms <= 9  # 10 or more of 300 have a probability of 0.1 % at a rate of 1 %


@pytest.mark.parametrize("seed", [151, 164, 286])
def test_a_weak_model_is_not_told_to_normalise(digits, seed):
    """Its accuracy moves between classes: 13 % in place of 3 % is no evidence."""
    _, images, labels = digits
    torch.manual_seed(seed)
    network = network_of(nn.Flatten(), nn.Linear(784, 10)).eval()
    assert "--mean" not in noted(handshake(classifier(network), images, labels))["clean accuracy"]


# Scores


@pytest.mark.parametrize("rejects", [False, True])
def test_probabilities_are_attacked_by_their_logarithms(digits, rejects):
    """AutoAttack's test; the decisions and the gradients' reach are those of the logits."""
    network, images, labels = digits
    inner = Through(
        network, after=lambda s: torch.cat([s, s.amax(1, True) - 3], 1) if rejects else s
    )
    made = classifier(nn.Sequential(inner, nn.Softmax(1)).eval())
    found = handshake(made, images, labels)
    assert "probabilities" in noted(found)["scores"] and found.classifier is not made
    assert found.classifier.rejects == rejects
    assert torch.equal(found.classifier.predict(images), made.predict(images))
    assert found.accuracy == pytest.approx(float((made.predict(images) == labels).float().mean()))
    expected = inner(images).log_softmax(1)
    torch.testing.assert_close(found.classifier.scores(images), expected, atol=1e-4, rtol=1e-4)
    assert PGD(steps=10)(found.classifier, images[:8], labels[:8], "linf:0.3").success.any()


def test_logits_are_not_taken_for_probabilities(digits):
    network, images, labels = digits
    found = handshake(classifier(network), images, labels)
    assert next(line for line in found.lines if line.name == "scores").state == "ok"
    logs = Through(network, after=lambda scores: scores.log_softmax(1)).eval()
    assert "scores" not in noted(handshake(classifier(logs), images, labels))


@given(st.integers(0, 999), st.integers(2, 20))
def test_the_test_for_probabilities_and_the_logarithms(seed, classes):
    generator = torch.Generator().manual_seed(seed)
    logits = 8 * torch.randn(20, classes, generator=generator)
    probabilities = logits.softmax(1)
    assert are_probabilities(probabilities, classes)
    assert are_probabilities(torch.cat([probabilities, torch.full((20, 1), 0.9)], 1), classes)
    assert not are_probabilities(logits, classes)
    assert not are_probabilities(torch.cat([probabilities, logits[:1].abs() + 2]), classes)

    class Given(nn.Module):
        def forward(self, images):
            return probabilities[: len(images)]

    made = Classifier(Given(), classes, rejects=False)
    logarithms = with_logarithms(made).scores(torch.rand(20, 1, 2, 2))
    assert torch.equal(logarithms.argmax(1), probabilities.argmax(1))
    assert bool(logarithms.isfinite().all())


def test_hard_decisions_are_named(digits):
    network, images, labels = digits
    hard = Through(network, after=lambda s: nn.functional.one_hot(s.argmax(1), 10).float()).eval()
    found = handshake(classifier(hard), images, labels)
    assert "0 or 1" in noted(found)["scores"] and "scores only" in noted(found)["gradients"]
    assert "argmax" in found.suspicious


def test_images_without_a_decision_are_counted(digits):
    network, images, labels = digits

    def spoil(scores):
        return scores.masked_fill((torch.arange(len(scores)) % 50 == 7)[:, None], math.nan)

    made = classifier(Through(network, after=spoil).eval())
    said = refused("NaN or infinite scores for 5 of 200 images", made, images, labels)
    assert "number 7" in str(said)


# What a module returns, and what it fails on


class Returning(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.network = nn.Linear(16, 4)
        self.make = make

    def forward(self, images):
        return self.make(self.network(images.flatten(1)))


class Answer(dict):
    """A dict with attributes, as in transformers."""

    def __init__(self, logits):
        super().__init__(logits=logits)
        self.logits = logits


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda scores: (scores, None), "returned a tuple instead of a tensor"),
        (lambda scores: {"out_scores": scores}, "dict with out_scores instead of a tensor"),
        (Answer, r"Answer with logits.*demur.wrap"),
        (lambda s: [{"boxes": s, "scores": s, "labels": s} for _ in s], "model for detection"),
        (lambda scores: scores[:, :, None, None].expand(-1, -1, 4, 4), "for segmentation"),
        (lambda scores: scores[:, :1], "one score for each image"),
        (lambda scores: scores.sum(1), "one score for each image"),
        (
            lambda scores: torch.cat([scores] * 3, 1),
            "12 scores for 4 classes: give --num-classes 12",
        ),
        (lambda scores: None, "NoneType"),
        (lambda scores: "a" * 999 + "\n", "returned a str"),
    ],
)
def test_an_answer_that_is_no_table_of_scores_is_explained(make, said):
    images = images_of(12, size=4)
    labels = torch.arange(12) % 4
    refused(said, Classifier(Returning(make), 4), images, labels)


def test_an_object_with_logits_passes_after_wrap():
    images, labels = images_of(12, size=4), torch.arange(12) % 4
    assert handshake(wrap(Returning(Answer), num_classes=4), images, labels).accuracy >= 0


@pytest.mark.parametrize(
    ("size", "given", "said"),
    [
        (28, 32, "fails on images of 32x32 pixels, and works on 28x28: give --img-size 28"),
        (20, 32, r"fails on images of shape \(1, 32, 32\).*--img-size"),
    ],
)
def test_a_wrong_image_size_is_named_with_the_one_that_works(size, given, said):
    network = network_of(nn.Flatten(), nn.Linear(size * size, 10)).eval()
    labels = torch.arange(20) % 10
    refused(said, classifier(network), images_of(20, size=given), labels)


def test_an_assertion_of_the_size_is_understood_too():
    class Patches(nn.Module):
        def forward(self, images):
            assert images.shape[2] == 224, "Input height (28) doesn't match model (224)."
            return images.mean((2, 3)).repeat(1, 2)[:, :2]

    labels = torch.arange(4) % 2
    refused("works on 224x224", classifier(Patches(), 2), images_of(4, size=28), labels)


def test_grey_images_for_a_colour_model_and_the_reverse(digits):
    _, images, labels = digits
    colour = network_of(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    said = refused("takes images of 3 channels", classifier(colour.eval()), images, labels)
    assert "have 1 (grey)" in str(said) and "convert the images to RGB" in str(said)
    grey = network_of(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    threefold = images.expand(-1, 3, -1, -1)
    refused(r"1 channels \(grey\), and these have 3", classifier(grey.eval()), threefold, labels)
    both = network_of(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 30 * 30, 10)).eval()
    refused("3 channels.*works on 32x32", classifier(both), images, labels)


def test_any_error_of_the_module_is_one_line_without_a_traceback():
    class CustomError(Exception):
        pass

    def fail(images):
        raise CustomError("first line\nsecond \x1b[31mline " + "x" * 2000)

    images, labels = images_of(8), torch.arange(8) % 2
    failing = classifier(Through(nn.Flatten(), before=fail), 2)
    said = refused("raised an error.*CustomError: first line second", failing, images, labels)
    assert "test_handshake.py, line" in str(said)

    def divide(images):
        return images / (1 // 0)

    refused(
        "ZeroDivisionError", classifier(Through(nn.Flatten(), before=divide), 2), images, labels
    )


def test_an_error_in_the_backward_pass_leaves_the_scores(digits):
    network, images, labels = digits

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, scores):
            return scores.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise NotImplementedError("no derivative")

    found = handshake(classifier(Through(network, after=Broken.apply).eval()), images, labels)
    assert "NotImplementedError: no derivative" in noted(found)["gradients"]
    assert found.gradients_per_second == 0 and "custom gradient Broken" in found.suspicious


# Modes, randomness, batches


def test_training_mode_is_said_and_overridden(digits):
    _, images, labels = digits
    made = convolutional(10, size=28)
    assert "training mode" in noted(handshake(made, images, labels))["evaluation mode"]
    made.eval()
    assert "evaluation mode" not in noted(handshake(made, images, labels))


def test_a_dropout_that_ignores_the_mode_makes_the_model_randomised(digits):
    network, images, labels = digits
    noisy = Through(network, before=lambda images: nn.functional.dropout(images, 0.2)).eval()
    found = handshake(classifier(noisy), images, labels)
    assert found.randomised and "randomised" in noted(found)["repeated passes"]
    again = handshake(classifier(noisy), images, labels)
    assert again.accuracy == found.accuracy  # the draws depend on the seed


def batch_norm(images):
    return nn.functional.batch_norm(images, None, None, training=True)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: Through(nn.Identity(), before=batch_norm),
        lambda: nn.BatchNorm2d(1, track_running_stats=False),
    ],
)
def test_a_batch_norm_that_stays_in_training_mode_is_found(digits, layer):
    """R3: the scores of an image depend on the images beside it."""
    network, images, labels = digits
    made = classifier(nn.Sequential(layer(), network).eval())
    refused("depend on the other images of the batch. Probably a batch norm", made, images, labels)


def test_a_batch_norm_that_fails_on_one_image_is_explained(digits):
    network, images, labels = digits
    norm = nn.BatchNorm1d(10, track_running_stats=False)
    made = classifier(nn.Sequential(network, norm).eval())
    refused("batch norm computes with the statistics of the batch", made, images, labels)


def test_a_small_dependence_is_a_note(digits):
    network, images, labels = digits

    def beside(scores):
        return scores + 2e-3 * scores.mean(0, keepdim=True)

    found = handshake(classifier(Through(network, after=beside).eval()), images, labels)
    assert "may depend on the batch" in noted(found)["other batches"]


def test_single_images_and_small_samples_pass(digits):
    network, images, labels = digits
    for count in (1, 2, 3):
        found = handshake(classifier(network), images[:count], labels[:count], batch_size=1)
        assert found.batch_size == 1
    assert handshake(classifier(network), images[:3], labels[:3]).batch_size == 128


# Weights and devices


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_a_note_with_its_remedy(digits, dtype):
    network, images, labels = digits
    half = copy.deepcopy(network).to(dtype)
    found = handshake(classifier(half), images, labels)
    assert ".float()" in noted(found)["device"] and "other batches" not in noted(found)


def test_mixed_precision_that_fails_is_explained(digits):
    network, images, labels = digits
    mixed = copy.deepcopy(network)
    mixed[4].half()
    refused(r"precisions of the weights do not fit.*\.float\(\)", classifier(mixed), images, labels)


def test_weights_that_were_never_loaded_are_named(digits):
    _, images, labels = digits
    with torch.device("meta"):
        empty = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    refused("device meta.*load a checkpoint", classifier(empty), images, labels)


def test_a_tensor_that_stays_on_another_device_is_explained(digits):
    network, images, labels = digits
    weights = torch.rand(1, 1, 28, 28, device="meta")
    elsewhere = Through(network, before=lambda images: images * weights).eval()
    said = refused("another device|meta", classifier(elsewhere), images, labels)
    assert "register_buffer" in str(said)


def test_a_model_that_works_in_place_gets_copies(digits):
    network, images, labels = digits
    before = images.clone()
    found = handshake(
        classifier(Through(network, before=lambda images: images.mul_(1.0).clamp_(0, 0.9)).eval()),
        images,
        labels,
    )
    assert "in place" in noted(found)["input"] and torch.equal(images, before)
    assert "input" not in noted(handshake(classifier(network), images, labels))


# Memory


class Hungry(nn.Module):
    """Runs out of memory above a number of images."""

    def __init__(self, network, limit, error):
        super().__init__()
        self.network = network
        self.limit = limit
        self.error = error

    def forward(self, images):
        if len(images) > self.limit:
            raise self.error
        return self.network(images)


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 99 bytes"),
        RuntimeError("MPS backend out of memory"),
        MemoryError(),
    ],
)
def test_the_batch_size_is_halved_until_it_fits(digits, error):
    network, images, labels = digits
    hungry = Hungry(network, 20, error).eval()
    found = handshake(classifier(hungry), images, labels, batch_size=96)
    assert found.batch_size == 12 and "96 images do not fit" in noted(found)["batch size"]
    refused(
        "one image do not fit", classifier(Hungry(network, 0, error).eval()), images[:1], labels[:1]
    )
    refused("memory", classifier(Hungry(network, 0, error).eval()), images, labels)


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_the_default_batch_size_follows_the_size_of_the_images():
    assert running.default_batch_size(torch.zeros(1, 3, 32, 32)) == 128
    assert running.default_batch_size(torch.zeros(1, 3, 224, 224)) == 32
    assert running.default_batch_size(torch.zeros(1, 3, 4000, 4000)) == 1


# Gradients and operations


def test_zero_gradients_are_a_note_and_the_operation_is_named(digits):
    """The self-tests judge such a model; the handshake does not refuse it."""
    network, images, labels = digits
    steps = Through(network, before=lambda images: (images * 8).round() / 8).eval()
    found = handshake(classifier(steps), images, labels)
    assert "8 have a gradient of zero" in noted(found)["gradients"]
    assert found.suspicious == ("round",) and "round" in noted(found)["operations"]


def test_a_detached_model_is_scores_only(digits):
    network, images, labels = digits
    detached = Through(network, before=lambda images: images.detach()).eval()
    for parameter in network.parameters():
        assert parameter.requires_grad
    found = handshake(classifier(detached), images, labels)
    assert found.gradients_per_second == 0 and "scores only" in noted(found)["gradients"]


def test_gradients_that_are_nan_are_counted(digits):
    network, images, labels = digits
    roots = Through(network, before=lambda images: images.sqrt().square()).eval()
    assert "NaN" in noted(handshake(classifier(roots), images, labels))["gradients"]


def without_gradient(images):
    with torch.no_grad():
        return (10 * images).floor() / 10


SUSPICIOUS = [
    ("sign", lambda x: x * (x - 0.5).sign()),
    ("round", lambda x: x.mul(4).round_()),
    ("ceil", lambda x: x.ceil()),
    ("floor", without_gradient),
    ("no_grad", without_gradient),
    ("detach", lambda x: x * x.detach()),
    ("gt", lambda x: x * (x > 0.5)),
    ("le", lambda x: torch.where(x <= 0.5, x, 0.0)),
    ("argmax", lambda x: x + x.argmax(3, keepdim=True)),
    ("topk", lambda x: x * (x >= x.topk(2, 3).values[..., -1:]).float()),
    ("kthvalue", lambda x: x - x.kthvalue(2, 3, keepdim=True).values),
    ("heaviside", lambda x: torch.heaviside(x - 0.5, torch.ones(()))),
    ("bucketize", lambda x: torch.bucketize(x, torch.tensor([0.25, 0.5])) * x),
    ("floor_divide", lambda x: torch.div(x, 0.1, rounding_mode="floor")),
    ("threshold", lambda x: nn.functional.threshold(x, 0.5, 0.0)),
    ("to uint8", lambda x: (255 * x).to(torch.uint8) / 255),
    ("to bool", lambda x: x * x.bool()),
    (
        "fake_quantize_per_tensor_affine",
        lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, 0, 255),
    ),
]
USEFUL = [
    lambda x: torch.relu(x) + nn.functional.leaky_relu(x - 0.5),
    lambda x: nn.functional.hardtanh(x).clamp(0.1, 0.9),
    lambda x: nn.functional.max_pool2d(x, 2).repeat(1, 1, 2, 2),
    lambda x: nn.functional.interpolate(x, scale_factor=1.0, mode="bilinear"),
    lambda x: x * (torch.arange(8) > 3).float(),
    lambda x: x.masked_fill(x.new_zeros(x.shape) == 0, 0.5),
    lambda x: torch.where(torch.zeros_like(x) > 1, x, x + 1),
    lambda x: x.sort(3).values + x.abs(),
    lambda x: nn.functional.gelu(x).softmax(3),
]


@pytest.mark.parametrize(("name", "function"), SUSPICIOUS, ids=[name for name, _ in SUSPICIOUS])
def test_operations_without_useful_gradients_are_found(name, function):
    found = suspicious_operations(
        classifier(Through(nn.Flatten(), before=function), 64), images_of(1)
    )
    assert name in found


@pytest.mark.parametrize("function", USEFUL)
def test_other_operations_are_not_suspicious(function):
    """Masks of positions and of shapes do not depend on the pixels."""
    made = classifier(Through(nn.Flatten(), before=function), 64)
    assert suspicious_operations(made, images_of(1)) == ()


def test_plain_architectures_are_not_suspicious():
    torchvision = pytest.importorskip("torchvision")
    for name in ("resnet18", "mobilenet_v3_small", "swin_t"):
        made = torchvision.models.get_model(name, num_classes=4).eval()
        assert suspicious_operations(classifier(made, 4), torch.rand(1, 3, 64, 64)) == ()


def test_the_defences_of_demur_are_not_suspicious_but_what_they_wrap_is(digits):
    """They compare numbers too, and their gradients are tested."""
    network, images, _ = digits
    for wrapped in (network, Through(network, before=lambda images: images.round())):
        for defense in (MedianBlur(wrapped, 10), ConfidenceThreshold(wrapped, 10, threshold=0.5)):
            found = suspicious_operations(defense, images[:1])
            assert found == (() if wrapped is network else ("round",))


def test_a_scripted_model_is_looked_at_too():
    class Rounded(nn.Module):
        def forward(self, images):
            return torch.round(4 * images).flatten(1)[:, :4]

    scripted = torch.jit.trace(Rounded(), images_of(2))
    images = images_of(30)
    labels = Rounded()(images).argmax(1)
    found = handshake(Classifier(scripted, 4), images, labels)
    assert "round" in found.suspicious and found.accuracy == 1


# What is asked for


def test_an_exported_model_with_a_fixed_batch_is_explained(digits):
    network, images, labels = digits
    fixed = torch.export.export(copy.deepcopy(network), (images[:4],)).module()
    said = refused("fails on 2 images at once, and works on 4", classifier(fixed), images, labels)
    assert "dynamic" in str(said)
    batch = torch.export.Dim("batch")
    free = torch.export.export(network, (images[:4],), dynamic_shapes=({0: batch},)).module()
    found = handshake(classifier(free), images, labels)
    assert "exported program" in noted(found)["evaluation mode"]
    assert found.gradients_per_second > 0


def test_bad_requests_are_one_line(digits):
    network, images, labels = digits
    refused("Classifier is needed", network, images, labels)
    refused("batch_size", classifier(network), images, labels, batch_size=0)
    with torch.inference_mode():
        refused("inference_mode", classifier(network), images, labels)
    assert str(HandshakeError([Line("a", "ok", "x."), Line("b", "failed", "y.")])) == "y."


def test_a_model_for_another_size_is_noted(digits):
    network, images, labels = digits
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(28), network).eval()
    made = classifier(pooled, preprocess=Preprocess(size=(32, 32), channels=1))
    assert "32x32" in noted(handshake(made, images, labels))["size"]
