"""What the five scripts share. Each script holds its own method; whatever two of them need stands here.

Words and units, the same everywhere:
    images          (B, 3, H, W) float32 pixels in [0, 1], after resize and centre crop, before CLIP's normalisation
    pixels          the same as uint8 grey levels; images_adv and pixels_adv are attacked
    eps, alpha      L-inf radius and step size on the [0, 1] scale: 8/255, not 8
    image_features  (B, D) float32, unit norm; text_features likewise
    logit_scale     the multiplier of the cosine (about 100), not its logarithm
    similarity      cosine of an image and its own caption

Five nouns go from script to script; only what makes one reads the flags:
    Run      an output folder: refuses another run, resumes its own, records how it was made
    Clip     a model on its device, for pixels in [0, 1] and captions, by load_clip()
    Images   images of a split in a model's geometry, and their captions, by load_images()
    Attack   a budget and how it is spent; pgd() spends it on a batch, attack_all() on all images
    Row      evaluate.py's: a model, what stands in front of it, its images, the captions to rank

Sections: Flags; Errors and processes; Runs; CLIP; Weights; Data; The attack; Training.
"""

import argparse
import ast
import csv
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
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
from functools import lru_cache, partial
from itertools import takewhile
from pathlib import Path, PurePosixPath

import datasets
import fsspec
import huggingface_hub
import numpy as np
import open_clip
import PIL
import pyarrow.parquet as pq
import safetensors.torch
import torch
import torchvision
from open_clip.transform import PreprocessCfg, image_transform_v2, to_2tuple
from PIL import Image, ImageOps
from torch import distributed
from torch.nn import functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
TINY = ROOT / "tests" / "tiny"

# ---------------------------------------------------------------------------------------------------------------------
# Flags

PRESETS = {  # --num_images is train_images or eval_images, by the split that a script reads; --lr the training's rate
    "report": {
        "model": "ViT-L-14-quickgelu", "pretrained": "openai",
        "train_data": "TIGER-Lab/MMEB-train", "eval_data": "TIGER-Lab/MMEB-eval",
        "train_images": 5000, "eval_images": 100, "val_images": 250,
        "steps": 20, "attack_steps": 150, "epochs": 3,
        "mat_lr": 1e-5, "contrastive_lr": 1e-5, "features_lr": 1e-5,
    },
    "tiny": {
        "model": f"local-dir:{TINY}/clip", "pretrained": "",
        "train_data": f"{TINY}/MMEB-train", "eval_data": f"{TINY}/MMEB-eval",
        "train_images": 1000, "eval_images": 100, "val_images": 20,
        "steps": 20, "attack_steps": 75, "epochs": 4,
        # chosen by the rule of tests/tiny/choose_rates.py, on images of the training split that no training sees
        "mat_lr": 4e-4, "contrastive_lr": 1e-4, "features_lr": 1.6e-3,
    },
}  # fmt: skip
PRESETS["smoke"] = PRESETS["tiny"] | {"train_images": 48, "eval_images": 16, "val_images": 8}
PRESETS["smoke"] |= {"steps": 8, "attack_steps": 10, "epochs": 2}


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show the script's docstring as it stands, and the default behind every flag that has one."""

    def _get_help_string(self, action):
        shown = action.default is not None and action.default is not False and action.default != []
        return super()._get_help_string(action) if shown else action.help


def pixel_distance(text):
    """argparse type for a distance on the [0, 1] pixel scale: '8/255' or '0.0314'."""
    over, _, under = text.partition("/")
    with suppress(ValueError, ZeroDivisionError):
        value = float(over) / float(under or 1)
        if 0 < value < 1:
            return value
    advice = "" if under else f"; for {text} grey levels write {text}/255"
    raise argparse.ArgumentTypeError(f"{text!r} is not a number or fraction between 0 and 1{advice}")


def radius(text):
    """argparse type for the radius of an attack on 8-bit images, at least one grey level."""
    value = pixel_distance(text)
    if not grey_levels(value):
        raise argparse.ArgumentTypeError(f"{text} is less than one grey level, 1/255, which 8-bit images cannot hold")
    return value


def radius_text(value):
    """Write a distance on the [0, 1] pixel scale as a flag takes it: 8/255, or the number where that is shorter."""
    text = f"{value * 255:.6g}/255"
    return min([repr(value), text], key=len) if pixel_distance(text) == value else repr(value)


def number(low, high=math.inf, kind=int):
    """Return an argparse type: an int, or another kind of number, from low to high."""

    def convert(text):
        value = kind(text)
        if not low <= value <= high:  # NaN is refused, too
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value

    convert.__name__ = kind.__name__  # argparse names it in its error
    return convert


def make_parser(doc, batch_size=64):
    """Make a parser with the flags that every script has; a flag without a default here gets its value from fill()."""
    presets = []
    for name, values in PRESETS.items():
        presets.append(f"--preset {name}: " + ", ".join(f"{key} {value}" for key, value in values.items()))
    parser = argparse.ArgumentParser(
        description=doc, epilog="\n\n".join(presets), formatter_class=Formatter, allow_abbrev=False
    )
    parser.error = lambda message: fail(f"{message}; --help lists the flags")
    flag = parser.add_argument_group("run").add_argument
    flag("--preset", choices=list(PRESETS), default="report", help="values of flags that are left out; see the end")
    flag("--output_dir", help="output folder; the folders of the other scripts stand beside it")
    flag("--seed", type=number(0, 2**31), default=0, help="seed of all random numbers")
    flag("--device", default="auto", help="cuda, cuda:1, mps, cpu, or auto: the first of them that is available")
    flag = parser.add_argument_group("model").add_argument
    flag("--model", help="open_clip name, local-dir:DIR or hf-hub:ORG/NAME")
    pretrained = "open_clip tag, a file of weights (on a hub hf-hub:ORG/NAME/FILE), or 'random' for untrained ones"
    flag("--pretrained", help=pretrained)
    precision = "of gradients; scores are always fp32. auto, on a GPU: bf16 for trainings and their images, else TF32"
    flag("--precision", choices=["auto", "fp32", "bf16"], default="auto", help=precision)
    flag = parser.add_argument_group("data").add_argument
    own = "a folder with metadata.jsonl or metadata.csv (file_name, caption), COCO's captions_*.json, or Karpathy's"
    own += " dataset_*.json"
    flag("--train_data", help=f"training set: MMEB's hub id or a local copy of it; {own}")
    flag("--eval_data", help="evaluation set, in the same forms")
    flag("--image_root", nargs="+", metavar="DIR", help="folder of the images; train=DIR or eval=DIR: of one split")
    flag("--num_images", type=number(1), help="use the first images; default for your own pictures: all")
    flag("--skip_bad_images", action="store_true", help="leave out and count images that are missing or damaged")
    flag("--batch_size", type=number(1), default=batch_size, help="images per batch; in a training, over all processes")
    flag("--num_workers", type=number(1, 1024), default=os.cpu_count(), help="threads that read and write images")
    flag("--cache_dir", default="runs/cache", help="folder of the images that a zip on a hub holds")
    flag = parser.add_argument_group("attack: L-inf, pixels in [0, 1], before CLIP's normalisation").add_argument
    flag("--eps", type=radius, default="8/255", help="radius of the ball around an image")
    flag("--alpha", type=pixel_distance, default="2/255", help="step size of the report's attack")
    flag("--steps", type=number(1, 10**6), help="steps of the report's attack; in a training, of its validation")
    return parser


def add_train_args(parser):
    """Add the flags of both trainings."""
    flag = parser.add_argument_group("training").add_argument
    flag("--lr", type=number(1e-12, 1, float), help="learning rate of AdamW")
    flag("--weight_decay", type=number(0, 100, float), default=0.1, help="weight decay of AdamW, for matrices alone")
    flag("--epochs", type=number(1, 10**4), help="passes over the training images")
    flag("--max_steps", type=number(1), help="stop after this many optimizer steps")
    flag("--save_every", type=number(0, 10**6, float), default=5, help="minutes between checkpoints to resume from")
    flag("--grad_checkpointing", action="store_true", help="use less memory and a third more time")
    threshold = "stop when the contrastive loss, averaged over --loss_window steps, is below this"
    flag("--loss_threshold", type=number(1e-12, 10**6, float), help=threshold)
    flag("--loss_window", type=number(1), default=50, help="steps that --loss_threshold averages over")
    flag("--val_images", type=number(1), help="images of the training split to validate on; they are not trained on")


# of a training's identity, and in its folder
TRAIN_FLAGS = "seed eps alpha steps lr weight_decay epochs max_steps batch_size loss_threshold loss_window"
TRAIN_FILES = ["log.jsonl", "open_clip_config.json", "open_clip_model.safetensors"]


def fill(args, stage, split, rate=None):
    """Give the flags that the user left out their values from --preset, and replace ~ in paths.

    stage   name of the default output folder under runs/PRESET/
    split   'train' or 'eval': whose image count is the default of --num_images
    rate    name of the preset's learning rate, for trainings
    """
    with exit_on_error("the command line is not text in UTF-8"):  # run.json could not hold it
        json.dumps(vars(args), ensure_ascii=False, default=str).encode()
    for name, value in vars(args).items():
        if isinstance(value, str):
            setattr(args, name, expand_home(value))
    args.image_root = args.image_root and [expand_home(root) for root in args.image_root]
    values = dict(PRESETS[args.preset])
    own = is_own(getattr(args, f"{split}_data") or "")
    values["num_images"] = None if own else values[f"{split}_images"]  # None: all of them
    if own and split == "train":
        values["val_images"] = None  # a tenth; load_training_images() counts
        del values["eval_data"]  # such a training needs no evaluation set
    values["lr"] = values.get(rate)
    if (args.model or "").startswith(SCHEMAS):
        values["pretrained"] = ""  # such a model brings its weights
    values["output_dir"] = f"runs/{args.preset}/{stage}{radius_suffix(args)}"
    for name, value in values.items():
        if getattr(args, name, "no such flag") is None:
            setattr(args, name, value)
    if not args.output_dir:
        fail("--output_dir is empty")
    if rate:
        check_batch(args, args.num_images)
    return args


def check_batch(args, count):
    """Exit unless an epoch has a whole batch, and every process the same part of it; count may be unknown: None."""
    if count is not None and count < args.batch_size:
        fail(f"--batch_size {args.batch_size} is more than the {count} training images: lower it")
    if args.batch_size % PROCESSES:
        fail(f"--batch_size {args.batch_size} is no multiple of the {PROCESSES} processes")


def expand_home(path):
    """Replace the ~ at the start of a path, or behind local-dir:, train= or eval=, by the home folder."""
    prefix = re.match("(local-dir:|train=|eval=)?", path)[0]
    return prefix + os.path.expanduser(path.removeprefix(prefix))


def radius_suffix(args):
    """Return the suffix of default folders for a radius other than the report's, such as _eps4."""
    return "" if args.eps == 8 / 255 else f"_eps{args.eps * 255:.6g}"


def stage_name(script, name):
    """Return the default folder of a training's script: name, or for a copy of the script the name of the file."""
    script = Path(script).stem
    return name if script in ("defend_clip_mat_v2", "defend_clip_pgd_v2") else script


SHARED = "preset device model pretrained precision train_data eval_data image_root skip_bad_images num_workers"
SHARED += " cache_dir eps alpha steps seed"


def stage_folder(args, stage):
    """Return the output folder of another script, beside --output_dir."""
    return str(Path(args.output_dir).parent / f"{stage}{radius_suffix(args)}")


def stage_args(parse_args, args, stage, *words):
    """Return the flags of another script, with the values of those that all share; words win over them."""
    given = argparse.Namespace(**{name: getattr(args, name) for name in SHARED.split()})
    return parse_args([*map(str, words), "--output_dir", stage_folder(args, stage)], given)


# ---------------------------------------------------------------------------------------------------------------------
# Errors and processes

