"""What is asked for, and what the reader of a source gives back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from demur.classifier import Classifier, Preprocess, check_counts
from demur.errors import DemurError
from demur.loading.preprocessing import PreprocessOverrides

RejectColumn = Literal["last"] | int | None
OPTIONS: Mapping[str, Any] = {
    "network": None,
    "arch": None,
    "checkpoint": None,
    "num_classes": None,
    "reject_column": None,
    "model_kwargs": {},
    "preprocess": None,
    "allow_pickle": False,
}
"""The options of `load_model`, with their defaults."""


@dataclass(frozen=True)
class ModelRequest:
    """A source, and the options of `load_model`, which describes them."""

    source: str
    network: nn.Module | None = None
    arch: str | None = None
    checkpoint: Path | None = None
    num_classes: int | None = None
    reject_column: RejectColumn = None
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    preprocess: Preprocess | PreprocessOverrides | None = None
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        if self.num_classes is not None:
            check_counts(num_classes=self.num_classes)
        column = self.reject_column
        number = isinstance(column, int) and not isinstance(column, bool) and column >= 0
        if column is not None and column != "last" and not number:
            raise DemurError(
                f"reject_column is 'last' or the number of a column from 0 on, not {column!r}."
            )

    def allow_only(self, kind: str, *names: str) -> None:
        """Raise DemurError if an option was given that this kind of source does not use."""
        for name, default in OPTIONS.items():
            if name not in names and getattr(self, name) != default:
                possible = ", ".join(names)
                raise DemurError(
                    f"{name} does not apply to {kind} such as {self.source!r}: it takes {possible}."
                )


@dataclass(frozen=True)
class Found:
    """A model that a source gave.

    Parameters
    ----------
    classifier : Classifier
    notes : tuple of str
        What a report says of it, each a sentence.
    code : tuple of str
        Digests of the user's source files that made the model.
    """

    classifier: Classifier
    notes: tuple[str, ...] = ()
    code: tuple[str, ...] = ()
