"""The two scripts that print tables: their functions in small, on the CPU."""
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import bench_kernel
from bench_kernel import Bench, Sizes

SCRIPT = Path(__file__).resolve().parent / "parallel_costs.py"

TINY = Sizes(N=6, R=4, dims=(4, 8), slots=(16, 32), half_keys=(8, 16), K=4, H=2, copy=1000)


@pytest.fixture
def bench():
    return Bench("cpu", seconds=0.0, copy_rate=10.0)


def check_rows(rows, operation):
    """Complete and positive, in a form that JSON can hold."""
    for row in rows:
        assert row["operation"] == operation
        assert row["device"] == "cpu"
        assert row["peak"] is None
        low, high = row["quartiles"]
        assert 0 < low <= row["ms"] <= high
        assert row["GB_s"] > 0
        assert math.isclose(row["share"], row["GB_s"] / 10)
        for x in row.values():
            assert isinstance(x, (str, int, float, bool, tuple, type(None)))
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names)
    return names


@pytest.mark.slow
def test_the_checks_pass_and_can_fail(monkeypatch):
    bench_kernel.check("cpu", torch.float32)
    bench_kernel.check("cpu", torch.bfloat16)

    def wrong_gather(values, indices, weights):
        return kernel_gather(values, indices, weights) * 1.001
    kernel_gather = bench_kernel.gather
    monkeypatch.setattr(bench_kernel, "gather", wrong_gather)
    with pytest.raises(AssertionError, match="gather, y: off by 1.*e-03 at N 5, R 1, S 1, D 1"):
        bench_kernel.check("cpu", torch.float32)

    def wrong_topk_sums(scores, K):
        best, slots = kernel_topk_sums(scores, K)
        return best, slots.flip(-1)
    kernel_topk_sums = bench_kernel.topk_sums
    monkeypatch.setattr(bench_kernel, "gather", kernel_gather)
    monkeypatch.setattr(bench_kernel, "topk_sums", wrong_topk_sums)
    with pytest.raises(AssertionError, match="not the slots of the sums at n 7, K 7"):
        bench_kernel.check("cpu", torch.float32)


def test_milliseconds_takes_inputs_in_turn():
    seen = []
    events = []

    def call(x):
        seen.append(x)
        events.append("call")

    def before():
        events.append("before")
    quartiles = bench_kernel.milliseconds(call, "cpu", 0.0, [("a",), ("b",)], before)
    assert len(quartiles) == 3 and list(quartiles) == sorted(quartiles)
    assert seen == ["a", "b"] * 4
    assert events == ["before", "call"] * 8


def test_measure_copy():
    assert bench_kernel.measure_copy("cpu", 1000, 0.0) > 0


@pytest.mark.parametrize("hot", [False, True])
def test_measure_gather(bench, hot, capsys):
    rows = bench_kernel.measure_gather(bench, 32, 8, 6, 4, torch.float32, hot)
    names = check_rows(rows, "gather")
    ways = ["ours", "F.embedding_bag", "indexing + einsum"]
    assert names == [f"{way}, forward" for way in ways] + [
        f"{way}, forward + backward" for way in ways]
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows)


def test_measure_selection(bench):
    rows = bench_kernel.measure_selection(bench, 8, 4, 12, torch.float32)
    assert check_rows(rows, "topk_sums") == ["ours", "torch.topk"]


def test_measure_optimizer(bench):
    rows = bench_kernel.measure_optimizer(bench, 32, 8, 24)
    names = check_rows(rows, "optimizer")
    assert names[0] == "torch.optim.AdamW, float32, fused"
    assert names[1].startswith("torch.optim.SparseAdam, the ")
    assert names[2:] == ["ours, RowAdam, float32, all rows", "ours, RowAdam, bfloat16, all rows"]


def test_whole_table_and_picture(bench, tmp_path):
    rows = bench_kernel.measure_all(bench, TINY)
    # Four tables, two of them hot, with three ways forward and three backward; two selections with
    # two ways; four optimizers. A table that is asked for twice is measured once.
    count = {}
    for row in rows:
        count[row["operation"]] = count.get(row["operation"], 0) + 1
    assert count == {"gather": 4 * 6, "topk_sums": 2 * 2, "optimizer": 4}
    picture = tmp_path / "kernel.png"
    bench_kernel.plot(rows, TINY, 10.0, "a machine", picture)
    assert picture.stat().st_size > 10_000


def test_parallel_costs_run_from_any_folder(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    # By hand, for two GPUs. Sliced: to one peer go 3 layers x (8192 x 128 x 12 bytes of slots and
    # weights + 2 x 8192 x 1024 x 2 bytes of outputs) = 0.14 GB. Whole: 2^20 x 2048 x 4 = 8.59 GB.
    assert lines[4].split() == ["2", "0.1", "8.6", "34.4", "137.4", "549.8"]
    assert len(lines) == 13
