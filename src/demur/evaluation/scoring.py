"""What nodes compute. These functions run in this process or on a worker."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from demur import seeds
from demur.attacks.base import Attack
from demur.attacks.quantize import quantize_towards
from demur.classifier import Classifier, Outcome, decide, outcomes_of
from demur.data.images import ImageSet, to_float
from demur.defenses.saving import state_of
from demur.evaluation.store import Computed
from demur.norms import sizes
from demur.threat import ThreatModel

SCORED_AT_ONCE: Final = 512
"""Images of one forward pass, where a node says nothing of it."""


@dataclass(frozen=True)
class Row:
    """A measurement that is no record: a name, a value, and what bounds it."""

    name: str
    value: float | None
    n: int | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class TrainingInputs:
    """What a recipe makes a model from.

    Parameters
    ----------
    data : ImageSet
        Images to learn from.
    validation : ImageSet, optional
        Images that set thresholds.
    base : Classifier, optional
        A copy of the model that this one begins with or wraps, on the CPU.
    seed : int
    device : {"cpu", "cuda"}
    checkpoint : Path
        A file of its own, for a training that is killed and resumed.
    notes : dict
        The recipe may write figures of the training here: they become measurements.
    """

    data: ImageSet
    validation: ImageSet | None
    base: Classifier | None
    seed: int
    device: str
    checkpoint: Path
    notes: dict[str, float] = field(default_factory=dict)

    def options(self, epochs: int, batch_size: int) -> dict[str, Any]:
        """Give the arguments of `demur.training.fit` that do not depend on the recipe."""
        own = {"seed": self.seed, "device": self.device, "checkpoint": self.checkpoint}
        return {"epochs": epochs, "batch_size": batch_size, **own}


class Recipe(Protocol):
    """How a model is made: a frozen dataclass. Its fields and its code are part of the key."""

    def train(self, given: TrainingInputs) -> Classifier:
        """Make the model, on the device or on the CPU."""


class Certifier(Protocol):
    """A way to prove that no change within a threat alters the outcome: a frozen dataclass."""

    def certify(
        self, classifier: Classifier, images: Tensor, labels: Tensor, threat: ThreatModel
    ) -> tuple[Tensor, Tensor]:
        """Give, for each image, whether it is certified (N,), and the certified radius (N,)."""


def train(
    recipe: Recipe,
    seed: int,
    checkpoint: str,
    device: str,
    data: ImageSet,
    validation: ImageSet | None = None,
    base: Classifier | None = None,
) -> Computed:
    """Make a model. Its weights are stored contiguous, in whatever layout training left them."""
    # A copy: other nodes use the base model too, and a recipe may change it.
    own = None if base is None else copy.deepcopy(base).cpu()
    given = TrainingInputs(data, validation, own, seed, device, Path(checkpoint))
    values, tensors = state_of(recipe.train(given).cpu().eval())
    # As pairs: the keys of a stored mapping are sorted.
    return {**values, "notes": list(given.notes.items())}, tensors


def attack(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    attack: Attack | None,
    threat: ThreatModel | None,
    device: str,
    keep: str,
    options: Mapping[str, Any],
) -> Computed:
    """Attack some images (n, C, H, W), uint8, and score what the attack would send."""
    model = model.to(device).eval()
    clean = to_float(images)
    size = options.get("batch_size") or SCORED_AT_ONCE
    if attack is None or threat is None:
        return {}, _scored(model, clean, labels, clean, options["seed"], size)
    result = attack(model, clean, labels, threat, **options)
    columns = _scored(model, clean, labels, result.candidates, options["seed"], size)
    columns["success"] = result.success
    for name in ("forwards", "backwards", "zero_gradients"):
        columns[name] = getattr(result, name)
    values: dict[str, Any] = {}
    # Only an ensemble has these. Its class is not imported: a change in one attack must not change
    # the code of all nodes.
    by: tuple[str, ...] | None = getattr(result, "by", None)
    if by is not None:
        members = sorted(set(by))
        sampled = getattr(result, "sampled", None)
        values = {"by": members, "sampled": str(sampled or "")}
        values["bound"] = sampled.bound if sampled else 0.0
        columns["by"] = torch.tensor([members.index(name) for name in by])
    return values, {**columns, **_kept(result.candidates, clean, columns["outcome"], keep)}


def transfer(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    sent: Computed,
    threat: ThreatModel,
    device: str,
    keep: str,
    seed: int,
    batch_size: int | None,
) -> Computed:
    """Score images that were attacked on another model; `sent` is the result of that attack."""
    model = model.to(device).eval()
    clean = to_float(images)
    values, tensors = sent
    candidates = tensors["candidates"]
    with _seeded(seed):
        scores = model.scores(candidates, batch_size or SCORED_AT_ONCE)
    columns = _columns(model, clean, labels, candidates, scores, seed, batch_size or SCORED_AT_ONCE)
    columns["success"] = threat.goal.success(scores, labels, model.num_classes)
    if "by" in tensors:
        columns["by"] = tensors["by"]
    kept = _kept(candidates, clean, columns["outcome"], keep)
    return dict(values), {**columns, **kept}


def certify(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    method: Certifier,
    threat: ThreatModel,
    device: str,
) -> Computed:
    """Certify some images."""
    model = model.to(device).eval()
    clean = to_float(images)
    certified, radius = method.certify(model, clean, labels, threat)
    columns = _scored(model, clean, labels, clean, 0, SCORED_AT_ONCE)
    return {}, {**columns, "certified": certified, "certified_radius": radius}


def measure(function: Callable[..., Sequence[Row]], inputs: Sequence[Any]) -> Computed:
    """Compute measurements."""
    return {"rows": [vars(row) for row in function(*inputs)]}, {}


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Inside, a randomised model draws the same numbers each time (R10)."""
    with torch.random.fork_rng():
        torch.manual_seed(seeds.derive(seed, "scored"))
        yield


