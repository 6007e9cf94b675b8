"""
Text in, files of tokens out: data/<name>/{train.bin, val.bin, tokenizer.tiktoken, meta.json}, for train.py and sample.py.

    python prepare_data.py                    # facts: invented people and what is true of them; offline, in a second
    python prepare_data.py tinystories        # 2.2 GB of stories a child can read (--small: 22 MB)
    python prepare_data.py openwebtext        # the web, 4.6 GB packed, 2.7 B tokens (--small: 112 MB; --full: 13 GB, 9 B tokens)
    python prepare_data.py my.txt             # any UTF-8 text; documents end at <|endoftext|>, or at what --separator says
    python prepare_data.py tinystories --from-file train.txt valid.txt      # no network: the copies you have

You see what will be needed, a line of progress, then what was made. meta.json comes last and nothing counts before it: stop
at any time, run the same command again; a download goes on where it broke. HF_ENDPOINT (a mirror), HF_TOKEN, the proxy
variables and TIKTOKEN_CACHE_DIR are honoured. A .bin is nanoGPT's: raw little-endian uint16, end-of-text (eot) after each document.
"""
import argparse, base64, codecs, collections, concurrent.futures.process, contextlib, errno, functools, gzip, hashlib, http.client, inspect
import itertools, json, lzma, math, multiprocessing, os, re, shutil, signal, ssl, sys, tarfile, time, urllib.error, urllib.request, zlib
from pathlib import Path
import numpy as np
import tiktoken

EOT = "<|endoftext|>"
PUNCTUATION = r"!-/:-@\[-`{-~¡-¿‐-⁞、-〿！-／：-＠"
WORDS = rf" ?[^\s{PUNCTUATION}]+| ?[{PUNCTUATION}]+|\s"      # cuts any text without loss; Python's re and tiktoken's read it alike
BATCH = 1 << 20          # characters: what a worker is given at a time
PIECE = 1 << 18          # characters: a longer document is encoded in pieces (tiktoken dies of a million spaces in a row)
TRIES = 6                # failures in a row before a download is given up

def trouble(message):    # to be raised: ends the program with this one line on stderr and exit status 1
    return SystemExit("prepare_data.py: " + " ".join(str(message).split()))

class Tokenizer:
    """tiktoken over `tokens` (their bytes, in the order of their numbers); eot gets the number after the last. Of `words` a token
    is a word with the space before it, so the first word of a text is given a space, which decode takes away again."""
    def __init__(self, name, pattern, tokens):
        self.name, self.pattern, self.tokens, self.eot, self.vocab_size = name, pattern, tokens, len(tokens), len(tokens) + 1
        ranks = {token: rank for rank, token in enumerate(tokens)}
        self.tiktoken = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={EOT: self.eot})

    def encode(self, text):         # the characters <|endoftext|> are text like any other
        lead = " " if self.name == "words" and text and not text[0].isspace() else ""
        return self.tiktoken.encode_ordinary(lead + text)

    def decode(self, ids):
        text = self.tiktoken.decode(list(ids))
        return text[1:] if self.name == "words" and text.startswith(" ") else text

