"""Facts to teach a run of the facts corpus: about people who are in no training text.

    python runs/new_facts.py data/facts out/new         # writes out/new/facts.tsv and patterns.tsv

The people are those of the control group. Their names are known words, and what is true of them was
drawn like everything else, but no model can know it.
"""
import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from prepare_data import load_tokenizer
from support.data_folder import read_meta
from support.invented import RELATIONS
from support.recall import read_facts
from support.terminal import steady_output

# Of support.invented.RELATIONS, in that order.
NAMES_OF_RELATIONS = ["birthplace", "trade", "language", "food", "employer", "cat", "garden",
                      "ship"]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder of prepare_data.py facts")
    parser.add_argument("out", help="folder to write to")
    parser.add_argument("--count", type=int, default=100, help="facts (default: 100)")
    args = parser.parse_args()
    if args.count < 1:
        raise ValueError(f"--count {args.count}: must be at least 1")
    facts = read_facts(args.data)
    tok = load_tokenizer(args.data)
    relations = read_meta(args.data)["relations"]

    rows = ["relation\tsubject\tanswer"]
    for fact in np.flatnonzero(facts["control"])[:args.count]:
        start, end = facts["seen_span"][fact]
        answer = tok.decode(facts["seen"][fact][start:end]).strip()
        # The number of a fact is person * relations + relation.
        rows.append(f"{NAMES_OF_RELATIONS[fact % relations]}\t{facts['subject'][fact]}\t{answer}")
    patterns = ["relation\tpattern"]
    for name, (_, *phrasings) in zip(NAMES_OF_RELATIONS, RELATIONS[:relations]):
        patterns += [f"{name}\t{phrasing.format('{subject}', '{answer}')}"
                     for phrasing in phrasings]
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "facts.tsv").write_text("\n".join(rows) + "\n", "utf-8")
    (out / "patterns.tsv").write_text("\n".join(patterns) + "\n", "utf-8")
    print(f"written: {len(rows) - 1} facts in {out}/facts.tsv, and {out}/patterns.tsv")


if __name__ == "__main__":
    steady_output()
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit("new_facts.py: " + " ".join(str(error).split()))
