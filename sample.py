"""
Write with a trained run, ask it the facts it read, and take its memory away.

    python sample.py out/NAME                               # a document from its beginning, token by token
    python sample.py out/NAME --prompt "Rasia Westshaw was born in" --temperature 0
    python sample.py out/NAME --recall                      # ten facts at random, and how many are right
    python sample.py out/NAME --recall "Rasia Westshaw"     # every fact about one person
    python sample.py out/NAME --recall --ablate-memory      # the same questions, but the memory layers read zeros

Text goes to stdout, one line about what was loaded to stderr. --recall (for runs on the facts corpus) prints a table: the beginning of
a sentence, the model's likeliest answer, the right one, and how often that fact stands in the training text. The control people are
never in it: they show what guessing gives. It needs nothing but the run folder.
B, T samples, tokens · V, C vocabulary, width · S, D slots and dim of the memory table.
"""
import argparse, codecs, difflib, math, signal, sys
import numpy as np
import torch
from model import GPT, pick_device
from prepare_data import load_tokenizer, read_meta

NUMBERS = {  # flag: type, default, lowest, highest, help
    "count": (int, 10, 1, math.inf, "facts that --recall without a name asks"),
    "max_new_tokens": (int, 200, 1, math.inf, "the longest text; an end-of-text token ends it sooner"),
    "num_samples": (int, 1, 1, 10_000, "texts to write; several are printed when all are done"),
    "temperature": (float, 0.8, 0, 1000, "0: always the likeliest token; higher: more surprise"),
    "top_k": (int, None, 1, math.inf, "draw from the k likeliest tokens alone"),
    "top_p": (float, None, 1e-6, 1, "draw from the fewest tokens that have this probability together"),
    "seed": (int, 1337, 0, 2**63 - 1, "of all that is drawn")}


