"""Tiny Shakespeare by BPE, trained on its training part: fewer and longer tokens than by character."""

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
vocab_size = 1024  # ids, with <|endoftext|>; a small text needs a small vocabulary
data_dir = ""  # where datasets are: by default $MINUTEGPT_DATA, or data/ next to the scripts
# ----------------------------------------------------------------------------

if __name__ == "__main__":
    globals().update(configure(globals(), __file__, config_files=False)[0])
    text = find_text(*TINY_SHAKESPEARE, given=input)
    settings = {"input": str(text)}
    write_dataset("shakespeare_bpe", one_text(text), "bpe", vocab_size, data_dir=data_dir, settings=settings)
