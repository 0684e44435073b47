"""Hostile input: a script ends in one line that says what and where, or copes; no code runs, nothing is lost."""

import hashlib
import importlib
import io
import json
import os
import re
import shutil
import struct
import tempfile
import tracemalloc
import warnings
import zipfile
from contextlib import redirect_stderr, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

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
from test_containers import CONFIG
from test_models import load, tower_of

import common
import evaluate
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
LIST, PNG = "adversarial_eval/metadata.jsonl", "images/000000"
ZIP, PARQUET = "MMEB-eval/images.zip", "MMEB-eval/MSCOCO_i2t/test.parquet"


def command(script, folder, *words):
    """The words of a script for the sound data in a folder, and further ones; it writes to out."""
    data = ["--train_data", folder / "MMEB-train", "--eval_data", folder / "MMEB-eval", "--output_dir", folder / "out"]
    if script in (PGD, JPEG, EVALUATE):
        split = "train" if script == PGD else "eval"
        data += ["--adversarial_dir", folder / f"adversarial_{split}"]
    sizes = ["--preset", "tiny", "--device", "cpu", "--num_images", 4, "--steps", 1, "--num_workers", 2]
    return [str(word) for word in [*sizes, *data, *WORDS[script], *words]]


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
    """A few rows of both data sets, and adversarial images of them, all of them sound; and two files of the user's."""
    root = tmp_path_factory.mktemp("hostile")
    for split, count in (("train", 8), ("eval", 5)):
        name, column, *_ = common.SPLITS[split]
        source, folder = TINY / f"MMEB-{split}", root / f"MMEB-{split}"
        (folder / "MSCOCO_i2t").mkdir(parents=True)
        (file,) = (source / "MSCOCO_i2t").glob(f"{name}-*")
        rows = [row for row in pq.read_table(file).to_pylist() if split == "eval" or "train2014" in row[column]][:count]
        pq.write_table(pa.Table.from_pylist(rows), folder / "MSCOCO_i2t" / "test.parquet")
        with zipfile.ZipFile(next(source.rglob("*.zip"))) as archive:
            found = common.match_files([row[column] for row in rows], archive.namelist())
            pack(folder / "images.zip", [(name, archive.read(name)) for (name,) in found.values()])
        run(GENERATE, command(GENERATE, root, "--split", split, "--output_dir", root / f"adversarial_{split}"))
    for name, content in {"f": b"a file", "out/keep.txt": b"not ours", f"outside/{STRANGER}": picture()}.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)
    return root


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
    assert json.loads((place / "out" / "metrics.json").read_text(), parse_constant=pytest.fail)["n"] == count


def copes(name, build, check=finished, script=GENERATE):
    return Case(script, name, build, (), check)


def same_figures(place):
    """Only sound images and weights went in: the run has the figures of the sound run."""
    sound = json.loads((place / "adversarial_eval" / "metrics.json").read_text())
    ours = json.loads((place / "out" / "metrics.json").read_text())
    assert ours["adversarial_similarity"] == pytest.approx(sound["adversarial_similarity"], abs=5e-3)


def first_twin(folder):
    return folder / json.loads((folder / "metadata.jsonl").read_text().split("\n")[0])["file_name"]


def first_is_red(place):
    """The first adversarial image is of COLOUR, but for the attack."""
    with Image.open(first_twin(place / "out")) as twin:
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
def there(place, name, data):
    """A file with these bytes lies there."""
    (place / name).write_bytes(data)


STATE = load_file(TINY / "clip" / "open_clip_model.safetensors")

# -- flags

BAD = {  # values that argparse itself must turn down
    (GENERATE, "--eps"): ["nan", "1/1000", "1/0", "eight"],
    (GENERATE, "--steps"): ["0", 10**15],
    (GENERATE, "--batch_size"): ["0"],
    (GENERATE, "--num_images"): ["0"],
    (GENERATE, "--seed"): ["-1", 2**70],
    (GENERATE, "--num_workers"): ["0"],
    (GENERATE, "--step"): ["3"],  # no abbreviations
    (JPEG, "--qualities"): ["0", "96"],
    (EVALUATE, "--checkpoint"): ["a+b=hf-hub:a/b", "x", "=x", "x=no/such/file", "x=."],
    (MAT, "--lr"): ["nan", "0"],
    (MAT, "--epochs"): ["0"],
}
UNUSABLE = {  # what is found out later; {tmp}/f is a file
    (GENERATE, "--device"): ["abacus", "cuda:99"],
    (GENERATE, "--model"): ["ViT-Z-99", "local-dir:{tmp}/none"],
    (GENERATE, "--pretrained"): ["{tmp}/none.pt", "{tmp}"],
    (GENERATE, "--output_dir"): ["{tmp}/f", "{tmp}/" + "a" * 300, ""],
    (GENERATE, "--image_root"): ["{tmp}/none"],
    (MAT, "--train_data"): ["no folder, no id", "{tmp}/f"],
    (EVALUATE, "--adversarial_dir"): ["{tmp}/none"],
}


