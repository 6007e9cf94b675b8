"""Inspect a memory: what a prompt reads, a slot's biography, the map of slots, a page to browse."""
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from support.data_folder import is_facts
from support.files import reading
from support.readers import layers_with_slots, load_readers, read_windows
from support.recall import plain_text, read_facts


# ---- what a prompt reads

def slots_mixed(weights):
    """How many slots a head really mixes: exp(entropy) of its weights. (..., K) -> (...).

    1 if a single slot has all the weight, K if all have the same.
    """
    p = weights / weights.sum(-1, keepdim=True)  # (..., K)
    return torch.special.entr(p).sum(-1).exp()


def show_memory(model, tok, prompts, about, args):
    """Print which slots each token of a prompt reads. With --html as a page, too.

    prompts: the tokens of each, lists of int. With several of them, how many slots they share.
    """
    if len({len(ids) for ids in prompts}) > 1:
        counts = ", ".join(str(len(ids)) for ids in prompts)
        raise ValueError(f"--show-memory: to be compared, prompts must have as many tokens each, "
                         f"and these have {counts}: change them")
    words = [spelling(tok, i) for i in prompts[0]]
    layers = []
    others = []
    for reads in read_windows(model, prompts):  # of (prompts, T, H, K)
        layers.append(reads._replace(slots=reads.slots[0], weights=reads.weights[0]))  # (T, H, K)
        others.append(reads.slots[1:])  # (prompts - 1, T, H, K)
    print(about, file=sys.stderr)
    for reads, slots in zip(layers, others):
        print(reads_table(reads, words))
        if len(slots):
            print("\n" + shared_table(reads, slots, words, args.show_memory[1:]))
    if args.html:
        page = page_of(model, tok, layers, words, args)
        Path(args.html).write_text(page, "utf-8")
        print(f"written: {args.html}, to be opened in a browser")


def spelling(tok, i):
    """A token as text that can be seen."""
    if i == tok.eot:
        return "(begin)"
    text = tok.tokens[i].decode("utf-8", "replace")
    return text.strip() or repr(text)


def reads_table(reads, words):
    """The table of --show-memory for one layer. reads: with (T, H, K)."""
    T, H, K = reads.slots.shape
    mixed = slots_mixed(reads.weights)  # (T, H)
    best = reads.weights.argmax(-1)  # (T, H)
    lines = [f"block {reads.block}, for each head: the slot with the largest weight, that weight, "
             f"and how many of {K} slots it mixes"]
    lines.append("token".ljust(18) + "".join(f"head {h}".ljust(22) for h in range(H)))
    for t in range(T):
        line = words[t].ljust(18)
        for h in range(H):
            k = best[t, h]
            slot = reads.slots[t, h, k]
            line += f"{slot:6d} {reads.weights[t, h, k]:5.2f} {mixed[t, h]:5.1f}".ljust(22)
        lines.append(line.rstrip())
    return "\n".join(lines)


def shared_table(reads, others, words, prompts):
    """How many of the slots that a token reads the same token of another prompt reads, too.

    reads: with (T, H, K). others (prompts, T, H, K): the slots of the other prompts.
    """
    T, H, K = reads.slots.shape
    width = max(len(word) for word in words) + 2
    left = max(len(prompt) for prompt in prompts) + 2
    lines = [f"block {reads.block}: of the {H * K} slots of a token, how many are read in the same "
             f"place of another prompt",
             " " * left + "".join(word.rjust(width) for word in words)]
    for prompt, slots in zip(prompts, others):
        # A head looks for its own slots, so a slot counts once for each head that reads it.
        is_shared = (reads.slots[..., :, None] == slots[..., None, :]).any(-1)  # (T, H, K)
        counts = is_shared.sum(dim=(1, 2)).tolist()
        lines.append(prompt.ljust(left) + "".join(f"{count:{width}d}" for count in counts))
    return "\n".join(lines)


# ---- a slot, and all slots

def draw_map(model, tok, about, args):
    """Draw the slots as a grid, by how much of the training text reads them."""
    windows, readers = load_readers(args.run, model)
    n = model.table.n_keys
    share = readers.view(n, n) / windows  # (n, n)
    print(about, file=sys.stderr)
    from matplotlib.figure import Figure  # it takes a while, and only this needs it
    figure = Figure(figsize=(6.5, 5.5), layout="constrained")
    ax = figure.subplots()
    # Slots that no window reads stay grey: a logarithmic scale has no zero.
    ax.set_facecolor("#bbbbbb")
    image = ax.imshow((100 * share).numpy(), norm="log", cmap="viridis")
    figure.colorbar(image, label="% of the windows of the training text that read it")
    ax.set(xlabel="right half-key", ylabel="left half-key")
    ax.set_title(f"The {n * n:,} slots of the table", loc="left")
    picture = Path(args.run) / "map.png"
    figure.savefig(picture, dpi=100)
    print(f"{windows:,} windows of the training text. Of the {n * n:,} slots")
    print(f"{(share == 0).float().mean():7.1%} are read by none of them (grey in the picture)")
    print(f"{(share > 0.5).float().mean():7.1%} are read by more than half of them")
    for side, dim in (("left", 1), ("right", 0)):
        best = share.mean(dim=dim).topk(min(3, n))  # (3,) both
        most = ", ".join(f"{i} ({mean:.0%})" for i, mean in zip(best.indices, best.values))
        print(f"{side} half-keys whose slots are read most, by so many of the windows: {most}")
    print(f"drawn: {picture}")


