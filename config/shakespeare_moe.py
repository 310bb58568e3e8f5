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

# measured: 2 CPU cores (AMD EPYC without native bfloat16, shared with other work), one thread, --dtype=float32
# --compile=false, seeds 1337, 1, 2; whole validation split by evaluate.py --ckpt=latest:
#
#   equal steps   experts, 600 steps                  1.634 1.633 1.640   2.05M parameters, 205k of them active
#                 --n_expert=0, 600 steps             1.702 1.698 1.703   205k parameters
#   equal time    --n_expert=0 --max_iters=1160       1.620 (one seed)    in 102 s; the experts' 600 steps took 115 s
#
# so the experts gain 0.066 nats at equal steps, and lose 0.014 at equal time. bench.py --parts=train: 0.197 s a step
# against 0.102. forward and backward take 1.2 times as long as the dense model's, 112 ms against 92; the rest is Muon,
# which orthogonalises every expert at every step, however few tokens it saw: 82 ms against 8
