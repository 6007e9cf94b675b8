"""What docs/ says is true: its tables are those of runs/report.py, its claims are recomputed, and
the scripts in runs/ train what the tables need (test_runs.py has the rest about the scripts)."""
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "runs"))
import pictures
import report
import results
import train

RUNS = results.load()
RESULTS = (ROOT / "docs" / "results.md").read_text("utf-8")
PARALLEL = (ROOT / "docs" / "parallel.md").read_text("utf-8")
SCRIPTS = ["baselines.sh", "names.sh", "tune.sh", "slots.sh", "scaling.sh", "deep.sh",
           "balance.sh", "variants.sh", "bfloat16.sh", "own_facts.sh FACTS.tsv PATTERNS.tsv",
           "text.sh STORIES.txt WEB.txt", "two_ranks.sh"]


def plain(text):
    """A text without line breaks, so that a sentence is found wherever it is wrapped."""
    return " ".join(text.split())


def mean(kind, key):
    return statistics.mean(results.values(RUNS, kind, key))


def spread(kind, key, digits):
    return results.spread(results.values(RUNS, kind, key), digits)


def says(text, *sentences):
    """Every sentence stands in the text."""
    for sentence in sentences:
        assert sentence in plain(text), sentence


# ---- tables

@pytest.mark.parametrize("file, table", [
    (file, table) for file, tables in report.TABLES.items() for table in tables])
def test_the_tables_are_what_report_writes(file, table):
    text = (ROOT / file).read_text("utf-8")
    assert report.with_table(text, table, RUNS) == text


def test_a_table_replaces_the_old_one():
    def a_table(runs):
        return "new " + runs

    text = "before\n<!-- report: a_table -->\nold\n<!-- report: end -->\nafter"
    want = "before\n<!-- report: a_table -->\nnew runs\n<!-- report: end -->\nafter"
    assert report.with_table(text, a_table, "runs") == want
    assert report.with_table(want, a_table, "runs") == want
    with pytest.raises(ValueError, match="has no <!-- report: a_table -->"):
        report.with_table("nothing", a_table, "runs")


def test_nothing_is_written_if_a_table_cannot_be_made(tmp_path, monkeypatch):
    def good(runs):
        return "new"

    def bad(runs):
        return runs["no such run"]

    text = "<!-- report: {} -->\nold\n<!-- report: end -->\n"
    for name in ("good", "bad"):
        (tmp_path / name).write_text(text.format(name))
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "TABLES", {"good": [good], "bad": [bad]})
    monkeypatch.setattr(sys, "argv", ["report.py"])
    with pytest.raises(KeyError, match="no such run"):
        report.main()
    assert (tmp_path / "good").read_text() == text.format("good")


def test_a_kind_of_one_seed_has_no_spread():
    with pytest.raises(ValueError, match=r"there are 1 run\(s\) named odd-SEED .* at least 2: run"):
        results.seeds({"odd-1": {}, "odd-1337": {}}, "odd")


def test_a_sentence_that_no_longer_holds_is_refused():
    worse = {name: dict(run, recall=0.01) if name.startswith("facts-memory") else run
             for name, run in RUNS.items()}
    with pytest.raises(ValueError, match="must be written anew: hash, Memory, UltraMem, "):
        report.main_text(worse)


def test_every_kind_has_three_seeds():
    kinds = results.MAIN | results.SLOTS | results.DENSE | results.EXPERTS | results.DEEP
    kinds = [*kinds.values()]
    kinds += [f"text-{text}-{kind}" for text in results.TEXTS for kind in results.TEXT.values()]
    for kind in kinds:
        assert len(results.seeds(RUNS, kind)) >= 3, kind


def test_what_the_first_command_prints():
    run = RUNS["facts-memory-1337"]
    added = ("vocab_size", "block_size", "max_steps", *results.RATES)  # by results.collect
    run = {k: v for k, v in run.items() if k not in added}
    assert train.read_settings([])[0].seed == run["seed"]
    assert f"\n{train.report(run)}\n" in RESULTS


def test_the_costs_of_parallel_memory_are_those_the_script_prints(tmp_path):
    script = ROOT / "tests" / "parallel_costs.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"```\n{done.stdout}```" in PARALLEL


