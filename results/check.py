"""Say which committed results another state of the code computed, and whether the documents say so.

python results/check.py    # exit code 1 if a result is stale: `make release-check`
"""

import json
import sys
from pathlib import Path

from demur.commands.run import STUDIES, code_of

ROOT = Path(__file__).resolve().parents[1]
MARK = "> These figures were computed by an earlier state of the code"
"""The beginning of the line that marks the page of a study whose code has changed since."""


def stale() -> list[str]:
    """Give the studies whose committed results are of another state of the code."""
    found = []
    for path in sorted((ROOT / "results").glob("*/results.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        study = results["experiment"]
        if study not in STUDIES or results.get("code", "") != code_of(study):
            found.append(study)
    return found


def marked(study: str) -> bool:
    """Say whether the page of a study is marked."""
    return MARK in (ROOT / "docs" / f"{study}.md").read_text(encoding="utf-8")


def main() -> int:
    """Print what is stale."""
    old = stale()
    for study in old:
        said = "" if marked(study) else f"; docs/{study}.md does not say so"
        print(f"results/{study}-desk: computed by another state of the code{said}")
    if not old:
        print("All results are of this state of the code.")
    return 1 if old else 0


if __name__ == "__main__":
    sys.exit(main())
