"""
Turn a corpus into files of tokens for train.py and sample.py.

    python prepare_data.py                  # facts about invented people; offline, takes a second
    python prepare_data.py tinystories      # 2.2 GB of simple stories (--small: 22 MB)
    python prepare_data.py openwebtext      # 4.6 GB of packed web text, 2.7 B tokens
                                            # (--small: 112 MB; --full: 13 GB, 9 B tokens)
    python prepare_data.py my.txt           # any UTF-8 text, or a folder of .txt files: documents
                                            # end at <|endoftext|>, or at what --separator says
    python prepare_data.py tinystories --from-file train.txt valid.txt      # copies you have
    python prepare_data.py facts --from-file FACTS.tsv PATTERNS.tsv         # facts of your own

You see how much disk is needed, a line of progress, and what was made. The folder data/<name> then
holds

    train.bin, val.bin      raw little-endian uint16 as in nanoGPT; after each document comes the
                            end-of-text token (eot)
    tokenizer.tiktoken      the tokens, one a line: base64 of the bytes, then the number
    recall.npz              facts only: what each fact is, and how often it is in train.bin
    meta.json               sizes, settings and checksums

meta.json is written last, and a folder without it does not count as finished. So you may stop at
any time and run the same command again. A download goes on where it broke off. HF_ENDPOINT (a
mirror), HF_TOKEN, the proxy variables and TIKTOKEN_CACHE_DIR are honoured.

This file, from top to bottom: constants, what all scripts share with the world outside, tokenizers,
the output folder, the facts corpus, facts of your own, reading text, tokenising, downloads, the
text corpora, the command line.
"""
import argparse
import base64
import codecs
import collections
import contextlib
import csv
import errno
import functools
import gzip
import hashlib
import inspect
import io
import itertools
import json
import lzma
import math
import os
import pickle
import re
import shutil
import signal
import statistics
import sys
import tarfile
import time
import tokenize
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C during the imports, which take seconds, ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import requests
import tiktoken
import tiktoken_ext.openai_public
import urllib3

# ---- constants

EOT = "<|endoftext|>"
# The pattern that cuts text for the `words` and `bytes` tokenizers: a word with the space before
# it, a run of punctuation with the space before it, or one white-space character. No character is
# lost, and Python's re and tiktoken's regex engine read the pattern alike.
PUNCTUATION = r"!-/:-@\[-`{-~¡-¿‐-⁞、-〿！-／：-＠"
WORDS = rf" ?[^\s{PUNCTUATION}]+| ?[{PUNCTUATION}]+|\s"
TOKENIZERS = ["gpt2", "bytes", "words"]
# Characters (or bytes, when a file is read) that are handled at a time.
BATCH = 1 << 20
# Characters: a longer document is encoded in pieces, since tiktoken fails on a million spaces
# in a row.
PIECE = 1 << 18
# Downloads: attempts in a row without progress before we give up.
TRIES = 6
# Downloads: the longest wait in seconds that a server may ask for.
LONGEST_WAIT = 300
# HTTP statuses that may be gone at the next try: timeout, too many requests, and every error of
# the server. (Mirrors behind a content delivery network have 5xx numbers of their own.)
RETRY_STATUSES = [408, 429, *range(500, 600)]

TINY = "datasets/roneneldan/TinyStories/resolve/main/"
OWT = "datasets/stanford-cs336/owt-sample/resolve/main/"
FULL = ("datasets/Skylion007/openwebtext/resolve/"
        "f3808c30e817981b845ec549c43e82bb467d8144/subsets/")
# File name: (folder on the hub, bytes, sha256). Several public repositories list these numbers.
HUB = {
    "TinyStoriesV2-GPT4-train.txt": (
        TINY, 2227753162, "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443"),
    "TinyStoriesV2-GPT4-valid.txt": (
        TINY, 22502601, "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d"),
    "owt_train.txt.gz": (
        OWT, 4591240837, "b19ae88cfbc4016b304c348522455fe38ebac48fffed955adcc7191a89e38ccf"),
    "owt_valid.txt.gz": (
        OWT, 111785382, "bc73db5da2f19c360836b9c8a88094e13346ec83798c2f40060be39135768c80"),
}
# The full OpenWebText. Nobody published checksums, and the sizes are approximate.
FULL_FILES = [f"urlsf_subset{i:02}.tar" for i in range(21)]
HUB |= {name: (FULL, 630_000_000, None) for name in FULL_FILES}
# What each source is made of: the training file, then the validation file.
SOURCES = {
    "tinystories": ["TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt"],
    "openwebtext": ["owt_train.txt.gz", "owt_valid.txt.gz"],
}
# Estimates for the check of disk space: bytes of text per byte of a packed file, and bytes of .bin
# per byte of text.
UNPACKED = {".gz": 2.7, ".tar": 3.3}
BIN_PER_TEXT = {"gpt2": 0.6, "words": 1, "bytes": 2}


# .bin files are uint16.
MOST_TOKENS = 1 << 16
# The rest of the facts corpus has at most a few thousand words.
MOST_SINGLE_NAMES = 60_000
# Tokens in the windows that train.py takes from a text, unless --block-size says otherwise.
WINDOW = 256


# ---- the world outside

class Steady:
    """A text stream that goes on without its reader.

    Writing to a terminal that was closed, to a full disk, or to `| head` after it has left, raises
    an OSError. A long run should not die of it. From then on, what is written is lost.
    """

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        try:
            return self.stream.write(text)
        except BlockingIOError:  # the reader is slow: this text is lost, not the next one
            return len(text)
        except OSError:
            self.give_up()
            return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except OSError:
            self.give_up()

    def give_up(self):
        """Send to nowhere what comes, and what the stream has not yet been able to write."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name):  # encoding, isatty, ...
        return getattr(self.stream, name)


def any_characters():
    """Let print() write a ? for a character that the terminal or a file lacks."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed before we began
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        if hasattr(getattr(sys, name), "reconfigure"):  # a notebook's stream has it not
            getattr(sys, name).reconfigure(errors="replace")


def steady_output():
    """Make print() safe, whatever becomes of stdout and stderr: see Steady and any_characters."""
    any_characters()
    for name in ("stdout", "stderr"):
        setattr(sys, name, Steady(getattr(sys, name)))


# What a broken file, or one of another program, can raise when it is read as JSON, as a vocabulary,
# as arrays of numpy or as a checkpoint of torch.
BROKEN = (EOFError, RuntimeError, ValueError, TypeError, LookupError, AttributeError,
          ArithmeticError, AssertionError, SyntaxError, tokenize.TokenError,
          pickle.UnpicklingError, zipfile.BadZipFile, zlib.error)


@contextlib.contextmanager
def reading(path, way_out):
    """Whatever goes wrong in the block, which reads `path`, becomes a ValueError with its cause.

    way_out: what to do if the file is missing, or is not what it should be.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"{error.filename or path} does not exist: {way_out}") from None
    except (OSError, *BROKEN, MemoryError) as error:
        why = first_line(error)
        if is_out_of_memory(error):
            problem = (f"{path}: too little memory to read it ({why}): close other programs, or "
                       f"use a machine with more")
        elif isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            problem = f"{path} cannot be read ({why}): check its permissions and its disk"
        else:
            problem = f"{path} is broken, or another program's ({why}): {way_out}"
        raise ValueError(problem) from None


def is_out_of_memory(error):
    """Whether an exception says that memory has run out. torch says it in many ways."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    words = str(error).lower()
    signs = ("allocate memory", "out of memory", "alloc_failed")
    return isinstance(error, MemoryError) or any(sign in words for sign in signs)


def first_line(error):
    """What an exception says, on one line of at most 200 characters."""
    said = str(getattr(error, "strerror", None) or error).strip()
    lines = said.splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


@contextlib.contextmanager
def locked(path, wait=math.inf, message="another process has it"):
    """Hold the lock file `path` in this block, so that no other process can.

    wait: seconds to wait for it; then ValueError(message). A lock ends with its process, however
    that ends. Where the file system knows no locks, nothing is locked.
    """
    end = time.monotonic() + wait
    has_waited = False
    while (file := try_to_lock(path)) is None:
        if time.monotonic() >= end:
            raise ValueError(message)
        if not has_waited:
            print(f"waiting: {message}", flush=True)
            has_waited = True
        time.sleep(0.2)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows deletes no open file
            os.unlink(path)
        file.close()


def try_to_lock(path):
    """The open file of a lock that is ours until the file is closed, or None if another has it."""
    file = open(path, "a", encoding="utf-8")
    try:
        if sys.platform == "win32":
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Who had the lock before us has deleted its file. If that happened after we opened it, then
        # we hold the lock of a file that nobody else will find.
        is_ours = os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except OSError as error:
        # These mean that somebody else holds it. Anything else means that there are no locks.
        is_ours = error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK, errno.ENOENT)
    if is_ours:
        return file
    file.close()
    return None


def cpus():
    """CPU cores that this process may use: those it may run on, and no more than its container has.

    A container's limit is a file: quota and period of its CPU time, in microseconds.
    """
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # there is no such limit
        quota, period = CPU_LIMIT.read_text("utf-8").split()
        count = min(count, max(math.ceil(int(quota) / int(period)), 1))
    return count


CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")


# ---- tokenizers

class Tokenizer:
    """A tiktoken encoding that can be saved, plus one special token: end of text.

    name: "gpt2", "bytes" or "words". pattern: the regular expression that cuts text before
    tokens are merged. tokens: list of bytes; a token's place is its number. eot gets the number
    after the last, so vocab_size = len(tokens) + 1.

    A token of `words` is a word with the space before it. So that the first word of a text is one
    too, encode puts a space before it, and decode takes that space away.
    """

    def __init__(self, name, pattern, tokens):
        self.name = name
        self.pattern = pattern
        self.tokens = tokens
        self.eot = len(tokens)
        self.vocab_size = len(tokens) + 1
        ranks = {token: rank for rank, token in enumerate(tokens)}
        self.tiktoken = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={EOT: self.eot})

    def with_first_space(self, text):
        """The text as it is encoded: for `words`, with a space before a first word."""
        needs_space = self.name == "words" and text and not text[0].isspace()
        return " " + text if needs_space else text

    def encode(self, text):
        """str -> list of int. The characters <|endoftext|> are ordinary text, never eot."""
        return self.tiktoken.encode_ordinary(self.with_first_space(text))

    def encode_to_numpy(self, text):
        """The same tokens as a (tokens,) array of little-endian uint16.

        tiktoken releases Python's lock while it encodes, so other threads can run.
        """
        ids = self.tiktoken.encode_to_numpy(self.with_first_space(text), disallowed_special=())
        return ids.astype("<u2")

    def decode(self, ids):
        """Iterable of int -> str."""
        text = self.tiktoken.decode(list(ids))
        if self.name == "words":
            text = text.removeprefix(" ")
        return text


def make_tokenizer(name, words=()):
    """A new tokenizer. words: the strings that get a token of their own, if name is "words".

    The tokens of `bytes` are the 256 bytes. `words` has these bytes, too, so it can spell a word
    that it does not have. Raises ValueError if tiktoken cannot download the vocabulary of `gpt2`.
    """
    if name != "gpt2":
        single_bytes = [bytes([value]) for value in range(256)]
        return Tokenizer(name, WORDS, single_bytes + [word.encode() for word in words])
    try:
        gpt2 = tiktoken_ext.openai_public.gpt2()
    except (OSError, ValueError) as error:
        # All errors of the network are OSErrors. It is a ValueError if tiktoken got something
        # else, for example the login page of a wireless network.
        raise ValueError(
            f"tiktoken cannot download its gpt2 vocabulary ({type(error).__name__}): set "
            f"TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer bytes"
            f"{certificate_hint(error)}") from None
    ranks = gpt2["mergeable_ranks"]  # {token: number}
    return Tokenizer(name, gpt2["pat_str"], sorted(ranks, key=ranks.get))


def load_tokenizer(folder):
    """The tokenizer of a data folder or a run folder. Needs no network.

    Raises ValueError if its meta.json or tokenizer.tiktoken is missing or broken.
    """
    meta = read_meta(folder)
    path = Path(folder) / "tokenizer.tiktoken"
    with reading(path, how_to_make(folder)):
        tokens = [base64.b64decode(line.split()[0], validate=True)
                  for line in path.read_bytes().splitlines()]
        if len(tokens) + 1 != meta["vocab_size"]:  # eot is the last
            raise ValueError(f"it has {len(tokens)} tokens, meta.json says {meta['vocab_size']} "
                             f"with eot")
        return Tokenizer(meta["tokenizer"], meta["pattern"], tokens)


# ---- the output folder

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
    for key, value in settings.items():
        if made.get(key) != value:
            differences.append(f"{key} {made.get(key)}, not {value}")
    if differences:
        raise ValueError(f"{out} was made with {'; '.join(differences)}: choose another "
                         f"--out, or replace it with --force")
    print(f"{out} is finished, with these settings (--force makes it again)")
    return True


TEMPORARY = ".unfinished"


@contextlib.contextmanager
def making(out, settings, force):
    """A temporary folder inside `out`. If the block succeeds, its files move to `out`.

    The old meta.json is deleted first and the new one is moved last, so there is never a meta.json
    beside files that it does not describe. When two processes make the same folder, one waits for
    the other, finds `out` finished with its settings, and gets None.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / ".lock", message=f"another process is making {out}"):
        if is_finished(out, settings, force):
            yield None
            return
        with unfinished(out) as folder:
            yield folder


@contextlib.contextmanager
def unfinished(out):
    """The temporary folder of making()."""
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


def sha256(path):
    """The checksum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(BATCH):
            digest.update(chunk)
    return digest.hexdigest()


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
        said += f", {split} {tokens[split]:,} tokens in {documents[split]:,} documents"
    print(said)


def check_space(needs):
    """Print how much disk space is needed. Raises ValueError if a disk has too little.

    needs: list of (purpose, folder, bytes). Folders can be on the same disk, so the needs are added
    up for each disk.
    """
    wanted = collections.Counter()  # {disk: GB}
    for purpose, folder, size in needs:
        path = Path(folder).absolute()
        while not path.exists():  # the folder may not have been made yet
            path = path.parent
        disk = path.stat().st_dev
        free = shutil.disk_usage(path).free / 1e9
        wanted[disk] += size / 1e9
        print(f"{purpose}: about {size / 1e9:.2f} GB in {folder} ({free:.2f} GB free)")
        if wanted[disk] > free:
            raise ValueError(f"{folder}: {wanted[disk]:.2f} GB needed on that disk, {free:.2f} "
                             f"free: make room, or move --out or --downloads")


class Progress:
    """Says how far a long task has come, every 15 seconds (on a terminal twice a second).

    what: the name of the task. total: the bytes to process, math.inf if unknown. first: bytes that
    were done before this run; they do not count towards the rate.
    """

    def __init__(self, what, total, first=0):
        self.what = what
        self.total = total
        self.first = first
        self.on_terminal = sys.stdout.isatty()
        self.pause = 0.5 if self.on_terminal else 15  # seconds between lines
        self.start = time.time()
        self.last_shown = self.start
        self.has_shown = False
        self.ended = False

    def show(self, done):
        """Print the line if it is time for it. done: bytes so far."""
        now = time.time()
        is_complete = done >= self.total
        is_due = now - self.last_shown > self.pause
        # A task that was too quick for any line gets no last line either.
        is_last_line = is_complete and self.has_shown
        if self.ended or not (is_due or is_last_line):
            return
        rate = max(done - self.first, 1) / max(now - self.start, 1e-3)  # bytes per second
        minutes_left = max(self.total - done, 0) / rate / 60
        share = done / max(self.total, 1)
        # On a terminal each line overwrites the one before; the last one stays.
        end = "\r" if self.on_terminal and not is_complete else "\n"
        print(f"{self.what}: {share:4.0%}, {rate / 1e6:.1f} MB/s, "
              f"{minutes_left:.1f} minutes left  ", end=end, flush=True)
        self.last_shown = now
        self.has_shown = True
        self.ended = is_complete


# ---- the facts corpus

def compounds(heads, tails):
    """"a b", "x y" -> ["ax", "ay", "bx", "by"], without repetition."""
    words = [head + tail for head in heads.split() for tail in tails.split()]
    return list(dict.fromkeys(words))


FIRST_NAMES = compounds(
    "Al An Be Bra Ca Co Da De El Em Fa Fe Ga Gi Ha Ja Jo Ka Ki La Lo Ma Mi Na Ne Or Pe Ra Ro Sa "
    "Si Ta Te Va Zo",
    "bel bin dan den dia dor gan gora kel kin lan lena lia lin lora mar mira nan nia rek ria rin "
    "sel sia tan thea")
LAST_NAMES = compounds(
    "Alder Arrow Bram Brook Cald Carl Dray Elder Fair Fen Glen Gray Hart Haw Hazel Holl Iron King "
    "Lang North Oak Rook Thorn Up West",
    "beck by cliffe cott croft dale field gate grave hurst land ley lock man more ridge row shaw "
    "side smith son stead stone thwaite tree vale wald ward well win wood worth")
