"""Rounding that keeps the mean, the noise it is made of, and the optimizers of a run.

S slots · D value dim · W columns of a table that one rank holds
"""
import functools
import shutil

import pytest
import torch

import memory
import train
from memory import MemoryTable, RowAdam, add_rounded, noise, places, round_randomly, scramble
from model import GPT

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=no_gpu)])


def make_case(S=30, W=100, device="cpu"):
    """values (S, W) bfloat16, their gradient g (S, W), and a factor for each row (S, 1)."""
    torch.manual_seed(0)
    values = torch.randn(S, W).bfloat16()
    case = values, torch.randn(S, W), -0.1 * torch.rand(S, 1)
    return [x.to(device) for x in case]


def spots(values, step=7, first_column=0):
    """The places of all rows of a table, or of a slice of it."""
    return places(values, None, slice(first_column, first_column + values.shape[1]), step)


# ---- bfloat16 tables

@each_device
def test_a_sum_is_rounded_without_drift(device):
    values, g, factor = make_case(device=device)
    right = values.float() + g * factor
    add_rounded(values, g, factor, *spots(values))
    off = (values.float() - right) / right.abs()
    assert off.abs().max() <= 2**-7, "more than one place of bfloat16"
    assert off.abs().max() > 2**-9, "rounded to the nearest, not randomly"
    assert abs(off.mean()) < 5 * 2**-8 / 3000**0.5, "rounded in one direction"


@each_device
def test_slices_round_as_the_whole_table_does(device):
    values, g, factor = make_case(device=device)
    for first, dims in ((0, slice(0, 20)), (20, slice(20, 100))):
        part = values[:, dims].clone()
        add_rounded(part, g[:, dims], factor, *spots(part, first_column=first))
        whole = values.clone()
        add_rounded(whole, g, factor, *spots(whole))
        assert torch.equal(part, whole[:, dims])


def test_some_rows_round_as_all_do():
    values, g, factor = make_case(S=9000, W=8)  # more than go at a time
    rows = torch.arange(0, 9000, 7)
    some = values[rows]
    add_rounded(some, g[rows], factor[rows], *places(values, rows, slice(0, 8), 7))
    add_rounded(values, g, factor, *spots(values))
    assert torch.equal(some, values[rows])


@each_device
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1, -0x400000])
def test_nan_stays_nan(bits, device):
    """Also a NaN of all ones, as GPUs make it: one more would carry over into the sign."""
    values = torch.zeros(1, 64, dtype=torch.bfloat16, device=device)
    g = torch.full((1, 64), bits, dtype=torch.int32, device=device).view(torch.float32)
    add_rounded(values, g, torch.ones(1, 1, device=device), *spots(values))
    assert values.isnan().all()


def test_random_rounding_keeps_the_mean():
    """300 steps of 1e-5, where the neighbours of 1 in bfloat16 are 1/128 apart."""
    table = MemoryTable(100, 100, torch.bfloat16)
    torch.nn.init.ones_(table.values)
    to_the_nearest = (table.values.float() + 1e-5).bfloat16()
    assert torch.equal(table.values, to_the_nearest), "to the nearest, nothing would ever move"
    optimizer = RowAdam([table], 1e-5)
    for _ in range(300):
        table.values.grad = torch.full((10_000, 100), -0.5)  # always the same: each step is lr
        optimizer.step()
    moved = table.values.double() - 1  # 0 or 1/128 or, twice lucky, more
    spread = (moved.var() / moved.numel()).sqrt()
    assert abs(moved.mean() - 0.003) < 5 * spread < 5e-4, (moved.mean(), spread)


def test_it_follows_float32():
    torch.manual_seed(0)
    table = MemoryTable(7, 40, torch.bfloat16)
    twin = MemoryTable(7, 40)
    twin.values.data.copy_(table.values.data)
    optimizers = [RowAdam([table], 1e-2), RowAdam([twin], 1e-2)]
    for _ in range(200):
        twin.values.grad = torch.randn(49, 40) + twin.values.detach()  # noisy, and towards zero
        table.values.grad = twin.values.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    off = (table.values.float() - twin.values).abs().mean()
    unrelated = (twin.values - torch.randn(49, 40)).abs().mean()
    assert off < 0.02 < 0.3 < unrelated


# ---- compiled, as on a GPU

@pytest.fixture
def fresh_compiler(monkeypatch):
    """Compiling, with nothing that another test has compiled, and nothing left behind."""
    torch._dynamo.reset()
    memory.compiled_sum.cache_clear()
    monkeypatch.setattr(memory, "uses_triton", lambda device: True)
    yield
    memory.compiled_sum.cache_clear()


def train_tables(steps=5):
    """Steps of two tables, with another rate each -> their values."""
    torch.manual_seed(0)
    tables = [MemoryTable(6, 20, torch.bfloat16) for _ in range(2)]
    optimizer = RowAdam(tables, 1e-2, clip=0.05)
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = 1e-2 / step
        for table in tables:
            table.values.grad = step * torch.randn(36, 20)
        optimizer.step()
    return [table.values.detach() for table in tables]


