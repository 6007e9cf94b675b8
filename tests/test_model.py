"""The GPT: what a token may see, what is shared and counted, what generation writes.

B, T, C batch, tokens, channels · V vocabulary · hs size of an attention head
R reads per token · n half-keys per side · S = n*n slots · D value dim
"""
import contextlib
import copy
import math
import types

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_file
import train
from memory import Layer, MemoryTable, RowAdam
from model import GPT, KINDS, MLP, GPTConfig, rotary, rotate, sample_token

SMALL = dict(vocab_size=37, block_size=16, n_layer=3, n_head=2, n_embd=16)
MEMORY = dict(ffn="memory", mem_layers=(1,), mem_n_keys=6, mem_heads=2, mem_topk=3,
              mem_gate=False, qk_norm=False)
PLUS = MEMORY | dict(mem_layers=(0, 2), mem_gate=True, qk_norm=True)
MODELS = {"dense": {}, "Memory": MEMORY, "Memory+": PLUS}
each_kind = pytest.mark.parametrize("kind", MODELS.values(), ids=MODELS.keys())


def make_model(seed=0, scale=1.0, **settings):
    """A tiny GPT. A scale > 1 makes it sure of its next tokens, so that they vary."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**SMALL | settings))
    with torch.no_grad():
        model.wte.weight.mul_(scale)
    return model


def tokens(*shape):
    """Random tokens, the same ones whenever the shape is the same."""
    return torch.randint(37, shape, generator=torch.Generator().manual_seed(sum(shape)))


def close(got, want, tolerance=1e-5):
    assert got.shape == want.shape
    error = (got - want).abs().max().item()
    scale = want.abs().max().item()
    assert error <= tolerance * scale, f"error {error:.2e} > {tolerance:.0e} of {scale:.2e}"


# ---- the forward pass

@each_kind
def test_no_token_sees_the_future(kind):
    model = make_model(scale=20, **kind)
    idx = tokens(2, 16)
    before, _ = model(idx, idx)
    for t in (1, 7, 15):
        changed = idx.clone()
        changed[0, t] = (changed[0, t] + 1) % 37
        after, _ = model(changed, idx)
        # Neither the tokens before t nor the other row of the batch see the change.
        close(after[0, :t], before[0, :t], 1e-6)
        close(after[1], before[1], 1e-6)
        # Everything later does.
        difference = (after - before)[0, t:].abs().amax(-1)  # (T - t,)
        assert (difference > 1e-3).all()


@each_kind
def test_forward_and_loss(kind):
    model = make_model(scale=20, **kind)
    idx = tokens(2, 9)
    targets = tokens(9, 2).T
    logits, loss = model(idx, targets)
    _, each = model(idx, targets, reduction="none")  # (B, T)
    nats = -logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)  # (B, T)
    close(each, nats)
    close(loss, nats.mean())
    last, nothing = model(idx)
    close(last, logits[:, -1:])
    assert last.shape == (2, 1, 37)
    assert nothing is None
    with pytest.raises(ValueError, match="17 tokens > block_size 16"):
        model(tokens(1, 17))


def test_rotary_sees_distance_only():
    hs = 8
    positions = 50
    cos, sin = rotary(hs, positions)
    assert cos.shape == sin.shape == (positions, hs)
    # The same query and the same key at every position.
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, hs).expand(2, 1, 1, positions, hs)  # (1, 1, T, hs) both
    turned_q = rotate(q, cos, sin)
    turned_k = rotate(k, cos, sin)
    scores = (turned_q @ turned_k.transpose(-1, -2))[0, 0]  # (T, T)
    # Moving both by one changes nothing, and at distance 0 the score is that of q and k.
    close(scores[1:, 1:], scores[:-1, :-1])
    close(scores[0, 0], (q @ k.transpose(-1, -2))[0, 0, 0, 0])
    # The distance does change it, the length never.
    assert scores[0].std() > 0.1
    close(turned_q.norm(dim=-1), q.norm(dim=-1))


def stay_in_float64(tensor):
    """Stands for Tensor.float, so that the softmax and the loss are in float64 too."""
    return tensor


@each_kind
def test_gradients_against_finite_differences(kind, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", stay_in_float64)
    model = make_model(scale=20, **kind).double()
    idx = tokens(2, 9)
    targets = tokens(9, 2).T
    _, loss = model(idx, targets)
    loss.backward()

    def loss_at(p, shift):
        kept = p.data
        p.data = kept + shift
        _, loss = model(idx, targets)
        p.data = kept
        return loss.item()

    for name, p in model.named_parameters():
        step = torch.randn_like(p)
        step *= 1e-5 / step.norm()
        got = (p.grad * step).sum().item()
        want = (loss_at(p, step) - loss_at(p, -step)) / 2
        usual = p.grad.norm() * step.norm() / p.numel() ** 0.5  # the size of such a product
        assert p.grad.norm() > 1e-6, name
        assert abs(got - want) < 1e-5 * usual, name


@pytest.mark.slow
def test_compiles_without_graph_break():
    """A block with an MLP and one with a memory layer, in a step that counts its reads."""
    torch._dynamo.reset()
    model = make_model(**PLUS | dict(n_layer=2, mem_layers=(1,)))
    idx = tokens(2, 9)
    targets = tokens(9, 2).T
    # fullgraph: an error where the graph would break
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    runs = []
    for net in (compiled, model):
        model.table.count(True)
        logits, loss = net(idx, targets)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        runs.append((logits, loss, *grads, model.table.read_weight.float()))
        assert model.table.read_weight.sum() > 0
    for got, want in zip(*runs):
        close(got, want)


@pytest.mark.slow
def test_bfloat16_tables_compile_without_graph_break():
    torch._dynamo.reset()
    model = make_model(**PLUS | dict(n_layer=2, mem_layers=(0, 1), mem_dtype="bfloat16"))
    idx = tokens(2, 9)
    targets = tokens(9, 2).T
    RowAdam([model.table], 1e-3)  # gives the table a gradient in float32
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    runs = []
    for net in (compiled, model):
        for _ in range(2):  # gradients add up
            _, loss = net(idx, targets)
            loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        assert model.table.values.grad.dtype == torch.float32
        assert model.table.values.grad.norm() > 0
        runs.append(dict(grads, loss=loss.detach()))
        model.zero_grad()
    for name, want in runs[1].items():
        # A compiled backward rounds the gradient of a bfloat16 table before it is added up.
        close(runs[0][name], want, 2**-8 if name.endswith(".values") else 1e-5)


@pytest.mark.parametrize("kind", ["Memory", "Memory+"])
def test_bfloat16_autocast_trains(kind):
    model = make_model(**MODELS[kind])
    idx = tokens(4, 16)
    targets = tokens(16, 4).T
    _, want = model(idx, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, loss = model(idx, targets)
    assert loss.dtype == torch.float32
    assert abs(loss - want) < 0.02
    loss.backward()
    for name, p in model.named_parameters():
        assert p.dtype == p.grad.dtype == torch.float32, name
        assert p.grad.isfinite().all(), name
        assert p.grad.norm() > 0, name


# ---- tables: whose they are

def test_two_models_share_nothing_and_a_seed_decides_all():
    a = make_model(0, **PLUS)
    b = make_model(0, **PLUS)
    other = make_model(1, **PLUS)
    for name, p in a.state_dict().items():
        q = b.state_dict()[name]
        assert torch.equal(p, q), name
        assert p.data_ptr() != q.data_ptr(), name
        if "norm" not in name:
            assert not torch.equal(p, other.state_dict()[name]), name
    with torch.no_grad():
        a.table.values.zero_()
    idx = tokens(2, 9)
    untouched = make_model(0, **PLUS)
    assert torch.equal(b(idx)[0], untouched(idx)[0])
    assert not torch.equal(a(idx)[0], b(idx)[0])


def gradient_of_table_through(model, layer, idx):
    """The gradient that reaches layer's table through this layer alone.

    The other memory layers read copies of their tables in the meantime.
    """
    kept = {m: m.tables for _, m in model.memories()}
    for m in kept:
        if m is not layer:
            copy = MemoryTable(6, 16)
            copy.load_state_dict(kept[m][0].state_dict())
            m.tables = [copy]
    _, loss = model(idx, idx)
    grad, = torch.autograd.grad(loss, layer.table.values)
    for m, tables in kept.items():
        m.tables = tables
    return grad


def test_memory_layers_share_the_table():
    model = make_model(**PLUS | dict(mem_layers=(2, 0)))
    idx = tokens(2, 16)
    assert [block for block, _ in model.memories()] == [0, 2]
    layers = [layer for _, layer in model.memories()]
    assert all(layer.table is model.table for layer in layers)

    through = [gradient_of_table_through(model, layer, idx) for layer in layers]
    assert all(grad.norm() > 0 for grad in through)
    _, loss = model(idx, idx)
    whole, = torch.autograd.grad(loss, model.table.values)
    close(whole, through[0] + through[1])


# ---- numbers: parameters, FLOPs, initial values

# What one part of the tiny model holds. A token's key has C/2 = 2d = 8 numbers.
V, C, T, L = 37, 16, 16, 3
ATTENTION = 4 * C * C
MLP_SIZE = 8 * C * C
NORMS = 7 * C
QUERY = C * 2 * 8  # (C, H*2d)
HALF_KEYS = 2 * 2 * 6 * 4  # (2, H, n, d)
TABLE = 36 * C  # (S, D)
READ = 2 * 3 * C  # (R, D)
GATE = 2 * C * C  # two matrices
BLOCK_1 = 3 * ATTENTION + 2 * MLP_SIZE + QUERY  # matrices with a memory layer in block 1
BLOCKS_0_AND_2 = 3 * ATTENTION + MLP_SIZE + 2 * (QUERY + GATE)

PARAMS = {  # settings, matrices, half-keys, values, numbers of the table that a token reads
    "dense": (dict(), 3 * (ATTENTION + MLP_SIZE), 0, 0, 0),
    "Memory": (MEMORY, BLOCK_1, HALF_KEYS, TABLE, READ),
    "Memory+": (PLUS, BLOCKS_0_AND_2, 2 * HALF_KEYS, TABLE, 2 * READ),
    "D != C": (MEMORY | dict(mem_value_dim=5), BLOCK_1 + 5 * C, HALF_KEYS, 36 * 5, 2 * 3 * 5),
    # Eight heads of six slots read 48 rows, and there are 36.
    "more reads than slots": (MEMORY | dict(mem_topk=6, mem_heads=8),
                              BLOCK_1 + 3 * QUERY, 4 * HALF_KEYS, TABLE, TABLE),
}


@pytest.mark.parametrize("settings, matrices, half_keys, values, read", PARAMS.values(),
                         ids=PARAMS.keys())
def test_param_counts_by_hand(settings, matrices, half_keys, values, read):
    model = make_model(**settings)
    counts = model.param_counts()
    dense = matrices + NORMS
    assert counts == dict(
        embedding=V * C, dense=dense, half_keys=half_keys, values=values,
        total=V * C + dense + half_keys + values,
        active=V * C + dense + half_keys + read)
    assert counts["total"] == sum(p.numel() for p in model.parameters())


FLOPS = {  # settings, numbers that a token is multiplied with, but for the head
    "dense": (dict(), L * (ATTENTION + MLP_SIZE)),
    "Memory": (MEMORY, L * ATTENTION + 2 * MLP_SIZE + QUERY + HALF_KEYS + READ),
    "Memory+": (PLUS, L * ATTENTION + MLP_SIZE + 2 * (QUERY + HALF_KEYS + READ + GATE)),
}


@pytest.mark.parametrize("settings, multiplied", FLOPS.values(), ids=FLOPS.keys())
def test_flops_by_hand(settings, multiplied):
    head = V * C
    attention_scores = 12 * L * T * C
    want = 6 * (multiplied + head) + attention_scores
    assert make_model(**settings).flops_per_token() == want


def test_flops_grow_with_the_half_keys_and_never_with_the_table():
    flops = []
    for n in (6, 7, 106):
        model = make_model(**PLUS | dict(mem_n_keys=n))
        flops.append(model.flops_per_token())
    layers, sides, heads, half_dim = 2, 2, 2, 4
    assert flops[1] - flops[0] == 6 * layers * sides * heads * half_dim
    assert flops[2] - flops[0] == 100 * (flops[1] - flops[0])


def test_init_weights():
    C = 64
    L = 2
    D = 48
    key_dim = C // 2
    model = make_model(vocab_size=500, n_embd=C, n_layer=L, ffn="memory", mem_layers=(1,),
                       mem_n_keys=32, mem_value_dim=D, mem_heads=4)
    residual = (2 * L) ** -0.5  # of matrices that write to the residual stream
    std = {
        "wte.weight": 0.02,
        "qkv.weight": C**-0.5,
        "attn.proj.weight": C**-0.5 * residual,
        "fc.weight": C**-0.5,
        "ffn.proj.weight": (4 * C) ** -0.5 * residual,
        "query.weight": C**-0.5,
        "gate.weight": C**-0.5,
        "out.weight": D**-0.5 * residual,
        "values": D**-0.5,
    }
    seen = set()
    for name, p in model.named_parameters():
        if "norm" in name:
            assert (p == 1).all(), name
        elif name.endswith("half_keys"):  # uniform
            assert 0.99 * key_dim**-0.5 < p.abs().max() <= key_dim**-0.5
            assert p.std().item() == pytest.approx((3 * key_dim) ** -0.5, rel=0.03)
        else:
            suffix, = [ending for ending in std if name.endswith(ending)]
            seen.add(suffix)
            assert p.std().item() == pytest.approx(std[suffix], rel=0.04), name
            assert abs(p.mean()) < 4 * std[suffix] / p.numel() ** 0.5, name
    assert seen == set(std)
    assert model.head.weight is model.wte.weight


@each_kind
def test_loss_starts_at_log_v(kind):
    model = make_model(vocab_size=1000, n_embd=64, **kind)
    torch.manual_seed(0)
    idx, targets = torch.randint(1000, (2, 64, 16))  # (B, T) both
    _, loss = model(idx, targets)
    assert loss.item() == pytest.approx(math.log(1000), abs=0.03)


# ---- settings

BAD_SETTINGS = [
    (dict(vocab_size=0), ["--vocab-size 0 is not at least 1: raise it"]),
    (dict(block_size=0), ["--block-size 0 is not at least 1: raise it"]),
    (dict(n_layer=0), ["--n-layer 0 is not at least 1: raise it"]),
    (dict(n_head=0), ["--n-head 0 is not at least 1: raise it"]),
    (dict(n_embd=-4), ["--n-embd -4 is not at least 1"]),
    (dict(dropout=1.0), ["--dropout 1.0 is above 0.9", "lower it"]),
    (dict(dropout=-0.1), ["--dropout -0.1 is not at least 0"]),
    (dict(dropout=math.nan), ["--dropout nan is not at least 0"]),
    (dict(n_embd=18, n_head=4), ["--n-embd 18", "2 * --n-head = 8"]),
    # Heads of size 3 have no pairs to rotate.
    (dict(n_embd=6, n_head=2), ["--n-embd 6", "2 * --n-head = 4"]),
    (dict(ffn="sparse"), ["--ffn sparse", "dense", "memory"]),
    (MEMORY | dict(mem_n_keys=0), ["--mem-n-keys 0 is not at least 1"]),
    (MEMORY | dict(mem_dtype="float16"), ["--mem-dtype float16", "float32", "bfloat16"]),
    (MEMORY | dict(mem_heads=0), ["--mem-heads 0 is not at least 1"]),
    (MEMORY | dict(mem_topk=0), ["--mem-topk 0 is not at least 1"]),
    (MEMORY | dict(mem_topk=7), ["--mem-topk 7 > 6 half-keys"]),
    (MEMORY | dict(mem_value_dim=-1), ["--mem-value-dim -1 is not at least 0"]),
    (MEMORY | dict(mem_layers=()), ["--mem-layers is empty", "dense"]),
    (MEMORY | dict(mem_layers=(1, 1)), ["--mem-layers (1, 1)", "twice"]),
    (MEMORY | dict(mem_layers=(0, 3)), ["--mem-layers 3", "0..2"]),
    (MEMORY | dict(mem_layers=(-1,)), ["--mem-layers -1", "0..2"]),
    (MEMORY | dict(mem_key_dim=7), ["--mem-key-dim 7", "even"]),
    (MEMORY | dict(mem_key_dim=-2), ["--mem-key-dim -2 is not at least 0"]),
    # 46341**2 slots are more than int32 can number.
    (MEMORY | dict(mem_n_keys=46341), ["--mem-n-keys 46341 is above 46340: lower it"]),
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
    config = GPTConfig(ffn="dense", n_layer=2, mem_layers=(9,), mem_topk=64, mem_n_keys=8)
    assert config.check() is config


# ---- generation

def generate(model, idx, n, **settings):
    """n new tokens for each row: idx (B, T) -> (B, n)."""
    return torch.cat(list(model.generate(idx, n, **settings)), dim=1)


class Uncached(GPT):
    """Reads the whole context for each token."""

    def forward(self, idx, caches=None, history=None):
        return super().forward(history)


def without_cache(model):
    twin = copy.deepcopy(model)
    twin.__class__ = Uncached
    return twin


@pytest.mark.parametrize("kind", [{}, PLUS], ids=["dense", "Memory+"])
@pytest.mark.parametrize("block_size, prompt", [(16, 5), (16, 30), (5, 2), (1, 1)])
def test_cache_changes_nothing(kind, block_size, prompt):
    """Also when the context is full: it is after 11 tokens, at once, or again and again."""
    model = make_model(scale=20, block_size=block_size, **kind).eval()
    idx = tokens(3, prompt)
    written = []
    for one in (model, without_cache(model)):
        generator = torch.Generator().manual_seed(1)
        written.append(generate(one, idx, 24, temperature=1.5, top_k=20, top_p=0.95,
                                generator=generator))
    assert written[0].shape == (3, 24)
    assert torch.equal(*written)
    assert len(written[0].unique()) > 10, "too few different tokens to show a difference"


@each_kind
def test_generation_is_the_forward_pass_repeated(kind):
    model = make_model(scale=20, **kind).eval()
    context = tokens(3, 4)
    for token in model.generate(context, 12, temperature=0):  # up to block_size
        logits, _ = model(context)  # (B, 1, V)
        assert torch.equal(token, logits[:, -1].argmax(-1, keepdim=True))
        context = torch.cat((context, token), dim=1)


@each_kind
def test_cached_logits(kind):
    model = make_model(scale=20, **kind).eval()
    idx = tokens(3, 16)
    want, _ = model(idx, idx)
    # Six tokens at once, then one after the other.
    caches = [None] * 3
    logits, _ = model(idx[:, :6], caches=caches)
    got = [logits]
    for t in range(6, 16):
        logits, _ = model(idx[:, t:t + 1], caches=caches)
        got.append(logits)
    close(torch.cat(got, dim=1), want[:, 5:])
    with pytest.raises(ValueError, match="17 tokens > block_size 16"):
        model(idx[:, :1], caches=caches)


def test_a_filled_cache_takes_one_token_at_a_time():
    """There is no mask for more: the first of two would see the second."""
    model = make_model()
    caches = [None] * 3
    model(tokens(1, 4), caches=caches)
    with pytest.raises(ValueError, match="2 tokens at once with a filled cache"):
        model(tokens(1, 2), caches=caches)


LOGITS = torch.tensor([0.05, 0.5, 0.3, 0.15]).log()  # the likeliest first: 1, 2, 3, 0


def sampled(temperature=1.0, top_k=None, top_p=None):
    """The share of each token among 4,000 samples."""
    generator = torch.Generator().manual_seed(0)
    drawn = sample_token(LOGITS.expand(4000, 4), temperature, top_k, top_p, generator)
    assert drawn.shape == (4000, 1)
    return torch.bincount(drawn[:, 0], minlength=4) / 4000


SHARES = [
    (dict(), [0.05, 0.5, 0.3, 0.15]),
    (dict(temperature=0), [0, 1, 0, 0]),
    (dict(top_k=1), [0, 1, 0, 0]),
    (dict(top_k=2), [0, 0.625, 0.375, 0]),
    (dict(top_k=100), [0.05, 0.5, 0.3, 0.15]),
    (dict(top_p=0.01), [0, 1, 0, 0]),
    # The set that reaches top_p holds the token that crosses it.
    (dict(top_p=0.51), [0, 0.625, 0.375, 0]),
    (dict(top_p=0.79), [0, 0.625, 0.375, 0]),
    (dict(top_p=0.81), [0, 0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95]),
    (dict(top_p=1.0), [0.05, 0.5, 0.3, 0.15]),
    # Of the two that top_k leaves, the first has 0.625.
    (dict(top_k=2, top_p=0.6), [0, 1, 0, 0]),
    # The temperature comes first: 0.25 / 0.365 = 0.68.
    (dict(temperature=0.5), [0.0025 / 0.365, 0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365]),
    (dict(temperature=0.5, top_p=0.6), [0, 1, 0, 0]),
]


@pytest.mark.parametrize("settings, shares", SHARES, ids=str)
def test_sample_token(settings, shares):
    got = sampled(**settings)
    want = torch.tensor(shares)
    deviation = (want * (1 - want) / 4000).sqrt()
    assert ((got > 0) == (want > 0)).all()
    assert ((got - want).abs() <= 4 * deviation).all(), got


def test_sample_token_treats_each_row_alone():
    logits = torch.stack((LOGITS, LOGITS.flip(0), torch.tensor([9.0, 0, 0, 0])))
    for settings in (dict(top_k=1, top_p=None), dict(top_k=None, top_p=0.2)):
        drawn = sample_token(logits, 1.0, generator=None, **settings)
        assert drawn[:, 0].tolist() == [1, 2, 0]


# ---- facts

@each_kind
def test_answer_agrees_with_forward(kind):
    model = make_model(scale=20, **kind)
    prompts = tokens(6, 4)
    answers = generate(model, prompts, 8, temperature=0)
    windows = torch.cat((prompts, answers), dim=1)  # (6, 12): from 4 on what the model says
    spans = torch.tensor([[4, 12], [4, 7], [11, 12], [4, 12], [6, 9], [1, 4]])
    windows[3, 11] = (windows[3, 11] + 1) % 37  # the last token of an answer, wrong
    windows[4, 10] = (windows[4, 10] + 1) % 37  # wrong, but after the answer
    right, nats = model.answer(windows.numpy().astype(np.uint16), spans.numpy())
    assert right.tolist() == [True, True, True, False, True, False]
    for window, (start, end), n in zip(windows, spans.tolist(), nats):
        logits, _ = model(window[None], window[None])
        log_probability = logits[0].log_softmax(-1)  # (T, V)
        each = [-log_probability[t - 1, window[t]].item() for t in range(start, end)]
        assert n == pytest.approx(sum(each), rel=1e-5)


def test_answer_of_many_and_of_none(monkeypatch):
    monkeypatch.setattr(model_file, "TOKENS_AT_ONCE", 40)
    model = make_model(n_layer=1)
    windows = tokens(23, 5).numpy()  # 4 tokens of each are read, those of 10 windows at a time
    spans = np.tile([2, 4], (23, 1))
    right, nats = model.answer(windows, spans)
    assert right.shape == nats.shape == (23,)
    assert right.dtype == bool
    for i in (0, 9, 10, 19, 20, 22):
        right_alone, nats_alone = model.answer(windows[i:i + 1], spans[i:i + 1])
        assert right[i] == right_alone[0]
        assert nats[i] == pytest.approx(nats_alone[0], rel=1e-5)
    right, nats = model.answer(windows[:0], spans[:0])
    assert len(right) == len(nats) == 0


def test_answer_drops_nothing_out():
    model = make_model(dropout=0.5)
    windows = tokens(6, 9).numpy()
    spans = np.tile([2, 9], (6, 1))
    for training in (True, False):
        model.train(training)
        _, nats = model.answer(windows, spans)
        _, again = model.answer(windows, spans)
        assert (nats == again).all()
        assert model.training == training


# ---- how much memory evaluation takes

class LargestTensor(TorchDispatchMode):
    """Sees every tensor that an operation makes; `bytes` is the size of the largest one."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return made


