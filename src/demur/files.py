"""Digests of files and of values."""

import copyreg
import dataclasses
import dis
import hashlib
import json
import marshal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import BuiltinMethodType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from demur.errors import DemurError


def canonical_json(value: Any) -> str:
    """Write a value as JSON in one canonical form: sorted keys, no spaces, no NaN.

    Parameters
    ----------
    value : object
        What `json.dumps` accepts.

    Returns
    -------
    str
        The JSON text.

    Examples
    --------
    >>> canonical_json({"b": 1, "a": [2, 3]})
    '{"a":[2,3],"b":1}'
    """
    compact = (",", ":")
    return json.dumps(
        value, sort_keys=True, separators=compact, allow_nan=False, ensure_ascii=False
    )


def digest(*parts: bytes | memoryview | str) -> str:
    """Hash bytes and texts with BLAKE2b (128 bits), each part with its length.

    Parameters
    ----------
    *parts : bytes, memoryview of bytes, or str
        What is hashed. A text counts as its UTF-8 bytes.

    Returns
    -------
    str
        32 hexadecimal digits.

    Examples
    --------
    >>> digest("ab", "c") == digest("a", "bc")
    False
    """
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()


def file_digest(path: Path) -> str:
    """Hash a file's content with SHA-256.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    str
        64 hexadecimal digits.

    Examples
    --------
    >>> import os
    >>> file_digest(Path(os.devnull))[:8]
    'e3b0c442'
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: object) -> str:
    """Hash a Python value by its content; the digest is the same in every process.

    Equal values of equal types have equal digests: ``1``, ``1.0`` and ``True`` differ, and the
    order of a dict or a set does not count. The value may contain itself.

    * Tensors and arrays count by dtype, shape and bytes; modules of torch by class, parameters (and
      which train or are shared), buffers, hooks, submodules and attributes, not by training mode.
    * Functions count by name, bytecode, constants, defaults, closure, and the global values that
      they use: data and functions of the same module by content, functions elsewhere by name.
    * Classes, modules and builtins count by their qualified name only.
    * An object with a method ``fingerprint()`` counts by what it returns, and any other object by
      the state that `pickle` would store: for most classes the class and ``__dict__``.

    Parameters
    ----------
    value : object
        The value.

    Returns
    -------
    str
        32 hexadecimal digits.

    Raises
    ------
    DemurError
        For a value that cannot be fingerprinted, for example an open file or a generator.

    Examples
    --------
    >>> fingerprint({"a": 1, "b": [2, 3]}) == fingerprint({"b": [2, 3], "a": 1})
    True
    >>> fingerprint(lambda x: x + 0.5) == fingerprint(lambda x: x + 0.02)
    False
    """
    try:
        return _Fingerprint().of(value)
    except RecursionError as error:
        raise DemurError("the value cannot be fingerprinted: nested too deeply.") from error


class _Fingerprint:
    """Digests of a value and of everything in it: a digest is made of those of the parts."""

    def __init__(self) -> None:
        self.open: dict[int, int] = {}  # depth of each value whose parts are being hashed
        self.done: dict[int, tuple[object, str]] = {}  # the value too: a free id is used again
        self.cycles = 0

    def of(self, value: object) -> str:
        if write := _ATOMS.get(type(value)):
            return digest(type(value).__name__, write(value))
        key = id(value)
        if key in self.done:
            return self.done[key][1]
        if key in self.open:
            self.cycles += 1
            return digest("cycle", str(len(self.open) - self.open[key]))
        cycles = self.cycles
        self.open[key] = len(self.open)
        try:
            found = digest(_name(type(value)), *self.parts(value))
        finally:
            del self.open[key]
        if self.cycles == cycles:  # else the digest depends on where the cycle was entered
            self.done[key] = (value, found)
        return found

    def all(self, values: Iterable[object]) -> list[str]:
        return [self.of(value) for value in values]

    def parts(self, value: Any) -> Sequence[str | bytes | memoryview]:
        if isinstance(value, type | ModuleType):
            return [_name(value)]
        if type(value) in (tuple, list):
            return self.all(value)
        if type(value) is dict:
            return sorted(self.all(value.items()))
        if isinstance(value, set | frozenset):  # pickle would keep their order, which is random
            return [*sorted(self.all(value)), self.of(getattr(value, "__dict__", {}))]
        if isinstance(value, FunctionType):
            return self.function(value)
        if isinstance(value, CodeType):
            bare = value.replace(co_consts=(), co_filename="", co_firstlineno=1, co_linetable=b"")
            return [marshal.dumps(bare, 2), *self.all(value.co_consts)]  # 2: has no references
        if isinstance(value, MethodType | BuiltinMethodType):
            return self.all((getattr(value, "__func__", _name(value)), value.__self__))
        if callable(own := getattr(value, "fingerprint", None)):
            return [self.of(own())]
        if _name(type(value)) in ("_thread.lock", "_thread.RLock"):
            return []  # a lock holds nothing that a result could depend on
        if dataclasses.is_dataclass(value):
            names = [field.name for field in dataclasses.fields(value)]
            return self.all((name, getattr(value, name, dataclasses.MISSING)) for name in names)
        return self.numerical(value) or self.state(value)

    def function(self, value: FunctionType) -> list[str]:
        used: dict[str, object] = {}
        for name in _global_names(value.__code__) & value.__globals__.keys():
            other = value.__globals__[name]
            elsewhere = isinstance(other, FunctionType) and other.__module__ != value.__module__
            try:
                used[name] = _name(other) if elsewhere else self.of(other)
            except DemurError:  # for example a file that the module holds open
                used[name] = _name(type(other))
        cells = [c != CellType() and (c.cell_contents,) for c in value.__closure__ or ()]
        defaults = (value.__defaults__, value.__kwdefaults__)
        return self.all((_name(value), value.__code__, defaults, cells, vars(value), used))

    def numerical(self, value: Any) -> list[str | bytes | memoryview]:
        """Parts of what torch and numpy define; none for other values."""
        numpy: Any = sys.modules.get("numpy")  # not imported here, and not met where not imported
        torch: Any = sys.modules.get("torch")
        if numpy and type(value) in (numpy.ndarray, numpy.memmap) and not value.dtype.hasobject:
            return [str(value.dtype.descr), str(value.shape), value.tobytes()]
        if torch and isinstance(value, torch.nn.Module):
            return [*self.module(torch, value)]
        if not torch or not isinstance(value, torch.Tensor):
            return []
        if value.layout != torch.strided or value.is_quantized or value.device.type == "meta":
            raise _refused(value)
        own = {} if type(value) in (torch.Tensor, torch.nn.Parameter) else vars(value)
        data = value.detach().resolve_conj().resolve_neg().cpu().ravel().view(torch.uint8)
        return [self.of(own), f"{value.dtype} {tuple(value.shape)}", memoryview(data.numpy())]

    def module(self, torch: Any, value: Any) -> list[str]:
        named = [id(p) for _, p in value.named_parameters(remove_duplicate=False)]
        shared = [named.index(one) for one in named]
        trained = [(k, p, p.requires_grad) for k, p in value.named_parameters(recurse=False)]
        buffers = list(value.named_buffers(recurse=False))
        own = vars(value)
        base = vars(torch.nn.Module()).keys()  # the keys of hooks count up through the process
        hooks = [[k, *own.get(k, {}).values()] for k in sorted(base) if k.endswith("_hooks")]
        rest = {k: own[k] for k in own.keys() - base - {"_graph"}}
        if isinstance(value, torch.jit.ScriptModule):  # its attributes are not Python's
            rest = {"name": value.original_name, "code": getattr(value, "code", "")}
        return self.all((shared, trained, buffers, hooks, rest, list(value._modules.items())))

    def state(self, value: object) -> list[str]:
        """Digests of what pickle stores: a function's name, arguments, state, items, entries."""
        reduce = copyreg.dispatch_table.get(type(value))
        try:
            found: Any = reduce(value) if reduce else value.__reduce_ex__(4)
        except Exception as error:  # a class may refuse with any error
            raise _refused(value) from error
        if isinstance(found, str):
            return [found, _name(value), self.of(getattr(value, "__wrapped__", None))]
        make, given, own, items, entries = (*found, None, None, None)[:5]
        return self.all((_name(make), given, own, list(items or ()), list(entries or ())))


_ATOMS: dict[type, Callable[[Any], str | bytes]] = {type(None): repr, bool: repr, bytes: bytes}
_ATOMS |= {int: hex, float: float.hex}  # Python refuses to write a long integer in decimal
_ATOMS |= {str: lambda text: text.encode(errors="surrogatepass")}


def _name(value: Any) -> str:
    module = getattr(value, "__module__", None)
    own = getattr(value, "__qualname__", None) or getattr(value, "__name__", "")
    return f"{module}.{own}" if module else str(own)


def _global_names(code: CodeType) -> set[str]:
    """Names that the code, and the code inside it, looks up as globals."""
    steps = dis.get_instructions(code)
    found = {str(step.argval) for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return found.union(*(_global_names(c) for c in code.co_consts if isinstance(c, CodeType)))


def _refused(value: object) -> DemurError:
    remedy = "Give its class a method fingerprint() that returns its settings."
    return DemurError(f"a value of type {_name(type(value))} cannot be fingerprinted. {remedy}")
