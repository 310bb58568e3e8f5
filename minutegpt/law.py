"""The law that the planner predicts a loss by, fitted to runs (docs/planner.md).

predict_loss(shape, steps, rows, text)
"""

import numpy as np

from minutegpt.describe import Text
from minutegpt.speed import Numbers, Shape

# Fitted by dev/fit_planner.py to results/planner-law.json and others (docs/planner.md): the loss is a multiple of
# what counting reaches with as many tokens. Sizes are in millions of weights, steps in hundreds.
LAW = {
    "rest": 0.789, "size": 0.045, "size_power": 0.429, "gain": 0.695,
    "steps": 0.0333, "steps_power": 1.67, "vocabulary": 0.0677, "context": 0.00788,
    "overfit": 0.047, "patience": 0.941, "epochs": 14.0, "dropout": 0.281,
    "no_tables": 0.23, "adamw": 0.012, "masking": 0.0724, "memory": 0.324,
    "batch": 12000.0, "noise": 0.052, "batch_power": 0.779, "overfit_power": 0.212,
    "scarcity_power": 0.365, "learning": 0.0482, "spread": 0.122,
}  # fmt: skip


def predict_loss(shape: Shape, steps: Numbers, rows: Numbers, text: Text) -> Numbers:
    """The loss after `steps` steps of `rows` rows.

    Repeated text teaches less each time (Muennighoff et al., arXiv 2305.16264), and a model that is large for its text
    overfits (an additive penalty, as in arXiv 2605.01640). In too large a step a token is worth less (McCandlish et
    al., arXiv 1812.06162).
    """
    size, unique = 12 * shape["n_layer"] * shape["n_embd"] ** 2 / 1e6, max(1.0, text.tokens * (1 - text.repeated))
    tokens = steps * rows * shape["block_size"]
    again = np.maximum(0.0, tokens / unique - 1)  # epochs after the first one
    useful = np.minimum(tokens, unique) + unique * LAW["epochs"] * (1 - np.exp(-again / LAW["epochs"]))
    batch = rows * shape["block_size"]
    useful = useful / (1 + batch / (LAW["batch"] * (tokens / 1e6) ** LAW["batch_power"]))  # the critical batch
    left = LAW["rest"] * (useful / text.counted) ** -(LAW["learning"] + LAW["gain"] * text.gain)
    left = left + LAW["size"] * size ** -LAW["size_power"] + LAW["steps"] * (steps / 100) ** -LAW["steps_power"]
    left = left + LAW["vocabulary"] * (text.vocab_size / steps) ** 0.5  # rows of rare tokens learn in few steps
    left = left + LAW["noise"] * (text.gain / 0.08) ** 2 * 1536 / batch  # few tokens say little of a varied text
    left = left + LAW["context"] * (256 / shape["block_size"] - 1)
    left = left + LAW["no_tables"] * (not shape["ngram"]) + LAW["adamw"] * (shape["optimizer"] == "adamw")
    dropout = shape["dropout"] / 0.2  # it limits overfitting, and hides a part of each token
    overfit = LAW["overfit"] * np.log1p(again / LAW["patience"])
    overfit = overfit * size ** LAW["overfit_power"] * (1e6 / unique) ** LAW["scarcity_power"]
    overfit = overfit * (1 - min(0.9, LAW["dropout"] * dropout)) * (1 - LAW["memory"] * (not shape["ngram"]))
    left = left + overfit + LAW["masking"] * dropout
    return text.counting_loss * left
