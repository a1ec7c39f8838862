"""Audit a model, harden it, audit it again, gate it, export it, and use it: by commands.

python examples/harden_and_ship.py [FOLDER]

It types the commands that `demur demo` shows, on the same embedded digits, and takes about two
minutes on two cores. The export to ONNX needs pip install '.[export]'.
"""

import shlex
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image

from demur import data
from demur.commands.demo_setup import Places, commands, prepare


def typed(line: str) -> int:
    """Run a command as a user types it; give its exit code."""
    print(f"\n$ {line}", flush=True)
    _, *words = shlex.split(line)
    return subprocess.run([sys.executable, "-m", "demur.cli", *words]).returncode


def save_new_images(places: Places) -> Path:
    """Write files that the hardened model has not seen: twelve digits, and four images of noise."""
    folder = places.folder / "new"
    folder.mkdir(exist_ok=True)
    images = data.load("digits", "test").images[:12, 0]
    noise = torch.randint(0, 256, (4, 28, 28), generator=torch.Generator().manual_seed(0))
    for number, image in enumerate([*images, *noise.to(torch.uint8)]):
        Image.fromarray(image.numpy()).save(folder / f"{number:02}.png")
    return folder


def main(folder: Path) -> None:
    """Carry out the whole way from a network to answers."""
    # What you have: a network in a bundle, images that it was not trained on, rules of a gate.
    places = prepare(folder)
    new = save_new_images(places)
    use = shlex.join(["demur", "predict", str(places.safer), str(new)])
    for line in [*commands(places).values(), use]:
        if code := typed(line):
            sys.exit(f"{line} ended with {code}.")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "harden-and-ship"))
