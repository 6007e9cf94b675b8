"""Reading text: files to strings, strings to documents, documents to training and validation."""
import codecs
import gzip
import io
import itertools
import re
import zlib
from pathlib import Path
from typing import NamedTuple

from support.terminal import progress

# Characters (or bytes, when a file is read) that are handled at a time.
BATCH = 1 << 20
# Characters: a longer document is encoded in pieces, since tiktoken fails on a million spaces
# in a row.
PIECE = 1 << 18


def chunks(raw, suffix):
    """The bytes of an open file, about a million at a time. A .gz is unpacked as it is read."""
    file = gzip.GzipFile(fileobj=raw) if suffix == ".gz" else raw
    while chunk := file.read(BATCH):
        yield chunk


def characters(path):
    """The text of a file, in strings of about a million characters, its line ends made \\n.

    Raises ValueError if the file is not UTF-8, or if a packed file is damaged.
    """
    # A chunk may end inside a character, or between \r and \n. The decoders keep such bytes and
    # characters for the next chunk. The second one turns every line end into \n.
    decoder = codecs.getincrementaldecoder("utf-8")()
    line_ends = io.IncrementalNewlineDecoder(None, translate=True)
    at = 0  # bytes of text that came before this chunk
    size = path.stat().st_size
    with open(path, "rb") as raw, progress(f"reading {path.name}", size) as bar:
        try:
            # With the empty chunk at the end, half a character there is an error, too.
            for chunk in itertools.chain(chunks(raw, path.suffix), [b""]):
                text = decoder.decode(chunk, final=not chunk)
                if at == 0:
                    text = text.removeprefix("\ufeff")  # the byte order mark that Windows writes
                    if text.count("\0") > len(text) / 10:
                        raise ValueError(f"{path} is full of NUL bytes, so it is not UTF-8: "
                                         f"convert it, for example with iconv -f UTF-16LE -t UTF-8")
                yield line_ends.decode(text, final=not chunk)
                at += len(chunk)
                bar.update(raw.tell() - bar.n)
        except UnicodeDecodeError as error:
            # error.start counts from the first byte that the decoder had kept.
            at += error.start - len(decoder.getstate()[0])
            raise ValueError(f"{path}: byte {at} is not UTF-8: convert the file, for example "
                             f"with iconv -t UTF-8") from None
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path} is damaged or cut short ({error}): delete it and get it "
                             f"again") from None


def documents(texts, separator):
    """Cut a stream of strings into documents: yields (text, whether its document ends here).

    Documents are stripped, and blank ones are left out. A document longer than PIECE comes in
    several pieces. They are cut where every tokenizer cuts, too, if there is such a place: so the
    tokens are those of the whole. The result does not depend on how the stream was cut.
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
    """The last place up to PIECE where a word ends and a space or a line's end follows.

    In a text without spaces: where a letter or digit stands before a punctuation mark, or PIECE.
    """
    # The greedy .* finds the last such place. With (?s) the dot matches line ends, too.
    for place in (r"(?s).*\S(?=[ \n])", r"(?s).*[^\W_](?=[,.;:!?、。，！？])"):
        found = re.compile(place).match(text, 0, PIECE + 1)
        if found:
            return found.end()
    return PIECE


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


def plan_files(paths, is_known, separator, val_fraction):
    """How to split the files of a text -> list of Reading. is_known: of a source with a name."""
    if len(paths) == 1 and not is_known:
        return plan_text(paths[0], separator, val_fraction)
    if len(paths) == 2 and is_known:
        return [Reading(paths[0], "train"), Reading(paths[1], "val")]
    return [Reading(path) for path in paths]  # every so many documents, one is for validation


def batches(plan, separator, every):
    """Read all files of a plan: yields lists of (split, text, whether its document ends here).

    A list has about BATCH characters. If it goes on with a document, it begins with an empty piece
    of it. every: where the plan leaves the split open, document 0 and then one in `every` documents
    is for validation.
    """
    number = 0  # of the document, over all files
    batch = []
    size = 0  # characters in the batch
    for path, split, cut in plan:
        at = 0  # characters of this file so far
        for text, ends in documents(characters(path), separator):
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
                batch = [] if ends else [(batch[-1][0], "", False)]
                size = 0
    yield batch
