"""Instead of train.py in the tests of ablate.py: no model, a loss out of a formula, in no time."""

import json
import random
import runpy
import sys
import time
from pathlib import Path

from minutegpt.files import run_lock

# ----------------------------------------------------------------------------
seed = 1
dataset = "small"
out_dir = "out"
init_from = "scratch"
max_iters = 10
max_minutes = 0.0
quality = 0.0  # is added to the loss
noise = 0.001  # standard deviation of what a seed adds to one variant alone
fail_at = 0  # a seed
slow_at = 0  # a seed: its run takes 2 seconds longer
device = "cpu"
# ----------------------------------------------------------------------------
BONUS = 0.0
if "--help" in sys.argv:
    print(Path(__file__).read_text().split("# ---")[1])
    raise SystemExit
config = {key: value for key, value in globals().items() if type(value) in (int, float, str) and key.islower()}
config = {key: value for key, value in config.items() if not key.startswith("_")}
for word in sys.argv[1:]:
    if word.endswith(".py"):
        found = runpy.run_path(word)
        config |= {key: found[key] for key in config if key in found}
for word in sys.argv[1:]:
    key, _, text = word[2:].partition("=")
    if word.startswith("--"):
        config[key] = type(config[key])(text)
out = Path(config["out_dir"])
lock = run_lock(out)
if config["fail_at"] != config["seed"]:
    (out / "config.json").write_text(json.dumps(config))
    (out / "ckpt.pt").write_text("{}")
with open(out.parent.parent / "starts.txt", "a") as file:  # with its checkpoint: killed from here on, it can resume
    file.write(f"{out.parent.name} {config['seed']} {config['init_from']}\n")
if config["fail_at"] == config["seed"]:
    sys.stderr.write("error: the numbers have run away\n")
    raise SystemExit(1)
if config["slow_at"] == config["seed"] and config["init_from"] == "scratch":
    time.sleep(2)
shared = random.Random(config["seed"]).gauss(2.0, 0.1)  # what all variants of a seed have in common
own = random.Random(str([config["seed"], config["quality"], config["noise"], BONUS])).gauss(0.0, config["noise"])
loss = shared + config["quality"] + BONUS + own
rows = [{"step": step, "seconds": 0.01 * step, "train_loss": loss} for step in range(1, config["max_iters"] + 1)]
(out / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
(out / "ckpt.pt").write_text(json.dumps({"loss": loss}))
