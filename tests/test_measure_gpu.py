"""tests/measure_gpu.py in small and on a CPU, so that no typo waits for the first GPU."""
import contextlib
import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import measure_gpu
from measure_gpu import CHECKS, STEPS, TRAINING, Job, load, report, run_step

import train

ROOT = Path(__file__).resolve().parents[1]


def run_here(name, out):
    """A step in this process -> its rows. That is faster than in one of its own."""
    STEPS[name].run(Job(name, seconds=0.5, out=out, small=True))
    lines = measure_gpu.rows_file(out, name).read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def train_here(job, *argv, **environment):
    """Job.python, in this process: train.py, also where torchrun would start it, with one rank."""
    argv = list(argv)
    if argv[0] != "train.py":
        assert argv[:2] == ["-m", "torch.distributed.run"] and "--nproc_per_node=1" in argv
        argv = argv[argv.index("train.py"):]
    argv = argv[1:]
    stdout = io.StringIO()
    stderr = io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = train.main([str(word) for word in argv])
    return subprocess.CompletedProcess(argv, code, stdout.getvalue(), stderr.getvalue())


@pytest.mark.slow
def test_a_command_adds_to_the_results_of_another(tmp_path, capsys, monkeypatch):
    """The step runs in a process of its own. The results of the first command are made here."""
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    out = tmp_path / "gpu"
    out.mkdir()
    first = dict(status="done", seconds=1.0, rows=run_here("hardware", out))
    (out / "results.json").write_text(json.dumps(dict(hardware=first)), "utf-8")
    argv = ["--small", "--minutes", "0.5", "--only", "training dense", "--out", str(out)]
    assert measure_gpu.main(argv) == 0
    printed = capsys.readouterr().out
    results = load(out / "results.json")
    assert list(results) == ["hardware", "training dense"]
    assert {step["status"] for step in results.values()} == {"done"}
    assert (out / "report.md").read_text("utf-8") == report(results)
    assert report(results) in printed
    assert "No number here means anything" in report(results)
    row, = results["training dense"]["rows"]
    speed = f"{row['tokens_per_s']:,.0f}"
    assert f"| dense | {speed} | 1.00 | - | {row['peak_GiB']:.1f} |" in printed
    assert not (out / "scratch").exists()


@pytest.mark.slow
def test_kernels_and_operations(tmp_path):
    for row in run_here("kernels", tmp_path):
        assert row["ok"], row
    rows = run_here("operations", tmp_path)
    # Two dtypes: four tables, one of them with a hot slot as well, seven ways each; one selection
    # in two ways. Three optimizers.
    assert len(rows) == 2 * (4 * 6 + 2) + 4
    for row in rows:
        assert row["ms"] > 0


@pytest.mark.slow
def test_training_of_every_kind(tmp_path):
    for kind in TRAINING:
        row, = run_here(f"training {kind}", tmp_path)
        assert row["kind"] == kind
        assert row["ms"] > 0
        memory = row["params"]["values"] + row["params"].get("experts", 0)
        assert (memory > 0) == (kind != "dense")


@pytest.mark.slow
def test_facts_and_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(Job, "python", train_here)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as many as here: then the sums are the same
    memory, dense = run_here("facts-gpu", tmp_path)
    assert (memory["kind"], dense["kind"]) == ("memory", "dense")
    assert memory["steps"] == dense["steps"] == 8
    assert 0 <= memory["recall"] <= 1
    monkeypatch.setattr(measure_gpu, "TABLE_DTYPES", ("bfloat16",))  # one is enough here
    rows = run_here("runs", tmp_path)
    for row in rows:
        assert row["ok"], row
    assert [("runs", row["check"]) for row in rows] == CHECKS[-len(rows):]
    assert rows[0]["said"] == "bit for bit, from step 30 to 60"


