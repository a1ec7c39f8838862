"""The part of the fuzzer for files: each is damaged and read by the function of a command."""

import io
import json
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from demur import DemurError, data, networks
from demur.classifier import Classifier, Preprocess
from demur.cli.app import PlainConsole
from demur.cli.tables import table_of
from demur.commands.gate import gate
from demur.data.decoding import read_size
from demur.data.image_files import ImageFiles
from demur.data.label_map import read_label_map
from demur.data.photos import read_photo, read_photos
from demur.evaluation import audit_results, counterexamples, results
from demur.evaluation.profiles import load_profile
from demur.files import file_digest
from demur.loading import load_model, save_model
from demur.loading.state_dicts import read_weights
from demur.networks import weights
from demur.report import compare
from demur.studies import smoothing
from fuzzing import originals
from fuzzing.mutations import damaged, damaged_text, damaged_value
from fuzzing.outcomes import Case, FindingError, Outcome

Generator = np.random.Generator


@dataclass(frozen=True)
class Subject:
    """A kind of file.

    Parameters
    ----------
    write : callable
        Writes a damaged file into an empty folder.
    read : callable
        Reads it from this folder, as a command does.
    weight : float
        How often it is drawn.
    """

    write: Callable[[Path, Generator], object]
    read: Callable[[Path], object]
    weight: float = 1.0


def part() -> Case:
    """Prepare the undamaged files, and give the function that tries one damaged file."""
    subjects = (*_data_files(), *_weights(), *_texts(), *_tables())
    shares = np.array([one.weight for one in subjects])

    def case(rng: Generator) -> Outcome:
        subject = subjects[int(rng.choice(len(subjects), p=shares / shares.sum()))]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            subject.write(folder, rng)
            try:
                subject.read(folder)
            except DemurError as error:
                if not str(error).isprintable():
                    raise FindingError(f"not one line: {str(error)!r}") from error
                return "refused"
        return "valid"

    return case


def _one_of(rng: Generator, values: Any) -> Any:
    chosen = list(values)
    return chosen[int(rng.integers(len(chosen)))]


# Images


def _data_files() -> list[Subject]:
    members = originals.npz_members()
    methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    pictures = originals.pictures()
    png = {name: content for name, content in pictures.items() if name.endswith("png")}
    idx = _idx(np.zeros((30, 28, 28)))
    labels = _idx(np.arange(30) % 10)

    def write_npz(folder: Path, rng: Generator) -> None:
        chosen = dict(_one_of(rng, members))
        method = _one_of(rng, methods)
        content = b""
        if rng.random() < 0.5:  # a whole archive of a damaged array
            name = _one_of(rng, chosen)
            chosen[name] = damaged(chosen[name][:128], rng) + chosen[name][128:]
            content = originals.zipped(chosen, method)
        else:
            content = damaged(originals.zipped(chosen, method), rng)
        (folder / "a.npz").write_bytes(content)

    def write_picture(folder: Path, rng: Generator) -> None:
        name = _one_of(rng, pictures)
        (folder / f"a{Path(name).suffix}").write_bytes(damaged(pictures[name], rng))

    def write_png(folder: Path, rng: Generator) -> None:
        content = damaged(_one_of(rng, png.values()), rng)
        (folder / "a.png").write_bytes(originals.png_with_checksums(content))

    def write_idx(folder: Path, rng: Generator) -> None:
        raw = folder / "EMNIST" / "raw"
        raw.mkdir(parents=True)
        broken = int(rng.integers(4))
        names = [f"{one}-{kind}" for one in ("train", "test") for kind in ("images", "labels")]
        for number, name in enumerate(names):
            whole = labels if number % 2 else idx
            kind = "idx1" if number % 2 else "idx3"
            content = damaged(whole, rng) if number == broken else whole
            (raw / f"emnist-digits-{name}-{kind}-ubyte").write_bytes(content)

    def read_idx(folder: Path) -> None:
        for split in ("train", "test"):
            data.load("emnist-digits", split, folder)

    return [
        Subject(write_npz, lambda folder: data.load(folder / "a.npz"), 6.0),
        Subject(write_picture, _read_picture, 8.0),
        Subject(write_png, _read_picture, 2.0),
        Subject(write_idx, read_idx, 1.0),
    ]


