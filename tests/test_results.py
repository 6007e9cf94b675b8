"""What docs/ says is true: its tables are those of runs/report.py, its claims are recomputed, and
the scripts in runs/ train what the tables need (test_runs.py has the rest about the scripts)."""
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "runs"))
import report
import train

RUNS = report.load()
RESULTS = (ROOT / "docs" / "results.md").read_text("utf-8")
PARALLEL = (ROOT / "docs" / "parallel.md").read_text("utf-8")
SCRIPTS = ["facts.sh", "slots.sh", "tuning.sh", "bfloat16.sh", "two_ranks.sh"]


def plain(text):
    """A text without line breaks, so that a sentence is found wherever it is wrapped."""
    return " ".join(text.split())


def mean(kind, key):
    return statistics.mean(report.values(RUNS, kind, key))


def spread(kind, key, digits):
    return report.spread(report.values(RUNS, kind, key), digits)


def says(text, *sentences):
    """Every sentence stands in the text."""
    for sentence in sentences:
        assert sentence in plain(text), sentence


# ---- tables

@pytest.mark.parametrize("file, table", [
    (file, table) for file, tables in report.TABLES.items() for table in tables])
def test_the_tables_are_what_report_prints(file, table):
    assert table(RUNS) in (ROOT / file).read_text("utf-8")


def test_every_kind_has_three_seeds():
    for kind in (report.MAIN | report.SLOTS | report.DENSE).values():
        assert len(report.seeds(RUNS, kind)) == 3


def test_what_the_first_command_prints():
    run = RUNS["facts-memory-1337"]
    run = {k: v for k, v in run.items() if k not in ("vocab_size", "block_size", "max_steps")}
    assert train.read_settings([])[0].seed == run["seed"]
    assert f"\n{train.report(run)}\n" in RESULTS


def test_the_costs_of_parallel_memory_are_those_the_script_prints(tmp_path):
    script = ROOT / "tests" / "parallel_costs.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"```\n{done.stdout}```" in PARALLEL


# ---- claims

def test_dense_gets_no_fewer_flops():
    dense = {mean(kind, "flops_per_token") for kind in ("facts-dense", "facts-dense-long")}
    smaller = ["facts-memory", "facts-plus", *list(report.SLOTS.values())[:-1]]
    memory = {mean(kind, "flops_per_token") for kind in smaller}
    assert len(dense) == 1
    assert min(dense) >= max(memory)
    more = mean("facts-n512", "flops_per_token") / min(dense) - 1
    wide = mean("facts-dense-128", "flops_per_token") / min(dense)
    says(RESULTS, f"512 (with which it takes {more:.0%} more FLOPs than dense)",
         f"The wide one takes {wide:.1f} times the FLOPs")


def test_what_it_claims_of_recall():
    memory, plus, dense, long = (mean(kind, "recall") for kind in report.MAIN.values())
    assert memory > long and memory >= 1.7 * dense
    pairs = zip(report.values(RUNS, "facts-memory", "recall"),
                report.values(RUNS, "facts-plus", "recall"))
    assert all(a > b for a, b in pairs), "in each of the three seeds"
    says(RESULTS,
         f"the memory layer recalls {memory / dense:.1f} times as many facts as the dense model",
         f"recalls {plus / dense:.1f} times as many.",
         f"Memory still recalls {memory / long:.1f} times as many facts, Memory+ "
         f"{plus / long:.1f} times.",
         f"Memory+ recalls less than Memory here ({plus:.3f} and {memory:.3f}).",
         f"at equal time the gain falls from {memory / dense:.1f} to {memory / long:.1f} times")


def test_what_it_claims_of_time():
    long = mean("facts-dense-long", "seconds")
    memory = mean("facts-memory", "seconds")
    assert long >= 0.9 * memory
    says(RESULTS, f"This took it {long:.0f} s; the memory model took {memory:.0f} s.")
    passes = RUNS["facts-dense-long-1"]["tokens"] / RUNS["facts-dense-1"]["tokens"]
    says(RESULTS, f"reads the corpus {passes:.1f} times")


