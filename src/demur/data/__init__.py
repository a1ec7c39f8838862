"""Images in: labelled sets, data sets by name or path, and background images."""

from demur.data.background import (
    CandidateRate,
    FitPredict,
    Selection,
    chopped,
    confusing_classes,
    embedded_backgrounds,
    foreign,
    morphs,
    photo_patches,
    with_background,
)
from demur.data.formats import NoSplitError
from demur.data.images import ImageSet, as_floats
from demur.data.photos import Box, Photo, fitted, read_boxes, read_photo, read_photos
from demur.data.sources import CheckResult, SourceStatus, check, counted, data_root, describe, get, load

__all__ = [
    "Box",
    "CandidateRate",
    "CheckResult",
    "FitPredict",
    "ImageSet",
    "NoSplitError",
    "Photo",
    "Selection",
    "SourceStatus",
    "as_floats",
    "check",
    "chopped",
    "confusing_classes",
    "counted",
    "data_root",
    "describe",
    "embedded_backgrounds",
    "fitted",
    "foreign",
    "get",
    "load",
    "morphs",
    "photo_patches",
    "read_boxes",
    "read_photo",
    "read_photos",
    "with_background",
]