@builder
def flag(place, *words):
    """Words in which {tmp} is the case's folder."""
    return [str(word).format(tmp=place) for word in words]


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


def weights(key=None, change=None, **entries):
    """A checkpoint file of the tiny CLIP after change(tensor), with further entries."""
    return content({"state_dict": STATE | {key: change(STATE[key])} if key else STATE} | entries)


def content(value):
    return lambda file: file.write_bytes(value) if isinstance(value, bytes) else torch.save(value, file)


def halve(file):
    os.truncate(file, file.stat().st_size // 2)


def code_in(file, up=1, save=torch.save):
    """A file of weights with a command that makes the file ran, so many folders up."""
    touch = os.system, (f"touch '{file.parents[up - 1] / 'ran'}'",)
    save({"state_dict": {"visual.proj": type("Code", (), {"__reduce__": lambda _: touch})()}}, file)


def old_format(file):
    code_in(file, save=partial(torch.save, _use_new_zipfile_serialization=False))


def torchscript(file):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(file))


@builder
def weights_case(place, write, row=False):
    write(place / "w.pt")
    return ["--checkpoint", f"other={place / 'w.pt'}"] if row else ["--pretrained", place / "w.pt"]


@builder
def model_folder(place, old="", new=""):
    """--model local-dir: with a changed configuration; with none, of weights that are a pickle with code."""
    folder = shutil.copytree(TINY / "clip", place / "clip")
    config = folder / "open_clip_config.json"
    config.write_text(re.sub(old, new, config.read_text(), count=1))
    if not old:
        (folder / "open_clip_model.safetensors").unlink()
        code_in(folder / "open_clip_pytorch_model.bin", up=2)
    return ["--model", f"local-dir:{folder}"]


