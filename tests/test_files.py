"""Files that open elsewhere, each with the tool of those who open it; and the same command twice, the same bytes."""

import importlib
import io
import json
import os
import re
import shlex
import sys
import tarfile
from pathlib import Path
from xml.etree import ElementTree

import cmarkgfm
import datasets
import jsonschema
import numpy as np
import onnxruntime
import open_clip
import pytest
import torch
from conftest import EVAL, ROOT, metrics, shell
from torchvision.datasets import ImageFolder
from torchvision.transforms import PILToTensor

import common
import evaluate

STAGES = {
    "adversarial_train": "generation",
    "adversarial_eval": "generation",
    "mat": "training",
    "pgd": "training",
    "online": "training",
    "evaluation": "evaluation",
}
ODD = r"a|b \| `c` *d* <i>e</i> _f_ [g](h) ~~i~~ &amp; $j$"  # a name that Markdown would read as much else


def printed_commands(text):
    """The lines of --rerun as words for shell(), each checked to start a script of this checkout."""
    commands = [shlex.split(line, comments=True) for line in text.splitlines()]
    for program, script, *_ in commands:
        assert program == "python" and Path(script).resolve() == ROOT / Path(script).name
    return [[Path(script).name, *words] for _, script, *words in commands]


def rerun(folder):
    return printed_commands(shell("evaluate.py", "--rerun", folder / "metrics.json")[0])


# ---------------------------------------------------------------------------------------------------------------------
# --export


@pytest.fixture(scope="module")
def exported(report):
    """The finished caption-aware training, asked again with --export; (its folder, the export, what was printed)."""
    pgd, folder = report[0] / "pgd", report[0] / "exported" / "pgd"
    (pgd / "last.pt").rename(pgd / "aside.pt")  # that an export of it would fail
    said, _ = shell(*rerun(pgd)[-1], "--export", folder)
    (pgd / "aside.pt").rename(pgd / "last.pt")
    return pgd, folder, said


@pytest.fixture(scope="module")
def scenes(report):
    """The attacked evaluation images and their captions: (B, 3, S, S) in [0, 1], a list of strings."""
    folder = report[0] / "adversarial_eval"
    entries = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    captions = {str(folder / entry["file_name"]): entry["caption"] for entry in entries}
    images = ImageFolder(folder, PILToTensor())
    pixels = torch.stack([image for image, _ in images])
    return pixels.float() / 255, [captions[name] for name, _ in images.samples]


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """The architecture of tests/tiny/clip under a name, as one needs to open a checkpoint by its path."""
    file = tmp_path_factory.mktemp("config") / "tiny-clip.json"
    config = json.loads((ROOT / "tests/tiny/clip/open_clip_config.json").read_text())
    file.write_text(json.dumps(config["model_cfg"]))
    open_clip.add_model_config(file)
    return "tiny-clip"


@torch.no_grad()
def features(name, pretrained, images, captions):
    """As open_clip's README does it."""
    model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=pretrained and str(pretrained))
    tokenizer, normalise = open_clip.get_tokenizer(name), preprocess.transforms[-1]
    image_features = model.eval().encode_image(normalise(images), normalize=True)
    return image_features, model.encode_text(tokenizer(captions), normalize=True)


def test_an_export_of_a_finished_run_opens_in_open_clip_to_equal_features(exported, scenes, tiny_clip):
    pgd, folder, said = exported
    assert f"local-dir:{folder}" in said and "is complete" in said
    opened, original = features(f"local-dir:{folder}", None, *scenes), features(tiny_clip, pgd / "best.pt", *scenes)
    assert all(map(torch.equal, opened, original))
    clip = common.load_clip(tiny(), str(pgd / "best.pt"))
    with torch.no_grad():  # our own normalisation, too
        torch.testing.assert_close(opened[0], clip.encode_image(scenes[0]), atol=1e-5, rtol=0)
    assert {file.stat().st_mode for file in folder.iterdir()} == {(pgd / "best.pt").stat().st_mode}


def test_an_export_still_says_which_images_it_was_trained_on(exported):
    pgd, folder, _ = exported
    assert common.load_clip(tiny(), f"local-dir:{folder}").train_ids == set(metrics(pgd)["train_ids"])


def tiny(*words):
    return evaluate.parse_args(["--preset", "tiny", *words])


