"""Settings shared by all tests: fixed seeds, and hypothesis without clocks and chance."""

import gc
import os
import sys

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests fork, which a process with OpenMP's threads does not survive

import pytest
from hypothesis import HealthCheck, settings

import doratune.train.run
from helpers import seed_generators

settings.register_profile(
    "doratune",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("doratune")


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where the conformance suite computes (cuda, mps)")


def pytest_configure(config):
    # torch.compile instantiates every autograd.Function it traces, and warns about that itself (torch 2.13).
    config.addinivalue_line("filterwarnings", "ignore:.*should not be instantiated:DeprecationWarning")


_imported = 0


@pytest.fixture(autouse=True)
def _imports_are_not_collected():
    """A training run ends with gc.collect(), which need not visit every object of torch's and transformers' modules."""
    global _imported
    if len(sys.modules) != _imported:
        gc.collect()
        gc.freeze()
        _imported = len(sys.modules)


@pytest.fixture(autouse=True)
def _fixed_seed():
    seed_generators(0)


@pytest.fixture(autouse=True)
def _curves_are_not_drawn(monkeypatch):
    """A picture takes longer than the training of a tiny model; test_curves.py and test_run.py draw some."""
    monkeypatch.setattr(doratune.train.run, "draw_curves", lambda runs, path, title, loss_unit: path.touch())
