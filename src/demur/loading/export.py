"""Export of a classifier as one graph, ONNX or torch.export, that is compared with the original."""

import dataclasses
import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

import demur
from demur.classifier import Classifier, decide
from demur.errors import DemurError, one_line, unknown
from demur.seeds import generator
from demur.writing import replacing

FORMATS: Final = ("onnx", "pt2")
PACKAGES: Final = ("onnxruntime", "onnx", "onnxscript")
"""What an export to ONNX needs."""
IMAGES: Final = 256
TOLERANCE: Final = 1e-4
"""Scores differ by at most this much, relative to the largest score where that is above 1."""
AT_ONCE: Final = 32
_OPERATION = re.compile(r"(?:No ONNX function found for|op=')\W*(?:OpOverload\(op=')?([\w.:]+)")


@dataclass(frozen=True)
class Parity:
    """How an exported graph compares with the original.

    Parameters
    ----------
    n : int
        Number of images.
    equal : int
        Images with the same decision.
    difference : float
        The largest difference of a score.
    scale : float
        The largest score, at least 1.
    ties : bool, default False
        Whether decisions differ only where two scores differ by less than rounding changes them.

    Examples
    --------
    >>> Parity(256, 256, 1e-6, 1.0).close
    True
    """

    n: int
    equal: int
    difference: float
    scale: float
    ties: bool = False

    @property
    def close(self) -> bool:
        """Whether all scores are within the tolerance."""
        return self.difference <= TOLERANCE * self.scale

    def __str__(self) -> str:
        tied = " The others lie exactly on the threshold: move it a little." if self.ties else ""
        return (
            f"{self.equal} of {self.n} decisions are equal; scores differ by at most "
            f"{self.difference:.2g} (largest score {self.scale:.3g}).{tied}"
        )


class ParityError(DemurError):
    """The exported graph decides otherwise than the original. It was not written.

    Examples
    --------
    >>> issubclass(ParityError, DemurError)
    True
    """


class _Graph(nn.Module):
    """A classifier whose scores are float32."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.classifier(images)
        return scores.float()


def export(
    classifier: Classifier, path: Path, form: str, shape: tuple[int, int, int], images: Tensor
) -> Parity:
    """Write a classifier as one graph, after a comparison with the original.

    The graph maps float32 images (N, C, H, W) in [0, 1], resized and cropped, to scores (N, K) or
    (N, K + 1): normalisation, filters, network, machines and the reject score are inside. N is
    free. Class names, preprocessing and the rule of decision are metadata of the file.

    Parameters
    ----------
    classifier : Classifier
        On the CPU, in evaluation mode.
    path : Path
        Written completely or not at all.
    form : {"onnx", "pt2"}
    shape : (int, int, int)
        Channels, height and width of an image.
    images : Tensor of shape (n, C, H, W), float in [0, 1]
        For the comparison.

    Returns
    -------
    Parity

    Raises
    ------
    ParityError
        If a decision differs.
    DemurError
        If the format is unknown, a package is missing, or an operation cannot be exported; the
        message names it.
    """
    check_format(form)
    expected = classifier.scores(images, AT_ONCE)
    program = _program(classifier.eval(), shape)
    about = description(classifier, shape)
    with replacing(path) as temporary:
        if form == "onnx":
            _save_onnx(program, temporary, about)
            run = _onnx_session(temporary)
        else:
            _save_pt2(program, temporary, about)
            run = _pt2_module(temporary)
        found = torch.cat([run(part) for part in torch.split(images, AT_ONCE)])
        parity = _compared(expected, found, classifier.num_classes)
        if parity.equal < parity.n:
            raise ParityError(f"the exported graph is not the model, and was not written: {parity}")
    return parity


def check_format(form: str) -> None:
    """Raise DemurError for a format that is unknown, or whose packages are missing."""
    if form not in FORMATS:
        raise unknown("format", form, FORMATS)
    for name in PACKAGES if form == "onnx" else ():
        _package(name)


def description(classifier: Classifier, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Give the metadata of an exported file, as JSON."""
    preprocess = classifier.preprocess
    provenance = classifier.provenance
    return {
        "demur": demur.__version__,
        "input": f"float32 (N, {shape[0]}, {shape[1]}, {shape[2]}), pixels in [0, 1]",
        "num_classes": classifier.num_classes,
        "class_names": None if classifier.class_names is None else list(classifier.class_names),
        "rejects": classifier.rejects,
        "decision": "the column with the largest score; column num_classes, if any, is a rejection",
        "preprocess": None if preprocess is None else dataclasses.asdict(preprocess),
        "normalisation": "inside the graph",
        "base": None if provenance is None else provenance.base,
        "base_fingerprint": None if provenance is None else provenance.base_fingerprint,
    }


