"""
Parallel memory: a table in slices over ranks is the table in one piece.

The ranks are 2 or 4 processes that talk through gloo. They are forked, so that none of them has to
import torch again. That is safe, because conftest.py allows torch one thread and nothing here
touches a GPU.

P ranks share a table · N tokens · R slots read per token · D value dim
"""
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train
from memory import MemoryTable, RowAdam
from model import GPT, GPTConfig
from parallel_costs import parallel_bytes, replicated_bytes
from support import ranks as support_ranks
from support import settings
from support.checkpoint import columns, load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("few_reads")
SMALL = dict(vocab_size=50, block_size=8, n_layer=3, n_head=2, n_embd=24,
             ffn="memory", mem_n_keys=8, mem_heads=2, mem_topk=4)
MODELS = {
    "Memory": dict(mem_layers=(1,), mem_gate=False, qk_norm=False),
    "Memory+": dict(mem_layers=(0, 2)),
    "values of 20 dims": dict(mem_layers=(0, 2), mem_value_dim=20),
    "hash": dict(ffn="hash", mem_layers=(0, 2)),
}
TINY = ("--n-layer 2 --n-embd 32 --n-head 2 --mem-n-keys 16 --mem-topk 4 --mem-heads 2 "
        "--batch-size 16 --log-every 2 --eval-every 6 --eval-windows 61 --max-steps 12 "
        "--warmup-steps 2 --device cpu").split()
CLIP = 0.005  # so small a norm that every gradient is clipped
STEPS = 3
MICRO = 2  # micro-steps per step
# Ranks, and P of them to a table: copies of it, copies in two slices, and four slices.
SHARED = [(2, 1), (4, 2), (4, 4)]


def make_model(name, mesh):
    torch.manual_seed(1)
    return GPT(GPTConfig(**SMALL | MODELS[name]), mesh)


# ---- what one rank does

def train_in_float64(name, rank, world, mesh):
    """Train with accumulation and clipping -> what there was to see, for each step and at the end.

    steps: for each step the loss over all micro-steps, the gradients (of tables: this rank's
    slices) and their norms before clipping. values: the tables' at the end.
    """
    model = make_model(name, mesh).double()
    s = train.Settings(learning_rate=1e-2, value_lr=5e-2, grad_clip=CLIP)
    net = model
    if world > 1:
        net = DistributedDataParallel(model, init_sync=False)
    optimizers, (others,) = train.make_optimizers(model, s)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(50, (STEPS, MICRO, 4, 9), generator=generator)  # (steps, micro, B, T+1)
    seen = []
    for step in range(STEPS):
        loss = 0.0
        for m in range(MICRO):
            mine = tokens[step, m].view(world, -1, 9)[rank]  # (B / world, T+1)
            waits = world > 1 and m + 1 < MICRO
            with net.no_sync() if waits else contextlib.nullcontext():
                part = net(mine[:, :-1], mine[:, 1:])[1] / MICRO
                part.backward()
            loss += part.item()
        dense = {name: p.grad.clone() for name, p in model.named_parameters()
                 if not name.endswith(".values")}
        tables = [model.table.values.grad.clone()]
        dense_norm = torch.nn.utils.clip_grad_norm_(others, CLIP)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        seen.append(dict(loss=loss, dense=dense, tables=tables, dense_norm=dense_norm,
                         table_norm=optimizers[1].norm))
    return dict(steps=seen, values=[model.table.values.detach()])


def compiled_difference(mesh):
    """The model compiled without graph breaks -> its largest difference to the eager one.

    Over loss and gradients, the table's included.
    """
    results = []
    for compiled in (False, True):
        model = make_model("Memory+", mesh)
        train.make_optimizers(model, train.Settings())
        net = model
        if compiled:
            net = torch.compile(model, backend="aot_eager", fullgraph=True)
        generator = torch.Generator().manual_seed(dist.get_rank())
        x, y = torch.randint(50, (2, 2, 8), generator=generator)  # (B, T) both
        _, loss = net(x, y)
        loss.backward()
        grads = [p.grad for p in model.parameters()]
        results.append([loss.detach(), *grads])
    return max((eager - other).abs().max().item() for eager, other in zip(*results))


