"""Published robust CLIPs in the containers of their authors, at tiny size, as folders and from a loopback hub; weights
under the wrong activation. Files of weights and Delta-CLIP's folder stand in test_models.py."""

import json
import re

import open_clip
import pytest
import torch
import transformers
from conftest import TINY, metrics, refusal, shell
from hub import connected
from safetensors.torch import load_file, save_file
from test_models import (
    CAPTIONS,
    assert_gives,
    features_of_open_clip,
    features_of_transformers,
    load,
    open_clip_train,
    other,  # noqa: F401 a fixture
    randomised,
    tecoa,
    tower_of,
)
from torch.nn import functional as F

import common
import evaluate

CONFIG = json.loads((TINY / "clip" / "open_clip_config.json").read_text())


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


# Folders


@pytest.mark.parametrize("kind", TOWERS)
def test_a_tower_that_is_no_transformer_is_a_row_as_a_folder_and_as_a_file(kind, tmp_path):
    config = small_config(**TOWERS[kind])
    write_open_clip(tmp_path, {}, config)
    model = open_clip.create_model(f"local-dir:{tmp_path}", load_weights=False).eval()
    write_open_clip(tmp_path, model.state_dict(), config)
    assert kind != "convnext" or any(name.startswith("visual.trunk.") for name in model.state_dict())
    torch.save(tecoa(tower_of(model.state_dict())), tmp_path / "tower.pt")
    images, texts, _ = features_of_open_clip(model, open_clip.SimpleTokenizer()(CAPTIONS))
    for words, source in [([], f"local-dir:{tmp_path}"), (["--model", f"local-dir:{tmp_path}"], tmp_path / "tower.pt")]:
        assert_gives(load(*words, source=source), images, texts)


@pytest.mark.parametrize(("hidden_act", "shards"), [("quick_gelu", 1), ("gelu", 3)])
def test_leafs_folder_is_a_row_with_transformers_own_features(hidden_act, shards, tmp_path, capsys):
    model = leaf_model(hidden_act=hidden_act)
    write_leaf(tmp_path, model, shards)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards > 1)
    assert_gives(load(source=f"local-dir:{tmp_path}"), *features_of_transformers(model))
    if shards > 1:
        (shard,) = tmp_path.glob("model-00002-of-*.safetensors")
        shard.unlink()
        assert shard.name in refusal(capsys, lambda: load(source=f"local-dir:{tmp_path}"))


# What lies on a hub

BARE, SHARDED = "hf-hub:org/weights", "hf-hub:org/leaf-g"
NOT_ON_HUB = {
    f"{BARE}/none.pt": "the repository has no such file; weights in it: eps 4/tower.pt, two.pt, whole.pt",
    BARE: "for weights alone name their file, such as hf-hub:ORG/NAME/FILE.pt",
}


@pytest.fixture(scope="module")
def hub(other, tmp_path_factory):  # noqa: F811
    """A hub with a repository of bare files and a sharded model, its model, which this process may ask."""
    folder = tmp_path_factory.mktemp("hub")
    weights, leaf = folder / "weights", folder / "leaf"
    (weights / "eps 4").mkdir(parents=True)
    torch.save(tecoa(tower_of(other.state)), weights / "eps 4" / "tower.pt")
    torch.save(open_clip_train(other.state), weights / "whole.pt")
    before = {name: value / 1.05 for name, value in other.state.items()}
    torch.save({"model": other.state, "ema": before}, weights / "two.pt")
    model = leaf_model()
    write_leaf(leaf, model, shards=3)
    with connected({"models/org/weights": weights, "models/org/leaf-g": leaf}, folder / "home") as hub:
        hub.leaf = model
        yield hub


