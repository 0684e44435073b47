"""Every script through the shell on the tiny preset, in small; what it writes, and that other tools open it."""

import hashlib
import importlib
import json
import shutil

import datasets
import numpy as np
import open_clip
import pytest
import torch
from conftest import EVAL, ROOT, TRAIN, VALIDATION, metrics, shell
from PIL import Image

import common


def test_reproduce_runs_the_stages_as_commands_and_ends_with_the_table(report):
    folder, printed, _ = report
    stages = ["adversarial_train", "adversarial_eval", "mat", "pgd", "online"]
    commands = [line for line in printed.splitlines() if line.startswith("$ python ")]
    assert [line.split("--output_dir ")[1] for line in commands] == [str(folder / stage) for stage in stages]
    rows = metrics(folder / "evaluation")["rows"]
    assert list(rows) == ["original", "MAT", "caption-aware", "caption-aware, online", "JPEG 50"]
    assert all(name in printed for name in rows)
    assert max(map(len, printed.split("cosine loss")[1].splitlines()[:-1])) <= 80
    for name in ("table.md", "examples.png", "histogram.png", "table.png"):
        assert (folder / "evaluation" / name).stat().st_size > 100
    assert Image.open(folder / "evaluation" / "examples.png").width > 600


def test_the_attack_breaks_the_model_and_the_table_adds_up(report):
    record = metrics(report[0] / "evaluation")
    original = record["rows"]["original"]
    assert original["clean_similarity"] > 0.8 > 0 > original["white_box_similarity"]
    assert original["clean_recall_i2t@1"] > 0.9 and original["white_box_recall_i2t@1"] < 0.3
    pgd, apgd = (record["attacks"]["original"][f"{method}, cosine, start 0"] for method in ("pgd", "apgd"))
    assert original["transfer_similarity"] == pytest.approx(pgd, abs=1e-3)  # the same attack
    assert original["white_box_similarity"] <= min(pgd, apgd) + 1e-6 and apgd != pgd
    for name, row in record["rows"].items():
        per_image = record["per_image"][name]
        assert row["n"] == EVAL == len(per_image["white_box"]["similarity"])
        for kind in ("clean", "transfer", "white_box"):
            values = per_image[kind]["similarity"]
            assert row[f"{kind}_similarity"] == pytest.approx(np.mean(values))
            assert row[f"{kind}_interval"][0] <= np.mean(values) <= row[f"{kind}_interval"][1]
            assert row[f"{kind}_recall_i2t@1"] == np.mean([rank == 0 for rank in per_image[kind]["rank_i2t"]])
        if name != "original":
            lost, lost_0 = (r["clean_similarity"] - r["white_box_similarity"] for r in (row, original))
            assert row["improvement_white_box"] == pytest.approx(1 - lost / lost_0)
        assert record["health"][name]["max_abs_delta_grey_levels"] == 8
        assert record["health"][name]["images_with_nonfinite_values"] == 0
    assert record["rows"]["JPEG 50"]["white_box_similarity"] < record["rows"]["JPEG 50"]["transfer_similarity"]


def test_a_finished_run_is_left_alone_and_shown_again(report):
    folder, printed, command = report
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("metrics.json")}
    again, _ = shell(command[0], *command[2:])  # without --reproduce
    assert "is complete" in again
    assert printed.split("cosine loss")[1].splitlines()[:9] == again.split("cosine loss")[1].splitlines()[:9]
    stage = next(line for line in printed.splitlines() if line.startswith("$ python defend_clip_mat_v2.py"))
    assert "is complete" in shell(*stage.split()[2:])[0]
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("metrics.json")}


def test_other_flags_do_not_overwrite(report):
    folder, _, command = report
    _, said = shell(command[0], *command[2:], "--restarts", "2", code=2)
    assert "--restarts 1 -> 2" in said and "--overwrite" in said and "Traceback" not in said


