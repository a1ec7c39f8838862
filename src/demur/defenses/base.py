"""The base class of defences: fitting, saving, and a clear error before fitting."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from demur.classifier import Classifier
from demur.errors import DemurError
from demur.training import Epoch


class Defense(Classifier):
    """A classifier that is trained or wrapped to withstand attacks. The base class of all defences.

    The constructor stores parameters, `fit` learns and returns the defence, and learned state ends
    in an underscore. The progress of `fit` goes to the logger `demur` at level INFO (see
    `demur.progress`). Scores, predictions and attacks raise DemurError before `fit`. Loading a
    `state_dict` does not count as fitting: give `prefit=True` to the constructor, or use `save` and
    `demur.load_model`.

    Attributes
    ----------
    fitted_ : bool
        Whether the defence may be used.
    history_ : list of Epoch
        Loss and accuracy of each epoch, after a `fit` that trains the network.
    """

    kinds: ClassVar[dict[str, type["Defense"]]] = {}
    """All defences by class name, for bundles."""
    places: ClassVar[Mapping[str, str]] = {"network": "module"}
    """The networks that the constructor takes, and the paths of their modules."""

    _remedy: ClassVar[str] = ""
    fitted_: bool
    history_: list[Epoch]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # The tracer of torch.export makes subclasses of all modules: they are no defences.
        traced = any(base.__module__.startswith("torch.fx") for base in cls.__mro__)
        if not cls.__name__.startswith("_") and not traced:
            Defense.kinds[cls.__name__] = cls

    def __init__(
        self, module: nn.Module, num_classes: int, rejects: bool | None = None, *, fitted: bool
    ) -> None:
        super().__init__(module, num_classes, rejects)
        self.fitted_ = fitted

    @property
    def network(self) -> nn.Module:
        """The network that is defended."""
        return self.get_submodule(self.places["network"])

    @abstractmethod
    def fit(self, images: Tensor, labels: Tensor, *args: Any, **options: Any) -> Self:
        """Learn from images (N, C, H, W), uint8 or float in [0, 1], and labels (N,)."""

    def forward(self, images: Tensor) -> Tensor:
        """Compute scores (N, num_classes [+ 1]). Raise DemurError if the defence is not fitted."""
        self._check_fitted()
        return super().forward(images)

    def save(self, folder: Path | str) -> None:
        """Write the fitted defence into a folder, as a bundle.

        A bundle is `config.json` and `weights.safetensors`. `demur.load_model(folder)` reads it.

        Parameters
        ----------
        folder : path
            Created if it does not exist. An older bundle in it is replaced.

        Raises
        ------
        DemurError
            If the defence is not fitted, or the folder cannot be written.
        """
        from demur.defenses.saving import save_classifier

        save_classifier(self, folder)

    def hyperparameters(self) -> dict[str, Any]:
        """Give the parameters of the constructor besides networks and `num_classes`, as JSON."""
        return {}

    def learned(self) -> dict[str, Any]:
        """Give the learned state that is not in `state_dict()`, as JSON."""
        return {}

    @classmethod
    def rebuild(
        cls,
        networks: Mapping[str, Any],
        num_classes: int,
        hyperparameters: Mapping[str, Any],
        learned: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
    ) -> Self:
        """Make a fitted defence from a bundle; `load_model` then loads the weights.

        Parameters
        ----------
        networks : dict of nn.Module
            By their names in `places`.
        num_classes : int
        hyperparameters, learned : dict
            What the methods of these names gave.
        tensors : dict of Tensor
            The `state_dict` of the saved defence.
        """
        build: Any = cls
        defense: Self = build(num_classes=num_classes, **networks, **hyperparameters)
        return defense

    def _check_fitted(self) -> None:
        if not self.fitted_:
            raise DemurError(
                f"{type(self).__name__} is not fitted: call fit(...) first{self._remedy}."
            )

    @contextmanager
    def _fitting(self) -> Iterator[None]:
        """Inside, the defence may be used. Afterwards it is fitted, unless there was an error."""
        before = self.fitted_
        self.fitted_ = True
        try:
            yield
        except BaseException:
            self.fitted_ = before
            raise
