"""Fine-tuning: GPT-2 trained further on Tiny Shakespeare, at a low and constant learning rate.

To start from a run of yours instead: --init_from=OUT_DIR --dataset=DATASET, prepared with the same tokenizer.
Not measured yet.
"""

out_dir = "out-finetune-shakespeare"
init_from = "gpt2"  # or gpt2-medium, gpt2-large, gpt2-xl, a folder
dataset = "shakespeare_gpt2"
eval_interval = 5  # the whole run is 20 steps
eval_iters = 40
log_interval = 1

batch_size = 1  # fits a small GPU
gradient_accumulation_steps = 32  # 32,768 tokens per step: the text, 300,000 of GPT-2's tokens, is 9 steps
block_size = 1024  # a smaller value would cut off some of the model's positions

learning_rate = 3e-5  # a twentieth of GPT-2's: fine-tuning must not destroy what the weights know
lr_schedule = "constant"  # 20 steps are too few for a decay; not searched
warmup_iters = 0
max_iters = 20  # two epochs
