"""
Turn a corpus into files of tokens for train.py and sample.py.

    python prepare_data.py                  # facts about invented people; offline, takes a second
    python prepare_data.py tinystories      # 2.2 GB of simple stories (--small: 22 MB)
    python prepare_data.py openwebtext      # 4.6 GB of packed web text, 2.7 B tokens
                                            # (--small: 112 MB)
    python prepare_data.py my.txt           # any UTF-8 text, or a folder of .txt files: documents
                                            # end at <|endoftext|>, or at what --separator says
    python prepare_data.py tinystories --from-file train.txt valid.txt      # files you have
    python prepare_data.py facts --from-file FACTS.tsv PATTERNS.tsv         # facts of your own

It prints its progress and what it made. The folder data/<name> then holds

    train.bin, val.bin      raw little-endian uint16 as in nanoGPT; after each document comes the
                            end-of-text token (eot)
    tokenizer.tiktoken      the tokens, one per line: base64 of the bytes, then the number
    recall.npz              facts only: what each fact is, and how often it is in train.bin
    meta.json               sizes, settings and checksums

meta.json is written last, and a folder without it does not count as finished. So you may stop at
any time and run the same command again. An interrupted download resumes.

This file, from top to bottom: tokenizers, the facts corpus, facts of your own, texts, the command
line. Reading and downloading are in support/.
"""
import argparse
import base64
import collections
import errno
import functools
import itertools
import math
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from support.terminal import (Parser, counted, listen_to_ctrl_c, quiet_ctrl_c, say_problem,
                              steady_output)

if __name__ == "__main__":
    quiet_ctrl_c()

import numpy as np
import tiktoken
import tiktoken_ext.openai_public

from support import own_facts, sources
from support.data_folder import how_to_make, make_folder, read_meta, write_meta
from support.download import SOURCES, certificate_hint, get
from support.fields import add_flags, check_limits, flag, setting
from support.files import reading, sha256
from support.invented import (FIRST_NAMES, LAST_NAMES, MOST_PEOPLE, NAMES, PHRASINGS, RELATIONS,
                              TRAINED_PHRASINGS, check_facts)
from support.text import BATCH, batches, plan_files

EOT = "<|endoftext|>"
# The pattern that cuts text for the `words` and `bytes` tokenizers: a word with the space before
# it, a run of punctuation with the space before it, or one white-space character. No character is
# lost, and Python's re and tiktoken's regex engine read the pattern alike.
PUNCTUATION = r"!-/:-@\[-`{-~¡-¿‐-⁞、-〿！-／：-＠"
WORDS = rf" ?[^\s{PUNCTUATION}]+| ?[{PUNCTUATION}]+|\s"
TOKENIZERS = ["gpt2", "bytes", "words"]
# A .bin file is uint16, so a vocabulary has at most so many tokens.
MOST_TOKENS = 1 << 16
# Tokens in the windows that train.py takes from a text, unless --block-size says otherwise.
WINDOW = 256


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
        self.ranks = {token: rank for rank, token in enumerate(tokens)}
        self.tiktoken = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=self.ranks, special_tokens={EOT: self.eot})

    def with_first_space(self, text):
        """The text as it is encoded: for `words`, with a space before a first word."""
        needs_space = self.name == "words" and text and not text[0].isspace()
        return " " + text if needs_space else text

    def encode(self, text):
        """str -> list of int. The characters <|endoftext|> are ordinary text, never eot."""
        return self.tiktoken.encode_ordinary(self.with_first_space(text))

    def encode_to_numpy(self, text, begins=True):
        """The same tokens as a (tokens,) array of little-endian uint16.

        begins: whether the text is the beginning of a document, not a later piece. tiktoken
        releases Python's lock while it encodes, so other threads can run.
        """
        if begins:
            text = self.with_first_space(text)
        ids = self.tiktoken.encode_to_numpy(text, disallowed_special=())
        return ids.astype("<u2")

    def unknown_words(self, text):
        """The words of a text that `words` spells in bytes. Always [] for `gpt2` and `bytes`."""
        if self.name != "words":
            return []
        pieces = re.findall(self.pattern, self.with_first_space(text))
        return [piece.strip() for piece in pieces if piece.encode() not in self.ranks]

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


