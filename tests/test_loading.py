"""Models of libraries, of the user's own code, and of files of weights."""

import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from torchvision import models, transforms

import demur
from demur import Classifier, DemurError, load_model, networks, wrap
from demur.classifier import Preprocess
from demur.loading import PreprocessOverrides, fingerprint_of, read_model, save_model
from models import Linear, convolutional, images_of

TINY = "test_resnet.r160_in1k"
MODES = {"bilinear": transforms.InterpolationMode.BILINEAR}
MODES |= {"bicubic": transforms.InterpolationMode.BICUBIC}


def photograph(height=301, width=403):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def prepared(image, preprocess):
    """Resize and crop as `preprocess` says, by torchvision; pixels in [0, 1]."""
    steps = [
        transforms.Resize(preprocess.resize, MODES[preprocess.interpolation]),
        transforms.CenterCrop(preprocess.size),
        transforms.ToTensor(),
    ]
    return transforms.Compose(steps)(image)[None]


def agree(classifier, images, expected):
    """The scores agree within 1e-5 of the largest one."""
    largest = expected.abs().max()
    torch.testing.assert_close(
        classifier.scores(images) / largest, expected / largest, rtol=0, atol=1e-5
    )


def settled(network):
    """Give the batch normalisations of a random network the statistics of random images.

    Otherwise the scores would hardly depend on the image.
    """
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 1.0
    with torch.no_grad():
        network.train()(torch.rand(4, 3, 96, 96, generator=torch.Generator().manual_seed(0)))
    return network.eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Weights of random networks in files."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    found = {"shuffle": settled(models.shufflenet_v2_x0_5(weights=None))}
    found["tiny"] = settled(timm.create_model(TINY))
    found["ten"] = settled(timm.create_model(TINY, num_classes=10))
    for name, network in found.items():
        save_file(network.state_dict(), folder / f"{name}.safetensors")
        torch.save(network.state_dict(), folder / f"{name}.pth")
    return SimpleNamespace(folder=folder, **found)


def written(folder, text, name="model.py"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return f"py:{folder / name}"


MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, outputs=4, scale=1.0):
        super().__init__()
        self.layer = nn.Linear(3 * 64, outputs)
        self.scale = scale

    def forward(self, images):
        return self.layer(images.flatten(1)) * self.scale

def make(outputs=4, scale=1.0):
    return Net(outputs, scale)

