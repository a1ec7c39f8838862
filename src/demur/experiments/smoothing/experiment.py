"""The smoothing experiment from end to end: its images, its models, its photographs, its tables and its gallery."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from demur.classifier import Classifier
from demur.errors import DemurError
from demur.evaluation.pictures import describe, enlarged, in_turn, mixed
from demur.evaluation.results import Curve, Data, Picture, Table, write_gallery
from demur.experiments.cells import Run
from demur.experiments.smoothing import filters, photographs, tuning
from demur.experiments.smoothing.filters import SetFound, behind, new_network
from demur.experiments.smoothing.photographs import NetworkFound
from demur.experiments.smoothing.profile import Profile, SetProfile
from demur.experiments.smoothing.tables import Sheets
from demur.experiments.smoothing.tuning import TuningMaterial
from demur.files import digest
from demur.networks import imagenet_network
from demur.studies import album as albums
from demur.studies.album import DISTINCT, Album, at_size
from demur.studies.material import Part, describe_parts, gather_part

TITLE = "Smoothing"
SOURCE = "Jézéquel 2019, Protecting networks against adversarial attacks"


@dataclass(frozen=True)
class Material:
    """The images of each set, the photographs, and what is tuned."""

    parts: list[Part[SetProfile]]
    album: Album | None
    tuning: TuningMaterial | None
    description: Data
    taken: str

    @property
    def fingerprint(self) -> str:
        """A digest of all that is measured on."""
        more = [one.fingerprint for one in (self.album, self.tuning) if one is not None]
        return digest(*(part.fingerprint for part in self.parts), *more)

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
        new_network(part.train, seed)
        for kind, width in filters.filters(part.settings).values():
            try:
                behind(kind, width, torch.nn.Identity(), part.train.num_classes).module(
                    part.test.to_float(torch.tensor([0]))
                )
            except DemurError as error:
                raise DemurError(f"{part.settings.name}: {error}") from error
    album = albums.gather(profile.photographs, data_root)
    tuned = tuning.gather(profile.tuning, data_root, seed)
    taken = [
        *(part.taken for part in parts),
        *([str(album)] if album else albums.without_album(profile.photographs)),
    ]
    if tuned and profile.tuning:
        taken.append(
            f"{len(tuned.train):,} images of {tuned.train.name} to tune {profile.tuning.network}"
        )
    return Material(
        parts,
        album,
        tuned,
        describe_parts(parts, album.fingerprint if album else None),
        f"Data: {'; '.join(taken)}.",
    )


def work(profile: Profile, material: Material) -> float:
    """Units of work, about one image trained on once, for the time left."""
    units = sum(filters.work(profile, part) for part in material.parts)
    if profile.photographs and material.album:
        units += photographs.work(profile.photographs, material.album)
    return units + (
        tuning.work(profile.tuning, material.tuning) if profile.tuning and material.tuning else 0
    )


def carry_out(
    profile: Profile, material: Material, run: Run, out: Path
) -> tuple[list[Table], list[Curve], list[str], list[str]]:
    """Run all cells; write the gallery; give the tables, the curves, the summary and the warnings."""
    found = [filters.carry_out_set(profile, part, run) for part in material.parts]
    networks, tuned = list[NetworkFound](), list[tuning.Tuned]()
    if profile.photographs and material.album:
        networks = photographs.carry_out_photographs(profile.photographs, material.album, run)
    if profile.tuning and material.tuning:
        tuned = tuning.carry_out_tuning(profile.tuning, material.tuning, run)
    sheets = Sheets(profile, found, material.album, networks, tuned, material.embedded)
    pictures = (
        [_photograph_pictures(material.album, one) for one in networks] if material.album else []
    )
    pictures += [
        _set_pictures(one, model, number, run.seed)
        for number, one in enumerate(found)
        for model in one.models
    ]
    write_gallery(out, *in_turn(pictures, profile.gallery))
    return sheets.tables(), sheets.curves(), sheets.summary(), sheets.warnings()


def _set_pictures(
    one: SetFound, model: str, number: int, seed: int
) -> tuple[list[Picture], Tensor, Tensor]:
    cell = one.targeted[model]
    index = torch.tensor(mixed(cell.tensors["stored_outcomes"], number), dtype=torch.int64)
    clean, attacked = one.attacked.subset(index), cell.tensors["images"][index]
    label, attack = f"{one.part.settings.name}, {model}", "normalized gradient, targeted"
    pictures = list(
        describe(one.models[model].whole, label, attack, "through the filter", clean, attacked)
    )
    return pictures, enlarged(clean.images), enlarged(attacked)


def _photograph_pictures(album: Album, one: NetworkFound) -> tuple[list[Picture], Tensor, Tensor]:
    network = imagenet_network(one.name, album.networks[one.name])
    clean = at_size(album.photos[: photographs.SHOWN], network.resize, network.size)
    attacked = one.attacked.tensors["images"][: photographs.SHOWN]
    classifier = Classifier(network, len(DISTINCT)).eval()
    pictures = list(
        describe(
            classifier, one.name, "normalized gradient, targeted", "of the network", clean, attacked
        )
    )
    return pictures, enlarged(clean.images), enlarged(attacked)


__all__ = ["SOURCE", "TITLE", "carry_out", "prepare", "work"]
