"""The sanity checks on planted defences, the worst case over attacks, convergence, seeds, ranks, intervals."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import jsonl, refusal
from PIL import Image
from torch.nn import functional as F

import common
import evaluate

IMAGES = 12
ATTACK = common.white_box(8 / 255, 20)


@pytest.fixture(scope="module")
def setup():
    """The tiny CLIP as a row of a few evaluation images with their transferred ones; flags, images."""
    args = evaluate.parse_args(["--preset", "tiny", "--num_images", str(IMAGES)])
    clip = common.load_clip(args)
    images = common.load_images(args, "eval", clip.geometry)
    candidates = evaluate.load_candidates("evaluation", images)
    row = evaluate.Row("original", clip, images.pixels, images.pixels, *candidates)
    transfer, _ = evaluate.attack_row(common.Attack(8 / 255, 2 / 255, 8), row)
    return SimpleNamespace(args=args, images=images, row=replace(row, transfer=transfer.numpy()))


@dataclass
class Planted(evaluate.Row):
    """A row whose defence is a function put in front of the model or behind it."""

    before: Callable = lambda images: images
    after: Callable = lambda features: features

    def defended_encoder(self, encode_image, seed, codec=None, here=None, draws=None):
        return lambda images: self.after(encode_image(self.before(images)))


def planted(setup, **functions):
    return Planted(**vars(setup.row) | functions)


def checked(row, count=4, steps=5):
    """The results of the sanity checks on a row, {check: result}."""
    found = evaluate.sanity(row.part(slice(count)), replace(ATTACK, steps=steps), 0)
    assert [levels for levels, *_ in found["eps_curve"]] == evaluate.EPS_CURVE
    return {check: result for check, result, _ in found["checks"]}


def average_colours(setup):
    """A model that sees the average colours of 16 large squares alone: a few steps find the worst images of it."""
    return planted(setup, before=lambda x: F.interpolate(F.avg_pool2d(x, 16), scale_factor=16.0))


def test_the_checks_pass_where_an_attack_has_converged_and_say_where_it_has_not(setup):
    assert set(checked(average_colours(setup), count=3, steps=30).values()) == {"PASS"}
    results = checked(setup.row, count=3, steps=3)
    assert set(results.values()) == {"PASS", "NOT CONVERGED"}
    assert [check[:20] for check, result in results.items() if result != "PASS"][0] == "five times the steps"


@pytest.mark.parametrize("qualities", [(), (30,)])
def test_twice_the_steps_tell_whether_an_attack_has_converged(qualities, setup, monkeypatch):
    row, attack = replace(setup.row, qualities=qualities).part(slice(4)), replace(ATTACK, steps=3)
    monkeypatch.setattr(evaluate, "CONVERGENCE_IMAGES", 3)
    few = row.part(slice(3))
    short, long = (evaluate.attack_row(replace(attack, steps=steps), few)[0] for steps in (3, 6))
    cosines = [evaluate.score(few, found, 0)["similarity"].mean() for found in (short, long)]
    fall = evaluate.measure(row, attack, 1, 0).fall
    assert fall == pytest.approx(cosines[0] - cosines[1], abs=1e-6) and fall > evaluate.TOLERANCE


GRADIENTS, AGAIN = "gradients are there and finite", "scores are reproducible"
PLANTED = {  # defence -> what it is put in front of the model or behind it, and the check that it fails
    "quantised": ({"before": lambda images: (images * 16).round() / 16}, GRADIENTS),
    "underflowing": ({"after": lambda features: (features * 1e-30) * 1e-20 + features.detach()}, GRADIENTS),
    "random": ({"before": lambda images: (images + 0.3 * torch.randn_like(images)).clamp(0, 1)}, AGAIN),
}


@pytest.mark.parametrize("defence", PLANTED)
def test_a_planted_defence_is_flagged(defence, setup):
    functions, check = PLANTED[defence]
    assert checked(planted(setup, **functions))[check] == "FAIL"


def test_a_lucky_draw_of_a_random_defence_is_averaged_away(setup, monkeypatch):
    """One draw of the qualities is worth hundredths of a cosine; sixteen are averaged, four in an attack's step."""
    row = replace(setup.row, qualities=("random",)).part(slice(4))
    images, text = common.as_images(row.pixels, torch.device("cpu")), row.clip.encode_text(row.captions)[row.own]
    with torch.no_grad():
        single = row.defended_encoder(row.clip.encode_image, 0, draws=1)
        mean = np.mean([(single(images) * text).sum(1).numpy() for _ in range(16)], 0)
    np.testing.assert_allclose(evaluate.score(row, row.pixels, 0)["similarity"], mean, atol=1e-6)
    hard = replace(row, pixels=evaluate.attack_row(replace(ATTACK, steps=5), row)[0].numpy())
    looks = [[evaluate.score(hard, hard.pixels, seed)["similarity"].mean() for seed in range(4)]]
    monkeypatch.setattr(evaluate, "SCORE_DRAWS", 1)
    monkeypatch.setattr(evaluate.Row.defended_encoder, "__defaults__", (evaluate.jpeg, None, 1))
    looks += [[evaluate.score(hard, hard.pixels, seed)["similarity"].mean() for seed in range(4)]]
    assert np.std(looks[0]) < 0.5 * np.std(looks[1])
    calls = []
    monkeypatch.setattr(evaluate, "differentiable_jpeg", lambda x, quality: calls.append(quality) or x)
    evaluate.attack_row(replace(ATTACK, steps=1), row)
    assert len(calls) == 4 * 2  # each step, and the look at the last iterate


