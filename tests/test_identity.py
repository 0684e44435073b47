"""What makes two runs the same: flags, data and code; what a complete run, a row, a folder of images is kept for."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, jsonl, metrics, refusal, shell
from PIL import Image
from safetensors.torch import load_file, save_file
from test_pictures import own_pictures

import common
import defend_clip_mat_v2 as mat
import evaluate
import generate_pgd_adversarial as generate

SMALL = ["--preset", "smoke", "--steps", 2]
MEASURING = ["Row", "measure", "load_row", "load_candidates", "row_attack"]
EVERYTHING = ["eval", "mat", "pgd", "rows", "table"]
EDITS = {  # name: (file, old text, new text, what of it changes)
    "a comment": ("common.py", "# (B, hw, W)", "# [B, hw, W]", []),
    "a docstring": ("common.py", '"""Search the L-inf ball', '"""Look into the L-inf ball', []),
    "a message": ("common.py", "another run is writing", "some run is writing", []),
    "a default flag": ("common.py", '"attack_steps": {"report": 75', '"attack_steps": {"report": 80', []),
    "a figure's colour": ("evaluate.py", "#c44e52", "#c44e53", ["table"]),
    "a training's loss": ("common.py", "F.cross_entropy(logits.T, targets)) / 2", "0) / 2", ["mat", "pgd"]),
    "the loss of features": ("defend_clip_pgd_v2.py", ".square().sum(-1)", ".abs().sum(-1)", ["pgd"]),
    "an augmentation": ("defend_clip_mat_v2.py", "NOISE_SIGMA = 15", "NOISE_SIGMA = 16", ["mat"]),
    "the attack": ("common.py", "better = loss > best_loss", "better = loss < 9", EVERYTHING),
    "JPEG's gradient": ("eval_jpeg.py", "cubic - cubic.detach()", "c - c.detach()", ["rows", "table"]),
    "a score": ("evaluate.py", "(others >= similarity)", "(others > similarity)", ["rows", "table"]),
    "an interval": ("evaluate.py", "[0.025, 0.975]", "[0.05, 0.95]", ["table"]),
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the scripts, for edits."""
    folder = tmp_path_factory.mktemp("checkout")
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    return folder


def codes(folder):
    scripts = {"eval": "generate_pgd_adversarial", "mat": "defend_clip_mat_v2", "pgd": "defend_clip_pgd_v2"}
    found = {name: common.code_checksums(folder / f"{script}.py") for name, script in scripts.items()}
    rows = common.code_checksums(folder / "evaluate.py", *MEASURING)
    return found | {"rows": rows, "table": common.code_checksums(folder / "evaluate.py")}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_changes_the_code_of_what_depends_on_it_and_no_more(edit, checkout):
    file, old, new, expected = EDITS[edit]
    before, text = codes(checkout), (checkout / file).read_text()
    assert old in text
    (checkout / file).write_text(text.replace(old, new))
    after = codes(checkout)
    (checkout / file).write_text(text)
    assert [name for name in before if before[name] != after[name]] == expected
    assert before == codes(ROOT)


def test_packages_that_change_numbers_are_part_of_the_code(monkeypatch):
    before = common.code_checksums(ROOT / "defend_clip_mat_v2.py")
    monkeypatch.setattr(torch, "__version__", "1.0+cpu")
    after = common.code_checksums(ROOT / "defend_clip_mat_v2.py")
    assert common.describe_code_changes({"code": before}, after) == "torch has changed" and after["torch"] == "1.0"


def flags(tmp_path, *words):
    return mat.parse_args([*map(str, SMALL), "--output_dir", str(tmp_path / "run"), *words])


def test_an_unfinished_run_of_other_code_or_data_is_refused_and_a_complete_one_is_used_with_a_note(tmp_path, capsys):
    code, inputs = {"common.contrastive_loss": "1", "torch": "2"}, {"images and captions": "a"}
    args = flags(tmp_path)
    run = common.Run(args, code, inputs=inputs)
    run.save_part("a", 1)
    run.release()
    edited = code | {"common.contrastive_loss": "3"}
    line = refusal(capsys, common.Run, args, edited, None, inputs)
    assert "an unfinished run with other code (common.contrastive_loss has changed)" in line and "--overwrite" in line
    line = refusal(capsys, common.Run, args, code, None, {"images and captions": "b"})
    assert "other images and captions" in line
    again = common.Run(flags(tmp_path, "--overwrite"), edited, inputs=inputs)
    assert again.load_part("a") is None
    again.release()
    run = common.Run(args, code, inputs=inputs)
    run.finish(common.load_clip(args))
    run.release()
    complete = common.Run(args, edited, inputs=inputs)
    assert complete.previous and complete.changed == "common.contrastive_loss has changed"
    complete.release()
    assert "other images and captions" in refusal(capsys, common.Run, args, code, None, {"images and captions": "b"})
    other = flags(tmp_path, "--batch_size", "4")  # which matters in a training
    assert "--batch_size 16, not 4" in refusal(capsys, common.Run, other, code, None, inputs)


