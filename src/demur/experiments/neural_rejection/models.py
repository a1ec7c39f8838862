"""The models of the rejection experiment: its images, the network, its machines, and both again after adversarial training."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from demur import data, seeds
from demur.attacks import PGD
from demur.classifier import Classifier, decide, outcomes, outcomes_of
from demur.data import ImageSet
from demur.defenses import AdversarialTraining, DeepNeuralRejection, NeuralRejection
from demur.errors import DemurError
from demur.evaluation import NodeResult
from demur.evaluation.results import Data
from demur.evaluation.store import Computed
from demur.experiments.cells import Run
from demur.experiments.neural_rejection.profile import Profile
from demur.files import digest
from demur.networks import dnr_cnn
from demur.studies.material import counted, first_at_hand, load_splits, passed_over
from demur.threat import ThreatModel
from demur.training import fit, rejection_sgd

DNN, NR, DNR = "DNN", "NR", "DNR"
RETRAINED, ADVERSARIAL = ", retrained", ", adversarially trained"
LAYERS = {"8": "layer 5", "12": "layer 7", "15": "layer 8"}
"""The paper's layers after their rectifiers, by module path: 12,544, 200 and 200 features."""


@dataclass(frozen=True)
class Material:
    """The images: to train the network and its machines on, to set thresholds on, and to attack. No image is in two of them."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet
    description: Data
    taken: str
    """A line that says which data set was taken."""
    embedded: bool

    @property
    def fingerprint(self) -> str:
        """A digest of all that is measured on."""
        return digest(*(part.fingerprint for part in (self.train, self.validation, self.test)))


@dataclass(frozen=True)
class Model:
    """A model that is attacked: its name, the network inside it, and the keys of the cells that made them."""

    name: str
    classifier: Classifier
    network: Classifier
    key: str
    network_key: str
    values: Mapping[str, Any]

    @property
    def rejects(self) -> bool:
        """Whether it has a reject column."""
        return isinstance(self.classifier, DeepNeuralRejection)


def prepare(profile: Profile, data_root: Path | None, seed: int) -> Material:
    """Load the images, and find what will not work with them before anything is written."""
    known = {status.name: status for status in data.list_datasets(data_root)}
    entry = first_at_hand(profile.data, known)
    images, test = load_splits(entry, data_root, seeds.derive(seed, "test"))
    if profile.train_images + profile.validation_images > len(images):
        wanted = (
            f"train_images {profile.train_images} and validation_images {profile.validation_images}"
        )
        raise DemurError(
            f"{wanted} are more than the {len(images)} images that {entry} has for them."
        )
    wanted_test = profile.attack.images * profile.attack.repeats
    if wanted_test > len(test):
        raise DemurError(
            f"attack.images times attack.repeats is {wanted_test}, but there are {len(test)} test images."
        )
    chosen = images.sample(
        profile.train_images + profile.validation_images, seeds.derive(seed, "chosen")
    )
    train, validation = chosen.split(
        profile.validation_images / len(chosen), seeds.derive(seed, "validation")
    )
    if profile.machines.per_class:
        train.balanced(profile.machines.per_class, seed)
    channels, height, width = train.images.shape[1:]
    if height != width:
        raise DemurError(
            f"the rejection network needs square images; those of {entry} are {height}x{width}."
        )
    dnr_cnn(train.num_classes, channels=channels, size=height)
    where = known[entry].where if entry in known else ""
    description = Data(
        images.name,
        images.fingerprint,
        len(images),
        images.num_classes,
        where not in ("", "embedded"),
    )
    taken = f"Data: {counted(images)}{passed_over(profile.data, entry, data_root)}."
    return Material(train, validation, test, description, taken, where == "embedded")


def build(profile: Profile, material: Material, run: Run) -> tuple[dict[str, Model], NodeResult]:
    """Train and fit all models; give them by name, and the first network's cell."""
    plain = _network(profile, material, run)
    network = _module(material, plain, run)
    models = [_plain(DNN, network, plain)]
    models += [_rejecting(kind, "", profile, material, network, plain, run) for kind in (NR, DNR)]
    for suffix, train in ((RETRAINED, _retrained), (ADVERSARIAL, _adversarial)):
        cell = train(profile, material, plain, run)
        harder = _module(material, cell, run)
        models += [
            _plain(DNN + suffix, harder, cell),
            _rejecting(DNR, suffix, profile, material, harder, cell, run),
        ]
    return {model.name: model for model in models}, plain


