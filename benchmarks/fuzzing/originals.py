"""Undamaged files of each format that demur reads, as bytes."""

import io
import json
import zipfile
import zlib
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from PIL import Image, features
from safetensors.torch import save

from demur.evaluation.records import SCHEMA
from demur.evaluation.shares import FRONT

_RNG = np.random.default_rng(0)
PIXELS = _RNG.integers(0, 256, (20, 24, 3), dtype=np.uint8)


def arrays(**given: NDArray[Any]) -> dict[str, bytes]:
    """Write arrays as members of an npz archive."""
    written = {}
    for name, array in given.items():
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=array.dtype.hasobject)
        written[f"{name}.npy"] = buffer.getvalue()
    return written


def zipped(members: dict[str, bytes], method: int) -> bytes:
    """Pack members into a zip archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def npz_members() -> list[dict[str, bytes]]:
    """Give the members of archives with and without splits, of bytes, floats and names."""
    images = _RNG.integers(0, 256, (8, 6, 6), dtype=np.uint8)
    labels = np.arange(8) % 3
    names = np.array(["cat", "dog", "owl"])
    coloured = _RNG.random((8, 6, 6, 3), dtype=np.float32)
    split: dict[str, NDArray[Any]] = {f"{one}_images": images for one in ("train", "test")}
    split |= {f"{one}_labels": labels for one in ("train", "test")}
    return [
        arrays(images=images, labels=labels, class_names=names),
        arrays(images=coloured, labels=labels.astype(np.uint8)),
        arrays(**split),
        arrays(images=np.array([{}] * 8), labels=labels),
    ]


def pictures() -> dict[str, bytes]:
    """Give one image in each format and kind of compression."""
    colour = Image.fromarray(PIXELS)
    grey = colour.convert("L")
    clear = colour.convert("RGBA")
    deep = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "a camera"
    frames = {"save_all": True, "append_images": [colour.rotate(90), grey.convert("RGB")]}
    wanted: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("PNG", colour, {"exif": exif}),
        *[("PNG", one, {}) for one in (grey, clear, deep, colour.quantize(16), grey.convert("1"))],
        ("PNG", colour, frames),
        ("JPEG", colour, {"exif": exif}),
        ("JPEG", colour, {"progressive": True}),
        ("JPEG", grey, {}),
        ("JPEG", colour.convert("CMYK"), {}),
        ("GIF", colour.quantize(16), {}),
        ("GIF", colour, frames),
        *[("BMP", one, {}) for one in (colour, grey, colour.quantize(16), clear)],
        ("DIB", colour, {}),
        *[("TIFF", colour, {"compression": one}) for one in ("raw", "tiff_lzw", "jpeg")],
        *[("TIFF", grey, {"compression": one}) for one in ("packbits", "tiff_adobe_deflate")],
        ("TIFF", deep, {}),
        ("TIFF", grey.convert("1"), {"compression": "group4"}),
        ("TIFF", colour, frames),
        ("WEBP", colour, {"exif": exif}),
        ("WEBP", clear, {"lossless": True}),
        ("WEBP", colour, frames),
        *[("JPEG2000", one, {}) for one in (colour, grey, deep)],
        *[("PPM", one, {}) for one in (colour, grey, deep.convert("I"), grey.convert("1"))],
        *[("PCX", one, {}) for one in (colour, grey, grey.convert("1"))],
        *[("SGI", one, {}) for one in (colour, grey)],
        *[("TGA", one, {"compression": "tga_rle"}) for one in (colour, clear)],
        ("MPO", colour, frames),
    ]
    if features.check("avif"):
        wanted.append(("AVIF", colour, {"exif": exif}))
    found = {}
    for number, (kind, image, options) in enumerate(wanted):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        found[f"{number:02}.{kind.lower()}"] = buffer.getvalue()
    found["qoi.qoi"] = b"qoif" + (4).to_bytes(4, "big") * 2 + b"\3\0\xc0\x3e" + bytes(7) + b"\1"
    found["a.eps"] = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    return found


def png_with_checksums(content: bytes) -> bytes:
    """Correct the checksums of the chunks of a damaged PNG, so that the damage gets further."""
    data = bytearray(content)
    place = 8
    while place + 12 <= len(data):
        end = place + 8 + int.from_bytes(data[place : place + 4], "big")
        if end + 4 > len(data):
            break
        data[end : end + 4] = zlib.crc32(data[place + 4 : end]).to_bytes(4, "big")
        place = end + 4
    return bytes(data)


def safetensors_of(
    tensors: dict[str, torch.Tensor], **metadata: str
) -> tuple[dict[str, Any], bytes]:
    """Give the header of a safetensors file as a value, and its data."""
    content = save({name: tensor.clone() for name, tensor in tensors.items()}, metadata)
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header: Any, data: bytes) -> bytes:
    """Write a safetensors file."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def saved(value: Any, new: bool = True) -> bytes:
    """Write what `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=new)
    return buffer.getvalue()


def records(n: int = 12) -> pl.DataFrame:
    """Give records of n images without an attack and under one."""
    rows = []
    for place in range(2 * n):
        attacked = place >= n
        row: dict[str, Any] = {"dataset": "d", "split": "test", "repeat": 0, "index": place % n}
        row |= {"image": f"{place % n:016x}", "label": 0, "prediction": 0, "outcome": "correct"}
        row |= {"stored_outcome": "correct", "linf": 0.0, "l2": 0.0, "l1": 0.0, "l0": 0.0}
        if attacked:
            row |= {"attack": "PGD()", "norm": "linf", "eps": 8 / 255, "goal": "evade"}
            row |= {"outcome": "wrong", "stored_outcome": "wrong", "linf": 8 / 255}
        rows.append(row)
    return pl.DataFrame(rows, schema=SCHEMA)


def parquet_of(table: pl.DataFrame, compression: str = "zstd") -> bytes:
    """Write a table as Parquet."""
    buffer = io.BytesIO()
    table.write_parquet(buffer, compression=compression)  # type: ignore[arg-type]
    return buffer.getvalue()


def audit_results(n: int = 12) -> dict[str, Any]:
    """Give results.json of an audit with the shares of `records`."""
    rows = []
    for threat, wrong in (("clean", 0.0), ("linf:8/255", 1.0)):
        shares = {"correct": 1.0 - wrong, "rejected": 0.0, "wrong": wrong}
        bounds = {f"{name}_low": 0.0 for name in shares} | {f"{name}_high": 1.0 for name in shares}
        goal = "none" if threat == "clean" else "evade"
        rows.append({"threat": threat, "goal": goal, "n": n, **shares, **bounds})
    check = {"name": "a", "value": 1.0, "limit": 2.0, "state": "passed", "text": "good"}
    same = {"handshake": [{"a": "b"}], "notes": ["c"], "cost": {"seconds": 1.0}, "code": "c"}
    return {
        **{"schema": "demur.audit/1", "verdict": "sound", "model": {"name": "m"}},
        **{"data": {"name": "d"}, "threats": rows, "checks": [check], **same, "command": "demur"},
        **{"profile": "quick", "seed": 0, "versions": {"torch": "2"}, "device": "cpu"},
    }


def study_results() -> dict[str, Any]:
    """Give results.json of a study with the table that `demur compare` needs."""
    row = {"row": "a", "column": "wrong", "group": "g", "unit": "%", "measured": 3.0, "paper": 4.0}
    curve = {"title": "c", "x_label": "eps", "x": [0.0, 1.0]}
    series = {"name": "s", "correct": [1.0, 0.5], "rejected": [0.0, 0.5], "wrong": [0.0, 0.0]}
    return {
        **{"schema": 1, "experiment": "smoothing", "title": "t", "profile": "demo", "seed": 0},
        **{"data": {"name": "d", "fingerprint": "f"}, "summary": ["s"], "warnings": ["w"]},
        "tables": [{"title": FRONT, "rows": [row, {**row, "column": "correct"}]}],
        "curves": [{**curve, "series": [series]}],
    }
