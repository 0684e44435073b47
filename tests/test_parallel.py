"""The scripts under torchrun, two processes on the CPU, beside one process."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import open_clip
import pytest
from conftest import ROOT, TINY, jsonl, metrics, refusal, shell
from safetensors.torch import load_file

import common

TRAIN, EVAL = 21, 5  # a last batch that is smaller, and images that two processes cannot share evenly
SMALL = ["--preset", "smoke", "--steps", 2, "--batch_size", 2]
EVALUATED = [*SMALL, "--num_images", EVAL, "--qualities", 50]
TRAINING = [*SMALL, "--num_images", TRAIN, "--val_images", 3, "--epochs", 1, "--batch_size", 8]
COMMANDS = {  # in their order, by their folder
    "adversarial_train": ["generate_pgd_adversarial.py", *SMALL, "--num_images", TRAIN],
    "adversarial_eval": ["generate_pgd_adversarial.py", *SMALL, "--split", "eval", "--num_images", EVAL],
    "mat": ["defend_clip_mat_v2.py", *TRAINING],
    "pgd": ["defend_clip_pgd_v2.py", *TRAINING],
    "online": ["defend_clip_pgd_v2.py", *TRAINING, "--online_steps", 1],
    "jpeg": ["eval_jpeg.py", *EVALUATED],
    "evaluation": ["evaluate.py", *EVALUATED, "--attack_steps", 3],
}
TRAININGS = ["mat", "pgd", "online"]
DRIVER = """
import json, runpy, sys
from matplotlib.figure import Figure
import common
Figure.savefig = Figure.tight_layout = lambda *_, **__: None  # which takes longer than the attacks
RANK_1_FAILS = {fails}
if RANK_1_FAILS and common.RANK:
    def keep(*_):
        raise OSError(28, "No space left on device")
    common.Run.save_part = keep
with common.process_group():
    for sys.argv in json.loads(sys.argv[1]):
        runpy.run_path(sys.argv[0], run_name="__main__")
"""


def commands(folder):
    """All of them into one folder."""
    for stage, words in COMMANDS.items():
        yield [*words, "--output_dir", folder / stage, "--cache_dir", folder / "cache"]


def launch(folder, *commands, fails=False):
    """Run commands under torchrun, one after the other in the same two processes: stdout, stderr of each."""
    driver, log = folder / "driver.py", folder / "log"
    driver.write_text(DRIVER.format(fails=fails))
    words = json.dumps([[f"{ROOT}/{word}" if not i else str(word) for i, word in enumerate(c)] for c in commands])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    torchrun += ["--log-dir", log, "--redirects", "3", driver, words]
    done = subprocess.run(list(map(str, torchrun)), capture_output=True, text=True, timeout=200)
    said = [[next(log.rglob(f"{rank}/std{n}.log")).read_text() for n in ("out", "err")] for rank in (0, 1)]
    assert (done.returncode != 0) == fails, done.stderr + str(said)
    return said


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Every script by two processes; (folder, what each process printed)."""
    folder = tmp_path_factory.mktemp("two")
    return folder, launch(folder, *commands(folder))


@pytest.fixture(scope="module")
def failing(two, tmp_path_factory):
    """A run whose second process fails, beside the runs of one process; (folder, future of what each printed)."""
    folder = tmp_path_factory.mktemp("failing")
    words = [*COMMANDS["adversarial_eval"], "--output_dir", folder / "out", "--cache_dir", two[0] / "cache"]
    with ThreadPoolExecutor(1) as pool:
        yield folder, pool.submit(launch, folder, words, fails=True)


@pytest.fixture(scope="module")
def one(two, failing, tmp_path_factory):
    """The same by one process; evaluated are the trainings of two."""
    folder = tmp_path_factory.mktemp("one")
    for words in commands(folder):
        if words[0] == "evaluate.py":
            for stage in TRAININGS:
                (folder / stage).rename(folder / f"{stage}_of_one")
                (folder / stage).symlink_to(two[0] / stage)
        shell(*words)
    return folder


def test_two_processes_make_the_same_adversarial_images_in_the_same_order(one, two):
    for stage in ("adversarial_train", "adversarial_eval"):
        files = {path.relative_to(one / stage) for path in (one / stage).rglob("*.*")}
        assert files == {path.relative_to(two[0] / stage) for path in (two[0] / stage).rglob("*.*")}
        for file in files - {(one / stage / "metrics.json").relative_to(one / stage)}:
            assert (one / stage / file).read_bytes() == (two[0] / stage / file).read_bytes(), file
        records = metrics(one / stage), metrics(two[0] / stage)
        assert [record["processes"] for record in records] == [1, 2]
        for key in ("n", "clean_similarity", "adversarial_similarity", "attack", "share_lowered"):
            assert records[0][key] == records[1][key]


def test_two_processes_train_like_one(one, two):
    before = open_clip.create_model(f"local-dir:{TINY}/clip").visual.state_dict()
    for stage in TRAININGS:
        folders = one / f"{stage}_of_one", two[0] / stage
        logs, records = [jsonl(folder / "log.jsonl") for folder in folders], [metrics(folder) for folder in folders]
        assert [entry["step"] for entry in logs[1]] == [1, 2, 3]
        for ours, theirs in zip(*logs, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5, rel=1e-3)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)  # AdamW hides a wrong scale
        assert [record["global_batch_size"] for record in records] == [8, 8]
        for ours, theirs in zip(records[0]["epochs"], records[1]["epochs"], strict=True):
            assert ours["val_white_box"] == pytest.approx(theirs["val_white_box"], abs=2e-3)
        weights = [load_file(folder / "open_clip_model.safetensors") for folder in folders]
        moved, apart = (
            sum((weights[0][f"visual.{key}"] - other(key)).square().sum() for key in before).sqrt()
            for other in (before.get, lambda key, trained=weights[1]: trained[f"visual.{key}"])
        )
        assert moved > 0.005 and apart < 0.05 * moved


def test_two_processes_print_the_same_table_and_per_image_figures(one, two):
    records = metrics(one / "evaluation"), metrics(two[0] / "evaluation")
    for key in ("rows", "per_image", "paired", "health", "coco_ids"):
        assert records[0][key] == records[1][key], key
    tables = [(folder / "evaluation" / "table.md").read_text() for folder in (one, two[0])]
    assert tables[0] == tables[1] and "features, online" in tables[0]
    records = metrics(one / "jpeg"), metrics(two[0] / "jpeg")
    for key in ("qualities", "attack"):
        assert records[0][key] == records[1][key], key


def test_only_rank_0_prints(two):
    (out, err), (silent, errors) = two[1]
    assert "white-box: momentum PGD" in out and silent == "" and "Traceback" not in err + errors


def test_a_failing_process_ends_the_other_with_one_line_and_without_a_hang(failing):
    folder, launched = failing
    (_, err), (_, line) = launched.result()  # rank 0 waits for the shares
    assert "Traceback" not in err + line and "No space left" in line and len(line.strip().splitlines()) == 1
    assert not list(folder.rglob("metrics.json"))


def test_the_other_processes_let_rank_0_speak_first(monkeypatch, capsys):
    waits = []
    monkeypatch.setattr(common, "RANK", 1)
    monkeypatch.setattr(common.time, "sleep", lambda seconds: waits.append((seconds, capsys.readouterr().err)))
    assert "is full" in refusal(capsys, common.fail, "the disk of this process is full") and waits == [(10, "")]
