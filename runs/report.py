"""Every table, number and picture of recall in README.md and docs/, from assets/facts.json.

    python runs/report.py              # write the tables into the documents, draw the pictures
    python runs/report.py --collect    # first copy the result of every finished run in out/

A table stands in a document between two comments, and is replaced as a whole:

    <!-- report: main_table -->
    <!-- report: end -->

assets/facts.json holds the result.json of each run, under the name of its folder. Runs that differ
by their seed alone have names that end in -1, -2, -3 and so on. They are one kind of run here: a
number is their mean, and what follows ± is their standard deviation. assets/teach.json holds what
runs/teach.sh found. assets/steps.json holds how long a step of each kind takes, from `python
tests/time_steps.py --study --json assets/steps.json`.
"""
import argparse
import json
import re
import statistics
import sys
import textwrap
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from prepare_data import reading, steady_output

FACTS = ROOT / "assets" / "facts.json"
STEPS = ROOT / "assets" / "steps.json"
TEACH = ROOT / "assets" / "teach.json"
OUT = ROOT / "out"

# The kinds of runs/baselines.sh, as they are named in assets/steps.json.
MAIN = {
    "dense": "facts-dense",
    "dense, equal time": "facts-dense-long",
    "dense, 2 x FLOPs": "facts-dense2",
    "dense, 4 x FLOPs": "facts-dense4",
    "MoE": "facts-moe",
    "hash": "facts-hash",
    "PEER": "facts-peer",
    "Memory": "facts-memory",
    "Memory+": "facts-plus",
    "Memory, 65,536 slots": "facts-n256",
}
# The kinds of runs/slots.sh: tables of several sizes, and dense models of several widths.
SLOTS = {
    "1,024": "facts-n32",
    "4,096": "facts-n64",
    "16,384": "facts-memory",
    "65,536": "facts-n256",
    "262,144": "facts-n512",
}
DENSE = {
    "dense": "facts-dense",
    "dense, 2 x FLOPs": "facts-dense2",
    "dense, 4 x FLOPs": "facts-dense4",
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
    "dense": ("dense", None),
    "dense, 2 x FLOPs": ("dense2", None),
    "dense, 4 x FLOPs": ("dense4", None),
    "MoE": ("moe", "expert_lr"),
    "hash": ("hash", "value_lr"),
    "PEER": ("peer", "value_lr"),
    "UltraMem": ("ultramem", "value_lr"),
    "Memory": ("memory", "value_lr"),
    "Memory+": ("plus", "value_lr"),
}


# ---- the runs

def load():
    """assets/facts.json: name of a run -> its result."""
    with reading(FACTS, "take it from the repository again"):
        runs = json.loads(FACTS.read_text("utf-8"))
        runs.items()  # AttributeError if it is no dict
    return runs


def collect(out=OUT):
    """Put the results of the finished runs in `out` into assets/facts.json. Returns their names."""
    runs = load()
    names = []
    for path in sorted(out.glob("*/result.json")):
        with reading(path.parent, "move this folder out of out/"):
            result = json.loads(path.read_text("utf-8"))
            settings = json.loads((path.parent / "config.json").read_text("utf-8"))["settings"]
            for key in ("vocab_size", "block_size", "max_steps", *RATES):
                result[key] = settings[key]
            result["recall"]  # KeyError if this is no result on the facts
        runs[path.parent.name] = result
        names.append(path.parent.name)
    write(runs, FACTS)
    return names


def collect_teaching(out=OUT):
    """Put what runs/teach.sh found in `out` into assets/teach.json. Returns the folders' names."""
    found = {}
    if TEACH.exists():
        found = json.loads(TEACH.read_text("utf-8"))
    names = []
    for path in sorted(out.glob("teach-*/edit.json")):
        with reading(path.parent, "move this folder out of out/"):
            edit = json.loads(path.read_text("utf-8"))["teach"]
            edit["after"]  # KeyError if nothing was taught
        found[path.parent.name] = edit
        names.append(path.parent.name)
    write(found, TEACH)
    return names


def write(found, path):
    """As JSON. The file is renamed when it is whole, so that a full disk harms nothing."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    part.replace(path)


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


# ---- tables

def markdown(head, rows):
    """A Markdown table. head: titles; rows: lists of as many cells."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def training_time(runs, title, kind):
    """How many times as long as the dense model of 5,000 steps this kind trains.

    From steps that were timed in turn, since the speed of a machine changes between whole runs.
    title: of the kind in a table here, or in assets/steps.json.
    """
    steps = json.loads(STEPS.read_text("utf-8"))
    median = steps[STEP_OF.get(title, title)]["ratio"][1]
    longer = seeds(runs, kind)[0]["max_steps"] / seeds(runs, "facts-dense")[0]["max_steps"]
    return f"{median * longer:.2f}"


def short_table(runs):
    """The table on the first screen of README.md."""
    rows = []
    for title, kind in MAIN.items():
        if title == "Memory+":
            continue
        first = seeds(runs, kind)[0]
        rows.append([
            title,
            spread(values(runs, kind, "recall"), 3),
            f"{first['flops_per_token'] / 1e6:.2f} M",
            f"{first['params']['total'] / 1e6:.2f} M",
            training_time(runs, title, kind),
        ])
    head = ["", "facts recalled", "FLOPs per token", "parameters", "training time"]
    return markdown(head, rows)


def main_table(runs):
    head = ["", "seeds", "facts recalled", "unseen phrasing", "validation loss", "bits stored",
            "bits per parameter"]
    rows = []
    for title, kind in MAIN.items():
        rows.append([
            title,
            str(len(seeds(runs, kind))),
            spread(values(runs, kind, "recall"), 3),
            spread(values(runs, kind, "recall_unseen_phrasing"), 3),
            spread(values(runs, kind, "val_loss"), 3),
            spread(values(runs, kind, "bits_stored"), 0),
            spread(values(runs, kind, "bits_per_param"), 3),
        ])
    return markdown(head, rows)


