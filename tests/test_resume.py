"""Killed, interrupted, out of room: the same command goes on, and ends in the bytes of an undisturbed run.

Each run is a process of its own, forked from this one, with one fault at a known call.
"""

import errno
import os
import re
import resource
import signal
from contextlib import contextmanager
from functools import partial
from pkgutil import resolve_name
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from conftest import assert_equal, fork, join, jsonl, metrics, pictures, refusal, shell

import common
import evaluate  # noqa: F401 - for the processes that are forked
import generate_pgd_adversarial as generate


class Fault(NamedTuple):
    """What happens at a call of a function, counted from 1, how the run ends, and the one line that it then prints."""

    at: str
    call: int
    does: str
    code: int = -signal.SIGKILL
    line: str = ""


PGD, STEP = "common.pgd", "torch.nn.utils.clip_grad_norm_"  # called for each batch; once in each training step
WRITE, RENAME = "os.fsync", "os.replace"  # called for each file that is written, run.json first
STOPPED = 130, ".*: stopped: the same command resumes from what is saved"
FULL = 2, ".*(File too large|No space left).*the same command resumes.*"
INFINITE = 2, ".*step 1 is not finite.*Remove .* and use a lower --lr"

SMALL = ["--preset", "smoke", "--num_images", 4, "--steps", 1, "--batch_size", 2]
PICTURES = ["--train_data", "pictures"]
TRAINING = [*SMALL, *PICTURES, "--val_images", 2, "--epochs", 2, "--save_every", 0]  # 4 steps
INTERRUPTED = Fault(STEP, 2, "SIGINT", *STOPPED)  # step 1 is saved
TABLE = [*SMALL, "--batch_size", 4, "--attack_steps", 1, "--adversarial_dir", "adversarial_eval"]
KINDS = {  # the command; what meets it, one after the other in one folder; a call that only too much work comes to
    "generation": (
        ["generate_pgd_adversarial.py", *SMALL, *PICTURES, "--batch_size", 1],
        [
            Fault(PGD, 2, "SIGKILL"),  # the first image is done
            Fault(WRITE, 3, "disk full", *FULL),  # a PNG
            Fault(WRITE, 4, "SIGKILL"),  # its line is not written
            Fault(PGD, 2, "SIGINT", *STOPPED),  # the second is done
            Fault(RENAME, 11, "SIGKILL"),  # metrics.json
        ],
        (PGD, 1),
    ),
    "MAT": (
        ["defend_clip_mat_v2.py", *TRAINING],
        [
            Fault(STEP, 1, "not finite", *INFINITE),
            INTERRUPTED,
            Fault(STEP, 2, "large files fail", *FULL),  # step 2 is saved, the state of step 3 cannot be written
            Fault(RENAME, 6, "SIGKILL"),  # the model is written, its configuration is not
        ],
        (STEP, 2),
    ),
    "offline": (
        ["defend_clip_pgd_v2.py", *TRAINING, "--adversarial_dir", "adversarial_train"], [INTERRUPTED], (STEP, 4)
    ),
    "online": (["defend_clip_pgd_v2.py", *TRAINING, "--online_steps", 1], [INTERRUPTED], (STEP, 4)),
    "evaluation": (
        ["evaluate.py", *TABLE, "--trainings", "--qualities", "--radii", "2/255"],
        [
            Fault(PGD, 3, "SIGKILL"),
            Fault(WRITE, 2, "disk full", *FULL),  # a part
            Fault("common.Run.save_part", 4, "SIGINT", *STOPPED),  # the figures are done, the radii are not
            Fault("common.Run.finish", 1, "SIGKILL"),
        ],
        (PGD, 1),
    ),
    "JPEG": (
        ["eval_jpeg.py", *TABLE, "--batch_size", 1, "--qualities", 50], [Fault(PGD, 2, "SIGINT", *STOPPED)], (PGD, 4)
    ),
}  # fmt: skip


