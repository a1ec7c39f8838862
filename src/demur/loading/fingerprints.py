"""The fingerprint of a model: a digest of its weights, its settings and its code."""

import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from types import FunctionType
from uuid import uuid4
from weakref import WeakKeyDictionary

from torch import nn

from demur.classifier import Classifier
from demur.classifier.cache import Cache
from demur.errors import DemurError
from demur.files import digest, file_digest, fingerprint

_CODE: WeakKeyDictionary[Classifier, tuple[str, ...]] = WeakKeyDictionary()
"""Digests of the source files that made a classifier, as they were when it was made."""

_BASE = vars(nn.Module()).keys()
DESCRIPTIONS = {"pretrained_cfg", "default_cfg", "provenance"}
"""Attributes that say where weights came from: they change no score."""


def remember_code(classifier: Classifier, code: Iterable[str]) -> None:
    """Keep the digests of the source files that made a classifier, for `digest_of`."""
    _CODE[classifier] = tuple(code)


def digest_of(classifier: Classifier) -> str:
    """Hash what the scores of a classifier depend on.

    * All parameters and buffers, and what else `state_dict` has, bit by bit.
    * The classes, the attributes and the hooks of all parts.
    * The source files that made the classifier, where `load_model` knows them, and those of the
      classes of its parts. Python's and torch's own are left out: their versions are known.

    Raises
    ------
    DemurError
        If a state is no ordinary tensor or value.
    """
    tensors = {**dict(classifier.named_buffers()), **classifier.state_dict()}
    settings = [
        digest(name, _class_name(type(part)), *_settings(part))
        for name, part in classifier.named_modules(remove_duplicate=False)
    ]
    classes = {type(part) for part in classifier.modules()}
    bases = {base for kind in classes for base in kind.__mro__ if not _is_known(base)}
    code = sorted({*_CODE.get(classifier, ()), *map(_code_of, bases)})
    return digest(fingerprint(tensors), *settings, *code)


def _settings(part: nn.Module) -> Iterator[str]:
    """Digest the attributes and the hooks of a part, beside its parameters and submodules."""
    for name, value in sorted(vars(part).items()):
        hooks = name in _BASE and name.endswith("_hooks") and value
        if hooks:
            value = list(value.values())  # their keys count up through the process
        if hooks or (name not in _BASE | DESCRIPTIONS and not isinstance(value, Cache)):
            yield f"{name}={_content(value)}"


def _content(value: object) -> str:
    """Digest a value. One that cannot be digested gets a new name: no result is used again."""
    try:
        return fingerprint(value)
    except DemurError:
        return uuid4().hex


def _class_name(value: object) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"


def _is_known(kind: type) -> bool:
    """Whether the class is Python's or torch's own."""
    return kind.__module__.partition(".")[0] in {"torch", *sys.stdlib_module_names}


def _code_of(kind: type) -> str:
    """Hash the source file of a class, or the bytecode of its methods if no file is known."""
    module = sys.modules.get(kind.__module__)
    found: object = module
    for name in kind.__qualname__.split("."):
        found = getattr(found, name, None)
    file = getattr(module, "__file__", None)
    if found is kind and file and Path(file).is_file():
        return _file(file, Path(file).stat().st_mtime_ns)
    codes = [
        _content(value)
        for _, value in sorted(vars(kind).items())
        if isinstance(value, FunctionType)
    ]
    return digest(kind.__qualname__, *codes)


@cache
def _file(path: str, changed: int) -> str:
    return file_digest(Path(path))
