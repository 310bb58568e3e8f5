"""In the time of a coffee, on a CPU: the fast recipe at the size that 105 seconds of 2 cores can train.

Rotary positions, RMSNorm, QK-norm, squared ReLU, zero-initialised output projections, soft-capped logits, an untied
head, embeddings of the last 2, 3 and 4 characters, and Muon on the hidden matrices; the learning rate constant, then
straight down to zero.
"""

out_dir = "out-shakespeare-cpu"
dataset = "shakespeare_char"
max_minutes = 1.75
eval_interval = 2000
eval_iters = 20  # a quarter of the validation text: an evaluation costs what ten steps do; evaluate.py reads all of it

batch_size = 8
block_size = 128
n_layer = 4
n_head = 3
n_embd = 192
pos = "rope"
norm = "rmsnorm"
qk_norm = True
activation = "relu2"
tie = False
softcap = 15.0
zero_init = True
ngram = 4
ngram_rows = 16384

optimizer = "muon"
muon_lr = 0.015
learning_rate = 3e-3
weight_decay = 0.0
beta1 = 0.8
beta2 = 0.95
lr_schedule = "linear"
decay_fraction = 0.6
warmup_iters = 20

# measured: 2 CPU cores (AVX2, float32, shared with other work), 105 s with start-up: 424 steps, whole validation split
# 1.605, one seed. before the n-grams, on 2 newer cores (Zen 4, bfloat16, shared too): 520 steps of 12 rows, 1.627.
# nanoGPT's CPU recipe is known for 1.886 in 105 s on the newer cores.
#
# why the n-grams, at 600 steps of 8 x 64 tokens, 4 layers of 96, float32, whole validation split, one seed:
#   none                                     1.852
#   ngram=2                                  1.802
#   ngram=3, ngram_rows=8192, 32768, 131072  1.758, 1.751, 1.751
#   ngram=4, ngram_rows=16384                1.692
# a step takes as long with them as without (bench.py --parts=train, 0.242 s against 0.251 in a noisy run)