def bytes_sent():
    """What the processes of this machine have sent each other, as the loopback device counts it."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        device, _, numbers = line.strip().partition(":")
        if device == "lo":
            return int(numbers.split()[8])


def measure_traffic(mesh, N=4096, R=32, D=64):
    """Bytes on the wire for one layer's forward and backward, mean over the ranks."""
    table = MemoryTable(32, D, mesh=mesh)  # 1,024 slots
    RowAdam([table], 1e-3)  # makes slices trainable
    slots = torch.randint(1024, (N, R))
    weights = torch.rand(N, R, requires_grad=True)
    grad = torch.randn(N, D)
    for _ in range(2):  # the first time, connections are made
        dist.barrier()
        before = bytes_sent()
        dist.barrier()
        table.read(slots, weights).backward(grad)
        dist.barrier()
    return (bytes_sent() - before) / dist.get_world_size()


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out


def largest_tensor(mesh, folder):
    """Make a model, step, save, load, step -> (numbers in its largest tensor, and in its table)."""
    s = train.Settings(vocab_size=50, block_size=8, n_layer=1, n_head=2, n_embd=64,
                       ffn="memory", mem_layers=(0,), mem_n_keys=128, mem_heads=1, mem_topk=2)

    def step(model, optimizers):
        x, y = torch.randint(50, (2, 1, 8))  # (B, T) both
        _, loss = model(x, y)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()

    with Largest() as largest:
        model = GPT(s, mesh)
        optimizers, _ = train.make_optimizers(model, s)
        step(model, optimizers)
        save_checkpoint(folder, model, optimizers, 1, 0.0, dataclasses.asdict(s))
        model, state = load_checkpoint(folder, mesh=mesh)
        optimizers, _ = train.make_optimizers(model, s)
        optimizers[1].load_state_dict(state["optimizers"][1])
        step(model, optimizers)
    return largest.numel, 128 * 128 * 64


