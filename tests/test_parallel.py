"""Two processes on the CPU beside one: forked from this one, which saves the imports, and once under torchrun."""

import os
import signal
import socket
from contextlib import contextmanager, nullcontext
from functools import partial

import open_clip
import pytest
import torch.distributed.run
from conftest import ROOT, TINY, assert_equal, fork, join, jsonl, lines_of, metrics, pictures, refusal, shell
from safetensors.torch import load_file
from test_resume import PGD, STEP, Fault, met

import common
import defend_clip_mat_v2 as mat
import evaluate

TRAIN, EVAL = 9, 5  # two whole batches of a training, and images that two processes cannot share evenly
SMALL = ["--preset", "smoke", "--steps", 1, "--batch_size", 2]
TRAINING = [*SMALL, "--train_data", "pictures", "--num_images", TRAIN, "--val_images", 2, "--epochs", 1]
TRAINING += ["--batch_size", 4, "--save_every", 0, "--output_dir"]
GENERATE = ["generate_pgd_adversarial.py", *SMALL, "--split", "eval", "--num_images", EVAL, "--output_dir"]
TRAININGS = ["mat", "pgd", "online"]


def commands(folder):
    """Every script into one folder."""
    table = ["evaluate.py", *SMALL, "--num_images", EVAL, "--attack_steps", 1, "--trainings", "--qualities"]
    return [
        [*GENERATE, folder / "adversarial_eval"],
        ["defend_clip_mat_v2.py", *TRAINING, folder / "mat"],
        ["defend_clip_pgd_v2.py", *TRAINING, folder / "pgd"],
        ["defend_clip_pgd_v2.py", *TRAINING, folder / "online", "--online_steps", 1],
        [*table, "--output_dir", folder / "evaluation"],
    ]


