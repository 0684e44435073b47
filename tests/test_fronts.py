"""Defences at test time: what they compute, their attacks, random draws, and the alarm for gradients that vanish."""

import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import refusal
from torch.nn import functional as F

import common
import evaluate
from evaluate import FRONTS, Front, first_share

ATTACK = replace(common.white_box(8 / 255, 3), draws=2)
GENERATORS = partial(common.generators_for, 5)


@pytest.fixture(scope="module")
def row():
    """The tiny CLIP as a row of a few evaluation images with their transferred ones."""
    args = evaluate.parse_args(["--preset", "tiny", "--num_images", "8"])
    clip = common.load_clip(args)
    images = common.load_images(args, "eval", clip.geometry)
    row = evaluate.Row("original", clip, images.pixels, images.pixels, *evaluate.load_candidates("evaluation", images))
    transfer, _ = evaluate.attack_row(common.Attack(8 / 255, 2 / 255, 4), row)
    return replace(row, transfer=transfer.numpy())


def images_of(row, count=3):
    return common.as_images(row.pixels[:count], torch.device("cpu"))


WEIGHTS = torch.randn(3 * 6 * 6, 5, generator=torch.Generator().manual_seed(1))


def linear(images, normalize=True):
    """A model that can be followed by hand."""
    features = images.flatten(1) @ WEIGHTS
    return F.normalize(features, dim=-1) if normalize else features


def test_ttc_adds_the_weighted_mean_of_two_steps_away_from_the_images_features_or_the_noise_alone():
    images = torch.rand(2, 3, 6, 6)
    images[0, 0, 0, 0], images[1, 0, 0, 0] = 0, 1
    added = []

    def encode(x, normalize=True):
        added.append(x - images)
        return linear(x, normalize)

    def original_of(scale):
        return lambda x, normalize: 1 + scale * linear(x - images, normalize)

    for original, attacked in ((original_of(0.01), True), (original_of(10), False)):
        with torch.no_grad():
            evaluate.ttc(encode, original, GENERATORS(range(2)))(images)
        noise = images + 4 / 255 * common.uniform(images, GENERATORS(range(2)))
        deltas = [noise.clamp(0, 1) - images]
        for _ in range(2):
            away = (deltas[-1].flatten(1) @ WEIGHTS) @ WEIGHTS.T  # of |W delta|^2, up to a factor
            delta = (deltas[-1] + away.view_as(images).sign() / 255).clamp(-4 / 255, 4 / 255)
            deltas.append((images + delta).clamp(0, 1) - images)
        mean = sum(delta * np.exp(2 * k) for k, delta in enumerate(deltas)) / np.exp([0, 2, 4]).sum()
        torch.testing.assert_close(added[-1], mean.float() if attacked else deltas[0], atol=1e-6, rtol=0)


def test_each_attack_on_ttc_has_the_gradient_that_it_promises(row):
    images, text = images_of(row).requires_grad_(), row.clip.encode_text(row.captions)[row.own[:3]]
    encode, gradients = row.clip.attack_encoder(), {}
    for name, wrap in FRONTS["ttc"].attacks.items():
        loss = common.own_caption(text, wrap(encode, encode, GENERATORS(range(3))))
        (gradients[name],) = torch.autograd.grad(loss(images).sum(), images)
        assert gradients[name].isfinite().all() and (gradients[name].flatten(1).norm(dim=1) > 0).all()
    seen = []
    evaluate.ttc(lambda x, normalize=True: seen.append(x) or encode(x, normalize), encode, GENERATORS(range(3)))(images)
    constant = seen[-1].detach() - images.detach()
    (expected,) = torch.autograd.grad(common.own_caption(text, encode)(images + constant).sum(), images)
    torch.testing.assert_close(gradients["detached"], expected)
    assert not torch.allclose(gradients["through"], gradients["detached"], rtol=0.01)


def test_the_attack_on_the_gate_raises_tau_until_no_counterattack_is_made(row):
    images = images_of(row)
    encode = row.clip.attack_encoder()
    term = evaluate.ttc_gate(encode, GENERATORS(range(3)))
    assert (term(images) < 0).all()
    found, _ = common.pgd(term, images, common.Attack(64 / 255, 4 / 255, 20, draws=2))
    before, after = (evaluate.ttc_tau(encode, x, evaluate.ttc_noise(x, GENERATORS(range(3)))) for x in (images, found))
    assert (after > 1.5 * before).all()
    tau = {True: 0.1, False: 0.4}
    for low, expected in ((True, 10 * (0.1 - 0.25)), (False, 0)):
        original = iter([torch.ones(1, 4), (1 + tau[low]) * torch.ones(1, 4)])
        term = evaluate.ttc_gate(lambda x, normalize, found=original: next(found), GENERATORS(range(1)))
        torch.testing.assert_close(term(images[:1]), torch.tensor([expected], dtype=torch.float32), atol=1e-5, rtol=0)


