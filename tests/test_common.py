"""Formulas, flags, runs, CLIP, and the data path: what it reads, what it refuses, and in which words."""

import importlib
import math
import shutil
import tracemalloc
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import SCRIPTS, TINY, jsonl, process, refusal, shell
from hub import serve_hub
from torch.nn import functional as F

import common
import defend_clip_mat_v2 as mat
import defend_clip_pgd_v2 as pgd
import evaluate

GEOMETRY = {"size": (64, 64), "mode": "RGB", "interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0}


def flags(tmp_path, *words):
    """The flags of a training on the tiny preset, with outputs under tmp_path."""
    words = ["--preset", "tiny", "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "run", *words]
    return mat.parse_args([str(word) for word in words])


def images_of(args, split, count):
    return common.load_images(args, split, GEOMETRY, 0, count)


def copy(split, tmp_path):
    """A writable copy of the embedded data."""
    return Path(shutil.copytree(TINY / f"MMEB-{split}", tmp_path / f"MMEB-{split}"))


def edit_rows(folder, split, change):
    """Rewrite a parquet split after change(columns)."""
    (file,) = (folder / "MSCOCO_i2t").glob(f"{split}-*.parquet")
    columns = pq.read_table(file).to_pydict()
    change(columns)
    pq.write_table(pa.table(columns), file)


# -- formulas


def test_improvement_gives_the_published_figures_to_the_digit():
    clean_0, adversarial_0, _ = evaluate.REPORT["original"]
    assert round(100 * (clean_0 - adversarial_0) / clean_0) == 171
    for clean, adversarial, gain in [*evaluate.REPORT.values()][1:]:
        assert round(evaluate.improvement(clean, adversarial, clean_0, adversarial_0), 3) == gain


def test_interval_holds_the_mean_shrinks_with_n_and_takes_little_memory():
    values = np.random.default_rng(0).normal(0.3, 0.1, 400)
    low, high = evaluate.interval(values, 0)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * 0.1 / 20, rel=0.15)  # the normal approximation
    assert np.ptp(evaluate.interval(values[:25], 0)) > 2.5 * (high - low)
    tracemalloc.start()
    evaluate.interval(range(3000), 0)
    assert tracemalloc.get_traced_memory()[1] < 8e6  # all picks at once: 480 MB
    tracemalloc.stop()


def test_contrastive_loss_is_open_clips_but_that_equal_captions_are_never_negatives():
    image, text = (F.normalize(torch.randn(5, 8), dim=1) for _ in range(2))
    loss = partial(common.contrastive_loss, image, logit_scale=torch.tensor(50.0))
    torch.testing.assert_close(loss(text), open_clip.ClipLoss()(image, text, torch.tensor(50.0)))
    assert loss(text[[0] * 5]) == 0
    twice = text[[0, 1, 2, 3, 3]]
    assert loss(twice) < open_clip.ClipLoss()(image, twice, torch.tensor(50.0))


# -- flags and runs


def test_a_flag_given_overrides_the_preset_and_the_reports_commands_have_the_reports_values(tmp_path):
    args = flags(tmp_path, "--lr", "3e-6", "--eps", "4/255")
    assert (args.lr, args.epochs, args.eps) == (3e-6, common.PRESETS["tiny"]["epochs"], pytest.approx(4 / 255))
    expected = {"batch_size": 16, "lr": 1e-5, "epochs": 3, "eps": 8 / 255, "alpha": 2 / 255, "steps": 20}
    expected |= {"num_images": 5000, "model": "ViT-L-14-quickgelu", "pretrained": "openai"}
    words = ["--batch_size", "16", "--lr", "1e-5", "--epochs", "3"]
    pgd = importlib.import_module("defend_clip_pgd_v2")
    for args in (mat.parse_args(words), pgd.parse_args([*words, "--loss_threshold", "0.1"])):
        assert {key: vars(args)[key] for key in expected} == expected
    assert args.loss_threshold == 0.1 and not args.online_steps
    assert vars(mat.parse_args([])) | {"output_dir": ""} == vars(mat.parse_args(words)) | {"output_dir": ""}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_gives_every_flag_with_its_default(script, capsys):
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(script).parse_args(["--help", "--preset", "tiny"])
    text = capsys.readouterr().out
    assert "8/255" in text and "tests/tiny/MMEB-eval" in "".join(text.split()) and "%(default)" not in text


# -- CLIP


def test_a_caption_is_computed_once(tmp_path):
    clip = common.load_clip(flags(tmp_path))
    assert clip.geometry == GEOMETRY
    clip.encode_text(["A ring.", "A star."])
    clip.model.encode_text = None  # not asked again
    assert len(clip.encode_text(["A star.", "A ring.", "A star."])) == 3


# -- data


def test_training_rows_are_distinct_train2014_images_with_captions_in_order(tmp_path):
    images = images_of(flags(tmp_path), "train", 300)
    table = pq.read_table(next((TINY / "MMEB-train" / "MSCOCO_i2t").glob("original-*"))).to_pydict()
    rows = [pair for pair in zip(table["qry_image_path"], table["pos_text"]) if "COCO_train2014_" in pair[0]][:300]
    assert list(zip(images.paths, images.own_captions)) == rows
    assert "val2014" in "".join(table["qry_image_path"][:300])  # there was something to leave out
    assert images.pixels.shape == (300, 3, 64, 64) and images.pixels.dtype == np.uint8
    assert len({pixels.tobytes() for pixels in images.pixels}) == 300


def test_two_folders_of_one_name_are_not_mixed_up_and_unpacked_images_give_the_same_pixels(tmp_path):
    folder = copy("train", tmp_path)  # of the same name, split names and size, as datasets sees it
    edit_rows(folder, "original", lambda columns: columns["pos_text"].reverse())
    one, other = (flags(tmp_path, "--train_data", source) for source in (TINY / "MMEB-train", folder))
    assert images_of(one, "train", 5).captions != images_of(other, "train", 5).captions
    with zipfile.ZipFile(TINY / "MMEB-eval" / "images.zip") as archive:
        archive.extractall(tmp_path / "unpacked")
    (tmp_path / "unpacked" / "MSCOCO_i2t").rename(tmp_path / "unpacked" / "val2014")  # COCO's own folder
    packed = images_of(flags(tmp_path), "eval", 20).pixels
    unpacked = images_of(flags(tmp_path, "--image_root", tmp_path / "unpacked"), "eval", 20).pixels
    assert np.array_equal(packed, unpacked)


def test_members_are_matched_by_name_and_folders_without_apple_doubles():
    names = ["x/MSCOCO_t2i/a.jpg", "MSCOCO_i2t/a.jpg", "__MACOSX/MSCOCO_i2t/._a.jpg", "other/b.jpg"]
    assert common.match_files(["images/MSCOCO_i2t/a.jpg"], names) == {"images/MSCOCO_i2t/a.jpg": ["MSCOCO_i2t/a.jpg"]}
    assert common.match_files(["c.jpg"], names) == {}


def test_planted_leakage_is_found_and_validation_images_are_disjoint(tmp_path, capsys):
    args = flags(tmp_path, "--num_images", 20, "--val_images", 5)
    training, validation = common.load_training_images(args, GEOMETRY)
    assert (len(training), len(validation)) == (20, 5) and not {*training.coco_ids} & {*validation.coco_ids}
    folder, first = copy("train", tmp_path), training.paths[3]
    leaked = pq.read_table(next((TINY / "MMEB-eval" / "MSCOCO_i2t").glob("test-*")))["qry_img_path"][5].as_py()
    with zipfile.ZipFile(TINY / "MMEB-eval" / "images.zip") as archive:
        image = archive.read(leaked)
    same_id = leaked[-30:].replace("val2014", "train2014")
    unknown = "COCO_train2014_000000999999.jpg"
    for row, name, count in ((3, same_id, 2), (3, unknown, 1), (22, same_id, 2)):  # by id and pixels, by pixels alone
        edit_rows(folder, "original", lambda columns: columns["qry_image_path"].__setitem__(3, first))
        with zipfile.ZipFile(folder / "images_zip" / "MSCOCO_i2t.zip", "a") as archive:
            archive.writestr(f"MSCOCO_i2t/Train/{name}", image)
        path = f"images/MSCOCO_i2t/Train/{name}"
        edit_rows(folder, "original", lambda columns, r=row, path=path: columns["qry_image_path"].__setitem__(r, path))
        args.train_data = str(folder)
        line = refusal(capsys, common.load_training_images, args, GEOMETRY)
        assert f"leakage: {count} ids or contents" in line and f"{path} is {leaked}" in line


HUB_MODEL = ["--model", "hf-hub:lab/tiny-clip"]
CARD = """---
dataset_info:
- config_name: MSCOCO_i2t
  splits:
  - {name: SPLIT, num_examples: 3, num_bytes: 5}
  - {name: diverse_instruction, num_examples: 7, num_bytes: 5}
"""


@pytest.fixture(scope="module")
def from_hub(tmp_path_factory):
    """Scripts by their default data and no flags but sizes, over the hub's own client; the row counts are stale.

    The folder in which they ran, their environment, {split: command} without the model, and what the hub was asked.
    """
    tmp_path, repos = tmp_path_factory.mktemp("hub"), {"models/lab/tiny-clip": TINY / "clip"}
    for split, name in (("train", "original"), ("eval", "test")):
        folder = repos[f"datasets/TIGER-Lab/MMEB-{split}"] = copy(split, tmp_path)
        card = folder / "README.md"
        card.write_text(card.read_text().replace("---\n", CARD.replace("SPLIT", name), 1))
    generate = ["generate_pgd_adversarial.py", "--steps", 1, "--split"]
    commands = {"train": [*generate, "train", "--num_images", 12], "eval": [*generate, "eval", "--num_images", 4]}
    with serve_hub(repos) as hub:
        env = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url}
        process(tmp_path, env | {"HF_HUB_OFFLINE": "0"}, *([*words, *HUB_MODEL] for words in commands.values()))
    return tmp_path, env, commands, hub.requests


