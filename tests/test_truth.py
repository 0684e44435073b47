"""The sanity battery on planted defences, the worst case over attacks, intervals, candidates, adaptive JPEG."""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch.nn import functional as F

import common
import evaluate

IMAGES = 12


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """The tiny CLIP, a few evaluation images with their transfer images, and the flags."""
    words = ["--preset", "tiny", "--cache_dir", str(tmp_path_factory.mktemp("cache")), "--steps", "8"]
    words += ["--alpha", "3/255", "--sanity_images", str(IMAGES), "--batch_size", str(IMAGES)]
    args = evaluate.parse_args(words)
    examples = common.load_examples(args, "eval", IMAGES)
    clip = common.load_clip(args)
    candidates = evaluate.load_candidates(args, examples)
    transfer, _, _ = evaluate.attack_row(evaluate.Row("original", clip), examples, candidates, args)
    return args, clip, examples, candidates, transfer


def failed(row, setup):
    """The checks of the battery that a row fails."""
    args, _, examples, candidates, transfer = setup
    means = {name: 0.0 for name, _ in evaluate.attacks_on(row, args)}
    checks, curve = evaluate.sanity(row, examples, transfer, candidates, args, means)
    assert [eps for eps, _, _ in curve] == evaluate.EPS_CURVE
    return {check for check, holds, _ in checks if not holds}


class Planted(evaluate.Row):
    """A row whose defence is a function put in front of the model or behind it."""

    before = staticmethod(lambda images: images)
    after = staticmethod(lambda features: features)

    def view(self, encode_image, seed, codec=None):
        return lambda images: self.after(encode_image(self.before(images)))


def test_an_honest_model_passes_every_check(setup):
    assert failed(evaluate.Row("original", setup[1]), setup) == set()


def test_a_quantiser_in_front_is_flagged(setup):
    row = Planted("quantiser", setup[1])
    row.before = lambda images: (images * 16).round() / 16
    assert {"gradients are there and finite", "transfer does not beat white-box"} <= failed(row, setup)


def test_underflowing_features_are_flagged(setup):
    row = Planted("underflow", setup[1])
    row.after = lambda features: (features * 1e-30) * 1e-20 + features.detach()
    assert "gradients are there and finite" in failed(row, setup)


def test_a_randomised_input_is_flagged(setup):
    row = Planted("noise", setup[1])
    row.before = lambda images: (images + 0.3 * torch.randn_like(images)).clamp(0, 1)
    assert "the same image gives the same features" in failed(row, setup)


def test_nan_features_end_the_run(setup, capsys):
    args, clip, examples, candidates, _ = setup
    row = Planted("nan", clip)
    row.after = lambda features: features * torch.nan
    with pytest.raises(SystemExit):
        evaluate.score(row, examples.pixels, candidates, args)
    assert "not finite" in capsys.readouterr().err


def test_the_worst_case_is_no_milder_than_any_attack(setup):
    args, clip, examples, candidates, transfer = setup
    args = copy.copy(args)
    args.attack, args.attack_loss, args.restarts = ["pgd", "apgd"], ["cosine", "margin"], 2
    row = evaluate.Row("original", clip)
    conditions, pixels, means, health = evaluate.measure(row, examples, transfer, candidates, args)
    assert len(means) == 8 and health["max_abs_delta_grey_levels"] == 8
    worst = conditions["white_box"]
    assert worst["similarity"].mean() <= min(*means.values(), conditions["transfer"]["similarity"].mean()) + 1e-6
    again = evaluate.score(row, pixels, candidates, args)["similarity"]
    np.testing.assert_allclose(again, worst["similarity"], atol=1e-5)
    assert common.linf_grey_levels(examples.pixels, pixels).max() <= 8


def test_the_margin_loss_is_the_retrieval_failure_itself(setup):
    args, clip, examples, candidates, _ = setup
    row = evaluate.Row("original", clip)
    images = common.as_images(np.asarray(examples.pixels), clip.device)
    with torch.no_grad():
        loss = evaluate.attack_loss("margin", row, candidates)(clip.encode_image, slice(0, IMAGES))(images)
    scored = evaluate.score(row, examples.pixels, candidates, args)
    np.testing.assert_allclose(-loss.numpy(), scored["margin"], atol=1e-5)
    assert ((loss.numpy() > 0) == (scored["rank_i2t"] > 0)).all()


