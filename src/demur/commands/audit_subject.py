"""What an audit is made of: the model, the images, and the handshake between them."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

from demur.classifier import Classifier, Preprocess, check_counts
from demur.commands import audit_images
from demur.commands.audit_models import code_of, target_of, unseen
from demur.data import ImageSource, split_by_hash
from demur.data.images import to_float
from demur.defenses import ConfidenceThreshold
from demur.defenses.confidence_threshold import check_rate
from demur.errors import DemurError
from demur.evaluation.audit_plan import Target
from demur.evaluation.audit_tests import First
from demur.evaluation.handshake import Handshake, handshake
from demur.evaluation.handshake.accuracy import expected_accuracy
from demur.evaluation.handshake.logarithms import are_probabilities, with_logarithms
from demur.files import digest
from demur.loading import LoadedModel, PreprocessOverrides, fingerprint_of, read_model, wrap
from demur.loading.wrapping import SizeUnknownError
from demur.progress import job

HELD_OUT: Final = 1 / 3
SOME: Final = 16
CALIBRATED_AT_ONCE: Final = 64
RATE: Final = 0.02
LUCK: Final = 1.5
"""A model whose accuracy is below so many times that of guessing gets no verdict \"sound\"."""


@dataclass(frozen=True)
class Rejection:
    """The rejection that is given to a model that has none; see `demur.audit`."""

    score: str | None = None
    threshold: float | None = None
    false_rejection_rate: float | None = None

    def __post_init__(self) -> None:
        if self.score is None and (self.threshold, self.false_rejection_rate) != (None, None):
            raise DemurError("a threshold of rejection needs --reject-score.")
        if self.threshold is not None and self.false_rejection_rate is not None:
            raise DemurError("give a reject threshold or a false rejection rate, not both.")
        if self.false_rejection_rate is not None:
            check_rate(self.false_rejection_rate)
        if self.score is not None:  # an unknown score or a wrong threshold is an error
            kind: Any = self.score
            ConfidenceThreshold(nn.Flatten(), 2, score=kind, threshold=self.threshold)


@dataclass(frozen=True, eq=False)
class Subject:
    """The model and images of an audit, ready to be attacked.

    Parameters
    ----------
    classifier : Classifier
    target : Target
    images : ImageSource
    sample, sample_labels : Tensor of shape (n, C, H, W) and (n,)
        The images of the handshake; `first` has the first decision on each.
    handshake : Handshake
    name, source, data_source : str
    fingerprint, base_fingerprint : str
    notes : tuple of str
    """

    classifier: Classifier
    target: Target
    images: ImageSource
    sample: Tensor
    sample_labels: Tensor
    first: First
    handshake: Handshake
    name: str
    source: str
    data_source: str
    fingerprint: str
    base_fingerprint: str
    notes: tuple[str, ...]

    @property
    def guesses(self) -> bool:
        """Whether the clean accuracy is hardly above that of guessing."""
        return self.handshake.accuracy < LUCK / self.classifier.num_classes

    @property
    def gradients(self) -> bool:
        """Whether the model has gradients."""
        return self.handshake.gradients_per_second > 0


def prepare(
    model: str | Path | nn.Module,
    data: str | Path | ImageSource | tuple[Tensor, Tensor],
    *,
    base_model: str | Path | nn.Module | None,
    num_samples: int | None,
    seed: int,
    batch_size: int | None,
    device: str,
    reject: Rejection,
    expect_accuracy: str | None,
    model_options: Mapping[str, Any],
    data_options: Mapping[str, Any],
    ready: Callable[[ImageSource], None],
) -> Subject:
    """Read the model and the images, call `ready`, and run the handshake; see `demur.audit`."""

    # What is wrong with the request is said before weights are downloaded.
    check_counts(
        num_samples=1 if num_samples is None else num_samples,
        batch_size=1 if batch_size is None else batch_size,
    )
    if expect_accuracy is not None:
        expected_accuracy(expect_accuracy)
    content = audit_images.find(data, data_options)
    shape = partial(audit_images.image_shape_of, content)
    loaded = load(model, {**shape_of(model, data), **model_options}, shape)
    classifier = loaded.classifier
    images = audit_images.images_for(content, classifier)
    with audit_images.all_named(content):
        images, left_out = unseen(images, classifier)
    notes = [*loaded.notes, *images.notes, *left_out]
    fingerprint = loaded.fingerprint
    if reject.score is not None:
        classifier, said = _without_probabilities(classifier, images, seed)
        notes += said
        classifier, images, note = _rejecting(classifier, images, reject, seed, device, batch_size)
        notes.append(note)
        fingerprint = digest(fingerprint, fingerprint_of(classifier))
    if num_samples is not None:
        images = images.sample(num_samples, seed)
    audit_images.check_readable(images)
    base = None
    if base_model is not None:
        # It gets the images of the audit, whatever the size of the files.
        base = load(base_model, shape_of(base_model, images), lambda: images.image_shape)
    if base is not None and base.classifier.num_classes != classifier.num_classes:
        raise DemurError(
            f"the base model has {base.classifier.num_classes} classes, "
            f"the model {classifier.num_classes}."
        )
    ready(images)
    sample = audit_images.sample_of(images, seed)
    shown = to_float(sample.read(slice(0, len(sample))))
    with job("handshake", 1) as progress:
        shake = handshake(
            classifier,
            shown,
            sample.labels,
            class_names=images.class_names,
            batch_size=batch_size,
            device=device,
            seed=seed,
            expect_accuracy=expect_accuracy,
        )
        progress.advance(1, "handshake")
    classifier = shake.classifier
    fingerprint = digest(fingerprint, code_of(classifier), str(shake.randomised))
    if base is not None:
        _try_out(base, shown)
    name = _name(model)
    return Subject(
        classifier=classifier,
        target=target_of(classifier, images, shake, name, fingerprint, base),
        images=images,
        sample=shown,
        sample_labels=sample.labels,
        first=First(sample, shake.decisions),
        handshake=shake,
        name=name,
        source=loaded.source,
        data_source=audit_images.described(data),
        fingerprint=fingerprint,
        base_fingerprint="" if base is None else base.fingerprint,
        notes=tuple(notes),
    )


