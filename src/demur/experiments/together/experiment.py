"""One network behind each paper's defence, and behind all of them at once: the same images, the same attackers, three outcomes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from demur import attacks, seeds
from demur.attacks import NEVER, AnyError, Evade, regions
from demur.classifier import Classifier, Outcome, outcomes
from demur.data import ImageSet, as_floats, embedded_backgrounds
from demur.defenses import AdversarialTraining, DeepNeuralRejection, GaussianSmoothing, LocalizedAdversarialTraining
from demur.errors import DemurError
from demur.evaluation import Cell, rates
from demur.evaluation.ledger import Computed
from demur.experiments.cells import Run, blind
from demur.experiments.material import Part, describe_parts, gather_part
from demur.experiments.pictures import describe, enlarged, in_turn, mixed
from demur.experiments.results import Curve, Data, Picture, Table, write_gallery
from demur.experiments.shares import ATTACKED_BY, front
from demur.experiments.together.profile import Profile
from demur.files import digest
from demur.networks import background_class_network, fit

TITLE = "All defences together"
SOURCE = "the four papers, each defence on the same network"
PLAIN, BACKGROUND, STANDARD, LOCALIZED = "no defence", "background class", "adversarial training", "localized adversarial training"
DEEP, SMOOTH = "deep neural rejection", "Gaussian smoothing"
COMBINED = "smoothing under deep neural rejection under background class"
MODELS = (PLAIN, BACKGROUND, LOCALIZED, DEEP, SMOOTH, COMBINED, STANDARD)
NOBODY, UNAWARE, AWARE, STRONGEST = ATTACKED_BY
LAYERS = ["7", "11"]  # of the background-class network: after the pooling's rectifier, and after the dense one's
SHOWN = 8


@dataclass(frozen=True)
class Material:
    """The images: to train on, to make strangers of, and to attack."""

    part: Part[Profile]
    validation: ImageSet
    description: Data
    taken: str

    @property
    def fingerprint(self) -> str:
        """A digest of all that is measured on."""
        return digest(self.part.fingerprint, self.validation.fingerprint)


class EitherRejects(nn.Module):
    """The classes' scores of one classifier, which rejects where it does, or another one with as many classes does."""

    def __init__(self, first: Classifier, second: Classifier) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, images: Tensor) -> Tensor:
        """Scores (N, K + 1): the reject score is ahead by what it is ahead in the one where it is ahead by more."""
        scores, other = self.first(images), self.second(images)
        ahead = other[:, -1] - other[:, :-1].amax(1)
        reject = torch.maximum(scores[:, -1], scores[:, :-1].amax(1) + ahead)
        return torch.cat([scores[:, :-1], reject[:, None]], 1)


def prepare(profile: Profile, data_root: Path | None, seed: int) -> Material:
    """Load the images, and find what will not work with them before anything is written."""
    part = gather_part(profile, profile.attack.images, data_root, seed)
    rest, validation = part.train.split(0.15, seeds.derive(seed, "validation"))
    rest.balanced(profile.per_class, seed)
    if profile.box > part.size:
        raise DemurError(f"a box of {profile.box} pixels a side does not lie in the images of {part.train.name}, {part.size}x{part.size}.")
    _network(rest, rest.num_classes, seed)
    part = Part(profile, rest, part.test, part.rooted, part.taken)
    return Material(part, validation, describe_parts([part], None), f"Data: {part.taken}.")


def work(profile: Profile, material: Material) -> float:
    """Units of work, about one image trained on once."""
    count, attack = len(material.part.train), profile.attack
    trained = count * (4 * profile.epochs + 2 * profile.attacked_epochs * (1 + profile.attack_steps))
    return trained + 2 * len(MODELS) * attack.images * (attack.steps + 6 * attack.ensemble_steps + attack.queries)


def carry_out(profile: Profile, material: Material, run: Run, out: Path) -> tuple[list[Table], list[Curve], list[str], list[str]]:
    """Run all cells; write the gallery; give the table, the summary and the warnings."""
    models = _models(profile, material, run)
    images = material.part.test.take(profile.attack.images, seeds.derive(run.seed, "attacked"))
    plain, key = models[PLAIN]
    found = {name: _attacked(profile, name, model, own, plain, key, images, run) for name, (model, own) in models.items()}
    write_gallery(out, *in_turn([_pictures(name, models[name][0], cell, images) for name, cell in found.items()], profile.gallery))
    return [_table(profile, found)], [], _summary(profile, found), _warnings(found)


def _network(images: ImageSet, outputs: int, seed: int) -> nn.Sequential:
    channels, size = images.images.shape[1], images.images.shape[2]
    return background_class_network(outputs, channels=channels, size=size, seed=seeds.derive(seed, "network"))


