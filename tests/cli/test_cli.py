"""The command: its sub-commands, what it says of itself and of errors, and that a wheel has all of it."""

import os
import resource
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from programs import ROOT

from olmo_fn import __version__
from olmo_fn.cli import main as cli
from olmo_fn.presets import CONFIGS


def olmo_fn(*words, cwd=ROOT, path=ROOT):
    command = [sys.executable, "-m", "olmo_fn", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


def test_it_names_its_commands_and_its_version(capsys):
    assert cli.main(["--help"]) == cli.main([]) == cli.main(["--version"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in cli.COMMANDS)
    assert text.endswith(f"\nolmo-fn {__version__}\n")


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "train"])
def test_every_command_has_a_help_with_its_own_spelling(name, capsys):
    assert cli.main([name, "--help"]) == 0
    assert f"usage: olmo-fn {name} " in capsys.readouterr().out


def test_train_lists_its_presets(capsys):
    assert cli.main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: olmo-fn train ")
    assert all(f"\n  {name} " in text for name in CONFIGS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "'trian' is no command, did you mean train? There are train, generate"),
        (["train", "olmo2-1o"], "'olmo2-1o' is no preset, and no run's config.yaml or folder, did you mean olmo2-1m?"),
        (["train", "--optim.lr", "1"], "the preset comes first: olmo-fn train olmo2-tiny --optim.lr 1"),
        (["train", "nowhere/config.yaml"], "'nowhere/config.yaml' is not there"),
        (["generate", "nowhere"], "nowhere is not there; give the folder of a run"),
        (["plan", "olmo9", "--gpus", "8"], "'olmo9' is neither a preset nor a config.yaml"),
        (["pipeline", "interleaved", "--chunks", "1"], "interleaved"),
        (["replay", "nowhere", "--step", "3"], "nowhere"),
        (["average", "nowhere", "-o", "x"], "nowhere: no such folder"),
        (["plot", "schedule", "cosne"], "'cosne' is no schedule, preset or run"),
        (["checkpoint", "nowhere"], "nowhere: no such folder"),
        (["tokenize", "nowhere.txt", "--output", "x"], "nowhere.txt"),
    ],
)
def test_errors_of_all_commands_are_one_line_and_exit_code_2(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("module", ["average", "checkpoints", "data.tokenize", "evaluate", "plot"])
def test_a_module_that_was_a_command_says_which_one_it_is_now(module):
    name = f"olmo_fn.{module}"
    loaded = sys.modules.pop(name, None)
    try:
        with pytest.raises(SystemExit, match="olmo-fn") as end:
            runpy.run_module(name, run_name="__main__")
        assert str(end.value).split()[-1] in cli.COMMANDS
    finally:
        sys.modules.update({name: loaded} if loaded else {})


def test_a_reader_that_has_enough_and_ctrl_c(capfd):
    def broken():
        raise BrokenPipeError

    def interrupted():
        raise KeyboardInterrupt

    assert cli.exit_code(interrupted) == 130
    assert capfd.readouterr().err == "interrupted\n"
    program = "import sys; from olmo_fn.cli.main import exit_code\ndef command():\n  while True: print('x')\n"
    program += "sys.exit(exit_code(command))"
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"x\n"
    process.stdout.close()
    assert (process.wait(60), process.stderr.read()) == (0, b"")


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["train", "olmo2-tiny", "--optim.name", "muon", "--help"]])
def test_help_imports_no_torch(words):
    code = f"import sys; from olmo_fn.cli.main import main\ntry: main({words})\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'matplotlib', 'tokenizers'} & set(sys.modules)"
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 2  # seconds of a processor


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder into which the wheel of this tree is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = folder / "source"
    ignored = {".git", ".venv", "runs", "build"}
    source.mkdir()
    for path in ROOT.iterdir():
        if path.name not in ignored and not path.name.endswith(".egg-info"):
            (source / path.name).symlink_to(path)
    options = ["--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "wheel", *options, "--wheel-dir", str(folder), str(source)], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", *options, "--target", str(folder / "site"), str(wheel)], check=True)
    return wheel, folder / "site"


def test_the_wheel_has_every_module_and_nothing_of_a_clone(installed):
    names = set(zipfile.ZipFile(installed[0]).namelist())
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "olmo_fn").rglob("*.py")} <= names
    assert not [name for name in names if not name.startswith(("olmo_fn/", "olmo_fn-"))]
    assert "olmo_fn/py.typed" in names
    entry = zipfile.ZipFile(installed[0]).read(f"olmo_fn-{__version__}.dist-info/entry_points.txt").decode()
    assert "olmo-fn = olmo_fn.cli.main:program" in entry


def test_it_runs_from_any_folder(installed, tmp_path):
    _, site = installed
    assert olmo_fn("--version", cwd=tmp_path, path=site).stdout == f"olmo-fn {__version__}\n"
    script = subprocess.run(
        [site / "bin" / "olmo-fn", "--version"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True
    )
    assert script.stdout.decode() == f"olmo-fn {__version__}\n", script.stderr
    found = olmo_fn("train", "olmo2-tiny", "--dry-run", cwd=tmp_path, path=site)
    assert found.returncode == 0, found.stderr
    assert "  name: muon" in found.stdout
    assert not Path(tmp_path, "runs").exists()
    code = f"import olmo_fn; assert olmo_fn.__file__.startswith({str(site)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)}, check=True)
