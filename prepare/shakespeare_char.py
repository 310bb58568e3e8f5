"""Tiny Shakespeare by character: 1.1 MB, 65 ids. The first 90% are for training."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import minutegpt.errors  # noqa: F401  finds the environment that `uv sync` made
from minutegpt.config import configure
from minutegpt.data.download import TINY_SHAKESPEARE, find_text
from minutegpt.data.pipeline import write_dataset
from minutegpt.data.sources import one_text

# ----------------------------------------------------------------------------
input = ""  # the text, if not in $MINUTEGPT_CACHE, ../shared/data or ~/.cache/minutegpt; by default downloaded
data_dir = ""  # where datasets are: by default $MINUTEGPT_DATA, or data/ next to the scripts
# ----------------------------------------------------------------------------

if __name__ == "__main__":
    globals().update(configure(globals(), __file__, config_files=False)[0])
    text = find_text(*TINY_SHAKESPEARE, given=input)
    write_dataset("shakespeare_char", one_text(text), "char", data_dir=data_dir, settings={"input": str(text)})