def _idx(array: Any) -> bytes:
    dimensions = b"".join(size.to_bytes(4, "big") for size in array.shape)
    written: bytes = array.astype(np.uint8).tobytes()
    return bytes([0, 0, 8, array.ndim]) + dimensions + written


def _read_picture(folder: Path) -> None:
    file = next(folder.iterdir())
    small = Preprocess(size=(8, 8), resize=10)
    source = ImageFiles((str(file),), torch.tensor([0]), ("a", "b"), preprocess=small)
    _ = source.hashes
    read_size(file)
    if source.read(slice(None)).shape != (1, 3, 8, 8):
        raise FindingError("the pixels have another shape")
    read_photo(file)


# Weights and bundles


def _weights() -> list[Subject]:
    network = networks.dnr_cnn(10)
    header, tensors = originals.safetensors_of({"a": torch.ones(3, 4)}, mean="(0.5, 0.5, 0.5)")
    state = {"weight": torch.ones(3, 4), "bias": torch.zeros(3)}
    pickled = [originals.saved(state), originals.saved(state, False), originals.saved({1: 2})]
    with tempfile.TemporaryDirectory() as name:
        bundle = Path(name, "bundle")
        save_model(Classifier(network, 10), bundle)
        config = json.loads((bundle / "config.json").read_text())
        stored = (bundle / "weights.safetensors").read_bytes()

    def write_safetensors(folder: Path, rng: Generator) -> None:
        content = originals.with_header(header, tensors)
        if rng.random() < 0.5:
            content = originals.with_header(damaged_value(header, rng), tensors)
        else:
            content = damaged(content, rng)
        (folder / "a.safetensors").write_bytes(content)

    def write_pickled(folder: Path, rng: Generator) -> None:
        (folder / "a.pth").write_bytes(damaged(_one_of(rng, pickled), rng))

    def write_bundle(folder: Path, rng: Generator) -> None:
        kind = rng.random()
        content = damaged(stored, rng) if kind < 0.3 else stored
        (folder / "weights.safetensors").write_bytes(content)
        digest = file_digest(folder / "weights.safetensors")
        about = json.dumps({**config, "sha256": digest}).encode()
        if 0.3 <= kind < 0.8:
            about = json.dumps(damaged_value(json.loads(about), rng)).encode()
        elif kind >= 0.8:
            about = damaged_text(about.decode(), rng)
        (folder / "config.json").write_bytes(about)

    def write_gallery(folder: Path, rng: Generator) -> None:
        images = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
        item: dict[str, Any] = {
            "label": "a",
            "model": "m",
            "attack": "a",
            "attacker": "n",
            "outcome": "wrong",
        }
        item |= {"clean_decision": "a", "clean_score": 1.0, "decision": "b", "score": 1.0}
        item |= {"outcome": "wrong"}
        items = damaged_value([{**item, "l2": 1.0, "linf": 1.0}], rng)
        about, pixels = originals.safetensors_of(
            {"original": images, "attacked": images}, items=json.dumps(items)
        )
        content = originals.with_header(about, pixels)
        if rng.random() < 0.5:
            content = damaged(content, rng)
        (folder / "gallery.safetensors").write_bytes(content)

    return [
        Subject(write_safetensors, lambda folder: weights.read(folder / "a.safetensors"), 2.0),
        Subject(write_pickled, lambda folder: read_weights(folder / "a.pth", False), 2.0),
        Subject(write_bundle, load_model, 1.5),
        Subject(write_gallery, results.read_gallery, 1.0),
    ]


# Texts


