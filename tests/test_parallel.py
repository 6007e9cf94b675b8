"""Parallel memory: a table in slices over ranks is the table in one piece. Gloo, 2 and 4 processes.

Run as a script it is one rank: python tests/test_parallel.py JOB FOLDER, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set.
"""
import dataclasses
import functools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from memory import MemoryTable, TableAdamW, columns, parallel_bytes, replicated_bytes  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

SMALL = dict(vocab_size=50, block_size=8, n_layer=3, n_head=2, n_embd=24, ffn="memory", mem_n_keys=8, mem_heads=2, mem_topk=4)
MODELS = {"Memory": dict(mem_layers=(1,), mem_gate=False, qk_norm=False), "Memory+": dict(mem_layers=(0, 2)),
          "two tables of 20 dims": dict(mem_layers=(0, 2), mem_share=False, mem_value_dim=20)}
WORLDS = (1, 2, 4)
TINY = ("--n-layer 2 --n-embd 32 --n-head 2 --mem-n-keys 16 --mem-topk 4 --mem-heads 2 --batch-size 16 --log-every 2 --eval-every 6 "
        "--eval-windows 61 --max-steps 12 --warmup-steps 2 --device cpu").split()


# ---- one rank

def steps(name, rank, world, mesh, count=8, micro=2):
    """Train in float64 with accumulation and clipping -> per step the loss over all ranks, the dense gradients and, of this rank, the tables'."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(**SMALL | MODELS[name]), mesh).double()
    optimizers, others = model.make_optimizers(train.Settings(learning_rate=1e-2, value_lr=5e-2, grad_clip=0.005))
    net = torch.nn.parallel.DistributedDataParallel(model, init_sync=False) if world > 1 else model
    tokens, seen = torch.randint(50, (count, micro, 4, 9), generator=torch.Generator().manual_seed(2)), []  # (steps, micro, B, T + 1)
    for step in range(count):
        loss = 0.0
        for m in range(micro):
            mine = tokens[step, m].view(world, -1, 9)[rank]                 # (B / world, T + 1)
            part = net(mine[:, :-1], mine[:, 1:])[1] / micro
            if world > 1 and m + 1 < micro:
                with net.no_sync():
                    part.backward()
            else:
                part.backward()
            loss += part.item()
        grads = [t.values.grad if t.grad_sum is None else t.grad_sum for t in model.tables]
        seen.append(dict(loss=loss, dense={n: p.grad.clone() for n, p in model.named_parameters() if not n.endswith(".values")},
                         tables=[g.clone() for g in grads], norm=None))
        seen[-1]["dense norm"] = torch.nn.utils.clip_grad_norm_(others, 0.005)
        seen[-1]["norm"] = [o.step() for o in optimizers][1]
        optimizers[0].zero_grad()
    return seen + [dict(values=[t.values.detach().clone() for t in model.tables])]


def compiled(mesh):
    """The parallel layer without graph breaks -> largest difference to eager, over output and gradients."""
    results = []
    for way in (lambda f: f, lambda f: torch.compile(f, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(1)
        model = GPT(GPTConfig(**SMALL | MODELS["Memory+"]), mesh)
        model.make_optimizers(train.Settings())
        loss = way(model)(*torch.randint(50, (2, 2, 8), generator=torch.Generator().manual_seed(dist.get_rank())))[1]
        loss.backward()
        results.append([loss.detach(), model.tables[0].grad_sum, *(p.grad for p in model.parameters() if p.requires_grad)])
    return max((a - b).abs().max().item() for a, b in zip(*results))


def sent():
    """Bytes that all ranks of this machine have sent each other so far: what went over the loopback device."""
    return next(int(line.split(":")[1].split()[8]) for line in open("/proc/net/dev") if line.strip().startswith("lo:"))


def traffic(mesh, N=4096, R=32, D=64):
    """Bytes on the wire for one layer's forward and backward, mean over the ranks."""
    table = MemoryTable(32, D, mesh=mesh)
    table.init_weights(0.1)
    TableAdamW([table], 1e-3, (0.9, 0.99))
    slots, weights = torch.randint(1024, (N, R)), torch.rand(N, R, requires_grad=True)
    grad = torch.randn(N, D)
    for warm in (True, False):
        dist.barrier()
        before = sent()
        dist.barrier()
        table.read(slots, weights).backward(grad)
        dist.barrier()
    return (sent() - before) / dist.get_world_size()


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out


