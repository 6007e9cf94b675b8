"""Change what a memory holds: ablate, teach and forget."""
import copy
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch

from support.checkpoint import load_checkpoint, own_weights, try_to_save
from support.files import write_arrays, write_json
from support.own_facts import put_into_words, read_own_facts, recall_arrays, say
from support.readers import layers_with_slots, load_readers, slot_scores, slots_of_facts
from support.recall import numbers_about, read_facts
from support.terminal import counted


# ---- ablate

def silence(model, block):
    """The MLP or memory layer of a block gives zeros from now on."""
    model.blocks[block].ffn.register_forward_hook(lambda layer, x, y: torch.zeros_like(y))


def zero_slots(model, slots):
    """Set the values of these slots to zero."""
    model.table.values.data[slots] = 0  # (S, D)


def ablate(model, args):
    """Do what --ablate-block or --ablate-memory asks for -> what that was in words, or ""."""
    if args.ablate_block is not None:
        last = model.config.n_layer - 1
        if not 0 <= args.ablate_block <= last:
            raise ValueError(f"--ablate-block {args.ablate_block} is not in 0..{last}")
        silence(model, args.ablate_block)
        return f"without the MLP or memory layer of block {args.ablate_block}"
    if args.ablate_memory is None:
        return ""
    if not model.table:
        raise ValueError(f"--ablate-memory: {args.run} is {model.config.ffn}, it has no memory "
                         f"layers to ablate: leave it out, or use --ablate-block")
    if args.ablate_memory == "":
        for block, _ in model.memories():
            silence(model, block)
        return "without the memory layers"
    facts = read_facts(args.run)
    mine = numbers_about(args.ablate_memory, facts)
    chosen = slots_of_facts(model, facts["seen"][mine], args)
    zero_slots(model, chosen)
    return f"without {counted(len(chosen), 'slot')} of {args.ablate_memory}"


def read_as_often(model, slots, args):
    """As many other slots, which about as many windows read."""
    _, readers = load_readers(args.run, model)  # (S,)
    generator = torch.Generator().manual_seed(args.seed)
    # The free slots in order of their readers, ties at random. Each of the slots takes the next of
    # them that has at least as many readers, or, at the end, the last ones.
    key = readers + torch.rand(len(readers), generator=generator)  # (S,)
    is_free = torch.ones(len(readers), dtype=torch.bool)
    is_free[slots] = False
    free = is_free.nonzero().flatten()
    free = free[key[free].argsort()]  # (S - slots,)
    wanted = key[slots].sort().values  # (slots,)
    at = torch.searchsorted(key[free], wanted)  # (slots,), rising
    # Slots that want the same place stand in line: the i-th cannot be before place i.
    line = torch.arange(len(at))
    at = (at - line).cummax(0).values + line
    at = torch.minimum(at, len(free) - len(at) + line)
    return free[at[at >= 0]]


# How many facts are asked before and after a change. All would take ten times as long.
OLD_FACTS = 4000


def other_facts(facts, mine):
    """Numbers of some facts that stand in the training text, without `mine`."""
    others = np.setdiff1d(np.flatnonzero(~facts["control"]), mine)
    return np.random.default_rng(0).permutation(others)[:OLD_FACTS]


def share_known(model, facts, numbers):
    """The share of these facts that the model completes, None if there are none."""
    if not len(numbers):
        return None
    right, _ = model.answer(facts["seen"][numbers], facts["seen_span"][numbers])
    return float(right.mean())


def measure_ablation(model, args):
    """What is known with and without what is ablated -> titles of columns, {row: shares}."""
    facts = read_facts(args.run)
    less = copy.deepcopy(model)
    models = {"the whole model": model}
    groups = {}
    mine = []
    what = ablate(less, args)
    models[what] = less
    if args.ablate_memory:
        mine = numbers_about(args.ablate_memory, facts)
        groups[f"{counted(len(mine), 'fact')} about {args.ablate_memory}"] = mine
        control = copy.deepcopy(model)
        chosen = slots_of_facts(model, facts["seen"][mine], args)
        zero_slots(control, read_as_often(model, chosen, args))
        models["without as many other slots that are read as often"] = control
    others = other_facts(facts, mine)
    title = "other fact" if args.ablate_memory else "fact"
    groups[counted(len(others), title)] = others
    rows = {}
    for name, changed in models.items():
        rows[name] = [share_known(changed, facts, group) for group in groups.values()]
    return list(groups), rows


