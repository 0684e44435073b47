"""Retrieval with several captions an image: Karpathy's files, the best own caption, two starts of the margin attack."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from conftest import TINY, metrics, shell
from PIL import Image
from test_pictures import caption_of, draw
from test_truth import ATTACK, stub_row
from torch.nn import functional as F

import common
import evaluate

SMALL = ["--preset", "smoke", "--steps", 1, "--attack_steps", 1, "--qualities", "--trainings"]


def karpathy_file(folder):
    """Karpathy's file of COCO, and its pictures; returns its test images, too."""
    images = []
    for imgid in range(8):
        name = f"COCO_val2014_{900 + imgid:012d}.jpg"
        draw(folder / "val2014" / name, imgid)
        sentences = [{"raw": f"{caption_of(imgid)} {'Again. ' * k}", "imgid": imgid} for k in range(5)]
        split = "train" if imgid == 2 else "restval" if imgid == 5 else "test"
        image = {"filepath": "val2014", "filename": name, "cocoid": 900 + imgid, "split": split}
        images.append(image | {"sentences": sentences})
    file = folder / "dataset_coco.json"
    file.write_text(json.dumps({"images": images, "dataset": "coco"}))
    return file, [image for image in images if image["split"] == "test"]


def test_karpathys_test_split_gives_the_recalls_of_a_plain_computation(tmp_path):
    file, images = karpathy_file(tmp_path / "data")
    shell("evaluate.py", *SMALL, "--eval_data", file, "--output_dir", tmp_path / "table")
    record = metrics(tmp_path / "table")
    assert record["n"] == 6 and record["coco_ids"] == [image["cocoid"] for image in images]

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{TINY / 'clip'}")
    tokenizer = open_clip.SimpleTokenizer(context_length=32)
    with torch.no_grad():
        files = [tmp_path / "data" / "val2014" / image["filename"] for image in images]
        pixels = torch.stack([preprocess(Image.open(path)) for path in files])
        captions = [sentence["raw"] for image in images for sentence in image["sentences"]]
        text_features = model.encode_text(tokenizer(captions), normalize=True)
        cosines = model.eval().encode_image(pixels, normalize=True) @ text_features.T
    owner = torch.arange(6).repeat_interleave(5)  # of each caption
    to_text = owner[cosines.argmax(1)] == torch.arange(6)
    to_image = cosines.argmax(0) == owner
    row = record["rows"]["original"]
    assert row["clean_recall_i2t@1"] == pytest.approx(to_text.float().mean().item())
    assert row["clean_recall_t2i@1"] == pytest.approx(to_image.float().mean().item())
    attacked = cosines[torch.arange(6), 5 * torch.arange(6)]  # of each image the first caption
    assert row["clean_similarity"] == pytest.approx(attacked.mean().item(), abs=1e-5)


def test_karpathys_splits_are_read_with_and_without_folders_and_restval_is_of_training(tmp_path):
    sentences = [{"raw": " A dog runs. "}, {"raw": "Dogs."}]
    splits = ["train", "val", "test", "restval"]
    images = [{"filename": f"{split}.jpg", "split": split, "sentences": sentences} for split in splits]
    images[0]["filepath"] = "train2014"  # as COCO's have
    file = tmp_path / "dataset_flickr30k.json"
    file.write_text(json.dumps({"images": images, "dataset": "flickr30k"}))
    args = SimpleNamespace(train_data=str(file), eval_data=str(file))
    for split, paths in {"eval": ["test.jpg"], "train": ["train2014/train.jpg", "restval.jpg"]}.items():
        rows = common.read_rows(args, split)
        assert [row.path for row in rows] == paths
        assert all(row.captions == ["A dog runs.", "Dogs."] and row.coco_id is None for row in rows)


def hand_made(features, captions=4, right=None):
    """A row of images whose features are given and whose captions are the axes; of images of one grey level each."""
    clip = SimpleNamespace(
        batch_size=8, device=torch.device("cpu"), encode_image=None,
        encode_text=lambda texts: torch.eye(captions)[[int(text) for text in texts]],
        encode_pixels=lambda pixels, _: F.normalize(features[torch.from_numpy(pixels[:, 0, 0, 0].astype(int))], dim=1),
    )  # fmt: skip
    count = len(features)
    pixels = np.arange(count, dtype=np.uint8)[:, None, None, None].repeat(3, 1)
    right = torch.arange(count)[:, None] if right is None else right
    names = [str(caption) for caption in range(captions)]
    return evaluate.Row("x", clip, pixels, pixels, names, right, None, torch.arange(captions))


