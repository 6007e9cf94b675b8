"""
train.py: batches, one step, the run folder, exact resume, and what a user sees when something is
wrong.

Most tests train a model of 40 steps and some 20,000 parameters, which takes half a second.
"""
import contextlib
import dataclasses
import json
import math
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from test_parallel import job_script, launch

import kernel
import time_steps
import train
from model import GPT, GPTConfig
from support import pictures, run_folder, stopwatch, terminal
from support import settings as run_settings
from support.checkpoint import load_checkpoint
from support.machine import choose_device

pytestmark = pytest.mark.usefixtures("few_reads")
ROOT = Path(__file__).resolve().parents[1]
TINY = ("--n-layer 2 --n-embd 32 --n-head 2 --mem-n-keys 16 --mem-topk 4 --mem-heads 2 "
        "--batch-size 16 --log-every 5 --eval-every 10 --eval-windows 64 --max-steps 40 "
        "--warmup-steps 5 --device cpu").split()


# ---- runs, and what they leave behind

def flags(data, out, *more):
    """The command line of a tiny run."""
    return [*TINY, "--data", str(data), "--out-dir", str(out), *more]


# Dropout must be the same after a resume, and the rounding of a bfloat16 table, too. Runs of a
# float32 table are killed and resumed in test_trouble.py.
RESUMED = ["--dropout", "0.1", "--mem-dtype", "bfloat16"]


@pytest.fixture(scope="module")
def whole(data, original_draw, tmp_path_factory):
    """A run that nothing interrupted, with its picture. Tests read it only."""
    out = tmp_path_factory.mktemp("out") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "draw", original_draw)
        assert train.main(flags(data, out, *RESUMED)) == 0
    assert weights(out)["table.values"].dtype == torch.bfloat16
    return out


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """The same run, stopped by Ctrl-C on its way. Tests that go on with it copy it first."""
    out = tmp_path_factory.mktemp("out") / "stopped"
    stop_by_ctrl_c(flags(data, out, *RESUMED), out)
    return out


@pytest.fixture(scope="module")
def dense(data, tmp_path_factory):
    """The run without memory."""
    out = tmp_path_factory.mktemp("out") / "dense"
    assert train.main(flags(data, out, "--ffn", "dense")) == 0
    return out


def read(path):
    return json.loads(path.read_text())


def logged(out):
    """log.jsonl without what differs from run to run: the time."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"]
    return lines


def weights(out):
    """Name: tensor, for all weights, and for what the optimizers keep of each parameter."""
    model, state = load_checkpoint(out)
    tensors = model.state_dict()
    for o, optimizer in enumerate(state["optimizers"]):
        for i, kept in optimizer["state"].items():
            for name, x in kept.items():
                if torch.is_tensor(x) and x.dim():
                    tensors[f"optimizers.{o}.{i}.{name}"] = x
    return tensors


def check_same_run(out, want):
    """Both folders hold the same run, bit for bit."""
    assert logged(out) == logged(want)
    got = weights(out)
    right = weights(want)
    assert got.keys() == right.keys()
    for name in got:
        assert torch.equal(got[name], right[name]), name


def last_step(out):
    """The step of a checkpoint."""
    return torch.load(out / "ckpt.pt", weights_only=True)["step"]


# ---- processes

def in_child(job, *args):
    """Fork a process that runs job(*args) and exits with what it returns -> its pid."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = job(*args) or 0
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)
    return pid


def exit_code(pid):
    """Wait for a child. Negative: the signal that ended it."""
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def run_slowly(args):
    """train.main with steps of at least 20 ms, so that it does not end before a signal comes."""
    fast_step = train.Trainer.step

    def step(trainer, number):
        time.sleep(0.02)
        return fast_step(trainer, number)

    train.Trainer.step = step  # only in this child
    return train.main(args)


def stop_by_ctrl_c(args, out):
    """Start a run in a child and press Ctrl-C after the first line of its log."""
    log = out / "log.jsonl"
    pid = in_child(run_slowly, args)
    deadline = time.monotonic() + 60
    while not log.exists() or not log.stat().st_size:
        assert time.monotonic() < deadline, "the run has not begun"
        time.sleep(0.005)
    os.kill(pid, signal.SIGINT)
    assert exit_code(pid) == 130
    assert 0 < last_step(out) < 40


# ---- batches

def loader(data, **changes):
    """A Loader of the 2,000 windows of the training text."""
    settings = dict(block_size=9, batch_size=16, seed=3)
    s = train.Settings(**settings | changes)
    return train.Loader(data, "train", read(data / "meta.json"), s)


def sorted_windows(x):
    """Windows in an order that does not depend on theirs."""
    return sorted(bytes(row) for row in np.asarray(x, dtype="<u2"))


