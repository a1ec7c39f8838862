"""Train one model of localized training as the profiles `desk` and `cifar10` do, and attack it.

    python benchmarks/localized_models.py --data-root ROOT                    # MNIST, standard
    python benchmarks/localized_models.py --data-root ROOT --model background --box 12
    python benchmarks/localized_models.py --data-root ROOT --set CIFAR-10 --time 10

It prints the recipe, the correct answers of the clean test set, under the paper's attack and under
the strongest ensemble, each with its 95 % interval, and the seconds of the processor. The study
chooses the box on the natural model; here it is given. Results are kept in --store: a killed run
goes on. All is of one thread. With --time N, it prints the seconds of a step instead, of N
steps of each training and of an attack.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from demur import masks
from demur.attacks import Evade, Strongest
from demur.commands.run import STUDIES
from demur.evaluation.engines import Local
from demur.evaluation.keys import Environment
from demur.evaluation.nodes import Train
from demur.evaluation.on_images import Evaluate
from demur.evaluation.plan import execute
from demur.evaluation.profiles import load_profile
from demur.evaluation.scoring import TrainingInputs
from demur.evaluation.store import Store
from demur.evaluation.tables import outcome_shares
from demur.studies.localized_training.plan import _first, _loss_images, _trained
from demur.studies.localized_training.recipes import (
    AROUND,
    EVERYWHERE,
    MODELS,
    Stage,
    paper_attack,
    threats,
)
from demur.studies.material import gather_part

PROFILES = {"MNIST": "desk", "CIFAR-10": "cifar10"}


class Bench:
    """A set of the profile, its images, and what is computed of it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.store = Store(options.store)
        self.profile = load_profile(STUDIES["localized-training"], PROFILES[options.set])
        settings = next(one for one in self.profile.sets if one.name == options.set)
        self.part = gather_part(settings, self.profile.attack.images, options.data_root, 0)
        self.images = _first(_loss_images(self.part, 0), self.profile.attack.images)
        inside = masks.centre_box((self.part.size, self.part.size), options.box, options.box)
        self.allowed = threats(settings.eps, inside, self.images, 0)

    def model(self, kind: str) -> Train:
        """Give the node of one of the three models."""
        region = dict(zip(MODELS, (None, EVERYWHERE, AROUND), strict=True))[kind]
        return _trained(self.part, kind, self.allowed[region] if region else None, 0)

    def say(self, what: str, node: Train | Evaluate) -> None:
        """Compute a node, and print its correct answers."""
        start = time.process_time()
        outputs = execute([node], self.store, Local(), Environment.here("cpu"))
        seconds = f"{time.process_time() - start:.0f} s"
        if isinstance(node, Train):
            notes = [
                f"{name} {value:.1%}"
                for name, value in outputs.measurements()[["name", "value"]].rows()
            ]
            print(f"{what}: {', '.join(notes)}, {seconds}", flush=True)
            return
        share = outcome_shares(outputs.records([node]))["correct"]
        interval = f"{share.low:.1%} to {share.high:.1%}"
        print(f"{what}: {share.value:.2%} of {share.n} ({interval}), {seconds}", flush=True)

    def attack(self, kind: str) -> None:
        """Train a model, and attack it in both regions."""
        node, profile = self.model(kind), self.profile
        assert isinstance(node.recipe, Stage)
        print(replace(node.recipe, threat=None), flush=True)  # without the pixels of its mask
        self.say("training", node)
        self.say("clean", Evaluate(node, self.part.test, None))
        descent = paper_attack(
            profile.attack.steps, profile.attack.step_share, self.part.settings.eps, largest=False
        )
        ensemble = Strongest(**profile.strongest.model_dump(exclude={"images"}))
        few = _first(self.images, profile.strongest.images)
        for region in (EVERYWHERE, AROUND):
            threat = self.allowed[region]
            self.say(f"paper's attack, {region}", Evaluate(node, self.images, threat, descent))
            wrong = replace(threat, goal=Evade())
            self.say(f"strongest ensemble, {region}", Evaluate(node, few, wrong, ensemble))


def timed(bench: Bench, steps: int) -> None:
    """Print the seconds of a step of each training, and of an attack."""
    settings, part = bench.part.settings, bench.part
    few = part.train.subset(torch.arange(steps * settings.batch_size))
    for kind in MODELS:
        recipe = bench.model(kind).recipe
        assert isinstance(recipe, Stage)
        short = replace(recipe, steps=steps, held_out=None)
        with TemporaryDirectory() as folder:
            given = TrainingInputs(few, None, None, 0, "cpu", Path(folder, "checkpoint"))
            start = time.process_time()
            model = short.train(given)
            seconds = (time.process_time() - start) / steps
        print(f"{kind}: {seconds:.3f} s a step, {seconds * recipe.steps:.0f} s", flush=True)
    images = _first(bench.images, min(len(bench.images), 64))
    descent = paper_attack(steps, 0.1, settings.eps)
    start = time.process_time()
    descent(model, images.to_float(), images.labels, bench.allowed[EVERYWHERE])
    seconds = (time.process_time() - start) / (steps * len(images))
    print(f"attack: {1000 * seconds:.2f} ms an image and step", flush=True)


def main() -> None:
    """Parse the options, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--set", choices=PROFILES, default="MNIST")
    parser.add_argument("--model", choices=MODELS, default="standard")
    parser.add_argument("--box", type=int, default=12)
    parser.add_argument("--store", type=Path, default=Path("runs/demur-store"))
    parser.add_argument("--time", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(options)
    if options.time:
        timed(bench, options.time)
    else:
        bench.attack(options.model)


if __name__ == "__main__":
    main()
