"""Random requests to attacks: shapes, precisions, pixels, masks, eps, goals, batches and norms.

A request is valid, or demur refuses it in one line. Every result is judged by `judging`.
"""

import itertools
import math
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from demur import Classifier, ThreatModel
from demur import attacks as library
from demur.attacks import AnyError, Attack, AttackResult, Evade, ForceReject, Goal, Target
from fuzzing.judging import Array, Claim, judge

NORMS = ("linf", "l2", "l1", "l0")
LOSSES = ("margin", "cross_entropy", "hinge", "scaled_margin")
SHAPES = [(1, 1, 1), (3, 1, 1), (1, 1, 7), (1, 7, 1), (1, 5, 5), (3, 4, 6), (2, 3, 3), (1, 8, 8)]
SHAPES_OF_OTHERS = [(1,), (7,), (24,), (1, 2, 3, 3), (2, 1, 1, 4)]


@dataclass(frozen=True)
class Subject:
    """A random problem: the module alone, the classifier around it, images and labels."""

    module: nn.Module
    classifier: Classifier
    images: Tensor
    labels: Tensor
    columns: int


class Dense(nn.Module):
    """One or two layers on flattened images, of any shape."""

    def __init__(self, pixels: int, columns: int, hidden: int) -> None:
        super().__init__()
        sizes = [pixels, hidden, columns] if hidden else [pixels, columns]
        pairs = itertools.pairwise(sizes)
        self.layers = nn.ModuleList([nn.Linear(given, made) for given, made in pairs])

    def forward(self, images: Tensor) -> Tensor:
        """Compute the scores."""
        values = images.flatten(1)
        for layer in self.layers[:-1]:
            values = layer(values).tanh()
        scores: Tensor = self.layers[-1](values)
        return scores


def pixels(source: random.Random, shape: tuple[int, ...]) -> Tensor:
    """Draw images: of 8 bits, of float32, black and white, tiny, denormal, or of one value."""
    generator = torch.Generator().manual_seed(source.randrange(1 << 30))
    draws = torch.rand(shape, generator=generator, dtype=torch.float64)
    kind = source.choice(["bytes", "bytes", "floats", "binary", "tiny", "denormal", "mixed", "one"])
    if kind == "bytes":
        return (draws * 255).round() / 255
    if kind == "binary":
        return draws.round()
    if kind == "tiny":
        return draws * 10.0 ** -source.randint(5, 45)
    if kind == "denormal":
        return torch.where(draws < 0.5, draws * 1e-38, draws)
    if kind == "mixed":
        powers = torch.rand(shape, generator=generator, dtype=torch.float64) * 50
        return torch.where(draws < 0.3, -torch.zeros(shape).double(), draws * 10.0**-powers)
    return torch.full(shape, source.random(), dtype=torch.float64) if kind == "one" else draws


def subject(source: random.Random) -> Subject:
    """Draw a problem."""
    shape = source.choice(SHAPES if source.random() < 0.75 else SHAPES_OF_OTHERS)
    count = source.choice([1, 1, 2, 3, 5])
    classes = source.randint(2, 5)
    columns = classes + source.randint(0, 1)
    torch.manual_seed(source.randrange(1 << 30))
    module: nn.Module = Dense(math.prod(shape), columns, source.choice([0, 4]))
    if len(shape) == 3 and source.random() < 0.3:
        module = nn.Sequential(
            nn.Conv2d(shape[0], 2, 3, padding=1),
            nn.ReLU(inplace=source.random() < 0.5),
            nn.Flatten(),
            nn.Linear(2 * shape[1] * shape[2], columns),
        )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(source.choice([0.1, 1.0, 10.0]))
    kinds = [torch.float32] * 6 + [torch.float64, torch.float16, torch.bfloat16]
    module = module.to(source.choice(kinds)).train(source.random() < 0.5)
    images = pixels(source, (count, *shape)).clamp(0, 1)
    images = images.to(torch.float64 if source.random() < 0.15 else torch.float32)
    labels = torch.tensor([source.randrange(classes) for _ in range(count)])
    if source.random() < 0.2:
        labels = labels.to(source.choice([torch.uint8, torch.int32, torch.int16]))
    return Subject(module, Classifier(module, classes), images, labels, columns)


