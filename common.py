"""The instrument that the five scripts share: flags, runs, CLIP, MMEB, the attack, training.

Words and units, the same everywhere:
    images          (B, 3, H, W) float32 pixels in [0, 1], after resize and centre crop, before CLIP's normalisation
    pixels          the same as uint8 grey levels; images_adv, pixels_adv are the attacked ones
    eps, alpha      L-inf radius and step size on the [0, 1] scale: 8/255, not 8
    image_features  (B, D) float32, unit norm; text_features likewise
    logit_scale     the multiplier of the cosine (about 100), not its logarithm
    similarity      cosine of an image and its own caption
"""

import argparse
import hashlib
import io
import json
import logging
import math
import os
import platform
import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from fractions import Fraction
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import datasets
import huggingface_hub
import numpy as np
import open_clip
import torch
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image
from torch.nn import functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
TINY = ROOT / "tests" / "tiny"
PRESETS = {  # defaults of every flag that depends on the size of the experiment; a flag given overrides them
    "report": {
        "model": "ViT-L-14-quickgelu",
        "pretrained": "openai",
        "train_data": "TIGER-Lab/MMEB-train",
        "eval_data": "TIGER-Lab/MMEB-eval",
        "num_images": {"train": 5000, "eval": 100},
        "batch_size": {"train": 16, "attack": 64},
        "val_images": 250,
        "lr": 1e-5,
        "online_lr": 1e-5,
        "epochs": 3,
    },
    "tiny": {
        "model": f"local-dir:{TINY}/clip",
        "pretrained": "",
        "train_data": f"{TINY}/MMEB-train",
        "eval_data": f"{TINY}/MMEB-eval",
        "num_images": {"train": 640, "eval": 100},
        "batch_size": {"train": 16, "attack": 50},
        "val_images": 40,
        "lr": 1e-4,
        "online_lr": 2e-4,
        "epochs": 3,
    },
}

# ---------------------------------------------------------------------------------------------------------------------
# Flags


def fail(message):
    """End with one line that says what is wrong, where, and what to do; exit code 2."""
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def pixel_distance(text):
    """argparse type for a distance on the [0, 1] pixel scale, above 0: '8/255' or '0.0314'."""
    try:
        value = float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number or a fraction such as 8/255")
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is outside (0, 1]; for {text} grey levels write {text}/255")
    return value


def number(low, high=math.inf, kind=int):
    """argparse type: an int, or another kind, from low to high; a float's low itself is excluded."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or not math.isfinite(value) or (kind is float and value == low):
            limits = f"above {low}" if kind is float else f"of at least {low}"
            limits += f" and at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number {limits}")
        return value

    return convert


def make_parser(doc):
    """A parser with the flags that every script has; --preset gives most of their defaults."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    group = parser.add_argument_group("run")
    group.add_argument("--preset", choices=PRESETS, default="report", help="sets defaults of the flags below (report)")
    group.add_argument("--output_dir", help="folder for everything written (default: %(default)s)")
    group.add_argument("--overwrite", action="store_true", help="replace a finished run in --output_dir")
    group.add_argument("--seed", type=number(0, 2**31), default=0, help="of all random numbers (default: %(default)s)")
    group.add_argument("--device", default="auto", help="cuda, cuda:1, mps, cpu, or auto: the first there is (auto)")

    group = parser.add_argument_group("model")
    group.add_argument("--model", help="open_clip name, local-dir:DIR or hf-hub:ORG/NAME (default: %(default)s)")
    group.add_argument(
        "--pretrained",
        help="open_clip tag, a checkpoint file, or 'random' for untrained weights, to measure speed and memory "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16"],
        default="auto",
        help="of the image tower; cosine and iterate are fp32 always. auto: bf16 on a GPU with it, else fp32 (auto)",
    )

    group = parser.add_argument_group("data")
    layout = "hub id or local folder in MMEB's layout (default: %(default)s)"
    group.add_argument("--train_data", help=f"training set, {layout}")
    group.add_argument("--eval_data", help=f"evaluation set, {layout}")
    group.add_argument("--image_root", help="folder of unpacked images, used in place of the data set's zips (none)")
    group.add_argument("--num_images", type=number(1), help="images to use, the first ones (default: %(default)s)")
    group.add_argument("--sample_seed", type=number(0), help="draw the images at random with this seed instead (none)")
    group.add_argument("--skip_bad_images", action="store_true", help="leave broken images out and count them")
    group.add_argument("--batch_size", type=number(1), help="images at a time (default: %(default)s)")
    group.add_argument("--num_workers", type=number(1), default=os.cpu_count(), help="threads (default: %(default)s)")
    group.add_argument("--cache_dir", default="runs/cache", help="for decoded images, uint8 (default: %(default)s)")

    group = parser.add_argument_group("attack: L-inf, pixels in [0, 1], before CLIP's normalisation")
    group.add_argument("--eps", type=pixel_distance, default="8/255", help="radius (default: %(default)s)")
    group.add_argument("--alpha", type=pixel_distance, default="2/255", help="step size (default: %(default)s)")
    group.add_argument("--steps", type=number(1), default=20, help="gradient steps (default: %(default)s)")
    return parser


def add_train_args(parser):
    """Flags read by train()."""
    group = parser.add_argument_group("training")
    group.add_argument("--lr", type=number(0, kind=float), help="learning rate of AdamW (default: %(default)s)")
    group.add_argument(
        "--weight_decay", type=number(-1e-9, kind=float), default=0.1, help="on matrices (default: %(default)s)"
    )
    group.add_argument("--epochs", type=number(1), help="passes over the training images (default: %(default)s)")
    group.add_argument("--max_steps", type=number(1), help="stop after so many optimizer steps (default: no limit)")
    group.add_argument("--warmup_steps", type=number(0), default=0, help="of linear warm-up (default: %(default)s)")
    group.add_argument(
        "--grad_clip", type=number(0, kind=float), default=1.0, help="largest gradient norm (default: %(default)s)"
    )
    group.add_argument(
        "--num_negatives", type=number(0), default=512, help="further captions in the loss (default: %(default)s)"
    )
    group.add_argument(
        "--loss_threshold",
        type=number(0, kind=float),
        help="stop when the mean loss of the last --loss_window steps is below it; one batch of 16 alone is noise "
        "(default: never)",
    )
    group.add_argument("--loss_window", type=number(1), default=50, help="steps averaged (default: %(default)s)")
    group.add_argument(
        "--val_images",
        type=number(1),
        help="further training images; the best epoch is chosen by their white-box similarity (default: %(default)s)",
    )


