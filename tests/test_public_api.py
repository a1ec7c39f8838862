"""The public API: names of version 1 are gone, imports are light, files and functions are short."""

import ast
import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import demur
from demur import attacks

SOURCE = Path(demur.__file__).parent
ROOT = SOURCE.parents[1]
ROOMS = ["attacks", "bounds", "certificates", "classifier", "data", "defenses", "errors"]
ROOMS += ["evaluation"]
ROOMS += ["files", "goals", "hardware", "loading", "masks", "metrics", "networks", "norms"]
ROOMS += ["progress", "report", "seeds", "threat", "training"]

# The left column of section 4 of the design: names that no public name may have.
OLD = """
    fgs fg pgd apgd ddn fmn sigma_zero square noise transfer carlini_l2 carlini_l0 carlini_linf
    normalized_gradient strongest aim bonus NEVER density likeness widened expectation
    StraightThrough found attempts flat Problem drive differentiate unsolved keep confine ascent
    inside within radius region regions targets queries round_towards merged floats chopped
    morphs foreign embedded_backgrounds strangers Taps RBFMachines GaussianSmoothing
    MedianSmoothing rejection_network wide_network share posthoc retrain separability
    false_acceptance detection_rate balance Ledger Cell Figure together
"""
# Words that are old names in one place only: the place is a prefix of the dotted name.
OLD_THERE = {
    "demur.goals": "by",
    "demur.attacks": "start",
    "demur.defenses": "start",
    "demur.data.ImageSet": "take only",
    "demur.data.get": "get",
    "demur.data.describe": "describe",
    "demur.data.check": "check",
}


def names_of(module):
    """Give the public names of a room: its `__all__`, or what it defines without underscore."""
    if hasattr(module, "__all__"):
        return module.__all__
    own = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    }
    return sorted(own)


def assigned(kind):
    """Give the attributes that the methods of a class assign to `self`."""
    try:
        tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return set()
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def parameters(path, value):
    """Give the parameters of a function as dotted names."""
    try:
        found = inspect.signature(value).parameters
    except (TypeError, ValueError):
        return
    for name in found:
        yield f"{path}({name})", name


def members(path, kind):
    """Give public attributes, methods and parameters of a class of demur, inherited ones too."""
    for base in kind.__mro__:
        if not base.__module__.startswith("demur"):
            continue
        fields = {one.name for one in dataclasses.fields(base)} if is_data(base) else set()
        own = {*vars(base), *getattr(base, "__annotations__", {}), *fields, *assigned(base)}
        for name in sorted(own):
            if name.startswith("_") and name not in ("__init__", "__call__"):
                continue
            if not name.startswith("_"):
                yield f"{path}.{name}", name
            value = getattr(base, name, None)
            if callable(value):
                yield from parameters(f"{path}.{name}", value)


def is_data(kind):
    return dataclasses.is_dataclass(kind)


@cache
def public():
    """Give every public name of the library with its place."""
    return list(_public())


def _public():
    for name in demur.__all__:
        yield f"demur.{name}", name
    for room in ROOMS:
        module = importlib.import_module(f"demur.{room}")
        yield f"demur.{room}", room
        for name in names_of(module):
            value = getattr(module, name)
            path = f"demur.{room}.{name}"
            yield path, name
            if inspect.isclass(value):
                yield from members(path, value)
            elif callable(value):
                yield from parameters(path, value)


def old_names(found):
    words = set(OLD.split())
    places = {place: set(names.split()) for place, names in OLD_THERE.items()}
    for path, name in found:
        there = any(path.startswith(place) and name in names for place, names in places.items())
        if name in words or there:
            yield path


def test_no_public_name_is_one_of_version_1():
    found = public()
    assert len(found) > 500
    assert sorted(set(old_names(found))) == []


def test_the_names_of_version_1_would_be_noticed():
    """Negative control: modules, functions, parameters, methods and attributes are looked at."""
    paths = {path for path, _ in public()}
    assert {
        "demur.attacks",
        "demur.attacks.PGD",
        "demur.attacks.PGD.restarts",
        "demur.attacks.PGD.sweep(eps)",
        "demur.attacks.AttackResult.success",
        "demur.attacks.AttackState.starting_points",
        "demur.attacks.AttackState.drop_solved(stop)",
        "demur.norms.Ball.project(images)",
        "demur.norms.sizes(clean)",
        "demur.data.ImageSet.to_float",
        "demur.data.load(split)",
        "demur.ThreatModel",
        "demur.threat.ThreatModel.mask",
    } <= paths
    made_up = [("demur.attacks.AttackResult.found", "found"), ("demur.goals.Goal.by", "by")]
    made_up += [("demur.attacks.PGD.__call__(region)", "region"), ("demur.data.get", "get")]
    assert list(old_names(made_up)) == [path for path, _ in made_up]
    assert list(old_names([("demur.attacks.EnsembleResult.by", "by")])) == []


def test_what_the_library_promises_is_there():
    for name in demur.__all__:
        assert getattr(demur, name) is not None
    assert set(demur.__all__) <= set(dir(demur))
    with pytest.raises(AttributeError, match="no attribute 'fgs'"):
        _ = demur.fgs
    for room in ROOMS:
        module = importlib.import_module(f"demur.{room}")
        assert getattr(demur, room) is module
        for name in getattr(module, "__all__", ()):
            assert hasattr(module, name), f"demur.{room}.{name}"
        assert sorted(set(names_of(module))) == sorted(names_of(module))


