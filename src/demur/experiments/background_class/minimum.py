"""The Carlini column of the background-class experiment: how small a change breaks each model, and who notices."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

from demur import attacks, seeds
from demur.attacks import Evade, Goal, Target
from demur.classifier import Classifier, outcomes
from demur.data import ImageSet
from demur.evaluation import Cell, rates, spread
from demur.evaluation.ledger import Computed
from demur.experiments.background_class.attacked import ATTACK_WORK, DEFENDED, Trained
from demur.experiments.background_class.profile import CarliniProfile
from demur.experiments.cells import Run
from demur.experiments.results import Figure, Table

TARGETED, NEAREST, UNAWARE = "targeted", "reject-aware, any wrong class", "targeted, unaware of the background"
"""The paper's attacker, whose target must win against every output; the nearest accepted error; one who does not see the reject column."""

Found = Mapping[tuple[str, str], Sequence[Cell]]
"""(model, attacker) -> a cell for each split."""


def attackers(model: str) -> tuple[str, ...]:
    """Who attacks that model."""
    return (TARGETED, NEAREST, UNAWARE) if model == DEFENDED else (TARGETED, NEAREST)


class _KeysOnly(nn.Module):
    """A classifier without its reject column."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.classifier(images)
        return scores[:, : self.classifier.num_classes]


def carlini_cell(settings: CarliniProfile, model: Trained, attacker: str, images: ImageSet, seed: int, name: str, run: Run) -> Cell:
    """Attack a model with C&W's L2 attack; the images that were sent are judged by the whole model, whoever sent them."""

    def compute(_: Path) -> Computed:
        clean, labels = images.floats(), images.labels
        others = 1 + (seeds.uniform(seeds.image_keys(clean), (), seed, "targets") * (images.num_classes - 1)).long()
        goal: Goal = Evade() if attacker == NEAREST else Target((labels + others) % images.num_classes)
        whole = model.classifier
        seen = Classifier(_KeysOnly(whole), whole.num_classes) if attacker == UNAWARE else whole
        result = attacks.carlini_l2(seen, clean, labels, goal=goal, steps=settings.steps, search_steps=settings.search_steps)
        values = {"forwards": int(result.forwards.sum()), "backwards": int(result.backwards.sum()), "flat": int(result.flat.sum())}
        tensors = {"found": result.found, "distance": result.distance, "outcomes": outcomes(whole, result.attempts, labels)}
        return values, tensors

    config = {
        "cell": "carlini, 2",  # the second way of searching, since the constant of a linear classifier begins it
        "model": model.key,
        "attacker": attacker,
        "settings": settings.model_dump(),
        "images": images.fingerprint,
        "seed": seed,
    }
    return run.cell(f"Carlini L2, {attacker}, on {name}", config, compute, work(settings) * len(images))


def work(settings: CarliniProfile) -> float:
    """Units of work for an image: an attack in one step is one pass; most search steps end early."""
    return ATTACK_WORK * settings.steps * settings.search_steps / 4


def carlini_table(settings: CarliniProfile, found: Found) -> Table:
    """What the attack came to: success, what was rejected of what was sent, and the L2 of the successes."""
    rows: list[Figure] = []
    for (model, attacker), cells in found.items():
        n = sum(len(cell.tensors["found"]) for cell in cells)
        lines = {
            "wrong and accepted": [100 * rates(cell.tensors["outcomes"]).error_rate for cell in cells],
            "rejected": [100 * rates(cell.tensors["outcomes"]).rejection_rate for cell in cells],
        }
        for column, values in lines.items():
            over = spread(values)
            rows.append(Figure(row=model, column=column, group=attacker, unit="%", measured=over.mean, sd=over.sd, splits=over.n, n=n))
        lengths = [cell.tensors["distance"][cell.tensors["found"]] for cell in cells]
        for column, how in (("median L2", torch.median), ("mean L2", torch.mean)):
            if not all(len(length) for length in lengths):
                rows.append(Figure(row=model, column=column, group=attacker, note="none was found"))
                continue
            over = spread([float(how(length)) for length in lengths])
            rows.append(Figure(row=model, column=column, group=attacker, measured=over.mean, sd=over.sd, splits=over.n, n=n))
        passes = fmean(cell.values["backwards"] / len(cell.tensors["found"]) for cell in cells)
        rows.append(Figure(row=model, column="gradients an image", group=attacker, measured=passes, n=n))
    note = (
        f"Carlini & Wagner's L2 attack, confidence 0, {settings.search_steps} search steps of at most {settings.steps} steps, on "
        f"{settings.per_class} test images of each class of each split, each with a random target. The attacker of the paper's Table IV is "
        "the targeted one, whose target must win against every output, the background's too. The one unaware of the background attacks "
        "the key classes' scores alone. Lengths are of what the attacker takes for a success; what was sent is judged by the whole model."
    )
    return Table("Carlini & Wagner: the smallest changes", rows, note)


def success(found: Found, model: str, attacker: str) -> list[tuple[int, int]]:
    """(wrong and accepted, images) of each split, for Table IV."""
    return [(one.wrong, one.n) for one in (rates(cell.tensors["outcomes"]) for cell in found[model, attacker])]