def parse_flags(parser, argv, *, stage, images, batch):
    """Parse with the preset's defaults.

    stage    name of the default output folder under runs/<preset>/; {split} stands for the flag --split
    images   'train' or 'eval': which of the preset's image counts is --num_images' default; {split} likewise
    batch    'train' or 'attack': likewise for --batch_size
    """
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--preset", choices=PRESETS, default="report")
    chooser.add_argument("--split", default="train")
    chooser.add_argument("--model", default="")
    chosen = chooser.parse_known_args(argv)[0]
    defaults = dict(PRESETS[chosen.preset], output_dir=f"runs/{chosen.preset}/{stage.format(split=chosen.split)}")
    counts, sizes = defaults["num_images"], defaults["batch_size"]
    defaults |= {"num_images": counts.get(images.format(split=chosen.split)), "batch_size": sizes[batch]}
    defaults |= {"num_train_images": counts["train"], "train_batch_size": sizes["train"]}
    if chosen.model.startswith(("local-dir:", "hf-hub:")):
        defaults["pretrained"] = ""  # such a model brings its weights
    known = vars(parser.parse_args([]))
    parser.set_defaults(**{key: value for key, value in defaults.items() if key in known})
    args = parser.parse_args(argv)
    if grey_levels(args.eps) < 1:
        parser.error(f"--eps {args.eps:g} is under one grey level, 1/255: no 8-bit image is inside that ball")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Runs: one output folder each; metrics.json is written last and marks the folder complete

NOT_IN_RESULT = {"output_dir", "overwrite", "num_workers", "cache_dir", "reproduce"}  # flags that change no number


class Run:
    """Bookkeeping of one script: checks what can be checked early, refuses to overwrite, times, writes metrics.json.

    A finished run with the same flags and inputs ends the script at once with exit code 0; with others it is an error
    unless --overwrite is given.

    inputs   folders of other runs that this one reads
    show     what to print of a finished run's metrics.json, (record) -> text
    """

    def __init__(self, args, inputs=(), show=None):
        self.args, self.dir = args, Path(args.output_dir)
        self.started, self.clock = datetime.now(timezone.utc), time.perf_counter()
        self.inputs = {folder.name: read_json(folder / "metrics.json")["started"] for folder in inputs}
        done = self.dir / "metrics.json"
        if done.exists() and not args.overwrite:
            record = read_json(done)
            differing = differing_flags(record["args"], vars(args))
            if differing:
                fail(f"{self.dir} holds a finished run with other flags ({differing}): --overwrite replaces it")
            if record["inputs"] != self.inputs:
                fail(f"{self.dir} was made from another run of {', '.join(self.inputs)}: --overwrite makes it anew")
            print(show(record) + "\n" if show else "", end="")
            print(f"{self.dir} is complete and was made with these flags: nothing to do (--overwrite runs it again)")
            raise SystemExit(0)
        pick_device(args.device)
        find_weights(args.model, args.pretrained)
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            write_json(self.dir / ".write_test", {})
            (self.dir / ".write_test").unlink()
        except OSError as error:
            fail(f"cannot write to --output_dir {self.dir}: {error.strerror}")

    def begin(self):
        """To be called before the first file is written: from here to finish() the folder is not complete."""
        (self.dir / ".run").touch()  # this folder is ours
        (self.dir / "metrics.json").unlink(missing_ok=True)

    def seconds(self):
        return time.perf_counter() - self.clock

    def finish(self, device, **metrics):
        """Write metrics.json: how the run was made, then the script's own figures."""
        versions = {module.__name__: module.__version__ for module in (torch, torchvision, open_clip, datasets, np)}
        on_gpu = device.type == "cuda"
        record = {
            "argv": sys.argv,
            "args": vars(self.args),
            "inputs": self.inputs,
            "commit": git_commit(),
            "versions": versions | {"python": platform.python_version()},
            "device": f"{device} ({torch.cuda.get_device_name(device) if on_gpu else platform.machine()})",
            "started": self.started.isoformat(),
            "seconds": round(self.seconds(), 3),
            "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else peak_memory(),
        }
        write_json(self.dir / "metrics.json", record | metrics)


def peak_memory():
    """Largest resident size of this process, bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the process that started this one
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def differing_flags(old, new):
    """The flags whose value changed, as one text; empty when the two runs give the same numbers."""
    old, new = (json.loads(json.dumps(flags)) for flags in (old, new))  # tuples compare as lists
    keys = sorted((old.keys() | new.keys()) - NOT_IN_RESULT)
    return ", ".join(f"--{k} {old.get(k)} -> {new.get(k)}" for k in keys if old.get(k) != new.get(k))


def git_commit():
    """The commit of this checkout, '-dirty' if a tracked file was changed, or None outside git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def require_disk(folder, need):
    """End unless the folder's disk has that many bytes free."""
    free = shutil.disk_usage(folder).free
    if free < need:
        fail(f"{folder} needs about {need / 1e9:.2f} GB and has {free / 1e9:.2f} GB free: make room first")


