"""
The two operations that a memory layer is made of:

    gather      y[t] = sum_r weights[t, r] * values[indices[t, r]]
                read R weighted rows of a table for each token
    topk_sums   the K largest of the n*n sums scores[0, i] + scores[1, j]
                find which rows to read, from 2n scores

The definitions come first. You may stop reading after them: the rest does the same, faster. Torch
versions are for CPUs, Triton kernels for GPUs, and the tests hold each to its definition.

Moving bytes takes the time here, since there are only two FLOPs for each number that is read. So
the faster versions differ from the definitions in what they do not write to memory.

N tokens · R reads per token · L = N*R lookups in all · S slots (rows of the table), D dims each
n half-keys per side: slot i*n + j stands for half-key i of the left side and j of the right
K slots to select out of n*n · M candidate pairs of half-keys
"""
import functools
import os
import warnings

import numpy as np
import torch
import torch.nn.functional as F

# Multiply and add in one instruction. Triton 3.10 will not unless told, and 3.9 warns of that.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
try:
    import triton
    import triton.language as tl
    TRITON_MISSING = None
except ImportError as error:  # on Windows and macOS: everything works without it
    triton = None
    TRITON_MISSING = f"triton cannot be imported ({error})"

# Triton can interpret its kernels on the CPU: slowly, and right in float32 only.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


# --------------------------------------------------------------------------------------------------
# The definitions

def gather_reference(values, indices, weights):
    """y[t] = sum_r weights[t, r] * values[indices[t, r]], summed in float32 (float64 for float64).

    values (S, D), indices, weights (N, R) -> (N, D) in values' dtype. Autograd gives the gradients.
    """
    wide = torch.promote_types(values.dtype, torch.float32)
    rows = values[indices].to(wide)  # (N, R, D): R times as large as the result
    return torch.einsum("nr,nrd->nd", weights.to(wide), rows).to(values.dtype)  # (N, D)


