"""Who attacks the models of the rejection experiment, and what came of it: every cell holds one value an image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from demur import attacks, seeds
from demur.attacks import NEVER, AttackResult, Evade, ForceReject
from demur.attacks.strongest import WIDER
from demur.classifier import REJECT, Classifier, Outcome, outcomes
from demur.data import ImageSet, as_floats
from demur.defenses.neural_rejection import Taps
from demur.evaluation import Cell, shifted
from demur.evaluation.ledger import Computed
from demur.evaluation.rejection import confidences
from demur.experiments.cells import Run
from demur.experiments.neural_rejection.models import DNR, LAYERS, Model
from demur.experiments.neural_rejection.profile import Profile

UNAWARE, PAPER, STRONGEST = "knows only the network", "the paper's", "the strongest"
ATTACKERS = (UNAWARE, PAPER, STRONGEST)
NOISE, HINGE, DENSE = "random noise", "hinge (sec. 2.5.2)", "margin and density"
MATCHING, ENSEMBLE, DOUBLED = "feature matching", "ensemble", "the paper's, twice the steps"
COMPARED = (DOUBLED, NOISE, HINGE, DENSE, MATCHING, ENSEMBLE)
STRANGERS = 500
DRAWS = 10
KNOWN = 200  # images that a density is estimated from
PASS = {False: 2.0, True: 8.0}  # a pass for a gradient, against training on an image once: without machines, and with


@dataclass(frozen=True)
class Attacked:
    """What was found on one model, of the images of all repeats; `worst` (E, N), `distance` and `rejected_at` (N,)."""

    judged: Cell
    paper: Cell
    strongest: Cell
    compared: Mapping[str, Cell]
    worst: Tensor
    distance: Tensor
    rejected_at: Tensor
    strangers: Cell | None


def unaware_cell(profile: Profile, model: Model, images: ImageSet, run: Run) -> Cell:
    """What an attacker sends who knows only the network: at each eps, whatever it answers most confidently wrong. sent: (E, N, C, H, W)."""
    settings = profile.attack

    def compute(_: Path) -> Computed:
        clean, sent = images.floats(), []
        for eps in settings.eps:
            goal = Evade(confidence=NEVER)
            result = attacks.pgd(model.network, clean, images.labels, norm="l2", eps=eps, steps=settings.steps, goal=goal) if eps else None
            sent.append(clean if result is None else result.attempts)
        return {}, {"sent": torch.stack(sent)}

    config = _config("unaware", model.network_key, images, settings.model_dump(), run)
    return run.cell(f"attacker of the network alone, {model.name}", config, compute, _work(profile, False) * len(images))


def judged_cell(model: Model, unaware: Cell, images: ImageSet, run: Run) -> Cell:
    """What a model makes of those images. outcomes: (E, N)."""

    def compute(_: Path) -> Computed:
        return {}, {"outcomes": torch.stack([outcomes(model.classifier, sent, images.labels) for sent in unaware.tensors["sent"]])}

    config = {"cell": "judged", "model": model.key, "sent": unaware.key}
    return run.cell(f"{UNAWARE}, {model.name}", config, compute, 0)


def paper_cell(profile: Profile, model: Model, images: ImageSet, others: Tensor, run: Run) -> Cell:
    """The paper's attack at each eps, on the images that it has not broken with less. outcomes: (E, N); distance (N,); images at the
    eps of the comparison, as 8 bits store them.
    """
    settings = profile.attack

    def compute(_: Path) -> Computed:
        clean, labels = images.floats(), images.labels
        sent, broken, found = clean.clone(), torch.zeros(len(images), dtype=torch.bool), []
        distance = torch.full((len(images),), torch.inf, dtype=torch.float64)
        costs, shown = torch.zeros(3, dtype=torch.int64), clean
        for eps in settings.eps:
            left = (~broken).nonzero().flatten()
            if eps and len(left):
                result = paper_attack(profile, model.classifier, clean[left], labels[left], others[left], eps)
                sent[left], broken[left], distance[left] = result.attempts, result.found, result.distance
                costs += torch.tensor([int(cost.sum()) for cost in (result.forwards, result.backwards, result.flat)])
            found.append(outcomes(model.classifier, sent, labels))
            shown = sent.clone() if eps == profile.strongest.eps else shown
        values = dict(zip(("forwards", "backwards", "flat"), costs.tolist(), strict=True))
        stored = attacks.round_towards(shown, clean)
        tensors = {"outcomes": torch.stack(found), "distance": distance, "images": stored}
        return values, {**tensors, "stored_outcomes": outcomes(model.classifier, as_floats(stored), labels)}

    config = _config("paper, 2", model.key, images, {**settings.model_dump(), "shown": profile.strongest.eps}, run)
    return run.cell(f"{PAPER}, {model.name}", config, compute, 2 * _work(profile, model.rejects) * len(images))


def paper_attack(profile: Profile, classifier: Classifier, images: Tensor, labels: Tensor, others: Tensor, eps: float) -> AttackResult:
    """Defence-aware descent in L2 (sec. 2.5.1 and algorithm 1, read as the documentation says), from the image and from another class."""
    settings = profile.attack
    return attacks.pgd(
        classifier,
        images,
        labels,
        norm="l2",
        eps=eps,
        steps=settings.steps,
        step_size=settings.step_size,
        start=torch.stack([images, others]),
        restarts=2,
        tolerance=settings.tolerance,
    )


def strongest_cell(profile: Profile, model: Model, images: ImageSet, run: Run) -> Cell:
    """The smallest changes that walking along the boundary finds: to an accepted error, and to a rejection. distance, rejected_at (N,)."""
    steps, factors = profile.strongest.steps, (1.0, *WIDER) if model.rejects else (1.0,)

    def compute(_: Path) -> Computed:
        clean, labels = images.floats(), images.labels
        walk = partial(attacks.ddn, model.classifier, clean, labels, steps=steps, seed=run.seed)
        results = []
        for factor in factors:
            with attacks.widened(model.classifier, factor):
                results.append(walk())
        alone = torch.stack([result.distance for result in results])
        rejected_at = torch.full_like(alone[0], torch.inf)
        if model.rejects:  # away from known images the kernels as they are point the way
            results.append(walk(goal=ForceReject()))
            rejected_at = results[-1].distance
        passes = {kind: sum(int(getattr(result, kind).sum()) for result in results) for kind in ("forwards", "backwards", "flat")}
        return passes, {"distance": alone.amin(0), "rejected_at": rejected_at, "alone": alone}

    config = _config("strongest", model.key, images, {"steps": steps, "factors": factors, "rejected": (1.0,)}, run)
    work = (len(factors) + model.rejects) * steps * PASS[model.rejects] * len(images)
    return run.cell(f"{STRONGEST}, {model.name}", config, compute, work)


def compared_cell(profile: Profile, model: Model, attack: str, images: ImageSet, known: ImageSet, run: Run) -> Cell:
    """One more attack at the eps of the comparison. outcomes, distance: (N,)."""
    settings, steps = profile.strongest, profile.attack.steps

    def compute(_: Path) -> Computed:
        clean, labels = images.floats(), images.labels
        taps = Taps(model.network.module, list(LAYERS) if model.name.startswith(DNR) else list(LAYERS)[-1:])
        descend = partial(attacks.pgd, model.classifier, clean, labels, norm="l2", eps=settings.eps)
        others = other_classes(images, known, run.seed)
        double: dict[str, Any] = {
            "start": torch.stack([clean, others]),
            "restarts": 2,
            "steps": steps,
            "step_size": profile.attack.step_size,
        }
        if attack == NOISE:
            result = attacks.noise(model.classifier, clean, labels, norm="l2", eps=settings.eps, restarts=DRAWS, seed=run.seed)
        elif attack == DOUBLED:  # R11: if that finds much more, the paper's had not ended
            result = descend(**double | {"steps": 2 * steps, "tolerance": profile.attack.tolerance})
        elif attack == HINGE:
            result = descend(goal=Evade("hinge"), **double)
        elif attack == ENSEMBLE:
            result = attacks.strongest(
                model.classifier,
                clean,
                labels,
                norm="l2",
                eps=settings.eps,
                steps=settings.ensemble_steps,
                targets=settings.targets,
                queries=settings.queries,
                seed=run.seed,
            )
        else:
            if attack == DENSE:
                goal = Evade(bonus=attacks.density(taps, known.floats()[:KNOWN]))
            else:
                goal = Evade("cross_entropy", bonus=attacks.likeness(taps, _guides(model.classifier, images, known), weight=10.0))
            with attacks.widened(model.classifier, WIDER[0]):
                result = descend(goal=goal, **double)
        passes = {kind: int(getattr(result, kind).sum()) for kind in ("forwards", "backwards", "flat")}
        return passes, {"outcomes": outcomes(model.classifier, result.attempts, labels), "distance": result.distance}

    descent = {"steps": steps, "step_size": profile.attack.step_size}
    descent |= {"tolerance": profile.attack.tolerance} if attack == DOUBLED else {}
    how = settings.model_dump() if attack == ENSEMBLE else descent
    asked = {"attack": attack, "eps": settings.eps, "how": how, "known": known.fingerprint}
    config = _config("compared", model.key, images, asked, run)
    return run.cell(f"{attack}, {model.name}", config, compute, 2 * steps * PASS[model.rejects] * len(images))


def threshold_cell(profile: Profile, model: Model, offset: float, images: ImageSet, run: Run) -> Cell:
    """A model whose reject score is moved, and an attacker who knows that: outcomes, confidence, wrong (N,), clean and attacked."""
    settings = profile.thresholds

    def compute(_: Path) -> Computed:
        moved, clean, labels = shifted(model.classifier, offset), images.floats(), images.labels
        sent, wrong = clean.clone(), torch.zeros(len(images), dtype=torch.bool)
        passes = {"forwards": 0, "backwards": 0}
        for factor in (1.0, *WIDER):
            left = (~wrong).nonzero().flatten()
            if not len(left):
                break
            with attacks.widened(moved, factor):
                result = attacks.pgd(moved, clean[left], labels[left], norm="l2", eps=profile.strongest.eps, steps=settings.steps)
            newly = result.found if factor < 1 else torch.ones_like(result.found)  # failures are those of the kernels as they are
            sent[left[newly]], wrong[left] = result.attempts[newly], result.found
            passes = {kind: count + int(getattr(result, kind).sum()) for kind, count in passes.items()}
        tensors: dict[str, Tensor] = {}
        for kind, shown in (("clean", clean), ("attacked", sent)):
            confidence, classes = confidences(moved, shown)
            tensors |= {f"{kind}_confidence": confidence, f"{kind}_wrong": classes != labels}
            tensors[f"{kind}_outcomes"] = outcomes(moved, shown, labels)
        return passes, tensors

    config = _config("threshold, 2", model.key, images, {"offset": offset, "steps": settings.steps, "eps": profile.strongest.eps}, run)
    return run.cell(f"{model.name}, threshold moved by {offset:.3g}", config, compute, 2 * settings.steps * PASS[True] * len(images))


def other_classes(images: ImageSet, known: ImageSet, seed: int) -> Tensor:
    """An image of another class for each (N, C, H, W), drawn by image and seed: where double initialisation starts the second time."""
    draws = seeds.uniform(seeds.image_keys(images.floats()), (len(known),), seed, "others")
    same = known.labels[None, :] == images.labels[:, None]
    return known.floats(draws.masked_fill(same, -1.0).argmax(1))


def _guides(classifier: Classifier, images: ImageSet, known: ImageSet) -> Tensor:
    """For each image the nearest known one of another class that the model accepts as what it is (N, C, H, W)."""
    right = outcomes(classifier, known.floats(), known.labels) == Outcome.CORRECT
    pool = known.subset(right.nonzero().flatten()) if bool(right.any()) else known
    apart = torch.cdist(images.floats().flatten(1), pool.floats().flatten(1))
    apart = apart.masked_fill(images.labels[:, None] == pool.labels[None, :], torch.inf)
    return pool.floats(apart.argmin(1))


def worst(profile: Profile, judged: Cell, paper: Cell, distance: Tensor, rejected_at: Tensor) -> Tensor:
    """The worst outcome (E, N) that any attacker forces on each image: wrong before rejected before correct; at eps 0 nobody attacks.

    `distance` and `rejected_at` (N,) are the smallest changes that were found to an accepted error and to a rejection.
    """
    clean = judged.tensors["outcomes"][profile.attack.eps.index(0.0)]
    together = [clean]
    for place, eps in enumerate(profile.attack.eps[1:], start=1):
        found = torch.maximum(judged.tensors["outcomes"][place], paper.tensors["outcomes"][place])
        for within, outcome in ((rejected_at, Outcome.REJECTED), (distance, Outcome.WRONG)):
            found = torch.where(within <= eps * (1 + 1e-6), found.clamp(min=int(outcome)), found)
        together.append(found if place == 1 else torch.maximum(found, together[-1]))  # what is forced within less is within more
    return torch.stack(together)


def nearest(judged: Cell, unaware: Cell, images: ImageSet, outcome: Outcome, found: Sequence[Tensor]) -> Tensor:
    """The smallest change that any attacker found to that outcome (N,), infinite where none did; `found` holds (N,) of the others."""
    moved = torch.stack([attacks.sizes(images.floats(), sent)["l2"] for sent in unaware.tensors["sent"]])
    return torch.stack([torch.where(judged.tensors["outcomes"] == outcome, moved, torch.inf).amin(0), *found]).amin(0)


def rejected_by(profile: Profile, paper: Cell) -> Tensor:
    """The smallest eps at which the paper's attack, which does not look for that, ends in a rejection (N,)."""
    eps = torch.tensor(profile.attack.eps, dtype=torch.float64)[:, None]
    return torch.where(paper.tensors["outcomes"] == Outcome.REJECTED, eps, torch.inf).amin(0)


def strangers_cell(model: Model, shape: tuple[int, ...], run: Run) -> Cell:
    """How many images of uniform noise a model declines (R21)."""

    def compute(_: Path) -> Computed:
        noise = torch.rand(STRANGERS, *shape, generator=seeds.generator(run.seed, "strangers"))
        return {"rejected": int((model.classifier.predict(noise) == REJECT).sum()), "n": STRANGERS}, {}

    return run.cell(f"uniform noise, {model.name}", {"cell": "strangers", "model": model.key, "seed": run.seed}, compute, 0)


def _config(kind: str, key: str, images: ImageSet, settings: dict[str, Any], run: Run) -> dict[str, Any]:
    return {"cell": kind, "model": key, "images": images.fingerprint, "settings": settings, "seed": run.seed}


def _work(profile: Profile, machines: bool) -> float:
    return PASS[machines] * profile.attack.steps * len(profile.attack.eps) / 2