def attack_of(source: random.Random) -> Attack:
    """Draw an attack of few steps."""
    steps = source.randint(1, 6)
    loss: Any = source.choice(LOSSES)
    flag = source.random() < 0.4
    restarts = source.randint(1, 2)
    known: list[Callable[[], Attack]] = [
        lambda: library.PGD(steps, loss=loss, random_start=flag, restarts=restarts),
        lambda: library.PGD(steps, loss=loss, keep_maximizing=flag),
        lambda: library.APGD(steps, source.randint(0, 3), restarts=restarts),
        lambda: library.FGSM(loss, flag),
        lambda: library.FGM(loss, flag),
        lambda: library.RandomNoise(source.randint(1, 5)),
        lambda: library.DDN(steps),
        lambda: library.FMN(2 * steps),
        lambda: library.SigmaZero(2 * steps),
        lambda: library.Square(source.randint(1, 12), loss=loss, restarts=restarts),
        lambda: library.CarliniWagnerL2(1.0, 2, steps),
        lambda: library.CarliniWagnerL0(1.0, steps),
        lambda: library.CarliniWagnerLinf(1.0, steps),
        lambda: library.NormalizedGradient(0.2, steps),
        lambda: library.WithBPDA(library.PGD(steps)),
        lambda: library.Strongest(2, 6, 1, square_sample=source.choice([None, 1])),
    ]
    return source.choice(known)()


def mask_of(source: random.Random, images: Tensor, norm: str) -> Tensor | None:
    """Draw a mask that broadcasts, or None; now and then one that is wrong."""
    kinds = ["none"] * 4 + ["flags"] * 4 + ["all", "nothing"]
    kinds += ["scaled", "tiny"] if norm == "linf" or source.random() < 0.05 else []
    kind = "bad" if source.random() < 0.03 else source.choice(kinds)
    if kind == "none":
        return None
    shape = source.choice([images.shape, images.shape[1:], images.shape[-1:]])
    generator = torch.Generator().manual_seed(source.randrange(1 << 30))
    draws = torch.rand(shape, generator=generator)
    masks = {
        "flags": (draws < 0.6).to(source.choice([torch.bool, torch.float32, torch.int64])),
        "all": torch.ones(shape),
        "nothing": torch.zeros(shape),
        "scaled": draws,
        "tiny": draws * 10.0 ** -source.randint(1, 44),
    }
    wrong = [draws + 1, draws * torch.nan, torch.ones(*images.shape, 2)]
    return source.choice(wrong) if kind == "bad" else masks[kind]


def eps_of(source: random.Random, norm: str, count: int) -> Any:
    """Draw an eps, one for each image, none, or a wrong one."""
    scale = {"linf": 0.3, "l2": 2.0, "l1": 5.0, "l0": 9.0}[norm]
    ordinary = [scale * source.random() for _ in range(12)]
    odd = [None, 0.0, 1e-40, 1e-30, 1e-9, 1 / 255, 1.0, math.inf, 1e300]
    wrong = [-1.0, math.nan]
    chosen = source.choice([*ordinary, *odd] if source.random() < 0.97 else wrong)
    if source.random() < 0.1:
        return torch.tensor([scale * source.random() for _ in range(count)])
    return chosen


def goal_of(source: random.Random, problem: Subject) -> Goal:
    """Draw a goal."""
    classes = problem.classifier.num_classes
    other = [(int(label) + source.randint(1, classes - 1)) % classes for label in problem.labels]
    goals: list[Goal] = [Evade(), Evade(), AnyError(), Target(torch.tensor(other))]
    goals.append(Target(torch.tensor(other, dtype=torch.uint8)))
    if problem.columns > classes or source.random() < 0.05:
        goals.append(ForceReject())
    if other[0] not in problem.labels.tolist() or source.random() < 0.05:
        goals.append(Target(other[0]))
    return source.choice(goals)


def wanted_columns(goal: Goal, problem: Subject) -> Callable[[int, int], bool]:
    """Say which columns a goal wants, in words of its definition."""
    classes = problem.classifier.num_classes
    labels = problem.labels.tolist()

    def wanted(column: int, row: int) -> bool:
        if isinstance(goal, ForceReject):
            return column == classes
        if isinstance(goal, Target):
            given = torch.as_tensor(goal.classes).reshape(-1).tolist()
            return bool(column == given[row % len(given)])
        return column != labels[row] and (column < classes or isinstance(goal, AnyError))

    return wanted


