"""Whether an attack had reached its end, and whether what it attacked is the model."""

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn

from demur.attacks.apgd import APGD
from demur.attacks.pgd import PGD
from demur.classifier import Classifier, decide
from demur.evaluation.selftests.constancy import clear, scores_with_gradients
from demur.evaluation.store import Computed
from demur.goals import Evade
from demur.threat import ThreatModel

LAST: Final = 0.1
"""Of the steps: the end, over which the loss should hardly change."""


@dataclass(frozen=True)
class Convergence:
    """Indicators 4 and 5 of Pintor et al. 2022, on the path of one attack.

    Incomplete optimisation: on images that the attack leaves unbroken, the running best of the loss
    is scaled to [0, 1] on the path. Its change over the last tenth of the steps (10 of 100) says
    how far the attack was from its end. Transfer failure: the decision on the final point, with
    gradients as the attack asks for it, differs from the decision of the model without.

    Parameters
    ----------
    attack : APGD or PGD
        Without restarts. It is run a second time on the images that it leaves.
    threat : ThreatModel

    Examples
    --------
    >>> from demur import Classifier, attacks
    >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    >>> probe = Convergence(attacks.PGD(steps=30), ThreatModel("linf", 0.001))
    >>> _, found = probe.run(Classifier(network, 3), images, labels, seed=0, batch_size=4)
    >>> found["change"].shape, bool(found["differs"].any())
    (torch.Size([4]), False)
    """

    title: ClassVar[str] = "incomplete optimisation, transfer failure"
    attack: APGD | PGD
    threat: ThreatModel

    def run(
        self, model: Classifier, images: Tensor, labels: Tensor, seed: int, batch_size: int
    ) -> Computed:
        """Give `change` (n,), the images that are `left` unbroken, and those that `differ`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of blind gradients: a check of its own counts them
            found = self.attack(
                model, images, labels, self.threat, seed=seed, batch_size=batch_size
            )
            left = ~found.success
            change = torch.zeros(len(images))
            some = torch.split(left.nonzero().flatten(), batch_size)
            for rows in some if bool(left.any()) else ():
                change[rows] = self._change(model, images[rows], labels[rows], seed)
        plain = model.scores(found.candidates, batch_size)
        asked = scores_with_gradients(model, found.candidates, batch_size)
        same = decide(plain, model.num_classes) == decide(asked, model.num_classes)
        return {}, {"change": change, "left": left, "differs": ~same & clear(plain) & clear(asked)}

    def _change(self, model: Classifier, images: Tensor, labels: Tensor, seed: int) -> Tensor:
        """Walk the whole path, and give the change of the loss (n,) at its end."""
        path = _Path(model, labels)
        watched = Classifier(path, model.num_classes, rejects=model.rejects)
        # It goes on where an image breaks, so that each gradient sees all images.
        walk = replace(self.attack, keep_maximizing=True)
        # Float32: the rounding of bfloat16 would look like a loss that still grows.
        options: Any = {"seed": seed, "batch_size": len(images), "precision": "float32"}
        walk(watched, images, labels, self.threat, **options)
        best = torch.stack(path.margins).cummax(0).values
        span = best[-1] - torch.stack(path.margins).amin(0)
        end = math.ceil(LAST * self.attack.steps)
        last = best[-1] - best[max(0, len(best) - 1 - end)]
        return torch.where(span > 0, last / span, 0.0)

    def passes(self) -> tuple[float, float]:
        """The gradients of the attack, twice, and the checks of its end."""
        return 3, 2 * self.attack.steps


class _Path(nn.Module):
    """A classifier that notes the margin of each image whenever a gradient is asked for."""

    def __init__(self, classifier: Classifier, labels: Tensor) -> None:
        super().__init__()
        self.classifier = classifier
        self.labels = labels
        self.margins: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.classifier(images)
        if torch.is_grad_enabled() and len(scores) == len(self.labels):
            seen = scores.detach().cpu().float()
            goal = Evade()
            self.margins.append(goal.margin(seen, self.labels, self.classifier.num_classes))
        return scores
