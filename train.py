"""Train a GPT.

    python train.py config/shakespeare_cpu.py --max_minutes=5
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2.py

Five parts: settings, setup, one training step, evaluation and checkpoints, the training loop.
"""

import minutegpt.errors  # noqa: F401, I001  first: runs this again with .venv's Python where this one has no torch

import functools
import math

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.utils import parametrize

from minutegpt import checkpoint, preflight, setup, truth
from minutegpt.clock import Clock
from minutegpt.data.dataset import open_data
from minutegpt.data.tokenizer import from_json
from minutegpt.device import environment, init_machine
from minutegpt.distributed import Interrupt, exit_all, reduce_loss, split_batch, sync
from minutegpt.generate import hide_padding
from minutegpt.log import RunLog, print_line
from minutegpt.moe import update_router_bias
from minutegpt.native import native_decoding
from minutegpt.optim import lr_scale, make_optimizers, set_lr
from minutegpt.quantize import fake_quantize

# ----------------------------------------------------------------------------------------------------------------
# 1. Settings. Override them in a config file or with --name=value. The model's settings (n_layer, n_head, n_embd,
# block_size, dropout, pos, ...) are the fields of GPTConfig in model.py, and are set in the same way.

# run
out_dir = "out"  # the run's folder: checkpoints, log.jsonl, run.html, loss.png, config.json
init_from = "scratch"  # scratch; resume: the run in out_dir; or weights to start from: another run's folder, gpt2, ...
overwrite = False  # allow a new run to replace the one in out_dir
plan = False  # choose what is not set, from the text, this machine and max_minutes: config/auto.py
seed = 1337  # of weights, order of the data, dropout, samples
max_iters = 5000  # training steps
max_minutes = 0.0  # wall-clock time of the whole run instead of max_iters, start-up and last save included; 0 = off
eval_interval = 250  # steps between evaluations, each with a checkpoint and a sample; more come by time
eval_iters = 200  # batches per evaluation and split, at most
checkpoint_minutes = 5.0  # a checkpoint is never older than this; 0 = eval_interval alone decides
log_interval = 10  # steps between log lines
compare = ""  # folders of earlier runs, which run.html shows as faint lines
tracker = "none"  # none, tensorboard, wandb, trackio: also gets each row of log.jsonl
# data
dataset = "shakespeare_char"  # a folder in data/, prepared by prepare/<dataset>.py if needed; "a:0.7,b:0.3" mixes two
batch_size = 64  # rows per micro-batch
gradient_accumulation_steps = 1  # micro-batches per step; global batch = batch_size * this, on any number of GPUs
# optimizer
optimizer = "adamw"  # adamw; muon: Muon for the hidden matrices, AdamW for the rest
learning_rate = 1e-3  # AdamW's, at its peak
weight_decay = 0.1  # of matrices only
beta1 = 0.9
beta2 = 0.99
muon_lr = 0.02  # Muon's learning rate, at its peak
muon_weight_decay = 0.0
ngram_weight_decay = 5.0  # of the n-gram tables; large, because they memorise the training text (optim.py)
grad_clip = 1.0  # maximum gradient norm; 0 = off
lr_schedule = "cosine"  # cosine; linear: constant, then linear decay over the last decay_fraction; constant
decay_fraction = 1.0
warmup_iters = 100  # linear warmup; at most half of the run
min_lr = 0.0  # the learning rate at the end
teachers = ""  # distillation: comma-separated runs or GPT-2s; half of the loss is cross-entropy with their predictions
qat = ""  # quantization-aware training for int8, int4 or int4-tensor
# hardware
device = "auto"  # auto, cpu, cuda, cuda:1, mps, xpu
dtype = "auto"  # auto, float32, bfloat16, float16 (CUDA, with a gradient scaler)
compile = "auto"  # torch.compile: auto, true, false
section = "auto"  # of a config file, for a kind of device: auto (this device's), none, cpu, cuda, mps, xpu
deterministic = False  # CUDA: the same bits every time where PyTorch can, at some cost of speed
# ----------------------------------------------------------------------------------------------------------------
# 2. Setup

config, start = setup.resolve(globals(), __file__)  # command line > checkpoint (when resuming) > config file > defaults
globals().update(config)

machine = init_machine(
    device, dtype, compile, minutes=setup.expected_minutes(config), deterministic=deterministic,
    saved=start.environment,
)  # fmt: skip
main_process = machine.rank == 0
lock = setup.claim(config, machine, start)  # no other run may write to out_dir
setup.check_same_checkpoint(config["out_dir"], start)  # several machines may each have their own
globals().update(setup.choose(config, machine, start))  # the dataset, prepared; and what the planner chooses
block_size = config["block_size"]  # T, a setting of the model
micro_steps, micro_batch = split_batch(batch_size, gradient_accumulation_steps, machine.world_size)
global_batch = batch_size * gradient_accumulation_steps  # rows per step

