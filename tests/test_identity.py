"""What makes two runs the same, whose a folder is, what is kept, completed or refused: images, trainings, rows."""

import fcntl
import json
import os
import re
import shutil
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import TINY, assert_equal, jsonl, lines_of, metrics, other_weights, pictures, shell, snapshot
from safetensors.torch import load_file, save_file

import common
import defend_clip_mat_v2 as mat
import defend_clip_pgd_v2 as pgd

GENERATE, MAT, PGD = "generate_pgd_adversarial.py", "defend_clip_mat_v2.py", "defend_clip_pgd_v2.py"
SMALL = ["--preset", "smoke", "--steps", 1, "--train_data", "train", "--eval_data", "eval"]
TRAINING = [*SMALL, "--num_images", 4, "--val_images", 2, "--batch_size", 4, "--max_steps", 1]
OTHER_CODE = [("bbb", None), (None, "python 3.12, torch 9")]  # commit, versions
OFFLINE = "contrastive, offline"
OTHER_WEIGHTS = ["--model", f"local-dir:{TINY / 'clip'}", "--pretrained"]  # and their file


def refused(*words):
    """The one line with which a command ends that has changed nothing in its --output_dir."""
    folder = Path(words[words.index("--output_dir") + 1])
    before = snapshot(folder)
    (line,) = lines_of(shell(*words, code=2)[1])
    assert snapshot(folder) == before
    return line


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory):
    """The current folder, with two data sets."""
    folder = tmp_path_factory.mktemp("data")
    for seed, name in enumerate(("train", "eval")):
        pictures(folder / name, 18, seed)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        yield folder


def generated(folder, count, *words):
    """What the generation of so many images for the table prints."""
    return shell(GENERATE, *SMALL, "--split", "eval", "--num_images", count, *words, "--output_dir", folder)[0]


class Attacks(list):
    """The images and steps of each call of pgd(); call number .stop, counted from 1, is met by Ctrl-C."""

    stop = None

    def __init__(self):
        self.pgd = common.pgd

    def __call__(self, loss_fn, images, attack, *rest):
        self.append((len(images), attack.steps))
        if len(self) == self.stop:
            raise KeyboardInterrupt
        return self.pgd(loss_fn, images, attack, *rest)


@pytest.fixture
def attacked(monkeypatch):
    attacks = Attacks()
    monkeypatch.setattr(common, "pgd", attacks)
    return attacks


def other_code(monkeypatch, commit, versions):
    """Let all scripts be of another commit, or other packages."""
    if commit:
        monkeypatch.setattr(common, "source_digest", lambda script: f"{Path(script).stem} of {commit}")
        monkeypatch.setattr(common, "git_commit", lambda: commit)
    if versions:
        monkeypatch.setattr(common, "versions", lambda: versions)


# Flags, data and scripts


@pytest.fixture(scope="module")
def made(data):
    """A folder with adversarial images, a finished training, and an unfinished one."""
    folder = data / "made"
    shell(GENERATE, *SMALL, "--num_images", 4, "--output_dir", folder / "adversarial_train")
    shell(PGD, *TRAINING, "--output_dir", folder / "pgd")
    with patch.object(torch.nn.utils, "clip_grad_norm_", side_effect=KeyboardInterrupt):
        shell(MAT, *TRAINING, "--lr", 0.2, "--output_dir", folder / "mat", code=130)
    return folder


