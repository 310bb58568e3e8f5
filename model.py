"""The GPT model in one file: config, attention, MLP, block, GPT, generation.

Shapes: B batch, T time (positions), C channels (n_embd), H heads, D = C / H, V vocabulary.
The weights have the names that nanoGPT gave them, so its checkpoints load.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# -- config


@dataclass
class GPTConfig:
    """The settings of a model. The defaults are nanoGPT's block with 10.7M parameters."""

    block_size: int = 256  # maximum context length, in tokens
    vocab_size: int = 65
    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    dropout: float = 0.0  # on the embedding and the residual branches, not inside attention
    bias: bool = False  # biases in Linear and LayerNorm (GPT-2: True)
    pos: str = "learned"  # learned, rope (rotary positions, arXiv 2104.09864)
    norm: str = "layernorm"  # layernorm, rmsnorm (without weights, arXiv 1910.07467)
    norm_position: str = "pre"  # pre (GPT-2), post (the original transformer, arXiv 1706.03762)
    activation: str = "gelu"  # gelu, gelu_tanh (GPT-2), relu, relu2 (arXiv 2109.08668)
    qk_norm: bool = False  # RMSNorm on queries and keys (arXiv 2010.04245)
    tie: bool = True  # the output layer shares the token embedding's weights (arXiv 1608.05859)
    n_kv_head: int = 0  # key/value heads (grouped-query attention, arXiv 2305.13245); 0 = n_head
    ngram: int = 0  # add embeddings of the last 2 to ngram tokens (see NGrams); 0 = off
    ngram_rows: int = 32768  # maximum rows per n-gram table
    n_expert: int = 0  # experts per MLP (mixture of experts, see minutegpt/moe.py); 0 = dense
    n_expert_active: int = 2  # experts used per token

    def __post_init__(self) -> None:
        """Raises ValueError for a model that cannot be built."""
        self.n_kv_head = self.n_kv_head or self.n_head
        C, H, K = self.n_embd, self.n_head, self.n_kv_head
        choices = {"pos": ("learned", "rope"), "norm": ("layernorm", "rmsnorm"), "norm_position": ("pre", "post")}
        for name, allowed in (choices | {"activation": tuple(ACTIVATIONS)}).items():
            value = getattr(self, name)
            self.check(value in allowed, f"{name}={value!r} is not one of {', '.join(allowed)}")
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "n_kv_head", "ngram_rows"):
            value = getattr(self, name)
            most = 2**16 if name == "block_size" else 2**28
            self.check(1 <= value <= most, f"{name}={value} must be at least 1 and at most {most}")
        near = sorted((n for n in range(1, C + 1) if C % n == 0), key=lambda n: abs(n - H))
        advice = " or ".join(map(str, near[:2]))
        self.check(C % H == 0, f"n_embd={C} is not divisible by n_head={H}. Set n_head to {advice}")
        self.check(H % K == 0, f"n_head={H} is not divisible by n_kv_head={K}")
        self.check(self.pos != "rope" or C // H % 2 == 0, f"pos='rope': n_embd / n_head = {C // H} must be even")
        self.check(0 <= self.dropout < 1, f"dropout={self.dropout} must be at least 0 and below 1")
        self.check(self.ngram in (0, *range(2, 9)), f"ngram={self.ngram} must be 0 (off) or 2 to 8")
        if self.n_expert:
            from minutegpt.moe import expert_width

            expert_width(C, self.n_expert, self.n_expert_active)  # raises ValueError

    @staticmethod
    def check(ok: bool, problem: str) -> None:
        if not ok:
            raise ValueError(problem)

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


# -- attention


def attention_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention as a formula, softmax(Q K^T / sqrt(D)) V. q: (B, H, T, D), k, v: (B, H, S, D)."""
    T, S = q.size(2), k.size(2)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(3))  # (B, H, T, S)
    past = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)  # position t sees 0..t
    weights = scores.masked_fill(~past, float("-inf")).softmax(dim=-1)  # (B, H, T, S), each row sums to 1
    return weights @ v  # (B, H, T, D)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same with a fused kernel, which never stores the T x T matrix (FlashAttention, arXiv 2205.14135).

    q: (B, H, T, D); k, v: (B, H_kv, S, D). The queries are the last T of S positions; S > T if a KV cache is used.
    """
    T, S = q.size(2), k.size(2)
    mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T) if 1 < T < S else None
    is_causal = mask is None and T > 1  # a single query sees all positions
    gqa = q.size(1) != k.size(1)  # several query heads share one key/value head
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=gqa)


