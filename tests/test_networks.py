"""The networks of the papers, and the registry that rebuilds them from a JSON description."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from demur import DemurError, networks
from demur.files import fingerprint
from demur.networks import (
    background_class_network,
    dnr_cnn,
    enlarged_imagenet_network,
    localized_network,
    resnet9,
    wide_resnet,
)
from demur.networks.registry import BUILDERS


def weights(network):
    return torch.cat([value.flatten().double() for value in network.state_dict().values()])


def test_the_network_is_table_2_of_the_background_class_paper():
    for outputs in (10, 11):
        network = background_class_network(outputs)
        kinds = " ".join(type(layer).__name__ for layer in network)
        convolutional = "Conv2d BatchNorm2d ReLU Conv2d BatchNorm2d MaxPool2d ReLU Flatten"
        assert kinds == f"Centre {convolutional} Linear BatchNorm1d ReLU Linear BatchNorm1d"
        learnt = sum(parameter.numel() for parameter in network.parameters())
        by_hand = (
            (9 * 32 + 32)
            + 64
            + (9 * 32 * 64 + 64)
            + 128
            + (9216 * 128 + 128)
            + 256
            + (128 * outputs + outputs)
            + 2 * outputs
        )
        assert learnt == by_hand
        assert network.eval()(torch.rand(2, 1, 28, 28)).shape == (2, outputs)
    with pytest.raises(DemurError, match="even size"):
        background_class_network(10, size=27)
    with pytest.raises(DemurError, match="a width of at least 1"):
        background_class_network(10, width=0)


def test_the_width_scales_all_hidden_layers():
    shapes = {
        width: [tuple(one.shape) for one in background_class_network(10, width=width).parameters()]
        for width in (8, 32)
    }
    assert shapes[8][0] == (8, 1, 3, 3)
    assert shapes[8][4] == (16, 8, 3, 3)
    assert shapes[8][8] == (32, 16 * 12 * 12)
    assert shapes[8][-1] == shapes[32][-1] == (10,)
    assert torch.equal(
        background_class_network(10)[1].weight, background_class_network(10, width=32)[1].weight
    )


def test_the_localized_network_is_that_of_madrys_mnist_challenge():
    network = localized_network(seed=1)
    learnt = [
        tuple(parameter.shape)
        for name, parameter in network.named_parameters()
        if name.endswith("weight")
    ]
    assert learnt == [(32, 1, 5, 5), (64, 32, 5, 5), (1024, 3136), (10, 1024)]
    assert network(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    dense = network[7].weight.detach()
    assert float(dense.abs().max()) <= 0.2 and bool((network[7].bias == 0.1).all())
    # The deviation of a normal distribution that is truncated at two deviations.
    assert float(dense.std()) == pytest.approx(0.088, rel=0.02)
    assert torch.equal(network[0].weight, localized_network(seed=1)[0].weight)
    assert localized_network(4, channels=3, size=32)(torch.rand(1, 3, 32, 32)).shape == (1, 4)
    with pytest.raises(DemurError, match="divisible by 4"):
        localized_network(size=30)


def test_the_strided_network_has_two_convolutions_a_dense_layer_and_the_output():
    """As the localized paper's; strides take the place of pooling."""
    network = networks.strided_cnn(seed=1)
    shapes = [tuple(one.shape) for one in network.parameters() if one.ndim > 1]
    assert shapes == [(32, 1, 4, 4), (64, 32, 4, 4), (512, 3136), (10, 512)]
    assert network[:4](torch.rand(2, 1, 28, 28)).shape == (2, 64, 7, 7)
    assert torch.equal(network[0].weight, networks.strided_cnn(seed=1)[0].weight)
    for options in ({"num_outputs": 1}, {"size": 30}, {"width": 0}, {"channels": 0}):
        with pytest.raises(DemurError, match="strided network"):
            networks.strided_cnn(**options)


