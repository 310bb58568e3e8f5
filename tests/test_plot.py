import cmath
import math
import struct

import pytest
import torch
from matplotlib.image import imread
from torch.nn import functional as F

from minutegpt import plot
from model import GPT, GPTConfig

KEYS = ["step", "tokens", "seconds", "lr", "grad_norm", "train_loss", "val_loss", "eval_train_loss"]


def row(step, **values):
    return (
        dict.fromkeys(KEYS)
        | {"step": step, "seconds": step / 2 if isinstance(step, int) else None, "lr": 1e-3}
        | values
    )


RUN = [
    row(0, val_loss=4.2, eval_train_loss=4.1),
    row(10, train_loss=3.0),
    row(20, train_loss=2.5, val_loss=2.6, eval_train_loss=2.5),
    row(30, train_loss=2.2, val_loss=2.4, eval_train_loss=2.1),
    row(40, train_loss=1.9, val_loss=2.5, eval_train_loss=1.8),
]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, to look into."""
    figures, save = [], plot.save

    def keep(figure, path):
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(plot, "save", keep)
    return figures


def size(path):
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", content[16:24])


def curves(ax):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines}


def texts(legend):
    return [text.get_text() for text in legend.get_texts()]


def test_loss_picture(tmp_path, drawn):
    plot.loss_picture(RUN, tmp_path / "loss.png")
    assert size(tmp_path / "loss.png") == (720, 480)
    loss, rate = drawn[0].axes
    assert curves(loss) == {
        "train, each batch": ([10, 20, 30, 40], [3.0, 2.5, 2.2, 1.9]),
        "train, evaluated": ([0, 20, 30, 40], [4.1, 2.5, 2.1, 1.8]),
        "validation": ([0, 20, 30, 40], [4.2, 2.6, 2.4, 2.5]),
        "best: 2.4000 at step 30": ([30], [2.4]),
    }
    assert set(texts(loss.get_legend())) == set(curves(loss))
    low, high = loss.get_ylim()
    assert low < 1.8 and high > 4.2
    assert rate.lines[0].get_ydata().tolist() == [1e-3] * 5
    pixels = imread(tmp_path / "loss.png")[..., :3]
    for colour in plot.COLOURS[:2]:  # both evaluated curves can be seen
        rgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (abs(pixels - rgb).max(-1) < 0.02).sum() > 200


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{}],
        [row(0)],
        [row(0, val_loss=4.2)],
        [row(0, val_loss=math.nan, train_loss=math.inf, lr=math.nan), row(1, val_loss=-math.inf)],
        [row(0, train_loss=0.0, val_loss=0.0), row(1, val_loss=-1.0)],
        [row(0, train_loss=1e-12, val_loss=1e30), row(10**9, val_loss=3)],
        [row(0, train_loss=2.5), row(1, train_loss=2.5)],
        [row(None, val_loss=1.0), row("x", val_loss="y"), row(2, val_loss=[3])],
        [row(0, val_loss=5.0, lr=0.0), row(1, val_loss=float("nan")), row(2, val_loss=4.0)],
    ],
)
def test_no_row_stops_a_picture(tmp_path, rows, recwarn):
    plot.loss_picture(rows, tmp_path / "loss.png")
    plot.compare_picture({"a": rows, "b": RUN, "c": rows}, tmp_path / "compare.png")
    assert size(tmp_path / "loss.png") == (720, 480) and size(tmp_path / "compare.png") == (1080, 480)
    assert not recwarn.list


def test_points_leaves_out_what_is_no_number():
    rows = [
        row(0),
        row(1, val_loss=2.0),
        row(2, val_loss=math.nan),
        {"step": 3},
        row(None, val_loss=1.0),
        row(5, val_loss=1),
    ]
    assert plot.points(rows, "step", "val_loss") == ([1.0, 5.0], [2.0, 1.0])


def test_compare_picture(tmp_path, drawn):
    worse = [dict(r, seconds=r["step"] * 2.0, val_loss=r["val_loss"] and r["val_loss"] + 1) for r in RUN]
    runs = {"out-$worse_$": worse, "_fast": RUN, "out-new": [row(0)]}
    plot.compare_picture(runs, tmp_path / "compare.png")
    steps, seconds = drawn[0].axes
    assert [list(line.get_xdata()) for line in steps.lines] == [[0, 20, 30, 40], [0, 20, 30, 40], []]
    assert [list(line.get_xdata()) for line in seconds.lines] == [[0, 40, 60, 80], [0, 10, 15, 20], []]
    assert list(steps.lines[1].get_ydata()) == list(seconds.lines[1].get_ydata()) == [4.2, 2.6, 2.4, 2.5]
    assert texts(seconds.get_legend()) == ["2.4000  _fast", "3.4000  out-$worse_$", "out-new: no evaluation yet"]
    plot.compare_picture({"fast": RUN}, tmp_path / "compare.png", {"$gpt2": 1.2, "bigram": 5.0}, "bits per byte")
    steps, seconds = drawn[1].axes
    assert texts(seconds.get_legend()) == ["1.2000  $gpt2", "2.4000  fast", "5.0000  bigram"]
    assert [set(line.get_ydata()) for line in steps.lines[:2]] == [{1.2}, {5.0}]
    assert steps.get_ylim()[0] < 1.2 and steps.get_ylim()[1] > 5 and steps.get_ylabel() == "loss, bits per byte"
    plot.compare_picture({}, tmp_path / "compare.png")
    plot.compare_picture({f"run {i}": RUN for i in range(20)}, tmp_path / "compare.png")
    looks = {(line.get_color(), line.get_linestyle()) for line in drawn[-1].axes[0].lines}
    assert len(looks) == 20


def test_position_picture(tmp_path, drawn):
    groups = [{"from": 1, "to": 1, "loss": 3.0}, {"from": 2, "to": 2, "loss": 2.5}, {"from": 3, "to": 12, "loss": 2.0}]
    runs = {"$rope_": groups, "learned": groups[:2]}
    plot.position_picture(runs, {"$rope_": 8, "learned": 2}, tmp_path / "by.png")
    assert size(tmp_path / "by.png") == (720, 480)
    (ax,) = drawn[0].axes
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines[::2]] == [
        ([1, 2, 6], [3.0, 2.5, 2.0]), ([1, 2], [3.0, 2.5])
    ]  # fmt: skip
    assert [list(line.get_xdata()) for line in ax.lines[1::2]] == [[8, 8], [2, 2]]
    assert texts(ax.get_legend()) == ["$rope_", "learned"]


def test_a_picture_replaces_the_one_before(tmp_path):
    plot.loss_picture([], tmp_path / "loss.png")
    before = (tmp_path / "loss.png").read_bytes()
    plot.loss_picture(RUN, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_attention_weights_of_the_classic_block_by_hand():
    """Layer 0, number by number: softmax over the past of q . k / sqrt(D), in plain python."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8)).eval()
    idx = torch.tensor([[3, 1, 4, 1, 5]])
    weights = plot.attention_weights(model, idx)
    assert weights.shape == (2, 2, 5, 5)
    parts = model.transformer
    parts.h[0].attn.c_attn.weight.data *= 40  # so that some weights are large
    weights = plot.attention_weights(model, idx)
    x = parts.h[0].ln_1(parts.wte(idx[0]) + parts.wpe.weight[:5])
    q, k, _ = (x @ parts.h[0].attn.c_attn.weight.T).tensor_split(3, dim=1)
    q, k = q.tolist(), k.tolist()
    for head in range(2):
        channels = range(head * 4, head * 4 + 4)
        for t in range(5):
            e = [math.exp(sum(q[t][c] * k[s][c] for c in channels) / 2) for s in range(t + 1)]
            expected = [value / sum(e) for value in e] + [0.0] * (4 - t)
            assert weights[0, head, t].tolist() == pytest.approx(expected, abs=1e-5)
    assert weights.max() < 1.00001 and weights[0].std() > 0.1


