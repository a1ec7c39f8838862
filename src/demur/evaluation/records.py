"""Records: one row for each attacked image. Tables, curves and warnings are queries over them."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import polars as pl
import torch
from torch import Tensor

from demur.evaluation.keys import Keys
from demur.evaluation.on_images import Evaluate, OnImages
from demur.evaluation.store import NodeResult
from demur.goals import Evade, Target
from demur.untrusted import ROWS, check_limit, decoding
from demur.writing import replacing

OUTCOMES: Final = ("correct", "rejected", "wrong")
"""In the order of `demur.Outcome`, from the best to the worst."""

ATTACKERS: Final = ("none", "defence-unaware", "defence-aware", "strongest")
"""From the weakest to the strongest."""

_OUTCOME = pl.Enum(OUTCOMES)

_TYPES: dict[str, Any] = {
    "dataset": pl.String,
    "split": pl.String,
    "repeat": pl.Int64,
    "index": pl.Int64,
    "image": pl.String,
    "label": pl.Int64,
    "prediction": pl.Int64,
    "outcome": _OUTCOME,
    "model": pl.String,
    "base": pl.String,
    "attacker": pl.String,
    "attack": pl.String,
    "norm": pl.String,
    "eps": pl.Float64,
    "goal": pl.String,
    "mask": pl.String,
    "by": pl.String,
    "success": pl.Boolean,
    "linf": pl.Float64,
    "l2": pl.Float64,
    "l1": pl.Float64,
    "l0": pl.Float64,
    "stored_outcome": _OUTCOME,
    "reject_margin": pl.Float64,
    "class_margin": pl.Float64,
    "forwards": pl.Int64,
    "backwards": pl.Int64,
    "zero_gradients": pl.Int64,
    "seconds": pl.Float64,
    "certified": pl.Boolean,
    "certified_radius": pl.Float64,
    "seed": pl.Int64,
    "code": pl.String,
    "node": pl.String,
}

SCHEMA: Final = pl.Schema(_TYPES)
"""The columns of a record.

==================================  ================================================================
`dataset`, `split`, `repeat`        where the image comes from
`index`, `image`                    its place in the data, and the digest of its pixels or its file
`label`, `prediction`               class numbers; a prediction of -1 is a rejection, a label of -1
                                    an image of no class
`outcome`                           "correct", "rejected" or "wrong" (wrong and accepted)
`model`, `base`                     name of the model, and of the undefended one it is compared with
`attacker`, `attack`                "none", "defence-unaware", "defence-aware" or "strongest"; the
                                    attack's repr
`norm`, `eps`, `goal`, `mask`       the threat; the digest of the mask
`by`                                of an ensemble, the attack that broke the image
`success`                           the goal was reached
`linf`, `l2`, `l1`, `l0`            sizes of the change
`stored_outcome`                    the outcome after the image was stored in 8 bits
`reject_margin`, `class_margin`     best class score minus reject score; score of the true class
                                    minus the best other one
