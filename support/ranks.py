"""Several ranks: who they are, how they meet, and what they decide together."""
import os
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from support.files import first_line


def ranks():
    """Rank of this process among all, and on its machine, and how many there are, from torchrun.

    Raises ValueError if the environment is not that of torchrun.
    """
    way_out = "start several ranks with torchrun, or unset WORLD_SIZE, RANK and LOCAL_RANK"
    try:
        rank = int(os.environ.get("RANK", 0))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        world = int(os.environ.get("WORLD_SIZE", 1))
    except ValueError:
        raise ValueError(f"WORLD_SIZE, RANK or LOCAL_RANK is not a number: {way_out}") from None
    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    if world > 1 and missing:
        raise ValueError(f"WORLD_SIZE is {world}, but there is no {', '.join(missing)}: {way_out}")
    if not 0 <= rank < world:
        raise ValueError(f"RANK {rank} is not in 0..{world - 1}: {way_out}")
    return rank, local_rank, world


def meet_the_others(device, rank, world):
    """Start the process group, if there are several ranks. Raises ValueError if that fails."""
    if world == 1:
        return
    library = "nccl" if device.startswith("cuda") else "gloo"
    try:
        dist.init_process_group(library, timeout=timedelta(minutes=10))
        wait_for_all()  # the first exchange
    except (RuntimeError, ValueError) as e:
        raise ValueError(f"rank {rank} cannot reach the others ({first_line(e)}): see whether one "
                         f"of them has stopped, and to MASTER_ADDR, MASTER_PORT and "
                         f"{library.upper()}_SOCKET_IFNAME, which names a network interface (unset "
                         f"it to let torch choose); then start all again") from None


def wait_for_all():
    """A barrier. Does nothing with one rank."""
    any_rank_failed(None)


def any_rank_failed(problem):
    """Whether any rank has a problem, something other than None. All ranks wait for each other."""
    if not dist.is_initialized():
        return problem is not None
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return sum_over_ranks(torch.tensor(float(problem is not None), device=device)).item() > 0


def sum_over_ranks(t):
    """Add up a tensor over all ranks, in place. Returns it."""
    if dist.is_initialized():
        dist.all_reduce(t)
    return t


def share_out(n, rank, world):
    """This rank's part of range(n) -> (numbers, how many of them count).

    Ranks that share a table must read it equally often. So each rank gets n / world numbers,
    rounded up. The last ranks repeat n - 1 to fill up, and those repeats do not count.
    """
    each = -(-n // world)
    numbers = np.arange(rank * each, (rank + 1) * each)  # (each,)
    count = min(max(n - rank * each, 0), each)
    return np.minimum(numbers, n - 1), count