def test_another_run_is_refused_in_a_line_that_names_what_differs(made, tmp_path):
    weights = [*OTHER_WEIGHTS, other_weights(tmp_path / "x.safetensors")]
    images = [GENERATE, *SMALL, "--num_images", 4, "--output_dir", made / "adversarial_train"]
    training = [MAT, *TRAINING, "--lr", 0.2, "--output_dir", made / "mat"]
    complete = [PGD, *TRAINING, "--output_dir", made / "pgd"]
    shell(GENERATE, *SMALL, "--num_images", 4, "--seed", 1, "--output_dir", tmp_path / "seed1")
    for command, words, said in (
        (images, ["--seed", 1], "--seed 0, not 1"),
        (images, ["--eps", "4/255", "--alpha", "1/255"], "--eps 8/255, not 4/255; --alpha 2/255, not 1/255"),
        (images, ["--steps", 2], "--steps 1, not 2"),
        (images, ["--split", "eval"], "--split train, not eval"),
        (images, ["--precision", "bf16"], "precision fp32, not bf16"),
        (images, weights, "another model"),
        (training, ["--lr", 0.1], "--lr 0.2, not 0.1"),
        (training, ["--batch_size", 2], "--batch_size 4, not 2"),
        (training, weights, "another model"),
        (training, ["--num_images", 5, "--val_images", 1], "another training images; another validation images"),
        (complete, ["--loss", "features", "--lr", 1e-4], "--loss contrastive, not features"),
        (complete, ["--online_steps", 1, "--loss", "contrastive"], "--online_steps 0, not 1"),
        (complete, ["--adversarial_dir", tmp_path / "seed1"], "another adversarial images"),
        ([PGD, *training[1:]], [], f"script {MAT}, not {PGD}"),
    ):
        line = refused(*command, *words)
        assert f"it holds another run ({said}" in line, line
        assert line.endswith("remove that folder, or choose another --output_dir")


def test_other_captions_and_other_pixels_are_another_training(made, tmp_path):
    copy = shutil.copytree("train", tmp_path / "train")
    words = [MAT, *TRAINING, "--train_data", copy, "--lr", 0.2, "--output_dir", made / "mat"]
    listed = copy / "metadata.jsonl"
    text = listed.read_text()
    listed.write_text(text.replace("Thing 0 ", "Another thing "))
    assert "(another training images)" in refused(*words)
    listed.write_text(text)
    shutil.copy(copy / "17.png", copy / "5.png")
    assert "(another validation images)" in refused(*words)


def test_what_moves_no_result_is_the_same_run(made):
    before = snapshot(made)
    free = ["--device", "cpu", "--cache_dir", "elsewhere", "--num_workers", 1, "--train_data", "./made/../train"]
    free += ["--model", f"local-dir:{TINY}/../tiny/clip"]
    words = [*free, "--num_images", 3, "--batch_size", 3, "--eval_data", "nowhere"]
    assert "nothing to do" in shell(GENERATE, *SMALL, *words, "--output_dir", "./made/adversarial_train")[0]
    words = [*free, "--save_every", 1, "--grad_checkpointing", "--output_dir", "made/pgd"]
    assert "nothing to do" in shell(PGD, *TRAINING, *words)[0]
    assert snapshot(made) == before


