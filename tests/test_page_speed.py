"""dev/page_speed.py measures a page in Chromium."""

import json

import pytest
from harness import refused, run
from javascript import need_chromium
from test_engine import make
from test_huggingface import a_run

from minutegpt.data.tokenizer import byte_tokenizer


@pytest.mark.slow
def test_a_small_model_is_measured(tmp_path):
    need_chromium()
    place = a_run(tmp_path / "run", make(vocab_size=256), byte_tokenizer())
    done = run("dev/page_speed.py", f"--run={place}", "--repeats=1", "--new_tokens=8", "--json")
    assert done.status == 0, done.err
    found = json.loads(done.out)
    assert found["parameters"] == make(vocab_size=256).n_params()
    assert found["bytes_per_parameter"] > found["weights_bytes_per_parameter"] > 4 / 3
    assert all(value > 0 for value in found.values())
    settings = ("--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--repeats=1")
    done = run("dev/page_speed.py", *settings, "--weights=float16")
    assert "bytes per parameter" in done.out and "tokens/s" in done.out, done.err
    refused(run("dev/page_speed.py", "--weights=int3"), "int8, float16")
