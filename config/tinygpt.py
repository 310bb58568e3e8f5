"""TinyGPT, 1M parameters: the nine parts of a language model and nothing else, in under three minutes on a CPU.

Tokenizer, token and position embeddings, causal multi-head attention, residual blocks with a tied output matrix,
cross-entropy, back-propagation, AdamW, the training loop, generation.

Result: loss 1.725 after 2436 steps (one seed), docs/results.md#tinygpt
"""

out_dir = "out-tinygpt"
dataset = "shakespeare_char"
max_minutes = 2.8  # the whole command
eval_interval = 1000  # more come by time

batch_size = 12
block_size = 64  # short: at equal time, more steps are worth more here than a longer context
n_layer = 4
n_head = 4
n_embd = 144  # with 4 layers: 1M parameters

learning_rate = 3e-3  # not tried with 1200 steps, where 4e-3 is better than 2e-3 and 8e-3 (docs/results.md#textbook)
