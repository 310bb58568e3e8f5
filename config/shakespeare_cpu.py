"""The fast recipe at the size that 105 seconds of 2 CPU cores can train.

Result: loss 1.473 after about 1000 steps (mean of 3 seeds), docs/results.md#shakespeare_cpu"""

out_dir = "out-shakespeare-cpu"
dataset = "shakespeare_char"
max_minutes = 1.75  # the whole command: startup, training, the last save
eval_interval = 2000  # a few more come by time
eval_iters = 20  # a quarter of the validation text; evaluate.py reads all of it

batch_size = 6  # rows of 256 characters
n_layer, n_head, n_embd = 3, 2, 96  # 4 layers of 128 end 0.038 higher: too few steps (results.md#cpu-size)
pos = "rope"  # learned positions end 0.052 higher (results.md#choices, and so do the next ones)
norm = "rmsnorm"  # layernorm ends 0.014 higher
qk_norm = True  # without it 0.006 higher in six pairs of six, not decided
tie = False  # a tied output matrix ends 0.008 higher
ngram = 6  # tables of the last 2 to 6 characters: without them 0.110 higher
ngram_rows = 16384  # 8192 end 0.010 higher, 65536 end 0.008 lower with 31M parameters (one seed)

optimizer = "muon"  # adamw ends 0.025 higher
muon_lr = 0.015  # 0.01 and 0.02 end within 0.002 (one seed, like the next ones: results.md#tried-2026-11-28)
learning_rate = 3e-3  # of the embeddings and the output matrix (AdamW); 2e-3 ends 0.001 higher
weight_decay = 0.0  # the text is read one and a half times
ngram_weight_decay = 4.0  # without it 0.048 higher: the tables memorise what is read twice
beta1 = 0.8  # averages gradients over 5 steps, not 10, in a run this short; 0.9 ends 0.001 higher
lr_schedule = "linear"  # constant, then straight down to zero
decay_fraction = 0.6  # over the last 60% of the run; 0.8 and 1 end within 0.002
warmup_iters = 20  # 100, the default, would be a tenth of the run
