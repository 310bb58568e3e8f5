// Text to token ids and back, as minutegpt/data/tokenizer.py does it: char, byte, bpe and gpt2.
//
//     const tokenizer = new Tokenizer({ kind: "char", vocab_size: 4, tokens: "ehlo" });
//     tokenizer.encode("hole") // [1, 3, 2, 0]
"use strict";

// The patterns of tokenizer.py in JavaScript's spelling. \s there is \p{White_Space} here, because JavaScript's \s has
// other characters; (?i:s) is also the long s, ſ. Where that file forbids going back (++), going back never helps.
const PATTERNS = {
  bpe: new RegExp(
    "'(?:[sdmtSDMTſ]|[lL][lL]|[vV][eE]|[rR][eE])|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}" +
      "| ?[^\\p{White_Space}\\p{L}\\p{N}]+[\\r\\n]*|\\p{White_Space}*[\\r\\n]" +
      "|\\p{White_Space}+(?!\\P{White_Space})|\\p{White_Space}+",
    "gu",
  ),
  gpt2: new RegExp(
    "'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^\\p{White_Space}\\p{L}\\p{N}]+" +
      "|\\p{White_Space}+$|\\p{White_Space}+(?!\\P{White_Space})|\\p{White_Space}",
    "gu",
  ),
};
const END = "<|endoftext|>"; // the highest id of bpe and gpt2; no text is encoded to it

class Tokenizer {
  // What to_json() of tokenizer.py returns. bpe and gpt2 write the bytes of a token as characters U+0000 to U+00FF.
  constructor({ kind, vocab_size, tokens }) {
    this.kind = kind;
    this.vocab_size = vocab_size;
    const latin1 = (token) => Uint8Array.from(token, (c) => c.charCodeAt(0));
    if (kind === "char") {
      const characters = [...tokens];
      this.id = new Map(characters.map((c, i) => [c, i]));
      this.bytes = characters.map((c) => new TextEncoder().encode(c));
    } else if (kind === "byte") {
      this.bytes = Array.from({ length: 256 }, (_, i) => Uint8Array.of(i));
      this.id = new Map(this.bytes.map((_, i) => [String.fromCharCode(i), i]));
    } else {
      this.id = new Map(tokens.map((token, i) => [token, i])); // a lower id was merged earlier
      this.bytes = [...tokens, END].map(latin1);
      this.end = tokens.length;
    }
  }

  // The characters of a text that have no id, each once. Half a surrogate pair never has one.
  missing(text) {
    const known = (c) => !/\p{Surrogate}/u.test(c) && (this.kind !== "char" || this.id.has(c));
    return [...new Set(text)].filter((c) => !known(c));
  }

  // Token ids. Throws for characters that `missing` returns.
  encode(text) {
    const missing = this.missing(text);
    if (missing.length) throw new RangeError(`the vocabulary lacks ${missing.slice(0, 10).join(" ")}`);
    if (this.kind === "char") return Array.from(text, (c) => this.id.get(c));
    if (this.kind === "byte") return [...new TextEncoder().encode(text)];
    return (text.match(PATTERNS[this.kind]) ?? []).flatMap((word) => this.merge(word));
  }

  // The ids of one word: its bytes, in which the pair that makes the lowest id is merged until none is left.
  merge(word) {
    const parts = Array.from(new TextEncoder().encode(word), (byte) => String.fromCharCode(byte));
    if (this.id.has(parts.join(""))) return [this.id.get(parts.join(""))];
    const merged = (i) => (i + 1 < parts.length ? (this.id.get(parts[i] + parts[i + 1]) ?? Infinity) : Infinity);
    const ids = parts.map((_, i) => merged(i)); // ids[i]: what part i makes with the next one
    while (parts.length > 1) {
      let best = 0;
      for (let i = 1; i < ids.length; i++) if (ids[i] < ids[best]) best = i;
      if (ids[best] === Infinity) break;
      parts.splice(best, 2, parts[best] + parts[best + 1]);
      ids.splice(best, 1);
      ids[best] = merged(best);
      if (best > 0) ids[best - 1] = merged(best - 1);
    }
    return parts.map((part) => this.id.get(part));
  }

  // The text of these ids. Bytes that are not UTF-8, such as half a character, become U+FFFD.
  decode(ids) {
    const bytes = ids.flatMap((id) => [...this.bytes[id]]);
    return new TextDecoder("utf-8", { ignoreBOM: true }).decode(Uint8Array.from(bytes));
  }

  // The text of one token; its bytes in hexadecimal where they are no characters of their own. As token_text in live.py.
  name(id) {
    try {
      return new TextDecoder("utf-8", { ignoreBOM: true, fatal: true }).decode(this.bytes[id]);
    } catch {
      return `‹${Array.from(this.bytes[id], (byte) => byte.toString(16).padStart(2, "0")).join("")}›`;
    }
  }

  // The ids that a text without a prompt starts from: END, else a new line, else the first id.
  start() {
    return [this.end ?? this.id.get("\n") ?? 0];
  }
}
