"""The small networks of the localized experiment: trained in three ways and attacked in each region."""

import math
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from demur import attacks, masks, seeds
from demur.attacks import PGD, AnyError, AttackResult, Strongest
from demur.classifier import Classifier, Outcome, outcomes
from demur.data import ImageSet, to_float
from demur.defenses import AdversarialTraining
from demur.evaluation import NodeResult
from demur.evaluation.store import Computed
from demur.experiments.cells import Run, passes
from demur.experiments.localized_training.profile import Profile, SetProfile
from demur.files import replacing
from demur.networks import localized_network, wide_resnet
from demur.studies.material import Part, in_random_order
from demur.threat import ThreatModel
from demur.training import Epoch, fit, stepwise_sgd

NATURAL, STANDARD, BACKGROUND = "natural", "standard", "background"
MODELS = (NATURAL, STANDARD, BACKGROUND)
EVERYWHERE, AROUND, OBJECT, RANDOM = (
    "everywhere",
    "background",
    "object only",
    "random pixels, as many as background",
)
REGIONS = (EVERYWHERE, AROUND, OBJECT, RANDOM)
SHOWN = 16  # attacked images of each model that are kept for the gallery
RETAINED = {"MNIST": 0.08 / 99.19, "CIFAR-10": 59.26 / 95.17}
"""Accuracy under the attack on the background over clean accuracy, of the paper's natural models (sec. 1.1): what its box is known by."""


@dataclass(frozen=True)
class Model:
    """A trained model, and the key of the cell that made it."""

    name: str
    classifier: Classifier
    key: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class SetFound:
    """What was found on one set: how the box was chosen, and of each model the cells by region."""

    part: Part[SetProfile]
    calibration: NodeResult
    box: int
    attacked: ImageSet
    models: dict[str, Model]
    clean: dict[str, NodeResult]
    pgd: dict[tuple[str, str], NodeResult]
    strongest: dict[tuple[str, str], NodeResult]
    curve: dict[tuple[str, str], NodeResult]


def carry_out_set(profile: Profile, part: Part[SetProfile], run: Run) -> SetFound:
    """Train the three models of a set, choose the box on the natural one, and attack them all."""
    attacked = in_random_order(
        part.test.sample(profile.attack.images, seeds.derive(run.seed, "attacked")), run.seed
    )
    natural = _trained(part, NATURAL, None, run)
    calibration = _calibration_cell(profile, part, natural, attacked, run)
    box = calibration.values["box"]
    models = {
        NATURAL: natural,
        STANDARD: _trained(part, STANDARD, None, run),
        BACKGROUND: _trained(part, BACKGROUND, box, run),
    }
    clean, pgd, strongest, curve = {}, {}, {}, {}
    for name, model in models.items():
        clean[name] = _clean_cell(part, model, run)
        for region in REGIONS:
            pgd[name, region] = _pgd_cell(profile, part, model, region, box, attacked, run)
        for region in (EVERYWHERE, AROUND):
            strongest[name, region] = _strongest_cell(
                profile, part, model, region, box, attacked, run
            )
            curve[name, region] = _curve_cell(profile, part, model, region, box, attacked, run)
    return SetFound(part, calibration, box, attacked, models, clean, pgd, strongest, curve)


def work(profile: Profile, part: Part[SetProfile]) -> float:
    """Units of work, about one image trained on once."""
    settings, attack = part.settings, profile.attack
    trained = settings.steps * settings.batch_size * (3 + 2 * 0.7 * settings.attack_steps)
    passes = attack.steps * (
        len(settings.boxes) * attack.calibration_images
        + 3 * (4 + 2 * len(attack.curve)) * attack.images
    )
    return trained + 0.7 * passes + 6 * 0.7 * profile.strongest.images * profile.strongest.passes


def new_network(settings: SetProfile, images: ImageSet, seed: int) -> nn.Module:
    """The network of a set, untrained. Raises: DemurError if the images do not fit it."""
    build = wide_resnet if settings.network == "wide" else localized_network
    return build(
        images.num_classes,
        channels=images.images.shape[1],
        size=images.images.shape[2],
        seed=seeds.derive(seed, "network"),
    )


def mask_of(region: str, box: int, images: Tensor, seed: int) -> Tensor | None:
    """Give the mask of a region, where a centre box of that side is the object."""
    inside = masks.centre_box((images.shape[-2], images.shape[-1]), box, box)
    if region == RANDOM:
        return masks.same_area(masks.outside(inside), images, seed)
    return {EVERYWHERE: None, AROUND: masks.outside(inside), OBJECT: inside}[region]