def _texts() -> list[Subject]:
    study = originals.study_results()
    audit = originals.audit_results()
    demo = Path(smoothing.__file__ or "").with_name("demo.toml").read_text(encoding="utf-8")
    boxes = {"a.png": {"boxes": [[1, 2, 8, 9]], "class_index": 3, "label": "cat"}}
    csv_boxes = "file,left,top,right,bottom,class_index\na.png,1,2,8,9,3\na.png,2,2,8,9,3\n"
    picture = originals.pictures()["00.png"]

    def write_json(name: str, value: Any) -> Callable[[Path, Generator], object]:
        def write(folder: Path, rng: Generator) -> None:
            if rng.random() < 0.6:
                content = json.dumps(damaged_value(value, rng)).encode()
            else:
                content = damaged_text(json.dumps(value), rng)
            (folder / name).write_bytes(content)

        return write

    def write_text(name: str, text: str) -> Callable[[Path, Generator], object]:
        return lambda folder, rng: (folder / name).write_bytes(damaged_text(text, rng))

    def read_annotated(folder: Path) -> None:
        (folder / "photos").mkdir()
        (folder / "photos" / "a.png").write_bytes(picture)
        read_photos(folder / "photos")

    def read_manifest(folder: Path) -> None:
        for name in ("a.png", "b.png"):
            (folder / name).write_bytes(picture)
        data.read_images(folder / "a.csv").read(slice(None))

    def read_rules(folder: Path) -> None:
        (folder / "results.json").write_text(json.dumps(audit))
        gate(folder, folder / "rules.toml")

    return [
        Subject(write_json("results.json", study), _compare, 2.0),
        Subject(write_json("results.json", audit), audit_results.read, 2.0),
        Subject(write_text("a.toml", demo), lambda f: load_profile(smoothing, str(f / "a.toml"))),
        Subject(write_text("rules.toml", _RULES), read_rules),
        Subject(write_json("photos.json", boxes), read_annotated),
        Subject(write_text("photos.csv", csv_boxes), read_annotated),
        Subject(write_text("a.csv", "path,label\na.png,0\nb.png,1\n"), read_manifest),
        Subject(write_text("a.csv", "a,b\nc,4\n"), lambda f: read_label_map(f / "a.csv"), 0.5),
        Subject(
            write_json("a.json", {"a": "b", "c": 4}), lambda f: read_label_map(f / "a.json"), 0.5
        ),
    ]


_RULES = """[gate]
confidence = 0.9
[[gate.rule]]
metric = "wrong"
threat = "clean"
max = 0.3
"""


def _compare(folder: Path) -> None:
    """Do what `demur compare` does, and look at what reaches the terminal."""
    page = compare([folder], folder / "page")
    console = PlainConsole()
    console.file = io.StringIO()
    found = results.read(page.parent)
    for table in found.tables:
        console.print(table_of(table.title, table.rows))
    for line in found.summary:
        console.print(line)
    if any(not letter.isprintable() and letter != "\n" for letter in console.file.getvalue()):
        raise FindingError("an escape sequence reached the terminal")


# Tables of records


def _tables() -> list[Subject]:
    records = originals.records()
    kinds = ("zstd", "snappy", "uncompressed", "gzip")
    stored = [originals.parquet_of(records, kind) for kind in kinds]
    audit = json.dumps(originals.audit_results())
    rules = _RULES + '[gate.baseline]\nfile = "."\nmax_increase = 0.1\n'
    broken = records.filter(records["outcome"] == "wrong").with_columns(threat=pl.lit("linf:8/255"))
    kept = [originals.parquet_of(broken, kind) for kind in kinds]
    images = torch.zeros(len(broken), 3, 4, 4, dtype=torch.uint8)
    header, pixels = originals.safetensors_of({"original": images, "attacked": images})

    def write_records(folder: Path, rng: Generator) -> None:
        (folder / "records.parquet").write_bytes(damaged(_one_of(rng, stored), rng))
        (folder / "results.json").write_text(audit)
        (folder / "rules.toml").write_text(rules)

    def write_kept(folder: Path, rng: Generator) -> None:
        place = folder / counterexamples.FOLDER
        place.mkdir()
        table = _one_of(rng, kept)
        content = originals.with_header(header, pixels)
        if rng.random() < 0.7:
            table = damaged(table, rng)
        else:
            content = damaged(content, rng)
        (place / counterexamples.RECORDS).write_bytes(table)
        (place / "00000.safetensors").write_bytes(content)

    return [
        Subject(write_records, lambda folder: gate(folder, folder / "rules.toml"), 2.0),
        Subject(write_kept, counterexamples.load, 1.0),
    ]
