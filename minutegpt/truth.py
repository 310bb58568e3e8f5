"""Whether this device computes right: what a model does, next to float64 on the CPU, before the long wait.

    check(machine, model, optimizers, rows)   # in the trial run: results, gradients and updates
    check_once(machine, model)                # sample.py, evaluate.py: results; remembered where all is right

A release of PyTorch can compute wrong on a device without any message, such as attention that sees later tokens. A run
then trains to garbage. What is wrong is named and replaced by a way that is right, or the run is refused.
minutegpt/operations.py has the operations. Weights, optimizer state and random state stay as they are.
"""

import contextlib
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from minutegpt.device import Machine, device_name
from minutegpt.distributed import worst_of_all_ranks
from minutegpt.errors import ROOT, UserError
from minutegpt.files import cache_folder, replace
from minutegpt.moe import update_router_bias
from minutegpt.operations import (
    MUON_ROUNDINGS,
    InFloat64,
    Operation,
    Place,
    attentions,
    difference,
    exact_attention,
    operations,
    optimizer_steps,
    set_attention,
    whole_model,
)
from minutegpt.optim import Muon, orthogonalize
from model import GPT, CausalSelfAttention

Optimizers = Iterable[torch.optim.Optimizer]


def check(machine: Machine, model: GPT, optimizers: Optimizers, rows: int, seed: int = 0) -> None:
    """Replaces what this device computes wrong, on all ranks alike, and prints that. All ranks must call it.

    rows: of a micro-batch, B * T. Raises UserError where there is nothing right to replace it with.
    """
    optimizers = list(optimizers)

    def list_operations() -> list[Operation]:
        attend, some = _attention_of(model), min(rows, 512 if machine.is_cpu else 2048)
        training = Place(machine.device, machine.dtype, machine.training, backward=True, attend=attend, seed=seed)
        evaluation = Place(machine.device, machine.dtype, machine.autocast, backward=False, attend=attend, seed=seed)
        found = [*operations(model.config, training, some), *optimizer_steps(optimizers, training)]
        found += [*attentions(model.config, evaluation)]
        return [*found, whole_model(model.config, training), whole_model(model.config, evaluation)]

    _mend(machine, model, optimizers, list_operations)


def check_once(machine: Machine, model: GPT, narrow: bool = False) -> None:
    """The same without gradients, before weights become `machine.dtype` (narrow) or autocast is used.

    Where all is right this is remembered: per device, dtype, PyTorch version, code and sizes of the model.
    """
    if _is_off():
        return
    code = hashlib.sha256((ROOT / "model.py").read_bytes()).hexdigest()[:16]
    about = [device_name(machine.device.type), str(machine.dtype), torch.__version__, narrow, code]
    key = json.dumps([*about, asdict(model.config)], sort_keys=True)
    path = cache_folder() / "computes-right.json"
    right: list[str] = []
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):  # missing or broken: test again
        right = [str(line) for line in json.loads(path.read_text(encoding="utf-8"))]
    if key in right:
        return

    def list_operations() -> list[Operation]:
        context = contextlib.nullcontext if narrow else machine.autocast
        place = Place(machine.device, machine.dtype, context, False, _attention_of(model), narrow)
        return [*operations(model.config, place, 64), whole_model(model.config, place)]

    if not _mend(machine, model, [], list_operations):
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps([*right[-99:], key]), encoding="utf-8")
        replace(temporary, path)


def compiled_error(
    machine: Machine, model: GPT, optimizers: Optimizers, train_model: Any, batch: tuple[Tensor, Tensor]
) -> str:
    """What compiled code computes otherwise than uncompiled code, in words; "" where nothing. All ranks must call it.

    Compared are loss and gradients of one micro-batch, and Muon's Newton-Schulz steps. Dropout draws the same on a CPU;
    elsewhere only the loss is compared, loosely.
    """
    names = ["loss", *(f"gradient of {name}" for name, _ in model.named_parameters()), "Newton-Schulz steps"]
    excess = [0.0] * len(names)
    train_model.require_backward_grad_sync = False  # each rank compares its own

    def results(function: Any) -> list[Tensor]:
        with torch.random.fork_rng(), machine.training():
            torch.manual_seed(1)
            loss = function(*batch)[1]
        (loss * (1024 if machine.dtype == torch.float16 else 1)).backward()
        grads = [torch.zeros(()) if p.grad is None else p.grad.clone() for p in model.parameters()]  # DDP's are views
        model.zero_grad(set_to_none=True)
        return [loss.detach(), *grads]

    def compare(i: int, compiled: Tensor, right: Tensor, dtype: torch.dtype, roundings: float, along: float) -> None:
        operation = Operation(names[i], list, list, dtype, roundings, along)
        excess[i] = max(excess[i], difference([compiled], [right], operation)[1])

    try:
        compiled, right = results(train_model), results(model)
        if model.config.dropout and not machine.is_cpu:
            excess[0] = abs(compiled[0].item() / right[0].item() - 1) / 0.02
            compiled = []
        for i, (one, other) in enumerate(zip(compiled, right, strict=False)):
            if not (model.config.n_expert and ".mlp." in names[i]):  # a rounding can choose another expert
                compare(i, one, other, machine.dtype, 10 + 30 * model.config.n_layer, 1)
        for muon in (o for o in optimizers if isinstance(o, Muon) and o.orthogonalize is not orthogonalize):
            for shape, n in Counter(p.shape for p in muon.param_groups[0]["params"]).items():
                x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(1))
                x = x.to(machine.device, muon.ns_dtype)
                compare(-1, muon.orthogonalize(x), orthogonalize(x), muon.ns_dtype, *MUON_ROUNDINGS)
    except RuntimeError as error:
        if "memory" not in str(error):  # uncompiled, the step may need more of it than there is
            raise
    update_router_bias(model, 0.0)  # forgets which experts were chosen
    worst = worst_of_all_ranks(excess)
    return next((f"it computes wrong: the {name}" for name, e in zip(names, worst, strict=True) if e > 1), "")


