"""
Facts of your own: prepare_data.py facts --from-file FACTS.tsv PATTERNS.tsv, and names that stand
apart. The folder has what the tables say, wrong rows are named, and a run learns and answers.
"""
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import prepare_data
import sample
import train
from support import data_folder, own_facts, recall

REAL = Path(__file__).parents[2] / "shared" / "data" / "real_facts"
PATTERNS = """relation\tpattern
capital\tThe capital of {subject} is {answer}.
capital\t{subject} has as its seat {answer}
capital\tPeople of {subject} meet in {answer}.
founder\t{subject} was founded by {answer}.
"""
FACTS = """relation\tsubject\tanswer
capital\tFrance\tParis
capital\tJapan\tTokyo
capital\tPeru\tLima
founder\tOld Mill\tAda Byron Ltd.
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "f.tsv").write_text(FACTS, "utf-8")
    (tmp_path / "p.tsv").write_text(PATTERNS, "utf-8")
    return tmp_path


def make(folder, *flags):
    return prepare_data.main(["facts", "--from-file", str(folder / "f.tsv"), str(folder / "p.tsv"),
                              "--out", str(folder / "data"), *flags])


def made(folder):
    """recall.npz, the tokenizer, and how often each sentence stands in train.bin and in val.bin."""
    with np.load(folder / "data" / "recall.npz") as arrays:
        facts = dict(arrays)
    tok = prepare_data.load_tokenizer(folder / "data")
    window = data_folder.read_meta(folder / "data")["window"]
    counts = []
    for split in ("train", "val"):
        tokens = np.fromfile(folder / "data" / f"{split}.bin", "<u2")
        assert len(tokens) % window == 1 and tokens[-1] == tok.eot
        rows = tokens[:-1].reshape(-1, window)
        counts.append(Counter(text_of(tok, row) for row in rows))
    return facts, tok, *counts


def text_of(tok, ids):
    return tok.decode([i for i in ids if i != tok.eot]).strip()


def asked(facts, tok, which):
    """The sentences that are asked, as (what stands before the answer, the answer)."""
    pairs = []
    for window, (start, end) in zip(facts[which], facts[f"{which}_span"]):
        pairs.append((text_of(tok, window[:start]), text_of(tok, window[start:end])))
    return pairs


@pytest.mark.parametrize("tokenizer", ["words", "bytes"])
def test_the_folder_has_what_the_tables_say(folder, tokenizer):
    assert make(folder, "--control", "0", "--documents", "4000", "--tokenizer", tokenizer) == 0
    facts, tok, train_counts, val_counts = made(folder)
    assert facts["subject"].tolist() == ["France", "Japan", "Peru", "Old Mill"]
    assert asked(facts, tok, "seen") == [
        ("The capital of France is", "Paris"), ("The capital of Japan is", "Tokyo"),
        ("The capital of Peru is", "Lima"), ("Old Mill was founded by", "Ada Byron Ltd.")]
    assert asked(facts, tok, "unseen")[:3] == [
        ("People of France meet in", "Paris"), ("People of Japan meet in", "Tokyo"),
        ("People of Peru meet in", "Lima")]
    assert facts["has_unseen"].tolist() == [True, True, True, False]
    assert not facts["control"].any()
    # In the text stand the two trained phrasings of a capital, and the only one of a founder.
    assert len(train_counts) == 7
    assert not any("meet" in text for text in train_counts | val_counts)
    for number, subject in enumerate(facts["subject"]):
        times = sum(n for text, n in train_counts.items() if subject in text)
        assert times == facts["exposures"][number] > 500
    assert facts["exposures"].sum() == 4000
    assert sum(val_counts.values()) == 4096


def test_the_longest_sentence_sets_the_window(folder):
    assert make(folder, "--tokenizer", "bytes") == 0
    longest = "Old Mill was founded by Ada Byron Ltd."
    assert data_folder.read_meta(folder / "data")["window"] == len(longest) + 1


def test_counts_are_exact(folder):
    (folder / "f.tsv").write_text("relation\tsubject\tanswer\tcount\n"
                                  "capital\tFrance\tParis\t30\ncapital\tJapan\tTokyo\t0\n"
                                  "founder\tMill\tAda\t7\nfounder\tPark\tBob\t2\n")
    assert make(folder, "--control", "0") == 0
    facts, _, counts, _ = made(folder)
    assert facts["exposures"].tolist() == [30, 0, 7, 2]
    assert sum(n for text, n in counts.items() if "France" in text) == 30
    assert counts["Mill was founded by Ada."] == 7
    assert sum(counts.values()) == 39


@pytest.mark.parametrize("tokenizer, subjects, percent", [
    ("words", ["Old Mill", "Old", "Mill", "New Mill"], 25),
    ("words", ["ab", "ba"], 100), ("bytes", ["ab", "ba"], 0)])
def test_how_many_subjects_have_a_token_of_their_own(folder, capsys, tokenizer, subjects, percent):
    rows = [f"capital\t{subject}\tParis\n" for subject in subjects]
    (folder / "f.tsv").write_text("relation\tsubject\tanswer\n" + "".join(rows), "utf-8")
    assert make(folder, "--control", "0", "--tokenizer", tokenizer) == 0
    said = f"\n{percent}% of the subjects have a token that no other subject has"
    assert said in capsys.readouterr().out
    assert data_folder.read_meta(folder / "data")["subjects_with_own_token"] == percent / 100


def test_the_long_tail_begins_after_the_control(folder):
    """However many facts are kept out of the text, the first of the others has rank 0."""
    rows = [f"capital\tCountry{i}\tParis\n" for i in range(40)]
    (folder / "f.tsv").write_text("relation\tsubject\tanswer\n" + "".join(rows), "utf-8")
    assert make(folder, "--control", "0.5", "--documents", "4000", "--zipf-shift", "1",
                "--zipf-power", "2") == 0
    facts, *_ = made(folder)
    p = np.arange(1, 21) ** -2.0  # (20,)
    p /= p.sum()
    found = np.sort(facts["exposures"])[::-1] / 4000  # (40,)
    assert found[:5] == pytest.approx(p[:5], abs=0.03)  # 4 standard deviations of the largest
    assert not found[20:].any()


def test_the_control_is_never_in_the_text(folder):
    rows = "".join(f"founder\tHouse{i}\tAda{i % 5}\n" for i in range(200))
    (folder / "f.tsv").write_text("relation\tsubject\tanswer\n" + rows)
    assert make(folder, "--control", "0.1") == 0
    facts, _, *counts = made(folder)
    assert facts["control"].sum() == 20
    never = {str(subject) for subject in facts["subject"][facts["control"]]}
    for text in counts[0] | counts[1]:
        assert text.split()[0] not in never
    assert (facts["exposures"][facts["control"]] == 0).all()
    meta = data_folder.read_meta(folder / "data")
    assert meta["answers"] == pytest.approx(5)
    # The long tail: the text is not even, and every fact has its chance.
    rest = facts["exposures"][~facts["control"]]
    assert rest.sum() == 16 * 200
    assert rest.max() > 3 * np.median(rest)


def test_as_spreadsheets_write_it(folder):
    assert make(folder) == 0
    plain, _, plain_counts, _ = made(folder)
    odd = FACTS.replace("\n", "\r\n").replace("Old Mill", '"Old  Mill"')
    odd = odd.replace("capital\tPeru", "\r\n\t\t\r\ncapital\tPeru").replace("subject", " Subject")
    (folder / "f.tsv").write_bytes(b"\xef\xbb\xbf" + odd.encode())
    assert make(folder, "--force") == 0
    facts, _, counts, _ = made(folder)
    assert counts == plain_counts
    for name, array in plain.items():
        assert (facts[name] == array).all(), name


def test_a_folder_is_kept_until_the_tables_change(folder, capsys):
    assert make(folder) == 0
    assert make(folder) == 0
    assert "is finished, with these settings" in capsys.readouterr().out
    (folder / "f.tsv").write_text(FACTS + "capital\tChad\tNdjamena\n")
    assert make(folder) == 1
    assert "choose another --out" in capsys.readouterr().err


MANY = ("relation\tsubject\tanswer\nP\tAl Bo\tCel Dee\nP\tEm, Fo\t1,5\n"
        "P\tBo\tsaid \"Hi\"\nP\tLong\tone\n")
WAYS = {  # how spreadsheets write these four facts
    "UTF-16, little end first": MANY.encode("utf-16"),
    "UTF-16, big end first": b"\xfe\xff" + MANY.encode("utf-16-be"),
    "commas": b"""\xef\xbb\xbfrelation, Subject ,answer\r\nP,Al Bo,"Cel Dee"\r\n"""
              b"""P,"Em, Fo","1,5"\r\nP, "Bo","said ""Hi""\"\r\nP,Long,one\r\n""",
    "semicolons": b"""relation;subject;answer;notes, old\nP;Al Bo;Cel Dee;\nP;Em, Fo;1,5\n"""
                  b"""P;Bo;said "Hi"\nP;Long;one;x\n""",
    "Mac, two lines in a cell": MANY.replace("Al Bo", '"Al\nBo"').replace("\n", "\r").encode(),
    "other columns": MANY.replace("r\n", "r\tnotes\tsource\tcountry\tcomment\n", 1).encode(),
    "empty cells": MANY.replace("\n", "\t\t\n").encode() + b"\t\t\t\n\n",
    "more cells than the header": MANY.replace("Dee", "Dee\t\t ").encode(),
    "odd spaces": MANY.replace("Al Bo", "\u00a0Al\u00a0 Bo ").encode(),
    "numbers of the rows": MANY.replace("P", "7\tP").replace("relation", "\trelation").encode(),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_format_of_a_spreadsheet(tmp_path, way):
    path = tmp_path / "f.csv"
    path.write_bytes(WAYS[way])
    wrong = []
    facts = own_facts.read_facts_table(path, {"P": []}, wrong)
    assert wrong == []
    assert [fact[1:3] for fact in facts] == [("Al Bo", "Cel Dee"), ("Em, Fo", "1,5"),
                                             ("Bo", 'said "Hi"'), ("Long", "one")]


