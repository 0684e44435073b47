"""Own pictures and captions: each figure is of the picture that is named, and what cannot be read is one line."""

import itertools
import json
import shutil
import struct
import warnings

from conftest import TINY, jsonl, lines_of, metrics, shell
from PIL import Image
from test_pictures import caption_of, coco_captions, draw, own_pictures


def attack(tmp_path, source, *words, code=0):
    """Attack the images of a data set, into tmp_path/out: what is printed, or the lines with which it ends."""
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    words = ["--split", "eval", f"--eval_data={source}", "--output_dir", tmp_path / "out", *words]
    words = ["--preset", "smoke", "--steps", 1, "--cache_dir", tmp_path / "cache", *words]
    out, err = shell("generate_pgd_adversarial.py", *words, code=code)
    return lines_of(err) if code else out


def attacked(tmp_path, *given):
    """What the metadata says of these images once they are attacked, such as their similarities."""
    attack(tmp_path, *given)
    return jsonl(tmp_path / "out" / "metadata.jsonl")


def captions_file(folder, numbers):
    """Pictures in COCO's form, with ids from 1 and names of their own."""
    images = [{"id": i, "file_name": f"pictures/{number}.png"} for i, number in enumerate(numbers, 1)]
    for number in numbers:
        draw(folder / "pictures" / f"{number}.png", number)
    annotations = [{"image_id": i, "caption": caption_of(number)} for i, number in enumerate(numbers, 1)]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder / "captions.json"


# Flags


