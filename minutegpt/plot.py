"""Pictures: the loss of a run, several runs side by side, attention weights, token embeddings.

All are PNG files with 120 dots per inch, drawn without a display and without matplotlib's global state.
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from torch import Tensor
from torch.nn import functional as F

from minutegpt.data.tokenizer import Tokenizer
from minutegpt.errors import UserError
from minutegpt.files import atomic_write

if TYPE_CHECKING:
    from model import GPT

MAX_PROMPT = 64  # tokens; larger attention maps cannot be read
MAX_VOCABULARY = 300  # tokens; larger vocabularies are drawn in part
INK, GREY = "#333333", "#a0a0a0"
# colour-blind readers can distinguish these (Okabe and Ito)
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#000000"]


def points(rows: Iterable[dict[str, Any]], x: str, y: str) -> tuple[list[float], list[float]]:
    """The finite pairs (row[x], row[y]) of log rows; nulls, NaN, infinities and missing keys are left out."""

    def number(value: Any) -> bool:
        return isinstance(value, int | float) and math.isfinite(value)

    pairs = [(row[x], row[y]) for row in rows if number(row.get(x)) and number(row.get(y))]
    return [float(a) for a, _ in pairs], [float(b) for _, b in pairs]


def new_axes(figure: Figure, rows: int = 1, columns: int = 1, **how: Any) -> list[Axes]:
    """rows x columns plain axes: no box, a light grid."""
    axes = figure.subplots(rows, columns, squeeze=False, **how).flatten().tolist()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(GREY)
        ax.grid(color="#e6e6e6", linewidth=0.7)
        ax.tick_params(colors=INK, labelsize=8)
        ax.set_axisbelow(True)
    return axes


def loss_axis(ax: Axes, values: Sequence[float]) -> None:
    """Logarithmic, so that the first steps do not flatten the rest; ticks in plain numbers."""
    ax.set_ylabel("loss, nats per token", color=INK)
    values = [value for value in values if value > 0]
    if not values:
        return
    low, high = min(values), max(values)
    ax.set_yscale("log")
    ax.set_ylim(low / 1.04, max(high, low * 1.2) * 1.04)
    if high < 30 * low:  # powers of ten would be one tick or none
        ax.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.minorticks_off()


def save(figure: Figure, path: str | Path) -> None:
    """Writes the figure as a PNG file; after an error there is no file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # such a character is drawn as a box
        with atomic_write(path) as file:
            figure.savefig(file, format="png")


def draw_text(ax: Axes, x: float, y: float, text: str, **how: Any) -> None:
    """Draws text as it is: a $ in the name of a run or in a token does not start a formula."""
    ax.annotate(text, (x, y), parse_math=False, **how)


def loss_picture(rows: list[dict[str, Any]], path: str | Path) -> None:
    """A run's losses and learning rate over its steps. rows: the objects of log.jsonl; nulls are skipped."""
    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    loss, rate = new_axes(figure, 2, sharex=True, height_ratios=[4, 1])
    drawn: list[float] = []
    styles = {
        "train_loss": dict(label="train, each batch", color="#9ecae1", linewidth=1),
        "eval_train_loss": dict(label="train, evaluated", color=COLOURS[0], linewidth=1.5, marker=".", markersize=4),
        "val_loss": dict(label="validation", color=COLOURS[1], linewidth=1.8, marker=".", markersize=4),
    }
    for key, style in styles.items():
        steps, values = points(rows, "step", key)
        if values:
            loss.plot(steps, values, **style)  # type: ignore[arg-type]
            drawn += values
    loss_axis(loss, drawn)
    steps, values = points(rows, "step", "val_loss")
    if values:
        best = min(range(len(values)), key=values.__getitem__)
        label = f"best: {values[best]:.4f} at step {steps[best]:.0f}"
        star = dict(marker="*", markersize=13, color=COLOURS[1], markeredgecolor="white", linestyle="none")
        loss.plot(steps[best], values[best], label=label, zorder=3, **star)  # type: ignore[arg-type]
    if drawn:
        loss.legend(frameon=False, fontsize=8, labelcolor=INK)
    else:
        draw_text(loss, 0.5, 0.5, "no evaluation yet", xycoords="axes fraction", ha="center", color=GREY)
    rate.plot(*points(rows, "step", "lr"), color=GREY, linewidth=1.2)
    rate.set_ylim(bottom=0)
    rate.set_ylabel("learning\nrate", color=INK, fontsize=8)
    rate.set_xlabel("step", color=INK)
    rate.yaxis.set_major_locator(MaxNLocator(2))
    rate.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    save(figure, path)


