"""Anyone's pictures, radii and machines: what is read, what is left alone, what surroundings must not break."""

import csv
import io
import json
import logging
import shutil
import zipfile
from contextlib import redirect_stdout
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from conftest import ROOT, TINY, jsonl, metrics, refusal, shell
from PIL import Image

import common
import defend_clip_mat_v2 as mat
import evaluate
import generate_pgd_adversarial as generate

SMALL = ["--preset", "smoke", "--steps", 2, "--attack_steps", 2]
COLOURS = ["red", "blue", "green", "orange"]


def draw(file, number, size=(60, 40)):
    """A picture that no other number has."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 255, (5, 5, 3), np.uint8)
    Image.fromarray(pixels).resize(size).save(file)


def caption_of(number):
    return f"A {COLOURS[number % 4]} thing, number {number}."


def own_pictures(folder, count=12, suffix="png", kind="csv"):
    """A folder of pictures, some in a subfolder, with their captions as a CSV or as JSON lines."""
    names = [f"{'inner/' if number % 2 else ''}picture {number}.{suffix}" for number in range(count)]
    for number, name in enumerate(names):
        draw(folder / name, number)
    rows = [{"file_name": name, "caption": caption_of(number)} for number, name in enumerate(names)]
    if kind == "csv":
        with open(folder / "metadata.csv", "w", newline="", encoding="utf-8-sig") as file:  # as Excel saves it
            writer = csv.DictWriter(file, ["file_name", "caption"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = [{"file_name": row["file_name"], "text": [row["caption"], "Another one."]} for row in rows]
        (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def flags(tmp_path, *words, script=generate):
    words = [*SMALL[:4], "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "out", *words]
    return script.parse_args([str(word) for word in words])


def eval_flags(tmp_path, source, *words):
    return flags(tmp_path, "--split", "eval", "--eval_data", source, *words)


GEOMETRY = {"size": (64, 64), "mode": "RGB", "interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0}


def images_of(args, split="eval"):
    return common.load_images(args, split, GEOMETRY)


# Data


def local_copy(tmp_path, split, *, card=True, unpacked=False):
    """A local copy of MMEB's COCO part: one split alone, with another task beside it."""
    source, folder = TINY / f"MMEB-{split}", tmp_path / f"MMEB-{split}"
    (folder / "MSCOCO_i2t").mkdir(parents=True)
    (file,) = (source / "MSCOCO_i2t").glob({"train": "original-*", "eval": "test-*"}[split])
    shutil.copy(file, folder / "MSCOCO_i2t")
    (folder / "MSCOCO_t2i").mkdir()
    shutil.copy(file, folder / "MSCOCO_t2i" / "test-00000-of-00001.parquet")
    (images,) = source.rglob("*.zip")
    if unpacked:
        zipfile.ZipFile(images).extractall(folder / "images")
    else:
        shutil.copy(images, folder)
    if card:
        shutil.copy(source / "README.md", folder)
    return folder


@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize("form", [{}, {"card": False}, {"card": False, "unpacked": True}])
def test_any_part_of_mmeb_is_read_as_the_whole_of_it(split, form, tmp_path):
    whole = flags(tmp_path, "--split", split, "--num_images", 10)
    part = flags(tmp_path, f"--{split}_data", local_copy(tmp_path, split, **form), "--num_images", 10)
    images, others = (images_of(args, split) for args in (whole, part))
    for column in ("paths", "coco_ids", "captions", "candidates", "names", "checksums"):
        assert getattr(images, column) == getattr(others, column)


@pytest.mark.parametrize(("kind", "suffix"), [("csv", "png"), ("csv", "webp"), ("jsonl", "jpg")])
def test_a_folder_of_own_pictures_is_used_whole_in_its_order(kind, suffix, tmp_path):
    args = eval_flags(tmp_path, own_pictures(tmp_path / "mine", 5, suffix, kind))
    images = images_of(args)
    assert images.own_captions == [caption_of(number) for number in range(5)]
    assert images.captions[0] == [caption_of(0)] + ["Another one."] * (kind == "jsonl")
    assert images.coco_ids == [None] * 5 and images.names[3] == "000003"
    assert len({pixels.tobytes() for pixels in images.pixels}) == 5
    assert len(images_of(eval_flags(tmp_path, tmp_path / "mine", "--num_images", 2))) == 2


