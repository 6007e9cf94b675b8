"""Files that are read with a way out, written as a whole, and locked.

Everything that goes wrong becomes a ValueError of one line, which says what to do.
"""
import contextlib
import errno
import hashlib
import json
import math
import os
import pickle
import tokenize
import zipfile
import zlib
from pathlib import Path

import filelock
import numpy as np

# Bytes that are read at a time.
CHUNK = 1 << 20


# ---- reading

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


def read_json(path, way_out):
    """What a JSON file holds, or a ValueError that says what to do."""
    with reading(path, way_out):
        return json.loads(Path(path).read_text("utf-8"))


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


def size_of(path):
    """Bytes of a file, 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


def sha256(path):
    """The checksum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


# ---- writing

def write_whole(path, write):
    """Write a file under another name and rename it when it is whole: write(path of that name).

    Whatever happens, the old file is not lost.
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
            raise  # not the disk's fault
        raise ValueError(f"cannot write {path} ({first_line(cause)}): free some space or check "
                         f"the permissions; what was saved before is still there") from None


def write_text(path, text):
    write_whole(path, lambda part: part.write_text(text, "utf-8"))


def write_json(path, content):
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_arrays(path, **arrays):
    """Write a .npz file of numpy arrays."""
    def write(part):
        with open(part, "wb") as file:  # given a name, numpy would add .npz to it
            np.savez_compressed(file, **arrays)
    write_whole(path, write)


# ---- locks

@contextlib.contextmanager
def locked(path, wait=math.inf, message="another process has it"):
    """Hold the lock file `path` in this block, so that no other process can.

    wait: seconds to wait for it; then ValueError(message). A lock ends with its process, however
    that ends. Where the file system has no locks, nothing is locked.
    """
    lock = filelock.FileLock(path)
    try:
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            if wait > 0:
                print(f"waiting: {message}", flush=True)
            lock.acquire(timeout=-1 if wait == math.inf else wait)
    except filelock.Timeout:
        raise ValueError(message) from None
    except (OSError, NotImplementedError):
        lock = None  # no locks here
    try:
        yield
    finally:
        if lock:
            lock.release()
