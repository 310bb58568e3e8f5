"""Any text, any machine, any time: the planner chooses what is not set, and predicts the loss (docs/planner.md).

    python prepare/text.py --input=my_book.txt
    python train.py config/auto.py --dataset=my_book --max_minutes=10

It chooses layers, heads, width, context, rows per step, optimizer and rates, n-gram tables and their decay, dropout,
and less time where more would overfit. What you set, here or on the command line, it keeps.
The law is fitted to runs of up to 30 minutes. Result: docs/results.md#planner-texts
"""

plan = True
out_dir = "out-auto"
max_minutes = 10.0  # the whole command
eval_interval = 100_000  # evaluations come by time: after 1, 2, 4, ... percent of the run

# the block of the fast recipe (shakespeare_cpu.py): the law was fitted to no other
pos = "rope"
norm = "rmsnorm"
qk_norm = True
tie = False
weight_decay, beta1 = 0.0, 0.8
lr_schedule, decay_fraction = "linear", 0.6
