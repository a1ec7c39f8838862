"""Speed and tightness of certificates, beside those of auto_LiRPA, in one process and one run.

    pip install --target EXTRA appdirs graphviz packaging pyyaml tqdm
    DEMUR_PEERS_PATH=DIR PYTHONPATH=EXTRA OMP_NUM_THREADS=1 python benchmarks/certificates.py
        [--data-root DIR] [--images 32] [--eps 0.1] [--epochs 3] [--batch 32] [--work FOLDER]

DIR contains a folder auto_LiRPA with the code of auto_LiRPA 0.7 (Xu et al. 2020). Its `setup.py`
asks for a torch below 2.9, and demur for 2.11 or later. Used from its folder, as here, it also
works with torch 2.13: the environment is that of demur, and EXTRA has what auto_LiRPA imports
beside torch. Without DIR, only demur is measured, and the script says so.

Both bound the same score differences of the small network of certified training, over the same
clipped box, of images of MNIST or of the embedded digits. The network is trained here for a few
epochs. With --work, the network, its unfinished training and each measured method are kept in a
folder: the same command goes on where it was stopped.

A negative "least difference" is where demur is looser. The last line says whether demur is never
looser than the other's IBP by more than 1e-4, and its CROWN is within 1 %; else the exit code is 1.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from demur import Classifier, data
from demur.bounds import Propagation, Region, trace
from demur.certificates import METHODS, certify
from demur.evaluation.code import code_fingerprint
from demur.networks import certified_cnn
from demur.training import certified_fit

PEERS_PATH = "DEMUR_PEERS_PATH"
LOOSER = 1e-4
WITHIN = 0.01


def network(
    root: str | None, work: Path | None, epochs: int, eps: float
) -> tuple[nn.Module, data.ImageSet]:
    """Give the trained network, and the test images."""
    present = {status.name for status in data.list_datasets(root) if status.where}
    name = "mnist" if "mnist" in present else "digits"
    module = certified_cnn(10)
    file = None if work is None else work / f"{name}-{epochs}-{eps:g}.pt"
    if file is not None and file.exists():
        module.load_state_dict(torch.load(file, weights_only=True))
    else:
        train = data.load(name, "train", root)
        options: dict[str, Any] = {"batch_size": 256 if name == "mnist" else 64}
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            options["checkpoint"] = file.with_suffix(".unfinished")
        certified_fit(module, train.images, train.labels, eps=eps, epochs=epochs, **options)
        if file is not None:
            torch.save(module.state_dict(), file)
    module.to(memory_format=torch.contiguous_format)
    return module.eval(), data.load(name, "test", root)


def ours(module: nn.Module, images: Tensor, rows: Tensor, eps: float, method: str) -> Tensor:
    """Bound rows (n, 10, 10) @ scores by demur, in float64."""
    graph, _ = trace(module, images[:1])
    propagation = Propagation(graph, module, Region.around(images.double(), eps))
    propagation.forwards(tighten=method == "crown")
    rows = rows.double()
    if method == "ibp":
        merged: Tensor = propagation.lower_by_intervals(graph.output, rows).lower
        return merged
    owner = torch.arange(len(images)).repeat_interleave(rows.shape[1])
    flat = rows.flatten(0, 1)
    found = propagation.backwards(graph.output, flat, owner).lower
    return found.view(rows.shape[:2])


@cache
def peer() -> Any | None:
    """Give auto_LiRPA, or None with a message."""
    folder = os.environ.get(PEERS_PATH)
    if not folder:
        print(f"auto_LiRPA is left out: {PEERS_PATH} is not set.", file=sys.stderr)
        return None
    sys.path.insert(0, str(Path(folder) / "auto_LiRPA"))
    try:
        return import_module("auto_LiRPA")
    except ImportError as error:
        print(f"auto_LiRPA is left out: {error}.", file=sys.stderr)
        return None


def theirs(library: Any, module: nn.Module, eps: float, method: str) -> Callable[..., Tensor]:
    """Give a function that bounds rows @ scores by auto_LiRPA, in float32."""

    def bound(images: Tensor, rows: Tensor) -> Tensor:
        wrapped = library.BoundedModule(module, images)
        box = {"x_L": (images - eps).clamp(0, 1), "x_U": (images + eps).clamp(0, 1)}
        ball = library.PerturbationLpNorm(norm=float("inf"), **box)
        given = library.BoundedTensor(images, ball)
        lower, _ = wrapped.compute_bounds(x=(given,), C=rows, method=method.upper())
        return torch.as_tensor(lower)

    return bound


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """Give the result of a function, and its seconds."""
    start = time.perf_counter()
    found = run()
    return found, time.perf_counter() - start


def batched(run: Callable[[Tensor, Tensor], Tensor], *both: Tensor, size: int) -> Tensor:
    """Run a function on batches of images and rows."""
    parts = zip(*(torch.split(one, size) for one in both), strict=True)
    return torch.cat([run(images, rows) for images, rows in parts])


def measured(
    arguments: argparse.Namespace, module: nn.Module, images: Tensor, rows: Tensor, method: str
) -> dict[str, Any]:
    """Bound all rows by one method, by demur and by auto_LiRPA."""
    eps = arguments.eps
    others = rows.abs().sum(2) > 0
    size = arguments.batch

    def run(some: Tensor, ways: Tensor) -> Tensor:
        return ours(module, some, ways, eps, method)

    with torch.no_grad():
        one, seconds = timed(partial(batched, run, images, rows, size=size))
    found: dict[str, Any] = {"seconds": seconds, "proven": count(one, others)}
    library = peer()
    if library is None:
        return found
    with torch.no_grad():
        way = theirs(library, module, eps, method)
        other, longer = timed(partial(batched, way, images, rows, size=size))
    difference = (one - other.double())[others]
    relative = (difference / other.double()[others].abs()).mean()
    found |= {"their seconds": longer, "their proven": count(other, others)}
    return found | {"least": float(difference.min()), "mean": float(relative)}


def count(lower: Tensor, others: Tensor) -> int:
    """Count the images whose score differences are all above 0."""
    return int((lower.masked_fill(~others, torch.inf).amin(1) > 0).sum())


def compare(arguments: argparse.Namespace) -> bool:
    """Print the table, and say whether the bounds are as tight as they should be."""
    eps, work = arguments.eps, arguments.work
    module, test = network(arguments.data_root, work, arguments.epochs, eps)
    images = test.to_float()[: arguments.images]
    labels = test.labels[: arguments.images]
    rows = torch.eye(10)[labels][:, None] - torch.eye(10)
    threads = torch.get_num_threads()
    print(f"{len(images)} images of {test.name}, Linf eps {eps:g}, {threads} threads\n")
    print("| method | demur s | proven | auto_LiRPA s | proven | ratio | least difference | mean |")
    print("|---|---|---|---|---|---|---|---|")
    fine = True
    compared = 0
    both = peer() is not None
    code = code_fingerprint([certify])[:8]
    for method in METHODS:
        parts = (test.name, arguments.epochs, f"{eps:g}", len(images), arguments.batch)
        name = "-".join(map(str, (*parts, method, threads, both, code))) + ".json"
        kept = None if work is None else work / name
        if kept is not None and kept.exists():
            found = json.loads(kept.read_text(encoding="utf-8"))
        else:
            found = measured(arguments, module, images, rows, method)
            if kept is not None:
                kept.write_text(json.dumps(found), encoding="utf-8")
        cells = [method, f"{found['seconds']:.2f}", str(found["proven"])]
        if "mean" in found:
            ratio = found["seconds"] / found["their seconds"]
            cells += [f"{found['their seconds']:.2f}", str(found["their proven"]), f"{ratio:.2f}"]
            cells += [f"{found['least']:.1e}", f"{100 * found['mean']:+.3f} %"]
            tight = found["least"] >= -LOOSER if method == "ibp" else found["mean"] >= -WITHIN
            fine &= tight
            compared += 1
        print("| " + " | ".join([*cells, *[""] * (8 - len(cells))]) + " |", flush=True)
    whole, seconds = timed(lambda: certify(Classifier(module, 10), images, labels, f"linf:{eps}"))
    print(f"\ncertify, all methods in turn: {seconds:.2f} s, {whole.bounds()}")
    if compared:
        print("Tightness: " + ("as it should be." if fine else "LOOSER than it should be."))
    return fine


def main() -> None:
    """Read the arguments, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--batch", type=int, default=32)
    sys.exit(0 if compare(parser.parse_args()) else 1)


if __name__ == "__main__":
    main()
