"""Models from elsewhere: checkpoints as people and papers save them, transformers' and Delta-CLIP's folders, and the
preprocessing and digest that go with them. What cannot be loaded stands in test_hostile.py."""

import argparse
import json
import sys
import zipfile
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import transformers
from conftest import TINY, metrics, refusal, shell
from hub import connected
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import common
import evaluate

CAPTIONS = ["a cat sleeps", "two dogs on the beach, at noon"]
OPENAI = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def load(*words, source=None):
    return common.load_clip(evaluate.parse_args(["--preset", "tiny", *map(str, words)]), source and str(source))


def make_images(size):
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def features_of_open_clip(model, ids, normalisation=OPENAI):
    """Return stock open_clip's unit features of make_images() and of captions' token ids, and the images."""
    size = open_clip.get_model_preprocess_cfg(model)["size"]
    images = make_images(size if isinstance(size, (list, tuple)) else (size, size))
    mean, std = (torch.tensor(normalisation[key]).view(3, 1, 1) for key in ("mean", "std"))
    return F.normalize(model.encode_image((images - mean) / std)), F.normalize(model.encode_text(ids)), images


def assert_gives(clip, images, texts, captions=CAPTIONS, atol=1e-5):
    """A Clip has these features of make_images() and of captions."""
    with torch.no_grad():
        found = clip.encode_image(make_images(clip.geometry["size"]))
    torch.testing.assert_close(found, images, rtol=0, atol=atol)
    torch.testing.assert_close(clip.encode_text(captions), texts, rtol=0, atol=atol)


# Checkpoints


