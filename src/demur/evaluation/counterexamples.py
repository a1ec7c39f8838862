"""Counterexamples: the broken images of an audit, kept with their records."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import polars as pl
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from demur.data.messages import printable
from demur.errors import DemurError
from demur.evaluation.audit_plan import Step
from demur.evaluation.audit_results import within
from demur.evaluation.plan import Outputs
from demur.evaluation.records import (
    PLACE,
    SCHEMA,
    decoding_records,
    read_parquet,
    write_parquet,
)
from demur.untrusted import ARRAYS, decoding, opened
from demur.writing import replacing, writing

FOLDER: Final = "counterexamples"
RECORDS: Final = "records.parquet"
IN_ONE_FILE: Final = 500
"""Images of one file."""


@dataclass(frozen=True, eq=False)
class Counterexamples:
    """Broken images.

    Parameters
    ----------
    records : polars.DataFrame
        A row for each image and threat: the columns of a record, and `threat`.
    original, attacked : Tensor of shape (n, C, H, W), uint8
    """

    records: pl.DataFrame
    original: Tensor
    attacked: Tensor


def chosen(records: pl.DataFrame, steps: Sequence[Step]) -> pl.DataFrame:
    """Choose one broken image for each clean image and threat: the one with the smallest change
    that is still broken after it was stored in 8 bits. Other images are left out, and images whose
    answer is wrong without an attack.
    """
    clean = records.filter(pl.col("attack").is_null() & (pl.col("outcome") == "wrong"))
    records = records.join(clean, on=list(PLACE), how="anti")
    parts = []
    for threat in dict.fromkeys(step.threat for step in steps if step.threat is not None):
        rows = within(records, threat).filter(
            (pl.col("stored_outcome") == "wrong") & (pl.col("outcome") == "wrong") & pl.col("kept")
        )
        best = rows.sort(threat.norm, maintain_order=True).unique(
            list(PLACE), keep="first", maintain_order=True
        )
        parts.append(best.with_columns(threat=pl.lit(str(threat))))
    if not parts:
        return records.clear().with_columns(threat=pl.lit(""))
    # In the order of the store: a file of counterexamples then comes from few of its files.
    return pl.concat(parts).sort("threat", "node", "index", maintain_order=True)


def marked(records: pl.DataFrame, steps: Sequence[Step], outputs: Outputs) -> pl.DataFrame:
    """Add the column `kept`: whether the attacked image of a row is in the store."""
    kept = [outputs.keys.identity(one.node) for one in steps if one.node.keep == "broken"]
    return records.with_columns(kept=pl.col("node").is_in(kept))


def images_of(rows: pl.DataFrame, steps: Sequence[Step], outputs: Outputs) -> tuple[Tensor, Tensor]:
    """Read the original and the attacked images of some rows, in their order."""
    nodes = {outputs.keys.identity(step.node): step.node for step in steps}
    numbered = rows.select("node", "index").with_row_index("place")
    first = next(iter(nodes.values())).images
    shape = first.image_shape
    attacked = torch.zeros(len(rows), *shape, dtype=torch.uint8)
    for (name,), part in numbered.group_by("node"):
        node = nodes[str(name)]
        wanted: dict[int, list[int]] = {}  # two threats may show the same image
        for index, place in part.select("index", "place").iter_rows():
            wanted.setdefault(index, []).append(place)
        for shard in range(node.shards):
            start = node.rows(shard).start
            here = range(start, start + node.images_of(shard))
            if not any(index in here for index in wanted):
                continue
            tensors = outputs.result(node, shard).tensors
            for stored, row in zip(tensors["stored"], tensors["kept"].tolist(), strict=True):
                for place in wanted.get(start + row, ()):
                    attacked[place] = stored
    index = torch.tensor(rows["index"].to_list(), dtype=torch.int64)
    original = first.read(index) if len(index) else attacked
    return original, attacked


def save(rows: pl.DataFrame, steps: Sequence[Step], outputs: Outputs, folder: Path) -> None:
    """Write counterexamples into a folder, 500 images a file."""
    place = folder / FOLDER
    with writing(place):
        place.mkdir(parents=True, exist_ok=True)
        for old in place.glob("*.safetensors"):
            old.unlink()
    for number, start in enumerate(range(0, len(rows), IN_ONE_FILE)):
        part = rows.slice(start, IN_ONE_FILE)
        original, attacked = images_of(part, steps, outputs)
        with replacing(place / f"{number:05}.safetensors") as path:
            save_file({"original": original, "attacked": attacked}, path)
    write_parquet(rows.drop("kept"), place / RECORDS)


def load(folder: Path) -> Counterexamples:
    """Read the counterexamples of an audit.

    Raises
    ------
    DemurError
        If there are none, or a file is damaged.
    """
    place = folder / FOLDER
    path = place / RECORDS
    if not path.is_file():
        raise DemurError(f"{folder} holds no audit with counterexamples: there is no {path}.")
    try:
        with decoding_records(path):
            records = _checked(read_parquet(path))
        tensors = [_tensors(file) for file in sorted(place.glob("*.safetensors"))]
        original = torch.cat([one["original"] for one in tensors]) if tensors else torch.zeros(0)
        attacked = torch.cat([one["attacked"] for one in tensors]) if tensors else torch.zeros(0)
    except (DemurError, RuntimeError) as error:  # of tensors that do not fit each other
        said = printable(error)
        raise DemurError(f"the counterexamples in {place} are damaged: {said}") from error
    if len(records) != len(original) or original.shape != attacked.shape:
        raise DemurError(f"the counterexamples in {place} are damaged: their counts differ.")
    return Counterexamples(records, original, attacked)


def _checked(records: pl.DataFrame) -> pl.DataFrame:
    """Give the columns of a record, and `threat`; refuse values that no audit writes."""
    kinds = {**SCHEMA, "threat": pl.String()}
    rows = records.select(pl.col(name).cast(kind) for name, kind in kinds.items())
    needed = ("image", "index", "label", "threat", "outcome", "stored_outcome", "linf", "l2")
    if any(rows[name].null_count() for name in needed):
        raise ValueError("values are missing")
    if not bool((rows["label"] >= 0).all()):
        raise ValueError("labels are negative")
    if not bool(rows["image"].str.contains("^[0-9a-f]{4,64}$").all()):
        raise ValueError("a hash of an image is no hexadecimal number")
    return rows


def _tensors(path: Path) -> Mapping[str, Tensor]:
    with opened(path, ARRAYS), decoding(path, "images"):
        with safe_open(path, "pt") as file:
            found = {name: file.get_tensor(name) for name in ("original", "attacked")}
        if any(one.dtype != torch.uint8 or one.ndim != 4 for one in found.values()):
            raise ValueError("an image is no tensor of 8-bit numbers")
    return found
