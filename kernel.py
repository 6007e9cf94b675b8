"""
The operations a memory layer is made of, in plain torch and in Triton:

    gather      y[t] = sum_r weights[t, r] * values[indices[t, r]]        read R slots of the value table per token
    topk_sums   the K largest of the n*n sums scores[0, i] + scores[1, j]     find those slots from 2n scores
    adamw_      one step of AdamW on a bfloat16 table                          train a table in 10 bytes a value

    python kernel.py            check gather and topk_sums against their definitions, then print a table of ms and GB/s
    python kernel.py --plot     the same, and draw bandwidth over the value dim and the number of slots to assets/kernel.png

A memory layer does two flops for each number it reads: it is bound by memory bandwidth, and everything below is about moving fewer
bytes. Triton kernels run on CUDA, torch and numpy elsewhere. `backend("triton" | "torch" | "auto")` chooses; describe_backend() says
what runs and why.

N tokens · H heads · K slots read per head · R = H*K reads per token · n half-keys per side · S = n*n slots · D value dim
"""
import argparse, ctypes, functools, math, os, statistics, sys, time, warnings

import numpy as np
import torch
import torch.nn.functional as F

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # a * b + c in one instruction: from 3.10 on Triton would not, and 3.9 warns of it
try:
    import triton
    import triton.language as tl
    TRITON_MISSING = None
except ImportError as e:  # Windows, macOS: everything works without it
    triton, TRITON_MISSING = None, f"triton cannot be imported ({e})"

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run on the CPU, slowly, in float32: for tests and for learning
_backend = "auto"
warnings.filterwarnings("ignore", "Sparse (CSR tensor support|invariant checks)")  # are in beta, cost time, says torch


def backend(name=None):
    """Choose what the operations run on: "auto" (Triton on CUDA, torch elsewhere), "triton" or "torch". Returns the choice in force."""
    global _backend
    if name is not None:
        if name not in ("auto", "triton", "torch"):
            raise ValueError(f"backend {name!r} is not one of auto, triton, torch")
        if name == "triton" and (triton is None or not (INTERPRETED or torch.cuda.is_available())):
            raise ValueError(f"backend 'triton' cannot run here: {TRITON_MISSING or 'no CUDA GPU; set TRITON_INTERPRET=1 to interpret it'}")
        _backend = name
    return _backend


def uses_triton(device):
    """Whether the Triton kernels run for tensors on this device."""
    return _backend == "triton" or (_backend == "auto" and triton is not None and torch.device(device).type == "cuda" and not INTERPRETED)


def describe_backend(device):
    """One line for the start of a run: which path the memory's operations take on this device, and why."""
    if uses_triton(device):
        return f"memory: Triton kernels ({'interpreted on the CPU' if INTERPRETED else torch.cuda.get_device_name(device)})"
    why = "chosen by backend()" if _backend == "torch" else TRITON_MISSING or (
        "TRITON_INTERPRET is set" if torch.device(device).type == "cuda" else f"Triton needs a CUDA GPU, this is {device}")
    return f"memory: torch ({why})"


