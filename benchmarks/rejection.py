"""Speed of fitting and attacking neural rejection, on the rejection paper's MNIST network.

    python benchmarks/rejection.py [--data-root DIR] [--only fit,growth,attack,growing-attack]
        [--images 2000] [--machines 10] [--least 1000] [--most 8000] [--network FILE] [--keep FILE]

All in one process and one run:

- `fit`: the machines of layer 5 (12,544 features), and scikit-learn's
  OneVsRestClassifier(SVC(kernel="rbf")) on the same features;
- `growth`: the machines of demur alone, up to --most training images;
- `attack`: gradients of DNR's scores a second, and those of a plain implementation of the same
  mathematics, machine by machine and image by image;
- `growing-attack`: gradients a second as the machines are fitted on more images.

Prints tables in Markdown.
"""

import argparse
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from sklearn.multiclass import OneVsRestClassifier
from sklearn.svm import SVC
from torch import Tensor, nn

from demur import ThreatModel, data
from demur.attacks import PGD, AttackResult
from demur.attacks.engine import GradientPrecision
from demur.data import to_float
from demur.defenses import DeepNeuralRejection
from demur.defenses.rbf_fitting import fit_rbf_svm
from demur.defenses.rbf_svm import OneVsRestRBFSVM
from demur.hardware import keep_buffers
from demur.networks import FeatureExtractor, dnr_cnn
from demur.training import fit, rejection_sgd

LAYERS = ["8", "12", "15"]
C = 0.1
GAMMA = 0.01
THREAT = ThreatModel("l2", 1e-4)
"""So small an eps that no image is solved before the end of the attack."""

T = TypeVar("T")


def timed(what: Callable[[], T]) -> tuple[float, T]:
    """Give the seconds that a function took, and its result."""
    start = time.perf_counter()
    result = what()
    return time.perf_counter() - start, result


def trained(train: data.ImageSet, path: Path | None) -> nn.Sequential:
    """Train the rejection paper's network, or read it from a file."""
    network = dnr_cnn()
    if path and path.exists():
        network.load_state_dict(torch.load(path, weights_only=True))
    else:
        fit(
            network,
            train.images,
            train.labels,
            epochs=4,
            optimizer=partial(rejection_sgd, rate=0.05),
        )
        if path:
            torch.save(network.state_dict(), path)
    return network.eval()


@torch.no_grad()
def layer_5(network: nn.Module, images: Tensor) -> Tensor:
    """Compute the features (n, 12,544) of the paper's layer 5."""
    extractor = FeatureExtractor(network, LAYERS[:1])
    return torch.cat([extractor(to_float(batch))[0] for batch in torch.split(images, 500)])


def fitting(
    network: nn.Module, train: data.ImageSet, test: data.ImageSet, count: int, machines: int
) -> None:
    """Fit and decide 1,000 images: demur with cross-validated sigmoids, scikit-learn without."""
    some = train.sample(count, 0)
    few = test.sample(1000, 0)
    features = layer_5(network, some.images)
    shown = layer_5(network, few.images)
    fit_rbf_svm(features[:200], some.labels[:200], 10, C=C, gamma=GAMMA, folds=2)  # to warm up

    def ours() -> Tensor:
        fitted, _ = fit_rbf_svm(features, some.labels, 10, C=C, gamma=GAMMA)
        with torch.no_grad():
            values: Tensor = fitted(shown)
        return values

    def theirs() -> Tensor:
        if machines == 10:
            whole = OneVsRestClassifier(SVC(kernel="rbf", C=C, gamma=GAMMA)).fit(
                features.numpy(), some.labels.numpy()
            )
            return torch.from_numpy(whole.decision_function(shown.numpy()))
        each = [
            SVC(kernel="rbf", C=C, gamma=GAMMA).fit(features.numpy(), (some.labels == k).numpy())
            for k in range(machines)
        ]
        return torch.from_numpy(
            np.stack([machine.decision_function(shown.numpy()) for machine in each], axis=1)
        )

    own, values = timed(ours)
    other, expected = timed(theirs)
    other *= 10 / machines
    values = values[:, :machines]
    same = (
        values.argmax(1) == expected.argmax(1)
        if machines == 10
        else ((values > 0) == (expected > 0)).all(1)
    )
    apart = float((values - expected).abs().max())
    print(f"\n### {count:,} images of {features.shape[1]:,} features: fit, and decide 1,000\n")
    print("| library | seconds |\n|---|---|")
    print(f"| **demur**, with 5-fold cross-validation for the sigmoids | {own:.1f} |")
    measured = "" if machines == 10 else f", from {machines} of its ten machines"
    print(f'| scikit-learn, `OneVsRestClassifier(SVC(kernel="rbf"))`{measured} | {other:.1f} |')
    same_share = 100 * float(same.double().mean())
    print(
        f"\nRatio {other / own:.0f}; same decisions {same_share:.2f} %, "
        f"decision values at most {apart:.1e} apart.",
        flush=True,
    )


