"""The Python that comes with the interpreter: a dataset that every machine has, without a network, in five minutes.

Result: loss 3.661 per BPE token on the development split (one seed), docs/results.md#python_code
"""

from config.shakespeare_cpu import *

out_dir = "out-python-code"
dataset = "python_code"
max_minutes = 5.0  # the whole command
eval_interval = 250
batch_size = 12  # rows of 256 tokens, about 750 bytes each