def scores_alone(module: nn.Module) -> Callable[[Tensor], Array]:
    """Score images by the module alone, one by one, in evaluation mode."""

    def scores(images: Tensor) -> Array:
        with suppress(NotImplementedError):
            module.eval()  # an exported program has no modes
        first = next(module.parameters(), None)
        kind = images.dtype if first is None else first.dtype
        with torch.no_grad():
            # Copies: a module may write all its answers into the same memory.
            rows = [module(image[None].clone().to(kind)).detach().clone() for image in images]
        return torch.cat(rows).double().numpy()

    return scores


ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}


def modes_of(module: nn.Module) -> list[bool]:
    """Give the mode of each part; a frozen module has none."""
    return [getattr(part, "training", False) for part in module.modules()]


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Give the tensors of the module's state; quantised layers have other things in it."""
    return {name: one for name, one in module.state_dict().items() if isinstance(one, Tensor)}


def judged(
    problem: Subject,
    threat: ThreatModel,
    attack: Callable[..., AttackResult],
    options: Any,
    scores: Callable[[Tensor], Array] | None,
) -> None:
    """Attack, judge the result, and look whether the caller's objects are as before.

    `scores` are those of the module alone, or None if they are random.
    """
    images = problem.images.clone()
    modes = modes_of(problem.module)
    kept = {name: one for name, one in weights_of(problem.module).items() if not is_lazy(one)}
    state = {name: one.clone() for name, one in kept.items()}
    learning = [one.requires_grad for one in problem.module.parameters()]
    random_state = torch.get_rng_state()
    try:
        result = attack(problem.classifier, problem.images, problem.labels, threat, **options)
    finally:
        assert torch.equal(torch.get_rng_state(), random_state), "the random state has changed"
        assert torch.equal(problem.images, images), "the caller's images have changed"
        assert modes_of(problem.module) == modes, "modes"
        assert [one.requires_grad for one in problem.module.parameters()] == learning, "frozen"
        for name, one in weights_of(problem.module).items():
            same = name not in state or one.is_meta or torch.equal(one, state[name])
            assert same, f"the weights {name} have changed"
    count = len(images)
    eps = math.inf if threat.eps is None else threat.eps
    mask = torch.ones(()) if threat.mask is None else torch.as_tensor(threat.mask)
    first = next(problem.module.parameters(), images)
    rounding = ROUNDING[first.dtype]
    claim = Claim(
        images,
        problem.labels,
        threat.norm,
        np.broadcast_to(np.asarray(torch.as_tensor(eps, dtype=torch.float64)), (count,)),
        np.broadcast_to(mask.double().numpy(), images.shape),
        wanted_columns(threat.goal, problem),
        result,
        scores,
        rounding,
    )
    judge(claim)


def case(source: random.Random) -> str:
    """One random request."""
    problem = subject(source)
    attack = attack_of(source)
    known = getattr(attack, "norms", NORMS)
    norm = source.choice(known if source.random() < 0.95 else NORMS)
    count = len(problem.images)
    eps = eps_of(source, norm, count)
    mask = mask_of(source, problem.images, norm)
    threat = ThreatModel(norm, eps, goal_of(source, problem), mask)
    sizes = [1, 2, 3, 7, None, None] if source.random() < 0.95 else [0, -1, 2.5, True]
    options: dict[str, Any] = {
        "seed": source.randrange(1 << 16),
        "batch_size": source.choice(sizes),
        "precision": source.choice(["auto", "float32", "bfloat16"]),
    }
    call: Callable[..., AttackResult] = attack
    takes_points = getattr(attack, "takes_starting_points", False)
    if takes_points and source.random() < 0.3:
        points = pixels(source, tuple(problem.images.shape)).clamp(0, 1)
        options["starting_points"] = points.to(problem.images.dtype)
    if source.random() < 0.05:
        call = library.Transfer(attack)
        options["surrogate"] = problem.classifier
        options.pop("starting_points", None)
    judged(problem, threat, call, options, scores_alone(problem.module))
    return f"{type(attack).__name__} {norm}"
