"""
How much longer does a training step take with memory? Steps of three models, in turn.

    python tests/time_steps.py                    # dense, memory and its rivals, default size
    python tests/time_steps.py openwebtext --data data/web --batch-size 128     # compiled, on a GPU

In turn, so that a machine whose speed changes from minute to minute is as fast for each. It takes
any preset and flags of train.py; the data must be there (python train.py makes that of the facts).
Each model takes the steps that it would take in train.py.
"""
import itertools
import math
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train

KINDS = {
    "dense": ["--ffn", "dense"],
    "Memory": ["--no-mem-gate", "--no-qk-norm"],
    "Memory+": ["--mem-gate", "--qk-norm"],
    "hash": ["--ffn", "hash"],
    "PEER": ["--ffn", "peer"],
    "MoE": ["--ffn", "moe"],
}
LEAST_ROUNDS = 12


def trainer(argv):
    """The flags of a run -> (its train.Trainer, a function that takes its next step)."""
    s, _, _, _ = train.read_settings(argv)
    meta = train.fit_to_data(s, world=1)
    device = train.choose_device(s)
    run = train.Trainer(s, meta, device)
    numbers = itertools.count()
    return run, lambda: run.step(next(numbers))


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


def main(argv, seconds=60, warm_up=8):
    steps = {kind: trainer([*flags, *argv])[1] for kind, flags in KINDS.items()}
    ms = time_in_turn(steps, seconds, warm_up)
    print(f"ms a step, median [quartiles] of {len(ms['dense'])} rounds · in each round, how many "
          f"times as long as dense")
    for kind, times in ms.items():
        low, middle, high = statistics.quantiles(times, n=4)
        ratios = [t / d for t, d in zip(times, ms["dense"])]
        ratio_low, ratio, ratio_high = statistics.quantiles(ratios, n=4)
        print(f"{kind:10s}{middle:9.2f} [{low:8.2f}, {high:8.2f}]"
              f"{ratio:9.2f} [{ratio_low:.2f}, {ratio_high:.2f}]")


if __name__ == "__main__":
    train.prepare_data.steady_output()
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as e:
        sys.exit(f"time_steps.py: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