# ---- claims

def test_the_rivals_are_matched():
    """Within 3% of the memory model's parameters, and no more FLOPs than dense; measured."""
    memory = RUNS["facts-memory-1"]["params"]["total"]
    dense = mean("facts-dense", "flops_per_token")
    for title in ("MoE", "hash", "PEER", "UltraMem", "Memory", "Memory+"):
        run = RUNS[f"{results.MAIN[title]}-1"]
        assert run["params"]["total"] == pytest.approx(memory, rel=0.03), title
        assert run["flops_per_token"] <= dense, title
    assert mean("facts-dense2", "flops_per_token") >= 2 * dense
    assert mean("facts-dense4", "flops_per_token") >= 4 * dense
    assert mean("facts-dense208", "flops_per_token") >= 8 * dense
    assert mean("facts-dense48", "flops_per_token") == pytest.approx(0.6 * dense, rel=0.03)


def test_the_memory_models_of_8_blocks_are_matched():
    params = [RUNS[f"deep-{kind}-1"]["params"]["total"] for kind in ("memory", "three", "plus")]
    assert max(params) <= 1.03 * min(params)
    for kind in ("memory", "three", "plus"):
        assert mean(f"deep-{kind}", "flops_per_token") <= mean("deep-dense", "flops_per_token")


def test_the_models_on_text_are_matched():
    dense = RUNS["text-web-dense-1"]
    memory = RUNS["text-web-memory-1"]["params"]["total"]
    assert memory == pytest.approx(2.5 * dense["params"]["total"], rel=0.03)
    for text in results.TEXTS:
        for kind in ("moe", "hash", "memory", "plus", "plus-long"):
            run = RUNS[f"text-{text}-{kind}-1"]
            assert run["params"]["total"] == pytest.approx(memory, rel=0.03)
            assert run["flops_per_token"] <= dense["flops_per_token"]


def test_the_mixtures_of_experts_are_as_large_as_the_tables():
    for experts, table in (("facts-moe-n64", "facts-n64"), ("facts-moe-n256", "facts-n256")):
        params = RUNS[f"{table}-1"]["params"]["total"]
        assert RUNS[f"{experts}-1"]["params"]["total"] == pytest.approx(params, rel=0.02)
        assert mean(experts, "flops_per_token") <= mean("facts-dense", "flops_per_token")


def test_equal_time_is_no_less():
    long = results.training_time(RUNS, "dense", "facts-dense-long")
    memory = results.training_time(RUNS, "Memory", "facts-memory")
    assert float(long) >= float(memory)


def test_the_goals_of_the_study():
    memory = mean("facts-memory", "recall")
    assert memory >= 2.5 * mean("facts-dense", "recall"), "at equal tokens"
    assert memory >= 1.8 * mean("facts-dense-long", "recall"), "at equal time"
    assert mean("facts-n256", "recall") >= mean("facts-dense4", "recall")


def test_facts_that_were_read_often_are_known_and_once_are_not():
    for kind in ("facts-memory", "facts-dense", "facts-hash", "facts-dense4"):
        for result in results.seeds(RUNS, kind):
            assert results.recall_at(result, 64) > 0.97
    for result in results.seeds(RUNS, "facts-memory"):
        assert results.recall_at(result, 1) < 0.08


def test_more_slots_recall_more_in_every_seed():
    recall = [results.values(RUNS, kind, "recall") for kind in results.SLOTS.values()]
    for few, more in zip(recall, recall[1:]):
        assert max(few) < min(more)


def test_the_best_rates_are_those_of_the_study():
    """Of all runs of a kind that differ in their rates, seed 1 of the study has the least loss."""
    kinds = {kind: f"facts-{kind}-1" for kind, _ in results.TUNED.values()}
    kinds |= {f"text-{text}-{kind}": f"text-{text}-{kind}-1" for text in results.TEXTS
              for title, kind in results.TEXT.items() if not title.endswith(results.TWICE)}
    for kind, in_study in kinds.items():
        tried = [run["val_loss"] for name, run in RUNS.items() if name.startswith(f"tune-{kind}-")]
        assert RUNS[in_study]["val_loss"] < min(tried), kind


