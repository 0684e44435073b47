"""Fuzz: whatever rows and a metadata.jsonl hold, they are read as they stand or refused in one line."""

import hashlib
import io
import json
import re
import tempfile
from contextlib import redirect_stderr
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, configuration, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_hostile import CARD, RECORD, encoded

import common

configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")  # not in the checkout
FEW = {"derandomize": True, "database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
SOUND_PATH = st.builds("{}/COCO_{}2014_{:012d}.jpg".format, TEXT, st.sampled_from(["train", "val"]), st.integers(0, 3))
PATH = SOUND_PATH | st.builds("{}{}".format, SOUND_PATH, TEXT) | TEXT | st.none()
CAPTIONS = st.lists(TEXT.map("a{}".format), min_size=1, max_size=2)
ANY_CAPTIONS = st.none() | st.lists(TEXT | st.none(), max_size=3)


def outcome(function, *args):
    """What it returns, and the one line with which it ended otherwise."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return function(*args), None
    except SystemExit as end:
        (line,) = said.getvalue().splitlines()
        assert end.code == 2 and re.match(r"\S+: error: .", line) and line.isprintable()
        return None, line


@settings(max_examples=60, **FEW)
@given(st.lists(st.tuples(SOUND_PATH, CAPTIONS), min_size=1), st.lists(st.tuples(PATH, ANY_CAPTIONS), max_size=1))
def test_rows_are_read_as_they_stand_or_refused_in_one_line(sound, other):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "README.md").write_text(CARD.format("test", "rows.parquet"))
        paths, captions = zip(*sound, *other)
        columns = {"qry_img_path": pa.array(paths, pa.string()), "tgt_text": pa.array(captions, pa.list_(pa.string()))}
        pq.write_table(pa.table(columns), Path(folder) / "rows.parquet")
        args = SimpleNamespace(eval_data=folder, cache_dir=f"{folder}/cache")
        rows, line = outcome(common.load_rows, args, "eval")
        rows = rows and rows.to_list()
    assert not line or (other and folder in line)
    ids = [] if line else [int(re.search(r"([0-9]+)\.jpe?g/*$", path)[1]) for path in paths]
    assert [row["coco_id"] for row in rows or ()] == [*dict.fromkeys(ids)]
    for row in rows or ():
        i = ids.index(row["coco_id"])
        assert row["path"] == paths[i] and row["texts"] == [text.strip() for text in captions[i]]


JSON = st.recursive(st.none() | st.integers() | st.floats() | TEXT, lambda x: st.lists(x) | st.dictionaries(TEXT, x))


@settings(max_examples=100, **FEW)
@given(st.integers(0, 2), st.tuples(st.sampled_from(["coco_id", "sha256"]), JSON) | JSON | st.binary(max_size=8))
def test_a_line_of_metadata_changes_no_twin_or_is_refused_in_one_line(at, change):
    args = SimpleNamespace(model="m", pretrained="", eps=8 / 255, alpha=2 / 255, steps=1, num_workers=2)
    clean = np.arange(3 * 3 * 8 * 8, dtype=np.uint8).reshape(3, 3, 8, 8)
    examples = [{"coco_id": i, "caption": f"c{i}", "pixels": pixels, "path": f"{i}"} for i, pixels in enumerate(clean)]
    with tempfile.TemporaryDirectory() as name:
        folder, lines = Path(name), []
        (folder / "images").mkdir()
        (folder / "metrics.json").write_text(json.dumps(RECORD | {"args": vars(args)}))
        for i, pixels in enumerate(clean):
            (folder / common.twin_name(i)).write_bytes(data := encoded(Image.fromarray(pixels.transpose(1, 2, 0) ^ 1)))
            lines.append({"coco_id": i, "caption": f"c{i}", "sha256": hashlib.sha256(data).hexdigest()})
        lines[at] = lines[at] | {change[0]: change[1]} if isinstance(change, tuple) else change
        lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        (folder / "metadata.jsonl").write_bytes(b"\n".join(lines))
        twins, line = outcome(common.load_adversarial, folder, examples, args)
    assert name in line if line else (twins == clean ^ 1).all()
