"""Maps from the classes of data to the classes of a model."""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from demur.data.formats import MOST_CLASSES
from demur.data.listing import is_number
from demur.data.messages import printable, quoted
from demur.errors import DemurError
from demur.untrusted import read_json, read_text

Names = str | Sequence[str]
"""The name of a class, or several names of it, of which the first one is shown."""

_FORM = "a label map has a line data class,model class, or is a JSON object of such pairs"


@dataclass(frozen=True)
class MatchedClasses:
    """The classes of data as classes of a model.

    Parameters
    ----------
    ids : Tensor
        The number of the model's class for each class of the data, (n,) int64.
    class_names : tuple of str
        Names of the model's classes; of the data's where those of the model are not known.
    note : str
        A sentence that says how they were matched; empty if nothing had to be.
    """

    ids: Tensor
    class_names: tuple[str, ...]
    note: str


def match_classes(
    names: Sequence[str],
    classes: Sequence[Names] | None,
    label_map: Mapping[str, str | int],
    subject: str,
) -> MatchedClasses:
    """Find the model's class for each class of the data.

    A class in `label_map` becomes the class that it says. The others are matched by their names:
    letter for letter, else without regard to case, else with underscores as spaces. If a name is
    left and all are numbers, they are the numbers of the model's classes.

    Parameters
    ----------
    names : sequence of str
        Different names of the data's classes.
    classes : sequence of str or of sequences of str, or None
        Names of the model's classes in their order. A class may have several names, such as that of
        ImageNet and its WordNet id. None if they are not known: then numbers stay, and other names
        are numbered in their order.
    label_map : mapping of str to str or int
        Model classes, by name or number, of some of the data's classes.
    subject : str
        Name of the data, for messages.

    Returns
    -------
    MatchedClasses

    Raises
    ------
    DemurError
        If a class has no counterpart, or more than one.

    Examples
    --------
    >>> classes = ["tench", ("goldfish", "n01443537")]
    >>> matched = match_classes(["n01443537", "Tench"], classes, {}, "fish")
    >>> matched.ids.tolist(), matched.class_names
    ([1, 0], ('tench', 'goldfish'))
    """
    if classes is None:
        return _without_model(names, label_map, subject)
    shown = distinct([_all_names(one)[0] for one in classes])
    ids: list[int | None] = []
    lookups = _lookups(classes)
    for name in names:
        if name in label_map:
            ids.append(_target(label_map[name], classes, lookups, subject))
        else:
            ids.append(_by_name(name, lookups, subject))
    how = "by the label map" if set(names) & set(label_map) else "by name"
    if None in ids:
        left = [name for name, number in zip(names, ids, strict=True) if number is None]
        if not all(is_number(name) for name in names if name not in label_map):
            raise _unmatched(left, len(names), subject)
        ids = [
            number if name in label_map else _in_range(int(name), len(shown), subject)
            for name, number in zip(names, ids, strict=True)
        ]
        how = "by number"
    numbers = torch.tensor(ids, dtype=torch.int64)
    matched = [shown[number] for number in numbers.tolist()]
    note = "" if list(names) == matched else _note(subject, names, matched, numbers.tolist(), how)
    return MatchedClasses(numbers, shown, note)


def distinct(names: Sequence[str]) -> tuple[str, ...]:
    """Make names of classes differ: repeated ones get their numbers.

    Examples
    --------
    >>> distinct(["crane", "owl", "crane"])
    ('crane (0)', 'owl', 'crane (2)')
    """
    seen: dict[str, int] = {}
    for name in names:
        seen[name] = seen.get(name, 0) + 1
    return tuple(
        f"{name} ({number})" if seen[name] > 1 else name for number, name in enumerate(names)
    )


def read_label_map(path: Path) -> dict[str, str | int]:
    """Read a label map: the model's class, by name or number, for classes of the data.

    Parameters
    ----------
    path : Path
        A JSON object, or a CSV file of two columns without a header. The ending .json marks a JSON
        file.

    Returns
    -------
    dict of str to str or int
        Numbers of a CSV file stay text: a class of the model may be called so.

    Raises
    ------
    DemurError
        If the file cannot be read, has another form, or maps a class twice.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "labels.csv")
    ...     _ = path.write_text("red fish,goldfish")
    ...     read_label_map(path)
    {'red fish': 'goldfish'}
    """
    title = printable(path)
    if not path.is_file():
        raise DemurError(f"there is no label map {title}.")
    is_json = path.suffix.lower() == ".json"
    pairs = _from_json(path, title) if is_json else _from_csv(read_text(path), title)
    label_map: dict[str, str | int] = {}
    for name, target in pairs:
        if name in label_map:
            raise DemurError(f"{title} maps the class {quoted(name)} twice.")
        label_map[name] = target
    if not label_map:
        raise DemurError(f"{title} maps no classes; {_FORM}.")
    return label_map


