"""Write the tables of the documents and draw their pictures, from runs/results/.

    python runs/report.py              # write all tables, draw all pictures
    python runs/report.py --collect    # first copy the result of every finished run in out/

TABLES says what is in each table. It stands in a document between two comments:

    <!-- report: main -->
    <!-- report: end -->

What a document says about its tables is written by hand, and tests/test_results.py checks it.
"""
import argparse
import re
import statistics
import sys

from pictures import PICTURES, draw
from results import (DENSE, EXPERTS, MAIN, OWN, RATES, ROOT, SLOTS, TEXT, TEXTS, TWICE, collect,
                     dense_for_as_long, mean, read, recall_at, seeds, share_lost, spread,
                     training_time, values)

from support.terminal import steady_output  # results.py has put the repository on the path


def markdown(head, rows):
    """A Markdown table. head: titles; rows: lists of as many cells."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


# ---- columns: functions of all runs and a kind, which return a cell

def number(key, digits):
    """The mean of a number ± its standard deviation over the seeds. "" where there is none."""
    def cell(runs, kind):
        numbers = values(runs, kind, key)
        return "" if numbers[0] is None else spread(numbers, digits)
    return cell


def recall_of_row(times):
    """Recall of the facts that were read `times` times or a little more."""
    def cell(runs, kind):
        return spread([recall_at(result, times) for result in seeds(runs, kind)], 2)
    return cell


def millions(*keys):
    """A number that all seeds have in common. keys: where it is in a result."""
    def cell(runs, kind):
        count = seeds(runs, kind)[0]
        for key in keys:
            count = count[key]
        return f"{count / 1e6:.2f} M"
    return cell


def peak_memory(runs, kind):
    return spread([peak / 2**20 for peak in values(runs, kind, "peak_memory_bytes")], 0)


def slots_used(runs, kind):
    shares = values(runs, kind, "memory_usage")
    return "" if shares[0] is None else f"{statistics.mean(shares):.0%}"


def dense_in_that_time(runs, kind):
    """The loss of dense on the same text in the same time, if that is between its two runs."""
    time = training_time(runs, kind)
    return f"{dense_for_as_long(runs, kind, time):.3f}" if 1 < time < 2 else ""


READ = {"1": 1, "2-3": 2, "4-7": 4, "8-15": 8, "16-31": 16, "32-63": 32, "64-127": 64}
COLUMNS = {
    "seeds": lambda runs, kind: str(len(seeds(runs, kind))),
    "facts recalled": number("recall", 3),
    "unseen phrasing": number("recall_unseen_phrasing", 3),
    "never (control)": number("recall_control", 3),
    "validation loss": number("val_loss", 3),
    "bits stored": number("bits_stored", 0),
    "bits per parameter": number("bits_per_param", 3),
    "tokens": millions("tokens"),
    "FLOPs per token": millions("flops_per_token"),
    "parameters": millions("params", "total"),
    "active": millions("params", "active"),
    "training time": lambda runs, kind: f"{training_time(runs, kind):.2f}",
    "peak memory, MiB": peak_memory,
    "slots used": slots_used,
    "KL": number("memory_kl", 2),
    "dense in that time, about": dense_in_that_time,
} | {f"read {title}": recall_of_row(times) for title, times in READ.items()}


def of_kinds(kinds, *titles):
    """A table with a row for each kind {title: kind}, and these columns of COLUMNS."""
    def table(runs):
        rows = [[row, *[COLUMNS[title](runs, kind) for title in titles]]
                for row, kind in kinds.items()]
        return markdown(["", *titles], rows)
    return table


def by_seed(kinds):
    """A table of the recall of the seeds 1 to 3, for studies that have not all of them."""
    def table(runs):
        rows = []
        for title, kind in kinds.items():
            found = [runs.get(f"{kind}-1", runs.get(kind)), runs.get(f"{kind}-2"),
                     runs.get(f"{kind}-3")]
            rows.append([title, *["" if run is None else f"{run['recall']:.3f}" for run in found]])
        return markdown(["", "seed 1", "seed 2", "seed 3"], rows)
    return table


# ---- the kinds of the tables: title of a row -> beginning of the names of the runs

SHORT = {
    "dense": "facts-dense",
    "dense, 4 x FLOPs": "facts-dense4",
    "**Memory, 16,384 slots**": "facts-memory",
    "**Memory, 65,536 slots**": "facts-n256",
}
# runs/names.sh: how people are named. The example comes first.
NAMES = {
    "facts": "Rasia Westshaw (the default)",
    "apart": "Rasia of house Westshaw",
    "single": "RasiaWestshaw",
}
SIZES_OF_TABLES = {f"{slots} slots": kind for slots, kind in SLOTS.items()}
OWN_KINDS = {f"{tokens}: {title}": f"own-{tokens}-{name}"
             for tokens in ("words", "bytes") for title, name in OWN.items()}
TEXT_KINDS = {f"{text}: {title}": f"text-{text}-{name}"
              for text in TEXTS for title, name in TEXT.items()}
READS = {"`--mem-topk 32` (the default)": "adamw-memory", "`--mem-topk 8`": "adamw-k8"}
# The table, and its optimizer.
ROW = {
    "1,024 slots, AdamW": "adamw-n32",
    "1,024 slots, RowAdam": "facts-n32",
    "4,096 slots, AdamW": "adamw-n64",
    "4,096 slots, RowAdam": "facts-n64",
    "16,384 slots, AdamW": "adamw-memory",
    "16,384 slots, RowAdam": "facts-memory",
    "65,536 slots, AdamW": "adamw-n256",
    "65,536 slots, RowAdam": "facts-n256",
    "262,144 slots, AdamW": "adamw-n512",
    "262,144 slots, AdamW, rate 0.64": "adamw-n512-6.4e-1",
    "262,144 slots, RowAdam": "facts-n512",
    "1,048,576 slots, RowAdam": "facts-n1024",
    "real facts, words, AdamW": "own-words-memory",
    "real facts, words, RowAdam": "row-own-words-4e-2",
    "UltraMem, AdamW": "adamw-ultramem",
    "UltraMem, RowAdam": "facts-ultramem",
}
# What differs from the defaults, at 16,384 slots or as many values.
ROW_TUNING = {
    "the default: rate 0.32, half-keys at a third": "facts-memory",
    "rate 0.16": "row-1.6e-1",
    "rate 0.64": "row-6.4e-1",
    "half-keys at a tenth": "row-keys-0.1",
    "half-keys at the full rate": "row-keys-1",
    "rate 0.64, half-keys at the full rate": "row-6.4e-1-keys-1",
    "AdamW, rate 0.16, half-keys at the full rate": "adamw-memory",
    "without momentum, rate 0.04": "adam0-4e-2",
    "without momentum, rate 0.16": "adam0-1.6e-1",
    "without momentum, rate 0.64": "adam0-6.4e-1",
    "SparseAdam, rate 0.04": "lazy-4e-2",
    "SparseAdam, rate 0.16": "lazy-1.6e-1",
    "SparseAdam, rate 0.64": "lazy-6.4e-1",
    "AdamW, rate 0.16, half-keys at a third": "adamw-keys",
    "65,536 slots, rate 0.08": "row-n256-8e-2",
    "65,536 slots, rate 0.32": "facts-n256",
    "65,536 slots, rate 1.28": "row-n256-1.28",
    "65,536 slots, AdamW, rate 0.16": "adamw-n256",
    "65,536 slots, AdamW, rate 0.64": "adamw-n256-6.4e-1",
    "262,144 slots, rate 0.08": "row-n512-8e-2",
    "262,144 slots, rate 0.32": "facts-n512",
    "262,144 slots, rate 1.28": "row-n512-1.28",
    "262,144 slots, half-keys at a tenth": "row-n512-keys-0.1",
    "262,144 slots, half-keys at the full rate": "row-n512-keys-1",
    "262,144 slots, AdamW, rate 0.16": "adamw-n512",
    "262,144 slots, AdamW, rate 0.64": "adamw-n512-6.4e-1",
    "262,144 slots, without momentum, rate 0.16": "adam0-n512-1.6e-1",
    "262,144 slots, without momentum, rate 0.64": "adam0-n512-6.4e-1",
    "262,144 slots, SparseAdam, rate 0.16": "lazy-n512-1.6e-1",
    "262,144 slots, SparseAdam, rate 0.64": "lazy-n512-6.4e-1",
    "real facts with bytes, RowAdam, rate 0.16": "row-own-bytes-1.6e-1",
    "real facts with bytes, RowAdam, rate 0.64": "row-own-bytes-6.4e-1",
    "real facts with bytes, RowAdam, rate 1.28": "row-own-bytes-1.28",
    "real facts with bytes, AdamW, rate 0.64": "own-bytes-memory",
    "real facts with words, RowAdam, rate 0.08": "row-own-words-8e-2",
    "real facts with words, RowAdam, rate 0.04": "row-own-words-4e-2",
    "real facts with words, AdamW, rate 0.04": "own-words-memory",
    "UltraMem, RowAdam, rate 0.16": "row-ultramem-1.6e-1",
    "UltraMem, RowAdam, rate 0.64": "facts-ultramem",
    "UltraMem, AdamW, rate 0.16": "adamw-ultramem",
    "hash, RowAdam, rate 0.16": "row-hash-1.6e-1",
    "hash, AdamW, rate 0.04": "facts-hash",
    "PEER, RowAdam, rate 0.01": "row-peer-1e-2",
    "PEER, RowAdam, rate 0.04": "row-peer-4e-2",
    "PEER, AdamW, rate 0.01": "facts-peer",
    "Memory+, RowAdam, rate 0.64": "row-plus-6.4e-1",
    "Memory+, RowAdam, rate 2.56": "row-plus-2.56",
    "Memory+, AdamW, rate 2.56": "facts-plus",
}
# Flags besides --seed 1.
VARIANTS = {
    "the default": "adamw-memory",
    "`--mem-heads 2 --mem-topk 64`": "variant-h2-k64",
    "`--mem-heads 2`": "variant-h2",
    "`--mem-topk 8`": "adamw-k8",
    "`--mem-layers 1,2 --mem-topk 16` (two layers, one table)": "variant-two-layers",
    "`--mem-gate`": "variant-gate",
    "`--qk-norm`": "variant-qknorm",
    "`--mem-gate --qk-norm` (Memory+)": "tune-plus-3e-3-1.6e-1",
}
OLDER = {
    "8 blocks: dense": "deep-dense",
    "8 blocks: Memory, one layer": "deep-memory",
    "8 blocks: Memory, three layers that share a table": "deep-three",
    "8 blocks: Memory+, three layers that share a table": "deep-plus",
    "Memory+, table in float32": "facts-plus-6.4e-1",
    "Memory+, table in bfloat16": "facts-bf16",
    "262,144 slots": "adamw-n512",
    "262,144 slots, with a loss against uneven use": "balance-1e-2",
    "16,384 slots": "adamw-memory",
    "16,384 slots, two processes that share the table": "facts-2ranks",
}
TAUGHT = {
    "the values of 512 slots": "teach-slots-512",
    "the values of 1,024 slots": "teach-slots-1024",
    "the values of 2,048 slots": "teach-slots-2048",
    "the values of 4,096 slots": "teach-slots-4096",
    "the values of 8,192 slots": "teach-slots-8192",
    "all values, rate 3": "teach-all-values-3",
    "all values, rate 10": "teach-all-values-10",
    "the whole model, rate 3e-5": "teach-full-3e-5",
    "the whole model, rate 1e-4": "teach-full-1e-4",
    "the whole model, rate 3e-4": "teach-full-3e-4",
}
# The sweeps. With twice the steps, the rates are those of the shorter run.
TUNED = DENSE | {title: MAIN[title] for title in ("MoE", "hash", "PEER", "UltraMem", "Memory",
                                                  "Memory+")}
TUNED |= {"UltraMem": "adamw-ultramem", "Memory": "adamw-memory"}
TUNED_TEXT = {title: kind for title, kind in TEXT_KINDS.items() if not title.endswith(TWICE)}


# ---- tables of another kind

def names(runs):
    """Recall when people are named in other ways."""
    rows = []
    for name, example in NAMES.items():
        kinds = [f"{name}-{kind}".replace("facts-adamw", "adamw-memory")
                 for kind in ("dense", "memory", "adamw", "hash")]
        rows.append([example, *[COLUMNS["facts recalled"](runs, kind) for kind in kinds]])
    return markdown(["people are named", "dense", "Memory", "Memory, AdamW", "hash"], rows)


def teach(runs):
    """What 100 new facts cost in old ones, for each way to teach them."""
    head = ["what learns", "new facts learnt", "in the unseen phrasing", "old facts before",
            "after", "share lost", "slots changed", "steps"]
    taught = read("teach")
    rows = []
    for title, kind in TAUGHT.items():
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


def steps(runs):
    """What a step takes, of all models."""
    rows = []
    for title, step in read("steps").items():
        low, middle, high = step["ratio"]
        rows.append([title, f"{step['ms'][1]:.1f}", f"{step['dense_ms']:.1f}", f"{middle:.2f}",
                     f"{low:.2f} to {high:.2f}"])
    return markdown(["", "ms a step", "dense, timed beside it", "times dense", "quartiles"], rows)


def tried(runs, kind):
    """Seed 1 of a kind, and the runs that differ from it in their rates alone."""
    swept = re.compile(f"tune-{kind.removeprefix('facts-')}-" + r"\d")
    found = [runs[name] for name in runs if name == f"{kind}-1" or swept.match(name)]
    return sorted(found, key=lambda run: [run[rate] for rate in RATES])


def tuning(kinds):
    """A table of the rates that were tried, on seed 1, with the lowest loss of a kind in bold."""
    def table(runs):
        rows = []
        for title, kind in kinds.items():
            of_kind = tried(runs, kind)
            best = min(run["val_loss"] for run in of_kind)
            for run in of_kind:
                second = {"dense": "", "moe": f"{run['expert_lr']:g}"}
                mark = "**" if run["val_loss"] == best else ""
                rows.append([title, f"{run['learning_rate']:g}",
                             second.get(run["ffn"], f"{run['value_lr']:g}"),
                             f"{mark}{run['val_loss']:.4f}{mark}",
                             f"{run['recall']:.3f}" if "recall" in run else ""])
        return markdown(["", "rate", "of the table or experts", "validation loss",
                         "facts recalled"], rows)
    return table


# ---- the documents

SIZES = ("parameters", "FLOPs per token", "facts recalled", "unseen phrasing", "validation loss",
         "bits per parameter", "training time")
TABLES = {
    "README.md": {
        "short": of_kinds(SHORT, "facts recalled", "FLOPs per token", "parameters",
                          "training time"),
    },
    "docs/results.md": {
        "main": of_kinds(MAIN, "seeds", "facts recalled", "unseen phrasing", "validation loss",
                         "bits stored", "bits per parameter"),
        "slots": of_kinds(SIZES_OF_TABLES | {"dense": "facts-dense"}, "seeds", "slots used",
                          "parameters", "FLOPs per token", "facts recalled", "validation loss",
                          "training time"),
        "names": names,
        "own": of_kinds(OWN_KINDS, "facts recalled", "read 4-7", "read 16-31", "read 64-127",
                        "never (control)", "validation loss", "FLOPs per token", "parameters"),
        "text": of_kinds(TEXT_KINDS, "validation loss", "dense in that time, about",
                         "training time", "tokens", "FLOPs per token", "parameters",
                         "peak memory, MiB"),
        "teach": teach,
    },
    "docs/appendix.md": {
        "cost": of_kinds(MAIN, "tokens", "FLOPs per token", "parameters", "active",
                         "training time", "peak memory, MiB", "slots used", "KL"),
        "exposures": of_kinds(MAIN, *[f"read {times}" for times in READ], "never (control)"),
        "scaling": of_kinds(DENSE | EXPERTS, *SIZES),
        "reads": of_kinds(READS, "FLOPs per token", "facts recalled"),
        "row": of_kinds(ROW, "seeds", "facts recalled", "validation loss", "slots used"),
        "row_tuning": by_seed(ROW_TUNING),
        "tuning": tuning(TUNED),
        "own_tuning": tuning(OWN_KINDS),
        "text_tuning": tuning(TUNED_TEXT),
        "variants": by_seed(VARIANTS),
        "older": of_kinds(OLDER, "seeds", "facts recalled", "validation loss"),
    },
    "docs/speed.md": {"steps": steps},
}
END = "<!-- report: end -->"


def with_table(text, name, table):
    """The text of a document in which this table is new."""
    begin = f"<!-- report: {name} -->"
    if begin not in text:
        raise ValueError(f"a document of TABLES has no {begin}: put it where the table belongs, "
                         f"and {END} after it")
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(END)
    return f"{before}{begin}\n{table}\n{END}{after}"


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
        for name, table in tables.items():
            texts[document] = with_table(texts[document], name, table(runs))
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
