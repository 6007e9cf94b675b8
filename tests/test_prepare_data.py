"""prepare_data.py: what it writes is what was said, whatever the network, the disk and the user do."""
import gzip, hashlib, http.server, io, json, os, random, re, signal, subprocess, sys, tarfile, threading, time, types
from pathlib import Path
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import prepare_data as pd

SAMPLES = Path(__file__).parents[2] / "shared" / "data"
OWT = SAMPLES / "openwebtext/openwebtext_1000docs.txt"
with_samples = pytest.mark.skipif(not OWT.exists(), reason="no sample data here")
GPT2 = pytest.param("gpt2", marks=with_samples)

@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    for name in "HF_ENDPOINT HF_TOKEN http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY".split():
        monkeypatch.delenv(name, raising=False)
    if SAMPLES.exists():
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SAMPLES / "tiktoken_cache"))
    monkeypatch.chdir(tmp_path)

def run(line, **env):
    command = [sys.executable, str(ROOT / "prepare_data.py"), *line.split()]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)

def main(line):
    pd.main(line.split())

def complaint(line):
    """What the program dies of, in one line."""
    with pytest.raises(SystemExit) as error:
        main(line)
    assert re.fullmatch("prepare_data.py: .+", str(error.value.code)), error.value.code
    return error.value.code

def tokens(folder, split):
    return np.fromfile(Path(folder) / f"{split}.bin", "<u2")

def texts(folder, split):
    """The documents of a .bin, decoded."""
    tok, ids = pd.load_tokenizer(folder), tokens(folder, split)
    return [tok.decode(one[:-1].tolist()) for one in np.split(ids, np.flatnonzero(ids == tok.eot) + 1)[:-1]]

def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}

# tokenizers

NASTY = "Ada wrote <|endoftext|>, “naïve” — 3.5 €!\n\n  def f(x):\treturn x\n你好，世界。हिन्दी\u2028ok 👩‍🚀"

@pytest.mark.parametrize("name", ["bytes", "words", GPT2])
def test_tokenizers_lose_nothing(name):
    tok = pd.make_tokenizer(name, [" Ada", " wrote", "\n\n"] if name == "words" else ())
    ids = tok.encode(NASTY)
    assert tok.decode(ids) == NASTY and max(ids) < tok.eot == tok.vocab_size - 1 and tok.encode("") == []
    Path("d").mkdir()
    pd.write_meta(Path("d"), tok, {})
    again = pd.load_tokenizer("d")
    assert again.encode(NASTY) == ids and (again.eot, again.vocab_size, again.name) == (tok.eot, tok.vocab_size, name)

def test_words():
    tok = pd.make_tokenizer("words", [" Ada"])
    assert tok.encode("Ada") == tok.encode(" Ada") == [256] and tok.encode("Ada, Ada") == [256, ord(","), 256]
    found = [[("train", "b a a c b a", True)], [("train", "c d " + "x" * 64, True), ("val", "d d d d", True)]]
    assert pd.frequent_words(found, 259) == [" a", " b"] and pd.frequent_words(found, 999) == [" a", " b", " c", " d"]
    words = pd.frequent_words([[("train", NASTY, True)]], 8192)             # Python cuts as tiktoken does: every word found is one token
    assert {"हिन्दी", "世界", " “", " 3", " wrote"} <= set(words)
    tok = pd.make_tokenizer("words", words)
    assert [tok.tiktoken.encode_ordinary(word) for word in words] == [[256 + i] for i in range(len(words))]

# facts

SMALL = "--people 60 --control 20 --relations 8 --answers 100 --documents 8000 --val-documents 500"

@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    out = tmp_path_factory.mktemp("facts") / "small"
    main(f"facts --out {out} {SMALL}")
    meta, tok = json.loads((out / "meta.json").read_text()), pd.load_tokenizer(out)
    return types.SimpleNamespace(out=out, meta=meta, tok=tok, recall=np.load(out / "recall.npz"), w=meta["window"],
                                 train=tokens(out, "train"), val=tokens(out, "val"))

