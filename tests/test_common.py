"""Formulas, flags, what a hub gives, and the trainings' parts."""

import importlib
import math
import shutil
import tracemalloc
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from conftest import SCRIPTS, TINY, jsonl, refusal, shell
from hub import connect, serve_hub
from torch.nn import functional as F

import common
import defend_clip_mat_v2 as mat
import defend_clip_pgd_v2 as pgd
import evaluate
import generate_pgd_adversarial as generate

# -- formulas


def test_improvement_gives_the_published_figures_to_the_digit():
    clean_0, adversarial_0, _ = evaluate.REPORT["original"]
    assert round(100 * (clean_0 - adversarial_0) / clean_0) == 171
    for clean, adversarial, gain in [*evaluate.REPORT.values()][1:]:
        assert round(evaluate.improvement(clean, adversarial, clean_0, adversarial_0), 3) == gain


def test_interval_is_the_normal_approximations_and_takes_little_memory():
    values = np.random.default_rng(0).normal(0.3, 0.1, 400)
    low, high = evaluate.interval(values, 0)
    assert low < values.mean() < high and high - low == pytest.approx(2 * 1.96 * 0.1 / 20, rel=0.15)
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


# -- flags and the model


def test_a_flag_given_overrides_the_preset_and_the_reports_commands_have_the_reports_values():
    args = mat.parse_args(["--preset", "tiny", "--lr", "3e-6", "--eps", "4/255"])
    assert (args.lr, args.epochs, args.eps) == (3e-6, common.PRESETS["tiny"]["epochs"], pytest.approx(4 / 255))
    expected = {"batch_size": 16, "lr": 1e-5, "epochs": 3, "eps": 8 / 255, "alpha": 2 / 255, "steps": 20}
    expected |= {"num_images": 5000, "model": "ViT-L-14-quickgelu", "pretrained": "openai"}
    words = ["--batch_size", "16", "--lr", "1e-5", "--epochs", "3"]
    for args in (mat.parse_args(words), pgd.parse_args([*words, "--loss_threshold", "0.1"])):
        assert {key: vars(args)[key] for key in expected} == expected
    assert args.loss_threshold == 0.1 and not args.online_steps
    assert vars(mat.parse_args([])) | {"output_dir": ""} == vars(mat.parse_args(words)) | {"output_dir": ""}


def test_help_gives_every_flag_with_its_default(capsys):
    for script in SCRIPTS:
        with pytest.raises(SystemExit, match="0"):
            importlib.import_module(script).parse_args(["--help", "--preset", "tiny"])
        text = capsys.readouterr().out
        assert "8/255" in text and "tests/tiny/MMEB-eval" in "".join(text.split()) and "%(default)" not in text


def test_radii_are_grey_levels_and_messages_say_them_as_they_are_typed(capsys):
    args = generate.parse_args(["--eps", "2/255", "--alpha", "0.5/255"])
    assert (args.eps, args.alpha) == (2 / 255, 0.5 / 255)
    assert common.difference("alpha", args.alpha, args.eps) == "--alpha 0.5/255, not 2/255"
    assert [common.radius_text(value) for value in (8 / 255, 0.031, 1 / 255)] == ["8/255", "0.031", "1/255"]
    for text in ("0.00392", "0.99/255"):
        for parse_args, flag in ((generate.parse_args, "--eps"), (evaluate.parse_args, "--radii")):
            assert "less than one grey level" in refusal(capsys, parse_args, [flag, text])
    common.run_main(lambda args: None, generate.parse_args(["--eps", "0.031"]))
    assert "--eps 0.031 allows 8-bit images to change by 7 grey levels" in capsys.readouterr().out
    folders = [evaluate.parse_args(["--eps", eps]).output_dir for eps in ("2/255", "8/255")]
    assert folders == ["runs/report/evaluation_eps2", "runs/report/evaluation"]


def test_a_caption_is_computed_once():
    clip = common.load_clip(mat.parse_args(["--preset", "tiny"]))
    clip.encode_text(["A ring.", "A star."])
    clip.model.encode_text = None  # not asked again
    assert len(clip.encode_text(["A star.", "A ring.", "A star."])) == 3


# -- a hub

CARD = """---
dataset_info:
- config_name: MSCOCO_i2t
  splits:
  - {name: SPLIT, num_examples: 3, num_bytes: 5}
  - {name: diverse_instruction, num_examples: 7, num_bytes: 5}
"""


