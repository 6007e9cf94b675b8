"""
sample.py: it writes what the model says, and whatever is wrong it says in one line.

The runs are tiny: the one that is to know some facts takes 120 steps, the others take two.
"""
import base64
import codecs
import io
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import kernel
import prepare_data
import sample
import train
from model import GPT
from support import edit
from support.checkpoint import load_checkpoint
from support.recall import numbers_about

TINY = ("--n-layer 2 --n-embd 32 --n-head 2 --mem-layers 1 --mem-n-keys 16 --mem-topk 4 "
        "--mem-heads 2 --dropout 0.1 --batch-size 64 --eval-windows 64 --device cpu").split()
# Name of a run: its data, its settings.
RUNS = {
    "memory": ("facts", "--max-steps 120 --warmup-steps 10 --learning-rate 1e-2"),
    "dense": ("facts", "--max-steps 2 --ffn dense"),
    # Facts spelled out in bytes.
    "bytes": ("spelled", "--max-steps 2"),
    # Text without windows, and a vocabulary of 400 for 257 tokens.
    "text": ("text", "--max-steps 2 --block-size 16 --vocab-size 400 --batch-size 8"),
}
PEOPLE = 70  # of them 10 are never named
FACTS = 5 * PEOPLE


# ---- the runs, and what sample.py prints of them

@pytest.fixture(scope="module")
def runs(tmp_path_factory, few_reads):
    """A folder with the run folders of RUNS. Tests read them only."""
    base = tmp_path_factory.mktemp("runs")
    make_data(base)
    # train.py takes these signals over. Give them back afterwards.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for name, (data, settings) in RUNS.items():
        folders = ["--data", str(base / "data" / data), "--out-dir", str(base / name)]
        assert train.main([*folders, *TINY, *settings.split()]) == 0
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return base


def make_data(base):
    """The corpora of RUNS."""
    facts = dict(people=PEOPLE - 10, control=10, answers=4, documents=1000, val_documents=64)
    prepare_data.make_facts(str(base / "data/facts"), **facts)
    prepare_data.make_facts(str(base / "data/spelled"), **facts, tokenizer="bytes")
    text = "<|endoftext|>".join(f"The café № {i} is “open”." for i in range(300))
    source = base / "some.txt"
    source.write_text(text, "utf-8")
    prepare_data.make_text(str(source), str(base / "data/text"), tokenizer="bytes", workers=1)


@pytest.fixture
def say(runs, capsys):
    """say(name of a run, flags...) -> what sample.py prints."""
    def say(name, *flags):
        status = sample.main([str(runs / name), "--device", "cpu", *map(str, flags)])
        out, err = capsys.readouterr()
        assert status == 0, err
        assert re.fullmatch(rf"{runs / name}: \w+, step \d+, [\d,]+ parameters, on cpu\n", err)
        return out
    return say


@pytest.fixture
def refuse(capsys):
    """refuse(command line) -> the line on stderr of a sample.py that ends with status 1."""
    def refuse(argv):
        status = sample.main(argv)
        out, err = capsys.readouterr()
        assert status == 1
        assert out == ""
        assert re.fullmatch("sample.py: .+\n", err)
        return err.strip()
    return refuse


def load_model(folder):
    model, _ = load_checkpoint(folder)
    return model.eval()


def first_name(table):
    """The name in the first row of a table that --recall printed."""
    first_row = table.splitlines()[1]
    return " ".join(first_row.split()[:2])


# ---- writing

def continued(folder, ids, steps):
    """ids and the likeliest tokens after them, up to an eot. By hand: no cache, no generate."""
    model = load_model(folder)
    tok = prepare_data.load_tokenizer(folder)
    ids = list(ids)
    for _ in range(steps):
        logits, _ = model(torch.tensor([ids]))  # (1, 1, V)
        likeliest = logits[0, 0, :tok.vocab_size].argmax().item()
        if likeliest == tok.eot:
            break
        ids.append(likeliest)
    return ids


