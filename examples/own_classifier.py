"""Measure a classifier of your own in three outcomes, then give it a background class, on embedded data (a minute on two cores).

python examples/own_classifier.py
"""

from torch import nn

from demur import Classifier, Outcome, data, outcomes
from demur.attacks import AnyError, Evade, fgs
from demur.defenses import BackgroundClass
from demur.evaluation import rates, wilson_interval
from demur.networks import background_class_network, fit

train, test = data.load("digits", "train"), data.load("digits", "test")
images, labels = test.floats(), test.labels

# Any nn.Module that gives scores of images in [0, 1] becomes a classifier in one line.
network = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
fit(network, train.images, train.labels, epochs=20, seed=0)
plain = Classifier(network, num_classes=10)

# The same with an eleventh column, learnt from images of no digit.
made = data.embedded_backgrounds(train, per_kind=300, seed=0)
strangers = made.images[made.labels >= 10]
defended = BackgroundClass(background_class_network(11), num_classes=10)
defended.fit(train.images, train.labels, strangers, epochs=10, seed=0)

print("A toy, to see how it works: small embedded digits, made backgrounds, one-step attacks. The README has a real table.")
for name, classifier in (("plain", plain), ("background class", defended)):
    for goal in (None, AnyError(by="cross_entropy"), Evade()):
        attempts = images if goal is None else fgs(classifier, images, labels, eps=0.25, goal=goal).attempts
        found = rates(outcomes(classifier, attempts, labels))
        low, high = wilson_interval(found.wrong, found.n)
        under = "clean" if goal is None else f"FGS 0.25, {type(goal).__name__}"
        print(
            f"{name:18}{under:20}{Outcome.CORRECT.name.lower()} {found.accuracy:6.1%}  rejected {found.rejection_rate:6.1%}  "
            f"wrong {found.error_rate:6.1%} (95 %: {low:.1%} to {high:.1%})"
        )
