"""The gather and the product-key selection against their definitions.

    pytest tests/test_kernel.py
    TRITON_INTERPRET=1 PYTHONPATH=. python tests/test_kernel.py cpu     the Triton kernels alone, interpreted; on a GPU: cuda, no variable

N tokens · R reads per token · S slots · D value dim · K slots selected · n half-keys per side
"""
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernel
from kernel import gather, gather_reference, group_by_slot, topk_indices, topk_sums

ROOT = Path(__file__).resolve().parents[1]
FLOAT32, BFLOAT16 = 1e-5, 2**-8  # tolerance, of the largest number: 2^-8 is one rounding to bfloat16's 8 bits
CASES = [  # N, R, S, D: odd sizes, sizes around a tile, one of everything, none of it; hot: every read hits the last slot
    (1, 1, 1, 1, ""), (5, 3, 1000, 1, ""), (5, 128, 300, 7, ""), (5, 32, 2, 48, ""), (5, 3, 10, 100, ""), (5, 1, 3, 768, ""),
    (1, 128, 2, 768, ""), (2, 33, 40, 513, ""), (5, 32, 20, 100, "hot"), (5, 3, 2, 768, "hot"), (0, 3, 5, 7, ""), (5, 0, 5, 7, ""),
]


def close(got, want, tolerance):
    assert got.shape == want.shape
    if want.numel():
        error, scale = (got.double() - want.double()).abs().max().item(), want.double().abs().max().item()
        assert error <= tolerance * scale, f"error {error:.2e} > {tolerance:.0e} of {scale:.2e}"  # false for NaN too


def make_case(N, R, S, D, hot="", dtype=torch.float32, device="cpu"):
    """values (S, D), NaN where no one reads, indices (N, R), weights (N, R), grad_y (N, D)."""
    torch.manual_seed(N + R + S + D)
    indices = torch.full((N, R), S - 1) if hot else torch.randint(S, (N, R))
    values = torch.randn(S, D).to(dtype)
    values[unread(indices, S)] = math.nan
    return [x.to(device) for x in (values, indices, torch.randn(N, R), torch.randn(N, D).to(dtype))]


def unread(indices, S):
    return torch.bincount(indices.flatten(), minlength=S) == 0              # (S,) bool


def with_gradients(f, values, indices, weights, grad_y):
    """f's result (N, D), its gradient of values (S, D) and of weights (N, R)."""
    values, weights = values.detach().requires_grad_(), weights.detach().requires_grad_()
    y = f(values, indices, weights)
    return y.detach(), *torch.autograd.grad(y, (values, weights), grad_y)


def check_gather(N, R, S, D, hot, dtype=torch.float32, device="cpu"):
    """One case of gather on the backend in force: right, no leftovers of uninitialised memory, the same bits again, int32 as int64."""
    values, indices, weights, grad_y = case = make_case(N, R, S, D, hot, dtype, device)
    torch.use_deterministic_algorithms(True, warn_only=True)                # torch.empty is filled with NaN
    try:
        assert torch.empty(3).isnan().all()
        got, again = with_gradients(gather, *case), with_gradients(gather, values, indices.int(), weights, grad_y)
    finally:
        torch.use_deterministic_algorithms(False)
    want = with_gradients(gather_reference, values.double(), indices, weights.double(), grad_y.double())
    rounded = FLOAT32 if dtype == torch.float32 else BFLOAT16
    assert [x.dtype for x in got] == [dtype, dtype, torch.float32]
    for name, g, w, a, tolerance in zip(("y", "grad_values", "grad_weights"), got, want, again, (rounded, rounded, FLOAT32)):
        try:
            close(g, w, tolerance)
            assert torch.equal(g, a), "not the same bits with int32 indices, a second time"
        except AssertionError as e:
            raise AssertionError(f"{name}: {e}") from None
    assert (got[1][unread(indices, S)] == 0).all(), "grad_values: a slot that nobody read has a gradient"


