"""The results of the runs, for report.py and pictures.py: the files in assets/.

    facts.json    the result.json of each run, under the name of its folder
    teach.json    what runs/teach.sh found
    usage.json    how the runs of runs/balance.sh with seed 1 read their tables over training
    steps.json    how long a step of each kind takes: python tests/time_steps.py --study --json ...
    text_steps.json    the same for the models of runs/text.sh

Runs that differ by their seed alone have names that end in -1, -2, -3 and so on. They are one kind
of run here: a number is their mean, and what follows ± is their standard deviation.
"""
import json
import math
import re
import statistics
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from prepare_data import reading

FACTS = ROOT / "assets" / "facts.json"
STEPS = ROOT / "assets" / "steps.json"
TEXT_STEPS = ROOT / "assets" / "text_steps.json"
TEACH = ROOT / "assets" / "teach.json"
USAGE = ROOT / "assets" / "usage.json"
OUT = ROOT / "out"

# The kinds of runs/baselines.sh. Their titles are those of assets/steps.json, but for STEP_OF.
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
# The kinds of runs/slots.sh and runs/scaling.sh: tables of several sizes, dense models of several
# widths, and mixtures of experts with as many weights as a table.
SLOTS = {
    "1,024": "facts-n32",
    "4,096": "facts-n64",
    "16,384": "facts-memory",
    "65,536": "facts-n256",
    "262,144": "facts-n512",
}
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
# The kinds of runs/deep.sh, and those of which it has seed 1 alone.
DEEP = {
    "dense, 8 blocks": "deep-dense",
    "Memory, one layer of 8": "deep-memory",
    "Memory, three layers of 8": "deep-three",
    "Memory+, three layers of 8": "deep-plus",
}
DEEP_PARTS = {
    "Memory+ with a gate that starts open": "deep-open",
    "Memory+ without the gate": "deep-norm",
    "Memory+ without the norm": "deep-gate",
}
# The settings that runs/tune.sh tunes.
RATES = ("learning_rate", "value_lr", "expert_lr")
# Where assets/steps.json has another title for the same step.
STEP_OF = {"dense, equal time": "dense", "16,384": "Memory"}
STEP_OF |= {slots: f"Memory, {slots} slots" for slots in SLOTS if slots not in STEP_OF}
# What runs/names.sh varies: the beginning of the names of its runs, and an example.
NAMES = {
    "facts": "Rasia Westshaw (the default)",
    "apart": "Rasia of house Westshaw",
    "single": "RasiaWestshaw",
}
# The kinds of runs/own_facts.sh, each on a corpus with a token for each word and one with bytes.
OWN = {"dense": "dense", "MoE": "moe", "hash": "hash", "Memory": "memory"}
# Dense with words at half its rate, seeds 1 to 3.
HALF_RATE = ("tune-own-words-dense-6e-3", "own-words-dense-6e-3-2", "own-words-dense-6e-3-3")
# The kinds of runs/text.sh, each on two texts.
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
# What runs/teach.sh teaches with: the beginning of the names of its folders, and the title.
TAUGHT = {
    "slots-512": "the values of 512 slots",
    "slots-1024": "the values of 1,024 slots",
    "slots-2048": "the values of 2,048 slots",
    "slots-4096": "the values of 4,096 slots",
    "slots-8192": "the values of 8,192 slots",
    "all-values-3": "all values, rate 3",
    "all-values-10": "all values, rate 10",
    "full-3e-5": "the whole model, rate 3e-5",
    "full-1e-4": "the whole model, rate 1e-4",
    "full-3e-4": "the whole model, rate 3e-4",
}
# The runs of runs/balance.sh, by the weight of the loss against uneven use.
BALANCE = {
    "0": [f"facts-n512-{seed}" for seed in (1, 2, 3)],
    "0.01": [f"balance-1e-2-{seed}" for seed in (1, 2, 3)],
    "0.1": ["balance-1e-1-1"],
}
# The flags of each run of runs/variants.sh and of the runs it is compared with, all with --seed 1.
VARIANTS = {
    "the default": "facts-memory-1",
    "`--mem-heads 2 --mem-topk 64`": "variant-h2-k64",
    "`--mem-heads 2`": "variant-h2",
    "`--mem-topk 8`": "facts-k8-1",
    "`--mem-layers 1,2 --mem-topk 16` (two layers, one table)": "variant-two-layers",
    "`--mem-gate`": "variant-gate",
    "`--qk-norm`": "variant-qknorm",
    "`--mem-gate --qk-norm` (Memory+)": "tune-plus-3e-3-1.6e-1",
}
# Title: its name in the runs, and which rate is tuned beside that of the whole.
TUNED = {
    "dense, 0.6 x FLOPs": ("dense48", None),
    "dense": ("dense", None),
    "dense, 2 x FLOPs": ("dense2", None),
    "dense, 4 x FLOPs": ("dense4", None),
    "dense, 8 x FLOPs": ("dense208", None),
    "MoE": ("moe", "expert_lr"),
    "hash": ("hash", "value_lr"),
    "PEER": ("peer", "value_lr"),
    "UltraMem": ("ultramem", "value_lr"),
    "Memory": ("memory", "value_lr"),
    "Memory+": ("plus", "value_lr"),
}


