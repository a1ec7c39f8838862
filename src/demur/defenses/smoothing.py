"""Smoothing as a preprocessing defence: one filter at training and at use, inside the classifier, so that no attack goes around it.

Jézéquel 2019, Protecting networks against adversarial attacks, sec. 3.1. The filters are functions of images, with a thin module over each;
both reflect images at their borders (without repeating the border itself), in training, in attacks and in use alike (R25).
"""

import math
from collections import OrderedDict
from typing import Any, Self

import torch
from torch import Tensor, nn

from demur.classifier import Classifier, check_labels
from demur.errors import DemurError
from demur.networks import Epoch, fit

CHUNK = 1 << 22
"""Pixels that the median sorts at a time: it needs some size^2 times as much memory."""

BLOCK = 48
"""Lines that a Gaussian blurs at a time."""

LARGEST = 15
"""Side of a median's window: a byte says which of its pixels the median is."""


def gaussian_smoothing(images: Tensor, sigma: float) -> Tensor:
    """Convolve images (N, C, H, W) with a Gaussian of deviation `sigma` pixels, cut off at 3 sigma (2 * ceil(3 sigma) + 1 pixels, sum 1).

    Sec. 3.1.1. It is scipy's `gaussian_filter(mode="mirror", radius=ceil(3 sigma))`, and differentiable. Raises: DemurError for a
    sigma that is not above 0, or so large that the kernel reaches over the image's other border.
    """
    _check(images)
    if not (math.isfinite(sigma) and sigma > 0):
        raise DemurError(f"sigma is a number of pixels above 0, not {sigma}.")
    radius = math.ceil(3 * sigma)
    _check_reach(images, radius, f"a Gaussian of sigma {sigma:g}")
    rows, columns = (_blurring(size, sigma, radius, images) for size in images.shape[-2:])
    with torch.autocast(images.device.type, enabled=False):  # the images' own precision is worth more than a little time
        return torch.as_tensor(_Blur.apply(images, rows, columns, radius))


class _Blur(torch.autograd.Function):
    """Rows and columns of images times the matrices of their blurs, which are 0 but near the diagonal: only that band is multiplied."""

    @staticmethod
    def forward(context: Any, images: Tensor, rows: Tensor, columns: Tensor, radius: int) -> Tensor:
        """(N, C, H, W), (H, H), (W, W) to (N, C, H, W)."""
        context.save_for_backward(rows, columns)
        context.radius = radius
        height, width = images.shape[-2:]
        if max(height, width) <= BLOCK:
            return rows @ images @ columns.T
        blurred = torch.empty_like(images, memory_format=torch.contiguous_format)
        for first in range(0, height, BLOCK):
            last, near, far = min(first + BLOCK, height), max(0, first - radius), min(height, first + BLOCK + radius)
            both = rows[first:last, near:far] @ images[..., near:far, :]
            for start in range(0, width, BLOCK):
                end, left, right = min(start + BLOCK, width), max(0, start - radius), min(width, start + BLOCK + radius)
                blurred[..., first:last, start:end] = both[..., left:right] @ columns[start:end, left:right].T
        return blurred

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """The blur of the gradient by the transposed matrices."""
        rows, columns = context.saved_tensors
        return torch.as_tensor(_Blur.apply(gradient, rows.T, columns.T, context.radius)), None, None, None


def _blurring(size: int, sigma: float, radius: int, like: Tensor) -> Tensor:
    """The convolution of a line of `size` pixels, mirrored at its ends, as a matrix (size, size): faster than a convolution."""
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weights = (-0.5 * (offsets / sigma) ** 2).exp()
    seen = torch.arange(size)[:, None] + offsets.long()
    seen = seen.abs()
    seen = torch.where(seen >= size, 2 * (size - 1) - seen, seen)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    matrix.scatter_add_(1, seen, (weights / weights.sum()).expand(size, -1))
    return matrix.to(like)


