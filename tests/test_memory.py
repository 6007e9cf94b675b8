"""The memory layer against its formula, written out token by token and key by key.

N tokens · H heads · K slots read per head · n half-keys per side · S = n*n slots
C channels · D value dim · d half-key dim
"""
import math

import pytest
import torch
import torch.nn.functional as F

from memory import MemoryTable, ProductKeyMemory, brute_force_topk, product_key_topk
from support.rivals import PEER, HashedMemory, MixtureOfExperts, UltraMem


def close(got, want, tolerance=1e-5):
    assert got.shape == want.shape
    error = (got - want).abs().max().item()
    scale = want.abs().max().item()
    assert error <= tolerance * scale, f"error {error:.2e} > {tolerance:.0e} of {scale:.2e}"


def no_slot_twice(slots):
    """Whether each head of each token has K different slots. slots (N, H, K)."""
    return all(len(set(row)) == len(row) for row in slots.flatten(0, 1).tolist())


# ---- the search

SIZES = [  # N, H, n, d, K
    (7, 1, 1, 1, 1),
    (7, 2, 5, 3, 1),
    (4, 3, 8, 4, 5),
    (3, 2, 9, 2, 9),
    (5, 4, 32, 16, 32),
    (0, 2, 4, 3, 2),
]


@pytest.mark.parametrize("N, H, n, d, K", SIZES)
def test_search_is_brute_force(N, H, n, d, K):
    torch.manual_seed(0)
    queries = torch.randn(N, H, 2, d, dtype=torch.float64, requires_grad=True)
    half_keys = torch.randn(2, H, n, d, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(N, H, K, dtype=torch.float64)
    scores, slots = product_key_topk(queries, half_keys, K)
    want_scores, want_slots = brute_force_topk(queries, half_keys, K)
    assert scores.shape == slots.shape == (N, H, K)
    assert torch.equal(slots, want_slots)  # random numbers have no ties
    if N == 0:
        return
    close(scores, want_scores, 1e-12)
    got = torch.autograd.grad(scores, (queries, half_keys), grad)
    want = torch.autograd.grad(want_scores, (queries, half_keys), grad)
    close(got[0], want[0], 1e-12)
    close(got[1], want[1], 1e-12)


def test_search_in_float32_with_ties():
    torch.manual_seed(0)
    # Whole numbers, so that all sums are exact.
    queries = torch.randint(-2, 3, (20, 2, 2, 3)).float()  # (N, H, 2, d)
    half_keys = torch.randint(-1, 2, (2, 2, 10, 3)).float()  # (2, H, n, d)
    scores, slots = product_key_topk(queries, half_keys, 6)  # (N, H, K) both
    assert torch.equal(scores, brute_force_topk(queries, half_keys, 6)[0])
    assert no_slot_twice(slots)
    # Slot i*n + j has the key (half_keys[0, h, i], half_keys[1, h, j]).
    i = slots // 10
    j = slots % 10
    for h in range(2):
        left = half_keys[0, h, i[:, h]]  # (N, K, d)
        right = half_keys[1, h, j[:, h]]  # (N, K, d)
        q1, q2 = queries[:, h].unbind(1)  # (N, d) both
        score = torch.einsum("nkd,nd->nk", left, q1) + torch.einsum("nkd,nd->nk", right, q2)
        assert torch.equal(scores[:, h], score)


def test_search_refuses_more_slots_than_half_keys():
    with pytest.raises(ValueError, match="K = 5 .* 4 half-keys"):
        product_key_topk(torch.randn(3, 1, 2, 2), torch.randn(2, 1, 4, 2), 5)


# ---- the layer

LAYERS = {
    "Memory": dict(gate=False, qk_norm=False),
    "Memory, one head": dict(gate=False, qk_norm=False, heads=1),
    "Memory, D != C": dict(gate=False, qk_norm=False, value_dim=5),
    "Memory, qk_norm": dict(gate=False),
    "Memory+": dict(),
    "Memory+, D != C": dict(value_dim=20, key_dim=10),
    "Memory+, every slot of a side": dict(topk=6, heads=1),
}


def make_layer(value_dim=12, **settings):
    """A layer of width 12 and its table of 36 slots, with weights large enough to tell."""
    torch.manual_seed(0)
    table = MemoryTable(6, value_dim)
    layer = ProductKeyMemory(12, table, **dict(heads=3, topk=4) | settings)
    for p in (table.values, *layer.parameters()):
        torch.nn.init.normal_(p, std=0.5)
    return layer, table


def rms_norm(a):
    return a / (a.square().mean(-1, keepdim=True) + 2**-23).sqrt()


def naive_layer(layer, values, x):
    """The layer as the paper has it, for one token at a time. x (N, C) -> (N, C)."""
    return torch.stack([naive_token(layer, values, token) for token in x])


def naive_token(layer, values, token):
    """Sum over heads of softmax(top K of the scores with all n*n keys) @ values, then the gate."""
    y = 0
    queries = (layer.query.weight @ token).view(layer.heads, 2, -1)  # (H, 2, d)
    for h in range(layer.heads):
        q1, q2 = queries[h]  # (d,) both
        keys1, keys2 = layer.half_keys[:, h]  # (n, d) both
        if layer.qk_norm:
            q1, q2, keys1, keys2 = map(rms_norm, (q1, q2, keys1, keys2))
        left = keys1 @ q1  # (n,)
        right = keys2 @ q2  # (n,)
        every = left[:, None] + right[None, :]  # (n, n)
        scores, slots = every.flatten().topk(layer.topk)  # (K,) both
        if layer.qk_norm:
            scores = scores / math.sqrt(len(q1))
        y = y + scores.softmax(0) @ values[slots]  # (D,)
    if layer.gate is not None:
        bias = 0 if layer.gate.bias is None else layer.gate.bias  # (D,)
        y = y * F.silu(layer.gate.weight @ token + bias)
    if layer.out is not None:
        y = layer.out.weight @ y  # (C,)
    return y


@pytest.mark.parametrize("settings", LAYERS.values(), ids=LAYERS.keys())
def test_layer_is_the_formula(settings):
    layer, table = make_layer(**settings)
    x = torch.randn(2, 3, 12, requires_grad=True)
    grad = torch.randn(2, 3, 12)
    got = layer(x)
    want = naive_layer(layer, table.values, x.view(6, 12)).view(2, 3, 12)
    close(got, want)
    inputs = (x, table.values, *layer.parameters())
    got_grads = torch.autograd.grad(got, inputs, grad)
    want_grads = torch.autograd.grad(want, inputs, grad)
    for g, w in zip(got_grads, want_grads):
        close(g, w)


def test_layer_has_the_parameters_of_its_variant():
    def shapes(**settings):
        layer, _ = make_layer(**settings)
        return {name: tuple(p.shape) for name, p in layer.named_parameters()
                if name != "own_table.values"}

    # The key dim is C/2 = 6.
    search = {"query.weight": (3 * 6, 12), "half_keys": (2, 3, 6, 3)}
    assert shapes(gate=False) == search
    assert shapes(gate=False, value_dim=5) == search | {"out.weight": (12, 5)}
    gated = {"gate.weight": (5, 12), "out.weight": (12, 5)}
    assert shapes(value_dim=5) == search | gated
    assert shapes(key_dim=10)["half_keys"] == (2, 3, 6, 5)


def test_weights_sum_to_one_per_head():
    layer, _ = make_layer()
    slots, weights = layer.search(torch.randn(50, 12))
    assert slots.shape == weights.shape == (50, 3, 4)
    assert weights.dtype == torch.float32
    close(weights.sum(-1), torch.ones(50, 3), 1e-6)
    assert (weights > 0).all()
    assert (weights.diff(dim=-1) <= 0).all()
    assert weights.max() > 0.5 > weights.min()
    assert 0 <= slots.min()
    assert slots.max() < 36
    assert no_slot_twice(slots)


def test_qk_norm_forgets_the_size_of_queries():
    torch.manual_seed(1)
    x = torch.randn(50, 12)
    for qk_norm in (True, False):
        layer, _ = make_layer(qk_norm=qk_norm)
        _, weights = layer.search(x)
        _, weights_of_large = layer.search(100 * x)
        same = torch.allclose(weights, weights_of_large, atol=1e-4)
        assert same == qk_norm


# ---- a layer in a model of your own

def check_uniform(p, bound):
    """Whether p looks drawn from U(-bound, bound): its ends, its deviation, its mean."""
    assert 0.99 * bound < p.max().item() <= bound
    assert -bound <= p.min().item() < -0.99 * bound
    assert p.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
    assert abs(p.mean().item()) < 0.03 * bound


def test_a_new_layer_is_initialised():
    torch.manual_seed(0)
    table = MemoryTable(64, 48)
    layer = ProductKeyMemory(96, table)
    assert (layer.heads, layer.topk, layer.half_dim, layer.qk_norm) == (4, 32, 24, True)
    # Values: normal, with std 1/sqrt(D).
    assert table.values.std().item() == pytest.approx(48**-0.5, rel=0.01)
    assert abs(table.values.mean().item()) < 0.01 * 48**-0.5
    assert table.values.abs().max().item() > 4 * 48**-0.5, "a normal distribution has tails"
    # Half-keys: uniform up to 1/sqrt(key dim). Matrices: as nn.Linear draws them.
    check_uniform(layer.half_keys, 48**-0.5)
    check_uniform(layer.query.weight, 96**-0.5)
    check_uniform(layer.gate.weight, 96**-0.5)
    check_uniform(layer.out.weight, 48**-0.5)


def test_a_seed_decides_the_values():
    tables = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        tables.append(MemoryTable(80, 12))  # 6,400 rows: more than are drawn at a time
    assert torch.equal(tables[0].values, tables[1].values)
    assert not torch.equal(tables[0].values, tables[2].values)
    tables[2].load_state_dict(tables[0].state_dict())
    before = tables[2].values.clone()
    tables[2].init_weights()
    assert (tables[2].values != before).all(), "init_weights draws every value anew"


def test_every_layer_draws_its_own_weights():
    """torch fills new memory with NaN here, so we see what nobody has set."""
    torch.use_deterministic_algorithms(True)
    try:
        table = MemoryTable(6, 12)
        layers = [ProductKeyMemory(12, table, topk=4), HashedMemory(12, table),
                  UltraMem(12, table, topk=4), PEER(12, MemoryTable(6, 24), topk=4),
                  MixtureOfExperts(12, 8, 5, 2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert table.values.isfinite().all()
    for layer in layers:
        for name, p in layer.named_parameters():
            assert p.isfinite().all(), name
            assert p.std() > 0 or name == "core", name  # the core of UltraMem starts even


class TwoLayers(torch.nn.Module):
    """A model that owns one table, which its two layers share."""

    def __init__(self, C):
        super().__init__()
        self.table = MemoryTable(8, C)
        self.layers = torch.nn.ModuleList()
        for _ in range(2):
            self.layers.append(ProductKeyMemory(C, self.table, heads=2, topk=4))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_a_table_belongs_to_the_model_and_not_to_its_layers():
    model = TwoLayers(16)
    names = [name for name, _ in model.named_parameters()]
    assert names.count("table.values") == 1
    assert [name for name in names if "values" in name] == ["table.values"]
    for layer in model.layers:
        assert layer.table is model.table
        assert all(p is not model.table.values for p in layer.parameters())
        assert not any("table" in name for name in layer.state_dict())
        assert list(layer.buffers()) == []


def test_layers_learn_outside_the_gpt():
    """A random function of 30 inputs, with torch's own AdamW."""
    torch.manual_seed(0)
    model = TwoLayers(16)
    x = torch.randn(1, 30, 16)
    y = torch.randn(1, 30, 16)
    groups = [dict(params=model.layers.parameters(), lr=2e-2),
              dict(params=model.table.parameters(), lr=1e-1, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = []
    for _ in range(60):
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    for name, p in model.named_parameters():
        assert not torch.equal(p, before[name]), f"{name} has not changed"


@pytest.mark.parametrize("settings, words", [
    (dict(heads=0), "heads 0 < 1"),
    (dict(topk=7), "topk 7 is not between 1 and the table's 6 half-keys: lower topk"),
    (dict(topk=0), "topk 0 is not between 1 and"),
    (dict(topk=-1), "topk -1 is not between 1 and"),
    (dict(key_dim=5), "key_dim 5 is not an even number above 0"),
    (dict(key_dim=0), "key_dim 0 is not an even number above 0"),
    (dict(key_dim=-2), "key_dim -2 is not an even number above 0"),
], ids=str)
def test_a_layer_refuses_sizes_that_cannot_work(settings, words):
    with pytest.raises(ValueError, match=words) as error:
        make_layer(**settings)
    assert "\n" not in str(error.value)


def test_a_layer_takes_the_largest_topk_and_the_smallest_key_dim():
    # Without qk_norm, which would make +1 or -1 of a half-key of one number: all scores would tie.
    layer, table = make_layer(topk=6, key_dim=2, qk_norm=False)
    x = torch.randn(2, 3, 12)
    close(layer(x), naive_layer(layer, table.values, x.view(6, 12)).view(2, 3, 12))


# ---- what is counted

def count(slots, weights, n_keys=2):
    """A table that has counted one read."""
    table = MemoryTable(n_keys, 3)
    table.count(True)
    table.read(torch.tensor(slots), torch.tensor(weights))
    return table


def test_usage_by_hand():
    # The slots' read weights are 1.5, 0.5, 0, 0 of 2.
    used, kl = count([[0, 1], [0, 1]], [[0.5, 0.5], [1.0, 0.0]]).usage()
    assert used == 0.5
    assert kl == pytest.approx(0.75 * math.log(3) + 0.25 * math.log(1), abs=1e-9)
    # The entropy is 1.5 bits of 2.
    used, kl = count([[0, 1, 3]], [[0.25, 0.25, 0.5]]).usage()
    assert used == 0.75
    assert kl == pytest.approx(0.5 * math.log(2), abs=1e-9)


def test_usage_at_its_ends():
    evenly = count([[0, 1, 2, 3]], [[0.25] * 4])
    assert evenly.usage() == (1.0, 0.0)
    one_of_25 = count([[2, 2], [2, 2]], [[0.5, 0.5]] * 2, n_keys=5)
    used, kl = one_of_25.usage()
    assert used == 1 / 25
    assert kl == pytest.approx(math.log(25), abs=1e-12)
    used, _ = count([[0, 1]], [[1.0, 1e-12]]).usage()
    assert used == 0.5, "a read with a small weight is a read"
    never_read = MemoryTable(2, 3)
    assert never_read.usage() == (0.0, 0.0)


def test_counting_starts_from_zero_and_stops():
    table = count([[0, 1]], [[0.5, 0.5]])
    first = table.read_weight.clone()
    assert first.tolist() == [2**23, 2**23, 0, 0]
    # Reads add up.
    table.read(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]))
    assert torch.equal(table.read_weight, 2 * first)
    # After count(False) nothing is counted, and the count stays to be looked at.
    table.count(False)
    table.read(torch.tensor([[3, 3]]), torch.tensor([[0.5, 0.5]]))
    assert torch.equal(table.read_weight, 2 * first)
    table.count(True)
    assert table.usage() == (0.0, 0.0)
    assert "read_weight" not in table.state_dict()


def test_counts_do_not_depend_on_the_order_of_tokens():
    torch.manual_seed(0)
    slots = torch.randint(9, (200, 8))
    weights = torch.rand(200, 8)
    counts = []
    for order in (torch.arange(200), torch.arange(200).flip(0), torch.randperm(200)):
        table = count(slots[order].tolist(), weights[order].tolist(), n_keys=3)
        counts.append(table.read_weight)
    assert torch.equal(counts[0], counts[1])
    assert torch.equal(counts[0], counts[2])
    assert counts[0].min() > 0


def test_every_layer_counts_into_the_table_it_reads():
    layer, table = make_layer()
    layer(torch.randn(2, 3, 12))
    assert table.usage() == (0.0, 0.0), "it counts only when asked to"
    table.count(True)
    x = torch.randn(4, 5, 12)
    layer(x)
    slots, weights = layer.search(x.view(20, 12))
    assert table.usage()[0] == len(slots.unique()) / 36
    want = torch.zeros(36).index_add(0, slots.flatten(), weights.flatten()).detach()
    close(table.read_weight / 2**24, want)
