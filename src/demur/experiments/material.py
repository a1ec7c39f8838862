"""Which data set an experiment takes, of those that its profile names, and what is said of that."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from demur import data
from demur.data import ImageSet, SourceStatus


def first_at_hand(entries: Sequence[str], known: Mapping[str, SourceStatus]) -> str:
    """The first of these entries of a profile that is there; if none is, the first that users can download."""
    there = (entry for entry in entries if entry not in known or known[entry].where)
    downloadable = (entry for entry in entries if known[entry].megabytes)
    return next(there, None) or next(downloadable, entries[0])


def passed_over(entries: Sequence[str], taken: str, root: Path | None) -> str:
    """Say which entries the profile would rather have had."""
    missing = entries[: entries.index(taken)]
    return (
        f"; {' and '.join(missing)}, named first, {'is' if len(missing) == 1 else 'are'} not in {data.data_root(root)}" if missing else ""
    )


def counted(images: ImageSet) -> str:
    """Say what a set is, in a few words."""
    return f"{images.name}, {len(images):,} images of {images.num_classes} classes"


def load_entry(entry: str, root: Path | None) -> ImageSet:
    """The set of this entry, and by that name: the name that a path's file has may be another set's."""
    return replace(data.load(entry, root=root), name=entry)