def test_what_a_refused_run_made_is_removed_again(tmp_path, capsys):
    (tmp_path / "there").mkdir()
    for folder in ("there", "new/run"):
        words = [*map(str, SMALL), "--split", "eval", "--num_images", "4", "--output_dir", str(tmp_path / folder)]
        words += ["--model", f"local-dir:{TINY / 'clip'}", "--pretrained", str(ROOT / "README.md")]
        assert "README.md" in refusal(capsys, common.run_main, generate.main, generate.parse_args(words))
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]


def test_another_radius_has_default_folders_of_its_own():
    assert generate.parse_args(["--split", "eval", "--eps", "4/255"]).output_dir == "runs/report/adversarial_eval_eps4"
    assert evaluate.parse_args(["--eps", "2/255"]).output_dir == "runs/report/evaluation_eps2"
    assert generate.parse_args(["--eps", "8/255"]).output_dir == "runs/report/adversarial_train"


# A folder of adversarial images


def generated(tmp_path, name, count, *words, code=0):
    words = [*SMALL, "--split", "eval", "--num_images", count, "--cache_dir", tmp_path / "cache", *words]
    return shell("generate_pgd_adversarial.py", *words, "--output_dir", tmp_path / name, code=code)


def images_of(folder):
    return {path.name: path.read_bytes() for path in (folder / "images").iterdir()}


def test_more_images_extend_a_folder_and_fewer_leave_it(tmp_path, monkeypatch):
    generated(tmp_path, "whole", 9)
    generated(tmp_path, "out", 4)
    first, attacked, pgd = images_of(tmp_path / "out"), [], common.pgd
    record = metrics(tmp_path / "out")
    record["attack"]["images_unmoved"] = 2  # as if some were
    (tmp_path / "out" / "metrics.json").write_text(json.dumps(record))
    monkeypatch.setattr(common, "pgd", lambda loss, x, *rest: attacked.append(len(x)) or pgd(loss, x, *rest))
    generated(tmp_path, "out", 9)
    assert attacked == [5] and images_of(tmp_path / "out").items() > first.items()
    assert images_of(tmp_path / "out") == images_of(tmp_path / "whole")
    assert jsonl(tmp_path / "out" / "metadata.jsonl") == jsonl(tmp_path / "whole" / "metadata.jsonl")
    records = [metrics(tmp_path / name) for name in ("out", "whole")]
    for key in ("n", "clean_similarity", "adversarial_similarity", "share_lowered"):
        assert records[0][key] == records[1][key]
    assert records[0]["attack"] == records[1]["attack"] | {"images_unmoved": 2}
    assert "nothing to do" in generated(tmp_path, "out", 3)[0] and metrics(tmp_path / "out")["n"] == 9
    (tmp_path / "adversarial_eval").symlink_to(tmp_path / "out")
    out, _ = shell("eval_jpeg.py", *SMALL, "--num_images", 12, "--output_dir", tmp_path / "jpeg", "--qualities", 50)
    assert "too few images and is extended" in out and attacked == [5, 3, 12]


def test_a_folder_is_not_extended_by_other_code_or_other_images(tmp_path, monkeypatch):
    data = shutil.copytree(TINY / "MMEB-eval", tmp_path / "MMEB-eval")
    generated(tmp_path, "out", 4, "--eval_data", data)
    before = images_of(tmp_path / "out")
    code_checksums = common.code_checksums
    with monkeypatch.context() as patch:
        patch.setattr(common, "code_checksums", lambda *names: code_checksums(*names) | {"common.pgd": "edited"})
        out, _ = generated(tmp_path, "out", 4, "--eval_data", data)
        assert "note:" in out and "(common.pgd has changed)" in out and "--overwrite" in out
        _, line = generated(tmp_path, "out", 5, "--eval_data", data, code=2)
        assert "other code (common.pgd has changed)" in line and "--overwrite" in line
    unpacked = tmp_path / "MMEB-eval" / "unpacked"
    shutil.unpack_archive(data / "images.zip", unpacked)
    (data / "images.zip").unlink()
    first = next(unpacked.rglob(f"COCO_val2014_{jsonl(tmp_path / 'out' / 'metadata.jsonl')[0]['coco_id']:012d}.jpg"))
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(first)
    _, line = generated(tmp_path, "out", 5, "--eval_data", data, code=2)
    assert "other images or captions" in line and images_of(tmp_path / "out") == before