ready = Net()
weights = {"layer": 1}
"""


# torchvision


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_torchvisions_preprocessing_and_network_are_the_ones_that_are_loaded(files, suffix):
    source = f"torchvision:shufflenet_v2_x0_5@{'IMAGENET1K_V1' if suffix == 'pth' else 'DEFAULT'}"
    classifier = load_model(source, checkpoint=files.folder / f"shuffle.{suffix}")
    weights = models.ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1
    image = photograph()
    expected = files.shuffle(weights.transforms()(image)[None]).detach()
    agree(classifier, prepared(image, classifier.preprocess), expected)
    assert classifier.preprocess == Preprocess(
        (224, 224), 256, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    )
    assert classifier.class_names == tuple(weights.meta["categories"])
    assert not classifier.training and not classifier.rejects
    # Negative control: without normalisation, the scores are others.
    raw = files.shuffle(prepared(image, classifier.preprocess)).detach()
    assert float((raw - expected).abs().max() / expected.abs().max()) > 1e-2


@pytest.mark.parametrize("auxiliary", [True, False])
def test_googles_networks_normalise_once_with_and_without_auxiliary_parts(tmp_path, auxiliary):
    torch.manual_seed(0)
    options = {"aux_logits": auxiliary, "init_weights": False}
    trained = settled(models.googlenet(weights=None, transform_input=True, **options))
    save_file(trained.state_dict(), tmp_path / "a.safetensors")
    classifier = load_model("torchvision:googlenet", checkpoint=tmp_path / "a.safetensors")
    image = photograph()
    transform = models.GoogLeNet_Weights.IMAGENET1K_V1.transforms()
    expected = trained(transform(image)[None]).detach()
    agree(classifier, prepared(image, classifier.preprocess), expected)


def test_metadata_of_a_safetensors_file_override_torchvisions_preprocessing(files, tmp_path):
    state = {name: value.half() for name, value in files.shuffle.state_dict().items()}
    about = {"architecture": "shufflenet_v2_x0_5", "input_size": "96", "mean": "[0.5, 0.5, 0.5]"}
    about["std"] = "(0.25, 0.25, 0.25)"
    path = tmp_path / "a.safetensors"
    save_file(state, path, metadata=about)
    found = read_model("torchvision:shufflenet_v2_x0_5", checkpoint=path)
    preprocess = found.classifier.preprocess
    assert (preprocess.size, preprocess.mean[0], preprocess.std[0]) == ((96, 96), 0.5, 0.25)
    assert any("float16" in note and "float32" in note for note in found.notes)
    images = images_of(2, 3, 96)
    rounded = models.shufflenet_v2_x0_5(weights=None).eval()
    rounded.load_state_dict({name: value.float() for name, value in state.items()})
    agree(found.classifier, images, rounded((images - 0.5) / 0.25).detach())
    with pytest.raises(DemurError, match="has the weights of shufflenet_v2_x0_5, not of resnet18"):
        load_model("torchvision:resnet18", checkpoint=path)
    for wrong in ("[0.5", "__import__('os')", "(1, 2)", "('a',)"):
        save_file(state, path, metadata={**about, "mean": wrong})
        with pytest.raises(DemurError, match=r"metadata of .* are not usable"):
            load_model("torchvision:shufflenet_v2_x0_5", checkpoint=path)


def test_old_names_of_densenet_and_strict_versions_of_mnasnet_are_read(tmp_path):
    torch.manual_seed(0)
    dense, mnas = models.densenet121(weights=None), models.mnasnet0_5(weights=None)
    images = images_of(1, 3, 64)
    state = {
        name.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): value
        for name, value in settled(dense).state_dict().items()
    }
    assert any("norm.1." in name for name in state)
    for name, network, weights in (
        ("densenet121", dense, state),
        ("mnasnet0_5", settled(mnas), mnas.state_dict()),
    ):
        save_file(weights, tmp_path / "a.safetensors")
        found = load_model(f"torchvision:{name}", checkpoint=tmp_path / "a.safetensors")
        mean, std = (
            torch.tensor(v)[:, None, None] for v in (networks.imagenet.MEAN, networks.imagenet.STD)
        )
        agree(found, images, network((images - mean) / std).detach())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("fasterrcnn_resnet50_fpn", "detection"),
        ("fcn_resnet50", "segmentation"),
        ("r3d_18", "video"),
        ("raft_small", "optical flow"),
        ("quantized_resnet18", "quantized"),
    ],
)
def test_models_that_are_no_classifiers_are_refused_by_name(name, kind):
    with pytest.raises(DemurError, match=f"demur audits classifiers; .*{name} is an? {kind} model"):
        load_model(f"torchvision:{name}")


def test_a_missing_download_says_which_file_where_from_and_what_to_do(monkeypatch, tmp_path):
    def offline(*args, **options):
        raise URLError("no connection")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", offline)
    said = r"resnet18-f37072fd.pth from https://download.*no connection.*--checkpoint FILE"
    with pytest.raises(DemurError, match=said):
        load_model("torchvision:resnet18")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    said = r"model.safetensors from https://huggingface.co/timm/test_resnet.*--checkpoint FILE"
    with pytest.raises(DemurError, match=said) as caught:
        load_model(f"timm:{TINY}")
    assert "\n" not in str(caught.value)


def test_weights_that_the_libraries_have_in_their_caches_are_theirs(files, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = models.ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1.url
    cached = tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    torch.save(files.shuffle.state_dict(), cached)
    found = read_model("torchvision:shufflenet_v2_x0_5")
    assert any(url in note for note in found.notes)
    own = read_model("torchvision:shufflenet_v2_x0_5", checkpoint=files.folder / "shuffle.pth")
    assert found.fingerprint == own.fingerprint
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / f"models--timm--{TINY}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(files.tiny.state_dict(), folder / "snapshots" / ("0" * 40) / "model.safetensors")
    found = read_model(f"timm:{TINY}")
    own = read_model(f"timm:{TINY}", checkpoint=files.folder / "tiny.pth")
    weights = own.classifier.state_dict()
    assert all(
        torch.equal(one, weights[name]) for name, one in found.classifier.state_dict().items()
    )
    assert "r160_in1k" in found.notes[0]


# timm


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_timms_preprocessing_and_network_are_the_ones_that_are_loaded(files, suffix):
    classifier = load_model(f"timm:{TINY}", checkpoint=files.folder / f"tiny.{suffix}")
    config = resolve_model_data_config(files.tiny)
    image = photograph()
    expected = files.tiny(create_transform(**config)(image)[None]).detach()
    agree(classifier, prepared(image, classifier.preprocess), expected)
    assert classifier.preprocess.resize == int(160 / 0.95)
    assert classifier.class_names == networks.CLASSES


def test_overrides_replace_what_timm_says(files):
    given = PreprocessOverrides(img_size=96, interpolation="bilinear", mean=(0.1,), std=(0.2,))
    path = files.folder / "tiny.pth"
    classifier = load_model(f"timm:{TINY}", checkpoint=path, preprocess=given)
    images = images_of(2, 3, 96)
    agree(classifier, images, files.tiny((images - 0.1) / 0.2).detach())
    assert classifier.preprocess == Preprocess((96, 96), int(96 / 0.95), "bilinear", (0.1,), (0.2,))
    # A transformer is built for one size: timm is told the other one.
    transformer = timm.create_model("test_vit.r160_in1k", img_size=96).eval()
    torch.save(transformer.state_dict(), files.folder / "vit.pth")
    classifier = load_model("timm:test_vit", checkpoint=files.folder / "vit.pth", preprocess=given)
    agree(classifier, images, transformer((images - 0.1) / 0.2).detach())


# files of weights


def test_weights_with_an_architecture_have_as_many_classes_as_their_last_layer(files, tmp_path):
    found = load_model(files.folder / "ten.safetensors", arch=f"timm:{TINY}")
    assert found.num_classes == 10 and found.class_names is None
    rejecting = load_model(str(files.folder / "ten.pth"), arch=f"timm:{TINY}", reject_column="last")
    assert rejecting.num_classes == 9 and rejecting.rejects
    torch.manual_seed(0)
    seven = models.shufflenet_v2_x0_5(weights=None, num_classes=7)
    save_file(seven.state_dict(), tmp_path / "a.safetensors")
    found = load_model(tmp_path / "a.safetensors", arch="torchvision:shufflenet_v2_x0_5")
    assert found.num_classes == 7
    with pytest.raises(DemurError, match=r"does not have the weights of torchvision.*2 misshaped"):
        load_model(tmp_path / "a.safetensors", arch="torchvision:shufflenet_v2_x0_5", num_classes=8)


@pytest.mark.parametrize(
    ("key", "prefix"),
    [
        (None, "module."),
        ("state_dict", "model.module."),
        ("model", "_orig_mod."),
        ("model_state_dict", ""),
    ],
)
def test_prefixes_and_containers_of_training_programs_are_recognised_and_said(
    files, tmp_path, key, prefix
):
    state = {prefix + name: value for name, value in files.ten.state_dict().items()}
    torch.save({key: state, "epoch": 3} if key else state, tmp_path / "a.pth")
    found = read_model(tmp_path / "a.pth", arch=f"timm:{TINY}")
    images = images_of(2, 3, 64)
    plain = load_model(files.folder / "ten.safetensors", arch=f"timm:{TINY}")
    assert torch.equal(found.classifier.scores(images), plain.scores(images))
    said = " ".join(found.notes)
    assert (f"'{key}'" in said) == (key is not None)
    assert said.count("begin with") == prefix.count(".")


def test_missing_and_unexpected_names_are_counted_and_three_are_named(files, tmp_path):
    state = dict(files.ten.state_dict())
    for name in [name for name in state if name.startswith("fc.")]:
        state[name.replace("fc", "\x1b[31m")] = state.pop(name)
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(DemurError) as caught:
        load_model(tmp_path / "a.safetensors", arch=f"timm:{TINY}", num_classes=10)
    assert "2 missing (fc.weight, fc.bias), 2 unexpected (?[31m.bias, ?[31m" in str(caught.value)
    old = {k: v for k, v in files.ten.state_dict().items() if "num_batches" not in k}
    save_file(old, tmp_path / "a.safetensors")  # from before batch normalisation counted
    assert load_model(tmp_path / "a.safetensors", arch=f"timm:{TINY}").num_classes == 10


class Payload:
    def __reduce__(self):
        return (Path("ran").write_text, ("code ran",))


def test_files_that_need_code_are_read_only_when_the_user_allows_it(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": files.ten.state_dict(), "args": Payload()}, "a.pth")
    with pytest.raises(DemurError, match=r"more than tensors \(.*--allow-pickle") as caught:
        load_model("a.pth", arch=f"timm:{TINY}")
    assert "\n" not in str(caught.value) and not Path("ran").exists()
    found = load_model("a.pth", arch=f"timm:{TINY}", allow_pickle=True)
    assert found.num_classes == 10 and Path("ran").exists()
    torch.save(files.ten, "whole.pth")
    assert load_model("whole.pth", arch=f"timm:{TINY}", allow_pickle=True).num_classes == 10
    for rubbish in (b"", b"abc", Path("a.pth").read_bytes()[:300]):
        Path("b.pth").write_bytes(rubbish)
        with pytest.raises(DemurError, match="not a whole file"):
            load_model("b.pth", arch=f"timm:{TINY}")
    torch.save([1, 2], "c.pt")
    with pytest.raises(DemurError, match="not a state dict"):
        load_model("c.pt", arch=f"timm:{TINY}")


# the user's own code


def test_factories_may_be_functions_classes_and_modules(tmp_path, monkeypatch):
    place = written(tmp_path / "here", MODULE)
    images = images_of(3, 3)
    for name in ("make", "Net", "ready"):
        found = read_model(f"{place}:{name}", num_classes=4)
        assert found.classifier.num_classes == 4 and not found.classifier.rejects
        assert found.classifier.scores(images).shape == (3, 4)
        assert any("training mode" in note for note in found.notes)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    sized = PreprocessOverrides(img_size=8)
    for short in ("py:here/model.py:make", "py:~/here/model.py:make", "py:./here/model.py:make"):
        kwargs = {"outputs": 6, "scale": 2.0}
        found = load_model(short, model_kwargs=kwargs, preprocess=sized)
        assert found.num_classes == 6
    written(tmp_path / "package_of_mine", MODULE, "models.py")
    (tmp_path / "package_of_mine" / "__init__.py").write_text("")
    assert load_model("py:package_of_mine.models:make", preprocess=sized).num_classes == 4
    assert str(tmp_path) not in sys.path
    again = load_model("py:package_of_mine.models:make", preprocess=sized)
    assert (
        fingerprint_of(again)
        == read_model("py:package_of_mine.models:make", preprocess=sized).fingerprint
    )


def test_neighbours_of_the_file_are_imported_and_leave_no_trace(tmp_path):
    for folder, value in (("one", 1.0), ("two", 2.0)):
        written(tmp_path / folder, f"VALUE = {value}\n", "models.py")  # as a module of these tests
        written(
            tmp_path / folder / "parts", f"from models import VALUE\nMORE = {value}", "inner.py"
        )
        text = MODULE + "\nfrom models import VALUE\nfrom parts.inner import MORE\n"
        written(tmp_path / folder, text + "def both():\n    return Net(scale=VALUE + MORE)\n")
    before, path = dict(sys.modules), list(sys.path)
    one = load_model(f"py:{tmp_path}/one/model.py:both", num_classes=4)
    two = load_model(f"py:{tmp_path}/two/model.py:both", num_classes=4)
    images = images_of(2, 3)
    torch.testing.assert_close(2 * one.scores(images), two.scores(images))
    assert sys.path == path and sys.modules["models"] is before["models"]
    assert not {"model", "parts", "parts.inner"} & set(sys.modules)
    assert not list(tmp_path.rglob("__pycache__"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\nraise ValueError('two\\nlines \\x1b[31m')", "line 2: ValueError: two lines ?[31m"),
        ("def make(:\n    pass", "line 1: SyntaxError: "),
        ("import no_such_module_anywhere", "line 1: ModuleNotFoundError: No module named"),
        ("\nimport sys\nsys.exit('usage')", "line 3: SystemExit: usage"),
        ("def make():\n    return 1 / 0", "line 2: ZeroDivisionError: division by zero"),
        ("def make(a):\n    pass", "make(...) of"),
        ("from .other import make", "Name the module of the package"),
        ("def make():\n    return 3", "returned int: it must return an nn.Module"),
        ("make = 3", "is of type int"),
        ("def maker(): pass", "has no factory 'make'. Did you mean 'maker'?"),
        ("import torch\nmake = torch.nn.Linear(2, 2)", "is not known: give the size"),
    ],
)
def test_errors_in_the_users_file_are_one_line_with_file_and_line(tmp_path, text, said):
    source = written(tmp_path, text)
    with pytest.raises(DemurError) as caught:
        load_model(f"{source}:make")
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert "line" not in said or str(tmp_path / "model.py") in str(caught.value)
    assert "model" not in sys.modules


def test_errors_in_the_forward_pass_name_the_line(tmp_path):
    source = written(tmp_path, MODULE)
    with pytest.raises(DemurError, match=r"\(1, 3, 9, 9\) \(.*model.py, line 12\): RuntimeError"):
        load_model(f"{source}:make", preprocess=PreprocessOverrides(img_size=9))
    with pytest.raises(DemurError, match=r"gives 4 scores, but 3 classes without a reject column"):
        load_model(f"{source}:make", preprocess=Preprocess((8, 8)), num_classes=3)


SAYING = (
    MODULE
    + """
