"""Your own text: a file, a folder of files, or the documents in .jsonl or .parquet files.

python prepare/text.py --input=book.txt
python train.py --dataset=book
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import minutegpt.errors  # noqa: F401  finds the environment that `uv sync` made
from minutegpt.config import configure
from minutegpt.data import sources
from minutegpt.data.pipeline import write_dataset
from minutegpt.errors import UserError

# ----------------------------------------------------------------------------
input = ""  # a file (its last tenth validates), or a folder or .jsonl or .parquet (every tenth document validates)
dataset = ""  # what it shall be called, by default the input's name without its ending
tokenizer = "char"  # char, byte (any file at all), bpe, gpt2, or the folder of a prepared dataset, to take its own
vocab_size = 1024  # ids, for bpe
column = "text"  # where .jsonl and .parquet have the text
raw = ""  # uint16 or uint32: the input is ids without a header, as in nanoGPT's train.bin, made by --tokenizer
max_tokens = 0  # stop after so many, 0 for all
workers = 0  # processes, 0 for one a CPU
data_dir = ""  # where datasets stand, data/ beside the scripts by default
# ----------------------------------------------------------------------------

if __name__ == "__main__":
    globals().update(configure(globals(), __file__)[0])
    if not input:
        raise UserError("which text? Type: python prepare/text.py --input=FILE_OR_FOLDER")
    source = sources.any_source(Path(input), column, raw, binary=tokenizer == "byte")
    if raw and tokenizer in ("char", "bpe"):
        raise UserError("--raw has ids only, so name what made them: --tokenizer=gpt2, or the folder of a dataset")
    name = re.sub(r"[^\w.-]|^[.-]", "_", dataset or Path(input).resolve().stem)
    settings = {"input": input, "column": column, "fingerprint": sources.fingerprint(Path(input))}
    write_dataset(name, source, tokenizer, vocab_size, data_dir, max_tokens, workers, settings)
