"""What a hardened model was made from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Provenance:
    """What a hardened model was made from. A bundle keeps it.

    Parameters
    ----------
    base : str
        The source of the model that was hardened, such as "timm:resnet18".
    base_fingerprint : str
        A digest of its weights and code.
    data : str
        The source of the images.
    data_fingerprint : str
        A digest of all images and labels, the ones for the report included.
    code : str
        A digest of the code of demur that made the model.
    request : mapping
        What was asked for, as JSON: defences, settings, threshold, seed.
    images : tuple of str
        Hashes of the images that the model learned from, or that set a threshold: 16 hexadecimal
        digits each. An audit leaves these images out (R17).

    Examples
    --------
    >>> Provenance("timm:resnet18", "0" * 32, "photos", "1" * 32, "2" * 32).images
    ()
    """

    base: str
    base_fingerprint: str
    data: str
    data_fingerprint: str
    code: str
    request: Mapping[str, Any] = field(default_factory=dict)
    images: tuple[str, ...] = field(default=(), repr=False)