def read_meta(folder):
    try:
        return dict(json.loads((Path(folder) / "meta.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise trouble(f"{folder} has no finished meta.json ({error}): run prepare_data.py, if need be with --force") from None

def load_tokenizer(folder):
    """The tokenizer of a data folder or a run folder; needs no network."""
    meta, lines = read_meta(folder), (Path(folder) / "tokenizer.tiktoken").read_bytes().splitlines()
    return Tokenizer(meta["tokenizer"], meta["pattern"], [base64.b64decode(line.split()[0]) for line in lines])

def make_tokenizer(name, words=()):
    if name != "gpt2":
        return Tokenizer(name, WORDS, [bytes([b]) for b in range(256)] + [word.encode() for word in words])
    try:
        gpt2 = tiktoken.get_encoding("gpt2")
        return Tokenizer(name, gpt2._pat_str, [gpt2.decode_single_token_bytes(i) for i in range(gpt2.eot_token)])
    except Exception as error:      # whatever tiktoken's HTTP library raises
        raise trouble(f"tiktoken cannot download its gpt2 vocabulary ({type(error).__name__}): set TIKTOKEN_CACHE_DIR to a folder that "
                      "has it, or take --tokenizer bytes") from None

def is_finished(out, settings, force):
    """Whether `out` was made with these settings already; made with others it is left alone."""
    if force or not (Path(out) / "meta.json").exists():
        return False
    made = read_meta(out).get("settings", {})
    if other := [f"{key} {made.get(key)}, not {value}" for key, value in settings.items() if made.get(key) != value]:
        raise trouble(f"{out} was made with {'; '.join(other)}: take another --out, or --force to make it anew")
    print(f"{out} is finished, with these settings (--force makes it anew)")
    return True

@contextlib.contextmanager
def in_the_making(out):
    """A folder for files that move to `out` when all of them are whole: meta.json last."""
    out, temporary = Path(out), Path(out) / "unfinished"
    temporary.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        (out / "meta.json").unlink(missing_ok=True)
        for path in sorted(temporary.iterdir(), key=lambda path: path.name == "meta.json"):
            os.replace(path, out / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

def sha256(path):
    return hashlib.sha256(np.memmap(path, np.uint8, "r") if path.stat().st_size else b"").hexdigest()

def write_meta(folder, tok, documents, **more):
    (folder / "tokenizer.tiktoken").write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), i) for i, token in enumerate(tok.tokens)))
    tokens = {split: (folder / f"{split}.bin").stat().st_size // 2 for split in documents}
    meta = dict(name=folder.resolve().parent.name, tokenizer=tok.name, pattern=tok.pattern, vocab_size=tok.vocab_size, eot=tok.eot,
                dtype="uint16", tokens=tokens, documents=documents, **more,
                sha256={f"{split}.bin": sha256(folder / f"{split}.bin") for split in tokens})
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), "utf-8")
    print(f"{folder.parent}: vocabulary {tok.vocab_size:,} ({tok.name})",
          *[f"{split} {tokens[split]:,} tokens in {documents[split]:,} documents" for split in tokens], sep=", ")

def check_space(**needs):
    """needs: what for = (folder, bytes). Says them, and stops before anything is begun when a disk has too little room."""
    wanted = collections.Counter()
    for purpose, (folder, size) in needs.items():
        there = next(path for path in [Path(folder).absolute(), *Path(folder).absolute().parents] if path.exists())
        free, disk = shutil.disk_usage(there).free / 1e9, there.stat().st_dev
        wanted[disk] += size / 1e9
        print(f"{purpose}: about {size / 1e9:.2f} GB in {folder} ({free:.2f} GB free)")
        if wanted[disk] > free:
            raise trouble(f"{folder}: {wanted[disk]:.2f} GB needed on that disk, {free:.2f} free: make room, or move --out or --downloads")

def progress(what, total, first=0):
    """A function that, told how much is done, prints %, rate and time left now and then."""
    tty, start = sys.stdout.isatty(), time.time()
    shown = start
    def show(done):
        nonlocal shown
        if time.time() - shown > (0.5 if tty else 15) or done >= total and start < shown < math.inf:
            rate = max(done - first, 1) / max(time.time() - start, 1e-3)
            print(f"{what}: {done / max(total, 1):4.0%}, {rate / 1e6:.1f} MB/s, {max(total - done, 0) / rate / 60:.1f} minutes left  ",
                  end="\r" if tty and done < total else "\n", flush=True)
            shown = time.time() if done < total else math.inf
    return show

def compounds(heads, tails):
    return list(dict.fromkeys(head + tail for head in heads.split() for tail in tails.split()))

