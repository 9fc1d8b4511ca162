"""What every test shares: one thread (the models are tiny), no real hub, and the models that may be at hand."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest_plugins = ["pytester"]


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def data_folder():
    """The folder with real data that DECODATHLON_DATA names; every test that uses it has a twin that does without."""
    folder = os.environ.get("DECODATHLON_DATA")
    if not folder:
        pytest.skip("DECODATHLON_DATA is not set")
    return Path(folder)
