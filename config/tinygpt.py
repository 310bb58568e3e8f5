"""TinyGPT, 1M parameters: the parts of a language model and nothing else, in under three minutes on a CPU.

Tokenizer, token and position embeddings, causal multi-head attention, residual blocks with a tied output matrix,
cross-entropy, back-propagation, AdamW, the training loop, generation.

Result: loss 1.693 (mean of 3 seeds, 1.661 to 1.718), docs/results.md#tinygpt
"""

out_dir = "out-tinygpt"
dataset = "shakespeare_char"
max_minutes = 2.8  # the whole command
eval_interval = 1000  # more come by time

batch_size = 12
block_size = 64  # as in nanoGPT's recipe for a CPU; not searched
n_layer = 4
n_head = 4
n_embd = 144  # with 4 layers: 1M parameters

learning_rate = 3e-3  # 2e-3 ends 0.038 higher, 4e-3 0.006 lower, not decided (docs/results.md#textbook)