def show_ablation(model, tok, about, args):
    """Print what the model still knows when something is ablated."""
    titles, rows = measure_ablation(model, args)
    print(about, file=sys.stderr)
    print_shares("facts recalled", titles, rows)


def print_shares(corner, titles, rows):
    """A table of percentages. rows: {name: list of shares, None for an empty cell}."""
    left = max(len(name) for name in [corner, *rows])
    print(corner.ljust(left) + "".join(f"   {title}" for title in titles))
    for name, shares in rows.items():
        cells = ["" if share is None else f"{100 * share:.1f} %" for share in shares]
        print(name.ljust(left) + "".join(f"   {cell:>{len(title)}}"
                                         for cell, title in zip(cells, titles)))


# ---- teach

def new_facts(model, tok, args):
    """The facts to teach -> (facts, sentences, windows) of own_facts.

    Sentences with a word that the tokenizer does not know, or longer than the window, are named,
    the first ten of them. Then it raises ValueError.
    """
    facts, patterns = read_own_facts(Path(args.teach), Path(args.patterns))
    T = model.config.block_size
    wrong = {}  # what is wrong: the sentences
    for fact in facts:
        for pattern in patterns[fact.relation]:
            text, _ = say(pattern, fact)
            unknown = tok.unknown_words(text)
            if unknown:
                wrong.setdefault(f"{unknown[0]!r}, a word that the run's tokenizer does not know",
                                 []).append(text)
            elif len(tok.encode(text)) + 1 > T:
                wrong.setdefault(f"more than the {T - 1} tokens that the run's window has room for",
                                 []).append(text)
    for fault, texts in list(wrong.items())[:10]:
        have = counted(len(texts), "sentence has", "sentences have")
        print(f"{have} {fault}, as {texts[0]!r}", file=sys.stderr)
    if wrong:
        count = sum(map(len, wrong.values()))
        raise ValueError(f"{counted(count, 'sentence')} cannot be taught (the faults stand above): "
                         f"change the tables, or train on a corpus that has these words")
    facts, sentences = put_into_words(facts, patterns, tok, T)
    windows = np.full((len(sentences.texts), T), tok.eot, "<u2")  # (sentences, T)
    for row, text in zip(windows, sentences.texts):
        row[1:len(text) + 1] = text
    return facts, sentences, windows


def taught_recall(model, sentences, windows):
    """The share of the new facts that are known in their first phrasing, and in the unseen one."""
    def share(rows):
        if not len(rows):
            return None
        right, _ = model.answer(windows[rows], sentences.spans[rows])
        return float(right.mean())
    return share(sentences.first), share(sentences.unseen[sentences.unseen >= 0])


ENOUGH = 0.95  # the share of the new facts that teach() aims for


LOOK_EVERY = 5  # steps, after which it looks


def teach_model(model, sentences, windows, text_reads, args):
    """Train until 95% of the new facts are known -> steps taken.

    slots: SGD on the values of the --slots slots that the sentences of the text read far more than
    the training text does, chosen anew for each step; all else is frozen (arXiv 2510.15103).
    all-values: SGD on all values. full: AdamW on all that the model has.
    text_reads: what load_readers returns, for slots.
    """
    # The sentences that are trained on, of all facts.
    rows = np.concatenate([f + np.arange(n) for f, n in zip(sentences.first, sentences.trained)])
    x = torch.from_numpy(windows[rows].astype("int64")).to(model.wte.weight.device)  # (rows, T)
    weight = answer_weights(sentences, rows, x.shape[1]).to(x.device)  # (rows, T-1)
    if args.teach_with == "full":
        optimizer = torch.optim.AdamW(model.parameters(), args.teach_rate or 1e-4, weight_decay=0)
    else:
        optimizer = torch.optim.SGD([model.table.values], args.teach_rate or 10.0)
    b = min(512, model.windows_at_once(x.shape[1]))
    step = 0
    while step < args.teach_steps:
        step += 1
        model.zero_grad()
        for part, w in zip(x.split(b), weight.split(b)):  # (b, T), (b, T-1)
            _, loss = model(part[:, :-1], part[:, 1:], reduction="none")  # (b, T-1)
            (loss * w).sum().backward()
        if args.teach_with == "slots":
            keep_gradient_of_best(model, windows[rows], text_reads, args.slots)
        optimizer.step()
        if step % LOOK_EVERY == 0 and taught_recall(model, sentences, windows)[0] >= ENOUGH:
            break
    return step


