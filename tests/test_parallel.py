"""The scripts under torchrun, two processes on the CPU, beside one process; --batch_size auto; --profile."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ROOT, shell
from matplotlib.figure import Figure
from torch.distributed.run import get_args_parser

import common

TRAIN, EVAL, BATCH = 21, 5, 2  # a last batch that is smaller, and fewer batches than two processes could share evenly
NO_DRAWING = "Figure.savefig = Figure.tight_layout = lambda *_, **__: None"  # which takes longer than the attacks
STAGES = ["adversarial_train", "adversarial_eval", "mat", "pgd", "online"]
SMALL = ["--preset", "tiny", "--steps", 2, "--sanity", "--sanity_images", 2, "--num_images", EVAL, "--qualities", 50]
SMALL += ["--batch_size", BATCH]
TRAINING = ["--num_train_images", TRAIN, "--val_images", 3, "--epochs", 1, "--online_images", TRAIN]
TRAINING += ["--online_steps", 1, "--attack", "pgd"]


def launch(folder, *commands, code=0):
    """Run commands under torchrun, one after the other in the same two processes; returns stdout, stderr of each."""
    driver, log = folder / "driver.py", folder / "log"
    lines = ["import json, sys", "from matplotlib.figure import Figure", f"sys.path.insert(0, {str(ROOT)!r})"]
    lines += [NO_DRAWING, "import common", "with common.join_group():"]
    driver.write_text(
        "\n".join([*lines, "    for words in json.loads(sys.argv[1]):", "        common.run_script(words)"])
    )
    words = json.dumps([[str(word) for word in command] for command in commands])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    torchrun += ["--log-dir", log, "--redirects", "3", driver, words]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, torchrun)), capture_output=True, text=True, env=env, timeout=300)
    said = [[next(log.rglob(f"{rank}/std{n}.log")).read_text() for n in ("out", "err")] for rank in (0, 1)]
    assert (done.returncode != 0) == (code != 0), done.stderr + str(said)
    return said


def read(folder, name="metrics.json"):
    return json.loads((folder / name).read_text())


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As under torchrun: the order of a sum depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A whole small report and eval_jpeg.py by two processes; (folder, what each process printed)."""
    folder = tmp_path_factory.mktemp("two")
    cache = ["--cache_dir", folder / "cache"]
    report = ["evaluate.py", "--reproduce", *SMALL, *TRAINING, "--train_batch_size", 4]
    jpeg = ["eval_jpeg.py", *SMALL[:4], *SMALL[7:], *cache, "--output_dir", folder / "jpeg"]
    said = launch(folder, [*report, *cache, "--output_dir", folder / "evaluation"], jpeg)
    return folder, said


@pytest.fixture(scope="module")
def failing(two, tmp_path_factory):
    """A run by two processes that meets a broken image; (folder, the future of what each process printed)."""
    folder = tmp_path_factory.mktemp("failing")
    args = common.parse_flags(common.make_parser(""), SMALL[:2], stage="x", images="eval", batch="attack")
    for _, path, _ in common.open_split(args, "eval")[2][:3]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("no image")
    words = ["--preset", "tiny", "--split", "eval", "--num_images", 3, "--image_root", folder]
    words += ["--output_dir", folder / "out", "--cache_dir", folder / "cache"]
    with ThreadPoolExecutor(1) as pool:  # beside the runs of one process
        yield folder, pool.submit(launch, folder, ["generate_pgd_adversarial.py", *words], code=2)


@pytest.fixture(scope="module")
def one(two, failing, tmp_path_factory):
    """The same stages by one process, the trainings with the double batch."""
    folder = tmp_path_factory.mktemp("one")
    commands = [line.split()[2:] for line in two[1][0][0].splitlines() if line.startswith("$ python")]
    commands = {words[-1].rpartition("/")[2]: words[:-1] for words in commands}
    for stage in STAGES:
        double = ["--batch_size", 8] if stage in STAGES[2:] else []
        shell(*commands[stage], folder / stage, *double)
    return folder


