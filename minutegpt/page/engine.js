// The GPT of model.py in plain JavaScript: token ids in, logits for the next token out.
//
// Shapes as in model.py: T time (positions), C channels, H heads, K key/value heads, D = C / H, V vocabulary.
// A tensor is a Float32Array, one row after another. Text is read by one model at a time, so there is no B.
//     const model = new GPT(config, readWeights(tensors, bytes));
//     const logits = model.next([18, 47, 56]);  // (V,); what `next` read before is not computed again
"use strict";

// -- what PyTorch has as functions

// x (T, C) times a matrix (N, C) -> (T, N). Four rows at a time, because four sums at once are faster than one.
function linear(x, T, { R: N, C, q, scale }, bias = null) {
  const y = new Float32Array(T * N);
  for (let n = 0; n < N; n += 4) {
    const n1 = Math.min(n + 1, N - 1), n2 = Math.min(n + 2, N - 1), n3 = Math.min(n + 3, N - 1);
    const row0 = n * C, row1 = n1 * C, row2 = n2 * C, row3 = n3 * C;
    for (let t = 0; t < T; t++) {
      const xt = t * C;
      let sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
      for (let c = 0; c < C; c++) {
        const value = x[xt + c];
        sum0 += value * q[row0 + c];
        sum1 += value * q[row1 + c];
        sum2 += value * q[row2 + c];
        sum3 += value * q[row3 + c];
      }
      y[t * N + n] = sum0 * scale[n];
      y[t * N + n1] = sum1 * scale[n1];
      y[t * N + n2] = sum2 * scale[n2];
      y[t * N + n3] = sum3 * scale[n3];
    }
  }
  return bias ? y.map((value, i) => value + bias[i % N]) : y;
}

function add(x, y) {
  return x.map((value, i) => value + y[i]);
}

// Each row of D values divided by its root mean square.
function rmsNorm(x, D) {
  const y = new Float32Array(x.length);
  for (let at = 0; at < x.length; at += D) {
    let squares = 0;
    for (let d = 0; d < D; d++) squares += x[at + d] ** 2;
    for (let d = 0; d < D; d++) y[at + d] = x[at + d] / Math.sqrt(squares / D + 1e-6);
  }
  return y;
}

function layerNorm(x, weight, bias) {
  const C = weight.length, y = new Float32Array(x.length);
  for (let at = 0; at < x.length; at += C) {
    let mean = 0, variance = 0;
    for (let c = 0; c < C; c++) mean += x[at + c] / C;
    for (let c = 0; c < C; c++) variance += (x[at + c] - mean) ** 2 / C;
    for (let c = 0; c < C; c++) {
      y[at + c] = ((x[at + c] - mean) / Math.sqrt(variance + 1e-5)) * weight[c] + (bias ? bias[c] : 0);
    }
  }
  return y;
}

function softmax(x) {
  const largest = x.reduce((a, b) => Math.max(a, b));
  const p = x.map((value) => Math.exp(value - largest)), sum = p.reduce((a, b) => a + b);
  return p.map((value) => value / sum);
}

// The error function, to 1.5e-7 (Abramowitz and Stegun, 7.1.26).
function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
  return Math.sign(x) * (1 - series * Math.exp(-x * x));
}

const ACTIVATIONS = {
  gelu: (x) => 0.5 * x * (1 + erf(x / Math.SQRT2)),
  gelu_tanh: (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))),
  relu: (x) => Math.max(x, 0),
  relu2: (x) => Math.max(x, 0) ** 2,
};

// -- the model

class GPT {
  constructor(config, weights) {
    this.config = config;
    this.weights = { "transformer.wte.weight": weights["lm_head.weight"], ...weights }; // tied: the file has one
    this.D = config.n_embd / config.n_head;
    this.tokens = []; // the tokens that the cache has keys and values of
    const buffer = () => new Float32Array(config.block_size * config.n_kv_head * this.D); // (S, K*D)
    this.keys = Array.from({ length: config.n_layer }, buffer);
    this.values = Array.from({ length: config.n_layer }, buffer);
  }

