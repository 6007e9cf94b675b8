"""The memory layer against its formula, written out token by token and key by key.

N tokens · H heads · K slots read per head · n half-keys per side · S = n*n slots · C channels · D value dim · d half-key dim
"""
import math

import pytest
import torch
import torch.nn.functional as F

from memory import MemoryTable, ProductKeyMemory, brute_force_topk, product_key_topk


def close(got, want, tolerance=1e-5):
    assert got.shape == want.shape
    error, scale = (got - want).abs().max().item(), want.abs().max().item()
    assert error <= tolerance * scale, f"error {error:.2e} > {tolerance:.0e} of {scale:.2e}"


# ---------------------------------------------------------------------------------------------------------------------------------
# the search

SIZES = [(7, 1, 1, 1, 1), (7, 2, 5, 3, 1), (4, 3, 8, 4, 5), (3, 2, 9, 2, 9), (5, 4, 32, 16, 32), (0, 2, 4, 3, 2)]  # N, H, n, d, K


@pytest.mark.parametrize("N, H, n, d, K", SIZES)
def test_search_is_brute_force(N, H, n, d, K):
    torch.manual_seed(0)
    queries = torch.randn(N, H, 2, d, dtype=torch.float64, requires_grad=True)
    half_keys = torch.randn(2, H, n, d, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(N, H, K, dtype=torch.float64)
    (scores, slots), (want, want_slots) = (f(queries, half_keys, K) for f in (product_key_topk, brute_force_topk))
    assert scores.shape == slots.shape == (N, H, K)
    assert torch.equal(slots, want_slots)                                   # random numbers: no ties
    if N:
        close(scores, want, 1e-12)
        for got, right in zip(*(torch.autograd.grad(s, (queries, half_keys), grad) for s in (scores, want))):
            close(got, right, 1e-12)


def test_search_in_float32_with_ties():
    torch.manual_seed(0)
    queries, half_keys = torch.randint(-2, 3, (20, 2, 2, 3)).float(), torch.randint(-1, 2, (2, 2, 10, 3)).float()  # whole numbers: exact
    scores, slots = product_key_topk(queries, half_keys, 6)
    assert torch.equal(scores, brute_force_topk(queries, half_keys, 6)[0])
    i, j = slots // 10, slots % 10                                          # slot i*n + j has the key (half_keys[0, h, i], half_keys[1, h, j])
    for h in range(2):
        left, right = half_keys[0, h, i[:, h]], half_keys[1, h, j[:, h]]    # (N, K, d) both
        assert torch.equal(scores[:, h], (left @ queries[:, h, 0, :, None] + right @ queries[:, h, 1, :, None]).squeeze(-1))
    assert all(len(set(row)) == 6 for row in slots.flatten(0, 1).tolist())


def test_search_refuses_more_slots_than_half_keys():
    with pytest.raises(ValueError, match="K = 5 .* 4 half-keys"):
        product_key_topk(torch.randn(3, 1, 2, 2), torch.randn(2, 1, 4, 2), 5)


# ---------------------------------------------------------------------------------------------------------------------------------
# the layer

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


def naive_layer(layer, values, x):
    """y = sum over heads of softmax(top K of the scores with all n*n keys) @ values, then the gate. x (N, C) -> (N, C)."""
    norm = (lambda a: a / (a.square().mean(-1, keepdim=True) + 2**-23).sqrt()) if layer.qk_norm else (lambda a: a)
    out = []
    for token in x:
        y = 0
        for h, (q1, q2) in enumerate(norm((layer.query.weight @ token).view(layer.heads, 2, -1))):
            left, right = (norm(side) @ q for side, q in zip(layer.half_keys[:, h], (q1, q2)))  # (n,) both
            scores, slots = (left[:, None] + right).flatten().topk(layer.topk)                  # (K,) both
            scores = scores / math.sqrt(len(q1)) if layer.qk_norm else scores
            y = y + scores.softmax(0) @ values[slots]                                           # (D,)
        y = y * F.silu(layer.gate.weight @ token) if layer.gate is not None else y
        out.append(layer.out.weight @ y if layer.out is not None else y)
    return torch.stack(out)


@pytest.mark.parametrize("settings", LAYERS.values(), ids=LAYERS.keys())
def test_layer_is_the_formula(settings):
    layer, table = make_layer(**settings)
    x, grad = torch.randn(2, 3, 12, requires_grad=True), torch.randn(2, 3, 12)
    got, want = layer(x), naive_layer(layer, table.values, x.view(6, 12)).view(2, 3, 12)
    close(got, want)
    inputs = (x, table.values, *layer.parameters())
    for g, w in zip(*(torch.autograd.grad(y, inputs, grad) for y in (got, want))):
        close(g, w)


def test_layer_has_the_parameters_of_its_variant():
    def shapes(**settings):
        layer, _ = make_layer(**settings)
        return {name: tuple(p.shape) for name, p in layer.named_parameters()}

    # The key dim is C/2 = 6. There is no table: that is the model's.
    search = {"query.weight": (3 * 6, 12), "half_keys": (2, 3, 6, 3)}
    assert shapes(gate=False) == search
    assert shapes(gate=False, value_dim=5) == search | {"out.weight": (12, 5)}
    gated = {"gate.weight": (5, 12), "out.weight": (12, 5)}
    assert shapes(value_dim=5) == search | gated
    assert shapes(key_dim=10)["half_keys"] == (2, 3, 6, 5)


def test_a_new_layer_is_initialised():
    torch.manual_seed(0)
    table = MemoryTable(64, 48)
    layer = ProductKeyMemory(96, table)
    assert (layer.heads, layer.topk, layer.half_dim, layer.qk_norm) == (4, 32, 24, True)
    assert table.values.std().item() == pytest.approx(48**-0.5, rel=0.01)
    bound = 48**-0.5
    assert 0.99 * bound < layer.half_keys.abs().max() <= bound
    assert layer.half_keys.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    again = torch.manual_seed(0) and MemoryTable(64, 48)
    assert torch.equal(table.values, again.values)


def test_a_layer_learns_outside_the_gpt():
    """A random function of 30 inputs, with plain AdamW, in a model of two layers and one table."""
    torch.manual_seed(0)
    table = MemoryTable(8, 16)
    layers = torch.nn.ModuleList(ProductKeyMemory(16, table, heads=2, topk=4) for _ in range(2))
    x = torch.randn(1, 30, 16)
    y = torch.randn(1, 30, 16)
    groups = [dict(params=layers.parameters(), lr=1e-2),
              dict(params=table.parameters(), lr=4e-2, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups)
    losses = []
    before = table.values.detach().clone()
    for _ in range(150):
        h = x
        for layer in layers:
            h = h + layer(h)
        loss = (h - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert not torch.equal(table.values, before)


@pytest.mark.parametrize("settings, words", [
    (dict(topk=7), "topk 7 is not between 1 and the table's 6 half-keys"),
    (dict(topk=0), "topk 0 is not between"),
    (dict(key_dim=5), "key_dim 5 is not an even number"),
    (dict(key_dim=0), "key_dim 0 is not an even number"),
])
def test_a_layer_refuses_sizes_that_cannot_work(settings, words):
    with pytest.raises(ValueError, match=words):
        make_layer(**settings)


def test_weights_sum_to_one_per_head():
    layer, _ = make_layer()
    slots, weights = layer.search(torch.randn(50, 12))
    assert slots.shape == weights.shape == (50, 3, 4) and weights.dtype == torch.float32
    close(weights.sum(-1), torch.ones(50, 3), 1e-6)
    assert (weights > 0).all() and (weights.diff(dim=-1) <= 0).all() and weights.max() > 0.5 > weights.min()
    assert 0 <= slots.min() and slots.max() < 36 and all(len(set(row)) == 4 for row in slots.flatten(0, 1).tolist())


def test_qk_norm_forgets_the_size_of_queries():
    torch.manual_seed(1)
    x = torch.randn(50, 12)
    for qk_norm in (True, False):
        search = make_layer(qk_norm=qk_norm)[0].search
        same = torch.allclose(search(x)[1], search(100 * x)[1], atol=1e-4)
        assert same == qk_norm


# ---------------------------------------------------------------------------------------------------------------------------------
# what is counted

def count(slots, weights, n_keys=2):
    table = MemoryTable(n_keys, 3)
    torch.nn.init.normal_(table.values)
    table.count(True)
    table.read(torch.tensor(slots), torch.tensor(weights))
    return table


def test_usage_by_hand():
    used, kl = count([[0, 1], [0, 1]], [[0.5, 0.5], [1.0, 0.0]]).usage()    # read weight 1.5, 0.5, 0, 0 of 2
    assert used == 0.5 and kl == pytest.approx(0.75 * math.log(3) + 0.25 * math.log(1), abs=1e-9)
    used, kl = count([[0, 1, 3]], [[0.25, 0.25, 0.5]]).usage()              # the entropy is 1.5 bits of 2
    assert used == 0.75 and kl == pytest.approx(0.5 * math.log(2), abs=1e-9)


def test_usage_at_its_ends():
    assert count([[0, 1, 2, 3]], [[0.25] * 4]).usage() == (1.0, 0.0)        # all slots evenly
    used, kl = count([[2, 2], [2, 2]], [[0.5, 0.5]] * 2, n_keys=5).usage()  # one of 25 slots
    assert used == 1 / 25 and kl == pytest.approx(math.log(25), abs=1e-12)
    assert count([[0, 1]], [[1.0, 1e-12]]).usage()[0] == 0.5                # a small weight is a read
    never = MemoryTable(2, 3)
    assert never.usage() == (0.0, 0.0)


def test_counting_starts_from_zero_and_stops():
    table = count([[0, 1]], [[0.5, 0.5]])
    first = table.read_weight.clone()
    assert first.tolist() == [2**23, 2**23, 0, 0]
    table.read(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]))
    assert torch.equal(table.read_weight, 2 * first)                        # reads add up
    table.count(False)
    table.read(torch.tensor([[3, 3]]), torch.tensor([[0.5, 0.5]]))
    assert torch.equal(table.read_weight, 2 * first)                        # not counted, and the count stays to be looked at
    table.count(True)
    assert table.usage() == (0.0, 0.0)
    assert "read_weight" not in table.state_dict()


def test_counts_do_not_depend_on_the_order_of_tokens():
    torch.manual_seed(0)
    slots, weights = torch.randint(9, (200, 8)), torch.rand(200, 8)
    counts = []
    for order in (torch.arange(200), torch.arange(200).flip(0), torch.randperm(200)):
        table = count(slots[order].tolist(), weights[order].tolist(), n_keys=3)
        counts.append(table.read_weight)
    assert torch.equal(counts[0], counts[1]) and torch.equal(counts[0], counts[2]) and counts[0].min() > 0


def test_every_layer_counts_into_the_table_it_reads():
    layer, table = make_layer()
    layer(torch.randn(2, 3, 12))
    assert table.usage() == (0.0, 0.0)                                      # off unless asked for
    table.count(True)
    x = torch.randn(4, 5, 12)
    layer(x)
    slots, weights = layer.search(x.view(20, 12))
    assert table.usage()[0] == len(slots.unique()) / 36
    close(table.read_weight / 2**24, torch.zeros(36).index_add(0, slots.flatten(), weights.flatten()).detach())
