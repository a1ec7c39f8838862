"""Models that a user's own code makes: `py:FILE.py:FACTORY` and `py:PACKAGE.MODULE:FACTORY`."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from demur.classifier import Classifier, Preprocess
from demur.data.messages import printable
from demur.errors import DemurError
from demur.files import digest
from demur.loading.names import no_such
from demur.loading.preprocessing import chosen
from demur.loading.request import Found, ModelRequest
from demur.loading.user_code import executed, importable, neighbours, one_line_errors
from demur.loading.wrapping import channels_of, classifier_of, described, in_float32, precisions
from demur.untrusted import user_path

FORM = "write py:FILE.py:FACTORY or py:PACKAGE.MODULE:FACTORY"


def read_factory(spec: str, request: ModelRequest) -> Found:
    """Call a user's factory, and make a classifier of what it returns.

    Parameters
    ----------
    spec : str
        ``FILE.py:FACTORY`` or ``PACKAGE.MODULE:FACTORY``.
    request : ModelRequest

    Raises
    ------
    DemurError
        If the file, the factory or what it returns is not usable; one line names file and line.
    """
    request.allow_only("a py: source", "num_classes", "reject_column", "model_kwargs", "preprocess")
    made, code = made_by(spec, request)
    return _found(made, code, request)


def made_by(spec: str, request: ModelRequest) -> tuple[nn.Module, list[str]]:
    """Call a user's factory; give its module, and digests of the source files that made it.

    The parameters and errors are those of `read_factory`.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name or name.endswith(".py"):
        raise DemurError(f"{printable(request.source)!r} names no factory: {FORM}.")
    if place.endswith(".py"):
        return _of_file(user_path(place), name, request)
    if "/" in place or "\\" in place:
        raise DemurError(f"{printable(place)!r} is no Python file: {FORM}.")
    return _of_module(place, name, request)


def _of_file(path: Path, name: str, request: ModelRequest) -> tuple[nn.Module, list[str]]:
    path = path.resolve()
    if not path.is_file():
        raise DemurError(f"there is no file {printable(path)}.")
    code: set[str] = set()
    where = printable(path)
    with neighbours(path.parent, code):
        with one_line_errors(path.parent, where):
            module = executed(path, code)
        made = _made(module, name, path.parent, where, request)
    return made, sorted(code)


def _of_module(place: str, name: str, request: ModelRequest) -> tuple[nn.Module, list[str]]:
    with importable(Path.cwd()):
        path = _file_of_module(place)
        with one_line_errors(path.parent, f"the module {place}"):
            module = importlib.import_module(place)
        made = _made(module, name, path.parent, f"the module {place}", request)
    return made, _code_of(place, path)


def _code_of(place: str, path: Path) -> list[str]:
    """Digest the loaded files of the top package, and of the current folder: what the factory may
    have used. Installed packages that lie elsewhere are left out.
    """
    top = place.partition(".")[0]
    found = [digest(place, path.read_bytes())] if path.suffix == ".py" else []
    for name, module in sorted(sys.modules.items()):
        file = Path(getattr(module, "__file__", None) or "")
        own = name == top or name.startswith(f"{top}.")
        here = file.is_relative_to(Path.cwd()) and "site-packages" not in file.parts
        if (own or here) and file.suffix == ".py" and file.is_file():
            found.append(digest(name, file.read_bytes()))
    return found


def _file_of_module(place: str) -> Path:
    """Find the file of a module. Packages that contain it are imported."""
    package = place.rpartition(".")[0]
    folder = Path.cwd()
    if package:
        folder = _file_of_module(package).parent
    with one_line_errors(folder, f"the module {printable(place)}"):
        try:
            spec = importlib.util.find_spec(place)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{place}.".startswith(f"{error.name}."):
                raise
            spec = None  # a part of the name is a module, not a package
        except ValueError:  # an empty name, or one that is in sys.modules without a file
            spec = None
    if spec is None:
        raise DemurError(
            f"there is no module {printable(place, 80)!r}: it must be installed, or lie in the "
            f"current folder. For a file, write py:FILE.py:FACTORY."
        )
    if spec.origin in (None, "built-in", "frozen"):
        return Path(next(iter(spec.submodule_search_locations or [str(folder)])), "__init__.py")
    return Path(str(spec.origin))


