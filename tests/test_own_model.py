"""What people do with a module of their own that holds a memory layer.

The module is Net of README.md. Each row of a table is one such thing: it works with a table in
float32 and in bfloat16, and gives what it gives without it.

B, T, C batch, tokens, channels · S slots · D value dim
"""
import copy
import io
import math
import re
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import kernel
from memory import MemoryTable, ProductKeyMemory, RowAdam

README = (Path(__file__).resolve().parents[1] / "README.md").read_text("utf-8")
CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[1]
NAMES = {"__name__": __name__}  # so that torch.save can name the class
exec(CODE[:CODE.index("net = Net()")], NAMES)
Net = NAMES["Net"]
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def make(dtype=torch.float32, seed=0):
    """A Net. dtype: of its table's values."""
    torch.manual_seed(seed)
    net = Net()
    if dtype != torch.float32:
        net.table = MemoryTable(n_keys=32, dim=64, dtype=dtype)
        net.memory.tables = [net.table]
    return net


def rows():
    """x (8, 16, 64) and labels (8, 16)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 16, 64, generator=generator)
    return x, torch.randint(10, (8, 16), generator=generator)


def gradients(net, x):
    """The output of net for x, and the gradients of x and of what is trained."""
    x = x.detach().requires_grad_()
    y = net(x)
    trained = [p for p in net.parameters() if p.requires_grad]
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    return [y, *torch.autograd.grad(y, [x, *trained], grad_y)]


def check_same(got, want, tolerance=1e-5):
    assert len(got) == len(want)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- inputs of all shapes

def of_conv():
    """(B, C, T) -> (B, T, C): how the output of a Conv1d comes to a layer."""
    torch.manual_seed(3)
    return torch.nn.Conv1d(64, 64, 3, padding=1)(torch.randn(8, 64, 16)).transpose(1, 2)


INPUTS = {
    "without the first token": lambda: torch.randn(8, 17, 64)[:, 1:],
    "a transposed Conv1d": of_conv,
    "every second row": lambda: torch.randn(8, 16, 64)[1::2],
    "tokens first": lambda: torch.randn(16, 8, 64).transpose(0, 1),
    "every second channel": lambda: torch.randn(8, 16, 128)[..., ::2],
    "one vector for all": lambda: torch.randn(64).expand(8, 16, 64),
    "channels_last": lambda: torch.randn(2, 64, 4, 5).to(
        memory_format=torch.channels_last).permute(0, 2, 3, 1),
    "(N, C)": lambda: torch.randn(5, 64),
    "(B, H, W, C)": lambda: torch.randn(2, 4, 5, 64),
    "one token": lambda: torch.randn(1, 1, 64),
    "no rows": lambda: torch.randn(0, 16, 64),
}


@both_dtypes
@pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS.keys())
def test_inputs(x, dtype):
    net = make(dtype)
    x = x().detach()
    got = gradients(net, x)
    assert got[0].shape == (*x.shape[:-1], 10)
    assert got[1].shape == x.shape
    # The same numbers as a plain (N, C), one beside the other.
    flat = x.reshape(-1, 64).clone(memory_format=torch.contiguous_format)
    y = net(flat).view(got[0].shape)
    torch.testing.assert_close(got[0], y)


# ---- what is done with the module: a function of the net -> a net that does the same

def copied(net):
    loss_of(net).backward()  # it has run
    return copy.deepcopy(net)


def through_state_dict(net):
    other = make(net.table.values.dtype, seed=5)
    other.load_state_dict(net.state_dict())
    return other


def through_a_file(what):
    """A file object with what torch.save writes."""
    file = io.BytesIO()
    torch.save(what, file)
    file.seek(0)
    return file


def weights_through_a_file(net):
    other = make(net.table.values.dtype, seed=5)
    other.load_state_dict(torch.load(through_a_file(net.state_dict()), weights_only=True))
    return other


def pickled(net):
    return torch.load(through_a_file(net), weights_only=False)


def from_meta(net, assign=False):
    with torch.device("meta"):
        other = make(net.table.values.dtype)
    if not assign:
        other.to_empty(device="cpu")
    other.load_state_dict(net.state_dict(), assign=assign)
    return other


def from_meta_assigned(net):
    return from_meta(net, assign=True)


def from_meta_and_moved(net):
    """Nothing is left on the meta device, also while reads are counted."""
    other = from_meta(net, assign=True).to("cpu")
    other.table.count(True)
    other(rows()[0])
    assert other.table.usage()[0] > 0
    return other


def averaged(net):
    average = torch.optim.swa_utils.AveragedModel(net)
    average.update_parameters(net)
    return average


def eval_and_train(net):
    net.eval()
    with torch.inference_mode():
        net(rows()[0])
    return net.train()


def frozen_and_back(net):
    trained = [p for p in net.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    net(rows()[0])
    for p in trained:
        p.requires_grad_()
    return net


def with_other_weights(net):
    """torch.func.functional_call: the weights are given, not those of the module."""
    other = make(net.table.values.dtype, seed=5)
    weights = dict(net.named_parameters())
    return Through(net, lambda x: torch.func.functional_call(other, weights, (x,)))


def checkpointed(net):
    return Through(net, lambda x: checkpoint(net, x, use_reentrant=False))


class Through(torch.nn.Module):
    """A function of x as a module that has the parameters of net."""

    def __init__(self, net, function):
        super().__init__()
        self.net = net
        self.function = function

    def forward(self, x):
        return self.function(x)


DONE = [copied, through_state_dict, weights_through_a_file, pickled, from_meta,
        from_meta_assigned, from_meta_and_moved, averaged, eval_and_train, frozen_and_back,
        with_other_weights, checkpointed]


@both_dtypes
@pytest.mark.parametrize("do", DONE)
def test_gives_the_same(do, dtype):
    x, _ = rows()
    net = make(dtype)
    want = gradients(net, x)
    check_same(gradients(do(net), x), want, 0)


# ---- torch.compile and torch.export

@pytest.mark.slow
@both_dtypes
def test_one_graph_for_all_batch_sizes(dtype):
    torch._dynamo.reset()
    net = make(dtype)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, dynamic=True, fullgraph=True, backend=counter)
    for B in (8, 3, 5, 2):
        x = torch.randn(B, 16, 64)
        check_same(gradients(compiled, x), gradients(net, x))
    assert counter.frame_count == 1


@pytest.mark.slow
@both_dtypes
def test_exported_with_any_batch_size(dtype):
    net = make(dtype).eval()
    batch = torch.export.Dim("batch", max=64)
    exported = torch.export.export(net, (torch.randn(8, 16, 64),), dynamic_shapes=({0: batch},))
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for B in (8, 3, 1):
        x = torch.randn(B, 16, 64)
        check_same([loaded(x)], [net(x)])


# ---- other precisions

@both_dtypes
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["autocast", "converted"])
def test_low_precision(how, low, dtype):
    net = make(dtype)
    x, _ = rows()
    want = net(x)
    if how == "autocast":
        with torch.autocast("cpu", low):
            y = net(x)
    else:
        net = net.to(low)
        y = net(x.to(low))
    assert y.dtype == low
    assert (y - want).abs().max() < 0.1 * want.abs().max()
    y.float().square().mean().backward()
    for name, p in net.named_parameters():
        if p.requires_grad:
            assert p.grad.dtype == p.dtype and p.grad.isfinite().all() and p.grad.any(), name


@both_dtypes
def test_float64(dtype):
    net = make(dtype)
    x, _ = rows()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    check_same([net.double()(x.double()).float()], [make(dtype)(x)], tolerance)


# ---- training

def loss_of(net):
    x, labels = rows()
    return torch.nn.functional.cross_entropy(net(x).flatten(0, 1), labels.flatten())


def one_for_all(optimizer, **more):
    """A plain optimizer for everything: the table's values are a parameter like any other."""
    return lambda net: [optimizer(net.parameters(), lr=1e-2, **more)]


