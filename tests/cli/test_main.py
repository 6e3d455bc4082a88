"""The front door: `musicgenre <command>` and `python experiments/<command>.py` are one."""

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import config_flags

from musicgenre import __version__
from musicgenre.cli import app
from musicgenre.cli.main import command_modules, main
from musicgenre.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path.stem for path in (ROOT / "experiments").glob("[!_]*.py"))


def in_a_process(*arguments, **options):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        **options,
    )


@pytest.mark.parametrize("command", sorted(command_modules()))
def test_every_command_has_help_and_refuses_unknown_flags(command, capsys):
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    module = importlib.import_module(command_modules()[command])
    assert shown.startswith(module.__doc__.splitlines()[0])
    assert f"musicgenre {command.replace('import_', 'import-')} " in shown
    assert "\nflags:\n" in shown and "--config.batch_size" not in shown
    assert main([command, "--no_such_flag=1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the flags cannot be used: Unknown command line flag 'no_such_")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_the_overview_lists_every_command(arguments, capsys):
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = {line.split()[0] for line in lines if line.startswith("  ")}
    assert listed == set(command_modules()) and set(SCRIPTS) <= listed
    assert all(len(line.split()) > 1 for line in lines if line.startswith("  "))


def test_answers_without_work_import_no_jax():
    code = "import sys; from musicgenre.cli.main import main; main(sys.argv[1:]); "
    code += "sys.exit('jax' in sys.modules)"
    for arguments in (["--help"], ["train", "--help"], ["tag", "--tops=3"], ["evaluate"]):
        assert in_a_process("-c", code, *arguments).returncode == 0, arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tga", "x"], "no command 'tga'. Did you mean 'tag'?"),
        (["tag"], "no files: name sound files or folders."),
        (["tag", "x", "--tops=3"], "Unknown command line flag 'tops'. Did you mean: top ?"),
        (["tag", "x", "--top=0"], "--top=0: 0 is not a positive integer"),
        (["tag", "x", "--format=xml"], "--format=xml: value should be one of <table|jsonl|"),
        (["embed", "x"], "--out is needed: The .npz file to write."),
        (["evaluate"], "--workdir is needed: A run's folder, a bundle"),
        (["train", "--config=synthetic"], "--workdir is needed: The run's folder: config, metrics"),
        (["train", "--workdir=x"], "--config is needed, such as --config=synthetic."),
        (["train", "--workdir=x", "--config.seed=1"], "--config is needed before its fields"),
        (["prepare", "stray"], "unexpected argument 'stray': flags are written --name=value."),
        (["bundle", "runs/x"], "missing argument: out"),
        (["bundle", "runs/x", "a.safetensors", "b"], "unexpected argument 'b'"),
        (["export", "--out=x.onnx"], "missing argument: model"),
        (["download"], "--root is needed: Folder, created if missing."),
        (["figures"], "nothing to draw"),
        (["robustness", "--workdir=x", "--out=y"], "name either sound"),
        (["serve", "x"], "unexpected argument 'x'"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and len(error.splitlines()) == 1


def test_a_script_is_the_command(capsys, tmp_path):
    """One process each for what needs one; the scripts share all else with the commands."""
    for script in SCRIPTS:
        text = (ROOT / "experiments" / f"{script}.py").read_text()
        assert text.endswith('if __name__ == "__main__":\n    app.run(__name__)\n'), script
    done = in_a_process(ROOT / "experiments/train.py", "--help", cwd=tmp_path)
    assert main(["train", "--help"]) == 0
    assert (done.returncode, done.stdout) == (0, capsys.readouterr().out)
    done = in_a_process(ROOT / "experiments/train.py", "--config=gtzan_conv1d", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: --workdir is needed")
    done = in_a_process("-m", "musicgenre", "--version", cwd=tmp_path)
    assert done.stdout == f"musicgenre {__version__}\n"
    assert main(["train", "--version"]) == 0
    assert capsys.readouterr().out == done.stdout


def test_dashes_repeated_values_and_flags_after_arguments_are_understood():
    words = ["a.mp3", "--dry-run", "--clips", "b", "c", "--out=x-y", "d", "--clips=e"]
    expected = "a.mp3 --dry_run --clips=b --clips=c --out=x-y d --clips=e"
    assert app._normalised(words, ["clips"]) == expected.split()
    assert app._normalised(["-", "--", "--f-g"], []) == ["-", "--", "--f-g"]


@pytest.mark.parametrize("name", app.config_names())
def test_every_shipped_config_is_found_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path(app.config_file(name))
    assert path == ROOT / "configs" / f"{name}.py"
    assert app.config_file(f"{name}:argument") == f"{path}:argument"
    assert app.config_file(str(path)) == str(path)


def test_a_config_by_name_has_an_argument_and_fields(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = importlib.import_module("musicgenre.experiments.prepare")
    read = []
    monkeypatch.setattr(command, "main", lambda: read.append(app.get_config(command.FLAGS)))
    fields = ["--config.data.root=here", "--config.seed=3"]
    for _ in range(2):
        assert main(["prepare", "--config=mtat_fcn4:fcn5", *fields]) == 0
    assert main(["prepare", "--config", "mtat_fcn4", "--config.data.root=there"]) == 0
    assert [config.data.root for config in read] == ["here", "here", "there"]
    assert [config.seed for config in read] == [3, 3, 0]
    assert read[0].model.to_dict() == read[1].model.to_dict() != read[2].model.to_dict()
    filename = config_flags.get_config_filename(command.FLAGS["config"])
    assert filename == str(ROOT / "configs/mtat_fcn4.py")


def test_an_unknown_config_names_the_nearest():
    for name in ("gtzan_conv1", "configs/gtzan_conv1.py", "gtzan_conv1:small"):
        with pytest.raises(UserError, match=r"no such file or shipped config.* gtzan_conv1d"):
            app.config_file(name)
    with pytest.raises(UserError, match=r"Shipped: ablations/gtzan_"):
        app.config_file("")


def test_the_parallel_modes_are_those_of_training():
    from musicgenre.training.parallel import KINDS

    train = importlib.import_module("musicgenre.experiments.train")
    assert train.FLAGS["parallel"].parser.enum_values == list(KINDS)


def stop_with(error):
    def stopped(*arguments):
        raise error

    return stopped


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "error: stopped.\n"),
        (UserError("a.wav: wrong."), 2, "error: a.wav: wrong.\n"),
        (FileNotFoundError(2, "No such file", "b.wav"), 2, "error: b.wav: No such file.\n"),
    ],
)
def test_how_a_command_ends(error, code, message, monkeypatch, capsys):
    monkeypatch.setattr("musicgenre.cli.tag.main", stop_with(error))
    before, argv = signal.getsignal(signal.SIGTERM), sys.argv
    assert main(["tag", "x.wav"]) == code
    assert signal.getsignal(signal.SIGTERM) is before and sys.argv is argv
    assert capsys.readouterr().err == message


def test_an_error_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("musicgenre.cli.tag.main", stop_with(OSError("no file")))
    with pytest.raises(OSError, match="no file"):
        main(["tag", "x.wav"])


def test_sigterm_ends_a_command_and_removes_its_temporary_file(tmp_path):
    code = (
        "import os, signal, sys; from musicgenre.cli import files, main, tag\n"
        "def lines():\n    yield 'a'\n    os.kill(os.getpid(), signal.SIGTERM)\n    yield 'b'\n"
        "tag.main = lambda words: files.write_lines(lines(), 'labels.txt')\n"
        "sys.exit(main.main(['tag', 'x.wav']))"
    )
    done = in_a_process("-c", code, cwd=tmp_path)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_closed_pipe_is_no_error():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "musicgenre", "--help"],
        stdout=write,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    os.close(write)
    assert done.returncode == 0 and done.stderr == b""
