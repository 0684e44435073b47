"""Fuzz: whatever a data folder or a run's folder holds, a script copes or ends in one line; nothing else is touched.

The profile here is short and draws the same examples every time; tests/bench/fuzz.py draws fresh ones for an hour.
"""

import contextlib
import copy
import functools
import hashlib
import importlib
import io
import json
import logging
import os
import shutil
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, Phase, configuration, given, settings
from hypothesis import strategies as st
from test_hostile import CARD, EVALUATE, GENERATE, JPEG, MAT, command, pack, picture

import common

configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")  # not in the checkout
settings.register_profile(
    "suite",
    max_examples=6,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],  # shrinking takes minutes: tests/bench/fuzz.py --shrink
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("suite")

LOAD_CLIP = common.load_clip
COUNT = 4  # images that a run asks for, of SIZE in the data
SIZE = 6
ENDED = Counter()  # {(what was damaged, "copes", "refuses" or "fails"): examples}, for tests/bench/fuzz.py

# -- the place


def image_name(coco_id, split):
    coco_id += 1000 * (split == "train")
    return f"MSCOCO_i2t/COCO_{'train' if split == 'train' else 'val'}2014_{coco_id:012d}.jpg"


def sound_columns(split):
    """The columns of a split as lists of plain values."""
    names, captions = [image_name(i, split) for i in range(1, SIZE + 1)], [f"ring number {i}" for i in range(SIZE)]
    if split == "train":
        return {"qry": ["q"] * SIZE, "qry_image_path": names, "pos_text": captions, "pos_image_path": [""] * SIZE}
    tgt_text = [[caption, "another", "a third"] for caption in captions]
    return {"qry_text": ["q"] * SIZE, "qry_img_path": names, "tgt_text": tgt_text, "tgt_img_path": [[""]] * SIZE}


