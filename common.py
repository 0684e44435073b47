"""The instrument that the five scripts share: flags, runs, CLIP, MMEB, the attack, what trainings have in common.

Words and units, the same everywhere:
    images          (B, 3, H, W) float32 pixels in [0, 1], after resize and centre crop, before CLIP's normalisation
    pixels          the same as uint8 grey levels; images_adv, pixels_adv are the attacked ones
    eps, alpha      L-inf radius and step size on the [0, 1] scale: 8/255, not 8
    image_features  (B, D) float32, unit norm; text_features likewise
    logit_scale     the multiplier of the cosine (about 100), not its logarithm
    similarity      cosine of an image and its own caption

Nouns that go from script to script: Run (an output folder), Clip (a model on its device), examples (a datasets.Dataset
of pixels, caption, texts, coco_id, path), Attack (a budget and how it is spent), Trainer (what both trainings share;
the loop is the script's).
"""

import argparse
import fcntl
import hashlib
import io
import json
import logging
import math
import os
import pickle
import platform
import re
import resource
import runpy
import shlex
import shutil
import subprocess
import sys
import threading
import time
import traceback
import weakref
import zipfile
import zlib
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
from functools import lru_cache, partial
from itertools import accumulate
from operator import and_, eq
from pathlib import Path, PurePosixPath

import datasets
import fsspec
import huggingface_hub
import numpy as np
import open_clip
import torch
import torchvision
from open_clip.transform import PreprocessCfg, image_transform_v2, to_2tuple
from PIL import Image
from torch import distributed
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
TINY = ROOT / "tests" / "tiny"

# ---------------------------------------------------------------------------------------------------------------------
# Flags

PRESETS = {  # flag: {preset: default}; smoke is tiny but for these
    "model": {"report": "ViT-L-14-quickgelu", "tiny": f"local-dir:{TINY}/clip"},
    "pretrained": {"report": "openai", "tiny": ""},
    "train_data": {"report": "TIGER-Lab/MMEB-train", "tiny": f"{TINY}/MMEB-train"},
    "eval_data": {"report": "TIGER-Lab/MMEB-eval", "tiny": f"{TINY}/MMEB-eval"},
    "train_images": {"report": 5000, "tiny": 1000, "smoke": 48},  # --num_images of what reads the training split
    "eval_images": {"report": 100, "tiny": 100, "smoke": 16},  # and of what reads the evaluation split
    "val_images": {"report": 250, "tiny": 40, "smoke": 8},
    "steps": {"report": 20, "tiny": 20, "smoke": 8},
    "attack_steps": {"report": 75, "tiny": 75, "smoke": 15},
    # tiny: of 1e-4, 4e-4, 1.6e-3 and 6.4e-3 that of the highest white-box R@1, then cosine, on 200 further training
    # images, among those that cost at most 5 points of clean R@1 there, or the least
    "mat_lr": {"report": 1e-5, "tiny": 4e-4},
    "pgd_lr": {"report": 1e-5, "tiny": 1e-4},
    "online_lr": {"report": 1e-5, "tiny": 1.6e-3},
    "epochs": {"report": 3, "tiny": 4, "smoke": 2},
}


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The script's docstring as it stands, and the default behind every flag."""


def pixel_distance(text):
    """argparse type for a distance on the [0, 1] pixel scale, from one grey level to below 1: '8/255' or '0.0314'."""
    over, _, under = text.partition("/")
    with suppress(ValueError, ZeroDivisionError):
        value = float(over) / float(under or 1)
        if 1 / 255.5 < value < 1:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not from 1/255 to below 1; for {text} levels write {text}/255")


def number(low, high=math.inf, kind=int):
    """argparse type: an int, or another kind, from low to high."""

    def convert(text):
        value = kind(text)
        if not low <= value <= high:  # nor is NaN
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value

    convert.__name__ = kind.__name__  # what argparse calls a text that is none
    return convert


