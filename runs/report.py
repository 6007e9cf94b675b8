"""Write the tables of the documents and draw their pictures, from runs/results/.

    python runs/report.py              # write all tables, draw all pictures
    python runs/report.py --collect    # first copy the result of every finished run in out/

A function ..._table makes a table. It stands in a document between two comments:

    <!-- report: main_table -->
    <!-- report: end -->

What a document says about its tables is written by hand, and tests/test_results.py checks it.
"""
import argparse
import re
import statistics
import sys

from pictures import PICTURES, draw
from results import (DENSE, EXPERTS, MAIN, OWN, RATES, ROOT, SLOTS, TEXT, TEXTS, TWICE,
                     collect, dense_for_as_long, mean, read, recall_at, seeds, share_lost, spread,
                     text_time, training_time, values)

from support.terminal import steady_output  # results.py has put the repository on the path

# Title of a column: its key in a result, and the digits after the point.
COLUMNS = {
    "facts recalled": ("recall", 3),
    "unseen phrasing": ("recall_unseen_phrasing", 3),
    "validation loss": ("val_loss", 3),
    "bits stored": ("bits_stored", 0),
    "bits per parameter": ("bits_per_param", 3),
}


def markdown(head, rows):
    """A Markdown table. head: titles; rows: lists of as many cells."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def spreads(runs, kind, titles=COLUMNS):
    """The cells of a kind below some titles of COLUMNS."""
    cells = []
    for title in titles:
        key, digits = COLUMNS[title]
        cells.append(spread(values(runs, kind, key), digits))
    return cells


def parameters(runs, kind):
    return seeds(runs, kind)[0]["params"]["total"]


def flops(runs, kind):
    return seeds(runs, kind)[0]["flops_per_token"]


def time(runs, kind):
    return f"{training_time(runs, kind):.2f}"


def peak_memory(runs, kind):
    """In MiB."""
    return spread([peak / 2**20 for peak in values(runs, kind, "peak_memory_bytes")], 0)


# ---- the main result

def short_table(runs):
    """The table of README.md. Our models are bold."""
    kinds = {
        "dense": "facts-dense",
        "dense, 4 x FLOPs": "facts-dense4",
        "**Memory, 16,384 slots**": "facts-memory",
        "**Memory, 65,536 slots**": "facts-n256",
    }
    rows = [[title,
             *spreads(runs, kind, ["facts recalled"]),
             f"{flops(runs, kind) / 1e6:.2f} M",
             f"{parameters(runs, kind) / 1e6:.2f} M",
             time(runs, kind)] for title, kind in kinds.items()]
    return markdown(["", "facts recalled", "FLOPs per token", "parameters",
                     "training time (dense = 1)"], rows)


def main_table(runs):
    rows = [[title, str(len(seeds(runs, kind))), *spreads(runs, kind)]
            for title, kind in MAIN.items()]
    return markdown(["", "seeds", *COLUMNS], rows)


def exposures_table(runs):
    """Recall by how often a fact was read."""
    columns = {"1": 1, "2-3": 2, "4-7": 4, "8-15": 8, "16-31": 16, "32-63": 32, "64-127": 64}
    rows = []
    for title, kind in MAIN.items():
        row = [title]
        for low in columns.values():
            row.append(spread([recall_at(result, low) for result in seeds(runs, kind)], 2))
        row.append(spread(values(runs, kind, "recall_control"), 3))
        rows.append(row)
    return markdown(["times read", *columns, "never (control)"], rows)


def cost_table(runs):
    """What each kind costs: tokens, FLOPs, parameters, time and memory."""
    head = ["", "tokens", "FLOPs per token", "parameters (active)", "training time",
            "peak memory of the process, MiB", "slots used", "KL"]
    rows = []
    for title, kind in MAIN.items():
        first = seeds(runs, kind)[0]
        used = ["", ""]
        if first["memory_usage"] is not None:
            share = f"{mean(runs, kind, 'memory_usage'):.0%}"
            used = [share, spread(values(runs, kind, "memory_kl"), 2)]
        rows.append([title,
                     f"{first['tokens'] / 1e6:.2f} M",
                     f"{first['flops_per_token']:,}",
                     f"{first['params']['total']:,} ({first['params']['active']:,})",
                     time(runs, kind),
                     peak_memory(runs, kind),
                     *used])
    return markdown(head, rows)


# ---- sizes

SIZE_COLUMNS = ["facts recalled", "unseen phrasing", "validation loss", "bits per parameter"]
SIZES = ["parameters", "FLOPs per token", *SIZE_COLUMNS, "training time"]


def of_size(runs, kind):
    """The cells of a kind below SIZES."""
    return [f"{parameters(runs, kind):,}", f"{flops(runs, kind):,}",
            *spreads(runs, kind, SIZE_COLUMNS), time(runs, kind)]


def slots_table(runs):
    rows = [[title, f"{mean(runs, kind, 'memory_usage'):.0%}", *of_size(runs, kind)]
            for title, kind in SLOTS.items()]
    rows.append(["dense", "", *of_size(runs, "facts-dense")])
    return markdown(["slots", "slots used", *SIZES], rows)


def scaling_table(runs):
    """Wider dense models, and mixtures of experts as large as the tables of slots_table."""
    rows = [[title, *of_size(runs, kind)] for title, kind in (DENSE | EXPERTS).items()]
    return markdown(["", *SIZES], rows)


# ---- other data

# Beginning of the names of the runs of runs/names.sh: an example.
NAMES = {
    "facts": "Rasia Westshaw (the default)",
    "apart": "Rasia of house Westshaw",
    "single": "RasiaWestshaw",
}


def names_table(runs):
    """Recall when people are named in other ways."""
    rows = []
    for names, example in NAMES.items():
        row = [example]
        for kind in ("dense", "memory", "adamw", "hash"):
            name = f"{names}-{kind}".replace("facts-adamw", "adamw-memory")
            row += spreads(runs, name, ["facts recalled"])
        rows.append(row)
    return markdown(["people are named", "dense", "Memory", "Memory, AdamW", "hash"], rows)


def own_table(runs):
    """Recall of real facts, with words and with bytes as tokens."""
    head = ["tokens", "", "facts recalled", "read 4-7 times", "16-31", "64-127",
            "never (control)", "validation loss", "FLOPs per token", "parameters"]
    rows = []
    for tokens in ("words", "bytes"):
        for title, name in OWN.items():
            kind = f"own-{tokens}-{name}"
            by_exposures = [[recall_at(result, times) for result in seeds(runs, kind)]
                            for times in (4, 16, 64)]
            rows.append([tokens, title,
                         *spreads(runs, kind, ["facts recalled"]),
                         *[spread(recalls, 2) for recalls in by_exposures],
                         spread(values(runs, kind, "recall_control"), 3),
                         *spreads(runs, kind, ["validation loss"]),
                         f"{flops(runs, kind) / 1e6:.2f} M",
                         f"{parameters(runs, kind) / 1e6:.2f} M"])
    return markdown(head, rows)


def text_table(runs):
    """Validation loss on ordinary text, and what it costs."""
    head = ["text", "", "validation loss", "dense in that time, about", "training time", "tokens",
            "FLOPs per token", "parameters", "peak memory, MiB"]
    rows = []
    for text in TEXTS:
        for title, name in TEXT.items():
            kind = f"text-{text}-{name}"
            how_long = text_time(runs, text, title)
            dense = ""
            if 1 < how_long < 2:  # between the two runs of dense
                dense = f"{dense_for_as_long(runs, text, how_long):.3f}"
            rows.append([text, title,
                         *spreads(runs, kind, ["validation loss"]),
                         dense,
                         f"{how_long:.2f}",
                         f"{seeds(runs, kind)[0]['tokens'] / 1e6:.2f} M",
                         f"{flops(runs, kind) / 1e6:.2f} M",
                         f"{parameters(runs, kind) / 1e6:.2f} M",
                         peak_memory(runs, kind)])
    return markdown(head, rows)


# ---- teaching

# Beginning of the names of the folders of runs/teach.sh: title.
TAUGHT = {
    "teach-slots-512": "the values of 512 slots",
    "teach-slots-1024": "the values of 1,024 slots",
    "teach-slots-2048": "the values of 2,048 slots",
    "teach-slots-4096": "the values of 4,096 slots",
    "teach-slots-8192": "the values of 8,192 slots",
    "teach-all-values-3": "all values, rate 3",
    "teach-all-values-10": "all values, rate 10",
    "teach-full-3e-5": "the whole model, rate 3e-5",
    "teach-full-1e-4": "the whole model, rate 1e-4",
    "teach-full-3e-4": "the whole model, rate 3e-4",
}


def teach_table(runs):
    """What 100 new facts cost in old ones, for each way to teach them."""
    head = ["what learns", "new facts learnt", "in the unseen phrasing", "old facts before",
            "after", "share lost", "slots changed", "steps"]
    taught = read("teach")
    rows = []
    for kind, title in TAUGHT.items():
        lessons = seeds(taught, kind)
        row = [title]
        # A lesson has the recall of: new facts, new facts in the unseen phrasing, old facts.
        for when, i in (("after", 0), ("after", 1), ("before", 2), ("after", 2)):
            row.append(spread([lesson[when][i] for lesson in lessons], 3))
        row.append(spread([share_lost(lesson) for lesson in lessons], 3))
        changed = statistics.mean(sum(lesson["changed"]) for lesson in lessons)  # in all tables
        row.append(f"{changed:,.0f}")
        row.append(f"{mean(taught, kind, 'steps'):.0f}")
        rows.append(row)
    return markdown(head, rows)


# ---- one question each

# Flags besides --seed 1: the run.
VARIANTS = {
    "the default": "adamw-memory-1",
    "`--mem-heads 2 --mem-topk 64`": "variant-h2-k64",
    "`--mem-heads 2`": "variant-h2",
    "`--mem-topk 8`": "adamw-k8-1",
    "`--mem-layers 1,2 --mem-topk 16` (two layers, one table)": "variant-two-layers",
    "`--mem-gate`": "variant-gate",
    "`--qk-norm`": "variant-qknorm",
    "`--mem-gate --qk-norm` (Memory+)": "tune-plus-3e-3-1.6e-1",
}


def reads_table(runs):
    kinds = {"32 (the default)": "adamw-memory", "8": "adamw-k8"}
    rows = [[title, f"{flops(runs, kind):,}", *spreads(runs, kind, ["facts recalled"])]
            for title, kind in kinds.items()]
    return markdown(["`--mem-topk`", "FLOPs per token", "facts recalled"], rows)


def variants_table(runs):
    rows = [[flags, f"`{name}`", f"{runs[name]['recall']:.3f}"]
            for flags, name in VARIANTS.items()]
    return markdown(["`python train.py --seed 1 --out-dir out/NAME` with", "NAME",
                     "facts recalled"], rows)


# The table, its optimizer, the kind of runs.
ROW = [
    ("1,024 slots", "AdamW", "adamw-n32"),
    ("1,024 slots", "RowAdam", "facts-n32"),
    ("4,096 slots", "AdamW", "adamw-n64"),
    ("4,096 slots", "RowAdam", "facts-n64"),
    ("16,384 slots", "AdamW", "adamw-memory"),
    ("16,384 slots", "RowAdam", "facts-memory"),
    ("65,536 slots", "AdamW", "adamw-n256"),
    ("65,536 slots", "RowAdam", "facts-n256"),
    ("262,144 slots", "AdamW", "adamw-n512"),
    ("262,144 slots", "AdamW, rate 0.64", "adamw-n512-6.4e-1"),
    ("262,144 slots", "RowAdam", "facts-n512"),
    ("real facts, words", "AdamW", "own-words-memory"),
    ("real facts, words", "RowAdam", "row-own-words-4e-2"),
    ("UltraMem", "AdamW", "adamw-ultramem"),
    ("UltraMem", "RowAdam", "facts-ultramem"),
]


def row_table(runs):
    """AdamW and RowAdam on tables of several sizes."""
    rows = [[table, optimizer, str(len(seeds(runs, kind))),
             spread(values(runs, kind, "recall"), 3),
             spread(values(runs, kind, "val_loss"), 4),
             f"{mean(runs, kind, 'memory_usage'):.0%}"] for table, optimizer, kind in ROW]
    return markdown(["table", "its optimizer", "seeds", "facts recalled", "validation loss",
                     "slots used"], rows)


# How the run is named: what differs from the defaults.
ROW_TUNING = {
    "facts-memory": "the default: rate 0.32, half-keys at a third",
    "row-1.6e-1": "rate 0.16",
    "row-6.4e-1": "rate 0.64",
    "row-keys-0.1": "half-keys at a tenth",
    "row-keys-1": "half-keys at the full rate",
    "row-6.4e-1-keys-1": "rate 0.64, half-keys at the full rate",
    "adamw-memory": "AdamW, rate 0.16, half-keys at the full rate",
    "adamw-keys": "AdamW, rate 0.16, half-keys at a third",
    "row-own-words-8e-2": "real facts with words, RowAdam, rate 0.08",
    "row-own-words-4e-2": "real facts with words, RowAdam, rate 0.04",
    "own-words-memory": "real facts with words, AdamW, rate 0.04",
    "row-ultramem-1.6e-1": "UltraMem, RowAdam, rate 0.16",
    "facts-ultramem": "UltraMem, RowAdam, rate 0.64",
    "adamw-ultramem": "UltraMem, AdamW, rate 0.16",
    "row-hash-1.6e-1": "hash, RowAdam, rate 0.16",
    "facts-hash": "hash, AdamW, rate 0.04",
    "row-peer-4e-2": "PEER, RowAdam, rate 0.04",
    "facts-peer": "PEER, AdamW, rate 0.01",
    "row-plus-2.56": "Memory+, RowAdam, rate 2.56",
    "facts-plus": "Memory+, AdamW, rate 2.56",
}


def row_tuning_table(runs):
    """Other rates of the table and of the half-keys, at 16,384 slots: recall of each seed."""
    rows = []
    for kind, title in ROW_TUNING.items():
        found = [runs.get(f"{kind}-{seed}") for seed in (1, 2, 3)]
        rows.append([title, *["" if run is None else f"{run['recall']:.3f}" for run in found]])
    return markdown(["", "seed 1", "seed 2", "seed 3"], rows)


# What it shows: (kind, the kind to compare it with).
OLDER = {
    "8 blocks: Memory, one layer / dense": ("deep-memory", "deep-dense"),
    "8 blocks: Memory, three layers that share a table / one layer": ("deep-three", "deep-memory"),
    "8 blocks: Memory+ / Memory, three layers each": ("deep-plus", "deep-three"),
    "Memory+, table in bfloat16 / in float32": ("facts-bf16", "facts-plus-6.4e-1"),
    "262,144 slots, with a loss against uneven use / without": ("balance-1e-2", "adamw-n512"),
    "16,384 slots, two processes that share the table / one": ("facts-2ranks", "adamw-memory"),
}


def older_table(runs):
    """Studies whose scripts are gone, two kinds in a row."""
    rows = []
    for title, kinds in OLDER.items():
        row = [title]
        for key in ("recall", "val_loss"):
            row.append(" / ".join(spread(values(runs, kind, key), 3) for kind in kinds))
        rows.append(row)
    return markdown(["", "facts recalled", "validation loss"], rows)


def steps_table(runs):
    """What a step takes, of all models."""
    rows = []
    for title, step in read("steps").items():
        low, middle, high = step["ratio"]
        rows.append([title, f"{step['ms'][1]:.1f}", f"{step['dense_ms']:.1f}", f"{middle:.2f}",
                     f"{low:.2f} to {high:.2f}"])
    return markdown(["", "ms a step", "dense, timed beside it", "times dense", "quartiles"], rows)


# ---- tuning: the rates that were tried, on seed 1

TUNING = ["", "rate", "of the table or experts", "validation loss", "facts recalled"]
# The rate that is tuned beside that of the whole.
SECOND_RATE = {"MoE": "expert_lr", "hash": "value_lr", "PEER": "value_lr", "UltraMem": "value_lr",
               "Memory": "value_lr", "Memory+": "value_lr"}
# Kinds of the sweep.
TUNED = DENSE | {title: MAIN[title] for title in SECOND_RATE} | {
    "UltraMem": "adamw-ultramem", "Memory": "adamw-memory"}


def tuned(runs, kind):
    """Seed 1 of a kind, and the runs that differ from it in their rates alone."""
    swept = re.compile(f"tune-{kind.removeprefix('facts-')}-" + r"\d")
    tried = [runs[name] for name in runs if name == f"{kind}-1" or swept.match(name)]
    return sorted(tried, key=lambda run: [run[rate] for rate in RATES])


def tuning_rows(runs, title, kind, second):
    """A row below TUNING for each run, with the lowest loss in bold. second: a rate, or None."""
    tried = tuned(runs, kind)
    best = min(run["val_loss"] for run in tried)
    rows = []
    for run in tried:
        loss = f"{run['val_loss']:.4f}"
        if run["val_loss"] == best:
            loss = f"**{loss}**"
        other = ""
        if second:
            other = f"{run[second]:g}"
        row = [title, f"{run['learning_rate']:g}", other, loss]
        if "recall" in run:  # not on ordinary text
            row.append(f"{run['recall']:.3f}")
        rows.append(row)
    return rows


def tuning_table(runs):
    rows = []
    for title, kind in TUNED.items():
        rows += tuning_rows(runs, title, kind, SECOND_RATE.get(title))
    return markdown(TUNING, rows)


def own_tuning_table(runs):
    rows = []
    for tokens in ("words", "bytes"):
        for title, name in OWN.items():
            tried = tuning_rows(runs, title, f"own-{tokens}-{name}", SECOND_RATE.get(title))
            rows += [[tokens, *row] for row in tried]
    return markdown(["tokens", *TUNING], rows)


def text_tuning_table(runs):
    rows = []
    for text in TEXTS:
        for title, name in TEXT.items():
            if title.endswith(TWICE):  # it has the rates of the shorter run
                continue
            tried = tuning_rows(runs, title, f"text-{text}-{name}", SECOND_RATE.get(title))
            rows += [[text, *row] for row in tried]
    return markdown(["text", *TUNING[:-1]], rows)


# ---- the documents

TABLES = {
    "README.md": [short_table],
    "docs/results.md": [main_table, slots_table, names_table, own_table, text_table,
                        teach_table],
    "docs/appendix.md": [cost_table, exposures_table, scaling_table, reads_table, row_table,
                         row_tuning_table, tuning_table, own_tuning_table, text_tuning_table,
                         variants_table, older_table],
    "docs/speed.md": [steps_table],
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


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", action="store_true",
                        help="first copy the results of out/* into runs/results/")
    args = parser.parse_args()
    if args.collect:
        print("collected:", " ".join(collect()) or "nothing, out/ has no finished run")
    runs = read("facts")

    # All tables are made before the first document is written.
    texts = {}
    for document, tables in TABLES.items():
        texts[document] = (ROOT / document).read_text("utf-8")
        for table in tables:
            texts[document] = with_table(texts[document], table, runs)
    for document, text in texts.items():
        (ROOT / document).write_text(text, "utf-8")
        print(f"written: {document}, {len(TABLES[document])} tables")

    for name, (draw_into, width, height) in PICTURES.items():
        draw(runs, draw_into, ROOT / "docs" / name, width, height)
        print(f"drawn: docs/{name}")


if __name__ == "__main__":
    steady_output()
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit("report.py: " + " ".join(str(error).split()))
    except KeyError as error:
        sys.exit(f"report.py: there is no {error} in runs/results/: run it, then --collect")
