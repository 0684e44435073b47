"""By hand, python -m pytest -m slow -n 0: ViT-L/14 through the scripts.

It has random weights: one PGD step and one training step on 2 images, for finite figures, the ball, and the time and
peak memory that the README gives. It needs 10 GB of memory and 6 GB of disk for a moment.
"""

import math
import os
import time

import pytest
import torch
from conftest import TINY, jsonl, metrics, shell

pytestmark = pytest.mark.slow

LARGE = ["--model", "ViT-L-14-quickgelu", "--pretrained", "random", "--num_images", 2, "--steps", 1]
LARGE += ["--train_data", TINY / "MMEB-train", "--eval_data", TINY / "MMEB-eval"]


@pytest.fixture
def large(tmp_path, capsys):
    """Runs a script on ViT-L/14, prints its cost, returns its metrics.json; its checkpoints are 1.7 GB each."""

    def run(script, stage, *words):
        began, used = time.perf_counter(), time.process_time()
        shell(script, *LARGE, *words, "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / stage)
        cost = f"{time.perf_counter() - began:.1f} s, {time.process_time() - used:.1f} s of CPU time"
        record = metrics(tmp_path / stage)
        with capsys.disabled():
            print(f"\n  ViT-L/14 {stage}: {cost}, peak memory {record['peak_memory_bytes'] / 1e9:.2f} GB", end="")
            print(f" on {record['device']}, {torch.get_num_threads()} of {os.cpu_count()} threads")
        return record

    yield run
    for file in tmp_path.rglob("*.pt"):
        file.unlink()


def test_vit_l_14_takes_a_pgd_step(tmp_path, large):
    record = large("generate_pgd_adversarial.py", "adversarial", "--batch_size", 1)
    assert -1 <= record["adversarial_similarity"] < record["clean_similarity"] <= 1
    assert record["attack"]["images_with_nonfinite_values"] == record["attack"]["images_with_zero_gradients"] == 0
    assert [0 < entry["linf"] <= 8 for entry in jsonl(tmp_path / "adversarial" / "metadata.jsonl")] == [True, True]


def test_vit_l_14_takes_a_training_step(tmp_path, large):
    small = ["--batch_size", 2, "--val_images", 1, "--max_steps", 1, "--epochs", 1]
    record = large("defend_clip_pgd_v2.py", "pgd", *small)
    (entry,), (epoch,) = jsonl(tmp_path / "pgd" / "log.jsonl"), record["epochs"]
    assert all(math.isfinite(value) for value in [*entry.values(), *epoch.values()])
    assert entry["grad_norm"] > 0 and (record["stopped_by"], record["steps"]) == ("max_steps", 1)
    for name in ("best.pt", "last.pt"):
        assert (tmp_path / "pgd" / name).stat().st_size > 1.6e9
