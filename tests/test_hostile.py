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
import tempfile
import tracemalloc
import warnings
import zipfile
from contextlib import redirect_stderr, suppress
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TINY, refusal
from hypothesis import HealthCheck, configuration, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

import common
import generate_pgd_adversarial as generate

GENERATE, JPEG, EVALUATE = "generate_pgd_adversarial", "eval_jpeg", "evaluate"
MAT, PGD = "defend_clip_mat_v2", "defend_clip_pgd_v2"
TRAINING = ["--val_images", "2", "--epochs", "1", "--max_steps", "1", "--batch_size", "2"]
STEP = ["--attack_steps", "1"]
WORDS = {GENERATE: ["--split", "eval"], MAT: TRAINING, PGD: TRAINING, JPEG: [*STEP, "--qualities", "50"]}
WORDS |= {EVALUATE: [*STEP, "--candidates", "mmeb", "--qualities"]}  # no JPEG rows
STRANGER = "COCO_val2014_000000999999.jpg"  # an image that is in no data set
COLOUR = (204, 51, 51)  # in the web palette, too, which is Pillow's for P
MADE, BEGUN = "adversarial_eval/run.json", "out/run.json"
TRAINED, WEIGHTS = "mat/metrics.json", "mat/open_clip_pytorch_model.bin"  # beside evaluate.py's own folder
LIST, PNG = "adversarial_eval/metadata.jsonl", "images/000000"


def command(shared, script, out, *words):
    words = ["--preset", "tiny", "--device", "cpu", "--num_images", 4, "--steps", 1, *WORDS[script], *words]
    words += ["--num_workers", 2, "--output_dir", out]
    return [str(word) for word in words]


def run(script, words):
    module = importlib.import_module(script)
    common.run_main(module.main, module.parse_args(words))


LOAD, LOADED = common.load_clip, {}


def load_once(args, source=None, training=False):
    """load_clip(), but that the tiny CLIP is loaded once: a tenth of a second, the longest part of most cases."""
    if training or source or (args.model, args.pretrained, args.device) != (f"local-dir:{TINY}/clip", "", "cpu"):
        return LOAD(args, source, training)
    return LOADED.get("clip") or LOADED.setdefault("clip", LOAD(args))


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A few rows of both data sets, and adversarial images of them, all of them sound."""
    root = tmp_path_factory.mktemp("hostile")
    for split, count in (("train", 8), ("eval", 5)):
        name, column, *_ = common.SPLITS[split]
        source, folder = TINY / f"MMEB-{split}", root / f"MMEB-{split}"
        (folder / "MSCOCO_i2t").mkdir(parents=True)
        (file,) = (source / "MSCOCO_i2t").glob(f"{name}-*")
        rows = [row for row in pq.read_table(file).to_pylist() if split == "eval" or "train2014" in row[column]][:count]
        pq.write_table(pa.Table.from_pylist(rows), folder / "MSCOCO_i2t" / file.name)
        with zipfile.ZipFile(next(source.rglob("*.zip"))) as archive:
            found = common.match_files([row[column] for row in rows], archive.namelist())
            pack(folder / "images.zip", [(name, archive.read(name)) for (name,) in found.values()])
        data = [f"--{split}_data", folder, "--split", split]
        run(GENERATE, command(root, GENERATE, root / f"adversarial_{split}", *data))
    return root


class Place:
    """Where one case is played, with a file of the user's in out: what a builder touches is copied from shared data."""

    def __init__(self, shared, tmp, request, monkeypatch):
        self.shared, self.tmp, self.request, self.monkeypatch = shared, tmp, request, monkeypatch
        self.out, self.ran = tmp / "out", tmp / "ran"
        self.out.mkdir()
        (self.out / "keep.txt").write_text("not ours")
        (tmp / "f").write_text("a file")

    def file(self, name):
        """A path in the case's folder; what the shared data has under it is copied."""
        top = name.split("/")[0]
        if (self.shared / top).exists() and not (self.tmp / top).exists():
            shutil.copytree(self.shared / top, self.tmp / top)
        (self.tmp / name).parent.mkdir(exist_ok=True)
        return self.tmp / name

    data = cached_property(lambda self: self.file("MMEB-eval"))
    adversarial = cached_property(lambda self: self.file("adversarial_eval"))
    zip = cached_property(lambda self: self.data / "images.zip")
    parquet = cached_property(lambda self: next(self.data.rglob("*.parquet")))

    @cached_property
    def outside(self):
        """A valid image beside the data folder, of the name STRANGER."""
        self.file(f"outside/{STRANGER}").write_bytes(picture())
        return self.tmp / "outside"

    def words(self, script, extra=()):
        def there(name):
            return self.tmp / name if (self.tmp / name).exists() else self.shared / name

        words = ["--train_data", there("MMEB-train"), "--eval_data", there("MMEB-eval")]
        if script in (PGD, JPEG, EVALUATE):
            words += ["--adversarial_dir", there("adversarial_train" if script == PGD else "adversarial_eval")]
        return [*command(self.shared, script, self.out, *words), *map(str, extra if isinstance(extra, list) else [])]


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def inverted(data):
    return encoded(ImageOps.invert(Image.open(io.BytesIO(data))))


