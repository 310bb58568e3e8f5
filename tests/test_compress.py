"""compress.py: every file comes back, and a wrong file, model or machine is refused."""

import json
import math
import random
import zlib
from dataclasses import asdict

import numpy as np
import pytest
import torch
from harness import harmless, linux, make_run, refused, run, small_text
from test_model import FAST, make

import compress
from minutegpt import checkpoint
from minutegpt.arithmetic import BYTES, NARROW, TOTAL, WHOLE, Damaged, Decoder, Encoder
from minutegpt.data.tokenizer import Tokenizer, byte_tokenizer, char_tokenizer, train_bpe
from minutegpt.device import init_machine
from minutegpt.errors import UserError
from minutegpt.mgpt import (
    LAYOUT,
    MAGIC,
    REQUIREMENTS,
    VERSION,
    Header,
    pack,
    requirements,
    to_bytes,
    to_symbols,
    unpack,
)
from model import GPT, GPTConfig

TEXT = small_text()
BPE = train_bpe([TEXT], 300)
TOKENIZERS = {
    "char": char_tokenizer(TEXT + "]^\\-é☕"),
    "byte": byte_tokenizer(),
    "bpe": BPE,
    "gpt2": Tokenizer("gpt2", BPE.tokens),
}
NEEDS = ["x"] * len(REQUIREMENTS)
BLOCKS = {
    "classic": {},
    "learned, bias, post": {"norm_position": "post", "activation": "relu", "bias": True},
    "rope": {"pos": "rope", "n_kv_head": 2},
    "fast": FAST,
    "n-grams": FAST | {"ngram": 4, "ngram_rows": 64},
    "experts": {"n_expert": 4},
    "a context of 1": {"block_size": 1},
    "a context of 2": {"block_size": 2, "ngram": 3, "ngram_rows": 64},
}


def files():
    """Files that a compressor may stumble over, by name."""
    chance = random.Random(0)
    noise = chance.randbytes(700)
    return {
        "empty": b"", "one byte": b"t", "one byte that is no text": b"\xff", "text": TEXT[:700].encode(),
        "one character often": b"e" * 3000, "CRLF": TEXT[:300].replace("\n", "\r\n").encode(),
        "a byte order mark": b"\xef\xbb\xbf" + TEXT[:50].encode(), "noise": noise, "zeros": bytes(500),
        "other scripts": ("naïve ☕ 東京 🙂 e\u0301" * 9).encode(),
        "an end token": b"to be<|endoftext|> or <|endoftext|>",
        "half a character": "☕".encode()[:2] + TEXT[:40].encode() + "🙂".encode()[:3],
        "surrogates": b"\xed\xa0\x80\xed\xb0\x80 the fox", "overlong": b"\xc0\x80 the \xf5\x80",
        "UTF-16": "the fox".encode("utf-16"),
        "spaces": b" " * 400 + b"\n" * 300 + b"\t" * 20, "latin-1 in text": (TEXT[:200] + "Zwölf").encode("latin-1"),
        "mixed": b"".join(chance.choice([noise[i : i + 3], TEXT[i : i + 9].encode()]) for i in range(90)),
        "class characters": rb"^]-\[a-z]" * 9,
    }  # fmt: skip


def model_of(tokenizer, **settings):
    return make(vocab_size=tokenizer.vocab_size, **settings)


def compressed(raw, model, tokenizer, streams=0):
    return compress.compress_bytes(raw, model, tokenizer, NEEDS, streams)


def restored(data, model, tokenizer, needs=NEEDS):
    return compress.decompress_bytes("x.mgpt", data, model, tokenizer, needs)


def signed(data):
    """The file with the checksum that it should have: what a stranger can make."""
    return data[:-4] + zlib.crc32(data[:-4]).to_bytes(4, "little")


# ---------------------------------------------------------------------------------------- the coder


