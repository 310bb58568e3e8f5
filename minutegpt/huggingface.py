"""Hugging Face's formats: our models as transformers loads them, and GPT-2's published weights as ours.

for name, content in hf_files(model, tokenizer).items():  # config.json, model.safetensors, the tokenizer's files
    (folder / name).write_bytes(content)
state = load_any("gpt2")  # like a checkpoint's; also of GPT-2's folder, or of a run's
"""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minutegpt import checkpoint
from minutegpt.data.download import caches, own_cache
from minutegpt.data.tokenizer import END, PATTERNS, Tokenizer, gpt2_tokenizer
from minutegpt.errors import UserError
from model import GPT, GPTConfig

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "relu2": "relu2"}  # our name: theirs
# settings that both classes of transformers can follow (two of them have no effect without n_expert and ngram)
FREE = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "activation", "tie",
        "n_expert_active", "ngram_rows")  # fmt: skip
CLASSES = {  # by position encoding: the class, further free settings, and fixed values that are not our defaults
    "learned": ("GPT2LMHeadModel", {"bias"}, {}),
    "rope": ("NanoChatForCausalLM", {"n_kv_head"}, {"pos": "rope", "norm": "rmsnorm", "qk_norm": True}),
}


def hf_files(model: GPT, tokenizer: Tokenizer | None) -> dict[str, bytes]:
    """File name -> content of the folder that transformers loads. config.json is last: with it the folder is a model.

    The classic block becomes GPT2LMHeadModel, the fast one NanoChatForCausalLM. Raises UserError, with the settings
    that do not fit, for a block that neither class computes.
    """
    config = asdict(model.config)
    name, free, wanted = CLASSES[config["pos"]]
    fixed = {field.name: field.default for field in fields(GPTConfig) if field.name not in {*FREE, *free}} | wanted
    fixed |= {"n_kv_head": config["n_head"]} if "n_kv_head" in fixed else {}
    wrong = [f"{key}={value!r}, not {config[key]!r}" for key, value in fixed.items() if config[key] != value]
    if wrong:
        raise UserError(
            f"transformers has no class for this block. The nearest is {name}, with {'; '.join(wrong)}. "
            "Type --format=safetensors, which works for any model"
        )
    values, weights = (_to_gpt2 if name == "GPT2LMHeadModel" else _to_nanochat)(config, _weights(model))
    end = tokenizer.end_token if tokenizer else None
    values |= {
        "architectures": [name], "vocab_size": config["vocab_size"], "tie_word_embeddings": config["tie"],
        "bos_token_id": end, "eos_token_id": end, "pad_token_id": None, "dtype": "float32",
    }  # fmt: skip
    documents: dict[str, Any] = {}
    if tokenizer:
        special = {"bos_token": END, "eos_token": END} if end is not None else {}
        documents["tokenizer.json"] = tokenizer_json(tokenizer)
        documents["tokenizer_config.json"] = {
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config["block_size"],
            "clean_up_tokenization_spaces": False, **special,
        }  # fmt: skip
    documents["config.json"] = values
    weights = {key: w.contiguous() for key, w in weights.items()}
    files = {"model.safetensors": safetensors.torch.save(weights, {"format": "pt"})}
    return files | {file: json.dumps(value, ensure_ascii=False, indent=1).encode() for file, value in documents.items()}


def weights_file(model: GPT, tokenizer: dict[str, Any] | None) -> bytes:
    """One safetensors file with our names, without a tied head. Config and tokenizer are JSON in its metadata."""
    about = {"model_config": asdict(model.config), "tokenizer": tokenizer}  # one entry: the order of two is random
    return safetensors.torch.save(_weights(model), {"minutegpt": json.dumps(about)})


def _weights(model: GPT) -> dict[str, Tensor]:
    tied = {"lm_head.weight"} if model.config.tie else set()
    return {name: w.float() for name, w in model.state_dict().items() if name not in tied}


