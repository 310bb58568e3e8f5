"""nanoGPT's width and depth: 6 layers, 384 channels, a context of 256 characters, on every machine.

GPU: nanoGPT's batch, AdamW with warmup and cosine. Three things differ: no dropout inside attention, a learning rate
that ends at zero, fewer steps. CPU: steps that a CPU can take, and what of the fast recipe they need.
Result: loss 1.493, 13 minutes on 2 CPU cores, docs/results.md#shakespeare_char
"""

out_dir = "out-shakespeare-char"
dataset = "shakespeare_char"
eval_interval = 250  # often, because a model of this size overfits this text

batch_size = 64
block_size = 256  # characters of context
n_layer = 6
n_head = 6
n_embd = 384  # 10.7M parameters; with the tables of the CPU section 37.5M
dropout = 0.2  # a model of this size memorises 1M characters; inside attention dropout would cost the fast kernel

learning_rate = 1e-3  # small models bear a higher rate than GPT-2's 6e-4
beta2 = 0.99  # above the usual 0.95, because a step has few tokens
max_iters = 2000  # nanoGPT's 5000 steps overfit: others report its lowest loss near step 1750

cpu = dict(  # in 13 minutes on 2 cores
    max_minutes=13.0, batch_size=4, eval_iters=20, dropout=0.0,  # 64 rows would leave too few steps
    pos="rope", norm="rmsnorm", qk_norm=True, tie=False,  # results.md#shakespeare_cpu
    ngram=6, ngram_rows=16384, ngram_weight_decay=4.0,  # tables of the last characters gain most
    weight_decay=0.0, beta1=0.8, lr_schedule="linear", decay_fraction=0.6, warmup_iters=20,
    # AdamW as on a GPU: after 5 minutes Muon is 0.06 higher, as its steps take longer (results.md#char-adamw)
)  # fmt: skip