HUGE = weights_case(weights("visual.ln_post.weight", lambda x: x.float() * 1e38))
HUGE_TEXT = weights_case(weights("text_projection", lambda x: x.float() * 1e38))
CASES += [
    refuses("model folder, a list", model_folder(r"(?s)^.*$", "[]"), "local-dir:"),
    refuses("model folder, huge", model_folder(r'"context_length": \d+', f'"context_length": {2**40}'), "local-dir:"),
    refuses("model folder, code", model_folder(), "clip/open_clip_pytorch_model.bin", "code"),
    refuses("weights, code", weights_case(code_in), "w.pt: it holds code"),
    refuses("weights, huge", HUGE, "finite", late=True),
    refuses("weights, huge text", HUGE_TEXT, "captions", late=True),
    refuses("weights, leaked", weights_case(weights(train_ids=[357100]), True), "leakage: other", script=EVALUATE),
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
    with zipfile.ZipFile(place / ZIP) as archive:
        first, *rest = ((name, archive.read(name)) for name in archive.namelist())
    pack(place / ZIP, [*change(*first), *rest], **options)


@builder
def column(place, change, name="qry_img_path"):
    """The parquet with change([values]) in place of a column."""
    columns = pq.read_table(place / PARQUET).to_pydict()
    pq.write_table(pa.table(columns | {name: change(columns[name])}), place / PARQUET)


def edit(change, name="qry_img_path"):
    """The first value of a column changed: change(value) or a constant."""
    return column(lambda values: [change(values[0]) if callable(change) else change, *values[1:]], name)


def not_utf8(values):
    return pa.array([value.encode() + b"\xff\xed\xa0\x80" for value in values], pa.binary()).view(pa.string())


def row_path(path):
    """The first row names the image STRANGER, which lies outside the data folder, as {outside}/NAME or otherwise."""
    return lambda place: edit(path.format(outside=place / "outside", name=STRANGER))(place)


def link(name, target):
    """The first row names an image that is there by a link out of the data folder."""
    return lambda place: edit(STRANGER)(place) or (place / "MMEB-eval" / name).symlink_to(place / "outside" / target)


def as_in_the_hubs_cache(place):
    """Every file is a link into a folder of blobs beside it."""
    (place / "blobs").mkdir()
    for i, file in enumerate(sorted((place / "MMEB-eval").rglob("*.*"))):
        file.symlink_to(file.rename(place / "blobs" / str(i)))


def bad_crc(place):
    """The checksum of the first member, in its own header and in the zip's directory, is another."""
    data = bytearray((place / ZIP).read_bytes())
    struct.pack_into("<I", data, data.index(b"PK\3\4") + 14, 7)
    struct.pack_into("<I", data, data.index(b"PK\1\2") + 16, 7)
    (place / ZIP).write_bytes(data)


def bomb(place):
    """The first member unpacks to a small image and 60 MB of zeros behind it."""
    first_member(lambda name, data: [(name, data + bytes(60 * 2**20))], compression=zipfile.ZIP_DEFLATED)(place)
    tracemalloc.start()


def little_memory(place):
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


DATA, HERE, BROKEN = "--eval_data", "COCO_val2014_", ("COCO_val2014_", "broken image")
PATHS = ["../outside/{name}", "{outside}/{name}", "\x1b[2J\a/{name}", "a\0b/{name}"]
CASES += [refuses(f"row path {path!r}", row_path(path), STRANGER) for path in PATHS]
PATHS = [f"COCO_val2014_{'9' * 5000}.jpg", f"COCO_val2014_{chr(0x663) * 12}.jpg", ""]
CASES += [refuses(f"row path {path[:20]!r}", row_path(path), DATA, "row 0") for path in PATHS]
CASES += [
    refuses("row path not UTF-8", column(not_utf8), DATA, "utf-8"),
    refuses("no path", lambda p: pq.write_table(pa.table({"tgt_text": ["x"]}), p / PARQUET), "img_path"),
    refuses("linked image", link(STRANGER, STRANGER), STRANGER),
    refuses("linked folder", link("linked", ""), STRANGER),
    copes("links of the hub's cache", as_in_the_hubs_cache, same_figures),
    refuses("no parquet file", lambda place: (place / PARQUET).rename(place / "x"), DATA, "no parquet file"),
    refuses("parquet cut", lambda place: os.truncate(place / PARQUET, 300), DATA),
    copes("member climbs out", first_member(lambda name, data: [(f"../../{name}", data)]), same_figures),
    refuses("member with a bad CRC", bad_crc, "CRC", HERE),
    refuses("zip cut", lambda place: halve(place / ZIP), "images.zip"),
    refuses("zip bomb", bomb, *BROKEN, "more than 20 MB", check=little_memory),
]

# -- images and captions


def one_line_each(value, place):
    """metadata.jsonl has a line for each image, by every definition of a line, and gives the caption back."""
    lines = (place / "out" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 4 and json.loads(lines[0])["caption"] == value.strip()
    run(JPEG, command(JPEG, place, "--adversarial_dir", place / "out", "--output_dir", place / "jpeg"))


def texts(*first):
    """The first row's captions."""
    return edit(lambda texts: [*first, *texts[len(first) :]] if first else [], "tgt_text")


def image(data):
    """The first image of the zip replaced."""
    return first_member(lambda name, _: [(name, data)])


HALF = first_member(lambda name, data: [(name, data[: len(data) // 2])])
TEXT = (DATA, "row 0", "tgt_text")
STRANGE = "A \U0001f468\u200d\U0001f469\u200d\U0001f467 in \u202eخاتم זרקא\u202c"
STRANGE += "a\x00b\nc\r\nd\x1b[2Je\x0bf\x1cg\x85h\u2028i\u2029j\ufeff\ufffe" + '{"file_name": "../../x.png"}\\" ,'
CASES += [
    copes("image CMYK", image(picture("CMYK")), first_is_red),
    copes("image with a palette", image(picture("P", "PNG", transparency=0)), first_is_red),
    copes("image 2000 x 50", image(picture(size=(2000, 50))), first_is_red),
    refuses("image of HTML", image(b"<!DOCTYPE html><title>404</title>"), *BROKEN),
    refuses("image TIFF", image(picture(kind="TIFF")), *BROKEN),
    refuses("image cut in its data", HALF, *BROKEN, "truncated"),
    copes("broken image left out", lambda place: HALF(place) or ["--skip_bad_images"], partial(finished, count=3)),
    refuses("image 16 bit", image(encoded(Image.new("I;16", (96, 80)))), *BROKEN, "8 bits"),
    refuses("image 10000 x 2", image(picture(size=(10_000, 2))), *BROKEN, "10000 x 2"),
    copes("caption of strange characters", texts(STRANGE), partial(one_line_each, STRANGE)),
    copes("caption of 10,000 characters", texts("a red ring " * 909 + "x")),
    refuses("caption None", texts(None), *TEXT),
    refuses("caption of blanks", texts(" \t\n\u2003\u00a0"), *TEXT),
    refuses("captions an empty list", texts(), *TEXT),
    refuses("candidate None", texts("own", None), *TEXT, script=EVALUATE),
]

# -- adversarial folders, and what an earlier run left


def linked_twin(place):
    twin = first_twin(place / "adversarial_eval")
    twin.symlink_to(twin.rename(place / "x"))


@builder
def twin(place, change, checksum=True):
    """The first twin's bytes after change(bytes); checksum: metadata.jsonl has that of the new ones."""
    file = first_twin(place / "adversarial_eval")
    old = file.read_bytes()
    new = change(old)
    file.write_bytes(new)
    if checksum:
        replaced(LIST, hashlib.sha256(old).hexdigest(), hashlib.sha256(new).hexdigest())(place)


@builder
def replaced(place, name, old, new):
    """A file after one replacement."""
    (place / name).write_text(re.sub(old, new, (place / name).read_text(), count=1))


def one_pixel(place):
    """A twin of 1 x 1 pixels would broadcast against a clean image of one colour, and be in the ball."""
    image(picture())(place), twin(lambda _: picture(kind="PNG", size=(1, 1)))(place)


@builder
def left(place, change):
    """A run was killed at its end, and change(file) damaged what it left."""
    with patch.object(common.Run, "finish", side_effect=KeyboardInterrupt), suppress(SystemExit):
        run(GENERATE, command(GENERATE, place))
    for image in (place / "out").glob("images/*"):
        image.unlink()  # they are attacked again where the part does not count
    change(next((place / "out").glob("parts/*.pt")))


def flip(file):
    data = bytearray(file.read_bytes())
    data[data.index(b"adversarial_similarity") + 26] ^= 255  # in a number, which stays one
    file.write_bytes(data)


def cut_row(place):
    run(EVALUATE, command(EVALUATE, place))
    halve(next((place / "out").glob("rows/*")))


@builder
def trained(place, metrics=None, **args):
    """A training of the same model beside evaluate.py's folder, with other args or another content of metrics.json."""
    folder = shutil.copytree(TINY / "clip", place / "mat")
    flags = vars(importlib.import_module(MAT).parse_args(["--preset", "tiny", "--steps", "1"])) | args
    record = json.loads((place / MADE).read_text())
    identity = flags | {"script": f"{MAT}.py", "model": record["identity"]["model"]}
    record |= {"training_seconds": 1, "args": flags, "identity": identity}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "metrics.json").write_bytes(metrics or json.dumps(record).encode())


RECORDS = [b"\xff\xfe{}", b"{}", b"[]", b"[" * 100_000]
jpeg_refuses, evaluate_refuses = partial(refuses, script=JPEG), partial(refuses, script=EVALUATE)
CASES += [refuses(f"own run {value[-40:]}", there(BEGUN, value), "out: run.json is damaged") for value in RECORDS]
CASES += [
    jpeg_refuses("twin altered inside the ball", twin(lambda data: data + b"\0", False), PNG, "altered"),
    jpeg_refuses("adversarial record cut", there(MADE, b'{"args": {'), "_eval: run.json is damaged"),
    evaluate_refuses("training record cut", trained(b'{"args": {'), "metrics.json"),
    jpeg_refuses("twin empty", twin(lambda _: b""), PNG),
    jpeg_refuses("metadata damaged", there(LIST, b'{"file_name": 3}'), f"{LIST} is damaged"),
    jpeg_refuses("metadata of another caption", replaced(LIST, '"caption": "', '"caption": "x'), PNG, "another data"),
    jpeg_refuses("file_name out of the folder", replaced(LIST, "images/", "../../../etc/"), "it has 3 of the 4 images"),
    copes("twin linked", linked_twin, script=JPEG),
    jpeg_refuses("twins missing", lambda p: shutil.rmtree(p / "adversarial_eval/images"), "has 0 of the 4 images"),
    jpeg_refuses("twin of one pixel", one_pixel, PNG),
    jpeg_refuses("twin outside the ball", twin(inverted), PNG, "ball"),
    jpeg_refuses("made with another eps", replaced(MADE, r'"eps": [\d.]+', '"eps": 0.1'), "--eps 0.1, not 8/255"),
    copes("made with another alpha", replaced(MADE, r'"alpha": [\d.]+', '"alpha": 0.1'), script=JPEG),  # it is noted
    jpeg_refuses("made of another model", replaced(MADE, '"model": "', '"model": "x'), "another model"),
    copes("part cut", left(halve), same_figures),
    copes("part with a byte changed", left(flip), same_figures),
    copes("part with code", left(partial(code_in, up=3)), same_figures),
    evaluate_refuses("row cut", cut_row, "rows/original-", "is damaged: remove it"),
    evaluate_refuses("training of another eps", trained(eps=0.1), "--eps 0.1, not 8/255", "mat"),
    refuses("online and offline", flag("--online_steps", 1), "--adversarial_dir", script=PGD),
]


@pytest.mark.parametrize("case", CASES, ids=[f"{case.script}, {case.name}" for case in CASES])
def test_hostile_input(case, shared, tmp_path, monkeypatch, capsys, recwarn):
    for module in ("common", "evaluate"):
        monkeypatch.setattr(f"{module}.load_clip", load_once)
    for figure in ("examples", "cosines"):  # seconds, and nothing hostile in them
        monkeypatch.setattr(f"evaluate.draw_{figure}", lambda *_: None)
    place = shutil.copytree(shared, tmp_path / "place")
    further = case.build(place)
    words = command(case.script, place, *(further if isinstance(further, list) else []))
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.argv", [f"{case.script}.py", *words])
    before = files(place)
    capsys.readouterr()
    recwarn.clear()
    if case.said:
        parse = importlib.import_module(case.script).parse_args
        line = refusal(capsys, *((parse, words) if case.parsed else (run, case.script, words)))
        assert line.startswith(f"{case.script}.py: error: ") and line.isprintable()
        assert all(said.format(tmp=place) in line for said in case.said) and ".arrow" not in line, line
        if case.late:
            assert not (place / "out" / "metrics.json").exists()
            assert (place / "out" / "keep.txt").read_text() == "not ours"
        else:
            assert files(place) == before
    else:
        run(case.script, words)
    assert not (place / "ran").exists(), "code from a file was run"
    unseen = DeprecationWarning, PendingDeprecationWarning, ResourceWarning, ImportWarning
    assert not [str(shown.message) for shown in recwarn if not issubclass(shown.category, unseen)]
    if case.check:
        case.check(place)
    shutil.rmtree(place)  # megabytes each


# -- weights and folders of models that cannot be loaded

LAYER = f"transformer.resblocks.{CONFIG['model_cfg']['vision_cfg']['layers'] - 1}."
DEEPER = {name.replace(LAYER, "transformer.resblocks.99."): tensor for name, tensor in tower_of(STATE).items()}
SHALLOWER = {name: tensor for name, tensor in tower_of(STATE).items() if not name.startswith(LAYER)}
WIDE = STATE | {"visual.positional_embedding": torch.zeros(17, len(STATE["visual.class_embedding"]))}
NO_SCALE = {name: tensor for name, tensor in STATE.items() if name != "logit_scale"}
CLASSIFIER = {"cls_token": torch.zeros(1, 1, 8), "head.weight": torch.zeros(10, 8)}
LLAVA = {"model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias": torch.zeros(8)}
LLAVA |= {"model.vision_tower.vision_tower.vision_model.embeddings.class_embedding": torch.zeros(8)}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1710540580\n"
LORA = {"weights": {"layer_0": {"q_proj": {"w_lora_A": torch.zeros(2, 8)}}}}
FILES = {  # name of a file of weights: how it is written, what is said
    "old.pt": (old_format, "it holds code"),
    "object.pt": (content({"state_dict": STATE, "args": SimpleNamespace()}), "not plain tensors"),
    "cut.pt": (lambda file: (weights()(file), halve(file)), "damaged"),
    "cut.safetensors": (lambda file: (save_file(STATE, file), halve(file)), "cannot use"),
    "pointer.pt": (content(LFS), "it is a Git LFS pointer, not the weights: git lfs pull"),
    "script.pt": (torchscript, "it is a TorchScript archive, like OpenAI's, and holds code: use --pretrained openai"),
    "empty.pt": (content({"epoch": 3, "state_dict": {}}), "it holds no tensors"),
    "tensor.pt": (content(torch.zeros(3)), "it holds a Tensor, not a dictionary"),
    "advxl.pth": (content({"model": CLASSIFIER}), "it holds 2 tensors, such as model/cls_token, and none of"),
    "prompts.tar": (content({"prompt_learner.ctx": torch.zeros(4, 8)}), "such as prompt_learner.ctx, and none"),
    "llava.bin": (content(LLAVA), "keys do not fit"),
    "lora.pt": (content(LORA), "it holds factors of LoRA: merge them into the weights first"),
    "narrow.pt": (weights("visual.proj", lambda value: value[:, :64]), "visual.proj is [96, 64], not [96, 128]"),
    "wide.pt": (content(WIDE), f"1 of {len(STATE)} keys do not fit: visual.positional_embedding is [17, "),
    "wide_tower.pt": (content(tower_of(WIDE)), "another input size"),
    "no_scale.pt": (content(NO_SCALE), "but no logit_scale"),
    "deeper.pt": (content(tower_of(STATE) | DEEPER), "transformer.resblocks.99.attn.in_proj_bias is [288], not in"),
    "shallower.pt": (content(SHALLOWER), f"{LAYER}ln_1.weight is missing, not [96]"),
    "normalised.pt": (content(STATE | {"normalize.mean": torch.zeros(3)}), "normalize.mean is [3], not in the model"),
    "nan.pt": (weights("visual.proj", lambda value: value * torch.nan), "finite"),
    "tower.pt": (content(tower_of(STATE)), "which can be a row: evaluate.py --checkpoint NAME="),
}


@pytest.mark.parametrize("name", FILES)
def test_weights_that_cannot_be_used_are_one_line_and_none_of_their_code_runs(name, tmp_path, capsys, recwarn):
    write, said = FILES[name]
    write(tmp_path / name)
    line = refusal(capsys, load, "--pretrained", tmp_path / name)
    assert name in line and said in line and line.isprintable(), line
    assert len(line.replace(f"{tmp_path}/", "")) <= 200
    assert not (tmp_path / "ran").exists() and not [*recwarn]
    if name != "tower.pt":
        assert said in refusal(capsys, lambda: load(source=tmp_path / name))
    (tmp_path / name).unlink()  # megabytes each


CLIP_OF = {"model_type": "clip"}
FOLDERS = [  # file in the folder of a model, its content, what is said
    ("config.json", {"architecture": "vit_huge_patch14_clip_336"}, "'vit_huge_patch14_clip_336'"),  # AdvXL
    ("config.json", {"model_type": "llava"}, "'llava'"),
    ("config.json", CLIP_OF | {"text_config": {"hidden_act": "gelu_new"}}, "activations gelu_new, quick_gelu"),
    ("config.json", CLIP_OF | {"text_config": {"hidden_act": "gelu"}}, "activations gelu, quick_gelu"),
    ("config.json", CLIP_OF | {"text_config": {"vocab_size": 1000}}, "vocabulary of 1000"),
    ("adapter_config.json", {"peft_type": "LORA"}, "merge them into the weights first"),
    ("README.md", {}, "for weights alone name their file, such as hf-hub:ORG/NAME/FILE.pt"),
    ("open_clip_config.json", CONFIG, "has no weights: none of open_clip_model.safetensors"),
]


@pytest.mark.parametrize(("name", "config", "said"), FOLDERS)
def test_a_folder_that_is_no_clip_is_one_line(name, config, said, tmp_path, capsys):
    (tmp_path / name).write_text(json.dumps(config))
    assert said in refusal(capsys, lambda: load(source=f"local-dir:{tmp_path}"))


def denied(function, folder):
    """The function as it is for a user without rights in the folder; the tests may run as root, who has them."""

    def call(path, *args, **options):
        if str(path).startswith(str(folder)):
            raise PermissionError(13, "Permission denied", str(path))
        return function(path, *args, **options)

    return call


@pytest.mark.parametrize("what", ["file", "folder"])
def test_weights_that_may_not_be_read_are_one_line(what, tmp_path, capsys, monkeypatch):
    file = tmp_path / "locked" / "weights.pt"
    file.parent.mkdir()
    save_file(STATE, file)
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", denied(open, file.parent))
        if what == "folder":
            patch.setattr("os.stat", denied(os.stat, file.parent))
        line = refusal(capsys, load, "--pretrained", file)
        assert str(file) in line and "Permission denied" in line
        words = ["--preset", "smoke", "--output_dir", str(tmp_path), "--checkpoint", f"x={file}"]
        line = refusal(capsys, lambda: evaluate.main(evaluate.parse_args(words)))
        assert str(file) in line and ("Permission denied" in line or "can be read" in line)


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


@settings(max_examples=40, **FEW)
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


@settings(max_examples=60, **FEW)
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
