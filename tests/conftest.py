"""One thread, no display, the same random numbers; real data where there is some."""

import logging
import os
import random
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"
# Processes that tests start find the package too, wherever they start from.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Every test, with the fixtures made for it, draws the same numbers, whichever tests ran before it."""
    import numpy as np
    import torch

    seed = int(os.environ.get("LIGHTNING_EDGE_TEST_SEED", "0"))
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def logging_as_it_was():
    """A run inside of the test's process turns these loggers to a file of its own."""
    loggers = [
        logging.getLogger(name) for name in (None, "lightning.pytorch", "lightning.fabric", "torch.utils._pytree")
    ]
    before = [(logger, list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, handlers, level, propagate in before:
        for handler in set(logger.handlers) - set(handlers):
            handler.close()
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def root():
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real data: ``LIGHTNING_EDGE_DATA``, else ``shared/data`` beside the checkout."""
    folder = Path(os.environ.get("LIGHTNING_EDGE_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no folder of real data at {folder}: set LIGHTNING_EDGE_DATA")
    return folder


@pytest.fixture(scope="session")
def mnist_path(shared_data):
    path = shared_data / "mnist.npz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    return path