def test_the_wide_network_is_w32_10():
    """Three groups of five units of two convolutions, and two layers: 32; 46 million weights."""
    with torch.device("meta"):
        shapes = [tuple(parameter.shape) for parameter in wide_resnet().parameters()]
    assert sum(torch.Size(shape).numel() for shape in shapes) == pytest.approx(45.9e6, rel=0.01)
    small = wide_resnet(7, widen=1, units=2, seed=2).eval()
    images = torch.rand(3, 3, 32, 32)
    assert small(images).shape == (3, 7)
    # Each image is standardized.
    torch.testing.assert_close(small(0.5 * images + 0.1), small(images), rtol=1e-3, atol=1e-4)
    assert sum(isinstance(layer, nn.Conv2d) for layer in small.modules()) == 1 + 3 * 2 * 2
    flat = small(torch.full((1, 3, 32, 32), 0.5))
    assert bool(torch.isfinite(flat).all())


def test_the_small_residual_network_has_nine_layers_with_weights():
    network = resnet9(7, seed=1).eval()
    shapes = [tuple(one.shape) for name, one in network.named_parameters() if one.ndim > 1]
    units = [(64, 64, 3, 3)] * 2, [(256, 256, 3, 3)] * 2
    first = [(32, 3, 3, 3), (64, 32, 3, 3)]
    assert shapes == [*first, *units[0], (128, 64, 3, 3), (256, 128, 3, 3), *units[1], (7, 256)]
    assert len(shapes) == 9
    images = torch.rand(2, 3, 32, 32)
    assert network(images).shape == (2, 7)
    # Batch norm and rectifier follow the pooling, on a quarter of the values.
    seen = []
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[-1]))
    network(images)
    assert seen == [32, 16, 16, 16, 8, 4, 4, 4]
    for options in ({"num_outputs": 1}, {"size": 12}, {"width": 0}):
        with pytest.raises(DemurError, match="residual network"):
            resnet9(**options)


def test_an_enlarged_network_lets_gradients_through_to_the_small_image():
    network = enlarged_imagenet_network("resnet18", 4, size=64, mean=(0.1,) * 3, std=(2.0,) * 3)
    images = torch.rand(2, 3, 16, 16, requires_grad=True)
    large = nn.functional.interpolate(images, (64, 64), mode="bilinear")
    assert torch.equal(network(images), network.network((large - 0.1) / 2.0))
    (gradient,) = torch.autograd.grad(network(images).sum(), images)
    assert bool((gradient != 0).flatten(1).any(1).all())
    with pytest.raises(DemurError, match="resnet18"):
        enlarged_imagenet_network("resnet19", 4)
    with pytest.raises(DemurError, match="at least 32"):
        enlarged_imagenet_network("resnet18", 4, size=16)


def test_the_rejection_network_is_table_1_of_the_rejection_paper():
    network = dnr_cnn(seed=3)
    shapes = [
        tuple(parameter.shape)
        for name, parameter in network.named_parameters()
        if name.endswith("weight")
    ]
    assert shapes == [
        (32, 1, 3, 3),
        (32, 32, 3, 3),
        (64, 32, 3, 3),
        (64, 64, 3, 3),
        (200, 3136),
        (200, 200),
        (10, 200),
    ]
    assert network(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    assert float(network[7].weight.detach().std()) == pytest.approx(0.05, rel=0.02)
    limit = (6 / (3136 + 200)) ** 0.5  # Glorot & Bengio 2010, eq. 16
    assert 0.99 * limit < float(network[11].weight.detach().abs().max()) <= limit
    assert torch.equal(network[0].weight, dnr_cnn(seed=3)[0].weight)
    assert sum(isinstance(layer, torch.nn.Dropout) for layer in network) == 1
    for options in ({"num_outputs": 1}, {"size": 30}):
        with pytest.raises(DemurError, match="rejection network"):
            dnr_cnn(**options)


def test_pooling_before_the_rectifier_is_the_same_network():
    network = background_class_network(10).eval()
    printed = list(network)
    printed[6], printed[7] = printed[7], printed[6]
    images = torch.rand(3, 1, 28, 28)
    assert torch.equal(network(images), nn.Sequential(*printed)(images))


@pytest.mark.parametrize("outputs", [0, 1])
def test_a_network_without_a_choice_is_refused(outputs):
    with pytest.raises(DemurError, match="at least 2 outputs"):
        background_class_network(outputs)


def test_pixels_are_centred_inside_the_network():
    assert torch.equal(
        background_class_network(10)[0](torch.tensor([0.0, 0.25, 1.0])),
        torch.tensor([-0.5, -0.25, 0.5]),
    )


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = background_class_network(10, seed=3)
    torch.manual_seed(2)
    assert torch.equal(weights(first), weights(background_class_network(10, seed=3)))
    assert not torch.equal(weights(first), weights(background_class_network(10, seed=4)))


def library(builder, name):
    return {"name": builder, "arguments": {"name": name, "num_outputs": 4, "options": {}}}


NETWORKS = {
    "background_class_network": lambda: background_class_network(3, channels=3, size=8, seed=1),
    "certified_cnn": lambda: networks.certified_cnn(4, size=8, seed=3),
    "certified_cnn7": lambda: networks.certified_cnn7(4, channels=1, size=8),
    "dnr_cnn": lambda: dnr_cnn(size=8, seed=2),
    "localized_network": lambda: localized_network(4, size=8),
    "wide_resnet": lambda: wide_resnet(5, channels=1, size=8, widen=1, units=1),
    "resnet9": lambda: resnet9(5, channels=1, size=8, width=2),
    "strided_cnn": lambda: networks.strided_cnn(5, channels=3, size=8, width=2),
    "enlarged_imagenet_network": lambda: enlarged_imagenet_network("resnet18", 4, size=32),
    "untrained_imagenet_network": lambda: networks.untrained_imagenet_network(
        "squeezenet1_0", size=32, resize=40, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)
    ),
    "timm_network": lambda: networks.build(library("timm_network", "resnet10t")),
    "torchvision_network": lambda: networks.build(library("torchvision_network", "squeezenet1_1")),
}


