"""`demur demo`: the main job on embedded digits, and the comparison of all defences."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from demur.commands import run as studies
from demur.commands.audit import AuditResult, audit
from demur.commands.demo_setup import (
    ATTACKED_MOST,
    CLEAN_MOST,
    DEFENCES,
    IMAGES,
    RATE,
    THREAT,
    Places,
    commands,
    prepare,
)
from demur.commands.export import export
from demur.commands.gate import gate
from demur.commands.harden import HardenResult, harden, with_interval
from demur.commands.harden_run import FINISHED
from demur.errors import DemurError
from demur.evaluation.audit_results import ThreatRow
from demur.evaluation.records import OUTCOMES
from demur.evaluation.results import JobStep, Measurement, Table
from demur.hardware import pick_device
from demur.progress import job, message
from demur.report import render
from demur.report.compare import MainJob, check_place, compare
from demur.seeds import check_seed

MAIN: Final = "main-job"


def demo(
    out: Path, *, device: str = "auto", seed: int = 0, names: Sequence[str] = ("comparison",)
) -> Path:
    """Carry out the main job and some studies, or resume them; write one front page.

    Parameters
    ----------
    out : Path
        A folder. The main job is in its sub-folder main-job, each study in one of its name.
    device : {"auto", "cpu", "cuda"}
    seed : int, default 0
    names : sequence of str
        Studies, by their names in `demur.commands.run.STUDIES`.

    Returns
    -------
    Path
        The front page.

    Raises
    ------
    DemurError
        If there is no GPU where one is asked for, or the folder cannot be written or holds another
        demo.
    """
    check_seed(seed)
    pick_device(device)
    check_place(out)
    main = main_job(out / MAIN, device=device, seed=seed)
    folders = []
    for number, name in enumerate(names, start=1):
        title = studies.STUDIES[name].TITLE
        message(f"{title} ({number} of {len(names)})" if len(names) > 1 else title)
        folders.append(studies.run(name, "demo", out=out / name, device=device, seed=seed))
        render(folders[-1])
    return compare(folders, out, main)


def main_job(folder: Path, *, device: str = "auto", seed: int = 0) -> MainJob:
    """Train, audit, harden, audit again, gate and export, or resume.

    Parameters
    ----------
    folder : Path
    device : {"auto", "cpu", "cuda"}
    seed : int, default 0

    Returns
    -------
    MainJob
        What the front page shows.

    Raises
    ------
    DemurError
        See `demo`.
    """
    lines = commands(Places(Path(os.path.relpath(folder))), device=device, seed=seed)
    with job("main job", 6) as progress:
        places = prepare(folder, device=device, seed=seed)
        progress.advance(1, "main job: a small network is trained")
        before = _audit(places, seed, device, lines)
        progress.advance(1, "main job: audited")
        hardened = harden(
            places.base,
            places.images,
            DEFENCES,
            false_rejection_rate=RATE,
            seed=seed,
            out=places.safer,
            device=device,
        )
        progress.advance(1, "main job: hardened")
        after = _audit(places, seed, device, lines, again=True)
        progress.advance(1, "main job: audited again")
        words = [gate(one, places.rules).word for one in (places.before, places.after)]
        progress.advance(1, "main job: gated")
        exported = _exported(places.safer, seed)
        progress.advance(1, "main job: exported")
    return MainJob(
        steps=_steps(before, hardened, after, words, exported, lines),
        table=_table(before, after),
        seconds=float(before.results.cost["seconds"]) + float(after.results.cost["seconds"]),
    )


def _audit(
    places: Places, seed: int, device: str, lines: Mapping[str, str], again: bool = False
) -> AuditResult:
    """Audit the network as it is trained; or the hardened one, beside that audit."""
    return audit(
        places.safer if again else places.base,
        places.images,
        [THREAT],
        num_samples=IMAGES,
        seed=seed,
        device=device,
        baseline=places.before if again else None,
        out=places.after if again else places.before,
        command=lines["after" if again else "before"],
    )


def _exported(bundle: Path, seed: int) -> str:
    """Export as ONNX, or as a program of torch where its packages are missing; say what came."""
    found = []
    for form in ("onnx", "pt2"):
        try:
            path, parity = export(bundle, form, seed=seed)
        except DemurError as error:
            found.append(f"No {form} file: {error}")
        else:
            return " ".join([f"{bundle.name}/{path.name}: {parity}", *found])
    return " ".join(found)


def _table(before: AuditResult, after: AuditResult) -> Table:
    """Compare the outcomes with and without an attack."""
    rows = []
    for threat, group in (("clean", "no attack"), (THREAT, f"attacked within {THREAT}")):
        for name, found in (("before", before), ("after", after)):
            rows += _cells(group, name, found.threat(threat))
    note = (
        f"The same {IMAGES} images, before and after hardening. Under attack, the worst outcome of "
        "all attacks of the audit counts for each image."
    )
    return Table("Before and after hardening", rows, note)


def _cells(group: str, name: str, row: ThreatRow) -> list[Measurement]:
    cells = []
    for outcome in OUTCOMES:
        share, low, high = (
            100 * getattr(row, f"{outcome}{side}") for side in ("", "_low", "_high")
        )
        cells.append(
            Measurement(name, outcome, group, "%", measured=share, low=low, high=high, n=row.n)
        )
    coverage = 100 * (1 - row.rejected)
    return [*cells, Measurement(name, "coverage", group, "%", measured=coverage, n=row.n)]


def _steps(
    before: AuditResult,
    hardened: HardenResult,
    after: AuditResult,
    words: Sequence[str],
    exported: str,
    lines: Mapping[str, str],
) -> list[JobStep]:
    """Say what each step found."""
    clean = hardened.after
    kept = (
        f"On {clean.n} images that nothing was fitted on, "
        f"{with_interval(clean.correct, clean.n)} % are correct and "
        f"{with_interval(clean.rejected, clean.n)} % rejected."
    )
    notes = [note for note in hardened.notes if note != FINISHED]
    gated = (
        f"Wrong and accepted: at most {100 * CLEAN_MOST:g} % without an attack, and "
        f"{100 * ATTACKED_MOST:g} % within {THREAT}. The network as it was trained: {words[0]}. "
        f"The hardened one: {words[1]}."
    )
    return [
        JobStep("Train", "A small network learned digits for some seconds."),
        JobStep("Audit", _audited(before), lines["before"], f"{MAIN}/before/report.html"),
        JobStep("Harden", " ".join([kept, *notes]), lines["harden"]),
        JobStep("Audit again", _audited(after), lines["after"], f"{MAIN}/after/report.html"),
        JobStep("Gate", gated, lines["gate"]),
        JobStep("Export", exported, lines["export"]),
    ]


def _audited(found: AuditResult) -> str:
    row = found.threat(THREAT)
    low, high = 100 * row.wrong_low, 100 * row.wrong_high
    text = (
        f"Within {THREAT}, {100 * row.wrong:.1f} % ({low:.1f}-{high:.1f}) of {row.n} images are "
        f"wrong and accepted. Verdict on the attacks: {found.verdict}."
    )
    paired = found.results.baseline
    for one in paired["threats"] if paired else ():
        if one["threat"] == THREAT:
            text += (
                f" Beside the first audit, {one['better']} images are no longer wrong and "
                f"{one['worse']} became wrong (McNemar's exact test: p = {one['p']:.2g})."
            )
    return text
