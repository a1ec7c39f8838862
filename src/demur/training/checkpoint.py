"""Checkpoints of a training: a file that only the same training resumes from."""

from pathlib import Path
from typing import Any

import torch

from demur.files import fingerprint
from demur.progress import message
from demur.writing import replacing

FORMAT = 3
"""Version of the file's content, and of the loop: part of each key."""


def training_key(device: torch.device, **parts: object) -> str:
    """Hash everything that the result of a training depends on.

    Parameters
    ----------
    device : torch.device
        Where the training runs. Its type counts; on a CPU the number of threads counts too, because
        the order of summation follows it.
    **parts : object
        The network, its data and all settings: what `files.fingerprint` takes.

    Returns
    -------
    str
        32 hexadecimal digits. The version of torch counts too.

    Raises
    ------
    DemurError
        For a part that cannot be fingerprinted.

    Examples
    --------
    >>> cpu = torch.device("cpu")
    >>> training_key(cpu, epochs=1) == training_key(cpu, epochs=2)
    False
    """
    threads = torch.get_num_threads() if device.type == "cpu" else None
    return fingerprint((FORMAT, torch.__version__, device.type, threads, parts))


def save(path: Path, key: str, state: dict[str, Any]) -> None:
    """Write a checkpoint, completely or not at all.

    Parameters
    ----------
    path : Path
        The file.
    key : str
        The training's key.
    state : dict
        Tensors, numbers, texts, and lists and dicts of them.

    Raises
    ------
    DemurError
        If the file cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(Path(folder, "a"), "key", {"step": 3})
    ...     load(Path(folder, "a"), "key")["step"]
    3
    """
    with replacing(path) as partial:
        torch.save({"key": key, **state}, partial)


def load(path: Path, key: str) -> dict[str, Any] | None:
    """Read a checkpoint, without running code from it.

    Parameters
    ----------
    path : Path
        The file.
    key : str
        The training's key.

    Returns
    -------
    dict or None
        The state. None if there is no file, it is damaged, or it belongs to another training. In
        the last two cases the user receives a message.

    Examples
    --------
    >>> load(Path("no/such/file"), "key") is None
    True
    """
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        return None
    except Exception:  # the restricted unpickler raises whatever rubbish leads to
        message(f"the checkpoint {path} is damaged. The training starts from the beginning.")
        return None
    if not isinstance(saved, dict) or saved.get("key") != key:
        message(
            f"the checkpoint {path} belongs to another training (other data, settings or code). "
            "The training starts from the beginning."
        )
        return None
    return saved
