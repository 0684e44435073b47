"""Hostile input: a script ends in one line that says what and where, or copes; no code runs, nothing is lost."""

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
from functools import cache, cached_property, partial
from itertools import dropwhile
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
GENERATE, MAT, PGD, JPEG, EVALUATE = (
    "generate_pgd_adversarial", "defend_clip_mat_v2", "defend_clip_pgd_v2", "eval_jpeg", "evaluate"
)  # fmt: skip
TRAINING = ["--val_images", "2", "--epochs", "1", "--max_steps", "1"]
WORDS = {GENERATE: ["--split", "eval"], MAT: TRAINING, PGD: TRAINING, JPEG: ["--qualities", "50"]}
WORDS |= {EVALUATE: ["--qualities"]}  # no JPEG rows
SPLITS = {"train": ("original", "qry_image_path", 8), "eval": ("test", "qry_img_path", 5)}
STRANGER = "COCO_val2014_000000999999.jpg"  # an image that is in no data set
COLOUR = (204, 51, 51)  # in the web palette, too, which is Pillow's for P
CARD = "---\nconfigs:\n- config_name: MSCOCO_i2t\n  data_files:\n  - split: {}\n    path: {}\n---\n"


def command(shared, script, out, *words):
    words = ["--preset", "tiny", "--device", "cpu", "--num_images", 4, "--steps", 1, *WORDS[script], *words]
    words += ["--num_workers", 2, "--cache_dir", shared / "cache", "--output_dir", out]
    return [str(word) for word in words]


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A few rows of both data sets, and adversarial images of them, all of them sound."""
    root = tmp_path_factory.mktemp("hostile")
    for split, (name, column, count) in SPLITS.items():
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


def run(script, words):
    module = importlib.import_module(script)
    common.run_main(module.main, module.parse_args(words))


class Place:
    """Where one case is played: what a builder touches is first copied from the shared data."""

    def __init__(self, shared, tmp, request, monkeypatch):
        self.shared, self.tmp, self.request, self.monkeypatch = shared, tmp, request, monkeypatch
        self.out, self.ran, self.overwrite = tmp / "out", tmp / "ran", True
        self.out.mkdir()
        (self.out / "keep.txt").write_text("not ours")
        (self.out / "metrics.json").write_text('{"args": {}, "inputs": {}, "started": "once", "seconds": 1}')

    def copy(self, name):
        if not (self.tmp / name).exists():
            shutil.copytree(self.shared / name, self.tmp / name)
        return self.tmp / name

    data = cached_property(lambda self: self.copy("MMEB-eval"))
    zip = cached_property(lambda self: self.data / "images.zip")

    @cached_property
    def members(self):
        with zipfile.ZipFile(self.zip) as archive:
            return {name: archive.read(name) for name in archive.namelist()}

    @property
    def first(self):
        """Member name of the first image."""
        return next(iter(self.members))

    @cached_property
    def outside(self):
        """A valid image beside the data folder, of the name STRANGER."""
        (self.tmp / "outside").mkdir()
        (self.tmp / "outside" / STRANGER).write_bytes(picture())
        return self.tmp / "outside"

    def words(self, script, extra):
        def there(name):
            return self.tmp / name if (self.tmp / name).exists() else self.shared / name

        words = ["--train_data", there("MMEB-train"), "--eval_data", there("MMEB-eval")]
        if script in (PGD, JPEG, EVALUATE):
            words += ["--adversarial_dir", there("adversarial_train" if script == PGD else "adversarial_eval")]
        words += ["--overwrite"] if self.overwrite else []
        return [*command(self.shared, script, self.out, *words), *map(str, extra if isinstance(extra, list) else [])]


class Case(NamedTuple):
    name: str
    script: str
    build: object  # (place) -> further words
    said: tuple = ()  # of the line with which it ends; none where it copes
    check: object = None  # (place)
    late: bool = False  # found out when the old run is gone already: there must be no new one


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
    (GENERATE, "--alpha"): ["nan", "-2/255", "0", "2", "1e400", "two"],
    (GENERATE, "--steps"): ["nan", "-1", "0", "1e30", "9" * 5000, 10**15, "many"],
    (GENERATE, "--batch_size"): ["nan", "-1", "0", "1e30", "all"],
    (GENERATE, "--num_images"): ["nan", "-1", "0", "1e30", "all"],
    (GENERATE, "--seed"): ["nan", "-1", 2**70, "x"],
    (GENERATE, "--num_workers"): ["nan", "-1", "0", "1e30", "x"],
    (JPEG, "--qualities"): ["nan", "-1", "0", "96", "1e30", "best", "random"],
    (EVALUATE, "--qualities"): ["nan", "-1", "0", "96", "best"],
    (EVALUATE, "--checkpoint"): ["x", "=x", "x=", "x=no/such/file", "x=.", "x=no\nsuch"],
    (MAT, "--lr"): ["nan", "-1", "0", "inf", "1e400", "1e30", "fast"],
    (MAT, "--epochs"): ["nan", "-1", "0", "1e30", 10**15, "x"],
    (MAT, "--weight_decay"): ["nan", "-1", "inf", "1e300", "x"],
    (MAT, "--loss_threshold"): ["nan", "-1", "0", "inf", "x"],
    (MAT, "--val_images"): ["nan", "-1", "0", "1e30", "x"],
}


def flag(*words):
    """Words in which {tmp} is the case's folder and {out} the output folder."""
    return lambda place: [str(word).format(tmp=place.tmp, out=place.out) for word in words]


