"""What the table says of whom, which captions are wrong answers, what a folder of figures keeps and whom it refuses."""

import fcntl
import json
import math
import os
import re
import shutil
import warnings
import zipfile
from itertools import chain
from pathlib import Path
from unittest.mock import patch

import matplotlib.font_manager
import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, TINY, jsonl, metrics, other_weights, pictures, shell, snapshot
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

import common
import evaluate

SMALL = ["--preset", "smoke", "--num_images", 8, "--steps", 1]
TRAINING = ["--batch_size", 4, "--val_images", 2]
TABLE = ["evaluate.py", "--preset", "smoke", "--num_images", 4, "--steps", 1, "--attack_steps", 1, "--qualities"]
GENERATE = ["generate_pgd_adversarial.py", "--preset", "smoke", "--split", "eval", "--steps", 1, "--batch_size", 2]


@pytest.fixture(scope="module")
def scenes():
    """The bundled evaluation images: [(path, its caption)]."""
    (file,) = (TINY / "MMEB-eval" / "MSCOCO_i2t").glob("*.parquet")
    return [(row["qry_img_path"], row["tgt_text"][0]) for row in pq.read_table(file).to_pylist()]


def own_pictures(folder, scenes, captions):
    """A folder of the first scenes with these captions, each a list or one; returns --eval_data and it."""
    folder.mkdir(parents=True)
    with zipfile.ZipFile(TINY / "MMEB-eval" / "images.zip") as archive:
        for number, (path, _) in zip(range(len(captions)), scenes):
            (folder / f"{number}.jpg").write_bytes(archive.read(path))
    lines = [{"file_name": f"{number}.jpg", "text": texts} for number, texts in enumerate(captions)]
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return ["--eval_data", folder]


def no_attack(*_, **__):
    raise AssertionError("an image was attacked")


# Captions and chance

LONG = "a red ring above a blue star " * 6


def mmeb_pictures(folder, scenes, candidates):
    """A copy of MMEB of the first scenes, with these candidates; returns --eval_data and it."""
    (folder / "MSCOCO_i2t").mkdir(parents=True)
    columns = {"qry_text": [""] * len(candidates), "qry_img_path": [path for path, _ in scenes[: len(candidates)]]}
    columns |= {"tgt_text": candidates, "tgt_img_path": [[""]] * len(candidates)}
    pq.write_table(pa.table(columns), folder / "MSCOCO_i2t" / "test-00000-of-00001.parquet")
    shutil.copy(TINY / "MMEB-eval" / "images.zip", folder)
    return ["--eval_data", folder, "--candidates", "mmeb"]


