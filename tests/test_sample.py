"""sample.py as a user runs it, on tiny models that have learned a line by heart."""

import os
import re
import signal
import subprocess
import sys

import harness
import pytest
import torch
from harness import ROOT, make_dataset, make_run

from minutegpt.data.tokenizer import byte_tokenizer, char_tokenizer, train_bpe
from model import GPT, GPTConfig

posix = pytest.mark.skipif(os.name == "nt", reason="POSIX only")
FOX = "the quick brown fox jumps over the lazy dog.\n"
CAFE = "naïve café ☕ in 東京 🦊.\n"
SHAPE = GPTConfig(block_size=32, n_layer=2, n_head=2, n_embd=32)


def gpt(vocab_size, **settings):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**vars(SHAPE), "vocab_size": vocab_size, **settings}))


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A folder with four runs: fox (char), cafe (byte), bpe (padded vocabulary, rotary, fewer key heads), noline."""
    folder = tmp_path_factory.mktemp("house")
    fox, cafe, noline = char_tokenizer(FOX), byte_tokenizer(), char_tokenizer("abc ")
    bpe = train_bpe([FOX], 270)
    make_run(folder / "fox", gpt(fox.vocab_size), fox, fox.encode(FOX * 9), "fox")
    make_run(folder / "cafe", gpt(256), cafe, cafe.encode(CAFE * 9), "cafe")
    shape = gpt(320, pos="rope", n_kv_head=1)  # more rows than the vocabulary, which is padded so
    make_run(folder / "bpe", shape, bpe, [*bpe.encode(FOX), bpe.end_token] * 9, "bpe", steps=60)
    make_run(folder / "noline", gpt(4), noline, noline.encode("abc " * 30), "noline", steps=30)
    return folder


@pytest.fixture
def sample(house):
    """Runs sample.py in the house; the text on standard output without its last line feed."""

    def run(run="fox", *argv, stdin="", temperature="0"):
        done = harness.run(
            "sample.py", f"--out_dir={run}", f"--temperature={temperature}", "--max_new_tokens=50", *argv,
            stdin=stdin, cwd=house,
        )  # fmt: skip
        assert done.status == 0, done.err
        assert done.out.endswith("\n")
        return done.out[:-1]

    return run


def start(house, *argv, **how):
    """sample.py started the ordinary way, in a process of its own."""
    command = [sys.executable, str(ROOT / "sample.py"), *argv]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"} | how.pop("env", {})
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | how
    return subprocess.Popen(command, cwd=house, env=env, **streams)


def bash(house, line):
    """Runs a line in which {sample} is sample.py with the run fox."""
    sample = f"{sys.executable} {ROOT / 'sample.py'} --out_dir=fox --temperature=0 --max_new_tokens=40"
    return subprocess.run(
        ["bash", "-c", line.replace("{sample}", sample)], cwd=house, capture_output=True, text=True,
        stdin=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


# ---------------------------------------------------------------------------------------- the text


def test_the_golden_text(house):
    """A real process; beyond the context, so that the cache was full and filled again."""
    out, err = start(
        house, "--out_dir=fox", "--start=the quick", "--temperature=0", "--max_new_tokens=81"
    ).communicate()
    assert out.decode() == FOX + FOX + "\n"
    assert re.fullmatch(r"[\d.]+k parameters on cpu; key-value cache of 16\.9kB\n", err.decode())  # 2*2*33*32*4 bytes


@pytest.mark.slow
def test_compiled_it_is_the_same_text(house):
    plain = start(house, "--out_dir=fox", "--temperature=0", "--max_new_tokens=60")
    compiled = start(house, "--out_dir=fox", "--temperature=0", "--max_new_tokens=60", "--compile=true")
    text, (same, err) = plain.communicate()[0], compiled.communicate()
    assert compiled.returncode == 0 and same == text and b"compiled the decoding step in" in err


def test_a_start_in_a_config_file_is_used_without_a_terminal(house):
    """start() reads from /dev/null, as cron and CI do."""
    (house / "mine.py").write_text('start = "the quick"\nout_dir = "fox"\n')
    out, _ = start(house, "mine.py", "--temperature=0", "--max_new_tokens=4").communicate()
    assert out == b"the quick bro\n"


def test_one_seed_one_text(sample):
    texts = [sample("fox", f"--seed={seed}", temperature="2") for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_the_model_that_has_the_lowest_loss_is_taken_unless_the_latest_is_asked_for(sample, house, tmp_path):
    from minutegpt.checkpoint import read_checkpoint, save

    best = read_checkpoint(house / "fox" / "ckpt.pt")
    save(tmp_path, best, best=True)
    save(tmp_path, best | {"model": {name: torch.zeros_like(w) for name, w in best["model"].items()}})
    assert sample(tmp_path, "--start=the q", "--max_new_tokens=4") == "the quick"
    assert sample(tmp_path, "--start=the q", "--max_new_tokens=4", "--ckpt=latest") == "the q\n\n\n\n"


@pytest.mark.slow
def test_compiled_a_padded_vocabulary_is_cut_too(house):
    argv = ("--out_dir=bpe", "--start=the", "--temperature=0", "--max_new_tokens=40")
    plain, compiled = start(house, *argv), start(house, *argv, "--compile=true")
    text, (same, err) = plain.communicate()[0], compiled.communicate()
    assert compiled.returncode == 0 and same == text, err
    drawn = start(house, "--out_dir=bpe", "--compile=true", "--temperature=100", "--top_k=0", "--num_samples=20")
    out, err = drawn.communicate()
    assert drawn.returncode == 0 and len(out) > 1000, err


def test_several_samples_come_in_one_batch(sample):
    text = sample("fox", "--start=the lazy", "--num_samples=3", "--max_new_tokens=5")
    assert text == "\n---------------\n".join(["the lazy dog."] * 3)
    drawn = sample("fox", "--num_samples=3", "--max_new_tokens=20", temperature="3").split("\n---------------\n")
    assert len(set(drawn)) == 3


def test_top_k_above_the_vocabulary_and_zero_are_both_off(sample):
    texts = [sample("fox", f"--top_k={k}", temperature="3") for k in (0, 29, 30, 10**9)]
    assert len(set(texts)) == 1
    assert sample("fox", "--top_k=1", temperature="3") == sample("fox")


def test_top_p_and_repetition_penalty_reach_the_model(sample):
    assert sample("fox", "--top_p=0.01", temperature="3") == sample("fox")
    text = sample("fox", "--start=the", "--repetition_penalty=100", "--max_new_tokens=8")
    assert len(set(text)) == len(text) == 11


def test_no_new_tokens_and_the_other_dtype(sample):
    assert sample("fox", "--start=the", "--max_new_tokens=0") == "the"
    assert sample("fox", "--start=the quick", "--max_new_tokens=6", "--dtype=bfloat16") == "the quick brown"


@pytest.mark.parametrize(
    ("stop", "text"),
    [("fox", "the quick brown "), (".", FOX[:-2]), (" fox ju", "the quick brown"), ("dog!", FOX), ("k b", "the quic")],
)
def test_stop_ends_before_its_text_and_never_shows_half_of_it(sample, stop, text):
    assert sample("fox", "--start=the quic", f"--stop={stop}", "--max_new_tokens=37") == text


def test_stop_holds_for_each_sample(sample):
    text = sample("fox", "--start=the lazy", "--num_samples=2", "--stop=g.")
    assert text == "the lazy do\n---------------\nthe lazy do"


@pytest.mark.parametrize(
    ("prompt", "stop", "text"),
    [
        ("the quick b", "brown", "the quick b"),  # nothing is printed after the prompt
        ("the quick", "quick brown", "the quick"),
        ("the quick", "the quick brown", "the quick"),
        ("the quick", "quick brown F", FOX),
        ("lazy", "lazy dog", "lazy"),  # longer than the prompt
        ("the quick", "fox jumps over", "the quick brown "),
        ("lazy", "dog.\nthe q", "lazy "),
        (FOX, "fox", FOX + "the quick brown "),  # the one in the prompt ends nothing
    ],
)
def test_a_stop_text_may_begin_in_the_prompt(sample, prompt, stop, text):
    new = len(text) - len(prompt) if stop.endswith("F") else 50
    assert sample("fox", f"--start={prompt}", f"--stop={stop}", f"--max_new_tokens={new}") == text


def test_a_new_line_can_be_typed(sample):
    assert sample("fox", r"--start=dog.\nthe", "--max_new_tokens=6") == "dog.\nthe quick"
    assert sample("fox", "--start=the quick", r"--stop=dog.\n") == "the quick brown fox jumps over the lazy "
    assert sample("cafe", r"--start=a\n\t\x", "--max_new_tokens=0") == "a\n\t\\x"
    assert sample("cafe", r"--start=a\r\nb", "--max_new_tokens=0").encode() in (b"a\r\nb", b"a\nb")
    assert sample("cafe", r"--start=a\\n", "--max_new_tokens=0") == r"a\n"  # a backslash is typed twice


# ---------------------------------------------------------------------------------------- the prompt


def test_prompts(sample, tmp_path):
    file = tmp_path / "prompt ö.txt"
    file.write_bytes(b"the quick")
    brown = "the quick brown"
    more = "--max_new_tokens=6"
    assert sample("fox", "--start=the quick", more) == brown
    assert sample("fox", "--start", "the quick", more) == brown
    assert sample("fox", f"--start=FILE:{file}", more) == brown
    assert sample("fox", "--start=-", more, stdin="the quick") == brown
    assert sample("fox", more, stdin="the quick\n") == brown  # as echo pipes it
    assert sample("fox", more, stdin=b"\xef\xbb\xbfthe quick\r\n") == brown  # as Windows does
    assert sample("fox", "--start=the lazy", more, stdin="the quick") == "the lazy dog.\n"  # what is typed comes first
    file.write_bytes(b"dog.\n")
    assert sample("fox", f"--start=FILE:{file}", more) == "dog.\nthe qu"  # a file is taken as it is


@pytest.mark.parametrize("kind", ["char", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("byte", "bpe"))])
def test_a_model_of_windows_line_ends_gets_them(house, tmp_path, kind):
    """Its text has CRLF alone: a prompt that is read keeps its own, and for the other models they become LF."""
    text = "the quick brown fox\r\njumps over a lazy dog\r\n"
    tokenizer = {"char": char_tokenizer(text), "byte": byte_tokenizer(), "bpe": train_bpe([text * 9], 280)}[kind]
    run = tmp_path / "crlf"
    make_run(run, gpt(tokenizer.vocab_size), tokenizer, tokenizer.encode(text * 9), "crlf", steps=250)
    prompt = run / "prompt.txt"
    prompt.write_bytes(b"brown fox\r\njumps")
    more = "--max_new_tokens=5"
    raw = start(house, f"--out_dir={run}", f"--start=FILE:{prompt}", more, "--temperature=0").communicate()[0]
    assert raw.startswith(b"brown fox\r\njumps over")
    piped = start(house, f"--out_dir={run}", more, "--temperature=0", stdin=subprocess.PIPE)
    assert piped.communicate(b"brown fox\r\njumps\r\n")[0].startswith(b"brown fox\r\njumps over")
    if kind == "byte":
        prompt.write_bytes(b"na\r\nna")
        raw = start(house, "--out_dir=cafe", f"--start=FILE:{prompt}", "--max_new_tokens=0").communicate()[0]
        assert raw == b"na\nna\n"


@posix
@pytest.mark.parametrize(
    "loop",
    [
        "while read -r word; do {sample} --stop=$word; done < words.txt",
        pytest.param(
            "while read -r word; do timeout 100 {sample} --stop=$word; done < words.txt", marks=pytest.mark.slow
        ),
        pytest.param("cat words.txt | while read -r word; do {sample} --stop=$word; done", marks=pytest.mark.slow),
        pytest.param(
            "cat words.txt | while read -r word; do timeout 100 {sample} --stop=$word; done", marks=pytest.mark.slow
        ),
    ],
)
def test_a_list_that_a_shell_loop_reads_is_no_prompt(house, loop):
    if "cat" in loop and not os.path.exists("/proc/self/fd"):
        pytest.skip("without /proc a shared pipe is not recognised")
    (house / "words.txt").write_text("quick\nfox\nlazy\n", encoding="utf-8")
    done = bash(house, loop)
    assert done.stdout == "the \nthe quick brown \nthe quick brown fox jumps over the \n", done
    assert "Type --start=- to use it" in done.stderr


@posix
@pytest.mark.parametrize(
    "pipe",
    [
        "echo the quick | {sample}", "{sample} < prompt.txt", "cat prompt.txt | {sample}",
        "echo the quick | timeout 100 {sample}", "echo the quick | (true; {sample} --start=-; true)",
    ],
)  # fmt: skip
def test_a_text_that_is_piped_into_it_is_the_prompt(house, pipe):
    (house / "prompt.txt").write_text("the quick\n", encoding="utf-8")
    done = bash(house, pipe.replace("{sample}", "{sample} --max_new_tokens=6"))
    assert done.stdout == "the quick brown\n" and done.returncode == 0, done


def test_an_empty_prompt_starts_from_a_new_line(sample):
    assert sample("fox", "--max_new_tokens=9") == "the quick"
    assert sample("fox", "--start=", "--max_new_tokens=9", stdin="unread") == "the quick"
    assert len(sample("noline", "--max_new_tokens=9")) == 9  # a vocabulary that has no new line


def test_a_prompt_longer_than_the_context(sample):
    assert sample("fox", "--start=" + FOX * 3 + "the quick", "--max_new_tokens=6") == FOX * 3 + "the quick brown"


def test_a_character_made_of_several_tokens_is_shown_whole(sample):
    text = sample("cafe", "--start=na", f"--max_new_tokens={len((CAFE * 2).encode()) - 2}")
    assert text == CAFE * 2
    ends = {sample("cafe", "--start=in ", f"--max_new_tokens={n}") for n in range(7)}
    assert ends == {"in ", "in 東", "in 東京"}  # what would end inside a character ends before it
    assert sample("cafe", "--start=caf", "--stop=☕", "--max_new_tokens=40") == "café "


def test_a_padded_vocabulary_gives_no_ids_that_stand_for_nothing(sample):
    text = sample("bpe", "--num_samples=20", "--top_k=0", temperature="100")
    assert len(text) > 1000  # the 50 rows of padding would be drawn by now
    assert sample("bpe", "--start=the quick", "--stop=.") == FOX[:-2]


def test_the_end_token_begins_a_text_and_ends_it(sample):
    assert sample("bpe") == FOX
    assert sample("bpe", "--num_samples=2") == FOX + "\n---------------\n" + FOX


# ---------------------------------------------------------------------------------------- looking inside


def test_fewer_key_heads_make_a_smaller_cache(house):
    from minutegpt.data.tokenizer import char_tokenizer
    from model import KVCache

    sizes = {}
    for heads in (1, 2):
        model = gpt(29, n_kv_head=heads)
        if not (house / f"kv{heads}").exists():
            make_run(house / f"kv{heads}", model, char_tokenizer(FOX), char_tokenizer(FOX).encode(FOX * 9), "", steps=0)
        done = harness.run("sample.py", f"--out_dir=kv{heads}", "--max_new_tokens=1", "--num_samples=3", cwd=house)
        sizes[heads] = KVCache(model.config, 3, torch.device("cpu"), torch.float32).bytes()
        assert sizes[heads] == 3 * 2 * 2 * heads * 33 * 16 * 4  # rows, k and v, layers, heads, T + 1, D, float32
        assert f"key-value cache of {sizes[heads] / 1000:.3g}kB" in done.err, done.err
    assert sizes[2] == 2 * sizes[1]


@pytest.mark.parametrize("run", ["fox", "bpe", "cafe"])
def test_pictures_of_what_is_inside(house, run):
    argv = ("--start=the quick", "--max_new_tokens=2", "--attention_plot=heads.png", "--embedding_plot=alike.png")
    done = harness.run("sample.py", f"--out_dir={run}", *argv, cwd=house)
    assert done.status == 0 and done.out.startswith("the quick"), done.err
    for name in ("heads.png", "alike.png"):
        assert (house / name).read_bytes().startswith(b"\x89PNG")
        (house / name).unlink()
    from minutegpt.checkpoint import load_model

    model, tokenizer, _ = load_model(house / run, "best", "cpu")
    rows = [line for line in done.err.splitlines() if re.search(r"  \S+ -?[01]\.\d\d", line)]
    V = tokenizer.vocab_size
    assert len(rows) == V  # each once; the padding of bpe is none of them
    e = model.transformer.wte.weight[:V].detach()
    e = e - e.mean(0)
    alike = torch.nn.functional.cosine_similarity(e[3], torch.cat((e[:3], e[4:])), dim=1).max().item()
    first = rows[3].split()[2] if rows[3].strip() else ""
    assert first == f"{alike:.2f}"


def test_a_vocabulary_of_one_has_a_picture_too(house):
    one = char_tokenizer("a")
    if not (house / "one").exists():
        make_run(house / "one", gpt(1), one, one.encode("a" * 100), "one", steps=0)
    argv = ("--max_new_tokens=3", "--attention_plot=heads.png", "--embedding_plot=alike.png")
    done = harness.run("sample.py", "--out_dir=one", *argv, cwd=house)
    assert done.status == 0 and done.out == "aaa\n", done.err
    for name in ("heads.png", "alike.png"):
        assert (house / name).read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------------------------------- talking


def test_interactive_through_a_pipe(house):
    lines = "the quick\nTHE\nthe lazy\n\nthe quick\n"
    argv = ("--out_dir=fox", "--interactive", "--temperature=0", "--max_new_tokens=4")
    done = harness.run("sample.py", *argv, stdin=lines, cwd=house)
    assert done.status == 0
    assert done.out == "> the quick bro\n> > the lazy dog\n> "  # the empty line ended it
    assert "error: the vocabulary of 29 characters lacks 'T' at 0" in done.err  # and the mistake did not
    done = harness.run("sample.py", *argv, stdin=b"the \xff\nthe quick", cwd=house)
    assert done.status == 0 and "surrogate" in done.err
    assert done.out == "> > the quick bro\n> \n"  # and the end of the input ends


@posix
def test_interactive_in_a_terminal(house):
    import pty

    ours, theirs = pty.openpty()
    process = start(
        house, "--out_dir=fox", "--interactive", "--temperature=0", "--max_new_tokens=6",
        stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    seen = ""

    def wait_for(text):
        nonlocal seen
        while text not in seen:
            seen += os.read(ours, 1000).decode()

    wait_for("type an empty line to end")
    wait_for("> ")
    os.write(ours, b"the quick\n")
    wait_for("the quick brown\r\n> ")
    os.write(ours, b"\n")
    assert process.wait(60) == 0
    os.close(ours)


# ---------------------------------------------------------------------------------------- processes


def test_it_streams_and_a_closed_pipe_ends_it_quietly(house):
    process = start(house, "--out_dir=fox", "--start=the", "--max_new_tokens=19999")
    assert process.stdout.read(20) == FOX[:20].encode()  # long before the end
    process.stdout.close()
    assert process.stderr.read().decode().count("\n") == 1
    assert process.wait(60) == 0


@posix
def test_ctrl_c_ends_it_quietly(house):
    process = start(house, "--out_dir=fox", "--start=the", "--max_new_tokens=19999")
    process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.decode().count("\n") == 1


@posix
def test_an_idle_pipe_does_not_hold_it_up(house):
    ours, theirs = os.pipe()
    process = start(house, "--out_dir=fox", "--max_new_tokens=9", "--temperature=0", stdin=ours)
    assert process.communicate(timeout=60)[0] == b"the quick\n"
    os.close(theirs)
    os.close(ours)


def test_a_terminal_that_lacks_the_characters(house):
    env = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    argv = ("--out_dir=cafe", "--start=FILE:prompt.txt", "--temperature=0", "--max_new_tokens=12")
    (house / "prompt.txt").write_text("naïve", encoding="utf-8")
    out, err = start(house, *argv, env=env).communicate(timeout=60)
    assert out == b"na?ve caf? ? i\n" and b"Traceback" not in err


def test_help_prints_every_setting():
    done = harness.run("sample.py", "--help")
    assert done.status == 0 and 'echo "ROMEO:" | python sample.py' in done.out
    for setting in ("out_dir", "start", "num_samples", "max_new_tokens", "temperature", "top_k", "interactive", "seed"):
        assert f"\n{setting} = " in done.out


# ---------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["no checkpoint in out", "(here: bare, bpe, cafe, foreign, fox)", "python train.py --out_dir=out"]),
        (["--out_dir=fox/ckpt.pt"], ["fox/ckpt.pt is a file", "--out_dir=fox"]),
        (["fox"], ["no config file 'fox'", "--out_dir=fox"]),
        (["the quick"], ["no config file", "--start='the quick'"]),
        (["--out_dir=fox", "--ckpt=last"], ["no checkpoint called 'last'", "best", "latest"]),
        (["--out_dir=fox", "--start=the QUICK ♥"], ["'Q' at 4", "'♥' at 10", "lacks"]),
        (["--out_dir=fox", "--start=FILE:nowhere.txt"], ["cannot read the prompt", "No such file", "FILE:PATH"]),
        (["--out_dir=fox", "--start=FILE:latin1.txt"], ["not UTF-8", "byte 1"]),
        (["--out_dir=fox", "--start=FILE:utf16.txt"], ["not plain text: byte 1 is a NUL", "Save it as UTF-8"]),
        (["--out_dir=fox", "--temprature=1"], ["'temprature'", "Did you mean temperature"]),
        (["--out_dir=fox", "--temperature=hot"], ["--temperature must be a number", "'hot'"]),
        (["--out_dir=fox", "--temperature=-1"], ["--temperature=-1.0 must be at least 0"]),
        (["--out_dir=fox", "--top_p=2"], ["--top_p=2.0 must be at most 1"]),
        (["--out_dir=fox", "--top_p=0"], ["--top_p=0.0 must be at least"]),
        (["--out_dir=fox", "--top_k=-1", "--num_samples=0"], ["--top_k=-1", "--num_samples=0 must be at least 1"]),
        (["--out_dir=fox", "--num_samples=100000000000"], ["--num_samples=100000000000 must be at most 10000"]),
        (["--out_dir=fox", "--max_new_tokens=-5"], ["--max_new_tokens=-5 must be at least 0"]),
        (["--out_dir=fox", "--repetition_penalty=0"], ["--repetition_penalty=0.0 must be at least"]),
        (["--out_dir=fox", "--device=gpu"], ["--device=gpu is not on this machine", "there is", "cpu"]),
        (["--out_dir=fox", "--dtype=fp16"], ["--dtype=fp16 is not one of", "bfloat16"]),
        (["--out_dir=fox", "--attention_plot=x.png", "--start=" + FOX * 2], ["90 tokens", "up to 32", "shorter"]),
        (["--out_dir=fox", "--attention_plot=x.png", "--start=" + FOX[:40]], ["40 tokens", "up to 32", "shorter"]),
        (["--out_dir=nan"], ["not finite", "weights are damaged", "--ckpt=latest"]),
        (["--out_dir=nan", "--temperature=0"], ["not finite"]),
        (["--out_dir=fox", "--start=FILE:~no-such-user/x"], ["cannot read the prompt FILE:~no-such-user/x"]),
        (["--out_dir=fox", "--embedding_plot=no/x.png"], ["--embedding_plot=no/x.png", "no folder no"]),
        (["--out_dir=fox", "--compile=maybe"], ["--compile=maybe is not one of", "auto"]),
        (["--out_dir=fox", "--compile=true", "--quantize=int8"], ["--compile=true does not go with int8", "Leave"]),
        (["--out_dir=foreign"], ["foreign", "damaged or not a checkpoint"]),
        (["--out_dir=bare"], ["bare", "no vocabulary", "--dataset=NAME"]),
        (["--out_dir=bare", "--dataset=nowhere"], ["no dataset at", "prepare/text.py"]),
        (["--out_dir=bare", "--dataset=large"], ["the vocabulary has 256 tokens", "only 29", "--dataset=NAME"]),
    ],
)
def test_a_mistake_is_told_and_nothing_else(house, argv, words):
    if not (house / "foreign").exists():
        (house / "latin1.txt").write_bytes("für".encode("latin-1"))
        (house / "utf16.txt").write_bytes("the".encode("utf-16-le"))
        (house / "foreign").mkdir()
        (house / "foreign" / "ckpt.pt").write_bytes(b"PK\x03\x04 of someone else")
        (house / "bare").mkdir()  # a checkpoint as nanoGPT writes it, that says of no dataset
        from minutegpt.checkpoint import read_checkpoint

        args = {k: v for k, v in vars(SHAPE).items() if k in ("n_layer", "n_head", "n_embd", "block_size", "bias")}
        weights = read_checkpoint(house / "fox" / "ckpt.pt")["model"]
        state = {"model": weights, "model_args": args | {"vocab_size": 29, "dropout": 0.0}, "iter_num": 1, "config": {}}
        torch.save(state, house / "bare" / "ckpt.pt")
        make_dataset(house / "data" / "large", byte_tokenizer(), CAFE * 9, CAFE)
        from minutegpt.checkpoint import save

        best = read_checkpoint(house / "fox" / "ckpt.pt")
        (house / "nan").mkdir()
        save(house / "nan", best | {"model": {name: w * float("nan") for name, w in best["model"].items()}}, best=True)
    done = harness.run("sample.py", *argv, cwd=house)
    assert done.status == 2 and done.out == ""
    assert done.err.count("error: ") == 1 and "Traceback" not in done.err
    assert all(word in done.err for word in words), done.err


def test_a_folder_of_transformers_is_not_overwritten_by_what_the_message_advises(house, tmp_path):
    folder = tmp_path / "my gpt2"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"")
    done = harness.run("sample.py", f"--out_dir={folder}", cwd=house)
    assert done.status == 2 and "train.py" not in done.err
    assert f"python export.py --out_dir='{folder}' --format=minutegpt" in done.err


def test_a_path_with_a_blank_is_quoted_in_the_advised_command(house):
    done = harness.run("sample.py", "--out_dir=my run", cwd=house)
    assert done.status == 2 and "`python train.py --out_dir='my run'` makes one" in done.err


@pytest.mark.slow
@posix
def test_more_samples_than_memory_holds(tmp_path):
    from dataclasses import asdict

    from minutegpt.checkpoint import save

    model = GPT(GPTConfig(block_size=2**16, vocab_size=29, n_layer=1, n_head=1, n_embd=512, pos="rope"))
    state = {"model": model.state_dict(), "model_config": asdict(model.config), "step": 0, "config": {}}
    save(tmp_path, state | {"tokenizer": char_tokenizer(FOX).to_json()})
    argv = ("--out_dir=.", "--num_samples=9999")
    done = harness.run("sample.py", *argv, cwd=tmp_path, limits={"RLIMIT_AS": 2**33})
    assert done.status == 2, done.err
    assert "not enough memory for 9999 samples" in done.err and "2.68TB" in done.err
