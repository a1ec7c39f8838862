"""Speed and tightness of certificates, beside those of auto_LiRPA, in one process and one run.

    pip install appdirs graphviz packaging
    DEMUR_PEERS_PATH=DIR python benchmarks/certificates.py [--data-root DIR] [--images 32]
        [--eps 0.1] [--epochs 3] [--network FILE] [--batch 32]

DIR contains a folder auto_LiRPA with the code of auto_LiRPA 0.7 (Xu et al. 2020). Without it, only
demur is measured, and the script says so. Both bound the same score differences of the small
network of certified training, over the same clipped box, of images of MNIST or of the embedded
digits. The network is trained here for a few epochs, or read from --network.

A negative "least difference" is where demur is looser. The last line says whether demur is never
looser than the other's IBP by more than 1e-4, and its CROWN is within 1 %; else the exit code is 1.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from demur import Classifier, data
from demur.bounds import Propagation, Region, trace
from demur.certificates import METHODS, certify
from demur.networks import certified_cnn
from demur.training import certified_fit

PEERS_PATH = "DEMUR_PEERS_PATH"
LOOSER = 1e-4
WITHIN = 0.01


def network(
    root: str | None, file: Path | None, epochs: int, eps: float
) -> tuple[nn.Module, data.ImageSet]:
    """Give the trained network, and the test images."""
    present = {status.name for status in data.list_datasets(root) if status.where}
    name = "mnist" if "mnist" in present else "digits"
    module = certified_cnn(10)
    if file is not None and file.exists():
        module.load_state_dict(torch.load(file, weights_only=True))
    else:
        train = data.load(name, "train", root)
        batch = 256 if name == "mnist" else 64
        certified_fit(module, train.images, train.labels, eps=eps, epochs=epochs, batch_size=batch)
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


def peer() -> Any | None:
    """Give auto_LiRPA, or None with a message."""
    folder = os.environ.get(PEERS_PATH)
    if not folder:
        print(f"auto_LiRPA is left out: {PEERS_PATH} is not set.\n")
        return None
    sys.path.insert(0, str(Path(folder) / "auto_LiRPA"))
    try:
        return import_module("auto_LiRPA")
    except ImportError as error:
        print(f"auto_LiRPA is left out: {error}.\n")
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


def compare(arguments: argparse.Namespace) -> bool:
    """Print the tables, and say whether the bounds are as tight as they should be."""
    eps = arguments.eps
    module, test = network(arguments.data_root, arguments.network, arguments.epochs, eps)
    images = test.to_float()[: arguments.images]
    labels = test.labels[: arguments.images]
    rows = torch.eye(10)[labels][:, None] - torch.eye(10)
    others = rows.abs().sum(2) > 0
    library = peer()
    fine = True
    print(f"{len(images)} images, Linf eps {eps:g}, {torch.get_num_threads()} threads\n")
    print("| method | demur s | proven | auto_LiRPA s | proven | ratio | least difference | mean |")
    print("|---|---|---|---|---|---|---|---|")
    for method in METHODS:

        def run(some: Tensor, ways: Tensor, method: str = method) -> Tensor:
            return ours(module, some, ways, eps, method)

        with torch.no_grad():
            one, seconds = timed(partial(batched, run, images, rows, size=arguments.batch))
        proven = int((one.masked_fill(~others, torch.inf).amin(1) > 0).sum())
        cells = [method, f"{seconds:.2f}", str(proven)]
        if library is not None:
            with torch.no_grad():
                way = theirs(library, module, eps, method)
                other, longer = timed(partial(batched, way, images, rows, size=arguments.batch))
            difference = (one - other.double())[others]
            relative = float((difference / other.double()[others].abs()).mean())
            count = int((other.masked_fill(~others, torch.inf).amin(1) > 0).sum())
            cells += [f"{longer:.2f}", str(count), f"{seconds / longer:.2f}"]
            cells += [f"{float(difference.min()):.1e}", f"{100 * relative:+.3f} %"]
            fine &= float(difference.min()) >= -LOOSER if method == "ibp" else relative >= -WITHIN
        print("| " + " | ".join([*cells, *[""] * (8 - len(cells))]) + " |")
    whole, seconds = timed(lambda: certify(Classifier(module, 10), images, labels, f"linf:{eps}"))
    print(f"\ncertify, all methods in turn: {seconds:.2f} s, {whole.bounds()}")
    if library is not None:
        print("Tightness: " + ("as it should be." if fine else "LOOSER than it should be."))
    return fine


def main() -> None:
    """Read the arguments, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--network", type=Path)
    parser.add_argument("--batch", type=int, default=32)
    sys.exit(0 if compare(parser.parse_args()) else 1)


if __name__ == "__main__":
    main()