def cost_table(runs):
    """What each kind costs: tokens, FLOPs, parameters, time and memory."""
    head = ["", "tokens", "FLOPs per token", "parameters (active)", "training time",
            "peak memory of the process, MiB", "slots used", "KL"]
    rows = []
    for title, kind in MAIN.items():
        first = seeds(runs, kind)[0]
        used = ["", ""]
        if first["memory_usage"] is not None:
            share = statistics.mean(values(runs, kind, "memory_usage"))
            used = [f"{share:.0%}", spread(values(runs, kind, "memory_kl"), 2)]
        rows.append([
            title,
            f"{first['tokens'] / 1e6:.2f} M",
            f"{first['flops_per_token']:,}",
            f"{first['params']['total']:,} ({first['params']['active']:,})",
            training_time(runs, title, kind),
            spread(values(runs, kind, "peak_memory_bytes", 2**-20), 0),
            *used,
        ])
    return markdown(head, rows)


def exposures_table(runs):
    """Recall by how often a fact was read."""
    times = {"1": 1, "2-3": 2, "4-7": 4, "8-15": 8, "16-31": 16, "32-63": 32, "64-127": 64}
    rows = []
    for title, kind in MAIN.items():
        row = [title]
        for low in times.values():
            row.append(spread([recall_at(result, low) for result in seeds(runs, kind)], 2))
        row.append(spread(values(runs, kind, "recall_control"), 3))
        rows.append(row)
    return markdown(["times read", *times, "never (control)"], rows)


def slots_table(runs):
    head = ["slots", "parameters", "FLOPs per token", "facts recalled", "unseen phrasing",
            "validation loss", "bits per parameter", "slots used", "training time"]
    rows = []
    for title, kind in (SLOTS | DENSE).items():
        first = seeds(runs, kind)[0]
        used = ""
        if title in SLOTS:
            used = f"{statistics.mean(values(runs, kind, 'memory_usage')):.0%}"
        rows.append([
            title,
            f"{first['params']['total']:,}",
            f"{first['flops_per_token']:,}",
            spread(values(runs, kind, "recall"), 3),
            spread(values(runs, kind, "recall_unseen_phrasing"), 3),
            spread(values(runs, kind, "val_loss"), 3),
            spread(values(runs, kind, "bits_per_param"), 3),
            used,
            training_time(runs, title, kind),
        ])
    return markdown(head, rows)


def reads_table(runs):
    kinds = {"32 (the default)": ("Memory", "facts-memory"), "8": ("Memory, K = 8", "facts-k8")}
    rows = []
    for title, (step, kind) in kinds.items():
        rows.append([title, f"{seeds(runs, kind)[0]['flops_per_token']:,}",
                     spread(values(runs, kind, "recall"), 3), training_time(runs, step, kind)])
    return markdown(["`--mem-topk`", "FLOPs per token", "facts recalled", "training time"], rows)


def variants_table(runs):
    """Runs of one seed, beside the same seed of the kinds that they vary."""
    head = ["`python train.py --seed 1 --out-dir out/NAME` with", "NAME", "facts recalled"]
    rows = [[flags, f"`{name}`", f"{runs[name]['recall']:.3f}"]
            for flags, name in VARIANTS.items()]
    return markdown(head, rows)


def names_table(runs):
    """Recall on the corpora that name their people in another way."""
    rows = []
    for names, example in NAMES.items():
        row = [example]
        for kind in ("dense", "memory", "hash"):
            name = f"{names}-{kind}"
            row.append(spread(values(runs, name, "recall"), 3))
        rows.append(row)
    return markdown(["people are named", "dense", "Memory", "hash"], rows)


def own_table(runs):
    """Recall of facts of the real world, with words and with bytes as tokens."""
    head = ["tokens", "", "facts recalled", "read 4-7 times", "16-31", "64-127",
            "never (control)", "validation loss", "FLOPs per token", "parameters"]
    rows = []
    for tokens in ("words", "bytes"):
        for title, kind in OWN.items():
            name = f"own-{tokens}-{kind}"
            results = seeds(runs, name)
            row = [tokens, title, spread(values(runs, name, "recall"), 3)]
            for times_read in (4, 16, 64):
                row.append(spread([recall_at(result, times_read) for result in results], 2))
            row.append(spread(values(runs, name, "recall_control"), 3))
            row.append(spread(values(runs, name, "val_loss"), 3))
            row.append(f"{flops(results[0]) / 1e6:.2f} M")
            row.append(f"{total_parameters(results[0]) / 1e6:.2f} M")
            rows.append(row)
    return markdown(head, rows)


def own_tuning_table(runs):
    """The rates that were tried on these facts, on seed 1."""
    rows = []
    for tokens in ("words", "bytes"):
        for title, kind in OWN.items():
            second = TUNED[title][1]
            tried = tuned(runs, f"own-{tokens}-{kind}")
            rows += [[tokens, *row] for row in rates_and_results(title, second, tried)]
    return markdown(["tokens", *TUNING_HEAD], rows)


def teach_table(runs):
    """What 100 new facts cost in old ones, for each way to teach them."""
    head = ["what learns", "new facts learnt", "in the unseen phrasing", "old facts before",
            "after", "share lost", "slots changed", "steps"]
    taught = teaching()
    rows = []
    for name, title in TAUGHT.items():
        edits = seeds(taught, f"teach-{name}")
        row = [title]
        # Of each: new facts, new facts in the unseen phrasing, old facts.
        for when, i in (("after", 0), ("after", 1), ("before", 2), ("after", 2)):
            row.append(spread([edit[when][i] for edit in edits], 3))
        row.append(spread([share_lost(edit) for edit in edits], 3))
        changed = [sum(edit["changed"]) for edit in edits]  # over the tables of the model
        row.append(f"{statistics.mean(changed):,.0f}")
        row.append(f"{statistics.mean(edit['steps'] for edit in edits):.0f}")
        rows.append(row)
    return markdown(head, rows)