def make_parser(doc, batch_size=64):
    """A parser with the flags that every script has; --preset gives the defaults that are not given here."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=Formatter, allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; --help lists the flags")
    flag = parser.add_argument_group("run").add_argument
    flag("--preset", choices=["report", "tiny", "smoke"], default="report", help="sets defaults of the flags below")
    flag("--output_dir", help="folder of this run; those of other stages stand beside it")
    flag("--overwrite", action="store_true", help="replace the run there, and with --reproduce every stage's")
    flag("--seed", type=number(0, 2**31), default=0, help="of all random numbers")
    flag("--device", default="auto", help="cuda, cuda:1, mps, cpu, or auto: the first there is")
    flag = parser.add_argument_group("model").add_argument
    flag("--model", help="open_clip name, local-dir:DIR or hf-hub:ORG/NAME")
    flag("--pretrained", help="open_clip tag, a checkpoint file, or 'random' for untrained weights")
    flag("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="of gradients; auto: bf16 on a GPU")
    flag = parser.add_argument_group("data").add_argument
    flag("--train_data", help="training set: hub id or local folder in MMEB's layout")
    flag("--eval_data", help="evaluation set, likewise")
    flag("--image_root", help="folder of unpacked images, used in place of the data set's zips")
    flag("--num_images", type=number(1), help="images to use, the first ones")
    flag("--skip_bad_images", action="store_true", help="leave broken images out and count them")
    flag("--batch_size", type=number(1), default=batch_size, help="images at a time, in a training of all processes")
    flag("--num_workers", type=number(1, 1024), default=os.cpu_count(), help="threads that write PNGs")
    flag("--cache_dir", default="runs/cache", help="for decoded images, uint8")
    flag = parser.add_argument_group("attack: L-inf, pixels in [0, 1], before CLIP's normalisation").add_argument
    flag("--eps", type=pixel_distance, default="8/255", help="radius")
    flag("--alpha", type=pixel_distance, default="2/255", help="step size of the report's attack")
    flag("--steps", type=number(1, 10**6), help="gradient steps, in a training those of its validation")
    return parser


def add_train_args(parser):
    """Flags of both trainings."""
    flag = parser.add_argument_group("training").add_argument
    flag("--lr", type=number(1e-12, 1, float), help="learning rate of AdamW")
    flag("--weight_decay", type=number(0, 100, float), default=0.1, help="on matrices")
    flag("--epochs", type=number(1, 10**4), help="passes over the training images")
    flag("--max_steps", type=number(1), help="stop after so many optimizer steps")
    flag("--save_every", type=number(0, 10**6, float), default=5, help="minutes between states")
    flag("--grad_checkpointing", action="store_true", help="less memory, a third more time")
    flag("--loss_threshold", type=number(1e-12, 10**6, float), help="stop when the loss of --loss_window is below")
    flag("--loss_window", type=number(1), default=50, help="steps averaged; one batch of 16 alone is noise")
    flag("--val_images", type=number(1), help="further training images, which choose the best epoch")


def parse_flags(parser, argv, stage, images):
    """Parse with the defaults of --preset.

    stage    (chosen flags) -> name of the default output folder under runs/PRESET/
    images   (chosen flags) -> 'train' or 'eval': which of the preset's image counts is --num_images' default
    """
    words = sys.argv[1:] if argv is None else argv
    with about("the command line is not text in UTF-8"):  # no record could hold it, and no terminal show it
        " ".join(words).encode()
    chosen = parser.parse_known_args([word for word in words if word not in ("-h", "--help")])[0]
    defaults = {flag: values.get(chosen.preset, values["tiny"]) for flag, values in PRESETS.items()}
    defaults["output_dir"] = f"runs/{chosen.preset}/{stage(chosen)}"
    defaults["num_images"] = defaults[f"{images(chosen)}_images"]
    defaults["lr"] = defaults.get(f"{stage(chosen)}_lr")
    if (chosen.model or "").startswith(("local-dir:", "hf-hub:")):
        defaults["pretrained"] = ""  # such a model brings its weights
    parser.set_defaults(**{name: value for name, value in defaults.items() if hasattr(chosen, name)})
    args = parser.parse_args(words)
    if not args.output_dir:
        parser.error("--output_dir is empty")
    return args


SHARED = "device model pretrained precision train_data eval_data image_root skip_bad_images num_workers cache_dir"
SHARED += " eps alpha steps seed"


def run_script(script, args, stage, *words, flags=SHARED):
    """Run another script with the flags that args has from the user, as the command that a user would type."""
    default = parse_flags(make_parser(""), ["--preset", args.preset], lambda _: stage, lambda _: "train")
    given = vars(args) | {"output_dir": str(Path(args.output_dir).parent / stage)}
    words = [script, *(["--preset", args.preset] if args.preset != "report" else []), *map(str, words)]
    for name in [*flags.split(), "output_dir"]:
        if given[name] != getattr(default, name):
            words += [f"--{name}"] if given[name] is True else [f"--{name}", str(given[name])]
    print(f"\n$ python {shlex.join(words)}", flush=True)
    argv, sys.argv = sys.argv, words
    runpy.run_path(str(ROOT / script), run_name="__main__")  # in this process: the imports take seconds
    sys.argv = argv


# ---------------------------------------------------------------------------------------------------------------------
# Failing: what comes from outside ends a script in one line; and processes: one, or torchrun's, of which rank 0 speaks

RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def fail(message, what="error", code=2):
    """End with one line on stderr that says what is wrong, where, and what to do."""
    if RANK:
        time.sleep(10)  # what rank 0 finds, too, it says: torchrun ends this process meanwhile
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(message.split()))
    print(f"{Path(sys.argv[0]).name}: {what}: {line}", file=sys.stderr, flush=True)
    raise SystemExit(code)


@contextmanager
def about(what):
    """Whatever goes wrong inside is the fault of what: files, hubs and configurations each raise their own classes."""
    try:
        yield
    except Exception as error:
        fail(f"{what}: {describe(error)}")


def describe(error):
    """An error and its cause in one line, with what to set when a hub cannot be reached."""
    text = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    text += f" ({cause})" if cause else ""
    hub = re.search(r"(?i)connect|offline|resolv|timed? ?out|couldn't reach|\bhub\b|max retries", text)
    advice = "; for the hub set HF_ENDPOINT, HF_TOKEN or HF_HOME, or give a local folder" if hub else ""
    return " ".join(text.split())[:400] + advice


@contextmanager
def process_group():
    """Under torchrun, meet the other processes; the folders are shared by all. A failure ends all, without a hang."""
    if PROCESSES == 1 or distributed.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, timeout=timedelta(days=1))  # decoding may keep rank 0 for hours
    if RANK:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        yield
    except BaseException as error:
        said = isinstance(error, SystemExit)  # and why, by fail() or run_main()
        if not said:
            time.sleep(10)  # if it comes of another's end: torchrun ends this process meanwhile
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(error.code if said else 1)  # without leave of the others: NCCL's would wait for them
    distributed.destroy_process_group()


@process_group()
def run_main(main, args):
    """main(args); a full disk, a full GPU or Ctrl-C ends it in one line, a mistake of ours in its traceback."""
    try:
        main(args)
    except KeyboardInterrupt:
        if RANK:
            raise SystemExit(130)  # without a word, and at once
        fail("the same command goes on from what is saved", "stopped", 130)
    except torch.OutOfMemoryError:
        fail(f"--batch_size {args.batch_size} is too large for the GPU's memory; trainings have --grad_checkpointing")
    except OSError as error:
        fail(f"{describe(error)}: once it is mended, the same command goes on from what is saved")


def gather(value=None):
    """The values of all ranks, in their order; of None, a barrier."""
    values = [value] * PROCESSES
    if PROCESSES > 1:
        distributed.all_gather_object(values, value)
    return values


tqdm.set_lock(threading.RLock())  # its own is of multiprocessing, and a complaint of Python 3.14 at os._exit()


def progress(iterable=None, what="", total=None, unit="batch"):
    """A progress bar with rate and ETA, shown once something takes longer than two seconds."""
    log = not sys.stderr.isatty()  # there, a line now and then
    every = 30 if log else 0.2
    return tqdm(iterable, what, total, unit=unit, delay=2, mininterval=every, ncols=79, leave=log, disable=RANK > 0)


# ---------------------------------------------------------------------------------------------------------------------
# Runs: one output folder each; metrics.json is written last and marks the folder complete

# flags that change no number
NOT_IN_RESULT = {"output_dir", "overwrite", "num_workers", "cache_dir", "reproduce", "save_every", "grad_checkpointing"}


class Run:
    """One output folder: refuses a run of other flags or inputs, goes on with its own, and says how it was made.

    inputs      what this run reads: folders of other runs, files of weights
    .finished   the metrics.json of the same run, where it is complete already; else None
    """

    def __init__(self, args, inputs=()):
        self.dir, self.clock = Path(args.output_dir), time.perf_counter()
        self.partial, self.done = self.dir / ".partial", self.dir / "metrics.json"
        self.record = {
            "argv": sys.argv,
            "args": portable(vars(args)),
            "inputs": stamps(args, inputs),
            "commit": git_commit(),
            "processes": PROCESSES,
            "started": datetime.now(timezone.utc).isoformat(),
            "seconds": 0.0,
        }
        self.finished, begun = gather(None if RANK else self.take_folder())[0]  # what rank 0 has found there
        if self.finished:
            print(f"{self.dir} is complete and was made with these flags: nothing to do (--overwrite runs it again)")
        if begun:
            self.record |= {"started": begun["started"], "seconds": begun["seconds"]}
            print(f"{self.dir} holds an unfinished run: going on after its first {begun['seconds']:.0f} s")

    def take_folder(self):
        """Hold the folder until this process ends; the records of this run in it, finished and unfinished, or None."""
        with about(f"cannot write to --output_dir {self.dir}"):
            self.dir.mkdir(parents=True, exist_ok=True)
            folder = os.open(self.dir, os.O_RDONLY)
            self.release = weakref.finalize(self, os.close, folder)
            save(self.dir / ".write_test", "")
            (self.dir / ".write_test").unlink()
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"another run is writing to {self.dir}: wait for it, or give another --output_dir")
        except OSError:
            pass  # a file system without locks
        finished = None if self.record["args"]["overwrite"] else self.earlier(self.done)
        begun = None if self.done.exists() else self.earlier(self.partial / "run.json")
        if not begun:
            shutil.rmtree(self.partial, ignore_errors=True)
        return finished, begun

    def earlier(self, file):
        """The record of this run that an earlier process wrote, or None; another run's ends the script."""
        if not file.exists():
            return None

        def result_of(record):  # what makes the result; of an unfinished run its shares, too
            flags = {f"--{key}": value for key, value in record["args"].items() if key not in NOT_IN_RESULT}
            if "lr" not in record["args"]:
                flags.pop("--batch_size", None)  # of an attack: no image depends on those beside it
            return flags | record["inputs"] | ({"processes": record["processes"]} if file != self.done else {})

        old = load_record(file)
        was, now = result_of(old), result_of(self.record)
        keys = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))
        changed = ", ".join(f"{key} {was.get(key)} -> {now.get(key)}" for key in keys)
        if changed and not self.record["args"]["overwrite"]:
            fail(f"{self.dir} holds a run with other flags or inputs ({changed}): --overwrite replaces it")
        for key in ("commit", "processes"):
            if not changed and old.get(key) != self.record[key]:
                print(f"note: {self.dir} was made with another {key}: {old.get(key)}, not {self.record[key]}")
        return None if changed else old

    def begin(self, need):
        """Before the first file is written, of so many bytes in all; from here to finish() the folder is incomplete."""
        if not RANK:
            need -= sum(file.stat().st_size for file in self.dir.rglob("*") if file.is_file())  # of a killed run
            free = shutil.disk_usage(self.dir).free
            if free < need:
                fail(f"{self.dir} needs about {need / 1e9:.2f} GB and has {free / 1e9:.2f} GB free: make room first")
            self.done.unlink(missing_ok=True)
        gather()

    def keep(self, key, value):
        """Store a part of the work, tensors and plain values, so that a killed run goes on after it."""
        self.partial.mkdir(exist_ok=True)
        if not RANK:
            save(self.partial / "run.json", self.record | {"seconds": self.seconds()})
        save(self.partial / f"{digest(key)}.pt", value)

    def kept(self, key):
        """What a killed process of this run kept under key; None if there is nothing, or it is damaged."""
        file = self.partial / f"{digest(key)}.pt"
        with suppress(Exception), zipfile.ZipFile(file) as archive:  # there is none, or a damaged one raises anything
            if archive.testzip() is None:  # torch does not look at the checksums
                return torch.load(file, map_location="cpu", weights_only=True)
        return None

    def seconds(self):
        """Wall time of this run, without the pauses of a killed one."""
        return self.record["seconds"] + time.perf_counter() - self.clock

    def finish(self, clip, **metrics):
        """Write metrics.json: how the run was made, then the script's own figures."""
        modules, device = (torch, torchvision, open_clip, datasets, np), clip.device
        on_gpu = device.type == "cuda"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        self.record |= {
            "versions": {m.__name__: m.__version__ for m in modules} | {"python": platform.python_version()},
            "device": f"{device} ({torch.cuda.get_device_name(device) if on_gpu else platform.machine()})",
            "gradients": "bf16" if clip.bf16 else "fp32",
            "seconds": round(self.seconds(), 3),
            "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else peak,  # of the process
        }
        if not RANK:
            save(self.done, self.record | metrics)
            shutil.rmtree(self.partial, ignore_errors=True)
        gather()


