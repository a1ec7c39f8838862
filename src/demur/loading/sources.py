"""`load_model`: a classifier from a source such as `timm:resnet18`, a file, or a bundle."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from demur.classifier import Classifier, Preprocess
from demur.data.messages import printable
from demur.defenses.descriptions import leaf_of
from demur.errors import DemurError, unknown
from demur.loading.bundles import load_bundle
from demur.loading.factories import made_by, read_factory
from demur.loading.fingerprints import digest_of, remember_code
from demur.loading.preprocessing import PreprocessOverrides, chosen
from demur.loading.request import Found, ModelRequest, RejectColumn
from demur.loading.state_dicts import is_torchscript
from demur.loading.timm_models import read_timm
from demur.loading.torchvision_models import read_torchvision
from demur.loading.wrapping import channels_of, described
from demur.untrusted import user_path

READERS = {"py": read_factory, "timm": read_timm, "torchvision": read_torchvision}
LATER = ("hf", "http", "https")
"""Sources that demur does not read yet."""
LATER_FILES = (".onnx", ".pt2", ".ts")
WEIGHTS = (".safetensors", ".pt", ".pth")
ARCHITECTURES = ("timm", "torchvision")


@dataclass(frozen=True)
class LoadedModel:
    """A model, and what a report says of it.

    Parameters
    ----------
    classifier : Classifier
    source : str
        Where it is from, as it was given.
    fingerprint : str
        A digest of its weights and of the code that defines it, as from `fingerprint_of`.
    notes : tuple of str
        What was found or changed while it was loaded, each a sentence.
    """

    classifier: Classifier
    source: str
    fingerprint: str
    notes: tuple[str, ...] = ()


def load_model(
    source: str | Path,
    network: nn.Module | None = None,
    *,
    arch: str | None = None,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
    reject_column: RejectColumn = None,
    model_kwargs: Mapping[str, Any] | None = None,
    preprocess: Preprocess | PreprocessOverrides | None = None,
    allow_pickle: bool = False,
) -> Classifier:
    """Load a classifier from a library of models, the user's own code, weights, or a bundle.

    Parameters
    ----------
    source : str or path
        One of ``timm:NAME``, ``torchvision:NAME[@WEIGHTS]``, ``py:FILE.py:FACTORY``,
        ``py:PACKAGE.MODULE:FACTORY``, a file of weights (.safetensors, .pth or .pt, with `arch`),
        and a folder that `save_model` or `Defense.save` wrote.
    network : nn.Module, optional
        For a bundle whose network `demur.networks` did not build: one of the same architecture. It
        is copied, and the copy gets the saved weights.
    arch : str, optional
        For a file of weights: ``timm:NAME`` or ``torchvision:NAME``.
    checkpoint : path, optional
        For timm and torchvision: a file of weights that is used in place of a download.
    num_classes : int, optional
        Number of classes K, without the reject column. By default it is that of the weights, or is
        found on a black image.
    reject_column : "last" or int, optional
        The column of the reject score of a plain module. By default every column is a class.
        Columns are reordered so that the reject column is the last one.
    model_kwargs : mapping, optional
        Arguments of the factory, or of the library's function that builds the network.
    preprocess : Preprocess or PreprocessOverrides, optional
        Replaces the preprocessing that the source says, or parts of it.
    allow_pickle : bool, default False
        Read files of weights that can run code. Use it only for files that you trust.

    Returns
    -------
    Classifier
        On the CPU unless a factory put it elsewhere, in evaluation mode. It takes pixels in [0, 1].
        Its attributes `preprocess` and `class_names` are set where they are known.

    Raises
    ------
    DemurError
        If there is no such model, or it cannot be read. One line names the fault and the remedy.

    Examples
    --------
    >>> import tempfile, torch
    >>> from demur import Classifier, load_model, networks
    >>> from demur.loading import save_model
    >>> classifier, images = Classifier(networks.dnr_cnn(10), 10), torch.rand(2, 1, 28, 28)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_model(classifier, folder)
    ...     torch.equal(load_model(folder).scores(images), classifier.scores(images))
    True
    >>> load_model("timm:resnet18", checkpoint="weights.safetensors")  # doctest: +SKIP
    """
    return read_model(
        source,
        network,
        arch=arch,
        checkpoint=checkpoint,
        num_classes=num_classes,
        reject_column=reject_column,
        model_kwargs=model_kwargs,
        preprocess=preprocess,
        allow_pickle=allow_pickle,
    ).classifier


def read_model(
    source: str | Path,
    network: nn.Module | None = None,
    *,
    arch: str | None = None,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
    reject_column: RejectColumn = None,
    model_kwargs: Mapping[str, Any] | None = None,
    preprocess: Preprocess | PreprocessOverrides | None = None,
    allow_pickle: bool = False,
) -> LoadedModel:
    """Load a classifier, with its fingerprint and what a report says of it.

    The parameters and errors are those of `load_model`.

    Returns
    -------
    LoadedModel

    Examples
    --------
    >>> read_model("timm:resnet18").notes  # doctest: +SKIP
    ('The weights are those of resnet18.a1_in1k in timm.', ...)
    """
    request = ModelRequest(
        source=str(source),
        network=network,
        arch=arch,
        checkpoint=None if checkpoint is None else Path(checkpoint),
        num_classes=num_classes,
        reject_column=reject_column,
        model_kwargs=dict(model_kwargs or {}),
        preprocess=preprocess,
        allow_pickle=allow_pickle,
    )
    found = _read(source, request)
    classifier = found.classifier.eval()
    remember_code(classifier, found.code)
    return LoadedModel(classifier, request.source, digest_of(classifier), found.notes)


def fingerprint_of(model: Classifier | str | Path) -> str:
    """Hash what the scores of a model depend on: weights, settings and code.

    Two loads of one model have the same fingerprint. A changed weight, or a changed line in the
    file of a ``py:`` source or in a neighbour that it imports, gives another one.

    Parameters
    ----------
    model : Classifier, str or path
        A classifier, or a source that `load_model` reads without further options.

    Returns
    -------
    str
        32 hexadecimal digits.

    Raises
    ------
    DemurError
        If the source cannot be read.

    Examples
    --------
    >>> from demur import Classifier, networks
    >>> one, other = (Classifier(networks.dnr_cnn(10, seed=seed), 10) for seed in (0, 1))
    >>> fingerprint_of(one) == fingerprint_of(other)
    False
    """
    return digest_of(model) if isinstance(model, Classifier) else read_model(model).fingerprint


def _read(source: str | Path, request: ModelRequest) -> Found:
    """Find out what kind of source it is, and read it."""
    text = str(source)
    if not text.strip():
        raise DemurError(f"no model is named: give one of {', '.join(_known())}.")
    prefix, colon, rest = text.partition(":")
    if isinstance(source, str) and colon:
        if prefix in READERS:
            return READERS[prefix](rest, request)
        if prefix in LATER:
            raise _not_yet(f"{prefix}:", text)
    path = user_path(text)
    named = isinstance(source, str) and re.fullmatch(r"[A-Za-z][\w+.-]+", prefix)
    if prefix.endswith(".py") and not path.exists():
        raise _python_file(prefix, rest)
    if colon and named and not path.exists():
        said = printable(prefix, 40)
        near = unknown("source of models", f"{said}:", [f"{name}:" for name in READERS])
        raise DemurError(f"{near} A file of weights and a folder that demur saved are read too.")
    return _of_path(path, request)


def _known() -> list[str]:
    return [*(f"{name}:" for name in READERS), *WEIGHTS, "a folder that demur saved"]


def _of_path(path: Path, request: ModelRequest) -> Found:
    if path.suffix in LATER_FILES and not path.is_dir():
        raise _exported(path)
    if path.is_dir():
        return _bundle(path, request)
    shown = printable(path)
    if not path.exists():
        raise DemurError(
            f"{shown} is no saved model: there is no such file or folder. Models of libraries and "
            "of your own code have a source: timm:NAME, torchvision:NAME, py:FILE.py:FACTORY."
        )
    if path.suffix == ".py":
        raise _python_file(str(path), "")
    if path.suffix not in WEIGHTS:
        raise DemurError(
            f"{shown} is no saved model: demur reads folders that it saved, and files of weights "
            f"({', '.join(WEIGHTS)})."
        )
    return _weights(path, request)


def _bundle(folder: Path, request: ModelRequest) -> Found:
    of_code = () if request.arch is None else ("model_kwargs",)
    options = ("network", "arch", "num_classes", "preprocess", *of_code)
    request.allow_only("a bundle", *options)
    network, code = _network_of(request)
    classifier = load_bundle(folder, network)
    preprocess = request.preprocess
    if preprocess is not None:
        preprocess = chosen(preprocess, classifier.preprocess, channels_of(classifier))
    return Found(described(classifier, request.num_classes, preprocess, None, None), code=code)


def _network_of(request: ModelRequest) -> tuple[nn.Module | None, tuple[str, ...]]:
    """Give the network that the user gives to a bundle, and digests of the code that makes it."""
    if request.arch is None:
        return request.network, ()
    prefix, _, spec = request.arch.partition(":")
    if prefix != "py" or request.network is not None:
        raise DemurError(
            "arch of a bundle is py:FILE.py:FACTORY, the user's code that makes its network, "
            f"not {printable(request.arch, 60)!r}; it takes no other network beside."
        )
    made, code = made_by(spec, request)
    return leaf_of(made.eval()), tuple(code)


def _weights(path: Path, request: ModelRequest) -> Found:
    """Read a file of weights, of an architecture that is given."""
    shown = printable(path)
    if is_torchscript(path):
        raise _not_yet("a TorchScript file", str(path))
    if request.arch is None:
        raise DemurError(
            f"{shown} has weights alone: give their architecture, arch='timm:NAME' or "
            "arch='torchvision:NAME' (--arch), or write a py: factory that loads them."
        )
    prefix, _, name = request.arch.partition(":")
    if prefix not in ARCHITECTURES or not name:
        raise DemurError(
            f"arch is timm:NAME or torchvision:NAME, not {printable(request.arch, 60)!r}."
        )
    if request.checkpoint is not None:
        raise DemurError(f"{shown} is a file of weights already: leave checkpoint out.")
    return READERS[prefix](name, replace(request, arch=None, checkpoint=path))


def _not_yet(kind: str, source: str) -> DemurError:
    return DemurError(
        f"{kind} is not supported yet: {printable(source)}. Write a factory that loads the model "
        "and returns an nn.Module, and give py:FILE.py:FACTORY."
    )


def _exported(path: Path) -> DemurError:
    """Refuse a file that `demur export` or another program wrote for other programs."""
    return DemurError(
        f"demur does not read {path.suffix} files yet: {printable(path)}. They are for other "
        "programs (docs/export.md shows one). Give what it was exported from: a folder that demur "
        "saved, timm:NAME, torchvision:NAME, or py:FILE.py:FACTORY."
    )


def _python_file(file: str, factory: str) -> DemurError:
    """Refuse a Python file that is named without its source, or without the factory in it."""
    if not user_path(file).exists():
        return DemurError(f"there is no file {printable(file)}.")
    return DemurError(
        f"{printable(file)} is a Python file: name the function in it that makes the model, "
        f"py:{printable(file)}:{printable(factory, 60) or 'NAME'}."
    )