def _network(profile: Profile, material: Material, run: Run) -> NodeResult:
    """The network of Table 1, trained as Table 2 says."""

    def compute(checkpoint: Path) -> Computed:
        network = _new(material, run.seed)
        options: dict[str, Any] = {
            "epochs": profile.epochs,
            "batch_size": profile.batch_size,
            "optimizer": partial(rejection_sgd, rate=profile.learning_rate),
        }
        history = fit(
            network,
            material.train.images,
            material.train.labels,
            seed=run.seed,
            device=run.device,
            checkpoint=checkpoint,
            **options,
        )
        return _trained(
            network, material, {"loss": history[-1].loss, "accuracy": history[-1].accuracy}
        )

    settings = (profile.epochs, profile.batch_size, profile.learning_rate)
    config = {
        "cell": "network",
        "data": material.fingerprint,
        "settings": settings,
        "seed": run.seed,
    }
    return run.cell("train the network", config, compute, len(material.train) * profile.epochs)


def _retrained(profile: Profile, material: Material, plain: NodeResult, run: Run) -> NodeResult:
    """The paper's two steps: attack the network, add what broke it, train on."""
    settings = profile.retraining

    def compute(checkpoint: Path) -> Computed:
        network = _module(material, plain, run)
        defended = AdversarialTraining(
            network,
            material.train.num_classes,
            PGD(steps=settings.steps),
            ThreatModel("l2", settings.eps),
            prefit=True,
        )
        index = torch.randperm(
            len(material.train), generator=seeds.generator(run.seed, "retraining")
        )[: settings.attacked]
        options: dict[str, Any] = {
            "epochs": settings.epochs,
            "batch_size": profile.batch_size,
            "optimizer": _gentle,
        }
        defended.augment_and_finetune(
            material.train.images,
            material.train.labels,
            index,
            seed=run.seed,
            device=run.device,
            checkpoint=checkpoint,
            **options,
        )
        return _trained(network, material, {"added": defended.added_})

    config = {
        "cell": "retrained",
        "network": plain.key,
        "settings": settings.model_dump(),
        "batch": profile.batch_size,
        "seed": run.seed,
    }
    return run.cell(
        "retrain with attacked images", config, compute, len(material.train) * settings.epochs
    )


def _adversarial(profile: Profile, material: Material, plain: NodeResult, run: Run) -> NodeResult:
    """Adversarial training on every batch, from the trained network on."""
    settings = profile.adversarial

    def compute(checkpoint: Path) -> Computed:
        network = _module(material, plain, run)
        attack = PGD(steps=settings.steps, random_start=True)
        defended = AdversarialTraining(
            network, material.train.num_classes, attack, ThreatModel("l2", settings.eps)
        )
        options: dict[str, Any] = {
            "epochs": settings.epochs,
            "batch_size": profile.batch_size,
            "optimizer": _gentle,
        }
        defended.fit(
            material.train.images,
            material.train.labels,
            seed=run.seed,
            device=run.device,
            checkpoint=checkpoint,
            **options,
        )
        return _trained(network, material, {})

    config = {
        "cell": "adversarial",
        "network": plain.key,
        "settings": settings.model_dump(),
        "batch": profile.batch_size,
        "seed": run.seed,
    }
    return run.cell(
        "train on attacked batches",
        config,
        compute,
        2 * len(material.train) * settings.epochs * settings.steps,
    )


