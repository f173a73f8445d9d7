"""What the command line says of itself: -h, every option with its default, completion, silence."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer

from attnprune.api.running import _WORDS
from attnprune.cli.app import app
from attnprune.cli.options import RUN_DEFAULTS
from attnprune.runs.config import RunConfig
from tests.helpers.command import ENVIRONMENT, attnprune

ROOT_COMMAND = typer.main.get_command(app)


def commands(group, name="attnprune"):
    """(name, command) of every command, those of groups too."""
    for key, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{name} {key}")
        else:
            yield f"{name} {key}", command


ALL = dict(commands(ROOT_COMMAND))


@pytest.mark.parametrize("name", ALL)
def test_every_option_says_its_default(name):
    silent = []
    for option in ALL[name].params:
        if option.param_type_name != "option" or option.is_flag or option.required or option.name == "help":
            continue
        shown = bool(option.show_default) and option.default is not None
        if not shown and "Default: " not in (option.help or ""):
            silent.append(option.opts[0])
    assert silent == [], "say 'Default: ...' in the help; for sparsify a line in RUN_DEFAULTS of cli/options.py does"


def test_the_defaults_of_sparsify_are_those_of_a_run():
    places = {key: (s, key) for s, field in RunConfig.model_fields.items() for key in field.annotation.model_fields}
    places |= _WORDS
    run, checked = RunConfig(), 0
    for option, text in RUN_DEFAULTS.items():
        name = option.removeprefix("--").replace("-", "_")
        if name not in places:
            assert name in ("config", "resume", "finish")
            continue
        section, key = places[name]
        value = getattr(getattr(run, section), key)
        words = {"None": ("none", "main"), "False": ("off",), "auto": ("auto", "general web text from the Hub")}
        expected = words.get(str(value), (f"{value:g}" if isinstance(value, float) else str(value),))
        assert text.split(",")[0] in expected, option
        checked += 1
    assert checked > 20


@pytest.mark.parametrize("arguments", [("-h",), ("sparsify", "-h"), ("bench", "-h"), ("bench", "step", "-h")])
def test_h_is_help(arguments, tmp_path):
    done = attnprune(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(f"Usage: attnprune {arguments[0] if len(arguments) > 1 else ''}".strip())


def test_the_shell_completes_commands_and_options(tmp_path):
    def completed(words):
        environment = ENVIRONMENT | {"_ATTNPRUNE_COMPLETE": "complete_bash", "COMP_WORDS": words,
                                     "COMP_CWORD": str(len(words.split()) - 1)}  # fmt: skip
        command = [sys.executable, "-m", "attnprune"]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert "Traceback" not in done.stderr
        return done.stdout.split()

    assert completed("attnprune insp") == ["inspect"]
    assert "--save-mask" in completed("attnprune inspect --sa")
    named = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}  # CI has no shell above it that could be found
    shown = attnprune("--show-completion", "bash", cwd=tmp_path, **named)
    assert "_ATTNPRUNE_COMPLETE" in shown.stdout


def test_bars_of_libraries_are_for_terminals_without_quiet(tmp_path):
    program = (
        "import sys; from attnprune.cli.app import run; sys.argv = ['attnprune', 'inspect', 'nowhere', *sys.argv[1:]];"
        "run(); from tqdm.auto import tqdm; list(tqdm(range(3), file=sys.stdout))"
    )
    shown = [
        subprocess.run([sys.executable, "-c", program, *quiet], env=ENVIRONMENT | {"FORCE_COLOR": terminal},
                       cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        for quiet, terminal in (([], "1"), (["--quiet"], "1"), ([], ""))
    ]  # fmt: skip
    assert "100%" in shown[0]
    assert shown[1:] == ["", ""]
