"""The recipes of base networks for CIFAR-10."""

from pathlib import Path

import pytest
import torch

from demur import Classifier, DemurError, networks
from demur.data import ImageSet
from demur.evaluation.scoring import TrainingInputs
from demur.studies.enlarged_networks import HeadOnFeatures, features_of
from demur.studies.image_networks import SmallResNet


@pytest.fixture
def given(tmp_path):
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (48, 3, 16, 16), dtype=torch.uint8, generator=draw)
    labels = torch.arange(48) % 3
    images[labels == 1] //= 4
    images[labels == 2, 0] = 255
    data = ImageSet(images, labels, ("noise", "dark", "red"))

    def inputs(base=None, seed=0):
        return TrainingInputs(data, None, base, seed, "cpu", Path(tmp_path, "checkpoint"))

    return inputs


def test_a_small_residual_network_learns(given):
    recipe = SmallResNet(epochs=8, batch_size=8, width=4)
    inputs = given()
    trained = recipe.train(inputs)
    data = inputs.data
    assert float((trained.predict(data.to_float()) == data.labels).float().mean()) > 0.6
    assert inputs.notes["training: accuracy"] > 0.4
    again = recipe.train(given())
    assert torch.equal(trained.scores(data.to_float()), again.scores(data.to_float()))
    other = recipe.train(given(seed=1))
    assert not torch.equal(trained.scores(data.to_float()), other.scores(data.to_float()))


def test_a_new_last_layer_learns_from_the_features_of_an_imagenet_network(given):
    base = networks.untrained_imagenet_network(
        "resnet18", size=224, resize=256, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)
    )
    recipe = HeadOnFeatures(size=32, epochs=10)
    with pytest.raises(DemurError, match="base model"):
        recipe.train(given())
    inputs = given(Classifier(base, 1000))
    trained = recipe.train(inputs)
    data = inputs.data
    whole = trained.module
    assert float((trained.predict(data.to_float()) == data.labels).float().mean()) > 0.8
    assert whole.architecture["arguments"]["size"] == 32
    assert whole.architecture["arguments"]["mean"] == pytest.approx([0.5, 0.4, 0.3])
    # The features are those of the base.
    assert torch.equal(whole.network.layer4[1].conv2.weight, base.network.layer4[1].conv2.weight)
    mirrored = ImageSet(data.images.flip(3), data.labels, data.class_names)
    torch.testing.assert_close(features_of(whole, data, True), features_of(whole, mirrored, False))