@pytest.fixture(scope="module")
def other():
    """The tiny CLIP with every weight changed, state, and the features that open_clip computes before and after."""
    model = open_clip.create_model(f"local-dir:{TINY / 'clip'}").eval()
    ids = open_clip.SimpleTokenizer(context_length=32)(CAPTIONS)
    base_images, base_texts, _ = features_of_open_clip(model, ids)
    state = {key: value * 1.05 for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    images, texts, _ = features_of_open_clip(model, ids)
    assert min((base_images - images).norm(), (base_texts - texts).norm()) > 1e-3
    return SimpleNamespace(state=state, images=images, texts=texts, base_images=base_images, base_texts=base_texts)


def tower_of(state):
    return {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}


def under(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def optimizer(lr):
    """The state of an optimizer, whose tensors are no weights of a model."""
    return {"state": {0: {"step": torch.tensor(5.0), "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": lr}]}


def tecoa(state, **further):
    kind = "clip" if "logit_scale" in state else "vision_encoder"
    best = {"best_acc1": np.float64(52.5), "optimizer": optimizer(np.float64(1e-5))}
    return {"epoch": 3, "state_dict": further, "add_prompter": bool(further), f"{kind}_state_dict": state} | best


def saft(state):
    return {"epoch": 2, "optimizer": optimizer(np.float64(4e-4)), "vision_encoder_state_dict": state}


def mmcoa(state):
    return {"model": under("module.", state), "acc": 61.2, "epoch": 9, "rng_state": torch.get_rng_state()}


def open_clip_train(state):
    scaler = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "_growth_tracker": 3}
    entries = {"optimizer": optimizer(np.float64(4.9e-6)), "scaler": scaler}
    return {"epoch": 1, "name": "2026_11_01-lr_5e-06", "state_dict": under("module.", state)} | entries


def lightning(state):
    folder = {"folder": Path("runs"), "cache": PureWindowsPath("C:/cache"), "epochs": np.int64(3)}
    entries = {"hyper_parameters": folder, "optimizer_states": [optimizer(1e-5)]}
    return {"epoch": 1, "state_dict": under("model.", state)} | entries


FORMATS = {
    "a bare state dict, as of FARE, TeCoA and Sim-CLIP": dict,
    "TeCoA, PMG-AFT, TGA-ZSR, TTC, APT, QT-AFT": tecoa,
    "SAFT": saft,
    "MMCoA": mmcoa,
    "open_clip_train": open_clip_train,
    "lightning": lightning,
    "flags": lambda state: {"args": argparse.Namespace(lr=1e-5), "model_state_dict": state},
    "_orig_mod.": lambda state: under("_orig_mod.", state),
    "a list": lambda state: {"models": [state]},
    "equal twice": lambda state: {"model": state, "ema": under("module.", state)},
    "fp64": lambda state: {key: value.double() for key, value in state.items()},
    "safetensors": None,
    "safetensors as .ckpt": None,
}


def write(file, state, kind):
    """Save a state dict in one of FORMATS; returns the file."""
    if FORMATS[kind]:
        torch.save(FORMATS[kind](state), file)
    else:
        file = file.with_suffix(".ckpt" if "ckpt" in kind else ".safetensors")
        save_file(state, file)
    return file


@pytest.mark.parametrize("kind", FORMATS)
def test_a_whole_model_in_any_format_is_loaded_as_pretrained(kind, other, tmp_path):
    clip = load("--pretrained", write(tmp_path / "whole.pt", other.state, kind))
    assert_gives(clip, other.images, other.texts)
    torch.testing.assert_close(clip.model.logit_scale, other.state["logit_scale"])
    assert clip.notes == []


@pytest.mark.parametrize("kind", [*FORMATS, "visual."])
def test_a_visual_tower_in_any_format_is_loaded_as_a_row_and_keeps_the_text_tower(kind, other, tmp_path):
    tower, file = tower_of(other.state), tmp_path / "tower.pt"
    if kind == "visual.":
        torch.save(under("visual.", tower), file)
    else:
        file = write(file, tower, kind)
    clip = load(source=file)
    assert_gives(clip, other.images, other.base_texts)
    assert clip.notes == []


def test_numbers_of_numpy_1_in_a_file_of_weights_are_read(other, tmp_path):
    file = tmp_path / "TeCoAmodel_best.pth.tar"
    torch.save(tecoa(tower_of(other.state)), file)
    with zipfile.ZipFile(file) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    assert b"cnumpy._core.multiarray\n" in b"".join(content.values())
    with zipfile.ZipFile(file, "w") as archive:
        for name, value in content.items():
            archive.writestr(name, value.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    assert_gives(load(source=file), other.images, other.base_texts)


@pytest.mark.parametrize("part", [dict, tower_of], ids=["whole models", "towers"])
def test_of_different_weights_in_a_file_the_user_chooses_as_the_line_says(part, other, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = {key: value / 1.05 for key, value in other.state.items()}
    torch.save({"teacher": part(first)} | under("model.", part(other.state)), "w.pt")
    line = refusal(capsys, load, "--pretrained", "w.pt")
    assert line.endswith("it holds different weights; choose w.pt::teacher/ or w.pt::model.") and len(line) <= 200
    assert "choose w.pt::teacher/ or" in refusal(capsys, lambda: load(source="w.pt::none"))
    texts = other.texts if part is dict else other.base_texts
    for place, expected in (("teacher/", (other.base_images, other.base_texts)), ("model.", (other.images, texts))):
        clip = load(source=f"w.pt::{place}")
        assert_gives(clip, *expected, atol=1e-4)
        assert clip.notes == []
    if part is dict:
        assert_gives(load("--pretrained", "w.pt::model."), other.images, other.texts)


def test_a_whole_model_goes_before_a_tower_whose_first_tensor_is_noted(other, tmp_path):
    tower = {key: value * 0.9 for key, value in tower_of(other.state).items()}
    torch.save(under("student.", tower) | under("teacher.", other.state), tmp_path / "w.pt")
    clip = load(source=tmp_path / "w.pt")
    assert_gives(clip, other.images, other.texts)
    assert clip.notes == ["student.class_embedding in the file of its weights is not used"]
    clip = load(source=f"{tmp_path / 'w.pt'}::student.")
    assert (clip.encode_image(make_images(clip.geometry["size"])) - other.images).norm() > 1e-3


def test_a_row_of_the_originals_weights_or_with_tensors_left_out_is_marked_in_the_table(other, tmp_path):
    tower = tower_of(load_file(TINY / "clip" / "open_clip_model.safetensors"))
    torch.save(tecoa(tower, pad_up=torch.zeros(1, 3, 4, 64)), tmp_path / "frozen.pt")
    torch.save({"orig": tower, "model": tower_of(other.state)}, tmp_path / "both.pt")
    words = ["evaluate.py", "--preset", "smoke", "--num_images", 4, "--steps", 1, "--attack_steps", 1, "--qualities"]
    words += ["--trainings", "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "evaluation"]
    words += ["--checkpoint", f"frozen={tmp_path / 'frozen.pt'}", "--checkpoint"]
    out, _ = shell(*words, f"both={tmp_path / 'both.pt'}::model/")
    same = "its weights are the original model's"
    note = f"state_dict/pad_up in the file of its weights is not used; {same}"
    notes = {"original": None, "frozen": note, "both": None}
    rows = metrics(tmp_path / "evaluation")["rows"]
    assert {name: row["note"] for name, row in rows.items()} == notes
    assert rows["frozen"]["white_box_similarity"] == rows["original"]["white_box_similarity"]
    table = (tmp_path / "evaluation" / "table.md").read_text()
    assert r"| frozen (\*)" in table and table.count(r"(\*) |") == table.count(r"| frozen (\*)")
    assert f"(*) frozen: {note}" in " ".join(out.split())
    out, _ = shell(*words, f"both={tmp_path / 'both.pt'}::orig/")  # other weights of the same file
    assert "both: clean R@1" in out and "frozen: clean R@1" not in out
    rows = metrics(tmp_path / "evaluation")["rows"]
    assert {name: row["note"] for name, row in rows.items()} == notes | {"both": same}


def test_a_folder_given_as_a_name_is_one_line_that_says_what_to_write(capsys, monkeypatch):
    monkeypatch.chdir(TINY)
    line = refusal(capsys, load, "--model", "./clip")
    assert "for a folder write local-dir:./clip" in line and len(line) <= 200
    load("--model", "local-dir:./clip")


# transformers' format

SMALL_TEXT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
SMALL_TEXT |= {"vocab_size": 49408, "eos_token_id": 49407}
SMALL_VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 160}
SMALL_VISION |= {"image_size": 32, "patch_size": 16}
FEW_VALUES = {"text_config": {"hidden_size": 64, "num_hidden_layers": 1}}
FEW_VALUES |= {"vision_config": {"hidden_size": 96, "num_hidden_layers": 1}}
VARIANTS = ["gelu", "pytorch_model.bin", "base_model.model.", "open_clip_config.json", "defaults left out"]
AS_OPEN_CLIP = {  # SMALL_TEXT and SMALL_VISION in open_clip's words
    "model_cfg": {
        "embed_dim": 48,
        "quick_gelu": True,
        "text_cfg": {"width": 64, "heads": 2, "layers": 2, "mlp_ratio": 1.5},
        "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 8, "layers": 2, "mlp_ratio": 5},
    },
    "preprocess_cfg": {},
}


def small_clip(**both):
    """Make a CLIPModel whose biases and norms are not those that it starts with; both: changes of both towers."""
    text, vision = SMALL_TEXT | both, SMALL_VISION | both
    if both:
        text["layer_norm_eps"], vision["layer_norm_eps"] = 0.01, 0.1
    return randomised(transformers.CLIPConfig(projection_dim=48, text_config=text, vision_config=vision))


@torch.no_grad()
def randomised(config):
    torch.manual_seed(1)
    model = transformers.CLIPModel(config).eval()
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    return model


def published(size, image_size):
    """Return a preprocessor_config.json as openai/clip-vit-large-patch14 has it."""
    flags = {"do_center_crop": True, "do_normalize": True, "do_resize": True}
    numbers = {"image_mean": OPENAI["mean"], "image_std": OPENAI["std"], "resample": 3, "size": size}
    return json.dumps(flags | numbers | {"crop_size": image_size})


def save_transformers(folder, variant):
    """Save a small CLIPModel as a folder in one of VARIANTS; returns the model."""
    if variant == "defaults left out":
        model = randomised(transformers.CLIPConfig(**FEW_VALUES))
    else:
        model = small_clip(hidden_act="gelu") if variant == "gelu" else small_clip()
    model.save_pretrained(folder)
    size = model.config.vision_config.image_size
    size = size if variant == "gelu" else {"shortest_edge": size}  # both are published
    (folder / "preprocessor_config.json").write_text(published(size, model.config.vision_config.image_size))
    if variant == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
        positions = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
        positions["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
        torch.save(model.state_dict() | positions, folder / "pytorch_model.bin")
    if variant == "base_model.model.":
        save_file(under(variant, load_file(folder / "model.safetensors")), folder / "model.safetensors")
    if variant == "open_clip_config.json":
        (folder / variant).write_text(json.dumps(AS_OPEN_CLIP))
    if variant == "defaults left out":
        (folder / "config.json").write_text(json.dumps(FEW_VALUES | {"model_type": "clip"}))
    return model


@torch.no_grad()
def features_of_transformers(model):
    """Return the model's own unit features of make_images() and of CAPTIONS."""
    size = model.config.vision_config.image_size
    mean, std = (torch.tensor(OPENAI[key]).view(3, 1, 1) for key in ("mean", "std"))
    images = model.get_image_features((make_images((size, size)) - mean) / std)
    texts = model.get_text_features(open_clip.SimpleTokenizer()(CAPTIONS), attention_mask=None)
    return [F.normalize(getattr(output, "pooler_output", output)) for output in (images, texts)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_folder_of_transformers_gives_its_features(variant, tmp_path):
    model = save_transformers(tmp_path, variant)
    clip = load("--model", f"local-dir:{tmp_path}")
    assert_gives(clip, *features_of_transformers(model))
    size = model.config.vision_config.image_size
    geometry = {"size": (size, size), "interpolation": "bicubic", "resize_mode": "shortest"}
    assert clip.geometry.items() >= geometry.items()


UNUSUAL = {"do_rescale": False, "rescale_factor": 1 / 127.5, "do_resize": False, "do_center_crop": False}
UNUSUAL |= {"crop_size": 28, "size": {"height": 32, "width": 32}, "resample": 2, "do_pad": True, "do_normalize": False}


def save_processor(folder, **changes):
    """Save a processor as transformers 5 does, beside what an earlier version has left; returns it."""
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}
    sizes = {"size": {"shortest_edge": 32}, "crop_size": 32}
    images = transformers.CLIPImageProcessorPil(**sizes | changes)
    processor = transformers.CLIPProcessor(images, transformers.CLIPTokenizer(vocab=words, merges=[]))
    processor.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(published(32, 32))
    return transformers.CLIPImageProcessorPil.from_pretrained(folder)


def test_images_are_processed_as_by_transformers_own_processor(tmp_path):
    small_clip().save_pretrained(tmp_path)
    processor = save_processor(tmp_path, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8))
    clip = load("--model", f"local-dir:{tmp_path}")
    images = common.as_images(common.to_geometry(clip.geometry)(picture)[None], clip.device)
    values = processor(picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close((images - clip.mean) / clip.std, values, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", UNUSUAL)
def test_images_that_transformers_processes_in_another_way_than_clips_are_refused(name, tmp_path, capsys):
    small_clip().save_pretrained(tmp_path)
    save_processor(tmp_path)
    file = tmp_path / "processor_config.json"
    config = json.loads(file.read_text())
    config["image_processor"][name] = UNUSUAL[name]
    file.write_text(json.dumps(config))
    line = refusal(capsys, load, "--model", f"local-dir:{tmp_path}")
    assert "its images are" in line and str(UNUSUAL[name]) in line


# Delta-CLIP

VOCABULARY = ["[PAD]", "[unused0]", "[unused1]", "[unused2]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY += ["a", "cat", "sleep", "##s", "##ing", "on", "the", "cafe", ","]
LENGTH = 16
PIECES = {  # caption: its pieces
    "A cat sleeps": "a cat sleep ##s",
    " sleeping on  the Caf\u00e9, ": "sleep ##ing on the cafe ,",
    "the zebra": "the [UNK]",
    "cat " * 13: "cat " * 13,
    "cat " * 14 + "on the cafe": "cat " * 13,
}
DELTA_TEXT = {"context_length": LENGTH, "vocab_size": len(VOCABULARY), "width": 64, "heads": 2, "layers": 1}
DELTA_TEXT |= {"pool_type": "last", "no_causal_mask": True}
DELTA_VISION = {"image_size": 48, "patch_size": 16, "width": 64, "head_width": 32, "layers": 1}
DELTA_VISION |= {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}
DELTA = {
    "model_cfg": {"embed_dim": 32, "vision_cfg": DELTA_VISION, "text_cfg": DELTA_TEXT | {"vocab_path": "vocab.txt"}},
    "preprocess_cfg": IMAGENET | {"interpolation": "bilinear", "resize_mode": "squash"},
}


def write_delta_clip(folder):
    """Write Delta-CLIP's folder; returns the model as stock open_clip makes it."""
    stock = json.loads(json.dumps(DELTA))
    del stock["model_cfg"]["text_cfg"]["vocab_path"]
    (folder / "open_clip_config.json").write_text(json.dumps(stock))
    torch.manual_seed(1)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False).eval()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(DELTA))
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY).replace("[unused0]", "[bos]").replace("[unused1]", "[eos]"))
    return model


def write_bert(folder):
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    tokenizer = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))