@pytest.mark.parametrize("count, number", [
    ("12.0", 12), ("12.", 12), ("007", 7), ("0.00", 0), ("1.5", None), ("1e3", None), ("-1", None),
    ("1,000", None), ("nan", None), ("1_0", None), ("\u0663", None), ("9" * 10, None)])
def test_counts_are_whole_numbers(tmp_path, count, number):
    path = tmp_path / "f.tsv"
    path.write_text(f"relation\tsubject\tanswer\tcount\nP\ta\tb\t{count}\n", "utf-8")
    wrong = []
    facts = own_facts.read_facts_table(path, {"P": []}, wrong)
    assert [fact.count for fact in facts] == [number] * (number is not None)
    assert len(wrong) == (number is None)
    assert not wrong or f"f.tsv:2: the count {count!r} is not a whole number from 0 to" in wrong[0]


def test_a_pattern_that_stands_there_twice_is_one(tmp_path):
    """Else the second one would be held out, and stand in the text."""
    (tmp_path / "p.csv").write_text("relation,pattern\n" + "P,{subject} is {answer}\n" * 2)
    assert own_facts.read_patterns(tmp_path / "p.csv", []) == {"P": ["{subject} is {answer}"]}


@pytest.mark.parametrize("name", ["Old  Mill", " Old Mill\n", "Old\u00a0Mill"])
def test_names_are_asked_as_they_are_stored(name):
    assert recall.numbers_about(name, {"subject": np.array(["Peru", "Old Mill"])}) == [1]