def test_views_are_crops_and_flips_of_each_image_of_its_own():
    ramp = torch.linspace(0, 1, 32)
    images = torch.stack([ramp.expand(32, 32), ramp[:, None].expand(32, 32), torch.full((32, 32), 0.5)])
    images = images.expand(2, 3, 32, 32).clone().requires_grad_()
    crops = [*evaluate.random_views(images, GENERATORS(range(2)), 200)]
    rows = torch.stack([crop[:, 0] for crop in crops])  # of the ramp from left to right
    slope = rows[..., -1].mean(-1) - rows[..., 0].mean(-1)  # (views, B): the width, negative where it is flipped
    assert 0.35 < (slope < 0).float().mean() < 0.65 and slope.abs().max() <= 1
    down = torch.stack([crop[:, 1] for crop in crops])
    height = down[..., -1, :].mean(-1) - down[..., 0, :].mean(-1)
    area = slope.abs() * height
    assert 0.06 < area.min() < 0.12 and 0.85 < area.max() <= 1 and 0.45 < area.mean() < 0.62
    assert (slope[:, 0] == slope[:, 1]).float().mean() < 0.1  # of crops over the whole width
    assert all(torch.allclose(crop[:, 2], torch.tensor(0.5)) for crop in crops)
    (gradient,) = torch.autograd.grad(crops[0].sum(), images)
    assert gradient.abs().sum() > 0


def test_tte_is_the_mean_of_the_views_and_dbd_goes_on_where_they_agree():
    images = torch.rand(2, 3, 6, 6)
    views = torch.stack([linear(x, False) for x in evaluate.random_views(images, GENERATORS(range(2)), 31)])
    features = linear(images, False)
    mean = views.mean(0)
    tte = FRONTS["tte"].wrap(linear, None, GENERATORS(range(2)))(images, normalize=False)
    torch.testing.assert_close(tte, mean)
    agreement = F.cosine_similarity(views - features, (mean - features)[None], dim=-1).mean(0)
    dbd = FRONTS["dbd"].wrap(linear, None, GENERATORS(range(2)))(images, normalize=False)
    factor = torch.where(agreement > 0.8, 2.5, 1.0)[:, None]
    torch.testing.assert_close(dbd, features + factor * (mean - features))

    def agreeing(x, normalize=True):  # views have less contrast than the image: all differences point the same way
        contrast = x.flatten(1).std(1, keepdim=True)
        return torch.cat([contrast, torch.ones_like(contrast)], 1)

    sharp = (torch.arange(36).view(6, 6) % 2).float().expand(2, 3, 6, 6)
    views = torch.stack([agreeing(x) for x in evaluate.random_views(sharp, GENERATORS(range(2)), 31)])
    expected = agreeing(sharp) + 2.5 * (views.mean(0) - agreeing(sharp))
    dbd = FRONTS["dbd"].wrap(agreeing, None, GENERATORS(range(2)))(sharp, normalize=False)
    torch.testing.assert_close(dbd, expected)
    for name, factor in (("factor 2.5", 2.5), ("factor 1.0", 1.0)):
        moved = FRONTS["dbd"].attacks[name](linear, None, GENERATORS(range(2)))(images, normalize=False)
        views = torch.stack([linear(x, False) for x in evaluate.random_views(images, GENERATORS(range(2)), 8)])
        torch.testing.assert_close(moved, features + factor * (views.mean(0) - features))


def test_the_original_model_answers_for_a_trained_one_in_ttc_alone(row):
    args = evaluate.parse_args(["--preset", "tiny", "--num_images", "8"])
    images = common.load_images(args, "eval", row.clip.geometry)
    data = evaluate.Evaluation(images, row.transfer, None, row.clip.geometry, row.clip.digest, row.clip.weights_digest)
    for front, asked in (("ttc", True), ("jpeg50", False)):
        found = evaluate.load_row(args, "x", evaluate.Spec("x", args.model, (front,)), data)
        assert (found.original is not found.clip) == asked


def test_images_meet_the_first_front_first(row, monkeypatch):
    def front(mark):
        def wrap(encode, original, generators):
            return lambda images, normalize=True: order.append(mark) or encode(images, normalize)

        return Front(wrap, {"": wrap})

    order = []
    monkeypatch.setitem(FRONTS, "a", front("a"))
    monkeypatch.setitem(FRONTS, "b", front("b"))
    spec = evaluate.defended_specs("row", "original+a+b", {"original": evaluate.Spec("original")})["row"]
    assert spec.fronts == ("a", "b")
    two = replace(row, fronts=tuple(map(evaluate.make_front, spec.fronts)))
    evaluate.encode_row(two, row.pixels, 0)
    assert order == ["a", "b"]
    assert two.attacks() == [("", "")] and row.attacks() == [()]