def test_a_photograph_is_turned_as_its_exif_says(tmp_path):
    folder = own_pictures(tmp_path / "mine", 2, "jpg")
    upright = Image.open(folder / "picture 0.jpg").convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    upright.rotate(90, expand=True).save(folder / "inner" / "picture 1.jpg", exif=exif, quality=95)
    first, second = images_of(eval_flags(tmp_path, folder)).pixels.astype(int)
    assert np.abs(first - second).mean() < 6 < np.abs(first - np.rot90(second, axes=(1, 2))).mean()


def coco_captions(folder, numbers=range(4)):
    """COCO's captions file, five captions a picture, and its pictures beside it."""
    images = [{"id": 1000 + number, "file_name": f"{1000 + number:012d}.jpg"} for number in numbers]
    for image in images:
        draw(folder / "val2017" / image["file_name"], image["id"])
    captions = [(image["id"], f"Caption {k} of {image['id']}.") for k in range(5) for image in images]
    annotations = [{"image_id": image_id, "caption": caption} for image_id, caption in captions]
    (folder / "captions_val2017.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder / "captions_val2017.json"


def test_cocos_captions_give_five_captions_an_image_of_which_none_is_wrong(tmp_path):
    file = coco_captions(tmp_path / "coco")
    images = images_of(eval_flags(tmp_path, file))
    assert images.coco_ids == [1000, 1001, 1002, 1003] and images.names[0] == f"{1000:012d}"
    assert images.own_captions[0] == "Caption 0 of 1000." and len(images.captions[0]) == 5
    row = evaluate.Row("x", None, None, None, *evaluate.load_candidates("evaluation", images))
    assert len(row.captions) == 20 and [row.captions[i] for i in row.own] == images.own_captions
    for wrong, of_it in zip(row.wrong_captions(slice(None)).tolist(), images.captions):
        assert [caption for caption, is_wrong in zip(row.captions, wrong) if not is_wrong] == of_it
    (tmp_path / "elsewhere").mkdir()
    (file.parent / "val2017").rename(tmp_path / "elsewhere" / "val2017")
    args = eval_flags(tmp_path, file, "--image_root", f"train={tmp_path}", f"eval={tmp_path}/elsewhere")
    assert len(images_of(args)) == 4


BROKEN = {
    "entry 1 has no file_name": {"file_name": None, "caption": "x"},
    "'a.png' has an empty caption": {"file_name": "a.png", "caption": " "},
    "'b.png' has an empty caption": {"file_name": "b.png"},
    "1 of 1 images are missing; --image_root gives their folder: none.png": {"file_name": "none.png", "caption": "x"},
}


@pytest.mark.parametrize("said", BROKEN)
def test_broken_own_data_is_one_line(said, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "metadata.jsonl").write_text(json.dumps(BROKEN[said]))
    line = refusal(capsys, images_of, eval_flags(tmp_path, tmp_path / "mine"))
    assert said in line and f"--eval_data {tmp_path}/mine" in line


def test_own_pictures_are_trained_on_without_an_evaluation_set_and_checked_against_one(tmp_path, capsys):
    mine = own_pictures(tmp_path / "mine")
    args = flags(tmp_path, "--train_data", mine, "--batch_size", 1, script=mat)
    training, validation = common.load_training_images(args, GEOMETRY)
    assert (len(training), len(validation), args.eval_data) == (11, 1, None)
    assert "not checked" in capsys.readouterr().out
    draw(tmp_path / "other" / "copy.png", 3)
    (tmp_path / "other" / "metadata.jsonl").write_text('{"file_name": "copy.png", "caption": "x"}')
    named = own_pictures(tmp_path / "named", 2)
    (named / "picture 0.png").rename(named / "COCO_val2014_000000001002.png")
    (named / "metadata.csv").write_text("file_name,caption\nCOCO_val2014_000000001002.png,x\ninner/picture 1.png,y\n")
    for train, held_out, said in (
        (mine, tmp_path / "other", "inner/picture 3.png is copy.png of --eval_data"),
        (named, coco_captions(tmp_path / "coco"), "COCO_val2014_000000001002.png is 000000001002.jpg of --eval_data"),
    ):
        words = ["--train_data", train, "--eval_data", held_out, "--val_images", 1, "--batch_size", 1]
        args = flags(tmp_path, *words, "--num_images", 11 if train == mine else 1, script=mat)
        assert said in refusal(capsys, common.load_training_images, args, GEOMETRY)


def test_own_pictures_from_one_command_to_a_table(tmp_path):
    command = ["evaluate.py", *SMALL, "--eval_data", own_pictures(tmp_path / "mine"), "--qualities", 50]
    out, _ = shell(*command, "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "out")
    record = metrics(tmp_path / "out")
    assert record["n"] == 12 and list(record["rows"]) == ["original", "JPEG 50"] and record["coco_ids"] == []
    assert [entry["caption"] for entry in jsonl(tmp_path / "adversarial_eval" / "metadata.jsonl")][1] == caption_of(1)


def test_captions_that_a_tokenizer_cuts_to_the_same_are_not_each_others_wrong_answers(capsys):
    long = "a red ring above a blue star " * 20
    captions = ["A ring.", f"{long} here", f"{long} there", "A star."]
    clip = SimpleNamespace(tokenizer=open_clip.SimpleTokenizer(context_length=32))
    row = evaluate.Row("x", clip, None, None, captions, torch.arange(4)[:, None], None, torch.arange(4))
    row = evaluate.forgive_equal_captions(row, captions)
    expected = ~torch.eye(4, dtype=torch.bool)
    expected[1, 2] = expected[2, 1] = False
    assert torch.equal(row.wrong_captions(slice(None)), expected)
    assert torch.equal(row.wrong_images(row.own), expected)
    evaluate.print_cut_captions(row)
    assert "2 of 4 captions are longer than its 32 tokens and are cut" in capsys.readouterr().out


# Radii


def test_a_step_may_be_smaller_than_a_grey_level_and_messages_say_radii_as_they_are_typed(capsys):
    args = generate.parse_args(["--eps", "2/255", "--alpha", "0.5/255"])
    assert (args.eps, args.alpha) == (2 / 255, 0.5 / 255)
    assert common.difference("alpha", args.alpha, args.eps) == "--alpha 0.5/255, not 2/255"
    assert [common.radius_text(value) for value in (8 / 255, 0.031, 1 / 255)] == ["8/255", "0.031", "1/255"]
    assert "less than one grey level" in refusal(capsys, generate.parse_args, ["--eps", "0.5/255"])


def test_a_radius_that_8_bits_cannot_hold_is_said(tmp_path, capsys):
    common.run_main(lambda args: None, flags(tmp_path, "--eps", "0.031"))
    assert "--eps 0.031 allows 8-bit images to change by 7 grey levels" in capsys.readouterr().out


def test_radii_are_curves_that_never_rise_and_attack_no_row_again(tmp_path, monkeypatch):
    command = ["evaluate.py", *SMALL, "--num_images", 8, "--qualities", 50, "--cache_dir", tmp_path / "cache"]
    command += ["--output_dir", tmp_path / "out"]
    for figure in ("examples", "cosines", "table"):
        monkeypatch.setattr(f"evaluate.draw_{figure}", lambda *_: None)

    def run(*words):
        with redirect_stdout(io.StringIO()) as out:
            evaluate.main(evaluate.parse_args([str(word) for word in [*command[1:], *words]]))
        return out.getvalue()

    radii = ["--radii", "8/255", "1/255", "2/255", "4/255"]
    assert run().count(": clean R@1") == 2
    before, out, record = metrics(tmp_path / "out"), run(*radii), metrics(tmp_path / "out")
    assert ": clean R@1" not in out and record["per_image"] == before["per_image"]
    assert max(map(len, out[out.index("local-dir:") :].splitlines()[:-1])) <= 80
    for name, curve in record["radii"].items():
        levels, cosines, recalls = zip(*curve)
        row = record["rows"][name]
        assert levels == (0, 1, 2, 4, 8) and cosines[0] == pytest.approx(row["clean_similarity"])
        assert all(a > b for a, b in zip(cosines, cosines[1:])) and all(a >= b for a, b in zip(recalls, recalls[1:]))
        assert cosines[-1] <= row["white_box_similarity"] + 1e-6
        assert f"| {name} | {recalls[0]:.2f} " in (tmp_path / "out" / "table.md").read_text()
    with Image.open(tmp_path / "out" / "radii.png") as image:
        assert image.width > 600
    assert "nothing to do" in run(*radii)
    assert run("--qualities", "50", "30").count(": clean R@1") == 1


# Machines and the user's own files


def test_the_users_logging_is_silenced_while_a_script_runs_alone(tmp_path):
    seen = []
    common.run_main(lambda _: seen.append(logging.root.manager.disable), flags(tmp_path))
    assert seen == [logging.ERROR] and logging.root.manager.disable == 0


def test_a_failed_call_leaves_no_lock(tmp_path, capsys):
    args = flags(tmp_path, "--split", "eval", "--num_images", 4, "--pretrained", ROOT / "README.md")
    for _ in range(2):  # as a notebook's cell, whose traceback keeps what the call has made
        assert "README.md" in refusal(capsys, common.run_main, generate.main, args)


def test_files_of_the_users_are_neither_deleted_nor_overwritten(tmp_path, capsys):
    mine = own_pictures(tmp_path / "mine", 4, kind="jsonl")
    before = {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()}
    args = flags(tmp_path, "--split", "eval", "--eval_data", mine, "--num_images", 4, "--output_dir", mine)
    line = refusal(capsys, common.run_main, generate.main, args)
    assert f"{mine}: it holds metadata.jsonl and no run.json" in line and "choose another --output_dir" in line
    assert before == {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()}
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "metrics.json").write_text('{"accuracy": 1}')
    args = flags(tmp_path, "--split", "eval", "--output_dir", tmp_path / "theirs")
    assert "theirs: it holds metrics.json and no run.json" in refusal(capsys, common.run_main, generate.main, args)
    words = ["generate_pgd_adversarial.py", *SMALL[:4], "--split", "eval", "--output_dir", tmp_path / "made"]
    shell(*words, "--num_images", 3)
    draw(tmp_path / "made" / "images" / "000000000007.png", 7)
    shell(*words, "--num_images", 5)
    assert (tmp_path / "made" / "images" / "000000000007.png").exists()
    assert len(jsonl(tmp_path / "made" / "metadata.jsonl")) == 5


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = flags(tmp_path, "--model", "local-dir:~/m", "--output_dir", "~/out", "--eval_data", "~/data")
    expected = f"local-dir:{tmp_path}/m", f"{tmp_path}/out", f"{tmp_path}/data"
    assert (args.model, args.output_dir, args.eval_data) == expected


def test_an_unreadable_file_is_one_line(tmp_path, capsys, monkeypatch):
    mine = own_pictures(tmp_path / "mine", 4)

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied", "metadata.csv")

    monkeypatch.setattr("builtins.open", denied)
    assert "Permission denied: 'metadata.csv'" in refusal(capsys, images_of, eval_flags(tmp_path, mine))


def test_batchnorm_keeps_its_statistics_in_a_training():
    visual = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.Dropout())
    common.Trainer.train_mode(SimpleNamespace(visual=visual))
    assert [module.training for module in visual] == [True, False, True]
