"""The lines of a handshake, and what they are about."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from demur.classifier import Classifier
from demur.data.messages import printable
from demur.errors import DemurError

State = Literal["ok", "note", "failed"]


@dataclass(frozen=True)
class Line:
    """One point of a handshake.

    Parameters
    ----------
    name : str
        Such as "pixels" or "clean accuracy".
    state : {"ok", "note", "failed"}
        A note is worth reading; the audit goes on.
    text : str
        One sentence or two.
    """

    name: str
    state: State
    text: str


class HandshakeError(DemurError):
    """A handshake that failed. The message is the text of the last line.

    Parameters
    ----------
    lines : sequence of Line
        What was found until then; the last one has the state "failed".

    Examples
    --------
    >>> str(HandshakeError([Line("pixels", "failed", "there are no pixels.")]))
    'there are no pixels.'
    """

    def __init__(self, lines: Sequence[Line]) -> None:
        super().__init__(lines[-1].text)
        self.lines = tuple(lines)


@dataclass(frozen=True, eq=False)
class Sample:
    """A model and the images that it meets, with everything checked that needs no forward pass.

    Parameters
    ----------
    classifier : Classifier
        On the device.
    images : Tensor of shape (n, C, H, W), float32 in [0, 1], on the CPU
    labels : Tensor of shape (n,), int64, on the CPU
    device : torch.device
    class_names : sequence of str, optional
        The names of the data's classes.
    """

    classifier: Classifier
    images: Tensor
    labels: Tensor
    device: torch.device
    class_names: Sequence[str] | None = None

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Give a batch of a size. If there are fewer images, they occur several times."""
        index = torch.arange(size) % len(self.images)
        return self.images[index], self.labels[index]


def pairs_of(
    pairs: Sequence[tuple[int, int]], names: Sequence[str] | None, others: Sequence[str] | None
) -> str:
    """Write the first three pairs of a label of the data and a class of the model.

    Examples
    --------
    >>> pairs_of([(0, 1), (1, 0)], ["cat", "dog"], None)
    "0 ('cat') is 1; 1 ('dog') is 0"
    """
    said = [f"{_named(one, names)} is {_named(other, others)}" for one, other in pairs[:3]]
    more = len(pairs) - len(said)
    return "; ".join(said) + (f"; and {more} more" if more else "")


def _named(number: int, names: Sequence[str] | None) -> str:
    if names is None or names[number] == str(number):
        return str(number)
    return f"{number} ({printable(names[number], 30)!r})"


def shape_of(sides: Sequence[int]) -> str:
    """Write the sides of an image.

    Examples
    --------
    >>> shape_of((3, 32, 32))
    '3x32x32'
    """
    return "x".join(str(side) for side in sides)


def percent(value: float) -> str:
    """Write a share.

    Examples
    --------
    >>> percent(0.715), percent(0.00123), percent(0)
    ('71.5 %', '0.123 %', '0 %')
    """
    return f"{100 * value:.3g} %" if value < 0.1 else f"{100 * value:.1f} %"
