"""The GPT, whole, in one file: from token ids to logits, loss and new tokens.

Letters in the shapes: B batch, T time (positions), C channels (n_embd), H heads, D = C / H, V vocabulary.

Sources: GPT-2 (Radford et al. 2019) and its published code; nanoGPT, whose names the weights bear, so that its
checkpoints load; "Attention Is All You Need" (arXiv 1706.03762). Each knob below names its own paper.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class GPTConfig:
    """What a GPT is made of. The defaults are the classic block: GPT-2's, 10.7M parameters at 65 characters.

    Raises ValueError, in words, for a combination that cannot be built.
    """

    block_size: int = 256  # T at most: the context
    vocab_size: int = 65
    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    dropout: float = 0.0  # on the embedding and the two residual paths; not inside attention (see README)
    bias: bool = False  # in linears and layernorms, as GPT-2 has it
    pos: str = "learned"  # "learned", or "rope": rotary (arXiv 2104.09864)
    norm: str = "layernorm"  # "layernorm", or "rmsnorm": no weights, on the embedding too (arXiv 1910.07467)
    norm_position: str = "pre"  # "pre" (GPT-2), or "post": the original transformer, no final norm
    activation: str = "gelu"  # "gelu" exact, "gelu_tanh" (GPT-2's), "relu", "relu2" (arXiv 2109.08668)
    qk_norm: bool = False  # rmsnorm on queries and keys (arXiv 2010.04245)
    tie: bool = True  # the output head is the token embedding (arXiv 1608.05859)
    softcap: float = 0.0  # logits are squeezed into +-softcap by tanh; 0 is off (Gemma 2, arXiv 2408.00118)
    n_kv_head: int = 0  # grouped-query attention: fewer key and value heads; 0 is n_head (arXiv 2305.13245)
    zero_init: bool = False  # output projections start at zero, so each block starts as the identity
    ngram: int = 0  # embeddings of the last 2 .. ngram tokens beside each token's own (see NGrams); 0 is off
    ngram_rows: int = 32768  # rows of each of their tables
    n_expert: int = 0  # experts in the place of each MLP (see MoE); 0 is one MLP for all
    n_expert_active: int = 2  # of which each position visits so many, 2 at least

    def __post_init__(self) -> None:
        self.n_kv_head = self.n_kv_head or self.n_head
        choices = {
            "pos": ("learned", "rope"),
            "norm": ("layernorm", "rmsnorm"),
            "norm_position": ("pre", "post"),
            "activation": tuple(ACTIVATIONS),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}")
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "n_kv_head"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.n_embd % self.n_head:
            near = [n for n in range(1, self.n_embd + 1) if self.n_embd % n == 0]
            near = sorted(near, key=lambda n: abs(n - self.n_head))[:3]
            raise ValueError(
                f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: the heads share the channels "
                f"evenly; n_head={' or '.join(map(str, near))} would do"
            )
        if self.n_head % self.n_kv_head:
            raise ValueError(
                f"n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}: each key-value head serves "
                "the same number of query heads"
            )
        if self.pos == "rope" and (self.n_embd // self.n_head) % 2:
            raise ValueError(
                f"pos='rope' turns channels in pairs: n_embd / n_head = {self.n_embd // self.n_head} must be even"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")
        if self.ngram != 0 and not 2 <= self.ngram <= 8:
            raise ValueError(f"ngram={self.ngram} must be 0 (off) or 2 to 8 tokens")
        if not 1 <= self.ngram_rows <= 2**28:
            raise ValueError(f"ngram_rows={self.ngram_rows} must be at least 1 and at most 2**28")
        if self.n_expert < 0:
            raise ValueError(f"n_expert={self.n_expert} must be at least 0")
        if self.n_expert and not 2 <= self.n_expert_active <= self.n_expert:
            raise ValueError(
                f"n_expert_active={self.n_expert_active} of n_expert={self.n_expert}: each position visits at least 2, "
                "whose shares the router learns, and at most all"
            )
        if self.n_expert and (self.n_embd % 8 or self.expert_width() < 8):
            raise ValueError(
                f"n_expert={self.n_expert} with n_embd={self.n_embd}: experts need an n_embd that 8 divides, and "
                f"n_expert + {16 * self.n_expert_active} of at most 8 * n_embd, or no channels are left to them"
            )

    def expert_width(self) -> int:
        """Hidden channels of an expert: n_expert_active of them and the router weigh what the dense MLP's 4C do.

        8 C C = n_expert_active * 2 C width + n_expert C, and width a multiple of 8, which the grouped product asks
        for: exact where 16 * n_expert_active divides n_expert (and 8 C), a little less elsewhere.
        """
        return (8 * self.n_embd - self.n_expert) // (16 * self.n_expert_active) * 8


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def attention_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention as every course teaches it: softmax(Q K^T / sqrt(D)) V under a lower-triangular mask.

    q, k, v: (B, H, T, D) -> (B, H, T, D). For reading, and for the test that holds the fast kernel to it: this one
    writes out the (T, T) matrix that `scaled_dot_product_attention` never does (FlashAttention, arXiv 2205.14135).
    """
    T, D = q.shape[-2:]
    scores = q @ k.transpose(-2, -1) / math.sqrt(D)  # (B, H, T, T)
    past = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()  # position t sees 0..t
    weights = scores.masked_fill(~past, float("-inf")).softmax(dim=-1)  # (B, H, T, T), each row sums to 1
    return weights @ v  # (B, H, T, D)


