"""
The scripts in runs/: they train what the tables need, and they stop, skip and go on as they should.
docs/appendix.md lists them.

A stub takes the place of python. It only writes down what it is asked to run.
"""
import contextlib
import dataclasses
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import prepare_data
import sample
import train
from model import GPT

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "runs"))
import results
import time_steps

APPENDIX = (ROOT / "docs" / "appendix.md").read_text("utf-8")
# Script: how many runs it makes.
SCRIPTS = {"baselines.sh": 41, "names.sh": 24, "tune.sh": 42, "slots.sh": 30, "scaling.sh": 17,
           "teach.sh": 3, "table_optimizer.sh": 53,
           "tinystories.sh": 15,
           "own_facts.sh FACTS.tsv PATTERNS.tsv": 84, "text.sh STORIES.txt WEB.txt": 79}
STUB = """#!/usr/bin/env bash
echo "$@" >> "$CALLS"
"""

# A script of five runs.
FIVE = """source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
for seed in 1 2 3 4 5; do
    run five-$seed --seed $seed
done
finish
"""

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


class Runs:
    """A copy of runs/ in a folder of its own, started from another one."""

    def __init__(self, folder, stub=STUB):
        self.folder = folder
        self.out = folder / "copy" / "out"
        self.calls = folder / "calls"
        shutil.copytree(ROOT / "runs", folder / "copy" / "runs")
        (folder / "copy" / "runs" / "five.sh").write_text(FIVE)
        python = folder / "python"
        python.write_text(stub)
        python.chmod(0o755)
        self.env = dict(os.environ, PYTHON=str(python), CALLS=str(self.calls))

    def start(self, script, **env):
        """script: its name, and its arguments if it takes any."""
        self.calls.write_text("")

        def take_ctrl_c():  # even if the tests themselves run in the background
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen(["bash", *f"copy/runs/{script}".split()], env=self.env | env,
                                cwd=self.folder,
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                start_new_session=True, preexec_fn=take_ctrl_c)

    def trainings(self, script, status=0, **env):
        """Run a script to its end -> the trainings it asked for, as {name of the run: call}."""
        process = self.start(script, **env)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == status, errors
        found = {}
        for call in self.calls.read_text().splitlines():
            if "train.py" in call and "--compare" not in call:
                found[re.search(r"--out-dir out/(\S+)", call)[1]] = call
        return found


def settings_of(flags):
    return train.read_settings(shlex.split(flags))[0]


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """{name of a run: its call of train.py} of all scripts but that of the GPU runs."""
    runs = Runs(tmp_path_factory.mktemp("all"))
    calls = {}
    for script in SCRIPTS:
        if script != "tinystories.sh":
            calls |= runs.trainings(script)
    return calls


def flags_of(call):
    return call.split("train.py ", 1)[1]


def same_for_all(settings, *ignored):
    """Settings without those that differ between the runs of a kind and of its sweep.

    And without the rule that trains the table: what is timed now is RowAdam.
    """
    rule = ("table_optimizer", "half_key_share")
    others = dict.fromkeys(("seed", "out_dir", *rule, *results.RATES, *ignored))
    return dataclasses.replace(settings, **others)


def same_model(call, timed, *ignored):
    """Whether a run trains what time_steps.py times, some settings aside."""
    trained = same_for_all(settings_of(flags_of(call)), *ignored)
    return trained == same_for_all(settings_of(shlex.join(timed)), *ignored)


def test_the_scripts_make_all_runs_of_the_results(calls):
    """And with the settings behind the numbers: the sizes and the FLOPs agree."""
    runs = results.read("facts")
    retired = {name for name in runs if name.startswith(results.RETIRED)}
    assert calls.keys() == runs.keys() - retired - {"facts-memory-1337"}
    corpora = {}
    models = {}
    for name, call in calls.items():
        run = runs[name]
        s, preset, resume, _ = train.read_settings(shlex.split(flags_of(call)))
        assert (preset, resume) == ("tinystories" if "text-" in name else "facts", False)
        assert (s.seed, s.ffn) == (run["seed"], run["ffn"])
        s.vocab_size = run["vocab_size"]
        s.block_size = run["block_size"]
        size = corpora.setdefault(s.data, (s.vocab_size, s.block_size))
        assert size == (s.vocab_size, s.block_size), "one corpus has one size"
        assert s.max_steps * s.batch_size * s.block_size == run["tokens"]
        kind = repr(same_for_all(s))
        if kind not in models:
            with torch.device("meta"):
                models[kind] = GPT(s)
        model = models[kind]
        assert model.param_counts() == run["params"], name
        assert model.flops_per_token() == run["flops_per_token"], name
        # The rate of a table or of experts, where there are any.
        idle = {"value_lr"} if s.ffn in ("dense", "moe") else set()
        if s.ffn != "moe":
            idle.add("expert_lr")
        for rate in set(results.RATES) - idle:
            assert getattr(s, rate) == run[rate], name