def teaching():
    """assets/teach.json: name of a folder -> what was taught in it, and what was lost."""
    with reading(TEACH, "take it from the repository again"):
        return json.loads(TEACH.read_text("utf-8"))


def share_lost(edit):
    """Of the old facts that were known, how many are not known any more, in [0, 1]."""
    return 1 - edit["after"][2] / edit["before"][2]


TUNING_HEAD = ["", "rate", "of the table or experts", "validation loss", "facts recalled"]


def tuned(runs, kind):
    """Seed 1 of a kind of the study, and the runs that differ from it in their rates alone."""
    in_study = runs[f"{kind}-1"]
    name = kind.removeprefix("facts-")
    tried = [run for other, run in runs.items() if re.match(rf"tune-{name}-\d", other)]
    expect(all(in_study["val_loss"] < run["val_loss"] for run in tried),
           f"the study uses the best rates of {kind}")
    return sorted([in_study, *tried], key=lambda run: [run[rate] for rate in RATES])


def rates_and_results(title, second, tried):
    """A row of a table for each run, with the best loss in bold. second: a rate's name, or None."""
    best = min(run["val_loss"] for run in tried)
    rows = []
    for run in tried:
        loss = f"{run['val_loss']:.4f}"
        if run["val_loss"] == best:
            loss = f"**{loss}**"
        other = ""
        if second:
            other = f"{run[second]:g}"
        rows.append([title, f"{run['learning_rate']:g}", other, loss, f"{run['recall']:.3f}"])
    return rows


def tuning_table(runs):
    """Every run of one seed that only differs in its rates from a kind of the study."""
    rows = []
    for title, (kind, second) in TUNED.items():
        rows += rates_and_results(title, second, tuned(runs, f"facts-{kind}"))
    return markdown(TUNING_HEAD, rows)


def bfloat16_table(runs):
    kinds = {"float32": ("Memory+", "facts-plus-6.4e-1"),
             "bfloat16": ("Memory+, bfloat16", "facts-bf16")}
    rows = [[title, spread(values(runs, kind, "recall"), 3),
             spread(values(runs, kind, "val_loss"), 3), training_time(runs, step, kind)]
            for title, (step, kind) in kinds.items()]
    return markdown(["table held in", "facts recalled", "validation loss", "training time"], rows)


def ranks_table(runs):
    rows = []
    for title, kind in (("one process", "facts-memory"), ("two processes", "facts-2ranks")):
        results = seeds(runs, kind)[:3]  # seeds 1 to 3: Memory has more
        rows.append([title, spread([result["recall"] for result in results], 3),
                     spread([result["val_loss"] for result in results], 3)])
    return markdown(["", "facts recalled", "validation loss"], rows)


def steps_table(runs):
    """What a step takes, of all models of docs/results.md."""
    steps = json.loads(STEPS.read_text("utf-8"))
    rows = []
    for title, row in steps.items():
        low, middle, high = row["ratio"]
        rows.append([title, f"{row['ms'][1]:.1f}", f"{middle:.2f}", f"{low:.2f} to {high:.2f}"])
    return markdown(["", "ms a step", "times dense", "quartiles"], rows)


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


# ---- sentences

def paragraphs(*texts):
    """Texts as paragraphs, or as the points of a list, with lines of at most 100 characters."""
    return "\n\n".join(textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)
                       for text in texts)


def points(*texts):
    lines = [textwrap.fill(text, 100, initial_indent="- ", subsequent_indent="  ",
                           break_long_words=False, break_on_hyphens=False) for text in texts]
    return "\n".join(lines)


def listed(texts):
    """Two texts or more -> "a, b and c"."""
    return ", ".join(texts[:-1]) + f" and {texts[-1]}"


def recall(runs, kind):
    return statistics.mean(values(runs, kind, "recall"))


def times(runs, kind, other):
    """How many times as many facts one kind recalls as another, as text."""
    return f"{recall(runs, kind) / recall(runs, other):.1f} times"


def expect(holds, claim):
    """A sentence is only written while it is true."""
    if not holds:
        raise ValueError(f"this no longer holds, so its sentence must be written anew: {claim}")


def main_text(runs):
    memory, dense = "facts-memory", "facts-dense"
    order = ["facts-hash", memory, "facts-peer", "facts-moe", dense]
    expect(all(recall(runs, a) > recall(runs, b) for a, b in zip(order, order[1:])),
           "hash, Memory, PEER, MoE, dense is the order of recall")
    expect(recall(runs, "facts-n256") > recall(runs, "facts-dense4"),
           "65,536 slots recall more than dense with 4 times the FLOPs")
    once = spread([recall_at(result, 1) for result in seeds(runs, memory)], 2)
    return points(
        f"**At equal tokens, FLOPs and parameters** the hash recalls the most, then Memory, PEER "
        f"and MoE: {times(runs, 'facts-hash', dense)}, {times(runs, memory, dense)}, "
        f"{times(runs, 'facts-peer', dense)} and {times(runs, 'facts-moe', dense)} as many facts "
        f"as dense. Why the hash is ahead here, and when it is not, is shown "
        f"[below](#how-people-are-named).",
        f"**At equal time** Memory recalls {times(runs, memory, 'facts-dense-long')} as many facts "
        f"as dense. MoE and PEER take longer than Memory, the hash takes less.",
        f"**Against larger dense models**: Memory recalls "
        f"{times(runs, memory, 'facts-dense2')} as many facts as dense with twice the FLOPs, and "
        f"{times(runs, memory, 'facts-dense4')} as many as dense with four times the FLOPs. With "
        f"65,536 slots it is {times(runs, 'facts-n256', 'facts-dense2')} and "
        f"{times(runs, 'facts-n256', 'facts-dense4')}.",
        f"**The difference is in the long tail.** Facts that were read 64 times are known to all "
        f"models. Of the facts that were read once all know few (Memory {once}).",
        f"**A parameter of a memory model holds little**: "
        f"{spread(values(runs, memory, 'bits_per_param'), 3)} bits. In the dense model of the same "
        f"width it is {spread(values(runs, dense, 'bits_per_param'), 3)}, in the one of four times "
        f"the FLOPs {spread(values(runs, 'facts-dense4', 'bits_per_param'), 3)}.")


