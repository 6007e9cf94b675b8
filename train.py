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

A batch depends on (seed, step) alone and dropout on (seed, step, rank), so a resumed run gives what
one gives that was never interrupted.

This file, from top to bottom: settings, batches, optimizers, one step, evaluation, the loop, main.
"""
import contextlib
import dataclasses
import functools
import math
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from support.terminal import (StopRequest, listen_to_ctrl_c, quiet_ctrl_c, say_problem,
                              steady_output)

if __name__ == "__main__":
    quiet_ctrl_c()

import numpy as np
import torch
from torch.distributed.device_mesh import init_device_mesh

from memory import RowAdam
from model import GPT, GPTConfig, kind_of
from prepare_data import load_tokenizer, make_facts
from support import run_folder, settings
from support.checkpoint import load_checkpoint, load_same_run, save_checkpoint
from support.data_folder import open_tokens, read_meta
from support.fields import setting
from support.files import write_json
from support.machine import (choose_device, describe_hardware, explain, has_bfloat16, peak_flops,
                             peak_memory, put_back, will_compile)
from support.pictures import compare, try_to_draw
from support.ranks import meet_the_others, ranks, share_out, sum_over_ranks, wait_for_all
from support.readers import save_readers
from support.recall import read_facts
from support.stopwatch import WARM_UP, Stopwatch


# ---- settings

MANY = 2**31 - 1


@dataclass
class Settings(GPTConfig):
    """All settings of a run: those of the model, and these."""
    vocab_size: int = setting(0, "tokens in the vocabulary; 0: the data's, "
                              "rounded up to a multiple of 64 if it is large", 0, 2**16)
    block_size: int = setting(0, "window length in tokens; 0: the data's (facts), or 256", 0, 2**20)
    data: str = setting("data/facts", "folder made by prepare_data.py")
    out_dir: str = setting("", "run folder; default out/<preset>-<ffn>-<seed>")
    init_from: str = setting("", "run folder whose weights are the first ones of this run; "
                             "its model's settings are taken over")
    seed: int = setting(1337, "of weights, batches and dropout", 0, 2**63 - 1)
    max_steps: int = setting(5000, "optimizer steps", 1, MANY)
    batch_size: int = setting(128, "windows per step, over all ranks", 1, 2**24)
    micro_batch_size: int = setting(0, "windows per forward pass and rank; 0: batch_size / ranks. "
                                    "Lower it when memory runs out", 0, 2**24)
    learning_rate: float = setting(3e-3, "peak rate, times linear warm-up and linear decay to 0",
                                   1e-30, 1e38)
    half_key_share: float = setting(1.0, "the rate of the half-keys of --ffn memory, as a share "
                                    "of learning_rate", 1e-30, 1e38)
    table_optimizer: str = setting("row", "row | adamw: what trains the memory table, "
                                   "RowAdam or AdamW (float32 alone)")
    value_lr: float = setting(5e-3, "peak rate of the memory table's values", 1e-30, 1e38)
    expert_lr: float = setting(3e-3, "peak rate of the experts of --ffn moe", 1e-30, 1e38)
    weight_decay: float = setting(0.1, "on matrices; "
                                  "not on embeddings, norms, half-keys and values", 0, 1e9)
    beta1: float = setting(0.9, "AdamW", 0, 1 - 1e-9)
    beta2: float = setting(0.99, "AdamW", 0, 1 - 1e-9)
    grad_clip: float = setting(1.0, "largest norm of the gradient; "
                               "the values' gradient is clipped separately, to the same; 0: off",
                               0, math.inf)
    warmup_steps: int = setting(100, "steps of linear warm-up", 0, MANY)
    log_every: int = setting(100, "steps between log lines", 1, MANY)
    eval_every: int = setting(1000, "steps between evaluations and checkpoints", 1, MANY)
    eval_windows: int = setting(2048, "validation windows per evaluation", 1, MANY)
    device: str = setting("auto", "auto | cpu | cuda | mps")
    backend: str = setting("auto", "auto | triton | torch | reference: what the memory operations "
                           "run on")
    mem_parallel: int = setting(0, "ranks that share a table, each holding some of its dims; "
                                "0: all ranks; 1: each holds the whole", 0, MANY)
    compile: bool = setting(None, "torch.compile; default: with CUDA")

    @property
    def half_key_lr(self):
        """The peak rate of the half-keys."""
        return self.half_key_share * self.learning_rate


# What a preset changes in Settings. With every preset, --ffn is memory unless it is given: see
# settings.preset_settings.
PRESETS = {
    # One small memory layer: here the plain Memory recalls more than Memory+ (docs/results.md).
    "facts": dict(
        n_layer=3, n_head=4, n_embd=64,
        mem_layers=(1,), mem_n_keys=128, mem_key_dim=16, mem_gate=False, qk_norm=False,
        half_key_share=1/3, value_lr=3.2e-1, log_every=250),
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


def read_settings(argv):
    """argv (None: sys.argv) -> (Settings, preset, resume, runs to compare)."""
    return settings.read_settings(argv, Settings, PRESETS, __doc__)


# ---- batches

class Loader:
    """Windows of a .bin file: window i is the tokens [i*T, (i+1)*T), targets are one further on.

    Every window comes once an epoch, in an order that depends on (seed, epoch) alone. The epochs
    are strung together, and step n takes the next batch_size windows, from n * batch_size on. So a
    checkpoint need not store where a run is.
    """

    def __init__(self, folder, split, meta, s):
        self.tokens = open_tokens(folder, split, meta)  # (tokens,) uint16
        self.T = s.block_size
        self.seed = s.seed
        self.batch_size = s.batch_size
        self.windows = (len(self.tokens) - 1) // self.T
        if self.windows < 1:
            raise ValueError(f"{folder}/{split}.bin has {len(self.tokens)} tokens, a window needs "
                             f"{self.T + 1}: lower --block-size, or prepare more text or with "
                             f"another --val-fraction")

    def window(self, i):
        """i (b,) window numbers -> x, y (b, T) int64."""
        places = np.asarray(i)[:, None] * self.T + np.arange(self.T + 1)  # (b, T+1)
        w = torch.from_numpy(self.tokens[places].astype(np.int64))  # (b, T+1)
        # A tensor that is not contiguous cannot be copied to a GPU while it works.
        return w[:, :-1].contiguous(), w[:, 1:].contiguous()

    def batch(self, step, rows):
        """Rows of the global batch of a step, integers in [0, batch_size) -> x, y (b, T) int64."""
        epochs, places = np.divmod(step * self.batch_size + np.asarray(rows), self.windows)  # (b,)
        return self.window([shuffled(self.windows, self.seed, epoch)[place]
                            for epoch, place in zip(epochs.tolist(), places.tolist())])


@functools.lru_cache(maxsize=2)
def shuffled(windows, seed, epoch):
    """The order of the windows in an epoch, (windows,) int64."""
    return np.random.default_rng([seed, epoch]).permutation(windows)


# ---- optimizers

def schedule(step, s):
    """The factor on a peak learning rate: linear warm-up * linear decay to 0."""
    warmup = min(1, (step + 1) / max(s.warmup_steps, 1))
    return warmup * (1 - step / s.max_steps)


def make_optimizers(model, s):
    """AdamW for everything but the table, and with memory layers another optimizer for that.

    The layers say which of their parameters are decayed, and which setting is their rate. Returns
    the optimizers, and lists of parameters to clip, one norm each. RowAdam clips by itself.
    """
    groups = []
    for (is_decayed, rate_name), parameters in model.parameter_groups().items():
        decay = s.weight_decay if is_decayed else 0.0
        groups.append(dict(params=parameters, lr=getattr(s, rate_name), weight_decay=decay))
    betas = (s.beta1, s.beta2)
    optimizers = [torch.optim.AdamW(groups, lr=s.learning_rate, betas=betas, fused=True)]
    clipped = [[p for group in groups for p in group["params"]]]
    if model.table and s.table_optimizer == "row":
        optimizers.append(RowAdam([model.table], s.value_lr, s.beta2, clip=largest_norm(s)))
    elif model.table:
        clipped.append([model.table.values])
        optimizers.append(torch.optim.AdamW(clipped[-1], lr=s.value_lr, betas=betas,
                                            weight_decay=0.0, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]  # for set_learning_rates
    return optimizers, clipped


def set_learning_rates(optimizers, step, s):
    """Give every group its rate for this step."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, s)


