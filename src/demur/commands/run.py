"""`demur run`: carry out a study at the scale of a profile, and write its results."""

import os
import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch

from demur.errors import unknown
from demur.evaluation.checks import check
from demur.evaluation.code import code_fingerprint
from demur.evaluation.engines import Engine, Local, Ray
from demur.evaluation.folder import claimed
from demur.evaluation.keys import Environment, versions
from demur.evaluation.nodes import Node
from demur.evaluation.pictures import gallery
from demur.evaluation.plan import Outputs, execute
from demur.evaluation.profiles import load_profile
from demur.evaluation.records import write_parquet
from demur.evaluation.results import (
    CellCost,
    Cost,
    Data,
    Results,
    write,
    write_gallery,
)
from demur.evaluation.store import Store
from demur.hardware import pick_device
from demur.progress import message
from demur.seeds import check_seed
from demur.studies import (
    background_class,
    background_extensions,
    certified_rejection,
    comparison,
    defence_transfer,
    localized_training,
    neural_rejection,
    rejection_extensions,
    smoothing,
    smoothing_extensions,
)
from demur.studies.study import Study
from demur.writing import check_writable

STUDIES: dict[str, ModuleType] = {
    "comparison": comparison,
    "certified-rejection": certified_rejection,
    "background-class": background_class,
    "background-extensions": background_extensions,
    "defence-transfer": defence_transfer,
    "localized-training": localized_training,
    "neural-rejection": neural_rejection,
    "rejection-extensions": rejection_extensions,
    "smoothing": smoothing,
    "smoothing-extensions": smoothing_extensions,
}
"""Each has TITLE, SOURCE, Profile and `plan`."""

STORE = "DEMUR_STORE"


def run(
    study: str,
    profile: str = "demo",
    *,
    data_root: Path | None = None,
    out: Path | None = None,
    device: str = "auto",
    seed: int = 0,
    engine: str = "local",
    address: str | None = None,
    store: Path | None = None,
    reuse_stale: bool = False,
) -> Path:
    """Carry out a study, or resume it.

    Parameters
    ----------
    study : str
        A name of `STUDIES`.
    profile : str, default "demo"
        "demo", "desk" or "paper", or the path of a profile (.toml). Profiles differ only in their
        TOML file.
    data_root : Path, optional
        Where data sets lie. Default: DEMUR_DATA, or a cache folder.
    out : Path, optional
        The run's folder. Default: runs/STUDY-PROFILE.
    device : {"auto", "cpu", "cuda"}
    seed : int in 0..2**32-1, default 0
    engine : {"local", "ray"}
        Where tasks run.
    address : str, optional
        Of a Ray cluster.
    store : Path, optional
        The folder of computed results, which runs may share. Default: DEMUR_STORE, or the folder
        demur-store beside the run's folder.
    reuse_stale : bool, default False
        Whether results that earlier code computed are used again.

    Returns
    -------
    Path
        The run's folder, with results.json, records.parquet and measurements.parquet.

    Raises
    ------
    DemurError
        If a name is unknown, the seed is out of range, the profile does not fit, data is missing,
        there is no GPU where one is asked for, or the folder cannot be written, is in use or holds
        another run.
    """
    check_seed(seed)
    if study not in STUDIES:
        raise unknown("study", study, STUDIES)
    if engine not in ("local", "ray"):
        raise unknown("engine", engine, ("local", "ray"))
    module = STUDIES[study]
    settings = load_profile(module, profile)
    chosen = pick_device(device)
    folder = out or Path("runs") / f"{study}-{Path(profile).stem}"
    identity = {"experiment": study, "profile": settings.model_dump(mode="json"), "seed": seed}
    header = Results(
        schema=1,
        experiment=study,
        title=module.TITLE,
        profile=profile,
        seed=seed,
        data=Data(""),
        tables=[],
        source=module.SOURCE,
        config=identity["profile"],
        versions=versions(),
        device=describe_device(chosen),
        device_asked=device,
    )
    planned = module.plan(settings, data_root, seed)
    header = replace(header, code=code_of(study))
    with claimed(folder, {**identity, "data": planned.data.fingerprint}):
        environment = Environment.here(chosen.type)
        place = Store(store or Path(os.environ.get(STORE) or folder.parent / "demur-store"))
        check_writable(place.folder)
        message(planned.taken)

        def compute(nodes: Sequence[Node]) -> Outputs:
            worker: Engine = Ray(environment, address) if engine == "ray" else Local()
            options = {"reuse_stale": reuse_stale, "title": module.TITLE}
            return execute(nodes, place, worker, environment, **options)

        outputs = compute(planned.nodes)
        while planned.then is not None:
            planned = planned.then(outputs)
            outputs = compute(planned.nodes)
        write(_from_records(header, planned, outputs, folder), folder)
    return folder


def code_of(study: str) -> str:
    """Give the fingerprint of the code that the figures of a study depend on."""
    return code_fingerprint([STUDIES[study].plan])


def _from_records(header: Results, study: Study, outputs: Outputs, folder: Path) -> Results:
    """Write records and gallery; make tables, sentences and warnings."""
    records = outputs.records()
    write_parquet(records, folder / "records.parquet")
    write_parquet(outputs.measurements(), folder / "measurements.parquet")
    write_gallery(folder, *gallery(outputs, study.gallery, study.pictures))
    shown = study.show(outputs)
    tables = shown.tables
    warnings = [*(str(finding) for finding in check(records)), *shown.warnings]
    if outputs.stale:
        said = (
            f"{len(outputs.stale)} results were computed by an earlier version of the code "
            "(--reuse-stale)."
        )
        tables = [replace(one, note=f"{one.note} {said}".strip()) for one in tables]
        warnings.insert(0, said)
    return replace(
        header,
        data=study.data,
        tables=tables,
        curves=shown.curves,
        summary=shown.summary,
        cost=_cost(outputs.costs()),
        warnings=warnings,
    )


def _cost(costs: list[CellCost]) -> Cost:
    return Cost(round(sum(cost.seconds for cost in costs), 3), costs)


def describe_device(device: torch.device) -> str:
    """Say what computes, for a report."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
