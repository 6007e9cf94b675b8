"""prepare_data.py writes what it promises, whatever the disk and the user do.

The parts, from top to bottom: tokenizers, facts, text, everything that can go wrong. Downloads are
in test_download.py.
"""
import contextlib
import functools
import gzip
import hashlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import prepare_data as pd
import support.text
from support import data_folder, invented

# Real text and the gpt2 vocabulary. They are not part of the repository, and tests that need them
# are skipped without them.
SAMPLES = Path(__file__).parents[2] / "shared" / "data"
OWT = SAMPLES / "openwebtext/openwebtext_1000docs.txt"
with_samples = pytest.mark.skipif(not OWT.exists(), reason="no sample data here")
GPT2 = pytest.param("gpt2", marks=with_samples)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, empty_folder):
    """With the gpt2 vocabulary, where it is."""
    if SAMPLES.exists():
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SAMPLES / "tiktoken_cache"))


def run(line, **env):
    """Run a command line in a process of its own."""
    command = [sys.executable, str(ROOT / "prepare_data.py"), *line.split()]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)


def main(line):
    """Run a command line that must succeed."""
    assert pd.main(line.split()) == 0


def complaint(line):
    """Run a command line that must fail, with one line on stderr. Returns that line."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        try:
            status = pd.main(line.split())
        except SystemExit as wrong_flag:
            status = wrong_flag.code
    assert status in (1, 2)
    assert re.fullmatch("prepare_data.py: .+\n", stderr.getvalue()), stderr.getvalue()
    return stderr.getvalue().strip()


def tokens(folder, split):
    return np.fromfile(Path(folder) / f"{split}.bin", "<u2")


def texts(folder, split):
    """The documents of a .bin file, decoded."""
    tok = pd.load_tokenizer(folder)
    ids = tokens(folder, split)
    after_eot = np.flatnonzero(ids == tok.eot) + 1
    *documents, rest = np.split(ids, after_eot)
    assert len(rest) == 0  # the file ends with eot
    return [tok.decode(document[:-1].tolist()) for document in documents]


def read_meta(folder):
    return json.loads((Path(folder) / "meta.json").read_text("utf-8"))


def contents(folder):
    """{name: bytes}, without the lock, an empty file that stays."""
    paths = [path for path in Path(folder).iterdir() if path.name != ".lock"]
    return {path.name: path.read_bytes() for path in paths}


# ---- tokenizers

NASTY = ("Ada wrote <|endoftext|>, “naïve” — 3.5 €!\n\n  def f(x):\treturn x\n"
         "你好，世界。हिन्दी\u2028ok 👩‍🚀")


@pytest.mark.parametrize("name", ["bytes", "words", GPT2])
def test_tokenizers_lose_nothing(name):
    words = [" Ada", " wrote", "\n\n"] if name == "words" else ()
    tok = pd.make_tokenizer(name, words)
    ids = tok.encode(NASTY)
    assert tok.decode(ids) == NASTY
    assert max(ids) < tok.eot == tok.vocab_size - 1  # the text <|endoftext|> is not eot
    assert tok.encode("") == []

    # A saved tokenizer is the same tokenizer.
    Path("d").mkdir()
    for split in ("train", "val"):
        Path(f"d/{split}.bin").write_bytes(b"")
    data_folder.write_meta(Path("d"), tok, {"train": 0, "val": 0})
    again = pd.load_tokenizer("d")
    assert again.encode(NASTY) == ids
    assert (again.eot, again.vocab_size, again.name) == (tok.eot, tok.vocab_size, name)


@pytest.mark.parametrize("name", ["bytes", "words", GPT2])
def test_encode_to_numpy_is_encode(name):
    tok = pd.make_tokenizer(name, [" Ada"] if name == "words" else ())
    for text in NASTY, "Ada", " " * support.text.PIECE, "":
        ids = tok.encode_to_numpy(text)
        assert ids.dtype == np.dtype("<u2")
        assert ids.tolist() == tok.encode(text)


@with_samples
def test_gpt2_is_tiktokens():
    import tiktoken
    tok = pd.make_tokenizer("gpt2")
    theirs = tiktoken.get_encoding("gpt2")
    assert tok.eot == theirs.eot_token
    assert tok.tokens == [theirs.decode_single_token_bytes(i) for i in range(tok.eot)]
    text = NASTY + OWT.read_text("utf-8")[:500_000]
    assert tok.encode(text) == theirs.encode_ordinary(text)


def test_words():
    tok = pd.make_tokenizer("words", [" Ada"])
    assert tok.encode("Ada") == tok.encode(" Ada") == [256]  # the first word has its space, too
    assert tok.encode("Ada, Ada") == [256, ord(","), 256]


def test_frequent_words():
    too_long = "x" * 64  # with the space before it, 65 bytes
    found = [[("train", "b a a c b a", True)],
             [("train", "c d " + too_long, True), ("val", "d d d d", True)]]
    assert pd.frequent_words(found, 257 + 2) == [" a", " b"]
    assert pd.frequent_words(found, 999) == [" a", " b", " c", " d"]  # ties: by the alphabet

    # Python's regex engine cuts as tiktoken's does, so each word that it finds is one token.
    words = pd.frequent_words([[("train", NASTY, True)]], 8192)
    assert {"हिन्दी", "世界", " “", " 3", " wrote"} <= set(words)
    tok = pd.make_tokenizer("words", words)
    for i, word in enumerate(words):
        assert tok.tiktoken.encode_ordinary(word) == [256 + i]


# ---- facts

SMALL = ("--people 60 --control 20 --relations 8 --answers 100 --documents 8000 "
         "--val-documents 500")


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """A small corpus of facts: what prepare_data.py wrote, read back."""
    out = tmp_path_factory.mktemp("facts") / "small"
    main(f"facts --out {out} {SMALL}")
    meta = read_meta(out)
    return types.SimpleNamespace(
        out=out, meta=meta, window=meta["window"], tok=pd.load_tokenizer(out),
        recall=dict(np.load(out / "recall.npz")),
        train=tokens(out, "train"), val=tokens(out, "val"))


def phrasing_patterns():
    """A list of (relation, phrasing, compiled pattern with a group for the name and the answer)."""
    patterns = []
    for relation, (_, *phrasings) in enumerate(invented.RELATIONS):
        for phrasing, template in enumerate(phrasings):
            pattern = re.escape(template).replace(r"\{\}", "(.+)")
            patterns.append((relation, phrasing, re.compile(pattern)))
    return patterns


PATTERNS = phrasing_patterns()


def parsed(tok, window):
    """Read a window with nothing but the templates. Returns (name, relation, phrasing, answer)."""
    return parsed_text(tok.decode([int(token) for token in window if token != tok.eot]))


@functools.cache
def parsed_text(text):
    readings = []
    for relation, phrasing, pattern in PATTERNS:
        match = pattern.fullmatch(text)
        if not match:
            continue
        name, answer = match.groups()
        answers = invented.RELATIONS[relation][0]
        if answer in answers and len(name.split()) == 2:
            readings.append((name, relation, phrasing, answer))
    (reading,) = readings  # there is one, and only one
    return reading


def test_relations():
    pools = [invented.FIRST_NAMES, invented.LAST_NAMES]
    pools += [answers for answers, *_ in invented.RELATIONS]
    assert len(invented.RELATIONS) == 8
    assert all(len(pool) >= 100 for pool in pools)
    words = [word for pool in pools for word in pool]
    assert len(set(words)) == len(words)  # no word has two meanings
    assert all(re.fullmatch("[A-Za-z]+", word) for word in words)
    for _, *phrasings in invented.RELATIONS:
        assert len(set(phrasings)) == 5
        *trained, held_out = [set(phrasing.rstrip(".").split()) for phrasing in phrasings]
        assert held_out <= set.union(*trained)  # all its words are in the training text
        for phrasing in phrasings:
            assert phrasing.endswith("{}.")
            # eot, the second name and the full stop make three more tokens
            assert len(phrasing.split()) + 3 <= 10


def test_facts_layout(facts):
    meta = facts.meta
    eot = facts.tok.eot
    assert facts.window <= 10
    assert (meta["people"], meta["control_people"]) == (60, 20)
    assert (meta["relations"], meta["answers"]) == (8, 100)
    assert (meta["dtype"], meta["tokenizer"]) == ("uint16", "words")
    assert (meta["vocab_size"], meta["eot"]) == (facts.tok.vocab_size, eot)
    for split, ids, count in ("train", facts.train, 8000), ("val", facts.val, 500):
        assert meta["documents"][split] == count
        assert meta["tokens"][split] == len(ids) == count * facts.window + 1
        assert meta["sha256"][f"{split}.bin"] == hashlib.sha256(ids.tobytes()).hexdigest()
        assert ids[-1] == eot
        # Each window: eot, a sentence with one full stop at its end, and then only eot.
        windows = ids[:-1].reshape(count, facts.window)
        is_eot = windows == eot
        is_stop = windows == ord(".")
        assert is_eot[:, 0].all()
        assert (is_stop.sum(1) == 1).all()
        assert (is_stop.argmax(1) == facts.window - is_eot.sum(1)).all()
        assert not is_eot[:, -1].all()  # no window is wider than the longest sentence needs
    names = {"train.bin", "val.bin", "tokenizer.tiktoken", "meta.json", "recall.npz"}
    assert set(contents(facts.out)) == names


def check_recall_file(facts):
    """Check recall.npz. Returns what is true: {(name, relation): (fact, answer)}."""
    recall = facts.recall
    F = 80 * 8
    assert recall["seen"].shape == recall["unseen"].shape == (F, facts.window)
    assert recall["seen"].dtype == np.uint16
    assert recall["control"].sum() == 20 * 8
    assert recall["exposures"].sum() == 8000
    truth = {}
    for fact in range(F):
        name, relation, phrasing, answer = parsed(facts.tok, recall["seen"][fact])
        assert phrasing == 0
        assert relation == fact % 8
        assert parsed(facts.tok, recall["unseen"][fact]) == (name, relation, 4, answer)
        for key in "seen", "unseen":
            begin, end = recall[f"{key}_span"][fact]
            assert facts.tok.decode(recall[key][fact, begin:end].tolist()) == answer
            assert recall[key][fact, end] == ord(".")
        truth[name, relation] = fact, answer
    assert len(truth) == F
    assert len({name for name, _ in truth}) == 80
    return truth


def count_facts(facts, ids, truth):
    """Read all windows of a .bin file. Returns exposures (F,) and {(relation, phrasing)}."""
    exposures = np.zeros(80 * 8, int)
    phrasings = set()
    for window in ids[:-1].reshape(-1, facts.window):
        name, relation, phrasing, answer = parsed(facts.tok, window)
        fact, true_answer = truth[name, relation]
        assert answer == true_answer
        assert phrasing != 4  # the held-out one
        assert not facts.recall["control"][fact]
        exposures[fact] += 1
        phrasings.add((relation, phrasing))
    return exposures, phrasings


@pytest.mark.slow
def test_facts_recounted(facts):
    truth = check_recall_file(facts)
    count_facts(facts, facts.val, truth)
    exposures, phrasings = count_facts(facts, facts.train, truth)
    assert (exposures == facts.recall["exposures"]).all()
    assert len(phrasings) == 8 * 4
    # People are drawn with probability ~ 1 / (rank + shift): within five standard deviations.
    weights = 1 / (np.arange(60) + 20)
    expected = 8000 * weights / weights.sum()
    by_person = exposures.reshape(80, 8).sum(1)[:60]
    assert (abs(by_person - expected) < 5 * np.sqrt(expected)).all()


def test_facts_are_the_same_every_time(facts):
    main(f"facts --out small {SMALL}")
    assert contents("small") == contents(facts.out)
    main(f"facts --out other {SMALL} --seed 1")
    assert not np.array_equal(tokens("other", "train"), facts.train)


@pytest.mark.parametrize("name", ["bytes", GPT2])
def test_facts_with_other_tokenizers(name, facts):
    """The tokenizer changes nothing about who is who and what is true."""
    pd.make_facts("f", people=60, control=20, relations=8, answers=100, documents=50,
                  val_documents=5, tokenizer=name)
    recall = dict(np.load("f/recall.npz"))
    tok = pd.load_tokenizer("f")
    for fact in range(0, 640, 7):
        for key in "seen", "unseen":
            expected = parsed(facts.tok, facts.recall[key][fact])
            assert parsed(tok, recall[key][fact]) == expected
            begin, end = recall[f"{key}_span"][fact]
            answer = expected[3]
            assert tok.decode(recall[key][fact, begin:end].tolist()) == " " + answer


# ---- text

def random_text(draw, separator):
    pieces = ["ab", "b", " ", "\n", "-", "<|", separator, "x" * 50]
    return "".join(draw.choice(pieces) for _ in range(draw.randrange(80)))


def test_documents_do_not_depend_on_how_the_text_is_read(monkeypatch):
    monkeypatch.setattr(support.text, "PIECE", 40)
    draw = random.Random(0)
    for separator in ["<|endoftext|>", "\n\n", "--", "a"] * 60:
        # Cut the text at nine random places, as if it had been read in ten chunks.
        text = random_text(draw, separator)
        cuts = [0, *sorted(draw.randrange(len(text) + 1) for _ in range(9)), len(text)]
        chunks = [text[begin:end] for begin, end in zip(cuts, cuts[1:])]

        got = [""]
        for piece, ends in support.text.documents(chunks, separator):
            assert len(piece) <= support.text.PIECE + len(separator)
            got[-1] += piece
            if ends:
                got.append("")
        assert got.pop() == ""  # the last document has its end
        stripped = [document.strip() for document in text.split(separator)]
        assert got == [document for document in stripped if document]


@pytest.mark.parametrize("name", ["words", GPT2])
def test_a_document_in_pieces_has_the_tokens_of_the_whole(name, monkeypatch):
    parts = ["word", "It's", " ", "  ", "\n", "\n\n", "\t", "...", "42", "é", "\u3000", " \n "]
    text = "".join(random.Random(0).choices(parts, k=20000)).strip()
    tok = pd.make_tokenizer(name, [" word", " 42"] if name == "words" else ())
    monkeypatch.setattr(support.text, "PIECE", 100)
    pieces = [piece for piece, _ in support.text.documents([text], pd.EOT)]
    assert len(pieces) > 100
    ids = [token for piece in pieces for token in tok.encode(piece)]
    assert ids == tok.encode(text)


@pytest.mark.parametrize("name", ["words", "bytes", GPT2])
@pytest.mark.parametrize("unit", ["x", "\u4f60\u597d\uff0c\u4e16\u754c\u3002", "a,b."])
def test_a_document_without_spaces_gets_none(unit, name, monkeypatch):
    """Also where a batch ends within it. The tokens are those of the whole."""
    monkeypatch.setattr(support.text, "PIECE", 100)
    monkeypatch.setattr(support.text, "BATCH", 250)
    one = unit * (1000 // len(unit))
    Path("t.txt").write_text("v<|endoftext|>" + one + "<|endoftext|>Ada", "utf-8")
    main(f"t.txt --tokenizer {name} --workers 2")
    tok = pd.load_tokenizer("data/t")
    assert texts("data/t", "train") == [one, "Ada"]
    if name != "gpt2" or unit != "x":  # gpt2 has tokens of several x
        expected = [*tok.encode(one), tok.eot, *tok.encode("Ada"), tok.eot]
        assert tokens("data/t", "train").tolist() == expected


def test_hidden_files_are_no_texts():
    folder = Path(".my/books")  # the given folder itself may be hidden
    for name in ["1.txt", "more/2.txt", "._1.txt", ".ipynb_checkpoints/1-checkpoint.txt",
                 "more/.git/deep/3.txt", "drafts.txt/notes.md"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\xff\0" if "/._" in f"/{name}" else name.encode())
    main(f"{folder} --tokenizer bytes --val-fraction 0.5")
    assert texts("data/books", "val") + texts("data/books", "train") == ["1.txt", "more/2.txt"]
    for path in ["1.txt", "more/2.txt"]:
        (folder / path).unlink()
    assert "there is no .txt file" in complaint(f"{folder} --tokenizer bytes --force")


def write_stories():
    """s.txt and the packed z.txt.gz, with a byte order mark, line ends and blank documents.

    Returns what should be read: every line end is \\n.
    """
    stories = [f"Story {i}.\n\nÉnd x" + "x" * (i % 7) for i in range(40)]
    text = "\ufeff \n" + "\n<|endoftext|>\n".join([*stories, "", " \n"])
    windows = text.replace("\n", "\r\n").encode()
    Path("s.txt").write_bytes(windows)
    Path("z.txt.gz").write_bytes(gzip.compress(windows))
    return stories


def test_text_by_documents():
    stories = write_stories()
    main("s.txt --tokenizer bytes --val-fraction 0.1")
    assert texts("data/s", "val") == stories[::10]
    assert texts("data/s", "train") == [one for i, one in enumerate(stories) if i % 10]
    meta = read_meta("data/s")
    ids = tokens("data/s", "train")
    assert (meta["name"], meta["eot"]) == ("s", 256)
    assert meta["documents"] == {"train": 36, "val": 4}
    assert meta["tokens"]["train"] == len(ids)
    assert meta["sha256"]["train.bin"] == hashlib.sha256(ids.tobytes()).hexdigest()
    assert ids[-1] == 256

    main("z.txt.gz --tokenizer bytes --val-fraction 0.1")
    assert contents("data/z")["train.bin"] == contents("data/s")["train.bin"]


def test_another_separator():
    write_stories()
    main(r"s.txt --out w --tokenizer words --separator \n\n --vocab-size 300")
    assert texts("w", "val") == ["Story 0."]
    assert texts("w", "train")[0] == "Énd x\n<|endoftext|>\nStory 1."
    assert read_meta("w")["vocab_size"] == 300


@pytest.mark.parametrize("text, train, val", [
    ("one\ntwo\nthree\nfour\n", "one\ntwo\nthree", "four"),
    ("é" * 9, "é" * 4, "é" * 5),
    ("a\nb <|endoftext|>\n<|endoftext|>\n", "a", "b"),
])
def test_text_of_one_document(text, train, val):
    """It is cut after a line if it has several, and somewhere if not."""
    Path("t.txt").write_text(text, "utf-8")
    main("t.txt --tokenizer bytes --val-fraction 0.5")
    assert texts("data/t", "train") == [train]
    assert texts("data/t", "val") == [val]


def test_any_number_of_workers(monkeypatch):
    monkeypatch.setattr(support.text, "BATCH", 5000)  # many batches
    words = ["Ada", " saw", " the", " sea,", "\n<|endoftext|>"]
    Path("t.txt").write_text("".join(random.Random(1).choices(words, k=15000)))
    for workers in 0, 1, 3:
        main(f"t.txt --out {workers}/t --tokenizer words --workers {workers}")
        assert contents(f"{workers}/t") == contents("0/t")


def test_tokenising_takes_bounded_memory():
    taken = []

    def endless_batches():
        while True:
            taken.append(1)
            yield [("train", "a", True)]

    stream = pd.tokenized(endless_batches(), pd.make_tokenizer("bytes"), workers=2)
    assert next(stream)["train"].tolist() == [97, 256]
    assert len(taken) == 5  # 2 * workers are under way, and one more waits for its turn
    stream.close()


def test_a_worker_that_fails_leaves_nothing(monkeypatch):
    Path("t.txt").write_text("one<|endoftext|>two")

    def fails(tok, batch):
        raise OSError("out of threads")

    monkeypatch.setattr(pd, "encode_batch", fails)
    assert "out of threads" in complaint("t.txt --out dead --tokenizer bytes --workers 2")
    assert contents("dead") == {}


@with_samples
def test_openwebtext_is_nanogpts_token_for_token():
    # The text is UTF-8, whatever the locale says.
    no_utf8 = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    made = run(f"{OWT} --out o --workers 2", **no_utf8)
    assert made.returncode == 0
    assert made.stderr == ""

    # nanoGPT's file has the documents in order; of ours, every 100th is in val.bin.
    splits = {}
    for split in "train", "val":
        ids = tokens("o", split)
        after_eot = np.flatnonzero(ids == 50256) + 1
        splits[split] = iter(np.split(ids, after_eot[:-1]))
    merged = []
    for i in range(1000):
        split = "train" if i % 100 else "val"
        merged.append(next(splits[split]))
    assert not list(splits["train"])
    assert not list(splits["val"])
    theirs = OWT.with_name("openwebtext-10k_val_1000docs.gpt2.uint16.bin")
    assert np.array_equal(np.concatenate(merged), np.fromfile(theirs, "<u2"))


# ---- what goes wrong

def test_what_is_finished_stays(capsys):
    line = "facts --out f --people 9 --documents 50"
    main(line)
    before = contents("f")
    times = [path.stat().st_mtime_ns for path in Path("f").iterdir()]

    capsys.readouterr()
    main(line)
    again = capsys.readouterr()
    assert again.out.count("\n") == 1
    assert "f is finished" in again.out
    assert again.err == ""
    said = complaint(f"{line} --seed 2")
    assert "seed 1337, not 2" in said
    assert "--force" in said
    assert contents("f") == before
    assert [path.stat().st_mtime_ns for path in Path("f").iterdir()] == times

    main(f"{line} --seed 2 --force")
    assert read_meta("f")["settings"]["seed"] == 2
    assert contents("f")["train.bin"] != before["train.bin"]


def test_errors_are_value_errors():
    """For other scripts: no SystemExit, and a message without the name of this program."""
    for call in [lambda: pd.make_facts("f", people=0), lambda: data_folder.read_meta("nosuch"),
                 lambda: pd.load_tokenizer("nosuch"), lambda: pd.make_text("nosuch")]:
        with pytest.raises(ValueError) as error:
            call()
        assert not str(error.value).startswith("prepare_data.py")


def test_killed():
    pid = os.fork()
    if pid == 0:
        try:
            pd.main("facts --people 60 --documents 90000000 --out f".split())
        finally:
            os._exit(1)
    deadline = time.monotonic() + 60
    while not Path("f/.unfinished/train.bin").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert sorted(path.name for path in Path("f").iterdir()) == [".lock", ".unfinished"]
    with pytest.raises(ValueError, match="meta.json does not exist"):
        pd.load_tokenizer("f")
    main("facts --people 60 --documents 50 --out f")
    assert not Path("f/.unfinished").exists()
    assert pd.load_tokenizer("f").vocab_size > 257


@pytest.mark.parametrize("workers", [1, 2])
def test_interrupted(workers, monkeypatch):
    Path("t.txt").write_text("one<|endoftext|>two")
    line = f"t.txt --tokenizer bytes --workers {workers}"
    main(line)
    before = contents("data/t")
    whole = pd.batches

    def stops_at_the_end(*args):
        yield from whole(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(pd, "batches", stops_at_the_end)
    assert "stopped" in complaint(f"{line} --force")
    assert contents("data/t") == before
    assert "stopped" in complaint(f"{line} --out new")
    assert contents("new") == {}


def test_disk_full(monkeypatch):
    real = data_folder.unfinished

    @contextlib.contextmanager
    def on_a_full_disk(out):
        with real(out) as folder:
            (folder / "train.bin").symlink_to("/dev/full")
            yield folder
    monkeypatch.setattr(data_folder, "unfinished", on_a_full_disk)
    said = complaint("facts --people 60 --documents 9000 --out o")
    assert "No space left" in said
    assert "--out" in said
    assert contents("o") == {}


# Command lines that must fail, and what the message must contain.
BAD = {
    "facts --people 0": "not at least 1",
    "facts --people 9999999": "--people 9999999 is above",
    "facts --people x": "invalid",
    "facts --people 440000 --control 9999": "lower one of them",
    "facts --answers 101": "100",
    "facts --relations 9": "above 8",
    "facts --zipf-shift nan": "zipf",
    "facts --control -1": "at least 0",
    "facts --documents 0": "at least 1",
    "facts --peple 5": "unrecognized",
    "facts --workers 2": "not for facts",
    "facts --people 9 --out text.txt": "text.txt",
    "nosuch": "no such",
    "empty.txt": "more text",
    "blank.txt": "more text",
    "single.txt": "1 document to train on, 0 to validate on",
    "folder": "no .txt file",
    "latin.txt": "byte 1070003",
    "cut.txt.gz": "damaged",
    "text.txt --people 5": "not for text.txt",
    "text.txt --val-fraction 0": "at least 1e-09",
    "text.txt --val-fraction nan": "at least 1e-09",
    "text.txt --workers -1": "at least 0",
    "text.txt --vocab-size 9": "258",
    "text.txt --tokenizer sp": "invalid choice",
    "text.txt --separator=": "empty",
    "text.txt --small": "not for text.txt",
    "text.txt --out text.txt/o": "Not a directory",
    "tinystories --from-file text.txt text.txt text.txt": "at most two",
    "tinystories --from-file nosuch": "no such file",
}


@pytest.fixture
def bad_files():
    Path("text.txt").write_text("one\ntwo\n<|endoftext|>three")
    Path("empty.txt").touch()
    Path("blank.txt").write_text(" \n<|endoftext|>\n")
    Path("single.txt").write_text("v<|endoftext|>")
    Path("folder").mkdir()
    # The bad byte is in the second million bytes.
    Path("latin.txt").write_bytes("é".encode() * 535_000 + b"abc\xe9 latin")
    packed = gzip.compress(random.Random(0).randbytes(9000).hex().encode())
    Path("cut.txt.gz").write_bytes(packed[:-900])


@pytest.mark.parametrize("line, expected", BAD.items())
def test_bad_inputs(line, expected, bad_files):
    if "facts" not in line and "--tokenizer" not in line:
        line += " --tokenizer bytes"
    assert expected in complaint(line)
    assert not list(Path().glob("**/meta.json"))
    assert not list(Path().glob("**/*.bin"))


def test_a_bad_input_from_outside():
    made = run("nosuch.txt")
    assert made.returncode == 1
    assert made.stdout == ""
    assert re.fullmatch("prepare_data.py: .*no such.*\n", made.stderr)


def test_no_vocabulary_and_no_network_to_get_it(bad_files, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "none")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    said = complaint("text.txt")
    assert "TIKTOKEN_CACHE_DIR" in said
    assert "--tokenizer bytes" in said


def test_a_vocabulary_with_a_wrong_checksum(monkeypatch):
    """As from a portal that answers every request with its own page."""
    import tiktoken.load
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(Path("none").absolute()))
    monkeypatch.setattr(tiktoken.load, "read_file", lambda path: b"<html>log in</html>")
    Path("text.txt").write_text("one<|endoftext|>two")
    assert "--tokenizer bytes" in complaint("text.txt")
