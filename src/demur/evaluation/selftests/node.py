"""The node of a self-test: a probe of a model on a few images."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from demur.classifier import Classifier
from demur.data.image_source import ImageSource
from demur.data.images import to_float
from demur.evaluation.nodes import Inputs, ModelNode, Node, Task
from demur.evaluation.store import Computed

AT_ONCE = 128
"""Images of one forward pass, where a node says nothing of it."""


class Probe(Protocol):
    """What a self-test does: a frozen dataclass. Its fields and its code are part of the key."""

    title: ClassVar[str]
    """The names of its rows in the report."""

    def run(
        self, model: Classifier, images: Tensor, labels: Tensor, seed: int, batch_size: int
    ) -> Computed:
        """Ask the model about images (n, C, H, W), float in [0, 1], with labels (n,).

        Returns
        -------
        dict, dict of Tensor
            Values, and tensors with one row for each image.
        """

    def passes(self) -> tuple[float, float]:
        """Count the forward passes without a gradient, and the gradients, for an image."""


@dataclass(frozen=True, eq=False)
class SelfTest(Node):
    """A self-test on a few images.

    Parameters
    ----------
    probe : Probe
    on : ModelNode
    images : ImageSource
    seed : int, default 0
    batch_size : int, optional
    """

    probe: Probe
    on: ModelNode
    images: ImageSource
    seed: int = 0
    batch_size: int | None = None

    def images_of(self, shard: int) -> int:
        """Count the images."""
        return len(self.images)

    def task(self, shard: int, inputs: Inputs) -> Task:
        """Run the probe."""
        arguments = {
            "probe": self.probe,
            "images": self.images.read(slice(0, len(self.images))),
            "labels": self.images.labels,
            "device": inputs.device,
            "seed": self.seed,
            "batch_size": self.batch_size or AT_ONCE,
        }
        return Task(run_probe, arguments, {"model": (inputs.key(self.on), inputs.model(self.on))})

    def kind_of_cost(self) -> str:
        """The probe and the size of the images."""
        return f"{self.probe!r} {self.images.image_shape}"

    def __str__(self) -> str:
        """Name the node for the progress line."""
        return f"self-test: {self.probe.title}"


def run_probe(
    model: Classifier,
    probe: Probe,
    images: Tensor,
    labels: Tensor,
    device: str,
    seed: int,
    batch_size: int,
) -> Computed:
    """Run a probe on images (n, C, H, W), uint8."""
    return probe.run(model.to(device).eval(), to_float(images), labels, seed, batch_size)
