"""The lowest loss on Tiny Shakespeare that we know how to train on two CPU cores; a single model, 12 minutes.

shakespeare_fast.py for half as long again, over four times over the text: the tables of the last characters fade
twice as fast.
"""

out_dir = "out-shakespeare-best"
dataset = "shakespeare_char"
max_minutes = 12.0
eval_interval = 500
eval_iters = 20  # a quarter of the validation text: an evaluation costs what ten steps do; evaluate.py reads all of it

batch_size = 6
block_size = 256
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
ngram = 6
ngram_rows = 16384

optimizer = "muon"
muon_lr = 0.015
learning_rate = 3e-3
weight_decay = 0.0
ngram_weight_decay = 16.0
beta1 = 0.8
beta2 = 0.99
lr_schedule = "linear"
decay_fraction = 0.6
warmup_iters = 20

