"""FineWeb-Edu, educational web pages: the sample of 10 billion tokens, streamed from the Hugging Face hub."""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import minutegpt.errors  # noqa: F401  finds the environment that `uv sync` made
from minutegpt.config import configure
from minutegpt.data import sources
from minutegpt.data.pipeline import write_dataset

# ----------------------------------------------------------------------------
input = ""  # .parquet or .jsonl files, or a folder of them, that are on this machine already
column = "text"  # where they have the text
tokenizer = "gpt2"  # byte, bpe, gpt2, or the folder of a prepared dataset, to take its own
vocab_size = 4096  # ids, for bpe
max_tokens = 100_000_000  # stop after so many, 0 for all
download = False  # yes to a download of more than 1 GB
workers = 0  # processes, 0 for one a CPU
data_dir = ""  # where datasets stand, data/ beside the scripts by default
# ----------------------------------------------------------------------------

if __name__ == "__main__":
    globals().update(configure(globals(), __file__)[0])
    if input:
        stream = partial(sources.open_files, sources.files_in(Path(input), (".parquet", ".jsonl")), column)
    else:
        sources.ask_before(27, download, max_tokens)
        stream = partial(sources.open_hub, "HuggingFaceFW/fineweb-edu", column, name="sample-10BT", split="train")
    source = sources.streamed(stream, column, every=1000)
    settings = {"input": input, "column": column, "fingerprint": sources.fingerprint(Path(input)) if input else ""}
    write_dataset("fineweb_edu", source, tokenizer, vocab_size, data_dir, max_tokens, workers, settings)
