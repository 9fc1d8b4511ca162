"""What every test shares: one thread (the models are tiny), no real hub, and the models that may be at hand."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Kernels run in Triton's interpreter where there is no GPU; it reads its switch when something first imports it.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
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


@pytest.fixture
def stories():
    """Loads stories-260k, a tiny real model, where DECODATHLON_MODELS has it."""
    folder = os.environ.get("DECODATHLON_MODELS")
    if not folder or not (Path(folder) / "stories260K.bin").is_file():
        pytest.skip("DECODATHLON_MODELS does not name a folder with stories260K.bin")
    from decodathlon.harness import models

    model = models.resolve(f"stories-260k[path={folder}]")
    return lambda: models.load(model, device="cpu", dtype="float32", say=lambda text: None)
