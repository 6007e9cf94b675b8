"""How fast are the gather, the selection and the table's optimizer step, beside what torch offers?

    python tests/bench_kernel.py                 check the first two against their definitions, then
                                                 print a table
    python tests/bench_kernel.py --plot          and draw the gather's bandwidth to
                                                 docs/kernel.png
    python tests/bench_kernel.py --seconds 0.1   less time for each row, more noise

All of this is bound by memory: there are few FLOPs for each number that is read. So each row says
how many bytes the operation has to move at least, divided by the time it took, and what share that
is of the rate at which this machine copies memory. A share above 100% means that caches helped.

The functions named measure_... return rows, one dict for each way to do a thing:

    name         the way, for example "ours, forward"
    ms           median time of a call
    quartiles    (lower, upper) of the same
    GB_s         the bytes it has to move, over the median time
    share        GB_s over the rate of a copy
    peak         MiB of GPU memory at the most, or None on a CPU

and beside these what was measured: operation, device, dtype and sizes. Where the GPU had too little
memory, the last five are None.

N tokens · R reads per token · S slots · D dims of a slot · n half-keys per side · K slots selected
"""
import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import kernel
from kernel import gather, gather_reference, topk_sums, topk_sums_brute_force, topk_sums_reference
from memory import MemoryTable, RowAdam
from support.machine import keep_freed_memory
from support.terminal import steady_output

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Sizes:
    """What is measured. Tables and copies should be larger than any cache."""
    N: int  # tokens
    R: int  # reads per token
    dims: tuple  # D, each with slots[1] slots
    slots: tuple  # S, each with dims[-1] dims
    half_keys: tuple  # n
    K: int  # slots to select
    H: int  # heads, that is queries per token
    copy: int  # float32 numbers to copy


ON_GPU = Sizes(N=16384, R=128, dims=(256, 768, 1024), slots=(2**16, 2**20, 2**22),
               half_keys=(128, 256, 1024), K=32, H=4, copy=2**28)
ON_CPU = Sizes(N=1024, R=128, dims=(64, 128, 512), slots=(2**14, 2**16, 2**18),
               half_keys=(128, 256, 1024), K=32, H=4, copy=2**25)


# --------------------------------------------------------------------------------------------------
# Is it right?

# N, R, S, D: no tokens, one of everything, odd sizes, the sizes of GPT-2, few slots, many slots.
GATHERS = ((0, 4, 9, 8), (5, 1, 1, 1), (33, 3, 50, 7), (64, 32, 1000, 100), (17, 128, 300, 768),
           (9, 16, 500, 512), (9, 128, 500, 1024), (300, 8, 3, 64))
SELECTIONS = ((1, 1), (7, 7), (64, 16), (128, 32), (1024, 32))  # n, K


def check(device, dtype):
    """Compare gather and topk_sums with their definitions, on odd sizes too.

    Raises AssertionError with the case if they differ.
    """
    generator = torch.Generator().manual_seed(0)
    for N, R, S, D in GATHERS:
        check_gather(N, R, S, D, device, dtype, generator)
    for n, K in SELECTIONS:
        check_selection(n, K, device, dtype, generator)


def check_gather(N, R, S, D, device, dtype, generator):
    values = torch.randn(S, D, generator=generator).to(device, dtype)  # (S, D)
    weights = torch.rand(N, R, generator=generator).to(device)  # (N, R)
    indices = torch.randint(S, (N, R), generator=generator).to(device)  # (N, R)
    grad_y = torch.randn(N, D, generator=generator).to(device, dtype)  # (N, D)
    values.requires_grad_()
    weights.requires_grad_()
    want = gather_reference(values.float(), indices, weights)  # (N, D)
    got = gather(values, indices, weights)  # (N, D)
    want = (want, *torch.autograd.grad(want, (values, weights), grad_y.float()))
    got = (got, *torch.autograd.grad(got, (values, weights), grad_y))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2  # of the largest number
    for name, g, w in zip(("y", "gradient of values", "gradient of weights"), got, want):
        if w.numel() == 0:
            continue
        error = ((g - w).abs().max() / w.abs().max().clamp(min=1e-9)).item()
        case = f"N {N}, R {R}, S {S}, D {D}, {dtype}"
        assert error <= tolerance, f"gather, {name}: off by {error:.1e} at {case}"


