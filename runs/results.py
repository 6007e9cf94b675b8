"""The results of the runs, for report.py and pictures.py. They are the files in runs/results/:

    facts.json    the result.json of each run, under the name of its folder
    teach.json    what runs/teach.sh found
    steps.json    how long a step of each model takes: tests/time_steps.py --study --json ...
    text_steps.json    the same for the models of runs/text.sh

Runs that differ by their seed alone are one kind: facts-memory-1, facts-memory-2, ... are the kind
facts-memory. A number in a table is the mean of a kind ± its standard deviation.
"""
import json
import math
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from support.files import reading

FOLDER = ROOT / "runs" / "results"

# ---- the kinds of runs: title in a table -> beginning of the names of the runs

# runs/baselines.sh
MAIN = {
    "dense": "facts-dense",
    "dense, equal time": "facts-dense-long",
    "dense, 2 x FLOPs": "facts-dense2",
    "dense, 4 x FLOPs": "facts-dense4",
    "MoE": "facts-moe",
    "hash": "facts-hash",
    "PEER": "facts-peer",
    "UltraMem": "facts-ultramem",
    "Memory": "facts-memory",
    "Memory+": "facts-plus",
    "Memory, 65,536 slots": "facts-n256",
}
# runs/slots.sh: tables of several sizes
SLOTS = {
    "1,024": "facts-n32",
    "4,096": "facts-n64",
    "16,384": "facts-memory",
    "65,536": "facts-n256",
    "262,144": "facts-n512",
    "1,048,576": "facts-n1024",
}
# runs/scaling.sh: dense models of several widths, mixtures of experts as large as some tables
DENSE = {
    "dense, 0.6 x FLOPs": "facts-dense48",
    "dense": "facts-dense",
    "dense, 2 x FLOPs": "facts-dense2",
    "dense, 4 x FLOPs": "facts-dense4",
    "dense, 8 x FLOPs": "facts-dense208",
}
EXPERTS = {
    "MoE, as 4,096 slots": "facts-moe-n64",
    "MoE": "facts-moe",
    "MoE, as 65,536 slots": "facts-moe-n256",
}
# runs/own_facts.sh: each on a corpus with a token for each word, and on one with bytes
OWN = {"dense": "dense", "MoE": "moe", "hash": "hash", "Memory": "memory"}
# runs/text.sh: each on two texts
TEXTS = ("stories", "web")
TWICE = ", twice the steps"
TEXT = {
    "dense": "dense",
    "dense" + TWICE: "dense-long",
    "MoE": "moe",
    "hash": "hash",
    "Memory": "memory",
    "Memory+": "plus",
    "Memory+" + TWICE: "plus-long",
}
# Kind -> title of its model in steps.json, or in text_steps.json
TEXT_STEP_OF = {f"text-{text}-{name}": title.removesuffix(TWICE)
                for text in TEXTS for title, name in TEXT.items()}
STEP_OF = {kind: title for title, kind in (MAIN | DENSE | EXPERTS).items()}
STEP_OF |= {kind: f"Memory, {slots} slots" for slots, kind in SLOTS.items()}
STEP_OF |= {
    "facts-memory": "Memory",
    "facts-dense-long": "dense",
    "adamw-k8": "Memory, K = 8",
}
# Runs whose scripts are gone: the beginning of their names. The scripts are in the commit e935677,
# those of the last two in 0bece65.
RETIRED = ("facts-2ranks-", "deep-", "balance-", "variant-", "facts-bf16-", "facts-plus-6.4e-1-",
           "tune-ultramem-end-", "adam0-", "lazy-")
# The learning rates: of all, of a table, of experts
RATES = ("learning_rate", "value_lr", "expert_lr")


# ---- the files

def read(name):
    """runs/results/NAME.json -> dict."""
    return json.loads((FOLDER / f"{name}.json").read_text("utf-8"))


def collect(out=ROOT / "out"):
    """Copy the results of the runs in `out` into runs/results/. Returns the names of the runs.

    A run that is not finished has no result.json yet and is left out.
    """
    sources = [
        ("facts", "*/result.json", read_result),
        ("teach", "teach-*/edit.json", read_lesson),
    ]
    names = set()
    for name, pattern, read_run in sources:
        results = read(name)
        for path in sorted(out.glob(pattern)):
            run = path.parent
            with reading(run, "move this folder out of out/"):
                results[run.name] = read_run(run)
            names.add(run.name)
        (FOLDER / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    return sorted(names)


def read_result(run):
    """What train.py found, with some of the settings."""
    result = json.loads((run / "result.json").read_text("utf-8"))
    settings = json.loads((run / "config.json").read_text("utf-8"))["settings"]
    for key in ("vocab_size", "block_size", "max_steps", *RATES):
        result[key] = settings[key]
    result["val_loss"]  # KeyError if this is no result
    return result


def read_lesson(run):
    """What sample.py --teach did."""
    lesson = json.loads((run / "edit.json").read_text("utf-8"))["teach"]
    lesson["after"]  # KeyError if nothing was taught
    return lesson


# ---- the numbers of a kind

def seeds(runs, kind):
    """The results of all seeds of a kind."""
    of_kind = re.compile(re.escape(kind) + r"-\d")  # one digit: facts-memory-1337 is left out
    found = [runs[name] for name in sorted(runs) if of_kind.fullmatch(name)]
    if len(found) < 2:
        raise ValueError(f"runs/results/ has {len(found)} run(s) named {kind}-SEED, but a spread "
                         f"needs two: run the others, then --collect")
    return found


def values(runs, kind, key):
    """One number of each seed."""
    return [result[key] for result in seeds(runs, kind)]


def mean(runs, kind, key):
    return statistics.mean(values(runs, kind, key))


def spread(numbers, digits):
    """mean ± standard deviation, as text"""
    return f"{statistics.mean(numbers):.{digits}f} ± {statistics.stdev(numbers):.{digits}f}"


def recall_at(result, times):
    """The recall of the row of facts that were read `times` times or a little more."""
    for row in result["recall_by_exposures"]:
        if row["from"] == times:
            return row["recall"]
    raise KeyError(times)


def share_lost(lesson):
    """The share of the old facts known before that are answered wrongly afterwards."""
    return 1 - lesson["after"][2] / lesson["before"][2]


# ---- training time, relative to the dense model of the same study
#
# It comes from steps that were timed in turn, because the speed of a machine changes between runs.

def dense_of(kind):
    """The dense kind of the same study."""
    if kind not in TEXT_STEP_OF:
        return "facts-dense"
    text = kind.split("-")[1]
    return f"text-{text}-dense"


def training_time(runs, kind):
    """How many times as long as the dense model of its study a kind trains."""
    steps, titles = ("text_steps", TEXT_STEP_OF) if kind in TEXT_STEP_OF else ("steps", STEP_OF)
    step = read(steps)[titles[kind]]["ratio"][1]
    return step * mean(runs, kind, "max_steps") / mean(runs, dense_of(kind), "max_steps")


def dense_for_as_long(runs, kind, time):
    """About the loss of dense on the text of a kind if it trained `time` times as long, 1 to 2.

    Interpolated between its runs of once and of twice the steps, over the logarithm of the time.
    """
    once = mean(runs, dense_of(kind), "val_loss")
    twice = mean(runs, f"{dense_of(kind)}-long", "val_loss")
    return once + (twice - once) * math.log2(time)