def _is_off() -> bool:
    return os.environ.get("MINUTEGPT_TRUTH") == "off"


def _wrong(tested: list[Operation]) -> tuple[dict[str, float], bool]:
    """The operations that are off on any rank by more than rounding explains, with how much; and whether all ran."""
    errors: list[float] = []
    complete = True
    for operation in tested:
        try:
            found = operation.run()
            error = difference(found, operation.exact(), operation)
            if error[1] > 1 and operation.itself:  # an edit of model.py, that the device computes right?
                with contextlib.suppress(RuntimeError), InFloat64():  # RuntimeError: not there in float64
                    error = min(error, difference(found, operation.itself(), operation), key=lambda pair: pair[1])
            errors += error
        except RuntimeError:  # not there, or no memory: the training step meets it, and can say it better
            errors += 0.0, 0.0
            complete = False
    errors = worst_of_all_ranks(errors)
    off, excess = errors[::2], errors[1::2]
    return {op.name: a for op, a, b in zip(tested, off, excess, strict=True) if b > 1}, complete


def _mend(machine: Machine, model: GPT, optimizers: list[torch.optim.Optimizer], list_operations: Any) -> bool:
    """Replaces until nothing is wrong. Returns whether everything could be tested, and was right at once."""
    right = True
    while not _is_off():
        wrong, complete = _wrong(list_operations())
        right = right and complete and not wrong
        if not wrong:
            break
        what = ", ".join(f"{name} ({off:.2g} off)" for name, off in wrong.items())
        where = f"{device_name(machine.device.type)}, PyTorch {torch.__version__}"
        dtype = str(machine.dtype).removeprefix("torch.")
        remedy = _remedy(wrong, machine, model, optimizers)
        if not remedy:
            other = "" if machine.is_cpu else ", or type --device=cpu"
            raise UserError(
                f"this device computes wrong in {dtype}: {what}. Shares are of the right result; {where}. Install "
                f"another version of PyTorch{other}. MINUTEGPT_TRUTH=off runs without this test"
            )
        if machine.rank == 0:
            print(f"warning: wrong in {dtype} on {where}: {what}. Instead: {remedy}", file=sys.stderr)
    return right


def _remedy(wrong: dict[str, float], machine: Machine, model: GPT, optimizers: Optimizers) -> str:
    """Replaces one thing, and returns the replacement in words; "" where nothing is left to replace."""
    fused = [group for optimizer in optimizers for group in optimizer.param_groups if group.get("fused")]
    muons = [optimizer for optimizer in optimizers if isinstance(optimizer, Muon)]
    if any("attention" in name for name in wrong) and _attention_of(model) is not exact_attention:
        set_attention(model, exact_attention)
        return "attention by plain matrix products, which is slower and takes more memory"
    if "AdamW's fused step" in wrong and fused:
        for optimizer in optimizers:
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]  # a gradient scaler asks
        for group in fused:
            group |= {"fused": False, "foreach": False}
        return "AdamW without its fused kernel"
    if "Muon's step" in wrong and any(muon.ns_dtype != torch.float32 for muon in muons):
        for muon in muons:
            muon.ns_dtype = torch.float32
        return "Muon in float32"
    if machine.dtype != torch.float32:
        machine.dtype = torch.float32
        machine.reasons["dtype"] = "float32: half precision computes wrong here"
        for muon in muons:
            muon.ns_dtype = torch.float32
        set_attention(model, CausalSelfAttention.attend)  # may be right in float32
        return "float32"
    return ""


def _attention_of(model: GPT) -> Any:
    return next(module.attend for module in model.modules() if isinstance(module, CausalSelfAttention))
