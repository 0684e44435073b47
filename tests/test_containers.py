"""Published robust CLIPs: each container that their authors write, at tiny size, opens as a row with the features of
its weights. Delta-CLIP's folder and transformers' present form stand in test_models.py."""

import json
import os
import re
import subprocess
import sys
import zipfile
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import transformers
from conftest import TINY, metrics, refusal, shell
from hub import serve_hub
from safetensors.torch import load_file, save_file
from test_models import (
    CAPTIONS,
    assert_same,
    features_of_transformers,
    image_features,
    load,
    optimizer,
    randomised,
    tecoa,
    tower_of,
    under,
)
from torch.nn import functional as F

CONFIG = json.loads((TINY / "clip" / "open_clip_config.json").read_text())
MEAN, STD = (torch.tensor(CONFIG["preprocess_cfg"][key]).view(3, 1, 1) for key in ("mean", "std"))


# The containers, as functions of the state dict of a CLIP, of which most hold the visual tower alone


def saft(state):
    return {"epoch": 2, "optimizer": optimizer(np.float64(4e-4)), "vision_encoder_state_dict": tower_of(state)}


def mmcoa(state):
    return {"model": under("module.", state), "acc": 61.2, "epoch": 9, "rng_state": torch.get_rng_state()}


def open_clip_train(state):
    scaler = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
    entries = {"optimizer": optimizer(np.float64(4.9e-6)), "scaler": scaler | {"_growth_tracker": 3}}
    return {"epoch": 1, "name": "2026_11_01-lr_5e-06", "state_dict": under("module.", state)} | entries


FILES = {  # what torch.save is given
    "FARE, TeCoA and Sim-CLIP as .pt": tower_of,
    "TeCoA, PMG-AFT, TGA-ZSR, TTC, APT, QT-AFT": lambda state: tecoa(tower_of(state)),
    "SAFT": saft,
    "MMCoA": mmcoa,
    "open_clip_train": open_clip_train,
}


def write_open_clip(folder, state, config=CONFIG):
    """Write a folder as open_clip's push_to_hf_hub does: FARE, TeCoA, the R-CLIPs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "open_clip_model.safetensors")


def write_leaf(folder, model, shards=1):
    """Write a transformers CLIPModel as LEAF's repositories have it: old config.json, no preprocessing, no tokenizer.

    shards   how many files of weights, of about equal size
    """
    size = sum(value.nbytes for value in model.state_dict().values())
    largest = max(value.nbytes for value in model.state_dict().values())  # is never split
    model.save_pretrained(folder, max_shard_size=max(size // shards, largest) if shards > 1 else "5GB")
    config = json.loads((folder / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        config[f"{part}_dict"] = config.pop(part)
        config[part] = {"model_type": f"clip_{part.split('_')[0]}_model"}
    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": "4.25.0.dev0"}))
    (folder / "generation_config.json").unlink(missing_ok=True)


def leaf_model(width=32, hidden_act="gelu"):
    both = {"num_hidden_layers": 3, "num_attention_heads": 2, "hidden_act": hidden_act}
    text = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 49408, "eos_token_id": 49407} | both
    vision = {"hidden_size": width, "intermediate_size": 3 * width, "image_size": 32, "patch_size": 16} | both
    return randomised(transformers.CLIPConfig(projection_dim=24, text_config=text, vision_config=vision))


def small_config(**vision):
    """Return the configuration of a small CLIP with another visual tower."""
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    model_cfg = {"embed_dim": 24, "vision_cfg": {"image_size": 64} | vision, "text_cfg": text}
    return {"model_cfg": model_cfg, "preprocess_cfg": CONFIG["preprocess_cfg"]}


TOWERS = {
    "convnext": {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear", "timm_drop_path": 0.1},
    "RN50": {"layers": [1, 1, 1, 1], "width": 16},
}


# Files of weights


@torch.no_grad()
def features(model, context_length=CONFIG["model_cfg"]["text_cfg"]["context_length"]):
    """Return open_clip's features: images in [0, 1], their features, those of CAPTIONS."""
    size = open_clip.get_model_preprocess_cfg(model)["size"]
    images = torch.rand(2, 3, *(size if isinstance(size, (list, tuple)) else (size, size)))
    tokens = open_clip.SimpleTokenizer(context_length=context_length)(CAPTIONS)
    encoded = model.encode_image((images - MEAN) / STD), model.encode_text(tokens)
    return images, *(F.normalize(each) for each in encoded)