def test_a_training_uses_finished_images_although_another_run_holds_them_and_counts_the_time_of_its_own(made, tmp_path):
    folder = shutil.copytree(made / "adversarial_train", tmp_path / "adversarial_train")
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"seconds": 1000}))  # of four images
    before, other = snapshot(folder), os.open(folder, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    shell(PGD, *TRAINING, "--num_images", 2, "--batch_size", 2, "--output_dir", tmp_path / "pgd")
    os.close(other)
    assert 500 < metrics(tmp_path / "pgd")["training_seconds"] < 700 and snapshot(folder) == before


# Code and versions


def test_an_edit_of_any_module_that_a_script_imports_changes_its_digest(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "ROOT", tmp_path)
    texts = {"common.py": "import json\n", "make.py": "import common, os\n", "pgd.py": "from make import a\n"}
    texts |= {"late.py": "", "evaluate.py": "import make as m\n\ndef main():\n    import late\n"}

    def digests():
        common.source_digest.cache_clear()
        return {script: common.source_digest(tmp_path / script) for script in ("pgd.py", "evaluate.py")}

    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    for edited, expected in (
        ("common.py", ["pgd.py", "evaluate.py"]), ("make.py", ["pgd.py", "evaluate.py"]),
        ("pgd.py", ["pgd.py"]), ("late.py", ["evaluate.py"]),
    ):  # fmt: skip
        before = digests()
        (tmp_path / edited).write_text(texts[edited] + "# edited\n")
        after = digests()
        assert [script for script in before if before[script] != after[script]] == expected


def test_versions_leave_out_what_changes_no_figure(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "1.0+cu128")
    assert re.search(r"^python 3\.\d+, torch 1\.0, torchvision [\d.]+, open_clip ", common.versions())


@pytest.mark.parametrize("commit, versions", OTHER_CODE)
def test_of_other_code_or_versions_what_is_unfinished_is_refused_and_what_is_finished_is_used(
    commit, versions, made, monkeypatch
):
    record = json.loads((made / "mat" / "run.json").read_text())
    was = f"commit {record['commit']} with {record['versions']}"
    other_code(monkeypatch, commit, versions)
    now = f"commit {common.git_commit()} with {common.versions()}"
    line = refused(MAT, *TRAINING, "--lr", 0.2, "--output_dir", made / "mat")
    assert f"{was} began it, not {now}" in line
    images = [GENERATE, *SMALL, "--output_dir", made / "adversarial_train", "--num_images"]
    assert f"{was} began it, not {now}" in refused(*images, 5)
    who = was if versions else f"commit {record['commit']}"
    for printed, _ in (shell(*images, 4), shell(PGD, *TRAINING, "--output_dir", made / "pgd")):
        assert "nothing to do" in printed and printed.endswith(f"was made by {who}\n")


# A folder of adversarial images


def test_more_images_complete_a_folder_and_fewer_leave_it(tmp_path, attacked):
    generated(tmp_path / "whole", 5)
    generated(tmp_path / "adversarial_eval", 2)
    attacked.clear()
    generated(tmp_path / "adversarial_eval", 5)
    assert attacked == [(3, 1)]
    assert_equal(tmp_path / "adversarial_eval", tmp_path / "whole")
    before = snapshot(tmp_path)
    assert "nothing to do" in generated(tmp_path / "adversarial_eval", 1) and snapshot(tmp_path) == before
    attacked.clear()
    words = [*SMALL, "--attack_steps", 1, "--num_images", 6, "--qualities", 50, "--output_dir", tmp_path / "jpeg"]
    shell("eval_jpeg.py", *words)
    assert attacked == [(1, 1), (6, 1)]  # another script completes it, too


def test_a_removed_png_is_made_again_and_an_altered_or_another_image_is_an_error_that_names_it(tmp_path, attacked):
    out, other = tmp_path / "out", shutil.copytree("eval", tmp_path / "other")
    listed = other / "metadata.jsonl"
    listed.write_text(listed.read_text().replace("Thing 2 ", "Another thing "))
    generated(out, 4)
    files, lines = sorted((out / "images").iterdir()), jsonl(out / "metadata.jsonl")
    files[1].unlink()
    attacked.clear()
    generated(out, 2, "--eval_data", other)  # its first two pictures are the same
    again = jsonl(out / "metadata.jsonl")
    assert attacked == [(1, 1)] and [line["sha256"] for line in again] == [line["sha256"] for line in lines]
    assert [again[i] for i in (0, 2, 3)] == [lines[i] for i in (0, 2, 3)]
    files[1].unlink()
    shutil.copy(files[0], files[3])
    for words, said in (
        (["--eval_data", other], "it holds images of another data set, such as images/000002.png"),
        ([], f"images/{files[3].name} was altered"),
    ):
        assert said in refused(GENERATE, *SMALL, "--split", "eval", *words, "--num_images", 4, "--output_dir", out)
    assert len(attacked) == 1 and not files[1].exists()


# Whose folder


def test_a_folder_with_a_name_that_the_script_writes_and_no_run_of_ours_is_refused(tmp_path):
    for script, names in {
        GENERATE: ["metadata.jsonl", "metadata.csv", "images", "metrics.json"],
        MAT: ["log.jsonl"],
        PGD: ["open_clip_config.json"],
        "eval_jpeg.py": ["metrics.json"],
        "evaluate.py": ["rows", "table.md"],
    }.items():
        words = [script, "--preset", "smoke", "--output_dir", tmp_path]
        for name in names:
            (tmp_path / name).write_text('{"argv": []}')  # as an old version, or a stranger, left it
            assert f"it holds {name} and no run.json of these scripts: choose another" in refused(*words)
            (tmp_path / name).unlink()
        (tmp_path / "run.json").write_text('{"argv": []}')
        assert "run.json is damaged or a stranger's" in refused(*words)
        (tmp_path / "run.json").unlink()


def test_other_files_in_an_output_folder_are_left_alone(tmp_path):
    below = "mat/.log.jsonl.host.7.tmp"  # of another run, which is at it
    names = "tee.log", ".metrics.json", "images.txt", "notes/metrics.json", below
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    generated(tmp_path, 1)
    generated(tmp_path, 2)
    assert all((tmp_path / name).read_text() == "mine" for name in names)


# Rows of a table


def trained(folder, script=mat, **flags):
    """Leave what a training leaves, MAT if not told otherwise: the tiny CLIP, its weights changed a little."""
    args = script.parse_args([*map(str, SMALL), "--output_dir", str(folder)])
    vars(args).update(flags)
    run, clip = script.open_run(args), common.load_clip(args)
    run.identify(model=clip.digest, precision=clip.precision)
    run.begin()
    for place, weights in enumerate(clip.model.visual.parameters()):
        weights.data *= 1 + 0.01 * np.random.default_rng([args.seed, place]).random()
    common.save_model(run.dir, clip, set())
    run.finish(clip.device, training_seconds=1.0)


def measure(folder, *words, code=0):
    """Make a table of 4 images and one step beside what a folder holds: what is printed, and the rows attacked."""
    command = ["evaluate.py", *SMALL, "--attack_steps", 1, "--num_images", 4, "--qualities", "--trainings", "mat"]
    printed, _ = shell(*command, *words, "--output_dir", folder / "evaluation", code=code)
    return printed, re.findall(r"^([^(\n]+): clean R@1 \d", printed, re.MULTILINE)


@pytest.fixture(scope="module")
def whole_table(tmp_path_factory):
    """The original's row, which is completed by MAT's once there is such a training."""
    folder = tmp_path_factory.mktemp("table")
    printed, rows = measure(folder)
    assert rows == ["original"] and "left out of the row MAT" in printed
    trained(folder / "mat")
    assert measure(folder)[1] == ["MAT"]
    return folder


@pytest.fixture
def table(whole_table, tmp_path):
    return shutil.copytree(whole_table, tmp_path / "table")


def test_a_further_row_alone_is_attacked_and_none_is_lost(table):
    out, before = table / "evaluation", metrics(table / "evaluation")
    (out / "white_box" / "mine").mkdir()
    first, second = (other_weights(table / f"{scale}.safetensors", scale) for scale in (1.01, 1.02))
    words = ["--checkpoint", f"a b={first}", "--checkpoint", f"a_b={second}"]
    assert measure(table, *words)[1] == ["a b", "a_b"]
    after = metrics(out)
    assert list(after["rows"]) == ["original", "MAT", "a b", "a_b"]
    for kind in ("rows", "per_image"):
        assert {name: after[kind][name] for name in before[kind]} == before[kind]
    saved = [jsonl(file)[:4] for file in out.glob("white_box/*/metadata.jsonl")]
    saved = [[entry["similarity"] for entry in entries] for entries in saved]
    for figures in after["per_image"].values():  # those behind the figures, whatever the row's name
        assert pytest.approx(figures["white_box"]["similarity"]) in saved
    assert not any(row["note"] for row in after["rows"].values())
    assert measure(table)[1] == [] and list(metrics(out)["rows"]) == list(before["rows"])
    other_weights(first, 1.03)
    assert measure(table, *words[:2])[1] == ["a b"]
    assert (out / "white_box" / "mine").is_dir()


@pytest.mark.parametrize("commit, versions", OTHER_CODE)
def test_rows_trainings_and_images_of_other_code_or_versions_are_used_with_a_note(commit, versions, table, monkeypatch):
    before = metrics(table / "evaluation")
    made = f"by commit {before['commit']}" + (f" with {before['versions']}" if versions else "")
    other_code(monkeypatch, commit, versions)
    printed, measured = measure(table)
    after = metrics(table / "evaluation")
    assert measured == [] and after["per_image"] == before["per_image"]
    assert re.search(r"\nMAT .*\(\*\) ", printed) and r"(\*)" in (table / "evaluation" / "table.md").read_text()
    assert after["rows"]["original"]["note"] == f"measured {made}"
    assert after["rows"]["MAT"]["note"] == f"{table}/mat was made {made}; measured {made}"
    printed = " ".join(printed.split())
    assert f"transfer: {table}/adversarial_eval was made {made}" in printed and "(*) MAT: " in printed


def test_of_an_unfinished_row_the_parts_of_other_code_do_not_count(table, attacked):
    shutil.rmtree(table / "evaluation" / "rows")
    attacked.stop, calls = 3, []
    for commit, versions in ((None, None), *OTHER_CODE, (None, None)):
        with pytest.MonkeyPatch.context() as monkeypatch:
            other_code(monkeypatch, commit, versions)
            measure(table, "--trainings", "--batch_size", 2, code=130)
        calls.append([*attacked])
        attacked.clear()
    assert calls[0] == calls[1] == calls[2] != calls[3]


def test_reproduce_trains_each_seed_on_the_images_of_the_first_and_averages_the_seeds(tmp_path, monkeypatch):
    """A training is stood in for by its flags and what it leaves."""
    seen = []

    def train(args):
        seen.append(args)
        if not Path(args.output_dir).exists():
            trained(args.output_dir, pgd, **vars(args))

    monkeypatch.setattr(pgd, "main", train)
    words, names = ["--reproduce", "--trainings", "pgd", "--seeds", 2], [OFFLINE, f"{OFFLINE}, seed 1"]
    printed, measured = measure(tmp_path, *words)
    assert measured == ["original", *names] and "lowest of 2 seeds" in printed
    assert [Path(args.output_dir).name for args in seen] == ["pgd", "pgd_seed1"]
    given = [(args.seed, args.adversarial_dir) for args in seen]
    assert given == [(0, None), (1, str(tmp_path / "adversarial_train"))]
    record = metrics(tmp_path / "evaluation")
    means = [np.mean(record["per_image"][name]["white_box"]["similarity"]) for name in names]
    row = record["rows"][OFFLINE]
    assert [row["per_seed"][name]["white_box_similarity"] for name in names] == pytest.approx(means)
    assert means[0] != means[1] and row["white_box_similarity"] == pytest.approx(np.mean(means))
    assert "nothing to do" in measure(tmp_path, *words)[0]


@pytest.mark.parametrize("name, scale", [("text_projection", 1e38), ("visual.ln_post.weight", 1e38)])
@pytest.mark.parametrize("command", [[GENERATE, *SMALL, "--num_images", 2], [MAT, *TRAINING]])
def test_weights_without_finite_features_leave_a_folder_to_the_right_ones(command, name, scale, tmp_path):
    state = load_file(TINY / "clip" / "open_clip_model.safetensors")
    save_file(state | {name: state[name].float() * scale}, tmp_path / "damaged.safetensors")
    words = [*command, "--output_dir", tmp_path / "out"]
    assert "the weights are damaged" in refused(*words, *OTHER_WEIGHTS, tmp_path / "damaged.safetensors")
    shell(*words)
    assert metrics(tmp_path / "out")["n"] in (2, 4)


def test_adversarial_images_that_do_not_fit_are_one_line_whose_remedy_works(tmp_path):
    generated(tmp_path / "images", 2)
    jpeg = ["eval_jpeg.py", *SMALL, "--attack_steps", 1, "--qualities", 50, "--output_dir", tmp_path / "out" / "jpeg"]
    for words, said in (
        (["--num_images", 3], "it has 2 of the 3 images"),
        (["--num_images", 2, "--eps", "4/255"], "it has --eps 8/255, not 4/255"),
        (["--num_images", 2, *OTHER_WEIGHTS, other_weights(tmp_path / "x.safetensors")], "it has another model"),
        (["--num_images", 2, "--eval_data", "train"], "another data set, such as images/000000.png"),
    ):
        line = refused(*jpeg, *words, "--adversarial_dir", tmp_path / "images")
        assert line.endswith(f"{said}: leave the flag out to have the images made")
    shell(*jpeg, *words)
    assert metrics(tmp_path / "out" / "jpeg")["n"] == 2
    generated(tmp_path / "seed1", 2, "--seed", 1, "--eval_data", "train")
    assert "(another transferred images)" in refused(*jpeg, *words, "--adversarial_dir", tmp_path / "seed1")
