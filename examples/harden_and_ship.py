"""Audit a model, harden it, audit it again, gate it, export it, and use it.

python examples/harden_and_ship.py [FOLDER]

It uses embedded digits and takes a few minutes on two cores. The export to ONNX needs
pip install '.[export]'.
"""

import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from demur import Classifier, data, networks
from demur.classifier import Preprocess
from demur.loading import save_model
from demur.training import fit

RULES = """
[gate]
min_images = 50
require_selftests = false

[[gate.rule]]
metric = "wrong"
threat = "clean"
max = 0.2

[[gate.rule]]
metric = "rejected"
threat = "clean"
max = 0.3
"""


def demur(folder: Path, line: str) -> int:
    """Run a command in the folder, as a user types it; give its exit code."""
    print(f"\n$ demur {line}", flush=True)
    return subprocess.run(
        [sys.executable, "-m", "demur.cli", *shlex.split(line)], cwd=folder
    ).returncode


def main(folder: Path) -> None:
    """Carry out the whole way from a network to answers."""
    folder.mkdir(parents=True, exist_ok=True)
    digits = data.load("digits")
    network = networks.localized_network(10)
    optimizer = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
    fit(network, digits.images, digits.labels, epochs=4, batch_size=32, optimizer=optimizer)
    classifier = Classifier(network, 10)
    classifier.preprocess = Preprocess(size=(28, 28), channels=1)
    save_model(classifier, folder / "base")
    (folder / "gate.toml").write_text(RULES)
    images = data.load("digits", "test").images[:12, 0]
    noise = torch.randint(0, 256, (4, 28, 28), generator=torch.Generator().manual_seed(0))
    (folder / "new").mkdir(exist_ok=True)
    for number, image in enumerate([*images, *noise.to(torch.uint8)]):
        Image.fromarray(image.numpy()).save(folder / "new" / f"{number:02}.png")

    audit = "--data digits --threat linf:0.1 --num-samples 60"
    steps = [
        f"audit base {audit} --out runs/before",
        "harden base --data digits --with deep-neural-rejection"
        " --false-rejection-rate 0.05 --out safer",
        f"audit safer {audit} --baseline runs/before --out runs/after",
        "gate runs/after --rules gate.toml",
        "export safer --format onnx",
        "predict safer new/",
    ]
    for line in steps:
        if code := demur(folder, line):
            sys.exit(f"demur {line.split()[0]} ended with {code}.")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "harden-and-ship"))
