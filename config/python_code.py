"""The Python that comes with the interpreter: a dataset that every machine has, without a network, in five minutes.

Result: loss 3.575 per BPE token, 1.666 bits per byte after 700 steps (one seed), docs/results.md#python_code
"""

out_dir = "out-python-code"
dataset = "python_code"
max_minutes = 5.0  # the whole command
eval_interval = 250
eval_iters = 20  # a part of the validation text; evaluate.py reads all of it

batch_size = 8
block_size = 128  # about 400 bytes, since a token is three bytes: enough for a function
n_layer = 4
n_head = 4
n_embd = 256

# the block and the optimizer of the fast recipe (shakespeare_cpu.py); none of these was searched on this text
pos = "rope"
norm = "rmsnorm"
qk_norm = True
activation = "relu2"
optimizer, muon_lr = "muon", 0.02
learning_rate, beta2 = 3e-3, 0.95
lr_schedule, decay_fraction, warmup_iters = "linear", 0.6, 20
