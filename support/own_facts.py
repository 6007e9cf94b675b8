"""Facts of your own: two tables, as spreadsheets write them, and how they are put into words."""
import codecs
import collections
import csv
import difflib
import io
import itertools
import math
import re
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.files import reading
from support.recall import as_stored
from support.terminal import counted

MOST_SENTENCES = 10 ** 8
# Columns that tables have beside ours. Their names are no typing errors of `count`.
LIKE_COUNT = ("account", "country", "county", "counties")


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


def two_tables(paths):
    """The paths of FACTS.tsv and PATTERNS.tsv. Raises ValueError if these are not two files."""
    if len(paths) != 2:
        raise ValueError(f"facts --from-file takes two files, not {len(paths)}: FACTS.tsv, then "
                         f"PATTERNS.tsv")
    for path in paths:
        if not Path(path).is_file():
            raise ValueError(f"--from-file {path} is no file: give FACTS.tsv, then PATTERNS.tsv")
    return Path(paths[0]), Path(paths[1])


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
        raise ValueError(counted(
            len(wrong), "wrong row, which stands above: fix it",
            "wrong rows, of which the first ones stand above: fix them"))
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
        elif pattern not in known:
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
        if count is not None and not re.fullmatch(r"[0-9]{1,9}(\.0*)?", count):
            wrong.append(f"{place}: the count {count!r} is not a whole number from 0 to 999999999: "
                         f"write it in digits only")
            continue
        fact = OwnFact(row["relation"], row["subject"], row["answer"],
                       None if count is None else int(count.split(".")[0]))
        before, where = facts.setdefault((fact.relation, fact.subject), (fact, place))
        if before.answer != fact.answer:
            wrong.append(f"{place}: {fact.relation} of {fact.subject!r} is {fact.answer!r}, and "
                         f"in {where} it is {before.answer!r}: keep one answer, or make two "
                         f"relations")
        elif before.count != fact.count:
            wrong.append(f"{place}: this fact stands in {where} already, with another count: "
                         f"keep one row")
    return [fact for fact, _ in facts.values()]


def table_text(path):
    """The text of a table: UTF-8, or UTF-16 with a byte order mark, as Excel's Unicode Text is."""
    with reading(path, "give a table with a header"):
        raw = path.read_bytes()
    is_utf16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding = "UTF-16" if is_utf16 else "UTF-8"
    try:
        text = raw.decode(encoding).removeprefix("\ufeff")
        wrong_at = text.find("\0")  # UTF-16 without a byte order mark is full of these
    except UnicodeDecodeError as error:
        wrong_at = error.start
    if wrong_at >= 0:
        raise ValueError(f"{path}: byte {wrong_at} is not {encoding}: save the table as UTF-8 "
                         f"(Excel: Save As, \"CSV UTF-8\" or \"Unicode Text\")")
    return text


def table_cells(path, wrong):
    """The rows of a table, the header first: yields ("path:line", cells). Empty rows are left out.

    As spreadsheets write it: any line ends, and cells perhaps in quotes, with a tab between if the
    header has one, else a comma or a semicolon. White space in a cell is read as one space.
    """
    lines = io.StringIO(table_text(path), newline="")
    header = next((line for line in lines if line.strip()), "")
    lines.seek(0)
    delimiter = "\t" if "\t" in header else max(",;", key=header.count)
    rows = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
    while True:
        place = f"{path}:{rows.line_num + 1}"  # where the next row begins
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error:
            cells = None
        # A cell that has swallowed lines, and what separates cells, began with a quote that was
        # not meant as one.
        if cells is None or any(has_swallowed(cell, delimiter) for cell in cells):
            wrong.append(f"{place}: a quote that is opened here does not end where its cell does: "
                         f"remove it, or put the cell in quotes and write \"\" for those in it")
        elif any(cell.strip() for cell in cells):
            yield place, [as_stored(cell) for cell in cells]


def has_swallowed(cell, delimiter):
    """Whether a cell seems to hold other rows: a line break, and a delimiter.

    After a comma or semicolon of ordinary text comes a space, and it does not count.
    """
    separates = delimiter if delimiter == "\t" else delimiter + r"\S"
    return bool(re.search("[\r\n]", cell) and re.search(separates, cell))


