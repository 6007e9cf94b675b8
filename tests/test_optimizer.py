"""The optimizers: AdamW's formula, rounding that keeps the mean, 10 bytes a value of a table.

S slots · D value dim · W columns of a table that one rank holds
"""
import functools
import shutil

import pytest
import torch
import torch._inductor.config as inductor_config

import train
from memory import MemoryTable, ProductKeyMemory
from model import GPT
from support import table_adamw
from support.table_adamw import TableAdamW, adamw_bfloat16_, round_randomly, scramble

BETAS = (0.9, 0.99)
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=no_gpu)])


def close(got, want, tolerance=1e-5):
    assert got.shape == want.shape
    error = (got - want).abs().max().item()
    scale = want.abs().max().item()
    assert error <= tolerance * scale, f"error {error:.2e} > {tolerance:.0e} of {scale:.2e}"


def make_case(S=30, W=100, device="cpu"):
    """A table in the middle of training: values, grad_sum, exp_avg, exp_avg_sq (S, W)."""
    torch.manual_seed(0)
    values = torch.randn(S, W).bfloat16()
    grad_sum = torch.randn(S, W)
    exp_avg = (0.1 * torch.randn(S, W)).bfloat16()
    exp_avg_sq = (0.1 * torch.rand(S, W)).bfloat16()
    return [x.to(device) for x in (values, grad_sum, exp_avg, exp_avg_sq)]


def formula(values, grad_sum, exp_avg, exp_avg_sq, step, lr, scale):
    """AdamW without decay in float32 -> values, exp_avg, exp_avg_sq."""
    beta1, beta2 = BETAS
    g = grad_sum * scale
    m = beta1 * exp_avg.float() + (1 - beta1) * g
    v = beta2 * exp_avg_sq.float() + (1 - beta2) * g.square()
    update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + 1e-8)
    return values.float() - lr * update, m, v


# ---- adamw_bfloat16_

@each_device
def test_a_step_is_the_formula_rounded_without_drift(device):
    case = make_case(device=device)
    want = formula(*case, step=7, lr=1e-2, scale=0.5)
    values, grad_sum, exp_avg, exp_avg_sq = case
    adamw_bfloat16_(*case, 7, 1e-2, *BETAS, scale=0.5)
    assert (grad_sum == 0).all()
    for got, right in zip((values, exp_avg, exp_avg_sq), want):
        off = (got.float() - right) / right.abs()
        assert off.abs().max() <= 2**-7, "more than one place of bfloat16"
        assert off.abs().max() > 2**-9, "rounded to the nearest, not randomly"
        assert abs(off.mean()) < 5 * 2**-8 / 3000**0.5, "rounded in one direction"


@each_device
def test_the_scale_is_a_number_or_a_tensor(device):
    """The same bits. A tensor is what clipping gives: the CPU need not wait for it."""
    case = make_case(device=device)
    again = make_case(device=device)
    adamw_bfloat16_(*case, 7, 1e-2, *BETAS, scale=0.3)
    adamw_bfloat16_(*again, 7, 1e-2, *BETAS, scale=torch.tensor(0.3, device=device))
    for got, want in zip(again, case):
        assert torch.equal(got, want)


@each_device
def test_slices_round_as_the_whole_table_does(device):
    whole = make_case(device=device)
    slices = [[x[:, dims].contiguous() for x in whole] for dims in (slice(0, 20), slice(20, 100))]
    adamw_bfloat16_(*whole, 7, 1e-2, *BETAS, scale=0.5)
    for first, part in zip((0, 20), slices):
        adamw_bfloat16_(*part, 7, 1e-2, *BETAS, scale=0.5, first_column=first)
        for got, want in zip(part, whole):
            assert torch.equal(got, want[:, first:first + got.shape[1]])


