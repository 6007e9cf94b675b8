"""Where a text comes from: the files of a source, and what is made of them."""
from pathlib import Path

from support.download import HUB, SOURCES
from support.files import sha256


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


# How they begin: ._1.txt and .ipynb_checkpoints are hidden, ~$1.txt is Office's, __MACOSX a Mac's.
LEFT_BY_TOOLS = (".", "~$", "__MACOSX")


def own_texts(source):
    """The files that `source` names: itself, or the .txt files in it and its folders.

    Tools leave files and folders behind that are no texts: see LEFT_BY_TOOLS.
    """
    path = Path(source)
    if not path.is_dir():
        return [path]
    files = [found for found in sorted(path.rglob("*.txt")) if not found.is_dir()
             and not any(part.startswith(LEFT_BY_TOOLS) for part in found.relative_to(path).parts)]
    if not files:
        raise ValueError(f"{source}: there is no .txt file in this folder (hidden ones do not "
                         f"count)")
    return files


def check_source(source, local, from_file, small, separator):
    """Raise ValueError if a file is missing or a flag does not fit the source."""
    if not separator:
        raise ValueError("--separator must not be empty")
    known = list(SOURCES)
    if source not in SOURCES and (small or from_file):
        raise ValueError(f"--small and --from-file are for {' and '.join(known)}, not for {source}")
    if len(from_file) > 2:
        raise ValueError(f"--from-file got {len(from_file)} files: at most two, train then valid")
    for path in local:
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file (facts, {', '.join(known)}, or the path of a "
                             f"text)")


def input_paths(source, local, downloads, small):
    """The files to read, in order. local: the user's own files; if empty, they are downloaded."""
    if local:
        return [Path(path) for path in local]
    names = SOURCES[source][1:] if small else SOURCES[source]
    return [Path(downloads) / name for name in names]


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


def origin(path):
    """What meta.json says about where a file came from: its place on the hub, or its path."""
    if path.name in HUB:
        return HUB[path.name][0] + path.name
    return f"{path.parent}/{path.name}"