RANK, PROCESSES = 0, 1
if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun started this process
    RANK, PROCESSES = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def fail(message, what="error", code=2):
    """Exit with one line on stderr that says what is wrong, where, and what to do."""
    if RANK:
        time.sleep(10)  # rank 0 prints an error that all processes meet; torchrun then ends this one
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(message.split()))
    print(f"{Path(sys.argv[0]).name}: {what}: {line}", file=sys.stderr, flush=True)
    raise SystemExit(code)


@contextmanager
def exit_on_error(what):
    """Exit with a one-line error that names `what` if the block raises."""
    try:
        yield
    except Exception as error:
        fail(f"{what}: {describe(error)}")


def describe(error):
    """Return an error and its cause in one line, and which variables to set where a hub cannot be reached."""
    text = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    text += f" ({cause})" if cause else ""
    hub = re.search(r"(?i)connect|offline|resolv|timed? ?out|couldn't reach|\bhub\b|max retries", text)
    advice = "; for the hub set HF_ENDPOINT, HF_TOKEN or HF_HOME, or give a local folder" if hub else ""
    return " ".join(text.split())[:400] + advice


@contextmanager
def process_group():
    """Join the other processes of torchrun, which share all folders. If one of them fails, all end."""
    if PROCESSES == 1 or distributed.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, timeout=timedelta(days=1))  # rank 0 may work alone for hours
    if RANK:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        yield
    except BaseException as error:
        reported = isinstance(error, SystemExit)  # by fail() or run_main()
        if not reported:
            time.sleep(10)  # if another process has failed first, torchrun ends this one now
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(error.code if reported else 1)  # a regular exit would make NCCL wait for the others
    distributed.destroy_process_group()


@process_group()
def run_main(main, args):
    """Run main(args); Ctrl-C, a full disk or a full GPU end it with one line, a bug with its traceback."""
    silenced = logging.root.manager.disable
    logging.disable(logging.ERROR)  # silences datasets and open_clip, which also raise what matters
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()
    if args.eps != grey_levels(args.eps) / 255:
        levels = grey_levels(args.eps)
        print(f"note: --eps {radius_text(args.eps)} allows 8-bit images to change by {levels} grey levels")
    try:
        main(args)
    except KeyboardInterrupt:
        if RANK:
            raise SystemExit(130)
        fail("the same command resumes from what is saved", "stopped", 130)
    except torch.OutOfMemoryError:
        remedy = "add --grad_checkpointing" if hasattr(args, "lr") else "use a smaller one: the same command resumes"
        fail(f"--batch_size {args.batch_size} is too large for the GPU's memory: {remedy}")
    except OSError as error:
        fail(f"{describe(error)}. Once that is solved, the same command resumes from what is saved")
    finally:
        logging.disable(silenced)
        while LOCKS:  # in a notebook the process goes on
            os.close(LOCKS.popitem()[1])


def gather(value=None):
    """Return the values of all processes, in the order of their ranks; gather() without a value is a barrier."""
    values = [value] * PROCESSES
    if PROCESSES > 1:
        distributed.all_gather_object(values, value)
    return values


tqdm.set_lock(threading.RLock())  # Python 3.14 reports tqdm's own, of multiprocessing, as leaked at os._exit()


def progress(iterable=None, what="", total=None, unit="batch"):
    """Return a progress bar with rate and remaining time, which appears after two seconds."""
    options = {"unit": unit, "delay": 2, "ncols": 79, "disable": RANK > 0, "leave": False, "mininterval": 0.2}
    if not sys.stderr.isatty():  # in a log: a line every 30 seconds
        return LogBar(iterable, what, total, **options | {"mininterval": 30})
    return tqdm(iterable, what, total, **options)


