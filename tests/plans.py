"""Small plans of the evaluation engine, for its tests; also run as a script that may be killed."""

import sys
from pathlib import Path

import torch

from demur import ThreatModel, data, masks
from demur.attacks import FGSM, PGD, RandomNoise
from demur.evaluation.engines import Local
from demur.evaluation.keys import Environment
from demur.evaluation.nodes import Measure, Train
from demur.evaluation.on_images import Evaluate
from demur.evaluation.plan import execute
from demur.evaluation.records import write_parquet
from demur.evaluation.store import Store
from recipes import Copy, TinyTraining, mean_margin

COSTS = ["seconds"]


def images(count=20):
    return data.load("digits", "test").subset(range(count))


def trained(count=100, seed=0, name="plain"):
    return Train(TinyTraining(), data.load("digits").subset(range(count)), seed, name=name)


def plan(count=20, steps=2, eps=0.1):
    """A model, its copy, three attacks and a measurement."""
    model = trained()
    copied = Train(Copy(), model.data, 0, base=model, name="copy")
    shown = images(count)
    threat = ThreatModel("linf", eps, mask=masks.centre_box((28, 28), 20, 20))
    clean = Evaluate(model, shown, None)
    return [
        clean,
        Evaluate(model, shown, threat, PGD(steps=steps), attacker="defence-aware", keep="stored"),
        Evaluate(model, shown, threat, FGSM(), attacker="defence-aware"),
        Evaluate(model, shown, threat, RandomNoise(3), attacker="defence-aware"),
        Evaluate(
            model, shown, threat, PGD(steps=steps), through=copied, attacker="defence-unaware"
        ),
        Measure(mean_margin, (clean,), name="margin"),
    ]


def run(folder, nodes=None, engine=None, **options):
    environment = Environment.here("cpu")
    engine = engine or Local()
    return execute(nodes or plan(), Store(Path(folder)), engine, environment, **options)


def comparable(records):
    """The records without what a computation cost."""
    return records.drop(COSTS)


if __name__ == "__main__":
    torch.set_num_threads(1)
    outputs = run(sys.argv[1], plan(count=int(sys.argv[3])))
    write_parquet(comparable(outputs.records()), Path(sys.argv[2]))
