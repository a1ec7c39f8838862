"""Masks: where an attacker may act. A mask is a float map in [0, 1] that broadcasts to the images.

In Linf a pixel may move by at most eps * mask (the epsilon matrix of the localized paper). In the
other norms a mask is 0 or 1. Where the mask is 0, a pixel does not change by a single bit.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from demur import seeds
from demur.classifier import (
    Classifier,
    check_classifier,
    check_counts,
    check_images,
    check_labels,
    device_of,
    evaluating,
)
from demur.errors import DemurError, unknown

Box = tuple[int, int, int, int]
"""A box: left, top, right, bottom in pixels. The last two are exclusive: its width is right - left.
"""


def inside_box(size: tuple[int, int], top: int, left: int, height: int, width: int) -> Tensor:
    """Make a mask that is 1 inside a box and 0 elsewhere.

    Parameters
    ----------
    size : tuple of int
        Height and width of the images.
    top, left, height, width : int
        The box, in pixels. A box without height or width gives an empty mask.

    Returns
    -------
    Tensor of shape (1, 1, H, W)

    Raises
    ------
    DemurError
        If the box does not lie in the image.

    Examples
    --------
    >>> from demur.masks import inside_box
    >>> int(inside_box((28, 28), top=4, left=4, height=10, width=5).sum())
    50
    """
    rows, columns = size
    if min(top, left, height, width) < 0 or top + height > rows or left + width > columns:
        raise DemurError(
            f"a box of {height}x{width} at ({top}, {left}) does not lie in an image "
            f"of {rows}x{columns}."
        )
    mask = torch.zeros(1, 1, rows, columns)
    mask[..., top : top + height, left : left + width] = 1
    return mask


def centre_box(size: tuple[int, int], height: int, width: int) -> Tensor:
    """Make a mask (1, 1, H, W) that is 1 in a box in the middle of an image of `size` (H, W).

    Examples
    --------
    >>> from demur.masks import centre_box, outside
    >>> int(outside(centre_box((28, 28), 12, 12)).sum())
    640
    """
    rows, columns = size
    return inside_box(size, (rows - height) // 2, (columns - width) // 2, height, width)


def outside(mask: Tensor) -> Tensor:
    """Give the complement of a mask: 1 - mask."""
    return 1 - mask


def inside_boxes(size: tuple[int, int], boxes: Sequence[Sequence[Box]]) -> Tensor:
    """Make a mask that is 1 in any of the boxes of each image.

    Parameters
    ----------
    size : tuple of int
        Height and width of the images.
    boxes : sequence of N sequences of Box
        The boxes of each image. An image without a box has an empty mask.

    Returns
    -------
    Tensor of shape (N, 1, H, W)

    Raises
    ------
    DemurError
        If a box does not lie in the image. Perhaps its coordinates are those of the image before it
        was resized (R26).
    """
    mask = torch.zeros(len(boxes), 1, *size)
    for number, own in enumerate(boxes):
        for left, top, right, bottom in own:
            box = inside_box(size, top, left, bottom - top, right - left)
            mask[number] = mask[number].maximum(box[0])
    return mask


def foreground(images: Tensor, threshold: float = 0.5, dilation: int = 0) -> Tensor:
    """Make a mask of bright pixels, such as the strokes of digits.

    Parameters
    ----------
    images : Tensor of shape (N, C, H, W), float in [0, 1]
    threshold : float, default 0.5
        A pixel is bright if its brightest channel is above it.
    dilation : int, default 0
        The mask includes pixels that are at most this far from a bright pixel.

    Returns
    -------
    Tensor of shape (N, 1, H, W)

    Raises
    ------
    DemurError
        If the dilation is negative, or the images are not in [0, 1].
    """
    check_images(images)
    if dilation < 0:
        raise DemurError(f"dilation is a number of pixels, at least 0, not {dilation}.")
    bright = (images.amax(1, keepdim=True) > threshold).to(images.dtype)
    return nn.functional.max_pool2d(bright, 2 * dilation + 1, stride=1, padding=dilation)


def inside_mask(segmentation: Tensor) -> Tensor:
    """Make a mask (N, 1, H, W) of segmentations (N, H, W) or (N, 1, H, W): 1 where they are not 0.

    Raises
    ------
    DemurError
        If the segmentations have another shape.
    """
    flat = segmentation.ndim == 4 and segmentation.shape[1] != 1
    if segmentation.ndim not in (3, 4) or flat:
        raise DemurError(
            "segmentation masks have shape (N, H, W) or (N, 1, H, W), "
            f"not {tuple(segmentation.shape)}."
        )
    size = segmentation.shape[-2:]
    return (segmentation != 0).float().reshape(len(segmentation), 1, *size)


def same_area(mask: Tensor, images: Tensor, seed: int = 0) -> Tensor:
    """Make a mask of as many random pixels as `mask` has: the control of a localised attack (R26).

    Parameters
    ----------
    mask : Tensor that broadcasts to the images
    images : Tensor of shape (N, C, H, W), float in [0, 1]
        The pixels that are chosen depend on the image and the seed only.
    seed : int, default 0

    Returns
    -------
    Tensor of shape (N, 1, H, W)

    Raises
    ------
    DemurError
        If the mask does not broadcast to the images.
    """
    check_images(images)
    whole = check_mask(mask, images)
    if whole is None:
        raise DemurError("the control of a mask needs the mask.")
    chosen = (whole > 0).any(1).flatten(1)
    keys = seeds.image_keys(images)
    draws = seeds.uniform(keys, chosen.shape[1:], seed, "same area").to(chosen.device)
    rank = draws.argsort(1).argsort(1)
    first = rank < chosen.sum(1, keepdim=True)
    return first.to(images.dtype).reshape(len(images), 1, *images.shape[-2:])


def class_activation(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    layer: str | None = None,
    threshold: float = 0.5,
    batch_size: int = 64,
) -> Tensor:
    """Make a mask of where the network itself sees the class: its class-activation map.

    Grad-CAM (Selvaraju et al. 2017, eqs. 1 and 2): the channels of an inner layer, weighted by the
    mean gradient of the class score, without negative values, enlarged to the images.

    Parameters
    ----------
    classifier : Classifier
    images : Tensor of shape (N, C, H, W), float in [0, 1]
    labels : Tensor of shape (N,), integer
    layer : str, optional
        Module path of a layer with outputs (N, channels, h, w). Default: the last convolution.
    threshold : float in (0, 1), default 0.5
        The mask is 1 where the map is at least this share of its largest value.
    batch_size : int, default 64

    Returns
    -------
    Tensor of shape (N, 1, H, W)
        Empty for an image whose map is positive nowhere.

    Raises
    ------
    DemurError
        If the layer is unknown or has no pixels, or another argument is out of range.
    """
    check_classifier(classifier)
    check_images(images)
    check_labels(labels, len(images), classifier.num_classes)
    check_counts(batch_size=batch_size)
    if not 0 < threshold < 1:
        raise DemurError(f"the threshold is a share of the map's peak in (0, 1), not {threshold}.")
    name = _layer(classifier, layer)
    seen: list[Tensor] = []
    module = classifier.get_submodule(name)
    handle = module.register_forward_hook(lambda module, given, output: seen.append(output))
    maps = []
    try:
        with evaluating(classifier), torch.enable_grad():
            parts = torch.split(images, int(batch_size))
            batches = zip(parts, torch.split(labels, int(batch_size)), strict=True)
            for batch, own in batches:
                seen.clear()
                found = _activation_map(classifier, batch, own, seen, name).float()
                size = images.shape[-2:]
                large = nn.functional.interpolate(found, size, mode="bilinear", align_corners=False)
                maps.append(large.to(images))
    finally:
        handle.remove()
    together = torch.cat(maps)
    peak = together.flatten(1).amax(1).reshape(-1, 1, 1, 1)
    return ((together >= threshold * peak) & (peak > 0)).to(images.dtype)


def _layer(classifier: Classifier, layer: str | None) -> str:
    modules = dict(classifier.named_modules())
    convolutions = [name for name, module in modules.items() if isinstance(module, nn.Conv2d)]
    if layer is None and not convolutions:
        raise DemurError("the classifier has no convolution: name a layer.")
    name = convolutions[-1] if layer is None else layer
    if name not in modules:
        raise unknown("layer", name, [known for known in modules if known])
    return name


def _activation_map(
    classifier: Classifier, images: Tensor, labels: Tensor, seen: list[Tensor], name: str
) -> Tensor:
    """Compute the map (n, 1, h, w) of one batch; a hook appends the layer's output to `seen`."""
    device = device_of(classifier, images.device)
    scores = classifier(images.to(device).requires_grad_())
    if not seen or seen[-1].ndim != 4:
        raise DemurError(
            f"layer {name!r} has no output of channels and pixels; name a convolution."
        )
    own = scores.gather(1, labels.to(device, torch.int64)[:, None]).sum()
    (slope,) = torch.autograd.grad(own, seen[-1])
    weights = slope.mean((2, 3), keepdim=True)
    return (weights * seen[-1]).sum(1, keepdim=True).clamp(min=0).detach()


def check_mask(mask: Tensor | None, images: Tensor) -> Tensor | None:
    """Broadcast a mask to images (N, C, H, W); None means everywhere.

    Raises
    ------
    DemurError
        If the mask does not broadcast, or is not finite and in [0, 1].
    """
    if mask is None:
        return None
    try:
        mask = torch.as_tensor(mask).to(images.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DemurError(
            f"a mask is a tensor that broadcasts to the images, not {type(mask).__name__}."
        ) from error
    if not mask.is_floating_point():
        mask = mask.to(images.dtype)
    try:
        mask = mask.expand_as(images)
    except RuntimeError as error:
        raise DemurError(
            f"a mask of shape {tuple(mask.shape)} does not broadcast to images "
            f"of shape {tuple(images.shape)}."
        ) from error
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise DemurError("a mask must be finite and lie in [0, 1].")
    return mask
