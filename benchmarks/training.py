"""Speed of the training loop, beside a plain float32 PyTorch loop, and its growth with the images.

    python benchmarks/training.py [--data-root DIR] [--epochs 2] [--rounds 3]

Each measurement is a process of its own, in turn (ours, plain, ours, plain, ...), on the network of
the background-class paper, with its optimizer and batch size: MNIST if the data root has it, else
the embedded digits. The plain loop slices float32 tensors in memory, without a data loader. In all
processes malloc keeps freed buffers, as the commands of demur have it. Prints a table in Markdown.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from demur import Classifier, data, outcomes
from demur.hardware import keep_buffers
from demur.metrics import rates
from demur.networks import background_class_network
from demur.training import adadelta, fit

WARM_UP = 1280
"""Images of a first short training, which is not measured."""


def plain_loop(network: nn.Module, images: Tensor, labels: Tensor, epochs: int, seed: int) -> None:
    """Train as a first PyTorch script does: float32, contiguous, no settings."""
    torch.manual_seed(seed)
    optimizer = adadelta(network.parameters())
    network.train()
    for _ in range(epochs):
        order = torch.randperm(len(images))
        for start in range(0, len(images) - 127, 128):
            chosen = order[start : start + 128]
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(images[chosen]), labels[chosen])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    network.eval()


def train(
    loop: str, network: nn.Module, images: Tensor, labels: Tensor, epochs: int, seed: int
) -> None:
    """Train with one of the two loops."""
    if loop == "plain":
        plain_loop(network, images, labels, epochs, seed)
    else:
        fit(network, images, labels, epochs=epochs, seed=seed, device="cpu")


def measure(loop: str, root: str | None, count: int, epochs: int, seed: int) -> dict[str, float]:
    """Train once in this process; give images per second, test accuracy and peak memory."""
    training_set = load("train", root)
    test = load("test", root)
    chosen = torch.arange(count or len(training_set)) % len(training_set)
    images = training_set.images[chosen]
    labels = training_set.labels[chosen]
    if loop == "plain":
        images = data.to_float(images)
    classes = training_set.num_classes
    some = slice(WARM_UP)
    train(loop, background_class_network(classes), images[some], labels[some], 1, seed)
    network = background_class_network(classes, seed=seed)
    start = time.perf_counter()
    train(loop, network, images, labels, epochs, seed)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found = outcomes(Classifier(network.cpu(), classes), test.to_float(), test.labels)
    return {
        "rate": len(images) * epochs / seconds,
        "seconds": seconds,
        "accuracy": 100 * rates(found).accuracy,
        "megabytes": peak,
    }


def load(split: str, root: str | None) -> data.ImageSet:
    """MNIST, or the embedded digits."""
    there = {status.name for status in data.list_datasets(root) if status.where}
    return data.load("mnist" if "mnist" in there else "digits", split, root)


def in_a_process(*options: object) -> dict[str, float]:
    """Run one measurement by itself, so that settings and memory of one do not reach the other."""
    done = subprocess.run(
        [sys.executable, __file__, "--one", *map(str, options)],
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(root: str | None, epochs: int, rounds: int) -> None:
    """Print speed, accuracy and memory of both loops."""
    pairs = [
        [in_a_process(loop, root, 0, epochs, seed) for loop in ("ours", "plain")]
        for seed in range(rounds)
    ]
    name = load("test", root).name
    print(f"{name}, {epochs} epochs, {rounds} rounds, {torch.get_num_threads()} threads\n")
    print("| loop | images/s (median) | test accuracy % (mean) | peak MB |\n|---|---|---|---|")
    for place, loop in enumerate(("demur.training.fit", "plain float32")):
        runs = [pair[place] for pair in pairs]
        rate = median(run["rate"] for run in runs)
        accuracy = sum(run["accuracy"] for run in runs) / len(runs)
        peak = max(run["megabytes"] for run in runs)
        print(f"| {loop} | {rate:,.0f} | {accuracy:.2f} | {peak:,.0f} |")
    ratios = sorted(ours["rate"] / plain["rate"] for ours, plain in pairs)
    middle = median(ratios)
    print(f"\nRatio, by pair: median {middle:.2f} (from {ratios[0]:.2f} to {ratios[-1]:.2f})\n")


def grow(root: str | None, base: int = 16_000) -> None:
    """Print time and memory of one epoch of more and more images."""
    print("| images | seconds | peak MB |\n|---|---|---|")
    for factor in (1, 2, 4):
        run = in_a_process("ours", root, base * factor, 1, 0)
        print(f"| {base * factor:,} | {run['seconds']:.1f} | {run['megabytes']:,.0f} |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    keep_buffers()
    if options.one:
        loop, folder, *numbers = options.one
        count, epochs, seed = map(int, numbers)
        found = measure(loop, None if folder == "None" else folder, count, epochs, seed)
        print(json.dumps(found))
        return
    root = str(Path(options.data_root).resolve()) if options.data_root else None
    compare(root, options.epochs, options.rounds)
    grow(root)


if __name__ == "__main__":
    main()