def largest_norm(s):
    """What gradients are clipped to."""
    return s.grad_clip or math.inf


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
        torch.manual_seed(s.seed)
        torch.set_float32_matmul_precision("high")
        self.ctx = contextlib.nullcontext()
        if self.cuda and has_bfloat16():
            self.ctx = torch.autocast("cuda", torch.bfloat16)

        # The rows of each global batch that this rank reads in each micro-step.
        micro = s.micro_batch_size or s.batch_size // world
        self.rows = np.arange(s.batch_size).reshape(world, -1, micro)[rank]  # (micro-steps, micro)

        self.P = settings.slices(s, world)
        mesh = None
        if world > 1 and settings.trains_slices(s):
            mesh = init_device_mesh(device.split(":")[0], (world // self.P, self.P),
                                    mesh_dim_names=("replica", "slice"))
        # What earlier processes did of this run. The loop does not change these three.
        self.steps_done = 0
        self.seconds = 0.0
        self.line = None  # the log line of the last step, if only the end of the run is left
        if resume:
            self.model, saved = load_same_run(s, meta, device, mesh)
        elif s.init_from:
            self.model = take_weights(s, device, mesh)
        else:
            self.model = GPT(s, mesh).to(device)
        self.compiled = will_compile(s.compile, device)
        # Before make_optimizers: RowAdam makes slices trainable, and DDP must not see them.
        self.net = self.wrap()
        self.optimizers, self.clipped = make_optimizers(self.model, s)
        if resume:
            self.restore(saved)

    def restore(self, saved):
        """Take the state of the optimizers and the progress of a run from its checkpoint."""
        for optimizer, state in zip(self.optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        self.steps_done = saved["step"]
        self.seconds = saved["seconds"]
        self.line = saved.get("line")

    def wrap(self):
        """The model as it is called in training: compiled, and over several ranks in DDP."""
        net = self.model
        if self.compiled:
            net = torch.compile(net)
        if self.world > 1:
            # torch 2.13 has another name for it and warns; 2.11 knows this one only.
            warnings.filterwarnings("ignore", "`broadcast_buffers`")
            # init_sync=False: each rank has the same weights already, and its slice of the table.
            # DDP leaves slices alone: RowAdam averages their gradients.
            net = torch.nn.parallel.DistributedDataParallel(
                net, device_ids=[self.device] if self.cuda else None, broadcast_buffers=False,
                init_sync=False)
        return net

    def count_reads(self, on):
        """Whether the next step counts what it reads from the table, for usage()."""
        if self.model.table:
            self.model.table.count(on)

    def step(self, step):
        """Train on the batch of this step -> (loss of this rank, list of gradient norms).

        All are scalar tensors, so that nobody has to wait for the device.
        """
        # Dropout depends on these three alone, so that a resumed run draws the same masks. Python's
        # hash of numbers is the same in every process.
        torch.manual_seed(hash((self.s.seed, step, self.rank)))
        set_learning_rates(self.optimizers, step, self.s)
        loss = self.forward_and_backward(step)
        norms = [torch.nn.utils.clip_grad_norm_(parameters, largest_norm(self.s))
                 for parameters in self.clipped]
        for optimizer in self.optimizers:
            optimizer.step()
            if isinstance(optimizer, RowAdam):
                norms.append(optimizer.norm)
            optimizer.zero_grad(set_to_none=True)
        return loss, norms

    def forward_and_backward(self, step):
        """Gradients of all micro-batches of a step -> their mean loss."""
        loss = torch.zeros((), device=self.device)
        for m, rows in enumerate(self.rows):
            x, y = (self.to_device(t) for t in self.loader.batch(step, rows))  # (micro, T) both
            if self.world > 1:
                # DDP averages the gradients over ranks at the end of a backward. Once is enough.
                self.net.require_backward_grad_sync = m + 1 == len(self.rows)
            with self.ctx:
                part = self.net(x, y)[1] / len(self.rows)
            part.backward()
            loss += part.detach()
        return loss

    def to_device(self, t):
        if self.cuda:
            t = t.pin_memory()  # so that nobody waits for the copy
        return t.to(self.device, non_blocking=True)

    def save(self, step, seconds, line=None):
        """Write the checkpoint -> None, or what went wrong, see save_checkpoint."""
        return save_checkpoint(Path(self.s.out_dir), self.model, self.optimizers, step, seconds,
                               dataclasses.asdict(self.s), line)


def take_weights(s, device, mesh):
    """The model of --init-from, if it has learned the tokens of this data."""
    changes = {name: getattr(s, name) for name in settings.MAY_DIFFER}
    model, _ = load_checkpoint(s.init_from, device, mesh, **changes)
    if load_tokenizer(s.init_from).tokens != load_tokenizer(s.data).tokens:
        raise ValueError(f"--init-from {s.init_from}: it was trained on other tokens than "
                         f"{s.data} has: only those of --tokenizer gpt2 and bytes are the same "
                         f"for every text, prepare both texts with one of these")
    return model


# ---- evaluation

@torch.no_grad()
def evaluate(model, loader, count, ctx, rank=0, world=1):
    """Mean loss in nats per token over `count` windows, spread evenly over the validation set."""
    model.eval()
    device = next(model.parameters()).device
    count = min(count, loader.windows)
    # mine (each,): the windows of this rank. After `real` of them come repeats that do not count.
    mine, real = share_out(count, rank, world)
    at_once = model.windows_at_once(loader.T)
    total = 0.0
    for i in range(0, len(mine), at_once):
        x, y = loader.window(mine[i:i + at_once] * loader.windows // count)  # (b, T) both
        with ctx:
            _, loss = model(x.to(device), y.to(device), reduction="none")  # (b, T)
        total += loss.mean(dim=1)[:max(real - i, 0)].sum().item()
    model.train()
    return sum_over_ranks(torch.tensor(total, device=device)).item() / count


@torch.no_grad()
def ask_facts(model, facts, meta, epochs, rank=0, world=1, count=None):
    """What the model knows of the facts corpus, having read it `epochs` times (0.5: half of it).

    facts: the arrays of recall.npz. count: ask only so many facts, and return {"recall"} alone.
    Otherwise: recall, recall_by_exposures, recall_control, recall_unseen_phrasing, bits_stored and
    bits_per_param. bits_stored is facts * log2(possible answers) minus the answers' cross-entropy.
    """
    control = facts["control"]  # (F,) bool: facts about people who are never in the text
    named = np.flatnonzero(~control)
    chosen = np.arange(len(control))
    if count:
        chosen = np.random.default_rng(0).permutation(named)[:count]
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
    bits = np.log2(meta["answers"]) * len(named) - nats[named].sum() / math.log(2)
    bits = max(0.0, bits)
    return dict(
        recall=right[named].mean(),
        recall_by_exposures=by_exposures(right[named], facts["exposures"][named] * epochs),
        recall_control=mean_or_none(right[control]),
        recall_unseen_phrasing=mean_or_none(unseen[~control & has_unseen]),
        bits_stored=bits,
        bits_per_param=bits / model.param_counts()["total"])


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
    """What the last counted step used of the table, on all ranks: (share of slots, KL in nats).

    (None, None) without a table. See memory.MemoryTable.usage.
    """
    if not model.table:
        return None, None
    sum_over_ranks(model.table.read_weight)  # in place: each rank counted its own tokens' reads
    return model.table.usage()


# ---- the loop

# Seconds between the looks of several ranks at whether one of them was asked to stop, if a step
# takes no longer. torchrun kills them thirty seconds after a signal.
SECONDS_TO_LOOK = 2.0


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
        self.val = Loader(self.s.data, "val", meta, self.s)
        self.watch = Stopwatch(trainer.seconds, trainer.steps_done)
        self.is_first_rank = trainer.rank == 0
        self.tokens_per_step = self.s.batch_size * self.s.block_size
        self.flops = trainer.model.flops_per_token()
        self.peak = peak_flops(hardware, trainer.world)

    def loop(self, stop):
        """Train to the end -> 0, or until somebody asks to stop -> 130, with all saved.

        stop: true once they have, see StopRequest.
        """
        s = self.s
        trainer = self.trainer
        first = trainer.steps_done + 1
        next_look = first
        line = trainer.line
        for step in range(first, s.max_steps + 1):  # from 1; Trainer.step counts from 0
            is_last = step == s.max_steps
            time_to_evaluate = step % s.eval_every == 0 and not is_last
            time_to_log = is_last or time_to_evaluate or step % s.log_every == 0
            # torch.compile makes two graphs, with and without counting reads. We count in the first
            # step, so that both are there before timing begins.
            trainer.count_reads(time_to_log or step == first)
            loss, norms = trainer.step(step - 1)

            # Looking at the loss makes the CPU wait for the device, so we look only when something
            # depends on it. All ranks must look in the same step, since they decide together.
            warmed_up = step == trainer.steps_done + WARM_UP  # ends the lap that is not timed
            time_to_look = bool(stop) if trainer.world == 1 else step >= next_look
            if not (time_to_log or warmed_up or time_to_look):
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
            if time_to_log and not is_last:
                self.log(line)
            if time_to_evaluate and not halt:
                self.save(step)
            if halt:
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
            print(run_folder.log_text(line, self.s, seconds_per_step, self.flops, self.peak),
                  flush=True)
        return line

    def log(self, line):
        """Where the numbers of a step go. For another tool, such as wandb, add a line here."""
        if self.is_first_rank:
            run_folder.add_to_log(self.out, line)

    def evaluate(self, line, count=2000):
        """Add validation loss and recall to the line of a step. Prints them.

        count: facts to ask, None for all. Returns what ask_facts found, {} for a text.
        """
        trainer = self.trainer
        line["val_loss"] = evaluate(trainer.model, self.val, self.s.eval_windows, trainer.ctx,
                                    trainer.rank, trainer.world)
        known = {}
        if self.facts:
            # How often the corpus was read by now: 0.5 is half of it.
            epochs = line["step"] * self.s.batch_size / trainer.loader.windows
            known = ask_facts(trainer.model, self.facts, self.meta, epochs, trainer.rank,
                              trainer.world, count)
            line["recall"] = float(known["recall"])  # no numpy number: it goes into ckpt.pt
        if self.is_first_rank:
            print(run_folder.evaluation_text(line), flush=True)
        return known

    def save(self, step, must=False, line=None):
        """Write the checkpoint -> whether that worked. must: raise ValueError if it did not."""
        problem = self.trainer.save(step, self.watch.seconds, line)
        if problem and must:
            raise ValueError(problem)
        if problem and self.is_first_rank:
            say_problem("train.py", f"{problem}. The run goes on, and will try again later")
        return not problem

    def finish(self, line):
        """Save, evaluate, write result.json and curves.png, print the report.

        The weights come first: whatever fails after that, they are there, and --resume does it
        again. line: the numbers of the last step.
        """
        s = self.s
        was_saved = self.trainer.steps_done == s.max_steps
        is_saved = was_saved or self.save(s.max_steps, line=line)
        known = self.evaluate(line, count=None)
        trainer = self.trainer
        save_readers(self.out, trainer)
        self.log(line)
        if not is_saved:
            self.save(s.max_steps, must=True, line=line)
        if not self.is_first_rank:
            return
        result = self.result(line, known)
        write_json(self.out / "result.json", result)
        print(run_folder.report(result), flush=True)
        problem = try_to_draw([self.out], self.out / "curves.png")
        if problem:
            say_problem("train.py", f"{problem}; the run is finished and saved, and --compare "
                                    f"{self.out} draws it")
        print(f"saved in {self.out}")

    def result(self, line, known):
        """What result.json holds. line: the numbers of the last step. known: of ask_facts."""
        return dict(
            seed=self.s.seed, ffn=self.s.ffn, tokens=line["tokens"], seconds=self.watch.seconds,
            tokens_per_s=self.tokens_per_step * self.watch.speed(), flops_per_token=self.flops,
            params=self.trainer.model.param_counts(),
            peak_memory_bytes=peak_memory(self.trainer.device), val_loss=line["val_loss"],
            memory_usage=line["memory_usage"], memory_kl=line["memory_kl"], **known)


def check_finite(loss, norms, step, s):
    """Raise ValueError, on all ranks alike, if the loss or a gradient's norm is not finite."""
    if not torch.isfinite(loss + sum(norms)):
        numbers = " and ".join(f"{norm.item():.3g}" for norm in norms)
        raise ValueError(f"the loss is {loss.item():.3g} and the gradient norm {numbers} at step "
                         f"{step}: lower --learning-rate {s.learning_rate} or --value-lr "
                         f"{s.value_lr}; the last good checkpoint, if one was saved, is in "
                         f"{s.out_dir}")


# ---- main

@put_back()
def train(s, preset, resume):
    """A whole run -> its exit status: 0, or 130 if it was asked to stop and has saved."""
    rank, local_rank, world = ranks()
    out = Path(s.out_dir)
    if run_folder.is_over(s, resume, rank):
        return 0
    # The kinds whose table can be sliced are those that read mem_dtype.
    bfloat16_table = kind_of(s).can_be_sliced and s.mem_dtype == "bfloat16"
    device = choose_device(s, bfloat16_table, local_rank, world)
    meet_the_others(device, rank, world)
    if rank == 0:
        make_missing_data(s, preset)
    wait_for_all()  # for the data
    if resume and (out / "ckpt.pt").exists() and not Path(s.data).is_dir():
        raise ValueError(f"{s.data}, the data of {out}, is not there any more: if it was moved, "
                         f"give its folder with --data")
    meta = settings.fit_to_data(s, world)
    facts = read_facts(s.data) if "window" in meta else None
    with run_folder.own_folder(s, rank, resume):
        # Rank 0 may have waited for the end of another run. Only now do all look at the folder.
        wait_for_all()
        if run_folder.is_over(s, resume, rank):
            return 0
        # A run that died before its first checkpoint starts again.
        has_checkpoint = (out / "ckpt.pt").exists()
        trainer = Trainer(s, meta, device, rank, world, resume and has_checkpoint)
        hardware = describe_hardware(device)
        if rank == 0:
            print(run_folder.describe_run(trainer, preset, hardware), flush=True)
        if rank == 0:
            run_folder.prepare_folder(s, preset, trainer.steps_done, hardware)
        with StopRequest() as stop:
            return Run(trainer, meta, facts, hardware).loop(stop)


def make_missing_data(s, preset):
    """Make the corpus of a facts preset, unless it is there or --data names another."""
    default = PRESETS[preset].get("data", Settings.data)
    if preset not in FACTS or s.data != default:
        return
    if not (Path(s.data) / "meta.json").exists():
        make_facts(s.data, **FACTS[preset])
    elif "window" not in read_meta(s.data):
        raise ValueError(f"{s.data} is a text, not the facts corpus of the preset {preset}: move "
                         f"it away, or name it with --data and choose another preset")


def main(argv=None):
    """The command line -> the exit status. What the user can fix is said in one line on stderr."""
    try:
        s, preset, resume, runs = read_settings(argv)
        if runs:
            compare(runs, s.out_dir)
            return 0
        return train(s, preset, resume)
    except KeyboardInterrupt:
        say_problem("train.py", "stopped before the first step")
        return 130
    except (ValueError, OSError) as e:
        message = str(e)
    except Exception as e:  # explain() knows which of the others the user can fix
        message = explain(e, "lower --micro-batch-size, --block-size or --mem-n-keys, or use "
                             "--mem-dtype bfloat16 on a GPU")
        if not message:
            raise
    say_problem("train.py", message)
    return 1


if __name__ == "__main__":
    listen_to_ctrl_c()
    steady_output()
    code = main()
    quiet_ctrl_c()  # all is written
    if "RANK" in os.environ:
        # Under torchrun gloo's threads now and then abort a finished process while it is taken
        # down. All is written by now.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
