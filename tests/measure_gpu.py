"""Measure everything on this machine's GPU, in nine minutes, and write a report.

    python tests/measure_gpu.py                          # writes out/gpu/results.json, report.md
    python tests/measure_gpu.py --minutes 30             # less noise, and the slow steps finish
    python tests/measure_gpu.py --only training          # the steps whose names begin so
    python tests/measure_gpu.py --small                  # tries this script itself; also on a CPU
    python tests/measure_gpu.py --report runs/results/gpu.json # prints the tables of docs/speed.md

A step is one of STEPS, below. Each runs in a process of its own and has its share of the time that
is left. So a step that fails, hangs or runs out of GPU memory takes nothing with it. A step hands
over each number as soon as it has it, and the report is written after each step: whenever you stop
this script, you have what was measured. What a step prints is in its .log file. A second run adds
to the results of the first, if both use the same --out.

To share your results, put results.json where runs/results/gpu.json is, then replace the block in
docs/speed.md by what --report prints.
"""
import argparse
import contextlib
import json
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import bench_kernel
import kernel
import prepare_data
import time_steps
import train
from kernel import gather, topk_sums
from support import files, machine, settings, terminal
from support.checkpoint import load_checkpoint

# The model in small, to try this script.
SMALL = ["--n-layer", "2", "--n-head", "2", "--n-embd", "16", "--mem-layers", "1",
         "--mem-n-keys", "8", "--mem-topk", "4", "--moe-experts", "8", "--moe-topk", "1"]


@dataclass
class Job:
    """What a step gets: where to measure, for how long, and where to put what it finds.

    seconds: its time; out: the folder of the results; small: in small, to try this script.
    """
    name: str
    seconds: float
    out: Path
    small: bool

    def __post_init__(self):
        self.begin = time.perf_counter()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.scratch = self.out / "scratch"

    def left(self):
        """Seconds that are left of its time."""
        return self.seconds - (time.perf_counter() - self.begin)

    def keep(self, row):
        """Add a row, a dict, to the results. From now on nothing can take it away."""
        with open(rows_file(self.out, self.name), "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")

    def check(self, name, call, *args):
        """Keep whether call(*args) passes. It returns what there is to say, and raises if not."""
        try:
            said = call(*args)
            ok = True
        except Exception as error:  # whatever it is: the other checks are made nevertheless
            said = f"{type(error).__name__}: {error}"
            ok = False
        said = " ".join(str(said or "").split())[:300]
        print(f"{name}: ok {ok}; {said}", flush=True)
        self.keep(dict(check=name, ok=ok, said=said))

    def python(self, *argv, **environment):
        """Run a script of ours to its end -> the CompletedProcess, its output as text."""
        done = subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, text=True,
                              env=os.environ | environment, capture_output=True)
        print(" ".join(map(str, argv)), f"-> {done.returncode}\n{done.stdout}{done.stderr}")
        return done


def rows_file(out, name):
    return out / f"{name}.jsonl"


def must_pass(done):
    """Raise RuntimeError, with the line that says why, if a command has failed."""
    if done.returncode:
        lines = said_by_train(done)
        raise RuntimeError(lines[0] if lines else last_line(done.stderr + done.stdout))
    return done


def said_by_train(done):
    """The error lines of train.py: under torchrun they are not the last ones."""
    return [line for line in done.stderr.splitlines() if line.startswith("train.py:")]


def last_line(text):
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it printed nothing"


# --------------------------------------------------------------------------------------------------
# Hardware

def hardware(job):
    """The machine, the versions, and the rate of a copy, which is the measure of all others."""
    sizes = bench_kernel.ON_CPU if job.small else bench_kernel.ON_GPU
    row = dict(machine=bench_kernel.describe_machine(job.device), torch=torch.__version__,
               triton=None if kernel.triton is None else kernel.triton.__version__,
               python=platform.python_version(), system=platform.platform(),
               cuda=torch.version.cuda, gpus=torch.cuda.device_count(),
               GiB=gpu_memory(job.device), capability=None, small=job.small)
    if job.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        row["capability"] = f"{properties.major}.{properties.minor}"
    row["copy_GB_s"] = bench_kernel.measure_copy(job.device, sizes.copy, min(2, job.seconds / 4))
    job.keep(row)


