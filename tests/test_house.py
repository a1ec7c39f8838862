"""The house: imports run downwards only; the library does not print or run foreign code."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import demur

SOURCE = Path(demur.__file__).parent
ROOMS = [
    ["errors"],
    ["files", "untrusted", "writing", "seeds", "hardware", "progress"],
    ["classifier"],
    ["goals"],
    ["norms"],
    ["masks"],
    ["threat"],
    ["metrics"],
    ["data"],
    ["bounds"],
    ["networks"],
    ["training"],
    ["attacks"],
    ["defenses"],
    ["certificates"],
    ["loading"],
    ["evaluation"],
    ["studies"],
    ["report"],
    ["commands"],
    ["cli"],
]
FLOOR = {room: number for number, rooms in enumerate(ROOMS) for room in rooms}
TRUSTED = "loading/state_dicts.py"
"""The only file that may read weights that can run code: where the user allows it."""
FILES = sorted(SOURCE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Rooms of demur that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = (
                [node.module]
                if node.module != "demur"
                else [f"demur.{alias.name}" for alias in node.names]
            )
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("demur.")}
    return found - {"__version__"}


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.name != "__init__.py" or path.parent != SOURCE], ids=str
)
def test_imports_run_downwards_only(path):
    here = room(path)
    for other in imports(path) - {here}:
        assert FLOOR[other] < FLOOR[here], (
            f"{path.relative_to(SOURCE)} imports demur.{other}, which is not below it"
        )


def test_the_rule_would_notice():
    """Negative control."""
    assert imports(SOURCE / "attacks" / "engine.py") >= {"hardware", "masks", "norms", "threat"}
    assert FLOOR["networks"] < FLOOR["attacks"]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_are_short_and_never_load_what_can_run_code(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 350
    assert not re.search(r"^\s*print\(", text, re.MULTILINE)
    assert not re.search(r"(pickle|joblib)\.loads?\(", text)
    calls = re.findall(r"torch\.load\(.*", text)
    unsafe = [call for call in calls if "weights_only=True" not in call]
    assert len(unsafe) == (path.relative_to(SOURCE).as_posix() == TRUSTED)


def test_the_files_of_bounds_import_each_other_without_a_circle():
    """Imports inside functions and those of type checkers count, too."""
    place = SOURCE / "bounds"
    imported = {}
    for path in sorted(place.glob("*.py")):
        nodes = ast.walk(ast.parse(path.read_text()))
        modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        imported[path.stem] = {
            str(module).removeprefix("demur.bounds.")
            for module in modules
            if str(module).startswith("demur.bounds.")
        }
    order = list(TopologicalSorter(imported).static_order())  # raises CycleError
    assert order.index("tracing") < order.index("layers") < order.index("recording")
