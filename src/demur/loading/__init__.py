"""Loading of models: from libraries, the user's own code, weights, and bundles."""

from demur.defenses.saving import save_classifier as save_model
from demur.loading.preprocessing import PreprocessOverrides
from demur.loading.sources import LoadedModel, fingerprint_of, load_model, read_model
from demur.loading.wrapping import wrap

__all__ = [
    "LoadedModel",
    "PreprocessOverrides",
    "fingerprint_of",
    "load_model",
    "read_model",
    "save_model",
    "wrap",
]
