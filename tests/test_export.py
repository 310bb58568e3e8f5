"""export.py as a user runs it: transformers loads what it writes, and nothing is replaced unasked."""

import json

import pytest
import torch
from harness import refused, run
from test_huggingface import a_run, agree, make, put, their_gpt2, transformers
from torch import nn

from minutegpt.data.dataset import open_split
from minutegpt.data.tokenizer import byte_tokenizer
from minutegpt.huggingface import weights_file


def test_the_script_exports_and_overwrites_nothing_unasked(tmp_path, offline):
    place = a_run(tmp_path / "run", make(vocab_size=256), byte_tokenizer())
    assert run("export.py", f"--out_dir={place}").status == 0
    hf = place / "hf"
    before = {path: path.read_bytes() for path in hf.iterdir()}
    assert {path.name for path in before} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    agree(make(vocab_size=256), transformers.AutoModelForCausalLM.from_pretrained(hf).eval())
    (hf / "model.safetensors").write_bytes(b"mine")
    refused(run("export.py", f"--out_dir={place}"), "--overwrite", "--to=NAME")
    assert (hf / "model.safetensors").read_bytes() == b"mine"
    assert run("export.py", f"--out_dir={place}", "--overwrite").status == 0
    assert {path: path.read_bytes() for path in hf.iterdir()} == before
    assert run("export.py", f"--out_dir={place}", "--format=safetensors").status == 0
    whole = weights_file(make(vocab_size=256), byte_tokenizer().to_json())
    assert (place / "model.safetensors").read_bytes() == whole
    refused(run("export.py", f"--out_dir={place}", "--format=gguf"), "hf, safetensors, html, minutegpt")


def test_an_export_that_fails_is_no_model(tmp_path, offline):
    place = a_run(tmp_path / "run", make(vocab_size=256), byte_tokenizer())
    put(tmp_path / "to", make(vocab_size=256))
    (tmp_path / "to" / "tokenizer.json").mkdir()  # in the way
    refused(run("export.py", f"--out_dir={place}", f"--to={tmp_path / 'to'}", "--overwrite"), "cannot write")
    assert not (tmp_path / "to" / "config.json").exists()
    assert not list((tmp_path / "to").glob("*.tmp"))
    (tmp_path / "file").write_bytes(b"")
    refused(run("export.py", f"--out_dir={place}", f"--to={tmp_path / 'file' / 'hf'}"), "--to=NAME")


def test_gpt2_becomes_a_run_to_sample_and_evaluate(tmp_path, data, offline):
    """And its own loss is what transformers computes."""
    val = open_split(data / "small", "val")
    theirs = their_gpt2(tmp_path / "gpt2", vocab_size=val.meta["tokenizer"]["vocab_size"])
    to = tmp_path / "out-gpt2"
    words = ("--format=minutegpt", f"--out_dir={tmp_path / 'gpt2'}", f"--to={to}", "--dataset=small")
    done = run("export.py", *words, data=data)
    assert done.status == 0, done.err
    refused(run("export.py", *words, data=data), "ckpt-best.pt", "--overwrite")
    done = run("evaluate.py", f"--out_dir={to}", "--dataset=small", "--json", "--device=cpu", data=data)
    assert done.status == 0, done.err
    idx = torch.tensor(val.tokens(0, len(val)).astype(int))
    with torch.no_grad():
        total = sum(
            nn.functional.cross_entropy(theirs(x[None, :-1]).logits[0], x[1:], reduction="sum").item()
            for x in (idx[i : i + 49] for i in range(0, len(idx) - 1, 48))
        )
    assert json.loads(done.out)["loss"] == pytest.approx(total / (len(idx) - 1), rel=1e-5)
    assert run("sample.py", f"--out_dir={to}", "--max_new_tokens=5", "--device=cpu").status == 0