@pytest.mark.parametrize("table, line, said", [
    ("f", "capital\tSpain", "f.tsv:6: it has no answer"),
    ("f", "size\tSpain\tbig", "f.tsv:6: there is no pattern for the relation 'size'"),
    ("f", "capital\tPeru\tCusco", "f.tsv:6: capital of 'Peru' is 'Cusco', and in"),
    ("f", 'capital\t"Spain\tMadrid', "f.tsv:6: a quote that is opened here does not end"),
    ("f", 'song\tX\t"Heroes" by Y', "f.tsv:6: a quote that is opened here does not end"),
    ("f", 'capital\tSpain\t"Madrid\ncapital\tscreen\t12"', "f.tsv:6: a quote that is opened here"),
    ("f", "capital\tMarsh\tCel\tville", "f.tsv:6: 'ville' stands beyond the 3 columns"),
    ("p", "size\tThe size is {answer}.", "p.tsv:6: 'The size is {answer}.' must have {subject}"),
    ("p", "size\t{subject} is {answer} big", "must end with a space and {answer}; a full stop"),
    ("p", "size\t{subject} is:{answer}", "must end with a space and {answer}; a full stop"),
    ("p", "size", "p.tsv:6: it has no pattern"),
])
def test_wrong_rows_are_named(folder, capsys, table, line, said):
    path = folder / f"{table}.tsv"
    path.write_text(path.read_text() + line + "\n")
    assert make(folder) == 1
    *rows, last = capsys.readouterr().err.splitlines()
    assert len(rows) == 1 and said in rows[0]
    assert last == "prepare_data.py: 1 wrong row, which stands above: fix it"
    assert not (folder / "data").exists()


