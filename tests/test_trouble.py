"""What happens to real people, and what the scripts do about it.

First a table: a command line that cannot work, and words of the one line that says why. Then every
number at its edges. Then trouble that comes from outside: signals, readers that leave, full disks,
two runs at once, machines that lack something.
"""
import asyncio
import contextlib
import dataclasses
import errno
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import TINY as TINY_40
from test_train import check_same_run, exit_code, in_child, last_step, logged, run_slowly

import kernel
import prepare_data
import sample
import train
from support import checkpoint, data_folder, files, pictures, sources, terminal
from support import text as texts
from support.checkpoint import load_checkpoint
from support.fields import flag
from support.machine import choose_device, will_compile

pytestmark = pytest.mark.usefixtures("few_reads")
ROOT = Path(__file__).resolve().parents[1]
TINY = [*TINY_40, "--max-steps", "20", "--log-every", "2"]
SCRIPTS = {"train.py": train.main, "prepare_data.py": prepare_data.main, "sample.py": sample.main}


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A finished run. Tests copy it before they change it."""
    out = tmp_path_factory.mktemp("out") / "run"
    assert train.main([*TINY, "--data", str(data), "--out-dir", str(out)]) == 0
    return out


@pytest.fixture
def here(data, run, tmp_path, monkeypatch):
    """A working folder with the corpus in data/facts, the finished run in out/run, and a text."""
    shutil.copytree(data, tmp_path / "data" / "facts")
    shutil.copytree(run, tmp_path / "out" / "run")
    (tmp_path / "my.txt").write_text("one two three\n" * 400)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(command):
    """A command line as one types it -> its exit status."""
    script, *argv = command.split()
    try:
        return SCRIPTS[script](argv)
    except SystemExit as stop:  # argparse's
        return stop.code


def refusal(command, capfd):
    """The one line with which a command line is refused."""
    capfd.readouterr()
    code = call(command)
    error = capfd.readouterr().err
    assert code not in (0, None), command
    assert error.startswith(command.split()[0] + ": ") and error.count("\n") == 1, (command, error)
    assert len(error) < 700, error
    return error


# --------------------------------------------------------------------------------------------------
# A command line that cannot work

TINY_TRAIN = "train.py " + " ".join(TINY) + " --data data/facts"


def write(path, content):
    """A step before the command: write a file."""
    def step():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            Path(path).write_bytes(content)
        else:
            Path(path).write_text(content)
    return step


def cut(path):
    """A step before the command: a file loses its second half, as on a full disk."""
    def step():
        whole = Path(path).read_bytes()
        Path(path).write_bytes(whole[:len(whole) // 2])
    return step


def drop_last_line(path):
    def step():
        lines = Path(path).read_bytes().splitlines(keepends=True)
        Path(path).write_bytes(b"".join(lines[:-1]))
    return step


def setting(**changes):
    """A step before the command: config.json has other settings."""
    def step():
        path = Path("out/run/config.json")
        config = json.loads(path.read_text())
        config["settings"].update(changes)
        path.write_text(json.dumps(config))
    return step


def other_tokens():
    prepare_data.make_text("my.txt", out="data/words", tokenizer="words", val_fraction=0.5)


def no_step():
    """Nothing happens before the command."""


def unfinished():
    """A step before the command: the run has its end left to do."""
    Path("out/run/result.json").unlink()


def meta(**changes):
    """A step before the command: the data's meta.json has other entries."""
    def step():
        path = Path("data/facts/meta.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return step


RESUME = "train.py --resume --out-dir out/run"
NOT_FINISHED = RESUME + " --log-every 5"
TEXT = "prepare_data.py my.txt --tokenizer bytes"
INIT = TINY_TRAIN + " --out-dir out/new --init-from out/run"
HUGGING_FACE = '{"architectures": ["GPT2LMHeadModel"], "n_embd": 768}'
# What happened before, the command, words of the answer.
TABLE = [
    # Foreign and broken files
    (write("out/run/config.json", HUGGING_FACE), RESUME, "config.json is broken, or another prog"),
    (write("out/run/config.json", "[]"), RESUME, "config.json is broken"),
    (write("out/run/config.json", '{"settings": null}'), RESUME, "config.json is broken"),
    (setting(mem_layers=None), RESUME, "config.json is broken"),
    (lambda: Path("out/run/config.json").unlink(), RESUME, "config.json does not exist"),
    (write("data/facts/meta.json", "{}"), TINY_TRAIN, "meta.json is broken"),
    (write("data/facts/meta.json", ""), TINY_TRAIN, "meta.json is broken"),
    (write("data/facts/meta.json", '{"a'), TINY_TRAIN, "--force"),
    (cut("data/facts/recall.npz"), TINY_TRAIN, "recall.npz is broken"),
    (write("data/facts/recall.npz", ""), TINY_TRAIN, "recall.npz is broken"),
    (lambda: np.savez("data/facts/recall.npz", control=[True]), TINY_TRAIN, "recall.npz is broken"),
    (lambda: Path("data/facts/recall.npz").unlink(), TINY_TRAIN, "recall.npz does not exist"),
    (cut("data/facts/train.bin"), TINY_TRAIN, "train.bin is broken"),
    (write("data/facts/val.bin", b""), TINY_TRAIN + " --out-dir out/new", "val.bin is broken"),
    (drop_last_line("out/run/tokenizer.tiktoken"), "sample.py out/run", "tokenizer.tiktoken is br"),
    (cut("out/run/ckpt.pt"), "sample.py out/run", "ckpt.pt is broken"),
    (write("out/run/ckpt.pt", "<html>"), "sample.py out/run", "ckpt.pt is broken"),
    (write("out/run/result.json", "{}"), "train.py --compare out/run", "result.json is broken"),
    (cut("out/run/log.jsonl"), "train.py --compare out/run", "log.jsonl is broken"),
    (no_step, "train.py --compare data/facts", "result.json does not exist"),
    (no_step, "sample.py data/facts", "ckpt.pt does not exist"),
    (write("data/t/meta.json", "{}"), "prepare_data.py my.txt --out data/t", "meta.json is broken"),
    (setting(n_embd=64), NOT_FINISHED, "config.json says n_embd 64, and ckpt.pt says 32"),
    (setting(max_steps=2), NOT_FINISHED, "config.json says max_steps 2, and ckpt.pt says 20"),
    (meta(window="x"), TINY_TRAIN, "its window is 'x'"),
    (meta(answers="x"), TINY_TRAIN, "its answers is 'x'"),
    (meta(vocab_size=70), TINY_TRAIN + " --out-dir out/new", "has the token"),
    (meta(tokens=dict(train="x", val=1)), TINY_TRAIN, "meta.json is broken"),
    (meta(settings=None), "prepare_data.py facts --out data/facts", "its settings is None"),
    # A file for a folder, data that has gone, another program's data
    (no_step, TINY_TRAIN.replace("data/facts", "my.txt"), "my.txt is a file"),
    (no_step, INIT.replace("out/run", "out/run/ckpt.pt"), "give the folder of a run"),
    (unfinished, RESUME + " --data data/gone", "if it was moved, give its folder with --data"),
    (write("ng/train.bin", "ab"), "prepare_data.py my.txt --tokenizer bytes --out ng", "--force"),
    (lambda: Path("out/run/ckpt.pt").unlink(), TINY_TRAIN + " --out-dir out/run", "holds a run al"),
    # Starting from another run's weights
    (no_step, INIT + " --n-embd 64", "--n-embd 64 is not the 32 of --init-from out/run"),
    (no_step, INIT.replace("out/run", "out/nosuch"), "out/nosuch/config.json does not exist"),
    (other_tokens, INIT.replace("data/facts", "data/words"), "--init-from out/run: it was trained"),
    (no_step, TINY_TRAIN + " --init-from out/run --out-dir out/run", "holds a run already"),
    # A choice that there is not
    (no_step, TINY_TRAIN + " --out-dir out/new --table-optimizer sgd", "choose row or adamw"),
    (no_step, TINY_TRAIN + " --out-dir out/new --mem-dtype int8", "choose float32 or bfloat16"),
    # A run that is there
    (no_step, RESUME + " --max-steps 999", "--init-from out/run --out-dir out/NAME"),
    # Texts
    (no_step, "prepare_data.py facts.txt", "facts.txt: its folder would be data/facts"),
    (no_step, "prepare_data.py nosuch.txt", "no such file"),
    (write("empty/a.md", "x"), "prepare_data.py empty", "there is no .txt file in this folder"),
    (write("my.txt", b"\xff\xfe1\x002\x00"), "prepare_data.py my.txt --tokenizer bytes", "UTF-8"),
    (write("my.txt", "one two".encode("utf-16-le") * 99), TEXT, "iconv"),
    (write("my.txt", "  \n"), "prepare_data.py my.txt --tokenizer bytes", "more text is needed"),
    # The preset's folder holds something else
    (lambda: prepare_data.make_text("my.txt", out="data/facts", tokenizer="bytes", force=True),
     "train.py --max-steps 1", "data/facts is a text, not the facts corpus"),
]


@pytest.mark.parametrize("before, command, words", TABLE)
def test_one_line(before, command, words, here, capfd):
    (here / "facts.txt").write_text("text")
    if command in (RESUME, NOT_FINISHED):
        unfinished()
    before()
    assert words in refusal(command, capfd)


def test_a_text_that_is_too_short_to_validate_on(here, capfd):
    """prepare_data.py says so, and then train.py, both with the way out."""
    assert call("prepare_data.py my.txt --tokenizer bytes") == 0
    assert "larger --val-fraction" in capfd.readouterr().out
    error = refusal("train.py tinystories --data data/my --device cpu", capfd)
    assert "val.bin has" in error and "--val-fraction" in error
    # The way out, to the letter.
    assert call("prepare_data.py my.txt --tokenizer bytes --val-fraction 0.2 --force") == 0
    assert "larger --val-fraction" not in capfd.readouterr().out


# --------------------------------------------------------------------------------------------------
# Numbers at their edges

EDGES = ("0", "-1", "nan", "inf", "1e30", str(2**64))


def is_one_line_or_works(command, capfd):
    capfd.readouterr()
    code = call(command)
    error = capfd.readouterr().err
    assert "Traceback" not in error
    lines = error.count("\n")
    if code == 0:
        assert lines == 0 or command.startswith("sample.py"), (command, error)
    else:
        assert lines == 1, (command, error)
    return code == 0


def numeric_flags(script):
    """The flags of a script that take a number."""
    if script == "train.py":
        names = [f.name for f in dataclasses.fields(train.Settings) if f.type in (int, float)]
    elif script == "sample.py":
        names = [f.name for f in dataclasses.fields(sample.Numbers)]
    else:
        names = [f.name for settings in (prepare_data.Facts, prepare_data.Text)
                 for f in dataclasses.fields(settings) if f.type in (int, float)]
    return [flag(name) for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_at_its_edges(script, here, capfd):
    works = {"0": set(), "-1": set()}
    commands = {
        "train.py": TINY_TRAIN + " --max-steps 1 --eval-windows 1 --out-dir out/{i} {flag} {edge}",
        "prepare_data.py": "prepare_data.py {source} --out data/{i} {flag} {edge}",
        "sample.py": "sample.py out/run --recall {flag} {edge}",
    }
    names = numeric_flags(script)
    assert len(names) > 5
    for name in names:
        for i, edge in enumerate(EDGES):
            is_for_texts = name in ("--vocab-size", "--val-fraction", "--workers")
            source = "facts --people 40 --control 5 --documents 64 --val-documents 9"
            if is_for_texts:
                source = "my.txt --tokenizer bytes"
            command = commands[script].format(i=f"{name[2:]}{i}", flag=name, edge=edge,
                                              source=source)
            if is_one_line_or_works(command, capfd):
                works.setdefault(edge, set()).add(name)
    assert works.get("nan", set()) == set()
    if script == "train.py":
        # 0 means "off", "all" or "as the data has it".
        assert {"--grad-clip", "--warmup-steps", "--micro-batch-size", "--weight-decay",
                "--dropout", "--seed", "--mem-parallel"} <= works["0"]
        assert not works["-1"]
        # The first step of any learning rate is taken; the loss is nan after it.
        assert works[str(2**64)] == {"--grad-clip", "--learning-rate", "--value-lr",
                                      "--expert-lr", "--half-key-share"}


def test_grad_clip_0_is_off(here):
    """With a clip of 0, steps are those of a clip that is never reached."""
    for name, clip in (("off", "0"), ("high", "1e9")):
        assert call(f"{TINY_TRAIN} --max-steps 3 --grad-clip {clip} --out-dir out/{name}") == 0
    off, _ = load_checkpoint("out/off")
    high, _ = load_checkpoint("out/high")
    for a, b in zip(off.parameters(), high.parameters()):
        assert torch.equal(a, b)


# --------------------------------------------------------------------------------------------------
# Input that can only be read

def make_read_only(folder):
    for path in folder.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    folder.chmod(0o555)


def make_writable(folder):
    folder.chmod(0o755)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def test_nothing_is_renamed_locked_or_written_beside_the_input(here, monkeypatch):
    """root may write everywhere, so we watch the calls instead of the permissions."""
    source = here / "source"
    source.mkdir()
    shutil.copy("my.txt", source)
    shutil.copytree("data/facts", source / "facts")
    make_read_only(source)
    before = {path: path.stat().st_mtime_ns for path in (source, *source.rglob("*"))}

    def is_input(*paths):
        return any(str(source) in str(Path(path).absolute()) for path in paths)
    for name in ("rename", "replace", "unlink", "mkdir", "chmod"):
        real = getattr(os, name)

        def guarded(*args, real=real, **more):
            assert not is_input(*(a for a in args if isinstance(a, (str, Path)))), args
            return real(*args, **more)
        monkeypatch.setattr(os, name, guarded)
    assert call("prepare_data.py source/my.txt --tokenizer bytes --val-fraction 0.5 "
                "--out data/x") == 0
    tiny = TINY_TRAIN.replace("data/facts", "source/facts")
    assert call(f"{tiny} --max-steps 2 --out-dir out/new") == 0
    # Copies are not read-only: the run can be resumed, and made again.
    for path in Path("out/new").iterdir():
        assert path.stat().st_mode & 0o200, path
    after = {path: path.stat().st_mtime_ns for path in (source, *source.rglob("*"))}
    assert after == before
    monkeypatch.undo()
    make_writable(source)


# --------------------------------------------------------------------------------------------------
# The end of a run

def test_a_picture_that_fails_costs_nothing_else(here, monkeypatch, capfd):
    def broken(folders, path):
        raise ImportError("no matplotlib")
    monkeypatch.setattr(pictures, "draw", broken)
    assert call(TINY_TRAIN + " --max-steps 2 --out-dir out/new") == 0
    output = capfd.readouterr()
    assert output.err == (
        "train.py: no picture out/new/curves.png (ImportError: no matplotlib); the run is finished "
        "and saved, and --compare out/new draws it\n")
    assert "saved in out/new\n" in output.out
    assert Path("out/new/reads.npz").exists() and not Path("out/new/curves.png").exists()
    assert last_step(Path("out/new")) == 2
    assert "no picture" in refusal("train.py --compare out/new", capfd)


@pytest.mark.parametrize("fails", ["evaluate", "write_json"])
def test_the_weights_come_first(fails, here, monkeypatch, capfd):
    """Whatever breaks at the end, the weights are saved, and --resume makes up for the rest."""
    command = TINY_TRAIN + " --out-dir out/new --eval-every 1000"
    with monkeypatch.context() as patch:
        real = getattr(train, fails)

        def broken(*args):
            if fails == "write_json" and "config" in str(args[0]):
                return real(*args)
            raise ValueError("the end")
        patch.setattr(train, fails, broken)
        assert "the end" in refusal(command, capfd)
    assert last_step(Path("out/new")) == 20
    assert call(command + " --resume") == 0
    result = json.loads(Path("out/new/result.json").read_text())
    right = json.loads(Path("out/run/result.json").read_text())
    for name in ("val_loss", "recall", "bits_stored", "tokens", "memory_kl"):
        assert result[name] == right[name]
    check_weights("out/new", "out/run")
    steps = [line["step"] for line in logged(Path("out/new"))]
    assert steps == sorted(set(steps)) and steps[-1] == 20
    assert logged(Path("out/new"))[-1] == logged(Path("out/run"))[-1]


def check_weights(one, other):
    a, _ = load_checkpoint(one)
    b, _ = load_checkpoint(other)
    for p, q in zip(a.parameters(), b.parameters()):
        assert torch.equal(p, q)


# --------------------------------------------------------------------------------------------------
# The outside world goes away

def wait_for_log(out, pid):
    deadline = time.monotonic() + 60
    while not (out / "log.jsonl").exists() or not (out / "log.jsonl").stat().st_size:
        assert time.monotonic() < deadline, "the run has not begun"
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the run has ended"
        time.sleep(0.005)


def start_slowly(here, hang_up, *more):
    """Start a run in out/new and send it SIGHUP -> its pid. hang_up: what it does about that."""
    def start(args):
        signal.signal(signal.SIGHUP, hang_up)  # the tests may run under nohup, or not
        return run_slowly(args)

    out = here / "out" / "new"
    pid = in_child(start, [*TINY, "--data", "data/facts", "--out-dir", str(out), "--log-every", "1",
                           *more])
    wait_for_log(out, pid)
    os.kill(pid, signal.SIGHUP)
    return pid


def test_a_terminal_that_closes_saves(here):
    """As SIGINT and SIGTERM do: see `stopped` in test_train.py, and the end of this file."""
    pid = start_slowly(here, signal.SIG_DFL, "--eval-every", "1000")
    assert exit_code(pid) == 130
    assert 0 < last_step(Path("out/new")) < 20
    assert call("train.py --resume --out-dir out/new") == 0
    check_weights("out/new", "out/run")


def test_nohup_is_respected(here):
    pid = start_slowly(here, signal.SIG_IGN, "--max-steps", "8")
    assert exit_code(pid) == 0
    assert last_step(Path("out/new")) == 8


@pytest.mark.parametrize("stdout", ["closed pipe", "/dev/full"])
def test_a_run_goes_on_without_its_reader(stdout, here):
    def run_to(args):
        if stdout == "closed pipe":
            reader, writer = os.pipe()
            os.close(reader)
        else:
            writer = os.open("/dev/full", os.O_WRONLY)
        os.dup2(writer, 1)
        sys.stdout = open(1, "w", closefd=False)
        terminal.steady_output()
        code = train.main(args)
        sys.stdout.flush()
        return code
    pid = in_child(run_to, [*TINY, "--data", "data/facts", "--out-dir", "out/new"])
    assert exit_code(pid) == 0
    check_same_run(Path("out/new"), Path("out/run"))


def test_a_full_disk_under_the_log(here, monkeypatch, capfd):
    """A line that cannot be written is lost, with one message, and the run goes on."""
    real = open
    lines = 0

    def full(path, mode="r", *args, **more):
        nonlocal lines
        if str(path).endswith("log.jsonl") and mode == "a":
            lines += 1
            if 2 <= lines <= 4:
                with real(path, "a") as file:
                    file.write('{"half a li')  # what fitted
                raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, mode, *args, **more)
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", full)
        assert call(TINY_TRAIN + " --out-dir out/new") == 0
    messages = capfd.readouterr().err.splitlines()
    assert len(messages) == 3
    for step, message in zip((4, 6, 8), messages):
        assert "log.jsonl" in message and "No space left" in message
        assert f"the line of step {step} is lost, and the run goes on" in message
    right = logged(Path("out/run"))
    assert lines == len(right) > 5
    assert logged(Path("out/new")) == [right[0], *right[4:]]


def test_a_checkpoint_that_cannot_be_written_does_not_end_a_run(here, monkeypatch, capfd):
    real = checkpoint.write_whole
    tries = 0

    def full(path, write):
        nonlocal tries
        if Path(path).name == "ckpt.pt":
            tries += 1
            if tries <= 2:
                raise ValueError("cannot write ckpt.pt")
        real(path, write)
    monkeypatch.setattr(checkpoint, "write_whole", full)
    assert call(TINY_TRAIN + " --out-dir out/new") == 0
    assert capfd.readouterr().err.count("The run goes on, and will try again later") == 2
    check_weights("out/new", "out/run")


def test_a_full_disk_keeps_no_slices_that_nobody_needs(here, monkeypatch):
    """Over ranks each failed checkpoint would leave its slices and fill the disk further."""
    names = ["ckpt-7-0of1.pt"]
    Path(names[0]).write_text("half")
    checkpoint.remove_slices(Path("."), names, rank=0)
    checkpoint.remove_slices(Path("."), names, rank=1)  # this rank has none
    assert not Path(names[0]).exists()


def test_a_full_disk_is_named(here):
    """torch.save raises an error of its own, which does not say why."""
    def write(part):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 704 vs 598")
    with pytest.raises(ValueError, match="OSError: No space left on device"):
        files.write_whole(here / "x", write)


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_while_torch_is_imported(script, tmp_path):
    """Whatever takes time to import comes after quiet_ctrl_c. Here it presses Ctrl-C itself."""
    for name in ("numpy", "torch", "tiktoken", "tqdm", "filelock", "requests"):
        write(tmp_path / f"{name}.py", "import os, signal; os.kill(os.getpid(), signal.SIGINT)")()
    done = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.stderr == b""
    assert done.returncode == -signal.SIGINT


def test_output_that_was_closed(here):
    """`>&-`: Python has no sys.stdout then."""
    def closed(argv):
        sys.stdout = None
        sys.stderr = None
        terminal.steady_output()
        return prepare_data.main(argv)
    pid = in_child(closed, ["my.txt", "--tokenizer", "bytes", "--out", "data/x"])
    assert exit_code(pid) == 0
    assert Path("data/x/meta.json").exists()


# --------------------------------------------------------------------------------------------------
# Encodings

@pytest.mark.slow
def test_a_terminal_that_lacks_characters(here):
    """Every script, in an encoding that lacks the · and more."""
    commands = [
        ["train.py", *TINY, "--data", "data/facts", "--out-dir", "out/new", "--max-steps", "2"],
        ["train.py", "--help"],
        ["sample.py", "--help"],
        ["prepare_data.py", "--help"],
        ["runs/report.py", "--help"],
        ["tests/measure_gpu.py", "--report", str(here / "nosuch.json")],
    ]
    for command in commands:
        code = exit_code(in_child(as_script, ROOT / command[0], command[1:], here, "cp932"))
        assert (here / "stderr").read_bytes() == b""
        assert (here / "stdout").read_bytes()
        assert code == 0


def as_script(path, argv, folder, encoding):
    """Run a script in this process, as python would -> its exit status.

    What it prints goes to the files stdout and stderr of the folder.
    """
    for name in ("stdout", "stderr"):
        setattr(sys, name, open(folder / name, "w", encoding=encoding))
    sys.argv = [str(path), *argv]
    sys.path.insert(0, str(path.parent))
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as stop:
        return stop.code
    finally:
        sys.stdout.flush()


# --------------------------------------------------------------------------------------------------
# Two at once

def test_two_processes_make_the_same_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text("one two\n\nthree\n\n" * 20000)
    for argv in (["facts", "--people", "300", "--documents", "100000", "--out", "d"],
                 ["my.txt", "--tokenizer", "bytes", "--separator", r"\n\n", "--out", "e"]):
        children = [in_child(prepare_data.main, argv) for _ in range(3)]
        assert [exit_code(pid) for pid in children] == [0, 0, 0]
        names = {path.name for path in Path(argv[-1]).iterdir()}
        assert names - {".lock", "recall.npz"} == {
            "meta.json", "tokenizer.tiktoken", "train.bin", "val.bin"}
        meta = data_folder.read_meta(argv[-1])
        for name, checksum in meta["sha256"].items():
            assert files.sha256(Path(argv[-1]) / name) == checksum


def test_the_same_run_folder_twice(here, capfd):
    """Refused before the first checkpoint, too. --resume waits until the other one has ended."""
    out = here / "out" / "new"
    args = [*TINY_40, "--data", "data/facts", "--out-dir", str(out), "--eval-every", "1000"]
    pid = in_child(run_slowly, args)
    wait_for_log(out, pid)
    assert "another run is writing to" in refusal("train.py " + " ".join(args), capfd)
    assert call("train.py --resume " + " ".join(args)) == 0
    assert exit_code(pid) == 0
    output = capfd.readouterr().out
    assert "waiting: another run is writing" in output
    assert "has finished its 40 steps" in output
    assert json.loads((out / "result.json").read_text())["tokens_per_s"] > 0


# --------------------------------------------------------------------------------------------------
# The wrong diagnosis

@pytest.mark.parametrize("error, words", [
    (PermissionError(errno.EACCES, "Permission denied"), "cannot be read (PermissionError: Permi"),
    (OSError(errno.EIO, "Input/output error"), "cannot be read (OSError: Input/output error)"),
    (MemoryError(), "too little memory"),
    (RuntimeError("[enforce fail] can't allocate memory: 9 bytes"), "too little memory"),
    (RuntimeError("PytorchStreamReader failed"), "is broken, or another program's"),
])
def test_a_checkpoint_that_cannot_be_read(error, words, here, monkeypatch, capfd):
    def fails(path):
        raise error
    monkeypatch.setattr(checkpoint, "read_checkpoint", fails)
    (here / "out/run/result.json").unlink()
    for command in (RESUME, "sample.py out/run"):
        assert words in refusal(command, capfd)


@pytest.mark.parametrize("environment, words", [
    (dict(WORLD_SIZE="2"), "there is no RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
    (dict(WORLD_SIZE="two"), "is not a number"),
    (dict(RANK="3"), "RANK 3 is not in 0..0"),
    (dict(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", MASTER_ADDR="nosuch.invalid",
          MASTER_PORT="x"), "cannot reach the others"),
])
def test_an_environment_that_is_not_torchruns(environment, words, here, monkeypatch, capfd):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert words in refusal(TINY_TRAIN + " --out-dir out/new", capfd)


def test_a_fault_of_the_gpu_is_not_a_full_disk(here):
    def write(part):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="CUDA error"):
        files.write_whole(here / "x", write)


@pytest.mark.parametrize("error, words", [
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"), "out of memory"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried 9 GiB"), "out of memory"),
    (MemoryError(), "out of memory"),
    (RuntimeError("[gloo/transport] Connection closed by peer"), "--resume and the same --out-dir"),
])
def test_errors_of_torch(error, words, here, monkeypatch, capfd):
    def fails(trainer, step):
        raise error
    monkeypatch.setattr(train.Trainer, "step", fails)
    assert words in refusal(TINY_TRAIN + " --out-dir out/new", capfd)


