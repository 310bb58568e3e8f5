"""The commands of .github/workflows, checked as those of the docs are."""

import re

import pytest
from commands import check
from harness import ROOT

LINES = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8").splitlines()
COMMANDS = [match[1] for line in LINES if (match := re.match(r"\s*(?:- )?run: (.*)", line))]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_a_workflow_can_work(command):
    words = command.removeprefix("uv run --no-sync ")
    check(words if words.startswith("python ") else command, ROOT)


def test_every_system_installs_tests_and_trains():
    assert sum("pytest" in command or "bash .ci/run" in command for command in COMMANDS) == 2
    for recipe in ("shakespeare_char", "shakespeare_cpu"):
        assert sum(f"train.py config/{recipe}.py" in command for command in COMMANDS) >= 2
    assert "uv sync" in COMMANDS and "--locked" not in "".join(COMMANDS)