def test_a_home_folder_behind_an_equals_sign_is_own_pictures_of_which_all_are_used(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for count in (17, 3):  # more and less than the preset's 16
        own_pictures(tmp_path / f"of {count}", count)
        attack(tmp_path, f"~/of {count}")
        assert metrics(tmp_path / "out")["n"] == count
    (tmp_path / "of 3" / "metadata.csv").rename(tmp_path / "metadata.csv")
    attack(tmp_path, "~", "--image_root=eval=~/of 3")


def test_a_folder_of_images_may_have_the_name_of_a_split_or_an_equals_sign_in_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (own_pictures(tmp_path / "train", 3) / "metadata.csv").rename(tmp_path / "metadata.csv")
    attack(tmp_path, ".", "--image_root", "train")
    (tmp_path / "train").rename(tmp_path / "a=b")
    attack(tmp_path, ".", "--image_root", "eval=a=b")
    (line,) = attack(tmp_path, ".", "--image_root", "a=b", ".", code=2)
    assert "--image_root a=b .: give one folder" in line


# Captions


def test_of_two_files_of_captions_none_is_chosen(tmp_path):
    mine = own_pictures(tmp_path / "mine", 3)
    own_pictures(mine, 3, kind="jsonl")
    (line,) = attack(tmp_path, mine, code=2)
    assert "it has metadata.jsonl and metadata.csv" in line
    (mine / "metadata.jsonl").unlink()
    attack(tmp_path, mine)


def test_two_spellings_of_a_path_are_one_picture_and_no_caption_is_cut_at_a_comma(tmp_path):
    for number in range(2):
        draw(tmp_path / "mine" / f"pic{number}.png", number)
    table = tmp_path / "mine" / "metadata.csv"
    table.write_text("file_name,caption\n./pic0.png,A ring.\npic0.png,A star.\nx/../pic1.png,A dot.,,\n")
    assert [entry["caption"] for entry in attacked(tmp_path, tmp_path / "mine")] == ["A ring.", "A dot."]
    table.write_text("file_name,caption\npic0.png,A ring, a star.\n")
    (line,) = attack(tmp_path, tmp_path / "mine", code=2)
    assert "metadata.csv, entry 1 has more fields than the first line: put captions in quotes" in line


# Where an image is


def test_an_own_picture_is_the_file_at_its_path_and_no_other_of_its_name(tmp_path):
    mine = own_pictures(tmp_path / "mine", 4)
    expected = attacked(tmp_path, mine)
    for number in range(4):
        draw(mine / "edges" / f"picture {number}.png", 50 + number)
    shutil.make_archive(mine / "old", "zip", mine / "edges")
    assert attacked(tmp_path, mine) == expected
    (mine / "picture 2.png").unlink()
    (line,) = attack(tmp_path, mine, code=2)
    assert "1 of 4 images are missing; --skip_bad_images leaves them out: picture 2.png (looked into" in line


def test_images_of_a_captions_file_are_at_their_paths_or_found_by_cocos_names_alone(tmp_path):
    file = coco_captions(tmp_path / "coco")
    other, content = tmp_path / "coco" / "adv" / "val2017", file.read_text()
    expected = attacked(tmp_path, file)
    shutil.copytree(tmp_path / "coco" / "val2017", other)
    assert attacked(tmp_path, file) == expected  # the two are equal
    for image in other.iterdir():
        draw(image, 50 + int(image.stem))
    (line,) = attack(tmp_path, file, code=2)
    assert f"000000001000.jpg may be {other}/000000001000.jpg or {tmp_path}/coco/val2017/000000001000.jpg" in line
    assert attacked(tmp_path, file, "--image_root", tmp_path / "coco" / "val2017") == expected
    file.write_text(content.replace('"00000', '"val2017/00000'))
    again = attacked(tmp_path, file)
    assert [row["clean_similarity"] for row in again] == [row["clean_similarity"] for row in expected]
    shutil.rmtree(other)
    file.write_text(content.replace("000000001000.jpg", "dogs/1.jpg"))
    draw(tmp_path / "coco" / "cats" / "1.jpg", 7)
    (line,) = attack(tmp_path, file, code=2)
    assert "1 of 4 images are missing; --skip_bad_images leaves them out: dogs/1.jpg" in line


def test_the_longest_common_end_of_a_path_decides_among_folders_and_zips(tmp_path):
    data = shutil.copytree(TINY / "MMEB-eval", tmp_path / "MMEB-eval")
    expected = attacked(tmp_path, data, "--num_images", 4)
    for entry in expected:
        draw(data / "adv_val2014" / f"COCO_val2014_{entry['coco_id']:012d}.jpg", entry["coco_id"])
    (data / "partly downloaded.zip").write_bytes(b"PK")
    assert attacked(tmp_path, data, "--num_images", 4) == expected


def test_missing_pictures_are_named_in_one_line_and_left_out_on_request(tmp_path):
    mine = own_pictures(tmp_path / "mine")
    for number in range(0, 12, 2):
        (mine / f"picture {number}.png").unlink()
    (line,) = attack(tmp_path, mine, code=2)
    first = ", ".join(f"picture {number}.png" for number in (0, 2, 4, 6, 8))
    assert f"6 of 12 images are missing; --skip_bad_images leaves them out: {first} (looked into" in line
    assert "6 broken or missing images are left out" in attack(tmp_path, mine, "--skip_bad_images")
    captions = [entry["caption"] for entry in jsonl(tmp_path / "out" / "metadata.jsonl")]
    assert captions == [caption_of(number) for number in range(1, 12, 2)] and metrics(tmp_path / "out")["n"] == 6
    shutil.rmtree(mine / "inner")
    (line,) = attack(tmp_path, mine, "--skip_bad_images", code=2)
    assert "12 of 12 images are missing; --image_root gives their folder: picture 0.png, inner/picture 1.png" in line


def test_a_caption_whose_id_two_images_have_is_not_given_to_either(tmp_path):
    file = captions_file(tmp_path / "mine", range(3))
    file.write_text(file.read_text().replace('"id": 2', '"id": 1'))
    (line,) = attack(tmp_path, file, code=2)
    assert "two of its images have the id 1" in line


# Leakage


def test_ids_of_own_data_in_cocos_form_are_no_leak_and_equal_pictures_are(tmp_path):
    words = ["--preset", "smoke", "--steps", 1, "--max_steps", 1, "--batch_size", 2, "--output_dir", tmp_path / "mat"]
    words += ["--train_data", captions_file(tmp_path / "a", range(5)), "--eval_data"]
    shell("defend_clip_mat_v2.py", *words, captions_file(tmp_path / "b", range(5, 10)))
    for shared in (2, 4):  # trained on, and validated on
        held_out = captions_file(tmp_path / "b", [*range(5, 10), shared])
        _, line = shell("defend_clip_mat_v2.py", *words, held_out, code=2)
        assert f"leakage: 1 ids or contents of evaluation images are trained on: pictures/{shared}.png is " in line


def test_a_table_of_pictures_that_a_model_was_trained_or_validated_on_is_refused(tmp_path):
    small = ["--preset", "smoke", "--steps", 1, "--cache_dir", tmp_path / "cache"]
    words = ["--train_data", own_pictures(tmp_path / "mine", 12, "bmp"), "--max_steps", 1, "--batch_size", 2]
    shell("defend_clip_mat_v2.py", *small, *words, "--output_dir", tmp_path / "mat")
    small += ["--attack_steps", 1, "--qualities", "--trainings", "--checkpoint", f"own=local-dir:{tmp_path}/mat"]
    for number in (2, 11):  # trained on, and validated on; as another file, with another caption
        held_out = captions_file(tmp_path / str(number), [50, 51, 52, number])
        held_out.write_text(held_out.read_text().replace("thing", "picture"))
        words = ["--eval_data", held_out, "--output_dir", tmp_path / str(number) / "evaluation"]
        _, line = shell("evaluate.py", *small, *words, code=2)
        assert "leakage: own was trained on" in line


# Large images


def test_large_photographs_and_panoramas_are_read_without_a_warning_and_absurd_ones_are_not(tmp_path):
    mine = own_pictures(tmp_path / "mine", 3, "jpg")
    Image.new("L", (12_000, 7_500), 90).save(mine / "picture 0.jpg")
    Image.new("RGB", (20_000, 300), "red").save(mine / "inner" / "picture 1.jpg")
    Image.new("RGB", (2600, 2600), "red").save(mine / "picture 2.jpg", "BMP")  # 20 MB
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        attack(tmp_path, mine)
    Image.new("L", (5, 5)).save(mine / "picture 0.jpg", "GIF")
    data = bytearray((mine / "picture 0.jpg").read_bytes())
    data[6:10] = struct.pack("<HH", 13_400, 13_400)  # pixels that it claims; Pillow's limit is 179 million
    (mine / "picture 0.jpg").write_bytes(data)
    (line,) = attack(tmp_path, mine, code=2)
    assert "broken image picture 0.jpg (13400 x 13400 pixels)" in line


# Logs


def test_progress_in_a_log_file_is_lines_and_no_blanks(tmp_path, monkeypatch):
    clock = itertools.count(step=40)  # seconds: longer than the pauses between two lines
    monkeypatch.setattr("tqdm.std.time", lambda: next(clock))
    own_pictures(tmp_path / "mine", 5)  # four of them are trained on
    words = ["--preset", "smoke", "--train_data", tmp_path / "mine", "--output_dir", tmp_path / "mat"]
    words += ["--epochs", 1, "--batch_size", 2, "--cache_dir", tmp_path / "cache"]
    _, log = shell("defend_clip_mat_v2.py", *words)
    assert "train:  50%|" in log and "validate: " in log  # one within the other
    assert all(line and line == line.strip() and line.isprintable() for line in log.removesuffix("\n").split("\n"))
