"""What an audit proves: images that no attack within a threat can make wrong and accepted."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final

import polars as pl
import torch
from pydantic import Field
from torch import Tensor

from demur.certificates import Prover, UnsoundBoundError
from demur.classifier import Classifier
from demur.data.images import to_float
from demur.evaluation.nodes import Inputs, Task
from demur.evaluation.on_images import OnImages
from demur.evaluation.store import Computed, NodeResult
from demur.goals import Evade
from demur.metrics import clopper_pearson
from demur.threat import ThreatModel

NORMS: Final = ("linf", "l2")

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


@dataclass(frozen=True)
class CertifiedRow:
    """The share of images that is proven at a threat: never wrong and accepted.

    Parameters
    ----------
    threat : str
    n : int
    proven, proven_low, proven_high : float
        The share, and its 95 % Clopper-Pearson interval over images.
    probability : float
        How sure each proof is: 1, or 1 - alpha by randomized smoothing.
    radius : float, optional
        The median of the certified radii in the norm of the threat.
    contradictions : int
        Images that randomized smoothing proved and an attack broke; they do not count as proven.
    methods : list of str
    unsupported : str, optional
        The layer without bounds: nothing is proven.
    """

    threat: str
    n: int
    proven: Share
    proven_low: Share
    proven_high: Share
    probability: Share
    methods: list[str]
    radius: float | None = None
    contradictions: int = 0
    unsupported: str | None = None


@dataclass(frozen=True, eq=False)
class Proofs(OnImages):
    """Certificates and certified radii of all images at a threat."""

    prover: Prover = field(default_factory=Prover)

    def task(self, shard: int, inputs: Inputs) -> Task:
        """Certify one shard."""
        shared = {"model": (inputs.key(self.on), inputs.model(self.on))}
        arguments = {**self.part(shard), "device": inputs.device, "prover": self.prover}
        return Task(proofs, arguments, shared)

    def kind_of_cost(self) -> str:
        """The methods, the threat and the size of the images."""
        return f"{self.prover!r} {self.threat} {self.images.image_shape}"

    def __str__(self) -> str:
        """Name the node for the progress line."""
        return f"{self.on.name}: certificates at {self.threat}"


def proofs(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    prover: Prover,
    device: str,
) -> Computed:
    """Certify some images."""
    model = model.to(device).eval()
    certificate, certified, radius = prover.proofs(model, to_float(images), labels, threat)
    found = {"certified": certified, "radius": radius, "probability": certificate.probability}
    return {"unsupported": certificate.unsupported or ""}, found


def certified_row(
    node: Proofs, found: Sequence[NodeResult], wrong: Sequence[int]
) -> tuple[CertifiedRow, Tensor, Tensor]:
    """Make the row of a threat.

    Parameters
    ----------
    node : Proofs
    found : sequence of NodeResult
        Of all shards.
    wrong : sequence of int
        Numbers of the images that an attack made wrong and accepted within the threat.

    Returns
    -------
    row : CertifiedRow
    certified, radius : Tensor of shape (n,)

    Raises
    ------
    UnsoundBoundError
        If an image is proven and broken.
    """
    certified = torch.cat([one.tensors["certified"] for one in found])
    radius = torch.cat([one.tensors["radius"] for one in found])
    probability = torch.cat([one.tensors["probability"] for one in found])
    broken = torch.zeros_like(certified)
    broken[torch.tensor(list(wrong), dtype=torch.int64)] = True
    both = certified & broken
    sure = bool((probability[certified] == 1).all())
    if sure and bool(both.any()):
        raise UnsoundBoundError(
            f"image {int(both.nonzero()[0])} is broken and proven at {node.threat}: a bound of "
            "demur is wrong. Please report the model and the image."
        )
    certified = certified & ~broken
    n = len(certified)
    count = int(certified.sum())
    low, high = clopper_pearson(count, n)
    known = radius[~radius.isnan()]
    row = CertifiedRow(
        str(node.threat),
        n,
        count / n,
        low,
        high,
        1.0 if sure else float(probability[probability > 0].min()),
        list(node.prover.methods),
        float(known.median()) if len(known) else None,
        int(both.sum()),
        next((str(one.values["unsupported"]) for one in found if one.values["unsupported"]), None),
    )
    return row, certified, radius


def with_certificates(
    records: pl.DataFrame, threat: ThreatModel, certified: Tensor, radius: Tensor
) -> pl.DataFrame:
    """Write certificates into the records of the attacks at a threat."""
    places = records["index"].cast(pl.Int64)
    flags = pl.Series(certified.tolist(), dtype=pl.Boolean).gather(places)
    known = pl.Series(radius.tolist(), dtype=pl.Float64).fill_nan(None).gather(places)
    here = (pl.col("norm") == threat.norm) & (pl.col("eps") == threat.eps)
    here = (here & (pl.col("goal") == repr(Evade()))).fill_null(False)
    return records.with_columns(
        certified=pl.when(here).then(flags).otherwise(pl.col("certified")),
        certified_radius=pl.when(here).then(known).otherwise(pl.col("certified_radius")),
    )


def provable(threats: Sequence[ThreatModel]) -> list[ThreatModel]:
    """Give the threats that certificates know: Linf and L2, with a finite eps."""
    found: list[Any] = [one for one in threats if one.norm in NORMS and one.eps is not None]
    return [one for one in found if one.eps < float("inf")]
