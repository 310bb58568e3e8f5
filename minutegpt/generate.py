"""Compiled decoding: for one token at a time, Python and memory traffic cost more than the arithmetic.

torch.compile removes most of both, after a wait for the compiler. bench.py measures both.

    seconds = compile_decode(model, batch_size=1)  # once, when the weights are final; then model.generate as usual
"""

import copy
import math
import time
import types

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from minutegpt.data.tokenizer import Tokenizer
from model import GPT, CausalSelfAttention, KVCache


def decode_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """causal_attention of a single query, for compiled decoding only. q: (B, H, 1, D); k, v: (B, H_kv, S, D).

    Elementwise products and sums, which torch.compile fuses into one pass over k and one over v. For a single query
    this is faster than the attention kernel; without compiling it is slower. Computes in float32.
    """
    q = q.unflatten(1, (k.size(1), -1)).float() / math.sqrt(q.size(-1))  # (B, H_kv, H / H_kv, 1, D)
    weights = (q * k.unsqueeze(2).float()).sum(-1).softmax(-1)  # (B, H_kv, H / H_kv, S)
    y = (weights.unsqueeze(-1) * v.unsqueeze(2).float()).sum(-2, keepdim=True)  # (B, H_kv, H / H_kv, 1, D)
    return y.flatten(1, 2).to(v.dtype)  # (B, H, 1, D)


def is_plain(layer: CausalSelfAttention) -> bool:
    """Whether the layer's attention is what decode_attention computes: an edit of model.py may have another one."""
    c, device = layer.config, layer.c_attn.weight.device
    random = torch.Generator().manual_seed(1)
    shapes = ((1, c.n_head, 1), (1, c.n_kv_head, c.block_size), (1, c.n_kv_head, c.block_size))
    q, k, v = (torch.randn(*shape, c.head_dim, generator=random).to(device) for shape in shapes)
    expected = layer.attend(q, k, v)
    return bool((decode_attention(q, k, v) - expected).norm() <= 0.01 * expected.norm())


def hide_padding(model: GPT, tokenizer: Tokenizer) -> RemovableHandle:
    """Cuts the model's logits to the ids of the tokenizer, so that only these can be drawn.

    A vocabulary that was padded to a round number has more ids, which represent no text. The cut ends with the `with`
    block of the returned handle, or with its remove(). The weights are not changed.
    """
    V = tokenizer.vocab_size
    return model.lm_head.register_forward_hook(lambda layer, inputs, logits: logits[..., :V])


def compile_decode(model: GPT, batch_size: int, dtype: torch.dtype | None = None) -> float:
    """Compiles the decoding step of `model.next_logits` for batch_size rows. Returns the seconds that it took.

    The step is one new token after others; anything else runs as before. `del model.next_logits` undoes it.
    dtype: the step alone runs under autocast to it. In bfloat16 it reads half the memory per token, which pays even on
    a CPU with slow bfloat16 products. On a CPU the step has a copy of the weights, so later changes are not seen.
    Another batch size, or autocast on instead of off, compiles again.
    """
    from torch._inductor import config as inductor  # takes seconds to import

    began = time.perf_counter()
    device = model.lm_head.weight.device
    # the length of the cache changes with every step: an argument of the kernels. All other sizes are constants
    torch.compiler.config.dynamic_sources = "L['cache'].length"
    inductor.freezing = device.type == "cpu"
    # inductor's own matrix products are faster for one row, MKL's for more rows
    inductor.max_autotune = device.type == "cpu" and batch_size == 1
    int4 = any(buffer.dtype == torch.uint8 for buffer in model.buffers())  # inductor lacks it on some CPUs
    inductor.max_autotune_gemm_backends = "CPP,ATEN" if int4 else "CPP"

    # the compiler sees its own modules, with another attention, and the same weights
    prompt = torch.zeros(batch_size, 2, dtype=torch.int64, device=device)
    model.generate(prompt, 1, temperature=0)  # quantized layers choose their kernels at the first call
    decoder = copy.deepcopy(model, {id(w): w for w in (*model.parameters(), *model.buffers())})
    for module in decoder.modules():
        if isinstance(module, CausalSelfAttention) and is_plain(module):
            module.attend = decode_attention  # type: ignore[method-assign]
    # a separate code object per model: without guards on modules, torch.compile takes the code that it compiled for
    # one model for any other model that runs the same code object
    next_logits = types.FunctionType(GPT.next_logits.__code__.replace(), GPT.next_logits.__globals__)
    step = torch.compile(
        next_logits,
        fullgraph=True,
        options={"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe},  # checks cost time per step
    )

    def compiled(idx: Tensor, cache: KVCache) -> Tensor:
        if idx.size(1) > 1 or not cache.length:
            return GPT.next_logits(model, idx, cache)
        if dtype is None:
            return step(decoder, idx, cache)
        with torch.autocast(device.type, dtype):
            return step(decoder, idx, cache)

    model.next_logits = compiled  # type: ignore[method-assign]
    if model.config.block_size > 2:  # a smaller context has no decoding steps
        model.generate(prompt, 2, temperature=0)
    return time.perf_counter() - began