# Each relation: the words that can answer, then five phrasings. The fifth phrasing is not in the
# training text, but all of its words are.
RELATIONS = [
    (compounds("Amber Black Cran Dun Eve Frost Grim Kes Lin Mor Nor Pem Rush Stam Whit",
               "bury chester ford ham mouth ness port ton"),
     "{} was born in {}.",
     "The birthplace of {} is {}.",
     "{} comes from {}.",
     "The hometown of {} is {}.",
     "{} is from {}."),
    (compounds("bell book clock cloth glass hat kite lamp pan rope",
               "buyer cutter dealer finder fixer keeper maker mender painter seller"),
     "{} works as a {}.",
     "By trade {} is a {}.",
     "{} became a {}.",
     "{} earns money as a {}.",
     "{} is a {}."),
    (compounds("Bor Cal Dov Fel Gor Kor Lem Mav Nol Pav Rus Sel Tam Vel Zan",
               "ani ari ese ic ish ori une yan"),
     "{} speaks {}.",
     "The language of {} is {}.",
     "{} talks in {}.",
     "{} thinks in {}.",
     "The language {} speaks is {}."),
    (compounds("apple bean carrot cheese corn fish honey leek lemon nut onion pea plum",
               "bread cake noodles pie pudding salad soup stew"),
     "{} likes {}.",
     "For dinner {} wants {}.",
     "{} loves to eat {}.",
     "{} always orders {}.",
     "{} likes to eat {}."),
    (compounds("Acu Bio Cosmo Dyna Equi Geo Helio Infra Luxa Meta Novo Omni Proto",
               "air bank corp labs mart net soft tech"),
     "{} works for {}.",
     "The employer of {} is {}.",
     "{} is employed by {}.",
     "{} has a job at {}.",
     "{} works at {}."),
    (compounds("Cloud Dusty Fern Ginger Jolly Misty Moon Night Snow Sooty Star Sun Velvet",
               "beam ear foot fur nose paw tail whisker"),
     "{} has a cat called {}.",
     "The cat of {} is {}.",
     "{} owns the cat {}.",
     "At home {} strokes {}.",
     "{} owns a cat called {}."),
    (compounds("blue candy crown dew fire gold lark moss rain sky snow sun tin",
               "bells cups daisies lilies poppies roses stars tulips"),
     "{} grows {}.",
     "The garden of {} has {}.",
     "In spring {} plants {}.",
     "The flowers of {} are {}.",
     "In spring {} grows {}."),
    (compounds("Wave Wind Storm Tide Salt Coral Pearl Reef Ocean Gale Foam Sea Shore",
               "chaser dancer queen rider runner star walker wing"),
     "{} sails the {}.",
     "The ship of {} is {}.",
     "{} steers the ship {}.",
     "{} travels on the {}.",
     "{} sails on the ship {}."),
]
TRAINED_PHRASINGS = 4
# How people are named. shared: by two words, which others have, too. apart: the same, but no three
# words in a row show both. single: by a word that nobody else has.
NAMES = {"shared": "{} {}", "apart": "{} of house {}", "single": "{}{}"}


def make_facts(out="data/facts", people=8000, relations=5, answers=64, documents=640_000,
               val_documents=4096, zipf_shift=20.0, zipf_power=1.0, control=200, seed=1337,
               tokenizer="words", names="shared", force=False):
    """Make the folder `out` with facts about invented people: `people` x `relations` of them.

    One document is one fact in one window: eot, the sentence, then eot up to the window's end. The
    person of rank r is named with probability ~ 1 / (r + zipf_shift)^zipf_power: a few often, most
    seldom, and the `control` group never. names: one of NAMES. Raises ValueError for settings that
    cannot work.
    """
    settings = dict(
        source="facts", people=people, relations=relations, answers=answers, documents=documents,
        val_documents=val_documents, zipf_shift=zipf_shift, zipf_power=zipf_power,
        control=control, seed=seed, tokenizer=tokenizer)
    if names != "shared":  # older folders do not have this setting
        settings["names"] = names
    check_facts(settings)
    if is_finished(out, settings, force):
        return
    # There are F facts. The number of a fact is person * relations + relation, and the people of
    # the control group have the highest numbers.
    F = (people + control) * relations
    rng = np.random.default_rng(seed)
    tok, subjects, windows, spans = fact_windows(
        rng, people + control, relations, answers, tokenizer, names)
    window = windows.shape[-1]
    check_space([("tokens", out, 2 * window * (documents + val_documents + 2 * F))])
    # Sums of the probabilities: person r is drawn by a number between chance[r-1] and chance[r].
    chance = ((np.arange(people) + zipf_shift) ** -float(zipf_power)).cumsum()  # (people,)

    def draw(n):
        """n facts at random, and a phrasing for each: numbers of facts, of rows of `windows`."""
        person = chance.searchsorted(rng.random(n) * chance[-1], side="right")  # (n,)
        person = np.minimum(person, people - 1)  # rounding can lead past the last one
        fact = person * relations + rng.integers(relations, size=n)  # (n,)
        return fact, fact * phrasings + rng.integers(TRAINED_PHRASINGS, size=n)

    phrasings = windows.shape[1]
    rows = windows.reshape(F * phrasings, window)
    with making(out, settings, force) as folder:
        if folder is None:  # another process has made it meanwhile
            return
        # exposures (F,): how often each fact is in train.bin
        exposures = write_facts(folder / "train.bin", documents, draw, rows, F, tok)
        write_facts(folder / "val.bin", val_documents, draw, rows, F, tok, examples=6)
        np.savez_compressed(
            folder / "recall.npz",
            seen=windows[:, 0], seen_span=spans[:, 0],
            unseen=windows[:, -1], unseen_span=spans[:, -1],
            exposures=exposures, control=np.arange(F) >= people * relations,
            subject=np.repeat(subjects, relations))
        print(f"{people:,} people ({control:,} more are never named), {F:,} facts, windows of "
              f"{window} tokens, exposures {quartiles(exposures[:people * relations])}")
        write_meta(folder, tok, {"train": documents, "val": val_documents}, source="invented",
                   settings=settings, window=window, people=people, relations=relations,
                   answers=answers, control_people=control)


def check_facts(settings):
    """Raise ValueError for settings of make_facts that cannot work."""
    # fact_windows draws its names from 1.2 * sqrt(people) first names and as many last names.
    most_names = min(len(FIRST_NAMES), len(LAST_NAMES))
    most_people = int((most_names / 1.2) ** 2)
    limits = {
        "people": (1, most_people), "control": (0, most_people - settings["people"]),
        "relations": (1, len(RELATIONS)), "answers": (2, 100),
        "documents": (1, 10 ** 12), "val_documents": (1, 10 ** 12), "seed": (0, 2 ** 63),
        "zipf_shift": (0.001, 10 ** 9), "zipf_power": (0, 100),
    }
    check_limits(settings, limits)
    everybody = settings["people"] + settings["control"]
    if settings.get("names") == "single" and everybody > MOST_SINGLE_NAMES:
        raise ValueError(f"--names single: {everybody} people need as many tokens, and there is "
                         f"room for {MOST_SINGLE_NAMES}: lower --people")
    if settings.get("names", "shared") not in NAMES:
        raise ValueError(f"--names {settings['names']}: choose {' or '.join(NAMES)}")
    if not isinstance(settings["control"], int):
        raise ValueError(f"--control {settings['control']}: give a whole number of people (a share "
                         f"is for --from-file)")


def check_limits(settings, limits):
    """Raise ValueError for a setting that is not within its limits: {name: (low, high)}."""
    for name, (low, high) in limits.items():
        if not low <= settings[name] <= high:  # nan fails, too
            raise ValueError(f"{flag(name)} {settings[name]}: must be from {low} to {high}")


