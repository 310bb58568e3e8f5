"""A mixture of experts beside the dense model that does the same work for each token: --n_expert=0 is that one.

The fast recipe, small. Each MLP is 32 experts of 120 hidden channels, of which a token visits two; with the router that
makes the active parameters of the dense MLP exactly (4 x 64 = 256 hidden channels).
"""

out_dir = "out-shakespeare-moe"
dataset = "shakespeare_char"
max_iters = 600
eval_interval = 200
eval_iters = 20

n_expert = 32
n_expert_active = 2

batch_size = 32
block_size = 64
n_layer = 4
n_head = 2
n_embd = 64
pos = "rope"
norm = "rmsnorm"
qk_norm = True
activation = "relu2"
tie = False
softcap = 15.0
zero_init = True

optimizer = "muon"
muon_lr = 0.02
learning_rate = 3e-3
weight_decay = 0.0
beta1 = 0.8
beta2 = 0.95
lr_schedule = "linear"
decay_fraction = 0.6
warmup_iters = 20