def test_nan_features_end_the_run(setup, capsys):
    row = planted(setup, after=lambda features: features * torch.nan)
    assert "not finite" in refusal(capsys, evaluate.score, row, row.pixels, 0)


def test_the_worst_case_is_no_milder_than_any_attack(setup):
    row, attack = setup.row, replace(ATTACK, steps=6)
    measured = evaluate.measure(row, attack, 2, 0)
    conditions, worst = measured.conditions, measured.conditions["white_box"]
    for seed in (None, 7919):
        found, _ = evaluate.attack_both(replace(attack, seed=seed), row, 0)
        for pixels_adv in found:
            scored = evaluate.score(row, pixels_adv, 0)
            for key in ("similarity", "margin"):
                assert (worst[key] <= scored[key] + 1e-6).all() and (worst[key] <= conditions["transfer"][key]).all()
            assert (worst["rank_i2t"] >= scored["rank_i2t"]).all()
    again = evaluate.score(row, measured.lowest, 0)["similarity"]
    np.testing.assert_allclose(again, worst["similarity"], atol=1e-5)
    assert common.linf_grey_levels(row.pixels, measured.lowest).max() == 8
    assert measured.health == {"zero_gradient": 0, "nonfinite": 0, "max_abs_delta_grey_levels": 8}
    measured = evaluate.measure(replace(row, transfer=255 - row.pixels), attack, 1, 0)
    assert common.linf_grey_levels(row.pixels, measured.lowest).max() == 8  # those of another geometry may lie outside


def test_the_saved_white_box_images_are_those_behind_the_figures(setup, tmp_path):
    row, attack = replace(setup.row, transfer=setup.row.pixels), common.white_box(4 / 255, 8)  # some keep their caption
    measured = evaluate.measure(row, attack, 1, 0)
    evaluate.save_white_box(tmp_path, measured, setup.images)
    entries, worst = jsonl(tmp_path / "metadata.jsonl"), measured.conditions["white_box"]
    found = {}
    for entry in entries:
        pixels = np.asarray(Image.open(tmp_path / entry["file_name"])).transpose(2, 0, 1)
        i = setup.images.coco_ids.index(entry["coco_id"])
        scored = evaluate.score(row.part(slice(i, i + 1)), pixels[None], 0)
        assert entry["caption"] == setup.images.captions[i][0]
        assert scored["similarity"] == pytest.approx(entry["similarity"], abs=1e-5)
        assert scored["rank_i2t"] == entry["rank_i2t"] and common.linf_grey_levels(row.pixels[i], pixels) <= 8
        found.setdefault(i, []).append(entry)
    assert [entry["rank_i2t"] for entry in entries[:IMAGES]] == measured.ranks
    for i, own in found.items():
        assert min(entry["similarity"] for entry in own) == pytest.approx(worst["similarity"][i], abs=1e-5)
        assert (max(entry["rank_i2t"] for entry in own) > 0) == (worst["rank_i2t"][i] > 0)
    assert len(found) == IMAGES < len(entries)  # of some the margin attack alone takes the caption


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


