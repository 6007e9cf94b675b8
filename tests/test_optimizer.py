"""The table's optimizer: AdamW's formula, rounding that keeps the mean, 10 bytes a value.

S slots · D value dim · W columns of a table that one rank holds
"""
import shutil

import pytest
import torch

import train
from memory import MemoryTable, ProductKeyMemory
from train import TableAdamW, adamw_bfloat16_, round_randomly, scramble

BETAS = (0.9, 0.99)


def close(got, want, tolerance=1e-5):
    assert got.shape == want.shape
    error = (got - want).abs().max().item()
    scale = want.abs().max().item()
    assert error <= tolerance * scale, f"error {error:.2e} > {tolerance:.0e} of {scale:.2e}"


def make_case(S=30, W=100):
    """A table in the middle of training: values, grad_sum, exp_avg, exp_avg_sq (S, W)."""
    torch.manual_seed(0)
    values = torch.randn(S, W).bfloat16()
    grad_sum = torch.randn(S, W)
    exp_avg = (0.1 * torch.randn(S, W)).bfloat16()
    exp_avg_sq = (0.1 * torch.rand(S, W)).bfloat16()
    return values, grad_sum, exp_avg, exp_avg_sq


def formula(values, grad_sum, exp_avg, exp_avg_sq, step, lr, scale):
    """AdamW without decay in float32 -> values, exp_avg, exp_avg_sq."""
    beta1, beta2 = BETAS
    g = grad_sum * scale
    m = beta1 * exp_avg.float() + (1 - beta1) * g
    v = beta2 * exp_avg_sq.float() + (1 - beta2) * g.square()
    update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + 1e-8)
    return values.float() - lr * update, m, v


# ---- adamw_bfloat16_

def test_a_step_is_the_formula_rounded_without_drift():
    case = make_case()
    want = formula(*case, step=7, lr=1e-2, scale=0.5)
    values, grad_sum, exp_avg, exp_avg_sq = case
    adamw_bfloat16_(*case, 7, 1e-2, *BETAS, scale=0.5)
    assert (grad_sum == 0).all()
    for got, right in zip((values, exp_avg, exp_avg_sq), want):
        off = (got.float() - right) / right.abs()
        assert off.abs().max() <= 2**-7, "more than one place of bfloat16"
        assert off.abs().max() > 2**-9, "rounded to the nearest, not randomly"
        assert abs(off.mean()) < 5 * 2**-8 / 3000**0.5, "rounded in one direction"


def test_slices_round_as_the_whole_table_does():
    whole = make_case()
    slices = [[x[:, dims].contiguous() for x in whole] for dims in (slice(0, 20), slice(20, 100))]
    adamw_bfloat16_(*whole, 7, 1e-2, *BETAS, scale=0.5)
    for first, part in zip((0, 20), slices):
        adamw_bfloat16_(*part, 7, 1e-2, *BETAS, scale=0.5, first_column=first)
        for got, want in zip(part, whole):
            assert torch.equal(got, want[:, first:first + got.shape[1]])


def test_a_large_table_goes_in_parts(monkeypatch):
    """More than 2^20 numbers, in parts of some rows, are stepped as in one piece."""
    case = make_case(S=2100, W=512)
    rows = (slice(0, 2), slice(2047, 2050), slice(2098, 2100))
    want = formula(*case, step=1, lr=1e-2, scale=1.0)[0]
    again = [x.clone() for x in case]
    adamw_bfloat16_(*case, 1, 1e-2, *BETAS)
    assert (case[1] == 0).all()
    for here in rows:
        close(case[0][here].float(), want[here], 2**-7)
    calls = []
    update = train.update_bfloat16_

    def counting(values, *args, **kwargs):
        calls.append(len(values))
        update(values, *args, **kwargs)
    monkeypatch.setattr(train, "update_bfloat16_", counting)
    adamw_bfloat16_(*again, 1, 1e-2, *BETAS)
    assert calls == [2048, 52]
    assert torch.equal(again[0], case[0]), "the same bits again"


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1, -0x400000])
def test_nan_stays_nan(bits):
    """Also a NaN of all ones, as GPUs make it: one more would carry over into the sign."""
    values, exp_avg, exp_avg_sq = torch.zeros(3, 1, 64, dtype=torch.bfloat16)
    grad_sum = torch.full((1, 64), bits, dtype=torch.int32).view(torch.float32)
    adamw_bfloat16_(values, grad_sum, exp_avg, exp_avg_sq, 1, 1e-2, *BETAS)
    for x in (values, exp_avg, exp_avg_sq):
        assert x.isnan().all()


