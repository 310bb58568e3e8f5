"""Tiny Shakespeare to make choices on: the training text of shakespeare_char, whose last tenth validates.

The tokenizer is that of shakespeare_char, with its 65 ids. The validation text of shakespeare_char is in neither split.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import minutegpt.errors  # noqa: F401  finds the environment that `uv sync` made
from minutegpt.config import configure
from minutegpt.data.dev_split import write_dev
from minutegpt.data.pipeline import ensure_dataset

# ----------------------------------------------------------------------------
data_dir = ""  # where datasets are, shakespeare_char too: by default $MINUTEGPT_DATA, or data/ next to the scripts
# ----------------------------------------------------------------------------

if __name__ == "__main__":
    globals().update(configure(globals(), __file__, config_files=False)[0])
    if not data_dir:
        ensure_dataset("shakespeare_char")
    write_dev("shakespeare_char", "shakespeare_dev", data_dir)
