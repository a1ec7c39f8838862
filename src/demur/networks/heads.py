"""The head of a network: its last layer, which may get another number of outputs."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from demur.classifier import evaluating
from demur.errors import DemurError

LAYERS = (nn.Linear, nn.Conv2d)


def replace_head(network: nn.Module, head: Mapping[str, Any]) -> None:
    """Give the last layer of a network another number of outputs, in place.

    The first outputs keep their weights. The weights of new outputs are drawn as in a new layer,
    from seed 0.

    Parameters
    ----------
    network : nn.Module
    head : mapping
        ``{"path": str, "outputs": int}``: the layer as in ``network.named_modules()``, an
        ``nn.Linear`` or ``nn.Conv2d``, and its outputs.

    Raises
    ------
    DemurError
        If there is no such layer, or the number is out of range.

    Examples
    --------
    >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> replace_head(network, {"path": "1", "outputs": 4})
    >>> network(torch.rand(2, 1, 2, 2)).shape
    torch.Size([2, 4])
    """
    if not isinstance(head, Mapping) or set(head) != {"path", "outputs"}:
        raise DemurError("a head must be a mapping with the keys path and outputs.")
    path, outputs = head["path"], head["outputs"]
    modules = dict(network.named_modules())
    old = modules.get(path) if isinstance(path, str) and path else None
    if not isinstance(old, LAYERS):
        raise DemurError(f"the network has no last layer {str(path)[:80]!r}.")
    if type(outputs) is not int or not 1 <= outputs <= 1 << 16:
        raise DemurError(f"a head has between 1 and 65,536 outputs, not {str(outputs)[:20]}.")
    with torch.random.fork_rng(devices=[]), torch.device(old.weight.device):
        torch.manual_seed(0)
        new = _like(old, outputs)
    new.to(old.weight.dtype).train(old.training)
    kept = min(outputs, len(old.weight))
    with torch.no_grad():
        new.weight[:kept] = old.weight[:kept]
        if new.bias is not None and old.bias is not None:
            new.bias[:kept] = old.bias[:kept]
    parent, _, name = path.rpartition(".")
    setattr(modules[parent], name, new)


def _like(old: nn.Linear | nn.Conv2d, outputs: int) -> nn.Linear | nn.Conv2d:
    bias = old.bias is not None
    if isinstance(old, nn.Linear):
        return nn.Linear(old.in_features, outputs, bias)
    if old.kernel_size != (1, 1) or old.groups != 1:
        raise DemurError("the last layer is a convolution of more than one pixel.")
    return nn.Conv2d(old.in_channels, outputs, 1, bias=bias)


def find_head(network: nn.Module, image: Tensor, outputs: int) -> str:
    """Find the layer that gives the scores: the last one that is called with so many outputs.

    Parameters
    ----------
    network : nn.Module
    image : Tensor of shape (1, C, H, W)
        As the network takes it.
    outputs : int
        Columns of the scores.

    Returns
    -------
    str
        The path of an ``nn.Linear``, or of an ``nn.Conv2d`` of one pixel.

    Raises
    ------
    DemurError
        If no layer of so many outputs is called.

    Examples
    --------
    >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Linear(3, 3))
    >>> find_head(network, torch.rand(1, 1, 2, 2), 3)
    '2'
    """
    called: list[str] = []

    def noting(name: str) -> Callable[..., None]:
        return lambda *_: called.append(name)

    handles = [
        module.register_forward_hook(noting(name))
        for name, module in network.named_modules()
        if isinstance(module, LAYERS) and len(module.weight) == outputs
    ]
    try:
        with torch.no_grad(), evaluating(network):
            network(image)
    finally:
        for handle in handles:
            handle.remove()
    if not called:
        raise DemurError(
            f"the network has no last layer of {outputs} outputs, to which one could be added: "
            "give a network with one output more than there are classes."
        )
    return called[-1]
