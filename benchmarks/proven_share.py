"""What limits the proven share: the certifier, or the training?

    OMP_NUM_THREADS=1 python benchmarks/proven_share.py --data-root ROOT [--profile proven]
        [--radius 0.15] [--images 1000] [--seed 0] [--store FOLDER] [--reuse-stale]

The network is that of a profile of the study `certified-rejection`: certified training on MNIST.
With the --store of a run of the study, it is not trained again. The first table has, for each
radius r, the test images with a right answer that intervals prove within r. With delta = r it is
the share of images that certified consistency answers correctly; with eps = r + delta it is the
share that is proven. The second part certifies the first images by each method, one after the
other, each on those that are left, and attacks the rest by PGD: what PGD breaks, no certifier can
prove. The same command goes on where it was stopped.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from demur import Classifier, ThreatModel
from demur.attacks import PGD
from demur.certificates.certify import proofs
from demur.certificates.problem import ALL_METHODS
from demur.commands.run import STUDIES
from demur.data import ImageSet
from demur.evaluation.engines import Local
from demur.evaluation.keys import Environment
from demur.evaluation.nodes import Train
from demur.evaluation.plan import execute
from demur.evaluation.profiles import load_profile
from demur.evaluation.store import Store
from demur.studies.certified_rejection.plan import _models, material

RADII = (0.1, 0.125, 0.15, 0.175, 0.2, 0.225, 0.25, 0.3)


def network(options: argparse.Namespace) -> tuple[Classifier, ImageSet]:
    """Train the network, or take it from the store."""
    profile = load_profile(STUDIES["certified-rejection"], options.profile)
    given = material(profile, options.data_root, options.seed)[1]
    node: Train = _models(profile, given, options.seed)["certified training"]
    outputs = execute(
        [node],
        Store(options.store),
        Local(),
        Environment.here("cpu"),
        reuse_stale=options.reuse_stale,
    )
    return outputs.model(node), given.test


def share(name: str, flags: Tensor) -> str:
    """Say a share of images in percent."""
    return f"{name} {100 * float(flags.double().mean()):.2f} %"


def by_radius(classifier: Classifier, test: ImageSet, right: Tensor) -> None:
    """Print what intervals prove of all test images."""
    images = test.to_float()
    print(share("clean: right", right), f"of {len(test)} images", flush=True)
    for radius in RADII:
        threat = ThreatModel("linf", radius)
        found = proofs(classifier, images, test.labels, threat, ("ibp",), right, 32)
        print(share(f"r = {radius:g}: right and proven", found.margin > 0), flush=True)


def by_method(
    classifier: Classifier, test: ImageSet, right: Tensor, radius: float, splits: int
) -> None:
    """Print what each method adds, and what PGD breaks of the rest."""
    images = test.to_float()
    threat = ThreatModel("linf", radius)
    left = right.clone()
    print(f"r = {radius:g}: {int(right.sum())} of {len(test)} images are right", flush=True)
    for method in ALL_METHODS:
        tried = int(left.sum())
        start = time.process_time()
        found = proofs(classifier, images, test.labels, threat, (method,), left, 32, splits)
        seconds = time.process_time() - start
        proven = left & (found.margin > 0)
        left &= ~proven
        print(f"  {method}: {int(proven.sum())} of {tried}, {seconds:.1f} s", flush=True)
    rest = test.subset(left.nonzero().flatten())
    result = PGD(steps=100, restarts=3)(classifier, rest.to_float(), rest.labels, threat)
    print(f"  PGD breaks {int(result.success.sum())} of the {len(rest)} others", flush=True)


def main() -> None:
    """Parse the options, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--profile", default="proven")
    parser.add_argument("--radius", type=float, default=0.15)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--splits", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", type=Path, default=Path("runs/demur-store"))
    parser.add_argument("--reuse-stale", action="store_true")
    options = parser.parse_args()
    classifier, test = network(options)
    right = classifier.predict(test.to_float()).cpu() == test.labels
    by_radius(classifier, test, right)
    first = torch.arange(min(options.images, len(test)))
    by_method(classifier, test.subset(first), right[first], options.radius, options.splits)


if __name__ == "__main__":
    main()