def replace_file(path, write):
    """write(temporary path), flushed to disk, then renamed to path: path is whole or not there."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_text(path, text):
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fail(f"{path} cannot be read as JSON: {error}")


def run_script(words):
    """Print a command as a user would type it, run it, and end with its exit code if it fails."""
    print(f"\n$ python {shlex.join(words)}", flush=True)
    code = subprocess.run([sys.executable, str(ROOT / words[0]), *words[1:]]).returncode
    if code:
        raise SystemExit(code)


def progress(iterable, what, total=None, unit="image"):
    """A progress bar with rate and ETA, shown once something takes longer than two seconds."""
    log = not sys.stderr.isatty()  # there, a line now and then
    return tqdm(iterable, what, total, unit=unit, delay=2, mininterval=30 if log else 0.2, ncols=79, leave=log)


# ---------------------------------------------------------------------------------------------------------------------
# CLIP


class Clip(torch.nn.Module):
    """An open_clip model that takes pixels and captions.

    model        open_clip's CLIP or CustomTextCLIP
    arch         the name that it was built from; travels in checkpoints
    train_ids    COCO ids that its checkpoint was trained on, a set
    """

    def __init__(self, model, tokenizer, arch, device, precision, train_ids):
        super().__init__()
        self.model, self.tokenizer, self.arch, self.device = model.to(device).eval(), tokenizer, arch, device
        self.bf16 = precision == "bf16" or (
            precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        )
        preprocess = open_clip.get_model_preprocess_cfg(model)
        if (preprocess["resize_mode"], preprocess["interpolation"]) != ("shortest", "bicubic"):
            fail(f"{arch} wants {preprocess['interpolation']} {preprocess['resize_mode']} resizing; images here are "
                 "resized bicubically on the short side and centre-cropped")  # fmt: skip
        self.register_buffer("mean", torch.tensor(preprocess["mean"], device=device).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(preprocess["std"], device=device).view(3, 1, 1))
        self.text_cache, self.train_ids = {}, train_ids

    @property
    def logit_scale(self):
        return self.model.logit_scale.detach().exp()

    def encode_image(self, images):
        """(B, 3, H, W) float32 in [0, 1] -> (B, D) float32, unit norm; differentiable in images and weights.

        bf16 is for gradients alone: features that are scored, under torch.no_grad(), are fp32 whatever --precision.
        """
        bf16 = self.bf16 and torch.is_grad_enabled()
        tower = fast_tower(self.model.visual, self.mean, self.std, torch.bfloat16 if bf16 else torch.float32, held=False)
        if tower:
            return F.normalize(tower(images).float(), dim=-1)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            image_features = self.model.encode_image((images - self.mean) / self.std)
        return F.normalize(image_features.float(), dim=-1)

    def frozen(self):
        """encode_image with the present weights held fixed, differentiable in the images alone: for attacks."""
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        tower = fast_tower(self.model.visual, self.mean, self.std, dtype, held=True)
        return (lambda images: F.normalize(tower(images).float(), dim=-1)) if tower else self.encode_image

    @torch.no_grad()
    def encode_text(self, captions):
        """List of B strings -> (B, D) float32, unit norm. Each caption is computed once, in fp32, and kept."""
        missing = list(dict.fromkeys(c for c in captions if c not in self.text_cache))
        for start in range(0, len(missing), 256):
            chunk = missing[start : start + 256]
            features = F.normalize(self.model.encode_text(self.tokenizer(chunk).to(self.device)).float(), dim=-1)
            self.text_cache.update(zip(chunk, features))
        return torch.stack([self.text_cache[c] for c in captions])


def fast_tower(visual, mean, std, dtype, held):
    """An exact, faster form of open_clip's plain VisionTransformer.

    The same function, rearranged: normalisation folded into a patch embedding done as one product, one product for
    q, k and v, scaled_dot_product_attention, the last block for the class token only, QuickGELU as a scaled SiLU.
    held      the weights are constants: differentiable in the pixels alone; else in the weights, too
    returns   (B, 3, H, W) in [0, 1] -> (B, D), not normalised; None for a tower that is not of the plain kind
    """
    plain = type(visual) is open_clip.transformer.VisionTransformer and visual.attn_pool is None
    plain = plain and visual.pool_type == "tok" and not visual.final_ln_after_pool and not visual.output_tokens
    blocks = list(visual.transformer.resblocks) if plain else []
    for block in blocks:
        identities = isinstance(block.ls_1, torch.nn.Identity) and isinstance(block.ls_2, torch.nn.Identity)
        activation = type(block.mlp.gelu) in (torch.nn.GELU, open_clip.transformer.QuickGELU)
        plain = plain and type(block) is open_clip.transformer.ResidualAttentionBlock and identities and activation
    if not plain or not isinstance(visual.patch_dropout, torch.nn.Identity):
        return None
    width, patch, heads = len(visual.class_embedding), visual.patch_size[0], blocks[0].attn.num_heads

    def fixed(*tensors):
        return [(tensor.detach() if held else tensor).to(dtype) for tensor in tensors]

    def norm(layer):
        weights = fixed(layer.weight, layer.bias) if isinstance(layer, torch.nn.LayerNorm) else None
        return lambda x: F.layer_norm(x, (width,), *weights, layer.eps) if weights else x

    kernel = visual.conv1.weight / std  # (W, 3, P, P)
    embed = fixed(kernel.flatten(1), -(kernel * mean).sum((1, 2, 3)))
    (token, position, projection) = fixed(visual.class_embedding, visual.positional_embedding, visual.proj)
    before, after, layers = norm(visual.ln_pre), norm(visual.ln_post), []
    for block in blocks:
        quick = isinstance(block.mlp.gelu, open_clip.transformer.QuickGELU)  # x sigmoid(ax) = silu(ax) / a
        scale, activation = (1.702, F.silu) if quick else (1.0, F.gelu)
        first, last, attention = block.mlp.c_fc, block.mlp.c_proj, block.attn
        qkv = fixed(attention.in_proj_weight, attention.in_proj_bias)
        out = fixed(attention.out_proj.weight, attention.out_proj.bias)
        mlp = fixed(first.weight * scale, first.bias * scale, last.weight / scale, last.bias)
        layers.append((norm(block.ln_1), norm(block.ln_2), *qkv, *out, *mlp, activation))

    def split(x):  # (B, N, k W) -> k of (B, heads, N, W / heads)
        return x.unflatten(2, (-1, heads, width // heads)).permute(2, 0, 3, 1, 4).unbind(0)

    def encode(images):
        x = images.to(dtype).unfold(2, patch, patch).unfold(3, patch, patch)  # (B, 3, h, w, P, P)
        x = F.linear(x.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2), *embed)  # (B, hw, W)
        x = before(torch.cat([token.expand(len(x), 1, -1), x], 1) + position)
        for i, (norm_1, norm_2, w_qkv, b_qkv, w_out, b_out, w_1, b_1, w_2, b_2, activation) in enumerate(layers):
            y = norm_1(x)
            if i < len(layers) - 1:
                q, k, v = split(F.linear(y, w_qkv, b_qkv))
            else:
                x = x[:, :1]
                (q,) = split(F.linear(y[:, :1], w_qkv[:width], b_qkv[:width]))
                k, v = split(F.linear(y, w_qkv[width:], b_qkv[width:]))
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + F.linear(y, w_out, b_out)
            x = x + F.linear(activation(F.linear(norm_2(x), w_1, b_1)), w_2, b_2)
        return after(x[:, 0]) @ projection

    return encode


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {name} is not usable here: {describe(error)}")


def model_config(name):
    """open_clip's model configuration of a name, local-dir: or hf-hub:."""
    try:
        config = open_clip.get_model_config(name)
    except Exception as error:  # the hub's client raises a class of its own for each thing missing
        fail(f"--model {name}: no open_clip_config.json to be had: {describe(error)}")
    if config is None:
        fail(f"--model {name}: open_clip has no such model; open_clip.list_models() lists them, and local-dir:DIR or "
             "hf-hub:ORG/NAME work too")  # fmt: skip
    return config


def find_weights(name, pretrained):
    """What --pretrained means for --model: (tag, None), (None, file), or (None, None) for the model's own or none.

    Ends with one line if it is neither tag nor file, or if a tag was trained with the other activation, of which
    open_clip itself only warns, giving wrong features.
    """
    quick = bool(model_config(name).get("quick_gelu", False))
    has_schema = name.startswith(("local-dir:", "hf-hub:"))
    if pretrained == "random" or (has_schema and not pretrained):
        return None, None
    tag = None if has_schema else open_clip.get_pretrained_cfg(name, pretrained or "")
    if tag and bool(tag.get("quick_gelu", False)) != quick:
        other = name.removesuffix("-quickgelu") if quick else f"{name}-quickgelu"
        fail(f"--pretrained {pretrained} and --model {name} disagree on QuickGELU: use --model {other}")
    if not tag and not Path(pretrained or "").is_file():
        known = "" if has_schema else f" (its tags: {', '.join(open_clip.list_pretrained_tags_by_model(name))})"
        fail(f"--pretrained {pretrained!r} is neither a tag of {name} nor a file{known}; 'random' is untrained")
    return (pretrained, None) if tag else (None, Path(pretrained))


