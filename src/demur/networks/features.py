"""Features: the outputs of a network's inner layers."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from demur.errors import DemurError, unknown


class FeatureExtractor(nn.Module):
    """Module that returns the outputs of inner layers of a network.

    Parameters
    ----------
    network : nn.Module
        The network: images (N, C, H, W) to scores.
    layers : sequence of str
        Names of its submodules, as in ``named_modules()``.

    Raises
    ------
    DemurError
        For a name that the network does not have.

    Notes
    -----
    The output of a layer that is called several times is its last one.

    Examples
    --------
    >>> import torch
    >>> from demur.networks import dnr_cnn
    >>> first, second = FeatureExtractor(dnr_cnn(), ["4", "14"])(torch.rand(2, 1, 28, 28))
    >>> second.shape
    torch.Size([2, 200])
    """

    def __init__(self, network: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        modules = dict(network.named_modules())
        for name in layers:
            if not name or name not in modules:
                raise unknown("layer", name, [known for known in modules if known])
        self.network = network
        self.layers = tuple(layers)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute the features of images.

        Parameters
        ----------
        images : Tensor of shape (N, C, H, W)
            The images.

        Returns
        -------
        list of Tensor of shape (N, features)
            The flattened output of each layer, in the order of `layers`.

        Raises
        ------
        DemurError
            If the network does not call one of the layers.
        """
        seen: dict[str, Tensor] = {}
        modules = dict(self.network.named_modules())

        def keep(name: str) -> Callable[[nn.Module, object, Tensor], None]:
            def hook(module: nn.Module, given: object, output: Tensor) -> None:
                seen[name] = output.flatten(1).clone()  # the next layer may work in place

            return hook

        handles = [modules[name].register_forward_hook(keep(name)) for name in self.layers]
        try:
            self.network(images)
        finally:
            for handle in handles:
                handle.remove()
        missing = [name for name in self.layers if name not in seen]
        if missing:
            raise DemurError(f"the network does not call its layer {missing[0]!r}.")
        return [seen[name] for name in self.layers]
