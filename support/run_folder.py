"""A folder out/<run>: who writes in it, its log, and what a run says."""
import contextlib
import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import kernel
from support.files import first_line, locked, size_of, write_json, write_text, write_whole
from support.terminal import say_problem


# ---- the folder

@contextlib.contextmanager
def own_folder(s, rank, resume):
    """Keep other processes from writing into the run folder in this block.

    A run that was killed may need some seconds to end. Another one that resumes it waits for that.
    """
    if rank:
        yield
        return
    out = Path(s.out_dir)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".lock").touch()
    except OSError as e:
        raise ValueError(f"cannot write in {out} ({first_line(e)}): choose another --out-dir; to "
                         f"go on with a run that can only be read, copy it first") from None
    message = (f"another run is writing to {out}: wait for its end, or start this one with "
               f"--out-dir out/NAME")
    with locked(out / ".lock", 10 if resume else 0, message):
        yield


def is_over(s, resume, rank):
    """Whether --resume finds a finished run, and says so.

    Raises ValueError on rank 0 if the folder holds a run and --resume was not given.
    """
    out = Path(s.out_dir)
    is_finished = (out / "result.json").is_file()
    has_run = is_finished or (out / "ckpt.pt").exists()
    if rank == 0 and has_run and not resume:
        raise ValueError(f"{out} holds a run already: go on with it by --resume, or start another "
                         f"with --out-dir out/NAME")
    if rank == 0 and resume and is_finished:
        print(f"{out} has finished its {s.max_steps} steps. To go on from its weights, start "
              f"another run: --init-from {out} --out-dir out/NAME")
    return resume and is_finished


def prepare_folder(s, preset, step, hardware):
    """Write config.json, and what sampling needs of the data, so that the folder stands alone.

    A run that is resumed at `step` drops what it logged after that.
    """
    out = Path(s.out_dir)
    for name in ("meta.json", "tokenizer.tiktoken", "recall.npz"):
        if (Path(s.data) / name).exists():
            # The content alone: the original may be read-only, and its copy must not be.
            write_whole(out / name, lambda part: shutil.copyfile(Path(s.data) / name, part))
    kept = []
    for line in logged_lines(out) if step else []:
        # On --resume, Run.finish logs the last step again: its old line goes.
        if line["step"] <= step and line["step"] < s.max_steps:
            kept.append(json.dumps(line) + "\n")
    write_text(out / "log.jsonl", "".join(kept))
    versions = dict(python=platform.python_version(), torch=torch.__version__,
                    numpy=np.__version__)
    write_json(out / "config.json", dict(
        settings=dataclasses.asdict(s), preset=preset, command=" ".join(sys.argv),
        git=git_commit(), hardware=hardware, versions=versions))


def logged_lines(out):
    """The lines of log.jsonl. One that was cut off is left out."""
    lines = []
    if (out / "log.jsonl").is_file():
        for text in (out / "log.jsonl").read_text("utf-8", "replace").splitlines():
            with contextlib.suppress(ValueError):
                line = json.loads(text)
                if isinstance(line, dict) and isinstance(line.get("step"), int):
                    lines.append(line)
    return lines


def add_to_log(out, line):
    """Append a line, a dict, to log.jsonl. A full disk costs this line, not the run."""
    path = out / "log.jsonl"
    size = size_of(path)
    try:
        with open(path, "a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")
    except OSError as e:
        with contextlib.suppress(OSError):
            os.truncate(path, size)  # a part of it may have been written
        say_problem("train.py", f"cannot write {path} ({first_line(e)}): the line of step "
                                f"{line['step']} is lost, and the run goes on")


def git_commit():
    """The commit of this code, or "" if that is not known."""
    if not shutil.which("git"):
        return ""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True,
                         cwd=Path(__file__).parents[1])
    return git.stdout.strip()


# ---- what a run prints

