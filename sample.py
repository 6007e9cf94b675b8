"""
Write with a trained model, ask it the facts that it has read, inspect its memory and edit it.

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
corpus that the run was trained on. --recall shows whether the model completes a sentence with the
right answer, and how often the training text states it. The control facts are never in the text:
they show what guessing gives. --teach and --forget write a new run folder and leave the old one as
it is.

B, T samples, tokens · V, C vocabulary, width

This file, from top to bottom: the model, writing, asking, the command line. Inspecting is in
support/look.py, ablating, teaching and forgetting in support/edit.py.
"""
import codecs
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from support.terminal import Parser, Steady, any_characters, quiet_ctrl_c, say_problem

if __name__ == "__main__":
    quiet_ctrl_c()

import numpy as np
import torch

import kernel
from prepare_data import load_tokenizer
from support import edit, look
from support.checkpoint import load_checkpoint
from support.data_folder import is_facts
from support.fields import add_flags, check_limits, setting
from support.machine import explain, pick_device, put_back
from support.recall import as_stored, numbers_about, plain_text, read_facts


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
    return model.eval(), tok, about


# ---- writing

TINY_TEMPERATURE = 1e-4


def write(model, tok, about, args):
    """Print --num-samples texts: a single one as it is written, several when all are done."""
    ids = ids_of(tok, args.prompt, args.run)
    ablated = edit.ablate(model, args)
    print(", ".join(filter(None, [about, ablated])), file=sys.stderr)
    pieces = samples(model, tok, ids, args)
    if args.num_samples == 1:
        for piece in pieces:
            print(piece[0], end="", flush=True)
        print()
        return
    # Pieces are lists over the samples. zip transposes them: for each sample, its pieces.
    texts = ["".join(parts) for parts in zip(*pieces)]
    print("\n---\n".join(texts))


def ids_of(tok, prompt, run):
    """The tokens of a prompt. None: only the end-of-text token, after which a document begins."""
    from_facts = is_facts(run)
    if prompt is not None and from_facts:
        prompt = as_stored(prompt)
    ids = tok.encode(prompt or "")
    if prompt is not None and not ids:
        raise ValueError(f"the prompt {prompt!r} makes no tokens: give it some text")
    unknown = tok.unknown_words(prompt or "")
    if unknown:
        print(f"{unknown[0]!r} is not in this run's vocabulary: it is spelled in bytes, one token "
              f"each", file=sys.stderr)
    # An end-of-text token begins a document. In the facts corpus each window is one document, so
    # the model has seen no sentence without it. Windows of other text begin anywhere, so there a
    # prompt needs none.
    return [tok.eot] + ids if from_facts or not ids else ids


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
    # Dividing by a tiny temperature would make infinite logits, so it counts as 0.
    temperature = args.temperature if args.temperature > TINY_TEMPERATURE else 0
    # A token may be a part of a character: a decoder holds it back until the character is whole.
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in range(B)]
    # A token of `words` is a word with the space before it. A document begins without the space.
    drop_space = tok.name == "words" and ids[-1] == tok.eot
    ended = [False] * B
    for token in model.generate(idx, args.max_new_tokens, temperature, args.top_k, args.top_p,
                                generator):  # (B, 1)
        piece = [""] * B
        for b, i in enumerate(token[:, 0].tolist()):
            ended[b] |= i == tok.eot
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

# The columns of the table that --recall prints.
ROW = "{:37} {:15} {:15} {:7} {}"


def recall(model, tok, about, args):
    """Print a table of facts: what the model answers, and what is right."""
    facts = read_facts(args.run)
    asked = choose_facts(facts, args)
    ablated = edit.ablate(model, args)
    print(about, file=sys.stderr)
    print(ROW.format("asked", "answered", "right one", "", "times in the training text"))
    count = 0
    for i in asked:
        window = facts["seen"][i].tolist()
        start, end = facts["seen_span"][i]
        truth = window[start:end]
        idx = torch.tensor([window[:start]], device=args.device)  # (1, T)
        said = [token.item() for token in model.generate(idx, len(truth), temperature=0)]
        is_right = said == truth
        count += is_right
        question = plain_text(tok, window[1:start])  # without the eot
        verdict = "right" if is_right else "wrong"
        times = "never read" if facts["control"][i] else facts["exposures"][i]
        row = ROW.format(question, plain_text(tok, said), plain_text(tok, truth), verdict, times)
        print(row, flush=True)
    summary = f"{count} of {len(asked)} right"
    if ablated:
        summary += f", {ablated}"
    print(summary)


def choose_facts(facts, args):
    """Numbers of the facts about the one that --recall names, or of --count facts at random.

    Raises ValueError if no fact is about that name. The message lists similar names.
    """
    if args.recall:
        return numbers_about(args.recall, facts)
    order = np.random.default_rng(args.seed).permutation(len(facts["control"]))
    return order[:args.count]


# ---- the command line

@dataclass
class Numbers:
    """The flags that take a number. None: off, or as the help says."""
    count: int = setting(10, "facts that --recall without a name asks, and readers that --slot "
                         "shows", 1)
    max_new_tokens: int = setting(200, "the longest text; an end-of-text token ends it sooner", 1)
    num_samples: int = setting(1, "texts to write; several are printed when all are done",
                               1, 10_000)
    temperature: float = setting(0.8, "0: always the likeliest token; higher: more surprise",
                                 0, 1000)
    top_k: int = setting(None, "draw from the k likeliest tokens alone", 1)
    top_p: float = setting(None, "draw from the fewest tokens that have this probability together",
                           1e-6, 1)
    seed: int = setting(1337, "of the random numbers", 0, 2**63 - 1)
    slots: int = setting(None, "slots that --teach changes in a step (default: a quarter of the "
                         "table), or that --forget and --ablate-memory NAME zero (default: a "
                         "sixteenth)", 1)
    teach_steps: int = setting(200, "the most steps that --teach takes", 1)
    teach_rate: float = setting(None, "its learning rate; default 10 for values, with SGD, and "
                                "1e-4 for --teach-with full, with AdamW", 1e-9, 1e9)


