"""What docs/ says is true: its tables are those of runs/report.py, and the numbers and comparisons
in its prose are computed anew. (test_runs.py has what concerns the scripts in runs/.)"""
import itertools
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "runs"))
import pictures
import report
import results
import train
from results import DENSE, EXPERTS, MAIN, SLOTS, TEXT, TEXTS, TWICE, recall_at, training_time
from support import run_folder

RUNS = results.read("facts")
TAUGHT = results.read("teach")
RESULTS = (ROOT / "docs" / "results.md").read_text("utf-8")
APPENDIX = (ROOT / "docs" / "appendix.md").read_text("utf-8")
PARALLEL = (ROOT / "docs" / "parallel.md").read_text("utf-8")


# ---- tables

@pytest.mark.parametrize("file, name", [
    (file, name) for file, tables in report.TABLES.items() for name in tables])
def test_the_tables_are_what_report_writes(file, name):
    text = (ROOT / file).read_text("utf-8")
    assert report.with_table(text, name, report.TABLES[file][name](RUNS)) == text


def test_no_table_of_a_document_is_forgotten():
    for file in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        names = set(re.findall("<!-- report: (.*) -->", file.read_text("utf-8"))) - {"end"}
        assert names == set(report.TABLES.get(str(file.relative_to(ROOT)), {}))


def test_a_table_replaces_the_old_one():
    text = "before\n<!-- report: some -->\nold\n<!-- report: end -->\nafter"
    want = "before\n<!-- report: some -->\nnew\n<!-- report: end -->\nafter"
    assert report.with_table(text, "some", "new") == want
    assert report.with_table(want, "some", "new") == want
    with pytest.raises(ValueError, match="has no <!-- report: some -->"):
        report.with_table("nothing", "some", "new")


def test_nothing_is_written_if_a_table_cannot_be_made(tmp_path, monkeypatch):
    def good(runs):
        return "new"

    def bad(runs):
        return runs["no such run"]

    text = "<!-- report: {} -->\nold\n<!-- report: end -->\n"
    for name in ("good", "bad"):
        (tmp_path / name).write_text(text.format(name))
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "TABLES", {"good": {"good": good}, "bad": {"bad": bad}})
    monkeypatch.setattr(sys, "argv", ["report.py"])
    with pytest.raises(KeyError, match="no such run"):
        report.main()
    assert (tmp_path / "good").read_text() == text.format("good")


def test_a_kind_of_one_seed_has_no_spread():
    with pytest.raises(ValueError, match=r"has 1 run\(s\) named odd-SEED, .* needs two: run"):
        results.seeds({"odd-1": {}, "odd-1337": {}}, "odd")


def test_every_kind_has_three_seeds():
    kinds = [*(MAIN | SLOTS | DENSE | EXPERTS).values()]
    kinds += [f"text-{text}-{name}" for text in TEXTS for name in TEXT.values()]
    for kind in kinds:
        assert len(results.seeds(RUNS, kind)) >= 3, kind


def test_what_the_first_command_prints():
    run = RUNS["facts-memory-1337"]
    added = ("vocab_size", "block_size", "max_steps", *results.RATES)  # by results.collect
    run = {key: value for key, value in run.items() if key not in added}
    assert train.read_settings([])[0].seed == run["seed"]
    assert f"\n{run_folder.report(run)}\n" in APPENDIX


def test_the_costs_of_parallel_memory_are_those_the_script_prints(tmp_path):
    script = ROOT / "tests" / "parallel_costs.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"```\n{done.stdout}```" in PARALLEL


# ---- the numbers in the prose