def _scored(
    model: Classifier, clean: Tensor, labels: Tensor, candidates: Tensor, seed: int, size: int
) -> dict[str, Tensor]:
    """Score the candidates, and compute the columns that every record has."""
    with _seeded(seed):
        scores = model.scores(candidates, size)
    return _columns(model, clean, labels, candidates, scores, seed, size)


def _columns(
    model: Classifier,
    clean: Tensor,
    labels: Tensor,
    candidates: Tensor,
    scores: Tensor,
    seed: int,
    size: int,
) -> dict[str, Tensor]:
    """Compute the columns that every record has from the scores of the candidates."""
    classes = scores[:, : model.num_classes]
    prediction = decide(scores, model.num_classes)
    stored = scores
    if candidates is not clean:
        with _seeded(seed):
            stored = model.scores(to_float(quantize_towards(candidates, clean)), size)
    columns = {
        "prediction": prediction.int(),
        "outcome": outcomes_of(prediction, labels).to(torch.uint8),
        "stored_outcome": outcomes_of(decide(stored, model.num_classes), labels).to(torch.uint8),
        "class_margin": _class_margin(classes, labels),
        **sizes(clean, candidates),
    }
    if scores.shape[1] > model.num_classes:
        columns["reject_margin"] = classes.amax(1) - scores[:, -1]
    return columns


def _class_margin(classes: Tensor, labels: Tensor) -> Tensor:
    """Compute the score of the true class minus the best other one; NaN without a true class."""
    known = labels.clamp(min=0)[:, None]
    others = classes.scatter(1, known, -torch.inf).amax(1)
    margin = classes.gather(1, known).flatten() - others
    return margin.masked_fill(labels < 0, torch.nan)


def _kept(candidates: Tensor, clean: Tensor, outcome: Tensor, keep: str) -> dict[str, Tensor]:
    """Give what is stored of the attacked images: `kept` are the rows of `stored` in the shard."""
    kept = {}
    if keep == "exact":
        kept["candidates"] = candidates
    if keep == "broken":
        rows = (outcome == int(Outcome.WRONG)).nonzero().flatten().cpu()
        kept["kept"] = rows
        kept["stored"] = quantize_towards(candidates[rows], clean[rows])
    elif keep != "nothing":
        kept["stored"] = quantize_towards(candidates, clean)
    return kept


def mean_row(name: str, values: Tensor) -> Row:
    """Measure the mean of values (n,), with its 95 % interval."""
    mean = float(values.double().mean())
    if len(values) < 2:
        return Row(name, mean, len(values))
    reach = 1.96 * float(values.double().std()) / len(values) ** 0.5
    return Row(name, mean, len(values), mean - reach, mean + reach)


def change_row(name: str, values: Tensor, base: Tensor) -> Row:
    """Measure by how many % the mean of values (n,) is above the mean of base (n,), which are of
    the same images, with its 95 % interval.
    """
    mean = float(base.double().mean())
    if mean == 0:
        return Row(name, None, len(values))
    ratio = float(values.double().mean()) / mean
    # The ratio is linear in the errors of both means, where these are small (the delta method).
    errors = (values.double() - ratio * base.double()) / mean
    return mean_row(name, 100 * (errors + ratio - 1))