def test_the_goal_of_teaching():
    """At most a fifth of what is lost when the whole model learns, with as much learnt."""
    taught = results.teaching()
    lost = {}
    for name in ("slots-4096", "full-1e-4"):
        edits = results.seeds(taught, f"teach-{name}")
        assert len(edits) == 3 and all(edit["after"][0] >= 0.95 for edit in edits)
        lost[name] = statistics.mean(results.share_lost(edit) for edit in edits)
    assert lost["slots-4096"] < lost["full-1e-4"] / 5


def test_two_processes_learn_the_same():
    one = results.values(RUNS, "facts-memory", "recall")[:3]
    two = results.values(RUNS, "facts-2ranks", "recall")
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
        done = subprocess.run(["bash", *f"{tmp_path}/runs/{name}".split()], env=env, cwd="/",
                              capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        return [line.split() for line in record.read_text().splitlines()]

    run.folder = tmp_path
    return run


def started(commands):
    """The runs that commands begin: name -> flags of train.py without --out-dir."""
    found = {}
    for words in commands:
        if "train.py" not in words or "--compare" in words:
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
    assert RUNS.keys() - {"facts-memory-1337"} <= found.keys()
    # What is still to be run is named.
    missing = sorted(found.keys() - RUNS.keys())
    named = re.search(r"Not run yet: (.*?)\.\n\n", RESULTS, re.DOTALL)
    assert missing == (re.findall(r"`([^`]+)`", named[1]) if named else [])
    corpora = {}
    for name in RUNS.keys() & found.keys():
        flags = found[name]
        s, preset, resume, runs = train.read_settings(flags)
        run = RUNS[name]
        wanted = "tinystories" if "text-" in name else "facts"
        assert (preset, resume, runs) == (wanted, False, None)
        assert (s.seed, s.ffn) == (run["seed"], run["ffn"])
        s.vocab_size = run["vocab_size"]
        s.block_size = run["block_size"]
        size = corpora.setdefault(s.data, (s.vocab_size, s.block_size))
        assert size == (s.vocab_size, s.block_size), "one corpus has one size"
        assert s.max_steps * s.batch_size * s.block_size == run["tokens"]
        model = train.GPT(s)
        assert model.param_counts() == run["params"], name
        assert model.flops_per_token() == run["flops_per_token"], name
        # The rate of a table or of experts, where there are any.
        idle = {"value_lr"} if s.ffn in ("dense", "moe") else set()
        if s.ffn != "moe":
            idle.add("expert_lr")
        for rate in set(results.RATES) - idle:
            assert getattr(s, rate) == run[rate], name


def test_a_script_stops_when_a_run_fails(script):
    (script.folder / "stub").write_text(STUB + "exit 3\n")
    assert len(script("baselines.sh", code=3)) == 1


def test_two_ranks_launches_two_processes(script):
    for words in script("two_ranks.sh"):
        assert words[:2] == ["-m", "torch.distributed.run"]
        assert "--nproc_per_node=2" in words


@pytest.fixture
def assets(tmp_path, monkeypatch):
    """Files in place of those in assets/, without results."""
    for name in ("FACTS", "TEACH", "USAGE"):
        path = tmp_path / f"{name.lower()}.json"
        path.write_text("{}")
        monkeypatch.setattr(results, name, path)
    return tmp_path


@pytest.mark.parametrize("content", ["{}", "x", "[]"])
def test_report_refuses_what_is_no_result(content, assets):
    folder = assets / "out" / "odd"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"settings": {}}')
    (folder / "result.json").write_text(content)
    with pytest.raises(ValueError, match="odd is broken, .*move this folder out of out/"):
        results.collect(assets / "out")
    assert (assets / "facts.json").read_text() == "{}"


