"""
What README.md says is true.

Its commands parse, and so do those of docs/. Its links lead somewhere. Its numbers are computed
again from the results in runs/results/ and from the code. Its examples run. Its tree of files is
the tree, and imports go down only.
"""
import ast
import json
import math
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import kernel
import measure_gpu
import prepare_data
import sample
import time_steps
import train
from model import GPT
from memory import MemoryTable, ProductKeyMemory
from support.settings import check_ranks, make_parser

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
TEXT = " ".join(README.split())  # on one line, so that a test can look for a sentence
USE = " ".join((ROOT / "docs" / "use.md").read_text("utf-8").split())
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUNS = json.loads((ROOT / "runs" / "results" / "facts.json").read_text("utf-8"))
TRAIN_PARSER = make_parser(train.Settings, train.PRESETS, train.__doc__)
CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)  # the layer, your model, a new kind
SETUP = "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && .venv/bin/"


# ---- its shape

def test_it_opens_with_the_two_commands():
    lines = README.splitlines()
    commands = [line for line in lines if line.strip().startswith("python3 -m venv")]
    first = "    " + SETUP + "python train.py"
    second = "    " + SETUP + "python -m pytest"
    assert commands == [first, second]
    assert len(README[:README.index(first)].splitlines()) <= 40
    assert "pytest" in (ROOT / ".ci" / "run").read_text("utf-8")


def test_it_is_short():
    assert 1500 <= len(README.split()) <= 2000
    too_long = [line for line in README.splitlines() if len(line) > 120]
    assert not too_long


def test_the_pictures_come_first():
    before = README[:README.index("docs/facts.png")]
    assert "docs/memory_layer.svg" in before
    assert len(before.split()) <= 130


# ---- links

def links(page):
    """What a page links to or shows, other than web pages."""
    text = page.read_text("utf-8")
    found = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    return [link for link in found if not link.startswith("http")]


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", page.read_text("utf-8"), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return [heading.replace(" ", "-") for heading in plain]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_it_links_to_what_it_is_made_of():
    assert len(set(links(ROOT / "README.md"))) >= 9
    for name in re.findall(r"tests/\w+\.py", README):
        assert (ROOT / name).exists(), name


# ---- commands

def joined_lines(text):
    """The lines of a text. A line that ends in a backslash goes on in the next."""
    return re.sub(r" *\\\n *", " ", text).splitlines()


def commands_of_page(page):
    """Every command of a page: of its lines and of its `inline code`."""
    text = page.read_text("utf-8")
    for span in joined_lines(text) + re.findall(r"`([^`\n]+)`", text):
        for command in span.split(" # ")[0].split("&&"):
            command = command.strip().removeprefix(".venv/bin/")
            if re.match(r"(python|torchrun) ", command):
                yield command


COMMANDS = set()
for page in PAGES:
    COMMANDS.update(commands_of_page(page))


def starting(*scripts):
    """The commands that run one of these scripts, each as [command, its arguments]."""
    found = []
    for command in sorted(COMMANDS):
        for name in scripts:
            if f"{name} " in command + " ":
                found.append([command, shlex.split(command.split(name, 1)[1])])
    return found


def test_there_are_commands():
    assert len([c for c in commands_of_page(ROOT / "README.md") if "train.py" in c]) >= 5


@pytest.mark.parametrize("command, argv", starting("train.py", "tests/time_steps.py"))
def test_train_commands_parse(command, argv):
    if "time_steps.py" in command:
        _, argv = time_steps.read_flags(argv)
    if "--help" in argv or argv in (["--compare"], ["--ffn", "toy"]):
        return  # the toy is trained below
    if "--resume" in argv or "--init-from" in argv:  # its settings are in a run folder
        TRAIN_PARSER.parse_args(argv)
        return
    settings, preset, _, runs = train.read_settings(argv)
    # Else the data decides these.
    settings.vocab_size = settings.vocab_size or 512
    settings.block_size = settings.block_size or 9
    assert preset in train.PRESETS
    assert settings.check() is settings
    assert runs is None or len(runs) > 1
    ranks = math.prod(int(n) for n in re.findall(r"--(?:nnodes|nproc_per_node)=(\d+)", command))
    check_ranks(settings, ranks)


@pytest.mark.parametrize("command, argv", starting("sample.py"))
def test_sample_commands_parse(command, argv):
    args = sample.read_args(argv)
    assert args.run.startswith("out/")