def model_of_web_text(block_size):
    """One narrow block, with as many tokens in its vocabulary as GPT-2 has."""
    return make_model(vocab_size=50_257, block_size=block_size, n_layer=1, n_head=1, n_embd=4)


def ask(model, windows):
    model.answer(windows, np.tile([1, windows.shape[1]], (len(windows), 1)))


def evaluate(model, windows):
    """train.evaluate on all of these windows (W, T+1)."""
    loader = types.SimpleNamespace(windows=len(windows), T=windows.shape[1] - 1)

    def window(i):
        chosen = torch.from_numpy(windows[i])  # (b, T+1)
        return chosen[:, :-1], chosen[:, 1:]
    loader.window = window
    return train.evaluate(model, loader, len(windows), contextlib.nullcontext())


@pytest.mark.parametrize("work", [ask, evaluate])
def test_logits_stay_small_however_many_windows_there_are(work):
    """With a large vocabulary and short windows, it is the logits that fill the memory."""
    model = model_of_web_text(20)
    windows = np.random.default_rng(0).integers(50_257, size=(50, 21))  # 200 MB of logits
    with LargestTensor() as largest:
        work(model, windows)
    assert 2**25 < largest.bytes <= 2**26


def test_a_window_larger_than_the_bound_is_read_alone():
    model = model_of_web_text(400)
    windows = np.random.default_rng(0).integers(50_257, size=(1, 401))  # 80 MB of logits
    with LargestTensor() as largest:
        loss = evaluate(model, windows)
    assert 2**26 < largest.bytes <= 4 * 400 * 50_257
    _, want = model(torch.from_numpy(windows[:, :-1]), torch.from_numpy(windows[:, 1:]))
    assert loss == pytest.approx(want.item(), rel=1e-5)
    _, nats = model.answer(windows, np.array([[1, 401]]))
    assert nats.item() / 400 == pytest.approx(want.item(), rel=1e-5)