def check_triton(device):
    """For a process of its own: TRITON_INTERPRET must be set before the kernels are decorated. A line per case; returns the failures."""
    kernel.backend("triton")
    print(kernel.describe_backend(device))
    dtypes = [torch.float32] if kernel.INTERPRETED else [torch.float32, torch.bfloat16]  # interpreted bfloat16 stores truncate
    checks = {f"gather {case} {dtype}": lambda case=case, dtype=dtype: check_gather(*case, dtype, device) for case in CASES for dtype in dtypes}
    values, indices, weights, grad_y = case = make_case(2, 3, 4, 7, device=device)
    values.nan_to_num_(1.0)
    grads = values.clone().requires_grad_(), indices, weights.clone().requires_grad_()
    checks["opcheck gather"] = lambda: torch.library.opcheck(torch.ops.nanomemory.gather.default, grads)
    checks["opcheck gather_backward"] = lambda: torch.library.opcheck(
        torch.ops.nanomemory.gather_backward.default, (grad_y, values, indices, weights))
    checks["torch.compile"] = lambda: check_compile(gather, case)
    failed = 0
    for name, check in checks.items():
        try:
            check()
            print("ok  ", name)
        except Exception as e:
            failed += 1
            print("FAIL", name, type(e).__name__, e)
    print(f"{len(checks)} cases, {failed} failed")
    return failed


def check_compile(f, case):
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")        # fullgraph: an error where the graph would break
    for got, want in zip(with_gradients(compiled, *case), with_gradients(f, *case)):
        close(got, want, FLOAT32)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_triton_kernels(device):
    if kernel.triton is None:
        pytest.skip(kernel.TRITON_MISSING)
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU: the kernels were interpreted only")
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1" if device == "cpu" else "0"}
    done = subprocess.run([sys.executable, __file__, device], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("ok  ") >= len(CASES) + 3, done.stdout + done.stderr


@pytest.fixture
def torch_path(monkeypatch):
    monkeypatch.setattr(kernel, "_backend", "torch")


def test_reference_is_the_formula():
    values, indices, weights, _ = make_case(3, 4, 5, 6)
    y = gather_reference(values, indices, weights)
    for t in range(3):
        close(y[t], sum(weights[t, r] * values[indices[t, r]] for r in range(4)), FLOAT32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gather_torch(torch_path, case, dtype):
    check_gather(*case, dtype)


def test_gather_torch_sums_bfloat16_in_float32(torch_path):
    values, indices, weights, grad_y = make_case(5, 128, 9, 48, dtype=torch.bfloat16)
    y, grad_values, grad_weights = with_gradients(gather, values, indices, weights, grad_y)
    wide = with_gradients(gather, values.float(), indices, weights, grad_y.float())
    assert torch.equal(y, wide[0].bfloat16()) and torch.equal(grad_values, wide[1].bfloat16()) and torch.equal(grad_weights, wide[2])


def test_gather_torch_gradcheck(torch_path):
    values, indices, weights, _ = make_case(4, 3, 5, 6)
    values = values.nan_to_num(1.0).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda v, w: gather(v, indices, w), (values, weights.double().requires_grad_()))


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)], ids=["values", "weights", "nothing"])
def test_gather_torch_gives_the_gradients_asked_for(torch_path, wanted):
    values, indices, weights, grad_y = make_case(4, 3, 5, 6)
    both = with_gradients(gather, values, indices, weights, grad_y)[1:]
    inputs = values.requires_grad_(wanted[0]), weights.requires_grad_(wanted[1])
    y = gather(inputs[0], indices, inputs[1])
    assert y.requires_grad == any(wanted)
    if y.requires_grad:
        y.backward(grad_y)
    for x, wants, grad in zip(inputs, wanted, both):
        assert torch.equal(x.grad, grad) if wants else x.grad is None


def test_gather_torch_non_contiguous(torch_path):
    torch.manual_seed(0)
    values, indices, weights = torch.randn(7, 6).T[::2], torch.randint(3, (4, 5)).T, torch.randn(5, 8)[:, ::2]  # (3, 7), (5, 4) twice
    grad_y = torch.randn(5, 1).expand(5, 7)
    assert not any(x.is_contiguous() for x in (values, indices, weights, grad_y))
    got = with_gradients(gather, values, indices, weights, grad_y)
    want = with_gradients(gather, *(x.contiguous() for x in (values, indices, weights, grad_y)))
    for g, w in zip(got, want):
        close(g, w, FLOAT32)


