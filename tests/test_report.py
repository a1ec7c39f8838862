"""The report: the pivot, what is refused, what is escaped, what a reader sees."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.numpy import save_file

from demur.errors import DemurError
from demur.evaluation.results import Measurement
from demur.report import number, pivot, render

ITEM = {
    "label": "7",
    "model": "Digits + background",
    "attack": "FGS eps 0.25",
    "attacker": "naive",
    "clean_decision": "7",
    "clean_score": 0.99,
    "decision": "reject",
    "score": 0.71,
    "outcome": "rejected",
    "l2": 5.1,
    "linf": 0.25,
}


def figure(column: str, measured: float | None, **more: Any) -> dict[str, Any]:
    return {
        "group": "FGS",
        "row": "Digits",
        "column": column,
        "unit": "%",
        "measured": measured,
        **more,
    }


def results(**changes: Any) -> dict[str, Any]:
    rows = [
        figure(
            "correct",
            9.84,
            paper=5.91,
            paper_sd=1.42,
            sd=0.9,
            splits=3,
            n=37470,
            low=9.5,
            high=10.2,
        ),
        figure("wrong", 90.16, paper=94.09, paper_sd=1.42),
    ]
    series = {
        "name": "Digits",
        "n": 1000,
        "correct": [0.99, 0.2],
        "rejected": [0.01, 0.3],
        "wrong": [0.0, 0.5],
    }
    return {
        "schema": 1,
        "experiment": "background-class",
        "title": "Background class",
        "profile": "desk",
        "source": "McCoyd & Wagner 2018",
        "summary": ["It holds."],
        "seed": 0,
        "config": {"training": {"lr": 1.0}, "letters": ["T", "t"]},
        "versions": {"demur": "0.1.0"},
        "device": "cpu",
        "data": {"name": "emnist-merge", "fingerprint": "9f2c", "images": 299933, "classes": 47},
        "tables": [{"id": "table-5", "title": "Table V", "note": "", "rows": rows}],
        "curves": [
            {
                "id": "c",
                "title": "FGS",
                "note": "",
                "x_label": "eps",
                "x": [0, 0.3],
                "series": [series],
            }
        ],
        "cost": {
            "seconds": 812.4,
            "cells": [{"cell": "train", "seconds": 71.2, "forwards": 0, "backwards": 0}],
        },
        "warnings": [],
    } | changes


def write_run(
    folder: Path,
    items: list[dict[str, Any]] | None = None,
    shape: tuple[int, ...] = (1, 28, 28),
    **changes: Any,
) -> Path:
    (folder / "results.json").write_text(json.dumps(results(**changes)), encoding="utf-8")
    if items is not None:
        random = np.random.default_rng(0)
        original = random.integers(0, 256, (len(items), *shape), dtype=np.uint8)
        attacked = np.clip(original + random.integers(-64, 65, original.shape), 0, 255).astype(
            np.uint8
        )
        tensors = {"original": original, "attacked": attacked}
        save_file(tensors, folder / "gallery.safetensors", metadata={"items": json.dumps(items)})
    return folder


def page(folder: Path, **changes: Any) -> str:
    return render(write_run(folder, **changes)).read_text(encoding="utf-8")


def test_pivot_keeps_first_appearance_and_groups_together() -> None:
    cells = [
        ("A", "x", "n"),
        ("B", "x", "wrong"),
        ("A", "y", "correct"),
        ("A", "x", "wrong"),
        ("A", "x", "rate"),
    ]
    columns, lines = pivot(
        [{"group": g, "row": r, "column": c, "measured": 1.0} for g, r, c in cells]
    )
    # Outcomes come in their own order in the places that outcomes have.
    assert columns == ["n", "correct", "wrong", "rate"]
    assert [(line.group, line.row) for line in lines] == [("A", "x"), ("A", "y"), ("B", "x")]
    assert set(lines[0].cells) == {"n", "wrong", "rate"}


def test_pivot_refuses_two_figures_in_one_cell_and_a_nan() -> None:
    with pytest.raises(DemurError, match="two figures for 'FGS / Digits / correct'"):
        pivot([figure("correct", 1.0), figure("correct", 2.0)])
    with pytest.raises(ValidationError):
        pivot([figure("correct", float("nan"))])


@pytest.mark.parametrize(
    ("measured", "paper_sd", "expected"),
    [(4.1, 1.0, 1), (-0.1, 1.0, -1), (4.0, 1.0, 0), (9.0, None, 0), (None, 1.0, 0)],
)
def test_a_figure_departs_beyond_two_sd(
    measured: float | None, paper_sd: float | None, expected: int
) -> None:
    assert (
        Measurement("r", "c", measured=measured, paper=2.0, paper_sd=paper_sd).departs == expected
    )


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (310912.0, "", "310,912"),
        (0.873, "", "0.873"),
        (-3.926, "%", "−3.93"),
        (100.0, "%", "100.00"),
        (0.0, "%", "0.00"),
        (0.00042, "%", "0.00042"),
        (1234.5, "s", "1,234"),
    ],
)
def test_number(value: float, unit: str, text: str) -> None:
    assert number(value, unit) == text


def test_page_shows_measured_beside_paper_and_how_to_run_it_again(tmp_path: Path) -> None:
    html = page(tmp_path)
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", html)).replace("\u00a0", " ")
    assert "9.84 ± 0.90" in text
    assert "paper 5.91 ± 1.42 (+3.93)" in text
    assert "more than 2 sd above the paper" in text
    assert "95 % over these images 9.50–10.20, n 37,470, 3 splits" in text
    assert "demur run background-class --profile desk --data-root ROOT" in text
    assert "--seed" not in text and "--device" not in text
    assert "13 min 32 s" in text
    assert "training.lr" in text
    assert 'aria-label="measured: correct 9.84 %, wrong 90.16 %"' in html
    assert "wrong is highest, 50.0 %, at 0.3." in html
    assert 'id="gallery"' not in html


def test_the_command_has_what_the_run_needs_and_no_more(tmp_path: Path) -> None:
    html = page(
        tmp_path,
        profile="my own.toml",
        seed=3,
        device_asked="cpu",
        data={"name": "my own.npz", "rooted": False},
    )
    assert (
        "demur run background-class --profile &#39;my own.toml&#39; --seed 3 --device cpu</code>"
        in html
    )


def test_the_papers_brackets_are_explained_where_there_are_any(tmp_path: Path) -> None:
    assert "the paper’s own stand small" in page(tmp_path)
    assert "paper’s" not in page(
        tmp_path, tables=[{"title": "Own", "rows": [figure("wrong", 1.0)]}]
    )


def test_a_cards_number_is_named(tmp_path: Path) -> None:
    assert "<b>7</b> <small>softmax 0.99</small>" in page(tmp_path, items=[ITEM])


def test_what_is_not_measured_says_so_and_keeps_the_paper(tmp_path: Path) -> None:
    rows = [figure("wrong", None, paper=100.0, note="not yet measured"), figure("correct", None)]
    html = page(tmp_path, tables=[{"title": "Table V", "rows": rows}])
    assert '<span class="missing">not yet measured</span>' in html
    assert '<span class="missing">not measured</span>' in html
    assert "<i>paper</i> 100.00" in html
    assert "None" not in html


def test_a_run_without_the_optional_parts_renders(tmp_path: Path) -> None:
    needed = ("schema", "experiment", "title", "profile", "seed")
    bare = {name: value for name, value in results().items() if name in needed} | {
        "data": {"name": "digits"},
        "tables": [],
    }
    (tmp_path / "results.json").write_text(json.dumps(bare))
    assert "None" not in render(tmp_path).read_text(encoding="utf-8")


def test_a_curve_of_one_x_is_a_table_only(tmp_path: Path) -> None:
    series = {"name": "Digits", "correct": [0.5], "rejected": [0.2], "wrong": [0.3]}
    html = page(
        tmp_path, curves=[{"title": "One", "x_label": "eps", "x": [0.3], "series": [series]}]
    )
    assert "<details open>" in html
    assert 'class="panel"' not in html


EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"


def test_everything_from_the_run_folder_is_escaped(tmp_path: Path) -> None:
    rows = [
        figure(EVIL, 1.0, group=EVIL, row=EVIL, unit=EVIL, note=EVIL),
        figure("wrong", None, note=EVIL),
    ]
    series = {
        "name": EVIL,
        "n": 1,
        "correct": [0.5, 0.2],
        "rejected": [0.2, 0.3],
        "wrong": [0.3, 0.5],
    }
    texts = dict.fromkeys(("experiment", "title", "profile", "source", "device"), EVIL)
    html = page(
        tmp_path,
        items=[
            {
                **ITEM,
                **dict.fromkeys(
                    ("label", "model", "attack", "attacker", "clean_decision", "decision"), EVIL
                ),
            },
            ITEM,
        ],
        summary=[EVIL],
        warnings=[EVIL],
        config={EVIL: {EVIL: EVIL}},
        versions={EVIL: EVIL},
        data={"name": EVIL, "fingerprint": EVIL},
        tables=[{"id": EVIL, "title": EVIL, "note": EVIL, "rows": rows}],
        curves=[
            {
                "id": EVIL,
                "title": EVIL,
                "note": EVIL,
                "x_label": EVIL,
                "x": [0, 1],
                "series": [series],
            }
        ],
        cost={"seconds": 1, "cells": [{"cell": EVIL, "seconds": 1, "forwards": 0, "backwards": 0}]},
        **texts,
    )
    assert html.count("<script") == 1
    assert "<img src=x" not in html
    # What is copied into a shell is quoted for the shell, too.
    assert "demur run &#39;&lt;script&gt;" in html


def test_page_loads_nothing(tmp_path: Path) -> None:
    html = page(tmp_path, items=[ITEM])
    links = re.findall(r"""(?:src|href|action|poster|srcset|data)\s*=\s*["']([^"']*)""", html)
    assert links
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*([^)]*)\)", html))
    assert "@import" not in html
    assert not re.search(r"\b(?:https?|ftp|wss?):", html)
    assert "default-src 'none'" in html
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids))