@pytest.mark.parametrize("script, count", SCRIPTS.items())
def test_the_appendix_says_how_many_runs_a_script_makes(tmp_path, script, count):
    assert len(Runs(tmp_path).trainings(script)) == count
    line = next(line for line in APPENDIX.splitlines() if f"| `bash runs/{script}` |" in line)
    assert f"| {count} |" in line or f"| {count}, " in line


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_commands_of_a_script_parse(tmp_path, script):
    runs = Runs(tmp_path)
    runs.trainings(script)
    for call in runs.calls.read_text().splitlines():
        name, flags = re.search(r"(\w+\.py) (.*)", call).groups()
        argv = shlex.split(flags)
        if name == "train.py":
            settings, preset, _, compared = train.read_settings(argv)
            if compared:
                assert len(compared) > 1
                continue
            is_text = script.startswith(("text.sh", "tinystories.sh"))
            assert preset == ("tinystories" if is_text else "facts")
            # The data decides these.
            settings.vocab_size = 512
            settings.block_size = 9
            settings.check()  # ValueError if they do not fit together
        elif name == "sample.py":
            assert sample.read_args(argv).run.startswith("out/")
        else:
            assert name == "prepare_data.py"
            prepare_data.make_parser().parse_args(argv)


def test_the_appendix_says_how_many_runs_two_scripts_share(tmp_path):
    runs = Runs(tmp_path)
    main = runs.trainings("baselines.sh").keys()
    for script, count in SCRIPTS.items():
        shared = main & runs.trainings(script).keys()
        if shared and script != "baselines.sh":
            line = next(line for line in APPENDIX.splitlines()
                        if f"| `bash runs/{script}` |" in line)
            which = "all" if len(shared) == count else f"of which {len(shared)} are"
            assert f"| {count}, {which} shared with baselines.sh |" in line


def test_the_models_that_are_timed_are_those_of_the_runs(calls):
    """tests/time_steps.py --study times what the scripts train, rates and seeds aside."""
    with_adamw = {title for title in time_steps.STUDY if title.endswith(", AdamW")}
    assert set(results.STEP_OF.values()) == time_steps.STUDY.keys() - with_adamw
    for kind, title in results.STEP_OF.items():
        longer = ["max_steps"] if kind == "facts-dense-long" else []
        assert same_model(calls[f"{kind}-1"], time_steps.STUDY[title], *longer), title


def test_the_models_that_are_timed_on_text_are_those_of_the_runs(calls):
    """The command that docs/appendix.md gives times what text.sh trains."""
    command = re.search(r"tests/time_steps.py\s+(tinystories\s[^`]*)`", APPENDIX)[1]
    _, shared = time_steps.read_flags(shlex.split(command))
    for title, kind in results.TEXT.items():
        if not title.endswith(results.TWICE):
            timed = [*time_steps.KINDS[title], *shared]
            assert same_model(calls[f"text-web-{kind}-1"], timed, "max_steps", "eval_windows")


def prepared_by(runs, script):
    runs.trainings(script)
    return [call for call in runs.calls.read_text().splitlines() if "prepare_data.py" in call]


def test_scripts_find_their_files_from_any_folder(tmp_path):
    runs = Runs(tmp_path)
    facts = prepared_by(runs, "own_facts.sh FACTS.tsv PATTERNS.tsv")
    paths = f"--from-file {tmp_path}/FACTS.tsv {tmp_path}/PATTERNS.tsv "
    assert len(facts) == 2 and all(paths in call for call in facts)
    stories, web = prepared_by(runs, "text.sh STORIES.txt WEB.txt")
    assert f"prepare_data.py {tmp_path}/STORIES.txt " in stories
    assert f"prepare_data.py {tmp_path}/WEB.txt " in web