SAID = [(relation, phrasing, re.compile(re.escape(template).replace(r"\{\}", "(.+)", 1).replace(r"\{\}", "(.+)")))
        for relation, (_, *phrasings) in enumerate(pd.RELATIONS) for phrasing, template in enumerate(phrasings)]

def parsed(tok, window):
    """A window read back with nothing but the templates: (name, relation, phrasing, answer)."""
    text = tok.decode([int(i) for i in window if i != tok.eot])
    (found,) = [(match[1], relation, phrasing, match[2]) for relation, phrasing, template in SAID
                if (match := template.fullmatch(text)) and match[2] in pd.RELATIONS[relation][0] and len(match[1].split()) == 2]
    return found

def test_relations():
    pools = [pd.FIRST_NAMES, pd.LAST_NAMES, *[known for known, *_ in pd.RELATIONS]]
    everything = [word for pool in pools for word in pool]
    assert len(set(everything)) == len(everything) and all(len(pool) >= 100 for pool in pools) and len(pd.RELATIONS) == 8
    assert all(re.fullmatch("[A-Za-z]+", word) for word in everything)
    for _, *phrasings in pd.RELATIONS:
        words = [set(one.rstrip(".").split()) for one in phrasings]
        assert len(set(phrasings)) == 5 and words[4] <= set.union(*words[:4])                        # no word of the fifth is new
        assert all(one.endswith("{}.") and len(one.split()) + 3 <= 10 for one in phrasings)          # + eot, the last name, "."

def test_facts_layout(facts):
    meta, w = facts.meta, facts.w
    assert w <= 10 and (meta["people"], meta["control_people"], meta["relations"], meta["answers"]) == (60, 20, 8, 100)
    assert (meta["dtype"], meta["tokenizer"], meta["vocab_size"], meta["eot"]) == ("uint16", "words", facts.tok.vocab_size, facts.tok.eot)
    for split, ids, count in ("train", facts.train, 8000), ("val", facts.val, 500):
        assert len(ids) == count * w + 1 == meta["tokens"][split] and meta["documents"][split] == count and ids[-1] == facts.tok.eot
        assert hashlib.sha256(ids.tobytes()).hexdigest() == meta["sha256"][f"{split}.bin"]
        windows = ids[:-1].reshape(count, w)
        is_eot, full_stop = windows == facts.tok.eot, windows == ord(".")
        assert is_eot[:, 0].all() and not is_eot[:, -1].all() and (full_stop.sum(1) == 1).all()      # no window wider than needed
        assert (full_stop.argmax(1) == w - is_eot.sum(1)).all()                                      # after the full stop only eot
    assert set(contents(facts.out)) == {"train.bin", "val.bin", "tokenizer.tiktoken", "meta.json", "recall.npz"}

def test_facts_recounted(facts):
    recall, tok, F, truth = facts.recall, facts.tok, 80 * 8, {}
    assert recall["seen"].shape == recall["unseen"].shape == (F, facts.w) and recall["seen"].dtype == np.uint16
    assert recall["control"].sum() == 20 * 8 and recall["exposures"].sum() == 8000
    for f in range(F):
        (name, relation, phrasing, answer), held_out = parsed(tok, recall["seen"][f]), parsed(tok, recall["unseen"][f])
        assert (phrasing, held_out) == (0, (name, relation, 4, answer)) and relation == f % 8
        for key in "seen", "unseen":
            begin, end = recall[f"{key}_span"][f]
            assert tok.decode(recall[key][f, begin:end].tolist()) == answer and recall[key][f, end] == ord(".")
        truth[name, relation] = f, answer
    assert len(truth) == F and len({name for name, _ in truth}) == 80
    counted, phrasings = np.zeros(F, int), set()
    for windows, exposures in (facts.val, np.zeros(F, int)), (facts.train, counted):
        for window in windows[:-1].reshape(-1, facts.w):
            name, relation, phrasing, answer = parsed(tok, window)
            f, true = truth[name, relation]
            assert answer == true and phrasing != 4 and not recall["control"][f]
            exposures[f] += 1
            phrasings.add((relation, phrasing))
    assert (counted == recall["exposures"]).all() and len(phrasings) == 8 * 4
    expected = 8000 / (np.arange(60) + 20) / (1 / (np.arange(60) + 20)).sum()
    assert (abs(counted.reshape(80, 8).sum(1)[:60] - expected) < 5 * np.sqrt(expected)).all()        # drawn by 1 / (rank + shift)