def job_exact(folder):
    """Leave what the tests below ask for in FOLDER/<world>-<rank>.pt."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    world = dist.get_world_size()

    def mesh(P):
        return init_device_mesh("cpu", (world // P, P), mesh_dim_names=("replica", "slice"))

    result = {}
    for ranks, P in SHARED:
        if ranks == world:
            for name in MODELS:
                result[name, P] = train_in_float64(name, rank, world, mesh(P))
    if world == 2:
        result["compiled"] = compiled_difference(mesh(2))
    else:
        result["largest"] = largest_tensor(mesh(world), folder)
        result["traffic"] = None
        if Path("/proc/net/dev").exists():
            result["traffic"] = measure_traffic(mesh(world))
    torch.save(result, folder / f"{world}-{rank}.pt")
    dist.barrier()
    return 0


def job_train_until_6(args):
    """Leave after the checkpoint of step 6."""
    save = train.Trainer.save

    def save_and_leave(trainer, step, *more):
        problem = save(trainer, step, *more)
        if step == 6:
            os._exit(0)
        return problem

    train.Trainer.save = save_and_leave
    return train.main(args)


def job_train_compiled(args):
    """Compile, but not by the compiler for C++, which takes long: the graphs are the same.

    Steps that count reads have a graph of their own, so that there are two, and DDP cuts each where
    it sends gradients. All must be made in the first three steps, which are not timed.
    """
    begun = []  # steps that have begun
    compiled_at = []  # for each graph, in which step it was made
    real_step = train.Trainer.step

    def step(trainer, number):
        begun.append(number)
        return real_step(trainer, number)

    def backend(graph, inputs):
        compiled_at.append(len(begun))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    train.Trainer.step = step
    torch.compile = functools.partial(torch.compile, backend=backend)
    code = train.main(args)
    assert len(set(compiled_at)) == 2, compiled_at
    assert max(compiled_at) <= 3 < len(begun), compiled_at
    return code


def job_script(args):
    """train.py as torchrun starts it: it ends its process by itself."""
    sys.argv = ["train.py", *args]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def hang():
    time.sleep(1000)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def job_train_and_fail(args, fail=hang):
    """Rank 1 fails at the second log line. The other waits for 3 seconds instead of 10 minutes."""
    real_usage = train.usage
    looks = []

    def usage(model):
        looks.append(1)
        if os.environ["RANK"] == "1" and len(looks) == 2:
            fail()
        return real_usage(model)

    def short(minutes):
        return timedelta(seconds=3)

    train.usage = usage
    support_ranks.timedelta = short
    return train.main(args)


def rank_main(job, job_input, environment, output):
    """This process is one rank: do a job, with all that is printed in a file, and leave."""
    os.environ |= environment
    sys.stdout = sys.stderr = open(output, "w", buffering=1, encoding="utf-8")
    for descriptor in (1, 2):
        os.dup2(sys.stdout.fileno(), descriptor)
    code = 1
    try:
        code = job(job_input)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)  # see the end of train.py


# ---- starting ranks

LONGEST = 150  # seconds that ranks may take


@functools.cache
def import_what_torch_imports_late():
    """AdamW and torch.compile import much at their first use: here once, not in every rank."""
    f = torch.compile(torch.sin, backend="aot_eager")
    f(torch.ones(1, requires_grad=True)).backward()


def run_ranks(job, world, job_input, folder, wait_for=None):
    """Run job(job_input) in a process for each rank until it ends -> their (exit code, output).

    folder: where their output goes. wait_for: so many ranks, the first ones, are waited for, and
    the others are killed then. None: all are waited for.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    import_what_torch_imports_late()
    fork = multiprocessing.get_context("fork")
    deadline = time.monotonic() + LONGEST
    ranks = []
    try:
        for rank in range(world):
            environment = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                               MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            output = folder / f"output-{rank}of{world}.txt"
            output.touch()
            process = fork.Process(target=rank_main, args=(job, job_input, environment, output))
            process.start()
            ranks.append((process, output))
        for process, _ in ranks[:wait_for]:
            process.join(max(0, deadline - time.monotonic()))
    finally:
        for process, _ in ranks:
            process.kill()
            process.join()
    return [(process.exitcode, output.read_text("utf-8")) for process, output in ranks]


def launch(job, world, job_input, folder):
    """run_ranks, and fail with what they printed unless all exit with 0."""
    done = run_ranks(job, world, job_input, folder)
    told = [f"rank {rank}: exit code {code}\n{text}" for rank, (code, text) in enumerate(done)]
    assert all(code == 0 for code, _ in done), "\n".join(told)


# ---- the layer and its optimizer: against one process

