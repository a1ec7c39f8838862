"""The report in a real browser: no errors, working filters, no sideways scrolling on a phone."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from demur.report import render
from test_report import ITEM, figure, write_run

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on the path")

FLAGS = [
    *(
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-sync",
    ),
    *(
        "--disable-background-networking",
        "--disable-component-update",
        "--allow-file-access-from-files",
    ),
    *("--virtual-time-budget=3000", "--enable-logging=stderr", "--dump-dom"),
]

# A page that holds the report at a phone's width, works its filters, and writes down what it saw.
PHONE = """<!DOCTYPE html><iframe src="report.html" width="360" height="800"></iframe><pre></pre>
<script>
document.querySelector("iframe").addEventListener("load", event => {
  const page = event.target.contentDocument, root = page.documentElement;
  const all = selector => [...page.querySelectorAll(selector)];
  const shown = () => all(".card").filter(card => card.getClientRects().length).length;
  const press = text => all("button").find(button => button.textContent.includes(text)).click();
  const pressed = () => all("[data-facet] [aria-pressed=true]").map(one => one.dataset.value);
  const seen = { inner: root.clientWidth, scroll: root.scrollWidth, first: shown() };
  seen.basis = page.querySelector(".basis").getClientRects().length;
  press("Intervals"); seen.basisPressed = page.querySelector(".basis").getClientRects().length;
  press("Show all"); seen.all = shown(); seen.focus = page.activeElement.className;
  press("rejected"); seen.rejected = shown(); seen.count = page.getElementById("count").textContent;
  press("other"); seen.both = shown(); seen.pressed = pressed(); seen.hash = page.location.hash;
  document.querySelector("pre").textContent = JSON.stringify(seen);
});</script>"""


def browse(folder: Path, address: str) -> str:
    """The page's DOM after its scripts ran; fails on any message in the console."""
    command = [
        str(BROWSER),
        *FLAGS,
        f"--user-data-dir={folder / 'profile'}",
        (folder / "report.html").as_uri() + address,
    ]
    if not address.startswith("#"):
        command[-1] = (folder / address).as_uri()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    outcomes = ["correct", "rejected", "wrong"]
    items = [
        {**ITEM, "outcome": outcomes[i % 3], "model": ["Digits & <b>", "other"][i % 2]}
        for i in range(60)
    ]
    long = [
        figure(f"a_rather_long_column_name_{i}", 12.5, row="a_row_name_without_any_break" * 3)
        for i in range(8)
    ]
    intervals = [
        figure(name, 33.3, low=30, high=36, paper=94.09, paper_sd=12.5, sd=13.2)
        for name in outcomes
    ]
    tables = [
        {"title": "Outcomes", "rows": intervals},
        {"title": "Wide", "rows": long},
        {"title": "One", "rows": long[:1]},
    ]
    render(
        write_run(
            tmp_path,
            items=items,
            tables=tables,
            config={"path": "x" * 300},
            versions={"torch": "y" * 200},
        )
    )
    return tmp_path


def test_the_address_presets_the_filter(folder: Path) -> None:
    dom = browse(folder, "#outcome=wrong&model=Digits+%26+%3Cb%3E")
    cards = re.findall(
        r'<li class="card" data-outcome="(\w+)" data-model="([^"]*)"[^>]*?( hidden="")?>', dom
    )
    assert len(cards) == 60
    visible = [card[:2] for card in cards if not card[2]]
    assert len(visible) == 10
    assert len(set(visible)) == 1
    assert visible[0][0] == "wrong"
    assert "10 images, of 60 in all" in dom


def test_a_phone_scrolls_one_way_and_filters_by_buttons(folder: Path) -> None:
    (folder / "phone.html").write_text(PHONE)
    found = re.search(r"<pre>(.*?)</pre>", browse(folder, "phone.html"))
    assert found
    seen = json.loads(found[1].replace("&amp;", "&"))
    # The upright scroll bar takes its part of the 360.
    assert seen.pop("scroll") == seen.pop("inner") <= 360
    assert seen == {
        "first": 24,
        "basis": 0,
        "basisPressed": 1,
        "all": 60,
        "focus": "card",
        "rejected": 20,
        "count": "20 images, of 60 in all",
        "both": 10,
        "pressed": ["rejected", "other"],
        "hash": "#outcome=rejected&model=other",
    }