def test_facts_are_the_same_every_time(facts):
    main(f"facts --out small {SMALL}")
    main(f"facts --out other {SMALL} --seed 1")
    assert contents("small") == contents(facts.out) and not np.array_equal(tokens("other", "train"), facts.train)

@pytest.mark.parametrize("name", ["bytes", GPT2])
def test_facts_with_other_tokenizers(name, facts):
    pd.make_facts("f", people=60, control=20, relations=8, answers=100, documents=50, val_documents=5, tokenizer=name)
    recall, tok = np.load("f/recall.npz"), pd.load_tokenizer("f")
    for key, f in [(key, f) for f in range(0, 640, 7) for key in ("seen", "unseen")]:
        (begin, end), expected = recall[f"{key}_span"][f], parsed(facts.tok, facts.recall[key][f])
        assert parsed(tok, recall[key][f]) == expected and tok.decode(recall[key][f, begin:end].tolist()) == " " + expected[3]

# text

def test_documents_do_not_depend_on_how_the_text_is_read(monkeypatch):
    monkeypatch.setattr(pd, "PIECE", 40)
    draw = random.Random(0)
    for separator in ["<|endoftext|>", "\n\n", "--", "a"] * 60:
        text = "".join(draw.choice(["ab", "b", " ", "\n", "-", "<|", separator, "x" * 50]) for _ in range(draw.randrange(80)))
        cuts = sorted(draw.randrange(len(text) + 1) for _ in range(9))
        got = list(pd.documents([text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])], separator))
        assert "".join(piece + "\0" * end for piece, end in got).split("\0") == [*filter(None, map(str.strip, text.split(separator))), ""]
        assert all(len(piece) <= 40 + len(separator) for piece, _ in got)

@pytest.mark.parametrize("name", ["words", GPT2])
def test_a_document_in_pieces_has_the_tokens_of_the_whole(name, monkeypatch):
    parts = ["word", "It's", " ", "  ", "\n", "\n\n", "\t", "...", "42", "é", "\u3000", " \n "]
    text = "".join(random.Random(0).choices(parts, k=20000)).strip()
    tok = pd.make_tokenizer(name, [" word", " 42"] if name == "words" else ())
    monkeypatch.setattr(pd, "PIECE", 100)
    pieces = [piece for piece, _ in pd.documents([text], pd.EOT)]
    assert len(pieces) > 100 and [i for piece in pieces for i in tok.encode(piece)] == tok.encode(text)