def test_a_killed_extension_goes_on_and_is_not_taken_for_complete(tmp_path):
    generated(tmp_path, "whole", 9)
    generated(tmp_path, "out", 4)
    listed = tmp_path / "out" / "metadata.jsonl"
    listed.write_text((tmp_path / "whole" / "metadata.jsonl").read_text())  # and killed before metrics.json
    generated(tmp_path, "out", 9)
    assert images_of(tmp_path / "out") == images_of(tmp_path / "whole")
    assert listed.read_text() == (tmp_path / "whole" / "metadata.jsonl").read_text()


def test_an_interrupted_run_does_not_go_on_with_images_attacked_for_other_captions(tmp_path, monkeypatch):
    source, pgd, calls = own_pictures(tmp_path / "mine", 6), common.pgd, []

    def interrupted(*args):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return pgd(*args)

    words = ["--eval_data", source, "--batch_size", 2]
    with monkeypatch.context() as patch:
        patch.setattr(common, "pgd", interrupted)
        generated(tmp_path, "out", 6, *words, code=130)
    listed = source / "metadata.csv"
    listed.write_text(listed.read_text().replace("number 1.", "another one."))
    assert "resuming" in generated(tmp_path, "out", 6, *words)[0]
    generated(tmp_path, "fresh", 6, *words)
    assert images_of(tmp_path / "out") == images_of(tmp_path / "fresh")


def test_an_image_that_is_no_longer_broken_is_another_data_set_and_further_images_are_no_other_inputs(tmp_path):
    source = own_pictures(tmp_path / "mine", 6)
    whole = (source / "picture 2.png").read_bytes()
    (source / "picture 2.png").write_bytes(b"no image")
    words = ["--eval_data", source, "--skip_bad_images"]
    generated(tmp_path, "out", 4, *words)
    args = generate.parse_args([str(word) for word in [*SMALL, "--split", "eval", "--num_images", 4, *words]])
    before = common.adversarial_checksum(tmp_path / "out", common.load_rows(args, "eval"))
    generated(tmp_path, "out", 6, *words)
    assert metrics(tmp_path / "out")["n"] == 5
    assert common.adversarial_checksum(tmp_path / "out", common.load_rows(args, "eval", 4)) == before
    (source / "picture 2.png").write_bytes(whole)
    for count in (4, 6):
        assert "other images or captions" in generated(tmp_path, "out", count, *words, code=2)[1]


def test_what_is_complete_outlives_an_unfinished_extension_of_other_code_and_the_other_way_round(tmp_path, capsys):
    one, other, code = flags(tmp_path), flags(tmp_path, "--num_images", "5"), {"common.pgd": "1"}

    def run(args, code=code):
        return common.Run(args, code, extends=["num_images"])

    complete = run(one)
    complete.require_space(0)
    complete.finish(common.load_clip(one))
    complete.release()
    extension = run(other)
    extension.require_space(0)
    extension.save_part("a", 1)
    extension.release()
    look = run(one)  # at what is complete
    assert look.previous
    look.report_complete()
    look.release()
    again = run(other)
    assert again.previous and again.load_part("a") == 1
    again.release()
    edited = run(other, {"common.pgd": "2"})
    assert edited.previous and edited.load_part("a") is None
    assert "an unfinished run with other code (common.pgd has changed) is dropped" in capsys.readouterr().out


# Rows of a table


@pytest.fixture
def table(report, tmp_path):
    """A copy of the small report; (its folder, a function that runs evaluate.py there and returns what it printed)."""
    folder = Path(shutil.copytree(report[0], tmp_path / "report"))

    def run(*words, code=0):
        command = ["evaluate.py", "--preset", "smoke", "--qualities", 50, "--cache_dir", report[0] / "cache"]
        return shell(*command, "--output_dir", folder / "evaluation", *words, code=code)[0]

    return folder, run


def test_transferred_images_of_another_attack_are_not_used(report, capsys):
    words = ["--preset", "smoke", "--num_images", "16", "--output_dir", str(report[0] / "evaluation")]
    for changed, message in (
        (["--steps", "3"], "--steps 8, not 3"), (["--alpha", "1/255"], "--alpha 2/255, not 1/255"),
        (["--seed", "1"], "--seed 0, not 1"),
    ):  # fmt: skip
        args = evaluate.parse_args([*words, *changed])
        assert message in refusal(capsys, common.adversarial_folder, args, "eval")
    args = evaluate.parse_args([*words, "--seed", "1", "--adversarial_dir", str(report[0] / "adversarial_eval")])
    assert common.adversarial_folder(args, "eval") == report[0] / "adversarial_eval"


