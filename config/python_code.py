"""The Python that comes with the interpreter: a dataset that every machine has, no network needed, in five minutes.

BPE tokens are three bytes each, so a small context holds a function; the block is that of the fast recipe.
"""

out_dir = "out-python-code"
dataset = "python_code"
eval_interval = 250
eval_iters = 20
max_minutes = 5.0

batch_size = 8
block_size = 128
n_layer = 4
n_head = 4
n_embd = 256

pos = "rope"
norm = "rmsnorm"
activation = "relu2"
qk_norm = True
zero_init = True
softcap = 15.0
optimizer = "muon"
muon_lr = 0.02
learning_rate = 3e-3
beta2 = 0.95
lr_schedule = "linear"
decay_fraction = 0.6
warmup_iters = 20

# measured: 2 CPU cores (AVX2, float32, shared with other work), 5 minutes: 700 steps, whole validation split 3.575 nats
# a token, 1.666 bits per byte (counting pairs of tokens: 4.107 nats), one seed. it writes, besides tables of numbers:
#     self.assertRaises(TypeError, 0, 0)
