"use strict";
// The page of a run. The data is the JSON in the element "data", as collect.py describes it.
// 1. Helpers, which the scripts of an exported page use too. 2. What the reader chose. 3. The parts of the page.
// 4. Reloading while the run lives.
//
// A text of the run (sample, token, name, setting) reaches the page by textContent alone.

// ------------------------------------------------------------------------------------------------ 1. helpers

const byId = (id) => document.getElementById(id);
const clamp = (x, low, high) => Math.min(high, Math.max(low, x));
const SVG = new Set(["svg", "g", "path", "line", "rect", "circle", "text"]);

// A new element. Attributes named on... are listeners; children are elements or texts.
function el(tag, attributes = {}, ...children) {
  const node = SVG.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return node;
}

// Characters without a shape of their own, such as controls and marks that turn the direction of text, as their code.
function visible(text) {
  const hidden = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;
  return String(text).replace(hidden, (c) => `‹${c.charCodeAt(0).toString(16)}›`);
}

// A token's text in one line, for labels: blanks and new lines have signs.
function quoted(text) {
  return text === "" ? "(empty)" : visible(text).replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣");
}

function percent(p) {
  if (p >= 0.9995) return "100%";
  return p >= 0.1 ? `${(100 * p).toFixed(0)}%` : p >= 0.001 ? `${(100 * p).toFixed(1)}%` : "under 0.1%";
}

// A token as an element. Its colour shows its cost in nats: see colour.
function token(text, nats = null) {
  const shown = visible(text).replaceAll("\n", "↵\n");
  return colour(el("span", { class: "token" }, shown), nats);
}

// Colours an element by surprise, nats from 0 (certain) to worst (as bad as a uniform guess).
function colour(element, nats, worst = data.baselines?.uniform ?? 3) {
  element.style.setProperty("--share", nats === null ? 0 : clamp(nats / worst, 0, 1).toFixed(3));
  return element;
}

// Bars of the likeliest tokens. top: [[text, probability], ...]; actual: the text of the token that came, if any.
function bars(top, actual = null) {
  return el("div", { class: "bars" }, ...top.map(([text, p]) => {
    const bar = el("span", { class: "bar" });
    bar.style.setProperty("--share", p);
    const name = el("span", { class: "bar-name" }, quoted(text));
    return el("div", { class: text === actual ? "bar-row actual" : "bar-row" }, name, bar, el("span", {}, percent(p)));
  }));
}

// Shows the tooltip of a token next to it. probability: of this token, after those before it; top: as for bars.
function explain(element, text, probability, top) {
  const nats = probability > 0 ? -Math.log(probability) : Infinity;
  const cost = Number.isFinite(nats) ? `, costs ${nats.toFixed(2)} nats` : "";
  showTip(element, el("p", {}, el("b", {}, quoted(text)), ` had ${percent(probability)}${cost}`), bars(top, text));
}

let tipOf = null; // the element that the tooltip is of

function showTip(element, ...content) {
  tipOf = element;
  byId("tip").replaceChildren(...content);
  byId("tip").hidden = false;
  placeTip();
}

// Below its element, or above it where there is no room.
function placeTip() {
  if (!tipOf) return;
  const [tip, element] = [byId("tip"), tipOf];
  const at = element.getClientRects()[0] ?? element.getBoundingClientRect();
  const { width, height } = tip.getBoundingClientRect();
  const below = at.bottom + 8 + height < innerHeight - 56;
  tip.style.left = `${clamp(at.left + at.width / 2 - width / 2, 8, Math.max(8, innerWidth - width - 8))}px`;
  tip.style.top = `${below ? at.bottom + 8 : Math.max(8, at.top - height - 8)}px`;
}

function hideTip() {
  tipOf = null;
  byId("tip").hidden = true;
}

