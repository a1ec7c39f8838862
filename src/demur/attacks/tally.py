"""What the members of an ensemble found so far: the worst of them counts, image by image."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from demur import seeds
from demur.attacks.frozen import frozen
from demur.attacks.result import AttackResult
from demur.classifier import Classifier, device_of
from demur.goals import Goal
from demur.hardware import tuned


@dataclass
class Tally:
    """The worst of the attacks so far, for each image.

    `margins` says how close the best failure came: the margin of the best wanted column.
    """

    best: AttackResult
    margins: Tensor
    by: list[str]

    @classmethod
    def of(cls, images: Tensor) -> "Tally":
        """Begin with the clean images."""
        count = len(images)
        device = images.device
        infinite = torch.full((count,), torch.inf, dtype=torch.float64, device=device)
        nothing = torch.zeros(count, dtype=torch.bool, device=device)
        zeros = torch.zeros(count, dtype=torch.int64, device=device)
        best = AttackResult(images, nothing, images, infinite, zeros, zeros, zeros)
        margins = torch.full((count,), -torch.inf, device=device)
        return cls(best, margins, [""] * count)

    def left(self, bounded: bool) -> Tensor:
        """Give the indices of the images that the next attack meets."""
        if bounded:
            return (~self.best.success).nonzero().flatten()
        return torch.arange(len(self.by), device=self.margins.device)

    def add(self, rows: Tensor, found: AttackResult, margins: Tensor, name: str) -> None:
        """Keep what is better than the best: successes, smaller ones, and closer failures."""
        best = self.best
        better = found.success & (found.distance < best.distance[rows])
        closer = margins > self.margins[rows]
        sent = better | (closer & ~best.success[rows])
        merged = {one.name: getattr(best, one.name).clone() for one in fields(AttackResult)}
        for key in ("images", "success", "distance"):
            merged[key][rows[better]] = getattr(found, key)[better]
        merged["candidates"][rows[sent]] = found.candidates[sent]
        for key in ("forwards", "backwards", "zero_gradients"):
            merged[key][rows] += getattr(found, key)
        self.best = AttackResult(**merged)
        self.margins[rows] = self.margins[rows].maximum(margins)
        for place in rows[better].tolist():
            self.by[place] = name


@torch.no_grad()
def margins_of(
    classifier: Classifier, goal: Goal, result: AttackResult, labels: Tensor, batch_size: int
) -> Tensor:
    """Compute the margin of each failure (N,), infinite for successes. It is no attacker's pass."""
    device = device_of(classifier, labels.device)
    images = result.candidates
    margins = torch.full((len(images),), torch.inf, device=images.device)
    float32 = torch.autocast(device.type, enabled=False)
    with frozen(classifier), tuned(), float32, torch.random.fork_rng():
        torch.manual_seed(seeds.derive(0, "margins"))
        for rows in torch.split((~result.success).nonzero().flatten(), batch_size):
            if not len(rows):
                break
            scores = classifier(images[rows].to(device))
            own = labels[rows].to(device, torch.int64)
            reach = goal.select(rows).margin(scores, own, classifier.num_classes)
            margins[rows] = reach.to(margins).nan_to_num(nan=-torch.inf)
    return margins