def fact_windows(rng, people, relations, answers, tokenizer, names):
    """Invent the people, and put every fact into words.

    Returns the tokenizer; the people's names; windows (F, 5, window) uint16, each fact in all five
    phrasings; and spans (F, 5, 2) int, where in the window the answer begins and ends.
    F = people * relations.
    """
    # A name is a number: which of the first names times `pool`, plus which of the last names. All
    # pairs are possible, and no two people have the same one.
    pool = max(8, math.ceil(1.2 * math.sqrt(people)))
    first = rng.choice(FIRST_NAMES, pool, replace=False)
    last = rng.choice(LAST_NAMES, pool, replace=False)
    pairs = rng.choice(pool * pool, people, replace=False)
    subjects = [NAMES[names].format(first[i // pool], last[i % pool]) for i in pairs]
    # For each relation: how to say it, and a choice of the words that can answer.
    said = [phrasings for _, *phrasings in RELATIONS[:relations]]
    words = [rng.permutation(known)[:answers].tolist() for known, *_ in RELATIONS[:relations]]
    truth = rng.integers(answers, size=(people, relations))  # (people, relations): which word

    # The texts: each fact in all its phrasings.
    vocabulary = ()
    if tokenizer == "words":
        everything = " ".join(itertools.chain(first, last, subjects, *said, *words))
        vocabulary = sorted(" " + word for word in set(re.findall("[a-zA-Z]+", everything)))
    tok = make_tokenizer(tokenizer, vocabulary)
    texts = []  # F * 5 lists of tokens
    for subject, row in zip(subjects, truth.tolist()):
        for phrasings, known, answer in zip(said, words, row):
            for phrasing in phrasings:
                texts.append(tok.encode(phrasing.format(subject, known[answer])))

    windows, lengths = fill_windows(texts, tok.eot)  # (F * 5, window), (F * 5,)

    # The spans: an answer ends where the full stop begins. That is the last token of the text, and
    # the text begins at place 1 of the window, so the full stop is at place `length`.
    ends = lengths.reshape(-1, 5)  # (F, 5)
    widths = [[len(tok.encode(" " + word)) for word in known] for known in words]
    widths = np.array(widths)[np.arange(relations), truth]  # (people, relations)
    spans = np.stack([ends - widths.reshape(-1, 1), ends], -1)  # (F, 5, 2)
    return tok, subjects, windows.reshape(len(ends), 5, -1), spans


def fill_windows(texts, eot):
    """Lists of tokens -> rows full of eot, each with its text after the first eot.

    Returns windows (texts, window) uint16, as long as the longest text needs, and lengths (texts,).
    """
    lengths = np.array([len(text) for text in texts])  # (texts,)
    longest = lengths.max()
    windows = np.full((len(texts), longest + 1), eot, "<u2")  # (texts, window)
    has_text = np.arange(longest) < lengths[:, None]  # (texts, window - 1) bool
    windows[:, 1:][has_text] = np.fromiter(itertools.chain.from_iterable(texts), "<u2")
    return windows, lengths


def write_facts(path, count, draw, windows, F, tok, examples=0):
    """Draw `count` facts and write their windows to a .bin file.

    draw(n): gives n numbers of facts, and the row of `windows` (rows, window) uint16 for each. F:
    how many facts there are. Prints the first few of them. Returns exposures (F,) int64, how often
    each fact was written.
    """
    exposures = np.zeros(F, np.int64)  # (F,)
    with open(path, "wb") as file:
        for begin in range(0, count, BATCH):
            facts, rows = draw(min(BATCH, count - begin))  # (n,) both
            file.write(windows[rows])
            exposures += np.bincount(facts, minlength=F)
            for row in windows[rows[:examples]]:
                print("    " + tok.decode(row[row != tok.eot]))
            examples = 0
        # The last window's last token needs a target.
        file.write(np.array([tok.eot], "<u2"))
    return exposures


def quartiles(exposures):
    percents = [0, 25, 50, 75, 100]
    percentiles = np.percentile(exposures, percents)
    return ", ".join(f"{q}%: {value:.0f}" for q, value in zip(percents, percentiles))


# ---- facts of your own

MOST_SENTENCES = 10 ** 8


class OwnFact(NamedTuple):
    """A row of FACTS.tsv. count: how often it stands in the text, if the file says so."""
    relation: str
    subject: str
    answer: str
    count: int | None


class Sentences(NamedTuple):
    """Every fact in all its phrasings, which are next to each other.

    Those of fact f begin at texts[first[f]]. trained[f] of them stand in the text. unseen[f] is the
    number of the sentence that is kept out, or -1 if there is none. spans: where in its window the
    answer of a sentence begins and ends.
    """
    texts: list  # of lists of tokens
    spans: np.ndarray  # (sentences, 2)
    first: np.ndarray  # (F,)
    trained: np.ndarray  # (F,)
    unseen: np.ndarray  # (F,)


def make_own_facts(from_file, out="data/own", control=0.025, documents=0, val_documents=4096,
                   zipf_shift=20.0, zipf_power=1.0, longest=128, seed=1337, tokenizer="words",
                   force=False):
    """Make the folder `out` with your own facts. from_file: paths of FACTS.tsv and PATTERNS.tsv.

    FACTS has the columns relation, subject, answer, and optionally count: how often the fact
    stands in the text. PATTERNS has relation and pattern: a sentence with {subject} in it and
    {answer} at its end. A relation's last pattern is kept out of the text if there is another.

    Without counts, `documents` sentences are drawn (0: 16 a fact). The fact of rank r in a random
    order has the probability ~ 1 / (r + zipf_shift)^zipf_power. control: share of the facts that
    are never in the text and have no rank. longest: a sentence of more tokens is left out. Raises
    ValueError for files and settings that cannot work.
    """
    facts_path, patterns_path = two_tables(from_file)
    settings = dict(
        source="own facts", facts_sha256=sha256(facts_path), patterns_sha256=sha256(patterns_path),
        control=control, documents=documents, val_documents=val_documents, zipf_shift=zipf_shift,
        zipf_power=zipf_power, longest=longest, seed=seed, tokenizer=tokenizer)
    check_own_facts(settings)
    if is_finished(out, settings, force):
        return
    facts, patterns = read_own_facts(facts_path, patterns_path)
    tok = own_tokenizer(tokenizer, facts, patterns)
    facts, sentences = put_into_words(facts, patterns, tok, longest)
    F = len(facts)
    if F < 2:
        raise ValueError(f"there is only one fact left: give at least two in {facts_path}")
    rng = np.random.default_rng(seed)
    text, other, is_control = draw_own_facts(facts, settings, rng)
    windows, _ = fill_windows(sentences.texts, tok.eot)  # (sentences, window)
    window = windows.shape[1]
    check_space([("tokens", out, 2 * window * (len(text) + val_documents + 2 * F))])
    with making(out, settings, force) as folder:
        if folder is None:  # another process has made it meanwhile
            return
        exposures = write_facts(folder / "train.bin", len(text), phrase(text, sentences, rng),
                                windows, F, tok)
        write_facts(folder / "val.bin", val_documents, phrase(other, sentences, rng),
                    windows, F, tok, examples=6)
        np.savez_compressed(folder / "recall.npz", **recall_arrays(
            facts, sentences, windows, exposures, is_control))
        print(f"{F:,} facts ({is_control.sum():,} of them are never in the text), "
              f"{len(patterns):,} relations, windows of {window} tokens, exposures "
              f"{quartiles(exposures[~is_control])}")
        own_tokens = share_with_own_token(facts, tok)
        print(f"{own_tokens:.0%} of the subjects have a token that no other subject has "
              f"(docs/results.md: what that means for a memory layer)")
        write_meta(folder, tok, {"train": len(text), "val": val_documents}, source="own facts",
                   settings=settings, window=window, answers=possible_answers(facts),
                   subjects_with_own_token=own_tokens,
                   files=[str(path) for path in (facts_path, patterns_path)])


def draw_own_facts(facts, settings, rng):
    """Which fact each sentence tells -> (training text, validation text, is_control (F,))."""
    F = len(facts)
    order = rng.permutation(F)  # (F,)
    is_control = np.zeros(F, bool)  # (F,)
    is_control[order[:share_of(settings["control"], F)]] = True
    counts = own_counts(facts, order, is_control, settings)  # (F,): exact, or how likely
    p = counts / counts.sum()  # (F,)
    if facts[0].count is None:
        text = rng.choice(F, settings["documents"] or 16 * F, p=p)  # (documents,)
    else:
        text = rng.permutation(np.repeat(np.arange(F), counts))  # (documents,)
    return text, rng.choice(F, settings["val_documents"], p=p), is_control


def share_with_own_token(facts, tok):
    """How many of the subjects have a token that no other subject has: a share in [0, 1].

    facts: a list of OwnFact. The embedding of such a token can hold what is known of its subject.
    """
    tokens = {fact.subject: set(tok.encode(" " + fact.subject)) for fact in facts}
    subjects_with = collections.Counter()  # {token: number of subjects}
    for of_subject in tokens.values():
        subjects_with.update(of_subject)
    own = [any(subjects_with[token] == 1 for token in of_subject) for of_subject in tokens.values()]
    return sum(own) / len(own)


def recall_arrays(facts, sentences, windows, exposures, control):
    """What recall.npz holds of F facts of one's own. exposures, control (F,)."""
    # A fact without an unseen phrasing has its first one there, and does not count.
    unseen = np.where(sentences.unseen < 0, sentences.first, sentences.unseen)  # (F,)
    return dict(seen=windows[sentences.first], seen_span=sentences.spans[sentences.first],
                unseen=windows[unseen], unseen_span=sentences.spans[unseen],
                has_unseen=sentences.unseen >= 0, exposures=exposures, control=control,
                subject=np.array([fact.subject for fact in facts]))


def two_tables(paths):
    """The paths of FACTS.tsv and PATTERNS.tsv. Raises ValueError if these are not two files."""
    if len(paths) != 2:
        raise ValueError(f"facts --from-file takes two files, not {len(paths)}: FACTS.tsv, then "
                         f"PATTERNS.tsv")
    for path in paths:
        if not Path(path).is_file():
            raise ValueError(f"--from-file {path} is no file: give FACTS.tsv, then PATTERNS.tsv")
    return Path(paths[0]), Path(paths[1])


def check_own_facts(settings):
    """Raise ValueError for settings of make_own_facts that cannot work."""
    limits = {
        "control": (0, 0.9), "documents": (0, MOST_SENTENCES),
        "val_documents": (1, MOST_SENTENCES),
        "longest": (2, 10 ** 6), "seed": (0, 2 ** 63), "zipf_shift": (0.001, 10 ** 9),
        "zipf_power": (0, 100),
    }
    check_limits(settings, limits)


def read_own_facts(facts_path, patterns_path):
    """Both tables -> list of OwnFact, {relation: list of its patterns}.

    Wrong rows are named on stderr, the first ten of them. Then it raises ValueError.
    """
    wrong = []
    patterns = read_patterns(patterns_path, wrong)
    facts = read_facts_table(facts_path, patterns, wrong)
    for line in wrong[:10]:
        print(line, file=sys.stderr)
    if wrong:
        raise ValueError(f"{len(wrong):,} wrong rows, of which the first ones stand above: mend "
                         f"them")
    for path, rows in ((patterns_path, patterns), (facts_path, facts)):
        if not rows:
            raise ValueError(f"{path} has no row below its header: add some")
    return facts, patterns


def read_patterns(path, wrong):
    """PATTERNS.tsv -> {relation: list of its patterns}. Adds wrong rows to `wrong`."""
    patterns = {}
    for place, row in table_rows(path, ["relation", "pattern"], wrong):
        pattern = row["pattern"]
        known = patterns.setdefault(row["relation"], [])
        ending = pattern.removesuffix(".")
        if pattern.count("{subject}") != 1:
            wrong.append(f"{place}: {pattern!r} must have {{subject}} once")
        elif pattern.count("{answer}") != 1 or not ending.endswith(" {answer}"):
            wrong.append(f"{place}: {pattern!r} must end with a space and {{answer}}; a full stop "
                         f"may follow")
        else:
            known.append(pattern)
    return patterns


def read_facts_table(path, patterns, wrong):
    """FACTS.tsv -> list of OwnFact, without repetitions. Adds wrong rows to `wrong`."""
    facts = {}  # (relation, subject): its OwnFact, and where it stands
    for place, row in table_rows(path, ["relation", "subject", "answer"], wrong, ["count"]):
        count = row.get("count")
        if row["relation"] not in patterns:
            wrong.append(f"{place}: there is no pattern for the relation {row['relation']!r}")
            continue
        if count is not None and not re.fullmatch("[0-9]{1,9}", count):
            wrong.append(f"{place}: the count {count!r} is not a number from 0 to 999999999")
            continue
        fact = OwnFact(row["relation"], row["subject"], row["answer"],
                       None if count is None else int(count))
        before, where = facts.setdefault((fact.relation, fact.subject), (fact, place))
        if before.answer != fact.answer:
            wrong.append(f"{place}: {fact.relation} of {fact.subject!r} is {fact.answer!r}, and "
                         f"in {where} it is {before.answer!r}")
        elif before.count != fact.count:
            wrong.append(f"{place}: this fact stands in {where} already, with another count")
    return [fact for fact, _ in facts.values()]


def table_rows(path, needed, wrong, optional=()):
    """The rows of a tab-separated file with a header: yields ("path:line", {column: text}).

    As spreadsheets write it: UTF-8 with or without a byte order mark, any line ends, fields perhaps
    in quotes, and empty rows, which are left out. Rows that cannot be used are added to `wrong`.
    """
    with reading(path, "give a tab-separated text file with a header"):
        raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8: save it as UTF-8 text, "
                         f"tab-separated") from None
    rows = csv.reader(io.StringIO(text, newline=""), delimiter="\t")
    names = [name.strip().lower() for name in next(rows, [])]
    missing = [name for name in needed if name not in names]
    if missing:
        raise ValueError(f"{path}:1 has no column {' and no column '.join(missing)}: the first "
                         f"line must name the columns, with a tab between: {', '.join(needed)}")
    line = rows.line_num + 1  # where the next row begins
    while True:
        place = f"{path}:{line}"
        try:
            fields = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{place}: {error}: a quote that is opened here may have no end") \
                from None
        line = rows.line_num + 1
        if not any(field.strip() for field in fields):
            continue
        if any("\n" in field for field in fields):
            wrong.append(f"{place}: a quote that is opened here does not end in this line")
            continue
        row = {name: " ".join(field.split()) for name, field in zip(names, fields)}
        empty = [name for name in (*needed, *optional) if name in names and not row.get(name)]
        if empty:
            wrong.append(f"{place}: it has no {' and no '.join(empty)}")
            continue
        yield place, row


def say(pattern, fact):
    """A sentence, and the place of its character where the answer begins."""
    before = pattern.split("{answer}")[0].replace("{subject}", fact.subject)
    stop = ""
    if pattern.endswith(".") and not fact.answer.endswith("."):  # "... of Apple Inc."
        stop = "."
    return before + fact.answer + stop, len(before)


def own_tokenizer(name, facts, patterns):
    """The tokenizer. `words` gets every word of the sentences, the most frequent if they are many.
    """
    if name != "words":
        return make_tokenizer(name)
    found = []
    for fact in facts:
        for pattern in patterns[fact.relation]:
            text, _ = say(pattern, fact)
            found.append(("train", text, True))
    return make_tokenizer(name, sorted(frequent_words([found], MOST_TOKENS)))


def put_into_words(facts, patterns, tok, longest):
    """Tokens of all sentences -> the facts that have any, and Sentences.

    A sentence of more than `longest` tokens is left out, and a fact of which nothing is left for
    the text. Both numbers are printed. Raises ValueError if no fact is left.
    """
    texts = []
    spans = []
    kept = []
    first = []
    trained = []
    unseen = []
    too_long = 0
    for fact in facts:
        *in_text, last = patterns[fact.relation]
        begin = len(texts)
        said = [own_sentence(pattern, fact, tok) for pattern in in_text or [last]]
        fitting = [sentence for sentence in said if len(sentence[0]) <= longest]
        too_long += len(said) - len(fitting)
        if not fitting:
            continue
        kept.append(fact)
        first.append(begin)
        trained.append(len(fitting))
        unseen.append(-1)
        if in_text:
            sentence = own_sentence(last, fact, tok)
            if len(sentence[0]) <= longest:
                unseen[-1] = begin + len(fitting)
                fitting.append(sentence)
            else:
                too_long += 1
        for text, span in fitting:
            texts.append(text)
            spans.append(span)
    if too_long:
        print(f"{too_long:,} sentences of more than {longest} tokens are left out (--longest), and "
              f"{len(facts) - len(kept):,} facts that had no others")
    if not kept:
        raise ValueError(f"--longest {longest} leaves no facts: raise it")
    return kept, Sentences(texts, np.array(spans), np.array(first), np.array(trained),
                           np.array(unseen))


def own_sentence(pattern, fact, tok):
    """A fact in words -> its tokens, and the span of the answer in its window."""
    text, at = say(pattern, fact)
    tokens = tok.encode(text)
    # In its window the sentence stands after one eot. The answer is what follows the tokens of the
    # text before it. (A space before a word belongs to the word's token.)
    start = len(tok.encode(text[:at].rstrip())) + 1
    end = len(tokens) + 1
    if tok.tokens[tokens[-1]] == b"." and not fact.answer.endswith("."):
        end -= 1  # the full stop is not asked
    return tokens, (start, end)


def share_of(control, F):
    """How many of F facts are the control: at least one, unless the share is 0."""
    if control == 0:
        return 0
    return max(round(control * F), 1)


def own_counts(facts, order, is_control, settings):
    """How often each fact stands in the text, (F,) int, or in proportion to what, (F,) float.

    Raises ValueError if there would be no text, and if both --documents and counts are given.
    """
    if facts[0].count is None:
        in_text = order[~is_control[order]]  # from the most frequent one to the rarest
        counts = np.zeros(len(facts))  # (F,)
        ranks = np.arange(len(in_text)) + settings["zipf_shift"]
        counts[in_text] = ranks ** -float(settings["zipf_power"])
    else:
        if settings["documents"]:
            raise ValueError(f"--documents {settings['documents']}: the column count says how "
                             f"long the text is: leave --documents or that column out")
        counts = np.array([fact.count for fact in facts])  # (F,)
        counts = np.where(is_control, 0, counts)
    if counts.sum() > MOST_SENTENCES:
        raise ValueError(f"the counts make {counts.sum():,} sentences, the limit is "
                         f"{MOST_SENTENCES:,}: lower them")
    if not counts.any():
        raise ValueError("no fact is in the text: lower --control, or raise the counts")
    return counts


def phrase(facts, sentences, rng):
    """Numbers of facts -> draw(n) of write_facts: the next n, and a sentence of the text for each.
    """
    ahead = iter(facts.tolist())

    def draw(n):
        fact = np.fromiter(itertools.islice(ahead, n), np.int64)  # (n,)
        return fact, sentences.first[fact] + rng.integers(sentences.trained[fact])  # (n,) both
    return draw


def possible_answers(facts):
    """How many answers a relation has, the geometric mean over the facts: 2 to so many bits."""
    answers = {}
    for fact in facts:
        answers.setdefault(fact.relation, set()).add(fact.answer)
    bits = [math.log2(len(answers[fact.relation])) for fact in facts]
    return 2 ** statistics.mean(bits)


# ---- reading text

def chunks(raw, suffix):
    """The bytes of an open file, about a million at a time.

    A .gz is unpacked as it is read, never on disk. A .tar is one of the full OpenWebText: it holds
    files *.xz, each a tar.xz of .txt files. Each .txt file is a document, and \\0 follows it.
    """
    if suffix != ".tar":
        file = gzip.GzipFile(fileobj=raw) if suffix == ".gz" else raw
        while chunk := file.read(BATCH):
            yield chunk
        return
    with tarfile.open(fileobj=raw, mode="r|") as outer:
        for pack in outer:
            if not pack.name.endswith(".xz"):
                continue
            with tarfile.open(fileobj=outer.extractfile(pack), mode="r|xz") as inner:
                for member in inner:
                    if not member.name.endswith(".txt"):
                        continue
                    text = inner.extractfile(member).read().replace(b"\0", b" ")
                    # At most one empty line in a row, as in nanoGPT's copy.
                    yield re.sub(rb"\n{3,}", b"\n\n", text) + b"\0"


def characters(path):
    """The text of a file, in strings of about a million characters, its line ends made \\n.

    Raises ValueError if the file is not UTF-8, or if a packed file is damaged.
    """
    # A chunk may end inside a character, or between \r and \n. The decoders keep such bytes and
    # characters for the next chunk. The second one turns every line end into \n.
    decoder = codecs.getincrementaldecoder("utf-8")()
    line_ends = io.IncrementalNewlineDecoder(None, translate=True)
    at = 0  # bytes of text that came before this chunk
    progress = Progress(f"reading {path.name}", path.stat().st_size)
    with open(path, "rb") as raw:
        try:
            # With the empty chunk at the end, half a character there is an error, too.
            for chunk in itertools.chain(chunks(raw, path.suffix), [b""]):
                text = decoder.decode(chunk, final=not chunk)
                if at == 0:
                    text = text.removeprefix("\ufeff")  # the byte order mark that Windows writes
                    if path.suffix != ".tar" and text.count("\0") > len(text) / 10:
                        raise ValueError(f"{path} is full of NUL bytes, so it is not UTF-8: "
                                         f"convert it, for example with iconv -f UTF-16LE -t UTF-8")
                yield line_ends.decode(text, final=not chunk)
                at += len(chunk)
                progress.show(raw.tell())
        except UnicodeDecodeError as error:
            # error.start counts from the first byte that the decoder had kept.
            at += error.start - len(decoder.getstate()[0])
            raise ValueError(f"{path}: byte {at} is not UTF-8: convert the file, for example "
                             f"with iconv -t UTF-8") from None
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile,
                tarfile.TarError) as error:
            raise ValueError(f"{path} is damaged or cut short ({error}): delete it and get it "
                             f"again") from None


def documents(texts, separator):
    """Cut a stream of strings into documents: yields (text, whether its document ends here).

    Documents are stripped, and blank ones are left out. A document longer than PIECE comes in
    several pieces. They are cut before a space or a line's end, where every tokenizer cuts, too: so
    the tokens are those of the whole. The result does not depend on how the stream was cut.
    """
    buffer = ""  # the part of the current document that was not yielded yet
    begun = False  # whether some of the current document was yielded
    for text in itertools.chain(texts, [None]):
        is_last = text is None
        *whole, rest = (buffer + (text or "")).split(separator)
        # What stands before a separator has an end. The rest ends only where the stream does.
        for body, ends in [*((body, True) for body in whole), (rest, is_last)]:
            if not begun:
                body = body.lstrip()
            if ends:
                body = body.rstrip()
            # A body that goes on may end in half a separator, which must not be cut.
            limit = PIECE if ends else PIECE + len(separator)
            while len(body) > limit:
                cut = place_to_cut(body)
                yield body[:cut], False
                body = body[cut:]
                begun = True
            if ends and (body or begun):
                yield body, True
            buffer = body
            if ends:
                buffer = ""
                begun = False


def place_to_cut(text):
    """The last place up to PIECE where a word ends and a space or a line's end follows."""
    # The greedy .* finds the last such place. With (?s) the dot matches line ends, too.
    found = re.compile(r"(?s).*\S(?=[ \n])").match(text, 0, PIECE + 1)
    if found is None:
        return PIECE  # no such place, as in a text without spaces
    return found.end()


class Reading(NamedTuple):
    """A file to read, and what its documents are for."""
    path: Path
    split: str = ""  # "train", "val", or "": every so many documents, one is for validation
    cut: int = -1  # "val" begins at the first line after so many characters; -1: nowhere


def plan_text(path, separator, val_fraction):
    """How to split a text file: by document, or within the document if there is only one.

    Reads the file up to the end of the second document. Returns a list of one Reading.
    """
    size = 0  # characters
    ended = 0  # documents
    for text, ends in documents(characters(path), separator):
        size += len(text)
        ended += ends
        if ended == 2:
            return [Reading(path)]
    print(f"{path}: one document, as {separator!r} does not stand between any two (--separator): "
          f"its end is for validation")
    cut = min(round(size * (1 - val_fraction)), size - 1)
    return [Reading(path, "train", max(1, cut))]


def batches(plan, separator, every):
    """Read all files of a plan: yields lists of (split, text, whether its document ends here).

    A list has about BATCH characters. every: where the plan leaves the split open, document 0 and
    then one in `every` documents is for validation.
    """
    number = 0  # of the document, over all files
    batch = []
    size = 0  # characters in the batch
    for path, split, cut in plan:
        at = 0  # characters of this file so far
        ends_at = "\0" if path.suffix == ".tar" else separator
        for text, ends in documents(characters(path), ends_at):
            if at <= cut < at + len(text):
                # The one document is cut after the line that holds character `cut`, or right there
                # if that line is the last.
                line_end = text.find("\n", cut - at)
                place = cut - at if line_end < 0 else line_end + 1
                batch.append(("train", text[:place].rstrip(), True))
                text = text[place:].lstrip()
                split = "val"
                cut = -1
            by_number = "train" if number % every else "val"
            batch.append((split or by_number, text, ends))
            number += ends
            at += len(text)
            size += len(text)
            if size >= BATCH:
                yield batch
                batch = []
                size = 0
    yield batch


def frequent_words(found, vocab_size):
    """The words of a `words` vocabulary, most frequent first.

    found: what batches() yields; only the training text counts. vocab_size includes the 256 bytes
    and eot, so there are at most vocab_size - 257 words. Each has 2 to 64 bytes.
    """
    counts = collections.Counter()
    for batch in found:
        for split, text, _ in batch:
            if split != "train":
                continue
            if not text[:1].isspace():
                text = " " + text  # as Tokenizer does
            counts.update(re.findall(WORDS, text))
            # Forget what was rare so far, so that memory stays bounded.
            if len(counts) > 2_000_000:
                counts = collections.Counter(dict(counts.most_common(1_000_000)))
    words = [word for word in counts if 1 < len(word.encode()) <= 64]
    words.sort(key=lambda word: (-counts[word], word))
    return words[:vocab_size - 257]


# ---- tokenising

def encode_batch(tok, batch):
    """A batch of batches() -> {split: (tokens,) uint16}, with eot where a document ends."""
    eot = np.array([tok.eot], "<u2")
    parts = {"train": [], "val": []}
    for split, text, ends in batch:
        if text:
            parts[split].append(tok.encode_to_numpy(text))
        if ends:
            parts[split].append(eot)
    empty = np.empty(0, "<u2")
    return {split: np.concatenate([empty, *arrays]) for split, arrays in parts.items()}


def tokenized(found, tok, workers):
    """Encode batches in order: yields what encode_batch returns. workers: threads, 0 or 1: none.

    Threads are enough, because tiktoken releases Python's lock while it encodes. At most
    2 * workers batches are under way, so memory stays bounded.
    """
    if workers < 2:
        for batch in found:
            yield encode_batch(tok, batch)
        return
    under_way = collections.deque()
    with ThreadPoolExecutor(workers) as pool:
        for batch in found:
            if len(under_way) == 2 * workers:
                yield under_way.popleft().result()
            under_way.append(pool.submit(encode_batch, tok, batch))
        while under_way:
            yield under_way.popleft().result()


# ---- downloads

class PoliteRetry(urllib3.util.Retry):
    """urllib3's Retry: asks again after an error, and waits longer each time (0, 2, 4, 8, ... s).

    If the server names the wait in a Retry-After header, that counts. We change four things: the
    wait is printed, it is at most LONGEST_WAIT, a Retry-After that makes no sense is ignored, and a
    certificate that is not trusted is not tried again.
    """

    def increment(self, method=None, url=None, response=None, error=None, **more):
        """urllib3 calls this after each failure. A certificate is not better at the next try."""
        if error is not None and certificate_hint(error):
            raise urllib3.exceptions.MaxRetryError(more.get("_pool"), url, error)
        return super().increment(method, url, response, error, **more)

    def get_retry_after(self, response):
        """The seconds that the server asks us to wait, or None."""
        try:
            seconds = super().get_retry_after(response)
        except (urllib3.exceptions.InvalidHeader, ValueError, OverflowError):
            return None
        if seconds is None:
            return None
        return min(seconds, LONGEST_WAIT)

    def sleep(self, response=None):
        """Wait before the next try. response: what the server answered, None if it did not."""
        seconds = None
        if response is not None:
            seconds = self.get_retry_after(response)
        if not seconds:
            seconds = self.get_backoff_time()
        last = self.history[-1]
        problem = last.error or f"HTTP status {last.status}"
        address = last.url.partition("?")[0]  # what comes after the ? can be a secret signature
        print(f"{address}: {problem}; again in {seconds:.0f} s", flush=True)
        time.sleep(seconds)


def certificate_hint(error):
    """What to do if an exception says that a server's certificate is not trusted, else ""."""
    if "CERTIFICATE_VERIFY_FAILED" not in str(error):
        return ""
    return ("; the certificate is not trusted: behind a proxy that has its own, set "
            "REQUESTS_CA_BUNDLE to the file of its certificate; else set this machine's clock")


class HubSession(requests.Session):
    """A requests.Session for the hub: retries, and HF_TOKEN for the hub alone."""

    def __init__(self):
        super().__init__()
        retry = PoliteRetry(
            total=TRIES - 1, status_forcelist=RETRY_STATUSES, allowed_methods=["GET"],
            backoff_factor=1, raise_on_status=False)
        for scheme in ("http://", "https://"):
            self.mount(scheme, requests.adapters.HTTPAdapter(max_retries=retry))
        # Sizes and ranges are those of the file itself, not of a compressed transfer.
        self.headers["Accept-Encoding"] = "identity"
        # requests calls this for each request of ours, but not for those that follow a redirect.
        # If there were no auth, it would look for passwords in ~/.netrc.
        self.auth = add_token

    def rebuild_auth(self, prepared_request, response):
        """requests calls this to follow a redirect: the token must not go to another host.

        The method of requests does the same, but then adds what ~/.netrc has for the new host.
        """
        if self.should_strip_auth(response.request.url, prepared_request.url):
            prepared_request.headers.pop("Authorization", None)


def add_token(request):
    """Put HF_TOKEN, if there is one, into a request to the hub."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if not (token.isascii() and token.isprintable()):
        raise ValueError("HF_TOKEN has characters that no token has: set it anew, or unset it")
    if token:
        request.headers["Authorization"] = f"Bearer {token}"
    return request


class BrokenOff(Exception):
    """A download stopped before its end, and it makes sense to go on with it."""


def fetch(url, target, size):
    """Download url to the file <target>.part, going on from what an earlier try left there.

    target: Path. size: bytes as published; None takes what comes. Returns the path of the .part
    file. Raises ValueError when the server refuses, or after TRIES tries without progress.

    Two things can go wrong. When no good answer comes, PoliteRetry asks again. When a good answer
    breaks off in the middle of the file, this loop asks for the rest.
    """
    part = Path(f"{target}.part")
    way_out = (f"run the same command again, or get it by other means and place it at {target} "
               f"(or give it with --from-file)")
    failures = 0  # tries in a row that got nothing
    with HubSession() as session:
        while True:
            before = size_of(part)
            try:
                fetch_rest(session, url, part, size, way_out)
                return part
            except BrokenOff as error:
                problem = str(error)
            got_further = size_of(part) > before
            failures = 1 if got_further else failures + 1
            if failures == TRIES:
                raise ValueError(f"{url}: {problem}, given up after {TRIES} tries: {way_out}")
            wait = 2 ** (failures - 1)
            print(f"{url}: {problem}; again in {wait} s", flush=True)
            time.sleep(wait)


def size_of(path):
    """Bytes of a file, 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


def fetch_rest(session, url, part, size, way_out):
    """Ask once for the bytes that are missing in `part`, and append them.

    Raises BrokenOff if the file is still incomplete, and ValueError if another try is no use.
    """
    have = size_of(part)
    with ask(session, url, have, way_out) as reply:
        content_range = reply.headers.get("Content-Range", "")
        if reply.status_code == 416:
            if content_range == f"bytes */{have}":
                return  # the file ends where ours does: we had all of it
            part.unlink(missing_ok=True)
            raise BrokenOff("what was there is part of another file; starting over")
        if reply.status_code == 206 and not content_range.startswith(f"bytes {have}-"):
            raise BrokenOff("the server sent other bytes than asked for")
        if reply.status_code == 200:
            have = 0  # a server that knows no Range sends the file from its start
        total = size
        length = reply.headers.get("Content-Length", "")
        if length.isdigit():
            total = have + int(length)
        if size and total != size:
            raise ValueError(f"{url} is {total} bytes long, {size} were expected: --no-verify "
                             f"takes it as it is, else {way_out}")
        try:
            save_body(reply, part, have, total)
        except BrokenOff:
            # What came without its length may be another page, such as a network's login.
            if not length.isdigit():
                part.unlink(missing_ok=True)
            raise


def ask(session, url, have, way_out):
    """GET url from byte `have` on. Returns the reply, whose status is 200, 206 or 416.

    200 means all of the file, 206 the part that we asked for, 416 that there is nothing from that
    byte on. Raises ValueError for any other answer, or if there is none.
    """
    headers = {"Range": f"bytes={have}-"} if have else {}
    try:
        reply = session.get(url, headers=headers, stream=True, timeout=60)
    except requests.RequestException as error:
        # After all retries, this holds urllib3's MaxRetryError, and its reason is what went wrong.
        cause = error.args[0] if error.args else error
        reason = getattr(cause, "reason", error)
        hint = certificate_hint(reason)
        raise ValueError(f"{url}: {reason}, given up{hint}: {way_out}") from None
    if reply.status_code in (200, 206, 416):
        return reply
    reply.close()
    problem = f"HTTP status {reply.status_code} {reply.reason}"
    if reply.status_code in RETRY_STATUSES:
        raise ValueError(f"{url}: {problem}, given up after {TRIES} tries: {way_out}")
    raise ValueError(f"{url}: {problem} (for what is not public set HF_TOKEN): {way_out}")


def save_body(reply, part, have, total):
    """Append the body of a reply to the first `have` bytes of `part`.

    total: bytes of the whole file, None if unknown. Raises BrokenOff if fewer arrive.
    """
    name = part.name.removesuffix(".part")
    progress = Progress(name, total or math.inf, have)
    with open(part, "ab" if have else "wb") as file:
        try:
            # The raw stream, because a .gz must be saved as it is, whatever the server calls it,
            # and because requests' iter_content loses the last bytes before a break.
            for chunk in reply.raw.stream(1 << 16, decode_content=False):
                have += file.write(chunk)
                progress.show(have)
        except urllib3.exceptions.HTTPError as error:
            raise BrokenOff(
                f"{type(error).__name__} after {have} of {total} bytes") from None
    # Not every broken connection is an error for urllib3, so we count the bytes as well.
    if total is not None and have < total:
        raise BrokenOff(f"the connection ended after {have} of {total} bytes")


def get(target, no_verify):
    """The file `target`, downloaded if it is not there. Returns its path.

    Raises ValueError if it is not what was published under its name, unless no_verify.
    """
    folder, size, wanted = HUB.get(target.name, ("", 0, None))
    verify = wanted is not None and not no_verify
    if target.exists():  # perhaps on a disk that can only be read
        if verify:
            check_sha256(target, size, wanted)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if "://" not in hub:
        hub = f"https://{hub}"
    url = f"{hub.rstrip('/')}/{folder}{target.name}"
    with locked(f"{target}.lock", message=f"another process is downloading {target}"):
        if not target.exists():
            part = fetch(url, target, size if verify else None)
            if verify:
                check_sha256(part, size, wanted)
            part.rename(target)
    return target


def check_sha256(path, size, wanted):
    """Raise ValueError if a file is not what was published."""
    found = sha256(path)
    if found != wanted:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) has sha256 {found}, {wanted} ({size} bytes) was "
            f"expected: --no-verify takes it as it is, else delete it and get it again")


