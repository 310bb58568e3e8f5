"""Instead of evaluate.py in the tests of ablate.py: prints the loss that the stub of train.py saved."""

import json
import sys
from pathlib import Path

words = dict(word[2:].partition("=")[::2] for word in sys.argv[1:])
assert words["ckpt"] == "latest" and "json" in words
loss = json.loads((Path(words["out_dir"]) / "ckpt.pt").read_text())["loss"]
print(json.dumps({"split": "val", "loss": loss, "bits_per_byte": loss / 0.7, "tokens": 99}))