@pytest.mark.parametrize(("text", "wrong"), [
    ("original+foo", "'foo' is no defence: there are jpegQ, ttc, dbd, tte"),
    ("original+ttc+jpegrandom", "at most one of its steps may be random"),
    ("original+jpeg0", "0 is not from 1 to 95"),
    ("pdg+jpeg50", "there is no 'pdg'"),
])  # fmt: skip
def test_a_front_that_there_is_not_is_named(text, wrong, tmp_path, capsys):
    args = evaluate.parse_args(["--preset", "smoke", "--defence", text, "--output_dir", str(tmp_path / "table")])
    line = refusal(capsys, evaluate.main, args)
    assert f"--defence {text}: " in line and wrong in line
    assert not (tmp_path / "table").exists()


@pytest.mark.parametrize("name", ["ttc", "tte", "jpegrandom"])
def test_draws_differ_by_image_and_look_but_not_by_run_or_batch(name, row, monkeypatch):
    row = replace(row, fronts=(replace(evaluate.make_front(name), draws=(2, 1)),)).part(slice(3))
    first = evaluate.encode_row(row, row.pixels, 0)
    assert first.shape[:2] == (2, 3) and (first[0] != first[1]).any(1).all()
    same = row.pixels[:1].repeat(2, 0)
    assert not torch.equal(*evaluate.encode_row(row, same, 0)[0])
    attack = replace(ATTACK, steps=1)
    attacked, _ = evaluate.attack_row(attack, row)
    monkeypatch.setattr(row.clip, "batch_size", 2)
    torch.testing.assert_close(evaluate.encode_row(row, row.pixels, 0), first, atol=1e-5, rtol=0)
    again, _ = evaluate.attack_row(attack, row)
    assert (again != attacked).float().mean() < 0.02  # of rounding alone


def test_random_qualities_are_from_30_to_75_both_included(monkeypatch):
    seen = []
    monkeypatch.setattr(evaluate, "jpeg", lambda images, quality: seen.extend(quality) or images)
    evaluate.jpeg_front("random").wrap(lambda images, normalize: images, None, GENERATORS(range(2000)))(None)
    assert {*seen} == {*range(30, 76)}


def test_the_worst_of_equal_images_of_a_random_defence_is_no_worse_than_one(row):
    """Chosen and reported on the same draws the worst of four would be lower than the mean."""
    row = replace(row, fronts=(evaluate.make_front("jpegrandom"),))
    chosen, reported = evaluate.score_sets(row, [row.pixels], 0)
    assert (chosen[0]["similarity"] != reported[0]["similarity"]).any()
    chosen, reported = ([{"similarity": luck} for luck in np.random.default_rng(i).random((4, 999))] for i in (0, 1))
    assert evaluate.worst_of(chosen, reported)["similarity"].mean() == pytest.approx(0.5, abs=0.05)
    assert evaluate.worst_of(chosen)["similarity"].mean() == pytest.approx(0.2, abs=0.05)


def test_an_attack_the_choice_and_the_report_draw_from_different_seeds(row, monkeypatch):
    row, seeds = replace(row.part(slice(1)), fronts=(evaluate.make_front("jpegrandom"),)), []
    generators_for = common.generators_for
    monkeypatch.setattr(common, "generators_for", lambda seed, index: seeds.append(seed) or generators_for(seed, index))
    evaluate.attack_row(replace(ATTACK, steps=1), row)
    evaluate.score_sets(row, [row.pixels], 0)
    assert len(seeds) == len({*seeds}) == 3


def test_recall_and_success_of_a_random_defence_are_shares_of_its_draws():
    ranks = {"clean": [[0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 2, 1]]}
    ranks |= {"attacked": [[0, 1, 1, 0], [3, 1, 1, 1], [0, 0, 0, 0]]}
    clean, attacked = ({"rank_i2t": np.array(each)} for each in ranks.values())
    assert first_share(clean).tolist() == [1, 0.75, 0.25]
    assert evaluate.success_rate(clean, attacked) == pytest.approx(1 - 0.5 / 1.75)
    worst = evaluate.worst_of([{**clean, "similarity": np.array([0.1, 0.2, 0.3])},
                               {**attacked, "similarity": np.array([0.2, 0.1, 0.0])}])  # fmt: skip
    assert worst["rank_i2t"].tolist() == [ranks["attacked"][0], ranks["attacked"][1], ranks["clean"][2]]
    assert worst["similarity"].tolist() == [0.1, 0.1, 0.0]