def _made(
    module: ModuleType, name: str, folder: Path, where: str, request: ModelRequest
) -> nn.Module:
    """Take the factory out of the module, and call it."""
    factory = getattr(module, name, None)
    if factory is None:
        public = [one for one, value in vars(module).items() if _is_usable(one, value)]
        raise no_such(f"{where} has no factory", name, public)
    if isinstance(factory, nn.Module):
        if request.model_kwargs:
            raise DemurError(f"{name} of {where} is a model already: it takes no model_kwargs.")
        return factory
    if not callable(factory):
        raise DemurError(
            f"{name} of {where} is of type {type(factory).__name__}: it must be a function that "
            "returns an nn.Module or a Classifier, or one of these."
        )
    with torch.random.fork_rng(devices=[]), one_line_errors(folder, f"{name}(...) of {where}"):
        # A factory that draws weights gives the same model each time.
        torch.manual_seed(0)
        made = factory(**request.model_kwargs)
    if not isinstance(made, nn.Module):
        raise DemurError(
            f"{name} of {where} returned {type(made).__name__}: it must return an nn.Module or a "
            "Classifier."
        )
    return made


def _is_usable(name: str, value: object) -> bool:
    """Whether a name of a module may be a factory."""
    return callable(value) and not name.startswith("_")


def _found(made: nn.Module, code: list[str], request: ModelRequest) -> Found:
    """Make a classifier of the user's module, and respect what the module says of itself."""
    notes: list[str] = []
    if made.training:
        notes.append("The factory gave the model in training mode; demur uses evaluation mode.")
    made.eval()
    base = _preprocess(made, notes)
    names = _class_names(made, notes)
    if isinstance(made, Classifier):
        return Found(_of_classifier(made, base, names, request), tuple(notes), tuple(code))
    if kinds := precisions(made):
        notes.append(f"The model has weights in {', '.join(kinds)}; demur computes in float32.")
    classifier = classifier_of(
        in_float32(made),
        request.num_classes,
        chosen(request.preprocess, base, channels_of(made)),
        names,
        rejects=request.reject_column is not None,
        reject_column=request.reject_column,
    )
    return Found(classifier, tuple(notes), tuple(code))


def _of_classifier(
    made: Classifier,
    base: Preprocess | None,
    names: tuple[str, ...] | None,
    request: ModelRequest,
) -> Classifier:
    if request.reject_column is not None:
        raise DemurError(
            "reject_column is for a plain module: a Classifier says itself whether it rejects."
        )
    given = request.preprocess
    preprocess = chosen(given, base, channels_of(made)) if given is not None else None
    if preprocess is None and made.preprocess is None:
        preprocess = base
    return described(made, request.num_classes, preprocess, names, rejects=None)


def _preprocess(made: nn.Module, notes: list[str]) -> Preprocess | None:
    """Read the attribute `preprocess` of a module."""
    said = getattr(made, "preprocess", None)
    if said is None or isinstance(said, Preprocess):
        return said
    notes.append(
        "The model's attribute preprocess is no demur.classifier.Preprocess, so it is not used."
    )
    return None


def _class_names(made: nn.Module, notes: list[str]) -> tuple[str, ...] | None:
    """Read the attribute `class_names` or `classes` of a module."""
    for name in ("class_names", "classes"):
        said = getattr(made, name, None)
        if isinstance(said, list | tuple) and all(isinstance(one, str) for one in said):
            return tuple(said)
        if said is not None:
            notes.append(f"The model's attribute {name} is no list of names, so it is not used.")
    return None