def readme_text(runs):
    memory, dense = "facts-memory", "facts-dense"
    larger = recall(runs, "facts-dense4") / recall(runs, dense)
    expect(larger < recall(runs, memory) / recall(runs, dense), "Memory beats 4 times the FLOPs")
    expect(recall(runs, "facts-hash") > recall(runs, memory) > recall(runs, "facts-peer")
           > recall(runs, "facts-moe"), "hash, Memory, PEER, MoE is the order of recall")
    return paragraphs(
        f"The memory model recalls {times(runs, memory, dense)} as many facts as the dense model. "
        f"If the dense model may train for as long, this falls to "
        f"{times(runs, memory, 'facts-dense-long')}. A dense model of four times the FLOPs recalls "
        f"{larger:.1f} times as many. Of the rivals, a mixture of experts recalls "
        f"{times(runs, 'facts-moe', dense)} as many, PEER {times(runs, 'facts-peer', dense)}, and "
        f"the hash {times(runs, 'facts-hash', dense)}. The gain is in the long tail: all models "
        f"know the facts that were read 64 times, and hardly any of those that were read once.")


def choosing_text(runs):
    facts = 40_000  # of the default corpus
    per_100 = [f"{100 * int(slots.replace(',', '')) / facts:.0f}" for slots in SLOTS]
    recalls = [f"{recall(runs, kind):.2f}" for kind in SLOTS.values()]
    real = [runs[f"own-{tokens}-memory-1"] for tokens in ("words", "bytes")]
    factors = [result["value_lr"] / result["learning_rate"] for result in real]
    memory = runs["facts-memory-1"]
    plus = runs["facts-plus-1"]
    expect(all(recall(runs, f"{corpus}-hash") > recall(runs, f"{corpus}-memory")
               for corpus in ("facts", "single", "own-words", "own-bytes")), "the hash is ahead")
    return points(
        "**Is it worth it?** If the model is to know facts about many things, and the tokens that "
        "name them are shared, yes. If each thing has a token of its own, a memory layer adds "
        "little ([names](#how-people-are-named), [real facts](#facts-of-the-real-world)). Try the "
        "hash as well: it recalled more than Memory, and took less time, in every comparison but "
        "one, that of names whose parts stand apart.",
        f"**How many slots?** As many as memory and time allow ([more slots](#more-slots)). With "
        f"{listed(per_100)} slots per 100 facts, recall is {listed(recalls)}.",
        f"**How many reads?** The default, 4 heads of 32 reads. With 8 reads instead of 32, recall "
        f"falls from {recall(runs, 'facts-memory'):.2f} to {recall(runs, 'facts-k8'):.2f}, and "
        f"training takes {training_time(runs, 'Memory, K = 8', 'facts-k8')} times as long as "
        f"dense, not {training_time(runs, 'Memory', 'facts-memory')} times. On seed 1, two heads "
        f"of 64 recall {runs['variant-h2-k64']['recall']:.2f}, and four of 32 "
        f"{memory['recall']:.2f}.",
        f"**Which rates?** Take the rate that suits the dense model. Then give the table "
        f"{memory['value_lr'] / memory['learning_rate']:.0f} times that. Try a quarter of it and "
        f"four times as much, too, and go on from the best ([tuning](#tuning)). The best factor "
        f"differs: on real facts it was {factors[0]:.0f} with words and {factors[1]:.0f} with "
        f"bytes, for Memory+ {plus['value_lr'] / plus['learning_rate']:,.0f}.",
        f"**How many layers?** One, in the middle block of three. Two that share the table recall "
        f"{runs['variant-two-layers']['recall']:.2f} with as many reads (one seed, not tuned).",
        "**Gate and norm (Memory+)?** Not in so small a model. The paper finds them better in "
        "models from 134 M parameters.",
        "**Not tried**: learning at widths above 64 and with more than three blocks, ordinary "
        "text, rates for each table size, a GPU.")


def names_text(runs):
    apart = {kind: recall(runs, f"apart-{kind}") for kind in ("dense", "memory", "hash")}
    expect(apart["memory"] > apart["hash"], "with names apart Memory recalls more than the hash")
    single = {kind: recall(runs, f"single-{kind}") for kind in ("dense", "memory", "hash")}
    deviation = statistics.stdev(values(runs, "single-memory", "recall"))
    expect(abs(single["dense"] - single["memory"]) < deviation, "with single names dense is level")
    return points(
        f"**Names apart**: the hash falls to {apart['hash']:.3f}, Memory recalls "
        f"{apart['memory']:.3f}. A query is made from all that the model has understood so far, "
        f"wherever it stood.",
        f"**Single names**: dense recalls as much as Memory ({single['dense']:.3f} and "
        f"{single['memory']:.3f}, within the spread), the hash {single['hash']:.3f}. Each person "
        f"has an embedding of their own here, which can hold what is known about them: 8,000 "
        f"people with 64 numbers each are half as many parameters as the table has.")


