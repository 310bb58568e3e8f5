"""minutegpt/page in a real browser: the slider, the curve, the tooltip, the heads, reloading, widths, hostile texts."""

import base64
import json
import os
import time
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser, Page
from harness import train

from minutegpt import page
from minutegpt.data.tokenizer import char_tokenizer
from minutegpt.page import live

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM and not os.environ.get("MINUTEGPT_NO_SKIP"), reason="there is no chromium"),
]
LETTERS = "\n !abcdefghijklmnopqrstuvwxyz"
PASSAGE = "the quick brown fox\njumps over the lazy dog and then sleeps a little"
STEPS = [0, 10, 20, 40, 80]


def run_data(**changes) -> dict:
    """The data of a run whose every number a test can know: evaluation e, token t costs (t % 5) * (5 - e) / 5 nats."""
    tokenizer = char_tokenizer(LETTERS)
    ids = tokenizer.encode(PASSAGE)
    n, heads, T = len(ids) - 1, 4, 12
    one_hot = [bytes(255 * (k == max(0, q - 1)) for q in range(T) for k in range(q + 1)) for _ in range(heads)]
    rows, samples = [], []
    for e, step in enumerate(STEPS):
        loss = 3.2 - 0.5 * e
        rows.append({"step": step, "seconds": 2.0 * step, "val_loss": loss, "train_loss": loss - 0.1}
                    | {f"{name}/{head // 2}.{head % 2}": 0.2 * e * (head == 1) for head in range(heads)
                       for name in ("previous_token", "induction")})  # fmt: skip
        samples.append({
            "step": step, "seconds": 2.0 * step, "val_loss": loss, "passage": "id",
            "text": ["xq zj!", "th qe", "the quik\nbrwn", "the quick\nbrown fix", "the quick\nbrown fox"][e],
            "loss": [(t % 5) * (5 - e) / 5 for t in range(n)],
            "top": [[x for j in range(5) for x in ((ids[t + 1] + j) % len(LETTERS), 400 - 50 * j)] for t in range(n)],
            "attention": base64.b64encode(b"".join(one_hot)).decode(), "attention_tokens": T,
        })  # fmt: skip
    about = {
        "run": {"name": "out", "dataset": "small", "seed": 1, "kind": "char", "step": 80, "seconds": 160.0,
                "state": "finished", "live": False, "written": time.time(), "expected": 0,
                "end": {"step": 80, "seconds": 160.0}},
        "baselines": {"uniform": 3.37, "bigram": 2.4}, "forecast": [1.3, 0.1], "verdict": "It is under-trained.",
        "compared": [{"name": "earlier", "val": [[0, 0, 3.3], [80, 150, 1.5]]}],
        "prompt": "\n", "passage": ids, "passage_id": "id", "shape": [2, 2],
        "births": [{"step": 40, "layer": 0, "head": 1, "label": "previous_token"}],
        "card": [["model", "tiny"]], "commands": [["sample", "python sample.py --out_dir=out"]],
        "settings": [["max_iters", 80, 5000], ["qat", "int8", ""]],
    }  # fmt: skip
    return live.assemble(about, rows, samples, tokenizer) | changes


@pytest.fixture(scope="module")
def browser():
    assert CHROMIUM, "there is no chromium"
    with Browser() as one:
        yield one


@pytest.fixture
def opened(browser, tmp_path):
    """Opens the page of some data; at the end nothing may have gone wrong, been requested or been forbidden."""
    pages: list[Page] = []

    def open_page(data: dict | None = None, **how) -> Page:
        path = tmp_path / f"{len(pages)}.html"
        page.write(path, data or run_data())
        pages.append(browser.open(path, **how))
        return pages[-1]

    yield open_page
    for one in pages:
        assert one.problems == [] and one.requests == [] and one.js("violations") == []
        one.call("Page.close")


def text_of(one: Page, selector: str) -> str:
    return one.js(f"document.querySelector({json.dumps(selector)}).textContent")


