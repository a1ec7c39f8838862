"""A network with its normalisation in front, and the reject column last."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from demur.data.messages import printable
from demur.errors import DemurError


class AdaptedNetwork(nn.Module):
    """A network behind its normalisation, whose answer becomes scores with the reject column last.

    Parameters
    ----------
    network : nn.Module
        Maps normalised images (N, C, H, W) to scores, or to an object with the attribute `logits`.
    mean, std : sequence of float, default ()
        One number, or one for each channel, for pixels in [0, 1]. Empty: no normalisation.
    reject_column : int, optional
        The column of the reject score. The columns after it move forward by one.

    Examples
    --------
    >>> network = AdaptedNetwork(nn.Identity(), (0.5,), (0.5,), reject_column=0)
    >>> network(torch.tensor([[0.5, 0.75, 1.0]]))
    tensor([[0.5000, 1.0000, 0.0000]])
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        reject_column: int | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.reject_column = reject_column
        self.register_buffer("mean", _per_channel(mean), persistent=False)
        self.register_buffer("std", _per_channel(std), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Compute scores (N, columns) of images (N, C, H, W) in [0, 1]."""
        if self.mean is not None and self.std is not None:
            shape = (1, -1) + (1,) * (images.ndim - 2)
            images = (images - self.mean.view(shape)) / self.std.view(shape)
        scores = scores_of(self.network(images))
        column = self.reject_column
        if column is None:
            return scores
        before, reject, after = scores[:, :column], scores[:, column : column + 1], column + 1
        return torch.cat([before, scores[:, after:], reject], 1)


def _per_channel(values: Sequence[float]) -> Tensor | None:
    return torch.tensor([float(value) for value in values]) if values else None


def scores_of(answer: object) -> Tensor:
    """Take the scores out of what a module returned. Raise DemurError where there are none."""
    if isinstance(answer, Tensor):
        return answer
    logits = getattr(answer, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    parts: list[str] = []
    inner = answer[0] if isinstance(answer, list | tuple) and answer else answer
    if isinstance(inner, dict):
        parts = [printable(key, 20) for key in list(inner)[:5]]
    kind = printable(type(answer).__name__, 40)
    said = f"{kind} with {', '.join(parts)}" if parts else kind
    if {"boxes", "out"} & set(parts):
        raise DemurError(
            f"demur audits classifiers; the module returned a {said}: it looks like a model for "
            "detection or segmentation."
        )
    raise DemurError(
        f"the module returned a {said} instead of a tensor of scores (N, columns): wrap it in a "
        "module whose forward returns the scores alone."
    )