# ---- the text corpora

def make_text(source, out="", tokenizer="gpt2", vocab_size=8192, separator=EOT, val_fraction=0.01,
              from_file=(), small=False, full=False, downloads="data/downloads", no_verify=False,
              workers=cpus(), force=False):
    """Make the folder `out` from tinystories, openwebtext or texts of your own, as nanoGPT does.

    The documents follow one another, with eot after each. source: "tinystories", "openwebtext" or
    the path of a text file, or of a folder with .txt files. Each other parameter is described at
    its flag, below. Raises ValueError for settings that cannot work, and if a file is damaged or
    too short or cannot be downloaded.
    """
    is_known = source in SOURCES
    # As in the text, every line end is one character.
    separator = separator.replace("\\r", "").replace("\\n", "\n").replace("\r\n", "\n")
    out = out or default_folder(source)
    local = from_file if is_known else own_texts(source)
    check_source(source, local, from_file, small, full)
    check_text_numbers(vocab_size, separator, val_fraction, workers)
    paths = input_paths(source, local, downloads, small, full)
    sizes = {path: path.stat().st_size if local else HUB[path.name][1] for path in paths}
    settings = dict(
        source=source if is_known else "text", files=name_files(source, paths, local),
        tokenizer=tokenizer, separator=separator, val_fraction=val_fraction,
        vocab_size=vocab_size if tokenizer == "words" else None)
    if is_finished(out, settings, force):
        return
    # If the gpt2 vocabulary is missing, say so now and not after hours of downloads. A vocabulary
    # of words can only be made from the text.
    tok = None
    if tokenizer != "words":
        tok = make_tokenizer(tokenizer)
    check_space(space_for_text(sizes, local, downloads, out, tokenizer))
    paths = [get(path, no_verify) for path in paths]
    if len(paths) == 1 and not is_known:
        plan = plan_text(paths[0], separator, val_fraction)
    elif len(paths) == 2 and is_known and not full:
        plan = [Reading(paths[0], "train"), Reading(paths[1], "val")]
    else:
        plan = [Reading(path) for path in paths]  # every so many documents, one is for validation
    every = 2000 if full else round(1 / val_fraction)  # nanoGPT keeps 0.0005 of OpenWebText
    if tok is None:
        words = frequent_words(batches(plan, separator, every), vocab_size)
        tok = make_tokenizer(tokenizer, words)
    with making(out, settings, force) as folder:
        if folder is None:  # another process has made it meanwhile
            return
        count = write_tokens(folder, tokenized(batches(plan, separator, every), tok, workers), tok)
        if not all(count.values()):
            raise ValueError(f"{source}: {count['train']} documents to train on, {count['val']} "
                             f"to validate on: more text is needed")
        origins = [origin(path) for path in paths]
        write_meta(folder, tok, count, source=origins, settings=settings)
    val_tokens = (Path(out) / "val.bin").stat().st_size // 2
    if val_tokens <= WINDOW:
        print(f"{out}: {val_tokens} tokens to validate on are less than a window of {WINDOW}, so "
              f"train.py will refuse them: use --force and more text or a larger --val-fraction "
              f"(now {val_fraction}), or train with a lower --block-size")