class CausalSelfAttention(nn.Module):
    """Each position reads from itself and from earlier positions. (B, T, C) -> (B, T, C)."""

    attend = staticmethod(causal_attention)  # minutegpt/generate.py replaces it in its compiled decoding step

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        width = (config.n_head + 2 * config.n_kv_head) * config.head_dim
        self.c_attn = nn.Linear(config.n_embd, width, bias=config.bias)  # q, k, v: one product is faster than three
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotation: Tensor | None, cache: "KVCache | None") -> Tensor:
        B, T, C = x.shape
        H, K, D = self.config.n_head, self.config.n_kv_head, self.config.head_dim
        q, k, v = self.c_attn(x).split((H * D, K * D, K * D), dim=2)  # (B, T, H*D), (B, T, K*D) twice
        q = q.view(B, T, H, D).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, K, D).transpose(1, 2)  # (B, K, T, D)
        v = v.view(B, T, K, D).transpose(1, 2)  # (B, K, T, D)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if self.config.qk_norm:
            q, k = F.rms_norm(q, (D,), eps=1e-6), F.rms_norm(k, (D,), eps=1e-6)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, K, S, D), all positions so far
        y = self.attend(q, k, v)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)  # concatenates the heads
        return self.dropout(self.c_proj(y))


def rotary(start: int, T: int, D: int, device: torch.device | None = None) -> Tensor:
    """cos and sin of the rotation angles of positions start .. start+T-1, (2, T, D/2)."""
    frequency = 10000 ** -(torch.arange(0, D, 2, dtype=torch.float32, device=device) / D)  # (D/2,)
    angle = torch.outer(torch.arange(start, start + T, dtype=torch.float32, device=device), frequency)  # (T, D/2)
    return torch.stack((angle.cos(), angle.sin()))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair (x[i], x[i + D/2]) by its position's angle, so that q·k depends on the distance only."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)  # (T, D/2) each
    a, b = x.chunk(2, dim=-1)  # (B, H, T, D/2) each
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)  # (B, H, T, D)


# -- MLP

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


