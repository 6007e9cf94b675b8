"""
sample.py inspects a memory, ablates parts of it, teaches it and makes it forget.

Four tiny runs that know some facts: Memory, Memory+ with two layers that have a table each, PEER
and hash; and a dense one.
"""
import contextlib
import copy
import json
import math
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo  # the first optimizer imports it, in each child if it is not there yet
from test_train import exit_code, in_child

import prepare_data
import sample
import train
from memory import Layer
from support import data_folder, edit, look, readers, recall
from support.checkpoint import load_checkpoint

SMALL = ("--n-layer 2 --n-embd 32 --n-head 2 --mem-n-keys 16 --mem-topk 4 --mem-heads 2 "
         "--batch-size 64 --max-steps 175 --warmup-steps 10 --learning-rate 1e-2 "
         "--value-lr 4e-2 --eval-windows 64 --device cpu")
WINDOWS = 2048  # of the text, that reads.npz tells of
pytestmark = pytest.mark.slow

RUNS = {
    "memory": "--mem-layers 1 --no-mem-gate --no-qk-norm",
    "two": "--mem-layers 0,1 --mem-gate --qk-norm",
    "peer": "--mem-layers 1 --ffn peer",
    "hash": "--mem-layers 1 --ffn hash",
    "ultramem": "--mem-layers 1 --ffn ultramem --max-steps 10",  # refused in all these tests
    "dense": "--ffn dense",
}
WITH_TABLES = [name for name in RUNS if name not in ("ultramem", "dense")]
PATTERNS = """relation\tpattern
birth\t{subject} was born in {answer}.
birth\t{subject} comes from {answer}.
birth\tThe hometown of {subject} is {answer}.
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with the run folders. Tests read them only."""
    base = tmp_path_factory.mktemp("inside")
    facts = str(base / "facts")
    prepare_data.make_facts(facts, people=16, control=4, documents=11_200, val_documents=20,
                            zipf_power=0.3)
    commands = [["--data", facts, "--out-dir", str(base / name), *SMALL.split(), *flags.split()]
                for name, flags in RUNS.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "WINDOWS_OF_READS", WINDOWS)
        for i in range(0, len(commands), 2):  # two at a time
            pids = [in_child(train.main, argv) for argv in commands[i:i + 2]]
            assert [exit_code(pid) for pid in pids] == [0, 0]
    return base


@pytest.fixture
def say(base, capsys):
    """Run sample.py on a run -> what it prints. A status other than 0 gives the error line."""
    def run(name, *flags):
        capsys.readouterr()
        status = sample.main([str(base / name), *map(str, flags), "--device", "cpu"])
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        if status:
            assert shown.err.splitlines()[-1].startswith("sample.py: ")
            return shown.err
        return shown.out
    return run


def loaded(base, name, *flags):
    args = sample.read_args([str(base / name), *map(str, flags), "--device", "cpu"])
    return *sample.load(args)[:2], args


def somebody(base):
    """The name that stands in the text most often."""
    facts = recall.read_facts(base / "facts")
    return str(facts["subject"][facts["exposures"].argmax()])


# ---- reads.npz

@pytest.mark.parametrize("name", WITH_TABLES)
def test_reads_npz_counts_windows(base, name):
    """By brute force: window by window, the set of slots that its layers read."""
    model, _ = load_checkpoint(base / name)
    with np.load(base / name / "reads.npz") as arrays:
        arrays = dict(arrays)
    tokens = np.fromfile(base / "facts" / "train.bin", "<u2").astype("int64")
    T = model.config.block_size
    windows = (len(tokens) - 1) // T
    assert arrays["windows"] == WINDOWS < windows
    want = torch.zeros(len(model.table.values), dtype=torch.int64)
    # Every sixteenth is enough, and less than what was counted.
    numbers = np.arange(0, WINDOWS, 16) * windows // WINDOWS
    idx = torch.from_numpy(tokens[numbers[:, None] * T + np.arange(T)])  # (b, T)
    by_window = zip(*[slots.tolist() for _, slots, _ in model.memory_reads(idx)])
    for layers in by_window:
        for slot in set().union(*[np.ravel(slots) for slots in layers]):
            want[slot] += 1
    got = torch.from_numpy(arrays["readers_0"])
    assert len(got) == len(want)
    assert (got >= want).all() and got.max() <= WINDOWS
    assert torch.corrcoef(torch.stack([got, want]).float())[0, 1] > 0.95