# ---- the files

def read_assets(path):
    """One of the files in assets/: name of a folder in out/, or title of a model -> a result."""
    with reading(path, "take it from the repository again"):
        found = json.loads(path.read_text("utf-8"))
        found.items()  # AttributeError if it is no dict
    return found


def load():
    """The result of every run."""
    return read_assets(FACTS)


def teaching():
    """What was taught in each folder of runs/teach.sh, and what was lost."""
    return read_assets(TEACH)


def usage():
    """How the runs of runs/balance.sh with seed 1 read their tables over training."""
    return read_assets(USAGE)


def result_of(folder):
    """The result of a finished run, with some of its settings."""
    result = json.loads((folder / "result.json").read_text("utf-8"))
    settings = json.loads((folder / "config.json").read_text("utf-8"))["settings"]
    for key in ("vocab_size", "block_size", "max_steps", *RATES):
        result[key] = settings[key]
    result["val_loss"]  # KeyError if this is no result
    return result


def lesson_of(folder):
    """What sample.py --teach did."""
    lesson = json.loads((folder / "edit.json").read_text("utf-8"))["teach"]
    lesson["after"]  # KeyError if nothing was taught
    return lesson


def usage_of(folder):
    """How a finished run reads its table: a step, now and then, and many windows at the end."""
    lines = (folder / "log.jsonl").read_text("utf-8").splitlines()
    log = [json.loads(line) for line in lines]
    with np.load(folder / "reads.npz") as reads:
        readers = reads["readers_0"]
        windows = int(reads["windows"])
    return dict(steps=[line["step"] for line in log],
                usage=[line["memory_usage"] for line in log],
                kl=[line["memory_kl"] for line in log],
                windows=windows,
                read_by_windows=float((readers > 0).mean()))


def collect(out=OUT):
    """Put what the folders in `out` hold into assets/. Returns their names.

    Of those that are not finished yet nothing is taken.
    """
    kinds = [("*/result.json", FACTS, result_of), ("teach-*/edit.json", TEACH, lesson_of),
             ("facts-n512-1/result.json", USAGE, usage_of),
             ("balance-*-1/result.json", USAGE, usage_of)]
    names = []
    for pattern, file, read in kinds:
        folders = sorted(path.parent for path in out.glob(pattern))
        found = read_assets(file)
        for folder in folders:
            with reading(folder, "move this folder out of out/"):
                found[folder.name] = read(folder)
        write(found, file)
        names += [folder.name for folder in folders]
    return sorted(set(names))