def test_temperature_0_takes_the_likeliest_tokens(runs, say):
    tok = prepare_data.load_tokenizer(runs / "memory")
    name = first_name(say("memory", "--recall"))

    # Where each document has its window, an eot begins the prompt.
    ids = continued(runs / "memory", [tok.eot] + tok.encode(name), 6)
    text = say("memory", "--prompt", name, "--temperature", 0, "--max-new-tokens", 6)
    assert text == tok.decode(ids[1:]) + "\n"

    # Without a prompt, the eot alone. A temperature close to 0 is 0.
    ids = continued(runs / "memory", [tok.eot], 8)
    assert say("memory", "--temperature", 1e-40) == tok.decode(ids[1:]) + "\n"


def test_without_windows_the_prompt_alone_is_read(runs, say):
    tok = prepare_data.load_tokenizer(runs / "text")
    ids = continued(runs / "text", tok.encode("The ca"), 5)
    spelling = b"".join(tok.tokens[i] for i in ids)
    # An incremental decoder drops the half of a last character, as sample.py does.
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(spelling)
    flags = ["--temperature", 0, "--max-new-tokens", 5]
    assert say("text", "--prompt", "The ca", *flags) == text + "\n"


def test_the_seed_decides_the_text(say):
    texts = [say("memory", "--seed", seed) for seed in range(4)]
    again = [say("memory", "--seed", seed) for seed in range(4)]
    assert texts == again
    assert len(set(texts)) > 1
    assert say("memory") == say("memory", "--seed", 1337)


def test_samples_of_one_run_differ(say):
    texts = say("text", "--num-samples", 5).split("\n---\n")
    assert len(texts) == 5
    assert len(set(texts)) == 5


def test_flags_that_change_nothing_and_flags_that_leave_one_token(say):
    assert say("memory", "--top-k", 10**9, "--top-p", 1) == say("memory")
    likeliest = say("memory", "--temperature", 0)
    assert say("memory", "--top-k", 1) == likeliest
    assert say("memory", "--top-p", 1e-6) == likeliest


def test_eot_ends_a_sample_and_the_last_one_ends_it_all(say, monkeypatch):
    eot = 256

    def generate(self, idx, *_):
        assert idx.tolist() == [list(b"no"), list(b"no")]
        yield torch.tensor([[ord("A")], [ord("B")]])
        yield torch.tensor([[eot], [ord("C")]])
        yield torch.tensor([[ord("D")], [eot]])
        raise AssertionError("asked for more than anybody reads")

    monkeypatch.setattr(GPT, "generate", generate)
    assert say("text", "--prompt", "no", "--num-samples", 2) == "noA\n---\nnoBC\n"


def test_tokens_without_a_text_are_never_drawn(say):
    # 143 of the 400 tokens have none. At this temperature all are equally likely.
    hot = ["--num-samples", 20, "--temperature", 1000, "--max-new-tokens", 30]
    assert len(say("text", *hot)) > 100


def test_text_comes_token_by_token_in_whole_characters(runs, monkeypatch):
    # At the end a stray byte, an A, and a character cut short.
    spoken = "é€👩!".encode() + bytes([0xFF, 0x41, 0xE2, 0x82])

    def generate(self, *_):
        for byte in spoken:
            yield torch.tensor([[byte]])

    parts = []
    stdout = io.TextIOWrapper(io.BytesIO(), "utf-8")
    monkeypatch.setattr(GPT, "generate", generate)
    monkeypatch.setattr(stdout, "write", parts.append)
    monkeypatch.setattr(sys, "stdout", stdout)
    assert sample.main([str(runs / "text"), "--prompt", "né"]) == 0
    written = [part for part in parts if part]
    assert written == ["né", "é", "€", "👩", "!", "\ufffd", "A", "\n"]


@pytest.fixture
def terminal(monkeypatch):
    """terminal(encoding) -> a buffer with the bytes that have left a stdout of that encoding."""
    def terminal(encoding):
        shown = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding))
        return shown
    return terminal


def test_a_token_is_shown_before_the_next_one_is_made(runs, terminal, monkeypatch):
    shown = terminal("utf-8")

    def generate(self, *_):
        for text in (b"no", b"noA", b"noAB"):
            assert shown.getvalue() == text
            yield torch.tensor([[ord("A") + len(text) - 2]])

    monkeypatch.setattr(GPT, "generate", generate)
    assert sample.main([str(runs / "text"), "--prompt", "no"]) == 0
    assert shown.getvalue().startswith(b"noABC")  # the end of the line waits for the exit


