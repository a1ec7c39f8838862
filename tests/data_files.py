"""Small files in the formats of MNIST and EMNIST, for tests."""

import hashlib

import numpy as np

from demur.data import sources

UPRIGHT = np.random.default_rng(0).integers(0, 256, (30, 28, 28), dtype=np.uint8)
UPRIGHT[0, 0, :2] = [0, 255]


def idx(array):
    """Write an array in the format of the MNIST files."""
    dimensions = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + dimensions + array.astype(np.uint8).tobytes()


def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def write_emnist(root, variant, labels, images=UPRIGHT):
    raw = root / "EMNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        (raw / f"emnist-{variant}-{split}-images-idx3-ubyte").write_bytes(
            idx(images.transpose(0, 2, 1))
        )
        (raw / f"emnist-{variant}-{split}-labels-idx1-ubyte").write_bytes(idx(labels))


def mnist_files():
    return {
        f"{split}-{part}-ubyte": idx(array)
        for split in ("train", "t10k")
        for part, array in (("images-idx3", UPRIGHT), ("labels-idx1", np.arange(30) % 10))
    }


def write_mnist(root):
    (root / "MNIST" / "raw").mkdir(parents=True)
    for name, content in mnist_files().items():
        (root / "MNIST" / "raw" / name).write_bytes(content)


def skip_checksums(monkeypatch):
    """Accept made-up files in the place of the official ones, whose checksums are known."""
    monkeypatch.setattr(sources, "_wrong_checksum", lambda name, layout, root: "")