def test_more_slots_recall_more_in_every_seed():
    kinds = ["facts-dense", *report.SLOTS.values()]
    recall = [report.values(RUNS, kind, "recall") for kind in kinds]
    for few, more in zip(recall[1:], recall[2:]):
        assert max(few) < min(more)


def test_what_it_claims_of_slots():
    dense = mean("facts-dense", "recall")
    wide = mean("facts-dense-128", "recall")
    more = mean("facts-n256", "recall")
    most = mean("facts-n512", "recall")
    total = {kind: RUNS[f"{kind}-1"]["params"]["total"]
             for kind in ("facts-dense", "facts-n256", "facts-n512")}
    once = [report.spread([report.recall_at(r, 1) for r in report.seeds(RUNS, kind)], 3)
            for kind in ("facts-n512", "facts-dense")]
    dense_once = once[1].split()[0]
    says(RESULTS,
         f"with 65,536 slots the model recalls {more / dense:.1f} times as many facts as the dense "
         f"model of the same FLOPs, {more / wide:.1f} times as many as the one twice as wide",
         f"It is {most / dense:.1f} and {most / wide:.1f} times with 262,144 slots",
         f"262,144 slots recall {once[0]}, the dense model {dense_once}.",
         f"{total['facts-n256'] / total['facts-dense']:.0f} times the dense model's with 65,536 "
         f"slots, {total['facts-n512'] / total['facts-dense']:.0f} times with 262,144, of which a "
         f"step reads {100 * mean('facts-n512', 'memory_usage'):.0f}%",
         f"store {mean('facts-n256', 'bits_per_param'):.3f} and "
         f"{mean('facts-n512', 'bits_per_param'):.3f} bits in each parameter")


def test_what_it_claims_of_fewer_reads():
    dense = mean("facts-dense", "recall")
    gain = (mean("facts-k8", "recall") - dense) / (mean("facts-memory", "recall") - dense)
    says(RESULTS, f"`--mem-topk 8` recalls {spread('facts-k8', 'recall', 3)}: {gain:.0%} of the "
                  f"gain over dense")


def test_what_it_claims_of_tuning():
    names = ("1", "lr3e-3", "lr7.5e-4")
    wide = [RUNS[f"facts-dense-128-{name}"]["recall"] for name in names]
    assert max(wide) == wide[0]
    says(RESULTS, f"1.5e-3 ({wide[0]:.3f} with seed 1; 3e-3: {wide[1]:.3f}, "
                  f"7.5e-4: {wide[2]:.3f})")
    deviations = [statistics.stdev(report.values(RUNS, kind, "recall"))
                  for kind in ("facts-memory", "facts-plus", "facts-dense")]
    memory, plus, dense = deviations
    says(RESULTS, f"Memory spreads by {memory:.3f}, Memory+ by {plus:.3f}, dense by {dense:.3f}")
    # Every run of one seed that is in the data stands in the table.
    single = {name for name in RUNS if not name.startswith("facts-")}
    assert single < set(report.TRIED.values())


def test_what_it_claims_of_bfloat16():
    says(RESULTS, f"over three seeds {spread('facts-bf16', 'recall', 3)} recalled "
                  f"(float32: {spread('facts-plus-2e-2', 'recall', 3)})")


def test_two_processes_learn_the_same():
    one = report.values(RUNS, "facts-memory", "recall")
    two = report.values(RUNS, "facts-2ranks", "recall")
    assert abs(statistics.mean(one) - statistics.mean(two)) < statistics.stdev(one)


# ---- the scripts

STUB = """#!/usr/bin/env bash
echo "$@" >> "$RECORD"
"""


