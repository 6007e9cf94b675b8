"""The layers that stand beside the memory layer: each does what its formula says.

Each is held to a twin that follows the formula word by word, one token and one read at a time.
"""
import copy
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_model import without_cache
from test_parallel import launch
from test_train import TINY

import train
from memory import MemoryTable
from model import GPT, KINDS, GPTConfig
from support import settings
from support.rivals import PEER, HashedMemory, MixtureOfExperts, UltraMem, tucker_topk

V, T, C = 50, 12, 16
RIVALS = [kind for kind in KINDS if kind not in ("dense", "memory")]


def make(kind, **changes):
    torch.manual_seed(0)
    small = dict(vocab_size=V, block_size=T, n_layer=3, n_head=2, n_embd=C, ffn=kind,
                 mem_layers=(1, 2), mem_n_keys=16, mem_topk=4, mem_heads=2)
    return GPT(GPTConfig(**small | changes)).double()


def check_gradients(layer, twin, x, *more):
    """Output and gradients of a layer are those of its twin, a function of (layer, x, ...)."""
    x.requires_grad_()
    parameters = [x, *(p for p in layer.parameters()), *(t.values for t in tables(layer))]
    results = []
    for forward in (layer, lambda *args: twin(layer, *args)):
        y = forward(x, *more)
        grad_y = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
        grads = torch.autograd.grad(y, parameters, grad_y, allow_unused=True)
        results.append((y, *grads))
    used = 0
    for got, want in zip(*results):
        if want is None:
            assert got is None or not got.any()
            continue
        used += 1
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-9)
        assert want.any()
    assert used >= 3


def tables(layer):
    return getattr(layer, "tables", [])


# ---- hash

def hashed():
    torch.manual_seed(0)
    table = MemoryTable(8, C).double()
    return HashedMemory(C, table, reads=7, seed=3).double()


def hash_twin(layer, x, tokens):
    values = layer.table.values
    y = torch.zeros_like(x)
    for b in range(len(x)):
        for t in range(x.shape[1]):
            weights = (layer.weigh.weight @ x[b, t]).softmax(0)
            for r in range(layer.reads):
                h = 0
                for i in range(1 + r % 3):
                    h += (tokens[b, t + 2 - i].item() + 2) * layer.factors[r, i].item()
                h = (h ^ (h >> 29)) * 0x2545F4914F6CDD1D
                h = (h + 2**63) % 2**64 - 2**63  # as 64 bits with a sign
                y[b, t] += weights[r] * values[(h >> 33) % len(values)]
    return y


def test_hashed_memory_is_its_formula():
    layer = hashed()
    tokens = torch.randint(V, (2, T + 2))
    tokens[:, :2] = -1
    check_gradients(layer, hash_twin, torch.randn(2, T, C).double(), tokens)


def test_a_hash_sees_as_many_tokens_as_it_should():
    layer = hashed()
    tokens = torch.randint(V, (1, T + 2))
    slots = layer.search(tokens)  # (1, T, R)
    assert slots.min() >= 0 and slots.max() < 64 and len(slots.unique()) > 40
    for back in range(4):  # another token, so many places before the last one
        other = tokens.clone()
        other[0, -1 - back] = (other[0, -1 - back] + 1) % V
        moved = layer.search(other)[0, -1] != slots[0, -1]  # (R,)
        sees = torch.arange(7) % 3 >= back
        assert not moved[~sees].any()
        assert moved[sees].float().mean() > 0.5 or not sees.any()


def test_layers_hash_differently():
    model = make("hash")
    one, other = (layer.factors for _, layer in model.memories())
    assert (one != other).any(dim=1).all()


# ---- UltraMem

def ultramem(topk=3):
    torch.manual_seed(0)
    layer = UltraMem(C, MemoryTable(3, 5).double(), heads=2, topk=topk, key_dim=8).double()
    torch.nn.init.normal_(layer.core)
    return layer