def sound_members(split):
    return [(image_name(i, split), picture(colour=(40 * i, 90, 60 * len(split) // 2))) for i in range(1, SIZE + 1)]


def write_data(root, split, table=None, members=None):
    folder, name = root / f"MMEB-{split}", common.SPLITS[split][0]
    (folder / "MSCOCO_i2t").mkdir(parents=True)
    (folder / "README.md").write_text(CARD.format(name, f"MSCOCO_i2t/{name}-*"))
    table = pa.table(sound_columns(split)) if table is None else table
    pq.write_table(table, folder / "MSCOCO_i2t" / f"{name}-0.parquet")
    pack(folder / "images.zip", sound_members(split) if members is None else members)
    return folder


@functools.cache
def ground():
    """Sound data and finished runs of every kind, made once; what an example damages it first copies."""
    holder = tempfile.TemporaryDirectory()
    root = Path(holder.name)
    for split in common.SPLITS:
        write_data(root, split)
    for script, out in FINISHED.items():
        with quiet():
            main(script, arguments(root, script, root / out))
        with quiet(), pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(common.Run, "finish", killed)
            main(script, arguments(root, script, root / f"killed_{out}"))
    for weights in [*root.glob("mat/*.pt"), *root.glob("killed_mat/*.pt")]:  # large, and not read
        weights.unlink()
    twins = common.load_adversarial(root / "adversarial_eval", load(root), arguments(root, JPEG, root / "jpeg"))
    return holder, root, twins


FINISHED = {GENERATE: "adversarial_eval", JPEG: "jpeg", EVALUATE: "evaluation", MAT: "mat"}


def killed(*_, **__):
    raise KeyboardInterrupt


def arguments(root, script, out, split="eval", *words):
    words = ["--train_data", root / "MMEB-train", "--eval_data", root / "MMEB-eval", *words]
    if script == GENERATE:
        words += ["--split", split]
    elif script == MAT:
        words += ["--max_steps", 2, "--batch_size", 2, "--save_every", 0]
    else:
        words += ["--adversarial_dir", root / "adversarial_eval"]
    return importlib.import_module(script).parse_args(command(root, script, out, *words))


def load(root, split="eval", *words):
    return common.load_examples(arguments(root, GENERATE, root / "out", split, *words), split, COUNT)


@functools.cache
def tiny_clip():
    return LOAD_CLIP(importlib.import_module(GENERATE).parse_args(["--preset", "tiny", "--device", "cpu"]))


def main(script, args):
    """The script's main() with the model, which is not what is damaged here, loaded once."""
    module = importlib.import_module(script)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_clip", lambda *_: copy.deepcopy(tiny_clip()), raising=False)
        patch.setattr(common, "load_clip", lambda *_: copy.deepcopy(tiny_clip()))
        for figure in ("examples", "histograms", "table"):  # seconds, and nothing hostile in them
            patch.setattr(f"evaluate.draw_{figure}", lambda *_: None)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # such small products are faster so where other work runs
        try:
            module.main(args)
        finally:
            torch.set_num_threads(threads)


@contextlib.contextmanager
def quiet():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


class Place:
    """The folder of one example. data/, out/ and cache/ may be read and written; outside/ holds the bait."""

    def __init__(self):
        self.holder = tempfile.TemporaryDirectory()
        self.root = Path(self.holder.name).resolve()
        self.out, self.outside = self.root / "out", self.root / "outside"
        for folder in (self.out, self.outside):
            folder.mkdir()
        (self.out / "keep.txt").write_text("not ours")
        for split in common.SPLITS:
            for name, data in sound_members(split):
                (self.outside / Path(name).name).write_bytes(data)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.holder.cleanup()

    def copy(self, name, to=None):
        return Path(shutil.copytree(ground()[1] / name, self.root / (to or name), dirs_exist_ok=True))

    def load(self, split="eval", *words):
        return load(self.root, split, *words)

    def arguments(self, script, *words):
        return arguments(self.root, script, self.out, "eval", *words)


def listing(folder, without=()):
    """{path: what identifies its content} of everything in a folder."""
    found = {}
    for path in folder.rglob("*"):
        if not set(without) & set(path.relative_to(folder).parts):
            file = path.is_file() and not path.is_symlink()
            found[path] = path.read_bytes() if file else path.lstat().st_mode
    return found


SEEN = []  # (event, what) of this process while an example is played


def note(event, args):
    if event in ("open", "socket.connect", "subprocess.Popen"):
        SEEN.append((event, args))


sys.addaudithook(note)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@contextlib.contextmanager
def logged_to(stream):
    """datasets holds on to the stderr that it was imported with."""
    (handler,) = logging.getLogger("datasets").handlers
    before = handler.setStream(stream)
    try:
        yield
    finally:
        handler.setStream(before)


def survives(name, place, action, out_kept_without=()):
    """action() returns, or ends in one printable line and exit code 2; either way it keeps to its folders.

    returns   what action returned, None if it refused
    """
    before = listing(place.root, ["cache", *out_kept_without])
    stdout, stderr = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()  # surrogates are an error for stdout
    value, code = None, 0
    SEEN.clear()
    ENDED[name, "fails"] += 1
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr), logged_to(stderr):
        try:
            value = action()
        except SystemExit as end:
            code = end.code
    seen = list(SEEN)
    after = listing(place.root, ["cache", *out_kept_without])
    lines = stderr.getvalue().split("\n")[:-1]
    assert code in (0, 2), code
    if code == 2:
        assert len(lines) == 1 and lines[0].isprintable() and ": error: " in lines[0], lines
        assert after == before, sorted(after.items() ^ before.items())
    else:
        assert not lines, lines
        changed = {path for path in after.keys() | before.keys() if after.get(path) != before.get(path)}
        assert all(path.is_relative_to(place.out) for path in changed), changed
    for kind, args in seen:
        assert kind != "socket.connect", args
        if kind == "subprocess.Popen":
            assert args[0] == "git", args  # the commit in metrics.json
        elif kind == "open" and isinstance(args[0], (str, bytes)):
            path = Path(os.path.abspath(os.fsdecode(args[0])))
            assert not path.is_relative_to(place.outside), f"{path} was opened"
            if args[2] & WRITES and path.is_absolute() and not path.is_relative_to("/proc"):
                ours = place.root, ground()[1] / "cache"
                assert any(map(path.is_relative_to, ours)), f"{path} was opened for writing"
    ended = "refuses" if code == 2 else "copes"
    ENDED.update({(name, "fails"): -1, (name, ended): 1})
    return value


# -- strategies: text, bytes, JSON

HOSTILE_TEXT = [
    *("", " ", "\t\n\u2003", ".", "..", "/", "//", "~", "-", "--overwrite", "*", "%s%n", "{}", "{0}", "\\"),
    *("../../x", "/etc/passwd", "C:\\x\\y", "..\\..\\x", "file:///etc/passwd", "http://127.0.0.1:9/x", "zip://a::b"),
    *("a\0b", "\x1b[2J\a", "\x7f\x85\u2028\u2029", "\u202egnp", "\ufeff\ufffe\uffff", "\U0001f468\u200d\U0001f469"),
    *("e\u0301" * 50, "\u0663", "٣" * 12, "x" * 300, "y/" * 3000, "z" * 70_000, "a: error: b\nTraceback\r\n", "NaN"),
]
text = st.sampled_from(HOSTILE_TEXT) | st.text(max_size=30)
lone = st.sampled_from(["\ud800", "a\udcff/b", "\udfff\ud800"])  # surrogates, which JSON can hold and UTF-8 cannot
numbers = (
    st.integers(-3, 9)
    | st.sampled_from([2**31, 2**63, 2**64, -(2**70), 10**400, 0.5, -0.0, 1e308, 5e-324])
    | st.sampled_from([float("nan"), float("inf"), -float("inf")])
)
plain = st.none() | st.booleans() | numbers | text | lone
values = st.recursive(plain, lambda v: st.lists(v, max_size=3) | st.dictionaries(text | lone, v, max_size=3))
deep = st.sampled_from(
    ["[" * 500, "[" * 100_000, '{"a":' * 900, "[" * 900 + "]" * 900, '{"a":' * 990 + "1" + "}" * 990]
)
short = st.binary(max_size=6) | st.sampled_from(
    [b"\n", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"{", b"}", b"9" * 400]
)


@st.composite
def damaged_bytes(draw, base):
    """base after one to three cuts, flips, insertions, removals, or copied or swapped lines."""
    data = bytes(base)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(["cut", "flip", "insert", "remove", "copy line", "swap lines", "replace"]))
        if kind == "cut":
            data = data[:at]
        elif kind == "flip" and data:
            data = data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
        elif kind == "insert":
            data = data[:at] + draw(short) + data[at:]
        elif kind == "remove":
            data = data[:at] + data[at + draw(st.integers(1, 40)) :]
        elif kind == "replace":
            data = data[:at] + draw(short) + data[at + draw(st.integers(0, 6)) :]
        else:
            lines = data.split(b"\n")
            i, j = (draw(st.integers(0, len(lines) - 1)) for _ in range(2))
            if kind == "copy line":
                lines.insert(i, lines[j])
            else:
                lines[i], lines[j] = lines[j], lines[i]
            data = b"\n".join(lines)
    return data


@st.composite
def damaged_value(draw, base, values=values):
    """Plain values with something in them replaced, taken out, put in or renamed."""
    value = copy.deepcopy(base)
    inner, keys = value, []
    while isinstance(inner, (dict, list)) and inner:
        keys = sorted(inner) if isinstance(inner, dict) else range(len(inner))
        key = draw(st.sampled_from(keys))
        if not (isinstance(inner[key], (dict, list)) and inner[key]) or draw(st.integers(0, 2)) == 0:
            break
        inner = inner[key]
    if not keys:
        return draw(values)
    kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add", "rename", "whole"]))
    if kind == "whole":
        return draw(values)
    if kind == "replace":
        inner[key] = draw(values)
    elif kind == "remove":
        del inner[key]
    elif kind == "rename" and isinstance(inner, dict):
        inner[draw(text | lone)] = inner.pop(key)
    elif isinstance(inner, dict):
        inner[draw(text | lone)] = draw(values)
    else:
        inner.insert(key, draw(values))
    return value


@st.composite
def damaged_json(draw, base, dump=json.dumps):
    """A damaged JSON value as bytes: keys that come twice, deep nesting, other encodings and spellings of it."""
    written = dump(draw(damaged_value(base)))
    kind = draw(st.sampled_from(["as it is", "as it is", "as it is", "twice", "deep", "encoded", "bytes"]))
    if kind == "twice" and written.startswith("{"):
        key = draw(st.sampled_from(sorted(base)) if isinstance(base, dict) else text)
        again = f"{json.dumps(key)}: {json.dumps(draw(values))}"
        first = draw(st.booleans()) or written == "{}"
        written = "{" + (f"{again}, {written[1:]}" if first and written != "{}" else f"{written[1:-1]}, {again}}}")
    elif kind == "deep":
        old = json.dumps(draw(st.sampled_from(list(base.values()) if isinstance(base, dict) else [base])))
        written = written.replace(old, draw(deep), 1)
    elif kind == "encoded":
        encoding = draw(st.sampled_from(["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-7", "cp500"]))
        return written.encode(encoding, "replace")
    data = written.encode("utf-8", "surrogatepass")
    return draw(damaged_bytes(data)) if kind == "bytes" else data


# -- rows and members of the zip


@st.composite
def paths(draw, split):
    """Where an image may be said to lie."""
    name = image_name(draw(st.integers(1, SIZE)), split)
    file, bait = Path(name).name, draw(st.sampled_from(["../outside", "{outside}", "MSCOCO_i2t/../../outside", "."]))
    number = name[-16:-4]
    return draw(
        st.sampled_from(
            [
                name,
                f"images/{name}",
                f"{bait}/{file}",
                f"{name}/..",
                f"{name}\n",
                f"..\\outside\\{file}",
                name.replace("/", "\\"),
                name.replace(number, number.lstrip("0")),
                name.replace(
                    number, "0" * 9 + number[-1:].translate({ord(str(i)): 0x660 + i for i in range(10)}).zfill(3)
                ),
                name.upper(),
                f"._{file}",
                f"__MACOSX/{name}",
                file,
            ]
        )
        | text.map(lambda t: f"{t}/{file}")
        | text
    )


def mostly(sound, hostile, of=8):
    """Hostile in one case of so many."""
    return st.integers(1, of).flatmap(lambda i: hostile if i == 3 else sound)


def arrays(sound, hostile, rows):
    """A column: sound values with hostile ones among them, or of a type that nobody asked for."""
    mixed = st.tuples(*(mostly(st.just(value), hostile, 25) for value in sound[:rows]))
    other = st.sampled_from([lambda v: [v], lambda v: {"a": v}, lambda v: [[v], []], str, lambda v: str(v).encode()])
    other |= st.sampled_from(
        [lambda v: 7, lambda v: 2.5, lambda v: True, lambda v: None, lambda v: b"\xff\xed\xa0\x80"]
    )
    return mostly(
        mixed.map(lambda v: pa.array(list(v))),
        st.one_of(
            st.tuples(mixed, other).map(lambda pair: pa.array([pair[1](value) for value in pair[0]])),
            mixed.map(lambda v: pa.array([str(x) for x in v], pa.large_string())),
            mixed.map(lambda v: pa.array([str(x) for x in v]).dictionary_encode()),
            mixed.map(
                lambda v: pa.array([str(x).encode() + b"\xff\xed\xa0\x80" for x in v], pa.binary()).view(pa.string())
            ),
        ),
    )


FEATURES = [  # as the metadata of a parquet file may declare a column
    *({"_type": kind} for kind in ("Image", "Audio", "Video", "Pdf", "Nifti", "Nothing")),
    {"_type": "ClassLabel", "names": ["a", "b"]},
    *({"_type": "Value", "dtype": dtype} for dtype in ("int32", "string", "binary", "timestamp[s]", "nothing")),
    *({"_type": "List", "feature": {"_type": kind, "dtype": "string"}} for kind in ("Value", "Image")),
    *({"_type": "Array2D", "shape": [2, 2], "dtype": "string"}, {}, [], None, 5),
]


@st.composite
def tables(draw, split):
    rows = draw(st.sampled_from([SIZE] * 6 + [0, 1]))
    image_column, caption_column = common.SPLITS[split][1:3]
    captions = text | st.none()
    hostile = {
        image_column: paths(split) | st.none(),
        caption_column: captions if split == "train" else st.lists(captions, max_size=3) | st.none(),
    }
    columns = {
        name: draw(arrays(v, hostile.get(name, st.just(v[0])), rows)) for name, v in sound_columns(split).items()
    }
    pairs = [(name, column) for name, column in columns.items() if draw(st.integers(0, 30))]
    if not draw(st.integers(0, 6)):
        pairs.insert(0, (draw(text | st.sampled_from(sorted(columns))), draw(st.sampled_from(list(columns.values())))))
    if not pairs:
        return pa.table({})
    table = pa.Table.from_arrays([column for _, column in pairs], names=[name for name, _ in pairs])
    if not draw(st.integers(0, 3)):
        features = {name: {"_type": "Value", "dtype": "string"} for name, _ in pairs}
        features |= {draw(st.sampled_from(sorted(features))): draw(st.sampled_from(FEATURES))}
        info = draw(mostly(st.just({"info": {"features": features}}), damaged_value({"info": {"features": features}})))
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    return table


@st.composite
def members(draw, split):
    """The (name, bytes) pairs of the zip."""
    pairs = sound_members(split)
    names = paths(split) | text | st.sampled_from([name for name, _ in pairs])
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(pairs) - 1))
        pair = draw(names), pairs[at][1]
        pairs[at : at + draw(st.integers(0, 1))] = [pair]
    return [((name or "x")[:60_000], data) for name, data in pairs]


