"""By hand, python -m pytest -m slow -n 0: ViT-L/14 through the scripts.

It has random weights: one PGD step and one training step on 2 images, for finite figures, the ball, and the time and
peak memory that the README gives. It needs 10 GB of memory and 6 GB of disk for a moment.
"""

import json
import math
import os
import resource
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, shell
from PIL import Image

pytestmark = pytest.mark.slow

TINY = ROOT / "tests" / "tiny"
LARGE = ["--model", "ViT-L-14-quickgelu", "--pretrained", "random", "--num_images", 2, "--steps", 1]
LARGE += ["--train_data", TINY / "MMEB-train", "--eval_data", TINY / "MMEB-eval"]


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture
def folder(tmp_path):
    """tmp_path, without its checkpoints of 1.7 GB each afterwards."""
    yield tmp_path
    for file in tmp_path.rglob("*.pt"):
        file.unlink()


@pytest.fixture
def large(folder, capsys):
    """Runs a script on ViT-L/14, prints its cost, returns its metrics.json."""

    def run(script, stage, *words):
        began, used = time.perf_counter(), cpu_seconds()
        shell(script, *LARGE, *words, "--cache_dir", folder / "cache", "--output_dir", folder / stage)
        cost = f"{time.perf_counter() - began:.1f} s, {cpu_seconds() - used:.1f} s of CPU time"
        for name in dict.fromkeys(["adversarial_train", stage]):
            if (folder / name).exists():
                show(name, metrics(folder / name))
        with capsys.disabled():
            print(f"  the whole command {cost}, {torch.get_num_threads()} of {os.cpu_count()} threads")
        return metrics(folder / stage)

    def cpu_seconds():
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime

    def show(name, record):
        cost = f"{record['seconds']:.1f} s, peak memory {record['peak_memory_bytes'] / 1e9:.2f} GB"
        with capsys.disabled():
            print(f"\n  ViT-L/14 {name}: {cost} on {record['device']}", end="")
            print(f", training {record['training_seconds']:.1f} s" if "training_seconds" in record else "")

    return run


def assert_in_the_ball(folder, cache):
    """The saved images against the clean ones, here and as the script measured them."""
    record, lines = metrics(folder), (folder / "metadata.jsonl").read_text().splitlines()
    (clean,) = [np.load(file) for file in cache.glob("*.npy") if len(np.load(file, mmap_mode="r")) == 2]
    assert clean.shape == (2, 3, 224, 224) and record["n"] == len(lines) == 2
    for pixels, entry in zip(clean, map(json.loads, lines)):
        with Image.open(folder / entry["file_name"]) as image:
            delta = np.abs(np.asarray(image).transpose(2, 0, 1).astype(int) - pixels)
        assert 0 < delta.max() == entry["linf"] <= 8
        assert math.isfinite(entry["clean_similarity"]) and math.isfinite(entry["adversarial_similarity"])
    assert 0 < record["attack"]["max_abs_delta_grey_levels"] <= 8
    assert record["attack"]["images_with_nonfinite_values"] == record["attack"]["images_with_zero_gradients"] == 0
    assert all(math.isfinite(record[f"{kind}_similarity"]) for kind in ("clean", "adversarial"))


def test_vit_l_14_takes_a_pgd_step(folder, large):
    record = large("generate_pgd_adversarial.py", "adversarial", "--batch_size", 1)
    assert_in_the_ball(folder / "adversarial", folder / "cache")
    assert record["adversarial_similarity"] < record["clean_similarity"]


def test_vit_l_14_takes_a_training_step(folder, large):
    small = ["--batch_size", 2, "--val_images", 1, "--max_steps", 1, "--epochs", 1]
    record = large("defend_clip_pgd_v2.py", "pgd", *small)
    assert_in_the_ball(folder / "adversarial_train", folder / "cache")
    (entry,) = [json.loads(line) for line in (folder / "pgd" / "log.jsonl").read_text().splitlines()]
    (epoch,) = record["epochs"]
    assert all(math.isfinite(value) for value in [*entry.values(), *epoch.values()])
    assert entry["grad_norm"] > 0 and (record["stopped_by"], record["steps"]) == ("max_steps", 1)
    for name in ("best.pt", "last.pt"):
        assert (folder / "pgd" / name).stat().st_size > 1.6e9