def delta_clip_ids():
    """Return the ids of PIECES by Delta-CLIP's rule."""
    bos, eos, cls = (VOCABULARY.index(token) for token in ("[unused0]", "[unused1]", "[CLS]"))
    rows = []
    for pieces in PIECES.values():
        ids = [bos, *(VOCABULARY.index(piece) for piece in pieces.split()), eos]
        rows.append(ids + [0] * (LENGTH - 1 - len(ids)) + [cls])
    return rows


def test_delta_clip_gives_the_features_of_stock_open_clip_with_a_tokenizer_from_the_hub(tmp_path):
    delta, bert = tmp_path / "delta", tmp_path / "bert"
    for folder in (delta, bert):
        folder.mkdir()
    model = write_delta_clip(delta)
    write_bert(bert)
    repos = {"models/zw123/delta_clip_h14_336": delta, "models/google-bert/bert-base-uncased": bert}
    with connected(repos, tmp_path / "home"):
        clip = load("--model", "hf-hub:zw123/delta_clip_h14_336")
    ids = delta_clip_ids()
    assert clip.tokenizer(list(PIECES)).tolist() == ids
    images, texts, _ = features_of_open_clip(model, torch.tensor(ids), IMAGENET)
    assert (texts[0] - texts[1]).norm() > 1e-2
    assert_gives(clip, images, texts, list(PIECES))
    assert clip.geometry.items() >= {"size": (48, 48), "interpolation": "bilinear", "resize_mode": "squash"}.items()