def test_the_slider_moves_everything_and_is_operated_by_keys(opened):
    one = opened()
    assert text_of(one, "#text") == "the quick\nbrown fox" and "step 80" in text_of(one, "#when")
    one.js("document.querySelector('#slider').focus()")
    one.press("Home")
    assert text_of(one, "#text") == "xq zj!" and "loss 3.200" in text_of(one, "#when")
    assert one.js("slider.getAttribute('aria-valuetext')") == "step 0, validation loss 3.200"
    costs = "[...document.querySelectorAll('#passage .token')].map((t) => t.style.getPropertyValue('--share'))"
    first = one.js(costs)
    marker = one.js("now.getAttribute('x1')")
    one.press("ArrowRight", 3)
    assert text_of(one, "#text") == "the quick\nbrown fix"
    later = one.js(costs)
    assert one.js("now.getAttribute('x1')") != marker
    # token 2 costs 1 nat at first, and 2/5 of it now; the first one is given
    assert first[0] == later[0] == "0" and float(first[2]) == pytest.approx(1 / 3.37, abs=1e-3)
    assert float(later[2]) == pytest.approx(0.4 / 3.37, abs=1e-3)
    assert one.js("document.querySelector('#film [aria-current]').id") == "film-3"
    one.click("#film-1")
    assert text_of(one, "#text") == "th qe" and one.js("slider.value") == "1"


def test_it_plays_from_noise_to_text_and_stops(opened):
    one = opened(motion=True)
    one.until("state.playing")  # a reader who comes for the first time sees it play
    seen = set()

    def finished() -> bool:
        seen.add(text_of(one, "#text"))
        return not one.js("state.playing")

    one.until(finished)
    assert len(seen) == 5 and text_of(one, "#text") == "the quick\nbrown fox"
    one.click("#play")
    assert one.js("document.querySelector('#play').getAttribute('aria-label')") == "Pause"
    one.click("#play")
    stopped = text_of(one, "#when")
    time.sleep(1.5)
    assert text_of(one, "#when") == stopped


def test_a_reader_who_prefers_less_motion_sees_the_end_at_once(opened):
    one = opened()
    assert not one.js("state.playing") and "step 80" in text_of(one, "#when")


def test_the_tooltip_has_the_probability_and_the_five_likeliest(opened):
    one = opened()
    one.hover("#passage .token:nth-child(4)")  # the third that is predicted: cost 2 * 1/5 nats
    assert "67%" in text_of(one, "#tip") and "0.40 nats" in text_of(one, "#tip")
    assert one.js("document.querySelectorAll('#tip .bar-row').length") == 5
    assert "40%" in text_of(one, "#tip .bar-row") and one.js("document.querySelectorAll('#tip .actual').length") == 1
    one.press("Escape")
    assert one.js("tip.hidden")
    one.js("document.querySelector('#passage').focus()")
    one.press("Home")
    assert "given, not predicted" in text_of(one, "#tip")
    one.press("ArrowRight", 3)
    assert "0.40 nats" in text_of(one, "#tip")
    chosen = one.js("document.querySelector('#passage').getAttribute('aria-activedescendant')")
    label = one.js(f"document.getElementById('{chosen}').getAttribute('aria-label')")
    assert label.startswith("␣, 67%, likeliest ␣ 40%") and label.count("%") == 6
    box = one.js("(() => { const b = tip.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom] })()")
    assert box[0] >= 0 and box[1] >= 0 and box[2] <= 1280 and box[3] <= 800


def test_the_curve_shows_its_values_its_lines_and_both_axes(opened):
    one = opened()
    labels = text_of(one, "#chart svg")
    for word in ("uniform guessing 3.37", "bigrams 2.40", "forecast 1.30 ± 0.10", "earlier"):
        assert word in labels
    assert one.js("document.querySelectorAll('#chart .val-dot').length") == 5
    one.js("document.querySelector('#chart').focus()")
    one.press("Home")
    assert "step 0 · 0s" in text_of(one, "#readout") and "validation 3.200" in text_of(one, "#readout")
    one.press("ArrowRight", 2)
    assert "step 10 · 20s" in text_of(one, "#readout") and "training 2.600" in text_of(one, "#readout")
    one.press("Enter")
    assert "step 10" in text_of(one, "#when")
    before = one.js("document.querySelector('#chart path.val').getAttribute('d')")
    one.click("#axis label:nth-of-type(2)")
    assert one.js("state.axis") == "seconds" and "2m00s" in text_of(one, "#chart svg")
    assert one.js("document.querySelector('#chart path.val').getAttribute('d')") == before  # seconds are 2 * steps here
    one.hover("#chart")
    assert "validation" in text_of(one, "#readout") and one.js("cross.getAttribute('visibility')") == "visible"


