"""Real processes that take cores from a measurement."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

SPIN = "while True: pass"
NOISE = {
    "one core": [SPIN],
    "all cores": [SPIN] * (os.cpu_count() or 1),
    "two OpenMP threads": ["import torch; torch.set_num_threads(2); x = torch.randn(512, 512); print(flush=True)\n"
                           "while True: x @ x"],
    "comes and goes": ["import time\nwhile True:\n began = time.time()\n while time.time() - began < 0.3: pass\n"
                       " time.sleep(0.3)"],
}  # fmt: skip


@contextmanager
def beside(name: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that take cores while the block runs."""
    speaks = "print" in NOISE[name][0]
    children = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE if speaks else None)
        for code in NOISE[name]
    ]
    try:
        for child in children:
            if child.stdout is not None:
                child.stdout.readline()
        if not speaks:
            time.sleep(0.1)
        yield children
    finally:
        for child in children:
            child.kill()
            child.wait()
            if child.stdout is not None:
                child.stdout.close()