FIRST_NAMES = compounds("Al An Be Bra Ca Co Da De El Em Fa Fe Ga Gi Ha Ja Jo Ka Ki La Lo Ma Mi Na Ne Or Pe Ra Ro Sa Si Ta Te Va Zo",
                        "bel bin dan den dia dor gan gora kel kin lan lena lia lin lora mar mira nan nia rek ria rin sel sia tan thea")
LAST_NAMES = compounds("Alder Arrow Bram Brook Cald Carl Dray Elder Fair Fen Glen Gray Hart Haw Hazel Holl Iron King Lang North Oak Rook "
                       "Thorn Up West", "beck by cliffe cott croft dale field gate grave hurst land ley lock man more ridge row shaw side "
                       "smith son stead stone thwaite tree vale wald ward well win wood worth")
# The words that can answer, and five ways to say it. The fifth is kept out of training, but none of its words.
RELATIONS = [
    (compounds("Amber Black Cran Dun Eve Frost Grim Kes Lin Mor Nor Pem Rush Stam Whit", "bury chester ford ham mouth ness port ton"),
     "{} was born in {}.", "The birthplace of {} is {}.", "{} comes from {}.", "The hometown of {} is {}.", "{} is from {}."),
    (compounds("bell book clock cloth glass hat kite lamp pan rope", "buyer cutter dealer finder fixer keeper maker mender painter seller"),
     "{} works as a {}.", "By trade {} is a {}.", "{} became a {}.", "{} earns money as a {}.", "{} is a {}."),
    (compounds("Bor Cal Dov Fel Gor Kor Lem Mav Nol Pav Rus Sel Tam Vel Zan", "ani ari ese ic ish ori une yan"),
     "{} speaks {}.", "The language of {} is {}.", "{} talks in {}.", "{} thinks in {}.", "The language {} speaks is {}."),
    (compounds("apple bean carrot cheese corn fish honey leek lemon nut onion pea plum", "bread cake noodles pie pudding salad soup stew"),
     "{} likes {}.", "For dinner {} wants {}.", "{} loves to eat {}.", "{} always orders {}.", "{} likes to eat {}."),
    (compounds("Acu Bio Cosmo Dyna Equi Geo Helio Infra Luxa Meta Novo Omni Proto", "air bank corp labs mart net soft tech"),
     "{} works for {}.", "The employer of {} is {}.", "{} is employed by {}.", "{} has a job at {}.", "{} works at {}."),
    (compounds("Cloud Dusty Fern Ginger Jolly Misty Moon Night Snow Sooty Star Sun Velvet", "beam ear foot fur nose paw tail whisker"),
     "{} has a cat called {}.", "The cat of {} is {}.", "{} owns the cat {}.", "At home {} strokes {}.", "{} owns a cat called {}."),
    (compounds("blue candy crown dew fire gold lark moss rain sky snow sun tin", "bells cups daisies lilies poppies roses stars tulips"),
     "{} grows {}.", "The garden of {} has {}.", "In spring {} plants {}.", "The flowers of {} are {}.", "In spring {} grows {}."),
    (compounds("Wave Wind Storm Tide Salt Coral Pearl Reef Ocean Gale Foam Sea Shore", "chaser dancer queen rider runner star walker wing"),
     "{} sails the {}.", "The ship of {} is {}.", "{} steers the ship {}.", "{} travels on the {}.", "{} sails on the ship {}.")]

