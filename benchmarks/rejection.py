"""How fast neural rejection is fitted and attacked, beside what others have, on the rejection paper's MNIST network.

    python benchmarks/rejection.py [--data-root DIR] [--only fit,growth,attack,growing-attack] [--images 2000] [--machines 10]
        [--least 1000] [--most 8000] [--network FILE] [--keep FILE]

All in one process and one run. `fit`: the layer-5 machines (12,544 features) against scikit-learn's OneVsRestClassifier(SVC(kernel="rbf"))
on the same features. `growth`: ours alone, up to --most training images. `attack`: gradients of DNR's scores a second, against an
implementation of the same mathematics machine by machine and image by image, as one writes it down first. `growing-attack`: ours as the
machines are fitted on more images. Prints tables in Markdown.
"""

import argparse
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.multiclass import OneVsRestClassifier
from sklearn.svm import SVC
from torch import Tensor, nn

from demur import attacks, data
from demur.data import as_floats
from demur.defenses import DeepNeuralRejection
from demur.defenses.neural_rejection import Taps
from demur.defenses.rbf_svm import RBFMachines, fit_rbf_svm
from demur.networks import fit, rejection_network, rejection_sgd

LAYERS = ["8", "12", "15"]
C, GAMMA = 0.1, 0.01


def timed(what: Callable[[], object]) -> tuple[float, object]:
    """Seconds, and what came of it."""
    start = time.perf_counter()
    result = what()
    return time.perf_counter() - start, result


def trained(train: data.ImageSet, path: Path | None) -> nn.Sequential:
    """The rejection paper's network."""
    network = rejection_network()
    if path and path.exists():
        network.load_state_dict(torch.load(path, weights_only=True))
    else:
        fit(network, train.images, train.labels, epochs=4, optimizer=partial(rejection_sgd, rate=0.05))
        if path:
            torch.save(network.state_dict(), path)
    return network.eval()


@torch.no_grad()
def layer_5(network: nn.Module, images: Tensor) -> Tensor:
    """Features (n, 12,544) of the paper's layer 5."""
    taps = Taps(network, LAYERS[:1])
    return torch.cat([taps(as_floats(batch))[0] for batch in torch.split(images, 500)])


def fitting(network: nn.Module, train: data.ImageSet, test: data.ImageSet, count: int, machines: int) -> None:
    """Fit and decide 1,000 images: ours, with its cross-validated sigmoids, and scikit-learn's, without any."""
    some, few = train.take(count, 0), test.take(1000, 0)
    features, shown = layer_5(network, some.images), layer_5(network, few.images)
    fit_rbf_svm(features[:200], some.labels[:200], 10, C=C, gamma=GAMMA, folds=2)  # to warm up

    def ours() -> Tensor:
        fitted, _ = fit_rbf_svm(features, some.labels, 10, C=C, gamma=GAMMA)
        with torch.no_grad():
            values: Tensor = fitted(shown)
        return values

    def theirs() -> Tensor:
        if machines == 10:
            whole = OneVsRestClassifier(SVC(kernel="rbf", C=C, gamma=GAMMA)).fit(features.numpy(), some.labels.numpy())
            return torch.from_numpy(whole.decision_function(shown.numpy()))
        each = [SVC(kernel="rbf", C=C, gamma=GAMMA).fit(features.numpy(), (some.labels == k).numpy()) for k in range(machines)]
        return torch.from_numpy(np.stack([machine.decision_function(shown.numpy()) for machine in each], axis=1))

    own, values = timed(ours)
    other, expected = timed(theirs)
    assert isinstance(values, Tensor) and isinstance(expected, Tensor)
    other *= 10 / machines
    values = values[:, :machines]
    same = values.argmax(1) == expected.argmax(1) if machines == 10 else ((values > 0) == (expected > 0)).all(1)
    apart = float((values - expected).abs().max())
    print(f"\n### {count:,} images of {features.shape[1]:,} features: fit, and decide 1,000\n\n| who | seconds |\n|---|---|")
    print(f"| **demur**, with 5-fold cross-validation for the sigmoids | {own:.1f} |")
    measured = "" if machines == 10 else f", from {machines} of its ten machines"
    print(f'| scikit-learn, `OneVsRestClassifier(SVC(kernel="rbf"))`{measured} | {other:.1f} |')
    same_share = 100 * float(same.double().mean())
    print(f"\nRatio {other / own:.0f}; same decisions {same_share:.2f} %, decision values at most {apart:.1e} apart.", flush=True)


def growth(network: nn.Module, train: data.ImageSet, least: int, most: int) -> None:
    """Ours alone, as images are added."""
    print("\n### As images are added: 12,544 features\n")
    print("| training images | seconds to fit | support vectors | GiB at most so far |\n|---|---|---|---|")
    for count in (1000, 2000, 4000, 8000, 16000, 30000):
        if not least <= count <= min(most, len(train)):
            continue
        some = train.take(count, 0)
        features = layer_5(network, some.images)
        seconds, fitted = timed(partial(fit_rbf_svm, features, some.labels, 10, C=C, gamma=GAMMA))
        assert isinstance(fitted, tuple)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"| {count:,} | {seconds:.1f} | {len(fitted[0].support):,} | {peak:.1f} |", flush=True)