class Reader(NamedTuple):
    """A token that reads a slot. text: the sentence up to it."""
    weight: float
    block: int
    head: int
    text: str


# So many facts are looked through for those that read a slot.
FACTS_LOOKED_THROUGH = 8000


def readers_of(model, tok, run, chosen):
    """Who reads these slots, among the tokens of some facts: {slot: list of Reader}, strongest
    first. chosen: numbers of slots.
    """
    if not is_facts(run):  # a text, which has no facts
        return {slot: [] for slot in chosen}
    windows = read_facts(run)["seen"]  # (F, T)
    order = np.random.default_rng(0).permutation(len(windows))
    windows = windows[order[:FACTS_LOOKED_THROUGH]]
    is_chosen = torch.zeros(len(model.table.values), dtype=torch.bool)  # (S,)
    is_chosen[chosen] = True
    found = {slot: set() for slot in chosen}
    at_once = model.windows_at_once(windows.shape[1])
    for i in range(0, len(windows), at_once):
        part = windows[i:i + at_once]  # (b, T)
        for reads in read_windows(model, part):
            for b, t, h, k in is_chosen[reads.slots].nonzero().tolist():
                if part[b, t] == tok.eot:
                    continue
                text = plain_text(tok, [j for j in part[b, :t + 1] if j != tok.eot])
                slot = reads.slots[b, t, h, k].item()
                found[slot].add(Reader(reads.weights[b, t, h, k].item(), reads.block, h, text))
    return {slot: sorted(readers, reverse=True) for slot, readers in found.items()}


@torch.no_grad()
def pushes(model, slot):
    """How far a slot's value moves the logit of each token, by layer: {block: (V,) float32}.

    An approximation: the value goes straight through the layer's output matrix and the head. It
    skips the gate, the blocks that follow and the last norm.
    """
    found = {}
    for block, layer in layers_with_slots(model):
        y = layer.written_by(model.table.values[slot].float())  # (C,)
        found[block] = (model.wte.weight.float() @ y).cpu()  # (V,)
    return found


def most_pushed(tok, logits, count=8):
    """The tokens that are pushed up most and down most, as text."""
    if tok.name == "words":
        logits = logits.clone()
        logits[:256] = 0  # bytes, of which most stand in no text and were never trained
    up = [f"{spelling(tok, i)} {logits[i]:+.2f}" for i in logits.topk(count).indices.tolist()]
    down = [f"{spelling(tok, i)} {logits[i]:+.2f}" for i in (-logits).topk(count).indices.tolist()]
    return "  ".join(up), "  ".join(down)


def show_slot(model, tok, about, args):
    """Print a slot's biography: how much it is used, by whom, and what it writes."""
    layers_with_slots(model)
    n = model.table.n_keys
    if not 0 <= args.slot < n * n:
        raise ValueError(f"--slot {args.slot} is not in 0..{n * n - 1}")
    windows, readers = load_readers(args.run, model)
    who = readers_of(model, tok, args.run, [args.slot])[args.slot]
    print(about, file=sys.stderr)
    print(f"slot {args.slot}: left half-key {args.slot // n}, right half-key {args.slot % n}")
    print(f"{readers[args.slot]:,} of {windows:,} windows of the training text read it")
    if who:
        print(f"\n{len(who):,} beginnings of sentences read it at their last word, the strongest:")
        print("weight block head")
    for reader in who[:args.count]:
        print(f"{reader.weight:6.3f} {reader.block:5d} {reader.head:4d}  {reader.text}")
    for block, logits in pushes(model, args.slot).items():
        up, down = most_pushed(tok, logits)
        print(f"\nits value, read by block {block}, pushes the next token (roughly: the gate, "
              f"later blocks and the last norm are skipped)\n  up:   {up}\n  down: {down}")


# ---- the page

# Slots of each head that the page tells more about. To look through the facts takes a while.
SLOTS_ON_PAGE = 4


def page_of(model, tok, layers, words, args):
    """The page of --html: memory.html with the numbers of this text put in."""
    about = {}
    for reads in layers:
        best = reads.weights.topk(min(SLOTS_ON_PAGE, reads.slots.shape[-1])).indices  # (T, H, few)
        chosen = sorted(set(reads.slots.gather(-1, best).flatten().tolist()))
        who = readers_of(model, tok, args.run, chosen)
        for slot in chosen:
            up, down = most_pushed(tok, pushes(model, slot)[reads.block])
            first = [f"{reader.text} ({reader.weight:.2f})" for reader in who[slot][:8]]
            about[f"{reads.block}/{slot}"] = dict(readers=first, up=up, down=down)
    data = dict(
        run=args.run, words=words, about=about,
        layers=[dict(block=reads.block, n=model.table.n_keys,
                     slots=reads.slots.tolist(),
                     weights=[[[round(w, 4) for w in head] for head in token]
                              for token in reads.weights.tolist()]) for reads in layers])
    template = Path(__file__).parent / "memory.html"
    with reading(template, "take it from the repository again"):
        page = template.read_text("utf-8")
        before, after = page.split("/* DATA */")
    # A "<" in the text could end the script. In JSON it may be written as a number.
    return before + json.dumps(data, ensure_ascii=False).replace("<", "\\u003c") + after
