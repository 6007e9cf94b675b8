"""Every version of the two operations in kernel.py against its definition.

    pytest tests/test_kernel.py                                     everything
    TRITON_INTERPRET=1 python tests/test_kernel.py cpu              the Triton kernels alone, run by
                                                                    Triton's interpreter on the CPU
    python tests/test_kernel.py cuda                                the same on a GPU

There are three parts: the gather, the selection, the Triton kernels. Without a GPU the kernels are
interpreted, which shows that they are right. Then they are compiled for two generations of GPUs,
and what comes out is read: it shows that nothing spills, that loads are wide, and that there are no
atomics.

N tokens · R reads per token · L = N*R lookups · S slots · D dims of a slot · n half-keys per side
K slots selected
"""
import contextlib
import functools
import io
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import kernel
from kernel import gather, gather_reference, group_by_slot, topk_sums, topk_sums_brute_force

# Tolerances, as parts of the largest number. 2^-8 is one rounding to the 8 bits of bfloat16.
FLOAT32 = 1e-5
BFLOAT16 = 2**-8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def close(got, want, tolerance):
    """got is want, up to tolerance times the largest number in want."""
    assert got.shape == want.shape
    if want.numel() == 0:
        return
    error = (got.double() - want.double()).abs().max().item()
    scale = want.double().abs().max().item()
    # The comparison is false for NaN too.
    assert error <= tolerance * scale, f"error {error:.2e} > {tolerance:.0e} of {scale:.2e}"


# --------------------------------------------------------------------------------------------------
# gather

class Case(NamedTuple):
    """A size of the gather. hot: every read hits the last slot."""
    N: int
    R: int
    S: int
    D: int
    hot: bool = False


# Odd sizes, sizes around a block of the kernels, one of everything, none of something.
CASES = {
    "one of everything": Case(1, 1, 1, 1),
    "one dim": Case(5, 3, 1000, 1),
    "few dims, many reads": Case(1, 128, 300, 7),
    "two slots, two programs backward": Case(5, 32, 2, 48),
    "dims below a power of two": Case(5, 3, 10, 100),
    "one read of three blocks": Case(3, 1, 3, 768),
    "three blocks, one read more than a tile": Case(1, 9, 2, 768),
    "one dim in the last block": Case(2, 9, 20, 513),
    "blocks of two warps": Case(2, 5, 9, 512),
    "blocks of four warps": Case(1, 5, 9, 1024),
    "one hot slot": Case(2, 16, 20, 100, hot=True),
    "one hot slot of three blocks": Case(3, 2, 2, 768, hot=True),
    "no tokens": Case(0, 3, 5, 7),
    "no reads": Case(5, 0, 5, 7),
}


def make_case(N, R, S, D, hot=False, dtype=torch.float32, device="cpu"):
    """values (S, D), NaN where no one reads, indices (N, R), weights (N, R), grad_y (N, D)."""
    torch.manual_seed(N + R + S + D)
    indices = torch.full((N, R), S - 1) if hot else torch.randint(S, (N, R))
    values = torch.randn(S, D).to(dtype)
    values[unread(indices, S)] = math.nan
    weights = torch.randn(N, R)
    grad_y = torch.randn(N, D).to(dtype)
    return [x.to(device) for x in (values, indices, weights, grad_y)]


def unread(indices, S):
    """Which slots nobody reads, (S,) bool."""
    return torch.bincount(indices.flatten(), minlength=S) == 0


def with_gradients(f, values, indices, weights, grad_y):
    """f's result (N, D), its gradients of values (S, D) and of weights (N, R)."""
    values = values.detach().requires_grad_()
    weights = weights.detach().requires_grad_()
    y = f(values, indices, weights)
    grad_values, grad_weights = torch.autograd.grad(y, (values, weights), grad_y)
    return y.detach(), grad_values, grad_weights


def check_gather(case, dtype=torch.float32, device="cpu"):
    """One case of gather on the backend in force.

    It is right, shows no uninitialised memory, gives the same bits again, and takes int32 slots as
    well as int64.
    """
    values, indices, weights, grad_y = make_case(*case, dtype, device)
    # In this mode torch.empty is filled with NaN, which would show in the results.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        got = with_gradients(gather, values, indices, weights, grad_y)
        again = with_gradients(gather, values, indices.int(), weights, grad_y)
    finally:
        torch.use_deterministic_algorithms(False)
    want = with_gradients(gather_reference, values.double(), indices, weights.double(),
                          grad_y.double())

    assert [x.dtype for x in got] == [dtype, dtype, torch.float32]
    rounded = FLOAT32 if dtype == torch.float32 else BFLOAT16
    names = ("y", "grad_values", "grad_weights")
    for name, g, w, a, tolerance in zip(names, got, want, again, (rounded, rounded, FLOAT32)):
        try:
            close(g, w, tolerance)
            assert torch.equal(g, a), "not the same bits with int32 indices, a second time"
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
    gradients_of_unread = got[1][unread(indices, case.S)]
    assert (gradients_of_unread == 0).all(), "a slot that nobody read has a gradient"


