// The section "model" of an exported page: it writes on from the reader's text, and colours any text by surprise.
//
// The model runs in a Worker (worker.js). This script comes after page.js and uses its helpers: el, byId, token, bars,
// explain, rove, visible, quoted, showAttention, LABELS. A text becomes the text of an element, and never markup.
"use strict";

// Starts the Worker and loads the model. Returns ask(task, values, listen), a promise of how the task ended: { done },
// { error }, or { stopped: the task that came later }. listen gets lists of answers, once per picture on the screen.
function startModel() {
  const source = `(${modelWorker})()`; // of the script "worker": engine.js, weights.js, tokenizer.js and worker.js
  const worker = new Worker(URL.createObjectURL(new Blob([source], { type: "text/javascript" })));
  let newest = 0, waiting = [];
  let listener = () => {}, finish = () => {};
  const flush = () => {
    const answers = waiting;
    waiting = [];
    if (answers.length) listener(answers);
  };
  worker.onmessage = ({ data: { id, done, error, ...answer } }) => {
    if (id !== newest) return;
    if (done || error) {
      flush();
      finish({ done, error });
    } else if (waiting.push(answer) === 1) requestAnimationFrame(flush);
  };
  worker.onerror = (event) => finish({ error: event.message });
  return (task, values = {}, listen = () => {}) => {
    waiting = [];
    finish({ stopped: task });
    return new Promise((resolve) => {
      [listener, finish] = [listen, resolve];
      worker.postMessage({ task, id: ++newest, ...values });
    });
  };
}

