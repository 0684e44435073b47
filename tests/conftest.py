import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def encoder():
    """A small smooth image encoder with parameters: (B, 3, 16, 16) -> (B, 8)."""
    layers = [torch.nn.Conv2d(3, 8, 4, 4), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.Linear(128, 8)]
    return torch.nn.Sequential(*layers).eval()


def shell(*words, code=0, env=None):
    """Run a script from another folder, as a user's shell would; returns its stdout and stderr."""
    done = subprocess.run(
        [sys.executable, str(ROOT / words[0]), *map(str, words[1:])], capture_output=True, text=True, env=env
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr
