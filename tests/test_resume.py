"""Killed, interrupted, out of room: the same command goes on, and ends in the bytes of an undisturbed run.

Each run is a process of its own, forked from one that has done the imports, with one fault at a known call.
"""

import errno
import importlib
import json
import multiprocessing
import os
import re
import resource
import runpy
import shutil
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT, lines_of, refusal

import common
import evaluate  # noqa: F401 - forked with its imports

# of metrics.json: when, how long, how much memory; in argv stands --output_dir
VARYING = {"started", "seconds", "training_seconds", "images_per_s", "image_steps_per_s", "peak_memory_bytes", "argv"}
TRAINING = ["--batch_size", 4, "--val_images", 2, "--epochs", 2, "--save_every", 0]  # 4 steps
OFFLINE = ["--adversarial_dir", "{shared}/adversarial_train"]
TRANSFER = ["--adversarial_dir", "{shared}/adversarial_eval"]
WORDS = {  # of each kind of run, its script first
    "generation": ["generate_pgd_adversarial.py", "--batch_size", 2],  # 4 batches
    "MAT": ["defend_clip_mat_v2.py", *TRAINING],
    "offline": ["defend_clip_pgd_v2.py", *TRAINING, *OFFLINE],
    "online": ["defend_clip_pgd_v2.py", *TRAINING, "--online_steps", 1],
    "evaluation": ["evaluate.py", *TRANSFER, "--qualities", "--attack_steps", 1, "--sanity"],  # no JPEG rows
    "JPEG": ["eval_jpeg.py", *TRANSFER, "--qualities", 50, 30],
}


class Fault(NamedTuple):
    """What happens at a call of a function, counted from 1."""

    at: str
    call: int
    does: str


STEP = "torch.nn.utils.clip_grad_norm_"  # called once a training step
WRITE = "os.fsync"  # a temporary file is written, and not yet renamed
PART = "Run.save_part"
ALL_OF_IT = {  # a call that only a run from the start comes to
    **{"generation": ("common.pgd", 4), "MAT": (STEP, 4), "offline": (STEP, 4), "online": (STEP, 4)},
    **{"evaluation": (f"common.{PART}", 3), "JPEG": ("common.pgd", 2)},
}


def run_child(words, fault, stdout, stderr):
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore Ctrl-C
    if fault:
        owner, _, name = fault.at.rpartition(".")
        setattr(resolve_name(owner), name, faulty(getattr(resolve_name(owner), name), fault))
    sys.argv = [str(ROOT / words[0]), *words[1:]]
    with open(stdout, "w") as out, open(stderr, "w") as err, redirect_stdout(out), redirect_stderr(err):
        runpy.run_path(sys.argv[0], run_name="__main__")


def faulty(function, fault):
    calls = []

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

    return call


class Runs:
    """Starts runs of 8 images in folders of their own."""

    def __init__(self, folder):
        self.folder, self.whole = folder, {}
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["test_resume", "scipy.io"])  # scipy for datasets

    def start(self, kind, out, fault=None, *more):
        """A process, its stdout and stderr files."""
        words = ["--preset", "tiny", "--num_images", 8, "--steps", 1, "--cache_dir", self.folder / "cache"]
        words = [*WORDS[kind], *words, "--output_dir", out, *more]
        words = [str(word).format(shared=self.folder) for word in words]
        texts = [f"{out}.stdout", f"{out}.stderr"]
        process = self.context.Process(target=run_child, args=(words, fault, *texts))
        process.start()
        return process, *texts

    def end(self, process, stdout, stderr):
        """Exit code (minus the signal for a killed process), what it printed, its lines on stderr."""
        process.join()
        return process.exitcode, Path(stdout).read_text(), lines_of(Path(stderr).read_text())

    def run(self, *what):
        return self.end(*self.start(*what))

    def undisturbed(self, kind):
        """contents() of a run that nothing happened to."""
        if kind not in self.whole:
            code, _, lines = self.run(kind, self.folder / f"whole_{kind}")
            assert code == 0, lines
            self.whole[kind] = contents(self.folder / f"whole_{kind}")
        return self.whole[kind]

    def assert_ends_like_undisturbed(self, kind, out, *more):
        code, printed, lines = self.run(kind, out, Fault(*ALL_OF_IT[kind], "SIGKILL"), *more)
        assert code == 0, lines or "did everything again"
        assert "resuming (" in printed
        assert_equal(contents(out), self.undisturbed(kind))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("resume"))
    for split in ("train", "eval"):
        assert runs.run("generation", runs.folder / f"adversarial_{split}", None, "--split", split)[0] == 0
    return runs


