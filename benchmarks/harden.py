"""Which defence of `demur harden` helps which network: one table, one command.

    python benchmarks/harden.py --store DIR [--data-root DIR] [--networks mnist,cifar10,resnet18]
        [--defences NAME,NAME] [--images 200] [--learn 5000] [--machines 3000] [--profile quick]
        [--minutes M]

Three base networks: the CNN of the rejection paper, on 20,000 images of MNIST; a small ResNet on
CIFAR-10 (`demur.studies.image_networks.SmallResNet`); torchvision's ResNet-18 on CIFAR-10, enlarged
to 112 pixels, with a new last layer that learns from 10,000 images. On ResNet-18, adversarial
training changes all layers, and certified consistency is left out, because the enlargement has no
bounds. `--networks digits` is a short form on the embedded digits. `--networks photographs`
measures exports and the cost of inference of ResNet-18 on ImageNet's photographs (DIR/imagenet),
for defences that need no fine-tuning, and attacks nothing. Each defence learns from --learn
training images. One half of the test images sets the threshold of rejection, at 2 % false
rejections; the other half is reported on. A defence that does not reject gets a confidence
threshold too, so that all are compared at equal false rejection. The attack is the strongest
ensemble.

Models, records and measurements are kept in --store: the same command goes on after an
interruption, and --minutes starts no further piece of work after so many minutes. The table has
what is finished. Under attack, it has the 95 % interval and the difference from the confidence
threshold on the same images in points, with the p-value of McNemar's exact test (two-sided).
"""

import argparse
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import polars as pl
import torch

from demur import Classifier, ThreatModel, data, networks
from demur.attacks.strongest import PROFILES
from demur.commands.harden_settings import STEPS, chosen_steps
from demur.commands.harden_threshold import ThresholdRule
from demur.data import ImageSet, fitted, read_photos
from demur.evaluation.engines import Local
from demur.evaluation.keys import Environment, Keys
from demur.evaluation.nodes import Load, Measure, ModelNode, Node, Train
from demur.evaluation.on_images import Evaluate
from demur.evaluation.plan import Outputs, execute
from demur.evaluation.scoring import Recipe, Row
from demur.evaluation.store import Store
from demur.files import file_digest
from demur.hardware import keep_buffers
from demur.networks import weights
from demur.studies.enlarged_networks import HeadOnFeatures
from demur.studies.image_networks import SmallResNet
from harden_cells import attacked_cell, clean_cells, equal_cell, ratio_cell
from hardened import Hardened, PlainCnn, inference, parity

BASE: Final = "no defence"
BASELINE: Final = "confidence-threshold"
RATE: Final = 0.02
BLURS: Final = ("gaussian-blur", "median-blur")
FROZEN: Final = ("background-class", *BLURS)
ATTACKED: Final = ("adversarial-training", "localized-adversarial-training")


@dataclass(frozen=True)
class Network:
    """A base network, and how it is attacked.

    Parameters
    ----------
    data : str
    recipe : Recipe, optional
        Without it, the pretrained network is the base.
    eps : tuple of str
        The threats of the table.
    trained_at : str
        The threat of adversarial training.
    pretrained : str
        The ImageNet network that it begins with; then only the last layer learns.
    images : int, optional
        Training images of the base. Default: all.
    """

    data: str
    recipe: Recipe | None
    eps: tuple[str, ...]
    trained_at: str
    pretrained: str = ""
    images: int | None = None

    def settings(self, name: str, machines: int) -> dict[str, Any]:
        """Give the settings of a defence that differ from the defaults."""
        if "neural-rejection" in name:
            return {"images": machines}
        if name in ATTACKED:
            return {"threat": self.trained_at}
        return {"frozen": True} if self.pretrained and name in FROZEN else {}


CIFAR: Final = ("linf:2/255", "linf:8/255")
DIGITS: Final = ("linf:0.1", "linf:0.2")
HEAD: Final = HeadOnFeatures()
NETWORKS: Final[Mapping[str, Network]] = {
    "digits": Network("digits", PlainCnn(10), DIGITS, "linf:0.2"),
    "mnist": Network("mnist", PlainCnn(3), DIGITS, "linf:0.2", images=20_000),
    "cifar10": Network("cifar10", SmallResNet(), CIFAR, "linf:8/255"),
    "resnet18": Network("cifar10", HEAD, CIFAR, "linf:8/255", "resnet18", images=10_000),
}