def gpu_memory(device):
    """GiB, or None on a CPU."""
    if device == "cpu":
        return None
    return torch.cuda.get_device_properties(0).total_memory / 2**30


# --------------------------------------------------------------------------------------------------
# Kernels: right, and the same bits on every run

def kernels(job):
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    for name, dtype in dtypes.items():
        job.check(f"kernels, odd sizes, {name}", bench_kernel.check, job.device, dtype)
    for name, dtype in dtypes.items():
        job.check(f"kernels, two hot slots, {name}", check_hot_slots, job, dtype)
    for name, dtype in dtypes.items():
        job.check(f"kernels, the same bits twice, {name}", check_same_bits, job, dtype)
    job.check("kernels, a table of more than 2^31 numbers", check_large_table, job)


def check_hot_slots(job, dtype):
    tokens = 64 if job.small else 2048
    generator = torch.Generator().manual_seed(0)
    bench_kernel.check_gather(tokens, 32, 2, 256, job.device, dtype, generator)


def check_same_bits(job, dtype):
    """Gather and selection, forward and backward, on half of the reads of one slot."""
    N, R, S, D, n = (64, 8, 100, 32, 16) if job.small else (4096, 128, 2**16, 768, 256)
    generator = torch.Generator(job.device).manual_seed(0)
    where = dict(device=job.device, generator=generator)
    indices = torch.randint(S, (N, R), **where)  # (N, R)
    indices[:, ::2] = 5
    values = torch.randn(S, D, **where).to(dtype).requires_grad_()  # (S, D)
    weights = torch.rand(N, R, **where).requires_grad_()  # (N, R)
    grad_y = torch.randn(N, D, **where).to(dtype)  # (N, D)
    scores = torch.randn(2, N, n, **where).to(dtype).requires_grad_()  # (2, N, n)

    def results():
        y = gather(values, indices, weights)  # (N, D)
        best, slots = topk_sums(scores, 8)  # (N, 8) both
        grads = torch.autograd.grad((y, best), (values, weights, scores),
                                    (grad_y, torch.ones_like(best)))
        return (y, best, slots, *grads)
    first = results()
    second = results()
    names = ("y", "best", "slots", "gradient of values", "of weights", "of scores")
    for name, a, b in zip(names, first, second):
        assert torch.equal(a, b), f"{name}: other bits in a second run"


def check_large_table(job):
    """A table that is read only in its last rows, against a table of those rows alone."""
    S, D = (2**10 + 8, 32) if job.small else (2**21 + 8, 1024)
    few = 9
    N, R = 64, 16
    generator = torch.Generator(job.device).manual_seed(0)
    where = dict(device=job.device, generator=generator)
    large = torch.zeros(S, D, dtype=torch.bfloat16, device=job.device)  # (S, D)
    small = torch.randn(few, D, **where).bfloat16()  # (few, D)
    large[-few:] = small
    indices = torch.randint(few, (N, R), **where)  # (N, R)
    grad_y = torch.randn(N, D, **where).bfloat16()  # (N, D)
    results = []
    for values, first in ((small, 0), (large, S - few)):
        weights = torch.rand(N, R, device=job.device,
                             generator=generator.manual_seed(1)).requires_grad_()  # (N, R)
        values.requires_grad_()
        y = gather(values, indices + first, weights)  # (N, D)
        y.backward(grad_y)
        results.append((y, weights.grad, values.grad[first:]))
        assert not values.grad[:first].any(), "rows that nobody read got a gradient"
    tolerance = 1e-2  # of the largest number: a rounding of bfloat16. A wrong row would be far off
    for name, a, b in zip(("y", "gradient of weights", "gradient of values"), *results):
        error = ((a - b).abs().max() / a.abs().max()).item()
        assert error < tolerance, f"{name}: off by {error:.1e} of that of its rows alone"
    return f"{S} x {D} = {S * D:,} numbers"


# --------------------------------------------------------------------------------------------------
# Operations: the time they take

