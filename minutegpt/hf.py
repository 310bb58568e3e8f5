"""A model as Hugging Face's transformers loads it: config.json, model.safetensors, and the tokenizer's files.

    for name, content in hf_files(model, tokenizer).items():
        (folder / name).write_bytes(content)

The other way, from their formats to ours: minutegpt/pretrained.py.
"""

import json
from dataclasses import asdict, fields
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from minutegpt.start import UserError
from minutegpt.tokenizer import END, PATTERNS, Tokenizer
from model import GPT, GPTConfig

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "relu2": "relu2"}  # our name: theirs
# the knobs that both classes of transformers can follow (two of them say nothing without n_expert and ngram); of the
# others, each wants its own values
FREE = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "activation", "tie", "zero_init",
        "n_expert_active", "ngram_rows")  # fmt: skip
CLASSES = {
    "learned": ("GPT2LMHeadModel", {"bias"}, {}),
    "rope": ("NanoChatForCausalLM", {"softcap", "n_kv_head"}, {"pos": "rope", "norm": "rmsnorm", "qk_norm": True}),
}


def hf_files(model: GPT, tokenizer: Tokenizer | None) -> dict[str, bytes]:
    """File name -> content of the folder that transformers loads, config.json last: it makes the folder a model.

    The classic block becomes GPT2LMHeadModel, the fast one NanoChatForCausalLM. Raises UserError, with the knobs that
    do not fit, for a block that neither computes.
    """
    config = asdict(model.config)
    name, free, wanted = CLASSES[config["pos"]]
    fixed = {field.name: field.default for field in fields(GPTConfig) if field.name not in {*FREE, *free}} | wanted
    fixed |= {"n_kv_head": config["n_head"]} if "n_kv_head" in fixed else {}
    wrong = [f"{knob}={value!r}, not {config[knob]!r}" for knob, value in fixed.items() if config[knob] != value]
    if wrong:
        raise UserError(
            f"transformers has no class for this block: {name} comes nearest, with {'; '.join(wrong)}. "
            "Type --format=safetensors, which takes any model"
        )
    values, weights = (_to_gpt2 if name == "GPT2LMHeadModel" else _to_nanochat)(config, _weights(model))
    end = tokenizer.end_token if tokenizer else None
    values |= {
        "architectures": [name], "vocab_size": config["vocab_size"], "tie_word_embeddings": config["tie"],
        "bos_token_id": end, "eos_token_id": end, "pad_token_id": None, "dtype": "float32",
    }  # fmt: skip
    plain: dict[str, Any] = {}
    if tokenizer:
        special = {"bos_token": END, "eos_token": END} if end is not None else {}
        plain["tokenizer.json"] = tokenizer_json(tokenizer)
        plain["tokenizer_config.json"] = {
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config["block_size"],
            "clean_up_tokenization_spaces": False, **special,
        }  # fmt: skip
    plain["config.json"] = values
    weights = {key: w.contiguous() for key, w in weights.items()}
    files = {"model.safetensors": safetensors.torch.save(weights, {"format": "pt"})}
    return files | {file: json.dumps(value, ensure_ascii=False, indent=1).encode() for file, value in plain.items()}


def weights_file(model: GPT, tokenizer: dict[str, Any] | None) -> bytes:
    """One safetensors file: our names, a tied head left out; config and tokenizer as JSON in its metadata."""
    about = {"model_config": asdict(model.config), "tokenizer": tokenizer}
    return safetensors.torch.save(_weights(model), {"minutegpt": json.dumps(about)})  # two entries would take any order


def _weights(model: GPT) -> dict[str, Tensor]:
    tied = {"lm_head.weight"} if model.config.tie else set()
    return {name: w.float() for name, w in model.state_dict().items() if name not in tied}


