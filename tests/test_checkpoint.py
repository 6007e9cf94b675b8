"""Checkpoints: what load_checkpoint takes, what it refuses, and that it runs nobody's code."""
import dataclasses
import os

import pytest
import torch

from model import GPT, GPTConfig
from train import load_checkpoint, pick_device

SMALL = dict(vocab_size=37, block_size=16, n_layer=3, n_head=2, n_embd=16)
MEMORY = dict(ffn="memory", mem_layers=(1,), mem_n_keys=6, mem_heads=2, mem_topk=3,
              mem_gate=False, qk_norm=False)
PLUS = MEMORY | dict(mem_layers=(0, 2), mem_gate=True, qk_norm=True)
KINDS = {"dense": {}, "Memory": MEMORY, "Memory+": PLUS}


def make_model(**settings):
    torch.manual_seed(0)
    return GPT(GPTConfig(**SMALL | settings))


def save(model, folder, /, **changes):
    """A checkpoint, written by hand, of one process: the layout has not changed since version 1."""
    settings = dataclasses.asdict(model.config) | dict(seed=7)  # of the training, too
    weights = model.state_dict().items()
    state = dict(
        model={name: p for name, p in weights if not name.endswith(".values")},
        tables=[dict(values=table.values.detach()) for table in model.tables],
        slices=[], settings=settings, optimizer={}, step=3, seconds=1.0)
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
    assert "not a whole checkpoint" in message
    assert "\n" not in message


class Attack:
    """A pickle that runs code when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_load_runs_no_code(tmp_path):
    save(make_model(), tmp_path, optimizer=Attack(tmp_path / "attacked"))
    with pytest.raises(ValueError, match="not a whole checkpoint"):
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
