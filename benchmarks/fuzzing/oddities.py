"""Modules that behave oddly: what users bring that is no plain network."""

import math
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fuzzing.attacks import Dense

CLASSES: Final = 3
SHAPE: Final = (1, 6, 6)


class Odd(nn.Module):
    """A network behind a change of its input, and before a change of its answer."""

    def __init__(
        self,
        before: Callable[[Tensor], Tensor] | None = None,
        after: Callable[[Tensor], Any] | None = None,
    ) -> None:
        super().__init__()
        self.network = Dense(math.prod(SHAPE), CLASSES, 8)
        self.before = before
        self.after = after

    def forward(self, images: Tensor) -> Any:
        """Compute the answer."""
        given = images if self.before is None else self.before(images)
        scores = self.network(given)
        return scores if self.after is None else self.after(scores)


class Obstinate(Odd):
    """Overrides `train`: in evaluation mode too it may stay in training mode, or fail."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.drop = nn.Dropout(0.5)
        self.merged = False

    def train(self, mode: bool = True) -> "Obstinate":
        """Switch the mode, in the way of a LoRA layer, or not at all."""
        if self.how == "fails" and not mode:
            raise RuntimeError("this module has no evaluation mode")
        super().train(mode or self.how == "ignores")
        self.merged = not mode
        return self

    def forward(self, images: Tensor) -> Any:
        """Compute the answer; merged weights need evaluation mode."""
        if self.how == "merges" and self.merged == self.training:
            raise RuntimeError("the weights are merged twice")
        return super().forward(self.drop(images) if self.training else images)


class Parametrised(nn.Module):
    """A network with a parametrised weight, of the new kind or of the old one with hooks."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        wrap: Any = {
            "weight_norm": parametrizations.weight_norm,
            "spectral_norm": parametrizations.spectral_norm,
            "orthogonal": parametrizations.orthogonal,
            "hooked": nn.utils.spectral_norm,
        }[kind]
        self.first = wrap(nn.Conv2d(1, 2, 3))
        self.last = nn.Linear(32, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the scores."""
        scores: Tensor = self.last(self.first(images).flatten(1).tanh())
        return scores


class Named(Odd):
    """Has attributes with the names of demur's own."""

    wider_kernels = "a name of the user"
    widened = 3
    num_classes = "three"
    rejects = None


class OfInference(Odd):
    """Leaves the modes of autograd, whatever the caller chose."""

    def __init__(self, mode: Callable[[], Any]) -> None:
        super().__init__()
        self.mode = mode

    def forward(self, images: Tensor) -> Any:
        """Compute the answer in the mode."""
        with self.mode():
            return super().forward(images)


class OneMemory(Odd):
    """Writes every answer into the same memory, as a session with bound outputs does."""

    def __init__(self) -> None:
        super().__init__()
        self.out = torch.zeros(64, CLASSES)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Any:
        """Compute the scores."""
        scores = super().forward(images)
        return self.out[: len(scores)].copy_(scores)
