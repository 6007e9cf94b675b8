"""
The scripts in runs/: how they stop, skip and go on, and that docs/results.md says what they do.

A stub takes the place of python. It only writes down what it is asked to run.
"""
import contextlib
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

import train

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "runs"))
import report

RESULTS = (ROOT / "docs" / "results.md").read_text("utf-8")
# Script: how many runs it makes.
SCRIPTS = {"facts.sh": 12, "slots.sh": 24, "tuning.sh": 19, "bfloat16.sh": 6, "two_ranks.sh": 3}
STUB = """#!/usr/bin/env bash
echo "$@" >> "$CALLS"
"""

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


class Runs:
    """A copy of runs/ in a folder of its own, started from another one."""

    def __init__(self, folder, stub=STUB):
        self.folder = folder
        self.out = folder / "copy" / "out"
        self.calls = folder / "calls"
        shutil.copytree(ROOT / "runs", folder / "copy" / "runs")
        python = folder / "python"
        python.write_text(stub)
        python.chmod(0o755)
        self.env = dict(os.environ, PYTHON=str(python), CALLS=str(self.calls))

    def start(self, script):
        self.calls.write_text("")

        def take_ctrl_c():  # even if the tests themselves run in the background
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen(["bash", f"copy/runs/{script}"], env=self.env, cwd=self.folder,
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                start_new_session=True, preexec_fn=take_ctrl_c)

    def trainings(self, script, status=0):
        """Run a script to its end -> the trainings it asked for, as {name of the run: call}."""
        process = self.start(script)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == status, errors
        found = {}
        for call in self.calls.read_text().splitlines():
            if "--compare" not in call:
                found[re.search(r"--out-dir out/(\S+)", call)[1]] = call
        return found


def settings_of(flags):
    return train.read_settings(shlex.split(flags))[0]


@pytest.mark.parametrize("script, count", SCRIPTS.items())
def test_results_says_how_many_runs_a_script_makes(tmp_path, script, count):
    assert len(Runs(tmp_path).trainings(script)) == count
    line = next(line for line in RESULTS.splitlines() if f"| `bash runs/{script}` |" in line)
    assert f"| {count} |" in line or f"| {count}, of which" in line


def test_results_says_how_many_runs_two_scripts_share(tmp_path):
    runs = Runs(tmp_path)
    shared = runs.trainings("facts.sh").keys() & runs.trainings("slots.sh").keys()
    assert f"24, of which {len(shared)} are shared with facts.sh" in RESULTS


def test_the_flags_in_the_table_of_what_was_tried(tmp_path):
    runs = Runs(tmp_path)
    calls = {}
    for script in SCRIPTS:
        calls |= runs.trainings(script)
    for words, name in report.TRIED.items():
        flags = "" if words.startswith("the default") else words.split("`")[1]
        expected = settings_of(f"{flags} --seed 1 --out-dir out/{name}")
        assert settings_of(calls[name].split("train.py ", 1)[1]) == expected, name
    default = next(words for words in report.TRIED if words.startswith("the default"))
    flags = " ".join(re.findall(r"`([^`]+)`", default))
    assert settings_of(f"{flags} --learning-rate 3e-3") == settings_of("")


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
    assert len(runs.trainings(script, status=130)) == 1


def test_ctrl_c_stops_a_script(tmp_path):
    # Even if the run that gets it ends in good order.
    runs = Runs(tmp_path, "#!/usr/bin/env bash\ntrap 'exit 0' INT\n"
                          "echo \"$@\" >> \"$CALLS\"\nsleep 20 &\nwait\n")
    process = runs.start("facts.sh")
    end = time.monotonic() + 20
    while not runs.calls.read_text() and time.monotonic() < end:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=20) == 130
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # the sleep, if it is left behind
    process.stderr.close()
    assert len(runs.calls.read_text().splitlines()) == 1
