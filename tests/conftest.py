"""What the tests share: no setting of the user's reaches them, scripts run as from a shell, one small whole report."""

import contextlib
import fcntl
import io
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import pytest

ROOT = Path(__file__).resolve().parent.parent
GPU = os.environ.get("CUDA_VISIBLE_DEVICES", "0")  # for test_cuda.py alone: the other tests know the CPU's figures
for name in list(os.environ):
    ours = name.startswith(("HF_", "HUGGINGFACE", "TORCH", "MPLBACKEND")) or name.lower().endswith("_proxy")
    if ours or name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        del os.environ[name]
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0", "CUDA_VISIBLE_DEVICES": ""}
os.environ |= {"HF_HOME": f"{tempfile.gettempdir()}/tests-without-a-hub", "OMP_NUM_THREADS": "1"}  # 2 workers, 2 cores
os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"  # of processes that tests start
import matplotlib.figure  # noqa: E402
import torch  # noqa: E402 - it reads them

TINY = ROOT / "tests" / "tiny"
SCRIPTS = ["generate_pgd_adversarial", "defend_clip_mat_v2", "defend_clip_pgd_v2", "eval_jpeg", "evaluate"]
TRAIN, EVAL, VALIDATION = 48, 16, 8  # images of --preset smoke


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def shell(*words, code=0, figures=False):
    """Run a script as a user's shell would, in this process, which saves the imports: its stdout and stderr.

    figures   whether they are written, which takes longer than small attacks
    """
    words = [str(ROOT / words[0]), *map(str, words[1:])]
    out, err, argv, ended = io.StringIO(), io.StringIO(), sys.argv, 0
    sys.argv = words
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.ExitStack() as stack:
            for slow in () if figures else ("savefig", "tight_layout"):
                stack.enter_context(patch.object(matplotlib.figure.Figure, slow))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        ended = end.code or 0
    finally:
        sys.argv = argv
    assert ended == code, out.getvalue() + err.getvalue()
    return out.getvalue(), err.getvalue()


def process(cwd, env, *commands):
    """Run scripts, one after the other, in a process of their own with further environment: what it printed."""
    code = f"import runpy, sys\nfor sys.argv in {[[str(word) for word in words] for words in commands]}:\n"
    code += f"    runpy.run_path({str(ROOT)!r} + '/' + sys.argv[0], run_name='__main__')\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def jsonl(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def lines_of(stderr):
    """Its lines, progress bars aside."""
    return [line for line in re.split("[\r\n]", stderr) if line.strip() and "%|" not in line]


def refusal(capsys, call, *args):
    """The one line with which a call ends, exit code 2."""
    with pytest.raises(SystemExit) as end:
        call(*args)
    lines = lines_of(capsys.readouterr().err)
    assert end.value.code == 2 and len(lines) == 1, lines
    return lines[0]


@pytest.fixture(scope="session")
def report(tmp_path_factory, worker_id):
    """A small report, made once for all workers; (folder of the stages, what evaluate.py printed, its command)."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "report"
    command = ["evaluate.py", "--reproduce", "--preset", "smoke", "--qualities", 50]
    command += ["--output_dir", folder / "evaluation", "--cache_dir", folder / "cache"]
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        printed = Path(f"{folder}.txt")
        if not printed.exists():
            printed.write_text(shell(*command, figures=True)[0])
    return folder, printed.read_text(), command
