"""shakespeare_cpu.py, wider and for 8 minutes: below nanoGPT's GPU result of 1.4697, on 2 CPU cores.

Result: loss 1.401 after 1900 steps (mean of 3 seeds), docs/results.md#shakespeare_fast
"""

from config.shakespeare_cpu import *

out_dir = "out-shakespeare-fast"
max_minutes = 8.0
eval_interval = 500  # more come by time: this run is long enough to watch
n_layer, n_head, n_embd = 4, 3, 192  # heads of 64 channels