  // The logits (V,) of the token after these. Only tokens that are not in the cache are read, and at most `most` of
  // them: null where some are left, so that a caller can stop in between.
  next(tokens, most = Infinity) {
    const context = tokens.slice(this.contextStart(tokens.length));
    let known = 0;
    while (known < context.length - 1 && known < this.tokens.length && this.tokens[known] === context[known]) known++;
    this.tokens.length = known;
    const x = this.hidden(context.slice(known, known + most));
    return this.tokens.length < context.length ? null : this.unembed(x.slice(-this.config.n_embd), 1);
  }

  // Where the context of a text of n tokens begins: as in GPT.stream, a full one is filled again with its last half.
  contextStart(n) {
    const full = this.config.block_size, step = full + 1 - Math.max(1, full >> 1);
    return n <= full ? 0 : Math.ceil((n - full) / step) * step;
  }

  // T more tokens -> the residual stream after the last block and norm, (T, C). The cache grows by T.
  // attention: an array, which gets the weights of each layer, (H, T, S).
  hidden(tokens, attention = null) {
    const { n_embd: C, n_layer, ngram, pos, norm, norm_position } = this.config, T = tokens.length;
    const start = this.tokens.length;
    this.tokens.push(...tokens);
    let x = new Float32Array(T * C);
    for (let t = 0; t < T; t++) {
      const parts = [this.weights["transformer.wte.weight"].row(tokens[t])];
      if (ngram) parts.push(...this.ngrams(start + t));
      if (pos === "learned") parts.push(this.weights["transformer.wpe.weight"].row(start + t));
      x.set(parts.reduce(add), t * C);
    }
    if (norm === "rmsnorm") x = rmsNorm(x, C);
    for (let layer = 0; layer < n_layer; layer++) x = this.block(x, start, T, layer, attention);
    return norm_position === "pre" ? this.norm(x, "transformer.ln_f") : x;
  }

  // The embeddings of the last 2, 3, .. ngram tokens; those before the start count as token 0.
  ngrams(position) {
    const { vocab_size: V, ngram, ngram_rows } = this.config, prime = 2 ** 31 - 1;
    // a * b % prime without rounding, for a < 2**31 and b < 2**28: b in two halves of 14 bits
    const times = (a, b) => ((((a * (b >> 14)) % prime) * 2 ** 14) + a * (b & (2 ** 14 - 1))) % prime;
    const found = [];
    for (let n = 2; n <= ngram; n++) {
      let key = this.tokens[position - n + 1] ?? 0;
      for (let i = position - n + 2; i <= position; i++) key = (times(key, V) + (this.tokens[i] ?? 0)) % prime;
      const row = V ** n <= ngram_rows ? key : times(key, 40503) % ngram_rows;
      found.push(this.weights[`transformer.ngrams.tables.${n - 2}.weight`].row(row));
    }
    return found;
  }

  block(x, start, T, layer, attention) {
    const name = `transformer.h.${layer}`;
    const mlp = (x) => this.config.n_expert ? this.experts(x, T, `${name}.mlp`) : this.mlp(x, T, `${name}.mlp`);
    if (this.config.norm_position === "post") {
      x = this.norm(add(x, this.attention(x, start, T, layer, attention)), `${name}.ln_1`);
      return this.norm(add(x, mlp(x)), `${name}.ln_2`);
    }
    x = add(x, this.attention(this.norm(x, `${name}.ln_1`), start, T, layer, attention));
    return add(x, mlp(this.norm(x, `${name}.ln_2`)));
  }

  norm(x, name) {
    if (this.config.norm === "rmsnorm") return rmsNorm(x, this.config.n_embd);
    return layerNorm(x, this.weights[`${name}.weight`], this.weights[`${name}.bias`]);
  }