def picture(mode="RGB", kind="JPEG", size=(96, 80), **options):
    return encoded(Image.new("RGB", size, COLOUR).convert(mode), kind, **options)


class Case(NamedTuple):
    script: str
    name: str
    build: object  # (place) -> further words
    said: tuple = ()  # of the line with which it ends; none where it copes
    check: object = None  # (place)
    late: bool = False  # found out when the run has begun: it must not be taken for complete
    parsed: bool = False  # argparse itself must turn it down


def refuses(name, build, *said, script=GENERATE, **options):
    return Case(script, name, build, said, **options)


def finished(place, count=4):
    assert json.loads((place.out / "metrics.json").read_text(), parse_constant=pytest.fail)["n"] == count


def copes(name, build, check=finished, script=GENERATE):
    return Case(script, name, build, (), check)


def same_figures(place):
    """Only sound images and weights went in: the run has the figures of the sound run."""
    sound = json.loads((place.shared / "adversarial_eval" / "metrics.json").read_text())
    ours = json.loads((place.out / "metrics.json").read_text())
    assert ours["adversarial_similarity"] == pytest.approx(sound["adversarial_similarity"], abs=5e-3)


def first_twin(folder):
    return folder / json.loads((folder / "metadata.jsonl").read_text().split("\n")[0])["file_name"]


def first_is_red(place):
    """The first adversarial image is of COLOUR, but for the attack."""
    with Image.open(first_twin(place.out)) as twin:
        assert np.abs(np.subtract(twin.getpixel((32, 32)), COLOUR)).max() <= 8 + 6


def files(folder):
    """What a folder holds: a link as its target, a file as its size and time."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_symlink() or path.is_file():
            found[path] = os.readlink(path) if path.is_symlink() else (path.stat().st_size, path.stat().st_mtime_ns)
    return found


def builder(function):
    """function(place, ...) as one of the ... that gives what a case needs, a function of place."""
    return lambda *args, **options: lambda place: function(place, *args, **options)


@builder
def there(place, files):
    """These files lie there, each bytes or what writes it."""
    for name, value in files.items():
        place.file(name).write_bytes(value) if isinstance(value, bytes) else value(place.file(name))


# -- flags

BAD = {  # values that argparse itself must turn down
    (GENERATE, "--alpha"): ["2/0"],
    (GENERATE, "--eps"): ["nan", "-8/255", "0", "8", "1e400", "1/1000", "1/0", "eight", ""],
    (GENERATE, "--steps"): ["nan", "-1", "0", "1e30", "9" * 5000, 10**15],
    (GENERATE, "--batch_size"): ["0", "1.5", "auto"],
    (GENERATE, "--num_images"): ["-1", "all"],
    (GENERATE, "--seed"): ["-1", 2**70],
    (GENERATE, "--num_workers"): ["0", 10**30],
    (GENERATE, "--preset"): ["huge"],
    (GENERATE, "--split"): ["test"],
    (GENERATE, "--step"): ["3"],  # no abbreviations
    (JPEG, "--qualities"): ["0", "96", "best"],
    (EVALUATE, "--checkpoint"): ["a+b=hf-hub:a/b", "x", "=x", "x=", "x=no/such/file", "x=.", "x=no\nsuch"],
    (EVALUATE, "--candidates"): ["all"],
    (MAT, "--lr"): ["nan", "-1", "0", "inf"],
    (MAT, "--epochs"): ["0", 10**15],
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
}


@builder
def flag(place, *words):
    """Words in which {tmp} is the case's folder."""
    return [str(word).format(tmp=place.tmp) for word in words]


CASES = [
    refuses(f"{name} {value!r:.20}", flag(name, value), name, "" if early else value, script=script, parsed=early)
    for early, table in ((True, BAD), (False, UNUSABLE))
    for (script, name), values in table.items()
    for value in values
]
DIVERGE = ["--lr", "1", "--weight_decay", "100", "--max_steps", "60", "--epochs", "60"]
CASES += [
    refuses("eps in grey levels", flag("--eps", "8"), "write 8/255", parsed=True),
    refuses("a tag of QuickGELU", flag("--model", "ViT-L/14", "--pretrained", "openai"), "use --model ViT-L-14-quick"),
    refuses("a tag of GELU", flag("--model", "ViT-L-14-quickgelu", "--pretrained", "laion2b_s32b_b82k"), "not a known"),
    refuses("a folder of no such name", flag("--train_data", "no/such/dir"), "neither a local folder nor", script=MAT),
    refuses("a hub out of reach", flag("--train_data", "some/data"), "some/data", "HF_ENDPOINT", script=MAT),
    refuses("output_dir not UTF-8", flag("--output_dir", "{tmp}/\udcff"), "\\udcff"),
    refuses("row name taken", flag("--checkpoint", "MAT={tmp}/f"), "--checkpoint MAT", script=EVALUATE),
    refuses("num_images huge", flag("--num_images", 10**30), "5 distinct images"),
    refuses("training diverges", flag(*DIVERGE), "is not finite", "lower --lr", script=MAT, late=True),
]

