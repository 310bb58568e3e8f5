"""In the time of a coffee, on a CPU: the fast recipe at the size that 105 seconds of 2 cores can train.

Rotary positions, RMSNorm, QK-norm, squared ReLU, zero-initialised output projections, soft-capped logits, an untied
head, embeddings of the last 2 to 6 characters, and Muon on the hidden matrices; the learning rate constant, then
straight down to zero.
"""

out_dir = "out-shakespeare-cpu"
dataset = "shakespeare_char"
max_minutes = 1.75
eval_interval = 2000
eval_iters = 20  # a quarter of the validation text: an evaluation costs what ten steps do; evaluate.py reads all of it

batch_size = 6
block_size = 256
n_layer = 4
n_head = 2
n_embd = 128
pos = "rope"
norm = "rmsnorm"
qk_norm = True
activation = "relu2"
tie = False
softcap = 15.0
zero_init = True
ngram = 6
ngram_rows = 16384

optimizer = "muon"
muon_lr = 0.015
learning_rate = 3e-3
weight_decay = 0.0
ngram_weight_decay = 4.0
beta1 = 0.8
beta2 = 0.99
lr_schedule = "linear"
decay_fraction = 0.6
warmup_iters = 20
