"""The beginning of the demo: a trained network, images, rules, and the commands of the main job."""

import io
import shlex
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from demur import networks, seeds
from demur.classifier import Classifier, Preprocess, Provenance
from demur.commands.audit import audit
from demur.commands.harden import harden
from demur.data import ImageSet, in_memory, read_images, split_by_hash
from demur.defenses.saving import CONFIG, save_classifier
from demur.errors import DemurError
from demur.evaluation.code import code_fingerprint
from demur.loading import load_model
from demur.progress import message
from demur.training import fit
from demur.writing import check_writable, replacing, write_text, writing

SIDE: Final = 12
"""Pixels a side: small images make short attacks."""
INPUT: Final = Preprocess(size=(SIDE, SIDE), channels=1)
THREAT: Final = "linf:0.1"
IMAGES: Final = 30
"""Images of each audit."""
DEFENCES: Final = ("deep-neural-rejection",)
RATE: Final = 0.05
"""The largest share of held-out images that is rejected."""
LEARNED: Final = 0.6
"""Of the training images: the share that the network is trained on. The others harden it."""
CLEAN_MOST: Final = 0.25
ATTACKED_MOST: Final = 0.55
"""The largest shares of wrong and accepted images that the gate lets pass."""
RULES: Final = f"""[gate]
min_images = {IMAGES}

[[gate.rule]]
metric = "wrong"
threat = "clean"
max = {CLEAN_MOST}

[[gate.rule]]
metric = "wrong"
threat = "{THREAT}"
max = {ATTACKED_MOST}
"""


@dataclass(frozen=True)
class Places:
    """The files of the main job, in one folder."""

    folder: Path

    @property
    def base(self) -> Path:
        """The bundle of the network as it is trained."""
        return self.folder / "base"

    @property
    def images(self) -> Path:
        """Images that the network was not trained on: a training split and a test split."""
        return self.folder / "digits.npz"

    @property
    def rules(self) -> Path:
        """The rules of the gate."""
        return self.folder / "gate.toml"

    @property
    def safer(self) -> Path:
        """The bundle of the hardened network."""
        return self.folder / "safer"

    @property
    def before(self) -> Path:
        """The audit of the network as it is trained."""
        return self.folder / "before"

    @property
    def after(self) -> Path:
        """The audit of the hardened network."""
        return self.folder / "after"


def prepare(folder: Path, *, device: str = "auto", seed: int = 0) -> Places:
    """Make what a user has: a trained network as a bundle, images, and rules of a gate.

    Parameters
    ----------
    folder : Path
        What is there already is kept, unless other code made it.
    device : {"auto", "cpu", "cuda"}
    seed : int, default 0

    Returns
    -------
    Places

    Raises
    ------
    DemurError
        If the folder holds the network of another seed, or cannot be written.
    """
    check_writable(folder)
    places = Places(folder)
    train, test = (
        in_memory(read_images("digits", split, preprocess=INPUT)) for split in ("train", "test")
    )
    # A seed of its own: a part of a split by the same seed cannot be split again.
    learn, new = split_by_hash(train, (LEARNED, 1 - LEARNED), seeds.derive(seed, "demo"))
    made = Provenance(
        base="localized_network",
        base_fingerprint="",
        data="digits",
        data_fingerprint=learn.fingerprint,
        # Of all that follows: bundles and audits of other code are refused in their folders.
        code=code_fingerprint([fit, networks.localized_network, audit, harden]),
        request={"command": "demo", "seed": seed},
        images=tuple(sorted(learn.hashes)),
    )
    if (places.base / CONFIG).is_file():
        _remove_outdated(places, made)
    if not (places.base / CONFIG).is_file():
        _train(learn, made, places.base, device, seed)
    if not places.images.exists():
        _save_images(places.images, new, test)
    write_text(places.rules, RULES)
    return places


def _remove_outdated(places: Places, made: Provenance) -> None:
    """Remove what the demo made by other code; raise DemurError for a demo with another seed."""
    there = load_model(places.base).provenance
    if there == made:
        return
    if there is None or there.request != made.request:
        raise DemurError(
            f"{places.folder} holds a demo with another seed. Choose another --out, or delete that "
            "folder."
        )
    message("The main job was done by another state of the code: it is done again.")
    # The base is the last one: without it, a killed demo would not know that the others are old.
    for old in (places.before, places.safer, places.after, places.base):
        with writing(old):
            shutil.rmtree(old, ignore_errors=not old.exists())
    places.images.unlink(missing_ok=True)


def _train(learn: ImageSet, made: Provenance, folder: Path, device: str, seed: int) -> None:
    """Train a small network, and save it."""
    network = networks.localized_network(learn.num_classes, size=SIDE, seed=seed)
    optimizer = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
    options: dict[str, Any] = {"epochs": 4, "batch_size": 32, "seed": seed, "device": device}
    fit(network, learn.images, learn.labels, optimizer=optimizer, **options)
    classifier = Classifier(network.cpu(), learn.num_classes, rejects=False)
    classifier.preprocess = INPUT
    classifier.class_names = learn.class_names
    classifier.provenance = made
    work = folder.with_name(f".{folder.name}")
    shutil.rmtree(work, ignore_errors=True)
    save_classifier(classifier, work)
    with writing(folder):  # whole or not at all: a bundle has two files
        work.replace(folder)


def _save_images(path: Path, train: ImageSet, test: ImageSet) -> None:
    """Write both splits into an archive, as `demur.data.read_images` reads it."""
    arrays: dict[str, Any] = {"class_names": np.array(train.class_names)}
    for split, images in (("train", train), ("test", test)):
        arrays[f"{split}_images"] = images.images.numpy()
        arrays[f"{split}_labels"] = images.labels.numpy()
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    with replacing(path) as temporary:
        temporary.write_bytes(content.getvalue())


def commands(places: Places, *, device: str = "auto", seed: int = 0) -> dict[str, str]:
    """Give the commands of the main job, as a user types them, by the names of the steps.

    Examples
    --------
    >>> commands(Places(Path("demo")))["gate"]
    'demur gate demo/after --rules demo/gate.toml'
    """
    chosen = [] if device == "auto" else ["--device", device]
    drawn = ["--seed", str(seed)] if seed else []
    images = ["--data", places.images]
    audited = [*images, "--threat", THREAT, "--num-samples", IMAGES, *chosen, *drawn]
    defences = [word for name in DEFENCES for word in ("--with", name)]
    rate = ["--false-rejection-rate", RATE]
    lines: dict[str, list[object]] = {
        "before": ["audit", places.base, *audited, "--out", places.before],
        "harden": [
            *("harden", places.base, *images, *defences, *rate, *chosen, *drawn),
            *("--out", places.safer),
        ],
        "after": ["audit", places.safer, *audited, "--baseline", places.before],
        "gate": ["gate", places.after, "--rules", places.rules],
        "export": ["export", places.safer, *drawn],
    }
    lines["after"] += ["--out", places.after]
    return {name: shlex.join(["demur", *map(str, words)]) for name, words in lines.items()}
