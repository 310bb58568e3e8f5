"""Makes the measured tables of the docs out of results/*.json:  python dev/make_results.py [--check]

They go between the two marks below in docs/results.md, or, while that page has no marks, into docs/measured.md.
--check writes nothing, and exits with 1 where the page is not what the results make.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from minutegpt import results

BEGIN, END = "<!-- made by dev/make_results.py: begin -->", "<!-- made by dev/make_results.py: end -->"
TITLE = "# Measured\n\nAll of this page is made from `results/` by `dev/make_results.py`.\n\n"
HOW = (
    "Each table is one file of `results/`, and the command that made it. A difference is the mean over pairs of runs "
    "with the same seed, with the interval of `minutegpt/paired.py`: 95% for all the rows and looks of a table "
    "together. Below 0 is better.\n"
)


def tables(folder: Path) -> str:
    """A section for each file of results, in the order of their names; records after the others."""
    found = [results.load(path) for path in sorted(folder.glob("*.json"))]
    found.sort(key=lambda result: result["kind"] == "record")
    sections = [f"### {each['name']}\n\n    {each['command']}\n\n{results.markdown(each)}" for each in found]
    return "\n".join([HOW, *sections])


def page(docs: Path, folder: Path) -> tuple[Path, str]:
    """The page that holds the tables, and what its text has to be."""
    path = docs / "results.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if BEGIN not in text or END not in text:
        path, text = docs / "measured.md", f"{TITLE}{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    return path, f"{before}{BEGIN}\n{tables(folder)}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    path, text = page(ROOT / "docs", ROOT / "results")
    if "--check" not in sys.argv[1:]:
        path.write_text(text, encoding="utf-8", newline="\n")
        print(f"written: {path.relative_to(ROOT)}")
    elif not path.exists() or path.read_text(encoding="utf-8") != text:
        raise SystemExit(f"error: {path.relative_to(ROOT)} is not what results/ makes. Type python dev/make_results.py")