def test_the_exported_tower_runs_in_onnxruntime_at_any_batch_size(exported, scenes, tmp_path, capsys):
    program = torch.export.load(exported[1] / "image_tower.pt2")
    torch.onnx.export(program, dynamo=True).save(tmp_path / "tower.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "tower.onnx")
    (given,) = session.get_inputs()
    clip = common.load_clip(tiny(), str(exported[0] / "best.pt"))
    for images in (scenes[0][:1], scenes[0]):
        (found,) = session.run(None, {given.name: images.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(found, clip.encode_image(images), atol=1e-4)
            np.testing.assert_allclose(found, program.module()(images), atol=1e-4)


def test_an_export_replaces_nothing_that_is_not_its_own(exported, report, tmp_path):
    pgd, folder, _ = exported
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    command = rerun(pgd)[-1]
    shell(*command, "--export", folder)  # once more: the same
    assert (folder / "open_clip_model.safetensors").read_bytes() == before["open_clip_model.safetensors"]
    (mat,) = rerun(report[0] / "mat")
    assert "of another training" in shell(*mat, "--export", folder, code=2)[1]
    fresh = ["defend_clip_mat_v2.py", "--preset", "tiny", "--output_dir", tmp_path / "new" / "mat"]
    assert "holds an export already" in shell(*fresh, "--export", folder, code=2)[1]
    for taken in (pgd, pgd.parent, pgd / "best.pt", pgd / "best.pt" / "below", tmp_path / "new", ""):
        _, said = shell(*fresh, "--export", taken, code=2)
        assert said.count("\n") == 1 and "--export" in said
    assert not (tmp_path / "new" / "mat").exists()
    (folder / "notes.txt").write_text("mine")
    assert "holds other files" in shell(*command, "--export", folder, code=2)[1]
    (folder / "notes.txt").unlink()
    assert {file.name for file in folder.iterdir()} == before.keys() and {*folder.parent.iterdir()} == {folder}


# ---------------------------------------------------------------------------------------------------------------------
# Other tools


@pytest.mark.parametrize("source", ["best.pt", "folder"])
def test_clip_benchmark_finds_the_recalls_of_the_table(source, exported, report, scenes, tiny_clip, tmp_path, capsys):
    """LAION's, on the attacked images: as hard for the model as the table's transfer column says."""
    (tmp_path / "test").mkdir()
    (tmp_path / "dataset_type.txt").write_text("retrieval")
    (tmp_path / "test" / "nshards.txt").write_text("1")
    files = sorted((report[0] / "adversarial_eval" / "images").iterdir())
    with tarfile.open(tmp_path / "test" / "0.tar", "w") as tar:
        for file, caption in zip(files, scenes[1]):
            for suffix, data in (("png", file.read_bytes()), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{file.stem}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    pgd, folder, _ = exported
    model = [tiny_clip, "--pretrained", pgd / "best.pt"] if source == "best.pt" else [f"local-dir:{folder}"]
    command = ["clip_benchmark", "eval", "--dataset", "wds/scenes", "--dataset_root", tmp_path, "--model", *model]
    command += [] if source == "best.pt" else ["--pretrained", "none"]
    command += ["--task", "zeroshot_retrieval", "--recall_k", 1, 5, "--no_amp", "--num_workers", 0]
    command += ["--output", tmp_path / "result.json"]
    argv, sys.argv = sys.argv, [str(word) for word in command]
    try:
        importlib.import_module("clip_benchmark.cli").main()
    finally:
        sys.argv = argv
    recalls = json.loads((tmp_path / "result.json").read_text())["metrics"]
    ours = metrics(report[0] / "evaluation")["rows"]["caption-aware"]
    assert 0 < ours["transfer_recall_i2t@5"] < 1
    for theirs, direction in {"text_retrieval_recall": "i2t", "image_retrieval_recall": "t2i"}.items():
        for k in (1, 5):
            assert recalls[f"{theirs}@{k}"] == pytest.approx(ours[f"transfer_recall_{direction}@{k}"], abs=1e-6)


def test_torchvision_and_datasets_open_the_adversarial_set_to_the_same_pixels(report, tmp_path):
    folder = report[0] / "adversarial_eval"
    images = ImageFolder(folder, PILToTensor())
    assert images.classes == ["images"] and len(images) == EVAL
    (pixels, labels) = next(iter(torch.utils.data.DataLoader(images, batch_size=EVAL)))
    (loaded,) = datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(tmp_path)).values()
    by_id = {row["coco_id"]: np.asarray(row["image"]).transpose(2, 0, 1) for row in loaded}
    for (name, _), image in zip(images.samples, pixels):
        np.testing.assert_array_equal(image, by_id[int(Path(name).stem)])
    assert pixels.shape == (EVAL, 3, 64, 64) and labels.tolist() == [0] * EVAL


SCHEMA = json.loads((ROOT / "tests" / "metrics.schema.json").read_text())


def check_metrics(folder, stage):
    """metrics.json against the schema: as strict JSON, and as one stage only."""
    record = json.loads((folder / "metrics.json").read_text(), parse_constant=pytest.fail)  # NaN is not JSON
    validator = jsonschema.Draft202012Validator
    validator.check_schema(SCHEMA)
    validator({"$ref": f"#/$defs/{stage}", "$defs": SCHEMA["$defs"]}).validate(record)
    validator(SCHEMA).validate(record)
    return record


@pytest.mark.parametrize("stage", STAGES)
def test_metrics_follow_the_schema(stage, report):
    record = check_metrics(report[0] / stage, STAGES[stage])
    if STAGES[stage] == "training":
        assert len(record["train_ids"]) == record["n"] and len(record["val_ids"]) == record["n_validation"]
    if stage == "evaluation":
        assert len(record["coco_ids"]) == record["n"]
        assert record["rows"].keys() == record["per_image"].keys() == record["health"].keys()
        for conditions in record["per_image"].values():
            assert {len(values) for scored in conditions.values() for values in scored.values()} == {record["n"]}


def cells_of(row):
    return ["".join(cell.itertext()) for cell in row]


@pytest.mark.parametrize("comparable", [False, True])
def test_the_table_is_github_flavoured_markdown_whatever_the_names(comparable, report):
    text = (report[0] / "evaluation" / "metrics.json").read_text().replace('"MAT"', json.dumps(ODD))
    record = json.loads(text)
    if comparable:  # then the report's figures stand beside ours
        record["args"] |= {key: vars(evaluate.parse_args([]))[key] for key in ("model", "pretrained", "eval_data")}
        record["args"]["steps"] = 20
    for row in record["rows"]:
        record["sanity"][row] = {"checks": [["it holds", row != ODD, "1 | 2"], ["it holds", True, "3"]]}
    record["paired"][0] |= {"rows": ["original", ODD], "separated": False}
    html = cmarkgfm.github_flavored_markdown_to_html(evaluate.markdown_table(record))
    page = ElementTree.fromstring(f"<div>{html}</div>")
    assert [child.tag for child in page] == ["p", "table", "p", "p", "p", "ul"]
    header, *rows = page.find("table").iter("tr")
    assert len(header) == 16 if comparable else 13
    assert [cells_of(row)[0].removesuffix(" (!)") for row in rows] == list(record["rows"])
    for row, name in zip(rows, record["rows"]):
        cells = cells_of(row)
        assert len(row) == len(header) and cells[11] == str(EVAL)
        assert cells[0].endswith("(!)") == (name == ODD)
        assert cells[12] == evaluate.duration(record["rows"][name]["training_seconds"])
        assert comparable == bool(name == "original" and cells[13:] == ["0.2513", "-0.1783", "-"]) or name != "original"
    assert f"original ~ {ODD}" in "".join(page[3].itertext())
    items = ["".join(item.itertext()) for item in page.find("ul")]
    assert len(items) == 2 * len(rows) and f"FAILS {ODD}: it holds: 1 | 2" in [" ".join(i.split()) for i in items]


# ---------------------------------------------------------------------------------------------------------------------
# --rerun, and the same bytes


def test_rerun_prints_every_command_of_a_reproduction_with_its_flags(report):
    folder = report[0]
    commands = rerun(folder / "evaluation")
    at = [words[words.index("--output_dir") + 1] for words in commands]
    assert sorted(at) == sorted(str(folder / stage) for stage in STAGES) and at[-1] == str(folder / "evaluation")
    assert at.index(str(folder / "adversarial_train")) < at.index(str(folder / "pgd"))
    for words in commands:  # which refuses other flags
        assert "is complete and was made with these flags" in shell(*words)[0]


ONCE = ["--preset", "tiny", "--num_images", "4", "--steps", "1", "--alpha", "0.03"]


@pytest.fixture(scope="module")
def twice(report, tmp_path_factory):
    """A small evaluation of two inputs, and the commands of --rerun for it run in a fresh folder; both folders."""
    first, again = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("again")
    cache = ["--cache_dir", report[0] / "cache"]
    training = ["--val_images", "2", "--max_steps", "2", "--batch_size", "4", "--export", first / "exported"]
    shell("defend_clip_mat_v2.py", *ONCE, *cache, *training, "--output_dir", first / "elsewhere" / "mat")
    rows = ["--qualities", "--defence", "a|b+jpegrandom", "--no-differentiable_jpeg", "--eot", 2, "--precision", "fp32"]
    rows += ["--checkpoint", f"a|b={first / 'elsewhere' / 'mat' / 'best.pt'}"]
    shell("evaluate.py", *ONCE, *cache, *rows, "--output_dir", first / "evaluation")
    shell("eval_jpeg.py", *ONCE, *cache, "--qualities", 9, "--output_dir", first / "jpeg")
    for stage in ("evaluation", "jpeg"):
        for words in rerun(first / stage):
            shell(*(word.replace(str(first), str(again)) for word in words))
    return first, again


def test_a_training_exports_when_it_ends(twice):
    first, _ = twice
    state = torch.load(first / "elsewhere" / "mat" / "best.pt", weights_only=True)["state_dict"]
    saved = open_clip.factory.load_state_dict(str(first / "exported" / "open_clip_model.safetensors"))
    assert state.keys() == saved.keys() and all(torch.equal(state[key], saved[key]) for key in state)
    assert {*first.iterdir()} == {
        first / name for name in ("elsewhere", "exported", "adversarial_eval", "evaluation", "jpeg")
    }


def figures(record):
    """Without what a clock, the folder or the memory decides."""
    if isinstance(record, list):
        return [figures(value) for value in record]
    if not isinstance(record, dict):
        return record
    passing = {"argv", "args", "inputs", "started", "seconds", "training_seconds", "images_per_s", "peak_memory_bytes"}
    return {key: figures(value) for key, value in record.items() if key not in passing}


def test_the_commands_of_rerun_give_the_same_figures_and_the_same_bytes(twice):
    first, again = twice
    files = {path.relative_to(first) for path in first.rglob("*") if path.is_file()}
    files = {path for path in files if path.parts[0] != "exported" and path.name != ".run"}
    assert {path.suffix for path in files} == {".png", ".jsonl", ".json", ".pt", ".md"}
    for path in files:
        ours, theirs = (first / path).read_bytes(), (again / path).read_bytes()
        if path.name == "table.md":  # the last column is a wall time
            ours, theirs = (re.sub(rb"\| \d+ s \|", b"", text) for text in (ours, theirs))
        if path.name == "metrics.json":
            ours, theirs = (figures(json.loads(text)) for text in (ours, theirs))
        assert ours == theirs, path
    rows = metrics(first / "evaluation")["rows"]
    assert list(rows) == ["original", "a|b", "a|b+jpegrandom"]
    for name in ("jpeg", "evaluation"):
        record = check_metrics(first / name, name)
        assert record["args"]["alpha"] == 0.03 and len(record["coco_ids"]) == record["n"] == 4
    lengths = {len(values) for q in metrics(first / "jpeg")["qualities"].values() for values in q["per_image"].values()}
    assert lengths == {4}


def damaged(record, what):
    argv = {"script": ["/etc/passwd.py"], "words": "python x", "numbers": [1, 2], "escape": ["evaluate.py", "\x1b[2J"]}
    return {"loss": [1, 2]} if what == "foreign" else record | {"argv": argv[what]}


@pytest.mark.parametrize("what", ["foreign", "script", "words", "numbers", "escape", "text", "absent"])
def test_rerun_refuses_what_is_damaged_or_foreign_in_one_line(what, report, tmp_path):
    file, record = tmp_path / "metrics.json", metrics(report[0] / "adversarial_eval")
    if what != "absent":
        file.write_text("{" if what == "text" else json.dumps(damaged(record, what)))
    out, said = shell("evaluate.py", "--rerun", file, code=2)
    assert not out and len(said.splitlines()) == 1 and "error: " in said


def test_rerun_quotes_what_a_shell_would_read_as_more(report, tmp_path):
    record = metrics(report[0] / "adversarial_eval")
    record["argv"] += ["--image_root", "$(touch owned); 'x"]
    record["processes"] = 2
    (tmp_path / "metrics.json").write_text(json.dumps(record))
    words = shlex.split(shell("evaluate.py", "--rerun", tmp_path / "metrics.json")[0], comments=True)
    assert words[:2] == ["torchrun", "--nproc_per_node=2"]
    assert words[-2:] == ["--image_root", "$(touch owned); 'x"]


def test_deterministic_is_set_before_cuda_starts_and_reaches_every_stage(report, tmp_path, monkeypatch):
    at_start, ran = [], []

    def pick_device(name):
        at_start.append((os.environ.get("CUBLAS_WORKSPACE_CONFIG"), torch.are_deterministic_algorithms_enabled()))
        return torch.device("cpu")

    monkeypatch.setattr(common, "pick_device", pick_device)
    monkeypatch.setattr(common, "run_script", ran.append)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    args = tiny("--deterministic", "--output_dir", str(tmp_path / "evaluation"))
    try:
        common.Run(args)
    finally:
        torch.use_deterministic_algorithms(False)
    assert at_start[0] == (":4096:8", True)
    evaluate.reproduce(args)
    common.adversarial_folder(args, "eval", 4)
    assert len(ran) == 6 and all("--deterministic" in words for words in ran)
    assert "free memory" in shell("evaluate.py", "--deterministic", "--batch_size", "auto", code=2)[1]