def read_args(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.error = lambda message: p.exit(2, f"sample.py: {message} (python sample.py --help lists every flag)\n")
    p.add_argument("run", help="run folder of train.py: out/NAME")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--prompt", help="text to go on with; else a document is begun")
    what.add_argument("--recall", nargs="?", const="", metavar="NAME", help="ask the facts about NAME, or a random handful")
    p.add_argument("--ablate-memory", action="store_true", help="set all that the memory layers read to zero")
    p.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    for name, (kind, default, _, _, text) in NUMBERS.items():
        p.add_argument("--" + name.replace("_", "-"), type=kind, default=default, help=f"{text} (default: {default or 'off'})")
    args = p.parse_args(argv)
    for name, (_, _, low, high, _) in NUMBERS.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be from {low} to {high}")
    args.device = pick_device(args.device)
    return args


def load(args):
    """The run folder -> GPT, Tokenizer, a line about them."""
    model, state = GPT.load(args.run)
    about = f"{args.run}: {model.config.ffn}, step {state['step']}, {model.param_counts()['total']:,} parameters, on {args.device}"
    try:
        tok = load_tokenizer(args.run)
    except (Exception, SystemExit):  # SystemExit: missing; a broken file can raise anything
        raise ValueError(f"{args.run}: meta.json or tokenizer.tiktoken is not there or broken: copy them from its data folder") from None
    if tok.vocab_size > (V := model.config.vocab_size):
        raise ValueError(f"{args.run}/tokenizer.tiktoken: {tok.vocab_size} tokens > the model's {V}: copy it from its data folder")
    model.wte.weight.data = model.wte.weight.data[:tok.vocab_size]          # (V, C), the head's too: what only rounds V up has no text
    if args.ablate_memory and not model.tables:
        raise ValueError(f"--ablate-memory: {args.run} is {model.config.ffn}, it has no memory layers to take away: leave it out")
    for table in model.tables if args.ablate_memory else ():
        table.values.data.zero_()                                           # (S, D): y = 0 whatever is read
    return model.to(args.device).eval(), tok, about


def samples(model, tok, ids, args):
    """Yield the texts of B samples in pieces: first what ids say, then, token by token, what each goes on with until its eot."""
    yield [tok.decode([i for i in ids if i != tok.eot])] * args.num_samples
    idx = torch.tensor([ids], device=args.device).repeat(args.num_samples, 1)  # (B, T)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in idx]  # a token may be a part of a character
    lead = b" " if tok.name == "words" and ids[-1] == tok.eot else b""      # is before a document's first word, not in its text
    going = [True] * len(idx)                                               # (B,)
    temperature = round(args.temperature, 4)  # 1e-40 is 0
    for token in model.generate(idx, args.max_new_tokens, temperature, args.top_k, args.top_p, generator):  # (B, 1)
        going = [on and i != tok.eot for on, i in zip(going, token[:, 0].tolist())]
        if not any(going):
            return
        yield [d.decode(tok.tokens[i].removeprefix(lead)) if on else "" for d, on, i in zip(decoders, going, token[:, 0].tolist())]
        lead = b""


def write(model, tok, about, args):
    """Print --num-samples texts: one as it comes, several one after another when all are done."""
    ids = tok.encode(args.prompt or "")
    if args.prompt is not None and not ids:
        raise ValueError(f"--prompt {args.prompt!r} makes no tokens: give it some text, or leave it out")
    ids = [tok.eot] * ("window" in read_meta(args.run) or not ids) + ids    # where each document has its window, an eot begins it
    print(about, file=sys.stderr)
    pieces = samples(model, tok, ids, args)
    if args.num_samples > 1:
        return print("\n---\n".join(map("".join, zip(*pieces))))
    for text, in pieces:
        print(text, end="", flush=True)
    print()


def recall(model, tok, about, args):
    """Print facts: what the model says, token after likeliest token, what is right, and how often that could be read."""
    try:
        facts = list(zip(*(np.load(f"{args.run}/recall.npz")[name].tolist() for name in ("seen", "seen_span", "exposures", "control"))))
    except Exception as e:  # a broken file can raise anything
        raise ValueError(f"cannot read {args.run}/recall.npz ({type(e).__name__}): only runs on the facts corpus have any to ask") from None
    names = [" ".join(tok.decode(window[1:]).split()[:2]) for window, *_ in facts]  # this phrasing begins with the name
    asked = [fact for fact, name in zip(facts, names) if name == args.recall]
    if not args.recall:
        asked = [facts[i] for i in np.random.default_rng(args.seed).permutation(len(facts))[:args.count]]
    elif not asked:
        near = difflib.get_close_matches(args.recall, sorted(set(names)), 3, cutoff=0)
        raise ValueError(f"--recall {args.recall!r}: nobody has that name, try {' or '.join(near)}")
    print(about, file=sys.stderr)
    line, right = "{:38}{:16}{:16}{:8}{}", 0
    print(line.format("asked", "answered", "right one", "", "times in the training text"))
    for window, (start, end), times, control in asked:
        idx, truth = torch.tensor([window[:start]], device=args.device), window[start:end]    # (1, T), the answer's tokens
        said = [token.item() for token in model.generate(idx, len(truth), temperature=0)]
        right += said == truth
        prompt, *texts = (" ".join(tok.decode(ids).split()) for ids in (window[1:start], said, truth))
        print(line.format(prompt, *texts, "right" if said == truth else "wrong", "never read" if control else times), flush=True)
    print(f"{right} of {len(asked)} right" + (", with all that the memory layers read set to zero" if args.ablate_memory else ""))


def main(argv=None):
    try:
        args = read_args(argv)
        sys.stdout.reconfigure(errors="replace")                            # a terminal that cannot show a character gets a ?
        (write if args.recall is None else recall)(*load(args), args)
    except (ValueError, OSError, RuntimeError) as e:  # RuntimeError: torch is out of memory
        raise SystemExit("sample.py: " + " ".join(str(e).split())) from None


if __name__ == "__main__":
    for name in {"SIGPIPE", "SIGINT"} & set(dir(signal)):  # `| head` and Ctrl-C end it quietly
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    main()