@pytest.fixture(scope="module")
def robust():
    """The tiny CLIP with other weights: state dict, images, features, and the features of CAPTIONS before."""
    model = open_clip.create_model(f"local-dir:{TINY / 'clip'}").eval()
    *_, texts_before = features(model)
    state = {name: value * 1.05 for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    images, image_features, texts = features(model)
    return SimpleNamespace(state=state, images=images, features=image_features, texts=texts, texts_before=texts_before)


def with_old_names(file):
    """Name numpy's scalars in a file as numpy 1 did."""
    with zipfile.ZipFile(file) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, value in content.items():
            archive.writestr(name, value.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))


@pytest.mark.parametrize("numpy", ["numpy 2", "numpy 1"])
@pytest.mark.parametrize("kind", FILES)
def test_a_published_file_is_a_row_with_its_features(kind, numpy, robust, tmp_path):
    file = tmp_path / "TeCoAmodel_best.pth.tar"
    torch.save(FILES[kind](robust.state), file)
    before = file.read_bytes()
    if numpy == "numpy 1":
        with_old_names(file)
        assert (b"cnumpy.core" in file.read_bytes()) == (b"cnumpy._core" in before)
    clip = load(source=file)
    assert_same(image_features(clip, robust.images), robust.features)
    whole = kind in ("MMCoA", "open_clip_train")
    assert_same(clip.encode_text(CAPTIONS), robust.texts if whole else robust.texts_before)
    assert clip.notes == []


@pytest.mark.parametrize("kind", TOWERS)
def test_a_tower_that_is_no_transformer_is_a_row_as_a_folder_and_as_a_file(kind, tmp_path):
    config = small_config(**TOWERS[kind])
    write_open_clip(tmp_path, {}, config)
    model = open_clip.create_model(f"local-dir:{tmp_path}", load_weights=False).eval()
    write_open_clip(tmp_path, model.state_dict(), config)
    assert kind != "convnext" or any(name.startswith("visual.trunk.") for name in model.state_dict())
    torch.save(tecoa(tower_of(model.state_dict())), tmp_path / "tower.pt")
    images, expected, texts = features(model, 77)
    for words, source in [([], f"local-dir:{tmp_path}"), (["--model", f"local-dir:{tmp_path}"], tmp_path / "tower.pt")]:
        clip = load(*words, source=source)
        assert_same(image_features(clip, images), expected)
        assert_same(clip.encode_text(CAPTIONS), texts)


# LEAF's folders, and what lies on a hub


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_leafs_folder_is_a_row_with_transformers_own_features(hidden_act, shards, tmp_path):
    model = leaf_model(hidden_act=hidden_act)
    write_leaf(tmp_path, model, shards)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards > 1)
    expected, texts, images = features_of_transformers(model)
    clip = load(source=f"local-dir:{tmp_path}")
    assert_same(image_features(clip, images), expected)
    assert_same(clip.encode_text(CAPTIONS), texts)


def test_a_missing_shard_is_one_line_that_names_it(tmp_path, capsys):
    write_leaf(tmp_path, leaf_model(), shards=3)
    (shard, *_) = sorted(tmp_path.glob("model-00002-of-*.safetensors"))
    shard.unlink()
    assert shard.name in refusal(capsys, lambda: load(source=f"local-dir:{tmp_path}"))