def test_a_large_table_goes_in_parts(monkeypatch):
    """More than 2^20 numbers: some rows at a time give the bits that all rows at once do."""
    in_parts = make_case(S=2100, W=512)
    at_once = [x.clone() for x in in_parts]
    values_want, _, _ = formula(*in_parts, step=1, lr=1e-2, scale=1.0)
    rows = []
    update = table_adamw.update_bfloat16_

    def recording(values, *args, **kwargs):
        rows.append(len(values))
        update(values, *args, **kwargs)
    monkeypatch.setattr(table_adamw, "update_bfloat16_", recording)
    adamw_bfloat16_(*in_parts, 1, 1e-2, *BETAS)
    assert rows == [2048, 52]
    close(in_parts[0].float(), values_want, 2**-7)

    # A compiled step takes all rows at once. Here it is not compiled.
    monkeypatch.setattr(table_adamw, "compiled_update", lambda: recording)
    adamw_bfloat16_(*at_once, 1, 1e-2, *BETAS, compile=True)
    assert rows == [2048, 52, 2100]
    for got, want in zip(in_parts, at_once):
        assert torch.equal(got, want)


@each_device
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1, -0x400000])
def test_nan_stays_nan(bits, device):
    """Also a NaN of all ones, as GPUs make it: one more would carry over into the sign."""
    values, exp_avg, exp_avg_sq = torch.zeros(3, 1, 64, dtype=torch.bfloat16, device=device)
    grad_sum = torch.full((1, 64), bits, dtype=torch.int32, device=device).view(torch.float32)
    adamw_bfloat16_(values, grad_sum, exp_avg, exp_avg_sq, 1, 1e-2, *BETAS)
    for x in (values, exp_avg, exp_avg_sq):
        assert x.isnan().all()


def test_random_rounding_keeps_the_mean():
    """300 steps of 1e-5, where the neighbours of 1 in bfloat16 are 1/128 apart."""
    values = torch.ones(100, 100, dtype=torch.bfloat16)
    to_the_nearest = (values.float() + 1e-5).bfloat16()
    assert torch.equal(values, to_the_nearest), "to the nearest, nothing would ever move"
    exp_avg = torch.zeros_like(values)
    exp_avg_sq = torch.zeros_like(values)
    for step in range(1, 301):  # the gradient is always the same, so AdamW moves by lr
        grad_sum = torch.full((100, 100), -0.5)
        adamw_bfloat16_(values, grad_sum, exp_avg, exp_avg_sq, step, 1e-5, *BETAS)
    moved = values.double() - 1  # 0 or 1/128 or, twice lucky, more
    spread = (moved.var() / moved.numel()).sqrt()
    assert abs(moved.mean() - 0.003) < 5 * spread < 5e-4, (moved.mean(), spread)


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


# ---- compiled

@pytest.fixture
def fresh_compiler():
    """Nothing that another test has compiled, and nothing left behind."""
    torch._dynamo.reset()
    table_adamw.compiled_update.cache_clear()
    yield
    table_adamw.compiled_update.cache_clear()


def train_tables(compile, device="cpu", steps=5):
    """Steps of two tables, with another rate and another clipping each -> all they hold."""
    torch.manual_seed(0)
    tables = [MemoryTable(6, 20, torch.bfloat16).to(device) for _ in range(2)]
    optimizer = TableAdamW(tables, lr=1e-2, betas=BETAS, clip=0.05, compile=compile)
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = 1e-2 / step
        for table in tables:
            table.grad_sum += step * torch.randn(36, 20).to(device)
        optimizer.step()
    held = []
    for table in tables:
        state = optimizer.state[table.values]
        assert state["step"] == steps
        held += [table.values.detach(), table.grad_sum, state["exp_avg"], state["exp_avg_sq"]]
    return held


def test_it_compiles_once_for_all_steps(fresh_compiler, monkeypatch):
    """The same bits as not compiled, one graph without breaks, and no new one from step to step."""
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)
    compile_as_ever = torch.compile
    compile_and_count = functools.partial(compile_as_ever, backend=counting, fullgraph=True)
    monkeypatch.setattr(torch, "compile", compile_and_count)
    compiled = train_tables(compile=True)
    assert len(graphs) == 1
    for got, want in zip(compiled, train_tables(compile=False)):
        assert torch.equal(got, want)
    assert len(graphs) == 1, "compile=False compiles nothing"


