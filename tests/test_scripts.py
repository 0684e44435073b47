"""Every script through the shell in small: what it writes, and that the tools that are said to open it do."""

import importlib
import io
import json
import os
import runpy
import shutil
import sys
import tarfile
import zipfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import cmarkgfm
import datasets
import numpy as np
import open_clip
import pytest
import torch
from conftest import EVAL, ROOT, SCRIPTS, TINY, TRAIN, VALIDATION, fork, join, jsonl, metrics, shell, snapshot
from PIL import Image

import common
import defend_clip_pgd_v2
import evaluate

TRAININGS = ["mat", "pgd", "online"]
ROWS = ["original", "MAT", "contrastive, offline", "features, online", "JPEG 50"]
ODD = r"a|b \| `c` *d* <i>e</i> _f_ [g](h) ~~i~~ &amp; $j$"  # a name that Markdown would read as much else
SMALL = ["--preset", "smoke", "--steps", 1]


def table_of(printed):
    """The lines of the table that evaluate.py printed, without the first, which names the model."""
    return printed[printed.index("transfer: PGD, ") :].split("\n\nin ")[0].strip().splitlines()


def args_of(folder):
    """The flags of a finished run, as a script has them."""
    return SimpleNamespace(**metrics(folder)["args"])


def test_reproduce_runs_the_stages_and_ends_with_the_table(report):
    folder, printed, _ = report
    stages = ["adversarial_eval: ", "mat\n", "pgd\n", "adversarial_train: ", "online\n", "evaluation: table.md"]
    places = [printed.index(f"{folder / stage}") for stage in stages]
    assert places == sorted(places)
    record = metrics(folder / "evaluation")
    assert list(record["rows"]) == ROWS and all(name in printed for name in ROWS)
    assert max(map(len, table_of(printed))) <= 80
    original = record["rows"]["original"]
    assert original["not_converged"] and f"<={original['white_box_similarity']:.3f}" in printed  # so few steps are
    assert (folder / "evaluation" / "table.md").read_text() == evaluate.markdown_table(record)


def test_online_training_starts_its_attack_from_noise_around_the_images(monkeypatch, tmp_path):
    def spy(loss_fn, images, attack, start):
        raise InterruptedError((start - images) / attack.eps)

    monkeypatch.setattr(defend_clip_pgd_v2, "pgd", spy)
    words = ["--preset", "smoke", "--num_images", "16", "--online_steps", "2", "--output_dir", str(tmp_path)]
    with pytest.raises(InterruptedError) as met:
        defend_clip_pgd_v2.main(defend_clip_pgd_v2.parse_args(words))
    (noise,) = met.value.args
    assert noise.abs().max() <= 1 + 1e-5
    assert noise.std() == pytest.approx(3**-0.5, abs=0.01) and noise.mean() == pytest.approx(0, abs=0.01)


def test_the_attack_breaks_the_model_and_the_table_adds_up(report):
    record = metrics(report[0] / "evaluation")
    rows, original = record["rows"], record["rows"]["original"]
    assert original["clean_similarity"] - 0.4 > original["transfer_similarity"] > original["white_box_similarity"]
    assert original["clean_recall_i2t@1"] > 0.85 and original["white_box_recall_i2t@1"] < 0.3
    made = metrics(report[0] / "adversarial_eval")
    assert original["transfer_similarity"] == pytest.approx(made["adversarial_similarity"], abs=1e-6)
    for name, row in rows.items():
        for kind, values in record["per_image"][name].items():
            mean = np.mean(values["similarity"])
            assert row[f"{kind}_similarity"] == pytest.approx(mean)
            assert row[f"{kind}_interval"][0] <= mean <= row[f"{kind}_interval"][1]
            assert row[f"{kind}_recall_i2t@1"] == np.mean([rank == 0 for rank in values["rank_i2t"]])
        assert row["white_box_drop"] == pytest.approx(1 - row["white_box_similarity"] / row["clean_similarity"])
        if name != "original":
            lost, lost_0 = (each["clean_similarity"] - each["transfer_similarity"] for each in (row, original))
            assert row["improvement"] == pytest.approx(1 - lost / lost_0)
        health = {"zero_gradient": 0, "nonfinite": 0, "vanishing_gradient": 0, "max_abs_delta_grey_levels": 8}
        assert record["health"][name] == health
    assert rows["JPEG 50"]["white_box_similarity"] < rows["JPEG 50"]["transfer_similarity"]