def test_from_a_hub_rows_and_pretrained_are_loaded_by_the_files_asked_for_alone(hub, other):  # noqa: F811
    def files():
        """The files downloaded since the last call, short answers aside."""
        requests, hub.requests[:] = hub.requests[:], []
        paths = [path for method, path, _, size in requests if method == "GET" and "/resolve/" in path and size > 2]
        return {re.sub(".*/resolve/[^/]+/", "", path) for path in paths}

    assert_gives(load(source=f"{BARE}/eps 4/tower.pt"), other.images, other.base_texts)
    assert files() == {"eps 4/tower.pt"}
    assert_gives(load(source=f"{BARE}/two.pt::model/"), other.images, other.texts)
    assert files() == {"two.pt"}
    assert_gives(load("--pretrained", f"{BARE}/two.pt::ema/"), other.base_images, other.base_texts, atol=1e-4)
    assert_gives(load("--pretrained", f"{BARE}/whole.pt"), other.images, other.texts)
    assert files() == {"whole.pt"}
    for words, source in (["--model", SHARDED], None), ([], SHARDED):
        assert_gives(load(*words, source=source), *features_of_transformers(hub.leaf))
    shards = {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    assert files() == {"config.json", "model.safetensors.index.json", *shards}


@pytest.mark.parametrize("source", NOT_ON_HUB)
def test_what_a_hub_repository_lacks_is_one_line_that_says_what_to_type(source, hub, capsys):
    args = evaluate.parse_args(["--preset", "tiny"])
    line = refusal(capsys, common.run_main, lambda args: common.load_clip(args, source), args)
    assert NOT_ON_HUB[source] in line


def test_a_file_on_a_hub_given_as_the_model_is_one_line_that_says_where_it_belongs(capsys):
    assert "give it as --pretrained" in refusal(capsys, load, "--model", f"{BARE}/tower.pt")


def test_a_row_that_cannot_be_opened_is_said_before_the_first_attack(tmp_path):
    torch.save({"model": {"cls_token": torch.zeros(1, 1, 8)}}, tmp_path / "advxl.pth")
    words = ["--preset", "smoke", "--trainings", "--qualities", "--output_dir", tmp_path / "runs" / "evaluation"]
    _, err = shell("evaluate.py", *words, "--checkpoint", f"AdvXL={tmp_path / 'advxl.pth'}", code=2)
    assert "advxl.pth: it holds 1 tensors" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


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
def activations(tmp_path, monkeypatch):
    """Files quick.pt, gelu.pt and tower.pt, the last two for GELU; names small-clip and small-clip-quickgelu."""
    state = load_file(TINY / "clip" / "open_clip_model.safetensors")
    quick, gelu = wanting(open_clip.transformer.QuickGELU(), state), wanting(F.gelu, state)
    for name, weights in {"quick": quick, "gelu": gelu, "tower": tower_of(gelu)}.items():
        torch.save(weights, tmp_path / f"{name}.pt")
    for registered in ("_MODEL_CONFIGS", "_MODEL_CONFIG_PATHS"):
        monkeypatch.setattr(open_clip.factory, registered, getattr(open_clip.factory, registered).copy())
    for name, quick_gelu in {"small-clip": False, "small-clip-quickgelu": True}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(CONFIG["model_cfg"] | {"quick_gelu": quick_gelu}))
        open_clip.add_model_config(tmp_path / f"{name}.json")
    monkeypatch.chdir(tmp_path)


def doubt(*words, source=None):
    """Return evaluate.py's note on the activation of a row of source, or of the original."""
    args = evaluate.parse_args(["--preset", "smoke", "--num_images", "8", *words])
    clip = common.load_clip(args, source)
    images = common.load_images(args, "eval", clip.geometry)
    row = evaluate.Row("x", clip, images.pixels, images.pixels, *evaluate.load_candidates(args.candidates, images))
    spec = evaluate.Spec("x", source, twin=clip.twin)
    return evaluate.doubt_activation(spec, {"activation": evaluate.compare_activations(row, 0)})


def test_weights_under_the_wrong_activation_are_marked_in_the_table_with_the_name_to_type(activations, tmp_path):
    words = ["--preset", "smoke", "--num_images", 8, "--steps", 1, "--attack_steps", 1, "--trainings", "--qualities"]
    words += ["--model", "small-clip-quickgelu", "--pretrained", "quick.pt", "--checkpoint", "tower=tower.pt"]
    out, _ = shell("evaluate.py", *words, "--output_dir", "quick/evaluation")
    rows = metrics(tmp_path / "quick" / "evaluation")["rows"]
    assert {name: row["doubtful"] for name, row in rows.items()} == {"original": False, "tower": True}
    note = rows["tower"]["note"]
    own, other_margin = (float(number) for number in re.findall(r"-?\d\.\d{4}", note))
    assert other_margin > own
    assert note.endswith("its weights may want --model small-clip with a --pretrained that goes with it")
    assert "tower (?) (*)" in out and f"note: tower: {note}" in out


def test_weights_of_a_whole_model_under_the_wrong_activation_are_noted(activations):
    quick = ["--model", "small-clip-quickgelu", "--pretrained", "quick.pt"]
    assert doubt(*quick) is None
    assert "may want --model small-clip with" in doubt(*quick, source="gelu.pt")
    gelu = ["--model", "small-clip", "--pretrained", "quick.pt"]
    assert doubt(*gelu).endswith("its weights may want --model small-clip-quickgelu")
    assert doubt(*gelu, source="gelu.pt") is None


def test_a_file_for_a_folder_with_the_wrong_activation_is_noted_with_the_setting_to_change(activations, tmp_path):
    folder, setting = tmp_path / "clip", '"quick_gelu": false'
    write_open_clip(folder, load_file(TINY / "clip" / "open_clip_model.safetensors"))
    assert doubt("--model", "local-dir:clip", source="quick.pt") is None
    note = doubt("--model", "local-dir:clip", source="gelu.pt")
    assert note.endswith(f"a copy of local-dir:clip with {setting} in its open_clip_config.json")
    config = (folder / "open_clip_config.json").read_text()
    (folder / "open_clip_config.json").write_text(config.replace('"quick_gelu": true', setting))
    assert doubt("--model", "local-dir:clip", source="gelu.pt") is None
    assert doubt("--model", "local-dir:clip", source="quick.pt")


def test_for_a_folder_of_transformers_the_setting_to_change_is_in_its_own_words(tmp_path):
    write_leaf(tmp_path, leaf_model(hidden_act="gelu"))
    file = tmp_path / "model.safetensors"
    twin = load("--model", f"local-dir:{tmp_path}", "--pretrained", file).twin
    assert twin.endswith('with "hidden_act": "quick_gelu", twice, in its config.json')
