"""The page with the model in it: what export.py writes, and a reader who plays with it in Chromium."""

import base64
import json
import math
import re
from typing import Any

import pytest
import torch
from browser import Browser, Page
from harness import refused, run, train
from javascript import need_chromium, node
from test_engine import LOGITS, check, make, rounded
from test_huggingface import a_run
from test_page_browser import run_data

from minutegpt import page as pages
from minutegpt.data.tokenizer import Tokenizer, byte_tokenizer, char_tokenizer, train_bpe
from minutegpt.errors import UserError
from minutegpt.generate import hide_padding
from minutegpt.page.pack import pack_model, write_model
from model import GPT

HOSTILE = "</script><script>document.title='taken'</script><!-- <img src=x onerror=alert(1)> &lt; ${1} `'\"\\ \u2028"
TEXT = "To be, or not to be: that is the question.\nROMEO: What says she?\n" + HOSTILE
FAST = {"pos": "rope", "norm": "rmsnorm", "qk_norm": True, "tie": False, "ngram": 4}


def write(path, tokenizer: Tokenizer, dtype: str = "int8", data: dict[str, Any] | None = None, **settings: Any) -> GPT:
    """Writes a page with a small model. Returns the model that it has, with rounded weights."""
    model = make(**({"vocab_size": tokenizer.vocab_size} | settings))
    write_model(path, model, tokenizer, dtype, data or {"run": {"name": HOSTILE}})
    return rounded(model, dtype)


def scripts(text: str) -> dict[str, str]:
    """The scripts of a page by the end of their ids, as a browser finds them."""
    found = re.findall(r'<script[^>]* id="(?:script-|payload-)?(\w+)">(.*?)</script', text, re.DOTALL | re.IGNORECASE)
    return dict(found)


# ---------------------------------------------------------------------------------------------- the file


def test_the_file_has_the_model(tmp_path):
    """Node finds it in the page's text, and computes what model.py computes. Hostile texts are only texts."""
    tokenizer = char_tokenizer(TEXT)
    model = write(tmp_path / "model.html", tokenizer, **FAST)
    text = (tmp_path / "model.html").read_text(encoding="utf-8")
    assert "<script>document" not in text and "<img" not in text
    found = scripts(text)
    assert {*found} == {"data", "page", "worker", "play", "weights"}
    about = json.loads(found["data"])["model"]
    assert about["vocabulary"] == tokenizer.to_json()
    tokens = torch.arange(20)[None] % tokenizer.vocab_size
    question = {**about, "weights": found["weights"], "tokens": tokens[0].tolist(), "greedy": 60}
    source = found["worker"].removeprefix("function modelWorker() {\n").removesuffix("\n}")
    [answer] = node(LOGITS, [question], source=f"globalThis.self = {{}};\n{source}")
    check(model, tokens[0].tolist(), answer)


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_ngram_rows_without_weights_take_a_bit_each(dtype):
    rows = 4000
    model = make(ngram=2, ngram_rows=rows, vocab_size=100)
    table = model.transformer.ngrams.tables[0].weight.data
    table[:] = 1.0
    tensors, full = pack_model(model, dtype)
    assert not any(about["sparse"] for about in tensors)
    table[100:] = 0
    tensors, content = pack_model(model, dtype)
    assert [about["name"] for about in tensors if about["sparse"]] == ["transformer.ngrams.tables.0.weight"]
    row_bytes = 32 + 2 if dtype == "int8" else 64
    assert len(full) - len(content) == (rows - 100) * row_bytes - rows // 8


def test_bytes_per_parameter():
    """At most 1.4 in base64, where rows have 128 channels as in config/shakespeare_cpu.py; the whole table counts."""
    model = make(n_embd=128, n_head=2, vocab_size=65, ngram=3, ngram_rows=2000, **{"block_size": 256, "pos": "rope"})
    model.transformer.ngrams.tables[0].weight.data[:] = 1.0
    model.transformer.ngrams.tables[1].weight.data[:] = 1.0
    _, content = pack_model(model, "int8")
    assert len(base64.b64encode(content)) < 1.4 * model.n_params()


def test_weights_too_large_for_float16_are_refused(tmp_path):
    model = make()
    model.lm_head.weight.data[0, 0] = 1e6
    with pytest.raises(UserError, match="--dtype=float16"):
        pack_model(model, "float16")
    pack_model(model, "int8")


