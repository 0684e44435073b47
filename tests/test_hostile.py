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
    """Where one case is played: what a builder touches is first copied from the shared data."""

    def __init__(self, shared, tmp, request, monkeypatch):
        self.shared, self.tmp, self.request, self.monkeypatch = shared, tmp, request, monkeypatch
        self.out, self.ran, self.overwrite = tmp / "out", tmp / "ran", True
        self.out.mkdir()
        (self.out / "keep.txt").write_text("not ours")
        (self.out / "metrics.json").write_text(json.dumps(RECORD))

    def copy(self, name):
        if not (self.tmp / name).exists():
            shutil.copytree(self.shared / name, self.tmp / name)
        return self.tmp / name

    data = cached_property(lambda self: self.copy("MMEB-eval"))
    zip = cached_property(lambda self: self.data / "images.zip")
    parquet = cached_property(lambda self: next(self.data.rglob("*.parquet")))
    first = cached_property(lambda self: next(iter(self.members)))  # member name of the first image

    @cached_property
    def members(self):
        with zipfile.ZipFile(self.zip) as archive:
            return {name: archive.read(name) for name in archive.namelist()}

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
    name: str
    script: str
    build: object  # (place) -> further words
    said: tuple = ()  # of the line with which it ends; none where it copes
    check: object = None  # (place)
    late: bool = False  # found out when the old run is gone already: there must be no new one
    parsed: bool = False  # by argparse: the flags must not get past it


def refuses(name, build, *said, script=GENERATE, check=None, late=False):
    return Case(name, script, build, said, check, late)


