"""Speed and memory of the blur filters, forward and backward, and of kornia's.

    python benchmarks/smoothing.py [--rounds 7] [--photographs 32]

All in one process and one run. In each round, every filter of demur and of kornia (the extra
`peers` installs it) filters the same batch and is differentiated, one after the other; the ratios
are of these pairs. Before that, the results are compared. Peak memory is measured in a separate
process for each filter, on a batch of photographs (299x299). Prints tables in Markdown.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import kornia.filters
import torch
from torch import Tensor

from demur.defenses import gaussian_blur, median_blur
from demur.hardware import keep_buffers, tuned

SIGMAS = (0.5, 1.0, 1.5, 2.0)
SIZES = (3, 5)


def radius(sigma: float) -> int:
    """Give the radius of the kernel of demur's Gaussian, in pixels."""
    return int(-(-3 * sigma // 1))


def theirs_gaussian(images: Tensor, sigma: float) -> Tensor:
    """Blur with kornia's Gaussian, with the same kernel and border."""
    size = 2 * radius(sigma) + 1
    return torch.as_tensor(
        kornia.filters.gaussian_blur2d(
            images, (size, size), (sigma, sigma), border_type="reflect", separable=True
        )
    )


def theirs_median(images: Tensor, size: int) -> Tensor:
    """Blur with kornia's median. It pads with zeros: only the inside is comparable."""
    return torch.as_tensor(kornia.filters.median_blur(images, (size, size)))


FILTERS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], int]] = {
    **{
        f"Gaussian, sigma {sigma:g}": (
            partial(gaussian_blur, sigma=sigma),
            partial(theirs_gaussian, sigma=sigma),
            0,
        )
        for sigma in SIGMAS
    },
    **{
        f"median, {size}x{size}": (
            partial(median_blur, size=size),
            partial(theirs_median, size=size),
            size // 2,
        )
        for size in SIZES
    },
}


def once(blur: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """Give the seconds of one pass forward and backward."""
    given = images.clone().requires_grad_()
    start = time.perf_counter()
    blur(given).sum().backward()  # type: ignore[no-untyped-call]
    return time.perf_counter() - start


def peak(name: str, whose: int, count: int) -> float:
    """Give the megabytes that one pass adds to the peak memory of this process.

    Linux only: the peak is reset after everything is imported.
    """
    images = torch.rand(count, 3, 299, 299)
    ours, theirs, _ = FILTERS[name]
    chosen = theirs if whose else ours
    with tuned():
        once(chosen, images[:1])  # loads what is loaded at first use
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        once(chosen, images)
    return resident("VmHWM") - before


def resident(line: str) -> float:
    """Give a line of this process's memory status, in megabytes."""
    (found,) = [
        text.split()
        for text in Path("/proc/self/status").read_text().splitlines()
        if text.startswith(f"{line}:")
    ]
    return int(found[1]) / 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--photographs", type=int, default=32)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        name, whose, count = given.one
        print(json.dumps(peak(name, int(whose), int(count))))
        return
    keep_buffers()
    print(
        f"{given.rounds} rounds, {torch.get_num_threads()} threads, float32; forward and backward\n"
    )
    print("| filter | batch | demur, ms (median) | kornia over demur (median, from, to) |")
    print("|---|---|---|---|")
    for shape in ((128, 1, 28, 28), (128, 3, 32, 32), (given.photographs, 3, 299, 299)):
        images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        for name, (ours, theirs, border) in FILTERS.items():
            inside = slice(border, -border or None)
            torch.testing.assert_close(
                ours(images)[..., inside, inside],
                theirs(images)[..., inside, inside],
                rtol=1e-4,
                atol=1e-5,
            )
            with tuned():
                once(ours, images)
                once(theirs, images)
                pairs = [(once(ours, images), once(theirs, images)) for _ in range(given.rounds)]
            ratios = sorted(their / our for our, their in pairs)
            label = "x".join(map(str, shape))
            milliseconds = 1000 * median(our for our, _ in pairs)
            spread = f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
            print(f"| {name} | {label} | {milliseconds:.1f} | {median(ratios):.2f} {spread} |")
    megabytes = given.photographs * 3 * 299 * 299 * 4 / 2**20
    print(f"\n{given.photographs} photographs of 3x299x299: {megabytes:.0f} MB\n")
    print("| filter | demur adds, MB | kornia adds, MB |\n|---|---|---|")
    for name in FILTERS:
        added = []
        for whose in (0, 1):
            command = [sys.executable, __file__, "--one", name, str(whose), str(given.photographs)]
            done = subprocess.run(command, capture_output=True, text=True)
            added.append(
                f"{json.loads(done.stdout.splitlines()[-1]):,.0f}"
                if done.returncode == 0
                else "failed"
            )
        print(f"| {name} | {' | '.join(added)} |")


if __name__ == "__main__":
    main()