HUB_SCRIPT = """
import contextlib, io, json, sys
import torch
import common, evaluate

def image_features(*words, source=None):
    clip = common.load_clip(evaluate.parse_args(["--preset", "tiny", *words]), source)
    images = torch.rand(2, 3, *clip.geometry["size"], generator=torch.Generator().manual_seed(0))
    return clip.encode_image(images).tolist()

def refusal(source):
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()) as err:
        image_features(source=source)
    return err.getvalue()

given, refused = map(json.loads, sys.argv[1:])
found = [image_features(*words, source=source) for words, source in given]
print(json.dumps([found, [refusal(source) for source in refused]]))
"""
BARE, SHARDED = "hf-hub:org/weights", "hf-hub:org/leaf-g"
ON_HUB = {  # words, source
    "a row": ([], f"{BARE}/eps 4/tower.pt"),
    "a row of two": ([], f"{BARE}/two.pt::model/"),
    "pretrained": (["--pretrained", f"{BARE}/whole.pt"], None),
    "pretrained of two": (["--pretrained", f"{BARE}/two.pt::ema/"], None),
    "sharded": ([], SHARDED),
}
NOT_ON_HUB = {
    f"{BARE}/none.pt": "the repository has no such file; weights in it: eps 4/tower.pt, two.pt, whole.pt",
    BARE: "for weights alone name their file, such as hf-hub:ORG/NAME/FILE.pt",
}