def test_the_margin_loss_is_the_retrieval_failure_itself(setup):
    scored = evaluate.score(setup.row, setup.row.transfer, 0)
    for loss, key in (("cosine", "similarity"), ("margin", "margin")):
        loss_fn = evaluate.row_loss(replace(ATTACK, loss=loss), setup.row)
        loss_fn = loss_fn(setup.row.clip.attack_encoder(), slice(0, IMAGES))
        values = loss_fn(common.as_images(setup.row.transfer, torch.device("cpu")))
        np.testing.assert_allclose(-values.detach(), scored[key], atol=1e-5)
    assert ((values.detach().numpy() > 0) == (scored["rank_i2t"] > 0)).all()


def test_scores_on_a_hand_made_ranking(setup):
    candidates = {"captions": ["a", "b", "c"], "right": torch.arange(3)[:, None], "equal": torch.arange(3)}
    features = F.normalize(torch.tensor([[3.0, 1, 0], [4, 3, 0], [4, 0, 3]]), dim=1)
    row = planted(setup, clip=copy.copy(setup.row.clip), after=lambda _: features, **candidates)
    row.clip.encode_text = lambda texts: torch.eye(3)[: len(texts)]
    scored = evaluate.score(row, row.pixels[:3], 0)
    assert scored["rank_i2t"].tolist() == [0, 1, 1]  # image 1 prefers caption 0, image 2 too
    assert scored["rank_t2i"].tolist() == [[0], [0], [0]]  # each caption prefers its own image
    np.testing.assert_allclose(scored["similarity"], features.diagonal())
    assert scored["margin"][1] == pytest.approx(0.6 - 0.8)
    row.candidates = torch.tensor([[0, 1, 2], [1, 2, 1], [2, 0, 1]])  # what is no candidate does not count
    assert evaluate.score(row, row.pixels[:3], 0)["rank_i2t"].tolist() == [0, 0, 1]
    row.after = lambda _: torch.ones(3, 3)  # collapsed: ties count against the model
    scored = evaluate.score(row, row.pixels[:3], 0)
    assert scored["rank_t2i"].tolist() == [[2], [2], [2]] and scored["rank_i2t"].tolist() == [2, 1, 2]


def test_an_attacked_image_is_looked_for_among_clean_ones(setup):
    """Where all images of the gallery are attacked at once, the model looks better than it is."""
    row = setup.row
    gallery = evaluate.encode_row(row, row.pixels, 0)
    cosines = row.clip.encode_text([row.captions[i] for i in row.own]) @ gallery.T
    clean, alone, together = (evaluate.score(row, *given) for given in (
        (row.pixels, 0, gallery), (row.transfer, 0, gallery), (row.transfer, 0)
    ))  # fmt: skip
    assert (clean["rank_t2i"] == evaluate.score(row, row.pixels, 0)["rank_t2i"]).all()
    assert alone["rank_t2i"].mean() > together["rank_t2i"].mean()
    for i, similarity in enumerate(alone["similarity"]):
        others = np.delete(cosines[i].numpy(), i)
        assert alone["rank_t2i"][i] == (others >= similarity).sum()


def test_shares_have_wilsons_interval_and_success_is_of_what_was_right():
    assert evaluate.wilson(0, 100) == [0, pytest.approx(0.0370, abs=1e-4)]
    assert evaluate.wilson(50, 100) == pytest.approx([0.4038, 0.5962], abs=1e-4)
    assert evaluate.wilson(16, 16)[1] == 1
    ranks = {"clean": [0, 0, 0, 3], "white_box": [0, 2, 1, 4]}
    flat = {"similarity": np.ones(4), "margin": np.ones(4), "rank_t2i": np.zeros(4, int)}
    conditions = {name: flat | {"rank_i2t": np.array(values)} for name, values in ranks.items()}
    assert evaluate.success_rate(conditions["clean"], conditions["white_box"]) == 2 / 3
    assert evaluate.summarise([conditions | {"transfer": conditions["clean"]}], 0)["white_box_success_rate"] == 2 / 3


