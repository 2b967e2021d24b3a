"""What the tests share: one thread, and the one real model."""

import pytest
import torch

import trimtab as tt

torch.set_num_threads(1)  # the tiny models of most tests are slower on several


@pytest.fixture(scope="session")
def smollm2() -> tt.LM:
    """The embedded default model, float32 on the CPU, loaded once. Leave it as it is."""
    return tt.LM.load("smollm2-135m", dtype="float32", device="cpu")
