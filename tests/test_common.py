"""Formulas, flags, runs, the losses, and the data path: what it reads, what it refuses, and in which words."""

import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT
from hub import serve_hub
from safetensors.torch import load_file, save_file

import common
import defend_clip_mat_v2 as mat
import evaluate

TINY = ROOT / "tests" / "tiny"


def flags(tmp_path, *words):
    """The parsed flags of the tiny preset with outputs under tmp_path."""
    parser = common.make_parser("")
    common.add_train_args(parser)
    words = ["--preset", "tiny", "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "run", *words]
    return common.parse_flags(parser, [str(word) for word in words], stage="test", images="train", batch="train")


def refusal(capsys, call, *args):
    """The one line with which a call ends, exit code 2."""
    with pytest.raises(SystemExit) as end:
        call(*args)
    assert end.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture
def copy(tmp_path):
    """A writable copy of the embedded data: copy('train'), copy('eval')."""
    return lambda split: Path(shutil.copytree(TINY / f"MMEB-{split}", tmp_path / f"MMEB-{split}"))


def edit_rows(folder, split, change):
    """Rewrite a parquet split after change(columns)."""
    (file,) = (folder / "MSCOCO_i2t").glob(f"{split}-*.parquet")
    columns = pq.read_table(file).to_pydict()
    change(columns)
    pq.write_table(common.datasets.arrow_dataset.pa.table(columns), file)


# -- formulas


@pytest.mark.parametrize(
    ("row", "published"),
    [("MAT", 68.6), ("caption-aware", 96.3), ("JPEG 75", 76.5), ("JPEG 50", 91.5), ("JPEG 30", 95.7)],
)
def test_improvement_gives_the_published_figures_to_the_digit(row, published):
    gain = evaluate.improvement(*evaluate.REPORT[row], *evaluate.REPORT["original"])
    assert round(100 * gain, 1) == published


def test_drop_gives_the_published_171_percent():
    assert round(100 * evaluate.drop(0.2513, -0.1783)) == 171


def test_interval_holds_the_mean_and_shrinks_with_n():
    values = np.random.default_rng(0).normal(0.3, 0.1, 400)
    low, high = evaluate.interval(values, 0)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * 0.1 / 20, rel=0.15)  # the normal approximation
    few = evaluate.interval(values[:25], 0)
    assert few[1] - few[0] > 2.5 * (high - low)


def test_contrastive_loss_is_open_clips_when_there_are_no_negatives():
    image, text = (torch.nn.functional.normalize(torch.randn(5, 8), dim=1) for _ in range(2))
    ours = common.contrastive_loss(image, text, torch.arange(5), text[:0], torch.arange(0), torch.tensor(50.0))
    torch.testing.assert_close(ours, open_clip.ClipLoss()(image, text, torch.tensor(50.0)))


def test_equal_captions_are_never_negatives():
    image, text = (torch.nn.functional.normalize(torch.randn(4, 8), dim=1) for _ in range(2))
    scale = torch.tensor(5.0)
    plain = common.contrastive_loss(image, text, torch.arange(4), text[:0], torch.arange(0), scale)
    same = common.contrastive_loss(image, text, torch.arange(4), text[:1].repeat(9, 1), torch.zeros(9).long(), scale)
    others = common.contrastive_loss(image, text, torch.arange(4), text[:1].repeat(9, 1), torch.full((9,), 7), scale)
    assert others > same > plain - 1e-6  # they still are negatives of the three other images
    only = common.contrastive_loss(image[:1], text[:1], torch.arange(1), text[:1].repeat(9, 1), torch.zeros(9), scale)
    assert only == 0