from demur import Classifier
from demur.classifier import Preprocess

def said(count=4, **options):
    net = Net(**options)
    net.preprocess = Preprocess((8, 8), mean=(.5,), std=(.25,))
    net.class_names = [f"class {number}" for number in range(count)]
    return net

def other():
    net = Net()
    net.preprocess = lambda image: image
    net.classes = 4
    return net

def classifier():
    return Classifier(Net(5), 4, rejects=True)

class Answer:
    def __init__(self, logits):
        self.logits = logits

class Wrapped(Net):
    def forward(self, images):
        return Answer(super().forward(images))

class Tuple(Net):
    def forward(self, images):
        return super().forward(images), images

class Dict(Net):
    def forward(self, images):
        return {"scores": super().forward(images), "\\x1b[31m": 1}

class Boxes(Net):
    def forward(self, images):
        return [{"boxes": 1, "labels": 2}]

class Map(Net):
    def forward(self, images):
        return images

class Half(Net):
    def __init__(self):
        super().__init__()
        self.half()
"""
)


def test_what_a_module_says_of_itself_is_respected(tmp_path):
    source = written(tmp_path, SAYING)
    found = load_model(f"{source}:said")
    images = images_of(3, 3)
    bare = found.module.network
    agree(found, images, bare((images - 0.5) / 0.25).detach())
    assert found.class_names == ("class 0", "class 1", "class 2", "class 3")
    notes = read_model(f"{source}:other", num_classes=4).notes
    assert sum("is not used" in note for note in notes) == 2
    own = load_model(f"{source}:classifier", preprocess=PreprocessOverrides(img_size=8))
    assert own.rejects and own.num_classes == 4 and own.preprocess.size == (8, 8)
    with pytest.raises(DemurError, match="normalises inside"):
        normal = PreprocessOverrides(mean=(0.5,), std=(0.5,))
        load_model(f"{source}:classifier", preprocess=normal)
    with pytest.raises(DemurError, match="says itself whether it rejects"):
        load_model(f"{source}:classifier", reject_column="last")
    with pytest.raises(DemurError, match="there are 9 class_names for 4"):
        load_model(f"{source}:said", model_kwargs={"count": 9})


@pytest.mark.parametrize("column", ["last", 0, 2, 4])
def test_the_reject_column_comes_last_and_its_name_is_left_out(tmp_path, column):
    source = written(tmp_path, SAYING)
    options = {"count": 5, "outputs": 5}
    plain = load_model(f"{source}:said", model_kwargs=options)
    found = load_model(f"{source}:said", model_kwargs=options, reject_column=column)
    number = 4 if column == "last" else column
    order = [*(one for one in range(5) if one != number), number]
    images = images_of(4, 3)
    assert torch.equal(found.scores(images), plain.scores(images)[:, order])
    assert found.rejects and found.num_classes == 4 and not plain.rejects
    assert found.class_names == tuple(plain.class_names[one] for one in order[:-1])
    for wrong in (5, -1, True, "first"):
        with pytest.raises(DemurError, match="reject_column is"):
            load_model(f"{source}:said", model_kwargs=options, reject_column=wrong)


@pytest.mark.parametrize("options", [{"preprocess": Preprocess((8, 8))}, {"num_classes": 4}])
def test_objects_with_logits_are_unwrapped_and_other_answers_are_refused(tmp_path, options):
    source = written(tmp_path, SAYING)
    images = images_of(2, 3)
    found = load_model(f"{source}:Wrapped", **options)
    assert torch.equal(found.scores(images), load_model(f"{source}:make", **options).scores(images))
    for name, said in {
        "Tuple": "returned a tuple instead of a tensor of scores.*wrap it",
        "Dict": r"returned a dict with scores, \?\[31m instead",
        "Boxes": "demur audits classifiers",
        "Map": r"scores of shape|demur audits classifiers",
    }.items():
        with pytest.raises(DemurError, match=said):
            load_model(f"{source}:{name}", **options).scores(images)


def test_other_precisions_become_float32_and_are_said(tmp_path):
    source = written(tmp_path, SAYING)
    found = read_model(f"{source}:Half", preprocess=Preprocess((8, 8)))
    assert {one.dtype for one in found.classifier.parameters()} == {torch.float32}
    assert any("float16" in note for note in found.notes)
    half = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).double()
    wrapped = wrap(half, num_classes=3)
    assert next(wrapped.parameters()).dtype == torch.float32
    assert half[1].weight.dtype == torch.float64  # the user's module stays as it was


# wrap


def test_wrap_counts_classes_on_a_black_image_and_leaves_the_module_alone():
    module = convolutional(4).module
    module.train()
    draws = torch.random.get_rng_state()
    found = wrap(module, preprocess=Preprocess((8, 8), channels=1), class_names=list("abcd"))
    assert (found.num_classes, found.rejects, found.class_names) == (4, False, tuple("abcd"))
    assert found.module is module and module.training
    assert torch.equal(torch.random.get_rng_state(), draws)
    assert wrap(found) is found and demur.wrap is wrap
    rejecting = wrap(module, rejects=True, preprocess=found.preprocess)
    assert (rejecting.num_classes, rejecting.rejects) == (3, True)
    assert wrap(module, num_classes=3, preprocess=found.preprocess).rejects
    for options, said in (
        ({}, "num_classes in Python"),
        ({"num_classes": 9, "preprocess": found.preprocess}, "gives 4 scores"),
        ({"num_classes": 4, "class_names": ["a"]}, "1 class_names for 4"),
        ({"preprocess": Preprocess((5, 5), channels=1)}, "fails on an image of shape"),
    ):
        with pytest.raises(DemurError, match=said):
            wrap(module, **options)
    with pytest.raises(DemurError, match=r"an nn.Module or a Classifier, not dict"):
        wrap({})
    with pytest.raises(DemurError, match="num_classes is 5"):
        wrap(found, num_classes=5)


@given(
    st.integers(1, 3)
    .flatmap(
        lambda count: st.tuples(
            st.lists(st.floats(0, 1), min_size=count, max_size=count),
            st.lists(st.floats(0.1, 2), min_size=count, max_size=count),
        )
    )
    .filter(lambda pair: len(pair[0]) != 2)
)
def test_normalisation_is_the_one_of_torchvision_and_gradients_pass_through_it(pair):
    mean, std = pair
    module = Linear(torch.randn(4, 192, generator=torch.Generator().manual_seed(0)))
    found = wrap(module, preprocess=Preprocess((8, 8), mean=tuple(mean), std=tuple(std)))
    images = images_of(2, 3).requires_grad_()
    expected = module(transforms.functional.normalize(images, mean, std))
    torch.testing.assert_close(found(images), expected)
    (gradient,) = torch.autograd.grad(found(images).sum(), images)
    (reference,) = torch.autograd.grad(expected.sum(), images)
    torch.testing.assert_close(gradient, reference)


# fingerprints


def test_two_loads_have_one_fingerprint_and_every_change_gives_another(tmp_path, files):
    helper = written(tmp_path, "FACTOR = 1.0\n", "helper_of_mine.py")
    text = SAYING + "\nfrom helper_of_mine import FACTOR\n"
    source = f"{written(tmp_path, text)}:said"
    first = read_model(source)
    assert fingerprint_of(source) == first.fingerprint == fingerprint_of(first.classifier)
    first.classifier.scores(images_of(2, 3))
    assert fingerprint_of(first.classifier) == first.fingerprint
    seen = {first.fingerprint}
    with torch.no_grad():
        weight = first.classifier.module.network.layer.weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    seen.add(fingerprint_of(first.classifier))
    written(tmp_path, text.replace("* self.scale", "/ self.scale"))
    seen.add(fingerprint_of(source))
    written(tmp_path, text)
    assert fingerprint_of(source) == first.fingerprint
    Path(helper[3:]).write_text("FACTOR = 2.0\n")
    seen.add(fingerprint_of(source))
    seen.add(read_model(source, model_kwargs={"scale": 2.0}).fingerprint)
    seen.add(read_model(source, preprocess=PreprocessOverrides(mean=(0.25,))).fingerprint)
    assert len(seen) == 6
    tiny = files.folder / "tiny.pth"
    one, two = (read_model(f"timm:{TINY}", checkpoint=tiny).fingerprint for _ in range(2))
    assert one == two


# bundles, and what is no model


def test_bundles_are_read_and_may_be_told_their_preprocessing(tmp_path):
    classifier = Classifier(networks.dnr_cnn(10), 10)
    save_model(classifier, tmp_path / "saved")
    images = images_of(2, 1, 28)
    found = load_model(str(tmp_path / "saved"), preprocess=PreprocessOverrides(img_size=28))
    assert torch.equal(found.scores(images), classifier.scores(images))
    assert found.preprocess == Preprocess((28, 28), channels=1)
    assert fingerprint_of(tmp_path / "saved") == fingerprint_of(str(tmp_path / "saved"))
    # A network that demur describes stays as it is when it is wrapped, so that a bundle has it.
    save_model(wrap(networks.dnr_cnn(10), num_classes=10), tmp_path / "wrapped")
    assert torch.equal(load_model(tmp_path / "wrapped").scores(images), classifier.scores(images))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DemurError, match=r"no file config.json"):
        load_model(tmp_path / "empty")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("torchvision:resnet19", "no classifier 'resnet19'. Did you mean 'resnet18'"),
        ("torchvision:resnet18@V9", "unknown weights .* Known: DEFAULT, IMAGENET1K_V1"),
        ("timm:resnet19", "timm has no model 'resnet19'. Did you mean 'resnet1"),
        ("timm:resnet18.a9_in1k", "timm has no weights 'resnet18.a9_in1k'. Did you mean 'resnet18"),
        ("timm:davit_huge", "timm has no weights of davit_huge: give some as checkpoint=FILE"),
        ("timm:vit_small_patch14_dinov2", "gives features: it has no classes"),
        ("tim:resnet18", "unknown source of models 'tim:'. Did you mean 'timm:'"),
        ("tv:resnet18", r"unknown source of models 'tv:'.*torchvision:"),
        ("hf:owner/name", "hf: is not supported yet: hf:owner/name. Write a factory"),
        ("https://example.org/x", "https: is not supported yet"),
        ("model.onnx", "does not read .onnx files yet: model.onnx.*a folder that demur saved"),
        ("model.pt2", "does not read .pt2 files yet"),
        ("no_such.py", "there is no file no_such.py"),
        (" ", "no model is named: give one of py:, timm:"),
        ("no/such/model", "there is no such file or folder"),
        ("no/such/model.pth", "there is no such file or folder"),
        ("py:model.py", "names no factory: write py:FILE.py:FACTORY"),
        ("py:no_such.py:make", "there is no file"),
        ("py:no_such_package.x:make", "there is no module 'no_such_package'"),
        ("py:json.nothing:make", "there is no module 'json.nothing'"),
        ("py:json:dump_", "has no factory 'dump_'. Did you mean 'dump"),
        ("\x1b[31m" + "x" * 500, r"\?\[31mxxx.*is no usable path"),
    ],
)
def test_what_is_no_model_is_refused_in_one_line_with_a_remedy(source, said):
    with pytest.raises(DemurError, match=said) as caught:
        load_model(source)
    assert len(str(caught.value)) < 600 and str(caught.value).isprintable()


@pytest.mark.parametrize(("words", "said"), [("net.py", "NAME"), ("net.py:make", "make")])
def test_a_python_file_without_its_source_is_told_how_to_be_named(
    words, said, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text("raise ValueError")
    with pytest.raises(DemurError, match=f"name the function in it.*, py:net.py:{said}[.]"):
        load_model(words)


def test_options_that_a_source_does_not_take_are_refused(files, tmp_path):
    path = files.folder / "ten.pth"
    save_model(Classifier(networks.dnr_cnn(10), 10), tmp_path)
    for source, options, said in (
        (f"timm:{TINY}", {"arch": "timm:resnet18"}, "arch does not apply to timm's models"),
        ("py:a.py:b", {"checkpoint": path}, "checkpoint does not apply to a py: source"),
        (tmp_path, {"model_kwargs": {"a": 1}}, "model_kwargs does not apply to a bundle"),
        (path, {}, "has weights alone: give their architecture"),
        (path, {"arch": "resnet18"}, "arch is timm:NAME or torchvision:NAME"),
        (path, {"arch": f"timm:{TINY}", "checkpoint": path}, "leave checkpoint out"),
        (f"timm:{TINY}", {"model_kwargs": {"pretrained": True}}, "cannot set pretrained"),
        (f"timm:{TINY}", {"num_classes": 7}, "have 1000 classes, not 7"),
        (f"timm:{TINY}", {"checkpoint": path, "model_kwargs": {"depth": 1}}, "cannot be built"),
    ):
        with pytest.raises(DemurError, match=said):
            load_model(source, **options)
    torch.jit.script(nn.Linear(1, 2)).save(str(tmp_path / "a.pt"))
    with pytest.raises(DemurError, match="a TorchScript file is not supported yet"):
        load_model(tmp_path / "a.pt", arch=f"timm:{TINY}")


def test_overrides_must_be_complete_and_in_range():
    base = Preprocess((224, 224), 256, mean=(0.5,), std=(0.5,))
    assert PreprocessOverrides(img_size=112).applied(base) == replace(
        base, size=(112, 112), resize=128
    )
    assert PreprocessOverrides(img_size=288, crop_pct=0.9).applied(base).resize == 320
    for wrong, said in (
        ({"crop_pct": 0}, "crop_pct must be"),
        ({"img_size": 0}, "at least one pixel"),
        ({"mean": (float("nan"),)}, "must be finite"),
        ({"interpolation": "cubic"}, "interpolation is one of"),
        ({"std": (-1.0,)}, "std must be positive"),
        ({"mean": (-0.5,)}, r"mean must be in \[0, 1\].* not -0.5.$"),
        ({"mean": (127.0,), "std": (128.0,)}, r"mean must be in \[0, 1\].* 127/255 is 0.498"),
        ({"mean": (0.5,) * 3, "std": (58.4, 57.1, 57.4)}, r"std must be .* 58.4/255 is 0.229"),
    ):
        with pytest.raises(DemurError, match=said):
            PreprocessOverrides(**wrong).applied(base)
    PreprocessOverrides(mean=(0.0,), std=(1 / 255,)).applied(base)  # pixels from 0 to 255
    for wrong in ({"mean": (0.5,)}, {"crop_pct": 0.9}):
        with pytest.raises(DemurError, match=r"give (mean and std|img_size)"):
            PreprocessOverrides(**wrong).applied(None)


def test_the_examples_of_the_documentation_run_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).resolve().parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(code, names)
    assert names["classifier"].class_names == ("cat", "dog", "none of these")
    assert names["rejecting"].rejects and names["rejecting"].class_names == ("cat", "dog")
    assert names["wrapped"].num_classes == 10
    assert names["smaller"].preprocess.interpolation == "bicubic"
    assert names["found"].fingerprint == names["fingerprint_of"]("py:model.py:make")
    assert "training mode" in names["found"].notes[0]


@pytest.mark.real_data
def test_real_weights_answer_as_the_network_of_the_studies_does(data_root):
    path = data_root / "imagenet" / "weights" / "resnet18.safetensors"
    classifier = load_model(path, arch="torchvision:resnet18")
    photos = sorted((data_root / "imagenet" / "photos").glob("*.jpg"))[::20]
    images = torch.cat(
        [prepared(Image.open(p).convert("RGB"), classifier.preprocess) for p in photos]
    )
    with torch.no_grad():
        expected = networks.imagenet_network("resnet18", path)(images)
    agree(classifier, images, expected)
    names = [classifier.class_names[one].replace(" ", "_") for one in classifier.predict(images)]
    right = sum(
        path.stem.partition("_")[2] == name for path, name in zip(photos, names, strict=True)
    )
    assert right >= 0.6 * len(photos)
