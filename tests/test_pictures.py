"""Images and captions of any source: each figure is of the picture that is named; what cannot be read is one line."""

import csv
import itertools
import json
import logging
import shutil
import struct
import warnings
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TINY, refusal, shell
from PIL import Image

import common
import defend_clip_mat_v2 as mat
import evaluate
import generate_pgd_adversarial as generate

SMALL = ["--preset", "smoke", "--steps", 1]
GEOMETRY = {"size": (64, 64), "mode": "RGB", "interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0}


def draw(file, number, size=(60, 40)):
    """A picture that no other number has."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 255, (5, 5, 3), np.uint8)
    Image.fromarray(pixels).resize(size).save(file)


def caption_of(number):
    return f"A {['red', 'blue', 'green', 'orange'][number % 4]} thing, number {number}."


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


def captions_file(folder, names, captions=1):
    """Pictures {file name: number}, and their captions in COCO's form, with ids from 1."""
    images = [{"id": i, "file_name": name} for i, name in enumerate(names, 1)]
    for name, number in names.items():
        draw(folder / name, number)
    texts = [caption_of(number) for number in names.values()]
    annotations = [
        {"image_id": i, "caption": f"{text}{' Again.' * k}"} for k in range(captions) for i, text in enumerate(texts, 1)
    ]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder / "captions.json"


def coco_captions(folder):
    """Four pictures with COCO's names, five captions each; where COCO's pictures are is not in their names."""
    file = captions_file(folder, {f"{1000 + number:012d}.jpg": number for number in range(4)}, captions=5)
    (folder / "val2017").mkdir()
    for image in folder.glob("*.jpg"):
        image.rename(folder / "val2017" / image.name)
    return file


def flags(tmp_path, *words, script=generate):
    words = [*SMALL, "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "out", *words]
    return script.parse_args([str(word) for word in words])


def read(tmp_path, source, *words, split="eval"):
    """Images of a data set, as scripts get them."""
    return common.load_images(flags(tmp_path, "--split", split, f"--{split}_data={source}", *words), split, GEOMETRY)


# MMEB


def local_copy(folder, split, unpacked=()):
    """A local copy of MMEB's COCO part: one split alone, another task beside it, and the zip or some of its images."""
    (file,) = (TINY / f"MMEB-{split}" / "MSCOCO_i2t").glob({"train": "original-*", "eval": "test-*"}[split])
    for task, name in (("MSCOCO_i2t", file.name), ("MSCOCO_t2i", "test-00000-of-00001.parquet")):
        (folder / task).mkdir(parents=True)
        shutil.copy(file, folder / task / name)
    (images,) = (TINY / f"MMEB-{split}").rglob("*.zip")
    if not unpacked:
        shutil.copy(images, folder)
    for path in unpacked:
        zipfile.ZipFile(images).extract(path.removeprefix("images/"), folder / "images")
    return folder


@pytest.mark.parametrize(("split", "packed"), [("train", False), ("eval", True), ("eval", False)])
def test_any_part_of_mmeb_is_read_as_the_whole_of_it(split, packed, tmp_path):
    whole = read(tmp_path, TINY / f"MMEB-{split}", "--num_images", 10, split=split)
    folder = local_copy(tmp_path / "part", split, () if packed else whole.paths)
    part = read(tmp_path, folder, "--num_images", 10, split=split)
    for field in ("paths", "captions", "candidates", "coco_ids", "names", "checksums"):
        assert getattr(whole, field) == getattr(part, field)
    assert np.array_equal(whole.pixels, part.pixels)
    assert whole.pixels.shape == (10, 3, 64, 64) and len({pixels.tobytes() for pixels in whole.pixels}) == 10


def edit_rows(folder, change):
    """Rewrite the parquet file of a split, its first rows, after change(rows)."""
    (file,) = (folder / "MSCOCO_i2t").glob("*.parquet")
    rows = pq.read_table(file).slice(0, 40).to_pylist()
    pq.write_table(pa.Table.from_pylist(change(rows) or rows), file)


def test_training_images_are_distinct_ones_of_train2014_each_with_its_first_caption(tmp_path):
    folder, wanted = local_copy(tmp_path / "part", "train"), []

    def repeat(rows):
        wanted.extend((row["qry_image_path"], row["pos_text"]) for row in rows if "train2014" in row["qry_image_path"])
        return [*rows, *(row | {"pos_text": "Another one."} for row in rows)]

    edit_rows(folder, repeat)
    found = read(tmp_path, folder, "--num_images", len(wanted), split="train")
    assert list(zip(found.paths, found.own_captions)) == wanted and len(wanted) < 40
    with pytest.raises(SystemExit):
        read(tmp_path, folder, "--num_images", len(wanted) + 1, split="train")


def test_members_are_matched_by_name_and_folders_without_apple_doubles():
    names = ["x/MSCOCO_t2i/a.jpg", "MSCOCO_i2t/a.jpg", "__MACOSX/MSCOCO_i2t/._a.jpg", "other/b.jpg"]
    assert common.match_files(["images/MSCOCO_i2t/a.jpg"], names) == {"images/MSCOCO_i2t/a.jpg": ["MSCOCO_i2t/a.jpg"]}
    assert common.match_files(["c.jpg"], names) == {}


def test_the_longest_common_end_of_a_path_decides_among_folders_and_zips(tmp_path):
    data = shutil.copytree(TINY / "MMEB-eval", tmp_path / "MMEB-eval")
    expected = read(tmp_path, data, "--num_images", 4)
    for coco_id in expected.coco_ids:
        draw(data / "adv_val2014" / f"COCO_val2014_{coco_id:012d}.jpg", coco_id)
    (data / "partly downloaded.zip").write_bytes(b"PK")
    assert read(tmp_path, data, "--num_images", 4).digest() == expected.digest()


# Own pictures


@pytest.mark.parametrize(("kind", "suffix"), [("csv", "webp"), ("jsonl", "jpg")])
def test_a_folder_of_own_pictures_is_used_whole_in_its_order(kind, suffix, tmp_path):
    for count in (17, 5):  # more and less than the preset's 16
        images = read(tmp_path, own_pictures(tmp_path / f"{count}", count, suffix, kind))
        assert images.own_captions == [caption_of(number) for number in range(count)]
    assert images.captions[0] == [caption_of(0)] + ["Another one."] * (kind == "jsonl")
    assert images.coco_ids == [None] * 5 and images.names[3] == "000003"
    assert len({pixels.tobytes() for pixels in images.pixels}) == 5
    assert len(read(tmp_path, tmp_path / "5", "--num_images", 2)) == 2


def test_a_photograph_is_turned_as_its_exif_says(tmp_path):
    folder = own_pictures(tmp_path / "mine", 2, "jpg")
    upright = Image.open(folder / "picture 0.jpg").convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    upright.rotate(90, expand=True).save(folder / "inner" / "picture 1.jpg", exif=exif, quality=95)
    first, second = read(tmp_path, folder).pixels.astype(int)
    assert np.abs(first - second).mean() < 6 < np.abs(first - np.rot90(second, axes=(1, 2))).mean()


def test_large_photographs_and_panoramas_are_read_without_a_warning_and_absurd_ones_are_not(tmp_path, capsys):
    mine = own_pictures(tmp_path / "mine", 3, "jpg")
    Image.new("L", (12_000, 7_500), 90).save(mine / "picture 0.jpg")
    Image.new("RGB", (20_000, 300), "red").save(mine / "inner" / "picture 1.jpg")
    Image.new("RGB", (2600, 2600), "red").save(mine / "picture 2.jpg", "BMP")  # 20 MB
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        assert len(read(tmp_path, mine)) == 3
    Image.new("L", (5, 5)).save(mine / "picture 0.jpg", "GIF")
    data = bytearray((mine / "picture 0.jpg").read_bytes())
    data[6:10] = struct.pack("<HH", 13_400, 13_400)  # pixels that it claims; Pillow's limit is 179 million
    (mine / "picture 0.jpg").write_bytes(data)
    assert "broken image picture 0.jpg (13400 x 13400 pixels)" in refusal(capsys, read, tmp_path, mine)


def test_cocos_captions_give_five_captions_an_image_of_which_none_is_wrong(tmp_path):
    images = read(tmp_path, coco_captions(tmp_path / "coco"))
    assert images.coco_ids == [1000, 1001, 1002, 1003] and images.names[0] == f"{1000:012d}"
    assert images.own_captions[0] == caption_of(0) and {*map(len, images.captions)} == {5}
    row = evaluate.Row("x", None, None, None, *evaluate.load_candidates("evaluation", images))
    assert len(row.captions) == 20 and [row.captions[i] for i in row.own] == images.own_captions
    for wrong, own in zip(row.wrong_captions(slice(None)).tolist(), images.captions):
        assert [caption for caption, is_wrong in zip(row.captions, wrong) if not is_wrong] == own


BROKEN = {  # what is said: content of metadata.csv
    "entry 1 has no file_name": "file_name,caption\n,x\n",
    "'a.png' has an empty caption": "file_name,caption\na.png, \n",
    "'b.png' has an empty caption": "file_name\nb.png\n",
    "1 of 1 images are missing; --image_root gives their folder: none.png": "file_name,caption\nnone.png,x\n",
    "metadata.csv, entry 1 has more fields than the first line: put captions in quotes": "file_name,caption\na,b, c.\n",
}


@pytest.mark.parametrize("said", BROKEN)
def test_broken_own_data_is_one_line(said, tmp_path, capsys):
    (tmp_path / "metadata.csv").write_text(BROKEN[said])
    line = refusal(capsys, read, tmp_path, tmp_path)
    assert said in line and f"--eval_data {tmp_path}" in line


def test_of_two_files_of_captions_none_is_chosen_nor_one_of_two_images_of_one_id(tmp_path, capsys):
    mine = own_pictures(own_pictures(tmp_path / "mine", 3), 3, kind="jsonl")
    assert "it has metadata.jsonl and metadata.csv" in refusal(capsys, read, tmp_path, mine)
    file = captions_file(tmp_path, {"1.png": 1, "2.png": 2})
    file.write_text(file.read_text().replace('"id": 2', '"id": 1'))
    assert "two of its images have the id 1" in refusal(capsys, read, tmp_path, file)


def test_two_spellings_of_a_path_are_one_picture_and_no_caption_is_cut_at_a_comma(tmp_path):
    own_pictures(tmp_path, 3)
    (tmp_path / "metadata.csv").write_text(
        'file_name,caption\n./picture 0.png,"A ring, a star."\npicture 0.png,A star.\nx/../picture 2.png,A dot.,,\n'
    )
    assert read(tmp_path, tmp_path).captions == [["A ring, a star.", "A star."], ["A dot."]]


# Where an image is


def test_a_home_folder_is_found_in_every_flag(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (own_pictures(tmp_path / "of 3", 3) / "metadata.csv").rename(tmp_path / "metadata.csv")
    for root in ("~/of 3", "eval=~/of 3"):
        assert len(read(tmp_path, "~", "--image_root", root)) == 3
    words = ["--model", "local-dir:~/m", "--output_dir", "~/out", "--checkpoint", "x=local-dir:~/x"]
    args = flags(tmp_path, *words, script=evaluate)
    expected = f"local-dir:{tmp_path}/m", f"{tmp_path}/out", [("x", f"local-dir:{tmp_path}/x")]
    assert (args.model, args.output_dir, args.checkpoint) == expected


def test_a_folder_of_images_may_have_the_name_of_a_split_or_an_equals_sign_in_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (own_pictures(tmp_path / "train", 3) / "metadata.csv").rename(tmp_path / "metadata.csv")
    assert len(read(tmp_path, ".", "--image_root", "train")) == 3
    (tmp_path / "train").rename(tmp_path / "a=b")
    for roots in (["a=b"], ["eval=a=b"], ["train=.", "eval=a=b"]):
        assert len(read(tmp_path, ".", "--image_root", *roots)) == 3
    line = refusal(capsys, read, tmp_path, ".", "--image_root", "a=b", ".")
    assert "--image_root a=b .: give one folder" in line


def test_an_own_picture_is_the_file_at_its_path_and_no_other_of_its_name(tmp_path, capsys):
    mine = own_pictures(tmp_path / "mine", 4)
    expected = read(tmp_path, mine).digest()
    for number in range(4):
        draw(mine / "edges" / f"picture {number}.png", 50 + number)
    shutil.make_archive(mine / "old", "zip", mine / "edges")
    assert read(tmp_path, mine).digest() == expected
    (mine / "picture 2.png").unlink()
    line = refusal(capsys, read, tmp_path, mine)
    assert "1 of 4 images are missing; --skip_bad_images leaves them out: picture 2.png (looked into" in line


def test_images_of_a_captions_file_are_at_their_paths_or_found_by_cocos_names_alone(tmp_path, capsys):
    file = coco_captions(tmp_path / "coco")
    other, content = tmp_path / "coco" / "adv" / "val2017", file.read_text()
    expected = read(tmp_path, file)
    shutil.copytree(tmp_path / "coco" / "val2017", other)
    assert read(tmp_path, file).digest() == expected.digest()  # the two are equal
    for image in other.iterdir():
        draw(image, int(image.stem))
    line = refusal(capsys, read, tmp_path, file)
    assert f"000000001000.jpg may be {other}/000000001000.jpg or {tmp_path}/coco/val2017/000000001000.jpg" in line
    root = tmp_path / "coco" / "val2017"
    assert read(tmp_path, file, "--image_root", f"train={other}", f"eval={root}").digest() == expected.digest()
    file.write_text(content.replace('"00000', '"val2017/00000'))
    assert np.array_equal(read(tmp_path, file).pixels, expected.pixels)
    shutil.rmtree(other)
    file.write_text(content.replace("000000001000.jpg", "dogs/1.jpg"))
    draw(tmp_path / "coco" / "cats" / "1.jpg", 7)
    line = refusal(capsys, read, tmp_path, file)
    assert "1 of 4 images are missing; --skip_bad_images leaves them out: dogs/1.jpg" in line


def test_missing_pictures_are_named_in_one_line_and_left_out_on_request(tmp_path, capsys):
    mine = own_pictures(tmp_path / "mine")
    for number in range(0, 12, 2):
        (mine / f"picture {number}.png").unlink()
    first = ", ".join(f"picture {number}.png" for number in (0, 2, 4, 6, 8))
    line = refusal(capsys, read, tmp_path, mine)
    assert f"6 of 12 images are missing; --skip_bad_images leaves them out: {first} (looked into" in line
    images = read(tmp_path, mine, "--skip_bad_images")
    assert "6 broken or missing images are left out" in capsys.readouterr().out
    assert images.own_captions == [caption_of(number) for number in range(1, 12, 2)]
    assert images.names == [f"{number:06d}" for number in range(1, 12, 2)]  # no other picture's when those come back
    shutil.rmtree(mine / "inner")
    line = refusal(capsys, read, tmp_path, mine, "--skip_bad_images")
    assert "12 of 12 images are missing; --image_root gives their folder: picture 0.png, inner/picture 1.png" in line


# Leakage


def load_training(tmp_path, *words):
    args = flags(tmp_path, "--batch_size", 2, *words, script=mat)
    return common.load_training_images(args, GEOMETRY)


@pytest.mark.parametrize(("way", "row"), [("id", 3), ("pixels", 10)])  # a row trained on, and one validated on
def test_an_evaluation_image_of_mmeb_is_not_trained_on_under_its_id_nor_under_another(way, row, tmp_path, capsys):
    words = ["--num_images", 8, "--val_images", 4, "--train_data"]
    training, validation = load_training(tmp_path, *words, TINY / "MMEB-train")
    assert (len(training), len(validation)) == (8, 4) and not {*training.coco_ids} & {*validation.coco_ids}
    evaluated = read(tmp_path, TINY / "MMEB-eval", "--num_images", 20).paths
    name = "COCO_train2014_000000999999.jpg"
    if way == "id":
        name = evaluated[19][-30:].replace("val2014", "train2014")  # beyond the images of the preset's table
    folder, path = local_copy(tmp_path / "part", "train"), f"images/MSCOCO_i2t/Train/{name}"
    edit_rows(folder, lambda rows: [line for line in rows if "train2014" in line["qry_image_path"]][:12])
    edit_rows(folder, lambda rows: rows[row].update(qry_image_path=path))
    draw(folder / path, 0)
    if way == "pixels":
        with zipfile.ZipFile(TINY / "MMEB-eval" / "images.zip") as archive:
            (folder / path).write_bytes(archive.read(evaluated[5]))
    line = refusal(capsys, load_training, tmp_path, *words, folder)
    assert "leakage: 1 ids or contents" in line and f"{path} is {evaluated[19 if way == 'id' else 5]}" in line


def test_own_pictures_are_trained_on_without_an_evaluation_set(tmp_path, capsys):
    training, validation = load_training(tmp_path, "--train_data", own_pictures(tmp_path / "mine"))
    assert (len(training), len(validation)) == (11, 1)
    assert "no --eval_data was given" in capsys.readouterr().out


def test_ids_of_own_data_in_cocos_form_are_no_leak_and_equal_pictures_or_names_of_coco_are(tmp_path, capsys):
    words = ["--train_data", captions_file(tmp_path / "a", {f"{i}.png": i for i in range(5)}), "--eval_data"]
    others = {f"{i}.png": i for i in range(5, 10)}
    training, validation = load_training(tmp_path, *words, captions_file(tmp_path / "b", others))
    assert {*training.coco_ids, *validation.coco_ids} == {None}
    for shared in (2, 4):  # trained on, and validated on
        held_out = captions_file(tmp_path / "b", others | {"copy.png": shared})
        line = refusal(capsys, load_training, tmp_path, *words, held_out)
        assert "leakage: 1 ids or contents" in line and f"{shared}.png is copy.png of --eval_data" in line
    named = {"COCO_val2014_000000001002.png": 50, "51.png": 51, "52.png": 52}
    words = ["--train_data", captions_file(tmp_path / "c", named), "--eval_data", coco_captions(tmp_path / "coco")]
    line = refusal(capsys, load_training, tmp_path, *words)
    assert "COCO_val2014_000000001002.png is 000000001002.jpg of --eval_data" in line


def test_a_table_of_pictures_that_a_model_was_trained_or_validated_on_is_refused(tmp_path):
    small = [*SMALL, "--cache_dir", tmp_path / "cache"]
    words = ["--train_data", own_pictures(tmp_path / "mine", 12, "bmp"), "--max_steps", 1, "--batch_size", 4]
    shell("defend_clip_mat_v2.py", *small, *words, "--output_dir", tmp_path / "mat")
    # as other files, with other captions
    held_out = captions_file(tmp_path, {f"{number}.png": number for number in (50, 51, 2, 11)})
    held_out.write_text(held_out.read_text().replace("thing", "picture"))
    small += ["--attack_steps", 1, "--qualities", "--trainings", "--checkpoint", f"own=local-dir:{tmp_path}/mat"]
    _, line = shell("evaluate.py", *small, "--eval_data", held_out, "--output_dir", tmp_path / "table", code=2)
    assert "leakage: own was trained on 2 of the evaluation images, such as 11.png" in line


# Logs and notebooks


def test_progress_in_a_log_file_is_lines_and_no_blanks(tmp_path, monkeypatch):
    clock = itertools.count(step=40)  # seconds: longer than the pauses between two lines
    monkeypatch.setattr("tqdm.std.time", lambda: next(clock))
    words = [*SMALL, "--train_data", own_pictures(tmp_path / "mine", 5), "--output_dir", tmp_path / "mat"]
    words += ["--epochs", 1, "--batch_size", 2, "--cache_dir", tmp_path / "cache"]
    _, log = shell("defend_clip_mat_v2.py", *words)
    assert "train:  50%|" in log and "validate: " in log  # one within the other
    assert all(line and line == line.strip() and line.isprintable() for line in log.removesuffix("\n").split("\n"))


def test_the_users_logging_is_silenced_while_a_script_runs_alone(tmp_path):
    seen = []
    common.run_main(lambda _: seen.append(logging.root.manager.disable), flags(tmp_path))
    assert seen == [logging.ERROR] and logging.root.manager.disable == 0