def keep_freed_memory():
    """Linux on a CPU: glibc hands large freed blocks back to the kernel, and every step pays a page fault for each 4 KiB to get them again, which
    can take longer than the work. Tell it to keep them: no blocks apart from the heap, nothing trimmed, one heap for all threads."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *a: None)  # only glibc has it
        for parameter, value in ((-4, 0), (-1, -1), (-8, 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX
            mallopt(parameter, value)


# ---------------------------------------------------------------------------------------------------------------------------------
# gather

def gather_reference(values, indices, weights):
    """The definition: values (S, D), indices (N, R), weights (N, R) -> (N, D), summed in float32 (float64 for float64)."""
    wide = torch.promote_types(values.dtype, torch.float32)
    rows = values[indices].to(wide)                                         # (N, R, D): R times larger than the result
    return torch.einsum("nr,nrd->nd", weights.to(wide), rows).to(values.dtype)  # (N, D)


def gather(values, indices, weights, grad_sum=None):
    """Read R weighted rows of a table per token: y[t] = sum_r weights[t, r] * values[indices[t, r]] (arXiv 2412.09764, y = s V).

    values (S, D) float32, bfloat16 or float64; indices (N, R) int32 or int64, each in [0, S); weights (N, R), cast to values' dtype
    (float32 if that is bfloat16). Returns (N, D) in values' dtype, summed in at least float32. Differentiable in values and weights,
    and the same bits on every run: no float atomics. grad_sum (S, D) float32: the gradient of the values is added to it in place (by Triton
    only in rows that were read), and values itself needs no grad. Raises ValueError for shapes that do not fit.
    """
    if values.dim() != 2 or indices.dim() != 2 or indices.shape != weights.shape or indices.numel() > 2**31 - 2**7:
        raise ValueError(f"gather wants values (S, D) and indices, weights of one shape (N, R), N*R <= 2^31 - 2^7; got values {tuple(values.shape)}, "
                         f"indices {tuple(indices.shape)}, weights {tuple(weights.shape)}")
    weights = weights.to(torch.promote_types(values.dtype, torch.float32))  # (N, R)
    if values.numel() * indices.numel() == 0 or (values.device.type == "mps" and grad_sum is None):  # few operations exist there
        return gather_reference(values, indices, weights)                   # (N, D)
    return torch.ops.nanomemory.gather(values.contiguous(), indices.int().contiguous(), weights.contiguous(), grad_sum)


def group_by_slot(indices, S):
    """Turn "which slots does a token read" into "which tokens read a slot", the order in which gradients are made.

    indices (N, R), each in [0, S) -> slots (N*R,) int16 or int32, sorted; order (N*R,) int32, the positions n*R + r they came from, equal
    slots in order of position. Example, N = 2, R = 2: indices [[3, 1], [1, 0]] -> slots [0, 1, 1, 3], order [3, 1, 2, 0]: slot 0 is read at
    position 3, which is token 3 // R = 1; slot 1 at positions 1 and 2, so its gradient is weights[1] * grad_y[0] + weights[2] * grad_y[1].
    """
    slots, order = torch.sort(indices.reshape(-1).to(torch.int16 if S <= 2**15 else torch.int32), stable=True)  # a radix sort: half the bits, half the work
    return slots, order.int()


def bag(values, indices, weights, starts=None):
    """F.embedding_bag in at least float32. indices, weights (N, R), or (L,) with bag b = starts[b] : starts[b+1] -> (bags, D)."""
    return F.embedding_bag(indices, values.to(weights.dtype), starts, mode="sum", per_sample_weights=weights,
                           include_last_offset=starts is not None)


def gather_backward_torch(grad_y, values, indices, weights):
    """The gradient of the table is another forward: for slot s, the weighted sum of the grad_y of the tokens that read s. That of a
    weight is <grad_y[t], values[indices[t, r]]>: entries of the matrix product grad_y values^T at N*R of its N*S places."""
    (N, R), S = indices.shape, len(values)
    grad_y, values = grad_y.to(weights.dtype), values.to(weights.dtype)     # (N, D), (S, D)
    slots, order = group_by_slot(indices, S)                                # (N*R,) both
    starts = torch._convert_indices_from_coo_to_csr(slots, S, out_int32=True)  # (S+1,): where each slot's lookups begin
    grad_values = bag(grad_y, order // R, weights.view(-1).index_select(0, order), starts)               # (S, D)
    if values.device.type != "cpu" or R > S:  # sampled_addmm wants no more places than the matrix has
        return grad_values, torch.einsum("nd,nrd->nr", grad_y, values[indices])  # (S, D), (N, R)
    places = torch.sparse_csr_tensor(torch.arange(0, N * R + 1, R, dtype=torch.int32), indices.int().view(-1), weights.view(-1), (N, S),
                                     check_invariants=False)                # (N, S), R places in each row; what stands there is not used
    return grad_values, torch.sparse.sampled_addmm(places, grad_y, values.T, beta=0.0).values().view(N, R)  # (S, D), (N, R)


# A Triton kernel is run by many programs at once, each with its own program_id. A program works on whole blocks: tl.arange(0, 256) is 256
# numbers, values + d as many addresses, and tl.load reads them all, but for those that the mask leaves out. Its threads, 32 to a warp, share
# the block. A constexpr is known when the kernel is compiled: block sizes must be, and be powers of two, which is why there are masks.
if triton is not None:
    @triton.jit
    def gather_kernel(values, indices, weights, y, R, D, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
        """One program: BLOCK_D dims of one token's output, BLOCK_R rows in flight. Moves R rows in, one row out: N*R*D numbers in all,
        against 3 N*R*D when the rows are gathered, stored and summed. values (S, D), indices, weights (N, R), y (N, D)."""
        t = tl.program_id(0).to(tl.int64)
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)              # (BLOCK_D,)
        total = tl.zeros((BLOCK_D,), tl.float32)                            # (BLOCK_D,)
        for r0 in range(0, R, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)                                  # (BLOCK_R,)
            slot = tl.load(indices + t * R + r, mask=r < R, other=0).to(tl.int64)  # (BLOCK_R,): 64 bits, since S*D may pass 2^31
            w = tl.load(weights + t * R + r, mask=r < R, other=0.0)         # (BLOCK_R,)
            row = tl.load(values + slot[:, None] * D + d[None, :], mask=(r < R)[:, None] & (d < D)[None, :], other=0.0)  # (BLOCK_R, BLOCK_D)
            total += tl.sum(w[:, None] * row.to(tl.float32), axis=0)        # (BLOCK_D,): from D = 256 on, each thread sums its own dims
        tl.store(y + t * D + d, total.to(y.dtype.element_ty), mask=d < D)

    @triton.jit
    def gather_backward_kernel(grad_y, values, weights, slots, order, tokens, grad_w, grad_sum, edges, edge_slots, L, D,
                               CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, FIRST: tl.constexpr):
        """One program, one warp: BLOCK_D dims of CHUNK lookups in order of slot, one after another, for both gradients. A slot's row of
        values comes from memory once for all its lookups, grad_y (small) from the cache; a slot no one reads costs nothing, one that
        everyone reads is many programs' work. Sums of slots that lie whole in the chunk are added to grad_sum; the first and the last may
        go on in a neighbour, so their parts go to edges: lookups again, 2 for each program, in order and of weight 1, for the next round
        (not FIRST). grad_y (N, D), values (S, D), weights, slots, order, tokens (L,), grad_w (D blocks, L), grad_sum (S, D), edges
        (2 * programs, D), edge_slots (2 * programs,)."""
        p, block = tl.program_id(0), tl.program_id(1)
        # 4 dims a thread, 16 bytes of float32, in values and grad_y alike: nothing is sent from thread to thread
        d = block * BLOCK_D + tl.max_contiguous(tl.arange(0, BLOCK_D), 4)   # (BLOCK_D,)
        begin, end = p * CHUNK, tl.minimum(p * CHUNK + CHUNK, L)
        head = tl.load(slots + begin - 1, mask=p > 0, other=-1)             # the slot that may have begun in the program before
        tail = tl.load(slots + end, mask=end < L, other=-1)                 # the slot that may go on in the next
        slot, total = tl.load(slots + begin), tl.zeros((BLOCK_D,), tl.float32)  # (), (BLOCK_D,): the sum of the slot's lookups so far
        edge_row = edges + (2 * p).to(tl.int64) * D + d                     # (BLOCK_D,): the head's; the tail's is D further on
        if block == 0:
            tl.store(edge_slots + 2 * p, slot)
            tl.store(edge_slots + 2 * p + 1, tl.load(slots + end - 1))
        for i in range(end - begin):
            l = begin + i                                                   # all loads first: while one waits for memory, the others do
            at, following = slot.to(tl.int64) * D + d, tl.load(slots + l + 1, mask=l + 1 < end, other=-1)        # (BLOCK_D,), ()
            if FIRST:
                position, token = tl.load(order + l), tl.load(tokens + l)
                v, w = tl.load(values + at, mask=d < D, other=0.0).to(tl.float32), tl.load(weights + position)    # (BLOCK_D,), ()
            else:
                w, token = 1.0, l
            g = tl.load(grad_y + token.to(tl.int64) * D + d, mask=d < D, other=0.0).to(tl.float32)                # (BLOCK_D,)
            before = tl.load(grad_sum + at, mask=d < tl.where(following != slot, D, 0), other=0.0)                 # (BLOCK_D,)
            total += w * g                                                  # (BLOCK_D,)
            if FIRST:
                tl.store(grad_w + block.to(tl.int64) * L + position, tl.sum(g * v))
            if following != slot:
                if slot == head:
                    tl.store(edge_row, total, mask=d < D)
                elif slot == tail:
                    tl.store(edge_row + D, total, mask=d < D)
                else:
                    tl.store(grad_sum + at, before + total, mask=d < D)
                slot, total = following, tl.zeros((BLOCK_D,), tl.float32)   # (), (BLOCK_D,)


def tile(D):
    """Rows, dims and warps of a tile. A thread reads 8 numbers of a row: 16 bytes of bfloat16. D & -D is the largest power of two that
    divides D: with so many dims a tile, none is masked."""
    block_d = min(max(D & -D, 256), triton.next_power_of_2(D), 1024)
    return max(2048 // block_d, 4), block_d, max(block_d // 256, 1)


def gather_backward_triton(grad_y, values, indices, weights, grad_sum, chunk=128):
    """Adds the values' gradient to grad_sum (S, D) float32; returns that of the weights (N, R). chunk >= 4, so that each round is shorter."""
    (N, R), D = indices.shape, values.shape[1]
    slots, order = group_by_slot(indices, len(values))                      # (L,), (L,), L = N * R
    slots, tokens = slots.int(), order // R                                 # (L,) both
    block_d, first = min(tile(D)[1], 256), True
    grad_w = weights.new_empty(triton.cdiv(D, block_d), N, R)               # (D blocks, N, R)
    while True:  # lookups, then the edges of their chunks, then the edges of those, ...
        L, programs = len(slots), triton.cdiv(len(slots), chunk)
        edges, edge_slots = weights.new_zeros(2 * programs, D), slots.new_empty(2 * programs)     # (2 * programs, D), (2 * programs,)
        gather_backward_kernel[(programs, len(grad_w))](grad_y, values, weights, slots, order, tokens, grad_w, grad_sum, edges, edge_slots, L, D,
                                                   chunk, block_d, first, num_warps=1)
        if programs == 1:
            return grad_w.sum(0)                                            # (N, R)
        grad_y, slots, first, chunk = edges, edge_slots, False, min(chunk, 16)  # few are left: in short chunks they take many programs


