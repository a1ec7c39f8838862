"""The attacked images of a run as cards: original, attacked and the amplified difference, each a small PNG data URI."""

import base64
from dataclasses import dataclass
from io import BytesIO
from math import sqrt
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from demur.evaluation.results import Picture, read_gallery

BUDGET = 7_500_000
"""Characters that all pictures together may take; the page as a whole stays below 10 MB."""

WORST_FIRST = ("wrong", "rejected", "correct")

PIXEL_ART = 64
"""Images up to this many pixels wide are shown with their pixels square, larger ones are smoothed."""


@dataclass(frozen=True)
class Card:
    """An item with its three pictures as data URIs. The difference is amplified `factor` times around mid-grey."""

    item: Picture
    original: str
    attacked: str
    difference: str
    factor: int


@dataclass(frozen=True)
class Gallery:
    """The cards. Images are `width` x `height`; the pictures are `shown`, smaller where they would not fit a page."""

    cards: list[Card]
    width: int
    height: int
    shown: tuple[int, int]

    @property
    def pixel_art(self) -> bool:
        """Whether the pixels should be seen."""
        return self.shown[0] <= PIXEL_ART


def read(run_folder: Path) -> Gallery | None:
    """Read and encode the gallery of a run folder; None where there is none, or an empty one.

    Raises: DemurError if it is not a gallery.
    """
    found = read_gallery(run_folder)
    if found is None:
        return None
    pictures, original, attacked = found
    return _gallery(original.numpy(), attacked.numpy(), pictures)


def _gallery(
    original: NDArray[np.uint8], attacked: NDArray[np.uint8], items: list[Picture]
) -> Gallery:
    """Encode the pictures, smaller until they fit the budget: PNG has no quality to lower, so the size gives.

    They are grouped by outcome, the worst first. Within an outcome they keep their order.
    """
    order = sorted(range(len(items)), key=lambda place: WORST_FIRST.index(items[place].outcome))
    items = [items[place] for place in order]
    original, attacked = original[order], attacked[order]
    _, _, height, width = original.shape
    shown = (width, height)
    while True:
        cards = [_card(*one, shown) for one in zip(items, original, attacked, strict=True)]
        size = sum(len(card.original) + len(card.attacked) + len(card.difference) for card in cards)
        if size <= BUDGET or min(shown) <= 8:
            return Gallery(cards, width, height, shown)
        scale = min(0.95, sqrt(BUDGET / size))
        shown = (max(1, int(shown[0] * scale)), max(1, int(shown[1] * scale)))


def _card(
    item: Picture, original: NDArray[np.uint8], attacked: NDArray[np.uint8], shown: tuple[int, int]
) -> Card:
    change = attacked.astype(np.int16) - original
    # A power of two, so that factors compare between cards; 1 at least, also for an image that did not change.
    factor = 1 << max(0, int(np.log2(128 / max(1, int(np.abs(change).max())))))
    difference = np.clip(128 + factor * change, 0, 255).astype(np.uint8)
    # A mean over neighbours would grey the difference out, so where pictures shrink it keeps every n-th pixel instead.
    return Card(
        item,
        original=_png(original, shown, Image.Resampling.BOX),
        attacked=_png(attacked, shown, Image.Resampling.BOX),
        difference=_png(difference, shown, Image.Resampling.NEAREST),
        factor=factor,
    )


def _png(pixels: NDArray[np.uint8], shown: tuple[int, int], resampling: Image.Resampling) -> str:
    image = Image.fromarray(
        pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0))
    )
    buffer = BytesIO()
    (image if image.size == shown else image.resize(shown, resampling)).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
