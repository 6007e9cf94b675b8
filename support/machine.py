"""The machine: its devices, cores and memory, and what torch says when it fails."""
import contextlib
import ctypes
import os
import platform
import sys

import torch
import torch.distributed as dist

import kernel
from support.files import first_line, is_out_of_memory


def pick_device(name):
    """auto | cpu | cuda | cuda:1 | mps -> the device; auto: the fastest there is.

    Raises ValueError when this machine has none of that name.
    """
    devices = ["cpu"]
    if torch.backends.mps.is_available():
        devices.insert(0, "mps")
    if torch.cuda.is_available():
        numbered = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        devices = ["cuda", *numbered, *devices]
    if name == "auto":
        return devices[0]
    if name not in devices:
        raise ValueError(f"--device {name} is not available on this machine: "
                         f"use --device {devices[0]}")
    return name


def choose_device(s, bfloat16_table=False, local_rank=0, world=1):
    """The device of this rank, as a string. Raises ValueError if it cannot do what s asks for.

    s: the settings device, backend and mem_dtype. bfloat16_table: whether a table is held so.
    """
    device = pick_device(s.device)
    if world > 1 and device == "mps":
        if s.device == "mps":
            raise ValueError("--device mps serves one rank only: use --device cpu")
        device = "cpu"
    if world > 1 and device.startswith("cuda:"):
        raise ValueError(f"--device {device}: with several ranks each has its own GPU: use "
                         f"--device cuda")
    if world > 1 and device == "cuda":
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise ValueError(f"rank {local_rank} of this machine has no GPU, there is a GPU for "
                             f"{count} rank(s): start it with --nproc_per_node={count}")
        device = f"cuda:{local_rank}"
    if bfloat16_table and device == "mps":
        raise ValueError("--mem-dtype bfloat16 does not train on mps: "
                         "use float32 there, or --device cpu")
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    if bfloat16_table and device.startswith("cuda") and not has_bfloat16():
        raise ValueError(f"--mem-dtype bfloat16: {torch.cuda.get_device_name()} does not compute "
                         f"in bfloat16: use --mem-dtype float32")
    kernel.backend(s.backend)
    if device == "cpu":
        keep_freed_memory()
    return device


def has_bfloat16():
    """Whether the GPU computes in bfloat16. Those before 2020 do not."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def will_compile(wanted, device):
    """Whether to use torch.compile. wanted: None means with CUDA, if Triton works there."""
    if wanted is not None:
        return wanted
    return device.startswith("cuda") and not kernel.triton_problem()


def keep_freed_memory():
    """Tell glibc to keep what a step frees, for the next step.

    Otherwise it gives large blocks back to the operating system, and getting them again costs a
    page fault for each 4 KiB, which can take longer than the work. Only Linux with glibc has it.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX = -4, -1, -8  # numbers from glibc's malloc.h
    mallopt(M_MMAP_MAX, 0)  # no block stands apart from the heap
    mallopt(M_TRIM_THRESHOLD, -1)  # the heap never shrinks
    mallopt(M_ARENA_MAX, 1)  # all threads use one heap


def peak_memory(device):
    """Bytes: of the GPU's memory, or of this process (None on Windows)."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # on Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe_hardware(device):
    """The name of the hardware, for config.json and the first line of a run."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{device}, {torch.get_num_threads()} threads, {platform.machine()}"


# Peak bfloat16 FLOP/s of GPUs, without sparsity, for the MFU in the log.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
              "RTX 4090": 165e12, "RTX 3090": 71e12}


def peak_flops(hardware, world):
    """Peak FLOP/s of all ranks, or None for hardware that is not in the table."""
    for name, peak in PEAK_FLOPS.items():
        if name in hardware:
            return peak * world
    return None


@contextlib.contextmanager
def put_back():
    """What a run changes in its process is afterwards as it was: the process may be a notebook."""
    precision = torch.get_float32_matmul_precision()
    backend = kernel.backend()
    streams = [(stream, stream.errors) for stream in (sys.stdout, sys.stderr)
               if hasattr(stream, "reconfigure")]
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        kernel.backend(backend)
        for stream, errors in streams:
            # This also writes what the stream holds. If it cannot, the end of the script says so.
            with contextlib.suppress(OSError):
                stream.reconfigure(errors=errors)


def explain(error, less_memory):
    """What to do about an exception of torch; "" if it must be a bug of ours.

    less_memory: what to do when memory has run out.
    """
    why = first_line(error)
    if is_out_of_memory(error):
        return f"out of memory ({why}): {less_memory}"
    if isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error):
        return (f"rank {os.environ.get('RANK')} lost the others: one has stopped, and may say why "
                f"({why}); start all again with --resume and the same --out-dir to go on from the "
                f"last checkpoint, or from the beginning if there is none")
    source = type(error).__module__.split(".")
    if source[0] == "triton" or source[:2] in (["torch", "_dynamo"], ["torch", "_inductor"]):
        return (f"torch.compile or Triton failed ({why}): --backend torch does without Triton, and "
                f"--no-compile of train.py without torch.compile")
    return ""