  // Each position reads from itself and from earlier ones. (T, C) -> (T, C). record: see `hidden`
  attention(x, start, T, layer, record) {
    const { n_embd: C, n_head: H, n_kv_head: K, pos, qk_norm } = this.config, D = this.D, S = start + T;
    const name = `transformer.h.${layer}.attn`;
    const qkv = linear(x, T, this.weights[`${name}.c_attn.weight`], this.weights[`${name}.c_attn.bias`]);
    const split = (from, heads) => { // the columns of some heads, (T, heads * D)
      const part = new Float32Array(T * heads * D), row = (t) => (t * (H + 2 * K) + from) * D;
      for (let t = 0; t < T; t++) part.set(qkv.subarray(row(t), row(t) + heads * D), t * heads * D);
      return part;
    };
    let q = split(0, H), k = split(H, K);
    if (pos === "rope") [q, k] = [this.rotate(q, start, H), this.rotate(k, start, K)];
    if (qk_norm) [q, k] = [rmsNorm(q, D), rmsNorm(k, D)];
    const keys = this.keys[layer], values = this.values[layer]; // (S, K*D), all positions so far
    keys.set(k, start * K * D);
    values.set(split(H + K, K), start * K * D);
    const y = new Float32Array(T * C), weights = new Float32Array(record ? H * T * S : 0);
    for (let t = 0; t < T; t++) {
      for (let h = 0; h < H; h++) {
        const head = Math.floor((h * K) / H) * D; // several query heads share one key/value head
        const query = q.subarray((t * H + h) * D, (t * H + h + 1) * D);
        let scores = new Float32Array(start + t + 1); // position t sees 0..t
        for (let s = 0; s < scores.length; s++) {
          const at = s * K * D + head;
          let sum = 0;
          for (let d = 0; d < D; d++) sum += query[d] * keys[at + d];
          scores[s] = sum / Math.sqrt(D);
        }
        scores = softmax(scores);
        const out = new Float64Array(D);
        for (let s = 0; s < scores.length; s++) {
          const at = s * K * D + head, weight = scores[s];
          for (let d = 0; d < D; d++) out[d] += weight * values[at + d];
        }
        y.set(out, t * C + h * D);
        if (record) weights.set(scores, (h * T + t) * S);
      }
    }
    if (record) record.push(weights);
    return linear(y, T, this.weights[`${name}.c_proj.weight`], this.weights[`${name}.c_proj.bias`]);
  }

  // Rotates each pair (x[i], x[i + D/2]) by its position's angle. (T, heads * D), the first row at position start
  rotate(x, start, heads) {
    const D = this.D, half = D / 2, y = new Float32Array(x.length);
    for (let at = 0; at < x.length; at += D) {
      const position = start + Math.floor(at / (heads * D));
      for (let i = 0; i < half; i++) {
        const angle = Math.fround(position * Math.fround(10000 ** (-i / half))); // float32, as in model.py
        const cos = Math.cos(angle), sin = Math.sin(angle), a = x[at + i], b = x[at + half + i];
        y[at + i] = a * cos + b * sin;
        y[at + half + i] = b * cos - a * sin;
      }
    }
    return y;
  }

  mlp(x, T, name) {
    x = linear(x, T, this.weights[`${name}.c_fc.weight`], this.weights[`${name}.c_fc.bias`]); // (T, 4C)
    x = x.map(ACTIVATIONS[this.config.activation]);
    return linear(x, T, this.weights[`${name}.c_proj.weight`], this.weights[`${name}.c_proj.bias`]); // (T, C)
  }

  // A router sends each token to the k experts with the highest scores; see minutegpt/moe.py. (T, C) -> (T, C)
  experts(x, T, name) {
    const { n_embd: C, n_expert: E, n_expert_active: k, activation } = this.config, y = new Float32Array(T * C);
    const up = this.weights[`${name}.c_fc.weight`], down = this.weights[`${name}.c_proj.weight`]; // E of each
    for (let t = 0; t < T; t++) {
      const row = x.subarray(t * C, (t + 1) * C);
      const scores = linear(row, 1, this.weights[`${name}.router.weight`]).map((value) => 1 / (1 + Math.exp(-value)));
      const biased = add(scores, this.weights[`${name}.router_bias`]);
      const chosen = [...biased.keys()].sort((a, b) => biased[b] - biased[a]).slice(0, k);
      const total = chosen.reduce((sum, e) => sum + scores[e], 0); // the weights of a token sum to 1
      for (const e of chosen) {
        const hidden = linear(row, 1, up.rows((e * up.R) / E, ((e + 1) * up.R) / E)).map(ACTIVATIONS[activation]);
        const out = linear(hidden, 1, down.rows((e * down.R) / E, ((e + 1) * down.R) / E));
        for (let c = 0; c < C; c++) y[t * C + c] += (scores[e] / total) * out[c];
      }
    }
    return y;
  }

  // x (T, C) -> logits (T, V)
  unembed(x, T) {
    return linear(x, T, this.weights["lm_head.weight"]);
  }
}
