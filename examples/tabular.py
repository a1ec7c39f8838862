"""Train a classifier that does not rely on chosen features of a table.

python examples/tabular.py

It takes half a minute. The discussion of the localized paper says that localized adversarial
training could keep a risk calculator from relying on chosen inputs. Here a network reads 30
measurements of cells (scikit-learn's breast cancer data) and must not rely on the ten "worst"
measurements. During training an attacker changes each of these, up to an eps of its own.
"""

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from demur import Classifier, Outcome, ThreatModel, outcomes
from demur.attacks import PGD, Strongest
from demur.defenses import LocalizedAdversarialTraining
from demur.training import fit

table = load_breast_cancer()
values = torch.tensor(table.data, dtype=torch.float32)
lowest = values.amin(0)
features = (values - lowest) / (values.amax(0) - lowest)  # inputs of demur lie in [0, 1]
split = train_test_split(
    features, torch.tensor(table.target), test_size=0.4, random_state=0, stratify=table.target
)
train, test, train_labels, test_labels = split

EPS = 0.3
chosen = torch.tensor([name.startswith("worst") for name in table.feature_names])
# The mask (1, 30) is 1 where an attacker may act: the network learns not to rely on these features.
mask = chosen.float()[None]
# One feature may change by half as much: in Linf, a mask scales the eps of each feature.
mask[:, list(table.feature_names).index("worst area")] = 0.5

threat = ThreatModel("linf", EPS, mask=mask)


def network() -> nn.Module:
    """Build a small network for 30 numbers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 2))


def adam(parameters: object) -> torch.optim.Optimizer:
    """Make the optimizer."""
    return torch.optim.Adam(parameters, lr=3e-3)  # type: ignore[arg-type]


def accuracy(classifier: Classifier, inputs: Tensor) -> float:
    """Give the share of the test set that is answered correctly."""
    return float((outcomes(classifier, inputs, test_labels) == Outcome.CORRECT).double().mean())


def shuffled(columns: Tensor) -> Tensor:
    """Give the test set, with these columns of other patients.

    Accuracy falls as far as a classifier relies on them.
    """
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
    return torch.where(columns, test[order], test)


options = {"epochs": 100, "batch_size": 32, "optimizer": adam, "seed": 0}
plain_network = network()
fit(plain_network, train, train_labels, **options)
plain = Classifier(plain_network, num_classes=2)
attack = PGD(steps=10, random_start=True)
hardened = LocalizedAdversarialTraining(network(), 2, attack, ThreatModel("linf", EPS), mask=mask)
hardened.fit(train, train_labels, **options)

print(
    f"{'':12}{'clean':>8}{'chosen features shuffled':>28}{'attacked there':>18}"
    f"{'the others shuffled':>23}"
)
ensemble = Strongest(steps=20, n_targets=1)
for name, classifier in (("plain", plain), ("hardened", hardened)):
    found = ensemble(classifier, test, test_labels, threat)
    # The other features have not changed by a bit.
    assert bool((found.images == test)[:, ~chosen].all())
    without_chosen = accuracy(classifier, shuffled(chosen))
    without_others = accuracy(classifier, shuffled(~chosen))
    print(
        f"{name:12}{accuracy(classifier, test):8.1%}{without_chosen:28.1%}"
        f"{accuracy(classifier, found.candidates):18.1%}{without_others:23.1%}"
    )