def test_a_fault_of_this_program_keeps_its_traceback(here, monkeypatch):
    def fails(trainer, step):
        raise RuntimeError("shapes do not fit")
    monkeypatch.setattr(train.Trainer, "step", fails)
    with pytest.raises(RuntimeError, match="shapes"):
        call(TINY_TRAIN + " --out-dir out/new")


# --------------------------------------------------------------------------------------------------
# Texts as they are

def test_line_ends_of_windows(here):
    Path("unix.txt").write_bytes(b"one\n\ntwo\n\nthree")
    Path("windows.txt").write_bytes(b"one\r\n\r\ntwo\r\n\r\nthree")
    for name in ("unix", "windows"):
        for i, separator in enumerate((r"\n\n", r"\r\n\r\n", "\n\n")):
            out = f"data/{name}{i}"
            assert prepare_data.main([f"{name}.txt", "--tokenizer", "bytes", "--out", out,
                                      "--separator", separator]) == 0
            assert data_folder.read_meta(out)["documents"] == {"train": 2, "val": 1}
            assert Path(out, "train.bin").read_bytes() == Path("data/unix0/train.bin").read_bytes()


def test_a_line_end_may_span_two_reads(here, monkeypatch):
    monkeypatch.setattr(texts, "BATCH", 3)
    Path("t.txt").write_bytes(b"ab\r\n\rc\r\n")
    assert "".join(texts.characters(Path("t.txt"))) == "ab\n\nc\n"


