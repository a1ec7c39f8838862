"""Square attack (Andriushchenko et al. 2020): random search with squares, which needs nothing but scores."""

import torch
from torch import Tensor

from demur import seeds
from demur.attacks.checks import check_counts, limited
from demur.attacks.driver import AttackResult, Problem, drive
from demur.attacks.goals import Evade, Goal
from demur.attacks.norms import L2, per_image
from demur.classifier import Classifier
from demur.errors import DemurError

DRAWN_AT_ONCE = 100
HALVED_AT = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 queries: sec. 4.1


def square(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    norm: str = "linf",
    eps: float | Tensor,
    queries: int = 5000,
    initial_share: float = 0.8,
    goal: Goal | None = None,
    region: Tensor | None = None,
    restarts: int = 1,
    seed: int = 0,
    batch_size: int = 256,
) -> AttackResult:
    """Change a random square of the image, and keep the change where the goal's loss grows (algorithms 1 to 3).

    For `linf` and `l2`, with the authors' later defaults: 5,000 queries, and squares of at first `initial_share` of the pixels,
    a share that is halved on their schedule, stretched to the number of queries. In Linf the search starts from vertical
    stripes of +-eps. Each image has its own squares. The loss must tell candidates apart that both fail: scores are needed, not decisions.

    Images (N, C, H, W) in [0, 1], labels (N,). Raises: DemurError for input that does not fit.
    """
    if norm not in ("linf", "l2"):
        raise DemurError(f"square works in linf and l2, not {norm!r}.")
    if images.ndim != 4:
        raise DemurError(f"square needs images (N, C, H, W), not {tuple(images.shape)}.")
    check_counts(queries=queries)
    if not 0 < initial_share <= 1:
        raise DemurError(f"initial_share must lie in (0, 1], not {initial_share}.")

    def attack(problem: Problem) -> None:
        best = _stripes(problem) if norm == "linf" else _tiles(problem)
        loss = problem.evaluate(best).loss
        channels, height, width = best.shape[1:]
        for query in range(queries - 1):
            if query % DRAWN_AT_ONCE == 0:
                draws = seeds.uniform(problem.keys, (DRAWN_AT_ONCE, 5 + channels), problem.seed, *problem.names, query).to(best)
            best, loss, draws = problem.unsolved(best, loss, draws)
            if not len(best):
                return
            share = initial_share / 2 ** sum(query * 10_000 / queries > at for at in HALVED_AT)
            side = max(round((share * height * width) ** 0.5), 1)
            change = _square_linf if norm == "linf" else _square_l2
            tried = change(problem, best, draws[:, query % DRAWN_AT_ONCE], min(side, height, width))
            seen = problem.evaluate(tried)
            better = seen.loss > loss
            best, loss = torch.where(per_image(better, best), tried, best), torch.where(better, seen.loss, loss)

    return drive(
        attack,
        classifier,
        images,
        labels,
        goal=goal or Evade(),
        norm=norm,
        eps=limited(eps),
        region=region,
        restarts=restarts,
        seed=seed,
        batch_size=batch_size,
    )


def _signs(draws: Tensor) -> Tensor:
    return torch.where(draws < 0.5, -1.0, 1.0).to(draws)


def _stripes(problem: Problem) -> Tensor:
    clean = problem.images
    draws = seeds.uniform(problem.keys, (clean.shape[1], 1, clean.shape[3]), problem.seed, *problem.names, "stripes").to(clean)
    return problem.ball.confine(clean + per_image(problem.ball.eps, clean).to(clean) * _signs(draws))