def test_it_compiles_with_cuda_unless_told_otherwise():
    table = MemoryTable(6, 12, torch.bfloat16)
    assert not TableAdamW([table], 1e-2, BETAS).compile
    assert TableAdamW([table], 1e-2, BETAS, compile=True).compile
    if torch.cuda.is_available():
        assert TableAdamW([table.cuda()], 1e-2, BETAS).compile


@pytest.mark.slow
@each_device
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler for torch.compile")
def test_compiled_code_gives_the_same_numbers(fresh_compiler, device):
    """What torch.compile makes of it. On an x86 CPU with torch 2.13: the same bits.

    Another machine may multiply and add in one instruction. Then a few numbers are one place of
    bfloat16 off, where the noise just did, or did not, round them up.
    """
    plain = make_case(device=device)
    fast = make_case(device=device)
    adamw_bfloat16_(*plain, 3, 1e-2, *BETAS, scale=0.5)
    # Smaller kernels, which take a fifth of the time to compile.
    with inductor_config.patch(realize_opcount_threshold=10):
        adamw_bfloat16_(*fast, 3, 1e-2, *BETAS, scale=0.5, compile=True)
    for a, b in zip(plain, fast):
        same = (a == b).float().mean()
        assert same > 0.99, f"{1 - same:.1%} of the numbers differ"
        assert ((a - b).abs() <= 2**-7 * b.abs()).all(), "more than one place of bfloat16"


# ---- the noise

def recorded_noise(step, S, W, first_column=0):
    """What a step of a table adds before it rounds -> noise (3, S, W): values and both moments."""
    record = []

    def rounding(x, noise):
        record.append(noise)
        return round_randomly(x, noise)
    zeros = [torch.zeros(S, W, dtype=torch.bfloat16) for _ in range(3)]
    values, exp_avg, exp_avg_sq = zeros
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_adamw, "round_randomly", rounding)
        adamw_bfloat16_(values, torch.zeros(S, W), exp_avg, exp_avg_sq, step, 1e-2, *BETAS,
                        first_column=first_column)
    return torch.stack(record)


def noise_of_places():
    """Of the same 16 places in 256 steps (3, 256, 16)."""
    return torch.cat([recorded_noise(step, 1, 16) for step in range(1, 257)], dim=1)


NOISE = {
    "a square": lambda: recorded_noise(1, 64, 64),
    "a row": lambda: recorded_noise(2, 1, 4096),
    "a column": lambda: recorded_noise(5000, 4096, 1),
    "a later slice": lambda: recorded_noise(3, 64, 64, first_column=2**20),
    "the same places": noise_of_places,
}


@pytest.mark.parametrize("make", NOISE.values(), ids=NOISE.keys())
def test_the_noise_is_uniform(make):
    """Its upper six bits and its lower six: 64 bins for 4,096 numbers, so 64 in each."""
    for part in make():
        assert part.min() >= 0
        assert part.max() < 2**16
        for six_bits in (part >> 10, part & 63):
            bins = torch.bincount(six_bits.flatten(), minlength=64)  # (64,)
            chi_square = ((bins - 64).square() / 64).sum()
            # 63 degrees of freedom: mean 63, deviation 11. Less than 20 would be too even.
            assert 20 < chi_square < 130


def standard(noise):
    """The same with mean 0 and variance 1, if it is uniform."""
    return ((noise + 0.5).double() / 2**16 - 0.5) * 12**0.5


def check_unrelated(a, b):
    """The correlation of unrelated numbers has a deviation of 1/sqrt(how many): allow five."""
    assert a.numel() > 50_000
    assert abs((a * b).mean().item()) < 5 / a.numel() ** 0.5