def finished(place):
    record = json.loads((place.out / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert record["n"] == 4


def copes(name, build, check=finished, script=GENERATE):
    return Case(name, script, build, (), check)


def same_figures(place):
    """Nothing but the sound images went in: the row other, or the run itself, has the figures of the sound run."""
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
CASES = [
    Case(f"{name} {str(value)[:12]!r}", script, lambda _, words=(name, value): list(words), (name,), parsed=True)
    for (script, name), values in BAD.items()
    for value in values
]


def flag(*words):
    """Words in which {tmp} is the case's folder."""
    return lambda place: [str(word).format(tmp=place.tmp) for word in words]


def needs(*words):
    """The same, with a file f in the case's folder."""
    return lambda place: (place.tmp / "f").write_text("a file") and flag(*words)(place)


DIVERGE = ["--lr", "1", "--weight_decay", "100", "--max_steps", "60", "--epochs", "60"]
CASES += [
    refuses("device unknown", flag("--device", "abacus"), "--device abacus"),
    refuses("device not there", flag("--device", "cuda:99"), "--device cuda:99"),
    refuses("device without numbers", flag("--device", "meta"), "--device meta"),
    refuses("model unknown", flag("--model", "ViT-Z-99", "--pretrained", "random"), "--model ViT-Z-99"),
    refuses("model empty", flag("--model", ""), "--model"),
    refuses("model folder missing", flag("--model", "local-dir:{tmp}/none"), "--model local-dir:", "none"),
    refuses("model folder a file", needs("--model", "local-dir:{tmp}/f"), "--model local-dir:"),
    refuses("pretrained missing", flag("--pretrained", "{tmp}/none.pt"), "--pretrained", "none.pt"),
    refuses("pretrained a folder", flag("--pretrained", "{tmp}"), "--pretrained"),
    refuses("output_dir a file", needs("--output_dir", "{tmp}/f"), "--output_dir"),
    refuses("output_dir not writable", flag("--output_dir", "/dev/null/a"), "--output_dir"),
    refuses("output_dir too long", flag("--output_dir", "{tmp}/" + "a" * 300), "--output_dir"),
    refuses("output_dir empty", flag("--output_dir", ""), "--output_dir"),
    refuses("output_dir not UTF-8", flag("--output_dir", "{tmp}/\udcff"), "\\udcff"),
    refuses("image_root missing", flag("--image_root", "{tmp}/none"), "--image_root", "none"),
    refuses("cache_dir a file", needs("--cache_dir", "{tmp}/f"), "{tmp}/f"),
    refuses("train_data nothing", flag("--train_data", "no folder, no id"), "--train_data no folder", script=MAT),
    refuses("train_data a file", needs("--train_data", "{tmp}/f"), "--train_data", script=MAT),
    refuses("train_data empty", flag("--train_data", ""), "--train_data", script=MAT),
    refuses("num_images huge", flag("--num_images", 10**30), "5 distinct images"),
    refuses("val_images huge", flag("--val_images", 10**30), "8 distinct train2014 images", script=MAT),
    refuses("training diverges", flag(*DIVERGE), "step 3 is not finite", "last.pt", script=MAT, late=True),
    refuses("defence of no row", flag("--defence", "x+jpeg50"), "--defence x+jpeg50", script=EVALUATE),
    refuses("defence of no kind", flag("--defence", "original+blur"), "--defence original+blur", script=EVALUATE),
    refuses("defence too low", flag("--defence", "original+jpeg0"), "--defence original+jpeg0", script=EVALUATE),
    refuses("row name taken", needs("--checkpoint", "MAT={tmp}/f"), "--checkpoint MAT", script=EVALUATE),
    copes("batch_size huge", flag("--batch_size", 10**30)),
    copes("seed largest", flag("--seed", 2**31)),
]

# -- checkpoints and models


def tiny_state(dtype=torch.float16, visual=False):
    state = load_file(TINY / "clip" / "open_clip_model.safetensors")
    state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    return {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")} if visual else state


def weights(change=dict, **entries):
    """A checkpoint file of the tiny CLIP after change(state dict), with further entries."""
    return lambda file: torch.save({"state_dict": change(tiny_state())} | entries, file)


def content(value):
    return lambda file: file.write_bytes(value) if isinstance(value, bytes) else torch.save(value, file)


def half(write):
    return lambda file: (write(file), os.truncate(file, file.stat().st_size // 2))


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


def code_in(file, save=torch.save, ran="ran"):
    save({"state_dict": {"visual.proj": Payload(file.parent / ran)}}, file)


def pickled(value, file):
    file.write_bytes(pickle.dumps(value))


def changed(key, change):
    return lambda state: state | {key: change(state[key])}


def as_safetensors(file):
    save_file({key: value.contiguous() for key, value in tiny_state().items()}, file)


def overflow(state):
    return {key: value.float() * 1e30 if "visual" in key else value for key, value in state.items()}


NONE = "is no checkpoint"
FILES = {  # name of the file -> (how it is written, what is said)
    "code.pt": (code_in, "code"),
    "old_code.pt": (partial(code_in, save=pickled), "code"),
    "code.safetensors": (partial(code_in, save=pickled), NONE),
    "cut.pt": (half(weights()), NONE),
    "cut.safetensors": (half(as_safetensors), NONE),
    "zero.pt": (content(b""), NONE),
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
ROWS = ["code.pt", "cut.safetensors", "text.pt", "foreign.pt", "nan.pt"]  # that evaluate.py is given as a row, too


def file_case(script, name, write, *said, check=None, late=False):
    def build(place):
        file = place.tmp / name
        write(file)
        place.request.addfinalizer(file.unlink)  # megabytes each
        return ["--checkpoint", f"other={file}"] if script == EVALUATE else ["--pretrained", file]

    return Case(f"checkpoint {name}", script, build, said, check, late)


def local_model(change=None, code=False):
    """--model local-dir: with a changed configuration, or with weights that are a pickle with code."""

    def build(place):
        folder = place.tmp / "clip"
        shutil.copytree(TINY / "clip", folder)
        if change:
            file = folder / "open_clip_config.json"
            file.write_text(change(file.read_text()))
        if code:
            (folder / "open_clip_model.safetensors").unlink()
            code_in(folder / "open_clip_pytorch_model.bin", ran="../ran")
        return ["--model", f"local-dir:{folder}"]

    return build


def replaced(old, new):
    return local_model(lambda text: re.sub(old, new, text, count=1))


CASES += [file_case(GENERATE, name, write, name, said) for name, (write, said) in FILES.items()]
CASES += [file_case(EVALUATE, f"other_{name}", FILES[name][0], "other", FILES[name][1]) for name in ROWS]
TOWER = content(tiny_state(visual=True))
CASES += [
    file_case(GENERATE, "fp16.pt", weights(), check=same_figures),
    file_case(GENERATE, "fp16.safetensors", as_safetensors, check=same_figures),
    file_case(GENERATE, "fp64.pt", content(tiny_state(torch.float64)), check=same_figures),
    file_case(EVALUATE, "fp16_tower.pt", TOWER, check=same_figures),
    file_case(GENERATE, "tower.pt", TOWER, "tower.pt", "visual tower alone"),
    file_case(GENERATE, "overflow.pt", weights(overflow), "finite", late=True),
    file_case(EVALUATE, "leaked.pt", weights(train_ids=[357100]), "leakage: other"),
    refuses("model folder with code", local_model(code=True), "local-dir:"),
    refuses("model folder, config cut", local_model(lambda text: text[:200]), "local-dir:"),
    refuses("model folder, config a list", local_model(lambda text: "[]"), "local-dir:"),
    refuses("model folder, no tower", replaced('"vision_cfg"', '"no_cfg"'), "local-dir:"),
    refuses("model folder, size 0", replaced(": 64,\n", ": 0,\n"), "local-dir:"),
    refuses("model folder, width a text", replaced(r'"width": \d+', '"width": "wide"'), "local-dir:"),
    refuses("model folder, width huge", replaced(r'"width": \d+', '"width": 1099511627776'), "local-dir:"),
]

# -- rows and zips


def pack(file, members):
    """Write (name, bytes) pairs as a zip."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name that comes twice
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in members:
                archive.writestr(name, data)


def repack(change):
    """The zip of the pairs change([(name, bytes)])."""
    return lambda place: pack(place.zip, change(list(place.members.items())))


def first_member(change):
    """The zip with its first member replaced by change(name, bytes) -> pairs."""
    return repack(lambda members: [*change(*members[0]), *members[1:]])


def edit(change, column="qry_img_path"):
    """The parquet with the first value of a column changed: change(value) or a constant."""

    def build(place):
        columns = pq.read_table(place.parquet).to_pydict()
        columns[column][0] = change(columns[column][0]) if callable(change) else change
        pq.write_table(pa.table(columns), place.parquet)

    return build


def column(change, name="qry_img_path"):
    """The parquet with a whole column replaced by change([values])."""

    def build(place):
        table = pq.read_table(place.parquet)
        at = table.column_names.index(name)
        pq.write_table(table.set_column(at, name, change(table[name].to_pylist())), place.parquet)

    return build


def table(change):
    return lambda place: pq.write_table(change(pq.read_table(place.parquet)), place.parquet)


def declared(place):
    """The file declares its paths to be images, which would be opened, or downloaded."""
    row_path("{outside}/{name}")(place)
    features = {"qry_img_path": {"_type": "Image"}, "tgt_text": {"feature": {"dtype": "string", "_type": "Value"}}}
    features["tgt_text"]["_type"] = "Sequence"
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table(lambda rows: rows.select([*features]).replace_schema_metadata(metadata))(place)


def not_utf8(values):
    return pa.array([value.encode() + b"\xff\xed\xa0\x80" for value in values], pa.binary()).view(pa.string())


def same_id(place):
    """The first two rows name one image, with and without the zeros."""
    second = pq.read_table(place.parquet)["qry_img_path"][1].as_py()
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
    (place.tmp / "blobs").mkdir()
    for i, file in enumerate(sorted(path for path in place.data.rglob("*") if path.is_file())):
        file.rename(place.tmp / "blobs" / str(i))
        file.symlink_to(place.tmp / "blobs" / str(i))


def linked_root(place):
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


def card(text):
    return lambda place: (place.data / "README.md").write_text(text)


def card_outside(place):
    place.parquet.rename(place.outside / place.parquet.name)
    card(CARD.format("test", "../outside/test-*"))(place)


def script_in(place):
    (place.data / "MMEB-eval.py").write_text(f"open({str(place.ran)!r}, 'w')\n")


def apple(name, data):
    return f"{Path(name).parent}/._{Path(name).name}", b"\0\5\x16\7"


def link_member(name, data):
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o120777 << 16
    return [(info, f"../outside/{STRANGER}")]


def halve(file):
    os.truncate(file, file.stat().st_size // 2)


HERE, BROKEN = "COCO_val2014_", ("COCO_val2014_", "broken image")
CASES += [
    refuses("row path climbs out", row_path("../outside/{name}"), STRANGER),
    refuses("row path climbs out inside", row_path("MSCOCO_i2t/../../outside/{name}"), STRANGER),
    refuses("row path absolute", row_path("{outside}/{name}"), STRANGER),
    refuses("row path with backslashes", row_path("..\\outside\\{name}"), "row 0"),
    refuses("row path with control characters", row_path("\x1b[2J\a/{name}"), STRANGER),
    refuses("row path with a zero", row_path("a\0b/{name}"), STRANGER),
    refuses("row path too long", row_path("a" * 5000 + "/{name}"), "--eval_data", "aaaa"),
    refuses("row path None", edit(None), "row 0"),
    refuses("row id too long", edit(f"a/COCO_val2014_{'9' * 5000}.jpg"), "row 0"),
    refuses("row path in capitals", edit(str.upper), "row 0"),
    refuses("row path a list", column(lambda paths: pa.array([[path] for path in paths])), "row 0"),
    refuses("row path a number", column(lambda paths: pa.array([7] * len(paths))), "row 0"),
    refuses("row path not UTF-8", column(not_utf8), "--eval_data", "split test", "utf-8"),
    refuses("row path declared an image", declared, "row 0"),
    refuses("row id of Arabic digits", row_path("a/COCO_val2014_" + "\u0663" * 12 + ".jpg"), "row 0"),
    refuses("row id twice", same_id, "4 distinct images"),
    refuses("no rows", table(lambda rows: rows[:0]), "--eval_data", "0 distinct images"),
    refuses("no paths", table(lambda rows: rows.drop_columns(["qry_img_path"])), "--eval_data", "qry_img_path"),
    refuses("linked image", link(), STRANGER),
    refuses("linked folder", link(folder_too=True), STRANGER),
    copes("links of the hub's cache", as_in_the_hubs_cache, same_figures),
    copes("linked image_root", linked_root, same_figures),
    refuses("image_root empty", lambda p: (p.tmp / "e").mkdir() or ["--image_root", p.tmp / "e"], "--eval_data", HERE),
    refuses("card names files outside", card_outside, "--eval_data", "outside the folder"),
    refuses("card without the split", card(CARD.format("other", "MSCOCO_i2t/*")), "--eval_data", "split test"),
    refuses("card no YAML", card("---\nconfigs: [{\n---\n"), "--eval_data"),
    refuses("code in the data folder", script_in, "--eval_data"),
    refuses("parquet cut", lambda place: os.truncate(place.parquet, 300), "--eval_data"),
    copes("member twice", first_member(lambda name, data: [(name, data), (name, picture())]), lambda p: first_is(p)),
    refuses("member in capitals", first_member(lambda name, data: [(name.upper(), data)]), HERE),
    copes("member and AppleDouble", first_member(lambda *pair: [apple(*pair), pair]), same_figures),
    refuses("AppleDouble alone", first_member(lambda *pair: [apple(*pair)]), HERE),
    copes("member climbs out", first_member(lambda name, data: [(f"../../{name}", data)]), same_figures),
    refuses("member a folder", first_member(lambda name, data: [(f"{name}/", b"")]), HERE),
    refuses("member a link", lambda place: place.outside and first_member(link_member)(place), *BROKEN),
    refuses("member encrypted", stamp(6, 8, "<H", 1), "encrypted", HERE),
    refuses("member of unknown compression", stamp(8, 10, "<H", 97), "compression", HERE),
    refuses("member with a bad CRC", stamp(14, 16, "<I", 7), "CRC", HERE),
    refuses("zip missing", lambda place: place.zip.unlink(), "--eval_data", HERE),
    refuses("zip cut", lambda place: halve(place.zip), "images.zip"),
    refuses("zip of zero bytes", lambda place: os.truncate(place.zip, 0), "images.zip"),
    refuses("zip bomb", bomb(250), HERE, check=little_memory),
    refuses("zip bomb that claims little", bomb(100, claimed=1000), HERE, check=little_memory),
    copes("zip member that claims 4 GB", stamp(22, 24, "<I", 2**32 - 2), same_figures),
]

# -- images


def picture(mode="RGB", kind="JPEG", size=(96, 80), colour=COLOUR, **options):
    return encoded(Image.new("RGB", size, colour).convert(mode), kind, **options)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def image(make):
    """The first image of the zip replaced by make()."""
    return first_member(lambda name, data: [(name, make())])


def first_is(place, colour=COLOUR, places=((32, 32),)):
    """The first adversarial image is of that colour in these places, but for the attack."""
    with Image.open(first_twin(place.out)) as twin:
        for at in places:
            assert np.abs(np.subtract(twin.getpixel(at), colour)).max() <= 8 + 6, twin.getpixel(at)


def claims(side):
    """A JPEG whose header claims another size."""
    data = bytearray(picture())
    struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, side, side)
    return bytes(data)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def text_bomb():
    data = picture(kind="PNG")
    return data[:33] + chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**24))) + data[33:]


def turned():
    """Left half COLOUR, right half black, with the mark to turn it a quarter, which the pipeline does not."""
    both, exif = Image.new("RGB", (96, 96)), Image.Exif()
    both.paste(COLOUR, (0, 0, 48, 96))
    exif[274] = 6
    return encoded(both, "JPEG", exif=exif)


def not_turned(place):
    first_is(place, COLOUR, [(8, 8), (8, 56)])
    first_is(place, (0, 0, 0), [(56, 8), (56, 56)])


def postscript(place):
    """An EPS under a JPEG's name: Pillow would hand it to Ghostscript."""
    (place.tmp / "bin").mkdir()
    (place.tmp / "bin" / "gs").write_text(f"#!/bin/sh\ntouch '{place.ran}'\n")
    (place.tmp / "bin" / "gs").chmod(0o755)
    place.monkeypatch.setenv("PATH", f"{place.tmp / 'bin'}:{os.environ['PATH']}")
    place.monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    image(lambda: picture(kind="EPS"))(place)


def none_sound(place):
    repack(lambda members: [(name, b"<html>") for name, _ in members])(place)
    return ["--skip_bad_images"]


DEEP = np.full((80, 96), 200 * 257, np.uint16)
FRAMES = {"save_all": True, "append_images": [Image.new("P", (96, 80))] * 3}
CASES += [
    refuses("image claims 60000 x 60000", image(lambda: claims(60_000)), *BROKEN, "60000 x 60000"),
    refuses("image cut in its header", image(lambda: picture()[:300]), *BROKEN),
    refuses("image cut in its data", first_member(lambda k, data: [(k, data[: len(data) // 2])]), *BROKEN, "truncated"),
    refuses("image of zero bytes", image(bytes), *BROKEN),
    refuses("image is HTML", image(lambda: b"<!DOCTYPE html><title>404</title>"), *BROKEN),
    refuses("image is PostScript", postscript, *BROKEN),
    refuses("image is TIFF", image(lambda: picture(kind="TIFF")), *BROKEN),
    refuses("image with a bomb of text", image(text_bomb), *BROKEN),
    refuses("image 16 bit", image(lambda: encoded(Image.fromarray(DEEP))), *BROKEN, "8 bits"),
    refuses("image 10000 x 2", image(lambda: picture(size=(10_000, 2))), *BROKEN, "10000 x 2"),
    refuses("images all broken", none_sound, "--eval_data", "none of the images"),
    copes("image CMYK", image(lambda: picture("CMYK")), first_is),
    copes("image grey", image(lambda: picture("L")), partial(first_is, colour=(100, 100, 100))),
    copes("image with palette and transparency", image(lambda: picture("P", "PNG", transparency=0)), first_is),
    copes("image RGBA", image(lambda: encoded(Image.new("RGBA", (96, 80), (*COLOUR, 100)))), first_is),
    copes("image with a mark to turn it", image(turned), not_turned),
    copes("image is an animated GIF", image(lambda: picture("P", "GIF", **FRAMES)), first_is),
    copes("image 1 x 1", image(lambda: picture(size=(1, 1))), first_is),
    copes("image 2000 x 50", image(lambda: picture(size=(2000, 50))), first_is),
]

# -- captions

STRANGE = {
    "of 10,000 characters": "a red ring " * 909 + "x",
    "with emoji": "A \U0001f468\u200d\U0001f469\u200d\U0001f467 in front of \U0001f3f4\U000e0067\U000e007f.",
    "right to left": "\u202eخاتم أحمر على يمين نجمة זרקא\u202c",
    "with control characters": "a\x00b\nc\r\nd\x1b[2Je\x0bf\x1cg\x85h\u2028i\u2029j\ufeff\ufffe",
    "of JSON": '{"file_name": "../../x.png"}\\" ,',
}


def one_line_each(value, place):
    """metadata.jsonl has a line for each image, by every definition of a line, and gives the caption back."""
    lines = (place.out / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 4
    assert json.loads(lines[0])["caption"] == value.strip()
    run(JPEG, place.words(JPEG, ["--adversarial_dir", place.out, "--output_dir", place.tmp / "jpeg"]))
    assert (place.tmp / "jpeg" / "metrics.json").exists()


def captions(change):
    return edit(change, "tgt_text")


def mmeb(build):
    return lambda place: build(place) or ["--candidates", "mmeb"]


EMPTY = ("--eval_data", "row 0", "tgt_text")
TEXTS = column(lambda lists: pa.array([texts[0] for texts in lists]), "tgt_text")
CASES += [
    copes(f"caption {name}", captions(lambda texts, text=text: [text, *texts[1:]]), partial(one_line_each, text))
    for name, text in STRANGE.items()
]
CASES += [
    refuses("caption empty", captions(lambda texts: ["", *texts[1:]]), *EMPTY),
    refuses("caption None", captions(lambda texts: [None, *texts[1:]]), *EMPTY),
    refuses("caption of white space", captions(lambda texts: [" \t\n\u2003\u00a0", *texts[1:]]), *EMPTY),
    refuses("captions an empty list", captions([]), *EMPTY),
    refuses("captions numbers", column(lambda lists: pa.array([[1, 2] for _ in lists]), "tgt_text"), *EMPTY),
    refuses("candidate None", mmeb(captions(lambda texts: [texts[0], None])), *EMPTY, script=EVALUATE),
    refuses("candidates a text each", mmeb(TEXTS), "different captions", script=EVALUATE),
]