`forwards`, `backwards`,            passes of the attack, and gradients that were zero
`zero_gradients`
`seconds`                           the mean over the images of the task
`certified`, `certified_radius`     from a `Certify` node
`seed`, `code`, `node`              the seed, the digest of the code, the key of the node
==================================  ================================================================
"""

PLACE: Final = ("dataset", "split", "repeat", "index", "image")
"""The columns that name an image."""

_PER_IMAGE: Final = (
    "prediction",
    "outcome",
    "success",
    "linf",
    "l2",
    "l1",
    "l0",
    "stored_outcome",
    "reject_margin",
    "class_margin",
    "forwards",
    "backwards",
    "zero_gradients",
    "certified",
    "certified_radius",
)


def frame(node: OnImages, results: Iterable[NodeResult], keys: Keys) -> pl.DataFrame:
    """Make the records of a node from the results of its shards."""
    parts = []
    for shard, result in enumerate(results):
        rows = node.rows(shard)
        count = node.images_of(shard)
        columns: dict[str, object] = {
            "index": range(rows.start, rows.stop),
            "image": node.images.hashes[rows],
            "label": node.images.labels[rows].tolist(),
            "seconds": [result.seconds / count] * count,
        }
        if each := getattr(node, "per_repeat", None):
            columns["repeat"] = [index // each for index in range(rows.start, rows.stop)]
        if node.threat is not None and isinstance(node.threat.eps, Tensor):
            columns["eps"] = node.threat.eps[rows].tolist()
        if node.threat is not None and isinstance(node.threat.goal, Target):
            # Each image may have a target of its own.
            goal = node.threat.goal
            each = range(rows.start, rows.stop)
            columns["goal"] = [_goal(goal.select(torch.tensor(row))) for row in each]
        if "by" in result.tensors:
            members = [name or None for name in result.values["by"]]
            columns["by"] = [members[place] for place in result.tensors["by"].tolist()]
        for name in _PER_IMAGE:
            if name in result.tensors:
                columns[name] = _values(name, result.tensors[name].tolist())
        parts.append(pl.DataFrame(columns, schema_overrides=_only(columns)))
    given = {name for part in parts for name in part.columns}
    constants = _constants(node, keys)
    literals = {name: constants.get(name) for name in SCHEMA if name not in given}
    columns_of = [pl.lit(value, dtype=SCHEMA[name]).alias(name) for name, value in literals.items()]
    return pl.concat(parts).with_columns(columns_of).select(list(SCHEMA))


def write_parquet(table: pl.DataFrame, path: Path) -> None:
    """Write a table, completely or not at all."""
    with replacing(path) as partial:
        table.write_parquet(partial)


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """Read a table. Its rows are counted before memory is allocated.

    Parameters
    ----------
    path : Path
    columns : sequence of str, optional
        Default: all columns.

    Raises
    ------
    DemurError
        If the file is missing, damaged, or has more rows than the limit.
    """
    with decoding_records(path):
        table = pl.scan_parquet(path, glob=False)
        check_limit(path, int(table.select(pl.len()).collect().item()), ROWS, "rows")
        return (table if columns is None else table.select(columns)).collect()


@contextmanager
def decoding_records(path: Path) -> Iterator[None]:
    """Turn each error of reading a table or changing its types into one line."""
    with decoding(path, "records of an audit"):
        try:
            yield
        except pl.exceptions.PanicException as error:  # which is no Exception
            raise ValueError(str(error)) from error


def worst_case(records: pl.DataFrame, by: Sequence[str] = ("model",)) -> pl.DataFrame:
    """Give the worst outcome of each image, over all rows that agree in `by`.

    Parameters
    ----------
    records : polars.DataFrame
    by : sequence of str, default ("model",)
        Columns that tell apart what is attacked.

    Returns
    -------
    polars.DataFrame
        Columns `by`, those that name the image, and "outcome".

    Examples
    --------
    >>> import polars as pl
    >>> same = {"dataset": "digits", "split": "test", "repeat": 0, "index": 0, "image": "ab"}
    >>> rows = [{**same, "model": "a", "outcome": o} for o in ("correct", "wrong")]
    >>> records = pl.DataFrame(rows, schema_overrides={"outcome": SCHEMA["outcome"]})
    >>> worst_case(records)["outcome"].to_list()
    ['wrong']
    """
    # The values of an enum are ordered as they are listed: the worst outcome is the largest.
    return records.group_by([*by, *PLACE], maintain_order=True).agg(pl.col("outcome").max())


def _constants(node: OnImages, keys: Keys) -> dict[str, object]:
    threat = node.threat
    evaluate = node if isinstance(node, Evaluate) else None
    base = evaluate.base if evaluate else None
    values: dict[str, object] = {
        "dataset": node.images.name,
        "split": evaluate.split if evaluate else "test",
        "repeat": evaluate.repeat if evaluate else 0,
        "model": node.scored_on.name,
        "base": base.name if base else None,
        "attacker": evaluate.attacker if evaluate else "none",
        "attack": repr(evaluate.attack) if evaluate and evaluate.attack else None,
        "seed": evaluate.seed if evaluate else 0,
        "code": keys.code(node),
        "node": keys.identity(node),
    }
    if threat is not None:
        values |= {"norm": threat.norm, "goal": _goal(threat.goal), "mask": None}
        if isinstance(threat.eps, float):
            values["eps"] = threat.eps
        if threat.mask is not None:
            values["mask"] = keys.content(threat.mask)[:16]
    return values


def _goal(goal: object) -> str:
    return "evade" if goal == Evade() else repr(goal)


def _values(name: str, values: list[object]) -> list[object]:
    if SCHEMA[name] == _OUTCOME:
        return [OUTCOMES[int(value)] for value in values]  # type: ignore[call-overload]
    return values


def _only(columns: dict[str, object]) -> dict[str, pl.DataType]:
    return {name: SCHEMA[name] for name in columns}
