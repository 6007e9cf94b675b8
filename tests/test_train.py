"""train.py: batches, exact resume, ranks, the run folder, and what a user sees when something is wrong."""
import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import time_steps
import train
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parents[1]
TINY = ("--n-layer 2 --n-embd 32 --n-head 2 --mem-n-keys 16 --mem-topk 4 --mem-heads 2 --batch-size 16 --log-every 5 --eval-every 10 "
        "--eval-windows 64 --max-steps 40 --warmup-steps 5 --device cpu").split()


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("out") / "whole"
    assert train.main([*TINY, "--data", str(data), "--out-dir", str(out), "--dropout", "0.1"]) == 0
    return out


def weights(out):
    state = GPT.load(out)[1]
    return state["model"] | {f"tables.{i}.{k}": torch.cat(v, dim=1) for i, table in enumerate(state["tables"]) for k, v in table.items()}


def logged(out):
    return [{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in (out / "log.jsonl").read_text().splitlines()]


def in_child(job):
    """Fork a child that runs job() and exits; returns its pid."""
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(job() or 0)
    return pid


# ---- batches

def loader(data, **changes):
    s = train.Settings(block_size=9, batch_size=16, seed=3)
    for k, v in changes.items():
        setattr(s, k, v)
    return train.Loader(data, "train", json.loads((data / "meta.json").read_text()), s)


def test_every_window_once_an_epoch(data):
    one = loader(data)
    assert one.windows == 2000
    steps = 2000 // 16
    x = torch.cat([one.batch(step, range(16))[0] for step in range(steps)]).numpy()     # (2000, 9)
    tokens = np.fromfile(data / "train.bin", "<u2")[:-1].reshape(2000, 9)
    assert sorted(map(bytes, x.astype("<u2"))) == sorted(map(bytes, tokens))
    second = torch.cat([one.batch(step, range(16))[0] for step in range(steps, 2 * steps)]).numpy()
    assert sorted(map(bytes, x.astype("<u2"))) == sorted(map(bytes, second.astype("<u2"))) and not np.array_equal(x, second)


def test_targets_are_one_further_on_and_batches_need_no_history(data):
    x, y = loader(data).batch(7, range(16))
    assert torch.equal(x[:, 1:], y[:, :-1]) and x.shape == y.shape == (16, 9)
    assert x.is_contiguous() and y.is_contiguous()                          # else a copy to a GPU goes by way of another, and is waited for
    assert all(torch.equal(a, b) for a, b in zip((x, y), loader(data).batch(7, range(16))))
    assert not torch.equal(x, loader(data, seed=4).batch(7, range(16))[0])


@pytest.mark.parametrize("world", [2, 4])
def test_same_global_batch_for_any_number_of_ranks(data, world):
    for step in (0, 124, 125):                                              # 125 begins the second epoch
        parts = [loader(data).batch(step, rows)[0] for rows in np.array_split(np.arange(16), world)]
        assert torch.equal(torch.cat(parts), loader(data).batch(step, range(16))[0])


def test_a_batch_may_span_two_epochs(data):
    x = loader(data, batch_size=48).batch(2000 // 48, range(48))[0]         # 32 of the first epoch, 16 of the second
    assert torch.equal(x[-16:], loader(data).batch(125, range(16))[0])


def test_schedule():
    s = train.Settings(warmup_steps=10, max_steps=100)
    rates = [train.schedule(step, s) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] and rates[99] == pytest.approx(0.01)
    assert all(a > b for a, b in zip(rates[9:], rates[10:]))


def test_optimizer_groups_add_up(whole):
    model, state = GPT.load(whole)
    s = train.Settings(learning_rate=1e-3, value_lr=7e-3)
    (dense, tables), others = model.make_optimizers(s)
    grouped = [p for o in (dense, tables) for g in o.param_groups for p in g["params"]]
    assert len({id(p) for p in grouped}) == len(grouped) == len(list(model.parameters())) == 1 + len(others)
    (group,) = tables.param_groups
    assert group["params"][0] is model.tables[0].values and group["peak"] == 7e-3 and group["weight_decay"] == 0
    decayed = next(g for g in dense.param_groups if g["weight_decay"])
    assert {id(p) for p in decayed["params"]} == {id(p) for n, p in model.named_parameters() if p.dim() == 2 and "wte" not in n and "values" not in n}


def test_only_a_bfloat16_table_is_refused_on_mps(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    on_mps = lambda *flags: train.choose_device(train.read_settings(["openwebtext", "--device", "mps", *flags])[0], 1)
    assert on_mps("--ffn", "dense") == on_mps("--mem-dtype", "float32") == "mps"        # the preset's table is in bfloat16
    with pytest.raises(train.Trouble, match="--mem-dtype bfloat16 does not train on mps"):
        on_mps()


# ---- the run folder

def test_result_says_what_the_checkpoint_knows(whole, data):
    r, meta = json.loads((whole / "result.json").read_text()), json.loads((data / "meta.json").read_text())
    assert set(r) >= set("seed ffn tokens seconds tokens_per_s flops_per_token params peak_memory_bytes val_loss memory_usage memory_kl recall "
                         "recall_by_exposures recall_control recall_unseen_phrasing bits_stored bits_per_param".split())
    assert r["tokens"] == 40 * 16 * meta["window"] and r["ffn"] == "memory" and 0 < r["memory_usage"] <= 1 and r["memory_kl"] > 0
    assert sum(r["params"][k] for k in ("embedding", "dense", "half_keys", "values")) == r["params"]["total"]
    model, facts = GPT.load(whole)[0], np.load(data / "recall.npz")
    right, nats = model.answer(facts["seen"], facts["seen_span"])
    known = ~facts["control"]
    assert r["recall"] == pytest.approx(right[known].mean()) and r["recall_control"] == pytest.approx(right[~known].mean())
    rows = r["recall_by_exposures"]
    assert sum(row["facts"] for row in rows) == known.sum()
    assert sum(row["facts"] * row["recall"] for row in rows) == pytest.approx(right[known].sum())
    bits = max(0, known.sum() * np.log2(meta["answers"]) - nats[known].sum() / np.log(2))
    assert r["bits_stored"] == pytest.approx(bits, rel=1e-4) and r["bits_per_param"] == pytest.approx(bits / r["params"]["total"], rel=1e-4)
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((whole / "config.json").read_text())["settings"]["mem_topk"] == 4
    assert [x["step"] for x in logged(whole)] == list(range(5, 41, 5))


def test_two_hundred_steps_learn(data, tmp_path):
    out = tmp_path / "run"
    assert train.main([*TINY, "--data", str(data), "--out-dir", str(out), "--max-steps", "200", "--value-lr", "0.02", "--eval-every", "200"]) == 0
    losses = [x["loss"] for x in logged(out)]
    assert losses[0] > 4.5 and np.mean(losses[-5:]) < 3


PROFILE = """
import resource, sys, torch, train
class Counting(torch.profiler.profile):  # page faults between start and stop
    faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    def start(self):
        super().start()
        self.since = Counting.faults()
    def stop(self):
        print("FAULTS", Counting.faults() - self.since)
        super().stop()
torch.profiler.profile = Counting
sys.exit(train.main(sys.argv[1:]))
"""


def test_the_profile_is_of_the_step_not_of_the_profiler(data, tmp_path):
    """What the profiler keeps breaks up freed memory: a step of the default size paid 2,300 page faults, 2 ms, that are not there without it."""
    done = subprocess.run([sys.executable, "-c", PROFILE, "--profile", "--device", "cpu", "--data", str(data), "--out-dir", str(tmp_path / "run")],
                          capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "topk_sums" in done.stdout and "aten::mm" in done.stdout and not (tmp_path / "run" / "ckpt.pt").exists()
    assert train.read_settings(["--profile"])[0].out_dir == "out/facts-memory-1337-profile"  # not that of a run: it would be refused there
    if sys.platform == "linux":
        faults = int(done.stdout.split("FAULTS")[1].split()[0])
        assert faults < 20 * 200


def test_all_is_compiled_before_the_clock_starts(data, tmp_path, monkeypatch):
    """Steps that count reads have a graph of their own; both are made in the first three steps, which are not timed."""
    torch._dynamo.reset()
    steps, compiled, batch, compile = [], [], train.Loader.batch, torch.compile

    def backend(graph, inputs):
        compiled.append(len(steps))
        return graph.forward
    monkeypatch.setattr(train.Loader, "batch", lambda self, step, rows: steps.append(step) or batch(self, step, rows))
    monkeypatch.setattr(torch, "compile", lambda model: compile(model, backend=backend))
    assert train.main([*TINY, "--data", str(data), "--out-dir", str(tmp_path / "run"), "--compile", "--max-steps", "12"]) == 0
    assert len(steps) == 12 and len(compiled) == 2 and max(compiled) <= 3


def test_evaluation_takes_fewer_long_windows_at_a_time():
    model, seen = GPT(GPTConfig(vocab_size=10, block_size=1024, n_layer=1, n_head=1, n_embd=4)), []

    class Text:
        T, windows = 1024, 40

        def window(self, i):
            seen.append(len(i))
            return torch.zeros(2, len(i), 1024, dtype=torch.int64)
    loss = train.evaluate(model, Text(), 36, contextlib.nullcontext())
    assert seen == [16, 16, 4] and loss == pytest.approx(model(*Text().window([0]))[1].item(), rel=1e-5)


def test_help_says_what_the_default_run_does(capsys):
    with pytest.raises(SystemExit):
        train.read_settings(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert all(x in said for x in ("0: n_embd / 2 (16)", "Memory+ (False)", "memory table's values (0.04)"))


def test_compare_prints_ratios_and_draws(whole, data, tmp_path, capsys):
    other = tmp_path / "dense"
    assert train.main([*TINY, "--data", str(data), "--out-dir", str(other), "--ffn", "dense"]) == 0
    capsys.readouterr()
    assert train.main(["--compare", str(whole), str(other)]) == 0
    text, r = capsys.readouterr().out, json.loads((other / "result.json").read_text())
    assert r["memory_usage"] is None and f"{r['val_loss']:.3f}" in text
    ratio = json.loads((whole / "result.json").read_text())["val_loss"]
    assert f"val loss {r['val_loss'] / ratio:.2f}" in text
    assert (whole.parent / "compare.png").read_bytes().startswith(b"\x89PNG")


# ---- resume

def test_killed_ten_times_is_the_run_that_never_stopped(whole, data, tmp_path):
    chance, kills, finished = random.Random(5), 0, 0
    while kills < 10 or not finished:                                       # a run that ends before its tenth kill makes room for another
        out = tmp_path / f"killed{finished}"
        args = [*TINY, "--data", str(data), "--out-dir", str(out), "--dropout", "0.1"]
        args += ["--resume"] * (out / "config.json").exists()
        pid = in_child(lambda: train.main(args))
        if kills < 10:
            time.sleep(chance.uniform(0.02, 0.35))
            os.kill(pid, signal.SIGKILL)                                    # not waited for yet, so the pid is still the child's
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            kills += 1
            continue
        assert os.waitstatus_to_exitcode(status) == 0 and logged(out) == logged(whole)
        a, b = weights(out), weights(whole)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        finished += 1
    assert kills == 10


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ctrl_c_saves_and_resumes_to_the_same_bits(whole, data, tmp_path, dtype):
    out, args = tmp_path / "stopped", [*TINY, "--data", str(data), "--dropout", "0.1", "--mem-dtype", dtype]
    if dtype != "float32":
        whole = tmp_path / "whole"
        assert train.main([*args, "--out-dir", str(whole)]) == 0
        assert weights(whole)["tables.0.values"].dtype == torch.bfloat16
    args += ["--out-dir", str(out)]
    pid = in_child(lambda: train.main(args))
    while not (out / "log.jsonl").exists() or len((out / "log.jsonl").read_text()) < 10:
        time.sleep(0.01)
    os.kill(pid, signal.SIGINT)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    step = torch.load(out / "ckpt.pt", weights_only=True)["step"]
    assert code == 130 and 0 < step < 40
    assert train.main(args + ["--resume"]) == 0
    assert all(torch.equal(v, weights(whole)[k]) for k, v in weights(out).items())
    assert logged(out) == logged(whole)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_ranks_and_accumulation_give_the_run_of_one(data, tmp_path, dtype):
    args = [*TINY, "--data", str(data), "--max-steps", "12", "--mem-dtype", dtype]
    runs = {"one": (1, []), "micro": (1, ["--micro-batch-size", "4"]), "two": (2, ["--micro-batch-size", "4"])}
    for name, (ranks, more) in runs.items():
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        done = subprocess.run([sys.executable, *launch, str(ROOT / "train.py"), *args, *more, "--out-dir", str(tmp_path / name)],
                              capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120)
        assert done.returncode == 0, done.stderr
    one = [x["loss"] for x in logged(tmp_path / "one")]
    for name in ("micro", "two"):
        assert [x["loss"] for x in logged(tmp_path / name)] == pytest.approx(one, rel=2e-5 if dtype == "float32" else 2e-4)
        for k, v in weights(tmp_path / name).items():
            off = (v - weights(tmp_path / "one")[k]).abs()                          # AdamW's first steps are signs: summation order shows
            assert off.max() < 2e-3 if v.dtype == torch.float32 else off.float().mean() < 2e-4, k  # one place of bfloat16 is up to 4e-3
        assert json.loads((tmp_path / name / "result.json").read_text())["val_loss"] == pytest.approx(
            json.loads((tmp_path / "one" / "result.json").read_text())["val_loss"], rel=1e-4)


# ---- bad input: one clear line, a non-zero exit, nothing lost

def one_line(capfd, code, *parts):
    text = capfd.readouterr().err.strip().splitlines()
    assert code not in (0, None) and len(text) == 1 and text[0].startswith("train.py: ") and "Traceback" not in text[0], text
    for part in parts:
        assert part in text[0], (part, text[0])


def call(*args):
    try:
        return train.main([str(a) for a in args])
    except SystemExit as e:
        return e.code


@pytest.mark.parametrize("flags, parts", [
    ("--no-such-flag 1", ["--no-such-flag", "--help"]),
    ("--seed many", ["--seed", "many"]),
    ("--mem-layers one", ["--mem-layers", "one"]),
    ("nosuchpreset", ["nosuchpreset"]),
    ("--mem-topk 64 --mem-n-keys 32", ["--mem-topk 64 > 32", "--mem-n-keys"]),
    ("--mem-key-dim 7", ["--mem-key-dim 7"]),
    ("--mem-layers 2", ["--mem-layers 2", "0..1"]),
    ("--n-embd 30", ["--n-embd 30"]),
    ("--ffn mixture", ["mixture", "dense"]),
    ("--vocab-size 10", ["--vocab-size 10"]),
    ("--block-size 64", ["--block-size 64", "9 tokens"]),
    ("--batch-size 10 --micro-batch-size 4", ["--batch-size 10", "4"]),
    ("--max-steps 0", ["--max-steps 0"]),
    ("--learning-rate -1", ["--learning-rate -1"]),
    ("--learning-rate nan", ["--learning-rate nan"]),
    ("--dropout 1.5", ["--dropout 1.5"]),
    ("--device quantum", ["quantum", "cpu"]),
    ("--device cuda", ["--device cuda"]) if not torch.cuda.is_available() else ("--mem-heads 0", ["--mem-heads 0"]),
    ("--beta2 1.5", ["--beta2 1.5"]),
    ("--data no/such/folder", ["no/such/folder", "prepare_data.py"]),
])
def test_bad_flags(flags, parts, data, tmp_path, capfd):
    code = call(*TINY, "--data", data, "--out-dir", tmp_path / "x", *flags.split())
    one_line(capfd, code, *parts)


@pytest.mark.parametrize("name", ["missing", "short", "corrupt", "garbled meta"])
def test_broken_data(name, data, tmp_path, capfd):
    broken = tmp_path / "facts"
    broken.mkdir()
    for file in data.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    bin = broken / "train.bin"
    if name == "missing":
        bin.unlink()
    elif name == "short":
        bin.write_bytes(bin.read_bytes()[:1000])
    elif name == "corrupt":
        bin.write_bytes(b"\xff\xff" + bin.read_bytes()[2:])
    else:
        (broken / "meta.json").write_text("{")
    one_line(capfd, call(*TINY, "--data", broken, "--out-dir", tmp_path / "x"), "meta.json" if "meta" in name else "train.bin", "prepare")


def test_a_run_is_not_overwritten(whole, data, capfd):
    before = (whole / "ckpt.pt").read_bytes()
    one_line(capfd, call(*TINY, "--data", data, "--out-dir", whole), "--resume", "--out-dir")
    one_line(capfd, call(*TINY, "--data", data, "--out-dir", whole, "--dropout", "0.1", "--resume"), "finished")
    one_line(capfd, call(*TINY, "--data", data, "--out-dir", whole, "--resume", "--seed", "4"), "--seed 4", "1337")
    assert (whole / "ckpt.pt").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_foreign_checkpoint(content, whole, data, tmp_path, capfd):
    out = tmp_path / "x"
    out.mkdir()
    (out / "config.json").write_bytes((whole / "config.json").read_bytes())
    if content is None:
        torch.save({"weights": torch.zeros(3)}, out / "ckpt.pt")
    else:
        (out / "ckpt.pt").write_bytes(content)
    one_line(capfd, call("--resume", "--data", data, "--out-dir", out), "ckpt.pt", "checkpoint")


def test_nothing_to_resume_or_compare(tmp_path, capfd):
    one_line(capfd, call("--resume", "--out-dir", tmp_path / "x"), "config.json", "--out-dir")
    one_line(capfd, call("--compare", tmp_path / "x"), "result.json")


def test_unwritable_folder(data, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    one_line(capfd, call(*TINY, "--data", data, "--out-dir", tmp_path / "file" / "x"), str(tmp_path / "file" / "x"), "--out-dir")


def test_full_disk_keeps_the_last_checkpoint(data, tmp_path, capfd):
    out = tmp_path / "x"
    args = [*TINY, "--data", str(data), "--out-dir", str(out)]
    pid = in_child(lambda: train.main(args))
    while not (out / "ckpt.pt").exists():
        time.sleep(0.01)
    os.kill(pid, signal.SIGINT)
    os.waitpid(pid, 0)
    step = torch.load(out / "ckpt.pt", weights_only=True)["step"]

    def without_space():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))       # room for the log, not for a checkpoint
        return train.main(args + ["--resume"])
    capfd.readouterr()
    one_line(capfd, os.waitstatus_to_exitcode(os.waitpid(in_child(without_space), 0)[1]), "cannot write", "free some space", "ckpt.pt")
    assert torch.load(out / "ckpt.pt", weights_only=True)["step"] == step and not list(out.glob("*.part"))


def test_nan_stops_with_the_last_good_checkpoint(data, tmp_path, capfd):
    out = tmp_path / "x"
    code = call(*TINY, "--data", data, "--out-dir", out, "--learning-rate", "1e30", "--warmup-steps", "0")
    one_line(capfd, code, "nan", "--learning-rate 1e+30")
    assert not (out / "ckpt.pt").exists()


def test_nan_later_on_leaves_what_was_saved(data, tmp_path, capfd, monkeypatch):
    out = tmp_path / "x"
    monkeypatch.setattr(train, "schedule", lambda step, s: 1.0 if step < 25 else float("nan"))
    one_line(capfd, call(*TINY, "--data", data, "--out-dir", out), "nan", "step 30", "--value-lr")
    assert torch.load(out / "ckpt.pt", weights_only=True)["step"] == 20
    assert all(v.isfinite().all() for v in weights(out).values())


# ---- tests/time_steps.py

def test_time_steps(data, tmp_path, capsys):
    """What it times are the steps of a run."""
    settings = [*TINY, "--data", str(data), "--max-steps", "6", "--micro-batch-size", "8"]
    assert train.main([*settings, "--out-dir", str(tmp_path / "run")]) == 0
    model, step = time_steps.trainer(settings)
    for _ in range(6):
        step()
    trained = weights(tmp_path / "run")
    assert all(torch.equal(p, trained[name]) for name, p in model.named_parameters()) and len(trained) > 10

    capsys.readouterr()
    time_steps.main([*TINY, "--data", str(data)], seconds=0, warm_up=1)
    title, dense, *others = capsys.readouterr().out.splitlines()
    assert "of 12 rounds" in title and dense.startswith("dense ") and dense.endswith(" 1.00 [1.00, 1.00]")
    for line, kind in zip(others, ("Memory ", "Memory+ "), strict=True):
        low, high = map(float, line[line.rindex("[") + 1:-1].split(","))
        assert line.startswith(kind) and 0.2 < low <= float(line.split("]")[1].split()[0]) <= high < 50