@dataclass
class Table:
    """The nodes of one network, by defence."""

    name: str
    network: Network
    models: dict[str, ModelNode] = field(default_factory=dict)
    clean: dict[str, Evaluate] = field(default_factory=dict)
    attacked: dict[str, list[Evaluate]] = field(default_factory=dict)
    parity: dict[str, Measure] = field(default_factory=dict)
    inference: Measure | None = None

    def nodes(self) -> Iterator[Node]:
        """Give all nodes, in the order of work: the largest eps of all models comes first."""
        for name in self.models:
            yield self.clean[name]
            yield from self.attacked.get(name, [])[-1:]
            yield self.parity[name]
        if self.inference is not None:
            yield self.inference
        for name in self.models:
            yield from self.attacked.get(name, [])[:-1]


def planned(name: str, given: argparse.Namespace) -> Table:
    """Plan the work on one network."""
    network = NETWORKS[name]
    train, test = (data.load(network.data, split, given.data_root) for split in ("train", "test"))
    assert isinstance(train, ImageSet) and isinstance(test, ImageSet)
    report, held_out = test.split(0.5, given.seed)
    learn = train.sample(min(given.learn, len(train)), given.seed)
    start = None
    if network.pretrained:
        start = imagenet(network.pretrained, given.data_root, "ImageNet")
    taught = train if network.images is None else train.sample(network.images, given.seed)
    assert network.recipe is not None
    base = Train(network.recipe, taught, given.seed, base=start, name=BASE)
    found = Table(name, network, {BASE: base})
    for defence in given.defences:
        if network.pretrained and defence == "certified-consistency":
            continue  # the enlargement has no bounds
        found.models[defence] = hardened(defence, base, network, learn, held_out, given)
    attack = PROFILES[given.profile]
    images = report.sample(min(given.images, len(report)), given.seed)
    threats = [ThreatModel.parse(one) for one in network.eps]
    for defence, model in found.models.items():
        on = partial(Evaluate, model, seed=given.seed, base=base)
        found.clean[defence] = on(report, None)
        found.attacked[defence] = [
            on(images, threat, attack=attack, attacker="strongest") for threat in threats
        ]
        found.parity[defence] = Measure(parity, (report, model), name=f"{name}: {defence}")
    names = tuple(found.models)
    models = tuple(found.models.values())
    found.inference = Measure(inference, (names, report, *models), name=name)
    return found


def photographs(given: argparse.Namespace) -> Table:
    """Plan exports and timings on photographs: no attack, and no threshold for other images."""
    folder = Path(given.data_root, "imagenet", "photos")
    photos = [
        fitted(one, 256, 224) for one in read_photos(folder) if min(one.size) >= 224
    ]  # `fitted` refuses smaller ones
    labels = torch.tensor([-1 if one.label is None else one.label for one in photos])
    images = ImageSet(torch.stack([one.pixels for one in photos]), labels, networks.CLASSES)
    base = imagenet("resnet18", given.data_root, BASE)
    network = Network("photographs", None, (), "", "resnet18")
    found = Table("photographs", network, {BASE: base})
    for defence in given.defences:
        if defence in (BASELINE, *BLURS):
            settings = {"epochs": 0} if defence in BLURS else {}
            (step,) = chosen_steps([defence], settings)
            recipe = Hardened(step, ThresholdRule(RATE))
            found.models[defence] = Train(recipe, images, given.seed, images, base, name=defence)
    for defence, model in found.models.items():
        found.clean[defence] = Evaluate(model, images, None, batch_size=16)
        found.parity[defence] = Measure(parity, (images, model), name=f"photographs: {defence}")
    names = tuple(found.models)
    models = tuple(found.models.values())
    few = images.sample(32, given.seed)
    found.inference = Measure(inference, (names, few, *models), name="photographs")
    return found


def imagenet(name: str, root: str | None, label: str) -> Load:
    """Give the node of an ImageNet network."""
    fingerprint = file_digest(weights.wanted(name, root))
    return Load(partial(pretrained, name, root), fingerprint, name=label)