def frequent_words(found, vocab_size):
    """The words of a `words` vocabulary, most frequent first.

    found: what batches() yields; only the training text counts. vocab_size includes the 256 bytes
    and eot, so there are at most vocab_size - 257 words. Each has 2 to 64 bytes.
    """
    counts = collections.Counter()
    for batch in found:
        begins = True
        for split, text, ends in batch:
            if begins and not text[:1].isspace():
                text = " " + text  # as Tokenizer does
            begins = ends
            if split != "train":
                continue
            counts.update(re.findall(WORDS, text))
            # Forget what was rare so far, so that memory stays bounded.
            if len(counts) > 2_000_000:
                counts = collections.Counter(dict(counts.most_common(1_000_000)))
    words = [word for word in counts if 1 < len(word.encode()) <= 64]
    words.sort(key=lambda word: (-counts[word], word))
    return words[:vocab_size - 257]


# ---- the facts corpus

MANY = 10**12
MOST_SENTENCES = 10**8  # of facts of your own


@dataclass
class FactsText:
    """The settings of a text of facts, whether they are invented or your own."""
    val_documents: int = setting(4096, "sentences to validate on", 1, MANY)
    zipf_shift: float = setting(20.0, "larger: the frequent ones are less frequent", 0.001, 10**9)
    zipf_power: float = setting(1.0, "0: all are equally frequent", 0, 100)
    seed: int = setting(1337, "of the random numbers", 0, 2**63)
    tokenizer: str = setting("words", "")


@dataclass
class Facts(FactsText):
    """The settings of make_facts."""
    people: int = setting(8000, "people who are named in the text", 1, MOST_PEOPLE)
    relations: int = setting(5, "things known of each person", 1, len(RELATIONS))
    answers: int = setting(64, "possible answers per relation", 2, 100)
    documents: int = setting(640_000, "sentences to train on", 1, MANY)
    control: float = setting(200, "more people, who are never named. With --from-file: the share "
                             "of facts that are never in the text", 0, MOST_PEOPLE)
    names: str = setting("shared", "shared: Rasia Westshaw, where others have these names, too; "
                         "apart: Rasia of house Westshaw; single: one word for each person")


def make_facts(out="data/facts", force=False, **settings):
    """Make the folder `out` with facts about invented people: `people` x `relations` of them.

    One document is one fact in one window: eot, the sentence, then eot up to the window's end. The
    person of rank r is named with probability ~ 1 / (r + zipf_shift)^zipf_power: a few often, most
    seldom, and the `control` group never. settings: those of Facts. Raises ValueError for settings
    that cannot work.
    """
    s = Facts(**settings)
    check_limits(s)
    check_facts(s)
    s.control = int(s.control)
    settings = dict(source="facts", **asdict(s))
    if s.names == "shared":  # older folders do not have this setting
        del settings["names"]

    def write(folder):
        write_invented(folder, s, settings)
    make_folder(out, settings, force, write)


