"""What the table says of whom, which captions are wrong answers, what a folder of figures keeps and whom it refuses."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import jsonl, metrics, shell

SMALL = ["--preset", "smoke", "--num_images", 8, "--steps", 1]
TRAINING = ["--batch_size", 4, "--val_images", 2]
TABLE = ["evaluate.py", "--preset", "smoke", "--num_images", 4, "--steps", 1, "--attack_steps", 1, "--qualities"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """--cache_dir of all tests here."""
    return ["--cache_dir", tmp_path_factory.mktemp("cache")]


# Trainings and the rows that they make


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache):
    """Folders of trainings: as they are for a row, or with other flags; of adversarial images; of a table."""
    folder = tmp_path_factory.mktemp("trained")
    words = [*SMALL, *TRAINING, "--max_steps", 1, "--loss", "fare", "--online_steps", 1, *cache]
    shell("defend_clip_pgd_v2.py", *words, "--output_dir", folder / "online")
    shell(*TABLE, *cache, "--trainings", "--output_dir", folder / "evaluation")
    return folder


OTHERS = {"online": "--online_steps 1, not 2", "pgd": "--loss fare, not contrastive; --online_steps 1, not 0"}
OTHERS |= {"mat": "defend_clip_pgd_v2.py, not defend_clip_mat_v2.py"}


@pytest.mark.parametrize("row", OTHERS)
def test_a_training_of_another_script_loss_or_attack_is_no_row_of_the_table(row, trained, tmp_path, cache):
    folder = shutil.copytree(trained, tmp_path / "copy")
    (folder / "online").rename(folder / row)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    _, line = shell(*TABLE, *cache, "--trainings", row, "--output_dir", folder / "evaluation", code=2)
    assert f"{folder / row} was made with {OTHERS[row]}. To make it again: " in line and line.count("\n") == 1
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    remedy = shlex.split(line.split("again: ")[1])[1:]
    shell(Path(remedy[0]).name, *remedy[1:], *SMALL[2:], *TRAINING, "--max_steps", 1)
    shell(*TABLE, *cache, "--trainings", row, "--output_dir", folder / "evaluation")
    assert len(metrics(folder / "evaluation")["rows"]) == 2


CHANGED = {"lr": 1e-9, "epochs": 1, "batch_size": 4, "weight_decay": 0.2, "loss_threshold": 0.5, "num_images": 8}


def test_a_training_with_other_rates_or_images_is_marked_and_noted_under_the_table(trained, tmp_path, cache):
    folder = shutil.copytree(trained, tmp_path / "copy")
    words = [word for flag, value in CHANGED.items() for word in (f"--{flag}", value)]
    words += ["--preset", "smoke", "--steps", 1, "--max_steps", 1, "--val_images", 2, *cache]
    shell("defend_clip_mat_v2.py", *words, "--output_dir", folder / "mat")
    printed, _ = shell(*TABLE, *cache, "--trainings", "mat", "--output_dir", folder / "evaluation")
    note = metrics(folder / "evaluation")["rows"]["MAT"]["note"]
    for flag, value in CHANGED.items():
        assert re.search(rf"--{flag} {value}, not \S+", note)
    assert "--max_steps 1, not none" in note and "--steps" not in note.replace("--max_steps", "")
    assert "\nMAT (*) " in printed and "(*) MAT: trained with --lr 1e-09, not " in printed
    assert r"MAT (\*)" in (folder / "evaluation" / "table.md").read_text()


def test_the_loss_of_an_epoch_is_the_mean_over_its_steps(tmp_path, cache):
    words = ["--epochs", 2, "--loss_window", 1, "--lr", 1e-3, "--output_dir", tmp_path / "mat"]
    printed, _ = shell("defend_clip_mat_v2.py", *SMALL, *TRAINING, *words, *cache)
    log, epochs = jsonl(tmp_path / "mat" / "log.jsonl"), metrics(tmp_path / "mat")["epochs"]
    means = [np.mean([entry["loss"] for entry in log if entry["epoch"] == epoch]) for epoch in (1, 2)]
    assert [epoch["loss"] for epoch in epochs] == pytest.approx(means) and len(log) == 4
    assert re.findall(r"loss ([\d.]+)", printed) == [f"{mean:.3f}" for mean in means]
