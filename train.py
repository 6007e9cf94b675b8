"""
Train a GPT, dense or with memory layers, and say what it has learned.

    python train.py                      # facts: a small corpus, made on the spot; takes minutes
    python train.py --ffn dense          # the same GPT without memory: the control
    python train.py --compare out/facts-memory-1337 out/facts-dense-1337
    python train.py tinystories          # after: python prepare_data.py tinystories
    torchrun --standalone --nproc_per_node=8 train.py openwebtext
    python train.py --resume --out-dir out/facts-memory-1337
    python train.py --init-from out/facts-memory-1337 --out-dir out/longer

You see the settings, a line every few steps, and at the end what the model knows. A run folder
out/<run> holds config.json, log.jsonl, ckpt.pt, at the end result.json and curves.png, and what
sample.py needs of the data.

A batch depends on (seed, step) alone and dropout on (seed, step, rank), so a resumed run is the run
that never stopped.

This file, from top to bottom: settings, files, batches, optimizers, evaluation, checkpoints, the
run folder, pictures and comparison, the machine, one step, the loop, what a run prints.
"""
import argparse
import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C during the imports, which take seconds, ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import kernel
import prepare_data
from model import CAN_BE_SLICED, GPT, RIVALS, GPTConfig, setting
from prepare_data import first_line, is_out_of_memory, reading


# ---- settings

@dataclass
class Settings(GPTConfig):
    """All settings of a run: those of the model, and these."""
    vocab_size: int = setting(0, "tokens in the vocabulary; 0: the data's, "
                              "rounded up to a multiple of 64 if it is large")
    block_size: int = setting(0, "window length in tokens; 0: the data's (facts), or 256")
    data: str = setting("data/facts", "folder made by prepare_data.py")
    out_dir: str = setting("", "run folder; default out/<preset>-<ffn>-<seed>")
    init_from: str = setting("", "run folder whose weights are the first ones of this run; "
                             "its model's settings are taken over")
    seed: int = setting(1337, "of weights, batches and dropout")
    max_steps: int = setting(5000, "optimizer steps")
    batch_size: int = setting(128, "windows per step, over all ranks")
    micro_batch_size: int = setting(0, "windows per forward pass and rank; 0: batch_size / ranks. "
                                    "Lower it when memory runs out")
    learning_rate: float = setting(3e-3, "peak rate; linear warm-up, then linear decay to 0")
    value_lr: float = setting(5e-3, "the same for the memory table's values")
    value_lr_end: float = setting(1.0, "what the values' rate falls to besides, along a line, as a "
                                  "share of its peak; UltraMem: 0.25")
    expert_lr: float = setting(3e-3, "the same for the experts of --ffn moe")
    weight_decay: float = setting(0.1, "on matrices; "
                                  "not on embeddings, norms, half-keys and values")
    beta1: float = setting(0.9, "AdamW")
    beta2: float = setting(0.99, "AdamW")
    grad_clip: float = setting(1.0, "largest norm of the gradient; "
                               "the values' gradient is clipped apart, to the same norm; 0: off")
    warmup_steps: int = setting(100, "steps of linear warm-up")
    log_every: int = setting(100, "steps between log lines")
    eval_every: int = setting(1000, "steps between evaluations and checkpoints")
    eval_windows: int = setting(2048, "validation windows per evaluation")
    device: str = setting("auto", "auto | cpu | cuda | mps")
    backend: str = setting("auto", "auto | triton | torch: what the memory operations run on")
    mem_parallel: int = setting(0, "ranks that share a table, each holding some of its dims; "
                                "0: all ranks; 1: each holds the whole")
    compile: bool = setting(None, "torch.compile; default: with CUDA")
    profile: bool = setting(False, "print where the time of 20 steps goes, "
                            "operation by operation, and stop")


# What a preset changes in Settings. Every preset trains with memory layers, unless --ffn dense.
PRESETS = {
    # One small memory layer: here the plain Memory recalls more than Memory+ (docs/results.md).
    "facts": dict(
        n_layer=3, n_head=4, n_embd=64,
        mem_layers=(1,), mem_n_keys=128, mem_key_dim=16, mem_gate=False, qk_norm=False,
        value_lr=1.6e-1, log_every=250),
    "facts-gpu": dict(
        data="data/facts-gpu",
        n_layer=8, n_head=8, n_embd=512,
        mem_layers=(2, 4, 6), mem_n_keys=512, mem_dtype="bfloat16",
        max_steps=16_000, batch_size=512, learning_rate=1e-3, value_lr=1e-2),
    "tinystories": dict(
        data="data/tinystories", block_size=256,
        n_layer=6, n_head=6, n_embd=384,
        mem_layers=(1, 3, 5),
        max_steps=20_000, batch_size=64, learning_rate=1e-3, value_lr=5e-3,
        log_every=50, eval_windows=512),
    "openwebtext": dict(
        data="data/openwebtext", block_size=1024,
        n_layer=12, n_head=12, n_embd=768,
        mem_layers=(2, 6, 10), mem_n_keys=1024, mem_dtype="bfloat16",
        max_steps=20_000, batch_size=512, micro_batch_size=32,
        learning_rate=6e-4, value_lr=3e-3, beta2=0.95, warmup_steps=700,
        log_every=10, eval_every=500, eval_windows=1024),
}
# The data of these presets is made on the spot.
FACTS = {
    "facts": dict(people=8000, documents=640_000),
    "facts-gpu": dict(people=100_000, documents=8_192_000),
}
# Settings that --resume may change. They affect what is learned by rounding only. (micro_batch_size
# and device also change the masks of dropout, and micro_batch_size the balance of --ffn moe.)
MAY_CHANGE = {"device", "backend", "compile", "micro_batch_size", "log_every", "data",
              "mem_parallel"}
# Settings of the model that may differ from those of --init-from.
MAY_DIFFER = {"block_size", "dropout"}
# Allowed ranges: lowest and highest. GPTConfig.check has more to say of the model's.
MANY = 2**31 - 1
LIMITS = {
    "max_steps": (1, MANY), "batch_size": (1, 2**24), "micro_batch_size": (0, 2**24),
    "log_every": (1, MANY), "eval_every": (1, MANY), "eval_windows": (1, MANY),
    "warmup_steps": (0, MANY), "seed": (0, 2**63 - 1), "mem_parallel": (0, MANY),
    "beta1": (0, 1 - 1e-9), "beta2": (0, 1 - 1e-9), "learning_rate": (1e-30, 1e38),
    "value_lr": (1e-30, 1e38), "grad_clip": (0, math.inf), "weight_decay": (0, 1e9),
    "vocab_size": (0, 2**16), "block_size": (0, 2**20), "n_layer": (1, 1000),
    "n_head": (1, 1000), "n_embd": (1, 2**16), "mem_heads": (1, 1000),
    "mem_key_dim": (0, 2**16), "mem_value_dim": (0, 2**16), "expert_lr": (1e-30, 1e38),
    "value_lr_end": (0, 1),
    "moe_experts": (0, 2**16), "moe_topk": (0, 2**16), "moe_balance": (0, 1e9),
    "mem_balance": (0, 1e9),
}


def flag(name):
    """mem_n_keys -> --mem-n-keys"""
    return "--" + name.replace("_", "-")


def block_numbers(text):
    """2,4,6 -> (2, 4, 6)"""
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of blocks such as 2,4,6") from None