def attention_of_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same for one new position, which sees all: q (B, H, 1, D), k and v (B, H_kv, T, D) -> (B, H, 1, D).

    As sums of products, which torch.compile fuses into one pass over k and one over v, in float32 whatever they are
    stored in: for one row that is quicker than the kernels made for many. Uncompiled it would be slow.
    """
    q = q.unflatten(1, (k.size(1), -1)).float() / math.sqrt(q.size(-1))  # (B, H_kv, H / H_kv, 1, D)
    weights = (q * k.unsqueeze(2).float()).sum(-1).softmax(-1)  # (B, H_kv, H / H_kv, T)
    y = (weights.unsqueeze(-1) * v.unsqueeze(2).float()).sum(-2, keepdim=True)  # (B, H_kv, H / H_kv, 1, D)
    return y.flatten(1, 2).to(v.dtype)


def rotary(start: int, T: int, D: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles by which positions start .. start+T-1 turn each channel pair, (T, D/2) each."""
    frequency = 10000 ** -(torch.arange(0, D, 2, dtype=torch.float32, device=device) / D)  # (D/2,)
    angle = torch.outer(torch.arange(start, start + T, dtype=torch.float32, device=device), frequency)  # (T, D/2)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pair (x[i], x[i + D/2]) by its position's angle, so that q·k depends on the distance alone.

    x: (B, H, T, D); cos, sin: (T, D/2).
    """
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b = x.chunk(2, dim=-1)  # (B, H, T, D/2) each
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)  # (B, H, T, D)


class KVCache:
    """Keys and values of the positions seen so far, in buffers made once: two a layer, (B, H_kv, block_size + 1, D).

    A new position costs one row of attention instead of a whole forward pass over the past.
    """

    def __init__(self, config: GPTConfig, batch_size: int, device: torch.device, dtype: torch.dtype) -> None:
        # one row stays free: all of a buffer would be a case of its own to torch.compile, and built anew
        shape = (batch_size, config.n_kv_head, config.block_size + 1, config.n_embd // config.n_head)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.length = 0  # positions filled; the model moves it on after its last layer
        self.past = torch.zeros(0)  # the last tokens (B, ngram - 1), where the model has n-grams

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes T new positions (B, H_kv, T, D) of one layer; gives all of that layer's so far."""
        end = self.length + k.size(2)
        where = torch.arange(self.length, end, device=k.device)  # (T,)
        both = [
            # index_copy_ and not a slice: compiled, a slice would copy the whole buffer
            old.index_copy_(2, where, new.to(old.dtype))[:, :, :end]
            for old, new in ((self.k[layer], k), (self.v[layer], v))
        ]
        return both[0], both[1]

    def bytes(self) -> int:
        return sum(each.numel() * each.element_size() for each in self.k + self.v)


