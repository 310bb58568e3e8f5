// The Worker of the page: it computes, so that typing never waits. One task at a time: a message ends the task before.
//
// Messages to it: { task, id, ... }, with task one of TASKS. Messages from it: { id, ... } as the task says, and at its
// end { id, done: true } or { id, error }.
"use strict";

const TASKS = { load, write, attend, surprise, stop() {} };
const PIECE = 16; // tokens that are read before a new message is let in
let model, tokenizer, newest;

self.onmessage = async ({ data: { task, id, ...values } }) => {
  newest = id;
  const job = { stopped: () => newest !== id, answer: (values) => postMessage({ id, ...values }) };
  try {
    await TASKS[task](values, job);
    if (!job.stopped()) job.answer({ done: true });
  } catch (error) {
    job.answer({ error: String(error) });
  }
};

// Lets a waiting message in.
function pause() {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });
}

function load({ config, tensors, vocabulary, weights }) {
  const text = atob(weights), bytes = new Uint8Array(text.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
  model = new GPT(config, readWeights(tensors, bytes));
  tokenizer = new Tokenizer(vocabulary);
}

// The token ids of a text, without the characters that have none; these are reported as { missing }.
function encode(text, job) {
  const missing = tokenizer.missing(text);
  if (missing.length) job.answer({ missing });
  const lacks = new Set(missing);
  return tokenizer.encode([...text].filter((c) => !lacks.has(c)).join(""));
}

// The logits of the token after these; null where the task was stopped. A vocabulary that was padded to a round number
// has more ids at its end, which represent no text.
async function read(tokens, job) {
  for (;;) {
    const logits = model.next(tokens, PIECE);
    if (logits) return logits.subarray(0, tokenizer.vocab_size);
    await pause();
    if (job.stopped()) return null;
  }
}

// The n largest of p as [[text, probability], ...]. A vocabulary is too long to be sorted for every token.
function largest(p, n) {
  const found = []; // indices, the largest value first
  for (let i = 0; i < p.length; i++) {
    if (p[i] <= (found.length < n ? 0 : p[found[n - 1]])) continue;
    let at = found.length;
    while (at > 0 && p[found[at - 1]] < p[i]) at--;
    found.splice(at, 0, i);
    found.length = Math.min(found.length, n);
  }
  return found.map((i) => [tokenizer.name(i), p[i]]);
}

// Writes n tokens after the prompt, each as { text, name, p, top }: what it adds to the text, its own text, its
// probability, the likeliest tokens instead.
// At first { next }: the likeliest tokens after the prompt.
async function write({ prompt, n, seed, ...options }, job) {
  const random = uniform(seed), stream = new TextDecoder("utf-8", { ignoreBOM: true });
  const tokens = encode(prompt, job);
  if (!tokens.length) tokens.push(...tokenizer.start());
  const first = tokens.length;
  while (tokens.length < first + n) {
    const logits = await read(tokens, job);
    if (!logits) return;
    const p = probabilities(logits, options), token = draw(p, random());
    if (tokens.length === first) job.answer({ next: largest(p, 10) });
    if (token === tokenizer.end) return;
    tokens.push(token);
    const text = stream.decode(tokenizer.bytes[token], { stream: true }); // half a character waits for the other half
    job.answer({ text, name: tokenizer.name(token), p: p[token], top: largest(p, 5) });
    await pause();
    if (job.stopped()) return;
  }
}

// The attention of the last tokens of a text: { texts, layers }, where layers[i] has the weights (H, T, T) of a layer.
function attend({ text, most }, job) {
  const tokens = encode(text, job).slice(-Math.min(most, model.config.block_size));
  if (!tokens.length) tokens.push(...tokenizer.start());
  model.tokens.length = 0;
  const layers = [];
  model.hidden(tokens, layers);
  job.answer({ texts: tokens.map((token) => tokenizer.name(token)), layers });
}

// What each token of a text costs after those before it: { text, name, nats, p, top } for each, as in write.
async function surprise({ text: whole }, job) {
  const before = tokenizer.start(), stream = new TextDecoder("utf-8", { ignoreBOM: true });
  for (const token of encode(whole, job)) {
    const logits = await read(before, job);
    if (!logits) return;
    const p = softmax(logits), highest = logits.reduce((a, b) => Math.max(a, b));
    const nats = highest - logits[token] + Math.log(logits.reduce((sum, value) => sum + Math.exp(value - highest), 0));
    const text = stream.decode(tokenizer.bytes[token], { stream: true });
    job.answer({ text, name: tokenizer.name(token), nats, p: p[token], top: largest(p, 5) });
    before.push(token);
    await pause();
    if (job.stopped()) return;
  }
}