def test_a_head_is_chosen_and_its_attention_is_shown(opened):
    one = opened()
    assert "step 40: head 0.1 looks at the token before" in text_of(one, "#births")
    assert text_of(one, "#head h3") == "Head 0.1"  # the one that was born
    query = "document.querySelector('#head .query')"
    assert one.js(f"{query}.dataset.i") == "11"
    shares = "[...document.querySelectorAll('#head .token')].map((t) => Number(t.style.getPropertyValue('--share')))"
    assert one.js(shares) == [0] * 10 + [1, 0]  # it looks at the token before
    one.hover("#head .token:nth-child(4)")
    assert one.js(shares) == [0, 0, 1] + [0] * 9
    one.click("label:has(#head-1\\\\.0)".replace("\\\\", "\\"))
    assert text_of(one, "#head h3") == "Head 1.0" and one.js(f"{query}.dataset.i") == "3"
    one.press("ArrowRight")
    assert text_of(one, "#head h3") == "Head 1.1"
    one.click("#births button")
    assert text_of(one, "#head h3") == "Head 0.1" and "step 40" in text_of(one, "#when")
    assert "previous token 0.60" in text_of(one, "#head") and "since step 40" in text_of(one, "#head")
    one.press("Tab")  # and before it was born, the label is not there
    one.click("#film-0")
    assert "since step" not in text_of(one, "#head")
    assert "previous" not in one.js("document.querySelector('label:has(:checked) .mark').textContent")


def test_the_run_is_told_in_words(opened):
    one = opened()
    about = text_of(one, "#about")
    for word in (
        "It is under-trained.",
        "modeltiny",
        "python sample.py --out_dir=out",
        "max_iters805000",
        "qatint8(empty)",
    ):
        assert word in about
    assert one.js("document.title") == "out · minuteGPT"
    assert text_of(one, "#summary") == "trained on small · step 80 · 2m40s · finished"


@pytest.mark.parametrize("width", [320, 375, 800, 1280, 1600, 3840])
def test_nothing_overflows_and_nothing_jumps(opened, width):
    data = run_data(settings=[["a_very_long_setting_name_without_any_blank_in_it", "x" * 200, "y" * 90]])
    one = opened(data, width=width, height=900, dark=width == 800)
    assert one.js("document.documentElement.scrollWidth") <= width
    places = """[...document.querySelectorAll("section, h2, #film, #timeline, #head, #grid")].map((node) => {
        const box = node.getBoundingClientRect();
        return [node.id, box.left, box.top + scrollY, box.width].map((x) => x.toFixed?.(0) ?? x).join(" ");
    })"""
    one.js("show(0)")
    before = one.js(places)
    for i in (1, 2, 3, 4):
        one.js(f"show({i})")
        assert one.js(places) == before
    sizes = one.js(
        "[...document.querySelectorAll('#play, #slider, .cell')].map((n) => n.getBoundingClientRect().height)"
    )
    assert min(sizes) >= 24  # large enough for a finger


def test_every_control_has_a_name_and_can_be_reached(opened):
    one = opened()
    nodes = one.call("Accessibility.getFullAXTree")["nodes"]
    controls = [
        node
        for node in nodes
        if node.get("role", {}).get("value") in ("button", "slider", "radio", "listbox", "option")
    ]
    assert len(controls) > 60
    assert all(node.get("name", {}).get("value") for node in controls), [
        n for n in controls if not n["name"].get("value")
    ][:3]
    headings = [n["name"]["value"] for n in nodes if n.get("role", {}).get("value") == "heading"]
    assert headings[:3] == ["out", "From noise to text", "The curve"] and "Attention heads" in headings
    reached = set()
    for _ in range(30):
        one.press("Tab")
        reached.add(one.js("document.activeElement.id"))
    assert {"play", "slider", "chart", "passage", "film-0"} <= reached
    assert any(name.startswith("head-") for name in reached) and any(name.startswith("attention-") for name in reached)


# ---------------------------------------------------------------------------------------- reloading


def live_run(ago: float = 0.0, expected: float = 1.0, **changes) -> dict:
    data = run_data(**changes)
    data["run"] |= {"live": True, "state": "training", "written": time.time() - ago, "expected": expected}
    return data