def test_gather_torch_compiles_without_graph_break(torch_path):
    check_compile(gather, make_case(4, 3, 5, 6))


@pytest.mark.parametrize("values, indices, weights", [((5,), (2, 3), (2, 3)), ((5, 4), (2, 3), (3, 2)), ((5, 4), (6,), (6,))], ids=str)
def test_gather_refuses_shapes_that_do_not_fit(values, indices, weights):
    with pytest.raises(ValueError, match="gather wants"):
        gather(torch.zeros(values), torch.zeros(indices, dtype=torch.int64), torch.zeros(weights))


def test_group_by_slot():
    torch.manual_seed(0)
    order, starts = group_by_slot(torch.tensor([[3, 1], [1, 0]]), 4)        # the docstring's example
    assert order.tolist() == [3, 1, 2, 0] and starts.tolist() == [0, 1, 3, 3, 4]
    for N, R, S in ((50, 8, 30), (3, 1, 1000), (0, 4, 3), (200, 4, 1)):
        for dtype in (torch.int32, torch.int64):
            indices = torch.randint(S, (N, R), dtype=dtype)
            order, starts = group_by_slot(indices, S)
            readers = [[p for p, slot in enumerate(indices.flatten().tolist()) if slot == s] for s in range(S)]
            assert [order[a:b].tolist() for a, b in zip(starts[:-1], starts[1:])] == readers and starts[0] == 0 and starts[-1] == N * R


def test_backend_switch(monkeypatch):
    monkeypatch.setattr(kernel, "_backend", "auto")
    monkeypatch.setattr(kernel, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernel.backend() == "auto" and not kernel.uses_triton("cpu")
    assert kernel.describe_backend("cpu").startswith("gather: torch's embedding_bag (")
    with pytest.raises(ValueError, match="'cuda' is not one of auto, triton, torch"):
        kernel.backend("cuda")
    with pytest.raises(ValueError, match="backend 'triton' cannot run here: .*(TRITON_INTERPRET=1|cannot be imported)"):
        kernel.backend("triton")
    assert kernel.backend() == "auto"                                       # a refused choice changes nothing
    assert kernel.backend("torch") == "torch" == kernel.backend()
    assert kernel.describe_backend("cpu") == "gather: torch's embedding_bag (chosen by backend())"
    monkeypatch.setattr(kernel, "triton", None)
    monkeypatch.setattr(kernel, "TRITON_MISSING", "triton cannot be imported (no module)")
    monkeypatch.setattr(kernel, "INTERPRETED", True)
    with pytest.raises(ValueError, match="cannot be imported"):
        kernel.backend("triton")
    kernel.backend("auto")
    assert "cannot be imported" in kernel.describe_backend("cpu")


# ---------------------------------------------------------------------------------------------------------------------------------
# selection

INF = math.inf
SCORES = {
    "normal": lambda n: torch.randn(6, n),
    "negative": lambda n: -torch.rand(6, n) - 1e-3,
    "ties": lambda n: torch.randint(-2, 3, (6, n)).float(),
    "zeros of both signs": lambda n: torch.tensor([0.0, -0.0, 1.0, -1.0])[torch.randint(4, (6, n))],
    "tiny and huge": lambda n: torch.tensor([1e-45, -1e-45, 1e-39, 3e38, -3e38])[torch.randint(5, (6, n))],
    "infinities": lambda n: torch.tensor([INF, -INF, 1.0, -1.0])[torch.randint(4, (6, n))],
}


@pytest.mark.parametrize("kind", SCORES)
def test_topk_indices(kind):
    torch.manual_seed(0)
    for n in (1, 2, 3, 7, 32, 65, 256, 1000):
        scores = SCORES[kind](n)
        before = scores.clone()
        for K in {1, min(2, n), (n + 1) // 2, n}:
            indices = topk_indices(scores, K)
            assert torch.equal(scores.gather(-1, indices), scores.topk(K).values), f"n = {n}, K = {K}"
            assert all(len(set(row)) == K for row in indices.tolist()), f"n = {n}, K = {K}: an index twice"
        assert torch.equal(scores, before)


def test_topk_indices_stay_in_range_for_nan():
    torch.manual_seed(0)
    scores = torch.where(torch.rand(6, 50) < 0.3, math.nan, torch.randn(6, 50))  # a diverging run must reach its own NaN check
    indices = topk_indices(scores, 20)
    assert indices.min() >= 0 and indices.max() < 50


@pytest.mark.parametrize("view", [lambda s: s.transpose(0, 2), lambda s: s[:, ::3], lambda s: s[..., 1::2], lambda s: s[:1].expand(5, 9, 8)])
def test_topk_indices_of_any_strides(view):
    torch.manual_seed(0)
    scores = view(torch.randn(6, 9, 8))
    assert torch.equal(topk_indices(scores, 2), scores.topk(2).indices)


def every_sum(scores):
    """All sums, scores (2, ..., n) -> (..., n*n)."""
    return (scores[0][..., :, None] + scores[1][..., None, :]).flatten(-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])  # numpy's sort, torch.topk
@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 33, 70])
def test_topk_sums_is_brute_force(n, dtype):
    torch.manual_seed(n)
    for K in range(1, n + 1):
        for scores in (torch.randn(2, 4, 3, n, dtype=dtype), torch.randint(-3, 4, (2, 5, n)).to(dtype)):  # the second has ties
            best, slots = topk_sums(scores, K)
            assert torch.equal(best, every_sum(scores).topk(K).values), f"K = {K}"
            assert torch.equal(best, every_sum(scores).gather(-1, slots)), f"K = {K}: the slots are not those of the sums"
            assert all(len(set(row)) == K for row in slots.flatten(0, -2).tolist()), f"K = {K}: a slot twice"


