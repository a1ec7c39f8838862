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
    max_features : int, optional
        Larger outputs are pooled, see `pooled`. By default they are not.

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

    def __init__(
        self, network: nn.Module, layers: Sequence[str], max_features: int | None = None
    ) -> None:
        super().__init__()
        modules = dict(network.named_modules())
        for name in layers:
            if not name or name not in modules:
                raise unknown("layer", name, [known for known in modules if known])
        self.network = network
        self.layers = tuple(layers)
        self.max_features = max_features

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
                features = pooled(output, self.max_features).flatten(1)
                seen[name] = features.clone()  # the next layer may work in place

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


def pooled(output: Tensor, largest: int | None) -> Tensor:
    """Average the output of a layer over its positions, until it is small enough.

    Windows of k x k positions are averaged, for the smallest k that divides height and width and
    leaves at most `largest` numbers for each image. If there is none, or positions lie in one line
    as in a transformer, the mean over all positions is taken. More channels than `largest` stay.

    Parameters
    ----------
    output : Tensor of shape (N, C, H, W), (N, T, D) or (N, D)
    largest : int, optional
        None leaves the output unchanged.

    Returns
    -------
    Tensor
        (N, C, H / k, W / k), (N, D), or the output.

    Examples
    --------
    >>> import torch
    >>> pooled(torch.rand(2, 8, 14, 14), 400).shape
    torch.Size([2, 8, 7, 7])
    """
    if largest is None or output[:1].numel() <= largest:
        return output
    if output.ndim == 3:
        return output.mean(1)
    if output.ndim != 4:
        return output
    channels, height, width = output.shape[1:]
    for window in range(2, min(height, width)):
        if height % window or width % window:
            continue
        if channels * (height // window) * (width // window) <= largest:
            return nn.functional.avg_pool2d(output, window)
    return output.mean((2, 3))