@contextmanager
def met(fault):
    """Let the fault meet what is run inside."""
    place, _, name = fault.at.rpartition(".")
    function, calls = getattr(resolve_name(place), name), []

    def call(*args, **kwargs):
        calls.append(None)
        if len(calls) != fault.call:
            return function(*args, **kwargs)
        if fault.does == "not finite":
            return function(*args, **kwargs) * torch.nan
        if fault.does == "disk full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if fault.does == "large files fail":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        else:
            os.kill(os.getpid(), getattr(signal, fault.does))
        return function(*args, **kwargs)

    with patch.object(resolve_name(place), name, call):
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with pictures and the adversarial images of both splits."""
    folder = tmp_path_factory.mktemp("made")
    data = ["--train_data", pictures(folder / "pictures", 6)]
    for split in ("train", "eval"):
        words = [*SMALL, *data, "--split", split, "--output_dir", folder / f"adversarial_{split}"]
        shell("generate_pgd_adversarial.py", *words)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_ends_a_run_the_same_command_goes_on_and_ends_in_the_same_bytes(kind, made, tmp_path, monkeypatch):
    monkeypatch.chdir(made)
    command, faults, (further, call) = KINDS[kind]
    whole, out, log = tmp_path / "whole", tmp_path / "out", tmp_path / "log"
    shell(*command, "--output_dir", whole)
    for fault in [*faults, Fault(further, call, "SIGKILL", 0)]:
        child = fork(log, [*command, "--output_dir", out], prepare=partial(met, fault))
        code, printed, lines = join(child, log)
        assert code == fault.code, (fault, code, lines)
        assert ("is resumed (" in printed) == (fault != faults[0]), fault
        assert len(lines) == bool(fault.line) and re.fullmatch(fault.line, "".join(lines)), (fault, lines)
        assert (out / "metrics.json").exists() == (code == 0), fault
        assert code < 0 or not list(out.rglob(f"*.{child}.tmp")), fault
    assert_equal(out, whole)
    assert not {*whole.rglob("*.tmp"), *whole.glob("parts")}


def test_after_a_failed_call_in_a_notebook_another_one_works(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(made)

    def flags(*words):
        return generate.parse_args([*map(str, [*SMALL, *PICTURES]), "--output_dir", str(tmp_path), *words])

    pgd = common.pgd
    monkeypatch.setattr(common, "pgd", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as error:  # kept, as a notebook keeps what it shows
        generate.main(flags())
    monkeypatch.setattr(common, "pgd", pgd)
    assert "--steps 1, not 2" in refusal(capsys, generate.main, flags("--steps", "2"))
    generate.main(flags())
    assert metrics(tmp_path)["n"] == 4 and error and not common.LOCKS


def test_the_lines_of_a_killed_run_are_in_metadata_once_the_next_one_starts_with_whatever_batch_size(
    made, tmp_path, monkeypatch
):
    monkeypatch.chdir(made)
    command, folder = [*KINDS["generation"][0], "--output_dir", tmp_path / "out"], tmp_path / "out"
    for call in (3, 1):
        child = fork(tmp_path / "log", command, prepare=partial(met, Fault(PGD, call, "SIGKILL")))
        assert join(child, tmp_path / "log")[0] == -signal.SIGKILL
    names = [entry["file_name"] for entry in jsonl(folder / "metadata.jsonl")]
    assert names == ["images/000000.png", "images/000001.png"]
    assert not (folder / "parts").exists()
    shell(*command, "--batch_size", 4)
    ours, whole = (jsonl(each / "metadata.jsonl") for each in (folder, made / "adversarial_train"))
    assert [entry["sha256"] for entry in ours] == [entry["sha256"] for entry in whole]
    assert metrics(folder)["images_per_s"] == pytest.approx(4 / metrics(folder)["seconds"], rel=0.1)


def test_a_kill_at_the_end_leaves_no_parts_for_good(made, tmp_path, monkeypatch):
    monkeypatch.chdir(made)
    command, parts = [*KINDS["generation"][0], "--output_dir", tmp_path / "out"], tmp_path / "out" / "parts"
    end = Fault("shutil.rmtree", 3, "SIGKILL")  # the first is of loading the model, the second of the start
    child = fork(tmp_path / "log", command, prepare=partial(met, end))
    assert join(child, tmp_path / "log")[0] == -signal.SIGKILL and parts.exists()
    shell(*command)
    assert metrics(tmp_path / "out")["n"] == 4 and not parts.exists()
