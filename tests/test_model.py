"""The GPT: what a token may see, what is shared, what is counted, and generation with a cache against generation without."""
import math

import numpy as np
import pytest
import torch

from memory import MemoryTable
from model import GPT, GPTConfig, rotary, rotate, sample_token
from train import TableAdamW

MEMORY = dict(ffn="memory", mem_layers=(1,), mem_n_keys=6, mem_heads=2, mem_topk=3, mem_gate=False, qk_norm=False)
PLUS = MEMORY | dict(mem_layers=(0, 2), mem_gate=True, qk_norm=True)
KINDS = {"dense": {}, "Memory": MEMORY, "Memory+": PLUS}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


def make_model(seed=0, scale=1.0, **settings):
    """A tiny GPT; scale > 1 makes it sure of its next tokens, so that generation is not one token for ever."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**dict(vocab_size=37, block_size=16, n_layer=3, n_head=2, n_embd=16) | settings))
    with torch.no_grad():
        model.wte.weight.mul_(scale)
    return model


def tokens(*shape):
    return torch.randint(37, shape, generator=torch.Generator().manual_seed(sum(shape)))


def close(got, want, tolerance=1e-5):
    assert got.shape == want.shape
    error, scale = (got - want).abs().max().item(), want.abs().max().item()
    assert error <= tolerance * scale, f"error {error:.2e} > {tolerance:.0e} of {scale:.2e}"


# ---------------------------------------------------------------------------------------------------------------------------------
# the forward pass

@each_kind
def test_no_token_sees_the_future(kind):
    model, idx = make_model(scale=20, **kind), tokens(2, 16)
    before, _ = model(idx, idx)
    for t in (1, 7, 15):
        changed = idx.clone()
        changed[0, t] = (changed[0, t] + 1) % 37
        after, _ = model(changed, idx)
        close(after[0, :t], before[0, :t], 1e-6)
        close(after[1], before[1], 1e-6)                                    # nor another row of the batch
        assert ((after - before)[0, t:].abs().amax(-1) > 1e-3).all()        # and everything later sees it


@each_kind
def test_forward_and_loss(kind):
    model, idx, targets = make_model(scale=20, **kind), tokens(2, 9), tokens(9, 2).T
    logits, loss = model(idx, targets)
    each = model(idx, targets, reduction="none")[1]                         # (B, T)
    nats = -logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    close(each, nats)
    close(loss, nats.mean())
    last, nothing = model(idx)
    close(last, logits[:, -1:])
    assert last.shape == (2, 1, 37) and nothing is None
    with pytest.raises(ValueError, match="17 tokens > block_size 16"):
        model(tokens(1, 17))


def test_rotary_sees_distance_only():
    hs, positions = 8, 50
    cos, sin = rotary(hs, positions, "cpu")
    assert cos.shape == sin.shape == (positions, hs // 2)
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, hs).expand(2, 1, 1, positions, hs)       # the same query and key everywhere
    turned_q, turned_k = rotate(q, cos, sin), rotate(k, cos, sin)
    scores = (turned_q @ turned_k.transpose(-1, -2))[0, 0]                  # (T, T)
    close(scores[1:, 1:], scores[:-1, :-1])                                 # moving both by one changes nothing
    close(scores[0, 0], (q @ k.transpose(-1, -2))[0, 0, 0, 0])              # at distance 0: not turned at all
    assert scores[0].std() > 0.1                                            # but the distance does
    close(turned_q.norm(dim=-1), q.norm(dim=-1))


@each_kind
def test_gradients_against_finite_differences(kind, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)           # the model's float32 softmax and loss in float64 too
    model, idx, targets = make_model(scale=20, **kind).double(), tokens(2, 9), tokens(9, 2).T
    model(idx, targets)[1].backward()

    def loss_at(p, shift):
        kept, p.data = p.data, p.data + shift
        loss = model(idx, targets)[1].item()
        p.data = kept
        return loss

    for name, p in model.named_parameters():
        step = torch.randn_like(p)
        step *= 1e-5 / step.norm()
        slope, want = (loss_at(p, step) - loss_at(p, -step)) / 2, (p.grad * step).sum().item()
        assert p.grad.norm() > 1e-6 and abs(slope - want) < 1e-5 * p.grad.norm() * step.norm() / p.numel() ** 0.5, name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "Memory+"])
def test_compiles_without_graph_break(kind):
    torch._dynamo.reset()
    model, idx, targets = make_model(**KINDS[kind]), tokens(2, 9), tokens(9, 2).T
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")    # fullgraph: an error where the graph would break
    for counting in (False, True):
        runs, counts = [], []
        for net in (compiled, model):
            for table in model.tables:
                table.count(counting)
            logits, loss = net(idx, targets)
            runs.append((logits, loss, *torch.autograd.grad(loss, list(model.parameters()))))
            counts.append([table.read_weight.float() for table in model.tables])
        for got, want in zip(*runs):
            close(got, want)
        for got, want in zip(*counts):
            close(got, want)
            assert (want.sum() > 0) == counting


def test_bfloat16_tables_compile_without_graph_break():
    torch._dynamo.reset()
    model, idx, targets = make_model(**KINDS["Memory+"], mem_dtype="bfloat16"), tokens(2, 9), tokens(9, 2).T
    optimizer = TableAdamW(list(model.tables), 1e-3, (0.9, 0.99))           # gives the tables their grad_sum
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    runs = []
    for net in (compiled, model):
        for _ in range(2):                                                  # the gradient adds up in place
            loss = net(idx, targets)[1]
            loss.backward()
        runs.append([loss.detach(), *(t.grad_sum.clone() for t in model.tables), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
        model.zero_grad()
        for table in optimizer.tables:
            assert table.grad_sum.norm() > 0
            table.grad_sum.zero_()
    for got, want in zip(*runs):
        close(got, want)


@pytest.mark.parametrize("kind", ["Memory", "Memory+"])
def test_bfloat16_autocast_trains(kind):
    model, idx, targets = make_model(**KINDS[kind]), tokens(4, 16), tokens(16, 4).T
    want = model(idx, targets)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(idx, targets)[1]
    assert loss.dtype == torch.float32 and abs(loss - want) < 0.02
    loss.backward()
    assert all(p.grad.dtype == p.dtype == torch.float32 and p.grad.isfinite().all() and p.grad.norm() > 0 for p in model.parameters())


# ---------------------------------------------------------------------------------------------------------------------------------
# tables: whose they are

def test_two_models_share_nothing_and_a_seed_decides_all():
    a, b, other = make_model(0, **PLUS), make_model(0, **PLUS), make_model(1, **PLUS)
    for name, p in a.state_dict().items():
        q = b.state_dict()[name]
        assert torch.equal(p, q) and p.data_ptr() != q.data_ptr(), name
        assert "norm" in name or not torch.equal(p, other.state_dict()[name]), name
    with torch.no_grad():
        a.tables[0].values.zero_()
    idx = tokens(2, 9)
    assert torch.equal(b(idx)[0], make_model(0, **PLUS)(idx)[0]) and not torch.equal(a(idx)[0], b(idx)[0])


def gradient_of_table_through(model, layer, idx):
    """The gradient of layer's table when the other memory layers read copies of theirs: what comes through this layer alone."""
    kept = {m: m.tables for _, m in model.memories()}
    for m in kept:
        if m is not layer:
            m.tables = [MemoryTable(6, 16)]
            m.tables[0].load_state_dict(kept[m][0].state_dict())
    grad, = torch.autograd.grad(model(idx, idx)[1], layer.tables[0].values)
    for m, tables in kept.items():
        m.tables = tables
    return grad