def table_rows(path, needed, wrong, optional=()):
    """The rows of a table with a header: yields ("path:line", {column: text}).

    Rows that cannot be used are added to `wrong`. Raises ValueError for a header that cannot.
    """
    rows = table_cells(path, wrong)
    place, header = next(rows, (f"{path}:1", []))
    names = [name.lower() for name in header]
    while names and not names[-1]:
        names.pop()
    for name in names:
        if name and names.count(name) > 1:
            raise ValueError(f"{place} has two columns {name}: remove one, or rename it")
    others = [name for name in names if name not in (*needed, *optional, *LIKE_COUNT)]
    for name in (*needed, *optional):
        near = difflib.get_close_matches(name, others, 1, 0.75)
        if name not in names and near:
            raise ValueError(f"{place} has no column {name}, but {near[0]}: call it {name} if it "
                             f"is that, else rename it")
    missing = [name for name in needed if name not in names]
    if missing:
        raise ValueError(f"{place} has no column {' and no column '.join(missing)}: the first "
                         f"line must name the columns, with a tab or a comma between: "
                         f"{', '.join(needed)}")
    for place, cells in rows:
        row = dict(zip(names, cells))
        empty = [name for name in (*needed, *optional) if name in names and not row.get(name)]
        beyond = [cell for cell in cells[len(names):] if cell]
        if empty:
            wrong.append(f"{place}: it has no {' and no '.join(empty)}")
        elif beyond:
            wrong.append(f"{place}: {beyond[0]!r} stands beyond the {len(names)} columns of the "
                         f"header: if it belongs to the cell before, put that cell in quotes")
        else:
            yield place, row


def say(pattern, fact):
    """A sentence, and the place of its character where the answer begins."""
    before = pattern.split("{answer}")[0].replace("{subject}", fact.subject)
    stop = ""
    if pattern.endswith(".") and not fact.answer.endswith("."):  # "... of Apple Inc."
        stop = "."
    return before + fact.answer + stop, len(before)


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
        over = f"of more than {longest} tokens"
        left_out = counted(too_long, f"sentence {over} is", f"sentences {over} are")
        print(f"{left_out} left out (--longest), and "
              f"{counted(len(facts) - len(kept), 'fact')} that had no others")
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


def draw_own_facts(facts, s, rng):
    """Which fact each sentence tells -> (training text, validation text, is_control (F,)).

    s: prepare_data.OwnFacts.
    """
    F = len(facts)
    order = rng.permutation(F)  # (F,)
    is_control = np.zeros(F, bool)  # (F,)
    is_control[order[:share_of(s.control, F)]] = True
    counts = own_counts(facts, order, is_control, s)  # (F,): exact, or how likely
    p = counts / counts.sum()  # (F,)
    if facts[0].count is None:
        text = rng.choice(F, s.documents or 16 * F, p=p)  # (documents,)
    else:
        text = rng.permutation(np.repeat(np.arange(F), counts))  # (documents,)
    return text, rng.choice(F, s.val_documents, p=p), is_control


def share_of(control, F):
    """How many of F facts are the control: at least one, unless the share is 0."""
    if control == 0:
        return 0
    return max(round(control * F), 1)


def own_counts(facts, order, is_control, s):
    """How often each fact stands in the text, (F,) int, or in proportion to what, (F,) float.

    Raises ValueError if there would be no text, and if both --documents and counts are given.
    """
    if facts[0].count is None:
        in_text = order[~is_control[order]]  # from the most frequent one to the rarest
        counts = np.zeros(len(facts))  # (F,)
        counts[in_text] = (np.arange(len(in_text)) + s.zipf_shift) ** -s.zipf_power
    else:
        if s.documents:
            raise ValueError(f"--documents {s.documents}: the column count says how "
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


def recall_arrays(facts, sentences, windows, exposures, control):
    """What recall.npz holds of F facts of one's own. exposures, control (F,)."""
    # A fact without an unseen phrasing has its first one there, and does not count.
    unseen = np.where(sentences.unseen < 0, sentences.first, sentences.unseen)  # (F,)
    return dict(seen=windows[sentences.first], seen_span=sentences.spans[sentences.first],
                unseen=windows[unseen], unseen_span=sentences.spans[unseen],
                has_unseen=sentences.unseen >= 0, exposures=exposures, control=control,
                subject=np.array([fact.subject for fact in facts]))


def possible_answers(facts):
    """How many answers a relation has, the geometric mean over the facts: 2 to so many bits."""
    answers = {}
    for fact in facts:
        answers.setdefault(fact.relation, set()).add(fact.answer)
    bits = [math.log2(len(answers[fact.relation])) for fact in facts]
    return 2 ** statistics.mean(bits)


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