# -- flags and runs


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--eps", "8"], "write 8/255"),
        (["--eps", "0"], "outside (0, 1]"),
        (["--alpha", "2/0"], "not a number"),
        (["--eps", "nan"], "not a number"),
        (["--steps", "0"], "at least 1"),
        (["--lr", "nan"], "above 0"),
        (["--lr=-1e-5"], "above 0"),
        (["--batch_size", "1.5"], "whole"),
        (["--stepz", "3"], "unrecognized"),
        (["--step", "3"], "unrecognized"),  # no abbreviations
    ],
)
def test_bad_flags_are_refused(words, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        flags(tmp_path, *words)
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_a_flag_given_overrides_the_preset(tmp_path):
    args = flags(tmp_path, "--lr", "3e-6", "--eps", "4/255")
    assert (args.lr, args.epochs) == (3e-6, common.PRESETS["tiny"]["epochs"])
    assert args.eps == pytest.approx(4 / 255)


def test_a_finished_run_is_not_overwritten(tmp_path, capsys):
    args = flags(tmp_path)
    common.Run(args).finish(torch.device("cpu"), n=1)
    before = (tmp_path / "run" / "metrics.json").read_bytes()
    with pytest.raises(SystemExit) as end:
        common.Run(flags(tmp_path, "--num_workers", "7"))  # changes no number
    assert end.value.code == 0
    capsys.readouterr()
    assert "--lr 0.0001 -> 0.5" in refusal(capsys, common.Run, flags(tmp_path, "--lr", "0.5"))
    assert (tmp_path / "run" / "metrics.json").read_bytes() == before
    run = common.Run(flags(tmp_path, "--lr", "0.5", "--overwrite"))
    assert (tmp_path / "run" / "metrics.json").read_bytes() == before  # until there is something to put in its place
    run.begin()
    assert not (tmp_path / "run" / "metrics.json").exists()


# -- CLIP


def test_quick_gelu_mismatch_is_an_error_for_tags_and_files(tmp_path, capsys):
    assert "ViT-L-14-quickgelu" in refusal(capsys, common.find_weights, "ViT-L-14", "openai")
    assert "--model ViT-B-32-quickgelu" in refusal(capsys, common.find_weights, "ViT-B-32", "openai")
    assert common.find_weights("ViT-L-14-quickgelu", "openai") == ("openai", None)
    torch.save({"quick_gelu": False, "state_dict": {}}, tmp_path / "gelu.pt")
    args = flags(tmp_path, "--pretrained", tmp_path / "gelu.pt")
    assert "QuickGELU" in refusal(capsys, common.load_clip, args)


class Payload:
    def __reduce__(self):
        return os.system, ("echo code ran",)


@pytest.mark.parametrize(
    ("content", "said"),
    [(pickle.dumps({"state_dict": Payload()}), "holds code")]
    + [(content, "no checkpoint of plain tensors") for content in (b"", b"<html>404</html>", b"PK\3\4" + bytes(50))],
)
def test_checkpoints_that_are_none_are_refused(content, said, tmp_path, capfd):
    (tmp_path / "bad.pt").write_bytes(content)
    assert said in refusal(capfd, common.load_clip, flags(tmp_path, "--pretrained", tmp_path / "bad.pt"))


def test_clip_features_are_open_clips_and_captions_are_computed_once(tmp_path):
    clip = common.load_clip(flags(tmp_path, "--precision", "fp32"))
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{TINY / 'clip'}")
    image = common.Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8))
    ours = common.TF.center_crop(common.TF.resize(image, 64, common.TF.InterpolationMode.BICUBIC), 64)
    ours = common.as_images(np.asarray(ours).transpose(2, 0, 1)[None], clip.device)
    with torch.no_grad():
        expected = model.eval().encode_image(transform(image)[None], normalize=True)
        torch.testing.assert_close(clip.encode_image(ours), expected, atol=2e-5, rtol=0)
    calls = []
    encode = clip.model.encode_text
    clip.model.encode_text = lambda tokens: calls.append(len(tokens)) or encode(tokens)
    twice = clip.encode_text(["A ring.", "A star.", "A ring."])
    clip.encode_text(["A star."])
    assert calls == [2] and torch.equal(twice[0], twice[2])


# -- data


def test_training_rows_are_distinct_train2014_images_with_captions_in_order(tmp_path):
    examples = common.load_examples(flags(tmp_path), "train", 300)
    table = pq.read_table(next((TINY / "MMEB-train" / "MSCOCO_i2t").glob("original-*"))).to_pydict()
    names = [path.rsplit("/", 1)[1] for path in table["qry_image_path"]]
    expected = [(n, c) for n, c in zip(names, table["pos_text"]) if n.startswith("COCO_train2014_")][:300]
    assert list(zip(examples.names, examples.captions)) == expected
    assert "val2014" in "".join(names[:300])  # there was something to leave out
    assert examples.pixels.shape == (300, 3, 64, 64) and len({p.tobytes() for p in examples.pixels}) == 300


def test_two_folders_of_one_name_are_not_mixed_up(tmp_path, copy):
    folder = copy("train")  # of the same name, split names and size, as datasets sees it
    edit_rows(folder, "original", lambda columns: columns["pos_text"].reverse())
    captions = [
        common.load_examples(flags(tmp_path, "--train_data", source), "train", 5).captions
        for source in (TINY / "MMEB-train", folder)
    ]
    assert captions[0] != captions[1]


