"""Hostile input: a script ends in one line that says what and where, or copes; no code runs, nothing is lost."""

import fcntl
import hashlib
import importlib
import io
import json
import os
import pickle
import re
import shutil
import struct
import tracemalloc
import warnings
import zipfile
import zlib
from contextlib import suppress
from functools import cache, cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT
from PIL import EpsImagePlugin, Image
from safetensors.torch import load_file, save_file

import common

TINY = ROOT / "tests" / "tiny"
GENERATE, JPEG, EVALUATE = "generate_pgd_adversarial", "eval_jpeg", "evaluate"
MAT, PGD = "defend_clip_mat_v2", "defend_clip_pgd_v2"
TRAINING = ["--val_images", "2", "--epochs", "1", "--max_steps", "1"]
WORDS = {GENERATE: ["--split", "eval"], MAT: TRAINING, PGD: TRAINING, JPEG: ["--qualities", "50"]}
WORDS |= {EVALUATE: ["--qualities"]}  # no JPEG rows
STRANGER = "COCO_val2014_000000999999.jpg"  # an image that is in no data set
COLOUR = (204, 51, 51)  # in the web palette, too, which is Pillow's for P
CARD = "---\nconfigs:\n- config_name: MSCOCO_i2t\n  data_files:\n  - split: {}\n    path: {}\n---\n"
RECORD = {"args": {}, "inputs": {}, "started": "once", "seconds": 1}


def command(shared, script, out, *words):
    words = ["--preset", "tiny", "--device", "cpu", "--num_images", 4, "--steps", 1, *WORDS[script], *words]
    words += ["--num_workers", 2, "--cache_dir", shared / "cache", "--output_dir", out]
    return [str(word) for word in words]


def run(script, words):
    module = importlib.import_module(script)
    common.run_main(module.main, module.parse_args(words))


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A few rows of both data sets, and adversarial images of them, all of them sound."""
    root = tmp_path_factory.mktemp("hostile")
    for split, count in (("train", 8), ("eval", 5)):
        name, column, *_ = common.SPLITS[split]
        source, folder = TINY / f"MMEB-{split}", root / f"MMEB-{split}"
        (folder / "MSCOCO_i2t").mkdir(parents=True)
        (folder / "README.md").write_text(CARD.format(name, f"MSCOCO_i2t/{name}-*"))
        (file,) = (source / "MSCOCO_i2t").glob(f"{name}-*")
        rows = [row for row in pq.read_table(file).to_pylist() if split == "eval" or "train2014" in row[column]][:count]
        pq.write_table(pa.Table.from_pylist(rows), folder / "MSCOCO_i2t" / file.name)
        with zipfile.ZipFile(next(source.rglob("*.zip"))) as archive:
            found = common.match_files([row[column] for row in rows], archive.namelist())
            pack(folder / "images.zip", [(name, archive.read(name)) for name in found.values()])
        data = [f"--{split}_data", folder, "--split", split]
        run(GENERATE, command(root, GENERATE, root / f"adversarial_{split}", *data))
    return root


class Place:
    """Where one case is played, with a finished run in out: what a builder touches is copied from the shared data."""

    def __init__(self, shared, tmp, request, monkeypatch):
        self.shared, self.tmp, self.request, self.monkeypatch = shared, tmp, request, monkeypatch
        self.out, self.ran, self.overwrite = tmp / "out", tmp / "ran", True
        self.out.mkdir()
        (self.out / "keep.txt").write_text("not ours")
        (self.out / "metrics.json").write_text(json.dumps(RECORD))
        (tmp / "f").write_text("a file")

    def copy(self, name):
        return Path(shutil.copytree(self.shared / name, self.tmp / name))

    data = cached_property(lambda self: self.copy("MMEB-eval"))
    adversarial = cached_property(lambda self: self.copy("adversarial_eval"))
    zip = cached_property(lambda self: self.data / "images.zip")
    parquet = cached_property(lambda self: next(self.data.rglob("*.parquet")))

    @cached_property
    def outside(self):
        """A valid image beside the data folder, of the name STRANGER."""
        (self.tmp / "outside").mkdir()
        (self.tmp / "outside" / STRANGER).write_bytes(picture())
        return self.tmp / "outside"

    def words(self, script, extra=()):
        def there(name):
            return self.tmp / name if (self.tmp / name).exists() else self.shared / name

        words = ["--train_data", there("MMEB-train"), "--eval_data", there("MMEB-eval")]
        if script in (PGD, JPEG, EVALUATE):
            words += ["--adversarial_dir", there("adversarial_train" if script == PGD else "adversarial_eval")]
        words += ["--overwrite"] if self.overwrite else []
        return [*command(self.shared, script, self.out, *words), *map(str, extra if isinstance(extra, list) else [])]


class Case(NamedTuple):
    script: str
    name: str
    build: object  # (place) -> further words
    said: tuple = ()  # of the line with which it ends; none where it copes
    check: object = None  # (place)
    late: bool = False  # found out when the old run is gone already: there must be no new one
    parsed: bool = False  # argparse itself must turn it down


def refuses(name, build, *said, script=GENERATE, **options):
    return Case(script, name, build, said, **options)


def finished(place):
    assert json.loads((place.out / "metrics.json").read_text(), parse_constant=pytest.fail)["n"] == 4


def copes(name, build, check=finished, script=GENERATE):
    return Case(script, name, build, (), check)


def same_figures(place):
    """Only sound images and weights went in: the run, or its row other, has the figures of the sound run."""
    sound = json.loads((place.shared / "adversarial_eval" / "metrics.json").read_text())
    ours = json.loads((place.out / "metrics.json").read_text())
    ours = ours["rows"]["other"] if "rows" in ours else ours
    for key in ("clean_similarity", "adversarial_similarity"):
        assert ours.get(key, sound[key]) == pytest.approx(sound[key], abs=5e-3)


def files(folder):
    """What a folder holds, a run's own .partial aside: a link as its target, a file as its size and time."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_symlink() or (path.is_file() and ".partial" not in path.parts):
            found[path] = os.readlink(path) if path.is_symlink() else (path.stat().st_size, path.stat().st_mtime_ns)
    return found


