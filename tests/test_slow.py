"""By hand, python -m pytest -m slow: a checkpoint in LAION's clip-benchmark, and ViT-L/14 through the scripts.

clip-benchmark 1.6.2 gets best.pt by path and a webdataset of the tiny evaluation scenes; its recalls must be those of
evaluate.py. ViT-L/14 has random weights: one PGD step and one training step on 2 images, for finite figures, the ball,
and the time and peak memory that the README gives. It needs 8 GB of memory and 6 GB of disk for a moment.
"""

import io
import json
import math
import os
import resource
import subprocess
import sys
import tarfile
import time
import zipfile

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, shell
from PIL import Image

pytestmark = pytest.mark.slow

TINY = ROOT / "tests" / "tiny"
N = 100  # evaluation scenes
BENCHMARK = """
import sys, open_clip
open_clip.add_model_config(sys.argv.pop(1))
from clip_benchmark.cli import main
main()
"""
LARGE = ["--model", "ViT-L-14-quickgelu", "--pretrained", "random", "--num_images", 2, "--steps", 1]
LARGE += ["--train_data", TINY / "MMEB-train", "--eval_data", TINY / "MMEB-eval"]


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def write_webdataset(folder):
    """The first N evaluation scenes as clip-benchmark's local retrieval data: test/0.tar of NAME.jpg and NAME.txt."""
    (folder / "test").mkdir(parents=True)
    (folder / "dataset_type.txt").write_text("retrieval")
    (folder / "test" / "nshards.txt").write_text("1")
    (file,) = (TINY / "MMEB-eval").rglob("*.parquet")
    with zipfile.ZipFile(TINY / "MMEB-eval" / "images.zip") as images, tarfile.open(folder / "test/0.tar", "w") as tar:
        for row in pq.read_table(file).slice(0, N).to_pylist():
            name = row["qry_img_path"].split("/")[-1].removesuffix(".jpg")
            for suffix, data in [("jpg", images.read(row["qry_img_path"])), ("txt", row["tgt_text"][0].encode())]:
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def test_a_checkpoint_gives_the_same_recalls_in_clip_benchmark(tmp_path):
    pytest.importorskip("clip_benchmark")
    small = ["--preset", "tiny", "--steps", 1, "--cache_dir", tmp_path / "cache"]
    training = ["--num_images", 16, "--val_images", 4, "--max_steps", 1]
    shell("defend_clip_mat_v2.py", *small, *training, "--output_dir", tmp_path / "mat")
    checkpoint = tmp_path / "mat" / "best.pt"
    config = json.loads((TINY / "clip" / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "tiny-clip.json").write_text(json.dumps(config))
    write_webdataset(tmp_path / "scenes")
    command = [sys.executable, "-c", BENCHMARK, tmp_path / "tiny-clip.json", "eval", "--dataset", "wds/scenes"]
    command += ["--dataset_root", tmp_path / "scenes", "--task", "zeroshot_retrieval", "--recall_k", 1, 5, "--no_amp"]
    command += ["--model", "tiny-clip", "--pretrained", checkpoint, "--num_workers", 0]
    command += ["--output", tmp_path / "result.json"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    recalls = json.loads((tmp_path / "result.json").read_text())["metrics"]

    shell("evaluate.py", *small, "--num_images", N, "--qualities", "--output_dir", tmp_path / "evaluation")
    ours = metrics(tmp_path / "evaluation")["rows"]["MAT"]  # mat/best.pt
    for theirs, direction in {"text_retrieval_recall": "i2t", "image_retrieval_recall": "t2i"}.items():
        for k in (1, 5):
            value = recalls[f"{theirs}@{k}"]
            assert math.isfinite(value) and value > 0.8  # chance is k / N, at most 0.05
            assert value == pytest.approx(ours[f"clean_recall_{direction}@{k}"], abs=1e-6)


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
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
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
