"""What the documents say to type works as written."""

import importlib.util
import re
from pathlib import Path
from typing import get_args

import pytest
import torch
from pydantic import BaseModel, Field, create_model

from demur import data
from demur.evaluation.profiles import load_profile
from demur.studies import (
    background_class,
    comparison,
    localized_training,
    neural_rejection,
    smoothing,
)

ROOT = Path(__file__).resolve().parents[1]
PROFILES = (ROOT / "docs" / "profiles.md").read_text(encoding="utf-8")


def script(path):
    """Import a script that lies outside of the package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATE = script(ROOT / "docs" / "generate.py")


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.slow
def test_the_readmes_example_runs_by_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = blocks((ROOT / "README.md").read_text(encoding="utf-8"), "python")[-1]
    names = {}
    exec(code, names)
    predicted = names["model"].predict(names["images"])
    assert float((predicted == names["labels"]).float().mean()) > 0.8
    assert names["audit"].threat("linf:0.1").n == 50


def test_pages_of_studies_say_where_their_figures_are_of_another_state_of_the_code():
    check = script(ROOT / "results" / "check.py")
    old = set(check.stale())
    pages = {path.parent.name.removesuffix("-desk") for path in ROOT.glob("results/*/results.json")}
    assert {page for page in pages if check.marked(page)} == old


@pytest.mark.parametrize("page", GENERATE.PAGES)
def test_figures_of_studies_and_keys_of_profiles_are_those_of_the_files_and_the_code(page):
    """python docs/generate.py writes them."""
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    assert GENERATE.generated(page, text) == text
    if page != "profiles":
        # No table of measured figures stands outside of the markers.
        outside = GENERATE.PART.sub("", text).split("## What came out", 1)[1].split("\n## ", 1)[0]
        assert "| ---" not in outside and "|---" not in outside


def test_a_figure_that_was_changed_by_hand_is_found():
    """Negative control."""
    text = (ROOT / "docs" / "smoothing.md").read_text(encoding="utf-8")
    figure = re.search(r"\| (\d\d\.\d\d) \|", text).group(1)
    wrong = text.replace(f"| {figure} |", f"| {figure}1 |", 1)
    assert wrong != text
    assert GENERATE.generated("smoothing", wrong) == text


def test_the_description_of_a_field_gives_the_words_of_a_key():
    fields = {
        "epochs": Field(description="passes over the images | number"),
        "eps": Field(0.1, description="the largest change | in [0, 1]"),
        "images": Field(None, description="test images | number | all of them"),
        "old": Field(3),
    }
    kinds = {"epochs": int, "eps": float, "images": int | None, "old": int}
    model = create_model("Part", **{name: (kinds[name], one) for name, one in fields.items()})
    page = "| key | meaning | unit | default |\n|---|---|---|---|\n| `old` | of the page | m | 2 |"
    ((_, known),) = GENERATE.tables_of(model)
    assert GENERATE.rows_of(known, page) == [
        "| `epochs` | passes over the images | number | |",
        "| `eps` | the largest change | in [0, 1] | 0.1 |",
        "| `images` | test images | number | all of them |",
        "| `old` | of the page | m | 3 |",
    ]


def test_the_readme_is_short():
    """A newcomer reads it whole."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize(
    "page",
    ["index", "concepts", "defenses", "attacks", "evaluation", "harden", "export", "certificates"],
)
@pytest.mark.slow
def test_the_examples_of_a_page_run_as_written(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "example"}
    for code in blocks((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"), "python"):
        if "records.parquet" in code:  # the file of a run that the page names
            folder = tmp_path / "runs" / "comparison-demo"
            folder.mkdir(parents=True)
            names["outputs"].records().write_parquet(folder / "records.parquet")
        exec(code, names)
    for made in ("clf", "defended"):
        if page == "index":
            predicted = names[made].predict(names["images"])
            assert float((predicted == names["labels"]).float().mean()) > 0.8
    if page == "export":
        assert len(names["answers"]) == 5 and set(names["answers"]) <= {*"0123456789"}
    if page == "defenses":
        found = names["outcomes"](names["defended"], names["rest"].to_float(), names["rest"].labels)
        assert float((found == 0).float().mean()) > 0.7
        names["defended"].save(tmp_path / "saved")
        assert names["load_model"](tmp_path / "saved").rejects


@pytest.mark.slow
def test_the_example_of_neural_rejection_runs_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, hardening = blocks((ROOT / "docs" / "rejection.md").read_text(encoding="utf-8"), "python")
    names = {}
    exec(code, names)
    images, labels = names["test"].to_float(), names["test"].labels
    for defended in (names["deep"], names["again"], names["single"]):
        came = torch.bincount(names["outcomes"](defended, images, labels), minlength=3) / len(
            labels
        )
        assert came[2] < 0.05 and (defended is names["single"] or came[0] > 0.7)
    exec(hardening, names)
    assert names["hardened"].added_ > 0


def sections(model, name=""):
    """Names of the TOML tables, each with its keys and whether they have a default."""
    kinds = {
        key: (field.annotation, *get_args(field.annotation))
        for key, field in model.model_fields.items()
    }
    inner = {
        key: next(
            (kind for kind in own if isinstance(kind, type) and issubclass(kind, BaseModel)), None
        )
        for key, own in kinds.items()
    }
    inner = {key: kind for key, kind in inner.items() if kind}
    yield name, {key: field for key, field in model.model_fields.items() if key not in inner}
    for key, kind in inner.items():
        yield from sections(kind, f"{name}.{key}".lstrip("."))


@pytest.mark.parametrize(
    ("experiment", "section", "fields"),
    [
        pytest.param(name, *one, id=f"{name} {one[0]}")
        for name, profile in {
            "background-class": background_class.Profile,
            "localized-training": localized_training.Profile,
            "neural-rejection": neural_rejection.Profile,
            "smoothing": smoothing.Profile,
            "comparison": comparison.Profile,
        }.items()
        for one in sections(profile)
    ],
)
def test_every_key_of_a_profile_is_described_with_its_default(experiment, section, fields):
    text = PROFILES.split(f"## Every key of `{experiment}`", 1)[1].split("## ", 1)[0]
    header = (
        f"`[{section}]`" if f"`[{section}]`" in text else f"`[[{section}]]`"
    )  # a table, or one of several
    part = text.split(header, 1)[1].split("`[", 1)[0] if section else text.split("`[", 1)[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in part.splitlines()
        if line.startswith("| `")
    ]
    described = {row[0].strip("`"): row for row in rows}
    assert list(described) == list(fields)
    for key, field in fields.items():
        _, meaning, unit, default = described[key]
        assert meaning and unit and bool(default) == (not field.is_required())
        if isinstance(field.default, int | float):
            assert float(default) == field.default
        elif isinstance(field.default, tuple) and field.default:
            assert tuple(map(float, default.split(","))) == field.default


@pytest.mark.slow
def test_the_example_of_localized_training_runs_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(
        (ROOT / "docs" / "localized-training.md").read_text(encoding="utf-8"), "python"
    )
    names = {}
    exec(code, names)
    images, labels = names["test"].to_float(), names["test"].labels
    assert float((names["defended"].predict(images) == labels).float().mean()) > 0.8


@pytest.mark.slow
def test_the_example_of_smoothing_runs_as_written():
    (code,) = blocks((ROOT / "docs" / "smoothing.md").read_text(encoding="utf-8"), "python")
    names = {}
    exec(code, names)
    images, labels = names["test"].to_float(), names["test"].labels
    assert float((names["smooth"].predict(images) == labels).float().mean()) > 0.8


@pytest.mark.slow
def test_the_table_example_shows_that_reliance_on_the_chosen_features_falls(capsys):
    exec((ROOT / "examples" / "tabular.py").read_text(encoding="utf-8"), {"__name__": "example"})
    plain, hardened = (
        [float(word.strip("%")) for word in line.split()[1:]]
        for line in capsys.readouterr().out.splitlines()[1:]
    )
    assert hardened[0] > plain[0] - 5  # clean accuracy stays
    assert (
        hardened[1] > plain[1] + 3 and hardened[2] > plain[2] + 20
    )  # shuffled, attacked: less is lost


@pytest.mark.slow
def test_the_example_of_a_profile_makes_its_images_and_is_ready_to_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,), (profile,) = blocks(PROFILES, "python"), blocks(PROFILES, "toml")
    exec(code, {})
    (tmp_path / "own.toml").write_text(profile)
    assert "demur run background-class --profile own.toml" in PROFILES
    study = background_class.plan(load_profile(background_class, "own.toml"), None, 0)
    assert study.taken.startswith("Data: own + made backgrounds, ")
    # The images of the embedded digits, in classes of the same names, and none lost on the way.
    assert (
        data.load("own").select_classes("0123456789").counts().tolist()
        == data.load("digits").counts().tolist()
    )