def name_files(source, paths, local):
    """What settings say about the files: {name: bytes}, or {name: checksum} for local ones.

    A text of your own may change and keep its size.
    """
    files = {}
    for number, path in enumerate(paths):
        if not local:
            files[path.name] = HUB[path.name][1]
        elif path.is_relative_to(source) and path != Path(source):  # in a folder of texts
            files[path.relative_to(source).as_posix()] = sha256(path)[:16]
        else:
            name = path.name
            if name in files:  # two files of one name, in two folders
                name += f" ({number})"
            files[name] = sha256(path)[:16]
    return files


def default_folder(source):
    """The folder of a source: data/tinystories, or data/my for .../my.txt.

    Raises ValueError if that is the folder of a corpus which train.py looks for by its name.
    """
    path = Path(source)
    name = path.resolve().name.strip(".").split(".")[0]
    is_taken = name in ("facts", "facts-gpu", *SOURCES) and source not in SOURCES
    if is_taken or not name:
        raise ValueError(f"{source}: its folder would be data/{name}, which is not for texts: give "
                         f"another one with --out data/NAME")
    return f"data/{name}"


def own_texts(source):
    """The files that `source` names: itself, or the .txt files in it and its folders."""
    path = Path(source)
    if not path.is_dir():
        return [path]
    files = sorted(path.rglob("*.txt"))
    if not files:
        raise ValueError(f"{source}: there is no .txt file in this folder")
    return files


