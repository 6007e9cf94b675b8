"""
How much longer does a training step take with memory? Steps of several models, in turn.

    python tests/time_steps.py                    # dense, memory and its rivals, default size
    python tests/time_steps.py openwebtext --data data/web --batch-size 128     # compiled, on a GPU
    python tests/time_steps.py --study --json runs/results/steps.json   # all of docs/results.md
    python tests/time_steps.py --study --kind PEER --json runs/results/steps.json  # beside dense
    python tests/time_steps.py --nanogpt ../nanoGPT/model.py        # beside nanoGPT's own GPT
    python tests/time_steps.py --kind Memory --frozen   # beside Memory with a table that is frozen
    python tests/time_steps.py --profile --ffn dense    # where the time of 20 steps of a model goes

In turn, so that a machine whose speed changes from minute to minute is as fast for each. --seconds
says how long it measures (60). --kind, once or more, names what to time beside dense. --json keeps
the rows of a file that are not timed. The script takes any preset and flags of train.py; the data
must be there (python train.py makes that of the facts). Each model takes the steps it would take in
train.py.
"""
import argparse
import importlib.util
import itertools
import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from support import machine, settings, terminal

KINDS = {
    "dense": ["--ffn", "dense"],
    "Memory": ["--no-mem-gate", "--no-qk-norm"],
    "Memory+": ["--mem-gate", "--qk-norm"],
    "hash": ["--ffn", "hash"],
    "PEER": ["--ffn", "peer"],
    "UltraMem": ["--ffn", "ultramem"],
    "MoE": ["--ffn", "moe"],
}
# What else docs/results.md reports.
STUDY = KINDS | {
    "dense, 0.6 x FLOPs": ["--ffn", "dense", "--n-embd", "48"],
    "dense, 2 x FLOPs": ["--ffn", "dense", "--n-embd", "96"],
    "dense, 4 x FLOPs": ["--ffn", "dense", "--n-embd", "144"],
    "dense, 8 x FLOPs": ["--ffn", "dense", "--n-embd", "208"],
    "MoE, as 4,096 slots": ["--ffn", "moe", "--mem-n-keys", "64", "--moe-experts", "64"],
    "MoE, as 65,536 slots": ["--ffn", "moe", "--mem-n-keys", "256"],
    "Memory, 1,024 slots": ["--mem-n-keys", "32"],
    "Memory, 4,096 slots": ["--mem-n-keys", "64"],
    "Memory, 65,536 slots": ["--mem-n-keys", "256"],
    "Memory, 262,144 slots": ["--mem-n-keys", "512"],
    "Memory, 1,048,576 slots": ["--mem-n-keys", "1024"],
    "Memory, K = 8": ["--mem-topk", "8"],
}
# The same tables with another optimizer.
STUDY |= {
    f"Memory, {slots} slots, AdamW": ["--mem-n-keys", n, "--table-optimizer", "adamw"]
    for slots, n in (("16,384", "128"), ("65,536", "256"), ("262,144", "512"),
                     ("1,048,576", "1024"))}
LEAST_ROUNDS = 12


def trainer(argv):
    """The flags of a run -> (its train.Trainer, a function that takes its next step)."""
    s, _, _, _ = train.read_settings(argv)
    meta = settings.fit_to_data(s, world=1)
    device = machine.choose_device(s)
    run = train.Trainer(s, meta, device)
    numbers = itertools.count()
    return run, lambda: run.step(next(numbers))


class NanoGPT(torch.nn.Module):
    """nanoGPT's model of our dense model's size, to be trained by our Trainer."""

    def __init__(self, path, s):
        super().__init__()
        spec = importlib.util.spec_from_file_location("nanogpt", path)
        nanogpt = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(nanogpt)
        self.gpt = nanogpt.GPT(nanogpt.GPTConfig(
            block_size=s.block_size, vocab_size=s.vocab_size, n_layer=s.n_layer, n_head=s.n_head,
            n_embd=s.n_embd, dropout=s.dropout, bias=False))
        self.table = None

    def forward(self, x, y):
        return self.gpt(x, y)


def frozen_step(argv):
    """The function that takes the next step of Memory with a table that does not learn."""
    run, step = trainer([*KINDS["Memory"], *argv])
    run.model.table.values.requires_grad_(False)
    return step