def test_a_terminal_that_lacks_a_character_shows_a_question_mark(runs, terminal):
    shown = terminal("ascii")
    flags = ["--prompt", "né", "--max-new-tokens", "1"]
    assert sample.main([str(runs / "text"), *flags]) == 0
    assert shown.getvalue().startswith(b"n?")


# ---- asking

def verdicts_of_training(folder, ablated):
    """What train.py says of each fact of a run: {(question, truth, verdict, times read)}."""
    facts = np.load(folder / "recall.npz")
    tok = prepare_data.load_tokenizer(folder)
    model = load_model(folder)
    if ablated:
        torch.nn.init.zeros_(model.table.values)
    right, _ = model.answer(facts["seen"], facts["seen_span"])
    rows = set()
    for i, window in enumerate(facts["seen"]):
        start, end = facts["seen_span"][i]
        question = tok.decode(window[1:start])
        truth = tok.decode(window[start:end]).strip()
        verdict = "right" if right[i] else "wrong"
        times = "never read" if facts["control"][i] else str(facts["exposures"][i])
        rows.add((question, truth, verdict, times))
    return rows


@pytest.mark.parametrize("name, flags", [
    ("memory", []), ("memory", ["--ablate-memory"]), ("bytes", []), ("dense", [])])
def test_recall_agrees_with_the_verdict_of_training(runs, say, name, flags):
    asked = FACTS if name == "memory" else 20
    _, *lines, last = say(name, "--recall", "--count", asked, *flags).splitlines()
    found = set()
    right = 0
    for line in lines:
        row = re.fullmatch(r"(.{38})(.*?)(\w+) +(right|wrong) +(never read|\d+)", line)
        question, said, truth, verdict, times = row.groups()
        assert (said.strip() == truth) == (verdict == "right")
        right += int(verdict == "right")
        found.add((question.strip(), truth, verdict, times))
    assert len(lines) == len(found) == asked
    assert found <= verdicts_of_training(runs / name, ablated=bool(flags))
    summary = f"{right} of {asked} right"
    if flags:
        summary += ", without the memory layers"
    assert last == summary
    if name == "memory" and not flags:
        assert 20 < right < 330, "both verdicts should occur"


def test_recall_asks_a_handful(say):
    table = say("memory", "--recall")
    assert say("memory", "--recall") == table
    assert say("memory", "--recall", "--seed", 1) != table
    lines = table.splitlines()
    assert len(lines) == 12
    assert re.fullmatch(r"\d+ of 10 right", lines[-1])


def test_a_row_is_shown_before_the_next_fact_is_asked(runs, terminal, monkeypatch):
    shown = terminal("utf-8")
    rows = []  # that had been shown when each fact was asked

    def generate(self, *_, temperature):
        rows.append(max(shown.getvalue().count(b"\n") - 1, 0))  # without the headline
        yield torch.tensor([[0]])

    monkeypatch.setattr(GPT, "generate", generate)
    assert sample.main([str(runs / "memory"), "--recall", "--count", "4"]) == 0
    assert rows == [0, 1, 2, 3]


def test_recall_asks_all_about_one_person(say):
    handful = say("memory", "--recall")
    name = first_name(handful)
    rows = say("memory", "--recall", name).splitlines()[1:-1]
    assert len(rows) == 5
    assert all(row.startswith(name + " ") for row in rows)
    assert handful.splitlines()[1] in rows


def test_ablation_removes_the_memory(runs, say):
    args = sample.read_args([str(runs / "memory"), "--ablate-memory", "--device", "cpu"])
    ablated, tok, _ = sample.load(args)
    assert edit.ablate(ablated, args) == "without the memory layers"
    whole = load_model(runs / "memory")
    idx = torch.arange(8)[None]  # (1, T)
    assert not torch.allclose(whole(idx)[0], ablated(idx)[0], atol=1e-2)


# ---- the backend