def test_a_small_vocabulary_does_not_make_a_batch_endless():
    """Then the largest tensors are what a memory layer makes for its search."""
    model = make_model(**MEMORY)
    assert model.windows_at_once(16) * 16 == model_file.TOKENS_AT_ONCE


# ---- a kind of layer of one's own

class Halved(Layer):
    """A layer that gives half of what it gets, times a trained number for each channel."""

    def __init__(self, C):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.empty(C))

    def forward(self, x):
        return self.scale * x / 2  # (B, T, C)

    @classmethod
    def check(cls, config):
        if config.n_embd == 20:
            raise ValueError("--n-embd 20: no such width")

    @classmethod
    def from_config(cls, config, block, table):
        assert table is None
        return cls(config.n_embd)

    def init_weights(self, divisor):
        torch.nn.init.ones_(self.scale)


def test_a_new_kind_of_layer_is_a_line_in_kinds(monkeypatch):
    """It is checked, counted, drawn and trained by what it says of itself."""
    monkeypatch.setitem(KINDS, "halved", f"{__name__}:Halved")
    model = make_model(ffn="halved", mem_layers=(1,))
    (block, layer), = model.memories()
    assert block == 1 and isinstance(layer, Halved) and (layer.scale == 1).all()
    assert isinstance(model.blocks[0].ffn, MLP) and model.table is None
    dense = make_model()
    assert model.param_counts()["total"] == dense.param_counts()["total"] - MLP_SIZE + C
    assert model.flops_per_token() == dense.flops_per_token() - 6 * MLP_SIZE
    groups = model.parameter_groups()
    assert any(p is layer.scale for p in groups[False, "learning_rate"])
    assert sum(map(len, groups.values())) == len(list(model.parameters()))
    idx = tokens(2, 9)
    _, loss = model(idx, idx)
    loss.backward()
    assert layer.scale.grad.norm() > 0
    with pytest.raises(ValueError, match="no such width"):
        make_model(ffn="halved", mem_layers=(1,), n_embd=20)