def operations(job):
    """tests/bench_kernel.py: the sizes with goals first, then the others as far as time allows."""
    sizes = bench_kernel.ON_GPU
    if job.small:
        sizes = bench_kernel.Sizes(N=16, R=4, dims=(4, 8), slots=(16, 64), half_keys=(8,), K=4,
                                   H=2, copy=2**12)
    copy_rate = bench_kernel.measure_copy(job.device, sizes.copy, min(1, job.seconds / 10))
    # In a hundred seconds that makes 0.1 s for each row: half of the time goes to torch.compile.
    bench = bench_kernel.Bench(job.device, job.seconds / 1000, copy_rate, job.keep)
    machine.keep_freed_memory()
    S = sizes.slots[1]
    D = sizes.dims[-1]
    largest = sizes.half_keys[-1]
    dtypes = (torch.float32, torch.bfloat16)
    first = []
    later = []
    for dtype in dtypes:
        first.append((bench_kernel.measure_gather, S, D, sizes.N, sizes.R, dtype))
        later.append((bench_kernel.measure_gather, S, D, sizes.N, sizes.R, dtype, True))
        for other in sizes.dims[:-1]:
            later.append((bench_kernel.measure_gather, S, other, sizes.N, sizes.R, dtype))
        for other in (sizes.slots[0], *sizes.slots[2:]):
            later.append((bench_kernel.measure_gather, other, D, sizes.N, sizes.R, dtype))
    for dtype in dtypes:
        queries = sizes.H * sizes.N
        first.append((bench_kernel.measure_selection, largest, sizes.K, queries, dtype))
        for n in sizes.half_keys[:-1]:
            later.append((bench_kernel.measure_selection, n, sizes.K, queries, dtype))
    first.append((bench_kernel.measure_optimizer, S, sizes.dims[-2], sizes.N * sizes.R))
    for measure, *arguments in first + later:
        try:
            measure(bench, *arguments)
        except torch.OutOfMemoryError as error:
            print(f"out of memory: {last_line(str(error))}")


# --------------------------------------------------------------------------------------------------
# Training: the shape of GPT-2 with 124 M parameters

PLUS = ["--mem-gate", "--qk-norm"]
TRAINING = {  # what the report calls it: flags
    "dense": ["--ffn", "dense"],
    "Memory+, 2^16 slots": [*PLUS, "--mem-n-keys", "256"],
    "Memory+, 2^20 slots": [*PLUS, "--mem-n-keys", "1024"],
    "Memory+, 2^22 slots": [*PLUS, "--mem-n-keys", "2048"],
    "Memory, 2^20 slots": ["--no-mem-gate", "--no-qk-norm", "--mem-n-keys", "1024"],
    "hashed memory, 2^20 slots": ["--ffn", "hash", "--mem-n-keys", "1024"],
    "PEER, 2^19 experts": ["--ffn", "peer", "--mem-dtype", "float32", "--mem-n-keys", "1024"],
    "MoE, 1,024 experts": ["--ffn", "moe", "--mem-dtype", "float32", "--mem-n-keys", "1024"],
}
WARM_UP = 3  # steps that are not timed
LEAST_STEPS = 5