def nanogpt_step(path, argv):
    """The function that takes the next step of nanoGPT's GPT. path: of its model.py."""
    run, step = trainer(["--ffn", "dense", *argv])
    run.model = NanoGPT(path, run.s).to(run.device)
    run.net = run.wrap()
    run.optimizers, run.clipped = train.make_optimizers(run.model, run.s)
    return step


def time_in_turn(steps, seconds, warm_up):
    """{kind: function that takes a step} -> {kind: ms a step, a number for each round}.

    A round is two steps of each kind. The first warm_up rounds are not counted.
    """
    ms = {kind: [] for kind in steps}
    rounds = 0
    end = math.inf
    while rounds < warm_up + LEAST_ROUNDS or time.perf_counter() < end:
        if rounds == warm_up:
            ms = {kind: [] for kind in steps}
            end = time.perf_counter() + seconds
        rounds += 1
        for kind, step in steps.items():
            begin = time.perf_counter()
            step()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ms[kind].append(1e3 * (time.perf_counter() - begin) / 2)
    return ms


def profile(argv):
    """Print where the time of 20 steps goes, operation by operation, after 10 to warm up."""
    run, step = trainer(argv)
    for _ in range(10):
        step()
    # The profiler's records fragment the heap. Free enough memory now, so that no step has to ask
    # the operating system for more: that would cost time that a run does not pay.
    blocks = [torch.ones(2**22) for _ in range(32)]
    del blocks
    profiler = torch.profiler.profile()
    profiler.start()
    for _ in range(20):
        step()
    profiler.stop()
    key = "self_cuda_time_total" if run.cuda else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=key, row_limit=30, max_name_column_width=60))


def quartiles(ms):
    """{kind: ms of each round} -> {kind: its quartiles, and those of the ratio to dense}."""
    found = {}
    dense = statistics.median(ms["dense"])
    for kind, times in ms.items():
        ratios = [t / d for t, d in zip(times, ms["dense"])]
        found[kind] = dict(rounds=len(times), ms=statistics.quantiles(times, n=4),
                           ratio=statistics.quantiles(ratios, n=4), dense_ms=dense)
    return found


def read_flags(argv):
    """-> what is meant for this script, and the rest, which is for train.py."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--study", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--kind", action="append")
    parser.add_argument("--nanogpt")
    parser.add_argument("--frozen", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--seconds", type=float, default=60)
    return parser.parse_known_args(argv)


def choose_kinds(ours):
    """What to time: title -> flags, dense among them. Raises ValueError for an unknown --kind."""
    kinds = STUDY if ours.study else KINDS
    if not ours.kind:
        return kinds
    unknown = set(ours.kind) - kinds.keys()
    if unknown:
        raise ValueError(f"--kind {min(unknown)} is unknown: choose from {'; '.join(kinds)}")
    return {kind: flags for kind, flags in kinds.items() if kind in ("dense", *ours.kind)}


def write_rows(path, found, with_dense):
    """As JSON. Rows of a file that exists stay, if they are not found anew.

    So does that of dense, unless with_dense: it belongs to most of the other rows.
    """
    rows = {}
    if path.exists():
        rows = json.loads(path.read_text("utf-8"))
    for kind, row in found.items():
        if kind != "dense" or with_dense or kind not in rows:
            rows[kind] = row
    path.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


def main(argv, warm_up=8):
    ours, argv = read_flags(argv)
    if ours.profile:
        profile(argv)
        return
    kinds = choose_kinds(ours)
    steps = {kind: trainer([*flags, *argv])[1] for kind, flags in kinds.items()}
    if ours.frozen:
        steps["Memory, frozen table"] = frozen_step(argv)
    if ours.nanogpt:
        steps["nanoGPT"] = nanogpt_step(ours.nanogpt, argv)
    found = quartiles(time_in_turn(steps, ours.seconds, warm_up))
    print(f"ms a step, median [quartiles] of {found['dense']['rounds']} rounds · in each round, "
          f"how many times as long as dense")
    for kind, row in found.items():
        low, middle, high = row["ms"]
        ratio_low, ratio, ratio_high = row["ratio"]
        print(f"{kind:22s}{middle:9.2f} [{low:8.2f}, {high:8.2f}]"
              f"{ratio:9.2f} [{ratio_low:.2f}, {ratio_high:.2f}]")
    if ours.json:
        write_rows(Path(ours.json), found, with_dense=not ours.kind)


if __name__ == "__main__":
    terminal.steady_output()
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as e:
        sys.exit(f"time_steps.py: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