@pytest.mark.parametrize("command, argv", starting("prepare_data.py"))
def test_prepare_data_commands_parse(command, argv):
    assert prepare_data.make_parser().parse_args(argv)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_scripts_exist(command):
    for name in re.findall(r"[\w/]+\.py", command):
        assert (ROOT / name).exists(), name


def test_flags_exist(capsys):
    with pytest.raises(SystemExit):
        sample.read_args(["--help"])
    helps = [TRAIN_PARSER.format_help(), prepare_data.make_parser().format_help(),
             capsys.readouterr().out]
    known = set(re.findall(r"--[a-z][\w-]+", " ".join(helps)))
    known |= {"--plot", "--seconds"}  # tests/bench_kernel.py
    known |= {"--study", "--profile", "--frozen", "--kind", "--json", "--nanogpt"}  # tests/time_steps.py
    known |= {"--collect"}  # runs/report.py
    known |= set(re.findall(r"--[a-z][\w-]+", measure_gpu.make_parser().format_help()))
    known |= {"--signals-to-handle"}  # torchrun
    known |= {"--standalone", "--nnodes", "--nproc_per_node", "--rdzv-backend", "--rdzv-endpoint"}
    for page in PAGES:
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", page.read_text("utf-8")))
        assert not named - known, page


# ---- numbers of the runs

def of(kind, key):
    """One number of each seed of a kind of run."""
    values = [run[key] for name, run in RUNS.items() if re.fullmatch(kind + r"-\d", name)]
    assert len(values) >= 3
    return values


def mean(kind, key):
    return statistics.mean(of(kind, key))


def spread(kind, key, digits):
    """mean ± standard deviation, as the table has them"""
    return f"{mean(kind, key):.{digits}f} ± {statistics.stdev(of(kind, key)):.{digits}f}"


def total_parameters(kind):
    return of(kind, "params")[0]["total"]


def test_what_the_first_command_prints():
    run = RUNS["facts-memory-1337"]
    assert train.read_settings([])[0].seed == run["seed"]
    assert f"At the end it recalls {run['recall']:.3f} of the facts" in TEXT


def test_the_limits():
    assert "**not measured on a GPU yet**" in TEXT
    assert round(total_parameters("facts-memory") / total_parameters("facts-dense")) == 6
    assert "six times the parameters, and stores fewer bits per parameter" in TEXT
    assert mean("facts-memory", "bits_per_param") < mean("facts-dense", "bits_per_param")
    larger = total_parameters("facts-n1024") / total_parameters("facts-dense")
    assert f"With 1,048,576 slots the model is {larger:.0f} times the size" in TEXT


def test_the_main_result():
    memory = mean("facts-memory", "recall")
    assert f"recalls {memory / mean('facts-dense', 'recall'):.1f} times as many facts" in TEXT
    longer = memory / mean("facts-dense-long", "recall")
    assert f"{longer:.1f} times as many as one that trains for the same time" in TEXT
    steps = json.loads((ROOT / "runs" / "results" / "steps.json").read_text("utf-8"))
    assert f"takes about {steps['Memory']['ratio'][1]:.1f} times as long on a CPU" in TEXT
    assert mean("facts-plus", "recall") < memory
    assert mean("facts-hash", "recall") > memory
    assert mean("apart-hash", "recall") < mean("apart-memory", "recall")


# ---- numbers of the code

@pytest.mark.parametrize("ffn", ["memory", "dense"])
def test_sizes(ffn):
    run = RUNS[f"facts-{ffn}-1"]
    settings = train.read_settings(["--ffn", ffn])[0]
    settings.vocab_size = run["vocab_size"]
    settings.block_size = run["block_size"]
    model = GPT(settings)
    assert model.param_counts() == run["params"]
    assert model.flops_per_token() == run["flops_per_token"]
    assert f"{run['params']['total'] / 1e6:.2f} M" in README
    assert f"{run['flops_per_token'] / 1e6:.2f} M" in README


def test_the_worked_example():
    left, right = [1, 7, 5, 0], [3, 2, 0, 6]
    assert f"left scores are {left} and its right scores {right}" in TEXT
    scores = torch.tensor([left, right], dtype=torch.float32)[:, None]  # (2, 1, 4)
    best, slots = kernel.topk_sums(scores, 2)  # (1, 2) both
    assert best.tolist() == [[13, 11]]
    assert slots.tolist() == [[7, 11]]
    assert "7 + 6 = 13, 7 + 3 = 10 and 5 + 6 = 11" in TEXT
    assert "reads slot 1·4 + 3 = 7 and slot 2·4 + 3 = 11" in TEXT
    first, second = best.softmax(-1)[0].tolist()
    assert f"softmax(13, 11) = {first:.2f} and {second:.2f}" in TEXT
    candidates = [(i, j) for i in range(2) for j in range(2) if (i + 1) * (j + 1) <= 2]
    assert "the ranks (0, 0), (0, 1) and (1, 0)" in TEXT
    assert candidates == [(0, 0), (0, 1), (1, 0)]