def prose(text):
    """What is written by hand in a document, without its formatting, on one line."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines = [line for line in text.splitlines() if not line.startswith(("|", "<!--"))]
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", "\n".join(lines))  # links without addresses
    return " ".join(text.replace("**", "").split())


def mean(kind, key="recall"):
    return results.mean(RUNS, kind, key)


def deviation(kind, key="recall"):
    return statistics.stdev(results.values(RUNS, kind, key))


def mean_and_deviation(numbers):
    """For "{:.3f} ± {:.3f}"."""
    return statistics.mean(numbers), statistics.stdev(numbers)


def both(kind, key="recall"):
    return mean_and_deviation(results.values(RUNS, kind, key))


def ratio(kind, other):
    """How many times as many facts one kind recalls as another."""
    return mean(kind) / mean(other)


def recalls(*kinds):
    return [mean(kind) for kind in kinds]


def time(kind):
    return training_time(RUNS, kind)


def read(kind, times):
    """Mean recall of the facts of a row by exposures, over the seeds."""
    return statistics.mean(recall_at(result, times) for result in results.seeds(RUNS, kind))


def read_once(kind):
    """Of the facts that were read once."""
    return mean_and_deviation([recall_at(result, 1) for result in results.seeds(RUNS, kind)])


def parameters(kind):
    return results.seeds(RUNS, kind)[0]["params"]["total"]


def flops(kind):
    return results.seeds(RUNS, kind)[0]["flops_per_token"]


def of_memory_as_large(kind, of):
    """of(...) of a table with the parameters of `kind`, interpolated over their logarithm."""
    sizes = [parameters(table) for table in SLOTS.values()]
    return np.interp(np.log(parameters(kind)), np.log(sizes), [of(t) for t in SLOTS.values()])


def losses(title):
    """The loss of a kind of TEXT on stories and on web pages."""
    return [mean(f"text-{text}-{TEXT[title]}", "val_loss") for text in TEXTS]


def above_dense(title):
    """By how much its loss is above that of dense at equal time, on stories and on web pages."""
    kinds = [f"text-{text}-{TEXT[title]}" for text in TEXTS]
    return [loss - results.dense_for_as_long(RUNS, kind, time(kind))
            for kind, loss in zip(kinds, losses(title))]


def factor(name):
    """The rate of the table of a run over that of the rest."""
    return RUNS[name]["value_lr"] / RUNS[name]["learning_rate"]


def recall_of(*names):
    return [RUNS[name]["recall"] for name in names]


def loss_of(*names):
    return [RUNS[name]["val_loss"] for name in names]


def paired_p(kind, better):
    """How often the sum of the seeds' differences is as large, if their signs are chance."""
    pairs = zip(results.values(RUNS, better, "recall"), results.values(RUNS, kind, "recall"))
    differences = [high - low for high, low in pairs]
    sums = [np.dot(signs, differences)
            for signs in itertools.product((1, -1), repeat=len(differences))]
    return np.mean([total >= sum(differences) - 1e-12 for total in sums])


def lost(kind):
    """The share of the old facts that teaching loses."""
    return statistics.mean(results.share_lost(lesson) for lesson in results.seeds(TAUGHT, kind))


def predicted_by_the_others(kinds):
    """The recall of the last kind by a line through the seeds of the others.

    The line is one for the log-odds of recall over the logarithm of the parameters.
    """
    points = [(np.log(parameters(kind)), np.log(recall / (1 - recall)))
              for kind in kinds[:-1] for recall in results.values(RUNS, kind, "recall")]
    line = np.polyfit(*zip(*points), 1)
    return 1 / (1 + np.exp(-np.polyval(line, np.log(parameters(kinds[-1])))))


WIDER = ["facts-dense2", "facts-dense4", "facts-dense208"]
WITHOUT = RUNS["adamw-n512-1"]  # without a loss against uneven use
TOKENS = WITHOUT["tokens"] / WITHOUT["max_steps"]  # of a step
READ_AT_MOST = TOKENS * 128 / 512**2
ONCE = [read(kind, 1) for kind in MAIN.values()]
HALF_RATE = ["tune-own-words-dense-6e-3", "own-words-dense-6e-3-2", "own-words-dense-6e-3-3"]

# A sentence, or a part of one, and the numbers that belong into it.
CLAIMS = [
    # The main result
    ("a guess is right {:.1%} of the time", [1 / 64]),
    ("At equal tokens and FLOPs, Memory recalls {:.1f} times as many facts as dense. The hash "
     "recalls {:.1f} times as many, UltraMem {:.1f} times, PEER {:.1f} times and MoE {:.1f} times.",
     [ratio(f"facts-{kind}", "facts-dense")
      for kind in ("memory", "hash", "ultramem", "peer", "moe")]),
    ("At equal time, Memory recalls {:.1f} times as many facts as dense.",
     [ratio("facts-memory", "facts-dense-long")]),
    ("Memory recalls {:.1f} times as many facts as dense with twice the FLOPs, and {:.1f} times as "
     "many as dense with four times the FLOPs. With 65,536 slots, the ratios are {:.1f} and "
     "{:.1f}.",
     [ratio(kind, dense) for kind in ("facts-memory", "facts-n256")
      for dense in ("facts-dense2", "facts-dense4")]),
    ("Memory stores fewer bits per parameter: {:.3f}. The dense model of the same width is a sixth "
     "as large and stores {:.3f}. But the dense model with eight times the FLOPs is larger than "
     "Memory, and stores only {:.3f}.",
     [mean(kind, "bits_per_param") for kind in ("facts-memory", "facts-dense", "facts-dense208")]),
    ("those that were read once: recall is {:.2f} to {:.2f}.",
     [min(ONCE), max(ONCE)]),
    # More slots
    ("reads the corpus {:.2f} times.",
     [mean("facts-dense-long", "max_steps") / mean("facts-dense", "max_steps")]),
    ("With 65,536 slots the model recalls {:.1f} times as many facts as dense, with 1,048,576 "
     "slots {:.1f} times.", [ratio("facts-n256", "facts-dense"),
                             ratio("facts-n1024", "facts-dense")]),
    ("1,048,576 slots recall {:.3f} ± {:.3f}. Dense recalls {:.3f} ± {:.3f}, which is no more "
     "than guessing.", [*read_once("facts-n1024"), *read_once("facts-dense")]),
    ("With 65,536 slots the model has {:.0f} times the parameters of dense, with 1,048,576 slots "
     "{:.0f} times. The largest table costs only {:.0%} more FLOPs than the smallest. But it "
     "trains {:.2f} times as long as dense, longer than dense with four times the FLOPs ({:.2f}).",
     [parameters("facts-n256") / parameters("facts-dense"),
      parameters("facts-n1024") / parameters("facts-dense"),
      flops("facts-n1024") / flops("facts-n32") - 1, time("facts-n1024"), time("facts-dense4")]),
    ("At {:.1f} M memory recalls {:.2f} and dense {:.2f}, at {:.1f} M {:.2f} and {:.2f}, at "
     "{:.1f} M {:.2f} and {:.2f}.",
     [parameters(WIDER[0]) / 1e6, of_memory_as_large(WIDER[0], mean), mean(WIDER[0]),
      parameters(WIDER[1]) / 1e6, of_memory_as_large(WIDER[1], mean), mean(WIDER[1]),
      parameters(WIDER[2]) / 1e6, of_memory_as_large(WIDER[2], mean), mean(WIDER[2])]),
    ("These dense models take {:.1f}, {:.1f} and {:.1f} times the FLOPs of memory.",
     [flops(kind) / of_memory_as_large(kind, flops) for kind in WIDER]),
    ("At about equal FLOPs, {:.1f} to {:.1f} M per token, dense recalls {:.2f} and memory {:.2f} "
     "to {:.2f}.", [flops("facts-n32") / 1e6, flops("facts-n1024") / 1e6,
                 *recalls("facts-dense", "facts-n32", "facts-n1024")]),
    ("For a little less recall, dense takes {:.1f} M FLOPs per token and trains {:.2f} times as "
     "long as the small dense model. Memory with 16,384 slots takes {:.1f} M FLOPs and trains "
     "{:.2f} times as long.", [flops("facts-dense208") / 1e6, time("facts-dense208"),
               flops("facts-memory") / 1e6, time("facts-memory")]),
    ("The three mixtures recall {:.2f}, {:.2f} and {:.2f}. The tables of the same sizes recall "
     "{:.2f}, {:.2f} and {:.2f}.",
     recalls(*EXPERTS.values(), "facts-n64", "facts-memory", "facts-n256")),
    ("predicts {:.2f} for 1,048,576 slots. We measured {:.2f}. For the widest dense model, the line "
     "predicts {:.2f} and we measured {:.2f}.",
     [predicted_by_the_others([*SLOTS.values()]), mean("facts-n1024"),
      predicted_by_the_others([*DENSE.values()]), mean("facts-dense208")]),
    # Names
    ("the hash loses. It recalls {:.3f}, and Memory recalls {:.3f}.",
     recalls("apart-hash", "apart-memory")),
    ("dense recalls more than Memory: {:.3f} and {:.3f}. With AdamW, Memory recalls {:.3f}. The "
     "hash recalls {:.3f}.",
     recalls("single-dense", "single-memory", "single-adamw", "single-hash")),
    # Real facts
    ("Of the facts that were read 64 to 127 times, dense recalls {:.2f}, Memory {:.2f} and MoE "
     "{:.2f}.", [read(f"own-bytes-{kind}", 64) for kind in ("dense", "memory", "moe")]),
    ("Of all facts, dense recalls {:.2f}, which is what guessing gives ({:.2f}). Memory recalls "
     "{:.2f} and MoE {:.2f}.",
     [mean("own-bytes-dense"),
      statistics.mean(mean(f"own-bytes-{kind}", "recall_control") for kind in results.OWN.values()),
      *recalls("own-bytes-memory", "own-bytes-moe")]),
    ("With bytes, the hash is far ahead ({:.2f})", recalls("own-bytes-hash")),
    ("Memory has only {:,} steps to learn its queries.", [RUNS["own-bytes-memory-1"]["max_steps"]]),
    ("Dense recalls {:.2f}, Memory {:.2f}, MoE {:.2f} and the hash {:.2f}. The seeds of dense "
     "differ widely: one of them recalls {:.2f}. Most of the {:,} words are names, and the {:.2f} "
     "M parameters of their embeddings",
     [*recalls(*[f"own-words-{kind}" for kind in ("dense", "memory", "moe", "hash")]),
      min(results.values(RUNS, "own-words-dense", "recall")),
      RUNS["own-words-dense-1"]["vocab_size"],
      RUNS["own-words-dense-1"]["params"]["embedding"] / 1e6]),
    ("three seeds of dense recall {:.3f} ± {:.3f}, with a loss of {:.3f} ± {:.3f}.",
     [*mean_and_deviation(recall_of(*HALF_RATE)), *mean_and_deviation(loss_of(*HALF_RATE))]),
    # Ordinary text
    ("Its loss is {:.2f} on stories and {:.2f} on pages. Dense has {:.2f} and {:.2f}, and with "
     "twice the steps {:.2f} and {:.2f}.",
     [*losses("hash"), *losses("dense"), *losses("dense" + TWICE)]),
    ("it has {:.2f} and {:.2f}, Memory+ {:.2f} and {:.2f}, MoE {:.2f} and {:.2f}.",
     [*losses("Memory"), *losses("Memory+"), *losses("MoE")]),
    ("its loss is {:.2f} and {:.2f} lower.", [-above for above in above_dense("Memory")]),
    ("The loss of Memory+ is {:.2f} and {:.2f} higher, that of MoE {:.2f} and {:.2f}.",
     [*above_dense("Memory+"), *above_dense("MoE")]),
    ("the loss of Memory+ is {:.2f} below that of dense on stories, where the seeds overlap, and "
     "{:.2f} on pages",
     [dense - plus for dense, plus in zip(losses("dense" + TWICE), losses("Memory+" + TWICE))]),
    ("read {:.1f} to {:.0f} million tokens.", [RUNS["text-stories-dense-1"]["tokens"] / 1e6,
                                               RUNS["text-web-dense-long-1"]["tokens"] / 1e6]),
    # Older studies
    ("the best loss of Memory+ in 8 blocks is {:.3f} instead of {:.3f} (seed 1).",
     loss_of("deep-open-1", "deep-plus-1")),
    ("a step reads {:.3f} of the 262,144 slots, with it {:.3f}. At most {:.2f} is possible.",
     [mean("adamw-n512", "memory_usage"), mean("balance-1e-2", "memory_usage"), READ_AT_MOST]),
    # Teaching
    ("With 4,096 slots, {:.1%} of the old facts are lost. If the whole model learns, at a rate of "
     "1e-4, {:.0%} are lost: about {:.0f} times as many.",
     [lost("teach-slots-4096"), lost("teach-full-1e-4"),
      round(lost("teach-full-1e-4") / lost("teach-slots-4096"), -1)]),
    ("If all values learn, just as little is lost ({:.1%}).", [lost("teach-all-values-3")]),
    ("512 slots learn {:.0f} facts.",
     [statistics.mean(100 * lesson["after"][0]
                      for lesson in results.seeds(TAUGHT, "teach-slots-512"))]),
    # Negative results
    ("With 8 blocks and three layers it recalls {:.3f}, Memory with one layer {:.3f}.",
     recalls("deep-plus", "deep-memory")),
    ("1,024 slots recall no more than dense ({:.3f} and {:.3f}).",
     recalls("facts-n32", "facts-dense")),
    ("and varies more from seed to seed ({:.3f} and {:.3f}).",
     [deviation("facts-memory"), deviation("facts-dense")]),
    # Which settings?
    ("recall falls from {:.2f} to {:.2f} (AdamW), and training takes {:.2f} times as long as dense "
     "instead of {:.2f} times.",
     [*recalls("adamw-memory", "adamw-k8"), time("adamw-k8"), time("facts-memory")]),
    ("a table that RowAdam trains {:.0f} times that.", [factor("facts-memory-1")]),
    ("On ordinary text, {:.0f} and {:.0f} times were best.",
     [factor(f"text-{text}-memory-1") for text in TEXTS]),
    # One number per row
    ("RowAdam by the lower one on seed 1: {:.3f} instead of {:.3f}.",
     recall_of("row-n512-8e-2-1", "facts-n512-1")),
    ("AdamW was better: RowAdam recalls {:.3f} of the facts about people of one word, AdamW {:.3f}",
     recalls("single-memory", "single-adamw")),
    ("the chance of such a difference would be {:.2f} at 16,384 slots, and {:.2f} at 65,536 and at "
     "262,144", [paired_p("adamw-memory", "facts-memory"), paired_p("adamw-n256", "facts-n256")]),
    ("AdamW without momentum (beta1 0) recalls {:.3f} at 262,144 slots",
     recall_of("adam0-n512-6.4e-1-1")),
    ("Two layers that share the table recall {:.2f} with as many reads in all, one layer {:.2f}",
     recall_of("variant-two-layers", "adamw-memory-1")),
    # Tuning
    ("{:.0f} times for Memory. With 1e-2 it recalls {:.3f}, with 1.6e-1 {:.3f}.",
     [factor("adamw-memory-1"), *recall_of("tune-adamw-memory-3e-3-1e-2", "adamw-memory-1")]),
    ("With 1.6e-1 it recalls {:.3f}, with 2.56 (and 1.5e-3 for the rest) {:.3f}.",
     recall_of("tune-plus-3e-3-1.6e-1", "facts-plus-1")),
    ("with 3e-3 and 4e-2, it recalls {:.3f}, less than dense. At its best it recalls {:.3f}:",
     recall_of("tune-peer-3e-3-4e-2", "facts-peer-1")),
    ("UltraMem recalls {:.3f} at its best:", recall_of("adamw-ultramem-1")),
    ("That hurts in so short a run: {:.3f}, and {:.3f} from four times the rate.",
     recall_of("tune-ultramem-end-1.6e-1", "tune-ultramem-end-6.4e-1")),
    ("recall {:.3f}, 128 experts of 64 recall {:.3f}.",
     recall_of("tune-experts-256", "facts-moe-1")),
    ("The hash recalls {:.3f} with 1.5e-3 and {:.3f} with the study's 3e-3. The narrowest dense "
     "model recalls {:.3f} with 3e-3 and {:.3f} with the study's 6e-3.",
     recall_of("tune-hash-1.5e-3-4e-2", "facts-hash-1", "tune-dense48-3e-3", "facts-dense48-1")),
    ("With the default of `facts`, 1.6e-1, it recalls {:.3f} instead of {:.3f}.",
     recall_of("tune-hash-3e-3-1.6e-1", "facts-hash-1")),
]
# What is neither measured nor in a table.
GIVEN = {
    "2412.09764", "2510.15103",  # papers
    "2.13", "2.5",  # torch, GHz
    "84%", "0%", "100%",  # prepare_data.py prints these
    "3%",  # the rivals are matched so closely: test_the_rivals_are_matched
    "0.1",  # Memory recalls at least so much more: test_where_memory_gains
}


