"""Peak memory of an audit, for few and for many images of 32x32 pixels in files.

    python benchmarks/audit_memory.py [--images 1000 20000]

Each audit is a process of its own: profile quick, Linf 8/255, a small convolutional network, PNG
files in a folder by class. Prints a table in Markdown.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from torch import nn

import demur
from demur.hardware import keep_buffers


def write_images(folder: Path, count: int) -> None:
    """Write random images of ten classes."""
    draw = np.random.default_rng(0)
    for number in range(count):
        place = folder / str(number % 10)
        place.mkdir(exist_ok=True)
        pixels = draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.png")


def audit(folder: Path, out: Path) -> None:
    """Audit in this process, and print seconds and peak memory in MB."""
    keep_buffers()
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 15 * 15, 10)
    )
    preprocess = demur.classifier.Preprocess(size=(32, 32))
    model = demur.wrap(network, preprocess=preprocess)
    begin = time.perf_counter()
    demur.audit(model, folder, ["linf:8/255"], device="cpu", out=out)
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{seconds:.1f} {peak:.0f}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 20_000])
    parser.add_argument("--of", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.of:
        audit(asked.of / "images", asked.of / "audit")
        return
    print("| images | seconds | peak MB |\n|---:|---:|---:|")
    for count in asked.images:
        with TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "images").mkdir()
            write_images(folder / "images", count)
            words = [sys.executable, __file__, "--of", name]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            seconds, peak = done.stdout.split()
            print(f"| {count:,} | {seconds} | {peak} |")


if __name__ == "__main__":
    main()
