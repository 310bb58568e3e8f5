"""Each block on a CUDA device that is not there: a CPU tensor that meets its tensors raises."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from model import GPT, GPTConfig, KVCache

BASE = {"block_size": 64, "vocab_size": 65, "n_layer": 2, "n_head": 2, "n_embd": 64}
BLOCKS = {
    "classic": {"dropout": 0.2, "bias": True},
    "post": {"norm_position": "post"},
    "gqa": {"pos": "rope", "n_kv_head": 1},
    "fast": {
        "pos": "rope", "norm": "rmsnorm", "qk_norm": True, "activation": "relu2", "tie": False,
        "ngram": 6, "ngram_rows": 128,
    },
    "moe": {"n_expert": 32, "ngram": 3},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_stays_on_its_device(block, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **how: True)
    with FakeTensorMode(allow_non_fake_inputs=False), torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        with torch.device("cuda"):
            model = GPT(GPTConfig(**BASE | BLOCKS[block]))
        tokens = torch.zeros(4, 65, dtype=torch.int64, device="cuda")
        logits, loss = model(tokens[:, :-1], tokens[:, 1:])
        assert logits.dtype == loss.dtype == torch.float32 and logits.device.type == loss.device.type == "cuda"
        with torch.no_grad():
            model.eval()
            cache = KVCache(model.config, 4, tokens.device, dtype)
            for idx in (tokens[:, :10], tokens[:, :1]):  # a prompt, then one token
                logits = model.next_logits(idx, cache)
                assert logits.device.type == "cuda" and logits.shape == (4, 65)
