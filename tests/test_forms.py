"""Models of other forms as rows: each in its own geometry, from a loopback hub, with random weights and few layers."""

import json
import re

import numpy as np
import open_clip
import pytest
import torch
from conftest import metrics, refusal, shell
from hub import connected
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

import common

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VISION = {"image_size": 256, "layers": 2, "width": 64, "head_width": 32, "patch_size": 32}
CLIPA = {"image_size": 336, "patch_size": 48, "no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}
SIGLIP = {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"}
RESNET = {"image_size": 96, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}
NEUTRAL = {"mean": [0.5] * 3, "std": [0.5] * 3}
FORMS = {  # model_cfg, preprocess_cfg
    "clipa": ({"embed_dim": 64, "vision_cfg": VISION | CLIPA, "text_cfg": TEXT},
              {"interpolation": "bilinear", "resize_mode": "squash"}),
    "siglip": ({"embed_dim": 64, "vision_cfg": SIGLIP, "text_cfg": TEXT, "custom_text": True, "init_logit_bias": -10},
               NEUTRAL | {"resize_mode": "squash"}),
    "b32": ({"embed_dim": 64, "vision_cfg": VISION, "text_cfg": TEXT}, {}),
    "resnet": ({"embed_dim": 64, "vision_cfg": RESNET, "text_cfg": TEXT}, {"resize_mode": "longest"}),
}  # fmt: skip
COUNT = 3
SMALL = ["--preset", "tiny", "--num_images", COUNT, "--steps", 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The forms as folders, and adversarial images of the tiny CLIP."""
    folder = tmp_path_factory.mktemp("forms")
    for name, (model, preprocess) in FORMS.items():
        (folder / name).mkdir()
        config = {"model_cfg": model, "preprocess_cfg": preprocess}
        (folder / name / "open_clip_config.json").write_text(json.dumps(config))
        torch.manual_seed(1)  # other weights than a load that forgets them would have
        state = open_clip.create_model(f"local-dir:{folder / name}", load_weights=False).state_dict()
        save, file = (torch.save, "pytorch_model.bin") if name == "b32" else (save_file, "model.safetensors")
        save({key: value.contiguous() for key, value in state.items()}, folder / name / f"open_clip_{file}")
    words = ["--split", "eval", "--output_dir", folder / "adversarial_eval"]
    shell("generate_pgd_adversarial.py", *SMALL, *words)
    return folder


def load(folder, name, *words):
    words = ["--preset", "tiny", "--model", f"local-dir:{folder / name}", *words]
    args = common.fill(common.make_parser("").parse_args(words), "x", "eval")
    return args, common.load_clip(args)


@pytest.mark.parametrize("name", FORMS)
def test_pixels_and_gradient_are_open_clips_own(name, folder):
    args, clip = load(folder, name)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder / name}")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8))
    pixels = common.to_geometry(clip.geometry)(image)
    images = common.as_images(pixels[None], clip.device)
    assert torch.equal(((images - clip.mean) / clip.std)[0], preprocess(image))
    x = images.requires_grad_()
    (expected,) = torch.autograd.grad(F.normalize(model.eval().encode_image((x - clip.mean) / clip.std))[0, 0], x)
    (ours,) = torch.autograd.grad(clip.attack_encoder()(x)[0, 0], x)
    assert (ours - expected).norm() <= 1e-4 * expected.norm()


def test_models_of_the_hub_are_rows_beside_the_tiny_one_in_their_own_pixels(folder):
    repos = {f"models/org/{name}": folder / name for name in FORMS}
    words = [*SMALL, "--attack_steps", 1, "--trainings", "--adversarial_dir"]
    words += [folder / "adversarial_eval", "--qualities"]
    rows = [word for name in FORMS for word in ("--checkpoint", f"{name}=hf-hub:org/{name}")]
    rows += ["--defence", "clipa+jpeg50", "--output_dir", folder / "evaluation"]
    with connected(repos, folder / "home"):
        printed, _ = shell("evaluate.py", *words, *rows)
    record = metrics(folder / "evaluation")
    assert list(record["rows"]) == ["original", *FORMS, "clipa+jpeg50"]
    assert all(len(re.findall(rf"^{name}: clean R@1", printed, re.M)) == 1 for name in FORMS)
    for row in record["rows"].values():
        figures = [value for value in row.values() if isinstance(value, float)]
        assert np.isfinite(figures).all() and row["n"] == COUNT
        assert row["white_box_similarity"] <= min(row["clean_similarity"], row["transfer_similarity"])
    assert all(health["max_abs_delta_grey_levels"] == 8 for health in record["health"].values())
    for name in FORMS:  # the weights are those of the hub
        args, clip = load(folder, name)
        images = common.load_images(args, "eval", clip.geometry, 0, COUNT)
        own = clip.similarity(images.pixels, clip.encode_text(images.own_captions))
        np.testing.assert_allclose(record["per_image"][name]["clean"]["similarity"], own, atol=1e-5)
    one = ["--checkpoint", f"b32=local-dir:{folder / 'b32'}", "--output_dir", folder / "alone"]
    shell("evaluate.py", *words, *one, "--sanity")
    assert len(metrics(folder / "alone")["sanity"]["b32"]["checks"]) == 7
    for name, row in metrics(folder / "alone")["rows"].items():
        for key in ("fall", "not_converged"):
            row[key] = record["rows"][name][key]  # the checks look further
        assert row == record["rows"][name]  # as without the others beside it


def test_a_model_whose_tokenizer_cannot_be_had_is_one_line(tmp_path, capsys):
    model = {"embed_dim": 64, "vision_cfg": VISION, "text_cfg": TEXT | {"hf_tokenizer_name": "org/none"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {}}))
    assert "pip install transformers" in refusal(capsys, load, tmp_path, ".", "--pretrained", "random")