class MLP(nn.Module):
    """Two linear layers with a hidden size of 4C, applied to each position independently. (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.c_fc(x))  # (B, T, 4C)
        return self.dropout(self.c_proj(x))  # (B, T, C)


# -- block


def make_norm(config: GPTConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=1e-6, elementwise_affine=False)
    return nn.LayerNorm(config.n_embd, bias=config.bias)


class Block(nn.Module):
    """Attention, then MLP (or experts), each added to the residual stream. (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = make_norm(config)
        if config.n_expert:
            from minutegpt.moe import MoE

            self.mlp: nn.Module = MoE(config, ACTIVATIONS[config.activation])
        else:
            self.mlp = MLP(config)
        self.post = config.norm_position == "post"

    def forward(self, x: Tensor, rotation: Tensor | None, cache: "KVCache | None") -> Tensor:
        if self.post:
            x = self.ln_1(x + self.attn(x, rotation, cache))
            return self.ln_2(x + self.mlp(x))
        x = x + self.attn(self.ln_1(x), rotation, cache)
        return x + self.mlp(self.ln_2(x))


# -- GPT


class NGrams(nn.Module):
    """The summed embeddings of the last 2, 3, .. ngram tokens, each sequence taken as one. (B, T) -> (B, T, C).

    Short sequences are looked up in a table instead of being modelled by attention. This costs almost no compute.
    A table with fewer rows than there are sequences is indexed by a hash (fastText, arXiv 1607.04606).
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.V = config.vocab_size
        self.rows = [min(self.V**n, config.ngram_rows) for n in range(2, config.ngram + 1)]
        self.tables = nn.ModuleList(nn.Embedding(rows, config.n_embd) for rows in self.rows)

    def forward(self, idx: Tensor) -> Tensor:
        prime = 2**31 - 1
        key, total = idx, torch.zeros((), device=idx.device)
        for n, (rows, table) in enumerate(zip(self.rows, self.tables, strict=True), start=2):
            key = (F.pad(key, (1, 0))[:, :-1] * self.V + idx) % prime  # (B, T), the previous key and one more token
            row = key if rows == self.V**n else key * 40503 % prime % rows  # (B, T)
            total = total + table(row)  # (B, T, C)
        return total


class GPT(nn.Module):
    """Token ids in, logits for the next token out.

    >>> model = GPT(GPTConfig(vocab_size=65))
    >>> logits, loss = model(idx, targets)  # idx, targets: (B, T) int64; logits: (B, T, V); loss: nats per token
    >>> longer = model.generate(idx, max_new_tokens=100)  # (B, T + 100)
    """

    transformer: Any  # a ModuleDict, whose parts are attributes
    rotation: Tensor  # rotary's table of all positions, (2, T, D/2)

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        parts: dict[str, nn.Module] = {"wte": nn.Embedding(config.vocab_size, config.n_embd)}
        if config.pos == "learned":
            parts["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        if config.ngram:
            parts["ngrams"] = NGrams(config)
        parts["h"] = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        if config.norm_position == "pre":
            parts["ln_f"] = make_norm(config)
        self.transformer = nn.ModuleDict(parts)
        self.dropout = nn.Dropout(config.dropout)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.register_buffer("rotation", rotary(0, config.block_size, config.head_dim), persistent=False)
        if config.tie:
            self.transformer.wte.weight = self.lm_head.weight
        self.init_weights()

    def init_weights(self) -> None:
        """Draws the initial weights. The order of the draws decides what a seed means.

        matrices        normal, std 0.02
        c_proj          normal, std 0.02 / sqrt(2 n_layer), as 2 n_layer of them are summed (GPT-2)
        n-gram tables   zeros
        biases, norms   biases 0, norm weights 1
        """
        for module in self.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim >= 2:
                nn.init.normal_(weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            if ".ngrams." in name:
                nn.init.zeros_(p)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """idx, targets (B, T) -> logits (B, T, V), mean cross-entropy (nats per token). Targets of -1 are ignored."""
        logits = self.unembed(self.hidden(idx))  # (B, T, V)
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss

    def hidden(self, idx: Tensor, cache: "KVCache | None" = None) -> Tensor:
        """idx (B, T) -> the residual stream after the last block and norm, (B, T, C). The cache grows by T."""
        config, start, T = self.config, cache.length if cache else 0, idx.size(1)
        x = self.dropout(self.embed(idx, cache))
        if start + T > self.rotation.size(1):  # a text longer than block_size
            self.rotation = rotary(0, start + T, config.head_dim, idx.device)
        rotation = self.rotation[:, start : start + T] if config.pos == "rope" else None
        for block in self.transformer.h:
            x = block(x, rotation, cache)
        if cache is not None:
            cache.length += T
        return self.transformer.ln_f(x) if config.norm_position == "pre" else x

    def embed(self, idx: Tensor, cache: "KVCache | None" = None) -> Tensor:
        """idx (B, T) -> what the first block reads, (B, T, C)."""
        config, start, T = self.config, cache.length if cache else 0, idx.size(1)
        if start + T > config.block_size and (config.pos == "learned" or cache):
            raise ValueError(f"{start + T} positions do not fit in block_size={config.block_size}")
        x = self.transformer.wte(idx)  # (B, T, C)
        if config.ngram:  # the tokens before the start count as token 0
            past = cache.past_tokens if cache and start else idx.new_zeros(idx.size(0), config.ngram - 1)
            known = torch.cat((past, idx), dim=1)  # (B, ngram - 1 + T)
            x = x + self.transformer.ngrams(known)[:, -T:]  # (B, T, C)
            if cache:
                cache.past_tokens = known[:, 1 - config.ngram :].clone()
        if config.pos == "learned":
            x = x + self.transformer.wpe.weight[start : start + T]  # (T, C), the same for each row
        return F.rms_norm(x, (config.n_embd,), eps=1e-6) if config.norm == "rmsnorm" else x

    def unembed(self, x: Tensor) -> Tensor:
        """x (..., C) -> logits (..., V), in float32 also under autocast."""
        return self.lm_head(x).float()

    def n_params(self, active: bool = False) -> int:
        """The number of parameters; a tied embedding counts once. active: only the experts that one token uses."""
        total = sum(p.numel() for p in self.parameters())
        if active and self.config.n_expert:
            total -= sum(block.mlp.n_idle_params() for block in self.transformer.h)
        return total

    def flops_per_token(self, T: int | None = None) -> float:
        """Training FLOPs per token: 6 per weight in a matrix product, 12 C T per layer for attention (PaLM's count,
        arXiv 2204.02311, appendix B, which includes masked positions)."""
        embeddings = {p for m in self.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        looked_up = sum(p.numel() for p in embeddings - set(self.lm_head.parameters()))
        attention = 12 * self.config.n_layer * self.config.n_embd * (T or self.config.block_size)
        return 6 * (self.n_params(active=True) - looked_up) + attention

    # -- generation

    def next_logits(self, idx: Tensor, cache: "KVCache") -> Tensor:
        """Reads idx (B, T) into the cache -> the next token's logits (B, V). generate.py compiles it for T = 1."""
        return self.unembed(self.hidden(idx, cache)[:, -1])

    @torch.no_grad()
    def stream(
        self, idx: Tensor, max_new_tokens: int, *, repetition_penalty: float = 1.0, **sampling: Any
    ) -> Iterator[Tensor]:
        """Yields the next tokens after idx (B, T), one (B,) at a time. sampling: the arguments of `sample`.

        A full cache is filled again with the last block_size / 2 tokens. Call model.eval() first.
        """
        context, device, dtype = self.config.block_size, idx.device, self.lm_head.weight.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        cache, new = KVCache(self.config, idx.size(0), device, dtype), idx[:, -context:]
        for _ in range(max_new_tokens):
            if cache.length + new.size(1) > context:  # learned positions cannot be shifted
                cache.length, new = 0, idx[:, -max(1, context // 2) :]
            logits = self.next_logits(new, cache)  # (B, V)
            if repetition_penalty != 1.0:  # earlier tokens become less likely (arXiv 1909.05858)
                seen = logits.gather(1, idx)
                seen = torch.where(seen > 0, seen / repetition_penalty, seen * repetition_penalty)
                logits = logits.scatter(1, idx, seen)
            new = sample(logits, **sampling)[:, None]  # (B, 1)
            idx = torch.cat((idx, new), dim=1)  # (B, T + 1)
            yield new[:, 0]

    def generate(self, idx: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        """idx (B, T) -> (B, T + max_new_tokens). options: temperature, top_k, top_p, repetition_penalty."""
        new = [token[:, None] for token in self.stream(idx, max_new_tokens, **options)]  # (B, 1) each
        return torch.cat((idx, *new), dim=1)


class KVCache:
    """The keys and values of all positions so far, so that one more token costs one row of attention."""

    def __init__(self, config: GPTConfig, batch_size: int, device: torch.device, dtype: torch.dtype) -> None:
        # one extra row: torch.compile would compile a second kernel for a slice that covers the whole buffer
        shape = (batch_size, config.n_kv_head, config.block_size + 1, config.head_dim)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.length = 0  # positions filled; the model adds to it after the last layer
        self.past_tokens = torch.zeros(0)  # the last ngram - 1 tokens (B, ngram - 1), for NGrams

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores T new positions (B, H_kv, T, D) of a layer. Returns all positions of that layer so far."""
        end = self.length + k.size(2)
        where = torch.arange(self.length, end, device=k.device)  # (T,)
        for buffer, new in ((self.k[layer], k), (self.v[layer], v)):
            buffer.index_copy_(2, where, new.to(buffer.dtype))  # a compiled slice would copy the whole buffer
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]

    def bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.k + self.v)


def sample(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Draws one token per row: logits (B, V) -> (B,).

    temperature: 0 takes the most likely token. top_k: keep the k most likely tokens; 0 keeps all.
    top_p: keep the fewest tokens whose probabilities sum to top_p (nucleus sampling, arXiv 1904.09751).
    """
    if temperature < 1e-6:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if 0 < top_k < logits.size(-1):
        kth = logits.topk(top_k).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1:
        ordered, order = logits.sort(descending=True)  # (B, V) each
        p = ordered.softmax(dim=-1)
        dropped = p.cumsum(dim=-1) - p >= top_p  # the tokens before it already reach top_p
        dropped[:, 0] = False  # always keep the most likely token
        logits = logits.masked_fill(dropped.scatter(1, order, dropped), float("-inf"))
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1)[:, 0]