ATTACKS = {
    name
    for name in attacks.__all__
    if inspect.isclass(getattr(attacks, name))
    and issubclass(getattr(attacks, name), attacks.Attack)
}


def partials(tree):
    """Give the lines that fix arguments of an attack with `functools.partial`."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else None
        called = node.func.id if isinstance(node.func, ast.Name) else called
        first = node.args[0]
        first = first.func if isinstance(first, ast.Call) else first
        of_room = isinstance(first, ast.Attribute) and ast.unparse(first.value).endswith("attacks")
        if called == "partial" and (
            of_room or (isinstance(first, ast.Name) and first.id in ATTACKS)
        ):
            yield node.lineno


@pytest.mark.parametrize("folder", ["src", "benchmarks", "examples", "docs", "tests"])
def test_no_attack_is_wrapped_in_partial(folder):
    """An attack is a value that holds its hyperparameters."""
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line in partials(ast.parse(path.read_text()))
    ]
    wrapped = re.compile(rf"partial\(\s*(attacks\.\w+|{'|'.join(sorted(ATTACKS))})\b")
    texts = [*(ROOT / folder).rglob("*.md"), ROOT / "README.md"]
    found += [str(path) for path in texts if wrapped.search(path.read_text())]
    assert found == []


def test_a_partial_around_an_attack_would_be_noticed():
    """Negative control."""
    for code in (
        "partial(PGD, steps=3)",
        "functools.partial(attacks.PGD)",
        "partial(PGD(3), seed=1)",
    ):
        assert list(partials(ast.parse(code)))
    assert not list(partials(ast.parse("partial(print, 3)")))


PACKAGES = """
import sys
print(*sorted({name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)))
"""


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def imported(code):
    """Give the top-level packages outside the standard library that a program imports."""
    return set(python(code + PACKAGES).split()) - {"__main__", "_distutils_hack"}


# Imports of demur.attacks, beside those that torch and numpy make themselves.
ALLOWED = {"demur", "numpy", "torch"}
HEAVY = {"sklearn", "scipy", "torchvision", "matplotlib", "lightning_fabric"}
HEAVY |= {"pydantic", "PIL", "jinja2", "pandas", "typer", "rich", "safetensors"}


def test_d34_importing_the_library_imports_no_torch():
    assert imported("import demur; dir(demur)") == {"demur"}
    assert "torch" not in imported(
        "from demur import DemurError, DemurWarning; import demur.errors"
    )


def test_d34_importing_attacks_imports_torch_and_numpy_alone():
    of_torch = imported("import numpy, torch")
    found = imported("import demur.attacks; from demur.attacks import PGD, masks")
    assert found - of_torch <= ALLOWED
    assert not HEAVY & found
    assert {"numpy", "torch"} <= found


def test_d34_the_command_line_answers_without_torch():
    code = """
import sys
sys.argv = ["demur", "--help"]
from demur.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code
heavy = sorted({heavy!r} & set(sys.modules))
assert not heavy, heavy
"""
    heavy = (HEAVY - {"typer", "rich"}) | {"torch", "numpy"}
    assert "Usage" in python(code.format(heavy=heavy))


@pytest.mark.slow
def test_d37_importing_the_library_leaves_malloc_alone():
    """Only commands and benchmarks may tell the C library how to keep memory."""
    rooms = ["attacks", "training", "defenses", "hardware"]
    code = "import demur\n" + "\n".join(f"import demur.{room}" for room in rooms)
    code += "\nassert demur.hardware.keep_buffers.cache_info().currsize == 0"
    python(code)


def callers(name):
    """Give the files of the library that call a function of this name."""
    return {
        path.relative_to(SOURCE).as_posix()
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == name
    }


@pytest.mark.slow
def test_d37_only_commands_change_malloc():
    assert callers("mallopt") == {"hardware.py"}
    command_line = {one for one in callers("keep_buffers") if one.startswith("cli/")}
    # A worker process of Ray runs tasks of demur alone.
    assert command_line and callers("keep_buffers") - command_line == {"evaluation/engines.py"}
    assert callers("tuned") > {"classifier/base.py"}  # negative control


FLOORS = [
    "attacks",
    "bounds",
    "certificates",
    "classifier",
    "data",
    "defenses",
    "evaluation",
    "loading",
    "metrics",
]
FLOORS += ["networks", "norms", "training"]
FILES = sorted(
    [
        *SOURCE.glob("*.py"),
        *(p for one in FLOORS for p in (SOURCE / one).glob("*.py")),
    ]
)


def functions(tree):
    """Give name and length of every function, without its docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node, clean=False) is not None:
                text = node.body[0]
                length -= text.end_lineno - text.lineno + 1
            yield node.name, length


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_files_functions_and_lines_are_short(path):
    text = path.read_text()
    lines = text.splitlines()
    assert len(lines) <= 350
    assert max(map(len, lines), default=0) <= 100
    long = [(name, length) for name, length in functions(ast.parse(text)) if length > 60]
    assert long == []


def test_a_long_function_would_be_noticed():
    """Negative control: the docstring does not count."""
    text = 'def one():\n    """A\n\n    docstring."""\n' + "    x = 1\n" * 60
    assert list(functions(ast.parse(text))) == [("one", 61)]
