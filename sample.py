"""
Write with a trained model, ask it the facts it has read, look into its memory, and change that.

    python sample.py out/NAME                               # a document from its beginning
    python sample.py out/NAME --prompt "Rasia Westshaw was born in" --temperature 0
    python sample.py out/NAME --recall                      # ten facts at random
    python sample.py out/NAME --recall "Rasia Westshaw"     # every fact about one person

    python sample.py out/NAME --show-memory "Rasia Westshaw was born in" --html page.html
    python sample.py out/NAME --slot 4711                   # who reads this slot, what it writes
    python sample.py out/NAME --map                         # which slots the training text uses

    python sample.py out/NAME --ablate-memory               # what is left without the memory layers
    python sample.py out/NAME --ablate-memory "Rasia Westshaw"      # ... without a person's slots
    python sample.py out/NAME --teach FACTS.tsv --patterns PATTERNS.tsv --out out/TAUGHT
    python sample.py out/NAME --forget "Rasia Westshaw" --out out/WITHOUT

Text and tables go to stdout, one line about the model to stderr. A run folder of train.py is all
that is needed. The facts of --recall, --ablate-memory, --slot and --forget are those of the facts
corpus that the run was trained on: whether the model completes a sentence with the right answer,
and how often the training text states it. The control facts are never in the text: they show what
guessing gives. --teach and --forget write a new run folder and leave the old one as it is.

B, T samples, tokens · V, C vocabulary, width · S, D slots and dims of the memory table
H, K heads of a memory layer, slots that each of them reads · R = H*K · F facts

This file, from top to bottom: the command line, the model, writing, asking, looking inside, taking
away, teaching and forgetting.
"""
import argparse
import codecs
import copy
import difflib
import json
import math
import re
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C during the imports, which take seconds, ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch

import kernel
import prepare_data
from prepare_data import Steady, any_characters, load_tokenizer, read_meta, reading
from train import (
    explain,
    flag,
    load_checkpoint,
    pick_device,
    read_facts,
    try_to_save,
    write_arrays,
    write_json,
)


# ---- the command line

@dataclass
class Number:
    """A flag that takes a number from low to high. default None: off, or as the help says."""
    type: type
    default: float
    low: float
    high: float
    help: str


NUMBERS = {
    "count": Number(int, 10, 1, math.inf, "facts that --recall without a name asks, and "
                    "readers that --slot shows"),
    "max_new_tokens": Number(int, 200, 1, math.inf,
                             "the longest text; an end-of-text token ends it sooner"),
    "num_samples": Number(int, 1, 1, 10_000,
                          "texts to write; several are printed when all are done"),
    "temperature": Number(float, 0.8, 0, 1000,
                          "0: always the likeliest token; higher: more surprise"),
    "top_k": Number(int, None, 1, math.inf, "draw from the k likeliest tokens alone"),
    "top_p": Number(float, None, 1e-6, 1,
                    "draw from the fewest tokens that have this probability together"),
    "seed": Number(int, 1337, 0, 2**63 - 1, "of all that is drawn"),
    "table": Number(int, 0, 0, math.inf, "which table, if the layers do not share one"),
    "slots": Number(int, None, 1, math.inf, "slots that --teach changes in a step (default: a "
                    "quarter of the table), or that --forget and --ablate-memory NAME take away "
                    "(default: a sixteenth)"),
    "teach_steps": Number(int, 200, 1, math.inf, "the most steps that --teach takes"),
    "teach_rate": Number(float, None, 1e-9, 1e9, "its learning rate; default 10 for values, with "
                         "SGD, and 1e-4 for --teach-with full, with AdamW"),
}