def test_sample_seed_draws_other_images(tmp_path):
    first, drawn, again = (
        common.load_examples(flags(tmp_path, *seed), "train", 40).names
        for seed in ([], ["--sample_seed", 1], ["--sample_seed", 1])
    )
    assert drawn == again and drawn != first


def test_unpacked_images_give_the_same_pixels(tmp_path):
    with zipfile.ZipFile(TINY / "MMEB-eval" / "images.zip") as archive:
        archive.extractall(tmp_path / "unpacked")
    (tmp_path / "unpacked" / "MSCOCO_i2t").rename(tmp_path / "unpacked" / "val2014")  # COCO's own folder
    packed = common.load_examples(flags(tmp_path), "eval", 20)
    unpacked = common.load_examples(flags(tmp_path, "--image_root", tmp_path / "unpacked"), "eval", 20)
    assert np.array_equal(packed.pixels, unpacked.pixels)


def test_members_are_matched_by_name_and_folders_without_apple_doubles():
    names = ["x/MSCOCO_t2i/a.jpg", "MSCOCO_i2t/._a.jpg", "MSCOCO_i2t/a.jpg", "__MACOSX/MSCOCO_i2t/a.jpg", "other/b.jpg"]
    assert common.match_members(["images/MSCOCO_i2t/a.jpg"], names) == {"images/MSCOCO_i2t/a.jpg": "MSCOCO_i2t/a.jpg"}
    assert common.match_members(["c.jpg"], names) == {}


def test_planted_leakage_is_found(tmp_path, copy, capsys):
    folder = copy("train")
    leaked = pq.read_table(next((TINY / "MMEB-eval" / "MSCOCO_i2t").glob("test-*")))["qry_img_path"][5].as_py()

    def plant(columns):  # an evaluation image under its id, but as train2014
        columns["qry_image_path"][3] = "images/MSCOCO_i2t/Train/" + leaked[-30:].replace("val2014", "train2014")

    edit_rows(folder, "original", plant)
    args = flags(tmp_path, "--train_data", folder, "--num_images", 20, "--val_images", 5)
    with zipfile.ZipFile(TINY / "MMEB-eval" / "images.zip") as source:
        image = source.read(leaked)
    with zipfile.ZipFile(folder / "images_zip" / "MSCOCO_i2t.zip", "a") as archive:
        archive.writestr("MSCOCO_i2t/Train/" + leaked[-30:].replace("val2014", "train2014"), image)
        archive.writestr("MSCOCO_i2t/Train/COCO_train2014_000000999999.jpg", image)
    assert "leakage: 1 COCO ids" in refusal(capsys, common.load_training_sets, args)

    def disguise(columns):  # the same picture under a new id
        columns["qry_image_path"][3] = "images/MSCOCO_i2t/Train/COCO_train2014_000000999999.jpg"

    edit_rows(folder, "original", disguise)
    assert "same pixels as evaluation image" in refusal(capsys, common.load_training_sets, args)


def test_validation_images_are_disjoint_from_training_ones(tmp_path):
    training, validation = common.load_training_sets(flags(tmp_path, "--num_images", 30, "--val_images", 10))
    assert (len(training), len(validation)) == (30, 10)
    assert not set(training.coco_ids) & set(validation.coco_ids)


def broken_image(data):
    def change(folder):
        (file,) = folder.rglob("MSCOCO_i2t.zip")
        with zipfile.ZipFile(file) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        first = next(name for name in members if "train2014" in name)
        members[first] = data(members[first])
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in members.items():
                if content is not None:
                    archive.writestr(name, content)

    return change


def column(name, change):
    return lambda folder: edit_rows(folder, "original", lambda columns: change(columns, name))