@pytest.mark.parametrize("share", [True, False])
def test_memory_layers_share_the_table_or_not(share):
    model, idx = make_model(**PLUS | dict(mem_layers=(2, 0), mem_share=share)), tokens(2, 16)
    layers = [m for _, m in model.memories()]
    assert [i for i, _ in model.memories()] == [0, 2] and len(model.tables) == (1 if share else 2)
    assert (layers[0].tables[0] is layers[1].tables[0]) == share and {m.tables[0] for m in layers} == set(model.tables)
    through = [gradient_of_table_through(model, layer, idx) for layer in layers]
    assert all(grad.norm() > 0 for grad in through)
    whole = torch.autograd.grad(model(idx, idx)[1], [m.tables[0].values for m in layers])
    for layer, grad in enumerate(whole):
        close(grad, through[0] + through[1] if share else through[layer])


# ---------------------------------------------------------------------------------------------------------------------------------
# numbers: parameters, FLOPs, initial values

def test_param_counts_by_hand():
    V, C, attention, mlp, norms = 37, 16, 4 * 16 * 16, 8 * 16 * 16, 16      # a row each: what one part of the tiny model holds
    query, half_keys, table = 16 * 2 * 8, 2 * 2 * 6 * 4, 36 * 16            # (C, H*2d), (2, H, n, d), (S, D) with 2d = C/2
    want = {
        "dense": (dict(), 3 * (attention + mlp), 0, 0, 0),
        "Memory": (MEMORY, 3 * attention + 2 * mlp + query, half_keys, table, 2 * 3 * 16),
        "Memory+": (PLUS, 3 * attention + mlp + 2 * (query + 2 * C * C), 2 * half_keys, table, 2 * 2 * 3 * 16),
        "own tables": (PLUS | dict(mem_share=False), 3 * attention + mlp + 2 * (query + 2 * C * C), 2 * half_keys, 2 * table, 2 * 2 * 3 * 16),
        "D != C": (MEMORY | dict(mem_value_dim=5), 3 * attention + 2 * mlp + query + 5 * C, half_keys, 36 * 5, 2 * 3 * 5),
        "more reads than slots": (MEMORY | dict(mem_topk=6, mem_heads=8), 3 * attention + 2 * mlp + 4 * query, 4 * half_keys, table, table),
    }
    for name, (settings, matrices, keys, values, read) in want.items():
        model, dense = make_model(**settings), matrices + 7 * norms
        counts = model.param_counts()
        assert counts == dict(embedding=V * C, dense=dense, half_keys=keys, values=values, total=V * C + dense + keys + values,
                              active=V * C + dense + keys + read), name
        assert counts["total"] == sum(p.numel() for p in model.parameters()), name