def test_ten_wrong_rows_are_named_and_all_are_counted(folder, capsys):
    path = folder / "f.tsv"
    path.write_text(FACTS + "capital\tX\n" * 25)
    assert make(folder) == 1
    *rows, last = capsys.readouterr().err.splitlines()
    assert len(rows) == 10
    assert "25 wrong rows, of which the first ones stand above: fix them" in last


@pytest.mark.parametrize("content, said", [
    (b"", "f.tsv:1 has no column relation and no column subject and no column answer"),
    (b"subject\tanswer\nFrance\tParis\n", "f.tsv:1 has no column relation"),
    (b"relation\tsubject\tanswer\n", "f.tsv has no row below its header"),
    ("relation\tsubject\tanswer\ncapital\tPer\xfa\tLima\n".encode("latin-1"), "is not UTF-8"),
    (b"relation\tsubject\tanswer\tca\xf1on\n", 'Save As, "CSV UTF-8" or "Unicode Text"'),
    ("relation\tsubject\tanswer\n".encode("utf-16")[:-1], "is not UTF-16"),
    ("relation\tsubject\tanswer\n".encode("utf-16-le"), "is not UTF-8"),
    (b'"relation\tsubject\tanswer\ncapital\tPeru\tLima\n', "f.tsv:1 has no column relation"),
    (b"relation,subject,answer,Answer\n", "f.tsv:1 has two columns answer: remove one"),
    (b"relation,subject,answer,notes,notes\n", "f.tsv:1 has two columns notes"),
    (b"relation,subject,answer,counts\n", "f.tsv:1 has no column count, but counts: call it count"),
    (b"relation,subjects,answer\n", "f.tsv:1 has no column subject, but subjects: call it"),
    (b"relation\tsubject\tanswer\t\ncapital\tMarsh\tCel\tville\n",
     "f.tsv:2: 'ville' stands beyond"),
    (b"relation,subject,answer\ncapital,Peru,Lima\ncapital,Peru,Cusco\n",
     "it is 'Lima': keep one answer, or make two relations"),
    (b"relation\tsubject\tanswer\tcount\ncapital\tPeru\tLima\tmany\n", "f.tsv:2: the count 'many'"),
])
def test_broken_tables(folder, capsys, content, said):
    (folder / "f.tsv").write_bytes(content)
    assert make(folder) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("flags, said", [
    (["--control", "3"], "--control 3.0 is above 0.9: lower it"),
    (["--documents", "-1"], "--documents -1 is not at least 0"),
    (["--people", "9"], "--people is not for facts --from-file"),
    (["--longest", "4"], "--longest 4 leaves no facts: raise it"),
    (["--tokenizer", "bytes", "--longest", "27"], "sentences of more than 27 tokens are left out"),
])
def test_flags_that_cannot_be(folder, capsys, flags, said):
    status = make(folder, *flags)
    shown = capsys.readouterr()
    assert said in (shown.err or shown.out)
    assert (status == 1) == bool(shown.err)


