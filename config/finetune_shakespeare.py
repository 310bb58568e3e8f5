"""Fine-tuning: GPT-2 goes on with Tiny Shakespeare, at a low and constant learning rate.

From a run of your own in GPT-2's place: --init_from=OUT_DIR --dataset=DATASET, prepared with the same tokenizer. Not
yet measured here. The text is 300,000 of GPT-2's tokens: an epoch is 9 steps.
"""

out_dir = "out-finetune-shakespeare"
init_from = "gpt2"  # gpt2-medium, gpt2-large, gpt2-xl, a folder
dataset = "shakespeare_gpt2"
eval_interval = 5
eval_iters = 40
log_interval = 1

batch_size = 1
gradient_accumulation_steps = 32  # 32,768 tokens a step
block_size = 1024  # a shorter one cuts the model's positions
dropout = 0.0

learning_rate = 3e-5
decay_lr = False
warmup_iters = 0
max_iters = 20