def test_a_finished_run_is_left_alone_and_shown_again(report):
    folder, printed, command = report
    before = snapshot(folder)
    again, _ = shell(command[0], *command[2:], "--num_workers", 3)  # without --reproduce, and what changes no figure
    assert "nothing to do" in again and table_of(again) == table_of(printed)
    training = ["--preset", "smoke", "--steps", args_of(folder / "mat").steps, "--output_dir", folder / "mat"]
    assert "nothing to do" in shell("defend_clip_mat_v2.py", *training)[0] and snapshot(folder) == before


def test_adversarial_images_are_an_imagefolder_in_the_ball_around_what_open_clip_makes_of_the_photographs(
    report, tmp_path
):
    folder = report[0] / "adversarial_eval"
    (loaded,) = datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(tmp_path)).values()
    entries, record = jsonl(folder / "metadata.jsonl"), metrics(folder)
    by_id = {row["coco_id"]: row for row in loaded}
    assert len(loaded) == len(entries) == EVAL == len(by_id)
    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{TINY / 'clip'}")
    tokenizer, normalise = open_clip.get_tokenizer(f"local-dir:{TINY / 'clip'}"), preprocess.transforms[-1]
    with zipfile.ZipFile(TINY / "MMEB-eval" / "images.zip") as archive, torch.no_grad():
        for entry in entries:
            row, name = by_id[entry["coco_id"]], f"MSCOCO_i2t/COCO_val2014_{entry['coco_id']:012d}.jpg"
            photograph = preprocess(Image.open(io.BytesIO(archive.read(name))))
            adversarial = torch.from_numpy(np.array(row["image"])).permute(2, 0, 1)
            clean = photograph * torch.tensor(normalise.std).view(3, 1, 1) + torch.tensor(normalise.mean).view(3, 1, 1)
            grey = (255 * clean).round()
            assert (255 * clean - grey).abs().max() < 1e-3  # to the bit of its pixels
            assert (adversarial - grey).abs().max() == entry["linf"] == 8
            text_features = clip.encode_text(tokenizer([row["caption"]]), normalize=True)
            for image, kind in ((photograph, "clean"), (normalise(adversarial / 255), "adversarial")):
                cosine = (clip.eval().encode_image(image[None], normalize=True) @ text_features.T).item()
                assert entry[f"{kind}_similarity"] == pytest.approx(cosine, abs=1e-4)
    mean = np.mean([entry["adversarial_similarity"] for entry in entries])
    assert record["adversarial_similarity"] == pytest.approx(mean) and record["share_lowered"] == 1.0


def test_training_on_attacked_images_helps_and_its_validation_figures_are_what_they_say(report):
    """A defence that never saw an attack, or a validation that does not attack, would pass all else."""
    folder = report[0]
    rows = metrics(folder / "evaluation")["rows"]
    # six steps on the bundled CLIP gain 0.067, too little for 0.1; on clean images they would gain 0.004
    assert rows["contrastive, offline"]["transfer_similarity"] > rows["original"]["transfer_similarity"] + 0.05
    assert rows["features, online"]["white_box_similarity"] > rows["original"]["white_box_similarity"] + 0.1
    for stage in TRAININGS:
        args, epochs = args_of(folder / stage), metrics(folder / stage)["epochs"]
        clip = common.load_clip(args, f"local-dir:{folder / stage}")
        assert all(epoch["val_white_box"] < epoch["val_clean"] - 0.1 for epoch in epochs)
        training, validation = common.load_training_images(args, clip.geometry)
        assert (len(training), len(validation)) == (TRAIN, VALIDATION)
        assert clip.trained_on == {*training.fingerprints(), *validation.fingerprints()}  # by which a leak is noticed
        text_features = clip.encode_text(validation.own_captions)
        loss, attack = partial(common.own_caption, text_features), common.white_box(args.eps, args.steps)
        found, _ = common.attack_all(attack, loss, validation.pixels, clip)
        for kind, pixels in {"clean": validation.pixels, "white_box": found}.items():
            similarity = clip.similarity(pixels, text_features).mean()
            assert similarity == pytest.approx(epochs[-1][f"val_{kind}"], abs=2e-3)


