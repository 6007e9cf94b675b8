"""What all tests share: the import path, one thread, a tiny corpus of facts."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support import pictures, readers

torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "slow: takes more than two seconds; leave these out with -m 'not slow'")
    # kernel.py ignores these warnings, and pytest turns all warnings on again.
    config.addinivalue_line(
        "filterwarnings", "ignore:Sparse (CSR tensor support|invariant checks)")


@pytest.fixture(scope="session", autouse=True)
def original_draw():
    """Keep pictures.draw from drawing curves.png, in this process and its forks.

    To draw one takes longer than the runs of the tests. Yields the function that draws all, for the
    tests of drawing.
    """
    original = pictures.draw

    def draw_all_but_curves(folders, path):
        if Path(path).name != "curves.png":
            original(folders, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "draw", draw_all_but_curves)
        yield original


@pytest.fixture(scope="module")
def few_reads():
    """At the end of a run, read 64 windows for reads.npz: all would take longer than the run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "WINDOWS_OF_READS", 64)
        yield


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A tiny corpus of facts, to be read only."""
    import prepare_data
    folder = tmp_path_factory.mktemp("data") / "facts"
    prepare_data.make_facts(folder, people=60, control=10, documents=2000, val_documents=128)
    return folder


@pytest.fixture
def empty_folder(monkeypatch, tmp_path):
    """The test runs in an empty folder, without the user's proxies, tokens and passwords."""
    for name in ("HF_ENDPOINT", "HF_TOKEN", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.chdir(tmp_path)
