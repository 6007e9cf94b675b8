"""
Write with a trained model, ask it the facts it has read, and take its memory away.

    python sample.py out/NAME                               # a document from its beginning
    python sample.py out/NAME --prompt "Rasia Westshaw was born in" --temperature 0
    python sample.py out/NAME --recall                      # ten facts at random
    python sample.py out/NAME --recall "Rasia Westshaw"     # every fact about one person
    python sample.py out/NAME --recall --ablate-memory      # the memory layers read zeros

The text goes to stdout, token by token. One line about the model goes to stderr. --recall works for
runs on the facts corpus. It prints a table: the beginning of a sentence, the model's likeliest
answer, the right one, and how often the training text states that fact. The control people are
never in the text: they show what guessing gives. A run folder of train.py is all that is needed.

B, T samples, tokens · V, C vocabulary, width · S, D slots and dims of the memory table

This file, from top to bottom: the command line, the model, writing, asking.
"""
import argparse
import codecs
import difflib
import math
import signal
import sys
from dataclasses import dataclass

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C during the imports, which take seconds, ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch

import kernel
from prepare_data import Steady, any_characters, load_tokenizer, read_meta
from train import explain, flag, load_checkpoint, pick_device, read_facts


# ---- the command line

@dataclass
class Number:
    """A flag that takes a number from low to high. default None: the flag is off."""
    type: type
    default: float
    low: float
    high: float
    help: str


NUMBERS = {
    "count": Number(int, 10, 1, math.inf, "facts that --recall without a name asks"),
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
    parser.add_argument("--ablate-memory", action="store_true",
                        help="set all that the memory layers read to zero")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument("--backend", default="auto", choices=["auto", "triton", "torch"],
                        help="what the memory operations run on")
    for name, number in NUMBERS.items():
        default = "off" if number.default is None else number.default
        parser.add_argument(flag(name), type=number.type, default=number.default,
                            help=f"{number.help} (default: {default})")

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
            raise ValueError(f"{flag(name)} {value}: must be from {number.low} to {number.high}")
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
    if args.ablate_memory:
        ablate_memory(model, args.run)
    return model.eval(), tok, about


def ablate_memory(model, run):
    """Set the tables to zero: whatever slots a memory layer reads, it gets y = 0."""
    if not model.tables:
        raise ValueError(f"--ablate-memory: {run} is {model.config.ffn}, it has no memory layers "
                         f"to take away: leave it out")
    for table in model.tables:
        table.values.data.zero_()  # (S, D)


# ---- writing

def write(model, tok, about, args):
    """Print --num-samples texts: a single one as it is written, several when all are done."""
    ids = tok.encode(args.prompt or "")
    if args.prompt is not None and not ids:
        raise ValueError(f"--prompt {args.prompt!r} makes no tokens: give it some text, or leave "
                         f"it out")
    # An end-of-text token begins a document. In the facts corpus each window is one document, so
    # the model has seen no sentence without it. Other text was cut anywhere: a prompt stands alone.
    is_facts = "window" in read_meta(args.run)
    if is_facts or not ids:
        ids = [tok.eot] + ids
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
    # 1e-40 means 0. To divide by it would make infinite logits.
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

    window: its tokens, eot at both ends. span: [start, end) of the answer in the window. exposures:
    how often the training text states it. control: whether it is about a person who is never named.
    """
    window: list
    span: list
    exposures: int
    control: bool


# The columns of the table that --recall prints.
ROW = "{:38}{:16}{:16}{:8}{}"


def recall(model, tok, about, args):
    """Print a table of facts: what the model answers, and what is right."""
    facts = load_facts(args.run)
    asked = choose_facts(facts, tok, args)
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
    if args.ablate_memory:
        summary += ", with all that the memory layers read set to zero"
    print(summary)


def plain_text(tok, ids):
    """The text of some tokens, with one space between words and none around them."""
    return " ".join(tok.decode(ids).split())


def load_facts(run):
    """recall.npz of a run folder -> a list of Fact. Raises ValueError if it cannot be read."""
    if "window" not in read_meta(run):
        raise ValueError(f"--recall: {run} was not trained on the facts corpus, so there are no "
                         f"facts to ask: leave it out")
    facts = read_facts(run)
    columns = [facts[name].tolist() for name in ("seen", "seen_span", "exposures", "control")]
    return [Fact(*row) for row in zip(*columns)]


def choose_facts(facts, tok, args):
    """The facts about the person that --recall names, or --count facts at random.

    Raises ValueError, with names that look like it, if nobody has that name.
    """
    if not args.recall:
        order = np.random.default_rng(args.seed).permutation(len(facts))
        return [facts[i] for i in order[:args.count]]
    # After its eot each of these sentences begins with a name of two words.
    names = [" ".join(tok.decode(fact.window[1:]).split()[:2]) for fact in facts]
    chosen = [fact for fact, name in zip(facts, names) if name == args.recall]
    if not chosen:
        near = difflib.get_close_matches(args.recall, sorted(set(names)), 3, cutoff=0)
        raise ValueError(f"--recall {args.recall!r}: nobody has that name, "
                         f"try {' or '.join(near)}")
    return chosen


def main(argv=None):
    """The command line -> the exit status. What the user can mend is one line on stderr."""
    try:
        any_characters()
        args = read_args(argv)
        model, tok, about = load(args)
        if args.recall is None:
            write(model, tok, about, args)
        else:
            recall(model, tok, about, args)
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