def load_clip(args, source=None):
    """The CLIP of --model and --pretrained; with source, another: local-dir:, hf-hub:, or a file of weights for it.

    The file is a checkpoint, or the state dict of a visual tower alone, which keeps the text tower of --pretrained.
    """
    name, pretrained, over = args.model, args.pretrained, source and Path(source)
    if source and source.startswith(("local-dir:", "hf-hub:")):
        name, pretrained, over = source, "", None
    tag, file = find_weights(name, pretrained)
    own = bool(tag) or pretrained == ""
    torch.manual_seed(args.seed)  # random weights are the same in every script
    logging.disable(logging.WARNING)  # that weights were not loaded yet, or not asked for
    try:
        model = open_clip.create_model(name, pretrained=tag, load_weights=own, require_pretrained=own)
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # files, hub and configuration each raise their own
        fail(f"cannot load {name} {pretrained}: {describe(error)}")
    finally:
        logging.disable(logging.NOTSET)
    train_ids = load_checkpoint(model, name, file) if file else set()
    train_ids |= load_checkpoint(model, name, over, tower_alone=True) if over else set()
    sizes = [model_config(n)["vision_cfg"].get("image_size", 224) for n in (name, args.model)]
    if sizes[0] != sizes[1]:
        fail(f"{name} takes images of {sizes[0]} pixels and --model {args.model} of {sizes[1]}: one table, one size")
    return Clip(model, tokenizer, name, pick_device(args.device), args.precision, train_ids)


def load_checkpoint(model, name, file, tower_alone=False):
    """Fill model from a .pt or .safetensors file without running code in it; returns the COCO ids it was trained on.

    tower_alone   the file may hold the visual tower alone; the text tower is then the model's
    """
    try:
        if file.suffix == ".safetensors":
            checkpoint = open_clip.factory.load_state_dict(str(file))
        else:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        state, quick = checkpoint.get("state_dict", checkpoint), checkpoint.get("quick_gelu")
        if quick is not None and quick != bool(model_config(name).get("quick_gelu", False)):
            fail(f"{file} was made {'with' if quick else 'without'} QuickGELU and --model {name} is not: use its twin")
        twin = name.removesuffix("-quickgelu") if name.endswith("-quickgelu") else f"{name}-quickgelu"
        if quick is None and twin in open_clip.list_models():
            print(f"note: {file} does not say whether it wants {name} or {twin} (OpenAI's are -quickgelu)")
        if state.keys() == model.visual.state_dict().keys():
            if not tower_alone:
                fail(f"{file} is a visual tower alone: give it as evaluate.py --checkpoint NAME={file}")
            model.visual.load_state_dict(state)
        else:
            open_clip.load_checkpoint(model, str(file))
        return {int(i) for i in checkpoint.get("train_ids", ())}
    except Exception as error:  # a damaged, foreign or hostile file raises anything, pickle's errors included
        fail(f"{file} is no checkpoint of plain tensors for {name}, and is not used: {describe(error)}")


def describe(error):
    """An error and its cause in one line, with what to set when a hub cannot be reached."""
    text = f"{type(error).__name__}: {error}"
    text += f" ({error.__cause__})" if error.__cause__ else ""
    hub = re.search(r"(?i)connect|offline|resolv|timed? ?out|couldn't reach|hub|max retries", text)
    advice = "; for the hub set HF_ENDPOINT, HF_TOKEN or HF_HOME, or give a local folder" if hub else ""
    return " ".join(text.split())[:300] + advice


# ---------------------------------------------------------------------------------------------------------------------
# MMEB: TIGER-Lab/MMEB-train and MMEB-eval

CONFIG = "MSCOCO_i2t"
SPLITS = {  # split, image column, caption column (a list has the positive first), start of the file names kept
    "train": ("original", "qry_image_path", "pos_text", "COCO_train2014_"),
    "eval": ("test", "qry_img_path", "tgt_text", "COCO_"),
}


@dataclass
class Examples:
    """Images with one caption each, in data-set order."""

    pixels: np.ndarray  # (N, 3, S, S) uint8
    captions: list[str]
    coco_ids: list[int]
    names: list[str]  # file names
    skipped: list[str]  # paths of broken images left out

    def __len__(self):
        return len(self.captions)

    def part(self, start, stop):
        lists = [values[start:stop] for values in (self.pixels, self.captions, self.coco_ids, self.names)]
        return Examples(*lists, self.skipped)


def as_images(pixels, device):
    """uint8 (B, 3, H, W), numpy or tensor -> float32 in [0, 1] on the device."""
    pixels = torch.from_numpy(np.array(pixels)) if isinstance(pixels, np.ndarray) else pixels
    return pixels.to(device).float() / 255


def open_split(args, split):
    """A split: its flag for messages, its table, and (row, image path, COCO id) of each distinct image."""
    source, (split_name, image_column, caption_column, wanted) = getattr(args, f"{split}_data"), SPLITS[split]
    flag = f"--{split}_data {source}"
    if not os.path.isdir(source) and (os.path.exists(source) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source)):
        fail(f"{flag} is neither a local folder nor a hub id such as TIGER-Lab/MMEB-{split}")
    cache = None
    if os.path.isdir(source):  # datasets takes folders of one name for the same data, whatever they hold
        files = sorted([*Path(source).rglob("*.parquet"), Path(source) / "README.md"])
        stats = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.exists()]
        cache = str(Path(args.cache_dir) / "datasets" / hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:20])
        datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(source, CONFIG, split=split_name, cache_dir=cache)
    except Exception as error:  # datasets raises a class of its own for each missing thing
        fail(f"{flag}: cannot open config {CONFIG}, split {split_name}: {describe(error)}")
    for column in (image_column, caption_column):
        if column not in table.column_names:
            fail(f"{flag}: split {split_name} has no column {column}; it has {', '.join(table.column_names)}")
    rows, seen = [], set()
    for row, path in enumerate(table[image_column]):
        match = re.fullmatch(r"COCO_(?:train|val)2014_(\d+)\.jpe?g", PurePosixPath(path or "").name)
        if not match:
            fail(f"{flag}: row {row}: {image_column} {path!r} is not the path of a COCO 2014 image")
        if match[0].startswith(wanted) and match[1] not in seen:
            seen.add(match[1])
            rows.append((row, path, int(match[1])))
    if args.sample_seed is not None:
        rows = [rows[i] for i in np.random.default_rng(args.sample_seed).permutation(len(rows))]
    return flag, table, rows


def load_examples(args, split, count):
    """The first count distinct images of a split, with captions, decoded at the size of --model.

    Geometry, the same for clean and adversarial images: PIL bicubic resize of the short side, centre crop, uint8.
    Decoded once: kept under --cache_dir as one uint8 array, memory-mapped.
    """
    flag, table, rows = open_split(args, split)
    if len(rows) < count:
        kind = "train2014 images" if split == "train" else "images"
        fail(f"{flag} has {len(rows)} distinct {kind} and {count} are needed: ask for fewer")
    rows, column = rows[:count], SPLITS[split][2]
    captions = table.select([row for row, _, _ in rows])[column]
    captions = [text[0] if isinstance(text, list) and text else text for text in captions]
    for (row, _, _), text in zip(rows, captions):
        if not isinstance(text, str) or not text.strip():
            fail(f"{flag}: row {row}: {column} is empty")
    size = model_config(args.model)["vision_cfg"].get("image_size", 224)
    if not isinstance(size, int):
        fail(f"--model {args.model} takes images of {size} pixels: only square inputs are supported")
    paths = [path for _, path, _ in rows]
    reader = ImageReader(getattr(args, f"{split}_data"), paths, args.image_root, fetch_all=split == "train")
    key = hashlib.sha256(json.dumps([reader.fingerprint, paths, size]).encode()).hexdigest()[:20]
    cache = Path(args.cache_dir) / f"{key}.npy"
    if not cache.with_suffix(".json").exists():
        decode_all(reader, size, cache, args)
    broken = read_json(cache.with_suffix(".json"))["broken"]
    if broken and not args.skip_bad_images:
        path, problem = next(iter(broken.items()))
        fail(f"{path}: broken image ({problem}), {len(broken)} in all; --skip_bad_images leaves them out")
    if broken:
        print(f"{flag}: {len(broken)} broken images left out, the first {next(iter(broken))}")
    kept = [i for i, path in enumerate(paths) if path not in broken]
    return Examples(
        pixels=np.load(cache, mmap_mode="r")[: len(kept)],
        captions=[captions[i].strip() for i in kept],
        coco_ids=[rows[i][2] for i in kept],
        names=[PurePosixPath(paths[i]).name for i in kept],
        skipped=list(broken),
    )


