"""
The two operations a memory layer is made of, each as a plain definition beside a fast version:

    gather      y[t] = sum_r weights[t, r] * values[indices[t, r]]        read R slots of the value table per token
    topk_sums   the K largest of the n*n sums scores[0, i] + scores[1, j]     find those slots from 2n scores

    python kernel.py            check every fast version against its definition, then print a table of ms and GB/s
    python kernel.py --plot     the same, and draw bandwidth over the value dim to assets/kernel.png

The gather moves N*R rows and does two flops per number: it is bound by memory bandwidth, and everything below is about touching
each row once. Three paths compute it: gather_reference (the definition), F.embedding_bag (CPUs and any device without Triton) and
Triton kernels (CUDA). `backend("triton" | "torch" | "auto")` chooses; describe_backend() says what runs and why.

N tokens · H heads · K slots read per head · R = H*K reads per token · n half-keys per side · S = n*n slots · D value dim
"""
import argparse
import os
import statistics
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
    TRITON_MISSING = None
except ImportError as e:  # Windows, macOS: everything works without it
    triton, TRITON_MISSING = None, f"triton cannot be imported ({e})"

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run on the CPU, slowly, in float32: for tests and for learning
_backend = "auto"


def backend(name=None):
    """Choose what gather() runs on: "auto" (Triton on CUDA, torch elsewhere), "triton" or "torch". Returns the choice in force."""
    global _backend
    if name is not None:
        if name not in ("auto", "triton", "torch"):
            raise ValueError(f"backend {name!r} is not one of auto, triton, torch")
        if name == "triton" and (triton is None or not (INTERPRETED or torch.cuda.is_available())):
            raise ValueError(f"backend 'triton' cannot run here: {TRITON_MISSING or 'no CUDA GPU; set TRITON_INTERPRET=1 to interpret it'}")
        _backend = name
    return _backend


def uses_triton(device):
    """Whether gather() runs the Triton kernels for tensors on this device."""
    if _backend != "auto":
        return _backend == "triton"
    return triton is not None and torch.device(device).type == "cuda" and not INTERPRETED


def describe_backend(device):
    """One line for the start of a run: which path the gather takes on this device, and why."""
    device = torch.device(device)
    if uses_triton(device):
        return f"gather: Triton kernels ({'interpreted on the CPU' if INTERPRETED else torch.cuda.get_device_name(device)})"
    why = "chosen by backend()" if _backend == "torch" else TRITON_MISSING or (
        "TRITON_INTERPRET is set" if device.type == "cuda" else f"Triton needs a CUDA GPU, this is {device.type}")
    return f"gather: torch's embedding_bag ({why})"


# ---------------------------------------------------------------------------------------------------------------------------------
# gather

def gather_reference(values, indices, weights):
    """The definition: values (S, D), indices (N, R), weights (N, R) -> (N, D), summed in float32 (float64 for float64)."""
    wide = torch.promote_types(values.dtype, torch.float32)
    rows = values[indices].to(wide)                                         # (N, R, D): R times larger than the result
    return torch.einsum("nr,nrd->nd", weights.to(wide), rows).to(values.dtype)  # (N, D)


def gather(values, indices, weights):
    """Read R weighted rows of a table per token: y[t] = sum_r weights[t, r] * values[indices[t, r]] (arXiv 2412.09764, y = s V).

    values (S, D) float32, bfloat16 or float64; indices (N, R) int32 or int64, each in [0, S); weights (N, R), cast to values' dtype
    (float32 if that is bfloat16). Returns (N, D) in values' dtype, summed in at least float32. Differentiable in values and weights,
    and the same bits on every run: no float atomics. Raises ValueError for shapes that do not fit.
    """
    if values.dim() != 2 or indices.dim() != 2 or indices.shape != weights.shape:
        raise ValueError(f"gather wants values (S, D) and indices, weights of one shape (N, R); got values {tuple(values.shape)}, "
                         f"indices {tuple(indices.shape)}, weights {tuple(weights.shape)}")
    weights = weights.to(torch.promote_types(values.dtype, torch.float32))  # (N, R)
    if uses_triton(values.device):
        return torch.ops.nanomemory.gather(values.contiguous(), indices.contiguous(), weights.contiguous())
    if values.device.type == "mps":
        return gather_reference(values, indices, weights)  # embedding_bag has no per-sample weights' gradient there
    return GatherTorch.apply(values, indices, weights)