def resolved(place, table, split):
    """The paths of a table that name the bait by a place that only this example knows."""
    column = common.SPLITS[split][1]
    for i, name in enumerate(table.column_names):
        if name == column and table.schema.field(i).type == pa.string():
            with contextlib.suppress(UnicodeDecodeError):
                paths = [path and path.replace("{outside}", str(place.outside)) for path in table.column(i).to_pylist()]
                table = table.set_column(i, name, pa.array(paths, pa.string()))
    return table


def check_examples(place, split, words):
    examples = survives("rows", place, lambda: place.load(split, *words))
    if examples is None:
        return
    assert 0 < len(examples) <= COUNT
    assert len(set(examples.coco_ids)) == len(examples.names) == len(examples.pixels) == len(examples)
    assert all(isinstance(caption, str) and caption.strip() == caption != "" for caption in examples.captions)
    if split == "eval":
        evaluate = importlib.import_module(EVALUATE)
        args = place.arguments(EVALUATE, "--candidates", "mmeb")
        survives("candidates", place, lambda: evaluate.load_candidates(args, examples))


FLAGS = st.lists(st.sampled_from([("--skip_bad_images",), ("--sample_seed", "3")]), unique=True).map(
    lambda w: sum(w, ())
)


@given(st.data(), st.sampled_from(["eval", "train"]), FLAGS)
def test_rows_of_any_kind_are_read_or_refused_in_one_line(data, split, words):
    table = data.draw(tables(split))
    with Place() as place:
        write_data(place.root, split, resolved(place, table, split))
        check_examples(place, split, words)


