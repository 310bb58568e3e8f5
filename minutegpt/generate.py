"""The decoding step, compiled: one new position, whose few sums would otherwise wait for Python and for memory.

    seconds = compile_decode(model, batch_size=1)  # once, when the weights are final; then generate as ever

One row, 10.65M parameters, 2 cores with AVX2, a step with its drawing (bench.py): 5.8 ms as it is, 1.6 compiled, 1.3 in
bfloat16, 1.2 in int8. What it costs is the wait for the compiler, 4 to 18 s there.
"""

import time
import types

import torch
from torch.utils.hooks import RemovableHandle

from minutegpt.data.tokenizer import Tokenizer
from model import GPT, KVCache


def hide_padding(model: GPT, tokenizer: Tokenizer) -> RemovableHandle:
    """Cuts the model's logits to the ids of the tokenizer, so that only these can be drawn.

    A vocabulary that was padded to a round number has more ids, which represent no text. The cut ends with the `with`
    block of the returned handle, or with its remove(). The weights are not changed.
    """
    V = tokenizer.vocab_size
    return model.lm_head.register_forward_hook(lambda layer, inputs, logits: logits[..., :V])


def compile_decode(model: GPT, batch_size: int, dtype: torch.dtype | None = None) -> float:
    """Replaces model.decode by a compiled one that generates for batch_size rows; gives the seconds that it took.

    With a dtype, this step alone computes under autocast to it: in bfloat16 half the memory is read for a token, also
    on a CPU whose matrix products in bfloat16 are slow. On a CPU the weights are laid out anew for the step, a copy:
    later changes of the model are not seen. Another batch size, or autocast on instead of off, compiles again.
    """
    from torch._inductor import config as inductor  # seconds to import

    began = time.perf_counter()
    where = model.lm_head.weight.device
    # the one number that changes from step to step is an argument of the kernels; the rest they know beforehand
    torch.compiler.config.dynamic_sources = "L['cache'].length"
    inductor.freezing = where.type == "cpu"
    # one row: inductor's own products, which read laid-out weights. for more rows MKL's are the faster
    inductor.max_autotune = where.type == "cpu" and batch_size == 1
    four_bits = any(each.dtype == torch.uint8 for each in model.buffers())  # inductor has none for it on every CPU
    inductor.max_autotune_gemm_backends = "CPP,ATEN" if four_bits else "CPP"
    # a function of this model's own: what is compiled for one code object is taken for any model that it meets again,
    # now that the guards on modules are off
    own = types.FunctionType(GPT.decode.__code__.replace(), GPT.decode.__globals__)
    step = torch.compile(
        own,
        fullgraph=True,
        options={"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe},  # 0.1 ms a step
    )

    def decode(new: torch.Tensor, cache: KVCache) -> torch.Tensor:
        if dtype is None:
            return step(model, new, cache)
        with torch.autocast(where.type, dtype):
            return step(model, new, cache)

    model.decode = decode  # type: ignore[method-assign,assignment]
    if model.config.block_size > 2:  # below, there is nothing to decode
        model.generate(torch.zeros(batch_size, 2, dtype=torch.int64, device=where), 2, temperature=0)
    return time.perf_counter() - began