SPLITS = ["original", "diverse_instruction"]
DAMAGE = {
    "no split": (lambda f: next(f.rglob("original-*")).unlink(), "split original"),
    "no card": (lambda f: (f / "README.md").unlink(), "MSCOCO_i2t"),
    "no column": (lambda f: [edit_rows(f, s, lambda c: c.pop("pos_text")) for s in SPLITS], "no column pos_text; it"),
    "splits that differ": (column("pos_text", dict.pop), "Couldn't cast"),
    "empty caption": (column("pos_text", lambda c, k: c[k].__setitem__(slice(None), ["  "] * 2000)), "is empty"),
    "no COCO name": (column("qry_image_path", lambda c, k: c[k].__setitem__(0, "../../etc/passwd")), "row 0"),
    "truncated JPEG": (broken_image(lambda data: data[:900]), "truncated"),
    "HTML for JPEG": (broken_image(lambda data: b"<html>"), "cannot identify image"),
    "empty file": (broken_image(lambda data: b""), "cannot identify image"),
    "missing image": (broken_image(lambda data: None), "and not images/MSCOCO_i2t/Train/COCO_train2014_"),
    "no zip": (lambda f: next(f.rglob("*.zip")).unlink(), "holds no zip"),
    "damaged zip": (lambda f: next(f.rglob("*.zip")).write_bytes(b"PK" + bytes(99)), "not a zip file"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_data_ends_in_one_line_and_leaves_no_cache(what, tmp_path, copy, capsys):
    damage, said = DAMAGE[what]
    folder = copy("train")
    damage(folder)
    line = refusal(capsys, common.load_examples, flags(tmp_path, "--train_data", folder), "train", 8)
    assert said in line, line
    assert not [path for path in (tmp_path / "cache").glob("*") if path.name != "datasets"]


def test_bad_images_can_be_skipped_and_are_counted(tmp_path, copy):
    folder = copy("train")
    broken_image(lambda data: data[:900])(folder)
    args = flags(tmp_path, "--train_data", folder, "--skip_bad_images")
    examples = common.load_examples(args, "train", 8)
    assert len(examples) == 7 == len(examples.pixels) and len(examples.skipped) == 1
    whole = common.load_examples(flags(tmp_path), "train", 8)
    kept = [i for i, name in enumerate(whole.names) if name in examples.names]
    assert np.array_equal(whole.pixels[kept], examples.pixels)
    assert [whole.captions[i] for i in kept] == examples.captions


def test_too_few_images_and_wrong_sources_are_said(tmp_path, capsys):
    assert "1800 distinct train2014 images and 5000" in refusal(
        capsys, common.load_examples, flags(tmp_path), "train", 5000
    )
    for source in ("nowhere/at/all", "/no/such/folder", str(ROOT / "README.md")):
        line = refusal(capsys, common.load_examples, flags(tmp_path, "--train_data", source), "train", 5)
        assert "neither a local folder nor a hub id" in line


# -- the hub, over its own client


def over_hub(repos, tmp_path, code, **env):
    """Run code in a process whose hub is a loopback server of these folders; returns (stdout, hub)."""
    env = {"HF_HOME": str(tmp_path / "hf"), "HF_UPDATE_DOWNLOAD_COUNTS": "0", "PYTHONPATH": str(ROOT), **env}
    with serve_hub(repos) as hub:
        env = os.environ | {"HF_ENDPOINT": hub.url} | env
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    return done, hub


def test_the_hub_gives_the_same_data_and_only_the_members_needed(tmp_path):
    repos = {f"datasets/TIGER-Lab/MMEB-{split}": TINY / f"MMEB-{split}" for split in ("train", "eval")}
    repos["models/lab/tiny-clip"] = TINY / "clip"
    code = """
import sys, json, common
parser = common.make_parser("")
args = common.parse_flags(parser, ["--model", "hf-hub:lab/tiny-clip", "--pretrained", "", "--cache_dir", sys.path[-1]],
                          stage="x", images="train", batch="train")
train, evaluation = common.load_examples(args, "train", 12), common.load_examples(args, "eval", 4)
clip = common.load_clip(args)
print(json.dumps([int(train.pixels.sum()), evaluation.captions, int(evaluation.pixels.sum()), clip.arch]))
"""
    code = code.replace("sys.path[-1]", repr(str(tmp_path / "cache")))
    done, hub = over_hub(repos, tmp_path, code)
    assert done.returncode == 0, done.stderr
    train_sum, captions, eval_sum, arch = json.loads(done.stdout)
    args = flags(tmp_path / "local")
    assert train_sum == common.load_examples(args, "train", 12).pixels.sum()
    evaluation = common.load_examples(args, "eval", 4)
    assert (captions, eval_sum) == (evaluation.captions, evaluation.pixels.sum())
    whole = (TINY / "MMEB-eval" / "images.zip").stat().st_size
    assert 0 < hub.bytes_sent("images.zip") < whole
    assert hub.bytes_sent("MSCOCO_i2t.zip") >= (TINY / "MMEB-train" / "images_zip" / "MSCOCO_i2t.zip").stat().st_size
    again, _ = over_hub({}, tmp_path, code, HF_HUB_OFFLINE="1")  # nothing is asked of the hub a second time
    assert again.returncode == 0 and again.stdout == done.stdout, again.stderr


def test_published_robust_models_are_rows_of_the_table(tmp_path):
    """Repositories of the form of chs20/fare4-clip: a configuration and the weights of a whole model, here random."""
    repos, weights = {}, {}
    for name, file in (("fare4", "open_clip_model.safetensors"), ("tecoa4", "open_clip_pytorch_model.bin")):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(TINY / "clip" / "open_clip_config.json", folder)
        state = load_file(TINY / "clip" / "open_clip_model.safetensors")
        weights[name] = {key: torch.randn(value.shape) / 20 if value.ndim else value for key, value in state.items()}
        (save_file if file.endswith("safetensors") else torch.save)(weights[name], folder / file)
        repos[f"models/lab/{name}-clip"] = folder
    words = ["--preset", "tiny", "--num_images", "4", "--steps", "1", "--qualities", "--num_workers", "1"]
    words += ["--cache_dir", str(tmp_path / "cache"), "--output_dir", str(tmp_path / "evaluation")]
    words += [w for name in weights for w in ("--checkpoint", f"{name}=hf-hub:lab/{name}-clip")]
    done, hub = over_hub(repos, tmp_path, f"import evaluate; evaluate.main(evaluate.parse_args({words}))")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())["per_image"]
    args = evaluate.parse_args(words)
    examples, clip = common.load_examples(args, "eval", 4), common.load_clip(args)
    for name, state in weights.items():
        clip.model.load_state_dict(state)
        clip.text_cache.clear()
        with torch.no_grad():
            own = clip.encode_image(common.as_images(examples.pixels, "cpu")) * clip.encode_text(examples.captions)
        np.testing.assert_allclose(rows[name]["clean"]["similarity"], own.sum(-1), atol=1e-5)


def test_an_unreachable_hub_is_one_line_with_what_to_set(tmp_path):
    code = """
import common
parser = common.make_parser("")
args = common.parse_flags(parser, [], stage="x", images="train", batch="train")
common.load_examples(args, "train", 12)
"""
    done, _ = over_hub({}, tmp_path, code)
    assert done.returncode == 2
    assert "TIGER-Lab/MMEB-train" in done.stderr and "HF_ENDPOINT" in done.stderr
    assert "Traceback" not in done.stderr


# -- MAT's augmentations, and the training flags that only show in the weights


def test_augmentations_have_the_strength_they_say_and_follow_the_seed():
    grey = torch.full((64, 3, 32, 32), 0.5)
    out = mat.augment(grey, range(64))
    assert out.std((1, 2, 3)).mean() == pytest.approx(15 / 255, rel=0.02)  # noise, after the blur
    means = out.mean((1, 2, 3))
    assert 0.39 < means.min() < 0.43 and 0.57 < means.max() < 0.61  # brightness 0.8 to 1.2
    assert torch.equal(out, mat.augment(grey, range(64)))
    dot = torch.zeros(2, 3, 33, 33)
    dot[:, :, 16, 16] = 1
    blurred = mat.gaussian_blur(dot, torch.tensor([0.1, 2.0]).view(2, 1, 1, 1))
    torch.testing.assert_close(blurred[0], dot[0])
    assert blurred[1, 0, 16, 16] == pytest.approx(1 / (2 * math.pi * 4), rel=0.03)
    assert blurred.sum((2, 3)).flatten().tolist() == pytest.approx([1] * 6, rel=1e-3)


def test_each_training_flag_changes_the_weights(tmp_path):
    def weights(*words):
        words = ["--num_images", 32, "--val_images", 2, "--steps", 1, "--max_steps", 2, *words]
        args = flags(tmp_path, *words, "--overwrite")
        training, validation = common.load_training_sets(args)
        clip = common.load_clip(args)
        common.train(args, common.Run(args), clip, training, validation, lambda step, indices, images: images)
        return clip.model.visual.proj.detach().clone()

    plain = weights()
    assert torch.equal(plain, weights())
    for words in (["--warmup_steps", 9], ["--grad_clip", 1e-9], ["--weight_decay", 90], ["--num_negatives", 0]):
        assert not torch.equal(plain, weights(*words)), words