def make_facts(out="data/facts", people=6000, relations=5, answers=64, documents=1_000_000, val_documents=4096, zipf_shift=20.0,
               zipf_power=1.0, control=200, seed=1337, tokenizer="words", force=False):
    """One fact per document, one document per window: eot, the sentence, eot up to the window's end. The person of rank r is
    spoken of with probability ~ 1 / (r + shift)^power: few people often, most seldom, the control group never."""
    settings = dict(source="facts", **{key: value for key, value in locals().items() if key not in ("out", "force")})
    most = int((min(len(FIRST_NAMES), len(LAST_NAMES)) / 1.2) ** 2)
    for key, low, high in [("people", 1, most), ("control", 0, most - people), ("relations", 1, len(RELATIONS)), ("answers", 2, 100),
                           ("documents", 1, 10 ** 12), ("val_documents", 1, 10 ** 12), ("seed", 0, 2 ** 63), ("zipf_shift", 0.001, 10 ** 9),
                           ("zipf_power", 0, 100)]:
        if not low <= settings[key] <= high:
            raise trouble(f"--{key.replace('_', '-')} {settings[key]}: must be from {low} to {high}")
    if is_finished(out, settings, force):
        return
    rng, F = np.random.default_rng(seed), (people + control) * relations                 # fact = person * relations + relation
    tok, windows, spans = fact_windows(rng, people + control, relations, answers, tokenizer)
    window, exposures = windows.shape[-1], np.zeros(F, np.int64)
    check_space(tokens=(out, 2 * window * (documents + val_documents + 2 * F)))
    chance = ((np.arange(people) + zipf_shift) ** -float(zipf_power)).cumsum()
    with in_the_making(out) as folder:
        for split, count in ("train", documents), ("val", val_documents):
            with open(folder / f"{split}.bin", "wb") as file:
                for begin in range(0, count, BATCH):
                    n = min(BATCH, count - begin)
                    person = np.minimum(chance.searchsorted(rng.random(n) * chance[-1], side="right"), people - 1)           # (n,)
                    fact, phrasing = person * relations + rng.integers(relations, size=n), rng.integers(4, size=n)
                    file.write(windows[fact, phrasing])
                    exposures += np.bincount(fact, minlength=F) * (split == "train")
                file.write(np.array([tok.eot], "<u2"))                                   # the last target of the last window
        np.savez(folder / "recall.npz", seen=windows[:, 0], unseen=windows[:, 4], seen_span=spans[:, 0], unseen_span=spans[:, 4],
                 exposures=exposures, control=np.arange(F) >= people * relations)
        print("".join(f"    {tok.decode(row[row != tok.eot])}\n" for row in windows[fact[:6], phrasing[:6]])
              + f"{people:,} people ({control:,} more are never named), {F:,} facts, windows of {window} tokens, exposures "
              + ", ".join(f"{q}%: {np.percentile(exposures[:people * relations], q):.0f}" for q in (0, 25, 50, 75, 100)))
        write_meta(folder, tok, {"train": documents, "val": val_documents}, source="invented", settings=settings, window=window,
                   people=people, relations=relations, answers=answers, control_people=control)

def fact_windows(rng, people, relations, answers, tokenizer):
    """The tokenizer, every fact in all five phrasings (F, 5, window), and where in the window its answer is (F, 5, 2)."""
    pool = max(8, math.ceil(1.2 * math.sqrt(people)))                                    # first names, and as many last names
    first, last = rng.choice(FIRST_NAMES, pool, replace=False), rng.choice(LAST_NAMES, pool, replace=False)
    names = [f"{first[i // pool]} {last[i % pool]}" for i in rng.choice(pool * pool, people, replace=False)]
    said = [phrasings for _, *phrasings in RELATIONS[:relations]]
    words = [rng.permutation(known)[:answers].tolist() for known, *_ in RELATIONS[:relations]]
    truth = rng.integers(answers, size=(people, relations))                              # whose answer to what is which word
    vocabulary = set(re.findall("[a-zA-Z]+", " ".join(sum(said + words, [*first, *last]))))
    tok = make_tokenizer(tokenizer, sorted(" " + word for word in vocabulary) if tokenizer == "words" else ())
    texts = [tok.encode(phrasing.format(name, known[answer])) for name, row in zip(names, truth.tolist())
             for phrasings, known, answer in zip(said, words, row) for phrasing in phrasings]
    lengths = np.array([len(text) for text in texts])                                    # (F * 5,), eot not counted
    windows = np.full((len(texts), lengths.max() + 1), tok.eot, "<u2")                   # (F * 5, window)
    windows[:, 1:][np.arange(lengths.max()) < lengths[:, None]] = np.fromiter(itertools.chain.from_iterable(texts), "<u2")
    widths = np.array([[len(tok.encode(" " + word)) for word in known] for known in words])[np.arange(relations), truth]
    ends = lengths.reshape(-1, 5)                                                        # the full stop's place: after the answer
    return tok, windows.reshape(len(ends), 5, -1), np.stack([ends - widths.reshape(-1, 1), ends], -1)