train_data, val_data = (open_data(dataset, split, block_size) for split in ("train", "val"))
n_windows = (min(len(train_data), len(val_data)) - 1) // block_size  # that an evaluation can read
tokenizer = from_json(train_data.meta["tokenizer"])

torch.manual_seed(seed)
model = setup.build_model(start, config, train_data.meta["tokenizer"])
teacher_models = setup.load_teachers(config, model, train_data.meta["tokenizer"], machine.device)
if qat:
    fake_quantize(model, qat)
model.to(machine.device)
optimizers = make_optimizers(model, config, machine.matmul_dtype, machine.compile_muon)
scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
setup.compare_data(start, config, train_data.fingerprint)  # another text starts its best loss again
progress = checkpoint.restore(start.state, optimizers, scaler)  # step, seconds, best_val_loss, ...
# evaluation and sampling use the uncompiled `model`, so that they never trigger a recompilation
train_model = machine.wrap(model, logits=bool(teacher_models))


# ----------------------------------------------------------------------------------------------------------------
# 3. One training step


@functools.lru_cache(maxsize=1)
def get_batch(step, micro_step):
    """Inputs and targets, (B, T) each. They depend on seed and step alone, so a resumed run sees the same batches."""
    first = step * global_batch + (machine.rank * micro_steps + micro_step) * micro_batch
    starts = train_data.starts(block_size, seed, np.arange(first, first + micro_batch))  # (B,)
    tokens = machine.to_device(train_data.windows(starts, block_size + 1))  # (B, T + 1)
    return tokens[:, :-1], tokens[:, 1:]  # the target is what comes next


@torch.no_grad()
def teacher_probs(x):
    """Mean prediction of the teachers, (B, T) -> (B * T, V). Distillation: Hinton et al., arXiv 1503.02531."""
    with machine.autocast():
        return sum(teacher(x)[0].flatten(0, 1).softmax(1) for teacher in teacher_models) / len(teacher_models)


def forward_backward(step, readings=list):
    """Accumulates the gradient of the global batch. Returns its mean loss and the gradient norm before clipping.

    With several processes, the readings of rank 0 follow, reduced together with the loss.
    """
    results = torch.zeros(1, device=machine.device)  # the mean loss
    for micro_step in range(micro_steps):
        x, y = get_batch(step, micro_step)
        dropout_seed = np.random.SeedSequence([seed, step, micro_step, machine.rank]).generate_state(1)[0]
        torch.manual_seed(int(dropout_seed))  # a resumed run draws the same dropout masks
        if machine.ddp:  # all-reduce the gradients after the last micro-batch only
            train_model.require_backward_grad_sync = micro_step == micro_steps - 1
        with machine.training():  # autocast
            logits, loss = train_model(x, y)
        results += loss.detach() / micro_steps
        if teacher_models:
            loss = (loss + F.cross_entropy(logits.flatten(0, 1), teacher_probs(x))) / 2
        scaler.scale(loss / micro_steps).backward()
    if machine.world_size > 1:
        results = reduce_loss(results, machine.to_device(torch.tensor(readings())))
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    results = torch.cat((results[:1], grad_norm.view(1), results[1:]))
    get_batch(step + 1, 0)  # fetched while the device works, and kept for the next step
    return results.tolist()  # the one wait for the device in a step


def optimizer_step(scale, grad_norm):
    """Clips the gradient, updates the weights at `scale` times the peak rates. Returns MoE statistics for the log."""
    set_lr(optimizers, scale)
    if 0 < grad_clip < grad_norm < math.inf:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), grad_clip, torch.tensor(grad_norm))
    for optimizer in optimizers:
        if math.isfinite(grad_norm):  # in float16 it may not be: then no optimizer steps, and the scale is lowered
            scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
    return update_router_bias(model, scale)


# ----------------------------------------------------------------------------------------------------------------
# 4. Evaluation and checkpoints


@torch.no_grad()
def evaluate(batches):
    """Mean loss on train and val. The windows are the same at every evaluation, divided among the processes."""
    model.eval()
    losses = []
    for data in (train_data, val_data):
        starts = data.eval_starts(block_size, min(max(1, round(batches * batch_size)), n_windows))
        total = torch.zeros((), device=machine.device)
        for i in range(machine.rank * batch_size, len(starts), machine.world_size * batch_size):
            rows = starts[i : i + batch_size]
            tokens = machine.to_device(data.windows(rows, block_size + 1))  # (B, T + 1)
            with machine.autocast():
                _, loss = model(tokens[:, :-1], tokens[:, 1:])
            total += loss * len(rows)
        if machine.world_size > 1:
            dist.all_reduce(total)
        losses.append(total.item() / len(starts))
    model.train()
    return losses


def sample_text(length=120):
    """A short sample, drawn with the same seed every time."""
    model.eval()
    torch.manual_seed(seed)
    prompt = tokenizer.start_ids()
    # QAT: the weights are rounded once. Ids that represent no text are never drawn
    cut = hide_padding(model, tokenizer)
    with machine.autocast(), machine.decoding(), parametrize.cached(), cut, native_decoding(model):
        ids = model.generate(torch.tensor([prompt], device=machine.device), length, temperature=0.8, top_k=200)
    return tokenizer.decode(ids[0, len(prompt) :].tolist())[:length]