def test_text_by_documents():
    stories = [f"Story {i}.\r\n\nÉnd x" + "x" * (i % 7) for i in range(40)]
    Path("s.txt").write_bytes("\ufeff \n".encode() + "\n<|endoftext|>\n".join([*stories, "", " \n"]).encode())
    Path("z.txt.gz").write_bytes(gzip.compress(Path("s.txt").read_bytes()))
    main("s.txt --tokenizer bytes --val-fraction 0.1")
    main("z.txt.gz --tokenizer bytes --val-fraction 0.1")
    assert texts("data/s", "val") == stories[::10] and texts("data/s", "train") == [one for i, one in enumerate(stories) if i % 10]
    meta, ids = json.loads(Path("data/s/meta.json").read_text()), tokens("data/s", "train")
    assert (meta["name"], meta["eot"], meta["documents"], meta["tokens"]["train"]) == ("s", 256, {"train": 36, "val": 4}, len(ids))
    assert meta["sha256"]["train.bin"] == hashlib.sha256(ids.tobytes()).hexdigest() and ids[-1] == 256
    assert contents("data/z")["train.bin"] == contents("data/s")["train.bin"]
    main(r"s.txt --out w --tokenizer words --separator \n\n --vocab-size 300")
    assert texts("w", "val") == ["Story 0."] and texts("w", "train")[0] == "Énd x\n<|endoftext|>\nStory 1."
    assert json.loads(Path("w/meta.json").read_text())["vocab_size"] == 300

@pytest.mark.parametrize("text, train, val", [
    ("one\ntwo\nthree\nfour\n", "one\ntwo\nthree", "four"), ("é" * 9, "é" * 4, "é" * 5), ("a\nb <|endoftext|>\n<|endoftext|>\n", "a", "b")])
def test_text_of_one_document(text, train, val):
    Path("t.txt").write_text(text, "utf-8")
    main("t.txt --tokenizer bytes --val-fraction 0.5")
    assert (texts("data/t", "train"), texts("data/t", "val")) == ([train], [val])

def test_any_number_of_workers(monkeypatch):
    monkeypatch.setattr(pd, "BATCH", 5000)               # many batches
    Path("t.txt").write_text("".join(random.Random(1).choices(["Ada", " saw", " the", " sea,", "\n<|endoftext|>"], k=60000)))
    for workers in 0, 1, 3:
        main(f"t.txt --out {workers}/t --tokenizer words --workers {workers}")
        assert contents(f"{workers}/t") == contents("0/t")
    taken = []
    stream = pd.tokenized((taken.append(1) or [("train", "a", True)] for _ in range(999)), pd.make_tokenizer("bytes"), 2)
    assert next(stream)["train"].tolist() == [97, 256] and len(taken) == 5               # bounded memory: 2 * workers are under way
    stream.close()
    monkeypatch.setattr(pd, "start_worker", os._exit)    # which fails in the worker
    assert "--workers" in complaint("t.txt --out dead --tokenizer bytes --workers 2") and not any(Path("dead").iterdir())

