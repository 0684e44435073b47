"""The sanity checks on planted defences, the worst case over attacks, convergence, seeds, ranks, intervals."""

import json
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
ATTACK = common.white_box(8 / 255, 10)
HEALTHY = "zero_gradient", "nonfinite", "vanishing_gradient"


class Stub(common.Clip):
    """A CLIP that sees the average colours of 16 squares alone; the caption of an image is its index.

    bend   with it, its cosines rise and fall on the way through the ball, as those of a network do
    """

    def __init__(self, pixels, bend=0.0):
        torch.nn.Module.__init__(self)
        self.name, self.device, self.precision, self.batch_size = "stub", torch.device("cpu"), "fp32", 64
        self.pixels, self.bend = pixels, bend

    def encode_image(self, images, normalize=True):
        x = F.avg_pool2d(images, 8).flatten(1) - 0.5
        return F.normalize(x + self.bend * (60 * x).sin(), dim=1)

    def attack_encoder(self, precision=None):
        return self.encode_image

    def encode_text(self, captions):
        return self.encode_image(common.as_images(self.pixels[[*map(int, captions)]], self.device))


@dataclass
class Planted(evaluate.Row):
    """A row whose defence is a function put in front of the model or behind it."""

    before: Callable = lambda images: images
    after: Callable = lambda features: features

    def defended(self, encode, original, generators, attack=None):
        return lambda images: self.after(encode(self.before(images)))