def test_random_rounding_keeps_the_mean():
    """A thousand steps of 1e-5, where the neighbours of 1 in bfloat16 are 1/128 apart."""
    values = torch.ones(100, 100, dtype=torch.bfloat16)
    to_the_nearest = (values.float() + 1e-5).bfloat16()
    assert torch.equal(values, to_the_nearest), "to the nearest, nothing would ever move"
    exp_avg = torch.zeros_like(values)
    exp_avg_sq = torch.zeros_like(values)
    for step in range(1, 1001):  # the gradient is always the same, so AdamW moves by lr
        grad_sum = torch.full((100, 100), -0.5)
        adamw_bfloat16_(values, grad_sum, exp_avg, exp_avg_sq, step, 1e-5, *BETAS)
    moved = values.double() - 1  # 0 or 1/128 or, twice lucky, more
    spread = (moved.var() / moved.numel()).sqrt()
    assert abs(moved.mean() - 0.01) < 5 * spread < 1e-3, (moved.mean(), spread)


def test_it_follows_float32():
    torch.manual_seed(0)
    values = torch.randn(50, 40).bfloat16()
    exp_avg = torch.zeros_like(values)
    exp_avg_sq = torch.zeros_like(values)
    twin = torch.nn.Parameter(values.float())
    optimizer = torch.optim.AdamW([twin], lr=1e-2, betas=BETAS, weight_decay=0.0)
    for step in range(1, 201):
        twin.grad = torch.randn(50, 40) + twin.detach()  # noisy, and pulling towards zero
        adamw_bfloat16_(values, twin.grad.clone(), exp_avg, exp_avg_sq, step, 1e-2, *BETAS)
        optimizer.step()
    off = (values.float() - twin.detach()).abs().mean()
    unrelated = (twin.detach() - torch.randn(50, 40)).abs().mean()
    assert off < 0.02 < 0.3 < unrelated