def test_the_default_layer():
    s = train.read_settings([])[0]
    n, K = s.mem_n_keys, s.mem_topk
    assert f"{2 * n} instead of {n**2:,} in the default run" in TEXT
    assert f"R = H·K slots: {s.mem_heads * K} of {n**2:,} by default" in TEXT
    sums = sum(K // (i + 1) for i in range(K))  # pairs of ranks with (i+1)(j+1) <= K
    assert f"For K = {K} this leaves {sums} sums" in TEXT


def test_the_presets():
    facts = train.FACTS["facts"]
    assert f"{facts['documents']:,} sentences about {facts['people']:,} people" in TEXT
    asked = sum(row["facts"] for row in RUNS["facts-memory-1337"]["recall_by_exposures"])
    assert f"complete all {asked:,} facts" in TEXT
    gpu = train.read_settings(["facts-gpu"])[0]
    people = train.FACTS["facts-gpu"]["people"]
    assert f"{people:,} people, {gpu.mem_n_keys**2:,} slots" in TEXT
    web = train.read_settings(["openwebtext"])[0]
    per_step = web.batch_size * web.block_size
    tokens = web.max_steps * per_step / 1e9
    passes = tokens / 2.7
    assert f"reads {tokens:.1f} billion tokens: {passes:.1f} passes over its 2.7 billion" in USE
    assert 2.5 < 5000 * per_step / 1e9 <= 2.7


@pytest.mark.slow
def test_the_corpus(tmp_path):
    folder = tmp_path / "facts"
    prepare_data.make_facts(folder, **train.FACTS["facts"])
    with np.load(folder / "recall.npz") as recall:
        exposures = recall["exposures"][~recall["control"].astype(bool)]  # (facts,)
        control = set(recall["subject"][recall["control"]])
        named = set(recall["subject"][~recall["control"]])
    assert "More than half of the facts occur at most six times." in TEXT
    assert np.median(exposures) <= 6
    # The facts that the lesson and runs/teach.sh teach.
    rows = (ROOT / "runs" / "new_facts.tsv").read_text("utf-8").splitlines()
    taught = {row.split("\t")[1] for row in rows[1:]}
    assert len(rows) == 101 and taught <= control and not taught & named
    meta = json.loads((folder / "meta.json").read_text("utf-8"))
    assert f"{100 / meta['answers']:.1f}% of the time" in TEXT


# ---- the example

def test_the_example_runs(capsys):
    code = CODE[1]
    begin = code.index("for step in ")
    names = {}
    torch.manual_seed(0)
    exec(code[:begin], names)
    net = names["net"]
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    exec(code[begin:], names)
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert losses[-1] < 0.5 * losses[0]
    for name, p in net.named_parameters():
        assert not torch.equal(p, before[name]), name
    # Both groups together hold all parameters, each once.
    groups = [group for optimizer in names["optimizers"] for group in optimizer.param_groups]
    held = [p for group in groups for p in group["params"]]
    assert len(held) == len(before)
    assert groups[1]["params"] == [net.table.values]
    assert "weight_decay" not in groups[1]
    assert groups[1]["lr"] > groups[0]["lr"]


def test_the_ten_lines_are_the_layer():
    names = dict(torch=torch)
    exec(CODE[0], names)
    assert len(CODE[0].strip().splitlines()) == 10
    torch.manual_seed(0)
    table = MemoryTable(n_keys=16, dim=12)
    layer = ProductKeyMemory(12, table, heads=3, topk=5, gate=False, qk_norm=False)
    x = torch.randn(40, 12)
    y = names["memory_layer"](x, layer.query.weight, layer.half_keys, table.values, K=5)
    torch.testing.assert_close(y, layer(x))


# ---- a kind of layer of one's own

def project_with_a_toy(folder):
    """A copy of the project with the README's toy kind: its file, and two lines in model.py."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "support", folder / "support")
    (folder / "toy.py").write_text(CODE[2])
    code = (folder / "model.py").read_text("utf-8")
    for after, line in zip(('KINDS = {\n', 'class GPTConfig:\n'),
                           re.findall(r"    (\"toy\".*|toy_hidden.*)\n", README)):
        assert code.count(after) == 1
        code = code.replace(after, f"{after}    {line}\n")
    (folder / "model.py").write_text(code)


ALL_OF_TOY = """
import sys, train, sample
data, *sizes = sys.argv[1:]
for ffn in ("toy", "dense"):
    assert train.main([*sizes, "--data", data, "--ffn", ffn, "--out-dir", f"out/{ffn}"]) == 0
assert train.main(["--compare", "out/toy", "out/dense"]) == 0
assert train.main(["--resume", "--out-dir", "out/toy"]) == 0
assert sample.main(["out/toy", "--recall", "--device", "cpu"]) == 0
"""


@pytest.mark.slow
def test_a_new_kind_is_a_file_and_a_line(data, tmp_path):
    project_with_a_toy(tmp_path)
    sizes = ("--n-layer 2 --n-embd 32 --n-head 2 --mem-layers 1 --toy-hidden 48 --batch-size 16 "
             "--max-steps 10 --eval-windows 64 --device cpu").split()
    done = subprocess.run([sys.executable, "-c", ALL_OF_TOY, str(data), *sizes], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    toy, dense = [json.loads((tmp_path / "out" / name / "result.json").read_text())
                  for name in ("toy", "dense")]
    smaller = 2 * 32 * (4 * 32 - 48)  # weights of its two matrices beside the MLP's
    assert toy["params"]["total"] == dense["params"]["total"] - smaller
    assert toy["flops_per_token"] == dense["flops_per_token"] - 6 * smaller
    assert (tmp_path / "out" / "compare.png").exists()
    assert "of 10 right" in done.stdout


# ---- the house

def test_the_tree_is_the_tree():
    """Every script, every file of support/, every folder: listed, with a comment, in README.md."""
    listed = []
    folder = ""
    for line in re.search(r"```\n(kernel.py .*?)```", README, re.DOTALL)[1].splitlines():
        name, comment = re.match(r" *(\S+) *(.*)", line).groups()
        if not line.startswith("  "):
            folder = ""
        listed.append(folder + name)
        if name.endswith("/"):
            folder = name
        assert comment or name == "support/", line
    there = [path.name for path in ROOT.glob("*.py")]
    there += [f"support/{path.name}" for path in (ROOT / "support").iterdir() if path.is_file()]
    there += ["support/", "tests/", "runs/", "docs/"]
    assert sorted(listed) == sorted(set(there) - {"support/__init__.py"})
    known = {"README.md", "LICENSE", "CITATION.cff", "requirements.txt", "ruff.toml", ".gitignore"}
    others = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    for path in others.splitlines():
        top, _, below = path.partition("/")
        assert below or top in known or top in listed, path


LAYERS = ["kernel", "memory", "support.rivals", "model", "support", "prepare_data", "train",
          "sample"]  # a file may import those before it


def imports_of(path):
    """The modules of ours that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "support":
            found |= {f"support.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return {name for name in found if name.split(".")[0] in LAYERS}


def test_imports_go_down_only():
    def level(name):
        return LAYERS.index(name if name in LAYERS else name.split(".")[0])

    files = {path.stem: imports_of(path) for path in ROOT.glob("*.py")}
    files |= {f"support.{path.stem}": imports_of(path) for path in (ROOT / "support").glob("*.py")}
    assert files["kernel"] == set() and files["memory"] == {"kernel"}
    for name, imported in files.items():
        for other in imported:
            if level(other) == level(name) and name.startswith("support."):
                continue  # checked below
            # Plumbing that needs no model may serve every script.
            plain = other.startswith("support.") and not needs_model(other, files)
            assert level(other) < level(name) or plain, f"{name} imports {other}"


def needs_model(name, files):
    """Whether a file of support/ imports the model, itself or through others."""
    return any(other == "model" or other.startswith("support.") and needs_model(other, files)
               for other in files[name])


@pytest.mark.slow
def test_each_file_of_support_can_be_imported_alone():
    """And none imports a script that runs: that would make a second copy of it."""
    names = [f"support.{path.stem}" for path in (ROOT / "support").glob("*.py")]
    code = "import importlib, os, sys\n"
    code += "import torch, tqdm, requests\n"  # what takes long is imported once, before the forks
    code += f"for name in {names}:\n"
    code += "    if (pid := os.fork()) == 0:\n"
    code += "        importlib.import_module(name)\n"
    code += "        os._exit(bool({'train', 'sample', 'prepare_data'} & sys.modules.keys()))\n"
    code += "    assert os.waitpid(pid, 0)[1] == 0, name\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