def test_a_check_that_fails_does_not_stop_the_next(tmp_path):
    job = Job("kernels", seconds=5, out=tmp_path, small=True)

    def bad():
        raise ValueError("two\nlines")
    job.check("first", bad)
    job.check("second", str, 7)
    results = dict(kernels=dict(
        status="done", rows=[json.loads(line) for line in
                             (tmp_path / "kernels.jsonl").read_text("utf-8").splitlines()]))
    assert measure_gpu.number(results, "kernels", "said", check="first") == "ValueError: two lines"
    assert measure_gpu.number(results, "kernels", "ok", check="first") is False
    assert measure_gpu.number(results, "kernels", "ok", check="second") is True


@pytest.mark.skipif(sys.platform == "win32", reason="the script is a shell script")
def test_a_step_that_hangs_or_fails_leaves_what_it_had(tmp_path, monkeypatch):
    """Python is replaced by a script that writes a row and a half, and then hangs or fails."""
    stub = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(stub))
    ends = {"sleep 60": "stopped after its 1 s", "echo no >&2; exit 3": "failed: no"}
    for end, status in ends.items():
        stub.write_text('#!/bin/sh\nprintf \'{"a": 1}\\n{"b\' >> "$7/$3.jsonl"\n' + end + "\n")
        stub.chmod(0o755)
        step = run_step("hardware", 1, tmp_path, small=False)
        assert step["rows"] == [{"a": 1}]
        assert step["status"] == status
        assert step["seconds"] < 30


def test_what_was_not_measured_says_so():
    empty = report({})
    assert empty.startswith("**Not measured on a GPU yet.**")
    goals = [line for line in empty.splitlines() if "≥" in line or "≤" in line]
    assert len(goals) == 5
    for line in goals:
        assert line.endswith("| not measured yet |  |")
    stopped = report(dict(hardware=dict(status="stopped after its 4 s", seconds=4.0, rows=[])))
    assert "- hardware: stopped after its 4 s" in stopped


def gather_row(dtype, way, backward, ms, share):
    return dict(measure_gpu.GOAL_GATHER, dtype=dtype, way=way, backward=backward, ms=ms,
                share=share)


def test_goals_are_judged():
    selection = dict(measure_gpu.GOAL_SELECTION, dtype="float32")
    rows = [
        gather_row("bfloat16", "ours", False, 5.0, 0.93),
        gather_row("float32", "ours", True, 10.0, 0.5),
        gather_row("float32", "F.embedding_bag", True, 50.0, 0.1),
        dict(selection, name="ours", ms=1.0), dict(selection, name="torch.topk", ms=9.0),
        dict(selection, name="ours", ms=1.0, dtype="bfloat16"),
        dict(selection, name="torch.topk", ms=2.0, dtype="bfloat16"),
    ]
    results = dict(operations=dict(status="done", rows=rows))
    ms = {"dense": 96.0, "Memory+, 2^16 slots": 90.0, "Memory+, 2^20 slots": 100.0,
          "Memory+, 2^22 slots": 99.0}
    for kind, time in ms.items():
        results[f"training {kind}"] = dict(status="done", rows=[dict(kind=kind, ms=time)])
    cells = [line.split("|")[2:5] for line in measure_gpu.goals_table(results).splitlines()[2:]]
    assert [[cell.strip() for cell in row] for row in cells] == [
        ["≥ 0.90", "0.93", "yes"], ["≥ 6.00", "5.00", "no"], ["≥ 3.00", "2.00", "no"],
        ["≥ 0.95", "0.96", "yes"], ["≤ 1.15", "1.10", "yes"]]


def test_speed_md_has_the_report_of_the_published_results():
    page = (ROOT / "docs" / "speed.md").read_text("utf-8")
    begin = "<!-- measure_gpu: begin -->\n"
    block = page[page.index(begin) + len(begin):page.index("<!-- measure_gpu: end -->")]
    assert block == report(load(ROOT / "runs" / "results" / "gpu.json"))


def test_bad_arguments_are_one_line(tmp_path, capsys):
    for argv, words in ((["--only", "nothing"], "fits no step"),
                        (["--minutes", "0"], "--minutes 0.0"),
                        (["--minutes", "nan"], "--minutes nan")):
        assert measure_gpu.main([*argv, "--out", str(tmp_path / "x")]) == 1
        line, = capsys.readouterr().err.splitlines()
        assert words in line
    assert not (tmp_path / "x").exists()
