import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers share two cores
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
TRAIN, EVAL, VALIDATION = 48, 16, 8
SMALL = ["--preset", "tiny", "--num_images", EVAL, "--num_train_images", TRAIN, "--val_images", VALIDATION]
SMALL += ["--epochs", 2, "--steps", 8, "--qualities", 50, "--online_images", TRAIN, "--online_steps", 2]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def encoder():
    """A small smooth image encoder with parameters: (B, 3, 16, 16) -> (B, 8)."""
    layers = [torch.nn.Conv2d(3, 8, 4, 4), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.Linear(128, 8)]
    return torch.nn.Sequential(*layers).eval()


def shell(*words, code=0, env=None):
    """Run a script as a user's shell would; returns its stdout and stderr.

    With env in a process of its own; else in this one, which saves the seconds of the imports.
    """
    words = [str(ROOT / words[0]), *map(str, words[1:])]
    if env is not None:
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env)
        ended, stdout, stderr = done.returncode, done.stdout, done.stderr
    else:
        out, err, argv = io.StringIO(), io.StringIO(), sys.argv
        sys.argv, ended = words, 0
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            ended = end.code or 0
        finally:
            sys.argv = argv
        stdout, stderr = out.getvalue(), err.getvalue()
    assert ended == code, stdout + stderr
    return stdout, stderr


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="session")
def report(tmp_path_factory):
    """A whole small report; (folder of the stages, what evaluate.py printed, its command)."""
    folder = tmp_path_factory.mktemp("report")
    command = ["evaluate.py", "--reproduce", *SMALL, "--output_dir", folder / "evaluation"]
    command += ["--cache_dir", folder / "cache"]
    printed, _ = shell(*command)
    return folder, printed, command