def make_parser():
    """The flags and their help. A wrong flag ends the process with one line and status 2."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder of train.py: out/NAME")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", help="text to go on with; without it a document is begun")
    what.add_argument("--recall", nargs="?", const="", metavar="NAME",
                      help="ask the facts about NAME, or a random handful")
    what.add_argument("--show-memory", nargs="+", metavar="PROMPT", help="which slots each token "
                      "reads; with more prompts also how many of them the tokens of those read")
    what.add_argument("--slot", type=int, help="the biography of a slot")
    what.add_argument("--map", action="store_true", help="draw which slots are used")
    what.add_argument("--teach", metavar="FACTS", help="teach the facts of this table, as in "
                      "prepare_data.py facts --from-file")
    what.add_argument("--forget", metavar="NAME", help="make the model forget the facts about NAME")
    parser.add_argument("--html", metavar="FILE", help="--show-memory as a page for a browser, too")
    parser.add_argument("--ablate-memory", nargs="?", const="", metavar="NAME",
                        help="take all memory layers away, or the slots of the facts about NAME")
    parser.add_argument("--ablate-block", type=int, metavar="BLOCK",
                        help="take the MLP or memory layer of this block away")
    parser.add_argument("--patterns", metavar="PATTERNS", help="how to say what --teach teaches")
    parser.add_argument("--teach-with", default="slots", choices=["slots", "all-values", "full"],
                        help="what may learn: the --slots values that the facts use most, all "
                        "values, or the whole model")
    parser.add_argument("--out", metavar="NEW", help="run folder that --teach and --forget make")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument("--backend", default="auto", choices=["auto", "triton", "torch"],
                        help="what the memory operations run on")
    for name, number in NUMBERS.items():
        help = number.help
        if number.default is not None:
            help += f" (default: {number.default})"
        parser.add_argument(flag(name), type=number.type, default=number.default, help=help)

    def one_line(message):
        parser.exit(2, f"sample.py: {message} (python sample.py --help lists every flag)\n")
    parser.error = one_line
    return parser


def read_args(argv):
    """The command line -> argparse.Namespace. Raises ValueError for a number out of range."""
    args = make_parser().parse_args(argv)
    for name, number in NUMBERS.items():
        value = getattr(args, name)
        if value is not None and not number.low <= value <= number.high:
            limits = f"from {number.low} to {number.high}"
            if number.high == math.inf:
                limits = f"at least {number.low}"
            raise ValueError(f"{flag(name)} {value}: must be {limits}")
    changes = args.teach is not None or args.forget is not None
    if changes and not args.out:
        raise ValueError("--teach and --forget write a new run folder: name it with --out out/NAME")
    if args.teach is not None and not args.patterns:
        raise ValueError("--teach needs --patterns PATTERNS.tsv, which says how to put facts into "
                         "words")
    if args.ablate_block is not None and args.ablate_memory is not None:
        raise ValueError("--ablate-memory and --ablate-block are two experiments: give one of them")
    takes_away = args.ablate_block is not None or args.ablate_memory is not None
    others = [args.show_memory, args.slot, args.teach, args.forget, args.map or None]
    if takes_away and any(other is not None for other in others):
        raise ValueError("--ablate-memory and --ablate-block go with --prompt, --recall or nothing "
                         "else: leave the rest out")
    if args.out and not changes:
        raise ValueError("--out is for --teach and --forget: leave it out")
    if args.html and args.show_memory is None:
        raise ValueError('--html is for --show-memory: add --show-memory "some text"')
    if args.html and not Path(args.html).parent.is_dir():
        raise ValueError(f"--html {args.html}: there is no folder {Path(args.html).parent}: make "
                         f"it, or choose another")
    args.device = pick_device(args.device)
    return args


# ---- the model

def load(args):
    """The run folder -> (GPT, Tokenizer, a line about them). Raises ValueError if it is broken."""
    kernel.backend(args.backend)
    model, checkpoint = load_checkpoint(args.run, args.device)
    parameters = model.param_counts()["total"]
    about = (f"{args.run}: {model.config.ffn}, step {checkpoint['step']}, "
             f"{parameters:,} parameters, on {args.device}")
    tok = load_tokenizer(args.run)
    V = model.config.vocab_size
    if tok.vocab_size > V:
        raise ValueError(f"{args.run}/tokenizer.tiktoken: {tok.vocab_size} tokens > the model's "
                         f"{V}: copy it from its data folder")
    # V may have been rounded up for training. The tokens that this adds have no text and must not
    # be drawn: we cut them off. The head shares the embedding's weight, and loses them too.
    model.wte.weight.data = model.wte.weight.data[:tok.vocab_size]  # (tok.vocab_size, C)
    if model.tables and args.table >= len(model.tables):
        raise ValueError(f"--table {args.table}: the model has {len(model.tables)}, counted from 0")
    return model.eval(), tok, about


# ---- writing

def write(model, tok, about, args):
    """Print --num-samples texts: a single one as it is written, several when all are done."""
    ids = ids_of(tok, args.prompt, args.run)
    take_away(model, tok, args)
    print(about, file=sys.stderr)
    pieces = samples(model, tok, ids, args)
    if args.num_samples == 1:
        for piece in pieces:
            print(piece[0], end="", flush=True)
        print()
        return
    # Pieces are lists over the samples. zip turns them round: for each sample, its pieces.
    texts = ["".join(parts) for parts in zip(*pieces)]
    print("\n---\n".join(texts))


def ids_of(tok, prompt, run):
    """The tokens of a prompt, of a document's beginning if it is None."""
    ids = tok.encode(prompt or "")
    if prompt is not None and not ids:
        raise ValueError(f"the prompt {prompt!r} makes no tokens: give it some text")
    unknown = unknown_words(tok, set(tok.tokens), prompt or "")
    if unknown:
        print(f"{unknown[0]!r} is no word of this run's tokenizer: it is spelled in bytes, one "
              f"token each", file=sys.stderr)
    # An end-of-text token begins a document. In the facts corpus each window is one document, so
    # the model has seen no sentence without it. Other text was cut anywhere: a prompt stands alone.
    is_facts = "window" in read_meta(run)
    return [tok.eot] + ids if is_facts or not ids else ids


