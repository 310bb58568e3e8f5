"""minutegpt/config.py: every way to set a setting, every mistake, and no input that makes a traceback."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minutegpt import config
from minutegpt.config import (
    Settings,
    check_bounds,
    configure,
    model_defaults,
    read_settings,
    resume_config,
    settings_of,
)
from minutegpt.errors import ROOT, UserError

SETTINGS = {
    "out_dir": "out",
    "start": "\n",
    "n_layer": 6,
    "shift": 1,
    "ratio": 0.5,
    "learning_rate": 1e-3,
    "grad_clip": 0.0,
    "compile": False,
    "bias": True,
}
NO_SETTINGS = {"__name__": "x", "_hidden": 1, "Path": Path, "math": sys, "LIMIT": 3, "config_keys": ["a"]}


def run(*argv):
    return configure(SETTINGS | NO_SETTINGS, "train.py", list(argv))


def mistakes(*argv):
    with pytest.raises(UserError) as caught:
        run(*argv)
    return str(caught.value)


@pytest.fixture
def file(tmp_path):
    def write(text, name="mine.py"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


def test_without_arguments_the_defaults_stand_and_only_settings_come_back():
    assert run() == (SETTINGS, set())


@pytest.mark.parametrize(
    "argv, key, value",
    [
        (["--n_layer=4"], "n_layer", 4),
        (["--n_layer", "4"], "n_layer", 4),
        (["--shift=-4"], "shift", -4),
        (["--shift", "-4"], "shift", -4),
        (["--learning_rate=3"], "learning_rate", 3.0),
        (["--ratio", "-1e-4"], "ratio", -1e-4),
        (["--compile"], "compile", True),
        (["--compile=true"], "compile", True),
        (["--compile", "True"], "compile", True),
        (["--bias", "false"], "bias", False),
        (["--bias=False"], "bias", False),
        (["--out_dir=a=b==c"], "out_dir", "a=b==c"),
        (["--out_dir", "a=b"], "out_dir", "a=b"),
        (["--out_dir="], "out_dir", ""),
        (["--out_dir=3"], "out_dir", "3"),
        (["--start=--help"], "start", "--help"),
        (["--start", "-h"], "start", "-h"),
        (["--start=ROMEO: what, é 😀"], "start", "ROMEO: what, é 😀"),
        (["--n_layer=4", "--n_layer=5"], "n_layer", 5),
    ],
)
def test_command_line(argv, key, value):
    config, given_keys = run(*argv)
    assert config == SETTINGS | {key: value}
    assert type(config[key]) is type(SETTINGS[key])
    assert given_keys == {key}


def test_a_flag_takes_a_following_true_or_false_only(file):
    path = file("n_layer = 2")
    config, given_keys = run("--compile", path, "--bias", "false")
    assert (config["compile"], config["n_layer"], config["bias"]) == (True, 2, False)
    assert given_keys == {"compile", "bias"}


def test_the_command_line_wins_over_the_file_wherever_it_stands(file):
    path = file("n_layer = 2\nlearning_rate = 1\nout_dir = 'elsewhere'\n")
    for argv in (["--n_layer=9", path], [path, "--n_layer=9"]):
        config, given_keys = run(*argv)
        assert (config["n_layer"], config["learning_rate"], config["out_dir"]) == (9, 1.0, "elsewhere")
        assert type(config["learning_rate"]) is float
        assert given_keys == {"n_layer"}  # what the file sets is not given on the command line


def test_a_config_file_may_import_compute_and_hide_helpers(file):
    path = file("import math\n_width = 64\ndef half(x): return x // 2\nn_layer = half(int(math.sqrt(_width)))\n")
    assert run(path)[0]["n_layer"] == 4


def test_a_config_file_does_not_leak_into_this_process(file):
    run(file("global n_layer\nn_layer = 2\n_x = 1\n"))
    assert SETTINGS["n_layer"] == 6 and "_x" not in globals() and "n_layer" not in globals()


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--n_layers=4"], "unknown setting 'n_layers'. Did you mean n_layer?"),
        (["--n-layer=4"], "Did you mean n_layer?"),
        (["--nlayer", "4"], "Did you mean n_layer?"),
        (["-n_layer=4"], "Did you mean n_layer?"),
        (["--zzz"], "unknown setting 'zzz'"),
        (["--LIMIT=4"], "unknown setting 'LIMIT'"),
        (["--_hidden=4"], "unknown setting '_hidden'"),
        (["--n_layer=4.5"], "--n_layer must be a whole number (like 6), not '4.5'"),
        (["--n_layer=true"], "a whole number"),
        (["--n_layer=1e3"], "a whole number"),
        (["--n_layer=" + "9" * 5000], "a whole number"),
        (["--n_layer=99999999999999999999"], "a whole number"),
        (["--learning_rate=fast"], "--learning_rate must be a number (like 0.001), not 'fast'"),
        (["--learning_rate=nan"], "a number"),
        (["--learning_rate=inf"], "a number"),
        (["--compile=yes"], "--compile must be true or false (like false), not 'yes'"),
        (["--compile=1"], "true or false"),
        (["--out_dir"], "--out_dir has no value. Type --out_dir=VALUE, a text (like 'out')"),
        (["--n_layer", "--bias"], "--n_layer has no value"),
        (["n_layer=4"], "unknown argument 'n_layer=4'. Did you mean --n_layer=4?"),
        (["config/nowhere.py"], "there is no config file 'config/nowhere.py'"),
        ([""], "there is no config file ''"),
        (["."], "there is no config file '.'"),
        (["README.md"], "README.md is not a config file: the name of one ends in .py. A text to train on is prepared"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(argv, says):
    message = mistakes(*argv)
    assert says in message
    assert "train.py --help" in message
    assert "mistakes" not in message  # one mistake makes one line


@pytest.mark.parametrize(
    "text, says",
    [
        ("n_layers = 4", "unknown setting 'n_layers'. Did you mean n_layer?"),
        ("n_layer = '4'", "n_layer must be a whole number (like 6), not str"),
        ("n_layer = True", "n_layer must be a whole number (like 6), not bool"),
        ("n_layer = 4.0", "not float"),
        ("n_layer = None", "not NoneType"),
        ("n_layer = 10 ** 6000", "n_layer must be a whole number"),
        ("learning_rate = 10 ** 6000", "learning_rate must be a number"),
        ("learning_rate = float('nan')", "learning_rate must be a number"),
        ("learning_rate = 1j", "not complex"),
        ("compile = 1", "compile must be true or false (like false), not int"),
        ("out_dir = ['a']", "not list"),
        ("\n\n1 / 0", "line 3: ZeroDivisionError: division by zero"),
        ("x x", "line 1: SyntaxError"),
        ("n_layer = 2\n  n_head = 3", "line 2: IndentationError"),
        ("import sys\nsys.exit(0)", "line 2: SystemExit: 0"),
        ("import no_such_module", "line 1: ModuleNotFoundError"),
        ("class E(BaseException):\n  def __str__(self): return 1/0\nraise E", "line 3"),
        ("def f(): f()\nf()", "RecursionError"),
        ("(" * 5000, "SyntaxError"),
        ("n_layer = 2\0", ""),
    ],
)
def test_a_mistake_in_a_config_file_is_named_with_its_place(file, text, says):
    path = file(text)
    message = mistakes(path)
    assert says in message and path in message


def test_a_config_file_that_is_not_utf8(tmp_path):
    (tmp_path / "mine.py").write_bytes(b"out_dir = '\xff\xfe'\n")
    assert "mine.py" in mistakes(str(tmp_path / "mine.py"))


def test_all_mistakes_of_a_call_are_told_at_once(file):
    path = file("n_layers = 4\ncompile = 'no'\n")
    message = mistakes("config/nowhere.py", path, "--n_layer=x", "--learning_rat", "3", "--grad_clip")
    lines = message.split("\n")
    assert lines[0] == "6 mistakes:" and len(lines) == 8  # and where to look them up
    for part in (
        "n_layers",
        "compile must be",
        "--n_layer must be",
        "'learning_rat'",
        "--grad_clip has no value",
        "nowhere.py",
    ):
        assert sum(part in line for line in lines) == 1, part


def test_a_near_config_file_is_offered(tmp_path, monkeypatch):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "shakespeare_char.py").write_text("n_layer = 1", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert "Did you mean config/shakespeare_char.py?" in mistakes("config/shakespere_char.py")


def test_help_prints_the_block_of_settings_and_exits_with_0(tmp_path, capsys):
    script = tmp_path / "train.py"
    script.write_text("import x\n# ----\nn_layer = 6  # depth\n# ------\nsecret = 1\n# ----\n", encoding="utf-8")
    for argv in (["--help"], ["-h"], ["--wrong", "--help"], ["nowhere.py", "--help"]):
        with pytest.raises(SystemExit) as caught:
            configure(SETTINGS, str(script), argv)
        assert caught.value.code == 0
        out = capsys.readouterr().out
        assert "n_layer = 6  # depth" in out and "secret" not in out and "import" not in out
        assert "python train.py" in out


def test_in_a_script_the_settings_are_what_stands_above_the_call(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from minutegpt.config import configure\nfrom minutegpt.errors import STARTED, UserError\n"
        "n_layer = 6\nout_dir = 'out'\nconfig, given = configure(globals(), __file__)\nglobals().update(config)\n"
        "later = 1\nprint(n_layer, out_dir, config, given)\n",
        encoding="utf-8",
    )
    done = subprocess.run(
        [sys.executable, str(script), "--n_layer=2"], capture_output=True, text=True, encoding="utf-8", check=True
    )
    assert done.stdout == "2 out {'n_layer': 2, 'out_dir': 'out'} {'n_layer'}\n"


words = st.one_of(
    st.text(max_size=20),
    st.sampled_from([f"--{key}" for key in SETTINGS]),
    st.builds(lambda key, value: f"--{key}={value}", st.sampled_from(list(SETTINGS)), st.text(max_size=20)),
    st.builds(lambda key, value: f"--{key}={value}", st.text(max_size=9), st.text(max_size=9)),
    st.one_of(st.integers(), st.floats(), st.booleans()).map(str),
    st.sampled_from(["--", "-", "=", "--=", "---", "config", "..", "\0", "\udcff", "\x1b[31m", "true", "١٢"]),
)


@settings(max_examples=500, deadline=None)
@given(st.lists(words, max_size=6))
def test_no_command_line_makes_a_traceback(argv):
    try:
        config, given_keys = run(*argv)
    except UserError as error:
        assert all(line.isprintable() for line in str(error).split("\n"))  # no escape codes to the terminal
    except SystemExit as error:
        assert error.code == 0
    else:
        assert config.keys() == SETTINGS.keys() and given_keys <= SETTINGS.keys()
        assert all(type(config[key]) is type(SETTINGS[key]) for key in SETTINGS)


code = st.one_of(
    st.text(max_size=60),
    st.lists(
        st.builds(
            "{} = {}".format,
            st.sampled_from([*SETTINGS, "other", "_x"]),
            st.sampled_from(["1", "-1.5", "'s'", "None", "True", "[]", "{}", "10**400", "1e999", "print", "1/0", "("]),
        ),
        max_size=5,
    ).map("\n".join),
)


@settings(max_examples=300, deadline=None)
@given(text=code)
def test_no_config_file_makes_a_traceback(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "fuzz.py"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        config, given_keys = run(str(path))
    except UserError as error:
        assert "fuzz.py" in str(error) or "must be at" in str(error)
    else:
        assert all(type(config[key]) is type(SETTINGS[key]) for key in SETTINGS) and not given_keys


# a resumed run, and bounds

RUN = {
    "config": {"n_layer": 2, "learning_rate": 1e-2, "out_dir": "then", "compile": True},
    "model_config": {"n_layer": 2},
}


def asked(typed, from_file=None):
    """The settings of a call with these on the command line."""
    values = SETTINGS | (from_file or {}) | typed
    return Settings(values, set(typed), set(from_file or {}), "", set())


def test_a_resumed_run_keeps_its_settings_but_for_those_of_the_call():
    config, changes = resume_config(asked({"out_dir": "now"}), RUN, ["n_layer"], ["out_dir"])
    assert config == SETTINGS | {"n_layer": 2, "learning_rate": 1e-2, "out_dir": "now", "compile": True}
    assert changes == []


def test_what_the_command_line_changes_comes_back_in_words():
    typed = asked({"learning_rate": 0.5, "compile": True, "n_layer": 2})
    config, changes = resume_config(typed, RUN, ["n_layer"], ["out_dir"])
    assert config["learning_rate"] == 0.5 and changes == ["learning_rate 0.01 -> 0.5"]  # the others are as they were


def test_what_would_change_the_model_is_refused():
    with pytest.raises(UserError, match="n_layer 2 -> 3"):
        resume_config(asked({"n_layer": 3}), RUN, ["n_layer"], [])


def test_what_a_config_file_sets_in_vain_is_told():
    notes = resume_config(asked({}, from_file={"learning_rate": 0.5, "n_layer": 2}), RUN, ["n_layer"], ["out_dir"])[1]
    assert notes == ["not taken from the config file: learning_rate=0.5. The run goes on with learning_rate=0.01"]


def test_a_run_of_an_earlier_version_keeps_what_its_settings_meant():
    saved = {"config": {"distill": "a,b", "shard": True, "decay_lr": False}, "model_config": {}}
    now = Settings({"teachers": "", "lr_schedule": "cosine"}, set(), set(), "", set())
    assert resume_config(now, saved, [], [])[0] == {"teachers": "a,b", "lr_schedule": "constant"}


@pytest.mark.parametrize("value", ["2", 2.5, True, None, [1], {"a": 1}])
def test_a_strangers_value_of_the_wrong_kind_is_not_taken(value):
    run = {"config": {"grad_clip": "x", "out_dir": 3, "bias": 1, "n_layer": value}, "model_config": {}}
    assert resume_config(asked({}), run, [], [])[0] == SETTINGS


def test_bounds_and_choices_are_told_all_at_once(monkeypatch):
    monkeypatch.setattr(config, "BOUNDS", {"n_layer": (7, 9), "learning_rate": (0, 0), "absent": (1, 2)})
    monkeypatch.setattr(config, "CHOICES", {"out_dir": ("", "a", "b")})
    check_bounds(SETTINGS | {"n_layer": 7, "learning_rate": 0.0, "out_dir": "a"})
    with pytest.raises(UserError) as caught:
        check_bounds(SETTINGS)
    assert str(caught.value).split("\n") == [
        "--n_layer=6 must be at least 7",
        "  --learning_rate=0.001 must be at most 0",
        "  --out_dir=out is not one of a, b",
    ]


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--start", "a", "b", "c", "--n_layer=2"], "a,b,c"),
        (["--n_layer=2", "--start=a,b"], "a,b"),
        (["--n_layer", "2", "--start", "a"], "a"),
    ],
)
def test_a_list_takes_the_words_behind_it(argv, value):
    assert configure(SETTINGS, "train.py", argv, lists=("start",))[0] == SETTINGS | {"n_layer": 2, "start": value}


def test_a_list_ends_at_a_config_file(file):
    argv = ["--start", "a", "b", file("n_layer = 2\n")]
    assert configure(SETTINGS, "train.py", argv, lists=("start",))[0] == SETTINGS | {"n_layer": 2, "start": "a,b"}
    assert "no config file 'b'" in mistakes("--start", "a", "b")  # no other setting is one


# sections, the model's settings, old names


@dataclass
class Config:
    vocab_size: int = 65
    n_layer: int = 6
    width: int = 8  # hidden channels


def test_a_section_is_laid_over_the_file_and_below_the_command_line(file):
    path = file("n_layer = 2\nratio = 0.1\ncpu = dict(n_layer=3, learning_rate=1)\ncuda = dict(n_layer=4)\n")
    settings = SETTINGS | {"device": "cpu"}
    found = read_settings(settings, "train.py", [path, "--learning_rate=2"])
    assert (found.values["n_layer"], found.values["ratio"], found.values["learning_rate"]) == (3, 0.1, 2.0)
    assert found.section == "cpu" and found.sections == {"cpu", "cuda"} and "learning_rate" in found.from_file
    found = read_settings(settings, "train.py", ["--device=cuda:1", path])
    assert found.values["n_layer"] == 4 and found.section == "cuda"
    found = read_settings(settings, "train.py", ["--device=mps", path])
    assert found.values["n_layer"] == 2 and found.section == ""


def test_a_section_that_is_asked_for_by_name_must_be_there(file):
    settings = SETTINGS | {"device": "cpu", "section": "auto"}
    both, none = file("cpu = dict(n_layer=3)\ncuda = dict(n_layer=4)\n"), file("n_layer = 2\n", "none.py")
    assert read_settings(settings, "train.py", [both, "--section=cuda"]).values["n_layer"] == 4
    for argv, words in (([both, "--section=mps"], "which has cpu, cuda"), ([none, "--section=cpu"], "which has none")):
        with pytest.raises(UserError, match=f"{argv[1]} is not in the config file, {words}. Leave --section out"):
            read_settings(settings, "train.py", argv)
    assert read_settings(settings, "train.py", [both, "--section=none"]).section == ""


def test_mistakes_in_a_section_are_named_with_it(file):
    path = file("cpu = dict(n_layers=3, n_layer='x')\n")
    with pytest.raises(UserError) as caught:
        read_settings(SETTINGS | {"device": "cpu"}, "train.py", [path])
    assert "section cpu: unknown setting 'n_layers'" in str(caught.value)
    assert "section cpu: n_layer must be a whole number (like 6), not str" in str(caught.value)


def test_a_config_may_start_from_another_one(tmp_path):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "base.py").write_text("import math\nn_layer = 2\nbias = False\n", encoding="utf-8")
    (tmp_path / "config" / "mine.py").write_text("from config.base import *\nn_layer = 3\n", encoding="utf-8")
    script = tmp_path / "train.py"
    script.write_text(
        f"import sys\nsys.path.insert(1, {str(ROOT)!r})\nfrom minutegpt.config import configure\n"
        "n_layer = 6\nbias = True\nconfig, given = configure(globals(), __file__)\nprint(config)\n",
        encoding="utf-8",
    )
    for cwd, path in ((tmp_path, "config/mine.py"), (tmp_path.parent, str(tmp_path / "config" / "mine.py"))):
        done = subprocess.run([sys.executable, str(script), path], cwd=cwd, capture_output=True, text=True, check=True)
        assert done.stdout == "{'n_layer': 3, 'bias': False}\n"


def test_the_fields_of_the_model_are_settings(tmp_path, capsys):
    config, names = configure({"ratio": 0.5}, "bench.py", ["--width=9"], model=Config)
    assert config == {"n_layer": 6, "width": 9, "ratio": 0.5} and names == {"width"}
    assert model_defaults(Config) == {"n_layer": 6, "width": 8}
    script = tmp_path / "bench.py"
    script.write_text("# ----\nratio = 0.5\n# ----\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        configure({"ratio": 0.5}, str(script), ["--help"], model=Config)
    out = capsys.readouterr().out
    assert "width: int = 8  # hidden channels" in out and "vocab_size" not in out


def test_what_another_script_takes_is_ignored_in_a_file_alone(file):
    path = file("n_layer = 2\nother = 'x'\n")
    assert configure(SETTINGS, "bench.py", [path], ignore={"other"})[0]["n_layer"] == 2
    with pytest.raises(UserError, match="unknown setting 'other'"):
        configure(SETTINGS, "bench.py", ["--other=x"], ignore={"other"})


def test_the_settings_of_a_script_are_found_without_running_it():
    names = settings_of(ROOT / "train.py")
    assert {"out_dir", "init_from", "max_iters", "learning_rate", "compile"} <= names
    assert not {"config", "given", "model", "settings"} & names


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--distill=a"], "--distill is now --teachers. Type --teachers=VALUE"),
        (["--shard"], "--shard no longer exists. torchrun divides the batch"),
        (["--fsdp"], "A model larger than a GPU needs torchtitan"),
        (["--decay_lr=false"], "--decay_lr no longer exists. A constant learning rate is --lr_schedule=constant"),
        (["--eval_only"], "python evaluate.py"),
        (["--lr_decay_iters=3"], "--max_iters"),
        (["--backend=gloo"], "--device"),
        (["--softcap=15"], "--softcap no longer exists. Leave it out, as it brought nothing (docs/results.md#simpler)"),
        (["--zero_init"], "--zero_init no longer exists. Leave it out, as it brought nothing"),
    ],
)
def test_an_old_name_is_answered_with_what_to_type(argv, says):
    settings = SETTINGS | {"teachers": "", "lr_schedule": "cosine"}
    with pytest.raises(UserError) as caught:
        configure(settings, "train.py", argv)
    assert says in str(caught.value)


def test_a_removed_setting_of_the_model_is_answered_by_each_script_that_has_a_model(file):
    path = file("softcap = 15.0\nratio = 0.1\n")
    with pytest.raises(UserError, match=r"mine\.py: --softcap no longer exists\. Leave it out"):
        configure({"ratio": 0.5}, "bench.py", [path], model=Config)
    with pytest.raises(UserError, match="unknown setting 'softcap'"):
        configure({"ratio": 0.5}, "sample.py", [path])


def test_a_script_without_config_files_runs_none(file):
    path = file("raise SystemExit('it was run')\n", "notes.py")
    with pytest.raises(UserError, match="Did you mean --input="):
        configure(SETTINGS | {"input": ""}, "text.py", [path], config_files=False)


def test_a_path_under_home_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    config = configure(SETTINGS | {"teachers": ""}, "train.py", ["--out_dir=~/x", "--teachers=~/a,b", "--start=~/x"])[0]
    assert config["out_dir"] == str(tmp_path / "x") and config["teachers"] == f"{tmp_path / 'a'},b"
    assert config["start"] == "~/x"


def test_more_tokens_than_any_machine_holds_are_refused():
    settings = {"batch_size": 64, "block_size": 256}
    with pytest.raises(UserError, match="--batch_size=100000 must be at most 16384 with this block_size"):
        configure(settings, "train.py", ["--batch_size=100000"])


def test_a_word_without_dashes_can_be_a_setting(tmp_path, capsys):
    """compress.py FILE: a script says which setting a word sets. Config files are then not read."""
    own = SETTINGS | {"file": ""}

    def read(*argv):
        return configure(own, str(ROOT / "compress.py"), list(argv), positional="file")

    for argv in (["mine.py", "--compile"], ["--compile", "mine.py"], ["--file=mine.py", "--compile=true"]):
        values, given_names = read(*argv)
        assert values == own | {"file": "mine.py", "compile": True} and given_names == {"file", "compile"}
    with pytest.raises(UserError, match=r"unexpected argument 'b'\. Type one file per call"):
        read("a", "b")
    with pytest.raises(UserError, match="Did you mean --n_layer=3"):
        read("n_layer=3")
    with pytest.raises(SystemExit):
        read("--help")
    assert capsys.readouterr().out.startswith("usage: python compress.py FILE [--key=value ...]")
