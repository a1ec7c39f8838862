"""How fast the training loop is, beside a plain float32 PyTorch loop; and how time and memory grow with the images.

    python benchmarks/training.py [--data-root DIR] [--epochs 2] [--rounds 3]

Each measurement is a process of its own, in turn (ours, plain, ours, plain, ...), on the network of the background-class
paper, with its optimizer and batch size: MNIST if the data root has it, else the embedded digits. The plain loop slices
float32 tensors that are already in memory: there is no data loader to wait for. Prints a table in Markdown.
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
from demur.evaluation import rates
from demur.networks import adadelta, background_class_network, fit


def plain_loop(network: nn.Module, images: Tensor, labels: Tensor, epochs: int, seed: int) -> None:
    """What anyone would write: float32, contiguous, no settings."""
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


def measure(loop: str, root: str | None, count: int, epochs: int, seed: int) -> dict[str, float]:
    """Train once in this process; give images per second, test accuracy and peak memory."""
    train, test = load("train", root), load("test", root)
    chosen = torch.arange(count) % len(train) if count else torch.arange(len(train))
    images, labels = train.images[chosen], train.labels[chosen]
    network = background_class_network(train.num_classes, seed=seed)
    if loop == "plain":
        images = data.as_floats(images)
        plain_loop(background_class_network(train.num_classes), images[:1280], labels[:1280], 1, seed)
        start = time.perf_counter()
        plain_loop(network, images, labels, epochs, seed)
    else:
        fit(background_class_network(train.num_classes), images[:1280], labels[:1280], epochs=1, device="cpu")
        start = time.perf_counter()
        fit(network, images, labels, epochs=epochs, seed=seed, device="cpu")
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    accuracy = rates(outcomes(Classifier(network.cpu(), train.num_classes), test.floats(), test.labels)).accuracy
    return {"rate": len(images) * epochs / seconds, "seconds": seconds, "accuracy": 100 * accuracy, "megabytes": peak}


def load(split: str, root: str | None) -> data.ImageSet:
    """MNIST, or the embedded digits."""
    there = {status.name for status in data.describe(root) if status.where}
    return data.load("mnist" if "mnist" in there else "digits", split, root)


def in_a_process(*options: object) -> dict[str, float]:
    """Run one measurement by itself, so that neither settings nor memory of one touch the other."""
    done = subprocess.run([sys.executable, __file__, "--one", *map(str, options)], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        loop, root, count, epochs, seed = given.one
        print(json.dumps(measure(loop, None if root == "None" else root, int(count), int(epochs), int(seed))))
        return
    root = str(Path(given.data_root).resolve()) if given.data_root else None
    name = load("test", root).name
    pairs = [
        (in_a_process("ours", root, 0, given.epochs, seed), in_a_process("plain", root, 0, given.epochs, seed))
        for seed in range(given.rounds)
    ]
    print(f"{name}, {given.epochs} epochs, {given.rounds} rounds, {torch.get_num_threads()} threads\n")
    print("| loop | images/s (median) | test accuracy % (mean) | peak MB |\n|---|---|---|---|")
    for place, loop in enumerate(("demur.networks.fit", "plain float32")):
        runs = [pair[place] for pair in pairs]
        accuracy = sum(run["accuracy"] for run in runs) / len(runs)
        print(f"| {loop} | {median(run['rate'] for run in runs):,.0f} | {accuracy:.2f} | {max(run['megabytes'] for run in runs):,.0f} |")
    ratios = sorted(ours["rate"] / plain["rate"] for ours, plain in pairs)
    print(f"\nRatio, pair by pair: median {median(ratios):.2f} (from {ratios[0]:.2f} to {ratios[-1]:.2f})\n")
    base = 16_000
    print("| images | seconds | peak MB |\n|---|---|---|")
    for factor in (1, 2, 4):
        run = in_a_process("ours", root, base * factor, 1, 0)
        print(f"| {base * factor:,} | {run['seconds']:.1f} | {run['megabytes']:,.0f} |")


if __name__ == "__main__":
    main()
