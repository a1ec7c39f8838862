"""Other inputs than attacked ones: errors among the surest answers, and images of no class."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Final

import torch
from pydantic import Field
from torch import Tensor

from demur import seeds
from demur.classifier import Classifier, decide, outcomes_of
from demur.data.corruptions import SEVERITIES, corrupt
from demur.data.images import to_float
from demur.evaluation.nodes import Inputs, Task
from demur.evaluation.on_images import OnImages
from demur.evaluation.store import Computed, NodeResult
from demur.metrics import aurc, clopper_pearson, rates, risk_coverage
from demur.metrics.rejection import auroc

CONFIDENCE: Final = 0.95
"""Of each one-sided bound of the area under the risk-coverage curve."""
RESAMPLES: Final = 400
POINTS: Final = 101
"""Of the curve that is stored."""
AT_ONCE: Final = 128

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


@dataclass(frozen=True)
class OutOfDistribution:
    """Images of none of the classes, without an attack.

    Parameters
    ----------
    name : str
    n : int
    accepted, accepted_low, accepted_high : float
        The share that the model answers with a class, with the threshold as it is, and its 95 %
        Clopper-Pearson interval. A model without a rejection accepts all.
    auroc : float
        Probability that an image of the audit gets the larger confidence.
    """

    name: str
    n: int
    accepted: Share
    accepted_low: Share
    accepted_high: Share
    auroc: Share


@dataclass(frozen=True)
class CorruptionRow:
    """Shares of the three outcomes on images that are corrupted, without an attacker.

    Parameters
    ----------
    family : str
        One of `demur.data.CORRUPTIONS`.
    severity : int
        1 to 5.
    n : int
    correct, rejected, wrong : float
        Shares in [0, 1].
    wrong_low, wrong_high : float
        The 95 % Clopper-Pearson interval.
    """

    family: str
    severity: int
    n: int
    correct: Share
    rejected: Share
    wrong: Share
    wrong_low: Share
    wrong_high: Share


@dataclass(frozen=True)
class OtherInputs:
    """What a model does without an attack.

    Parameters
    ----------
    confidence : str
        "reject margin" (best class score minus reject score) or "max-prob".
    n : int
        Images of the audit.
    aurc, aurc_low, aurc_high : float
        Area under the risk-coverage curve, with one-sided 95 % bounds of a bootstrap over images.
    coverage, risk : list of float
        The curve, at up to 101 points.
    ood : OutOfDistribution, optional
    corruptions : list of CorruptionRow
        A row for each family and severity; empty if they were not asked for.
    """

    confidence: str
    n: int
    aurc: Share
    aurc_low: Share
    aurc_high: Share
    coverage: list[float]
    risk: list[float]
    ood: OutOfDistribution | None = None
    corruptions: list[CorruptionRow] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Answers(OnImages):
    """Confidence and decision on each image, without an attack.

    The confidence is the reject margin of a model that rejects, else the largest probability.
    """

    seed: int = 0
    batch_size: int | None = None

    def task(self, shard: int, inputs: Inputs) -> Task:
        """Score one shard."""
        given = self.part(shard)
        arguments = {
            "images": given["images"],
            "labels": given["labels"],
            "device": inputs.device,
            "seed": self.seed,
            "batch_size": self.batch_size or AT_ONCE,
        }
        return Task(answers, arguments, {"model": (inputs.key(self.on), inputs.model(self.on))})

    def kind_of_cost(self) -> str:
        """The size of the images."""
        return f"answers {self.images.image_shape}"

    def __str__(self) -> str:
        """Name the node for the progress line."""
        return f"{self.on.name}: confidence on {self.images.name}"


def answers(
    model: Classifier, images: Tensor, labels: Tensor, device: str, seed: int, batch_size: int
) -> Computed:
    """Give the confidence, whether the best class is right, and whether it is accepted: (n,)."""
    model = model.to(device).eval()
    with torch.random.fork_rng():
        torch.manual_seed(seeds.derive(seed, "answers"))
        scores = model.scores(to_float(images), batch_size)
    classes = scores[:, : model.num_classes]
    rejects = scores.shape[1] > model.num_classes
    confidence = classes.amax(1) - scores[:, -1] if rejects else classes.softmax(1).amax(1)
    found = {
        "confidence": confidence,
        "right": classes.argmax(1) == labels,
        "accepted": decide(scores, model.num_classes) >= 0,
    }
    return {"rejects": rejects}, found


@dataclass(frozen=True, eq=False)
class Corrupted(OnImages):
    """Outcomes on the images of one family of corruptions, at all severities."""

    family: str = ""
    seed: int = 0
    batch_size: int | None = None

    def task(self, shard: int, inputs: Inputs) -> Task:
        """Corrupt and score one shard."""
        given = self.part(shard)
        arguments = {
            "images": given["images"],
            "labels": given["labels"],
            "family": self.family,
            "device": inputs.device,
            "seed": self.seed,
            "batch_size": self.batch_size or AT_ONCE,
        }
        return Task(corrupted, arguments, {"model": (inputs.key(self.on), inputs.model(self.on))})

    def kind_of_cost(self) -> str:
        """The family and the size of the images."""
        return f"{self.family} {self.images.image_shape}"

    def __str__(self) -> str:
        """Name the node for the progress line."""
        return f"{self.on.name}: {self.family}"


def corrupted(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    family: str,
    device: str,
    seed: int,
    batch_size: int,
) -> Computed:
    """Give the outcome (n, 5) of each image at each severity."""
    model = model.to(device).eval()
    clean = to_float(images)
    columns = []
    with torch.random.fork_rng():
        torch.manual_seed(seeds.derive(seed, "corrupted"))
        for severity in SEVERITIES:
            scores = model.scores(corrupt(clean, family, severity, seed), batch_size)
            columns.append(outcomes_of(decide(scores, model.num_classes), labels))
    return {}, {"outcomes": torch.stack(columns, 1).to(torch.uint8)}


def corruption_rows(family: str, results: Sequence[NodeResult]) -> list[CorruptionRow]:
    """Count the outcomes of a family at each severity."""
    found = _joined(results, "outcomes")
    rows = []
    for severity, column in zip(SEVERITIES, found.T, strict=True):
        counted = rates(column.long())
        low, high = clopper_pearson(counted.wrong, counted.n)
        n = counted.n
        rows.append(
            CorruptionRow(
                family,
                severity,
                n,
                correct=counted.correct / n,
                rejected=counted.rejected / n,
                wrong=counted.wrong / n,
                wrong_low=low,
                wrong_high=high,
            )
        )
    return rows


def other_inputs(
    own: Sequence[NodeResult], ood: Sequence[NodeResult], name: str, seed: int
) -> OtherInputs:
    """Make the figures from the answers.

    Parameters
    ----------
    own, ood : sequence of NodeResult
        Of the images of the audit, and of images of none of the classes; the latter may be empty.
    name : str
        Of these images.
    seed : int
        Of the bootstrap.
    """
    confidence, right = _joined(own, "confidence"), _joined(own, "right")
    n = len(right)
    generator = seeds.generator(seed, "bootstrap")
    areas = []
    for _ in range(RESAMPLES):
        rows = torch.randint(n, (n,), generator=generator)
        areas.append(aurc(confidence[rows], right[rows]))
    sides = torch.tensor([1 - CONFIDENCE, CONFIDENCE], dtype=torch.float64)
    low, high = torch.tensor(areas, dtype=torch.float64).quantile(sides).tolist()
    risk = risk_coverage(confidence, right)
    places = torch.linspace(0, n - 1, min(n, POINTS)).round().long()
    area = float(risk.mean())
    return OtherInputs(
        confidence="reject margin" if own[0].values["rejects"] else "max-prob",
        n=n,
        aurc=area,
        aurc_low=min(low, area),
        aurc_high=max(high, area),
        coverage=((places + 1) / n).tolist(),
        risk=risk[places].tolist(),
        ood=_ood(confidence, ood, name) if ood else None,
    )


def _ood(confidence: Tensor, results: Sequence[NodeResult], name: str) -> OutOfDistribution:
    accepted = _joined(results, "accepted")
    n = len(accepted)
    count = int(accepted.sum())
    low, high = clopper_pearson(count, n)
    other = _joined(results, "confidence")
    return OutOfDistribution(name, n, count / n, low, high, auroc(confidence, other))


def _joined(results: Sequence[NodeResult], name: str) -> Tensor:
    return torch.cat([one.tensors[name] for one in results])