def contents(folder):
    """{path: bytes} of every file; metrics.json parsed, without what two equal runs may differ in."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    record = json.loads(files["metrics.json"])
    record["args"] = {key: value for key, value in record["args"].items() if key not in common.NOT_IN_RESULT}
    files["metrics.json"] = {key: value for key, value in record.items() if key not in VARYING}
    return files


def assert_equal(files, others):
    assert files.keys() == others.keys()
    assert not [name for name in files if files[name] != others[name]]


KILLS = {  # one after the other in one folder
    "generation": [Fault("common.pgd", 3, "SIGKILL"), Fault(WRITE, 5, "SIGKILL"), Fault("common.save", 11, "SIGKILL")],
    "MAT": [Fault(WRITE, 4, "SIGKILL"), Fault("os.replace", 9, "SIGKILL")],
    "offline": [Fault(STEP, 4, "SIGKILL")],
    "online": [Fault("common.pgd", 6, "SIGKILL")],
    "evaluation": [Fault(f"common.{PART}", 2, "SIGKILL"), Fault("matplotlib.figure.Figure.savefig", 2, "SIGKILL")],
    "JPEG": [Fault("common.pgd", 2, "SIGKILL")],
}


@pytest.mark.parametrize("kind", KILLS)
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(kind, runs, tmp_path):
    for fault in KILLS[kind]:
        code, _, lines = runs.run(kind, tmp_path / "out", fault)
        assert code == -signal.SIGKILL, (fault, lines)
        assert not (tmp_path / "out" / "metrics.json").exists()
    runs.assert_ends_like_undisturbed(kind, tmp_path / "out")


def test_a_run_killed_after_its_last_file_is_complete(runs, tmp_path):
    assert runs.run("generation", tmp_path / "out", Fault("shutil.rmtree", 3, "SIGKILL"))[0] == -signal.SIGKILL
    assert (tmp_path / "out" / ".partial").exists()
    code, printed, _ = runs.run("generation", tmp_path / "out", None, "--batch_size", 3)  # no image depends on it
    assert code == 0 and "nothing to do" in printed
    assert_equal(contents(tmp_path / "out"), runs.undisturbed("generation"))


def test_other_flags_do_not_resume_and_are_named(runs, tmp_path):
    out = tmp_path / "out"
    assert runs.run("generation", out, Fault("common.pgd", 4, "SIGKILL"))[0] == -signal.SIGKILL
    kept = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    code, _, lines = runs.run("generation", out, None, "--seed", 1)
    assert code == 2 and len(lines) == 1 and "--seed 0, not 1. To replace it, add --overwrite" in lines[0]
    assert kept == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    code, printed, _ = runs.run("generation", out, None, "--seed", 1, "--overwrite")
    assert code == 0 and "resuming" not in printed
    assert contents(out)["metadata.jsonl"] != runs.undisturbed("generation")["metadata.jsonl"]


STOPPED = ".*: stopped: the same command resumes from what is saved"
FULL = ".*(File too large|No space left).*the same command resumes.*"
ENDS = {  # one after the other in one folder: fault, exit code, its one line
    "generation": [
        (Fault("common.read_image", 3, "large files fail"), 2, ".*File too large.*"),
        (Fault(WRITE, 4, "large files fail"), 2, FULL),
        (Fault(WRITE, 5, "disk full"), 2, FULL),
        (Fault("common.pgd", 2, "SIGINT"), 130, STOPPED),
    ],
    "MAT": [
        (Fault(STEP, 1, "not finite"), 2, ".*step 1 is not finite.*lower --lr and --overwrite"),
        (Fault(STEP, 2, "SIGINT"), 130, STOPPED),
        (Fault(STEP, 2, "large files fail"), 2, FULL),  # the state of step 3
        (Fault(STEP, 1, "not finite"), 2, ".*step 3 is not finite.*lower --lr and --overwrite"),
        (Fault(STEP, 2, "large files fail"), 2, FULL),  # the model
    ],
}


@pytest.mark.parametrize("kind", ENDS)
def test_whatever_ends_a_run_is_one_line_and_it_goes_on_from_what_is_saved(kind, runs, tmp_path):
    out, fresh = tmp_path / "out", ("--cache_dir", tmp_path / "cache")
    for fault, exit_code, said in ENDS[kind]:
        code, _, lines = runs.run(kind, out, fault, *fresh)
        assert code == exit_code and len(lines) == 1 and re.fullmatch(said, lines[0]), (fault, lines)
        assert not list(out.rglob("*.tmp"))
    assert not (out / "open_clip_config.json").exists()
    runs.assert_ends_like_undisturbed(kind, out, *fresh)


@pytest.mark.parametrize("kind", ["generation", "MAT", "evaluation", "JPEG"])
def test_too_little_disk_is_said_before_the_first_step(kind, runs, tmp_path, monkeypatch, capsys):
    words = [str(word).format(shared=runs.folder) for word in WORDS[kind][1:]]
    words += ["--preset", "tiny", "--num_images", "8", "--steps", "1", "--cache_dir", str(runs.folder / "cache")]
    module = importlib.import_module(WORDS[kind][0].removesuffix(".py"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    args = module.parse_args([*words, "--output_dir", str(tmp_path / "out")])
    assert "free some space first" in refusal(capsys, module.main, args)
    assert not list((tmp_path / "out").iterdir())


def test_a_second_run_into_the_same_folder_is_refused_until_the_first_is_dead(runs, tmp_path):
    out = tmp_path / "out"
    first = runs.start("generation", out, Fault("common.pgd", 2, "SIGSTOP"))
    while not (out / ".partial" / "run.json").exists():
        assert first[0].is_alive()
        time.sleep(0.01)
    code, _, lines = runs.run("generation", out)
    first[0].kill()
    first[0].join()
    assert code == 2 and len(lines) == 1 and "another run is writing to" in lines[0], lines
    assert runs.run("generation", out)[0] == 0
    assert_equal(contents(out), runs.undisturbed("generation"))