def test_rendering_twice_gives_the_same_bytes_and_leaves_no_other_file(tmp_path: Path) -> None:
    first = page(tmp_path, items=[ITEM])
    assert page(tmp_path, items=[ITEM]) == first
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "gallery.safetensors",
        "report.html",
        "results.json",
    ]


@pytest.mark.parametrize(("count", "shape"), [(400, (1, 28, 28)), (60, (3, 224, 224))])
def test_page_stays_below_ten_megabytes_even_for_noise(
    tmp_path: Path, count: int, shape: tuple[int, ...]
) -> None:
    path = render(write_run(tmp_path, items=[ITEM] * count, shape=shape))
    assert path.stat().st_size < 10_000_000
    assert path.read_text(encoding="utf-8").count('<li class="card"') == count


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b'{"schema": 1, "tit',
        b"\xff\xfe\x00",
        b"[1, 2]",
        b'{"loss": 0.3}',
        json.dumps(results(schema=2)).encode(),
        json.dumps(results(tables=[{"title": "T", "rows": [figure("wrong", math.nan)]}])).encode(),
        json.dumps(results(tables=[{"title": "T", "rows": [figure("wrong", 1.0)] * 2}])).encode(),
        json.dumps(results(curves=[{"title": "c", "x_label": "x", "x": [0, 1], "series": [
            {"name": "short", "correct": [1], "rejected": [0], "wrong": [0]}]}])).encode(),
        json.dumps(results(title=3) | {"two\nlines": 1}).encode(),
    ],
    ids=["missing", "empty", "truncated", "binary", "list", "foreign", "schema", "nan", "twice",
         "lengths", "type"],
)  # fmt: skip
def test_what_is_no_result_is_refused_in_one_line(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(DemurError) as refusal:
        render(tmp_path)
    message = str(refusal.value)
    assert str(tmp_path / "results.json") in message
    assert "demur run STUDY" in message
    assert "\n" not in message
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("fault", ["bytes", "items", "count", "shape", "type", "tensor"])
def test_what_is_no_gallery_is_refused_in_one_line(tmp_path: Path, fault: str) -> None:
    write_run(tmp_path)
    images = np.zeros((2, 1, 8, 8), np.float32 if fault == "type" else np.uint8)
    tensors = {
        "original": images,
        "attacked": images[:, :, :4].copy() if fault == "shape" else images,
    }
    if fault == "tensor":
        del tensors["attacked"]
    items = [ITEM] * (3 if fault == "count" else 2)
    save_file(
        tensors,
        tmp_path / "gallery.safetensors",
        metadata={"items": "{" if fault == "items" else json.dumps(items)},
    )
    if fault == "bytes":
        (tmp_path / "gallery.safetensors").write_bytes(b"not a gallery")
    with pytest.raises(DemurError) as refusal:
        render(tmp_path)
    assert str(tmp_path / "gallery.safetensors") in str(refusal.value)
    assert "\n" not in str(refusal.value)
