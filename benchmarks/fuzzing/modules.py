"""Odd modules: what users bring that is no plain network.

Each case makes a module that works in place, answers with something else than a table of scores,
has another precision, is scripted, frozen, exported, compiled or parametrised, ignores its mode,
or fails at some batch sizes; then it predicts, attacks or trains. A result is judged by `judging`;
what does not work is refused in one line.
"""

import random
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from demur import Classifier, ThreatModel, attacks, black_box, outcomes
from demur.training import fit
from fuzzing.attacks import Subject, judged, scores_alone
from fuzzing.oddities import (
    CLASSES,
    SHAPE,
    Named,
    Obstinate,
    Odd,
    OfInference,
    OneMemory,
    Parametrised,
)


def _fails_at(sizes: Callable[[int], bool], error: type[Exception]) -> Callable[[Tensor], Tensor]:
    def before(images: Tensor) -> Tensor:
        if sizes(len(images)):
            raise error(f"I do not take {len(images)}\nimages")
        return images

    return before


def _in_place(source: random.Random) -> nn.Module:
    def by_numpy(images: Tensor) -> Tensor:
        images.detach().numpy()[...] *= 0.5
        return images

    def sometimes(images: Tensor) -> Tensor:
        return images.mul_(0.5) if len(images) > 1 else images

    def of_a_view(images: Tensor) -> Tensor:
        images.flatten(1)[:, ::2].zero_()
        return images

    changes: list[Callable[[Tensor], Tensor]] = [
        lambda images: images.mul_(0.5),
        lambda images: images.sub_(0.5).div_(0.25),
        lambda images: nn.functional.relu(images, inplace=True),
        by_numpy,
        sometimes,
        of_a_view,
    ]
    return Odd(source.choice(changes))


def _answers(source: random.Random) -> nn.Module:
    changes: list[Callable[[Tensor], Any]] = [
        lambda scores: (scores,),
        lambda scores: [scores, scores],
        lambda scores: {"logits": scores},
        lambda scores: scores.detach().numpy(),
        lambda scores: None,
        lambda scores: scores[:1],
        lambda scores: torch.cat([scores, scores[:1]]),
        lambda scores: scores[:0],
        lambda scores: scores.sum(1),
        lambda scores: scores[:, :2],
        lambda scores: torch.cat([scores, scores], 1),
        lambda scores: scores[:, :, None, None],
        lambda scores: scores * torch.nan,
        lambda scores: scores / 0,
        lambda scores: torch.where(scores > 0, torch.inf, scores),
        lambda scores: torch.where(torch.arange(len(scores))[:, None] == 1, torch.nan, scores),
        lambda scores: (100 * scores).long(),
        lambda scores: scores > 0,
        lambda scores: scores.to(torch.complex64),
        lambda scores: scores.to_sparse(),
        lambda scores: scores.softmax(1),
        lambda scores: scores.argmax(1),
        lambda scores: scores.expand(2, *scores.shape),
        lambda scores: scores.half(),
        lambda scores: 1e38 * scores,
        lambda scores: scores.double() * 1e300,
        lambda scores: torch.zeros_like(scores),
    ]
    return Odd(after=source.choice(changes))


def _precision(source: random.Random) -> nn.Module:
    module = Odd().to(source.choice([torch.float16, torch.bfloat16, torch.float64]))
    if source.random() < 0.3:
        module.network.layers[1].float()  # of two precisions
    return module


def _graph(source: random.Random) -> nn.Module:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, CLASSES)).eval()
    if source.random() < 0.2:
        plain = plain.double()
    example = torch.zeros(2, *SHAPE).to(next(plain.parameters()).dtype)
    kind = source.choice(["scripted", "frozen", "traced", "exported", "of 2", "compiled", "packed"])
    made: Any  # most of these functions have no types
    if kind == "scripted":
        made = torch.jit.script(plain)
    elif kind == "frozen":
        made = torch.jit.freeze(torch.jit.script(plain))
    elif kind == "traced":
        made = torch.jit.trace(plain, example)  # type: ignore[no-untyped-call]
    elif kind == "exported":
        batch = {0: torch.export.Dim("batch", min=1, max=512)}
        made = torch.export.export(plain, (example,), dynamic_shapes=(batch,)).module()
    elif kind == "of 2":
        made = torch.export.export(plain, (example,)).module()
    elif kind == "packed":
        quantize: Any = torch.ao.quantization.quantize_dynamic
        made = quantize(plain.float(), {nn.Linear}, torch.qint8)
    else:
        made = torch.compile(plain, backend="eager")
    module: nn.Module = made
    return module


