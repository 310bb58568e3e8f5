"""GPT-2 124M on OpenWebText: the published block and size, trained with nanoGPT's recipe.

    python prepare/openwebtext.py --max_tokens=0 --download  # all of it: 9 billion tokens
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2.py

On one GPU use python instead of torchrun: the same 491,520 tokens per step, in more micro-batches. Not run to its end
yet. To compare with, nanoGPT reports a loss of 2.85 after 600,000 steps, and 3.11 for OpenAI's weights on this text:

    python evaluate.py --out_dir=gpt2 --dataset=openwebtext
"""

out_dir = "out-gpt2"
dataset = "openwebtext"
eval_interval = 1000

batch_size = 12
gradient_accumulation_steps = 40  # 480 rows of 1024, 0.5M tokens per step; each of 8 GPUs computes 5 micro-batches
block_size = 1024
n_layer, n_head, n_embd = 12, 12, 768
bias = True  # in linears and layernorms, as OpenAI's weights have it
activation = "gelu_tanh"  # GPT-2's approximation of GELU

learning_rate = 6e-4  # GPT-3's for this size (arXiv 2005.14165)
min_lr = 6e-5  # a tenth of the peak, as there
beta2 = 0.95
warmup_iters = 2000
max_iters = 600_000