def test_the_backend_is_chosen_by_a_flag(runs, say, refuse, monkeypatch):
    def load(args):
        loaded = real(args)
        used.append(kernel.backend())
        return loaded
    real = sample.load
    used = []
    monkeypatch.setattr(sample, "load", load)
    text = say("memory", "--backend", "torch")
    assert say("memory") == text
    assert used == ["torch", "auto"]
    assert kernel.backend() == "auto"
    # Triton cannot run here, whether it is installed or not.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(kernel, "INTERPRETED", False)
    message = refuse([str(runs / "memory"), "--backend", "triton"])
    assert message.startswith("sample.py: backend 'triton' cannot run here: ")


@pytest.mark.parametrize("asked", ["Ren\u00e9  Dil", "Rene\u0301 Dil", " Ren\u00e9 Dil"])
@pytest.mark.parametrize("stored", ["Ren\u00e9 Dil", "Rene\u0301 Dil"])
def test_a_name_is_compared_as_it_is_stored(asked, stored):
    """With any white space, and accents of one character or of two."""
    facts = dict(subject=np.array([stored, "Al Bo"]))
    assert numbers_about(asked, facts).tolist() == [0]


# ---- what is wrong

@pytest.mark.parametrize("flags, words", [
    ("--temperature -1", "--temperature -1.0 is not at least 0: raise it"),
    ("--temperature nan", "--temperature nan"),
    ("--top-p 0", "--top-p 0.0"),
    ("--top-p 1.5", "--top-p 1.5 is above 1: lower it"),
    ("--top-k 0", "--top-k 0"),
    ("--seed -1", "--seed -1"),
    ("--max-new-tokens 0", "--max-new-tokens 0"),
    ("--count 0", "--count 0"),
    ("--num-samples 0", "--num-samples 0"),
    ("--prompt=", "the prompt '' makes no tokens"),
    ("--recall=Nobody", r"'Nobody'.* try \w+ \w+ or \w+ \w+ or \w+ \w+$"),
])
def test_a_wrong_value_is_refused_in_one_line(runs, refuse, flags, words):
    assert re.search(words, refuse([str(runs / "memory"), *flags.split()]))


@pytest.mark.parametrize("name, flags, words", [
    ("dense", "--ablate-memory", "is dense, it has no memory layers"),
    ("text", "--recall", "there are no facts to ask"),
])
def test_what_a_run_lacks_is_said_in_one_line(runs, refuse, name, flags, words):
    assert re.search(words, refuse([str(runs / name), *flags.split()]))


ARRAYS = "recall.npz"
CHECKPOINT = "ckpt.pt"
META = "meta.json"
TOKENS = "tokenizer.tiktoken"
# A whole tokenizer file, but of more tokens than the model has.
TOO_MANY_TOKENS = b"".join(base64.b64encode(b"%d" % i) + b" 0\n" for i in range(999))


@pytest.mark.parametrize("file, content, flags, words", [
    (ARRAYS, None, ["--recall"], "recall.npz does not exist"),
    (ARRAYS, b"PK?", ["--recall"], "recall.npz is broken"),
    (CHECKPOINT, None, [], "ckpt.pt does not exist"),
    (CHECKPOINT, b"PK?", [], "ckpt.pt is broken"),
    (META, None, [], "meta.json does not exist"),
    (META, b"[1", [], "meta.json is broken"),
    (META, b"1", [], "meta.json is broken"),
    (META, b"{}", [], "meta.json is broken"),
    (META, b'{"tokenizer": "words", "pattern": 2}', [], "meta.json is broken"),
    (META, b'{"tokenizer": "words", "pattern": "("}', [], "meta.json is broken"),
    (TOKENS, None, [], "tokenizer.tiktoken does not exist"),
    (TOKENS, b"", [], "tokenizer.tiktoken is broken"),
    (TOKENS, b"!\n\n", [], "tokenizer.tiktoken is broken"),
    (TOKENS, b"YQ=\n", [], "tokenizer.tiktoken is broken"),
    (TOKENS, TOO_MANY_TOKENS, [], "tokenizer.tiktoken is broken"),
])
def test_a_broken_file_is_refused_in_one_line(runs, tmp_path, refuse, file, content, flags, words):
    """content None: the file is missing."""
    folder = tmp_path / "run"
    shutil.copytree(runs / "memory", folder)
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    assert re.search(words, refuse([str(folder), *flags]))