def answer_weights(sentences, rows, T):
    """The weight of each token's loss, (rows, T-1): only answers count, and each fact once.

    rows: numbers of sentences, those of a fact next to each other. T: tokens of a window.
    """
    share = np.repeat(1 / sentences.trained, sentences.trained)  # (rows,)
    place = np.arange(1, T)  # (T-1,)
    start, end = sentences.spans[rows].T[:, :, None]  # (rows, 1) both
    asked = (place >= start) & (place < end)  # (rows, T-1)
    return torch.from_numpy(asked * share[:, None]).float()


@torch.no_grad()
def keep_gradient_of_best(model, windows, text_reads, count):
    """Zero the gradient of all values but those of the best `count` slots of these windows."""
    values = model.table.values  # (S, D)
    score = slot_scores(model, windows, *text_reads)  # (S,)
    best = score.topk(min(count or max(len(score) // 4, 1), len(score))).indices  # (count,)
    rest = torch.ones(len(score), dtype=torch.bool, device=values.device)
    rest[best.to(rest.device)] = False
    values.grad[rest] = 0


def teach(model, tok, about, args):
    """Teach new facts, print what is learnt and what is lost, and write a new run folder."""
    old = read_facts(args.run)
    if args.teach_with != "full":
        layers_with_slots(model)
    facts, sentences, windows = new_facts(model, tok, args)
    text_reads = None
    if args.teach_with == "slots":
        text_reads = load_readers(args.run, model)
    new_folder(args)
    make_trainable(model)
    others = other_facts(old, about_same_subjects(old, facts))
    print(about, file=sys.stderr)
    rows = {"before": [*taught_recall(model, sentences, windows),
                       share_known(model, old, others)]}
    begin = time.perf_counter()
    changed = []
    if model.table:
        values = model.table.values.detach().clone()  # (S, D)
    steps = teach_model(model, sentences, windows, text_reads, args)
    if model.table:
        round_values(model)
        changed = [(model.table.values.detach() != values).any(dim=1).sum().item()]
    seconds = time.perf_counter() - begin
    rows["after"] = [*taught_recall(model, sentences, windows), share_known(model, old, others)]
    titles = [counted(len(facts), "new fact"), "unseen phrasing", counted(len(others), "old fact")]
    print_shares("facts recalled", titles, rows)
    for slots in changed:
        print(f"changed: {slots:,} of {len(model.table.values):,} slots")
    print(f"{counted(steps, 'step')} in {seconds:.1f} s")
    if rows["after"][0] < ENOUGH:
        print(f"fewer than {ENOUGH:.0%} were learnt: raise --teach-steps, --slots or --teach-rate")
    report = dict(taught_with=args.teach_with, facts=len(facts), slots=args.slots, steps=steps,
                  seconds=seconds, changed=changed, titles=titles, **rows)
    save_edited(model, args, dict(teach=report), with_facts(old, facts, sentences, windows))


def make_trainable(model):
    """Give the table's values a gradient in float32, also those of a bfloat16 table."""
    if model.table:
        model.table.values = torch.nn.Parameter(model.table.values.detach().float())  # (S, D)
    model.eval()  # no dropout


def round_values(model):
    """What is measured afterwards is what will be saved: a bfloat16 table rounds small steps away.
    """
    dtype = getattr(torch, model.config.mem_dtype)
    values = model.table.values  # (S, D)
    values.data = values.data.to(dtype).float()


def about_same_subjects(old, facts):
    """Numbers of the old facts whose subject is among those of the new facts."""
    return np.flatnonzero(np.isin(old["subject"], [fact.subject for fact in facts]))


def questions(windows, spans):
    """The tokens before each answer, as tuples: the same question has the same tokens."""
    return [tuple(window[:start].tolist()) for window, (start, _) in zip(windows, spans)]


def with_facts(old, facts, sentences, windows):
    """The arrays of recall.npz with the new facts, in the place of old ones with their question."""
    n = len(facts)
    new = recall_arrays(facts, sentences, windows, np.zeros(n, int),
                                     np.zeros(n, bool))
    old = dict(old)
    old.setdefault("has_unseen", np.ones(len(old["control"]), bool))
    asked = set(questions(new["seen"], new["seen_span"]))
    stays = np.array([question not in asked
                      for question in questions(old["seen"], old["seen_span"])])  # (old facts,)
    old = {name: array[stays] for name, array in old.items()}
    return {name: np.concatenate([old[name], new[name]]) for name in new if name in old}


# ---- forget

def forget(model, tok, about, args):
    """Zero the slots of the facts about somebody, print what goes, and write a new run folder."""
    facts = read_facts(args.run)
    mine = numbers_about(args.forget, facts)
    others = other_facts(facts, mine)
    chosen = slots_of_facts(model, facts["seen"][mine], args)
    new_folder(args)
    print(about, file=sys.stderr)
    rows = {"before": [share_known(model, facts, group) for group in (mine, others)]}
    zero_slots(model, chosen)
    rows["after"] = [share_known(model, facts, group) for group in (mine, others)]
    titles = [f"{counted(len(mine), 'fact')} about {args.forget}",
              counted(len(others), "other fact")]
    print_shares("facts recalled", titles, rows)
    if rows["before"][0] == 0:
        print("it knew none of these: for a better experiment, choose somebody whom --recall knows")
    print(f"zeroed: {len(chosen):,} of {len(model.table.values):,} slots")
    if args.slots and len(chosen) < args.slots:
        print("these are all that the sentences read")
    save_edited(model, args, dict(forget=dict(name=args.forget, titles=titles, **rows)), facts)


# ---- the new run folder

def unfinished(args):
    """What the folder --out is called until it is whole."""
    return Path(f"{Path(args.out)}.part")


def new_folder(args):
    """Begin the folder --out with copies of what stays as it is. It must not be there yet."""
    out = Path(args.out)
    if out.exists():
        raise ValueError(f"--out {out} exists already, and nothing is replaced: choose another")
    part = unfinished(args)
    try:
        shutil.rmtree(part, ignore_errors=True)  # of a command that was interrupted
        part.mkdir(parents=True)
        for name in ("config.json", "meta.json", "tokenizer.tiktoken", "reads.npz"):
            if (Path(args.run) / name).exists():
                shutil.copy(Path(args.run) / name, part / name)
    except OSError as error:
        raise ValueError(f"cannot write in {out} ({error.strerror}): choose another --out") \
            from None


def save_edited(model, args, report, facts):
    """Write the changed model as a run folder of its own, --out: for sample.py and --init-from."""
    part = unfinished(args)
    _, state = load_checkpoint(args.run)
    weights = model.state_dict()
    for name in ("wte.weight", "head.weight"):  # load() cut off the tokens that have no text
        whole = state["model"][name].clone()  # (V, C)
        whole[:len(weights[name])] = weights[name].cpu()
        weights[name] = whole
    state["model"] = {name: weights[name].cpu() for name in own_weights(model)}
    dtype = getattr(torch, model.config.mem_dtype)
    state["values"] = [model.table.values.detach().cpu().to(dtype)] if model.table else []
    state.pop("tables", None)  # where older files have the values
    state["slices"] = []
    problem = try_to_save(state, part / "ckpt.pt")
    if problem:
        raise ValueError(problem)
    write_arrays(part / "recall.npz", **facts)
    write_json(part / "edit.json", dict(run=args.run, **report))
    part.rename(args.out)
    print(f"saved in {Path(args.out)}: ckpt.pt, recall.npz, edit.json")
