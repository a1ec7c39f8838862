"""Measure your own classifier in three outcomes, then give it a background class.

python examples/own_classifier.py

It uses embedded data and takes a minute on two cores.
"""

from torch import nn

from demur import Classifier, Outcome, ThreatModel, data, outcomes
from demur.attacks import FGSM, AnyError, Evade
from demur.defenses import BackgroundClass
from demur.metrics import rates, wilson_interval
from demur.networks import background_class_network
from demur.training import fit

train = data.load("digits", "train")
test = data.load("digits", "test")
images = test.to_float()
labels = test.labels

# Any nn.Module that maps images in [0, 1] to scores becomes a classifier in one line.
network = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
fit(network, train.images, train.labels, epochs=20, seed=0)
plain = Classifier(network, num_classes=10)

# The defended classifier has an eleventh score, learnt from images that show no digit.
synthetic = data.synthetic_backgrounds(train, per_kind=300, seed=0)
backgrounds = synthetic.images[synthetic.labels >= 10]
defended = BackgroundClass(background_class_network(11), num_classes=10)
defended.fit(train.images, train.labels, backgrounds, epochs=10, seed=0)

# An attack says how, a threat model says what. The first attacker ignores the reject score.
EPS = 0.25
attackers = {
    "no attack": None,
    "defence-unaware": (FGSM(loss="cross_entropy"), ThreatModel("linf", EPS, AnyError())),
    "defence-aware": (FGSM(), ThreatModel("linf", EPS, Evade())),
}

print("A toy: small embedded digits, synthetic backgrounds, FGSM. The README has a real table.")
for name, classifier in (("plain", plain), ("background class", defended)):
    for attacker, how in attackers.items():
        sent = images
        if how is not None:
            attack, threat = how
            sent = attack(classifier, images, labels, threat).candidates
        found = rates(outcomes(classifier, sent, labels))
        low, high = wilson_interval(found.wrong, found.n)
        print(
            f"{name:18}{attacker:17}{Outcome.CORRECT.name.lower()} {found.accuracy:6.1%}  "
            f"rejected {found.rejection_rate:6.1%}  "
            f"wrong {found.error_rate:6.1%} (95 %: {low:.1%} to {high:.1%})"
        )