def test_every_window_once_an_epoch(data):
    batches = loader(data)
    assert batches.windows == 2000
    steps = 2000 // 16
    first = torch.cat([batches.batch(step, range(16))[0] for step in range(steps)])  # (2000, 9)
    second = torch.cat([batches.batch(steps + step, range(16))[0] for step in range(steps)])
    text = np.fromfile(data / "train.bin", "<u2")[:-1].reshape(2000, 9)
    assert sorted_windows(first) == sorted_windows(text)
    assert sorted_windows(second) == sorted_windows(text)
    assert not torch.equal(first, second)


def test_targets_are_one_further_on(data):
    x, y = loader(data).batch(7, range(16))
    assert x.shape == y.shape == (16, 9)
    assert torch.equal(x[:, 1:], y[:, :-1])
    # Otherwise a copy to a GPU goes by way of another copy, and the CPU waits for it.
    assert x.is_contiguous() and y.is_contiguous()


def test_batches_need_no_history(data):
    x, y = loader(data).batch(7, range(16))
    again_x, again_y = loader(data).batch(7, range(16))
    other_seed, _ = loader(data, seed=4).batch(7, range(16))
    assert torch.equal(x, again_x)
    assert torch.equal(y, again_y)
    assert not torch.equal(x, other_seed)


@pytest.mark.parametrize("world", [2, 4])
def test_same_global_batch_for_any_number_of_ranks(data, world):
    for step in (0, 124, 125):  # 125 begins the second epoch
        rows_of_ranks = np.array_split(np.arange(16), world)
        parts = [loader(data).batch(step, rows)[0] for rows in rows_of_ranks]
        whole_batch, _ = loader(data).batch(step, range(16))
        assert torch.equal(torch.cat(parts), whole_batch)


