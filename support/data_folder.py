"""A folder data/<name>: its meta.json, and how it comes to be whole.

meta.json is written last, and a folder without it does not count as finished.
"""
import base64
import contextlib
import json
import os
import shutil
from pathlib import Path

import numpy as np

from support.download import SOURCES
from support.files import locked, reading, sha256
from support.terminal import counted


def read_meta(folder):
    """meta.json of a data folder as a dict. Raises ValueError if it is missing or broken."""
    path = Path(folder) / "meta.json"
    with reading(path, how_to_make(folder)):
        meta = json.loads(path.read_text("utf-8"))
        for name, kind in META.items():
            if name in meta.keys() | NEEDED and not isinstance(meta[name], kind):
                raise TypeError(f"its {name} is {meta[name]!r}")
        for split in ("train", "val"):
            meta["tokens"][split] + 0  # KeyError or TypeError if it is no number
            meta["sha256"][f"{split}.bin"]
        if "window" in meta:
            meta["answers"]
    return meta


def is_facts(folder):
    """Whether a data folder, or a run folder, is of facts: each window holds one."""
    return "window" in read_meta(folder)


def open_tokens(folder, split, meta):
    """<split>.bin of a data folder: (tokens,) uint16, mapped, not read.

    Raises ValueError if it is missing, or is not what meta.json describes.
    """
    path = Path(folder) / f"{split}.bin"
    way_out = how_to_make(folder)
    with reading(path, way_out):
        tokens = np.memmap(path, dtype="<u2", mode="r")
        if len(tokens) != meta["tokens"][split]:
            raise ValueError(f"it has {len(tokens)} tokens, meta.json says "
                             f"{meta['tokens'][split]}")
        largest = tokens[:TOKENS_CHECKED].max(initial=0)
        if largest >= meta["vocab_size"]:
            raise ValueError(f"it has the token {largest}, meta.json says that there are "
                             f"{meta['vocab_size']}")
    return tokens


# Of a .bin file so many tokens, the first ones, are checked to be in the vocabulary.
TOKENS_CHECKED = 2**24


def how_to_make(folder):
    """What to do about a file of a data folder, or of a run folder, that is missing or broken."""
    name = Path(folder).name
    if Path(folder).is_file():
        return f"{folder} is a file, give the folder that prepare_data.py makes of it"
    if (Path(folder) / "config.json").exists():
        return "copy it from the folder of the data that the run was trained on"
    source = name if name in ("facts", *SOURCES) else "SOURCE"
    return (f"make the data: python prepare_data.py {source} --out {folder} (--force replaces what "
            f"is there)")


# What a meta.json holds, of which type, and what of it every one holds.
META = {"vocab_size": int, "eot": int, "tokenizer": str, "pattern": str, "tokens": dict,
        "sha256": dict, "window": int, "answers": (int, float), "settings": dict}
NEEDED = {"vocab_size", "eot", "tokenizer", "pattern", "tokens", "sha256"}


def is_finished(out, settings, force):
    """Whether the folder `out` was already made with these settings.

    Raises ValueError if it was made with others: nobody's data is replaced without --force.
    """
    if force:
        return False
    if not (Path(out) / "meta.json").exists():
        # Those of a process that was killed are there beside its temporary folder.
        if (Path(out) / "train.bin").exists() and not (Path(out) / TEMPORARY).exists():
            raise ValueError(f"{out} has a train.bin without meta.json, perhaps another program's: "
                             f"choose another --out, or replace it with --force")
        return False
    made = read_meta(out).get("settings", {})
    differences = []
    for key in settings | made:
        if made.get(key) != settings.get(key):
            differences.append(f"{key} {made.get(key)}, not {settings.get(key)}")
    if differences:
        raise ValueError(f"{out} was made with {'; '.join(differences)}: choose another "
                         f"--out, or replace it with --force")
    print(f"{out} is finished, with these settings (--force makes it again)")
    return True


TEMPORARY = ".unfinished"


def make_folder(out, settings, force, write):
    """Fill the folder `out`: write(temporary folder), then its files move. Not if it is finished.

    The old meta.json is deleted first and the new one is moved last, so there is never a meta.json
    beside files that it does not describe. When two processes make the same folder, one waits for
    the other, and finds it finished.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / ".lock", message=f"another process is making {out}"):
        if not is_finished(out, settings, force):
            with unfinished(out) as folder:
                write(folder)


@contextlib.contextmanager
def unfinished(out):
    """A temporary folder inside `out`, a Path. If the block succeeds, its files move to `out`."""
    temporary = out / TEMPORARY
    shutil.rmtree(temporary, ignore_errors=True)  # that of a process that was killed
    temporary.mkdir()
    has_moved = False
    try:
        yield temporary
        (out / "meta.json").unlink(missing_ok=True)
        # False sorts before True, so meta.json is last.
        paths = sorted(temporary.iterdir(), key=lambda path: path.name == "meta.json")
        for path in paths:
            os.replace(path, out / path.name)
            has_moved = True
    finally:
        # If only some files could be moved, the folder stays: it says that these are ours.
        if not has_moved or (out / "meta.json").exists():
            shutil.rmtree(temporary, ignore_errors=True)


def write_meta(folder, tok, documents, **more):
    """Write tokenizer.tiktoken and meta.json beside finished .bin files, and say what was made.

    folder: Path of the unfinished folder. documents: {split: number of documents}. more: further
    entries of meta.json.
    """
    with open(folder / "tokenizer.tiktoken", "wb") as file:
        for number, token in enumerate(tok.tokens):
            file.write(b"%s %d\n" % (base64.b64encode(token), number))
    tokens = {}  # {split: number of tokens}
    checksums = {}
    for split in documents:
        path = folder / f"{split}.bin"
        tokens[split] = path.stat().st_size // 2
        checksums[path.name] = sha256(path)
    meta = dict(
        name=folder.resolve().parent.name, tokenizer=tok.name, pattern=tok.pattern,
        vocab_size=tok.vocab_size, eot=tok.eot, dtype="uint16", tokens=tokens,
        documents=documents, **more, sha256=checksums)
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), "utf-8")
    said = f"{folder.parent}: vocabulary {tok.vocab_size:,} ({tok.name})"
    for split in documents:
        said += f", {split} {tokens[split]:,} tokens in {counted(documents[split], 'document')}"
    print(said)
