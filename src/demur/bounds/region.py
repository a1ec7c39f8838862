"""The images that an attacker may choose, as bounds see them: a box, or a Euclidean ball in it."""

from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from demur.bounds.affine import summed
from demur.bounds.curved import concretised
from demur.bounds.held import Interval, of
from demur.errors import DemurError
from demur.norms import TOLERANCE, per_image

Norm = Literal["linf", "l2"]


@dataclass(frozen=True)
class Region:
    """A set of images around each clean image.

    Parameters
    ----------
    images : Tensor of shape (N, ...)
        The clean images.
    box : Interval
        The smallest and largest value of each pixel.
    eps : Tensor of shape (N,) or None
        The Euclidean radius. None: the whole box.
    mask : Tensor that broadcasts to the images, or None
        Pixels of a Euclidean ball do not change where it is 0.
    """

    images: Tensor
    box: Interval
    eps: Tensor | None = None
    mask: Tensor | None = None

    @classmethod
    def around(
        cls,
        images: Tensor,
        eps: Tensor | float,
        norm: Norm = "linf",
        mask: Tensor | None = None,
        less: float = 0.0,
    ) -> Self:
        """Make the region of a threat, in the precision of the images.

        Parameters
        ----------
        images : Tensor of shape (N, ...), in [0, 1]
        eps : Tensor of shape (N,) or float
            At least 0. It grows by 1e-6 of itself, as much as an attack may exceed it.
        norm : {"linf", "l2"}
        mask : Tensor that broadcasts to the images, optional
            In Linf it scales eps.
        less : float, default 0
            The radius is smaller by this much, pixel by pixel in Linf, and not below 0.

        Raises
        ------
        DemurError
            For another norm.

        Examples
        --------
        >>> region = Region.around(torch.tensor([[0.2, 0.95]]), 0.1)
        >>> region.box.upper
        tensor([[0.3000, 1.0000]])
        """
        if norm not in ("linf", "l2"):
            raise DemurError(f"certificates know the norms linf and l2, not {norm}.")
        reach = torch.as_tensor(eps, dtype=images.dtype, device=images.device)
        reach = (reach * (1 + TOLERANCE)).expand(images.shape[0])
        share = None if mask is None else mask.to(images).expand_as(images)
        if norm == "l2":
            reach = (reach - less).clamp(min=0)
            wide = per_image(reach, images)
            wide = wide if share is None else torch.where(share > 0, wide, 0.0)
        else:
            wide = per_image(reach, images)
            # An infinite eps is 1: the box ends at 0 and 1.
            wide = wide if share is None else torch.where(share > 0, wide * share, 0.0)
            wide = (wide - less).clamp(min=0)
        box = Interval((images - wide).clamp(min=0), (images + wide).clamp(max=1))
        inside = Interval(torch.minimum(box.lower, images), torch.maximum(box.upper, images))
        ball = norm == "l2" and not bool(torch.isinf(reach).any())
        return cls(images, inside, reach if ball else None, share if ball else None)

    def select(self, index: Tensor) -> Self:
        """Give the region of the images at `index`."""
        eps = None if self.eps is None else self.eps[index]
        mask = None if self.mask is None else self.mask[index]
        box = Interval(self.box.lower[index], self.box.upper[index])
        return replace(self, images=self.images[index], box=box, eps=eps, mask=mask)

    def minimum(self, rows: Tensor, owner: Tensor | int) -> tuple[Tensor, Tensor]:
        """Bound rows @ image from below over the region.

        Parameters
        ----------
        rows : Tensor of shape (R, *image)
        owner : Tensor of shape (R,), int64, or int
            The image that each row belongs to, or that all rows belong to.

        Returns
        -------
        bound, magnitude : Tensor of shape (R,)
        """
        bound, size = concretised(rows, self.box.of(owner))
        if self.eps is None:
            return bound, size
        moved = rows if self.mask is None else rows * of(self.mask, owner)
        length = moved.flatten(1).norm(dim=1)
        middle = summed(rows * of(self.images, owner), rows.ndim - 1)
        return torch.maximum(bound, middle - of(self.eps, owner) * length), size
