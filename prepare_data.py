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
import inspect
import itertools
import math
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from support.terminal import (Parser, counted, listen_to_ctrl_c, quiet_ctrl_c, say_problem,
                              steady_output)

if __name__ == "__main__":
    quiet_ctrl_c()

import numpy as np
import tiktoken
import tiktoken_ext.openai_public

from support import own_facts, sources
from support.data_folder import how_to_make, is_finished, making, read_meta, write_meta
from support.download import SOURCES, certificate_hint, get
from support.fields import flag
from support.files import reading, sha256
from support.invented import (FIRST_NAMES, LAST_NAMES, NAMES, PHRASINGS, RELATIONS,
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
    # The number of a fact is person * relations + relation, and the people of the control group
    # have the highest numbers. There are F facts.
    rng = np.random.default_rng(seed)
    tok, subjects, windows, spans = fact_windows(
        rng, people + control, relations, answers, tokenizer, names)
    F, _, window = windows.shape
    flat = windows.reshape(F * PHRASINGS, window)
    # Sums of the probabilities: person r is drawn by a number between chance[r-1] and chance[r].
    chance = ((np.arange(people) + zipf_shift) ** -float(zipf_power)).cumsum()  # (people,)

    def draw(n):
        """n facts at random, and a phrasing for each: numbers of facts, of rows of `flat`."""
        person = chance.searchsorted(rng.random(n) * chance[-1], side="right")  # (n,)
        person = np.minimum(person, people - 1)  # rounding can lead past the last one
        fact = person * relations + rng.integers(relations, size=n)  # (n,)
        return fact, fact * PHRASINGS + rng.integers(TRAINED_PHRASINGS, size=n)

    with making(out, settings, force) as folder:
        if folder is None:  # another process has made it meanwhile
            return
        # exposures (F,): how often each fact is in train.bin
        exposures = write_facts(folder / "train.bin", documents, draw, flat, F, tok)
        write_facts(folder / "val.bin", val_documents, draw, flat, F, tok, examples=6)
        # The first phrasing is in the text ("seen"), the last one is not ("unseen").
        np.savez_compressed(
            folder / "recall.npz",
            seen=windows[:, 0], seen_span=spans[:, 0],
            unseen=windows[:, -1], unseen_span=spans[:, -1],
            exposures=exposures, control=np.arange(F) >= people * relations,
            subject=np.repeat(subjects, relations))
        print(f"{counted(people, 'person', 'people')} ({counted(control, 'more is', 'more are')} "
              f"never named), {counted(F, 'fact')}, windows of {window} tokens, exposures "
              f"{quartiles(exposures[:people * relations])}")
        write_meta(folder, tok, {"train": documents, "val": val_documents}, source="invented",
                   settings=settings, window=window, people=people, relations=relations,
                   answers=answers, control_people=control)


def fact_windows(rng, people, relations, answers, tokenizer, names):
    """Invent the people, and put every fact into words.

    Returns the tokenizer; the people's names; windows (F, PHRASINGS, window) uint16, each fact in
    all phrasings; and spans (F, PHRASINGS, 2) int, where in the window the answer begins and ends.
    F = people * relations.
    """
    # Each person is a number below pool * pool, drawn without repetition: i // pool is the first
    # name, i % pool the last.
    pool = max(8, math.ceil(1.2 * math.sqrt(people)))
    first = rng.choice(FIRST_NAMES, pool, replace=False)
    last = rng.choice(LAST_NAMES, pool, replace=False)
    pairs = rng.choice(pool * pool, people, replace=False)
    subjects = [NAMES[names].format(first[i // pool], last[i % pool]) for i in pairs]
    # For each relation: how to say it, and a choice of the words that can answer.
    phrasings_of = [phrasings for _, *phrasings in RELATIONS[:relations]]
    answers_of = [rng.permutation(known)[:answers].tolist() for known, *_ in RELATIONS[:relations]]
    truth = rng.integers(answers, size=(people, relations))  # (people, relations): which word

    # The texts: each fact in all its phrasings.
    vocabulary = ()
    if tokenizer == "words":
        everything = " ".join(itertools.chain(first, last, subjects, *phrasings_of, *answers_of))
        vocabulary = sorted(" " + word for word in set(re.findall("[a-zA-Z]+", everything)))
    tok = make_tokenizer(tokenizer, vocabulary)
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


def write_facts(path, count, draw, windows, F, tok, examples=0):
    """Draw `count` facts and write their windows to a .bin file. Prints the first `examples`.

    draw(n): gives n numbers of facts, and the row of `windows` (rows, window) uint16 for each.
    Returns exposures (F,) int64: how often each of the F facts was written.
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
    """The least, the quartiles and the most, as text."""
    percents = [0, 25, 50, 75, 100]
    percentiles = np.percentile(exposures, percents)
    return ", ".join(f"{q}%: {value:.0f}" for q, value in zip(percents, percentiles))


# ---- facts of your own

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
    facts_path, patterns_path = own_facts.two_tables(from_file)
    settings = dict(
        source="own facts", facts_sha256=sha256(facts_path), patterns_sha256=sha256(patterns_path),
        control=control, documents=documents, val_documents=val_documents, zipf_shift=zipf_shift,
        zipf_power=zipf_power, longest=longest, seed=seed, tokenizer=tokenizer)
    own_facts.check_own_facts(settings)
    if is_finished(out, settings, force):
        return
    facts, patterns = own_facts.read_own_facts(facts_path, patterns_path)
    tok = own_tokenizer(tokenizer, facts, patterns)
    facts, sentences = own_facts.put_into_words(facts, patterns, tok, longest)
    F = len(facts)
    if F < 2:
        raise ValueError(f"there is only one fact left: give at least two in {facts_path}")
    rng = np.random.default_rng(seed)
    text, other, is_control = own_facts.draw_own_facts(facts, settings, rng)
    windows = fill_windows(sentences.texts, tok.eot)  # (sentences, window)
    window = windows.shape[1]
    with making(out, settings, force) as folder:
        if folder is None:  # another process has made it meanwhile
            return
        trained = own_facts.phrase(text, sentences, rng)
        validated = own_facts.phrase(other, sentences, rng)
        exposures = write_facts(folder / "train.bin", len(text), trained, windows, F, tok)
        write_facts(folder / "val.bin", val_documents, validated, windows, F, tok, examples=6)
        np.savez_compressed(folder / "recall.npz", **own_facts.recall_arrays(
            facts, sentences, windows, exposures, is_control))
        never = counted(is_control.sum(), "of them is", "of them are")
        print(f"{F:,} facts ({never} never in the text), {counted(len(patterns), 'relation')}, "
              f"windows of {window} tokens, exposures {quartiles(exposures[~is_control])}")
        own_tokens = own_facts.share_with_own_token(facts, tok)
        print(f"{own_tokens:.0%} of the subjects have a token that no other subject has "
              f"(docs/results.md: what that means for a memory layer)")
        write_meta(folder, tok, {"train": len(text), "val": val_documents}, source="own facts",
                   settings=settings, window=window, answers=own_facts.possible_answers(facts),
                   subjects_with_own_token=own_tokens,
                   files=[str(path) for path in (facts_path, patterns_path)])


def own_tokenizer(name, facts, patterns):
    """The tokenizer. `words` gets a token for each word of the sentences, as many as fit."""
    if name != "words":
        return make_tokenizer(name)
    texts = [own_facts.say(pattern, fact)[0]
             for fact in facts for pattern in patterns[fact.relation]]
    batch = [("train", text, True) for text in texts]
    return make_tokenizer(name, sorted(frequent_words([batch], MOST_TOKENS)))


# ---- texts

def make_text(source, out="", tokenizer="gpt2", vocab_size=8192, separator=EOT, val_fraction=0.01,
              from_file=(), small=False, downloads="data/downloads", no_verify=False,
              workers=os.cpu_count() or 1, force=False):
    """Make the folder `out` from tinystories, openwebtext or texts of your own, as nanoGPT does.

    The documents follow one another, with eot after each. source: "tinystories", "openwebtext" or
    the path of a text file, or of a folder with .txt files. Each other parameter is described at
    its flag, below. Raises ValueError for settings that cannot work, and if a file is damaged or
    too short or cannot be downloaded.
    """
    is_known = source in SOURCES  # else it is a path
    # The shell passes a line's end as \n, two characters. In the text it is one.
    separator = separator.replace("\\r", "").replace("\\n", "\n").replace("\r\n", "\n")
    out = out or sources.default_folder(source)
    local = from_file if is_known else sources.own_texts(source)
    sources.check_source(source, local, from_file, small)
    sources.check_text_numbers(vocab_size, separator, val_fraction, workers)
    paths = sources.input_paths(source, local, downloads, small)
    settings = dict(
        source=source if is_known else "text", files=sources.name_files(source, paths, local),
        tokenizer=tokenizer, separator=separator, val_fraction=val_fraction,
        vocab_size=vocab_size if tokenizer == "words" else None)
    if is_finished(out, settings, force):
        return
    # If the gpt2 vocabulary is missing, say so now and not after hours of downloads. A vocabulary
    # of words can only be made from the text.
    tok = None
    if tokenizer != "words":
        tok = make_tokenizer(tokenizer)
    paths = [get(path, no_verify) for path in paths]
    plan = plan_files(paths, is_known, separator, val_fraction)
    every = round(1 / val_fraction)  # of so many documents, one is for validation
    if tok is None:
        words = frequent_words(batches(plan, separator, every), vocab_size)
        tok = make_tokenizer(tokenizer, words)
    with making(out, settings, force) as folder:
        if folder is None:  # another process has made it meanwhile
            return
        count = write_tokens(folder, tokenized(batches(plan, separator, every), tok, workers), tok)
        if not all(count.values()):
            to_train = counted(count["train"], "document")
            raise ValueError(f"{source}: {to_train} to train on, {count['val']} to validate on: "
                             f"more text is needed")
        origins = [sources.origin(path) for path in paths]
        write_meta(folder, tok, count, source=origins, settings=settings)
    val_tokens = (Path(out) / "val.bin").stat().st_size // 2
    if val_tokens <= WINDOW:
        print(f"{out}: {val_tokens} tokens to validate on are less than a window of {WINDOW}, so "
              f"train.py will refuse them: use --force and more text or a larger --val-fraction "
              f"(now {val_fraction}), or train with a lower --block-size")


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
    "workers": "threads that encode",
    "small": "only the small file, split for validation",
    "no_verify": "accept files of another size or sha256",
}


def make_parser():
    """The parser. Defaults are not repeated here: make_facts and make_text have them."""
    parser = Parser("prepare_data.py", __doc__)
    parser.argument_default = argparse.SUPPRESS  # what was not given is not in the result
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
    say_problem("prepare_data.py", message)
    return 1


if __name__ == "__main__":
    listen_to_ctrl_c()
    steady_output()
    sys.exit(main())
