"""Does peak memory grow with the number of images? Generation and evaluation of 1000 against 200, tiny preset, CPU.

    python tests/bench/memory.py     # exit code 1 if a peak grows by a tenth or more, or ranking takes 1 GB or more

Each run is a process of its own, and the peak is what the system says of it. The embedded evaluation set is too small:
its place takes one of the training images, made for the purpose. Then COCO val2017 is ranked, as far as its numbers go:
5,000 images with five captions each, of random pixels.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "tests" / "tiny" / "MMEB-train"
CARD = "---\nconfigs:\n- config_name: MSCOCO_i2t\n  data_files:\n  - split: test\n    path: MSCOCO_i2t/test-*\n---\n"
LIMIT = 1.1


def make_evaluation_set(folder):
    """The training set in the evaluation set's layout, one row an image."""
    (file,) = (TRAIN / "MSCOCO_i2t").glob("original-*")
    rows = {row["qry_image_path"]: row["pos_text"] for row in pq.read_table(file).to_pylist()}
    paths, captions = [path.replace("images/MSCOCO_i2t/Train", "MSCOCO_i2t") for path in rows], list(rows.values())
    columns = {"qry_text": [""] * len(rows), "qry_img_path": paths, "tgt_img_path": [[]] * len(rows)}
    columns["tgt_text"] = [[caption, captions[i - 1]] for i, caption in enumerate(captions)]
    (folder / "MSCOCO_i2t").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    types = {"tgt_img_path": pa.list_(pa.string()), "tgt_text": pa.list_(pa.string())}
    arrays = {key: pa.array(values, types.get(key, pa.string())) for key, values in columns.items()}
    pq.write_table(pa.table(arrays), folder / "MSCOCO_i2t" / "test-00000-of-00001.parquet")
    shutil.copy(next(TRAIN.rglob("*.zip")), folder / "images.zip")


def peak(script, out, *words):
    """Peak memory of a run, bytes."""
    words = [sys.executable, ROOT / script, "--preset", "tiny", "--device", "cpu", "--output_dir", out, *words]
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(list(map(str, words)), stdout=said, stderr=said)
        _, status, usage = os.wait4(child.pid, 0)
        if status:
            said.seek(0)
            sys.exit(said.read().decode())
    return 1024 * usage.ru_maxrss


def rank(images, captions_each):
    """Rank so many images among their captions: memory beyond images and features, bytes, and seconds."""
    sys.path.insert(0, str(ROOT))
    import common
    import evaluate

    args = evaluate.parse_args(["--preset", "tiny", "--device", "cpu"])
    clip = common.load_clip(args)
    pixels = np.random.default_rng(0).integers(0, 256, (images, 3, *clip.geometry["size"]), np.uint8)
    captions = [[f"Caption {k} of image {i}." for k in range(captions_each)] for i in range(images)]
    features = clip.encode_pixels(pixels)
    clip.encode_text([caption for each in captions for caption in each])
    paths = [f"{i}.jpg" for i in range(images)]
    evaluate.encode_row = lambda *_: features[None]  # one draw
    before, clock = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    loaded = common.Images(pixels, paths, captions, captions, [None] * images, paths, paths)
    row = evaluate.Row("original", clip, pixels, pixels, *evaluate.load_candidates("evaluation", loaded))
    row = evaluate.forgive_equal_captions(row, paths)
    evaluate.score(row, pixels, 0, features[None])
    seconds = time.perf_counter() - clock
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before), seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=int, default=200, help="images (default: %(default)s)")
    parser.add_argument("--large", type=int, default=1000, help="images, at most 1800 (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="of the attacks (default: %(default)s)")
    args = parser.parse_args()
    grew = False
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_evaluation_set(folder / "MMEB-eval")
        peaks = {"generation": [], "evaluation": []}
        for count in (args.small, args.large):
            words = ["--eval_data", folder / "MMEB-eval", "--num_images", count, "--steps", args.steps]
            words += ["--cache_dir", folder / f"cache_{count}"]
            made = folder / f"adversarial_{count}"
            peaks["generation"].append(peak("generate_pgd_adversarial.py", made, "--split", "eval", *words))
            words += ["--adversarial_dir", made, "--trainings", "--qualities", 50, "--attack_steps", args.steps]
            peaks["evaluation"].append(peak("evaluate.py", folder / f"evaluation_{count}", *words))
    for name, (small, large) in peaks.items():
        said = f"{args.small} images {small / 1e6:.0f} MB, {args.large} images {large / 1e6:.0f} MB"
        print(f"{name}: {said}, ratio {large / small:.3f} (under {LIMIT})")
        grew |= large / small >= LIMIT
    memory, seconds = rank(5000, 5)  # last: a child's peak is at least its parent's memory
    print(f"5,000 images by 25,000 captions: {memory / 1e9:.2f} GB beyond the images (under 1), {seconds:.1f} s")
    return grew or memory >= 1e9


if __name__ == "__main__":
    sys.exit(main())
