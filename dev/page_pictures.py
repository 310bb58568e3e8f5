"""Pictures of a run's page for the docs, at three moments of the run:  python dev/page_pictures.py out/run.html docs

Writes page-1.png (before training), page-2.png (soon after) and page-3.png (the end) into the folder. Needs Chromium.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from browser import Browser


def pictures(page: Path, folder: Path) -> None:
    with Browser() as browser:
        opened = browser.open(page, width=1280, height=800)
        last = opened.js("evaluations.length") - 1
        for number, evaluation in enumerate((0, min(1, last), last), start=1):
            opened.js(f"show({evaluation})")
            opened.screenshot(folder / f"page-{number}.png")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("error: two arguments are needed. Type python dev/page_pictures.py out/run.html docs")
    pictures(Path(sys.argv[1]), Path(sys.argv[2]))