def test_report_collects(assets):
    (assets / "facts.json").write_text(json.dumps({"old-1": dict(recall=0.5)}))
    for name, finished in (("balance-1e-2-1", True), ("balance-1e-1-1", False)):
        folder = assets / "out" / name
        folder.mkdir(parents=True)
        settings = dict(vocab_size=10, block_size=9, max_steps=8, seed=1, learning_rate=1e-3,
                        value_lr=1e-2, expert_lr=1e-3)
        (folder / "config.json").write_text(json.dumps(dict(settings=settings)))
        (folder / "log.jsonl").write_text('{"step": 8, "memory_usage": 0.5, "memory_kl": 0.25}\n')
        np.savez(folder / "reads.npz", windows=3, readers_0=np.array([0, 2, 1, 0]))
        if finished:
            (folder / "result.json").write_text(json.dumps(dict(val_loss=0.25)))
    (assets / "out" / "teach-1").mkdir()
    (assets / "out" / "teach-1" / "edit.json").write_text('{"teach": {"after": [1]}}')
    assert results.collect(assets / "out") == ["balance-1e-2-1", "teach-1"]
    assert results.load() == {
        "old-1": dict(recall=0.5),
        "balance-1e-2-1": dict(val_loss=0.25, vocab_size=10, block_size=9, max_steps=8,
                          learning_rate=1e-3, value_lr=1e-2, expert_lr=1e-3)}
    assert results.usage() == {"balance-1e-2-1": dict(steps=[8], usage=[0.5], kl=[0.25], windows=3,
                                                 read_by_windows=0.5)}
    assert results.teaching() == {"teach-1": dict(after=[1])}


@pytest.mark.parametrize("draw_into", [
    pictures.draw_facts, pictures.draw_own, pictures.draw_slots])
def test_the_pictures_show_means_and_bands(draw_into, tmp_path):
    pictures.draw(RUNS, draw_into, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    from matplotlib.figure import Figure
    figure = Figure()
    draw_into(RUNS, figure)
    for ax in figure.axes:
        assert len(ax.lines) == len(ax.collections) >= 3, "a band for each line"
        assert ax.get_xlabel() and ax.get_title(loc="left")
    assert figure.axes[0].get_ylabel() == "facts recalled"
    legend = figure.axes[-1].get_legend()
    names = [text.get_text() for text in legend.get_texts()]
    assert all(re.match("Memory|Dense|PEER|Hashed|Mixture|Guessing", name) for name in names)


def test_a_fit_finds_the_line_that_the_points_lie_on():
    sizes = np.array([1e5, 4e5, 3e6, 2e7])
    true = np.array([0.5, -9.0])
    columns = [[p] * 3 for p in results.predicted(true, sizes)]
    line = results.fit(sizes, columns)
    assert np.allclose(line, true)
    assert results.predicted(line, 2**18) == pytest.approx(0.5)  # log-odds 0.5 * 18 - 9 = 0
    low, high = results.fit_band(sizes, columns, sizes)
    assert np.allclose(low, high), "seeds that agree leave no doubt"
    noisy = [[0.9 * p, p, 1.02 * p] for p in results.predicted(true, sizes)]
    low, high = results.fit_band(sizes, noisy, sizes)
    assert (low < high).all() and (high - low < 0.2).all()


@pytest.mark.parametrize("draw_into, width, lines", [
    (pictures.draw_scaling, 10, 12), (pictures.draw_teaching, 6, 3)])
def test_the_other_pictures(draw_into, width, lines, tmp_path):
    pictures.draw(RUNS, draw_into, tmp_path / "picture.png", width)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    from matplotlib.figure import Figure
    figure = Figure()
    draw_into(RUNS, figure)
    bands = sum(len(ax.collections) for ax in figure.axes)
    assert bands == lines and len(figure.axes[0].get_legend().get_texts()) >= 2


def test_the_picture_of_usage():
    from matplotlib.figure import Figure
    figure = Figure()
    pictures.draw_usage(RUNS, figure)
    for ax in figure.axes:
        assert len(ax.lines) == 3
        assert all(line.get_xdata()[-1] == 5000 for line in ax.lines)
    assert figure.axes[0].get_ylim()[0] == 0


def test_the_citation_names_the_paper():
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    for words in ("cff-version: 1.2.0", "license: MIT", "Memory Layers at Scale", "2412.09764",
                  "Berges", "Oğuz", "Haziza", "Yih", "Zettlemoyer", "Ghosh"):
        assert words in citation