def pretrained(name: str, root: str | None) -> Classifier:
    """Load an ImageNet network."""
    return Classifier(networks.imagenet_network(name, root=root), 1000)


def hardened(
    defence: str,
    base: Train,
    network: Network,
    learn: ImageSet,
    held_out: ImageSet,
    given: argparse.Namespace,
) -> Train:
    """Plan a hardened model: where the defence does not reject, with a confidence threshold too."""
    names = [defence] if STEPS[defence].rejects else [defence, BASELINE]
    settings = {
        f"{defence}.{key}": value
        for key, value in network.settings(defence, given.machines).items()
    }
    model = base
    for place, step in enumerate(chosen_steps(names, settings), 1):
        rule = ThresholdRule(RATE) if place == len(names) else None
        label = f"{defence}, step {place}" if rule is None else defence
        model = Train(Hardened(step, rule), learn, given.seed, held_out, model, name=label)
    return model


def computed(nodes: Sequence[Node], given: argparse.Namespace) -> Outputs:
    """Compute the nodes one after the other, until the time is over; give those that are done."""
    store = Store(given.store)
    environment = Environment.here("cpu")
    end = time.monotonic() + 60 * given.minutes
    keys = Keys(environment)
    done = []
    for node in nodes:
        finished = Outputs(store, keys, (node,)).complete(node)
        if not finished and time.monotonic() > end:
            continue
        begin = time.monotonic()
        execute([node], store, Local(), environment, reuse_stale=given.reuse_stale)
        done.append(node)
        if not finished:
            print(f"{time.monotonic() - begin:8.1f} s  {node}", flush=True)
    return execute(done, store, Local(), environment, reuse_stale=given.reuse_stale)


def print_table(table: Table, outputs: Outputs, given: argparse.Namespace) -> None:
    """Print what is finished of a network."""

    def records(node: Evaluate) -> pl.DataFrame | None:
        return outputs.records([node]) if node in outputs.nodes else None

    def figures(node: Measure | None) -> dict[str, Row]:
        if node is None or node not in outputs.nodes:
            return {}
        return {row.name: row for row in node.rows(outputs.result(node))}

    cost = figures(table.inference)
    base = cost.get("base: ms for an image")
    threats = [f"wrong and accepted at {eps} %" for eps in table.network.eps]
    heads = ["defence", "correct %", "coverage %", "wrong and accepted %", *threats]
    heads += ["inference, times the base", "equal decisions: ONNX, .pt2"]
    print(f"\n### {table.name}: {table.network.recipe or table.network.pretrained}\n")
    print(f"| {' | '.join(heads)} |\n|---{'|---:' * (len(heads) - 1)}|")
    against = table.attacked.get(BASELINE, [])
    for name in table.models:
        clean = records(table.clean[name])
        if clean is None:
            continue
        cells = [name, *clean_cells(clean)]
        for place, node in enumerate(table.attacked.get(name, [])):
            found = records(node)
            compared = records(against[place]) if against and name != BASELINE else None
            cells.append("not run" if found is None else attacked_cell(found, compared))
        ratio = cost.get(name)
        cells.append("not run" if ratio is None else ratio_cell(ratio))
        equal = figures(table.parity[name])
        cells.append(", ".join(equal_cell(one) for key, one in equal.items() if "equal" in key))
        print(f"| {' | '.join(cells)} |")
    if base is not None and base.value is not None:
        print(f"\nThe base takes {base.value:.2f} ms of one processor for an image.")


def main() -> None:
    """Compute and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--data-root")
    parser.add_argument("--networks", default="mnist,cifar10,resnet18")
    parser.add_argument("--defences", default=",".join(STEPS))
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--learn", type=int, default=5000)
    parser.add_argument("--machines", type=int, default=3000)
    parser.add_argument("--profile", choices=list(PROFILES), default="quick")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--reuse-stale", action="store_true")
    given = parser.parse_args()
    given.defences = given.defences.split(",")
    keep_buffers()
    warnings.simplefilter("ignore")
    tables = [
        photographs(given) if name == "photographs" else planned(name, given)
        for name in given.networks.split(",")
    ]
    outputs = computed([node for table in tables for node in table.nodes()], given)
    for table in tables:
        print_table(table, outputs, given)


if __name__ == "__main__":
    main()