def test_it_compiles_once_for_all_steps(monkeypatch):
    """With torch.compile the same bits, and no new graph from step to step."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    compiled = torch.compile(train.update_bfloat16_, backend=backend, fullgraph=True)
    monkeypatch.setattr(train, "compiled_update", lambda: compiled)
    plain = make_case()
    fast = make_case()
    for step in range(1, 6):
        for case, compile in ((plain, False), (fast, True)):
            case[1].normal_(generator=torch.Generator().manual_seed(step))
            adamw_bfloat16_(*case, step, 1e-2 / step, *BETAS, scale=0.5, compile=compile)
    assert len(graphs) == 1
    assert all(torch.equal(a, b) for a, b in zip(plain, fast))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler for torch.compile")
def test_compiled_code_gives_the_same_numbers():
    """What torch.compile makes of it on a CPU: the compiler may order float32 operations anew."""
    plain = make_case()
    fast = make_case()
    adamw_bfloat16_(*plain, 3, 1e-2, *BETAS, scale=0.5)
    adamw_bfloat16_(*fast, 3, 1e-2, *BETAS, scale=0.5, compile=True)
    for a, b in zip(plain, fast):
        same = (a == b).float().mean()
        assert same > 0.99, f"{1 - same:.1%} of the numbers differ"
        assert ((a - b).abs() <= 2**-7 * b.abs()).all(), "more than one place of bfloat16"


# ---- the noise

def noise_of(step, rows=64, columns=64):
    """The 32 bits for each place, as update_bfloat16_ makes them."""
    row = torch.arange(rows)[:, None]
    return scramble(scramble(scramble(torch.tensor(step)) ^ row) ^ torch.arange(columns))


def parts_of(noise):
    """The 16 bits for values, exp_avg and exp_avg_sq, scaled to a mean of 0 and a variance of 1."""
    parts = (noise & 0xFFFF, noise >> 16, scramble(noise + 1) & 0xFFFF)
    return [(part.double() / 2**16 - 0.5) * 12**0.5 for part in parts]


def correlation(a, b):
    return (a * b).mean().item()


def test_the_noise_is_uniform():
    for step in (1, 2, 5000):
        for part in parts_of(noise_of(step)):
            bins = torch.histc(part, 64)  # 4,096 numbers: 64 in each bin
            chi_square = ((bins - 64).square() / 64).sum()
            assert 20 < chi_square < 130  # 63 degrees of freedom: mean 63, deviation 11


def test_the_noise_of_neighbours_is_unrelated():
    """Rows, columns, steps and the three results. 4,096 numbers: five deviations are 0.08."""
    now = parts_of(noise_of(7))
    later = parts_of(noise_of(8))
    for i, part in enumerate(now):
        assert abs(correlation(part[1:], part[:-1])) < 0.08
        assert abs(correlation(part[:, 1:], part[:, :-1])) < 0.08
        for other in (*now[:i], *later):
            assert abs(correlation(part, other)) < 0.08
    assert noise_of(7).unique().numel() > 0.99 * 64 * 64


def test_scramble_by_hand():
    x = 12345
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) % 2**32
    x ^= x >> 16
    assert scramble(torch.tensor(12345)).item() == x
    assert scramble(torch.tensor(12345 + 2**32)).item() == x, "the lower 32 bits count"


def test_round_randomly_by_hand():
    """Of 1 + 1/4 of the way to the next number, noise in the upper quarter rounds up."""
    x = torch.full((4,), 1 + 2**-7 / 4)
    noise = torch.tensor([0, 2**16 * 3 // 4 - 1, 2**16 * 3 // 4, 2**16 - 1])
    assert round_randomly(x, noise).tolist() == [1, 1, 1 + 2**-7, 1 + 2**-7]


# ---- TableAdamW

def test_a_bfloat16_table_takes_ten_bytes_a_value():
    table = MemoryTable(6, 12, torch.bfloat16)
    optimizer = TableAdamW([table], lr=1e-2, betas=BETAS)
    state = optimizer.state[table.values]
    held = (table.values, table.grad_sum, state["exp_avg"], state["exp_avg_sq"])
    assert sum(x.nbytes for x in held) == 10 * table.values.numel()


def test_a_bfloat16_table_sums_gradients_in_float32_and_clips_them():
    torch.manual_seed(0)
    table = MemoryTable(6, 12)
    lean = MemoryTable(6, 12, torch.bfloat16)
    lean.values.data.copy_(table.values.data)
    table.values.data.copy_(lean.values.data)  # the same numbers in both
    layer = ProductKeyMemory(12, table, heads=3, topk=4)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.5)
    optimizer = TableAdamW([lean], lr=1e-2, betas=BETAS, clip=0.05)
    state = optimizer.state[lean.values]
    for _ in range(3):  # layers and micro-steps add up
        x = torch.randn(2, 5, 12)
        for tables in ([table], [lean]):
            layer.tables = tables
            layer(x).square().sum().backward()
        # y, and with it grad_y, is rounded to bfloat16.
        close(lean.grad_sum, table.values.grad, 0.05)
    before = lean.values.clone()
    assert lean.grad_sum.norm() > 0.05, "there is something to clip"
    clipped = lean.grad_sum * 0.05 / lean.grad_sum.norm()
    close(optimizer.step(), table.values.grad.norm(), 0.05)
    close(state["exp_avg"].float(), 0.1 * clipped, 2**-7)
    assert not torch.equal(lean.values, before)
    assert (lean.grad_sum == 0).all()
    assert state["step"] == 1
    assert lean.values.grad is None
    # AdamW's first step is the rate, but for rounding.
    moved = lean.values.double() - before.double()
    sign = table.values.grad.sign()
    assert (moved * sign)[sign != 0].mean().item() == pytest.approx(-1e-2, abs=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_goes_on_from_its_state(dtype):
    runs = []
    for stop in (None, 2):
        torch.manual_seed(0)
        table = MemoryTable(3, 4, dtype)
        optimizer = TableAdamW([table], lr=1e-2, betas=BETAS)
        for step, grad in enumerate(torch.randn(5, 9, 4)):
            if step == stop:
                saved = [{name: [x] for name, x in t.items()} for t in optimizer.slices()]
                other = MemoryTable(3, 4, dtype)
                other.load_state_dict(table.state_dict())
                table = other
                optimizer = TableAdamW([table], lr=1e-2, betas=BETAS)
                optimizer.load(saved, step)
            if table.grad_sum is None:
                table.values.grad = grad.clone()
            else:
                table.grad_sum += grad
            optimizer.step()
        runs.append(table.values)
    assert torch.equal(*runs)