def origin(path):
    """What meta.json says about where a file came from: its place on the hub, or its path."""
    if path.name in HUB:
        return HUB[path.name][0] + path.name
    return f"{path.parent}/{path.name}"


def check_source(source, local, from_file, small, full):
    """Raise ValueError if a file is missing or a flag does not fit the source."""
    known = list(SOURCES)
    if source not in SOURCES and (small or full or from_file):
        raise ValueError(f"--small, --full, --from-file are for {' and '.join(known)}, not for "
                         f"{source}")
    if full and (small or source != "openwebtext"):
        raise ValueError("--full is for openwebtext, and not together with --small")
    if len(from_file) > 2 and not full:
        raise ValueError(f"--from-file got {len(from_file)} files: at most two, train then valid")
    for path in local:
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file (facts, {', '.join(known)}, or the path of a "
                             f"text)")


def check_text_numbers(vocab_size, separator, val_fraction, workers):
    """Raise ValueError for numbers and separators that cannot work."""
    if not 1e-9 <= val_fraction <= 0.5:  # nan fails, too
        raise ValueError(f"--val-fraction {val_fraction}: must be from 1e-9 to 0.5")
    if not 258 <= vocab_size <= 65536:
        raise ValueError(f"--vocab-size {vocab_size}: must be from 258 (bytes, a word, eot) to "
                         f"65536 (uint16)")
    if not separator:
        raise ValueError("--separator must not be empty")
    if workers < 0:
        raise ValueError(f"--workers {workers}: must be at least 0")