def own_text(runs):
    all_facts = {tokens: {kind: recall(runs, f"own-{tokens}-{kind}") for kind in OWN.values()}
                 for tokens in ("words", "bytes")}
    words = all_facts["words"]
    in_bytes = all_facts["bytes"]
    often = {kind: statistics.mean(recall_at(result, 64)
                                   for result in seeds(runs, f"own-bytes-{kind}"))
             for kind in OWN.values()}
    guess = statistics.mean(statistics.mean(values(runs, f"own-bytes-{kind}", "recall_control"))
                            for kind in OWN.values())
    expect(abs(in_bytes["dense"] - guess) < 0.02, "with bytes dense recalls no more than a guess")
    expect(guess + 0.02 < min(in_bytes["memory"], in_bytes["moe"]), "Memory and MoE recall more")
    expect(in_bytes["hash"] > 2 * in_bytes["memory"], "with bytes the hash is far ahead")
    expect(words["dense"] > 0.85 * max(words.values()), "with words dense is not far behind")
    dense = seeds(runs, "own-words-dense")
    worst = min(result["recall"] for result in dense)
    expect(worst < 0.8, "one seed of dense with words does badly")
    half_rate = [runs[name] for name in HALF_RATE]
    steps = dense[0]["max_steps"]
    return points(
        f"**With bytes, dense learns only the most frequent facts in so short a run.** Of those "
        f"that were read 64 to 127 times it recalls {often['dense']:.2f}, Memory "
        f"{often['memory']:.2f} and MoE {often['moe']:.2f}. Over all facts dense recalls "
        f"{in_bytes['dense']:.2f}, as guessing does ({guess:.2f}), Memory "
        f"{in_bytes['memory']:.2f} and MoE {in_bytes['moe']:.2f}.",
        f"**The hash is far ahead with bytes** ({in_bytes['hash']:.2f}), although three bytes name "
        f"nobody. A likely reason, not tested: every group of letters has slots of its own from "
        f"the first step, and the next block puts the groups together. Memory has to learn its "
        f"queries first, and has {steps:,} steps for that.",
        f"**With words, dense is not far behind**: it recalls {words['dense']:.2f}, Memory "
        f"{words['memory']:.2f}, MoE {words['moe']:.2f} and the hash {words['hash']:.2f}. Its "
        f"seeds differ widely: one of them recalls {worst:.2f}. Half its rate, 6e-3, gives "
        f"{spread([result['recall'] for result in half_rate], 3)}, and a validation loss of "
        f"{spread([result['val_loss'] for result in half_rate], 3)}. The "
        f"{dense[0]['vocab_size']:,} words are mostly names, and each has an embedding of 64 "
        f"numbers. Together they are {dense[0]['params']['embedding'] / 1e6:.2f} M parameters, "
        f"half as many as the memory table has.",
        f"**A rule to take home.** How many of your subjects have a token that no other subject "
        f"has? `prepare_data.py` prints it. Here it is 84% with words and 0% with bytes. In the "
        f"invented corpus nobody has one, or everybody where a name is one word. Where most have "
        f"one, its embedding can hold the facts, and Memory adds little: it recalls "
        f"{words['memory']:.2f} instead of {words['dense']:.2f} here, and "
        f"{recall(runs, 'single-memory'):.2f} instead of {recall(runs, 'single-dense'):.2f} in the "
        f"invented corpus. Where none has one, Memory adds more, to facts that are read often "
        f"enough: {often['memory']:.2f} instead of {often['dense']:.2f} here (read 64 to 127 "
        f"times), and {recall(runs, 'facts-memory'):.2f} instead of "
        f"{recall(runs, 'facts-dense'):.2f} there. Its rivals gain from this, too. These are four "
        f"corpora, and they differ in more than this.")


def teach_text(runs):
    taught = teaching()
    lost = {name: [share_lost(edit) for edit in seeds(taught, f"teach-{name}")] for name in TAUGHT}
    mean = {name: statistics.mean(of_seeds) for name, of_seeds in lost.items()}
    expect(mean["all-values-3"] <= 1.2 * mean["slots-4096"],
           "all values lose as little as the best number of slots")
    expect(mean["slots-1024"] > 2 * mean["slots-4096"], "few slots lose more")
    few = statistics.mean(edit["after"][0] for edit in seeds(taught, "teach-slots-512"))
    return points(
        f"**The table learns at a small price.** With 4,096 slots {100 * mean['slots-4096']:.1f}% "
        f"of the old facts are lost, with the whole model {100 * mean['full-1e-4']:.0f}%. The "
        f"ratio is 1 to {mean['full-1e-4'] / mean['slots-4096']:.0f}, at the rate of 1e-4. (The "
        f"paper of the method finds 1 to 8, with other models and facts.) The unseen phrasing is "
        f"learnt, too.",
        f"**Choosing slots does not help here.** All values lose as little "
        f"({100 * mean['all-values-3']:.1f}%). What helps is to leave the rest of the model alone. "
        f"A likely reason: sentences about new people read their own part of the table anyway.",
        f"**Too few slots hurt.** 512 slots hold {100 * few:.0f} of the 100 facts. With 512 to "
        f"2,048, it takes more steps, and more of the old facts are lost.")


def tuning_text(runs):
    def tried(name):
        return f"{runs[name]['recall']:.3f}"

    memory = runs["facts-memory-1"]
    return points(
        f"**A table needs a rate many times that of the rest**: "
        f"{memory['value_lr'] / memory['learning_rate']:.0f} times for Memory. With 1e-2 it "
        f"recalls {tried('tune-memory-3e-3-1e-2')}, with 1.6e-1 {tried('facts-memory-1')}.",
        f"**Memory+ needs a higher one still.** With 1.6e-1 it recalls "
        f"{tried('tune-plus-3e-3-1.6e-1')}, with 2.56 (and 1.5e-3 for the rest) "
        f"{tried('facts-plus-1')}. A likely reason: the gate and W2 make what the table gives "
        f"several times smaller, so its values have further to go.",
        f"**PEER is the most sensitive.** Where the sweep starts, at 3e-3 and 4e-2, it recalls "
        f"{tried('tune-peer-3e-3-4e-2')}, less than dense. At its best it is "
        f"{tried('facts-peer-1')}: `--learning-rate 1.5e-3 --value-lr 1e-2`.",
        f"**UltraMem** has one seed so far, and its sweep is not finished "
        f"([not run yet](#tuning)). With the best rates that were tried it recalls "
        f"{tried('facts-ultramem-1')}.",
        f"**256 experts** of 32 hidden units (`tune-experts-256`) recall "
        f"{tried('tune-experts-256')}, 128 experts of 64 {tried('facts-moe-1')}. The study uses "
        f"the latter.",
        f"**Chosen by validation loss.** By recall it would be the same, but for the hash: with "
        f"1.5e-3 it recalls {tried('tune-hash-1.5e-3-4e-2')}, with the study's 3e-3 "
        f"{tried('facts-hash-1')}. The spread of its seeds is wider than that.",
        f"**Hash**: `--value-lr 4e-2`. The default of `facts`, 1.6e-1, is Memory's; the hash "
        f"recalls {tried('tune-hash-3e-3-1.6e-1')} with it, {tried('facts-hash-1')} with its own.")