def write(found, path):
    """As JSON. The file is renamed when it is whole, so that a full disk harms nothing."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    part.replace(path)


# ---- their numbers

def seeds(runs, kind):
    """The results of one kind of run: those of its seeds."""
    of_kind = re.compile(re.escape(kind) + r"-\d")  # one digit, so not facts-memory-1337
    found = [runs[name] for name in sorted(runs) if of_kind.fullmatch(name)]
    if len(found) < 2:
        raise ValueError(f"there are {len(found)} run(s) named {kind}-SEED in assets/, "
                         f"a mean and its spread take at least 2: run the others, then --collect")
    return found


def values(runs, kind, key, factor=1):
    """One number of each seed of a kind of run."""
    return [factor * result[key] for result in seeds(runs, kind)]


def spread(numbers, digits):
    """mean ± standard deviation"""
    return f"{statistics.mean(numbers):.{digits}f} ± {statistics.stdev(numbers):.{digits}f}"


def recall_at(result, times):
    """The recall of the facts that were read `times` times or a little more: of that row."""
    for row in result["recall_by_exposures"]:
        if row["from"] == times:
            return row["recall"]
    raise KeyError(times)


def recall(runs, kind):
    return statistics.mean(values(runs, kind, "recall"))


def times(runs, kind, other):
    """How many times as many facts one kind recalls as another, as text."""
    return f"{recall(runs, kind) / recall(runs, other):.1f} times"


def times_as_long(runs, title, kind, dense, steps):
    """How many times as long as the kind `dense` this kind trains.

    From steps that were timed in turn, since the speed of a machine changes between whole runs.
    title: of the kind in the file `steps`.
    """
    median = read_assets(steps)[title]["ratio"][1]
    longer = seeds(runs, kind)[0]["max_steps"] / seeds(runs, dense)[0]["max_steps"]
    return median * longer


def training_time(runs, title, kind):
    """How many times as long as the dense model of 5,000 steps this kind trains, as text.

    title: of the kind in a table here, or in assets/steps.json.
    """
    return f"{times_as_long(runs, STEP_OF.get(title, title), kind, 'facts-dense', STEPS):.2f}"


def text_time(runs, text, title):
    """How many times as long as dense a kind of runs/text.sh trains. title: of TEXT."""
    return times_as_long(runs, title.removesuffix(TWICE), f"text-{text}-{TEXT[title]}",
                         f"text-{text}-dense", TEXT_STEPS)


def text_loss(runs, text, title):
    """The mean validation loss of a kind of TEXT on one of TEXTS."""
    return statistics.mean(values(runs, f"text-{text}-{TEXT[title]}", "val_loss"))


def dense_for_as_long(runs, text, time):
    """About the mean loss of dense if it trained `time` times as long, from 1 to 2.

    Interpolated between its runs of once and of twice the steps, over the logarithm of the time.
    """
    once = text_loss(runs, text, "dense")
    twice = text_loss(runs, text, "dense" + TWICE)
    return once + (twice - once) * math.log2(time)


def share_lost(edit):
    """Of the old facts that were known, how many are not known any more, in [0, 1]."""
    return 1 - edit["after"][2] / edit["before"][2]


# ---- curves through sizes

def log_odds(p):
    """Of a share between 0 and 1, both left out: there it is infinite."""
    return np.log(p / (1 - p))


def fit(sizes, columns):
    """A straight line for the log-odds of recall over log2 of the size -> (slope, intercept).

    sizes: one for each point. columns: the recall of each point's seeds. Least squares.
    """
    x = np.repeat(np.log2(sizes), [len(column) for column in columns])
    return np.polyfit(x, log_odds(np.concatenate(columns)), 1)


def predicted(line, sizes):
    """What a line of fit() says is recalled at these sizes."""
    return 1 / (1 + np.exp(-np.polyval(line, np.log2(sizes))))


def fit_band(sizes, columns, at, draws=400):
    """Where 90% of the curves lie that are fitted to seeds drawn anew, with replacement."""
    rng = np.random.default_rng(0)
    lines = [fit(sizes, [rng.choice(column, len(column)) for column in columns])
             for _ in range(draws)]
    return np.percentile([predicted(line, at) for line in lines], [5, 95], axis=0)


def by_size(runs, kinds, size, key="recall"):
    """The size of each kind, and one number of its seeds. size: a function of a result."""
    sizes = [size(seeds(runs, kind)[0]) for kind in kinds]
    return sizes, [values(runs, kind, key) for kind in kinds]


def total_parameters(result):
    return result["params"]["total"]


def flops(result):
    return result["flops_per_token"]
