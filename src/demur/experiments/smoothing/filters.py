"""Small networks behind each filter, trained, and attacked with and without knowledge of the filter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from demur import attacks, seeds
from demur.attacks import BPDA, PGD, AnyError, NormalizedGradient, Strongest, Target
from demur.classifier import Classifier, Outcome, outcomes
from demur.data import ImageSet, to_float
from demur.defenses import GaussianBlur, MedianBlur
from demur.evaluation import NodeResult
from demur.evaluation.store import Computed
from demur.experiments.cells import Run, passes
from demur.experiments.smoothing.profile import Profile, SetProfile
from demur.networks import background_class_network
from demur.studies.material import Part, in_random_order
from demur.threat import ThreatModel
from demur.training import fit

NONE = "no filter"
IGNORES, THROUGH, IDENTITY, BOX = (
    "defence-unaware",
    "through the filter",
    "BPDA, identity",
    "BPDA, box",
)
SHOWN = 12  # attacked images of each model that are kept for the gallery


@dataclass(frozen=True)
class Model:
    """A network behind a filter: its name, the whole, what is behind the filter, and the key of the cell that made it."""

    name: str
    whole: Classifier
    network: nn.Module
    key: str

    @property
    def filter(self) -> nn.Module | None:
        """The filter; None where there is none."""
        return self.whole.filter if isinstance(self.whole, GaussianBlur | MedianBlur) else None


@dataclass(frozen=True)
class SetFound:
    """What was found on one set: the models by name, and of each the clean outcomes, the targeted attack, and the attackers at eps."""

    part: Part[SetProfile]
    attacked: ImageSet
    models: dict[str, Model]
    clean: dict[str, NodeResult]
    targeted: dict[str, NodeResult]
    attackers: dict[tuple[str, str], NodeResult]
    strongest: dict[str, NodeResult]

    def worst(self, model: str) -> Tensor:
        """Outcomes (n,) of the images that meet all attackers: image by image the worst."""
        strongest = self.strongest[model].tensors["outcomes"]
        every = [
            cell.tensors["outcomes"][: len(strongest)]
            for (name, _), cell in self.attackers.items()
            if name == model
        ]
        return torch.stack([strongest, *every]).amax(0)


def carry_out_set(profile: Profile, part: Part[SetProfile], run: Run) -> SetFound:
    """Train a network behind each filter, and attack them all."""
    images = in_random_order(
        part.test.sample(profile.attack.images, seeds.derive(run.seed, "attacked")), run.seed
    )
    models = {
        model.name: model
        for model in (_trained(part, name, run) for name in filters(part.settings))
    }
    clean, targeted, attackers, strongest = {}, {}, {}, {}
    for name, model in models.items():
        clean[name] = _clean_cell(part, model, run)
        targeted[name] = _targeted_cell(profile, part, model, images, run)
        for attacker in attackers_of(model):
            attackers[name, attacker] = _attacker_cell(profile, part, model, attacker, images, run)
        strongest[name] = _strongest_cell(profile, part, model, images, run)
    return SetFound(part, images, models, clean, targeted, attackers, strongest)


def work(profile: Profile, part: Part[SetProfile]) -> float:
    """Units of work, about one image trained on once."""
    count = len(filters(part.settings))
    attacked = profile.attack.images * (0.7 * profile.attack.steps * 3 + 20)
    return count * (
        len(part.train) * part.settings.epochs
        + attacked
        + 0.7 * profile.strongest.images * profile.strongest.passes
    )


def filters(settings: SetProfile) -> dict[str, tuple[str, float]]:
    """Names of all filters of a set, with their kind and width; the first is none."""
    smooth = {f"Gaussian, sigma {sigma:g}": ("gaussian", sigma) for sigma in settings.gaussian}
    return {
        NONE: ("", 0.0),
        **smooth,
        **{f"median, {size}x{size}": ("median", float(size)) for size in settings.median},
    }


def behind(kind: str, width: float, network: nn.Module, classes: int) -> Classifier:
    """A classifier with that filter in front of the network."""
    if kind == "gaussian":
        return GaussianBlur(network, classes, width)
    return (
        MedianBlur(network, classes, int(width))
        if kind == "median"
        else Classifier(network, classes)
    )


def attackers_of(model: Model) -> tuple[str, ...]:
    """The attackers of that model at a fixed eps."""
    if model.filter is None:
        return (THROUGH,)
    return (
        (IGNORES, THROUGH, IDENTITY, BOX)
        if isinstance(model.whole, MedianBlur)
        else (IGNORES, THROUGH, IDENTITY)
    )


def new_network(images: ImageSet, seed: int) -> nn.Module:
    """The network of a set, untrained: the one of the background-class paper. Raises: DemurError if the images do not fit it."""
    channels, size = images.images.shape[1], images.images.shape[2]
    return background_class_network(
        images.num_classes, channels=channels, size=size, seed=seeds.derive(seed, "network")
    )


def _trained(part: Part[SetProfile], name: str, run: Run) -> Model:
    """A network that has met filtered images only (sec. 3)."""
    settings, (kind, width) = part.settings, filters(part.settings)[name]
    network = new_network(part.train, run.seed)
    whole = behind(kind, width, network, part.train.num_classes)

    def compute(checkpoint: Path) -> Computed:
        options: dict[str, Any] = {
            "epochs": settings.epochs,
            "batch_size": settings.batch_size,
            "seed": run.seed,
            "device": run.device,
        }
        history = fit(
            whole.module, part.train.images, part.train.labels, checkpoint=checkpoint, **options
        )
        return {"loss": history[-1].loss, "accuracy": history[-1].accuracy}, dict(
            network.cpu().state_dict()
        )

    config = {
        "cell": "smoothed",
        "filter": (kind, width),
        "data": part.train.fingerprint,
        "seed": run.seed,
    }
    config |= {"epochs": settings.epochs, "batch_size": settings.batch_size}
    cell = run.cell(
        f"{settings.name}: train, {name}", config, compute, len(part.train) * settings.epochs
    )
    network = new_network(
        part.train, run.seed
    )  # anew: training leaves another layout in memory, which rounds otherwise
    network.load_state_dict(dict(cell.tensors))
    whole = behind(kind, width, network, part.train.num_classes)
    return Model(name, whole.to(run.device).eval(), network.to(run.device).eval(), cell.key)


def _clean_cell(part: Part[SetProfile], model: Model, run: Run) -> NodeResult:
    """All test images as they are. outcomes: (N,)."""

    def compute(_: Path) -> Computed:
        return {}, {"outcomes": outcomes(model.whole, part.test.to_float(), part.test.labels)}

    config = {"cell": "smoothed clean", "model": model.key, "data": part.test.fingerprint}
    return run.cell(f"{part.settings.name}: clean images, {model.name}", config, compute, 0)


def _targeted_cell(
    profile: Profile, part: Part[SetProfile], model: Model, images: ImageSet, run: Run
) -> NodeResult:
    """The paper's attack, towards a random other class. success, distance, steps (N,), the first images as 8 bits store them."""
    attack = profile.attack

    def compute(_: Path) -> Computed:
        clean, labels = images.to_float(), images.labels
        threat = ThreatModel("l2", goal=Target(other_classes(images, run.seed)))
        step = NormalizedGradient(step_size=attack.step_size, steps=attack.targeted_steps)
        result = step(model.whole, clean, labels, threat)
        stored = attacks.quantize_towards(result.candidates[:SHOWN], clean[:SHOWN])
        shown = {
            "images": stored,
            "stored_outcomes": outcomes(model.whole, to_float(stored), labels[:SHOWN]),
        }
        return passes(result), {
            "success": result.success,
            "distance": result.distance,
            "steps": result.backwards,
            **shown,
        }

    settings = attack.model_dump(include={"step_size", "targeted_steps"})
    config = _config("smoothed targeted", model, images, settings, run)
    return run.cell(
        f"{part.settings.name}: targeted, {model.name}", config, compute, 20 * len(images)
    )


