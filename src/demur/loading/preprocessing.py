"""The preprocessing of a model: what a user overrides, and what a file of weights says."""

import ast
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from demur.classifier import Preprocess
from demur.data.messages import printable
from demur.errors import DemurError


@dataclass(frozen=True)
class PreprocessOverrides:
    """Parts of a model's preprocessing that replace what its source says.

    The names are those of timm's flags.

    Parameters
    ----------
    img_size : int or (int, int), optional
        Pixels a side, or height and width, of the images that the model gets. The size before the
        crop grows or shrinks with it, unless `crop_pct` is given.
    mean, std : tuple of float, default ()
        Mean and standard deviation of each channel, in [0, 1], for pixels in [0, 1].
    interpolation : {"nearest", "bilinear", "bicubic", "lanczos"}, optional
    crop_pct : float, optional
        The share of the shorter side that the crop keeps, above 0 and at most 1. The shorter side
        is resized to ``floor(img_size / crop_pct)`` pixels.

    Raises
    ------
    DemurError
        If a number is out of range.

    Examples
    --------
    >>> PreprocessOverrides(img_size=288, crop_pct=0.95).applied(None).resize
    303
    """

    img_size: int | tuple[int, int] | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    interpolation: str | None = None
    crop_pct: float | None = None

    def __post_init__(self) -> None:
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise DemurError(f"crop_pct must be above 0 and at most 1, not {self.crop_pct}.")
        if not all(map(math.isfinite, (*self.mean, *self.std))):
            raise DemurError(f"mean and std must be finite, not {self.mean} and {self.std}.")
        _check_unit("mean", self.mean)
        _check_unit("std", [value for value in self.std if value > 0])  # others are no std at all
        if self.img_size is not None and min(self._size(self.img_size)) < 1:
            raise DemurError(f"an image has at least one pixel a side, not {self.img_size}.")

    def applied(self, base: Preprocess | None, channels: int = 3) -> Preprocess:
        """Replace parts of a preprocessing.

        Parameters
        ----------
        base : Preprocess, optional
            What the source of the model says.
        channels : {1, 3}, default 3
            The channels of the images, where there is no `base`.

        Returns
        -------
        Preprocess

        Raises
        ------
        DemurError
            If the result is not complete, for example a mean without a standard deviation.
        """
        base = base or Preprocess(channels=channels)
        size = base.size if self.img_size is None else self._size(self.img_size)
        mean = tuple(self.mean) or base.mean
        std = tuple(self.std) or base.std
        if bool(mean) != bool(std):
            raise DemurError("the model has no normalisation yet: give mean and std together.")
        return replace(
            base,
            size=size,
            resize=self._resize(base, size),
            interpolation=self.interpolation or base.interpolation,
            mean=mean,
            std=std,
        )

    def _resize(self, base: Preprocess, size: tuple[int, int] | None) -> int | None:
        if self.crop_pct is not None:
            if size is None:
                raise DemurError("crop_pct needs the size of the images: give img_size too.")
            return resize_of(size, self.crop_pct)
        if base.resize is None or base.size is None or size is None:
            return base.resize
        grown = round(base.resize * max(size) / max(base.size))
        return max(grown, max(size))

    @staticmethod
    def _size(given: int | tuple[int, int]) -> tuple[int, int]:
        if isinstance(given, int):
            return (given, given)
        height, width = given
        return (height, width)


def _check_unit(name: str, values: Sequence[float]) -> None:
    """Refuse values that are meant for pixels from 0 to 255."""
    wrong = [value for value in values if not 0 <= value <= 1]
    if not wrong:
        return
    text = f"{name} must be in [0, 1], for pixels in [0, 1], not {wrong[0]:g}."
    if 1 < wrong[0] <= 255:
        text += (
            f" For pixels from 0 to 255, divide it by 255: {wrong[0]:g}/255 is "
            f"{wrong[0] / 255:.4g}."
        )
    raise DemurError(text)


def resize_of(size: tuple[int, int], crop_pct: float) -> int:
    """Give the pixels of the shorter side before the crop, as timm computes them."""
    return math.floor(max(size) / crop_pct)


def chosen(
    given: Preprocess | PreprocessOverrides | None, base: Preprocess | None, channels: int = 3
) -> Preprocess | None:
    """Give what the user chose: a whole preprocessing, parts of one, or that of the source."""
    if isinstance(given, PreprocessOverrides):
        return given.applied(base, channels)
    return base if given is None else given


def from_metadata(about: Mapping[str, str], base: Preprocess, path: Path) -> Preprocess:
    """Apply what the metadata of a safetensors file say: input_size, mean and std.

    The keys are those that `networks.imagenet_network` reads.

    Raises
    ------
    DemurError
        If a value is not usable.
    """
    try:
        if "input_size" in about:
            side = int(about["input_size"])
            base = replace(base, size=(side, side), resize=max(side, base.resize or 0))
        mean = _numbers(about["mean"]) if "mean" in about else base.mean
        std = _numbers(about["std"]) if "std" in about else base.std
        return replace(base, mean=mean, std=std)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        # A DemurError is a ValueError too; the others are literal_eval's and int's.
        raise DemurError(
            f"the metadata of {path} are not usable: {printable(error).rstrip('.')}."
        ) from error


def _numbers(text: str) -> tuple[float, ...]:
    values = tuple(float(value) for value in ast.literal_eval(text))
    if not values or not all(map(math.isfinite, values)):
        raise DemurError(f"{printable(text, 80)!r} is no list of finite numbers.")
    return values
