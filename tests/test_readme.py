"""What README.md says is true: its commands parse, its files exist, its cheap numbers are recomputed, its table is that of assets/facts.json."""
import json
import math
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import sample
import train
from model import GPT

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
SETUP = "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && .venv/bin/"
RUNS = json.loads((ROOT / "assets" / "facts.json").read_text("utf-8"))


def test_it_opens_with_the_two_commands():
    commands = [line.strip() for line in README.splitlines() if line.strip().startswith("python3 -m venv")]
    assert commands == [SETUP + "python train.py", SETUP + "python -m pytest"]
    assert "pytest" in (ROOT / ".ci" / "run").read_text() and README.index(commands[0]) < 1500


def code():
    """Every command in README: of indented lines, code blocks and `inline code`, comments taken off."""
    spans = re.findall(r"`([^`\n]+)`", README) + README.splitlines()
    for span in spans:
        for command in span.split(" # ")[0].split("&&"):
            if re.match(r"\s*(\.venv/bin/)?(python|torchrun) ", command) and "$" not in command and "NAME" not in command and "<" not in command:
                yield command.strip()


@pytest.mark.parametrize("command", sorted({c for c in code() if "train.py" in c and "--help" not in c}))
def test_train_commands_parse(command):
    settings, preset, resume, runs = train.read_settings(shlex.split(command.split("train.py", 1)[1]) if "--resume" not in command else [])
    settings.vocab_size, settings.block_size = settings.vocab_size or 512, settings.block_size or 9   # else the data says them
    assert preset in train.PRESETS and settings.check() is settings and (runs is None or len(runs) > 1)
    ranks = math.prod(int(n) for n in re.findall(r"--(?:nnodes|nproc_per_node)=(\d+)", command))
    assert settings.batch_size % (ranks * (settings.micro_batch_size or 1)) == 0, f"{settings.batch_size} windows for {ranks} ranks"


def test_there_are_commands_and_flags_that_exist():
    assert len({c for c in code() if "train.py" in c}) >= 8
    known = {train.flag(f) for f in train.Settings.__dataclass_fields__} | {"--resume", "--compare", "--help", "--no-compile"}
    known |= {"--" + name.replace("_", "-") for name in sample.NUMBERS} | {"--recall", "--ablate-memory", "--prompt", "--plot", "--standalone", "--nproc_per_node"}
    known |= {"--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--small", "--full", "--from-file", "--out", "--tokenizer", "--vocab-size"}
    assert not set(re.findall(r"(?<![\w-])--[a-z][\w-]+", README)) - known


def test_the_files_it_names_exist():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert len(links) >= 9 and all((ROOT / link).exists() for link in links)


def test_what_the_first_command_prints():
    run = {k: v for k, v in RUNS["facts-memory-1337"].items() if k not in ("vocab_size", "block_size", "max_steps")}
    assert train.read_settings([])[0].seed == run["seed"] and f"\n{train.report(run)}\n" in README


@pytest.mark.parametrize("ffn", ["memory", "dense"])
def test_sizes(ffn):
    run = next(r for r in RUNS.values() if r["ffn"] == ffn)
    settings = train.read_settings(["--ffn", ffn])[0]
    settings.vocab_size, settings.block_size = run["vocab_size"], run["block_size"]
    model = GPT(settings)
    assert model.param_counts() == run["params"] and model.flops_per_token() == run["flops_per_token"]
    assert f"{run['params']['total']:,}" in README and f"{run['flops_per_token']:,}" in README


KINDS = {"| Memory |": "facts-memory", "| Memory+ |": "facts-plus", "| dense |": "facts-dense", "| dense, equal time |": "facts-dense-long"}


def of(kind, key):
    values = [run[key] for name, run in RUNS.items() if re.fullmatch(kind + r"-\d", name)]
    assert len(values) == 3
    return values


def mean(kind, key, digits):
    return f"{statistics.mean(of(kind, key)):.{digits}f} ± {statistics.stdev(of(kind, key)):.{digits}f}"


@pytest.mark.parametrize("row, kind", KINDS.items())
def test_the_table_is_what_the_runs_gave(row, kind):
    line = next(x for x in README.splitlines() if x.startswith(row))
    for key, digits in (("recall", 3), ("seconds", 0), ("val_loss", 3), ("recall_unseen_phrasing", 3)):
        assert mean(kind, key, digits) in line, (key, mean(kind, key, digits), line)


@pytest.mark.parametrize("row, kind", {"| one process |": "facts-memory", "| two processes |": "facts-2ranks"}.items())
def test_two_processes_learn_the_same(row, kind):
    line = next(x for x in README.splitlines() if x.startswith(row))
    assert all(mean(kind, key, digits) in line for key, digits in (("recall", 3), ("val_loss", 3), ("seconds", 0))), line
    assert abs(statistics.mean(of("facts-2ranks", "recall")) - statistics.mean(of("facts-memory", "recall"))) < statistics.stdev(of("facts-memory", "recall"))