@with_samples
@pytest.mark.parametrize("workers", [1, 2])
def test_openwebtext_is_nanogpts_token_for_token(workers):
    made = run(f"{OWT} --out o --workers {workers}", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")       # text is UTF-8 anyway
    assert made.returncode == 0 and made.stderr == ""
    expected = np.fromfile(OWT.with_name("openwebtext-10k_val_1000docs.gpt2.uint16.bin"), "<u2")
    train, val = (np.split(ids, np.flatnonzero(ids == 50256)[:-1] + 1) for ids in (tokens("o", "train"), tokens("o", "val")))
    merged = [val.pop(0) if i % 100 == 0 else train.pop(0) for i in range(1000)]
    assert not train and not val and np.array_equal(np.concatenate(merged), expected)

def tar(mode, files):
    inside = io.BytesIO()
    with tarfile.open(fileobj=inside, mode=mode) as made:
        for name, body in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            made.addfile(info, io.BytesIO(body))
    return inside.getvalue()

def test_full_openwebtext():
    packs = [{"1.txt": b"one\n\n\n\ntwo ", "2.txt": b"<|endoftext|> three"}, {"3.txt": b"  "}], [{"4.txt": b"four"}, {"5.txt": b"5\n\n5"}]
    for name, contains in zip("ab", packs):
        Path(f"{name}.tar").write_bytes(tar("w", {f"subset/{i}.xz": tar("w:xz", pack) for i, pack in enumerate(contains)}))
    main("openwebtext --full --tokenizer bytes --from-file a.tar b.tar")
    assert texts("data/openwebtext", "val") == ["one\n\ntwo"]
    assert texts("data/openwebtext", "train") == ["<|endoftext|> three", "four", "5\n\n5"]
    Path("b.tar").write_bytes(Path("b.tar").read_bytes()[:700])
    assert "b.tar is damaged" in complaint("openwebtext --full --tokenizer bytes --out o --from-file a.tar b.tar")

# the network: a hub on this machine that answers as its script says

class Handler(http.server.BaseHTTPRequestHandler):
    log_message = lambda *_: None

    def do_GET(self):
        hub, body = self.server, self.server.files[self.path.split("/")[-1]]
        how, *more = hub.script.pop(0) if hub.script else ("well",)
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        hub.log.append((start, self.headers.get("Authorization")))
        if isinstance(how, int):
            self.answer(how, *more)
        elif how == "deaf":                              # knows no Range
            self.answer(200, {}, body)
        elif start >= len(body):
            self.answer(416, {"Content-Range": f"bytes */{len(body)}"})
        else:
            headers = {"Content-Range": f"bytes {start + (how == 'elsewhere')}-{len(body) - 1}/{len(body)}",
                       "Content-Length": len(body) - start + 1000 * (how == "lies")}
            self.answer(206 if start else 200, headers, body[start:start + more[0]] if how == "breaks" else body[start:])

    def answer(self, status, headers={}, body=b""):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

def serve(files):
    hub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.files, hub.script, hub.log, hub.url = files, [], [], f"http://127.0.0.1:{hub.server_port}"
    threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    return hub

@pytest.fixture
def hub(monkeypatch):
    bodies = ["<|endoftext|>".join(f"{kind} {i}" for i in range(3000)).encode() for kind in ("train", "valid")]
    hub = serve(dict(zip(pd.SOURCES["tinystories"], bodies)))
    for name, body in hub.files.items():
        monkeypatch.setitem(pd.HUB, name, (pd.TINY, len(body), hashlib.sha256(body).hexdigest()))
    hub.waits, hub.valid, hub.target = [], bodies[1], Path("data/downloads/TinyStoriesV2-GPT4-valid.txt")
    hub.part = Path(f"{hub.target}.part")
    monkeypatch.setattr(pd.time, "sleep", hub.waits.append)
    monkeypatch.setenv("HF_ENDPOINT", hub.url + "/")
    yield hub
    hub.shutdown(), hub.server_close()

STORY = "tinystories --small --tokenizer bytes"

def test_download_and_use_again(hub):
    main("tinystories --tokenizer bytes")
    assert texts("data/tinystories", "val") == [f"valid {i}" for i in range(3000)] and len(texts("data/tinystories", "train")) == 3000
    main(f"{STORY} --out small")
    assert texts("small", "val") == [f"valid {i}" for i in range(0, 3000, 100)] and len(hub.log) == 2 and not hub.waits

@pytest.mark.parametrize("script, starts, waits", [
    ([("breaks", 1000), ("breaks", 500)], [0, 1000, 1500], [1, 1]),             # goes on where it broke, again and again
    ([("breaks", 1000), ("deaf",)], [0, 1000], [1]),                            # starts over
    ([("breaks", 1000), ("elsewhere",)], [0, 1000, 1000], [1, 2]),              # other bytes than asked for
    ([(429, {"Retry-After": "7"}), (503,), (500, {"Retry-After": "soon"})], [0] * 4, [7, 2, 4]),
    ([(429, {"Retry-After": "86400"})], [0, 0], [300]),
    (9000, [9000], []), (67877, [67877], []), (99999, [99999, 0], [1])])        # some, all, too much of it from an earlier run
def test_download_goes_on(script, starts, waits, hub):
    if isinstance(script, int):
        hub.part.parent.mkdir(parents=True)
        hub.part.write_bytes((hub.valid * 2)[:script])
    else:
        hub.script = script
    main(STORY)
    assert hub.target.read_bytes() == hub.valid and not hub.part.exists()
    assert [start for start, _ in hub.log] == starts and hub.waits == waits

def test_download_gives_up(hub):
    hub.script = [(503,)] * 99
    said = complaint(STORY)
    assert hub.waits == [1, 2, 4, 8, 16] and len(hub.log) == pd.TRIES and f"{hub.url}/{pd.TINY}{hub.target.name}" in said
    assert f"place it at {hub.target}" in said and "--from-file" in said
    hub.script = [(404,)]
    assert "404" in complaint(STORY) and len(hub.log) == pd.TRIES + 1                    # not worth a second try
    hub.shutdown(), hub.server_close()
    assert "refused" in complaint(STORY) and not Path("data/tinystories/meta.json").exists()

def test_download_of_something_else(hub):
    hub.script = [("lies",)]
    said = complaint(STORY)
    assert f"{len(hub.valid)} were expected" in said and "--no-verify" in said and not hub.target.exists()
    hub.files[hub.target.name] = wrong = hub.valid.replace(b"v", b"V")
    for _ in range(2):                                   # the bytes stay, for --no-verify, and are not trusted the second time
        said = complaint(STORY)
        assert hashlib.sha256(wrong).hexdigest() in said and "--no-verify" in said and not hub.target.exists()
    main(f"{STORY} --no-verify")
    assert hub.target.read_bytes() == wrong and [start for start, _ in hub.log] == [0, 0, len(wrong), len(wrong)]
    assert "sha256" in complaint(f"{STORY} --force") and "sha256" in complaint(f"{STORY} --from-file {hub.target} --out copy")

def test_download_of_unknown_size(hub):
    pd.HUB[hub.target.name] = (pd.TINY, 1, None)         # as for the full OpenWebText; the fixture puts it back
    hub.script = [("lies",)]
    main(STORY)                                          # short of what was claimed; then there is no more: all of it was here
    assert hub.target.read_bytes() == hub.valid and [start for start, _ in hub.log] == [0, len(hub.valid)]

def test_the_token_stays_with_the_hub(hub, monkeypatch):
    other = serve(hub.files)
    hub.script, other.script = [(302, {"Location": f"{other.url}/{hub.target.name}"})] * 2, [("breaks", 100)]
    monkeypatch.setenv("HF_TOKEN", "secret\n")
    main(STORY)
    other.shutdown(), other.server_close()
    assert hub.log == [(0, "Bearer secret"), (100, "Bearer secret")] and other.log == [(0, None), (100, None)]
    assert hub.target.read_bytes() == hub.valid

# everything else that goes wrong

def test_what_is_finished_stays():
    line = "facts --out f --people 9 --documents 50"
    main(line)
    before, times = contents("f"), [path.stat().st_mtime_ns for path in Path("f").iterdir()]
    again = run(line)
    assert again.returncode == 0 and again.stdout.count("\n") == 1 and "f is finished" in again.stdout and again.stderr == ""
    said = complaint(f"{line} --seed 2")
    assert "seed 1337, not 2" in said and "--force" in said
    assert before == contents("f") and times == [path.stat().st_mtime_ns for path in Path("f").iterdir()]
    main(f"{line} --seed 2 --force")
    assert json.loads(Path("f/meta.json").read_text())["settings"]["seed"] == 2 and contents("f")["train.bin"] != before["train.bin"]

def test_killed():
    process = subprocess.Popen([sys.executable, str(ROOT / "prepare_data.py"), *"facts --documents 90000000 --out f".split()])
    while not Path("f/unfinished/train.bin").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.name for path in Path("f").iterdir()] == ["unfinished"]
    with pytest.raises(SystemExit, match="no finished meta.json"):
        pd.load_tokenizer("f")
    main("facts --documents 50 --out f")
    assert not Path("f/unfinished").exists() and pd.load_tokenizer("f").vocab_size > 257