def stub_row(kind=evaluate.Row, contrast=0.07, bend=0.0, **fields):
    """A row of the stub and a few soft images, attacked on it; fields are the row's."""
    noise = torch.rand(IMAGES, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    images = F.interpolate(0.5 + contrast * (2 * noise - 1), 32, mode="bicubic").clamp(0, 1)
    pixels, right = common.to_pixels(images, np.zeros(images.shape), 1), torch.arange(IMAGES)[:, None]
    clip, captions = Stub(pixels.numpy(), bend), [*map(str, range(IMAGES))]
    row = evaluate.Row("original", clip, clip.pixels, clip.pixels, captions, right, None, right[:, 0])
    transfer, _ = evaluate.attack_row(common.Attack(8 / 255, 2 / 255, 8), row)
    return kind(**vars(row) | {"transfer": transfer.numpy()} | fields)


@pytest.fixture
def row():
    return stub_row()


def mean_cosine(row, pixels):
    return evaluate.score(row, pixels, 0)["similarity"].mean()


PASS, FAIL, LATER = evaluate.PASS, evaluate.FAIL, evaluate.NOT_CONVERGED
CHECKS = "five times", "three starts", "R@1 falls", "it is stronger", "transferred", "gradients", "scores"


def checked(row, steps=5):
    """The results of the sanity checks on a row, {start of the check: result}."""
    found = evaluate.sanity(row, replace(ATTACK, steps=steps), 0)
    assert [levels for levels, *_ in found["eps_curve"]] == evaluate.EPS_CURVE
    results = {name: result for name in CHECKS for check, result, _ in found["checks"] if check.startswith(name)}
    assert len(results) == len(found["checks"]) == len(CHECKS)
    return results


DEAD = {"R@1 falls": FAIL, "it is stronger": FAIL, "gradients": FAIL}
PLANTED = {  # defence -> what it is put in front of the model or behind it, and what the checks say that do not pass
    "none": ({}, {}),
    "bent": ({"bend": 0.1}, {"five times": LATER, "three starts": LATER, "R@1 falls": FAIL}),
    "quantised": ({"before": lambda images: (images * 16).round() / 16}, DEAD),
    "underflowing": ({"after": lambda features: (features * 1e-30) * 1e-20 + features.detach()}, DEAD),
    "random": ({"before": lambda images: (images + 0.3 * torch.randn_like(images)).clamp(0, 1)}, {"scores": FAIL}),
}


@pytest.mark.parametrize("defence", PLANTED)
def test_the_checks_pass_where_an_attack_has_converged_and_say_what_is_wrong_elsewhere(defence):
    fields, expected = PLANTED[defence]
    row = stub_row(Planted, contrast=0.25, **fields)
    results = checked(replace(row, transfer=row.pixels) if fields else row)
    wrong = {check: result for check, result in results.items() if result != PASS}
    assert wrong.items() >= expected.items() and (wrong == expected or defence == "random")


def test_transferred_images_that_are_stronger_are_flagged(row):
    """Those of a model of another input size may lie outside of the ball."""
    assert checked(replace(row, transfer=255 - row.pixels), steps=1)["transferred"] == FAIL


def test_twice_the_steps_tell_whether_an_attack_has_converged(row, monkeypatch):
    monkeypatch.setattr(evaluate, "CONVERGENCE_IMAGES", 5)
    for steps, converged in ((1, False), (40, True)):
        attack, part = replace(ATTACK, steps=steps), row.part(slice(5))
        fall = evaluate.measure(row, attack, 1, 0).fall
        once, twice = (evaluate.attack_row(replace(attack, steps=count), part)[0] for count in (steps, 2 * steps))
        assert fall == pytest.approx(mean_cosine(part, once) - mean_cosine(part, twice), abs=1e-6)
        assert (fall <= evaluate.TOLERANCE) == converged


SPEC = evaluate.Spec("x", fronts=("jpegrandom",))


def test_a_lucky_draw_of_a_random_defence_is_averaged_away(row, monkeypatch):
    """Sixteen draws of the qualities are averaged in a score, four in an attack's step; the checks take others."""
    row = replace(row.part(slice(2)), fronts=(evaluate.jpeg_front("random"),))
    text = row.clip.encode_text(row.captions)[row.own]
    drawn = [(features * text).sum(1).numpy() for features in evaluate.encode_row(row, row.pixels, evaluate.REPORTED)]
    assert len(drawn) == 16 and (drawn[0] != drawn[1]).any()
    np.testing.assert_allclose(evaluate.score(row, row.pixels, 0)["similarity"], np.mean(drawn, 0), atol=1e-6)
    monkeypatch.setattr(evaluate, "EPS_CURVE", [0, 1])
    assert " 0.0e+00" not in evaluate.sanity(row, replace(ATTACK, steps=1), 0)["checks"][-1][2]
    calls = []
    monkeypatch.setattr(evaluate, "differentiable_jpeg", lambda x, quality: calls.append(quality) or x)
    row = replace(row, fronts=(evaluate.jpeg_front("random"),))
    evaluate.attack_row(evaluate.row_attack(evaluate.parse_args(["--attack_steps", "1"]), SPEC), row)
    assert len(calls) == 4


def test_nan_features_end_the_run(capsys):
    row = stub_row(Planted, after=lambda features: features * torch.nan)
    assert "not finite" in refusal(capsys, evaluate.score, row, row.pixels, 0)


def test_the_worst_case_is_no_milder_than_any_attack(row):
    attack = replace(ATTACK, steps=4)
    measured = evaluate.measure(row, attack, 2, 0)
    worst = measured.conditions["white_box"]
    found = [row.transfer]
    for seed in (None, 7919):
        found += evaluate.attack_both(replace(attack, seed=seed), row, 0)[0]
    for pixels_adv in found:
        scored = evaluate.score(row, pixels_adv, 0)
        assert (worst["similarity"] <= scored["similarity"] + 1e-6).all()
        assert (worst["margin"] <= scored["margin"] + 1e-6).all()
        assert (worst["rank_i2t"] >= scored["rank_i2t"]).all()
    np.testing.assert_allclose(evaluate.score(row, measured.lowest, 0)["similarity"], worst["similarity"], atol=1e-5)
    assert measured.health == dict.fromkeys(HEALTHY, 0) | {"max_abs_delta_grey_levels": 8}
    measured = evaluate.measure(replace(row, transfer=255 - row.pixels), attack, 1, 0)
    assert common.linf_grey_levels(row.pixels, measured.lowest).max() == 8  # those of another geometry may lie outside


def test_the_transferred_image_counts_where_the_attack_itself_finds_less(row, monkeypatch):
    fine = {key: torch.zeros(IMAGES, dtype=torch.bool) for key in ("zero_gradient", "nonfinite")}
    monkeypatch.setattr(evaluate, "attack_row", lambda attack, part, *_: (torch.from_numpy(part.pixels), fine))
    conditions = evaluate.measure(row, ATTACK, 1, 0).conditions
    np.testing.assert_allclose(conditions["white_box"]["similarity"], conditions["transfer"]["similarity"])


def test_the_saved_white_box_images_are_those_behind_the_figures(row, tmp_path):
    measured = evaluate.measure(row, replace(ATTACK, steps=2), 1, 0)
    names = [f"{i:06d}" for i in range(IMAGES)]
    images = SimpleNamespace(names=names, captions=[[str(i)] for i in range(IMAGES)], coco_ids=[None] * IMAGES)
    evaluate.save_white_box(tmp_path, measured, images)
    worst, found = measured.conditions["white_box"], {}
    for entry in jsonl(tmp_path / "metadata.jsonl"):
        i = int(entry["caption"])
        pixels = np.asarray(Image.open(tmp_path / entry["file_name"])).transpose(2, 0, 1)
        scored = evaluate.score(row.part(slice(i, i + 1)), pixels[None], 0)
        assert entry["file_name"].endswith(f"/{i:06d}.png") and scored["rank_i2t"] == entry["rank_i2t"]
        assert scored["similarity"] == pytest.approx(entry["similarity"], abs=1e-5)
        found.setdefault(i, []).append(entry)
    for i, own in found.items():
        assert min(entry["similarity"] for entry in own) == pytest.approx(worst["similarity"][i], abs=1e-5)
        assert (max(entry["rank_i2t"] for entry in own) > 0) == (worst["rank_i2t"][i] > 0)
    assert len(found) == IMAGES < sum(map(len, found.values()))  # of some the margin attack alone takes the caption


def test_the_margin_attack_is_on_survivors_alone_and_never_raises_recall(row):
    (lowest, narrowest), _ = evaluate.attack_both(replace(ATTACK, steps=2), row, 0)  # too weak for all of the images
    before, after = (evaluate.score(row, x, 0)["rank_i2t"] for x in (lowest, narrowest))
    assert torch.equal(lowest[before > 0], narrowest[before > 0]) and 0 < (before == 0).sum() < IMAGES
    assert (after >= before).all() and (after > before).any()
    assert len(evaluate.attack_both(evaluate.scaled(ATTACK, 0.2), row, 0)[0]) == 1  # nobody is left


def test_the_margin_loss_is_the_retrieval_failure_itself(row):
    scored = evaluate.score(row, row.transfer, 0)
    for loss, key in (("cosine", "similarity"), ("margin", "margin")):
        loss_fn = evaluate.row_loss(replace(ATTACK, loss=loss), row)(row.clip.encode_image, np.arange(IMAGES))
        values = loss_fn(common.as_images(row.transfer, torch.device("cpu")))
        np.testing.assert_allclose(-values, scored[key], atol=1e-5)
    assert 0 < (scored["rank_i2t"] > 0).sum() < IMAGES
    assert ((values.numpy() > 0) == (scored["rank_i2t"] > 0)).all()


def test_scores_on_a_hand_made_ranking(monkeypatch):
    features = F.normalize(torch.tensor([[3.0, 1, 0], [4, 3, 0], [4, 0, 3]]), dim=1)
    row = replace(stub_row(Planted).part(slice(3)), captions=["a", "b", "c"], after=lambda _: features)
    monkeypatch.setattr(row.clip, "encode_text", lambda texts: torch.eye(3)[: len(texts)])
    row.equal = row.own
    scored = evaluate.score(row, row.pixels, 0)
    assert scored["rank_i2t"].tolist() == [0, 1, 1]  # image 1 prefers caption 0, image 2 too
    assert scored["rank_t2i"].tolist() == [[0], [0], [0]]  # each caption prefers its own image
    np.testing.assert_allclose(scored["similarity"], features.diagonal())
    assert scored["margin"][1] == pytest.approx(0.6 - 0.8)
    row.candidates = torch.tensor([[0, 1, 2], [1, 2, 1], [2, 0, 1]])  # what is no candidate does not count
    assert evaluate.score(row, row.pixels, 0)["rank_i2t"].tolist() == [0, 0, 1]
    row.after = lambda _: torch.ones(3, 3)  # collapsed: ties count against the model
    scored = evaluate.score(row, row.pixels, 0)
    assert scored["rank_t2i"].tolist() == [[2], [2], [2]] and scored["rank_i2t"].tolist() == [2, 1, 2]


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


def test_a_gradient_that_vanished_marks_its_row_whatever_the_checks_say(row):
    quantised = stub_row(Planted, **PLANTED["quantised"][0])
    sound, dead = (evaluate.measure(each, replace(ATTACK, steps=1), 1, 0).health for each in (row, quantised))
    record = {"rows": {}, "health": {"original": sound, "a": dead, "b": sound}, "sanity": {}}
    for name in record["health"]:
        record["rows"][name] = {"members": [name], "clean_recall_i2t@1": 1, "above_chance": True, "note": None}
        record["rows"][name]["doubtful"] = False
        record["sanity"][name] = {"checks": [["it holds", FAIL if name == "b" else PASS, ""]]}
    assert evaluate.marks_of(record) == {"original": "", "a": " (!)", "b": " (!)"}
    record["sanity"] = {}
    assert evaluate.marks_of(record) == {"original": "", "a": " (!)", "b": ""}


def table(values, falls=None, **kinds):
    """Rows of white-box cosines, {row: [those of each seed]}, of attacks so far from converged, and their pairs."""
    kinds_of_all = "per_image", "sanity", "fall", "recall_fall", "chance", "notes", "doubtful"
    specs, record = {}, {kind: {} for kind in kinds_of_all}
    for row, seeds in values.items():
        for seed, cosines in enumerate(seeds):
            name = row if not seed else f"{row}, seed {seed}"
            clean = {"similarity": np.full(len(cosines), 0.9), "margin": np.ones(len(cosines))}
            clean |= {f"rank_{direction}": np.zeros(len(cosines), int) for direction in ("i2t", "t2i")}
            attacked = clean | {"similarity": cosines}
            specs[name] = evaluate.Spec(row, seconds=1.0)
            record["per_image"][name] = {"clean": clean, "transfer": attacked, "white_box": attacked}
            record["fall"][name], record["chance"][name] = (falls or {}).get(name, 0), 1 / len(cosines)
            record["recall_fall"][name], record["notes"][name], record["doubtful"][name] = [0, 0], [], False
    record |= kinds
    record["rows"] = evaluate.summarise_rows(record, specs, 0)
    pairs = {tuple(pair["rows"]): pair for pair in evaluate.compare_rows(record, 0)}
    return record["rows"], pairs


SPREAD = np.random.default_rng(0).normal(0.3, 0.3, 60)  # cosines of 60 images


def test_paired_intervals_separate_what_means_alone_do_not():
    """A constant gain of 0.02 under a spread of 0.3: the intervals of the rows overlap, the paired one excludes 0."""
    values = {"original": [SPREAD], "b": [SPREAD + 0.02], "c": [np.random.default_rng(1).permutation(SPREAD)]}
    rows, pairs = table(values)
    assert pairs["original", "b"]["separated"] and not pairs["original", "c"]["separated"]
    assert pairs["original", "b"]["similarity"] == pytest.approx(-0.02)
    assert rows["original"]["white_box_interval"][1] > rows["b"]["white_box_interval"][0]


def test_rows_are_not_separated_by_less_than_what_more_steps_would_still_take():
    values = {"original": [SPREAD], "b": [SPREAD + 0.02] * 2}
    for fall, bound, separated in ((0.004, False, True), (0.015, True, True), (0.03, True, False)):
        rows, pairs = table(values, {"b, seed 1": fall})
        assert rows["b"]["not_converged"] == bound and pairs["original", "b"]["separated"] == separated
    fallen = {"original": [1, 9], "b": [0, 9], "b, seed 1": [2, 9]}
    rows, _ = table(values, sanity={"b": {"checks": [["it holds", LATER, ""]]}}, recall_fall=fallen)
    for name, bound in (("original", False), ("b", True)):
        assert rows[name]["not_converged"] == rows[name]["recall_not_converged"] == bound


def test_a_bad_seed_moves_the_mean_shows_in_the_range_and_undoes_a_separation():
    good = {"original": [SPREAD - 0.5], "a": [SPREAD + 0.1] * 3, "b": [SPREAD] * 3}
    assert table(good)[1]["a", "b"]["separated"]
    rows, pairs = table(good | {"a": [SPREAD + 0.1, SPREAD + 0.1, SPREAD - 0.02]})
    assert rows["a"]["white_box_similarity"] == pytest.approx(SPREAD.mean() + 0.06)
    expected = SPREAD.mean() - 0.02, SPREAD.mean() + 0.1
    assert evaluate.range_of(rows["a"], "white_box_similarity") == pytest.approx(expected)
    assert not pairs["a", "b"]["separated"] and pairs["original", "a"]["separated"]
    assert [len(rows[row]["per_seed"]) for row in rows] == [0, 3, 3]
    assert rows["a"]["white_box_recall_i2t@1_interval"] == evaluate.wilson(60, 60)  # of 60 images, whatever the seeds


def test_a_bf16_attack_is_near_the_fp32_one():
    args = evaluate.parse_args(["--preset", "tiny", "--num_images", "2"])
    clip = common.load_clip(args)
    images = common.load_images(args, "eval", clip.geometry)
    text_features = clip.encode_text(images.own_captions)
    given = replace(ATTACK, steps=3), partial(common.own_caption, text_features), images.pixels, clip
    found = [common.attack_all(*given, precision=name)[0] for name in ("fp32", "bf16")]
    exact, rough = (clip.similarity(pixels, text_features) for pixels in found)
    assert not torch.equal(*found) and (rough < exact + 0.1).all()


def test_five_images_are_shared_out_as_three_and_two(monkeypatch):
    monkeypatch.setattr(common, "PROCESSES", 2)
    for rank, share in enumerate([[0, 1, 2], [3, 4]]):
        monkeypatch.setattr(common, "RANK", rank)
        assert [batch.tolist() for batch in common.my_batches(np.arange(5), 64)] == [share]


def test_what_a_run_kept_of_some_images_is_not_taken_for_as_many_others(row):
    kept, keeper = {}, SimpleNamespace()
    keeper.load_part = lambda key: kept.get(json.dumps(key))
    keeper.save_part = lambda key, value: kept.update({json.dumps(key): value})
    for index in ([0, 1], [2, 3], [2, 3]):
        part = row.part(index)
        pixels_adv, _ = evaluate.attack_row(replace(ATTACK, steps=2, loss="margin"), part, keeper)
        assert common.linf_grey_levels(pixels_adv, part.pixels).max() <= 8
    evaluate.attack_row(replace(ATTACK, steps=2, loss="margin"), replace(part, transfer=part.pixels), keeper)
    assert len(kept) == 3  # another start, too


def test_a_gpu_attacks_the_table_in_tf32_and_trains_in_bf16_where_it_can_and_scores_in_neither(monkeypatch):
    for device, has_bf16, expected in (("cpu", True, "fp32"), ("cuda", True, "bf16"), ("cuda", False, "tf32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has_bf16: has)
        training, printed = (common.pick_precision("auto", torch.device(device), bf16=bf16) for bf16 in (True, False))
        assert (training, printed) == (expected, "tf32" if device == "cuda" else "fp32")
        assert common.pick_precision("fp32", torch.device(device), bf16=True) == "fp32"
    with common.tf32():
        assert torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