@pytest.fixture
def script(tmp_path):
    """A copy of runs/ beside an empty out/, and a stub for python that only records its calls.

    Returns a function: name of a script -> the commands it runs, each a list of words.
    """
    (tmp_path / "runs").mkdir()
    for path in (ROOT / "runs").glob("*.sh"):
        (tmp_path / "runs" / path.name).write_bytes(path.read_bytes())
    stub = tmp_path / "stub"
    stub.write_text(STUB)
    stub.chmod(0o755)

    def run(name, code=0):
        record = tmp_path / "record"
        record.write_text("")
        env = os.environ | dict(PYTHON=str(stub), RECORD=str(record))
        done = subprocess.run(["bash", str(tmp_path / "runs" / name)], env=env, cwd="/",
                              capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        return [line.split() for line in record.read_text().splitlines()]

    run.folder = tmp_path
    return run


def started(commands):
    """The runs that commands begin: name -> flags of train.py without --out-dir."""
    found = {}
    for words in commands:
        if "--compare" in words:
            continue
        flags = words[words.index("train.py") + 1:]
        at = flags.index("--out-dir")
        name = flags[at + 1].removeprefix("out/")
        found[name] = flags[:at] + flags[at + 2:]
    return found


def test_the_scripts_make_all_runs_of_the_results(script):
    """And with the settings behind the numbers: the sizes and the FLOPs agree."""
    found = {}
    for name in SCRIPTS:
        found |= started(script(name))
    assert found.keys() == RUNS.keys() - {"facts-memory-1337"}
    for name, flags in found.items():
        s, preset, resume, runs = train.read_settings(flags)
        run = RUNS[name]
        corpus = RUNS["facts-memory-1337"]
        assert (preset, resume, runs) == ("facts", False, None)
        assert (s.seed, s.ffn) == (run["seed"], run["ffn"])
        s.vocab_size = corpus["vocab_size"]
        s.block_size = corpus["block_size"]
        assert s.max_steps * s.batch_size * s.block_size == run["tokens"]
        model = train.GPT(s)
        assert model.param_counts() == run["params"], name
        assert model.flops_per_token() == run["flops_per_token"], name


def test_a_script_stops_when_a_run_fails(script):
    (script.folder / "stub").write_text(STUB + "exit 3\n")
    assert len(script("facts.sh", code=3)) == 1


def test_two_ranks_launches_two_processes(script):
    for words in script("two_ranks.sh"):
        assert words[:2] == ["-m", "torch.distributed.run"]
        assert "--nproc_per_node=2" in words


@pytest.mark.parametrize("content", ["{}", "x", "[]"])
def test_report_refuses_what_is_no_result(content, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "FACTS", tmp_path / "facts.json")
    (tmp_path / "facts.json").write_text("{}")
    folder = tmp_path / "out" / "odd"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"settings": {}}')
    (folder / "result.json").write_text(content)
    with pytest.raises(ValueError, match="odd is broken, .*move this folder out of out/"):
        report.collect(tmp_path / "out")
    assert (tmp_path / "facts.json").read_text() == "{}"


def test_report_collects(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "FACTS", tmp_path / "facts.json")
    (tmp_path / "facts.json").write_text(json.dumps({"old-1": dict(recall=0.5)}))
    for name, finished in (("new-1", True), ("begun-1", False)):
        folder = tmp_path / "out" / name
        folder.mkdir(parents=True)
        settings = dict(vocab_size=10, block_size=9, max_steps=8, seed=1)
        (folder / "config.json").write_text(json.dumps(dict(settings=settings)))
        if finished:
            (folder / "result.json").write_text(json.dumps(dict(recall=0.25)))
    assert report.collect(tmp_path / "out") == ["new-1"]
    assert json.loads((tmp_path / "facts.json").read_text()) == {
        "old-1": dict(recall=0.5),
        "new-1": dict(recall=0.25, vocab_size=10, block_size=9, max_steps=8)}


@pytest.mark.parametrize("draw_into", [report.draw_facts, report.draw_slots])
def test_the_pictures_show_means_and_bands(draw_into, tmp_path):
    report.draw(RUNS, draw_into, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    from matplotlib.figure import Figure
    figure = Figure()
    draw_into(RUNS, figure)
    ax, = figure.axes
    assert len(ax.lines) == len(ax.collections) >= 3, "a band for each line"
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert all(re.match("Memory|Dense", name) for name in names)
    assert ax.get_xlabel() and ax.get_ylabel() == "facts recalled"


def test_the_citation_names_the_paper():
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    for words in ("cff-version: 1.2.0", "license: MIT", "Memory Layers at Scale", "2412.09764",
                  "Berges", "Oğuz", "Haziza", "Yih", "Zettlemoyer", "Ghosh"):
        assert words in citation