@pytest.mark.parametrize("workers", [1, 2])
def test_interrupted(workers, monkeypatch):
    Path("t.txt").write_text("one<|endoftext|>two")
    line = f"t.txt --tokenizer bytes --workers {workers}"
    main(line)
    before, whole = contents("data/t"), pd.batches
    def stops(*args):
        yield from whole(*args)
        raise KeyboardInterrupt
    monkeypatch.setattr(pd, "batches", stops)
    assert "stopped" in complaint(f"{line} --force") and contents("data/t") == before
    assert "stopped" in complaint(f"{line} --out new") and not any(Path("new").iterdir())

def test_disk_full(monkeypatch):
    Path("o/unfinished").mkdir(parents=True)
    Path("o/unfinished/train.bin").symlink_to("/dev/full")
    said = complaint("facts --documents 9000 --out o")
    assert "No space left" in said and "--out" in said and not any(Path("o").iterdir())
    monkeypatch.setattr(pd.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10 ** 10))
    said = complaint("openwebtext --tokenizer bytes --out p")                            # 4.7 GB to download, 25 GB of tokens
    assert "needed" in said and "10.00 free" in said and not Path("p").exists()

BAD = {"facts --people 0": "from 1", "facts --people 9999999": "must be from", "facts --people x": "invalid", "facts --answers 101": "100",
       "facts --relations 9": "1 to 8", "facts --zipf-shift nan": "zipf", "facts --control -1": "from 0", "facts --documents 0": "from 1",
       "facts --peple 5": "unrecognized", "facts --workers 2": "not for facts", "facts --out text.txt": "text.txt", "nosuch": "no such",
       "empty.txt": "more text", "blank.txt": "more text", "folder": "no such file", "latin.txt": "byte 1070003", "cut.txt.gz": "damaged",
       "text.txt --people 5": "not for text.txt", "text.txt --val-fraction 0": "above 0", "text.txt --val-fraction nan": "above 0",
       "text.txt --workers -1": "at least 0", "text.txt --vocab-size 9": "258", "text.txt --tokenizer sp": "invalid choice",
       "text.txt --separator=": "empty", "text.txt --small": "not for text.txt", "text.txt --out text.txt/o": "Not a directory",
       "tinystories --full": "openwebtext", "tinystories --from-file text.txt text.txt text.txt": "at most two",
       "tinystories --from-file nosuch": "no such file", "openwebtext --full --from-file text.tar": "damaged"}

