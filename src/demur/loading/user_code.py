"""A user's source file: imported beside its neighbours without a trace, errors in one line."""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from traceback import walk_tb
from types import ModuleType

from demur.data.messages import printable
from demur.errors import DemurError
from demur.files import digest

KEPT = frozenset(sys.stdlib_module_names) | {
    *("PIL", "demur", "filelock", "jinja2", "lightning_fabric", "matplotlib", "numpy", "polars"),
    *("pydantic", "ray", "rich", "safetensors", "scipy", "sklearn", "timm", "torch"),
    *("torchvision", "typer"),
}
"""Modules that a file in the user's folder never replaces: demur runs on them."""

_LOCK = RLock()


@contextmanager
def neighbours(folder: Path, code: set[str]) -> Iterator[None]:
    """Inside, the modules of a folder can be imported, and take precedence over others.

    Afterwards `sys.path` and `sys.modules` are as before: two folders may have modules of one name.

    Parameters
    ----------
    folder : Path
    code : set of str
        Gets the digests of the files that were imported from the folder.
    """
    names = _modules_in(folder) - KEPT
    with _LOCK:
        hidden = {name: sys.modules.pop(name) for name in [*sys.modules] if _top(name) in names}
        path = sys.path.copy()
        writes = sys.dont_write_bytecode
        sys.path.insert(0, str(folder))
        sys.dont_write_bytecode = True
        importlib.invalidate_caches()
        try:
            yield
        finally:
            sys.dont_write_bytecode = writes
            sys.path[:] = path
            own = [name for name in sys.modules if _top(name) in names]
            for name in own:
                file = getattr(sys.modules.pop(name), "__file__", None)
                if file and Path(file).is_file() and file.endswith(".py"):
                    code.add(digest(name, Path(file).read_bytes()))
            sys.modules.update(hidden)


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Inside, packages in a folder can be imported. They stay imported, as all packages do."""
    with _LOCK:
        path = sys.path.copy()
        sys.path.insert(0, str(folder))
        importlib.invalidate_caches()
        try:
            yield
        finally:
            sys.path[:] = path


def _top(name: str) -> str:
    return name.partition(".")[0]


def _modules_in(folder: Path) -> set[str]:
    """Name the modules and packages in a folder."""
    return {one.stem for one in folder.glob("*.py")} | {
        one.parent.name for one in folder.glob("*/*.py")
    }


def executed(path: Path, code: set[str]) -> ModuleType:
    """Run a source file as a module of its own name. Call it inside `neighbours`."""
    name = path.stem if path.stem not in KEPT else f"{path.stem}_of_user"
    module = ModuleType(name)
    module.__file__ = str(path)
    content = path.read_bytes()
    code.add(digest(name, content))
    sys.modules[name] = module
    try:
        # Not through the import system: its cache of bytecode does not see each change of a file.
        exec(compile(content, str(path), "exec", dont_inherit=True), vars(module))
    finally:
        if name not in _modules_in(path.parent) - KEPT:
            sys.modules.pop(name, None)
    return module


@contextmanager
def one_line_errors(folder: Path, what: str) -> Iterator[None]:
    """Turn an error of the user's code into one line with file, line number and exception.

    Parameters
    ----------
    folder : Path
        Where the user's code lies. The last line in it that was running is named.
    what : str
        What failed, for an error without a line in the folder.
    """
    try:
        yield
    except (Exception, SystemExit) as error:  # a user's code may end with any error
        raise user_error(error, folder, what) from error


def user_error(error: BaseException, folder: Path, what: str) -> DemurError:
    """Describe an error of the user's code in one line."""
    place = last_line(error, lambda file: file.is_relative_to(folder)) or what
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    reason = f"{type(error).__name__}: {printable(text)}".rstrip(".: ")
    remedy = ""
    if isinstance(error, ImportError) and "relative import" in text:
        remedy = " Name the module of the package: py:PACKAGE.MODULE:FACTORY."
    return DemurError(f"{place}: {reason}.{remedy}")


def last_line(error: BaseException, counts: Callable[[Path], bool]) -> str:
    """Name the last line that was running in a file that counts; an empty text if there is none."""
    frames = [(frame.f_code.co_filename, line) for frame, line in walk_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        frames.append((error.filename, error.lineno or 0))
    own = [(file, line) for file, line in frames if file[:1] != "<" and counts(Path(file))]
    return f"{printable(own[-1][0])}, line {own[-1][1]}" if own else ""
