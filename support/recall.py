"""recall.npz: the facts that a run was trained on, to be asked."""
import difflib
import unicodedata
from pathlib import Path

import numpy as np

from support.data_folder import how_to_make, is_facts
from support.files import reading


def read_facts(folder):
    """The arrays of recall.npz of a data folder or a run folder, a row for each of F facts.

    seen, unseen (F, T): the tokens of the fact in a phrasing of the text, and in one that is held
    out. seen_span, unseen_span (F, 2): [start, end) of the answer in these windows. exposures (F,):
    how often the training text states it. control (F,): whether it is never in the text. subject
    (F,): whom or what it is about. Raises ValueError if it is missing, or for a text.
    """
    if not is_facts(folder):
        raise ValueError(f"{folder} was not made from facts, so there are no facts to ask")
    path = Path(folder) / "recall.npz"
    with reading(path, how_to_make(folder)):
        with np.load(path) as arrays:
            facts = dict(arrays)
        F = len(facts["control"])
        for name in ("seen", "seen_span", "unseen", "unseen_span", "exposures", "subject"):
            if len(facts[name]) != F:
                raise ValueError(f"{name} has {len(facts[name])} facts, not {F}")
    return facts


def as_stored(text):
    """A name or a prompt as facts are stored: one space between words, an accent in its letter."""
    return unicodedata.normalize("NFC", " ".join(text.split()))


def numbers_about(name, facts):
    """Which of the facts are about `name` -> (numbers,). Raises ValueError if none is."""
    wanted = as_stored(name)
    subjects = np.array([as_stored(subject) for subject in facts["subject"].tolist()])  # (F,)
    numbers = np.flatnonzero(subjects == wanted)
    if not len(numbers):
        names = np.unique(facts["subject"]).tolist()
        near = difflib.get_close_matches(name, names, 3, cutoff=0)
        raise ValueError(f"no fact is about {name!r}: try {' or '.join(near)}")
    return numbers


def plain_text(tok, ids):
    """The text of some tokens, with one space between words and none around them."""
    return " ".join(tok.decode(ids).split())
