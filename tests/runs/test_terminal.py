"""Commands that a stage prints for pasting."""

from __future__ import annotations

import shlex
import subprocess

import pytest

from flextron_mcore.runs.terminal import command_line, say_next
from flextron_mcore.settings.compose import compose


@pytest.mark.parametrize("budget", ["0.6", "0.6 parameters", ["25ms", "8GiB"], ["0.9 latency", "0.9 parameters"]])
def test_a_printed_command_has_the_values_that_were_given(budget, capsys):
    say_next("export", checkpoint="a directory/it's", budget=budget, out="exported")
    _, program, stage, *keys = shlex.split(capsys.readouterr().out)
    settings = compose(stage, keys)
    assert program == "flextron" and settings.checkpoint == "a directory/it's"
    assert str(settings.budget) == str(budget)


@pytest.mark.parametrize("word", ["plain", "a b", "x='0.6 parameters'", "it's $HOME", 'it\'s "quoted"', "it's `x`!", "a'\nb", ""])
def test_a_shell_reads_the_words_of_a_command_line(word):
    line = command_line(["printf", "%s", word])
    assert subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout == word
    assert ("'\"'\"'" in line) == ("'" in word and word != "x='0.6 parameters'")
