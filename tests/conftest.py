"""Offline, one thread a worker (two workers share two cores), and the device the tests run on."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _imported_modules_are_no_garbage():
    """No later collection walks the half million objects of torch and transformers: a sixth of the suite's time."""
    gc.collect()
    gc.freeze()


LONGEST = (  # files that two workers begin with, so that neither waits for the other at the end
    "test_interpreted.py",
    "test_export.py",
    "test_notebooks.py",
    "test_run.py",
    "test_demo.py",
    "test_activation.py",
    "test_compile.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A private name that a new version of a library has changed is said first, before what fails because of it."""
    place = {name: i for i, name in enumerate(("test_compat.py", *LONGEST))}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))