@pytest.mark.parametrize("claim, numbers", CLAIMS)
def test_the_numbers_in_the_prose(claim, numbers):
    assert claim.format(*numbers) in prose(RESULTS) + prose(APPENDIX)


@pytest.mark.parametrize("text", [RESULTS, APPENDIX], ids=["results", "appendix"])
def test_no_number_in_the_prose_is_left_out(text):
    """Every number with a decimal point and every percentage belongs to a claim."""
    rest = prose(text)
    for claim, numbers in CLAIMS:
        rest = rest.replace(claim.format(*numbers), "")
    rest = re.sub(r"`[^`]*`", "", rest)
    found = re.findall(r"(?<![\d.])\d+\.\d+(?![\de])|\d+%", rest)
    assert set(found) <= GIVEN


# ---- the comparisons in the prose

def test_the_rivals_are_matched():
    """Within 3% of the memory model's parameters, and no more FLOPs than dense; measured."""
    memory = parameters("facts-memory")
    dense = flops("facts-dense")
    for title in ("MoE", "hash", "PEER", "UltraMem", "Memory", "Memory+"):
        assert parameters(MAIN[title]) == pytest.approx(memory, rel=0.03), title
        assert flops(MAIN[title]) <= dense, title
    assert flops("facts-dense2") >= 2 * dense
    assert flops("facts-dense4") >= 4 * dense
    assert flops("facts-dense208") >= 8 * dense
    assert flops("facts-dense48") == pytest.approx(0.6 * dense, rel=0.03)