def test_a_separator_that_is_nowhere_is_named(here, capfd):
    assert prepare_data.main(["my.txt", "--tokenizer", "bytes", "--separator", "@@"]) == 0
    assert "one document, as '@@' does not stand between any two" in capfd.readouterr().out


def test_a_text_that_changed_and_kept_its_length(here, capfd):
    command = "prepare_data.py my.txt --tokenizer bytes --val-fraction 0.5"
    assert call(command) == 0
    assert call(command) == 0
    assert "is finished" in capfd.readouterr().out
    Path("my.txt").write_text(Path("my.txt").read_text().replace("one", "two"))
    assert "--force" in refusal(command, capfd)


def test_a_folder_of_texts(here):
    for name, text in (("b.txt", "second"), ("a.txt", "first"), ("sub/c.txt", "third")):
        write(f"texts/{name}", text)()
    assert call("prepare_data.py texts --tokenizer bytes --val-fraction 0.5") == 0
    tokens = np.fromfile("data/texts/train.bin", "<u2")
    assert data_folder.read_meta("data/texts")["documents"] == {"train": 1, "val": 2}
    assert bytes(tokens[:-1].astype(np.uint8)) == b"second"


def test_where_a_text_goes(here):
    assert sources.default_folder("a/.txt") == "data/txt"
    assert sources.default_folder("my.tar.gz") == "data/my"
    assert sources.default_folder("tinystories") == "data/tinystories"
    for name in ("openwebtext.txt", "a/facts.txt.gz", "/"):
        with pytest.raises(ValueError, match="--out data/NAME"):
            sources.default_folder(name)


