"""Overhead of the engine ray beside the local engine.

    python benchmarks/engine.py [--data-root DIR] [--images 2000] [--rounds 3]

The same plan is computed by both engines in turn, each time into an empty store: an evaluation of
clean images and PGD with 40 steps on a trained network, with one thread. Ray has one worker on this
machine. Its start is measured apart: a cluster runs already. Prints a table in Markdown.
"""

import argparse
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import ray
import torch

from demur import Classifier, ThreatModel, data
from demur.attacks import PGD
from demur.evaluation.engines import Engine, Local, Ray
from demur.evaluation.keys import Environment
from demur.evaluation.nodes import Load
from demur.evaluation.on_images import Evaluate
from demur.evaluation.plan import execute
from demur.evaluation.store import Store
from demur.hardware import keep_buffers
from demur.networks import background_class_network
from demur.training import fit


def nodes(count: int, root: str | None) -> list[Evaluate]:
    """Make the plan: the images are MNIST's, or the embedded digits several times."""
    known = {status.name: status for status in data.list_datasets(root)}
    name = "mnist" if known["mnist"].where else "digits"
    train = data.load(name, "train", root).sample(5000, seed=0)
    test = data.load(name, "test", root)
    shown = test.subset([place % len(test) for place in range(count)])
    network = background_class_network(10)
    fit(network, train.images, train.labels, epochs=2, batch_size=64)
    model = Load(lambda: Classifier(network, 10), "benchmark", name="plain")
    threat = ThreatModel("linf", 0.2)
    attack = PGD(steps=40, restarts=2)
    return [
        Evaluate(model, shown, None),
        Evaluate(model, shown, threat, attack, attacker="defence-aware", keep="stored"),
    ]


def seconds(plan: list[Evaluate], engine: Engine) -> float:
    """Compute the plan into an empty store."""
    with TemporaryDirectory() as folder:
        begin = time.perf_counter()
        execute(plan, Store(Path(folder)), engine, Environment.here("cpu"))
        return time.perf_counter() - begin


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    keep_buffers()
    torch.set_num_threads(1)
    plan = nodes(asked.images, asked.data_root)
    begin = time.perf_counter()
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    started = time.perf_counter() - begin
    here = Environment.here("cpu")
    first = seconds(plan[:1], Ray(here))  # the worker imports demur
    local, remote = [], []
    for _ in range(asked.rounds):
        local.append(seconds(plan, Local()))
        remote.append(seconds(plan, Ray(here)))
    ratios = [one / other for one, other in zip(remote, local, strict=True)]
    print(f"| {asked.images:,} images | seconds (median of {asked.rounds}) |\n|---|---:|")
    print(f"| local | {median(local):.1f} |")
    print(f"| ray, one worker | {median(remote):.1f} |")
    print(f"| start of Ray, first task | {started:.1f}, {first:.1f} |")
    print(f"\nratio ray / local: {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