@contextmanager
def rank(number, port, fault):
    """Be one of two processes, which a fault meets."""
    os.environ |= {"RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    common.RANK, common.PROCESSES = number, 2
    with met(fault) if fault else nullcontext(), common.process_group():
        yield


def start(log, *commands, faults=(None, None)):
    """Start two processes that run commands, one after the other: their ids."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [fork(f"{log}{n}", *commands, prepare=partial(rank, n, port, faults[n])) for n in (0, 1)]


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    """The current folder, with pictures."""
    folder = tmp_path_factory.mktemp("parallel")
    pictures(folder / "pictures", TRAIN + 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def one(here):
    """Every script by one process; the folder."""
    for words in commands(here / "one"):
        shell(*words)
    return here / "one"


@pytest.fixture(scope="module")
def two(here, one):
    """The same by two processes; (folder, what each process printed)."""
    children = start(here / "log", *commands(here / "two"))
    ends = [join(child, here / f"log{n}") for n, child in enumerate(children)]
    assert [end[0] for end in ends] == [0, 0], ends
    return here / "two", ends


def test_two_processes_make_the_same_images_and_table_and_one_prints(one, two):
    folder, ((_, out, err), (_, silent, errors)) = two
    for stage in ("adversarial_eval", "evaluation"):
        assert_equal(one / stage, folder / stage)
        assert [metrics(each / stage)["processes"] for each in (one, folder)] == [1, 2]
    assert "white-box: momentum PGD" in out and silent == "" and err == errors == []


def assert_trained_alike(ours, theirs):
    """Two trainings ended in about the same weights."""
    before = open_clip.create_model(f"local-dir:{TINY}/clip").visual.state_dict()
    weights = [load_file(folder / "open_clip_model.safetensors") for folder in (ours, theirs)]
    moved, apart = (
        sum((weights[0][f"visual.{key}"] - other(key)).square().sum() for key in before).sqrt()
        for other in (before.get, lambda key: weights[1][f"visual.{key}"])
    )
    assert moved > 0.005 and apart < 0.05 * moved


@pytest.mark.parametrize("stage", TRAININGS)
def test_two_processes_train_like_one(stage, one, two):
    folders = one / stage, two[0] / stage
    logs, records = [jsonl(folder / "log.jsonl") for folder in folders], [metrics(folder) for folder in folders]
    assert [entry["step"] for entry in logs[1]] == [1, 2]
    for ours, theirs in zip(*logs, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5, rel=1e-3)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)  # AdamW hides a wrong scale
    for ours, theirs in zip(records[0]["epochs"], records[1]["epochs"], strict=True):
        assert ours["val_white_box"] == pytest.approx(theirs["val_white_box"], abs=2e-3)
    assert_trained_alike(*folders)


def test_an_unfinished_run_goes_on_with_another_number_of_processes(one, tmp_path):
    training = ["defend_clip_mat_v2.py", *TRAINING, tmp_path / "mat"]
    for command, at in (([*GENERATE, tmp_path / "adversarial_eval"], PGD), (training, STEP)):
        children = start(tmp_path / "log", command, faults=(Fault(at, 2, "SIGKILL"), None))
        assert join(children[0], tmp_path / "log0")[0] == -signal.SIGKILL
        os.kill(children[1], signal.SIGKILL)  # as torchrun does
        os.waitpid(children[1], 0)
        assert "is resumed" in shell(*command)[0]
    assert_equal(tmp_path / "adversarial_eval", one / "adversarial_eval")
    assert_trained_alike(tmp_path / "mat", one / "mat")


def test_batches_that_the_processes_cannot_share_are_refused_before_anything_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "PROCESSES", 2)
    assert "--batch_size 3 is no multiple of the 2 processes" in refusal(capsys, mat.parse_args, ["--batch_size", "3"])
    monkeypatch.setattr(common, "PROCESSES", 3)
    args = evaluate.parse_args(["--preset", "smoke", "--reproduce", "--output_dir", str(tmp_path / "evaluation")])
    assert "--batch_size 16 is no multiple of the 3 processes" in refusal(capsys, evaluate.main, args)
    assert not list(tmp_path.iterdir())


DRIVER = """
import runpy, signal, sys, time

signal.signal(signal.SIGTERM, signal.SIG_DFL)  # this process is a fork; be a fresh one
for name in ("common", "generate_pgd_adversarial"):
    del sys.modules[name]
import common

def full(*_):
    time.sleep = lambda _: None  # of rank 1, which lets the other speak first
    raise OSError(28, "No space left on device")

_, script, words, *folders = sys.argv
with common.process_group():
    for folder in folders:
        sys.argv = [script, *eval(words), folder]
        runpy.run_path(script, run_name="__main__")
        if common.RANK:
            common.Run.save_part = full
"""


def test_under_torchrun_a_failing_process_ends_the_other_with_one_line_and_without_a_hang(one, tmp_path):
    driver, log = tmp_path / "driver.py", tmp_path / "log"
    driver.write_text(DRIVER)
    torchrun = ["--standalone", "--nproc_per_node=2", "--log-dir", log, "--redirects", "3", "--start-method", "fork"]
    torchrun += ["--run-path", driver, ROOT / GENERATE[0], [str(word) for word in GENERATE[1:]]]  # the driver's own
    torchrun += [tmp_path / "whole", tmp_path / "failing"]
    run = partial(torch.distributed.run.main, list(map(str, torchrun)))
    code, _, lines = join(fork(tmp_path / "torchrun", prepare=run), tmp_path / "torchrun")
    said = [[next(log.rglob(f"{n}/std{kind}.log")).read_text() for kind in ("out", "err")] for n in (0, 1)]
    assert code == 1 and any("process 1 terminated with exit code 2" in line for line in lines), (lines, said)
    (out, err), (silent, line) = said  # rank 0 waits for the shares
    assert "5 images" in out and silent == err == ""
    assert len(lines_of(line)) == 1 and "No space left" in line
    assert_equal(tmp_path / "whole", one / "adversarial_eval")
    assert (tmp_path / "failing" / "run.json").exists() and not (tmp_path / "failing" / "metrics.json").exists()


def test_the_other_processes_let_rank_0_speak_first(monkeypatch, capsys):
    waits = []
    monkeypatch.setattr(common, "RANK", 1)
    monkeypatch.setattr(common.time, "sleep", lambda seconds: waits.append((seconds, capsys.readouterr().err)))
    assert "is full" in refusal(capsys, common.fail, "the disk of this process is full") and waits == [(10, "")]
