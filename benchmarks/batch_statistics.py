"""What the batch statistics do to the clean figures of the background-class models: those kept in training, and those taken anew.

    python benchmarks/batch_statistics.py [--profile desk] [--data-root DIR] [--out RUN_DIR]

Averaged statistics lag behind the weights, which Adadelta moves fast. For each split's model with the background class (trained
by, or taken from, the run in RUN_DIR), the statistics are taken anew from 150 training batches without touching a weight.
Prints a table in Markdown.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from demur import outcomes
from demur.data import as_floats
from demur.evaluation import Ledger, Rates, rates
from demur.experiments.background_class import Profile, cells, prepare
from demur.experiments.cells import Run
from demur.experiments.runner import load_profile
from demur.hardware import pick_device
from demur.progress import job

BATCHES = 150


def renewed(network: nn.Module, images: torch.Tensor, batch_size: int) -> None:
    """Take the batch statistics anew: their plain average over random batches of the training images."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None  # a plain average
    device = next(network.parameters()).device
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[: BATCHES * batch_size]
    network.train()
    with torch.no_grad():
        for chosen in torch.split(order, batch_size):
            network(as_floats(images[chosen]).to(device))
    network.eval()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="desk")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/background-class-desk"))
    given = parser.parse_args()
    profile: Profile = load_profile("background-class", given.profile)
    material = prepare(profile, given.data_root, seed=0)

    def line(name: str, found: Rates) -> None:
        print(f"| {number + 1} | {name} | {100 * found.accuracy:.2f} | {100 * found.error_rate:.2f} | {100 * found.rejection_rate:.2f} |")

    print("| split | batch statistics | correct % | wrong % | rejected % |\n|---|---|---|---|---|")
    with job("", 0) as silent:
        run = Run(Ledger(given.out / "cells"), pick_device().type, 0, silent)
        for number in range(profile.splits):
            fold = cells.split(profile, material, tuple(profile.background), run.seed, number)
            model = cells.train(profile, fold, True, run)
            line("kept in training", rates(model.clean))
            renewed(model.classifier.module, torch.cat([fold.train.images, fold.background]), profile.batch_size)
            line("taken anew", rates(outcomes(model.classifier, fold.test.floats(), fold.test.labels)))


if __name__ == "__main__":
    main()