class LogBar(tqdm):
    """A progress bar in a log file: lines, without what would move or blank the line of a terminal."""

    def display(self, msg=None, pos=None):
        if msg is None:  # else it would be cleared
            print(self, file=self.fp, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Runs: an output folder each. run.json, written first, says whose it is; metrics.json, written last, has the figures

LOCKS = {}  # {folder that this process writes to: its file descriptor}


class Run:
    """An output folder: refuses another run, resumes its own, and records how it was made.

    A unit of work (an image, a row, the state of a training) is done when its own file is there; what is missing is
    made. Nothing is deleted but what the run itself has stored to resume from.

    args     the flags of the script, its output folder among them
    script   path of the script, whose name is part of the identity: a copied script is another run
    flags    names of the flags that are part of the identity
    writes   names that the script writes into the folder; any other file there is the user's

    .begun   whether this run has made something
    """

    def __init__(self, args, script, flags, writes):
        self.dir, self.script, self.begun = Path(args.output_dir), script, False
        self.writes = [*writes, "parts", "metrics.json"]
        self.record = {
            "identity": {"script": Path(script).name} | {flag: getattr(args, flag) for flag in flags.split()},
            "code": source_digest(script),
            "versions": versions(),
            "commit": git_commit(),
            "argv": sys.argv,
            "script": Path(script).name,
            "args": vars(args),
            "started": datetime.now(timezone.utc).isoformat(),
            "seconds": 0.0,
        }
        self.record = json.loads(json.dumps(self.record))  # plain values, which are compared with a file's
        self.check()

    def identify(self, **digests):
        """Add what is known once models and images are loaded to the identity."""
        self.record["identity"] |= digests
        self.check()

    def check(self):
        """Exit if the folder holds another run, or a file of the user's under a name that the script writes."""
        if not RANK:
            with exit_on_error(f"--output_dir {self.dir}"):
                self.look()
        self.record = gather(self.record)[0]

    def look(self):
        """Take over when the folder's run was started; raise ValueError where check() exits."""
        self.previous = read_record(self.dir / "run.json")
        if not self.previous:
            if taken := [name for name in self.writes if (self.dir / name).exists()]:
                raise ValueError(f"it holds {taken[0]} and no run.json of these scripts: choose another --output_dir")
            return
        was, now = self.previous["identity"], self.record["identity"]
        changes = [difference(key, was.get(key), now[key]) for key in now if was.get(key) != now[key]]
        if changes:
            changes = "; ".join(changes)
            raise ValueError(f"it holds another run ({changes}): remove that folder, or choose another --output_dir")
        self.record |= {key: self.previous[key] for key in ("started", "seconds")}

    @property
    def done(self):
        """Whether metrics.json is there, as rank 0 sees it."""
        return gather((self.dir / "metrics.json").exists())[0]

    def report_done(self):
        """Print that there is nothing to do, and by which commit it was done."""
        if not RANK:  # a run that was killed after it wrote metrics.json leaves its parts
            shutil.rmtree(self.dir / "parts", ignore_errors=True)
        print(f"{self.dir} is complete: nothing to do. To make it again, remove that folder")
        if maker := other_maker(read_record(self.dir / "run.json"), self.script):
            print(f"note: {self.dir} was made by {maker}")

    def begin(self, any_code=False):
        """Take the folder for writing until finish(); exit if other code has begun what is unfinished there.

        any_code   whether units of other code may stand beside those of this run
        """
        if self.begun:
            return
        if not RANK:
            with exit_on_error(f"--output_dir {self.dir}"):
                self.take(any_code)
        self.begun, self.clock = True, time.perf_counter()
        gather()

    def take(self, any_code):
        """Lock the folder, and write run.json; raise ValueError where begin() exits."""
        self.dir.mkdir(parents=True, exist_ok=True)
        if self.dir in LOCKS:  # a call of main() that failed in a notebook
            os.close(LOCKS.pop(self.dir))
        LOCKS[self.dir] = os.open(self.dir, os.O_RDONLY)
        try:
            fcntl.flock(LOCKS[self.dir], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError("another run is writing to it: wait for it, or choose another --output_dir") from None
        except OSError:
            pass  # a file system without locks
        self.look()  # again: another run may have been here since
        old, new = self.previous, self.record
        if old and not any_code and (old["code"], old["versions"]) != (new["code"], new["versions"]):
            raise ValueError(f"{made_by(old)} began it, not {made_by(new)}: go on with those, or remove that folder")
        if old:
            print(f"{self.dir} is resumed ({new['seconds']:.0f} s were done before)")
        save(self.dir / "run.json", new)
        (self.dir / "metrics.json").unlink(missing_ok=True)

    def save_part(self, key, value):
        """Store a part of the work, tensors and plain values, for a run that is killed and resumed."""
        (self.dir / "parts").mkdir(exist_ok=True)
        save(self.dir / "parts" / f"{digest(key)}.pt", value)
        if not RANK:
            save(self.dir / "run.json", self.record | {"seconds": self.seconds()})

    def load_part(self, key):
        """Return what a killed process of this run stored under key, or None."""
        return load_tensors(self.dir / "parts" / f"{digest(key)}.pt")

    def seconds(self):
        """Return the wall time of this run, without the pauses between a kill and a resume."""
        return self.record["seconds"] + time.perf_counter() - self.clock

    def finish(self, device, **metrics):
        """Write metrics.json, how the run was made and the script's figures; release the folder."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device} ({platform.machine()})"
        self.record |= {"device": name, "processes": PROCESSES, "seconds": round(self.seconds(), 3)}
        gather()  # every process has stored its units
        if not RANK:
            save(self.dir / "run.json", self.record)
            save(self.dir / "metrics.json", self.record | metrics)
            shutil.rmtree(self.dir / "parts", ignore_errors=True)
            for file in self.dir.rglob(".*.tmp"):  # of a process that was killed; not of runs in folders below
                ours = file.relative_to(self.dir).parts[0] in (*self.writes, file.name)
                if ours and re.fullmatch(r"\..+\.\d+\.tmp", file.name):
                    file.unlink()
            os.close(LOCKS.pop(self.dir))
        gather()


def difference(key, was, now):
    """Return a text that says what of an identity differs: a flag with both values, or another kind of input."""
    if isinstance(now, str) and re.fullmatch("[0-9a-f]{20}", now):
        return f"another {key.replace('_', ' ')}"
    if key in ("eps", "alpha") and was:
        was, now = radius_text(was), radius_text(now)
    was, now = ("none" if value is None else value for value in (was, now))
    return f"{key if key in ('script', 'precision') else f'--{key}'} {was}, not {now}"


def made_by(record):
    """Return a text that names the commit and the versions behind a record."""
    return f"commit {record['commit']} with {record['versions']}"


def read_record(file):
    """Return the content of a run.json or metrics.json, or None if there is none; ValueError if it is not ours."""
    if not file.exists():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if record.keys() >= {"identity", "code", "versions", "commit", "args", "started", "seconds"}:
            return record
    except (ValueError, AttributeError, RecursionError):
        pass
    raise ValueError(f"{file.name} is damaged or a stranger's: remove that folder, or choose another")


def other_maker(record, script):
    """Return a text that names the commit behind a record, and versions that are others; None if all is the same."""
    if record["versions"] != versions():
        return made_by(record)
    return f"commit {record['commit']}" if record["code"] != source_digest(script) else None


@lru_cache  # it takes 0.2 s, and is asked for every row
def source_digest(script):
    """Return a digest of the text of a script and of every module of ours that it imports."""
    files = [Path(script).resolve()]
    for file in files:  # grows on the way
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            imported = [ROOT / f"{module}.py" for module in modules]
            files += [file for file in imported if file.exists() and file not in files]
    return digest(*(file.read_text(encoding="utf-8") for file in sorted(files)))


def versions():
    """Return the versions that may move a figure, as text: 'python 3.12, torch 2.14.1, ...'."""
    modules = torch, torchvision, open_clip, np, PIL
    python = f"python {sys.version_info[0]}.{sys.version_info[1]}"
    return ", ".join([python, *(f"{module.__name__} {module.__version__.split('+')[0]}" for module in modules)])


def git_commit():
    """Return the commit of this checkout, with '-dirty' if a tracked file was changed, or None outside git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    with suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def digest(*values):
    """Return a hash of arrays, tensors, bytes and plain values: 20 characters."""
    content = hashlib.sha256()
    for value in values:
        if isinstance(value, (torch.Tensor, np.ndarray)):
            content.update(f"{tuple(value.shape)} {value.dtype}".encode())
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        if isinstance(value, np.ndarray):
            content.update(np.ascontiguousarray(value))
        elif isinstance(value, bytes):
            content.update(value)
        else:
            content.update(json.dumps(value).encode())
    return content.hexdigest()[:20]


def load_tensors(file):
    """Return the content of a .pt file that save() wrote, or None if there is none or it is damaged."""
    with suppress(Exception), zipfile.ZipFile(file) as archive:  # a damaged file raises any exception
        if archive.testzip() is None:  # torch does not compare the checksums
            return torch.load(file, map_location="cpu", weights_only=True)
    return None


def save(path, value):
    """Write a file as a whole or not at all: tensors, a PIL image (.png), bytes, a text, or plain values as JSON.

    value   for .safetensors ({name: tensor}, {key: text}); for .pt whatever torch.save takes
    """
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            if path.suffix == ".pt":
                torch.save(value, file)
            elif path.suffix == ".safetensors":
                file.write(safetensors.torch.save(*value))
            elif isinstance(value, Image.Image):
                value.save(file, "PNG", compress_level=1)  # level 6 is 5 % smaller and takes 30 % more time
            else:
                if not isinstance(value, (str, bytes)):
                    options = {"indent": 1, "ensure_ascii": False, "allow_nan": False}
                    value = json.dumps(value, default=lambda array: array.tolist(), **options) + "\n"
                file.write(value if isinstance(value, bytes) else value.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except RuntimeError as error:  # torch.save hides why the file could not be written
        raise (error.__context__ or error) from None
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# CLIP


LORA = "it holds factors of LoRA: merge them into the weights first"
SENTENCE = "Ein Café in ZÜRICH, 3 Gäste: 一只猫"  # whose token ids tell tokenizers apart


class Clip(torch.nn.Module):
    """An open_clip model on its device, for pixels in [0, 1] and captions.

    name        of --model or the checkpoint, for messages
    config      content of its open_clip_config.json: {"model_cfg": {...}, "preprocess_cfg": {...}}
    tokenizer   open_clip's: list of captions -> (B, context_length) int64
    batch_size  images at a time
    precision   of gradients: fp32, tf32 or bf16. Scores are always computed in fp32
    geometry    open_clip's preprocessing up to the pixels, as plain values: size, interpolation, resize_mode, ...
    trained_on  set of Images.fingerprints() of what its weights were trained and validated on, as far as they say
    notes       what a reader of its figures must know of its weights, a list of texts
    twin        what to type for the same weights with the other activation, where their file does not say which is
                right; else None
    """

    def __init__(self, model, name, model_cfg, tokenizer, device, precision, batch_size, trained_on, notes, twin=None):
        super().__init__()
        self.model, self.device, self.batch_size = model.to(device).eval(), device, batch_size
        self.name, self.tokenizer = name, tokenizer
        if not all(weights.isfinite().all() for weights in model.state_dict().values()):
            raise ValueError("its weights are not finite: they are damaged, or of a training that diverged")
        self.precision = precision
        self.geometry = dict(open_clip.get_model_preprocess_cfg(model))
        self.geometry["size"] = to_2tuple(self.geometry["size"])
        preprocess_cfg = {key: value for key, value in self.geometry.items() if key != "size"}
        self.config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
        for key in ("mean", "std"):  # the normalisation is part of the model: attacks change pixels
            self.register_buffer(key, torch.tensor(self.geometry.pop(key), device=device).view(3, 1, 1))
        self.text_cache, self.trained_on, self.notes, self.twin = {}, trained_on, notes, twin
        state = {name: value for name, value in model.state_dict().items() if name != "logit_scale"}  # moves no cosine
        self.weights_digest = gather(None if RANK else digest(*state.values()))[0]
        self.digest = digest(self.weights_digest, model.logit_scale, self.config, tokenizer([SENTENCE]))

    def encode_image(self, images, normalize=True):
        """Encode (B, 3, H, W) float32 in [0, 1] to (B, D) float32 by open_clip's own tower.

        normalize   to unit norm; False gives the features before that, as in open_clip's encode_image

        With gradients the products are in bf16 if that is .precision; under torch.no_grad() all is fp32.
        """
        bf16 = self.precision == "bf16" and torch.is_grad_enabled()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            features = self.model.encode_image((images - self.mean) / self.std).float()
        return F.normalize(features, dim=-1) if normalize else features

    forward = encode_image  # for DistributedDataParallel

    def attack_encoder(self, precision=None):
        """Return encode_image of the present weights for attacks: differentiable in the images alone, and faster.

        precision   of its products, by default .precision; TF32 is switched on by tf32()
        """
        dtype = torch.bfloat16 if (precision or self.precision) == "bf16" else torch.float32
        return fast_tower(self.model.visual, self.mean, self.std, dtype) or self.encode_image

    @torch.no_grad()
    def encode_pixels(self, pixels, encode_image=None):
        """Encode uint8 images (N, 3, H, W) in batches: (N, D).

        encode_image   by default that of this model; of a whole defence for its features
        """
        encode_image, features = encode_image or self.encode_image, []
        for start in progress(range(0, len(pixels), self.batch_size), "encode"):
            features.append(encode_image(as_images(pixels[start : start + self.batch_size], self.device)))
        features = torch.cat(features)
        if bad := (~features.isfinite().all(1)).nonzero()[:, 0].tolist():
            fail(f"{self.name}: features of images {bad[:8]} are not finite: the weights are damaged")
        return features

    def similarity(self, pixels, text_features):
        """Return the cosine of each of uint8 images (N, 3, H, W) with row i of (N, D), unit norm: (N,)."""
        return (self.encode_pixels(pixels) * text_features).sum(-1)

    @torch.no_grad()
    def encode_text(self, captions):
        """Encode a list of B captions to (B, D) float32, unit norm; each caption is encoded once and kept."""
        missing = list(dict.fromkeys(caption for caption in captions if caption not in self.text_cache))
        for start in progress(range(0, len(missing), 256), "captions"):
            chunk = missing[start : start + 256]
            features = F.normalize(self.model.encode_text(self.tokenizer(chunk).to(self.device)).float(), dim=-1)
            if not ((features.norm(dim=1) - 1).abs() < 1e-3).all():  # among NaN every caption would rank first
                fail(f"{self.name}: features of captions are not of unit norm: the weights are damaged")
            self.text_cache.update(zip(chunk, features))
        return torch.stack([self.text_cache[caption] for caption in captions])

    def flip_activation(self):
        """Put GELU in the place of QuickGELU in both towers, or the reverse; a second call undoes it."""
        quick_gelu = open_clip.transformer.QuickGELU
        for block in self.model.modules():
            if isinstance(block, open_clip.transformer.ResidualAttentionBlock):
                block.mlp.gelu = torch.nn.GELU() if isinstance(block.mlp.gelu, quick_gelu) else quick_gelu()
        self.text_cache.clear()


def fast_tower(visual, mean, std, dtype):
    """Return open_clip's plain VisionTransformer in fewer operations, the same function, for a CPU or CUDA.

    Rearranged: normalisation folded into a patch embedding done as one product, one product for q, k and v,
    scaled_dot_product_attention, the last block for the class token only, QuickGELU as a scaled SiLU. Weights are
    constants: only pixels get gradients.

    dtype     of the blocks' products; pixels, residual stream and norms stay float32: in bf16 they made the gradient of
              some photographs useless
    returns   (B, 3, H, W) in [0, 1], normalize=True -> (B, D), by default of unit norm; None for a tower that is not
              of the plain kind
    """
    if not is_plain(visual):
        return None
    patch, first = visual.patch_size[0], visual.transformer.resblocks[0]
    quick = isinstance(first.mlp.gelu, open_clip.transformer.QuickGELU)
    settings = first.attn.num_heads, first.ln_1.eps, F.silu if quick else F.gelu
    kernel = visual.conv1.weight.detach() / std  # (W, 3, P, P)
    embedding = kernel.flatten(1), -(kernel * mean).sum((1, 2, 3))
    blocks = [block_weights(block, 1.702 if quick else 1.0, dtype) for block in visual.transformer.resblocks]

    def encode(images, normalize=True):
        x = images.unfold(2, patch, patch).unfold(3, patch, patch)  # (B, 3, h, w, P, P)
        x = F.linear(x.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2), *embedding)  # (B, hw, W)
        x = torch.cat([visual.class_embedding.detach().expand(len(x), 1, -1), x], 1)
        x = layer_norm(x + visual.positional_embedding.detach(), visual.ln_pre)
        for i, weights in enumerate(blocks):
            x = tower_block(x, weights, *settings, last=i == len(blocks) - 1)
        features = layer_norm(x[:, 0], visual.ln_post) @ visual.proj.detach()
        return F.normalize(features, dim=-1) if normalize else features

    return encode


def layer_norm(x, norm):
    """Compute a LayerNorm, or the Identity that stands for none, with its weights as constants."""
    if isinstance(norm, torch.nn.Identity):
        return x
    return F.layer_norm(x, norm.normalized_shape, norm.weight.detach(), norm.bias.detach(), norm.eps)


def block_weights(block, scale, dtype):
    """Return the weights of a block of a plain tower as tower_block() takes them.

    scale   1.702 for QuickGELU: x sigmoid(1.702 x) = silu(1.702 x) / 1.702
    """
    attention, first, last = block.attn, block.mlp.c_fc, block.mlp.c_proj
    products = attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight, attention.out_proj.bias
    products += first.weight * scale, first.bias * scale, last.weight / scale, last.bias
    norms = block.ln_1.weight, block.ln_1.bias, block.ln_2.weight, block.ln_2.bias
    return [*(tensor.detach() for tensor in norms), *(tensor.detach().to(dtype) for tensor in products)]


def tower_block(x, weights, heads, eps, activation, last=False):
    """Compute a block of a plain tower: (B, N, W) float32 -> the same; the last one gives (B, 1, W), the class token.

    weights   weight and bias of both norms, float32; then of q, k and v, of the attention's output, and of both layers
              of the MLP, whose dtype is that of the products
    """
    norm_1, bias_1, norm_2, bias_2, w_qkv, b_qkv, w_out, b_out, w_1, b_1, w_2, b_2 = weights
    width, dtype = x.shape[-1], w_qkv.dtype

    def split(y):  # (B, N, k W) -> k of (B, heads, N, W / heads)
        return y.unflatten(2, (-1, heads, width // heads)).permute(2, 0, 3, 1, 4).unbind(0)

    y = F.layer_norm(x, (width,), norm_1, bias_1, eps).to(dtype)
    if last:
        x = x[:, :1]
        (q,) = split(F.linear(y[:, :1], w_qkv[:width], b_qkv[:width]))
        k, v = split(F.linear(y, w_qkv[width:], b_qkv[width:]))
    else:
        q, k, v = split(F.linear(y, w_qkv, b_qkv))
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = x + F.linear(y, w_out, b_out)
    y = F.layer_norm(x, (width,), norm_2, bias_2, eps).to(dtype)
    return x + F.linear(activation(F.linear(y, w_1, b_1)), w_2, b_2)


def is_plain(visual):
    """Return whether a tower is open_clip's VisionTransformer in the form of OpenAI's CLIP, as fast_tower() needs."""
    if type(visual) is not open_clip.transformer.VisionTransformer or visual.conv1.weight.device.type == "mps":
        return False  # on mps attention of a single query was wrong (torch issues 163597, 181133)
    if visual.attn_pool is not None or visual.pool_type != "tok" or visual.final_ln_after_pool or visual.output_tokens:
        return False
    block = visual.transformer.resblocks[0]  # all blocks are built alike
    if len({norm.eps for each in visual.transformer.resblocks for norm in (each.ln_1, each.ln_2)}) > 1:
        return False
    known = repr(block.mlp.gelu) in ("GELU(approximate='none')", "QuickGELU()")
    if type(block) is not open_clip.transformer.ResidualAttentionBlock or not known:
        return False
    return all(isinstance(module, torch.nn.Identity) for module in (visual.patch_dropout, block.ls_1, block.ls_2))


def pick_device(name):
    """Return the torch.device of --device, and switch off what would make scores on it inexact."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and PROCESSES > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    with exit_on_error(f"--device {name} is not usable here"):
        if not re.fullmatch(r"(cuda|mps|cpu)(:\d+)?", name):
            raise ValueError("write cuda, cuda:1, mps, cpu or auto")
        device = torch.empty(0, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.backends.cuda.enable_cudnn_sdp(False)  # until January 2026 wrong for 257 tokens on Hopper
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        return device


SCHEMAS = "local-dir:", "hf-hub:"
WEIGHTS = ["open_clip_model.safetensors", "open_clip_pytorch_model.safetensors"]  # in open_clip's order
WEIGHTS += ["open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth"]
WEIGHTS += ["model.safetensors", "model.safetensors.index.json"]  # the index of a model in several files
WEIGHTS += ["pytorch_model.bin", "pytorch_model.pth", "model.pth"]
DELTA_CLIP_TOKENIZER = {  # Delta-CLIP (arXiv:2501.09446) has a tokenizer of its own; this one gives the same ids
    "hf_tokenizer_name": "google-bert/bert-base-uncased",
    "tokenizer_mode": "clips",
    "tokenizer_kwargs": {"bos_token": "[unused0]", "eos_token": "[unused1]"},
}


@lru_cache
def model_folder(name):
    """Return the folder of a local-dir: or hf-hub: model.

    From a hub the configuration, the tokenizer and one file of weights, or the files of an index, are downloaded; the
    folder is named by the commit.
    """
    if name.startswith("local-dir:"):
        return Path(name.removeprefix("local-dir:"))
    if hub_file(name):
        raise ValueError("it is a file of weights: give it as --pretrained, and its architecture as --model")
    repo = name.removeprefix("hf-hub:")
    folder = Path(huggingface_hub.snapshot_download(repo, allow_patterns=["*.json", "*.txt", "*.model"]))
    for file in WEIGHTS:
        try:
            found = huggingface_hub.hf_hub_download(repo, file, revision=folder.name)
            for shard in shards_of(found):
                huggingface_hub.hf_hub_download(repo, shard.name, revision=folder.name)
            break
        except huggingface_hub.errors.LocalEntryNotFoundError as error:  # the hub is out of reach
            unreachable = error
        except huggingface_hub.errors.EntryNotFoundError:
            unreachable = None
    if not any((folder / file).is_file() for file in WEIGHTS) and unreachable:
        raise unreachable
    return folder


def split_place(text):
    """Split FILE::PLACE, PLACE one of the sets of weights in the file; of FILE alone the place is None."""
    file, mark, place = text.partition("::")
    return (file, place) if mark else (text, None)


def hub_file(text):
    """Return ORG/NAME and FILE of hf-hub:ORG/NAME/FILE, with ::PLACE or without; None if a text is something else."""
    match = re.fullmatch("hf-hub:([^/]+/[^/]+)/(.+)", split_place(text)[0])
    return match and match.groups()


def is_file(text):
    """Return whether FILE or FILE::PLACE is there, or is the name of a file on a hub."""
    return bool(hub_file(text)) or os.path.isfile(split_place(text)[0])


def download(repo, file):
    """Return the path of a file of a hub repository; ValueError that lists its weights if it has no such file."""
    try:
        return huggingface_hub.hf_hub_download(repo, file)
    except huggingface_hub.errors.LocalEntryNotFoundError:  # the hub is out of reach
        raise
    except huggingface_hub.errors.EntryNotFoundError:
        kinds = ".pt", ".pth", ".tar", ".bin", ".ckpt", ".safetensors"
        held = [name for name in huggingface_hub.list_repo_files(repo) if name.endswith(kinds)]
        raise ValueError(f"the repository has no such file; weights in it: {', '.join(held) or 'none'}") from None


def shards_of(file):
    """Return the files that the index of a model in several files names, beside it; none for another file."""
    if not str(file).endswith(".index.json"):
        return []
    names = json.loads(Path(file).read_text(encoding="utf-8"))["weight_map"].values()
    return [Path(file).with_name(name) for name in dict.fromkeys(names)]


def weights_file(folder):
    """Return the file of weights in the folder of a model."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} has no weights: none of {', '.join(WEIGHTS)}")


def read_config(folder):
    """Read the configuration of a model as stock open_clip takes it: {"model_cfg": {...}, "preprocess_cfg": {...}}.

    folder   holds open_clip_config.json, Delta-CLIP's included, or transformers' config.json of a CLIP
    """
    if (folder / "open_clip_config.json").is_file():
        config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
        text_cfg = config["model_cfg"]["text_cfg"]
        if text_cfg.pop("vocab_path", None):  # a key of Delta-CLIP alone
            text_cfg |= DELTA_CLIP_TOKENIZER
        return config
    if is_transformers(folder):
        return config_from_transformers(folder)
    if (folder / "adapter_config.json").is_file():
        raise ValueError(LORA)
    message = f"{folder} has neither open_clip_config.json nor transformers' config.json"
    raise FileNotFoundError(f"{message}; for weights alone name their file, such as hf-hub:ORG/NAME/FILE.pt")


def is_transformers(folder):
    """Return whether a model's folder is in the format of the transformers library."""
    return not (folder / "open_clip_config.json").is_file() and (folder / "config.json").is_file()


def config_from_transformers(folder):
    """Translate the configuration of a transformers CLIPModel into open_clip's."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != "clip":
        kind = config.get("model_type") or config.get("architecture")  # the second is timm's
        raise ValueError(f"its config.json is of a {kind!r} model, and only 'clip' can be read")
    # defaults of CLIPTextConfig and CLIPVisionConfig, which a config.json may leave out
    text = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
    text |= {"max_position_embeddings": 77, "vocab_size": 49408, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    vision |= {"image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    for part, name in ((text, "text_config"), (vision, "vision_config")):
        part |= config.get(name) or {}
        part |= config.get(f"{name}_dict") or {}  # old files hold both
    activations = {text["hidden_act"], vision["hidden_act"]}
    if len(activations) > 1 or not activations <= {"quick_gelu", "gelu"}:
        raise ValueError(f"open_clip has no model with the activations {', '.join(sorted(activations))}")
    if text["vocab_size"] != 49408:
        raise ValueError(f"its vocabulary of {text['vocab_size']} is not that of OpenAI's tokenizer, 49408")

    text_cfg = {"context_length": text["max_position_embeddings"], "vocab_size": text["vocab_size"]}
    vision_cfg = {"image_size": vision["image_size"], "patch_size": vision["patch_size"]}
    vision_cfg["head_width"] = vision["hidden_size"] // vision["num_attention_heads"]
    text_cfg["heads"] = text["num_attention_heads"]
    for ours, theirs in ((text_cfg, text), (vision_cfg, vision)):
        ours |= {"width": theirs["hidden_size"], "layers": theirs["num_hidden_layers"]}
        ours["mlp_ratio"] = theirs["intermediate_size"] / theirs["hidden_size"]
        ours["norm_kwargs"] = {"eps": theirs["layer_norm_eps"]}
    model_cfg = {"embed_dim": config.get("projection_dim", 512), "quick_gelu": activations == {"quick_gelu"}}
    model_cfg |= {"vision_cfg": vision_cfg, "text_cfg": text_cfg}

    return {"model_cfg": model_cfg, "preprocess_cfg": preprocessing_from_transformers(folder, vision["image_size"])}


def preprocessing_from_transformers(folder, size):
    """Return mean and std of a transformers CLIPProcessor; ValueError if it does else than CLIP's own.

    size   of the model's images
    """

    def read(name):
        return json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).is_file() else {}

    # the first is of transformers 5, which prefers it, too; the second of earlier versions
    theirs = read("processor_config.json").get("image_processor") or read("preprocessor_config.json")
    usual = {key: [True] for key in ("do_resize", "do_center_crop", "do_rescale", "do_normalize")}
    usual |= {"do_pad": [False], "resample": [3], "rescale_factor": [1 / 255]}  # 3 is PIL's number of bicubic
    usual |= {"size": [size, {"shortest_edge": size}], "crop_size": [size, {"height": size, "width": size}]}
    for name, values in usual.items():
        if theirs.get(name) is not None and theirs[name] not in values:
            raise ValueError(f"its images are processed with {name} {theirs[name]}, not {values[0]} as CLIP's are")
    names = {"mean": "image_mean", "std": "image_std"}
    return {ours: theirs[name] for ours, name in names.items() if theirs.get(name)}


def rename_from_transformers(tensors):
    """Rename the weights of a transformers CLIPModel, under any prefix, to open_clip's names: {name: tensor}."""
    if not any("vision_model.encoder.layers." in name for name in tensors):
        return tensors
    renames = [
        (r"\btext_model\.embeddings\.token_embedding\.", "token_embedding."),
        (r"\btext_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
        (r"\btext_model\.final_layer_norm\.", "ln_final."),
        (r"\btext_model\.encoder\.layers\.", "transformer.resblocks."),
        (r"\btext_projection\.weight$", "text_projection"),
        (r"\bvision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
        (r"\bvision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
        (r"\bvision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
        (r"\bvision_model\.pre_layrnorm\.", "visual.ln_pre."),  # spelt so
        (r"\bvision_model\.post_layernorm\.", "visual.ln_post."),
        (r"\bvision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
        (r"\bvisual_projection\.weight$", "visual.proj"),
        (r"\.layer_norm(1|2)\.", r".ln_\1."),
        (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
        (r"\.mlp\.fc1\.", ".mlp.c_fc."),
        (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    ]
    renamed = {}
    for name, tensor in tensors.items():
        tensor = tensor.T.contiguous() if name.endswith("_projection.weight") else tensor
        for pattern, ours in renames:
            name = re.sub(pattern, ours, name)
        renamed[name] = tensor
    for name in [name for name in renamed if ".self_attn.q_proj." in name]:
        parts = [name.replace("q_proj", f"{part}_proj") for part in "qkv"]
        if all(part in renamed for part in parts):
            whole = torch.cat([renamed.pop(part) for part in parts])
            renamed[name.replace("self_attn.q_proj.", "attn.in_proj_")] = whole
    return renamed


def save_model(folder, clip, trained_on):
    """Write a model that open_clip opens as local-dir:FOLDER. If its configuration, written last, exists, all is there.

    trained_on   Images.fingerprints() of its images, stored in the metadata of the weights
    """
    weights = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in clip.model.state_dict().items()}
    metadata = {"train_ids": json.dumps(sorted(trained_on, key=str))}  # one key: several have a random order
    save(folder / "open_clip_model.safetensors", (weights, metadata))
    if hasattr(clip.tokenizer, "save_pretrained"):  # open_clip looks for a tokenizer of Hugging Face in the folder
        clip.tokenizer.save_pretrained(folder)
    save(folder / "open_clip_config.json", clip.config)


def shared_preprocessing(name):
    """Return the preprocess_cfg that all published weights of an open_clip architecture have in common, or None."""
    found = []
    for tag in open_clip.list_pretrained_tags_by_model(name):
        published = open_clip.get_pretrained_cfg(name, tag)
        found.append({key: published[key] for key in ("mean", "std", "interpolation", "resize_mode")})
    return found[0] if found and all(one == found[0] for one in found) else None


def load_clip(args, source=None, training=False):
    """Load the CLIP of --model and --pretrained, or another one.

    source     local-dir:DIR, hf-hub:ORG/NAME, or a file of weights for --model, FILE or hf-hub:ORG/NAME/FILE, with
               ::PLACE or without: of a whole model, or of a visual tower alone, in which case the text tower of
               --pretrained stays
    training   whether --precision auto is for training steps or the images to train on
    """
    name, pretrained = args.model, args.pretrained
    if source and source.startswith(SCHEMAS) and not hub_file(source):
        name, pretrained, source = source, "", None
    torch.manual_seed(args.seed)  # so that --pretrained random gives every script the same weights
    names = f"--model {name} --pretrained {pretrained!r}"
    with exit_on_error(f"cannot load {names}; open_clip.list_pretrained() lists both"):
        if "/" in pretrained and not hub_file(pretrained):
            os.stat(split_place(pretrained)[0])  # its error says why there is no such file
        make = model_from_folder if name.startswith(SCHEMAS) else model_by_name
        model, model_cfg, tokenizer, weights = make(name, pretrained)
    trained_on, notes = set(), []
    for file, tower_alone in ((weights, False), (source, True)):
        if file:
            with exit_on_error(f"cannot use {file}"):
                fingerprints, unused = load_weights(model, str(file), tower_alone)
            trained_on |= fingerprints
            if unused:
                notes.append(f"{unused} in the file of its weights is not used")
                print(f"note: {file}: {unused} is not used")
    with exit_on_error(f"cannot use {source or weights or pretrained} for {name}"):
        device = pick_device(args.device)
        precision = pick_precision(args.precision, device, training and is_plain(model.visual))
        twin = other_activation(name, model_cfg) if source or is_file(pretrained) else None
        if twin and source and not name.startswith(SCHEMAS):
            twin += " with a --pretrained that goes with it"
        return Clip(model, name, model_cfg, tokenizer, device, precision, args.batch_size, trained_on, notes, twin)


def other_activation(name, model_cfg):
    """Return what to type for the model of a name with GELU in the place of QuickGELU, or the reverse; else None."""
    quick_gelu = model_cfg.get("quick_gelu", False)
    if name.startswith(SCHEMAS):
        setting = f'"quick_gelu": {json.dumps(not quick_gelu)} in its open_clip_config.json'
        if is_transformers(model_folder(name)):
            setting = f'"hidden_act": "{"gelu" if quick_gelu else "quick_gelu"}", twice, in its config.json'
        return f"as --model a copy of {name} with {setting}"
    name = name.replace("/", "-")
    other = name.removesuffix("-quickgelu") if quick_gelu else f"{name}-quickgelu"
    return f"--model {other}" if other != name and open_clip.get_model_config(other) else None


def pick_precision(name, device, bf16):
    """Return the precision of gradients, fp32, tf32 or bf16, for --precision.

    bf16   whether auto may be bf16: figures that are printed are attacked in TF32 on a GPU, and so is a tower outside
           the fast form, whose residual stream autocast keeps in bf16
    """
    if name != "auto":
        return name
    if device.type != "cuda":
        return "fp32"
    return "bf16" if bf16 and torch.cuda.is_bf16_supported(including_emulation=False) else "tf32"


def model_from_folder(name, pretrained):
    """Return the model of local-dir: or hf-hub:, without weights, its configuration, tokenizer and file of weights."""
    if pretrained and pretrained != "random" and not is_file(pretrained):
        raise ValueError("such a model brings its weights: leave --pretrained out, or give a file or 'random'")
    folder = model_folder(name)
    config = read_config(folder)
    with tempfile.TemporaryDirectory() as stock:  # open_clip builds models from its own configurations only
        Path(stock, "open_clip_config.json").write_text(json.dumps(config))
        options = {"load_weights": False, "pretrained_text": False}
        model = open_clip.create_model(f"local-dir:{stock}", **options)
    text_cfg = config["model_cfg"]["text_cfg"]
    options = {"context_length": text_cfg.get("context_length", 77), **(text_cfg.get("tokenizer_kwargs") or {})}
    if text_cfg.get("hf_tokenizer_name"):
        own = (folder / "tokenizer_config.json").is_file()
        files = str(folder) if own else text_cfg["hf_tokenizer_name"]
        tokenizer = load_tokenizer(files, tokenizer_mode=text_cfg.get("tokenizer_mode"), **options)
    else:
        tokenizer = simple_tokenizer(json.dumps(options))
    weights = pretrained if is_file(pretrained) else None if pretrained else weights_file(folder)
    return model, config["model_cfg"], tokenizer, weights


@lru_cache  # building it takes most of the time that a tiny CLIP takes to load
def simple_tokenizer(options):
    """Return open_clip's own tokenizer with options, given as JSON."""
    return open_clip.SimpleTokenizer(**json.loads(options))


def load_tokenizer(source, **options):
    """Load a Hugging Face tokenizer from a folder or by its name, as open_clip does."""
    with exit_on_error(f"cannot load the tokenizer {source}, which needs pip install transformers"):
        return open_clip.tokenizer.HFTokenizer(source, **options)


def model_by_name(name, pretrained):
    """Return the model of an open_clip name, its configuration, its tokenizer, and a file of weights or None."""
    folder, name = name, name.replace("/", "-")  # open_clip takes ViT-B/32, too
    tag, from_file = open_clip.get_pretrained_cfg(name, pretrained), is_file(pretrained)
    model_cfg = open_clip.get_model_config(name)
    if not model_cfg:
        raise ValueError(f"no model has this name; for a folder write local-dir:{folder}")
    quick_gelu = tag.get("quick_gelu", False)
    if tag and quick_gelu != model_cfg.get("quick_gelu", False):  # open_clip only warns
        other = f"{name}-quickgelu" if quick_gelu else name.removesuffix("-quickgelu")
        raise ValueError(f"they disagree on QuickGELU, and features would be wrong: use --model {other}")
    if from_file or pretrained == "random":
        preprocess_cfg = shared_preprocessing(name)
        model = open_clip.create_model(name, load_weights=False, force_preprocess_cfg=preprocess_cfg)
        if from_file and not preprocess_cfg:
            print(f"note: the published weights of {name} do not agree on a preprocessing; OpenAI's is used here.")
            print("To use another, put it into the open_clip_config.json of a folder and give that as local-dir:DIR")
        if from_file:
            activation = "QuickGELU, as OpenAI's weights need it" if model_cfg.get("quick_gelu") else "GELU"
            print(f"note: {name} computes {pretrained} with {activation}; the file does not say whether that is right")
    else:
        model = open_clip.create_model(name, pretrained, require_pretrained=True)
    return model, model_cfg, open_clip.get_tokenizer(name), pretrained if from_file else None


# ---------------------------------------------------------------------------------------------------------------------
# Weights: a model's tensors are found in a file by their names and shapes


def load_weights(model, file, tower_alone=False):
    """Load a file of weights into a model, without running code from it.

    file          FILE or FILE::PLACE: .safetensors, its index, or written by torch.save; hf-hub:ORG/NAME/FILE is
                  downloaded. The tensors may stand in dictionaries of any depth, under any prefix, which together are
                  their place; PLACE chooses between different ones
    tower_alone   whether a visual tower without a text tower is enough
    returns       Images.fingerprints() of what it was trained on; the name of the first tensor left out, or None
    """
    path, chosen = split_place(file)
    on_hub = hub_file(path)
    saved, train_ids = read_tensors(download(*on_hub) if on_hub else path)
    tensors = rename_from_transformers(flatten(saved))
    if not tensors:
        raise ValueError("it holds no tensors")
    if any("lora_" in name for name in tensors):
        raise ValueError(LORA)
    fits, problems = find_weights(tensors, model)
    if not fits:
        held = f"it holds {len(tensors)} tensors, such as {next(iter(tensors)):.60}, and none of the model's"
        raise ValueError(problems.get(model) or problems.get(model.visual) or held)
    choice = f"choose {' or '.join(f'{path}::{place}' for place in fits)}"
    if chosen is not None and chosen not in fits:
        raise ValueError(f"nothing that fits is at {chosen!r}; {choice}")
    wholes = [place for place, (module, _) in fits.items() if module is model]
    places = [chosen] if chosen is not None else wholes or [*fits]  # a whole model goes before a tower
    module, state = fits[places[0]]
    if not all(equal_tensors(state, fits[place][1]) for place in places[1:]):
        raise ValueError(f"it holds different weights; {choice}")

    known = places if chosen is None else fits  # a place that the user has not chosen needs no note
    known = {place + name for place in known for name in tensors_at(place, tensors)}
    unused = [name for name, tensor in tensors.items() if tensor.is_floating_point() and name not in known]
    text = [name for name in unused if re.search(r"\btext|token_embedding|word_embeddings", name)]
    if module is not model and chosen is None and text:
        raise ValueError(problems.get(model) or f"it holds text weights, such as {text[0]}, but no logit_scale")
    if module is not model and not tower_alone:
        raise ValueError(f"it is a visual tower alone, which can be a row: evaluate.py --checkpoint NAME={file}")
    module.load_state_dict(state)
    return train_ids, next(iter(unused), None)


# what training scripts save beside tensors: their flags, numpy's numbers, and paths, which become PurePosixPath here
HARMLESS = [argparse.Namespace, np.dtype]
HARMLESS += {type(np.dtype(kind)) for kind in "?" + np.typecodes["AllInteger"] + np.typecodes["AllFloat"]}
HARMLESS += [(np._core.multiarray.scalar, f"numpy.{module}.multiarray.scalar") for module in ("core", "_core")]
PATHS = "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"
HARMLESS += [(PurePosixPath, f"{module}.{name}") for module in ("pathlib", "pathlib._local") for name in PATHS]


def read_tensors(file):
    """Read a file of weights: return nested dictionaries with tensors, and the COCO ids that they were trained on."""
    if shards := shards_of(file):
        return {name: tensor for shard in shards for name, tensor in read_tensors(shard)[0].items()}, set()
    with open(file, "rb") as opened:
        start = opened.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise ValueError("it is a Git LFS pointer, not the weights: git lfs pull")
    if start[8:9] == b"{":  # safetensors: after the length of a header in JSON
        with safetensors.safe_open(file, "pt") as opened:
            train_ids = json.loads((opened.metadata() or {}).get("train_ids", "[]"))
            return {key: opened.get_tensor(key) for key in opened.keys()}, {*train_ids}  # noqa: SIM118
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise ValueError("it is a TorchScript archive, like OpenAI's, and holds code: use --pretrained openai")
    try:
        with torch.serialization.safe_globals(HARMLESS):
            saved = torch.load(file, "cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError):  # the messages are long, and one advises to allow code
        raise ValueError("it holds code, or objects that are not plain tensors, or is damaged") from None
    if not isinstance(saved, dict):
        raise ValueError(f"it holds a {type(saved).__name__}, not a dictionary of tensors")
    return saved, {*saved.get("train_ids", ())}


def flatten(saved, where=""):
    """Return the tensors in nested dictionaries and lists, those of an optimizer aside: {'state_dict/proj': tensor}."""
    tensors = {}
    if isinstance(saved, dict) and "param_groups" in saved:
        return tensors
    for key, value in saved.items() if isinstance(saved, dict) else enumerate(saved):
        if isinstance(value, torch.Tensor):
            tensors[f"{where}{key}"] = value
        elif isinstance(value, (dict, list, tuple)):
            tensors |= flatten(value, f"{where}{key}/")
    return tensors


def find_weights(tensors, model):
    """Look for a model and for its visual tower: {place: (module, its state dict)}, {module: why one does not fit}."""
    fits, problems = {}, {}
    for module in (model, model.visual):
        anchor = "logit_scale" if module is model else next(iter(module.state_dict()))  # a name of each set of weights
        names = [name for name in tensors if re.search(rf"(^|[./]){re.escape(anchor)}$", name)]
        for place in [name.removesuffix(anchor) for name in names]:
            if place.removesuffix("visual.") in fits:
                continue  # the tower of a whole model
            state = convert_weights(tensors_at(place, tensors), module)
            problem = misfit(state, module)
            if problem:
                problems.setdefault(module, problem)
            else:
                fits[place] = module, state
    return fits, problems


def tensors_at(place, tensors):
    """Return the tensors of one dictionary under one prefix, {name without the place: tensor}."""
    found = {name[len(place) :]: tensor for name, tensor in tensors.items() if name.startswith(place)}
    return {name: tensor for name, tensor in found.items() if "/" not in name}


def convert_weights(state, module):
    """Convert tensors as open_clip does when it loads a file: old names, and the shape of logit_scale."""
    constants = "position_ids", "attn_mask", "input_resolution", "context_length", "vocab_size"  # the last are OpenAI's
    state = {name: tensor for name, tensor in state.items() if not name.endswith(constants)}
    if not hasattr(module, "logit_scale"):
        return state
    state = open_clip.convert.convert_state_dict(module, state)
    if "positional_embedding" in state and not hasattr(module, "positional_embedding"):
        state = open_clip.model.convert_to_custom_text_state_dict(state)
    if module.logit_bias is not None:
        state.setdefault("logit_bias", torch.zeros(()))
        state["logit_bias"] = state["logit_bias"].reshape(module.logit_bias.shape)
    state["logit_scale"] = state["logit_scale"].reshape(module.logit_scale.shape)
    return state


def misfit(state, module):
    """Return why tensors are not the weights of a module, all of its names in its shapes and no others, or None."""
    found, wanted = ({name: [*value.shape] for name, value in each.items()} for each in (state, module.state_dict()))
    wrong = [name for name in wanted | found if found.get(name) != wanted.get(name)]
    if not wrong:
        return None
    name = wrong[0]
    hint = " (another input size)" if len(wrong) == 1 and name.endswith("positional_embedding") else ""
    first = f"{name} is {found.get(name, 'missing')}, not {wanted.get(name, 'in the model')}{hint}"
    return f"{len(wrong)} of {len(wanted | found)} keys do not fit: {first}"


def equal_tensors(one, other):
    """Return whether two dictionaries hold the same tensors, of any floating type."""
    return one.keys() == other.keys() and all(torch.equal(one[name].float(), other[name].float()) for name in one)


# ---------------------------------------------------------------------------------------------------------------------
# Data: MMEB from the hub or a local copy, a folder in the ImageFolder format, or COCO's captions_*.json

CONFIG = "MSCOCO_i2t"
LARGEST_IMAGE = 178_956_970  # pixels; Pillow takes a larger one for a bomb, too, but warns from half of it on
Image.MAX_IMAGE_PIXELS = None  # open_image() checks the size
FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "GIF"]
SPLITS = {  # MMEB's split, image column, caption column (in a list the own caption is first), start of the file names
    "train": ("original", "qry_image_path", "pos_text", "COCO_train2014_"),
    "eval": ("test", "qry_img_path", "tgt_text", "COCO_"),
}
METADATA = ["metadata.jsonl", "metadata.csv"]  # of the ImageFolder format


def as_images(pixels, device):
    """Convert uint8 (B, 3, H, W), numpy or a tensor on the CPU, to float32 in [0, 1] on the device."""
    return torch.tensor(np.asarray(pixels), device=device).float() / 255


def is_own(source):
    """Return whether a data set is not MMEB: a folder in the ImageFolder format, or a file of captions."""
    return source.endswith(".json") or any(os.path.isfile(os.path.join(source, name)) for name in METADATA)


@dataclass
class Entry:
    """An image of a data set and its captions, before the image is read; fields as in Images."""

    path: str  # as the data set names it
    captions: list
    candidates: list
    coco_id: int | None
    name: str = ""


@dataclass
class Images:
    """Images of a split in a model's geometry, with their captions."""

    pixels: np.ndarray  # uint8 (N, 3, H, W)
    paths: list  # as the data set names them
    captions: list  # [[caption]]: of each image the first one is attacked
    candidates: list  # [[caption]]: to retrieve from with --candidates mmeb
    coco_ids: list  # None for an image that is not known to be COCO's
    names: list  # of the files of the adversarial images
    checksums: list  # of path, captions and the bytes of the image file

    def __len__(self):
        return len(self.names)

    @property
    def own_captions(self):
        """The caption of each image that is attacked."""
        return [captions[0] for captions in self.captions]

    def fingerprints(self):
        """Return what a copy of an image is recognised by, {COCO id or digest of its pixels: path}."""
        ids = {coco_id: path for coco_id, path in zip(self.coco_ids, self.paths) if coco_id is not None}
        return ids | {digest(pixels): path for pixels, path in zip(self.pixels, self.paths)}

    def digest(self):
        """Return a digest of the files and captions."""
        return digest(self.checksums)


def load_images(args, split, geometry, start=0, count=None):
    """Read and decode images of a split: Images.

    geometry       of a Clip
    start, count   the first image, and how many; by default --num_images, or else all of them
    """
    source = getattr(args, f"{split}_data")
    with exit_on_error(f"--{split}_data {source}"):
        rows = read_rows(args, split)
        count = count or args.num_images or len(rows)
        if len(rows) < start + count:
            kind = "train2014 images" if split == "train" and not is_own(source) else "images"
            raise ValueError(f"it has {len(rows)} distinct {kind}, and {start + count} are needed: lower --num_images")
        rows, transform = rows[start : start + count], to_geometry(geometry)
        folder, paths = image_folder(args, split), [row.path for row in rows]
        if not os.path.isdir(folder):
            folder = fetch_images(folder, paths, Path(args.cache_dir, digest(source)), args.skip_bad_images)
        found = find_images(folder, paths, args.skip_bad_images)

        def load(row):
            try:
                if row.path not in found:
                    raise ValueError("it is missing")
                data = read_file(*found[row.path])
                return digest(row.path, row.captions, data), transform(read_image(data))
            except Exception as error:  # a damaged file raises any exception
                message = f"broken image {row.path} ({describe(error)})"
                if not args.skip_bad_images:
                    raise ValueError(f"{message}; --skip_bad_images leaves such images out") from None
                print(f"{message}: left out")

        with ThreadPoolExecutor(args.num_workers) as pool:
            loaded = list(progress(pool.map(load, rows), "decode", count, "image"))
        kept = [(row, *result) for row, result in zip(rows, loaded) if result]
        if not kept:
            raise ValueError("none of the images could be decoded")
        if len(kept) < count:
            print(f"--{split}_data {source}: {count - len(kept)} broken or missing images are left out")
    rows, checksums, pixels = zip(*kept)
    columns = ([getattr(row, name) for row in rows] for name in ("path", "captions", "candidates", "coco_id", "name"))
    return Images(np.stack(pixels), *columns, [*checksums])


def image_folder(args, split):
    """Return the folder of a split's images: --image_root, the folder of a captions_*.json, or the data set itself."""
    given = {}
    for root in args.image_root or ():
        its_split, equals, folder = root.partition("=")
        if not equals or its_split not in SPLITS:
            its_split, folder = None, root  # of both splits
        if not os.path.isdir(folder):
            fail(f"--image_root {root} is not a folder")
        given.setdefault(its_split, []).append(folder)
    source = getattr(args, f"{split}_data")
    default = os.path.dirname(source) or "." if source.endswith(".json") else source
    folder, *others = given.get(split) or given.get(None) or [default]
    if others:
        fail(f"--image_root {folder} {others[0]}: give one folder, or one for each split: train=DIR eval=DIR")
    return folder


def read_rows(args, split):
    """Return all distinct images of a split, not yet read: [Entry]."""
    source = getattr(args, f"{split}_data")
    with exit_on_error(f"--{split}_data {source}"):
        if source.endswith(".json"):
            rows = read_captions(source, split)
        elif is_own(source):
            rows = read_imagefolder(source)
        else:
            rows = read_mmeb(source, split)
        kept = {}  # the first row of each image
        for where, path, coco_id, captions, texts in rows:
            if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
                raise ValueError(f"{where} has an empty caption, or one that is no text")
            captions, texts = ([text.strip() for text in part] for part in (captions, texts))
            entry = Entry(path, captions, texts, coco_id)
            kept.setdefault(path if is_own(source) else coco_id, entry)
        if not kept:
            raise ValueError("it has no image with a caption")
        times = Counter(entry.coco_id for entry in kept.values())
        for position, entry in enumerate(kept.values()):
            own_id = entry.coco_id is not None and times[entry.coco_id] == 1
            entry.name = f"{entry.coco_id:012d}" if own_id else f"{position:06d}"
        return [*kept.values()]


def read_mmeb(source, split):
    """Read MMEB's rows from the hub or a local copy of any part of it: [(where, path, coco_id, captions, texts)]."""
    name, path_column, text_column, wanted = SPLITS[split]
    columns = [path_column, text_column]
    if os.path.isdir(source):
        tables = [pq.read_table(file, columns=columns) for file in mmeb_files(source, name, columns)]
    elif os.path.exists(source) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        raise ValueError("it is neither a local folder nor a hub id such as TIGER-Lab/MMEB-train")
    else:
        table = datasets.load_dataset(source, CONFIG, split=name, verification_mode="no_checks")  # of a stale row count
        # arrow's format does not decode images, whatever the data set declares a column to be
        tables = [table.select_columns(columns).with_format("arrow")[:]]
    pairs = [pair for table in tables for pair in zip(*(table[column].to_pylist() for column in columns))]
    rows = []
    for i, (path, texts) in enumerate(pairs):
        match = re.search(r"(?:^|/)(COCO_(?:train|val)2014_)([0-9]{1,12})\.jpe?g\Z", str(path))
        if not match:
            raise ValueError(f"row {i}: {path_column} {str(path)[:99]!r} is not the path of a COCO 2014 image")
        if match[1].startswith(wanted):
            texts = [texts] if isinstance(texts, str) else texts or []
            rows.append((f"row {i}: {text_column}", path, int(match[2]), texts[:1], texts))
    return rows


def mmeb_files(folder, split, columns):
    """Return the parquet files of a split in a local copy of MMEB; they are recognised by their columns."""
    files = [file for file in sorted(Path(folder).rglob("*.parquet")) if {*columns} <= {*pq.read_schema(file).names}]
    files = [file for file in files if CONFIG in file.parts] or files  # the copy may hold other tasks
    files = [file for file in files if file.name.startswith(f"{split}-")] or files
    if not files:
        names = " and ".join(columns)
        raise FileNotFoundError(f"it has no parquet file with {names}, no {' and no '.join(METADATA)}")
    return files


def read_imagefolder(folder):
    """Read a folder in the ImageFolder format: metadata.jsonl or metadata.csv with file_name and caption or text."""
    file, *others = [Path(folder, name) for name in METADATA if Path(folder, name).is_file()]
    if others:
        raise ValueError(f"it has {' and '.join(METADATA)}: move the one away that is not meant")
    if file.suffix == ".csv":
        with open(file, encoding="utf-8-sig", newline="") as opened:
            lines = list(csv.DictReader(opened))
    else:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    captions = {}
    for number, line in enumerate(lines, 1):
        path, texts = line.get("file_name"), line.get("caption", line.get("text"))
        if not isinstance(path, str) or not path.strip():
            raise ValueError(f"{file.name}, entry {number} has no file_name")
        if any(line.get(None, ())):  # a comma in a caption without quotes, which would be cut there
            raise ValueError(f"{file.name}, entry {number} has more fields than the first line: put captions in quotes")
        captions.setdefault(os.path.normpath(path), []).extend(texts if isinstance(texts, list) else [texts])
    return [(f"{file.name}: {path[:99]!r}", path, coco_id_of(path), texts, texts) for path, texts in captions.items()]


def coco_id_of(path):
    """Return the COCO id in a file name, COCO_val2014_000000391895.jpg or 2017's 000000391895.jpg; None without one."""
    match = re.fullmatch(r"(?:COCO_(?:train|val)2014_)?([0-9]{12})", PurePosixPath(path).stem)
    return int(match[1]) if match else None


def read_captions(file, split):
    """Read the rows of COCO's captions_*.json, or of one split of Karpathy's dataset_*.json, in the order of images."""
    data = json.loads(Path(file).read_text(encoding="utf-8"))
    captions = captions_by_path(data) if "annotations" in data else karpathy_captions(data, split)
    return [(repr(path[:99]), path, coco_id_of(path), texts, texts) for path, texts in captions.items() if texts]


def captions_by_path(data):
    """Return {path: [caption]} of COCO's captions_*.json, whose ids count for nothing else."""
    paths = {}
    for image in data["images"]:
        path = os.path.normpath(image["file_name"])
        if paths.setdefault(str(image["id"]), path) != path:
            raise ValueError(f"two of its images have the id {image['id']}: a caption may be of either")
    captions = {path: [] for path in paths.values()}
    for annotation in data["annotations"]:
        if path := paths.get(str(annotation["image_id"])):
            captions[path].append(annotation["caption"])
    return captions


def karpathy_captions(data, split):
    """Return {path: [caption]} of Karpathy's split files of Flickr30k and COCO: of the test split, or of training."""
    wanted = {"train": ("train", "restval"), "eval": ("test",)}[split]
    images = [image for image in data["images"] if image["split"] in wanted]
    paths = [os.path.normpath(os.path.join(image.get("filepath", ""), image["filename"])) for image in images]
    return {path: [sentence["raw"] for sentence in image["sentences"]] for path, image in zip(paths, images)}


def to_geometry(geometry):
    """Return open_clip's own preprocessing up to the pixels: PIL image -> uint8 (3, H, W)."""
    resize = image_transform_v2(PreprocessCfg(**geometry), is_train=False)
    del resize.transforms[-2:]  # the conversion to float and the normalisation
    return lambda image: to_array(resize(image))


def to_array(image):
    """Convert a PIL image, RGB, to uint8 (3, H, W)."""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def read_file(files, name):
    """Read an image file as a whole; ValueError if it is more than its pixels can take, as a zip bomb is.

    files   the file system or ZipFile that opens it
    """
    with files.open(name) as file:
        data = file.read(20_000_000)
        if more := file.read(1):
            webp = data[8:12] == b"WEBP"  # which Pillow opens as a whole only
            limit = 200_000_000 if webp else 8 * math.prod(open_image(data).size)
            data += more + file.read(limit)
            if file.read(1):
                raise ValueError(f"more than {len(data) / 1e6:.0f} MB")
    return data


def open_image(data):
    """Open the bytes of an image file, or the first of them, as a PIL image that is not decoded yet."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = image.size
    if width * height > LARGEST_IMAGE or max(width, height) > 500 * min(width, height):
        raise ValueError(f"{width} x {height} pixels")
    if image.mode[0] in "IF":
        raise ValueError(f"more than 8 bits a channel (mode {image.mode})")
    return image


def read_image(data):
    """Decode the bytes of an image file to a PIL image, RGB, 8 bits a channel; a damaged one raises any exception."""
    image = open_image(data)
    ImageOps.exif_transpose(image, in_place=True)  # phones store photographs rotated
    return image.convert("RGB")


def find_images(source, paths, skip_missing=False):
    """Find the image files of paths in a folder and its zips, or on a hub.

    skip_missing   whether some may be missing, which the result then lacks
    returns        {path: (the file system or ZipFile that opens the file, its name there)}

    A path stands for the file below the folder that it names; a link or .. that leads out of the folder does not count.
    Only a file name that is COCO's own is looked for elsewhere, and the longest common end of the path decides. From a
    hub the zip of MSCOCO_i2t is downloaded; of a zip of all tasks only the members needed are read, by range requests.
    """
    local = os.path.isdir(source)
    fs, root = fsspec.url_to_fs(source if local else f"hf://datasets/{source}")
    inside, found, looked_into = os.path.realpath(root) + os.sep, {}, [root]
    for path in paths if local else ():
        file = os.path.join(root, path)
        if os.path.isfile(file) and os.path.realpath(file).startswith(inside):
            found[path] = fs, file
    elsewhere = [path for path in paths if path not in found and coco_id_of(path) is not None]
    names = fs.find(root) if elsewhere else []
    zips = sorted((name for name in names if name.endswith(".zip")), key=lambda name: (CONFIG not in name, name))
    files = {name: (fs, name) for name in names if not local or os.path.realpath(name).startswith(inside)}
    for archive in zips:
        if not local and len(match_files(elsewhere, files)) == len(elsewhere):
            break  # each further zip of a hub takes seconds
        if CONFIG in archive and not local:
            file = huggingface_hub.hf_hub_download(source, archive.removeprefix(f"{root}/"), repo_type="dataset")
        else:
            file = fs.open(archive, block_size=2**16)  # about one image
        try:
            members = zipfile.ZipFile(file)
            files |= {f"{archive}/{name}": (members, name) for name in members.namelist()}
            looked_into.append(os.path.relpath(archive, root))
        except zipfile.BadZipFile as error:  # it may be none that is needed
            looked_into.append(f"{os.path.relpath(archive, root)} ({describe(error)})")
    for path, nearest in match_files(elsewhere, files).items():
        if len(nearest) > 1 and len({digest(read_file(*files[name])) for name in nearest}) > 1:
            advice, choices = "give a folder with the right one alone by --image_root", " or ".join(nearest[:3])
            raise ValueError(f"images of one name differ; {advice}: {path} may be {choices}")
        found[path] = files[nearest[0]]
    missing = [path[-60:] for path in paths if path not in found]
    if missing and not (skip_missing and found):
        advice = "--skip_bad_images leaves them out" if found else "--image_root gives their folder"
        first, places = ", ".join(missing[:5]), ", ".join(looked_into[:5])
        raise ValueError(f"{len(missing)} of {len(paths)} images are missing; {advice}: {first} (looked into {places})")
    return found


def fetch_images(source, paths, folder, skip_missing):
    """Unpack the images of paths that a zip on a hub holds into a folder, and return it; no hub is asked for others."""
    missing = [path for path in paths if not (folder / PurePosixPath(path).name).is_file()]
    if missing and not RANK:
        folder.mkdir(parents=True, exist_ok=True)
        found = find_images(source, missing, skip_missing)
        for path, place in progress(found.items(), "download", unit="image"):
            save(folder / PurePosixPath(path).name, read_file(*place))
    gather()
    return str(folder)


def match_files(paths, files):
    """Map each path to the files of the same name that share the most trailing folders with it: {path: [file]}."""

    def shared_folders(path, file):
        pairs = zip(reversed(PurePosixPath(path).parts), reversed(PurePosixPath(file).parts))
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    files_by_name = defaultdict(list)
    for file in files:
        files_by_name[PurePosixPath(file).name].append(file)
    matches = {}
    for path in paths:
        if candidates := files_by_name.get(PurePosixPath(path).name):
            shared = [shared_folders(path, file) for file in candidates]
            matches[path] = [file for file, count in zip(candidates, shared) if count == max(shared)]
    return matches


def load_training_images(args, geometry):
    """Load --num_images training images, and --val_images after them, by default a tenth: (Images, Images).

    Exit if one of them is an evaluation image: by its COCO id, compared with the whole evaluation split, or by its
    pixels, compared with the images of the preset's table.
    """
    preset, count, held_out = PRESETS[args.preset], args.num_images, args.val_images
    if count is None or held_out is None:
        available = len(read_rows(args, "train"))
        held_out = held_out or min(preset["val_images"], max(1, available // 10))
        count = count or max(1, available - held_out)
    training = load_images(args, "train", geometry, 0, count)
    check_batch(args, len(training))
    validation = load_images(args, "train", geometry, count, held_out)
    if not args.eval_data:
        print("no --eval_data was given: whether evaluation images are trained on is not checked")
        return training, validation
    rows = read_rows(args, "eval")
    count = len(rows) if is_own(args.eval_data) else min(len(rows), preset["eval_images"])
    evaluated = {row.coco_id: row.path for row in rows if row.coco_id is not None}
    evaluated |= load_images(args, "eval", geometry, 0, count).fingerprints()
    trained = training.fingerprints() | validation.fingerprints()
    if shared := trained.keys() & evaluated.keys():
        first = min(shared, key=str)
        paths = f"{trained[first]} is {evaluated[first]} of --eval_data {args.eval_data}"
        fail(f"leakage: {len(shared)} ids or contents of evaluation images are trained on: {paths}")
    return training, validation


# ---------------------------------------------------------------------------------------------------------------------
# The attack


@dataclass(frozen=True)
class Attack:
    """The budget of an attack and how it is spent; its fields are part of the key under which a run stores results."""

    eps: float  # L-inf radius, pixels in [0, 1]
    alpha: float  # step size on the same scale
    steps: int
    seed: int | None = 0  # of the noise that is added to the start; None adds none
    momentum: float = 0.0  # with momentum the steps shrink by a half cosine
    loss: str = "cosine"  # with the own caption; or "margin", the lead of the hardest other caption
    draws: int = 0  # of a random loss, whose gradients are averaged in a step; 0 for a loss that is not random

    @property
    def rounds(self):
        """Rounds of pgd(): its steps, and for a loss that is not random one that only scores the last iterate."""
        return self.steps if self.draws else self.steps + 1


def white_box(eps, steps, through_jpeg=False):
    """Return the attack of the white-box columns."""
    # first step, in radii, and momentum: chosen on training images, of the tiny CLIP and of a real ViT-B/16 tower
    first, momentum = (2, 0.5) if through_jpeg else (1, 0.75)
    return Attack(eps, first * eps, steps, seed=None, momentum=momentum)


def pgd(loss_fn, images, attack, start=None, after_step=None):
    """Search the L-inf ball around images for the pixels that maximise loss_fn.

    images    (B, 3, H, W) float32 in [0, 1], before CLIP's normalisation
    loss_fn   maps such a batch to (B,) losses, one per image, higher = worse for the model
    start     where to begin, like images; it is moved into the ball. None begins at images
    after_step   called after each step, for a progress bar
    returns   like images, for each the iterate of the highest loss; {what went wrong: in which images, (B,) bool}

    PGD of Madry et al. 2018 (arXiv:1706.06083), except that the best iterate is kept, not the last. With momentum it is
    MI-FGSM of Dong et al. 2018 (arXiv:1710.06081, equations 6 and 7), except that the gradient is divided by its mean
    absolute value, which changes no sign, and that steps shrink by a half cosine from alpha to 3 % of it. Of a random
    loss the last iterate is kept: the highest of its draws would be luck.

    A loss or gradient that is not finite changes nothing and is reported, as is a gradient that is zero in every
    pixel, so that neither passes for robustness. Pixels outside [0, 1] raise ValueError. No parameter's .grad is
    changed. The caller chooses the model's mode.
    """
    if images.min() < 0 or images.max() > 1:
        raise ValueError(f"pgd needs pixels in [0, 1], got [{images.min():.2f}, {images.max():.2f}]: normalised?")
    lower, upper = (images - attack.eps).clamp(min=0), (images + attack.eps).clamp(max=1)
    x = images if start is None else start.clamp(lower, upper)
    best, best_loss = images, images.new_full(images.shape[:1], -torch.inf)
    zero = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    nonfinite, velocity = zero.clone(), torch.zeros_like(images)
    for step in range(attack.rounds):
        last = step == attack.steps
        x = x.detach().requires_grad_(not last)
        loss = grad = 0
        for _ in range(attack.draws or 1):  # one at a time, so that they need no more memory than one
            with torch.set_grad_enabled(not last):
                drawn = loss_fn(x)
            if not last:
                grad = grad + torch.autograd.grad(drawn.sum(), x)[0]  # sum, not mean: no factor 1/B to underflow
            loss = loss + drawn.detach()
        finite = loss.isfinite()
        if not last:
            finite &= grad.isfinite().flatten(1).all(1)
            grad = torch.where(finite[:, None, None, None], grad, 0)
            zero |= finite & (grad == 0).flatten(1).all(1)
        nonfinite |= ~finite
        if after_step:
            after_step()
        x = x.detach()
        better = loss > best_loss  # False where the loss is NaN
        best_loss = torch.where(better, loss, best_loss)
        best = torch.where(better[:, None, None, None], x, best)
        if last:
            break
        size = grad.abs().mean((1, 2, 3), keepdim=True).clamp(min=torch.finfo(grad.dtype).tiny)
        velocity = attack.momentum * velocity + grad / size
        shrink = max(0.03, (1 + math.cos(math.pi * step / attack.steps)) / 2) if attack.momentum else 1
        x = (x + attack.alpha * shrink * velocity.sign()).clamp(lower, upper)
    return x if attack.draws else best, {"zero_gradient": zero, "nonfinite": nonfinite}


def generators_for(seed, indices):
    """Return a random generator on the CPU for each image, by its own (seed, index), so that no batch size matters."""
    return [torch.Generator().manual_seed(seed * 1_000_003 + int(index)) for index in indices]


def uniform(images, generators):
    """Draw noise in [-1, 1] for images (B, 3, H, W), each by its own generator: like images."""
    noise = torch.empty(images.shape)
    for row, generator in zip(noise, generators):
        row.uniform_(-1, 1, generator=generator)
    return noise.to(images.device)


def grey_levels(eps):
    """Return the largest whole number of grey levels inside a radius on the [0, 1] scale."""
    return math.floor(eps * 255 + 1e-6)


def to_pixels(images, pixels, eps):
    """Round images in [0, 1] to uint8 without leaving the ball around pixels: uint8 (B, 3, H, W) on the CPU."""
    pixels = torch.tensor(np.asarray(pixels), device=images.device).int()
    delta = ((images * 255).round().int() - pixels).clamp(-grey_levels(eps), grey_levels(eps))
    return (pixels + delta).clamp(0, 255).byte().cpu()


def attack_batch(attack, loss_fn, pixels, clip, indices, start=None, precision=None, after_step=None):
    """Attack one batch of uint8 images (B, 3, H, W), rounded to uint8 inside the ball.

    indices   of the images among all of the run: their noise is drawn by these
    start     like pixels: where the attack begins, by default at the images; attack.seed adds noise
    returns   pixels_adv uint8 (B, 3, H, W) on the CPU; {what went wrong: (B,) bool} of pgd()
    """
    images, x = (as_images(values, clip.device) for values in (pixels, pixels if start is None else start))
    if attack.seed is not None:
        x = x + attack.eps * uniform(x, generators_for(attack.seed, indices))
    with tf32((precision or clip.precision) != "fp32"):
        x, wrong = pgd(loss_fn, images, attack, x, after_step)
    return to_pixels(x, pixels, attack.eps), {key: value.cpu() for key, value in wrong.items()}


def my_batches(indices, batch_size):
    """Return this process's share of some images as batches of their indices: the first ones for rank 0."""
    size = max(1, min(batch_size, math.ceil(len(indices) / PROCESSES)))  # so that all have work
    starts = np.array_split(np.arange(0, len(indices), size), PROCESSES)[RANK]
    return [np.asarray(indices[start : start + size]) for start in starts]


def attack_all(attack, loss, pixels, clip, start=None, run=None, what="attack", keys=(), precision=None):
    """Attack every image, a batch at a time; under torchrun each process attacks its share, and all get the result.

    loss      (encode_image, indices) -> loss_fn of those images for pgd(), such as partial(own_caption, ...)
    start     like pixels: where the attack begins, by default at the images
    run       stores each batch under (what, attack, keys, its pixels): one that a killed run has stored is not
              attacked again
    keys      what else a result depends on
    precision   of the gradients, by default that of clip
    returns   pixels_adv uint8 (N, 3, H, W) on the CPU, {what went wrong: (N,) bool}
    """
    start, parts = pixels if start is None else start, []
    batches = my_batches(np.arange(len(pixels)), clip.batch_size)
    total = sum(map(len, batches)) * attack.rounds
    with progress(what=what, total=total, unit="image-step") as bar:
        for batch in batches:
            key = [what, asdict(attack), list(keys), batch.tolist(), digest(pixels[batch], start[batch])]
            part = run and run.load_part(key)
            if part:
                bar.update(len(batch) * attack.rounds)
            else:
                loss_fn, step = loss(clip.attack_encoder(precision), batch), partial(bar.update, len(batch))
                part = attack_batch(attack, loss_fn, pixels[batch], clip, batch, start[batch], precision, step)
                if run:
                    run.save_part(key, part)
            parts.append(part)
    parts = sum(gather(parts), [])
    wrong = {key: torch.cat([wrong[key] for _, wrong in parts]) for key in parts[0][1]}
    return torch.cat([pixels_adv for pixels_adv, _ in parts]), wrong


@contextmanager
def tf32(enabled=True):
    """Allow TF32 products on a GPU that has them: for gradients and metadata, never for the scores of a table."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, enabled or matmul.allow_tf32
    try:
        yield
    finally:
        matmul.allow_tf32 = before


def own_caption(text_features, encode_image, here=slice(None)):
    """Return the report's loss of the images of a slice: minus the cosine with the own caption, row i of (N, D)."""
    return lambda images: -(encode_image(images) * text_features[here]).sum(-1)


def linf_grey_levels(pixels, pixels_adv):
    """Return the largest difference of each image, uint8 (..., 3, H, W) both: (...) whole grey levels."""
    return np.abs(np.asarray(pixels, np.int16) - np.asarray(pixels_adv, np.int16)).max((-3, -2, -1))


# ---------------------------------------------------------------------------------------------------------------------
# Training: what both defences share; the loop stands in their scripts


def step_seed(seed, step):
    """Return a seed of 63 bits for a step of a training: no two seeds of a training have steps in common."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)


def step_generator(seed, step, device):
    """Return the generator of a training step's random draws, on the device, so that it need not wait for the host.

    Draw for the whole batch, of which each process takes its part. A device repeats its draws; two kinds of device draw
    different numbers.
    """
    return torch.Generator(device).manual_seed(step_seed(seed, step))


def contrastive_loss(image_features, text_features, logit_scale):
    """Return the symmetric contrastive loss of a batch (Radford et al. 2021, arXiv:2103.00020, figure 3).

    image_features, text_features   (B, D), row i of both from one pair; equal captions are never each other's negatives
    """
    targets = torch.arange(len(image_features), device=image_features.device)
    equal = (text_features[:, None] == text_features[None]).all(-1).fill_diagonal_(False)  # (B, B)
    logits = (logit_scale * image_features @ text_features.T).masked_fill(equal, -torch.inf)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


class Trainer:
    """What both trainings share: order of the batches, states, validation, the model; optimizer and loop are theirs.

    Iterating yields (step, batch, part): batch holds the indices of the images, part the positions in batch of the
    images of this process. An epoch is as many whole batches as there are, in a new order. The visual tower is trained;
    text tower and logit_scale are frozen. The result is the model after the last epoch; the validation figures are
    printed and decide nothing. Random draws depend on the seed and the step alone, so that a state saved every
    --save_every minutes is enough to resume to the same files. Under torchrun --batch_size is shared out, and each loss
    is over the features of all: any number of processes trains the same.
    """

    def __init__(self, args, run, clip, optimizer, training, validation):
        self.args, self.run, self.clip, self.optimizer = args, run, clip, optimizer
        self.training, self.validation, self.visual = training, validation, clip.model.visual
        clip.model.requires_grad_(False)
        self.visual.requires_grad_(True)
        self.visual.set_grad_checkpointing(args.grad_checkpointing)
        self.model = torch.nn.parallel.DistributedDataParallel(clip) if PROCESSES > 1 else clip

        self.steps_per_epoch = len(training) // args.batch_size
        self.last_step = min(args.epochs * self.steps_per_epoch, args.max_steps or math.inf)
        self.log, self.epochs, self.stopped = [], [], None
        self.text_features = clip.encode_text(training.own_captions)  # (N, D)
        clip.encode_pixels(training.pixels[:1])  # damaged weights end it here or above, before the folder is theirs
        run.begin()
        if state := run.load_part("state"):
            self.visual.load_state_dict(state["visual"])
            optimizer.load_state_dict(state["optimizer"])
            self.log, self.epochs = state["log"], state["epochs"]
        if not RANK:
            save(run.dir / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in self.log))

    def __iter__(self):
        self.saved = time.perf_counter()
        with progress(range(len(self.log), self.last_step), "train", unit="step") as self.bar:
            for step in self.bar:
                epoch, position = divmod(step, self.steps_per_epoch)
                order = np.random.default_rng([self.args.seed, epoch]).permutation(len(self.training))
                start = position * self.args.batch_size
                batch = order[start : start + self.args.batch_size]
                torch.manual_seed(step_seed(self.args.seed, step) + RANK)  # for a tower with patch dropout
                self.train_mode()
                yield step, batch, np.array_split(np.arange(len(batch)), PROCESSES)[RANK]
                if self.stopped:
                    return

    def train_mode(self):
        """Put the visual tower into training mode, but for BatchNorm: its statistics would depend on the processes."""
        self.visual.train()
        for module in self.visual.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()

    def encode(self, *images):
        """Encode sets of the batch's images, such as clean and adversarial, in one forward pass: [(B, D) of each].

        images   of this process each; the features are those of all processes
        """
        features = self.model(torch.cat(images)).chunk(len(images))
        if PROCESSES > 1:  # the features of the other processes carry no gradient
            gather_features = partial(open_clip.loss.gather_features, rank=RANK, world_size=PROCESSES)
            features = [gather_features(x, x)[0] for x in features]
        return features

    def end_step(self, **figures):
        """Log the figures of a step, tensors, loss and grad_norm among them; validate after an epoch; save states."""
        args, step = self.args, len(self.log) + 1
        figures = {key: value.item() for key, value in figures.items()}
        if not math.isfinite(figures["loss"] + figures["grad_norm"]):
            fail(f"the loss of step {step} is not finite: {figures}. Remove {self.run.dir} and use a lower --lr")
        epoch = math.ceil(step / self.steps_per_epoch)
        self.log.append({"step": step, "epoch": epoch, **figures, "lr": self.optimizer.param_groups[0]["lr"]})
        self.bar.set_postfix(loss=f"{figures['loss']:.3f}", refresh=False)
        if not RANK:
            with open(self.run.dir / "log.jsonl", "a") as file:
                file.write(json.dumps(self.log[-1]) + "\n")

        if args.loss_threshold and len(self.log) >= args.loss_window:
            window = gather([entry["loss"] for entry in self.log[-args.loss_window :]])[0]  # all stop at the same step
            if np.mean(window) < args.loss_threshold:
                self.stopped = "loss_threshold"
        if step == self.last_step and not self.stopped:
            self.stopped = "max_steps" if self.last_step == args.max_steps else "epochs"
        epoch_ends = self.stopped or step % self.steps_per_epoch == 0
        if epoch_ends:
            self.end_epoch()
        if epoch_ends or time.perf_counter() - self.saved >= 60 * args.save_every:
            if not RANK and not self.stopped:
                state = {"visual": self.visual.state_dict(), "optimizer": self.optimizer.state_dict()}
                self.run.save_part("state", state | {"log": self.log, "epochs": self.epochs})
            self.saved = time.perf_counter()

    def end_epoch(self):
        """Print the clean and white-box similarity on the validation images."""
        args, clip, epoch = self.args, self.clip, self.log[-1]["epoch"]
        mean_loss = float(np.mean([entry["loss"] for entry in self.log if entry["epoch"] == epoch]))
        self.visual.eval()
        pixels, text_features = self.validation.pixels, clip.encode_text(self.validation.own_captions)
        attack, precision = white_box(args.eps, args.steps), pick_precision(args.precision, clip.device, bf16=False)
        loss = partial(own_caption, text_features)
        pixels_adv, _ = attack_all(attack, loss, pixels, clip, what="validate", precision=precision)
        clean, attacked = (clip.similarity(x, text_features).mean().item() for x in (pixels, pixels_adv))
        figures = {"val_clean": clean, "val_white_box": attacked}
        self.epochs.append({"epoch": epoch, "step": len(self.log), "loss": mean_loss} | figures)
        write = tqdm.write if sys.stderr.isatty() else print  # above the bar of a terminal
        line = f"epoch {epoch}/{args.epochs}  step {len(self.log)}  loss {mean_loss:.3f}  "
        write(f"{line}validation clean {clean:.3f}, white-box {attacked:.3f}")

    def finish(self, generation_seconds=0, **metrics):
        """Write the model and metrics.json.

        generation_seconds   time that the adversarial images took, which counts as training time
        """
        if not RANK:  # the images of the weights that it started from are its own, too
            own = {*self.training.fingerprints(), *self.validation.fingerprints()}
            save_model(self.run.dir, self.clip, self.clip.trained_on | own)
        seconds = self.run.seconds()
        metrics |= {"n": len(self.training), "n_validation": len(self.validation), "steps": len(self.log)}
        metrics |= {"stopped_by": self.stopped, "epochs": self.epochs, "training_seconds": seconds + generation_seconds}
        metrics["images_per_s"] = 2 * self.args.batch_size * len(self.log) / seconds
        self.run.finish(self.clip.device, **metrics)
        print(f"to open the model: open_clip.create_model_and_transforms('local-dir:{self.run.dir}')")
