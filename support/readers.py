"""reads.npz: how the training text reads each slot of the table, and whose slots these are."""
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from support.files import reading, write_arrays
from support.ranks import share_out, sum_over_ranks


# How many windows of the text reads.npz tells of.
WINDOWS_OF_READS = 2048


@torch.no_grad()
def count_readers(model, loader, count, ctx, rank=0, world=1):
    """How many of `count` windows of the text read each slot of the table: (S,) int64.

    The windows are spread evenly over the text. sample.py compares with this what a few facts read:
    the slots that they read and hardly anything else does are theirs.
    """
    count = min(count, loader.windows)
    # mine (each,): the windows of this rank. After `real` of them come repeats that do not count.
    mine, real = share_out(count, rank, world)
    at_once = model.windows_at_once(loader.T)
    device = next(model.parameters()).device
    readers = torch.zeros(len(model.table.values), dtype=torch.int64)  # (S,)
    for i in range(0, len(mine), at_once):
        x, _ = loader.window(mine[i:i + at_once] * loader.windows // count)  # (b, T)
        with ctx:
            reads = model.memory_reads(x.to(device))
        slots = torch.cat([slots.flatten(1) for _, slots, _ in reads], dim=1)  # (b, reads)
        for window in slots[:max(real - i, 0)].cpu().long():
            readers[window.unique()] += 1
    return sum_over_ranks(readers.to(device)).cpu()


def save_readers(out, trainer):
    """Write reads.npz into the run folder `out`, unless there is no table. All ranks call it."""
    if not trainer.model.table:
        return
    windows = min(WINDOWS_OF_READS, trainer.loader.windows)
    readers = count_readers(trainer.model, trainer.loader, windows, trainer.ctx, trainer.rank,
                            trainer.world)
    if trainer.rank == 0:
        write_arrays(out / "reads.npz", windows=windows, readers_0=readers.numpy())


class Reads(NamedTuple):
    """What one memory layer reads for a text of T tokens.

    block: where the layer stands. slots, weights (T, H, K): of each token and head. A hashed memory
    has no heads: there H is 1.
    """
    block: int
    slots: torch.Tensor
    weights: torch.Tensor


def layers_with_slots(model):
    """The memory layers as (block, layer). Raises ValueError if they read nothing to be shown."""
    if not model.table:
        raise ValueError(f"this run is {model.config.ffn}, it reads no table: give a run with "
                         f"memory layers")
    layers = model.memories()
    if not layers[0][1].reads_are_rows:
        raise ValueError(f"this run is {model.config.ffn}, where a row of the table stands for "
                         f"several slots, which is not shown: give a run of another kind")
    return layers


def read_windows(model, windows):
    """What is read for windows (b, T) of tokens: yields Reads of (b, T, H, K), one for each layer.
    """
    idx = torch.as_tensor(windows).long().to(model.wte.weight.device)  # (b, T)
    layers = layers_with_slots(model)
    for (block, slots, weights), (_, layer) in zip(model.memory_reads(idx), layers):
        shape = (*idx.shape, layer.heads, -1)
        yield Reads(block, slots.long().view(shape).cpu(), weights.float().view(shape).cpu())


def load_readers(run, model):
    """reads.npz of a run folder: how the training text reads the table.

    -> how many windows of the text were looked at; how many of these windows read each slot, (S,)
    int64. Raises ValueError if it is missing or broken.
    """
    layers_with_slots(model)
    path = Path(run) / "reads.npz"
    with reading(path, "train.py writes it at the end of a run: finish it with --resume, or, if an "
                 "older version did, train it again"):
        with np.load(path) as arrays:
            windows = int(arrays["windows"])
            readers = torch.from_numpy(arrays["readers_0"]).long()  # (S,)
        if len(readers) != len(model.table.values):
            raise ValueError(f"it has {len(readers)} slots, the table {len(model.table.values)}")
    return windows, readers


def slot_scores(model, windows, text_windows, readers):
    """How much more these windows read each slot than the training text does: (S,) float32.

    score = c / sum(c) * log((B + 1) / (1 + readers)), as in sparse memory finetuning (arXiv
    2510.15103). c counts how often the windows read a slot, and `readers` of B windows of the
    training text read it, see load_readers. It is TF-IDF, with slots for words. windows (F, T):
    tokens. text_windows: B.
    """
    c = torch.zeros(len(model.table.values))  # (S,)
    at_once = model.windows_at_once(windows.shape[1])
    for part in torch.from_numpy(windows.astype("int64")).split(at_once):
        for reads in read_windows(model, part):
            c += reads.slots.flatten().bincount(minlength=len(c))
    return c / c.sum() * ((text_windows + 1) / (1 + readers)).log()


def slots_of_facts(model, windows, args):
    """The --slots best slots of these windows: (slots,) int64."""
    score = slot_scores(model, windows, *load_readers(args.run, model))  # (S,)
    count = args.slots or max(len(score) // 16, 1)
    return score.topk(min(count, int((score > 0).sum()))).indices