def test_a_hub_gives_the_same_images_by_the_members_needed_and_once_fetched_fewer_of_them_need_no_hub(
    tmp_path, monkeypatch, capsys
):
    """By the default data and no flags but sizes; the hub's row counts are stale."""
    monkeypatch.chdir(tmp_path)
    repos = {"models/lab/tiny-clip": TINY / "clip"}
    for split, name in (("train", "original"), ("eval", "test")):
        folder = repos[f"datasets/TIGER-Lab/MMEB-{split}"] = tmp_path / f"MMEB-{split}"
        shutil.copytree(TINY / folder.name, folder)
        card = (folder / "README.md").read_text()
        (folder / "README.md").write_text(card.replace("---\n", CARD.replace("SPLIT", name), 1))
    words = ["generate_pgd_adversarial.py", "--steps", 1, "--split"]
    remote, counts = ["--model", "hf-hub:lab/tiny-clip"], {"train": 12, "eval": 4}
    with serve_hub(repos) as hub:
        connect(monkeypatch, hub.url, tmp_path / "home")
        for split, count in counts.items():
            fetched, _ = shell(*words, split, *remote, "--num_images", count, "--fetch")
            assert f"the model and {count} images are here" in fetched and not Path("runs/report").exists()
    sent = [sent for method, path, _, sent in hub.requests if method == "GET" and "images.zip" in path]
    assert 0 < sum(sent) < (TINY / "MMEB-eval" / "images.zip").stat().st_size
    assert len(sent) < 4 + 8  # the directory, and about one an image

    connect(monkeypatch, hub.url, tmp_path / "home", offline=True)
    for split, count in counts.items():
        shell(*words, split, *remote, "--num_images", count)
        shell(*words, split, *remote, "--num_images", 2, "--output_dir", f"fewer_{split}")
        shell(*words, split, "--preset", "tiny", "--num_images", count, "--output_dir", f"local_{split}")
        folders = f"runs/report/adversarial_{split}", f"fewer_{split}", f"local_{split}"
        ours, fewer, local = (jsonl(Path(folder) / "metadata.jsonl") for folder in folders)
        assert ours == local and len(local) == count and fewer == local[:2]


# -- trainings


def test_an_epoch_is_whole_batches_of_distinct_images_in_an_order_of_its_own():
    state = {"log": [], "last_step": 4, "steps_per_epoch": 2, "training": range(10), "stopped": None}
    args = SimpleNamespace(seed=0, batch_size=4)
    trainer = SimpleNamespace(**state, args=args, train_mode=lambda: None)
    batches = [batch.tolist() for _, batch, _ in common.Trainer.__iter__(trainer)]
    first, second = batches[0] + batches[1], batches[2] + batches[3]
    assert len({*first}) == len({*second}) == 8 and {*first} | {*second} == {*range(10)} and first != second
    args.seed = 1
    assert batches[0] != next(iter(common.Trainer.__iter__(trainer)))[1].tolist()


def test_batchnorm_keeps_its_statistics_in_a_training():
    visual = torch.nn.Sequential(torch.nn.BatchNorm2d(4), torch.nn.Dropout())
    common.Trainer.train_mode(SimpleNamespace(visual=visual))
    assert [module.training for module in visual] == [False, True]


def test_augmentations_have_the_strength_they_say_and_follow_the_seed():
    def augmented(seed, step):
        generator = common.step_generator(seed, step, torch.device("cpu"))
        return mat.augment(grey, *mat.draw_augmentations(64, grey.shape[1:], generator))

    grey = torch.full((64, 3, 32, 32), 0.5)
    out = augmented(0, 1)
    assert out.std((1, 2, 3)).mean() == pytest.approx(15 / 255, rel=0.02)  # noise, after the blur
    means = out.mean((1, 2, 3))
    assert 0.39 < means.min() < 0.43 and 0.57 < means.max() < 0.61  # brightness 0.8 to 1.2
    assert torch.equal(out, augmented(0, 1))
    assert not any(torch.equal(out, augmented(seed, step)) for seed, step in ((1, 0), (0, 2), (1, 1)))
    flat = torch.tensor([0.1, 0.9]).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    half = torch.full((2, 1, 1, 1), 0.5)  # contrast is around an image's own mean, brightness around black
    for brightness in (2 * half, half):
        out = mat.augment(flat, brightness, half, torch.full((2, 1, 1, 1), 0.1), torch.zeros(2, 3, 8, 8))
        torch.testing.assert_close(out, flat * brightness)
    dot = torch.zeros(2, 3, 33, 33)
    dot[:, :, 16, 16] = 1
    blurred = mat.gaussian_blur(dot, torch.tensor([0.1, 2.0]).view(2, 1, 1, 1))
    torch.testing.assert_close(blurred[0], dot[0])
    assert blurred[1, 0, 16, 16] == pytest.approx(1 / (2 * math.pi * 4), rel=0.03)
    assert blurred.sum((2, 3)).flatten().tolist() == pytest.approx([1] * 6, rel=1e-3)


@pytest.mark.parametrize("script, words", [(mat, []), (pgd, ["--online_steps", "1"])])
def test_the_visual_tower_is_trained_its_matrices_alone_decay_and_its_gradients_are_clipped_to_norm_1(
    script, words, tmp_path, monkeypatch
):
    groups, adamw = [], torch.optim.AdamW

    def clipped(parameters, limit):
        parameters = {id(p): p.grad for p in parameters}
        raise InterruptedError(parameters, limit)

    monkeypatch.setattr(torch.optim, "AdamW", lambda given, **rates: groups.extend(given) or adamw(given, **rates))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
    words += ["--preset", "smoke", "--num_images", "16", "--steps", "1", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(InterruptedError) as met:
        script.main(script.parse_args([*words, "--weight_decay", "0.3"]))
    gradients, limit = met.value.args
    assert limit == 1 and all(gradient is not None for gradient in gradients.values())
    decayed, others = groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0)
    assert all(p.ndim >= 2 for p in decayed["params"]) and all(p.ndim < 2 for p in others["params"])
    trained = {id(p) for p in (*decayed["params"], *others["params"])}
    visual = common.load_clip(mat.parse_args(["--preset", "smoke"])).model.visual
    assert trained == gradients.keys() and len(trained) == len([*visual.parameters()])
