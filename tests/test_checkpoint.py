"""Checkpoints: what load_checkpoint takes, what it refuses, and that it runs nobody's code."""
import dataclasses
import os

import pytest
import torch

import train
from model import GPT, GPTConfig
from support.checkpoint import load_checkpoint, load_same_run, save_checkpoint
from support.machine import pick_device

SMALL = dict(vocab_size=37, block_size=16, n_layer=3, n_head=2, n_embd=16)
MEMORY = dict(ffn="memory", mem_layers=(1,), mem_n_keys=6, mem_heads=2, mem_topk=3,
              mem_gate=False, qk_norm=False)
PLUS = MEMORY | dict(mem_layers=(0, 2), mem_gate=True, qk_norm=True)
KINDS = {"dense": {}, "Memory": MEMORY, "Memory+": PLUS}


def make_model(**settings):
    torch.manual_seed(0)
    return GPT(GPTConfig(**SMALL | settings))


def save(model, folder, /, **changes):
    """A checkpoint, written by hand, of one process."""
    settings = dataclasses.asdict(model.config) | dict(seed=7)  # of the training, too
    weights = model.state_dict().items()
    state = dict(
        version=2,
        model={name: p for name, p in weights if not name.endswith(".values")},
        values=[model.table.values.detach()] if model.table else [],
        slices=[], settings=settings, optimizers=[], step=3, seconds=1.0)
    torch.save(state | changes, folder / "ckpt.pt")


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_load(kind, tmp_path):
    model = make_model(**kind)
    idx = torch.randint(37, (2, 9))
    save(model, tmp_path)
    for folder in (tmp_path, str(tmp_path)):
        loaded, state = load_checkpoint(folder)
        assert loaded.config == model.config
        assert state["step"] == 3
        assert state["settings"]["seed"] == 7
        assert torch.equal(loaded(idx)[0], model(idx)[0])
        assert loaded.head.weight is loaded.wte.weight


# ---- what save_checkpoint writes, and older checkpoints

ALL_KINDS = KINDS | {"Memory+ in bfloat16": PLUS | dict(mem_dtype="bfloat16"),
                     "Memory with AdamW": MEMORY | dict(table_optimizer="adamw")}
TOKENS = torch.randint(37, (4, 17), generator=torch.Generator().manual_seed(0))


def make_run(**kind):
    """A model, its optimizers and its settings, after three steps."""
    torch.manual_seed(0)
    s = train.Settings(**SMALL | kind, seed=7, learning_rate=1e-2, value_lr=1e-2)
    model = GPT(s)
    optimizers, _ = train.make_optimizers(model, s)
    for _ in range(3):
        take_step(model, optimizers)
    return model, optimizers, s


def take_step(model, optimizers):
    _, loss = model(TOKENS[:, :-1], TOKENS[:, 1:])
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def check_same_weights(got, want):
    assert got.state_dict().keys() == want.state_dict().keys()
    for name, p in want.state_dict().items():
        assert torch.equal(got.state_dict()[name], p), name


@pytest.mark.parametrize("kind", ALL_KINDS.values(), ids=ALL_KINDS.keys())
def test_a_saved_run_goes_on(kind, tmp_path):
    """The optimizers' state is there too: the next steps have the same bits."""
    model, optimizers, s = make_run(**kind)
    settings = dataclasses.asdict(s)
    del settings["backend"]  # as if the run were older than this setting
    save_checkpoint(tmp_path, model, optimizers, 3, 1.5, settings)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]
    loaded, state = load_checkpoint(tmp_path)
    assert (state["step"], state["seconds"], state["line"]) == (3, 1.5, None)
    check_same_weights(loaded, model)
    loaded_optimizers, _ = train.make_optimizers(loaded, train.Settings(**state["settings"]))
    for optimizer, saved in zip(loaded_optimizers, state["optimizers"]):
        optimizer.load_state_dict(saved)
    for _ in range(2):
        take_step(model, optimizers)
        take_step(loaded, loaded_optimizers)
    check_same_weights(loaded, model)


def old_layout(model, s):
    """A checkpoint of a run whose table AdamW trained -> (all but the table, [the table])."""
    state = dict(
        version=2,
        model={name: p for name, p in model.state_dict().items() if not name.endswith(".values")},
        optimizer={}, slices=[], step=3, seconds=1.5, settings=dataclasses.asdict(s))
    values = model.table.values.detach()
    return state, [dict(values=values, exp_avg=0.1 * values, exp_avg_sq=values.square())]


def save_in_two_slices(state, tables, folder):
    """As two ranks that shared the tables wrote them."""
    names = ["ckpt-3-0of2.pt", "ckpt-3-1of2.pt"]
    for i, name in enumerate(names):
        mine = []
        for table in tables:
            mine.append({key: x.chunk(2, dim=1)[i].clone() for key, x in table.items()})
        torch.save(dict(tables=mine), folder / name)
    torch.save(state | dict(slices=names), folder / "ckpt.pt")