class Plain:
    """DNR written down plainly: each machine has support vectors of its own, and sees one image at a time, in float32."""

    def __init__(self, deep: DeepNeuralRejection) -> None:
        rejecting = deep.rejecting
        assert rejecting.combiner is not None
        self.taps, self.threshold = rejecting.taps, rejecting.threshold
        self.layers = [self._apart(machines) for machines in rejecting.each()]
        self.combiner = self._apart(rejecting.combiner)

    @staticmethod
    def _apart(machines: RBFMachines) -> list[tuple[Tensor, Tensor, Tensor, Tensor, float]]:
        whole, apart = machines.support + machines.centre, []
        for k in range(machines.weights.shape[1]):
            own = machines.weights[:, k] != 0
            apart.append((whole[own], machines.weights[own, k], machines.intercepts[k], machines.platt[k], machines.gamma))
        return apart

    @staticmethod
    def _said(machines: list[tuple[Tensor, Tensor, Tensor, Tensor, float]], features: Tensor) -> Tensor:
        raw = []
        for support, weights, intercept, platt, gamma in machines:
            kernel = torch.exp(-gamma * (support - features).square().sum(1))
            raw.append(torch.sigmoid(-((weights * kernel).sum() + intercept) * platt[0] - platt[1]))
        together = torch.stack(raw)
        return together / together.sum()

    def gradient(self, image: Tensor, label: int) -> tuple[Tensor, Tensor]:
        """Scores (K + 1,), and the gradient of the margin of the best other class, for one image (1, C, H, W)."""
        image = image.clone().requires_grad_()
        layers = [self._said(machines, features[0]) for machines, features in zip(self.layers, self.taps(image), strict=True)]
        scores = torch.cat([self._said(self.combiner, torch.cat(layers)), self.threshold.reshape(1)])
        other = scores[:-1].clone()
        other[label] = -torch.inf
        margin = other.max() - torch.maximum(scores[label], scores[-1])
        return scores.detach(), torch.autograd.grad(margin, image)[0]


def attacking(
    network: nn.Module, train: data.ImageSet, test: data.ImageSet, count: int, kept: Path | None, plainly: int = 4, steps: int = 10
) -> None:
    """Steps of L2 PGD on DNR: images times steps a second, and that the scores are the same."""
    some, few = train.take(count, 0), test.take(128, 0)
    if kept:
        np.savez(kept, images=some.images.numpy(), labels=some.labels.numpy(), few=few.floats().numpy())
    deep = DeepNeuralRejection(network, 10, LAYERS).fit(some.images, some.labels)
    images, labels = few.floats(), few.labels
    plain = Plain(deep)
    seconds = {}
    for precision in ("bfloat16", "float32"):
        attack = partial(attacks.pgd, deep, images, labels, norm="l2", eps=1e-4, steps=steps, precision=precision)
        attack(steps=1)
        taken, result = timed(attack)
        assert isinstance(result, attacks.AttackResult)
        seconds[f"**demur**, {precision}"] = taken / int(result.backwards.sum())
    taken, _ = timed(lambda: [plain.gradient(images[i : i + 1], int(labels[i])) for i in range(plainly)])
    name = "machine by machine, image by image"
    seconds[name] = taken / plainly
    scores = torch.stack([plain.gradient(images[i : i + 1], int(labels[i]))[0] for i in range(plainly)])
    apart = float((scores - deep.scores(images[:plainly])).abs().max())
    print(f"\n### Attacking DNR, machines on {count:,} images, {len(deep.rejecting.each()[0].support):,} support vectors of layer 5\n")
    print("| who | images x steps a second | times |\n|---|---|---|")
    for who, each in seconds.items():
        print(f"| {who} | {1 / each:.1f} | {seconds[name] / each:.1f} |")
    print(f"\nScores of the two are at most {apart:.1e} apart.", flush=True)


def growing_attack(network: nn.Module, train: data.ImageSet, test: data.ImageSet, most: int) -> None:
    """Ours, as the machines are fitted on more images."""
    print("\n### Attacking DNR as training images are added\n")
    print("| training images | support vectors of layer 5 | images x steps a second |\n|---|---|---|")
    few = test.take(128, 0)
    images, labels = few.floats(), few.labels
    for count in (1000, 2000, 4000, 8000):
        if count > min(most, len(train)):
            break
        some = train.take(count, 0)
        deep = DeepNeuralRejection(network, 10, LAYERS).fit(some.images, some.labels)
        attack = partial(attacks.pgd, deep, images, labels, norm="l2", eps=1e-4, steps=10)
        attack(steps=1)
        taken, result = timed(attack)
        assert isinstance(result, attacks.AttackResult)
        print(f"| {count:,} | {len(deep.rejecting.each()[0].support):,} | {int(result.backwards.sum()) / taken:.0f} |", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument(
        "--machines", type=int, default=10, help="of scikit-learn's ten, how many are timed; it is one machine after the other"
    )
    parser.add_argument("--least", type=int, default=1000, help="training images that growth begins with")
    parser.add_argument("--most", type=int, default=8000)
    parser.add_argument("--network", type=Path, help="file to keep the trained network in")
    parser.add_argument("--keep", type=Path, help="file to keep the images of the attack in, for benchmarks/rejection_secml.py")
    parser.add_argument("--only", default="fit,growth,attack,growing-attack")
    given = parser.parse_args()
    name = "mnist" if any(status.name == "mnist" and status.where for status in data.describe(given.data_root)) else "digits"
    train, test = data.load(name, "train", given.data_root), data.load(name, "test", given.data_root)
    network = trained(train, given.network)
    print(f"{name}, {torch.get_num_threads()} threads", flush=True)
    parts: dict[str, Callable[[], None]] = {
        "fit": lambda: fitting(network, train, test, given.images, given.machines),
        "growth": lambda: growth(network, train, given.least, given.most),
        "attack": lambda: attacking(network, train, test, given.images, given.keep),
        "growing-attack": lambda: growing_attack(network, train, test, given.most),
    }
    for part in given.only.split(","):
        parts[part]()


if __name__ == "__main__":
    main()