def test_it_compiles_once_for_all_steps(fresh_compiler, monkeypatch):
    """The same bits as not compiled, one graph without breaks, and no new one from step to step."""
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)
    compile_and_count = functools.partial(torch.compile, backend=counting, fullgraph=True)
    monkeypatch.setattr(torch, "compile", compile_and_count)
    compiled = train_tables()
    assert len(graphs) == 1
    monkeypatch.setattr(memory, "uses_triton", lambda device: False)
    for got, want in zip(compiled, train_tables()):
        assert torch.equal(got, want)
    assert len(graphs) == 1, "without Triton nothing is compiled"


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler for torch.compile")
def test_compiled_code_gives_the_same_numbers(fresh_compiler):
    """What torch.compile makes of it. On an x86 CPU with torch 2.13: the same bits.

    Another machine may multiply and add in one instruction. Then a few numbers are one place of
    bfloat16 off, where the noise just did, or did not, round them up.
    """
    fast, g, factor = make_case()
    plain = fast.clone()
    add_rounded(fast, g, factor, *spots(fast))
    memory.add_rounded_sum(plain, g, factor, *spots(plain))
    same = (plain == fast).float().mean()
    assert same > 0.99, f"{1 - same:.1%} of the numbers differ"
    assert ((plain - fast).abs() <= 2**-7 * fast.abs()).all(), "more than one place of bfloat16"


# ---- the noise

def recorded_noise(step, S, W, first_column=0):
    """What a step adds to W columns of a table before it rounds: (S, W)."""
    return noise(*spots(torch.empty(S, W), step, first_column))


def noise_of_places():
    """Of the same 16 places in 256 steps (256, 16)."""
    return torch.cat([recorded_noise(step, 1, 16) for step in range(1, 257)])


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
    bits = make()
    assert bits.min() >= 0
    assert bits.max() < 2**16
    for six_bits in (bits >> 10, bits & 63):
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
    """Rows, columns, both diagonals, steps."""
    now = standard(recorded_noise(7, 256, 256))  # (S, W), as those below
    for distance in (1, 2, 16):
        check_unrelated(now[distance:], now[:-distance])
        check_unrelated(now[:, distance:], now[:, :-distance])
    check_unrelated(now[1:, 1:], now[:-1, :-1])
    check_unrelated(now[1:, :-1], now[:-1, 1:])
    check_unrelated(now, now.T)
    for step in (8, 7 + 256):
        check_unrelated(now, standard(recorded_noise(step, 256, 256)))


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

@pytest.mark.parametrize("rule", ["row", "adamw"])
def test_matrices_decay_and_the_rest_does_not(rule):
    s = train.Settings(vocab_size=37, block_size=16, n_layer=2, n_head=2, n_embd=16, ffn="memory",
                       mem_layers=(1,), mem_n_keys=6, mem_topk=3, learning_rate=1e-3,
                       half_key_share=2.0, value_lr=7e-3, weight_decay=0.2, beta1=0.8, beta2=0.95,
                       grad_clip=0.5, table_optimizer=rule)
    model = GPT(s)
    (dense, tables), clipped = train.make_optimizers(model, s)
    name_of = {p: name for name, p in model.named_parameters()}
    decay_of = {"table.values": tables.param_groups[0].get("weight_decay", 0)}
    for group in dense.param_groups:
        assert group["betas"] == (0.8, 0.95)
        for p in group["params"]:
            decay_of[name_of[p]] = group["weight_decay"]
    assert decay_of.keys() == set(name_of.values())
    for name, decay in decay_of.items():
        is_matrix = name.endswith(".weight") and "norm" not in name and name != "wte.weight"
        assert decay == (0.2 if is_matrix else 0), name
    assert {name_of[p] for p in clipped[0]} == decay_of.keys() - {"table.values"}
    values, = tables.param_groups[0]["params"]
    assert values is model.table.values
    if rule == "row":
        assert tables.clip == 0.5 and tables.param_groups[0]["beta2"] == 0.95
        assert len(clipped) == 1
    else:
        assert clipped[1] == [values] and tables.param_groups[0]["betas"] == (0.8, 0.95)
    peaks = {name_of[p]: group["peak"] for group in dense.param_groups for p in group["params"]}
    assert peaks.pop("blocks.1.ffn.half_keys") == 2e-3
    assert set(peaks.values()) == {1e-3}
    assert [group["peak"] for group in tables.param_groups] == [7e-3]


def test_a_dense_model_has_one_optimizer():
    s = train.Settings(vocab_size=37, block_size=16, n_layer=2, n_head=2, n_embd=16, ffn="dense")
    model = GPT(s)
    optimizers, (clipped,) = train.make_optimizers(model, s)
    assert len(optimizers) == 1
    assert set(clipped) == set(model.parameters())