def test_the_models_on_text_are_matched():
    memory = parameters("text-web-memory")
    assert memory == pytest.approx(2.5 * parameters("text-web-dense"), rel=0.03)
    for text in TEXTS:
        for name in ("moe", "hash", "memory", "plus", "plus-long"):
            assert parameters(f"text-{text}-{name}") == pytest.approx(memory, rel=0.03)
            assert flops(f"text-{text}-{name}") <= flops("text-web-dense")


def test_the_mixtures_of_experts_are_as_large_as_the_tables():
    for experts, table in (("facts-moe-n64", "facts-n64"), ("facts-moe-n256", "facts-n256")):
        assert parameters(experts) == pytest.approx(parameters(table), rel=0.02)
        assert flops(experts) <= flops("facts-dense")


def test_equal_time_is_no_less():
    assert f"{time('facts-dense-long'):.2f}" >= f"{time('facts-memory'):.2f}"


def test_the_goals_of_the_study():
    assert ratio("facts-memory", "facts-dense") >= 2.5, "at equal tokens"
    assert ratio("facts-memory", "facts-dense-long") >= 1.8, "at equal time"
    assert ratio("facts-n256", "facts-dense4") >= 1


def test_the_order_of_recall_and_of_time():
    order = [f"facts-{kind}" for kind in ("hash", "memory", "ultramem", "peer", "moe", "dense")]
    assert recalls(*order) == sorted(recalls(*order), reverse=True)
    assert mean("facts-memory") > mean("facts-plus")
    slower = min(time("facts-moe"), time("facts-peer"), time("facts-ultramem"))
    assert time("facts-hash") < time("facts-memory") < slower


