"""reads.npz: how the training text reads each slot of a table, and whose slots these are."""
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
    """For each table, how many of `count` windows of the text read each slot: list of (S,) int64.

    The windows are spread evenly over the text. sample.py compares with this what a few facts read:
    the slots that they read and hardly anything else does are theirs.
    """
    if not model.tables:
        return []
    count = min(count, loader.windows)
    # mine (each,): the windows of this rank. After `real` of them come repeats that do not count.
    mine, real = share_out(count, rank, world)
    at_once = model.windows_at_once(loader.T)
    device = next(model.parameters()).device
    readers = [torch.zeros(len(table.values), dtype=torch.int64) for table in model.tables]
    for i in range(0, len(mine), at_once):
        x, _ = loader.window(mine[i:i + at_once] * loader.windows // count)  # (b, T)
        with ctx:
            reads = model.memory_reads(x.to(device))
        for table, slots in slots_by_table(model, reads).items():  # (b, reads of a window)
            for window in slots[:max(real - i, 0)]:
                readers[table][window.unique()] += 1
    return [sum_over_ranks(r.to(device)).cpu() for r in readers]


def save_readers(out, trainer):
    """Write reads.npz into the run folder `out`, unless there is no table. All ranks call it."""
    windows = min(WINDOWS_OF_READS, trainer.loader.windows)
    readers = count_readers(trainer.model, trainer.loader, windows, trainer.ctx, trainer.rank,
                            trainer.world)
    if readers and trainer.rank == 0:
        arrays = {f"readers_{i}": r.numpy() for i, r in enumerate(readers)}
        write_arrays(out / "reads.npz", windows=windows, **arrays)


def slots_by_table(model, reads):
    """What model.memory_reads found -> {number of the table: slots (B, reads of a window)}."""
    found = {}
    for (_, layer), (_, slots, _) in zip(model.memories(), reads):
        found.setdefault(model.table_number(layer), []).append(slots.flatten(1).cpu().long())
    return {number: torch.cat(parts, dim=1) for number, parts in found.items()}


class Reads(NamedTuple):
    """What one memory layer reads for a text of T tokens.

    block: where the layer stands. table: the number of its table. slots, weights (T, H, K): of each
    token and head. A hashed memory has no heads: there H is 1.
    """
    block: int
    table: int
    slots: torch.Tensor
    weights: torch.Tensor


def layers_with_tables(model):
    """The memory layers as (block, layer, number of its table, H)."""
    if not model.tables:
        raise ValueError(f"this run is {model.config.ffn}, it reads no table: give a run with "
                         f"memory layers")
    layers = model.memories()
    if not layers[0][1].reads_are_rows:
        raise ValueError(f"this run is {model.config.ffn}, where a row of the table stands for "
                         f"several slots, which is not shown: give a run of another kind")
    return [(block, layer, model.table_number(layer), layer.heads) for block, layer in layers]


def read_windows(model, windows):
    """What is read for windows (b, T) of tokens: yields Reads of (b, T, H, K), one for each layer.
    """
    idx = torch.as_tensor(windows).long().to(model.wte.weight.device)  # (b, T)
    layers = layers_with_tables(model)
    for (_, slots, weights), (block, _, table, H) in zip(model.memory_reads(idx), layers):
        shape = (*idx.shape, H, -1)
        yield Reads(block, table, slots.long().view(shape).cpu(),
                    weights.float().view(shape).cpu())


def load_readers(run, model):
    """reads.npz of a run folder: how the training text reads the tables.

    -> how many windows of the text were looked at; for each table, how many of these windows read
    each slot, (S,) int64. Raises ValueError if it is missing or broken.
    """
    layers_with_tables(model)
    path = Path(run) / "reads.npz"
    with reading(path, "train.py writes it at the end of a run: finish it with --resume, or, if an "
                 "older version did, train it again"):
        with np.load(path) as arrays:
            windows = int(arrays["windows"])
            readers = [torch.from_numpy(arrays[f"readers_{i}"]).long()
                       for i in range(len(model.tables))]
        for table, counts in zip(model.tables, readers):
            if len(counts) != len(table.values):
                raise ValueError(f"it has {len(counts)} slots, the table {len(table.values)}")
    return windows, readers


def slot_scores(model, windows, text_windows, readers):
    """How much more these windows read each slot than the training text does: list of (S,) float32.

    score = c / sum(c) * log((B + 1) / (1 + readers)), as in sparse memory finetuning (arXiv
    2510.15103). c counts how often the windows read a slot, and `readers` of B windows of the
    training text read it, see load_readers. It is TF-IDF, with slots for words. windows (F, T):
    tokens. text_windows: B.
    """
    counts = [torch.zeros(len(table.values)) for table in model.tables]
    at_once = model.windows_at_once(windows.shape[1])
    for part in torch.from_numpy(windows.astype("int64")).split(at_once):
        for reads in read_windows(model, part):
            c = counts[reads.table]  # (S,)
            c += reads.slots.flatten().bincount(minlength=len(c))
    return [c / c.sum() * ((text_windows + 1) / (1 + r)).log() for c, r in zip(counts, readers)]


def slots_of_facts(model, windows, args):
    """For each table the --slots best slots of these windows: list of (slots,) int64."""
    chosen = []
    for score in slot_scores(model, windows, *load_readers(args.run, model)):
        count = args.slots or max(len(score) // 16, 1)
        chosen.append(score.topk(min(count, int((score > 0).sum()))).indices)
    return chosen
