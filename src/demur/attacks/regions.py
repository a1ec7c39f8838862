"""Where an attacker may act: a region is a float map in [0, 1] that broadcasts to the images.

In Linf a pixel may move by at most eps * region (the localized paper's epsilon matrix); in the other norms the region is
a 0/1 mask. Where it is 0 the pixel stays, bit for bit.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from demur import seeds
from demur.classifier import Classifier, check_images, check_labels, device_of, evaluating
from demur.data import Box
from demur.errors import DemurError, unknown


def inside_box(size: tuple[int, int], top: int, left: int, height: int, width: int) -> Tensor:
    """Region (1, 1, H, W) that is 1 inside the box and 0 elsewhere. `size` is (H, W).

    Raises: DemurError if the box does not lie in the image. A box of no height or width is an empty region.
    """
    rows, columns = size
    if min(top, left, height, width) < 0 or top + height > rows or left + width > columns:
        raise DemurError(f"a box of {height}x{width} at ({top}, {left}) does not lie in an image of {rows}x{columns}.")
    region = torch.zeros(1, 1, rows, columns)
    region[..., top : top + height, left : left + width] = 1
    return region


def centre_box(size: tuple[int, int], height: int, width: int) -> Tensor:
    """Region (1, 1, H, W) that is 1 in a box of that size in the middle of an image of `size` (H, W)."""
    rows, columns = size
    return inside_box(size, (rows - height) // 2, (columns - width) // 2, height, width)


def outside(region: Tensor) -> Tensor:
    """Give the complement of a region: 1 - region."""
    return 1 - region


def inside_boxes(size: tuple[int, int], boxes: Sequence[Sequence[Box]]) -> Tensor:
    """Region (N, 1, H, W) that is 1 in any of the boxes of each image; an image without a box has an empty region. `size` is (H, W).

    Raises: DemurError if a box does not lie in the image: its coordinates are then perhaps those of the image before it was resized.
    """
    region = torch.zeros(len(boxes), 1, *size)
    for number, own in enumerate(boxes):
        for left, top, right, bottom in own:
            region[number] = region[number].maximum(inside_box(size, top, left, bottom - top, right - left)[0])
    return region


def foreground(images: Tensor, threshold: float = 0.5, dilation: int = 0) -> Tensor:
    """Region (N, 1, H, W) that is 1 where the brightest channel is above the threshold, and up to `dilation` pixels around: strokes."""
    check_images(images)
    if dilation < 0:
        raise DemurError(f"dilation is a number of pixels from 0 up, not {dilation}.")
    bright = (images.amax(1, keepdim=True) > threshold).to(images.dtype)
    return nn.functional.max_pool2d(bright, 2 * dilation + 1, stride=1, padding=dilation)


def inside_mask(mask: Tensor) -> Tensor:
    """Region (N, 1, H, W) of segmentation masks (N, H, W) or (N, 1, H, W): 1 where they are not 0."""
    if mask.ndim not in (3, 4) or (mask.ndim == 4 and mask.shape[1] != 1):
        raise DemurError(f"segmentation masks are (N, H, W) or (N, 1, H, W), not {tuple(mask.shape)}.")
    return (mask != 0).float().reshape(len(mask), 1, *mask.shape[-2:])


def same_area(region: Tensor, images: Tensor, seed: int = 0) -> Tensor:
    """Region (N, 1, H, W) of as many pixels as `region` has, anywhere: the control of a localised attack (R26).

    Which pixels depends on the image and the seed alone. Images are (N, C, H, W), and the region broadcasts to them.
    """
    check_images(images)
    chosen = (region > 0).expand_as(images).any(1).flatten(1)
    draws = seeds.uniform(seeds.image_keys(images), chosen.shape[1:], seed, "same area").to(chosen.device)
    rank = draws.argsort(1).argsort(1)
    return (rank < chosen.sum(1, keepdim=True)).to(images.dtype).reshape(len(images), 1, *images.shape[-2:])


def class_activation(
    classifier: Classifier, images: Tensor, labels: Tensor, *, layer: str | None = None, threshold: float = 0.5, batch_size: int = 64
) -> Tensor:
    """Region (N, 1, H, W) that is 1 where the network itself sees the label's class: its class-activation map, from a share of its peak.

    Grad-CAM (Selvaraju et al. 2017, eqs. 1 and 2): channels of an inner layer, weighted by the mean gradient of the class score,
    the negative left out, and enlarged to the images. An image whose map is nowhere positive has an empty region.

    Args:
        layer: module path of a layer with outputs (N, channels, h, w); the last convolution if None.
        threshold: share of each map's largest value.

    Images (N, C, H, W) in [0, 1], labels (N,). Raises: DemurError for a layer that is not there or is not spatial.
    """
    check_images(images)
    check_labels(labels, len(images), classifier.num_classes)
    if not 0 < threshold < 1:
        raise DemurError(f"the threshold is a share of the map's peak in (0, 1), not {threshold}.")
    modules = dict(classifier.named_modules())
    last = next((name for name, module in reversed(modules.items()) if isinstance(module, nn.Conv2d)), None)
    if (name := layer or last) is None:
        raise DemurError("the classifier has no convolution: name a layer.")
    if name not in modules:
        raise unknown("layer", name, [known for known in modules if known])
    device, maps, seen = device_of(classifier, images.device), [], list[Tensor]()
    handle = modules[name].register_forward_hook(lambda module, given, output: seen.append(output))
    try:
        with evaluating(classifier), torch.enable_grad():
            for batch, own in zip(torch.split(images, batch_size), torch.split(labels, batch_size), strict=True):
                seen.clear()
                scores = classifier(batch.to(device).requires_grad_())
                if not seen or seen[-1].ndim != 4:
                    raise DemurError(f"layer {name!r} has no output of channels and pixels; name a convolution.")
                (slope,) = torch.autograd.grad(scores.gather(1, own.to(device)[:, None]).sum(), seen[-1])
                found = (slope.mean((2, 3), keepdim=True) * seen[-1]).sum(1, keepdim=True).clamp(min=0).detach()
                maps.append(nn.functional.interpolate(found.float(), images.shape[-2:], mode="bilinear", align_corners=False).to(images))
    finally:
        handle.remove()
    together = torch.cat(maps)
    peak = together.flatten(1).amax(1).reshape(-1, 1, 1, 1)
    return ((together >= threshold * peak) & (peak > 0)).to(images.dtype)


def check_region(region: Tensor | None, images: Tensor) -> Tensor | None:
    """Broadcast a region to the images (N, C, H, W); None is everywhere.

    Raises: DemurError if it does not broadcast, or is not finite and in [0, 1].
    """
    if region is None:
        return None
    try:
        region = torch.as_tensor(region).to(images.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DemurError(f"a region is a tensor that broadcasts to the images, not {type(region).__name__}.") from error
    if not region.is_floating_point():
        region = region.to(images.dtype)
    try:
        region = region.expand_as(images)
    except RuntimeError as error:
        raise DemurError(f"a region of shape {tuple(region.shape)} does not broadcast to images of shape {tuple(images.shape)}.") from error
    if not bool(((region >= 0) & (region <= 1)).all()):
        raise DemurError("a region must be finite and lie in [0, 1].")
    return region