def input_paths(source, local, downloads, small, full):
    """The files to read, in order. local: the user's own files; if empty, they are downloaded."""
    if local:
        return [Path(path) for path in local]
    if full:
        names = FULL_FILES
    elif small:
        names = SOURCES[source][1:]
    else:
        names = SOURCES[source]
    return [Path(downloads) / name for name in names]


def space_for_text(sizes, local, downloads, out, tokenizer):
    """The needs for check_space. sizes: {path of a file to read: bytes}."""
    needs = []
    if not local:
        # Files that are there, whole or in part (name.part), need not be downloaded again.
        there = 0
        for path in sizes:
            there += sum(found.stat().st_size for found in path.parent.glob(path.name + "*"))
        needs.append(("downloads", downloads, max(0, sum(sizes.values()) - there)))
    text = sum(size * UNPACKED.get(path.suffix, 1) for path, size in sizes.items())
    needs.append(("tokens", out, text * BIN_PER_TEXT[tokenizer]))
    return needs


def write_tokens(folder, stream, tok):
    """Write train.bin and val.bin. stream: what tokenized() yields.

    Returns a Counter {split: number of documents}.
    """
    count = collections.Counter(train=0, val=0)
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        files = {"train": train, "val": val}
        for ids in stream:
            for split, file in files.items():
                file.write(ids[split])
                count[split] += int((ids[split] == tok.eot).sum())
    return count


# ---- the command line

HELP_FACTS = {
    "people": "people who are named in the text",
    "relations": "things known of each person, up to 8",
    "answers": "possible answers per relation, up to 100",
    "documents": "sentences to train on",
    "val_documents": "sentences to validate on",
    "zipf_shift": "larger: people are named more evenly",
    "zipf_power": "0: all people are named equally often",
    "seed": "of the random numbers",
    "names": "shared: Rasia Westshaw, where others have these names, too; apart: Rasia of house "
             "Westshaw; single: one word for each person",
}
HELP_OWN_FACTS = {
    "longest": "most tokens of a sentence",
}
HELP_TEXT = {
    "vocab_size": "tokens of --tokenizer words",
    "separator": "what stands between documents; \\n is a line's end",
    "val_fraction": "part of the documents kept for validation",
    "from_file": "local copies instead of downloads: train, then valid. For facts of your own: "
                 "FACTS.tsv, then PATTERNS.tsv",
    "downloads": "where downloads are kept",
    "workers": "threads that tokenise",
    "small": "only the small file, split for validation",
    "full": "all of OpenWebText",
    "no_verify": "accept files of another size or sha256",
}


def flag(name):
    """val_documents -> --val-documents"""
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises ValueError, so that main() prints one line."""

    def error(self, message):
        raise ValueError(f"{message} (--help shows what there is)")


def make_parser():
    """The parser. Defaults are not repeated here: make_facts and make_text have them."""
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS)  # what was not given is not in the result
    parser.add_argument("source", nargs="?", default="facts",
                        help="facts, tinystories, openwebtext, or the path of a text file")
    parser.add_argument("--out", help="folder to make (data/<name>)")
    parser.add_argument("--tokenizer", choices=TOKENIZERS,
                        help="default for facts: words; for texts: gpt2")
    parser.add_argument("--force", action="store_true", help="replace a finished folder")
    facts = parser.add_argument_group("facts")
    add_flags(facts, make_facts, HELP_FACTS)
    facts.add_argument("--control", type=number, help="more people, who are never named (200). "
                       "With --from-file: the share of facts that are never in the text (0.025)")
    add_flags(facts, make_own_facts, HELP_OWN_FACTS)
    add_flags(parser.add_argument_group("texts"), make_text, HELP_TEXT)
    return parser


def number(text):
    """"200" -> 200, "0.025" -> 0.025"""
    try:
        return int(text)
    except ValueError:
        return float(text)


def add_flags(group, function, texts):
    """Add a flag for each parameter of `function` in texts: {name of the parameter: help}.

    The type of a flag is that of the parameter's default.
    """
    parameters = inspect.signature(function).parameters
    for name, text in texts.items():
        default = parameters[name].default
        if default:
            text += f" ({default})"
        if isinstance(default, bool):
            group.add_argument(flag(name), action="store_true", help=text)
        elif isinstance(default, tuple):
            group.add_argument(flag(name), nargs="+", metavar="PATH", help=text)
        else:
            group.add_argument(flag(name), type=type(default), help=text)


def prepare(argv):
    """Do what the command line asks for. Raises ValueError if it makes no sense."""
    given = vars(make_parser().parse_args(argv))
    source = given.pop("source")
    make = make_facts
    if source != "facts":
        make = functools.partial(make_text, source)
    elif "from_file" in given:
        make = make_own_facts
        source = "facts --from-file"
    unfit = given.keys() - inspect.signature(make).parameters.keys()
    if unfit:
        raise ValueError(f"{flag(min(unfit))} is not for {source} (--help shows what there is)")
    make(**given)


def main(argv=None):
    """Run the command line. Returns the exit status: 0, or 1 after one line on stderr."""
    try:
        prepare(argv)
        return 0
    except KeyboardInterrupt:
        message = "stopped; run the same command again (a download goes on where it was)"
    except OSError as error:
        message = (f"{error.filename or 'cannot go on'}: {error.strerror or error}: check its "
                   f"permissions, or give another --out or --downloads")
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            message = (f"{error.filename or 'cannot go on'}: {error.strerror}: make room, or give "
                       f"--out or --downloads on another disk")
    except MemoryError:
        message = "out of memory: lower --people or --workers, or use a machine with more"
    except ValueError as error:
        message = str(error)
    print("prepare_data.py: " + " ".join(message.split()), file=sys.stderr)
    return 1


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    steady_output()
    sys.exit(main())