def test_readers_of_all_windows_are_exact(base):
    """With as many windows as the text has, every one counts once, whatever the batches are."""
    model, state = load_checkpoint(base / "memory")
    s = train.Settings(**state["settings"])
    loader = train.Loader(s.data, "val", data_folder.read_meta(s.data), s)
    got = readers.count_readers(model, loader, 10**6, contextlib.nullcontext())
    want = torch.zeros_like(got)
    for i in range(loader.windows):
        (_, slots, _), = model.memory_reads(loader.window([i])[0])
        want[slots.flatten().long().unique()] += 1
    assert torch.equal(got, want)
    halves = 0
    for rank in (0, 1):
        part = readers.count_readers(model, loader, 10**6, contextlib.nullcontext(), rank, 2)
        halves = halves + part
    assert torch.equal(halves, want)


def test_a_dense_run_has_no_reads(base):
    assert not (base / "dense" / "reads.npz").exists()


# ---- inspecting

@pytest.mark.parametrize("name", WITH_TABLES)
def test_show_memory_shows_the_models_numbers(base, say, name, tmp_path):
    """As text, and as a page."""
    path = tmp_path / "page.html"
    text = say(name, "--show-memory", f"{somebody(base)} was born in", "--html", path)
    model, tok, args = loaded(base, name)
    ids = [tok.eot] + tok.encode(f"{somebody(base)} was born in")
    rows = [line for line in text.splitlines() if re.match(r".{18} *\d+ +\d\.\d\d", line)]
    layers = list(readers.read_windows(model, [ids]))
    assert len(rows) == len(layers) * len(ids)
    for layer, block in zip(layers, np.array_split(rows, len(layers))):
        for t, row in enumerate(block):
            numbers = row[18:].split()
            for h in range(layer.slots.shape[2]):
                slot, weight, mixed = numbers[3 * h:3 * h + 3]
                weights = layer.weights[0, t, h]
                assert int(slot) == layer.slots[0, t, h, weights.argmax()]
                assert float(weight) == pytest.approx(weights.max().item(), abs=0.006)
                p = weights / weights.sum()
                entropy = -sum(x * math.log(x) for x in p.tolist() if x > 0)
                assert float(mixed) == pytest.approx(math.exp(entropy), abs=0.06)
    assert f"written: {path}" in text
    check_page(path.read_text("utf-8"), layers, ids)


def check_page(page, layers, ids):
    """It needs nothing from elsewhere, and has the numbers of these layers, list of Reads."""
    for word in ("http://", "https://", "src=", "@import", "<link"):
        assert word not in page.replace("http://www.w3.org/2000/svg", "")
    data = json.loads(re.search(r"const data = (.*);\nconst SIZE", page, re.DOTALL)[1])
    assert len(data["words"]) == len(ids)
    for shown, reads in zip(data["layers"], layers):
        assert shown["slots"] == reads.slots[0].tolist()
        assert np.allclose(shown["weights"], reads.weights[0], atol=1e-4)
        strongest = reads.slots[0].gather(-1, reads.weights[0].argmax(-1, keepdim=True))
        for slot in strongest.flatten().tolist():
            assert data["about"][f"{reads.block}/{slot}"]["up"]


