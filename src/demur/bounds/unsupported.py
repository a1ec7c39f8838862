"""The error for a layer that has no bounds."""

from demur.errors import DemurError


class UnsupportedLayerError(DemurError):
    """A module or operation has no sound bounds, so nothing is proven about the network.

    Parameters
    ----------
    layer : str
        Path of the module, or "the model itself".
    reason : str
        The operation that has no bounds.

    Attributes
    ----------
    layer : str
    reason : str

    Examples
    --------
    >>> UnsupportedLayerError("features.3", "the operation gelu")
    UnsupportedLayerError('features.3: the operation gelu has no bounds.')
    """

    def __init__(self, layer: str, reason: str) -> None:
        super().__init__(f"{layer}: {reason} has no bounds.")
        self.layer = layer
        self.reason = reason