@pytest.mark.parametrize("in_slices", [False, True])
@pytest.mark.parametrize("kind", [MEMORY, PLUS | dict(mem_dtype="bfloat16")])
def test_an_old_checkpoint_is_read_but_not_resumed(kind, in_slices, tmp_path):
    model, _, s = make_run(**kind)
    state, tables = old_layout(model, s)
    if in_slices:
        save_in_two_slices(state, tables, tmp_path)
    else:
        torch.save(state | dict(tables=tables), tmp_path / "ckpt.pt")
    loaded, _ = load_checkpoint(tmp_path)
    check_same_weights(loaded, model)
    s.out_dir = str(tmp_path)
    with pytest.raises(ValueError, match="cannot be resumed: .*config.json names the commit that "
                                         "can; start from its weights with --init-from"):
        load_same_run(s, {}, "cpu", None)


def test_a_table_for_each_layer_is_refused(tmp_path):
    model, _, s = make_run(**PLUS)
    state, tables = old_layout(model, s)
    torch.save(state | dict(tables=2 * tables), tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="has a table for each layer, as older versions could"):
        load_checkpoint(tmp_path)


def test_a_missing_slice_is_named(tmp_path):
    model, _, s = make_run(**PLUS)
    save_in_two_slices(*old_layout(model, s), tmp_path)
    (tmp_path / "ckpt-3-1of2.pt").unlink()
    with pytest.raises(ValueError, match="ckpt-3-1of2.pt does not exist: bring ckpt.pt and"):
        load_checkpoint(tmp_path)


# ---- what is no checkpoint

def truncated(model, folder):
    save(model, folder)
    whole = (folder / "ckpt.pt").read_bytes()
    (folder / "ckpt.pt").write_bytes(whole[:len(whole) // 2])


def empty(model, folder):
    (folder / "ckpt.pt").write_bytes(b"")


def text(model, folder):
    (folder / "ckpt.pt").write_text("this is no checkpoint\n")


def a_folder(model, folder):
    (folder / "ckpt.pt").mkdir()


def a_list(model, folder):
    torch.save([1, 2, 3], folder / "ckpt.pt")


def a_pickled_module(model, folder):
    torch.save(model, folder / "ckpt.pt")


def weights_alone(model, folder):
    torch.save(dict(model=model.state_dict()), folder / "ckpt.pt")


def few_settings(model, folder):
    save(model, folder, settings={"n_layer": 3})


def other_settings(**changes):
    def spoil(model, folder):
        save(model, folder, settings=dataclasses.asdict(model.config) | changes)
    spoil.__name__ = f"settings {changes}"
    return spoil


def no_weights(model, folder):
    save(model, folder, model={})


def no_step(model, folder):
    save(model, folder)
    state = torch.load(folder / "ckpt.pt", weights_only=True)
    del state["step"]
    torch.save(state, folder / "ckpt.pt")


SPOILED = [truncated, empty, text, a_folder, a_list, a_pickled_module, weights_alone, few_settings,
           other_settings(n_embd=32), other_settings(n_embd="wide"), other_settings(mem_topk=9),
           no_weights, no_step]


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__)
def test_load_refuses_what_is_no_checkpoint(spoil, tmp_path):
    spoil(make_model(**PLUS), tmp_path)
    with pytest.raises(ValueError) as error:
        load_checkpoint(tmp_path)
    message = str(error.value)
    assert str(tmp_path / "ckpt.pt") in message
    assert "is broken" in message or "cannot be read" in message
    assert "\n" not in message


class Attack:
    """A pickle that runs code when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("version", [None, 1, 3])
def test_load_refuses_another_version(version, tmp_path):
    """Version 1 had RMS norms. Its weights would fit, and mean something else."""
    save(make_model(), tmp_path, version=version)
    with pytest.raises(ValueError, match="another version of this code.*config.json names the"):
        load_checkpoint(tmp_path)


def test_load_runs_no_code(tmp_path):
    save(make_model(), tmp_path, optimizers=Attack(tmp_path / "attacked"))
    with pytest.raises(ValueError, match="is broken"):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "attacked").exists()


def test_load_refuses_a_folder_without_checkpoint(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="ckpt.pt does not exist: give the folder of a run"):
            load_checkpoint(folder)


# ---- devices

def test_pick_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    wanted = ["auto", "cuda", "cuda:1", "cpu"]
    assert [pick_device(name) for name in wanted] == ["cuda", "cuda", "cuda:1", "cpu"]
    for name in ("cuda:2", "cuda:x", "tpu"):
        message = f"--device {name} is not available on this machine: use --device cuda$"
        with pytest.raises(ValueError, match=message):
            pick_device(name)
