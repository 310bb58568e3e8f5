"""TinyGPT, about 1M parameters: the nine parts of a language model, trained on a laptop's CPU in under three minutes.

Tokenizer, token and position embeddings, causal multi-head attention, residual blocks with a tied head,
cross-entropy, back-propagation, AdamW, the loop, generation: nothing else is switched on.
"""

out_dir = "out-tinygpt"
dataset = "shakespeare_char"
eval_interval = 1000

batch_size = 12
block_size = 64
n_layer = 4
n_head = 4
n_embd = 144

learning_rate = 3e-3
max_minutes = 2.8

# measured: 2 CPU cores (AVX2, float32, shared with other work), 169 s with start-up: 2436 steps, whole validation split
# 1.725, one seed. a context of 128 in the place of 64 (8 rows) costs 0.11 nats at equal tokens
#
# the textbook's block beside GPT-2's: 1200 steps, whole validation split, each at the best of three learning rates
# (--max_minutes=0 --max_iters=1200 --norm_position=post --activation=relu --learning_rate=2e-3)
#                     learning rate   seeds 1337, 1   the other learning rates, seed 1337
#   pre-norm, GELU    4e-3            1.885 1.876     2e-3 1.940, 8e-3 1.905
#   pre-norm, ReLU    2e-3            1.896 1.881     4e-3 1.913, 8e-3 1.916
#   post-norm, GELU   2e-3            1.930 1.926     1e-3 2.054, 4e-3 3.348: it learns nothing
#   post-norm, ReLU   2e-3            1.961 1.974     1e-3 2.045, 4e-3 3.348: it learns nothing