// Makes a row of elements one stop of the keyboard: arrows, Home and End move in it. choose(i) on hover and on keys,
// leave() when neither is there any more. Each element is an option of the container, a listbox.
function rove(container, items, choose, leave = () => {}) {
  let current = -1;
  const mark = (i) => {
    items[current]?.removeAttribute("aria-selected");
    current = i;
    items[i]?.setAttribute("aria-selected", "true");
    if (i < 0) container.removeAttribute("aria-activedescendant");
    else container.setAttribute("aria-activedescendant", items[i].id);
  };
  const take = (i) => {
    mark(i);
    choose(i);
  };
  items.forEach((item, i) => {
    item.id ||= `${container.id}-${i}`;
    item.setAttribute("role", "option");
    item.dataset.i = i;
  });
  container.onpointerover = (event) => {
    const item = event.target.closest("[data-i]");
    if (item && container.contains(item)) take(Number(item.dataset.i));
  };
  container.onpointerleave = (event) => {
    if (document.activeElement === container || event.pointerType === "touch") return; // a finger leaves after each tap
    mark(-1);
    leave();
  };
  container.onblur = () => {
    mark(-1);
    leave();
  };
  container.onkeydown = (event) => {
    const line = lineOf(items, Math.max(0, current));
    const moves = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: line, ArrowUp: -line, Home: -Infinity, End: Infinity };
    if (event.key === "Escape") leave();
    if (!(event.key in moves) || !items.length) return;
    event.preventDefault();
    take(current < 0 ? 0 : clamp(current + moves[event.key], 0, items.length - 1));
    items[current].scrollIntoView?.({ block: "nearest" });
  };
}

// How many items of the wrapped row are in the line of item i.
function lineOf(items, i) {
  const top = items[i]?.offsetTop;
  return Math.max(1, items.filter((item) => Math.abs(item.offsetTop - top) < 4).length);
}

// Attention as an element: a matrix, and the tokens coloured by how much one of them, the query, looks at each.
// weights[q][k], k <= q: from token q to token k; each row sums to 1. query: chosen at first; onquery(q): on a change.
function showAttention(weights, tokens, query = weights.length - 1, onquery = () => {}) {
  const n = Math.min(weights.length, tokens.length);
  const canvas = picture(weights.slice(0, n));
  const line = el("div", { class: "tokens", role: "listbox", tabindex: "0", id: `attention-${showAttention.count++}` });
  line.setAttribute("aria-label", "Tokens: choose one to see what it looks at");
  const items = tokens.slice(0, n).map((text) => token(text));
  line.append(...items);
  const choose = (q) => {
    items.forEach((item, k) => {
      const weight = k <= q ? weights[q][k] : 0;
      item.style.setProperty("--share", Math.sqrt(weight).toFixed(3));
      item.classList.toggle("query", k === q);
      item.classList.toggle("later", k > q);
      item.setAttribute("aria-label", `${quoted(tokens[k])} ${k <= q ? percent(weight) : "comes later"}`);
    });
    onquery(q);
  };
  rove(line, items, choose);
  canvas.onpointermove = canvas.onpointerdown = (event) => {
    choose(clamp(Math.floor((event.offsetY / canvas.clientHeight) * n), 0, n - 1));
  };
  choose(clamp(query, 0, n - 1));
  return el("div", { class: "attention" }, canvas, line);
}
showAttention.count = 0;

// The matrix of attention as a picture: a row per query, dark where it looks.
function picture(weights, canvas = el("canvas", { class: "matrix", "aria-hidden": "true" })) {
  const n = (canvas.width = canvas.height = weights.length);
  const paint = canvas.getContext("2d");
  const image = paint.createImageData(n, n);
  const rgb = getComputedStyle(document.documentElement).getPropertyValue("--attention").split(" ").map(Number);
  for (let q = 0; q < n; q++)
    for (let k = 0; k <= q; k++) image.data.set([...rgb, 255 * Math.sqrt(weights[q][k])], 4 * (q * n + k));
  paint.putImageData(image, 0, 0);
  return canvas;
}

// Bytes of a base64 text.
function bytesOf(base64) {
  return Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
}

// "1m35s", as the run prints it.
function duration(seconds) {
  const s = Math.round(seconds);
  if (s < 60) return `${s}s`;
  const two = (n) => String(n).padStart(2, "0");
  const minutes = Math.floor(s / 60);
  return s < 3600 ? `${minutes}m${two(s % 60)}s` : `${Math.floor(minutes / 60)}h${two(minutes % 60)}m`;
}

// ------------------------------------------------------------------------------------------------ 2. what was chosen

const data = JSON.parse(byId("data").textContent);
const evaluations = data.evaluations ?? [];
const KEY = `minutegpt:${location.pathname}`;
const chosen = { step: null, axis: "step", head: null, query: null, playing: false, scroll: 0, focus: null };
const state = { ...chosen, ...recall() };
let index = 0; // of the evaluation that is shown

function recall() {
  try {
    return JSON.parse(sessionStorage.getItem(KEY)) ?? {};
  } catch {
    return {}; // no storage, or not ours
  }
}

function remember() {
  try {
    const place = { scroll: scrollY, focus: document.activeElement?.id ?? null };
    sessionStorage.setItem(KEY, JSON.stringify({ ...state, ...place }));
  } catch {
    // no storage: the page works, and forgets at a reload
  }
}

