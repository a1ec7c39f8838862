"""Plans: nodes are computed once, in the order of what they need, and found again later."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl
import torch
from torch import Tensor

from demur.classifier import Classifier
from demur.errors import DemurError
from demur.evaluation.costs import Costs
from demur.evaluation.engines import Engine
from demur.evaluation.keys import Environment, Keys
from demur.evaluation.nodes import Measure, ModelNode, Node, Train, measurements
from demur.evaluation.on_images import OnImages
from demur.evaluation.records import SCHEMA, frame
from demur.evaluation.results import CellCost
from demur.evaluation.scoring import Row
from demur.evaluation.store import NodeResult, Store, computed
from demur.files import digest
from demur.progress import job


@dataclass
class Outputs:
    """The results of a plan. Models and tables are read from the store when they are asked for."""

    store: Store
    keys: Keys
    nodes: tuple[Node, ...]
    stale: dict[str, str] = field(default_factory=dict)
    """Keys of stale results that were used again, by the keys that they stand for."""
    _models: dict[str, Classifier] = field(default_factory=dict)

    @property
    def device(self) -> str:
        """Where to compute."""
        return self.keys.environment.device

    def key(self, node: Node) -> str:
        """Give the key of a node."""
        return self.keys.of(node)

    def part_key(self, node: Node, shard: int) -> str:
        """Give the key of a shard in the store."""
        return f"{self.key(node)}-{shard}"

    def checkpoint(self, node: Node) -> str:
        """Give the path of a file for an unfinished training."""
        return str(self.store.folder / f"{self.key(node)}.checkpoint")

    def complete(self, node: Node) -> bool:
        """Say whether all shards of a node are stored."""
        keys = [self.part_key(node, shard) for shard in range(node.shards)]
        return all(self.store.path(self.stale.get(key, key)).exists() for key in keys)

    def result(self, node: Node, shard: int = 0) -> NodeResult:
        """Read the result of a shard."""
        key = self.part_key(node, shard)
        found = self.store.read(self.stale.get(key, key))
        if found is None:
            raise DemurError(
                f"the result {key} of {node} disappeared from {self.store.folder} during the run. "
                "Run the same command again."
            )
        return found

    def model(self, node: ModelNode) -> Classifier:
        """Give a model in evaluation mode."""
        key = self.key(node)
        if key not in self._models:
            self._models[key] = node.model(self.result(node) if node.shards else None)
        return self._models[key]

    def value(self, node: Node) -> Any:
        """Give what a `Measure` gets of a node."""
        if isinstance(node, ModelNode):
            return self.model(node)
        if isinstance(node, OnImages):
            return self.records([node])
        assert isinstance(node, Measure)
        return node.rows(self.result(node))

    def attacked(self, node: Node) -> Tensor:
        """Give the attacked images (N, C, H, W) of an evaluation that keeps all of them: float32
        where they are exact, else uint8.
        """
        parts = [self.result(node, shard).tensors for shard in range(node.shards)]
        return torch.cat([part.get("candidates", part["stored"]) for part in parts])

    def records(self, nodes: Iterable[Node] | None = None) -> pl.DataFrame:
        """Give the records of some nodes, or of all nodes of the plan."""
        asked = self.nodes if nodes is None else nodes
        chosen = [one for one in asked if isinstance(one, OnImages)]
        self._check_names(chosen)
        frames = [
            frame(node, (self.result(node, shard) for shard in range(node.shards)), self.keys)
            for node in chosen
        ]
        return pl.concat(frames) if frames else pl.DataFrame(schema=SCHEMA)

    def _check_names(self, nodes: Iterable[OnImages]) -> None:
        """Refuse two models of one name: tables would mix them. Each repetition has its own."""
        models: dict[tuple[str, int], str] = {}
        for node in nodes:
            model = node.scored_on
            place = model.name, getattr(node, "repeat", 0)
            if models.setdefault(place, self.key(model)) != self.key(model):
                raise DemurError(f"two models of the plan are called {model.name!r}.")

    def measurements(self) -> pl.DataFrame:
        """Give the table of all measurements."""
        rows: list[tuple[str, Row]] = []
        for node in self.nodes:
            if isinstance(node, Measure | Train):
                rows += [(node.name, row) for row in node.rows(self.result(node))]
        return measurements(rows)

    def costs(self) -> list[CellCost]:
        """Give what each complete node cost when it was computed."""
        found = {}
        for node in filter(self.complete, ordered(self.nodes)):
            if not node.shards:
                continue
            seconds = 0.0
            passes: dict[str, int] = {}
            for part in (self.result(node, shard) for shard in range(node.shards)):
                seconds += part.seconds
                for name in ("forwards", "backwards"):
                    if name in part.tensors:
                        passes[name] = passes.get(name, 0) + int(part.tensors[name].sum())
            found[self.key(node)] = CellCost(str(node), round(seconds, 3), **passes)
        return list(found.values())


def execute(
    nodes: Sequence[Node],
    store: Store,
    engine: Engine,
    environment: Environment,
    *,
    reuse_stale: bool = False,
    title: str = "evaluation",
    expected: Callable[[Node], float] | None = None,
    until: float = math.inf,
) -> Outputs:
    """Compute what is not in the store.

    Parameters
    ----------
    nodes : sequence of Node
        The plan. Nodes that these refer to are computed too.
    store : Store
    engine : Engine
        It is closed at the end.
    environment : Environment
    reuse_stale : bool, default False
        Whether results of earlier code are used again. `Outputs.stale` names them.
    title : str
        For the progress bar.
    expected : callable, optional
        Seconds for one image of a node, where no similar node was computed before.
    until : float, default inf
        No task starts after this time of `time.monotonic()`, but for those of the first node.
        `Outputs.complete` then says which nodes have their results; the same call goes on with the
        others.

    Returns
    -------
    Outputs
    """
    keys = Keys(environment)
    order = ordered(nodes)
    outputs = Outputs(store, keys, tuple(nodes))
    missing = _missing(order, outputs, reuse_stale)
    costs = Costs(store.folder)
    amounts = {
        (node, shard): costs.estimate(node, node.images_of(shard), expected)
        for node, shard in missing
    }
    try:
        with job(title, sum(amounts.values())) as progress:
            for node, shard, seconds in _computed(missing, outputs, engine, until):
                costs.add(node, node.images_of(shard), seconds)
                progress.advance(amounts[node, shard], str(node))
    finally:
        engine.close()
    return outputs


def ordered(nodes: Iterable[Node]) -> list[Node]:
    """Give the nodes and all that they need, each after what it needs."""
    found: dict[int, Node] = {}

    def visit(node: Node) -> None:
        if id(node) not in found:
            for before in node.needs():
                visit(before)
            found[id(node)] = node

    for node in nodes:
        visit(node)
    return list(found.values())


def estimate(nodes: Sequence[Node], store: Store, environment: Environment) -> float:
    """Estimate the seconds that `execute` will take, from what similar nodes cost before."""
    outputs = Outputs(store, Keys(environment), tuple(nodes))
    costs = Costs(store.folder)
    missing = _missing(ordered(nodes), outputs, reuse_stale=False)
    return sum(costs.estimate(node, node.images_of(shard)) for node, shard in missing)


def _missing(order: Sequence[Node], outputs: Outputs, reuse_stale: bool) -> list[tuple[Node, int]]:
    """Give the shards that must be computed. A node that two others describe counts once."""
    missing = []
    seen = set()
    for node in order:
        for shard in range(node.shards):
            key = outputs.part_key(node, shard)
            if key in seen:
                continue
            seen.add(key)
            if outputs.store.read(key) is not None:
                continue
            if reuse_stale and (old := _stale(node, shard, outputs)):
                outputs.stale[key] = old
                continue
            missing.append((node, shard))
    return missing


def _stale(node: Node, shard: int, outputs: Outputs) -> str | None:
    prefix = outputs.keys.identity(node)
    old = outputs.store.newest(prefix, f"-{shard}")
    return old if old and outputs.store.read(old) else None


def _computed(
    missing: Sequence[tuple[Node, int]], outputs: Outputs, engine: Engine, until: float
) -> Iterable[tuple[Node, int, float]]:
    """Compute the shards and store them, each as soon as it has what it needs."""
    waiting = dict(enumerate(missing))
    left = {number: outputs.part_key(*waiting[number]) for number in waiting}
    running: dict[int, tuple[Node, int]] = {}
    while waiting or running:
        blocked = {key.rsplit("-", 1)[0] for key in left.values()}
        for number, (node, shard) in list(waiting.items()):
            if len(running) >= engine.capacity:
                break
            if time.monotonic() > until and node is not outputs.nodes[0]:
                continue
            if any(outputs.key(before) in blocked for before in node.needs()):
                continue
            engine.submit(number, node.task(shard, outputs))
            running[number] = waiting.pop(number)
        if not running:
            return  # the time is over
        number, found, seconds = engine.next()
        node, shard = running.pop(number)
        key = _key_to_store(node, shard, outputs)
        del left[number]
        outputs.store.write(computed(key, found, seconds), {"node": str(node)})
        yield node, shard, seconds


def _key_to_store(node: Node, shard: int, outputs: Outputs) -> str:
    """Give the key of a new result: another one where it was made from a stale result."""
    key = outputs.part_key(node, shard)
    made_from = [outputs.part_key(one, part) for one in node.needs() for part in range(one.shards)]
    stale = [outputs.stale[one] for one in made_from if one in outputs.stale]
    if not stale:
        return key
    code = digest(outputs.keys.code(node), *sorted(stale))[:16]
    outputs.stale[key] = f"{outputs.keys.identity(node)}-{code}-{shard}"
    return outputs.stale[key]