def describe_run(trainer, preset, hardware):
    """The first lines of a run."""
    s = trainer.s
    model = trainer.model
    counts = model.param_counts()
    compiled = "on" if trainer.compiled else "off"
    memory = "no memory layers"
    if model.table:
        memory = kernel.describe_backend(trainer.device)
        if trainer.P > 1:
            memory += f"; table in {trainer.P} slices"
    parts = " + ".join(f"{counts[name]:,} {name}"
                       for name in ("embedding", "dense", "half_keys", "values", "experts")
                       if name in counts)
    epochs = s.max_steps * s.batch_size / trainer.loader.windows
    tokens = f"{len(trainer.loader.tokens):,} tokens"
    name = s.out_dir if trainer.steps_done else preset  # a resumed run may be of any preset
    lines = [
        f"{name} · {s.ffn} · seed {s.seed} · {hardware} x {trainer.world} · "
        f"torch {torch.__version__} · compile {compiled}",
        memory,
        f"parameters: {parts} = {counts['total']:,}, active {counts['active']:,} · "
        f"{model.flops_per_token():,} FLOPs per token",
        f"data: {s.data}, {tokens}; {s.max_steps} steps of {s.batch_size * s.block_size:,} "
        f"read it {epochs:.2f} times",
    ]
    if trainer.steps_done:
        lines[-1] += f" · resumed at step {trainer.steps_done}"
    elif s.init_from:
        lines[-1] += f" · begins with the weights of {s.init_from}"
    return "\n".join(lines)


def log_text(line, s, seconds_per_step, flops, peak):
    """The line of a step. line: what log.jsonl gets; peak: FLOP/s of the hardware or None."""
    step = line["step"]
    rate = s.batch_size * s.block_size / seconds_per_step  # tokens per second
    minutes_left = seconds_per_step * (s.max_steps - step) / 60
    parts = [f"step {step:6d} {100 * step / s.max_steps:3.0f}%",
             f"loss {line['loss']:.4f}", f"lr {line['lr']:.1e}", f"norm {line['norm']:.2f}",
             f"{1e3 * seconds_per_step:.0f} ms", f"{rate:,.0f} tok/s"]
    if peak:
        parts.append(f"MFU {100 * rate * flops / peak:.0f}%")
    if line["memory_usage"] is not None:
        parts.append(f"slots used {100 * line['memory_usage']:.0f}% KL {line['memory_kl']:.2f}")
    parts.append(f"{minutes_left:.1f} min left")
    return " · ".join(parts)


def evaluation_text(line):
    """The line of an evaluation. line: what log.jsonl gets."""
    parts = [" " * 11 + " evaluation", f"val loss {line['val_loss']:.4f}"]
    if "recall" in line:
        parts.append(f"recall {line['recall']:.3f}")
    return " · ".join(parts)


def report(result):
    """The closing block of a run, from its result.json: numbers, then recall by exposures."""
    plain = result | {f"params_{name}": n for name, n in result["params"].items()}
    lines = ["---"]
    for name, value in plain.items():
        if isinstance(value, float):
            lines.append(f"{name:22s} {value:.4f}")
        elif isinstance(value, (int, str)):
            lines.append(f"{name:22s} {value}")
    if "recall" in result:
        lines += ["", " times read   facts   recalled"]
        for row in result["recall_by_exposures"]:
            bar = "#" * round(40 * row["recall"])
            lines.append(f"{exposure_label(row):>11s} {row['facts']:7d}   "
                         f"{100 * row['recall']:5.1f} %  {bar}")
        if result["recall_control"] is not None:
            control = 100 * result["recall_control"]
            lines.append(f"never in the text (control)  {control:5.1f} %")
    return "\n".join(lines)


def exposure_label(row):
    """How often the facts of a row were read: 1, 2 - 3, 4 - 7, ..."""
    low = row["from"]
    if row["to"] is None:
        return f"{low} - "
    if low + 1 == row["to"]:
        return f"{low}"
    return f"{low} - {row['to'] - 1}"
