"""What must be known of a model to feed it images: their size, and the normalisation inside it."""

from dataclasses import dataclass

from demur.errors import DemurError

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes the input of a model.

    Resizing and cropping happen before the attack: it acts on the cropped pixels in [0, 1].
    The normalisation by mean and std belongs to the model, so the attack sees through it.

    Parameters
    ----------
    size : (int, int), optional
        Height and width of the images that the model takes, in pixels. None keeps the size of each
        image.
    resize : int, optional
        Pixels of the shorter side before the centre of `size` is cropped. None resizes to `size`
        itself, without a crop.
    interpolation : {"nearest", "bilinear", "bicubic", "lanczos"}, default "bilinear"
    mean, std : tuple of float, default ()
        Mean and standard deviation of each channel, for pixels in [0, 1]. Empty: the model gets
        pixels in [0, 1].
    channels : {1, 3}, default 3
        Grey images, or RGB.

    Raises
    ------
    DemurError
        If a value is out of range.

    Examples
    --------
    >>> Preprocess(size=(224, 224), resize=256).channels
    3
    """

    size: tuple[int, int] | None = None
    resize: int | None = None
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    channels: int = 3

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            known = ", ".join(INTERPOLATIONS)
            raise DemurError(f"interpolation is one of {known}, not {self.interpolation!r}.")
        if self.channels not in (1, 3):
            raise DemurError(f"images have 1 or 3 channels, not {self.channels}.")
        if self.size is not None and min(self.size) < 1:
            raise DemurError(f"an image has at least one pixel a side, not {self.size}.")
        if self.resize is not None and (self.size is None or self.resize < max(self.size)):
            raise DemurError(
                f"resize must be at least the size of the crop, {self.size}, not {self.resize}."
            )
        if len(self.mean) != len(self.std) or len(self.mean) not in (0, 1, self.channels):
            raise DemurError(
                f"mean and std need one number for each of {self.channels} channels, "
                f"not {self.mean} and {self.std}."
            )
        if any(value <= 0 for value in self.std):
            raise DemurError(f"std must be positive, not {self.std}.")