def check_compile(device="cpu"):
    """gather compiles without a graph break, once for all batches, and gives the same."""
    torch.compiler.reset()
    compiled = torch.compile(gather, fullgraph=True, dynamic=True, backend="aot_eager")
    for N, stance in ((2, "default"), (5, "fail_on_recompile")):
        case = make_case(N, 3, 4, 7, device=device)
        with torch.compiler.set_stance(stance):
            got = with_gradients(compiled, *case)
        for g, w in zip(got, with_gradients(gather, *case)):
            close(g, w, FLOAT32)


@pytest.fixture
def torch_path(monkeypatch):
    """Run gather and topk_sums in torch, whatever there is."""
    monkeypatch.setattr(kernel, "_backend", "torch")


def test_reference_is_the_formula():
    values, indices, weights, _ = make_case(3, 4, 5, 6)
    y = gather_reference(values, indices, weights)
    for t in range(3):
        close(y[t], sum(weights[t, r] * values[indices[t, r]] for r in range(4)), FLOAT32)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gather_torch(torch_path, case, dtype):
    check_gather(case, dtype)


def test_gather_torch_sums_bfloat16_in_float32(torch_path):
    values, indices, weights, grad_y = make_case(5, 128, 9, 48, dtype=torch.bfloat16)
    y, grad_values, grad_weights = with_gradients(gather, values, indices, weights, grad_y)
    wide = with_gradients(gather, values.float(), indices, weights, grad_y.float())
    assert torch.equal(y, wide[0].bfloat16())
    assert torch.equal(grad_values, wide[1].bfloat16())
    assert torch.equal(grad_weights, wide[2])


def test_gather_torch_gradcheck(torch_path):
    """The gradients are those of differences, in float64."""
    values, indices, weights, _ = make_case(4, 3, 5, 6)
    values = values.nan_to_num(1.0).double().requires_grad_()
    weights = weights.double().requires_grad_()

    def read(values, weights):
        return gather(values, indices, weights)
    assert torch.autograd.gradcheck(read, (values, weights))


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)],
                         ids=["values", "weights", "nothing"])
def test_gather_torch_gives_the_gradients_asked_for(torch_path, wanted):
    values, indices, weights, grad_y = make_case(4, 3, 5, 6)
    gradients = with_gradients(gather, values, indices, weights, grad_y)[1:]
    values.requires_grad_(wanted[0])
    weights.requires_grad_(wanted[1])
    y = gather(values, indices, weights)
    assert y.requires_grad == any(wanted)
    if y.requires_grad:
        y.backward(grad_y)
    for x, is_wanted, gradient in zip((values, weights), wanted, gradients):
        if is_wanted:
            assert torch.equal(x.grad, gradient)
        else:
            assert x.grad is None


def test_gather_torch_non_contiguous(torch_path):
    torch.manual_seed(0)
    values = torch.randn(7, 6).T[::2]  # (3, 7)
    indices = torch.randint(3, (4, 5)).T  # (5, 4)
    weights = torch.randn(5, 8)[:, ::2]  # (5, 4)
    grad_y = torch.randn(5, 1).expand(5, 7)
    case = (values, indices, weights, grad_y)
    assert not any(x.is_contiguous() for x in case)
    got = with_gradients(gather, *case)
    want = with_gradients(gather, *(x.contiguous() for x in case))
    for g, w in zip(got, want):
        close(g, w, FLOAT32)


def test_gather_torch_compiles_without_graph_break(torch_path):
    check_compile()


@pytest.mark.parametrize("values, indices, weights", [
    ((5,), (2, 3), (2, 3)),
    ((5, 4), (2, 3), (3, 2)),
    ((5, 4), (6,), (6,)),
], ids=str)
def test_gather_refuses_shapes_that_do_not_fit(values, indices, weights):
    with pytest.raises(ValueError, match="gather wants"):
        gather(torch.zeros(values), torch.zeros(indices, dtype=torch.int64), torch.zeros(weights))


def test_gather_refuses_more_lookups_than_the_kernels_count():
    indices = torch.zeros(1, 1, dtype=torch.int32).expand(2**16, 2**15)  # 2^31, in 4 bytes
    with pytest.raises(ValueError, match=r"gather wants .*N\*R <= 2147483392"):
        gather(torch.zeros(5, 4), indices, torch.zeros(1, 1).expand(2**16, 2**15))


def test_the_gradient_of_a_bfloat16_table_is_summed_in_float32(torch_path):
    values, indices, weights, grad_y = make_case(30, 4, 50, 6)
    want = with_gradients(gather, values, indices, weights, grad_y)
    table = values.bfloat16().requires_grad_()
    table.grad_dtype = torch.float32
    for times in (1, 2):  # layers, or micro-steps, add up
        gather(table, indices, weights).backward(grad_y.bfloat16())
        assert table.grad.dtype == torch.float32
        close(table.grad, times * want[1], BFLOAT16)


