"""What the guard around a user's module costs in an attack.

    python benchmarks/guard.py [--images 32] [--pairs 60]

PGD with 40 steps attacks the embedded digits, once through `Classifier`, and once through a
classifier that asks the module directly. Each pair of runs is measured one after the other, in
turns of the order. The time is that of the processor (`time.process_time`), with one thread. The
last column is a second measure, which other processes disturb less: the time of the guard in a call
of a module that does nothing, times the number of calls, divided by the time of the attack. Prints
a table in Markdown.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median, quantiles

import torch
from torch import Tensor, nn

from demur import Classifier, ThreatModel, data
from demur.attacks import PGD
from demur.hardware import keep_buffers
from demur.networks import background_class_network, dnr_cnn
from demur.training import fit

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "digits (`background_class_network`)": lambda: background_class_network(10),
    "MNIST (`dnr_cnn`)": lambda: dnr_cnn(10),
}
CALLS = 2_000
ROUNDS = 15


class Unguarded(Classifier):
    """A classifier that trusts its module, and counts its calls."""

    calls = 0

    def forward(self, images: Tensor) -> Tensor:
        """Ask the module directly."""
        Unguarded.calls += 1
        scores: Tensor = self.module(images)
        return scores


def seconds(classifier: Classifier, images: Tensor, labels: Tensor) -> float:
    """Measure one attack, in seconds of the processor."""
    begin = time.process_time()
    PGD(steps=40)(classifier, images, labels, ThreatModel("linf", 0.1), batch_size=128)
    return time.process_time() - begin


def microseconds() -> float:
    """Measure the guard in a call of a module that does nothing: the smallest of several rounds."""
    images = torch.zeros(1, 2)
    smallest: dict[type[Classifier], float] = {}
    for _ in range(ROUNDS):
        for kind in (Classifier, Unguarded):
            classifier = kind(nn.Identity(), 2, rejects=False)
            classifier(images)
            begin = time.process_time()
            for _ in range(CALLS):
                classifier(images)
            taken = 1e6 * (time.process_time() - begin) / CALLS
            smallest[kind] = min(taken, smallest.get(kind, taken))
    return smallest[Classifier] - smallest[Unguarded]


def pairs(network: nn.Module, count: int, repeats: int) -> list[tuple[float, float]]:
    """Measure with and without the guard, in pairs."""
    test = data.load("digits", "test").sample(count, seed=0)
    images = test.to_float()
    both = [Classifier(network, 10, rejects=False), Unguarded(network, 10, rejects=False)]
    for classifier in both:
        seconds(classifier, images, test.labels)
    found = []
    for turn in range(repeats):
        order = both if turn % 2 == 0 else both[::-1]
        taken = {type(one): seconds(one, images, test.labels) for one in order}
        found.append((taken[Classifier], taken[Unguarded]))
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=60)
    asked = parser.parse_args()
    keep_buffers()
    torch.set_num_threads(1)
    train = data.load("digits")
    with torch.no_grad():
        call = microseconds()
    Unguarded.calls = 0
    print("| network | with the guard (s) | without (s) | ratio: median | middle half | by calls |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, make in NETWORKS.items():
        network = make()
        fit(network, train.images, train.labels, epochs=1, batch_size=64, device="cpu")
        measured = pairs(network, asked.images, asked.pairs)
        ratios = [one / other for one, other in measured]
        low, middle, high = quantiles(ratios, n=4)
        with_it, without = (median(column) for column in zip(*measured, strict=True))
        calls = Unguarded.calls / (asked.pairs + 1)  # one run more, before the pairs
        Unguarded.calls = 0
        print(
            f"| {name} | {with_it:.3f} | {without:.3f} | {middle:.3f} | {low:.3f} to {high:.3f} | "
            f"{1 + call * calls / 1e6 / without:.4f} |"
        )
    print(f"\nThe guard takes {call:.1f} microseconds a call.")


if __name__ == "__main__":
    main()