def test_training_logs_every_step(report):
    for stage in TRAININGS:
        record, log = metrics(report[0] / stage), jsonl(report[0] / stage / "log.jsonl")
        assert [entry["step"] for entry in log] == list(range(1, record["steps"] + 1)) and record["steps"] == 6
        other = "aug_loss" if stage == "mat" else "adv_loss"
        assert all(entry["loss"] == pytest.approx((entry["clean_loss"] + entry[other]) / 2) for entry in log)
        falls = record["args"]["lr"] * (1 - np.arange(6) / 6)
        assert [entry["lr"] for entry in log] == pytest.approx(falls)


def test_rates_are_chosen_by_their_cost_and_then_by_the_white_box_figures(tmp_path, monkeypatch):
    script = runpy.run_path(str(TINY / "choose_rates.py"))
    found = {1: (0.94, 0.1, 0.9), 2: (0.92, 0.3, 0.4), 3: (0.92, 0.3, 0.5), 4: (0.90, 0.5, 0.9)}
    found = {rate: dict(zip(["clean R@1", "white-box R@1", "white-box cosine"], row)) for rate, row in found.items()}
    assert [script["choose"](clean, found) for clean in (1.0, 0.97, 0.95)] == [1, 3, 4]
    smaller = {"train_images": 16, "val_images": 1, "steps": 1, "attack_steps": 4, "epochs": 1}
    monkeypatch.setitem(common.PRESETS, "smoke", common.PRESETS["smoke"] | smaller)
    words = ["--preset", "smoke", "--trainings", "mat", "--rates", 1e-9, "--num_images", 4, "--output_dir", tmp_path]
    script["main"](script["parse_args"]([*map(str, words), "--json", str(tmp_path / "rates.json")]))
    record = json.loads((tmp_path / "rates.json").read_text())
    row = record["trainings"]["mat"]["mean"]
    assert row == pytest.approx(record["original"], abs=1e-3) and row["white-box cosine"] < 0.5  # hardly trained


def test_trainings_open_in_open_clip_alone_and_only_the_visual_tower_moved(report):
    before = open_clip.create_model(f"local-dir:{TINY / 'clip'}").state_dict()
    for stage in TRAININGS:
        model = open_clip.create_model_and_transforms(f"local-dir:{report[0] / stage}")[0]
        moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
        assert moved and all(key.startswith("visual.") for key in moved)