# -- checkpoints and models

SAFETENSORS = TINY / "clip" / "open_clip_model.safetensors"
STATE = load_file(SAFETENSORS)


def tower(state=STATE):
    return {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}


WIDTH, TEXT_LAYERS = len(STATE["visual.class_embedding"]), 2
LAYERS = sum(key.startswith("visual.transformer.resblocks.") and key.endswith(".ln_1.bias") for key in STATE)


def deeper(prefix, layers):
    """The tiny CLIP with the last layer of a tower repeated."""
    last, added = (f"{prefix}transformer.resblocks.{layer}." for layer in (layers - 1, layers))
    return STATE | {key.replace(last, added): value for key, value in STATE.items() if key.startswith(last)}


SHALLOWER = {key: value for key, value in STATE.items() if f"visual.transformer.resblocks.{LAYERS - 1}." not in key}
WIDE = STATE | {"visual.positional_embedding": torch.zeros(17, WIDTH)}
UNRELATED = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).state_dict()
LORA = {"base_model.model.vision_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 128)}


def weights(key=None, change=None, **entries):
    """A checkpoint file of the tiny CLIP after change(tensor), with further entries."""
    return lambda file: torch.save({"state_dict": STATE | {key: change(STATE[key])} if key else STATE} | entries, file)


def content(value):
    return lambda file: file.write_bytes(value) if isinstance(value, bytes) else torch.save(value, file)


def halve(file):
    os.truncate(file, file.stat().st_size // 2)


def code_in(file, up=1, save=torch.save):
    """A file of weights with a command that makes the file ran, so many folders up."""
    touch = os.system, (f"touch '{file.parents[up - 1] / 'ran'}'",)
    save({"state_dict": {"visual.proj": type("Code", (), {"__reduce__": lambda _: touch})()}}, file)


def torchscript(file):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(file))


def safetensors_as_pt(file, **entries):
    save_file(STATE | entries, file)


NONE = "cannot use"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1710540580\n"
OLD = partial(code_in, save=lambda value, file: file.write_bytes(pickle.dumps(value)))
NEXT = f"transformer.resblocks.{LAYERS}.attn.in_proj_bias is [{3 * WIDTH}], not in"
MISSING = f"transformer.resblocks.{LAYERS - 1}.ln_1.weight is missing, not [{WIDTH}]"
FILES = {  # name of the file -> (how it is written, what is said)
    "code.pt": (code_in, "code"),
    "code.safetensors": (OLD, "code"),
    "object.pt": (content({"state_dict": STATE, "args": SimpleNamespace()}), "not plain tensors"),
    "cut.pt": (lambda file: (weights()(file), halve(file)), "damaged"),
    "cut.safetensors": (lambda file: (shutil.copy(SAFETENSORS, file), halve(file)), NONE),
    "text.pt": (content(b"<html>404</html>\n"), "damaged"),
    "pointer.pt": (content(LFS), "it is a Git LFS pointer, not the weights: git lfs pull"),
    "script.pt": (torchscript, "it is a TorchScript archive, like OpenAI's, and holds code: use --pretrained openai"),
    "long_header.safetensors": (content(struct.pack("<Q", 2**60) + b"{}"), NONE),
    "empty.pt": (content({"epoch": 3, "state_dict": {}}), "it holds no tensors"),
    "tensor.pt": (content(torch.zeros(3)), "it holds a Tensor, not a dictionary"),
    "foreign.pt": (content(UNRELATED), "it holds 7 tensors, such as 0.weight, and none of the model's"),
    "lora.pt": (content(LORA), "merge"),
    "narrow.pt": (weights("visual.proj", lambda value: value[:, :64]), f"visual.proj is [{WIDTH}, 64], not [{WIDTH},"),
    "wide.pt": (content({"model": WIDE}), f"1 of {len(STATE)} keys do not fit: visual.positional_embedding is [17, "),
    "wide_tower.pt": (content(tower(WIDE)), "another input size"),
    "other_text.pt": (weights("positional_embedding", lambda x: x[:, :32]), "input size"),
    "other_words.pt": (weights("token_embedding.weight", lambda x: x[:9]), "token_embedding.weight is [9, 64]"),
    "no_scale.pt": (content({key: STATE[key] for key in STATE if key != "logit_scale"}), "but no logit_scale"),
    "deeper.pt": (content(deeper("visual.", LAYERS)), f"visual.{NEXT}"),
    "deeper_tower.pt": (content(tower(deeper("visual.", LAYERS))), NEXT),
    "deeper_text.pt": (content(deeper("", TEXT_LAYERS)), "transformer.resblocks.2.attn.in_proj_bias is [192], not in"),
    "shallower.pt": (content(SHALLOWER), f"visual.{MISSING}"),
    "shallower_tower.pt": (content(tower(SHALLOWER)), MISSING),
    "registers.pt": (content(tower() | {"register_tokens": torch.zeros(4, WIDTH)}), "register_tokens is [4, "),
    "normalised.pt": (content(STATE | {"normalize.mean": torch.zeros(3)}), "normalize.mean is [3], not in the model"),
    "long.ckpt": (partial(safetensors_as_pt, positional_embedding_res=torch.zeros(9)), "positional_embedding_res is"),
    "nan.pt": (weights("visual.proj", lambda value: value * torch.nan), "finite"),
    "tower.pt": (content(tower()), "evaluate.py --checkpoint NAME="),
}
ROWS = ["code.pt", "cut.safetensors", "text.pt", "foreign.pt", "nan.pt"]  # that evaluate.py is given as a row, too
CONFIGS = {  # what of the configuration is replaced -> by what
    r"(?s)^.*$": "[]",
    r"(?s)^(.{200}).*$": r"\1",
    '"vision_cfg"': '"no_cfg"',
    r'"width": \d+': '"width": "wide"',
    r'"context_length": \d+': '"context_length": 1099511627776',
}


@builder
def weights_flag(place, script, name, write):
    write(place.tmp / name)
    place.request.addfinalizer((place.tmp / name).unlink)  # megabytes each
    return ["--checkpoint", f"other={place.tmp / name}"] if script == EVALUATE else ["--pretrained", place.tmp / name]


def weights_case(script, name, write, *said, **options):
    return Case(script, f"weights {name}", weights_flag(script, name, write), said, **options)


@builder
def model_folder(place, old="", new=""):
    """--model local-dir: with a changed configuration; with none, of weights that are a pickle with code."""
    folder = shutil.copytree(TINY / "clip", place.tmp / "clip")
    config = folder / "open_clip_config.json"
    config.write_text(re.sub(old, new, config.read_text(), count=1))
    if not old:
        (folder / "open_clip_model.safetensors").unlink()
        code_in(folder / "open_clip_pytorch_model.bin", up=2)
    return ["--model", f"local-dir:{folder}"]


CASES += [weights_case(GENERATE, name, write, name, said) for name, (write, said) in FILES.items()]
CASES += [weights_case(EVALUATE, f"other_{name}", FILES[name][0], "other", FILES[name][1]) for name in ROWS]
CASES += [refuses(f"model folder, {new!r}", model_folder(old, new), "local-dir:") for old, new in CONFIGS.items()]
CASES += [
    refuses("model folder, code", model_folder(), "clip/open_clip_pytorch_model.bin", "code"),
    weights_case(GENERATE, "sound.safetensors", partial(shutil.copy, SAFETENSORS), check=same_figures),
    weights_case(GENERATE, "safetensors.ckpt", partial(shutil.copy, SAFETENSORS), check=same_figures),
    weights_case(GENERATE, "fp64.pt", content({key: x.double() for key, x in STATE.items()}), check=same_figures),
    weights_case(EVALUATE, "tower.pt", content(tower()), check=finished),
    weights_case(GENERATE, "big.pt", weights("visual.ln_post.weight", lambda x: x.float() * 1e38), "finite", late=True),
    weights_case(GENERATE, "loud.pt", weights("text_projection", lambda x: x.float() * 1e38), "captions", late=True),
    weights_case(EVALUATE, "leaked.pt", weights(train_ids=[357100]), "leakage: other"),
]

# -- rows and zips


def pack(file, members, **options):
    """Write (name, bytes) pairs as a zip."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name that comes twice
        with zipfile.ZipFile(file, "w", **options) as archive:
            for name, data in members:
                archive.writestr(name, data)


@builder
def first_member(place, change, **options):
    """The zip with its first member replaced by the pairs change(name, bytes)."""
    with zipfile.ZipFile(place.zip) as archive:
        first, *rest = ((name, archive.read(name)) for name in archive.namelist())
    pack(place.zip, [*change(*first), *rest], **options)


@builder
def column(place, change, name="qry_img_path"):
    """The parquet with change([values]) in place of a column."""
    columns = pq.read_table(place.parquet).to_pydict()
    pq.write_table(pa.table(columns | {name: change(columns[name])}), place.parquet)


def edit(change, name="qry_img_path"):
    """The first value of a column changed: change(value) or a constant."""
    return column(lambda values: [change(values[0]) if callable(change) else change, *values[1:]], name)


def not_utf8(values):
    return pa.array([value.encode() + b"\xff\xed\xa0\x80" for value in values], pa.binary()).view(pa.string())


def row_path(path):
    """The first row names the image STRANGER, which lies outside the data folder, as {outside}/NAME or otherwise."""
    return lambda place: edit(path.format(outside=place.outside, name=STRANGER))(place)


def link(name, target):
    """The first row names an image that is there by a link out of the data folder."""
    return lambda place: edit(STRANGER)(place) or (place.data / name).symlink_to(place.outside / target)


def as_in_the_hubs_cache(place):
    """Every file is a link into a folder of blobs beside it."""
    (place.tmp / "blobs").mkdir()
    for i, file in enumerate(sorted(path for path in place.data.rglob("*") if path.is_file())):
        file.symlink_to(file.rename(place.tmp / "blobs" / str(i)))


@builder
def stamp(place, local, central, kind, value):
    """Set a field of the first member, in its own header and in the zip's directory."""
    data = bytearray(place.zip.read_bytes())
    struct.pack_into(kind, data, data.index(b"PK\3\4") + local, value)
    struct.pack_into(kind, data, data.index(b"PK\1\2") + central, value)
    place.zip.write_bytes(data)


def bomb(place, claimed=60 * 2**20):
    """The first member unpacks to 60 MB of zeros, whatever its headers say."""
    zeros = first_member(lambda name, data: [(name, bytes(60 * 2**20))], compression=zipfile.ZIP_DEFLATED)
    zeros(place), stamp(22, 24, "<I", claimed)(place)

    def little_memory():
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 50e6

    tracemalloc.start()
    place.request.addfinalizer(little_memory)


DATA, HERE, BROKEN = "--eval_data", "COCO_val2014_", ("COCO_val2014_", "broken image")
PATHS = ["../outside/{name}", "MSCOCO_i2t/../../outside/{name}", "{outside}/{name}", "\x1b[2J\a/{name}", "a\0b/{name}"]
CASES += [refuses(f"row path {path!r}", row_path(path), STRANGER) for path in PATHS]
PATHS = ["..\\outside\\{name}", f"COCO_val2014_{'9' * 5000}.jpg", f"COCO_val2014_{chr(0x663) * 12}.jpg", "", ".."]
CASES += [refuses(f"row path {path[:20]!r}", row_path(path), DATA, "row 0") for path in PATHS]
CASES += [
    refuses("row path too long", row_path("a" * 5000 + "/{name}"), DATA, "aaaa"),
    refuses("row path None", edit(None), "row 0"),
    refuses("row path a list", column(lambda paths: [[path] for path in paths]), "row 0"),
    refuses("row path not UTF-8", column(not_utf8), DATA, "utf-8"),
    refuses("no path", lambda p: pq.write_table(pq.read_table(p.parquet, columns=["tgt_text"]), p.parquet), "img_path"),
    refuses("linked image", link(STRANGER, STRANGER), STRANGER),
    refuses("linked folder", link("linked", ""), STRANGER),
    copes("links of the hub's cache", as_in_the_hubs_cache, same_figures),
    refuses("image_root without images", flag("--image_root", "{tmp}/out"), DATA, HERE),
    refuses("no parquet file", lambda place: place.parquet.rename(place.tmp / "x"), DATA, "no parquet file"),
    copes("code in the data folder", there({"MMEB-eval/MMEB-eval.py": b"open('ran', 'w')"}), same_figures),
    refuses("parquet cut", lambda place: os.truncate(place.parquet, 300), DATA),
    copes("member twice", first_member(lambda name, data: [(name, data), (name, picture())]), first_is_red),
    refuses("AppleDouble alone", first_member(lambda name, data: [(name.replace("COCO", "._COCO"), data)]), HERE),
    copes("member climbs out", first_member(lambda name, data: [(f"../../{name}", data)]), same_figures),
    refuses("member encrypted", stamp(6, 8, "<H", 1), "encrypted", HERE),
    refuses("member of unknown compression", stamp(8, 10, "<H", 97), "compression", HERE),
    refuses("member with a bad CRC", stamp(14, 16, "<I", 7), "CRC", HERE),
    refuses("zip cut", lambda place: halve(place.zip), "images.zip"),
    refuses("zip bomb", bomb, HERE),
    refuses("zip bomb that claims little", partial(bomb, claimed=1000), HERE),
    copes("zip member that claims 4 GB", stamp(22, 24, "<I", 2**32 - 2), same_figures),
]

# -- images and captions


def one_line_each(value, place):
    """metadata.jsonl has a line for each image, by every definition of a line, and gives the caption back."""
    lines = (place.out / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 4 and json.loads(lines[0])["caption"] == value.strip()
    run(JPEG, place.words(JPEG, ["--adversarial_dir", place.out, "--output_dir", place.tmp / "jpeg"]))


def texts(*first):
    """The first row's captions."""
    return edit(lambda texts: [*first, *texts[len(first) :]] if first else [], "tgt_text")


def image(data):
    """The first image of the zip replaced."""
    return first_member(lambda name, _: [(name, data)])


LARGE = picture(kind="GIF")[:6] + b"\xff" * 4 + picture(kind="GIF")[10:]
DAMAGED = [b"", b"<!DOCTYPE html><title>404</title>", picture()[:300], picture(kind="TIFF"), picture(kind="EPS")]
CASES += [refuses(f"image {data[:15]}", image(data), *BROKEN) for data in DAMAGED]
SOUND = [{"mode": "CMYK"}, {"mode": "P", "kind": "PNG", "transparency": 0}, {"mode": "RGBA", "kind": "PNG"}]
SOUND += [{"mode": "P", "kind": "GIF"}, {"size": (1, 1)}, {"size": (2000, 50)}]
CASES += [copes(f"image of {options}", image(picture(**options)), first_is_red) for options in SOUND]
TEXT = (DATA, "row 0", "tgt_text")
STRANGE = {
    "of 10,000 characters": "a red ring " * 909 + "x",
    "with emoji": "A \U0001f468\u200d\U0001f469\u200d\U0001f467 in front of \U0001f3f4\U000e0067\U000e007f.",
    "right to left": "\u202eخاتم أحمر على يمين نجمة זרקא\u202c",
    "with control characters": "a\x00b\nc\r\nd\x1b[2Je\x0bf\x1cg\x85h\u2028i\u2029j\ufeff\ufffe",
    "of JSON": '{"file_name": "../../x.png"}\\" ,',
}
CASES += [copes(f"caption {name}", texts(text), partial(one_line_each, text)) for name, text in STRANGE.items()]
CASES += [refuses(f"caption {text!r}", texts(text), *TEXT) for text in ("", None, " \t\n\u2003\u00a0")]
CUT = first_member(lambda name, data: [(name, data[: len(data) // 2])])
CASES += [
    refuses("image cut in its data", CUT, *BROKEN, "truncated"),
    copes("broken image left out", lambda place: CUT(place) or ["--skip_bad_images"], partial(finished, count=3)),
    refuses("image claims 65535 x 65535", image(LARGE), *BROKEN, "65535 x 65535"),
    refuses("image 16 bit", image(encoded(Image.new("I;16", (96, 80)))), *BROKEN, "8 bits"),
    refuses("image 10000 x 2", image(picture(size=(10_000, 2))), *BROKEN, "10000 x 2"),
    refuses("captions an empty list", texts(), *TEXT),
    refuses("captions numbers", column(lambda lists: [[1, 2] for _ in lists], "tgt_text"), *TEXT),
    refuses("candidate None", texts("own", None), *TEXT, script=EVALUATE),
    refuses("candidates one each", column(lambda x: [t[:1] for t in x], "tgt_text"), "captions", script=EVALUATE),
]

# -- adversarial folders, and what an earlier run left


def linked_twin(place):
    twin = first_twin(place.adversarial)
    twin.symlink_to(twin.rename(place.adversarial / "x"))


@builder
def twin(place, change, checksum=True):
    """The first twin's bytes after change(bytes); checksum: metadata.jsonl has that of the new ones."""
    file, old = place.file(LIST), first_twin(place.adversarial).read_bytes()
    first_twin(place.adversarial).write_bytes(new := change(old))
    if checksum:
        sums = (hashlib.sha256(data).hexdigest() for data in (old, new))
        file.write_text(file.read_text().replace(*sums))


@builder
def replaced(place, name, old, new):
    """A file after one replacement."""
    place.file(name).write_text(re.sub(old, new, place.file(name).read_text(), count=1))


def one_pixel(place):
    """A twin of 1 x 1 pixels would broadcast against a clean image of one colour, and be in the ball."""
    image(picture())(place), twin(lambda _: picture(kind="PNG", size=(1, 1)))(place)


@builder
def left(place, change, script=GENERATE, words=()):
    """A run was killed at its end, and change(file) damaged what it left."""
    with place.monkeypatch.context() as patch, suppress(SystemExit):
        patch.setattr(common.Run, "finish", Mock(side_effect=KeyboardInterrupt))
        run(script, place.words(script, [*words]))
    for image in place.out.glob("images/*"):
        image.unlink()  # they are attacked again where the part does not count
    change(next(place.out.glob("parts/*.pt")))
    return [*words]


def flip(file):
    data = bytearray(file.read_bytes())
    data[data.index(b"adversarial_similarity") + 26] ^= 255  # in a number, which stays one
    file.write_bytes(data)


def cut_row(place):
    run(EVALUATE, place.words(EVALUATE))
    halve(next(place.out.glob("rows/*")))


@builder
def trained(place, weights=None, **args):
    """A training of the same model beside evaluate.py's folder, with other args or none, and its weights."""
    record = json.loads((place.shared / MADE).read_text())
    flags = vars(importlib.import_module(MAT).parse_args(["--preset", "tiny", "--steps", "1"])) | args
    identity = flags | {"script": f"{MAT}.py", "model": record["identity"]["model"]}
    record |= {"training_seconds": 1, "args": flags, "identity": identity}
    config = (TINY / "clip" / "open_clip_config.json").read_bytes()
    model = {WEIGHTS: weights, "mat/open_clip_config.json": config} if weights else {}
    there({name: json.dumps(record).encode() for name in (TRAINED, "mat/run.json")} | model)(place)


@builder
def training_record(place, value):
    """A training whose metrics.json is damaged."""
    trained(content(STATE))(place)
    place.file(TRAINED).write_bytes(value)


RECORDS = [b'{"args": {', b"\xff\xfe{}", b"{}", b"[]", b"[" * 100_000]
KEPT = ["--save_every", "0", "--max_steps", "2", "--epochs", "2"]


jpeg_refuses, evaluate_refuses = partial(refuses, script=JPEG), partial(refuses, script=EVALUATE)
for value in RECORDS:
    CASES.append(jpeg_refuses(f"adversarial record {value[-40:]}", there({MADE: value}), "_eval: run.json is damaged"))
    CASES.append(refuses(f"own run {value[-40:]}", there({BEGUN: value}), "out: run.json is damaged"))
CASES += [evaluate_refuses(f"training {value[-40:]}", training_record(value), "metrics.json") for value in RECORDS[:2]]
TWINS = [b"", b"<html>", picture(kind="GIF"), picture(kind="PNG")]  # the last of another size
CASES += [jpeg_refuses(f"twin {data[:12]}", twin(lambda _, data=data: data), PNG) for data in TWINS]
CASES += [
    jpeg_refuses("twin altered inside the ball", twin(lambda data: data + b"\0", False), PNG, "altered"),
    evaluate_refuses("twin altered inside the ball", twin(lambda data: data + b"\0", False), PNG, "altered"),
    jpeg_refuses("metadata missing", lambda place: place.file(LIST).unlink(), "has 0 of the 4 images"),
    jpeg_refuses("metadata damaged", there({LIST: b'{"file_name": 3}'}), f"{LIST} is damaged"),
    jpeg_refuses("metadata of another caption", replaced(LIST, '"caption": "', '"caption": "x'), PNG, "another data"),
    jpeg_refuses("file_name out of the folder", replaced(LIST, "images/", "../../../etc/"), "it has 3 of the 4 images"),
    copes("twin linked", linked_twin, script=JPEG),
    jpeg_refuses("twins missing", lambda place: shutil.rmtree(place.adversarial / "images"), "has 0 of the 4 images"),
    jpeg_refuses("twin of another", lambda p: shutil.copy(*sorted(p.adversarial.glob("*/*"))[:2]), PNG, "altered"),
    jpeg_refuses("twin of one pixel", one_pixel, PNG),
    jpeg_refuses("twin outside the ball", twin(inverted), PNG, "ball"),
    jpeg_refuses("made with another eps", replaced(MADE, r'"eps": [\d.]+', '"eps": 0.1'), "--eps 0.1, not 8/255"),
    copes("made with another alpha", replaced(MADE, r'"alpha": [\d.]+', '"alpha": 0.1'), script=JPEG),  # it is noted
    jpeg_refuses("made of another model", replaced(MADE, '"model": "', '"model": "x'), "another model"),
    copes("part cut", left(halve), same_figures),
    copes("part with a byte changed", left(flip), same_figures),
    copes("part with code", left(partial(code_in, up=3)), same_figures),
    copes("state of a training cut", left(halve, MAT, KEPT), script=MAT),
    evaluate_refuses("row cut", cut_row, "rows/original-", "is damaged: remove it"),
    evaluate_refuses("training without weights", trained(), "open_clip_config.json"),
    evaluate_refuses("training with code", trained(partial(code_in, up=2)), WEIGHTS, "code"),
    evaluate_refuses("training of another eps", trained(content(STATE), eps=0.1), "--eps 0.1, not 8/255", "mat"),
    refuses("online and offline", flag("--online_steps", 1), "--adversarial_dir", script=PGD),
]


@pytest.mark.parametrize("case", CASES, ids=[f"{case.script}, {case.name}" for case in CASES])
def test_hostile_input(case, shared, tmp_path, request, monkeypatch, capsys, recwarn):
    for module in ("common", "evaluate"):
        monkeypatch.setattr(f"{module}.load_clip", load_once)
    for figure in ("examples", "cosines"):  # seconds, and nothing hostile in them
        monkeypatch.setattr(f"evaluate.draw_{figure}", lambda *_: None)
    place = Place(shared, tmp_path, request, monkeypatch)
    words = place.words(case.script, case.build(place))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [f"{case.script}.py", *words])
    before, finished_run = files(tmp_path), place.out / "metrics.json"
    capsys.readouterr()
    recwarn.clear()
    if case.said:
        parse = importlib.import_module(case.script).parse_args
        line = refusal(capsys, *((parse, words) if case.parsed else (run, case.script, words)))
        assert line.startswith(f"{case.script}.py: error: ") and line.isprintable()
        assert all(said.format(tmp=tmp_path) in line for said in case.said) and ".arrow" not in line, line
        assert not case.name.startswith("weights") or len(line.replace(f"{tmp_path}/", "")) <= 200, line
        if case.late:
            assert not finished_run.exists() and (place.out / "keep.txt").read_text() == "not ours"
        else:
            assert files(tmp_path) == before
    else:
        run(case.script, words)
    assert not place.ran.exists(), "code from a file was run"
    unseen = DeprecationWarning, PendingDeprecationWarning, ResourceWarning, ImportWarning
    assert not [str(shown.message) for shown in recwarn if not issubclass(shown.category, unseen)]
    if case.check:
        case.check(place)


def denied(function, folder):
    """The function as it is for a user without rights in the folder; the tests may run as root, who has them."""

    def call(path, *args, **options):
        if str(path).startswith(str(folder)):
            raise PermissionError(13, "Permission denied", str(path))
        return function(path, *args, **options)

    return call


@pytest.mark.parametrize("what", ["file", "folder"])
@pytest.mark.parametrize(("script", "words"), [(GENERATE, "--pretrained {}"), (EVALUATE, "--checkpoint x={}")])
def test_weights_that_may_not_be_read_are_one_line(script, words, what, shared, tmp_path, request, monkeypatch, capsys):
    file = tmp_path / "locked" / "weights.pt"
    file.parent.mkdir()
    file.write_bytes(SAFETENSORS.read_bytes())
    words = Place(shared, tmp_path, request, monkeypatch).words(script, words.format(file).split())
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", denied(open, file.parent))
        if what == "folder":
            patch.setattr("os.stat", denied(os.stat, file.parent))
        line = refusal(capsys, run, script, words)
    assert str(file) in line and "resumes" not in line and ("Permission denied" in line or "can be read" in line)


# -- fuzz: whatever rows and a metadata.jsonl hold, they are read as they stand or refused in one line

configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")  # not in the checkout
FEW = {"derandomize": True, "database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}
WORD = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
SOUND_PATH = st.builds("{}/COCO_{}2014_{:012d}.jpg".format, WORD, st.sampled_from(["train", "val"]), st.integers(0, 3))
ANY_PATH = SOUND_PATH | st.builds("{}{}".format, SOUND_PATH, WORD) | WORD | st.none()
CAPTIONS = st.lists(WORD.map("a{}".format), min_size=1, max_size=2)
ANY_CAPTIONS = st.none() | st.lists(WORD | st.none(), max_size=3)


def outcome(function, *args):
    """What it returns, and the one line with which it ended otherwise."""
    with redirect_stderr(io.StringIO()) as said:
        try:
            return function(*args), None
        except SystemExit as end:
            (line,) = said.getvalue().splitlines()
            assert end.code == 2 and re.match(r"\S+: error: .", line) and line.isprintable()
            return None, line


@settings(max_examples=60, **FEW)
@given(st.lists(st.tuples(SOUND_PATH, CAPTIONS), min_size=1), st.lists(st.tuples(ANY_PATH, ANY_CAPTIONS), max_size=1))
def test_rows_are_read_as_they_stand_or_refused_in_one_line(sound, other):
    with tempfile.TemporaryDirectory() as folder:
        paths, captions = zip(*sound, *other)
        columns = {"qry_img_path": pa.array(paths, pa.string()), "tgt_text": pa.array(captions, pa.list_(pa.string()))}
        pq.write_table(pa.table(columns), Path(folder) / "rows.parquet")
        rows, line = outcome(common.read_rows, SimpleNamespace(eval_data=folder), "eval")
    assert not line or (other and folder in line)
    ids = [] if line else [int(re.search(r"([0-9]+)\.jpe?g/*$", path)[1]) for path in paths]
    assert [row.coco_id for row in rows or ()] == [*dict.fromkeys(ids)]
    for row in rows or ():
        i = ids.index(row.coco_id)
        assert row.path == paths[i] and row.candidates == [text.strip() for text in captions[i]]


JSON = st.recursive(st.none() | st.integers() | st.floats() | WORD, lambda x: st.lists(x) | st.dictionaries(WORD, x))


@settings(max_examples=100, **FEW)
@given(st.integers(0, 2), st.tuples(st.sampled_from(["source", "sha256"]), JSON) | JSON | st.binary(max_size=8))
def test_a_line_of_metadata_changes_no_twin_or_is_refused_in_one_line(at, change):
    clean = np.arange(3 * 3 * 8 * 8, dtype=np.uint8).reshape(3, 3, 8, 8)
    names, captions, sources = (["0", "1", "2"], [["c0"], ["c1"], ["c2"]], ["s0", "s1", "s2"])
    images = common.Images(clean, names, captions, captions, [None] * 3, names, sources)
    with tempfile.TemporaryDirectory() as name:
        folder, lines = Path(name), []
        (folder / "images").mkdir()
        for i, pixels in enumerate(clean):
            data = encoded(Image.fromarray(pixels.transpose(1, 2, 0) ^ 1))
            (folder / generate.image_file(f"{i}")).write_bytes(data)
            about = {"file_name": f"images/{i}.png", "caption": f"c{i}", "source": f"s{i}", "linf": 1}
            about |= {"clean_similarity": 0.5, "adversarial_similarity": 0.1}
            lines.append(about | {"sha256": hashlib.sha256(data).hexdigest()})
        lines[at] = lines[at] | {change[0]: change[1]} if isinstance(change, tuple) else change
        lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        (folder / "metadata.jsonl").write_bytes(b"\n".join(lines))
        try:
            found = generate.read_folder(folder, images, 8 / 255)
        except ValueError as error:
            found, said = {}, str(error)
            assert "metadata.jsonl is damaged" in said or "images/" in said
    assert all((pixels == clean[i] ^ 1).all() for i, pixels in found.items())