def check_selection(n, K, device, dtype, generator):
    scores = torch.randn(2, 20, 4, n, generator=generator).to(device, dtype)  # (2, 20, 4, n)
    best, slots = topk_sums(scores, K)  # (20, 4, K) both
    left, right = scores.float()  # (20, 4, n) both
    slots = slots.long()
    named = left.gather(-1, slots // n) + right.gather(-1, slots % n)  # (20, 4, K)
    case = f"n {n}, K {K}, {dtype}"
    largest, _ = topk_sums_brute_force(scores.float(), K)  # (20, 4, K)
    assert torch.equal(best, largest), f"topk_sums: not the largest sums at {case}"
    assert torch.equal(best, named), f"topk_sums: not the slots of the sums at {case}"


# --------------------------------------------------------------------------------------------------
# The clock

WARM_UP = 3  # calls that compile, and fill caches
FEWEST_CALLS = 5
MOST_CALLS = 200


class CpuClock:
    def time(self, call, *inputs):
        begin = time.perf_counter()
        call(*inputs)
        return 1e3 * (time.perf_counter() - begin)


class GpuClock:
    """Times a call by the GPU's own clock.

    The CPU needs some time to launch a call's kernels. So that the GPU need not wait for it, the
    GPU is given something else to do first, about two milliseconds long: fifty passes over 64 MiB.
    They also push what the last call read out of the L2 cache.
    """

    def __init__(self, device):
        self.busy = torch.zeros(2**24, device=device)

    def time(self, call, *inputs):
        started = torch.cuda.Event(enable_timing=True)
        done = torch.cuda.Event(enable_timing=True)
        for _ in range(50):
            self.busy.add_(1)
        started.record()
        call(*inputs)
        done.record()
        done.synchronize()
        return started.elapsed_time(done)


def is_gpu(device):
    return torch.device(device).type == "cuda"


def milliseconds(call, device, seconds, inputs=((),), before=None):
    """Quartiles of what call(*inputs[i]) takes, in ms: (lower, median, upper).

    inputs rotate, so that no cache holds what the last call read. before() is called ahead of each
    call and not timed.
    """
    clock = GpuClock(device) if is_gpu(device) else CpuClock()

    def time_call(i):
        if before is not None:
            before()
        return clock.time(call, *inputs[i % len(inputs)])

    for i in range(WARM_UP):
        time_call(i)
    times = []
    stop = time.perf_counter() + seconds
    while len(times) < FEWEST_CALLS or (time.perf_counter() < stop and len(times) < MOST_CALLS):
        times.append(time_call(WARM_UP + len(times)))
    return tuple(statistics.quantiles(times, n=4))


def peak_memory(call, device, inputs=((),)):
    """MiB of GPU memory that a call takes at the most, with all that is there. None on a CPU."""
    if not is_gpu(device):
        return None
    torch.cuda.reset_peak_memory_stats(device)
    call(*inputs[0])
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 2**20


# --------------------------------------------------------------------------------------------------
# The table

HEADER = f"{'':52s}{'ms':>9s} [quartiles]{'GB/s':>15s} {'copy':>6s}{'peak MiB':>9s}"


def short(dtype):
    return str(dtype).removeprefix("torch.")


@dataclass
class Bench:
    """How to measure: where, for how long, and the GB/s that a copy reaches there.

    keep: called with each row as soon as it is there.
    """
    device: str
    seconds: float
    copy_rate: float
    keep: Callable = None

    def row(self, name, call, moved, inputs=((),), before=None, **what):
        """Time one way to do a thing, print a line of the table, return the row.

        moved: the bytes it has to move at least. what: goes into the row as it is.
        """
        row = dict(what, name=name, device=self.device)
        try:
            low, middle, high = milliseconds(call, self.device, self.seconds, inputs, before)
            peak = peak_memory(call, self.device, inputs)
        except torch.OutOfMemoryError:
            row.update(ms=None, quartiles=None, GB_s=None, share=None, peak=None)
            print(f"  {name:50s}out of memory", flush=True)
        else:
            rate = moved / middle / 1e6
            row.update(ms=middle, quartiles=(low, high), GB_s=rate, share=rate / self.copy_rate,
                       peak=peak)
            shown_peak = "-" if peak is None else f"{peak:.0f}"
            print(f"  {name:50s}{middle:9.2f} [{low:7.2f}, {high:7.2f}]{rate:8.1f}"
                  f"{100 * row['share']:6.0f}%{shown_peak:>9s}", flush=True)
        if self.keep is not None:
            self.keep(row)
        return row


def measure_copy(device, numbers, seconds):
    """GB/s of a copy: bytes read and bytes written."""
    source = torch.randn(numbers, device=device)
    target = torch.randn(numbers, device=device)

    def copy():
        target.copy_(source)
    _, middle, _ = milliseconds(copy, device, seconds)
    return 2 * 4 * numbers / middle / 1e6


def embedding_bag(values, indices, weights):
    return F.embedding_bag(indices, values, mode="sum", per_sample_weights=weights.to(values.dtype))


def ways_to_gather(device):
    ways = {
        "ours": gather,
        "F.embedding_bag": embedding_bag,
        "indexing + einsum": gather_reference,
    }
    if is_gpu(device):
        torch.compiler.reset()  # what was compiled for other sizes is not used
        compiled = torch.compile(gather_reference, dynamic=False)
        ways["indexing + einsum, compiled"] = compiled
    return ways


def measure_gather(bench, S, D, N, R, dtype, hot=False):
    """The gather in all ways, forward, then forward + backward. -> rows

    hot: a tenth of all reads hit one slot.
    """
    device = bench.device
    reads = ", a tenth of them of one slot" if hot else ""
    print(f"gather, S = {S}, D = {D}, {N} tokens x {R} reads, {short(dtype)}{reads}")
    what = dict(operation="gather", dtype=short(dtype), S=S, D=D, N=N, R=R, hot=hot)

    values = torch.randn(S, D, device=device, dtype=dtype)  # (S, D)
    grad_y = torch.randn(N, D, device=device, dtype=dtype)  # (N, D)
    inputs = []
    for _ in range(4):
        # int32, as topk_sums gives them.
        indices = torch.randint(S, (N, R), device=device, dtype=torch.int32)  # (N, R)
        if hot:
            is_hot = torch.rand(N, R, device=device) < 0.1  # (N, R)
            indices = torch.where(is_hot, 0, indices)  # (N, R)
        weights = torch.rand(N, R, device=device, requires_grad=True)  # (N, R)
        inputs.append((indices, weights))

    # Bytes. Forward: the rows and the result, an index and a weight for each lookup.
    number = values.element_size()
    lookups = N * R
    forward_bytes = (lookups + N) * D * number + lookups * (4 + 4)
    # Backward: the rows that are read at all and their gradient, grad_y, and for each lookup what
    # sorting leaves, the weight and its gradient.
    rows_read = len(inputs[0][0].unique())
    backward_bytes = rows_read * D * (number + 4) + N * D * number + lookups * (4 + 4 + 8 + 4)

    ways = ways_to_gather(device)
    rows = []

    for name, way in ways.items():
        def forward(indices, weights):
            way(values, indices, weights)
        with torch.no_grad():
            rows.append(bench.row(f"{name}, forward", forward, forward_bytes, inputs, way=name,
                                  backward=False, **what))

    values.requires_grad_()
    for name, way in ways.items():
        def forward_and_backward(indices, weights):
            values.grad = None
            weights.grad = None
            way(values, indices, weights).backward(grad_y)
        rows.append(bench.row(f"{name}, forward + backward", forward_and_backward,
                              forward_bytes + backward_bytes, inputs, way=name, backward=True,
                              **what))
    return rows


def measure_selection(bench, n, K, queries, dtype):
    """topk_sums, and the same method in plain torch. -> rows"""
    print(f"product-key top {K} of {n} x {n}, {queries} queries, {short(dtype)}")
    what = dict(operation="topk_sums", dtype=short(dtype), n=n, K=K, queries=queries)
    inputs = []
    for _ in range(4):
        scores = torch.randn(2, queries, n, device=bench.device, dtype=dtype)  # (2, queries, n)
        inputs.append((scores,))
    moved = scores.nbytes + queries * K * (4 + 4)  # the scores; K sums and K slots

    def ours(scores):
        topk_sums(scores, K)

    def with_torch_topk(scores):
        topk_sums_reference(scores, K)
    return [bench.row("ours", ours, moved, inputs, **what),
            bench.row("torch.topk", with_torch_topk, moved, inputs, **what)]


def measure_optimizer(bench, S, D, lookups):
    """Optimizer steps of a table: torch's, and RowAdam with a dense gradient, as on a GPU. -> rows

    lookups: reads in a step. torch.optim.SparseAdam steps the rows that are read, and no others.
    """
    device = bench.device
    print(f"optimizer step of a table of {S} x {D}")
    what = dict(operation="optimizer", S=S, D=D)
    values = torch.randn(S, D, device=device)  # (S, D)
    grad = torch.randn(S, D, device=device)  # (S, D)
    rows = []

    # Value and two moments are read and written, the gradient is read: 7 numbers of 4 bytes.
    values.grad = grad
    adamw = torch.optim.AdamW([values], fused=True)
    rows.append(bench.row("torch.optim.AdamW, float32, fused", adamw.step, 28 * S * D,
                          dtype="float32", way="AdamW", **what))
    del adamw

    read = torch.randint(S, (lookups,), device=device).unique()  # (rows that are read,)
    share = len(read) / S
    values.grad = torch.sparse_coo_tensor(read[None], grad[read], (S, D), is_coalesced=True)
    sparse_adam = torch.optim.SparseAdam([values])
    rows.append(bench.row(f"torch.optim.SparseAdam, the {share:.0%} of rows read", sparse_adam.step,
                          28 * len(read) * D, dtype="float32", way="SparseAdam", **what))
    del sparse_adam

    for dtype in (torch.float32, torch.bfloat16):
        table = MemoryTable(math.isqrt(S), D, dtype).to(device)
        optimizer = RowAdam([table], 1e-3)
        table.values.grad = grad[:len(table.values)]
        number = table.values.element_size()
        name = str(dtype).removeprefix("torch.")
        # The gradient is read twice, for its norm and for the step; the value is read and written.
        rows.append(bench.row(f"ours, RowAdam, {name}, all rows", optimizer.step,
                              (8 + 2 * number) * table.values.numel(), dtype=name,
                              way="RowAdam", **what))
    return rows


def measure_all(bench, sizes):
    """Print the whole table. -> rows

    On a CPU float32 alone: there bfloat16 is a way to save memory, not time.
    """
    on_gpu = is_gpu(bench.device)
    dtypes = [torch.float32, torch.bfloat16] if on_gpu else [torch.float32]
    rows = []
    for dtype in dtypes:
        tables = [(sizes.slots[1], D, False) for D in sizes.dims]
        tables.append((sizes.slots[1], sizes.dims[-1], True))
        tables += [(S, sizes.dims[-1], False) for S in sizes.slots]
        for S, D, hot in dict.fromkeys(tables):  # each once
            rows += measure_gather(bench, S, D, sizes.N, sizes.R, dtype, hot)
    for dtype in dtypes:
        for n in sizes.half_keys:
            rows += measure_selection(bench, n, min(sizes.K, n), sizes.H * sizes.N, dtype)
    rows += measure_optimizer(bench, sizes.slots[1], sizes.dims[1], sizes.N * sizes.R)
    return rows


# --------------------------------------------------------------------------------------------------
# The picture

def plot(rows, sizes, copy_rate, machine, path):
    """GB/s of the forward gather over the value dim, and over the number of slots."""
    from matplotlib.figure import Figure
    shown = [row for row in rows
             if row["operation"] == "gather" and not row["hot"] and not row["backward"]
             and row["ms"] is not None]
    figure = Figure(figsize=(11, 4), layout="constrained")
    over_dims, over_slots = figure.subplots(1, 2, sharey=True)
    draw_curves(over_dims, [row for row in shown if row["S"] == sizes.slots[1]], "D")
    draw_curves(over_slots, [row for row in shown if row["D"] == sizes.dims[-1]], "S")
    over_dims.set_xlabel(f"value dim D, {sizes.slots[1]} slots")
    over_slots.set_xlabel(f"slots S, value dim {sizes.dims[-1]}")
    for axes in (over_dims, over_slots):
        axes.axhline(copy_rate, color="gray", ls="--", label="measured copy: the limit of memory")
        axes.set_ylabel("GB/s, forward")
        axes.set_title(f"{machine}: {sizes.N} tokens x {sizes.R} reads")
        axes.set_ylim(0)
        axes.set_xscale("log", base=2)
    over_dims.legend(fontsize=8)
    figure.savefig(path, dpi=80)


def draw_curves(axes, rows, x):
    """One curve for each way and dtype, over row[x]."""
    curves = {}
    for row in rows:
        curves.setdefault(f"{row['way']}, {row['dtype']}", []).append((row[x], row["GB_s"]))
    for label, points in curves.items():
        axes.plot(*zip(*sorted(points)), "o-", label=label)


# --------------------------------------------------------------------------------------------------

def describe_machine(device):
    if is_gpu(device):
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def main():
    parser = argparse.ArgumentParser(
        description="check the kernels against their definitions, then time them")
    parser.add_argument("--plot", action="store_true",
                        help="draw bandwidth over the value dim and the slots to docs/kernel.png")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each row of the table")
    args = parser.parse_args()
    if not 0 <= args.seconds < 3600:
        sys.exit(f"bench_kernel.py: --seconds {args.seconds} is not from 0 to 3600")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = ON_GPU if device == "cuda" else ON_CPU
    keep_freed_memory()  # as train.py does

    print(kernel.describe_backend(device))
    for dtype in (torch.float32, torch.bfloat16):
        check(device, dtype)
    print("gather and topk_sums agree with their definitions (float32, bfloat16)")

    copy_rate = measure_copy(device, sizes.copy, args.seconds)
    machine = describe_machine(device)
    triton = "none" if kernel.triton is None else kernel.triton.__version__
    print(f"{machine}, torch {torch.__version__}, triton {triton}: "
          f"a copy moves {copy_rate:.0f} GB/s\n\n{HEADER}")
    rows = measure_all(Bench(device, args.seconds, copy_rate), sizes)
    if args.plot:
        path = ROOT / "docs" / "kernel.png"
        plot(rows, sizes, copy_rate, machine, path)
        print(f"drawn: {path}")


if __name__ == "__main__":
    steady_output()
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
