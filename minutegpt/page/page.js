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
function colour(element, nats, worst = Math.max(3, data.baselines?.uniform ?? 3)) {
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

function showTip(element, ...content) {
  const tip = byId("tip");
  tip.replaceChildren(...content);
  tip.hidden = false;
  const at = element.getClientRects()[0] ?? element.getBoundingClientRect();
  const { width, height } = tip.getBoundingClientRect();
  const below = at.bottom + 8 + height < innerHeight - 56;
  tip.style.left = `${clamp(at.left + at.width / 2 - width / 2, 8, Math.max(8, innerWidth - width - 8))}px`;
  tip.style.top = `${below ? at.bottom + 8 : Math.max(8, at.top - height - 8)}px`;
}

function hideTip() {
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
  container.onpointerleave = () => {
    if (document.activeElement === container) return;
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
    if (!(event.key in moves)) return;
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
  const canvas = el("canvas", { class: "matrix", width: n, height: n, "aria-hidden": "true" });
  const line = el("div", { class: "tokens", role: "listbox", tabindex: "0", id: `attention-${showAttention.count++}` });
  line.setAttribute("aria-label", "Tokens: choose one to see what it looks at");
  const items = tokens.slice(0, n).map((text) => token(text));
  line.append(...items);
  const paint = canvas.getContext("2d");
  const image = paint?.createImageData(n, n);
  if (image) {
    const [r, g, b] = getComputedStyle(document.body).getPropertyValue("--attention-rgb").split(" ").map(Number);
    for (let q = 0; q < n; q++)
      for (let k = 0; k <= q; k++) image.data.set([r, g, b, 255 * Math.sqrt(weights[q][k])], 4 * (q * n + k));
    paint.putImageData(image, 0, 0);
  }
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

// Bytes of a base64 text.
function bytesOf(base64) {
  return Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
}

// "1m35s", as the run prints it.
function duration(seconds) {
  const s = Math.round(seconds);
  if (s < 60) return `${s}s`;
  const two = (n) => String(n).padStart(2, "0");
  return s < 3600 ? `${Math.floor(s / 60)}m${two(s % 60)}s` : `${Math.floor(s / 3600)}h${two(Math.floor(s / 60) % 60)}m`;
}

// ------------------------------------------------------------------------------------------------ 2. what was chosen

const data = JSON.parse(byId("data").textContent);
const evaluations = data.evaluations ?? [];
const KEY = `minutegpt:${location.pathname}`;
const state = { step: null, axis: "step", head: null, query: null, playing: false, scroll: 0, focus: null };

byId("name").textContent = data.run.name;
