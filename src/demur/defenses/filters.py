"""Image filters that are differentiable: the Gaussian blur and the median blur.

Jézéquel 2019, Protecting networks against adversarial attacks, sec. 3.1. Both filters mirror images
at their borders without repeating the border itself. Training, attacks and prediction use the same
filters (R25).
"""

import math
from numbers import Integral, Real
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from demur.errors import DemurError

CHUNK = 1 << 22
"""Pixels that the median sorts at a time. It needs about size^2 times as much memory."""

BLOCK = 48
"""Lines that the Gaussian blurs at a time."""

LARGEST = 15
"""Largest median window. One byte holds the position of the median in its window."""


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """Convolve images with a Gaussian that is cut off at 3 sigma.

    Sec. 3.1.1. Equal to scipy's `gaussian_filter(mode="mirror", radius=ceil(3 * sigma))`.

    Parameters
    ----------
    images : Tensor of shape (N, C, H, W), float
    sigma : float, in pixels, above 0
        Standard deviation. The kernel has 2 * ceil(3 * sigma) + 1 pixels on each side, of sum 1.

    Returns
    -------
    Tensor of shape (N, C, H, W)

    Raises
    ------
    DemurError
        If sigma is not above 0, or the kernel reaches beyond the opposite border of the image.

    Examples
    --------
    >>> import torch
    >>> from demur.defenses import gaussian_blur
    >>> images = torch.zeros(1, 1, 7, 7)
    >>> images[0, 0, 3, 3] = 1
    >>> gaussian_blur(images, sigma=0.5)[0, 0, 3, 2:5]
    tensor([0.0837, 0.6187, 0.0837])
    """
    _check(images)
    check_sigma(sigma)
    radius = math.ceil(3 * sigma)
    _check_reach(images, radius, f"a Gaussian of sigma {sigma:g}")
    rows, columns = (_blurring(size, sigma, radius, images) for size in images.shape[-2:])
    # In an autocast to bfloat16, the blur keeps the precision of the images.
    with torch.autocast(images.device.type, enabled=False):
        if torch.compiler.is_exporting():
            return rows @ images @ columns.T
        return torch.as_tensor(_Blur.apply(images, rows, columns, radius))


class _Blur(torch.autograd.Function):
    """Multiply rows and columns of images by the matrices of their blurs.

    The matrices are 0 away from the diagonal, so only a band around it is multiplied.
    """

    @staticmethod
    def forward(context: Any, images: Tensor, rows: Tensor, columns: Tensor, radius: int) -> Tensor:
        """Blur (N, C, H, W) by matrices (H, H) and (W, W)."""
        context.save_for_backward(rows, columns)
        context.radius = radius
        height, width = images.shape[-2:]
        if max(height, width) <= BLOCK:
            return rows @ images @ columns.T
        blurred = torch.empty_like(images, memory_format=torch.contiguous_format)
        for top, bottom, near, far in _bands(height, radius):
            both = rows[top:bottom, near:far] @ images[..., near:far, :]
            for left, right, first, last in _bands(width, radius):
                band = columns[left:right, first:last]
                blurred[..., top:bottom, left:right] = both[..., first:last] @ band.T
        return blurred

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """Blur the gradient by the transposed matrices."""
        rows, columns = context.saved_tensors
        blurred = torch.as_tensor(_Blur.apply(gradient, rows.T, columns.T, context.radius))
        return blurred, None, None, None


def _bands(size: int, radius: int) -> list[tuple[int, int, int, int]]:
    """Blocks of lines: start and end of each, and of the lines within the radius of it."""
    starts = range(0, size, BLOCK)
    ends = [min(start + BLOCK, size) for start in starts]
    return [
        (start, end, max(0, start - radius), min(size, start + BLOCK + radius))
        for start, end in zip(starts, ends, strict=True)
    ]


def _blurring(size: int, sigma: float, radius: int, like: Tensor) -> Tensor:
    """The blur of a mirrored line of `size` pixels as a matrix (size, size).

    A product with it is faster than a convolution.
    """
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weights = (-0.5 * (offsets / sigma) ** 2).exp()
    seen = torch.arange(size)[:, None] + offsets.long()
    seen = seen.abs()
    seen = torch.where(seen >= size, 2 * (size - 1) - seen, seen)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    matrix.scatter_add_(1, seen, (weights / weights.sum()).expand(size, -1))
    return matrix.to(like)


