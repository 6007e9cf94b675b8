"""Curves of runs, and runs side by side."""
import json
import warnings
from dataclasses import fields
from pathlib import Path

import numpy as np

from model import GPTConfig, kind_of
from support.data_folder import read_meta
from support.files import first_line, read_json, reading, write_whole
from support.settings import MAY_CHANGE, read_config


def read_run(folder):
    """A finished run -> dict with its name, result (result.json), kind, label and log.

    kind: the corpus, and the settings without those that may differ between runs of one experiment.
    log: the lines of log.jsonl.
    """
    folder = Path(folder)
    way_out = "give folders of finished runs, as out/NAME"
    result = read_json(folder / "result.json", way_out)
    settings = read_config(folder)["settings"]
    corpus = read_meta(folder)["sha256"]
    with reading(folder / "log.jsonl", way_out):
        text = (folder / "log.jsonl").read_text("utf-8")
        log = [json.loads(line) for line in text.splitlines()]
        if not any("val_loss" in line for line in log):
            raise ValueError("it has no evaluation")
        for line in log:
            for key in ("tokens", "seconds"):
                line[key] + 0  # KeyError or TypeError if this is no log of ours
    with reading(folder / "result.json", way_out):
        for key in ("tokens", "seconds", "flops_per_token", "val_loss"):
            result[key] + 0
    differ = {"seed", "out_dir", *MAY_CHANGE}
    same = {name: value for name, value in settings.items() if name not in differ}
    kind = json.dumps([same, corpus])
    return dict(name=folder.name, result=result, kind=kind, label=label(settings), log=log)


def label(settings):
    """What a picture calls runs with these settings, a dict."""
    known = {f.name for f in fields(GPTConfig)}
    config = GPTConfig(**{name: settings[name] for name in known & settings.keys()})
    return kind_of(config).label(config)


def by_kind(runs):
    """Runs -> lists of runs that differ by their seed only."""
    groups = {}
    for run in runs:
        groups.setdefault(run["kind"], []).append(run)
    return list(groups.values())


