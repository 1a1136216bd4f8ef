from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import arcore as package
from arcore import cli
from arcore.cli import COMMANDS


def test_no_arguments_lists_the_commands(arcore):
    outcome = arcore()
    assert outcome.code == 0
    for name, summary in COMMANDS.items():
        assert f"{name}" in outcome.out
        assert summary in outcome.out
    assert arcore("--help") == outcome


def test_version(arcore):
    assert arcore("--version") == (0, f"arcore {package.__version__}\n", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(arcore, command):
    outcome = arcore(command, "--help")
    assert outcome.code == 0
    assert f"usage: arcore {command}" in outcome.out
    assert f"Example: arcore {command}" in outcome.out
    assert outcome.err == ""


# bench hands what it does not know to pytest.
@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "bench"])
def test_unknown_option_is_one_line(fails, command):
    preset = {"train": ["var_tiny"], "data": ["check", "."], "run": ["reusable_holdout"]}.get(command, [])
    assert "--no-such-option" in fails(command, *preset, "--no-such-option")


def test_unknown_command_suggests_a_close_one(fails):
    assert "did you mean 'sample'?" in fails("smaple")
    assert "choose from demo, train" in fails("xyz")


def test_env_reports_versions(arcore):
    outcome = arcore("env")
    assert outcome.code == 0
    assert package.__version__ in outcome.out
    assert "torch" in outcome.out


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv("ARCORE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="--no-such-option"):
        cli.main(["env", "--no-such-option"])


def test_interrupt_is_quiet(arcore, monkeypatch):
    monkeypatch.setattr("arcore.env.report", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert arcore("env") == (130, "", "arcore env: interrupted\n")


def test_missing_package_names_the_extra(fails, monkeypatch):
    monkeypatch.setitem(sys.modules, "tyro", None)
    message = fails("sample", "--checkpoint", "x")
    assert "`pip install tyro`" in message
    assert '`pip install ".[train]"`' in message


def test_env_and_zoo_need_torch_alone():
    """Block every optional package and see that the two commands still work."""
    code = (
        "import sys\n"
        "for name in ('tyro', 'pytorch_lightning', 'safetensors', 'PIL', 'sklearn', 'matplotlib', 'rich', 'numpy'):\n"
        "    sys.modules[name] = None\n"
        "from arcore.cli import main\n"
        "sys.exit(main(['env']) or main(['zoo']) or main(['zoo', 'var_tiny']))\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "var_tiny" in run.stdout


def test_module_runs_as_the_command():
    run = subprocess.run(
        [sys.executable, "-m", "arcore", "nonsense"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert run.stderr.startswith("arcore: error: unknown command 'nonsense'")


def test_closed_pipe_is_quiet():
    run = subprocess.run(
        f"{sys.executable} -m arcore env | true", shell=True, capture_output=True, text=True, check=False
    )
    assert run.stderr == ""


def test_bench_without_source_says_how_to_get_it(fails, monkeypatch, tmp_path):
    monkeypatch.setattr("arcore.cli.bench.SOURCE", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert "not part of an installed package" in fails("bench")


def test_bench_of_an_installed_package_runs_in_the_checkout(arcore, monkeypatch, tmp_path):
    monkeypatch.setattr("arcore.cli.bench.SOURCE", tmp_path)
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    assert "did you mean 'sample'?" in arcore("bench", "smaple").err


def test_bench_unknown_suite(fails):
    assert "did you mean 'block_sparse_attention'?" in fails("bench", "block_sparse_atention")


def test_bench_hands_options_to_pytest_on_one_thread(arcore, monkeypatch):
    calls = []

    class Done:
        returncode = 5

    def run(command, **options):
        calls.append((command, options))
        return Done

    monkeypatch.setattr(subprocess, "run", run)
    assert arcore("bench", "block_sparse_attention", "-k", "forward").code == 5
    ((command, options),) = calls
    assert command[1:3] == ["-m", "pytest"]
    assert command[-2:] == ["-k", "forward"]
    assert command[3].endswith("bench/block_sparse_attention")
    assert options["env"]["OMP_NUM_THREADS"] == "1"


def test_a_warning_is_one_line_without_source():
    code = "import sys, warnings; from arcore import cli\nfrom arcore.cli import zoo\n"
    code += "kinds = UserWarning, FutureWarning\n"
    code += "zoo.main = lambda argv: [warnings.warn(kind('two\\nlines')) for kind in kinds] and 3\n"
    code += "sys.exit(cli.main(['zoo']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 3
    first, *others = done.stderr.splitlines()
    assert first == "arcore zoo: warning: two lines"
    assert "FutureWarning: two" in others[0], "what is not for users keeps its place"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("words", [["--filter", "var_t*"], []], ids=["short", "long"])
def test_an_output_that_cannot_be_written_is_one_sentence(words):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "arcore", "zoo", *words]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (
        2,
        "arcore zoo: error: cannot write the output: No space left on device\n",
    )