def median_blur(images: Tensor, size: int) -> Tensor:
    """Replace each pixel by the median of the window around it, channel by channel.

    Sec. 3.1.2. Equal to scipy's `median_filter(mode="mirror")`. The gradient is a subgradient: it
    goes to the pixel that is the median (the first of equal ones, line by line).

    Parameters
    ----------
    images : Tensor of shape (N, C, H, W), float
    size : int, in pixels, odd, at most 15
        Side of the window.

    Returns
    -------
    Tensor of shape (N, C, H, W)

    Raises
    ------
    DemurError
        If the size is even, below 1, above 15 or too large for the images.

    Examples
    --------
    >>> import torch
    >>> from demur.defenses import median_blur
    >>> images = torch.zeros(1, 1, 5, 5)
    >>> images[0, 0, 2, 2] = 1
    >>> median_blur(images, size=3).max()
    tensor(0.)
    """
    _check(images)
    check_size(size)
    _check_reach(images, size // 2, f"a median of {size}x{size}")
    padded = nn.functional.pad(images, (size // 2,) * 4, mode="reflect") if size > 1 else images
    if torch.compiler.is_exporting():
        return _median_of_nine(padded, size) if size == 3 else _median_by_order(padded, size)
    return torch.as_tensor(_Median.apply(padded, size))


class _Median(torch.autograd.Function):
    """The median of windows, without padding. One byte a window says which pixel is the median."""

    @staticmethod
    def forward(context: Any, padded: Tensor, size: int) -> Tensor:
        """Filter (N, C, H + size - 1, W + size - 1) to (N, C, H, W)."""
        height = padded.shape[-2] - size + 1
        width = padded.shape[-1] - size + 1
        copies = size * size if size > 3 else 1
        each = max(1, CHUNK // max(1, padded[0].numel() * copies))
        median_of = _median_of_nine if size == 3 else _median
        median = torch.cat([median_of(part, size) for part in torch.split(padded.detach(), each)])
        context.size = size
        context.shape = padded.shape
        if padded.requires_grad:
            which = torch.full_like(median, size * size - 1, dtype=torch.uint8)
            for place in range(size * size - 2, -1, -1):
                down, right = divmod(place, size)
                pixels = padded[..., down : down + height, right : right + width]
                which.masked_fill_(pixels == median, place)
            context.save_for_backward(which)
        return median

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Give each gradient to the pixel that was the median."""
        (which,) = context.saved_tensors
        height, width = gradient.shape[-2:]
        collected = gradient.new_zeros(context.shape)
        for place in range(context.size**2):
            down, right = divmod(place, context.size)
            pixels = collected[..., down : down + height, right : right + width]
            pixels += gradient * (which == place)
        return collected, None


def _median(padded: Tensor, size: int) -> Tensor:
    windows = padded.unfold(-2, size, 1).unfold(-2, size, 1)  # (n, C, H, W, size, size), a view
    return windows.flatten(-2).median(-1).values


def _median_by_order(padded: Tensor, size: int) -> Tensor:
    """Find the median with operations that exported graphs have."""
    height = padded.shape[-2] - size + 1
    width = padded.shape[-1] - size + 1
    windows = torch.stack(
        [
            padded[..., down : down + height, right : right + width]
            for down in range(size)
            for right in range(size)
        ],
        -1,
    )
    return windows.topk(size * size // 2 + 1, dim=-1).values[..., -1]


def _median_of_nine(padded: Tensor, _: int) -> Tensor:
    """Find the median by exchanges (Devillard 1998).

    It is the median of: the largest of the column minima, the median of the column medians, and
    the smallest of the column maxima. Columns of three are sorted once for three windows.
    """
    height = padded.shape[-2] - 2
    width = padded.shape[-1] - 2
    one, two, three = (padded[..., row : row + height, :] for row in range(3))
    low = torch.minimum(one, two)
    high = torch.maximum(one, two)
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
    larger = torch.maximum(first, second)
    return torch.maximum(torch.minimum(first, second), torch.minimum(larger, third))


def _check(images: Tensor) -> None:
    if images.ndim != 4 or not images.is_floating_point():
        raise DemurError(
            f"a filter takes float images (N, C, H, W), not {images.dtype} of shape "
            f"{tuple(images.shape)}."
        )


def _check_reach(images: Tensor, radius: int, what: str) -> None:
    height, width = images.shape[-2:]
    if radius >= min(height, width):
        raise DemurError(
            f"{what} reaches {radius} pixels to each side: images of {height}x{width} are too "
            "small for it."
        )


def check_sigma(sigma: object) -> None:
    """Raise DemurError unless sigma is finite and above 0."""
    value = float(sigma) if isinstance(sigma, Real) else math.nan
    if not (math.isfinite(value) and value > 0):
        raise DemurError(f"sigma must be a number of pixels above 0, got {sigma!r}.")


def check_size(size: object) -> None:
    """Raise DemurError unless size is odd, at least 1 and at most LARGEST."""
    value = int(size) if isinstance(size, Integral) else 0
    if value < 1 or value % 2 == 0:
        raise DemurError(f"median size must be odd, got {size!r}.")
    if value > LARGEST:
        raise DemurError(f"median size must be at most {LARGEST}, got {value}.")


class GaussianFilter(nn.Module):
    """`gaussian_blur` as a module."""

    positive_linear: ClassVar[bool] = True
    """For `demur.bounds`: a linear function without negative coefficients."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        check_sigma(sigma)
        self.sigma = sigma

    def forward(self, images: Tensor) -> Tensor:
        """Blur images (N, C, H, W)."""
        return gaussian_blur(images, self.sigma)

    def extra_repr(self) -> str:
        """Show sigma."""
        return f"sigma={self.sigma:g}"


class MedianFilter(nn.Module):
    """`median_blur` as a module."""

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Bound the medians of images between two bounds: a median increases with each pixel."""
        return median_blur(lower, self.size), median_blur(upper, self.size)

    def __init__(self, size: int) -> None:
        super().__init__()
        check_size(size)
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        """Blur images (N, C, H, W)."""
        return median_blur(images, self.size)

    def extra_repr(self) -> str:
        """Show the size of the window."""
        return f"size={self.size}"