def test_the_script_exports_a_page(tmp_path, house):
    """With the data of the run's page, where the run has one; a page that is there is not replaced unasked."""
    out = tmp_path / "run"
    training = train(house, str(out), max_iters=4, eval_interval=2)
    assert training.wait() == 0, training.output
    done = run("export.py", f"--out_dir={out}", "--format=html")
    assert done.status == 0 and "model.html" in done.out, done.output
    data, run_data = pages.read(out / "model.html"), pages.read(out / "run.html")
    assert run_data and data and data.pop("model")["n_params"]
    assert data == {**run_data, "run": {**run_data["run"], "live": False}}
    size = (out / "model.html").stat().st_size
    refused(run("export.py", f"--out_dir={out}", "--format=html"), "--overwrite")
    assert run("export.py", f"--out_dir={out}", "--format=html", "--dtype=float16", "--overwrite").status == 0
    assert (out / "model.html").stat().st_size > size
    (out / "run.html").write_text('<script type="application/json" id="data">{"run": "not ours"}</script>')
    assert run("export.py", f"--out_dir={out}", "--format=html", f"--to={tmp_path / 'x.html'}").status == 0
    data = pages.read(tmp_path / "x.html")
    assert data and data["run"]["dataset"] == "small" and data["run"]["step"] == 4
    refused(run("export.py", f"--out_dir={out}", "--format=html", "--dtype=float32"), "int8, float16")
    refused(run("export.py", f"--out_dir={out}", "--dtype=int8"), "--format=html")
    place = a_run(tmp_path / "other", make(), None)
    refused(run("export.py", f"--out_dir={place}", "--format=html"), "needs a vocabulary", "--dataset=NAME")


# ---------------------------------------------------------------------------------------------- a reader


@pytest.fixture(scope="module")
def browser():
    need_chromium()
    with Browser() as browser:
        yield browser


def text_of(page: Page, name: str) -> str:
    return page.js(f"document.getElementById({name!r}).textContent")


def set_value(page: Page, name: str, value: object) -> None:
    """As a reader who changes a control: the value and its event."""
    page.js(f"""(() => {{
      const control = document.getElementById({name!r});
      control.value = {json.dumps(value)};
      control.dispatchEvent(new Event("input"));
    }})()""")


def written(page: Page) -> str:
    """What the model wrote, when it has ended."""
    page.until("document.getElementById('speed').textContent.includes('per second')", 60)
    return text_of(page, "written")


def calm(page: Page) -> None:
    """Nothing went wrong so far, and nothing was asked of any network."""
    assert not page.problems and not page.requests and not page.js("violations")


slow = pytest.mark.slow


@slow
@pytest.mark.parametrize("kind", ["char", "byte", "bpe", "gpt2"])
def test_it_writes_what_model_py_writes(browser, tmp_path, kind):
    tokenizers = {"char": char_tokenizer(TEXT), "byte": byte_tokenizer(), "bpe": train_bpe([TEXT * 3], 300)}
    tokenizer = tokenizers.get(kind) or Tokenizer("gpt2", tokenizers["bpe"].tokens)
    padded = {"vocab_size": 384} if kind == "bpe" else {}  # to a round number: ids without a text
    model = write(tmp_path / "model.html", tokenizer, **FAST, **padded)
    page = browser.open(tmp_path / "model.html")
    written(page)
    page.click("#prompt")
    for letter in "To be":
        page.type(letter)
    set_value(page, "temperature", 0)
    idx = torch.tensor([tokenizer.encode("To be")])
    with hide_padding(model, tokenizer):
        ids = model.generate(idx, 300, temperature=0)[0, idx.size(1) :].tolist()
    end = ids.index(tokenizer.end_token) if tokenizer.end_token in ids else len(ids)
    # the page names characters without a shape, such as controls, by their codes
    wanted = page.js(f"visible({json.dumps(tokenizer.decode(ids[:end]))})")
    assert written(page).rstrip("\ufffd") == wanted.rstrip("\ufffd")
    calm(page)