def _models(profile: Profile, material: Material, run: Run) -> dict[str, tuple[Classifier, str]]:
    """All models, each with the key of the cell that made it."""
    train, classes = material.part.train, material.part.train.num_classes
    strangers = embedded_backgrounds(train, profile.made_per_kind, seeds.derive(run.seed, "made"))
    together = train.images, train.labels
    mixed_in = strangers.images, strangers.labels.clamp(max=classes)  # whatever they are made of: one class more
    options: dict[str, Any] = {"epochs": profile.epochs, "batch_size": profile.batch_size, "seed": run.seed, "device": run.device}
    around = regions.outside(regions.centre_box((material.part.size, material.part.size), profile.box, profile.box))
    attack = partial(attacks.pgd, norm="linf", eps=profile.attack.eps, steps=profile.attack_steps, random_start=True)
    harder = {**options, "epochs": profile.attacked_epochs}

    def plain(network: nn.Module, checkpoint: Path) -> None:
        fit(network, *together, checkpoint=checkpoint, **options)

    def background(network: nn.Module, checkpoint: Path) -> None:
        fit(network, *mixed_in, checkpoint=checkpoint, **options)

    def standard(network: nn.Module, checkpoint: Path) -> None:
        AdversarialTraining(network, classes, attack).fit(*together, checkpoint=checkpoint, **harder)

    def localized(network: nn.Module, checkpoint: Path) -> None:
        LocalizedAdversarialTraining(network, classes, attack, region=around).fit(*together, checkpoint=checkpoint, **harder)

    def smooth(network: nn.Module, checkpoint: Path) -> None:
        GaussianSmoothing(network, classes, profile.sigma).fit(*together, checkpoint=checkpoint, **options)

    def smooth_background(network: nn.Module, checkpoint: Path) -> None:
        GaussianSmoothing(network, classes + 1, profile.sigma).fit(*mixed_in, checkpoint=checkpoint, **options)

    def trained(name: str, outputs: int, train_it: Callable[[nn.Module, Path], None]) -> tuple[nn.Module, str]:
        return _trained(profile, material, name, outputs, train_it, run)

    first, first_key = trained(PLAIN, classes, plain)
    smoothed, smoothed_key = trained(COMBINED, classes + 1, smooth_background)
    whole = GaussianSmoothing(smoothed, classes, profile.sigma)
    built: dict[str, tuple[nn.Module, str]] = {PLAIN: (first, first_key), BACKGROUND: trained(BACKGROUND, classes + 1, background)}
    built[LOCALIZED] = trained(LOCALIZED, classes, localized)
    built[DEEP] = _rejecting(profile, material, first, LAYERS, first_key, run)
    network, key = trained(SMOOTH, classes, smooth)
    built[SMOOTH] = GaussianSmoothing(network, classes, profile.sigma), key
    deep, key = _rejecting(profile, material, whole, [f"module.network.{layer}" for layer in LAYERS], smoothed_key, run)
    built[COMBINED] = Classifier(EitherRejects(deep, whole), classes), key
    built[STANDARD] = trained(STANDARD, classes, standard)
    ready = {name: (model if isinstance(model, Classifier) else Classifier(model, classes), key) for name, (model, key) in built.items()}
    return {name: (model.to(run.device).eval(), key) for name, (model, key) in ready.items()}


def _trained(
    profile: Profile, material: Material, name: str, outputs: int, train: Callable[[nn.Module, Path], None], run: Run
) -> tuple[nn.Module, str]:
    network = _network(material.part.train, outputs, run.seed)

    def compute(checkpoint: Path) -> Computed:
        train(network, checkpoint)
        return {}, dict(network.cpu().state_dict())

    config = {"cell": "together", "model": name, "data": material.fingerprint, "settings": _how(profile), "seed": run.seed}
    cell = run.cell(f"train: {name}", config, compute, len(material.part.train) * profile.epochs)
    network = _network(material.part.train, outputs, run.seed)  # anew: training leaves another layout in memory, which rounds otherwise
    network.load_state_dict(dict(cell.tensors))
    return network.eval(), cell.key


def _rejecting(
    profile: Profile, material: Material, network: nn.Module, layers: list[str], key: str, run: Run
) -> tuple[DeepNeuralRejection, str]:
    classes = material.part.train.num_classes
    options: dict[str, Any] = {"C": profile.C, "combiner_C": profile.C, "seed": run.seed}
    deep = DeepNeuralRejection(network, classes, layers, false_rejection_rate=profile.false_rejection, **options).to(run.device)

    def compute(_: Path) -> Computed:
        train = material.part.train.balanced(profile.per_class, run.seed)
        deep.fit(train.images, train.labels, (material.validation.images, material.validation.labels))
        return {"gammas": deep.gammas}, deep.state_dict()

    asked = {"per_class": profile.per_class, "C": profile.C, "rate": profile.false_rejection, "layers": layers}
    config = {"cell": "together, machines", "network": key, "data": material.fingerprint, "settings": asked, "seed": run.seed}
    cell = run.cell(f"machines, {DEEP if len(layers[0]) < 3 else COMBINED}", config, compute, 20 * profile.per_class)
    deep.restore(cell.tensors, cell.values["gammas"])
    return deep, cell.key