class Dropout(nn.Dropout):
    """Zeros a share p of the elements and lifts the rest to the same mean (Srivastava et al., JMLR 2014).

    On a CPU one random number of 64 bits decides over four elements, p to the nearest 1/65536: drawing one for each,
    as PyTorch does, took a tenth of the classic recipe's step.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not (self.training and self.p):
            return super().forward(x)
        dropped = min(round(self.p * 2**16), 2**16 - 1)  # of the values that 16 bits have
        bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        keep = (bits.view(torch.int16)[: x.numel()] >= dropped - 2**15).view(x.shape)
        return torch.where(keep, x * (2**16 / (2**16 - dropped)), 0.0)


def make_norm(config: GPTConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=1e-6, elementwise_affine=False)
    return nn.LayerNorm(config.n_embd, bias=config.bias)


class NGrams(nn.Module):
    """Embeddings of the last 2, 3, .. `ngram` tokens taken as one, summed: (B, T) -> (B, T, C).

    What follows two or three known characters need not be worked out by attention: it is looked up, at next to no
    work a token. A table too small for all V^n sequences is shared by hashing (fastText, arXiv 1607.04606). The
    tables start at zero.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.V = config.vocab_size
        self.all = [self.V**n for n in range(2, config.ngram + 1)]  # sequences that there are of each length
        self.rows = [min(every, config.ngram_rows) for every in self.all]
        self.tables = nn.ModuleList(nn.Embedding(rows, config.n_embd) for rows in self.rows)

    def forward(self, idx: Tensor) -> Tensor:
        prime = 2**31 - 1
        key, total = idx, torch.zeros((), device=idx.device)
        for every, rows, table in zip(self.all, self.rows, self.tables, strict=True):
            # one token more: the key of the place before, and this token
            key = (F.pad(key, (1, 0))[:, :-1] * self.V + idx) % prime  # (B, T)
            total = total + table(key if rows == every else key * 40503 % prime % rows)  # (B, T, C)
        return total


class CausalSelfAttention(nn.Module):
    """Each position gathers from itself and the ones before it. (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.n_head, self.n_kv_head = layer, config.n_head, config.n_kv_head
        self.D = config.n_embd // config.n_head
        self.qk_norm = config.qk_norm
        # queries, keys and values in one matrix: one large product is faster than three
        width = (config.n_head + 2 * config.n_kv_head) * self.D
        self.c_attn = nn.Linear(config.n_embd, width, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None = None, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        H, K, D = self.n_head, self.n_kv_head, self.D
        q, k, v = self.c_attn(x).split((H * D, K * D, K * D), dim=2)  # (B, T, H*D), (B, T, K*D) twice
        q = q.view(B, T, H, D).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, K, D).transpose(1, 2)  # (B, K, T, D)
        v = v.view(B, T, K, D).transpose(1, 2)  # (B, K, T, D)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if self.qk_norm:
            q, k = F.rms_norm(q, (D,), eps=1e-6), F.rms_norm(k, (D,), eps=1e-6)
        mask = None
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, K, past + T, D)
            if 1 < T < k.size(2):  # several new positions after old ones: the triangle starts further right
                mask = torch.ones(T, k.size(2), dtype=torch.bool, device=x.device).tril(k.size(2) - T)
        if T == 1 and torch.compiler.is_compiling():
            y = attention_of_one(q, k, v)  # (B, H, 1, D)
        else:  # the fused kernel; attention_by_hand says what it computes. one new position may see all: no mask
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None and T > 1, enable_gqa=H != K
            )  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return self.dropout(self.c_proj(y))


class MLP(nn.Module):
    """Each position thinks for itself, in four times the channels. (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.c_fc(x))  # (B, T, 4C)
        return self.dropout(self.c_proj(x))  # (B, T, C)


class Experts(nn.Module):
    """A linear map for each of E experts, in one stack of weights. (N, n_in) -> (N, n_out), rows sorted by expert."""

    def __init__(self, n_expert: int, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_expert, n_out, n_in))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """ends (E,) int32: where each expert's rows end. An expert without rows gets a gradient of zeros."""
        return F.grouped_mm(x, self.weight.to(x.dtype).mT, offs=ends)


