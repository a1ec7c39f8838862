"""Square attack: random search with squares, which needs only scores."""

import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from demur.attacks.base import SearchAttack
from demur.attacks.hope import check_give_up, hopeless
from demur.attacks.state import AttackState
from demur.classifier import check_counts
from demur.errors import DemurError
from demur.goals import Loss, check_loss
from demur.norms import L2, Linf, per_image

DRAWN_AT_ONCE = 100
HALVED_AT = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Queries out of 10,000 after which the share of changed pixels is halved (sec. 4.1)."""


@dataclass(frozen=True, repr=False)
class Square(SearchAttack):
    """Change a random square of the image, and keep the change where the loss grows.

    Andriushchenko et al. 2020, algorithms 1 to 3, in Linf and L2, with the authors' later defaults.
    In Linf the search starts from vertical stripes of +-eps. Each image has its own squares. The
    loss must tell apart two candidates that both fail: the attack needs scores, not decisions.

    Parameters
    ----------
    n_queries : int, default 5000
        Largest number of forward passes for each image.
    initial_share : float in (0, 1], default 0.8
        Share of the pixels in the first squares. It is halved on the authors' schedule, stretched
        to the number of queries.
    loss : {"margin", "scaled_margin", "cross_entropy", "hinge"}, default "margin"
    restarts : int, default 1
        Runs on each image that is not solved.
    give_up : bool, default False
        Whether the search leaves an image after each fifth of the queries if the margin still lacks
        more than half of what was gained since the clean image. One query is spent on the clean
        image. A regularizer switches this off. Only for the margins.

    Examples
    --------
    >>> import torch
    >>> from demur import Classifier, attacks
    >>> module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> images, labels = torch.full((2, 1, 8, 8), 0.5), torch.tensor([0, 1])
    >>> result = attacks.Square(n_queries=200)(Classifier(module, 3), images, labels, "linf:0.5")
    >>> int(result.backwards.sum())
    0
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    default_batch_size: ClassVar[int] = 256
    low_precision: ClassVar[bool] = False

    n_queries: int = 5000
    initial_share: float = 0.8
    loss: Loss = "margin"
    restarts: int = 1
    give_up: bool = False

    def __post_init__(self) -> None:
        check_counts(n_queries=self.n_queries, restarts=self.restarts)
        check_loss(self.loss)
        check_give_up(self.give_up, self.loss)
        if not 0 < self.initial_share <= 1:
            raise DemurError(f"initial_share must lie in (0, 1], not {self.initial_share}.")

    def search(self, state: AttackState) -> None:
        """Try one square for each query."""
        if state.images.ndim != 4:
            raise DemurError(f"Square needs images (N, C, H, W), not {tuple(state.images.shape)}.")
        linf = isinstance(state.ball, Linf)
        best = _stripes(state) if linf else _tiles(state)
        loss = state.evaluate(best).loss
        clean = torch.full_like(loss, -torch.inf)
        judged = self.give_up and state.regularizer is None and self.n_queries > 1
        if judged:
            clean = state.evaluate(state.images, record=False).loss
        channels = best.shape[1]
        checked = {part * self.n_queries // 5 for part in range(1, 5)} if judged else set()
        for query in range(self.n_queries - 1 - judged):
            if query % DRAWN_AT_ONCE == 0:
                draws = state.uniform((DRAWN_AT_ONCE, 5 + channels), query)
            stop = hopeless(loss, clean) if query in checked else None
            best, loss, clean, draws = state.drop_solved(best, loss, clean, draws, stop=stop)
            if not len(best):
                return
            side = self._side(query, best)
            change = _square_linf if linf else _square_l2
            tried = change(state, best, draws[:, query % DRAWN_AT_ONCE], side)
            seen = state.evaluate(tried)
            better = seen.loss > loss
            best = torch.where(per_image(better, best), tried, best)
            loss = torch.where(better, seen.loss, loss)

    def _side(self, query: int, images: Tensor) -> int:
        """Compute the side of the square of this query, in pixels."""
        height = images.shape[2]
        width = images.shape[3]
        halvings = sum(query * 10_000 / self.n_queries > at for at in HALVED_AT)
        share = self.initial_share / 2**halvings
        side = max(round(math.sqrt(share * height * width)), 1)
        return min(side, height, width)


def _signs(draws: Tensor) -> Tensor:
    return torch.where(draws < 0.5, -1.0, 1.0).to(draws)


def _stripes(state: AttackState) -> Tensor:
    clean = state.images
    draws = state.uniform((clean.shape[1], 1, clean.shape[3]), "stripes")
    reach = per_image(state.ball.eps, clean).to(clean)
    return state.ball.project(clean + reach * _signs(draws))


def _window(draws: Tensor, side: int, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give rows (n, H) and columns (n, W) counted from the corner of a random square, and the
    square as flags (n, 1, H, W).
    """
    height, width = images.shape[2:]
    top = (draws[:, :1] * (height - side + 1)).long()
    left = (draws[:, 1:2] * (width - side + 1)).long()
    rows = torch.arange(height, device=images.device) - top
    columns = torch.arange(width, device=images.device) - left
    in_rows = (rows >= 0) & (rows < side)
    in_columns = (columns >= 0) & (columns < side)
    inside = in_rows[:, :, None] & in_columns[:, None, :]
    return rows, columns, inside[:, None]


def _square_linf(state: AttackState, best: Tensor, draws: Tensor, side: int) -> Tensor:
    _, _, inside = _window(draws, side, best)
    signs = _signs(draws[:, 5:])[:, :, None, None]
    reach = 2 * per_image(state.ball.eps, best).to(best) * signs
    return state.ball.project(best + reach * inside)


def _hill(rows: int, columns: int) -> Tensor:
    """Make the authors' pattern: rectangles around the middle, each ring weighing 1 / (its
    number)^2 more.
    """
    hill = torch.zeros(rows, columns)
    top = rows // 2
    left = columns // 2
    for ring in range(max(rows // 2 + 1, columns // 2 + 1)):
        high = slice(max(top - ring, 0), top + ring + 1)
        wide = slice(max(left - ring, 0), left + ring + 1)
        hill[high, wide] += 1 / (ring + 1) ** 2
    return torch.nn.functional.normalize(hill.flatten(), dim=0).reshape(hill.shape)


@cache
def _pattern(side: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Make a hill beside a valley (side, side), of Euclidean length 1 (eq. 2)."""
    if side == 1:
        return torch.ones(1, 1, device=device, dtype=dtype)
    pattern = torch.cat([_hill(side // 2, side), -_hill(side - side // 2, side)])
    unit = torch.nn.functional.normalize(pattern.flatten(), dim=0)
    return unit.reshape(pattern.shape).to(device, dtype)


def _tiles(state: AttackState) -> Tensor:
    """Start in L2 with tiles of a fifth of the image, each a pattern of random sign."""
    clean = state.images
    height, width = clean.shape[2:]
    side = max(min(height, width) // 5, 1)
    down = height // side
    across = width // side
    draws = state.uniform((clean.shape[1], down, across), "tiles")
    tiles = torch.einsum(
        "ncij,kl->ncikjl", _signs(draws), _pattern(side, clean.device, clean.dtype)
    )
    tiles = tiles.reshape(*clean.shape[:2], down * side, across * side)
    change = torch.zeros_like(clean)
    top = (height - down * side) // 2
    left = (width - across * side) // 2
    change[:, :, top : top + down * side, left : left + across * side] = tiles
    tiled = _to_length(state, change)
    # A mask that the tiles do not reach has a start of its own.
    reached = (tiled != clean).flatten(1).any(1)
    return torch.where(per_image(reached, clean), tiled, state.random_start())


def _to_length(state: AttackState, change: Tensor) -> Tensor:
    """Stretch a change inside the mask to eps, and clip."""
    change = change if state.ball.mask is None else change * state.ball.mask
    length = L2.measure(change).clamp(min=1e-12)
    stretch = per_image(state.ball.eps / length, change).to(change)
    return state.ball.project(state.images + change * stretch)


def _square_l2(state: AttackState, best: Tensor, draws: Tensor, side: int) -> Tensor:
    """Move the change of one window into another one (algorithm 3)."""
    side = min(max(side, 3) | 1, *best.shape[2:])
    rows, columns, here = _window(draws, side, best)
    _, _, there = _window(draws[:, 2:], side, best)
    change = best - state.images
    pattern = _pattern(side, best.device, best.dtype)
    rows = rows.clamp(0, side - 1)
    columns = columns.clamp(0, side - 1)
    laid = pattern[rows[:, :, None], columns[:, None, :]]
    turned = pattern[columns[:, None, :], rows[:, :, None]]
    laid = torch.where(draws[:, 4, None, None] < 0.5, laid, turned)[:, None] * here
    window = (change * here).flatten(2).norm(dim=2)[:, :, None, None]
    signs = _signs(draws[:, 5:])[:, :, None, None]
    fresh = laid * signs + change * here / (window + 1e-12)
    length = L2.measure(change).to(best)
    budget = (state.ball.eps.to(best) ** 2 - length**2).clamp(min=0) / best.shape[1]
    both = (change * (here | there)).flatten(2).square().sum(2)
    reach = (per_image(budget, best)[:, :, 0, 0] + both).sqrt()[:, :, None, None]
    fresh = fresh / (fresh.flatten(2).norm(dim=2)[:, :, None, None] + 1e-12) * reach
    return _to_length(state, torch.where(here, fresh, change * ~there))