# -- flags

BAD = {  # values that argparse itself must turn down
    (GENERATE, "--eps"): ["nan", "-8/255", "0", "8", "1e400", "1/1000", "1/0", "eight", ""],
    (GENERATE, "--alpha"): ["-2/255", "2"],
    (GENERATE, "--steps"): ["nan", "-1", "0", "1e30", "9" * 5000, 10**15],
    (GENERATE, "--batch_size"): ["0", "auto"],
    (GENERATE, "--num_images"): ["-1", "all"],
    (GENERATE, "--seed"): ["-1", 2**70],
    (GENERATE, "--num_workers"): ["0", 10**30],
    (GENERATE, "--preset"): ["huge"],
    (GENERATE, "--split"): ["test"],
    (GENERATE, "--precision"): ["fp8"],
    (GENERATE, "--step"): ["3"],  # no abbreviations
    (JPEG, "--qualities"): ["0", "96", "best"],
    (EVALUATE, "--checkpoint"): ["x", "=x", "x=", "x=no/such/file", "x=.", "x=no\nsuch"],
    (EVALUATE, "--candidates"): ["all"],
    (MAT, "--lr"): ["nan", "-1", "0", "inf"],
    (MAT, "--epochs"): ["0", 10**15],
    (MAT, "--weight_decay"): ["nan", "-1"],
    (MAT, "--loss_threshold"): ["nan", "0"],
}
UNUSABLE = {  # what is found out later; {tmp}/f is a file
    (GENERATE, "--device"): ["abacus", "cuda:99", "meta"],
    (GENERATE, "--model"): ["ViT-Z-99", "", "local-dir:{tmp}/none", "local-dir:{tmp}/f"],
    (GENERATE, "--pretrained"): ["{tmp}/none.pt", "{tmp}"],
    (GENERATE, "--output_dir"): ["{tmp}/f", "/dev/null/a", "{tmp}/" + "a" * 300, ""],
    (GENERATE, "--image_root"): ["{tmp}/none"],
    (MAT, "--train_data"): ["no folder, no id", "{tmp}/f", ""],
    (EVALUATE, "--adversarial_dir"): ["{tmp}/none", "{tmp}/f"],
    (EVALUATE, "--defence"): ["x+jpeg50", "original+blur", "original+jpeg0"],
    (EVALUATE, "--checkpoint MAT"): ["{tmp}/f"],  # the name is taken
}


def flag(*words):
    """Words in which {tmp} is the case's folder."""
    return lambda place: [str(word).format(tmp=place.tmp) for word in words]


CASES = [
    refuses(f"{name} {str(value)[:12]!r}", flag(name, value), name, script=script, parsed=True)
    for (script, name), values in BAD.items()
    for value in values
]
CASES += [
    refuses(f"{name} {value[:20]!r}", flag(*f"{name}={value}".split("=", 0) or [], f"{name}={value}"), name)
    for (script, name), values in UNUSABLE.items()
    for value in values
]