async function startPlay() {
  const WRITE = 300; // tokens
  const LOOK = 64; // tokens whose attention is shown
  const { config, n_params: parameters, dtype } = data.model;
  const TOPS = [1, 2, 3, 5, 10, 20, 50, 100, 200, 500].filter((k) => k < config.vocab_size).concat(0); // 0: all

  // -- the elements

  const slider = (id, label, max, step, value) => {
    const input = el("input", { id, type: "range", min: 0, max, step, value });
    const output = el("output", { for: id });
    return { input, output, row: el("div", { class: "play-slider" }, el("label", { for: id }, label), input, output) };
  };
  const textarea = (id, rows) => el("textarea", { id, rows, spellcheck: "false", autocomplete: "off", disabled: "" });
  const button = (id, label) => el("button", { id, type: "button", disabled: "" }, label);
  const tokens = (id, label) => el("div", { id, class: "tokens", role: "listbox", tabindex: 0, "aria-label": label });
  const status = (id) => el("p", { id, class: "note", role: "status" });

  const prompt = textarea("prompt", 3), written = tokens("written", "What the model writes"), speed = status("speed");
  const temperature = slider("temperature", "Temperature", 2, 0.05, 0.8);
  const top = slider("top-k", "Top k", TOPS.length - 1, 1, TOPS.length - 1);
  const seed = el("input", { id: "seed", type: "number", min: 0, max: 2 ** 32 - 1, value: 1 });
  const again = button("again", "Again"), stop = button("stop", "Stop"), next = el("div", { id: "next" });
  const lookNote = status("look-note"), matrix = el("div", { id: "look-matrix" });
  const heads = el("select", { id: "look-head" });
  for (let i = 0; i < config.n_layer * config.n_head; i++) {
    const layer = Math.floor(i / config.n_head), head = i % config.n_head;
    const births = (data.births ?? []).filter((birth) => birth.layer === layer && birth.head === head);
    const name = [`${layer}.${head}`, ...births.map(({ label }) => LABELS[label]?.[1])].join(", ");
    heads.append(el("option", { value: i }, name));
  }
  const look = el("details", { id: "look" }, el("summary", {}, "Attention of the text so far"),
    el("p", { class: "play-row" }, el("label", { for: "look-head" }, "Head (layer.head)"), heads), lookNote, matrix);
  const pasted = textarea("pasted", 4), measure = button("measure", "Colour it"), cost = status("cost");
  const coloured = tokens("coloured", "The text, coloured by surprise");

  if (!data.run.dataset) byId("summary").textContent = "";
  if (!data.curve) for (const id of ["verse", "curve", "surprise", "heads", "about"]) byId(id).hidden = true;
  byId("model").setAttribute("aria-labelledby", "model-title");
  byId("model").hidden = false;
  byId("model").append(
    el("h2", { id: "model-title" }, "Write with it"),
    el("p", { class: "note" }, `The model is in this file: ${parameters.toLocaleString("en")} parameters, ${dtype}. ` +
      "It computes in this browser, and what you type stays here."),
    el("div", { class: "play" },
      el("div", {},
        el("label", { for: "prompt" }, "Type the start of a text, and the model writes on."), prompt, written, speed),
      el("div", {}, temperature.row, top.row,
        el("div", { class: "play-row" }, el("label", { for: "seed" }, "Seed"), seed, again, stop),
        el("h3", {}, "After your text comes"), next)),
    look,
    el("h3", {}, "How surprising is a text?"),
    el("label", { for: "pasted" }, "Paste any text. The model reads it, and colours each token by what it cost."),
    pasted, el("div", { class: "play-row" }, measure), cost, coloured,
  );

  // -- the Worker: one task at a time

  const ask = startModel();
  speed.textContent = "Reading the weights ...";
  const { error } = await ask("load", { ...data.model, weights: byId("payload-weights").textContent });
  if (error) {
    speed.textContent = `The model cannot be read: ${error}`;
    return;
  }
  for (const element of [prompt, again, pasted, measure]) element.disabled = false;

  let busy = false; // with a task that shows tokens: attention waits for its end

  // Runs a task whose answers are tokens, { text, name, p, top }, and shows each in a box as style(answer). Returns how it
  // ended, and in which time; null where the box shows a later task. other(answer) gets the answers of another kind.
  async function show(box, task, values, style, other = () => {}) {
    const answers = box.answers = [], began = performance.now();
    let missing = "";
    box.replaceChildren();
    stop.disabled = false;
    busy = true;
    const end = await ask(task, values, (list) => {
      for (const answer of list) {
        if (answer.missing) missing = ` The vocabulary lacks ${answer.missing.map(quoted).join(" ")}, left out.`;
        else if (answer.text === undefined) other(answer);
        else {
          answers.push(answer);
          box.append(style(answer));
        }
      }
    });
    if (box.answers !== answers) return null;
    const shown = [...box.children];
    rove(box, shown, (i) => explain(shown[i], answers[i].name, answers[i].p, answers[i].top), hideTip);
    if (!end.stopped || end.stopped === "stop") {
      stop.disabled = true;
      busy = false;
      if (look.open) attend();
    }
    return { ...end, missing, answers, seconds: (performance.now() - began) / 1000 };
  }

  const failed = (end) => (end.error ? `Error: ${end.error}.` : end.stopped ? "Stopped." : "");

  async function write() {
    const top_k = TOPS[top.input.value];
    temperature.output.value = Number(temperature.input.value).toFixed(2);
    top.output.value = top_k || "all";
    speed.setAttribute("aria-busy", "true"); // a screen reader waits for the end
    speed.textContent = "Writing ...";
    const values = { prompt: prompt.value, n: WRITE, seed: Number(seed.value), top_k };
    const end = await show(
      written, "write", { ...values, temperature: Number(temperature.input.value) },
      ({ text }) => el("span", { class: "token" }, visible(text)), (answer) => next.replaceChildren(bars(answer.next)),
    );
    if (!end) return;
    const rate = (end.answers.length / end.seconds).toFixed(0);
    speed.removeAttribute("aria-busy");
    speed.textContent = `${failed(end)} ${end.answers.length} tokens, ${rate} per second.${end.missing}`;
  }

  async function attend() {
    const text = prompt.value + (written.answers ?? []).map((answer) => answer.text).join("");
    lookNote.textContent = "";
    const end = await ask("attend", { text, most: LOOK }, (list) => {
      const { texts, layers } = list.at(-1); // before it, what the vocabulary lacks
      if (!layers) return;
      const layer = Math.floor(heads.value / config.n_head), head = heads.value % config.n_head, T = texts.length;
      const row = (q) => Array.from(layers[layer].subarray((head * T + q) * T, (head * T + q + 1) * T));
      matrix.replaceChildren(showAttention(texts.map((_, q) => row(q)), texts));
      lookNote.textContent = `The last ${T} tokens. Choose one to see what it looks at.`;
    });
    if (end.error) lookNote.textContent = failed(end);
  }

  async function colourText() {
    const text = pasted.value, gzip = await gzipBytes(text), characters = [...text].length;
    if (!characters) return;
    cost.textContent = "Reading ...";
    const end = await show(coloured, "surprise", { text }, ({ text, nats }) => token(text, nats));
    if (!end) return;
    const bits = end.answers.reduce((sum, { nats }) => sum + nats / Math.LN2, 0);
    const read = end.answers.reduce((sum, answer) => sum + [...answer.text].length, 0);
    const found = `The model: ${(bits / read).toFixed(2)} bits per character. ` +
      `gzip, which starts from nothing: ${((8 * gzip) / characters).toFixed(2)}.`;
    cost.textContent = `${failed(end)} ${read ? found : ""}${end.missing}`;
  }

  async function gzipBytes(text) {
    const stream = new Blob([text]).stream().pipeThrough(new CompressionStream("gzip"));
    return (await new Response(stream).arrayBuffer()).byteLength;
  }

  for (const input of [prompt, temperature.input, top.input, seed]) input.addEventListener("input", write);
  again.addEventListener("click", () => {
    seed.value = (Number(seed.value) + 1) % 2 ** 32;
    write();
  });
  stop.addEventListener("click", () => {
    stop.disabled = true;
    ask("stop");
  });
  measure.addEventListener("click", colourText);
  for (const [control, event] of [[heads, "change"], [look, "toggle"]])
    control.addEventListener(event, () => {
      if (look.open && !busy) attend();
    });
  prompt.value = data.prompt?.trim() ? data.prompt : "";
  prompt.placeholder = "without a text, it starts by itself";
  await write();
}

startPlay();