def needs(name, *words):
    """The same, with a file of that name in the case's folder."""
    return lambda place: (place.tmp / name).write_text("a file") and flag(*words)(place)


def finished(place):
    record = json.loads((place.out / "metrics.json").read_text())
    assert record["n"] == 4


DIVERGE = ["--lr", "1", "--weight_decay", "100", "--max_steps", "60", "--epochs", "60"]
FLAG_CASES = [
    Case("device unknown", GENERATE, flag("--device", "abacus"), ("--device abacus",)),
    Case("device not there", GENERATE, flag("--device", "cuda:99"), ("--device cuda:99",)),
    Case("device without numbers", GENERATE, flag("--device", "meta"), ("--device meta",)),
    Case("device empty", GENERATE, flag("--device", ""), ("--device",)),
    Case("model unknown", GENERATE, flag("--model", "ViT-Z-99", "--pretrained", "random"), ("--model ViT-Z-99",)),
    Case("model empty", GENERATE, flag("--model", ""), ("--model",)),
    Case("model folder missing", GENERATE, flag("--model", "local-dir:{tmp}/none"), ("--model local-dir:", "none")),
    Case("model folder a file", GENERATE, needs("f", "--model", "local-dir:{tmp}/f"), ("--model local-dir:",)),
    Case("pretrained missing", GENERATE, flag("--pretrained", "{tmp}/none.pt"), ("--pretrained", "none.pt")),
    Case("pretrained a folder", GENERATE, flag("--pretrained", "{tmp}"), ("--pretrained",)),
    Case("output_dir a file", GENERATE, needs("f", "--output_dir", "{tmp}/f"), ("--output_dir",)),
    Case("output_dir in a file", GENERATE, needs("f", "--output_dir", "{tmp}/f/a/b"), ("--output_dir",)),
    Case("output_dir not writable", GENERATE, flag("--output_dir", "/dev/null/a"), ("--output_dir",)),
    Case("output_dir too long", GENERATE, flag("--output_dir", "{tmp}/" + "a" * 300), ("--output_dir",)),
    Case("output_dir empty", GENERATE, flag("--output_dir", ""), ("--output_dir",)),
    Case("output_dir not UTF-8", GENERATE, flag("--output_dir", "{tmp}/\udcff"), ("\\udcff",)),
    Case("image_root missing", GENERATE, flag("--image_root", "{tmp}/none"), ("--image_root", "none")),
    Case("image_root a file", GENERATE, needs("f", "--image_root", "{tmp}/f"), ("--image_root",)),
    Case("cache_dir a file", GENERATE, needs("f", "--cache_dir", "{tmp}/f"), ("{tmp}/f",)),
    Case("train_data nothing", MAT, flag("--train_data", "no folder, no id"), ("--train_data no folder",)),
    Case("train_data missing", MAT, flag("--train_data", "{tmp}/none"), ("--train_data",)),
    Case("train_data a file", MAT, needs("f", "--train_data", "{tmp}/f"), ("--train_data",)),
    Case("train_data empty", MAT, flag("--train_data", ""), ("--train_data",)),
    Case("num_images huge", GENERATE, flag("--num_images", 10**30), ("5 distinct images",)),
    Case("val_images huge", MAT, flag("--val_images", 10**30), ("8 distinct train2014 images",)),
    Case("training diverges", MAT, flag(*DIVERGE), ("step 3 is not finite", "COCO_train2014_", "last.pt"), late=True),
    Case("batch_size huge", GENERATE, flag("--batch_size", 10**30), check=finished),
    Case("num_workers huge", GENERATE, flag("--num_workers", 10**30), check=finished),
    Case("seed largest", GENERATE, flag("--seed", 2**31), check=finished),
]

# -- checkpoints


