"""Certificates as a value, for the evaluation engine."""

from dataclasses import dataclass

import torch
from torch import Tensor

from demur.certificates.certify import AT_ONCE, certify
from demur.certificates.problem import METHODS, SPLITS
from demur.certificates.radius import certified_radius
from demur.certificates.status import Certificate, Status
from demur.classifier import Classifier
from demur.threat import ThreatModel


@dataclass(frozen=True)
class Prover:
    """How images are certified: the method of a `Certify` node.

    Parameters
    ----------
    methods : tuple of str, default ("ibp", "crown-ibp", "crown")
        As for `certify`.
    steps : int, default 8
        Halvings for the certified radius. 0: no radius.
    batch_size : int, default 32
    splits : int, default 100
        As for `certify`; the radius is computed with the default.

    Examples
    --------
    >>> from demur import Classifier, ThreatModel
    >>> module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(2, 2, bias=False))
    >>> with torch.no_grad():
    ...     _ = module[1].weight.copy_(torch.eye(2))
    >>> images, threat = torch.tensor([0.75, 0.25]).view(1, 1, 1, 2), ThreatModel("linf", 0.2)
    >>> Prover(("ibp",)).certify(Classifier(module, 2), images, torch.tensor([0]), threat)
    (tensor([True]), tensor([0.2461], dtype=torch.float64))
    """

    methods: tuple[str, ...] = METHODS
    steps: int = 8
    batch_size: int = AT_ONCE
    splits: int = SPLITS

    def certify(
        self, classifier: Classifier, images: Tensor, labels: Tensor, threat: ThreatModel
    ) -> tuple[Tensor, Tensor]:
        """Give, for each image, whether it is certified (N,), and the certified radius (N,)."""
        return self.proofs(classifier, images, labels, threat)[1:]

    def proofs(
        self, classifier: Classifier, images: Tensor, labels: Tensor, threat: ThreatModel
    ) -> tuple[Certificate, Tensor, Tensor]:
        """Give the certificate, too. The radius is NaN where none was computed."""
        found = certify(
            classifier,
            images,
            labels,
            threat,
            self.methods,
            batch_size=self.batch_size,
            splits=self.splits,
        )
        certified = found.status == Status.CERTIFIED
        radius = torch.full((len(images),), torch.nan, dtype=torch.float64)
        smoothed = getattr(classifier.module, "smoothed_radii", None)
        if self.steps and found.unsupported is None and not callable(smoothed):
            radius = certified_radius(
                classifier,
                images,
                labels,
                threat.norm,
                methods=self.methods,
                goal=threat.goal,
                mask=threat.mask,
                steps=self.steps,
                batch_size=self.batch_size,
            )
        return found, certified, radius