def test_two_processes_make_the_same_adversarial_images_in_the_same_order(one, two):
    for stage in STAGES[:2]:
        files = {path.relative_to(one / stage) for path in (one / stage).rglob("*.*")}
        assert files == {path.relative_to(two[0] / stage) for path in (two[0] / stage).rglob("*.*")}
        for file in files - {(one / stage / "metrics.json").relative_to(one / stage)}:
            assert (one / stage / file).read_bytes() == (two[0] / stage / file).read_bytes(), file
        records = read(one / stage), read(two[0] / stage)
        assert [record["processes"] for record in records] == [1, 2]
        for key in ("n", "clean_similarity", "adversarial_similarity", "attack", "share_lowered"):
            assert records[0][key] == records[1][key]


def test_two_processes_train_like_one_with_the_double_batch(one, two):
    before = common.open_clip.create_model(f"local-dir:{ROOT}/tests/tiny/clip").visual.state_dict()
    for stage in STAGES[2:]:
        logs = log_of(one / stage), log_of(two[0] / stage)
        assert [entry["step"] for entry in logs[1]] == [1, 2, 3]
        for ours, theirs in zip(*logs, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)  # AdamW hides a wrong scale
        records = read(one / stage), read(two[0] / stage)
        assert [record["global_batch_size"] for record in records] == [8, 8]
        for ours, theirs in zip(records[0]["epochs"], records[1]["epochs"], strict=True):
            assert ours["val_white_box"] == pytest.approx(theirs["val_white_box"], abs=2e-3)
        weights = [torch.load(folder / stage / "last.pt")["state_dict"] for folder in (one, two[0])]
        moved, apart = (
            sum((weights[0][f"visual.{key}"] - other(key)).square().sum() for key in before).sqrt()
            for other in (before.get, lambda key, trained=weights[1]: trained[f"visual.{key}"])
        )
        assert moved > 0.01 and apart < 0.03 * moved


def test_two_processes_print_the_same_table_and_per_image_figures(two, tmp_path, monkeypatch):
    for method in ("savefig", "tight_layout"):
        monkeypatch.setattr(Figure, method, lambda *_, **__: None)
    folder, said = two
    for stage in STAGES:
        shutil.copytree(folder / stage, tmp_path / stage)
    again = ["--cache_dir", folder / "cache", "--output_dir"]
    printed, _ = shell("evaluate.py", *SMALL, *TRAINING, "--train_batch_size", 4, *again, tmp_path / "evaluation")
    records = read(tmp_path / "evaluation"), read(folder / "evaluation")
    for key in ("rows", "per_image", "paired", "attacks", "health", "sanity", "coco_ids"):
        assert records[0][key] == records[1][key], key
    tables = [(place / "evaluation" / "table.md").read_text() for place in (tmp_path, folder)]
    assert tables[0] == tables[1]
    assert printed.split("cosine loss")[1].split("\n\nin ")[0] in said[0][0]
    shell("eval_jpeg.py", *SMALL[:4], *SMALL[7:], *again, tmp_path / "jpeg")
    records = read(tmp_path / "jpeg"), read(folder / "jpeg")
    for key in ("qualities", "attack"):
        assert records[0][key] == records[1][key], key


def test_only_rank_0_prints(two):
    (out, err), silent = two[1]
    assert "2 processes, 4 images each: a global batch of 8" in out and "Traceback" not in err
    assert silent == ["", ""]


def test_what_one_process_finds_wrong_ends_both_with_one_line(failing):
    folder, launched = failing
    (_, err), silent = launched.result()  # rank 1 waited for the decoder
    assert "broken image" in err and len(err.strip().splitlines()) == 1
    assert silent == ["", ""]
    assert not list(folder.rglob("metrics.json")) and not list((folder / "cache").glob(".*"))


