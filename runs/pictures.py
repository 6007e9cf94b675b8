"""The pictures of README.md and docs/, from runs/results/. runs/report.py draws them.

A function draw_... takes all runs and a figure, and draws one picture into it.
"""
import statistics

import numpy as np

from results import (DENSE, EXPERTS, SLOTS, TEXT, TEXTS, TWICE, recall_at, seeds, text_time, values)

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


def draw_exposures(ax, results, label, color, style, end):
    """A line of recall over how often a fact was read, less than `end` times.

    A row of the results holds, for example, the facts that were read 4 to 7 times. Its point stands
    at the geometric mean of 4 and 7.
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


def draw_text(runs, figure):
    """Validation loss over training time, on two texts. A point for each seed.

    A line joins the means of a kind with that of twice the steps.
    """
    kinds = {
        "dense": (BLUE, "^"),
        "MoE": (RED, "x"),
        "Memory+": (PURPLE, "D"),
        "Memory": (GREEN, "o"),
        "hash": (ORANGE, "s"),
    }
    axes = figure.subplots(1, 2)
    for ax, text in zip(axes, TEXTS):
        for kind, (color, marker) in kinds.items():
            titles = [title for title in (kind, kind + TWICE) if title in TEXT]
            times = [text_time(runs, text, title) for title in titles]
            columns = [values(runs, f"text-{text}-{TEXT[title]}", "val_loss") for title in titles]
            x = np.repeat(times, [len(column) for column in columns])
            ax.plot(x, np.concatenate(columns), marker, color=color, ms=6, label=kind)
            ax.plot(times, [statistics.mean(column) for column in columns], "--", color=color)
        ax.set_xscale("log")  # as dense_for_as_long interpolates
        ax.set_xticks([1, 1.5, 2, 2.5], ["1", "1.5", "2", "2.5"])
        ax.minorticks_off()
        ax.set_xlabel("training time, dense = 1")
        ax.set_title(text, loc="left")
    axes[0].set_ylabel("validation loss")
    axes[1].legend()


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
    adamw = [values(runs, kind.replace("facts", "adamw"), "recall") for kind in SLOTS.values()]
    draw_line(ax, slots, adamw, "Memory, AdamW on the table", PURPLE, "o--")
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
    """Recall and loss over parameters and FLOPs, of tables, experts and widths."""
    kinds = {
        "Memory, more slots": (SLOTS, GREEN),
        "Dense, wider": (DENSE, BLUE),
        "MoE, larger": (EXPERTS, RED),
    }
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for label, (titles, color) in kinds.items():
        first = [seeds(runs, kind)[0] for kind in titles.values()]
        parameters = [result["params"]["total"] for result in first]
        flops = [result["flops_per_token"] for result in first]
        for row, key in zip(axes, ("recall", "val_loss")):
            columns = [values(runs, kind, key) for kind in titles.values()]
            draw_line(row[0], parameters, columns, label, color, "o-")
            draw_line(row[1], flops, columns, label, color, "o-")
    sizes = {"parameters, million": [0.2, 0.5, 1, 2, 5, 10],
             "FLOPs per token, million": [1, 2, 5, 10]}
    for ax, (name, ticks) in zip(axes[1], sizes.items()):
        ax.set_xscale("log")
        ax.set_xticks([1e6 * tick for tick in ticks], [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
        ax.set_xlabel(name)
    recall_axis(axes[0, 0])
    axes[0, 0].set_title("More slots, experts or width?", loc="left")
    axes[0, 0].legend(loc="upper left")
    axes[1, 0].set_ylabel("validation loss")


# File: what draws it, and its width and height in inches.
PICTURES = {
    "facts.png": (draw_facts, 6, 4.5),
    "slots.png": (draw_slots, 6, 4.5),
    "own_facts.png": (draw_own, 10, 4.5),
    "text.png": (draw_text, 10, 4.5),
    "scaling.png": (draw_scaling, 10, 7),
}


def draw(runs, draw_into, path, width=6, height=4.5):
    """Draw a picture and save it."""
    import matplotlib
    from matplotlib.figure import Figure
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw_into(runs, figure)
        figure.savefig(path, dpi=100)