def decode_all(reader, size, cache, args):
    """Decode the reader's images into one uint8 array; the .json beside it, written last, names the broken ones."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    shape = (len(reader.paths), 3, size, size)
    require_disk(cache.parent, 1.1 * math.prod(shape))

    def decode(path):
        try:
            data = reader.read(path)
        except (zipfile.BadZipFile, zlib.error) as error:
            return None, describe(error)
        try:
            with Image.open(io.BytesIO(data)) as image:
                image = TF.resize(image.convert("RGB"), size, TF.InterpolationMode.BICUBIC)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            return None, describe(error)
        return np.asarray(TF.center_crop(image, size)).transpose(2, 0, 1), None

    good, broken = 0, {}
    temporary = cache.with_name(f".{cache.name}.{os.getpid()}")
    try:
        reader.open_archive()
        pixels = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
        with ThreadPoolExecutor(args.num_workers) as pool:
            decoded = zip(reader.paths, pool.map(decode, reader.paths))
            for path, (image, problem) in progress(decoded, "decode", len(reader.paths)):
                if problem and not args.skip_bad_images:
                    pool.shutdown(cancel_futures=True)
                    fail(f"{path}: broken image ({problem}); --skip_bad_images leaves such images out")
                if problem:
                    broken[path] = problem
                else:
                    pixels[good] = image
                    good += 1
        if not good:
            fail(f"none of the {len(reader.paths)} images could be decoded; {path}: {problem}")
        pixels.flush()
        os.replace(temporary, cache)
        write_json(cache.with_suffix(".json"), {"source": reader.fingerprint[0], "images": good, "broken": broken})
    except Exception as error:  # the network and the disk raise too many classes to list
        fail(f"cannot read the images of {reader.source}: {describe(error)}")
    finally:
        temporary.unlink(missing_ok=True)


class ImageReader:
    """Reads the images that the rows name, from unpacked folders or from the data set's zips, local or on the hub.

    paths        as in the rows
    image_root   folder of unpacked images to use instead of the source's, or None
    fetch_all    of a hub: download the whole archive once and read it in place; else fetch the needed members alone, by
                 range requests
    fingerprint  plain values that change when the files do
    """

    def __init__(self, source, paths, image_root, fetch_all):
        self.source, self.paths, self.fetch_all, self.local = source, paths, fetch_all, os.path.isdir(source)
        root = image_root or (source if self.local else None)
        if image_root and not os.path.isdir(image_root):
            fail(f"--image_root {image_root} is not a folder")
        self.files = {path: file for path in paths if root and (file := find_file(Path(root), path))}
        self.packed = [path for path in paths if path not in self.files]
        if image_root and self.packed:
            fail(f"--image_root {image_root} lacks {len(self.packed)} of {len(paths)} images, such as {self.packed[0]}")
        used = list(self.files.values())
        if self.packed and self.local:
            used += sorted(Path(source).rglob("*.zip"))
        self.fingerprint = [os.path.abspath(root) if root else source]
        self.fingerprint += [[file.stat().st_size, file.stat().st_mtime_ns] for file in used]

    def read(self, path):
        return self.files[path].read_bytes() if path in self.files else self.archive.read(self.members[path])

    def open_archive(self):
        """Find the zip that holds the images by looking into the repository's zips, the likeliest name first."""
        if not self.packed:
            return
        if self.local:
            names = [path.relative_to(self.source).as_posix() for path in Path(self.source).rglob("*.zip")]
        else:
            names = huggingface_hub.HfApi().list_repo_files(self.source, repo_type="dataset")
            names = [name for name in names if name.endswith(".zip")]

        def unlikeliness(name):
            stem = PurePosixPath(name).stem
            return stem != CONFIG, CONFIG not in stem, stem != "images", "coco" not in stem.lower(), name

        looked_into = []
        for name in sorted(names, key=unlikeliness):
            self.archive = zipfile.ZipFile(self.open_zip(name))
            self.members = match_members(self.packed, self.archive.namelist())
            if len(self.members) == len(self.packed):
                if self.fetch_all and not self.local:
                    self.archive = zipfile.ZipFile(
                        huggingface_hub.hf_hub_download(self.source, name, repo_type="dataset")
                    )
                return
            missing = next(path for path in self.packed if path not in self.members)
            looked_into.append(f"{name} has {len(self.members)} of them and not {missing}")
        fail(f"{self.source}: {len(self.packed)} images looked for, such as {self.packed[0]}; "
             f"{'; '.join(looked_into[:4]) or 'the repository holds no zip'}")  # fmt: skip

    def open_zip(self, name):
        if self.local:
            return Path(self.source) / name
        # blocks of about one image: a member's header and its bytes come in one request
        return huggingface_hub.HfFileSystem().open(f"datasets/{self.source}/{name}", "rb", block_size=2**16)


def find_file(root, path):
    """An unpacked image: at the row's path, below fewer of its leading folders, or in COCO's own folder; or None."""
    parts = PurePosixPath(path).parts
    tries = [root.joinpath(*parts[i:]) for i in range(len(parts))] + [root / parts[-1].split("_")[1] / parts[-1]]
    return next((file for file in tries if file.is_file()), None)


def match_members(paths, names):
    """For each row path the member of the same file name that shares most of its folders; no AppleDouble members."""

    def shared_folders(path, name):
        pairs = zip(reversed(PurePosixPath(path).parts), reversed(PurePosixPath(name).parts))
        return next((i for i, (a, b) in enumerate(pairs) if a != b), 99)

    by_file_name = {}
    for name in names:
        member = PurePosixPath(name)
        if not member.name.startswith("._") and "__MACOSX" not in member.parts:
            by_file_name.setdefault(member.name, []).append(name)
    found = {path: by_file_name.get(PurePosixPath(path).name) for path in paths}
    return {path: max(names, key=lambda name: shared_folders(path, name)) for path, names in found.items() if names}  # noqa: B023