def chunks(raw, suffix):
    """The bytes of a file, about a million at a time. A .gz is unpacked as it is read, never on disk; in a tar of the full OpenWebText
    are tar.xz files of .txt files, the documents: \\0 after each."""
    if suffix != ".tar":
        file = gzip.GzipFile(fileobj=raw) if suffix == ".gz" else raw
        yield from iter(lambda: file.read(BATCH), b"")
        return
    with tarfile.open(fileobj=raw, mode="r|") as outer:
        for pack in (member for member in outer if member.name.endswith(".xz")):
            with tarfile.open(fileobj=outer.extractfile(pack), mode="r|xz") as inner:
                for text in (inner.extractfile(member).read() for member in inner if member.name.endswith(".txt")):
                    yield re.sub(rb"\n{3,}", b"\n\n", text.replace(b"\0", b" ")) + b"\0"

def characters(path):
    decoder, at, show = codecs.getincrementaldecoder("utf-8")(), 0, progress(f"reading {path.name}", path.stat().st_size)
    with open(path, "rb") as raw:
        try:
            for chunk in itertools.chain(chunks(raw, path.suffix), [b""]):
                text = decoder.decode(chunk, final=not chunk)
                yield text if at else text.removeprefix("\ufeff")
                at += len(chunk)
                show(raw.tell())
        except UnicodeDecodeError as error:
            at += error.start - len(decoder.getstate()[0])
            raise trouble(f"{path}: byte {at} is not UTF-8: convert the file, for example with iconv -t UTF-8") from None
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, tarfile.TarError) as error:
            raise trouble(f"{path} is damaged or cut short ({error}): delete it and get it again") from None

def documents(texts, separator):
    """(text, whether its document ends here) for all that is not blank, stripped. A document longer than PIECE comes in several,
    cut before a space or a line's end, where every tokenizer cuts: the tokens are those of the whole."""
    before_space = re.compile(r"(?s).*\S(?=[ \n])")
    buffer, begun = "", False                               # of the document at hand: what is not out, whether anything is
    for text in itertools.chain(texts, [None]):
        *whole, buffer = (buffer + (text or "")).split(separator)
        for end, body in [(True, body) for body in whole] + [(text is None, buffer)]:
            body = body if begun else body.lstrip()
            body = body.rstrip() if end else body
            while len(body) > PIECE + len(separator) * (not end):        # half a separator may stand at the end
                cut = before_space.match(body, 0, PIECE + 1)
                cut = cut.end() if cut else PIECE
                yield body[:cut], False
                body, begun = body[cut:], True
            if end and (body or begun):
                yield body, True
            buffer, begun = ("", False) if end else (body, begun)

def text_plan(path, separator, fraction):
    """[(path, split)]: None is by document; a number is for the one document, from the first line after so many characters on."""
    size = ended = 0
    for text, end in documents(characters(path), separator):
        size, ended = size + len(text), ended + end
        if ended == 2:
            return [(path, None)]
    return [(path, max(1, min(round(size * (1 - fraction)), size - 1)))]

def batches(plan, separator, every):
    """Lists of (split, text, whether its document ends here), about BATCH characters each. plan: (path, split); where the split is
    None, every `every`-th document is for validation."""
    number, batch, size = 0, [], 0
    for path, split in plan:
        at = 0
        for text, end in documents(characters(path), "\0" if path.suffix == ".tar" else separator):
            if type(split) is int and at <= split < at + len(text):
                cut = text.find("\n", split - at) + 1 or split - at
                batch.append(("train", text[:cut].rstrip(), True))
                text, split = text[cut:].lstrip(), "val"
            batch.append((split if type(split) is str else "train" if split or number % every else "val", text, end))
            number, size, at = number + end, size + len(text), at + len(text)
            if size >= BATCH:
                yield batch
                batch, size = [], 0
    yield batch