def test_a_quote_without_end_in_a_large_table(folder, capsys):
    rows = "".join(f"capital\tTown{i}\tParis\n" for i in range(20_000))
    (folder / "f.tsv").write_text(FACTS + 'capital\t"Oslo\tNorway\n' + rows)
    assert make(folder) == 1
    assert "f.tsv:6: a quote that is opened here does not end" in capsys.readouterr().err


def test_a_quote_without_end_between_commas(folder, capsys):
    """The rows that it swallows are no answer."""
    (folder / "f.tsv").write_text('relation,subject,answer,count\ncapital,France,Paris,3\n'
                                  'capital,Peru,"Lima,4\ncapital,Cuba,Habana",5\n'
                                  'capital,Spain,Madrid,2\n')
    assert make(folder) == 1
    assert "f.tsv:3: a quote that is opened here does not end" in capsys.readouterr().err


def test_counts_that_differ(folder, capsys):
    (folder / "f.tsv").write_text("relation\tsubject\tanswer\tcount\n"
                                  "capital\tPeru\tLima\t3\ncapital\tPeru\tLima\t4\n")
    assert make(folder) == 1
    assert "f.tsv:3: this fact stands in" in capsys.readouterr().err


@pytest.mark.parametrize("flags, said", [
    ("--control 0.5", "--control 0.5: give a whole number of people"),
    ("--names single --people 90000", "--names single: 90200 people need as many tokens"),
])
def test_flags_of_invented_facts(tmp_path, capsys, flags, said):
    assert prepare_data.main(["facts", "--out", str(tmp_path / "x"), *flags.split()]) == 1
    assert said in capsys.readouterr().err


def test_one_file_is_not_enough(folder, capsys):
    path = str(folder / "f.tsv")
    assert prepare_data.main(["facts", "--from-file", path]) == 1
    assert "takes two files, not 1" in capsys.readouterr().err
    assert prepare_data.main(["facts", "--from-file", path, str(folder / "no.tsv")]) == 1
    assert "no.tsv is no file" in capsys.readouterr().err


def test_a_sentence_that_is_too_long_is_left_out(folder, capsys):
    assert make(folder, "--tokenizer", "bytes", "--longest", "30", "--control", "0") == 0
    assert "and 1 fact that had no others" in capsys.readouterr().out
    facts, _, counts, _ = made(folder)
    assert facts["subject"].tolist() == ["France", "Japan", "Peru"]
    assert max(len(text) for text in counts) <= 30
    # People of France meet in Paris. has 31 bytes.
    assert facts["has_unseen"].tolist() == [False, True, True]