def median_smoothing(images: Tensor, size: int) -> Tensor:
    """Replace each pixel of images (N, C, H, W) by the median of the `size` x `size` pixels around it, channel by channel.

    Sec. 3.1.2. It is scipy's `median_filter(mode="mirror")`. Its gradient goes to the pixel that is the median (the first of equals, line
    by line): a subgradient. Raises: DemurError for a size that is even, below 1 or too large for the image.
    """
    _check(images)
    if size < 1 or size % 2 == 0:
        raise DemurError(f"a median is of a window with an odd number of pixels a side, not {size}.")
    if size > LARGEST:
        raise DemurError(f"a median of {size}x{size} pixels is not to be had: {LARGEST}x{LARGEST} at most.")
    _check_reach(images, size // 2, f"a median of {size}x{size}")
    padded = nn.functional.pad(images, (size // 2,) * 4, mode="reflect") if size > 1 else images
    return torch.as_tensor(_Median.apply(padded, size))


class _Median(torch.autograd.Function):
    """Median of windows without padding; remembers for each which of its pixels it is, in a byte."""

    @staticmethod
    def forward(context: Any, padded: Tensor, size: int) -> Tensor:
        """(N, C, H + size - 1, W + size - 1) to (N, C, H, W)."""
        height, width = padded.shape[-2] - size + 1, padded.shape[-1] - size + 1
        each = max(1, CHUNK // max(1, padded[0].numel() * (size * size if size > 3 else 1)))
        found = [(_median_of_nine if size == 3 else _median)(part, size) for part in torch.split(padded.detach(), each)]
        median = torch.cat(found)
        context.size, context.shape = size, padded.shape
        if padded.requires_grad:
            which = torch.full_like(median, size * size - 1, dtype=torch.uint8)
            for place in range(size * size - 2, -1, -1):
                down, right = divmod(place, size)
                which.masked_fill_(padded[..., down : down + height, right : right + width] == median, place)
            context.save_for_backward(which)
        return median

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Each gradient to the pixel that was the median."""
        (which,) = context.saved_tensors
        height, width = gradient.shape[-2:]
        collected = gradient.new_zeros(context.shape)
        for place in range(context.size**2):
            down, right = divmod(place, context.size)
            collected[..., down : down + height, right : right + width] += gradient * (which == place)
        return collected, None


def _median(padded: Tensor, size: int) -> Tensor:
    windows = padded.unfold(-2, size, 1).unfold(-2, size, 1)  # (n, C, H, W, size, size), not copied yet
    return windows.flatten(-2).median(-1).values


def _median_of_nine(padded: Tensor, _: int) -> Tensor:
    """By exchanges (Devillard 1998): the middle of the largest of the lows, the middle of the middles, and the smallest of the highs.

    Columns of three are sorted once and shared by the three windows that they are in.
    """
    height, width = padded.shape[-2] - 2, padded.shape[-1] - 2
    one, two, three = (padded[..., row : row + height, :] for row in range(3))
    low, high = torch.minimum(one, two), torch.maximum(one, two)
    middle = torch.minimum(high, three)
    high = torch.maximum(high, three)
    low, middle = torch.minimum(low, middle), torch.maximum(low, middle)

    def beside(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return values[..., :width], values[..., 1 : 1 + width], values[..., 2 : 2 + width]

    first, second, third = beside(low)
    largest_low = torch.maximum(torch.maximum(first, second), third)
    first, second, third = beside(high)
    smallest_high = torch.minimum(torch.minimum(first, second), third)
    return _middle(largest_low, _middle(*beside(middle)), smallest_high)


def _middle(first: Tensor, second: Tensor, third: Tensor) -> Tensor:
    """The second largest of three."""
    return torch.maximum(torch.minimum(first, second), torch.minimum(torch.maximum(first, second), third))


def _check(images: Tensor) -> None:
    if images.ndim != 4 or not images.is_floating_point():
        raise DemurError(f"filters smooth float images (N, C, H, W), not {images.dtype} of shape {tuple(images.shape)}.")


def _check_reach(images: Tensor, radius: int, what: str) -> None:
    height, width = images.shape[-2:]
    if radius >= min(height, width):
        raise DemurError(f"{what} reaches {radius} pixels to each side: too far for images of {height}x{width}.")


class GaussianFilter(nn.Module):
    """`gaussian_smoothing` as a module."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        if not (math.isfinite(sigma) and sigma > 0):
            raise DemurError(f"sigma is a number of pixels above 0, not {sigma}.")
        self.sigma = sigma

    def forward(self, images: Tensor) -> Tensor:
        """Smoothed images (N, C, H, W)."""
        return gaussian_smoothing(images, self.sigma)

    def extra_repr(self) -> str:
        """The deviation."""
        return f"sigma={self.sigma:g}"


class MedianFilter(nn.Module):
    """`median_smoothing` as a module."""

    def __init__(self, size: int) -> None:
        super().__init__()
        if size < 1 or size % 2 == 0:
            raise DemurError(f"a median is of a window with an odd number of pixels a side, not {size}.")
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        """Smoothed images (N, C, H, W)."""
        return median_smoothing(images, self.size)

    def extra_repr(self) -> str:
        """The window."""
        return f"size={self.size}"


class _Smoothing(Classifier):
    """A network behind a filter.

    Attributes:
        history_: list of Epoch, after `fit`.
    """

    history_: list[Epoch]

    def __init__(self, smooth: nn.Module, module: nn.Module, num_classes: int) -> None:
        super().__init__(nn.Sequential(OrderedDict(filter=smooth, network=module)), num_classes)

    @property
    def filter(self) -> nn.Module:
        """The filter in front."""
        return self.module.get_submodule("filter")

    @property
    def network(self) -> nn.Module:
        """The network behind it."""
        return self.module.get_submodule("network")

    def fit(self, images: Tensor, labels: Tensor, **options: Any) -> Self:
        """Train the network on filtered images (sec. 3); it meets none that is not.

        Images (N, C, H, W), uint8 or float in [0, 1], labels (N,) in 0..num_classes-1; options as for `networks.fit`.
        """
        check_labels(labels, len(images), self.num_classes)
        self.history_ = fit(self.module, images, labels, **options)
        return self


class GaussianSmoothing(_Smoothing):
    """A classifier that sees only images smoothed by a Gaussian of deviation `sigma` pixels; the paper's best is 1.5.

    Args:
        module: any network or classifier: images (N, C, H, W) in [0, 1] to scores, with or without a reject column.
        num_classes: K.
        sigma: in pixels.

    Raises: DemurError for a sigma that is not above 0; and when it is used, for images that are too small for it.
    """

    def __init__(self, module: nn.Module, num_classes: int, sigma: float = 1.5) -> None:
        super().__init__(GaussianFilter(sigma), module, num_classes)


class MedianSmoothing(_Smoothing):
    """A classifier that sees only images of which each pixel is the median of the `size` x `size` around it.

    Args:
        module: any network or classifier: images (N, C, H, W) in [0, 1] to scores, with or without a reject column.
        num_classes: K.
        size: pixels a side, odd.

    Raises: DemurError for an even size, or one below 1; and when it is used, for images that are too small for it.
    """

    def __init__(self, module: nn.Module, num_classes: int, size: int = 3) -> None:
        super().__init__(MedianFilter(size), module, num_classes)