def test_a_live_page_reloads_itself_and_keeps_the_place(browser, tmp_path):
    path = tmp_path / "run.html"
    page.write(path, live_run())
    one = browser.open(path, height=500)
    one.click("#film-2")
    one.click("#axis label:nth-of-type(2)")
    one.click("label:has(#head-1\\.0)")
    one.js("document.querySelector('#slider').focus()")
    one.js("scrollTo(0, 700)")
    place = one.js("scrollY")
    data = live_run()
    data["evaluations"].append(data["evaluations"][-1] | {"step": 100, "text": "and more"})
    before = one.loaded
    page.write(path, data)
    one.until(lambda: one.loaded > before)
    one.until("evaluations.length === 6")  # it is the new page
    assert "step 20" in text_of(one, "#when") and one.js("state.axis") == "seconds"
    assert text_of(one, "#head h3") == "Head 1.0"
    assert abs(one.js("scrollY") - place) < 2 and one.js("document.activeElement.id") == "slider"
    one.js("show(99)")  # the last one: from now on the page follows the run
    data["evaluations"].append(data["evaluations"][-1] | {"step": 120, "text": "even more"})
    page.write(path, data | {"run": data["run"] | {"live": False, "state": "finished"}})
    one.until("evaluations.length === 7")
    assert text_of(one, "#text") == "even more"
    done = one.loaded  # and it is whole: it does not reload any more
    end = time.monotonic() + 4
    while time.monotonic() < end:
        browser.receive(0.1)
    assert one.loaded == done and one.problems == [] and one.js("violations") == []


def test_a_reader_who_is_busy_is_not_interrupted(browser, tmp_path):
    path = tmp_path / "run.html"
    page.write(path, live_run())
    one = browser.open(path)
    one.hover("#passage .token:nth-child(4)")
    before, end = one.loaded, time.monotonic() + 4
    while time.monotonic() < end:
        browser.receive(0.1)
    assert one.loaded == before
    one.press("Escape")
    one.until(lambda: one.loaded > before)


def test_a_run_that_was_killed_is_not_waited_for(opened):
    one = opened(live_run(ago=3600, expected=10))
    stale = text_of(one, "#stale")
    assert "Last written" in stale and "seems to have been stopped" in stale and not one.js("stale.hidden")
    before, end = one.loaded, time.monotonic() + 3
    while time.monotonic() < end:
        one.browser.receive(0.1)
    assert one.loaded == before


def test_the_wait_until_a_reload(opened):
    one = opened()
    wait = [one.js(f"untilReload({age}, 10)") for age in (-50, 0, 5, 9.5, 12, 30, 100, 149, 151)]
    assert wait == [11, 11, 6, 1.5, 2, 10, 45, 60, None]
    assert [one.js(f"untilReload({age}, 300)") for age in (0, 290, 1019, 1021)] == [15, 11, 60, None]


# ---------------------------------------------------------------------------------------- strangers' texts

ATTACK = "</script><img src=x onerror='window.hacked=1'><svg onload='window.hacked=1'><!-- "
ATTACK += "\u2028 \u202e{{scripts}}`${hacked=1}"


def attacked(value):
    """Every text of some data, with an attack in it."""
    if isinstance(value, dict):
        return {key: attacked(item) for key, item in value.items()}
    if isinstance(value, list):
        return [attacked(item) for item in value]
    return ATTACK if isinstance(value, str) else value


def test_a_text_of_a_stranger_is_shown_as_text(opened):
    data = run_data()
    hostile = attacked(data)
    for row, usual in zip(hostile["evaluations"], data["evaluations"], strict=True):
        row["attention"] = usual["attention"]
    for birth in hostile["births"]:
        birth["label"] = "induction"
    one = opened(hostile)
    for i in range(5):
        one.js(f"show({i})")
    one.hover("#passage .token:nth-child(4)")
    one.js("document.querySelector('#head .token').dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))")
    assert one.js("window.hacked") is None
    assert one.js("document.querySelectorAll('img, iframe, object, embed, link, svg[onload]').length") == 0
    assert one.js("document.querySelectorAll('script').length") == 2  # the data and page.js
    shown = ATTACK.replace("\u2028", "‹2028›").replace("\u202e", "‹202e›")
    assert text_of(one, "#text") == shown and text_of(one, "#name") == shown
    assert shown in text_of(one, "#card") and shown in text_of(one, "#settings") and shown in text_of(one, "#verdict")
    assert one.js("document.title").startswith("</script><img")