def parity_images(shape: tuple[int, int, int], n: int = IMAGES, seed: int = 0) -> Tensor:
    """Make images of noise and of smooth blobs, in several contrasts, to compare two models on.

    Examples
    --------
    >>> parity_images((1, 8, 8), 4).shape
    torch.Size([4, 1, 8, 8])
    """
    draw = generator(seed, "parity")
    channels, height, width = shape
    found = []
    for number in range(n):
        side = (height, width) if number % 4 == 0 else (2 + number % 7, 2 + number % 5)
        image = torch.rand(1, channels, *side, generator=draw)
        image = nn.functional.interpolate(image, (height, width), mode="bilinear")
        contrast = float(torch.rand((), generator=draw))
        found.append((0.5 + (image - 0.5) * (0.2 + 1.8 * contrast)).clamp(0, 1))
    return torch.cat(found)


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise DemurError(
            f"an export to ONNX needs the package {name}: pip install 'demur[export]'."
        ) from error


@contextmanager
def _naming_operations(form: str) -> Iterator[None]:
    """Turn an error of an exporter into one line that names the operation. Nothing is printed."""
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    except DemurError:
        raise
    except Exception as error:  # an exporter can fail with any error
        named = next(filter(None, map(_OPERATION.search, map(str, _causes(error)))), None)
        if named is not None:
            said = f"it has no operation {one_line(named[1], 80)}"
        else:
            reason = next(iter(str(error).strip().splitlines()), "")
            said = f"{type(error).__name__}: {one_line(reason, 200).rstrip('.')}"
        raise DemurError(f"{form} cannot hold this model: {said}.") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _program(classifier: Classifier, shape: tuple[int, int, int]) -> Any:
    """Trace the classifier for any number of images."""
    batch = torch.export.Dim("batch", min=1)
    example = torch.rand(3, *shape, generator=generator(0, "export"))
    with _naming_operations("torch.export"), torch.no_grad():
        return torch.export.export(
            _Graph(classifier), (example,), dynamic_shapes=({0: batch},), strict=False
        )


def _save_onnx(program: Any, path: Path, about: dict[str, Any]) -> None:
    with _naming_operations("ONNX"), torch.no_grad():
        graph: Any = torch.onnx.export(
            program,
            input_names=["images"],
            output_names=["scores"],
            dynamo=True,
            verbose=False,
        )
        for name, value in about.items():
            graph.model.metadata_props[name] = value if isinstance(value, str) else _text(value)
    graph.save(path)


def _text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _onnx_session(path: Path) -> Callable[[Tensor], Tensor]:
    runtime = _package("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    with _naming_operations("onnxruntime"):
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["scores"], {"images": images.numpy()})[0])

    return run


def _save_pt2(program: Any, path: Path, about: dict[str, Any]) -> None:
    with _naming_operations("torch.export"):
        torch.export.save(program, path, extra_files={"demur.json": _text(about)})


def _pt2_module(path: Path) -> Callable[[Tensor], Tensor]:
    with _naming_operations("torch.export"):
        module = torch.export.load(path).module()

    def run(images: Tensor) -> Tensor:
        with torch.no_grad():
            scores: Tensor = module(images)
        return scores

    return run


def _compared(expected: Tensor, found: Tensor, num_classes: int) -> Parity:
    if found.shape != expected.shape or not bool(torch.isfinite(found).all()):
        raise ParityError(f"the exported graph gives {tuple(found.shape)} scores, or no numbers.")
    same = decide(expected, num_classes) == decide(found, num_classes)
    difference = float((expected - found).abs().max())
    scale = max(1.0, float(expected.abs().max()))
    best = expected.topk(2, 1).values
    near = best[~same, 0] - best[~same, 1] <= 2 * min(difference, TOLERANCE)
    ties = not bool(same.all()) and bool(near.all())
    return Parity(len(expected), int(same.sum()), difference, scale, ties)