@pytest.mark.parametrize("kind", ["evaluation", "mmeb"])
def test_ranks_are_those_of_the_plain_way_with_no_equal_caption_as_a_wrong_answer(kind, tmp_path, scenes, monkeypatch):
    own = [caption for _, caption in scenes[:9]]
    captions = [[own[i], f"Scene {i}.", own[i].upper(), "a star"] for i in range(9)]
    captions[2][0] = captions[5][0] = captions[7][1] = "A ring."  # equal ones, of two pictures first and of one not
    captions[3][0], captions[4][0] = f"{LONG} here", f"{LONG} there"  # equal once they are cut
    candidates = [list(chain(*captions))] * 9
    if kind == "mmeb":
        captions = [texts[:1] for texts in captions]
        candidates = [[*captions[i], *own[: i + 1], "a RING.", LONG] for i in range(9)]
    if kind == "evaluation":
        data = own_pictures(tmp_path / "data", scenes, captions)
    else:
        data = mmeb_pictures(tmp_path / "data", scenes, candidates)
    monkeypatch.setattr(evaluate, "RANKED_AT_ONCE", 4)
    words = [*TABLE[1:], *data, "--num_images", 9, "--trainings", "--output_dir", tmp_path / "table"]
    with patch.object(Figure, "savefig"), patch.object(Figure, "tight_layout"):
        evaluate.main(evaluate.parse_args([str(word) for word in words]))

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{TINY / 'clip'}")
    tokenizer, normalise = open_clip.get_tokenizer(f"local-dir:{TINY / 'clip'}"), preprocess.transforms[-1]
    entries = jsonl(tmp_path / "adversarial_eval" / "metadata.jsonl")
    attacked = [Image.open(tmp_path / "adversarial_eval" / entry["file_name"]) for entry in entries]
    attacked = torch.stack([normalise(torch.tensor(np.array(image)).permute(2, 0, 1) / 255) for image in attacked])
    with zipfile.ZipFile(TINY / "MMEB-eval" / "images.zip") as archive:
        clean = torch.stack([preprocess(Image.open(archive.open(path))) for path, _ in scenes[:9]])

    def tokens(caption):
        return tuple(tokenizer([caption])[0].tolist())

    with torch.no_grad():
        clean, attacked = (model.eval().encode_image(images, normalize=True) for images in (clean, attacked))
        texts = {caption: model.encode_text(tokenizer([caption]), normalize=True)[0] for caption in chain(*candidates)}
    right = [{tokens(caption) for caption in each} for each in captions]
    for condition, features in {"clean": clean, "transfer": attacked}.items():
        found = metrics(tmp_path / "table")["per_image"]["original"][condition]
        for i, image in enumerate(features):
            best = max(image @ texts[caption] for caption in captions[i])
            cosines = [image @ texts[caption] for caption in {*candidates[i]} if tokens(caption) not in right[i]]
            assert found["rank_i2t"][i] == sum(cosine >= best for cosine in cosines)
            ranks = []
            for caption in captions[i]:
                others = [clean[j] for j in range(9) if tokens(caption) not in right[j]]
                ranks.append(sum(other @ texts[caption] >= image @ texts[caption] for other in others))
            assert found["rank_t2i"][i] == ranks
            others = [j for j in range(9) if tokens(captions[i][0]) not in right[j]]
            assert len(others) == (6 if i in (2, 5) and kind == "evaluation" else 7 if i in (2, 3, 4, 5) else 8)


@pytest.mark.parametrize(("captions", "name"), [
    ([f"{LONG} {i}" for i in range(3)], "0.jpg"),  # all are equal once they are cut
    (["a star", ["a ring", "A star", "a dot"], ["a star", "a dot"]], "1.jpg"),  # all are right for one picture
])  # fmt: skip
def test_an_image_without_another_caption_to_lose_to_is_named_before_the_first_attack(captions, name, tmp_path, scenes):
    words = [*TABLE, *own_pictures(tmp_path / "mine", scenes, captions), "--num_images", 3, "--reproduce"]
    _, line = shell(*words, "--output_dir", tmp_path / "out" / "table", code=2)
    assert f"{name} has no other caption to lose to" in line and line.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_candidates_of_mmeb_that_hold_no_wrong_caption_are_refused_and_the_remedy_works(tmp_path, scenes):
    data = mmeb_pictures(tmp_path / "data", scenes, [[caption] for _, caption in scenes[:3]])
    words = [*TABLE, "--num_images", 3, "--trainings", "--output_dir", tmp_path / "table"]
    assert "leave out --candidates mmeb" in shell(*words, *data, code=2)[1]
    shell(*words, *data[:2])


def test_a_figure_that_does_not_exist_is_null_in_the_file_and_a_dash_in_the_table(tmp_path, monkeypatch):
    """Where the attack moves no image, the original has no drop that a defence could take away."""

    def unmoved(loss_fn, images, *_, **__):
        none = torch.zeros(len(images), dtype=torch.bool)
        return images, {"zero_gradient": none, "nonfinite": none}

    monkeypatch.setattr(common, "pgd", unmoved)
    printed, _ = shell(*TABLE, 50, "--trainings", "--output_dir", tmp_path / "table")
    row = metrics(tmp_path / "table")["rows"]["JPEG 50"]
    assert row["improvement"] is row["improvement_interval"] is None
    assert re.search(r"JPEG 50 +0\.\d+ +\d+% +0\.\d+ +\d+% +0\.\d+ +\d+% +- +-", printed)
    with pytest.raises(ValueError):  # and what slips through is not written
        common.save(tmp_path / "figures.json", {"margin": math.inf})
    assert not (tmp_path / "figures.json").exists()


