"""Speed of localized adversarial training, of the same algorithm in plain PyTorch, and of ART.

    python benchmarks/adversarial_training.py [--data-root DIR] [--images 6400] [--epochs 2]
        [--steps 10] [--rounds 3] [--art]

The rate is images times attack steps a second, on the network of the localized paper, with its
batch size and Adam. The table also has the accuracy of the trained models under the same attack of
demur: a faster loop must not train with weaker attacks. eps is .1, because at the paper's .3
nothing is learnt in so few steps. Each measurement has its own process, and the loops take turns.
The data is MNIST if the data root has it, else the embedded digits.

The plain loop is float32 PyTorch: gradients of the images alone, the mask a factor of the change,
all data in memory. ART (with --art; the extra `peers` installs it) trains with AdversarialTrainer
and ProjectedGradientDescentPyTorch, and gets the same mask. The last two lines are the passes of
the attack alone: no loop on this machine can be faster. Prints Markdown.
"""

import argparse
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from demur import Classifier, ThreatModel, data, masks
from demur.attacks import PGD
from demur.data import to_float
from demur.defenses import LocalizedAdversarialTraining
from demur.hardware import keep_buffers, tuned
from demur.networks import localized_network

EPS = 0.1
BOX = 12
BATCH = 50
RATE = 5e-4


def around() -> Tensor:
    """Make the mask of the training attack: all pixels outside a box in the middle."""
    return masks.outside(masks.centre_box((28, 28), BOX, BOX))


def ours(
    network: nn.Module, images: Tensor, labels: Tensor, epochs: int, steps: int, seed: int
) -> None:
    """Train with demur."""
    attack = PGD(steps=steps, step_size=2.5 * EPS / steps, random_start=True)
    threat = ThreatModel("linf", EPS)
    defended = LocalizedAdversarialTraining(network, 10, attack, threat, mask=around())
    defended.fit(
        images,
        labels,
        epochs=epochs,
        batch_size=BATCH,
        seed=seed,
        optimizer=partial(torch.optim.Adam, lr=RATE),
        device="cpu",
    )


def plain(
    network: nn.Module, images: Tensor, labels: Tensor, epochs: int, steps: int, seed: int
) -> None:
    """Train with a plain loop."""
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    mask = around()
    step_size = 2.5 * EPS / steps
    network.train()
    for _ in range(epochs):
        order = torch.randperm(len(images))
        for start in range(0, len(images) - BATCH + 1, BATCH):
            chosen = order[start : start + BATCH]
            clean = images[chosen]
            true = labels[chosen]
            attacked = (clean + mask * torch.empty_like(clean).uniform_(-EPS, EPS)).clamp(0, 1)
            for _ in range(steps):
                attacked = attacked.detach().requires_grad_()
                loss = nn.functional.cross_entropy(network(attacked), true)
                (gradient,) = torch.autograd.grad(loss, attacked)
                change = attacked.detach() + step_size * gradient.sign() - clean
                attacked = (clean + change.clamp(-EPS, EPS) * mask).clamp(0, 1)
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(attacked), true).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    network.eval()


def art(
    network: nn.Module, images: Tensor, labels: Tensor, epochs: int, steps: int, seed: int
) -> None:
    """Train with ART's trainer; its attack gets the mask."""
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.defences.trainer import AdversarialTrainer
    from art.estimators.classification import PyTorchClassifier

    mask = around()[0].numpy()

    class Masked(ProjectedGradientDescentPyTorch):  # type: ignore[misc]
        def generate(self, x: Any, y: Any = None, **options: Any) -> Any:
            return super().generate(x, y, mask=mask, **options)

    torch.manual_seed(seed)
    estimator = PyTorchClassifier(
        network,
        loss=nn.CrossEntropyLoss(),
        optimizer=torch.optim.Adam(network.parameters(), lr=RATE),
        input_shape=(1, 28, 28),
        nb_classes=10,
        clip_values=(0, 1),
        device_type="cpu",
    )
    options = {
        "eps": EPS,
        "eps_step": 2.5 * EPS / steps,
        "max_iter": steps,
        "num_random_init": 1,
        "batch_size": BATCH,
        "verbose": False,
    }
    trainer = AdversarialTrainer(estimator, Masked(estimator, **options), ratio=1.0)
    trainer.fit(
        images.numpy(),
        nn.functional.one_hot(labels, 10).float().numpy(),
        batch_size=BATCH,
        nb_epochs=epochs,
    )
    network.eval()


LOOPS = {"demur": ours, "plain float32": plain, "ART": art}
BARE = {"passes alone, bfloat16": True, "passes alone, float32": False}
"""Forward and backward passes to the images, channels last; whether they are in bfloat16."""