def test_group_by_slot():
    # The docstring's example.
    slots, order = group_by_slot(torch.tensor([[3, 1], [1, 0]]))
    assert slots.tolist() == [0, 1, 1, 3]
    assert order.tolist() == [3, 1, 2, 0]

    torch.manual_seed(0)
    for N, R, S in [(50, 8, 30), (3, 1, 1000), (0, 4, 3), (200, 4, 1), (40, 3, 2**20)]:
        for dtype in (torch.int32, torch.int64):
            indices = torch.randint(S, (N, R), dtype=dtype)
            indices[-1:] = S - 1
            slots, order = group_by_slot(indices)
            want = sorted(zip(indices.flatten().tolist(), range(N * R)))
            assert list(zip(slots.tolist(), order.tolist())) == want


# --------------------------------------------------------------------------------------------------
# topk_sums

def sums_at(scores, slots):
    """The sums of these slots = i*n + j. scores (2, ..., n), slots (..., K) -> (..., K)."""
    n = scores.shape[-1]
    left, right = scores  # (..., n) both
    return left.gather(-1, (slots // n).long()) + right.gather(-1, (slots % n).long())


def check_selection(scores, K):
    """topk_sums has the K largest sums, each of them at the slot it names, and no slot twice.

    Ties may be broken either way, so slots are not compared with the definition's.
    """
    best, slots = topk_sums(scores, K)
    wide = scores.to(best.dtype)  # bfloat16 scores are summed in float32
    case = f"n = {scores.shape[-1]}, K = {K}"
    assert torch.equal(best, topk_sums_brute_force(wide, K)[0]), f"{case}: not the largest sums"
    assert torch.equal(best, sums_at(wide, slots)), f"{case}: the slots are not those of the sums"
    for row in slots.reshape(-1, K).tolist():
        assert len(set(row)) == K, f"{case}: a slot twice"
    return best, slots


def test_brute_force_is_the_definition():
    """Against loops over all pairs in plain Python. No two sums are equal."""
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 7)
    for K in (1, 5, 49):
        best, slots = topk_sums_brute_force(scores, K)
        for t in range(3):
            left = scores[0, t].tolist()
            right = scores[1, t].tolist()
            pairs = [(left[i] + right[j], i * 7 + j) for i in range(7) for j in range(7)]
            want = sorted(pairs, reverse=True)[:K]
            assert slots[t].tolist() == [slot for _, slot in want]
            close(best[t], torch.tensor([total for total, _ in want]), FLOAT32)


def test_topk_sums_of_the_docstring():
    scores = torch.tensor([[1.0, 7, 5, 0], [3, 2, 0, 6]])
    best, slots = topk_sums(scores, 2)
    assert best.tolist() == [13, 11]
    assert slots.tolist() == [7, 11]


SPECIAL_NUMBERS = {
    "ties": [-2, -1, 0, 1, 2],
    "zeros of both signs": [0.0, -0.0, 1.0, -1.0],
    "tiny and huge": [1e-45, -1e-45, 1e-39, 3e38, -3e38],
    "infinities": [math.inf, -math.inf, 1.0, -1.0],
}


def special_scores(kind, n):
    """(6, n) scores of one half."""
    if kind == "normal":
        return torch.randn(6, n)
    if kind == "negative":
        return -torch.rand(6, n) - 1e-3
    numbers = torch.tensor(SPECIAL_NUMBERS[kind], dtype=torch.float32)
    return numbers[torch.randint(len(numbers), (6, n))]


@pytest.mark.parametrize("kind", ["normal", "negative", *SPECIAL_NUMBERS])
def test_topk_sums_of_special_numbers(kind):
    torch.manual_seed(0)
    for n in (1, 2, 7, 65, 300, 512):  # 300 half-keys: torch.topk's; 512: sorted in parts
        # The other half is zeros, since inf - inf is no number.
        scores = torch.stack((special_scores(kind, n), torch.zeros(6, n)))  # (2, 6, n)
        before = scores.clone()
        for K in {1, (n + 1) // 2, min(n, 70)}:
            check_selection(scores, K)
            check_selection(scores.flip(0), K)
        assert torch.equal(scores, before)


def test_topk_sums_stays_in_range_for_nan():
    """Whatever NaN it is: a run that diverges must reach its own check for NaN."""
    torch.manual_seed(0)
    for bits in (0x7FC00000, -0x400000, 0x7FFFFFFF, -1):
        nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)  # ()
        scores = torch.where(torch.rand(2, 6, 50) < 0.3, nan, torch.randn(2, 6, 50))  # (2, 6, 50)
        _, slots = topk_sums(scores, 20)
        assert slots.min() >= 0 and slots.max() < 2500, bits


@pytest.mark.parametrize("view", ["transposed", "every third row", "every second column",
                                  "one half twice"])
def test_topk_sums_of_any_strides(view):
    torch.manual_seed(0)
    scores = torch.randn(2, 9, 8)
    views = {
        "transposed": scores.transpose(0, 2)[:2],  # (2, 9, 2)
        "every third row": scores[:, ::3],  # (2, 3, 8)
        "every second column": scores[..., 1::2],  # (2, 9, 4)
        "one half twice": scores[:1].expand(2, 9, 8),
    }
    scores = views[view]
    assert not scores.is_contiguous()
    best, slots = check_selection(scores, 2)
    want, want_slots = topk_sums(scores.contiguous(), 2)
    assert torch.equal(best, want)
    assert torch.equal(slots, want_slots)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 33, 70, 256, 512, 768])
