"""Effect of the batch statistics on the clean figures of the background-class models.

    python benchmarks/batch_statistics.py [--profile desk] [--data-root DIR] [--out RUN_DIR]

Averaged batch statistics lag behind the weights, which Adadelta moves fast. For each split, this
script takes the model with the background class from the run in RUN_DIR, or trains it there. It
measures the model with the statistics kept in training, and with new statistics from 150 training
batches; the weights stay the same. Prints a table in Markdown.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from demur import outcomes
from demur.data import to_float
from demur.evaluation import Store
from demur.evaluation.profiles import load_profile
from demur.experiments import background_class
from demur.experiments.background_class import Profile, cells, prepare
from demur.experiments.cells import Run
from demur.hardware import keep_buffers, pick_device
from demur.metrics import Rates, rates
from demur.progress import job

BATCHES = 150


def renew_statistics(network: nn.Module, images: Tensor, batch_size: int) -> None:
    """Replace the batch statistics by their plain average over random batches of the images."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None  # a plain average
    device = next(network.parameters()).device
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    order = order[: BATCHES * batch_size]
    network.train()
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            network(to_float(images[chosen]).to(device))
    network.eval()


def line(number: int, name: str, found: Rates) -> str:
    """One row of the table, in percent."""
    shares = (found.accuracy, found.error_rate, found.rejection_rate)
    return f"| {number + 1} | {name} | {' | '.join(f'{100 * share:.2f}' for share in shares)} |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", default="desk")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/background-class-desk"))
    options = parser.parse_args()
    keep_buffers()
    profile: Profile = load_profile(background_class, options.profile)
    material = prepare(profile, options.data_root, seed=0)
    print("| split | batch statistics | correct % | wrong % | rejected % |\n|---|---|---|---|---|")
    with job("", 0) as silent:
        run = Run(Store(options.out / "cells"), pick_device().type, 0, silent)
        for number in range(profile.splits):
            fold = cells.split(profile, material, tuple(profile.background), run.seed, number)
            model = cells.train(profile, fold, True, run)
            print(line(number, "kept in training", rates(model.clean)))
            together = torch.cat([fold.train.images, fold.background])
            renew_statistics(model.classifier.module, together, profile.batch_size)
            found = outcomes(model.classifier, fold.test.to_float(), fold.test.labels)
            print(line(number, "taken anew", rates(found)))


if __name__ == "__main__":
    main()
