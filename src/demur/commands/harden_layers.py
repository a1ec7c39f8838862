"""The layers that neural rejection reads, where the user names none."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from demur.classifier import Classifier, evaluating
from demur.defenses.descriptions import leaf_of
from demur.errors import DemurError, unknown

ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU),
    *(nn.Mish, nn.Hardswish, nn.Hardtanh, nn.Softplus, nn.Tanh, nn.Sigmoid),
)
WEIGHTED = (nn.Linear, nn.Conv2d, nn.BatchNorm2d, nn.LayerNorm)


def default_layers(network: nn.Module, image: Tensor, count: int) -> list[str]:
    """Name the last activations that a network calls before its scores.

    A layer that is called several times counts by its last call. A network whose activations are no
    modules gives its last weighted layers before the one of the scores.

    Parameters
    ----------
    network : nn.Module
    image : Tensor of shape (1, C, H, W), in [0, 1]
    count : int
        Number of layers; fewer where there are fewer.

    Returns
    -------
    list of str
        In the order of their calls.

    Raises
    ------
    DemurError
        If the network calls no such layer.

    Examples
    --------
    >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> default_layers(network, torch.rand(1, 1, 2, 2), 3)
    ['2']
    """
    called: dict[str, bool] = {}

    def noting(name: str, module: nn.Module) -> Callable[..., None]:
        def hook(*given: object) -> None:
            called.pop(name, None)
            called[name] = isinstance(module, ACTIVATIONS) or _is_activation(module)

        return hook

    handles = [
        module.register_forward_hook(noting(name, module))
        for name, module in network.named_modules()
        if name and not list(module.children())
        if isinstance(module, (*ACTIVATIONS, *WEIGHTED)) or _is_activation(module)
    ]
    try:
        with torch.no_grad(), evaluating(network):
            network(image)
    finally:
        for handle in handles:
            handle.remove()
    found = [name for name, activates in called.items() if activates]
    if not found:
        found = list(called)[:-1]
    if not found:
        raise DemurError(
            "the network calls no activation before its scores: name its layers, "
            "--set layers=NAME,NAME."
        )
    return found[-count:]


def _is_activation(module: nn.Module) -> bool:
    """Whether a module is an activation of another library, such as timm's BatchNormAct2d."""
    return type(module).__name__.lower().endswith(("act", "act2d", "gelu", "silu", "swish", "relu"))


def full_names(classifier: Classifier, names: Sequence[str]) -> list[str]:
    """Give the paths of layers in a classifier, which the user names by their paths in its network.

    Raises
    ------
    DemurError
        If the network has no such layer.
    """
    leaf = leaf_of(classifier)
    prefix = next(name for name, part in classifier.named_modules() if part is leaf)
    known = [name for name, _ in leaf.named_modules() if name]
    for name in names:
        if name not in known:
            raise unknown("layer", name, known)
    return [f"{prefix}.{name}" for name in names]