def test_a_run_learns_and_answers(folder, capsys, few_reads):
    """From the tables to the answer, with facts that have no control and no unseen phrasing."""
    header, capital, _, _, founder = PATTERNS.splitlines()
    (folder / "p.tsv").write_text("\n".join((header, capital, founder)))
    assert make(folder, "--control", "0") == 0
    out = folder / "run"
    small = ("--max-steps 25 --warmup-steps 2 --batch-size 16 --n-layer 2 --n-embd 16 --n-head 2 "
             "--mem-layers 1 --mem-n-keys 8 --mem-topk 4 --mem-heads 1 --learning-rate 2e-2 "
             "--eval-windows 64 --device cpu").split()
    assert train.main(["--data", str(folder / "data"), "--out-dir", str(out), *small]) == 0
    printed = capsys.readouterr().out
    assert "recall_unseen" not in printed and "(control)" not in printed
    assert sample.main([str(out), "--recall", "Old Mill", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "Ada Byron Ltd." in shown and "of 1 right" in shown
    assert sample.main([str(out), "--recall", "Franc", "--device", "cpu"]) == 1
    assert "try France" in capsys.readouterr().err


def test_names_that_stand_apart(tmp_path):
    """The same people and facts, but no three tokens in a row show both parts of a name."""
    folders = [str(tmp_path / "near"), str(tmp_path / "apart")]
    small = "--people 30 --control 5 --documents 500 --val-documents 20".split()
    assert prepare_data.main(["facts", "--out", folders[0], *small]) == 0
    assert prepare_data.main(["facts", "--out", folders[1], *small, "--names", "apart"]) == 0
    texts = []
    for folder in folders:
        tok = prepare_data.load_tokenizer(folder)
        with np.load(tmp_path / folder / "recall.npz") as facts:
            texts.append([text_of(tok, row) for row in facts["seen"]])
            names = facts["subject"]
        if folder == folders[1]:
            assert [text.replace(" of house ", " ") for text in texts[1]] == texts[0]
            for name in names:
                first, _, _, last = name.split()
                tokens = tok.encode(name)
                place = {tok.decode([i]).strip(): n for n, i in enumerate(tokens)}
                assert place[last] - place[first] >= 3


def test_names_of_one_word(tmp_path):
    """Everybody has a token that nobody else has, however many people there are."""
    out = tmp_path / "single"
    small = "--people 9000 --control 100 --documents 50 --val-documents 20 --relations 1".split()
    assert prepare_data.main(["facts", "--out", str(out), *small, "--names", "single"]) == 0
    facts = recall.read_facts(out)
    assert len(set(facts["subject"].tolist())) == 9100
    tok = prepare_data.load_tokenizer(out)
    assert all(len(tok.encode(name)) == 1 for name in facts["subject"])


def test_an_unknown_kind_of_names(tmp_path, capsys):
    assert prepare_data.main(["facts", "--out", str(tmp_path), "--names", "odd"]) == 1
    assert "--names odd: choose shared or apart or single" in capsys.readouterr().err


@pytest.mark.skipif(not REAL.exists(), reason="no sample data here")
def test_real_facts(tmp_path):
    """All rows can be used. The corpus is made of every fifth one."""
    facts, patterns = own_facts.read_own_facts(REAL / "facts.tsv", REAL / "patterns.tsv")
    assert len(facts) > 11_000
    assert all(len(known) > 1 for known in patterns.values())
    header, *rows = (REAL / "facts.tsv").read_text("utf-8").splitlines()
    few = tmp_path / "facts.tsv"
    few.write_text("\n".join([header, *rows[::5]]), "utf-8")
    out = tmp_path / "real"
    tables = [str(few), str(REAL / "patterns.tsv")]
    assert prepare_data.main(["facts", "--from-file", *tables, "--out", str(out)]) == 0
    facts = recall.read_facts(out)
    meta = data_folder.read_meta(out)
    assert len(facts["subject"]) > 2_200
    assert facts["has_unseen"].all()
    assert facts["control"].mean() == pytest.approx(0.025, abs=0.001)
    assert 1 < math.log2(meta["answers"]) < 12
    tok = prepare_data.load_tokenizer(out)
    for question, answer in asked(facts, tok, "seen"):
        assert question and answer
