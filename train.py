"""
Train a GPT, dense or with memory layers, and say what it learned.

    python train.py                                  # facts: a small corpus made on the spot; minutes on a laptop
    python train.py --ffn dense                      # the same without memory: the control
    python train.py --compare out/facts-memory-1337 out/facts-dense-1337
    python train.py tinystories                      # after: python prepare_data.py tinystories
    torchrun --standalone --nproc_per_node=8 train.py openwebtext
    python train.py --resume --out-dir out/facts-memory-1337

A run folder out/<run> holds config.json, log.jsonl, ckpt.pt, at the end result.json and curves.png, and what sample.py needs of the data.
Batches are a function of (seed, step) alone and dropout is seeded by (seed, step, rank), so a resumed run is the run that never stopped.
"""
import argparse, contextlib, dataclasses, hashlib, inspect, json, math, os, platform, re, shutil, signal, subprocess, sys, time, warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import prepare_data
from kernel import describe_backend, keep_freed_memory
from model import GPT, GPTConfig, Trouble, pick_device


@dataclass
class Settings(GPTConfig):
    vocab_size: int = 0         # tokens in the vocabulary; 0: the data's, rounded up to a multiple of 64 if it is large
    block_size: int = 0         # window length in tokens; 0: the data's (facts), or 256
    data: str = "data/facts"    # folder made by prepare_data.py
    out_dir: str = ""           # run folder; default out/<preset>-<ffn>-<seed>
    seed: int = 1337            # of weights, batches and dropout
    max_steps: int = 5000       # optimizer steps
    batch_size: int = 128       # windows per step, over all ranks
    micro_batch_size: int = 0   # windows per forward pass and rank; 0: batch_size / ranks. Lower it when memory runs out
    learning_rate: float = 3e-3 # times a warm-up from 0 to 1, times a straight line from 1 down to 0
    value_lr: float = 5e-3      # the same for the memory table's values
    weight_decay: float = 0.1   # on matrices; not on embeddings, norms, half-keys and values
    beta1: float = 0.9          # AdamW
    beta2: float = 0.99         # AdamW
    grad_clip: float = 1.0      # largest norm of the gradient; the values' gradient is clipped apart, to the same norm
    warmup_steps: int = 100     # steps of linear warm-up
    log_every: int = 100        # steps between log lines
    eval_every: int = 1000      # steps between evaluations and checkpoints
    eval_windows: int = 2048    # validation windows per evaluation
    device: str = "auto"        # auto | cpu | cuda | mps
    mem_parallel: int = 0       # ranks that share a table, each holding some of its dims; 0: all ranks; 1: each holds the whole
    compile: bool = None        # torch.compile; default: with CUDA
    profile: bool = False       # print where the time of 20 steps goes, operation by operation, and stop


PRESETS = {  # what a preset changes in Settings; for those in FACTS the corpus is made on the spot
    "facts": dict(n_layer=3, n_head=4, n_embd=64, mem_layers=(1,), mem_n_keys=128, mem_key_dim=16, mem_gate=False, qk_norm=False,
                  value_lr=4e-2, log_every=250),  # the plain Memory: with one small layer it recalls more than Memory+ (README.md)
    "facts-gpu": dict(data="data/facts-gpu", n_layer=8, n_head=8, n_embd=512, mem_layers=(2, 4, 6), mem_n_keys=512, mem_dtype="bfloat16",
                      max_steps=16_000, batch_size=512, learning_rate=1e-3, value_lr=1e-2),
    "tinystories": dict(data="data/tinystories", n_layer=6, n_head=6, n_embd=384, block_size=256, mem_layers=(1, 3, 5),
                        max_steps=20000, batch_size=64, learning_rate=1e-3, value_lr=5e-3, log_every=50, eval_windows=512),
    "openwebtext": dict(data="data/openwebtext", n_layer=12, n_head=12, n_embd=768, block_size=1024, mem_layers=(2, 6, 10),
                        mem_n_keys=1024, mem_dtype="bfloat16", max_steps=20000, batch_size=512, micro_batch_size=32, learning_rate=6e-4, value_lr=3e-3,
                        beta2=0.95, warmup_steps=700, log_every=10, eval_every=500, eval_windows=1024),
}
FACTS = {"facts": dict(people=8000, documents=640_000), "facts-gpu": dict(people=100_000, documents=8_192_000)}
MAY_CHANGE = {"device", "compile", "micro_batch_size", "log_every", "data", "mem_parallel"}  # on --resume: nothing that changes the run
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "RTX 3090": 71e12}  # bf16, dense


