"""How much longer does a training step take with memory? Steps of the three models in turn, in one process: the machine is in the same mood for all.

    PYTHONPATH=. python tests/time_steps.py                    dense, Memory, Memory+ at the default size (after: python train.py)
    PYTHONPATH=. python tests/time_steps.py openwebtext --data data/web --batch-size 128         on a GPU, compiled

Any preset and flags of train.py. Each model takes the steps it would take there (test_train.py: test_time_steps).
"""
import contextlib
import itertools
import math
import statistics
import sys
import time

import torch

import train

KINDS = {"dense": ["--ffn", "dense"], "Memory": ["--no-mem-gate", "--no-qk-norm"], "Memory+": ["--mem-gate", "--qk-norm"]}


def trainer(argv):
    """The settings of a run -> its model, and a function that takes its next step."""
    s = train.read_settings(argv)[0]
    meta, device = train.fit_to_data(s, 1), train.choose_device(s, 1)
    cuda, micro = device.startswith("cuda"), s.micro_batch_size or s.batch_size
    torch.manual_seed(s.seed)
    torch.set_float32_matmul_precision("high")
    model, loader, steps = train.GPT(s).to(device), train.Loader(s.data, "train", meta, s), itertools.count()
    net = torch.compile(model) if (cuda if s.compile is None else s.compile) else model
    optimizers, dense = model.make_optimizers(s)

    def step():
        number = next(steps)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak"] * train.schedule(number, s)
        for m in range(0, s.batch_size, micro):
            x, y = (t.to(device) for t in loader.batch(number, range(m, m + micro)))             # (micro, T) both
            with torch.autocast("cuda", torch.bfloat16) if cuda else contextlib.nullcontext():
                loss = net(x, y)[1] / (s.batch_size // micro)                                    # ()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(dense, s.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
        optimizers[0].zero_grad(set_to_none=True)
    return model, step


def main(argv, seconds=60, warm_up=8):
    """Two steps of each a round, for so many seconds, 12 rounds at least; the first rounds are not counted."""
    steps, ms, end = {kind: trainer([*flags, *argv])[1] for kind, flags in KINDS.items()}, {kind: [] for kind in KINDS}, math.inf
    while len(ms["dense"]) < 12 or time.perf_counter() < end:
        if warm_up == 0:
            ms, end = {kind: [] for kind in KINDS}, time.perf_counter() + seconds
        warm_up -= 1
        for kind, step in steps.items():
            begin = time.perf_counter()
            step(), step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ms[kind].append(1e3 * (time.perf_counter() - begin) / 2)
    print(f"ms a step, median [quartiles] of {len(ms['dense'])} rounds · in each round, how many times as long as dense")
    for kind, times in ms.items():
        low, middle, high = statistics.quantiles(times, n=4)
        ratio = statistics.quantiles([t / d for t, d in zip(times, ms["dense"])], n=4)
        print(f"{kind:10s}{middle:9.2f} [{low:8.2f}, {high:8.2f}]{ratio[1]:9.2f} [{ratio[0]:.2f}, {ratio[2]:.2f}]")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except train.Trouble as e:
        sys.exit(f"time_steps.py: {e}")
