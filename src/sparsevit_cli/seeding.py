"""Seeds as pure functions of (seed, purpose, counters): nothing to save, nothing to replay."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager


def derive_seed(seed: int, purpose: str, *counters: int) -> int:
    """64-bit seed of one draw: the first bytes of the SHA-256 of `seed:purpose:counters`."""
    text = ":".join([str(seed), purpose, *(str(counter) for counter in counters)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def step_seed(seed: int, purpose: str, step: int) -> int:
    """32-bit seed of what an optimizer step draws."""
    import numpy as np

    return int(np.random.SeedSequence([seed, step, *purpose.encode()]).generate_state(1)[0])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, numpy's and torch's CPU generator start at `seed` inside the block and are put back after it."""
    import numpy as np
    import torch

    python_state, numpy_state = random.getstate(), np.random.get_state()
    torch_state = torch.default_generator.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # Not torch.manual_seed: that would also move the generators of every GPU.
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.default_generator.set_state(torch_state)
