"""The classic recipe: GPT-2's block, AdamW, warmup and cosine, on Tiny Shakespeare by character.

Comparable with nanoGPT's train_shakespeare_char.py line by line, but for: dropout on the residual paths only (inside
attention it would cost the fast kernel), a learning rate that ends at zero, and an end before the model overfits.
"""

out_dir = "out-shakespeare-char"
dataset = "shakespeare_char"
eval_interval = 250

batch_size = 64
block_size = 256
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3
beta2 = 0.99
max_iters = 2000  # nanoGPT's 5000 overfit from step 1750 on

# measured: 2 CPU cores (Zen 4, bfloat16, shared with other work): --max_minutes=31 makes 268 steps, whole validation
# split 2.189. its 2000 steps are made for a GPU, where it is not measured yet