def portable(value):
    """As JSON holds it, paths in this checkout relative to it: a run is known again where the checkout is moved."""
    return json.loads(json.dumps(value).replace(json.dumps(f"{ROOT}/")[1:-1], ""))


def stamps(args, inputs=()):
    """{path: what changes with it}: the files of a run's weights and its inputs, files or folders of other runs."""

    def stamp(path):
        if path.is_dir():  # a run's
            return load_record(path / "metrics.json")["started"]
        return checksum(path, path.stat().st_size, path.stat().st_mtime_ns)

    paths = [*inputs, *model_files(args.model), *model_files(args.pretrained)]
    return {portable(str(path)): stamp(path) for path in paths}


@lru_cache
def checksum(path, size, time_ns):
    """sha256 of a file, read once while its size and time stay: a run asks for that of its weights often."""
    content = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            content.update(block)
    return content.hexdigest()


def load_record(file):
    """A metrics.json, or the start of one in .partial, as a dict."""
    with about(f"{file} is damaged: delete it, or make its folder again with --overwrite"):
        record = json.loads(file.read_text(encoding="utf-8"))
        if missing := {"args", "inputs", "processes", "started", "seconds"} - record.keys():
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
        return record


def digest(value):
    """A name for plain values."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:20]


def git_commit():
    """The commit of this checkout, '-dirty' if a tracked file was changed, or None outside git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    with suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def save(path, value):
    """Write tensors (.pt), a PIL image (.png), plain values or a text: path is whole then, or as it was before."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            if path.suffix == ".pt":
                torch.save(value, file)
            elif path.suffix == ".png":
                value.save(file, "PNG", compress_level=1)  # 6 saves 5 % for 30 % more time
            else:
                if not isinstance(value, str):
                    value = json.dumps(value, indent=1, ensure_ascii=False, default=np.ndarray.tolist) + "\n"
                file.write(value.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except RuntimeError as error:  # of torch.save, which hides why the file could not be written
        raise (error.__context__ or error) from None
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# CLIP


class Clip(torch.nn.Module):
    """An open_clip model on its device, that takes pixels and captions.

    arch        the name that open_clip built it from; travels in checkpoints
    batch_size  images at a time
    precision   the flag; bf16: whether gradients are computed in it; what is scored is fp32 always
    geometry    open_clip's preprocessing up to the pixels: size, interpolation, resize_mode, ...; plain values
    train_ids   COCO ids that its weights were trained on, a set
    """

    def __init__(self, model, arch, device, precision, batch_size, train_ids):
        super().__init__()
        self.model, self.arch, self.device, self.batch_size = model.to(device).eval(), arch, device, batch_size
        if not all(weights.isfinite().all() for weights in model.state_dict().values()):
            raise ValueError("its weights are not finite: they are damaged, or of a training that diverged")
        able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        self.precision, self.bf16 = precision, precision == "bf16" or (precision == "auto" and able)
        self.geometry = dict(open_clip.get_model_preprocess_cfg(model))
        self.geometry["size"] = to_2tuple(self.geometry["size"])
        for key in ("mean", "std"):  # part of the model: what is attacked are pixels
            self.register_buffer(key, torch.tensor(self.geometry.pop(key), device=device).view(3, 1, 1))
        self.text_cache, self.train_ids = {}, train_ids
        with about(f"the tokenizer of {arch} cannot be had; those of Hugging Face need pip install transformers"):
            self.tokenizer = open_clip.get_tokenizer(arch)

    def encode_image(self, images):
        """(B, 3, H, W) float32 in [0, 1] -> (B, D) float32, unit norm; differentiable in images and weights.

        bf16 is for gradients alone: features that are scored, under torch.no_grad(), are fp32 whatever --precision.
        """
        bf16 = self.bf16 and torch.is_grad_enabled()
        dtype = torch.bfloat16 if bf16 else torch.float32
        tower = fast_tower(self.model.visual, self.mean, self.std, dtype, held=False)
        if tower:
            return tower(images)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            image_features = self.model.encode_image((images - self.mean) / self.std)
        return F.normalize(image_features.float(), dim=-1)

    forward = encode_image  # for DistributedDataParallel

    def frozen(self):
        """encode_image of the present weights for attacks: differentiable in the images alone, by autograd.grad."""
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        return fast_tower(self.model.visual, self.mean, self.std, dtype, held=True) or self.encode_image

    @torch.no_grad()
    def encode_pixels(self, pixels, encode_image=None):
        """Features of uint8 images (N, 3, H, W), a batch at a time: (N, D); encode_image: of a whole defence."""
        encode_image, features = encode_image or self.encode_image, []
        for start in progress(range(0, len(pixels), self.batch_size), "encode"):
            features.append(encode_image(as_images(pixels[start : start + self.batch_size], self.device)))
        features = torch.cat(features)
        if bad := (~features.isfinite().all(1)).nonzero()[:, 0].tolist():
            fail(f"{self.arch}: features of images {bad[:8]} are not finite: the weights are damaged")
        return features

    @torch.no_grad()
    def encode_text(self, captions):
        """List of B strings -> (B, D) float32, unit norm. Each caption is computed once, in fp32, and kept."""
        missing = list(dict.fromkeys(caption for caption in captions if caption not in self.text_cache))
        for start in progress(range(0, len(missing), 256), "captions"):
            chunk = missing[start : start + 256]
            features = F.normalize(self.model.encode_text(self.tokenizer(chunk).to(self.device)).float(), dim=-1)
            if not ((features.norm(dim=1) - 1).abs() < 1e-3).all():  # a rank among NaN would be the first
                fail(f"{self.arch}: features of captions are not of unit norm: the weights are damaged")
            self.text_cache.update(zip(chunk, features))
        return torch.stack([self.text_cache[caption] for caption in captions])


def fast_tower(visual, mean, std, dtype, held):
    """The same function as open_clip's plain VisionTransformer, in fewer operations, on a CPU or with CUDA.

    Rearranged: normalisation folded into a patch embedding done as one product, one product for q, k and v,
    scaled_dot_product_attention, the last block for the class token only, QuickGELU as a scaled SiLU.
    dtype     of the blocks' products; pixels, residual stream and norms are float32, without which the bf16 gradient of
              some photographs has nothing in common with the exact one
    held      what is rearranged of the weights is constant: for gradients in the pixels alone, by autograd.grad
    returns   (B, 3, H, W) in [0, 1] -> (B, D), unit norm; None for a tower that is not of the plain kind
    """
    if not is_plain(visual):
        return None
    blocks = visual.transformer.resblocks
    width, patch, heads = len(visual.class_embedding), visual.patch_size[0], blocks[0].attn.num_heads
    quick = isinstance(blocks[0].mlp.gelu, open_clip.transformer.QuickGELU)  # x sigmoid(ax) = silu(ax) / a
    scale, activation = (1.702, F.silu) if quick else (1.0, F.gelu)

    def exact(*tensors):
        return [tensor.detach() if held else tensor for tensor in tensors]

    def split(x):  # (B, N, k W) -> k of (B, heads, N, W / heads)
        return x.unflatten(2, (-1, heads, width // heads)).permute(2, 0, 3, 1, 4).unbind(0)

    def layer_of(block):
        first, last, attention = block.mlp.c_fc, block.mlp.c_proj, block.attn
        inner = attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight, attention.out_proj.bias
        mlp = first.weight * scale, first.bias * scale, last.weight / scale, last.bias
        w_qkv, b_qkv, w_out, b_out, w_1, b_1, w_2, b_2 = (tensor.to(dtype) for tensor in exact(*inner, *mlp))

        def layer(x):
            y = block.ln_1(x).to(dtype)
            if block is blocks[-1]:  # the class token alone is read
                x = x[:, :1]
                (q,) = split(F.linear(y[:, :1], w_qkv[:width], b_qkv[:width]))
                k, v = split(F.linear(y, w_qkv[width:], b_qkv[width:]))
            else:
                q, k, v = split(F.linear(y, w_qkv, b_qkv))
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + F.linear(y, w_out, b_out)
            return x + F.linear(activation(F.linear(block.ln_2(x).to(dtype), w_1, b_1)), w_2, b_2)

        return layer

    kernel = visual.conv1.weight / std  # (W, 3, P, P)
    embed = exact(kernel.flatten(1), -(kernel * mean).sum((1, 2, 3)))
    layers = [layer_of(block) for block in blocks]

    def encode(images):
        x = images.unfold(2, patch, patch).unfold(3, patch, patch)  # (B, 3, h, w, P, P)
        x = F.linear(x.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2), *embed)  # (B, hw, W)
        x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1) + visual.positional_embedding
        x = visual.ln_pre(x)
        again = visual.transformer.grad_checkpointing and torch.is_grad_enabled()
        for layer in layers:
            x = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
        return F.normalize(visual.ln_post(x[:, 0]) @ visual.proj, dim=-1)

    return encode


def is_plain(visual):
    """Whether a tower is open_clip's VisionTransformer as OpenAI's CLIP has it, which fast_tower() knows."""
    if type(visual) is not open_clip.transformer.VisionTransformer or visual.conv1.weight.device.type == "mps":
        return False  # attention of a single query was wrong on mps (torch issues 163597, 181133)
    if visual.attn_pool is not None or visual.pool_type != "tok" or visual.final_ln_after_pool or visual.output_tokens:
        return False
    block = visual.transformer.resblocks[0]  # all are alike
    known = repr(block.mlp.gelu) in ("GELU(approximate='none')", "QuickGELU()")
    if type(block) is not open_clip.transformer.ResidualAttentionBlock or not known:
        return False
    return all(isinstance(module, torch.nn.Identity) for module in (visual.patch_dropout, block.ls_1, block.ls_2))


def pick_device(name):
    """The torch.device of --device, set up so that what is scored there is exact."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and PROCESSES > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    with about(f"--device {name} is not usable here"):
        if not re.fullmatch(r"(cuda|mps|cpu)(:\d+)?", name):
            raise ValueError("write cuda, cuda:1, mps, cpu or auto")
        device = torch.empty(0, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # what is meant by calls that name none
            torch.backends.cuda.enable_cudnn_sdp(False)  # wrong for 257 tokens on Hopper until January 2026
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        return device


def model_files(source):
    """The files behind local-dir:DIR, weights and configuration, or a path; none behind another name."""
    if source.startswith("local-dir:"):
        files = Path(source.removeprefix("local-dir:")).glob("*")
        return sorted(file for file in files if file.suffix in (".safetensors", ".bin", ".pth", ".json"))
    return [Path(source)] if Path(source).is_file() else []


def load_clip(args, source=None):
    """The CLIP of --model and --pretrained; with source, another: local-dir:, hf-hub:, or a file of weights for it.

    A file is a checkpoint, or the state dict of a visual tower alone, which keeps the text tower of --pretrained.
    """
    name, pretrained = args.model, args.pretrained
    if source and source.startswith(("local-dir:", "hf-hub:")):
        name, pretrained, source = source, "", None
    has_schema, is_file = name.startswith(("local-dir:", "hf-hub:")), os.path.isfile(pretrained)
    name = name if has_schema else name.replace("/", "-")  # open_clip takes ViT-B/32, too
    own = not is_file and pretrained != "random"
    torch.manual_seed(args.seed)  # random weights are the same in every script
    with about(f"cannot load --model {name} --pretrained {pretrained!r}; open_clip.list_pretrained() lists both"):
        if has_schema and own and pretrained:
            raise ValueError("such a model brings its weights: leave --pretrained out, or give a file or 'random'")
        tag = {} if has_schema else open_clip.get_pretrained_cfg(name, pretrained)
        quick = tag.get("quick_gelu", False)
        if tag and quick != open_clip.get_model_config(name).get("quick_gelu", False):  # of which open_clip only warns
            other = f"{name}-quickgelu" if quick else name.removesuffix("-quickgelu")
            raise ValueError(f"they disagree on QuickGELU, and features would be wrong: use --model {other}")
        model = open_clip.create_model(name, pretrained if own else None, load_weights=own, require_pretrained=own)
    train_ids = load_checkpoint(model, name, Path(pretrained)) if is_file else set()
    train_ids |= load_checkpoint(model, name, Path(source), tower_alone=True) if source else set()
    with about(f"cannot use {source or pretrained} for {name}"):
        return Clip(model, name, pick_device(args.device), args.precision, args.batch_size, train_ids)


def has_quick_gelu(model):
    """Whether a model was built with QuickGELU, OpenAI's, in place of GELU."""
    return any(isinstance(module, open_clip.transformer.QuickGELU) for module in model.modules())


def load_checkpoint(model, name, file, tower_alone=False):
    """Fill model from a .pt or .safetensors file without running code in it; returns the COCO ids it was trained on."""
    with about(f"{file} is no checkpoint of plain tensors for {name}, and is not used"):
        try:
            safe = file.suffix == ".safetensors"
            saved = open_clip.factory.load_state_dict(str(file)) if safe else torch.load(file, "cpu", weights_only=True)
        except pickle.UnpicklingError:  # whose text would have the reader allow code
            raise ValueError("it holds code, or objects that are not plain tensors, or is damaged") from None
        if saved.get("quick_gelu", has_quick_gelu(model)) != has_quick_gelu(model):
            raise ValueError("it was made with the other activation, QuickGELU or GELU: use the model's twin")
        if "quick_gelu" not in saved and not name.startswith("local-dir:"):
            print(f"note: {file} does not say whether it wants QuickGELU, as OpenAI's weights do, or GELU")
        state = saved.get("state_dict", saved)
        if state.keys() == model.visual.state_dict().keys():
            if not tower_alone:
                raise ValueError(f"a visual tower alone is a row: evaluate.py --checkpoint NAME={file}")
            model.visual.load_state_dict(state)
        else:
            wanted = model.state_dict()
            for key in {"positional_embedding", "visual.positional_embedding"} & state.keys() & wanted.keys():
                if state[key].shape != wanted[key].shape:  # open_clip would stretch it
                    raise ValueError(f"{key} is of shape {[*state[key].shape]}: it is of another input size")
            open_clip.load_checkpoint(model, str(file))
        return {int(i) for i in saved.get("train_ids", ())}


# ---------------------------------------------------------------------------------------------------------------------
# MMEB: TIGER-Lab/MMEB-train and MMEB-eval

CONFIG = "MSCOCO_i2t"
LARGEST_FILE, LARGEST_IMAGE = 20_000_000, 50_000_000  # bytes, pixels: bombs are not unpacked
Image.MAX_IMAGE_PIXELS = None  # read_image() looks itself
logging.disable(logging.ERROR)  # what datasets and open_clip log, they raise as well, or it is no news
if not sys.stderr.isatty():
    datasets.disable_progress_bars()
SPLITS = {  # split, image column, caption column (a list has the positive first), start of the file names kept
    "train": ("original", "qry_image_path", "pos_text", "COCO_train2014_"),
    "eval": ("test", "qry_img_path", "tgt_text", "COCO_"),
}


def as_images(pixels, device):
    """uint8 (B, 3, H, W), numpy or a tensor on the CPU -> float32 in [0, 1] on the device."""
    return torch.tensor(np.asarray(pixels), device=device).float() / 255


def load_rows(args, split):
    """One row for each distinct image of a split, a datasets.Dataset: path, coco_id, texts, caption (their first)."""
    source, (name, path_column, text_column, wanted) = getattr(args, f"{split}_data"), SPLITS[split]
    with about(f"--{split}_data {source}: config {CONFIG}, split {name}"):
        table = open_table(source, name, args.cache_dir).select_columns([path_column, text_column])
        table = table.with_format("arrow")[:]  # nothing is decoded that the data set declares its values to be
        kept = {}  # the first row of each image
        for row, (path, texts) in enumerate(zip(*(table[name].to_pylist() for name in (path_column, text_column)))):
            match = re.search(r"(?:^|/)(COCO_(?:train|val)2014_)([0-9]{1,12})\.jpe?g\Z", str(path))
            if not match:
                raise ValueError(f"row {row}: {path_column} {str(path)[:99]!r} is not the path of a COCO 2014 image")
            coco_id = int(match[2])
            if not match[1].startswith(wanted) or coco_id in kept:
                continue
            texts = [texts] if isinstance(texts, str) else texts
            if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
                raise ValueError(f"row {row}: {text_column} is empty, or holds something that is no text")
            texts = [text.strip() for text in texts]
            kept[coco_id] = {"path": path, "coco_id": coco_id, "texts": texts, "caption": texts[0]}
        columns = ("path", "coco_id", "texts", "caption")
        return datasets.Dataset.from_dict({key: [row[key] for row in kept.values()] for key in columns})


def open_table(source, split, cache_dir):
    """A split of a hub's data set or of a local folder in the same layout."""
    if not os.path.isdir(source):
        if os.path.exists(source) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
            raise ValueError("it is neither a local folder nor a hub id such as TIGER-Lab/MMEB-train")
        return datasets.load_dataset(source, CONFIG, split=split, verification_mode="no_checks")  # of a stale row count
    files = datasets.load_dataset_builder(source, CONFIG, cache_dir=cache_dir).config.data_files[split]
    for file in files:  # links are not followed: in the hub's cache every file is one
        if os.path.relpath(file, source).startswith("../"):
            raise ValueError(f"its card names {file}, outside the folder")
    return datasets.Dataset.from_parquet(list(files), cache_dir=cache_dir)  # load_dataset mixes up folders of one name


def load_examples(args, split, span, geometry):
    """Images of a split: a datasets.Dataset of pixels uint8 (3, H, W), caption, texts, coco_id, path.

    span       range of the split's distinct images
    geometry   that of a Clip; decoded once for each, kept under --cache_dir, memory-mapped
    """
    rows, source = load_rows(args, split), getattr(args, f"{split}_data")
    with about(f"--{split}_data {source}"):
        if len(rows) < span.stop:
            kind = "train2014 images" if split == "train" else "images"
            raise ValueError(f"it has {len(rows)} distinct {kind} and {span.stop} are needed: ask for fewer")
        if args.image_root and not os.path.isdir(args.image_root):
            raise ValueError(f"--image_root {args.image_root} is not a folder")
        rows, folder = rows.select(span), args.image_root or source
        local = [file for file in Path(folder).rglob("*") if file.suffix in (".zip", ".jpg", ".jpeg")]
        seen = sorted([os.path.abspath(file), file.stat().st_size, file.stat().st_mtime_ns] for file in local)
        key = digest([seen or folder, rows["path"][:], rows["texts"][:], geometry, args.skip_bad_images])
        cache = Path(args.cache_dir, f"{key}.arrow").absolute()
        if RANK:
            gather()  # rank 0 decodes first, and the others find it done
        examples = None
        with suppress(ValueError, OSError):  # there is none, or it is damaged
            examples = datasets.Dataset.from_file(str(cache))
        if examples is None or (len(examples) < len(span) and not args.skip_bad_images):  # or it was cut
            examples = decode_rows(folder, rows, geometry, args.skip_bad_images, cache)
        if not RANK:
            gather()
        if len(examples) == 0:
            cache.unlink(missing_ok=True)  # the next run says again which, and why
            raise ValueError("none of the images could be decoded")
        if len(examples) < len(span):
            print(f"--{split}_data {source}: {len(span) - len(examples)} broken images are left out")
        return examples.with_format("numpy", columns=["pixels"], output_all_columns=True, dtype=np.uint8)


def decode_rows(folder, rows, geometry, skip_bad_images, cache):
    """rows with their pixels, written to the file cache; a broken image ends it, or is left out."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    need = 1.1 * len(rows) * 3 * math.prod(geometry["size"])
    if shutil.disk_usage(cache.parent).free < need:
        fail(f"--cache_dir {cache.parent} needs {need / 1e9:.2f} GB for decoded images: make room first")
    (files, found), transform = find_images(folder, rows["path"][:]), to_geometry(geometry)
    kinds = datasets.Features(rows.features | {"pixels": datasets.Array3D((3, *geometry["size"]), "uint8")})

    def decode(path):
        try:
            with files.open(found[path]) as file:
                data = file.read(LARGEST_FILE + 1)
            return transform(read_image(data, ["JPEG", "PNG", "WEBP", "BMP", "GIF"]))
        except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, ValueError) as error:
            said = f"broken image {path} ({describe(error)})"
            if not skip_bad_images:
                raise ValueError(f"{said}; --skip_bad_images leaves such images out") from None
            print(f"{said}: left out")

    def decode_batch(batch):
        columns = {**batch, "pixels": [decode(path) for path in batch["path"]]}
        sound = [i for i, pixels in enumerate(columns["pixels"]) if pixels is not None]
        return {name: [values[i] for i in sound] for name, values in columns.items()}

    options = {"batched": True, "batch_size": 64, "features": kinds, "new_fingerprint": cache.stem}
    options["load_from_cache_file"] = False  # what lies there is damaged
    return rows.map(decode_batch, **options, cache_file_name=str(cache), desc="decode")


def to_geometry(geometry):
    """open_clip's own preprocessing up to the pixels: PIL image -> uint8 (3, H, W)."""
    resize = image_transform_v2(PreprocessCfg(**geometry), is_train=False)
    del resize.transforms[-2:]  # to float, and the normalisation
    return lambda image: np.asarray(resize(image)).transpose(2, 0, 1)


def read_image(data, formats):
    """An image file's bytes -> PIL image, RGB; ValueError for whatever is no photograph of 8 bits a channel."""
    try:
        if len(data) > LARGEST_FILE:
            raise ValueError(f"more than {LARGEST_FILE / 1e6:.0f} MB")
        with Image.open(io.BytesIO(data), formats=formats) as image:
            width, height = image.size
            if width * height > LARGEST_IMAGE or max(width, height) > 50 * min(width, height):
                raise ValueError(f"{width} x {height} pixels")
            if image.mode[0] in "IF":
                raise ValueError(f"more than 8 bits a channel (mode {image.mode})")
            return image.convert("RGB")
    except Exception as error:  # a damaged or hostile file raises anything
        raise ValueError(describe(error)) from None


def find_images(source, paths):
    """What opens the images of the rows' paths, a folder or the likeliest of its zips, and {path: name in it}.

    They are looked up by name in what the folder or the zip really lists, so that no path leads out of it; of several
    of one name that is taken which shares most of the path's folders. macOS's AppleDouble members have other names.
    Of a hub's zips that of MSCOCO_i2t alone is downloaded, of those of all tasks the needed members, by range requests.
    """
    local = os.path.isdir(source)
    fs, root = fsspec.url_to_fs(source if local else f"hf://datasets/{source}")
    names, inside, looked_into = fs.find(root), os.path.realpath(root) + os.sep, []
    zips = sorted((name for name in names if name.endswith(".zip")), key=lambda name: (CONFIG not in name, name))
    if local:  # nor does a link lead out
        names = [name for name in names if os.path.realpath(name).startswith(inside)]
    for place in ["", *zips]:
        with about(f"{place or root} cannot be read"):  # a block: about one image
            files = zipfile.ZipFile(fs.open(place, block_size=2**16)) if place else fs
        found = match_files(paths, sorted(files.namelist()) if place else names)
        if len(found) == len(paths):
            if CONFIG in place and not local:
                place = huggingface_hub.hf_hub_download(source, place.removeprefix(f"{root}/"), repo_type="dataset")
                files = zipfile.ZipFile(place)
            return files, found
        missing = next(path for path in paths if path not in found)
        looked_into.append(f"{place or 'the folder'} has {len(found)} of them and not {missing}")
    raise FileNotFoundError(f"{len(paths)} images looked for: {'; '.join(looked_into[:5])}")


def match_files(paths, names):
    """For each row path the file of its name whose folders fit best: {path: name}."""
    named, found = {}, {}
    for name in names:
        named.setdefault(PurePosixPath(name).name, []).append(name)
    for path in paths:
        folders = PurePosixPath(path).parts[::-1]
        if same := named.get(folders[0]):
            found[path] = max(same, key=lambda n: sum(accumulate(map(eq, folders, PurePosixPath(n).parts[::-1]), and_)))
    return found


def load_training_sets(args, geometry):
    """--num_images training images and the --val_images after them; ends with one line if one of them is evaluated.

    That is known by COCO id (all rows of the evaluation split) and by pixels (those that the preset's table uses).
    """
    training = load_examples(args, "train", range(args.num_images), geometry)
    validation = load_examples(args, "train", range(args.num_images, args.num_images + args.val_images), geometry)
    evaluated = load_rows(args, "eval")
    both = datasets.concatenate_datasets([training, validation])
    if shared := {*both["coco_id"]} & {*evaluated["coco_id"]}:
        fail(f"leakage: {len(shared)} COCO ids of --eval_data {args.eval_data} are trained on, such as {min(shared)}")
    used = load_examples(args, "eval", range(min(len(evaluated), PRESETS["eval_images"][args.preset])), geometry)
    path_of = {row["pixels"].tobytes(): row["path"] for row in used}
    for row in both:
        if twin := path_of.get(row["pixels"].tobytes()):
            fail(f"leakage: training image {row['path']} has the same pixels as evaluation image {twin}")
    return training, validation


# ---------------------------------------------------------------------------------------------------------------------
# The attack


@dataclass(frozen=True)
class Attack:
    """A budget and how it is spent; what makes the result, so the key under which a run keeps it."""

    eps: float  # L-inf radius, pixels in [0, 1]
    alpha: float  # step size on the same scale
    steps: int
    seed: int | None = 0  # of the noise around the start; None adds none
    momentum: float = 0.0  # with it, steps shrink by a half cosine
    loss: str = "cosine"  # with the own caption; or margin, the lead of the hardest other caption


def white_box(eps, steps, through_jpeg=False):
    """The attack of the white-box columns, from where pgd() is told to start."""
    # first step, in radii, and momentum: chosen on training images, of the tiny CLIP and of a real ViT-B/16 tower
    first, momentum = (2, 0.5) if through_jpeg else (1, 0.75)
    return Attack(eps, first * eps, steps, seed=None, momentum=momentum)


def pgd(loss_fn, images, attack, start=None):
    """Search the L-inf ball around images for the pixels that maximise loss_fn.

    images    (B, 3, H, W) float32 in [0, 1], before CLIP's normalisation
    loss_fn   maps such a batch to (B,) losses, one per image, higher = worse for the model
    start     where to begin, like images, moved into the ball; None begins at images
    returns   like images, for each the iterate of the highest loss; {what went wrong: in how many of the images}

    PGD of Madry et al. 2018 (arXiv:1706.06083), except that the best iterate is kept, not the last. With momentum it is
    MI-FGSM of Dong et al. 2018 (arXiv:1710.06081, equations 6 and 7), except that the gradient is divided by its mean
    absolute value, which changes no sign, and that steps shrink by a half cosine from alpha to 3 % of it.

    A loss or gradient that is not finite adds nothing and is counted, as is a gradient of zero in every pixel: neither
    may pass for robustness. Pixels outside [0, 1] raise ValueError. Differentiates the pixels alone: no parameter's
    .grad is touched. The model's mode is the caller's.
    """
    if images.min() < 0 or images.max() > 1:
        raise ValueError(f"pgd needs pixels in [0, 1], got [{images.min():.2f}, {images.max():.2f}]: normalised?")
    lower, upper = (images - attack.eps).clamp(min=0), (images + attack.eps).clamp(max=1)
    x = images if start is None else start.clamp(lower, upper)
    best, best_loss = images, images.new_full(images.shape[:1], -torch.inf)
    zero = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    nonfinite, velocity = zero.clone(), torch.zeros_like(images)
    for step in range(attack.steps + 1):  # the extra round only scores the last iterate
        last = step == attack.steps
        x = x.detach().requires_grad_(not last)
        with torch.set_grad_enabled(not last):
            loss = loss_fn(x)
        finite = loss.detach().isfinite()
        if not last:
            (grad,) = torch.autograd.grad(loss.sum(), x)  # sum, not mean: no factor 1/B to underflow
            finite &= grad.isfinite().flatten(1).all(1)
            grad = torch.where(finite[:, None, None, None], grad, 0)
            zero |= finite & (grad == 0).flatten(1).all(1)
        nonfinite |= ~finite
        x, loss = x.detach(), loss.detach()
        better = loss > best_loss  # False where the loss is NaN
        best_loss = torch.where(better, loss, best_loss)
        best = torch.where(better[:, None, None, None], x, best)
        if last:
            break
        size = grad.abs().mean((1, 2, 3), keepdim=True).clamp(min=torch.finfo(grad.dtype).tiny)
        velocity = attack.momentum * velocity + grad / size
        shrink = max(0.03, (1 + math.cos(math.pi * step / attack.steps)) / 2) if attack.momentum else 1
        x = (x + attack.alpha * shrink * velocity.sign()).clamp(lower, upper)
    return best, {"images_with_zero_gradients": int(zero.sum()), "images_with_nonfinite_values": int(nonfinite.sum())}


def start_noise(images, eps, seed, indices):
    """images moved by uniform noise in [-eps, eps], each by that of (seed, its index): whatever the batch size."""
    noise = torch.empty(images.shape)
    for row, index in zip(noise, indices):
        row.uniform_(-1, 1, generator=torch.Generator().manual_seed(seed * 1_000_003 + index))
    return images + eps * noise.to(images.device)


def grey_levels(eps):
    """The largest whole number of grey levels inside a radius on the [0, 1] scale."""
    return math.floor(eps * 255 + 1e-6)


def to_pixels(images, pixels, eps):
    """Round images in [0, 1] to uint8 without leaving the ball around pixels: uint8 (B, 3, H, W) on the CPU."""
    pixels = torch.tensor(np.asarray(pixels), device=images.device).int()
    delta = ((images * 255).round().int() - pixels).clamp(-grey_levels(eps), grey_levels(eps))
    return (pixels + delta).clamp(0, 255).byte().cpu()


def attack_images(attack, loss_at, pixels, clip, start=None, run=None, what="attack"):
    """Attack every image, a batch at a time; under torchrun this process's share: rank 0 has the first images.

    loss_at   slice of the images -> loss_fn of them for pgd(), such as own_caption()
    pixels    uint8 (N, 3, H, W), or a column of examples
    start     likewise: where to begin, if not at the images; a seed of the attack adds noise
    run       keeps each batch under (what, attack, its pixels): one that a killed run has kept is not attacked again
    yields    (slice, pixels_adv uint8 (B, 3, H, W) on the CPU, {what must be looked at before it is believed: count})
    """
    size = min(clip.batch_size, math.ceil(len(pixels) / PROCESSES))  # so that all have work
    starts = np.array_split(np.arange(0, len(pixels), size), PROCESSES)[RANK].tolist()
    with progress(what=what, total=min(len(starts) * size, len(pixels)) * (attack.steps + 1), unit="step") as bar:

        def counted(loss_fn, images):  # image-steps: the bar moves within a batch
            bar.update(len(images))
            return loss_fn(images)

        for at in starts:
            here = slice(at, min(at + size, len(pixels)))
            clean, first = (np.asarray(x[here]) for x in (pixels, pixels if start is None else start))
            key = [what, asdict(attack), at, hashlib.sha256(clean.tobytes() + first.tobytes()).hexdigest()]
            done = run and run.kept(key)
            if not done:
                images, begin = as_images(clean, clip.device), as_images(first, clip.device)
                if attack.seed is not None:
                    begin = start_noise(begin, attack.eps, attack.seed, range(here.start, here.stop))
                images_adv, wrong = pgd(partial(counted, loss_at(here)), images, attack, begin)
                pixels_adv = to_pixels(images_adv, clean, attack.eps)
                linf = linf_grey_levels(clean, pixels_adv)
                moved = {"max_abs_delta_grey_levels": int(linf.max()), "images_unmoved": int((linf == 0).sum())}
                done = {"pixels": pixels_adv, "health": moved | wrong}
                if run:
                    run.keep(key, done)
            yield here, done["pixels"], done["health"]


def attack_all(*args, **options):
    """attack_images(), collected from all processes: pixels_adv uint8 (N, 3, H, W) and its health."""
    parts = [part for share in gather(list(attack_images(*args, **options))) for part in share]
    return torch.cat([pixels for _, pixels, _ in parts]), sum_health([health for *_, health in parts])


def own_caption(encode_image, text_features):
    """The report's loss: minus the cosine with the own caption, row i of text_features (N, D)."""
    return lambda here: lambda images: -(encode_image(images) * text_features[here]).sum(-1)


def sum_health(parts):
    """The health of several batches as one."""
    return {key: (max if key.startswith("max") else sum)(part[key] for part in parts) for key in parts[0]}


def linf_grey_levels(pixels, pixels_adv):
    """Largest difference of each image to its twin, uint8 (..., 3, H, W) both: (...) whole grey levels."""
    return np.abs(np.asarray(pixels, np.int16) - np.asarray(pixels_adv, np.int16)).max((-3, -2, -1))


def adversarial_folder(args, split):
    """--adversarial_dir; its default is made first by generate_pgd_adversarial.py, with the same data and budget."""
    folder = Path(args.adversarial_dir or Path(args.output_dir).parent / f"adversarial_{split}")
    if not (folder / "metrics.json").exists():
        if args.adversarial_dir:
            fail(f"--adversarial_dir {folder} is not a finished folder of generate_pgd_adversarial.py")
        print(f"{folder} is not there yet and is made first:")
        run_script("generate_pgd_adversarial.py", args, folder.name, "--split", split, "--num_images", args.num_images)
    return folder


def require_same(folder, args, *flags):
    """The record of the run in folder; ends unless it has args' values of these flags, and is of the same weights."""
    record = load_record(folder / "metrics.json")
    for flag in flags:
        was, now = record["args"].get(flag), portable(getattr(args, flag))
        if was != now:
            fail(f"{folder} was made with --{flag} {was}, not {now}: give another folder")
    if stamps(args).items() - record["inputs"].items():
        fail(f"{folder} was made with other weights, which lay under the same name: make it again with --overwrite")
    return record


def load_adversarial(folder, examples, args):
    """The adversarial twins of examples from a folder of generate_pgd_adversarial.py: uint8 (N, 3, H, W).

    Refused are twins of another attack or caption, missing, altered, of another size, or outside the ball.
    """
    require_same(folder, args, "model", "pretrained", "eps", "alpha", "steps")
    listed, remedy, twins = folder / "metadata.jsonl", "make it again with generate_pgd_adversarial.py --overwrite", []
    with about(f"{listed}: {remedy}"):
        entries = map(json.loads, listed.read_text().splitlines())
        checksums = {(entry["coco_id"], entry["caption"]): entry["sha256"] for entry in entries}
    for row in progress(examples, "read", unit="image"):
        file = folder / twin_name(row["coco_id"])  # by the id: what the metadata names is not opened
        with about(f"{file}: {remedy}"):
            data, clean = file.read_bytes(), row["pixels"]
            if hashlib.sha256(data).hexdigest() != checksums.get((row["coco_id"], row["caption"])):
                raise ValueError("it was altered after it was made, or made for another caption")
            twin = np.asarray(read_image(data, ["PNG"])).transpose(2, 0, 1)
            if twin.shape != clean.shape or linf_grey_levels(twin, clean) > grey_levels(args.eps):
                raise ValueError(f"it is of another size than {row['path']}, or not in the ball around it")
            twins.append(twin)
    return np.stack(twins)


def twin_name(coco_id):
    """File of an adversarial image; no COCO_val2014_ in it: load_dataset would take val for a split."""
    return f"images/{coco_id:012d}.png"


def announce(clip, pixels, captions, image_steps):
    """Before the first batch, say the work, in images times steps forward and back to the pixels, and its time here."""
    check_gradient(clip, pixels, captions)
    pixel_gradient(clip, pixels, captions)  # a warm-up
    began = time.perf_counter()
    count = len(pixel_gradient(clip, pixels, captions))
    seconds = (time.perf_counter() - began) / count * image_steps / PROCESSES
    line = f"work: {image_steps:,} image-steps, about {duration(seconds)} on {PROCESSES} x {clip.device}"
    if clip.device.type == "cpu" and seconds > 1800:
        line += "; without a GPU, the smaller --preset tiny or smoke shows the same in minutes"
    print(line, flush=True)


def pixel_gradient(clip, pixels, captions):
    """Of the cosine with the own caption, of a first batch, on a CPU a small one: (B, 3 H W); waits for the GPU."""
    count = min(clip.batch_size, 8 if clip.device.type == "cpu" else clip.batch_size)
    images, text_features = as_images(pixels[:count], clip.device).requires_grad_(), clip.encode_text(captions[:count])
    (grad,) = torch.autograd.grad((clip.frozen()(images) * text_features).sum(), images)
    return grad.flatten(1).cpu()


def check_gradient(clip, pixels, captions):
    """Where bf16's gradient has another direction than fp32's, which is no evidence: end, or under auto go to fp32."""
    if not clip.bf16:
        return
    first = pixel_gradient(clip, pixels, captions)
    clip.bf16 = False
    agreement = F.cosine_similarity(first.flatten(), pixel_gradient(clip, pixels, captions).flatten(), dim=0).item()
    clip.bf16 = gather(agreement)[0] > 0.95  # rank 0's decides for all
    if not clip.bf16:
        said = f"{clip.arch}: the bf16 gradient has a cosine of {agreement:.3f} with the fp32 one"
        if clip.precision == "bf16":
            fail(f"{said}: --precision fp32")
        print(f"{said}: going on in fp32", flush=True)


def duration(seconds):
    """A time as the table shows it; None as '-'."""
    if seconds is None:
        return "-"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


# ---------------------------------------------------------------------------------------------------------------------
# Training: what both defences share; their scripts hold the loop


def contrastive_loss(image_features, text_features, logit_scale):
    """Symmetric contrastive loss (Radford et al. 2021, arXiv:2103.00020, figure 3) of a batch.

    image_features, text_features   (B, D), row i of both from one pair; equal captions are never each other's negatives
    """
    targets = torch.arange(len(image_features), device=image_features.device)
    _, caption_ids = torch.unique(text_features, dim=0, return_inverse=True)
    equal = caption_ids[:, None] == caption_ids[None]  # (B, B)
    equal[targets, targets] = False
    logits = (logit_scale * image_features @ text_features.T).masked_fill(equal, -torch.inf)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


class Trainer:
    """What both trainings share: order of the batches, states, validation, checkpoints; optimizer and loop are theirs.

    Iterating yields (step, batch, mine): numbers of the batch's images, and of this process's part of it. Fine-tuned is
    the visual tower; text tower and logit_scale are frozen. The best epoch is the one of the highest white-box
    similarity on the validation images. All random draws are functions of (seed, step, image), so that a state kept
    every --save_every minutes is enough to go on to the same files. Under torchrun --batch_size is shared out, and
    each loss is over the features of all: any number of processes trains the same.
    """

    def __init__(self, args, run, clip, optimizer, training, validation):
        self.args, self.run, self.clip, self.optimizer = args, run, clip, optimizer
        self.training, self.validation, self.visual = training, validation, clip.model.visual
        clip.model.requires_grad_(False)
        self.visual.requires_grad_(True)
        self.visual.set_grad_checkpointing(args.grad_checkpointing)
        self.model = torch.nn.parallel.DistributedDataParallel(clip) if PROCESSES > 1 else clip

        captions, self.size = training["caption"][:], args.batch_size
        clip.batch_size = math.ceil(self.size / PROCESSES)  # images at a time in this one
        self.steps_per_epoch = math.ceil(len(training) / self.size)
        self.last_step = min(args.epochs * self.steps_per_epoch, args.max_steps or math.inf)
        self.log, self.epochs, self.stopped = [], [], None
        if state := run.kept("state"):
            self.visual.load_state_dict(state["visual"])
            optimizer.load_state_dict(state["optimizer"])
            self.log, self.epochs = state["log"], state["epochs"]
        online_steps, steps = getattr(args, "online_steps", 0), self.last_step - len(self.log)
        work = steps * self.size * (3 + online_steps)  # training on a pair takes about three image-steps
        work += math.ceil(steps / self.steps_per_epoch) * len(validation) * args.steps
        announce(clip, training[: self.size]["pixels"], captions, work)
        self.text_features = clip.encode_text(captions)  # (N, D)

        model, tower = (sum(p.numel() * 4 for p in module.parameters()) for module in (clip.model, self.visual))
        run.begin(2 * model + 2 * 3 * tower)  # best.pt, last.pt; weights and two moments, and the next of them
        if not RANK:
            save(run.dir / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in self.log))

    def __iter__(self):
        self.saved = time.perf_counter()
        with progress(range(len(self.log), self.last_step), "train", unit="step") as self.bar:
            for step in self.bar:
                epoch, position = divmod(step, self.steps_per_epoch)
                order = np.random.default_rng([self.args.seed, epoch]).permutation(len(self.training))
                batch = order[position * self.size : (position + 1) * self.size]
                mine = np.array_split(np.pad(batch, (0, -len(batch) % PROCESSES), mode="edge"), PROCESSES)[RANK]
                torch.manual_seed(self.args.seed + step)  # for a tower with patch dropout
                self.visual.train()
                yield step, batch, mine
                if self.stopped:
                    return

    def encode(self, images, twins, count):
        """Features of the batch's clean images and of their twins, (count, D) each, in one pass through the tower."""
        features = self.model(torch.cat([images, twins])).chunk(2)
        if PROCESSES > 1:  # those of the others without gradient
            features = open_clip.loss.gather_features(*features, rank=RANK, world_size=PROCESSES)
        return [x[:count] for x in features]  # without what was padded to share the batch out

    def end_step(self, **figures):
        """Log the figures, loss and grad_norm among them; validate after an epoch; keep a state now and then."""
        args, step = self.args, len(self.log) + 1
        figures = {key: value.item() for key, value in figures.items()}
        if not math.isfinite(figures["loss"] + figures["grad_norm"]):
            good = self.run.dir / "last.pt" if self.epochs else "none yet"
            fail(f"step {step} is not finite: {figures}; last good checkpoint: {good}")
        epoch = math.ceil(step / self.steps_per_epoch)
        self.log.append({"step": step, "epoch": epoch, **figures, "lr": self.optimizer.param_groups[0]["lr"]})
        self.bar.set_postfix(loss=f"{figures['loss']:.3f}", refresh=False)
        window = gather([entry["loss"] for entry in self.log[-args.loss_window :]])[0]  # all stop at the same step
        if args.loss_threshold and len(window) == args.loss_window and np.mean(window) < args.loss_threshold:
            self.stopped = "loss_threshold"
        elif step == self.last_step:
            self.stopped = "max_steps" if self.last_step == args.max_steps else "epochs"
        if not RANK:
            with open(self.run.dir / "log.jsonl", "a") as file:
                file.write(json.dumps(self.log[-1]) + "\n")
        if self.stopped or step % self.steps_per_epoch == 0:
            self.end_epoch(epoch, float(np.mean(window)))
        due = step % self.steps_per_epoch == 0 or time.perf_counter() - self.saved >= 60 * args.save_every
        if due and not RANK and not self.stopped:
            state = {"visual": self.visual.state_dict(), "optimizer": self.optimizer.state_dict()}
            self.run.keep("state", state | {"log": self.log, "epochs": self.epochs})
            self.saved = time.perf_counter()

    def end_epoch(self, epoch, loss):
        """White-box similarity on the validation images, which chooses the best epoch; last.pt and best.pt."""
        args, clip = self.args, self.clip
        self.visual.eval()
        pixels, text_features = self.validation["pixels"], clip.encode_text(self.validation["caption"][:])
        attack = white_box(args.eps, args.steps)
        pixels_adv, _ = attack_all(attack, own_caption(clip.frozen(), text_features), pixels, clip, what="validate")
        clean, attacked = ((clip.encode_pixels(x) * text_features).sum(-1).mean().item() for x in (pixels, pixels_adv))
        best = all(attacked > past["val_white_box"] for past in self.epochs)
        figures = {"epoch": epoch, "step": len(self.log), "loss": loss, "val_clean": clean, "val_white_box": attacked}
        self.epochs.append(figures)
        line = f"epoch {epoch}/{args.epochs}  step {len(self.log)}  loss {loss:.3f}  validation clean {clean:.3f}, "
        say = tqdm.write if sys.stderr.isatty() else print  # above the bar of a terminal
        say(f"{line}white-box {attacked:.3f}{'  *' if best else ''}")
        checkpoint = {  # plain types: weights_only=True and open_clip.create_model(name, pretrained=FILE) open it
            "epoch": epoch,
            "name": clip.arch,
            "quick_gelu": has_quick_gelu(clip.model),
            "state_dict": {key: value.cpu() for key, value in clip.model.state_dict().items()},
            "train_ids": sorted({*self.training["coco_id"], *clip.train_ids}),  # of the weights it started from, too
            "args": {key: value for key, value in self.run.record["args"].items() if key not in NOT_IN_RESULT},
        }
        for name in [] if RANK else ["last.pt", "best.pt"] if best else ["last.pt"]:
            save(self.run.dir / name, checkpoint)

    def finish(self, seconds_before=0, **metrics):
        """Write metrics.json; seconds_before: what it took to make the adversarial images."""
        figures = {"n": len(self.training), "n_validation": len(self.validation), "steps": len(self.log)}
        figures |= {"stopped_by": self.stopped, "epochs": self.epochs, "global_batch_size": self.size}
        figures["best_epoch"] = max(self.epochs, key=lambda epoch: epoch["val_white_box"])["epoch"]
        figures |= {"train_ids": self.training["coco_id"][:], "val_ids": self.validation["coco_id"][:]}
        seconds = self.run.seconds()
        speed = {"training_seconds": seconds + seconds_before, "images_per_s": 2 * self.size * len(self.log) / seconds}
        self.run.finish(self.clip, **figures, **speed, **metrics)