def test_facts_that_were_read_often_are_known_and_once_are_not():
    for kind in ("facts-memory", "facts-dense", "facts-hash", "facts-dense4"):
        for result in results.seeds(RUNS, kind):
            assert recall_at(result, 64) > 0.97
    for result in results.seeds(RUNS, "facts-memory"):
        assert recall_at(result, 1) < 0.08
    assert read("facts-dense", 1) < mean("facts-dense", "recall_control") + 0.01, "guessing"


def test_more_slots_recall_more_in_every_seed():
    recall = [results.values(RUNS, kind, "recall") for kind in SLOTS.values()]
    for few, more in zip(recall, recall[1:]):
        assert max(few) < min(more)
    assert mean("facts-n32") < mean("facts-dense"), "but 1,024 slots are no better than dense"


def test_memory_beside_width_and_experts():
    dense = recalls(*WIDER)
    memory = [of_memory_as_large(kind, mean) for kind in WIDER]
    assert abs(dense[0] - memory[0]) < 0.02, "even with 0.4 M parameters"
    assert dense[1] < memory[1] and dense[2] < memory[2]
    assert 0 < mean("facts-memory") - mean("facts-dense208") < 0.05, "a little less"
    assert max(recalls(*EXPERTS.values())) < mean("facts-n64")
    assert mean("facts-dense208", "bits_per_param") < mean("facts-memory", "bits_per_param")


def test_what_names_decide():
    assert mean("apart-memory") > mean("apart-hash")
    assert mean("single-memory") < mean("single-dense")
    for corpus in ("facts", "single", "own-words", "own-bytes"):
        assert mean(f"{corpus}-hash") > mean(f"{corpus}-memory")


def test_real_facts():
    guess = statistics.mean(mean(f"own-bytes-{kind}", "recall_control")
                            for kind in results.OWN.values())
    assert abs(mean("own-bytes-dense") - guess) < 0.02
    assert guess + 0.02 < min(recalls("own-bytes-memory", "own-bytes-moe"))
    assert mean("own-bytes-hash") > 2 * mean("own-bytes-memory")
    assert mean("own-words-dense") > 0.85 * mean("own-words-hash")


@pytest.mark.parametrize("corpus, expected", [
    ("facts", [2, 4, 8, 16, 32]), ("own-bytes", [32, 64, 128])])
def test_where_memory_gains(corpus, expected):
    """The rows by exposures where Memory recalls at least 0.1 more than dense."""
    rows = (1, 2, 4, 8, 16, 32, 64, 128)
    gains = {times: read(f"{corpus}-memory", times) - read(f"{corpus}-dense", times)
             for times in rows}
    assert [times for times in rows if gains[times] >= 0.1] == expected


@pytest.mark.parametrize("text", TEXTS)
def test_ordinary_text(text):
    seeds = {title: results.values(RUNS, f"text-{text}-{name}", "val_loss")
             for title, name in TEXT.items()}
    dense = statistics.mean(seeds["dense" + TWICE])
    assert max(seeds["hash"]) < dense, "every seed of the hash beats dense with twice the steps"

    def overlap(title, other):
        return max(seeds[title]) > min(seeds[other])

    assert not overlap("Memory", "dense") and overlap("Memory+", "dense")
    assert overlap("MoE", "dense") == (text == "stories")
    assert overlap("Memory+" + TWICE, "dense" + TWICE) == (text == "stories")
    at_equal_time = {title: above_dense(title)[TEXTS.index(text)]
                     for title in ("Memory", "Memory+", "MoE")}
    assert min(at_equal_time["Memory+"], at_equal_time["MoE"]) > 0
    assert at_equal_time["Memory"] < 0