def test_topk_sums_gradient():
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)  # random: no two sums as near as gradcheck's steps
    assert torch.autograd.gradcheck(lambda s: topk_sums(s, 4)[0], scores)
    scores, grad = torch.randn(2, 5, 40, requires_grad=True), torch.randn(5, 9)
    got, want = (torch.autograd.grad(best, scores, grad)[0] for best in (topk_sums(scores, 9)[0], every_sum(scores).topk(9).values))
    close(got, want, 1e-6)


@pytest.mark.parametrize("K", [0, 4, -1])
def test_topk_sums_refuses_k(K):
    with pytest.raises(ValueError, match=f"K = {K} is not between 1 and the 3 half-keys"):
        topk_sums(torch.randn(2, 5, 3), K)


def test_candidates():
    assert len(kernel.candidates(32)[0]) == 119 and len(kernel.candidates(16)[0]) == 50
    assert sorted(zip(*kernel.candidates(3).tolist())) == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0)]


@pytest.mark.parametrize("K", range(2, 10))
def test_no_candidate_can_be_spared(K, monkeypatch):
    """For each pair (i, j) there are scores whose K best sums hold it: those of the first i+1 and j+1 half-keys, all others far below."""
    pairs = kernel.candidates(K)                                            # (2, M)
    rank = torch.arange(K)
    for m, (i, j) in enumerate(pairs.T.tolist()):
        scores = torch.stack([torch.where(rank <= last, -rank, -1000 - rank).float() for last in (i, j)])  # (2, K)
        right = every_sum(scores).topk(K).values
        monkeypatch.setattr(kernel, "candidates", lambda K: pairs)
        assert torch.equal(topk_sums(scores, K)[0], right)
        monkeypatch.setattr(kernel, "candidates", lambda K: torch.cat((pairs[:, :m], pairs[:, m + 1:]), dim=1))
        assert not torch.equal(topk_sums(scores, K)[0], right), f"({i}, {j}) is not needed"


def test_topk_sums_compiles_without_graph_break():
    torch._dynamo.reset()
    scores = torch.randn(2, 5, 9, requires_grad=True)
    compiled = torch.compile(topk_sums, fullgraph=True, backend="aot_eager")
    (best, slots), (want, want_slots) = compiled(scores, 4), topk_sums(scores, 4)
    assert torch.equal(best, want) and torch.equal(slots, want_slots)
    assert torch.equal(*(torch.autograd.grad(x.square().sum(), scores)[0] for x in (best, want)))
    torch.library.opcheck(torch.ops.nanomemory.topk_cpu.default, (torch.randn(3, 9), 4))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(check_triton(sys.argv[1]) > 0)
