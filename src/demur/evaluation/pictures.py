"""Pictures for the gallery: which of many, and what is said of each."""

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Literal

import torch
from torch import Tensor

from demur.attacks import sizes
from demur.classifier import Classifier, Outcome, decide, outcomes_of
from demur.data import ImageSet, in_memory, to_float
from demur.evaluation.on_images import Evaluate
from demur.evaluation.plan import Outputs
from demur.evaluation.results import Picture

SHOWN_SIZE = 224
NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1", "l0": "L0"}
_NAMES: tuple[Literal["correct", "rejected", "wrong"], ...] = (
    "correct",
    "rejected",
    "wrong",
)  # in the order of Outcome


def mixed(outcomes: Tensor, start: int) -> list[int]:
    """Order images by their outcomes (N,): in turn a rejected, a wrong and a correct one.

    The first is number `start` of its outcome, so that not all attacks begin with the same image.
    """
    found = [
        (outcomes == outcome).nonzero().flatten()
        for outcome in (Outcome.REJECTED, Outcome.WRONG, Outcome.CORRECT)
    ]
    by_outcome = [index.roll(-start).tolist() for index in found]
    return [index for turn in zip_longest(*by_outcome) for index in turn if index is not None]


def describe(
    classifier: Classifier,
    model: str,
    attack: str,
    attacker: str,
    clean: ImageSet,
    attacked: Tensor,
    probabilities: bool = False,
) -> Iterator[Picture]:
    """Describe the answers of a model before and after an attack, picture by picture.

    The score is the softmax of the answer's column. Where scores are `probabilities`, it is the
    column itself.
    """
    before, after = classifier.scores(clean.to_float()), classifier.scores(to_float(attacked))
    sure = [scores if probabilities else scores.softmax(1) for scores in (before, after)]
    decided = decide(after, classifier.num_classes)
    became = outcomes_of(decided, clean.labels)
    moved = sizes(clean.to_float(), to_float(attacked))
    names = [*clean.class_names, "reject"]  # REJECT is -1: the last
    for row, label in enumerate(clean.labels.tolist()):
        yield Picture(
            label=names[label],
            model=model,
            attack=attack,
            attacker=attacker,
            clean_decision=names[int(decide(before, classifier.num_classes)[row])],
            clean_score=float(sure[0][row].max()),
            decision=names[int(decided[row])],
            score=float(sure[1][row].max()),
            outcome=_NAMES[int(became[row])],
            l2=float(moved["l2"][row]),
            linf=float(moved["linf"][row]),
        )


def in_turn(
    parts: list[tuple[list[Picture], Tensor, Tensor]], count: int
) -> tuple[list[Picture], Tensor, Tensor]:
    """As many pictures of each part as fit into `count`, one after the other in turn."""
    each = max(1, count // max(1, len(parts)))
    order = [(part, place) for place in range(each) for part in parts if place < len(part[0])][
        :count
    ]
    empty = torch.zeros(0, 3, 1, 1, dtype=torch.uint8)
    before = torch.stack([part[1][place] for part, place in order]) if order else empty
    after = torch.stack([part[2][place] for part, place in order]) if order else empty
    return [part[0][place] for part, place in order], before, after


def enlarged(images: Tensor) -> Tensor:
    """Bring images (n, 1 or 3, H, W) to (n, 3, 224, 224). Small ones are enlarged pixel by pixel,
    larger ones are cropped to their middle.
    """
    factor = max(1, SHOWN_SIZE // images.shape[-1])
    large = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3).expand(-1, 3, -1, -1)
    height, width = large.shape[-2:]
    canvas = torch.full((len(images), 3, SHOWN_SIZE, SHOWN_SIZE), 255, dtype=torch.uint8)
    rows, columns = min(height, SHOWN_SIZE), min(width, SHOWN_SIZE)
    top, left = (height - rows) // 2, (width - columns) // 2
    at, from_left = (SHOWN_SIZE - rows) // 2, (SHOWN_SIZE - columns) // 2
    canvas[..., at : at + rows, from_left : from_left + columns] = large[
        ..., top : top + rows, left : left + columns
    ]
    return canvas


def gallery(
    outputs: Outputs, nodes: Sequence[Evaluate], count: int
) -> tuple[list[Picture], Tensor, Tensor]:
    """Draw a gallery from the stored images of some nodes.

    Parameters
    ----------
    outputs : Outputs
    nodes : sequence of Evaluate
        Nodes that keep their images.
    count : int
        Largest number of pictures.

    Returns
    -------
    pictures : list of Picture
    before, after : Tensor of shape (n, 3, 224, 224), uint8
    """
    parts = []
    for node in nodes if count else ():
        result = outputs.result(node)
        index = torch.tensor(mixed(result.tensors["stored_outcome"], 0)[:count], dtype=torch.int64)
        clean = in_memory(node.images.subset(index))
        attacked = result.tensors["stored"][index]
        model = outputs.model(node.scored_on)
        attack = f"{type(node.attack).__name__} in {NORMS[node.threat.norm]}" if node.threat else ""
        name = str(getattr(node.scored_on, "name", ""))
        pictures = list(describe(model, name, attack, node.attacker, clean, attacked))
        parts.append((pictures, enlarged(clean.images), enlarged(attacked)))
    return in_turn(parts, count)
