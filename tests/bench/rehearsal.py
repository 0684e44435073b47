"""README's command for published robust models, rehearsed on tiny stand-ins from a loopback hub. Minutes on a CPU.

    python tests/bench/rehearsal.py                      # exit code 1 unless every row is measured
    python tests/bench/rehearsal.py --attack_steps 75    # further flags of evaluate.py

Each repository of the command is served under its own name, as the container that its authors write: most hold the
tiny CLIP with weights of their own, Delta-CLIP and ConvNeXt random weights, which the table marks (?). The flags are
those of README.md; only the preset, a smaller attack and the output folder are added. First a file that the hub lacks
is asked for as one more row; then the command is killed after a few rows, and given again.
"""

import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import open_clip  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from hub import serve_hub  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from test_containers import CONFIG, TINY, TOWERS, small_config, write_leaf, write_open_clip  # noqa: E402
from test_models import tecoa, tower_of, write_bert, write_delta_clip  # noqa: E402

import common  # noqa: E402

SMALL = ["--preset", "tiny", "--num_images", "16", "--steps", "5", "--attack_steps", "5"]
ROWS_BEFORE_KILL = 4


def readme_command():
    """Return the words of README's command, its only one of several lines."""
    (command,) = re.findall(r"^    python (evaluate\.py (?:.*\\\n)+.*)$", (ROOT / "README.md").read_text(), re.M)
    command = re.sub(r"\$\(cat (\S+)\)", lambda match: (ROOT / match[1]).read_text(), command.replace("\\\n", " "))
    return shlex.split(command)


def as_transformers(state, hidden_act):
    """Return the tiny CLIP as a transformers CLIPModel."""
    model_cfg, parts = CONFIG["model_cfg"], {}
    for part in ("text", "vision"):
        theirs = model_cfg[f"{part}_cfg"]
        heads = theirs.get("heads") or theirs["width"] // theirs["head_width"]
        parts[f"{part}_config"] = {"hidden_size": theirs["width"], "intermediate_size": 4 * theirs["width"]}
        parts[f"{part}_config"] |= {"num_hidden_layers": theirs["layers"], "num_attention_heads": heads}
        parts[f"{part}_config"] |= {"hidden_act": hidden_act}
    parts["text_config"] |= {"max_position_embeddings": model_cfg["text_cfg"]["context_length"], "eos_token_id": 49407}
    parts["vision_config"] |= {key: model_cfg["vision_cfg"][key] for key in ("image_size", "patch_size")}
    model = transformers.CLIPModel(transformers.CLIPConfig(projection_dim=model_cfg["embed_dim"], **parts))
    theirs, places, count = model.state_dict(), {}, 0
    for name, tensor in theirs.items():  # every number is replaced by its place, which renaming then carries to ours
        places[name] = torch.arange(count, count + tensor.numel()).view(tensor.shape)
        count += tensor.numel()
    values = torch.zeros(count)
    for name, place in common.rename_from_transformers(places).items():
        if name in state:
            values[place.flatten()] = state[name].flatten()
    model.load_state_dict({name: values[place] for name, place in places.items()})
    return model


def write_repositories(names, folder):
    """Write a stand-in of each repository, ORG/NAME: {its key of serve_hub(): folder}."""
    tiny = load_file(TINY / "clip" / "open_clip_model.safetensors")
    torch.manual_seed(0)
    for number, name in enumerate(sorted(names), 1):
        state = {key: value.float() * (1 + 0.004 * number) for key, value in tiny.items()}
        repo = folder / name
        repo.mkdir(parents=True)
        if name.startswith("LEAF-CLIP/"):
            large = "ViT-g" in name
            write_leaf(repo, as_transformers(state, "gelu" if large else "quick_gelu"), shards=3 if large else 1)
        elif name.startswith("zw123/"):
            write_delta_clip(repo)
        elif name == "hossainzarif19/SimCLIP":
            for radius in (2, 4):
                scaled = {key: value * (1 - 0.004 * radius) for key, value in state.items()}
                torch.save(tower_of(scaled), repo / f"simclip{radius}.pt")
        elif name == "futakw/clip-qt-aft":
            for size in ("B-16", "L-14"):
                torch.save(tecoa(tower_of(state)), repo / f"CLIP-ViT-{size}_QTAFT_eps4.pt")
        elif "convnext" in name:
            config = small_config(**TOWERS["convnext"])
            write_open_clip(repo, {}, config)
            model = open_clip.create_model(f"local-dir:{repo}", load_weights=False)
            write_open_clip(repo, model.state_dict(), config)
        else:
            write_open_clip(repo, state)
    bert = folder / "google-bert" / "bert-base-uncased"
    bert.mkdir(parents=True)
    write_bert(bert)
    return {f"models/{path.parent.name}/{path.name}": path for path in folder.glob("*/*")}


def start(words, env):
    command = [sys.executable, str(ROOT / words[0]), *words[1:]]
    return subprocess.Popen(command, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def main(further):
    logging.disable(logging.WARNING)  # open_clip says of each model that it has no weights yet
    command = readme_command()
    rows = [word.partition("=")[0] for before, word in zip(command, command[1:]) if before == "--checkpoint"]
    names = {name[0] for name in re.findall(r"hf-hub:([^/ ]+/[^/ ]+)()", " ".join(command))}
    with tempfile.TemporaryDirectory() as folder, serve_hub(write_repositories(names, Path(folder, "hub"))) as hub:
        out = Path(folder, "robust", "evaluation")
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": f"{folder}/home", "HF_HUB_OFFLINE": "0"}
        words = [*command, *SMALL, "--output_dir", str(out), "--cache_dir", f"{folder}/cache", *further]

        print(f"$ {shlex.join(['python', *words])}\n", flush=True)
        broken = start([*words, "--checkpoint", "Sim-CLIP8=hf-hub:hossainzarif19/SimCLIP/simclip8.pt"], env)
        said = broken.communicate()[1].strip()
        print(f"with a row that the hub lacks, exit code {broken.returncode} and\n{said}\n", flush=True)
        refused = broken.returncode == 2 and len(said.splitlines()) == 1 and not out.parent.exists()

        killed = start(words, env)
        while killed.poll() is None and len([*out.glob("rows/*.json")]) < ROWS_BEFORE_KILL:
            time.sleep(0.2)
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        print(f"the command, killed after {len([*out.glob('rows/*.json')])} rows; given again:\n", flush=True)

        again = start(words, env)
        printed, said = again.communicate()
        print(printed, said, (out / "table.md").read_text() if again.returncode == 0 else "", sep="\n")
        measured = json.loads((out / "metrics.json").read_text())["rows"] if again.returncode == 0 else {}
    ended = refused and killed.returncode == -signal.SIGKILL and {*measured} == {"original", *rows}
    print("the rehearsal", "succeeded" if ended else "failed")
    return not ended


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
