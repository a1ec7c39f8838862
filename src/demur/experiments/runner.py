"""Carry out an experiment: its profile, its folder, its results file."""

import importlib.resources
import platform
import tomllib
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import torch
from pydantic import BaseModel, ValidationError

from demur.errors import DemurError, unknown
from demur.evaluation import Ledger
from demur.experiments import background_class, localized_training, neural_rejection, smoothing, together
from demur.experiments.cells import Run, versions
from demur.experiments.results import Cost, Results, write
from demur.files import canonical_json, write_text, writing
from demur.hardware import pick_device
from demur.progress import job, message

EXPERIMENTS: dict[str, ModuleType] = {
    "background-class": background_class,
    "localized-training": localized_training,
    "neural-rejection": neural_rejection,
    "smoothing": smoothing,
    "together": together,
}
"""Each has TITLE, SOURCE, Profile (a pydantic model), and `prepare`, `work` and `carry_out`, as background_class has them."""


def run(
    experiment: str,
    profile: str = "demo",
    *,
    data_root: Path | None = None,
    out: Path | None = None,
    device: str = "auto",
    seed: int = 0,
) -> Path:
    """Carry out an experiment, resuming what is there, and give the folder with its `results.json`.

    Args:
        experiment: a name of EXPERIMENTS.
        profile: `demo`, `desk` or `paper`: scales that differ only in their TOML file; or the path of such a file.
        data_root: where data sets lie; else DEMUR_DATA, else a cache folder.
        out: the run's folder; else runs/EXPERIMENT-PROFILE.
        device: `auto`, `cpu` or `cuda`.
        seed: of everything that is drawn.

    Raises: DemurError for an unknown name, a negative seed, a profile that does not fit, data that is not there, no GPU where one is
        asked for, or a folder that cannot be written or holds another run.
    """
    if seed < 0:
        raise DemurError(f"the seed is a whole number from 0 up, not {seed}.")
    if experiment not in EXPERIMENTS:
        raise unknown("experiment", experiment, EXPERIMENTS)
    module = EXPERIMENTS[experiment]
    settings = load_profile(experiment, profile)
    chosen = pick_device(device)
    folder = out or Path("runs") / f"{experiment}-{Path(profile).stem}"
    material = module.prepare(settings, data_root, seed)
    identity = {"experiment": experiment, "profile": settings.model_dump(mode="json"), "seed": seed, "data": material.fingerprint}
    _claim(folder, identity)
    message(material.taken)
    with job(module.TITLE, module.work(settings, material)) as progress:
        current = Run(Ledger(folder / "cells"), chosen.type, seed, progress)
        tables, curves, summary, warnings = module.carry_out(settings, material, current, folder)
    results = Results(
        schema=1,
        experiment=experiment,
        title=module.TITLE,
        profile=profile,
        source=module.SOURCE,
        summary=summary,
        seed=seed,
        config=settings.model_dump(mode="json"),
        versions=versions(),
        device=_describe(chosen),
        device_asked=device,
        data=material.description,
        tables=tables,
        curves=curves,
        cost=Cost(round(sum(cost.seconds for cost in current.costs), 3), current.costs),
        warnings=warnings,
    )
    write(results, folder)
    return folder


def load_profile(experiment: str, profile: str) -> Any:
    """Read a profile's TOML, by its name or path, into the experiment's settings.

    Raises: DemurError for an unknown name, a file that is no TOML, or settings that do not fit, naming all that do not.
    """
    if profile.endswith(".toml"):
        path: Any = Path(profile)
    else:
        folder = importlib.resources.files(EXPERIMENTS[experiment])
        known = sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))
        if profile not in known:
            raise unknown("profile", profile, known)
        path = folder / f"{profile}.toml"
    settings: type[BaseModel] = EXPERIMENTS[experiment].Profile
    try:
        return settings.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise DemurError(f"profile {profile}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DemurError(f"profile {profile} is not TOML: {error}.") from error
    except ValidationError as error:
        raise DemurError(f"profile {profile}: {_faults(error, settings)}.") from error


def _faults(error: ValidationError, settings: type[BaseModel]) -> str:
    """Say all that does not fit, unknown keys first: a misspelt one is also missing."""
    unknown_keys, others = [], []
    faults = error.errors(include_url=False)
    for fault in faults:
        place = ".".join(str(part) for part in fault["loc"] if str(part) != "str" and not str(part).startswith("tuple["))
        inside = any(other["loc"][: len(fault["loc"])] == fault["loc"] != other["loc"] for other in faults)
        if fault["type"] == "too_short" and inside:
            continue  # of a list, what does not fit is left out first, and then it may be too short
        if fault["type"] == "extra_forbidden":
            near = get_close_matches(str(fault["loc"][-1]), _keys(settings, fault["loc"][:-1]), n=1)
            unknown_keys.append(f"{place}: there is no such key" + (f" (did you mean {near[0]!r}?)" if near else ""))
        elif fault["type"] == "missing":
            others.append(f"{place}: it is missing")
        else:
            said = fault["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list").replace("Tuple should", "it should")
            others.append(f"{place}: {said}" if place else said)
    return "; ".join(dict.fromkeys([*unknown_keys, *others]))


def _keys(settings: type[BaseModel], place: tuple[int | str, ...]) -> list[str]:
    """The keys that a profile may have at that place."""
    for part in (part for part in place if isinstance(part, str)):
        inner = settings.model_fields[part].annotation
        inner = next((kind for kind in get_args(inner) if isinstance(kind, type) and issubclass(kind, BaseModel)), inner)
        assert isinstance(inner, type) and issubclass(inner, BaseModel)
        settings = inner
    return list(settings.model_fields)


def _claim(folder: Path, identity: dict[str, Any]) -> None:
    """Mark the folder as this run's, or find that it is."""
    mark, text = folder / "run.json", canonical_json(identity)
    with writing(folder):
        if folder.exists() and not folder.is_dir():
            raise DemurError(f"{folder} is a file; --out needs a folder.")
        there = mark.read_text(encoding="utf-8", errors="replace") if mark.exists() else None
        if there is None and folder.exists() and any(folder.iterdir()):
            raise DemurError(f"{folder} is not empty and holds no run. Choose another --out.")
    if there is None:
        write_text(mark, text)
    elif there != text:
        raise DemurError(f"{folder} holds a run with another configuration, data or seed. Choose another --out, or delete that folder.")


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