def slots_text(runs):
    sizes = list(SLOTS.values())
    expect(all(recall(runs, a) < recall(runs, b) for a, b in zip(sizes, sizes[1:])),
           "each row of the slots recalls more than the one before")
    expect(recall(runs, sizes[0]) < recall(runs, "facts-dense"), "1,024 slots are worse than dense")
    most, dense = "facts-n512", "facts-dense"
    guess = statistics.mean(values(runs, dense, "recall_control"))
    read_once = statistics.mean(recall_at(result, 1) for result in seeds(runs, dense))
    expect(read_once < guess + 0.01, "dense guesses at the facts that it read once")
    once = spread([recall_at(result, 1) for result in seeds(runs, most)], 3)
    dense_once = spread([recall_at(result, 1) for result in seeds(runs, dense)], 3)
    total = {kind: seeds(runs, kind)[0]["params"]["total"] for kind in (most, dense, "facts-n256")}
    return points(
        "**Recall rises with every size**, as the paper "
        "([2412.09764](https://arxiv.org/abs/2412.09764)) finds.",
        f"**Against dense**: with 65,536 slots the model recalls "
        f"{times(runs, 'facts-n256', dense)} as many facts as the dense model of the same width, "
        f"with 262,144 slots {times(runs, most, dense)}.",
        f"**Rare facts**: of the facts that were read once, 262,144 slots recall {once}, the dense "
        f"model {dense_once}, which is no more than guessing.",
        f"**The cost in parameters**: {total['facts-n256'] / total[dense]:.0f} times the dense "
        f"model's with 65,536 slots, {total[most] / total[dense]:.0f} times with 262,144.",
        "**A small table gains nothing.** With 1,024 slots it is twice as large as the MLP that it "
        "replaces, and recalls no more.",
        "**Tuning**: the memory models of all sizes keep the rates that were tuned at 16,384 "
        "slots. Other sizes may do better with rates of their own.")


def scaling_text(runs):
    sizes, columns = by_size(runs, SLOTS.values(), total_parameters)
    means = [statistics.mean(column) for column in columns]
    wide = seeds(runs, "facts-dense4")[0]

    def memory_as_large_as(kind):
        """Recall of a table of that many parameters: between two that were measured, in log."""
        size = total_parameters(seeds(runs, kind)[0])
        return float(np.interp(np.log(size), np.log(sizes), means))

    as_large = memory_as_large_as("facts-dense4")
    dense = recall(runs, "facts-dense4")
    expect(dense < as_large < 1.25 * dense, "at equal parameters memory is a little ahead")
    middle = recall(runs, "facts-dense2")
    expect(abs(middle - memory_as_large_as("facts-dense2")) < 0.03, "with 0.4 M they are level")
    few = flops(seeds(runs, "facts-n32")[0])
    many = flops(seeds(runs, "facts-n512")[0])
    miss = max(abs(predicted(fit(sizes, columns), sizes) - means))
    guess = float(predicted(fit(sizes[:-1], columns[:-1]), sizes[-1]))
    loss = [statistics.mean(values(runs, kind, "val_loss")) for kind in SLOTS.values()]
    expect(loss == sorted(loss, reverse=True), "more slots have a lower loss")
    return points(
        f"**At equal parameters** memory and a wider dense model are level with 0.4 M parameters: "
        f"dense recalls {middle:.2f}, memory {memory_as_large_as('facts-dense2'):.2f}. With "
        f"{total_parameters(wide) / 1e6:.1f} M memory is ahead: dense recalls {dense:.2f}, memory "
        f"{as_large:.2f}. (Recall of memory is interpolated over the logarithm of the parameters.) "
        f"The dense model takes {flops(wide) / 1e6:.1f} M FLOPs per token for it.",
        f"**At about equal FLOPs**, {few / 1e6:.1f} to {many / 1e6:.1f} M, dense recalls "
        f"{recall(runs, 'facts-dense'):.2f} and memory {means[0]:.2f} to {means[-1]:.2f}. "
        f"{4 ** (len(SLOTS) - 1)} times the slots cost {many / few - 1:.0%} more FLOPs.",
        f"**Time is another matter.** With 262,144 slots, training takes "
        f"{training_time(runs, '262,144', 'facts-n512')} times as long as dense, longer than "
        f"dense with four times the FLOPs "
        f"({training_time(runs, 'dense, 4 x FLOPs', 'facts-dense4')}), which recalls {dense:.2f}.",
        f"**How far to trust the curves** (upper left): not beyond what was measured. The log-odds "
        f"of recall are fitted by a line over the logarithm of the parameters. The curve misses "
        f"the means by up to {miss:.2f}. Fitted to the four smaller tables, it promises "
        f"{guess:.2f} for 262,144 slots, and {recall(runs, 'facts-n512'):.2f} was measured. The "
        f"bands show the spread of the seeds alone. In the other panels the means are joined, "
        f"nothing is fitted.",
        f"**Validation loss** falls as recall rises, from {loss[0]:.3f} to {loss[-1]:.3f} over the "
        f"five tables.")


