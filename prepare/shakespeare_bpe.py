"""Tiny Shakespeare by BPE, trained on its training part: fewer and longer tokens than by character."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import minutegpt.errors  # noqa: F401  finds the environment that `uv sync` made
from minutegpt.config import configure
from minutegpt.data.download import TINY_SHAKESPEARE, find_text
from minutegpt.data.pipeline import write_dataset
from minutegpt.data.sources import one_text

# ----------------------------------------------------------------------------
input = ""  # the text, if not where it is looked for: $MINUTEGPT_CACHE, ../shared/data, ~/.cache/minutegpt, the network
vocab_size = 1024  # ids, <|endoftext|> among them; small data wants a small vocabulary
data_dir = ""  # where datasets stand, data/ beside the scripts by default
# ----------------------------------------------------------------------------

if __name__ == "__main__":
    globals().update(configure(globals(), __file__)[0])
    text = find_text(*TINY_SHAKESPEARE, given=input)
    write_dataset("shakespeare_bpe", one_text(text), "bpe", vocab_size, data_dir=data_dir)