def _attacked(
    profile: Profile, name: str, model: Classifier, key: str, plain: Classifier, plain_key: str, images: ImageSet, run: Run
) -> Cell:
    """Outcomes (N,) by attacker; and the first images of who knows the defence, as 8 bits store them."""
    attack = profile.attack

    def compute(_: Path) -> Computed:
        clean, labels = images.floats(), images.labels
        descend = partial(attacks.pgd, norm="linf", eps=attack.eps, steps=attack.steps, seed=run.seed)
        sent = descend(plain, clean, labels, goal=AnyError("cross_entropy", confidence=NEVER)).attempts
        aware = descend(model, clean, labels, goal=Evade())
        strongest = attacks.strongest(
            model,
            clean,
            labels,
            norm="linf",
            eps=attack.eps,
            steps=attack.ensemble_steps,
            targets=attack.targets,
            queries=attack.queries,
            seed=run.seed,
        )
        found = {NOBODY: outcomes(model, clean, labels), UNAWARE: outcomes(model, sent, labels)}
        found[AWARE] = outcomes(model, aware.attempts, labels)
        found[STRONGEST] = torch.stack([found[UNAWARE], found[AWARE], outcomes(model, strongest.attempts, labels)]).amax(0)
        stored = attacks.round_towards(aware.attempts[:SHOWN], clean[:SHOWN])
        shown = {"images": stored, "stored_outcomes": outcomes(model, as_floats(stored), labels[:SHOWN])}
        costs = {kind: int(getattr(aware, kind).sum() + getattr(strongest, kind).sum()) for kind in ("forwards", "backwards", "flat")}
        return costs, {**found, **shown}

    config: dict[str, Any] = {"cell": "together, attacked", "model": key, "name": name, "plain": plain_key, "data": images.fingerprint}
    config |= {"settings": attack.model_dump(), "seed": run.seed}
    return run.cell(f"attack: {name}", config, compute, 2 * len(images) * (attack.steps + 6 * attack.ensemble_steps))


def _how(profile: Profile) -> dict[str, Any]:
    """What training depends on."""
    return {**profile.model_dump(mode="json", exclude={"gallery", "attack"}), "eps": profile.attack.eps}


def _table(profile: Profile, found: Mapping[str, Cell]) -> Table:
    note = (
        f"The same {profile.attack.images} test images for all, in Linf within {profile.attack.eps:g}. Who does not know the defence "
        f"attacks the "
        "network without one, to the surest error; who knows it attacks the whole, to be wrong and accepted; the strongest is "
        "`attacks.strongest`, and what these two found. Adversarial training is no defence of the papers': it is there to compare."
    )
    return front({name: {who: [rates(cell.tensors[who])] for who in ATTACKED_BY} for name, cell in found.items()}, note)


def _summary(profile: Profile, found: Mapping[str, Cell]) -> list[str]:
    sentences = []
    for name, cell in found.items():
        clean, attacked = rates(cell.tensors[NOBODY]), rates(cell.tensors[STRONGEST])
        sentences.append(
            f"{name}: {100 * clean.accuracy:.0f} % of the clean images correct and {100 * clean.rejection_rate:.0f} % rejected; under "
            f"the strongest "
            f"attacker, Linf within {profile.attack.eps:g}, {100 * attacked.error_rate:.0f} % wrong and accepted, "
            f"{100 * attacked.accuracy:.0f} % correct."
        )
    return sentences


def _warnings(found: Mapping[str, Cell]) -> list[str]:
    """Where not knowing the defence breaks more than knowing it (R19)."""
    lines = blind(found)
    for name, cell in found.items():
        unaware, aware = (int((cell.tensors[who] == Outcome.WRONG).sum()) for who in (UNAWARE, AWARE))
        if unaware > aware:
            lines.append(
                f"{name}: who does not know the defence breaks {unaware} images, one attack that knows it {aware}: that is too weak."
            )
    return lines


def _pictures(name: str, model: Classifier, cell: Cell, images: ImageSet) -> tuple[list[Picture], Tensor, Tensor]:
    index = torch.tensor(mixed(cell.tensors["stored_outcomes"], 0), dtype=torch.int64)
    clean, attacked = images.subset(index), cell.tensors["images"][index]
    pictures = list(describe(model, name, "PGD in Linf", AWARE, clean, attacked))
    return pictures, enlarged(clean.images), enlarged(attacked)


__all__ = ["SOURCE", "TITLE", "carry_out", "prepare", "work"]