@pytest.fixture(scope="module")
def on_hub(robust, tmp_path_factory):
    """Image features of ON_HUB, lines of NOT_ON_HUB, the sharded model, and the files that were downloaded."""
    folder, leaf = tmp_path_factory.mktemp("hub"), leaf_model()
    weights = folder / "weights"
    (weights / "eps 4").mkdir(parents=True)
    half = {name: value / 2 for name, value in robust.state.items()}
    torch.save(tecoa(tower_of(robust.state)), weights / "eps 4" / "tower.pt")
    torch.save(open_clip_train(robust.state), weights / "whole.pt")
    torch.save({"model": robust.state, "ema": half}, weights / "two.pt")
    write_leaf(folder / "leaf", leaf, shards=3)
    with serve_hub({"models/org/weights": weights, "models/org/leaf-g": folder / "leaf"}) as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0"}
        env["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        command = [sys.executable, "-c", HUB_SCRIPT, *map(json.dumps, ([*ON_HUB.values()], [*NOT_ON_HUB]))]
        done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, lines = json.loads(done.stdout.splitlines()[-1])
    found, lines = dict(zip(ON_HUB, map(torch.tensor, found))), dict(zip(NOT_ON_HUB, lines))
    files = [path for method, path, _, count in hub.requests if method == "GET" and "/resolve/" in path and count > 2]
    files = {re.sub(".*/resolve/[^/]+/", "", path) for path in files}
    return SimpleNamespace(found=found, lines=lines, leaf=leaf, files=files)


def test_a_file_in_a_hub_repository_without_a_configuration_is_a_row_and_pretrained(on_hub, robust):
    model = open_clip.create_model(f"local-dir:{TINY / 'clip'}", load_weights=False).eval()
    size = CONFIG["model_cfg"]["vision_cfg"]["image_size"]
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    for scale, kinds in ((1, ("a row", "a row of two", "pretrained")), (0.5, ("pretrained of two",))):
        model.load_state_dict({name: scale * value for name, value in robust.state.items()})
        with torch.no_grad():
            expected = F.normalize(model.encode_image((images - MEAN) / STD))
        for kind in kinds:
            torch.testing.assert_close(on_hub.found[kind], expected, rtol=0, atol=1e-4)


def test_a_sharded_model_on_a_hub_gives_its_features(on_hub):
    assert_same(on_hub.found["sharded"], features_of_transformers(on_hub.leaf)[0])


def test_of_a_hub_repository_of_weights_only_the_files_asked_for_are_downloaded(on_hub):
    weights = {name for name in on_hub.files if name.endswith((".pt", ".safetensors"))}
    shards = {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    assert weights == {"eps 4/tower.pt", "two.pt", "whole.pt"} | shards


@pytest.mark.parametrize("source", NOT_ON_HUB)
def test_what_a_hub_repository_lacks_is_one_line_that_says_what_to_type(source, on_hub):
    (line,) = on_hub.lines[source].splitlines()
    assert NOT_ON_HUB[source] in line


# What cannot be a row

CLASSIFIER = {"cls_token": torch.zeros(1, 1, 8), "patch_embed.proj.weight": torch.zeros(8, 3, 4, 4)}
CLASSIFIER |= {"head.weight": torch.zeros(10, 8)}
LLAVA = "model.vision_tower.vision_tower.vision_model."
PROMPTS = {"prompt_learner.ctx": torch.zeros(4, 8), "prompt_learner.token_prefix": torch.zeros(10, 1, 8)}
CANNOT = {  # name of a file, or of the configuration of a folder: content, what the line says
    "AdvXL's file": ("advxl.pth", {"model": CLASSIFIER}, "it holds 3 tensors, such as model/cls_token, and none of"),
    "AdvXL's folder": ("config.json", {"architecture": "vit_huge_patch14_clip_336"}, "'vit_huge_patch14_clip_336'"),
    "LLaVA's folder": ("config.json", {"model_type": "llava"}, "'llava'"),
    "LLaVA's file": (
        "llava.bin",
        {f"{LLAVA}embeddings.class_embedding": torch.zeros(8), f"{LLAVA}encoder.layers.0.mlp.fc1.bias": torch.zeros(8)},
        "keys do not fit",
    ),
    "prompts": ("model-best.pth.tar", {"state_dict": PROMPTS, "epoch": 5}, "state_dict/prompt_learner.ctx, and none"),
    "a prompter": ("vp.pth.tar", tecoa({}, pad_up=torch.zeros(1, 3, 2, 8)), "state_dict/pad_up, and none"),
    "LoRA's folder": ("adapter_config.json", {"peft_type": "LORA"}, "merge them into the weights first"),
    "LoRA's file": ("lora.pt", {"weights": {"layer_0": {"q_proj": {"w_lora_A": torch.zeros(2, 8)}}}}, "merge them"),
    "a folder of files": ("README.md", {}, "for weights alone name their file, such as hf-hub:ORG/NAME/FILE.pt"),
}


@pytest.mark.parametrize("kind", CANNOT)
def test_what_cannot_be_a_row_is_one_line(kind, tmp_path, capsys):
    name, content, said = CANNOT[kind]
    folder = name.endswith((".json", ".md"))
    if folder:
        (tmp_path / name).write_text(json.dumps(content))
    else:
        torch.save(content, tmp_path / name)
    line = refusal(capsys, lambda: load(source=f"local-dir:{tmp_path}" if folder else tmp_path / name))
    assert said in line, line


def test_a_row_that_cannot_be_opened_is_said_before_the_first_attack(tmp_path):
    torch.save(CLASSIFIER, tmp_path / "advxl.pth")
    words = ["--preset", "smoke", "--trainings", "--qualities", "--output_dir", tmp_path / "runs" / "evaluation"]
    out, err = shell("evaluate.py", *words, "--checkpoint", f"AdvXL={tmp_path / 'advxl.pth'}", code=2)
    assert "advxl.pth: it holds 3 tensors" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_file_on_a_hub_given_as_the_model_is_one_line_that_says_where_it_belongs(capsys):
    assert "give it as --pretrained" in refusal(capsys, load, "--model", f"{BARE}/tower.pt")


# Which activation the weights of a file want


def wanting(activation, state):
    """Return weights whose features are lost with another activation than the one given, a function."""
    state = {name: value.clone() for name, value in state.items()}
    last = f"visual.transformer.resblocks.{CONFIG['model_cfg']['vision_cfg']['layers'] - 1}.mlp."
    state[f"{last}c_fc.weight"][0], state[f"{last}c_fc.bias"][0] = 0, -2  # a constant, which the next bias takes away
    column = 1000 * torch.linspace(-1, 1, len(state[f"{last}c_proj.bias"]))
    state[f"{last}c_proj.weight"][:, 0] = column
    state[f"{last}c_proj.bias"] -= column * activation(torch.tensor(-2.0))
    return state


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A function that runs evaluate.py on files of weights: {row: its summary}, what was printed."""
    state = load_file(TINY / "clip" / "open_clip_model.safetensors")
    quick, gelu = wanting(open_clip.transformer.QuickGELU(), state), wanting(F.gelu, state)
    for name, weights in {"quick": quick, "gelu": gelu, "tower": tower_of(gelu)}.items():
        torch.save(weights, tmp_path / f"{name}.pt")
    for registered in ("_MODEL_CONFIGS", "_MODEL_CONFIG_PATHS"):
        monkeypatch.setattr(open_clip.factory, registered, getattr(open_clip.factory, registered).copy())
    for name, quick_gelu in {"small-clip": False, "small-clip-quickgelu": True}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(CONFIG["model_cfg"] | {"quick_gelu": quick_gelu}))
        open_clip.add_model_config(tmp_path / f"{name}.json")
    monkeypatch.setattr(open_clip, "get_tokenizer", lru_cache(open_clip.get_tokenizer))  # takes longer than the model
    monkeypatch.chdir(tmp_path)

    def run(folder, *words):
        words = ["--preset", "smoke", "--num_images", 8, "--steps", 1, "--attack_steps", 1, "--trainings", *words]
        out, _ = shell("evaluate.py", *words, "--qualities", "--output_dir", f"{folder}/evaluation")
        return metrics(tmp_path / folder / "evaluation")["rows"], out

    return run


def doubtful(rows):
    return {name for name, row in rows.items() if row["doubtful"]}


def test_weights_under_the_wrong_activation_are_marked_with_the_name_to_type(table):
    rows_of = ["--checkpoint", "whole=gelu.pt", "--checkpoint", "tower=tower.pt"]
    rows, out = table("quick", "--model", "small-clip-quickgelu", "--pretrained", "quick.pt", *rows_of)
    assert doubtful(rows) == {"whole", "tower"}
    note = rows["whole"]["note"]
    own, other = (float(number) for number in re.findall(r"-?\d\.\d{4}", note))
    assert other > own
    assert note.endswith("its weights may want --model small-clip with a --pretrained that goes with it")
    assert "whole (?) (*)" in out and f"note: whole: {note}" in out
    rows, _ = table("gelu", "--model", "small-clip", "--pretrained", "quick.pt", *rows_of)
    assert doubtful(rows) == {"original"}
    assert rows["original"]["note"].endswith("its weights may want --model small-clip-quickgelu")


def test_a_file_for_a_folder_with_the_wrong_activation_is_marked_with_the_setting_to_change(table, tmp_path):
    folder = tmp_path / "clip"
    write_open_clip(folder, load_file(TINY / "clip" / "open_clip_model.safetensors"))
    rows, _ = table("wrong", "--model", "local-dir:clip", "--checkpoint", "gelu=gelu.pt", "--checkpoint", "q=quick.pt")
    assert doubtful(rows) == {"gelu"}
    setting = '"quick_gelu": false'
    assert rows["gelu"]["note"].endswith(f"a copy of local-dir:clip with {setting} in its open_clip_config.json")
    config = (folder / "open_clip_config.json").read_text()
    (folder / "open_clip_config.json").write_text(config.replace('"quick_gelu": true', setting))
    rows, _ = table("right", "--model", "local-dir:clip", "--checkpoint", "gelu=gelu.pt", "--checkpoint", "q=quick.pt")
    assert doubtful(rows) == {"q"}
