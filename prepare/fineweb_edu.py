"""FineWeb-Edu, educational web pages: the sample of 10 billion tokens, streamed from the Hugging Face hub."""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import minutegpt.errors  # noqa: F401  finds the environment that `uv sync` made
from minutegpt.config import configure
from minutegpt.data import sources
from minutegpt.data.pipeline import write_dataset

# ----------------------------------------------------------------------------
input = ""  # JSON, CSV or Parquet files that you have, or a folder of them; by default downloaded
column = "text"  # where they have the text
kind = "auto"  # text, json, csv or parquet: what to read in a folder of several kinds, or a file of unclear kind
tokenizer = "gpt2"  # byte, bpe, gpt2, or the folder of a prepared dataset
vocab_size = 4096  # ids, for bpe
max_tokens = 100_000_000  # of the training split; 0: all
download = False  # allows a download of more than 1 GB
workers = 0  # processes; 0: one per CPU
data_dir = ""  # where datasets are: by default $MINUTEGPT_DATA, or data/ next to the scripts
# ----------------------------------------------------------------------------

if __name__ == "__main__":
    globals().update(configure(globals(), __file__, config_files=False)[0])
    if input:
        source = sources.from_input(Path(input), column, every=1000, kind=kind, split_documents=True)
    else:
        sources.ask_before(27, download, max_tokens)
        stream = partial(sources.open_hub, "HuggingFaceFW/fineweb-edu", column, name="sample-10BT", split="train")
        source = sources.streamed(stream, column, every=1000)
    settings = {"input": input, "column": column, "kind": kind}
    write_dataset(
        "fineweb_edu", source, tokenizer, vocab_size,
        data_dir=data_dir, max_tokens=max_tokens, workers=workers, settings=settings,
    )  # fmt: skip
