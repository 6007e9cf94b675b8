"""The gather and the product-key selection against their definitions.

    pytest tests/test_kernel.py
    TRITON_INTERPRET=1 PYTHONPATH=. python tests/test_kernel.py cpu     the Triton kernels alone, interpreted; on a GPU: cuda, no variable

N tokens · R reads per token · S slots · D value dim · K slots selected · n half-keys per side
"""
import math
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernel
from kernel import gather, gather_reference, group_by_slot, topk_sums

ROOT = Path(__file__).resolve().parents[1]
FLOAT32, BFLOAT16 = 1e-5, 2**-8  # tolerance, of the largest number: 2^-8 is one rounding to bfloat16's 8 bits
CASES = [  # N, R, S, D: odd sizes, sizes around a tile, of 1, 2 and 4 warps, one of everything, none of it; hot: every read hits the last slot
    (1, 1, 1, 1, ""), (5, 3, 1000, 1, ""), (5, 128, 300, 7, ""), (5, 32, 2, 48, ""), (5, 3, 10, 100, ""), (5, 1, 3, 768, ""),
    (1, 128, 2, 768, ""), (2, 33, 40, 513, ""), (3, 16, 30, 512, ""), (2, 20, 30, 1024, ""), (5, 32, 20, 100, "hot"), (5, 3, 2, 768, "hot"), (0, 3, 5, 7, ""), (5, 0, 5, 7, ""),
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
    checks["opcheck gather"] = lambda: torch.library.opcheck(torch.ops.nanomemory.gather.default, (*grads, None))
    checks["opcheck gather_backward"] = lambda: torch.library.opcheck(
        torch.ops.nanomemory.gather_backward.default, (grad_y, values, indices, weights, torch.zeros(4, 7, device=device)))
    checks |= {f"backward in rounds {case}": lambda case=case: check_rounds(*case, device) for case in ROUNDS}
    checks |= {f"topk_sums {n} {K} {dtype}": lambda n=n, K=K, dtype=dtype: check_topk(n, K, dtype, device)
               for n, K in [(1, 1), (7, 7), (5, 3), (40, 16)] + [(1024, 32)] * (not kernel.INTERPRETED)  # that takes several warps
               for dtype in (torch.float32, torch.bfloat16)}
    checks["adamw_"] = lambda: check_adamw(device)
    checks["a whole model"] = lambda: check_model(device)
    checks["torch.compile"] = lambda: check_compile(gather, case)
    failed = 0
    for name, check in checks.items():
        try:
            check()
            print("ok  ", name)
        except Exception as e:
            failed += 1
            print("FAIL", name, type(e).__name__, str(e)[:500])
    print(f"{len(checks)} cases, {failed} failed")
    return failed


ROUNDS = [  # N, R, S, D, lookups a program, share of reads that hit one slot
    (40, 8, 50, 20, 4, 0.0), (40, 8, 2, 8, 4, 0.0), (30, 4, 1000, 5, 4, 0.5), (64, 4, 9, 3, 4, 0.9), (7, 5, 4, 300, 16, 0.0), (20, 1, 1, 4, 4, 0.0)]


def check_rounds(N, R, S, D, chunk, hot, device):
    """Slots whose lookups many programs share: their parts are joined in rounds, added to what was there, the same bits each time."""
    _, indices, weights, grad_y = make_case(N, R, S, D, device=device)
    indices = torch.where(torch.rand(N, R).to(device) < hot, S // 2, indices)
    values, before = torch.randn(S, D, device=device), torch.randn(S, D, device=device)
    shares = (weights[..., None].double() * grad_y[:, None].double()).flatten(0, 1)                      # (N*R, D)
    want = before.double().index_add(0, indices.flatten(), shares), torch.einsum("nd,nrd->nr", grad_y.double(), values[indices].double())
    sums = before.clone(), before.clone()
    got = [kernel.gather_backward_triton(grad_y, values, indices, weights, total, chunk) for total in sums]
    close(sums[0], want[0], FLOAT32)
    close(got[0], want[1], FLOAT32)
    assert torch.equal(*sums) and torch.equal(*got) and torch.equal(sums[0][unread(indices.cpu(), S)], before[unread(indices.cpu(), S)])


def check_topk(n, K, dtype, device):
    """Random scores, and scores with ties, against all n*n sums; the gradient, twice, against that of picking those sums."""
    torch.manual_seed(n)
    for scores in (torch.randn(2, 3, 2, n), torch.randint(-3, 4, (2, 3, 2, n)).float()):
        scores = scores.to(device, dtype).requires_grad_()
        every = every_sum(scores.float())
        best, slots = topk_sums(scores, K)
        assert best.dtype == torch.float32 and torch.equal(best, every.topk(K).values) and torch.equal(best, every.gather(-1, slots))
        assert all(len(set(row)) == K for row in slots.flatten(0, -2).tolist())
        grad = torch.randn(best.shape, device=device)
        got, again = (torch.autograd.grad(best, scores, grad, retain_graph=True)[0] for _ in range(2))
        close(got, torch.autograd.grad(every.gather(-1, slots), scores, grad)[0], FLOAT32 if dtype == torch.float32 else 2 * BFLOAT16)
        assert torch.equal(got, again) and got.dtype == dtype


def check_adamw(device):
    """A step against the formula in float32: each number within one place of bfloat16 of it, and no drift."""
    torch.manual_seed(0)
    p, m, v, g = torch.randn(30, 100).bfloat16(), (0.1 * torch.randn(30, 100)).bfloat16(), (0.1 * torch.rand(30, 100)).bfloat16(), torch.randn(30, 100)
    m32, v32 = 0.9 * m.float() + 0.1 * (0.5 * g), 0.99 * v.float() + 0.01 * (0.5 * g).square()
    p32 = p.float() - 1e-2 * (m32 / (1 - 0.9**7)) / ((v32 / (1 - 0.99**7)).sqrt() + 1e-8)
    p, g, m, v = (x.to(device) for x in (p, g, m, v))
    slices = [[x[:, dims].contiguous() for x in (p, g, m, v)] for dims in (slice(0, 20), slice(20, 100))]
    kernel.adamw_(p, g, m, v, 7, 1e-2, 0.9, 0.99, scale=0.5)
    assert (g == 0).all()
    for first, part in zip((0, 20), slices):                                # in slices, the same bits
        kernel.adamw_(*part, 7, 1e-2, 0.9, 0.99, scale=0.5, columns=(first, 100))
        assert all(torch.equal(x, y[:, first:first + x.shape[1]]) for x, y in zip(part, (p, g, m, v)))
    for got, want in ((p, p32), (m, m32), (v, v32)):
        off = (got.cpu().float() - want) / want.abs()
        assert off.abs().max() <= 2**-7 and abs(off.mean()) < 5 * 2**-8 / 3000**0.5 and off.abs().max() > 2**-9, off.abs().max()
    p, m, v = torch.zeros(3, 1, 64, dtype=torch.bfloat16, device=device)
    g = torch.full((1, 64), 2**31 - 1, dtype=torch.int32, device=device).view(torch.float32)             # NaN as GPUs make it
    kernel.adamw_(p, g, m, v, 1, 1e-2, 0.9, 0.99)
    assert all(x.isnan().all() for x in (p, m, v)), "NaN must not become a number"


def check_model(device):
    """Loss and gradients of a GPT whose two memory layers share a table: Triton's are torch's."""
    from model import GPT, GPTConfig
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=30, block_size=8, n_layer=2, n_head=2, n_embd=16, ffn="memory", mem_layers=(0, 1), mem_n_keys=6, mem_topk=3,
                          mem_heads=2)).to(device)
    idx, runs = torch.randint(30, (2, 8), device=device), []
    for name in ("torch", "triton"):
        kernel.backend(name)
        loss = model(idx, idx)[1]
        runs.append((loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))))
    for want, got in zip(*runs):
        close(got, want, 10 * FLOAT32)


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
    assert done.returncode == 0 and done.stdout.count("ok  ") >= len(CASES) + len(ROUNDS) + 13, done.stdout + done.stderr


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