def test_metrics_say_how_a_run_was_made(report):
    keys = ["argv", "args", "inputs", "commit", "versions", "device", "started", "seconds", "peak_memory_bytes", "n"]
    for stage in ("adversarial_train", "adversarial_eval", "mat", "pgd", "online", "evaluation"):
        record = metrics(report[0] / stage)
        assert record.keys() >= set(keys), stage
        assert record["seconds"] > 0 and record["peak_memory_bytes"] > 1e8
        assert record["n"] == (EVAL if stage in ("adversarial_eval", "evaluation") else TRAIN)


def test_adversarial_images_are_an_imagefolder_inside_the_ball(report, tmp_path):
    folder = report[0] / "adversarial_eval"
    (loaded,) = datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(tmp_path)).values()
    entries = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert len(loaded) == len(entries) == EVAL and loaded[0]["image"].size == (64, 64)
    assert {e["caption"] for e in entries} == set(loaded["caption"])
    (cache,) = [p for p in (report[0] / "cache").glob("*.npy") if len(np.load(p, mmap_mode="r")) == EVAL]
    for clean, entry in zip(np.load(cache), entries):
        with Image.open(folder / entry["file_name"]) as image:
            delta = np.abs(np.asarray(image).transpose(2, 0, 1).astype(int) - clean)
        assert delta.max() == entry["linf"] == 8
    record = metrics(folder)
    mean = np.mean([entry["adversarial_similarity"] for entry in entries])
    assert record["adversarial_similarity"] == pytest.approx(mean)
    assert record["share_lowered"] == 1.0


def test_training_on_attacked_images_helps_and_its_validation_figures_are_what_they_say(report):
    """A defence that never saw an attack, or a validation that does not attack, would pass all else."""
    folder = report[0]
    rows = metrics(folder / "evaluation")["rows"]
    assert rows["caption-aware"]["transfer_similarity"] > rows["original"]["transfer_similarity"] + 0.1
    assert rows["caption-aware, online"]["white_box_similarity"] > rows["original"]["white_box_similarity"] + 0.1
    for stage in ("mat", "pgd", "online"):
        record = metrics(folder / stage)
        assert all(epoch["val_white_box"] < epoch["val_clean"] - 0.1 for epoch in record["epochs"])
        words = ["--preset", "tiny", "--steps", "8", "--num_images", str(TRAIN), "--val_images", str(VALIDATION)]
        parser = common.make_parser("")
        common.add_train_args(parser)
        words += ["--cache_dir", str(folder / "cache")]
        args = common.parse_flags(parser, words, stage="x", images="train", batch="train")
        _, validation = common.load_training_sets(args)
        figures = common.validate(args, common.load_clip(args, str(folder / stage / "best.pt")), validation)
        best = record["epochs"][record["best_epoch"] - 1]
        assert figures["val_white_box"] == pytest.approx(best["val_white_box"], abs=2e-3)


