"""Profiles: the scale of a study, in a TOML file."""

import importlib.resources
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from demur.errors import DemurError, unknown
from demur.untrusted import parse_toml, read_text


def load_profile(study: ModuleType, profile: str) -> Any:
    """Read the TOML of a profile into the settings of a study.

    Parameters
    ----------
    study : module
        With the class `Profile`, and the profiles that come along beside it.
    profile : str
        A name, or a path that ends in .toml.

    Raises
    ------
    DemurError
        If the name is unknown, the file is no TOML, or settings do not fit: all of them are named.
    """
    if profile.endswith(".toml"):
        path: Any = Path(profile)
    else:
        folder = importlib.resources.files(study)
        known = sorted(
            entry.name.removesuffix(".toml")
            for entry in folder.iterdir()
            if entry.name.endswith(".toml")
        )
        if profile not in known:
            raise unknown("profile", profile, known)
        path = folder / f"{profile}.toml"
    settings: type[BaseModel] = study.Profile
    try:
        given = isinstance(path, Path)
        text = read_text(path) if given else path.read_text(encoding="utf-8")
        return settings.model_validate(parse_toml(text, f"profile {profile}"))
    except ValidationError as error:
        raise DemurError(f"profile {profile}: {_faults(error, settings)}.") from error


def _faults(error: ValidationError, settings: type[BaseModel]) -> str:
    """Say all that does not fit, unknown keys first: a misspelt one is also missing."""
    unknown_keys, others = [], []
    faults = error.errors(include_url=False)
    for fault in faults:
        place = ".".join(
            str(part)
            for part in fault["loc"]
            if str(part) != "str" and not str(part).startswith("tuple[")
        )
        inside = any(
            other["loc"][: len(fault["loc"])] == fault["loc"] != other["loc"] for other in faults
        )
        if fault["type"] == "too_short" and inside:
            continue  # of a list, what does not fit is left out first, and then it may be too short
        if fault["type"] == "extra_forbidden":
            near = get_close_matches(str(fault["loc"][-1]), _keys(settings, fault["loc"][:-1]), n=1)
            unknown_keys.append(
                f"{place}: there is no such key" + (f" (did you mean {near[0]!r}?)" if near else "")
            )
        elif fault["type"] == "missing":
            others.append(f"{place}: it is missing")
        else:
            said = (
                fault["msg"]
                .removeprefix("Value error, ")
                .replace("a valid tuple", "a list")
                .replace("Tuple should", "it should")
                .removesuffix(".")  # the caller ends the sentence
            )
            others.append(f"{place}: {said}" if place else said)
    return "; ".join(dict.fromkeys([*unknown_keys, *others]))


def _keys(settings: type[BaseModel], place: tuple[int | str, ...]) -> list[str]:
    """The keys that a profile may have at that place."""
    for part in (part for part in place if isinstance(part, str)):
        inner = settings.model_fields[part].annotation
        inner = next(
            (
                kind
                for kind in get_args(inner)
                if isinstance(kind, type) and issubclass(kind, BaseModel)
            ),
            inner,
        )
        assert isinstance(inner, type) and issubclass(inner, BaseModel)
        settings = inner
    return list(settings.model_fields)