def samples(model, tok, ids, args):
    """Continue ids B times. Yields the B texts piece by piece, as lists of B strings.

    The first piece is the text of ids. Then each token makes a piece, until all samples have come
    to their end-of-text token. A sample that ends before the others adds empty strings.
    """
    B = args.num_samples
    prompt = tok.decode([i for i in ids if i != tok.eot])
    yield [prompt] * B
    idx = torch.tensor([ids] * B, device=args.device)  # (B, T)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    # A tiny temperature counts as 0: dividing by it would make infinite logits.
    temperature = round(args.temperature, 4)
    # A token may be a part of a character: a decoder holds it back until the character is whole.
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in range(B)]
    # A token of `words` is a word with the space before it. A document begins without the space.
    drop_space = tok.name == "words" and ids[-1] == tok.eot
    ended = [False] * B
    for token in model.generate(idx, args.max_new_tokens, temperature, args.top_k, args.top_p,
                                generator):  # (B, 1)
        piece = [""] * B
        for b, i in enumerate(token[:, 0].tolist()):
            if i == tok.eot:
                ended[b] = True
            if not ended[b]:
                spelling = tok.tokens[i]  # bytes
                if drop_space:
                    spelling = spelling.removeprefix(b" ")
                piece[b] = decoders[b].decode(spelling)
        if all(ended):
            return
        yield piece
        drop_space = False


# ---- asking

@dataclass
class Fact:
    """A sentence of the facts corpus, with the answer at its end.

    subject: whom or what it is about. window: its tokens, eot at both ends. span: [start, end) of
    the answer in the window. exposures: how often the training text states it. control: whether it
    is never in the text.
    """
    subject: str
    window: list
    span: list
    exposures: int
    control: bool


# The columns of the table that --recall prints.
ROW = "{:37} {:15} {:15} {:7} {}"


def recall(model, tok, about, args):
    """Print a table of facts: what the model answers, and what is right."""
    facts = load_facts(args.run, tok)
    asked = choose_facts(facts, args)
    taken = take_away(model, tok, args)
    print(about, file=sys.stderr)
    print(ROW.format("asked", "answered", "right one", "", "times in the training text"))
    count = 0
    for fact in asked:
        start, end = fact.span
        truth = fact.window[start:end]
        idx = torch.tensor([fact.window[:start]], device=args.device)  # (1, T)
        said = [token.item() for token in model.generate(idx, len(truth), temperature=0)]
        is_right = said == truth
        if is_right:
            count += 1
        question = plain_text(tok, fact.window[1:start])  # without the eot
        verdict = "right" if is_right else "wrong"
        times = "never read" if fact.control else fact.exposures
        row = ROW.format(question, plain_text(tok, said), plain_text(tok, truth), verdict, times)
        print(row, flush=True)
    summary = f"{count} of {len(asked)} right"
    if taken:
        summary += f", {taken}"
    print(summary)


def plain_text(tok, ids):
    """The text of some tokens, with one space between words and none around them."""
    return " ".join(tok.decode(ids).split())


def load_facts(run, tok):
    """recall.npz of a run folder -> a list of Fact. Raises ValueError if it cannot be read."""
    facts = facts_of(run)
    columns = [facts[name].tolist() for name in ("seen", "seen_span", "exposures", "control")]
    if "subject" in facts:
        subjects = facts["subject"].tolist()
    else:  # A folder that is older than this: after its eot each sentence begins with two names.
        subjects = [" ".join(tok.decode(window[1:]).split()[:2]) for window in columns[0]]
    return [Fact(*row) for row in zip(subjects, *columns)]


def facts_of(run):
    """The arrays of recall.npz. Raises ValueError if the run was not trained on facts."""
    if "window" not in read_meta(run):
        raise ValueError(f"{run} was not trained on the facts corpus, so there are no facts to ask")
    return read_facts(run)


def choose_facts(facts, args):
    """The facts about the one that --recall names, or --count facts at random.

    Raises ValueError, with names that look like it, if nobody has that name.
    """
    if not args.recall:
        order = np.random.default_rng(args.seed).permutation(len(facts))
        return [facts[i] for i in order[:args.count]]
    return [facts[i] for i in numbers_about(args.recall, facts)]


def numbers_about(name, facts):
    """Which of the facts, a list of Fact, are about `name`. Raises ValueError if none is."""
    numbers = [i for i, fact in enumerate(facts) if fact.subject == name]
    if not numbers:
        names = sorted({fact.subject for fact in facts})
        near = difflib.get_close_matches(name, names, 3, cutoff=0)
        raise ValueError(f"no fact is about {name!r}: try {' or '.join(near)}")
    return numbers


# ---- looking inside

class Reads(NamedTuple):
    """What one memory layer reads for a text of T tokens.

    block: where the layer stands. table: the number of its table. slots, weights (T, H, K): of each
    token and head. A hashed memory has no heads: there H is 1.
    """
    block: int
    table: int
    slots: torch.Tensor
    weights: torch.Tensor


def layers_with_tables(model):
    """The memory layers as (block, layer, number of its table, H)."""
    if not model.tables:
        raise ValueError(f"this run is {model.config.ffn}, it reads no table: give a run with "
                         f"memory layers")
    if model.config.ffn == "ultramem":
        raise ValueError("this run is ultramem, where a row of the table stands for four slots, "
                         "which is not shown: give a run of another kind")
    found = []
    for block, layer in model.memories():
        finder = getattr(layer, "finder", layer)  # PEER has the search of a ProductKeyMemory
        found.append((block, layer, model.table_of(layer), getattr(finder, "heads", 1)))
    return found