def test_bad_inputs():
    Path("text.txt").write_text("one\ntwo\n<|endoftext|>three")
    Path("latin.txt").write_bytes("é".encode() * 535000 + b"abc\xe9 latin")              # in the second million bytes
    Path("empty.txt").touch(), Path("folder").mkdir()
    Path("text.tar").write_text("no tar"), Path("blank.txt").write_text(" \n<|endoftext|>\n")
    Path("cut.txt.gz").write_bytes(gzip.compress(random.Random(0).randbytes(9000).hex().encode())[:-900])
    for line, expected in BAD.items():
        line = line if "facts" in line or "--tokenizer" in line else f"{line} --tokenizer bytes"
        assert expected in complaint(line), line
        assert not list(Path().glob("**/meta.json")) and not list(Path().glob("**/*.bin")), line
    for line in "facts --peple 5", "nosuch.txt", "latin.txt --tokenizer bytes --workers 2", "text.txt":              # from outside
        made = run(line, TIKTOKEN_CACHE_DIR="none", HTTPS_PROXY="http://127.0.0.1:9")
        assert made.returncode == 1 and re.fullmatch("prepare_data.py: .+\n", made.stderr), made.stderr
    assert "TIKTOKEN_CACHE_DIR" in made.stderr and "--tokenizer bytes" in made.stderr    # the last: no vocabulary to be had