def test_prompts_are_compared(base, say):
    """By hand: for each token, the slots of a head that the same head of the other prompt reads."""
    model, tok, args = loaded(base, "two")
    name, other = (str(name) for name in recall.read_facts(base / "facts")["subject"][[0, 40]])
    prompts = [f"{name} was born in", f"{other} was born in", f"{name} was born in"]
    text = say("two", "--show-memory", *prompts)
    ids = [[tok.eot] + tok.encode(prompt) for prompt in prompts]
    tables = text.split("slots of a token")[1:]
    layers = list(readers.read_windows(model, ids))
    assert len(tables) == len(layers) == 2
    for table, reads in zip(tables, layers):
        rows = [line for line in table.splitlines() if " was born in" in line]
        counts = [list(map(int, row.split(" in ")[1].split())) for row in rows]
        for found, slots in zip(counts, reads.slots[1:].tolist()):
            for t, heads in enumerate(slots):
                first = reads.slots[0, t].tolist()
                assert found[t] == sum(len(set(a) & set(b)) for a, b in zip(first, heads))
        assert counts[0][0] == 8 > counts[0][2] and set(counts[1]) == {8}
    assert "as many tokens each, and these have 4, 3" in say("two", "--show-memory", "was born in",
                                                             "was born")


def test_a_word_that_is_spelled_in_bytes_is_named(base, capsys):
    assert sample.main([str(base / "memory"), "--show-memory", "Quux was", "--device", "cpu"]) == 0
    said = capsys.readouterr().err
    assert "'Quux'" in said and "it is spelled in bytes" in said


