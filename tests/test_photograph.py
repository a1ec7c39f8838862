"""`demur attack`: it attacks a photograph and reports what the stored picture keeps."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision import models as architectures

from command import demur
from demur import Classifier, DemurError
from demur.commands.photograph import attack_photograph
from demur.data import fitted, read_photo, to_float
from demur.networks import CLASSES, class_number, imagenet_network, weights
from demur.report.pictures import save_picture, save_triple


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A network with random weights, for pictures of 64 pixels, and a photograph."""
    root = tmp_path_factory.mktemp("root")
    (root / weights.FOLDER).mkdir(parents=True)
    torch.manual_seed(0)
    about = {"input_size": "64"}
    save_file(
        architectures.squeezenet1_0(weights=None).state_dict(),
        root / weights.FOLDER / "squeezenet1_0.safetensors",
        metadata=about,
    )
    Image.fromarray(torch.randint(0, 256, (80, 100), dtype=torch.uint8).numpy()).save(
        root / "grey.png"
    )
    return root


def runner_up(root):
    """The class that the random network takes the photograph for next."""
    network = imagenet_network("squeezenet1_0", root=root)
    seen = fitted(read_photo(root / "grey.png"), network.resize, network.size).pixels
    return int(Classifier(network, 1000).scores(to_float(seen[None])).topk(2).indices[0, 1])


def test_classes_are_found_by_number_wordnet_id_and_name():
    assert (
        class_number(1)
        == class_number("1")
        == class_number("n01443537")
        == class_number("goldfish")
        == class_number(" Goldfish ")
        == 1
    )
    assert [class_number(name) for name in ("tench", "n15075141", "toilet tissue")] == [0, 999, 999]
    with pytest.raises(DemurError, match="goldfish"):
        class_number("goldfisch")
    for wrong in ("1000", "n99999999", "quux"):
        with pytest.raises(DemurError):
            class_number(wrong)


def test_what_the_file_holds_is_what_was_attacked_and_told(root, tmp_path):
    """R1 and R3 on the stored picture."""
    target = runner_up(root)
    found = attack_photograph(root / "grey.png", "squeezenet1_0", target, data_root=root, steps=200)
    assert found.success and "grey" in found.photo.converted
    stored = save_picture(found.attacked, tmp_path / "attacked.png")
    again = read_photo(tmp_path / "attacked.png").pixels
    assert torch.equal(stored, found.attacked) and torch.equal(again, stored)
    network = imagenet_network("squeezenet1_0", root=root)
    assert int(Classifier(network, 1000).predict(to_float(again[None]))) == target
    moved = (to_float(again[None]) - to_float(found.original[None])).double()
    assert float(moved.norm()) == pytest.approx(found.l2, rel=1e-6) and float(
        moved.abs().max()
    ) == pytest.approx(found.linf, rel=1e-6)
    save_triple(found.original, found.attacked, tmp_path / "triple.png")
    with Image.open(tmp_path / "triple.png") as triple:
        assert triple.size == (3 * 64 + 2 * 8, 64)
    with pytest.raises(DemurError, match="must end in"):
        save_picture(found.attacked, tmp_path / "attacked.jpg")


def test_the_command_writes_both_pictures_and_says_what_changed(root, tmp_path):
    target = runner_up(root)
    done = demur(
        "attack",
        root / "grey.png",
        "--network",
        "squeezenet1_0",
        "--target",
        target,
        "--data-root",
        root,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "grey-attacked.png").is_file() and (
        tmp_path / "grey-attacked-triple.png"
    ).is_file()
    assert (
        f"after, as grey-attacked.png has it: {CLASSES[target]}" in done.stdout
        and "grey, converted to three equal channels" in done.stdout
        and "the middle, 64x64 pixels" in done.stdout
    )


def test_one_line_says_what_is_wrong(root, tmp_path):
    Image.fromarray(torch.zeros(20, 20, dtype=torch.uint8).numpy()).save(tmp_path / "small.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "other.json").write_text(json.dumps({}))
    fine = root / "grey.png"
    for photo, network, target, more, said in (
        ("none.png", "squeezenet1_0", "goldfish", [], "there is no photograph none.png"),
        ("text.png", "squeezenet1_0", "goldfish", [], "cannot read text.png"),
        ("small.png", "squeezenet1_0", "goldfish", [], "20x20 pixels; the network needs 64x64"),
        (fine, "squeezenet", "goldfish", [], "Did you mean 'squeezenet1_0'"),
        (fine, "resnet18", "goldfish", [], "demur data download resnet18"),
        (fine, "squeezenet1_0", "goldfisch", [], "goldfish"),
        (fine, "squeezenet1_0", "goldfish", ["--weights", "other.json"], "weights are wanted"),
        (fine, "squeezenet1_0", "goldfish", ["--steps", "0"], "steps"),
        (fine, "squeezenet1_0", "goldfish", ["--out", "out.jpg"], "must end in .png"),
        (
            fine,
            "squeezenet1_0",
            "goldfish",
            ["--steps", "1", "--step-size", "1e-6"],
            "does not take it for goldfish after 1 steps",
        ),
    ):
        done = demur(
            "attack",
            photo,
            "--network",
            network,
            "--target",
            target,
            "--data-root",
            root,
            *more,
            cwd=tmp_path,
        )
        assert done.returncode == 2 and said in " ".join(done.stderr.split()), (
            done.stdout,
            done.stderr,
        )
        assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr


def test_a_photograph_that_is_taken_for_the_target_already_is_no_attack(root):
    network = imagenet_network("squeezenet1_0", root=root)
    seen = fitted(read_photo(root / "grey.png"), network.resize, network.size).pixels
    answer = int(Classifier(network, 1000).predict(to_float(seen[None])))
    with pytest.raises(DemurError, match=r"already classified as .*: choose another target"):
        attack_photograph(root / "grey.png", "squeezenet1_0", answer, data_root=root)
    assert len(CLASSES) == 1000


def test_a_real_photograph_becomes_a_goldfish(data_root, tmp_path):
    photo = data_root / "imagenet" / "photos" / "n01704323_triceratops.jpg"
    done = demur(
        "attack",
        photo,
        "--network",
        "mobilenet_v2",
        "--target",
        "goldfish",
        "--data-root",
        data_root,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (
        "before: triceratops" in done.stdout
        and "after, as n01704323_triceratops-attacked.png has it: goldfish" in done.stdout
    )