def messages(seed, n=400):
    """Edges (n, V + 1) and symbols (n,) of a random message, some of whose symbols are nearly certain or nearly not."""
    chance = np.random.default_rng(seed)
    V = int(chance.choice([1, 2, 3, 65, 1000]))
    logits = chance.normal(size=(n, V)) * chance.choice([0, 1, 30, 300])
    edges = compress.intervals(torch.from_numpy(logits), 1)
    symbols = [int(chance.integers(V + 1)) if chance.random() < 0.1 else int(row.argmax()) for row in logits]
    return edges, symbols


def encoded(edges, symbols):
    encoder = Encoder()
    for row, symbol in zip(edges, symbols, strict=True):
        assert encoder.code(row, symbol) == symbol
    return encoder.finish()


def without_carries(edges, symbols):
    """The same file from one long number, so without a carry: low has all digits from the start on."""
    low, width, digits = 0, WHOLE, 0
    for row, symbol in zip(edges, symbols, strict=True):
        unit = width >> 32
        low, width = low + unit * int(row[symbol]), unit * int(row[symbol + 1] - row[symbol])
        while width < NARROW:
            low, width, digits = low << 8, width << 8, digits + 1
    return (-(-low // NARROW)).to_bytes(digits + 1, "big")


@pytest.mark.parametrize("seed", range(30))
def test_the_coder_writes_the_digits_of_one_long_number_and_reads_them(seed):
    edges, symbols = messages(seed)
    data = encoded(edges, symbols)
    assert data == without_carries(edges, symbols)
    decoder = Decoder(data)
    assert [decoder.code(row) for row in edges] == symbols
    assert decoder.position == len(decoder.data)  # it reads all of it, and no more


@pytest.mark.parametrize("byte", [b"\x80", b"\x00\x01", b"\xff\xff\x80"])
def test_a_carry_runs_through_many_bytes(byte):
    """The number is just above 0.80 (hexadecimal), and the interval begins below it: 7f ff ff ... becomes 80 00 00."""
    edges = np.array([0, TOTAL // 3, 2 * TOTAL // 3, TOTAL])
    decoder = Decoder(byte + bytes(20) + b"\x55" * 20)
    symbols = [decoder.code(edges) for _ in range(150)]
    data = encoded([edges] * 150, symbols)
    assert data == without_carries([edges] * 150, symbols)
    assert data.startswith(byte + bytes(20))


@pytest.mark.parametrize("spread", [0.0, 1.0, 5.0, 20.0])
def test_the_size_is_the_ideal_code_length(spread):
    chance = np.random.default_rng(1)
    logits = chance.normal(size=(20_000, 40)) * spread
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    symbols = (p.cumsum(1) > chance.random((len(p), 1))).argmax(1)  # drawn from p
    size = len(encoded(compress.intervals(torch.from_numpy(logits), 1), symbols.tolist()))
    ideal = -np.log2(p[np.arange(len(p)), symbols]).sum() / 8
    assert abs(size - ideal) < 0.001 * ideal + 2


def test_a_symbol_that_is_sure_costs_nothing():
    edges = compress.intervals(torch.tensor([[50.0, -50.0, -50.0]], dtype=torch.float64), 1)[0]
    assert len(encoded([edges] * 100_000, [0] * 100_000)) == 1
    assert len(encoded([edges] * 10, [1] * 10)) in (40, 41)  # and one that is nearly impossible 32 bits


def test_bytes_that_no_encoder_wrote_are_refused():
    edges = np.array([0, TOTAL // 2])  # the upper half is no symbol's
    with pytest.raises(Damaged):
        Decoder(b"\xff" * 20).code(edges)
    decoder = Decoder(b"\x00")
    with pytest.raises(Damaged):
        for _ in range(9):
            decoder.code(BYTES)


@pytest.mark.parametrize("escape", [1, TOTAL // 2, TOTAL - 200])
def test_intervals_are_the_probabilities(escape):
    logits = torch.randn(5, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 4
    logits[1], logits[2] = 0.0, -1e4
    logits[2, 7] = 1e4
    edges = compress.intervals(logits, escape)
    assert edges.shape == (5, 102) and (edges[:, 0] == 0).all()
    assert edges[:, -1].max() <= TOTAL and edges[:, -1].min() > TOTAL - 102
    for row, wanted in zip(edges.tolist(), logits.tolist(), strict=True):
        total = sum(math.exp(x - max(wanted)) for x in wanted)
        for i, x in enumerate(wanted):
            p = math.exp(x - max(wanted)) / total
            assert row[i + 1] - row[i] == pytest.approx(1 + p * (TOTAL - 100 - escape), abs=1.01)
        assert row[-1] - row[-2] == escape


# ---------------------------------------------------------------------------------------- any file


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_file_comes_back(name):
    tokenizer = TOKENIZERS[name]
    model = model_of(tokenizer)
    for what, raw in files().items():
        data, figures = compressed(raw, model, tokenizer)
        assert restored(data, model, tokenizer) == raw, what
        assert len(data) <= len(raw) + 200, what  # what the model does not make smaller is stored
        assert figures["escapes"] == 0 or name == "char", what


@pytest.mark.parametrize("name", TOKENIZERS)
def test_symbols_are_bytes_again(name):
    tokenizer = TOKENIZERS[name]
    for what, raw in files().items():
        symbols = to_symbols(raw, tokenizer)
        assert b"".join(to_bytes(symbols, tokenizer)) == raw, what
        assert len(symbols) == 0 or 0 <= symbols.min() <= symbols.max() < tokenizer.vocab_size + 256


def test_what_the_vocabulary_lacks_is_escaped_and_costs_little():
    tokenizer = TOKENIZERS["char"]
    V = tokenizer.vocab_size
    raw = "fox é ž \U0001f642".encode()
    assert to_symbols(raw, tokenizer)[6:].tolist() == [
        *(V + b for b in "ž".encode()), tokenizer.encode(" ")[0], *(V + b for b in "🙂".encode())
    ]  # fmt: skip
    model = model_of(tokenizer, spread=0.0)  # all tokens are equally likely
    _, figures = compressed(
        random.Random(0).randbytes(4000).translate(bytes([128 + b // 2 for b in range(256)])), model, tokenizer
    )
    assert figures["escapes"] == 4000 and figures["coder_bytes"] < 4100


def test_a_tokenizer_that_loses_something_is_not_trusted(monkeypatch):
    tokenizer = Tokenizer("bpe", BPE.tokens)
    model = model_of(tokenizer)
    monkeypatch.setattr(tokenizer, "encode_bytes", lambda raw: np.zeros(len(raw), np.uint32))
    data, figures = compressed(b"the quick brown fox", model, tokenizer)
    assert figures["escapes"] == 19 and restored(data, model, tokenizer) == b"the quick brown fox"


@pytest.mark.parametrize("seed", range(20))
def test_random_files_models_and_numbers_of_streams(seed):
    """Text, noise and mixtures; the last stream is shorter than the others, or there are more streams than symbols."""
    chance = random.Random(seed)
    tokenizer = chance.choice(list(TOKENIZERS.values()))
    model = model_of(tokenizer, **BLOCKS[chance.choice(list(BLOCKS))])
    pieces = [chance.choice([chance.randbytes(3), TEXT[i : i + 40].encode()]) for i in range(chance.randrange(20))]
    raw = b"".join(pieces)
    data, figures = compressed(raw, model, tokenizer, chance.choice([0, 1, 2, 7, 50, 1000]))
    assert restored(data, model, tokenizer) == raw and figures["streams"] <= figures["tokens"]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("streams", [1, 3])
def test_every_block_longer_than_its_context(block, streams):
    tokenizer = TOKENIZERS["char"]
    raw, model = TEXT[:200].encode(), memorised(block)  # contexts of 12 at most: refilled many times
    data, figures = compressed(raw, model, tokenizer, streams)
    assert figures["streams"] == streams and figures["coder_bytes"] < 200  # coded, not stored
    assert restored(data, model, tokenizer) == raw


def memorised(block):
    """A model with a good idea of the text's letters, so that it makes the text smaller."""
    model = model_of(TOKENIZERS["char"], spread=0.05, **BLOCKS[block])
    counts = torch.bincount(torch.tensor(TOKENIZERS["char"].encode(TEXT)), minlength=model.config.vocab_size)
    model.lm_head.register_forward_hook(lambda layer, inputs, logits: logits + (counts + 0.1).log())
    return model


# ---------------------------------------------------------------------------------------- the size is the loss


@torch.no_grad()
def naive_bits(model, tokenizer, ids, streams):
    """Bits of each stream's tokens, one prediction at a time, in the contexts that compress.py documents."""
    T, L, total = model.config.block_size, -(-len(ids) // streams), 0.0
    for s in range(streams):
        text = [tokenizer.start_ids()[0], *ids[s * L : (s + 1) * L]]
        first = 0
        for t in range(1, len(text)):
            if t - first > T:  # full: go on from the last eighth of a context
                first = t - max(1, T // 8)
            logits = model(torch.tensor([text[first:t]]))[0][0, -1].double()
            total -= logits.log_softmax(-1)[text[t]].item() / math.log(2)
    return total


@pytest.mark.parametrize("block", ["classic", "n-grams", "experts", "a context of 2"])
@pytest.mark.parametrize("streams", [1, 4])
def test_the_size_is_the_models_loss(block, streams):
    tokenizer, model = TOKENIZERS["char"], memorised(block)
    raw = TEXT[:203].encode()
    data, figures = compressed(raw, model, tokenizer, streams)
    bits = naive_bits(model, tokenizer, tokenizer.encode(TEXT[:203]), streams)
    assert figures["model_bytes"] * 8 == pytest.approx(bits, rel=1e-5)
    assert figures["coder_bytes"] == pytest.approx(bits / 8, abs=1.5)
    assert len(data) < figures["coder_bytes"] + 5 + LAYOUT.size + 4 + 20  # NEEDS is short


def test_the_number_of_streams():
    config = GPTConfig(block_size=256, n_layer=4, n_head=2, n_embd=128)
    assert [compress.choose_streams(n, config) for n in (1, 1023, 2048, 111_540, 10**9)] == [1, 1, 2, 108, 256]
    large = GPTConfig(block_size=1024, vocab_size=50257, n_layer=48, n_head=25, n_embd=1600)
    assert 1 <= compress.choose_streams(10**9, large) < 4


# ---------------------------------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def small():
    """A short compressed text, with its model."""
    model, raw = memorised("fast"), TEXT[:60].encode()
    return compressed(raw, model, TOKENIZERS["char"], 2)[0], raw, model


def test_a_damaged_byte_is_refused(small):
    data, _, model = small
    for i in range(len(data)):
        with pytest.raises(UserError):
            restored(data[:i] + bytes([data[i] ^ 1 << i % 8]) + data[i + 1 :], model, TOKENIZERS["char"])


def test_a_forged_byte_gives_no_other_text(small):
    """With the checksum that it should have. The last bits of a number may change without another text."""
    data, raw, model = small
    same = 0
    for i in range(5, len(data) - 4, 2):
        wrong = signed(data[:i] + bytes([data[i] ^ 1 << i % 8]) + data[i + 1 :])
        try:
            assert restored(wrong, model, TOKENIZERS["char"]) == raw
            same += 1
        except UserError:
            pass
    assert same < 4


def test_a_file_cut_short_or_longer_is_refused(small):
    data, _, model = small
    for wrong in [*(data[:i] for i in range(len(data))), data + b"\0", data + data]:
        with pytest.raises(UserError, match=r"damaged or incomplete|is not a file of compress\.py"):
            restored(wrong, model, TOKENIZERS["char"])
    for i in range(5, len(data) - 4):  # a stranger signs it again
        with pytest.raises(UserError):
            restored(signed(data[:i] + data[-4:]), model, TOKENIZERS["char"])


@pytest.mark.parametrize("which", REQUIREMENTS)
def test_every_requirement_is_checked(small, which):
    data, _, model = small
    needs = list(NEEDS)
    needs[REQUIREMENTS.index(which)] = "7"
    with pytest.raises(UserError, match=f"x.mgpt needs {which} 'x', here '7'"):
        restored(data, model, TOKENIZERS["char"], needs)


def test_the_advice_fits_the_difference():
    def advice(**theirs):
        data = pack(Header(bytes(32), 9, 9, 1, 1), [theirs.get(name, "x") for name in REQUIREMENTS], b"")
        with pytest.raises(UserError) as found:
            unpack("x.mgpt", data, NEEDS)
        return str(found.value)

    assert advice(threads="3").endswith("Type OMP_NUM_THREADS=3 before the command")
    assert "with the PyTorch build that" in advice(torch="2.9", threads="3")
    assert "--out_dir=NAME" in advice(model="y", threads="3")
    assert "\x1b" not in advice(torch="\x1b[31m")  # a stranger's text cannot colour the terminal
    assert len(advice(torch="y" * 60_000)) < 300


def test_a_later_version_is_named(small):
    data, _, model = small
    later = signed(data[:4] + bytes([VERSION + 1]) + data[5:])
    with pytest.raises(UserError, match=r"has format 2, this reads up to 1\. Update"):
        restored(later, model, TOKENIZERS["char"])


def test_requirements_name_model_tokenizer_and_machine():
    machine, model, tokenizer = init_machine("cpu", "float32", "false"), memorised("classic"), TOKENIZERS["char"]
    needs = requirements(model, tokenizer, machine)
    found = dict(zip(REQUIREMENTS, needs, strict=True))
    assert found["torch"] == str(torch.__version__) and found["threads"] == str(torch.get_num_threads())
    assert found["device"] == "cpu" and found["instructions"] == torch.backends.cpu.get_cpu_capability()
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-6
    changed = dict(zip(REQUIREMENTS, requirements(model, tokenizer, machine), strict=True))
    assert {name for name in found if found[name] != changed[name]} == {"model"}
    changed = dict(zip(REQUIREMENTS, requirements(model, byte_tokenizer(), machine), strict=True))
    assert found["tokenizer"] != changed["tokenizer"]


@pytest.mark.parametrize("noise", [1e-6, 1e-3])
def test_other_arithmetic_is_detected_and_never_decoded_to_something_else(noise):
    """The same weights on another machine: the last bits of the predictions differ, and all else agrees."""
    tokenizer, model = TOKENIZERS["char"], memorised("fast")
    raw = TEXT[:2000].encode()
    data, _ = compressed(raw, model, tokenizer, 4)
    model.lm_head.register_forward_hook(lambda layer, inputs, logits: logits * (1 + noise))
    with pytest.raises(UserError, match="this machine computes other probabilities"):
        restored(data, model, tokenizer)


def test_a_check_ends_a_decoding_that_went_wrong(monkeypatch):
    """Soon, not after the whole file."""
    tokenizer, model = TOKENIZERS["byte"], model_of(TOKENIZERS["byte"], spread=0.02)
    monkeypatch.setattr(compress, "CHECKED", 24)
    raw = TEXT.encode()[:400]
    encoder, symbols = Encoder(), to_symbols(raw, tokenizer)
    compress.code(model, tokenizer, encoder, n=400, rows=2, escape=1, symbols=symbols)
    data = bytearray(encoder.finish())
    data[5] ^= 1
    coded = []
    with pytest.raises(Damaged, match=r"the check after 12 steps fails|above the last edge"):
        compress.code(model, tokenizer, Decoder(bytes(data)), n=400, rows=2, escape=1, progress=coded.append)
    assert sum(coded) <= 24


@linux
@pytest.mark.parametrize("n", [2**20, 2**40, 2**63, 2**64 - 1])
def test_a_length_that_is_a_lie_costs_nothing(small, n):
    data, _, model = small
    _, payload = unpack("x.mgpt", data, NEEDS)
    for streams in (1, 2, 1000):
        wrong = pack(Header(bytes(32), n, n, 1, streams), NEEDS, payload)
        assert harmless(wrong, lambda bad: restored(bad, model, TOKENIZERS["char"]))


@linux
@pytest.mark.parametrize("seed", range(12))
def test_hostile_headers_cost_neither_time_nor_memory(small, seed):
    data, _, model = small
    chance = random.Random(seed)
    sizes = [0, 1, 2, 3, 100, 1023, 2**16 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]
    length, n = (chance.choice(sizes) for _ in range(2))
    escape, streams = (chance.choice([size for size in sizes if size < limit]) for limit in (2**32, 2**16))
    header = Header(chance.randbytes(32), length, n, escape, streams)
    wrong = pack(header, NEEDS, chance.choice([b"", bytes(50), chance.randbytes(3000), data[60:-4]]))
    assert harmless(wrong, lambda bad: restored(bad, model, TOKENIZERS["char"]))


def test_weights_that_are_not_finite_are_refused():
    model = model_of(TOKENIZERS["byte"])
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        compressed(b"the fox", model, TOKENIZERS["byte"])


# ---------------------------------------------------------------------------------------- as a user runs it


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """Two runs, fox and other, and a text."""
    folder = tmp_path_factory.mktemp("house")
    torch.manual_seed(0)
    tokenizer = char_tokenizer(TEXT)
    config = GPTConfig(block_size=32, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=32, **FAST)
    make_run(folder / "fox", GPT(config), tokenizer, tokenizer.encode(TEXT), "small", steps=60)
    state = checkpoint.load_run(folder / "fox")
    (folder / "other").mkdir()
    weights = {name: w * 1.0001 for name, w in state["model"].items()}
    checkpoint.save(folder / "other", state | {"model": weights, "model_config": asdict(config)}, best=True)
    (folder / "text.txt").write_bytes(TEXT[:4000].encode() + "\r\nZwölf ☕".encode())
    return folder


def command(house, *argv, out_dir="fox", **how):
    return run("compress.py", f"--out_dir={out_dir}", "--device=cpu", *map(str, argv), cwd=house, **how)


def test_two_processes_agree_and_the_file_comes_back(house):
    done = command(house, "text.txt", "--to=a.mgpt")
    assert done.status == 0, done.err
    assert "bits per byte: this model " in done.out and "bzip2" in done.out and "the model's loss is" in done.out
    done = command(house, "text.txt", "--to=b.mgpt", "--json")
    assert done.status == 0, done.err
    figures = json.loads(done.out)
    assert (house / "a.mgpt").read_bytes() == (house / "b.mgpt").read_bytes()
    assert figures["mgpt"] == (house / "a.mgpt").stat().st_size < figures["xz"] and figures["bytes"] == 4012
    assert figures["coder_bytes"] < 1.005 * figures["model_bytes"] + 20
    done = command(house, "--decompress", "b.mgpt", "--to=back.txt", fork=False)
    assert done.status == 0, done.err
    assert (house / "back.txt").read_bytes() == (house / "text.txt").read_bytes()


def test_nothing_is_replaced_unasked(house):
    (house / "mine.txt").write_bytes(b"the quick brown fox")
    assert command(house, "mine.txt").status == 0
    before = (house / "mine.txt.mgpt").read_bytes()
    refused(command(house, "mine.txt"), "mine.txt.mgpt is there already", "--overwrite", "--to=NAME")
    refused(command(house, "--decompress", "mine.txt.mgpt"), "mine.txt is there already", "--overwrite")
    (house / "mine.txt").write_bytes(b"changed")
    assert command(house, "--decompress", "mine.txt.mgpt", "--overwrite").status == 0
    assert (house / "mine.txt").read_bytes() == b"the quick brown fox"
    assert (house / "mine.txt.mgpt").read_bytes() == before
    refused(command(house, "--decompress", "mine.txt"), "mine.txt does not end with .mgpt", "--to=NAME")


def test_a_file_that_is_refused_leaves_nothing(house):
    assert command(house, "text.txt", "--to=good.mgpt").status == 0
    data = (house / "good.mgpt").read_bytes()
    (house / "cut.mgpt").write_bytes(data[:-1])
    (house / "forged.mgpt").write_bytes(signed(data[:400] + bytes([data[400] ^ 1]) + data[401:]))
    before = sorted(path.name for path in house.iterdir())
    refused(command(house, "--decompress", "cut.mgpt"), "cut.mgpt is damaged or incomplete")
    refused(command(house, "--decompress", "forged.mgpt"), "this machine computes other probabilities")
    refused(command(house, "--decompress", "good.mgpt", out_dir="other"), "good.mgpt needs model", "--out_dir=NAME")
    (house / "threads.mgpt").write_bytes(signed(data.replace(b"\n1\nfloat32", b"\n3\nfloat32")))
    done = command(house, "--decompress", "threads.mgpt")
    refused(done, "threads.mgpt needs threads '3', here '1'. Type OMP_NUM_THREADS=3 before the command")
    (house / "threads.mgpt").unlink()
    refused(command(house, "--decompress", "text.txt", "--to=x"), "text.txt is not a file of compress.py")
    assert sorted(path.name for path in house.iterdir()) == before


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["nowhere.txt"], "cannot read nowhere.txt: No such file or directory"),
        (["fox"], "cannot read fox: Is a directory"),
        ([], "there is no file to compress"),
        (["text.txt", "fox"], "unexpected argument 'fox'. Type one file per call"),
        (["text.txt", "--to=nowhere/x.mgpt"], "there is no folder nowhere"),
        (["text.txt", "--streams=5000"], "--streams=5000 must be at most 1024"),
    ],
)
def test_mistakes(house, argv, says):
    before = sorted(path.name for path in house.iterdir())
    refused(command(house, *argv), says)
    assert sorted(path.name for path in house.iterdir()) == before


def test_a_full_disk_leaves_nothing(house):
    before = sorted(path.name for path in house.iterdir())
    refused(command(house, "text.txt", "--to=full.mgpt", limits={"RLIMIT_FSIZE": 500}), "--to=NAME")
    assert sorted(path.name for path in house.iterdir()) == before


# ---------------------------------------------------------------------------------------- slow


@pytest.mark.slow
def test_the_validation_text_of_tiny_shakespeare(tmp_path, shakespeare):
    text = shakespeare[len(shakespeare) * 9 // 10 :]
    torch.manual_seed(0)
    tokenizer = char_tokenizer(shakespeare)
    config = GPTConfig(
        block_size=64, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=64, ngram=4, ngram_rows=4096, **FAST
    )
    train = tokenizer.encode(shakespeare[: -len(text)])
    make_run(tmp_path / "run", GPT(config), tokenizer, train, "shakespeare_char", steps=400)
    (tmp_path / "val.txt").write_text(text, encoding="utf-8", newline="")
    argv = ("--out_dir=run", "--device=cpu")
    done = run("compress.py", *argv, "--json", "val.txt", cwd=tmp_path)
    assert done.status == 0, done.err
    figures = json.loads(done.out)
    assert figures["coder_bytes"] < 1.005 * figures["model_bytes"]
    assert figures["mgpt"] == (tmp_path / "val.txt.mgpt").stat().st_size < figures["xz"]
    done = run("compress.py", *argv, "--decompress", "val.txt.mgpt", "--to=back.txt", cwd=tmp_path)
    assert done.status == 0, done.err
    assert (tmp_path / "back.txt").read_bytes() == text.encode()


def test_the_format_is_documented():
    """The first bytes, so that `file` and a reader of the code can recognise it."""
    data = pack(Header(bytes(32), 1, 1, 1, 0), NEEDS, b"t")
    assert data[:5] == MAGIC + bytes([VERSION]) == b"mGPT\x01" and data[5 + LAYOUT.size :].startswith(b"x\nx\n")