def _gentle(parameters: Any) -> torch.optim.Optimizer:
    """A trained network goes on from where it is: at the first rate, .1, it would begin anew."""
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def _rejecting(
    kind: str,
    suffix: str,
    profile: Profile,
    material: Material,
    network: nn.Module,
    cell: NodeResult,
    run: Run,
) -> Model:
    """Fit the machines of one kind of rejection on a network."""
    settings, classes = profile.machines, material.train.num_classes
    shared: dict[str, Any] = {
        "C": settings.C,
        "gamma": settings.gamma,
        "threshold": settings.threshold,
        "seed": run.seed,
    }
    if kind == NR:
        classifier: DeepNeuralRejection = NeuralRejection(
            network, classes, list(LAYERS)[-1], **shared
        )
    else:
        combining: dict[str, Any] = {
            "combiner_C": settings.combiner_C,
            "combiner_gamma": settings.combiner_gamma,
        }
        classifier = DeepNeuralRejection(network, classes, list(LAYERS), **shared, **combining)
    classifier = classifier.to(run.device)

    def compute(_: Path) -> Computed:
        train = (
            material.train
            if settings.per_class is None
            else material.train.balanced(settings.per_class, run.seed)
        )
        classifier.fit(
            train.images, train.labels, (material.validation.images, material.validation.labels)
        )
        scores, by_layer = _by_layer(classifier, material.test)
        values = {
            "gammas": classifier.gammas_,
            "support": [len(machine.support) for machine in classifier.machines_],
            "false_rejection": classifier.false_rejection_rate_,
            "by_layer": by_layer,
        }
        clean = outcomes_of(decide(scores, classes), material.test.labels)
        return values, {**classifier.state_dict(), "clean": clean}

    config = {
        "cell": "machines",
        "kind": kind,
        "network": cell.key,
        "settings": settings.model_dump(),
        "seed": run.seed,
    }
    machines = run.cell(
        f"machines of {kind}{suffix}",
        config,
        compute,
        20 * (settings.per_class or len(material.train)),
    )
    state = {name: tensor for name, tensor in machines.tensors.items() if name != "clean"}
    classifier.restore(state, machines.values["gammas"])
    plain = Classifier(network, classes).to(run.device).eval()
    values = {**machines.values, "clean": machines.tensors["clean"]}
    return Model(
        kind + suffix, classifier.to(run.device).eval(), plain, machines.key, cell.key, values
    )


def _by_layer(classifier: DeepNeuralRejection, images: ImageSet) -> tuple[Tensor, dict[str, float]]:
    """Scores (N, K + 1), and the accuracy of each layer's machines by themselves and of all together, nothing rejected (Figs. 7, 8)."""
    best: dict[str, list[Tensor]] = {name: [] for name in classifier.layers}

    def note(name: str) -> Any:
        return lambda machine, given, values: best[name].append(values.argmax(1).cpu())

    handles = [
        machine.register_forward_hook(note(name))
        for name, machine in zip(best, classifier.machines_, strict=True)
    ]
    try:
        scores = classifier.scores(images.to_float())
    finally:
        for handle in handles:
            handle.remove()
    chosen = {LAYERS[name]: torch.cat(found) for name, found in best.items()}
    chosen["combined"] = scores[:, : classifier.num_classes].argmax(1)
    return scores, {
        layer: float((found == images.labels).double().mean()) for layer, found in chosen.items()
    }


def _plain(name: str, network: nn.Module, cell: NodeResult) -> Model:
    classifier = Classifier(network, network[-1].out_features).eval()  # type: ignore[index]
    return Model(
        name,
        classifier,
        classifier,
        cell.key,
        cell.key,
        {**cell.values, "clean": cell.tensors["clean"]},
    )


def _new(material: Material, seed: int) -> nn.Sequential:
    channels, size = material.train.images.shape[1:3]
    return dnr_cnn(
        material.train.num_classes, channels=channels, size=size, seed=seeds.derive(seed, "weights")
    )


def _module(material: Material, cell: NodeResult, run: Run) -> nn.Sequential:
    """The network of a cell."""
    network = _new(material, run.seed)
    network.to(
        memory_format=torch.channels_last
    )  # as training leaves it: else a remembered model would round otherwise than a fresh one
    network.load_state_dict(
        {
            name.removeprefix("network."): value
            for name, value in cell.tensors.items()
            if name.startswith("network.")
        }
    )
    return network.to(run.device).eval()


def _trained(network: nn.Module, material: Material, values: dict[str, Any]) -> Computed:
    """What a cell keeps of a trained network: its weights, and what it makes of the clean images."""
    classifier = Classifier(network, material.train.num_classes)
    for part, images in (("train", material.train), ("test", material.test)):
        scores = classifier.scores(images.to_float())
        values[f"{part}_loss"] = float(nn.functional.cross_entropy(scores, images.labels))
        values[f"{part}_accuracy"] = float((scores.argmax(1) == images.labels).double().mean())
    tensors: dict[str, Tensor] = {
        f"network.{name}": value for name, value in network.state_dict().items()
    }
    return values, {
        **tensors,
        "clean": outcomes(classifier, material.test.to_float(), material.test.labels),
    }