def test_clip_benchmark_finds_the_recalls_of_the_table(report, tmp_path, monkeypatch):
    """LAION's, on the attacked images, which are each other's gallery there."""
    (tmp_path / "test").mkdir()
    (tmp_path / "dataset_type.txt").write_text("retrieval")
    (tmp_path / "test" / "nshards.txt").write_text("1")
    folder = report[0] / "adversarial_eval"
    with tarfile.open(tmp_path / "test" / "0.tar", "w") as tar:
        for entry in jsonl(folder / "metadata.jsonl"):
            image, caption = (folder / entry["file_name"]).read_bytes(), entry["caption"].encode()
            for suffix, data in (("png", image), ("txt", caption)):
                member = tarfile.TarInfo(f"{Path(entry['file_name']).stem}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    command = ["clip_benchmark", "eval", "--dataset", "wds/scenes", "--dataset_root", tmp_path]
    command += ["--model", f"local-dir:{report[0] / 'pgd'}", "--pretrained", "none"]
    command += ["--task", "zeroshot_retrieval", "--recall_k", 1, 3]
    command += ["--no_amp", "--num_workers", 0, "--output", tmp_path / "result.json"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    importlib.import_module("clip_benchmark.cli").main()
    recalls = json.loads((tmp_path / "result.json").read_text())["metrics"]
    args = args_of(report[0] / "evaluation")
    spec = evaluate.Spec("x", f"local-dir:{report[0] / 'pgd'}")
    row = evaluate.load_row(args, "x", spec, evaluate.load_evaluation(args))
    scored = evaluate.score(row, row.transfer, 0)
    ours = metrics(report[0] / "evaluation")["per_image"]["contrastive, offline"]["transfer"]
    assert scored["rank_i2t"].tolist() == ours["rank_i2t"]
    assert 0 < (scored["rank_i2t"] < 1).mean() < 1
    for theirs, direction in {"text_retrieval_recall": "i2t", "image_retrieval_recall": "t2i"}.items():
        for k in (1, 3):
            expected = (scored[f"rank_{direction}"] < k).mean()
            assert recalls[f"{theirs}@{k}"] == pytest.approx(expected, abs=1e-6)


def test_metrics_say_how_a_run_was_made_and_hold_the_figures_of_each_image(report):
    for stage in ["adversarial_train", "adversarial_eval", *TRAININGS, "evaluation"]:
        text = (report[0] / stage / "metrics.json").read_text()
        record = json.loads(text, parse_constant=pytest.fail)  # NaN is not JSON
        assert record.keys() >= {"args", "script", "identity", "code", "commit", "versions", "device", "started"}
        assert record["n"] == (EVAL if stage in ("adversarial_eval", "evaluation") else TRAIN) and record["seconds"] > 0
        assert record["argv"][1:] == [str(word) for word in report[2][1:]]  # as typed, for all
    assert len(record["coco_ids"]) == EVAL
    assert record["rows"].keys() == record["per_image"].keys() == record["health"].keys()
    for conditions in record["per_image"].values():
        assert {len(values) for scored in conditions.values() for values in scored.values()} == {EVAL}


def test_the_table_is_github_flavoured_markdown_whatever_the_names_with_the_reports_figures_beside_ours(report):
    text = (report[0] / "evaluation" / "metrics.json").read_text().replace('"MAT"', json.dumps(ODD))
    record = json.loads(text)
    assert not evaluate.report_of(record)
    record["args"] |= {key: vars(evaluate.parse_args([]))[key] for key in ("model", "pretrained", "eval_data", "steps")}
    for other in ({"eps": 4 / 255}, {"alpha": 1 / 255}, {"steps": 9}, {"pretrained": "laion"}):
        assert not evaluate.report_of({"args": record["args"] | other})
    for row in record["rows"]:
        result = "FAIL" if row == ODD else "NOT CONVERGED"
        record["sanity"][row] = {"checks": [["it holds", result, "1 | 2"], ["it holds", "PASS", "3"]]}
    record["paired"][0] |= {"rows": ["original", ODD], "separated": False}
    html = cmarkgfm.github_flavored_markdown_to_html(evaluate.markdown_table(record))
    page = ElementTree.fromstring(f"<div>{html}</div>")
    assert [child.tag for child in page] == ["p", "table", *["p"] * 5, "table", "p", "p", "ul"]
    table, more = (
        [["".join(cell.itertext()) for cell in row] for row in each.iter("tr")] for each in page.iter("table")
    )
    header, *cells = table
    assert len(header) == 12 and len(more[0]) == 6
    for lines in (cells, more[1:]):
        assert [name.removesuffix(" (!)").split(" (the")[0] for name, *_ in lines] == list(record["rows"])
    for row, (name, figures) in zip(cells, record["rows"].items()):
        assert len(row) == len(header) and row[0].endswith("(!)") == (name == ODD)
        assert row[8] == evaluate.duration(figures["training_seconds"])
        cosine, recall = figures["white_box_similarity"], figures["white_box_recall_i2t@1"]
        assert row[5].startswith(f"{'<= ' * figures['not_converged']}{cosine:.3f} [")
        assert row[6].startswith(f"{'<= ' * figures['recall_not_converged']}{recall:.0%} [")
    assert cells[0][9:] == ["0.2513", "-0.1783", "-"]
    notes = ["".join(part.itertext()) for part in page[2:7]]
    assert f"original ~ {ODD}" in notes[0] and "original 0." in notes[1] and "features, online 0 of" in notes[2]
    assert "one seed" in notes[3] and notes[4].startswith("(!): ")  # what marks a row is explained
    items = [" ".join("".join(item.itertext()).split()) for item in page.find("ul")]
    assert len(items) == 2 * len(cells) and f"FAIL {ODD}: it holds: 1 | 2" in items


def test_the_reports_training_command_makes_the_images_it_lacks_and_stops_where_it_is_told_to(tmp_path):
    command = ["defend_clip_pgd_v2.py", "--batch_size", 16, "--lr", 1e-5, "--epochs", 3, *SMALL]
    command += ["--num_images", 16, "--val_images", 1, "--loss_threshold"]
    for reason, steps, last_step, words in (
        ("max_steps", 1, 1, [0.1, "--max_steps", 1]),
        ("loss_threshold", 2, 3, [90, "--loss_window", 2]),  # the rate would end at 0 after step 3
    ):
        printed, _ = shell(*command, *words, "--output_dir", tmp_path / reason)
        made = f"{tmp_path / 'adversarial_train'}: 16 images" in printed
        assert made == (reason == "max_steps")  # the second has the images of the first
        record = metrics(tmp_path / reason)
        assert (record["stopped_by"], record["steps"]) == (reason, steps)
        rates = [entry["lr"] for entry in jsonl(tmp_path / reason / "log.jsonl")]
        assert rates == pytest.approx(1e-5 * (1 - np.arange(steps) / last_step))


def test_a_model_remembers_what_the_weights_that_it_started_from_were_trained_on(report, tmp_path):
    before = f"local-dir:{report[0] / 'mat'}"
    words = [*SMALL, "--model", before, "--num_images", 4, "--val_images", 1, "--max_steps", 1, "--batch_size", 4]
    shell("defend_clip_mat_v2.py", *words, "--output_dir", tmp_path / "mat")
    args = args_of(report[0] / "mat")
    before, after = (common.load_clip(args, name).trained_on for name in (before, f"local-dir:{tmp_path / 'mat'}"))
    assert before == after and len(after) == 2 * (TRAIN + VALIDATION)  # ids and pixels


def test_another_seed_attacks_from_other_noise(tmp_path):
    made = set()
    for seed in (0, 1):
        words = ["--split", "eval", "--num_images", 2, "--seed", seed, "--output_dir", tmp_path / str(seed)]
        shell("generate_pgd_adversarial.py", *SMALL, *words)
        made |= {entry["sha256"] for entry in jsonl(tmp_path / str(seed) / "metadata.jsonl")}
    assert len(made) == 4


def test_eval_jpeg_gives_the_three_conditions_as_the_table_does(report, tmp_path):
    args = args_of(report[0] / "evaluation")
    words = ["--preset", "smoke", "--num_images", EVAL, "--attack_steps", args.attack_steps, "--qualities", 50]
    words += ["--adversarial_dir", report[0] / "adversarial_eval"]
    shell("eval_jpeg.py", *words, "--output_dir", tmp_path / "jpeg")
    found = metrics(tmp_path / "jpeg")["qualities"]["50"]["per_image"]
    row = metrics(report[0] / "evaluation")["per_image"]["JPEG 50"]
    for kind in ("clean", "transfer"):
        assert found[kind] == pytest.approx(row[kind]["similarity"], abs=1e-6)
    assert np.less_equal(row["white_box"]["similarity"], np.add(found["adaptive"], 1e-5)).all()  # the worst of several
    assert np.less(found["adaptive"], found["transfer"]).all()


@contextmanager
def another_checkout(folder):
    """Let this process, a forked one, run the scripts of another folder in what a notebook and torchrun leave."""
    for name in [*sys.modules]:
        if name in (*SCRIPTS, "common") or name.startswith("matplotlib"):
            del sys.modules[name]
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    os.environ |= {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "RANK": "3", "WORLD_SIZE": "8"}
    yield


def test_a_copy_of_the_checkout_elsewhere_makes_nothing_again(report, tmp_path):
    for script in ROOT.glob("*.py"):
        shutil.copy(script, tmp_path)
    shutil.copytree(TINY, tmp_path / "tests" / "tiny")
    folder, printed, command = report
    shutil.copytree(folder / "evaluation", tmp_path / "evaluation")
    for stage in ("adversarial_eval", *TRAININGS):
        (tmp_path / stage).symlink_to(folder / stage)
    words = [tmp_path / command[0], *command[2:], "--output_dir", "evaluation"]
    child = fork(tmp_path / "log", words, prepare=partial(another_checkout, tmp_path), figures=True)
    code, out, lines = join(child, tmp_path / "log")
    assert (code, lines) == (0, []), out
    assert "nothing to do" in out and table_of(out) == table_of(printed)


def test_a_planted_fault_that_hangs_the_tests_is_noticed_by_the_time_limit(tmp_path):
    (tmp_path / "test_hanging.py").write_text("import time\n\ndef test_it():\n    time.sleep(600)\n")
    first_failure = runpy.run_path(str(ROOT / "tests" / "bench" / "faults.py"))["first_failure"]
    first_failure.__globals__["TIME_LIMIT"] = 0.5
    assert first_failure(tmp_path, ["-p", "no:xdist"]).startswith("the time limit")