def against_text(runs):
    memory = "facts-memory"
    spreads = [statistics.stdev(values(runs, kind, "recall")) for kind in (memory, "facts-dense")]
    expect(recall(runs, memory) > recall(runs, "facts-plus"), "Memory recalls more than Memory+")
    expect(recall(runs, "own-bytes-moe") > recall(runs, "own-bytes-memory"), "MoE is no worse")
    rate = runs["facts-plus-1"]["value_lr"] / runs["facts-memory-1"]["value_lr"]
    return points(
        f"The hash recalls {times(runs, 'facts-hash', memory)} as many facts as Memory in the "
        f"default corpus, in less time.",
        f"Where each person is named by a word of their own, dense recalls as much as Memory "
        f"({recall(runs, 'single-dense'):.3f} and {recall(runs, 'single-memory'):.3f}).",
        f"On real facts with bytes as tokens, a mixture of experts recalls no less than Memory "
        f"({recall(runs, 'own-bytes-moe'):.3f} and {recall(runs, 'own-bytes-memory'):.3f}), the "
        f"hash {recall(runs, 'own-bytes-hash'):.3f}.",
        f"Memory+ recalls no more than Memory here ({recall(runs, 'facts-plus'):.3f} and "
        f"{recall(runs, memory):.3f}), and needs a table rate {rate:.0f} times as high. The paper "
        f"finds it better.",
        f"The step is slower on a CPU, so at equal time the gain over dense falls from "
        f"{times(runs, memory, 'facts-dense')} to {times(runs, memory, 'facts-dense-long')}.",
        "A parameter of a memory model stores fewer bits than one of the dense model of the same "
        "width.",
        f"1,024 slots recall no more than dense ({recall(runs, 'facts-n32'):.3f} and "
        f"{recall(runs, 'facts-dense'):.3f}).",
        f"The seeds of Memory spread further than those of dense ({spreads[0]:.3f} and "
        f"{spreads[1]:.3f}).")


# Where each table and text stands.
TABLES = {
    "README.md": [short_table, readme_text],
    "docs/results.md": [main_table, main_text, exposures_table, cost_table, choosing_text,
                        names_table, names_text, own_table, own_text, own_tuning_table,
                        tuning_table, tuning_text, slots_table, slots_text, scaling_text,
                        reads_table, variants_table, bfloat16_table, teach_table, teach_text,
                        against_text],
    "docs/speed.md": [steps_table],
    "docs/parallel.md": [ranks_table],
}
END = "<!-- report: end -->"


def with_table(text, table, runs):
    """The text of a document in which this table is new."""
    begin = f"<!-- report: {table.__name__} -->"
    if begin not in text:
        raise ValueError(f"a document of TABLES has no {begin}: put it where the table belongs, "
                         f"and {END} after it")
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(END)
    return f"{before}{begin}\n{table(runs)}\n{END}{after}"


# ---- pictures

STYLE = {
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
}
GREEN = "#2b8a5a"
BLUE = "#2f6db5"
LIGHT_BLUE = "#74a9dc"
ORANGE = "#d9822b"
PURPLE = "#8256a5"
RED = "#c0504d"
GREY = "#777777"


def mean_and_deviation(columns):
    """Lists of the seeds' numbers, one list for each point -> means, standard deviations."""
    return [statistics.mean(c) for c in columns], [statistics.stdev(c) for c in columns]


def draw_line(ax, x, columns, label, color, style):
    """The mean over seeds, and one standard deviation to either side as a band."""
    mean, deviation = mean_and_deviation(columns)
    low = [m - d for m, d in zip(mean, deviation)]
    high = [m + d for m, d in zip(mean, deviation)]
    ax.plot(x, mean, style, color=color, lw=2, ms=5, label=label)
    ax.fill_between(x, low, high, color=color, alpha=0.2, lw=0)


def draw_fit(ax, sizes, columns, label, color):
    """A point for each seed, and the curve of fit() through them with its band."""
    for x, column in zip(sizes, columns):
        ax.plot([x] * len(column), column, "o", color=color, ms=4)
    at = np.geomspace(sizes[0], sizes[-1])
    ax.plot(at, predicted(fit(sizes, columns), at), color=color, lw=2, label=label)
    ax.fill_between(at, *fit_band(sizes, columns, at), color=color, alpha=0.2, lw=0)


def draw_exposures(ax, results, label, color, style, end):
    """A line of recall over how often a fact was read, less than `end` times.

    A row of the results holds the facts that were read from 4 to 7 times, say. Its point stands at
    the geometric middle of that.
    """
    rows = [row for row in results[0]["recall_by_exposures"] if 0 < row["from"] < end]
    x = [(row["from"] * (row["to"] - 1)) ** 0.5 for row in rows]
    columns = [[recall_at(result, row["from"]) for result in results] for row in rows]
    draw_line(ax, x, columns, label, color, style)


def exposures_axis(ax, ticks):
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.set_xlabel("times the fact was read in training")


def recall_axis(ax):
    """From 0 to 100%, with a little room above."""
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
    ax.set_ylim(0, 1.03)
    ax.set_ylabel("facts recalled")


def draw_facts(runs, figure):
    """Recall over exposures, of memory, its rivals and dense."""
    lines = {
        "Memory": ("facts-memory", GREEN, "o-"),
        "PEER": ("facts-peer", PURPLE, "D-"),
        "Hashed memory": ("facts-hash", ORANGE, "s-"),
        "Dense, 4 times the FLOPs": ("facts-dense4", LIGHT_BLUE, "v--"),
        "Mixture of experts": ("facts-moe", RED, "x-"),
        "Dense": ("facts-dense", BLUE, "^--"),
    }
    ax = figure.subplots()
    for label, (kind, color, style) in lines.items():
        # Only a handful of facts were read more often.
        draw_exposures(ax, seeds(runs, kind), label, color, style, end=1024)
    exposures_axis(ax, [1, 4, 16, 64, 256])
    recall_axis(ax)
    ax.set_title("Who remembers rare facts?", loc="left")
    ax.legend(loc="lower right")