def _trained(part: Part[SetProfile], kind: str, box: int | None, run: Run) -> Model:
    """One of the three models, trained as sec. 5 says: the same steps, on other batches."""
    settings, classes = part.settings, part.train.num_classes
    network = new_network(settings, part.train, run.seed)

    def compute(checkpoint: Path) -> Computed:
        options: dict[str, Any] = {"batch_size": settings.batch_size, "device": run.device}
        history: list[Epoch] = []
        ended = checkpoint.with_suffix(
            ".stage"
        )  # where the last whole stage is kept, until the cell is
        first = _resumed(network, ended)
        for stage, (factor, index, epochs) in enumerate(
            _stages(settings, kind, len(part.train), run.seed)
        ):
            if stage < first:
                continue
            if stage:
                with replacing(ended) as partial_file:
                    torch.save({"stage": stage, "network": network.state_dict()}, partial_file)
            optimizer = _optimizer(settings, epochs * (len(index) // settings.batch_size))
            options |= {
                "epochs": epochs,
                "seed": seeds.derive(run.seed, "stage", stage),
                "checkpoint": checkpoint,
                "optimizer": optimizer,
            }
            images, labels = part.train.images[index], part.train.labels[index]
            if kind == NATURAL:
                history = fit(network, images, labels, **options)
                continue
            attack = PGD(
                steps=settings.attack_steps,
                step_size=factor * settings.step_size,
                random_start=True,
            )
            threat = ThreatModel("linf", factor * settings.eps)
            if box is not None:
                around = masks.outside(masks.centre_box((part.size, part.size), box, box))
                threat = replace(threat, mask=around)
            defended = AdversarialTraining(network, classes, attack, threat)
            history = defended.fit(images, labels, **options).history_
        ended.unlink(missing_ok=True)
        return {"loss": history[-1].loss, "accuracy": history[-1].accuracy}, dict(
            network.cpu().state_dict()
        )

    shared = settings.model_dump(
        exclude={"name", "paper", "data", "boxes"}
        | ({"eps", "attack_steps", "step_size", "ramp"} if kind == NATURAL else set())
    )
    config = {
        "cell": "localized",
        "kind": kind,
        "box": box,
        "data": part.train.fingerprint,
        "settings": shared,
        "seed": run.seed,
    }
    attacked = 0.0 if kind == NATURAL else 0.7 * settings.attack_steps
    cell = run.cell(
        f"{settings.name}: train the {kind} model",
        config,
        compute,
        settings.steps * settings.batch_size * (1 + attacked),
    )
    network = new_network(
        settings, part.train, run.seed
    )  # anew: training leaves another layout in memory, which rounds otherwise
    network.load_state_dict(dict(cell.tensors))
    return Model(kind, Classifier(network, classes).to(run.device).eval(), cell.key, cell.values)


def _resumed(network: nn.Module, ended: Path) -> int:
    """The stage that a training that was stopped goes on with, its network loaded; 0 where there is none, or its file is broken."""
    try:
        saved = torch.load(ended, weights_only=True, map_location="cpu")
        stage, state = int(saved["stage"]), saved["network"]
        deepcopy(network).load_state_dict(state)  # what does not fit must not leave half of itself
    except (
        Exception
    ):  # a broken file makes the restricted unpickler raise whatever its rubbish leads to
        return 0
    network.load_state_dict(state)
    return stage


def _stages(
    settings: SetProfile, kind: str, count: int, seed: int
) -> Iterator[tuple[float, Tensor, int]]:
    """The stages of a training: a share of eps, the images (n,) by index, and the passes over them; in all as many steps as asked for.

    Within a large eps a network may not find the way from chance at once; the paper does not say that it ramps up.
    """
    ramp = (1.0,) if kind == NATURAL else settings.ramp
    wanted = settings.steps * settings.batch_size / len(ramp)
    passes = max(1, math.ceil(wanted / count))
    some = min(count, max(settings.batch_size, round(wanted / passes)))
    order = torch.randperm(count, generator=seeds.generator(seed, "stages"))
    for stage, factor in enumerate(ramp):
        yield factor, order[(stage * some + torch.arange(some)) % count], passes


def _optimizer(settings: SetProfile, steps: int) -> Callable[..., torch.optim.Optimizer]:
    """As Madry et al. 2018 have it: Adam for MNIST's network, descent with smaller and smaller steps for CIFAR-10's."""
    if settings.network == "wide":
        return partial(stepwise_sgd, steps=steps, rate=settings.learning_rate)
    return partial(torch.optim.Adam, lr=settings.learning_rate)


def paper_attack(steps: int, step_size: float) -> PGD:
    """Give the paper's attack: PGD from a random start to the largest cross-entropy."""
    return PGD(
        steps=steps,
        step_size=step_size,
        loss="cross_entropy",
        random_start=True,
        keep_maximizing=True,
    )


def threat_of(eps: float, mask: Tensor | None) -> ThreatModel:
    """Give the paper's threat model: any error, within eps in Linf, inside the mask."""
    return ThreatModel("linf", eps, AnyError(), mask)


def _paper_attack(profile: Profile, eps: float) -> PGD:
    return paper_attack(profile.attack.steps, profile.attack.step_share * eps)


def _broken_too(
    result: AttackResult,
    attack: PGD,
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    seed: int,
) -> Tensor:
    """Give the outcomes (N,) of the paper's attack, completed by a second run that stops at any error (R5).

    The second run attacks the images that are still correct: the candidate of the largest loss need not be an error, where a smaller
    loss was.
    """
    found = outcomes(classifier, result.candidates, labels)
    left = (found == Outcome.CORRECT).nonzero().flatten()
    if len(left):
        attack = replace(attack, keep_maximizing=False)
        here = threat.select(left, images)
        again = attack(classifier, images[left], labels[left], here, seed=seed)
        found[left] = outcomes(classifier, again.candidates, labels[left])
    return found


def _losses(classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy (N,) of the images, in float64."""
    return nn.functional.cross_entropy(classifier.scores(images).double(), labels, reduction="none")


def _judged(classifier: Classifier, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    return {
        "losses": _losses(classifier, images, labels),
        "outcomes": outcomes(classifier, images, labels),
    }


def _clean_cell(part: Part[SetProfile], model: Model, run: Run) -> NodeResult:
    """All test images as they are. losses, outcomes: (N,)."""

    def compute(_: Path) -> Computed:
        return {}, _judged(model.classifier, part.test.to_float(), part.test.labels)

    config = {"cell": "localized clean", "model": model.key, "data": part.test.fingerprint}
    return run.cell(f"{part.settings.name}: clean images, {model.name}", config, compute, 0)


def _calibration_cell(
    profile: Profile, part: Part[SetProfile], natural: Model, attacked: ImageSet, run: Run
) -> NodeResult:
    """Attack the natural model around centre boxes of several sides, and choose: where accuracy falls by as much as the paper's.

    Of a set that the paper has not, the middle one of the sides is taken.
    """
    settings = part.settings
    count = profile.attack.calibration_images
    images = attacked.sample(count, seeds.derive(run.seed, "calibration"))

    def compute(_: Path) -> Computed:
        clean = images.to_float()
        before = _accuracy(natural.classifier, clean, images.labels)
        left = []
        for side in settings.boxes:
            threat = threat_of(settings.eps, mask_of(AROUND, side, clean, run.seed))
            attack = _paper_attack(profile, settings.eps)
            attacked_here = (natural.classifier, clean, images.labels, threat)
            found = attack(*attacked_here, seed=run.seed)
            judged = _broken_too(found, attack, *attacked_here, run.seed)
            left.append(float((judged == Outcome.CORRECT).double().mean()))
        retained = RETAINED.get(settings.paper)
        chosen = (
            len(left) // 2
            if retained is None
            else min(range(len(left)), key=lambda i: (abs(left[i] - retained * before), -i))
        )
        return {"accuracy": left, "clean": before, "box": settings.boxes[chosen]}, {}

    config = {
        "cell": "calibration, 2",
        "model": natural.key,
        "data": images.fingerprint,
        "eps": settings.eps,
        "boxes": settings.boxes,
    }
    config |= {"attack": _attack_config(profile), "paper": settings.paper, "seed": run.seed}
    work = 0.7 * profile.attack.steps * len(settings.boxes) * count
    return run.cell(f"{settings.name}: choose the box", config, compute, work)


def _accuracy(classifier: Classifier, images: Tensor, labels: Tensor) -> float:
    return float((outcomes(classifier, images, labels) == Outcome.CORRECT).double().mean())


def _pgd_cell(
    profile: Profile,
    part: Part[SetProfile],
    model: Model,
    region: str,
    box: int,
    attacked: ImageSet,
    run: Run,
) -> NodeResult:
    """The paper's attack in a region. losses, outcomes (N,); the first images as 8 bits store them."""
    settings = part.settings

    def compute(_: Path) -> Computed:
        clean = attacked.to_float()
        attack = _paper_attack(profile, settings.eps)
        threat = threat_of(settings.eps, mask_of(region, box, clean, run.seed))
        attacked_here = (model.classifier, clean, attacked.labels, threat)
        result = attack(*attacked_here, seed=run.seed)
        stored = attacks.quantize_towards(result.candidates[:SHOWN], clean[:SHOWN])
        shown = outcomes(model.classifier, to_float(stored), attacked.labels[:SHOWN])
        found = _broken_too(result, attack, *attacked_here, run.seed)
        losses = _losses(model.classifier, result.candidates, attacked.labels)
        return passes(result), {
            "losses": losses,
            "outcomes": found,
            "images": stored,
            "stored_outcomes": shown,
        }

    config = _config(
        "localized pgd, 2",
        part,
        model,
        region,
        box,
        attacked,
        {"attack": _attack_config(profile)},
        run,
    )
    return run.cell(
        f"{settings.name}: {model.name}, {region}",
        config,
        compute,
        0.7 * profile.attack.steps * profile.attack.images,
    )


def _strongest_cell(
    profile: Profile,
    part: Part[SetProfile],
    model: Model,
    region: str,
    box: int,
    attacked: ImageSet,
    run: Run,
) -> NodeResult:
    """The strongest ensemble in a region, on the first attacked images. outcomes: (n,)."""
    settings, strongest = part.settings, profile.strongest
    images = attacked.subset(torch.arange(strongest.images))

    def compute(_: Path) -> Computed:
        clean = images.to_float()
        mask = mask_of(region, box, clean, run.seed)
        threat = ThreatModel("linf", settings.eps, mask=mask)
        attack = Strongest(**strongest.model_dump(exclude={"images"}))
        result = attack(model.classifier, clean, images.labels, threat, seed=run.seed)
        return passes(result), {
            "outcomes": outcomes(model.classifier, result.candidates, images.labels)
        }

    config = _config(
        "localized strongest", part, model, region, box, images, strongest.model_dump(), run
    )
    return run.cell(
        f"{settings.name}: strongest ensemble on {model.name}, {region}",
        config,
        compute,
        0.7 * profile.strongest.images * profile.strongest.passes,
    )


def _curve_cell(
    profile: Profile,
    part: Part[SetProfile],
    model: Model,
    region: str,
    box: int,
    attacked: ImageSet,
    run: Run,
) -> NodeResult:
    """The paper's attack at each eps, on the images that it has not broken with less. outcomes: (E, N)."""
    settings = part.settings
    curve = profile.attack.curve

    def compute(_: Path) -> Computed:
        clean, labels = attacked.to_float(), attacked.labels
        mask = mask_of(region, box, clean, run.seed)
        now = outcomes(model.classifier, clean, labels)
        found = []
        for factor in curve:
            eps = min(1.0, factor * settings.eps)
            left = (now == Outcome.CORRECT).nonzero().flatten()
            if eps and len(left):
                attack = _paper_attack(profile, eps)
                threat = threat_of(eps, mask).select(left, clean)
                here = (model.classifier, clean[left], labels[left], threat)
                result = attack(*here, seed=run.seed)
                now[left] = _broken_too(result, attack, *here, run.seed)
            found.append(now.clone())
        return {}, {"outcomes": torch.stack(found)}

    config = _config(
        "localized curve, 2",
        part,
        model,
        region,
        box,
        attacked,
        {"attack": _attack_config(profile), "curve": curve},
        run,
    )
    work = 0.7 * profile.attack.steps * profile.attack.images * len(curve)
    return run.cell(f"{settings.name}: {model.name} against eps, {region}", config, compute, work)


def _config(
    cell: str,
    part: Part[SetProfile],
    model: Model,
    region: str,
    box: int,
    images: ImageSet,
    settings: Mapping[str, Any],
    run: Run,
) -> dict[str, Any]:
    about = {
        "cell": cell,
        "model": model.key,
        "region": region,
        "box": box,
        "eps": part.settings.eps,
    }
    return {**about, "data": images.fingerprint, "settings": dict(settings), "seed": run.seed}


def _attack_config(profile: Profile) -> dict[str, Any]:
    return profile.attack.model_dump(include={"steps", "step_share"})