def row_adam_for_the_table(net):
    rest = [p for p in net.parameters() if p is not net.table.values]
    return [torch.optim.AdamW(rest, lr=1e-2), RowAdam([net.table], lr=2e-2)]


OPTIMIZERS = {
    "AdamW": one_for_all(torch.optim.AdamW),
    "AdamW, fused": one_for_all(torch.optim.AdamW, fused=True),
    "AdamW, foreach": one_for_all(torch.optim.AdamW, foreach=True),
    "SGD": one_for_all(torch.optim.SGD),
    "RowAdam": row_adam_for_the_table,
}


@both_dtypes
@pytest.mark.parametrize("choose", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_steps(choose, dtype):
    net = make(dtype)
    before = copy.deepcopy(net)
    optimizers = choose(net)
    losses = []
    for _ in range(5):
        loss = loss_of(net)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    for (name, p), q in zip(net.named_parameters(), before.parameters()):
        assert not torch.equal(p, q), name


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    net = make()
    loss_of(net).backward()
    want = [p.grad.clone() for p in net.parameters()]
    net.zero_grad(set_to_none)
    for p in net.parameters():
        assert p.grad is None if set_to_none else not p.grad.any()
    loss_of(net).backward()
    check_same([p.grad for p in net.parameters()], want, 0)


def test_gradients_add_up():
    net = make()
    loss_of(net).backward()
    want = [2 * p.grad for p in net.parameters()]
    loss_of(net).backward()
    check_same([p.grad for p in net.parameters()], want)


def test_an_optimizer_goes_on_from_its_state():
    """Two steps, and one step with all saved, loaded into new objects, and another step."""
    nets = []
    for is_interrupted in (False, True):
        net = make()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        for _ in range(2):
            if is_interrupted:
                state = dict(net=net.state_dict(), optimizer=optimizer.state_dict())
                state = torch.load(through_a_file(state), weights_only=True)
                net = make(seed=5)
                net.load_state_dict(state["net"])
                optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
                optimizer.load_state_dict(state["optimizer"])
            loss_of(net).backward()
            optimizer.step()
            optimizer.zero_grad()
        nets.append(net)
    check_same(list(nets[0].parameters()), list(nets[1].parameters()), 0)


@both_dtypes
def test_a_frozen_table_stays(dtype):
    """The rest learns, and gets the gradients that it gets beside a table that learns."""
    net = make(dtype)
    loss_of(net).backward()
    want = [p.grad for p in net.parameters() if p is not net.table.values]
    frozen = make(dtype)
    frozen.table.requires_grad_(False)
    loss_of(frozen).backward()
    check_same([p.grad for p in frozen.parameters() if p.requires_grad], want, 0)
    assert frozen.table.values.grad is None
    before = frozen.table.values.clone()
    optimizer = torch.optim.AdamW(frozen.parameters(), lr=1e-2)
    optimizer.step()
    assert torch.equal(frozen.table.values, before)


@both_dtypes
def test_a_scaled_loss(dtype):
    """GradScaler: the same steps as without it, and one with an infinite loss is skipped."""
    def trained(scaler):
        net = make(dtype)
        optimizers = row_adam_for_the_table(net)
        for factor in (1, math.inf, 1):
            loss = scaler.scale(loss_of(net) * factor)
            if factor == 1 or scaler.is_enabled():
                loss.backward()
                for optimizer in optimizers:
                    scaler.unscale_(optimizer)
                    scaler.step(optimizer)
                    optimizer.zero_grad()
                scaler.update()
        return list(net.parameters())

    scaled = trained(torch.amp.GradScaler("cpu", init_scale=2.0**10))
    check_same(scaled, trained(torch.amp.GradScaler("cpu", enabled=False)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.complex64], ids=str)
def test_a_dtype_that_cannot_be_trained_is_refused(dtype):
    with pytest.raises(ValueError, match=f"{dtype} cannot be trained: make it in float32 or"):
        MemoryTable(n_keys=32, dim=64, dtype=dtype)


# ---- a table that no model has registered

def in_a_row(dtype):
    """A layer in nn.Sequential."""
    layer = ProductKeyMemory(64, MemoryTable(32, 64, dtype), topk=8)
    return torch.nn.Sequential(torch.nn.Linear(64, 64), layer, torch.nn.Linear(64, 10)), 1


def two_share(dtype):
    """Two layers of one table, which belongs to the first."""
    table = MemoryTable(32, 64, dtype)
    layers = [ProductKeyMemory(64, table, topk=8) for _ in range(2)]
    return torch.nn.Sequential(*layers, torch.nn.Linear(64, 10)), 1


def in_an_encoder(dtype):
    """nn.TransformerEncoder copies its layer, and each copy has a table of its own."""
    layer = torch.nn.TransformerEncoderLayer(64, 4, dropout=0.0, activation=torch.nn.Identity(),
                                             batch_first=True)
    layer.linear1 = torch.nn.Identity()
    layer.linear2 = ProductKeyMemory(64, MemoryTable(32, 64, dtype), topk=8)
    encoder = torch.nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    return torch.nn.Sequential(encoder, torch.nn.Linear(64, 10)), 3


@both_dtypes
@pytest.mark.parametrize("build", [in_a_row, two_share, in_an_encoder])
def test_a_table_belongs_to_its_layer(build, dtype):
    net, count = build(dtype)
    tables = [p for name, p in net.named_parameters() if name.endswith("own_table.values")]
    assert len(tables) == count
    loss_of(net).backward()
    assert all(table.grad.any() for table in tables)
    assert {"values"} < {name.split(".")[-1] for name in net.state_dict()}
    other, _ = build(dtype)
    other.load_state_dict(net.state_dict())
    x, _ = rows()
    want = net(x)
    check_same([other(x)], [want], 0)
    with torch.no_grad():
        check_same([net.eval()(x)], [want])


def test_a_copy_without_its_model_has_a_table():
    net = make()
    x = rows()[0]
    layer = copy.deepcopy(net.memory)
    check_same([layer(x)], [net.memory(x)], 0)
    assert layer.own_table.values is layer.table.values is not net.table.values
    assert "memory.own_table.values" not in copy.deepcopy(net).state_dict()
    table = copy.deepcopy(net.table)
    assert ProductKeyMemory(64, table).own_table is table


def test_reset_parameters():
    """As torch's own modules have it: after to_empty, for one."""
    net = make()
    net.table.values.data.fill_(math.nan)
    for module in net.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert net.table.values.std().item() == pytest.approx(1 / 8, rel=0.01)


def test_a_table_of_the_model_stays_where_it_is():
    assert "memory.own_table.values" not in make().state_dict()
    assert set(make().state_dict()) == {"table.values", "memory.half_keys", "memory.query.weight",
                                        "head.weight", "head.bias"}


# ---- derivatives of all kinds, with the definitions

@pytest.fixture
def definitions(monkeypatch):
    monkeypatch.setattr(kernel, "_backend", "auto")
    kernel.backend("reference")


def test_the_definitions_give_the_same(definitions):
    x, _ = rows()
    want = gradients(make(), x)
    kernel.backend("torch")
    check_same(gradients(make(), x), want)


def test_second_derivatives(definitions):
    kernel.candidates.cache_clear()
    net = make().double()
    with torch.inference_mode():
        net(rows()[0].double())
    x = rows()[0][:1, :2].double().requires_grad_()
    assert torch.autograd.gradgradcheck(net, (x,))


def test_functional_gradients(definitions):
    """torch.func: grad, and forward and backward mode agree: u . (J v) = (J^T u) . v."""
    net = make()
    x, _ = rows()
    weights = dict(net.named_parameters())

    def total(weights):
        return torch.func.functional_call(net, weights, (x,)).square().sum()

    got = torch.func.grad(total)(weights)
    want = torch.autograd.grad(total(weights), list(weights.values()))
    check_same(list(got.values()), want)
    v = torch.randn_like(x)
    y, forward = torch.func.jvp(net, (x,), (v,))
    u = torch.randn_like(y)
    backward, = torch.func.vjp(net, x)[1](u)
    check_same([(u * forward).sum()], [(backward * v).sum()], 1e-3)
    check_same([torch.func.vmap(net)(x[:, None])[:, 0]], [net(x)])