def _window(draws: Tensor, side: int, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (n, H) and columns (n, W) counted from a random square's corner, and the square as flags (n, 1, H, W)."""
    height, width = images.shape[2:]
    rows = torch.arange(height, device=images.device) - (draws[:, :1] * (height - side + 1)).long()
    columns = torch.arange(width, device=images.device) - (draws[:, 1:2] * (width - side + 1)).long()
    inside = ((rows >= 0) & (rows < side))[:, :, None] & ((columns >= 0) & (columns < side))[:, None, :]
    return rows, columns, inside[:, None]


def _square_linf(problem: Problem, best: Tensor, draws: Tensor, side: int) -> Tensor:
    _, _, inside = _window(draws, side, best)
    reach = 2 * per_image(problem.ball.eps, best).to(best) * _signs(draws[:, 5:])[:, :, None, None]
    return problem.ball.confine(best + reach * inside)


def _hill(rows: int, columns: int) -> Tensor:
    """The authors' pattern: rectangles around the middle, each ring weighing 1 / (its number)^2 more than the one outside it."""
    hill = torch.zeros(rows, columns)
    top, left = rows // 2, columns // 2
    for ring in range(max(rows // 2 + 1, columns // 2 + 1)):
        hill[max(top - ring, 0) : top + ring + 1, max(left - ring, 0) : left + ring + 1] += 1 / (ring + 1) ** 2
    return torch.nn.functional.normalize(hill.flatten(), dim=0).reshape(hill.shape)


def _pattern(side: int) -> Tensor:
    """A hill beside a valley (side, side), of Euclidean length 1: eq. 2."""
    if side == 1:
        return torch.ones(1, 1)
    pattern = torch.cat([_hill(side // 2, side), -_hill(side - side // 2, side)])
    return torch.nn.functional.normalize(pattern.flatten(), dim=0).reshape(pattern.shape)


def _tiles(problem: Problem) -> Tensor:
    """Start of the search in L2: tiles of a fifth of the image, each a pattern of random sign."""
    clean = problem.images
    height, width = clean.shape[2:]
    side = max(min(height, width) // 5, 1)
    down, across = height // side, width // side
    draws = seeds.uniform(problem.keys, (clean.shape[1], down, across), problem.seed, *problem.names, "tiles").to(clean)
    tiles = torch.einsum("ncij,kl->ncikjl", _signs(draws), _pattern(side).to(clean)).reshape(*clean.shape[:2], down * side, across * side)
    change = torch.zeros_like(clean)
    top, left = (height - down * side) // 2, (width - across * side) // 2
    change[:, :, top : top + down * side, left : left + across * side] = tiles
    tiled = _to_length(problem, change)
    # A region that the tiles do not reach has a start of its own.
    return torch.where(per_image((tiled != clean).flatten(1).any(1), clean), tiled, problem.random_start())


def _to_length(problem: Problem, change: Tensor) -> Tensor:
    """Stretch a change inside the region to eps, and clip."""
    change = change if problem.ball.region is None else change * problem.ball.region
    length = L2.size(change).clamp(min=1e-12)
    return problem.ball.confine(problem.images + change * per_image(problem.ball.eps / length, change).to(change))


def _square_l2(problem: Problem, best: Tensor, draws: Tensor, side: int) -> Tensor:
    """Move the change of one window into another (algorithm 3)."""
    side = min(max(side, 3) | 1, *best.shape[2:])
    rows, columns, here = _window(draws, side, best)
    _, _, there = _window(draws[:, 2:], side, best)
    change = best - problem.images
    pattern = _pattern(side).to(best)
    laid = pattern[rows.clamp(0, side - 1)[:, :, None], columns.clamp(0, side - 1)[:, None, :]]
    turned = pattern[columns.clamp(0, side - 1)[:, None, :], rows.clamp(0, side - 1)[:, :, None]]
    laid = torch.where(draws[:, 4, None, None] < 0.5, laid, turned)[:, None] * here
    window = (change * here).flatten(2).norm(dim=2)[:, :, None, None]
    fresh = laid * _signs(draws[:, 5:])[:, :, None, None] + change * here / (window + 1e-12)
    budget = (problem.ball.eps.to(best) ** 2 - L2.size(change).to(best) ** 2).clamp(min=0) / best.shape[1]
    both = (change * (here | there)).flatten(2).square().sum(2)
    length = (per_image(budget, best)[:, :, 0, 0] + both).sqrt()[:, :, None, None]
    fresh = fresh / (fresh.flatten(2).norm(dim=2)[:, :, None, None] + 1e-12) * length
    return _to_length(problem, torch.where(here, fresh, change * ~there))
