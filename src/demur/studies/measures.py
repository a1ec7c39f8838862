"""Recipes and measurements that several studies may use."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from demur import networks
from demur.classifier import REJECT, Classifier
from demur.data import to_float
from demur.evaluation.curves import offset_for
from demur.evaluation.scoring import Row, TrainingInputs
from demur.metrics import wilson_interval


@dataclass(frozen=True)
class FalseRejectionRate:
    """Set the threshold of the base model, on the clean images of the node (a recipe).

    Parameters
    ----------
    rate : float
        Largest share of these images that is rejected, in [0, 1).
    """

    rate: float

    def train(self, given: TrainingInputs) -> Classifier:
        """Set it; see `demur.evaluation.scoring.Recipe`."""
        assert given.base is not None
        model = given.base.to(torch.device(given.device))
        model.set_threshold(offset_for(model, given.data.to_float(), self.rate))
        return model


@dataclass(frozen=True)
class WithoutReject:
    """Take the reject output away from a base model whose network has it (a recipe).

    The scores of the classes do not change.
    """

    def train(self, given: TrainingInputs) -> Classifier:
        """Take it away; see `demur.evaluation.scoring.Recipe`."""
        assert given.base is not None
        classes = given.base.num_classes
        described: Any = given.base.module.architecture
        arguments = {**described["arguments"], "num_outputs": classes}
        network = networks.build({**described, "arguments": arguments})
        whole = given.base.module.state_dict()
        own = network.state_dict().items()
        # Only the last layers are larger: by the reject output.
        network.load_state_dict(
            {name: whole[name][: len(one)] if one.ndim else whole[name] for name, one in own}
        )
        return Classifier(network, classes)


def rejected(model: Classifier, *kinds: tuple[str, Tensor]) -> list[Row]:
    """Measure the share of rejected images (n, C, H, W), uint8, of each kind (for a `Measure`)."""
    rows = []
    for kind, images in kinds:
        count = int((model.predict(to_float(images)) == REJECT).sum())
        low, high = wilson_interval(count, len(images))
        rows.append(Row(kind, count / len(images), len(images), low, high))
    return rows