def test_the_other_processes_let_rank_0_speak_first(monkeypatch, capsys):
    waits = []
    monkeypatch.setattr(common, "RANK", 1)
    monkeypatch.setattr(common.time, "sleep", lambda seconds: waits.append((seconds, capsys.readouterr().err)))
    with pytest.raises(SystemExit) as end:
        common.fail("the disk of this process is full")
    assert end.value.code == 2 and waits == [(10, "")] and "is full" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["generate_pgd_adversarial", "defend_clip_mat_v2", "defend_clip_pgd_v2", "evaluate"])
def test_torchrun_passes_every_flag_on(script, monkeypatch):
    """It fails on what could begin two names of its own flags, even after the script's name."""
    seen = []
    monkeypatch.setattr(common.Parser, "parse_args", lambda self, *_: seen.append(self) or sys.exit())
    with pytest.raises(SystemExit):
        importlib.import_module(script).parse_args([])
    for action in seen[0]._actions[1:]:
        value = [] if action.nargs == 0 else ["1"]
        given = get_args_parser().parse_args(["script.py", action.option_strings[0], *value])
        assert given.training_script_args == [action.option_strings[0], *value]


class Gpu(str):
    """The CPU, by the name of a GPU."""

    type = "cuda"


def test_batch_size_auto_halves_remembers_and_loses_nothing(monkeypatch):
    words = ["--preset", "tiny", "--steps", "2", "--batch_size", "auto"]
    args = common.parse_flags(common.make_parser(""), words, stage="x", images="eval", batch="attack")
    examples, clip = common.load_examples(args, "eval", 11), common.load_clip(args)
    loss_at = common.own_caption(clip.frozen(), clip.encode_text(examples.captions))
    pgd, sizes = common.pgd, []

    def small_memory(loss_fn, images, **options):
        sizes.append(len(images))
        if len(images) > 3:
            raise torch.OutOfMemoryError("planted")
        return pgd(loss_fn, images, **options)

    monkeypatch.setattr(common, "pick_device", lambda name: Gpu("cpu"))
    monkeypatch.setattr(common, "largest_batch", common.largest_batch)
    monkeypatch.setattr(common, "pgd", small_memory)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    pixels_adv, health = common.attack_all(loss_at, examples, args)
    assert sizes == [11, 5, 2, 2, 2, 2, 2, 1]
    again, _ = common.attack_all(loss_at, examples, args)
    assert sizes[8:] == [2, 2, 2, 2, 2, 1]
    args.batch_size = 2
    fixed, fixed_health = common.attack_all(loss_at, examples, args)
    assert torch.equal(pixels_adv, fixed) and torch.equal(again, fixed) and health == fixed_health
    args.batch_size = 4
    with pytest.raises(torch.OutOfMemoryError):  # a size that was asked for is kept
        common.attack_all(loss_at, examples, args)
    args.batch_size = "auto"
    monkeypatch.setattr(common, "pgd", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("planted")))
    with pytest.raises(torch.OutOfMemoryError):  # not even one image fits
        common.attack_all(loss_at, examples, args)


def test_profile_traces_the_second_batch_and_changes_no_result(one, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "blocks", 0)
    words = ["--preset", "tiny", "--split", "eval", "--num_images", EVAL, "--steps", 2]
    printed, _ = shell(
        "generate_pgd_adversarial.py", *words, "--batch_size", BATCH, "--profile", "--output_dir", tmp_path
    )
    summary = re.findall(r"^  (\w+) +([\d.]+)%$", printed, re.M)
    assert [kind for kind, _ in summary] == ["data", "attention", "products", "elementwise", "idle"]
    shares = {kind: float(share) for kind, share in summary}
    assert sum(shares.values()) == pytest.approx(100, abs=2) and shares["products"] > 5
    assert read(tmp_path, "trace.json")["traceEvents"]
    metadata = [(folder / "metadata.jsonl").read_text() for folder in (tmp_path, one / "adversarial_eval")]
    assert metadata[0] == metadata[1]
    monkeypatch.setattr(common, "blocks", 0)
    words += ["--batch_size", "auto", "--profile", "--output_dir", tmp_path, "--overwrite"]
    assert "no second batch to trace" in shell("generate_pgd_adversarial.py", *words)[0]
