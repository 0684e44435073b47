"""What the table says of whom, which captions are wrong answers, what a folder of figures keeps and whom it refuses."""

import re

import numpy as np
import pytest
from conftest import jsonl, metrics, shell

SMALL = ["--preset", "smoke", "--num_images", 8, "--steps", 1]
TRAINING = ["--batch_size", 4, "--val_images", 2]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """--cache_dir of all tests here."""
    return ["--cache_dir", tmp_path_factory.mktemp("cache")]


def test_the_loss_of_an_epoch_is_the_mean_over_its_steps(tmp_path, cache):
    words = ["--epochs", 2, "--loss_window", 1, "--lr", 1e-3, "--output_dir", tmp_path / "mat"]
    printed, _ = shell("defend_clip_mat_v2.py", *SMALL, *TRAINING, *words, *cache)
    log, epochs = jsonl(tmp_path / "mat" / "log.jsonl"), metrics(tmp_path / "mat")["epochs"]
    means = [np.mean([entry["loss"] for entry in log if entry["epoch"] == epoch]) for epoch in (1, 2)]
    assert [epoch["loss"] for epoch in epochs] == pytest.approx(means) and len(log) == 4
    assert re.findall(r"loss ([\d.]+)", printed) == [f"{mean:.3f}" for mean in means]