def frequent_words(found, vocab_size):
    """What WORDS cuts most often from the training text (2 to 64 bytes), as much as fits beside the 256 bytes and eot."""
    counts = collections.Counter()
    for text in (text for batch in found for split, text, _ in batch if split == "train"):
        counts.update(re.findall(WORDS, text if text[:1].isspace() else " " + text))
        if len(counts) > 2_000_000:                         # bounded memory: forget what was rare so far
            counts = collections.Counter(dict(counts.most_common(1_000_000)))
    return sorted((word for word in counts if 1 < len(word.encode()) <= 64), key=lambda word: (-counts[word], word))[:vocab_size - 257]

def start_worker(*tokenizer):
    signal.signal(signal.SIGINT, signal.SIG_IGN)            # Ctrl-C is the main process's business
    encode.tok = Tokenizer(*tokenizer)

def encode(batch):
    ids = {"train": [], "val": []}
    for split, text, end in batch:
        ids[split] += encode.tok.encode(text) + [encode.tok.eot] * end
    return {split: np.array(some, "<u2") for split, some in ids.items()}

def tokenized(found, tok, workers):
    """{split: tokens} of each batch, in order. Workers need no network: they are handed the vocabulary."""
    if workers < 2:
        encode.tok = tok
        yield from map(encode, found)
        return
    spawn, under_way = multiprocessing.get_context("spawn"), collections.deque()
    with concurrent.futures.ProcessPoolExecutor(workers, spawn, start_worker, (tok.name, tok.pattern, tok.tokens)) as pool:
        for batch in found:
            under_way.append(pool.submit(encode, batch))
            if len(under_way) > 2 * workers:                # bounded memory
                yield under_way.popleft().result()
        yield from (some.result() for some in under_way)

TINY, OWT = "datasets/roneneldan/TinyStories/resolve/main/", "datasets/stanford-cs336/owt-sample/resolve/main/"
FULL = "datasets/Skylion007/openwebtext/resolve/f3808c30e817981b845ec549c43e82bb467d8144/subsets/"
HUB = {                  # folder, bytes and sha256 as several others wrote them down
    "TinyStoriesV2-GPT4-train.txt": (TINY, 2227753162, "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443"),
    "TinyStoriesV2-GPT4-valid.txt": (TINY, 22502601, "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d"),
    "owt_train.txt.gz": (OWT, 4591240837, "b19ae88cfbc4016b304c348522455fe38ebac48fffed955adcc7191a89e38ccf"),
    "owt_valid.txt.gz": (OWT, 111785382, "bc73db5da2f19c360836b9c8a88094e13346ec83798c2f40060be39135768c80"),
    **{f"urlsf_subset{i:02}.tar": (FULL, 630_000_000, None) for i in range(21)}}         # (about)
SOURCES = {"tinystories": list(HUB)[:2], "openwebtext": list(HUB)[2:4]}                 # train, valid