def write_invented(folder, s, settings):
    """Fill a folder with facts about invented people. s: Facts. settings: for meta.json."""
    # The number of a fact is person * relations + relation, and the people of the control group
    # have the highest numbers. There are F facts.
    rng = np.random.default_rng(s.seed)
    people = s.people
    relations = s.relations
    tok, subjects, windows, spans = fact_windows(rng, s)
    F, _, window = windows.shape
    # Sums of the probabilities: person r is drawn by a number between chance[r-1] and chance[r].
    chance = ((np.arange(people) + s.zipf_shift) ** -s.zipf_power).cumsum()  # (people,)

    def draw(n):
        """n facts at random, and a phrasing for each: numbers of facts, of rows of windows."""
        person = chance.searchsorted(rng.random(n) * chance[-1], side="right")  # (n,)
        person = np.minimum(person, people - 1)  # rounding can lead past the last one
        fact = person * relations + rng.integers(relations, size=n)  # (n,)
        return fact, fact * PHRASINGS + rng.integers(TRAINED_PHRASINGS, size=n)

    documents = {"train": s.documents, "val": s.val_documents}
    draws = {"train": draw, "val": draw}
    exposures = write_facts(folder, documents, draws, windows.reshape(-1, window), F, tok)  # (F,)
    # The first phrasing is in the text ("seen"), the last one is not ("unseen").
    np.savez_compressed(
        folder / "recall.npz",
        seen=windows[:, 0], seen_span=spans[:, 0],
        unseen=windows[:, -1], unseen_span=spans[:, -1],
        exposures=exposures, control=np.arange(F) >= people * relations,
        subject=np.repeat(subjects, relations))
    print(f"{counted(people, 'person', 'people')} ({counted(s.control, 'more is', 'more are')} "
          f"never named), {counted(F, 'fact')}, windows of {window} tokens, exposures "
          f"{quartiles(exposures[:people * relations])}")
    write_meta(folder, tok, documents, source="invented", settings=settings, window=window,
               people=people, relations=relations, answers=s.answers, control_people=s.control)