# --------------------------------------------------------------------------------------------------
# Same words, same result

def test_both_scripts_make_the_same_default_corpus(here, monkeypatch):
    made = []
    monkeypatch.setattr(prepare_data, "check_facts", made.append)
    monkeypatch.setattr(data_folder, "is_finished", lambda *_: True)
    assert call("prepare_data.py") == 0
    shutil.rmtree("data")
    s, preset, *_ = train.read_settings([])
    train.make_missing_data(s, preset)
    assert len(made) == 2
    assert made[0] == made[1]


# --------------------------------------------------------------------------------------------------
# Machines

@contextlib.contextmanager
def cuda(monkeypatch, gpus=1, bfloat16=True):
    """Torch says that there are GPUs."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: gpus)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bfloat16)
        patch.setattr(torch.cuda, "get_device_name", lambda *_: "Some GPU")
        patch.setattr(torch.cuda, "set_device", lambda device: None)
        yield patch


def settings(*argv):
    return train.read_settings(list(argv))[0]


def test_more_ranks_than_gpus(monkeypatch):
    with cuda(monkeypatch, gpus=2):
        assert choose_device(settings(), local_rank=1, world=3) == "cuda:1"
        with pytest.raises(ValueError, match="rank 2 of this machine has no GPU.*per_node=2"):
            choose_device(settings(), local_rank=2, world=3)


def test_a_gpu_without_bfloat16(monkeypatch, capfd):
    """Only a table that is held in it is refused. --data ends the others, before they train."""
    command = "train.py facts-gpu --data nosuch"
    with cuda(monkeypatch, bfloat16=False):
        assert "--mem-dtype float32" in refusal(command, capfd)
        for more in ("--ffn dense", "--mem-dtype float32"):
            assert "nosuch/meta.json does not exist" in refusal(f"{command} {more}", capfd)


def test_a_single_gpu_for_several_ranks(monkeypatch):
    with cuda(monkeypatch, gpus=2):
        with pytest.raises(ValueError, match="each has its own GPU: use --device cuda"):
            choose_device(settings("--device", "cuda:0"), local_rank=0, world=2)
        assert choose_device(settings("--device", "cuda:1")) == "cuda:1"


def test_several_ranks_on_a_mac(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(settings()) == "mps"
    assert choose_device(settings(), world=2) == "cpu"
    with pytest.raises(ValueError, match="--device mps serves one rank only"):
        choose_device(settings("--device", "mps"), world=2)


def test_without_a_triton_that_works_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(kernel, "triton_problem", lambda: "")
    assert will_compile(None, "cuda:0")
    assert not will_compile(None, "cpu")
    monkeypatch.setattr(kernel, "triton_problem", lambda: "no C compiler")
    assert not will_compile(None, "cuda:0")
    assert will_compile(True, "cuda:0")
    assert not kernel.uses_triton("cuda")
    assert kernel.describe_backend("cuda") == "memory: torch (no C compiler)"


def test_triton_is_tried_before_it_is_used(monkeypatch):
    def fails(*args):
        raise subprocess.CalledProcessError(1, ["/bin/false"])
    monkeypatch.setattr(kernel, "INTERPRETED", False)
    monkeypatch.setattr(kernel, "gather_triton", fails)
    monkeypatch.setattr(torch, "ones", lambda *_, device: None)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    kernel.triton_problem.cache_clear()
    assert "as it does without a C compiler (CalledProcessError" in kernel.triton_problem()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="backend 'triton' cannot run here: Triton fails"):
        kernel.backend("triton")
    kernel.triton_problem.cache_clear()


# --------------------------------------------------------------------------------------------------
# Going on

def test_a_new_run_from_the_weights_of_another(here, capfd):
    command = INIT + " --learning-rate 1e-9 --value-lr 1e-9 --seed 5 --dropout 0.1"
    assert call(command + " --max-steps 2") == 0
    old, _ = load_checkpoint("out/run")
    new, state = load_checkpoint("out/new")
    assert state["step"] == 2 and state["settings"]["dropout"] == 0.1
    for p, q in zip(old.parameters(), new.parameters()):
        assert torch.allclose(p, q, atol=1e-6)
    assert "begins with the weights of out/run" in capfd.readouterr().out
    fresh, _ = load_checkpoint("out/new")
    assert fresh.config.n_embd == 32
    # The same words again go on, and need not find the first run any more.
    shutil.rmtree("out/run")
    assert call(command + " --max-steps 2 --resume") == 0


def test_one_command_line_starts_goes_on_and_ends(here, capfd):
    """As schedulers and torchrun --max-restarts give it, again and again."""
    command = TINY_TRAIN + " --resume --out-dir out/new"
    pid = in_child(run_slowly, command.split()[1:])
    wait_for_log(Path("out/new"), pid)
    os.kill(pid, signal.SIGTERM)
    assert exit_code(pid) == 130
    assert call(command) == 0
    assert "resumed at step" in capfd.readouterr().out
    check_same_run(Path("out/new"), Path("out/run"))
    before = (Path("out/new/ckpt.pt").stat().st_mtime_ns, Path("out/new/log.jsonl").read_text())
    assert call(command) == 0
    assert "out/new has finished its 20 steps" in capfd.readouterr().out
    assert before == (Path("out/new/ckpt.pt").stat().st_mtime_ns,
                      Path("out/new/log.jsonl").read_text())


def test_a_rank_leaves_when_torchrun_is_gone(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    old = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    # Not 1, which may have started these tests.
    monkeypatch.setattr(terminal, "PARENT", 4321)
    monkeypatch.setattr(os, "getppid", lambda: 4321)
    with terminal.StopRequest() as stop:
        assert not stop
        monkeypatch.setattr(os, "getppid", lambda: 1)  # whoever takes in the children of the dead
        assert stop
    # A rank may get a signal twice, and the second one while it ends.
    assert signal.getsignal(signal.SIGTERM) == stop.handle
    for name, handler in old.items():
        signal.signal(name, handler)


# --------------------------------------------------------------------------------------------------
# In somebody else's process: a notebook, a server

def state_of_process():
    """What of this process train.main changes."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return [torch.get_float32_matmul_precision(), kernel.backend(),
            torch.get_rng_state().tolist(), *map(signal.getsignal, numbers)]


