"""sample.py: what it writes is what the model says, and whatever is wrong it says in one line."""
import base64, codecs, io, re, shutil, signal, subprocess, sys
import numpy as np
import pytest
import torch
import prepare_data, sample, train
from model import GPT

TINY = "--n-layer 2 --n-embd 32 --n-head 2 --mem-layers 1 --mem-n-keys 16 --mem-topk 4 --mem-heads 2 --dropout 0.1 --device cpu".split()

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of tiny runs: memory and dense on facts, bytes (facts spelled out), text (no windows, more vocabulary than tokens)."""
    base, handlers = tmp_path_factory.mktemp("runs"), {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    (base / "some.txt").write_text("<|endoftext|>".join(f"The café № {i} is “open”." for i in range(300)), "utf-8")
    facts = dict(people=60, documents=4000, val_documents=64, control=10, answers=4)  # 300 facts known, 50 not
    prepare_data.make_facts(str(base / "data/facts"), **facts)
    prepare_data.make_facts(str(base / "data/spelled"), **facts, tokenizer="bytes")
    prepare_data.make_text(str(base / "some.txt"), str(base / "data/text"), tokenizer="bytes", workers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw", lambda *_: None)
        for name, data, more in [("memory", "facts", "--max-steps 120 --warmup-steps 10 --learning-rate 1e-2"),
                                 ("dense", "facts", "--max-steps 2 --ffn dense"), ("bytes", "spelled", "--max-steps 2"),
                                 ("text", "text", "--max-steps 2 --block-size 16 --vocab-size 400 --batch-size 8")]:
            assert train.main(["--data", str(base / "data" / data), "--out-dir", str(base / name), *TINY, *more.split()]) == 0
    for number in handlers:
        signal.signal(number, handlers[number])                             # train.py took them over
    return base

@pytest.fixture
def say(runs, capsys):
    def say(name, *flags):                                                  # -> what is printed; one line goes to stderr
        sample.main([str(runs / name), "--device", "cpu", *map(str, flags)])
        out, err = capsys.readouterr()
        assert re.fullmatch(rf"{runs / name}: \w+, step \d+, [\d,]+ parameters, on cpu\n", err)
        return out
    return say

def continued(runs, name, ids, steps):
    """The likeliest tokens after ids, by hand: no cache, no generate."""
    model, tok = GPT.load(runs / name)[0].eval(), prepare_data.load_tokenizer(runs / name)
    for _ in range(steps):
        ids = ids + [model(torch.tensor([ids]))[0][0, -1, :tok.vocab_size].argmax().item()]
    return ids[:(ids + [tok.eot]).index(tok.eot, 1)]

def test_temperature_0_is_the_argmax_and_prompts_begin_as_documents_do(runs, say):
    tok = prepare_data.load_tokenizer(runs / "memory")
    name = " ".join(say("memory", "--recall").splitlines()[1].split()[:2])
    ids = continued(runs, "memory", [tok.eot] + tok.encode(name), 6)        # with windows an eot begins the document
    assert say("memory", "--prompt", name, "--temperature", 0, "--max-new-tokens", 6) == tok.decode(ids[1:]) + "\n"
    assert say("memory", "--temperature", 1e-40) == tok.decode(continued(runs, "memory", [tok.eot], 8)[1:]) + "\n"
    tok = prepare_data.load_tokenizer(runs / "text")
    ids = continued(runs, "text", tok.encode("The ca"), 5)                  # without, the prompt alone is read
    whole = codecs.getincrementaldecoder("utf-8")("replace").decode(b"".join(tok.tokens[i] for i in ids))  # no half of a last character
    assert say("text", "--prompt", "The ca", "--temperature", 0, "--max-new-tokens", 5) == whole + "\n"

def test_a_seed_is_a_text(say):
    texts = [say("memory", "--seed", seed) for seed in range(4)]
    assert texts == [say("memory", "--seed", seed) for seed in range(4)] and len(set(texts)) > 1
    assert say("memory", "--top-k", 10**9, "--top-p", 1) == say("memory") == say("memory", "--seed", 1337)
    assert say("memory", "--top-k", 1) == say("memory", "--top-p", 1e-6) == say("memory", "--temperature", 0)
    assert len(set(say("text", "--num-samples", 5).split("\n---\n"))) == 5

def test_eot_ends_a_sample_and_the_last_of_them_ends_it_all(say, monkeypatch):
    def generate(self, idx, *_):
        assert idx.tolist() == [[0x6E, 0x6F]] * 2
        yield from (torch.tensor([[a], [b]]) for a, b in [(0x41, 0x42), (256, 0x43), (0x44, 256)])
        raise AssertionError("asked for more than anybody reads")
    monkeypatch.setattr(GPT, "generate", generate)
    assert say("text", "--prompt", "no", "--num-samples", 2) == "noA\n---\nnoBC\n"

def test_tokens_without_a_text_are_never_drawn(say):                          # 143 of 400
    assert len(say("text", "--num-samples", 20, "--temperature", 1000, "--max-new-tokens", 30)) > 100

def test_text_comes_token_by_token_in_whole_characters(runs, monkeypatch):
    spoken = list("é€👩!".encode()) + [0xFF, 0x41, 0xE2, 0x82]              # at the end a stray byte, an A, and a character cut short
    monkeypatch.setattr(GPT, "generate", lambda self, *_: (torch.tensor([[i]]) for i in spoken))
    parts, stdout = [], io.TextIOWrapper(io.BytesIO(), "utf-8")
    monkeypatch.setattr(stdout, "write", parts.append)
    monkeypatch.setattr(sys, "stdout", stdout)
    sample.main([str(runs / "text"), "--prompt", "né"])
    assert [part for part in parts if part] == ["né", "é", "€", "👩", "!", "\ufffd", "A", "\n"]

@pytest.mark.parametrize("name, flags", [("memory", []), ("memory", ["--ablate-memory"]), ("bytes", []), ("dense", [])])
def test_recall_agrees_with_the_verdict_of_training(runs, say, name, flags):
    facts, tok = dict(np.load(runs / name / "recall.npz")), prepare_data.load_tokenizer(runs / name)
    model, asked = GPT.load(runs / name)[0], 100 if name == "bytes" else 350  # of 70 people x 5
    for table in model.tables if flags else ():
        torch.nn.init.zeros_(table.values)
    right, _ = model.answer(facts["seen"], facts["seen_span"])
    expected = {(tok.decode(w[1:start]), tok.decode(w[start:end]).strip(), "right" if ok else "wrong", "never read" if never else str(n))
                for w, (start, end), n, never, ok in zip(*map(facts.get, ("seen", "seen_span", "exposures", "control")), right)}
    _, *lines, last = say(name, "--recall", "--count", asked, *flags).splitlines()
    found = [re.fullmatch(r"(.{38})(.*?)(\w+) +(right|wrong) +(never read|\d+)", line).groups() for line in lines]
    assert {(prompt.strip(), *more) for prompt, _, *more in found} <= expected and len(set(found)) == asked
    assert all((said.strip() == truth) == (verdict == "right") for _, said, truth, verdict, _ in found)
    count = sum(verdict == "right" for *_, verdict, _ in found)
    assert last == f"{count} of {len(lines)} right" + ", with all that the memory layers read set to zero" * len(flags)
    assert (name, flags) != ("memory", []) or 20 < count < 330              # both verdicts occur

def test_recall_of_one_person_and_a_handful(say):
    assert (text := say("memory", "--recall")) == say("memory", "--recall") != say("memory", "--recall", "--seed", 1)
    lines = text.splitlines()
    assert len(lines) == 12 and re.fullmatch(r"\d+ of 10 right", lines[-1])
    of_one = say("memory", "--recall", name := " ".join(lines[1].split()[:2])).splitlines()[1:-1]
    assert len(of_one) == 5 and all(line.startswith(name + " ") for line in of_one) and lines[1] in of_one

def test_ablation_takes_the_memory_away(runs, say):
    args = sample.read_args([str(runs / "memory"), "--ablate-memory"])
    assert not torch.allclose(*(m(torch.arange(8)[None])[0] for m in (GPT.load(args.run)[0].eval(), sample.load(args)[0])), atol=1e-2)
    assert say("memory", "--recall", "--count", 350) != say("memory", "--recall", "--count", 350, "--ablate-memory")

def changed(runs, tmp_path, name="memory", **files):                        # None: without that file
    shutil.copytree(runs / name, tmp_path / "run")
    for file, content in files.items():
        path = next((tmp_path / "run").glob(file + ".*"))
        path.unlink() if content is None else path.write_bytes(content)
    return str(tmp_path / "run")

@pytest.mark.parametrize("files, flags, words", [
    ({}, "--temperature -1", "--temperature -1.0: must be from 0 to 1000"), ({}, "--temperature nan", "--temperature nan"),
    ({}, "--top-p 0", "--top-p 0.0"), ({}, "--top-p 1.5", "to 1"), ({}, "--top-k 0", "--top-k 0"), ({}, "--seed -1", "--seed -1"),
    ({}, "--max-new-tokens 0", "--max-new-tokens 0"), ({}, "--count 0", "--count 0"), ({}, "--num-samples 0", "--num-samples 0"),
    ({}, "--prompt=", "--prompt ''"), ({}, "--recall=Nobody", "'Nobody'.* try \\w+ \\w+ or \\w+ \\w+ or \\w+ \\w+$"),
    (dict(name="dense"), "--ablate-memory", "is dense, it has no memory layers"), (dict(name="text"), "--recall", "recall.npz .*facts"),
    (dict(recall=b"PK?"), "--recall", "cannot read .*recall.npz"), (dict(ckpt=b"PK?"), "", "not a whole checkpoint"),
    (dict(ckpt=None), "", "ckpt.pt does not exist"), (dict(meta=None), "", "meta.json or"), (dict(meta=b"[1"), "", "meta.json or"),
    (dict(tokenizer=b"!\n\n"), "", "tokenizer.tiktoken is not there or broken"),
    (dict(tokenizer=b"".join(b"%s 0\n" % base64.b64encode(b"%d" % i) for i in range(999))), "", "1000 tokens > the model's")])
def test_what_is_wrong_is_said_in_one_line(runs, tmp_path, capsys, files, flags, words):
    with pytest.raises(SystemExit) as error:
        sample.main([changed(runs, tmp_path, **files), *flags.split()])
    assert re.fullmatch("sample.py: .+", error.value.code) and re.search(words, error.value.code)
    assert capsys.readouterr() == ("", "")

@pytest.mark.parametrize("flags", [["--no-such-flag"], ["--device", "tpu"], ["--top-k", "x"], ["--prompt", "a", "--recall"]])
def test_wrong_flags_end_with_2(capsys, flags):
    with pytest.raises(SystemExit) as error:
        sample.main(["out/x", *flags])
    assert error.value.code == 2 and re.fullmatch("sample.py: .+\n", capsys.readouterr().err)

def test_a_reader_who_leaves_and_ctrl_c_end_it_without_a_word(runs):
    def start(name, *flags, out=subprocess.PIPE):
        return subprocess.Popen([sys.executable, sample.__file__, str(runs / name), *flags], stdout=out, stderr=subprocess.PIPE, text=True)
    head = start("memory", "--recall", "--count", "350")
    busy = start("text", "--num-samples", "2000", "--max-new-tokens", "1000000", out=subprocess.DEVNULL)
    head.stdout.readline(), head.stdout.close()
    assert busy.stderr.readline().startswith(str(runs))
    busy.send_signal(signal.SIGINT)
    assert busy.wait(60) == -signal.SIGINT and busy.stderr.read() == ""
    assert head.wait(60) == -signal.SIGPIPE and head.stderr.read().count("\n") == 1