def load_training_sets(args):
    """--num_images training images and the --val_images after them.

    Ends with one line unless no evaluation image is among them, by COCO id (all rows of the evaluation split) and by
    decoded pixels (the rows that the table uses).
    """
    both = load_examples(args, "train", args.num_images + args.val_images)
    flag, _, rows = open_split(args, "eval")
    shared = set(both.coco_ids) & {coco_id for _, _, coco_id in rows}
    if shared:
        fail(f"leakage: {len(shared)} COCO ids of {flag} are among the training images, such as {min(shared)}")
    used = load_examples(args, "eval", min(len(rows), PRESETS[args.preset]["num_images"]["eval"]))
    evaluation = {pixels.tobytes(): name for pixels, name in zip(used.pixels, used.names)}
    for pixels, name in zip(both.pixels, both.names):
        twin = evaluation.get(pixels.tobytes())
        if twin:
            fail(f"leakage: training image {name} has the same pixels as evaluation image {twin}")
    count = len(both) - args.val_images  # fewer than asked where broken images were left out
    return both.part(0, count), both.part(count, None)


# ---------------------------------------------------------------------------------------------------------------------
# The attack


class Attacked(NamedTuple):
    images: torch.Tensor  # (B, 3, H, W) float32: for each image the iterate of the highest loss
    loss: torch.Tensor  # (B,) that loss
    zero_grads: torch.Tensor  # (B,) steps whose gradient was zero in every pixel
    nonfinite: torch.Tensor  # (B,) steps whose loss or gradient was not finite


def pgd(loss_fn, images, *, eps, alpha, steps, noise=None, auto=False):
    """Search the L-inf ball around images for the pixels that maximise loss_fn.

    images       (B, 3, H, W) float32 in [0, 1], before CLIP's normalisation
    loss_fn      maps such a batch to (B,) losses, one per image, higher = worse for the model
    eps, alpha   on the same [0, 1] scale: 8/255, not 8
    noise        (B, 3, H, W) in [-1, 1]: the start is images + eps * noise; None starts at images
    auto         APGD of Croce & Hein 2020 (arXiv:2003.01690, algorithm 1) in place of fixed steps: momentum, a step
                 size from 2 eps that is halved where an image stalls, which goes on from its best; alpha is not read
    returns      Attacked; raises ValueError for pixels outside [0, 1]

    PGD of Madry et al. 2018 (arXiv:1706.06083), except that the best iterate is kept, not the last. A loss or gradient
    that is not finite moves nothing and is counted, as is a gradient of zero: neither may pass for robustness.
    Differentiates the pixels alone: no parameter's .grad is touched. The model's mode is the caller's.
    """
    if images.min() < 0 or images.max() > 1:
        raise ValueError(f"pgd needs pixels in [0, 1], got [{images.min():.2f}, {images.max():.2f}]: normalised?")
    lower, upper = (images - eps).clamp(min=0), (images + eps).clamp(max=1)
    x = images if noise is None else (images + eps * noise).clamp(lower, upper)
    best, best_loss, best_grad = images, images.new_full(images.shape[:1], -torch.inf), torch.zeros_like(images)
    zero_grads = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    nonfinite = zero_grads.clone()
    size = images.new_full((len(images), 1, 1, 1), 2 * eps if auto else alpha)
    checks, last_check, previous = apgd_checkpoints(steps) if auto else (), 0, x
    rises, last_loss, old_size, old_best = zero_grads.clone(), best_loss, size, best_loss
    for step in range(steps + 1):  # the extra round only scores the last iterate
        x = x.detach().requires_grad_(step < steps)
        with torch.set_grad_enabled(step < steps):
            loss = loss_fn(x)
        finite = loss.detach().isfinite()
        if step < steps:
            (grad,) = torch.autograd.grad(loss.sum(), x)  # sum, not mean: no factor 1/B to underflow
            finite &= grad.isfinite().flatten(1).all(1)
            grad = torch.where(finite[:, None, None, None], grad, 0)
            zero_grads += finite & (grad == 0).flatten(1).all(1)
        nonfinite += ~finite
        x, loss = x.detach(), loss.detach()
        better = loss > best_loss  # False where the loss is NaN
        rises, last_loss = rises + (loss > last_loss), loss
        best_loss = torch.where(better, loss, best_loss)
        better = better[:, None, None, None]
        best, best_grad = torch.where(better, x, best), torch.where(better, grad, best_grad)
        if step == steps:
            break
        if step in checks:
            stalled = rises < 0.75 * (step - last_check)
            stalled |= (size == old_size).flatten() & (best_loss == old_best)
            stalled = stalled[:, None, None, None]
            old_size, old_best, last_check, rises = size, best_loss, step, torch.zeros_like(rises)
            size = torch.where(stalled, size / 2, size)
            x, grad = torch.where(stalled, best, x), torch.where(stalled, best_grad, grad)
        moved = (x + size * grad.sign()).clamp(lower, upper)
        if auto and step:
            moved = (x + 0.75 * (moved - x) + 0.25 * (x - previous)).clamp(lower, upper)
        previous, x = x, moved
    return Attacked(best, best_loss, zero_grads, nonfinite)


def apgd_checkpoints(steps):
    """The steps at which APGD looks whether to halve: ceil(p_j steps), p_j+1 = p_j + max(p_j - p_j-1 - 0.03, 0.06)."""
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return {math.ceil(round(share * steps, 6)) for share in shares[1:]}


def start_noise(seed, indices, shape):
    """Uniform noise in [-1, 1], (len(indices), *shape), each image's from (seed, index): whatever the batch size."""
    noise = torch.empty(len(indices), *shape)
    for row, index in zip(noise, indices):
        row.uniform_(-1, 1, generator=torch.Generator().manual_seed(seed * 1_000_003 + index))
    return noise


def grey_levels(eps):
    """The largest whole number of grey levels inside a radius on the [0, 1] scale."""
    return math.floor(eps * 255 + 1e-6)


def to_pixels(images, pixels, eps):
    """Round images in [0, 1] to uint8 without leaving the ball around pixels: uint8 (B, 3, H, W) on the CPU."""
    pixels = torch.tensor(np.asarray(pixels)).int()
    delta = ((images.cpu() * 255).round().int() - pixels).clamp(-grey_levels(eps), grey_levels(eps))
    return (pixels + delta).clamp(0, 255).byte()


def attack_batches(encode_image, examples, loss_fn, args, random_start=True, seed=0, auto=False, what="attack"):
    """The attack on every example, args.batch_size at a time.

    encode_image   differentiable, (B, 3, H, W) in [0, 1] -> (B, D) unit norm: the model, or a whole defence
    loss_fn        (image_features (B, D), indices of the examples as a slice) -> (B,) losses, such as own_caption()
    seed           added to args.seed for the random start
    yields         (start, pixels_adv uint8 (B, 3, H, W) on the CPU, Attacked)
    """

    def attack(here, pixels):
        images = as_images(pixels, pick_device(args.device))
        noise = start_noise(args.seed + seed, range(here.start, here.stop), pixels.shape[1:]) if random_start else None
        noise = None if noise is None else noise.to(images.device)
        budget = {"eps": args.eps, "alpha": args.alpha, "steps": args.steps}
        return pgd(lambda x: loss_fn(encode_image(x), here), images, **budget, noise=noise, auto=auto)

    with progress(None, what, len(examples)) as bar:
        for start in range(0, len(examples), args.batch_size):
            here = slice(start, min(start + args.batch_size, len(examples)))
            pixels = examples.pixels[here]
            attacked = attack(here, pixels)
            yield start, to_pixels(attacked.images, pixels, args.eps), attacked
            bar.update(len(pixels))


