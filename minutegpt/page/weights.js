// The weights of the page, as minutegpt/page/pack.py writes them, and the draw of the next token.
"use strict";

// A weight matrix (R, C). Row r is q[r] * scale[r], with q int8; or float32, with scale 1.
class Matrix {
  constructor(R, C, q, scale, stored = null) {
    Object.assign(this, { R, C, q, scale, stored }); // stored: where row r is, -1 for a row of zeros; null: at r
  }

  row(r) {
    const at = this.stored ? this.stored[r] : r;
    if (at < 0) return new Float32Array(this.C);
    return Float32Array.from(this.q.subarray(at * this.C, (at + 1) * this.C), (q) => q * this.scale[at]);
  }

  rows(from, to) {
    return new Matrix(to - from, this.C, this.q.subarray(from * this.C, to * this.C), this.scale.subarray(from, to));
  }
}

// The tensors of a packed model, by name: a Matrix, or a Float32Array for biases and norms.
function readWeights(tensors, bytes) {
  let position = 0;
  const read = (length, Type) => {
    const part = bytes.slice(position, position + length * Type.BYTES_PER_ELEMENT); // aligned, because it is a copy
    position += part.length;
    return new Type(part.buffer);
  };
  const float16 = tensors.some(({ kind }) => kind === "float16") ? float16Values() : null;
  const weights = {};
  for (const { name, kind, shape, sparse } of tensors) {
    if (kind === "float32") {
      weights[name] = read(shape[0], Float32Array);
      continue;
    }
    const C = shape.at(-1), R = shape.slice(0, -1).reduce((a, b) => a * b);
    let stored = null, N = R; // N rows are in the file
    if (sparse) {
      const bits = read(Math.ceil(R / 8), Uint8Array);
      N = 0;
      stored = Int32Array.from({ length: R }, (_, r) => ((bits[r >> 3] >> (r & 7)) & 1 ? N++ : -1));
    }
    let q, scale;
    if (kind === "int8") {
      scale = new Float32Array(Uint32Array.from(read(N, Uint16Array), (bits) => bits << 16).buffer); // bfloat16
      q = read(N * C, Int8Array);
    } else {
      scale = new Float32Array(N).fill(1);
      q = new Float32Array(N * C);
      read(N * C, Uint16Array).forEach((bits, i) => { q[i] = float16[bits]; });
    }
    weights[name] = new Matrix(R, C, q, scale, stored);
  }
  return weights;
}

// The value of each of the 65536 float16 numbers, by its bits.
function float16Values() {
  return Float32Array.from({ length: 65536 }, (_, bits) => {
    const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
    return sign * (exponent ? (1024 + fraction) * 2 ** (exponent - 25) : fraction * 2 ** -24);
  });
}

// The probabilities (V,) that a token is drawn with. temperature: 0 takes the most likely one. top_k: 0 keeps all.
function probabilities(logits, { temperature = 1, top_k = 0 } = {}) {
  if (temperature < 1e-6) {
    const best = logits.indexOf(logits.reduce((a, b) => Math.max(a, b)));
    return logits.map((_, i) => (i === best ? 1 : 0));
  }
  let scaled = logits.map((value) => value / temperature);
  if (top_k > 0 && top_k < logits.length) {
    const kth = scaled.slice().sort().at(-top_k);
    scaled = scaled.map((value) => (value < kth ? -Infinity : value));
  }
  return softmax(scaled);
}

// Draws an index of p, which sum to 1. random: a number of 0..1.
function draw(p, random) {
  for (let i = 0; i < p.length; i++) if ((random -= p[i]) < 0) return i;
  return p.findLastIndex((value) => value > 0); // rounding: the sum may be just below 1
}

// Random numbers of 0..1 from a seed: those of a counter, whose bits are mixed.
function uniform(seed) {
  let counter = seed >>> 0;
  return () => {
    counter = (counter + 0x9e3779b9) >>> 0;
    let bits = Math.imul(counter ^ (counter >>> 16), 0x21f0aaad);
    bits = Math.imul(bits ^ (bits >>> 15), 0x735a2d97);
    return ((bits ^ (bits >>> 15)) >>> 0) / 2 ** 32;
  };
}