def test_scores_on_a_hand_made_ranking(setup):
    args, clip, examples, _, _ = setup
    captions = examples.captions[:3]
    candidates = evaluate.Candidates(captions, torch.arange(3), torch.ones(3, 3, dtype=torch.bool))
    features = F.normalize(torch.tensor([[3.0, 1, 0], [4, 3, 0], [4, 0, 3]]), dim=1)
    row = Planted("fixed", clip)
    row.view = lambda encode_image, seed: lambda images: features
    clip = copy.copy(clip)
    row.clip = clip
    clip.encode_text = lambda texts: torch.eye(3)[: len(texts)]
    scored = evaluate.score(row, examples.pixels[:3], candidates, args)
    assert scored["rank_i2t"].tolist() == [0, 1, 1]  # image 1 prefers caption 0, image 2 too
    assert scored["rank_t2i"].tolist() == [0, 0, 0]  # each caption prefers its own image
    np.testing.assert_allclose(scored["similarity"], features.diagonal())
    assert scored["margin"][1] == pytest.approx(0.6 - 0.8)
    row.view = lambda encode_image, seed: lambda images: torch.ones(3, 3)
    assert evaluate.score(row, examples.pixels[:3], candidates, args)["rank_t2i"].tolist() == [2, 2, 2]  # collapsed


def test_mmeb_candidates_are_the_rows_own_lists(setup):
    args, _, examples, _, _ = setup
    args = copy.copy(args)
    args.candidates = "mmeb"
    candidates = evaluate.load_candidates(args, examples)
    assert len(candidates.captions) == 120 and candidates.allowed.all()
    assert [candidates.captions[i] for i in candidates.own] == examples.captions


@pytest.mark.parametrize("quality", [75, 50, 30])
def test_differentiable_jpeg_is_within_a_grey_level_of_pillow_and_has_a_gradient(setup, quality):
    images = common.as_images(np.asarray(setup[2].pixels), "cpu").requires_grad_()
    ours = evaluate.differentiable_jpeg(images, quality)
    real = common.jpeg(images, quality)
    assert 255 * (ours - real).abs().mean() < 1
    (grad,) = torch.autograd.grad(ours.square().sum(), images)
    assert grad.isfinite().all() and (grad != 0).float().mean() > 0.9


def test_random_jpeg_draws_differ_by_image_and_look_but_not_by_run(setup):
    _, clip, examples, _, _ = setup
    row = evaluate.Row("JPEG random", clip, ("random",))
    images = common.as_images(np.asarray(examples.pixels[:1]).repeat(8, 0), "cpu")
    with torch.no_grad():
        view = row.view(clip.encode_image, 0)
        first, second = view(images), view(images)
        again = row.view(clip.encode_image, 0)(images)
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert (first[0] != first[1:]).any()


def test_paired_intervals_separate_what_means_alone_do_not():
    """A constant gain of 0.02 under a spread of 0.3: the intervals of the rows overlap, the paired one excludes 0."""
    base = np.random.default_rng(0).normal(0.3, 0.3, 60)
    rank = np.zeros(60)
    rows = {
        name: {"white_box": {"similarity": values, "rank_i2t": rank}}
        for name, values in (("a", base), ("b", base + 0.02), ("c", np.random.default_rng(1).permutation(base)))
    }
    pairs = {tuple(pair["rows"]): pair for pair in evaluate.compare_rows(rows, 0)}
    assert pairs["a", "b"]["separated"] and not pairs["a", "c"]["separated"]
    assert pairs["a", "b"]["similarity"] == pytest.approx(-0.02)
    assert evaluate.interval(base, 0)[1] > evaluate.interval(base + 0.02, 0)[0]


def test_bare_visual_towers_and_other_models_are_rows(setup, tmp_path):
    args, clip, *_ = setup
    visual = {key: value * 1.01 for key, value in clip.model.visual.state_dict().items()}
    torch.save(visual, tmp_path / "tower.pt")
    loaded = common.load_clip(args, str(tmp_path / "tower.pt"))
    for key, value in loaded.model.visual.state_dict().items():
        assert torch.equal(value, visual[key])
    assert torch.equal(loaded.model.positional_embedding, clip.model.positional_embedding)
    other = common.load_clip(args, f"local-dir:{ROOT / 'tests' / 'tiny' / 'clip'}")
    assert torch.equal(other.model.visual.proj, clip.model.visual.proj)
    assert json.loads((ROOT / "tests/tiny/clip/open_clip_config.json").read_text())["model_cfg"]["quick_gelu"]