def make_parser():
    """A flag for each field of Settings, with its help and the default of `python train.py`."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="facts",
                        help="which defaults to start from: " + ", ".join(PRESETS))
    parser.add_argument("--resume", action="store_true",
                        help="go on with the run in --out-dir; start it if there is none")
    parser.add_argument("--compare", nargs="+", metavar="RUN",
                        help="print and draw these run folders side by side, train nothing")
    defaults = preset_settings("facts", {})
    for f in dataclasses.fields(Settings):
        if f.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        elif f.type is tuple:
            kind = dict(type=block_numbers)
        else:
            kind = dict(type=f.type)
        text = f"{f.metadata['help']} ({getattr(defaults, f.name)})".replace("%", "%%")
        parser.add_argument(flag(f.name), default=argparse.SUPPRESS, help=text, **kind)

    def one_line(message):
        more = "(python train.py --help lists every setting)"
        parser.exit(2, f"train.py: {message} {more}\n")
    parser.error = one_line
    return parser


def preset_settings(preset, given):
    """The settings of a preset, changed by those that were given."""
    values = dict(ffn="memory")
    values.update(PRESETS[preset])
    values.update(given)
    return Settings(**values)


def read_settings(argv):
    """argv (None: sys.argv) -> (Settings, preset, resume, runs to compare)."""
    parser = make_parser()
    given = vars(parser.parse_args(argv))
    preset = given.pop("preset")
    resume = given.pop("resume")
    runs = given.pop("compare")
    if preset not in PRESETS:
        parser.error(f"preset {preset!r} is unknown: choose one of {', '.join(PRESETS)}")
    for name in ("data", "out_dir", "init_from"):
        try:
            given.get(name, "").encode("utf-8")
        except UnicodeEncodeError:
            parser.error(f"{flag(name)} {given[name]!a} is not UTF-8: rename the folder")
    s = preset_settings(preset, inherited(given, resume) | given)
    if not s.out_dir:
        s.out_dir = f"out/{preset}-{s.ffn}-{s.seed}"
        if s.profile:
            s.out_dir += "-profile"
    if runs:
        s.out_dir = given.get("out_dir", "")
    elif resume:
        s, preset = resumed_settings(s, preset, given)
    return s, preset, resume, runs


def inherited(given, resume):
    """The settings of the model that --init-from brings along. `given` must agree with them."""
    source = given.get("init_from")
    if not source or (resume and not (Path(source) / "config.json").exists()):
        return {}  # a run that is resumed has its own settings
    saved = read_config(source)["settings"]
    # What is newer than that run has its default, as in load_checkpoint.
    inherits = {f.name: saved.get(f.name, f.default) for f in dataclasses.fields(GPTConfig)
                if f.name not in MAY_DIFFER}
    for name in inherits.keys() & given.keys():
        if given[name] != inherits[name]:
            raise ValueError(f"{flag(name)} {given[name]} is not the {inherits[name]} of "
                             f"--init-from {source}: leave it out")
    return inherits


def resumed_settings(s, preset, given):
    """The settings and the preset of the run in s.out_dir; `given` may change some settings.

    If there is no run yet, they are those of a new one: s and preset.
    """
    out = Path(s.out_dir)
    if not (out / "config.json").exists() and not (out / "ckpt.pt").exists():
        return s, preset
    config = read_config(out)
    # What is newer than the run has its default.
    old = Settings(**config["settings"] | dict(out_dir=s.out_dir))
    for name in given.keys() - {"out_dir"}:
        if name in MAY_CHANGE:
            setattr(old, name, given[name])
        elif given[name] != getattr(old, name):
            raise ValueError(f"{flag(name)} {given[name]} is not the run's {getattr(old, name)}: a "
                             f"resumed run keeps its settings, start another one, perhaps from its "
                             f"weights, with --init-from {out} --out-dir out/NAME")
    saved_preset = config.get("preset")  # a run of an older version has none
    return old, saved_preset if saved_preset in list(PRESETS) else preset


def read_config(folder):
    """config.json of a run folder. Raises ValueError if it is missing, or not one of ours."""
    path = Path(folder) / "config.json"
    kinds = {f.name: f.type for f in dataclasses.fields(Settings)}
    with reading(path, "give the folder of a run that this version of train.py has made, or start "
                       "another run with --out-dir out/NAME"):
        config = json.loads(path.read_text("utf-8"))
        saved = config["settings"]
        saved["mem_layers"] = tuple(saved["mem_layers"])
        for name, value in saved.items():
            if name not in kinds:
                raise ValueError(f"unknown setting {name}")
            fits = isinstance(value, (int, float) if kinds[name] is float else kinds[name])
            fits = fits and isinstance(value, bool) == (kinds[name] is bool)
            if not fits and not (name == "compile" and value is None):
                raise TypeError(f"the setting {name} is {value!r}")
        if not all(isinstance(layer, int) for layer in saved["mem_layers"]):
            raise TypeError(f"the setting mem_layers is {saved['mem_layers']}")
    return config


def fit_to_data(s, world):
    """Fill in what the data decides, and refuse what cannot work. Returns the data's meta.json."""
    meta = prepare_data.read_meta(s.data)
    V = meta["vocab_size"]
    window = meta.get("window")  # of the facts corpus, where each window holds one fact
    if not s.vocab_size:
        s.vocab_size = V if V < 10_000 else (V + 63) // 64 * 64
    if not s.block_size:
        s.block_size = window or 256
    check_limits(s)
    if s.vocab_size < V:
        raise ValueError(f"--vocab-size {s.vocab_size} < {V} tokens in {s.data}: "
                         f"raise it or leave it out")
    if window and s.block_size != window:
        raise ValueError(f"--block-size {s.block_size} is not {s.data}'s window of {window} "
                         f"tokens, one fact each: give --block-size {window}")
    check_ranks(s, world)
    s.check()
    return meta


def check_limits(s):
    """Raise ValueError for a number outside LIMITS."""
    for name, (low, high) in LIMITS.items():
        value = getattr(s, name)
        if value > high:
            raise ValueError(f"{flag(name)} {value} is above {high}: lower it")
        if not value >= low:  # also when it is nan
            raise ValueError(f"{flag(name)} {value} is not at least {low}: raise it")


def check_ranks(s, world):
    """Refuse a batch or a table that cannot be shared out over the ranks."""
    micro = s.micro_batch_size or s.batch_size // world
    if micro < 1 or s.batch_size % (micro * world):
        raise ValueError(f"--batch-size {s.batch_size} does not divide into {world} rank(s) x "
                         f"--micro-batch-size {micro}: change one of them")
    if s.ffn in RIVALS and s.ffn not in CAN_BE_SLICED and s.mem_parallel > 1:
        raise ValueError(f"--mem-parallel {s.mem_parallel}: ranks cannot share what --ffn {s.ffn} "
                         f"holds: leave it out")
    P = slices(s, world)
    D = s.value_dim()
    if P < 1 or world % P or (s.ffn in CAN_BE_SLICED and D % P):
        raise ValueError(f"--mem-parallel {P}: a table of {D} dims cannot be shared so by {world} "
                         f"rank(s): choose a number that divides both, 1 always does")


def slices(s, world):
    """P: into how many slices the table is cut."""
    if s.ffn not in CAN_BE_SLICED:
        return 1
    return s.mem_parallel or world


# ---- files

def read_json(path, way_out):
    """What a JSON file holds, or a ValueError that says what to do."""
    with reading(path, way_out):
        return json.loads(Path(path).read_text("utf-8"))


def write_whole(path, write):
    """Write a file under another name and rename it when it is whole: write(path of that name).

    Whatever happens, what stood there before is not lost.
    """
    part = Path(f"{path}.part")
    try:
        write(part)
        os.replace(part, path)
    except (OSError, RuntimeError) as e:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        # torch.save raises a RuntimeError of its own while it handles the OSError of a full disk.
        cause = e if isinstance(e, OSError) else e.__context__
        if not isinstance(cause, OSError):
            raise  # the trouble is not the disk
        raise ValueError(f"cannot write {path} ({first_line(cause)}): free some space or check "
                         f"the permissions; what was saved before is still there") from None


def write_text(path, text):
    write_whole(path, lambda part: part.write_text(text, "utf-8"))


def write_json(path, content):
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_arrays(path, **arrays):
    """The same for a .npz file of numpy arrays."""
    def write(part):
        with open(part, "wb") as file:  # given a name, numpy would add .npz to it
            np.savez_compressed(file, **arrays)
    write_whole(path, write)


# ---- batches