def test_gather_of_a_few_bfloat16_rows(torch_path):
    values, indices, weights, _ = make_case(3, 4, 500, 6, dtype=torch.bfloat16)  # fewer reads than rows: they alone are widened
    close(gather(values, indices, weights), gather_reference(values.double(), indices, weights.double()), BFLOAT16)


def test_gather_adds_to_grad_sum(torch_path):
    values, indices, weights, grad_y = make_case(30, 4, 50, 6)
    want = with_gradients(gather, values, indices, weights, grad_y)
    weights, before = weights.requires_grad_(), torch.randn(50, 6)
    total = before.clone()
    for times in (1, 2):                                                    # over layers and micro-steps
        weights.grad = None
        gather(values.bfloat16(), indices, weights, total).backward(grad_y.bfloat16())
        close(total - before, times * want[1], BFLOAT16)
        close(weights.grad, want[2], 2 * BFLOAT16)
    assert torch.equal(total[unread(indices, 50)], before[unread(indices, 50)]) and unread(indices, 50).any()


def test_group_by_slot():
    slots, order = group_by_slot(torch.tensor([[3, 1], [1, 0]]), 4)         # the docstring's example
    assert slots.tolist() == [0, 1, 1, 3] and order.tolist() == [3, 1, 2, 0]
    torch.manual_seed(0)
    for N, R, S in ((50, 8, 30), (3, 1, 1000), (0, 4, 3), (200, 4, 1), (40, 3, 2**15), (40, 3, 2**15 + 1)):  # 2^15: what int16 holds
        for dtype in (torch.int32, torch.int64):
            indices = torch.randint(S, (N, R), dtype=dtype)
            indices[-1:] = S - 1
            slots, order = group_by_slot(indices, S)
            assert list(zip(slots.tolist(), order.tolist())) == sorted(zip(indices.flatten().tolist(), range(N * R)))


