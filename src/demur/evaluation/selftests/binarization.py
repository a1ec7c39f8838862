"""The binarization test: an attack must find a boundary that is known to be there."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from demur import seeds
from demur.attacks.base import Attack
from demur.attacks.frozen import KernelMachine
from demur.bounds.tracing import Traced
from demur.classifier import Classifier, decide
from demur.evaluation.store import Computed
from demur.norms import ball_of, per_image
from demur.threat import ThreatModel

INNER: Final = 0.95
"""Of eps: the distance of the inner points."""
CLOSENESS: Final = 0.999
"""Where the boundary lies between the outermost inner point, 0, and the boundary point, 1."""
FEWEST: Final = 9
"""Inner points at least."""
TRIES: Final = 20
"""Rounds of points that are drawn until enough of them are accepted."""
NORMS: Final = ("linf", "l2")
"""The norms in which points at a distance are drawn."""


@dataclass(frozen=True)
class Binarization:
    """Zimmermann et al. 2022, "Increasing confidence in adversarial robustness evaluations".

    For each image, the last layer is replaced by one with two classes. It separates `points` inner
    points at .95 eps, and the image itself, from one boundary point at eps. So a success exists.
    The attack of the audit starts at the image and must find one. As many random points within eps
    must not: else the task is too easy and says nothing.

    The new layer is a logistic regression without penalty on what the last linear layer reads, or
    the kernel machine with the most features where no linear layer is called. Its boundary lies
    .999 of the way to the boundary point, and its scores have the scale of the model's own margin.
    A model that rejects keeps its rejection: all points are drawn again until they are accepted,
    and a success must be accepted, too.

    Deviations: where the points cannot be separated, half of the inner points are tried, and again,
    down to 9. The inner points are corners (in L2 directions) like the boundary point, so that only
    their distance tells them apart.

    Parameters
    ----------
    attack : Attack
    threat : ThreatModel
        In Linf or L2, with an eps.
    points : int
        Inner points.

    Examples
    --------
    >>> from demur import attacks
    >>> network = nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 3))
    >>> images, labels = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    >>> probe = Binarization(attacks.PGD(steps=40), ThreatModel("linf", 0.1), points=19)
    >>> _, found = probe.run(Classifier(network, 3, rejects=False), images, labels, 0, 8)
    >>> found["built"].tolist()
    [True, True]
    """

    title: ClassVar[str] = "binarization"
    attack: Attack
    threat: ThreatModel
    points: int

    def run(
        self, model: Classifier, images: Tensor, labels: Tensor, seed: int, batch_size: int
    ) -> Computed:
        """Flag the images (n,) whose task was `built`, those that the attack `solved`, and those
        that `random` points solved.
        """
        layer = last_layer(model, images[:1])
        found = {name: torch.zeros(len(images), dtype=torch.bool) for name in ("built", "solved")}
        found["random"] = torch.zeros(len(images), dtype=torch.bool)
        if layer is None:
            return {"layer": ""}, found
        for place, image in enumerate(torch.split(images, 1)):
            task = self._built(model, layer, image, seed, batch_size)
            if task is None:
                continue
            found["built"][place] = True
            label = torch.zeros(1, dtype=torch.int64)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = self.attack(task, image, label, self.threat, seed=seed)
            found["solved"][place] = result.success[0]
            found["random"][place] = self._by_chance(task, image, seed, batch_size)
        return {"layer": type(layer).__name__}, found

    def passes(self) -> tuple[float, float]:
        """The points, and the gradients of an attack that succeeds soon."""
        return 2.5 * self.points, 20

    def _built(
        self, model: Classifier, layer: nn.Module, image: Tensor, seed: int, batch_size: int
    ) -> Classifier | None:
        """Make the classifier of one image; None if points are not accepted or not separable."""
        if int(decide(model.scores(image), model.num_classes)[0]) < 0:
            return None
        with _read(layer) as seen:
            here = model.scores(image)
            inner = self._features(model, seen, image, seed, batch_size, "inner", self.points)
            outer = self._features(model, seen, image, seed, batch_size, "boundary", 1)
            seen.clear()
            model.scores(image)
            clean = seen[-1].flatten(1)
        if inner is None or outer is None:
            return None
        separated = _separated(torch.cat([clean, inner]).numpy(), outer.numpy())
        if separated is None:
            return None
        weight, bias = separated
        classes = here[0, : model.num_classes].topk(2).values
        margin = float(classes[0] - classes[1])
        at_clean = abs(float(clean[0].double() @ weight + bias))
        scale = margin / at_clean if margin > 0 and at_clean > 0 else 1.0
        task = _Task(model, layer, scale * weight, scale * bias)
        binary = Classifier(task.to(image.device), 2, rejects=model.rejects).eval()
        return binary if int(binary.predict(image)[0]) == 0 else None

    def _features(
        self,
        model: Classifier,
        seen: list[Tensor],
        image: Tensor,
        seed: int,
        batch_size: int,
        kind: str,
        count: int,
    ) -> Tensor | None:
        """Give the features (count, d) of accepted points; None if too few are accepted."""
        kept: list[Tensor] = []
        some = min(count, batch_size)
        for batch in range(TRIES * -(-count // some)):
            images = self._points(image, some, seed, kind, batch)
            seen.clear()
            accepted = decide(model.scores(images, some), model.num_classes) >= 0
            kept += list(seen[-1].flatten(1)[accepted])
            if len(kept) >= count:
                return torch.stack(kept[:count])
        return None

    def _points(self, image: Tensor, count: int, seed: int, kind: str, batch: int) -> Tensor:
        """Draw points (count, C, H, W): at .95 eps, at eps, or by chance anywhere within eps."""
        eps = self.threat.eps
        assert isinstance(eps, float)
        radius = eps * (INNER if kind == "inner" else 1.0)
        keys = seeds.image_keys(image)
        shape = (count, *image.shape[1:])
        norm = self.threat.norm
        many = image.expand(count, -1, -1, -1)
        limits = torch.full((count,), radius, dtype=torch.float64)
        ball = ball_of(norm)(many, limits, None)
        if kind == "chance":
            return ball.random([keys[0] + place for place in range(count)], seed, kind, batch)
        if norm == "linf":
            direction = seeds.uniform(keys, shape, seed, "binarization", kind, batch)[0] - 0.5
            direction = direction.sign()
        else:
            direction = seeds.normal(keys, shape, seed, "binarization", kind, batch)[0]
        change = radius * ball.steepest_step(direction)
        for _ in range(3 if norm == "l2" else 0):  # what [0, 1] cuts off is given to other pixels
            cut = (many + change).clamp(0, 1) - many
            size = ball.measure(cut).clamp(min=1e-12)
            change = cut * per_image(radius / size, cut).to(cut.dtype)
        return ball.project(many + change)

    def _by_chance(self, task: Classifier, image: Tensor, seed: int, batch_size: int) -> bool:
        """Say whether as many random points within eps hold a success."""
        some = min(self.points, batch_size)
        for batch in range(-(-self.points // some)):
            images = self._points(image, some, seed, "chance", batch)
            if bool((task.predict(images, some) == 1).any()):
                return True
        return False


class _Task(nn.Module):
    """A model whose last layer is replaced by a linear one with two classes."""

    weight: Tensor

    def __init__(self, model: Classifier, layer: nn.Module, weight: Tensor, bias: float) -> None:
        super().__init__()
        self.model = model
        self.layer = layer
        self.bias = bias
        self.register_buffer("weight", weight)

    def forward(self, images: Tensor) -> Tensor:
        with _read(self.layer, detached=False) as seen:
            scores: Tensor = self.model(images)
        # Around 0, so that float32 holds the difference: float64 sums.
        value = seen[-1].flatten(1).double() @ self.weight + self.bias
        columns = torch.stack([-value / 2, value / 2], 1)
        if self.model.rejects:
            classes = scores[:, : self.model.num_classes].double()
            ahead = classes.amax(1) - scores[:, -1].double()
            columns = torch.cat([columns, (columns.amax(1) - ahead)[:, None]], 1)
        return columns.float()


def last_layer(model: Classifier, images: Tensor) -> nn.Module | None:
    """Find the last linear layer that a pass calls; without one, the kernel machine with the most
    features; else None.
    """
    called: list[tuple[nn.Module, int]] = []

    def note(module: nn.Module, given: tuple[Any, ...]) -> None:
        if given and isinstance(given[0], Tensor) and given[0].ndim == 2:
            called.append((module, given[0].shape[1]))

    kinds = (nn.Linear, KernelMachine)
    parts = [one for one in model.modules() if isinstance(one, kinds)]
    handles = [one.register_forward_pre_hook(note) for one in parts]
    try:
        model.scores(images)
    finally:
        for handle in handles:
            handle.remove()
    linear = [module for module, _ in called if isinstance(module, nn.Linear)]
    if linear:
        return linear[-1]
    return max(called, key=lambda one: one[1])[0] if called else None


@contextmanager
def _read(layer: nn.Module, detached: bool = True) -> Iterator[list[Tensor]]:
    """Inside, notes what the layer is given."""
    seen: list[Tensor] = []

    def note(module: nn.Module, given: tuple[Any, ...]) -> None:
        if isinstance(given[0], Traced):
            return  # certified consistency records its graph: there are no values
        seen.append(given[0].detach().cpu() if detached else given[0])

    handle = layer.register_forward_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


def _separated(inner: NDArray[Any], outer: NDArray[Any]) -> tuple[Tensor, float] | None:
    """Fit weight (d,) and bias: negative on the inner points (n, d), positive on the outer (1, d).

    Half of the inner points are left out as long as no such weight is found.
    """
    outer = outer.astype(np.float64)
    count = len(inner)
    while count > FEWEST:
        points = np.concatenate([inner[:count].astype(np.float64), outer])
        centre, spread = points.mean(0), points.std(0)
        spread[spread < 1e-9 * (1 + np.abs(centre))] = np.inf  # a constant feature tells nothing
        sides = np.arange(count + 1) == count
        fit = LogisticRegression(C=np.inf, max_iter=1000, class_weight="balanced")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # separable classes have no best weight, as wanted
            fit.fit((points - centre) / spread, sides)
        weight = fit.coef_[0] / spread
        values = (points - centre) @ weight
        gap = values[-1] - values[:-1].max()
        if np.isfinite(gap) and gap > 1e-6 * np.abs(values).max():
            boundary = values[:-1].max() + CLOSENESS * gap
            return torch.from_numpy(weight), -float(boundary + centre @ weight)
        count //= 2
    return None