def test_deeper_models():
    one, three, plus, dense = [results.values(RUNS, f"deep-{kind}", "recall")
                               for kind in ("memory", "three", "plus", "dense")]
    assert min(one) > max(three + plus)
    assert min(three + plus) > max(dense)
    assert abs(mean("deep-three") - mean("deep-plus")) < deviation("deep-three")
    assert mean("deep-memory") < mean("facts-memory")
    assert abs(mean("deep-dense") - mean("facts-dense")) < deviation("deep-dense")


def test_a_loss_against_uneven_use_changes_usage_alone():
    for seed in (1, 2, 3):
        without = RUNS[f"adamw-n512-{seed}"]
        balanced = RUNS[f"balance-1e-2-{seed}"]
        assert balanced["memory_usage"] > without["memory_usage"]
        assert balanced["memory_kl"] < without["memory_kl"]
    for key in ("recall", "val_loss"):
        change = mean("balance-1e-2", key) - mean("adamw-n512", key)
        assert abs(change) < deviation("adamw-n512", key)


def test_the_study_uses_the_rates_with_the_lowest_loss():
    """Of all runs of a kind that differ in their rates, seed 1 of the study has the lowest loss."""
    kinds = [*report.TUNED.values()]
    kinds += [f"own-{tokens}-{name}" for tokens in ("words", "bytes")
              for name in results.OWN.values()]
    kinds += [f"text-{text}-{name}" for text in TEXTS for title, name in TEXT.items()
              if not title.endswith(TWICE)]
    for kind in kinds:
        tried = report.tried(RUNS, kind)
        assert len(tried) > 1, kind
        assert RUNS[f"{kind}-1"]["val_loss"] == min(run["val_loss"] for run in tried), kind


def test_the_goal_of_teaching():
    """At most a fifth of what is lost when the whole model learns, with as much learnt."""
    for kind in ("teach-slots-4096", "teach-full-1e-4"):
        lessons = results.seeds(TAUGHT, kind)
        assert len(lessons) == 3 and all(lesson["after"][0] >= 0.95 for lesson in lessons)
    assert lost("teach-slots-4096") < lost("teach-full-1e-4") / 5
    assert lost("teach-all-values-3") <= 1.2 * lost("teach-slots-4096")
    learnt = [mean_and_deviation([lesson["after"][0] for lesson in results.seeds(TAUGHT, kind)])[0]
              for kind in ("teach-slots-512", "teach-slots-1024", "teach-slots-2048")]
    assert learnt == sorted(learnt) and learnt[-1] < 0.9, "too few slots learn too slowly"


def test_row_adam_recalls_more():
    """With 16,384 slots or more. With fewer, the two are within a standard deviation."""
    for table in ("n32", "n64"):
        assert abs(mean(f"facts-{table}") - mean(f"adamw-{table}")) < deviation(f"adamw-{table}")
    is_above = {}  # whether every seed is above every seed of AdamW
    for adamw, row in (("adamw-memory", "facts-memory"), ("adamw-n256", "facts-n256"),
                       ("adamw-n512-6.4e-1", "facts-n512"), ("adamw-ultramem", "facts-ultramem")):
        ours, theirs = (results.values(RUNS, kind, "recall") for kind in (row, adamw))
        assert statistics.mean(ours) > statistics.mean(theirs)
        is_above[row] = min(ours) > max(theirs)
    assert is_above == {"facts-memory": False, "facts-n256": True, "facts-n512": True,
                        "facts-ultramem": True}


def test_what_of_adam_a_large_table_needs():
    row = {size: RUNS[f"facts-{size}-1"]["recall"] for size in ("memory", "n512")}
    for rate in ("4e-2", "1.6e-1", "6.4e-1"):
        assert RUNS[f"adam0-{rate}-1"]["recall"] < row["memory"] - 0.02
        assert RUNS[f"lazy-{rate}-1"]["recall"] < row["memory"] - 0.02
    for rate in ("1.6e-1", "6.4e-1"):
        assert RUNS[f"adam0-n512-{rate}-1"]["recall"] > row["n512"]
        assert RUNS[f"lazy-n512-{rate}-1"]["recall"] < row["n512"] - 0.02
    p = paired_p("adamw-n512-6.4e-1", "facts-n512")
    assert p == paired_p("adamw-n256", "facts-n256")