def test_backend_switch(monkeypatch):
    monkeypatch.setattr(kernel, "_backend", "auto")
    monkeypatch.setattr(kernel, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernel.backend() == "auto" and not kernel.uses_triton("cpu")
    assert kernel.describe_backend("cpu").startswith("memory: torch (")
    with pytest.raises(ValueError, match="'cuda' is not one of auto, triton, torch"):
        kernel.backend("cuda")
    with pytest.raises(ValueError, match="backend 'triton' cannot run here: .*(TRITON_INTERPRET=1|cannot be imported)"):
        kernel.backend("triton")
    assert kernel.backend() == "auto"                                       # a refused choice changes nothing
    assert kernel.backend("torch") == "torch" == kernel.backend()
    assert kernel.describe_backend("cpu") == "memory: torch (chosen by backend())"
    monkeypatch.setattr(kernel, "triton", None)
    monkeypatch.setattr(kernel, "TRITON_MISSING", "triton cannot be imported (no module)")
    monkeypatch.setattr(kernel, "INTERPRETED", True)
    with pytest.raises(ValueError, match="cannot be imported"):
        kernel.backend("triton")
    kernel.backend("auto")
    assert "cannot be imported" in kernel.describe_backend("cpu")


@pytest.mark.skipif(sys.platform != "linux" or "glibc" not in platform.libc_ver(), reason="glibc's alone")
def test_freed_memory_is_kept():
    """After some steps a block of 64 MiB has the pages of an earlier one, and meets no page faults (16,384 of 4 KiB)."""
    code = """if True:
        import resource, torch, kernel
        kernel.keep_freed_memory()
        for i in range(22):
            torch.ones(2**24)
            if i in (11, 21):
                print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert after - before < 1000


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


def every_sum(scores):
    """All sums, scores (2, ..., n) -> (..., n*n)."""
    return (scores[0][..., :, None] + scores[1][..., None, :]).flatten(-2)


@pytest.mark.parametrize("kind", SCORES)
def test_topk_sums_of_special_numbers(kind):
    torch.manual_seed(0)
    for n in (1, 2, 7, 65, 300, 512):                                       # 300: torch.topk's, 512: sorted in parts
        scores = torch.stack((SCORES[kind](n), torch.zeros(6, n)))          # (2, 6, n): zeros, since inf - inf is no number
        before = scores.clone()
        for K in {1, (n + 1) // 2, min(n, 70)}:
            for side in (scores, scores.flip(0)):
                best, slots = topk_sums(side, K)
                assert torch.equal(best, every_sum(side).topk(K).values) and torch.equal(best, every_sum(side).gather(-1, slots)), (n, K)
                assert all(len(set(row)) == K for row in slots.tolist()), f"n = {n}, K = {K}: a slot twice"
        assert torch.equal(scores, before)


def test_topk_sums_stays_in_range_for_nan():
    torch.manual_seed(0)
    for bits in (0x7FC00000, -0x400000, 0x7FFFFFFF, -1):                    # a diverging run must reach its own NaN check
        nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)     # ()
        scores = torch.where(torch.rand(2, 6, 50) < 0.3, nan, torch.randn(2, 6, 50))  # (2, 6, 50)
        _, slots = topk_sums(scores, 20)
        assert slots.min() >= 0 and slots.max() < 2500, bits


@pytest.mark.parametrize("view", [lambda s: s.transpose(0, 2), lambda s: s[:, ::3], lambda s: s[..., 1::2], lambda s: s[:1].expand(2, 9, 8)])
def test_topk_sums_of_any_strides(view):
    torch.manual_seed(0)
    scores = view(torch.randn(2, 9, 8))[:2]
    assert all(torch.equal(got, want) for got, want in zip(topk_sums(scores, 2), topk_sums(scores.contiguous(), 2)))
    assert torch.equal(topk_sums(scores, 2)[0], every_sum(scores).topk(2).values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])  # numpy's sort, torch.topk
@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 33, 70, 256, 512, 768])
def test_topk_sums_is_brute_force(n, dtype):
    torch.manual_seed(n)
    for K in range(1, n + 1) if n < 100 else (1, 40, n):
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
        monkeypatch.setattr(kernel, "candidates", lambda K, device="cpu": pairs)
        assert torch.equal(kernel.topk_sums_reference(scores, K)[0], right)
        monkeypatch.setattr(kernel, "candidates", lambda K, device="cpu": torch.cat((pairs[:, :m], pairs[:, m + 1:]), dim=1))
        assert not torch.equal(kernel.topk_sums_reference(scores, K)[0], right), f"({i}, {j}) is not needed"


def test_topk_sums_compiles_without_graph_break():
    torch._dynamo.reset()
    scores = torch.randn(2, 5, 9, requires_grad=True)
    compiled = torch.compile(topk_sums, fullgraph=True, backend="aot_eager")
    (best, slots), (want, want_slots) = compiled(scores, 4), topk_sums(scores, 4)
    assert torch.equal(best, want) and torch.equal(slots, want_slots)
    assert torch.equal(*(torch.autograd.grad(x.square().sum(), scores)[0] for x in (best, want)))
    torch.library.opcheck(torch.ops.nanomemory.topk_sums.default, (scores, 4))


# ---------------------------------------------------------------------------------------------------------------------------------
# the table's optimizer step

def test_adamw():
    check_adamw("cpu")


def test_random_rounding_keeps_the_mean():
    """A thousand steps of 1e-5 on numbers whose bfloat16 neighbours are 1/128 apart: to the nearest, nothing would ever move."""
    p = torch.ones(100, 100, dtype=torch.bfloat16)
    assert torch.equal(p, (p.float() + 1e-5).bfloat16())
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for step in range(1, 1001):                                             # the gradient is always the same: AdamW moves by lr
        kernel.adamw_(p, torch.full((100, 100), -0.5), m, v, step, 1e-5, 0.9, 0.99)
    moved = p.double() - 1                                                  # 0 or 1/128 or, twice lucky, more
    spread = (moved.var() / moved.numel()).sqrt()
    assert abs(moved.mean() - 0.01) < 5 * spread < 1e-3, (moved.mean(), spread)


def test_adamw_follows_float32():
    torch.manual_seed(0)
    p = torch.randn(50, 40).bfloat16()
    q = torch.nn.Parameter(p.float())
    optimizer, m, v = torch.optim.AdamW([q], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0), torch.zeros_like(p), torch.zeros_like(p)
    for step in range(1, 201):
        q.grad = torch.randn(50, 40) + q.detach()                           # noisy, and pulling towards zero
        kernel.adamw_(p, q.grad.clone(), m, v, step, 1e-2, 0.9, 0.99)
        optimizer.step()
    assert (p.float() - q.detach()).abs().mean() < 0.02 < 0.3 < (q.detach() - torch.randn(50, 40)).abs().mean()


# ---------------------------------------------------------------------------------------------------------------------------------
# do the kernels build for a GPU?

def build(kernel_name, signature, constants, arch, num_warps):
    """Compile without a GPU, as a launch would: pointers and integers divisible by 16. Returns (its PTX, what ptxas -v says)."""
    import contextlib
    import io
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    fn = getattr(kernel, kernel_name)
    names = [p.name for p in fn.params]
    kinds = dict(zip(names, signature.split())) | dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if kinds[name][0] in "*i"}
    source = ASTSource(fn, signature=kinds, constexprs=constants, attrs=aligned)
    with kernel.triton.knobs.compilation.scope(), kernel.triton.knobs.nvidia.scope(), contextlib.redirect_stdout(io.StringIO()) as log:
        kernel.triton.knobs.compilation.always_compile = True               # what comes from the cache has no log
        kernel.triton.knobs.nvidia.dump_ptxas_log = True
        ptx = kernel.triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(num_warps=num_warps)).asm["ptx"]
    return ptx, log.getvalue()


BUILDS = {}  # name: kernel, signature, constants, warps, 16-byte loads and stores at least, registers at most
if kernel.triton is not None:
    for number in ("fp32", "bf16"):
        for D in (1024, 768, 64):
            rows, block_d, warps = kernel.tile(D)
            BUILDS[f"gather {number} {D}"] = ("gather_kernel", f"*{number} *i32 *fp32 *{number} i32 i32",
                                              dict(BLOCK_R=rows, BLOCK_D=block_d), warps, rows * block_d * (4 if number == "fp32" else 2) // (16 * 32 * warps), 96)
        BUILDS[f"backward {number}"] = ("gather_backward_kernel", f"*{number} *{number} *fp32 *i32 *i32 *i32 *fp32 *fp32 *fp32 *i32 i32 i32",
                                        dict(CHUNK=128, BLOCK_D=256, FIRST=True), 1, 12 if number == "fp32" else 8, 64)
        BUILDS[f"topk {number}"] = ("topk_sums_kernel", f"*{number} *i64 *fp32 *i32 i32 i32 i32 i32",
                                    dict(BLOCK_N=256, BLOCK_K=32, BLOCK_M=128), 1, 2, 128)
        BUILDS[f"topk backward {number}"] = ("topk_sums_backward_kernel", f"*fp32 *i32 *{number} i32 i32 i32",
                                             dict(BLOCK_N=1024, BLOCK_K=32, BLOCK_J=32), 1, 8 if number == "fp32" else 4, 64)
    BUILDS["backward bf16, edges"] = ("gather_backward_kernel", "*fp32 *bf16 *fp32 *i32 *i32 *i32 *fp32 *fp32 *fp32 *i32 i32 i32",
                                      dict(CHUNK=16, BLOCK_D=256, FIRST=False), 1, 8, 64)
    BUILDS["adamw"] = ("adamw_kernel", "*i16 *i16 *i16 *fp32 *fp32 i32 i32 i32 i32 fp32 fp32 fp32 fp32 fp32 i32",
                       dict(BLOCK_S=1, BLOCK_W=1024), 4, 10, 128)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", BUILDS)
def test_kernels_build_for_gpus(name, arch):
    if kernel.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set: there is nothing to compile")
    kernel_name, signature, constants, warps, wide, registers = BUILDS[name]
    ptx, log = build(kernel_name, signature, constants, arch, warps)
    number = lambda pattern: int(re.search(pattern, log)[1])
    assert number(r"(\d+) bytes spill stores") == number(r"(\d+) bytes spill loads") == 0
    assert number(r"Used (\d+) registers") <= registers
    assert len(re.findall(r"(?:ld|st)\S*\.global\S*\.v(?:4\.b32|2\.b64)", ptx)) >= wide, "loads of less than 16 bytes"
    assert "atom" not in ptx and "red.global" not in ptx                   # no float atomics: the same bits on every run


@pytest.mark.parametrize("n, K", [(1, 1), (7, 1), (40, 16)])
def test_selection_of_any_size_builds(n, K, monkeypatch):
    """With the sizes that a launch would take: Triton 3.6 cannot sort a single number."""
    if kernel.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set: there is nothing to compile")
    launches = {}

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *arguments, num_warps: launches.update({self.name: arguments})
    with monkeypatch.context() as m:
        m.setattr(kernel, "uses_triton", lambda device: True)
        for name in ("topk_sums_kernel", "topk_sums_backward_kernel"):
            m.setattr(kernel, name, Recorder(name))
        torch.ops.nanomemory.topk_sums(torch.zeros(2, 3, n), K)
        torch.ops.nanomemory.topk_sums_backward(torch.zeros(3, K), torch.zeros(3, K, dtype=torch.int32), n, torch.float32)
    assert len(launches) == 2
    for name, signature in (("topk_sums_kernel", "*fp32 *i64 *fp32 *i32 i32 i32 i32 i32"), ("topk_sums_backward_kernel", "*fp32 *i32 *fp32 i32 i32 i32")):
        names = [p.name for p in getattr(kernel, name).params]
        constants = {k: x for k, x in zip(names, launches[name]) if not torch.is_tensor(x) and (k.startswith("BLOCK") or x == 1)}
        assert "st.global" in build(name, signature, constants, 90, 1)[0]


def test_launches(monkeypatch):
    """Without a GPU, on tensors that only say they are on one: all is made there, and each kernel is given what was built above."""
    if kernel.triton is None:
        pytest.skip(kernel.TRITON_MISSING)
    from torch._subclasses.fake_tensor import FakeTensorMode
    short, launches = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64"}, set()

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return self

        def __call__(self, *arguments, num_warps=4):
            tensors = [x for x in arguments if torch.is_tensor(x)]
            assert all(x.device.type == "cuda" and x.is_contiguous() for x in tensors), self.name
            launches.add((self.name, *(short[x.dtype] for x in tensors)))

    def gpu(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="cuda")
    for name in {build[0] for build in BUILDS.values()}:
        monkeypatch.setattr(kernel, name, Kernel(name))
    monkeypatch.setattr(kernel, "uses_triton", lambda device: device.type == "cuda")
    monkeypatch.setattr(kernel, "candidates", lambda K, device: gpu(2, 20, dtype=torch.int64))
    with FakeTensorMode(), torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            values, indices, weights = gpu(900, 48, dtype=dtype), gpu(40, 8, dtype=torch.int32), gpu(40, 8)
            for grad_sum in (None, gpu(900, 48)):
                y = kernel.gather_op._init_fn(values, indices, weights, grad_sum)
                _, grad_weights = kernel.gather_backward_op._init_fn(y, values, indices, weights, grad_sum)
                assert (y.shape, y.dtype, grad_weights.shape, grad_weights.dtype) == ((40, 48), dtype, (40, 8), torch.float32)
            best, slots = kernel.topk_sums_op._init_fn(gpu(2, 40, 4, 30, dtype=dtype), 8)
            assert (best.shape, best.dtype, slots.shape, slots.dtype) == ((40, 4, 8), torch.float32, (40, 4, 8), torch.int32)
            assert kernel.topk_sums_backward_op._init_fn(best, slots, 30, dtype).shape == (2, 40, 4, 30)
        kernel.adamw_(*(gpu(900, 48, dtype=t) for t in (torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16)), 1, 1e-3, 0.9, 0.99)
    assert launches == {(name, *(kind for kind in signature.split() if kind[0] == "*")) for name, signature, *_ in BUILDS.values()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(check_triton(sys.argv[1]) > 0)