def measured(printed):
    """The rows that were attacked."""
    return [line.split(":")[0] for line in printed.splitlines() if ": clean R@1" in line]


def other_weights(folder, scale=1.01):
    """A row's weights: those of a trained model, changed a little."""
    state = load_file(folder / "mat" / "open_clip_model.safetensors")
    state = {key: value * scale if "visual" in key else value for key, value in state.items()}
    save_file(state, folder / "x.safetensors")
    return folder / "x.safetensors"


def test_a_further_row_alone_is_attacked_and_none_is_lost(table):
    folder, run = table
    before, row = metrics(folder / "evaluation"), ["--checkpoint", f"x={other_weights(folder)}"]
    assert measured(run(*row)) == ["x"]
    after = metrics(folder / "evaluation")
    assert list(after["rows"]) == ["original", "MAT", "contrastive, offline", "features, online", "x", "JPEG 50"]
    for name, figures in before["rows"].items():
        assert after["rows"][name] == figures and after["per_image"][name] == before["per_image"][name]
    assert measured(run()) == [] and "x" not in metrics(folder / "evaluation")["rows"]
    assert measured(run(*row)) == [] and metrics(folder / "evaluation")["rows"] == after["rows"]
    other_weights(folder, 1.02)
    assert measured(run(*row)) == ["x"]
    assert "nothing to do" in run(*row)


def test_seeds_are_averaged_and_share_the_adversarial_images_of_the_first(table):
    folder, run = table
    printed = run("--reproduce", "--trainings", "pgd", "--seeds", 2)
    assert measured(printed) == ["contrastive, offline, seed 1"] and "lowest of 2 seeds" in printed
    training = metrics(folder / "pgd_seed1")["args"]
    assert training["seed"] == 1 and training["adversarial_dir"].endswith("/adversarial_train")
    record = metrics(folder / "evaluation")
    row, seeds = record["rows"]["contrastive, offline"], []
    assert list(record["rows"]) == ["original", "contrastive, offline", "JPEG 50"]
    for name in ("contrastive, offline", "contrastive, offline, seed 1"):
        seeds.append(np.mean(record["per_image"][name]["white_box"]["similarity"]))
        assert row["per_seed"][name]["white_box_similarity"] == pytest.approx(seeds[-1])
    assert seeds[0] != seeds[1] and row["white_box_similarity"] == pytest.approx(np.mean(seeds))
    assert (folder / "evaluation" / "white_box" / "contrastive_offline_seed_1" / "metadata.jsonl").is_file()
    assert measured(run()) == [] and "seed 1" in str(metrics(folder / "evaluation")["not_shown"]["keys"])


def test_a_table_made_before_the_trainings_is_completed_by_them(table):
    folder, run = table
    for stage in ("mat", "pgd", "online"):
        (folder / stage).rename(folder / f"later_{stage}")
    shutil.rmtree(folder / "evaluation")
    assert measured(run()) == ["original", "JPEG 50"]
    for stage in ("mat", "pgd", "online"):
        (folder / f"later_{stage}").rename(folder / stage)
    assert measured(run()) == ["MAT", "contrastive, offline", "features, online"]


@pytest.mark.parametrize("edited", ["evaluate.Row", "evaluate.draw_table", "defend_clip_pgd_v2.main"])
def test_other_code_is_measured_again_or_noted_where_it_matters(edited, table, monkeypatch):
    folder, run = table
    before, code_checksums = metrics(folder / "evaluation"), common.code_checksums

    def edit(script, *names):
        code = code_checksums(script, *names)
        return code | {edited: "edited"} if edited in code else code

    monkeypatch.setattr(common, "code_checksums", edit)
    printed, record = run(), metrics(folder / "evaluation")
    assert measured(printed) == (list(record["rows"]) if edited == "evaluate.Row" else [])
    assert record["per_image"] == before["per_image"]
    notes = {name: row["note"] for name, row in record["rows"].items() if row["note"]}
    if edited == "defend_clip_pgd_v2.main":
        assert list(notes) == ["contrastive, offline", "features, online"]
        for note in notes.values():
            assert f"other code ({edited} has changed)" in note and note.endswith("--overwrite")
        assert "\ncontrastive, offline (*)\n" in printed and "(*) contrastive, offline: " in printed
        assert r"caption-aware) (\*)" in (folder / "evaluation" / "table.md").read_text()
    else:
        assert not notes
    assert "nothing to do" in run()