def test_the_rates_of_larger_tables():
    for size, best in (("n256", 0.32), ("n512", 0.08)):
        tried = {0.32: RUNS[f"facts-{size}-1"]["recall"]}
        for name, rate in (("8e-2", 0.08), ("1.28", 1.28)):
            tried[rate] = RUNS[f"row-{size}-{name}-1"]["recall"]
        assert max(tried, key=tried.get) == best
    for size in ("", "n512-"):
        third = RUNS[f"facts-{size or 'memory-'}1"]["recall"]
        assert third > max(RUNS[f"row-{size}keys-{share}-1"]["recall"] for share in ("1", "0.1"))


def test_the_others_recall_no_more_with_row_adam():
    for row, adamw in (("row-hash-1.6e-1-1", "facts-hash-1"), ("row-peer-1e-2-1", "facts-peer-1")):
        assert abs(RUNS[row]["recall"] - RUNS[adamw]["recall"]) < 0.01
    for rate in ("6.4e-1", "2.56"):
        assert RUNS[f"row-plus-{rate}-1"]["recall"] < RUNS["facts-plus-1"]["recall"] - 0.05
    assert RUNS["row-own-bytes-1.6e-1-1"]["val_loss"] < RUNS["own-bytes-memory-1"]["val_loss"]


def test_two_processes_learn_the_same():
    one = results.values(RUNS, "adamw-memory", "recall")
    assert abs(statistics.mean(one) - mean("facts-2ranks")) < statistics.stdev(one)


# ---- collecting

@pytest.fixture
def collected(tmp_path, monkeypatch):
    """A folder in place of runs/results/, with empty files and an empty out/."""
    for name in ("facts", "teach"):
        (tmp_path / f"{name}.json").write_text("{}")
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    return tmp_path


@pytest.mark.parametrize("content", ["{}", "x", "[]"])
def test_report_refuses_what_is_no_result(content, collected):
    folder = collected / "out" / "odd"
    folder.mkdir()
    (folder / "config.json").write_text('{"settings": {}}')
    (folder / "result.json").write_text(content)
    with pytest.raises(ValueError, match="odd is broken, .*move this folder out of out/"):
        results.collect(collected / "out")
    assert results.read("facts") == {}


def test_report_collects(collected):
    (collected / "facts.json").write_text(json.dumps({"old-1": dict(recall=0.5)}))
    for name, finished in (("balance-1e-2-1", True), ("balance-1e-1-1", False)):
        folder = collected / "out" / name
        folder.mkdir()
        settings = dict(vocab_size=10, block_size=9, max_steps=8, seed=1, learning_rate=1e-3,
                        value_lr=1e-2, expert_lr=1e-3)
        (folder / "config.json").write_text(json.dumps(dict(settings=settings)))
        if finished:
            (folder / "result.json").write_text(json.dumps(dict(val_loss=0.25)))
    (collected / "out" / "teach-1").mkdir()
    (collected / "out" / "teach-1" / "edit.json").write_text('{"teach": {"after": [1]}}')
    assert results.collect(collected / "out") == ["balance-1e-2-1", "teach-1"]
    assert results.read("facts") == {
        "old-1": dict(recall=0.5),
        "balance-1e-2-1": dict(val_loss=0.25, vocab_size=10, block_size=9, max_steps=8,
                               learning_rate=1e-3, value_lr=1e-2, expert_lr=1e-3)}
    assert results.read("teach") == {"teach-1": dict(after=[1])}


# ---- pictures

def drawn(draw_into):
    from matplotlib.figure import Figure
    figure = Figure()
    draw_into(RUNS, figure)
    return figure


def test_every_picture_is_in_docs_and_shown_there():
    shown = RESULTS + APPENDIX
    for name, (draw_into, _, _) in pictures.PICTURES.items():
        assert (ROOT / "docs" / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in shown


def test_a_picture_is_saved(tmp_path):
    pictures.draw(RUNS, pictures.draw_facts, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("draw_into", [
    pictures.draw_facts, pictures.draw_slots, pictures.draw_scaling])
def test_the_pictures_show_means_and_bands(draw_into):
    figure = drawn(draw_into)
    first = figure.axes[0]
    for ax in figure.axes:
        if ax is first or draw_into is not pictures.draw_slots:
            assert len(ax.lines) == len(ax.collections) >= 3, "a band for each line"
        assert ax.get_xlabel()
    assert first.get_ylabel() == "facts recalled" and first.get_title(loc="left")
    names = [text.get_text() for text in first.get_legend().get_texts()]
    assert all(re.match("Memory|Dense|PEER|Hashed|Mixture|MoE", name) for name in names)


def test_the_citation_names_the_paper():
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    for words in ("cff-version: 1.2.0", "license: MIT", "Memory Layers at Scale", "2412.09764",
                  "Berges", "Oğuz", "Haziza", "Yih", "Zettlemoyer", "Ghosh"):
        assert words in citation
