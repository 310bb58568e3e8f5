"""Your own text: a file, a folder of files, or the rows of JSON, CSV or Parquet files, compressed or not.

python prepare/text.py --input=book.txt
python train.py --dataset=book
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import minutegpt.errors  # noqa: F401  finds the environment that `uv sync` made
from minutegpt.config import configure
from minutegpt.data import sources
from minutegpt.data.pipeline import write_dataset
from minutegpt.errors import UserError

# ----------------------------------------------------------------------------
input = ""  # a file, whose last tenth validates; or a folder or rows, where every tenth document validates
dataset = ""  # the dataset's name; by default the input's, without its ending
tokenizer = "char"  # char, byte (any file), bpe, gpt2, or the folder of a prepared dataset
vocab_size = 1024  # ids, for bpe
column = "text"  # where JSON, CSV and Parquet files have the text
kind = "auto"  # text, json, csv or parquet: what to read in a folder of several kinds, or a file of unclear kind
split_documents = False  # the letters <|endoftext|> in the text end a document, as in the files of TinyStories
raw = ""  # uint16 or uint32: the input is nanoGPT's train.bin, or its folder; --tokenizer names what made the ids
max_tokens = 0  # of the training split; 0: all
workers = 0  # processes; 0: one per CPU
data_dir = ""  # where datasets are: by default $MINUTEGPT_DATA, or data/ next to the scripts
# ----------------------------------------------------------------------------

if __name__ == "__main__":
    globals().update(configure(globals(), __file__, config_files=False)[0])
    if not input:
        raise UserError("which text? Type: python prepare/text.py --input=FILE_OR_FOLDER")
    if raw and tokenizer in ("char", "bpe"):
        raise UserError("--raw reads ids, so name what made them: --tokenizer=gpt2, or the folder of a dataset")
    place = Path(input)
    if raw:
        source = sources.raw_ids(place, raw)
    else:
        source = sources.from_input(
            place, column, kind=kind, split_documents=split_documents, binary=tokenizer == "byte"
        )  # fmt: skip
    name = sources.dataset_name(place.resolve(), dataset)
    settings = {"input": input, "column": column, "kind": kind, "split_documents": split_documents, "raw": raw}
    write_dataset(
        name, source, tokenizer, vocab_size,
        data_dir=data_dir, max_tokens=max_tokens, workers=workers, settings=settings,
    )  # fmt: skip