def _from_json(path: Path, title: str) -> list[tuple[str, str | int]]:
    try:
        # The object as pairs, so that a class that stands twice is seen.
        pairs: list[tuple[str, str | int]] = read_json(path, pairs=lambda pairs: pairs)
    except DemurError as error:
        raise DemurError(f"{error} For a label map: {_FORM}.") from error
    is_object = isinstance(pairs, list) and all(isinstance(one, tuple) for one in pairs)
    if not is_object or any(type(target) not in (str, int) for _, target in pairs):
        raise DemurError(
            f'{title} must hold names or numbers: {{"red fish": "goldfish"}}; {_FORM}.'
        )
    return pairs


def _from_csv(text: str, title: str) -> list[tuple[str, str | int]]:
    pairs: list[tuple[str, str | int]] = []
    reader = csv.reader(text.splitlines())
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            if len(cells) != 2 or not all(cells):
                raise DemurError(
                    f"{title}, line {reader.line_num}: it needs two columns separated by a comma; "
                    f"{_FORM}."
                )
            pairs.append((cells[0], cells[1]))
    except csv.Error as error:
        raise DemurError(f"{title} is not a CSV file: {error}.") from error
    return pairs


def _all_names(names: Names) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _folded(name: str) -> str:
    return name.casefold().replace("_", " ")


_FOLDS: tuple[Callable[[str], str], ...] = (str, str.casefold, _folded)

_Lookups = list[tuple[Callable[[str], str], dict[str, set[int]]]]


def _lookups(classes: Sequence[Names]) -> _Lookups:
    """Index the classes by their names: first by those that are shown, then by all."""
    lookups: _Lookups = []
    for names_of in (lambda one: _all_names(one)[:1], _all_names):
        for fold in _FOLDS:
            known: dict[str, set[int]] = {}
            for number, one in enumerate(classes):
                for name in names_of(one):
                    known.setdefault(fold(name), set()).add(number)
            lookups.append((fold, known))
    return lookups


def _by_name(name: str, lookups: _Lookups, subject: str) -> int | None:
    for fold, known in lookups:
        if numbers := sorted(known.get(fold(name), ())):
            if len(numbers) > 1:
                raise DemurError(
                    f"the class {quoted(name)} of {printable(subject)} may be class {numbers[0]} "
                    f"or {numbers[1]} of the model: both have this name. Give --label-map FILE "
                    "with the number."
                )
            return numbers[0]
    return None


def _target(target: str | int, classes: Sequence[Names], lookups: _Lookups, subject: str) -> int:
    """Find the class that a label map says."""
    if isinstance(target, str):
        number = _by_name(target, lookups, "the label map")
        if number is not None:
            return number
        if not is_number(target):
            raise DemurError(
                f"the label map says {quoted(target)}, which is no class of the model: give the "
                f"name or the number of one of its {len(classes)} classes."
            )
    return _in_range(int(target), len(classes), subject)


def _in_range(number: int, count: int, subject: str) -> int:
    if not 0 <= number < count:
        raise DemurError(
            f"{printable(subject)} has the class number {number}, but the classes of the model are "
            f"0..{count - 1}. Give --label-map FILE if the data counts in another way."
        )
    return number


def _unmatched(left: Sequence[str], count: int, subject: str) -> DemurError:
    first = ", ".join(quoted(name) for name in left[:3])
    more = ", ..." if len(left) > 3 else ""
    return DemurError(
        f"{len(left)} of the {count} classes of {printable(subject)} are no classes of the model: "
        f"{first}{more}. Give --label-map FILE; {_FORM}."
    )


def _without_model(
    names: Sequence[str], label_map: Mapping[str, str | int], subject: str
) -> MatchedClasses:
    """Number the classes where the names of the model's classes are not known."""
    targets = [str(label_map.get(name, name)) for name in names]
    if all(is_number(target) for target in targets):
        numbers = [_in_range(int(target), MOST_CLASSES, subject) for target in targets]
        all_names = tuple(map(str, range(max(numbers) + 1)))
        return MatchedClasses(torch.tensor(numbers), all_names, "")
    if set(names) & set(label_map):
        left = next(target for target in targets if not is_number(target))
        raise DemurError(
            f"the names of the model's classes are not known, so the label map must say the number "
            f"of the class for {quoted(left)}."
        )
    note = (
        f"The names of the model's classes are not known: the {len(names)} classes of "
        f"{printable(subject)} are numbered in their order, from 0 for {quoted(names[0])}."
    )
    return MatchedClasses(torch.arange(len(names)), tuple(names), note)


def _note(
    subject: str, names: Sequence[str], matched: Sequence[str], numbers: Sequence[int], how: str
) -> str:
    changed = [one for one in zip(names, matched, numbers, strict=True) if one[0] != one[1]]
    name, other, number = changed[0]
    return (
        f"The classes of {printable(subject)} are matched to those of the model {how}, for example "
        f"{quoted(name)} to class {number}, {quoted(other)}."
    )
