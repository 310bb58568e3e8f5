"""The Python source that comes with this interpreter: some 10 to 30 MB of real code, on every machine, offline."""

import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import minutegpt.errors  # noqa: F401  finds the environment that `uv sync` made
from minutegpt.config import configure
from minutegpt.data.pipeline import write_dataset
from minutegpt.data.sources import files_in, is_utf8, many_texts

# ----------------------------------------------------------------------------
tokenizer = "bpe"  # char, byte, bpe, gpt2, or the folder of a prepared dataset
vocab_size = 2048  # ids, for bpe
workers = 0  # processes, 0 for one a CPU
data_dir = ""  # where datasets stand, data/ beside the scripts by default
# ----------------------------------------------------------------------------

if __name__ == "__main__":
    globals().update(configure(globals(), __file__)[0])
    library = Path(sysconfig.get_path("stdlib"))
    files = [path for path in files_in(library, (".py",)) if "site-packages" not in path.parts and is_utf8(path)]
    write_dataset("python_code", many_texts(files, every=20), tokenizer, vocab_size, data_dir, workers=workers)
