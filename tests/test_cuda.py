"""The scripts on a GPU, where there is one: in processes of their own, since the other tests do not see it."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import GPU, REPORT, ROOT, TINY, jsonl, metrics
from safetensors.torch import load_file

FOUND = shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True).stdout.strip()
pytestmark = pytest.mark.skipif(not FOUND, reason="there is no GPU")
DEVICE, ENV = "cuda", {"CUDA_VISIBLE_DEVICES": GPU}
SMALL = ["--preset", "smoke", "--device", DEVICE]
SETUP = f"""
import json, sys
from functools import partial
import torch
import common, evaluate
from eval_jpeg import differentiable_jpeg
args = evaluate.parse_args(["--preset", "tiny", "--num_images", "16", "--device", {DEVICE!r}])
clip = common.load_clip(args)
images = common.load_images(args, "eval", clip.geometry)
pixels, text_features = images.pixels, clip.encode_text(images.own_captions)
attack, loss = common.white_box(args.eps, 75), partial(common.own_caption, text_features)
"""


def run_python(folder, code, *words, code_of_exit=0):
    """Run code with arguments in a process that sees the GPU: its stdout, or its stderr where it is to fail."""
    command = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(command, env=os.environ | ENV, cwd=folder, capture_output=True, text=True)
    assert done.returncode == code_of_exit, done.stderr
    return done.stderr if code_of_exit else done.stdout


def run_script(folder, *words, before="", code_of_exit=0):
    """Run a script, after some code, as run_python() does."""
    code = f"import runpy, sys\n{before}\nsys.argv = sys.argv[1:]\n"
    code += f"runpy.run_path({str(ROOT)!r} + '/' + sys.argv[0], run_name='__main__')"
    return run_python(folder, code, *words, code_of_exit=code_of_exit)


def on_gpu(folder, code):
    """Run code with a model on the GPU, and return what it prints last, as JSON."""
    return json.loads(run_python(folder, SETUP + code).splitlines()[-1])


@pytest.fixture(scope="module")
def on_card(tmp_path_factory):
    """The small report of conftest.py, made on the GPU."""
    folder = tmp_path_factory.mktemp("gpu")
    run_script(folder, "evaluate.py", *REPORT, "--device", DEVICE, "--output_dir", folder / "evaluation")
    return folder


def test_attack_and_table_agree_with_those_of_the_cpu(on_card, report):
    ours, theirs = (metrics(folder / "evaluation")["rows"] for folder in (on_card, report[0]))
    assert ours["original"]["clean_similarity"] == pytest.approx(theirs["original"]["clean_similarity"], abs=1e-4)
    for kind in ("transfer", "white_box"):
        figure = f"{kind}_similarity"
        assert ours["original"][figure] == pytest.approx(theirs["original"][figure], abs=0.05)
        assert ours["JPEG 50"][figure] == pytest.approx(theirs["JPEG 50"][figure], abs=0.05)
    record = metrics(on_card / "adversarial_eval")
    assert "cpu" not in record["device"] and record["identity"]["precision"] == "tf32"
    assert record["max_abs_delta_grey_levels"] == 8 and record["share_lowered"] == 1
    assert metrics(on_card / "adversarial_train")["identity"]["precision"] == "bf16"


def test_scores_in_fp32_and_the_jpeg_codec_agree_with_those_of_the_cpu(on_card):
    code = """
on_device, images = clip.encode_pixels(pixels).cpu(), common.as_images(pixels, clip.device)
decoded = differentiable_jpeg(images, 50).cpu() - differentiable_jpeg(images.cpu(), 50)
args.device = "cpu"
features = common.load_clip(args).encode_pixels(pixels) - on_device
print(json.dumps([features.abs().max().item(), decoded.abs().mean().item()]))
"""
    features, decoded = on_gpu(on_card, code)
    assert features < 1e-5 and decoded < 1e-3  # a coefficient may be rounded the other way


def test_a_first_training_step_is_that_of_the_cpu(on_card, report):
    """Of the offline training, which draws no random numbers; its gradients are bf16 here."""
    ours, theirs = (jsonl(folder / "pgd" / "log.jsonl")[0] for folder in (on_card, report[0]))
    assert ours["clean_loss"] == pytest.approx(theirs["clean_loss"], rel=0.05, abs=0.02)


def test_a_killed_training_resumes(on_card, tmp_path):
    words = ["defend_clip_mat_v2.py", *SMALL, "--save_every", 0, "--output_dir", tmp_path / "mat"]
    kill = """
import os
import common
save_part = common.Run.save_part
common.Run.save_part = lambda self, *given: (save_part(self, *given), os._exit(9))
"""
    run_script(tmp_path, *words, before=kill, code_of_exit=9)
    assert "is resumed" in run_script(tmp_path, *words)
    ours, theirs = (load_file(folder / "mat" / "open_clip_model.safetensors") for folder in (tmp_path, on_card))
    before = load_file(TINY / "clip" / "open_clip_model.safetensors")
    moved, apart = (
        sum((theirs[key] - other[key]).square().sum() for key in theirs).sqrt() for other in (before, ours)
    )
    assert apart < 0.1 * moved


def test_the_tf32_attack_is_as_strong_as_the_fp32_one(on_card):
    code = """
found = [common.attack_all(attack, loss, pixels, clip, precision=name)[0] for name in ("fp32", "tf32")]
print(json.dumps([clip.similarity(pixels_adv, text_features).mean().item() for pixels_adv in found]))
"""
    exact, fast = on_gpu(on_card, code)
    assert fast <= exact + 0.005


def test_a_full_memory_is_one_line_and_a_smaller_batch_resumes(tmp_path):
    full = "import torch, common\ndef full(*_, **__): raise torch.OutOfMemoryError('planted')\ncommon.pgd = full"
    words = ["generate_pgd_adversarial.py", *SMALL, "--split", "eval", "--output_dir", tmp_path / "out"]
    line = run_script(tmp_path, *words, before=full, code_of_exit=2)
    assert "use a smaller one: the same command resumes" in line
    run_script(tmp_path, *words, "--batch_size", 4)
    assert metrics(tmp_path / "out")["n"] == 16
