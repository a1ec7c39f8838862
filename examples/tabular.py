"""Train a classifier that does not lean on chosen features of a table: localized adversarial training on a vector (half a minute).

python examples/tabular.py

The localized paper's discussion says that its training could keep a risk calculator from focusing on chosen inputs. Here a network reads
30 measurements of cells (scikit-learn's breast cancer data), and is not to rely on the ten "worst" ones, as if these were not to be
trusted. Each may be changed by an attacker up to an eps of its own.
"""

from functools import partial

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from demur import Classifier, Outcome, attacks, outcomes
from demur.defenses import LocalizedAdversarialTraining
from demur.networks import fit

table = load_breast_cancer()
values = torch.tensor(table.data, dtype=torch.float32)
features = (values - values.amin(0)) / (values.amax(0) - values.amin(0))  # demur's inputs lie in [0, 1]
split = train_test_split(features, torch.tensor(table.target), test_size=0.4, random_state=0, stratify=table.target)
train, test, train_labels, test_labels = split

EPS = 0.3
chosen = torch.tensor([name.startswith("worst") for name in table.feature_names])
region = chosen.float()[None]  # (1, 30): 1 where an attacker may act, and so where the network learns not to lean
region[:, list(table.feature_names).index("worst area")] = 0.5  # one of them by half as much: an eps for each feature

attack = partial(attacks.pgd, norm="linf", eps=EPS, steps=10, random_start=True)


def network() -> nn.Module:
    """A small network for 30 numbers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 2))


def adam(parameters: object) -> torch.optim.Optimizer:
    """As usual."""
    return torch.optim.Adam(parameters, lr=3e-3)  # type: ignore[arg-type]


def accuracy(classifier: Classifier, inputs: Tensor) -> float:
    """Share of the test set that is answered correctly."""
    return float((outcomes(classifier, inputs, test_labels) == Outcome.CORRECT).double().mean())


def shuffled(columns: Tensor) -> Tensor:
    """The test set with these columns of other patients': what a classifier relies on, it then lacks."""
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
    return torch.where(columns, test[order], test)


options = {"epochs": 100, "batch_size": 32, "optimizer": adam, "seed": 0}
plain_network = network()
fit(plain_network, train, train_labels, **options)
plain = Classifier(plain_network, num_classes=2)
hardened = LocalizedAdversarialTraining(network(), 2, attack, region=region).fit(train, train_labels, **options)

print(f"{'':12}{'clean':>8}{'chosen features shuffled':>28}{'attacked there':>18}{'the others shuffled':>23}")
for name, classifier in (("plain", plain), ("hardened", hardened)):
    found = attacks.strongest(classifier, test, test_labels, norm="linf", eps=EPS, region=region, steps=20, targets=1)
    assert bool((found.images == test)[:, ~chosen].all())  # the other features are as they were, bit for bit
    print(
        f"{name:12}{accuracy(classifier, test):8.1%}{accuracy(classifier, shuffled(chosen)):28.1%}"
        f"{accuracy(classifier, found.attempts):18.1%}{accuracy(classifier, shuffled(~chosen)):23.1%}"
    )
