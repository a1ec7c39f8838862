"""The Carlini column of the background-class experiment: the smallest changes that break each model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

from demur import seeds
from demur.attacks import CarliniWagnerL2, Evade, Goal, Target
from demur.classifier import Classifier, outcomes
from demur.data import ImageSet
from demur.evaluation import NodeResult
from demur.evaluation.results import Measurement, Table
from demur.evaluation.store import Computed
from demur.experiments.background_class.attacked import ATTACK_WORK, DEFENDED, Trained
from demur.experiments.background_class.profile import CarliniProfile
from demur.experiments.cells import Run, passes
from demur.metrics import rates, spread
from demur.threat import ThreatModel

TARGETED, NEAREST, UNAWARE = (
    "targeted",
    "reject-aware, any wrong class",
    "targeted, unaware of the background",
)
"""The paper's attacker, whose target must win against every output; the nearest accepted error; an attacker that ignores the reject column."""

Found = Mapping[tuple[str, str], Sequence[NodeResult]]
"""(model, attacker) -> a cell for each split."""


def attackers(model: str) -> tuple[str, ...]:
    """The attackers of that model."""
    return (TARGETED, NEAREST, UNAWARE) if model == DEFENDED else (TARGETED, NEAREST)


class _KeysOnly(nn.Module):
    """A classifier without its reject column."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.classifier(images)
        return scores[:, : self.classifier.num_classes]


def carlini_cell(
    settings: CarliniProfile,
    model: Trained,
    attacker: str,
    images: ImageSet,
    seed: int,
    name: str,
    run: Run,
) -> NodeResult:
    """Attack a model with C&W's L2 attack; the whole model decides the outcomes, whatever the attacker saw."""

    def compute(_: Path) -> Computed:
        clean, labels = images.to_float(), images.labels
        others = (
            1
            + (
                seeds.uniform(seeds.image_keys(clean), (), seed, "targets")
                * (images.num_classes - 1)
            ).long()
        )
        goal: Goal = (
            Evade() if attacker == NEAREST else Target((labels + others) % images.num_classes)
        )
        whole = model.classifier
        seen = Classifier(_KeysOnly(whole), whole.num_classes) if attacker == UNAWARE else whole
        attack = CarliniWagnerL2(search_steps=settings.search_steps, steps=settings.steps)
        result = attack(seen, clean, labels, ThreatModel("l2", goal=goal))
        tensors = {
            "success": result.success,
            "distance": result.distance,
            "outcomes": outcomes(whole, result.candidates, labels),
        }
        return passes(result), tensors

    config = {
        "cell": "carlini, 2",  # the second way of searching, since the constant of a linear classifier begins it
        "model": model.key,
        "attacker": attacker,
        "settings": settings.model_dump(),
        "images": images.fingerprint,
        "seed": seed,
    }
    return run.cell(
        f"Carlini L2, {attacker}, on {name}", config, compute, work(settings) * len(images)
    )


def work(settings: CarliniProfile) -> float:
    """Units of work for an image: an attack in one step is one pass; most search steps end early."""
    return ATTACK_WORK * settings.steps * settings.search_steps / 4


def carlini_table(settings: CarliniProfile, found: Found) -> Table:
    """What the attack came to: success, what was rejected of what was sent, and the L2 of the successes."""
    rows: list[Measurement] = []
    for (model, attacker), cells in found.items():
        n = sum(len(cell.tensors["success"]) for cell in cells)
        lines = {
            "wrong and accepted": [
                100 * rates(cell.tensors["outcomes"]).error_rate for cell in cells
            ],
            "rejected": [100 * rates(cell.tensors["outcomes"]).rejection_rate for cell in cells],
        }
        for column, values in lines.items():
            over = spread(values)
            rows.append(
                Measurement(
                    row=model,
                    column=column,
                    group=attacker,
                    unit="%",
                    measured=over.mean,
                    sd=over.sd,
                    splits=over.n,
                    n=n,
                )
            )
        lengths = [cell.tensors["distance"][cell.tensors["success"]] for cell in cells]
        for column, how in (("median L2", torch.median), ("mean L2", torch.mean)):
            if not all(len(length) for length in lengths):
                rows.append(
                    Measurement(row=model, column=column, group=attacker, note="none was found")
                )
                continue
            over = spread([float(how(length)) for length in lengths])
            rows.append(
                Measurement(
                    row=model,
                    column=column,
                    group=attacker,
                    measured=over.mean,
                    sd=over.sd,
                    splits=over.n,
                    n=n,
                )
            )
        backwards = fmean(cell.values["backwards"] / len(cell.tensors["success"]) for cell in cells)
        rows.append(
            Measurement(
                row=model, column="gradients an image", group=attacker, measured=backwards, n=n
            )
        )
    note = (
        f"Carlini & Wagner's L2 attack, confidence 0, {settings.search_steps} search steps of at most {settings.steps} steps, on "
        f"{settings.per_class} test images of each class of each split, each with a random target. The "
        "targeted attacker is that of the paper's Table IV: its target must win against every output, "
        "the background included. The attacker unaware of the background attacks the scores of the "
        "key classes alone. Lengths are of the changes that the attacker counts as successes; "
        "outcomes are decided by the whole model."
    )
    return Table("Carlini & Wagner: the smallest changes", rows, note)


def success(found: Found, model: str, attacker: str) -> list[tuple[int, int]]:
    """(wrong and accepted, images) of each split, for Table IV."""
    return [
        (one.wrong, one.n)
        for one in (rates(cell.tensors["outcomes"]) for cell in found[model, attacker])
    ]