# custom_op makes each operation one opaque node for torch.compile (no graph break); the fake says only what shape comes out.
@torch.library.custom_op("nanomemory::gather", mutates_args=())
def gather_op(values: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, grad_sum: torch.Tensor | None) -> torch.Tensor:
    if uses_triton(values.device) and values.dtype != torch.float64:
        (N, R), D = indices.shape, values.shape[1]
        y, (rows, block_d, warps) = values.new_empty(N, D), tile(D)         # (N, D)
        gather_kernel[(N, triton.cdiv(D, block_d))](values, indices, weights, y, R, D, min(rows, triton.next_power_of_2(R)), block_d,
                                                    num_warps=warps)
        return y
    if values.dtype == torch.bfloat16 and indices.numel() < len(values):
        return gather_reference(values, indices, weights)  # a few rows: do not widen the whole table for them
    return bag(values, indices, weights).to(values.dtype)


@torch.library.custom_op("nanomemory::gather_backward", mutates_args=("grad_sum",))
def gather_backward_op(grad_y: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor,
                       grad_sum: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """-> the gradient of the values (S, D), empty if it was added to grad_sum; that of the weights (N, R)."""
    if uses_triton(values.device) and values.dtype != torch.float64:
        total = torch.zeros_like(values, dtype=torch.float32) if grad_sum is None else grad_sum                       # (S, D)
        grad_w = gather_backward_triton(grad_y, values, indices, weights, total)                                      # (N, R)
    else:
        total, grad_w = gather_backward_torch(grad_y, values, indices, weights)                                       # (S, D), (N, R)
        if grad_sum is not None:
            grad_sum += total
    return total.to(values.dtype) if grad_sum is None else values.new_empty(0), grad_w


def gather_autograd(ctx, grad_y):
    grad_v, grad_w = gather_backward_op(grad_y.contiguous(), *ctx.saved_tensors, ctx.grad_sum)
    return grad_v if ctx.grad_sum is None else None, None, grad_w, None


def gather_save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.grad_sum = inputs[3]  # not among the saved: it is to be written


gather_op.register_fake(lambda values, indices, weights, grad_sum: values.new_empty(len(indices), values.shape[1]))
gather_backward_op.register_fake(lambda grad_y, values, indices, weights, grad_sum: (
    torch.empty_like(values) if grad_sum is None else values.new_empty(0), torch.empty_like(weights)))
gather_op.register_autograd(gather_autograd, setup_context=gather_save)


# ---------------------------------------------------------------------------------------------------------------------------------
# product-key selection

@functools.cache
def candidates(K, device="cpu"):
    """The pairs (i, j) that can be among the K largest sums of two sorted lists: (i+1)(j+1) <= K. All (i+1)(j+1) pairs above and left
    of (i, j), itself included, score at least as much. K = 32 leaves 119 of 1,024. Returns (2, M) int64."""
    return torch.tensor([(i, j) for i in range(K) for j in range(K) if (i + 1) * (j + 1) <= K], device=device).T.contiguous()


def topk_sums_reference(scores, K):
    """The method with torch.topk: the K best of each half, the sums of their candidate pairs, the K best of those."""
    n, (first, second) = scores.shape[-1], candidates(K, scores.device)     # (M,), (M,)
    best, halves = scores.topk(K, dim=-1)                                   # (2, ..., K) both
    best = best.to(torch.promote_types(scores.dtype, torch.float32))        # (2, ..., K)
    sums, pick = (best[0][..., first] + best[1][..., second]).topk(K, dim=-1)  # (..., K) both, of the M sums
    slots = halves[0].gather(-1, first[pick]) * n + halves[1].gather(-1, second[pick])  # (..., K)
    return sums, slots.int()


def topk_sums_cpu(scores, K):
    """The method by sorts. A complex number is two float32: index + 1j * score. Read as one float64 it sorts by its high half, the score,
    and takes the index along; numpy sorts float64 in vectors, where torch.topk branches at each number. The sum of two is what is wanted
    of a pair: i*n + j, and the sum of the scores. scores (2, ..., n) float32, n*n <= 2^24 -> (..., K) float32, (..., K) int32."""
    n = scores.shape[-1]
    index = torch.arange(n, dtype=torch.float32) * torch.tensor([[[n]], [[1]]])                  # (2, 1, n): i*n, j
    words = torch.complex(index, scores.reshape(2, -1, n))                  # (2, rows, n)
    if n > 256:  # the best K of each 256, then of those
        words = words.view(2, -1, n // 256, 256)                            # (2, rows, n / 256, 256)
        words.numpy().view(np.float64).sort()
        words = words[..., -K:].flatten(2)                                  # (2, rows, min(K, 256) n / 256)
    words.numpy().view(np.float64).sort()
    a, b = words[..., -K:]                                                  # (rows, K) both, largest last: rank i is column ~i
    # the pairs of candidates(K), block by block: ..., (i, i+1), (i, i) and ..., (i+2, i), (i+1, i)
    words, end = a.new_empty(len(a), candidates(K).shape[1]), 0             # (rows, M)
    for i in range(math.isqrt(K)):
        for x, y in (a[:, ~i, None], b[:, K - K // (i + 1):K - i]), (a[:, K - K // (i + 1):~i], b[:, ~i, None]):
            begin, end = end, end + x.shape[1] * y.shape[1]
            torch.add(x, y, out=words[:, begin:end])                        # (rows, end - begin)
    words.numpy().view(np.float64).sort()
    top = words[:, -K:].flip(-1).view(*scores.shape[1:-1], K)               # (..., K), largest first
    best, slots = top.imag.contiguous(), top.real.int()                     # (..., K) both
    # torch multiplies what it adds by 1 + 0j: 0 times an infinite score spoils the index
    return (best, slots) if best.sum().isfinite() else topk_sums_reference(scores, K)


if triton is not None:
    @triton.jit
    def turn(bits):
        return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)                  # floats as integers: negative ones count backwards

    @triton.jit
    def pack(score, index, mask):
        """An integer that sorts as score does and carries index; below all others where mask is false. 64 bits; 32 if score is bfloat16:
        the lower half of its float32 is free, and half the bits are half the work."""
        bits = turn(score.to(tl.float32).to(tl.int32, bitcast=True))
        if score.dtype == tl.bfloat16:
            word = tl.where(mask, (bits & -65536) | index, -2147483648)     # -65536 is 0xFFFF0000
        else:
            word = tl.where(mask, (bits.to(tl.int64) << 32) | index.to(tl.int64), -9223372036854775808)
        return word

    @triton.jit
    def unpack(word):
        if word.dtype == tl.int32:
            bits, index = turn(word) & -65536, word & 0xFFFF
        else:
            bits, index = turn((word >> 32).to(tl.int32)), (word & 0x7FFFFFFF).to(tl.int32)
        return bits.to(tl.float32, bitcast=True), index

    @triton.jit
    def topk_sums_kernel(scores, pairs, best, slots, rows, n, K, M, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr):
        """One program: one query, all in registers. Reads its 2n scores, writes K sums and slots; the K*K grid and the sorted halves
        never reach memory. scores (2, rows, n), pairs (2, M), best, slots (rows, K)."""
        query = tl.program_id(0).to(tl.int64)
        i, m, k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)             # (BLOCK_N,), (BLOCK_M,), (BLOCK_K,)
        b, bi = tl.zeros((BLOCK_K,), tl.float32), tl.zeros((BLOCK_K,), tl.int32)                  # (BLOCK_K,) both
        a, ai = b, bi                                                       # (BLOCK_K,) both
        for side in range(2):  # a loop, so that there is but one copy of this code: sorting takes thousands of instructions
            half = tl.load(scores + (side * rows + query) * n + i, mask=i < n, other=0.0)         # (BLOCK_N,)
            a, ai = b, bi                                                   # (BLOCK_K,) both
            b, bi = unpack(tl.topk(pack(half, i, i < n), BLOCK_K))          # (BLOCK_K,) both, largest first
        first = tl.load(pairs + m, mask=m < M, other=0).to(tl.int32)        # (BLOCK_M,)
        second = tl.load(pairs + M + m, mask=m < M, other=0).to(tl.int32)   # (BLOCK_M,)
        total = tl.gather(a, first, 0) + tl.gather(b, second, 0)            # (BLOCK_M,)
        slot = tl.gather(ai, first, 0) * n + tl.gather(bi, second, 0)       # (BLOCK_M,)
        total, slot = unpack(tl.topk(pack(total, slot, m < M), BLOCK_K))    # (BLOCK_K,) both
        tl.store(best + query * K + k, total, mask=k < K)
        tl.store(slots + query * K + k, slot, mask=k < K)

    @triton.jit
    def topk_sums_backward_kernel(grad, slots, grad_scores, rows, n, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr):
        """One program: the gradient of one half's n scores for one query. Each of the K winners sums up the shares of all winners with its
        half-key and writes that over zeros. They sum in one order, so all who write to one place write the same bits: no atomics.
        grad, slots (rows, K), grad_scores (2, rows, n)."""
        query, side, i, k = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
        divisor = tl.where(side == 0, n, 1)                                 # slot = i * n + j: its half-key is slot // n, or slot % n
        half = tl.load(slots + query * K + k, mask=k < K, other=0).to(tl.int32) // divisor % n          # (BLOCK_K,)
        total = tl.zeros((BLOCK_K,), tl.float32)                            # (BLOCK_K,)
        for j0 in range(0, K, BLOCK_J):
            j = j0 + tl.arange(0, BLOCK_J)                                  # (BLOCK_J,)
            share = tl.load(grad + query * K + j, mask=j < K, other=0.0)    # (BLOCK_J,)
            other = tl.load(slots + query * K + j, mask=j < K, other=0).to(tl.int32) // divisor % n     # (BLOCK_J,)
            total += tl.sum(tl.where(other[:, None] == half[None, :], share[:, None], 0.0), axis=0)     # (BLOCK_K,)
        grad_scores += (side * rows + query) * n
        tl.store(grad_scores + i, tl.zeros((BLOCK_N,), grad_scores.dtype.element_ty), mask=i < n)
        tl.debug_barrier()  # the zeros first
        tl.store(grad_scores + half, total.to(grad_scores.dtype.element_ty), mask=k < K)


@torch.library.custom_op("nanomemory::topk_sums", mutates_args=())
def topk_sums_op(scores: torch.Tensor, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    n = scores.shape[-1]
    if uses_triton(scores.device) and scores.dtype != torch.float64:
        rows, pairs = scores.numel() // (2 * n), candidates(K, scores.device)
        best = scores.new_empty(*scores.shape[1:-1], K, dtype=torch.float32)                             # (..., K)
        slots = torch.empty_like(best, dtype=torch.int32)                                                # (..., K)
        if rows:
            topk_sums_kernel[(rows,)](scores.contiguous(), pairs, best, slots, rows, n, K, pairs.shape[1],
                                      *(max(triton.next_power_of_2(x), 2) for x in (n, K, pairs.shape[1])),  # 2: Triton 3.6 sorts no single one
                                      num_warps=min(max(n // (1024 if scores.dtype == torch.bfloat16 else 512), 1), 8))
        return best, slots
    if scores.device.type == "cpu" and scores.dtype == torch.float32 and (n <= 256 or n in (512, 768, 1024)):
        return topk_sums_cpu(scores, K)  # for more half-keys torch's selection is as fast
    return topk_sums_reference(scores, K)


@torch.library.custom_op("nanomemory::topk_sums_backward", mutates_args=())
def topk_sums_backward_op(grad: torch.Tensor, slots: torch.Tensor, n: int, dtype: torch.dtype) -> torch.Tensor:
    K, rows = slots.shape[-1], slots.numel() // slots.shape[-1]
    if uses_triton(grad.device) and grad.dtype != torch.float64:
        grad_scores = grad.new_empty(2, *slots.shape[:-1], n, dtype=dtype)                               # (2, ..., n)
        if rows:
            block_k = triton.next_power_of_2(K)
            topk_sums_backward_kernel[(rows, 2)](grad.contiguous(), slots, grad_scores, rows, n, K, triton.next_power_of_2(n), block_k,
                                                 min(block_k, max(1024 // block_k, 1)), num_warps=1)
        return grad_scores
    left = slots // n                                                       # (..., K)
    halves = torch.stack((left, slots - n * left))                          # (2, ..., K)
    return grad.new_zeros(2, *slots.shape[:-1], n).scatter_add_(-1, halves, grad.expand_as(halves)).to(dtype)  # (2, ..., n)


def topk_sums_save(ctx, inputs, output):
    ctx.save_for_backward(output[1])
    ctx.n, ctx.dtype = inputs[0].shape[-1], inputs[0].dtype
    ctx.mark_non_differentiable(output[1])


topk_sums_op.register_fake(lambda scores, K: (
    scores.new_empty(*scores.shape[1:-1], K, dtype=torch.promote_types(scores.dtype, torch.float32)),
    scores.new_empty(*scores.shape[1:-1], K, dtype=torch.int32)))
topk_sums_backward_op.register_fake(lambda grad, slots, n, dtype: grad.new_empty(2, *slots.shape[:-1], n, dtype=dtype))
topk_sums_op.register_autograd(lambda ctx, grad, _: (topk_sums_backward_op(grad, *ctx.saved_tensors, ctx.n, ctx.dtype), None),
                               setup_context=topk_sums_save)


def topk_sums(scores, K):
    """The K largest of the n*n sums scores[0, ..., i] + scores[1, ..., j], without building them (product keys, arXiv 1907.05242).

    scores (2, ..., n) float -> best (..., K) the sums, largest first, in at least float32, differentiable in the scores; slots (..., K)
    int32 = i*n + j. Exact: ties in any order. n*n < 2^31. Raises ValueError if K > n.
    """
    if not 1 <= K <= scores.shape[-1]:
        raise ValueError(f"K = {K} is not between 1 and the {scores.shape[-1]} half-keys")
    return torch.ops.nanomemory.topk_sums(scores, K)


# ---------------------------------------------------------------------------------------------------------------------------------
# the table's optimizer step

def round_randomly(x, noise):
    """float32 -> bfloat16, up or down with the probabilities that keep the mean: add 16 random bits to those that will be cut off.
    To the nearest, an update below 1/512 of a number would be lost every time. x float32, noise int32 in [0, 2^16). NaN stays NaN."""
    return (x.view(torch.int32) + noise).bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16).masked_fill_(x.isnan(), torch.nan)


def adamw_(values, grad_sum, m, v, step, lr, beta1, beta2, scale=1.0, eps=1e-8, columns=None):
    """One step of AdamW without decay (arXiv 1711.05101) on a bfloat16 table, in place; grad_sum is zeroed on the way.

    values, m, v (S, W) bfloat16, rounded randomly, seeded by step (1, 2, ...); grad_sum (S, W) float32, multiplied by scale, a number
    or a scalar tensor. columns = (first, D): the W columns are first, first + 1, ... of a table (S, D), and are rounded as they would be
    there; default (0, W). Bytes a value: 2 + 2 + 2 + 4 held; 10 read, 10 written. AdamW in float32: 16 held, 16 read, 12 written, and
    the gradient made, 4 more.
    """
    (S, W), (first, D) = values.shape, columns or (0, values.shape[1])
    scale = scale if torch.is_tensor(scale) else torch.full((), scale, dtype=torch.float32, device=values.device)  # (): made there, no one waits
    if uses_triton(values.device):
        block_s, block_w = max(1024 // triton.next_power_of_2(W), 1), min(triton.next_power_of_2(W), 1024)
        adamw_kernel[(triton.cdiv(S, block_s), triton.cdiv(W, block_w))](
            *(x.view(torch.int16) for x in (values, m, v)), grad_sum, scale, S, W, first, D, lr / (1 - beta1**step), beta1, beta2,
            (1 - beta2**step) ** -0.5, eps, step, block_s, block_w)
        return
    generator = torch.Generator(values.device).manual_seed(step)
    for p, g, m, v in zip(*(x.split(max(2**20 // D, 1)) for x in (values, grad_sum, m, v))):  # some rows at a time
        g32, bits = g * scale, torch.randint(2**48, (len(g), D), device=g.device, generator=generator)[:, first:first + W]  # (rows, W)
        m32, v32 = m.float().lerp_(g32, 1 - beta1), v.float().lerp_(g32.square(), 1 - beta2)
        p32 = p.float().addcdiv_(m32, (v32 / (1 - beta2**step)).sqrt_().add_(eps), value=-lr / (1 - beta1**step))
        for i, (x, x32) in enumerate(((p, p32), (m, m32), (v, v32))):
            x.copy_(round_randomly(x32, (bits >> 16 * i).bitwise_and_(2**16 - 1).int()))
        g.zero_()


if triton is not None:
    @triton.jit
    def widen(bits):
        return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)

    @triton.jit
    def narrow(x, noise):
        bits = ((x.to(tl.int32, bitcast=True) + (noise & 0xFFFF).to(tl.int32)) >> 16).to(tl.int16)
        return tl.where(x == x, bits, 0x7FC0).to(tl.int16)                  # a GPU's NaN is all ones, and one more would make it a zero

    @triton.jit(do_not_specialize=["seed"])  # or steps 1 and 16 would be compiled for themselves
    def adamw_kernel(values, m, v, grad_sum, scale, S, W, first, D, rate, beta1, beta2, correct, eps, seed,
                     BLOCK_S: tl.constexpr, BLOCK_W: tl.constexpr):
        """One program: a tile of the table. values, m, v (S, W) bfloat16 as int16, grad_sum (S, W) float32, scale (). rate, correct: lr and
        sqrt(v) are multiplied with what corrects the moments' start at zero. 7 rounds of Philox are random enough (Salmon et al. 2011)."""
        s = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)  # (BLOCK_S,)
        d = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)              # (BLOCK_W,)
        i, here = s[:, None] * W + d[None, :], (s < S)[:, None] & (d < W)[None, :]  # (BLOCK_S, BLOCK_W) both, as all below
        g = tl.load(grad_sum + i, mask=here, other=0.0) * tl.load(scale)
        m32 = widen(tl.load(m + i, mask=here, other=0))
        v32 = widen(tl.load(v + i, mask=here, other=0))
        m32 += (1 - beta1) * (g - m32)
        v32 += (1 - beta2) * (g * g - v32)
        p32 = widen(tl.load(values + i, mask=here, other=0)) - rate * m32 / (tl.sqrt(v32) * correct + eps)
        r0, r1, r2, _ = tl.randint4x(seed, s[:, None] * D + (first + d)[None, :], n_rounds=7)  # by the place in the whole table
        tl.store(values + i, narrow(p32, r0), mask=here)
        tl.store(m + i, narrow(m32, r1), mask=here)
        tl.store(v + i, narrow(v32, r2), mask=here)
        tl.store(grad_sum + i, tl.zeros((BLOCK_S, BLOCK_W), tl.float32), mask=here)


# ---------------------------------------------------------------------------------------------------------------------------------
# python kernel.py: is it right, and how fast is it?

def check(device, dtype):
    """Compare gather and topk_sums with their definitions on odd shapes; raise AssertionError with the case when they differ."""
    generator = torch.Generator().manual_seed(0)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2  # of the largest number: bfloat16 keeps 8 bits
    for N, R, S, D in ((0, 4, 9, 8), (5, 1, 1, 1), (33, 3, 50, 7), (64, 32, 1000, 100), (17, 128, 300, 768), (9, 16, 500, 512),
                       (9, 128, 500, 1024), (300, 8, 3, 64)):
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
    for n, K in ((1, 1), (7, 7), (64, 16), (128, 32), (1024, 32)):
        scores = torch.randn(2, 20, 4, n, generator=generator).to(device, dtype)                # (2, 20, 4, n)
        every = (scores[0].float()[..., :, None] + scores[1].float()[..., None, :]).flatten(-2)  # (20, 4, n*n)
        best, slots = topk_sums(scores, K)                                                      # (20, 4, K) both
        assert torch.equal(best, every.topk(K).values) and torch.equal(best, every.gather(-1, slots)), f"topk_sums at n {n}, K {K}"


def milliseconds(call, inputs=((),), before=lambda: None, seconds=0.5):
    """Quartiles of call(*inputs[i]) in ms, the second is the median; inputs rotate, so that no cache holds what the last call read. before() is called
    ahead of each, untimed. A GPU is timed by its own clock, after two ms of nothing in which the CPU can get ahead of it."""
    times, begin, gpu = [], time.perf_counter(), torch.cuda.is_available()
    started, done = (torch.cuda.Event(enable_timing=True) for _ in range(2)) if gpu else (None, None)
    while len(times) < 8 or (time.perf_counter() - begin < seconds and len(times) < 200):
        begin = begin if len(times) > 3 else time.perf_counter()  # the first three compile and warm up
        before()
        if gpu:
            torch.cuda._sleep(2**22)  # cycles
            started.record()
        t = time.perf_counter()
        call(*inputs[len(times) % len(inputs)])
        if gpu:
            done.record()
            done.synchronize()
        times.append(started.elapsed_time(done) if gpu else 1e3 * (time.perf_counter() - t))
    return statistics.quantiles(times[3:], n=4)


def time_row(name, call, moved, copy_rate, **more):
    """Time one way to do it and print a line of the table. moved: the bytes it has to move at least. Returns its GB/s."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    low, middle, high = milliseconds(call, **more)
    rate = moved / middle / 1e6
    peak = f"{torch.cuda.max_memory_allocated() / 2**20:9.0f}" if torch.cuda.is_available() else "        -"
    print(f"  {name:50s}{middle:9.2f} [{low:7.2f}, {high:7.2f}]{rate:8.1f}{100 * rate / copy_rate:6.0f}%{peak}", flush=True)
    return rate


def measure(S, D, N, R, device, dtype, copy_rate, hot=False):
    """The gather, forward and with its backward, every way there is. hot: a tenth of all reads hit one slot. Returns {way: forward GB/s}."""
    print(f"gather, S = {S}, D = {D}, {N} tokens x {R} reads, {str(dtype)[6:]}{', a tenth of them of one slot' if hot else ''}")
    values = torch.randn(S, D, device=device, dtype=dtype)                                      # (S, D)
    grad, inputs = torch.randn(N, D, device=device, dtype=dtype), []                            # (N, D)
    for _ in range(4):
        indices = torch.randint(S, (N, R), device=device, dtype=torch.int32)                    # (N, R), as topk_sums gives them
        inputs.append((torch.where(torch.rand(N, R, device=device) < 0.1, 0, indices) if hot else indices,
                       torch.rand(N, R, device=device, requires_grad=True)))                    # (N, R) both
    ways = {"ours": gather, "F.embedding_bag": lambda v, i, w: F.embedding_bag(i, v, mode="sum", per_sample_weights=w.to(v.dtype)),
            "indexing + einsum": gather_reference}
    if device == "cuda":
        torch._dynamo.reset()  # for these sizes alone
        ways["indexing + einsum, compiled"] = torch.compile(gather_reference, dynamic=False)
    number, lookups = values.element_size(), N * R
    forward = (lookups + N) * D * number + lookups * 8               # rows, the result, an index and a weight for each
    # the rows that are read at least once, their gradient, grad_y, what sorting leaves, grad_w
    backward = len(inputs[0][0].unique()) * D * (number + 4) + N * D * number + lookups * (8 + 8 + 4)
    with torch.no_grad():
        rates = {name: time_row(f"{name}, forward", lambda i, w: way(values, i, w), forward, copy_rate, inputs=inputs) for name, way in ways.items()}
    total, values.requires_grad = torch.randn(S, D, device=device), True                        # (S, D)
    ways["ours, gradient added in place"] = lambda v, i, w: gather(v.detach(), i, w, total)
    for name, way in ways.items():
        def both(i, w):
            values.grad = w.grad = None
            way(values, i, w).backward(grad)
        time_row(f"{name}, forward + backward", both, forward + backward, copy_rate, inputs=inputs)
    return rates


def main():
    p = argparse.ArgumentParser(description="check the kernels against their definitions, then time them")
    p.add_argument("--plot", action="store_true", help="draw bandwidth over the value dim and the slots to assets/kernel.png")
    args, gpu = p.parse_args(), torch.cuda.is_available()
    device, dtypes = "cuda" if gpu else "cpu", (torch.float32, torch.bfloat16)
    keep_freed_memory()  # as train.py does
    for dtype in dtypes:
        check(device, dtype)
    print(f"{describe_backend(device)}\ngather and topk_sums agree with their definitions ({', '.join(str(d)[6:] for d in dtypes)})")
    name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    numbers = 2**28 if gpu else 2**25                                       # 1 GiB, or 128 MiB: larger than any cache
    copy_rate = 8 * numbers / milliseconds(lambda a, b: a.copy_(b), [torch.randn(2, numbers, device=device)])[1] / 1e6
    print(f"{name}, torch {torch.__version__}: a copy moves {copy_rate:.0f} GB/s\n\n{'':52s}{'ms':>9s} [quartiles]{'GB/s':>15s} {'copy':>6s}{'peak MiB':>9s}")
    N, R, dims, sizes = (16384, 128, (256, 768, 1024), (2**16, 2**20, 2**22)) if gpu else (1024, 128, (64, 128, 512), (2**14, 2**16, 2**18))
    curves = {}
    for dtype in dtypes if gpu else dtypes[:1]:
        gathers = [(sizes[1], D, False) for D in dims] + [(sizes[1], dims[-1], True)] + [(S, dims[-1], False) for S in sizes]
        for S, D, hot in dict.fromkeys(gathers):
            for way, rate in measure(S, D, N, R, device, dtype, copy_rate, hot).items():
                if not hot:
                    curves.setdefault(f"{way}, {str(dtype)[6:]}", {})[S, D] = rate
    for n, dtype in [(n, dtype) for dtype in (dtypes if gpu else dtypes[:1]) for n in (128, 256, 1024)]:
        scores = [(torch.randn(2, 4, N, n, device=device, dtype=dtype),) for _ in range(4)]     # (2, H, N, n)
        moved = scores[0][0].nbytes + 4 * N * 32 * 8
        print(f"product-key top 32 of {n} x {n}, {4 * N} queries, {str(dtype)[6:]}")
        time_row("ours", lambda s: topk_sums(s, 32), moved, copy_rate, inputs=scores)
        time_row("torch.topk", lambda s: topk_sums_reference(s, 32), moved, copy_rate, inputs=scores)
    S, D = sizes[1], dims[1]
    values, grad, m, v = (torch.randn(S, D, device=device) for _ in range(4))                   # (S, D) each
    print(f"AdamW on a table of {S} x {D}")
    values.grad = grad
    time_row("torch.optim, float32, fused", torch.optim.AdamW([values], fused=True).step, 28 * S * D, copy_rate)
    rows = torch.randint(S, (N * R,), device=device).unique()                                   # those that a step reads
    values.grad = torch.sparse_coo_tensor(rows[None], grad[rows], (S, D), is_coalesced=True)
    time_row(f"torch.optim.SparseAdam, the {len(rows) / S:.0%} of rows read", torch.optim.SparseAdam([values]).step, 28 * len(rows) * D, copy_rate)
    p, m, v = values.bfloat16(), m.bfloat16(), v.abs().bfloat16()
    time_row("ours, bfloat16, rounded randomly", lambda: adamw_(p, grad, m, v, 10, 1e-3, 0.9, 0.99), 20 * S * D, copy_rate, before=grad.normal_)
    if args.plot:
        from matplotlib.figure import Figure
        fig = Figure(figsize=(11, 4), layout="constrained")
        axes = fig.subplots(1, 2, sharey=True)
        for ax, xs, at, xlabel in ((axes[0], dims, lambda D: (sizes[1], D), f"value dim D, {sizes[1]} slots"),
                                   (axes[1], sizes, lambda S: (S, dims[-1]), f"slots S, value dim {dims[-1]}")):
            for way, rates in curves.items():
                ax.plot(xs, [rates[at(x)] for x in xs], "o-", label=way)
            ax.axhline(copy_rate, color="gray", ls="--", label="measured copy: the limit of memory")
            ax.set(xlabel=xlabel, ylabel="GB/s, forward", title=f"{name}: {N} tokens x {R} reads", ylim=0)
            ax.set_xscale("log", base=2)
        axes[0].legend(fontsize=8)
        fig.savefig("assets/kernel.png", dpi=80)
        print("drawn: assets/kernel.png")


if __name__ == "__main__":
    main()