def test_a_batch_may_span_two_epochs(data):
    # 32 windows of the first epoch, 16 of the second.
    x, _ = loader(data, batch_size=48).batch(2000 // 48, range(48))
    second_epoch, _ = loader(data).batch(125, range(16))
    assert torch.equal(x[-16:], second_epoch)


# ---- one step

def make_trainer(data, *more):
    s, *_ = train.read_settings([*TINY, "--data", str(data), *more])
    meta = run_settings.fit_to_data(s, world=1)
    return train.Trainer(s, meta, "cpu")


def test_schedule():
    s = train.Settings(warmup_steps=10, max_steps=100)
    rates = [train.schedule(step, s) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9]
    assert rates[99] == pytest.approx(0.01)
    assert all(a > b for a, b in zip(rates[9:], rates[10:]))


@pytest.mark.parametrize("micro", [16, 4])
def test_a_step_by_hand(micro, data):
    """Its loss and gradient are those of the whole batch, in one forward pass or in four."""
    trainer = make_trainer(data, "--micro-batch-size", str(micro))
    model = trainer.model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x, y = trainer.loader.batch(3, range(16))
    _, want = model(x, y)
    want.backward()
    table_grad = model.table.values.grad
    dense_grads = [p.grad for name, p in model.named_parameters() if not name.endswith("values")]
    want_norms = [torch.cat([grad.flatten() for grad in dense_grads]).norm(), table_grad.norm()]
    model.zero_grad()

    loss, norms = trainer.step(3)
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert [n.item() for n in norms] == pytest.approx([n.item() for n in want_norms], rel=1e-4)
    for name, p in model.named_parameters():
        assert not torch.equal(p, before[name]), name
        assert p.grad is None, name
    s = trainer.s
    peaks = [[s.learning_rate, s.learning_rate, s.half_key_share * s.learning_rate], [s.value_lr]]
    for optimizer, of_groups in zip(trainer.optimizers, peaks):
        for group, peak in zip(optimizer.param_groups, of_groups, strict=True):
            assert group["lr"] == pytest.approx(peak * train.schedule(3, s))


def test_optimizer_groups_add_up(data):
    model = make_trainer(data).model
    s = train.Settings(learning_rate=1e-3, value_lr=7e-3)
    (dense, tables), (others,) = train.make_optimizers(model, s)
    groups = dense.param_groups + tables.param_groups
    grouped = [id(p) for group in groups for p in group["params"]]
    # Every parameter is in one group, and all but the table's are in `others`.
    assert len(set(grouped)) == len(grouped) == len(list(model.parameters()))
    assert len(grouped) == len(others) + 1

    table_group, = tables.param_groups
    assert table_group["params"][0] is model.table.values
    assert table_group["peak"] == 7e-3

    assert all(group["peak"] == 1e-3 for group in dense.param_groups)
    decayed, = [group for group in dense.param_groups if group["weight_decay"]]
    matrices = {id(p) for name, p in model.named_parameters()
                if p.dim() == 2 and "wte" not in name and "values" not in name}
    assert {id(p) for p in decayed["params"]} == matrices


def test_evaluation_takes_fewer_long_windows_at_a_time():
    """Their logits are large: 8 windows of 1024 tokens, not 36."""
    model = GPT(GPTConfig(vocab_size=10, block_size=1024, n_layer=1, n_head=1, n_embd=4))
    sizes = []

    class Text:
        T = 1024
        windows = 40

        def window(self, i):
            sizes.append(len(i))
            zeros = torch.zeros(len(i), self.T, dtype=torch.int64)  # (b, T)
            return zeros, zeros

    loss = train.evaluate(model, Text(), 36, contextlib.nullcontext())
    assert sizes == [8, 8, 8, 8, 4]
    _, want = model(*Text().window([0]))
    assert loss == pytest.approx(want.item(), rel=1e-5)


# ---- the machine

def test_only_a_bfloat16_table_is_refused_on_mps(monkeypatch, tmp_path, capfd):
    """The others come as far as the data, which is not there."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    command = ["openwebtext", "--device", "mps", "--data", tmp_path / "nosuch"]
    refused = "--mem-dtype bfloat16 does not train on mps"
    check_one_line(capfd, call(*command), refused)  # the preset's table is in bfloat16
    for more in (["--ffn", "dense"], ["--mem-dtype", "float32"]):
        check_one_line(capfd, call(*command, *more), "nosuch/meta.json does not exist")


def test_the_backend_is_chosen_by_a_flag(monkeypatch):
    monkeypatch.setattr(kernel, "_backend", "auto")
    s, *_ = train.read_settings(["--backend", "torch", "--device", "cpu"])
    assert choose_device(s) == "cpu"
    assert kernel.backend() == "torch"
    assert kernel.describe_backend("cpu").startswith("memory: torch (chosen by")


PAGE_FAULTS = """
import os, resource, sys, torch
sys.path.insert(0, "tests")
import time_steps
from support.machine import keep_freed_memory

def page_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if os.fork() == 0:
    keep_freed_memory()
    for i in range(22):
        torch.ones(2**24)
        if i == 11:
            before = page_faults()
    print("FREED", page_faults() - before, flush=True)
    os._exit(0)
os.wait()

class Counting(torch.profiler.profile):
    def start(self):
        super().start()
        self.before = page_faults()

    def stop(self):
        print("PROFILED", page_faults() - self.before)
        super().stop()

torch.profiler.profile = Counting
time_steps.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def fresh_process(data):
    """What a new process prints: other tests have left their own memory in this one."""
    args = ["--profile", "--device", "cpu", "--data", str(data)]
    done = subprocess.run([sys.executable, "-c", PAGE_FAULTS, *args], capture_output=True,
                          text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def number_after(word, text):
    return int(text.split(word)[1].split()[0])


@pytest.mark.slow
@pytest.mark.skipif("glibc" not in platform.libc_ver(), reason="only glibc has mallopt")
def test_freed_memory_is_kept(fresh_process):
    """A block of 64 MiB takes the pages of an earlier one: no new page faults, else 16,384 each."""
    assert number_after("FREED", fresh_process) < 1000


@pytest.mark.slow
def test_the_profile_is_of_the_step_not_of_the_profiler(fresh_process):
    """What the profiler keeps breaks up freed memory.

    A step of the default size paid 2,300 page faults, 2 ms, that are not there without it. With
    one thread as with two: 33 in all 20 steps, 26,000 when the profile makes no room for itself.
    """
    assert "topk_sums" in fresh_process
    assert "aten::mm" in fresh_process
    if sys.platform == "linux":
        assert number_after("PROFILED", fresh_process) < 20 * 200  # steps * faults


@pytest.mark.parametrize("seconds_between, code", [(0, 0), (1, 0), (4, 130)])
def test_a_second_ctrl_c_leaves_at_once(seconds_between, code):
    """Within three seconds it is taken for the first one, which torchrun sends twice."""
    def press_twice():
        stop = terminal.StopRequest()
        assert not stop
        os.kill(os.getpid(), signal.SIGINT)
        assert stop
        stop.time -= seconds_between  # as if the first had been earlier
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop

    assert exit_code(in_child(press_twice)) == code


class Clock:
    """Stands for the module `time`, and goes on only when told to."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(stopwatch, "time", clock)
    return clock


def test_stopwatch(clock):
    """A run that is resumed at step 10, after 5 seconds of training."""
    watch = stopwatch.Stopwatch(seconds=5.0, step=10)
    clock.now += 6
    assert watch.lap(13, is_last=False) == 2.0  # seconds a step
    assert watch.seconds == 11.0
    assert watch.timed_steps == 0  # the first lap only warms up

    clock.now += 50  # an evaluation, which is no training time
    watch.go_on(13)
    clock.now += 4
    assert watch.lap(17, is_last=False) == 1.0
    assert watch.seconds == 15.0
    assert (watch.timed_steps, watch.timed_seconds) == (4, 4.0)

    watch.go_on(17)
    clock.now += 1
    assert watch.lap(19, is_last=True) == 0.5
    assert watch.seconds == 16.0
    assert (watch.timed_steps, watch.timed_seconds) == (6, 5.0)


def test_no_lap_of_the_first_three_steps_is_timed(clock):
    """With --log-every 2, the third step is the first that does not count reads: it compiles."""
    watch = stopwatch.Stopwatch(seconds=0.0, step=0)
    for step, seconds in ((2, 20), (3, 20), (4, 1), (6, 2)):
        clock.now += seconds
        watch.lap(step, is_last=False)
        watch.go_on(step)
    assert watch.seconds == 43.0
    assert (watch.timed_steps, watch.timed_seconds) == (3, 3.0)


def test_a_run_of_one_lap_has_a_speed(clock):
    watch = stopwatch.Stopwatch(seconds=0.0, step=0)
    clock.now += 6
    watch.lap(3, is_last=True)
    assert (watch.timed_steps, watch.timed_seconds) == (3, 6.0)


# ---- what a run prints

def test_describe_run(data):
    trainer = make_trainer(data)
    counts = trainer.model.param_counts()
    described = run_folder.describe_run(trainer, "facts", "an abacus")
    run, memory, parameters, text = described.split("\n")
    assert run == (f"facts · memory · seed 1337 · an abacus x 1 · torch {torch.__version__} · "
                   f"compile off")
    assert memory == kernel.describe_backend("cpu")
    assert f" + {counts['values']:,} values = {counts['total']:,}, " in parameters
    # 40 steps of 16 windows of 9 tokens; 2,000 windows and the last target.
    assert text == f"data: {data}, 18,001 tokens; 40 steps of 144 read it 0.32 times"

    trainer.steps_done = 20
    assert run_folder.describe_run(trainer, "facts", "").endswith(" · resumed at step 20")
    dense = make_trainer(data, "--ffn", "dense")
    assert run_folder.describe_run(dense, "facts", "").split("\n")[1] == "no memory layers"


def test_log_text():
    s = train.Settings(batch_size=10, block_size=100, max_steps=400)
    line = dict(step=100, loss=1.25, lr=3e-3, norm=0.5, memory_usage=None, memory_kl=None)
    # 1,000 tokens in half a second; 300 steps are left.
    plain = run_folder.log_text(line, s, seconds_per_step=0.5, flops=1e6, peak=None)
    assert plain == ("step    100  25% · loss 1.2500 · lr 3.0e-03 · norm 0.50 · 500 ms · "
                     "2,000 tok/s · 2.5 min left")

    # With memory, on hardware that can do 10 GFLOP/s, of which 2,000 * 1 MFLOP/s are used.
    line.update(memory_usage=0.25, memory_kl=1.5)
    full = run_folder.log_text(line, s, seconds_per_step=0.5, flops=1e6, peak=1e10)
    assert full == plain.replace("tok/s", "tok/s · MFU 20% · slots used 25% KL 1.50")


def test_help_says_what_the_default_run_does(capsys):
    with pytest.raises(SystemExit):
        train.read_settings(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for words in ("0: n_embd / 2 (16)", "Memory+ (False)", "memory table's values (0.32)"):
        assert words in said


# ---- the run folder

RESULT = set("seed ffn tokens seconds tokens_per_s flops_per_token params peak_memory_bytes "
             "val_loss memory_usage memory_kl recall recall_by_exposures recall_control "
             "recall_unseen_phrasing bits_stored bits_per_param".split())


def test_result_says_what_the_checkpoint_knows(whole, data):
    result = read(whole / "result.json")
    meta = read(data / "meta.json")
    assert RESULT <= set(result)
    assert result["tokens"] == 40 * 16 * meta["window"]
    assert result["ffn"] == "memory"
    assert 0 < result["memory_usage"] <= 1
    assert result["memory_kl"] > 0
    params = result["params"]
    parts = [params[name] for name in ("embedding", "dense", "half_keys", "values")]
    assert sum(parts) == params["total"]

    # Ask the checkpoint again.
    model, _ = load_checkpoint(whole)
    facts = np.load(data / "recall.npz")
    right, nats = model.answer(facts["seen"], facts["seen_span"])  # (F,) both
    known = ~facts["control"]  # (F,)
    assert result["recall"] == pytest.approx(right[known].mean())
    assert result["recall_control"] == pytest.approx(right[~known].mean())
    rows = result["recall_by_exposures"]
    assert sum(row["facts"] for row in rows) == known.sum()
    recalled = sum(row["facts"] * row["recall"] for row in rows)
    assert recalled == pytest.approx(right[known].sum())
    bits = known.sum() * math.log2(meta["answers"]) - nats[known].sum() / math.log(2)
    bits = max(0, bits)
    assert result["bits_stored"] == pytest.approx(bits, rel=1e-4)
    assert result["bits_per_param"] == pytest.approx(bits / params["total"], rel=1e-4)


def test_files_of_a_run(whole):
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert read(whole / "config.json")["settings"]["mem_topk"] == 4
    assert [line["step"] for line in logged(whole)] == list(range(5, 41, 5))


@pytest.mark.slow
def test_it_learns(data, tmp_path):
    out = tmp_path / "run"
    args = flags(data, out, "--max-steps", "120", "--value-lr", "0.02", "--eval-every", "120")
    assert train.main(args) == 0
    losses = [line["loss"] for line in logged(out)]
    assert losses[0] > 4.5
    assert np.mean(losses[-5:]) < 3


# ---- pictures and comparison

@pytest.fixture
def figures(monkeypatch):
    """The figures that a test saves. They are not drawn, which takes long: see curves.png."""
    saved = []

    def remember(figure, path, **kwargs):
        saved.append(figure)
        path.write_bytes(b"a picture")

    monkeypatch.setattr(Figure, "savefig", remember)
    return saved


def legend(figure):
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def another_seed(folder, out, seed, add):
    """Copy a run as if it were one of another seed, whose validation losses are higher by `add`."""
    shutil.copytree(folder, out)
    config = read(out / "config.json")
    config["settings"].update(seed=seed, out_dir=str(out))
    (out / "config.json").write_text(json.dumps(config))
    result = read(out / "result.json")
    result["val_loss"] += add
    (out / "result.json").write_text(json.dumps(result))
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for line in lines:
        if "val_loss" in line:
            line["val_loss"] += add
    (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return out


def test_label():
    settings = dict(ffn="memory", mem_gate=True, qk_norm=True, mem_n_keys=256, n_embd=64)
    assert pictures.label(settings) == "Memory+, 65,536 slots"
    assert pictures.label(settings | dict(mem_gate=False)) == "Memory, 65,536 slots"
    assert pictures.label(settings | dict(ffn="dense")) == "Dense, width 64"


def test_compare_prints_ratios_and_draws(whole, dense, capsys, figures):
    assert train.main(["--compare", str(whole), str(dense)]) == 0
    text = capsys.readouterr().out
    dense_result = read(dense / "result.json")
    assert dense_result["memory_usage"] is None
    loss = dense_result["val_loss"]
    assert f"{loss:.3f}" in text
    ratio = loss / read(whole / "result.json")["val_loss"]
    assert "dense / whole: " in text
    assert f"val loss {ratio:.2f}" in text
    assert (whole.parent / "compare.png").read_bytes() == b"a picture"
    assert legend(figures[0]) == ["Memory, 256 slots", "Dense, width 32"]


@pytest.mark.filterwarnings("error")
def test_a_name_without_glyphs_is_drawn_without_a_word(whole, tmp_path):
    folders = []
    for i, name in enumerate(("\u4e2d\u6587", "\U0001f600")):
        folders.append(another_seed(whole, tmp_path / name, seed=1337, add=0.5 * i))
        config = read(folders[-1] / "config.json")
        config["settings"]["mem_heads"] = 4 + i  # kinds of one label are told apart by their names
        (folders[-1] / "config.json").write_text(json.dumps(config))
    pictures.draw(folders, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_two_seeds_are_one_line_with_a_band(whole, dense, tmp_path, capsys, figures):
    """The mean of x and x + 0.5 is x + 0.25, their standard deviation 0.5 / sqrt(2)."""
    other = another_seed(whole, tmp_path / "other", seed=4, add=0.5)
    pictures.compare([whole, other, dense])
    loss = read(whole / "result.json")["val_loss"]
    text = capsys.readouterr().out
    mean_row, = [line for line in text.splitlines() if line.startswith("whole, mean of 2")]
    assert f"{loss + 0.25:9.3f} ±{0.5 / math.sqrt(2):7.3f}" in mean_row

    figure, = figures
    assert legend(figure) == ["Memory, 256 slots, 2 seeds", "Dense, width 32"]
    for ax in figure.axes:
        assert len(ax.lines) == 2  # Memory and Dense
        assert len(ax.collections) == 1  # the band of the two seeds
        assert ax.get_xlabel()
        assert ax.get_ylabel()
    losses = np.array([x["val_loss"] for x in logged(whole) if "val_loss" in x])  # (evaluations,)
    panel = figure.axes[0]
    assert panel.lines[0].get_ydata() == pytest.approx(losses + 0.25)
    edges = panel.collections[0].get_paths()[0].vertices[:, 1]
    assert max(edges) == pytest.approx(max(losses) + 0.25 + 0.5 / math.sqrt(2))
    assert min(edges) == pytest.approx(min(losses) + 0.25 - 0.5 / math.sqrt(2))


def test_runs_of_one_label_are_told_apart_by_their_folders(whole, tmp_path, figures):
    """Two kinds that differ in a setting which is not in the label."""
    other = another_seed(whole, tmp_path / "other", seed=1337, add=0.0)
    config = read(other / "config.json")
    config["settings"]["mem_heads"] = 4
    (other / "config.json").write_text(json.dumps(config))
    pictures.draw([whole, other], tmp_path / "picture.png")
    assert legend(figures[0]) == ["Memory, 256 slots (whole)", "Memory, 256 slots (other)"]


def test_runs_on_two_corpora_are_no_seeds_of_one_run(whole, tmp_path, figures):
    """Their settings may be the same, but not the facts that were read often."""
    other = another_seed(whole, tmp_path / "other", seed=1337, add=0.5)
    meta = read(other / "meta.json")
    meta["sha256"]["train.bin"] = "of another text"
    (other / "meta.json").write_text(json.dumps(meta))
    result = read(other / "result.json")
    del result["recall_by_exposures"][-1]
    (other / "result.json").write_text(json.dumps(result))
    pictures.draw([whole, other], tmp_path / "picture.png")
    assert legend(figures[0]) == ["Memory, 256 slots (whole)", "Memory, 256 slots (other)"]


def test_compare_names_a_log_that_is_broken(whole, tmp_path, capfd):
    out = tmp_path / "broken"
    shutil.copytree(whole, out)
    text = (out / "log.jsonl").read_text()
    (out / "log.jsonl").write_text(text[:-20])
    check_one_line(capfd, call("--compare", out), str(out / "log.jsonl"))


# ---- resume

@pytest.mark.slow
def test_killed_five_times_is_the_run_that_never_stopped(whole, data, tmp_path):
    chance = random.Random(5)
    kills = 0
    finished = 0
    # A run that ends before the fifth kill makes room for another.
    while kills < 5 or not finished:
        out = tmp_path / f"killed{finished}"
        args = flags(data, out, *RESUMED)
        if (out / "config.json").exists():
            args.append("--resume")
        pid = in_child(train.main, args)
        if kills < 5:
            time.sleep(chance.uniform(0.02, 0.35))
            os.kill(pid, signal.SIGKILL)  # not waited for yet, so the pid is still the child's
        code = exit_code(pid)
        if code == -signal.SIGKILL:
            kills += 1
            continue
        assert code == 0
        check_same_run(out, whole)
        finished += 1
    assert kills == 5


def test_ctrl_c_saves_and_resumes_to_the_same_bits(whole, stopped, data, tmp_path):
    out = tmp_path / "resumed"
    shutil.copytree(stopped, out)
    assert train.main(flags(data, out, *RESUMED, "--resume")) == 0
    check_same_run(out, whole)


def test_what_a_resumed_run_may_change(stopped):
    """What does not change the run. The rest stays as it was."""
    def settings(*more):
        s, _, resume, _ = train.read_settings(["--resume", "--out-dir", str(stopped), *more])
        assert resume
        return s

    before = settings()
    assert before.dropout == 0.1
    changed = settings(
        "--device", "auto", "--backend", "torch", "--compile", "--micro-batch-size", "4",
        "--log-every", "7", "--data", "elsewhere", "--mem-parallel", "1")
    assert changed == dataclasses.replace(
        before, device="auto", backend="torch", compile=True, micro_batch_size=4, log_every=7,
        data="elsewhere", mem_parallel=1)
    # To give a setting again is no change.
    assert settings("--batch-size", "16") == before
    for flag in ("--batch-size", "--max-steps", "--mem-heads", "--seed"):
        with pytest.raises(ValueError, match=f"{flag} 99 is not the run's"):
            settings(flag, "99")


def change_settings(out, change):
    """Make a run folder one that another version has written: change(settings), both copies."""
    config = read(out / "config.json")
    change(config["settings"])
    (out / "config.json").write_text(json.dumps(config))
    state = torch.load(out / "ckpt.pt", weights_only=True)
    change(state["settings"])
    torch.save(state, out / "ckpt.pt")


def test_an_old_run_that_was_killed_after_a_log_line_resumes(whole, stopped, data, tmp_path):
    """It forgets what it logged after its checkpoint, where the last line may be torn.

    And it is from before there was the setting `backend`.
    """
    def forget_backend(settings):
        del settings["backend"]

    out = tmp_path / "old"
    shutil.copytree(stopped, out)
    change_settings(out, forget_backend)
    lines = (whole / "log.jsonl").read_text().splitlines()
    later = [line for line in lines if json.loads(line)["step"] > last_step(out)]
    with open(out / "log.jsonl", "a") as log:
        log.write(later[0] + "\n" + later[1][:20])
    assert train.main(flags(data, out, *RESUMED, "--resume")) == 0
    check_same_run(out, whole)
    assert read(out / "config.json")["settings"]["backend"] == "auto"


def test_a_run_with_an_unknown_setting_is_refused(stopped, data, tmp_path, capfd):
    def add_colour(settings):
        settings["mem_colour"] = "blue"

    out = tmp_path / "new"
    shutil.copytree(stopped, out)
    change_settings(out, add_colour)
    before = (out / "ckpt.pt").read_bytes()
    code = call("--resume", "--data", data, "--out-dir", out)
    check_one_line(capfd, code, "has the setting mem_colour, which this version lacks",
                   "config.json names the commit", "--init-from", "--out-dir")
    assert (out / "ckpt.pt").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("dtype, loss_tolerance", [("float32", 2e-5), ("bfloat16", 2e-4)])
def test_two_ranks_and_accumulation_give_the_run_of_one(dtype, loss_tolerance, data, tmp_path):
    """They add up the same numbers in another order.

    That shows in the weights: AdamW's first updates are the signs of the gradients, so that a
    gradient near zero moves its weight by a learning rate in either direction.
    """
    one = tmp_path / "one"
    micro = tmp_path / "micro"
    two = tmp_path / "two"
    more = ["--max-steps", "12", "--mem-dtype", dtype]
    assert train.main(flags(data, one, *more)) == 0
    more += ["--micro-batch-size", "4"]
    assert train.main(flags(data, micro, *more)) == 0
    launch(job_script, 2, flags(data, two, *more), tmp_path)

    one_weights = weights(one)
    for run in (micro, two):
        losses = [line["loss"] for line in logged(run)]
        one_losses = [line["loss"] for line in logged(one)]
        assert losses == pytest.approx(one_losses, rel=loss_tolerance)
        for name, tensor in weights(run).items():
            off = (tensor - one_weights[name]).abs().float()
            if tensor.dtype == torch.float32:
                assert off.max() < 2e-3, name
            else:  # one place of bfloat16 is up to 4e-3
                assert off.mean() < 2e-4, name
        val_loss = read(run / "result.json")["val_loss"]
        assert val_loss == pytest.approx(read(one / "result.json")["val_loss"], rel=1e-4)


# ---- bad input: one clear line, a non-zero exit, nothing lost

def call(*args):
    """The exit status of train.py."""
    try:
        return train.main([str(arg) for arg in args])
    except SystemExit as e:
        return e.code


def check_one_line(capfd, code, *parts):
    """The run failed, and its one line on stderr says these things."""
    text = capfd.readouterr().err
    assert code not in (0, None)
    assert text.startswith("train.py: "), text
    assert text.count("\n") == 1, text
    for part in parts:
        assert part in text, (part, text)


BAD_FLAGS = [
    ("--no-such-flag 1", ["--no-such-flag", "--help"]),
    ("--seed many", ["--seed", "many"]),
    ("--mem-layers one", ["--mem-layers", "one"]),
    ("nosuchpreset", ["nosuchpreset"]),
    ("--mem-topk 64 --mem-n-keys 32", ["--mem-topk 64 > 32", "--mem-n-keys"]),
    ("--mem-key-dim 7", ["--mem-key-dim 7"]),
    ("--mem-heads 0", ["--mem-heads 0"]),
    ("--mem-layers 2", ["--mem-layers 2", "0..1"]),
    ("--n-embd 30", ["--n-embd 30"]),
    ("--ffn mixture", ["--ffn mixture is unknown", "dense"]),
    ("--vocab-size 10", ["--vocab-size 10"]),
    ("--block-size 64", ["--block-size 64", "9 tokens"]),
    ("--batch-size 10 --micro-batch-size 4", ["--batch-size 10", "4"]),
    ("--max-steps 0", ["--max-steps 0"]),
    ("--learning-rate -1", ["--learning-rate -1"]),
    ("--learning-rate nan", ["--learning-rate nan"]),
    ("--dropout 1.5", ["--dropout 1.5"]),
    ("--beta2 1.5", ["--beta2 1.5"]),
    ("--device quantum", ["--device quantum is not available on this machine", "cpu"]),
    ("--backend abacus", ["backend 'abacus'", "auto, triton, torch"]),
    ("--data no/such/folder", ["no/such/folder", "prepare_data.py"]),
]
if not torch.cuda.is_available():
    BAD_FLAGS.append(("--device cuda", ["--device cuda"]))
    if not kernel.INTERPRETED:
        BAD_FLAGS.append(("--backend triton", ["backend 'triton' cannot run here"]))


@pytest.mark.parametrize("bad, parts", BAD_FLAGS)
def test_bad_flags(bad, parts, data, tmp_path, capfd):
    code = call(*flags(data, tmp_path / "x"), *bad.split())
    check_one_line(capfd, code, *parts)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["missing", "short", "corrupt", "garbled meta"])
def test_broken_data(name, data, tmp_path, capfd):
    broken = tmp_path / "facts"
    shutil.copytree(data, broken)
    text = broken / "train.bin"
    if name == "missing":
        text.unlink()
    elif name == "short":
        text.write_bytes(text.read_bytes()[:1000])
    elif name == "corrupt":
        text.write_bytes(b"\xff\xff" + text.read_bytes()[2:])
    else:
        (broken / "meta.json").write_text("{")
    code = call(*flags(broken, tmp_path / "x"))
    file = "meta.json" if "meta" in name else "train.bin"
    check_one_line(capfd, code, file, "prepare")


def test_a_run_is_not_overwritten(whole, data, capfd):
    before = (whole / "ckpt.pt").read_bytes()
    again = flags(data, whole)
    check_one_line(capfd, call(*again), "--resume", "--out-dir")
    assert call(*again, *RESUMED, "--resume") == 0
    assert "has finished its 40 steps" in capfd.readouterr().out
    check_one_line(capfd, call(*again, "--resume", "--seed", "4"), "--seed 4", "1337")
    assert (whole / "ckpt.pt").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_foreign_checkpoint(content, whole, data, tmp_path, capfd):
    out = tmp_path / "x"
    out.mkdir()
    shutil.copy(whole / "config.json", out)
    if content is None:
        torch.save({"weights": torch.zeros(3)}, out / "ckpt.pt")
    else:
        (out / "ckpt.pt").write_bytes(content)
    code = call("--resume", "--data", data, "--out-dir", out)
    check_one_line(capfd, code, "ckpt.pt", "checkpoint")


def test_nothing_to_resume_or_compare(whole, tmp_path, capfd):
    shutil.copy(whole / "ckpt.pt", tmp_path)
    code = call("--resume", "--out-dir", tmp_path)
    check_one_line(capfd, code, "config.json does not exist")
    code = call("--compare", tmp_path / "x")
    check_one_line(capfd, code, "result.json")


def test_unwritable_folder(data, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "x"
    check_one_line(capfd, call(*flags(data, out)), str(out), "--out-dir")


def test_full_disk_keeps_the_last_checkpoint(stopped, data, tmp_path, capfd):
    out = tmp_path / "x"
    shutil.copytree(stopped, out)
    step = last_step(out)

    def resume_without_space():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        room = 30_000  # bytes a file: enough for the log, not for a checkpoint
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        return train.main(flags(data, out, *RESUMED, "--resume"))

    capfd.readouterr()
    code = exit_code(in_child(resume_without_space))
    # It says so at each evaluation, goes on, and says so again when it must leave.
    assert code == 1
    *warnings, last = capfd.readouterr().err.splitlines()
    assert len(warnings) == 4 - step // 10
    for line in (*warnings, last):
        assert line.startswith("train.py: cannot write")
        assert "ckpt.pt" in line and "File too large" in line and "free some space" in line
    assert last_step(out) == step
    assert not list(out.glob("*.part"))


def test_nan_at_the_start(data, tmp_path, capfd):
    out = tmp_path / "x"
    code = call(*flags(data, out, "--learning-rate", "1e30", "--warmup-steps", "0"))
    check_one_line(capfd, code, "nan", "--learning-rate 1e+30")
    assert not (out / "ckpt.pt").exists()


def test_nan_later_on_leaves_what_was_saved(data, tmp_path, capfd, monkeypatch):
    def schedule(step, s, end=1.0):
        return 1.0 if step < 25 else math.nan

    monkeypatch.setattr(train, "schedule", schedule)
    out = tmp_path / "x"
    check_one_line(capfd, call(*flags(data, out)), "nan", "step 30", "--value-lr")
    assert last_step(out) == 20
    for name, tensor in weights(out).items():
        assert tensor.isfinite().all(), name


# ---- tests/time_steps.py

def test_time_steps_takes_the_steps_of_a_run(data, tmp_path):
    settings = [*TINY, "--data", str(data), "--max-steps", "6", "--micro-batch-size", "8"]
    assert train.main([*settings, "--out-dir", str(tmp_path / "run")]) == 0
    trainer, step = time_steps.trainer(settings)
    for _ in range(6):
        step()
    trained = weights(tmp_path / "run")
    assert len(trained) > 10
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, trained[name]), name


@pytest.fixture
def few_rounds(monkeypatch):
    monkeypatch.setattr(time_steps, "LEAST_ROUNDS", 4)


def test_time_steps_prints_a_table(few_rounds, data, capsys):
    time_steps.main([*TINY, "--data", str(data), "--seconds", "0"], warm_up=1)
    title, dense, memory, memory_plus, *rivals = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in rivals] == ["hash", "PEER", "UltraMem", "MoE"]
    assert "of 4 rounds" in title
    assert dense.startswith("dense ")
    assert dense.endswith(" 1.00 [1.00, 1.00]")
    assert memory.startswith("Memory ")
    assert memory_plus.startswith("Memory+ ")
    for line in (memory, memory_plus):
        # A name, then milliseconds [quartiles], and times as long as dense [quartiles].
        numbers = line.split(maxsplit=1)[1]
        for bracket in "[],":
            numbers = numbers.replace(bracket, " ")
        ms, ms_low, ms_high, ratio, low, high = numbers.split()
        assert float(ms_low) <= float(ms) <= float(ms_high)
        assert 0.2 < float(low) <= float(ratio) <= float(high) < 50


def test_time_steps_adds_one_kind_to_a_file(few_rounds, data, tmp_path, capsys):
    rows = tmp_path / "steps.json"
    rows.write_text(json.dumps(dict(dense=1, hash=2, PEER=3)))
    argv = [*TINY, "--data", str(data), "--seconds", "0", "--json", str(rows), "--kind"]
    time_steps.main([*argv, "hash"], warm_up=1)
    found = json.loads(rows.read_text())
    assert found["dense"] == 1 and found["PEER"] == 3
    low, middle, high = found["hash"]["ms"]
    assert 0 < low <= middle <= high and found["hash"]["dense_ms"] > 0
    assert "PEER" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="--kind slow is unknown: choose from dense; Memory;"):
        time_steps.main([*argv, "slow"])
