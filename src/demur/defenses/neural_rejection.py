"""Neural rejection: RBF machines on one inner layer of a network (Melis et al. 2017).

As in the rejection paper, sec. 2.4.1.
"""

from typing import Any, ClassVar, Literal

from torch import nn

from demur.defenses.deep_neural_rejection import DeepNeuralRejection
from demur.defenses.rejecting_network import Scores


class NeuralRejection(DeepNeuralRejection):
    """A classifier on one inner layer of a network. It rejects if its best score is low.

    Melis et al. 2017.

    Parameters
    ----------
    network, num_classes, C, gamma, threshold, false_rejection_rate, scores, folds, seed
        As for `DeepNeuralRejection`.
    max_features : int, optional
        As for `DeepNeuralRejection`.
    layer : str
        A module path. The paper uses the last layer but one, after its rectifier.

    Examples
    --------
    >>> from demur import data
    >>> from demur.defenses import NeuralRejection
    >>> from torch import nn
    >>> train, test = data.load("digits", "train"), data.load("digits", "test")
    >>> network = nn.Sequential(nn.AvgPool2d(4), nn.Flatten())
    >>> defense = NeuralRejection(network, 10, "1", C=10.0, false_rejection_rate=0.1)
    >>> defense.fit(train.images[:300], train.labels[:300]).predict(test.to_float()[:4]).shape
    torch.Size([4])
    """

    combined: ClassVar[bool] = False

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        layer: str,
        *,
        C: float = 0.1,
        gamma: float | Literal["scale"] = 0.01,
        threshold: float = 0.9,
        false_rejection_rate: float | None = None,
        scores: Scores = "probability",
        folds: int = 5,
        seed: int = 0,
        max_features: int | None = None,
    ) -> None:
        super().__init__(
            network,
            num_classes,
            [layer],
            C=C,
            gamma=gamma,
            threshold=threshold,
            false_rejection_rate=false_rejection_rate,
            scores=scores,
            folds=folds,
            seed=seed,
            max_features=max_features,
        )

    def hyperparameters(self) -> dict[str, Any]:
        """Give the parameters of the constructor besides `network` and `num_classes`, as JSON."""
        return {
            "layer": self.layers[0],
            "C": self.C[0],
            "gamma": self.gamma[0],
            **self._common(),
        }