def draw_own(runs, figure):
    """Recall of real facts over exposures, with bytes and with words as tokens."""
    kinds = {
        "hash": ("Hashed memory", ORANGE, "s-"),
        "memory": ("Memory", GREEN, "o-"),
        "moe": ("Mixture of experts", RED, "x-"),
        "dense": ("Dense", BLUE, "^--"),
    }
    axes = figure.subplots(1, 2, sharey=True)
    for ax, tokens in zip(axes, ("bytes", "words")):
        guesses = []
        for kind, (label, color, style) in kinds.items():
            results = seeds(runs, f"own-{tokens}-{kind}")
            draw_exposures(ax, results, label, color, style, end=128)
            guesses += [result["recall_control"] for result in results]
        draw_line(ax, [1, 127], [guesses] * 2, "Guessing", GREY, ":")
        exposures_axis(ax, [1, 4, 16, 64])
        ax.set_title(f"Real facts, {tokens} as tokens", loc="left")
    recall_axis(axes[0])
    axes[1].legend(loc="center right")


def draw_slots(runs, figure):
    """Recall over the number of slots, beside dense models of three widths."""
    ax = figure.subplots()
    slots = [int(title.replace(",", "")) for title in SLOTS]
    columns = [values(runs, kind, "recall") for kind in SLOTS.values()]
    flat = {
        "Dense, 4 times the FLOPs": ("facts-dense4", ORANGE, "--"),
        "Dense, 2 times the FLOPs": ("facts-dense2", LIGHT_BLUE, "-."),
        "Dense, same FLOPs": ("facts-dense", BLUE, "-"),
    }
    draw_line(ax, slots, columns, "Memory", GREEN, "o-")
    ends = [slots[0] / 1.2, slots[-1] * 1.2]
    for label, (kind, color, style) in flat.items():
        draw_line(ax, ends, [values(runs, kind, "recall")] * 2, label, color, style)
    ax.set_xscale("log", base=2)
    ax.set_xlim(*ends)
    ax.set_xticks(slots, list(SLOTS))
    recall_axis(ax)
    ax.set_xlabel("slots in the table")
    ax.set_title("More slots, more facts", loc="left")
    ax.legend(loc="upper left")


def draw_scaling(runs, figure):
    """Recall and loss over parameters and FLOPs, of tables of five sizes, MLPs of three widths.

    A curve is fitted to the recall over parameters. Elsewhere the points are joined.
    """
    sizes = {
        "parameters, million": (total_parameters, [0.2, 0.5, 1, 2, 5, 10]),
        "FLOPs per token, million": (flops, [1, 2, 3, 4, 5]),
    }
    kinds = {"Memory, more slots": (SLOTS, GREEN), "Dense, wider": (DENSE, BLUE)}
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for (above, below), (name, (size, ticks)) in zip(axes.T, sizes.items()):
        for label, (of_kind, color) in kinds.items():
            points_of_recall = by_size(runs, of_kind.values(), size)
            points_of_loss = by_size(runs, of_kind.values(), size, "val_loss")
            if size is total_parameters:
                draw_fit(above, *points_of_recall, label, color)
            else:
                draw_line(above, *points_of_recall, label, color, "o-")
            draw_line(below, *points_of_loss, label, color, "o-")
        below.set_xscale("log")
        below.set_xticks([1e6 * tick for tick in ticks], [f"{tick:g}" for tick in ticks])
        below.minorticks_off()
        below.set_xlabel(name)
    recall_axis(axes[0, 0])
    axes[0, 0].set_title("More slots, or a wider model? Fitted curves", loc="left")
    axes[0, 0].legend(loc="upper left")
    axes[0, 1].set_title("The means over FLOPs, joined", loc="left")
    axes[1, 0].set_ylabel("validation loss")


def draw_teaching(runs, figure):
    """What is lost when facts are taught, over the number of slots that may learn."""
    ax = figure.subplots()
    taught = teaching()

    def columns(name):
        return [share_lost(edit) for edit in seeds(taught, f"teach-{name}")]

    slots = [512, 1024, 2048, 4096, 8192]
    draw_line(ax, slots, [columns(f"slots-{n}") for n in slots], "Values of some slots", GREEN,
              "o-")
    ends = [slots[0], slots[-1]]
    draw_line(ax, ends, [columns("all-values-3")] * 2, "All values", BLUE, "--")
    draw_line(ax, ends, [columns("full-1e-4")] * 2, "The whole model", ORANGE, "-.")
    ax.set_xscale("log", base=2)
    ax.set_xticks(slots, [f"{n:,}" for n in slots])
    ax.set_yscale("log")
    ax.set_yticks([0.01, 0.1, 1], ["1%", "10%", "100%"])
    ax.set_ylim(0.002, 1)
    ax.set_xlabel("slots that may learn")
    ax.set_ylabel("old facts lost")
    ax.set_title("What do 100 new facts cost?", loc="left")
    ax.legend(loc="center right")


def draw(runs, draw_into, path, width=6, height=4.5):
    import matplotlib
    from matplotlib.figure import Figure
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw_into(runs, figure)
        figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", action="store_true",
                        help="put the results of out/* into assets/facts.json first")
    args = parser.parse_args()
    if args.collect:
        print("collected:", " ".join(collect() + collect_teaching())
              or "nothing, out/ has no finished run")
    runs = load()
    texts = {}  # all of them are made before the first is written
    for document, tables in TABLES.items():
        texts[document] = (ROOT / document).read_text("utf-8")
        for table in tables:
            texts[document] = with_table(texts[document], table, runs)
    for document, text in texts.items():
        (ROOT / document).write_text(text, "utf-8")
        print(f"written: {document}, with {len(TABLES[document])} tables and texts")
    draw(runs, draw_facts, ROOT / "assets" / "facts.png")
    draw(runs, draw_slots, ROOT / "assets" / "slots.png")
    draw(runs, draw_own, ROOT / "assets" / "own_facts.png", width=10)
    draw(runs, draw_teaching, ROOT / "assets" / "teach.png")
    draw(runs, draw_scaling, ROOT / "assets" / "scaling.png", width=10, height=7)
    print("drawn: facts.png, slots.png, own_facts.png, teach.png and scaling.png in assets/")


if __name__ == "__main__":
    steady_output()
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit("report.py: " + " ".join(str(error).split()))
    except KeyError as error:
        sys.exit(f"report.py: there is no {error} in assets/: run what makes it, then --collect")