@pytest.mark.parametrize("missing", ["transformers", "the files"])
def test_delta_clip_without_its_tokenizer_is_one_line(missing, tmp_path, capsys, monkeypatch):
    write_delta_clip(tmp_path)
    if missing == "transformers":
        monkeypatch.setitem(sys.modules, "transformers", None)
    line = refusal(capsys, load, "--model", f"local-dir:{tmp_path}")
    assert "google-bert/bert-base-uncased" in line and "pip install transformers" in line


# Preprocessing of open_clip's architectures

NEUTRAL = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
PREPROCESSING = {
    "MobileCLIP2-S0": {"mean": (0,) * 3, "std": (1,) * 3, "interpolation": "bilinear", "resize_mode": "shortest"},
    "ViT-B-32-quickgelu": {key: tuple(value) for key, value in OPENAI.items()}
    | {"interpolation": "bicubic", "resize_mode": "shortest"},
    "ViT-B-16-SigLIP": NEUTRAL | {"interpolation": "bicubic", "resize_mode": "squash"},
    "ViT-L-14": None,
}


@pytest.mark.parametrize("name", PREPROCESSING)
def test_an_architecture_has_the_preprocessing_of_its_published_weights(name):
    assert common.shared_preprocessing(name) == PREPROCESSING[name]