def test_a_script_that_is_not_of_the_page_does_not_run(browser, tmp_path):
    """Even markup that got into the page could neither run nor ask for anything."""
    path = tmp_path / "run.html"
    html = page.render(run_data()).replace("<header>", "<script>window.hacked = 1</script><img src=https://a.example/x "
                                           "onerror='window.hacked = 1'><header>")  # fmt: skip
    path.write_text(html)
    one = browser.open(path)
    one.js("fetch('https://a.example/').catch(() => 0)")
    assert one.js("window.hacked") is None
    assert any("img-src" in found for found in one.js("violations"))
    assert any("script-src" in found for found in one.js("violations"))
    assert any("connect-src" in found for found in one.js("violations"))


def test_a_worker_from_a_blob_may_run(opened, tmp_path, browser):
    """As in the page that export.py writes."""
    path = tmp_path / "worker.html"
    engine = "onmessage = (event) => postMessage(2 * event.data);\n"
    starter = """{
        const source = byId("script-engine").textContent;
        const worker = new Worker(URL.createObjectURL(new Blob([source], { type: "text/javascript" })));
        window.answer = new Promise((resolve) => (worker.onmessage = (event) => resolve(event.data)));
        worker.postMessage(Number(byId("payload-number").textContent));
        const rows = [[1], [0.5, 0.5]];
        byId("model").append(showAttention(rows, ["a", "b"], 1), token("<b>", 1));
        byId("model").hidden = false;
    }"""
    page.write(path, run_data(), {"engine": engine, "starter": starter}, {"number": "21"})
    one = browser.open(path)
    assert one.js("answer") == 42 and "<b>" in text_of(one, "#model")
    assert one.problems == [] and one.js("violations") == []


def test_odd_data_leaves_a_page(opened):
    """An old page, a run without an evaluation, heads without attention: what there is, is shown."""
    one = opened({"run": {"name": "x", "dataset": "d", "step": 0, "state": "training", "live": False}})
    assert text_of(one, "#name") == "x" and one.js("heads.hidden") and one.js("timeline.hidden")
    begun = opened(run_data(evaluations=[], births=[], curve={"train": [], "val": []}))
    assert "first sample comes" in text_of(begun, "#verse-note") and "begins with" in text_of(begun, "#chart")
    data = run_data()
    for row in data["evaluations"]:
        row |= {"attention": None, "top": None, "loss": None, "heads": None, "text": ""}
    other = opened(data)
    other.js("show(0)")
    assert other.js("heads.hidden") and other.js("surprise.hidden")


def test_a_loss_that_is_not_finite_leaves_a_page(opened):
    data = run_data()
    data["evaluations"][2] |= {"val_loss": float("nan"), "loss": [float("nan")] * len(data["evaluations"][2]["loss"])}
    one = opened(data)
    one.js("show(2)")
    assert "loss not finite" in text_of(one, "#when") and one.js("slider.max") == "4"
    assert one.js("byId('now-dot').getAttribute('visibility')") == "hidden" and text_of(one, "#least-0") == ""
    one.js("show(3)")
    assert one.js("byId('now-dot').getAttribute('visibility')") == "visible" and text_of(one, "#least-0")


def test_an_evaluation_of_another_text_shows_no_costs(opened):
    data = run_data()
    data["evaluations"][1] |= {"loss": None, "top": None, "attention": None}
    one = opened(data)
    assert text_of(one, "#least-0")
    one.js("show(1)")
    assert text_of(one, "#least-0") == ""
    one.js("document.querySelector('#passage').focus()")
    one.press("ArrowRight", 3)
    assert "was not measured at this evaluation" in text_of(one, "#tip")


def test_a_run_and_its_page(browser, house: Path):
    running = train(house, "shown", max_iters=30, eval_interval=10)
    assert running.wait() == 0, running.output
    one = browser.open(house / "shown" / "run.html")
    assert one.problems == [] and one.requests == [] and one.js("violations") == []
    assert one.js("evaluations.length") == 4 and "finished" in text_of(one, "#summary")
    one.js("show(0)")
    noise = text_of(one, "#text")
    one.js("show(3)")
    assert text_of(one, "#text") != noise and one.js("document.querySelectorAll('.cell').length") == 4