def test_checkpoints_open_in_open_clip_by_path_and_only_the_visual_tower_moved(report, tmp_path):
    tiny = ROOT / "tests" / "tiny" / "clip"
    config = json.loads((tiny / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "tiny-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    before = open_clip.create_model(f"local-dir:{tiny}").state_dict()
    for stage in ("mat", "pgd"):
        for name in ("best.pt", "last.pt"):
            model = open_clip.create_model("tiny-clip", pretrained=str(report[0] / stage / name))
            moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
            assert moved and all(key.startswith("visual.") for key in moved)


def test_training_logs_every_step_and_picks_the_epoch_on_training_images(report):
    record = metrics(report[0] / "pgd")
    log = [json.loads(line) for line in (report[0] / "pgd" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == list(range(1, record["steps"] + 1))
    assert all(e["loss"] == pytest.approx((e["clean_loss"] + e["twin_loss"]) / 2) for e in log)
    best = max(record["epochs"], key=lambda epoch: epoch["val_white_box"])
    assert record["best_epoch"] == best["epoch"]
    assert len(record["train_ids"]) == TRAIN and len(record["val_ids"]) == VALIDATION
    assert not {*record["train_ids"], *record["val_ids"]} & set(metrics(report[0] / "evaluation")["coco_ids"])


def test_loss_threshold_and_max_steps_stop_the_training(tmp_path):
    small = ["--preset", "tiny", "--num_images", 32, "--val_images", 4, "--steps", 1, "--epochs", 9]
    shell("defend_clip_mat_v2.py", *small, "--loss_threshold", 90, "--loss_window", 3, "--output_dir", tmp_path / "a")
    record = metrics(tmp_path / "a")
    assert (record["stopped_by"], record["steps"]) == ("loss_threshold", 3)


def test_the_reports_training_command_makes_the_adversarial_images_it_lacks(tmp_path):
    report = "--batch_size 16 --lr 1e-5 --epochs 3 --loss_threshold 0.1"
    command = ["defend_clip_pgd_v2.py", *report.split()]
    command += ["--preset", "tiny", "--num_images", 16, "--val_images", 4, "--steps", 1, "--max_steps", 1]
    printed, _ = shell(*command, "--output_dir", tmp_path / "pgd")
    assert "$ python generate_pgd_adversarial.py --split train --num_images 16" in printed
    assert metrics(tmp_path / "pgd")["stopped_by"] == "max_steps"


def test_an_altered_or_missing_adversarial_image_is_refused(report, tmp_path):
    folder = shutil.copytree(report[0] / "adversarial_eval", tmp_path / "adversarial_eval")
    first = json.loads((folder / "metadata.jsonl").read_text().splitlines()[0])["file_name"]
    command = ["eval_jpeg.py", "--preset", "tiny", "--num_images", EVAL, "--adversarial_dir", folder]
    command += ["--steps", 8, "--output_dir", tmp_path / "jpeg", "--cache_dir", report[0] / "cache"]
    done, _ = shell(*command, "--qualities", 30)
    assert len(metrics(tmp_path / "jpeg")["qualities"]["30"]["per_image"]["adaptive"]) == EVAL
    shutil.rmtree(tmp_path / "jpeg")
    assert "made with --alpha" in shell(*command, "--alpha", "1/255", code=2)[1]
    Image.new("RGB", (64, 64), (255, 0, 255)).save(folder / first)
    assert "was altered after it was made" in shell(*command, code=2)[1]
    entries = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    entries[0]["sha256"] = hashlib.sha256((folder / first).read_bytes()).hexdigest()
    (folder / "metadata.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert "is not in the ball around" in shell(*command, code=2)[1]
    (folder / first).unlink()
    assert "No such file" in shell(*command, code=2)[1]
    assert not (tmp_path / "jpeg" / "metrics.json").exists()


def test_a_checkpoint_trained_on_evaluation_images_is_refused(report, tmp_path):
    checkpoint = torch.load(report[0] / "mat" / "best.pt", weights_only=True)
    checkpoint["train_ids"].append(metrics(report[0] / "evaluation")["coco_ids"][2])
    torch.save(checkpoint, tmp_path / "leaky.pt")
    _, said = shell(
        "evaluate.py", "--preset", "tiny", "--num_images", EVAL, "--steps", 8, "--qualities", "--checkpoint",
        f"leaky={tmp_path / 'leaky.pt'}", "--adversarial_dir", report[0] / "adversarial_eval",
        "--output_dir", tmp_path / "evaluation", code=2,
    )  # fmt: skip
    assert "leakage" in said and "Traceback" not in said


@pytest.mark.parametrize(
    "script",
    ["generate_pgd_adversarial.py", "defend_clip_mat_v2.py", "defend_clip_pgd_v2.py", "eval_jpeg.py", "evaluate.py"],
)
def test_help_gives_every_flag_with_its_default(script, capsys):
    with pytest.raises(SystemExit) as end:
        importlib.import_module(script.removesuffix(".py")).parse_args(["--help", "--preset", "tiny"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "8/255" in text and "tests/tiny/MMEB-eval" in "".join(text.split()) and "%(default)" not in text
    assert "None" not in text, [line for line in text.splitlines() if "None" in line]