def make_parser():
    """The flags and their help. A wrong flag ends the process with one line and status 2."""
    parser = Parser("sample.py", __doc__)
    parser.add_argument("run", help="run folder of train.py: out/NAME")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", help="text to continue; without it a new document begins")
    what.add_argument("--recall", nargs="?", const="", metavar="NAME",
                      help="ask the facts about NAME, or a random handful")
    what.add_argument("--show-memory", nargs="+", metavar="PROMPT", help="which slots each token "
                      "reads; with more prompts, how many of these each other one shares")
    what.add_argument("--slot", type=int, help="who reads this slot, and what it writes")
    what.add_argument("--map", action="store_true", help="draw which slots are used")
    what.add_argument("--teach", metavar="FACTS", help="teach the facts of this table, as in "
                      "prepare_data.py facts --from-file")
    what.add_argument("--forget", metavar="NAME", help="make the model forget the facts about NAME")
    parser.add_argument("--html", metavar="FILE", help="--show-memory as a page for a browser, too")
    parser.add_argument("--ablate-memory", nargs="?", const="", metavar="NAME",
                        help="ablate all memory layers, or the slots of the facts about NAME")
    parser.add_argument("--ablate-block", type=int, metavar="BLOCK",
                        help="ablate the MLP or memory layer of this block")
    parser.add_argument("--patterns", metavar="PATTERNS", help="how to say what --teach teaches")
    parser.add_argument("--teach-with", default="slots", choices=["slots", "all-values", "full"],
                        help="what may learn: the --slots values that the facts use most, all "
                        "values, or the whole model")
    parser.add_argument("--out", metavar="NEW", help="run folder that --teach and --forget make")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument("--backend", default="auto", choices=kernel.BACKENDS,
                        help="what the memory operations run on")
    add_flags(parser, Numbers())
    return parser


def read_args(argv):
    """The command line -> Numbers, and the other flags. Raises ValueError if they are wrong."""
    args = make_parser().parse_args(argv, Numbers())
    check_limits(args)
    changes = args.teach is not None or args.forget is not None
    if changes and not args.out:
        raise ValueError("--teach and --forget write a new run folder: name it with --out out/NAME")
    if args.teach is not None and not args.patterns:
        raise ValueError("--teach needs --patterns PATTERNS.tsv, which says how to put facts into "
                         "words")
    if args.ablate_block is not None and args.ablate_memory is not None:
        raise ValueError("--ablate-memory and --ablate-block are two experiments: give one of them")
    ablates = args.ablate_block is not None or args.ablate_memory is not None
    others = [args.show_memory, args.slot, args.teach, args.forget, args.map or None]
    if ablates and any(other is not None for other in others):
        raise ValueError("--ablate-memory and --ablate-block go with --prompt or --recall, or "
                         "alone: leave the rest out")
    if args.out and not changes:
        raise ValueError("--out is for --teach and --forget: leave it out")
    if args.html and args.show_memory is None:
        raise ValueError('--html is for --show-memory: add --show-memory "some text"')
    if args.html and not Path(args.html).parent.is_dir():
        raise ValueError(f"--html {args.html}: there is no folder {Path(args.html).parent}: make "
                         f"it, or choose another")
    args.device = pick_device(args.device)
    return args


def what_to_do(args):
    """What the command line asks for: a function of (model, tokenizer, line about them, args)."""
    if args.recall is not None:
        return recall
    if args.show_memory is not None:
        return show_memory
    if args.slot is not None:
        return look.show_slot
    if args.map:
        return look.draw_map
    if args.teach is not None:
        return edit.teach
    if args.forget is not None:
        return edit.forget
    # Without a prompt, ablating a model of facts prints a table of what it still knows.
    ablates = args.ablate_memory is not None or args.ablate_block is not None
    if ablates and args.prompt is None and is_facts(args.run):
        return edit.show_ablation
    return write


def show_memory(model, tok, about, args):
    """Show what the tokens of some prompts read, see look.show_memory."""
    prompts = [ids_of(tok, prompt, args.run) for prompt in args.show_memory]
    look.show_memory(model, tok, prompts, about, args)


@put_back()
def main(argv=None):
    """The command line -> the exit status. What the user can fix is one line on stderr."""
    try:
        any_characters()
        args = read_args(argv)
        model, tok, about = load(args)
        what_to_do(args)(model, tok, about, args)
        return 0
    except (ValueError, OSError) as e:
        message = str(e)
    except (RuntimeError, MemoryError) as e:
        message = explain(e, "lower --num-samples or --max-new-tokens, or use --device cpu")
        if not message:
            raise
    say_problem("sample.py", message)
    return 1


if __name__ == "__main__":
    # `| head` ends it without a word. Windows has no SIGPIPE.
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    code = main()
    try:
        sys.stdout.flush()
    except OSError as error:
        say_problem("sample.py", f"the text cannot be written: {error.strerror}")
        Steady(sys.stdout).give_up()  # Python would try again, and complain at length
        code = 1
    sys.exit(code)
