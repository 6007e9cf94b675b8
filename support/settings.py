"""A dataclass of settings becomes flags, and a run that goes on keeps its settings.

The dataclass and the presets are those of train.py, which passes them in.
"""
import json
from dataclasses import fields
from pathlib import Path

from model import GPTConfig, kind_of
from support.data_folder import read_meta
from support.fields import add_flags, check_limits, flag
from support.files import reading
from support.terminal import Parser

# Settings that --resume may change. They change what is learned by rounding only, with two
# exceptions: micro_batch_size and device also change the masks of dropout, and micro_batch_size the
# balance of --ffn moe.
MAY_CHANGE = {"device", "backend", "compile", "micro_batch_size", "log_every", "data",
              "mem_parallel"}
# Settings of older runs that changed nothing (mem_share was true, see checkpoint.values_of).
FORMER = ("profile", "mem_share")
# Settings of the model that may differ from those of --init-from.
MAY_DIFFER = {"block_size", "dropout"}


# ---- flags

def make_parser(Settings, presets, description):
    """A flag for each field of Settings, with its help and the default of `python train.py`."""
    parser = Parser("train.py", description)
    parser.add_argument("preset", nargs="?", default="facts",
                        help="which defaults to start from: " + ", ".join(presets))
    parser.add_argument("--resume", action="store_true",
                        help="go on with the run in --out-dir; start it if there is none")
    parser.add_argument("--compare", nargs="+", metavar="RUN",
                        help="print and draw these run folders side by side, train nothing")
    add_flags(parser, preset_settings(Settings, presets["facts"], {}))
    return parser


def preset_settings(Settings, preset, given):
    """The settings of a preset, a dict, changed by those that were given."""
    values = dict(ffn="memory")
    values.update(preset)
    values.update(given)
    return Settings(**values)


def read_settings(argv, Settings, presets, description):
    """argv (None: sys.argv) -> (Settings, preset, resume, runs to compare)."""
    parser = make_parser(Settings, presets, description)
    given = vars(parser.parse_args(argv))
    preset = given.pop("preset")
    resume = given.pop("resume")
    runs = given.pop("compare")
    if preset not in presets:
        parser.error(f"preset {preset!r} is unknown: choose one of {', '.join(presets)}")
    s = preset_settings(Settings, presets[preset], inherited(given, resume) | given)
    if not s.out_dir:
        s.out_dir = f"out/{preset}-{s.ffn}-{s.seed}"
    if runs:  # without --out-dir, compare() puts its picture beside the first run
        s.out_dir = given.get("out_dir", "")
    elif resume:
        s, saved_preset = resumed_settings(s, given)
        preset = saved_preset if saved_preset in presets else preset
    return s, preset, resume, runs


# ---- runs that go on

def read_config(folder):
    """config.json of a run folder. Raises ValueError if it is missing, or not one of ours."""
    path = Path(folder) / "config.json"
    with reading(path, "give the folder of a run that this version of train.py has made, or start "
                       "another run with --out-dir out/NAME"):
        config = json.loads(path.read_text("utf-8"))
        config["settings"]["mem_layers"] = tuple(config["settings"]["mem_layers"])
        for name in FORMER:
            config["settings"].pop(name, None)
    return config


def inherited(given, resume):
    """The settings of the model that --init-from brings along. `given` must agree with them."""
    source = given.get("init_from")
    if not source or (resume and not (Path(source) / "config.json").exists()):
        return {}  # a run that is resumed has its own settings
    saved = read_config(source)["settings"]
    # What is newer than that run has its default, as in load_checkpoint.
    inherits = {f.name: saved.get(f.name, f.default) for f in fields(GPTConfig)
                if f.name not in MAY_DIFFER}
    for name in inherits.keys() & given.keys():
        if given[name] != inherits[name]:
            raise ValueError(f"{flag(name)} {given[name]} is not the {inherits[name]} of "
                             f"--init-from {source}: leave it out")
    return inherits


def resumed_settings(s, given):
    """The settings and the preset of the run in s.out_dir; `given` may change some settings.

    If there is no run yet, they are those of a new one: s and None.
    """
    out = Path(s.out_dir)
    if not (out / "config.json").exists() and not (out / "ckpt.pt").exists():
        return s, None
    config = read_config(out)
    unknown = config["settings"].keys() - vars(s).keys()
    if unknown:
        raise ValueError(f"{out} has the setting {min(unknown)}, which this version lacks, and "
                         f"cannot be resumed: {out}/config.json names the commit that can; start "
                         f"from its weights with --init-from {out} --out-dir out/NAME")
    with reading(out / "config.json", "start another run with --out-dir out/NAME"):
        # What is newer than the run has its default.
        old = type(s)(**config["settings"] | dict(out_dir=s.out_dir))
    for name in given.keys() - {"out_dir"}:
        if name in MAY_CHANGE:
            setattr(old, name, given[name])
        elif given[name] != getattr(old, name):
            raise ValueError(f"{flag(name)} {given[name]} is not the run's {getattr(old, name)}: a "
                             f"resumed run keeps its settings, start another one, perhaps from its "
                             f"weights, with --init-from {out} --out-dir out/NAME")
    return old, config.get("preset")


# ---- what the data and the ranks decide

def fit_to_data(s, world):
    """Fill in what the data decides, and refuse what cannot work. Returns the data's meta.json."""
    meta = read_meta(s.data)
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
    if s.table_optimizer not in ("row", "adamw"):
        raise ValueError(f"--table-optimizer {s.table_optimizer} is unknown: choose row or adamw")
    if s.table_optimizer == "adamw" and s.mem_dtype != "float32":
        raise ValueError(f"--table-optimizer adamw trains no table in {s.mem_dtype}: choose row, "
                         f"or --mem-dtype float32")
    s.check()
    check_ranks(s, world)
    return meta


def check_ranks(s, world):
    """Refuse a batch or a table that cannot be shared out over the ranks."""
    micro = s.micro_batch_size or s.batch_size // world
    if micro < 1 or s.batch_size % (micro * world):
        raise ValueError(f"--batch-size {s.batch_size} does not divide into {world} rank(s) x "
                         f"--micro-batch-size {micro}: change one of them")
    if s.ffn != "dense" and not trains_slices(s) and s.mem_parallel > 1:
        raise ValueError(f"--mem-parallel {s.mem_parallel}: ranks cannot share what --ffn {s.ffn} "
                         f"holds, or --table-optimizer {s.table_optimizer} trains: leave it out")
    P = slices(s, world)
    D = s.value_dim()
    if world % P or (trains_slices(s) and D % P):
        raise ValueError(f"--mem-parallel {P}: a table of {D} dims cannot be shared so by {world} "
                         f"rank(s): choose a number that divides both, 1 always does")


def slices(s, world):
    """P: into how many slices the table is cut."""
    if not trains_slices(s):
        return 1
    return s.mem_parallel or world


def trains_slices(s):
    """Whether several ranks train slices, or replicas, of a table. If not, that is up to DDP."""
    return kind_of(s).can_be_sliced and s.table_optimizer == "row"