def own_caption(text_features):
    """The report's loss: minus the cosine with the own caption, row i of text_features (N, D)."""
    return lambda image_features, here: -(image_features * text_features[here]).sum(-1)


def attack_all(encode_image, examples, loss_fn, args, **options):
    """attack_batches, collected: pixels_adv uint8 (N, 3, H, W) and its attack_health."""
    parts, healths = [], []
    for start, pixels_adv, attacked in attack_batches(encode_image, examples, loss_fn, args, **options):
        parts.append(pixels_adv)
        healths.append(attack_health(examples.pixels[start : start + len(pixels_adv)], pixels_adv, attacked))
    return torch.cat(parts), sum_health(healths)


def attack_health(pixels, pixels_adv, attacked):
    """What must be looked at before an attack's figure is believed, re-measured on its uint8 output."""
    linf = linf_grey_levels(pixels, pixels_adv)
    return {
        "max_abs_delta_grey_levels": int(linf.max()),
        "min_pixel": int(pixels_adv.min()),
        "max_pixel": int(pixels_adv.max()),
        "images_unmoved": int((linf == 0).sum()),
        "images_with_zero_gradients": int((attacked.zero_grads > 0).sum()),
        "images_with_nonfinite_values": int((attacked.nonfinite > 0).sum()),
    }


def sum_health(parts):
    """The attack_health of several batches as one."""
    merge = {"max": max, "min": min, "images": sum}
    return {key: merge[key.partition("_")[0]](part[key] for part in parts) for key in parts[0]}


def linf_grey_levels(pixels, pixels_adv):
    """Largest difference of each image to its twin, uint8 (B, 3, H, W) both: (B,) whole grey levels."""
    return np.abs(np.asarray(pixels, np.int16) - np.asarray(pixels_adv, np.int16)).max((1, 2, 3))


@torch.no_grad()
def encode_all(encode_image, pixels, batch_size, device):
    """Features of uint8 images (N, 3, H, W) in batches: (N, D)."""
    parts = [encode_image(as_images(pixels[i : i + batch_size], device)) for i in range(0, len(pixels), batch_size)]
    return torch.cat(parts)


def jpeg(images, quality):
    """Images through Pillow's JPEG encoder and decoder: the real bytes of the rounded image.

    images    (B, 3, H, W) float32 in [0, 1]
    quality   Pillow's, 1 to 95; one number, or one per image
    returns   the same shape; the gradient is passed straight through (BPDA, Athalye et al. 2018, arXiv:1802.00420)
    """

    def round_trip(image, quality):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=int(quality))
        return np.asarray(Image.open(buffer))

    pixels = (images.detach() * 255).round().byte().cpu().permute(0, 2, 3, 1).numpy()
    decoded = np.stack([round_trip(*pair) for pair in zip(pixels, np.broadcast_to(quality, len(pixels)))])
    decoded = torch.from_numpy(decoded).permute(0, 3, 1, 2)
    return images + (as_images(decoded, images.device) - images).detach()


def adversarial_folder(args, split, count):
    """--adversarial_dir; made first by generate_pgd_adversarial.py, with this script's flags, if it is not there."""
    folder = Path(args.adversarial_dir or Path(args.output_dir).parent / f"adversarial_{split}")
    if args.adversarial_dir and not (folder / "metadata.jsonl").exists():
        fail(f"--adversarial_dir {folder} is not a finished folder of generate_pgd_adversarial.py")
    if not (folder / "metrics.json").exists():
        words = ["generate_pgd_adversarial.py", "--split", split, "--num_images", str(count)]
        same = "preset model pretrained precision device train_data eval_data image_root sample_seed eps alpha steps"
        same += " seed cache_dir num_workers" + (" batch_size" if split == "eval" else "")
        for name in same.split():
            if getattr(args, name) is not None:
                words += [f"--{name}", str(getattr(args, name))]
        words += ["--skip_bad_images"] if args.skip_bad_images else []
        print(f"{folder} is not there yet and is made first:")
        run_script([*words, "--output_dir", str(folder)])
    return folder


def load_adversarial(folder, examples, args):
    """The adversarial twins of examples from a folder of generate_pgd_adversarial.py: uint8 (N, 3, S, S).

    Ends with one line if they were made with another attack, or if an image is missing, of another caption or size, or
    outside the ball around its clean twin.
    """
    made = read_json(folder / "metrics.json").get("args", {})
    for flag in ("model", "pretrained", "eps", "alpha", "steps"):
        if made.get(flag) != getattr(args, flag):
            fail(f"{folder} was made with --{flag} {made.get(flag)}, not {getattr(args, flag)}: give another folder")
    if not (folder / "metadata.jsonl").exists():
        fail(f"{folder} holds no metadata.jsonl: it is not a folder of generate_pgd_adversarial.py")
    entries = {}
    for i, line in enumerate((folder / "metadata.jsonl").read_text(encoding="utf-8").strip().split("\n"), 1):
        try:
            entry = json.loads(line)
            entries[entry["coco_id"], entry["caption"]] = folder / entry["file_name"]
        except (ValueError, KeyError, TypeError):
            fail(f"{folder / 'metadata.jsonl'}: line {i} is damaged: make the folder again with --overwrite")
    twins = np.empty(examples.pixels.shape, np.uint8)

    def problem_with(i):
        file = entries.get((examples.coco_ids[i], examples.captions[i]))
        if file is None:
            return f"{folder} has no adversarial twin of {examples.names[i]} with its caption"
        try:
            with Image.open(file) as image:
                twin = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        except OSError as error:
            return f"{file}: {describe(error)}"
        twins[i] = twin if twin.shape == twins[i].shape else 0
        if linf_grey_levels(twins[i : i + 1], examples.pixels[i : i + 1])[0] > grey_levels(made["eps"]):
            return f"{file} is not in the ball around {examples.names[i]} at this size"
        return None

    with ThreadPoolExecutor(args.num_workers) as pool:
        for problem in progress(pool.map(problem_with, range(len(examples))), "read", len(examples)):
            if problem:
                pool.shutdown(cancel_futures=True)
                fail(f"{problem}: make it again with generate_pgd_adversarial.py")
    return twins


# ---------------------------------------------------------------------------------------------------------------------
# Training: the loop of both defences; a script brings the twins of the clean images