def test_the_interval_of_an_improvement_is_paired():
    lost_0 = np.random.default_rng(0).uniform(0.5, 1.5, 50)
    low, high = evaluate.improvement_interval(lost_0 / 2, lost_0, 0)
    assert low == pytest.approx(0.5) == high
    low, high = evaluate.improvement_interval(lost_0[::-1] / 2, lost_0, 0)
    assert low < 0.5 < high and high - low > 0.05


def test_a_gradient_that_vanished_marks_its_row_whatever_the_checks_say():
    record = {"rows": {}, "health": {}, "sanity": {}}
    health = {"zero_gradient": 0, "nonfinite": 0}
    for name, wrong in {"original": {}, "a": {"zero_gradient": 1}, "b": {}}.items():
        row = {"members": [name], "clean_recall_i2t@1": 1, "above_chance": True, "doubtful": False, "note": None}
        record["rows"][name] = row
        record["health"][name] = health | wrong
        record["sanity"][name] = {"checks": [["it holds", "FAIL" if name == "b" else "PASS", ""]]}
    assert evaluate.marks_of(record) == {"original": "", "a": " (!)", "b": " (!)"}
    record["sanity"] = {}
    assert evaluate.marks_of(record) == {"original": "", "a": " (!)", "b": ""}


def test_random_qualities_are_from_30_to_75_both_included():
    seen = []
    encode = evaluate.with_jpeg(lambda x, quality: seen.extend(quality) or x, ("random",), lambda x: x)
    encode(torch.zeros(2000, 1))
    assert {*seen} == {*range(30, 76)}


def test_mmeb_candidates_are_the_rows_own_lists(setup):
    captions, right, candidates, _ = evaluate.load_candidates("mmeb", setup.images)
    assert len(captions) == 120 == candidates.shape[1]
    assert [[captions[i] for i in each] for each in candidates] == setup.images.candidates
    assert [captions[i] for i in right[:, 0]] == setup.images.own_captions


def test_random_jpeg_draws_differ_by_image_and_look_but_not_by_run_or_batch(setup, monkeypatch):
    row = replace(setup.row, qualities=("random",))
    images = common.as_images(row.pixels[:1].repeat(8, 0), torch.device("cpu"))
    with torch.no_grad():
        encode = row.defended_encoder(row.clip.encode_image, 0)
        first, second = encode(images), encode(images)
        again = row.defended_encoder(row.clip.encode_image, 0)(images)
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert (first[0] != first[1:]).any()
    together = evaluate.score(row, row.pixels, 0)["similarity"]
    monkeypatch.setattr(row.clip, "batch_size", 5)
    np.testing.assert_allclose(evaluate.score(row, row.pixels, 0)["similarity"], together, atol=1e-5)


def test_random_jpeg_is_drawn_alike_in_whatever_batch_an_image_is_attacked(setup, monkeypatch):
    row, attack = replace(setup.row, qualities=("random",)), replace(ATTACK, steps=2)
    together, _ = evaluate.attack_row(attack, row)
    monkeypatch.setattr(row.clip, "batch_size", 3)
    apart, _ = evaluate.attack_row(attack, row)
    assert torch.equal(together, apart)


def table(values, falls=None):
    """A record of white-box cosines, {row: [those of each seed]}, and how far each row's attack is from converged."""
    kinds = "per_image", "sanity", "fall", "recall_fall", "chance", "notes", "doubtful"
    specs, record = {}, {kind: {} for kind in kinds}
    for row, seeds in values.items():
        for seed, cosines in enumerate(seeds):
            name = row if not seed else f"{row}, seed {seed}"
            clean = {"similarity": np.full(len(cosines), 0.9), "margin": np.ones(len(cosines))}
            clean |= {f"rank_{direction}": np.zeros(len(cosines), int) for direction in ("i2t", "t2i")}
            attacked = clean | {"similarity": cosines}
            specs[name] = evaluate.Spec(row, seconds=1.0)
            record["per_image"][name] = {"clean": clean, "transfer": attacked, "white_box": attacked}
            record["fall"][name], record["recall_fall"][name] = (falls or {}).get(row, 0), [0, 0]
            record["chance"][name], record["notes"][name] = 1 / len(cosines), []
            record["doubtful"][name] = False
    record["rows"] = evaluate.summarise_rows(record, specs, 0)
    pairs = {tuple(pair["rows"]): pair for pair in evaluate.compare_rows(record, 0)}
    return record["rows"], pairs


