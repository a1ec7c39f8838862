"""The points of a handshake in their order."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from demur import seeds
from demur.attacks.frozen import frozen
from demur.classifier import (
    Classifier,
    check_classifier,
    check_counts,
    decide,
    is_out_of_memory,
)
from demur.errors import DemurError
from demur.evaluation.handshake import answers, inputs
from demur.evaluation.handshake.accuracy import check_accuracy, expected_accuracy
from demur.evaluation.handshake.errors import check_answer
from demur.evaluation.handshake.lines import HandshakeError, Line, Sample
from demur.evaluation.handshake.running import TOO_LARGE, OutOfMemoryError, Runner
from demur.hardware import tuned


@dataclass(frozen=True)
class Handshake:
    """What a handshake found.

    Parameters
    ----------
    lines : tuple of Line
    classifier : Classifier
        The one to attack. Where scores are probabilities, its scores are their logarithms.
    batch_size : int
        The given one, halved until a forward and a backward pass fit into memory.
    randomised : bool
        Whether equal passes give different scores.
    accuracy : float
        The share of the images that is answered correctly and accepted.
    images_per_second, gradients_per_second : float
        Of forward passes, and of forward and backward passes; 0 if there are no gradients.
    suspicious : tuple of str
        Operations without useful gradients; see `suspicious_operations`.
    decisions : tuple of int
        The first decision on each image; -1 is a rejection.
    """

    lines: tuple[Line, ...]
    classifier: Classifier
    batch_size: int
    randomised: bool
    accuracy: float
    images_per_second: float
    gradients_per_second: float
    suspicious: tuple[str, ...]
    decisions: tuple[int, ...] = ()


def handshake(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    class_names: Sequence[str] | None = None,
    batch_size: int | None = None,
    device: str = "cpu",
    seed: int = 0,
    expect_accuracy: str | None = None,
) -> Handshake:
    """Find out whether a model and images fit together, before any attack.

    Parameters
    ----------
    classifier : Classifier
        It is moved to the device, and used in evaluation mode.
    images : Tensor of shape (n, C, H, W), float in [0, 1]
        A sample of the data; 256 images are enough.
    labels : Tensor of shape (n,), integers in 0..num_classes-1
    class_names : sequence of str, optional
        The names of the data's classes.
    batch_size : int, optional
        Default: at most 128, so that a batch has at most 5 million values.
    device : str, default "cpu"
    seed : int, default 0
        Of the draws of a randomised model.
    expect_accuracy : str, optional
        A share and its tolerance, such as "0.76+-0.02". An accuracy that is outside fails. One that
        is inside turns doubts about labels and normalisation into notes.

    Returns
    -------
    Handshake

    Raises
    ------
    HandshakeError
        A DemurError, if an audit of this model on these images would be pointless.

    Examples
    --------
    >>> import torch
    >>> from demur import Classifier
    >>> from demur.evaluation.handshake import handshake
    >>> images = torch.eye(4).view(4, 1, 2, 2)
    >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Softmax(1))
    >>> found = handshake(Classifier(network.eval(), 4), images, torch.arange(4))
    >>> found.accuracy, found.randomised, found.suspicious
    (1.0, False, ())
    >>> [line.name for line in found.lines if line.state == "note"]  # probabilities
    ['scores']
    """
    if torch.is_inference_mode_enabled():
        raise DemurError("leave torch.inference_mode: a handshake needs gradients.")
    check_classifier(classifier)
    expected = None if expect_accuracy is None else expected_accuracy(expect_accuracy)
    place = torch.device(device)
    meeting = _Meeting()
    with meeting.point("pixels"):
        meeting.say(inputs.check_pixels(images))
    with meeting.point("labels"):
        meeting.say(inputs.check_labels(labels, len(images), classifier, class_names))
    meeting.say(inputs.check_mode(classifier))
    with meeting.point("device"):
        meeting.say(inputs.move(classifier, place))
    with meeting.point("batch size"):
        check_counts(batch_size=1 if batch_size is None else batch_size)
    sample = Sample(
        classifier,
        images.detach().to("cpu", torch.float32),
        labels.detach().to("cpu", torch.int64),
        place,
        class_names,
    )
    float32 = torch.autocast(place.type, enabled=False)
    with frozen(classifier), tuned(), float32, torch.random.fork_rng():
        torch.manual_seed(seeds.derive(seed, "handshake"))
        return meeting.passes(sample, batch_size, expected)


@dataclass
class _Meeting:
    """A handshake in progress: the lines so far."""

    lines: list[Line] = field(default_factory=list)

    def say(self, line: Line) -> None:
        """Add a line."""
        self.lines.append(line)

    @contextmanager
    def point(self, name: str) -> Iterator[None]:
        """Inside, an error becomes a line of this name, and ends the handshake."""
        text = ""
        cause: Exception | None = None
        try:
            yield
            return
        except DemurError as error:
            text = str(error)
            cause = error
        except (OutOfMemoryError, RuntimeError, MemoryError) as error:
            if not isinstance(error, OutOfMemoryError) and not is_out_of_memory(error):
                raise
            text = "the model and a batch do not fit into memory: give a smaller --batch-size."
            cause = error
        raise HandshakeError([*self.lines, Line(name, "failed", text)]) from cause

    def passes(
        self, sample: Sample, batch_size: int | None, expected: tuple[float, float] | None
    ) -> Handshake:
        """Check everything that needs forward passes."""
        classifier = sample.classifier
        before = sample.images.clone()
        runner = Runner(classifier, sample.device)
        with self.point("scores"):
            self.answer(sample)
        with self.point("batch size"):
            line, size = answers.find_batch_size(sample, runner, batch_size)
            self.say(line)
        with self.point("scores"):
            scores = runner.scores(sample.images, size)
            answers.check_finite(classifier, scores)
            line, attacked = answers.logits(classifier, scores)
            self.say(line)
        with self.point("repeated passes"):
            line, randomised = answers.check_repeated(sample, runner, size)
            self.say(line)
        with self.point("other batches"):
            self.say(answers.check_batches(sample, runner, size, randomised))
        with self.point("clean accuracy"):
            line, accuracy = check_accuracy(sample, runner, scores, size, expected)
            self.say(line)
        attacker = Runner(attacked, sample.device)
        with self.point("gradients"):
            line, differentiable = answers.check_gradients(sample, attacker)
            self.say(line)
        with self.point("throughput"):
            line, *rates = answers.measure(sample, attacker, size, differentiable)
            self.say(line)
        line, suspicious = answers.look_for_operations(sample)
        self.say(line)
        with self.point("pixels"):
            if not torch.equal(before, sample.images):
                raise DemurError(
                    "the model changed the images that it was given: let it clone its input."
                )
        return Handshake(
            tuple(self.lines),
            attacked,
            size,
            randomised,
            accuracy,
            rates[0],
            rates[1],
            suspicious,
            tuple(decide(scores, classifier.num_classes).tolist()),
        )

    def answer(self, sample: Sample) -> None:
        """Score two images, and look at what the module returns and does."""
        try:
            in_place = _in_place(sample, 2)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            try:
                in_place = _in_place(sample, 1)
            except (RuntimeError, MemoryError) as again:
                raise DemurError(TOO_LARGE) from again
        if in_place:
            text = "the model works in place on its input: demur gives it a copy of the images."
            self.say(Line("input", "note", text))
        for line in answers.compare_size(sample):
            self.say(line)


def _in_place(sample: Sample, count: int) -> bool:
    """Score a few images, and say whether the module changes its input."""
    few = sample.images[:count].to(sample.device)
    check_answer(sample.classifier, few)
    return sample.classifier.works_in_place
