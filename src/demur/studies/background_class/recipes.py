"""How the models of the background-class study are made."""

from dataclasses import dataclass

import torch
from torch import Tensor

from demur import seeds
from demur.classifier import Classifier
from demur.data import ImageSet
from demur.defenses import BackgroundClass
from demur.evaluation.scoring import TrainingInputs
from demur.networks import background_class_network
from demur.training import fit


@dataclass(frozen=True)
class Split:
    """A random split of the key images, and images of other classes to train on.

    There are at most `share` background images for each key image. Without background, the model
    has no background class. `key_images` limits the key images to train on.
    """

    keys: tuple[str, ...]
    background: tuple[str, ...]
    held_out: float
    seed: int
    share: float | None = None
    key_images: int | None = None

    def parts(self, images: ImageSet) -> tuple[ImageSet, ImageSet, Tensor, Tensor]:
        """Give the key images to train on and to test on, the background images to train on, and
        the other images of the same classes.
        """
        train, test = images.select_classes(self.keys).split(self.held_out, self.seed)
        if self.key_images is not None:
            train = train.sample(self.key_images, self.seed)
        found = shuffled(images, self.background, self.seed)
        used = len(found) if self.share is None else round(self.share * len(train))
        return train, test, found[:used], found[used:]


@dataclass(frozen=True)
class Training:
    """Train a network on a split of the images, or on all of them."""

    epochs: int
    batch_size: int
    split: Split | None = None

    def train(self, given: TrainingInputs) -> Classifier:
        """Train; see `demur.evaluation.scoring.Recipe`."""
        keys, background = given.data, given.data.images[:0]
        if self.split:
            keys, _, background, _ = self.split.parts(given.data)
        rejects = len(background) > 0
        seed = seeds.derive(given.seed, "weights", *([rejects] if self.split else []))
        channels, size, _ = keys.image_shape
        classes = keys.num_classes
        outputs = classes + rejects
        network = background_class_network(outputs, channels=channels, size=size, seed=seed)
        options = given.options(self.epochs, self.batch_size)
        if rejects:
            defense = BackgroundClass(network, classes)
            return defense.fit(keys.images, keys.labels, background, **options)
        fit(network, keys.images, keys.labels, **options)
        return Classifier(network, classes)


def shuffled(images: ImageSet, names: tuple[str, ...], seed: int) -> Tensor:
    """Give the images of these classes, in random order."""
    wanted = torch.tensor(images.class_indices(names), dtype=torch.int64)
    index = torch.isin(images.labels, wanted).nonzero().flatten()
    order = torch.randperm(len(index), generator=seeds.generator(seed, "background"))
    return images.images[index[order]]