def compare_picture(
    runs: dict[str, list[dict[str, Any]]],
    path: str | Path,
    levels: dict[str, float] | None = None,
    unit: str = "nats per token",
) -> None:
    """The validation losses of several runs, {name: rows of log.jsonl}, over their steps and their seconds.

    levels: {name: loss} of models without a curve, such as GPT-2 or bigrams; each becomes a horizontal line.
    """
    levels = levels or {}
    figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
    axes = new_axes(figure, 1, 2, sharey=True)
    values = [value for rows in runs.values() for value in points(rows, "step", "val_loss")[1]]
    loss_axis(axes[0], [*values, *levels.values()])
    axes[0].set_ylabel(f"loss, {unit}", color=INK)
    axes[1].tick_params(labelleft=False)
    handles = []
    for i, (name, value) in enumerate(levels.items()):
        style = dict(color=GREY, linestyle=["--", ":", "-."][i % 3], linewidth=1.2)
        line = [ax.axhline(value, **style) for ax in axes][1]  # type: ignore[arg-type]
        handles.append((value, f"{value:.4f}  {name}", line))
    for i, (name, rows) in enumerate(runs.items()):
        style = dict(color=COLOURS[i % len(COLOURS)], linestyle=["-", "--", ":"][i // len(COLOURS) % 3])
        for ax, key in zip(axes, ("step", "seconds"), strict=True):
            x, y = points(rows, key, "val_loss")
            (line,) = ax.plot(x, y, marker=".", markersize=4, linewidth=1.6, **style)  # type: ignore[arg-type]
        best = min(points(rows, "step", "val_loss")[1], default=math.inf)
        handles.append((best, f"{best:.4f}  {name}" if best < math.inf else f"{name}: no evaluation yet", line))
    axes[0].set_xlabel("step", color=INK)
    axes[1].set_xlabel("seconds of training", color=INK)
    if handles:
        handles.sort(key=lambda handle: handle[0])  # the best first
        legend = axes[1].legend(
            [line for _, _, line in handles],
            [text for _, text, _ in handles],
            title="best validation loss",
            frameon=False,
            fontsize=8,
            title_fontsize=8,
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    save(figure, path)


def position_picture(runs: dict[str, list[dict[str, Any]]], trained: dict[str, int], path: str | Path) -> None:
    """The loss over the number of tokens before, on a scale of powers of two.

    runs: {name: groups of `loss_by_context`}. trained: {name: the context that the model was trained with}, which a
    dotted line marks in the run's colour.
    """
    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    (ax,) = new_axes(figure)
    for i, (name, groups) in enumerate(runs.items()):
        colour = COLOURS[i % len(COLOURS)]
        middles = [math.sqrt(group["from"] * group["to"]) for group in groups]
        ax.plot(middles, [group["loss"] for group in groups], color=colour, marker=".", linewidth=1.6)
        ax.axvline(trained[name], color=colour, linestyle=":", linewidth=1)
    loss_axis(ax, [group["loss"] for groups in runs.values() for group in groups])
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set_xlabel("tokens before; dotted: the training context", color=INK)
    for text in ax.legend(ax.lines[::2], list(runs), frameon=False, fontsize=8, labelcolor=INK).get_texts():
        text.set_parse_math(False)
    save(figure, path)


def attention_weights(model: "GPT", idx: Tensor) -> Tensor:
    """The attention weight of each position to each earlier one: idx (1, T) -> (L, H, T, T). Each row sums to 1.

    They are recorded while the model runs, so they include rotary positions, QK-norm and shared keys.
    """
    from minutegpt.probe import forward_with_attention  # ablate.py draws while model.py may be broken

    return torch.cat(forward_with_attention(model, idx)[1]).cpu()  # (L, H, T, T), as B is 1


def visible(token: str) -> str:
    """A token's text for a picture, with symbols for white space and control characters."""
    symbols = {" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5"}
    return "".join(symbols.get(c) or (c if c.isprintable() else f"\\x{ord(c):02x}") for c in token)


def attention_picture(weights: Tensor, tokens: Sequence[str], path: str | Path) -> None:
    """The attention weights of each head as a map, one row of maps per layer. In a map: row = query, column = key.

    weights: (L, H, T, T) from `attention_weights`; tokens: the text of each of the T tokens.
    """
    L, H, T = weights.shape[:3]
    side = max(2.4, 0.11 * T)  # inches per map: room for a letter per token
    figure = Figure(figsize=(H * side, L * (side + 0.2)), dpi=120, layout="constrained")
    labels = [visible(token) for token in tokens]
    for i, ax in enumerate(new_axes(figure, L, H)):
        layer, head = divmod(i, H)
        ax.grid(False)
        ax.imshow(weights[layer, head].numpy(), cmap="Blues", vmin=0, vmax=1)
        ax.set_title(f"layer {layer}, head {head}", fontsize=8, color=INK)
        ax.set_xticks(range(T), labels, fontsize=6, rotation=90 if max(map(len, labels)) > 1 else 0)
        ax.set_yticks(range(T), labels, fontsize=6)
        ax.tick_params(length=0, pad=1)
        for text in (*ax.get_xticklabels(), *ax.get_yticklabels()):
            text.set_parse_math(False)
    save(figure, path)


def save_attention_maps(model: "GPT", tokenizer: Tokenizer, idx: Tensor, path: str | Path) -> None:
    """Draws the attention weights of a prompt, idx (T,), for sample.py. Raises UserError for a long prompt."""
    most = MAX_PROMPT if model.config.pos == "rope" else min(MAX_PROMPT, model.config.block_size)
    if len(idx) > most:
        raise UserError(
            f"the prompt has {len(idx)} tokens, and attention maps can be read up to {most}. Type a shorter "
            "--start, or leave out --attention_plot"
        )
    attention_picture(attention_weights(model, idx[None]), [tokenizer.decode([i]) for i in idx.tolist()], path)


def neighbours(embedding: Tensor, k: int = 5, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k nearest tokens of each of ids (default: all): embedding (V, C) -> ids and cosines (n, k), nearest first.

    The mean over the vocabulary is subtracted first, because all tokens share it.
    """
    ids = torch.arange(len(embedding), device=embedding.device) if ids is None else ids
    e = F.normalize(embedding.detach().float() - embedding.detach().float().mean(0), dim=1)  # (V, C)
    cosine = (e[ids] @ e.T).scatter(1, ids[:, None], -2.0)  # (n, V), without the token itself
    best = cosine.topk(min(k, len(e) - 1))
    return best.indices, best.values


def save_embedding_map(model: Any, tokenizer: Tokenizer, idx: Tensor, path: str | Path) -> str:
    """Draws the token embedding and returns a table of nearest tokens, for sample.py.

    A vocabulary of more than MAX_VOCABULARY tokens is reduced to those of the prompt idx (T,) and their neighbours.
    """
    embedding = model.transformer.wte.weight[: tokenizer.vocab_size].detach()  # (V, C), without padding
    ids = torch.arange(len(embedding), device=embedding.device)
    if len(embedding) > MAX_VOCABULARY:
        ids = idx.unique()
    near, cosine = neighbours(embedding, 5, ids)  # (n, 5) each
    shown = torch.cat((ids, near.flatten())).unique()  # (m,)
    names = {i: tokenizer.decode([i]) for i in shown.tolist()}
    embedding_picture(embedding[shown], list(names.values()), path)
    return "\n".join(
        f"{visible(names[i]):>12}  " + "  ".join(f"{visible(names[j])} {c:.2f}" for j, c in zip(js, cs, strict=True))
        for i, js, cs in zip(ids.tolist(), near.tolist(), cosine.tolist(), strict=True)
    )


def embedding_picture(embedding: Tensor, tokens: Sequence[str], path: str | Path) -> None:
    """The token embedding (V, C) in the plane of its two principal components. A line joins each token to its nearest.

    tokens: the text of each of the V tokens. More than a few hundred cannot be read: pass some rows only.
    """
    e = embedding.detach().float().cpu()
    e = F.normalize(e - e.mean(0), dim=1)
    _, _, directions = torch.linalg.svd(e - e.mean(0), full_matrices=False)
    xy = F.pad(e @ directions[:2].T, (0, max(0, 2 - len(directions)))).numpy()  # (V, 2)
    figure = Figure(figsize=(7, 7), dpi=120, layout="constrained")
    (ax,) = new_axes(figure)
    ax.scatter(xy[:, 0], xy[:, 1], s=0)  # sets the limits of the axes
    for i, j in enumerate(neighbours(e, 1)[0].flatten().tolist()):
        ax.plot(xy[[i, j], 0], xy[[i, j], 1], color="#dddddd", linewidth=0.8, zorder=1)
    kinds = (str.islower, str.isalpha, str.isdigit)
    for (x, y), token in zip(xy.tolist(), tokens, strict=True):
        kind = next((i for i, test in enumerate(kinds) if test(token.strip())), len(kinds))
        draw_text(ax, x, y, visible(token), ha="center", va="center", color=COLOURS[kind], fontsize=10)
    ax.set_xlabel("blue: small letters, red: other letters, green: digits, pink: the rest", color=INK, fontsize=8)
    save(figure, path)