def group_by_slot(indices, S):
    """Turn "which slots does a token read" into "which tokens read a slot", the shape the gradient of the values needs.

    indices (N, R) -> order (N*R,) the positions n*R + r sorted by slot, equal slots in order of position; starts (S+1,): the lookups
    of slot s are order[starts[s] : starts[s+1]]. Example, N = 2, R = 2, S = 4: indices [[3, 1], [1, 0]] -> order [3, 1, 2, 0]
    (slot 0 is read at position 3, slot 1 at 1 and 2, slot 3 at 0), starts [0, 1, 3, 3, 4].
    """
    slots, order = torch.sort(indices.reshape(-1).int(), stable=True)       # (N*R,), (N*R,): a radix sort, half the bytes as int32
    starts = torch.searchsorted(slots, torch.arange(S + 1, device=slots.device, dtype=slots.dtype))  # (S+1,)
    return order, starts


class GatherTorch(torch.autograd.Function):
    """gather with F.embedding_bag, which never builds the (N, R, D) rows. Its gradient of the table is slower than need
    be; ours is another forward: for slot s, the sum of the output gradients of the tokens that read s, found by group_by_slot."""

    @staticmethod
    def forward(ctx, values, indices, weights):
        ctx.save_for_backward(values, indices, weights)
        return bag(values, indices, weights)                                # (N, D)

    @staticmethod
    def backward(ctx, grad_y):
        values, indices, weights = ctx.saved_tensors
        R, grad_values, grad_weights = indices.shape[1], None, None
        if ctx.needs_input_grad[0]:
            order, starts = group_by_slot(indices, len(values))             # (N*R,), (S+1,)
            grad_values = bag(grad_y, order // R, weights.reshape(-1)[order], starts).to(values.dtype)  # (S, D)
        if ctx.needs_input_grad[2] and indices.numel() == 0:
            grad_weights = torch.zeros_like(weights)                        # (N, R), N or R is 0
        elif ctx.needs_input_grad[2]:                                       # <grad_y[t], values[indices[t, r]]>: embedding_bag's own
            wide, lookups = weights.dtype, torch.arange(indices.numel(), device=indices.device)          # (N*R,)
            grad_weights = torch.ops.aten._embedding_bag_per_sample_weights_backward(
                grad_y.to(wide), values.to(wide), indices.long().reshape(-1), lookups[::R], lookups // R, 0).view_as(weights)  # (N, R)
        return grad_values, None, grad_weights


def bag(values, indices, weights, starts=None):
    """F.embedding_bag in at least float32. indices, weights (N, R), or (N*R,) with bag b = starts[b] : starts[b+1] -> (bags, D)."""
    wide, indices = torch.promote_types(values.dtype, torch.float32), indices.long()
    if len(values) == 0 or indices.numel() == 0:
        return values.new_zeros(len(indices) if starts is None else len(starts) - 1, values.shape[1])
    y = F.embedding_bag(indices, values.to(wide), starts, mode="sum", per_sample_weights=weights.to(wide),
                        include_last_offset=starts is not None)
    return y.to(values.dtype)


if triton is not None:
    @triton.jit
    def gather_kernel(values, indices, weights, y, R, D, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
        """One program: BLOCK_D dims of one token's output. Moves R rows in, one row out. values (S, D), indices, weights (N, R), y (N, D)."""
        t = tl.program_id(0).to(tl.int64)
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)              # (BLOCK_D,)
        total = tl.zeros((BLOCK_D,), tl.float32)                            # (BLOCK_D,)
        for r0 in range(0, R, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)                                  # (BLOCK_R,)
            slot = tl.load(indices + t * R + r, mask=r < R, other=0).to(tl.int64)  # (BLOCK_R,): 64 bits, since S*D may pass 2^31
            w = tl.load(weights + t * R + r, mask=r < R, other=0.0)         # (BLOCK_R,)
            row = tl.load(values + slot[:, None] * D + d[None, :], mask=(r < R)[:, None] & (d < D)[None, :], other=0.0)
            total += tl.sum(w[:, None] * row.to(tl.float32), axis=0)        # (BLOCK_D,)
        tl.store(y + t * D + d, total.to(y.dtype.element_ty), mask=d < D)

    @triton.jit
    def grad_weights_kernel(values, indices, grad_y, grad_w, R, D, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
        """One program: BLOCK_R reads of one token. grad_w[t, r] = <grad_y[t], values[indices[t, r]]>: the rows are read once more."""
        t = tl.program_id(0).to(tl.int64)
        r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)              # (BLOCK_R,)
        slot = tl.load(indices + t * R + r, mask=r < R, other=0).to(tl.int64)  # (BLOCK_R,)
        total = tl.zeros((BLOCK_R,), tl.float32)                            # (BLOCK_R,)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)                                  # (BLOCK_D,)
            g = tl.load(grad_y + t * D + d, mask=d < D, other=0.0).to(tl.float32)  # (BLOCK_D,)
            row = tl.load(values + slot[:, None] * D + d[None, :], mask=(r < R)[:, None] & (d < D)[None, :], other=0.0)
            total += tl.sum(row.to(tl.float32) * g[None, :], axis=1)        # (BLOCK_R,)
        tl.store(grad_w + t * R + r, total, mask=r < R)

    @triton.jit
    def grad_values_kernel(grad_y, weights, order, starts, grad_v, R, D, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr):
        """One program: BLOCK_D dims of one slot's gradient, its lookups (from group_by_slot) summed in order. A slot that nobody read
        costs the store of its zeros. grad_y (N, D), weights (N*R,), order (N*R,), starts (S+1,), grad_v (S, D)."""
        s = tl.program_id(0).to(tl.int64)
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)              # (BLOCK_D,)
        first, last = tl.load(starts + s), tl.load(starts + s + 1)
        total = tl.zeros((BLOCK_D,), tl.float32)                            # (BLOCK_D,)
        for l0 in range(first, last, BLOCK_L):
            l = l0 + tl.arange(0, BLOCK_L)                                  # (BLOCK_L,)
            position = tl.load(order + l, mask=l < last, other=0)           # (BLOCK_L,)
            w = tl.load(weights + position, mask=l < last, other=0.0)       # (BLOCK_L,)
            g = tl.load(grad_y + (position // R)[:, None] * D + d[None, :], mask=(l < last)[:, None] & (d < D)[None, :], other=0.0)
            total += tl.sum(w[:, None] * g.to(tl.float32), axis=0)          # (BLOCK_D,)
        tl.store(grad_v + s * D + d, total.to(grad_v.dtype.element_ty), mask=d < D)


def blocks(R, D):
    """Tile sizes: a power of two that covers D up to 512, and about 4,096 numbers in flight per program."""
    BLOCK_D = min(triton.next_power_of_2(max(D, 1)), 512)
    return min(max(4096 // BLOCK_D, 1), 32, triton.next_power_of_2(max(R, 1))), BLOCK_D


# custom_op makes the kernels one opaque node for torch.compile (no graph break); the fake says only what shape comes out.
@torch.library.custom_op("nanomemory::gather", mutates_args=())
def gather_op(values: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    (N, R), D = indices.shape, values.shape[1]
    y = values.new_empty(N, D)                                              # (N, D)
    if y.numel():
        BLOCK_R, BLOCK_D = blocks(R, D)
        gather_kernel[(N, triton.cdiv(D, BLOCK_D))](values, indices, weights, y, R, D, BLOCK_R, BLOCK_D)
    return y


@torch.library.custom_op("nanomemory::gather_backward", mutates_args=())
def gather_backward_op(grad_y: torch.Tensor, values: torch.Tensor, indices: torch.Tensor,
                       weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    (N, R), (S, D) = indices.shape, values.shape
    grad_v, grad_w = torch.empty_like(values), torch.empty_like(weights)    # (S, D), (N, R)
    if grad_v.numel():
        order, starts = group_by_slot(indices, S)                           # (N*R,), (S+1,)
        BLOCK_L, BLOCK_D = blocks(32, D)
        grad_values_kernel[(S, triton.cdiv(D, BLOCK_D))](grad_y, weights, order, starts, grad_v, R, D, BLOCK_L, BLOCK_D)
    if grad_w.numel():
        BLOCK_R, BLOCK_D = blocks(R, D)
        grad_weights_kernel[(N, triton.cdiv(R, BLOCK_R))](values, indices, grad_y, grad_w, R, D, BLOCK_R, BLOCK_D)
    return grad_v, grad_w


gather_op.register_fake(lambda values, indices, weights: values.new_empty(len(indices), values.shape[1]))
gather_backward_op.register_fake(lambda grad_y, values, indices, weights: (torch.empty_like(values), torch.empty_like(weights)))
gather_op.register_autograd(
    lambda ctx, grad_y: (lambda v, w: (v, None, w))(*gather_backward_op(grad_y.contiguous(), *ctx.saved_tensors)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


# ---------------------------------------------------------------------------------------------------------------------------------
# product-key selection

def candidates(K):
    """The pairs (i, j) that can be among the K largest sums of two sorted lists: (i+1)(j+1) <= K. All (i+1)(j+1) pairs above and left
    of (i, j), itself included, score at least as much. K = 32 leaves 119 of 1,024. Returns (2, M) int64."""
    return torch.tensor([(i, j) for i in range(K) for j in range(K) if (i + 1) * (j + 1) <= K]).T


def topk_indices(scores, K):
    """Indices of the K largest along the last dim, largest first. scores (..., n) float -> (..., K) int64, without gradient.

    On CPUs torch.topk sorts row by row with branches; numpy's sort is vectorised. A float32 written as float64 leaves 29 low bits
    free, so each score carries its index there through the sort: exact, ties to the higher index for scores above zero.
    """
    if scores.device.type != "cpu" or scores.dtype != torch.float32:
        return scores.detach().topk(K, dim=-1).indices
    return torch.ops.nanomemory.topk_cpu(scores.detach(), K)


@torch.library.custom_op("nanomemory::topk_cpu", mutates_args=())
def topk_cpu_op(scores: torch.Tensor, K: int) -> torch.Tensor:
    packed = scores.double().clamp_(-2.0**128, 2.0**128).view(torch.int64)               # (..., n): infinities have no bits free
    packed |= torch.arange(scores.shape[-1])
    packed.view(torch.float64).numpy().sort()
    return packed[..., -K:].flip(-1) & (2**29 - 1)                                       # (..., K), largest first


topk_cpu_op.register_fake(lambda scores, K: scores.new_empty((*scores.shape[:-1], K), dtype=torch.int64))


def topk_sums(scores, K, pairs=None):
    """The K largest of the n*n sums scores[0, ..., i] + scores[1, ..., j], without building them (product keys, arXiv 1907.05242).

    scores (2, ..., n) float -> best (..., K) the sums, largest first, differentiable in the scores; slots (..., K) int64 = i*n + j.
    Exact: ties in any order. pairs: candidates(K) on the scores' device, if at hand. Raises ValueError if K > n.
    """
    n = scores.shape[-1]
    if not 1 <= K <= n:
        raise ValueError(f"K = {K} is not between 1 and the {n} half-keys")
    with torch.no_grad():
        halves = topk_indices(scores, K)                                    # (2, ..., K)
        best = scores.gather(-1, halves)                                    # (2, ..., K), largest first
        pairs = candidates(K).to(scores.device) if pairs is None else pairs  # (2, M)
        pick = topk_indices(best[0].index_select(-1, pairs[0]) + best[1].index_select(-1, pairs[1]), K)  # (..., K) of the M sums
        halves = halves.gather(-1, pairs[:, pick])                          # (2, ..., K)
    return scores.gather(-1, halves).sum(0), halves[0] * n + halves[1]


# ---------------------------------------------------------------------------------------------------------------------------------
# python kernel.py: is it right, and how fast is it?

def check(device, dtype):
    """Compare gather and topk_sums with their definitions on odd shapes; raise AssertionError with the case when they differ."""
    generator = torch.Generator().manual_seed(0)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2  # of the largest number: bfloat16 keeps 8 bits
    for N, R, S, D in ((0, 4, 9, 8), (5, 1, 1, 1), (33, 3, 50, 7), (64, 32, 1000, 100), (17, 128, 300, 768)):
        values = torch.randn(S, D, generator=generator).to(device, dtype).requires_grad_()       # (S, D)
        weights = torch.rand(N, R, generator=generator).to(device).requires_grad_()             # (N, R)
        indices = torch.randint(S, (N, R), generator=generator).to(device)                      # (N, R)
        grad = torch.randn(N, D, generator=generator).to(device, dtype)                         # (N, D)
        want = gather_reference(values.float(), indices, weights)                               # (N, D)
        want = (want, *torch.autograd.grad(want, (values, weights), grad.float()))
        got = gather(values, indices, weights)                                                  # (N, D)
        for name, a, b in zip(("y", "grad of values", "grad of weights"), (got, *torch.autograd.grad(got, (values, weights), grad)), want):
            error = ((a - b).abs().max() / b.abs().max().clamp(min=1e-9)).item() if b.numel() else 0.0
            assert error <= tolerance, f"gather, {name}: off by {error:.1e} at N {N}, R {R}, S {S}, D {D}, {dtype}"
    for n, K in ((1, 1), (7, 7), (64, 16), (128, 32)):
        scores = torch.randn(2, 20, 4, n, generator=generator).to(device)                       # (2, 20, 4, n)
        every = (scores[0][..., :, None] + scores[1][..., None, :]).flatten(-2)                 # (20, 4, n*n)
        best, slots = topk_sums(scores, K)                                                      # (20, 4, K) both
        assert torch.equal(best, every.topk(K).values) and torch.equal(best, every.gather(-1, slots)), f"topk_sums at n {n}, K {K}"


def milliseconds(call, inputs, device, seconds=0.5):
    """Median and quartiles of call(*inputs[i]) in ms; inputs rotate, so that no cache holds the rows from the last time."""
    times, begin, i = [], time.perf_counter(), 0
    while len(times) < 8 or (time.perf_counter() - begin < seconds and len(times) < 200):
        if device == "cuda":
            torch.cuda.synchronize()
        t = time.perf_counter()
        call(*inputs[i % len(inputs)])
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - t))
        i += 1
    low, middle, high = statistics.quantiles(times[3:], n=4)  # the first calls compile and warm up
    return middle, low, high


def measure(S, D, N, R, device, dtype, copy_rate=None):
    """One block of the table, a row per way to gather: forward ms, and forward + backward. Returns [(name, ms, GB/s)]."""
    values = torch.randn(S, D, device=device, dtype=dtype, requires_grad=True)                  # (S, D)
    grad = torch.randn(N, D, device=device, dtype=dtype)                                        # (N, D)
    inputs = [(torch.randint(S, (N, R), device=device), torch.rand(N, R, device=device, requires_grad=True)) for _ in range(4)]
    ways = {"gather (ours)": gather, "F.embedding_bag": lambda v, i, w: F.embedding_bag(i, v, mode="sum", per_sample_weights=w.to(v.dtype)),
            "indexing + einsum": gather_reference}
    if device == "cuda":
        ways["the same, compiled"] = torch.compile(gather_reference)
    moved, rows = (N * R + N) * D * values.element_size() + N * R * 12, []
    for name, way in ways.items():
        def both(i, w):
            values.grad = w.grad = None
            way(values, i, w).backward(grad)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            forward = milliseconds(lambda i, w: way(values, i, w), inputs, device)
        train = milliseconds(both, inputs, device)
        rate = moved / forward[0] / 1e6
        share = f"{100 * rate / copy_rate:5.0f}%" if copy_rate else ""
        peak = f"{torch.cuda.max_memory_allocated() / 2**20:8.0f}" if device == "cuda" else "       -"
        print(f"{name:22s}{forward[0]:9.2f} [{forward[1]:7.2f}, {forward[2]:7.2f}]{rate:9.1f} {share:>6s}{train[0]:10.2f}{peak}", flush=True)
        rows.append((name, forward[0], rate))
    return rows


def main():
    p = argparse.ArgumentParser(description="check the kernels against their definitions, then time them")
    p.add_argument("--plot", action="store_true", help="draw bandwidth over the value dim to assets/kernel.png")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args()
    gpu = args.device == "cuda"
    if gpu and not torch.cuda.is_available():
        sys.exit("kernel.py: --device cuda: no CUDA GPU here, use --device cpu")
    dtypes = (torch.float32, torch.bfloat16) if gpu or not uses_triton("cpu") else (torch.float32,)
    for dtype in dtypes:
        check(args.device, dtype)
    print(f"{describe_backend(args.device)}\nall results agree with their definitions ({', '.join(str(d)[6:] for d in dtypes)})")
    name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    big = [torch.randn(2**28 if gpu else 2**25, device=args.device) for _ in range(2)]          # 1 GiB, or 128 MiB: larger than any cache
    copy_rate = 2 * big[0].nbytes / milliseconds(lambda a, b: a.copy_(b), [big], args.device)[0] / 1e6
    del big
    print(f"{name}, torch {torch.__version__}: a copy moves {copy_rate:.0f} GB/s")
    S, N, R, dims = (2**20, 16384, 128, (256, 768, 1024)) if gpu else (2**16, 1024, 128, (64, 128, 256))
    curves = {}
    for dtype in (torch.float32, torch.bfloat16) if gpu else (torch.float32,):
        for D in dims:
            print(f"\nS = {S}, D = {D}, {N} tokens x {R} reads, {str(dtype)[6:]}\n{'':22s}{'forward ms':>9s} [quartiles]{'GB/s':>13s} {'copy':>6s}"
                  f"{'fwd+bwd ms':>12s}{'peak MiB':>9s}")
            for way, _, rate in measure(S, D, N, R, args.device, dtype, copy_rate):
                curves.setdefault(f"{way}, {str(dtype)[6:]}", []).append(rate)
    scores = [(torch.randn(2, 4, N, 1024 if gpu else 128, device=args.device),) for _ in range(4)]  # (2, H, N, n)
    ours = milliseconds(lambda s: topk_sums(s, 32), scores, args.device)

    def chain(s):
        (a, i), (b, j) = s[0].topk(32), s[1].topk(32)                                           # (H, N, K) each
        return (a[..., :, None] + b[..., None, :]).flatten(-2).topk(32)                         # (H, N, K)
    plain = milliseconds(chain, scores, args.device)
    print(f"\nproduct-key top 32 of {scores[0][0].shape[-1]} x {scores[0][0].shape[-1]}, {4 * N} queries: {ours[0]:.2f} ms, with torch.topk "
          f"{plain[0]:.2f} ms")
    if args.plot:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        fig, ax = plt.subplots(figsize=(7, 4), constrained_layout=True)
        for way, rates in curves.items():
            ax.plot(dims, rates, "o-", label=way)
        ax.axhline(copy_rate, color="gray", ls="--", label="measured copy")
        ax.set(xlabel="value dim D", ylabel="GB/s, forward", title=f"{name}: S = {S}, {N} tokens x {R} reads", ylim=0)
        ax.legend()
        os.makedirs("assets", exist_ok=True)
        fig.savefig("assets/kernel.png", dpi=80)
        print("drawn: assets/kernel.png")


if __name__ == "__main__":
    main()
