"""GPT-2 124M on OpenWebText: the published block and size, trained with nanoGPT's recipe.

    python prepare/openwebtext.py --max_tokens=0 --download  # all of it: 9 billion tokens
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2.py

On one GPU leave torchrun out: the same 491,520 tokens a step, in more forward passes. nanoGPT's own figures, to compare
with: loss 2.85 after 600,000 steps, and 3.11 for OpenAI's weights on the same text
(python train.py config/gpt2.py --init_from=gpt2 --eval_only). Not yet run to its end here.
"""

out_dir = "out-gpt2"
dataset = "openwebtext"
eval_interval = 1000
eval_iters = 200

batch_size = 12
gradient_accumulation_steps = 40  # 12 * 40 rows of 1024: 0.5M tokens a step; 8 GPUs do 5 passes each
block_size = 1024
n_layer = 12
n_head = 12
n_embd = 768
bias = True
activation = "gelu_tanh"

learning_rate = 6e-4
min_lr = 6e-5
beta2 = 0.95
warmup_iters = 2000
max_iters = 600_000