@pytest.mark.parametrize("at_chance", ["original", "x"])
def test_a_row_that_is_not_above_chance_is_marked_and_has_no_improvement(at_chance, tmp_path):
    words = [*TABLE, 50, "--num_images", 12, "--trainings", "--output_dir", tmp_path / "table"]
    if at_chance == "original":
        words += ["--pretrained", "random", "--seed", 1]
    else:
        words += ["--checkpoint", f"x={other_weights(tmp_path / 'x.safetensors', scale=-5)}"]
    printed, _ = shell(*words)
    record, blind = metrics(tmp_path / "table"), [at_chance] if at_chance == "x" else ["original", "JPEG 50"]
    for name, row in record["rows"].items():
        assert (f"\n{name} (?) " in printed) == (name in blind) == (row["clean_recall_i2t@1_interval"][0] <= 1 / 12)
        assert (row.get("improvement") is None) == (name in (*blind, "original"))
    for pair in record["paired"]:
        assert (pair["separated"] is None) == (pair["similarity"] is None) == bool({*pair["rows"]} & {*blind})
    said = " ".join(printed.split())
    assert "every pair differs" not in said and "not above chance" in said
    assert all(f"pairs with {name}: -" in said for name in blind)


# Figures


def test_figures_show_any_caption_without_a_warning_and_a_further_own_one_as_right(tmp_path, scenes, monkeypatch):
    """A font of this machine has the characters, or ? stands for them."""
    manager, texts, savefig = matplotlib.font_manager.fontManager, [], Figure.savefig
    fonts = [font for font in manager.ttflist if font.name.startswith(("DejaVu", "STIX"))]  # matplotlib's own

    def spy(figure, *args, **options):
        savefig(figure, *args, **options)
        texts.extend((text.get_text(), text.get_color()) for text in figure.findobj(Text))

    monkeypatch.setattr(manager, "ttflist", fonts)
    monkeypatch.setattr(Figure, "savefig", spy)
    first = [re.sub(" on a [a-z]+ background", "", scenes[0][1]), scenes[0][1]]
    data = own_pictures(tmp_path / "mine", scenes, [first, "\u1d81 \u72ac", "a \U0001f408\x07 b\tc\nd", "a star"])
    state = TINY / "clip" / "open_clip_model.safetensors"
    words = ["--trainings", "--checkpoint", f"\u72ac={state}", "--radii", "8/255", "--output_dir", tmp_path / "table"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(?i).*glyph.*|.*font.*")
        shell(*TABLE, *data, *words, figures=True)
    shown = [text for text, _ in texts]
    assert {"\u1d81 ?", "a ?? b c d", "?", "?\n(white-box <=)"} <= {*shown}  # captions, and the row's name
    assert not re.search("[\u72ac\U0001f408\x07\t]", "".join(shown))
    text, colour = next(text for text in texts if text[0].startswith("clean: "))  # of the first image
    assert text.endswith("first: own caption") and colour == "#2a7a2a"
    record = metrics(tmp_path / "table")
    assert record["per_image"]["original"]["clean"]["rank_i2t"][0] == 0
    assert (record["n"], record["coco_ids"]) == (4, [])
    for figure in ("examples", "cosines", "radii"):
        with Image.open(tmp_path / "table" / f"{figure}.png") as image:
            assert image.width > 600


# Trainings and the rows that they make


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of trainings: as they are for a row, or with other flags; of adversarial images; of a table."""
    folder = tmp_path_factory.mktemp("trained")
    words = [*SMALL, *TRAINING, "--max_steps", 1, "--loss", "features", "--online_steps", 1]
    shell("defend_clip_pgd_v2.py", *words, "--output_dir", folder / "online")
    shell(*TABLE, "--trainings", "--output_dir", folder / "evaluation")
    return folder


def test_a_training_of_another_script_loss_or_attack_is_no_row_of_the_table(trained, tmp_path):
    folder, made = shutil.copytree(trained, tmp_path / "copy"), "online"
    for row, said in {
        "online": "--online_steps 1, not 2",
        "pgd": "--loss features, not contrastive; --online_steps 1, not 0",
        "mat": "script defend_clip_pgd_v2.py, not defend_clip_mat_v2.py",
    }.items():
        (folder / made).rename(folder / row)
        before, made = snapshot(folder), row
        _, line = shell(*TABLE, "--trainings", row, "--output_dir", folder / "evaluation", code=2)
        assert f"{folder / row} is no training of this row: {said}" in line and line.count("\n") == 1
        assert "remove that folder, or choose another --output_dir" in line and snapshot(folder) == before


CHANGED = {"lr": 1e-3, "epochs": 3, "max_steps": 4, "batch_size": 4, "weight_decay": 0.2, "num_images": 8}
CHANGED |= {"loss_threshold": 1e-9}


def test_a_training_with_other_rates_or_images_is_noted_and_the_loss_of_an_epoch_is_the_mean_over_it(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "copy")
    words = [word for flag, value in CHANGED.items() for word in (f"--{flag}", value)]
    words += ["--preset", "smoke", "--steps", 1, "--val_images", 2, "--output_dir", folder / "mat"]
    printed, _ = shell("defend_clip_mat_v2.py", *words)
    log, epochs = jsonl(folder / "mat" / "log.jsonl"), metrics(folder / "mat")["epochs"]
    means = [np.mean([entry["loss"] for entry in log if entry["epoch"] == epoch]) for epoch in (1, 2)]
    assert [epoch["loss"] for epoch in epochs] == pytest.approx(means) and len(log) == 4
    assert re.findall(r"loss ([\d.]+)", printed) == [f"{mean:.3f}" for mean in means]
    printed, _ = shell(*TABLE, "--trainings", "mat", "--output_dir", folder / "evaluation")
    note = metrics(folder / "evaluation")["rows"]["MAT"]["note"]
    for flag, value in CHANGED.items():
        assert re.search(rf"--{flag} {value}, not \S+", note)
    assert "--max_steps 4, not none" in note and "--steps" not in note.replace("--max_steps", "")
    assert "\nMAT (*) " in printed and "(*) MAT: trained with --lr 0.001, not " in printed
    assert r"MAT (\*)" in (folder / "evaluation" / "table.md").read_text()


def test_a_copied_training_is_another_run_in_a_folder_of_its_own_name(tmp_path, monkeypatch):
    """README's recipe for a defence that is trained."""
    monkeypatch.chdir(tmp_path)
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    changed = Path("defend_clip_mat_v2.py").read_text().replace("NOISE_SIGMA = 15", "NOISE_SIGMA = 25")
    Path("defend_clip_mine.py").write_text(changed)
    words = [*SMALL, *TRAINING, "--max_steps", 1]
    for script, name in (("defend_clip_mat_v2.py", "mat"), ("defend_clip_mine.py", "defend_clip_mine")):
        shell(tmp_path / script, *words)
        assert metrics(Path("runs/smoke") / name)["script"] == script
    before = snapshot(tmp_path / "runs")
    _, line = shell(tmp_path / "defend_clip_mine.py", *words, "--output_dir", "runs/smoke/mat", code=2)
    assert "defend_clip_mat_v2.py" in line and "choose another --output_dir" in line
    assert snapshot(tmp_path / "runs") == before


# What is refused before anything is made, and what is needed


def test_reproduce_names_a_mistake_before_anything_is_made(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "pgd", no_attack)
    shutil.copytree(trained / "online", tmp_path / "there" / "pgd")
    shutil.copytree(trained / "adversarial_eval", tmp_path / "there" / "adversarial_eval")
    (tmp_path / "strange" / "evaluation").mkdir(parents=True)
    (tmp_path / "strange" / "evaluation" / "metrics.json").write_text('{"accuracy": 1}')
    before = snapshot(tmp_path)
    for folder, words, said in (
        ("new", ["--checkpoint", f"MAT={TINY / 'clip' / 'open_clip_model.safetensors'}"], "MAT"),  # a taken name
        ("there", ["--trainings", "mat", "pgd"], "--loss features, not contrastive"),
        ("there", ["--trainings", "--steps", 2], "--steps 1, not 2"),
        ("strange", [], "metrics.json"),
    ):
        _, line = shell(*TABLE, "--reproduce", *words, "--output_dir", tmp_path / folder / "evaluation", code=2)
        assert said in line and line.count("\n") == 1 and snapshot(tmp_path) == before


# What makes two runs the same, and what a folder keeps


def test_of_two_runs_into_one_folder_in_the_same_instant_one_says_that_the_other_is_writing(tmp_path, monkeypatch):
    """The other one takes the folder's lock, and is done with it or writes, just before this one looks for it."""
    folder, whole, flock, other = tmp_path / "out", tmp_path / "whole", fcntl.flock, []
    command = [*GENERATE, "--num_images", 2, "--output_dir"]
    shell(*command, whole)

    def flock_second(file, how):
        if not other:
            other.append(os.open(folder, os.O_RDONLY))
            flock(other[0], fcntl.LOCK_SH | fcntl.LOCK_NB)
            if ended:
                shutil.copytree(whole, folder, dirs_exist_ok=True)
                os.close(other[0])
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", flock_second)
    ended = False
    assert "another run is writing" in shell(*command, folder, code=2)[1] and not list(folder.iterdir())
    os.close(other.pop())
    ended = True
    line = shell(*command, folder, "--seed", 1, code=2)[1]
    assert "--seed 0, not 1" in line and line.count("\n") == 1


def test_radii_are_curves_that_never_rise_attack_no_row_again_and_are_kept_until_they_are_asked_for(
    trained, tmp_path, monkeypatch
):
    folder = shutil.copytree(trained, tmp_path / "copy") / "evaluation"
    words, before = [*TABLE, 50, "--trainings", "--output_dir", folder], metrics(folder)["per_image"]["original"]
    first, _ = shell(*words, "--radii", "4/255")
    attacked, pgd = set(), common.pgd

    def noted(loss_fn, images, attack, *rest):
        attacked.add(attack.eps)
        return pgd(loss_fn, images, attack, *rest)

    monkeypatch.setattr(common, "pgd", noted)
    second, _ = shell(*words, "--radii", "8/255", "1/255", "4/255")
    record = metrics(folder)
    assert re.findall("(.+): clean R@1", first + second) == ["JPEG 50"] and attacked == {1 / 255, 8 / 255}
    assert record["per_image"]["original"] == before
    assert max(map(len, second[second.index("local-dir:") :].splitlines()[:-1])) <= 80
    for name, curve in record["radii"].items():
        levels, cosines, recalls = zip(*curve)
        row = record["rows"][name]
        assert levels == (0, 1, 4, 8) and cosines[0] == pytest.approx(row["clean_similarity"])
        assert [*cosines] == sorted({*cosines}, reverse=True) and [*recalls] == sorted(recalls, reverse=True)
        assert cosines[-1] <= row["white_box_similarity"] + 1e-6
        assert f"| {name} | {recalls[0]:.2f} " in (folder / "table.md").read_text()
    monkeypatch.setattr(common, "pgd", no_attack)
    for radii in (["--radii", "8/255", "1/255"], []):
        again, _ = shell(*words, *radii)
        header = [line.split()[3:] for line in again.splitlines() if line.startswith("R@1, cosine at")]
        assert header == ([["clean", "1/255", "8/255"]] if radii else [])


def test_what_a_smaller_radius_or_the_tables_attack_finds_counts_at_larger_radii():
    args = evaluate.parse_args(["--eps", "4/255"])

    def scored(cosine, rank):
        return {"similarity": np.array([cosine]), "rank_i2t": np.array([rank])}

    found = {1 / 255: scored(0.5, 1), 2 / 255: scored(0.6, 0), 4 / 255: scored(0.7, 0)}
    per_image = {"clean": scored(0.9, 0), "white_box": scored(0.4, 0)}
    curve = evaluate.radius_curve(args, per_image, found)
    assert curve == [(0, 0.9, 1), (1, 0.5, 0), (2, 0.5, 0), (4, 0.4, 0)]


def test_a_row_is_measured_anew_with_other_transferred_images_as_those_of_another_seed_are(tmp_path):
    data = pictures(tmp_path / "mine", 4)
    words = ["--preset", "smoke", "--eval_data", data, "--cache_dir", tmp_path / "cache", "--steps", 1]
    table = ["evaluate.py", *words, "--attack_steps", 1, "--trainings", "--qualities"]
    table += ["--output_dir", tmp_path / "table"]
    for seed, measured in ((0, True), (1, True), (0, False)):
        folder = tmp_path / f"transferred_{seed}"
        shell("generate_pgd_adversarial.py", *words, "--split", "eval", "--seed", seed, "--output_dir", folder)
        printed, _ = shell(*table, "--adversarial_dir", folder)
        assert ("original: clean R@1" in printed) == measured
    lines = [jsonl(tmp_path / f"transferred_{seed}" / "metadata.jsonl") for seed in (0, 1)]
    assert not {line["sha256"] for line in lines[0]} & {line["sha256"] for line in lines[1]}