def load(
    model: str | Path | nn.Module, options: Mapping[str, Any], shape: Callable[[], tuple[int, ...]]
) -> LoadedModel:
    """Load a model; its number of classes may have to be tried on an image of the data's shape."""
    try:
        return _read(model, options)
    except SizeUnknownError:
        channels, height, width = shape()
    chosen: Any = options.get("preprocess") or PreprocessOverrides()
    if isinstance(chosen, PreprocessOverrides):
        chosen = replace(chosen, img_size=(height, width))
    whole = Preprocess(size=(height, width), channels=channels)
    if isinstance(model, nn.Module):
        return _read(model, {**options, "preprocess": whole})
    try:
        return _read(model, {**options, "preprocess": chosen})
    except DemurError:
        if "preprocess" in options:
            raise
    return _read(model, {**options, "preprocess": whole})


def _read(model: str | Path | nn.Module, options: Mapping[str, Any]) -> LoadedModel:
    if not isinstance(model, nn.Module):
        return read_model(model, **options)
    classifier = wrap(model, **options)
    kind = type(model).__name__
    return LoadedModel(classifier, f"a {kind} in Python", fingerprint_of(classifier), ())


def shape_of(model: object, data: object) -> dict[str, Any]:
    """Give the size of images in memory to a bare module: its number of classes is tried on it."""
    if not isinstance(model, nn.Module) or isinstance(model, Classifier):
        return {}
    images = data[0] if isinstance(data, tuple) and data else data
    shape: tuple[int, ...] = tuple(getattr(images, "image_shape", ()))
    if isinstance(images, Tensor):
        shape = tuple(images.shape[1:])
    if len(shape) != 3 or shape[0] not in (1, 3):
        return {}
    return {"preprocess": Preprocess(size=(shape[1], shape[2]), channels=shape[0])}


def _without_probabilities(
    classifier: Classifier, images: ImageSource, seed: int
) -> tuple[Classifier, list[str]]:
    """Replace probabilities by their logarithms: a score of rejection is computed from logits."""
    sample = images.sample(SOME, seed)
    scores = classifier.scores(to_float(sample.read(slice(0, len(sample)))), SOME)
    if not are_probabilities(scores, classifier.num_classes):
        return classifier, []
    return with_logarithms(classifier), ["The scores are probabilities; their logarithms are used."]


def _rejecting(
    classifier: Classifier,
    images: ImageSource,
    reject: Rejection,
    seed: int,
    device: str,
    batch_size: int | None,
) -> tuple[Classifier, ImageSource, str]:
    """Give a rejection to a model; where held-out images set it, they are left out."""
    kind: Any = reject.score
    if reject.threshold is not None:
        defended = ConfidenceThreshold(
            classifier, classifier.num_classes, score=kind, threshold=reject.threshold
        )
        return defended, images, f"Rejected: {kind} below {reject.threshold:g}."
    rate = RATE if reject.false_rejection_rate is None else reject.false_rejection_rate
    held_out, rest = split_by_hash(images, (HELD_OUT, 1 - HELD_OUT), seed)
    defended = ConfidenceThreshold(classifier, classifier.num_classes, score=kind)
    defended.to(device)
    chosen = held_out.sample(5000, seed)
    size = batch_size or CALIBRATED_AT_ONCE
    pairs = (
        (chosen.read(slice(start, start + size)), chosen.labels[start : start + size])
        for start in range(0, len(chosen), size)
    )
    defended.fit(pairs, false_rejection_rate=rate, batch_size=size)
    realised = 100 * (defended.false_rejection_rate_ or 0)
    said = (
        f"{len(chosen):,} held-out images, which are not audited, set the threshold of {kind} to "
        f"{defended.threshold:.4g}: {realised:.3g} % of them are rejected, where {100 * rate:g} % "
        "were asked for."
    )
    return defended, rest, said


def normalisation(classifier: Classifier) -> dict[str, list[float]]:
    """Give mean and std inside a model, for pixels in [0, 1]; empty where there are none."""
    known = classifier.preprocess
    if known is None or not known.mean:
        return {}
    return {"mean": list(known.mean), "std": list(known.std)}


def _try_out(base: LoadedModel, images: Tensor) -> None:
    """Raise DemurError if the base model does not take the images."""
    try:
        base.classifier.scores(images[:2])
    except RuntimeError as error:
        said = " ".join(str(error).split())[:200]
        raise DemurError(
            f"the base model {base.source} does not take images of shape "
            f"{tuple(images.shape[1:])}: {said}"
        ) from error


def _name(model: str | Path | nn.Module) -> str:
    """Give a short name of the model, which also names the folder of the audit."""
    if isinstance(model, nn.Module):
        return type(model).__name__
    text = str(model)
    last = text.split(":")[-1].split("@")[0] if ":" in text else Path(text).name or "model"
    if text.startswith("py:"):
        place, _, factory = text.removeprefix("py:").rpartition(":")
        last = f"{Path(place).stem}-{factory}"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last.removesuffix(".safetensors")) or "model"


def default_folder(model: str | Path) -> Path:
    """Give the folder of an audit that none was named for."""
    return Path("runs") / f"audit-{_name(model)}"