def _modes(source: random.Random) -> nn.Module:
    return Obstinate(source.choice(["merges", "ignores", "fails"]))


def _gradients(source: random.Random) -> nn.Module:
    def rounded(scores: Tensor) -> Tensor:
        return (scores * 10).round() / 10

    def broken(images: Tensor) -> Tensor:
        changed = images * 2
        again = changed.exp()
        again.add_(1)  # what exp needs for its gradient
        return again

    modules: list[Callable[[], nn.Module]] = [
        lambda: OfInference(torch.no_grad),
        lambda: OfInference(torch.inference_mode),
        lambda: OfInference(torch.enable_grad),
        lambda: Odd(lambda images: images.detach()),
        lambda: Odd(after=rounded),
        lambda: Odd(broken),
        lambda: Odd(lambda images: images.detach().clone().requires_grad_()),
    ]
    return source.choice(modules)()


def _random(source: random.Random) -> nn.Module:
    return Odd(lambda images: images + 0.1 * torch.randn_like(images))


def _fragile(source: random.Random) -> nn.Module:
    sizes: list[Callable[[int], bool]] = [
        lambda count: count != 1,
        lambda count: count == 1,
        lambda count: count == 3,
        lambda count: count > 4,
        lambda count: True,
    ]
    errors = [RuntimeError, ValueError, KeyError, AssertionError, MemoryError, StopIteration]
    return Odd(_fails_at(source.choice(sizes), source.choice(errors)))


def _others(source: random.Random) -> nn.Module:
    modules: list[Callable[[], nn.Module]] = [
        lambda: Named(),
        lambda: OneMemory(),
        lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(CLASSES)),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(35, CLASSES)),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES, device="meta")),
        lambda: nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(36, CLASSES)),
        lambda: nn.Sequential(
            nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten(), nn.Linear(36, CLASSES)
        ),
        lambda: nn.DataParallel(Odd()),
        lambda: Classifier(Odd(lambda images: images.mul_(0.5)), CLASSES),
        lambda: nn.Flatten(),
        lambda: nn.Identity(),
    ]
    return source.choice(modules)()


def _parametrised(source: random.Random) -> nn.Module:
    return Parametrised(source.choice(["weight_norm", "spectral_norm", "orthogonal", "hooked"]))


KINDS: Final[dict[str, Callable[[random.Random], nn.Module]]] = {
    "in place": _in_place,
    "answers": _answers,
    "precision": _precision,
    "graph": _graph,
    "modes": _modes,
    "gradients": _gradients,
    "random": _random,
    "fragile": _fragile,
    "parametrised": _parametrised,
    "others": _others,
}