def test_topk_sums_is_brute_force(n, dtype):
    """float32 scores are sorted by numpy, float64 scores by torch.topk."""
    torch.manual_seed(n)
    for K in range(1, n + 1) if n < 100 else (1, 40, n):
        check_selection(torch.randn(2, 4, 3, n, dtype=dtype), K)
        with_ties = torch.randint(-3, 4, (2, 5, n)).to(dtype)
        check_selection(with_ties, K)


def test_topk_sums_gradient():
    # Random scores: no two sums are as near to each other as gradcheck's steps.
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)

    def best_sums(scores):
        return topk_sums(scores, 4)[0]
    assert torch.autograd.gradcheck(best_sums, scores)

    scores = torch.randn(2, 5, 40, requires_grad=True)
    grad = torch.randn(5, 9)
    got, = torch.autograd.grad(topk_sums(scores, 9)[0], scores, grad)
    want, = torch.autograd.grad(topk_sums_brute_force(scores, 9)[0], scores, grad)
    close(got, want, 1e-6)


@pytest.mark.parametrize("K", [0, 4, -1])
def test_topk_sums_refuses_k(K):
    with pytest.raises(ValueError, match=f"K = {K} is not between 1 and the 3 half-keys"):
        topk_sums(torch.randn(2, 5, 3), K)


def test_candidates():
    assert kernel.candidates(32).shape == (2, 119)
    assert kernel.candidates(16).shape == (2, 50)
    pairs = sorted(zip(*kernel.candidates(3).tolist()))
    assert pairs == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0)]


@pytest.mark.parametrize("K", range(2, 10))
def test_no_candidate_can_be_spared(K, monkeypatch):
    """For each pair of ranks (i, j) there are scores whose K best sums hold it.

    They are those where the first i+1 and the first j+1 half-keys are far above all others.
    """
    every_pair = kernel.candidates(K)  # (2, M)

    def best_sums_with(pairs):
        def those_pairs(K, device="cpu"):
            return pairs
        monkeypatch.setattr(kernel, "candidates", those_pairs)
        return kernel.topk_sums_reference(scores, K)[0]

    rank = torch.arange(K)
    for m, (i, j) in enumerate(every_pair.T.tolist()):
        left = torch.where(rank <= i, -rank, -1000 - rank)  # (K,)
        right = torch.where(rank <= j, -rank, -1000 - rank)  # (K,)
        scores = torch.stack((left, right)).float()  # (2, K)
        want = topk_sums_brute_force(scores, K)[0]
        assert torch.equal(best_sums_with(every_pair), want)
        without = torch.cat((every_pair[:, :m], every_pair[:, m + 1:]), dim=1)  # (2, M-1)
        assert not torch.equal(best_sums_with(without), want), f"({i}, {j}) is not needed"


def test_topk_sums_compiles_without_graph_break():
    torch.compiler.reset()
    compiled = torch.compile(topk_sums, fullgraph=True, dynamic=True, backend="aot_eager")
    for N, stance in ((5, "default"), (8, "fail_on_recompile")):
        scores = torch.randn(2, N, 9, requires_grad=True)
        with torch.compiler.set_stance(stance):
            best, slots = compiled(scores, 4)
        want, want_slots = topk_sums(scores, 4)
        assert torch.equal(best, want)
        assert torch.equal(slots, want_slots)
        got_grad, = torch.autograd.grad(best.square().sum(), scores)
        want_grad, = torch.autograd.grad(want.square().sum(), scores)
        assert torch.equal(got_grad, want_grad)
    torch.library.opcheck(torch.ops.nanomemory.topk_sums.default, (scores, 4))


# --------------------------------------------------------------------------------------------------
# Triton or torch?