def read_windows(model, windows):
    """What is read for windows (b, T) of tokens: yields Reads of (b, T, H, K), one for each layer.
    """
    idx = torch.as_tensor(windows).long().to(model.wte.weight.device)  # (b, T)
    layers = layers_with_tables(model)
    for (_, slots, weights), (block, _, table, H) in zip(model.memory_reads(idx), layers):
        shape = (*idx.shape, H, -1)
        yield Reads(block, table, slots.long().view(shape).cpu(),
                    weights.float().view(shape).cpu())


def slots_mixed(weights):
    """How many slots a head really mixes: exp(entropy) of its weights. (..., K) -> (...).

    1 if a single slot has all the weight, K if all have the same.
    """
    p = weights / weights.sum(-1, keepdim=True)  # (..., K)
    return torch.special.entr(p).sum(-1).exp()


def show_memory(model, tok, about, args):
    """Print which slots each token of a prompt reads, and draw it. With --html as a page, too."""
    prompts = [ids_of(tok, prompt, args.run) for prompt in args.show_memory]
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
    first = layers[0]
    last = first._replace(slots=first.slots[-TOKENS_DRAWN:], weights=first.weights[-TOKENS_DRAWN:])
    picture = Path(args.run) / "memory.png"
    draw_reads(last, words[-TOKENS_DRAWN:], model.tables[first.table].n_keys, picture)
    print(f"drawn: {picture}")


# The picture shows so many tokens, the last ones of the text.
TOKENS_DRAWN = 16


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