def test_an_image_is_right_if_any_of_its_own_captions_is_first():
    features = torch.tensor([[1.0, 3, 2, 0], [2, 0, 1, 3]])  # of two images; captions 0, 1 and captions 2, 3 are theirs
    row = hand_made(features, right=torch.tensor([[0, 1], [2, 3]]))
    scored = evaluate.score(row, row.pixels, 0)
    units = F.normalize(features, dim=1)
    assert scored["rank_i2t"].tolist() == [0, 0]  # although the attacked captions 0 and 2 are not first
    np.testing.assert_allclose(scored["similarity"], [units[0, 0], units[1, 2]])
    np.testing.assert_allclose(scored["margin"], [units[0, 1] - units[0, 2], units[1, 3] - units[1, 0]])
    assert scored["rank_t2i"].tolist() == [[1, 0], [1, 0]]  # caption 0 is nearer to image 1, caption 2 to image 0


def test_fewer_captions_than_others_count_once():
    row = hand_made(torch.eye(4)[:2], right=torch.tensor([[0, 1], [2, 2]]))
    assert evaluate.score(row, row.pixels, 0)["rank_t2i"].tolist() == [[0, 1], [1, -1]]  # ties count against the model


def test_the_margin_attack_starts_at_the_lowest_cosine_and_then_at_the_transferred_image(monkeypatch):
    """Planted: from the first start image 3 alone falls, from the second image 1 as well."""
    seen = []

    def attack_row(attack, part, run=None, names=None):
        seen.append((attack.loss, part.transfer[:, 0, 0, 0].tolist()))
        pixels = torch.from_numpy(part.transfer.copy())
        if attack.loss == "margin":
            pixels[:] = 100 + len(seen)
        return pixels, {"zero_gradient": torch.zeros(len(pixels), dtype=torch.bool)}

    def score(part, pixels, seed, gallery=None):
        level, index = np.asarray(pixels)[:, 0, 0, 0], np.arange(len(pixels))
        fallen = (level == 102) & (index == 3) | (level == 103) & (index == 1)
        return {"rank_i2t": fallen.astype(int)}

    monkeypatch.setattr(evaluate, "attack_row", attack_row)
    monkeypatch.setattr(evaluate, "score", score)
    row = hand_made(torch.eye(6), 6)
    found, wrong = evaluate.attack_both(ATTACK, replace(row, transfer=np.full_like(row.pixels, 7)), 0)
    assert [loss for loss, _ in seen] == ["cosine", "margin", "margin"] and len(found) == len(wrong) == 3
    assert len(seen[1][1]) == 6 and seen[2][1] == [7] * 5  # the survivors alone, from the transferred images


def test_an_attacked_image_is_looked_for_among_clean_ones(monkeypatch):
    """Planted: the attack makes all images the same, so that among attacked ones all others are as near."""
    row = stub_row()
    moved = torch.from_numpy(row.pixels.mean(0, keepdims=True).astype(np.uint8).repeat(len(row.pixels), 0))
    fine = {key: torch.zeros(len(moved), dtype=torch.bool) for key in ("zero_gradient", "nonfinite")}
    monkeypatch.setattr(evaluate, "attack_row", lambda attack, part, *_: (moved[: len(part.pixels)], fine))
    conditions = evaluate.measure(replace(row, transfer=row.pixels), ATTACK, 1, 0).conditions
    clean, attacked = (evaluate.encode_row(row, pixels, 0)[0] for pixels in (row.pixels, moved))
    for i, text in enumerate(row.clip.encode_text(row.captions)):
        others = np.delete((clean @ text).numpy(), i)
        ranks = [int((others >= (own @ text).item()).sum()) for own in (clean[i], attacked[i])]
        assert conditions["clean"]["rank_t2i"][i] == ranks[0] and conditions["white_box"]["rank_t2i"][i] == max(ranks)
    assert conditions["white_box"]["rank_t2i"].max() > 0


def test_the_margin_loss_leads_over_the_best_own_caption():
    """Of two own captions the farther one may be lost without losing the image."""
    row = stub_row()
    pair = replace(row, right=torch.stack([row.own, row.own.roll(1)], 1))
    loss_fn = evaluate.row_loss(replace(ATTACK, loss="margin"), pair)(row.clip.encode_image, np.arange(len(row.pixels)))
    scored = evaluate.score(pair, row.pixels, 0)
    np.testing.assert_allclose(-loss_fn(common.as_images(row.pixels, row.clip.device)), scored["margin"], atol=1e-5)


def test_survivors_are_attacked_with_twice_the_steps_and_counted(monkeypatch):
    row, steps, attack_row = stub_row(), [], evaluate.attack_row
    monkeypatch.setattr(evaluate, "attack_row", lambda *given: steps.append(given[0].steps) or attack_row(*given))
    weak, strong = (common.white_box(levels / 255, 3) for levels in (1, 32))
    odd, lowest = np.arange(len(row.pixels)) % 2, torch.from_numpy(row.pixels)
    ranks, none = {"rank_i2t": odd}, {"rank_i2t": odd | 1}
    assert evaluate.check_survivors(row, weak, ranks, lowest, 0) == [0, 6] and {*steps} == {6}
    monkeypatch.setattr(evaluate, "CONVERGENCE_IMAGES", 2)
    assert evaluate.check_survivors(row, strong, ranks, lowest, 0) == [2, 2]
    assert evaluate.check_survivors(row, strong, none, lowest, 0) == [0, 0]