def test_flops_by_hand():
    V, C, T, L = 37, 16, 16, 3
    attention, mlp, scores, head = 4 * C * C, 8 * C * C, 12 * L * T * C, V * C
    assert make_model().flops_per_token() == 6 * (L * (attention + mlp) + head) + scores
    query, half_keys, read = C * 2 * 8, 2 * 2 * 6 * 4, 2 * 3 * C
    assert make_model(**MEMORY).flops_per_token() == 6 * (L * attention + 2 * mlp + head + query + half_keys + read) + scores
    gate = 2 * C * C
    assert make_model(**PLUS).flops_per_token() == 6 * (L * attention + mlp + head + 2 * (query + half_keys + read + gate)) + scores


@pytest.mark.parametrize("share", [True, False])
def test_flops_grow_with_the_half_keys_and_never_with_the_table(share):
    flops = [make_model(**PLUS | dict(mem_n_keys=n, mem_share=share)).flops_per_token() for n in (6, 7, 106)]
    layers, sides, heads, half_dim = 2, 2, 2, 4
    assert flops[1] - flops[0] == 6 * layers * sides * heads * half_dim and flops[2] - flops[0] == 100 * (flops[1] - flops[0])


def test_init_weights():
    C, L, D = 64, 2, 48
    model = make_model(vocab_size=500, n_embd=C, n_layer=L, mem_n_keys=32, mem_value_dim=D, ffn="memory", mem_layers=(1,), mem_heads=4)
    residual = (2 * L) ** -0.5                                              # matrices that write to the residual stream
    std = {"wte.weight": 0.02, "qkv.weight": C**-0.5, "attn.proj.weight": C**-0.5 * residual, "fc.weight": C**-0.5,
           "ffn.proj.weight": (4 * C)**-0.5 * residual, "query.weight": C**-0.5, "gate.weight": C**-0.5,
           "out.weight": D**-0.5 * residual, "values": D**-0.5}
    key_dim, seen = C // 2, set()
    for name, p in model.named_parameters():
        if "norm" in name:
            assert (p == 1).all(), name
        elif name.endswith("half_keys"):                                    # uniform: its bounds, and the standard deviation of one
            assert 0.99 * key_dim**-0.5 < p.abs().max() <= key_dim**-0.5 and p.std().item() == pytest.approx((3 * key_dim) ** -0.5, rel=0.03)
        else:
            suffix, = [s for s in std if name.endswith(s)]
            seen.add(suffix)
            assert p.std().item() == pytest.approx(std[suffix], rel=0.04) and abs(p.mean()) < 4 * std[suffix] / p.numel() ** 0.5, name
    assert seen == set(std) and model.head.weight is model.wte.weight


@each_kind
def test_loss_starts_at_log_v(kind):
    model = make_model(vocab_size=1000, n_embd=64, **kind)
    torch.manual_seed(0)
    idx, targets = torch.randint(1000, (2, 64, 16))
    assert model(idx, targets)[1].item() == pytest.approx(math.log(1000), abs=0.03)


# ---------------------------------------------------------------------------------------------------------------------------------
# settings