@pytest.mark.parametrize("script", ["own_facts.sh", "text.sh", "text.sh ONE.txt"])
def test_scripts_ask_for_their_files(tmp_path, script):
    process = Runs(tmp_path).start(script)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert re.fullmatch(r"\w+.sh: give two .*\n", errors)


@pytest.mark.parametrize("script", ["own_facts.sh no/FACTS.tsv PATTERNS.tsv",
                                    "text.sh no/STORIES.txt WEB.txt"])
def test_scripts_stop_if_a_folder_is_missing(tmp_path, script):
    runs = Runs(tmp_path)
    assert runs.trainings(script, status=1) == {}
    assert not runs.calls.read_text()


def test_several_runs_at_a_time(tmp_path):
    """JOBS=3: all runs, in the order of the script, and what they print is in out/NAME.txt."""
    runs = Runs(tmp_path, STUB + "echo printed with $OMP_NUM_THREADS threads\n")
    one_by_one = runs.trainings("five.sh")
    assert runs.trainings("five.sh", JOBS="3").items() <= one_by_one.items()
    for name in one_by_one:
        if name.startswith("five"):
            assert "threads" in (runs.out / f"{name}.txt").read_text()


def test_finished_runs_make_no_room_for_more(tmp_path):
    """Two at a time, also after some runs that are skipped at once."""
    stub = STUB + """echo begin >> "$CALLS.log"
sleep 0.5
echo end >> "$CALLS.log"
"""
    runs = Runs(tmp_path, stub)
    for name in ("five-1", "five-2"):
        (runs.out / name).mkdir(parents=True)
        (runs.out / name / "result.json").write_text("{}")
    assert len(runs.trainings("five.sh", JOBS="2")) == 3
    running = most = 0
    for line in (tmp_path / "calls.log").read_text().split():
        running += 1 if line == "begin" else -1
        most = max(most, running)
    assert most == 2 and running == 0


def test_a_run_that_fails_stops_those_beside_it(tmp_path):
    stub = STUB + """case "$@" in *five-1*) sleep 1; exit 3;; esac
trap 'echo asked to stop >> "$CALLS"; exit 143' TERM
sleep 20 &
wait
"""
    runs = Runs(tmp_path, stub)
    process = runs.start("five.sh", JOBS="2")
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 3, errors
    assert errors == "a run failed: the newest out/*.txt says why\n"
    calls = runs.calls.read_text().splitlines()
    assert len(calls) == 3 and calls[-1] == "asked to stop"


@pytest.mark.parametrize("script", SCRIPTS)
def test_finished_runs_are_skipped_and_begun_ones_go_on(tmp_path, script):
    runs = Runs(tmp_path)
    first = runs.trainings(script)
    finished, begun, *rest = first
    for name in (finished, begun):
        (runs.out / name).mkdir(parents=True)
        (runs.out / name / "config.json").touch()
    (runs.out / finished / "result.json").touch()
    second = runs.trainings(script)
    assert list(second) == [begun, *rest]
    assert second[begun].endswith(f"train.py --resume --out-dir out/{begun}")
    assert all(second[name] == first[name] for name in rest)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_stops_when_a_run_is_interrupted(tmp_path, script):
    runs = Runs(tmp_path, STUB + "exit 130\n")  # as train.py does when it has saved
    runs.trainings(script, status=130)
    assert len(runs.calls.read_text().splitlines()) == 1


def test_a_script_stops_when_a_run_fails(tmp_path):
    runs = Runs(tmp_path, STUB + "exit 3\n")
    assert len(runs.trainings("baselines.sh", status=3)) == 1


def test_ctrl_c_stops_a_script(tmp_path):
    # Even if the run that gets it ends in good order.
    runs = Runs(tmp_path, "#!/usr/bin/env bash\ntrap 'exit 0' INT\n"
                          "echo \"$@\" >> \"$CALLS\"\nsleep 20 &\nwait\n")
    process = runs.start("baselines.sh")
    end = time.monotonic() + 20
    while not runs.calls.read_text() and time.monotonic() < end:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=20) == 130
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # the sleep, if it is left behind
    process.stderr.close()
    assert len(runs.calls.read_text().splitlines()) == 1