def test_attention_weights_of_the_fast_block_by_hand():
    """Layer 0 with rotary positions as complex numbers, QK-norm and two heads to a key, number by number."""
    torch.manual_seed(0)
    shape = dict(pos="rope", qk_norm=True, norm="rmsnorm", n_kv_head=2, n_head=4, n_embd=32)
    model = GPT(GPTConfig(block_size=16, vocab_size=11, n_layer=1, **shape)).eval()
    for p in model.parameters():
        p.data *= 20
    idx, D = torch.randint(11, (1, 9)), 8
    x = model.transformer.wte(idx[0]).detach().double()
    for _ in range(2):  # of the embedding, then before attention
        x = x / x.square().mean(1, keepdim=True).sqrt()
    out = x @ model.transformer.h[0].attn.c_attn.weight.detach().double().T  # (T, 32 + 16 + 16)

    def turned(t, first):
        row = out[t, first : first + D]
        pairs = [complex(row[c], row[c + D // 2]) * cmath.exp(-1j * t * 10000 ** (-2 * c / D)) for c in range(D // 2)]
        length = math.sqrt(sum(abs(z) ** 2 for z in pairs) / D)
        return [z / length for z in pairs]

    weights = plot.attention_weights(model, idx)
    for head in range(4):
        for t in range(9):
            q = turned(t, head * D)
            keys = [turned(s, 32 + head // 2 * D) for s in range(t + 1)]
            e = [
                math.exp(sum((a * b.conjugate()).real for a, b in zip(q, k, strict=True)) / math.sqrt(D)) for k in keys
            ]
            expected = [value / sum(e) for value in e] + [0.0] * (8 - t)
            assert weights[0, head, t].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("more", [{}, dict(pos="rope", qk_norm=True, norm="rmsnorm", n_kv_head=2)])
def test_attention_weights_are_those_the_model_uses(more):
    """Weights times values is what each layer hands to its output projection."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=11, n_layer=3, n_head=4, n_embd=32, **more)).eval()
    for p in model.parameters():
        p.data *= 4
    seen, gathered = [], []
    for block in model.transformer.h:
        block.attn.c_attn.register_forward_hook(lambda _, args, out: seen.append(out))
        block.attn.c_proj.register_forward_pre_hook(lambda _, args: gathered.append(args[0]))
    idx = torch.randint(11, (1, 16))
    weights = plot.attention_weights(model, idx)
    for layer in range(3):
        K = model.config.n_kv_head
        v = seen[layer][0, :, -K * 8 :].view(16, K, 8).transpose(0, 1).repeat_interleave(4 // K, dim=0)  # (H, T, D)
        torch.testing.assert_close((weights[layer] @ v).transpose(0, 1).reshape(1, 16, 32), gathered[layer])


def test_attention_picture(tmp_path, drawn):
    text = "a $b$\t\u4e2d\x00\n"
    weights = torch.rand(2, 3, len(text), len(text))
    plot.attention_picture(weights, list(text), tmp_path / "attention.png")
    width, height = size(tmp_path / "attention.png")
    assert width > height > 200
    assert len(drawn[0].axes) == 6
    for i, ax in enumerate(drawn[0].axes):
        layer, head = divmod(i, 3)
        assert ax.get_title() == f"layer {layer}, head {head}"
        for labels in (ax.get_xticklabels(), ax.get_yticklabels()):
            assert [label.get_text() for label in labels] == [*"a\u2423$b$\u21e5\u4e2d", "\\x00", "\u21b5"]
        assert ax.images[0].get_array().tolist() == weights[layer, head].tolist()


def test_neighbours():
    torch.manual_seed(0)
    e = torch.randn(40, 6) + 5  # the common offset would make everything alike
    e[7] = e[3] + 0.01
    ids, cosine = plot.neighbours(e, 4)
    assert ids.shape == cosine.shape == (40, 4)
    assert ids[7, 0] == 3 and ids[3, 0] == 7 and cosine[3, 0] > 0.99
    centred = e - e.mean(0)
    for i in range(40):
        alike = {j: F.cosine_similarity(centred[i], centred[j], dim=0).item() for j in range(40) if j != i}
        assert ids[i].tolist() == sorted(alike, key=lambda j: -alike[j])[:4]
        assert cosine[i].tolist() == pytest.approx(sorted(alike.values(), reverse=True)[:4], abs=1e-5)
    assert plot.neighbours(e[:3], 10)[0].shape == (3, 2)
    few = plot.neighbours(e, 4, torch.tensor([9, 7]))
    assert few[0].equal(ids[[9, 7]]) and torch.allclose(few[1], cosine[[9, 7]])


def test_embedding_picture(tmp_path, drawn):
    torch.manual_seed(0)
    embedding = torch.nn.Parameter(torch.randn(6, 5))
    plot.embedding_picture(embedding, ["a", " B", "3", "\n", "$", "\u00e9"], tmp_path / "embedding.png")
    assert size(tmp_path / "embedding.png") == (840, 840)
    names = {text.get_text(): text.get_color() for text in drawn[0].axes[0].texts}
    assert names == dict(
        zip(["a", "\u2423B", "3", "\u21b5", "$", "\u00e9"], [plot.COLOURS[i] for i in (0, 1, 2, 3, 3, 0)], strict=True)
    )


@pytest.mark.parametrize("shape", [(1, 5), (1, 1), (3, 1)])
def test_an_embedding_of_one_token_or_one_channel_has_a_picture(tmp_path, shape):
    plot.embedding_picture(torch.randn(shape), "abc"[: shape[0]], tmp_path / "embedding.png")
    assert size(tmp_path / "embedding.png") == (840, 840)
    assert plot.neighbours(torch.randn(shape), 5)[0].shape == (shape[0], shape[0] - 1)