def load(split: str, root: str | None) -> data.ImageSet:
    """Load MNIST, or the embedded digits."""
    there = {status.name for status in data.list_datasets(root) if status.where}
    return data.load("mnist" if "mnist" in there else "digits", split, root)


def bare(half: bool, network: nn.Module, images: Tensor, labels: Tensor, steps: int) -> float:
    """Run the passes of an attack and nothing else; give images times steps a second."""
    network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    count = 0
    with tuned():
        start = time.perf_counter()
        for first in range(0, len(images) - BATCH + 1, BATCH):
            for _ in range(steps):
                given = (
                    images[first : first + BATCH]
                    .contiguous(memory_format=torch.channels_last)
                    .requires_grad_()
                )
                with torch.autocast("cpu", torch.bfloat16, enabled=half):
                    scores = network(given)
                torch.autograd.grad(
                    nn.functional.cross_entropy(scores.float(), labels[first : first + BATCH]),
                    given,
                )
                count += BATCH
        return count / (time.perf_counter() - start)


def measure(
    loop: str, root: str | None, count: int, epochs: int, steps: int, seed: int
) -> dict[str, float]:
    """Train once in this process; give images times attack steps a second, and accuracies."""
    keep_buffers()
    train = load("train", root)
    test = load("test", root)
    chosen = torch.arange(count) % len(train)
    images = to_float(train.images[chosen])
    labels = train.labels[chosen]
    network = localized_network(seed=seed)
    if loop in BARE:
        bare(BARE[loop], network, images[: 4 * BATCH], labels, steps)
        return {"rate": bare(BARE[loop], network, images, labels, steps)}
    LOOPS[loop](
        localized_network(seed=seed), images[: 4 * BATCH], labels[: 4 * BATCH], 1, steps, seed
    )
    start = time.perf_counter()
    LOOPS[loop](network, images, labels, epochs, steps, seed)
    seconds = time.perf_counter() - start
    classifier = Classifier(network.float().cpu().eval(), 10)
    clean = test.to_float()[:1000]
    true = test.labels[:1000]
    threat = ThreatModel("linf", EPS, mask=around())
    attack = PGD(steps=40, random_start=True)
    found = attack(classifier, clean, true, threat, precision="float32")
    accuracy = 100 * float((classifier.predict(clean) == true).double().mean())
    return {
        "rate": count * epochs * steps / seconds,
        "accuracy": accuracy,
        "robust": 100 - 100 * float(found.success.double().mean()),
    }


def in_a_process(*options: object) -> dict[str, float]:
    """Run one measurement in its own process, so that measurements share no settings or memory."""
    done = subprocess.run(
        [sys.executable, __file__, "--one", *map(str, options)], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root")
    parser.add_argument("--images", type=int, default=6400)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--art", action="store_true")
    parser.add_argument("--one", nargs=6, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        loop, root, *numbers = given.one
        print(json.dumps(measure(loop, None if root == "None" else root, *map(int, numbers))))
        return
    root = str(Path(given.data_root).resolve()) if given.data_root else None
    loops = [loop for loop in [*LOOPS, *BARE] if loop != "ART" or given.art]
    runs: dict[str, list[dict[str, float]]] = {loop: [] for loop in loops}
    for seed in range(given.rounds):
        for loop in loops:
            runs[loop].append(
                in_a_process(loop, root, given.images, given.epochs, given.steps, seed)
            )
    print(
        f"{given.images:,} images of {load('test', root).name}, {given.epochs} epochs, "
        f"{given.steps} attack steps, batches of {BATCH}, {given.rounds} rounds, "
        f"{torch.get_num_threads()} threads\n"
    )
    columns = (
        "loop",
        "images x attack steps / s (median)",
        "demur over it (median, from, to)",
        "clean % (each round)",
        "attacked % (each round)",
    )
    print(f"| {' | '.join(columns)} |")
    print("|---|---|---|---|---|")
    for loop in loops:
        ratios = sorted(
            mine["rate"] / other["rate"]
            for mine, other in zip(runs["demur"], runs[loop], strict=True)
        )
        over = (
            f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})" if loop != "demur" else ""
        )
        rate = median(run["rate"] for run in runs[loop])
        clean, robust = (
            ", ".join(f"{run[kind]:.1f}" for run in runs[loop] if kind in run)
            for kind in ("accuracy", "robust")
        )
        print(f"| {loop} | {rate:,.0f} | {over} | {clean} | {robust} |")


if __name__ == "__main__":
    main()