SPREAD = np.random.default_rng(0).normal(0.3, 0.3, 60)  # cosines of 60 images


def test_paired_intervals_separate_what_means_alone_do_not():
    """A constant gain of 0.02 under a spread of 0.3: the intervals of the rows overlap, the paired one excludes 0."""
    values = {"original": SPREAD, "b": SPREAD + 0.02, "c": np.random.default_rng(1).permutation(SPREAD)}
    rows, pairs = table({name: [each] for name, each in values.items()})
    assert pairs["original", "b"]["separated"] and not pairs["original", "c"]["separated"]
    assert pairs["original", "b"]["similarity"] == pytest.approx(-0.02)
    assert rows["original"]["white_box_interval"][1] > rows["b"]["white_box_interval"][0]


def test_rows_are_not_separated_by_less_than_what_more_steps_would_still_take():
    values = {"original": [SPREAD], "b": [SPREAD + 0.02]}
    for fall, bound, separated in ((0.004, False, True), (0.015, True, True), (0.03, True, False)):
        rows, pairs = table(values, {"b": fall})
        assert rows["b"]["not_converged"] == bound and pairs["original", "b"]["separated"] == separated


def test_a_bad_seed_moves_the_mean_shows_in_the_range_and_undoes_a_separation():
    good = {"original": [SPREAD - 0.5], "a": [SPREAD + 0.1] * 3, "b": [SPREAD] * 3}
    rows, pairs = table(good)
    assert pairs["a", "b"]["separated"]
    rows, pairs = table(good | {"a": [SPREAD + 0.1, SPREAD + 0.1, SPREAD - 0.02]})
    assert rows["a"]["white_box_similarity"] == pytest.approx(SPREAD.mean() + 0.06)
    expected = SPREAD.mean() - 0.02, SPREAD.mean() + 0.1
    assert evaluate.range_of(rows["a"], "white_box_similarity") == pytest.approx(expected)
    assert not pairs["a", "b"]["separated"] and pairs["original", "a"]["separated"]
    assert [len(rows[row]["per_seed"]) for row in rows] == [0, 3, 3]


def test_a_bare_visual_tower_keeps_the_text_tower(setup, tmp_path):
    visual = {key: value * 1.01 for key, value in setup.row.clip.model.visual.state_dict().items()}
    torch.save(visual, tmp_path / "tower.pt")
    loaded = common.load_clip(setup.args, str(tmp_path / "tower.pt")).model
    assert all(torch.equal(value, visual[key]) for key, value in loaded.visual.state_dict().items())
    assert torch.equal(loaded.positional_embedding, setup.row.clip.model.positional_embedding)


def test_five_images_are_shared_out_as_three_and_two(monkeypatch):
    monkeypatch.setattr(common, "PROCESSES", 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(common, "RANK", rank)
        shares += [batch.tolist() for batch in common.my_batches(range(5), 64)]
    assert shares == [[0, 1, 2], [3, 4]]


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


# -- precision


def test_a_bf16_attack_is_near_the_fp32_one(setup):
    loss = partial(common.own_caption, setup.row.clip.encode_text(setup.images.own_captions))
    given = replace(ATTACK, steps=10), loss, setup.row.pixels, setup.row.clip
    found = [common.attack_all(*given, precision=name)[0] for name in ("fp32", "bf16")]
    exact, rough = (evaluate.score(setup.row, pixels, 0)["similarity"] for pixels in found)
    assert not torch.equal(*found) and (rough < exact + 0.1).all()


def test_the_precision_of_gradients_is_the_flags_or_that_of_what_they_are_for(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    picked = [common.pick_precision("auto", device, bf16) for device in (cpu, cuda) for bf16 in (False, True)]
    assert picked == ["fp32", "fp32", "tf32", "bf16"]
    assert [common.pick_precision(name, cuda, True) for name in ("fp32", "bf16")] == ["fp32", "bf16"]