@pytest.mark.parametrize("name", ["MobileCLIP2-S0", "ViT-B/32-quickgelu", "ViT-L-14"])
def test_weights_from_a_file_get_the_preprocessing_of_the_architecture(name, tmp_path, capsys, monkeypatch):
    tiny, made = open_clip.create_model(f"local-dir:{TINY / 'clip'}", load_weights=False), []
    monkeypatch.setattr(open_clip, "create_model", lambda *args, **options: made.append((args, options)) or tiny)
    file, name = tmp_path / "weights.pt", name.replace("/", "-")
    file.touch()
    *_, weights = common.model_by_name(name, str(file))
    ((args, options),) = made
    assert args == (name,) and options == {"load_weights": False, "force_preprocess_cfg": PREPROCESSING[name]}
    assert weights == str(file)
    printed = capsys.readouterr().out
    assert (f"the published weights of {name} do not agree on a preprocessing" in printed) == (name == "ViT-L-14")
    activation = "QuickGELU" if "quickgelu" in name else "GELU"
    assert f"with {activation}" in printed


# The digest by which a model is known


def test_a_model_is_known_by_what_was_loaded_and_not_by_its_name(other, tmp_path):
    config = json.loads((TINY / "clip" / "open_clip_config.json").read_text())

    def digest_of(name, change=lambda config: None, scale=1):
        folder, changed = tmp_path / name, json.loads(json.dumps(config))
        folder.mkdir()
        change(changed)
        (folder / "open_clip_config.json").write_text(json.dumps(changed))
        save_file({key: scale * value for key, value in other.state.items()}, folder / "open_clip_model.safetensors")
        return load("--model", f"local-dir:{folder}").digest

    digests = [digest_of("one"), digest_of("weights", scale=1.001)]
    digests.append(digest_of("activation", lambda config: config["model_cfg"].update(quick_gelu=False)))
    digests.append(digest_of("pixels", lambda config: config["preprocess_cfg"].update(resize_mode="squash")))
    case = {"tokenizer_kwargs": {"clean": "whitespace"}}  # which keeps capitals
    digests.append(digest_of("tokenizer", lambda config: config["model_cfg"]["text_cfg"].update(case)))
    assert len({*digests}) == 5 and digest_of("elsewhere") == digests[0]
    torch.save({"state_dict": other.state}, tmp_path / "weights.pt")
    assert load("--pretrained", tmp_path / "weights.pt").digest == digests[0]


def test_a_model_with_another_vocabulary_is_another_model(tmp_path):
    write_delta_clip(tmp_path)
    write_bert(tmp_path)  # a tokenizer of its own
    one = load("--model", f"local-dir:{tmp_path}").digest
    words = (tmp_path / "vocab.txt").read_text()
    (tmp_path / "vocab.txt").write_text(words.replace("cat", "dog").replace("cafe", "cat").replace("dog", "cafe"))
    assert load("--model", f"local-dir:{tmp_path}").digest != one
