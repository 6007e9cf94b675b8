"""Every table, number and picture of recall in README.md and docs/, from assets/facts.json.

    python runs/report.py              # write the tables into the documents, draw the pictures
    python runs/report.py --collect    # first copy the result of every finished run in out/

A table stands in a document between two comments, and is replaced as a whole:

    <!-- report: main_table -->
    <!-- report: end -->

results.py reads the results, and says what assets/ holds. pictures.py draws.
"""
import argparse
import math
import re
import statistics
import sys
import textwrap

import numpy as np

from pictures import PICTURES, draw
from results import (BALANCE, DEEP, DEEP_PARTS, DENSE, EXPERTS, HALF_RATE, MAIN, NAMES, OWN, RATES,
                     ROOT, SLOTS, STEPS, TAUGHT, TEXT, TEXTS, TUNED, TWICE, VARIANTS, by_size,
                     collect, dense_for_as_long, fit, flops, load, predicted, read_assets, recall,
                     recall_at, seeds, share_lost, spread, teaching, text_loss, text_time, times,
                     total_parameters, training_time, usage, values)

from prepare_data import steady_output  # results.py has made the repository's scripts importable

# ---- tables

def markdown(head, rows):
    """A Markdown table. head: titles; rows: lists of as many cells."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def short_table(runs):
    """The table on the first screen of README.md."""
    rows = []
    for title, kind in MAIN.items():
        if title == "Memory+":
            continue
        first = seeds(runs, kind)[0]
        rows.append([
            title,
            spread(values(runs, kind, "recall"), 3),
            f"{first['flops_per_token'] / 1e6:.2f} M",
            f"{first['params']['total'] / 1e6:.2f} M",
            training_time(runs, title, kind),
        ])
    head = ["", "facts recalled", "FLOPs per token", "parameters", "training time"]
    return markdown(head, rows)


def main_table(runs):
    head = ["", "seeds", "facts recalled", "unseen phrasing", "validation loss", "bits stored",
            "bits per parameter"]
    rows = []
    for title, kind in MAIN.items():
        rows.append([
            title,
            str(len(seeds(runs, kind))),
            spread(values(runs, kind, "recall"), 3),
            spread(values(runs, kind, "recall_unseen_phrasing"), 3),
            spread(values(runs, kind, "val_loss"), 3),
            spread(values(runs, kind, "bits_stored"), 0),
            spread(values(runs, kind, "bits_per_param"), 3),
        ])
    return markdown(head, rows)


def cost_table(runs):
    """What each kind costs: tokens, FLOPs, parameters, time and memory."""
    head = ["", "tokens", "FLOPs per token", "parameters (active)", "training time",
            "peak memory of the process, MiB", "slots used", "KL"]
    rows = []
    for title, kind in MAIN.items():
        first = seeds(runs, kind)[0]
        used = ["", ""]
        if first["memory_usage"] is not None:
            share = statistics.mean(values(runs, kind, "memory_usage"))
            used = [f"{share:.0%}", spread(values(runs, kind, "memory_kl"), 2)]
        rows.append([
            title,
            f"{first['tokens'] / 1e6:.2f} M",
            f"{first['flops_per_token']:,}",
            f"{first['params']['total']:,} ({first['params']['active']:,})",
            training_time(runs, title, kind),
            spread(values(runs, kind, "peak_memory_bytes", 2**-20), 0),
            *used,
        ])
    return markdown(head, rows)


def exposures_table(runs):
    """Recall by how often a fact was read."""
    times = {"1": 1, "2-3": 2, "4-7": 4, "8-15": 8, "16-31": 16, "32-63": 32, "64-127": 64}
    rows = []
    for title, kind in MAIN.items():
        row = [title]
        for low in times.values():
            row.append(spread([recall_at(result, low) for result in seeds(runs, kind)], 2))
        row.append(spread(values(runs, kind, "recall_control"), 3))
        rows.append(row)
    return markdown(["times read", *times, "never (control)"], rows)


SIZES_HEAD = ["parameters", "FLOPs per token", "facts recalled", "unseen phrasing",
              "validation loss", "bits per parameter", "training time"]


def size_and_results(runs, title, kind):
    """The cells below SIZES_HEAD."""
    first = seeds(runs, kind)[0]
    return [f"{total_parameters(first):,}",
            f"{flops(first):,}",
            spread(values(runs, kind, "recall"), 3),
            spread(values(runs, kind, "recall_unseen_phrasing"), 3),
            spread(values(runs, kind, "val_loss"), 3),
            spread(values(runs, kind, "bits_per_param"), 3),
            training_time(runs, title, kind)]


def slots_table(runs):
    rows = []
    for title, kind in SLOTS.items():
        used = statistics.mean(values(runs, kind, "memory_usage"))
        rows.append([title, f"{used:.0%}", *size_and_results(runs, title, kind)])
    rows.append(["dense", "", *size_and_results(runs, "dense", DENSE["dense"])])
    return markdown(["slots", "slots used", *SIZES_HEAD], rows)


def scaling_table(runs):
    """Wider dense models, and mixtures of experts as large as the tables of slots_table."""
    rows = [[title, *size_and_results(runs, title, kind)]
            for title, kind in (DENSE | EXPERTS).items()]
    return markdown(["", *SIZES_HEAD], rows)


def deep_table(runs):
    """Memory+ and others in 8 blocks, beside those of three blocks."""
    kinds = {f"{title}, 3 blocks": (title, MAIN[title]) for title in ("dense", "Memory", "Memory+")}
    kinds |= {title: (title, kind) for title, kind in DEEP.items()}
    rows = [[title, *size_and_results(runs, step, kind)] for title, (step, kind) in kinds.items()]
    return markdown(["", *SIZES_HEAD], rows)


def deep_tuning_table(runs):
    """The rates that were tried in 8 blocks, on seed 1."""
    rows = []
    for title, kind in (DEEP | DEEP_PARTS).items():
        second = None if kind == "deep-dense" else "value_lr"
        rows += rates_and_results(title, second, tuned(runs, kind))
    return markdown(TUNING_HEAD, rows)


def usage_table(runs):
    """What a loss against uneven use changes, by its weight: of one seed or of several."""
    rows = []
    for weight, names in BALANCE.items():
        row = [weight, str(len(names))]
        for key, digits in (("recall", 3), ("val_loss", 3), ("memory_usage", 3), ("memory_kl", 2)):
            numbers = [runs[name][key] for name in names]
            if len(numbers) > 1:
                row.append(spread(numbers, digits))
            else:
                row.append(f"{numbers[0]:.{digits}f}")
        rows.append(row)
    return markdown(["weight of the loss", "seeds", "facts recalled", "validation loss",
                     "share of the slots that a step reads", "KL"], rows)


def reads_table(runs):
    kinds = {"32 (the default)": ("Memory", "facts-memory"), "8": ("Memory, K = 8", "facts-k8")}
    rows = []
    for title, (step, kind) in kinds.items():
        rows.append([title, f"{seeds(runs, kind)[0]['flops_per_token']:,}",
                     spread(values(runs, kind, "recall"), 3), training_time(runs, step, kind)])
    return markdown(["`--mem-topk`", "FLOPs per token", "facts recalled", "training time"], rows)


def variants_table(runs):
    """Runs of one seed, beside the same seed of the kinds that they vary."""
    head = ["`python train.py --seed 1 --out-dir out/NAME` with", "NAME", "facts recalled"]
    rows = [[flags, f"`{name}`", f"{runs[name]['recall']:.3f}"]
            for flags, name in VARIANTS.items()]
    return markdown(head, rows)


def names_table(runs):
    """Recall on the corpora that name their people in another way."""
    rows = []
    for names, example in NAMES.items():
        row = [example]
        for kind in ("dense", "memory", "hash"):
            name = f"{names}-{kind}"
            row.append(spread(values(runs, name, "recall"), 3))
        rows.append(row)
    return markdown(["people are named", "dense", "Memory", "hash"], rows)


def own_table(runs):
    """Recall of facts of the real world, with words and with bytes as tokens."""
    head = ["tokens", "", "facts recalled", "read 4-7 times", "16-31", "64-127",
            "never (control)", "validation loss", "FLOPs per token", "parameters"]
    rows = []
    for tokens in ("words", "bytes"):
        for title, kind in OWN.items():
            name = f"own-{tokens}-{kind}"
            results = seeds(runs, name)
            row = [tokens, title, spread(values(runs, name, "recall"), 3)]
            for times_read in (4, 16, 64):
                row.append(spread([recall_at(result, times_read) for result in results], 2))
            row.append(spread(values(runs, name, "recall_control"), 3))
            row.append(spread(values(runs, name, "val_loss"), 3))
            row.append(f"{flops(results[0]) / 1e6:.2f} M")
            row.append(f"{total_parameters(results[0]) / 1e6:.2f} M")
            rows.append(row)
    return markdown(head, rows)


def own_tuning_table(runs):
    """The rates that were tried on these facts, on seed 1."""
    rows = []
    for tokens in ("words", "bytes"):
        for title, kind in OWN.items():
            second = TUNED[title][1]
            tried = tuned(runs, f"own-{tokens}-{kind}")
            rows += [[tokens, *row] for row in rates_and_results(title, second, tried)]
    return markdown(["tokens", *TUNING_HEAD], rows)


def text_table(runs):
    """Validation loss on ordinary text, and what it takes."""
    head = ["text", "", "validation loss", "dense in that time, about", "training time", "tokens",
            "FLOPs per token", "parameters", "peak memory, MiB"]
    rows = []
    for text in TEXTS:
        for title, kind in TEXT.items():
            name = f"text-{text}-{kind}"
            first = seeds(runs, name)[0]
            time = text_time(runs, text, title)
            dense = ""
            if 1 < time < 2:  # between the two runs of dense
                dense = f"{dense_for_as_long(runs, text, time):.3f}"
            rows.append([text, title,
                         spread(values(runs, name, "val_loss"), 3),
                         dense,
                         f"{time:.2f}",
                         f"{first['tokens'] / 1e6:.2f} M",
                         f"{flops(first) / 1e6:.2f} M",
                         f"{total_parameters(first) / 1e6:.2f} M",
                         spread(values(runs, name, "peak_memory_bytes", 2**-20), 0)])
    return markdown(head, rows)


def text_tuning_table(runs):
    """The rates that were tried on ordinary text, on seed 1."""
    rows = []
    for text in TEXTS:
        for title, kind in TEXT.items():
            if title.endswith(TWICE):  # it has the rates of the shorter run
                continue
            tried = tuned(runs, f"text-{text}-{kind}")
            rows += [[text, *row] for row in rates_and_results(title, TUNED[title][1], tried)]
    return markdown(["text", *TUNING_HEAD[:-1]], rows)


def teach_table(runs):
    """What 100 new facts cost in old ones, for each way to teach them."""
    head = ["what learns", "new facts learnt", "in the unseen phrasing", "old facts before",
            "after", "share lost", "slots changed", "steps"]
    taught = teaching()
    rows = []
    for name, title in TAUGHT.items():
        edits = seeds(taught, f"teach-{name}")
        row = [title]
        # Of each: new facts, new facts in the unseen phrasing, old facts.
        for when, i in (("after", 0), ("after", 1), ("before", 2), ("after", 2)):
            row.append(spread([edit[when][i] for edit in edits], 3))
        row.append(spread([share_lost(edit) for edit in edits], 3))
        changed = [sum(edit["changed"]) for edit in edits]  # over the tables of the model
        row.append(f"{statistics.mean(changed):,.0f}")
        row.append(f"{statistics.mean(edit['steps'] for edit in edits):.0f}")
        rows.append(row)
    return markdown(head, rows)


TUNING_HEAD = ["", "rate", "of the table or experts", "validation loss", "facts recalled"]


def tuned(runs, kind):
    """Seed 1 of a kind of the study, and the runs that differ from it in their rates alone."""
    in_study = runs[f"{kind}-1"]
    name = kind.removeprefix("facts-")
    tried = [run for other, run in runs.items() if re.match(rf"tune-{name}-\d", other)]
    expect(all(in_study["val_loss"] < run["val_loss"] for run in tried),
           f"the study uses the best rates of {kind}")
    return sorted([in_study, *tried], key=lambda run: [run[rate] for rate in RATES])


def rates_and_results(title, second, tried):
    """A row of a table for each run, with the best loss in bold. second: a rate's name, or None.

    The last cell is recall. Runs on ordinary text have none.
    """
    best = min(run["val_loss"] for run in tried)
    rows = []
    for run in tried:
        loss = f"{run['val_loss']:.4f}"
        if run["val_loss"] == best:
            loss = f"**{loss}**"
        other = ""
        if second:
            other = f"{run[second]:g}"
        row = [title, f"{run['learning_rate']:g}", other, loss]
        if "recall" in run:
            row.append(f"{run['recall']:.3f}")
        rows.append(row)
    return rows


def tuning_table(runs):
    """Every run of one seed that only differs in its rates from a kind of the study."""
    rows = []
    for title, (kind, second) in TUNED.items():
        rows += rates_and_results(title, second, tuned(runs, f"facts-{kind}"))
    return markdown(TUNING_HEAD, rows)


def bfloat16_table(runs):
    kinds = {"float32": ("Memory+", "facts-plus-6.4e-1"),
             "bfloat16": ("Memory+, bfloat16", "facts-bf16")}
    rows = [[title, spread(values(runs, kind, "recall"), 3),
             spread(values(runs, kind, "val_loss"), 3), training_time(runs, step, kind)]
            for title, (step, kind) in kinds.items()]
    return markdown(["table held in", "facts recalled", "validation loss", "training time"], rows)


def ranks_table(runs):
    rows = []
    for title, kind in (("one process", "facts-memory"), ("two processes", "facts-2ranks")):
        results = seeds(runs, kind)[:3]  # seeds 1 to 3: Memory has more
        rows.append([title, spread([result["recall"] for result in results], 3),
                     spread([result["val_loss"] for result in results], 3)])
    return markdown(["", "facts recalled", "validation loss"], rows)


def steps_table(runs):
    """What a step takes, of all models of docs/results.md."""
    rows = []
    for title, row in read_assets(STEPS).items():
        low, middle, high = row["ratio"]
        rows.append([title, f"{row['ms'][1]:.1f}", f"{row['dense_ms']:.1f}", f"{middle:.2f}",
                     f"{low:.2f} to {high:.2f}"])
    return markdown(["", "ms a step", "dense, timed beside it", "times dense", "quartiles"], rows)


# ---- sentences

def paragraphs(*texts):
    """Texts as paragraphs, or as the points of a list, with lines of at most 100 characters."""
    return "\n\n".join(textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)
                       for text in texts)


def points(*texts):
    lines = [textwrap.fill(text, 100, initial_indent="- ", subsequent_indent="  ",
                           break_long_words=False, break_on_hyphens=False) for text in texts]
    return "\n".join(lines)


def listed(texts):
    """Two texts or more -> "a, b and c"."""
    return ", ".join(texts[:-1]) + f" and {texts[-1]}"


def expect(holds, claim):
    """A sentence is only written while it is true."""
    if not holds:
        raise ValueError(f"this no longer holds, so its sentence must be written anew: {claim}")


# The kinds of about equal FLOPs that the sentences rank, from the highest recall to the lowest.
RANKED = ["facts-hash", "facts-memory", "facts-ultramem", "facts-peer", "facts-moe", "facts-dense"]


def expect_rank(runs):
    expect(all(recall(runs, a) > recall(runs, b) for a, b in zip(RANKED, RANKED[1:])),
           "hash, Memory, UltraMem, PEER, MoE, dense is the order of recall")


def main_text(runs):
    memory, dense = "facts-memory", "facts-dense"
    expect_rank(runs)
    expect(recall(runs, "facts-n256") > recall(runs, "facts-dense4"),
           "65,536 slots recall more than dense with 4 times the FLOPs")
    once = [statistics.mean(recall_at(result, 1) for result in seeds(runs, kind))
            for kind in MAIN.values()]

    def bits(kind):
        return spread(values(runs, kind, "bits_per_param"), 3)

    return points(
        f"**At equal tokens and FLOPs** the hash recalls the most, then Memory, UltraMem, PEER and "
        f"MoE: {listed([times(runs, kind, dense) for kind in RANKED[:-1]])} as many facts as "
        f"dense, which has a sixth of their parameters. Why the hash is ahead here, and when it "
        f"is not, is shown [below](#how-people-are-named).",
        f"**At equal time** Memory recalls {times(runs, memory, 'facts-dense-long')} as many facts "
        f"as dense. MoE, PEER and UltraMem take longer than Memory, the hash takes less.",
        f"**Against larger dense models**: Memory recalls "
        f"{times(runs, memory, 'facts-dense2')} as many facts as dense with twice the FLOPs, and "
        f"{times(runs, memory, 'facts-dense4')} as many as dense with four times the FLOPs. With "
        f"65,536 slots it is {times(runs, 'facts-n256', 'facts-dense2')} and "
        f"{times(runs, 'facts-n256', 'facts-dense4')}.",
        f"**The difference is in the long tail.** Facts that were read 64 times are known to all "
        f"models. Of the facts that were read once all know few ({min(once):.2f} to "
        f"{max(once):.2f}).",
        f"**Bits per parameter**: Memory stores {bits(memory)}, the dense model of the same "
        f"width, which is a sixth as large, {bits(dense)}, and dense with eight times the FLOPs, "
        f"which is larger than Memory, {bits('facts-dense208')}.")


def readme_text(runs):
    memory, dense = "facts-memory", "facts-dense"
    larger = recall(runs, "facts-dense4") / recall(runs, dense)
    expect(larger < recall(runs, memory) / recall(runs, dense), "Memory beats 4 times the FLOPs")
    expect_rank(runs)
    return paragraphs(
        f"The memory model recalls {times(runs, memory, dense)} as many facts as the dense model. "
        f"If the dense model may train for as long, this falls to "
        f"{times(runs, memory, 'facts-dense-long')}. A dense model of four times the FLOPs recalls "
        f"{larger:.1f} times as many. Of the rivals, a mixture of experts recalls "
        f"{times(runs, 'facts-moe', dense)} as many, PEER {times(runs, 'facts-peer', dense)}, "
        f"UltraMem {times(runs, 'facts-ultramem', dense)} and the hash "
        f"{times(runs, 'facts-hash', dense)}. The gain is in the long tail: all models "
        f"know the facts that were read 64 times, and few of those that were read once.")


def gains_at(runs, corpus):
    """The rows of recall by exposures where Memory recalls at least 0.1 more than dense.

    -> the least number of reads of each.
    """
    found = []
    for times_read in (1, 2, 4, 8, 16, 32, 64, 128):
        memory, dense = [statistics.mean(recall_at(result, times_read)
                                         for result in seeds(runs, f"{corpus}-{kind}"))
                         for kind in ("memory", "dense")]
        if memory - dense >= 0.1:
            found.append(times_read)
    return found


def choosing_text(runs):
    facts = 40_000  # of the default corpus
    per_100 = [f"{100 * int(slots.replace(',', '')) / facts:.0f}" for slots in SLOTS]
    recalls = [f"{recall(runs, kind):.2f}" for kind in SLOTS.values()]

    def factor(result):
        return result["value_lr"] / result["learning_rate"]

    factors = [factor(runs[f"own-{tokens}-memory-1"]) for tokens in ("words", "bytes")]
    of_text = {kind: [f"{factor(runs[f'text-{text}-{kind}-1']):.0f}" for text in TEXTS]
               for kind in ("memory", "plus", "hash")}
    expect(len(set(of_text["hash"])) == 1, "the hash has the same factor on both texts")
    memory = runs["facts-memory-1"]
    plus = runs["facts-plus-1"]
    deep = runs["deep-plus-1"]
    expect(all(recall(runs, f"{corpus}-hash") > recall(runs, f"{corpus}-memory")
               for corpus in ("facts", "single", "own-words", "own-bytes")), "the hash is ahead")
    expect(gains_at(runs, "facts") == [2, 4, 8, 16, 32], "Memory gains at 2 to 63 reads")
    expect(gains_at(runs, "own-bytes") == [32, 64, 128], "with bytes at 32 reads and more")
    return points(
        "**Is it worth it?** It depends on how your subjects are named, and how often a fact is "
        "read. If the tokens of the names are shared, Memory recalls at least 0.1 more than dense "
        "of the facts that are read 2 to 63 times in the invented corpus, and 32 times or more in "
        "real facts with bytes. (There a mixture of experts gains as much, in the invented corpus "
        "far less.) If each subject has a "
        "token of its own, a memory layer adds little ([names](#how-people-are-named), [real facts]"
        "(#facts-of-the-real-world)). Try the hash as well: its step is faster, and with a table "
        "of the same size it recalled more than Memory in all comparisons but that of names whose "
        "parts stand apart.",
        f"**How many slots?** As many as memory and time allow ([more slots](#more-slots)). With "
        f"{listed(per_100)} slots per 100 facts, recall is {listed(recalls)}.",
        f"**How many reads?** The default, 4 heads of 32 reads. With 8 reads a head, not 32, "
        f"recall falls from {recall(runs, 'facts-memory'):.2f} to {recall(runs, 'facts-k8'):.2f}, "
        f"and training takes {training_time(runs, 'Memory, K = 8', 'facts-k8')} times as long as "
        f"dense, not {training_time(runs, 'Memory', 'facts-memory')} times. On seed 1, two heads "
        f"of 64 recall {runs['variant-h2-k64']['recall']:.2f}, and four of 32 "
        f"{memory['recall']:.2f}.",
        f"**Which rates?** Take the rate that suits the dense model. Then give the table "
        f"{factor(memory):.0f} times that. Try a quarter of it and four times as much, too, and go "
        f"on from the best ([tuning](#tuning)). The best factor "
        f"differs: for Memory on real facts it was {factors[0]:.0f} with words and "
        f"{factors[1]:.0f} with bytes, and on ordinary text {listed(of_text['memory'])}. For "
        f"Memory+ it was {factor(plus):,.0f} in three blocks, {factor(deep):.0f} in eight, and "
        f"{listed(of_text['plus'])} on ordinary text. The hash wants {of_text['hash'][0]} there.",
        f"**How many layers?** One, in the middle block of three. Two that share the table recall "
        f"{runs['variant-two-layers']['recall']:.2f} with as many reads in all, and one "
        f"{memory['recall']:.2f} (seed 1, the two not tuned). In 8 blocks one layer recalls "
        f"{recall(runs, 'deep-memory'):.2f}. Three that share the table recall "
        f"{recall(runs, 'deep-three'):.2f}, with three times the reads.",
        "**Gate and norm (Memory+)?** Not in so small a model, be it [deeper]"
        "(#memory-in-a-deeper-model) or not. The paper finds them better in models from 134 M "
        "parameters.",
        f"**Ordinary text, not facts?** In models as small as these, take the hash. On [web "
        f"pages](#ordinary-text) its loss is {text_loss(runs, 'web', 'hash'):.2f}, that of Memory+ "
        f"{text_loss(runs, 'web', 'Memory+'):.2f}, and of dense "
        f"{text_loss(runs, 'web', 'dense'):.2f}.",
        "**Not tried**: memory layers on facts at widths above 64, several tables in a model, "
        "rates for each table size, a GPU.")


def names_text(runs):
    apart = {kind: recall(runs, f"apart-{kind}") for kind in ("dense", "memory", "hash")}
    expect(apart["memory"] > apart["hash"], "with names apart Memory recalls more than the hash")
    single = {kind: recall(runs, f"single-{kind}") for kind in ("dense", "memory", "hash")}
    deviation = statistics.stdev(values(runs, "single-memory", "recall"))
    expect(abs(single["dense"] - single["memory"]) < deviation, "with single names dense is level")
    return points(
        f"**Names apart**: the hash falls to {apart['hash']:.3f}, Memory recalls "
        f"{apart['memory']:.3f}. A query is made from all that the model has understood so far, "
        f"wherever it stood.",
        f"**Single names**: dense recalls as much as Memory ({single['dense']:.3f} and "
        f"{single['memory']:.3f}, within the spread), the hash {single['hash']:.3f}. Each person "
        f"has an embedding of their own here, which can hold what is known about them: 8,000 "
        f"people with 64 numbers each are half as many parameters as the table has.")


def own_text(runs):
    all_facts = {tokens: {kind: recall(runs, f"own-{tokens}-{kind}") for kind in OWN.values()}
                 for tokens in ("words", "bytes")}
    words = all_facts["words"]
    in_bytes = all_facts["bytes"]
    often = {kind: statistics.mean(recall_at(result, 64)
                                   for result in seeds(runs, f"own-bytes-{kind}"))
             for kind in OWN.values()}
    guess = statistics.mean(statistics.mean(values(runs, f"own-bytes-{kind}", "recall_control"))
                            for kind in OWN.values())
    expect(abs(in_bytes["dense"] - guess) < 0.02, "with bytes dense recalls no more than a guess")
    expect(guess + 0.02 < min(in_bytes["memory"], in_bytes["moe"]), "Memory and MoE recall more")
    expect(in_bytes["hash"] > 2 * in_bytes["memory"], "with bytes the hash is far ahead")
    expect(words["dense"] > 0.85 * max(words.values()), "with words dense is not far behind")
    dense = seeds(runs, "own-words-dense")
    worst = min(result["recall"] for result in dense)
    expect(worst < 0.8, "one seed of dense with words does badly")
    half_rate = [runs[name] for name in HALF_RATE]
    steps = dense[0]["max_steps"]
    return points(
        f"**With bytes, dense learns only the most frequent facts in so short a run.** Of those "
        f"that were read 64 to 127 times it recalls {often['dense']:.2f}, Memory "
        f"{often['memory']:.2f} and MoE {often['moe']:.2f}. Over all facts dense recalls "
        f"{in_bytes['dense']:.2f}, as guessing does ({guess:.2f}), Memory "
        f"{in_bytes['memory']:.2f} and MoE {in_bytes['moe']:.2f}.",
        f"**The hash is far ahead with bytes** ({in_bytes['hash']:.2f}), although three bytes name "
        f"nobody. A likely reason, not tested: every group of letters has its own set of slots "
        f"from the first step, and the next block puts the groups together. Memory has to learn "
        f"its queries first, and has {steps:,} steps for that.",
        f"**With words, dense is not far behind**: it recalls {words['dense']:.2f}, Memory "
        f"{words['memory']:.2f}, MoE {words['moe']:.2f} and the hash {words['hash']:.2f}. Its "
        f"seeds differ widely: one of them recalls {worst:.2f}. Half its rate, 6e-3, gives "
        f"{spread([result['recall'] for result in half_rate], 3)}, and a validation loss of "
        f"{spread([result['val_loss'] for result in half_rate], 3)}. The "
        f"{dense[0]['vocab_size']:,} words are mostly names, and each has an embedding of 64 "
        f"numbers. Together they are {dense[0]['params']['embedding'] / 1e6:.2f} M parameters, "
        f"half as many as the memory table has.",
        f"**A rule to take home.** How many of your subjects have a token that no other subject "
        f"has? `prepare_data.py` prints it. Here it is 84% with words and 0% with bytes. In the "
        f"invented corpus nobody has one, or everybody where a name is one word. Where most have "
        f"one, its embedding can hold the facts, and Memory adds little: it recalls "
        f"{words['memory']:.2f} instead of {words['dense']:.2f} here, and "
        f"{recall(runs, 'single-memory'):.2f} instead of {recall(runs, 'single-dense'):.2f} in the "
        f"invented corpus. Where none has one, Memory adds more, to facts that are read often "
        f"enough: {often['memory']:.2f} instead of {often['dense']:.2f} here (read 64 to 127 "
        f"times), and {recall(runs, 'facts-memory'):.2f} instead of "
        f"{recall(runs, 'facts-dense'):.2f} there. Its rivals gain from this, too. These are four "
        f"corpora, and they differ in more than this.")


def text_text(runs):
    mean = {text: {title: text_loss(runs, text, title) for title in TEXT} for text in TEXTS}
    of_seeds = {text: {title: values(runs, f"text-{text}-{kind}", "val_loss")
                       for title, kind in TEXT.items()} for text in TEXTS}
    others = ("MoE", "Memory", "Memory+")
    for text in TEXTS:
        expect(max(of_seeds[text]["hash"]) < mean[text]["dense" + TWICE],
               f"on {text} every seed of the hash is ahead of dense with twice the steps")
        expect(max(mean[text][title] for title in others) < mean[text]["dense"],
               f"on {text} the other three are ahead of dense")

        worst = {title: max(numbers) for title, numbers in of_seeds[text].items()}
        best = {title: min(numbers) for title, numbers in of_seeds[text].items()}
        expect(min(worst["Memory"], worst["Memory+"]) > best["dense"],
               f"on {text} the seeds of Memory and Memory+ overlap those of dense")
        expect((worst["MoE"] > best["dense"]) == (text == "stories"),
               "the seeds of MoE and dense overlap on stories only")
        expect((worst["Memory+" + TWICE] > best["dense" + TWICE]) == (text == "stories"),
               "with twice the steps the seeds of Memory+ and dense overlap on stories only")
    behind = {text: {title: mean[text][title] - dense_for_as_long(
                  runs, text, text_time(runs, text, title)) for title in others} for text in TEXTS}
    expect(abs(behind["stories"]["Memory"]) < 0.03, "on stories Memory is level at equal time")
    expect(all(behind[text][title] > 0 for text in TEXTS for title in ("MoE", "Memory+"))
           and behind["web"]["Memory"] > 0, "the others are behind dense at equal time")

    def both(title):
        """The loss on stories and on web pages."""
        return listed([f"{mean[text][title]:.2f}" for text in TEXTS])

    def gain(text, twice=""):
        """How much lower the loss of Memory+ is than that of dense. twice: "" or TWICE."""
        return f"{mean[text]['dense' + twice] - mean[text]['Memory+' + twice]:.2f}"

    return points(
        f"**The hash is far ahead**: its loss is {both('hash')} on stories and pages, that of "
        f"dense {both('dense')}, and of dense with twice the steps {both('dense' + TWICE)}. A "
        f"likely reason, not tested: the last one to three tokens say much about the next one, and "
        f"the hash has a choice of slots for each such group from the first step on. The other "
        f"layers have to learn which tokens to tell apart.",
        f"**At equal tokens** the others gain a little on dense: Memory has {both('Memory')}, "
        f"Memory+ {both('Memory+')} and MoE {both('MoE')}. The seeds of Memory and Memory+ "
        f"overlap those of dense on both texts, those of MoE on stories.",
        f"**At equal time only the hash is ahead of dense.** Memory is level with dense on "
        f"stories, and its loss is {behind['web']['Memory']:.2f} higher on pages. That of Memory+ "
        f"is {behind['stories']['Memory+']:.2f} and {behind['web']['Memory+']:.2f} higher, that of "
        f"MoE {behind['stories']['MoE']:.2f} and {behind['web']['MoE']:.2f}.",
        f"**With twice the steps for both**, the loss of Memory+ is lower than that of dense by "
        f"{gain('stories', TWICE)} on stories, where the seeds overlap, and by "
        f"{gain('web', TWICE)} on pages, where they do not. With the fewer steps it is "
        f"{gain('stories')} and {gain('web')}. The same steps take Memory+ "
        f"{text_time(runs, 'web', 'Memory+'):.2f} times as long as dense.",
        "**How far to trust this**: these are small models that read 0.3 to 2 million tokens. The "
        "validation text of the stories is short, 18,405 tokens. The rates were chosen on the "
        "validation text whose loss is reported. The paper's gains are largest on questions about "
        "facts, for models from 134 M parameters that read a trillion tokens.")


def teach_text(runs):
    taught = teaching()
    lost = {name: [share_lost(edit) for edit in seeds(taught, f"teach-{name}")] for name in TAUGHT}
    mean = {name: statistics.mean(of_seeds) for name, of_seeds in lost.items()}
    expect(mean["all-values-3"] <= 1.2 * mean["slots-4096"],
           "all values lose as little as the best number of slots")
    expect(mean["slots-1024"] > 2 * mean["slots-4096"], "few slots lose more")
    ratio = mean["full-1e-4"] / mean["slots-4096"]
    few = statistics.mean(edit["after"][0] for edit in seeds(taught, "teach-slots-512"))
    return points(
        f"**The table learns at a small price.** With 4,096 slots {100 * mean['slots-4096']:.1f}% "
        f"of the old facts are lost, with the whole model {100 * mean['full-1e-4']:.0f}%. The "
        f"ratio is about 1 to {round(ratio, -1):.0f}, at the rate of 1e-4. (The paper of the "
        f"method finds 1 to 8, with other models and facts.) The unseen phrasing is learnt, too.",
        f"**Choosing slots does not help here.** All values lose as little "
        f"({100 * mean['all-values-3']:.1f}%). What helps is to leave the rest of the model alone. "
        f"A likely reason: sentences about new people read their own part of the table anyway.",
        f"**Too few slots hurt.** In 200 steps 512 slots learn {100 * few:.0f} facts. With 512 to "
        f"2,048, it takes more steps, and more of the old facts are lost.")


def tuning_text(runs):
    def tried(name):
        return f"{runs[name]['recall']:.3f}"

    memory = runs["facts-memory-1"]
    expect(all(runs["facts-ultramem-1"]["recall"] > runs[f"tune-ultramem-end-{rate}"]["recall"]
               for rate in ("1.6e-1", "6.4e-1")), "UltraMem does better without the falling rate")
    return points(
        f"**A table needs a rate many times that of the rest**: "
        f"{memory['value_lr'] / memory['learning_rate']:.0f} times for Memory. With 1e-2 it "
        f"recalls {tried('tune-memory-3e-3-1e-2')}, with 1.6e-1 {tried('facts-memory-1')}.",
        f"**Memory+ needs a higher one still** in three blocks. With 1.6e-1 it recalls "
        f"{tried('tune-plus-3e-3-1.6e-1')}, with 2.56 (and 1.5e-3 for the rest) "
        f"{tried('facts-plus-1')}. A likely reason: the gate and W2 make what the table gives "
        f"several times smaller, so its values have further to go.",
        f"**PEER is the most sensitive.** Where the sweep starts, at 3e-3 and 4e-2, it recalls "
        f"{tried('tune-peer-3e-3-4e-2')}, less than dense. At its best it is "
        f"{tried('facts-peer-1')}: `--learning-rate 1.5e-3 --value-lr 1e-2`.",
        f"**UltraMem** recalls {tried('facts-ultramem-1')} at its best: `--learning-rate 1.5e-3 "
        f"--value-lr 1.6e-1`. Its paper lets the rate of the table fall to a quarter besides "
        f"(`--value-lr-end 0.25`). That hurts in so short a run: "
        f"{tried('tune-ultramem-end-1.6e-1')}, and {tried('tune-ultramem-end-6.4e-1')} from four "
        f"times the rate.",
        f"**256 experts** of 32 hidden units (`tune-experts-256`) recall "
        f"{tried('tune-experts-256')}, 128 experts of 64 {tried('facts-moe-1')}. The study uses "
        f"the latter.",
        f"**Chosen by validation loss.** By recall it would be the same, but for two: the hash "
        f"recalls {tried('tune-hash-1.5e-3-4e-2')} with 1.5e-3, {tried('facts-hash-1')} with the "
        f"study's 3e-3, and the narrowest dense model {tried('tune-dense48-3e-3')} with 3e-3, "
        f"{tried('facts-dense48-1')} with the study's 6e-3. The spread of their seeds is wider "
        f"than that.",
        f"**Hash**: `--value-lr 4e-2`. The default of `facts`, 1.6e-1, is Memory's; the hash "
        f"recalls {tried('tune-hash-3e-3-1.6e-1')} with it, {tried('facts-hash-1')} with its own.")


def slots_text(runs):
    sizes = list(SLOTS.values())
    expect(all(recall(runs, a) < recall(runs, b) for a, b in zip(sizes, sizes[1:])),
           "each row of the slots recalls more than the one before")
    expect(recall(runs, sizes[0]) < recall(runs, "facts-dense"), "1,024 slots are worse than dense")
    most, dense = "facts-n512", "facts-dense"
    guess = statistics.mean(values(runs, dense, "recall_control"))
    read_once = statistics.mean(recall_at(result, 1) for result in seeds(runs, dense))
    expect(read_once < guess + 0.01, "dense guesses at the facts that it read once")
    once = spread([recall_at(result, 1) for result in seeds(runs, most)], 3)
    dense_once = spread([recall_at(result, 1) for result in seeds(runs, dense)], 3)
    total = {kind: seeds(runs, kind)[0]["params"]["total"] for kind in (most, dense, "facts-n256")}
    return points(
        "**Recall rises with every size**, as the paper "
        "([2412.09764](https://arxiv.org/abs/2412.09764)) finds.",
        f"**Against dense**: with 65,536 slots the model recalls "
        f"{times(runs, 'facts-n256', dense)} as many facts as the dense model of the same width, "
        f"with 262,144 slots {times(runs, most, dense)}.",
        f"**Rare facts**: of the facts that were read once, 262,144 slots recall {once}, the dense "
        f"model {dense_once}, which is no more than guessing.",
        f"**The cost in parameters**: {total['facts-n256'] / total[dense]:.0f} times the dense "
        f"model's with 65,536 slots, {total[most] / total[dense]:.0f} times with 262,144.",
        "**A small table gains nothing.** With 1,024 slots it is twice as large as the MLP that it "
        "replaces, and recalls no more.",
        "**Tuning**: the memory models of all sizes keep the rates that were tuned at 16,384 "
        "slots. Other sizes may do better with rates of their own.")


def memory_as_large_as(runs, kind, key="recall"):
    """A number of a table model with the parameters of another kind of run.

    Between the two sizes that were measured around it, over the logarithm of the parameters.
    """
    sizes, columns = by_size(runs, SLOTS.values(), total_parameters, key)
    size = total_parameters(seeds(runs, kind)[0])
    means = [statistics.mean(column) for column in columns]
    return float(np.interp(np.log(size), np.log(sizes), means))


def misses(runs, kinds):
    """By how much the curve of fit() is above the mean recall of each kind -> an array."""
    sizes, columns = by_size(runs, kinds.values(), total_parameters)
    means = [statistics.mean(column) for column in columns]
    return predicted(fit(sizes, columns), sizes) - means


def predict_last(runs, kinds):
    """The recall that the curve through all kinds of run but the last predicts for the last."""
    sizes, columns = by_size(runs, kinds.values(), total_parameters)
    return float(predicted(fit(sizes[:-1], columns[:-1]), sizes[-1]))


def scaling_text(runs):
    widths = ["facts-dense2", "facts-dense4", "facts-dense208"]
    dense = [recall(runs, kind) for kind in widths]
    memory = [memory_as_large_as(runs, kind) for kind in widths]
    expect(abs(dense[0] - memory[0]) < 0.03, "with 0.4 M parameters they are level")
    expect(all(d < m < 1.3 * d for d, m in zip(dense[1:], memory[1:])), "then memory is ahead")
    wide = seeds(runs, "facts-dense208")[0]
    in_millions = [f"{total_parameters(seeds(runs, kind)[0]) / 1e6:.1f}" for kind in widths]
    default = "facts-memory"
    deviation = statistics.stdev(values(runs, "facts-dense208", "recall"))
    expect(abs(dense[2] - recall(runs, default)) < deviation, "8 times the FLOPs are like Memory")
    few = flops(seeds(runs, "facts-n32")[0])
    many = flops(seeds(runs, "facts-n512")[0])
    sizes = list(SLOTS.values())
    as_many_flops = []
    for kind in widths:
        of_memory = memory_as_large_as(runs, kind, "flops_per_token")
        as_many_flops.append(f"{flops(seeds(runs, kind)[0]) / of_memory:.1f}")
    experts = [recall(runs, kind) for kind in EXPERTS.values()]
    tables = [recall(runs, kind) for kind in sizes[1:4]]
    expect(max(experts) < tables[0], "all mixtures recall less than the smallest of these tables")
    off = misses(runs, SLOTS)
    miss = max(abs(off))
    dense_miss = max(abs(misses(runs, DENSE)))
    expect(dense_miss < miss, "the curve of Memory fits less well")
    expect(min(off[0], off[-1]) > 0 > max(off[2], off[3]),
           "it is too high at both ends, and too low for 16,384 and 65,536 slots")
    loss = [statistics.mean(values(runs, kind, "val_loss")) for kind in sizes]
    expect(loss == sorted(loss, reverse=True), "more slots have a lower loss")

    def two(numbers):
        return listed([f"{number:.2f}" for number in numbers])

    return points(
        f"**At equal parameters**, {listed(in_millions)} M, dense recalls {two(dense)}, memory "
        f"{two(memory)}. (The numbers of memory are interpolated over the logarithm of the "
        f"parameters.) "
        f"So with 0.4 M they are level, and then memory is ahead. A table of 1,024 slots (0.24 "
        f"M) recalls no more than dense (0.20 M). The three dense models take "
        f"{listed(as_many_flops)} "
        f"times the FLOPs of memory.",
        f"**At about equal FLOPs**, {few / 1e6:.1f} to {many / 1e6:.1f} M, dense recalls "
        f"{recall(runs, 'facts-dense'):.2f} and memory {recall(runs, sizes[0]):.2f} to "
        f"{recall(runs, sizes[-1]):.2f}. {4 ** (len(SLOTS) - 1)} times the slots cost "
        f"{many / few - 1:.0%} more FLOPs.",
        f"**At equal recall**: dense with {flops(wide) / 1e6:.1f} M FLOPs per token recalls about "
        f"as much as Memory with 16,384 slots ({dense[2]:.2f} and {recall(runs, default):.2f}). It "
        f"trains {training_time(runs, 'dense, 8 x FLOPs', 'facts-dense208')} times as long as the "
        f"small dense model, Memory {training_time(runs, 'Memory', default)} times.",
        f"**More weights in experts hardly help here.** Mixtures as large as the tables of 4,096, "
        f"16,384 and 65,536 slots recall {two(experts)}, the tables {two(tables)}. Mixtures and "
        f"tables alike were tuned at the middle size alone. With rates of their own the others may "
        f"do better. And a larger mixture here has a costlier router, so that a token uses fewer "
        f"hidden units: 224, 192 and 128. The largest uses one expert, and multiplies it by the "
        f"probability that the router gives it, which is small at first. The others scale the "
        f"weights of their experts to a sum of 1. Its lower recall may come from this.",
        f"**Large tables take time**, though hardly any FLOPs: with 262,144 slots, training takes "
        f"{training_time(runs, '262,144', 'facts-n512')} times as long as dense, longer than dense "
        f"with four times the FLOPs ({training_time(runs, 'dense, 4 x FLOPs', 'facts-dense4')}).",
        f"**How far to trust the curves** (upper left): not beyond what was measured. The log-odds "
        f"of recall are fitted by a line over the logarithm of the parameters. The curve of Memory "
        f"is too high for the smallest and the largest table, and too low for 16,384 and 65,536 "
        f"slots, by up to {miss:.2f} (dense: {dense_miss:.2f}). So the two curves show less of a "
        f"lead in the middle than the means do. Fitted without the largest table, the "
        f"curve predicts {predict_last(runs, SLOTS):.2f} for 262,144 slots, and "
        f"{recall(runs, sizes[-1]):.2f} was measured. Fitted without the widest model, that of "
        f"dense predicts {predict_last(runs, DENSE):.2f}, and {dense[2]:.2f} was measured. The "
        f"bands show the spread of the seeds alone. Everything else in the picture is means, "
        f"joined by lines.",
        f"**Validation loss** falls as recall rises, from {loss[0]:.3f} to {loss[-1]:.3f} over the "
        f"five tables.")


def deep_text(runs):
    one, three, plus, dense = [f"deep-{kind}" for kind in ("memory", "three", "plus", "dense")]
    every = {kind: values(runs, kind, "recall") for kind in (one, three, plus, dense)}
    shared = every[three] + every[plus]
    expect(min(every[one]) > max(shared) and min(shared) > max(every[dense]),
           "one layer recalls the most in every seed, dense the least")
    apart = abs(recall(runs, three) - recall(runs, plus))
    expect(apart < statistics.stdev(every[three]), "three layers and Memory+ are level")
    expect(recall(runs, one) < recall(runs, "facts-memory"), "in 8 blocks Memory recalls less")
    gain = recall(runs, dense) - recall(runs, "facts-dense")
    expect(abs(gain) < statistics.stdev(every[dense]), "in 8 blocks dense recalls about as much")

    def of(kind):
        return spread(values(runs, kind, "recall"), 3)

    loss = {name: run["val_loss"] for name, run in runs.items()}
    opened = loss["deep-open-1"]
    opened_slow = loss["tune-deep-open-1.5e-3-1.6e-1"]
    slow = loss["deep-plus-1"]
    fast = loss["tune-deep-plus-3e-3-1.6e-1"]
    expect(opened < fast and opened_slow > slow, "the open gate is better at 3e-3 alone")
    expect(all(a < b for a, b in zip(values(runs, three, "val_loss"),
                                     values(runs, plus, "val_loss"))),
           "three layers have a lower loss than Memory+ in every seed")
    neither_slow = loss["tune-deep-three-1.5e-3-1.6e-1"]
    neither_fast = loss["tune-deep-three-3e-3-1.6e-1"]
    expect(fast - neither_fast > 0.03, "at 3e-3 gate and norm together cost something")
    return points(
        f"**Memory+ is not ahead here either.** Memory with one layer recalls {of(one)}, with "
        f"three layers {of(three)}, Memory+ {of(plus)}, dense {of(dense)}. One layer is best in "
        f"every seed. Memory with three layers recalls about as much as Memory+, within the "
        f"spread. Its validation loss is lower in every seed.",
        "**Three layers are not three times the memory.** They share one table, which is as large "
        "as that of the one layer, and two more MLPs are gone.",
        f"**Gate and norm matter at the higher rate only** (seed 1, with 1.6e-1 for the table). At "
        f"1.5e-3, the best rate of Memory+, the validation loss is {neither_slow:.3f} without "
        f"both, {loss['deep-norm-1']:.3f} without the gate, {loss['deep-gate-1']:.3f} without the "
        f"norm, and {slow:.3f} with both. At 3e-3, the best rate of Memory, it is "
        f"{neither_fast:.3f} without both and {fast:.3f} with both. Neither was taken away alone "
        f"there.",
        f"**The start of the gate matters little** (seed 1). The layer gives W2 (y * silu(W1 x)), "
        f"where y is what it read. `--mem-gate-open` adds a bias b with silu(b) = 1 to W1 x and "
        f"starts with W1 = 0, so that the gate begins as a factor of 1. At the best rates of each, "
        f"the loss is then {opened:.3f} instead of {slow:.3f}. At equal rates it is lower once "
        f"({opened:.3f} instead of {fast:.3f}, at 3e-3) and higher once ({opened_slow:.3f} instead "
        f"of {slow:.3f}, at 1.5e-3).",
        f"**More blocks did not help**: with three, Memory recalls {of('facts-memory')} and dense "
        f"{of('facts-dense')}. The seeds of dense with 8 blocks differ widely. The best of them "
        f"recalls {max(every[dense]):.3f}.")


def usage_text(runs):
    without = [runs[name] for name in BALANCE["0"]]
    balanced = [runs[name] for name in BALANCE["0.01"]]

    def of(results, key, digits):
        return spread([result[key] for result in results], digits)

    for result, other in zip(without, balanced):
        expect(other["memory_usage"] > result["memory_usage"], "the loss raises usage")
        expect(other["memory_kl"] < result["memory_kl"], "the loss makes reads more even")
    for key in ("recall", "val_loss"):
        numbers = [result[key] for result in without]
        change = statistics.mean(result[key] for result in balanced) - statistics.mean(numbers)
        expect(abs(change) < statistics.stdev(numbers), f"{key} is as without the loss")
    gains = [other["recall"] - result["recall"] for result, other in zip(without, balanced)]
    expect(gains[0] > 0 > max(gains[1:]), "only seed 1 gains")
    used = usage()
    before = used["facts-n512-1"]
    after = used["balance-1e-2-1"]
    expect(before["usage"][0] == min(before["usage"]), "usage is lowest at the beginning")
    most = math.log(512**2)
    params = without[0]["params"]
    read_by_token = params["active"] - (params["total"] - params["values"])  # numbers of the table
    tokens = without[0]["tokens"] / without[0]["max_steps"]  # of a step
    share = tokens * read_by_token / params["values"]
    at_random = 1 - math.exp(-share)  # the share that is met, if each read goes anywhere
    steps = before["windows"] * without[0]["block_size"] / tokens
    expect(math.exp(-steps * share) < 0.001, "random reads of so many windows meet nearly all")
    seed_1 = [f"{runs[names[0]]['recall']:.3f}" for names in BALANCE.values()]
    return points(
        f"**A step reads {of(without, 'memory_usage', 3)} of the slots.** It could read no more "
        f"than {share:.2f}, and random reads would reach {at_random:.2f}. Usage is lowest at step "
        f"{before['steps'][0]}, the first that was logged, and rises by itself.",
        f"**Other steps read other slots**: {before['windows']:,} windows of the training text, "
        f"as many as {steps:.0f} steps have, read {before['read_by_windows']:.2f} of them (seed "
        f"1). Random reads would reach nearly all. Whether the others are ever read was not "
        f"looked at.",
        f"**The loss evens it out somewhat.** KL falls from {of(without, 'memory_kl', 2)} to "
        f"{of(balanced, 'memory_kl', 2)}; it would be {most:.1f} if one slot got everything. A "
        f"step reads {of(balanced, 'memory_usage', 3)}, and {after['windows']:,} windows read "
        f"{after['read_by_windows']:.2f} (seed 1).",
        f"**Recall does not change**: {of(without, 'recall', 3)} without it, "
        f"{of(balanced, 'recall', 3)} with it. Nor does the validation loss. Only seed 1 gains, "
        f"the worst of the three without the loss: it recalls {listed(seed_1)} with the weights "
        f"{listed(list(BALANCE))}.",
        f"**What it costs**: the half-keys are scored a second time. Training takes "
        f"{training_time(runs, 'Memory, 262,144 slots, balanced', 'balance-1e-2')} times as long "
        f"as dense, without the loss {training_time(runs, '262,144', 'facts-n512')} times.")


def against_text(runs):
    memory = "facts-memory"
    spreads = [statistics.stdev(values(runs, kind, "recall")) for kind in (memory, "facts-dense")]
    expect(recall(runs, memory) > recall(runs, "facts-plus"), "Memory recalls more than Memory+")
    expect(recall(runs, "own-bytes-moe") > recall(runs, "own-bytes-memory"), "MoE is no worse")
    rate = runs["facts-plus-1"]["value_lr"] / runs["facts-memory-1"]["value_lr"]
    return points(
        f"The hash recalls {times(runs, 'facts-hash', memory)} as many facts as Memory in the "
        f"default corpus, in less time.",
        f"Where each person is named by a word of their own, dense recalls as much as Memory "
        f"({recall(runs, 'single-dense'):.3f} and {recall(runs, 'single-memory'):.3f}).",
        f"On real facts with bytes as tokens, a mixture of experts recalls no less than Memory "
        f"({recall(runs, 'own-bytes-moe'):.3f} and {recall(runs, 'own-bytes-memory'):.3f}), the "
        f"hash {recall(runs, 'own-bytes-hash'):.3f}.",
        f"On ordinary text the hash is far ahead of all others at equal tokens (a loss of "
        f"{text_loss(runs, 'web', 'hash'):.2f} on web pages; dense "
        f"{text_loss(runs, 'web', 'dense'):.2f}, Memory {text_loss(runs, 'web', 'Memory'):.2f}). "
        f"At equal time no other layer is ahead of dense by more than the spread.",
        f"Memory+ recalls no more than Memory on the invented facts "
        f"({recall(runs, 'facts-plus'):.3f} and {recall(runs, memory):.3f}), and needs a table "
        f"rate {rate:.0f} times as high. With 8 blocks and three layers it recalls "
        f"{recall(runs, 'deep-plus'):.3f}, Memory with one layer "
        f"{recall(runs, 'deep-memory'):.3f}. The paper finds it better.",
        f"UltraMem, which has the richer scores, recalls less than Memory "
        f"({recall(runs, 'facts-ultramem'):.3f} and {recall(runs, memory):.3f}) and takes longer.",
        f"The step is slower on a CPU, so at equal time the gain over dense falls from "
        f"{times(runs, memory, 'facts-dense')} to {times(runs, memory, 'facts-dense-long')}.",
        "A parameter of a memory model stores fewer bits than one of the dense model of the same "
        "width.",
        f"1,024 slots recall no more than dense ({recall(runs, 'facts-n32'):.3f} and "
        f"{recall(runs, 'facts-dense'):.3f}).",
        f"The seeds of Memory spread further than those of dense ({spreads[0]:.3f} and "
        f"{spreads[1]:.3f}).")


# Where each table and text stands.
TABLES = {
    "README.md": [short_table, readme_text],
    "docs/results.md": [main_table, main_text, exposures_table, cost_table, choosing_text,
                        names_table, names_text, own_table, own_text, own_tuning_table, text_table,
                        text_text, text_tuning_table, tuning_table, tuning_text, slots_table,
                        slots_text, scaling_table, scaling_text, deep_table, deep_text,
                        deep_tuning_table, usage_table, usage_text, reads_table, variants_table,
                        bfloat16_table, teach_table, teach_text, against_text],
    "docs/speed.md": [steps_table],
    "docs/parallel.md": [ranks_table],
}
END = "<!-- report: end -->"


def with_table(text, table, runs):
    """The text of a document in which this table is new."""
    begin = f"<!-- report: {table.__name__} -->"
    if begin not in text:
        raise ValueError(f"a document of TABLES has no {begin}: put it where the table belongs, "
                         f"and {END} after it")
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(END)
    return f"{before}{begin}\n{table(runs)}\n{END}{after}"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", action="store_true",
                        help="put the results of out/* into assets/facts.json first")
    args = parser.parse_args()
    if args.collect:
        print("collected:", " ".join(collect()) or "nothing, out/ has no finished run")
    runs = load()
    texts = {}  # all of them are made before the first is written
    for document, tables in TABLES.items():
        texts[document] = (ROOT / document).read_text("utf-8")
        for table in tables:
            texts[document] = with_table(texts[document], table, runs)
    for document, text in texts.items():
        (ROOT / document).write_text(text, "utf-8")
        print(f"written: {document}, with {len(TABLES[document])} tables and texts")
    for name, (draw_into, width, height) in PICTURES.items():
        draw(runs, draw_into, ROOT / "assets" / name, width, height)
    print(f"drawn: {listed(list(PICTURES))} in assets/")


if __name__ == "__main__":
    steady_output()
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit("report.py: " + " ".join(str(error).split()))
    except KeyError as error:
        sys.exit(f"report.py: there is no {error} in assets/: run what makes it, then --collect")