def test_the_hub_gives_the_same_data_whatever_its_row_counts_and_only_the_members_needed(from_hub, tmp_path):
    folder, env, commands, requests = from_hub
    for split, words in commands.items():
        shell(*words, "--preset", "tiny", "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / split)
        folders = tmp_path / split, folder / f"runs/report/adversarial_{split}"
        local, remote = (jsonl(made / "metadata.jsonl") for made in folders)
        assert local == remote
    sent = [sent for method, path, _, sent in requests if method == "GET" and "images.zip" in path]
    assert 0 < sum(sent) < (TINY / "MMEB-eval" / "images.zip").stat().st_size
    assert len(sent) < 4 + 8  # the directory, and about one an image
    again = process(folder, env, *([*words, *HUB_MODEL] for words in commands.values()))  # nothing is asked again
    assert again.count("nothing to do") == 2


def test_what_was_downloaded_once_is_enough_for_fewer_images_without_the_hub(from_hub):
    folder, env, commands, _ = from_hub
    fewer = [[*words, *HUB_MODEL, "--num_images", 2, "--output_dir", split] for split, words in commands.items()]
    process(folder, env | {"HF_HUB_OFFLINE": "1"}, *fewer)
    for split in commands:
        made = folder / f"runs/report/adversarial_{split}", folder / split
        entries, first = (jsonl(each / "metadata.jsonl") for each in made)
        assert first == entries[:2]


# -- trainings


def test_an_epoch_is_whole_batches_of_distinct_images_in_an_order_of_its_own():
    state = {"log": [], "last_step": 4, "steps_per_epoch": 2, "training": range(10), "size": 4, "stopped": None}
    trainer = SimpleNamespace(**state, args=SimpleNamespace(seed=0), train_mode=lambda: None)
    batches = [batch.tolist() for _, batch, _ in common.Trainer.__iter__(trainer)]
    first, second = batches[0] + batches[1], batches[2] + batches[3]
    assert len({*first}) == len({*second}) == 8 and {*first} | {*second} == {*range(10)} and first != second
    trainer.args.seed = 1
    assert first != sum([batch.tolist() for _, batch, _ in common.Trainer.__iter__(trainer)][:2], [])


# -- MAT


def test_augmentations_have_the_strength_they_say_and_follow_the_seed():
    def augmented(seed, step):
        generator = common.step_generator(seed, step, torch.device("cpu"))
        return mat.augment(grey, *mat.draw_augmentations(64, grey.shape[1:], generator))

    grey = torch.full((64, 3, 32, 32), 0.5)
    out = augmented(0, 1)
    assert out.std((1, 2, 3)).mean() == pytest.approx(15 / 255, rel=0.02)  # noise, after the blur
    means = out.mean((1, 2, 3))
    assert 0.39 < means.min() < 0.43 and 0.57 < means.max() < 0.61  # brightness 0.8 to 1.2
    assert torch.equal(out, augmented(0, 1)) and not torch.equal(out, augmented(1, 0))
    flat = torch.tensor([0.1, 0.9]).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    no_blur, no_noise = torch.full((2, 1, 1, 1), 0.1), torch.zeros(2, 3, 8, 8)
    half = torch.full((2, 1, 1, 1), 0.5)  # contrast is around an image's own mean, brightness around black
    torch.testing.assert_close(mat.augment(flat, torch.ones(2, 1, 1, 1), half, no_blur, no_noise), flat)
    torch.testing.assert_close(mat.augment(flat, half, half, no_blur, no_noise), flat / 2)
    dot = torch.zeros(2, 3, 33, 33)
    dot[:, :, 16, 16] = 1
    blurred = mat.gaussian_blur(dot, torch.tensor([0.1, 2.0]).view(2, 1, 1, 1))
    torch.testing.assert_close(blurred[0], dot[0])
    assert blurred[1, 0, 16, 16] == pytest.approx(1 / (2 * math.pi * 4), rel=0.03)
    assert blurred.sum((2, 3)).flatten().tolist() == pytest.approx([1] * 6, rel=1e-3)


@pytest.mark.parametrize("script", [mat, pgd])
def test_only_matrices_decay_and_all_of_the_visual_tower_is_trained(script, tmp_path, monkeypatch):
    seen = []

    def spy(args, run, clip, optimizer, *_):
        seen.append((clip, optimizer))
        raise InterruptedError

    monkeypatch.setattr(common, "Trainer", spy)
    words = ["--preset", "smoke", "--weight_decay", "0.3", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(InterruptedError):
        script.main(script.parse_args([*words, *(["--online_steps", "1"] if script is pgd else [])]))
    ((clip, optimizer),) = seen
    decayed, others = optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0)
    assert all(p.ndim >= 2 for p in decayed["params"]) and all(p.ndim < 2 for p in others["params"])
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in clip.model.visual.parameters()}


def test_the_first_row_of_an_image_has_its_caption(tmp_path, monkeypatch):
    rows = [(f"row {i}", "COCO_val2014_000000000007.jpg", 7, [text], [text]) for i, text in enumerate(["one", "other"])]
    monkeypatch.setattr(common, "read_mmeb", lambda *_: rows)
    assert [entry.captions for entry in common.read_rows(flags(tmp_path), "eval")] == [["one"]]
