"""Labelled images in memory or in files, data sets by name, photographs, background images."""

from demur.data.annotations import read_boxes
from demur.data.background import (
    CandidateRate,
    FitPredict,
    Selection,
    confusing_classes,
    with_background,
)
from demur.data.corruptions import CORRUPTIONS, corrupt
from demur.data.formats import NoSplitError
from demur.data.image_files import ImageFiles, ResizedImages
from demur.data.image_source import ImageSource, in_memory
from demur.data.images import ImageSet, to_float
from demur.data.label_map import read_label_map
from demur.data.morphing import morph
from demur.data.photos import Photo, fitted, read_photo, read_photos
from demur.data.reading import FoundImages, find_images, read_images
from demur.data.sources import SourceStatus, counted, data_root, download, list_datasets, load
from demur.data.splits import split_by_hash, without
from demur.data.synthetic import (
    patch_shuffle,
    photo_crops,
    photo_patches,
    synthetic_backgrounds,
)
from demur.data.unlabelled import read_unlabelled
from demur.data.verification import CheckResult, verify
from demur.masks import Box

__all__ = [
    "CORRUPTIONS",
    "Box",
    "CandidateRate",
    "CheckResult",
    "FitPredict",
    "FoundImages",
    "ImageFiles",
    "ImageSet",
    "ImageSource",
    "NoSplitError",
    "Photo",
    "ResizedImages",
    "Selection",
    "SourceStatus",
    "confusing_classes",
    "corrupt",
    "counted",
    "data_root",
    "download",
    "find_images",
    "fitted",
    "in_memory",
    "list_datasets",
    "load",
    "morph",
    "patch_shuffle",
    "photo_crops",
    "photo_patches",
    "read_boxes",
    "read_images",
    "read_label_map",
    "read_photo",
    "read_photos",
    "read_unlabelled",
    "split_by_hash",
    "synthetic_backgrounds",
    "to_float",
    "verify",
    "with_background",
    "without",
]