def topk_sums_brute_force(scores, K):
    """Make all n*n sums, take the K largest.

    scores (2, ..., n) -> sums (..., K), largest first, and slots (..., K) = i*n + j.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))  # (2, ..., n)
    left, right = scores  # (..., n) both
    sums = left[..., :, None] + right[..., None, :]  # (..., n, n)
    return sums.flatten(-2).topk(K, dim=-1)  # (..., K) both


# The product-key method finds the same K sums without making all n*n.

@functools.cache
@torch.inference_mode(False)  # the tensor serves for training too
def candidates(K, device="cpu"):
    """The pairs of ranks (i, j) that can be among the K largest sums of two sorted lists.

    Ranks begin at 0. The i+1 best of one list and the j+1 best of the other make (i+1)(j+1) sums,
    and none is below that of the pair (i, j) itself. If (i+1)(j+1) > K, the pair can be left
    out. K = 32 leaves M = 119 pairs of 1,024. Returns (2, M) int64.
    """
    pairs = [(i, j) for i in range(K) for j in range(K) if (i + 1) * (j + 1) <= K]
    return torch.tensor(pairs, device=device).T.contiguous()  # (2, M)


def topk_sums_reference(scores, K):
    """The K best of each half, then the K best sums of their candidate pairs: M sums, not n*n.

    scores (2, ..., n) -> sums in at least float32, slots int32, (..., K) both.
    """
    n = scores.shape[-1]
    i, j = candidates(K, scores.device)  # (M,) both
    best, numbers = scores.topk(K, dim=-1)  # (2, ..., K) both: scores and numbers of half-keys
    best = best.to(torch.promote_types(scores.dtype, torch.float32))  # (2, ..., K)
    sums = best[0][..., i] + best[1][..., j]  # (..., M)
    sums, pick = sums.topk(K, dim=-1)  # (..., K) both, pick in [0, M)
    left = numbers[0].gather(-1, i[pick])  # (..., K)
    right = numbers[1].gather(-1, j[pick])  # (..., K)
    return sums, (left * n + right).int()


# --------------------------------------------------------------------------------------------------
# In torch: on a CPU, in float64, and where backend("torch") is chosen

def gather_torch(values, indices, weights):
    """F.embedding_bag adds up each row as it reads it, and stores no rows.

    With gather_reference a training step on a CPU takes 1.3 times as long.
    """
    if values.dtype == torch.bfloat16 and indices.numel() < len(values):
        # embedding_bag needs float32. For a few rows it is less work to widen those alone.
        return gather_reference(values, indices, weights)
    wide = values.to(weights.dtype)  # (S, D)
    y = F.embedding_bag(indices, wide, mode="sum", per_sample_weights=weights)  # (N, D)
    return y.to(values.dtype)


def group_by_slot(indices):
    """Sort the lookups by slot: from "which slots does a token read?" to "who reads a slot?"

    indices (N, R) -> slots (L,) sorted, order (L,) where they stood in indices.flatten(), both
    int32. Equal slots keep their order, so sums over them have the same bits on every run.

    Example: indices [[3, 1], [1, 0]] -> slots [0, 1, 1, 3], order [3, 1, 2, 0]. Slot 1 is read by
    the lookups 1 and 2, which belong to the tokens 1 // R = 0 and 2 // R = 1. So the gradient of
    values[1] is weights.flatten()[1] * grad_y[0] + weights.flatten()[2] * grad_y[1].
    """
    slots, order = torch.sort(indices.reshape(-1).int(), stable=True)  # (L,) both
    return slots, order.int()


def values_gradient_torch(grad_y, indices, weights, S):
    """Slot s gets the weighted sum of grad_y over the lookups that read s: a gather again.

    With index_add_, which needs N*R weighted rows, a training step takes 1.2 times as long.
    grad_y (N, D), indices, weights (N, R) -> (S, D).
    """
    slots, order = group_by_slot(indices)  # (L,) both
    counts = torch.bincount(slots, minlength=S)  # (S,)
    return sum_groups(grad_y, weights, order, counts)


def values_gradient_rows(grad_y, indices, weights):
    """values_gradient_torch of the U rows that are read alone -> rows (U,), gradients (U, D)."""
    slots, order = group_by_slot(indices)  # (L,) both
    rows, counts = slots.unique_consecutive(return_counts=True)  # (U,) both
    return rows, sum_groups(grad_y, weights, order, counts)


def sum_groups(grad_y, weights, order, counts):
    """The weighted sums of grad_y over groups of lookups that follow each other in `order`.

    grad_y (N, D), weights (N, R), order (L,), counts (groups,): their sizes -> (groups, D).
    """
    begins = (counts.cumsum(0) - counts).int()  # (groups,): where each begins in `order`
    tokens = order // weights.shape[1]  # (L,)
    sorted_weights = weights.view(-1).index_select(0, order)  # (L,)
    return F.embedding_bag(tokens, grad_y, begins, mode="sum", per_sample_weights=sorted_weights)


def weights_gradient_torch(grad_y, values, indices):
    """The gradient of weights[t, r] is the dot product <grad_y[t], values[indices[t, r]]>.

    These are N*R of the N*S numbers in grad_y @ values.T. sampled_addmm computes just those.
    Gathering the rows would make a training step 1.2 times as long.
    grad_y (N, D), values (S, D) -> (N, R).
    """
    N, R = indices.shape
    S = len(values)
    # Not on a CPU, or more entries in a row than a sparse matrix should have: gather the rows. Also
    # of a bfloat16 table, which comes here only if few rows are read: to widen these is less work
    # than to widen all.
    if values.device.type != "cpu" or R > S or values.dtype != grad_y.dtype:
        return torch.einsum("nd,nrd->nr", grad_y, values[indices].to(grad_y.dtype))  # (N, R)
    # A CSR matrix should have sorted, different columns. Ours are neither, and nothing checks them.
    # sampled_addmm does not mind: it computes one number for each entry.
    row_begins = torch.arange(0, N * R + 1, R, dtype=torch.int32)  # (N+1,)
    columns = indices.int().view(-1)  # (L,)
    places = torch.sparse_csr_tensor(row_begins, columns, grad_y.new_zeros(N * R), (N, S),
                                     check_invariants=False)  # (N, S) with R entries in each row
    return torch.sparse.sampled_addmm(places, grad_y, values.T, beta=0.0).values().view(N, R)


# torch warns that sparse matrices are in beta and that checking them takes time.
warnings.filterwarnings("ignore", "Sparse (CSR tensor support|invariant checks)")


def gather_backward_torch(grad_y, values, indices, weights):
    """Both gradients: of the values (S, D) and of the weights (N, R), in weights' dtype."""
    grad_y = grad_y.to(weights.dtype)  # (N, D)
    grad_values = values_gradient_torch(grad_y, indices, weights, len(values))
    return grad_values, weights_gradient_torch(grad_y, values.to(weights.dtype), indices)


# Half-keys to sort at a time: numpy sorts short rows faster. Sorting 512 half-keys at once would
# make a training step 1.07 times as long.
SORTED_PART = 256


def sort_by_score_(words):
    """Sort complex numbers by their imaginary part, in place, along the last dim.

    A complex64 is two float32 in memory: the real part, then the imaginary part. Read as one
    float64, the imaginary part is the upper half, and float64 numbers are compared by their upper
    half first. numpy sorts float64 with vector instructions.
    """
    words.numpy().view(np.float64).sort()


