"""`demur audit`: how a model fails under attack, with a verdict on the attacks themselves."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import polars as pl
from torch import Tensor, nn

from demur.classifier import Preprocess, modes_kept
from demur.commands import audit_subject, audit_writing
from demur.commands.audit_run import AuditRun, other_images
from demur.commands.run import STORE, describe_device
from demur.data import ImageSource, read_unlabelled
from demur.errors import DemurError, unknown
from demur.evaluation.audit_plan import (
    profile_named,
)
from demur.evaluation.audit_results import AuditResults, ThreatRow, read
from demur.evaluation.engines import Engine, Local, Ray
from demur.evaluation.folder import claimed, refuse_other
from demur.evaluation.keys import Environment
from demur.evaluation.store import Store
from demur.hardware import pick_device
from demur.progress import message
from demur.report.audit import page, sentences
from demur.report.gallery import read as read_gallery
from demur.seeds import check_seed
from demur.threat import ThreatModel, as_threat
from demur.writing import check_writable

THREAT: Final = "linf:8/255"


@dataclass(frozen=True)
class AuditResult:
    """What an audit found.

    Attributes
    ----------
    results : AuditResults
        The content of results.json: threats, checks, cost.
    records : polars.DataFrame
        A row for each image and attack; see `demur.evaluation.records.SCHEMA`.
    folder : Path
        With results.json, records.parquet, report.html, summary.md and counterexamples/.
    """

    results: AuditResults
    records: pl.DataFrame
    folder: Path
    _temporary: object = field(default=None, repr=False)

    @property
    def verdict(self) -> str:
        """Whether the attacks can be believed: "sound", "doubtful" or "unsound"."""
        return self.results.verdict

    @property
    def table(self) -> pl.DataFrame:
        """The shares of the three outcomes: a row for each threat."""
        rows = [vars(row) | {"by": None} for row in self.results.threats]
        return pl.DataFrame(rows).drop("by")

    def threat(self, threat: str, goal: str = "evade") -> ThreatRow:
        """Give the row of a threat, or of "clean".

        Raises
        ------
        DemurError
            If the audit has no such threat.
        """
        for row in self.results.threats:
            same = row.threat == threat or (
                "clean" not in (row.threat, threat) and as_threat(row.threat) == as_threat(threat)
            )
            if same and (row.goal == goal or threat == "clean"):
                return row
        raise unknown("threat", threat, [row.threat for row in self.results.threats])

    def _repr_html_(self) -> str:
        """Give the page, for notebooks."""
        text = page(self.results, read_gallery(self.folder))
        escaped = text.replace("&", "&amp;").replace('"', "&quot;")
        return f'<iframe srcdoc="{escaped}" style="width:100%;height:60rem;border:0"></iframe>'

    def __str__(self) -> str:
        """Give the findings as sentences."""
        return "\n".join(sentences(self.results))


def audit(
    model: str | Path | nn.Module,
    data: str | Path | ImageSource | tuple[Tensor, Tensor],
    threats: Sequence[ThreatModel | str] = (THREAT,),
    *,
    profile: str = "quick",
    num_samples: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    base_model: str | Path | nn.Module | None = None,
    baseline: Path | str | None = None,
    reject_score: str | None = None,
    reject_threshold: float | None = None,
    false_rejection_rate: float | None = None,
    expect_accuracy: str | None = None,
    max_minutes: float | None = None,
    ood: str | Path | None = None,
    corruptions: bool = False,
    certify: bool = False,
    out: Path | str | None = None,
    device: str = "auto",
    engine: str = "local",
    address: str | None = None,
    store: Path | None = None,
    reuse_stale: bool = False,
    command: str = "",
    model_options: Mapping[str, Any] | None = None,
    data_options: Mapping[str, Any] | None = None,
) -> AuditResult:
    """Measure how a model fails, without and under attack.

    Parameters
    ----------
    model : str, path or nn.Module
        A source of `demur.load_model` such as "torchvision:resnet18" or "py:net.py:make", the
        folder of a bundle, or a module (see `demur.wrap`).
    data : str, path, ImageSource or (images, labels)
        Test images: a source of `demur.data.read_images`, or float images (N, C, H, W) in [0, 1]
        with int64 labels (N,).
    threats : sequence of ThreatModel or str, default ("linf:8/255",)
        Each with the goal `Evade`, without a mask, in another size or norm.
    profile : {"quick", "standard", "thorough"}
        How much is spent: minutes on a CPU, hours, or more.
    num_samples : int, optional
        Number of images, drawn with the classes in their proportions. Default: all.
    seed : int, default 0
    batch_size : int, optional
        Images that are attacked at once. Default: found by the handshake.
    base_model : str, path or nn.Module, optional
        Another model of the same classes: attacks on it are transferred.
    baseline : path, optional
        The folder of an earlier audit, for a paired comparison.
    reject_score : {"max-prob", "margin", "energy"}, optional
        Gives a rejection to a model that has none.
    reject_threshold : float, optional
        Of that score. Without it, a third of the images is held out and sets it.
    false_rejection_rate : float, optional
        The share of held-out images that is rejected. Default: 0.02.
    expect_accuracy : str, optional
        For example "0.76+-0.02": another clean accuracy is an error.
    max_minutes : float, optional
        Parts of the plan are left out until the estimate fits, and no attack begins later. The
        report says what is missing; the same request without the limit goes on.
    ood : str or path, optional
        Images of none of the classes, see `demur.data.read_unlabelled`: the share that the model
        accepts is measured.
    corruptions : bool, default False
        Whether the images are also scored after each of `demur.data.CORRUPTIONS`.
    certify : bool, default False
        Whether images are proven, too, at the threats in Linf and L2 (docs/certificates.md).
    out : path, optional
        The folder of the audit. Default: a temporary folder, which goes with the result.
    device : {"auto", "cpu", "cuda"}
    engine : {"local", "ray"}
    address : str, optional
        Of a Ray cluster.
    store : path, optional
        The folder of computed results. Default: DEMUR_STORE, or `out`/store.
    reuse_stale : bool, default False
        Whether results of earlier code are used again.
    command : str
        What the report says that repeats the audit.
    model_options, data_options : mapping, optional
        Options of `demur.load_model` and `demur.data.read_images`.

    Returns
    -------
    AuditResult

    Raises
    ------
    DemurError
        If the input does not fit, the handshake fails, or `out` holds another audit.

    Examples
    --------
    >>> import demur
    >>> from demur import data, networks, training
    >>> train, test = data.load("digits"), data.load("digits", "test")
    >>> network = networks.background_class_network(10)
    >>> _ = training.fit(network, train.images[:300], train.labels[:300], epochs=2, batch_size=32)
    >>> found = demur.audit(network, test, ["linf:0.1"], num_samples=8)
    >>> found.threat("linf:0.1").n
    8
    """
    chosen = profile_named(profile)
    check_seed(seed)
    if engine not in ("local", "ray"):
        raise unknown("engine", engine, ("local", "ray"))
    wanted = _threats(threats)
    if baseline is not None:
        read(baseline)  # a wrong folder is said before anything is computed
    place = pick_device(device)
    request: dict[str, Any] = {
        "command": "audit",
        "threats": [str(one) for one in wanted],
        "profile": profile,
        "seed": seed,
    }
    if max_minutes is not None and not max_minutes > 0:
        raise DemurError(f"--max-minutes takes a number above 0, not {max_minutes:g}.")
    if ood is not None:
        read_unlabelled(ood, Preprocess(), root=(data_options or {}).get("root"))
    for line in audit_writing.without_eps(wanted):
        message(line)

    def ready(images: ImageSource) -> None:
        """Refuse a folder of another audit before the handshake."""
        if out:
            known = {"data": images.fingerprint, "images": len(images)}
            refuse_other(Path(out), {**request, **known})

    with modes_kept(model, base_model):
        subject = audit_subject.prepare(
            model,
            data,
            base_model=base_model,
            num_samples=num_samples,
            seed=seed,
            batch_size=batch_size,
            device=str(place.type),
            reject=audit_subject.Rejection(reject_score, reject_threshold, false_rejection_rate),
            expect_accuracy=expect_accuracy,
            model_options=dict(model_options or {}),
            data_options=dict(data_options or {}),
            ready=ready,
        )
        others = None if ood is None else other_images(subject, ood, data_options)
        temporary = None if out else TemporaryDirectory(prefix="demur-audit-")
        folder = Path(out) if out else Path(str(temporary and temporary.name))
        identity = {
            **request,
            "model": subject.fingerprint,
            "data": subject.images.fingerprint,
            "images": len(subject.images),
            "base": subject.base_fingerprint,
        }
        if others is not None:
            identity["ood"] = others.fingerprint
        if corruptions:
            identity["corruptions"] = True
        if certify:
            identity["certify"] = True
        with claimed(folder, identity):
            environment = Environment.here(place.type)
            worker: Engine = Ray(environment, address) if engine == "ray" else Local()
            kept = Store(store or Path(os.environ.get(STORE) or folder / "store"))
            check_writable(kept.folder)
            run = AuditRun(subject, wanted, chosen, seed, max_minutes, others, corruptions, certify)
            outputs, seconds = run.execute(kept, worker, environment, reuse_stale)
            about = audit_writing.About(
                profile=profile,
                seed=seed,
                command=command,
                device=describe_device(place),
                estimate=run.estimate,
                seconds=seconds,
                baseline=None if baseline is None else Path(baseline),
            )
            results, records = audit_writing.write(subject, run, outputs, about, folder)
    return AuditResult(results, records, folder, temporary)


def benchmark(
    model: str | Path | nn.Module,
    data: str | Path | ImageSource | tuple[Tensor, Tensor],
    threat: ThreatModel | str = THREAT,
    **options: Any,
) -> ThreatRow:
    """Give the shares of the three outcomes at one threat: an audit in one number.

    The parameters are those of `audit`. `float()` of the result is the robust share: images that
    are not answered wrong and accepted.

    Examples
    --------
    >>> import demur, torch
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    >>> images, labels = torch.rand(8, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    >>> row = demur.benchmark(model, (images, labels), "linf:0.1")
    >>> 0 <= float(row) <= 1
    True
    """
    return audit(model, data, [threat], **options).threat(str(as_threat(threat)))


def _threats(threats: Sequence[ThreatModel | str]) -> list[ThreatModel]:
    if isinstance(threats, str | ThreatModel):
        threats = [threats]
    found = [as_threat(one) for one in threats]
    if not found:
        raise DemurError(f"an audit needs at least one threat, for example {THREAT}.")
    for one in found:
        plain = ThreatModel(one.norm, one.eps)
        if isinstance(one.eps, Tensor) or one != plain:
            raise DemurError(
                "an audit takes threats with one eps, without a mask and with the goal Evade, "
                f"not {one}."
            )
        if one.eps == 0:
            raise DemurError("a threat with eps 0 is the clean image, which is always audited.")
    return found
