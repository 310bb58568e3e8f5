"""nanoGPT's Shakespeare model: 6 layers, 384 channels, a context of 256 characters, on every machine.

On a GPU it is trained as nanoGPT does: GPT-2's block, AdamW with warmup and cosine. Three things differ: dropout on the
residual paths only, a learning rate that ends at zero, and fewer steps. Not measured on a GPU yet.
On a CPU those steps would take hours. The section `cpu` has steps that a CPU can take, and the fast recipe's parts.
"""

out_dir = "out-shakespeare-char"
dataset = "shakespeare_char"
eval_interval = 250  # often, because a model of this size overfits this text

batch_size = 64
block_size = 256  # characters of context
n_layer = 6
n_head = 6
n_embd = 384  # 10.7M parameters
dropout = 0.2  # a model of this size memorises 1M characters; inside attention dropout would cost the fast kernel

learning_rate = 1e-3  # small models bear a higher rate than GPT-2's 6e-4
beta2 = 0.99  # above the usual 0.95, because a step has few tokens
max_iters = 2000  # nanoGPT's 5000 steps overfit: others report its lowest loss near step 1750

cpu = dict(
    max_minutes=13.0,  # about 500 steps on 2 cores with AVX2
    batch_size=4,  # 64 rows would leave 60 steps in this time
    eval_iters=20,  # evaluate.py reads the whole split
    dropout=0.0,  # the text is read about once
    pos="rope",
    norm="rmsnorm",
    qk_norm=True,
    tie=False,
    softcap=15.0,
    zero_init=True,
    ngram=6,  # what gains most; the other parts: docs/results.md#shakespeare_cpu
    ngram_rows=16384,
    ngram_weight_decay=4.0,
    optimizer="muon",
    muon_lr=0.015,
    learning_rate=3e-3,
    weight_decay=0.0,
    beta1=0.8,
    lr_schedule="linear",
    decay_fraction=0.6,
    warmup_iters=20,
)