class MoE(nn.Module):
    """A mixture of experts: many small MLPs, of which each position visits the k that its router likes best.

    (B, T, C) -> (B, T, C). The model knows more at the same work a token (arXiv 1701.06538). Lest few experts get all
    the visits, `balance` is added to the scores that choose, not to those that weigh; after each step it rises for
    experts that had too few visits and falls for the others (arXiv 2408.15664, 2412.19437;
    minutegpt/moe.py). No visit is ever dropped. Experts have no biases.
    """

    balance: Tensor
    load: Tensor
    entropy: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C, E, self.k = config.n_embd, config.n_expert, config.n_expert_active
        self.router = nn.Linear(C, E, bias=False)
        self.c_fc = Experts(E, C, config.expert_width())
        self.c_proj = Experts(E, config.expert_width(), C)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = Dropout(config.dropout)
        self.register_buffer("balance", torch.zeros(E))
        # what training counts up in a step: visits of each expert, and the entropy of the router's choice, in nats
        self.register_buffer("load", torch.zeros(E, dtype=torch.int64), persistent=False)
        self.register_buffer("entropy", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)  # (N, C) with N = B * T
        logits = self.router(rows)  # (N, E)
        scores = logits.float().sigmoid()
        chosen = (scores + self.balance).topk(self.k).indices  # (N, k)
        gate = scores.gather(1, chosen)  # (N, k)
        gate = gate / gate.sum(1, keepdim=True)  # shares: no router can hush all of its experts at once
        # the visits, sorted by expert: then each has its rows side by side
        expert, order = chosen.flatten().sort(stable=True)  # (N * k,) each
        ends = torch.searchsorted(expert, torch.arange(len(self.balance), device=x.device), right=True, out_int32=True)
        if self.training:
            p = scores.detach() / scores.detach().sum(1, keepdim=True)  # (N, E)
            self.entropy += torch.special.entr(p).sum()
            self.load += ends.diff(prepend=ends.new_zeros(1))
        rows = rows.to(logits.dtype).index_select(0, order // self.k)  # (N * k, C), in autocast's dtype
        rows = self.activation(self.c_fc(rows, ends))  # (N * k, width)
        rows = self.c_proj(rows, ends).index_select(0, order.argsort())  # (N * k, C), in the old order again
        y = (gate[..., None] * rows.unflatten(0, gate.shape)).sum(1)  # (N, C)
        return self.dropout(y.to(x.dtype).view_as(x))


class Block(nn.Module):
    """Attention, then MLP (or experts), each added to the residual stream. (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = make_norm(config)
        self.mlp = MoE(config) if config.n_expert else MLP(config)
        self.post = config.norm_position == "post"

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None = None, cache: KVCache | None = None) -> Tensor:
        if self.post:
            x = self.ln_1(x + self.attn(x, rotation, cache))
            return self.ln_2(x + self.mlp(x))
        x = x + self.attn(self.ln_1(x), rotation, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Token ids in, logits over the next token out.

    >>> model = GPT(GPTConfig(vocab_size=65))
    >>> logits, loss = model(idx, targets)  # idx, targets: (B, T) int64; logits: (B, T, V) float32; loss: nats
    >>> more = model.generate(idx, max_new_tokens=100)  # (B, T + 100)
    """

    transformer: Any  # its parts are taken by name

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
        self.dropout = Dropout(config.dropout)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie:
            self.transformer.wte.weight = self.lm_head.weight
        self.apply(self._init_weights)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):  # what is added to the residual stream 2 * n_layer times (GPT-2)
                nn.init.normal_(p, std=0.0 if config.zero_init else 0.02 / math.sqrt(2 * config.n_layer))
            if ".ngrams." in name:
                nn.init.zeros_(p)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding | Experts):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def hidden(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """idx (B, T) -> the residual stream after the last block and norm (B, T, C). A cache moves on by T.

        Raises ValueError where learned positions or the cache end before start + T.
        """
        config, start, T = self.config, cache.length if cache else 0, idx.size(1)
        if start + T > config.block_size and (config.pos == "learned" or cache):
            raise ValueError(f"{start + T} positions do not fit in block_size={config.block_size}")
        x = self.transformer.wte(idx)  # (B, T, C)
        if config.ngram:  # what stands before the start counts as token 0
            past = cache.past if cache and start else idx.new_zeros(idx.size(0), config.ngram - 1)
            known = torch.cat((past, idx), dim=1)  # (B, ngram - 1 + T)
            x = x + self.transformer.ngrams(known)[:, -T:]  # (B, T, C)
            if cache:
                cache.past = known[:, 1 - config.ngram :].clone()
        rotation = None
        if config.pos == "learned":
            x = x + self.transformer.wpe.weight[start : start + T]  # (T, C), the same for each row
        else:
            rotation = rotary(start, T, config.n_embd // config.n_head, idx.device)
        if config.norm == "rmsnorm":
            x = F.rms_norm(x, (config.n_embd,), eps=1e-6)
        x = self.dropout(x)
        for block in self.transformer.h:
            x = block(x, rotation, cache)
        if cache is not None:
            cache.length += T
        return self.transformer.ln_f(x) if config.norm_position == "pre" else x

    def head(self, x: Tensor) -> Tensor:
        """(..., C) -> logits (..., V), in float32 whatever the dtype of the blocks."""
        logits = self.lm_head(x).float()
        if self.config.softcap:
            logits = self.config.softcap * torch.tanh(logits / self.config.softcap)
        return logits

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """idx, targets: (B, T) int64 -> logits (B, T, V), and the mean cross-entropy in nats a token.

        A target of -1 is left out of the mean. Without targets the loss is None.
        """
        logits = self.head(self.hidden(idx))  # (B, T, V)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def n_params(self, active: bool = False) -> int:
        """Parameters, the shared embedding counted once. active: without the experts that a token does not visit."""
        idle = self.config.n_expert - self.config.n_expert_active if active and self.config.n_expert else 0
        return sum(p.numel() - (idle * p[0].numel() if p.ndim == 3 else 0) for p in self.parameters())

    def flops_per_token(self, T: int | None = None) -> float:
        """Floating-point operations of a training step per token, forward and backward (PaLM, arXiv 2204.02311, B).

        6 for each weight that a token meets in a matrix product, and 12 C T a layer for attention's two products,
        counted over all of the (T, T) square as is usual, though the causal half is never computed.
        """
        looked_up = self.transformer.wpe.weight.numel() if self.config.pos == "learned" else 0
        looked_up += 0 if self.config.tie else self.transformer.wte.weight.numel()
        looked_up += sum(p.numel() for name, p in self.named_parameters() if ".ngrams." in name)
        attention = 12 * self.config.n_layer * self.config.n_embd * (T or self.config.block_size)
        return 6 * (self.n_params(active=True) - looked_up) + attention

    def prefill(self, idx: Tensor, cache: KVCache) -> Tensor:
        """Reads idx (B, T) into the cache -> logits over what comes next (B, V)."""
        return self.head(self.hidden(idx, cache)[:, -1])

    def decode(self, new: Tensor, cache: KVCache) -> Tensor:
        """The same for one new token (B, 1) behind others. A method of its own: this is what is worth compiling."""
        return self.prefill(new, cache)

    @torch.no_grad()
    def stream(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
    ) -> Iterator[Tensor]:
        """Yields each next token (B,) after idx (B, T): one prefill, then one position at a time from the cache.

        The cache holds block_size positions. When it is full, the last block_size / 2 tokens are prefilled anew and
        it goes on: learned positions cannot slide. Eval mode is the caller's to set.
        """
        half = max(1, self.config.block_size // 2)
        dtype = self.lm_head.weight.dtype
        if torch.is_autocast_enabled(idx.device.type):
            dtype = torch.get_autocast_dtype(idx.device.type)
        cache = KVCache(self.config, idx.size(0), idx.device, dtype)
        new = idx[:, -self.config.block_size :]  # (B, T): what the model has not read yet
        for _ in range(max_new_tokens):
            if cache.length + new.size(1) > self.config.block_size:
                cache.length, new = 0, idx[:, -half:]
            logits = (self.decode if cache.length else self.prefill)(new, cache)  # (B, V)
            if repetition_penalty != 1.0:  # arXiv 1909.05858: what was said before becomes less likely
                seen = logits.gather(1, idx)
                seen = torch.where(seen > 0, seen / repetition_penalty, seen * repetition_penalty)
                logits = logits.scatter(1, idx, seen)
            new = sample(logits, temperature, top_k, top_p)[:, None]  # (B, 1)
            idx = torch.cat((idx, new), dim=1)  # (B, T + 1)
            yield new[:, 0]

    def generate(self, idx: Tensor, max_new_tokens: int, **how: float) -> Tensor:
        """idx (B, T) -> (B, T + max_new_tokens). `how`: temperature, top_k, top_p, repetition_penalty."""
        new = list(self.stream(idx, max_new_tokens, **how))  # type: ignore[arg-type]
        return torch.cat((idx, torch.stack(new, dim=1)), dim=1) if new else idx


def sample(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Draws one token a row: logits (B, V) -> (B,).

    temperature 0 takes the likeliest; top_k keeps the k likeliest (0 keeps all); top_p keeps the fewest whose
    probabilities reach top_p together (nucleus sampling, arXiv 1904.09751).
    """
    if temperature < 1e-6:  # below it, float32 cannot tell the difference from 0
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if 0 < top_k < logits.size(-1):
        kth = logits.topk(top_k).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1:
        ordered, order = logits.sort(descending=True)  # (B, V) each
        p = ordered.softmax(dim=-1)
        beyond = p.cumsum(dim=-1) - p >= top_p  # what stands before it suffices already
        beyond[:, 0] = False  # the likeliest always stays
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), float("-inf"))
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1)[:, 0]