def ultramem_scores(layer, x, h):
    """What head h makes of one token x (C,): the scores of all pairs, (n, n), and the core's u, v.

    One query and one set of half-keys at a time.
    """
    d = layer.half_dim
    queries = F.rms_norm((layer.query.weight @ x).view(2, 2, 2, d), (d,)) / d**0.5
    keys = F.rms_norm(layer.half_keys, (d,))
    rows, columns = (torch.stack([keys[side, h, r] @ queries[side, h, r] for r in range(2)])
                     for side in range(2))  # (r, n) both
    u, _, v = torch.linalg.svd(layer.core[h].detach().float())
    sign = 1 if u[:, 0].sum() >= 0 else -1
    u = sign * u[:, 0].double()
    v = sign * v[0].double()
    shortlist = [set((a @ scores).topk(layer.topk).indices.tolist())
                 for a, scores in ((u, rows), (v, columns))]
    return rows.T @ layer.core[h] @ columns, shortlist


def ultramem_twin(layer, x):
    table = layer.table
    S = len(table.values)
    ways = layer.out.weight.view(C, 4, -1)  # (C, 4, D)
    y = torch.zeros_like(x)
    for b in range(len(x)):
        for t in range(x.shape[1]):
            for h in range(2):
                scores, (some_rows, some_columns) = ultramem_scores(layer, x[b, t], h)
                pairs = [(i, j) for i in some_rows for j in some_columns]
                pairs.sort(key=lambda pair: -scores[pair].item())
                for i, j in pairs[:layer.topk]:
                    virtual = layer.shuffle[i * 6 + j].item()
                    value = table.values[virtual % S]
                    y[b, t] += scores[i, j] / layer.topk * (ways[:, virtual // S] @ value)
    return y


@pytest.mark.parametrize("topk", [1, 3, 6])
def test_ultramem_is_its_formula(topk):
    check_gradients(ultramem(topk), ultramem_twin, torch.randn(2, T, C).double())


def test_ultramem_finds_the_best_pairs_of_all_when_it_may_shortlist_all():
    """The core's other singular vectors do not matter then."""
    layer = ultramem(topk=6)
    x = torch.randn(5, C).double()
    _, _, weights = layer.search(x)  # (5, 2 * 6)
    for n in range(5):
        for h in range(2):
            every, _ = ultramem_scores(layer, x[n], h)
            found = weights.view(5, 2, 6)[n, h] * 6
            assert torch.allclose(found, every.flatten().topk(6).values)


def test_ultramem_reads_every_row_in_four_ways():
    layer = ultramem()
    virtual = layer.shuffle
    assert torch.equal(virtual.sort().values, torch.arange(36))
    assert ((virtual % 9).bincount() == 4).all() and ((virtual // 9).bincount() == 9).all()
    assert not torch.equal(virtual, torch.arange(36))


def test_a_core_of_rank_one_loses_nothing_in_the_shortlist():
    """As it is when training begins: score = (sum of the row's scores) * (sum of the column's)."""
    torch.manual_seed(0)
    rows = torch.rand(1, 2, 7, 20).double()
    columns = torch.rand(1, 2, 7, 20).double()
    core = torch.full((1, 2, 2), 0.5).double()
    scores, i, j = tucker_topk(rows, columns, core, 5)
    every = torch.einsum("hrni,hrq,hqnj->nhij", rows, core, columns).flatten(2)
    assert torch.allclose(scores, every.topk(5).values)
    assert torch.allclose(scores, every.gather(2, i * 20 + j))


@pytest.mark.parametrize("table, sizes, words", [
    (dict(), dict(topk=7), "topk 7 is not between 1 and the 6 half-keys"),
    (dict(), dict(key_dim=5), "key_dim 5 is not an even number"),
    (dict(dtype=torch.bfloat16), dict(), "whole tables in float32"),
])
def test_an_ultramem_that_cannot_work_is_refused(table, sizes, words):
    with pytest.raises(ValueError, match=words):
        UltraMem(C, MemoryTable(3, 5, **table), **dict(topk=3) | sizes)


# ---- PEER

def peer():
    torch.manual_seed(0)
    table = MemoryTable(5, 2 * C, std=PEER.std(C, 6)).double()
    return PEER(C, table, heads=2, topk=3, key_dim=8).double()


def peer_twin(layer, x):
    finder = layer.finder
    values = layer.table.values
    d = finder.half_dim
    y = torch.zeros_like(x)
    for b in range(len(x)):
        for t in range(x.shape[1]):
            queries = F.rms_norm((finder.query.weight @ x[b, t]).view(2, 2, d), (d,)) / d**0.5
            keys = F.rms_norm(finder.half_keys, (d,))
            for h in range(2):
                scores = (keys[0, h] @ queries[h, 0])[:, None] + keys[1, h] @ queries[h, 1]
                best, experts = scores.flatten().topk(3)
                for weight, i in zip(best.softmax(0), experts):
                    u, v = values[i].chunk(2)
                    y[b, t] += weight * F.gelu(x[b, t] @ u) * v
    return y


def test_peer_is_its_formula():
    check_gradients(peer(), peer_twin, torch.randn(2, T, C).double())


def test_peer_draws_u_and_v_by_their_variance():
    table = MemoryTable(64, 2 * C, std=PEER.std(C, 50))
    u, v = table.values.chunk(2, dim=1)
    assert abs(u.std().item() * C**0.5 - 1) < 0.02
    assert abs(v.std().item() * 50**0.5 - 1) < 0.02


# ---- mixture of experts

def experts(topk=3):
    torch.manual_seed(0)
    layer = MixtureOfExperts(C, experts=6, hidden=5, topk=topk).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    return layer


def experts_twin(layer, x):
    y = torch.zeros_like(x)
    for b in range(len(x)):
        for t in range(x.shape[1]):
            p = (layer.router.weight @ x[b, t]).float().softmax(0)
            best, chosen = p.topk(layer.topk)
            total = best.sum() if layer.topk > 1 else 1
            for weight, e in zip(best / total, chosen):
                hidden = F.gelu(x[b, t] @ layer.experts_in[e])
                y[b, t] = y[b, t] + weight.double() * (hidden @ layer.experts_out[e])
    return y


@pytest.mark.parametrize("topk", [1, 3, 6])
def test_a_mixture_of_experts_is_its_formula(topk):
    torch.manual_seed(1)
    check_close(experts(topk), experts_twin, torch.randn(2, T, C).double())


def check_close(layer, twin, x):
    """As check_gradients, in the float32 of the router."""
    x.requires_grad_()
    parameters = [x, *layer.parameters()]
    grad_y = torch.randn(x.shape).double()
    got = layer(x)
    want = twin(layer, x)
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)
    for a, b in zip(torch.autograd.grad(got, parameters, grad_y),
                    torch.autograd.grad(want, parameters, grad_y)):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3)
        assert b.any()


def test_no_token_is_dropped_when_all_want_one_expert():
    layer = experts(topk=1)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[2] = 1.0
    x = torch.rand(2, T, C).double() + 1
    weights, chosen, _ = layer.route(x.view(-1, C))
    assert (chosen == 2).all()
    assert torch.allclose(layer(x), experts_twin(layer, x), rtol=1e-4)
    assert layer(x).abs().sum(-1).min() > 0


def test_balance_is_1_for_level_experts_and_E_for_a_single_one():
    layer = experts(topk=1)
    x = torch.rand(4, T, C).double() + 1
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[2] = 10.0
    layer(x)
    assert abs(layer.balance.item() - 6) < 0.01
    with torch.no_grad():
        layer.router.weight.normal_(std=0.01)
    layer(torch.randn(40, T, C).double())
    assert abs(layer.balance.item() - 1) < 0.1


def test_balance_is_in_the_training_loss_alone():
    model = make("moe", moe_balance=0.5)
    idx = torch.randint(V, (3, T))
    kept = []
    for _, layer in model.memories():
        layer.register_forward_hook(lambda layer, *_: kept.append(layer.balance))
    model.train()
    _, training = model(idx, idx)
    balance = torch.stack(kept).mean()
    model.eval()
    _, plain = model(idx, idx)
    assert torch.allclose(training, plain + 0.5 * balance)
    assert balance >= 0.9


# ---- all of them in a GPT

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("assign", [False, True])
def test_a_model_that_is_made_on_the_meta_device(kind, assign):
    """What no checkpoint holds is made again when its weights are loaded."""
    want = make(kind)
    with torch.device("meta"):
        model = make(kind)
    assert all(buffer.is_meta for buffer in model.buffers())
    if not assign:
        model.to_empty(device="cpu")
        for buffer in model.buffers():
            buffer.fill_(7)  # whatever stood in this memory
    model.load_state_dict(want.state_dict(), assign=assign)
    idx = torch.randint(V, (3, T))
    for got, wanted in zip(model(idx, idx), want(idx, idx)):
        assert torch.equal(got, wanted)
    assert model.head.weight is model.wte.weight
    assert len(list(model.parameters())) == len(list(want.parameters()))
    assert model.state_dict().keys() == want.state_dict().keys()
    constants = dict(want.named_buffers())
    for name, buffer in model.named_buffers():
        assert buffer.dtype == constants[name].dtype, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", [True, False])
def test_a_model_that_has_run_can_be_copied(kind, targets):
    """Averaging the weights over training begins with a copy."""
    model = make(kind)
    idx = torch.randint(V, (3, T))
    _, loss = model(idx, idx if targets else None)
    assert torch.equal(copy.deepcopy(model)(idx)[0], model(idx)[0])
    assert all(layer.balance is None for _, layer in model.memories())
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    if targets:
        loss.backward()


@pytest.mark.parametrize("kind", RIVALS)
def test_the_future_is_not_seen(kind):
    model = make(kind).eval()
    idx = torch.randint(V, (2, T))
    logits, _ = model(idx, idx)
    for t in range(1, T):
        other = idx.clone()
        other[:, t:] = (other[:, t:] + 1 + torch.randint(V - 1, (2, T - t))) % V
        changed, _ = model(other, other)
        assert torch.allclose(changed[:, :t], logits[:, :t], rtol=1e-9, atol=1e-12)
        assert not torch.allclose(changed[:, t], logits[:, t])


@pytest.mark.parametrize("kind", RIVALS)
def test_a_cache_changes_no_token(kind):
    model = make(kind).eval()
    prompt = torch.randint(V, (2, 3))
    texts = []
    for one in (model, without_cache(model)):
        generator = torch.Generator().manual_seed(0)
        texts.append(torch.cat(list(one.generate(prompt, 30, generator=generator)), dim=1))
    assert torch.equal(*texts)
    assert len(texts[0].unique()) > 5


@pytest.mark.parametrize("kind", RIVALS)
@pytest.mark.parametrize("n", [32, 128, 256])
def test_rivals_are_matched_at_the_default_size(kind, n):
    """As many parameters as the memory model, at most 1.1 times the FLOPs of the dense one."""
    def size(kind):
        config = GPTConfig(vocab_size=833, block_size=9, n_layer=3, n_head=4, n_embd=64, ffn=kind,
                           mem_layers=(1,), mem_n_keys=n, mem_key_dim=16, mem_gate=False,
                           qk_norm=False)
        with torch.device("meta"):  # without weights
            model = GPT(config)
        return model.param_counts()["total"], model.flops_per_token()
    total, flops = size(kind)
    memory_total, _ = size("memory")
    _, dense_flops = size("dense")
    assert abs(total / memory_total - 1) < 0.03
    assert flops <= 1.1 * dense_flops


def test_counts_of_a_mixture_add_up():
    model = make("moe", moe_experts=8, moe_topk=2)
    counts = model.param_counts()
    # S / (2 * E) = 256 / 16 hidden units; two layers.
    assert counts["experts"] == 2 * 8 * 2 * C * 16
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    assert counts["total"] - counts["active"] == 2 * 6 * 2 * C * 16
    dense = make("dense").flops_per_token()
    mlp = 8 * C * C
    assert model.flops_per_token() - dense == 6 * 2 * (8 * C + 2 * 2 * C * 16 - mlp)


@pytest.mark.parametrize("kind, changes, words", [
    ("moe", dict(mem_n_keys=512), "cannot be matched"),
    ("moe", dict(moe_experts=300), "--moe-experts 300"),
    ("moe", dict(moe_experts=-1), "--moe-experts"),
    ("moe", dict(moe_topk=65), "--moe-topk 65"),
    ("moe", dict(moe_balance=float("nan")), "--moe-balance"),
    ("moe", dict(mem_dtype="bfloat16"), "--ffn moe has no"),
    ("peer", dict(mem_dtype="bfloat16"), "--ffn peer has no"),
    ("peer", dict(mem_value_dim=8), "--mem-value-dim"),
    ("ultramem", dict(mem_value_dim=8), "--ffn ultramem has no"),
    ("ultramem", dict(mem_n_keys=5, mem_gate=False), "as large as a table of --mem-n-keys 5"),
    ("ultramem", dict(mem_n_keys=7, mem_topk=7, mem_gate=False), "--mem-topk 7: UltraMem reads"),
    ("engram", {}, "choose dense, memory, ultramem, hash, peer, moe"),
])
def test_what_cannot_work_is_refused(kind, changes, words):
    with pytest.raises(ValueError, match=words):
        make(kind, **changes)


# ---- training

def trainer(kind, data, out, resume=False):
    """A Trainer of a tiny run of 24 steps."""
    argv = [*TINY, "--data", str(data), "--ffn", kind, "--max-steps", "24", "--out-dir", str(out),
            "--learning-rate", "1e-2"]
    s, *_ = train.read_settings(argv)
    meta = settings.fit_to_data(s, world=1)
    return train.Trainer(s, meta, "cpu", resume=resume)


@pytest.mark.parametrize("kind", [*RIVALS, "dense"])
def test_a_run_is_saved_and_goes_on(kind, data, tmp_path):
    """Its weights and optimizers are those of the run that never stopped, bit for bit."""
    whole = trainer(kind, data, tmp_path / "whole")
    losses = [whole.step(i)[0].item() for i in range(24)]
    assert np.mean(losses[-4:]) < losses[0] - 0.5
    out = tmp_path / "stopped"
    shutil.copytree(data, out)  # meta.json is in a run folder
    stopped = trainer(kind, data, out)
    for i in range(12):
        stopped.step(i)
    assert stopped.save(12, 0.0) is None
    resumed = trainer(kind, data, out, resume=True)
    assert resumed.steps_done == 12
    assert [resumed.step(i)[0].item() for i in range(12, 24)] == losses[12:]
    for (name, p), q in zip(whole.model.state_dict().items(), resumed.model.state_dict().values()):
        assert torch.equal(p, q), name


def train_each(commands):
    """A rank trains one run after another."""
    for command in commands:
        code = train.main(command)
        if code:
            return code
        torch.distributed.destroy_process_group()
    return 0


@pytest.mark.slow
def test_two_ranks_train_as_one(data, tmp_path, few_reads):
    """A mixture keeps the experts of each rank equally busy, so it is a little different."""
    commands = [[*TINY, "--data", str(data), "--ffn", kind, "--max-steps", "6"]
                for kind in RIVALS]
    for kind, command in zip(RIVALS, commands):
        assert train.main([*command, "--out-dir", str(tmp_path / f"{kind}-one")]) == 0
        command += ["--out-dir", str(tmp_path / f"{kind}-two")]
    launch(train_each, 2, commands, tmp_path)
    for kind in RIVALS:
        one, two = (json.loads((tmp_path / f"{kind}-{ranks}" / "result.json").read_text())
                    for ranks in ("one", "two"))
        tolerance = 3e-2 if kind == "moe" else 1e-4
        assert abs(one["val_loss"] - two["val_loss"]) < tolerance * one["val_loss"], kind
        assert one["params"] == two["params"], kind


@pytest.mark.parametrize("kind", ["ultramem", "peer", "moe"])
def test_a_table_that_cannot_be_cut_is_not(kind, data):
    s = train.Settings(data=str(data), n_layer=2, n_embd=32, n_head=2, batch_size=16, ffn=kind,
                       mem_layers=(1,), mem_n_keys=32)
    settings.fit_to_data(s, world=4)
    assert settings.slices(s, world=4) == 1
    s.mem_parallel = 2
    with pytest.raises(ValueError, match="--mem-parallel 2: ranks cannot share"):
        settings.fit_to_data(s, world=4)


def test_experts_have_a_rate_of_their_own():
    model = make("moe")
    optimizers, (clipped,) = train.make_optimizers(model, train.Settings(expert_lr=0.5))
    assert len(optimizers) == 1
    group = optimizers[0].param_groups[-1]
    assert group["peak"] == 0.5 and group["weight_decay"] == 0.1
    assert {id(p) for p in group["params"]} == {
        id(p) for name, p in model.named_parameters() if "experts_" in name}
    assert len(clipped) == len(list(model.parameters()))
