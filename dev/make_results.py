"""Puts the measured tables into docs/results.md, out of results/*.json:  python dev/make_results.py [--check]

The page is written by hand, apart from what is between two marks, where the table of results/NAME.json goes:

    <!-- results: NAME -->
    <!-- end -->

A file of results without a mark on the page is appended at its end, with a mark. --check writes nothing, and exits
with 1 where the page is not what the results make.
"""

import re
import sys
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from minutegpt import results

MARKED = re.compile(r"<!-- results: (\S+) -->\n.*?<!-- end -->", re.S)


def section(result: results.Result) -> str:
    """The commands of a file of results, and its table."""
    lines = [result["command"]] if result["kind"] != "commands" else [
        f"{command}  # {fmean(run['wall_seconds'] for run in result['runs'] if run['command'] == command):.0f} s"
        for command in result["commands"]
    ]  # fmt: skip
    return "".join(f"    {line}\n" for line in lines) + f"\n{results.markdown(result)}"


def page(text: str, folder: Path) -> str:
    """docs/results.md with the tables of all files in the folder. Raises KeyError for a mark without a file."""
    sections = {path.stem: section(results.load(path)) for path in sorted(folder.glob("*.json"))}
    for name in sorted(sections.keys() - set(MARKED.findall(text))):
        text += f"\n## {name}\n\n<!-- results: {name} -->\n<!-- end -->\n"
    return MARKED.sub(lambda mark: f"<!-- results: {mark[1]} -->\n{sections[mark[1]]}<!-- end -->", text)


if __name__ == "__main__":
    path = ROOT / "docs" / "results.md"
    before = path.read_text(encoding="utf-8")
    after = page(before, ROOT / "results")
    if "--check" not in sys.argv[1:]:
        path.write_text(after, encoding="utf-8", newline="\n")
        print(f"written: {path.relative_to(ROOT)}")
    elif before != after:
        raise SystemExit(f"error: {path.relative_to(ROOT)} is not what results/ makes. Type python dev/make_results.py")