def run_state():
    """Everything that a resumed run needs. All ranks must call it."""
    about = {"config": config, "tokenizer": train_data.meta["tokenizer"], "environment": environment(machine)}
    about |= {"data_fingerprint": train_data.fingerprint, "launch": setup.launch()}
    return checkpoint.run_state(model, optimizers, scaler, progress, **about)


def save(best=False):
    state = run_state()
    if main_process and all(p.isfinite().all() for p in model.parameters()):  # else they are lost: the last good stays
        checkpoint.save(out_dir, state, best=best)


def evaluate_and_save():
    """Evaluates and saves a checkpoint; then prints a sample and redraws loss.png."""
    batches = clock.eval_share * min(eval_iters, n_windows / batch_size)
    untrained = progress.step == 0 and init_from == "scratch"  # guesses, so two batches say enough
    train_loss, val_loss = evaluate(min(2, batches) if untrained else batches)
    best = val_loss < progress.best_val_loss
    if best:
        progress.best_val_loss, progress.best_step = val_loss, progress.step
    progress.evaluated = progress.step
    run_log.evaluation(train_loss, val_loss, best)
    save(best)
    run_log.send()
    with run_log.decoration("sample"):
        run_log.sample(sample_text() if main_process else "")
    model.train()
    with run_log.decoration("picture loss.png"):
        run_log.draw()
    with run_log.decoration("page run.html"):
        run_log.write_page()


# ----------------------------------------------------------------------------------------------------------------
# 5. The training loop

run_log = RunLog(out_dir, machine, model, progress, global_batch * block_size)
if message := setup.finished(config, start):
    if main_process:
        print_line(message)
    exit_all()
run_log.announce(dataset, start.notes, start.environment, start.resuming)


def trial_step():
    loss, grad_norm, *_ = forward_backward(progress.step)
    optimizer_step(0.0, grad_norm)
    return loss


def measure():
    evaluations = min(eval_iters, n_windows / batch_size) / machine.world_size
    return preflight.measure(
        machine, (model, optimizers, scaler), trial_step, lambda: evaluate(1), evaluations, run_state, out_dir,
        f"{batch_size} rows of {block_size} tokens", (train_model, get_batch(progress.step, 0)),
    )  # fmt: skip


# Trial run: it finds a device that computes wrong, out-of-memory and compiler errors now, not in an hour, and measures
# how long each part takes. Weights and optimizers are restored afterwards.
truth.check(machine, model, optimizers, rows=micro_batch * block_size)
try:
    preflight.compile_on_all(machine, train_model, get_batch(progress.step, 0))
    timing = measure()
except preflight.CompileError as error:
    preflight.fall_back_to_eager(machine, compile, error)
    model.zero_grad(set_to_none=True)
    timing = measure()

clock = Clock(
    progress, timing, max_iters=max_iters, max_minutes=max_minutes, warmup_iters=warmup_iters,
    eval_interval=eval_interval, checkpoint_minutes=checkpoint_minutes,
)  # fmt: skip
section_note = start.section_note(machine.device.type)
run_log.start(config, clock, section_note, start.resuming, (train_data, val_data), teacher_models)
if not start.resuming:
    save()  # a run can be resumed from before its first step
interrupt = Interrupt(main_process)  # Ctrl-C, SIGTERM, SIGHUP: finish the step, save, stop
readings = sync(*clock.readings(interrupt.signal))  # rank 0's clock and signal, by which all ranks decide alike

while True:
    step = progress.step
    now = clock.at(step, readings or clock.readings(interrupt.signal))  # .done, .decay, .finished, .evaluate, .save
    stop = now.signal

    if (now.evaluate or now.finished) and progress.evaluated != step and not stop:
        with clock.paused(evaluation=True):
            evaluate_and_save()
    elif now.save:
        with clock.paused():
            save()
    if now.finished or stop:
        break

    scale = min(1.0, (step + 1) / (clock.warmup + 1))  # linear warmup
    scale *= lr_scale(lr_schedule, now.decay, min_lr / max(learning_rate, 1e-30), decay_fraction)
    loss, grad_norm, *readings = forward_backward(step, lambda: clock.readings(interrupt.signal, ahead=True))
    if not math.isfinite(loss) or not (math.isfinite(grad_norm) or scaler.is_enabled()):  # the scaler skips such steps
        windows = train_data.starts(block_size, seed, np.arange(step * global_batch, (step + 1) * global_batch))
        run_log.nonfinite(loss, grad_norm, scale, get_batch(step, 0)[0], windows.tolist())
        exit_all(1)
    router_stats = optimizer_step(scale, grad_norm)
    progress.step += 1
    run_log.step(loss, grad_norm, scale, router_stats, log_interval)

if stop:
    save()
run_log.summary(stop)
exit_all(128 + stop if stop else 0)