BAD_SETTINGS = [
    (dict(vocab_size=0), ["--vocab-size 0 < 1"]),
    (dict(block_size=0), ["--block-size 0 < 1"]),
    (dict(n_layer=0), ["--n-layer 0 < 1"]),
    (dict(n_head=0), ["--n-head 0 < 1"]),
    (dict(n_embd=-4), ["--n-embd -4 < 1"]),
    (dict(dropout=1.0), ["--dropout 1.0", "[0, 1)"]),
    (dict(dropout=-0.1), ["--dropout -0.1", "[0, 1)"]),
    (dict(n_embd=18, n_head=4), ["--n-embd 18", "2 * --n-head = 8"]),
    # Heads of size 3 have no pairs to rotate.
    (dict(n_embd=6, n_head=2), ["--n-embd 6", "2 * --n-head = 4"]),
    (dict(ffn="sparse"), ["--ffn sparse", "dense", "memory"]),
    (MEMORY | dict(mem_n_keys=0), ["--mem-n-keys 0 < 1"]),
    (MEMORY | dict(mem_dtype="float16"), ["--mem-dtype float16", "float32", "bfloat16"]),
    (MEMORY | dict(mem_heads=0), ["--mem-heads 0 < 1"]),
    (MEMORY | dict(mem_topk=0), ["--mem-topk 0 < 1"]),
    (MEMORY | dict(mem_topk=7), ["--mem-topk 7 > 6 half-keys"]),
    (MEMORY | dict(mem_value_dim=-1), ["--mem-value-dim -1 < 0"]),
    (MEMORY | dict(mem_layers=()), ["--mem-layers is empty", "dense"]),
    (MEMORY | dict(mem_layers=(1, 1)), ["--mem-layers (1, 1)", "twice"]),
    (MEMORY | dict(mem_layers=(0, 3)), ["--mem-layers 3", "0..2"]),
    (MEMORY | dict(mem_layers=(-1,)), ["--mem-layers -1", "0..2"]),
    (MEMORY | dict(mem_key_dim=7), ["--mem-key-dim 7", "even"]),
    (MEMORY | dict(mem_key_dim=-2), ["--mem-key-dim -2", ">= 2"]),
    (MEMORY | dict(n_embd=12, mem_key_dim=0, n_head=2, mem_n_keys=46341),
     ["--mem-n-keys 46341", str(46341**2), "2^31"]),
    # The default key dim, n_embd / 2, is odd.
    (MEMORY | dict(n_embd=2, n_head=1), ["--mem-key-dim 1", "even"]),
]


@pytest.mark.parametrize("settings, words", BAD_SETTINGS, ids=str)
def test_bad_settings_are_named(settings, words):
    config = GPTConfig(**dict(n_layer=3, n_head=2, n_embd=16) | settings)
    with pytest.raises(ValueError) as error:
        config.check()
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_a_model_checks_its_settings():
    with pytest.raises(ValueError, match="--mem-topk 7 > 6 half-keys"):
        make_model(**MEMORY | dict(mem_topk=7))


def test_memory_settings_do_not_matter_to_a_dense_model():
    assert GPTConfig(ffn="dense", n_layer=2, mem_layers=(9,), mem_topk=0).check().n_layer == 2


# ---------------------------------------------------------------------------------------------------------------------------------
# generation

def generate(model, idx, n, **settings):
    return torch.cat(list(model.generate(idx, n, **settings)), dim=1)       # (B, n)


@each_kind
@pytest.mark.parametrize("block_size, prompt", [(16, 5), (16, 16), (16, 30), (5, 2), (1, 1)])
def test_cache_changes_nothing(kind, block_size, prompt):
    model, idx = make_model(scale=20, block_size=block_size, **kind).eval(), tokens(3, prompt)

    def seeded():
        return torch.Generator().manual_seed(1)

    for settings in (dict(temperature=0), dict(temperature=1.5, top_k=20, top_p=0.95)):
        with_cache, without = (generate(model, idx, 40, use_cache=c, generator=seeded(), **settings) for c in (True, False))
        assert torch.equal(with_cache, without) and with_cache.shape == (3, 40)
    assert len(with_cache.unique()) > 10                                    # a sample that could have shown a difference


@each_kind
def test_generation_is_the_forward_pass_repeated(kind):
    model, context = make_model(scale=20, **kind).eval(), tokens(3, 4)
    for token in model.generate(context, 12, temperature=0):                # up to block_size
        assert torch.equal(token, model(context)[0][:, -1].argmax(-1, keepdim=True))
        context = torch.cat((context, token), dim=1)


@each_kind
def test_cached_logits(kind):
    model, idx, caches = make_model(scale=20, **kind).eval(), tokens(3, 16), [None] * 3
    want, _ = model(idx, idx)
    got = [model(idx[:, :6], caches=caches)[0], *(model(idx[:, t:t + 1], caches=caches)[0] for t in range(6, 16))]
    close(torch.cat(got, dim=1), want[:, 5:])
    with pytest.raises(ValueError, match="17 tokens > block_size 16"):
        model(idx[:, :1], caches=caches)