def _to_gpt2(config: dict[str, Any], weights: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    values = {"model_type": "gpt2", "n_positions": config["block_size"], "n_ctx": config["block_size"]}  # for llama.cpp
    values |= {key: config[key] for key in ("n_layer", "n_head", "n_embd")}
    values |= {"activation_function": ACTIVATIONS[config["activation"]], "layer_norm_epsilon": 1e-5}
    values |= {"resid_pdrop": config["dropout"], "embd_pdrop": config["dropout"], "attn_pdrop": 0.0}
    theirs = {}
    for name, w in weights.items():
        inside = name.startswith(("transformer.h.", "transformer.ln_f."))
        theirs[name] = w.t() if inside and w.ndim == 2 else w  # their Conv1D is (in, out)
        if inside and name.endswith(".weight"):  # transformers always has biases
            theirs.setdefault(name.removesuffix("weight") + "bias", torch.zeros(len(w)))
    return values, theirs


def _to_nanochat(config: dict[str, Any], weights: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    values = {
        "model_type": "nanochat", "hidden_size": config["n_embd"], "intermediate_size": 4 * config["n_embd"],
        "num_hidden_layers": config["n_layer"], "num_attention_heads": config["n_head"],
        "num_key_value_heads": config["n_kv_head"], "max_position_embeddings": config["block_size"],
        "hidden_act": ACTIVATIONS[config["activation"]], "rms_norm_eps": 1e-6, "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "final_logit_softcapping": config["softcap"] or None,
    }  # fmt: skip
    names = {"attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    D = config["n_embd"] // config["n_head"]
    theirs = {}
    for name, w in weights.items():
        layer, _, part = name.removeprefix("transformer.h.").removesuffix(".weight").partition(".")
        if part == "attn.c_attn":
            heads = [D * config[knob] for knob in ("n_head", "n_kv_head", "n_kv_head")]
            for letter, rows in zip("qkv", w.split(heads), strict=True):
                theirs[f"model.layers.{layer}.self_attn.{letter}_proj.weight"] = rows
        elif part in names:
            theirs[f"model.layers.{layer}.{names[part]}.weight"] = w
        else:
            theirs[{"transformer.wte.weight": "model.embed_tokens.weight"}.get(name, name)] = w
    return values, theirs


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer.json of the tokenizers library: the same ids for the same text, whatever the kind.

    Two differences: it reads the text <|endoftext|> as that token, which ours never makes from plain text; and letters
    of newer versions of Unicode may be cut otherwise, as its regular expressions know another version.
    """
    if tokenizer.kind == "char":  # a character that it lacks is an error there too
        vocab = {character: i for i, character in enumerate(tokenizer.tokens)}
        model: dict[str, Any] = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
        cut: dict[str, Any] = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated"}
        cut["invert"] = False
        decoder: dict[str, Any] = {"type": "Fuse"}  # no spaces between
    else:
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # stand for themselves, and
        letters = {b: chr(b) for b in printable}  # the other bytes, in order, are U+0100 and on
        letters |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in letters)}
        text = {token: "".join(map(letters.__getitem__, token)) for token in tokenizer.tokens}  # type: ignore[call-overload]
        merges = [  # ours joins any two neighbours that make a token, the one of the lowest id first
            f"{text[token[:i]]} {text[token[i:]]}"  # type: ignore[index]
            for token in tokenizer.tokens for i in range(1, len(token)) if token[:i] in text and token[i:] in text
        ]  # fmt: skip
        model = {"type": "BPE", "vocab": {t: i for i, t in enumerate(text.values())}, "merges": merges}
        model |= {"ignore_merges": True}  # a word that is a token is taken whole
        decoder = cut = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        if tokenizer.kind == "gpt2":
            cut = cut | {"use_regex": True}  # whose expression is GPT-2's
        elif tokenizer.kind in PATTERNS:
            split = {"type": "Split", "pattern": {"Regex": PATTERNS[tokenizer.kind]}, "behavior": "Isolated"}
            cut = {"type": "Sequence", "pretokenizers": [split | {"invert": False}, cut]}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": tokenizer.end_token, "content": END, **plain}] if tokenizer.end_token is not None else []
    rest = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    return {"version": "1.0", **rest, "added_tokens": added, "pre_tokenizer": cut, "decoder": decoder, "model": model}
