"""minutegpt/huggingface.py: transformers itself computes the same, in both directions."""

import json
import os
import random
import struct
from dataclasses import asdict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from harness import ROOT, make_dataset, refused, run, small_text
from torch import nn

from minutegpt import checkpoint, huggingface, setup
from minutegpt.config import configure, settings_of
from minutegpt.data.tokenizer import END, Tokenizer, byte_tokenizer, char_tokenizer, train_bpe
from minutegpt.errors import UserError
from minutegpt.huggingface import hf_files, weights_file
from model import GPT, GPTConfig

os.environ["TOKENIZERS_PARALLELISM"] = "false"
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SIZE = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 48, "vocab_size": 61}
FAST = {"pos": "rope", "norm": "rmsnorm", "qk_norm": True, "activation": "relu2", "tie": False}


def make(**settings) -> GPT:
    """A model whose every weight matters: no zeros, no ones."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(**(SIZE | settings))).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def put(folder: Path, model: GPT, tokenizer: Tokenizer | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in hf_files(model, tokenizer).items():
        (folder / name).write_bytes(content)
    return folder


@torch.no_grad()
def agree(ours: GPT, theirs, T: int = 48) -> None:
    idx = torch.randint(ours.config.vocab_size, (2, T), generator=torch.Generator().manual_seed(2))
    a, b = ours(idx)[0], theirs(idx).logits
    assert (a - b).abs().max() <= 1e-5 * a.abs().max()


# ---------------------------------------------------------------------------------------------- out: the model


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("GPT2LMHeadModel", {}),
        ("GPT2LMHeadModel", {"bias": True, "activation": "gelu_tanh", "dropout": 0.1}),
        ("GPT2LMHeadModel", {"tie": False, "activation": "relu"}),
        ("GPT2LMHeadModel", {"activation": "relu2"}),
        ("NanoChatForCausalLM", FAST),
        ("NanoChatForCausalLM", FAST | {"n_kv_head": 2}),
        ("NanoChatForCausalLM", FAST | {"n_kv_head": 1, "tie": True, "activation": "gelu"}),
    ],
)
def test_transformers_computes_the_same(tmp_path, name, settings):
    model = make(**settings)
    folder = put(tmp_path / "hf", model)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(theirs).__name__ == name and not any(report.values()), report
    agree(model, theirs.eval())
    # their own cache and decoding loop say the same, token by token
    start = torch.tensor([[3, 1, 4]])
    assert theirs.generate(start, max_new_tokens=20, do_sample=False).equal(model.generate(start, 20, temperature=0))


@pytest.mark.parametrize(
    "settings",
    [
        {"norm_position": "post"}, {"norm": "rmsnorm"}, {"qk_norm": True}, {"n_kv_head": 2},
        FAST | {"bias": True}, FAST | {"norm": "layernorm"}, FAST | {"qk_norm": False},
        FAST | {"norm_position": "post"},
    ],
)  # fmt: skip
def test_a_block_that_transformers_lacks_is_refused_by_its_knob(settings):
    with pytest.raises(UserError) as error:
        hf_files(make(**settings), None)
    wrong = next(iter(settings.items() - FAST.items()))[0] if "pos" in settings else next(iter(settings))
    assert f"{wrong}=" in str(error.value) and str(error.value).count("=") == 2  # that setting alone, and --format=


def test_safetensors_is_the_whole_model(tmp_path):
    model, tokenizer = make(norm_position="post", vocab_size=256), byte_tokenizer()
    (tmp_path / "it.safetensors").write_bytes(weights_file(model, tokenizer.to_json()))
    with safetensors.safe_open(tmp_path / "it.safetensors", "pt") as file:
        about = json.loads(file.metadata()["minutegpt"])
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert "lm_head.weight" not in weights  # tied
    again = GPT(GPTConfig(**about["model_config"])).eval()
    again.load_state_dict(weights | {"lm_head.weight": weights["transformer.wte.weight"]})
    idx = torch.arange(40)[None]
    assert again(idx)[0].equal(model(idx)[0]) and about["tokenizer"] == tokenizer.to_json()


# ---------------------------------------------------------------------------------------------- out: the tokenizer


def hard_texts() -> list[str]:
    chance = random.Random(0)
    letters = [chr(c) for c in [*range(0x250), *range(0x2000, 0x2070), 0x4E00, 0x300, 0x660, 0x1D7D8, 0xFB05, 0x1F600]]
    texts = [
        small_text(), "", " ", "Hello  world\n\n  it's I'LL 'ſ 'VE 12345 \t\u3000 日本語 \U0001f389",
        "\r\n\r x\x85y \u2028 z   ", "a" * 500 + " " * 500 + "\n" * 50 + "aaa",
    ]  # fmt: skip
    for _ in range(150):
        some = chance.sample(letters, chance.choice([2, 5, 50]))
        texts.append("".join(chance.choices([*some, " ", "\n", "'", "s", "1", "the"], k=chance.randint(1, 100))))
    texts += ["".join(chance.choices(["a", "aa", "ab", "ba", "the", "he"], k=60)) for _ in range(100)]
    return texts


def make_tokenizer(kind: str) -> Tokenizer:
    if kind in ("byte", "char"):
        return byte_tokenizer() if kind == "byte" else char_tokenizer("".join(hard_texts()))
    tokens = train_bpe([small_text() + "ab" * 300 + "a" * 999 + " aab" * 200], 500).tokens
    return Tokenizer(kind, tokens)


@pytest.mark.parametrize("pos", ["learned", "rope"])  # AutoTokenizer goes by the model's type, too
@pytest.mark.parametrize("kind", ["char", "byte", "bpe", "gpt2"])
def test_their_tokenizer_gives_the_same_ids(tmp_path, kind, pos):
    ours = make_tokenizer(kind)
    settings = {"vocab_size": ours.vocab_size, "n_embd": 8}
    put(tmp_path, make(**settings, **(FAST if pos == "rope" else {})), ours)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == ours.vocab_size and theirs.eos_token_id == ours.end_token
    for text in hard_texts():
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids, text
        assert theirs.decode(ids) == text
    ids = random.Random(1).choices(range(ours.vocab_size), k=1000)  # whatever a model may say
    assert theirs.decode(ids) == ours.decode(ids)
    if kind == "char":
        with pytest.raises(Exception, match="UNK"):
            theirs("\U0010fffe")
    else:
        assert theirs.decode(theirs(END)["input_ids"]) == END


# ---------------------------------------------------------------------------------------------- in: GPT-2


def their_gpt2(folder: Path, dtype=torch.float32, **settings):
    """A tiny GPT-2 with random weights, as transformers makes and saves it."""
    torch.manual_seed(3)
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 48, "vocab_size": 61}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**(sizes | settings))).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    model.to(dtype).save_pretrained(folder)
    return model.float()


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"activation_function": "gelu"}, {"tie_word_embeddings": False}, {"dtype": torch.bfloat16},
        {"n_inner": 128, "activation_function": "relu"},
    ],
)  # fmt: skip
def test_gpt2_of_transformers_computes_the_same_here(tmp_path, settings):
    theirs = their_gpt2(tmp_path, **settings)
    model = checkpoint.build_model(huggingface.load_any(str(tmp_path))).eval()
    assert model.config.tie is settings.get("tie_word_embeddings", True)
    agree(model, theirs)
    again = transformers.AutoModelForCausalLM.from_pretrained(put(tmp_path / "again", model)).eval()
    assert all(w.equal(again.state_dict()[name]) for name, w in theirs.state_dict().items())  # there and back


def test_gpt2_as_it_was_first_published(tmp_path):
    """Names without `transformer.`, causal masks among the weights, float16, a config with little in it."""
    theirs = their_gpt2(tmp_path)
    weights = {k.removeprefix("transformer."): w.half() for k, w in theirs.transformer.state_dict().items()}
    weights |= {f"h.{i}.attn.bias": torch.ones(1, 1, 48, 48, dtype=torch.bool).tril() for i in range(2)}
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    config = {"model_type": "gpt2", "n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 48, "vocab_size": 61}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    agree(checkpoint.build_model(huggingface.load_any(str(tmp_path))).eval(), theirs.half().float())


WRONG = [
    {"model_type": "llama"}, {"activation_function": "silu"}, {"activation_function": []}, {"n_inner": 100},
    {"layer_norm_epsilon": 1e-6}, {"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True},
    {"tie_word_embeddings": "yes"}, {"tie_word_embeddings": False}, {"n_layer": 10**9}, {"n_layer": 1},
    {"n_positions": 10**12}, {"n_positions": 47}, {"n_head": 0}, {"n_head": -4}, {"n_head": 3}, {"n_head": 10**9},
    {"vocab_size": 10**12}, {"vocab_size": "61"}, {"n_embd": 10**9}, {"n_embd": 32.0}, {"n_embd": None},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_config_that_is_not_gpt2s_or_lies(tmp_path, wrong):
    their_gpt2(tmp_path)
    config = json.loads((tmp_path / "config.json").read_bytes()) | wrong
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError):
        checkpoint.build_model(huggingface.load_any(str(tmp_path)))


@pytest.mark.parametrize("config", ["", "{", "[]", "null", "[" * 100_000, "9" * 5000, '{"a": ' * 9000, "\xff"])
def test_a_config_that_is_none(tmp_path, config):
    their_gpt2(tmp_path)
    (tmp_path / "config.json").write_text(config, encoding="latin-1")
    with pytest.raises(UserError):
        huggingface.load_any(str(tmp_path))


def header(content: dict) -> bytes:
    raw = json.dumps(content).encode()
    return struct.pack("<Q", len(raw)) + raw


def tensor(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\xff" * 8, struct.pack("<Q", 10**18) + b"{}", struct.pack("<Q", 90_000_000) + b"{}",
        header({"wte.weight": tensor([10**9, 10**9], 0, 16)}) + bytes(16),
        header({"wte.weight": tensor([61, 32], 0, 7808)}) + bytes(100),  # more than there is
        header({"wte.weight": tensor([0, 10**15], 0, 0)}),
        header({"wte.weight": tensor([61, 32], 0, 1952, "I8")}) + bytes(1952),
        header({"a": tensor([4], 0, 16), "b": tensor([4], 8, 24)}) + bytes(24),  # overlapping
        header({"wte.weight": tensor([61, 32], 0, 7808)}) + bytes(7808),  # nothing else
    ],
)  # fmt: skip
def test_weights_that_are_none_or_lie(tmp_path, content):
    their_gpt2(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError):
        checkpoint.build_model(huggingface.load_any(str(tmp_path)))


def test_no_mutation_of_a_folder_makes_a_traceback(tmp_path):
    their_gpt2(tmp_path, n_layer=1, n_embd=8, n_positions=4, vocab_size=5)
    whole = {name: (tmp_path / name).read_bytes() for name in ("config.json", "model.safetensors")}
    chance = random.Random(4)
    refusals = 0
    for _ in range(400):
        name = chance.choice(list(whole))
        raw = bytearray(whole[name])
        end = struct.unpack("<Q", raw[:8])[0] + 8 if name == "model.safetensors" else len(raw)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(end)
            byte = chance.choice([*b'0129,:"[]{}eE-', chance.randrange(256)])
            raw[at : at + chance.choice([0, 1, 1, 1, 8])] = bytes([byte])
        (tmp_path / name).write_bytes(raw)
        try:
            checkpoint.build_model(huggingface.load_any(str(tmp_path)))
        except UserError:
            refusals += 1
        (tmp_path / name).write_bytes(whole[name])
    assert refusals > 200  # the others hit what is not read, or a weight


def test_a_folder_without_safetensors_is_told_how_to_get_them(tmp_path):
    their_gpt2(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="save_pretrained"):
        huggingface.load_any(str(tmp_path))


def test_gpt2_by_its_name_is_found_beside_the_texts(tmp_path, monkeypatch):
    monkeypatch.setenv("MINUTEGPT_CACHE", str(tmp_path))
    theirs = their_gpt2(tmp_path / "gpt2-xl")
    agree(checkpoint.build_model(huggingface.load_any("gpt2-xl")).eval(), theirs)


def test_gpt2_without_a_network_tells_the_ways_out(offline):
    refused(run("export.py", "--out_dir=gpt2"), "Three ways out", "model.safetensors", offline)
    # over 1 GB: never unasked
    refused(run("export.py", "--out_dir=gpt2-xl"), "6.4 GB", "hf download openai-community/gpt2-xl")


# ---------------------------------------------------------------------------------------------- in: to start from


def start(place: Path, given: tuple[str, ...] = (), **settings):
    """start_from with train.py's defaults and these settings, `given` of them on the command line."""
    config = {key: value for key, value in asdict(GPTConfig()).items() if key != "vocab_size"} | {"n_kv_head": 0}
    return setup.load_weights(str(place), config | {"max_iters": 7} | settings, set(given))