@given(st.data(), st.sampled_from(["eval", "train"]), FLAGS)
def test_a_zip_with_members_of_any_name_is_read_or_refused_in_one_line(data, split, words):
    with Place() as place:
        folder = write_data(place.root, split, members=data.draw(members(split)))
        if data.draw(st.booleans()):
            (folder / "images.zip").write_bytes(data.draw(damaged_bytes((folder / "images.zip").read_bytes())))
        check_examples(place, split, words)


@given(st.data())
def test_a_damaged_cache_of_decoded_images_is_made_again_or_refused_in_one_line(data):
    with Place() as place:
        write_data(place.root, "eval")
        with quiet():
            sound = place.load().pixels.copy()
        kind = data.draw(st.sampled_from(["*.json", "*.npy"]))
        (file,) = (place.root / "cache").glob(kind)
        record = json.loads(file.read_text()) if kind == "*.json" else None
        damage = damaged_bytes(file.read_bytes()[:400]) | damaged_bytes(file.read_bytes())
        file.write_bytes(data.draw(damaged_json(record) | damage if record else damage))
        examples = survives("cache", place, place.load)
        assert examples is None or examples.pixels.shape[1:] == sound.shape[1:]


# -- adversarial folders


def check_adversarial(name, place):
    with quiet():
        examples = place.load()
    args = place.arguments(JPEG)
    twins = survives(name, place, lambda: common.load_adversarial(place.root / "adversarial_eval", examples, args))
    if twins is not None:
        assert twins.shape == ground()[2].shape and twins.dtype == np.uint8
        assert common.linf_grey_levels(twins, examples.pixels).max() <= 8