def bare(rank, mesh, folder):
    """Make a model whose table is most of it, step, save, load, step: no rank ever makes a tensor of the table's size."""
    s = train.Settings(vocab_size=50, block_size=8, n_layer=1, n_head=2, n_embd=64, ffn="memory", mem_layers=(0,), mem_n_keys=128, mem_heads=1, mem_topk=2)
    with Largest() as largest:
        model = GPT(s, mesh)
        optimizers, _ = model.make_optimizers(s)
        for step in (1, 2):
            model(*torch.randint(50, (2, 1, 8)))[1].backward()
            for optimizer in optimizers:
                optimizer.step()
            if step == 1:
                model.save(folder, optimizers, train.write_whole, step, 0.0, dataclasses.asdict(s))
                model, state = GPT.load(folder, mesh=mesh)
                optimizers, _ = model.make_optimizers(s)
                optimizers[1].load(state["tables"], 1)
    return largest.numel, 128 * 128 * 64


def rank_main(job, folder):
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    if job.startswith("train"):  # train-6: stop after the checkpoint of step 6
        if job == "train-6":
            save = GPT.save
            GPT.save = lambda *a: (save(*a), a[4] == 6 and os._exit(0))
        if job == "train-compiled":
            torch.compile = functools.partial(torch.compile, backend="aot_eager")
        if job == "train-hang":
            train.timedelta = lambda minutes: timedelta(seconds=3)
            train.usage = lambda model: time.sleep(1000) if rank else (0.0, 0.0)
        code = train.main(sys.argv[3:])
        sys.stdout.flush()
        os._exit(code)
    dist.init_process_group("gloo")
    result = {}
    for P in (p for p in WORLDS if world % p == 0):
        mesh = init_device_mesh("cpu", (world // P, P), mesh_dim_names=("replica", "slice"))
        for name in MODELS:
            result[name, P] = steps(name, rank, world, mesh)
    result["compiled"], result["largest"] = compiled(mesh), bare(rank, mesh, folder)
    result["traffic"] = traffic(mesh) if Path("/proc/net/dev").exists() else None
    torch.save(result, folder / f"{world}-{rank}.pt")
    dist.barrier()
    os._exit(0)


# ---- the tests

def launch(job, world, folder, *args):
    """Run one process a rank; all must end well."""
    done = start(job, world, folder, *args)
    assert all(code == 0 for code, _ in done), "\n".join(text for _, text in done)


def start(job, world, folder, *args):
    """Run one process a rank until rank 0 ends; returns their (exit code, output)."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = [subprocess.Popen([sys.executable, __file__, job, str(folder), *map(str, args)], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              env=os.environ | dict(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                                                    OMP_NUM_THREADS="1")) for r in range(world)]
    try:
        texts = [ranks[0].communicate(timeout=150)[0]]
        if job == "train-hang":
            ranks[1].kill()
        texts += [p.communicate(timeout=150)[0] for p in ranks[1:]]
    finally:
        for p in ranks:
            p.kill()
    return [(p.returncode, text) for p, text in zip(ranks, texts)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the ranks of 2 and of 4 found: {world: [result of each rank]}."""
    folder, found = tmp_path_factory.mktemp("ranks"), {}
    for world in (2, 4):
        launch("exact", world, folder)
        found[world] = [torch.load(folder / f"{world}-{r}.pt") for r in range(world)]
    return found


@pytest.mark.parametrize("world, P", [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_of_one_process(name, world, P, ranks):
    def same(a, b, what):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max(), what
    *one, end = steps(name, 0, 1, None)
    *many, ends = zip(*(ranks[world][r][name, P] for r in range(world)))
    assert len(one) == len(many) == 8 and one[0]["norm"] > 0.005 and one[0]["dense norm"] > 0.005  # clipping has work to do
    for step, (want, got) in enumerate(zip(one, many)):
        assert sum(g["loss"] for g in got) / world == pytest.approx(want["loss"], rel=1e-12)
        for g in got:
            same(g["norm"], want["norm"], ("norm", step))
            for n, grad in want["dense"].items():
                same(g["dense"][n], grad, (n, step))
        for i, grad in enumerate(want["tables"]):
            assert all(g["tables"][i].shape == (64, grad.shape[1] // P) for g in got)
            slices = [sum(got[r]["tables"][i] for r in range(part, world, P)) / world for part in range(P)]
            same(torch.cat(slices, dim=1), grad, (f"table {i}", step))
    for i, values in enumerate(end["values"]):
        for first in range(0, world, P):                                    # each replica
            got = torch.cat([ends[first + part]["values"][i] for part in range(P)], dim=1)
            assert (got - values).abs().max() <= 1e-11 * values.abs().max()


@pytest.mark.parametrize("world", [2, 4])
def test_compiles_without_graph_breaks(world, ranks):
    assert all(r["compiled"] < 1e-6 for r in ranks[world])


@pytest.mark.parametrize("world", [2, 4])
def test_no_rank_makes_a_tensor_of_the_tables_size(world, ranks):
    for r in ranks[world]:
        largest, whole = r["largest"]
        assert whole / world <= largest < whole


@pytest.mark.parametrize("world", [2, 4])
def test_bytes_on_the_wire_are_those_of_the_formula(world, ranks):
    measured, formula = ranks[world][0]["traffic"], parallel_bytes(4096, 32, 64, world)
    if measured is None:
        pytest.skip("bytes are counted by /proc/net/dev, on Linux")
    assert formula <= measured < 1.03 * formula                             # what TCP adds, and the barriers


def test_bytes():
    assert parallel_bytes(N=10, R=4, D=8, P=1) == 0 == replicated_bytes(S=100, D=8, W=1)
    # 3 peers: 40 slots, 40 weights, 40 gradients of 4 bytes, 2 outputs of 10 tokens x 2 dims x 4 bytes
    assert parallel_bytes(N=10, R=4, D=8, P=4) == 3 * (3 * 40 * 4 + 2 * 10 * 2 * 4)
    assert replicated_bytes(S=100, D=8, W=4) == 2 * 3 * 100 * 8             # twice 3/4 of the gradient


def test_slices_are_the_whole_table_at_the_start():
    class Mesh:  # one rank's view of a mesh, without processes
        def __init__(self, size, rank):
            self.size, self.rank = lambda: size, lambda: rank

        def get_group(self, name):
            return self
    tables = []
    for mesh in (None, Mesh(2, 0), Mesh(2, 1), Mesh(5, 3)):
        torch.manual_seed(0)
        tables.append(MemoryTable(70, 10, mesh=mesh))                       # 4,900 slots: more than one block of rows
        tables[-1].init_weights(0.5)
    whole, left, right, fourth = (t.values for t in tables)
    assert torch.equal(torch.cat((left, right), dim=1), whole) and torch.equal(fourth, whole[:, 6:8])
    assert abs(whole.std().item() - 0.5) < 0.01
    with pytest.raises(ValueError, match="mem_value_dim 10 does not divide into mem_parallel 4 slices"):
        MemoryTable(4, 10, mesh=Mesh(4, 0))


@pytest.mark.parametrize("saved, wanted", [(1, 1), (1, 4), (4, 1), (4, 2), (2, 4), (4, 4)])
def test_columns_of_any_slices(saved, wanted):
    whole = torch.randn(7, 12)
    for part in range(wanted):
        dims = slice(12 * part // wanted, 12 * (part + 1) // wanted)
        assert torch.equal(columns(list(whole.chunk(saved, dim=1)), dims), whole[:, dims])


@pytest.fixture(scope="module")
def one(data, tmp_path_factory):
    """A run of one process, as it was after 6 steps and at its end."""
    out = tmp_path_factory.mktemp("one")
    launch("train-6", 1, out, *TINY, "--data", data, "--out-dir", out / "half")
    launch("train", 1, out, *TINY, "--data", data, "--out-dir", out / "whole")
    return out


def same_run(out, want, loss=2e-5):
    """Summation order apart, the two folders hold the same run: losses, evaluation, values."""
    def log(folder):
        return [json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines()]
    assert [x["loss"] for x in log(out)] == pytest.approx([x["loss"] for x in log(want)], rel=loss)
    assert [x["memory_kl"] for x in log(out)] == pytest.approx([x["memory_kl"] for x in log(want)], rel=1e-2)
    a, b = (json.loads((f / "result.json").read_text()) for f in (out, want))
    assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-4) and a["params"] == b["params"] and a["flops_per_token"] == b["flops_per_token"]
    assert abs(a["recall"] - b["recall"]) < 0.02
    model, state = GPT.load(out)
    other, _ = GPT.load(want)
    assert state["step"] == 12 and (model.tables[0].values - other.tables[0].values).abs().max() < 2e-3


def test_checkpoints_move_between_world_sizes(one, data, tmp_path):
    args = [*TINY, "--data", data]
    launch("train-6", 4, tmp_path, *args, "--out-dir", tmp_path / "4")
    assert sorted(f.name for f in (tmp_path / "4").glob("ckpt*")) == [*(f"ckpt-6-{i}of4.pt" for i in range(4)), "ckpt.pt"]
    shutil.copy(tmp_path / "4" / "ckpt.pt", tmp_path / "4" / "ckpt-best.pt")                      # the user's own
    for target, world, more in (("1", 1, []), ("2", 2, ["--mem-parallel", "1"])):
        shutil.copytree(tmp_path / "4", tmp_path / target)
        launch("train", world, tmp_path, *args, *more, "--out-dir", tmp_path / target, "--resume")
        same_run(tmp_path / target, one / "whole")
        assert sorted(f.name for f in (tmp_path / target).glob("ckpt*")) == ["ckpt-best.pt", "ckpt.pt"]  # slices that no one needs are gone
    shutil.copytree(one / "half", tmp_path / "half")
    launch("train", 4, tmp_path, *args, "--mem-parallel", "2", "--out-dir", tmp_path / "half", "--resume")
    same_run(tmp_path / "half", one / "whole")
    (tmp_path / "half" / "ckpt-12-1of2.pt").unlink()
    with pytest.raises(ValueError, match="ckpt-12-1of2.pt"):
        GPT.load(tmp_path / "half")


def test_a_compiled_launch_trains_the_same(data, tmp_path):
    """With more dense parameters than DDP puts in its first bucket, for each of which torch.compile would make a graph of its own."""
    args = [*TINY, "--data", data, "--n-embd", "256", "--n-layer", "3", "--mem-layers", "0,2", "--max-steps", "4"]
    launch("train", 2, tmp_path, *args, "--out-dir", tmp_path / "plain")
    launch("train-compiled", 2, tmp_path, *args, "--compile", "--out-dir", tmp_path / "compiled")
    plain, compiled = ([json.loads(x)["loss"] for x in (tmp_path / run / "log.jsonl").read_text().splitlines()] for run in ("plain", "compiled"))
    assert len(plain) == 2 and compiled == pytest.approx(plain, rel=1e-5)


def test_bad_mem_parallel(data, tmp_path, capfd, monkeypatch):
    for world, P, D in ((1, 2, 32), (4, 3, 32), (4, 4, 30), (1, -1, 32)):
        s = train.Settings(data=str(data), ffn="memory", mem_parallel=P, mem_value_dim=D, n_layer=2, n_embd=32, n_head=2, mem_layers=(1,), batch_size=16)
        with pytest.raises(train.Trouble, match=rf"--mem-parallel {P}: a table of {D} dims cannot be shared so by {world} rank"):
            train.fit_to_data(s, world)
    assert train.main([*TINY, "--data", str(data), "--mem-parallel", "2", "--out-dir", str(tmp_path / "x")]) == 1
    assert capfd.readouterr().err.count("\n") == 1


def children(pid):
    """Process ids of a process's children."""
    return [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and (p / "stat").exists()
            and (p / "stat").read_text().rsplit(")", 1)[1].split()[1] == str(pid)]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the ranks in /proc, on Linux")
@pytest.mark.parametrize("how", ["kill -9 of one rank", "Ctrl-C"])
def test_a_stopped_launch_says_so_and_goes_on(how, data, tmp_path):
    args = [*TINY, "--data", str(data), "--max-steps", "1500", "--eval-every", "40", "--log-every", "40", "--out-dir", str(tmp_path / "run")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "train.py"), *args]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run" / "ckpt.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(random.random())
        if how == "Ctrl-C":  # the terminal sends it to all, and torchrun passes it on
            os.killpg(run.pid, signal.SIGINT)
        else:
            os.kill(sorted(children(run.pid))[-1], signal.SIGKILL)
        out, err = run.communicate(timeout=60)
    finally:
        os.killpg(run.pid, signal.SIGKILL) if run.poll() is None else None
    assert run.returncode != 0
    state = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)
    if how == "Ctrl-C":
        assert f"stopped at step {state['step']} and saved: go on with --resume" in out and state["step"] % 10 == 0
    else:
        assert "lost the others" in err and "--resume" in err and state["step"] % 40 == 0
    assert train.main([*args, "--resume"]) == 0                             # with one process
    assert [json.loads(x)["step"] for x in (tmp_path / "run" / "log.jsonl").read_text().splitlines()] == [
        step for step in range(1, 1501) if step % 40 == 0 or step == 1500]


def test_a_rank_that_hangs_is_waited_for_no_longer_than_the_timeout(data, tmp_path):
    (code, text), _ = start("train-hang", 2, tmp_path, *TINY, "--data", data, "--out-dir", tmp_path / "run")
    assert code == 1 and "rank 0 lost the others" in text and "--resume" in text and "Traceback" not in text, text


if __name__ == "__main__":
    rank_main(sys.argv[1], Path(sys.argv[2]))
