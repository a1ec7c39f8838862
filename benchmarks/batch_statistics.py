"""Effect of the batch statistics on the clean figures of the background-class models.

    python benchmarks/batch_statistics.py [--profile desk] [--data-root DIR] [--store DIR]

Averaged batch statistics lag behind the weights, which Adadelta moves fast. For each split, this
script takes the model with the background class from the store of a run, or trains it. It
measures the model with the statistics kept in training, and with new statistics from 150 training
batches; the weights stay the same. Prints a table in Markdown.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from demur import outcomes, seeds
from demur.data import to_float
from demur.evaluation import Store
from demur.evaluation.engines import Local
from demur.evaluation.keys import Environment
from demur.evaluation.nodes import Train
from demur.evaluation.plan import execute
from demur.evaluation.profiles import load_profile
from demur.hardware import keep_buffers, pick_device
from demur.metrics import Rates, rates
from demur.studies import background_class
from demur.studies.background_class.material import gather
from demur.studies.background_class.recipes import Split, Training

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
    parser.add_argument("--store", type=Path, default=Path("runs/demur-store"))
    options = parser.parse_args()
    keep_buffers()
    profile: background_class.Profile = load_profile(background_class, options.profile)
    material = gather(profile, options.data_root, 0)
    kept = tuple(profile.background)
    any_split = Split(material.keys, kept, profile.held_out, 0, profile.background_share)
    numbers = range(profile.splits)
    splits = [replace(any_split, seed=seeds.derive(0, "split", number)) for number in numbers]
    models = [
        Train(Training(profile.epochs, profile.batch_size, split), material.images, split.seed)
        for split in splits
    ]
    device = pick_device()
    outputs = execute(models, Store(options.store), Local(), Environment.here(device.type))
    print("| split | batch statistics | correct % | wrong % | rejected % |\n|---|---|---|---|---|")
    for number, (split, node) in enumerate(zip(splits, models, strict=True)):
        model = outputs.model(node).to(device)
        train, test, background, _ = split.parts(material.images)
        found = rates(outcomes(model, test.to_float(), test.labels))
        print(line(number, "kept in training", found))
        together = torch.cat([train.images, background])
        renew_statistics(model.module, together, profile.batch_size)
        print(line(number, "taken anew", rates(outcomes(model, test.to_float(), test.labels))))


if __name__ == "__main__":
    main()
