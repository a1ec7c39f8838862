"""Where batches come from: tensors in memory, or a DataLoader."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from demur import seeds
from demur.classifier import check_counts
from demur.errors import DemurError
from demur.training.randomness import seed_globals

DEFAULT_BATCH_SIZE = 128


class Batch(NamedTuple):
    """Images (n, ...), their labels (n,), and a label that none of them exceeds."""

    images: Tensor
    labels: Tensor
    highest: int


class Batches(Protocol):
    """This process's share of the batches of a training.

    Attributes
    ----------
    steps : int
        Batches in an epoch.
    resumes_within_epochs : bool
        Whether an epoch can start at a batch other than its first.
    """

    steps: int
    resumes_within_epochs: bool

    def epoch(self, epoch: int, start: int) -> Iterator[Batch]:
        """Iterate over the batches of an epoch, from batch `start` on."""

    def identity(self) -> object:
        """Return what tells these batches from others, for `files.fingerprint`."""

    def check_resumable(self) -> None:
        """Raise DemurError if a training on these batches cannot be resumed."""


class TensorBatches:
    """Batches of tensors in memory, in a random order for each epoch.

    An epoch leaves out the images that do not fill a batch, different ones each time.

    Parameters
    ----------
    images : Tensor of shape (N, ...)
        They stay on their device; batches are copies of a part of them.
    labels : Tensor of shape (N,)
        One for each image, integers from 0.
    batch_size : int or None
        Images a step, over all processes. None means 128.
    seed : int
        Seed of the order.
    rank : int
        Number of this process. It takes its share of each batch.
    world_size : int
        Number of processes.

    Raises
    ------
    DemurError
        If images and labels do not fit each other, or a batch cannot be divided.

    Examples
    --------
    >>> batches = TensorBatches(torch.rand(10, 4), torch.arange(10), 4, seed=0)
    >>> [len(batch.labels) for batch in batches.epoch(0, 0)]
    [4, 4]
    """

    resumes_within_epochs = True

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None,
        batch_size: int | None,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        labels = check_labelled(images, labels)
        batch_size = DEFAULT_BATCH_SIZE if batch_size is None else batch_size
        check_counts(batch_size=batch_size)
        self.images = images
        self.labels = labels.to(images.device)
        self.highest = int(labels.max())
        self.batch_size = min(batch_size, len(images))
        self.steps = len(images) // self.batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        if self.batch_size % world_size:
            raise DemurError(
                f"a batch of {self.batch_size} images cannot be divided among {world_size} devices."
            )

    def epoch(self, epoch: int, start: int) -> Iterator[Batch]:
        """Iterate over the batches of an epoch, from batch `start` on."""
        generator = seeds.generator(self.seed, "order", epoch)
        order = torch.randperm(len(self.images), generator=generator)
        for position in range(start, self.steps):
            chosen = order[position * self.batch_size : (position + 1) * self.batch_size]
            chosen = chosen[self.rank :: self.world_size].to(self.images.device)
            yield Batch(self.images[chosen], self.labels[chosen], self.highest)

    def identity(self) -> object:
        """Return what tells these batches from others, for `files.fingerprint`."""
        return "tensors", self.images, self.labels, self.batch_size

    def check_resumable(self) -> None:
        """Do nothing: a training on tensors can be resumed."""


class LoaderBatches:
    """Batches of a DataLoader.

    The global random states of torch, numpy and Python are seeded for each batch, and the
    generators of the loader and of its sampler for each epoch, so that an epoch can be repeated.
    `preserved_randomness` restores the global states.

    Parameters
    ----------
    loader : DataLoader
        Gives batches (images, labels), and has a length.
    seed : int
        Seed of the order, and of random augmentation.
    data_key : str or None
        A text that names the data.
    rank : int
        Number of this process.
    world_size : int
        Number of processes. With more than one, the sampler must be a DistributedSampler, which
        gives each process its share.

    Raises
    ------
    DemurError
        For a loader without a length or without batches, or with the wrong sampler.

    Examples
    --------
    >>> from torch.utils.data import TensorDataset
    >>> loader = DataLoader(TensorDataset(torch.rand(10, 4), torch.arange(10)), batch_size=4)
    >>> [len(batch.labels) for batch in LoaderBatches(loader, seed=0).epoch(0, 0)]
    [4, 4, 2]
    """

    resumes_within_epochs = False

    def __init__(
        self,
        loader: DataLoader[Any],
        seed: int,
        data_key: str | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        try:
            self.steps = len(loader)
        except TypeError as error:
            raise DemurError("the DataLoader has no length: give its dataset a __len__.") from error
        if self.steps == 0:
            raise DemurError("the DataLoader has no batches.")
        self.loader = loader
        self.seed = seed
        self.data_key = data_key
        self.rank = rank
        self.samplers = [loader.sampler, getattr(loader.batch_sampler, "sampler", None)]
        if world_size > 1 and not self._distributed():
            raise DemurError(
                f"training on {world_size} devices needs a DataLoader with a DistributedSampler."
            )

    def _distributed(self) -> list[DistributedSampler[Any]]:
        return [sampler for sampler in self.samplers if isinstance(sampler, DistributedSampler)]

    def epoch(self, epoch: int, start: int) -> Iterator[Batch]:
        """Iterate over the batches of an epoch; `start` must be 0."""
        for owner in (self.loader, *self.samplers):
            if isinstance(generator := getattr(owner, "generator", None), torch.Generator):
                generator.manual_seed(seeds.derive(self.seed, "order", epoch))
        for sampler in self._distributed():
            sampler.set_epoch(epoch)
        seed_globals(seeds.derive(self.seed, "loader", epoch, self.rank))
        batches = iter(self.loader)
        for position in range(self.steps):
            # Each batch has its own seed: what the network draws cannot change the augmentation.
            seed_globals(seeds.derive(self.seed, "batch", epoch, position, self.rank))
            batch = next(batches, None)
            if batch is None:
                raise DemurError(
                    f"the DataLoader ended after {position} batches; its length is {self.steps}."
                )
            yield _checked(batch)

    def identity(self) -> object:
        """Return what tells these batches from others, for `files.fingerprint`."""
        loader = self.loader
        sizes = (self.steps, loader.batch_size, loader.drop_last, loader.num_workers)
        functions = (loader.collate_fn, loader.worker_init_fn)
        return "loader", self.data_key, sizes, [type(one) for one in self.samplers], functions

    def check_resumable(self) -> None:
        """Raise DemurError if a training on these batches cannot be resumed."""
        if not self.data_key:
            raise DemurError(
                "a checkpoint of a training on a DataLoader needs data_key, a text that names its "
                "data."
            )
        if self.loader.persistent_workers:
            raise DemurError(
                "a checkpoint needs a DataLoader with persistent_workers=False: the random state "
                "of persistent workers cannot be restored."
            )


def make_batches(
    images: Tensor | DataLoader[Any],
    labels: Tensor | None,
    batch_size: int | None,
    data_key: str | None,
    seed: int,
    rank: int,
    world_size: int,
) -> Batches:
    """Make the batches of a training, and check that the arguments fit each other.

    Parameters
    ----------
    images, labels, batch_size, data_key, seed
        As in `fit`.
    rank : int
        Number of this process.
    world_size : int
        Number of processes.

    Returns
    -------
    Batches
        `TensorBatches` or `LoaderBatches`.

    Raises
    ------
    DemurError
        If the arguments do not fit each other.

    Examples
    --------
    >>> make_batches(torch.rand(10, 4), torch.arange(10), 4, None, 0, 0, 1).steps
    2
    """
    if not isinstance(images, DataLoader):
        if data_key is not None:
            raise DemurError("data_key names the data of a DataLoader; tensors do not need it.")
        return TensorBatches(images, labels, batch_size, seed, rank, world_size)
    if labels is not None:
        raise DemurError("a DataLoader brings its own labels: leave labels out.")
    if batch_size is not None:
        raise DemurError("a DataLoader has its own batch size: leave batch_size out.")
    return LoaderBatches(images, seed, data_key, rank, world_size)


def check_labelled(images: Tensor, labels: Tensor | None, kind: str = "training") -> Tensor:
    """Check that images and labels fit each other.

    Parameters
    ----------
    images : Tensor of shape (N, ...)
        At least one image.
    labels : Tensor of shape (N,)
        Integers from 0.
    kind : str
        What they are for, for the message.

    Returns
    -------
    Tensor of shape (N,)
        The labels.

    Raises
    ------
    DemurError
        If they do not fit.

    Examples
    --------
    >>> check_labelled(torch.rand(2, 1, 4, 4), torch.tensor([0, 1]))
    tensor([0, 1])
    """
    if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
        raise DemurError(f"{kind} needs images and labels, both as tensors.")
    if images.ndim < 2 or labels.shape != (len(images),) or len(images) == 0:
        raise DemurError(
            f"{kind} needs one label for each image, and at least one image; the shapes are "
            f"{tuple(images.shape)} and {tuple(labels.shape)}."
        )
    if labels.is_floating_point() or int(labels.min()) < 0:
        raise DemurError(f"{kind} labels must be integers from 0 up.")
    return labels


def _checked(batch: object) -> Batch:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        size = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise DemurError(
            "the DataLoader must give pairs (images, labels): it gave a "
            f"{type(batch).__name__}{size}."
        )
    images, labels = batch
    labels = check_labelled(images, labels)
    return Batch(images, labels, int(labels.max()))