def test_every_builder_has_a_test():
    assert set(NETWORKS) == set(BUILDERS)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_rebuilt_from_json_and_its_weights(name):
    network = NETWORKS[name]().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.01)  # as if it were trained
    architecture = json.loads(json.dumps(network.architecture))
    assert architecture["name"] == name and architecture == network.architecture
    random_state = torch.get_rng_state()
    again = networks.build(architecture).eval()
    assert torch.equal(torch.get_rng_state(), random_state)
    arguments = architecture["arguments"]
    size = arguments.get("size", 32)
    images = torch.rand(2, arguments.get("channels", 3), size, size)
    assert not torch.equal(again(images), network(images))
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(images), network(images))
    assert fingerprint(again) == fingerprint(network)  # buffers outside the state dict, too


def test_an_architecture_has_numbers_of_python():
    network = dnr_cnn(np.int64(3), size=8)
    assert type(network.architecture["arguments"]["num_outputs"]) is int


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        ({"name": "dnr_cn", "arguments": {}}, "unknown architecture.*Did you mean 'dnr_cnn'"),
        ({"name": ["dnr_cnn"], "arguments": {}}, "unknown architecture"),
        ({"name": "dnr_cnn"}, "name and arguments"),
        ({"name": "dnr_cnn", "arguments": {}, "code": "print()"}, "name and arguments"),
        ("dnr_cnn", "name and arguments"),
        ({"name": "dnr_cnn", "arguments": [10]}, "mapping of names"),
        ({"name": "dnr_cnn", "arguments": {1: 10}}, "mapping of names"),
        ({"name": "dnr_cnn", "arguments": {"outputs": 10}}, "cannot be built.*outputs"),
        ({"name": "background_class_network", "arguments": {}}, "cannot be built.*num_outputs"),
        ({"name": "dnr_cnn", "arguments": {"num_outputs": "10"}}, "needs int.*not str"),
        ({"name": "dnr_cnn", "arguments": {"num_outputs": 10.0}}, "needs int.*not float"),
        ({"name": "dnr_cnn", "arguments": {"num_outputs": True}}, "needs int.*not bool"),
        ({"name": "dnr_cnn", "arguments": {"num_outputs": None}}, "needs int.*not NoneType"),
        ({"name": "dnr_cnn", "arguments": {"size": 30}}, "divisible by 4"),
        ({"name": "dnr_cnn", "arguments": {"num_outputs": 2**60}}, "above the limit"),
        ({"name": "dnr_cnn", "arguments": {"num_outputs": 2**80}}, "above the limit"),
        ({"name": "dnr_cnn", "arguments": {"seed": 2**80}}, "cannot be built"),
    ],
)
def test_a_strange_architecture_is_one_clear_line(architecture, said):
    with pytest.raises(DemurError, match=said) as error:
        networks.build(architecture)
    assert "\n" not in str(error.value)
