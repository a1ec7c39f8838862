"""Nodes that give a record for each image."""

import dataclasses
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch

from demur.attacks.base import Attack
from demur.data.image_source import ImageSource
from demur.errors import DemurError
from demur.evaluation import scoring
from demur.evaluation.nodes import Inputs, ModelNode, Node, Task, label
from demur.evaluation.scoring import Certifier
from demur.threat import ThreatModel

SHARD = 1000
"""Images of one task, at most."""

SHARD_BYTES = 64 << 20
"""Bytes of the pixels of one task in float32, at most; but at least one image."""

Keep = Literal["nothing", "stored", "broken", "exact"]


@dataclass(frozen=True, eq=False)
class OnImages(Node):
    """A node that gives a record for each image."""

    on: ModelNode
    images: ImageSource
    threat: ThreatModel | None

    @property
    def shard_size(self) -> int:
        """The images of a task. It depends on their shape alone, so that all engines agree."""
        in_bytes = 4 * math.prod(self.images.image_shape)
        return max(1, min(SHARD, SHARD_BYTES // in_bytes))

    @property
    def shards(self) -> int:
        """One task for every `shard_size` images."""
        return -(-len(self.images) // self.shard_size)

    def rows(self, shard: int) -> slice:
        """Give the images of a shard."""
        first = shard * self.shard_size
        return slice(first, first + self.images_of(shard))

    def images_of(self, shard: int) -> int:
        """Count the images of a shard."""
        size = self.shard_size
        return min(size, len(self.images) - shard * size)

    def part(self, shard: int) -> dict[str, Any]:
        """Give images, labels and threat of a shard. No other images are read."""
        rows = self.rows(shard)
        threat = self.threat
        if threat is not None:
            index = torch.arange(rows.start, rows.stop)
            # The shape of all images tells whether a mask has one part for each: one number is
            # expanded to it, without memory for the images.
            shape = (len(self.images), *self.images.image_shape)
            threat = threat.select(index, torch.zeros(1).expand(shape))
        images = {"images": self.images.read(rows), "labels": self.images.labels[rows]}
        return {**images, "threat": threat}

    @property
    def scored_on(self) -> ModelNode:
        """The model whose decisions are recorded."""
        return self.on


@dataclass(frozen=True, eq=False)
class Evaluate(OnImages):
    """An attack on images: a record for each image.

    Parameters
    ----------
    on : ModelNode
        The attacked model.
    images : ImageSource
    threat : ThreatModel, optional
        None without an attack.
    attack : Attack, optional
        None evaluates the clean images.
    through : ModelNode, optional
        The model that scores the attacked images, if it is not the attacked one. The attack is
        computed once for all of them.
    seed : int, default 0
    batch_size : int, optional
    keep : {"nothing", "stored", "broken", "exact"}, default "nothing"
        Which attacked images are stored: none, all in 8 bits, those of wrong answers in 8 bits, or
        all in 8 bits and in float32.
    base : ModelNode, optional
        The undefended model that the scored one is compared with.
    attacker : str
        "none", "defence-unaware", "defence-aware" or "strongest".
    split : str
    repeat : int
        Number of the repetition.
    per_repeat : int, optional
        With it, the images are those of several repetitions, so many of each, one after the other.
    self_test : str, optional
        The name of the self-test that it is a part of.
    """

    attack: Attack | None = None
    through: ModelNode | None = None
    seed: int = 0
    batch_size: int | None = None
    keep: Keep = "nothing"
    base: ModelNode | None = field(default=None, metadata={"label": True})
    attacker: str = label("none")
    split: str = label("test")
    repeat: int = field(default=0, metadata={"label": True})
    per_repeat: int | None = field(default=None, metadata={"label": True})
    self_test: str = label("")

    def __post_init__(self) -> None:
        if (self.attack is None) != (self.threat is None):
            raise DemurError("an attack needs a threat, and a threat needs an attack.")
        if self.through is not None and self.attack is None:
            raise DemurError("without an attack there is nothing to transfer.")

    @property
    def scored_on(self) -> ModelNode:
        """The model whose decisions are recorded."""
        return self.through or self.on

    def needs(self) -> tuple[Node, ...]:
        """Give the nodes that must be computed before."""
        if self.through is not None:
            return (self.sent, self.through)
        return (self.on,)

    @cached_property
    def sent(self) -> "Evaluate":
        """Give the attack on `on`, of which the images are scored on `through`."""
        return dataclasses.replace(self, through=None, keep="exact")

    def task(self, shard: int, inputs: Inputs) -> Task:
        """Attack one shard, or score the attacked images of another node."""
        scored_on = self.scored_on
        shared = {"model": (inputs.key(scored_on), inputs.model(scored_on))}
        arguments = {**self.part(shard), "device": inputs.device, "keep": self.keep}
        if self.through is not None:
            sent = inputs.result(self.sent, shard)
            given = {"sent": (sent.values, sent.tensors), "seed": self.seed}
            return Task(
                scoring.transfer, {**arguments, **given, "batch_size": self.batch_size}, shared
            )
        options: dict[str, Any] = {"seed": self.seed}
        if self.batch_size is not None:
            options["batch_size"] = self.batch_size
        return Task(
            scoring.attack, {**arguments, "attack": self.attack, "options": options}, shared
        )

    def kind_of_cost(self) -> str:
        """The attack, the threat and the size of the images."""
        shape = self.images.image_shape
        if self.attack is None or self.through is not None:
            return f"score {shape}"
        return f"{self.attack!r} {self.threat} {type(self.on).__name__} {shape}"

    def __str__(self) -> str:
        """Name the node for the progress line."""
        if self.self_test:
            return f"self-test: {self.self_test}"
        if self.attack is None:
            return f"{self.scored_on.name}: no attack"
        return f"{self.scored_on.name}: {self.attack} at {self.threat}"


@dataclass(frozen=True, eq=False)
class Certify(OnImages):
    """A certificate for each image: a record with `certified` and `certified_radius`.

    Parameters
    ----------
    on : ModelNode
    images : ImageSource
    threat : ThreatModel
        What is proven harmless.
    method : Certifier
        How.
    """

    method: Certifier

    def task(self, shard: int, inputs: Inputs) -> Task:
        """Certify one shard."""
        shared = {"model": (inputs.key(self.on), inputs.model(self.on))}
        arguments = {**self.part(shard), "device": inputs.device, "method": self.method}
        return Task(scoring.certify, arguments, shared)

    def kind_of_cost(self) -> str:
        """The method, the threat and the size of the images."""
        return f"{self.method!r} {self.threat} {self.images.image_shape}"