def test_what_a_bfloat16_table_recalls():
    assert f"three seeds: {mean('facts-bf16', 'recall', 3)} recalled (float32: {mean('facts-plus-2e-2', 'recall', 3)})" in README


def test_the_costs_of_parallel_memory_are_those_memory_py_prints():
    done = subprocess.run([sys.executable, "memory.py"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and f"```\n{done.stdout}```" in README


def test_dense_gets_no_fewer_flops():
    dense, memory = (set(sum((of(kind, "flops_per_token") for kind in kinds), [])) for kinds in (
        ("facts-dense", "facts-dense-long"), ("facts-memory", "facts-plus", *list(SLOTS.values())[:-1])))
    assert len(dense) == 1 and min(dense) >= max(memory)
    assert f"512 (with which it takes {max(of('facts-n512', 'flops_per_token')) / min(dense) - 1:.0%} more FLOPs than dense)" in README


SLOTS = {"1,024": "facts-n32", "4,096": "facts-n64", "16,384": "facts-memory", "65,536": "facts-n256", "262,144": "facts-n512"}


@pytest.mark.parametrize("row, kind", (SLOTS | {"dense": "facts-dense", "dense, twice as wide": "facts-dense-128"}).items())
def test_more_slots(row, kind):
    line = next(x for x in README.split("### More slots", 1)[1].splitlines() if x.startswith(f"| {row} |"))
    for key, digits in (("recall", 3), ("recall_unseen_phrasing", 3), ("val_loss", 3), ("seconds", 0)):
        assert mean(kind, key, digits) in line, (key, mean(kind, key, digits), line)
    used = of(kind, "memory_usage")
    assert f"| {of(kind, 'params')[0]['total']:,} | {of(kind, 'flops_per_token')[0]:,} |" in line
    assert (f" {100 * statistics.mean(used):.0f}% " in line) if kind in SLOTS.values() else used == [None] * 3


def test_what_it_claims_of_slots_and_reads():
    recall = [of(kind, "recall") for kind in ("facts-dense", *SLOTS.values())]
    assert all(max(few) < min(more) for few, more in zip(recall[1:], recall[2:])), "in every seed"
    wide, most, more, dense, default = (statistics.mean(of(kind, "recall")) for kind in (
        "facts-dense-128", "facts-n512", "facts-n256", "facts-dense", "facts-memory"))
    tuned = [RUNS[f"facts-dense-128-{run}"]["recall"] for run in ("1", "lr3e-3", "lr7.5e-4")]
    assert max(tuned) == tuned[0] and f"({tuned[0]:.3f} with seed 1; 3e-3: {tuned[1]:.3f}, 7.5e-4: {tuned[2]:.3f})" in README
    text = " ".join(README.split())
    assert f"with 65,536 slots {more / dense:.1f} times" in text and f"FLOPs, {more / wide:.1f} times" in text
    assert f"with 262,144 slots {most / dense:.1f} and {most / wide:.1f} times" in text
    once = [[next(x["recall"] for x in table if x["from"] == 1) for table in of(kind, "recall_by_exposures")] for kind in ("facts-n512", "facts-dense")]
    assert f"once 262,144 slots recall {statistics.mean(once[0]):.3f} ± {statistics.stdev(once[0]):.3f}, the dense model {statistics.mean(once[1]):.3f}." in text
    assert f"84 times with 262,144, of which a step reads {100 * statistics.mean(of('facts-n512', 'memory_usage')):.0f}%; " in text
    gain = (statistics.mean(of("facts-k8", "recall")) - dense) / (default - dense)
    assert f"`--mem-topk 8` recalls {mean('facts-k8', 'recall', 3)}: {gain:.0%} of the gain" in text


def test_what_was_tried():
    tried = {line.split("|")[2].strip() for line in README.split("What was tried", 1)[1].split("## Speed")[0].splitlines() if line.startswith("|")}
    runs = [name for name in RUNS if not name.startswith("facts-")] + ["facts-memory-1", "facts-plus-1", "facts-dense-1", "facts-k8-1"]
    assert len(runs) >= 8 and tried - {"facts recalled", "---"} == {f"{RUNS[name]['recall']:.3f}" for name in runs}


def test_what_it_claims_of_recall():
    memory, plus, dense, long = (statistics.mean(of(kind, "recall")) for kind in KINDS.values())
    assert all(f"{ratio:.1f} times" in README for ratio in (memory / dense, memory / long, plus / dense, plus / long))
    assert memory >= 1.7 * dense and memory > long and all(a > b for a, b in zip(of("facts-memory", "recall"), of("facts-plus", "recall")))
    bits = [f"{statistics.mean(of(kind, 'bits_per_param')):.3f}" for kind in KINDS.values()]
    assert all(b in README for b in bits)
    seconds = [round(statistics.mean(of(kind, "seconds"))) for kind in ("facts-dense-long", "facts-memory")]
    assert f"({seconds[0]} s, the memory model {seconds[1]} s)" in README and seconds[0] >= 0.9 * seconds[1]
