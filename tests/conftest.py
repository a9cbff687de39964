"""What all tests share: no hub, a workspace of their own, two threads."""

import os
import tempfile

# Before anything imports transformers, datasets or matplotlib.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
os.environ["NBHELPERS_BATCH"] = "1"
os.environ.pop("NBHELPERS_FORCE", None)
WORKSPACE = tempfile.TemporaryDirectory(prefix="nbhelpers-tests-")
os.environ["NBHELPERS_ROOT"] = WORKSPACE.name

import pytest  # noqa: E402
import torch  # noqa: E402

# One: beside other work on the machine, a second thread mostly waits for the first and spins.
torch.set_num_threads(1)


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A workspace for one test alone: the folder that holds its .artifacts and reports."""
    monkeypatch.setenv("NBHELPERS_ROOT", str(tmp_path))
    return tmp_path
