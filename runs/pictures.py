"""The pictures of README.md and docs/, from runs/results/. runs/report.py draws them.

A function draw_... takes all runs and a figure, and draws one picture into it.
"""
import statistics

from results import DENSE, EXPERTS, SLOTS, STEP_OF, read, recall_at, seeds, values

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


def draw_line(ax, x, columns, label, color, style):
    """The mean over seeds, and one standard deviation to either side as a band.

    columns: the numbers of the seeds, a list for each point.
    """
    means = [statistics.mean(column) for column in columns]
    deviations = [statistics.stdev(column) for column in columns]
    low = [mean - deviation for mean, deviation in zip(means, deviations)]
    high = [mean + deviation for mean, deviation in zip(means, deviations)]
    ax.plot(x, means, style, color=color, lw=2, ms=5, label=label)
    ax.fill_between(x, low, high, color=color, alpha=0.2, lw=0)


def recall_axis(ax):
    """From 0 to 100%, with a little room above."""
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
    ax.set_ylim(0, 1.03)
    ax.set_ylabel("facts recalled")


def draw_facts(runs, figure):
    """Recall over how often a fact was read, of memory, its rivals and dense."""
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
        results = seeds(runs, kind)
        # A row holds, for example, the facts that were read 4 to 7 times. Its point stands at the
        # geometric mean of 4 and 7. Only a handful of facts were read more often than 1,023 times.
        rows = [row for row in results[0]["recall_by_exposures"] if 0 < row["from"] < 1024]
        x = [(row["from"] * (row["to"] - 1)) ** 0.5 for row in rows]
        columns = [[recall_at(result, row["from"]) for result in results] for row in rows]
        draw_line(ax, x, columns, label, color, style)
    ax.set_xscale("log", base=2)
    ticks = [1, 4, 16, 64, 256]
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.set_xlabel("times the fact was read in training")
    recall_axis(ax)
    ax.set_title("Who remembers rare facts?", loc="left")
    ax.legend(loc="lower right")


def draw_slots(runs, figure):
    """Recall and step time over the number of slots, beside dense models of three widths."""
    ax, right = figure.subplots(1, 2)
    slots = [int(title.replace(",", "")) for title in SLOTS]
    columns = [values(runs, kind, "recall") for kind in SLOTS.values()]
    flat = {
        "Dense, 4 times the FLOPs": ("facts-dense4", ORANGE, "--"),
        "Dense, 2 times the FLOPs": ("facts-dense2", LIGHT_BLUE, "-."),
        "Dense, same FLOPs": ("facts-dense", BLUE, "-"),
    }
    draw_line(ax, slots, columns, "Memory", GREEN, "o-")
    adamw = [values(runs, kind.replace("facts", "adamw"), "recall")
             for kind in list(SLOTS.values())[:-1]]  # not of the largest table
    draw_line(ax, slots[:-1], adamw, "Memory, AdamW on the table", PURPLE, "o--")
    ends = [slots[0] / 1.2, slots[-1] * 1.2]
    for label, (kind, color, style) in flat.items():
        draw_line(ax, ends, [values(runs, kind, "recall")] * 2, label, color, style)
    steps = {title: step["ratio"][1] for title, step in read("steps").items()}
    right.plot(slots, [steps[STEP_OF[kind]] for kind in SLOTS.values()], "o-", color=GREEN, lw=2)
    with_adamw = {int(title.split()[1].replace(",", "")): ratio
                  for title, ratio in steps.items() if title.endswith("AdamW")}
    right.plot(with_adamw.keys(), with_adamw.values(), "o--", color=PURPLE, lw=2)
    for kind, color, style in flat.values():
        right.plot(ends, [steps[STEP_OF[kind]]] * 2, style, color=color, lw=2)
    for panel in (ax, right):
        panel.set_xscale("log", base=4)
        panel.set_xlim(*ends)
        panel.set_xticks(slots, ["1 K", "4 K", "16 K", "64 K", "256 K", "1 M"])
        panel.set_xlabel("slots in the table")
    recall_axis(ax)
    ax.set_title("More slots, more facts", loc="left")
    ax.legend(loc="upper left", fontsize=10)
    right.set_ylim(0)
    right.set_ylabel("time of a step, dense = 1")
    right.set_title("What they cost", loc="left")


def draw_scaling(runs, figure):
    """Recall over parameters and over FLOPs, of tables, experts and widths."""
    kinds = {
        "Memory, more slots": (SLOTS, GREEN),
        "Dense, wider": (DENSE, BLUE),
        "MoE, larger": (EXPERTS, RED),
    }
    # Title of the horizontal axis: millions to mark on it, and what is drawn there.
    sizes = {
        "parameters, million": ([0.2, 0.5, 1, 2, 5, 10], lambda run: run["params"]["total"]),
        "FLOPs per token, million": ([1, 2, 5, 10], lambda run: run["flops_per_token"]),
    }
    axes = figure.subplots(1, 2, sharey=True)
    for ax, (name, (ticks, size)) in zip(axes, sizes.items()):
        for label, (titles, color) in kinds.items():
            x = [size(seeds(runs, kind)[0]) for kind in titles.values()]
            columns = [values(runs, kind, "recall") for kind in titles.values()]
            draw_line(ax, x, columns, label, color, "o-")
        ax.set_xscale("log")
        ax.set_xticks([1e6 * tick for tick in ticks], [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
        ax.set_xlabel(name)
    recall_axis(axes[0])
    axes[0].set_title("More slots, experts or width?", loc="left")
    axes[0].legend(loc="upper left")


# File: what draws it, and its width and height in inches.
PICTURES = {
    "facts.png": (draw_facts, 6, 4.5),
    "slots.png": (draw_slots, 10, 4.5),
    "scaling.png": (draw_scaling, 10, 4.5),
}


def draw(runs, draw_into, path, width=6, height=4.5):
    """Draw a picture and save it."""
    import matplotlib
    from matplotlib.figure import Figure
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw_into(runs, figure)
        figure.savefig(path, dpi=100)