def topk_sums_cpu(scores, K):
    """topk_sums_reference with numpy's sort. torch.topk makes a training step 1.2 times as long.

    A half-key becomes the complex number `index + 1j * score`. Sorting by score carries the index
    along, and one addition makes both numbers of a pair: the slot i*n + j and the summed score.

    Example, n = 4, K = 2, left scores [1, 7, 5, 0], right scores [3, 2, 0, 6]:
        left words   0+1j  4+7j  8+5j  12+0j     the best two: 4+7j (half-key 1), 8+5j (half-key 2)
        right words  0+3j  1+2j  2+0j   3+6j     the best two: 3+6j (half-key 3), 0+3j (half-key 0)
        candidates (0, 0), (0, 1), (1, 0)        sums: 7+13j, 4+10j, 11+11j
        the best two of them                     slot 7 with score 13, slot 11 with score 11

    scores (2, ..., n) float32, n*n <= 2^24 (a float32 holds such integers exactly) -> (..., K)
    float32, (..., K) int32.
    """
    n = scores.shape[-1]
    j = torch.arange(n, dtype=torch.float32)  # (n,)
    index = torch.stack((n * j, j))[:, None]  # (2, 1, n): i*n for the left half, j for the right
    words = torch.complex(index, scores.reshape(2, -1, n))  # (2, rows, n)
    if n > SORTED_PART:  # the best K of each part first
        words = words.view(2, -1, n // SORTED_PART, SORTED_PART)  # (2, rows, parts, SORTED_PART)
        sort_by_score_(words)
        words = words[..., -K:].flatten(2)  # (2, rows, parts * K or less)
    sort_by_score_(words)

    # Columns run from worst to best, so rank i is column -1-i, which is ~i.
    left, right = words[..., -K:].numpy()  # (rows, K) both
    i, j = candidates(K).numpy()  # (M,) both
    with np.errstate(all="ignore"):  # like torch, say nothing about inf - inf
        sums = torch.from_numpy(left.take(~i, axis=1) + right.take(~j, axis=1))  # (rows, M)
    sort_by_score_(sums)
    top = sums[:, -K:].flip(-1).view(*scores.shape[1:-1], K)  # (..., K), largest first
    best = top.imag.contiguous()  # (..., K)
    if not best.sum().isfinite():  # numpy may lose the index of a score that is NaN
        return topk_sums_reference(scores, K)
    return best, top.real.int()


def topk_sums_backward_torch(grad, slots, n, dtype):
    """Each winner's gradient goes to the scores of its two half-keys.

    grad, slots (..., K) -> the gradient of the scores (2, ..., n) in dtype.
    """
    left = slots // n  # (..., K)
    half_keys = torch.stack((left, slots - n * left))  # (2, ..., K)
    grad_scores = grad.new_zeros(2, *slots.shape[:-1], n)  # (2, ..., n)
    return grad_scores.scatter_add_(-1, half_keys, grad.expand_as(half_keys)).to(dtype)


# --------------------------------------------------------------------------------------------------
# gather in Triton
#
# How to read a Triton kernel. Many programs run it at once. Each one learns from tl.program_id
# which part of the work is its own. A program handles whole blocks of numbers: tl.arange(0, 256) is
# 256 integers, `values + d` is as many addresses, and tl.load reads them all, except where the mask
# is false. The threads of a program share the numbers of a block; 32 threads are a warp. A
# tl.constexpr is known when the kernel is compiled. Block sizes must be constexpr and powers of
# two, which is why there are masks.

if triton is not None:
    @triton.jit
    def gather_kernel(values, indices, weights, y, R, D,
                      BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
        """One program makes BLOCK_D dims of one token's output, from BLOCK_R rows at a time.

        All programs together read N*R*D numbers. The definition moves three times as many: it reads
        the rows, writes them next to each other, and reads them again to sum them.
        values (S, D), indices, weights (N, R), y (N, D).
        """
        t = tl.program_id(0).to(tl.int64)  # 64 bits: t * D, like S * D, may exceed 2^31
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # (BLOCK_D,)
        total = tl.zeros((BLOCK_D,), tl.float32)  # (BLOCK_D,)
        for r0 in range(0, R, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)  # (BLOCK_R,)
            slot = tl.load(indices + t * R + r, mask=r < R, other=0).to(tl.int64)  # (BLOCK_R,)
            w = tl.load(weights + t * R + r, mask=r < R, other=0.0)  # (BLOCK_R,)
            inside = (r < R)[:, None] & (d < D)[None, :]  # (BLOCK_R, BLOCK_D)
            address = values + slot[:, None] * D + d[None, :]  # (BLOCK_R, BLOCK_D)
            rows = tl.load(address, mask=inside, other=0.0)  # (BLOCK_R, BLOCK_D)
            total += tl.sum(w[:, None] * rows.to(tl.float32), axis=0)  # (BLOCK_D,)
        tl.store(y + t * D + d, total.to(y.dtype.element_ty), mask=d < D)


def tile(D):
    """How much of a table with D dims a program reads at a time -> (rows, dims, warps).

    D & -D is the largest power of two that divides D: a block of so many dims wastes no thread.
    """
    a_warp = 32 * 8  # dims: a thread reads 8 numbers of a row at once, 16 bytes of bfloat16
    most_dims = 4 * a_warp
    dims = min(max(D & -D, a_warp), triton.next_power_of_2(D), most_dims)
    rows = max(2 * most_dims // dims, 4)
    warps = max(dims // a_warp, 1)
    return rows, dims, warps


def gather_triton(values, indices, weights):
    """gather_kernel over all tokens. values (S, D), indices, weights (N, R) -> (N, D)."""
    N, R = indices.shape
    D = values.shape[1]
    rows, dims, warps = tile(D)
    y = values.new_empty(N, D)  # (N, D)
    grid = (N, triton.cdiv(D, dims))
    rows = min(rows, triton.next_power_of_2(R))
    gather_kernel[grid](values, indices, weights, y, R, D, rows, dims, num_warps=warps)
    return y


# Its backward

if triton is not None:
    @triton.jit
    def gather_backward_kernel(grad_y, values, weights, slots, order,
                               grad_w, grad_values, edges, edge_slots, L, D,
                               R: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr):
        """One program goes through CHUNK lookups, sorted by slot, and makes both gradients.

        The lookups of a slot follow each other, so their sum stays in registers until the slot
        changes. Then it goes to the slot's row of grad_values, which no other program touches.
        Only the first and the last slot of a chunk may go on in the neighbouring chunks, so these
        two sums go to `edges`. The edges are lookups again, of weight 1, and the caller runs this
        kernel on them until one chunk is left. On the way each lookup's weight gets its gradient,
        the dot product <grad_y[token], values[slot]>.

        Example, CHUNK = 4, slots 1 1 2 3 | 3 3 3 5: slot 2 is finished here, and the edges are
        slots 1, 3 | 3, 5. The next round adds up the two parts of slot 3. (A chunk of one slot has
        one sum; its other edge stays zero.)

        grad_y (N, D), values, grad_values (S, D), weights (N*R,), slots, order (L,) from
        group_by_slot, edges (2 * programs, D) zeros, edge_slots (2 * programs,), grad_w
        (ceil(D / BLOCK_D), L): a row for each block of dims, which the caller adds up.
        """
        p = tl.program_id(0)
        block = tl.program_id(1)
        # A thread gets runs of four dims, of float32 and bfloat16 alike. Left alone, Triton would
        # deal out eight of bfloat16, and then move numbers between threads to multiply the two.
        d = block * BLOCK_D + tl.max_contiguous(tl.arange(0, BLOCK_D), 4)  # (BLOCK_D,)
        begin = p * CHUNK
        end = tl.minimum(begin + CHUNK, L)
        first = tl.load(slots + begin)
        last = tl.load(slots + end - 1)
        tl.store(edge_slots + 2 * p, first)
        tl.store(edge_slots + 2 * p + 1, last)
        # The program's two rows of edges: this one is for its first slot, the next for its last.
        edge_row = edges + (2 * p).to(tl.int64) * D + d  # (BLOCK_D,)
        slot = first
        total = tl.zeros((BLOCK_D,), tl.float32)  # (BLOCK_D,): the sum of the slot's lookups so far
        for lookup in range(begin, end):
            # Loads first, then arithmetic: loads that do not depend on each other wait together.
            next_slot = tl.load(slots + lookup + 1, mask=lookup + 1 < end, other=-1)
            place = tl.load(order + lookup)  # in the unsorted lookups: token * R + r
            token = (place // R).to(tl.int64)
            row = slot.to(tl.int64) * D + d  # (BLOCK_D,)
            w = tl.load(weights + place)
            g = tl.load(grad_y + token * D + d, mask=d < D, other=0.0).to(tl.float32)  # (BLOCK_D,)
            v = tl.load(values + row, mask=d < D, other=0.0).to(tl.float32)  # (BLOCK_D,)
            total += w * g
            tl.store(grad_w + block.to(tl.int64) * L + place, tl.sum(g * v))
            if next_slot != slot:
                if slot == first:
                    tl.store(edge_row, total, mask=d < D)
                elif slot == last:
                    tl.store(edge_row + D, total, mask=d < D)
                else:
                    tl.store(grad_values + row, total, mask=d < D)
                slot = next_slot
                total = tl.zeros((BLOCK_D,), tl.float32)  # (BLOCK_D,)


# Lookups per program, of tokens and of edges. There are fewer edges, and short chunks keep more of
# the GPU busy.
BACKWARD_CHUNK = 128
EDGE_CHUNK = 16


def gather_backward_triton(grad_y, values, indices, weights, grad_values, chunk=BACKWARD_CHUNK):
    """Write the gradient of values to grad_values (S, D), zeros; return that of weights (N, R).

    Nothing is added atomically: all sums have a fixed order. chunk is at least 4, so that there are
    fewer edges than lookups.
    """
    D = values.shape[1]
    dims = min(tile(D)[1], 32 * 8)  # one warp, 8 dims a thread
    blocks = triton.cdiv(D, dims)
    slots, order = group_by_slot(indices)  # (L,) both
    L = len(slots)
    programs = triton.cdiv(L, chunk)
    grad_w = weights.new_empty(blocks, L)  # (blocks, L)
    edges = weights.new_zeros(2 * programs, D)  # (2 * programs, D)
    edge_slots = slots.new_empty(2 * programs)  # (2 * programs,)
    gather_backward_kernel[(programs, blocks)](
        grad_y, values, weights, slots, order, grad_w, grad_values, edges, edge_slots,
        L, D, indices.shape[1], chunk, dims, num_warps=1)
    if programs > 1:
        # The edges are lookups again: number l reads row l of edges, with weight 1.
        indices_of_edges = edge_slots[:, None]  # (2 * programs, 1)
        ones = torch.ones_like(indices_of_edges, dtype=torch.float32)  # (2 * programs, 1)
        gather_backward_triton(edges, values, indices_of_edges, ones, grad_values,
                               min(chunk, EDGE_CHUNK))
    else:
        # Both edges may be of one slot. Added one at a time, they have only one order.
        for i in range(2):
            grad_values.index_add_(0, edge_slots[i:i + 1], edges[i:i + 1])
    return grad_w.sum(0).view_as(weights)  # (N, R)


# --------------------------------------------------------------------------------------------------
# topk_sums in Triton

if triton is not None:
    @triton.jit
    def sortable(bits):
        """From the bits of float32 numbers to int32 that sort as the floats do, and back.

        Positive floats sort as their bits do. Negative ones sort backwards, so all their bits but
        the sign are flipped.
        """
        return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)

    @triton.jit
    def pack_score_and_index(score, index, mask):
        """One integer for both, which sorts by score: tl.topk sorts plain numbers only.

        float32 scores take 64 bits, the score above the index. 1.5 has the bits 0x3FC00000, so 1.5
        of half-key 7 becomes 0x3FC00000_00000007. bfloat16 scores have zeros in the lower 16 bits.
        The index fits there, 0x3FC0_0007, and sorting 32 bits is half the work. Where mask is
        false, the word is the smallest there is.
        """
        bits = sortable(score.to(tl.float32).to(tl.int32, bitcast=True))
        if score.dtype == tl.bfloat16:
            upper_half = -65536  # 0xFFFF0000
            word = tl.where(mask, (bits & upper_half) | index, -2147483648)
        else:
            word = (bits.to(tl.int64) << 32) | index.to(tl.int64)
            word = tl.where(mask, word, -9223372036854775808)
        return word

    @triton.jit
    def unpack_score_and_index(word):
        """-> (float32 scores, int32 indices) of packed words."""
        if word.dtype == tl.int32:
            upper_half = -65536  # 0xFFFF0000
            bits = sortable(word) & upper_half
            index = word & 0xFFFF
        else:
            bits = sortable((word >> 32).to(tl.int32))
            index = (word & 0x7FFFFFFF).to(tl.int32)
        return bits.to(tl.float32, bitcast=True), index

    @triton.jit
    def topk_sums_kernel(scores, pairs, best, slots, rows, n, K, M,
                         BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr):
        """One program does what topk_sums_reference does, for one query and in registers.

        It reads 2n scores and writes K sums and K slots. scores (2, rows, n), pairs (2, M) from
        candidates(K), best, slots (rows, K).
        """
        query = tl.program_id(0).to(tl.int64)
        i = tl.arange(0, BLOCK_N)  # (BLOCK_N,)
        m = tl.arange(0, BLOCK_M)  # (BLOCK_M,)
        k = tl.arange(0, BLOCK_K)  # (BLOCK_K,)

        # The K best of each half. The sort is thousands of instructions; a loop needs one copy of
        # it. In the end left holds the result of side 0, right that of side 1.
        right = tl.zeros((BLOCK_K,), tl.float32)  # (BLOCK_K,)
        right_key = tl.zeros((BLOCK_K,), tl.int32)  # (BLOCK_K,)
        left = right  # (BLOCK_K,)
        left_key = right_key  # (BLOCK_K,)
        for side in range(2):
            left = right
            left_key = right_key
            row = scores + (side * rows + query) * n
            half = tl.load(row + i, mask=i < n, other=0.0)  # (BLOCK_N,)
            words = tl.topk(pack_score_and_index(half, i, i < n), BLOCK_K)  # (BLOCK_K,)
            right, right_key = unpack_score_and_index(words)  # (BLOCK_K,) both

        # The sums of the candidate pairs, and the K best of those.
        first = tl.load(pairs + m, mask=m < M, other=0).to(tl.int32)  # (BLOCK_M,)
        second = tl.load(pairs + M + m, mask=m < M, other=0).to(tl.int32)  # (BLOCK_M,)
        total = tl.gather(left, first, 0) + tl.gather(right, second, 0)  # (BLOCK_M,)
        slot = tl.gather(left_key, first, 0) * n + tl.gather(right_key, second, 0)  # (BLOCK_M,)
        words = tl.topk(pack_score_and_index(total, slot, m < M), BLOCK_K)  # (BLOCK_K,)
        total, slot = unpack_score_and_index(words)  # (BLOCK_K,) both
        tl.store(best + query * K + k, total, mask=k < K)
        tl.store(slots + query * K + k, slot, mask=k < K)

    @triton.jit
    def topk_sums_backward_kernel(grad, slots, grad_scores, rows, n, K,
                                  BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                                  BLOCK_J: tl.constexpr):
        """One program makes the gradient of one half's n scores for one query.

        Several winners may share a half-key. Each of the K winners adds up the gradients of all
        winners with its half-key and writes the sum over a row of zeros. All who write to a place
        have added the same numbers in the same order, so they write the same bits, and no atomics
        are needed. grad, slots (rows, K), grad_scores (2, rows, n).
        """
        query = tl.program_id(0).to(tl.int64)
        side = tl.program_id(1)
        i = tl.arange(0, BLOCK_N)  # (BLOCK_N,)
        k = tl.arange(0, BLOCK_K)  # (BLOCK_K,)
        # The half-keys of slot = i*n + j are i = slot // n and j = slot % n = slot // 1 % n.
        divisor = tl.where(side == 0, n, 1)
        slot = tl.load(slots + query * K + k, mask=k < K, other=0)  # (BLOCK_K,)
        mine = slot // divisor % n  # (BLOCK_K,)
        total = tl.zeros((BLOCK_K,), tl.float32)  # (BLOCK_K,)
        for j0 in range(0, K, BLOCK_J):
            other = j0 + tl.arange(0, BLOCK_J)  # (BLOCK_J,)
            g = tl.load(grad + query * K + other, mask=other < K, other=0.0)  # (BLOCK_J,)
            other_slot = tl.load(slots + query * K + other, mask=other < K, other=0)  # (BLOCK_J,)
            theirs = other_slot // divisor % n  # (BLOCK_J,)
            same = theirs[:, None] == mine[None, :]  # (BLOCK_J, BLOCK_K)
            total += tl.sum(tl.where(same, g[:, None], 0.0), axis=0)  # (BLOCK_K,)
        row = grad_scores + (side * rows + query) * n
        tl.store(row + i, tl.zeros((BLOCK_N,), grad_scores.dtype.element_ty), mask=i < n)
        tl.debug_barrier()  # no thread goes on before all zeros are written
        tl.store(row + mine, total.to(grad_scores.dtype.element_ty), mask=k < K)


MOST_COMPARISONS = 1024  # of half-keys that topk_sums_backward_kernel makes at a time


def topk_sums_triton(scores, K):
    """topk_sums_kernel over all queries: scores (2, ..., n) -> sums, slots, (..., K) both."""
    n = scores.shape[-1]
    rows = scores.numel() // (2 * n)
    pairs = candidates(K, scores.device)  # (2, M)
    M = pairs.shape[1]
    best = scores.new_empty(*scores.shape[1:-1], K, dtype=torch.float32)  # (..., K)
    slots = torch.empty_like(best, dtype=torch.int32)  # (..., K)
    if rows == 0:
        return best, slots
    sorted_by_a_warp = 1024 if scores.dtype == torch.bfloat16 else 512  # words of 32 or 64 bits
    most_warps = 8
    warps = min(max(n // sorted_by_a_warp, 1), most_warps)
    # Triton 3.6 cannot sort a single number, so a block has at least 2.
    blocks = [max(triton.next_power_of_2(x), 2) for x in (n, K, M)]
    topk_sums_kernel[(rows,)](scores.contiguous(), pairs, best, slots, rows, n, K, M, *blocks,
                              num_warps=warps)
    return best, slots


def topk_sums_backward_triton(grad, slots, n, dtype):
    """topk_sums_backward_kernel over all queries and halves. (..., K) both -> (2, ..., n)."""
    K = slots.shape[-1]
    rows = slots.numel() // K
    grad_scores = grad.new_empty(2, *slots.shape[:-1], n, dtype=dtype)  # (2, ..., n)
    if rows == 0:
        return grad_scores
    block_k = triton.next_power_of_2(K)
    block_j = min(block_k, max(MOST_COMPARISONS // block_k, 1))
    topk_sums_backward_kernel[(rows, 2)](grad.contiguous(), slots, grad_scores, rows, n, K,
                                         triton.next_power_of_2(n), block_k, block_j, num_warps=1)
    return grad_scores


# --------------------------------------------------------------------------------------------------
# Triton or torch?

BACKENDS = ("auto", "triton", "torch", "reference")
_backend = "auto"


def backend(name=None):
    """Choose what the operations run on. Returns the choice that is in force.

    "auto": Triton on CUDA where it works, torch elsewhere. "triton", "torch": that one, everywhere.
    "reference": the definitions, of which torch makes all kinds of derivatives, in more time and
    memory. None: leave the choice as it is. Raises ValueError for another name, and if "triton"
    cannot run.
    """
    global _backend
    if name is None:
        return _backend
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is not one of {', '.join(BACKENDS)}")
    if name == "triton":
        problem = triton_problem()
        if problem and triton is not None and not torch.cuda.is_available():
            problem = "there is no CUDA GPU; set TRITON_INTERPRET=1 to interpret the kernels"
        if problem:
            raise ValueError(f"backend 'triton' cannot run here: {problem}")
    _backend = name
    return _backend


@functools.cache
def triton_problem():
    """Why Triton cannot be used on this machine's GPU; "" if it can.

    When Triton launches its first kernel, it needs a C compiler, Python's headers, ptxas and a
    driver that fits. Any of them may be missing, so we try.
    """
    if triton is None:
        return TRITON_MISSING
    if INTERPRETED:
        return ""
    try:
        one = torch.ones(1, 1, device="cuda")
        gather_triton(one, torch.zeros(1, 1, dtype=torch.int32, device="cuda"), one)
        torch.cuda.synchronize()
    except Exception as error:  # Triton, the compiler and the driver raise exceptions of many kinds
        why = " ".join(str(error).split())[:100]
        return f"Triton fails, as it does without a C compiler ({type(error).__name__}: {why})"
    return ""


def uses_triton(device):
    """Whether the Triton kernels run for tensors on this device."""
    if _backend != "auto":
        return _backend == "triton"
    return torch.device(device).type == "cuda" and not INTERPRETED and not triton_problem()


def describe_backend(device):
    """One line for the start of a run: what the operations run on, and why."""
    if uses_triton(device):
        where = "interpreted on the CPU" if INTERPRETED else torch.cuda.get_device_name()
        return f"memory: Triton kernels ({where})"
    if _backend != "auto":
        return f"memory: {_backend} (chosen by backend())"
    if triton is not None and torch.device(device).type != "cuda":
        why = f"Triton needs a CUDA GPU, this is {device}"
    else:
        why = triton_problem() or "TRITON_INTERPRET is set"
    return f"memory: torch ({why})"


# --------------------------------------------------------------------------------------------------
# The two operations
#
# torch.compile cannot look into our kernels. custom_op makes each function one node of its graph,
# register_fake says which shapes and dtypes come out, register_autograd how the backward is made.

def gather(values, indices, weights, sparse=False):
    """y[t] = sum_r weights[t, r] * values[indices[t, r]]: R weighted rows of a table per token.

    This is y = s V of Memory Layers at Scale (arXiv 2412.09764).

    values (S, D) float32, bfloat16 or float64; indices (N, R) int32 or int64, each in [0, S);
    weights (N, R), cast to values' dtype, or to float32 if that is bfloat16. Returns (N, D) in
    values' dtype, summed in at least float32. Differentiable in values and weights, with the same
    bits on every run. Raises ValueError for shapes that do not fit.

    The gradient of values is summed in the dtype of the weights. sparse: it is a sparse tensor of
    the rows that are read. That works on a CPU, not compiled.
    """
    most_lookups = 2**31 - 2 * BACKWARD_CHUNK  # the kernels count lookups in 32 bits
    shapes_fit = values.dim() == 2 and indices.dim() == 2 and indices.shape == weights.shape
    if not shapes_fit or indices.numel() > most_lookups:
        raise ValueError(
            f"gather wants values (S, D) and indices, weights of one shape (N, R), "
            f"N*R <= {most_lookups}; got values {tuple(values.shape)}, "
            f"indices {tuple(indices.shape)}, weights {tuple(weights.shape)}")
    weights = weights.to(torch.promote_types(values.dtype, torch.float32))  # (N, R)
    is_empty = values.numel() == 0 or indices.numel() == 0
    # mps lacks what gather_torch calls.
    if is_empty or values.device.type == "mps" or _backend == "reference":
        return gather_reference(values, indices, weights)  # (N, D)
    indices = indices.int().contiguous()  # (N, R)
    return gather_op(values.contiguous(), indices, weights.contiguous(), sparse)


@torch.library.custom_op("nanomemory::gather", mutates_args=())
def gather_op(values: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor,
              sparse: bool = False) -> torch.Tensor:
    """sparse is for the backward, see gather_autograd."""
    if uses_triton(values.device) and values.dtype != torch.float64:
        return gather_triton(values, indices, weights)
    return gather_torch(values, indices, weights)


@gather_op.register_fake
def gather_shapes(values, indices, weights, sparse=False):
    return values.new_empty(indices.shape[0], values.shape[1])


@torch.library.custom_op("nanomemory::gather_backward", mutates_args=())
def gather_backward_op(grad_y: torch.Tensor, values: torch.Tensor, indices: torch.Tensor,
                       weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-> the gradients of values (S, D) and weights (N, R), both in weights' dtype."""
    if uses_triton(values.device) and values.dtype != torch.float64:
        grad_values = torch.zeros_like(values, dtype=weights.dtype)  # (S, D)
        grad_w = gather_backward_triton(grad_y, values, indices, weights, grad_values)  # (N, R)
        return grad_values, grad_w
    return gather_backward_torch(grad_y, values, indices, weights)


@gather_backward_op.register_fake
def gather_backward_shapes(grad_y, values, indices, weights):
    return torch.empty_like(values, dtype=weights.dtype), torch.empty_like(weights)


def gather_save(ctx, inputs, output):
    values, indices, weights, ctx.sparse = inputs
    ctx.save_for_backward(values, indices, weights)


def gather_autograd(ctx, grad_y):
    if ctx.sparse:
        values, indices, weights = ctx.saved_tensors
        grad_y = grad_y.contiguous().to(weights.dtype)  # (N, D)
        grad_values = None
        if ctx.needs_input_grad[0]:
            rows, grads = values_gradient_rows(grad_y, indices, weights)  # (U,), (U, D)
            grad_values = torch.sparse_coo_tensor(rows[None], grads, values.shape,
                                                  is_coalesced=True, check_invariants=False)
        return grad_values, None, weights_gradient_torch(grad_y, values, indices), None
    grad_values, grad_w = gather_backward_op(grad_y.contiguous(), *ctx.saved_tensors)
    return grad_values, None, grad_w, None


gather_op.register_autograd(gather_autograd, setup_context=gather_save)


def topk_sums(scores, K):
    """The K largest of the n*n sums scores[0, ..., i] + scores[1, ..., j].

    This is how product keys are searched (arXiv 1907.05242).

    scores (2, ..., n) float -> best (..., K): the sums, largest first, in at least float32,
    differentiable in the scores; slots (..., K) int32 = i*n + j. Exact; ties come in any order.
    n*n must be below 2^31. Raises ValueError unless 1 <= K <= n.
    """
    if not 1 <= K <= scores.shape[-1]:
        raise ValueError(f"K = {K} is not between 1 and the {scores.shape[-1]} half-keys")
    if _backend == "reference":
        return topk_sums_reference(scores, K)
    return topk_sums_op(scores, K)


@torch.library.custom_op("nanomemory::topk_sums", mutates_args=())
def topk_sums_op(scores: torch.Tensor, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    n = scores.shape[-1]
    if uses_triton(scores.device) and scores.dtype != torch.float64:
        return topk_sums_triton(scores, K)
    # One part to sort, or up to four whole ones. For more half-keys torch.topk is as fast.
    cpu_sorts = n <= SORTED_PART or (n % SORTED_PART == 0 and n <= 4 * SORTED_PART)
    if scores.device.type == "cpu" and scores.dtype == torch.float32 and cpu_sorts:
        return topk_sums_cpu(scores, K)
    return topk_sums_reference(scores, K)


@topk_sums_op.register_fake
def topk_sums_shapes(scores, K):
    wide = torch.promote_types(scores.dtype, torch.float32)
    shape = (*scores.shape[1:-1], K)
    return scores.new_empty(shape, dtype=wide), scores.new_empty(shape, dtype=torch.int32)


@torch.library.custom_op("nanomemory::topk_sums_backward", mutates_args=())
def topk_sums_backward_op(grad: torch.Tensor, slots: torch.Tensor, n: int,
                          dtype: torch.dtype) -> torch.Tensor:
    if uses_triton(grad.device) and grad.dtype != torch.float64:
        return topk_sums_backward_triton(grad, slots, n, dtype)
    return topk_sums_backward_torch(grad, slots, n, dtype)


@topk_sums_backward_op.register_fake
def topk_sums_backward_shapes(grad, slots, n, dtype):
    return grad.new_empty(2, *slots.shape[:-1], n, dtype=dtype)


def topk_sums_save(ctx, inputs, output):
    scores, _ = inputs
    _, slots = output
    ctx.save_for_backward(slots)
    ctx.n = scores.shape[-1]
    ctx.dtype = scores.dtype
    ctx.mark_non_differentiable(slots)


def topk_sums_autograd(ctx, grad, _):
    slots, = ctx.saved_tensors
    return topk_sums_backward_op(grad, slots, ctx.n, ctx.dtype), None


topk_sums_op.register_autograd(topk_sums_autograd, setup_context=topk_sums_save)