def contrastive_loss(image_features, text_features, caption_ids, negatives, negative_ids, logit_scale):
    """Symmetric contrastive loss (Radford et al. 2021, arXiv:2103.00020, figure 3), with more captions as negatives.

    image_features, text_features   (B, D), row i of both from one pair
    negatives                       (K, D) features of further captions, candidates of the image-to-text half alone
    caption_ids, negative_ids       (B,), (K,): equal captions have equal ids and are never each other's negatives
    """
    targets = torch.arange(len(image_features), device=image_features.device)
    candidate_ids = torch.cat([caption_ids, negative_ids])
    equal = caption_ids[:, None] == candidate_ids[None]  # (B, B + K)
    equal[targets, targets] = False
    logits = logit_scale * image_features @ torch.cat([text_features, negatives]).T
    logits = logits.masked_fill(equal, -torch.inf)
    image_to_text = F.cross_entropy(logits, targets)
    text_to_image = F.cross_entropy(logits[:, : len(targets)].T, targets)
    return (image_to_text + text_to_image) / 2


def train(args, run, clip, training, validation, make_twins, twin_loss_fn=None):
    """Fine-tune the visual tower on clean images and their twins; text tower and logit_scale stay frozen.

    make_twins     (step, indices, images) -> (B, 3, H, W) in [0, 1]: augmented or adversarial versions of the images
    twin_loss_fn   (image_features (B, D) of the twins, indices) -> scalar, in place of the contrastive loss
    returns        what metrics.json says of the training; writes log.jsonl, last.pt and best.pt into run.dir

    The loss is the mean of the clean and the twins' contrastive loss; both halves go through the tower together. The
    best epoch is the one of the highest white-box adversarial similarity on the validation images.
    """
    device, visual = clip.device, clip.model.visual
    state_bytes = sum(t.numel() * t.element_size() for t in clip.model.state_dict().values())
    require_disk(run.dir, 3 * state_bytes)
    run.begin()
    clip.model.requires_grad_(False)
    visual.requires_grad_(True)
    matrices = [p for p in visual.parameters() if p.ndim >= 2]
    others = [p for p in visual.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=device.type in ("cuda", "cpu"))
    text_features = clip.encode_text(training.captions)  # (N, D)
    ids = {caption: i for i, caption in enumerate(dict.fromkeys(training.captions))}
    caption_ids = torch.tensor([ids[caption] for caption in training.captions], device=device)
    steps_per_epoch = math.ceil(len(training) / args.batch_size)
    last_step = min(args.epochs * steps_per_epoch, args.max_steps or math.inf)
    step, seen, epochs, losses, stopped, began, validating = 0, 0, [], [], "epochs", run.seconds(), 0.0
    with open(run.dir / "log.jsonl", "w", encoding="utf-8") as log:
        bar = progress(None, "train", last_step, unit="step")
        for epoch in range(args.epochs):
            order = np.random.default_rng([args.seed, epoch]).permutation(len(training))
            visual.train()
            for batch in np.split(order, range(args.batch_size, len(order), args.batch_size)):
                images = as_images(training.pixels[batch], device)
                own, own_ids = text_features[batch], caption_ids[batch]
                draw = np.random.default_rng([args.seed, step, 1]).permutation(len(training))
                draw = draw[~np.isin(draw, batch)][: args.num_negatives]
                twins = make_twins(step, batch, images)
                clean_features, twin_features = clip.encode_image(torch.cat([images, twins])).chunk(2)  # (B, D) each
                against = own, own_ids, text_features[draw], caption_ids[draw], clip.logit_scale
                clean_loss = contrastive_loss(clean_features, *against)
                if twin_loss_fn:
                    twin_loss = twin_loss_fn(twin_features, batch)
                else:
                    twin_loss = contrastive_loss(twin_features, *against)
                loss = (clean_loss + twin_loss) / 2
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                grad_norm = torch.nn.utils.clip_grad_norm_(visual.parameters(), args.grad_clip)
                if not (loss.isfinite() and grad_norm.isfinite()):
                    names, last = ", ".join(training.names[i] for i in batch), run.dir / "last.pt"
                    fail(f"step {step}: loss {loss.item()}, gradient norm {grad_norm.item()}; images {names}; "
                         f"last good checkpoint: {last if epochs else 'none yet'}")  # fmt: skip
                for group in optimizer.param_groups:
                    group["lr"] = args.lr * min(1, (step + 1) / max(1, args.warmup_steps))
                optimizer.step()
                step, seen = step + 1, seen + 2 * len(batch)
                losses.append(loss.item())
                entry = {"step": step, "epoch": epoch + 1, "loss": losses[-1], "clean_loss": clean_loss.item()}
                entry |= {"twin_loss": twin_loss.item(), "grad_norm": grad_norm.item(), "lr": group["lr"]}
                log.write(json.dumps(entry) + "\n")
                bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
                bar.update()
                window = losses[-args.loss_window :]
                if args.loss_threshold and len(window) == args.loss_window and np.mean(window) < args.loss_threshold:
                    stopped = "loss_threshold"
                elif step == args.max_steps:
                    stopped = "max_steps"
                if stopped != "epochs":
                    break
            figures = {"epoch": epoch + 1, "step": step, "loss": float(np.mean(losses[-args.loss_window :]))}
            paused = run.seconds()
            figures |= validate(args, clip, validation)
            validating += run.seconds() - paused
            best = not epochs or figures["val_white_box"] > max(past["val_white_box"] for past in epochs)
            epochs.append(figures)
            checkpoint = {
                "epoch": epoch + 1,
                "name": clip.arch,
                "quick_gelu": bool(model_config(clip.arch).get("quick_gelu", False)),
                "state_dict": {key: value.cpu() for key, value in clip.model.state_dict().items()},
                "train_ids": sorted({*training.coco_ids, *clip.train_ids}),  # of the weights it started from, too
                "val_ids": validation.coco_ids,
                "args": vars(args),
            }
            for name in ["last.pt", "best.pt"] if best else ["last.pt"]:
                replace_file(run.dir / name, partial(torch.save, checkpoint))
            tqdm.write(
                f"epoch {epoch + 1}/{args.epochs}  step {step}  loss {figures['loss']:.3f}  validation clean "
                f"{figures['val_clean']:.3f}, white-box {figures['val_white_box']:.3f}{'  *' if best else ''}"
            )
            if stopped != "epochs":
                break
        bar.close()
    return {
        "n": len(training),
        "n_validation": len(validation),
        "steps": step,
        "stopped_by": stopped,
        "best_epoch": max(epochs, key=lambda figures: figures["val_white_box"])["epoch"],
        "epochs": epochs,
        "training_seconds": run.seconds() - began,
        "images_per_s": seen / (run.seconds() - began - validating),
        "train_ids": training.coco_ids,
        "val_ids": validation.coco_ids,
        "skipped_images": training.skipped,
    }


def validate(args, clip, validation):
    """Mean similarity on the validation images, clean and under white-box PGD against the present weights."""
    clip.model.visual.eval()
    text_features = clip.encode_text(validation.captions)
    pixels_adv, _ = attack_all(clip.frozen(), validation, own_caption(text_features), args, what="validate")
    clean = encode_all(clip.encode_image, validation.pixels, args.batch_size, clip.device)
    attacked = encode_all(clip.encode_image, pixels_adv, args.batch_size, clip.device)
    return {
        "val_clean": (clean * text_features).sum(-1).mean().item(),
        "val_white_box": (attacked * text_features).sum(-1).mean().item(),
    }