def new_figure(width, height):
    """A figure that needs no display. matplotlib takes a while to import, so only pictures do."""
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def draw_reads(reads, words, n, path):
    """A picture: tokens from top to bottom, heads from left to right, each with the grid of slots.

    A slot is a point, as large as its weight: its row is its left half-key of n, its column its
    right one.
    """
    T, H, K = reads.slots.shape
    mixed = slots_mixed(reads.weights)  # (T, H)
    figure = new_figure(2 * H + 1, 2 * T + 1)
    axes = figure.subplots(T, H, squeeze=False)
    for t in range(T):
        for h in range(H):
            ax = axes[t][h]
            slots = reads.slots[t, h]  # (K,)
            sizes = (300 * reads.weights[t, h]).clamp(min=4)  # (K,): in points, all to be seen
            ax.scatter((slots % n).numpy(), (slots // n).numpy(), color="#2b8a5a", alpha=0.6,
                       s=sizes.numpy(), lw=0)
            margin = n / 30
            ax.set(xlim=(-margin, n - 1 + margin), ylim=(n - 1 + margin, -margin), xticks=[],
                   yticks=[], aspect="equal")
            best = slots[reads.weights[t, h].argmax()].item()
            ax.set_title(f"slot {best}, mixes {mixed[t, h]:.0f} of {K}", fontsize=8)
        axes[t][0].set_ylabel(words[t], fontsize=12, parse_math=False)
    for h in range(H):
        axes[-1][h].set_xlabel(f"head {h}", fontsize=12)
    axes[0][0].set_yticks([0, n - 1])
    axes[-1][0].set_xticks([0, n - 1])
    figure.suptitle(f"What block {reads.block} reads, and which slot has the largest weight\n"
                    f"(row: left half-key, column: right half-key)", fontsize=11)
    figure.savefig(path, dpi=80)


def draw_map(model, tok, about, args):
    """Draw the slots as a grid, by how much of the training text reads them."""
    windows, readers = load_readers(args.run, model)
    n = model.tables[args.table].n_keys
    share = readers[args.table].view(n, n) / windows  # (n, n)
    print(about, file=sys.stderr)
    figure = new_figure(6.5, 5.5)
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


def readers_of(model, tok, run, table, chosen):
    """Who reads these slots, among the tokens of some facts: {slot: list of Reader}, strongest
    first. chosen: numbers of slots of a table.
    """
    if "window" not in read_meta(run):  # a text, which has no facts
        return {slot: [] for slot in chosen}
    windows = facts_of(run)["seen"]  # (F, T)
    order = np.random.default_rng(0).permutation(len(windows))
    windows = windows[order[:FACTS_LOOKED_THROUGH]]
    is_chosen = torch.zeros(len(model.tables[table].values), dtype=torch.bool)  # (S,)
    is_chosen[chosen] = True
    found = {slot: set() for slot in chosen}
    for i in range(0, len(windows), 256):
        part = windows[i:i + 256]  # (b, T)
        for reads in read_windows(model, part):
            if reads.table != table:
                continue
            for b, t, h, k in is_chosen[reads.slots].nonzero().tolist():
                if part[b, t] == tok.eot:
                    continue
                text = plain_text(tok, [j for j in part[b, :t + 1] if j != tok.eot])
                slot = reads.slots[b, t, h, k].item()
                found[slot].add(Reader(reads.weights[b, t, h, k].item(), reads.block, h, text))
    return {slot: sorted(readers, reverse=True) for slot, readers in found.items()}


@torch.no_grad()
def pushes(model, table, slot):
    """How far a slot's value moves the logit of each token, by layer: {block: (V,) float32}.

    An approximation: the value goes straight through the layer's output matrix and the head. It
    skips the gate, the blocks that follow and the last norm.
    """
    found = {}
    for block, layer, number, _ in layers_with_tables(model):
        if number != table:
            continue
        y = model.tables[table].values[slot].float()  # (D,)
        if model.config.ffn == "peer":
            y = y[model.config.n_embd:]  # v, what a neuron writes; u is before it
        if getattr(layer, "out", None) is not None:
            y = layer.out(y)  # (C,)
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
    layers_with_tables(model)
    n = model.tables[args.table].n_keys
    if not 0 <= args.slot < n * n:
        raise ValueError(f"--slot {args.slot} is not in 0..{n * n - 1}")
    windows, readers = load_readers(args.run, model)
    who = readers_of(model, tok, args.run, args.table, [args.slot])[args.slot]
    print(about, file=sys.stderr)
    print(f"slot {args.slot}: left half-key {args.slot // n}, right half-key {args.slot % n}")
    print(f"{readers[args.table][args.slot]:,} of {windows:,} windows of the training text read it")
    if who:
        print(f"\n{len(who):,} beginnings of sentences read it at their last word, the strongest:")
        print("weight block head")
    for reader in who[:args.count]:
        print(f"{reader.weight:6.3f} {reader.block:5d} {reader.head:4d}  {reader.text}")
    for block, logits in pushes(model, args.table, args.slot).items():
        up, down = most_pushed(tok, logits)
        print(f"\nits value, read by block {block}, pushes the next token (roughly: the gate, "
              f"later blocks and the last norm are skipped)\n  up:   {up}\n  down: {down}")


# Slots of each head that the page tells more about. To look through the facts takes a while.
SLOTS_ON_PAGE = 4


def page_of(model, tok, layers, words, args):
    """The page of --html: assets/memory.html with the numbers of this text put in."""
    about = {}
    for reads in layers:
        best = reads.weights.topk(min(SLOTS_ON_PAGE, reads.slots.shape[-1])).indices  # (T, H, few)
        chosen = sorted(set(reads.slots.gather(-1, best).flatten().tolist()))
        who = readers_of(model, tok, args.run, reads.table, chosen)
        for slot in chosen:
            up, down = most_pushed(tok, pushes(model, reads.table, slot)[reads.block])
            first = [f"{reader.text} ({reader.weight:.2f})" for reader in who[slot][:8]]
            about[f"{reads.block}/{slot}"] = dict(readers=first, up=up, down=down)
    data = dict(
        run=args.run, words=words, about=about,
        layers=[dict(block=reads.block, n=model.tables[reads.table].n_keys,
                     slots=reads.slots.tolist(),
                     weights=[[[round(w, 4) for w in head] for head in token]
                              for token in reads.weights.tolist()]) for reads in layers])
    template = Path(__file__).parent / "assets" / "memory.html"
    with reading(template, "take it from the repository again"):
        page = template.read_text("utf-8")
        before, after = page.split("/* DATA */")
    # A "<" in the text could end the script. In JSON it may be written as a number.
    return before + json.dumps(data, ensure_ascii=False).replace("<", "\\u003c") + after


# ---- taking away

def silence(model, block):
    """The MLP or memory layer of a block gives zeros from now on."""
    model.blocks[block].ffn.register_forward_hook(lambda layer, x, y: torch.zeros_like(y))


def zero_slots(model, chosen):
    """Set values to zero. chosen: for each table the numbers of slots."""
    for table, slots in zip(model.tables, chosen):
        table.values.data[slots] = 0  # (S, D)


def take_away(model, tok, args):
    """Do what --ablate-block or --ablate-memory asks for -> in words what that was, or ""."""
    if args.ablate_block is not None:
        last = model.config.n_layer - 1
        if not 0 <= args.ablate_block <= last:
            raise ValueError(f"--ablate-block {args.ablate_block} is not in 0..{last}")
        silence(model, args.ablate_block)
        return f"without the MLP or memory layer of block {args.ablate_block}"
    if args.ablate_memory is None:
        return ""
    if not model.tables:
        raise ValueError(f"--ablate-memory: {args.run} is {model.config.ffn}, it has no memory "
                         f"layers to take away: leave it out, or use --ablate-block")
    if args.ablate_memory == "":
        for block, _ in model.memories():
            silence(model, block)
        return "without the memory layers"
    mine = numbers_about(args.ablate_memory, load_facts(args.run, tok))
    chosen = slots_of_facts(model, facts_of(args.run)["seen"][mine], args)
    zero_slots(model, chosen)
    return f"without {sum(map(len, chosen)):,} slots of {args.ablate_memory}"


class TextReads(NamedTuple):
    """How the training text reads the tables: reads.npz.

    windows: how many windows of the text were looked at. readers: for each table, how many of these
    windows read each slot, (S,) int64.
    """
    windows: int
    readers: list


def load_readers(run, model):
    """reads.npz of a run folder -> TextReads. Raises ValueError if it is missing or broken."""
    layers_with_tables(model)
    path = Path(run) / "reads.npz"
    with reading(path, "train.py writes it at the end of a run: finish it with --resume, or, if an "
                 "older version did, train it again"):
        with np.load(path) as arrays:
            windows = int(arrays["windows"])
            readers = [torch.from_numpy(arrays[f"readers_{i}"]).long()
                       for i in range(len(model.tables))]
        for table, counts in zip(model.tables, readers):
            if len(counts) != len(table.values):
                raise ValueError(f"it has {len(counts)} slots, the table {len(table.values)}")
    return TextReads(windows, readers)


def slot_scores(model, windows, text_reads):
    """How much more these windows read each slot than the training text does: list of (S,) float32.

    score = c / sum(c) * log((B + 1) / (1 + readers)), as in sparse memory finetuning (arXiv
    2510.15103). c counts how often the windows read a slot, and `readers` of B windows of the
    training text read it. It is TF-IDF, with slots for words. windows (F, T): tokens.
    """
    B = text_reads.windows
    counts = [torch.zeros(len(table.values)) for table in model.tables]
    for part in torch.from_numpy(windows.astype("int64")).split(512):
        for reads in read_windows(model, part):
            c = counts[reads.table]  # (S,)
            c += reads.slots.flatten().bincount(minlength=len(c))
    return [c / c.sum() * ((B + 1) / (1 + r)).log() for c, r in zip(counts, text_reads.readers)]


def slots_of_facts(model, windows, args):
    """For each table the --slots best slots of these windows: list of (slots,) int64."""
    chosen = []
    for score in slot_scores(model, windows, load_readers(args.run, model)):
        count = args.slots or max(len(score) // 16, 1)
        chosen.append(score.topk(min(count, int((score > 0).sum()))).indices)
    return chosen


def read_as_often(model, chosen, args):
    """As many other slots at random, which about as many windows of the training text read."""
    readers = load_readers(args.run, model).readers
    generator = torch.Generator().manual_seed(args.seed)
    others = []
    for counts, slots in zip(readers, chosen):
        # The free slots in order of their readers, ties at random. Each chosen slot takes the next
        # of them that has at least as many readers, or, at the end, the last ones.
        key = counts + torch.rand(len(counts), generator=generator)  # (S,)
        is_free = torch.ones(len(counts), dtype=torch.bool)
        is_free[slots] = False
        free = is_free.nonzero().flatten()
        free = free[key[free].argsort()]  # (S - slots,)
        wanted = key[slots].sort().values  # (slots,)
        at = torch.searchsorted(key[free], wanted)  # (slots,), rising
        # Slots that want the same place stand in line: the i-th cannot be before place i.
        line = torch.arange(len(at))
        at = (at - line).cummax(0).values + line
        at = torch.minimum(at, len(free) - len(at) + line)
        others.append(free[at[at >= 0]])
    return others


# So many facts are asked before and after something changes. All would take ten times as long.
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


def measure_ablation(model, tok, args):
    """What is known with and without what is taken away: titles of columns, {row: shares}."""
    facts = facts_of(args.run)
    less = copy.deepcopy(model)
    models = {"the whole model": model}
    groups = {}
    mine = []
    what = take_away(less, tok, args)
    models[what] = less
    if args.ablate_memory:
        mine = numbers_about(args.ablate_memory, load_facts(args.run, tok))
        groups[f"{len(mine)} facts about {args.ablate_memory}"] = mine
        control = copy.deepcopy(model)
        chosen = slots_of_facts(model, facts["seen"][mine], args)
        zero_slots(control, read_as_often(model, chosen, args))
        models["without as many other slots that are read as often"] = control
    others = other_facts(facts, mine)
    groups[f"{len(others):,} other facts" if mine else f"{len(others):,} facts"] = others
    rows = {}
    for name, changed in models.items():
        rows[name] = [share_known(changed, facts, group) for group in groups.values()]
    return list(groups), rows


def show_ablation(model, tok, about, args):
    """Print what the model still knows when something is taken away."""
    titles, rows = measure_ablation(model, tok, args)
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


# ---- teaching and forgetting

def new_facts(model, tok, args):
    """The facts to teach -> (facts, sentences, windows) of prepare_data.

    Sentences with a word that the tokenizer does not know, or longer than the window, are named,
    the first ten of them. Then it raises ValueError.
    """
    facts, patterns = prepare_data.read_own_facts(Path(args.teach), Path(args.patterns))
    T = model.config.block_size
    known = set(tok.tokens)
    wrong = {}  # what is wrong: the sentences
    for fact in facts:
        for pattern in patterns[fact.relation]:
            text, _ = prepare_data.say(pattern, fact)
            unknown = unknown_words(tok, known, text)
            if unknown:
                wrong.setdefault(f"{unknown[0]!r}, a word that the run's tokenizer does not know",
                                 []).append(text)
            elif len(tok.encode(text)) + 1 > T:
                wrong.setdefault(f"more than the {T - 1} tokens that the run's window has room for",
                                 []).append(text)
    for fault, texts in list(wrong.items())[:10]:
        print(f"{len(texts):,} sentences have {fault}, as {texts[0]!r}", file=sys.stderr)
    if wrong:
        count = sum(map(len, wrong.values()))
        raise ValueError(f"{count:,} sentences cannot be taught (the faults stand above): change "
                         f"them, or train on a corpus that has these words")
    facts, sentences = prepare_data.put_into_words(facts, patterns, tok, T)
    windows = np.full((len(sentences.texts), T), tok.eot, "<u2")  # (sentences, T)
    for row, text in zip(windows, sentences.texts):
        row[1:len(text) + 1] = text
    return facts, sentences, windows


def unknown_words(tok, known, text):
    """What a `words` tokenizer has no token for, and would spell in bytes. Others know all.

    known: the set of its tokens.
    """
    if tok.name != "words":
        return []
    pieces = re.findall(tok.pattern, tok.with_first_space(text))
    return [piece.strip() for piece in pieces if piece.encode() not in known]


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
    """Train until 95% of the new facts are known -> steps taken, for each table the slots changed.

    slots: SGD on the values of the --slots slots that the sentences of the text read far more than
    the training text does, chosen anew for each step; all else is frozen (arXiv 2510.15103).
    all-values: SGD on all values. full: AdamW on all that the model has.
    text_reads: from load_readers, for slots.
    """
    # The sentences that are trained on, of all facts.
    rows = np.concatenate([f + np.arange(n) for f, n in zip(sentences.first, sentences.trained)])
    x = torch.from_numpy(windows[rows].astype("int64")).to(model.wte.weight.device)  # (rows, T)
    weight = answer_weights(sentences, rows, x.shape[1]).to(x.device)  # (rows, T-1)
    values = [table.values for table in model.tables]
    if args.teach_with == "full":
        optimizer = torch.optim.AdamW(model.parameters(), args.teach_rate or 1e-4, weight_decay=0)
    else:
        optimizer = torch.optim.SGD(values, args.teach_rate or 10.0)
    before = [v.detach().clone() for v in values]
    step = 0
    while step < args.teach_steps:
        step += 1
        model.zero_grad()
        for part, w in zip(x.split(512), weight.split(512)):  # (512, T), (512, T-1)
            _, loss = model(part[:, :-1], part[:, 1:], reduction="none")  # (512, T-1)
            (loss * w).sum().backward()
        if args.teach_with == "slots":
            keep_gradient_of_best(model, windows[rows], text_reads, args.slots)
        optimizer.step()
        if step % LOOK_EVERY == 0 and taught_recall(model, sentences, windows)[0] >= ENOUGH:
            break
    changed = [(v.detach() != old).any(dim=1).sum().item() for v, old in zip(values, before)]
    return step, changed


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
    for table, score in zip(model.tables, slot_scores(model, windows, text_reads)):
        best = score.topk(min(count or max(len(score) // 4, 1), len(score))).indices  # (count,)
        rest = torch.ones(len(score), dtype=torch.bool, device=table.values.device)
        rest[best.to(rest.device)] = False
        table.values.grad[rest] = 0  # (S, D)


def teach(model, tok, about, args):
    """Teach new facts, print what is learnt and what is lost, and write a new run folder."""
    old = facts_of(args.run)
    if args.teach_with != "full":
        layers_with_tables(model)
    facts, sentences, windows = new_facts(model, tok, args)
    text_reads = None
    if args.teach_with == "slots":
        text_reads = load_readers(args.run, model)
    new_folder(args)
    make_trainable(model)
    others = other_facts(old, known_already(old, facts))
    print(about, file=sys.stderr)
    rows = {"before": [*taught_recall(model, sentences, windows),
                       share_known(model, old, others)]}
    begin = time.perf_counter()
    steps, changed = teach_model(model, sentences, windows, text_reads, args)
    round_values(model)
    seconds = time.perf_counter() - begin
    rows["after"] = [*taught_recall(model, sentences, windows), share_known(model, old, others)]
    titles = [f"{len(facts):,} new facts", "unseen phrasing", f"{len(others):,} old facts"]
    print_shares("facts recalled", titles, rows)
    for table, slots in zip(model.tables, changed):
        print(f"changed: {slots:,} of {len(table.values):,} slots")
    print(f"{steps} steps in {seconds:.1f} s")
    if rows["after"][0] < ENOUGH:
        print(f"fewer than {ENOUGH:.0%} were learnt: raise --teach-steps, --slots or --teach-rate")
    report = dict(taught_with=args.teach_with, facts=len(facts), slots=args.slots, steps=steps,
                  seconds=seconds, changed=changed, titles=titles, **rows)
    save_edited(model, args, dict(teach=report), with_facts(old, facts, sentences, windows))


def forget(model, tok, about, args):
    """Zero the slots of the facts about somebody, print what goes, and write a new run folder."""
    facts = facts_of(args.run)
    mine = np.array(numbers_about(args.forget, load_facts(args.run, tok)))
    others = other_facts(facts, mine)
    chosen = slots_of_facts(model, facts["seen"][mine], args)
    new_folder(args)
    print(about, file=sys.stderr)
    rows = {"before": [share_known(model, facts, group) for group in (mine, others)]}
    zero_slots(model, chosen)
    rows["after"] = [share_known(model, facts, group) for group in (mine, others)]
    titles = [f"{len(mine)} facts about {args.forget}", f"{len(others):,} other facts"]
    print_shares("facts recalled", titles, rows)
    if rows["before"][0] == 0:
        print("it knew none of these: for a better experiment, choose somebody whom --recall knows")
    for table, slots in zip(model.tables, chosen):
        print(f"zeroed: {len(slots):,} of {len(table.values):,} slots")
        if args.slots and len(slots) < args.slots:
            print("these are all that the sentences read")
    save_edited(model, args, dict(forget=dict(name=args.forget, titles=titles, **rows)), facts)


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


def make_trainable(model):
    """Give every table's values a gradient in float32, also those of a bfloat16 table."""
    for table in model.tables:
        table.values = torch.nn.Parameter(table.values.detach().float())  # (S, D)
    model.eval()  # no dropout


def round_values(model):
    """What is measured afterwards is what will be saved: a bfloat16 table rounds small steps away.
    """
    dtype = getattr(torch, model.config.mem_dtype)
    for table in model.tables:
        table.values.data = table.values.data.to(dtype).float()


def known_already(old, facts):
    """Numbers of the old facts that say something else about a subject which is taught anew."""
    if "subject" not in old:
        return []
    return np.flatnonzero(np.isin(old["subject"], [fact.subject for fact in facts]))


def questions(windows, spans):
    """The tokens before each answer, as tuples: the same question has the same tokens."""
    return [tuple(window[:start].tolist()) for window, (start, _) in zip(windows, spans)]


def with_facts(old, facts, sentences, windows):
    """The arrays of recall.npz with the new facts, in the place of old ones with their question."""
    n = len(facts)
    new = prepare_data.recall_arrays(facts, sentences, windows, np.zeros(n, int),
                                     np.zeros(n, bool))
    old = dict(old)
    old.setdefault("has_unseen", np.ones(len(old["control"]), bool))
    asked = set(questions(new["seen"], new["seen_span"]))
    stays = np.array([question not in asked
                      for question in questions(old["seen"], old["seen_span"])])  # (old facts,)
    old = {name: array[stays] for name, array in old.items()}
    return {name: np.concatenate([old[name], new[name]]) for name in new if name in old}


def save_edited(model, args, report, facts):
    """Write the changed model as a run folder of its own, --out: for sample.py and --init-from."""
    part = unfinished(args)
    _, state = load_checkpoint(args.run)
    weights = model.state_dict()
    for name in ("wte.weight", "head.weight"):  # load() cut off the tokens that have no text
        whole = state["model"][name].clone()  # (V, C)
        whole[:len(weights[name])] = weights[name].cpu()
        weights[name] = whole
    state["model"] = {name: p.cpu() for name, p in weights.items() if not name.endswith(".values")}
    dtype = getattr(torch, model.config.mem_dtype)
    for table, saved in zip(model.tables, state["tables"]):
        saved["values"] = [table.values.detach().cpu().to(dtype)]
    state["tables"] = [{name: torch.cat(list(slices), dim=1) for name, slices in saved.items()}
                       for saved in state["tables"]]
    state["slices"] = []
    problem = try_to_save(state, part / "ckpt.pt")
    if problem:
        raise ValueError(problem)
    write_arrays(part / "recall.npz", **facts)
    write_json(part / "edit.json", dict(run=args.run, **report))
    part.rename(args.out)
    print(f"saved in {Path(args.out)}: ckpt.pt, recall.npz, edit.json")


def what_to_do(model, args):
    """The function for what the command line asks."""
    if args.recall is not None:
        return recall
    if args.show_memory is not None:
        return show_memory
    if args.slot is not None:
        return show_slot
    if args.map:
        return draw_map
    if args.teach is not None:
        return teach
    if args.forget is not None:
        return forget
    takes_away = args.ablate_memory is not None or args.ablate_block is not None
    if takes_away and args.prompt is None and "window" in read_meta(args.run):
        return show_ablation
    return write


def main(argv=None):
    """The command line -> the exit status. What the user can mend is one line on stderr."""
    try:
        any_characters()
        args = read_args(argv)
        model, tok, about = load(args)
        what_to_do(model, args)(model, tok, about, args)
        return 0
    except (ValueError, OSError) as e:
        message = str(e)
    except (RuntimeError, MemoryError) as e:
        message = explain(e)
        if not message:
            raise
    print("sample.py: " + " ".join(message.split()), file=sys.stderr)
    return 1


if __name__ == "__main__":
    # `| head` and Ctrl-C end it without a word. Windows has no SIGPIPE.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    code = main()
    try:
        sys.stdout.flush()
    except OSError as error:
        print(f"sample.py: the text cannot be written: {error.strerror}", file=sys.stderr)
        Steady(sys.stdout).give_up()  # Python would try again, and complain at length
        code = 1
    sys.exit(code)
