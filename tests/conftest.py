"""What the tests share: no setting of the user's reaches them, scripts run as from a shell, one small whole report."""

import contextlib
import fcntl
import gc
import io
import json
import os
import re
import runpy
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from unittest.mock import DEFAULT, MagicMock, patch

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
GPU = os.environ.get("CUDA_VISIBLE_DEVICES", "0")  # for test_cuda.py alone: the other tests know the CPU's figures
for name in list(os.environ):
    ours = name.startswith(("HF_", "HUGGINGFACE", "TORCH", "MPLBACKEND")) or name.lower().endswith("_proxy")
    if ours or name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        del os.environ[name]
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0", "CUDA_VISIBLE_DEVICES": ""}
os.environ |= {"HF_HOME": f"{tempfile.gettempdir()}/tests-without-a-hub", "OMP_NUM_THREADS": "1"}  # 2 workers, 2 cores
os.fsync = lambda file: None  # no test cuts the power; the waits add up to seconds
os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"  # of processes that tests start

TINY = ROOT / "tests" / "tiny"
SCRIPTS = ["generate_pgd_adversarial", "defend_clip_mat_v2", "defend_clip_pgd_v2", "eval_jpeg", "evaluate"]
TRAIN, EVAL, VALIDATION = 48, 8, 8  # images of the report
REPORT = ["--reproduce", "--preset", "smoke", "--qualities", 50, "--num_images", EVAL, "--attack_steps", 4]


@pytest.fixture(autouse=True)
def seeded():
    import torch

    torch.manual_seed(0)


def no_axes(rows=1, columns=1, **_):
    """What takes the place of a figure's axes."""
    axes = np.empty((rows, columns), object)
    axes.fill(MagicMock())
    return axes


def run_script(words, figures=False):
    """Run a script as `python script.py ...` does, in this process.

    figures   whether they are drawn, which takes longer than small attacks
    """
    words = [str(ROOT / words[0]), *map(str, words[1:])]
    nothing = {"subplots": MagicMock(side_effect=no_axes), "savefig": DEFAULT, "tight_layout": DEFAULT}
    drawing = contextlib.nullcontext() if figures else patch.multiple("matplotlib.figure.Figure", **nothing)
    with drawing, patch.object(sys, "argv", words):
        runpy.run_path(words[0], run_name="__main__")


def shell(*words, code=0, figures=False):
    """Run a script as a user's shell would, in this process, which saves the imports: its stdout and stderr."""
    out, err, ended = io.StringIO(), io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run_script(words, figures)
    except SystemExit as end:
        ended = end.code or 0
    assert ended == code, out.getvalue() + err.getvalue()
    return out.getvalue(), err.getvalue()


def fork(log, *commands, prepare=contextlib.nullcontext, figures=False):
    """Start a process forked from this one, which saves the imports, that runs scripts one after the other: its id.

    log       what it prints goes to LOG.out and LOG.err
    prepare   called in the process; the scripts run inside of the context that it returns
    """
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        gc.disable()  # it would copy the memory of this process
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job would ignore Ctrl-C
        with (
            open(f"{log}.out", "w") as out, contextlib.redirect_stdout(out),
            open(f"{log}.err", "w", 1) as err, contextlib.redirect_stderr(err),
        ):  # fmt: skip
            try:
                with prepare():
                    for words in commands:
                        run_script(words, figures)
                code = 0
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(code)


def join(child, log):
    """Wait for a fork()ed process: exit code, minus the signal if one killed it; what it printed; lines on stderr."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, Path(f"{log}.out").read_text(), lines_of(Path(f"{log}.err").read_text())


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def pictures(folder, count, seed=0):
    """Make a small data set of one's own, which loads faster than the tiny one; return its folder."""
    folder.mkdir()
    for i, pixels in enumerate(np.random.default_rng(seed).integers(0, 255, (count, 5, 5, 3), np.uint8)):
        Image.fromarray(pixels).resize((60, 40)).save(folder / f"{i}.png")
    lines = [{"file_name": f"{i}.png", "caption": f"Thing {i} in colour {seed}."} for i in range(count)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


# of two equal runs
VARYING = ["argv", "started", "seconds", "training_seconds", "images_per_s", "processes", "commit"]


def contents(folder):
    """{path: bytes} of a run's files, run.json and metrics.json parsed and without what two equal runs differ in."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in {"run.json", "metrics.json"} & files.keys():
        record = json.loads(files[name])
        del record["args"]["output_dir"]
        files[name] = {key: value for key, value in record.items() if key not in VARYING}
    return files


def assert_equal(folder, other):
    """Two runs have left the same files."""
    files, others = contents(folder), contents(other)
    assert files.keys() == others.keys()
    assert not [name for name in files if files[name] != others[name]]


def snapshot(folder):
    """{path: (when it was changed, bytes)} of what lies in a folder and below."""
    return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in folder.rglob("*")}


def other_weights(file, scale=1.01):
    """Write weights of the tiny CLIP, those of its visual tower changed a little; return the file."""
    from safetensors.torch import load_file, save_file  # here, as torch comes with it

    state = load_file(TINY / "clip" / "open_clip_model.safetensors")
    save_file({key: value * scale if key.startswith("visual.") else value for key, value in state.items()}, file)
    return file


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
    command = ["evaluate.py", *REPORT, "--output_dir", folder / "evaluation"]
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        printed = Path(f"{folder}.txt")
        if not printed.exists():
            printed.write_text(shell(*command)[0])
    return folder, printed.read_text(), command