def _to_gpt2(config: dict[str, Any], weights: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    values = {"model_type": "gpt2", "n_positions": config["block_size"], "n_ctx": config["block_size"]}  # for llama.cpp
    values |= {key: config[key] for key in ("n_layer", "n_head", "n_embd")}
    values |= {"activation_function": ACTIVATIONS[config["activation"]], "layer_norm_epsilon": 1e-5}
    values |= {"resid_pdrop": config["dropout"], "embd_pdrop": config["dropout"], "attn_pdrop": 0.0}
    hf_weights = {}
    for name, w in weights.items():
        inside = name.startswith(("transformer.h.", "transformer.ln_f."))
        hf_weights[name] = w.t() if inside and w.ndim == 2 else w  # transformers' Conv1D is (in, out)
        if inside and name.endswith(".weight"):  # transformers always has biases
            hf_weights.setdefault(name.removesuffix("weight") + "bias", torch.zeros(len(w)))
    return values, hf_weights


def _to_nanochat(config: dict[str, Any], weights: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    values = {
        "model_type": "nanochat", "hidden_size": config["n_embd"], "intermediate_size": 4 * config["n_embd"],
        "num_hidden_layers": config["n_layer"], "num_attention_heads": config["n_head"],
        "num_key_value_heads": config["n_kv_head"], "max_position_embeddings": config["block_size"],
        "hidden_act": ACTIVATIONS[config["activation"]], "rms_norm_eps": 1e-6, "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "final_logit_softcapping": None,  # their default is 15
    }  # fmt: skip
    names = {"attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    D = config["n_embd"] // config["n_head"]
    hf_weights = {}
    for name, w in weights.items():
        layer, _, part = name.removeprefix("transformer.h.").removesuffix(".weight").partition(".")
        if part == "attn.c_attn":
            heads = [D * config[key] for key in ("n_head", "n_kv_head", "n_kv_head")]
            for letter, rows in zip("qkv", w.split(heads), strict=True):
                hf_weights[f"model.layers.{layer}.self_attn.{letter}_proj.weight"] = rows
        elif part in names:
            hf_weights[f"model.layers.{layer}.{names[part]}.weight"] = w
        else:
            hf_weights[{"transformer.wte.weight": "model.embed_tokens.weight"}.get(name, name)] = w
    return values, hf_weights


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer.json of the tokenizers library, for any kind: the same ids for the same text, with two exceptions.

    It reads the letters <|endoftext|> as END, which ours never does. And it may split letters of newer versions of
    Unicode differently, because its regular expressions know another version.
    """
    if tokenizer.kind == "char":  # an unknown character is an error there too
        vocab = {character: i for i, character in enumerate(tokenizer.tokens)}
        model: dict[str, Any] = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
        cut: dict[str, Any] = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated"}
        cut["invert"] = False
        decoder: dict[str, Any] = {"type": "Fuse"}  # without spaces between tokens
    else:
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # are their own letters, and
        letters = {b: chr(b) for b in printable}  # the other bytes, in order, are U+0100 and on
        letters |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in letters)}
        text = {token: "".join(map(letters.__getitem__, token)) for token in tokenizer.tokens}  # type: ignore[call-overload]
        merges = [  # any two neighbours that make a token are joined, the token with the lowest id first
            f"{text[token[:i]]} {text[token[i:]]}"  # type: ignore[index]
            for token in tokenizer.tokens for i in range(1, len(token)) if token[:i] in text and token[i:] in text
        ]  # fmt: skip
        model = {"type": "BPE", "vocab": {t: i for i, t in enumerate(text.values())}, "merges": merges}
        model |= {"ignore_merges": True}  # a word that is a token is one token
        decoder = cut = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        if tokenizer.kind == "gpt2":
            cut = cut | {"use_regex": True}  # with GPT-2's expression
        elif tokenizer.kind in PATTERNS:
            split = {"type": "Split", "pattern": {"Regex": PATTERNS[tokenizer.kind]}, "behavior": "Isolated"}
            cut = {"type": "Sequence", "pretokenizers": [split | {"invert": False}, cut]}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": tokenizer.end_token, "content": END, **plain}] if tokenizer.end_token is not None else []
    rest = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    return {"version": "1.0", **rest, "added_tokens": added, "pre_tokenizer": cut, "decoder": decoder, "model": model}


# ---------------------------------------------------------------------------------------------- GPT-2 in

SIZES = {"gpt2": 0.5, "gpt2-medium": 1.5, "gpt2-large": 3.2, "gpt2-xl": 6.4}  # GB to download
FILES = ("config.json", "vocab.json", "merges.txt", "model.safetensors")
FIXED = {  # fields of config.json that have no setting in our model
    "layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}  # fmt: skip
DEFAULTS = {  # GPT-2's values, which transformers may leave out
    "model_type": "gpt2", **FIXED, "n_inner": None, "n_positions": 1024, "vocab_size": 50257, "n_layer": 12,
    "n_head": 12, "n_embd": 768, "activation_function": "gelu_new", "tie_word_embeddings": True,
}  # fmt: skip


def load_any(source: str, ckpt: str = "best") -> dict[str, Any]:
    """A state like a checkpoint's: of GPT-2 by name (downloaded if needed), of GPT-2's folder, or of a run's folder."""
    folder = Path(source)
    if source in SIZES and not folder.is_dir():
        folder = _find_gpt2(source)
    if checkpoint.is_transformers_folder(folder) and not checkpoint.has_checkpoint(folder):
        return load_gpt2(folder)
    return checkpoint.load_run(source, ckpt)


def load_gpt2(folder: Path) -> dict[str, Any]:
    """The state of a GPT-2 that transformers saved, without an optimizer, with the tokenizer if the folder has it.

    folder: has config.json and model.safetensors, perhaps vocab.json and merges.txt. Raises UserError for any other
    model. Sizes are trusted only after `checkpoint.build_model` has compared config and weights.
    """
    path = folder / "model.safetensors"
    if not path.is_file():
        raise UserError(
            f"{folder} has a config.json, but no model.safetensors with all weights. transformers writes it: "
            "GPT2LMHeadModel.from_pretrained(FOLDER).save_pretrained(OTHER, max_shard_size='100GB')"
        )
    try:
        with open(folder / "config.json", "rb") as file:
            hf_config = DEFAULTS | json.loads(file.read(1_000_000))
        fixed = {"model_type": "gpt2", **FIXED, "n_inner": hf_config["n_inner"] and 4 * hf_config["n_embd"]}
        if unsupported := [f"{key}={hf_config[key]!r:.40}" for key, value in fixed.items() if hf_config[key] != value]:
            raise ValueError(f"{', '.join(unsupported)} is not GPT-2's")
        activation = {hf_name: name for name, hf_name in ACTIVATIONS.items()}[hf_config["activation_function"]]
        config = {key: hf_config[key] for key in ("vocab_size", "n_layer", "n_head", "n_embd")}
        config |= {"block_size": hf_config["n_positions"], "tie": hf_config["tie_word_embeddings"]}
        config |= {"activation": activation, "bias": True}
        weights = _read_gpt2(path)
        if config["tie"] is True:
            weights["lm_head.weight"] = weights["transformer.wte.weight"]
    except (OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        why = str(error) or type(error).__name__
        raise UserError(f"{folder} is not a GPT-2 that can be read: {why:.200}") from error
    state = {"model": weights, "model_config": config, "step": 0, "config": {}, "optimizer": None, "tokenizer": None}
    if config["vocab_size"] == 50257 and all((folder / name).is_file() for name in FILES):
        state["tokenizer"] = gpt2_tokenizer(folder).to_json()
    return state


def _read_gpt2(path: Path) -> dict[str, Tensor]:
    """The tensors with our names and shapes. The library checks every size in the header against the file."""
    weights = {}
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  it is not a dict
            kind = file.get_slice(name).get_dtype()
            if name.endswith((".attn.bias", ".attn.masked_bias")):  # causal masks
                continue
            if kind not in ("F64", "F32", "F16", "BF16"):
                raise ValueError(f"{name:.80} has dtype {kind}, which is not a float")
            w, our_name = file.get_tensor(name), f"transformer.{name.removeprefix('transformer.')}"
            if name == "lm_head.weight":
                our_name = name
            elif ".h." in our_name and w.ndim == 2:  # transformers' Conv1D is (in, out)
                w = w.t()
            weights[our_name] = torch.empty(w.shape).copy_(w)  # float32, and a copy: Windows locks a mapped file
    return weights


def _find_gpt2(name: str) -> Path:
    """The folder of a published GPT-2: where texts are looked for, in the hub's cache, or downloaded from the hub."""
    for cache in caches():
        if all((cache / name / file).is_file() for file in ("config.json", "model.safetensors")):
            return cache / name
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    repo = f"openai-community/{name}"
    if SIZES[name] > 1 and not isinstance(try_to_load_from_cache(repo, "model.safetensors"), str):
        raise UserError(
            f"{name} is not on this machine, and the download has {SIZES[name]} GB. To download it, type: "
            f"hf download {repo} {' '.join(FILES)}"
        )
    try:
        return Path([hf_hub_download(repo, file) for file in FILES][-1]).parent
    except Exception as error:  # the hub's client raises many kinds
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{name} is not on this machine and cannot be downloaded ({why:.200}). Three ways out: put its "
            f"{', '.join(FILES)} into {own_cache() / name}; name a folder that has them instead of {name}; or start "
            "from a run's folder, or from scratch"
        ) from None