def place_with_twins():
    place = Place()
    place.copy("MMEB-eval")
    return place, place.copy("adversarial_eval")


@given(st.data())
def test_a_metadata_jsonl_of_any_content_is_read_or_refused_in_one_line(data):
    place, folder = place_with_twins()
    with place:
        file = folder / "metadata.jsonl"
        lines = file.read_bytes().splitlines()
        if data.draw(st.booleans()):
            file.write_bytes(data.draw(damaged_bytes(file.read_bytes())))
        else:
            at = data.draw(st.integers(0, len(lines) - 1))
            lines[at] = data.draw(damaged_json(json.loads(lines[at])))
            file.write_bytes(b"\n".join(lines))
        check_adversarial("metadata.jsonl", place)


@given(st.data())
def test_a_twin_of_any_content_is_read_or_refused_in_one_line_though_its_checksum_fits(data):
    place, folder = place_with_twins()
    with place:
        lines = (folder / "metadata.jsonl").read_text().splitlines()
        entry = json.loads(lines[0])
        twin = (folder / entry["file_name"]).read_bytes()
        pictures = st.builds(
            picture,
            st.sampled_from(["RGB", "L"]),
            st.sampled_from(["PNG", "JPEG", "GIF"]),
            st.sampled_from([(64, 64), (1, 1), (64, 65), (2, 300)]),
        )
        twin = data.draw(damaged_bytes(twin[:80]) | damaged_bytes(twin) | st.binary(max_size=50) | pictures)
        (folder / entry["file_name"]).write_bytes(twin)
        lines[0] = json.dumps(entry | {"sha256": hashlib.sha256(twin).hexdigest()})
        (folder / "metadata.jsonl").write_text("\n".join(lines))
        check_adversarial("twins", place)