def fetch(url, target, size):
    """url -> target.part, going on where an earlier try broke off. size: as published, None to take what comes."""
    part, failures, token = Path(f"{target}.part"), 0, os.environ.get("HF_TOKEN", "").strip()
    way_out = f"run the same command again, or get it by other means and place it at {target} (or give it with --from-file)"
    while failures < TRIES:
        before = have = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        if token:                                           # unredirected: never sent on to the host of a redirect
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                headers = reply.headers
                if reply.status == 206 and not headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                    raise ConnectionError("the server sent other bytes than asked for")
                have = have if reply.status == 206 else 0   # a server that knows no Range starts over
                total = have + int(headers["Content-Length"]) if "Content-Length" in headers else size
                if size and total != size:
                    raise trouble(f"{url} is {total} bytes long, {size} were expected: --no-verify takes it as it is, else {way_out}")
                show = progress(target.name, total or math.inf, have)
                with open(part, "ab" if have else "wb") as file:
                    while chunk := reply.read(1 << 18):
                        have += file.write(chunk)
                        show(have)
            if total in (None, have):
                return part
            problem = f"the connection ended after {have} of {total} bytes"
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
            problem, code, headers = str(error), getattr(error, "code", 0), getattr(error, "headers", None) or {}
            if code == 416 and headers.get("Content-Range") == f"bytes */{have}":
                return part                                 # all of it was here
            if code == 416:
                part.unlink()                               # the part of another file
            elif 400 <= code < 500 and code not in (408, 429):
                raise trouble(f"{url}: {problem} (for what is not public set HF_TOKEN): {way_out}") from None
        failures = 1 if have > before else failures + 1     # in a row: without getting further
        if failures < TRIES:
            after = headers.get("Retry-After", "")
            wait = min(int(after), 300) if after.isdigit() else 2 ** (failures - 1)
            print(f"{url}: {problem}; again in {wait} s")
            time.sleep(wait)
    raise trouble(f"{url}: {problem}, given up after {TRIES} tries: {way_out}")

def get(target, no_verify):
    """The file, downloaded unless it is there, once it is known to be what was published under its name."""
    (folder, size, wanted), path = HUB.get(target.name, ("", 0, "")), target
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        hub = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        hub = hub if "://" in hub else f"https://{hub}"
        path = fetch(f"{hub}/{folder}{target.name}", target, size if wanted and not no_verify else None)
    if wanted and not no_verify and (found := sha256(path)) != wanted:
        raise trouble(f"{path} ({path.stat().st_size} bytes) has sha256 {found}, {wanted} ({size} bytes) was expected: "
                      "--no-verify takes it as it is, else delete it and get it again")
    return path.rename(target)

def make_text(source, out="", tokenizer="gpt2", vocab_size=8192, separator=EOT, val_fraction=0.01, from_file=(), small=False, full=False,
              downloads="data/downloads", no_verify=False, workers=os.cpu_count() or 1, force=False):
    """tinystories, openwebtext or a text file, nanoGPT's way: the documents one after another, eot after each."""
    names, separator, out = SOURCES.get(source, []), separator.replace("\\n", "\n"), out or f"data/{Path(source).name.split('.')[0]}"
    local = from_file if names else [source]
    for bad, why in [
            (not names and (small or full or from_file), f"--small, --full, --from-file are for {' and '.join(SOURCES)}, not for {source}"),
            (full and (small or source != "openwebtext"), "--full is for openwebtext, and not together with --small"),
            (len(from_file) > 2 and not full, f"--from-file got {len(from_file)} files: at most two, train then valid"),
            (not 0 < val_fraction <= 0.5, f"--val-fraction {val_fraction}: must be above 0 and at most 0.5"),
            (not 258 <= vocab_size <= 65536, f"--vocab-size {vocab_size}: must be from 258 (bytes, a word, eot) to 65536 (uint16)"),
            (not separator, "--separator must not be empty"), (workers < 0, f"--workers {workers}: must be at least 0"),
            *[(not Path(path).is_file(), f"{path}: no such file (facts, {', '.join(SOURCES)}, or the path of a text)") for path in local]]:
        if bad:
            raise trouble(why)
    names = list(HUB)[4:] if full else names[1:] if small else names
    paths = [Path(path) for path in local] or [Path(downloads) / name for name in names]
    sizes = {path: path.stat().st_size if local else HUB[path.name][1] for path in paths}
    settings = dict(source=source if names else "text", files={path.name: size for path, size in sizes.items()}, tokenizer=tokenizer,
                    separator=separator, val_fraction=val_fraction, vocab_size=vocab_size if tokenizer == "words" else None)
    if is_finished(out, settings, force):
        return
    tok = make_tokenizer(tokenizer) if tokenizer != "words" else None                    # a missing vocabulary shows before hours of work
    there = sum(found.stat().st_size for path in paths for found in path.parent.glob(path.name + "*"))
    text = sum(size * {".gz": 2.7, ".tar": 3.3}.get(path.suffix, 1) for path, size in sizes.items())         # about
    check_space(**{} if local else {"downloads": (downloads, max(0, sum(sizes.values()) - there))},
                tokens=(out, text * {"gpt2": 0.6, "words": 1, "bytes": 2}[tokenizer]))
    paths = [get(path, no_verify) for path in paths]
    splits, every = ["train", "val"] if len(paths) == 2 and not full else [None] * len(paths), 2000 if full else round(1 / val_fraction)
    plan = list(zip(paths, splits)) if names else text_plan(*paths, separator, val_fraction)
    tok = tok or make_tokenizer(tokenizer, frequent_words(batches(plan, separator, every), vocab_size))
    with in_the_making(out) as folder:
        count = collections.Counter(train=0, val=0)
        with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
            for ids in tokenized(batches(plan, separator, every), tok, workers):
                for split, file in ("train", train), ("val", val):
                    file.write(ids[split])
                    count[split] += int((ids[split] == tok.eot).sum())
        if not all(count.values()):
            raise trouble(f"{source}: {count['train']} documents to train on, {count['val']} to validate on: more text is needed")
        write_meta(folder, tok, count, source=[HUB.get(path.name, [f"{path.parent}/"])[0] + path.name for path in paths], settings=settings)

