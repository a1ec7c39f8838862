"""Keys of nodes: derived from their fields and from the code that they run."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from types import FunctionType
from typing import Any, Self

import torch

from demur.data.image_files import ImageFiles, ResizedImages
from demur.data.images import ImageSet
from demur.errors import DemurError
from demur.evaluation.code import code_fingerprint
from demur.evaluation.nodes import Node
from demur.files import digest, fingerprint
from demur.hardware import has_fast_bfloat16

LIBRARIES = ("torch", "torchvision", "scikit-learn", "scipy", "lightning-fabric", "numpy")

STREAMED = (ImageFiles, ResizedImages)
"""Images whose pixels are computed when they are read, by code of demur and by Pillow."""


def versions() -> dict[str, str]:
    """Give the versions of the libraries that can change a figure."""
    return {name: version(name) for name in ("demur", *LIBRARIES)}


@dataclass(frozen=True)
class Environment:
    """What a figure depends on beside its node: the kind of machine, and the number of threads."""

    device: str
    precision: str
    threads: int
    processor: str

    @classmethod
    def here(cls, device: str) -> Self:
        """Describe this process."""
        kind = torch.device(device)
        precision = "bfloat16" if has_fast_bfloat16(kind) else "float32"
        if kind.type == "cuda":
            return cls(device, precision, 0, torch.cuda.get_device_name(kind))
        capability = torch.backends.cpu.get_cpu_capability()
        return cls(device, precision, torch.get_num_threads(), capability)


class Keys:
    """The keys of nodes in an environment.

    A key has two parts. The identity is a digest of the fields, the nodes that a node refers to and
    the environment. The code is a digest of the source files and of the versions of libraries. A
    stored result with the same identity and another code is stale.
    """

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self._identities: dict[int, tuple[Node, str]] = {}
        self._codes: dict[int, tuple[Node, str]] = {}
        self._classes: dict[frozenset[object], str] = {}

    def of(self, node: Node) -> str:
        """Give the whole key."""
        return f"{self.identity(node)}-{self.code(node)}"

    def identity(self, node: Node) -> str:
        """Digest what the node asks for."""
        return _remembered(self._identities, node, self._identity)

    def code(self, node: Node) -> str:
        """Digest the code that the node and the nodes before it run."""
        return _remembered(self._codes, node, self._code)

    def _identity(self, node: Node) -> str:
        environment = str(dataclasses.astuple(self.environment))
        return digest(environment, self.content(node, inside=True))

    def content(self, value: Any, inside: bool = False) -> str:
        """Digest a value, as the field of a node."""
        if isinstance(value, Node) and not inside:
            return self.identity(value)
        if isinstance(value, ImageSet | ImageFiles | ResizedImages):
            return value.fingerprint
        if isinstance(value, tuple | list):
            return digest(type(value).__name__, *(self.content(one) for one in value))
        if isinstance(value, Mapping):
            pairs = (digest(str(key), self.content(one)) for key, one in value.items())
            return digest("mapping", *sorted(pairs))
        if isinstance(value, FunctionType):
            if "<" in value.__qualname__:
                raise DemurError(
                    f"{value.__qualname__} has no name of its own: a node needs a function of a "
                    "module."
                )
            return digest("function", _name(value))
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            parts = (
                digest(one.name, self.content(getattr(value, one.name)))
                for one in dataclasses.fields(value)
                if not one.metadata.get("label")
            )
            return digest(_name(type(value)), *parts)
        return fingerprint(value)

    def _code(self, node: Node) -> str:
        roots = frozenset(_roots(node, inside=True))
        if roots not in self._classes:
            self._classes[roots] = code_fingerprint(roots)
        libraries = [*LIBRARIES, *(["pillow"] if roots.intersection(STREAMED) else [])]
        said = str(sorted((name, version(name)) for name in libraries))
        before = sorted({self.code(one) for one in node.needs()})
        return digest(self._classes[roots], said, *before)[:16]


def _remembered(
    known: dict[int, tuple[Node, str]], node: Node, compute: Callable[[Node], str]
) -> str:
    """Compute a digest once for each node; the node is kept, so that its id stays its own."""
    if id(node) not in known:
        known[id(node)] = (node, compute(node))
    return known[id(node)][1]


def _roots(value: Any, inside: bool = False) -> Iterator[object]:
    """Give the classes and functions that a node and the values of its fields are made of.

    The pixels of an `ImageSet` are part of its fingerprint, those of streamed images are not.
    """
    if isinstance(value, ImageSet) or (isinstance(value, Node) and not inside):
        return
    if isinstance(value, FunctionType):
        yield value
    elif isinstance(value, STREAMED):
        yield type(value)
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _roots(one)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield type(value)
        for one in dataclasses.fields(value):
            if not one.metadata.get("label"):
                yield from _roots(getattr(value, one.name))


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"