@given(st.data())
def test_a_metrics_json_of_adversarial_images_is_read_or_refused_in_one_line(data):
    place, folder = place_with_twins()
    with place:
        file = folder / "metrics.json"
        file.write_bytes(data.draw(damaged_bytes(file.read_bytes()) | damaged_json(json.loads(file.read_text()))))
        check_adversarial("metrics.json", place)


# -- runs


@functools.cache
def record_of(folder):
    return json.loads((ground()[1] / folder / "metrics.json").read_text())


def damaged_record(draw, file):
    file.write_bytes(draw(damaged_bytes(file.read_bytes()) | damaged_json(json.loads(file.read_text()))))


def start(script, place, *words):
    """The script's Run in place.out, on the sound data."""
    args = arguments(ground()[1], script, place.out, "eval", *words)
    inputs = [ground()[1] / "adversarial_eval"] if script in (JPEG, EVALUATE) else []
    show = importlib.import_module(EVALUATE).console_table if script == EVALUATE else None
    return lambda: common.Run(args, inputs, show)


OVERWRITE = st.sampled_from([(), (), ("--overwrite",)])


@given(st.data(), st.sampled_from(sorted(FINISHED)), OVERWRITE)
def test_a_finished_run_with_a_metrics_json_of_any_content_is_shown_or_refused_in_one_line(data, script, words):
    with Place() as place:
        place.copy(FINISHED[script], "out")
        damaged_record(data.draw, place.out / "metrics.json")
        survives("finished run", place, start(script, place, *words))