def a_run(folder: Path, model: GPT, tokenizer: Tokenizer | None = None, **more) -> Path:
    folder.mkdir()
    state = {"model": model.state_dict(), "model_config": asdict(model.config), "step": 9, "config": {}} | more
    checkpoint.save(folder, state | {"tokenizer": tokenizer and tokenizer.to_json()}, best=True)
    return folder


@pytest.mark.parametrize("of", ["a run", "transformers"])
def test_a_shorter_context_keeps_the_first_positions(tmp_path, of):
    theirs = their_gpt2(tmp_path) if of == "transformers" else make()
    place = tmp_path if of == "transformers" else a_run(tmp_path / "run", theirs)
    model, _, config = start(place, block_size=20, dropout=0.25)
    assert config["block_size"] == model.config.block_size == len(model.transformer.wpe.weight) == 20
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.25} and config["dropout"] == 0.25
    assert config["n_embd"] == 32 and config["n_kv_head"] == 4 and config["max_iters"] == 7
    idx = torch.randint(61, (2, 20))
    expected = theirs(idx)
    expected = expected.logits if of == "transformers" else expected[0]
    assert (model.eval()(idx)[0] - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert model.transformer.wpe.weight.requires_grad


def test_a_longer_context(tmp_path):
    learned, rotary = a_run(tmp_path / "a", make()), a_run(tmp_path / "b", make(**FAST))
    assert start(learned, block_size=256)[2]["block_size"] == 48  # of a config file, or the default
    with pytest.raises(UserError, match=r"block_size=48 \(not 256\)"):
        start(learned, ("block_size",), block_size=256)
    assert start(rotary, ("block_size",), block_size=256)[2]["block_size"] == 256


def test_settings_that_contradict_the_weights(tmp_path):
    place = a_run(tmp_path / "a", make(n_kv_head=2))
    with pytest.raises(UserError, match=r"n_head=4 \(not 8\), n_kv_head=2 \(not 8\), pos=learned \(not rope\)"):
        start(place, ("n_head", "n_kv_head", "pos"), n_head=8, n_kv_head=8, pos="rope")
    start(a_run(tmp_path / "b", make()), ("n_head", "n_kv_head"), n_head=4, n_kv_head=0)  # 0 is n_head
    start(place, n_head=8)  # of a config file: the weights know better
    for setting in ({"block_size": 0}, {"dropout": 1.5}):
        with pytest.raises(UserError):
            start(place, **setting)


def test_a_place_that_is_none(tmp_path):
    with pytest.raises(UserError, match="none of scratch, resume, gpt2"):
        start(tmp_path / "scrach")
    with pytest.raises(UserError, match="no checkpoint"):
        start(tmp_path)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")  # of a run that was killed early
    with pytest.raises(UserError, match="no checkpoint"):
        start(tmp_path)


def test_a_vocabulary_must_be_the_models_own():
    ours, other = char_tokenizer("abc").to_json(), char_tokenizer("abd").to_json()
    check = setup.check_vocabulary
    check(make(vocab_size=3), ours, ours, "data")
    with pytest.raises(UserError, match="another tokenizer"):
        check(make(vocab_size=3), ours, other, "data")
    for size, fits in ((2, False), (3, True), (128, True), (131, False), (50257, False)):
        model = make(vocab_size=size, n_embd=4)
        if fits:
            check(model, None, ours, "data")
        else:
            with pytest.raises(UserError, match=f"{size} ids"):
                check(model, None, ours, "data")


def test_config_gpt2_is_gpt2():
    """As many parameters as the published model has in transformers, with our defaults for the rest."""
    options = {"model": GPTConfig, "ignore": settings_of(ROOT / "train.py")}
    config, _ = configure({"batch_size": 0, "gradient_accumulation_steps": 0}, "train.py",
                          [str(ROOT / "config" / "gpt2.py")], **options)  # fmt: skip
    assert config["batch_size"] * config["gradient_accumulation_steps"] * config["block_size"] == 491_520
    with torch.device("meta"):
        ours = GPT(GPTConfig(**{k: v for k, v in config.items() if k in asdict(GPTConfig())} | {"vocab_size": 50257}))
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    assert ours.n_params() == theirs.num_parameters() == 124_439_808


def train(*words: str, data: Path, out: Path, **env: str):
    tiny = ["--batch_size=4", "--eval_iters=2", "--max_iters=20", "--device=cpu", "--compile=false"]
    return run("train.py", *tiny, f"--out_dir={out}", *words, data=data, **env)


@pytest.mark.slow
def test_fine_tuning_starts_where_the_weights_are(tmp_path, data):
    """From a run of ours and from GPT-2's folder: the first evaluation is theirs, the optimizer and step are new."""
    shape = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32", "--dataset=small", "--learning_rate=1e-2"]
    assert train(*shape, "--max_iters=60", data=data, out=tmp_path / "a").status == 0
    before = checkpoint.load_run(tmp_path / "a", "best")
    tuned = train(f"--init_from={tmp_path / 'a'}", "--dataset=small", "--learning_rate=1e-3", "--block_size=32",
                  data=data, out=tmp_path / "b")  # fmt: skip
    assert tuned.status == 0, tuned.err
    rows = [json.loads(line) for line in (tmp_path / "b" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[0]["step"] == 0 and rows[0]["val_loss"] == pytest.approx(before["best_val_loss"], rel=1e-5)
    after = checkpoint.load_run(tmp_path / "b", "latest")
    assert after["step"] == 20 and after["model_config"] == before["model_config"]
    assert after["best_val_loss"] < before["best_val_loss"]
    assert train("--init_from=resume", "--max_iters=25", data=data, out=tmp_path / "b").status == 0

    their_gpt2(tmp_path / "gpt2", vocab_size=before["model_config"]["vocab_size"])
    tuned = train(f"--init_from={tmp_path / 'gpt2'}", "--dataset=small", data=data, out=tmp_path / "c")
    assert tuned.status == 0, tuned.err
    config = checkpoint.load_run(tmp_path / "c")["model_config"]
    assert config["bias"] and config["activation"] == "gelu_tanh" and config["block_size"] == 48

    text = small_text().replace("z", "é")
    make_dataset(tmp_path / "data" / "other", char_tokenizer(text), text, text[:500])
    result = train(f"--init_from={tmp_path / 'a'}", "--dataset=other", data=tmp_path / "data", out=tmp_path / "d")
    refused(result, "another tokenizer")
    refused(train("--init_from=gpt3", "--dataset=small", data=data, out=tmp_path / "d"), "gpt2-xl", "folder")