def test_damaged_arrays_are_refused_in_one_line(runs, tmp_path, refuse):
    folder = tmp_path / "run"
    shutil.copytree(runs / "memory", folder)
    path = folder / ARRAYS
    with np.load(path) as arrays:
        arrays = dict(arrays)
    np.savez(path, **arrays)  # not compressed, so that we can find what to damage
    whole = path.read_bytes()
    header = whole.index(b"{'descr'")  # numpy's, of the first array: a dict in Python's syntax
    method = whole.index(b"PK\x01\x02") + 10  # zip's number of the first array's compression
    damages = [
        (header, b"("),
        (header, b"{('"),  # its strings begin and end elsewhere now
        (method, bytes([99])),  # no such compression
        (len(whole) // 4, bytes([255] * 8)),  # the checksum differs
    ]
    for place, damage in damages:
        path.write_bytes(whole[:place] + damage + whole[place + len(damage):])
        said = refuse([str(folder), "--recall"])
        assert re.search(r"recall.npz is broken, or another program's \(\w+", said)


@pytest.mark.parametrize("flags", [
    ["--no-such-flag"], ["--device", "tpu"], ["--backend", "cuda"], ["--top-k", "x"],
    ["--prompt", "a", "--recall"]])
def test_wrong_flags_end_with_2(capsys, flags):
    with pytest.raises(SystemExit) as error:
        sample.main(["out/x", *flags])
    assert error.value.code == 2
    assert re.fullmatch("sample.py: .+\n", capsys.readouterr().err)


# ---- a process of its own

class Forked:
    """sample.py as a process. It is forked, so that torch need not be imported again."""

    def __init__(self, folder, *flags):
        out, out_end = os.pipe()
        err, err_end = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(out_end, 1)
            os.dup2(err_end, 2)
            for descriptor in (out, out_end, err, err_end):
                os.close(descriptor)
            self.run(folder, *flags)
        os.close(out_end)
        os.close(err_end)
        self.stdout = open(out)
        self.stderr = open(err)

    def run(self, *argv):
        code = 99
        try:
            sys.stdout = open(1, "w")
            sys.stderr = open(2, "w", buffering=1)  # line by line, as Python does it
            sys.argv = [sample.__file__, *map(str, argv)]
            runpy.run_path(sample.__file__, run_name="__main__")
        except SystemExit as exit:
            code = exit.code
        finally:
            os._exit(code)

    def wait(self):
        """The exit status. Negative: the signal that ended it."""
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)


def test_a_reader_who_leaves_ends_it_without_a_word(runs):
    head = Forked(runs / "memory", "--recall", "--count", FACTS)
    head.stdout.readline()
    head.stdout.close()
    assert head.wait() == -signal.SIGPIPE
    assert head.stderr.read().count("\n") == 1  # the line about the model


def test_ctrl_c_ends_it_without_a_word(runs):
    busy = Forked(runs / "text", "--num-samples", 2000, "--max-new-tokens", 1_000_000)
    assert busy.stderr.readline().startswith(str(runs))
    os.kill(busy.pid, signal.SIGINT)
    assert busy.wait() == -signal.SIGINT
    assert busy.stderr.read() == ""


@pytest.mark.slow
def test_the_exit_status_is_1_when_something_is_wrong(runs):
    process = subprocess.run([sys.executable, sample.__file__, str(runs / "nowhere")],
                             capture_output=True, text=True)
    assert process.returncode == 1
    assert process.stdout == ""
    assert re.fullmatch("sample.py: .*ckpt.pt does not exist.*\n", process.stderr)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_text_that_cannot_be_written(runs):
    """Also if Python keeps it back until the end."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        process = subprocess.run([sys.executable, sample.__file__, str(runs / "memory"), "--slot",
                                  "5"], stdout=full, stderr=subprocess.PIPE, text=True, env=env)
    assert process.returncode == 1
    assert process.stderr.splitlines()[1:] == [
        "sample.py: the text cannot be written: No space left on device"]
