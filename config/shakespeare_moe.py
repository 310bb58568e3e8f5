"""A mixture of experts, compared with the dense model of the same compute per token: --n_expert=0.

The fast recipe, small. Each MLP is 32 experts of 120 hidden channels; a token goes to two of them. The active
parameters, router included, are exactly those of the dense MLP (4 x 64 hidden channels).

Result: loss 1.630, dense 1.694 at equal steps, 1.607 with more steps in less time, docs/results.md#shakespeare_moe
"""

out_dir = "out-shakespeare-moe"
dataset = "shakespeare_char"
max_iters = 600  # equal steps for both models
eval_interval = 200
eval_iters = 20  # a part of the validation text; evaluate.py reads all of it

n_expert = 32
n_expert_active = 2  # the fewest that let the router learn

batch_size, block_size = 32, 64
n_layer, n_head, n_embd = 4, 2, 64  # small, so that 600 steps take two minutes
# a fast recipe without n-gram tables: they would hide the difference
pos, norm, qk_norm = "rope", "rmsnorm", True
tie, activation = False, "relu2"
optimizer, muon_lr, learning_rate, weight_decay = "muon", 0.02, 3e-3, 0.0
beta1, beta2 = 0.8, 0.95
lr_schedule, decay_fraction, warmup_iters = "linear", 0.6, 20