def case(source: random.Random) -> str:
    """One odd module, and what is done with it."""
    kind = source.choice(list(KINDS))
    torch.manual_seed(source.randrange(1 << 30))
    generator = torch.Generator().manual_seed(source.randrange(1 << 30))
    images = (torch.rand((source.randint(1, 5), *SHAPE), generator=generator) * 255).round() / 255
    images = images.double() if source.random() < 0.2 else images
    labels = torch.randint(0, CLASSES, (len(images),), generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = KINDS[kind](source)
    if kind not in ("graph", "modes"):
        module.train(source.random() < 0.5)
    uses = ["predict", "predict", "attack", "attack", "attack", "black box", "fit"]
    use = source.choice(uses)
    batch_size = source.choice([1, 1, 2, 4, 128])
    if use == "predict":
        _predict(module, images, labels, batch_size, kind)
    elif use == "attack":
        _attack(module, images, labels, batch_size, kind, source)
    elif use == "black box":
        _black_box(module, images, labels, batch_size)
    else:
        fit(module, images, labels, epochs=1, batch_size=batch_size, device="cpu")
    return f"{kind}: {use}"


def _predict(module: nn.Module, images: Tensor, labels: Tensor, size: int, kind: str) -> None:
    """Predict twice; the images stay, and the scores are those of the module alone."""
    classifier = Classifier(module, CLASSES)
    before = images.clone()
    found = [classifier.scores(images, size) for _ in range(2)]
    assert torch.equal(images, before), "the caller's images have changed"
    assert bool(torch.isfinite(found[0]).all()), "scores that are not finite"
    predictions = classifier.predict(images, size)
    assert int(predictions.min()) >= -1 and int(predictions.max()) < CLASSES, "predictions"
    counted = outcomes(classifier, images, labels, size)
    if kind == "random" or _depends(module):
        return
    assert torch.equal(found[0], found[1]), "two predictions of one image differ"
    assert torch.equal((predictions == labels), counted == 0), "outcomes"
    alone = scores_alone(module)(images)
    scale = max(1.0, float(np.abs(alone).max()))
    worst = float(np.abs(alone - found[0].double().numpy()).max())
    assert worst <= 0.02 * scale, f"scores differ by {worst} from those of the module"


def _attack(
    module: nn.Module,
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    kind: str,
    source: random.Random,
) -> None:
    """Attack, and judge the result."""
    known: list[tuple[attacks.Attack, str]] = [
        (attacks.PGD(3), "linf:0.2"),
        (attacks.PGD(2, random_start=True, restarts=2), "l2:1"),
        (attacks.APGD(4, 1), "linf:0.1"),
        (attacks.DDN(4), "l2"),
        (attacks.FMN(6), "l1"),
        (attacks.SigmaZero(6), "l0"),
        (attacks.Square(6), "linf:0.3"),
        (attacks.RandomNoise(3), "l2:2"),
        (attacks.CarliniWagnerL2(1.0, 2, 3), "l2"),
        (attacks.WithBPDA(attacks.PGD(3)), "linf:0.2"),
        (attacks.Strongest(2, 6, 1), source.choice(["linf:0.1", "l2:1"])),
    ]
    attack, text = source.choice(known)
    problem = Subject(module, Classifier(module, CLASSES), images, labels, CLASSES)
    norm, _, eps = text.partition(":")
    threat = ThreatModel(norm, float(eps) if eps else None)
    options = {"batch_size": batch_size, "seed": source.randrange(99)}
    changing = kind == "random" or _depends(module)
    judged(problem, threat, attack, options, None if changing else scores_alone(module))


def _black_box(module: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> None:
    """Hide the module behind a function of numpy, and attack its scores."""

    def function(array: Any) -> Any:
        with torch.no_grad(), suppress(NotImplementedError):
            module.eval()
        with torch.no_grad():
            return module(torch.from_numpy(array)).numpy()

    classifier = black_box(function, CLASSES)
    before = images.clone()
    outcomes(classifier, images, labels, batch_size)
    found = attacks.Square(5)(classifier, images, labels, "linf:0.2", batch_size=batch_size)
    assert torch.equal(images, before), "the caller's images have changed"
    change = (found.images.double() - before.double()).abs().amax()
    assert float(change) <= 0.2 * (1 + 1e-6), "outside of eps"


def _depends(module: nn.Module) -> bool:
    """Say whether the answer on an image depends on the draw, or on the images beside it."""
    if isinstance(module, Obstinate) and module.how == "ignores":
        return True
    if isinstance(module, torch.fx.GraphModule) and not _takes_one(module):
        return True
    sometimes = isinstance(module, Odd) and getattr(module.before, "__name__", "") == "sometimes"
    return sometimes or any(
        isinstance(part, nn.BatchNorm2d) and part.running_mean is None for part in module.modules()
    )


def _takes_one(module: nn.Module) -> bool:
    """Say whether an exported module takes an image alone: some take batches of one size only."""
    kind = next(module.parameters()).dtype
    try:
        module(torch.zeros(1, *SHAPE, dtype=kind))
    except AssertionError:
        return False
    return True