# ---- settings

def read_settings(argv):
    """Command line -> (Settings, preset, resume, runs to compare). Flags come from the dataclasses, their help from the comments there."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.error = lambda message: p.exit(2, f"train.py: {message} (python train.py --help lists every setting)\n")
    p.add_argument("preset", nargs="?", default="facts", help="which defaults to start from: " + ", ".join(PRESETS))
    p.add_argument("--resume", action="store_true", help="go on with the run in --out-dir")
    p.add_argument("--compare", nargs="+", metavar="RUN", help="print and draw these run folders side by side, train nothing")
    helps = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(GPTConfig) + inspect.getsource(Settings), re.M))
    defaults = Settings(**dict(ffn="memory") | PRESETS["facts"])
    for f in dataclasses.fields(Settings):
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=block_numbers if f.type is tuple else f.type)
        p.add_argument(flag(f.name), default=argparse.SUPPRESS, help=f"{helps[f.name]} ({getattr(defaults, f.name)})".replace("%", "%%"), **kind)
    given = vars(p.parse_args(argv))
    preset, resume, runs = given.pop("preset"), given.pop("resume"), given.pop("compare")
    if preset not in PRESETS:
        p.error(f"preset {preset!r} is unknown: choose one of {', '.join(PRESETS)}")
    s = Settings(**dict(ffn="memory") | PRESETS[preset] | given)
    s.out_dir = s.out_dir or f"out/{preset}-{s.ffn}-{s.seed}" + "-profile" * s.profile
    if resume:
        saved = read_json(Path(s.out_dir) / "config.json", "nothing to resume: give the folder of a run with --out-dir")["settings"]
        saved["mem_layers"] = tuple(saved["mem_layers"])
        for name in given.keys() - MAY_CHANGE - {"out_dir"}:
            if given[name] != saved[name]:
                raise Trouble(f"{flag(name)} {given[name]} is not the run's {saved[name]}: a resumed run keeps its settings, "
                              f"start another with --out-dir")
        s = Settings(**saved | {k: v for k, v in given.items() if k in MAY_CHANGE} | dict(out_dir=s.out_dir))
    return s, preset, resume, runs


def block_numbers(text):
    return tuple(int(x) for x in text.split(","))


def flag(name):
    return "--" + name.replace("_", "-")


def read_json(path, way_out, parse=json.loads):
    try:
        return parse(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise Trouble(f"cannot read {path} ({type(e).__name__}): {way_out}") from None


def write_whole(path, write):
    """Write a file under another name, rename it when it is whole: whatever happens, what stood there before is not lost."""
    part = Path(f"{path}.part")
    try:
        write(part)
        os.replace(part, path)
    except (OSError, RuntimeError) as e:  # torch.save says RuntimeError when the disk is full
        part.unlink(missing_ok=True)
        raise Trouble(f"cannot write {path} ({str(e).splitlines()[0]}): free some space or choose another --out-dir; "
                      f"what was saved before is still there") from None


def write_json(path, content):
    write_whole(path, lambda part: part.write_text(json.dumps(content, indent=1) + "\n", "utf-8"))


def fit_to_data(s, world):
    """Fill in what the data decides, and refuse what cannot work. Returns the data's meta.json."""
    meta = read_json(Path(s.data) / "meta.json", f"prepare the data first: python prepare_data.py {Path(s.data).name}")
    V, infinity = meta["vocab_size"], math.inf
    s.vocab_size = s.vocab_size or (V if V < 10_000 else (V + 63) // 64 * 64)
    s.block_size = s.block_size or meta.get("window", 256)
    if s.vocab_size < V:
        raise Trouble(f"--vocab-size {s.vocab_size} < {V} tokens in {s.data}: raise it or leave it out")
    if s.block_size != meta.get("window", s.block_size):
        raise Trouble(f"--block-size {s.block_size} is not {s.data}'s window of {meta['window']} tokens, one fact each: leave it out")
    for names, low, high in (("max_steps batch_size log_every eval_every eval_windows", 1, infinity), ("beta1 beta2", 0, 1 - 1e-9),
                             ("learning_rate value_lr grad_clip", 1e-30, infinity), ("weight_decay warmup_steps seed micro_batch_size", 0, infinity)):
        for name in names.split():
            if not low <= getattr(s, name) <= high:
                raise Trouble(f"{flag(name)} {getattr(s, name)} is not between {low} and {high}: change it")
    micro = s.micro_batch_size or s.batch_size // world
    if micro < 1 or s.batch_size % (micro * world):
        raise Trouble(f"--batch-size {s.batch_size} does not divide into {world} rank(s) x --micro-batch-size {micro}: change one of them")
    P, D = s.mem_parallel or world, s.mem_value_dim or s.n_embd
    if s.ffn == "memory" and (P < 1 or world % P or D % P):
        raise Trouble(f"--mem-parallel {P}: a table of {D} dims cannot be shared so by {world} rank(s): choose a number that divides both, 1 always does")
    try:
        s.check()
    except ValueError as e:  # it speaks of mem_topk, the user of --mem-topk
        raise Trouble(re.sub(r"\b(" + "|".join(f.name for f in dataclasses.fields(s)) + r")\b", lambda m: flag(m[0]), str(e))) from None
    return meta


# ---- data

class Loader:
    """Windows of a .bin file: window i is tokens [i*T, (i+1)*T), its targets are one further on. Nothing to save: step s reads the
    windows at places [s*batch_size, (s+1)*batch_size) of a shuffle that is seeded by (seed, epoch); every window once an epoch."""

    def __init__(self, folder, split, meta, s):
        path = Path(folder) / f"{split}.bin"
        try:
            self.tokens = np.memmap(path, dtype="<u2", mode="r")
        except (OSError, ValueError) as e:
            raise Trouble(f"cannot read {path} ({e.__class__.__name__}): prepare the data again") from None
        if len(self.tokens) != meta["tokens"][split]:
            raise Trouble(f"{path} has {len(self.tokens)} tokens, meta.json says {meta['tokens'][split]}: prepare the data again")
        if path.stat().st_size < 2**30 and hashlib.sha256(self.tokens).hexdigest() != meta["sha256"][f"{split}.bin"]:
            raise Trouble(f"{path} is not the file that meta.json describes (its sha256 differs): prepare the data again")
        self.T, self.seed, self.batch_size = s.block_size, s.seed, s.batch_size
        self.windows, self.epoch = (len(self.tokens) - 1) // self.T, None
        if self.windows < 1:
            raise Trouble(f"{path} has {len(self.tokens)} tokens, a window needs {self.T + 1}: lower --block-size or use more text")

    def window(self, i):
        """i (b,) window numbers -> x, y (b, T) int64."""
        w = torch.from_numpy(self.tokens[np.asarray(i)[:, None] * self.T + np.arange(self.T + 1)].astype(np.int64))  # (b, T + 1)
        return w[:, :-1].contiguous(), w[:, 1:].contiguous()                # only such are copied to a GPU while it works

    def batch(self, step, rows):
        """Rows of the global batch of a step, integers in [0, batch_size) -> x, y (b, T) int64."""
        place = step * self.batch_size + np.asarray(rows)                   # (b,)
        number = np.empty_like(place)                                       # (b,)
        for epoch in np.unique(place // self.windows):
            if epoch != self.epoch:
                self.order, self.epoch = np.random.default_rng([self.seed, epoch]).permutation(self.windows), epoch  # (windows,)
            here = place // self.windows == epoch                           # (b,)
            number[here] = self.order[place[here] % self.windows]
        return self.window(number)


# ---- what the model knows

def share_out(n, rank, world):
    """This rank's part of range(n), and how many of it count. All parts are equally long, since ranks that share a table read it together:
    what is missing at the end is filled with n - 1."""
    each = -(-n // world)
    return np.minimum(np.arange(rank * each, (rank + 1) * each), n - 1), min(max(n - rank * each, 0), each)


def sum_over_ranks(t):
    if dist.is_initialized():
        dist.all_reduce(t)
    return t


@torch.no_grad()
def evaluate(model, loader, count, ctx, rank=0, world=1):
    """Mean loss in nats per token over count windows, evenly spread over the validation set; the same ones every time."""
    model.eval()
    total, device, count = 0.0, next(model.parameters()).device, min(count, loader.windows)
    mine, real = share_out(count, rank, world)                              # (each,), numbers of windows among count
    at_once = min(64, max(2**14 // loader.T, 1))  # of 1,024 tokens 16: the logits are larger than all else
    for i in range(0, len(mine), at_once):
        x, y = loader.window(mine[i:i + at_once] * loader.windows // count)  # (b, T) both
        with ctx:
            loss = model(x.to(device), y.to(device), reduction="none")[1]   # (b, T)
        total += loss.mean(dim=1)[:max(real - i, 0)].sum().item()
    model.train()
    return sum_over_ranks(torch.tensor(total, device=device)).item() / count


@torch.no_grad()
def ask_facts(model, facts, meta, read, rank=0, world=1, count=None):
    """What the model knows of the facts corpus after reading a `read` share of it. With count: recall alone, over that many facts."""
    known = np.flatnonzero(~facts["control"])
    chosen = np.random.default_rng(0).permutation(known)[:count] if count else np.arange(len(facts["control"]))
    part, real = share_out(len(chosen), rank, world)
    mine = chosen[part]                                                     # (each,)

    def everywhere(x):  # (each,) -> (F,): each rank fills in its part, the sum is the whole
        whole = np.zeros(len(facts["control"]), np.float32)
        whole[mine[:real]] = x[:real]
        return sum_over_ranks(torch.from_numpy(whole).to(model.wte.weight.device)).cpu().numpy().astype(float)
    right, nats = map(everywhere, model.answer(facts["seen"][mine], facts["seen_span"][mine]))
    if count:
        return dict(recall=right[chosen].mean())
    unseen = everywhere(model.answer(facts["unseen"][mine], facts["unseen_span"][mine])[0])
    exposures = facts["exposures"] * read
    table, edges = [], [0, 1] + [2**i for i in range(1, 12)] + [math.inf]
    for low, high in zip(edges, edges[1:]):
        group = known[(exposures[known] >= low) & (exposures[known] < high)]
        if len(group):
            table.append({"from": low, "to": None if high == math.inf else high, "facts": len(group), "recall": right[group].mean()})
    bits = max(0.0, (np.log2(meta["answers"]) * len(known) - nats[known].sum() / math.log(2)))
    return dict(recall=right[known].mean(), recall_by_exposures=table, recall_control=right[facts["control"]].mean(),
                recall_unseen_phrasing=unseen[known].mean(), bits_stored=bits, bits_per_param=bits / model.param_counts()["total"])


# ---- schedule

def schedule(step, s):
    """What a rate is multiplied with at a step: linear warm-up, times a straight line from 1 to zero at max_steps."""
    return min(1, (step + 1) / max(s.warmup_steps, 1)) * (1 - step / s.max_steps)


# ---- the run folder, what is printed and drawn of it

def prepare_folder(out, s, step, hardware):
    """config.json, the tokenizer and the facts, so that the folder stands alone; a resumed run drops what it logged past its checkpoint."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in ("meta.json", "tokenizer.tiktoken", "recall.npz"):
            if (Path(s.data) / name).exists():
                shutil.copy(Path(s.data) / name, out)
        log = out / "log.jsonl"
        kept = [x for x in log.read_text("utf-8").splitlines() if x.endswith("}") and json.loads(x)["step"] <= step] if step else []
        write_whole(log, lambda part: part.write_text("".join(x + "\n" for x in kept), "utf-8"))
    except OSError as e:
        raise Trouble(f"cannot write in {out} ({e.strerror or e}): choose another --out-dir") from None
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent) if shutil.which("git") else None
    write_json(out / "config.json", dict(
        settings=dataclasses.asdict(s), command=" ".join(sys.argv), git=git.stdout.strip() if git else "", hardware=hardware,
        versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__)))


def usage(model):
    """Mean over the tables, reads of all ranks: (share of slots read, KL from uniform in nats), of the step that was counted."""
    for table in model.tables:
        sum_over_ranks(table.read_weight)
    return np.mean([table.usage() for table in model.tables], axis=0).tolist() if model.tables else (None, None)


def peak_memory(device):
    """Bytes: of the GPU's memory, or of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(ImportError):  # not on Windows
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def report(r):
    """The closing block of a run, one name and value a line."""
    plain = r | {f"params_{k}": v for k, v in r["params"].items()}
    lines = ["---"] + [f"{k:22s} {v:.4f}" if isinstance(v, float) else f"{k:22s} {v}" for k, v in plain.items() if isinstance(v, (int, float, str))]
    if "recall" in r:
        lines += ["", " times read   facts   recalled"]
        for row in r["recall_by_exposures"]:
            label = f"{row['from']}" if row["from"] + 1 == row["to"] else f"{row['from']} - {row['to'] - 1}" if row["to"] else f"{row['from']} - "
            lines.append(f"{label:>11s} {row['facts']:7d}   {100 * row['recall']:5.1f} %  " + "#" * round(40 * row["recall"]))
        lines.append(f"people who are never named (control)   {100 * r['recall_control']:.1f} %")
    return "\n".join(lines)


def read_run(folder):
    """A finished run -> (result.json, its kind: the settings without what may differ between runs of one experiment, log.jsonl)."""
    way_out = "give folders of finished runs, as out/NAME"
    r, settings = read_json(Path(folder) / "result.json", way_out), read_json(Path(folder) / "config.json", way_out)["settings"]
    log = read_json(Path(folder) / "log.jsonl", way_out, lambda text: [json.loads(x) for x in text.splitlines()])
    return r, json.dumps({k: v for k, v in settings.items() if k not in ("seed", "out_dir", *MAY_CHANGE)}), log


def draw(folders, path):
    """Loss over tokens, FLOPs and seconds, recall over tokens, seconds and exposures; runs of one kind in one colour."""
    from matplotlib.figure import Figure
    runs = {Path(f).name: read_run(f) for f in folders}
    with_facts, kinds = all("recall" in r for r, _, _ in runs.values()), {}
    fig = Figure(figsize=(15, 4 + 4 * with_facts), layout="constrained")
    axes = fig.subplots(1 + with_facts, 3, squeeze=False)
    for name, (r, kind, log) in runs.items():
        color, first = kinds.setdefault(kind, (f"C{len(kinds)}", name))
        style = dict(color=color, marker="o", ms=3, alpha=0.8, label=name if name == first else None)
        evals = [x for x in log if "val_loss" in x]
        tokens, seconds = [x["tokens"] for x in evals], [x["seconds"] for x in evals]
        panels = [("tokens read", tokens, "val_loss"), ("training FLOPs", [t * r["flops_per_token"] for t in tokens], "val_loss"),
                  ("seconds", seconds, "val_loss"), ("tokens read", tokens, "recall"), ("seconds", seconds, "recall")]
        for ax, (xlabel, x, y) in zip(axes.flat, panels):
            ax.plot(x, [e[y] for e in evals], **style)
            ax.set(xlabel=xlabel, ylabel="validation loss (nats per token)" if y == "val_loss" else "facts recalled")
        if len(runs) == 1:
            axes[0, 0].plot([x["tokens"] for x in log], [x["loss"] for x in log], lw=0.5, color="gray", label="training loss of single steps")
        if with_facts:
            rows = [row for row in r["recall_by_exposures"] if row["from"]]
            axes[1, 2].plot([row["from"] for row in rows], [row["recall"] for row in rows], **style)
            axes[1, 2].set(xlabel="times a fact was read (from)", ylabel="facts recalled", xscale="log")
    axes[0, 0].legend(fontsize=8)
    write_whole(path, lambda part: fig.savefig(part, dpi=80, format="png"))


def compare(folders):
    """Print runs side by side; of a kind that ran with several seeds the mean and standard deviation; ratios to the first kind; draw all."""
    columns = {"tokens M": ("tokens", 1e-6), "seconds": ("seconds", 1), "tok/s k": ("tokens_per_s", 1e-3), "peak MiB": ("peak_memory_bytes", 2**-20),
               "MFLOP/tok": ("flops_per_token", 1e-6), "val loss": ("val_loss", 1), "recall": ("recall", 1),
               "unseen phr.": ("recall_unseen_phrasing", 1), "bits/param": ("bits_per_param", 1)}
    groups = {}
    print(f"{'run':36s}" + "".join(f"{title:>18s}" for title in columns))
    for folder in folders:
        r, kind, _ = read_run(folder)
        numbers = [(r.get(key) or 0) * scale for key, scale in columns.values()]
        print(f"{Path(folder).name:36s}" + "".join(f"{x:18.3f}" for x in numbers))
        groups.setdefault(kind, (Path(folder).name, []))[1].append(numbers)
    for name, numbers in groups.values():
        if len(numbers) > 1:
            print(f"{name + f', mean of {len(numbers)}':36s}" + "".join(f"{np.mean(x):9.3f} ±{np.std(x, ddof=1):7.3f}" for x in zip(*numbers)))
    (first, base), *others = groups.values()
    for name, numbers in others:
        ratios = zip(columns, np.mean(numbers, axis=0), np.mean(base, axis=0))
        print(f"{name} / {first}: " + " · ".join(f"{title} {a / b:.2f}" for title, a, b in ratios if b))
    picture = Path(folders[0]).parent / "compare.png"
    draw(folders, picture)
    print(f"drawn: {picture}")
    return 0


# ---- the run

def choose_device(s, world):
    """The device of this rank, as a string; starts the process group where there are several ranks."""
    device = pick_device(s.device)
    if s.ffn == "memory" and s.mem_dtype != "float32" and device == "mps":
        raise Trouble(f"--mem-dtype {s.mem_dtype} does not train on mps: use float32 there, or --device cpu")
    if world > 1 and device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(minutes=10))
    if device == "cpu":
        keep_freed_memory()
    return device


def restore(out, meta, s, device, mesh):
    """The checkpoint of a run that is to go on -> (model, checkpoint)."""
    model, state = GPT.load(out, device, mesh)
    if read_json(out / "meta.json", "start another run with --out-dir")["sha256"] != meta["sha256"]:
        raise Trouble(f"{s.data} is not the data that {out} was trained on: point --data at that")
    if state["step"] >= s.max_steps:
        raise Trouble(f"{out} has finished its {s.max_steps} steps: nothing to resume, start another with --out-dir out/NAME")
    return model, state


def train(s, preset, resume):
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, out = choose_device(s, world), Path(s.out_dir)
    cuda, say = device.startswith("cuda"), print if rank == 0 else lambda *a, **k: None
    if rank == 0 and not resume and (out / "ckpt.pt").exists():
        raise Trouble(f"{out} holds a run already: go on with it by --resume, or start another with --out-dir out/NAME")
    if rank == 0 and preset in FACTS and s.data == PRESETS[preset].get("data", Settings.data) and not (Path(s.data) / "meta.json").exists():
        prepare_data.make_facts(s.data, **FACTS[preset])
    if world > 1:
        dist.barrier()
    meta = fit_to_data(s, world)
    loader, val = Loader(s.data, "train", meta, s), Loader(s.data, "val", meta, s)
    facts = dict(np.load(Path(s.data) / "recall.npz")) if "window" in meta else None

    torch.manual_seed(s.seed)
    torch.set_float32_matmul_precision("high")
    ctx = torch.autocast("cuda", torch.bfloat16) if cuda else contextlib.nullcontext()
    resume = resume and (out / "ckpt.pt").exists()  # a run that died before its first checkpoint starts again
    P = s.mem_parallel or world
    mesh = init_device_mesh(device.split(":")[0], (world // P, P), mesh_dim_names=("replica", "slice")) if world > 1 and s.ffn == "memory" else None
    model, state = restore(out, meta, s, device, mesh) if resume else (GPT(s, mesh).to(device), dict(step=0, seconds=0.0))
    optimizers, dense = model.make_optimizers(s)
    if resume:
        optimizers[0].load_state_dict(state["optimizer"])
        if model.tables:
            optimizers[1].load(state.pop("tables"), state["step"])
    step, seconds, counts, flops = state["step"], state["seconds"], model.param_counts(), model.flops_per_token()
    use_compile = cuda if s.compile is None else s.compile
    net = torch.compile(model) if use_compile else model
    if use_compile and model.tables:  # it would cut the graph into DDP's buckets, and the first part's backward find grad_sum changed by the second's
        torch._dynamo.config.optimize_ddp = False
    if world > 1:
        warnings.filterwarnings("ignore", "`broadcast_buffers`")  # torch 2.13 calls it otherwise, 2.11 does not
        net = torch.nn.parallel.DistributedDataParallel(net, device_ids=[device] if cuda else None, broadcast_buffers=False,
                                                        init_sync=False)  # all ranks made, or loaded, the same; of a table each its part
    micro = s.micro_batch_size or s.batch_size // world
    accumulate, mine = s.batch_size // (micro * world), np.array_split(np.arange(s.batch_size), world)[rank]
    tokens_per_step, read = s.batch_size * s.block_size, s.batch_size / loader.windows  # read: share of the corpus in a step
    hardware = torch.cuda.get_device_name() if cuda else f"{device}, {torch.get_num_threads()} threads, {platform.machine()}"
    peak = next((f * world for name, f in PEAK_FLOPS.items() if name in hardware), None)
    if rank == 0:
        prepare_folder(out, s, step, hardware)
    say(f"{preset} · {s.ffn} · seed {s.seed} · {hardware} x {world} · torch {torch.__version__} · compile {'on' if use_compile else 'off'}\n"
        + (describe_backend(device) if s.ffn == "memory" else "no memory layers") + (f"; table in {P} slices" if mesh and P > 1 else "") + "\nparameters: "
        + " + ".join(f"{counts[k]:,} {k}" for k in ("embedding", "dense", "half_keys", "values"))
        + f" = {counts['total']:,}, active {counts['active']:,} · {flops:,} FLOPs per token\ndata: {s.data}, {len(loader.tokens):,} tokens; "
        f"{s.max_steps} steps of {tokens_per_step:,} read it {s.max_steps * read:.2f} times" + (f" · resumed at step {step}" if resume else ""))

    stop = []  # first Ctrl-C: finish the step, save, leave; second: leave. torchrun passes the first on, so that ranks get it twice at once
    for sig in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sig, lambda *_: os._exit(130) if stop and time.monotonic() > stop[0] + 3 else stop.append(time.monotonic()))
    first, since, mark, timed_steps, timed_seconds = step, step, time.perf_counter(), 0, 0.0
    while step < s.max_steps:
        last = step + 1 == s.max_steps
        eval_now = last or (step + 1) % s.eval_every == 0
        log_now = eval_now or (step + 1) % s.log_every == 0
        torch.manual_seed(hash((s.seed, step, rank)))  # of dropout
        for table in model.tables:
            table.count(log_now or step == first)  # in the first step too: torch.compile then makes both graphs before anything is timed
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak"] * schedule(step, s)
        loss = torch.zeros((), device=device)
        for m in range(accumulate):
            # (micro, T) both; pinned, so that nobody waits until they are copied
            x, y = ((t.pin_memory() if cuda else t).to(device, non_blocking=True) for t in loader.batch(step, mine[m * micro:(m + 1) * micro]))
            with net.no_sync() if world > 1 and m + 1 < accumulate else contextlib.nullcontext():
                with ctx:
                    part = net(x, y)[1] / accumulate
                part.backward()
            loss += part.detach()
        norm = torch.nn.utils.clip_grad_norm_(dense, s.grad_clip)
        optimizers[0].step()
        norms = [norm, *(optimizer.step() for optimizer in optimizers[1:])]  # a table's optimizer clips by itself and says the norm
        optimizers[0].zero_grad(set_to_none=True)
        step += 1
        if s.profile and step == first + 10:
            [torch.ones(2**22) for _ in range(32)]  # its records break up freed memory: have enough, so that no step must ask for more
            (profiler := torch.profiler.profile()).start()
        if s.profile and step == first + 30:
            profiler.stop()
            say(profiler.key_averages().table(sort_by=f"self_{'cuda' if cuda else 'cpu'}_time_total", row_limit=30, max_name_column_width=60))
            return 0
        if not (log_now or step == first + 3 or (stop if world == 1 else step % 10 == 0)):  # ranks must stop at the same step
            continue  # nothing below is needed, and nothing above waits for the device

        loss = sum_over_ranks(loss) / world
        if not torch.isfinite(loss + sum(norms)):
            raise Trouble(f"the loss is {loss.item():.3g} and the gradient norm {norm.item():.3g} at step {step}: lower --learning-rate "
                          f"{s.learning_rate} or --value-lr {s.value_lr}; the last good checkpoint, if one was saved, is in {out}")
        halt = sum_over_ranks(torch.tensor(float(len(stop)), device=device)).item() > 0 and not last
        lap, steps = time.perf_counter() - mark, step - since
        seconds += lap
        if since > first or last:  # the first three steps compile and warm up: they are no measure of speed
            timed_steps, timed_seconds = timed_steps + steps, timed_seconds + lap
        if log_now:
            used, kl = usage(model)
            line = dict(step=step, tokens=step * tokens_per_step, seconds=round(seconds, 3), loss=loss.item(), norm=norm.item(),
                        lr=s.learning_rate * schedule(step - 1, s), memory_usage=used, memory_kl=kl)
            rate = tokens_per_step * steps / lap
            say(f"step {step:6d} {100 * step / s.max_steps:3.0f}% · loss {line['loss']:.4f} · lr {line['lr']:.1e} · norm {line['norm']:.2f} · "
                f"{1e3 * lap / steps:.0f} ms · {rate:,.0f} tok/s" + (f" · MFU {100 * rate * flops / peak:.0f}%" if peak else "")
                + (f" · slots used {100 * used:.0f}% KL {kl:.2f}" if model.tables else "")
                + f" · {lap / steps * (s.max_steps - step) / 60:.1f} min left", flush=True)
        if eval_now:
            line["val_loss"] = evaluate(model, val, s.eval_windows, ctx, rank, world)
            known = ask_facts(model, facts, meta, step * read, rank, world, None if last else 2000) if facts else {}
            line |= {k: v for k, v in known.items() if k == "recall"}
            say(f"            evaluation · val loss {line['val_loss']:.4f}" + (f" · recall {line['recall']:.3f}" if facts else ""), flush=True)
        if rank == 0 and log_now:
            with open(out / "log.jsonl", "a", encoding="utf-8") as f:
                f.write(json.dumps(line) + "\n")
        if (eval_now or halt) and not last:
            model.save(out, optimizers, write_whole, step, seconds, dataclasses.asdict(s))
        if halt:
            say(f"stopped at step {step} and saved: go on with --resume --out-dir {out}")
            return 130
        since, mark = step, time.perf_counter()

    result = dict(seed=s.seed, ffn=s.ffn, tokens=step * tokens_per_step, seconds=seconds, tokens_per_s=tokens_per_step * timed_steps / timed_seconds,
                  flops_per_token=flops, params=counts, peak_memory_bytes=peak_memory(device), val_loss=line["val_loss"], memory_usage=used,
                  memory_kl=kl) | known
    if rank == 0:
        write_json(out / "result.json", result)
        draw([out], out / "curves.png")
    model.save(out, optimizers, write_whole, step, seconds, dataclasses.asdict(s))  # the last thing: a run that died before it finishes again on --resume
    say(report(result) + f"\nsaved in {out}: ckpt.pt, result.json, curves.png")
    return 0


def main(argv=None):
    try:
        s, preset, resume, runs = read_settings(argv)
        return compare(runs) if runs else train(s, preset, resume)
    except torch.OutOfMemoryError as e:
        message = f"out of memory ({str(e).splitlines()[0]}): lower --micro-batch-size, --block-size or --mem-n-keys"
    except (Trouble, OSError) as e:
        message = str(e)
    except RuntimeError as e:
        if not (isinstance(e, dist.DistError) or "gloo" in str(e)):
            raise
        message = (f"rank {os.environ['RANK']} lost the others: one has stopped, and may say why ({str(e).splitlines()[0][:200]}); start all again with "
                   f"--resume and the same --out-dir to go on from the last checkpoint")
    print("train.py: " + " ".join(message.split()), file=sys.stderr)
    return 1


if __name__ == "__main__":
    code = main()
    if "RANK" in os.environ:  # under torchrun: gloo's threads now and then abort a finished process while it is taken down; all is written
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