// The index of the evaluation nearest to a step. Where no step was chosen, the last one: the page follows the run.
function nearest(step) {
  if (step === null) return Math.max(0, evaluations.length - 1);
  const distance = (i) => Math.abs(evaluations[i].step - step);
  return evaluations.reduce((best, _, i) => (distance(i) < distance(best) ? i : best), 0);
}

// Shows an evaluation everywhere.
function show(i) {
  if (!evaluations.length) return;
  index = clamp(i, 0, evaluations.length - 1);
  state.step = index === evaluations.length - 1 ? null : evaluations[index].step;
  const { step, seconds, val_loss } = evaluations[index];
  const loss = val_loss === null ? "not finite" : val_loss.toFixed(3);
  byId("slider").value = index;
  byId("slider").setAttribute("aria-valuetext", `step ${step}, validation loss ${loss}`);
  const time = seconds === undefined ? [] : [el("span", { class: "wide" }, ` · ${duration(seconds)}`)];
  byId("when").replaceChildren(`step ${step}`, ...time, " · ", el("b", {}, `loss ${loss}`));
  hideTip();
  showText();
  markCurve();
  showSurprise();
  showHeads();
}

// ------------------------------------------------------------------------------------------------ 3. the parts

function startHeader() {
  const { run } = data;
  byId("name").textContent = visible(run.name);
  const status = run.state === "training" ? "training now" : run.state;
  const step = run.live && run.end ? `step ${run.step} of about ${run.end.step}` : `step ${run.step}`;
  const parts = [`trained on ${run.dataset}`, step, duration(run.seconds ?? 0), status];
  byId("summary").textContent = visible(parts.join(" · "));
  byId("summary").classList.toggle("live", Boolean(run.live));
}

// -- from noise to text

function startText() {
  const start = data.prompt === "" ? "the end of another text" : "an empty line";
  const prompt = data.prompt?.trim() ? `the prompt “${quoted(data.prompt)}”` : start;
  byId("verse-note").textContent = evaluations.length
    ? `What the model writes after ${prompt}, with the same random numbers at every evaluation.`
    : "The first sample comes with the first evaluation.";
  byId("text").classList.toggle("code", looksLikeCode(data.passage ?? []));
  startFilm();
  reserveText();
}

// One line for each of a few evaluations, from the first to the last.
function startFilm() {
  const n = Math.min(8, evaluations.length);
  const places = Array.from({ length: n }, (_, i) => Math.round((i * (evaluations.length - 1)) / Math.max(1, n - 1)));
  byId("film").replaceChildren(...places.map((i) => {
    const { step, text } = evaluations[i];
    const line = visible(text).trim().replace(/\s*\n\s*/g, " / ");
    const choose = () => {
      play(false);
      show(i);
    };
    const number = el("span", { class: "film-step" }, step);
    return el("li", {}, el("button", { type: "button", id: `film-${i}`, onclick: choose }, number, line));
  }));
}

// Room for the longest of the texts, so that nothing below it moves.
function reserveText() {
  const box = byId("text");
  const ruler = box.cloneNode(false);
  for (const name of ["id", "style"]) ruler.removeAttribute(name); // without the room that it has now
  ruler.classList.add("ruler");
  box.after(ruler);
  const heights = evaluations.map(({ text }) => {
    ruler.textContent = visible(text);
    return ruler.offsetHeight;
  });
  ruler.remove();
  box.style.minHeight = `${Math.max(0, ...heights)}px`;
}

function looksLikeCode(tokens) {
  const text = tokens.join("");
  return (text.match(/[(){}[\]=_<>;]/g) ?? []).length > 0.03 * text.length;
}

// Characters that the evaluation before wrote in the same place stay as they are; the others fade in.
function showText() {
  const before = [...byId("text").textContent];
  const now = [...visible(evaluations[index].text)];
  const parts = [];
  for (let i = 0; i < now.length; ) {
    const same = now[i] === before[i];
    let end = i + 1;
    while (end < now.length && (now[end] === before[end]) === same) end++;
    const run = now.slice(i, end).join("");
    parts.push(same ? run : el("span", { class: "new" }, run));
    i = end;
  }
  byId("text").replaceChildren(...parts);
  for (const frame of document.querySelectorAll("#film button")) {
    if (frame.id === `film-${index}`) frame.setAttribute("aria-current", "step");
    else frame.removeAttribute("aria-current");
  }
}

// -- the curve

const chart = { points: [], at: -1, toX: () => 0 };