@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the ranks of 2 and of 4 found: {world: [result of each rank]}."""
    folder = tmp_path_factory.mktemp("ranks")
    found = {}
    for world in (2, 4):
        launch(job_exact, world, folder, folder)
        found[world] = [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]
    return found


@functools.cache
def one_process(name):
    """What there is to see without ranks."""
    return train_in_float64(name, 0, 1, None)


def close(got, want, what, tolerance=1e-12):
    assert (got - want).abs().max() <= tolerance * want.abs().max(), what


@pytest.mark.slow
@pytest.mark.parametrize("world, P", SHARED)
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_of_one_process(name, world, P, ranks):
    want_steps = one_process(name)["steps"]
    results = [result[name, P] for result in ranks[world]]
    assert len(want_steps) == STEPS
    assert want_steps[0]["dense_norm"] > CLIP
    assert want_steps[0]["table_norm"] > CLIP
    for step, want in enumerate(want_steps):
        of_ranks = [result["steps"][step] for result in results]
        mean_loss = sum(got["loss"] for got in of_ranks) / world
        assert mean_loss == pytest.approx(want["loss"], rel=1e-12)
        for got in of_ranks:
            close(got["dense_norm"], want["dense_norm"], ("dense norm", step))
            close(got["table_norm"], want["table_norm"], ("table norm", step))
            for weight, grad in want["dense"].items():
                close(got["dense"][weight], grad, (weight, step))
        for i, grad in enumerate(want["tables"]):  # (S, D)
            slices = [got["tables"][i] for got in of_ranks]  # (S, D/P) each
            assert all(part.shape == (64, grad.shape[1] // P) for part in slices)
            # Ranks part, part + P, ... hold the same dims, of replicas that saw other tokens.
            means = [sum(slices[part::P]) / world for part in range(P)]
            close(torch.cat(means, dim=1), grad, (f"table {i}", step))


@pytest.mark.slow
@pytest.mark.parametrize("world, P", SHARED)
@pytest.mark.parametrize("name", MODELS)
def test_each_replica_ends_with_the_values_of_one_process(name, world, P, ranks):
    for i, want in enumerate(one_process(name)["values"]):  # (S, D)
        slices = [result[name, P]["values"][i] for result in ranks[world]]  # (S, D/P) each
        for first in range(0, world, P):
            replica = torch.cat(slices[first:first + P], dim=1)  # (S, D)
            close(replica, want, f"table {i} at rank {first}", tolerance=1e-11)


@pytest.mark.slow
def test_compiles_without_graph_breaks(ranks):
    for result in ranks[2]:
        assert result["compiled"] < 1e-6


@pytest.mark.slow
def test_no_rank_makes_a_tensor_of_the_tables_size(ranks):
    for result in ranks[4]:
        largest, table = result["largest"]
        assert table / 4 <= largest < table


@pytest.mark.slow
def test_bytes_on_the_wire_are_those_of_the_formula(ranks):
    measured = ranks[4][0]["traffic"]
    if measured is None:
        pytest.skip("bytes are counted by /proc/net/dev, on Linux")
    formula = parallel_bytes(N=4096, R=32, D=64, P=4)
    assert formula <= measured < 1.03 * formula  # what TCP adds, and the barriers


def test_bytes_by_hand():
    assert parallel_bytes(N=10, R=4, D=8, P=1) == 0
    # To each of 3 peers: 40 slots, 40 weights and 40 gradients of weights, of 4 bytes; outputs and
    # their gradients, 10 tokens of 2 dims of 4 bytes each.
    assert parallel_bytes(N=10, R=4, D=8, P=4) == 3 * (3 * 40 * 4 + 2 * 10 * 2 * 4)
    assert replicated_bytes(S=100, D=8, W=1) == 0
    # A ring sends 3/4 of the gradient twice.
    assert replicated_bytes(S=100, D=8, W=4) == 2 * 3 * 100 * 8


# ---- slices

class Mesh:
    """One rank's view of a mesh of `size` ranks that share a table, without processes."""

    def __init__(self, size, rank):
        self.numbers = size, rank

    def get_group(self, name):
        assert name == "slice"
        return self

    def size(self):
        return self.numbers[0]

    def rank(self):
        return self.numbers[1]


def test_slices_are_the_whole_table_at_the_start():
    def values(mesh):
        torch.manual_seed(0)
        # 4,900 slots: more than the 4,096 rows that are drawn at once.
        return MemoryTable(70, 10, mesh=mesh).values

    whole = values(None)  # (S, D)
    left = values(Mesh(2, 0))
    right = values(Mesh(2, 1))
    assert torch.equal(torch.cat((left, right), dim=1), whole)
    assert torch.equal(values(Mesh(5, 3)), whole[:, 6:8])
    assert whole.std().item() == pytest.approx(10**-0.5, rel=0.02)


def test_a_table_refuses_slices_of_unequal_size():
    with pytest.raises(ValueError, match="a table of 10 dims cannot be cut into 4 equal slices"):
        MemoryTable(4, 10, mesh=Mesh(4, 0))