def fact_windows(rng, s):
    """Invent the people, those of the control group too, and put every fact into words. s: Facts.

    Returns the tokenizer; the people's names; windows (F, PHRASINGS, window) uint16, each fact in
    all phrasings; and spans (F, PHRASINGS, 2) int, where in the window the answer begins and ends.
    F = people * relations.
    """
    people = s.people + s.control
    relations = s.relations
    answers = s.answers
    # Each person is a number below pool * pool, drawn without repetition: i // pool is the first
    # name, i % pool the last.
    pool = max(8, math.ceil(1.2 * math.sqrt(people)))
    first = rng.choice(FIRST_NAMES, pool, replace=False)
    last = rng.choice(LAST_NAMES, pool, replace=False)
    pairs = rng.choice(pool * pool, people, replace=False)
    subjects = [NAMES[s.names].format(first[i // pool], last[i % pool]) for i in pairs]
    # For each relation: how to say it, and a choice of the words that can answer.
    phrasings_of = [phrasings for _, *phrasings in RELATIONS[:relations]]
    answers_of = [rng.permutation(known)[:answers].tolist() for known, *_ in RELATIONS[:relations]]
    truth = rng.integers(answers, size=(people, relations))  # (people, relations): which word

    # The texts: each fact in all its phrasings.
    vocabulary = ()
    if s.tokenizer == "words":
        everything = " ".join(itertools.chain(first, last, subjects, *phrasings_of, *answers_of))
        vocabulary = sorted(" " + word for word in set(re.findall("[a-zA-Z]+", everything)))
    tok = make_tokenizer(s.tokenizer, vocabulary)
    width = {word: len(tok.encode(" " + word)) for known in answers_of for word in known}
    texts = []  # F * PHRASINGS lists of tokens
    spans = []  # as many
    for subject, row in zip(subjects, truth.tolist()):
        for phrasings, known, answer in zip(phrasings_of, answers_of, row):
            for phrasing in phrasings:
                text = tok.encode(phrasing.format(subject, known[answer]))
                texts.append(text)
                # In its window the text follows one eot, so its full stop is at len(text).
                spans.append((len(text) - width[known[answer]], len(text)))
    windows = fill_windows(texts, tok.eot).reshape(people * relations, PHRASINGS, -1)
    return tok, subjects, windows, np.array(spans).reshape(-1, PHRASINGS, 2)


def fill_windows(texts, eot):
    """Lists of tokens -> rows full of eot, each with its text after the first eot.

    Returns windows (texts, window) uint16, as long as the longest text needs.
    """
    lengths = np.array([len(text) for text in texts])  # (texts,)
    longest = lengths.max()
    windows = np.full((len(texts), longest + 1), eot, "<u2")  # (texts, window)
    has_text = np.arange(longest) < lengths[:, None]  # (texts, window - 1) bool
    windows[:, 1:][has_text] = np.fromiter(itertools.chain.from_iterable(texts), "<u2")
    return windows


EXAMPLES = 6  # sentences of the validation text that are printed


def write_facts(folder, documents, draws, windows, F, tok):
    """Draw facts and write their windows to train.bin and val.bin. Prints some examples.

    documents: {split: how many}. draws: {split: draw}, where draw(n) gives n numbers of facts, and
    the row of `windows` (rows, window) uint16 for each. Returns exposures (F,) int64: how often
    each of the F facts is in train.bin.
    """
    exposures = {split: np.zeros(F, np.int64) for split in documents}  # (F,) each
    for split, count in documents.items():
        with open(folder / f"{split}.bin", "wb") as file:
            for begin in range(0, count, BATCH):
                facts, rows = draws[split](min(BATCH, count - begin))  # (n,) both
                file.write(windows[rows])
                exposures[split] += np.bincount(facts, minlength=F)
                if split == "val" and begin == 0:
                    for row in windows[rows[:EXAMPLES]]:
                        print("    " + tok.decode(row[row != tok.eot]))
            # The last window's last token needs a target.
            file.write(np.array([tok.eot], "<u2"))
    return exposures["train"]


def quartiles(exposures):
    """The least, the quartiles and the most, as text."""
    percents = [0, 25, 50, 75, 100]
    percentiles = np.percentile(exposures, percents)
    return ", ".join(f"{q}%: {value:.0f}" for q, value in zip(percents, percentiles))


# ---- facts of your own

@dataclass
class OwnFacts(FactsText):
    """The settings of make_own_facts. What Facts has, too, is described there."""
    control: float = setting(0.025, "", 0, 0.9)
    documents: int = setting(0, "", 0, MOST_SENTENCES)
    longest: int = setting(128, "most tokens of a sentence", 2, 10**6)


def make_own_facts(from_file, out="data/own", force=False, **settings):
    """Make the folder `out` with your own facts. from_file: paths of FACTS.tsv and PATTERNS.tsv.

    FACTS has the columns relation, subject, answer, and optionally count: how often the fact
    stands in the text. PATTERNS has relation and pattern: a sentence with {subject} in it and
    {answer} at its end. A relation's last pattern is kept out of the text if there is another.

    Without counts, `documents` sentences are drawn (0: 16 a fact). The fact of rank r in a random
    order has the probability ~ 1 / (r + zipf_shift)^zipf_power. control: share of the facts that
    are never in the text and have no rank. longest: a sentence of more tokens is left out.
    settings: those of OwnFacts. Raises ValueError for files and settings that cannot work.
    """
    paths = own_facts.two_tables(from_file)
    s = OwnFacts(**settings)
    check_limits(s)
    settings = dict(source="own facts", facts_sha256=sha256(paths[0]),
                    patterns_sha256=sha256(paths[1]), **asdict(s))
    facts, patterns = own_facts.read_own_facts(*paths)

    def write(folder):
        write_own_facts(folder, s, settings, facts, patterns, files=[str(path) for path in paths])
    make_folder(out, settings, force, write)


def write_own_facts(folder, s, settings, facts, patterns, files):
    """Fill a folder with facts of your own. s: OwnFacts. settings, files: for meta.json."""
    tok = own_tokenizer(s.tokenizer, facts, patterns)
    facts, sentences = own_facts.put_into_words(facts, patterns, tok, s.longest)
    F = len(facts)
    if F < 2:
        raise ValueError("there is only one fact left: give at least two")
    rng = np.random.default_rng(s.seed)
    text, other, is_control = own_facts.draw_own_facts(facts, s, rng)
    windows = fill_windows(sentences.texts, tok.eot)  # (sentences, window)
    window = windows.shape[1]
    documents = {"train": len(text), "val": len(other)}
    draws = {"train": own_facts.phrase(text, sentences, rng),
             "val": own_facts.phrase(other, sentences, rng)}
    exposures = write_facts(folder, documents, draws, windows, F, tok)  # (F,)
    np.savez_compressed(folder / "recall.npz", **own_facts.recall_arrays(
        facts, sentences, windows, exposures, is_control))
    never = counted(is_control.sum(), "of them is", "of them are")
    print(f"{F:,} facts ({never} never in the text), {counted(len(patterns), 'relation')}, "
          f"windows of {window} tokens, exposures {quartiles(exposures[~is_control])}")
    own_tokens = own_facts.share_with_own_token(facts, tok)
    print(f"{own_tokens:.0%} of the subjects have a token that no other subject has "
          f"(docs/results.md: what that means for a memory layer)")
    write_meta(folder, tok, documents, source="own facts", settings=settings, window=window,
               answers=own_facts.possible_answers(facts), subjects_with_own_token=own_tokens,
               files=files)


def own_tokenizer(name, facts, patterns):
    """The tokenizer. `words` gets a token for each word of the sentences, as many as fit."""
    if name != "words":
        return make_tokenizer(name)
    texts = [own_facts.say(pattern, fact)[0]
             for fact in facts for pattern in patterns[fact.relation]]
    batch = [("train", text, True) for text in texts]
    return make_tokenizer(name, sorted(frequent_words([batch], MOST_TOKENS)))


# ---- texts

@dataclass
class Text:
    """The settings of make_text."""
    tokenizer: str = setting("gpt2", "")
    vocab_size: int = setting(8192, "tokens of --tokenizer words: bytes, words and eot",
                              258, MOST_TOKENS)
    separator: str = setting(EOT, "what stands between documents; \\n is a line's end")
    val_fraction: float = setting(0.01, "part of the documents kept for validation", 1e-9, 0.5)
    small: bool = setting(False, "only the small file, split for validation")
    downloads: str = setting("data/downloads", "where downloads are kept")
    no_verify: bool = setting(False, "accept files of another size or sha256")
    workers: int = setting(os.cpu_count() or 1, "threads that encode", 0, 2**16)


def make_text(source, out="", from_file=(), force=False, **settings):
    """Make the folder `out` from tinystories, openwebtext or texts of your own, as nanoGPT does.

    The documents follow one another, with eot after each. source: "tinystories", "openwebtext" or
    the path of a text file, or of a folder with .txt files. from_file: local copies instead of
    downloads: train, then valid. settings: those of Text. Raises ValueError for settings that
    cannot work, and if a file is damaged or too short or cannot be downloaded.
    """
    is_known = source in SOURCES  # else it is a path
    s = Text(**settings)
    check_limits(s)
    # The shell passes a line's end as \n, two characters. In the text it is one.
    s.separator = s.separator.replace("\\r", "").replace("\\n", "\n").replace("\r\n", "\n")
    out = out or sources.default_folder(source)
    local = from_file if is_known else sources.own_texts(source)
    sources.check_source(source, local, from_file, s.small, s.separator)
    paths = sources.input_paths(source, local, s.downloads, s.small)
    settings = dict(
        source=source if is_known else "text", files=sources.name_files(source, paths, local),
        tokenizer=s.tokenizer, separator=s.separator, val_fraction=s.val_fraction,
        vocab_size=s.vocab_size if s.tokenizer == "words" else None)

    def write(folder):
        write_text(folder, s, settings, paths, is_known)
    make_folder(out, settings, force, write)


def write_text(folder, s, settings, paths, is_known):
    """Fill a folder with a text. s: Text. settings: for meta.json. paths: the files, in order."""
    # If the gpt2 vocabulary is missing, say so now and not after hours of downloads. A vocabulary
    # of words can only be made from the text.
    tok = None
    if s.tokenizer != "words":
        tok = make_tokenizer(s.tokenizer)
    paths = [get(path, s.no_verify) for path in paths]
    plan = plan_files(paths, is_known, s.separator, s.val_fraction)
    every = round(1 / s.val_fraction)  # of so many documents, one is for validation
    if tok is None:
        words = frequent_words(batches(plan, s.separator, every), s.vocab_size)
        tok = make_tokenizer(s.tokenizer, words)
    stream = tokenized(batches(plan, s.separator, every), tok, s.workers)
    count = write_tokens(folder, stream, tok)
    if not all(count.values()):
        to_train = counted(count["train"], "document")
        raise ValueError(f"{paths[0]}: {to_train} to train on, {count['val']} to validate on: more "
                         f"text is needed")
    write_meta(folder, tok, count, source=[sources.origin(path) for path in paths],
               settings=settings)
    val_tokens = (folder / "val.bin").stat().st_size // 2
    if val_tokens <= WINDOW:
        print(f"{val_tokens} tokens to validate on are less than a window of {WINDOW}, so train.py "
              f"will refuse them: use --force and more text or a larger --val-fraction (now "
              f"{s.val_fraction}), or train with a lower --block-size")


def encode_batch(tok, batch):
    """A batch of batches() -> {split: (tokens,) uint16}, with eot where a document ends."""
    eot = np.array([tok.eot], "<u2")
    parts = {"train": [], "val": []}
    begins = True  # whether the next text is the beginning of a document
    for split, text, ends in batch:
        if text:
            parts[split].append(tok.encode_to_numpy(text, begins))
        if ends:
            parts[split].append(eot)
        begins = ends
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

# What makes a folder, and its settings.
MAKERS = {
    "facts": (make_facts, Facts),
    "facts --from-file": (make_own_facts, OwnFacts),
    "texts": (make_text, Text),
}


def make_parser():
    """The parser. What was not given is not in its result."""
    parser = Parser("prepare_data.py", __doc__)
    parser.argument_default = argparse.SUPPRESS
    parser.add_argument("source", nargs="?", default="facts",
                        help="facts, tinystories, openwebtext, or the path of a text file")
    parser.add_argument("--out", help="folder to make (data/<name>)")
    parser.add_argument("--tokenizer", choices=TOKENIZERS,
                        help="default for facts: words; for texts: gpt2")
    parser.add_argument("--force", action="store_true", help="replace a finished folder")
    parser.add_argument("--from-file", nargs="+", metavar="PATH",
                        help="local copies instead of downloads: train, then valid. For facts of "
                        "your own: FACTS.tsv, then PATTERNS.tsv")
    known = {"tokenizer"}
    for title, (_, settings) in MAKERS.items():
        add_flags(parser.add_argument_group(title), settings(), known)
        known |= {f.name for f in fields(settings)}
    return parser


def prepare(argv):
    """Do what the command line asks for. Raises ValueError if it makes no sense."""
    given = vars(make_parser().parse_args(argv))
    source = given["source"]
    is_text = given.pop("source") != "facts"
    if not is_text and "from_file" in given:
        source = "facts --from-file"
    make, settings = MAKERS["texts" if is_text else source]
    unfit = given.keys() - {f.name for f in fields(settings)} - {"out", "force", "from_file"}
    if unfit:
        raise ValueError(f"{flag(min(unfit))} is not for {source} (--help shows what there is)")
    if is_text:
        make = functools.partial(make, source)
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
    say_problem("prepare_data.py", message)
    return 1


if __name__ == "__main__":
    listen_to_ctrl_c()
    steady_output()
    sys.exit(main())
