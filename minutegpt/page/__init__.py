"""run.html: one file that shows a run, opened from disk, without a request to anywhere.

    write(path, data)  # data: what collect.py finds in a run's folder
    write(path, data, extra_scripts={"engine": source}, payload={"weights": base64})  # export.py adds the model

The page is template.html, with style.css, page.js and the data put in. All that comes from a run is in one JSON object
in a <script type="application/json">. page.js shows it with textContent alone, so that a text never becomes markup. A
Content-Security-Policy forbids every request, and every script that is not in the list of hashes.

Extra scripts run after page.js, in their order, and find its functions: token, colour, explain, showAttention. Their
own names go into a function or a block, so that they do not meet those of page.js. A script NAME has the id
"script-NAME", so that a Worker can start from its text. A payload NAME is <script type="text/plain" id="payload-NAME">.
The section with the id "model" is hidden until an extra script shows it.
"""

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minutegpt.files import atomic_write

FOLDER = Path(__file__).resolve().parent
DATA = re.compile(rb'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)


def write(
    path: str | Path,
    data: Mapping[str, Any],
    extra_scripts: Mapping[str, str] | None = None,
    payload: Mapping[str, str] | None = None,
) -> None:
    """Writes the page, whole or not at all.

    data: JSON with any text. extra_scripts: JavaScript by name. payload: text without "<" by name, such as base64.
    Raises ValueError for a script or a payload that would end its element.
    """
    with atomic_write(path) as file:
        file.write(render(data, extra_scripts, payload).encode(errors="replace"))  # a name may have half a character


def read(path: str | Path) -> dict[str, Any] | None:
    """The data of a page; None where there is no page, or it cannot be read."""
    try:
        found = DATA.search(Path(path).read_bytes())
        data = json.loads(found[1]) if found else None
    except (OSError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def render(
    data: Mapping[str, Any], extra_scripts: Mapping[str, str] | None = None, payload: Mapping[str, str] | None = None
) -> str:
    """The page as text. Arguments as for write."""
    scripts = {"page": _source("page.js"), **(extra_scripts or {})}
    style = _source("style.css")
    for name, source in scripts.items():
        if re.search("</script|<!--", source, re.IGNORECASE):
            raise ValueError(f"script {name} has </script or <!--, which would end its element. Write it as <\\/script")
    for name, text in (payload or {}).items():
        if "<" in text:
            raise ValueError(f"payload {name} has a '<', which could end its element. Encode it with base64")
    policy = "; ".join([
        "default-src 'none'", "script-src " + " ".join(map(_hash, scripts.values())), f"style-src {_hash(style)}",
        "worker-src blob:", "connect-src 'none'", "img-src 'none'", "base-uri 'none'", "form-action 'none'",
    ])  # fmt: skip
    blocks = [
        f'<script type="text/plain" id="payload-{name}">{text}</script>' for name, text in (payload or {}).items()
    ]
    blocks += [f'<script id="script-{name}">{source}</script>' for name, source in scripts.items()]
    parts = {
        "policy": policy,
        "title": html.escape(str(data.get("run", {}).get("name", "minuteGPT"))),
        "style": style,
        "data": to_json(data),
        "scripts": "\n".join(blocks),
    }
    # one pass: what is put in is not searched for places again
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], _source("template.html"))


def to_json(data: Any) -> str:
    """JSON in ASCII that is safe inside a <script> element: no <, > or &. Numbers that JSON lacks become null."""
    text = json.dumps(_finite(data), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _source(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _hash(source: str) -> str:
    """The source expression of a Content-Security-Policy that allows this script or style, and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"