HELP = dict(
    out="the folder to make; else data/<name>", tokenizer="gpt2, bytes or words; facts: words", force="replace a finished folder",
    people="facts: who is spoken of", relations="facts: what is known of each, up to 8", answers="facts: possible answers, up to 100",
    documents="facts: sentences to train on", val_documents="facts: sentences to validate on", zipf_shift="facts: larger is flatter",
    zipf_power="facts: 0 makes all people alike", control="facts: people never spoken of", seed="facts: of all that is drawn",
    vocab_size="of --tokenizer words", separator="between documents; \\n is a line's end", val_fraction="kept for validation",
    from_file="local copies in place of downloads: train, valid", downloads="where they are kept", workers="processes",
    small="only the small file, split for validation", full="openwebtext: all of it", no_verify="take files of another sha256")

def main(argv=None):
    def wrong(message):
        raise trouble(f"{message} (--help shows what there is)")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS)
    parser.error = wrong
    parser.add_argument("source", nargs="?", default="facts", help="facts, tinystories, openwebtext, or the path of a text file")
    flags = {**inspect.signature(make_facts).parameters, **inspect.signature(make_text).parameters}
    for name, what in HELP.items():
        default, kind = flags[name].default, type(flags[name].default)
        more = dict(action="store_true") if kind is bool else dict(nargs="+", metavar="PATH") if kind is tuple else dict(
            type=kind, choices=["gpt2", "bytes", "words"] if name == "tokenizer" else None)
        parser.add_argument(f"--{name.replace('_', '-')}", help=what + f" ({default})" * bool(default), **more)
    try:
        given = vars(parser.parse_args(argv))
        source = given.pop("source")
        make = make_facts if source == "facts" else functools.partial(make_text, source)
        for name in sorted(given.keys() - inspect.signature(make).parameters.keys()):
            wrong(f"--{name.replace('_', '-')} is not for {source}")
        make(**given)
    except KeyboardInterrupt:
        raise trouble("stopped; run the same command again (a download goes on where it was)") from None
    except concurrent.futures.process.BrokenProcessPool:
        raise trouble("a worker process died (out of memory?): give fewer --workers, or 1") from None
    except OSError as error:
        way_out = ": make room, or give --out or --downloads on another disk" if error.errno == errno.ENOSPC else ""
        raise trouble(f"{error.filename or 'cannot go on'}: {error.strerror or error}{way_out}") from None

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")                # a file's name may be more than the terminal can write
    main()