@pytest.mark.parametrize("saved, wanted", [(1, 1), (1, 4), (4, 1), (4, 2), (2, 4), (4, 4)])
def test_columns_of_any_slices(saved, wanted):
    whole = torch.randn(7, 12)
    slices = list(whole.chunk(saved, dim=1))
    width = 12 // wanted
    for part in range(wanted):
        dims = slice(part * width, (part + 1) * width)
        assert torch.equal(columns(slices, dims), whole[:, dims])


@pytest.mark.parametrize("world, P, D", [(1, 2, 32), (4, 3, 32), (4, 4, 30)])
def test_bad_mem_parallel(world, P, D, data):
    s = train.Settings(data=str(data), n_layer=2, n_embd=32, n_head=2, batch_size=16, ffn="memory",
                       mem_layers=(1,), mem_parallel=P, mem_value_dim=D)
    message = f"--mem-parallel {P}: a table of {D} dims cannot be shared so by {world} rank"
    with pytest.raises(ValueError, match=message):
        settings.fit_to_data(s, world)


def test_bad_mem_parallel_is_one_line(data, tmp_path, capfd):
    args = [*TINY, "--data", str(data), "--mem-parallel", "2", "--out-dir", str(tmp_path / "x")]
    assert train.main(args) == 1
    error = capfd.readouterr().err
    assert error.startswith("train.py: --mem-parallel 2")
    assert error.count("\n") == 1


# ---- whole runs

def logged(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def column(out, name):
    """What each line of the log says of this name."""
    return [line[name] for line in logged(out)]


@pytest.fixture(scope="module")
def one(data, tmp_path_factory):
    """A run of one process: the folder "half" as it was after 6 steps, "whole" at its end."""
    folder = tmp_path_factory.mktemp("one")
    save = train.Trainer.save

    def save_and_copy(trainer, step, *more):
        problem = save(trainer, step, *more)
        if step == 6:
            shutil.copytree(folder / "whole", folder / "half")
        return problem

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Trainer, "save", save_and_copy)
        args = [*TINY, "--data", str(data), "--out-dir", str(folder / "whole")]
        assert train.main(args) == 0
    return folder


def check_same_run(out, want):
    """Apart from the order of sums, the two folders hold the same run of 12 steps."""
    assert column(out, "loss") == pytest.approx(column(want, "loss"), rel=2e-5)
    assert column(out, "memory_kl") == pytest.approx(column(want, "memory_kl"), rel=1e-2)
    got = json.loads((out / "result.json").read_text())
    right = json.loads((want / "result.json").read_text())
    assert got["val_loss"] == pytest.approx(right["val_loss"], rel=1e-4)
    assert got["recall"] == pytest.approx(right["recall"], abs=0.02)
    for name in ("params", "flops_per_token"):
        assert got[name] == right[name]
    model, state = load_checkpoint(out)
    other, _ = load_checkpoint(want)
    assert state["step"] == 12
    difference = model.table.values - other.table.values
    assert difference.abs().max() < 2e-3


def checkpoints(out):
    return sorted(file.name for file in out.glob("ckpt*"))


@pytest.mark.slow
def test_a_checkpoint_of_four_ranks_goes_on_with_fewer(one, data, tmp_path):
    four = tmp_path / "4"
    args = [*TINY, "--data", str(data)]
    launch(job_train_until_6, 4, [*args, "--out-dir", str(four)], tmp_path)
    slices = [f"ckpt-6-{i}of4.pt" for i in range(4)]
    assert checkpoints(four) == [*slices, "ckpt.pt"]

    (four / "ckpt-best.pt").write_text("the user's own")
    shutil.copytree(four, tmp_path / "1")
    shutil.copytree(four, tmp_path / "2")
    assert train.main([*args, "--out-dir", str(tmp_path / "1"), "--resume"]) == 0
    again = [*args, "--mem-parallel", "1", "--out-dir", str(tmp_path / "2"), "--resume"]
    launch(train.main, 2, again, tmp_path)
    for out in (tmp_path / "1", tmp_path / "2"):
        check_same_run(out, one / "whole")
        assert checkpoints(out) == ["ckpt-best.pt", "ckpt.pt"]  # no slices that no one needs