def test_backend_switch(monkeypatch):
    monkeypatch.setattr(kernel, "_backend", "auto")
    monkeypatch.setattr(kernel, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(kernel, "triton_problem", kernel.triton_problem.__wrapped__)  # not cached
    assert kernel.backend() == "auto"
    assert not kernel.uses_triton("cpu")
    assert kernel.describe_backend("cpu").startswith("memory: torch (")

    # A choice that is refused changes nothing.
    with pytest.raises(ValueError, match="'cuda' is not one of auto, triton, torch"):
        kernel.backend("cuda")
    why = "backend 'triton' cannot run here: .*(TRITON_INTERPRET=1|cannot be imported)"
    with pytest.raises(ValueError, match=why):
        kernel.backend("triton")
    assert kernel.backend() == "auto"

    assert kernel.backend("torch") == "torch"
    assert kernel.backend() == "torch"
    assert kernel.describe_backend("cpu") == "memory: torch (chosen by backend())"

    # Without Triton even the interpreter cannot run.
    monkeypatch.setattr(kernel, "triton", None)
    monkeypatch.setattr(kernel, "TRITON_MISSING", "triton cannot be imported (no module)")
    monkeypatch.setattr(kernel, "INTERPRETED", True)
    with pytest.raises(ValueError, match="cannot be imported"):
        kernel.backend("triton")
    kernel.backend("auto")
    assert "cannot be imported" in kernel.describe_backend("cpu")


# --------------------------------------------------------------------------------------------------
# Are the Triton kernels right? They run in a process of their own, since TRITON_INTERPRET must be
# set before they are decorated: test_triton_kernels starts this file as a script.

class Rounds(NamedTuple):
    """A case of the backward kernel with short chunks, so that it takes several rounds.

    hot: the share of reads that hit one slot.
    """
    N: int
    R: int
    S: int
    D: int
    chunk: int
    hot: float = 0.0


ROUNDS = [
    Rounds(8, 8, 50, 20, chunk=4),
    Rounds(8, 8, 2, 8, chunk=4),
    Rounds(15, 4, 1000, 5, chunk=4, hot=0.5),
    Rounds(16, 4, 9, 3, chunk=4, hot=0.9),
    Rounds(7, 5, 4, 300, chunk=16),
    Rounds(20, 1, 1, 4, chunk=4),
]


def make_rounds(case, device):
    """values (S, D), indices (N, R), weights (N, R), grad_y (N, D), without NaN."""
    _, indices, weights, grad_y = make_case(*case[:4], device=device)
    values = torch.randn(case.S, case.D, device=device)
    is_hot = torch.rand(case.N, case.R).to(device) < case.hot
    indices = torch.where(is_hot, case.S // 2, indices)
    return values, indices, weights, grad_y


def check_rounds(case, device):
    """Slots whose lookups many programs share.

    Their parts are joined in rounds, with the same bits each time.
    """
    values, indices, weights, grad_y = make_rounds(case, device)
    nothing = torch.zeros(case.S, case.D, device=device)

    shares = weights[..., None].double() * grad_y[:, None].double()  # (N, R, D)
    want = nothing.double().index_add(0, indices.flatten(), shares.flatten(0, 1))  # (S, D)
    want_w = torch.einsum("nd,nrd->nr", grad_y.double(), values[indices].double())  # (N, R)

    got = nothing.clone()
    got_w = kernel.gather_backward_triton(grad_y, values, indices, weights, got, case.chunk)
    close(got, want, FLOAT32)
    close(got_w, want_w, FLOAT32)
    untouched = unread(indices, case.S)
    assert not got[untouched].any()

    again = nothing.clone()
    again_w = kernel.gather_backward_triton(grad_y, values, indices, weights, again, case.chunk)
    assert torch.equal(got, again)
    assert torch.equal(got_w, again_w)


class Spy:
    """Stands in for a kernel: launches it, and keeps (the number of programs, its arguments)."""

    def __init__(self, original):
        self.original = original
        self.launches = []

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.launches.append((grid[0], arguments))
            return self.original[grid](*arguments, **options)
        return launch


def check_hot_slot(device):
    """A slot that takes a tenth of all reads is the work of many programs, and of all alike.

    160 lookups in chunks of 8 are 20 programs, however the reads are spread. The 16 lookups of the
    hot slot fill 2 chunks, or one and two parts.
    """
    original = kernel.gather_backward_kernel
    edge_slots_at = original.arg_names.index("edge_slots")
    case = Rounds(N=10, R=16, S=1000, D=4, chunk=8)
    hot_slot = 500
    for hot_reads in (0, 16):
        values, indices, weights, grad_y = make_rounds(case, device)
        indices[indices == hot_slot] = hot_slot + 1
        indices.view(-1)[::10][:hot_reads] = hot_slot
        assert (indices == hot_slot).sum() == hot_reads

        spy = Spy(original)
        kernel.gather_backward_kernel = spy
        try:
            grad_values = torch.zeros(case.S, case.D, device=device)
            kernel.gather_backward_triton(grad_y, values, indices, weights, grad_values, case.chunk)
        finally:
            kernel.gather_backward_kernel = original

        programs, arguments = spy.launches[0]
        edge_slots = arguments[edge_slots_at].view(programs, 2)  # of the first slot, of the last
        sharing = (edge_slots == hot_slot).any(dim=1).sum().item()
        assert programs == 20
        assert hot_reads // case.chunk <= sharing <= hot_reads // case.chunk + 1


def check_topk(n, K, dtype, device):
    """Random scores and scores with ties: the selection, and its gradient, twice."""
    torch.manual_seed(n)
    random = torch.randn(2, 2, n)
    ties = torch.randint(-3, 4, (2, 2, n)).float()
    scores = torch.stack((random, ties), 1).to(device, dtype).requires_grad_()  # (2, 2, 2, n)
    best, slots = check_selection(scores, K)
    assert best.dtype == torch.float32

    grad = torch.randn(best.shape, device=device)
    got, = torch.autograd.grad(best, scores, grad, retain_graph=True)
    again, = torch.autograd.grad(best, scores, grad)
    want, = torch.autograd.grad(sums_at(scores.float(), slots), scores, grad)
    close(got, want, FLOAT32 if dtype == torch.float32 else 2 * BFLOAT16)
    assert torch.equal(got, again)
    assert got.dtype == dtype


def check_opcheck_gather(device):
    """torch's own checks of a custom operator: its shapes, its gradients, what it writes to."""
    values, indices, weights, grad_y = make_case(2, 3, 4, 7, device=device)
    values.nan_to_num_(1.0)
    inputs = (values.clone().requires_grad_(), indices, weights.clone().requires_grad_())
    torch.library.opcheck(torch.ops.nanomemory.gather.default, inputs)


def check_opcheck_gather_backward(device):
    values, indices, weights, grad_y = make_case(2, 3, 4, 7, device=device)
    values.nan_to_num_(1.0)
    torch.library.opcheck(torch.ops.nanomemory.gather_backward.default,
                          (grad_y, values, indices, weights))


def check_model(device):
    """Loss and gradients of a GPT whose two memory layers share a table: Triton's are torch's."""
    from model import GPT, GPTConfig
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=30, block_size=8, n_layer=2, n_head=2, n_embd=16,
                          ffn="memory", mem_layers=(0, 1), mem_n_keys=6, mem_topk=3, mem_heads=2))
    model.to(device)
    idx = torch.randint(30, (2, 3), device=device)  # (B, T)
    runs = []
    for name in ("torch", "triton"):
        kernel.backend(name)
        loss = model(idx, idx)[1]  # ()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        runs.append((loss.detach(), *gradients))
    for want, got in zip(*runs):
        close(got, want, 10 * FLOAT32)


