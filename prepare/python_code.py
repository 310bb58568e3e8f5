"""The Python source code of this interpreter: 10 to 30 MB of real code, on every machine, without a network."""

import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import minutegpt.errors  # noqa: F401  finds the environment that `uv sync` made
from minutegpt.config import configure
from minutegpt.data.pipeline import write_dataset
from minutegpt.data.readers import is_utf8
from minutegpt.data.sources import find_files, many_texts

# ----------------------------------------------------------------------------
tokenizer = "bpe"  # char, byte, bpe, gpt2, or the folder of a prepared dataset
vocab_size = 2048  # ids, for bpe
workers = 0  # processes; 0: one per CPU
data_dir = ""  # where datasets are: by default $MINUTEGPT_DATA, or data/ next to the scripts
# ----------------------------------------------------------------------------

if __name__ == "__main__":
    globals().update(configure(globals(), __file__, config_files=False)[0])
    library = Path(sysconfig.get_path("stdlib"))
    files = [path for path in find_files(library)[0] if path.suffix == ".py" and "site-packages" not in path.parts]
    source = many_texts([path for path in files if is_utf8(path)], every=20)
    write_dataset("python_code", source, tokenizer, vocab_size, data_dir=data_dir, workers=workers)