class Loader:
    """Windows of a .bin file: window i is the tokens [i*T, (i+1)*T), targets are one further on.

    Every window comes once an epoch, in an order that depends on (seed, epoch) alone. Step s takes
    the windows at the places [s * batch_size, (s+1) * batch_size) of the orders of all epochs, one
    after the other. So there is nothing to save for a resumed run.
    """

    def __init__(self, folder, split, meta, s):
        path = Path(folder) / f"{split}.bin"
        way_out = prepare_data.how_to_make(folder)
        with reading(path, way_out):
            self.tokens = np.memmap(path, dtype="<u2", mode="r")
        if len(self.tokens) != meta["tokens"][split]:
            raise ValueError(f"{path} has {len(self.tokens)} tokens, meta.json says "
                             f"{meta['tokens'][split]}: {way_out}")
        if path.stat().st_size < 2**30:  # a larger file takes too long to check
            if hashlib.sha256(self.tokens).hexdigest() != meta["sha256"][f"{split}.bin"]:
                raise ValueError(f"{path} is not the file that meta.json describes (its sha256 "
                                 f"differs): {way_out}")
            if len(self.tokens) and self.tokens.max() >= meta["vocab_size"]:
                raise ValueError(f"{path} has the token {self.tokens.max()}, but meta.json says "
                                 f"that there are {meta['vocab_size']}: {way_out}")
        self.T = s.block_size
        self.seed = s.seed
        self.batch_size = s.batch_size
        self.windows = (len(self.tokens) - 1) // self.T
        self.epoch = None  # whose order is in self.order
        if self.windows < 1:
            raise ValueError(f"{path} has {len(self.tokens)} tokens, a window needs {self.T + 1}: "
                             f"lower --block-size, or prepare more text or with another "
                             f"--val-fraction")

    def window(self, i):
        """i (b,) window numbers -> x, y (b, T) int64."""
        places = np.asarray(i)[:, None] * self.T + np.arange(self.T + 1)  # (b, T+1)
        w = torch.from_numpy(self.tokens[places].astype(np.int64))  # (b, T+1)
        # Only contiguous tensors are copied to a GPU while it works.
        return w[:, :-1].contiguous(), w[:, 1:].contiguous()

    def batch(self, step, rows):
        """Rows of the global batch of a step, integers in [0, batch_size) -> x, y (b, T) int64."""
        place = step * self.batch_size + np.asarray(rows)  # (b,)
        number = np.empty_like(place)  # (b,)
        for epoch in np.unique(place // self.windows):
            if epoch != self.epoch:
                shuffle = np.random.default_rng([self.seed, epoch])
                self.order = shuffle.permutation(self.windows)  # (windows,)
                self.epoch = epoch
            in_epoch = place // self.windows == epoch  # (b,)
            number[in_epoch] = self.order[place[in_epoch] % self.windows]
        return self.window(number)


# ---- optimizers

def schedule(step, s, end=1.0):
    """The factor on a learning rate: linear warm-up, times a line from 1 to zero at max_steps.

    And times another line, from 1 to `end`.
    """
    warmup = min(1, (step + 1) / max(s.warmup_steps, 1))
    done = step / s.max_steps
    return warmup * (1 - done) * (1 - (1 - end) * done)


def make_optimizers(model, s):
    """AdamW for everything but the tables, and with memory layers a TableAdamW for those.

    Matrices and experts are decayed, the rest is not. Returns (list of optimizers, parameters of
    the first).
    """
    matrices = []
    experts = []
    rest = []
    for name, p in model.named_parameters():
        if name.endswith(".values"):
            continue
        if name.endswith(("experts_in", "experts_out")):
            experts.append(p)
        elif p.dim() == 2 and not name.startswith("wte"):  # half-keys have four dims
            matrices.append(p)
        else:
            rest.append(p)
    groups = [dict(params=matrices, weight_decay=s.weight_decay),
              dict(params=rest, weight_decay=0.0)]
    if experts:
        groups.append(dict(params=experts, weight_decay=s.weight_decay, lr=s.expert_lr))
    betas = (s.beta1, s.beta2)
    optimizers = [torch.optim.AdamW(groups, lr=s.learning_rate, betas=betas, fused=True)]
    if model.tables:
        tables = list(model.tables)
        optimizers.append(TableAdamW(tables, s.value_lr, betas, largest_norm(s), s.compile))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]  # the loop sets lr to peak * schedule(..., end)
            group["end"] = s.value_lr_end if isinstance(optimizer, TableAdamW) else 1.0
    return optimizers, matrices + rest + experts


def largest_norm(s):
    """What gradients are clipped to."""
    return s.grad_clip or math.inf


class TableAdamW(torch.optim.AdamW):
    """AdamW for memory tables, without decay. It updates all rows: a batch reads most of them.

    tables: list of MemoryTable. clip: largest norm of the gradient, that of all tables together.
    compile: torch.compile for the step of bfloat16 tables; None: with CUDA and Triton.

    float32 tables go through torch's AdamW. bfloat16 tables go through adamw_bfloat16_ and take 10
    bytes a value: the value and two moments in bfloat16, and the gradient, summed in float32 over
    layers and micro-steps. Over several ranks it averages the gradients: DDP does not see them.
    """

    def __init__(self, tables, lr, betas, clip=math.inf, compile=None):
        values = [table.values for table in tables]
        super().__init__(values, lr=lr, betas=betas, weight_decay=0.0, fused=True)
        self.tables = tables
        self.clip = clip
        self.compile = will_compile(compile, values[0].device.type)
        for table in tables:
            p = table.values  # (S, D/P)
            if not p.requires_grad:
                wide = torch.promote_types(p.dtype, torch.float32)
                table.grad_sum = torch.zeros_like(p, dtype=wide)  # (S, D/P)
            if p.dtype == torch.bfloat16:
                self.state[p] = dict(step=0, exp_avg=torch.zeros_like(p),
                                     exp_avg_sq=torch.zeros_like(p))

    @torch.no_grad()
    def step(self):
        """Use up the gradients: they are zero or gone afterwards.

        Returns their norm before clipping, a scalar tensor. A table has a grad_sum if its values
        have no .grad, see MemoryTable.
        """
        grads = []  # (S, D/P) each
        for table in self.tables:
            grads.append(table.values.grad if table.grad_sum is None else table.grad_sum)
        norm, ranks = self.reduce(grads)
        scale = (self.clip / (norm + 1e-6)).clamp(max=1.0) / ranks  # ()
        for table, grad in zip(self.tables, grads):
            if table.values.dtype == torch.bfloat16:
                self.step_bfloat16(table, scale)
            else:
                table.values.grad = grad.mul_(scale)  # for torch's AdamW, below
        super().step()  # bfloat16 tables have no .grad, so it leaves them alone
        for table, grad in zip(self.tables, grads):
            table.values.grad = None
            if table.grad_sum is not None and table.values.dtype != torch.bfloat16:
                grad.zero_()
        return norm

    def reduce(self, grads):
        """Add up the gradients of the replicas -> (norm of their mean, number of ranks).

        They stay sums: step() divides them by the number of ranks when it scales them.
        """
        mesh = self.tables[0].mesh
        if mesh is not None:
            for grad in grads:
                dist.all_reduce(grad, group=mesh.get_group("replica"))
        norm = torch.stack([torch.linalg.vector_norm(grad) for grad in grads]).norm()  # ()
        if mesh is None:
            return norm, 1
        norm = norm.square()
        dist.all_reduce(norm, group=mesh.get_group("slice"))  # over all dims
        return norm.sqrt() / mesh.size(), mesh.size()

    def step_bfloat16(self, table, scale):
        state = self.state[table.values]
        group = self.param_groups[0]
        state["step"] += 1
        adamw_bfloat16_(table.values, table.grad_sum, state["exp_avg"], state["exp_avg_sq"],
                        state["step"], group["lr"], *group["betas"], scale=scale,
                        eps=group["eps"], first_column=table.dims.start, compile=self.compile)

    def slices(self):
        """What a checkpoint keeps of each table: this rank's values and moments, (S, D/P) each."""
        kept = []
        for table in self.tables:
            state = self.state[table.values]
            kept.append(dict(values=table.values.detach(), exp_avg=state["exp_avg"],
                             exp_avg_sq=state["exp_avg_sq"]))
        return kept

    def load(self, saved, step):
        """Go on after `step` steps.

        saved: for each table {"exp_avg": [(S, D/P), ...], "exp_avg_sq": ...}, the slices of all
        ranks that saved it, however many those were.
        """
        for table, slices in zip(self.tables, saved):
            p = table.values
            state = self.state[p]
            state["step"] = step
            if p.dtype != torch.bfloat16:  # torch's AdamW keeps its step count on the device
                state["step"] = torch.tensor(float(step), device=p.device)
            for name in ("exp_avg", "exp_avg_sq"):
                mine = columns(slices[name], table.dims)  # (S, D/P)
                state[name] = mine.to(p.device, copy=True)


