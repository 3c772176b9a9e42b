"""What the command line does besides running experiments."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import decentral_jax as dj
from benchmarks.support import command
from decentral_jax import launch
from experiments import catalog, commands, errors
from experiments.runs.compare import Compare

ROOT = Path(__file__).parents[2]


def program(*arguments, setup=""):
    """Arguments that run a module as `python -m` does, after some setup."""
    code = f"{setup}\nimport runpy, sys\nsys.argv = {['', *arguments[1:]]}\n"
    code += f"runpy.run_module({arguments[0]!r}, run_name='__main__')"
    return [sys.executable, "-c", code]


def ran(*arguments, setup="", **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = program(*arguments, setup=setup)
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, **options
    )


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""


@pytest.mark.parametrize("package", ["tyro", "flax", "matplotlib", "plotly", "rich"])
def test_without_the_extra_one_line_says_what_to_install(package):
    ended = ran("experiments", "compare", setup=BLOCK.format(package))
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"error: the experiments need the package {package}, ")
    assert line.endswith('run pip install -e ".[experiments]" in the checkout.')


def test_other_missing_modules_show_a_traceback():
    ended = ran("experiments", setup=BLOCK.format("csv"))
    assert "Traceback" in ended.stderr


def test_ctrl_c_while_importing():
    stop = BLOCK.format("tyro").replace("raise Module", "raise KeyboardInterrupt  # ")
    ended = ran("experiments", "compare", setup=stop)
    assert ended.returncode == 130
    assert ended.stderr.split() == ["Interrupted."]


def test_ctrl_c_says_how_to_go_on(tmp_path):
    """A real signal, during training; then the command that it prints."""
    words = ["synthetic", "--iterations", "200000", "--seeds", "1"]
    restore = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)"
    process = subprocess.Popen(
        program("experiments", *words, setup=restore),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        while not (tmp_path / "results/synthetic/1/run.json").exists():
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(1)  # The file exists shortly before the command knows its folder.
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in out + err
    again = f"{' '.join(words)} --out results/synthetic/1 --resume"
    assert err == f"\nInterrupted. To continue, run:\npython -m experiments {again}\n"


def test_tables_continue_by_the_same_command(monkeypatch, capsys):
    def stop(options):
        raise KeyboardInterrupt

    options = commands.COMMANDS["tables"][0]
    monkeypatch.setitem(commands.COMMANDS, "tables", (options, stop))
    monkeypatch.setattr(sys, "argv", ["experiments", "tables", "compare"])
    with pytest.raises(SystemExit) as stopped:
        commands.main()
    assert stopped.value.code == 130
    assert capsys.readouterr().err.endswith("\npython -m experiments tables compare\n")


def test_version(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["experiments", "--version"])
    commands.main()
    printed = capsys.readouterr().out
    assert printed.startswith(f"decentral_jax {dj.__version__}, commit ")
    assert ", jax " in printed
    with pytest.raises(SystemExit) as stopped:
        launch.main(["--version"])
    assert not stopped.value.code
    assert capsys.readouterr().out == f"decentral_jax {dj.__version__}\n"


def test_benchmarks_end_without_a_traceback(capsys):
    def stop(error):
        raise error

    for error, status, line in (
        (KeyboardInterrupt(), 130, "\nInterrupted.\n"),
        (errors.UsageError("out=x"), 2, "error: out=x\n"),
    ):
        with pytest.raises(SystemExit) as stopped:
            command.run(functools.partial(stop, error))
        assert stopped.value.code == status
        assert capsys.readouterr().err == line
    with pytest.raises(SystemExit) as stopped:
        command.parser("Title.\n\nMore.").parse_args(["--version"])
    assert not stopped.value.code
    assert capsys.readouterr().out.startswith(f"decentral_jax {dj.__version__}, commit")


def test_every_benchmark_uses_the_common_command_line():
    for path in sorted((ROOT / "benchmarks").rglob("*.py")):
        text = path.read_text()
        if "parse_args" in text and path.name != "command.py":
            assert "command.parser(__doc__)" in text
            assert "command.run(main)" in text


def test_lists_the_algorithms(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["experiments", "algorithms"])
    commands.main()
    names = capsys.readouterr().out.splitlines()
    assert names == list(catalog.everything(dj.topology.ring(8), rounds=1))
    assert "DeTAG" in names


@pytest.mark.parametrize(
    ("word", "hint"), [("comapre", r" Did you mean 'compare'\?"), ("xyz", "")]
)
def test_misspelled_commands(fails, word, hint):
    fails(f"^error: command='{word}' is unknown.{hint} Pass one of 'algo", word)


def test_misspelled_options_are_looked_up_in_their_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        commands.parse(["compare", "--ratez", "1"])
    assert stopped.value.code == 2
    text = capsys.readouterr().err
    assert "--rates" in text
    assert "python -m experiments compare --help" in text
    assert "apam" not in text


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("rates must be positive", "--rates must be positive"),
        ("data_dir=None, but name='x'", "no --data-dir, but name='x'"),
        ("slow=2 and step_ms=3", "--slow 2 and --step-ms 3"),
        ("read from files: pass data_dir", "read from files: pass --data-dir"),
        ("the rates must_be, x.rates=3, my_rates=2", None),
    ],
)
def test_messages_name_flags(message, expected):
    flags = commands._flags(Compare())
    with pytest.raises(errors.UsageError) as raised, errors.renamed(**flags):
        raise errors.UsageError(message)
    assert str(raised.value) == (expected or message)