LOGITS = torch.tensor([0.05, 0.5, 0.3, 0.15]).log()                         # the likeliest: 1, 2, 3, 0


def sampled(temperature=1.0, top_k=None, top_p=None):
    """The share of each token among 4,000 samples."""
    drawn = sample_token(LOGITS.expand(4000, 4), temperature, top_k, top_p, torch.Generator().manual_seed(0))
    assert drawn.shape == (4000, 1)
    return torch.bincount(drawn[:, 0], minlength=4) / 4000


@pytest.mark.parametrize("settings, shares", [
    (dict(), [0.05, 0.5, 0.3, 0.15]),
    (dict(temperature=0), [0, 1, 0, 0]),
    (dict(top_k=1), [0, 1, 0, 0]),
    (dict(top_k=2), [0, 0.625, 0.375, 0]),
    (dict(top_k=100), [0.05, 0.5, 0.3, 0.15]),
    (dict(top_p=0.01), [0, 1, 0, 0]),
    (dict(top_p=0.51), [0, 0.625, 0.375, 0]),                               # the set that reaches top_p holds the token that crosses it
    (dict(top_p=0.79), [0, 0.625, 0.375, 0]),
    (dict(top_p=0.81), [0, 0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95]),
    (dict(top_p=1.0), [0.05, 0.5, 0.3, 0.15]),
    (dict(top_k=2, top_p=0.6), [0, 1, 0, 0]),                               # of the two left, the first has 0.625
    (dict(temperature=0.5), [0.0025 / 0.365, 0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365]),
    (dict(temperature=0.5, top_p=0.6), [0, 1, 0, 0]),                       # after temperature: 0.25 / 0.365 = 0.68
], ids=str)
def test_sample_token(settings, shares):
    got, want = sampled(**settings), torch.tensor(shares)
    assert ((got > 0) == (want > 0)).all()
    assert ((got - want).abs() <= 4 * (want * (1 - want) / 4000).sqrt()).all(), got  # four standard deviations


def test_sample_token_treats_each_row_alone():
    logits = torch.stack((LOGITS, LOGITS.flip(0), torch.tensor([9.0, 0, 0, 0])))
    for settings in (dict(top_k=1, top_p=None), dict(top_k=None, top_p=0.2)):
        assert sample_token(logits, 1.0, generator=None, **settings)[:, 0].tolist() == [1, 2, 0]


# ---------------------------------------------------------------------------------------------------------------------------------
# facts

@each_kind
def test_answer_agrees_with_forward(kind):
    model = make_model(scale=20, **kind)
    windows = torch.cat((tokens(6, 4), generate(model, tokens(6, 4), 8, temperature=0)), dim=1)  # (6, 12): from 4 on what the model says
    spans = torch.tensor([[4, 12], [4, 7], [11, 12], [4, 12], [6, 9], [1, 4]])
    windows[3, 11] = (windows[3, 11] + 1) % 37                              # the last token of an answer, wrong
    windows[4, 10] = (windows[4, 10] + 1) % 37                              # wrong, but after the answer
    right, nats = model.answer(windows.numpy().astype(np.uint16), spans.numpy())
    assert right.tolist() == [True, True, True, False, True, False]
    for window, (start, end), n in zip(windows, spans.tolist(), nats):
        logits, _ = model(window[None], window[None])
        each = [-logits[0, t - 1].log_softmax(-1)[window[t]].item() for t in range(start, end)]
        assert n == pytest.approx(sum(each), rel=1e-5)


def test_answer_of_many_and_of_none():
    model = make_model(n_layer=1)
    windows, spans = tokens(1030, 5).numpy(), np.tile([2, 4], (1030, 1))    # more than one batch of 1,024
    right, nats = model.answer(windows, spans)
    alone = [model.answer(windows[i:i + 1], spans[i:i + 1]) for i in (0, 1023, 1024, 1029)]
    assert right.shape == nats.shape == (1030,) and right.dtype == bool
    assert right[[0, 1023, 1024, 1029]].tolist() == [r[0] for r, _ in alone]
    assert nats[[0, 1023, 1024, 1029]] == pytest.approx([n[0] for _, n in alone], rel=1e-5)
    right, nats = model.answer(windows[:0], spans[:0])
    assert len(right) == len(nats) == 0


def test_answer_drops_nothing_out():
    model = make_model(dropout=0.5)
    windows, spans = tokens(6, 9).numpy(), np.tile([2, 9], (6, 1))
    for training in (True, False):
        model.train(training)
        assert (model.answer(windows, spans)[1] == model.answer(windows, spans)[1]).all() and model.training == training