def growth(network: nn.Module, train: data.ImageSet, least: int, most: int) -> None:
    """Fit the machines of demur on more and more images."""
    print("\n### Fitting more images: 12,544 features\n")
    print("| training images | seconds to fit | support vectors | peak GiB so far |")
    print("|---|---|---|---|")
    for count in (1000, 2000, 4000, 8000, 16000, 30000):
        if not least <= count <= min(most, len(train)):
            continue
        some = train.sample(count, 0)
        features = layer_5(network, some.images)
        seconds, fitted = timed(partial(fit_rbf_svm, features, some.labels, 10, C=C, gamma=GAMMA))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"| {count:,} | {seconds:.1f} | {len(fitted[0].support):,} | {peak:.1f} |", flush=True
        )


class Plain:
    """DNR in plain PyTorch: each machine has its own support vectors and sees one image at a time.

    In float32.
    """

    def __init__(self, deep: DeepNeuralRejection) -> None:
        assert deep.combiner_ is not None
        self.extractor = FeatureExtractor(deep.network, LAYERS)
        self.threshold = torch.tensor(deep.threshold)
        self.layers = [self._apart(machines) for machines in deep.machines_]
        self.combiner = self._apart(deep.combiner_)

    @staticmethod
    def _apart(machines: OneVsRestRBFSVM) -> list[tuple[Tensor, Tensor, Tensor, Tensor, float]]:
        whole = machines.support + machines.centre
        apart = []
        for k in range(machines.weights.shape[1]):
            own = machines.weights[:, k] != 0
            apart.append(
                (
                    whole[own],
                    machines.weights[own, k],
                    machines.intercepts[k],
                    machines.platt[k],
                    machines.gamma,
                )
            )
        return apart

    @staticmethod
    def _said(
        machines: list[tuple[Tensor, Tensor, Tensor, Tensor, float]], features: Tensor
    ) -> Tensor:
        raw = []
        for support, weights, intercept, platt, gamma in machines:
            kernel = torch.exp(-gamma * (support - features).square().sum(1))
            raw.append(torch.sigmoid(-((weights * kernel).sum() + intercept) * platt[0] - platt[1]))
        together = torch.stack(raw)
        return together / together.sum()

    def gradient(self, image: Tensor, label: int) -> tuple[Tensor, Tensor]:
        """Compute the scores (K + 1,), and the gradient of the margin of the best other class.

        For one image (1, C, H, W).
        """
        image = image.clone().requires_grad_()
        layers = [
            self._said(machines, features[0])
            for machines, features in zip(self.layers, self.extractor(image), strict=True)
        ]
        scores = torch.cat(
            [self._said(self.combiner, torch.cat(layers)), self.threshold.reshape(1)]
        )
        other = scores[:-1].clone()
        other[label] = -torch.inf
        margin = other.max() - torch.maximum(scores[label], scores[-1])
        return scores.detach(), torch.autograd.grad(margin, image)[0]