@pytest.mark.parametrize("ending", ["finished", "stopped", "failed"])
def test_a_call_leaves_the_process_as_it_was(ending, here, monkeypatch):
    def step(trainer, number):
        if ending == "stopped" and number == 3:
            os.kill(os.getpid(), signal.SIGINT)  # Stop in a notebook
        if ending == "failed" and number == 3:
            raise ValueError("no")
        return real(trainer, number)
    real = train.Trainer.step
    monkeypatch.setattr(train.Trainer, "step", step)
    before = state_of_process()
    code = call(TINY_TRAIN + " --backend torch --out-dir out/new")
    assert code == dict(finished=0, stopped=130, failed=1)[ending]
    assert state_of_process() == before
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)


def test_sampling_leaves_the_process_as_it_was(here):
    before = state_of_process()
    for flags in ("--recall", "--prompt x", "--show-memory x", "--slot 3"):
        assert sample.main(["out/run", *flags.split(), "--backend", "reference"]) == 0
        assert state_of_process() == before


def test_a_run_in_a_thread(here):
    before = state_of_process()
    argv = (TINY_TRAIN + " --out-dir out/new").split()[1:]
    assert asyncio.run(asyncio.to_thread(train.main, argv)) == 0
    assert state_of_process() == before
    check_same_run(Path("out/new"), Path("out/run"))