@slow
def test_controls(browser, tmp_path):
    model = write(tmp_path / "model.html", char_tokenizer(TEXT), **FAST)
    tokenizer = char_tokenizer(TEXT)
    page = browser.open(tmp_path / "model.html")
    first = written(page)
    assert len(first) >= 300
    page.click("#again")
    other = written(page)
    assert other != first and page.js("document.getElementById('seed').value") == "2"
    set_value(page, "seed", 1)
    assert written(page) == first
    # the bars are the probabilities after temperature and top-k
    set_value(page, "prompt", "to be")
    set_value(page, "temperature", 0.5)
    set_value(page, "top-k", 2)  # the third of 1, 2, 3, 5, ...
    written(page)
    logits = model(torch.tensor([tokenizer.encode("to be")]))[0][0, -1] / 0.5
    p, ids = logits.topk(3).values.softmax(0), logits.topk(3).indices
    names = page.js("[...document.querySelectorAll('#next .bar-name')].map((bar) => bar.textContent)")
    assert names == page.js(f"{json.dumps([tokenizer.decode([i]) for i in ids.tolist()])}.map(quoted)")
    shares = page.js(
        "[...document.querySelectorAll('#next .bar')].map((bar) => +bar.style.getPropertyValue('--share'))"
    )
    assert shares == pytest.approx(p.tolist(), abs=1e-3)
    # characters that the vocabulary lacks are left out, and named
    set_value(page, "prompt", "to be\u20ac\ud83d")
    written(page)
    assert "lacks \u20ac" in text_of(page, "speed")
    assert page.js("[...document.querySelectorAll('#next .bar-name')].map((bar) => bar.textContent)") == names
    # a token explains itself, to the mouse and to the keyboard
    wide = "(token) => token.getBoundingClientRect().width > 4"  # not a new line
    i = page.js(f"[...document.querySelectorAll('#written .token')].findIndex({wide})")
    page.middle(f"#written .token:nth-child({i + 1})")  # scrolls, which hides the explanation
    page.js("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    page.hover(f"#written .token:nth-child({i + 1})")
    page.until("!document.getElementById('tip').hidden")
    page.js("document.getElementById('written').focus()")
    page.press("ArrowRight", 3)
    assert page.js("document.getElementById('written').getAttribute('aria-activedescendant')")
    assert "had" in text_of(page, "tip")
    calm(page)


@slow
@torch.no_grad()
def test_surprise_is_the_loss_of_the_model(browser, tmp_path):
    """Bits per character of a text longer than the context, next to the size that gzip makes."""
    tokenizer = char_tokenizer(TEXT)
    model = write(tmp_path / "model.html", tokenizer, **FAST)
    page = browser.open(tmp_path / "model.html")
    written(page)
    text = "To be, or not to be: that is the question.\n" * 3
    set_value(page, "pasted", text)
    page.click("#measure")
    page.until("document.getElementById('cost').textContent.includes('gzip')")
    ids, bits = [*tokenizer.start_ids(), *tokenizer.encode(text)], 0.0
    full = model.config.block_size
    for i in range(1, len(ids)):
        step = full + 1 - full // 2  # a full context begins again with its last half
        start = 0 if i <= full else math.ceil((i - full) / step) * step
        logits = model(torch.tensor([ids[start:i]]))[0][0, -1]
        bits -= logits.log_softmax(0)[ids[i]].item() / math.log(2)
    found = [float(number) for number in re.findall(r"\d+\.\d+", text_of(page, "cost"))]
    assert found[0] == pytest.approx(bits / len(text), abs=0.006)
    gzip = page.js(f"""new Response(new Blob([{json.dumps(text)}]).stream().pipeThrough(
        new CompressionStream("gzip"))).arrayBuffer().then((bytes) => bytes.byteLength)""")
    assert found[1] == pytest.approx(8 * gzip / len(text), abs=0.006)
    assert text_of(page, "coloured").replace("\u21b5", "") == text
    calm(page)


@slow
def test_attention_of_the_text_so_far(browser, tmp_path):
    births = [{"step": 0, "layer": 1, "head": 3, "label": "induction"}]
    data = {"run": {"name": "run"}, "births": births}
    write(tmp_path / "model.html", char_tokenizer(TEXT), data=data, **FAST)
    page = browser.open(tmp_path / "model.html")
    names = page.js("[...document.querySelectorAll('#look-head option')].map((option) => option.textContent)")
    assert names[:5] == ["0.0", "0.1", "0.2", "0.3", "1.0"]
    assert names[7:] == ["1.3, has learned to copy"]
    set_value(page, "prompt", "To be")
    text = "To be" + written(page)
    page.click("#look summary")
    page.until("document.querySelector('#look-matrix .token') !== null")
    shown = text_of(page, "look-matrix").replace("\u21b5", "")
    assert len(shown) >= 24 and text.endswith(shown)  # block_size is 24
    before = page.js("document.querySelector('#look-matrix canvas').toDataURL()")
    page.js("document.getElementById('look-head').selectedIndex = 5")
    page.js("document.getElementById('look-head').dispatchEvent(new Event('change'))")
    page.until(f"document.querySelector('#look-matrix canvas').toDataURL() !== {json.dumps(before)}")
    # while it is open it follows the text, also one with characters that the vocabulary lacks
    set_value(page, "prompt", "so\u20ac")
    set_value(page, "top-k", 0)
    text = "so" + written(page)
    shown = "document.querySelector('#look-matrix .tokens').textContent.replaceAll('\u21b5', '')"
    page.until(f"{shown}.length >= 24 && {json.dumps(text)}.endsWith({shown})")
    calm(page)


@slow
def test_attention_does_not_end_the_writing(browser, tmp_path):
    """Opened while the model writes, it waits for the end; "Stop" is an end too."""
    write(tmp_path / "model.html", char_tokenizer(TEXT), n_layer=6, n_embd=256, n_head=8, block_size=256)
    page = browser.open(tmp_path / "model.html")
    page.until("document.querySelectorAll('#written .token').length > 3")
    page.js("document.getElementById('look').open = true")
    count = page.js("document.querySelectorAll('#written .token').length")
    page.until(f"document.querySelectorAll('#written .token').length > {count + 20}")
    assert page.js("document.querySelector('#look-matrix .token')") is None
    page.click("#stop")
    page.until("document.querySelector('#look-matrix .token') !== null")
    assert text_of(page, "speed").startswith("Stopped.")
    calm(page)


@slow
def test_a_text_that_the_vocabulary_lacks(browser, tmp_path):
    write(tmp_path / "model.html", char_tokenizer(TEXT))
    page = browser.open(tmp_path / "model.html")
    written(page)
    set_value(page, "pasted", "\u20ac\u20ac")
    page.click("#measure")
    page.until("document.getElementById('cost').textContent.includes('lacks')")
    assert "NaN" not in text_of(page, "cost")
    calm(page)


@slow
def test_typing_does_not_wait_for_a_large_model(browser, tmp_path):
    """The Worker computes: a key is shown within two pictures, and a new key ends what the last one began."""
    settings = {"n_layer": 6, "n_embd": 384, "n_head": 6, "block_size": 256}
    write(tmp_path / "model.html", char_tokenizer(TEXT), **settings)
    page = browser.open(tmp_path / "model.html")
    page.until("!document.getElementById('prompt').disabled")
    page.click("#prompt")
    page.js("""window.waits = []; document.getElementById('prompt').addEventListener('input', () => {
      const began = performance.now();
      requestAnimationFrame(() => waits.push(performance.now() - began));
    })""")
    for letter in "To be, or not to be":
        page.type(letter)
    page.until("waits.length === 19")
    assert sorted(page.js("waits"))[9] < 100  # the median, on a busy machine
    page.until("document.querySelectorAll('#written .token').length > 5")
    page.click("#stop")
    page.until("document.getElementById('speed').textContent.startsWith('Stopped.')")
    count = page.js("document.querySelectorAll('#written .token').length")
    assert 5 < count < 300 and page.js("document.getElementById('stop').disabled")
    calm(page)


@slow
@pytest.mark.parametrize("width", [320, 800, 1600, 3840])
@pytest.mark.parametrize("dark", [False, True])
def test_the_panel_fits_every_screen(browser, tmp_path, width, dark):
    write(tmp_path / "model.html", char_tokenizer(TEXT), **FAST)
    page = browser.open(tmp_path / "model.html", width=width, height=900, dark=dark)
    written(page)
    set_value(page, "pasted", TEXT)
    page.click("#measure")
    page.until("document.getElementById('cost').textContent.includes('gzip')")
    page.click("#look summary")
    page.until("document.querySelector('#look-matrix .token') !== null")
    assert page.js("document.documentElement.scrollWidth") <= width
    outside = """[...document.querySelectorAll('#model *')].filter((element) => {
      const { left, right } = element.getBoundingClientRect();
      return left < -1 || right > innerWidth + 1;
    }).map((element) => element.outerHTML.slice(0, 80))"""
    assert page.js(outside) == []
    # each control has a name
    unnamed = """[...document.querySelectorAll('#model :is(input, textarea, select, button)')].filter((control) =>
      !control.labels?.length && !control.textContent.trim() && !control.ariaLabel).map(({ id }) => id)"""
    assert page.js(unnamed) == []
    calm(page)


@slow
def test_nothing_jumps_while_it_writes(browser, tmp_path):
    write(tmp_path / "model.html", char_tokenizer(TEXT), **FAST)
    page = browser.open(tmp_path / "model.html", width=800)
    written(page)
    top = "document.getElementById('pasted').getBoundingClientRect().top + scrollY"
    before = page.js(top)
    set_value(page, "prompt", "ROMEO")
    set_value(page, "top-k", 0)
    written(page)
    assert page.js(top) == before
    calm(page)


@slow
def test_hostile_text_stays_text(browser, tmp_path):
    """In the vocabulary, the name, the prompt and what is typed and pasted: it never becomes markup or script."""
    run_data = {"name": HOSTILE, "dataset": HOSTILE, "step": 1, "seconds": 1.0, "state": HOSTILE, "seed": 1}
    tokenizer = Tokenizer(
        "bpe", [*byte_tokenizer().tokens, HOSTILE.encode(), b"</script>", b"<img src=x onerror=alert(1)>"]
    )
    write(tmp_path / "model.html", tokenizer, data={"run": run_data, "prompt": HOSTILE})
    page = browser.open(tmp_path / "model.html")
    written(page)
    assert page.js("document.getElementById('prompt').value") == HOSTILE
    set_value(page, "pasted", HOSTILE)
    page.click("#measure")
    page.until("document.getElementById('cost').textContent.includes('gzip')")
    page.click("#look summary")
    page.until("document.querySelector('#look-matrix .token') !== null")
    assert page.js("document.title").startswith("</script>")
    assert page.js("document.querySelectorAll('img, iframe, object, embed, link, base').length") == 0
    assert page.js("document.querySelectorAll('script').length") == 5
    calm(page)


@slow
def test_the_policy_forbids_every_request(browser, tmp_path):
    write(tmp_path / "model.html", char_tokenizer(TEXT))
    page = browser.open(tmp_path / "model.html")
    written(page)
    for attempt in (
        "fetch('https://example.com').catch(() => 1)",
        "new Promise((r) => { const image = new Image(); image.onerror = r; image.src = 'https://example.com/x'; })",
        "fetch('data:,x').catch(() => 1)",
    ):
        page.js(f"{attempt}.then ? {attempt}.then(() => 0) : 0")
    worker = """new Promise((resolve) => {
      const source = "fetch('https://example.com').then(() => postMessage('sent'), () => postMessage('refused'))";
      const worker = new Worker(URL.createObjectURL(new Blob([source])));
      worker.onmessage = ({ data }) => resolve(data);
    })"""
    assert page.js(worker) == "refused"
    assert len(page.js("violations")) >= 3


@slow
def test_the_room_for_texts_follows_the_width(browser, tmp_path):
    """On a narrow screen a text needs more lines; when the screen is wide again, the room is small again."""
    data = run_data()
    data["evaluations"][0]["text"] = "some words " * 40
    write(tmp_path / "model.html", char_tokenizer(TEXT), data=data)
    page = browser.open(tmp_path / "model.html", width=1600)
    heights = []
    for width in (1600, 320, 1600):
        page.resize(width, 900)
        page.until(f"innerWidth === {width}")
        page.js("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        heights.append(page.js("document.getElementById('text').offsetHeight"))
    assert heights[0] == heights[2] < heights[1]
    calm(page)


@slow
def test_the_keyboard_reaches_every_control(browser, tmp_path):
    write(tmp_path / "model.html", char_tokenizer(TEXT), **FAST)
    page = browser.open(tmp_path / "model.html")
    first = written(page)
    page.js("document.getElementById('prompt').focus()")
    reached = []
    for _ in range(9):
        page.press("Tab")
        reached.append(page.js("document.activeElement.id || document.activeElement.tagName"))
        if reached[-1] == "temperature":
            page.press("ArrowRight")
            assert page.js("document.querySelector('output[for=temperature]').value") == "0.85"
        if reached[-1] == "again":
            assert written(page) != first
            page.press("Enter")
            assert page.js("document.getElementById('seed').value") == "2"
            written(page)  # "Stop" is disabled then
    assert reached == ["written", "temperature", "top-k", "seed", "again", "SUMMARY", "pasted", "measure", "coloured"]
    calm(page)
