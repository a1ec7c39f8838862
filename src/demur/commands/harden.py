"""`demur harden`: a better model from a model, with its threshold, as a bundle."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
from torch import Tensor, nn

from demur.classifier import Classifier, modes_kept
from demur.commands.harden_data import Material, read_material
from demur.commands.harden_run import HardenRun
from demur.commands.harden_settings import chosen_steps
from demur.commands.harden_steps import Step
from demur.commands.harden_threshold import ThresholdRule, check_enough
from demur.data import ImageSource
from demur.defenses.saving import state_of
from demur.errors import DemurError
from demur.evaluation.store import Store
from demur.hardware import pick_device
from demur.loading import read_model
from demur.metrics import Rates, clopper_pearson
from demur.seeds import check_seed

DEFAULT_RATE: Final = 0.02


@dataclass(frozen=True)
class HardenResult:
    """A hardened model, and what it is worth on clean images that nothing was fitted on.

    Attributes
    ----------
    classifier : Classifier
        On the CPU, in evaluation mode.
    before, after : Rates
        Counts of the three outcomes of clean images of the report part: of the base, and of the
        hardened model.
    notes : tuple of str
        What was done and found, each a sentence.
    folder : Path or None
        The bundle.
    audit_command : str
        The command that audits the result; empty without a bundle, or if the model or the images
        are in memory.
    """

    classifier: Classifier
    before: Rates
    after: Rates
    notes: tuple[str, ...]
    folder: Path | None
    audit_command: str

    def __str__(self) -> str:
        """Give the summary as sentences."""
        lines = [
            f"{name}: {with_interval(one.correct, one.n)} % correct, "
            f"{with_interval(one.rejected, one.n)} % rejected, "
            f"{with_interval(one.wrong, one.n)} % wrong (n = {one.n})."
            for name, one in (("before", self.before), ("after", self.after))
        ]
        return "\n".join([*lines, *self.notes])


def with_interval(count: int, n: int) -> str:
    """Write a share in per cent with its 95 % Clopper-Pearson interval.

    Examples
    --------
    >>> with_interval(98, 100)
    '98.0 (93.0-99.8)'
    """
    low, high = clopper_pearson(count, n)
    return f"{100 * count / n:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def harden(
    model: str | Path | nn.Module,
    data: str | Path | ImageSource | tuple[Tensor, Tensor],
    with_: Sequence[str],
    *,
    settings: Mapping[str, Any] | None = None,
    background: str | Path | None = None,
    false_rejection_rate: float | None = None,
    max_wrong: float | None = None,
    confidence: float = 0.95,
    num_samples: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    device: str = "auto",
    store: Path | None = None,
    model_options: Mapping[str, Any] | None = None,
    data_options: Mapping[str, Any] | None = None,
) -> HardenResult:
    """Make a better model from a model: add defences, and set the threshold of rejection.

    Parameters
    ----------
    model : str, path or nn.Module
        As for `demur.audit`.
    data : str, path, ImageSource or (images, labels)
        As for `demur.audit`; of named data the training split. Their content splits them: 60 % are
        learned from, 20 % set the threshold, and 20 % are reported on.
    with_ : sequence of str
        Defences, the innermost first: "confidence-threshold", "certified-consistency",
        "neural-rejection", "deep-neural-rejection", "background-class", "adversarial-training",
        "localized-adversarial-training", "gaussian-blur", "median-blur".
    settings : mapping, optional
        Settings by ``KEY`` or ``NAME.KEY``; docs/harden.md lists them with their defaults.
    background : path, optional
        A folder of images of none of the classes, for "background-class". Default: synthetic ones.
    false_rejection_rate : float, optional
        The largest share of held-out images that is rejected. Default: 0.02.
    max_wrong : float, optional
        In place of it: the smallest threshold with which images are wrong and accepted at most at
        this rate, with `confidence`.
    confidence : float, default 0.95
    num_samples : int, optional
        Number of images, drawn with the classes in their proportions. Default: all.
    seed : int, default 0
    out : path, optional
        The folder of the bundle. It appears when it is whole. What is unfinished lies beside it, in
        ``.NAME.harden``; the same call goes on there after a kill.
    device : {"auto", "cpu", "cuda"}
    store : path, optional
        The folder of finished steps. Default: DEMUR_STORE, or inside ``.NAME.harden``.
    model_options, data_options : mapping, optional
        Options of `demur.load_model` and `demur.data.read_images`.

    Returns
    -------
    HardenResult

    Raises
    ------
    DemurError
        If the input does not fit, there are too few held-out images for the threshold, or `out`
        holds something else.

    Examples
    --------
    >>> import demur
    >>> from demur import data, networks, training
    >>> digits = data.load("digits")
    >>> network = networks.localized_network(10)
    >>> _ = training.fit(network, digits.images, digits.labels, epochs=1, batch_size=32)
    >>> found = demur.harden(network, digits, ["confidence-threshold"], num_samples=300)
    >>> found.classifier.rejects
    True
    """
    if max_wrong is not None and false_rejection_rate is not None:
        raise DemurError("give a false rejection rate or max_wrong, not both.")
    rate = DEFAULT_RATE if false_rejection_rate is None else false_rejection_rate
    rule = ThresholdRule(rate, max_wrong, confidence)
    steps = chosen_steps(with_, settings or {})
    check_seed(seed)
    if background is not None and "background-class" not in with_:
        raise DemurError(
            "a background folder is for background-class: add --with background-class."
        )
    place = pick_device(device)
    data_options = dict(data_options or {})
    if _named(data):
        data_options = {"split": "train", **data_options}
    with modes_kept(model):
        material = read_material(
            model,
            data,
            background=background,
            num_samples=num_samples,
            seed=seed,
            model_options=dict(model_options or {}),
            data_options=data_options,
        )
        _check(material, steps, rule)
        named = str(data) if _named(data) else "images in Python"
        run = HardenRun(material, steps, rule, seed, place.type, named)
        if out is None:
            with TemporaryDirectory(prefix="demur-harden-") as folder:
                classifier, notes = run.made(Store(store or Path(folder)))
        else:
            classifier, notes = run.written(Path(out), store)
    command = ""
    if out is not None and _named(data) and _named(model):
        command = _audit_command(Path(out), str(model), str(data), model_options, data_options)
    before = run.rates(material.base.classifier)
    after = run.rates(classifier)
    folder_of = None if out is None else Path(out)
    return HardenResult(classifier, before, after, notes, folder_of, command)


def _check(material: Material, steps: tuple[Step, ...], rule: ThresholdRule) -> None:
    """Raise DemurError for what would fail later, before anything is made."""
    base = material.base.classifier
    state_of(base)  # can it be saved?
    base.scores(material.learn.to_float(torch.arange(1)))  # does it take the images?
    for step in steps:
        step.check(material.learn, base)
    rejects = base.rejects or any(one.rejects for one in steps)
    if rejects:
        check_enough(len(material.held_out), rule)
    elif rule.max_wrong is not None:
        raise DemurError(
            "max_wrong sets a threshold, and this model never rejects: add a defence that does, "
            "for example --with confidence-threshold."
        )


def _named(value: object) -> bool:
    return isinstance(value, str | Path)


def _loads_alone(bundle: Path) -> bool:
    """Whether a bundle describes its network: demur refuses another one for it."""
    try:
        read_model(bundle)
    except DemurError:
        return False
    return True


def _audit_command(
    out: Path,
    model: str,
    data: str,
    model_options: Mapping[str, Any] | None,
    data_options: Mapping[str, Any] | None,
) -> str:
    """Give the command that audits the result."""
    words = ["demur", "audit", str(out), "--data", data]
    options = dict(model_options or {})
    if model.startswith("py:") and not _loads_alone(out):
        words += ["--arch", model]
        for name, value in (options.get("model_kwargs") or {}).items():
            words += ["--model-kwargs", f"{name}={value}"]
    if not options:
        words += ["--base-model", model]
    if root := (data_options or {}).get("root"):
        words += ["--data-root", str(root)]
    return shlex.join(words)