def draw(folders, path):
    """Loss over tokens, FLOPs and seconds; with facts also recall over those and over exposures.

    Runs that differ by their seed only are one line, their mean, and a band, plus and minus their
    standard deviation.
    """
    from matplotlib.figure import Figure
    runs = [read_run(folder) for folder in folders]
    with_facts = all("recall" in run["result"] for run in runs)
    fig = Figure(figsize=(15, 8 if with_facts else 4), layout="constrained")
    axes = fig.subplots(2 if with_facts else 1, 3, squeeze=False)
    groups = by_kind(runs)
    labels = [group[0]["label"] for group in groups]
    for group in groups:
        first = group[0]
        name = first["label"]
        if labels.count(name) > 1:
            name += f" ({first['name']})"
        if len(group) > 1:
            name += f", {len(group)} seeds"
        draw_curves(axes, group, name, with_facts)
    if len(runs) == 1:
        log = runs[0]["log"]
        axes[0, 0].plot([line["tokens"] for line in log], [line["loss"] for line in log],
                        lw=0.5, color="gray", label="training loss of single steps")
    axes[0, 0].legend(fontsize=8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # such letters become boxes
        write_whole(path, lambda part: fig.savefig(part, dpi=80, format="png"))


def try_to_draw(folders, path):
    """draw() -> None, or what went wrong. A picture is not worth a run."""
    try:
        draw(folders, path)
    except (Exception, SystemExit) as e:  # no end to what a broken matplotlib can raise
        return f"no picture {path} ({first_line(e)})"


def draw_curves(axes, group, name, with_facts):
    """The curves of one kind of run in every panel."""
    logs = [[line for line in run["log"] if "val_loss" in line] for run in group]
    tokens = [line["tokens"] for line in logs[0]]
    seconds = np.mean([[line["seconds"] for line in log] for log in logs], axis=0)
    flops = [t * group[0]["result"]["flops_per_token"] for t in tokens]
    panels = [(axes[0, 0], "tokens read", tokens, "val_loss"),
              (axes[0, 1], "training FLOPs", flops, "val_loss"),
              (axes[0, 2], "training seconds", seconds, "val_loss")]
    if with_facts:
        panels += [(axes[1, 0], "tokens read", tokens, "recall"),
                   (axes[1, 1], "training seconds", seconds, "recall")]
    for ax, xlabel, x, key in panels:
        draw_band(ax, x, [[line[key] for line in log] for log in logs], name)
        words = {"val_loss": "validation loss (nats per token)", "recall": "facts recalled"}
        ax.set(xlabel=xlabel, ylabel=words[key])
    if with_facts:
        tables = [run["result"]["recall_by_exposures"] for run in group]
        rows = [[row for row in table if row["from"] > 0] for table in tables]
        x = [row["from"] for row in rows[0]]
        draw_band(axes[1, 2], x, [[row["recall"] for row in table] for table in rows], name)
        axes[1, 2].set(xlabel="times the fact was read (at least)", xscale="log",
                       ylabel="facts recalled")


def draw_band(ax, x, curves, name):
    """The mean of some curves over the same x, and a band of one standard deviation around it."""
    mean = np.mean(curves, axis=0)
    line, = ax.plot(x, mean, "o-", ms=3, label=name)
    if len(curves) > 1:
        std = np.std(curves, axis=0, ddof=1)
        ax.fill_between(x, mean - std, mean + std, color=line.get_color(), alpha=0.2, lw=0)


# Title of a column of --compare: (name in result.json, factor).
COLUMNS = {
    "tokens M": ("tokens", 1e-6), "seconds": ("seconds", 1), "tok/s k": ("tokens_per_s", 1e-3),
    "peak MiB": ("peak_memory_bytes", 2**-20), "MFLOP/tok": ("flops_per_token", 1e-6),
    "val loss": ("val_loss", 1), "recall": ("recall", 1),
    "unseen phr.": ("recall_unseen_phrasing", 1), "bits/param": ("bits_per_param", 1),
}


def compare(folders, out=""):
    """Print runs side by side, the mean and spread of each kind, and ratios; draw compare.png.

    out: folder for the picture; "": the one that the first run is in.
    """
    runs = [read_run(folder) for folder in folders]
    print(f"{'run':36s}" + "".join(f"{title:>18s}" for title in COLUMNS))
    for run in runs:
        numbers = result_numbers(run)
        print(f"{run['name']:36s}" + "".join(f"{x:18.3f}" for x in numbers))
    groups = by_kind(runs)
    for group in groups:
        if len(group) > 1:
            numbers = np.array([result_numbers(run) for run in group])  # (runs, columns)
            spread = zip(numbers.mean(axis=0), numbers.std(axis=0, ddof=1))
            name = f"{group[0]['name']}, mean of {len(group)}"
            print(f"{name:36s}" + "".join(f"{m:9.3f} ±{std:7.3f}" for m, std in spread))
    means = [np.mean([result_numbers(run) for run in group], axis=0) for group in groups]
    for group, mean in zip(groups[1:], means[1:]):
        ratios = [f"{title} {a / b:.2f}" for title, a, b in zip(COLUMNS, mean, means[0]) if b]
        print(f"{group[0]['name']} / {groups[0][0]['name']}: " + " · ".join(ratios))
    picture = Path(out or Path(folders[0]).parent) / "compare.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    problem = try_to_draw(folders, picture)
    if problem:
        raise ValueError(f"{problem}; the table above is complete, and --out-dir names another "
                         f"folder for the picture, if that is the trouble")
    print(f"drawn: {picture}")


def result_numbers(run):
    """What the columns of --compare show of a run; 0 where it has none."""
    return [(run["result"].get(key) or 0) * factor for key, factor in COLUMNS.values()]