def test_the_noise_of_neighbours_is_unrelated():
    """Rows, columns, both diagonals, steps, and the three results."""
    now = standard(recorded_noise(7, 256, 256))  # (3, S, W), as those below
    next_step = standard(recorded_noise(8, 256, 256))
    later = standard(recorded_noise(7 + 256, 256, 256))
    for i, part in enumerate(now):
        for distance in (1, 2, 16):
            check_unrelated(part[distance:], part[:-distance])
            check_unrelated(part[:, distance:], part[:, :-distance])
        check_unrelated(part[1:, 1:], part[:-1, :-1])
        check_unrelated(part[1:, :-1], part[:-1, 1:])
        check_unrelated(part, part.T)
        for other in (*now[:i], *next_step, *later):
            check_unrelated(part, other)


def test_no_two_places_have_the_same_noise():
    """Of 2^17 random 32-bit numbers two are equal about twice."""
    both_steps = torch.cat([recorded_noise(step, 256, 256) for step in (7, 8)], dim=1)
    bits = both_steps[0] + (both_steps[1] << 16)
    assert bits.numel() - bits.unique().numel() < 20


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


# ---- make_optimizers

def test_matrices_decay_and_the_rest_does_not():
    s = train.Settings(vocab_size=37, block_size=16, n_layer=2, n_head=2, n_embd=16, ffn="memory",
                       mem_layers=(1,), mem_n_keys=6, mem_topk=3, learning_rate=1e-3,
                       value_lr=7e-3, weight_decay=0.2, beta1=0.8, beta2=0.95, grad_clip=0.5)
    model = GPT(s)
    (dense, tables), others = train.make_optimizers(model, s)
    name_of = {p: name for name, p in model.named_parameters()}
    decay_of = {}
    for optimizer in (dense, tables):
        for group in optimizer.param_groups:
            assert group["betas"] == (0.8, 0.95)
            for p in group["params"]:
                decay_of[name_of[p]] = group["weight_decay"]
    assert decay_of.keys() == set(name_of.values())
    for name, decay in decay_of.items():
        is_matrix = name.endswith(".weight") and "norm" not in name and name != "wte.weight"
        assert decay == (0.2 if is_matrix else 0), name
    assert {name_of[p] for p in others} == decay_of.keys() - {"tables.0.values"}
    assert tables.tables == [model.tables[0]]
    assert tables.clip == 0.5
    assert [group["peak"] for group in dense.param_groups] == [1e-3, 1e-3]
    assert [group["peak"] for group in tables.param_groups] == [7e-3]


def test_a_dense_model_has_one_optimizer():
    s = train.Settings(vocab_size=37, block_size=16, n_layer=2, n_head=2, n_embd=16, ffn="dense")
    model = GPT(s)
    optimizers, others = train.make_optimizers(model, s)
    assert len(optimizers) == 1
    assert set(others) == set(model.parameters())


# ---- TableAdamW

@pytest.mark.parametrize("clip", [1e9, 0.05])
def test_float32_tables_are_stepped_by_torch(clip):
    """Two tables: they are clipped together, to the norm of both gradients."""
    torch.manual_seed(0)
    tables = [MemoryTable(6, 12), MemoryTable(5, 12)]
    twins = [torch.nn.Parameter(table.values.detach().clone()) for table in tables]
    ours = TableAdamW(tables, lr=1e-2, betas=BETAS, clip=clip)
    theirs = torch.optim.AdamW(twins, lr=1e-2, betas=BETAS, weight_decay=0.0, fused=True)
    for _ in range(5):
        for table, twin in zip(tables, twins):
            table.values.grad = torch.randn_like(twin)
            twin.grad = table.values.grad.clone()
        want_norm = torch.nn.utils.clip_grad_norm_(twins, clip)
        norm = ours.step()
        theirs.step()
        assert norm.item() == pytest.approx(want_norm.item(), rel=1e-6)
        for table, twin in zip(tables, twins):
            close(table.values.detach(), twin.detach(), 1e-6)
            close(ours.state[table.values]["exp_avg"], theirs.state[twin]["exp_avg"], 1e-6)
            assert table.values.grad is None, "the gradient is used up"


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
        runs.append([x for kept in optimizer.slices() for x in kept.values()])
    assert len(runs[0]) == 3  # values and both moments
    for straight, resumed in zip(*runs):
        assert torch.equal(straight, resumed)