def attacking(
    network: nn.Module,
    train: data.ImageSet,
    test: data.ImageSet,
    count: int,
    kept: Path | None,
    plainly: int = 4,
    steps: int = 10,
) -> None:
    """Attack DNR by L2 PGD: images times steps a second. Check that the scores are the same."""
    some = train.sample(count, 0)
    few = test.sample(128, 0)
    if kept:
        np.savez(
            kept, images=some.images.numpy(), labels=some.labels.numpy(), few=few.to_float().numpy()
        )
    deep = DeepNeuralRejection(network, 10, LAYERS).fit(some.images, some.labels)
    images = few.to_float()
    labels = few.labels
    plain = Plain(deep)
    seconds = {}
    precisions: tuple[GradientPrecision, ...] = ("bfloat16", "float32")
    for precision in precisions:
        taken, result = descended(deep, images, labels, steps, precision)
        seconds[f"**demur**, {precision}"] = taken / int(result.backwards.sum())
    taken, _ = timed(
        lambda: [plain.gradient(images[i : i + 1], int(labels[i])) for i in range(plainly)]
    )
    name = "machine by machine, image by image"
    seconds[name] = taken / plainly
    scores = torch.stack(
        [plain.gradient(images[i : i + 1], int(labels[i]))[0] for i in range(plainly)]
    )
    apart = float((scores - deep.scores(images[:plainly])).abs().max())
    support = len(deep.machines_[0].support)
    print(f"\n### Attacking DNR, {count:,} images, {support:,} support vectors of layer 5\n")
    print("| implementation | images x steps a second | times |\n|---|---|---|")
    for implementation, each in seconds.items():
        print(f"| {implementation} | {1 / each:.1f} | {seconds[name] / each:.1f} |")
    print(f"\nThe scores of the two are at most {apart:.1e} apart.", flush=True)


def descended(
    deep: DeepNeuralRejection,
    images: Tensor,
    labels: Tensor,
    steps: int,
    precision: GradientPrecision = "auto",
) -> tuple[float, AttackResult]:
    """Attack by PGD, after one step to warm up; give the seconds and the result."""
    PGD(steps=1)(deep, images, labels, THREAT, precision=precision)
    attack = PGD(steps=steps)
    return timed(lambda: attack(deep, images, labels, THREAT, precision=precision))


def growing_attack(
    network: nn.Module, train: data.ImageSet, test: data.ImageSet, most: int
) -> None:
    """Attack DNR with machines that are fitted on more and more images."""
    print("\n### Attacking DNR with more training images\n")
    print(
        "| training images | support vectors of layer 5 | images x steps a second |\n|---|---|---|"
    )
    few = test.sample(128, 0)
    images = few.to_float()
    labels = few.labels
    for count in (1000, 2000, 4000, 8000):
        if count > min(most, len(train)):
            break
        some = train.sample(count, 0)
        deep = DeepNeuralRejection(network, 10, LAYERS).fit(some.images, some.labels)
        taken, result = descended(deep, images, labels, steps=10)
        support = len(deep.machines_[0].support)
        rate = int(result.backwards.sum()) / taken
        print(f"| {count:,} | {support:,} | {rate:.0f} |", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument(
        "--machines",
        type=int,
        default=10,
        help="how many of scikit-learn's ten machines are timed; it fits them one by one",
    )
    parser.add_argument(
        "--least", type=int, default=1000, help="training images that growth begins with"
    )
    parser.add_argument("--most", type=int, default=8000)
    parser.add_argument("--network", type=Path, help="file to keep the trained network in")
    parser.add_argument(
        "--keep",
        type=Path,
        help="file to keep the images of the attack in, for benchmarks/rejection_secml.py",
    )
    parser.add_argument("--only", default="fit,growth,attack,growing-attack")
    given = parser.parse_args()
    keep_buffers()
    present = {status.name for status in data.list_datasets(given.data_root) if status.where}
    name = "mnist" if "mnist" in present else "digits"
    train = data.load(name, "train", given.data_root)
    test = data.load(name, "test", given.data_root)
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
