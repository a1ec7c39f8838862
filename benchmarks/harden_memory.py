"""Peak memory of deep neural rejection on a network with large feature maps.

    python benchmarks/harden_memory.py [--data-root DIR] [--images 1000 10000] [--size 224]

Each measurement is a process of its own. The network is torchvision's ResNet-18 for images of so
many pixels a side; its weights are random, and images of CIFAR-10 are enlarged to its size: neither
changes the memory. The machines are those of `demur harden --with deep-neural-rejection`, on the
last three activations. Prints a table in Markdown.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from demur import Classifier, data
from demur.commands.harden_settings import chosen_steps
from demur.commands.harden_steps import Given
from demur.data import ImageSet
from demur.defenses.rbf_svm import OneVsRestRBFSVM
from demur.hardware import keep_buffers
from demur.networks import enlarged_imagenet_network


def fit(root: str | None, count: int, size: int) -> None:
    """Fit in this process, and print seconds and peak memory in MB, before and after."""
    keep_buffers()
    train = data.load("cifar10", "train", root)
    assert isinstance(train, ImageSet)
    images = train.sample(count, 0)
    network = enlarged_imagenet_network("resnet18", 10, size=size)
    (step,) = chosen_steps(["deep-neural-rejection"], {"images": count})
    before = _peak()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        given = Given(
            Classifier(network, 10), images, images, None, 0, "cpu", Path(folder, "checkpoint")
        )
        made = step.make(given)
    seconds = time.perf_counter() - begin
    machines = [one for one in made.modules() if isinstance(one, OneVsRestRBFSVM)]
    features = [len(one.centre) for one in machines]
    print(f"{seconds:.0f} {before:.0f} {_peak():.0f} {'+'.join(map(str, features))}")


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root")
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.manual_seed(0)
    if given.one:
        fit(given.data_root, given.images[0], given.size)
        return
    print("| images | pixels | features | seconds | MB before | peak MB |")
    print("|---:|---:|---|---:|---:|---:|")
    for count in given.images:
        words = [sys.executable, __file__, "--one", "--images", str(count)]
        words += ["--size", str(given.size)]
        words += ["--data-root", given.data_root] if given.data_root else []
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        seconds, before, peak, features = done.stdout.split()
        print(
            f"| {count:,} | {given.size} | {features} | {seconds} | {before} | {peak} |", flush=True
        )


if __name__ == "__main__":
    main()