def test_a_random_loss_is_averaged_in_a_step_and_its_last_iterate_is_kept():
    losses, images = iter([9, 9, 1, 3]), torch.full((1, 3, 2, 2), 0.5)
    attack = common.Attack(0.1, 0.04, 2, draws=2)
    found, _ = common.pgd(lambda images: images.sum((1, 2, 3)) * next(losses), images, attack)
    torch.testing.assert_close(found, images + 0.08)  # not the first, whose draws were higher
    assert not [*losses]


def test_a_row_behind_ttc_says_what_breaks_it_and_where_it_acts(row, monkeypatch):
    monkeypatch.setattr(evaluate, "CONVERGENCE_IMAGES", 1)
    row = replace(row, name="x", fronts=(replace(FRONTS["ttc"], draws=(2, 1)),)).part(slice(2))
    measured = evaluate.measure(row, replace(ATTACK, steps=1, draws=1), 1, 0)
    assert measured.health["vanishing_gradient"] == 0
    assert measured.alone.keys() == {"detached", "through", "gate"}
    lowest = min(cosine for cosine, _ in measured.alone.values())
    transferred = measured.conditions["transfer"]["similarity"].mean()
    assert measured.conditions["white_box"]["similarity"].mean() <= min(lowest, transferred) + 0.02
    assert measured.conditions["clean"]["rank_i2t"].shape == (2, 2)
    assert measured.acts.keys() == {"clean", "transfer", "white_box"}
    alone, counters = evaluate.front_notes({"alone": {"x": measured.alone}, "acts": {"x": measured.acts}}, "x")[:2]
    assert re.search(r"cosine and R@1 by each attack alone: detached -?0\.\d+, \d+%; through .*; gate ", alone)
    assert re.search(r"it takes for attacked and counters \d+% clean, \d+% transfer, \d+% white-box images", counters)


def clipure(text, create_graph=False, dtype=torch.float32):
    """CLIPure-Cos (ICLR 2025) as its authors released it: ten steps of 30 towards t, without second derivatives."""
    def wrap(encode, original, generators):
        def defended(images, normalize=True):
            u, t = encode(images).to(dtype), text.to(dtype)
            with torch.enable_grad():
                for _ in range(10):
                    u = u if u.requires_grad else u.requires_grad_()
                    (g,) = torch.autograd.grad(-F.cosine_similarity(u, t[None]).sum(), u, create_graph=create_graph)
                    u = F.normalize(u - 30 * g / g.norm(), dim=-1)  # over the whole batch, as there
            return u.float()

        return defended

    return Front(wrap, {"as released": wrap})


@pytest.fixture(scope="module")
def towards(row):
    """A text that has a positive cosine with every image, attacked or not."""
    attacked, _ = evaluate.attack_row(replace(ATTACK, draws=0), row)
    features = torch.cat([row.clip.encode_pixels(pixels[:2]) for pixels in (row.pixels, row.transfer, attacked)])
    text = F.normalize(torch.linalg.pinv(features) @ torch.ones(6), dim=0)
    assert (features @ text > 0).all()
    return text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_defence_whose_gradient_vanishes_raises_the_alarm(dtype, row, towards):
    front = clipure(towards, dtype=dtype)
    row, attack = replace(row, fronts=(front,)).part(slice(2)), replace(ATTACK, draws=0)
    _, wrong = evaluate.attack_row(attack, row)
    assert evaluate.count_vanishing(row, attack) == 2
    assert bool(wrong["zero_gradient"].all()) == (dtype == torch.float16)
    health = evaluate.measure(row, attack, 1, 0).health
    summary = {"members": ["x"], "clean_recall_i2t@1": 1, "above_chance": True, "note": None, "doubtful": False}
    record = {"rows": {"original": summary}, "health": {"x": health}, "sanity": {}}
    assert evaluate.marks_of(record) == {"original": " (!)"}


def test_attacked_as_what_it_computes_it_shows_the_originals_figures(row, towards):
    bare, attack = row.part(slice(2)), replace(ATTACK, draws=0)
    released = clipure(towards)
    row = replace(bare, fronts=(Front(released.wrap, {"identity": lambda encode, *_: encode}),))
    assert evaluate.count_vanishing(row, attack) == 0
    figures = [evaluate.measure(each, attack, 1, 0).conditions for each in (bare, row)]
    for kind in ("clean", "white_box"):
        one, other = (found[kind]["similarity"] for found in figures)
        np.testing.assert_allclose(one, other, atol=0.02)
    graph = replace(bare, fronts=(clipure(towards, create_graph=True),))
    assert evaluate.count_vanishing(graph, attack) == 0
