"""The sanity battery on planted defences, the worst case over attacks, ranks, paired intervals, rows of the table."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import refusal
from torch.nn import functional as F

import common
import evaluate

IMAGES = 12
ATTACK = common.white_box(8 / 255, 20)


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """The tiny CLIP as a row of a few evaluation images with their transferred ones; flags, examples."""
    words = ["--preset", "tiny", "--cache_dir", str(tmp_path_factory.mktemp("cache")), "--num_images", str(IMAGES)]
    args = evaluate.parse_args(words)
    clip = common.load_clip(args)
    examples = common.load_examples(args, "eval", common.load_rows(args, "eval", IMAGES), clip.geometry)
    candidates, pixels = evaluate.load_candidates("evaluation", examples), examples[:]["pixels"]
    row = evaluate.Row("original", clip, pixels, pixels, *candidates)
    transfer, _ = evaluate.attack_row(common.Attack(8 / 255, 2 / 255, 8), row)
    row = replace(row, transfer=transfer.numpy())
    return SimpleNamespace(args=args, examples=examples, row=row)


@dataclass
class Planted(evaluate.Row):
    """A row whose defence is a function put in front of the model or behind it."""

    before: Callable = lambda images: images
    after: Callable = lambda features: features

    def view(self, encode_image, seed, codec=None, here=None):
        return lambda images: self.after(encode_image(self.before(images)))


def planted(setup, **functions):
    return Planted(**vars(setup.row) | functions)


def failed(row, setup, count=4, steps=5):
    """The checks of the battery that a row fails."""
    few = slice(count)
    checks, curve = evaluate.sanity(row.part(few), replace(ATTACK, steps=steps), 0)
    assert [levels for levels, *_ in curve] == evaluate.EPS_CURVE
    return {check for check, holds, _ in checks if not holds}


def test_an_honest_model_passes_every_check_under_an_attack_of_enough_steps(setup):
    assert failed(setup.row, setup, count=6, steps=12) == set()
    through_jpeg = replace(setup.row, qualities=(30,), transfer=setup.row.pixels)  # some still find their caption
    assert any(check.startswith("five times the steps") for check in failed(through_jpeg, setup, count=6, steps=2))


GRADIENTS, AGAIN = "gradients are there and finite", "another look gives the same"
PLANTED = {  # defence -> what it is put in front of the model or behind it, and the check that it fails
    "quantised": ({"before": lambda images: (images * 16).round() / 16}, GRADIENTS),
    "underflowing": ({"after": lambda features: (features * 1e-30) * 1e-20 + features.detach()}, GRADIENTS),
    "random": ({"before": lambda images: (images + 0.3 * torch.randn_like(images)).clamp(0, 1)}, AGAIN),
}


@pytest.mark.parametrize("defence", PLANTED)
def test_a_planted_defence_is_flagged(defence, setup):
    functions, check = PLANTED[defence]
    assert check in failed(planted(setup, **functions), setup)


def test_nan_features_end_the_run(setup, capsys):
    row = planted(setup, after=lambda features: features * torch.nan)
    assert "not finite" in refusal(capsys, evaluate.score, row, row.pixels, 0)


def test_the_worst_case_is_no_milder_than_any_attack(setup):
    row, attack = setup.row, replace(ATTACK, steps=6)
    conditions, lowest, health = evaluate.measure(row, attack, 2, 0)
    worst = conditions["white_box"]
    for seed in (None, 7919):
        found, _ = evaluate.attack_both(replace(attack, seed=seed), row, 0)
        for pixels_adv in found:
            scored = evaluate.score(row, pixels_adv, 0)
            for key in ("similarity", "margin"):
                assert (worst[key] <= scored[key] + 1e-6).all() and (worst[key] <= conditions["transfer"][key]).all()
            assert (worst["rank_i2t"] >= scored["rank_i2t"]).all()
    again = evaluate.score(row, lowest, 0)["similarity"]
    np.testing.assert_allclose(again, worst["similarity"], atol=1e-5)
    assert common.linf_grey_levels(row.pixels, lowest).max() == 8 == health["max_abs_delta_grey_levels"]
    assert health["images_unmoved"] == 0
    _, lowest, _ = evaluate.measure(replace(row, transfer=255 - row.pixels), attack, 1, 0)
    assert common.linf_grey_levels(row.pixels, lowest).max() == 8  # as those of a model of another geometry may lie


def test_the_margin_attack_is_on_survivors_alone_and_never_raises_recall(setup, monkeypatch):
    attacks, attack_row = [], evaluate.attack_row
    monkeypatch.setattr(evaluate, "attack_row", lambda *given: attacks.append(given[:2]) or attack_row(*given))
    few, row = replace(ATTACK, steps=2), replace(setup.row, transfer=setup.row.pixels)  # too weak for all of the images
    (lowest, narrowest), _ = evaluate.attack_both(few, row, 0)
    before, after = (evaluate.score(setup.row, x, 0)["rank_i2t"] for x in (lowest, narrowest))
    (_, whole), (on_margin, part) = attacks
    assert on_margin.loss == "margin" and 0 < len(part.pixels) == (before == 0).sum() < len(whole.pixels)
    assert torch.equal(lowest[before > 0], narrowest[before > 0])
    assert (after >= before).all() and (after > before).any()
    assert len(evaluate.attack_both(replace(ATTACK, steps=40), setup.row, 0)[0]) == 1  # nobody is left


def test_the_margin_loss_is_the_retrieval_failure_itself(setup, monkeypatch):
    losses = {}
    monkeypatch.setattr(evaluate, "attack_all", lambda attack, loss_at, *_, **__: losses.update({attack.loss: loss_at}))
    scored = evaluate.score(setup.row, setup.row.transfer, 0)
    for loss, key in (("cosine", "similarity"), ("margin", "margin")):
        evaluate.attack_row(replace(ATTACK, loss=loss), setup.row)
        values = losses[loss](slice(0, IMAGES))(common.as_images(setup.row.transfer, torch.device("cpu")))
        np.testing.assert_allclose(-values.detach(), scored[key], atol=1e-5)
    assert ((values.detach().numpy() > 0) == (scored["rank_i2t"] > 0)).all()


def test_scores_on_a_hand_made_ranking(setup):
    candidates = {"captions": ["a", "b", "c"], "own": torch.arange(3), "allowed": torch.ones(3, 3, dtype=torch.bool)}
    features = F.normalize(torch.tensor([[3.0, 1, 0], [4, 3, 0], [4, 0, 3]]), dim=1)
    row = planted(setup, clip=copy.copy(setup.row.clip), after=lambda _: features, **candidates)
    row.clip.encode_text = lambda texts: torch.eye(3)[: len(texts)]
    scored = evaluate.score(row, row.pixels[:3], 0)
    assert scored["rank_i2t"].tolist() == [0, 1, 1]  # image 1 prefers caption 0, image 2 too
    assert scored["rank_t2i"].tolist() == [0, 0, 0]  # each caption prefers its own image
    np.testing.assert_allclose(scored["similarity"], features.diagonal())
    assert scored["margin"][1] == pytest.approx(0.6 - 0.8)
    row.allowed[1, 0] = False  # what is no candidate does not count
    assert evaluate.score(row, row.pixels[:3], 0)["rank_i2t"].tolist() == [0, 0, 1]
    row.after = lambda _: torch.ones(3, 3)
    assert evaluate.score(row, row.pixels[:3], 0)["rank_t2i"].tolist() == [2, 2, 2]  # collapsed


def test_an_attacked_image_is_looked_for_among_clean_ones(setup):
    """Where all images of the gallery are attacked at once, the model looks better than it is."""
    row = setup.row
    gallery = evaluate.clean_gallery(row, 0)
    clean, alone, together = (evaluate.score(row, *given) for given in (
        (row.pixels, 0, gallery), (row.transfer, 0, gallery), (row.transfer, 0)
    ))  # fmt: skip
    assert (clean["rank_t2i"] == evaluate.score(row, row.pixels, 0)["rank_t2i"]).all()
    assert alone["rank_t2i"].mean() > together["rank_t2i"].mean()
    for i, similarity in enumerate(alone["similarity"]):
        others = np.delete(gallery[i].numpy(), i)
        assert alone["rank_t2i"][i] == (others >= similarity).sum()


def test_shares_have_wilsons_interval_and_success_is_of_what_was_right():
    assert evaluate.wilson(0, 100) == [0, pytest.approx(0.0370, abs=1e-4)]
    assert evaluate.wilson(50, 100) == pytest.approx([0.4038, 0.5962], abs=1e-4)
    assert evaluate.wilson(16, 16)[1] == 1
    ranks = {"clean": [0, 0, 0, 3], "white_box": [0, 2, 1, 4]}
    flat = {"similarity": np.ones(4), "margin": np.ones(4), "rank_t2i": np.zeros(4, int)}
    conditions = {name: flat | {"rank_i2t": np.array(values)} for name, values in ranks.items()}
    assert evaluate.summarise(conditions, 0)["white_box_success_rate"] == 2 / 3


def test_the_interval_of_an_improvement_is_paired():
    lost_0 = np.random.default_rng(0).uniform(0.5, 1.5, 50)
    low, high = evaluate.improvement_interval(lost_0 / 2, lost_0, 0)
    assert low == pytest.approx(0.5) == high
    low, high = evaluate.improvement_interval(lost_0[::-1] / 2, lost_0, 0)
    assert low < 0.5 < high and high - low > 0.05


def test_mmeb_candidates_are_the_rows_own_lists(setup):
    captions, own, allowed = evaluate.load_candidates("mmeb", setup.examples)
    assert len(captions) == 120 and allowed.all()
    assert [captions[i] for i in own] == setup.examples["caption"][:]


def test_random_jpeg_draws_differ_by_image_and_look_but_not_by_run(setup):
    row = replace(setup.row, qualities=("random",))
    images = common.as_images(row.pixels[:1].repeat(8, 0), torch.device("cpu"))
    with torch.no_grad():
        view = row.view(row.clip.encode_image, 0)
        first, second = view(images), view(images)
        again = row.view(row.clip.encode_image, 0)(images)
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert (first[0] != first[1:]).any()


def test_random_jpeg_is_drawn_alike_in_whatever_batch_an_image_is_attacked(setup, monkeypatch):
    row, attack = replace(setup.row, qualities=("random",)), replace(ATTACK, steps=2)
    together, _ = evaluate.attack_row(attack, row)
    monkeypatch.setattr(row.clip, "batch_size", 3)
    apart, _ = evaluate.attack_row(attack, row)
    assert torch.equal(together, apart)


def test_paired_intervals_separate_what_means_alone_do_not():
    """A constant gain of 0.02 under a spread of 0.3: the intervals of the rows overlap, the paired one excludes 0."""
    base, rank = np.random.default_rng(0).normal(0.3, 0.3, 60), np.zeros(60)
    values = {"a": base, "b": base + 0.02, "c": np.random.default_rng(1).permutation(base)}
    rows = {name: {"white_box": {"similarity": each, "rank_i2t": rank}} for name, each in values.items()}
    pairs = {tuple(pair["rows"]): pair for pair in evaluate.compare_rows(rows, 0)}
    assert pairs["a", "b"]["separated"] and not pairs["a", "c"]["separated"]
    assert pairs["a", "b"]["similarity"] == pytest.approx(-0.02)
    assert evaluate.interval(base, 0)[1] > evaluate.interval(base + 0.02, 0)[0]


def test_a_bare_visual_tower_keeps_the_text_tower(setup, tmp_path):
    visual = {key: value * 1.01 for key, value in setup.row.clip.model.visual.state_dict().items()}
    torch.save(visual, tmp_path / "tower.pt")
    loaded = common.load_clip(setup.args, str(tmp_path / "tower.pt")).model
    assert all(torch.equal(value, visual[key]) for key, value in loaded.visual.state_dict().items())
    assert torch.equal(loaded.positional_embedding, setup.row.clip.model.positional_embedding)


def test_five_images_are_shared_out_as_three_and_two(setup, monkeypatch):
    monkeypatch.setattr(common, "PROCESSES", 2)
    loss_at = common.own_caption(setup.row.clip.frozen(), setup.row.clip.encode_text(setup.examples["caption"][:]))
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(common, "RANK", rank)
        shares += common.attack_images(replace(ATTACK, steps=1), loss_at, setup.row.pixels[:5], setup.row.clip)
    assert [(here.start, here.stop, len(pixels)) for here, pixels, _ in shares] == [(0, 3, 3), (3, 5, 2)]


def test_what_a_run_kept_of_some_images_is_not_taken_for_as_many_others(setup):
    kept, keeper = {}, SimpleNamespace()
    keeper.load_part = lambda key: kept.get(str(key))
    keeper.save_part = lambda key, value: kept.update({str(key): value})
    few = [[0, 1], [2, 3], [2, 3]]
    attack = replace(ATTACK, steps=2, loss="margin")
    for index in few:
        row = setup.row.part(index)
        pixels_adv, _ = evaluate.attack_row(attack, row, keeper)
        assert common.linf_grey_levels(pixels_adv, row.pixels).max() <= 8
    assert len(kept) == 2
