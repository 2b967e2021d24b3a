"""What the tests share: one thread, and the one real model."""

import signal

import pytest
import torch

import trimtab as tt

# A run in the background may have it ignored, and the tests of Ctrl-C would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # the tiny models of most tests are slower on several


@pytest.fixture(scope="session")
def smollm2() -> tt.LM:
    """The embedded default model, float32 on the CPU, loaded once. Leave it as it is."""
    return tt.LM.load("smollm2-135m", dtype="float32", device="cpu")
