"""ckpt.pt: the weights and all that an exact resume needs."""
import contextlib
import sys
from dataclasses import fields
from pathlib import Path

import torch
import torch.distributed as dist

from model import GPT, GPTConfig
from support.data_folder import read_meta
from support.files import reading, write_whole
from support.ranks import any_rank_failed
from support.settings import MAY_CHANGE


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
    parts = model.table.parts if model.table else 1  # P
    # The first P ranks hold the table once, each a slice. Other ranks hold copies of these.
    names = [f"ckpt-{step}-{i}of{parts}.pt" for i in range(parts)] if parts > 1 else []
    values = dict(values=[model.table.values.detach()] if model.table else [])
    problem = None
    if rank < len(names):
        problem = try_to_save(values, folder / names[rank])
    if any_rank_failed(problem):
        remove_slices(folder, names, rank)
        return problem or OTHER_RANK
    if rank == 0:
        state = dict(version=CHECKPOINT_VERSION, model=own_weights(model), slices=names,
                     optimizers=[optimizer.state_dict() for optimizer in optimizers],
                     step=step, seconds=seconds, settings=settings, line=line)
        if not names:
            state.update(values)
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


def own_weights(model):
    """The weights of a model without the values of its table: {name: tensor}."""
    return {name: p for name, p in model.state_dict().items() if name != "table.values"}


def load_checkpoint(folder, device="cpu", mesh=None, **changes):
    """A run folder -> (GPT, checkpoint), for training and for sample.py.

    checkpoint: what save_checkpoint has written. With a mesh the GPT holds this rank's dims of the
    table, whatever the number of ranks that saved it. changes: settings of the GPT that replace
    the saved ones. Raises ValueError when there is no checkpoint, or one that cannot be read, and
    says why.
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
        names = {f.name for f in fields(GPTConfig)}
        config = {name: settings[name] for name in names & settings.keys()} | changes
        model = GPT(GPTConfig(**config), mesh)
        weights = dict(state["model"])
        if model.table:
            slices = [values_of(file) for file in saved]
            weights["table.values"] = columns(slices, model.table.dims)
        model.load_state_dict(weights)
        for name in ("step", "seconds"):
            state[name]  # KeyError if it is missing
    return model.to(device), state


def values_of(file):
    """The table's values in a file of a checkpoint. Before RowAdam, it kept moments, too."""
    values = file["values"] if "values" in file else [table["values"] for table in file["tables"]]
    if len(values) > 1:
        raise ValueError("it has a table for each layer, as older versions could make")
    return values[0]


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


def load_same_run(s, meta, device, mesh):
    """The checkpoint of a run that is to go on -> (GPT, checkpoint), see load_checkpoint.

    s: the run's settings. meta: meta.json of the data. Raises ValueError if either is another's.
    """
    out = Path(s.out_dir)
    model, state = load_checkpoint(out, device, mesh)
    if "optimizers" not in state:
        raise ValueError(f"{out}/ckpt.pt was saved before RowAdam trained the tables, and cannot "
                         f"be resumed: {out}/config.json names the commit that can; start from "
                         f"its weights with --init-from {out} --out-dir out/NAME")
    for name, value in state["settings"].items():
        if name not in MAY_CHANGE | {"out_dir"} and getattr(s, name, value) != value:
            raise ValueError(f"{out}/config.json says {name} {getattr(s, name)}, and ckpt.pt "
                             f"says {value}: one of them is another run's, put it back")
    if read_meta(out)["sha256"] != meta["sha256"]:
        raise ValueError(f"{s.data} is not the data that {out} was trained on: "
                         f"point --data at that")
    return model, state


def read_checkpoint(path):
    """What a file of torch.save holds."""
    # Mapped, so that what is not used of tables and optimizer is never read. Windows cannot replace
    # a file that is mapped.
    mmap = sys.platform != "win32"
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
