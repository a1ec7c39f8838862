"""The code fingerprint: a hash of the source files that a result depends on.

Static imports are followed from the files that define the given classes and functions. An import
leads to the file that defines the imported name: files `__init__.py` that only export it again are
left out. Comments, docstrings and layout do not count.
"""

import ast
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import demur
from demur.errors import DemurError
from demur.files import digest

PACKAGE = "demur"


def code_fingerprint(roots: Iterable[object]) -> str:
    """Hash the source files that define the roots, and the files of demur that these import.

    Parameters
    ----------
    roots : iterable of classes and functions
        Roots outside demur count by their own files; imports of these files are followed into demur
        alone.

    Returns
    -------
    str
        32 hexadecimal digits.

    Raises
    ------
    DemurError
        If a root is not defined in a file, for example in an interactive session.

    Examples
    --------
    >>> from demur.attacks import FGSM, PGD
    >>> code_fingerprint([PGD]) == code_fingerprint([FGSM])
    False
    """
    found = closure(_file_of(root) for root in roots)
    # By content: the order of paths would depend on where demur is installed.
    return digest(*sorted(_content(path) for path in found))


def closure(files: Iterable[Path]) -> frozenset[Path]:
    """Give these files and all files of demur that they depend on."""
    found: set[Path] = set()
    waiting = list(files)
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting.extend(_imports(path))
    return frozenset(found)


def _file_of(root: object) -> Path:
    """Give the file that defines a class or function."""
    name = getattr(sys.modules.get(str(root.__module__)), "__file__", None)
    if not name or not name.endswith(".py"):
        raise DemurError(
            f"{root!r} is not defined in a file, so a change of its code would go unnoticed: put "
            "it into a module."
        )
    return Path(name).resolve()


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes())


@cache
def _content(path: Path) -> str:
    """Hash the syntax of a file, without docstrings. It is equal in all versions of Python."""
    return digest(path.stem, *_syntax(_tree(path)))


def _syntax(node: object) -> Iterator[str]:
    if isinstance(node, list):
        yield f"[{len(node)}"
        for one in node:
            yield from _syntax(one)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        yield "docstring"
    elif isinstance(node, ast.AST):
        yield type(node).__name__
        for name, value in ast.iter_fields(node):
            if name not in ("ctx", "kind", "type_comment", "type_params", "type_ignores"):
                yield name
                yield from _syntax(value)
    else:
        yield f"{type(node).__name__} {node!r}"


@cache
def _imports(path: Path) -> frozenset[Path]:
    """Give the files of demur that define what a file imports, inside functions too."""
    tree = _tree(path)
    found: set[Path] = set()
    for node in _runtime(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found |= _used_of(alias.name, alias.asname or alias.name, tree)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if _module_file(inner):
                    found |= _used_of(inner, alias.asname or alias.name, tree)
                else:
                    found |= _definition(node.module, alias.name)
    return frozenset(found)


def _runtime(tree: ast.AST) -> Iterator[ast.AST]:
    """Walk the statements, without those that only type checkers read."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from _runtime(node)


def _used_of(module: str, alias: str, tree: ast.Module) -> set[Path]:
    """Give the files that define what is used of an imported module."""
    path = _module_file(module)
    if path is None:
        return set()
    if path.name != "__init__.py":
        return {path}
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == alias
    }
    return set().union(*(_definition(module, name) for name in used))


def _definition(module: str, name: str) -> set[Path]:
    """Give the file that defines a name of a module."""
    path = _module_file(module)
    if path is None:
        return set()
    if path.name != "__init__.py":
        return {path}
    inner = _module_file(f"{module}.{name}")
    if inner is not None and inner.name != "__init__.py":
        return {inner}
    for node in _runtime(_tree(path)):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _definition(node.module, alias.name)
    return {path}


def _module_file(module: str) -> Path | None:
    """Give the file of a module of demur."""
    parts = module.split(".")
    if parts[0] != PACKAGE or demur.__file__ is None:
        return None
    place = Path(demur.__file__).resolve().parent.joinpath(*parts[1:])
    for path in (place / "__init__.py", place.with_name(place.name + ".py")):
        if path.is_file():
            return path
    return None