function startCurve() {
  const radios = [...document.querySelectorAll("#axis input")];
  for (const radio of radios) {
    radio.checked = radio.value === state.axis;
    radio.onchange = () => {
      state.axis = radio.value;
      drawCurve();
    };
  }
  const box = byId("chart");
  const inside = (event) => event.clientX - box.getBoundingClientRect().left;
  const point = (x) => chart.points.reduce((best, p, i, all) => {
    return Math.abs(chart.toX(p.x) - x) < Math.abs(chart.toX(all[best].x) - x) ? i : best;
  }, 0);
  box.onpointermove = (event) => readOut(point(inside(event)));
  box.onpointerleave = () => readOut(-1);
  box.onblur = () => readOut(-1);
  box.onclick = (event) => {
    if (chart.points.length) show(nearest(chart.points[point(inside(event))].step));
  };
  box.onkeydown = (event) => {
    const moves = { ArrowRight: 1, ArrowLeft: -1, PageUp: 10, PageDown: -10, Home: -Infinity, End: Infinity };
    if (event.key === "Enter" && chart.at >= 0) show(nearest(chart.points[chart.at].step));
    if (!(event.key in moves)) return;
    event.preventDefault();
    readOut(clamp(chart.at + moves[event.key], 0, chart.points.length - 1));
  };
  new ResizeObserver(drawCurve).observe(box);
}

// About n round numbers from low to high; with seconds, round times.
function ticks(low, high, n, seconds = false) {
  const rough = (high - low) / n;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const times = seconds ? [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 21600, 43200, 86400] : [];
  const step = times.find((time) => time >= rough) ?? unit * ([1, 2, 5, 10].find((k) => k * unit >= rough) ?? 10);
  const found = [];
  for (let x = Math.ceil(low / step) * step; x <= high + step * 1e-6; x += step) found.push(x);
  return found;
}

function drawCurve() {
  const box = byId("chart");
  const [W, H] = [box.clientWidth, box.clientHeight];
  const { train = [], val = [] } = data.curve ?? {};
  const { uniform, bigram } = data.baselines ?? {};
  const column = state.axis === "seconds" ? 1 : 0;
  const compared = data.compared ?? [];
  const losses = [...train, ...val, ...compared.flatMap((run) => run.val)].map((p) => p[2]);
  if (!W || !(train.length + val.length)) {
    box.replaceChildren(el("p", { class: "note" }, "The curve begins with the first step line."));
    return;
  }
  const rem = parseFloat(getComputedStyle(document.documentElement).fontSize);
  const left = 2.4 * rem, right = 0.8 * rem, top = 0.8 * rem, bottom = 1.6 * rem;
  const end = data.run.live ? data.run.end?.[state.axis] ?? 0 : 0;
  const xMax = Math.max(end, 1e-9, ...[...train, ...val].map((p) => p[column]));
  const reach = [...losses, uniform, bigram, data.forecast?.[0]].filter(Number.isFinite);
  const low = Math.min(...reach), high = Math.max(...reach), pad = 0.06 * (high - low || 1);
  const x = (value) => left + (Math.min(value, xMax) / xMax) * (W - left - right);
  const y = (loss) => top + ((high + pad - loss) / (high - low + 2 * pad)) * (H - top - bottom);
  const path = (points) => lineThrough(points.map((p) => [x(p[column]), y(p[2])]));
  const svg = el("svg", { width: W, height: H, viewBox: `0 0 ${W} ${H}`, role: "img" });
  const last = val.at(-1)?.[2];
  const now = last ? `Validation loss now ${last.toFixed(3)}. ` : "";
  const axis = column ? "seconds" : "steps";
  svg.setAttribute("aria-label", `Loss against ${axis}. ${now}The arrow keys move along the curve.`);
  for (const loss of ticks(low, high, H / (4 * rem))) {
    svg.append(el("line", { class: "grid", x1: left, x2: W - right, y1: y(loss), y2: y(loss) }));
    const place = { class: "tick", x: left - 8, y: y(loss), "text-anchor": "end", dy: "0.32em" };
    svg.append(el("text", place, +loss.toFixed(2)));
  }
  for (const value of ticks(0, xMax, W / (7 * rem), column === 1)) {
    const text = column ? duration(value) : value.toLocaleString("en");
    const anchor = x(value) > W - 2 * rem ? "end" : value ? "middle" : "start";
    svg.append(el("text", { class: "tick", x: x(value), y: H - 0.3 * rem, "text-anchor": anchor }, text));
  }
  if (data.forecast) {
    const [loss, margin] = data.forecast;
    const height = Math.max(3, y(loss - margin) - y(loss + margin));
    svg.append(el("rect", { class: "forecast", x: left, width: W - left - right, y: y(loss + margin), height }));
    const text = `forecast ${loss.toFixed(2)} ± ${margin.toFixed(2)}`;
    svg.append(label(left + 4, y(loss - margin) + 0.9 * rem, text, "start"));
  }
  for (const [loss, name] of [[uniform, "uniform guessing"], [bigram, data.baselines?.name || "bigrams"]]) {
    if (!Number.isFinite(loss)) continue;
    svg.append(el("line", { class: "baseline", x1: left, x2: W - right, y1: y(loss), y2: y(loss) }));
    svg.append(label(W - right - 4, y(loss) - 5, `${name} ${loss.toFixed(2)}`));
  }
  for (const run of compared) {
    const inside = run.val.filter((p) => p[column] <= xMax);
    svg.append(el("path", { class: "earlier", d: path(inside) }));
  }
  svg.append(el("path", { class: "train", d: path(train) }), el("path", { class: "val", d: path(val) }));
  for (const p of val) svg.append(el("circle", { class: "val-dot", cx: x(p[column]), cy: y(p[2]), r: 2.5 }));
  for (const run of compared) {
    const last = run.val.findLast((p) => p[column] <= xMax);
    if (last) svg.append(label(x(last[column]), y(last[2]) - 8, visible(run.name)));
  }
  svg.append(el("line", { id: "cross", class: "cross", y1: top, y2: H - bottom, visibility: "hidden" }));
  svg.append(el("line", { id: "now", class: "now", y1: top, y2: H - bottom }));
  svg.append(el("circle", { id: "now-dot", class: "now-dot", r: 5 }));
  box.replaceChildren(svg);
  Object.assign(chart, { column, toX: x, toY: y, at: -1 });
  chart.points = [...train.map((p) => ["train", p]), ...val.map((p) => ["val", p])].map(([kind, p]) => {
    return { kind, step: p[0], seconds: p[1], x: p[column], loss: p[2] };
  }).sort((a, b) => a.x - b.x);
  markCurve();
  readOut(-1);
}