def _attacker_cell(
    profile: Profile,
    part: Part[SetProfile],
    model: Model,
    attacker: str,
    images: ImageSet,
    run: Run,
) -> NodeResult:
    """One attacker at the set's eps. outcomes: (N,), always of the whole classifier."""
    steps, eps = profile.attack.steps, part.settings.eps

    def compute(_: Path) -> Computed:
        clean, labels = images.to_float(), images.labels
        seen = attacked_through(model, attacker, images.num_classes)
        attack = PGD(steps=steps)
        threat = ThreatModel("linf", eps)
        if attacker == IGNORES:
            # This attacker cannot query the filtered model, so it maximises the confidence of the error.
            attack = replace(attack, loss="cross_entropy", keep_maximizing=True)
            threat = replace(threat, goal=AnyError())
        result = attack(seen, clean, labels, threat, seed=run.seed)
        return passes(result), {"outcomes": outcomes(model.whole, result.candidates, labels)}

    config = _config(
        "smoothed attacker", model, images, {"attacker": attacker, "steps": steps, "eps": eps}, run
    )
    return run.cell(
        f"{part.settings.name}: {attacker}, {model.name}",
        config,
        compute,
        0.7 * steps * len(images),
    )


def attacked_through(model: Model, attacker: str, classes: int) -> Classifier:
    """What an attacker differentiates: the network alone, the whole, or the whole with another gradient for the filter."""
    smooth = model.filter
    if smooth is None or attacker == THROUGH:
        return model.whole
    if attacker == IGNORES:
        return Classifier(model.network, classes).eval()
    reach = int(getattr(smooth, "size", 3))
    box = nn.AvgPool2d(reach, stride=1, padding=reach // 2, count_include_pad=False)
    return Classifier(
        nn.Sequential(BPDA(smooth, box if attacker == BOX else None), model.network),
        classes,
    ).eval()


def _strongest_cell(
    profile: Profile, part: Part[SetProfile], model: Model, images: ImageSet, run: Run
) -> NodeResult:
    """The strongest ensemble through the filter, on the first attacked images. outcomes: (n,)."""
    strongest, eps = profile.strongest, part.settings.eps
    few = images.subset(torch.arange(strongest.images))

    def compute(_: Path) -> Computed:
        attack = Strongest(**strongest.model_dump(exclude={"images"}))
        threat = ThreatModel("linf", eps)
        result = attack(model.whole, few.to_float(), few.labels, threat, seed=run.seed)
        return passes(result), {"outcomes": outcomes(model.whole, result.candidates, few.labels)}

    config = _config("smoothed strongest", model, few, {**strongest.model_dump(), "eps": eps}, run)
    return run.cell(
        f"{part.settings.name}: strongest ensemble, {model.name}",
        config,
        compute,
        0.7 * profile.strongest.images * profile.strongest.passes,
    )


def other_classes(images: ImageSet, seed: int) -> Tensor:
    """A class (N,) for each image that is not its own, drawn at random by image."""
    return others(seeds.image_keys(images.to_float()), images.labels, images.num_classes, seed)


def others(keys: Sequence[int], labels: Tensor, classes: int, seed: int) -> Tensor:
    """A class for each label (N,) that is another one, drawn by key."""
    return (
        labels + 1 + (seeds.uniform(keys, (), seed, "targets") * (classes - 1)).long()
    ) % classes


def broken_alone(found: SetFound, model: str, attacker: str) -> int:
    """How many images that attacker breaks that differentiating through the filter does not (R24)."""
    through = found.attackers[model, THROUGH].tensors["outcomes"]
    return int(
        (
            (found.attackers[model, attacker].tensors["outcomes"] == Outcome.WRONG)
            & (through != Outcome.WRONG)
        ).sum()
    )


def _config(
    cell: str, model: Model, images: ImageSet, settings: Mapping[str, Any], run: Run
) -> dict[str, Any]:
    return {
        "cell": cell,
        "model": model.key,
        "data": images.fingerprint,
        "settings": dict(settings),
        "seed": run.seed,
    }