def training(kind, job):
    """Time steps of the openwebtext preset, 32 windows at a time, 8 on a GPU below 60 GiB."""
    data = text_data(job)
    micro = 32 if (gpu_memory(job.device) or 0) > 60 else 8
    size = ["--vocab-size", "50304", "--batch-size", "128", "--micro-batch-size", str(micro)]
    if job.small:
        size = [*SMALL, "--block-size", "16", "--batch-size", "4", "--micro-batch-size", "2"]
    flags = list(TRAINING[kind])
    if job.small and "--mem-n-keys" in flags:
        flags[-1] = str(int(flags[-1]) // 16)
    trainer, step = time_steps.trainer(["openwebtext", "--data", str(data), *size, *flags])
    ms = []
    while len(ms) < WARM_UP + LEAST_STEPS or (job.left() > 0.2 * job.seconds and len(ms) < 40):
        begin = time.perf_counter()
        step()
        if job.device == "cuda":
            torch.cuda.synchronize()
        ms.append(1e3 * (time.perf_counter() - begin))
    low, middle, high = statistics.quantiles(ms[WARM_UP:], n=4)
    s = trainer.s
    rate = 1e3 * s.batch_size * s.block_size / middle
    flops = trainer.model.flops_per_token()
    peak = machine.peak_flops(machine.describe_hardware(trainer.device), world=1)
    job.keep(dict(kind=kind, ms=middle, quartiles=(low, high), steps=len(ms) - WARM_UP,
                  first_step_s=ms[0] / 1e3, tokens_per_s=rate, flops_per_token=flops,
                  MFU=rate * flops / peak if peak else None, micro_batch_size=micro,
                  params=trainer.model.param_counts(),
                  peak_GiB=machine.peak_memory(trainer.device) / 2**30))


def text_data(job):
    """A little text, this repository's own, as bytes -> its folder."""
    folder = job.scratch / "text"
    if not (folder / "meta.json").exists():
        job.scratch.mkdir(parents=True, exist_ok=True)
        pages = [path.read_text("utf-8") for path in sorted(ROOT.glob("*.py"))]
        text = job.scratch / "text.txt"
        text.write_text("\n".join(pages) * 8, "utf-8")
        prepare_data.make_text(str(text), out=str(folder), tokenizer="bytes")
    return folder


# --------------------------------------------------------------------------------------------------
# facts-gpu: does it learn at a larger size?

DOCUMENTS_PER_PERSON = 82  # as in the preset


def facts(job):
    """facts-gpu, memory and dense, for as many steps as fit, on a corpus that is read once.

    The corpus has as many people as make each fact as frequent as in the preset.
    """
    size = []
    batch = settings.preset_settings(train.Settings, train.PRESETS["facts-gpu"], {}).batch_size
    if job.small:
        batch = 32
        size = [*SMALL, "--batch-size", str(batch)]
    steps = facts_steps(job, size)
    if job.small:
        steps = 8
    documents = steps * batch
    people = max(documents // DOCUMENTS_PER_PERSON, 40)
    data = job.scratch / "facts-gpu"
    shutil.rmtree(data, ignore_errors=True)
    prepare_data.make_facts(str(data), people=people, documents=documents, control=40)
    for kind in ("memory", "dense"):
        out = job.scratch / f"facts-gpu-{kind}"
        shutil.rmtree(out, ignore_errors=True)
        must_pass(job.python("train.py", "facts-gpu", "--data", data, "--ffn", kind, *size,
                             "--max-steps", steps, "--out-dir", out))
        result = json.loads((out / "result.json").read_text("utf-8"))
        job.keep(dict(kind=kind, steps=steps, people=people, batch_size=batch, **result))


def facts_steps(job, size):
    """How many steps of the memory model and then of the dense one fit into the time."""
    data = job.scratch / "facts-trial"
    people, documents = (100, 1000) if job.small else (10_000, 100_000)
    prepare_data.make_facts(str(data), people=people, documents=documents)
    _, step = time_steps.trainer(["facts-gpu", "--data", str(data), *size])
    step()
    begin = time.perf_counter()
    trial = 20
    for _ in range(trial):
        loss, _ = step()
    loss.item()  # waits for the GPU
    seconds = (time.perf_counter() - begin) / trial
    # A run has to start and to compile, as this trial had.
    start = job.seconds - job.left()
    for_training = 0.8 * job.left() - 2 * start
    return max(int(for_training / 2 / seconds), 100)


# --------------------------------------------------------------------------------------------------
# Runs: what can go wrong with them

def small_run(job):
    """-> flags of a short run on a small corpus, and its number of steps."""
    data = job.scratch / "facts"
    people, steps = (40, 60) if job.small else (2000, 400)
    prepare_data.make_facts(str(data), people=people, documents=128 * steps)
    flags = ["facts", "--data", data, "--max-steps", steps, "--eval-every", steps // 2]
    if job.small:
        flags += SMALL
    return [str(flag) for flag in flags], steps


TABLE_DTYPES = ("float32", "bfloat16")


def runs(job):
    for dtype in TABLE_DTYPES:
        job.check(f"resume after kill -9, {dtype} table", check_resume, job, dtype)
    job.check("one rank with a sliced table", check_one_rank, job)
    job.check("no C compiler", check_no_compiler, job)
    job.check("more ranks than GPUs", check_too_many_ranks, job)


def check_resume(job, dtype):
    """Kill a run after its first checkpoint, resume it, compare it with one that ran through."""
    flags, steps = small_run(job)
    flags += ["--mem-dtype", dtype]
    whole = job.scratch / f"whole-{dtype}"
    broken = job.scratch / f"broken-{dtype}"
    for out in (whole, broken):
        shutil.rmtree(out, ignore_errors=True)
    must_pass(job.python("train.py", *flags, "--out-dir", whole))
    run = subprocess.Popen([sys.executable, "train.py", *flags, "--out-dir", str(broken)],
                           cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (broken / "ckpt.pt").exists() and run.poll() is None:
        time.sleep(0.01)
    run.kill()
    run.wait()
    _, state = load_checkpoint(broken)
    assert state["step"] < steps, "the run had finished before it was killed"
    must_pass(job.python("train.py", "--resume", "--out-dir", broken))
    largest = 0.0
    one, _ = load_checkpoint(whole)
    other, _ = load_checkpoint(broken)
    for a, b in zip(one.state_dict().values(), other.state_dict().values()):
        if not torch.equal(a, b):
            difference = ((a.double() - b.double()).norm() / a.double().norm()).item()
            assert math.isfinite(difference), "a tensor is not finite"
            largest = max(largest, difference)
    assert largest < 0.1, f"a tensor differs by {largest:.1e} of its norm"
    if largest == 0:
        return f"bit for bit, from step {state['step']} to {steps}"
    return f"not bit for bit: a tensor differs by {largest:.1e} of its norm at most"


def check_one_rank(job):
    """A layer over a table in one slice sends and receives as many do, through NCCL or gloo."""
    from torch.distributed.device_mesh import init_device_mesh

    from memory import MemoryTable, ProductKeyMemory, RowAdam
    library = "nccl" if job.device == "cuda" else "gloo"
    torch.distributed.init_process_group(
        library, store=torch.distributed.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(job.device, (1, 1), mesh_dim_names=("replica", "slice"))
    x = torch.randn(2, 8, 32, device=job.device)  # (B, T, C)
    results = []
    for m in (None, mesh):
        torch.manual_seed(0)
        table = MemoryTable(16, 32, mesh=m)
        layer = ProductKeyMemory(32, table, heads=2, topk=4).to(job.device)
        table.to(job.device)
        RowAdam([table], 1e-3)  # makes slices trainable
        y = layer(x)  # (B, T, C)
        y.square().sum().backward()
        results.append((y, table.values.grad))
    torch.distributed.destroy_process_group()
    for name, a, b in zip(("y", "gradient of values"), *results):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5), f"{name} differs"
    return f"{library}: as without ranks"


def check_no_compiler(job):
    """Triton needs a C compiler when it first launches a kernel. Without one the run goes on."""
    flags, _ = small_run(job)
    out = job.scratch / "no-compiler"
    cache = job.scratch / "empty-cache"
    for folder in (out, cache):
        shutil.rmtree(folder, ignore_errors=True)
    done = must_pass(job.python(
        "train.py", *flags, "--no-compile", "--max-steps", "20", "--out-dir", out,
        CC="/bin/false", TRITON_CACHE_DIR=str(cache)))
    line = next(line for line in done.stdout.splitlines() if line.startswith("memory:"))
    assert line.startswith("memory: torch"), f"Triton worked without a compiler: {line}"
    return line


def check_too_many_ranks(job):
    """One clear line, and no traceback."""
    flags, _ = small_run(job)
    out = job.scratch / "too-many"
    shutil.rmtree(out, ignore_errors=True)
    ranks = torch.cuda.device_count() + 1
    done = job.python("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
                      "train.py", *flags, "--max-steps", "4", "--device", job.device,
                      "--out-dir", out)
    lines = said_by_train(done)
    if job.device == "cpu":
        must_pass(done)
        return f"{ranks} rank(s) on a CPU, where there is no such limit"
    assert done.returncode and lines, f"exit status {done.returncode}, no line of train.py"
    return lines[0]


# --------------------------------------------------------------------------------------------------
# All steps

@dataclass
class Step:
    """share: its part of the time that the steps before it have left. run: a function of a Job.
    """
    share: float
    run: Callable


def training_step(kind):
    def run(job):
        training(kind, job)
    return run


STEPS = {
    "hardware": Step(1, hardware),
    "kernels": Step(3, kernels),
    "operations": Step(5, operations),
}
for _kind in TRAINING:
    STEPS[f"training {_kind}"] = Step(5, training_step(_kind))  # torch.compile takes most of it
STEPS["facts-gpu"] = Step(5, facts)
STEPS["runs"] = Step(5, runs)


def run_step(name, seconds, out, small):
    """Run a step in a process of its own -> {"status", "seconds", "rows"}."""
    rows_file(out, name).unlink(missing_ok=True)
    begin = time.perf_counter()
    command = [sys.executable, str(Path(__file__).resolve()), "--step", name,
               "--minutes", str(seconds / 60), "--out", str(out)]
    if small:
        command.append("--small")
    log_path = out / f"{name}.log"
    with open(log_path, "w", encoding="utf-8") as log:
        # A group of its own, so that what it starts can be stopped with it.
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait(timeout=seconds)
            status = "done"
        except subprocess.TimeoutExpired:
            code = 0
            status = f"stopped after its {seconds:.0f} s"
        except KeyboardInterrupt:
            code = 0
            status = STOPPED
        finally:
            stop_group(process)
    if code:
        status = f"failed: {last_line(log_path.read_text('utf-8', 'replace'))}"
    rows = []
    if rows_file(out, name).exists():
        for line in rows_file(out, name).read_text("utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # a line that was cut off
                rows.append(json.loads(line))
        rows_file(out, name).unlink()
    return dict(status=status, seconds=time.perf_counter() - begin, rows=rows)


STOPPED = "stopped by a signal"


def stop_group(process):
    """Kill a process and what it has started. Nothing happens if all of them have ended."""
    if sys.platform == "win32":
        process.kill()
    else:
        # macOS says PermissionError of a group that has ended.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def measure(names, minutes, out, small):
    """Run these steps, one after the other, and write results.json and report.md after each.

    Returns all results.
    """
    out.mkdir(parents=True, exist_ok=True)
    results = load(out / "results.json")
    end = time.perf_counter() + 60 * minutes
    for i, name in enumerate(names):
        shares = [STEPS[later].share for later in names[i:]]
        left = max(end - time.perf_counter(), 0)
        results[name] = run_step(name, left * shares[0] / sum(shares), out, small)
        files.write_json(out / "results.json", results)
        files.write_text(out / "report.md", report(results))
        print(f"{name:30s}{results[name]['seconds']:6.0f} s   {results[name]['status']}",
              flush=True)
        if results[name]["status"] == STOPPED:
            break
    shutil.rmtree(out / "scratch", ignore_errors=True)
    return results


# --------------------------------------------------------------------------------------------------
# The report

NOT_YET = "not measured yet"


def load(path):
    """A results.json -> what measure() had written; {} where there is none."""
    if not path.exists():
        return {}
    with files.reading(path, "delete it, or give another file"):
        results = json.loads(path.read_text("utf-8"))
        report(results)  # fails if these are other results
    return results


def rows_of(results, step, **wanted):
    """The rows of a step that have these values."""
    rows = results.get(step, {}).get("rows", [])
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def number(results, step, key, **wanted):
    """row[key] of the first such row, or None."""
    for row in rows_of(results, step, **wanted):
        return row.get(key)
    return None


def ratio(a, b):
    return a / b if a and b else None


GOAL_GATHER = dict(operation="gather", S=2**20, D=1024, N=16384, R=128, hot=False)
GOAL_SELECTION = dict(operation="topk_sums", n=1024, K=32)


def gather_share(results):
    return number(results, "operations", "share", **GOAL_GATHER, dtype="bfloat16", way="ours",
                  backward=False)


def gather_times(results):
    ms = {}
    for way in ("ours", "F.embedding_bag"):
        ms[way] = number(results, "operations", "ms", **GOAL_GATHER, dtype="float32", way=way,
                         backward=True)
    return ratio(ms["F.embedding_bag"], ms["ours"])


def selection_times(results):
    """The smaller of two ratios: in float32 and in bfloat16."""
    ratios = []
    for dtype in ("float32", "bfloat16"):
        what = dict(GOAL_SELECTION, dtype=dtype)
        ratios.append(ratio(number(results, "operations", "ms", **what, name="torch.topk"),
                            number(results, "operations", "ms", **what, name="ours")))
    return None if None in ratios else min(ratios)


def training_ms(results, kind):
    return number(results, f"training {kind}", "ms", kind=kind)


def memory_speed(results):
    return ratio(training_ms(results, "dense"), training_ms(results, "Memory+, 2^20 slots"))


def slots_cost(results):
    return ratio(training_ms(results, "Memory+, 2^22 slots"),
                 training_ms(results, "Memory+, 2^16 slots"))


GOALS = [  # what, sign, limit, function of the results
    ("gather, forward: share of the copy rate (2^20 slots, D 1024, R 128, bfloat16)",
     "≥", 0.90, gather_share),
    ("gather, forward + backward: times as fast as F.embedding_bag (float32)",
     "≥", 6.0, gather_times),
    ("selection: times as fast as torch.topk (32 of 2^20 slots, the slower dtype)",
     "≥", 3.0, selection_times),
    ("Memory+ with 2^20 slots: share of dense tokens/s", "≥", 0.95, memory_speed),
    ("step with 2^22 slots over step with 2^16", "≤", 1.15, slots_cost),
]
CHECKS = [  # step, check
    ("kernels", "kernels, odd sizes, float32"),
    ("kernels", "kernels, odd sizes, bfloat16"),
    ("kernels", "kernels, two hot slots, float32"),
    ("kernels", "kernels, two hot slots, bfloat16"),
    ("kernels", "kernels, the same bits twice, float32"),
    ("kernels", "kernels, the same bits twice, bfloat16"),
    ("kernels", "kernels, a table of more than 2^31 numbers"),
    ("runs", "resume after kill -9, float32 table"),
    ("runs", "resume after kill -9, bfloat16 table"),
    ("runs", "one rank with a sliced table"),
    ("runs", "no C compiler"),
    ("runs", "more ranks than GPUs"),
]
WAYS = ("ours", "F.embedding_bag", "indexing + einsum", "indexing + einsum, compiled")
OPERATIONS = {}  # what the report calls it: what its rows have
for _way in WAYS:
    OPERATIONS[f"gather, forward, {_way}"] = dict(GOAL_GATHER, way=_way, backward=False)
    OPERATIONS[f"gather, forward + backward, {_way}"] = dict(GOAL_GATHER, way=_way, backward=True)
for _way in ("ours", "torch.topk"):
    OPERATIONS[f"selection, {_way}"] = dict(GOAL_SELECTION, name=_way)
for _way in ("RowAdam", "AdamW"):
    OPERATIONS[f"a step of the table, {_way}"] = dict(operation="optimizer", way=_way)


def shown(numbers):
    """Numbers as the cells of a row, from a list of (number or None, form as in f-strings)."""
    if all(value is None for value, _ in numbers):
        return [NOT_YET] + [""] * (len(numbers) - 1)
    return ["-" if value is None else format(value, form) for value, form in numbers]


def goals_table(results):
    rows = []
    for what, sign, limit, find in GOALS:
        value = find(results)
        reached = ""
        if value is not None:
            is_reached = value >= limit if sign == "≥" else value <= limit
            reached = "yes" if is_reached else "no"
        rows.append([what, f"{sign} {limit:.2f}", *shown([(value, ".2f")]), reached])
    return table(["goal", "aim", "measured", "reached"], rows)


def checks_table(results):
    rows = []
    for step, check in CHECKS:
        ok = number(results, step, "ok", check=check)
        said = number(results, step, "said", check=check) or ""
        verdict = {None: NOT_YET, True: "passed", False: "failed"}[ok]
        rows.append([check, verdict, said.replace("|", "\\|")])
    return table(["check", "result", "what it said"], rows)


def operations_table(results):
    rows = []
    for name, what in OPERATIONS.items():
        numbers = []
        for dtype in ("float32", "bfloat16"):
            numbers.append((number(results, "operations", "ms", **what, dtype=dtype), ".2f"))
            numbers.append((number(results, "operations", "share", **what, dtype=dtype), ".0%"))
        rows.append([name, *shown(numbers)])
    return table(["operation", "float32, ms", "of a copy", "bfloat16, ms", "of a copy"], rows)


def training_table(results):
    rows = []
    dense = training_ms(results, "dense")
    for kind in TRAINING:
        step = f"training {kind}"
        rows.append([kind, *shown([
            (number(results, step, "tokens_per_s"), ",.0f"),
            (ratio(dense, training_ms(results, kind)), ".2f"),
            (number(results, step, "MFU"), ".0%"),
            (number(results, step, "peak_GiB"), ".1f"),
        ])])
    return table(["model", "tokens/s", "of dense", "MFU", "peak GiB"], rows)


def facts_table(results):
    rows = []
    for kind in ("memory", "dense"):
        numbers = []
        for key, form in (("steps", ","), ("people", ","), ("recall", ".3f"), ("val_loss", ".3f"),
                          ("tokens_per_s", ",.0f"), ("seconds", ".0f")):
            numbers.append((number(results, "facts-gpu", key, kind=kind), form))
        rows.append([kind, *shown(numbers)])
    return table(["facts-gpu", "steps", "people", "recall", "val loss", "tokens/s", "seconds"],
                 rows)


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine_text(results):
    rows = rows_of(results, "hardware")
    if not rows:
        return "**Not measured on a GPU yet.**"
    row = rows[0]
    small = ""
    if row["small"]:
        small = " **These are trials of the script in small sizes. No number here means anything.**"
    return (f"**{row['machine']}** x {row['gpus']}, CUDA {row['cuda']}, torch {row['torch']}, "
            f"triton {row['triton']}, Python {row['python']}. A copy moves "
            f"{row['copy_GB_s']:.0f} GB/s.{small}")


def report(results):
    """The Markdown text of the report. What was not measured says so."""
    unfinished = []
    for name, step in results.items():
        if step["status"] != "done":
            unfinished.append(f"- {name}: {step['status']}")
    parts = [
        machine_text(results),
        "Goals:",
        goals_table(results),
        "A training step of GPT-2's 124M shape, compiled, matrices in bfloat16:",
        training_table(results),
        "Operations: gather from 2^20 slots of 1,024 dims, 16,384 tokens x 128 reads; selection of "
        "32 of 2^20 slots; median time, and the bytes moved as a share of the copy rate:",
        operations_table(results),
        "Is it right?",
        checks_table(results),
        "Does it learn at a larger size? One seed and a short run: this shows that it works, not "
        "how much better it is:",
        facts_table(results),
    ]
    if unfinished:
        parts += ["Steps that did not finish:", "\n".join(unfinished)]
    return "\n\n".join(parts) + "\n"


# --------------------------------------------------------------------------------------------------

def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="for all steps (9)")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu", help="folder (out/gpu)")
    parser.add_argument("--only", default="", help="only the steps whose names begin so")
    parser.add_argument("--small", action="store_true", help="try this script; also on a CPU")
    parser.add_argument("--report", type=Path, metavar="JSON",
                        help="print the tables of such results, measure nothing")
    parser.add_argument("--step", choices=STEPS, help="run this step here, as the others are run")
    return parser


def stop(number, frame):
    """A signal is as Ctrl-C."""
    raise KeyboardInterrupt


def main(argv=None):
    """The command line -> the exit status. What the user can fix is one line on stderr."""
    try:
        return run_all(make_parser().parse_args(argv))
    except (ValueError, OSError) as error:
        print("measure_gpu.py: " + " ".join(str(error).split()), file=sys.stderr)
        return 1


def run_all(args):
    if args.report:
        print(report(load(args.report)), end="")
        return 0
    if args.step:
        STEPS[args.step].run(Job(args.step, 60 * args.minutes, args.out.resolve(), args.small))
        return 0
    names = [name for name in STEPS if name.startswith(args.only)]
    problem = None
    if not names:
        problem = f"--only {args.only!r} fits no step: they are {', '.join(STEPS)}"
    elif not args.minutes > 0:
        problem = f"--minutes {args.minutes} is not above 0"
    elif not (args.small or torch.cuda.is_available()):
        problem = "there is no CUDA GPU to measure: --small tries this script on the CPU"
    if problem:
        raise ValueError(problem)
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # Windows lacks one
            signal.signal(getattr(signal, name), stop)
    results = measure(names, args.minutes, args.out.resolve(), args.small)
    print(f"\n{report(results)}\nwritten: {args.out / 'report.md'}")
    was_stopped = any(results[name]["status"] == STOPPED for name in names if name in results)
    return 130 if was_stopped else 0


if __name__ == "__main__":
    terminal.steady_output()
    sys.exit(main())
