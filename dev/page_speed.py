"""The page with the model in it, in Chromium:  python dev/page_speed.py config/shakespeare_cpu.py

The size of the file, the time to open it from disk, and tokens per second of its Worker, at short and at full context.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import minutegpt.errors  # noqa: F401, I001  first: it finds the environment that has torch

import statistics
import tempfile
from dataclasses import fields
from json import dumps
from typing import Any

import torch
from browser import CHROMIUM, Browser, Page

from minutegpt.checkpoint import load_model
from minutegpt.config import configure, settings_of
from minutegpt.data.tokenizer import char_tokenizer
from minutegpt.errors import UserError
from minutegpt.log import si_number
from minutegpt.page.pack import DTYPES, pack_model, write_model
from model import GPT, GPTConfig

# ----------------------------------------------------------------------------------------------------------------
# every setting, with its default. The model's settings and config files are those of train.py
run = ""  # a run's folder; empty: a model of the config's size, with random weights and no empty row in its tables
weights = "int8"  # int8, float16
new_tokens = 100  # written per measurement
repeats = 5  # measurements, of which the median counts
json = False  # print one JSON object on one line
section = "none"  # of a config file: none is the model that it has on a GPU
vocab_size = 65  # characters of the model with random weights
# ----------------------------------------------------------------------------------------------------------------
config, _ = configure(globals(), __file__, model=GPTConfig, ignore=settings_of(ROOT / "train.py"))
globals().update(config)
if weights not in DTYPES:
    raise UserError(f"--weights={weights} is not one of {', '.join(DTYPES)}. Type one of them")
if not CHROMIUM:
    raise UserError("there is no Chromium on this machine. Install Debian's package chromium")

# writes n tokens after a prompt in a Worker of its own, and returns the seconds to the first one and to each next one
MEASURE = """
(async ({ prompt, n }) => {
  const url = URL.createObjectURL(new Blob([`(${modelWorker})()`], { type: "text/javascript" }));
  const worker = window.measured ?? new Worker(url);
  const run = (task, values) => new Promise((resolve, reject) => {
    const times = [performance.now()];
    worker.onmessage = ({ data }) => {
      if (data.error) reject(new Error(data.error));
      if (data.text !== undefined) times.push(performance.now());
      if (data.done) resolve(times);
    };
    worker.postMessage({ task, id: Math.random(), ...values });
  });
  if (!window.measured) await run("load", { ...data.model, weights: byId("payload-weights").textContent });
  window.measured = worker;
  await run("write", { prompt: "", n: 1, seed: 1 });  // the cache has another text
  const times = await run("write", { prompt, n, seed: 1 });
  const rest = Math.max(times.at(-1) - times[1], 0.1);  // ms; the clock of a browser is coarse
  return { first: (times[1] - times[0]) / 1000, next: rest / (times.length - 2) / 1000 };
})
"""


def measure(page: Page, prompt: str, n: int) -> dict[str, float]:
    """The medians of the seconds to the first token after a prompt, and of those to each next one."""
    found = [page.js(f"{MEASURE}({dumps({'prompt': prompt, 'n': n})})") for _ in range(repeats)]
    return {key: statistics.median(times[key] for times in found) for key in ("first", "next")}


if run:
    model, tokenizer = load_model(run, "best", "cpu")[:2]
else:
    tokenizer = char_tokenizer("\n" + "".join(chr(32 + i) for i in range(vocab_size - 1)))
    torch.manual_seed(1)
    model_config: dict[str, Any] = {field.name: config[field.name] for field in fields(GPTConfig)}
    model = GPT(GPTConfig(**model_config)).eval()
    for name, p in model.named_parameters():
        if ".ngrams." in name:
            torch.nn.init.normal_(p, std=0.02)
context = model.config.block_size
n = min(new_tokens, context // 2)
with tempfile.TemporaryDirectory() as folder, Browser() as browser:
    path = Path(folder) / "model.html"
    write_model(path, model, tokenizer, weights, {"run": {"name": "page_speed"}})
    page = browser.open(path)
    page.until("document.querySelector('#written .token') !== null", 120)
    opened = page.js("performance.now()") / 1000
    page.click("#stop")
    page.until("document.getElementById('speed').textContent.includes('per second')")
    short = measure(page, "", n)
    text = tokenizer.decode([i % 26 for i in range(context - n)])
    full = measure(page, text, n)
    problems = [*page.problems, *page.requests, *page.js("violations")]
    size = path.stat().st_size
if problems:
    raise UserError(f"the page had problems: {'; '.join(problems)[:500]}")
parameters = model.n_params()
packed = len(pack_model(model, weights)[1])
result = {
    "parameters": parameters, "file_bytes": size, "bytes_per_parameter": size / parameters,
    "weights_bytes_per_parameter": 4 / 3 * packed / parameters, "open_seconds": opened,
    "short_tokens_per_second": 1 / short["next"], "full_tokens_per_second": 1 / full["next"],
    "prompt_tokens_per_second": (context - n) / full["first"],
}  # fmt: skip
if json:
    print(dumps(result))
else:
    print(
        f"{si_number(parameters)} parameters in {weights}: {si_number(size, 'B')}, "
        f"{result['bytes_per_parameter']:.2f} bytes per parameter\n"
        f"the first token is there {opened:.2f} s after the file is opened\n"
        f"writes {1 / short['next']:.0f} tokens/s at short context, {1 / full['next']:.0f} at full context; "
        f"reads a prompt at {result['prompt_tokens_per_second']:.0f} tokens/s"
    )
