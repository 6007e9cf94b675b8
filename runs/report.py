"""Every table and picture of recall in README.md and docs/, from assets/facts.json.

    python runs/report.py              # print the tables, draw assets/{facts,slots}.png
    python runs/report.py --collect    # first take over the result of every finished run in out/

assets/facts.json holds the result.json of each run, under the name of its folder. Runs that differ
by their seed alone have names that end in -1, -2 and -3. Each of them is one kind of run here: a
number is the mean of the three, and what follows ± is their standard deviation.
"""
import argparse
import json
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from prepare_data import reading, steady_output

FACTS = ROOT / "assets" / "facts.json"
OUT = ROOT / "out"

MAIN = {
    "Memory": "facts-memory",
    "Memory+": "facts-plus",
    "dense": "facts-dense",
    "dense, equal time": "facts-dense-long",
}
SLOTS = {
    "1,024": "facts-n32",
    "4,096": "facts-n64",
    "16,384": "facts-memory",
    "65,536": "facts-n256",
    "262,144": "facts-n512",
}
DENSE = {
    "dense": "facts-dense",
    "dense, twice as wide": "facts-dense-128",
}
# The flags of each run of runs/tuning.sh and of the runs it is compared with, all with --seed 1.
TRIED = {
    "`--ffn dense --learning-rate 1.5e-3`": "dense-lr1.5e-3",
    "`--ffn dense` (3e-3)": "facts-dense-1",
    "`--ffn dense --learning-rate 6e-3`": "dense-lr6e-3",
    "`--value-lr 1e-2`": "memory-vlr1e-2",
    "`--value-lr 2e-2`": "memory-vlr2e-2",
    "the default: 3e-3, `--value-lr 4e-2`, `--mem-heads 4 --mem-topk 32`": "facts-memory-1",
    "`--value-lr 8e-2`": "memory-vlr8e-2",
    "`--learning-rate 1.5e-3`": "memory-lr1.5e-3",
    "`--learning-rate 1.5e-3 --value-lr 2e-2`": "memory-lr1.5e-3-vlr2e-2",
    "`--learning-rate 6e-3 --value-lr 2e-2`": "memory-lr6e-3-vlr2e-2",
    "`--mem-topk 8`": "facts-k8-1",
    "`--mem-heads 2`": "memory-h2",
    "`--mem-gate --qk-norm` (Memory+)": "facts-plus-1",
    "`--mem-gate --value-lr 2e-2`": "memory-gate-vlr2e-2",
    "`--qk-norm --value-lr 2e-2`": "memory-qknorm-vlr2e-2",
    "`--mem-gate --qk-norm --value-lr 5e-3`": "plus-vlr5e-3",
    "`--mem-gate --qk-norm --value-lr 2e-2`": "plus-vlr2e-2",
    "`--mem-gate --qk-norm --value-lr 8e-2`": "plus-vlr8e-2",
    "`--mem-gate --qk-norm --value-lr 2e-2 --learning-rate 1.5e-3`": "plus-lr1.5e-3-vlr2e-2",
    "`--mem-gate --qk-norm --value-lr 2e-2 --learning-rate 6e-3`": "plus-lr6e-3-vlr2e-2",
    "`--mem-gate --qk-norm --value-lr 2e-2 --mem-layers 1,2 --mem-topk 16` "
    "(two layers, one table)": "plus-two-layers",
    "`--ffn dense --n-embd 128 --learning-rate 1.5e-3`": "facts-dense-128-1",
    "`--ffn dense --n-embd 128` (3e-3)": "facts-dense-128-lr3e-3",
    "`--ffn dense --n-embd 128 --learning-rate 7.5e-4`": "facts-dense-128-lr7.5e-4",
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
            for key in ("vocab_size", "block_size", "max_steps"):
                result[key] = settings[key]
            result["recall"]  # KeyError if this is no result on the facts
        runs[path.parent.name] = result
        names.append(path.parent.name)
    part = FACTS.with_suffix(".part")  # renamed when it is whole, so that a full disk harms nothing
    part.write_text(json.dumps(runs, indent=1) + "\n", "utf-8")
    part.replace(FACTS)
    return names


def seeds(runs, kind):
    """The results of one kind of run: those of its seeds."""
    of_kind = re.compile(re.escape(kind) + r"-\d")
    found = [result for name, result in runs.items() if of_kind.fullmatch(name)]
    if len(found) < 2:
        raise SystemExit(f"report.py: {FACTS} has {len(found)} run(s) named {kind}-SEED, "
                         f"a mean and its spread take at least 2")
    return found


def values(runs, kind, key, factor=1):
    """One number of each seed of a kind of run."""
    return [factor * result[key] for result in seeds(runs, kind)]


def spread(numbers, digits):
    """mean ± standard deviation"""
    return f"{statistics.mean(numbers):.{digits}f} ± {statistics.stdev(numbers):.{digits}f}"


def recall_at(result, times):
    """The recall of the facts that were read `times` times: row `from` <= times < `to`."""
    for row in result["recall_by_exposures"]:
        if row["from"] == times:
            return row["recall"]
    raise KeyError(times)


# ---- tables

def markdown(head, rows):
    """A Markdown table. head: titles; rows: lists of as many cells."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def short_table(runs):
    """The table on the first screen of README.md."""
    kinds = {
        "Memory": "facts-memory",
        "Dense, same FLOPs": "facts-dense",
        "Dense, same training time": "facts-dense-long",
    }
    recall = ["facts recalled"]
    flops = ["FLOPs per token"]
    parameters = ["parameters"]
    seconds = ["training seconds"]
    for kind in kinds.values():
        recall.append(spread(values(runs, kind, "recall"), 3))
        flops.append(f"{seeds(runs, kind)[0]['flops_per_token']:,}")
        parameters.append(f"{seeds(runs, kind)[0]['params']['total']:,}")
        seconds.append(spread(values(runs, kind, "seconds"), 0))
    return markdown(["", *kinds], [recall, flops, parameters, seconds])


def main_table(runs):
    head = ["", "facts recalled", "unseen phrasing", "validation loss", "tokens",
            "training seconds", "FLOPs per token", "parameters (active)",
            "peak memory of the process, MiB"]
    rows = []
    for title, kind in MAIN.items():
        first = seeds(runs, kind)[0]
        rows.append([
            title,
            spread(values(runs, kind, "recall"), 3),
            spread(values(runs, kind, "recall_unseen_phrasing"), 3),
            spread(values(runs, kind, "val_loss"), 3),
            f"{first['tokens'] / 1e6:.2f} M",
            spread(values(runs, kind, "seconds"), 0),
            f"{first['flops_per_token']:,}",
            f"{first['params']['total']:,} ({first['params']['active']:,})",
            spread(values(runs, kind, "peak_memory_bytes", 2**-20), 0),
        ])
    return markdown(head, rows)


def exposures_table(runs):
    """Recall by how often a fact was read."""
    times = {"1": 1, "2-3": 2, "4-7": 4, "8-15": 8, "16-31": 16, "32-63": 32}
    rows = []
    for title, kind in MAIN.items():
        row = [title]
        for low in times.values():
            row.append(spread([recall_at(result, low) for result in seeds(runs, kind)], 2))
        row.append(spread(values(runs, kind, "recall_control"), 3))
        rows.append(row)
    return markdown(["times read", *times, "never (control)"], rows)


def bits_table(runs):
    rows = [[title, spread(values(runs, kind, "bits_stored"), 0),
             spread(values(runs, kind, "bits_per_param"), 3)]
            for title, kind in (MAIN | {"65,536 slots": SLOTS["65,536"],
                                        "262,144 slots": SLOTS["262,144"]}).items()]
    return markdown(["", "bits stored", "bits per parameter"], rows)


def slots_table(runs):
    head = ["slots", "parameters", "FLOPs per token", "facts recalled", "unseen phrasing",
            "validation loss", "slots used", "training seconds"]
    rows = []
    for title, kind in (SLOTS | DENSE).items():
        first = seeds(runs, kind)[0]
        used = ""
        if first["memory_usage"] is not None:
            used = f"{100 * statistics.mean(values(runs, kind, 'memory_usage')):.0f}%"
        rows.append([
            title,
            f"{first['params']['total']:,}",
            f"{first['flops_per_token']:,}",
            spread(values(runs, kind, "recall"), 3),
            spread(values(runs, kind, "recall_unseen_phrasing"), 3),
            spread(values(runs, kind, "val_loss"), 3),
            used,
            spread(values(runs, kind, "seconds"), 0),
        ])
    return markdown(head, rows)


def reads_table(runs):
    kinds = {"32 (the default)": "facts-memory", "8": "facts-k8"}
    rows = [[title, f"{seeds(runs, kind)[0]['flops_per_token']:,}",
             spread(values(runs, kind, "recall"), 3), spread(values(runs, kind, "seconds"), 0)]
            for title, kind in kinds.items()]
    return markdown(["`--mem-topk`", "FLOPs per token", "facts recalled", "training seconds"], rows)


def tuning_table(runs):
    head = ["`python train.py --seed 1 --out-dir out/NAME` with", "NAME", "facts recalled"]
    rows = [[flags, f"`{name}`", f"{runs[name]['recall']:.3f}"] for flags, name in TRIED.items()]
    return markdown(head, rows)


def bfloat16_table(runs):
    kinds = {"float32": "facts-plus-2e-2", "bfloat16": "facts-bf16"}
    rows = [[title, spread(values(runs, kind, "recall"), 3),
             spread(values(runs, kind, "val_loss"), 3), spread(values(runs, kind, "seconds"), 0)]
            for title, kind in kinds.items()]
    return markdown(["table held in", "facts recalled", "validation loss", "training seconds"],
                    rows)


def ranks_table(runs):
    kinds = {"one process": "facts-memory", "two processes": "facts-2ranks"}
    rows = [[title, spread(values(runs, kind, "recall"), 3),
             spread(values(runs, kind, "val_loss"), 3), spread(values(runs, kind, "seconds"), 0)]
            for title, kind in kinds.items()]
    return markdown(["", "facts recalled", "validation loss", "training seconds"], rows)


# Where each table stands.
TABLES = {
    "README.md": [short_table],
    "docs/results.md": [main_table, exposures_table, bits_table, slots_table, reads_table,
                        tuning_table, bfloat16_table],
    "docs/parallel.md": [ranks_table],
}


# ---- pictures

STYLE = {
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
}
GREEN, BLUE, ORANGE, GRAY = "#2b8a5a", "#2f6db5", "#d9822b", "#6b6b6b"


def mean_and_deviation(columns):
    """Lists of the seeds' numbers, one list for each point -> means, standard deviations."""
    return [statistics.mean(c) for c in columns], [statistics.stdev(c) for c in columns]


def draw_line(ax, x, columns, label, color, style):
    """The mean over seeds, and one standard deviation to either side as a band."""
    mean, deviation = mean_and_deviation(columns)
    low = [max(m - d, 0) for m, d in zip(mean, deviation)]
    high = [min(m + d, 1) for m, d in zip(mean, deviation)]
    ax.plot(x, mean, style, color=color, lw=2, ms=5, label=label)
    ax.fill_between(x, low, high, color=color, alpha=0.2, lw=0)


def draw_facts(runs, figure):
    """Recall over exposures, of memory and of dense."""
    lines = {
        "Memory, 16,384 slots": ("facts-memory", GREEN, "o-"),
        "Dense, same training time": ("facts-dense-long", ORANGE, "s--"),
        "Dense, same FLOPs": ("facts-dense", BLUE, "^-"),
    }
    ax = figure.subplots()
    for label, (kind, color, style) in lines.items():
        results = seeds(runs, kind)
        # The last row, 1,024 times or more, holds a handful of facts.
        rows = [row for row in results[0]["recall_by_exposures"] if 0 < row["from"] < 1024]
        # A row holds the facts that were read from 4 to 7 times, say: it stands at the geometric
        # middle of that.
        x = [(row["from"] * (row["to"] - 1)) ** 0.5 for row in rows]
        columns = [[recall_at(result, row["from"]) for result in results] for row in rows]
        draw_line(ax, x, columns, label, color, style)
    ax.set_xscale("log", base=2)
    ticks = [1, 4, 16, 64, 256]
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
    ax.set_ylim(0, 1.03)
    ax.set_xlabel("times the fact was read in training")
    ax.set_ylabel("facts recalled")
    ax.set_title("Who remembers rare facts?", loc="left")
    ax.legend(loc="lower right")


def draw_slots(runs, figure):
    """Recall over the number of slots, beside dense models of two widths."""
    ax = figure.subplots()
    slots = [int(title.replace(",", "")) for title in SLOTS]
    columns = [values(runs, kind, "recall") for kind in SLOTS.values()]
    flat = {
        "Dense, twice as wide (3.4 times the FLOPs)": ("facts-dense-128", ORANGE, "--"),
        "Dense, same width": ("facts-dense", BLUE, "-"),
    }
    draw_line(ax, slots, columns, "Memory", GREEN, "o-")
    ends = [slots[0] / 1.2, slots[-1] * 1.2]
    for label, (kind, color, style) in flat.items():
        draw_line(ax, ends, [values(runs, kind, "recall")] * 2, label, color, style)
    ax.set_xscale("log", base=2)
    ax.set_xlim(*ends)
    ax.set_xticks(slots, list(SLOTS))
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
    ax.set_ylim(0, 1.03)
    ax.set_xlabel("slots in the table")
    ax.set_ylabel("facts recalled")
    ax.set_title("More slots, more facts", loc="left")
    ax.legend(loc="upper left")


def draw(runs, draw_into, path):
    import matplotlib
    from matplotlib.figure import Figure
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6, 4.5), layout="constrained")
        draw_into(runs, figure)
        figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", action="store_true",
                        help="put the results of out/* into assets/facts.json first")
    args = parser.parse_args()
    if args.collect:
        print("collected:", " ".join(collect()) or "nothing, out/ has no finished run")
    runs = load()
    for document, tables in TABLES.items():
        for table in tables:
            title = table.__name__.replace("_", " ")
            print(f"\n{document}, {title}:\n\n{table(runs)}")
    draw(runs, draw_facts, ROOT / "assets" / "facts.png")
    draw(runs, draw_slots, ROOT / "assets" / "slots.png")
    print("\ndrawn: assets/facts.png and assets/slots.png")


if __name__ == "__main__":
    steady_output()
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit("report.py: " + " ".join(str(error).split()))