def tiny_state(dtype=torch.float16, visual=False):
    state = load_file(TINY / "clip" / "open_clip_model.safetensors")
    state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    return {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")} if visual else state


def weights(change=None, **entries):
    """A checkpoint file of the tiny CLIP after change(state dict), with further entries."""

    def write(file):
        state = tiny_state()
        torch.save({"state_dict": state if change is None else change(state)} | entries, file)

    return write


def content(value):
    return lambda file: file.write_bytes(value) if isinstance(value, bytes) else torch.save(value, file)


def half(write):
    """Only the first half of the file that write writes."""
    return lambda file: (write(file), os.truncate(file, file.stat().st_size // 2))


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


def code_in(file, save=torch.save):
    payload = {"state_dict": {"visual.proj": Payload(file.parent / "ran")}}
    save(payload, file)


def pickled(value, file):
    file.write_bytes(pickle.dumps(value))


def changed(key, change):
    return lambda state: state | {key: change(state[key])}


def as_safetensors(file):
    save_file({key: value.contiguous() for key, value in tiny_state().items()}, file)


NONE = "is no checkpoint"
FILES = {  # name of the file -> (how it is written, what is said)
    "code.pt": (code_in, "holds code"),
    "old_code.pt": (partial(code_in, save=pickled), "holds code"),
    "code.safetensors": (partial(code_in, save=pickled), NONE),
    "cut.pt": (half(weights()), NONE),
    "cut.safetensors": (half(as_safetensors), NONE),
    "zero.pt": (content(b""), NONE),
    "zero.safetensors": (content(b""), NONE),
    "text.pt": (content(b"<html>404</html>\n"), NONE),
    "long_header.safetensors": (content(struct.pack("<Q", 2**60) + b"{}"), NONE),
    "no_tensors.pt": (content({"state_dict": {"visual.proj": "text", "logit_scale": 3}}), NONE),
    "list.pt": (content([1, 2]), NONE),
    "empty.pt": (content({}), NONE),
    "narrow.pt": (weights(changed("visual.proj", lambda value: value[:, :64])), NONE),
    "foreign.pt": (weights(lambda state: {"fc.weight": torch.zeros(2, 2)}), NONE),
    "bad_ids.pt": (weights(train_ids=["x"]), NONE),
    "no_quick_gelu.pt": (weights(quick_gelu=False), "QuickGELU"),
    "nan.pt": (weights(changed("visual.proj", lambda value: value * torch.nan)), "finite"),
    "inf.pt": (weights(changed("visual.conv1.weight", lambda value: value + torch.inf)), "finite"),
    "text_nan.pt": (weights(changed("token_embedding.weight", lambda value: value * torch.nan)), "finite"),
}


ROWS = ["code.pt", "cut.pt", "cut.safetensors", "zero.pt", "text.pt", "no_tensors.pt", "narrow.pt", "foreign.pt"]
ROWS += ["no_quick_gelu.pt", "nan.pt"]  # those that evaluate.py is given as a row, too


def file_case(script, name, write, said=(), check=None, late=False):
    def build(place):
        file = place.tmp / name
        write(file)
        place.request.addfinalizer(file.unlink)  # megabytes each
        return ["--checkpoint", f"other={file}"] if script == EVALUATE else ["--pretrained", file]

    return Case(f"checkpoint {name}", script, build, said, check, late)


def local_model(config="open_clip_config.json", change=None, code=False):
    """--model local-dir: with a changed configuration, or with weights that are a pickle with code."""

    def build(place):
        folder = place.tmp / "clip"
        shutil.copytree(TINY / "clip", folder)
        if change:
            (folder / config).write_text(change((folder / config).read_text()))
        if code:
            (folder / "open_clip_model.safetensors").unlink()
            code_in(place.tmp / "code")
            (place.tmp / "code").rename(folder / "open_clip_pytorch_model.bin")
        return ["--model", f"local-dir:{folder}"]

    return build


def same_as_the_original(place):
    """The other row, or the other weights, are the same CLIP."""
    record = json.loads((place.out / "metrics.json").read_text())
    sound = json.loads((place.shared / "adversarial_eval" / "metrics.json").read_text())
    ours = record["rows"]["other"] if "rows" in record else record
    assert ours["clean_similarity"] == pytest.approx(sound["clean_similarity"], abs=5e-3)


def overflow(state):
    return {key: value.float() * 1e30 if "visual" in key else value for key, value in state.items()}


CHECKPOINT_CASES = [file_case(GENERATE, name, write, (name, said)) for name, (write, said) in FILES.items()]
CHECKPOINT_CASES += [file_case(EVALUATE, f"other_{name}", FILES[name][0], ("other", FILES[name][1])) for name in ROWS]
CHECKPOINT_CASES += [
    file_case(GENERATE, "fp16.pt", weights(), check=same_as_the_original),
    file_case(GENERATE, "fp16.safetensors", as_safetensors, check=same_as_the_original),
    file_case(GENERATE, "fp64.pt", content(tiny_state(torch.float64)), check=same_as_the_original),
    file_case(EVALUATE, "fp16_tower.pt", content(tiny_state(visual=True)), check=same_as_the_original),
    file_case(GENERATE, "tower.pt", content(tiny_state(visual=True)), ("tower.pt", "visual tower alone")),
    file_case(GENERATE, "overflow.pt", weights(overflow), ("finite",), late=True),
    Case("model folder with code", GENERATE, local_model(code=True), ("local-dir:",)),
    Case("model folder, config cut", GENERATE, local_model(change=lambda text: text[:200]), ("local-dir:",)),
    Case("model folder, config a list", GENERATE, local_model(change=lambda text: "[]"), ("local-dir:",)),
    Case(
        "model folder, no towers", GENERATE,
        local_model(change=lambda text: re.sub(r'"(vision|text)_cfg"', r'"no_\1"', text)), ("local-dir:",),
    ),
    Case(
        "model folder, size 0", GENERATE, local_model(change=lambda text: text.replace(": 64,\n", ": 0,\n", 1)),
        ("local-dir:",),
    ),
]  # fmt: skip

# -- rows and zips


def pack(file, members):
    """Write (name, bytes) pairs as a zip."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name that comes twice
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in members:
                archive.writestr(name, data)


def repack(change):
    """The zip after change({name: bytes}) -> pairs, or the same dict changed in place."""

    def build(place):
        place.outside  # noqa: B018
        members = dict(place.members)
        changed = change(members, place.first)
        pack(place.zip, changed if isinstance(changed, list) else members.items())

    return build


def edit(change, column="qry_img_path"):
    """The parquet with the first value of a column changed: change(value) or a constant."""

    def build(place):
        (file,) = place.data.rglob("*.parquet")
        columns = pq.read_table(file).to_pydict()
        columns[column][0] = change(columns[column][0]) if callable(change) else change
        pq.write_table(pa.table(columns), file)

    return build


def column(change, name="qry_img_path"):
    """The parquet with a whole column replaced by change([values])."""

    def build(place):
        (file,) = place.data.rglob("*.parquet")
        table = pq.read_table(file)
        at = table.column_names.index(name)
        pq.write_table(table.set_column(at, name, change(table[name].to_pylist())), file)

    return build


def not_utf8(values):
    return pa.array([value.encode() + b"\xff\xed\xa0\x80" for value in values], pa.binary()).view(pa.string())


def same_id(place):
    """The first two rows name one image, with and without the zeros."""
    second = pq.read_table(next(place.data.rglob("*.parquet")))["qry_img_path"][1].as_py()
    edit(re.sub("_0+", "_", second))(place)
    return ["--num_images", 5]


def row_path(path):
    """The first row names the image STRANGER, which lies outside the data folder, as {outside}/NAME or otherwise."""
    return lambda place: edit(path.format(outside=place.outside, name=STRANGER))(place)


def link(folder_too=False):
    def build(place):
        edit(f"linked/{STRANGER}")(place)
        if folder_too:
            (place.data / "linked").symlink_to(place.outside)
        else:
            (place.data / "linked").mkdir()
            (place.data / "linked" / STRANGER).symlink_to(place.outside / STRANGER)

    return build


def as_in_the_hubs_cache(place):
    """Every file is a link into a folder of blobs beside it."""
    for i, file in enumerate(sorted(path for path in place.data.rglob("*") if path.is_file())):
        (place.tmp / "blobs").mkdir(exist_ok=True)
        file.rename(place.tmp / "blobs" / str(i))
        file.symlink_to(place.tmp / "blobs" / str(i))


def linked_root(place):
    (place.tmp / "unpacked").mkdir()
    with zipfile.ZipFile(place.zip) as archive:
        archive.extractall(place.tmp / "unpacked")
    (place.tmp / "root").symlink_to(place.tmp / "unpacked")
    return ["--image_root", place.tmp / "root"]


def stamp(local, central, kind, value):
    """Set a field of the first member, in its own header and in the zip's directory."""

    def build(place):
        data = bytearray(place.zip.read_bytes())
        struct.pack_into(kind, data, data.index(b"PK\3\4") + local, value)
        struct.pack_into(kind, data, data.index(b"PK\1\2") + central, value)
        place.zip.write_bytes(data)

    return build


def bomb(unpacks, claimed=None):
    """The first member unpacks to so many MB of zeros; claimed: the bytes that its headers say."""

    def build(place):
        members, first = dict(place.members), place.first
        with zipfile.ZipFile(place.zip, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            with archive.open(first, "w") as member:
                for _ in range(unpacks):
                    member.write(bytes(2**20))
            for name in members.keys() - {first}:
                archive.writestr(name, members[name])
        if claimed:
            stamp(22, 24, "<I", claimed)(place)
        place.request.addfinalizer(tracemalloc.stop)
        tracemalloc.start()

    return build


def little_memory(place):
    assert tracemalloc.get_traced_memory()[1] < 64e6


def first_is(colour, *places):
    """The first adversarial image is of that colour in these places, but for the attack."""

    def check(place):
        with Image.open(first_twin(place.out)) as image:
            for at in places or [(32, 32)]:
                assert np.abs(np.subtract(image.getpixel(at), colour)).max() <= 8 + 6, image.getpixel(at)

    return check


def card_outside(place):
    (file,) = place.data.rglob("*.parquet")
    place.outside  # noqa: B018
    file.rename(place.tmp / "outside" / file.name)
    (place.data / "README.md").write_text(CARD.format("test", "../outside/test-*"))


def script_in(place):
    (place.data / "MMEB-eval.py").write_text(f"open({str(place.ran)!r}, 'w')\n")


def apple(members, first):
    return [(f"{Path(first).parent}/._{Path(first).name}", b"\0\5\x16\7"), *members.items()]


def twice(members, first):
    return [*members.items(), (first, picture())]


def climbing(members, first):
    return [(f"../../{name}" if name == first else name, data) for name, data in members.items()]


def upper(members, first):
    return [(name.upper() if name == first else name, data) for name, data in members.items()]


def only_apple(members, first):
    return [pair for pair in apple(members, first) if pair[0] != first]


HERE = ("COCO_val2014_",)
DATA_CASES = [
    Case("row path climbs out", GENERATE, row_path("../outside/{name}"), (STRANGER,)),
    Case("row path climbs out inside", GENERATE, row_path("MSCOCO_i2t/../../outside/{name}"), (STRANGER,)),
    Case("row path absolute", GENERATE, row_path("{outside}/{name}"), (STRANGER,)),
    Case("row path with backslashes", GENERATE, row_path("..\\outside\\{name}"), ("row 0",)),
    Case("row path of a drive", GENERATE, row_path("C:\\outside\\{name}"), ("row 0",)),
    Case("row path with control characters", GENERATE, row_path("\x1b[2J\a/{name}"), (STRANGER,)),
    Case("row path with a zero", GENERATE, row_path("a\0b/{name}"), (STRANGER,)),
    Case("row path too long", GENERATE, row_path("a" * 5000 + "/{name}"), (STRANGER,)),
    Case("row path None", GENERATE, edit(lambda path: None), ("row 0",)),
    Case("row id too long", GENERATE, edit(f"a/COCO_val2014_{'9' * 5000}.jpg"), ("row 0",)),
    Case("row path in capitals", GENERATE, edit(str.upper), ("row 0",)),
    Case("row path a list", GENERATE, column(lambda paths: pa.array([[path] for path in paths])), ("row 0",)),
    Case("row path a number", GENERATE, column(lambda paths: pa.array([7] * len(paths))), ("row 0",)),
    Case("row path not UTF-8", GENERATE, column(not_utf8), ("--eval_data", "qry_img_path")),
    Case("row id of Arabic digits", GENERATE, row_path("a/COCO_val2014_" + "\u0663" * 12 + ".jpg"), ("row 0",)),
    Case("row id twice", GENERATE, same_id, ("4 distinct images",)),
    Case("linked image", GENERATE, link(), (STRANGER,)),
    Case("linked folder", GENERATE, link(folder_too=True), (STRANGER,)),
    Case("links of the hub's cache", GENERATE, as_in_the_hubs_cache, check=finished),
    Case("linked image_root", GENERATE, linked_root, check=finished),
    Case("card names files outside", GENERATE, card_outside, ("--eval_data",)),
    Case("code in the data folder", GENERATE, script_in, ("--eval_data",)),
    Case("member twice", GENERATE, repack(twice), check=first_is(COLOUR)),
    Case("member in capitals", GENERATE, repack(upper), HERE),
    Case("member and AppleDouble", GENERATE, repack(apple), check=finished),
    Case("AppleDouble alone", GENERATE, repack(only_apple), HERE),
    Case("member climbs out", GENERATE, repack(climbing), check=finished),
    Case("member encrypted", GENERATE, stamp(6, 8, "<H", 1), ("encrypted",)),
    Case("member of unknown compression", GENERATE, stamp(8, 10, "<H", 97), ("compression", *HERE)),
    Case("member with a bad CRC", GENERATE, stamp(14, 16, "<I", 7), ("CRC", *HERE)),
    Case("zip cut", GENERATE, lambda place: os.truncate(place.zip, place.zip.stat().st_size // 2), ("MMEB-eval",)),
    Case("zip of zero bytes", GENERATE, lambda place: os.truncate(place.zip, 0), ("MMEB-eval",)),
    Case("zip bomb", GENERATE, bomb(250), HERE, little_memory),
    Case("zip bomb that claims little", GENERATE, bomb(100, claimed=1000), HERE, little_memory),
    Case("zip member that claims 4 GB", GENERATE, stamp(22, 24, "<I", 2**32 - 2), HERE),
    Case("parquet cut", GENERATE, lambda p: os.truncate(next(p.data.rglob("*.parquet")), 300), ("--eval_data",)),
]

# -- images


def picture(mode="RGB", kind="JPEG", size=(96, 80), colour=COLOUR, **options):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def image(data):
    """The first image of the zip replaced."""

    def change(members, first):
        members[first] = data() if callable(data) else data

    return repack(change)


def claims(side):
    """A JPEG whose header claims another size."""
    data = bytearray(picture())
    struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, side, side)
    return bytes(data)


def halved(members, first):
    members[first] = members[first][: len(members[first]) // 2]


def palette():
    return picture("P", "PNG", transparency=0)


def deep(colour=200):
    buffer = io.BytesIO()
    Image.fromarray(np.full((80, 96), colour * 257, np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


def rgba():
    buffer = io.BytesIO()
    Image.new("RGBA", (96, 80), (*COLOUR, 100)).save(buffer, "PNG")
    return buffer.getvalue()


def turned():
    """Left half COLOUR, right half black, with the mark to turn it a quarter, which the pipeline does not."""
    both, exif, buffer = Image.new("RGB", (96, 96)), Image.Exif(), io.BytesIO()
    both.paste(COLOUR, (0, 0, 48, 96))
    exif[274] = 6
    both.save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def not_turned(place):
    first_is(COLOUR, (8, 8), (8, 56))(place)
    first_is((0, 0, 0), (56, 8), (56, 56))(place)


def frames():
    return picture("P", "GIF", save_all=True, append_images=[Image.new("P", (96, 80))] * 3)


def postscript(place):
    """An EPS under a JPEG's name: Pillow would hand it to Ghostscript."""
    (place.tmp / "bin").mkdir()
    (place.tmp / "bin" / "gs").write_text(f"#!/bin/sh\ntouch '{place.ran}'\n")
    (place.tmp / "bin" / "gs").chmod(0o755)
    place.monkeypatch.setenv("PATH", f"{place.tmp / 'bin'}:{os.environ['PATH']}")
    place.monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    image(lambda: picture(kind="EPS"))(place)


BROKEN = (*HERE, "broken image")
IMAGE_CASES = [
    Case("image claims 60000 x 60000", GENERATE, image(lambda: claims(60_000)), BROKEN),
    Case("image claims 9500 x 9500", GENERATE, image(lambda: claims(9500)), BROKEN),
    Case("image cut in its header", GENERATE, image(lambda: picture()[:300]), BROKEN),
    Case("image cut in its data", GENERATE, repack(halved), (*BROKEN, "truncated")),
    Case("image of zero bytes", GENERATE, image(b""), BROKEN),
    Case("image is HTML", GENERATE, image(b"<!DOCTYPE html><title>404</title>"), BROKEN),
    Case("image is PostScript", GENERATE, postscript, BROKEN),
    Case("image CMYK", GENERATE, image(lambda: picture("CMYK")), check=first_is(COLOUR)),
    Case("image grey", GENERATE, image(lambda: picture("L")), check=first_is((100, 100, 100))),
    Case("image with palette and transparency", GENERATE, image(palette), check=first_is(COLOUR)),
    Case("image 16 bit", GENERATE, image(deep), (*BROKEN, "8 bits")),
    Case("image RGBA", GENERATE, image(rgba), check=first_is(COLOUR)),
    Case("image with a mark to turn it", GENERATE, image(turned), check=not_turned),
    Case("image is an animated GIF", GENERATE, image(frames), check=first_is(COLOUR)),
    Case("image 1 x 1", GENERATE, image(lambda: picture(size=(1, 1))), check=first_is(COLOUR)),
    Case("image 2000 x 50", GENERATE, image(lambda: picture(size=(2000, 50))), check=first_is(COLOUR)),
    Case("image 10000 x 2", GENERATE, image(lambda: picture(size=(10_000, 2))), (*BROKEN, "10000 x 2")),
    Case("image 2 x 10000", GENERATE, image(lambda: picture(size=(2, 10_000))), (*BROKEN, "2 x 10000")),
]

# -- captions

STRANGE = {
    "of 10,000 characters": "a red ring " * 909 + "x",
    "with emoji": "A \U0001f468\u200d\U0001f469\u200d\U0001f467 in front of \U0001f3f4\U000e0067\U000e007f.",
    "right to left": "\u202eخاتم أحمر على يمين نجمة זרקא\u202c",
    "with control characters": "a\x00b\nc\r\nd\x1b[2Je\x0bf\x1cg\x85h\u2028i\u2029j\ufeff\ufffe",
    "of JSON": '{"file_name": "../../x.png"}\\" ,',
}


def caption(value):
    return edit(lambda captions: [value, *captions[1:]], "tgt_text")


def one_line_each(value):
    """metadata.jsonl has a line for each image, by every definition of a line, and gives the caption back."""

    def check(place):
        lines = (place.out / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(lines) == 4
        assert json.loads(lines[0])["caption"] == value.strip()
        words = ["--adversarial_dir", place.out, "--output_dir", place.tmp / "jpeg"]
        run(JPEG, place.words(JPEG, words))
        assert (place.tmp / "jpeg" / "metrics.json").exists()

    return check


def others_none(place):
    edit(lambda captions: [captions[0], None, *captions[2:]], "tgt_text")(place)
    return ["--candidates", "mmeb"]


def lists_as_text(place):
    column(lambda lists: pa.array([texts[0] for texts in lists]), "tgt_text")(place)
    return ["--candidates", "mmeb"]


EMPTY = ("--eval_data", "row 0", "tgt_text")
CAPTION_CASES = [
    Case(f"caption {name}", GENERATE, caption(text), check=one_line_each(text)) for name, text in STRANGE.items()
]
CAPTION_CASES += [
    Case("caption empty", GENERATE, caption(""), EMPTY),
    Case("caption None", GENERATE, caption(None), EMPTY),
    Case("caption of white space", GENERATE, caption(" \t\n\u2003\u00a0"), EMPTY),
    Case("captions an empty list", GENERATE, edit(lambda captions: [], "tgt_text"), EMPTY),
    Case("candidate None", EVALUATE, others_none, EMPTY),
    Case("candidates a text", EVALUATE, lists_as_text, EMPTY),
]

# -- adversarial folders


def adversarial(change, split="eval"):
    """A copy of the adversarial folder after change(folder)."""
    return lambda place: change(place.copy(f"adversarial_{split}"), place)


def first_twin(folder):
    return folder / json.loads((folder / "metadata.jsonl").read_text().split("\n")[0])["file_name"]


def metadata(change):
    """The first entry after change(entry, folder, place); what it returns is the line."""

    def apply(folder, place):
        file = folder / "metadata.jsonl"
        first, *rest = file.read_text().splitlines()
        first = change(json.loads(first), folder, place)
        file.write_text("\n".join([first if isinstance(first, str) else json.dumps(first), *rest]) + "\n")

    return adversarial(apply)


def moved_out(as_path):
    """The first twin lies outside the folder, and the entry names it there."""

    def change(entry, folder, place):
        (place.tmp / "outside").mkdir()
        (folder / entry["file_name"]).rename(place.tmp / "outside" / "twin.png")
        return entry | {"file_name": as_path.format(tmp=place.tmp)}

    return metadata(change)


def linked_out(folder, place):
    file = first_twin(folder)
    file.rename(place.tmp / "twin.png")
    file.symlink_to(place.tmp / "twin.png")


def one_level(folder, place):
    """One grey level of one pixel, towards the clean image: still inside the ball."""
    split = folder.name.removeprefix("adversarial_")
    module = importlib.import_module(GENERATE)
    words = [f"--{split}_data", place.shared / f"MMEB-{split}", "--split", split]
    clean = common.load_examples(module.parse_args(command(place.shared, GENERATE, place.out, *words)), split, range(4), common.load_clip(module.parse_args([])).geometry)["pixels"]
    file = first_twin(folder)
    twin = np.array(Image.open(file))
    value, wanted = int(twin[5, 7, 1]), int(clean[0, 1, 5, 7])
    twin[5, 7, 1] = value + (1 if wanted > value or value == 0 else -1)
    Image.fromarray(twin).save(file)


def swapped(folder, place):
    one, two = sorted((folder / "images").glob("*.png"))[:2]
    one_bytes = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(one_bytes)


def twin_bytes(change):
    return adversarial(lambda folder, _: first_twin(folder).write_bytes(change(first_twin(folder).read_bytes())))


def large_png(data):
    """A PNG whose header claims 60000 x 60000, its checksum right."""
    header = data[12:16] + struct.pack(">II", 60_000, 60_000) + data[24:29]
    return data[:12] + header + struct.pack(">I", zipfile.crc32(header)) + data[33:]


def bad_chunk(data):
    at = data.index(b"IDAT") + 30
    return data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]


def record(change):
    """metrics.json after change(record); bytes are written as they are."""

    def apply(folder, _):
        value = change(json.loads((folder / "metrics.json").read_text()))
        (folder / "metrics.json").write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())

    return adversarial(apply)


def own_record(value):
    """The finished run in --output_dir itself has a damaged metrics.json, and is not to be overwritten."""

    def build(place):
        place.overwrite = False
        (place.out / "metrics.json").write_bytes(value)

    return build


def unfinished(value):
    """A killed run left its state in .partial, and that is damaged."""

    def build(place):
        place.overwrite = False
        (place.out / "metrics.json").unlink()
        (place.out / ".partial").mkdir()
        (place.out / ".partial" / "run.json").write_bytes(value)

    return build


def sibling(place):
    """evaluate.py takes a training from beside its own folder."""
    (place.tmp / "mat").mkdir()
    (place.tmp / "mat" / "metrics.json").write_text("{}")


def cut(folder, _):
    os.truncate(folder / "metadata.jsonl", (folder / "metadata.jsonl").stat().st_size - 40)


def without_last(folder, _):
    lines = (folder / "metadata.jsonl").read_text().splitlines(keepends=True)
    (folder / "metadata.jsonl").write_text("".join(lines[:-1]))


def latin(folder, _):
    (folder / "metadata.jsonl").write_bytes(b'{"caption": "\xe9"}\n')


def missing(folder, _):
    first_twin(folder).unlink()


def resized(folder, _):
    Image.open(first_twin(folder)).resize((32, 32)).save(first_twin(folder))


def entry_with(**values):
    return metadata(lambda entry, folder, place: entry | values)


def rewritten(data):
    """The first twin holds other bytes, and metadata.jsonl their checksum."""

    def change(entry, folder, place):
        (folder / entry["file_name"]).write_bytes(data)
        return entry | {"sha256": hashlib.sha256(data).hexdigest()}

    return metadata(change)


def cached(change):
    """A cache of decoded images after change(array file)."""

    def build(place):
        words = ["--cache_dir", place.tmp / "cache"]
        args = importlib.import_module(GENERATE).parse_args(place.words(GENERATE, words))
        common.load_examples(args, "eval", 4)
        change(next((place.tmp / "cache").glob("*.npy")))
        return words

    return build


STATE = b'{"args": {}, "inputs": {}, "started": "once", "seconds": '
LINE, PNG, METRICS = ("metadata.jsonl", "line 1"), (".png",), ("adversarial_eval/metrics.json",)
ADVERSARIAL_CASES = [
    Case("metadata cut", JPEG, adversarial(cut), ("metadata.jsonl", "line 4")),
    Case("metadata without its last line", JPEG, adversarial(without_last), ("no adversarial twin of", *HERE)),
    Case("metadata not UTF-8", JPEG, adversarial(latin), ("metadata.jsonl",)),
    Case("metadata line a list", JPEG, metadata(lambda *_: "[1, 2]"), LINE),
    Case("metadata line a number", JPEG, metadata(lambda *_: "5"), LINE),
    Case("metadata line null", JPEG, metadata(lambda *_: "null"), LINE),
    Case("metadata line deeply nested", JPEG, metadata(lambda *_: "[" * 100_000), LINE),
    Case("metadata file_name a number", JPEG, entry_with(file_name=5), LINE),
    Case("metadata file_name empty", JPEG, entry_with(file_name=""), ("adversarial_eval",)),
    Case("metadata file_name with a zero", JPEG, entry_with(file_name="a\0b.png"), ("adversarial_eval",)),
    Case("metadata coco_id a list", JPEG, entry_with(coco_id=[1]), LINE),
    Case("file_name climbs out", JPEG, moved_out("../outside/twin.png"), ("twin.png",)),
    Case("file_name climbs out inside", JPEG, moved_out("images/../../outside/twin.png"), ("twin.png",)),
    Case("file_name absolute", JPEG, moved_out("{tmp}/outside/twin.png"), ("twin.png",)),
    Case("twin a link out", JPEG, adversarial(linked_out), PNG),
    Case("twin missing", JPEG, adversarial(missing), PNG),
    Case("twin missing", PGD, adversarial(missing, "train"), PNG),
    Case("twin altered inside the ball", JPEG, adversarial(one_level), PNG),
    Case("twin altered inside the ball", PGD, adversarial(one_level, "train"), PNG),
    Case("twin altered inside the ball", EVALUATE, adversarial(one_level), PNG),
    Case("twins swapped", JPEG, adversarial(swapped), PNG),
    Case("twin of another size", JPEG, adversarial(resized), PNG),
    Case("twin claims 60000 x 60000", JPEG, twin_bytes(large_png), PNG),
    Case("twin cut", JPEG, twin_bytes(lambda data: data[: len(data) // 2]), PNG),
    Case("twin with a damaged chunk", JPEG, twin_bytes(bad_chunk), PNG),
    Case("twin is text, its checksum right", JPEG, rewritten(b"<html>"), PNG),
    Case("twin claims 60000 x 60000, its checksum right", JPEG, rewritten(large_png(picture(kind="PNG"))), PNG),
    Case("cache of images cut", GENERATE, cached(lambda file: os.truncate(file, 999)), check=finished),
    Case("cache of images of zero bytes", GENERATE, cached(lambda file: os.truncate(file, 0)), check=finished),
    Case("cache without its list", GENERATE, cached(lambda f: f.with_suffix(".json").write_text("[]")), check=finished),
    Case("twin of zero bytes", PGD, adversarial(lambda f, _: os.truncate(first_twin(f), 0), "train"), PNG),
    Case("record cut", JPEG, record(lambda made: json.dumps(made)[:99].encode()), METRICS),
    Case("record not UTF-8", JPEG, record(lambda made: b"\xff\xfe{}"), METRICS),
    Case("record empty", JPEG, record(lambda made: {}), METRICS),
    Case("record a list", JPEG, record(lambda made: []), METRICS),
    Case("record without args", JPEG, record(lambda made: made | {"args": None}), METRICS),
    Case("made with another eps", JPEG, record(lambda m: m | {"args": m["args"] | {"eps": 0.1}}), ("--eps 0.1",)),
    Case("made with eps NaN", JPEG, record(lambda m: m | {"args": m["args"] | {"eps": float("nan")}}), ("--eps nan",)),
    Case("made of another model", JPEG, record(lambda m: m | {"args": m["args"] | {"model": "x"}}), ("--model x",)),
    Case("own record cut", GENERATE, own_record(b'{"args": {'), ("out/metrics.json",)),
    Case("own record empty", GENERATE, own_record(b"{}"), ("out/metrics.json",)),
    Case("own record a list", GENERATE, own_record(b"[]"), ("out/metrics.json",)),
    Case("own record of strings", JPEG, own_record(b'{"args": "x", "inputs": "y"}'), ("out/metrics.json",)),
    Case("state of a killed run cut", GENERATE, unfinished(b'{"args": {'), (".partial",)),
    Case("state of a killed run a list", GENERATE, unfinished(b"[1]"), (".partial",)),
    Case("state of a killed run with a text for seconds", GENERATE, unfinished(STATE + b'"x"}'), (".partial",)),
    Case("state of a killed run of endless seconds", GENERATE, unfinished(STATE + b"1e999}"), (".partial",)),
    Case("record of a training empty", EVALUATE, sibling, ("mat/metrics.json",)),
]

CASES = [
    Case(f"{name} {str(value)[:12]!r}", script, flag(name, value), (name,))
    for (script, name), values in BAD.items()
    for value in values
]
PARSED = len(CASES)  # these must not get past the flags
CASES += [*FLAG_CASES, *CHECKPOINT_CASES, *DATA_CASES, *IMAGE_CASES, *CAPTION_CASES, *ADVERSARIAL_CASES]


TOKENIZER = cache(open_clip.get_tokenizer)  # a quarter of a second each time


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{case.script}, {case.name}" for case in CASES])
def test_hostile_input(number, shared, tmp_path, request, monkeypatch, capsys, recwarn):
    case, place = CASES[number], Place(shared, tmp_path, request, monkeypatch)
    words = place.words(case.script, case.build(place))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(open_clip, "get_tokenizer", TOKENIZER)
    for figure in ("examples", "histograms", "table"):  # seconds, and nothing hostile in them
        monkeypatch.setattr(f"evaluate.draw_{figure}", lambda *_: None)
    monkeypatch.setattr("sys.argv", [f"{case.script}.py", *words])
    before, left = files(tmp_path), place.out / "metrics.json"
    finished_run = left.read_bytes() if left.exists() else None
    capsys.readouterr()
    recwarn.clear()
    if case.said:
        with pytest.raises(SystemExit) as end:
            if number < PARSED:
                importlib.import_module(case.script).parse_args(words)
            else:
                run(case.script, words)
        assert end.value.code == 2
        lines = [line for line in re.split("[\r\n]", capsys.readouterr().err) if line.strip() and "%|" not in line]
        if lines[0].startswith("usage: "):
            lines = list(dropwhile(lambda line: line.startswith(" "), lines[1:]))
        assert len(lines) == 1 and lines[0].startswith(f"{case.script}.py: error: "), lines
        for said in case.said:
            assert said.format(tmp=tmp_path) in lines[0]
        assert lines[0].isprintable()
        if case.late:
            assert not left.exists() or left.read_bytes() == finished_run
            assert (place.out / "keep.txt").read_text() == "not ours"
        else:
            assert files(tmp_path) == before
    else:
        run(case.script, words)
    assert not place.ran.exists(), "code from a file was run"
    unseen = DeprecationWarning, PendingDeprecationWarning, ResourceWarning, ImportWarning
    assert not [str(shown.message) for shown in recwarn if not issubclass(shown.category, unseen)]
    if case.check:
        case.check(place)
