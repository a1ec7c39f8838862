"""Recipes and measurements of `harden.py`.

They lie in a file of their own: a change of the table does not make their results stale.
"""

import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from demur import Classifier, seeds
from demur.commands.harden_steps import Given, Step
from demur.commands.harden_threshold import ThresholdRule, set_threshold
from demur.data import ImageSet
from demur.errors import DemurError
from demur.evaluation.scoring import Row, TrainingInputs
from demur.loading.export import FORMATS, IMAGES, export
from demur.networks import dnr_cnn
from demur.training import fit, one_cycle_sgd

ROUNDS = 7
TIMED = 256
"""Images of each timing."""
AT_ONCE = 64


@dataclass(frozen=True)
class PlainCnn:
    """Train the network of the rejection paper with a one-cycle learning rate (a recipe)."""

    epochs: int = 2
    batch_size: int = 128
    learning_rate: float = 0.05

    def train(self, given: TrainingInputs) -> Classifier:
        """Train; see `demur.evaluation.scoring.Recipe`."""
        data = given.data
        channels, size, _ = data.image_shape
        network = dnr_cnn(
            data.num_classes,
            channels=channels,
            size=size,
            seed=seeds.derive(given.seed, "network"),
        )
        steps = self.epochs * (len(data) // self.batch_size)
        options = given.options(self.epochs, self.batch_size)
        options["optimizer"] = partial(one_cycle_sgd, steps=steps, rate=self.learning_rate)
        last = fit(network, data.images, data.labels, **options)[-1]
        given.notes["training: accuracy"] = last.accuracy
        return Classifier(network, data.num_classes)


@dataclass(frozen=True)
class Hardened:
    """Add a defence as `demur harden` does, and set the threshold if there is a rule (a recipe).

    The images to learn from are those of the node, the held-out ones its validation images.
    """

    step: Step
    rule: ThresholdRule | None = None

    def train(self, given: TrainingInputs) -> Classifier:
        """Add it; see `demur.evaluation.scoring.Recipe`."""
        held_out = given.validation
        assert given.base is not None and held_out is not None
        begin = time.process_time()
        made = self.step.make(
            Given(
                given.base.to(torch.device(given.device)),
                given.data,
                held_out,
                None,
                given.seed,
                given.device,
                given.checkpoint,
            )
        ).eval()
        made.scores(held_out.to_float(torch.arange(1)))  # whether it rejects is known from here on
        if self.rule is not None and made.rejects:
            set_threshold(made, held_out.images, held_out.labels, self.rule)
        given.notes["processor seconds"] = time.process_time() - begin
        return made


def inference(names: tuple[str, ...], images: ImageSet, *models: Classifier) -> list[Row]:
    """Time the models in turn, several rounds in one process; the first one is the base.

    Rows have the median of the ratios to the base in the same round, with the smallest and the
    largest one, and the base's milliseconds of one processor for an image.
    """
    batch = images.to_float(torch.arange(min(TIMED, len(images))))
    rounds: list[list[float]] = []
    for number in range(ROUNDS + 1):
        seconds = []
        for model in models:
            begin = time.process_time()  # of the processor: others may use the machine too
            model.scores(batch, AT_ONCE)
            seconds.append(time.process_time() - begin)
        if number:  # the first round warms up
            rounds.append(seconds)
    base = statistics.median(one[0] for one in rounds)
    rows = [Row("base: ms for an image", 1000 * base / len(batch), len(batch))]
    for place, name in enumerate(names):
        ratios = [one[place] / one[0] for one in rounds]
        rows.append(Row(name, statistics.median(ratios), ROUNDS, min(ratios), max(ratios)))
    return rows


def parity(images: ImageSet, model: Classifier) -> list[Row]:
    """Export a model in each format, and count the images with an equal decision.

    A graph with another decision is not written: the row then has no value.
    """
    some = images.to_float(torch.arange(min(IMAGES, len(images))))
    channels, height, width = images.image_shape
    rows = []
    for form in FORMATS:
        value: float | None = None
        difference: float | None = None
        with TemporaryDirectory() as folder:
            try:
                found = export(
                    model, Path(folder, f"model.{form}"), form, (channels, height, width), some
                )
                value = found.equal / found.n
                difference = found.difference
            except DemurError as error:
                print(f"{form}: {error}", flush=True)
        rows.append(Row(f"{form}: equal decisions", value, len(some)))
        rows.append(Row(f"{form}: largest difference", difference, len(some)))
    return rows
