"""Nodes: the kinds of work that an evaluation consists of.

A node is a frozen dataclass. Nodes refer to each other. The key of a node is derived from its
fields, from the keys of the nodes that it refers to, and from the code that it runs. The fields
`name` and `attacker` are labels: they are not part of the key.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import polars as pl
from torch import Tensor

from demur.classifier import Classifier
from demur.data.images import ImageSet
from demur.errors import DemurError
from demur.evaluation import scoring
from demur.evaluation.scoring import Recipe, Row
from demur.evaluation.store import Computed, NodeResult


def label(default: str = "") -> Any:
    """Make a field that is not part of the key."""
    return field(default=default, metadata={"label": True})


@dataclass(frozen=True)
class Task:
    """One call: a whole node, or the images of one shard.

    Parameters
    ----------
    function : callable
        A function of `scoring`.
    arguments : mapping
        Arguments of this call alone.
    shared : mapping of str to (str, object)
        Large arguments that several calls share, with their keys.
    """

    function: Callable[..., Computed]
    arguments: Mapping[str, Any]
    shared: Mapping[str, tuple[str, Any]] = field(default_factory=dict)


class Inputs(Protocol):
    """What a node may ask for: results of the nodes that it refers to."""

    @property
    def device(self) -> str:
        """Where to compute."""

    def key(self, node: "Node") -> str:
        """Give the key of a node."""

    def model(self, node: "ModelNode") -> Classifier:
        """Give a model, on the CPU or where it was used last."""

    def value(self, node: "Node") -> Any:
        """Give what a `Measure` gets of a node."""

    def attacked(self, node: "Node") -> Tensor:
        """Give the attacked images that a node keeps."""

    def result(self, node: "Node", shard: int) -> NodeResult:
        """Read the result of one shard of a node."""

    def checkpoint(self, node: "Node") -> str:
        """Give the path of a file for an unfinished training."""


@dataclass(frozen=True, eq=False)
class Node(ABC):
    """A piece of work."""

    def needs(self) -> tuple["Node", ...]:
        """Give the nodes that this one refers to."""
        values = (getattr(self, one.name) for one in dataclasses.fields(self))
        return tuple(_nodes(values))

    @property
    def shards(self) -> int:
        """The number of tasks."""
        return 1

    def images_of(self, shard: int) -> int:
        """Count the images of a shard."""
        return 1

    @abstractmethod
    def task(self, shard: int, inputs: Inputs) -> Task:
        """Give the call that computes a shard."""

    @abstractmethod
    def kind_of_cost(self) -> str:
        """Name what costs about the same for each image: earlier costs are looked up by it."""

    def __str__(self) -> str:
        """Name the node for the progress line."""
        return getattr(self, "name", "") or type(self).__name__


@dataclass(frozen=True, eq=False)
class ModelNode(Node):
    """A node that gives a model.

    Parameters
    ----------
    name : str
        What tables call the model. Different models of a plan need different names.
    """

    name: str = field(default="model", kw_only=True, metadata={"label": True})

    @abstractmethod
    def model(self, result: NodeResult | None) -> Classifier:
        """Make the model from the stored result, or without one if the node stores none."""


@dataclass(frozen=True, eq=False)
class Load(ModelNode):
    """A model that exists.

    Parameters
    ----------
    source : callable
        Makes the classifier. It is called where the model is needed.
    fingerprint : str
        A digest of the weights and of the source files that define the model.
    """

    source: Callable[[], Classifier] = field(metadata={"label": True})
    fingerprint: str

    @property
    def shards(self) -> int:
        """There is nothing to compute."""
        return 0

    def task(self, shard: int, inputs: Inputs) -> Task:
        """Raise an error: there is nothing to compute."""
        raise DemurError("a Load node has no tasks.")

    def kind_of_cost(self) -> str:
        """Nothing."""
        return "load"

    def model(self, result: NodeResult | None) -> Classifier:
        """Make the model."""
        return self.source().eval()


@dataclass(frozen=True, eq=False)
class Train(ModelNode):
    """A model that is made.

    Parameters
    ----------
    recipe : Recipe
        How.
    data : ImageSet
        The images to learn from.
    seed : int
    validation : ImageSet, optional
        Images that set thresholds.
    base : ModelNode, optional
        The model that this one begins with or wraps.
    """

    recipe: Recipe
    data: ImageSet
    seed: int
    validation: ImageSet | None = None
    base: ModelNode | None = None

    def images_of(self, shard: int) -> int:
        """Count the images to learn from."""
        return len(self.data)

    def task(self, shard: int, inputs: Inputs) -> Task:
        """Train."""
        shared: dict[str, tuple[str, Any]] = {"data": (self.data.fingerprint, self.data)}
        if self.validation is not None:
            shared["validation"] = (self.validation.fingerprint, self.validation)
        if self.base is not None:
            shared["base"] = (inputs.key(self.base), inputs.model(self.base))
        arguments = {
            "recipe": self.recipe,
            "seed": self.seed,
            "checkpoint": inputs.checkpoint(self),
            "device": inputs.device,
        }
        return Task(scoring.train, arguments, shared)

    def kind_of_cost(self) -> str:
        """The recipe, and the size of the images."""
        return f"{self.recipe!r} {tuple(self.data.images.shape[1:])}"

    def __str__(self) -> str:
        """Name the node for the progress line."""
        return f"train: {self.name}"

    def model(self, result: NodeResult | None) -> Classifier:
        """Build the model with the stored weights."""
        from demur.loading.bundles import restored

        assert result is not None
        return restored(result.values, result.tensors)

    def rows(self, result: NodeResult) -> list[Row]:
        """Give the figures that the recipe noted."""
        notes = result.values.get("notes", [])
        return [Row(name, value, len(self.data)) for name, value in notes]


@dataclass(frozen=True, eq=False)
class Measure(Node):
    """Measurements that are no records.

    Parameters
    ----------
    function : callable
        A function of a module. It gets what the inputs give: a classifier for a model, a polars
        frame of records for an evaluation, rows for another `Measure`, and any other value
        unchanged. It gives a sequence of `Row`.
    inputs : tuple
    name : str
    attacked : bool, default False
        Whether the function gets the attacked images of an evaluation instead of its records:
        a tensor (N, C, H, W), float32 where the evaluation keeps "exact" images, else uint8.
    """

    function: Callable[..., Sequence[Row]]
    inputs: tuple[Any, ...] = ()
    name: str = label("measurement")
    attacked: bool = False

    def task(self, shard: int, inputs: Inputs) -> Task:
        """Call the function."""
        given = [self._given(one, inputs) if isinstance(one, Node) else one for one in self.inputs]
        return Task(scoring.measure, {"function": self.function, "inputs": given})

    def _given(self, node: Node, inputs: Inputs) -> Any:
        gives_images = self.attacked and not isinstance(node, ModelNode | Measure)
        return inputs.attacked(node) if gives_images else inputs.value(node)

    def kind_of_cost(self) -> str:
        """The function."""
        return f"{self.function.__module__}.{self.function.__qualname__}"

    def rows(self, result: NodeResult) -> list[Row]:
        """Give the measurements."""
        return [Row(**row) for row in result.values["rows"]]


def measurements(rows: Sequence[tuple[str, Row]]) -> pl.DataFrame:
    """Make the table `measurements` from pairs of a node's name and a row."""
    schema = {
        "node": pl.String,
        "name": pl.String,
        "value": pl.Float64,
        "n": pl.Int64,
        "low": pl.Float64,
        "high": pl.Float64,
    }
    return pl.DataFrame([{"node": node, **vars(row)} for node, row in rows], schema=schema)


def _nodes(values: Iterator[Any] | Sequence[Any]) -> Iterator[Node]:
    for value in values:
        if isinstance(value, Node):
            yield value
        elif isinstance(value, tuple | list):
            yield from _nodes(value)