def triton_checks(device):
    """{name: a function without arguments}"""
    checks = {}
    # The interpreter truncates where it stores bfloat16, instead of rounding.
    for dtype in DTYPES.values() if not kernel.INTERPRETED else [torch.float32]:
        for name, case in CASES.items():
            checks[f"gather, {name}, {dtype}"] = functools.partial(
                check_gather, case, dtype, device)
    for case in ROUNDS:
        checks[f"backward in rounds, {case}"] = functools.partial(check_rounds, case, device)
    checks["backward, a hot slot"] = functools.partial(check_hot_slot, device)
    sizes = [(1, 1), (7, 7), (40, 16)]
    if not kernel.INTERPRETED:
        sizes.append((1024, 32))  # that takes several warps
    for n, K in sizes:
        for dtype in DTYPES.values():
            checks[f"topk_sums, {K} of {n}, {dtype}"] = functools.partial(
                check_topk, n, K, dtype, device)
    checks["opcheck gather"] = functools.partial(check_opcheck_gather, device)
    checks["opcheck gather_backward"] = functools.partial(check_opcheck_gather_backward, device)
    checks["torch.compile"] = functools.partial(check_compile, device)
    checks["a whole model"] = functools.partial(check_model, device)
    return checks


def run_triton_checks(device, part, parts):
    """Run every parts-th check from number `part` on. A line for each. Returns how many failed."""
    kernel.backend("triton")
    print(kernel.describe_backend(device))
    checks = list(triton_checks(device).items())[part::parts]
    failed = 0
    for name, check in checks:
        try:
            check()
            print("ok  ", name)
        except Exception as error:
            failed += 1
            print("FAIL", name, type(error).__name__, str(error)[:500])
    print(f"{len(checks)} checks, {failed} failed")
    return failed


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_triton_kernels(device):
    if kernel.triton is None:
        pytest.skip(kernel.TRITON_MISSING)
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU: the kernels were interpreted only")
    interpret = "1" if device == "cpu" else "0"
    env = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": interpret}
    # The interpreter is slow and uses one core, so two processes take half of the checks each.
    processes = [subprocess.Popen([sys.executable, __file__, device, str(part), "2"], env=env,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                 for part in range(2)]
    printed = [process.communicate()[0] for process in processes]
    for process, text in zip(processes, printed):
        assert process.returncode == 0, text
    # 6 selections at least, the hot slot, 2 opchecks, torch.compile and the model.
    expected = len(CASES) + len(ROUNDS) + 6 + 1 + 2 + 1 + 1
    assert "".join(printed).count("ok  ") >= expected, printed


# --------------------------------------------------------------------------------------------------
# Do they build for a GPU, and into what?

class Build(NamedTuple):
    """A kernel as it is compiled for a launch, and what to expect of it."""
    kernel: str
    signature: str  # the types of its arguments, * is a pointer
    constants: dict  # the arguments that the compiler knows
    warps: int
    wide: int  # 16-byte loads and stores, at least
    registers: int  # of a thread, at most


def gather_build(number, D):
    """The forward kernel for rows of D numbers of type "fp32" or "bf16"."""
    rows, dims, warps = kernel.tile(D)
    bytes_a_thread = rows * dims * (4 if number == "fp32" else 2) // (32 * warps)
    return Build("gather_kernel", f"*{number} *i32 *fp32 *{number} i32 i32",
                 dict(BLOCK_R=rows, BLOCK_D=dims), warps, wide=bytes_a_thread // 16, registers=96)


def backward_build(grad_y, values, wide, **constants):
    """The backward kernel, for the types of grad_y and of the values."""
    return Build("gather_backward_kernel",
                 f"*{grad_y} *{values} *fp32 *i32 *i32 *fp32 *fp32 *fp32 *i32 i32 i32 i32",
                 dict(constants, BLOCK_D=256), warps=1, wide=wide, registers=64)


def all_builds():
    builds = {}
    for number in ("fp32", "bf16"):
        for D in (1024, 768, 64):
            builds[f"gather {number} {D}"] = gather_build(number, D)
        # A thread loads four numbers at once: 16 bytes of float32, 8 bytes of bfloat16. grad_values
        # and the edges are float32 always.
        wide = 10 if number == "fp32" else 6
        builds[f"backward {number}"] = backward_build(number, number, wide, CHUNK=128, R=128)
        builds[f"topk {number}"] = Build(
            "topk_sums_kernel", f"*{number} *i64 *fp32 *i32 i32 i32 i32 i32",
            dict(BLOCK_N=256, BLOCK_K=32, BLOCK_M=128), warps=1, wide=2, registers=128)
        builds[f"topk backward {number}"] = Build(
            "topk_sums_backward_kernel", f"*fp32 *i32 *{number} i32 i32 i32",
            dict(BLOCK_N=1024, BLOCK_K=32, BLOCK_J=32), warps=1,
            wide=8 if number == "fp32" else 4, registers=64)
        # Later rounds: what was grad_y are float32 edges, one read a "token". Triton makes a
        # constant of an argument that is 1.
        builds[f"backward {number}, edges"] = backward_build(
            "fp32", number, wide=10 if number == "fp32" else 8, CHUNK=16, R=1)
    return builds


BUILDS = all_builds() if kernel.triton is not None else {}
compiles = pytest.mark.skipif(kernel.triton is None or kernel.INTERPRETED,
                              reason="there is nothing to compile: no Triton, or interpreted")


def compile_kernel(build, arch):
    """Compile without a GPU, as a launch would. Returns (its PTX, what the assembler says of it).

    A launch tells the compiler which pointers and integers are divisible by 16. Here all are.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    function = getattr(kernel, build.kernel)
    names = [p.name for p in function.params]
    kinds = dict(zip(names, build.signature.split())) | dict.fromkeys(build.constants, "constexpr")
    divisible = {}
    for i, name in enumerate(names):
        if kinds[name][0] in "*i":
            divisible[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature=kinds, constexprs=build.constants, attrs=divisible)
    knobs = kernel.triton.knobs
    log = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.compilation.always_compile = True  # what comes from the cache has no log
        knobs.nvidia.dump_ptxas_log = True
        compiled = kernel.triton.compile(source, target=GPUTarget("cuda", arch, 32),
                                         options=dict(num_warps=build.warps))
    return compiled.asm["ptx"], log.getvalue()


@pytest.mark.slow
@compiles
@pytest.mark.parametrize("arch", [80, 90], ids=["A100", "H100"])
@pytest.mark.parametrize("name", BUILDS)
def test_kernels_build_for_gpus(name, arch):
    build = BUILDS[name]
    ptx, log = compile_kernel(build, arch)

    def number(pattern):
        return int(re.search(pattern, log)[1])
    assert number(r"(\d+) bytes spill stores") == 0
    assert number(r"(\d+) bytes spill loads") == 0
    assert number(r"Used (\d+) registers") <= build.registers
    wide = re.findall(r"(?:ld|st)\S*\.global\S*\.v(?:4\.b32|2\.b64)", ptx)
    assert len(wide) >= build.wide, "loads of less than 16 bytes"
    # Without float atomics there are the same bits on every run.
    assert "atom" not in ptx
    assert "red.global" not in ptx


# --------------------------------------------------------------------------------------------------
# Is each kernel given what was built above?

class Recorder:
    """Stands in for a kernel: does not run it, and keeps its arguments by name."""

    def __init__(self, name, launches):
        self.name = name
        self.names = [p.name for p in getattr(kernel, name).params]
        self.launches = launches

    def __getitem__(self, grid):
        return self

    def __call__(self, *arguments, num_warps=4):
        assert len(arguments) == len(self.names), self.name
        arguments = dict(zip(self.names, arguments))
        if "edge_slots" in arguments:  # the caller reads these, so they must be slots
            arguments["edge_slots"].zero_()
        self.launches.append((self.name, arguments))


KERNELS = ("gather_kernel", "gather_backward_kernel", "topk_sums_kernel",
           "topk_sums_backward_kernel")


@pytest.fixture
def launches(monkeypatch):
    """A list that fills with (kernel, {argument: what it is}) instead of running kernels."""
    if kernel.triton is None:
        pytest.skip(kernel.TRITON_MISSING)
    if kernel.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set")
    kept = []
    for name in KERNELS:
        monkeypatch.setattr(kernel, name, Recorder(name, kept))
    monkeypatch.setattr(kernel, "uses_triton", lambda device: True)
    return kept


SHORT = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64"}


def pointer_types(launches):
    """{(kernel, types of its tensors)}"""
    found = set()
    for name, arguments in launches:
        tensors = [x for x in arguments.values() if torch.is_tensor(x)]
        found.add((name, *(SHORT[x.dtype] for x in tensors)))
    return found


def built_pointer_types():
    found = set()
    for build in BUILDS.values():
        pointers = [kind for kind in build.signature.split() if kind[0] == "*"]
        found.add((build.kernel, *pointers))
    return found


def test_operations_launch_what_was_built(launches):
    """Shapes and types of what the operations return, and of what they give to the kernels."""
    for dtype in DTYPES.values():
        values = torch.zeros(900, 48, dtype=dtype)
        indices = torch.zeros(40, 8, dtype=torch.int32)
        weights = torch.zeros(40, 8)
        y = torch.ops.nanomemory.gather(values, indices, weights)
        assert (y.shape, y.dtype) == ((40, 48), dtype)
        grad_values, grad_w = torch.ops.nanomemory.gather_backward(y, values, indices, weights)
        assert (grad_values.shape, grad_values.dtype) == ((900, 48), torch.float32)
        assert (grad_w.shape, grad_w.dtype) == ((40, 8), torch.float32)

        scores = torch.zeros(2, 40, 4, 30, dtype=dtype)
        best, slots = torch.ops.nanomemory.topk_sums(scores, 8)
        assert (best.shape, best.dtype) == ((40, 4, 8), torch.float32)
        assert (slots.shape, slots.dtype) == ((40, 4, 8), torch.int32)
        grad = torch.ops.nanomemory.topk_sums_backward(best, slots.zero_(), 30, dtype)
        assert (grad.shape, grad.dtype) == ((2, 40, 4, 30), dtype)
    assert pointer_types(launches) == built_pointer_types()


def test_all_is_made_on_the_device(launches):
    """On tensors of the device "meta", which have a shape and no numbers.

    What the functions forget to make there is on the CPU, and a GPU could not read it.
    """
    meta = torch.device("meta")
    for dtype in DTYPES.values():
        values = torch.empty(900, 48, dtype=dtype, device=meta)
        indices = torch.empty(40, 8, dtype=torch.int32, device=meta)
        weights = torch.empty(40, 8, device=meta)
        grad_values = torch.empty(900, 48, device=meta)
        y = kernel.gather_triton(values, indices, weights)
        grad_w = kernel.gather_backward_triton(y, values, indices, weights, grad_values)
        scores = torch.empty(2, 40, 4, 30, dtype=dtype, device=meta)
        best, slots = kernel.topk_sums_triton(scores, 8)
        grad = kernel.topk_sums_backward_triton(best, slots, 30, dtype)
        assert {x.device for x in (y, grad_w, best, slots, grad)} == {meta}
    assert {name for name, _ in launches} == set(KERNELS)
    for name, arguments in launches:
        for argument, x in arguments.items():
            if torch.is_tensor(x):
                assert x.device == meta, f"{argument} of {name}"
                assert x.is_contiguous(), f"{argument} of {name}"


def test_backward_rounds_shrink(launches):
    """Each program leaves two edges, which are the next round's lookups, until one program is left.

    16,384 lookups in chunks of 128 are 128 programs; 256 edges in chunks of 16 are 16; then 2, 1.
    """
    indices = torch.zeros(128, 128, dtype=torch.int32)
    kernel.gather_backward_triton(torch.zeros(128, 4), torch.zeros(9, 4), indices,
                                  torch.zeros(128, 128), torch.zeros(9, 4))
    rounds = [(x["L"], x["CHUNK"], x["R"]) for _, x in launches]
    assert rounds == [(16384, 128, 128), (256, 16, 1), (32, 16, 1), (4, 16, 1)]


@compiles
@pytest.mark.parametrize("n, K", [(1, 1), (7, 1), (9, 4)])
def test_selection_of_any_size_builds(n, K, launches, monkeypatch):
    """With the sizes that a launch would take: Triton 3.6 cannot sort a single number."""
    torch.ops.nanomemory.topk_sums(torch.zeros(2, 3, n), K)
    slots = torch.zeros(3, K, dtype=torch.int32)
    torch.ops.nanomemory.topk_sums_backward(torch.zeros(3, K), slots, n, torch.float32)
    monkeypatch.undo()  # the kernels themselves again

    assert [name for name, _ in launches] == ["topk_sums_kernel", "topk_sums_backward_kernel"]
    signatures = {build.kernel: build.signature for build in BUILDS.values()
                  if "bf16" not in build.signature}
    for name, arguments in launches:
        constants = {}
        for argument, x in arguments.items():
            is_one = not torch.is_tensor(x) and x == 1  # Triton makes a constant of it
            if argument.startswith("BLOCK") or is_one:
                constants[argument] = x
        build = Build(name, signatures[name], constants, warps=1, wide=0, registers=255)
        ptx, _ = compile_kernel(build, arch=90)
        assert "st.global" in ptx


if __name__ == "__main__":
    torch.set_num_threads(1)
    part, parts = [int(number) for number in sys.argv[2:]] or (0, 1)  # all of them
    sys.exit(run_triton_checks(sys.argv[1], part, parts) > 0)
