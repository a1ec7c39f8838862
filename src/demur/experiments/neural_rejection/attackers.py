"""The attackers of the rejection experiment and their results: each node holds one value an image."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from demur import attacks, seeds
from demur.attacks import DDN, PGD, ForceReject, RandomNoise, Strongest
from demur.attacks.book import Regularizer
from demur.attacks.strongest import WIDER
from demur.classifier import REJECT, Classifier, Outcome, outcomes
from demur.data import ImageSet, to_float
from demur.evaluation import NodeResult, shifted
from demur.evaluation.store import Computed
from demur.experiments.cells import Run, passes
from demur.experiments.neural_rejection.models import DNR, LAYERS, Model
from demur.experiments.neural_rejection.profile import Profile
from demur.metrics.rejection import confidences
from demur.networks import FeatureExtractor
from demur.threat import ThreatModel

UNAWARE, PAPER, STRONGEST = "defence-unaware", "the paper's", "strongest ensemble"
ATTACKERS = (UNAWARE, PAPER, STRONGEST)
NOISE, HINGE, DENSE = "random noise", "hinge (sec. 2.5.2)", "margin and density"
MATCHING, ENSEMBLE, DOUBLED = "feature matching", "ensemble", "the paper's, twice the steps"
COMPARED = (DOUBLED, NOISE, HINGE, DENSE, MATCHING, ENSEMBLE)
OUT_OF_DISTRIBUTION = 500
DRAWS = 10
KNOWN = 200  # images that a density is estimated from
PASS = {
    False: 2.0,
    True: 8.0,
}  # a pass for a gradient, against training on an image once: without machines, and with


@dataclass(frozen=True)
class Attacked:
    """What was found on one model, of the images of all repeats; `worst` (E, N), `distance` and `rejected_at` (N,)."""

    judged: NodeResult
    paper: NodeResult
    strongest: NodeResult
    compared: Mapping[str, NodeResult]
    worst: Tensor
    distance: Tensor
    rejected_at: Tensor
    out_of_distribution: NodeResult | None


def unaware_cell(profile: Profile, model: Model, images: ImageSet, run: Run) -> NodeResult:
    """Images attacked on the network alone, to the largest loss at each eps. sent: (E, N, C, H, W)."""
    settings = profile.attack

    def compute(_: Path) -> Computed:
        clean = images.to_float()
        attack = PGD(steps=settings.steps, keep_maximizing=True)
        sent = []
        for eps in settings.eps:
            if not eps:
                sent.append(clean)
                continue
            result = attack(model.network, clean, images.labels, ThreatModel("l2", eps))
            sent.append(result.candidates)
        return {}, {"sent": torch.stack(sent)}

    config = _config("unaware", model.network_key, images, settings.model_dump(), run)
    return run.cell(
        f"attack on the network alone, {model.name}",
        config,
        compute,
        _work(profile, False) * len(images),
    )


def judged_cell(model: Model, unaware: NodeResult, images: ImageSet, run: Run) -> NodeResult:
    """What a model makes of those images. outcomes: (E, N)."""

    def compute(_: Path) -> Computed:
        return {}, {
            "outcomes": torch.stack(
                [
                    outcomes(model.classifier, sent, images.labels)
                    for sent in unaware.tensors["sent"]
                ]
            )
        }

    config = {"cell": "judged", "model": model.key, "sent": unaware.key}
    return run.cell(f"{UNAWARE}, {model.name}", config, compute, 0)


def paper_cell(
    profile: Profile, model: Model, images: ImageSet, others: Tensor, run: Run
) -> NodeResult:
    """The paper's attack at each eps, on the images that it has not broken with less. outcomes: (E, N); distance (N,); images at the
    eps of the comparison, as 8 bits store them.
    """
    settings = profile.attack

    def compute(_: Path) -> Computed:
        clean, labels = images.to_float(), images.labels
        sent, broken, found = clean.clone(), torch.zeros(len(images), dtype=torch.bool), []
        distance = torch.full((len(images),), torch.inf, dtype=torch.float64)
        shown = clean
        attack = paper_attack(profile)
        spent = Counter({"forwards": 0, "backwards": 0, "zero_gradients": 0})
        for eps in settings.eps:
            left = (~broken).nonzero().flatten()
            if eps and len(left):
                result = attack(
                    model.classifier,
                    clean[left],
                    labels[left],
                    ThreatModel("l2", eps),
                    starting_points=torch.stack([clean[left], others[left]]),
                )
                sent[left] = result.candidates
                broken[left] = result.success
                distance[left] = result.distance
                spent.update(passes(result))
            found.append(outcomes(model.classifier, sent, labels))
            shown = sent.clone() if eps == profile.strongest.eps else shown
        stored = attacks.quantize_towards(shown, clean)
        tensors = {"outcomes": torch.stack(found), "distance": distance, "images": stored}
        return spent, {
            **tensors,
            "stored_outcomes": outcomes(model.classifier, to_float(stored), labels),
        }

    config = _config(
        "paper, 2",
        model.key,
        images,
        {**settings.model_dump(), "shown": profile.strongest.eps},
        run,
    )
    return run.cell(
        f"{PAPER}, {model.name}", config, compute, 2 * _work(profile, model.rejects) * len(images)
    )


def paper_attack(profile: Profile) -> PGD:
    """Give the paper's defence-aware attack (sec. 2.5.1 and algorithm 1, read as the documentation says).

    Its two runs start at the image and at an image of another class.
    """
    settings = profile.attack
    return PGD(
        steps=settings.steps,
        step_size=settings.step_size,
        restarts=2,
        tolerance=settings.tolerance,
    )


def strongest_cell(profile: Profile, model: Model, images: ImageSet, run: Run) -> NodeResult:
    """The smallest changes that walking along the boundary finds: to an accepted error, and to a rejection. distance, rejected_at (N,)."""
    steps, factors = profile.strongest.steps, (1.0, *WIDER) if model.rejects else (1.0,)

    def compute(_: Path) -> Computed:
        clean, labels = images.to_float(), images.labels
        given = (model.classifier, clean, labels)
        attack = DDN(steps=steps)
        results = []
        for factor in factors:
            with attacks.wider_kernels(model.classifier, factor):
                results.append(attack(*given, ThreatModel("l2"), seed=run.seed))
        alone = torch.stack([result.distance for result in results])
        rejected_at = torch.full_like(alone[0], torch.inf)
        if model.rejects:  # away from known images the kernels as they are point the way
            threat = ThreatModel("l2", goal=ForceReject())
            results.append(attack(*given, threat, seed=run.seed))
            rejected_at = results[-1].distance
        spent = Counter[str]()
        for result in results:
            spent.update(passes(result))
        return spent, {"distance": alone.amin(0), "rejected_at": rejected_at, "alone": alone}

    config = _config(
        "strongest",
        model.key,
        images,
        {"steps": steps, "factors": factors, "rejected": (1.0,)},
        run,
    )
    work = (len(factors) + model.rejects) * steps * PASS[model.rejects] * len(images)
    return run.cell(f"{STRONGEST}, {model.name}", config, compute, work)


def compared_cell(
    profile: Profile, model: Model, attack: str, images: ImageSet, known: ImageSet, run: Run
) -> NodeResult:
    """One more attack at the eps of the comparison. outcomes, distance: (N,)."""
    settings, steps = profile.strongest, profile.attack.steps

    def compute(_: Path) -> Computed:
        clean, labels = images.to_float(), images.labels
        layers = list(LAYERS) if model.name.startswith(DNR) else list(LAYERS)[-1:]
        features = FeatureExtractor(model.network.module, layers).eval()
        given = (model.classifier, clean, labels, ThreatModel("l2", settings.eps))
        starts = torch.stack([clean, other_classes(images, known, run.seed)])
        paper = replace(paper_attack(profile), tolerance=None)
        if attack == NOISE:
            result = RandomNoise(draws=DRAWS)(*given, seed=run.seed)
        elif attack == DOUBLED:  # R11: if that finds much more, the paper's had not ended
            doubled = replace(paper_attack(profile), steps=2 * steps)
            result = doubled(*given, starting_points=starts)
        elif attack == HINGE:
            result = replace(paper, loss="hinge")(*given, starting_points=starts)
        elif attack == ENSEMBLE:
            ensemble = Strongest(
                steps=settings.ensemble_steps,
                n_queries=settings.n_queries,
                n_targets=settings.n_targets,
            )
            result = ensemble(*given, seed=run.seed)
        else:
            regularizer: Regularizer
            if attack == DENSE:
                regularizer = attacks.feature_density(features, known.to_float()[:KNOWN])
            else:
                guides = _guides(model.classifier, images, known)
                regularizer = attacks.feature_matching(features, guides, weight=10.0)
                paper = replace(paper, loss="cross_entropy")
            with attacks.wider_kernels(model.classifier, WIDER[0]):
                result = paper(*given, starting_points=starts, regularizer=regularizer)
        return passes(result), {
            "outcomes": outcomes(model.classifier, result.candidates, labels),
            "distance": result.distance,
        }

    descent = {"steps": steps, "step_size": profile.attack.step_size}
    descent |= {"tolerance": profile.attack.tolerance} if attack == DOUBLED else {}
    how = settings.model_dump() if attack == ENSEMBLE else descent
    asked = {"attack": attack, "eps": settings.eps, "how": how, "known": known.fingerprint}
    config = _config("compared", model.key, images, asked, run)
    return run.cell(
        f"{attack}, {model.name}", config, compute, 2 * steps * PASS[model.rejects] * len(images)
    )


def threshold_cell(
    profile: Profile, model: Model, offset: float, images: ImageSet, run: Run
) -> NodeResult:
    """A model with a moved reject score, attacked with that score: outcomes, confidence, wrong (N,)."""
    settings = profile.thresholds

    def compute(_: Path) -> Computed:
        moved, clean, labels = shifted(model.classifier, offset), images.to_float(), images.labels
        sent, wrong = clean.clone(), torch.zeros(len(images), dtype=torch.bool)
        spent = Counter[str]()
        attack = PGD(steps=settings.steps)
        threat = ThreatModel("l2", profile.strongest.eps)
        for factor in (1.0, *WIDER):
            left = (~wrong).nonzero().flatten()
            if not len(left):
                break
            with attacks.wider_kernels(moved, factor):
                result = attack(moved, clean[left], labels[left], threat)
            # Failures are those of the original kernels.
            newly = result.success if factor < 1 else torch.ones_like(result.success)
            sent[left[newly]] = result.candidates[newly]
            wrong[left] = result.success
            spent.update(passes(result))
        tensors: dict[str, Tensor] = {}
        for kind, shown in (("clean", clean), ("attacked", sent)):
            confidence, classes = confidences(moved, shown)
            tensors |= {f"{kind}_confidence": confidence, f"{kind}_wrong": classes != labels}
            tensors[f"{kind}_outcomes"] = outcomes(moved, shown, labels)
        return spent, tensors

    config = _config(
        "threshold, 2",
        model.key,
        images,
        {"offset": offset, "steps": settings.steps, "eps": profile.strongest.eps},
        run,
    )
    return run.cell(
        f"{model.name}, threshold moved by {offset:.3g}",
        config,
        compute,
        2 * settings.steps * PASS[True] * len(images),
    )


def other_classes(images: ImageSet, known: ImageSet, seed: int) -> Tensor:
    """An image of another class for each (N, C, H, W), drawn by image and seed: where double initialisation starts the second time."""
    draws = seeds.uniform(seeds.image_keys(images.to_float()), (len(known),), seed, "others")
    same = known.labels[None, :] == images.labels[:, None]
    return known.to_float(draws.masked_fill(same, -1.0).argmax(1))


def _guides(classifier: Classifier, images: ImageSet, known: ImageSet) -> Tensor:
    """For each image the nearest known one of another class that the model accepts as what it is (N, C, H, W)."""
    right = outcomes(classifier, known.to_float(), known.labels) == Outcome.CORRECT
    pool = known.subset(right.nonzero().flatten()) if bool(right.any()) else known
    apart = torch.cdist(images.to_float().flatten(1), pool.to_float().flatten(1))
    apart = apart.masked_fill(images.labels[:, None] == pool.labels[None, :], torch.inf)
    return pool.to_float(apart.argmin(1))


def worst(
    profile: Profile, judged: NodeResult, paper: NodeResult, distance: Tensor, rejected_at: Tensor
) -> Tensor:
    """The worst outcome (E, N) of each image under all attackers: wrong, else rejected, else correct.

    At eps 0 there is no attack.

    `distance` and `rejected_at` (N,) are the smallest changes that were found to an accepted error and to a rejection.
    """
    clean = judged.tensors["outcomes"][profile.attack.eps.index(0.0)]
    together = [clean]
    for place, eps in enumerate(profile.attack.eps[1:], start=1):
        found = torch.maximum(judged.tensors["outcomes"][place], paper.tensors["outcomes"][place])
        for within, outcome in ((rejected_at, Outcome.REJECTED), (distance, Outcome.WRONG)):
            found = torch.where(within <= eps * (1 + 1e-6), found.clamp(min=int(outcome)), found)
        together.append(
            found if place == 1 else torch.maximum(found, together[-1])
        )  # what is forced within less is within more
    return torch.stack(together)


def nearest(
    judged: NodeResult,
    unaware: NodeResult,
    images: ImageSet,
    outcome: Outcome,
    found: Sequence[Tensor],
) -> Tensor:
    """The smallest change that any attacker found to that outcome (N,), infinite where none did; `found` holds (N,) of the others."""
    moved = torch.stack(
        [attacks.sizes(images.to_float(), sent)["l2"] for sent in unaware.tensors["sent"]]
    )
    return torch.stack(
        [torch.where(judged.tensors["outcomes"] == outcome, moved, torch.inf).amin(0), *found]
    ).amin(0)


def rejected_by(profile: Profile, paper: NodeResult) -> Tensor:
    """The smallest eps at which the paper's attack, which does not look for that, ends in a rejection (N,)."""
    eps = torch.tensor(profile.attack.eps, dtype=torch.float64)[:, None]
    return torch.where(paper.tensors["outcomes"] == Outcome.REJECTED, eps, torch.inf).amin(0)


def out_of_distribution_cell(model: Model, shape: tuple[int, ...], run: Run) -> NodeResult:
    """How many images of uniform noise a model declines (R21)."""

    def compute(_: Path) -> Computed:
        # The tag is an old name: another tag would draw other noise.
        draws = seeds.generator(run.seed, "strangers")
        noise = torch.rand(OUT_OF_DISTRIBUTION, *shape, generator=draws)
        return {
            "rejected": int((model.classifier.predict(noise) == REJECT).sum()),
            "n": OUT_OF_DISTRIBUTION,
        }, {}

    return run.cell(
        f"uniform noise, {model.name}",
        {"cell": "out of distribution", "model": model.key, "seed": run.seed},
        compute,
        0,
    )


def _config(
    kind: str, key: str, images: ImageSet, settings: dict[str, Any], run: Run
) -> dict[str, Any]:
    return {
        "cell": kind,
        "model": key,
        "images": images.fingerprint,
        "settings": settings,
        "seed": run.seed,
    }


def _work(profile: Profile, machines: bool) -> float:
    return PASS[machines] * profile.attack.steps * len(profile.attack.eps) / 2