@given(st.data(), st.sampled_from(sorted(FINISHED)), OVERWRITE)
def test_a_killed_run_with_a_run_json_of_any_content_goes_on_or_is_refused_in_one_line(data, script, words):
    with Place() as place:
        place.copy(f"killed_{FINISHED[script]}", "out")
        if data.draw(st.booleans()):
            shutil.copy(ground()[1] / FINISHED[script] / "metrics.json", place.out)
        damaged_record(data.draw, place.out / ".partial" / "run.json")
        run = survives("killed run", place, start(script, place, *words), [".partial"])
        assert run is None or run.before >= 0


@given(st.data(), st.sampled_from(["mat", "pgd"]))
def test_a_training_with_a_metrics_json_of_any_content_is_timed_or_refused_in_one_line(data, stage):
    evaluate = importlib.import_module(EVALUATE)
    with Place() as place:
        for folder in (stage, "adversarial_train"):
            place.copy("mat", folder)
        damaged_record(
            data.draw, place.root / data.draw(st.sampled_from([stage, "adversarial_train"])) / "metrics.json"
        )
        survives("training", place, lambda: evaluate.duration(evaluate.training_seconds(place.root, stage)))


SAME = "n", "clean_similarity", "adversarial_similarity", "attack", "qualities", "per_image", "epochs"


@given(st.data(), st.sampled_from(sorted(FINISHED)))
def test_a_killed_run_with_a_damaged_part_makes_it_again_or_is_refused_in_one_line(data, script):
    with Place() as place:
        place.copy(f"killed_{FINISHED[script]}", "out")
        file = data.draw(st.sampled_from(sorted((place.out / ".partial").glob("*.pt"))))
        file.write_bytes(data.draw(damaged_bytes(file.read_bytes())))
        args = arguments(ground()[1], script, place.out)
        survives("kept part", place, lambda: main(script, args), [".partial"])
        if (place.out / "metrics.json").exists():
            made, sound = json.loads((place.out / "metrics.json").read_text()), record_of(FINISHED[script])
            assert {key: made.get(key) for key in SAME} == {key: sound.get(key) for key in SAME}


# -- found by the above


def without_rows(out):
    record = json.loads((out / "metrics.json").read_text())
    (out / "metrics.json").write_text(json.dumps(record | {"rows": {"original": {}}}))


def test_a_finished_table_that_lacks_figures_is_refused_in_one_line():
    with Place() as place:
        without_rows(place.copy("evaluation", "out"))
        assert survives("pinned", place, start(EVALUATE, place)) is None


def flipped(file):
    """One bit of the largest tensor, which torch.load does not notice."""
    with zipfile.ZipFile(file) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
        at = file.read_bytes().index(archive.read(largest)) + largest.file_size // 2
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)


PARTS = {
    "cut": lambda file: os.truncate(file, file.stat().st_size // 2),
    "empty": lambda file: os.truncate(file, 0),
    "flipped": flipped,
}


@pytest.mark.parametrize("script", FINISHED)
@pytest.mark.parametrize("damage", PARTS)
def test_a_damaged_part_of_a_killed_run_is_made_again_to_the_same_numbers(script, damage):
    with Place() as place:
        out = place.copy(f"killed_{FINISHED[script]}", "out")
        file = min((out / ".partial").glob("*.pt"))
        PARTS[damage](file)
        survives("pinned", place, lambda: main(script, arguments(ground()[1], script, out)), [".partial"])
        made, sound = json.loads((out / "metrics.json").read_text()), record_of(FINISHED[script])
        assert {key: made.get(key) for key in SAME} == {key: sound.get(key) for key in SAME}