def adamw_bfloat16_(values, grad_sum, exp_avg, exp_avg_sq, step, lr, beta1, beta2, scale=1.0,
                    eps=1e-8, first_column=0, compile=False):
    """One step of AdamW without decay (arXiv 1711.05101) on a bfloat16 table, in place.

    values, exp_avg, exp_avg_sq (S, W) bfloat16, rounded randomly; grad_sum (S, W) float32, is
    multiplied by scale (a number or a scalar tensor), and zero afterwards. step: 1, 2, ... A table
    in slices is rounded as the whole one: first_column is where these W columns begin.
    Held: 2 + 2 + 2 + 4 bytes a value. Compiled, one pass reads 10 bytes and writes 10.
    """
    device = values.device
    # torch.compile compiles again for each new Python number, so these are tensors. They are made
    # on the device, since the CPU would have to wait for a copy.
    scalars = dict(
        scale=scale if torch.is_tensor(scale) else torch.full((), float(scale), device=device),
        rate=torch.full((), lr / (1 - beta1**step), device=device),
        unbias=torch.full((), 1 / (1 - beta2**step), device=device),
        step=torch.full((), step, device=device))
    column = first_column + torch.arange(values.shape[1], device=device)  # (W,)
    row = torch.arange(len(values), device=device)  # (S,)
    if compile:
        compiled_update()(values, grad_sum, exp_avg, exp_avg_sq, row, column, beta1=beta1,
                          beta2=beta2, eps=eps, **scalars)
        return
    # Some rows at a time: not compiled, every operation makes a tensor of its own.
    numbers_at_once = 2**20 if device.type == "cpu" else 2**24
    some = max(numbers_at_once // values.shape[1], 1)
    for i in range(0, len(values), some):
        here = slice(i, i + some)
        update_bfloat16_(values[here], grad_sum[here], exp_avg[here], exp_avg_sq[here], row[here],
                         column, beta1=beta1, beta2=beta2, eps=eps, **scalars)


@functools.cache
def compiled_update():
    return torch.compile(update_bfloat16_)


def update_bfloat16_(values, grad_sum, exp_avg, exp_avg_sq, row, column, scale, rate, unbias, step,
                     beta1, beta2, eps):
    """AdamW's formulas in float32, then the three results rounded. row (S,), column (W,) int64."""
    g = grad_sum * scale  # (S, W), as all below
    m = exp_avg.float().lerp(g, 1 - beta1)
    v = exp_avg_sq.float().lerp(g.square(), 1 - beta2)
    p = values.float() - rate * m / ((v * unbias).sqrt() + eps)
    noise = scramble(scramble(scramble(step) ^ row[:, None]) ^ column)  # 32 bits for each place
    values.copy_(round_randomly(p, noise & 0xFFFF))
    exp_avg.copy_(round_randomly(m, noise >> 16))
    exp_avg_sq.copy_(round_randomly(v, scramble(noise + 1) & 0xFFFF))
    grad_sum.zero_()


def scramble(x):
    """A hash of integers: int64, of which the lower 32 bits count -> int64 in [0, 2^32).

    Neighbours get unrelated results, so that it serves as noise that depends on place and step
    alone. The factor is odd and small enough for the product to fit in 64 bits.
    """
    for _ in range(2):
        x = x & 0xFFFFFFFF
        x = (x ^ (x >> 16)) * 0x45D9F3B
    x = x & 0xFFFFFFFF
    return x ^ (x >> 16)


def round_randomly(x, noise):
    """float32 -> bfloat16, up or down with the probabilities that keep the mean.

    bfloat16 is float32 without its lower 16 bits. Adding 16 random bits before cutting those off
    rounds up in proportion to what is cut off. Rounded to the nearest instead, an update below
    1/512 of a number would be lost every time. noise: integers in [0, 2^16). NaN stays NaN.
    """
    bits = x.view(torch.int32) + noise.int()
    rounded = (bits >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(x.isnan(), torch.nan, rounded)


def columns(slices, dims):
    """Columns `dims` (a slice) of a matrix (S, D) that is stored as P slices (S, D/P).

    The whole matrix is never built.
    """
    width = slices[0].shape[1]
    parts = []
    for i, s in enumerate(slices):
        begin = max(dims.start - i * width, 0)
        end = max(dims.stop - i * width, 0)
        parts.append(s[:, begin:end])  # empty where this slice holds none of them
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


# ---- evaluation

def share_out(n, rank, world):
    """This rank's part of range(n) -> (numbers, how many of them count).

    Ranks that share a table must read it equally often. So each rank gets n / world numbers,
    rounded up. The last ranks repeat n - 1 to fill up, and those repeats do not count.
    """
    each = -(-n // world)
    numbers = np.arange(rank * each, (rank + 1) * each)  # (each,)
    count = min(max(n - rank * each, 0), each)
    return np.minimum(numbers, n - 1), count


def sum_over_ranks(t):
    """Add up a tensor over all ranks, in place. Returns it."""
    if dist.is_initialized():
        dist.all_reduce(t)
    return t


@torch.no_grad()
def evaluate(model, loader, count, ctx, rank=0, world=1):
    """Mean loss in nats per token over `count` windows, spread evenly over the validation set."""
    model.eval()
    device = next(model.parameters()).device
    count = min(count, loader.windows)
    mine, real = share_out(count, rank, world)  # (each,), numbers of windows among count
    at_once = min(64, max(2**14 // loader.T, 1))  # the logits are larger than all else
    total = 0.0
    for i in range(0, len(mine), at_once):
        x, y = loader.window(mine[i:i + at_once] * loader.windows // count)  # (b, T) both
        with ctx:
            _, loss = model(x.to(device), y.to(device), reduction="none")  # (b, T)
        total += loss.mean(dim=1)[:max(real - i, 0)].sum().item()
    model.train()
    return sum_over_ranks(torch.tensor(total, device=device)).item() / count


@torch.no_grad()
def ask_facts(model, facts, meta, read, rank=0, world=1, count=None):
    """What the model knows of the facts corpus after reading a `read` share of it.

    facts: the arrays of recall.npz. count: ask only so many facts, and return {"recall"} alone.
    Otherwise: recall, recall_by_exposures, recall_control, recall_unseen_phrasing, bits_stored and
    bits_per_param. bits_stored is facts * log2(possible answers) minus the answers' cross-entropy.
    """
    control = facts["control"]  # (F,) bool: people who are never in the text
    known = np.flatnonzero(~control)
    chosen = np.arange(len(control))
    if count:
        chosen = np.random.default_rng(0).permutation(known)[:count]
    part, real = share_out(len(chosen), rank, world)
    mine = chosen[part]  # (each,)

    def over_all_ranks(x):  # (each,) -> (F,): each rank fills in its part
        whole = np.zeros(len(control), np.float32)
        whole[mine[:real]] = x[:real]
        device = model.wte.weight.device
        return sum_over_ranks(torch.from_numpy(whole).to(device)).cpu().numpy().astype(float)

    right, nats = model.answer(facts["seen"][mine], facts["seen_span"][mine])  # (each,) both
    right = over_all_ranks(right)  # (F,)
    nats = over_all_ranks(nats)  # (F,)
    if count:
        return dict(recall=right[chosen].mean())
    unseen, _ = model.answer(facts["unseen"][mine], facts["unseen_span"][mine])  # (each,)
    unseen = over_all_ranks(unseen)  # (F,)
    # Facts of your own may have no unseen phrasing, or nothing that is kept out.
    has_unseen = facts.get("has_unseen", np.ones(len(control), bool))  # (F,)
    bits = np.log2(meta["answers"]) * len(known) - nats[known].sum() / math.log(2)
    bits = max(0.0, bits)
    return dict(
        recall=right[known].mean(),
        recall_by_exposures=by_exposures(right[known], facts["exposures"][known] * read),
        recall_control=mean_or_none(right[control]),
        recall_unseen_phrasing=mean_or_none(unseen[~control & has_unseen]),
        bits_stored=bits,
        bits_per_param=bits / model.param_counts()["total"])


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
    mine, real = share_out(count, rank, world)  # (each,), numbers of windows among count
    at_once = min(64, max(2**14 // loader.T, 1))
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


def slots_by_table(model, reads):
    """What model.memory_reads found -> {number of the table: slots (B, reads of a window)}."""
    found = {}
    for (_, layer), (_, slots, _) in zip(model.memories(), reads):
        found.setdefault(model.table_of(layer), []).append(slots.flatten(1).cpu().long())
    return {number: torch.cat(parts, dim=1) for number, parts in found.items()}


def mean_or_none(x):
    return x.mean() if len(x) else None


def by_exposures(right, exposures):
    """Recall of facts that were read 0, 1, 2-3, 4-7, ... times. right, exposures (F,)."""
    edges = [0, 1] + [2**i for i in range(1, 12)] + [math.inf]
    rows = []
    for low, high in zip(edges, edges[1:]):
        group = right[(exposures >= low) & (exposures < high)]
        if len(group):
            to = None if high == math.inf else high
            rows.append({"from": low, "to": to, "facts": len(group), "recall": group.mean()})
    return rows


def usage(model):
    """How much of the tables the counted step used, over all ranks -> (share of slots, KL in nats).

    The mean over the tables; (None, None) without any. See memory.MemoryTable.usage.
    """
    if not model.tables:
        return None, None
    for table in model.tables:
        sum_over_ranks(table.read_weight)  # in place: each rank counted its own tokens' reads
    return np.mean([table.usage() for table in model.tables], axis=0).tolist()


# ---- checkpoints

# 2: layer norms. Before, norms were RMS norms, whose weights have the same names and shapes.
CHECKPOINT_VERSION = 2


def save_checkpoint(folder, model, optimizers, step, seconds, settings, line=None):
    """Write what load_checkpoint reads -> None, or what went wrong. All ranks call it.

    Every rank returns a problem, or none does. ckpt.pt holds tensors and plain types alone, so that
    it loads with weights_only=True. The slices of a table over several ranks are files of their
    own. The ranks that hold them write them before ckpt.pt names them: whenever a run is killed,
    ckpt.pt and the files it names are whole. line: the numbers of the last step, for the log.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    parts = model.tables[0].parts if model.tables else 1  # P
    # The first P ranks hold the table once, each a slice. Other ranks hold copies of these.
    names = [f"ckpt-{step}-{i}of{parts}.pt" for i in range(parts)] if parts > 1 else []
    tables = dict(tables=optimizers[1].slices() if model.tables else [])
    problem = None
    if rank < len(names):
        problem = try_to_save(tables, folder / names[rank])
    if any_rank_failed(problem):
        remove_slices(folder, names, rank)
        return problem or OTHER_RANK
    if rank == 0:
        state = dict(version=CHECKPOINT_VERSION, optimizer=optimizers[0].state_dict(),
                     slices=names, step=step, seconds=seconds, settings=settings, line=line)
        weights = model.state_dict().items()
        state["model"] = {name: p for name, p in weights if not name.endswith(".values")}
        if not names:
            state.update(tables)
        problem = try_to_save(state, folder / "ckpt.pt")
        if problem is None:
            for old in folder.glob("ckpt-[0-9]*of*.pt*"):
                if old.name not in names:
                    with contextlib.suppress(OSError):  # it is only in the way
                        old.unlink()
    # Nobody goes on, or leaves, while another still writes.
    if any_rank_failed(problem):
        remove_slices(folder, names, rank)
        return problem or OTHER_RANK
    return None


def remove_slices(folder, names, rank):
    """Take away this rank's slice of a checkpoint that could not be written: it fills the disk."""
    if rank < len(names):
        with contextlib.suppress(OSError):
            (folder / names[rank]).unlink(missing_ok=True)


OTHER_RANK = "another rank could not write its part of the checkpoint"


def try_to_save(content, path):
    """torch.save -> None, or what went wrong."""
    def write(part):
        with open(part, "wb") as file:  # given a path, torch.save does not say why it fails
            torch.save(content, file)
    try:
        write_whole(path, write)
    except ValueError as e:
        return str(e)


def wait_for_all():
    """A barrier. Does nothing with one rank."""
    any_rank_failed(None)


def any_rank_failed(problem):
    """Whether any rank has a problem, something other than None. All ranks wait for each other."""
    if not dist.is_initialized():
        return problem is not None
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return sum_over_ranks(torch.tensor(float(problem is not None), device=device)).item() > 0


def load_checkpoint(folder, device="cpu", mesh=None, **changes):
    """A run folder -> (GPT, checkpoint), for training and for sample.py.

    checkpoint: model, optimizer, step, seconds, settings, and tables: for each one {"values",
    "exp_avg", "exp_avg_sq"}, lists of the slices that it was saved in. With a mesh the GPT holds
    this rank's dims of the tables, whatever the number of ranks that saved them. changes: settings
    of the GPT that replace the saved ones. Raises ValueError when there is no checkpoint, or one
    that cannot be read, and says why.
    """
    path = Path(folder) / "ckpt.pt"
    if not path.exists():
        raise ValueError(f"{path} does not exist: give the folder of a run that has saved a "
                         f"checkpoint")
    way_out = ("bring ckpt.pt and the ckpt-*.pt files of the same run into one folder, or start "
               "another run")
    with reading(path, way_out):
        state = read_checkpoint(path)
        settings = state["settings"]
    if state.get("version") != CHECKPOINT_VERSION:
        raise ValueError(f"{path} was saved by another version of this code, whose model is "
                         f"another: {folder}/config.json names the commit that can read it")
    with reading(path, way_out):
        saved = [read_checkpoint(path.with_name(name)) for name in state["slices"]] or [state]
        settings = dict(settings, mem_layers=tuple(settings["mem_layers"]))
        # A setting that is newer than the checkpoint has its default.
        names = {f.name for f in dataclasses.fields(GPTConfig)}
        config = {name: settings[name] for name in names & settings.keys()} | changes
        model = GPT(GPTConfig(**config), mesh)
        weights = dict(state["model"])
        tables = []
        for i, table in enumerate(model.tables):
            whole = {name: [file["tables"][i][name] for file in saved]
                     for name in saved[0]["tables"][i]}
            weights[f"tables.{i}.values"] = columns(whole["values"], table.dims)
            tables.append(whole)
        model.load_state_dict(weights)
        state["tables"] = tables
        for name in ("step", "optimizer", "seconds"):
            state[name]  # KeyError if it is missing
    return model.to(device), state


def read_checkpoint(path):
    # Mapped, so that what is not used of tables and optimizer is never read. Windows cannot replace
    # a file that is mapped.
    mmap = sys.platform != "win32"
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


# ---- the run folder

@contextlib.contextmanager
def own_folder(s, rank, resume):
    """Keep other processes from writing into the run folder in this block.

    A run that was killed may need some seconds to end. Another one that resumes it waits for that.
    """
    if rank or s.profile:
        yield
        return
    out = Path(s.out_dir)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".lock").touch()
    except OSError as e:
        raise ValueError(f"cannot write in {out} ({first_line(e)}): choose another --out-dir; to "
                         f"go on with a run that can only be read, copy it first") from None
    with prepare_data.locked(out / ".lock", 10 if resume else 0,
                             f"another run is writing to {out}: wait for its end, or start this "
                             f"one with --out-dir out/NAME"):
        yield


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
        # The last step is logged at the very end: a run with its end left to do does it again.
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


class Log:
    """log.jsonl. On a full disk its lines wait until one can be written again."""

    def __init__(self, out):
        self.path = out / "log.jsonl"
        self.waiting = []

    def add(self, line):
        """Append a line, a dict."""
        self.waiting.append(json.dumps(line) + "\n")
        size = prepare_data.size_of(self.path)
        try:
            with open(self.path, "a", encoding="utf-8") as f:
                f.write("".join(self.waiting))
            self.waiting = []
        except OSError as e:
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)  # a part of it may have been written
            if len(self.waiting) == 1:
                warn(f"cannot write {self.path} ({first_line(e)}): the run goes on, and its lines "
                     f"are kept until there is space")


    def close(self):
        """Say so if lines are lost."""
        if self.waiting:
            warn(f"{len(self.waiting)} line(s) of {self.path} could not be written and are lost")


def warn(message):
    """A line on stderr about something that does not stop the run."""
    print("train.py: " + " ".join(message.split()), file=sys.stderr, flush=True)


def git_commit():
    """The commit of this code, or "" if that is not known."""
    if not shutil.which("git"):
        return ""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True,
                         cwd=Path(__file__).parent)
    return git.stdout.strip()


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


# ---- pictures and comparison

def read_run(folder):
    """A finished run -> dict with its name, result (result.json), kind, label and log.

    kind: the corpus, and the settings without those that may differ between runs of one experiment.
    log: the lines of log.jsonl.
    """
    folder = Path(folder)
    way_out = "give folders of finished runs, as out/NAME"
    result = read_json(folder / "result.json", way_out)
    settings = read_config(folder)["settings"]
    corpus = prepare_data.read_meta(folder)["sha256"]
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
    """What a picture calls runs with these settings."""
    known = {f.name for f in dataclasses.fields(GPTConfig)}
    config = GPTConfig(**{name: settings[name] for name in known & settings.keys()})
    name = "Memory+" if config.mem_gate and config.qk_norm else "Memory"
    labels = {
        "dense": f"Dense, width {config.n_embd}",
        "memory": f"{name}, {config.mem_n_keys ** 2:,} slots",
        "ultramem": f"UltraMem, {config.ultramem_n_keys() ** 2:,} slots",
        "hash": f"Hashed memory, {config.mem_n_keys ** 2:,} slots",
        "peer": f"PEER, {config.peer_n_keys() ** 2:,} experts",
        "moe": f"MoE, {config.experts():,} experts",
    }
    return labels[config.ffn]


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


# ---- the machine

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


def choose_device(s, local_rank=0, world=1):
    """The device of this rank, as a string. Raises ValueError if it cannot do what s asks for."""
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
    wants_bfloat16 = s.ffn in CAN_BE_SLICED and s.mem_dtype == "bfloat16"
    if wants_bfloat16 and device == "mps":
        raise ValueError(f"--mem-dtype {s.mem_dtype} does not train on mps: "
                         f"use float32 there, or --device cpu")
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    if wants_bfloat16 and device.startswith("cuda") and not has_bfloat16():
        raise ValueError(f"--mem-dtype bfloat16: {torch.cuda.get_device_name()} does not compute "
                         f"in bfloat16: use --mem-dtype float32")
    kernel.backend(s.backend)
    if device == "cpu":
        keep_freed_memory()
    if "OMP_NUM_THREADS" not in os.environ and prepare_data.cpus() < torch.get_num_threads():
        torch.set_num_threads(prepare_data.cpus())  # torch does not know of a container's limit
    return device


def check_room(s, device, world):
    """Raise ValueError if a model is too large to be trained in this machine's memory."""
    if device.startswith("cuda"):
        room = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf"):
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:  # on Windows
        return
    mlps = s.n_layer
    values = 0
    if s.ffn != "dense":  # each rival has as many values, or weights of experts, as the memory
        mlps -= len(s.mem_layers)
        tables = 1 if s.mem_share and s.ffn != "moe" else len(s.mem_layers)
        values = tables * s.mem_n_keys**2 * s.value_dim() / slices(s, world)
    # The large matrices: embedding, four of attention, eight times as many numbers in an MLP.
    matrices = s.vocab_size * s.n_embd + (4 * s.n_layer + 8 * mlps) * s.n_embd**2
    # The logits of a forward pass and their gradient, in float32.
    micro = s.micro_batch_size or s.batch_size // world
    logits = 2 * 4 * micro * s.block_size * s.vocab_size
    # A parameter with its gradient and two moments. See TableAdamW for tables.
    needed = logits + 16 * matrices + (10 if s.mem_dtype == "bfloat16" else 16) * values
    if needed > room:
        raise ValueError(f"the model takes {needed / 1e9:.0f} GB to train, and there are "
                         f"{room / 1e9:.0f} GB: lower --mem-n-keys, --n-embd, --n-layer or "
                         f"--micro-batch-size, or share the table among more ranks")


def has_bfloat16():
    """Whether the GPU computes in bfloat16. Those before 2020 do not."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def will_compile(wanted, device):
    """Whether to use torch.compile. wanted: None means with CUDA, if Triton works there."""
    if wanted is not None:
        return wanted
    return device.startswith("cuda") and not kernel.triton_problem()


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


# Peak bfloat16 FLOP/s of GPUs, without sparsity, for the MFU in the log.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
              "RTX 4090": 165e12, "RTX 3090": 71e12}


# torchrun, or the shell. If torchrun dies, its ranks get another parent (not on Windows).
PARENT = os.getppid()


class StopRequest:
    """Ctrl-C, SIGTERM or a terminal that closes: the first signal asks the loop to save and leave.

    A second one leaves at once. torchrun passes a Ctrl-C on, so that its ranks get it twice: a
    signal within three seconds of the first is taken for the same one. If torchrun was killed, its
    ranks leave, too. nohup makes a process ignore that the terminal closes, and so it remains.
    """

    def __init__(self):
        self.time = None  # when it was asked for
        self.under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        signal.signal(signal.SIGINT, self.handle)
        signal.signal(signal.SIGTERM, self.handle)
        closes = getattr(signal, "SIGHUP", None)  # Windows has none
        if closes and signal.getsignal(closes) != signal.SIG_IGN:
            signal.signal(closes, self.handle)

    def handle(self, number, frame):
        now = time.monotonic()
        if self.time is None:
            self.time = now
            # A signal may come while print() is at work, so this must not be another print().
            with contextlib.suppress(OSError):
                os.write(2, b"stopping soon; once more, after three seconds, stops at once\n")
        elif now > self.time + 3:
            os._exit(130)

    def __bool__(self):
        is_orphan = self.under_torchrun and os.getppid() != PARENT
        return self.time is not None or is_orphan


# The first steps of a process compile and warm up, so they are no measure of speed.
WARM_UP = 3


class Stopwatch:
    """Training time, without evaluations and checkpoints.

    seconds: of the whole run, those before a resume included. timed_steps, timed_seconds: without
    the first WARM_UP steps of this process, for the speed.
    """

    def __init__(self, seconds, step):
        self.seconds = seconds
        self.first = step
        self.since = step  # the step at which the lap began
        self.begin = time.perf_counter()
        self.timed_steps = 0
        self.timed_seconds = 0.0

    def lap(self, step, is_last):
        """The lap ends at this step -> seconds a step."""
        lap = time.perf_counter() - self.begin
        steps = step - self.since
        self.seconds += lap
        # is_last: a run that is shorter than the warm-up has a speed, too.
        if self.since >= self.first + WARM_UP or is_last:
            self.timed_steps += steps
            self.timed_seconds += lap
        return lap / steps

    def speed(self):
        """Steps per second; 0 for a run that had only to be finished."""
        return self.timed_steps / self.timed_seconds if self.timed_steps else 0.0

    def go_on(self, step):
        """The next lap begins."""
        self.since = step
        self.begin = time.perf_counter()


# ---- one step

class Trainer:
    """A model with its data and optimizers, and what one training step does with them.

    s: Settings, completed by fit_to_data. device: from choose_device. resume: go on from the
    checkpoint in s.out_dir.
    """

    def __init__(self, s, meta, device, rank=0, world=1, resume=False):
        self.s = s
        self.device = device
        self.cuda = device.startswith("cuda")
        self.rank = rank
        self.world = world
        self.loader = Loader(s.data, "train", meta, s)
        check_room(s, device, world)
        torch.manual_seed(s.seed)
        torch.set_float32_matmul_precision("high")
        self.ctx = contextlib.nullcontext()
        if self.cuda and has_bfloat16():
            self.ctx = torch.autocast("cuda", torch.bfloat16)

        # The rows of each global batch that are this rank's, and how many it takes at a time.
        self.micro = s.micro_batch_size or s.batch_size // world
        self.accumulate = s.batch_size // (self.micro * world)
        self.rows = np.array_split(np.arange(s.batch_size), world)[rank]

        self.P = slices(s, world)
        mesh = None
        if world > 1 and s.ffn in CAN_BE_SLICED:
            mesh = init_device_mesh(device.split(":")[0], (world // self.P, self.P),
                                    mesh_dim_names=("replica", "slice"))
        self.first_step = 0
        self.seconds = 0.0
        self.line = None  # numbers of the last step of a run that had only its end left to do
        if resume:
            self.load(meta, mesh)
        elif s.init_from:
            self.model = self.take_weights(mesh)
            self.optimizers, self.dense = make_optimizers(self.model, s)
        else:
            self.model = GPT(s, mesh).to(device)
            self.optimizers, self.dense = make_optimizers(self.model, s)
        self.compiled = will_compile(s.compile, device)
        self.net = self.wrap()

    def take_weights(self, mesh):
        """The model of --init-from, if it has learned the tokens of this data."""
        s = self.s
        changes = {name: getattr(s, name) for name in MAY_DIFFER}
        model, _ = load_checkpoint(s.init_from, self.device, mesh, **changes)
        theirs = prepare_data.load_tokenizer(s.init_from)
        if theirs.tokens != prepare_data.load_tokenizer(s.data).tokens:
            raise ValueError(f"--init-from {s.init_from}: it was trained on other tokens than "
                             f"{s.data} has: only those of --tokenizer gpt2 and bytes are the same "
                             f"for every text, prepare both texts with one of these")
        return model

    def load(self, meta, mesh):
        """Take model and optimizers from the checkpoint of a run that is to go on."""
        s = self.s
        out = Path(s.out_dir)
        self.model, state = load_checkpoint(out, self.device, mesh)
        for name, value in state["settings"].items():
            if name not in MAY_CHANGE | {"out_dir"} and getattr(s, name, value) != value:
                raise ValueError(f"{out}/config.json says {name} {getattr(s, name)}, and ckpt.pt "
                                 f"says {value}: one of them is another run's, put it back")
        if prepare_data.read_meta(out)["sha256"] != meta["sha256"]:
            raise ValueError(f"{s.data} is not the data that {out} was trained on: "
                             f"point --data at that")
        self.optimizers, self.dense = make_optimizers(self.model, s)
        self.optimizers[0].load_state_dict(state["optimizer"])
        if self.model.tables:
            self.optimizers[1].load(state["tables"], state["step"])
        self.first_step = state["step"]
        self.seconds = state["seconds"]
        self.line = state.get("line")

    def wrap(self):
        """The model as it is called in training: compiled, and over several ranks in DDP."""
        net = self.model
        if self.compiled:
            net = torch.compile(net)
            if self.model.tables:
                # Otherwise the graph is cut where DDP sends its gradients, and the backward of one
                # part finds that the other's has written to grad_sum.
                torch._dynamo.config.optimize_ddp = False
        if self.world > 1:
            # torch 2.13 has another name for it and warns; 2.11 knows this one only.
            warnings.filterwarnings("ignore", "`broadcast_buffers`")
            # No init_sync: all ranks made, or loaded, the same weights, and of a table their part.
            net = torch.nn.parallel.DistributedDataParallel(
                net, device_ids=[self.device] if self.cuda else None, broadcast_buffers=False,
                init_sync=False)
        return net

    def count_reads(self, on):
        """Whether the next step counts what it reads from the tables, for usage()."""
        for table in self.model.tables:
            table.count(on)

    def step(self, step):
        """Train on the batch of this step -> (loss of this rank, list of gradient norms).

        All are scalar tensors, so that nobody has to wait for the device.
        """
        # Dropout depends on these three alone, so that a resumed run draws the same masks. Python's
        # hash of numbers is the same in every process.
        torch.manual_seed(hash((self.s.seed, step, self.rank)))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(step, self.s, group["end"])
        loss = self.forward_and_backward(step)
        norms = [torch.nn.utils.clip_grad_norm_(self.dense, largest_norm(self.s))]
        self.optimizers[0].step()
        for table_optimizer in self.optimizers[1:]:
            norms.append(table_optimizer.step())  # it clips by itself
        self.optimizers[0].zero_grad(set_to_none=True)
        return loss, norms

    def forward_and_backward(self, step):
        """Gradients of all micro-batches of a step -> their mean loss."""
        loss = torch.zeros((), device=self.device)
        for m in range(self.accumulate):
            rows = self.rows[m * self.micro:(m + 1) * self.micro]
            x, y = (self.to_device(t) for t in self.loader.batch(step, rows))  # (micro, T) both
            if self.world > 1:
                # DDP averages the gradients over ranks at the end of a backward. Once is enough.
                self.net.require_backward_grad_sync = m + 1 == self.accumulate
            with self.ctx:
                part = self.net(x, y)[1] / self.accumulate
            part.backward()
            loss += part.detach()
        return loss

    def to_device(self, t):
        if self.cuda:
            t = t.pin_memory()  # so that nobody waits until it is copied
        return t.to(self.device, non_blocking=True)

    def save(self, step, seconds, line=None):
        """Write the checkpoint -> None, or what went wrong, see save_checkpoint."""
        return save_checkpoint(Path(self.s.out_dir), self.model, self.optimizers, step, seconds,
                               dataclasses.asdict(self.s), line)


def profile(trainer):
    """Print where the time of 20 steps goes, after 10 steps to warm up."""
    for step in range(10):
        trainer.step(step)
    # The profiler's records fragment the heap. Free enough memory now, so that no step has to ask
    # the operating system for more: that would cost time that a run does not pay.
    blocks = [torch.ones(2**22) for _ in range(32)]
    del blocks
    profiler = torch.profiler.profile()
    profiler.start()
    for step in range(10, 30):
        trainer.step(step)
    profiler.stop()
    key = "self_cuda_time_total" if trainer.cuda else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=key, row_limit=30, max_name_column_width=60)
    if trainer.rank == 0:
        print(table)


# ---- the loop

def train(s, preset, resume):
    """A whole run -> its exit status: 0, or 130 if it was asked to stop and has saved."""
    rank, local_rank, world = ranks()
    out = Path(s.out_dir)
    if is_over(s, resume, rank):
        return 0
    device = choose_device(s, local_rank, world)
    meet_the_others(device, rank, world)
    if rank == 0:
        make_missing_data(s, preset)
    wait_for_all()  # for the data
    if resume and (out / "ckpt.pt").exists() and not Path(s.data).is_dir():
        raise ValueError(f"{s.data}, the data of {out}, is not there any more: if it was moved, "
                         f"give its folder with --data")
    meta = fit_to_data(s, world)
    facts = read_facts(s.data) if "window" in meta else None
    with own_folder(s, rank, resume):
        # Rank 0 may have waited for the end of another run. Only now do all look at the folder.
        wait_for_all()
        if is_over(s, resume, rank):
            return 0
        # A run that died before its first checkpoint starts again.
        go_on = resume and (out / "ckpt.pt").exists()
        trainer = Trainer(s, meta, device, rank, world, go_on)
        hardware = describe_hardware(device)
        if rank == 0:
            print(describe_run(trainer, preset, hardware), flush=True)
        if s.profile:
            profile(trainer)
            return 0
        if rank == 0:
            prepare_folder(s, preset, trainer.first_step, hardware)
        return Run(trainer, meta, facts, hardware).loop()


def is_over(s, resume, rank):
    """Whether --resume finds a finished run, and says so.

    Raises ValueError on rank 0 if there is a run that nobody wants to resume.
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


class Run:
    """The loop of a run: when it logs, evaluates, saves and stops.

    facts: the arrays of recall.npz, or None for a text. hardware: its name, for the MFU.
    """

    def __init__(self, trainer, meta, facts, hardware):
        self.trainer = trainer
        self.s = trainer.s
        self.meta = meta
        self.facts = facts
        self.out = Path(self.s.out_dir)
        self.log = Log(self.out)
        self.val = Loader(self.s.data, "val", meta, self.s)
        self.watch = Stopwatch(trainer.seconds, trainer.first_step)
        self.is_first_rank = trainer.rank == 0
        self.tokens_per_step = self.s.batch_size * self.s.block_size
        self.flops = trainer.model.flops_per_token()
        self.peak = peak_flops(hardware, trainer.world)

    def loop(self):
        """Train to the end -> 0, or until somebody asks to stop -> 130, with all saved."""
        s = self.s
        trainer = self.trainer
        stop = StopRequest()
        first = trainer.first_step + 1
        next_look = first
        line = trainer.line
        for step in range(first, s.max_steps + 1):
            is_last = step == s.max_steps
            time_to_evaluate = step % s.eval_every == 0 and not is_last
            time_to_log = is_last or time_to_evaluate or step % s.log_every == 0
            # torch.compile makes two graphs, with and without counting reads. We count in the first
            # step, so that both are there before timing begins.
            trainer.count_reads(time_to_log or step == first)
            loss, norms = trainer.step(step - 1)

            # Looking at the loss makes the CPU wait for the device, so we look only when something
            # depends on it. Ranks must look at the same step, since they decide together.
            warmed_up = step == trainer.first_step + WARM_UP  # ends the lap that is not timed
            may_stop = bool(stop) if trainer.world == 1 else step >= next_look
            if not (time_to_log or warmed_up or may_stop):
                continue
            loss = sum_over_ranks(loss) / trainer.world
            check_finite(loss, norms, step, s)
            seconds_per_step = self.watch.lap(step, is_last)
            wanted, pace = self.agree(bool(stop), seconds_per_step)
            next_look = step + max(int(SECONDS_TO_LOOK / pace), 1)
            halt = wanted and not is_last

            if halt:
                self.save(step, must=True)  # first: there may be little time
            if time_to_log:
                line = self.describe_step(step, loss, norms, seconds_per_step)
            if time_to_evaluate:
                self.evaluate(line)
            if time_to_log and not is_last and self.is_first_rank:
                self.log.add(line)
            if time_to_evaluate and not halt:
                self.save(step)
            if halt:
                self.log.close()
                if self.is_first_rank:
                    print(f"stopped at step {step} and saved: go on with --resume --out-dir "
                          f"{self.out}")
                return 130
            self.watch.go_on(step)
        self.finish(line)
        return 0

    def agree(self, wants_to_stop, seconds_per_step):
        """-> whether any rank wants to stop, and the mean seconds per step; alike on all ranks."""
        numbers = torch.tensor([float(wants_to_stop), seconds_per_step], device=self.trainer.device)
        wanted, seconds = sum_over_ranks(numbers).tolist()
        return wanted > 0, seconds / self.trainer.world

    def describe_step(self, step, loss, norms, seconds_per_step):
        """The numbers of a step, for log.jsonl. Prints them."""
        share, kl = usage(self.trainer.model)
        line = dict(step=step, tokens=step * self.tokens_per_step,
                    seconds=round(self.watch.seconds, 3), loss=loss.item(), norm=norms[0].item(),
                    lr=self.s.learning_rate * schedule(step - 1, self.s),
                    memory_usage=share, memory_kl=kl)
        if self.is_first_rank:
            print(log_text(line, self.s, seconds_per_step, self.flops, self.peak), flush=True)
        return line

    def evaluate(self, line, count=2000):
        """Add validation loss and recall to the line of a step. Prints them.

        count: facts to ask, None for all. Returns what ask_facts found, {} for a text.
        """
        trainer = self.trainer
        line["val_loss"] = evaluate(trainer.model, self.val, self.s.eval_windows, trainer.ctx,
                                    trainer.rank, trainer.world)
        known = {}
        if self.facts:
            # The share of the corpus that was read by now.
            read = line["step"] * self.s.batch_size / trainer.loader.windows
            known = ask_facts(trainer.model, self.facts, self.meta, read, trainer.rank,
                              trainer.world, count)
            line["recall"] = known["recall"]
        if self.is_first_rank:
            print(evaluation_text(line), flush=True)
        return known

    def save(self, step, must=False, line=None):
        """Write the checkpoint -> whether that worked. must: raise ValueError if it did not."""
        problem = self.trainer.save(step, self.watch.seconds, line)
        if problem and must:
            raise ValueError(problem)
        if problem and self.is_first_rank:
            warn(f"{problem}. The run goes on, and will try again later")
        return not problem

    def finish(self, line):
        """Save, evaluate, write result.json and curves.png, print the report.

        The weights come first: whatever fails after that, they are there, and --resume does it
        again. line: the numbers of the last step.
        """
        s = self.s
        was_saved = self.trainer.first_step == s.max_steps
        is_saved = was_saved or self.save(s.max_steps, line=line)
        known = self.evaluate(line, count=None)
        trainer = self.trainer
        readers = count_readers(trainer.model, trainer.loader, WINDOWS_OF_READS, trainer.ctx,
                                trainer.rank, trainer.world)  # [] without a table
        if self.is_first_rank:
            self.log.add(line)
            self.log.close()
        if not is_saved:
            self.save(s.max_steps, must=True, line=line)
        result = dict(
            seed=s.seed, ffn=s.ffn, tokens=line["tokens"], seconds=self.watch.seconds,
            tokens_per_s=self.tokens_per_step * self.watch.speed(), flops_per_token=self.flops,
            params=self.trainer.model.param_counts(),
            peak_memory_bytes=peak_memory(self.trainer.device), val_loss=line["val_loss"],
            memory_usage=line["memory_usage"], memory_kl=line["memory_kl"], **known)
        if not self.is_first_rank:
            return
        files = ["ckpt.pt", "result.json"]
        if readers:
            windows = min(WINDOWS_OF_READS, trainer.loader.windows)
            arrays = {f"readers_{i}": r.numpy() for i, r in enumerate(readers)}
            write_arrays(self.out / "reads.npz", windows=windows, **arrays)
            files.append("reads.npz")
        write_json(self.out / "result.json", result)
        print(report(result), flush=True)
        problem = try_to_draw([self.out], self.out / "curves.png")
        if problem:
            warn(f"{problem}; the run is finished and saved, and --compare {self.out} draws it")
        else:
            files.append("curves.png")
        print(f"saved in {self.out}: {', '.join(files)}")


# How long ranks train, at most, until they look whether one of them was asked to stop. torchrun
# gives them thirty seconds to leave.
SECONDS_TO_LOOK = 2.0


def read_facts(folder):
    """The arrays of recall.npz, for ask_facts. Raises ValueError if it is missing or broken."""
    path = Path(folder) / "recall.npz"
    with reading(path, prepare_data.how_to_make(folder)):
        with np.load(path) as arrays:
            facts = dict(arrays)
        F = len(facts["control"])
        for name in ("seen", "seen_span", "unseen", "unseen_span", "exposures"):
            if len(facts[name]) != F:
                raise ValueError(f"{name} has {len(facts[name])} facts, not {F}")
    return facts


def make_missing_data(s, preset):
    """Make the corpus of a facts preset, unless it is there or --data names another."""
    default = PRESETS[preset].get("data", Settings.data)
    if preset not in FACTS or s.data != default:
        return
    if not (Path(s.data) / "meta.json").exists():
        prepare_data.make_facts(s.data, **FACTS[preset])
    elif "window" not in prepare_data.read_meta(s.data):
        raise ValueError(f"{s.data} is a text, not the facts corpus of the preset {preset}: move "
                         f"it away, or name it with --data and choose another preset")


def check_finite(loss, norms, step, s):
    """Raise ValueError, on all ranks alike, if the loss or a gradient's norm is not finite."""
    if not torch.isfinite(loss + sum(norms)):
        numbers = " and ".join(f"{norm.item():.3g}" for norm in norms)
        raise ValueError(f"the loss is {loss.item():.3g} and the gradient norm {numbers} at step "
                         f"{step}: lower --learning-rate {s.learning_rate} or --value-lr "
                         f"{s.value_lr}; the last good checkpoint, if one was saved, is in "
                         f"{s.out_dir}")


# ---- what a run prints

def describe_hardware(device):
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{device}, {torch.get_num_threads()} threads, {platform.machine()}"


def peak_flops(hardware, world):
    """Peak FLOP/s of all ranks, or None for hardware that is not in the table."""
    for name, peak in PEAK_FLOPS.items():
        if name in hardware:
            return peak * world
    return None


def describe_run(trainer, preset, hardware):
    """The first lines of a run."""
    s = trainer.s
    model = trainer.model
    counts = model.param_counts()
    compiled = "on" if trainer.compiled else "off"
    memory = "no memory layers"
    if model.tables:
        memory = kernel.describe_backend(trainer.device)
        if trainer.P > 1:
            memory += f"; table in {trainer.P} slices"
    parts = " + ".join(f"{counts[name]:,} {name}"
                       for name in ("embedding", "dense", "half_keys", "values", "experts")
                       if name in counts)
    epochs = s.max_steps * s.batch_size / trainer.loader.windows
    tokens = f"{len(trainer.loader.tokens):,} tokens"
    name = s.out_dir if trainer.first_step else preset  # a resumed run may be of any preset
    lines = [
        f"{name} · {s.ffn} · seed {s.seed} · {hardware} x {trainer.world} · "
        f"torch {torch.__version__} · compile {compiled}",
        memory,
        f"parameters: {parts} = {counts['total']:,}, active {counts['active']:,} · "
        f"{model.flops_per_token():,} FLOPs per token",
        f"data: {s.data}, {tokens}; {s.max_steps} steps of {s.batch_size * s.block_size:,} "
        f"read it {epochs:.2f} times",
    ]
    if trainer.first_step:
        lines[-1] += f" · resumed at step {trainer.first_step}"
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
    parts = [" " * 11 + " evaluation", f"val loss {line['val_loss']:.4f}"]
    if "recall" in line:
        parts.append(f"recall {line['recall']:.3f}")
    return " · ".join(parts)


def main(argv=None):
    """The command line -> the exit status. What the user can mend is one line on stderr."""
    try:
        s, preset, resume, runs = read_settings(argv)
        if runs:
            compare(runs, s.out_dir)
            return 0
        return train(s, preset, resume)
    except KeyboardInterrupt:
        warn("stopped before the first step")
        return 130
    except (ValueError, OSError) as e:
        message = str(e)
    except Exception as e:  # explain() knows which of the others the user can mend
        message = explain(e)
        if not message:
            raise
    warn(message)
    return 1


def explain(error):
    """What to do about an exception of torch's; "" if it must be a fault of this program."""
    why = first_line(error)
    if is_out_of_memory(error):
        return (f"out of memory ({why}): lower --micro-batch-size, --block-size or --mem-n-keys, "
                f"or use --mem-dtype bfloat16 on a GPU")
    if isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error):
        return (f"rank {os.environ.get('RANK')} lost the others: one has stopped, and may say why "
                f"({why}); start all again with --resume and the same --out-dir to go on from the "
                f"last checkpoint, or from the beginning if there is none")
    source = type(error).__module__.split(".")
    if source[0] == "triton" or source[:2] in (["torch", "_dynamo"], ["torch", "_inductor"]):
        return (f"torch.compile or Triton failed ({why}): --no-compile and --backend torch do "
                f"without them")
    return ""


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    prepare_data.steady_output()
    code = main()
    if "RANK" in os.environ:
        # Under torchrun gloo's threads now and then abort a finished process while it is taken
        # down. All is written by now.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