// A path through points [x, y].
function lineThrough(points) {
  return points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)},${y.toFixed(1)}`).join("");
}

function label(x, y, text, anchor = "end") {
  return el("text", { class: "label", x, y, "text-anchor": anchor }, text);
}

// Marks the evaluation of the slider on the curve.
function markCurve() {
  if (!byId("now") || !evaluations.length) return;
  const { step, seconds, val_loss: loss } = evaluations[index];
  const x = chart.toX(chart.column ? seconds ?? 0 : step);
  byId("now").setAttribute("x1", x);
  byId("now").setAttribute("x2", x);
  byId("now-dot").setAttribute("visibility", loss === null ? "hidden" : "visible");
  byId("now-dot").setAttribute("cx", x);
  byId("now-dot").setAttribute("cy", chart.toY(loss ?? 0));
}

// The values at point i of the curve, under it; the keys to the lines where i is -1.
function readOut(i) {
  chart.at = i;
  const cross = byId("cross");
  const key = (kind, text) => el("span", { class: `key ${kind}` }, text);
  if (i < 0 || !chart.points[i]) {
    cross?.setAttribute("visibility", "hidden");
    const compared = data.compared?.length ? [key("earlier", "earlier runs")] : [];
    byId("readout").replaceChildren(key("train", "training loss"), key("val", "validation loss"), ...compared);
    return;
  }
  const point = chart.points[i];
  for (const end of ["x1", "x2"]) cross?.setAttribute(end, chart.toX(point.x));
  cross?.setAttribute("visibility", "visible");
  const near = (kind) => chart.points.filter((p) => p.kind === kind)
    .reduce((best, p) => (!best || Math.abs(p.x - point.x) < Math.abs(best.x - point.x) ? p : best), null);
  const values = ["train", "val"].map((kind) => [kind, near(kind)]).filter(([, p]) => p);
  byId("readout").replaceChildren(
    el("span", {}, `step ${Math.round(point.step)} · ${duration(point.seconds)}`),
    ...values.map(([kind, p]) => key(kind, `${kind === "val" ? "validation" : "training"} ${p.loss.toFixed(3)}`)),
  );
}

// -- surprise

const likeliest = (row, i) => {
  const flat = row.top?.[i] ?? [];
  const pairs = [];
  for (let j = 0; j < flat.length; j += 2) pairs.push([data.vocabulary?.[flat[j]] ?? "?", flat[j + 1] / 1000]);
  return pairs;
};

// "a 40%, b 20%"
const inWords = (pairs) => pairs.map(([text, p]) => `${quoted(text)} ${percent(p)}`).join(", ");

let passageTokens = [];

function startSurprise() {
  const passage = data.passage ?? [];
  byId("surprise").hidden = !evaluations.some((row) => row.loss);
  byId("surprise-note").textContent =
    "A text that the model never trains on. The stronger a token's colour, the less the model expected it " +
    "after those before it. Point at one, or use the arrow keys.";
  const uniform = data.baselines?.uniform ?? 3;
  const steps = [0, 0.25, 0.5, 0.75, 1].map((share) => colour(el("i"), share * uniform, uniform));
  byId("scale").replaceChildren("certain", el("span", { class: "ramp" }, ...steps), "no better than a uniform guess");
  passageTokens = passage.map((text) => token(text));
  byId("passage").replaceChildren(...passageTokens);
  for (const i of Array(4).keys()) byId("least").append(el("li", { id: `least-${i}` }));
  rove(byId("passage"), passageTokens, (i) => {
    const row = evaluations[index], nats = i > 0 && row.loss ? row.loss[i - 1] : null;
    const why = i ? " was not measured at this evaluation" : " is the first token: given, not predicted";
    if (nats === null) showTip(passageTokens[i], el("p", {}, el("b", {}, quoted(passage[i])), why));
    else explain(passageTokens[i], passage[i], Math.exp(-nats), likeliest(row, i - 1));
  }, hideTip);
}

function showSurprise() {
  const row = evaluations[index];
  showLeast(row);
  passageTokens.forEach((item, i) => {
    const nats = i > 0 && row.loss ? row.loss[i - 1] : null;
    colour(item, nats);
    const name = quoted(data.passage[i]);
    const cost = nats === null ? "" : `, ${percent(Math.exp(-nats))}, likeliest ${inWords(likeliest(row, i - 1))}`;
    item.setAttribute("aria-label", name + cost);
  });
}

// The tokens that cost most, each after those before it, and what was expected instead.
function showLeast(row) {
  for (const place of Array(4).keys()) byId(`least-${place}`).replaceChildren();
  const found = (row.loss ?? []).map((nats, i) => [nats, i]).filter(([nats]) => nats !== null);
  const order = found.sort((a, b) => b[0] - a[0]).slice(0, 4);
  order.forEach(([nats, i], place) => {
    const before = data.passage.slice(Math.max(0, i - 14), i + 1).map(visible).join("").replaceAll("\n", "↵");
    const it = colour(el("b", { class: "token" }, quoted(data.passage[i + 1])), nats);
    byId(`least-${place}`).replaceChildren(
      el("p", {}, el("span", { class: "before" }, before.slice(-18)), it),
      el("p", { class: "note" }, `${percent(Math.exp(-nats))}; expected ${inWords(likeliest(row, i).slice(0, 3))}`),
    );
  });
}

// -- heads

const LABELS = {
  previous_token: ["previous", "looks at the token before"],
  induction: ["copies", "has learned to copy"],
};
const born = (layer, head) => (data.births ?? []).filter((birth) => {
  return birth.layer === layer && birth.head === head && birth.step <= evaluations[index].step;
});
const headCells = new Map();

function startHeads() {
  const [L, H] = data.shape ?? [0, 0];
  const measured = evaluations.some((row) => row.heads);
  byId("heads").hidden = !measured;
  if (!measured) return;
  byId("heads-note").textContent =
    `${L} layers of ${H} heads, counted from 0 as in the code. Each picture has a row per token of the passage, dark ` +
    "where the head looks. The bars are measured on random tokens that are repeated: attention to the token before " +
    "(blue), and to what followed the same token earlier (orange). Choose a head.";
  const grid = byId("grid");
  grid.style.setProperty("--columns", H);
  for (let layer = 0; layer < L; layer++)
    for (let head = 0; head < H; head++) {
      const name = `${layer}.${head}`;
      const input = el("input", { type: "radio", name: "head", value: name, id: `head-${name}` });
      input.onchange = () => {
        state.head = name;
        showHead();
      };
      const previous = el("i", { class: "previous" }), induction = el("i", { class: "induction" });
      const mark = el("span", { class: "mark" });
      const thumb = el("canvas", { class: "matrix", width: 1, height: 1, "aria-hidden": "true" });
      const cell = el("label", { class: "cell" }, input, thumb, el("span", { class: "meters" }, previous, induction),
        el("span", { class: "cell-name" }, name), mark);
      headCells.set(name, { input, thumb, previous, induction, mark, layer, head });
      grid.append(cell);
    }
  if (!headCells.has(state.head)) {
    const birth = data.births?.at(-1);
    state.head = birth ? `${birth.layer}.${birth.head}` : `${L - 1}.0`;
  }
  headCells.get(state.head).input.checked = true;
  byId("births").replaceChildren(...(data.births ?? []).map(({ step, layer, head, label }) => {
    const go = () => {
      headCells.get(`${layer}.${head}`).input.checked = true;
      state.head = `${layer}.${head}`;
      show(nearest(step));
    };
    const line = `step ${step}: head ${layer}.${head} ${LABELS[label][1]}`;
    return el("li", {}, el("button", { type: "button", onclick: go }, line));
  }));
}

// The scores of a head at an evaluation; where they were not measured, those of the last one before.
function scoresAt(i, layer, head) {
  while (i > 0 && !evaluations[i].heads) i--;
  const found = evaluations[i]?.heads;
  return { previous: found?.previous_token?.[layer]?.[head] ?? 0, induction: found?.induction?.[layer]?.[head] ?? 0 };
}

function showHeads() {
  for (const [name, { input, thumb, previous, induction, mark, layer, head }] of headCells) {
    const found = attentionOf(index, layer, head);
    if (found) picture(found.weights, thumb);
    const scores = scoresAt(index, layer, head);
    previous.style.setProperty("--share", scores.previous);
    induction.style.setProperty("--share", scores.induction);
    const labels = born(layer, head).map(({ label }) => LABELS[label][0]);
    mark.textContent = labels.join(", ");
    input.setAttribute("aria-label", `head ${name}: previous token ${scores.previous.toFixed(2)}, ` +
      `induction ${scores.induction.toFixed(2)}${labels.length ? `, ${labels.join(", ")}` : ""}`);
  }
  if (headCells.size) showHead();
}

// The weights of a head over the passage, weights[q][k], of the evaluation nearest to i that has them.
function attentionOf(i, layer, head) {
  const have = evaluations.map((row, j) => (row.attention ? j : -1)).filter((j) => j >= 0);
  if (!have.length) return null;
  const j = have.reduce((best, k) => (Math.abs(k - i) < Math.abs(best - i) ? k : best));
  const { attention, attention_tokens: n, step } = evaluations[j];
  const size = (n * (n + 1)) / 2;
  evaluations[j].bytes ??= bytesOf(attention); // of all heads
  const bytes = evaluations[j].bytes.subarray((layer * data.shape[1] + head) * size);
  const row = (q) => Array.from(bytes.subarray((q * (q + 1)) / 2, ((q + 1) * (q + 2)) / 2), (b) => b / 255);
  return { step, weights: Array.from({ length: n }, (_, q) => row(q)) };
}

function showHead() {
  const { layer, head } = headCells.get(state.head);
  const scores = scoresAt(index, layer, head);
  const labels = born(layer, head).map(({ label, step }) => `It ${LABELS[label][1]} (since step ${step}).`).join(" ");
  const key = (kind, name, value) => el("span", { class: `key ${kind}` }, `${name} ${value.toFixed(2)}`);
  const found = attentionOf(index, layer, head);
  const shown = found && found.step !== evaluations[index].step ? `, as it was at step ${found.step}` : "";
  const parts = [
    el("h3", {}, `Head ${layer}.${head}`),
    el("p", { class: "readout" },
      key("previous", "previous token", scores.previous), key("induction", "induction", scores.induction)),
    scoreLines(layer, head),
    el("p", { class: "born" }, labels || "Neither score is high enough for a label."),
  ];
  if (found) {
    const how = "Point at another token, or at a row of the picture.";
    parts.push(el("p", { class: "note" }, `Where it looks from the outlined token${shown}. ${how}`));
    const query = state.query ?? found.weights.length - 1;
    parts.push(showAttention(found.weights, data.passage, query, (q) => (state.query = q)));
  }
  byId("head").replaceChildren(...parts);
}

// Both scores of a head over the evaluations, as a small picture.
function scoreLines(layer, head) {
  const [W, H] = [300, 60];
  const place = (i) => (i / Math.max(1, evaluations.length - 1)) * W;
  const height = (score) => H - 2 - score * (H - 4);
  const line = (name) => lineThrough(evaluations.map((_, i) => [place(i), height(scoresAt(i, layer, head)[name])]));
  const x = place(index);
  return el("svg", { class: "history", viewBox: `0 0 ${W} ${H}`, preserveAspectRatio: "none", "aria-hidden": "true" },
    el("line", { class: "now", x1: x, x2: x, y1: 0, y2: H }),
    el("path", { class: "previous", d: line("previous") }), el("path", { class: "induction", d: line("induction") }));
}

// -- the run

function startAbout() {
  byId("verdict").hidden = !data.verdict;
  byId("verdict").textContent = visible(data.verdict ?? "");
  const pairs = (rows = [], wrap) => rows.flatMap(([name, text]) => {
    return [el("dt", {}, visible(name)), el("dd", {}, wrap(visible(text)))];
  });
  byId("card").replaceChildren(...pairs(data.card, (text) => text));
  byId("commands").replaceChildren(...pairs(data.commands, (text) => el("code", {}, text)));
  const value = (x) => visible(typeof x === "string" ? x || "(empty)" : JSON.stringify(x));
  const head = el("tr", {}, ...["setting", "this run", "default"].map((name) => el("th", { scope: "col" }, name)));
  const rows = (data.settings ?? []).map(([name, mine, usual]) =>
    el("tr", {}, el("th", { scope: "row" }, visible(name)), el("td", {}, value(mine)), el("td", {}, value(usual))));
  byId("settings").replaceChildren(el("thead", {}, head), el("tbody", {}, ...rows));
}

// -- the slider

let timer = null;

function startTimeline() {
  byId("timeline").hidden = evaluations.length < 1;
  const slider = byId("slider");
  slider.max = Math.max(0, evaluations.length - 1);
  slider.oninput = () => {
    play(false);
    show(Number(slider.value));
  };
  byId("play").onclick = () => play(!state.playing);
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest?.("input, textarea, select, button, summary, [tabindex='0']");
    if (event.key === "Escape") hideTip();
    if (event.key === " " && !typing) {
      event.preventDefault();
      play(!state.playing);
    }
  });
  addEventListener("scroll", placeTip, { passive: true });
}

// Plays from the evaluation that is shown, or from the first where it is the last.
function play(on) {
  state.playing = on && evaluations.length > 1;
  clearInterval(timer);
  byId("play").textContent = state.playing ? "❚❚" : "▶";
  byId("play").setAttribute("aria-label", state.playing ? "Pause" : "Play from noise to text");
  if (!state.playing) return;
  if (index === evaluations.length - 1) show(0);
  timer = setInterval(() => {
    show(index + 1);
    if (index === evaluations.length - 1) play(false);
  }, clamp(8000 / evaluations.length, 250, 900));
}

// ------------------------------------------------------------------------------------------------ 4. reloading

// Seconds until the next look, at a page of this age whose run was to write again within `expected` seconds: 15 at most.
// After that time it waits longer and longer, up to a minute; null when the run must have been stopped.
function untilReload(age, expected) {
  if (age > 3 * expected + 120) return null;
  return age < expected ? Math.min(15, expected - Math.max(0, age) + 1) : clamp((age - expected) / 2, 2, 60);
}

function startReloading() {
  addEventListener("pagehide", remember);
  const { live, written, expected } = data.run;
  if (!live) return;
  const wait = untilReload(Date.now() / 1000 - written, expected);
  if (wait === null) {
    const stale = byId("stale");
    const look = el("button", { type: "button", onclick: () => location.reload() }, "Look again");
    const when = new Date(written * 1000).toLocaleString();
    stale.replaceChildren(`Last written ${when}. The run seems to have been stopped. `, look);
    stale.hidden = false;
    byId("summary").classList.remove("live");
    return;
  }
  let [pressed, active] = [false, Date.now()];
  addEventListener("pointerdown", () => (pressed = true));
  for (const name of ["pointerup", "pointercancel"]) addEventListener(name, () => (pressed = false));
  for (const name of ["pointermove", "pointerdown", "keydown"]) addEventListener(name, () => (active = Date.now()));
  const reload = () => {
    const reading = Date.now() - active < 60_000 && (String(getSelection()) || !byId("tip").hidden);
    if (pressed || state.playing || document.hidden || reading) setTimeout(reload, 1000);
    else location.reload();
  };
  setTimeout(reload, 1000 * wait);
}

function start() {
  window.history.scrollRestoration = "manual";
  startHeader();
  startText();
  startCurve();
  startSurprise();
  startHeads();
  startAbout();
  startTimeline();
  drawCurve();
  show(nearest(state.step));
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const newcomer = !recall().visited && !data.run.live;
  state.visited = true;
  play((state.playing || newcomer) && !calm);
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== width) reserveText();
    width = innerWidth;
  });
  byId(state.focus)?.focus({ preventScroll: true });
  scrollTo(0, state.scroll);
  startReloading();
}

start();
