"""The localized experiment from end to end: its images, its models, its photographs, its tables and its gallery."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from demur.classifier import Classifier
from demur.errors import DemurError
from demur.evaluation.pictures import describe, enlarged, in_turn, mixed
from demur.evaluation.results import Curve, Data, Picture, Table, write_gallery
from demur.experiments.cells import Run
from demur.experiments.localized_training import photographs, sets
from demur.experiments.localized_training.photographs import NetworkFound
from demur.experiments.localized_training.profile import Profile, SetProfile
from demur.experiments.localized_training.sets import (
    AROUND,
    EVERYWHERE,
    MODELS,
    SetFound,
    new_network,
)
from demur.experiments.localized_training.tables import Sheets
from demur.files import digest
from demur.networks import imagenet_network
from demur.studies.album import DISTINCT, Album, at_size, gather, without_album
from demur.studies.material import Part, describe_parts, gather_part

TITLE = "Localized training"
SOURCE = "Rothberg, Chen, Jie & Ji 2019, Localized Adversarial Training for Increased Accuracy and Robustness in Image Classification"


@dataclass(frozen=True)
class Material:
    """The images of each set, and the photographs."""

    parts: list[Part[SetProfile]]
    album: Album | None
    description: Data
    taken: str

    @property
    def fingerprint(self) -> str:
        """A digest of all that is measured on."""
        return digest(
            *(one.fingerprint for one in self.parts),
            *([self.album.fingerprint] if self.album else []),
        )

    @property
    def embedded(self) -> bool:
        """Whether it is a toy."""
        return not self.description.rooted and all(
            part.train.name == "digits" for part in self.parts
        )


def prepare(profile: Profile, data_root: Path | None, seed: int) -> Material:
    """Load the images, and find what will not work with them before anything is written."""
    parts = [
        gather_part(settings, profile.attack.images, data_root, seed) for settings in profile.sets
    ]
    for part in parts:
        if max(part.settings.boxes) > part.size:
            size = f"{part.size}x{part.size}"
            raise DemurError(
                f"a box of {max(part.settings.boxes)} pixels a side does not lie in the images of {part.train.name}, {size}."
            )
        new_network(part.settings, part.train, seed)
    album = gather(profile.photographs, data_root)
    taken = [
        *(part.taken for part in parts),
        *([str(album)] if album else without_album(profile.photographs)),
    ]
    description = describe_parts(parts, album.fingerprint if album else None)
    return Material(parts, album, description, f"Data: {'; '.join(taken)}.")


def work(profile: Profile, material: Material) -> float:
    """Units of work, about one image trained on once, for the time left."""
    return sum(sets.work(profile, part) for part in material.parts) + (
        photographs.work(profile.photographs, material.album)
        if profile.photographs and material.album
        else 0
    )


def carry_out(
    profile: Profile, material: Material, run: Run, out: Path
) -> tuple[list[Table], list[Curve], list[str], list[str]]:
    """Run all cells; write the gallery; give the tables, the curves, the summary and the warnings."""
    found = [sets.carry_out_set(profile, part, run) for part in material.parts]
    wanted, networks = profile.photographs, list[NetworkFound]()
    if wanted and material.album:
        networks = photographs.carry_out_photographs(wanted, material.album, run)
    sheets = Sheets(profile, found, material.album, networks, material.embedded)
    pictures = (
        [_photograph_pictures(profile, material.album, one) for one in networks]
        if material.album
        else []
    )
    pictures += [
        _set_pictures(one, model, region, number)
        for number, one in enumerate(found)
        for model in MODELS
        for region in (AROUND, EVERYWHERE)
    ]
    write_gallery(out, *in_turn(pictures, profile.gallery))
    return sheets.tables(), sheets.curves(), sheets.summary(), sheets.warnings()


def _set_pictures(
    one: SetFound, model: str, region: str, number: int
) -> tuple[list[Picture], Tensor, Tensor]:
    cell = one.pgd[model, region]
    index = torch.tensor(mixed(cell.tensors["stored_outcomes"], number), dtype=torch.int64)
    clean, attacked = one.attacked.subset(index), cell.tensors["images"][index]
    attack = f"{'background' if region == AROUND else 'standard'} attack, eps {one.part.settings.eps:.3g}"
    label = f"{one.part.settings.name}, {model}"
    pictures = list(describe(one.models[model].classifier, label, attack, region, clean, attacked))
    return pictures, enlarged(clean.images), enlarged(attacked)


def _photograph_pictures(
    profile: Profile, album: Album, one: NetworkFound
) -> tuple[list[Picture], Tensor, Tensor]:
    assert profile.photographs is not None
    settings, network = profile.photographs, imagenet_network(one.name, album.networks[one.name])
    clean = at_size(album.photos[: settings.listed], network.resize, network.size)
    attacked = one.attacked[settings.eps[-1], AROUND].tensors["images"]
    classifier, attack = (
        Classifier(network, len(DISTINCT)).eval(),
        f"background attack, eps {255 * settings.eps[-1]:g}/255",
    )
    pictures = list(describe(classifier, one.name, attack, AROUND, clean, attacked))
    return pictures, enlarged(clean.images), enlarged(attacked)