@pytest.mark.slow
def test_a_checkpoint_of_one_process_goes_on_with_four_ranks(one, data, tmp_path):
    out = tmp_path / "half"
    shutil.copytree(one / "half", out)
    args = [*TINY, "--data", str(data), "--mem-parallel", "2", "--out-dir", str(out), "--resume"]
    launch(train.main, 4, args, tmp_path)
    check_same_run(out, one / "whole")
    (out / "ckpt-12-1of2.pt").unlink()
    with pytest.raises(ValueError, match="ckpt-12-1of2.pt"):
        load_checkpoint(out)


@pytest.mark.slow
def test_a_compiled_launch_trains_the_same(data, tmp_path):
    """With more dense parameters than DDP sends at once.

    For each of its packets torch.compile would make a graph of its own, unless told not to.
    """
    args = [*TINY, "--data", str(data), "--n-embd", "256", "--max-steps", "4", "--n-layer", "1",
            "--mem-layers", "0"]
    plain = tmp_path / "plain"
    compiled = tmp_path / "compiled"
    assert train.main([*args, "--out-dir", str(plain)]) == 0
    launch(job_train_compiled, 2, [*args, "--compile", "--out-dir", str(compiled)], tmp_path)
    losses = column(plain, "loss")
    assert len(losses) == 2
    assert column(compiled, "loss") == pytest.approx(losses, rel=2e-5)


# ---- when a rank stops

def start_torchrun(args, output):
    """torchrun with two ranks, in a process group of its own -> its pid. output: a file."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        try:
            from torch.distributed.run import main
            main(["--standalone", "--nproc_per_node=2", str(ROOT / "train.py"), *args])
            os._exit(0)
        except BaseException:
            os._exit(1)
    return pid


@pytest.mark.slow
def test_ctrl_c_stops_a_launch_that_goes_on(data, tmp_path):
    """The terminal sends it to all processes, and torchrun passes it on."""
    out = tmp_path / "run"
    args = [*TINY, "--data", str(data), "--max-steps", "100", "--eval-every", "20",
            "--log-every", "20", "--out-dir", str(out)]
    torchrun = start_torchrun(args, tmp_path / "output")
    try:
        deadline = time.monotonic() + 60
        while not (out / "ckpt.pt").exists():
            assert os.waitpid(torchrun, os.WNOHANG) == (0, 0), (tmp_path / "output").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(torchrun, signal.SIGINT)
        _, status = os.waitpid(torchrun, 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(torchrun, signal.SIGKILL)  # whoever is left
    assert os.waitstatus_to_exitcode(status) == 1
    step = torch.load(out / "ckpt.pt", weights_only=True)["step"]
    assert 20 <= step < 100
    text = (tmp_path / "output").read_text()
    assert f"stopped at step {step} and saved: go on with --resume" in text

    # One process takes it up, and the log has each line once.
    assert train.main([*args, "--resume"]) == 0
    assert column(out, "step") == list(range(20, 101, 20))


@pytest.mark.slow
@pytest.mark.parametrize("fail", [hang, die])
def test_the_others_notice_a_rank_that_fails(fail, data, tmp_path):
    """They wait for one that hangs no longer than the timeout."""
    args = [*TINY, "--data", str(data), "--eval-every", "2", "--out-dir", str(tmp_path / "run")]
    job = functools.partial(job_train_and_fail, fail=fail)
    done = run_ranks(job, 2, args, tmp_path, wait_for=1)
    code, text = done[0]
    assert code == 1
    assert "rank 0 lost the others" in text
    assert "--resume" in text
    assert "Traceback" not in text, text

    # One process takes it up, and the log has each line once.
    assert torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)["step"] == 2
    assert train.main([*args, "--resume"]) == 0
    assert column(tmp_path / "run", "step") == [2, 4, 6, 8, 10, 12]