def test_slots_mixed():
    assert look.slots_mixed(torch.tensor([0.0, 1.0, 0.0])).item() == pytest.approx(1)
    assert look.slots_mixed(torch.full((5, 8), 0.125)).tolist() == pytest.approx([8] * 5)


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no node")
def test_the_page_runs(base, say, tmp_path):
    """Its script runs in node, with a document that only counts what is drawn and clicked."""
    path = tmp_path / "page.html"
    say("two", "--show-memory", f"{somebody(base)} likes", "--html", path)
    script = re.search(r"<script>(.*)</script>", path.read_text("utf-8"), re.DOTALL)[1]
    (tmp_path / "page.js").write_text("""
const made = [];
function node(name) {
  const n = { name, children: [], setAttribute() {}, replaceChildren() { this.children = []; },
              append(...c) { this.children.push(...c); }, scrollIntoView() {} };
  made.push(n);
  return n;
}
const byId = {};
const document = { createElement: node, createElementNS: (space, name) => node(name),
                   getElementById: id => byId[id] ??= node(id) };
""" + script + """
const count = name => made.filter(n => n.name === name).length;
const dots = count("circle");
byId.words.children[1].onclick();
made.filter(n => n.name === "circle").at(-1).onclick();
byId.layers.children[1].onclick();
console.log(dots, count("circle"), byId.words.children.length, byId.slot.children.length);
""", "utf-8")
    done = subprocess.run(["node", tmp_path / "page.js"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    dots, later, words, _ = map(int, done.stdout.split())
    assert dots == 2 * 4, "a dot for each head and slot of one token"
    assert later > dots
    assert words == 4


@pytest.mark.parametrize("name", WITH_TABLES)
def test_a_slots_biography(base, say, name):
    model, tok, args = loaded(base, name)
    with np.load(base / name / "reads.npz") as arrays:
        counts = arrays["readers_0"]
    first = next(readers.read_windows(model, recall.read_facts(base / name)["seen"][:1]))
    slot = first.slots[0, 2, 0, 0].item()  # of a name
    text = say(name, "--slot", slot)
    n = model.table.n_keys
    assert f"slot {slot}: left half-key {slot // n}, right half-key {slot % n}" in text
    assert f"{counts[slot]:,} of 2,048 windows of the training text read it" in text
    rows = re.findall(r"^ *(\d\.\d+) +(\d+) +(\d+)  (.+)$", text, re.MULTILINE)
    assert rows and [float(row[0]) for row in rows] == sorted(
        (float(row[0]) for row in rows), reverse=True)
    # The strongest reader does read it, in that layer and head, with that weight.
    weight, block, head, sentence = rows[0]
    ids = [tok.eot] + tok.encode(sentence)
    for reads in readers.read_windows(model, [ids]):
        if reads.block == int(block):
            is_slot = reads.slots[0, -1, int(head)] == slot
            assert reads.weights[0, -1, int(head)][is_slot].max().item() == pytest.approx(
                float(weight), abs=0.002)


def test_what_a_value_pushes(base):
    """A value that is a token's embedding pushes that token."""
    model, tok, args = loaded(base, "memory")
    word = tok.encode("born")[0]
    model.table.values.data[7] = 10 * model.wte.weight.data[word]
    logits = look.pushes(model, 7)[1]
    want = 10 * (model.wte.weight @ model.wte.weight[word])
    assert torch.allclose(logits, want, rtol=1e-4, atol=1e-4)
    up, _ = look.most_pushed(tok, logits)
    assert f"born {want[word]:+.2f}" in up


def test_the_map(base, say):
    text = say("two", "--map")
    with np.load(base / "two" / "reads.npz") as arrays:
        unread = (arrays["readers_0"] == 0).mean()
    assert f"{unread:7.1%} are read by none of them" in text
    assert (base / "two" / "map.png").read_bytes().startswith(b"\x89PNG")


# ---- ablating

def shares(text, row):
    """The percentages of a row of a table."""
    line = next(line for line in text.splitlines() if line.startswith(row))
    return [float(x) for x in re.findall(r"(\d+\.\d) %", line)]


class Nothing(Layer):
    """Stands where an MLP or memory layer was."""

    def forward(self, x, *more):
        return torch.zeros_like(x)


@pytest.mark.parametrize("name", WITH_TABLES)
def test_without_the_memory_less_is_known(base, say, name):
    text = say(name, "--ablate-memory")
    whole, = shares(text, "the whole model")
    without, = shares(text, "without the memory layers")
    # PEER knows less here, and keeps that in the rest of the model.
    assert whole > 10 and (without < whole or name == "peer")
    model, tok, args = loaded(base, name, "--ablate-memory")
    facts = recall.read_facts(base / name)
    known = np.flatnonzero(~facts["control"])
    assert whole == pytest.approx(100 * edit.share_known(model, facts, known), abs=0.06)
    for block, _ in model.memories():
        model.blocks[block].ffn = Nothing()
    assert without == pytest.approx(100 * edit.share_known(model, facts, known), abs=0.06)


def test_a_block_of_a_dense_model(base, say):
    text = say("dense", "--ablate-block", 1)
    assert shares(text, "the whole model") > shares(text, "without the MLP")


@pytest.mark.parametrize("name", ["memory", "two", "hash"])
def test_the_slots_of_somebody(base, say, name):
    """What is printed is what the models know whose slots are set to zero by hand."""
    text = say(name, "--ablate-memory", somebody(base), "--slots", 40)
    model, tok, args = loaded(base, name, "--ablate-memory", somebody(base), "--slots", 40)
    facts = recall.read_facts(base / name)
    mine = about(base, somebody(base))
    chosen = readers.slots_of_facts(model, facts["seen"][mine], args)
    rows = {"the whole model": [],
            "without 40": chosen,
            "without as many other slots": edit.read_as_often(model, chosen, args)}
    for row, slots in rows.items():
        changed = copy.deepcopy(model)
        changed.table.values.data[slots] = 0
        groups = (mine, edit.other_facts(facts, mine))
        want = [100 * edit.share_known(changed, facts, group) for group in groups]
        assert shares(text, row) == pytest.approx(want, abs=0.06)


def about(base, name):
    """The numbers of the facts about somebody."""
    return np.flatnonzero(recall.read_facts(base / "facts")["subject"] == name)


@pytest.mark.parametrize("name", ["memory", "two"])
def test_the_slots_of_a_person_hold_their_facts(base, name):
    """Without them those facts suffer more than without other slots, and more than other facts.

    Taken over all people, in nats: one of them has five facts, too few for a verdict.
    """
    model, tok, args = loaded(base, name, "--slots", 20)
    facts = recall.read_facts(base / name)

    def nats_without(slots):
        """The cross-entropy of every fact's answer, (F,)."""
        changed = copy.deepcopy(model)
        edit.zero_slots(changed, slots)
        return changed.answer(facts["seen"], facts["seen_span"])[1]

    whole = nats_without([])
    costs = []
    for person in sorted(set(facts["subject"][~facts["control"]])):
        mine = about(base, person)
        others = edit.other_facts(facts, mine)
        own = readers.slots_of_facts(model, facts["seen"][mine], args)
        cost_of_own = nats_without(own) - whole
        cost_of_control = nats_without(edit.read_as_often(model, own, args)) - whole
        costs.append([cost_of_own[mine].mean(), cost_of_control[mine].mean(),
                      cost_of_own[others].mean()])
    own, control, other_people = np.mean(costs, axis=0)
    assert own > control
    assert own > other_people


def test_scores_are_the_formula(base):
    """Slot by slot, by hand."""
    model, tok, args = loaded(base, "two")
    facts = recall.read_facts(base / "two")
    windows = facts["seen"][:3].astype("int64")
    text = B, counted = readers.load_readers(base / "two", model)
    got = readers.slot_scores(model, windows, *text)
    counts = torch.zeros(256)
    for window in windows:
        for _, slots, _ in model.memory_reads(torch.from_numpy(window)[None]):
            for slot in slots.flatten().tolist():
                counts[slot] += 1
    for slot in range(256):
        want = counts[slot] / counts.sum() * math.log((B + 1) / (1 + counted[slot]))
        assert got[slot].item() == pytest.approx(want.item(), abs=1e-6)


def test_the_control_is_read_as_often(base):
    model, tok, args = loaded(base, "memory")
    _, counted = readers.load_readers(base / "memory", model)
    chosen = torch.arange(0, 60, 2)
    others = edit.read_as_often(model, chosen, args)
    assert len(others) == len(chosen) == len(set(others.tolist()))
    assert not set(others.tolist()) & set(chosen.tolist())
    a = counted[chosen].sort().values.float()
    b = counted[others].sort().values.float()
    assert (a - b).abs().mean() < 0.15 * counted.float().mean()


# ---- teaching and forgetting

@pytest.fixture
def tables(base, tmp_path):
    """Two new facts about people who are not in the corpus, with words that are."""
    facts = recall.read_facts(base / "facts")
    tok = prepare_data.load_tokenizer(base / "facts")
    start, end = facts["seen_span"][0]
    answer = tok.decode(facts["seen"][0][start:end]).strip()
    known = [name.split() for name in facts["subject"][::5]]
    pairs = {(first, last) for first, _ in known for _, last in known}
    new = sorted(pairs - {tuple(name) for name in known})[:2]
    rows = "".join(f"birth\t{first} {last}\t{answer}\n" for first, last in new)
    (tmp_path / "new.tsv").write_text("relation\tsubject\tanswer\n" + rows)
    (tmp_path / "patterns.tsv").write_text(PATTERNS)
    return ["--teach", tmp_path / "new.tsv", "--patterns", tmp_path / "patterns.tsv",
            "--out", tmp_path / "taught"]


@pytest.mark.parametrize("name, how", [
    *((name, "slots") for name in WITH_TABLES), ("memory", "all-values"), ("memory", "full")])
def test_teach(base, say, tables, name, how):
    before = {path.name: path.read_bytes() for path in (base / name).iterdir()
              if path.suffix != ".png"}
    rate = ["--teach-rate", "1e-2"] if how == "full" else []
    text = say(name, *tables, "--teach-with", how, *rate)
    after = shares(text, "after")
    assert after[0] == 100 or name == "peer", text
    assert {path.name: path.read_bytes() for path in (base / name).iterdir()
            if path.suffix != ".png"} == before, "the old run is as it was"
    out = tables[-1]
    assert 100 * json.loads((out / "edit.json").read_text())["teach"]["after"][0] == after[0]
    assert sample.main([str(out), "--recall", str(subject_of(tables)), "--device", "cpu"]) == 0
    old, _ = load_checkpoint(base / name)
    new, _ = load_checkpoint(out)
    for (key, p), (_, q) in zip(old.named_parameters(), new.named_parameters()):
        if how != "full" and not key.endswith("values"):
            assert torch.equal(p, q), key
    changed = (old.table.values != new.table.values).any(dim=1).sum()
    assert changed > 0
    if how == "slots":
        steps = int(re.search(r"(\d+) steps in", text)[1])
        assert changed <= steps * (len(old.table.values) // 4)


def subject_of(tables):
    return tables[1].read_text().splitlines()[1].split("\t")[1]


def test_the_new_run_knows_the_new_facts(base, say, tables, capsys):
    say("memory", *tables)
    assert sample.main([str(tables[-1]), "--recall", subject_of(tables), "--device", "cpu"]) == 0
    assert "1 of 1 right" in capsys.readouterr().out
    # And it can be taught again, or trained further.
    again = [*tables[:-1], tables[-1].with_name("again")]
    assert sample.main([str(tables[-1]), *map(str, again), "--device", "cpu"]) == 0


def test_a_single_fact_is_taught(say, tables):
    path = tables[1]
    path.write_text("\n".join(path.read_text().splitlines()[:2]) + "\n")
    assert shares(say("memory", *tables), "after")[0] == 100


def test_a_taught_fact_takes_the_place_of_the_old_one(base, say, tables):
    """People of the control group stand in recall.npz already, under `never read`."""
    facts = recall.read_facts(base / "facts")
    control = np.flatnonzero(facts["control"])[0]
    name = facts["subject"][control]
    path = tables[1]
    path.write_text(path.read_text().replace(subject_of(tables), name))
    before = recall.read_facts(base / "memory")
    say("memory", *tables)
    after = recall.read_facts(tables[-1])
    assert len(after["control"]) == len(before["control"]) + 1, "one is new, one is another"
    asked = edit.questions(after["seen"], after["seen_span"])
    assert len(set(asked)) == len(asked)


def test_what_goes_with_what(say):
    assert "two experiments" in say("memory", "--ablate-memory", "--ablate-block", 1)
    assert "leave the rest out" in say("memory", "--map", "--ablate-memory")
    assert "--out is for" in say("memory", "--out", "x")


def test_only_the_chosen_slots_learn(base, tables):
    """One step: the values that change are those of the best slots."""
    model, tok, args = loaded(base, "memory", *tables, "--slots", 9, "--teach-steps", 1)
    _, sentences, windows = edit.new_facts(model, tok, args)
    edit.make_trainable(model)
    text = readers.load_readers(base / "memory", model)
    old = copy.deepcopy(model)
    rows = np.concatenate([f + np.arange(n) for f, n in zip(sentences.first, sentences.trained)])
    scores = readers.slot_scores(model, windows[rows].astype("int64"), *text)
    best = scores.topk(9).indices
    steps = edit.teach_model(model, sentences, windows, text, args)
    moved = (model.table.values != old.table.values).any(dim=1).nonzero().flatten()
    assert steps == 1
    assert 0 < len(moved) and set(moved.tolist()) <= set(best.tolist())


def test_teaching_reads_a_few_sentences_at_a_time(base, tables, monkeypatch):
    """So that memory is bounded. The gradients are those of all sentences at once."""
    taught = []
    largest = []
    for at_once in (1000, 2):
        model, tok, args = loaded(base, "memory", *tables, "--teach-with", "all-values",
                                  "--teach-steps", 2)
        monkeypatch.setattr("model.TOKENS_AT_ONCE", at_once * model.config.block_size)
        _, sentences, windows = edit.new_facts(model, tok, args)
        edit.make_trainable(model)
        batches = []
        model.register_forward_pre_hook(lambda model, inputs: batches.append(len(inputs[0])))
        edit.teach_model(model, sentences, windows, None, args)
        taught.append(model.table.values.detach())
        largest.append(max(batches))
    assert largest[0] > largest[1] == 2
    assert torch.allclose(*taught, atol=1e-6)


@pytest.mark.parametrize("name", ["memory", "two"])
def test_forget(base, say, name, tmp_path):
    slots = 60
    out = tmp_path / "without"
    text = say(name, "--forget", somebody(base), "--out", out, "--slots", slots)
    new, _ = load_checkpoint(out)
    old, _ = load_checkpoint(base / name)
    facts = recall.read_facts(base / name)
    mine = about(base, somebody(base))
    for row, model in (("before", old), ("after", new)):
        want = [100 * edit.share_known(model, facts, group)
                for group in (mine, edit.other_facts(facts, mine))]
        assert shares(text, row) == pytest.approx(want, abs=0.06)
    before, after = (model.answer(facts["seen"][mine], facts["seen_span"][mine])[1].mean()
                     for model in (old, new))
    assert after > before, "their answers have become less likely"
    gone = (new.table.values == 0).all(dim=1)
    assert 0.6 * slots < gone.sum() <= slots
    assert torch.equal(old.table.values[~gone], new.table.values[~gone])


def test_a_bfloat16_table_in_slices_is_taught(base, say, tables, tmp_path):
    """A checkpoint as two ranks write it becomes a whole one."""
    run = tmp_path / "sliced"
    shutil.copytree(base / "memory", run)
    _, state = load_checkpoint(base / "memory")
    names = ["ckpt-500-0of2.pt", "ckpt-500-1of2.pt"]
    for i, name in enumerate(names):
        part = state["values"][0].chunk(2, dim=1)[i].bfloat16().clone()
        torch.save(dict(values=[part]), run / name)
    settings = state["settings"] | dict(mem_dtype="bfloat16")
    torch.save(state | dict(slices=names, settings=settings, values=[]), run / "ckpt.pt")
    assert sample.main([str(run), *map(str, tables), "--device", "cpu"]) == 0
    new, state = load_checkpoint(tables[-1])
    assert new.table.values.dtype == torch.bfloat16 and state["slices"] == []


# ---- what is wrong

@pytest.mark.parametrize("flags, said", [
    (["--show-memory", "Tasia"], "is dense, it reads no table"),
    (["--slot", 3], "is dense, it reads no table"),
    (["--map"], "is dense, it reads no table"),
    (["--ablate-memory"], "is dense, it has no memory layers"),
    (["--ablate-block", 2], "--ablate-block 2 is not in 0..1"),
])
def test_a_dense_run(base, say, flags, said):
    assert said in say("dense", *flags)


@pytest.mark.parametrize("flags", [["--show-memory", "Tasia"], ["--slot", 3], ["--map"]])
def test_rows_that_are_read_in_four_ways_are_not_shown(say, flags):
    said = say("ultramem", *flags)
    assert "is ultramem, where a row of the table stands for several slots" in said


@pytest.mark.parametrize("flags, said", [
    (["--slot", 256], "--slot 256 is not in 0..255"),
    (["--slot", -1], "--slot -1 is not in 0..255"),
    (["--forget", "Nobody", "--out", "x"], "no fact is about 'Nobody': try "),
    (["--forget", "Nobody", "--out", "x", "--slots", 0], "--slots 0 is not at least 1: raise it"),
    (["--show-memory", "was", "--html", "no/page.html"], "there is no folder no: make it"),
    (["--forget", "Nobody"], "name it with --out"),
    (["--ablate-memory", "Nobody"], "no fact is about 'Nobody': try "),
    (["--teach", "x.tsv"], "name it with --out"),
    (["--teach", "x.tsv", "--out", "y"], "--teach needs --patterns"),
    (["--html", "x.html"], "--html is for --show-memory"),
    (["--show-memory", ""], "the prompt '' makes no tokens"),
    (["--show-memory", "was born in " * 9], "> block_size"),
])
def test_what_cannot_be(base, say, flags, said):
    assert said in say("memory", *flags)


def test_missing_files(base, say, tables, tmp_path):
    assert "does not exist" in say("memory", "--teach", "no.tsv", "--patterns", "no.tsv", "--out",
                                   tmp_path / "a")
    run = tmp_path / "run"
    shutil.copytree(base / "memory", run)
    (run / "reads.npz").unlink()
    assert sample.main([str(run), "--map", "--device", "cpu"]) == 1
    assert sample.main([str(run), "--forget", somebody(base), "--out", str(tmp_path / "b"),
                        "--device", "cpu"]) == 1


def test_nothing_is_replaced(base, say, tables):
    Path(tables[-1]).mkdir()
    assert "exists already" in say("memory", *tables)


def test_what_was_interrupted_can_be_started_again(say, tables, monkeypatch):
    out = tables[-1]

    def full(state, path):
        return "the disk is full"

    with monkeypatch.context() as patch:
        patch.setattr(edit, "try_to_save", full)
        assert "the disk is full" in say("memory", *tables)
    assert not out.exists(), "it would look like a run"
    say("memory", *tables)
    assert {"ckpt.pt", "config.json", "edit.json", "recall.npz"} <= {p.name for p in out.iterdir()}
    assert [p.name for p in out.parent.iterdir() if p.name.startswith(out.name)] == [out.name]


@pytest.mark.parametrize("row, said", [
    ("birth\tZorb Quux\tPemchester", "3 sentences have 'Zorb', a word that the run's"),
    ("birth\t{long}\t{answer}", "the run's window has room for"),
])
def test_facts_that_cannot_be_taught(say, tables, row, said):
    path = tables[1]
    first, last = subject_of(tables).split()
    answer = path.read_text().split("\t")[-1].strip()
    row = row.replace("{long}", f"{first} {last} " * 4).replace("{answer}", answer)
    path.write_text("relation\tsubject\tanswer\n" + row + "\n")
    assert said in say("memory", *tables)
    assert not tables[-1].exists()


# ---- the lesson

LESSON = (Path(__file__).parents[1] / "docs" / "lesson.md").read_text("utf-8")


def test_the_commands_of_the_lesson_run(base, capsys, tmp_path, tables):
    """Every command of docs/lesson.md, in its order, on a small run. Teaching takes ten steps."""
    place = {"out/facts-memory-1337": base / "memory", "out/facts-dense-1337": base / "dense",
             "Rasia Westshaw": somebody(base), "data/facts": base / "facts",
             "--slot 4808": "--slot 47", "--ablate-block 2": "--ablate-block 0",
             "page.html": tmp_path / "page.html",
             "runs/new_facts.tsv": tables[1], "runs/new_patterns.tsv": tables[3]}
    facts = recall.read_facts(base / "facts")
    for name in ("Temar Upson", "Nasia Westshaw", "Rasia Upson"):
        place[name] = facts["subject"][0]
    place["Sisel Westshaw"] = facts["subject"][facts["control"]][0]
    commands = re.findall(r"^    python (.*)|`python (sample.py .*?)`", LESSON, re.MULTILINE)
    commands = [indented or inline for indented, inline in commands]
    assert len(commands) >= 15
    for command in commands:
        for word, stand_in in place.items():
            command = command.replace(word, str(stand_in))
        script, *argv = shlex.split(re.sub(r"(?<=[ =])out/", f"{tmp_path}/", command))
        if script == "sample.py":
            capsys.readouterr()
            assert sample.main([*argv, "--device", "cpu", "--teach-steps", "10"]) == 0, command
            assert capsys.readouterr().out
        else:
            assert script == "train.py"
