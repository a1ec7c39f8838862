"""Synthetic background images: shuffled patches, morphs between classes, and crops of photographs.

Source: McCoyd & Wagner 2018, "Background Class Defense Against Adversarial Examples", section VII.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from demur.data.images import ImageSet
from demur.data.morphing import check_number, morph
from demur.errors import DemurError
from demur.seeds import derive, generator


def patch_shuffle(images: Tensor, n: int, parts: int = 2, seed: int = 0) -> Tensor:
    """Cut images into patches and assemble the patches in other places.

    Half of the results take their patches from one image, half from several. The places are
    exchanged in one random cycle, so no patch keeps its place. This excludes the original image,
    and the image with its two halves exchanged (McCoyd & Wagner 2018, section VII.C).

    Parameters
    ----------
    images : Tensor
        uint8 images (N, C, H, W).
    n : int
        Number of images to make, at least 1.
    parts : int, default=2
        Patches along each side, at least 2. It divides H and W.
    seed : int, default=0
        Seed of the draws.

    Returns
    -------
    Tensor
        uint8 images (n, C, H, W).

    Raises
    ------
    DemurError
        If the images are not uint8 (N, C, H, W), or do not divide into `parts`.

    Examples
    --------
    >>> from demur import data
    >>> patch_shuffle(data.load("digits", "test").images, 5).shape
    torch.Size([5, 1, 28, 28])
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or len(images) == 0:
        raise DemurError(
            "patch shuffling needs uint8 images (N, C, H, W), "
            f"got {images.dtype} {tuple(images.shape)}."
        )
    count, channels, height, width = images.shape
    if parts < 2 or height % parts or width % parts:
        raise DemurError(
            f"images of {width}x{height} cannot be cut into {parts}x{parts} equal patches."
        )
    check_number(n)
    # The tag "chopped" is an old name: another tag would draw other images.
    draw = generator(seed, "chopped", parts)
    source = torch.randint(count, (n, parts**2), generator=draw)
    from_one = torch.rand(n, 1, generator=draw) < 0.5
    source = torch.where(from_one, source[:, :1], source)
    order = torch.rand(n, parts**2, generator=draw).argsort(dim=1)
    # One random cycle through all places.
    patch = torch.empty_like(order).scatter_(1, order, order.roll(1, dims=1))
    size = (height // parts, width // parts)
    grid = images.view(count, channels, parts, size[0], parts, size[1])
    grid = grid.permute(0, 2, 4, 1, 3, 5)
    picked = grid[source, patch // parts, patch % parts]
    picked = picked.view(n, parts, parts, channels, *size).permute(0, 3, 1, 4, 2, 5)
    return picked.reshape(n, channels, height, width)


def photo_crops(
    photos: Sequence[Tensor] | Tensor, n: int, shape: Sequence[int], seed: int = 0
) -> Tensor:
    """Crop photographs at random and resize the crops (McCoyd & Wagner 2018, section VII.C).

    A crop has the proportions of `shape`. Its size lies between that of `shape` and the largest
    that fits into the photograph. A photograph that is smaller than `shape` is enlarged.

    Parameters
    ----------
    photos : sequence of Tensor
        uint8 images (C, H, W) with 1 or 3 channels, at least one.
    n : int
        Number of crops, at least 1.
    shape : sequence of int
        Shape (C, H, W) of a crop, with 1 or 3 channels.
    seed : int, default=0
        Seed of the draws.

    Returns
    -------
    Tensor
        uint8 crops (n, C, H, W).

    Raises
    ------
    DemurError
        For no photographs, and for photographs or a shape of another kind.

    Examples
    --------
    >>> photo = torch.zeros(3, 50, 60, dtype=torch.uint8)
    >>> photo_crops([photo], 4, (1, 28, 28)).shape
    torch.Size([4, 1, 28, 28])
    """
    channels, height, width = shape
    for photo in photos:
        if photo.dtype != torch.uint8 or photo.ndim != 3 or len(photo) not in (1, 3):
            raise DemurError("photographs must be uint8 (C, H, W) with 1 or 3 channels.")
    if len(photos) == 0:
        raise DemurError("crops need at least one photograph.")
    if channels not in (1, 3):
        raise DemurError(f"crops have 1 or 3 channels, got {channels}.")
    check_number(n)
    # The tag "foreign" is an old name: another tag would draw other crops.
    draw = generator(seed, "foreign")
    chosen = torch.randint(len(photos), (n,), generator=draw).tolist()
    places = torch.rand(n, 3, generator=draw).tolist()
    crops = []
    for index, (size, top, left) in zip(chosen, places, strict=True):
        photo = photos[index]
        largest = min(photo.shape[1] / height, photo.shape[2] / width)
        scale = min(largest, max(1.0, largest) ** size)
        rows = max(1, int(scale * height))
        columns = max(1, int(scale * width))
        corner = int(top * (photo.shape[1] - rows + 1)), int(left * (photo.shape[2] - columns + 1))
        crop = transforms.resized_crop(
            photo, *corner, rows, columns, [height, width], antialias=True
        )
        in_colour = transforms.grayscale_to_rgb if channels == 3 else transforms.rgb_to_grayscale
        crops.append(in_colour(crop))
    return torch.stack(crops)


def photo_patches(n: int, size: int, channels: int = 1, seed: int = 0) -> Tensor:
    """Crop the two photographs that scikit-learn embeds at random.

    Parameters
    ----------
    n : int
        Number of crops, at least 1.
    size : int
        Side of a crop in pixels.
    channels : int, default=1
        1 or 3.
    seed : int, default=0
        Seed of the draws.

    Returns
    -------
    Tensor
        uint8 crops (n, channels, size, size).

    Examples
    --------
    >>> photo_patches(4, size=28).shape
    torch.Size([4, 1, 28, 28])
    """
    from sklearn.datasets import load_sample_images

    samples = load_sample_images().images
    photos = [torch.from_numpy(photo.copy()).permute(2, 0, 1) for photo in samples]
    return photo_crops(photos, n, (channels, size, size), seed)


def synthetic_backgrounds(
    images: ImageSet, per_kind: int, seed: int = 0, source: ImageSet | None = None
) -> ImageSet:
    """Add five classes of synthetic background images to an image set.

    The classes are "patch shuffle", "morph 30 %", "morph 50 %", "morph 70 %" and "photo crops".

    Parameters
    ----------
    images : ImageSet
        Square images with an even side.
    per_kind : int
        Images of each new class, at least 1.
    seed : int, default=0
        Seed of the draws.
    source : ImageSet, optional
        Images that the first four classes are made of. Default: `images`.

    Returns
    -------
    ImageSet
        `images`, and the new classes after its own.

    Raises
    ------
    DemurError
        For images that are not square, have an odd side, or are of one class only.

    Examples
    --------
    >>> from demur import data
    >>> synthetic_backgrounds(data.load("digits", "test"), per_kind=2).class_names[10:]
    ('patch shuffle', 'morph 30 %', 'morph 50 %', 'morph 70 %', 'photo crops')
    """
    channels, height, width = images.images.shape[1:]
    if height != width:
        raise DemurError(f"synthetic backgrounds need square images, got {width}x{height}.")
    source = source or images
    made = {"patch shuffle": patch_shuffle(source.images, per_kind, seed=seed)}
    for percent in (30, 50, 70):
        own_seed = derive(seed, percent)
        made[f"morph {percent} %"] = morph(source, per_kind, percent / 100, own_seed)
    made["photo crops"] = photo_patches(per_kind, height, channels, seed)
    labels = torch.arange(len(made)).repeat_interleave(per_kind) + images.num_classes
    return ImageSet(
        torch.cat([images.images, *made.values()]),
        torch.cat([images.labels, labels]),
        (*images.class_names, *made),
        f"{images.name} + made backgrounds",
    )
