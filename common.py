"""What the five scripts share. Each script holds its own method; whatever two of them need stands here.

Words and units, the same everywhere:
    images          (B, 3, H, W) float32 pixels in [0, 1], after resize and centre crop, before CLIP's normalisation
    pixels          the same as uint8 grey levels; images_adv and pixels_adv are attacked
    eps, alpha      L-inf radius and step size on the [0, 1] scale: 8/255, not 8
    image_features  (B, D) float32, unit norm; text_features likewise
    logit_scale     the multiplier of the cosine (about 100), not its logarithm
    similarity      cosine of an image and its own caption

Sections, and what a script calls in each, in this order:
    Flags                  make_parser(), parse_flags(); command_of(), run_script() to run another script
    Errors and processes   fail(), exit_on_error(), gather(), progress(); run_main() around main(args)
    Runs                   Run: an output folder that refuses another run, resumes its own and records how it was made
    CLIP                   load_clip() returns a Clip: a model on its device, with its tokenizer and preprocessing
    Weights                load_weights(): the file formats that people save
    Data                   load_rows() reads captions, load_examples() decodes images into a datasets.Dataset
    The attack             Attack (a budget), pgd(), attack_all() on all images, accept_precision()
    Training               Trainer: everything but the loop, which stands in the scripts; contrastive_loss()
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
import resource
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
import zipfile
import zlib
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
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
    "train_images": {"report": 5000, "tiny": 1000, "smoke": 48},  # --num_images where a script reads the training split
    "eval_images": {"report": 100, "tiny": 100, "smoke": 16},  # and where it reads the evaluation split
    "val_images": {"report": 250, "tiny": 20, "smoke": 8},
    "steps": {"report": 20, "tiny": 20, "smoke": 8},
    "attack_steps": {"report": 75, "tiny": 75, "smoke": 10},
    # tiny: chosen by the rule of tests/tiny/choose_rates.py, on images of the training split that no training sees;
    # the search for features_lr is in tests/records/losses.json
    "mat_lr": {"report": 1e-5, "tiny": 4e-4},
    "contrastive_lr": {"report": 1e-5, "tiny": 1e-4},
    "features_lr": {"report": 1e-5, "tiny": 1.6e-3},
    "epochs": {"report": 3, "tiny": 4, "smoke": 2},
}


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
    if value < 1 / 255.5:
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
    """Make a parser with the flags that every script has; defaults that are missing here come from --preset."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=Formatter, allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; --help lists the flags")
    flag = parser.add_argument_group("run").add_argument
    flag("--preset", choices=["report", "tiny", "smoke"], default="report", help="defaults of the flags below")
    flag("--output_dir", help="output folder; the folders of the other scripts stand beside it")
    flag("--overwrite", action="store_true", help="replace the run in it; with --reproduce those of all scripts")
    flag("--seed", type=number(0, 2**31), default=0, help="seed of all random numbers")
    flag("--device", default="auto", help="cuda, cuda:1, mps, cpu, or auto: the first of them that is available")
    flag = parser.add_argument_group("model").add_argument
    flag("--model", help="open_clip name, local-dir:DIR or hf-hub:ORG/NAME")
    flag("--pretrained", help="open_clip tag, a checkpoint file, or 'random' for untrained weights")
    precision = "of gradients, never of scores; auto: bf16 on a GPU where the attack is as strong as in fp32"
    flag("--precision", choices=["auto", "fp32", "bf16"], default="auto", help=precision)
    flag = parser.add_argument_group("data").add_argument
    own = "a folder with metadata.jsonl or metadata.csv (file_name, caption), or COCO's captions_*.json"
    flag("--train_data", help=f"training set: MMEB's hub id or a local copy of it; {own}")
    flag("--eval_data", help="evaluation set, in the same forms")
    flag("--image_root", nargs="+", metavar="DIR", help="folder of the images; train=DIR or eval=DIR: of one split")
    flag("--num_images", type=number(1), help="use the first images; default for your own pictures: all")
    flag("--skip_bad_images", action="store_true", help="leave out and count images that are missing or damaged")
    flag("--batch_size", type=number(1), default=batch_size, help="images per batch; in a training, over all processes")
    flag("--num_workers", type=number(1, 1024), default=os.cpu_count(), help="threads that write PNGs")
    flag("--cache_dir", default="runs/cache", help="folder of the decoded images")
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
    threshold = "stop one step after the contrastive loss, averaged over --loss_window steps, is below this"
    flag("--loss_threshold", type=number(1e-12, 10**6, float), help=threshold)
    flag("--loss_window", type=number(1), default=50, help="steps that --loss_threshold averages over")
    flag("--val_images", type=number(1), help="images of the training split to validate on; they are not trained on")


def parse_flags(parser, argv, stage, images, rate=None):
    """Parse the command line with the defaults of --preset.

    stage    (flags) -> name of the default output folder under runs/PRESET/
    images   (flags) -> 'train' or 'eval': the split whose image count is the default of --num_images
    rate     (flags) -> name of the preset's learning rate, for trainings
    """
    words = sys.argv[1:] if argv is None else argv
    with exit_on_error("the command line is not text in UTF-8"):  # metrics.json could not hold it
        " ".join(words).encode()
    chosen = expand_paths(parser.parse_known_args([word for word in words if word not in ("-h", "--help")])[0])
    defaults = {flag: values.get(chosen.preset, values["tiny"]) for flag, values in PRESETS.items()}
    defaults["output_dir"] = f"runs/{chosen.preset}/{stage(chosen)}{radius_suffix(chosen)}"
    split = images(chosen)
    defaults["num_images"] = defaults[f"{split}_images"]
    if is_own(getattr(chosen, f"{split}_data") or ""):
        defaults |= {"num_images": None, "val_images": None}  # all of them; load_rows() counts them
        defaults |= {"eval_data": None} if split == "train" else {}  # a training needs none
    defaults["lr"] = defaults[rate(chosen)] if rate else None
    if (chosen.model or "").startswith(("local-dir:", "hf-hub:")):
        defaults["pretrained"] = ""  # such a model brings its weights
    parser.set_defaults(**{name: value for name, value in defaults.items() if hasattr(chosen, name)})
    args = expand_paths(parser.parse_args(words))
    if not args.output_dir:
        parser.error("--output_dir is empty")
    return args


def expand_paths(args):
    """Replace the ~ at the start of every path in args by the home folder; no shell does so behind a =."""
    for name, value in vars(args).items():
        if isinstance(value, str):
            setattr(args, name, expand_home(value))
    args.image_root = args.image_root and [expand_home(root) for root in args.image_root]
    return args


def expand_home(path):
    """Replace the ~ at the start of a path, or behind local-dir:, train= or eval=, by the home folder."""
    prefix = re.match("(local-dir:|train=|eval=)?", path)[0]
    return prefix + os.path.expanduser(path.removeprefix(prefix))


SHARED = "device model pretrained precision train_data eval_data image_root skip_bad_images num_workers cache_dir"
SHARED += " eps alpha steps seed"


def radius_suffix(args):
    """Return the suffix of default folders for a radius other than the report's, such as _eps4."""
    return "" if args.eps == 8 / 255 else f"_eps{args.eps * 255:.6g}"


def stage_folder(args, stage):
    """Return the folder of another script's output, beside --output_dir."""
    return Path(args.output_dir).parent / f"{stage}{radius_suffix(args)}"


def command_of(script, args, stage, *words, flags=SHARED, suffix=""):
    """Write the command that runs another script, with the flags that args has from the user.

    stage    the default output folder of that script; suffix is appended to it
    """
    default = parse_flags(make_parser(""), ["--preset", args.preset], lambda _: stage, lambda _: "train")
    given = vars(args) | {"output_dir": str(stage_folder(args, stage + suffix))}
    words = [script, *(["--preset", args.preset] if args.preset != "report" else []), *map(str, words)]
    for name in [*flags.split(), "output_dir"]:
        value = given[name]
        if value != getattr(default, name) and value not in (None, ""):  # --pretrained is "" behind local-dir:
            values = value if isinstance(value, list) else [flag_text(name, value)]
            words += [f"--{name}", *([] if value is True else map(str, values))]
    return words


NESTED = []  # command lines of the scripts that run the present one


def run_script(words):
    """Print the command of another script and run it in this process, where the libraries are imported already."""
    command = command_line(*words)
    print(f"\n$ {command}", flush=True)
    NESTED.append(sys.argv)
    sys.argv = shlex.split(command)[1:]
    try:
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    finally:
        sys.argv = NESTED.pop()


# ---------------------------------------------------------------------------------------------------------------------
# Errors and processes

LAUNCHER = "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"  # torchrun sets these numbers, and MASTER_ADDR
RANK, PROCESSES = 0, 1
if "MASTER_ADDR" in os.environ and all(os.environ.get(name, "").isdigit() for name in LAUNCHER):
    # if one is missing, another program has left the others behind
    RANK, PROCESSES = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


MEETING_SECONDS = 50


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
    backend, where = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", {}
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # not started by torchrun: the others may not exist
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        message = f"RANK, WORLD_SIZE={PROCESSES} and MASTER_ADDR are set, but not all processes joined in time"
        with exit_on_error(f"{message}: unset them, or start all processes"):
            store = distributed.TCPStore(address, port, PROCESSES, RANK == 0, timedelta(seconds=MEETING_SECONDS))
        where = {"store": store, "rank": RANK, "world_size": PROCESSES}
    distributed.init_process_group(backend, timeout=timedelta(days=1), **where)  # rank 0 may decode for hours
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
    if args.eps != grey_levels(args.eps) / 255:
        levels = grey_levels(args.eps)
        print(f"note: --eps {radius_text(args.eps)} allows 8-bit images to change by {levels} grey levels")
    try:
        main(args)
    except KeyboardInterrupt:
        if RANK:
            raise SystemExit(130)
        fail("the same command resumes from what is saved", "stopped", 130)
    except BrokenPipeError:  # the reader of our output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(1)
    except torch.OutOfMemoryError:
        fail(f"--batch_size {args.batch_size} is too large for the GPU's memory; trainings have --grad_checkpointing")
    except OSError as error:
        fail(f"{describe(error)}. Once that is solved, the same command resumes from what is saved")
    finally:
        logging.disable(silenced)
        while LOCKS:  # in a notebook the process goes on
            LOCKS.pop()()


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
# Runs: an output folder each. metrics.json is written last: a folder with one is complete

# flags that change no figure
NOT_IN_RESULT = {"output_dir", "overwrite", "num_workers", "cache_dir", "reproduce", "save_every", "grad_checkpointing"}


RECORD_KEYS = {"argv", "args", "inputs", "processes", "started", "seconds"}  # of every metrics.json of ours
LOCKS = []  # functions that unlock the output folders of this process
OUR_FILES = ["images", "metadata.jsonl", "log.jsonl", "open_clip_config.json", "open_clip_model.safetensors"]
OUR_FILES += ["config.json", "model.safetensors", "pytorch_model.bin"]  # of a model in another format
OUR_FILES += ["table.md", "examples.png", "cosines.png", "white_box", "table.png", "eps_curves.png", "radii.png"]


class Run:
    """An output folder: refuses a run of other flags, data or code, resumes its own, and records how it was made.

    code      code_checksums() of the definitions that make the result
    rows      the images that the run reads, from load_rows()
    inputs    {name: checksum} of what the run reads beside those images and the model
    extends   flags that may differ from those of a complete run in the folder: the script adds what is missing

    .previous  the metrics.json of this run if it is complete, else None
    .changed   the definitions that have changed since it was made, as a text; '' if none has
    """

    def __init__(self, args, code, rows=None, inputs=None, extends=()):
        self.dir, self.clock, self.extends = Path(args.output_dir), time.perf_counter(), {*extends}
        self.partial, self.done = self.dir / ".partial", self.dir / "metrics.json"
        images = {"images and captions": digest(rows["checksum"][:])} if rows else {}
        self.record = {
            "argv": sys.argv,
            "args": relative_paths(vars(args)),
            "inputs": images | model_checksums(args.model, args.pretrained) | (inputs or {}),
            "code": code,
            "commit": git_commit(),
            "processes": PROCESSES,
            "started": datetime.now(timezone.utc).isoformat(),
            "seconds": 0.0,
        }
        try:
            found = None if RANK else self.take_folder(args)
        except SystemExit:
            self.release()
            raise
        self.previous, self.begun = gather(found)[0]  # rank 0 has looked into the folder
        self.changed = describe_code_changes(self.previous, code) if self.previous else ""
        if self.begun:
            self.record |= {"started": self.begun["started"], "seconds": self.begun["seconds"]}

    def take_folder(self, args):
        """Lock the folder until this process ends; return the complete and the unfinished record of this run in it."""
        self.release = lambda: None
        with exit_on_error(f"cannot write to --output_dir {self.dir}"):
            self.protect_files(args)
            made = [folder for folder in (self.dir, *self.dir.parents) if not folder.exists()]
            self.dir.mkdir(parents=True, exist_ok=True)
            folder = os.open(self.dir, os.O_RDONLY)
            self.release = weakref.finalize(self, release_folder, folder, made)
            LOCKS.append(self.release)
            save(self.dir / ".write_test", "")
            (self.dir / ".write_test").unlink()
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"another run is writing to {self.dir}: wait for it, or give another --output_dir")
        except OSError:
            pass  # a file system without locks
        previous = None if self.record["args"]["overwrite"] else self.read(self.done)
        if self.done.exists() and previous is None:  # a complete run is replaced
            begun = None
        else:
            begun = self.read(self.partial / "run.json", beside=previous)
        if not begun:
            shutil.rmtree(self.partial, ignore_errors=True)
        return previous, begun

    def protect_files(self, args):
        """Exit if the folder is an input, or holds files with our names that no run of these scripts has written."""
        inputs = [args.train_data, args.eval_data, args.model, getattr(args, "adversarial_dir", None)]
        inputs += [folder for _, folder in image_roots(args)]
        for folder in ((folder or "").removeprefix("local-dir:") for folder in inputs):
            if os.path.isdir(folder) and self.dir.exists() and os.path.samefile(folder, self.dir):
                fail(f"--output_dir {self.dir} is an input, too, and would be overwritten: choose another")
        found = []
        if not self.partial.exists() and not self.done.exists():
            found = [self.dir / name for name in OUR_FILES if (self.dir / name).exists()]
        with suppress(OSError, ValueError, RecursionError):  # a damaged one may be ours
            record = json.loads(self.done.read_text(encoding="utf-8"))
            found += [] if isinstance(record, dict) and record.keys() >= RECORD_KEYS else [self.done]
        if found:
            fail(f"{found[0]} was not written by these scripts and would be lost: choose another --output_dir")

    def read(self, file, beside=None):
        """Return the record of this run that an earlier process wrote, or None; exit if it is of another run.

        beside   the complete run that an unfinished one in the folder extends; if that was another run, it is dropped
        """
        if not file.exists():
            return None
        complete, old, new = file == self.done, load_record(file), self.record
        if beside and old["started"] == beside["started"]:
            return None  # the complete run left it behind when it was killed

        def flags_of(record):
            flags = {key: value for key, value in record["args"].items() if key not in NOT_IN_RESULT | self.extends}
            if "lr" not in flags:
                flags.pop("batch_size", None)  # in an attack no image depends on the others of its batch
            return flags

        def differences(was, now):
            return [key for key in was.keys() | now.keys() if was.get(key) != now.get(key)]

        was, now = flags_of(old), flags_of(new)
        changes = [f"--{key} {flag_text(key, was.get(key))}, not {flag_text(key, now.get(key))}"
                   for key in sorted(differences(was, now))]  # fmt: skip
        changes += [other_input(key) for key in sorted(differences(old["inputs"], new["inputs"]))]
        if not complete and old["processes"] != new["processes"]:
            changes.append(f"{old['processes']} processes, not {new['processes']}")
        if code := ("code" not in old or not complete) and describe_code_changes(old, new["code"]):
            changes.append(f"other code ({code})")
        if not changes:
            return old
        if beside:
            print(f"{self.dir}: an unfinished run with {'; '.join(changes)} is dropped; the complete one is kept")
        elif not new["args"]["overwrite"]:
            what = "was made" if complete else "holds an unfinished run"
            fail(f"{self.dir} {what} {made_with(old, changes)}. {overwrite_advice()}")
        return None

    def report_complete(self):
        """Print that there is nothing to do, and whether the code has changed since."""
        print(f"{self.dir} is complete and was made with these flags: nothing to do (--overwrite makes it again)")
        if note := code_note(self.dir):
            print(f"note: {note}")

    def require_space(self, num_bytes):
        """Exit unless the disk has room for num_bytes in the folder, including what the folder holds already.

        The folder counts as incomplete from here until finish(), unless this run extends a complete one.
        """
        if self.begun:
            print(f"{self.dir} holds an unfinished run: resuming ({self.begun['seconds']:.0f} s were done before)")
        if not RANK:
            num_bytes -= sum(file.stat().st_size for file in self.dir.rglob("*") if file.is_file())
            free = shutil.disk_usage(self.dir).free
            if free < num_bytes:
                sizes = f"{num_bytes / 1e9:.2f} GB and {free / 1e9:.2f} GB are free"
                fail(f"{self.dir} needs {sizes}: free some space first")
            self.partial.mkdir(exist_ok=True)  # marks the files in this folder as written by these scripts
            save(self.partial / "run.json", self.record | {"seconds": self.seconds()})
            if not self.previous:
                self.done.unlink(missing_ok=True)
        gather()

    def save_part(self, key, value):
        """Store a part of the work, tensors and plain values, for a run that is killed and resumed."""
        self.partial.mkdir(exist_ok=True)
        if not RANK:
            save(self.partial / "run.json", self.record | {"seconds": self.seconds()})
        save(self.partial / f"{digest(key)}.pt", value)

    def load_part(self, key):
        """Return what a killed process of this run stored under key, or None if there is nothing or it is damaged."""
        file = self.partial / f"{digest(key)}.pt"
        with suppress(Exception), zipfile.ZipFile(file) as archive:  # a damaged file raises any exception
            if archive.testzip() is None:  # torch does not compare the checksums
                return torch.load(file, map_location="cpu", weights_only=True)
        return None

    def seconds(self):
        """Return the wall time of this run, without the pauses between a kill and a resume."""
        return self.record["seconds"] + time.perf_counter() - self.clock

    def finish(self, clip, **metrics):
        """Write metrics.json: how the run was made, and the script's figures."""
        modules, device = (torch, torchvision, open_clip, datasets, np), clip.device
        on_gpu = device.type == "cuda"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        self.record |= {
            "versions": {m.__name__: m.__version__ for m in modules} | {"python": platform.python_version()},
            "device": f"{device} ({torch.cuda.get_device_name(device) if on_gpu else platform.machine()})",
            "gradients": "bf16" if clip.bf16 else "fp32",
            "image_steps_per_s": round(clip.image_steps / clip.attack_seconds, 1) if clip.attack_seconds else None,
            "seconds": round(self.seconds() + (self.previous or {}).get("seconds", 0), 3),
            "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else peak,
        }
        if not RANK:
            save(self.done, self.record | metrics)
            shutil.rmtree(self.partial, ignore_errors=True)
        gather()


def release_folder(folder, made):
    """Unlock an output folder (a file descriptor), and remove the folders made for it that are still empty."""
    os.close(folder)
    with suppress(OSError):
        for path in made:
            path.rmdir()


def made_with(record, changes):
    """Return a text that says how a run was made differently."""
    return f"with {'; '.join(changes)}" if "code" in record else "by an earlier version of these scripts"


def overwrite_advice():
    """Return a text that says what to type where a folder holds another run."""
    replace = f": {command_line(*sys.argv, '--overwrite')}" if NESTED else ", add --overwrite"
    return f"To replace it{replace}; to keep it, choose another --output_dir"


def command_line(script, *words):
    """Return the command that runs one of the scripts from the current folder."""
    return shlex.join(["python", os.path.relpath(ROOT / Path(script).name), *map(str, words)])


def flag_text(key, value):
    """Return the value of a flag as a user would type it."""
    if key in ("eps", "alpha") and isinstance(value, float):
        return radius_text(value)
    return "''" if value == "" else value


def other_input(key):
    """Return a text that says that an input of a run has changed: a file, or another kind of input."""
    return f"another version of {key}" if "/" in key else f"other {key}"


def relative_paths(value):
    """Convert a value to what JSON holds, with paths in this checkout relative to it, so that it can be moved."""
    return json.loads(json.dumps(value).replace(json.dumps(f"{ROOT}/")[1:-1], ""))


@lru_cache
def checksum(path, size, time_ns):
    """Return the sha256 of a file; it is read again only if its size or time has changed."""
    content = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            content.update(block)
    return content.hexdigest()


def load_record(file):
    """Read a metrics.json, or the unfinished one in .partial."""
    with exit_on_error(f"{file} is damaged: delete it, or make its folder again with --overwrite"):
        record = json.loads(file.read_text(encoding="utf-8"))
        if missing := RECORD_KEYS - record.keys():
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
        return record


def digest(value):
    """Return a hash of plain values, 20 characters."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:20]


def git_commit():
    """Return the commit of this checkout, with '-dirty' if a tracked file was changed, or None outside git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    with suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


# definitions that change no figure: messages, files, and defaults of flags, which metrics.json holds themselves
NOT_IN_CODE = {"LAUNCHER", "LOCKS", "MEETING_SECONDS", "NESTED", "OUR_FILES", "PRESETS", "PROCESSES", "RANK", "Run"}
NOT_IN_CODE |= {"adversarial_folder", "code_checksums", "describe", "duration", "exit_on_error", "fail"}
NOT_IN_CODE |= {"print_cost", "progress", "remake_command", "run_script"}


def code_checksums(script, *names):
    """Return a checksum of every top-level definition that definitions of a script use: {module.name: checksum}.

    script   path of a script
    names    its definitions to start from, by default main
    A definition is used if its name occurs, alone or as an attribute of one of our modules. Comments, docstrings and
    layout change no checksum. The versions of the packages that the figures depend on are added.
    """
    versions = {m.__name__: m.__version__.split("+")[0] for m in (torch, torchvision, open_clip, np, PIL)}
    checksums, modules, queue = {}, {}, [(Path(script), name) for name in names or ["main"]]
    while queue:
        file, name = queue.pop()
        if file not in modules:
            modules[file] = parse_module(file.read_text(encoding="utf-8"), Path(script).parent)
        definitions, imports = modules[file]
        if name in imports:  # from a module of ours
            queue.append(imports[name])
        label = f"{file.stem}.{name}"
        if name not in definitions or name in NOT_IN_CODE or label in checksums:
            continue
        checksums[label] = digest([ast.unparse(node) for node in definitions[name]])[:8]
        for node in (inner for definition in definitions[name] for inner in ast.walk(definition)):
            if isinstance(node, ast.Name):
                queue.append((file, node.id))
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module, whole = imports.get(node.value.id, (None, ""))
                queue += [(module, node.attr)] if module and not whole else []
    return dict(sorted(checksums.items())) | versions


@lru_cache
def parse_module(text, folder):
    """Parse a module without its docstrings: its top-level definitions, and its imports from modules in folder.

    returns   {name: [nodes]}; {name: (file, its name there)}, with '' for a whole module
    """
    definitions, imports, tree = defaultdict(list), {}, ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    body = list(tree.body)
    for node in body:
        if isinstance(node, (ast.If, ast.Try)):  # its statements are on the top level, too
            body += [inner for inner in ast.iter_child_nodes(node) if isinstance(inner, ast.stmt)]
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            definitions[node.name].append(node)
        elif isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in (inner for target in targets for inner in ast.walk(target)):
                if isinstance(name, ast.Name):
                    definitions[name.id].append(node)
    for node in ast.walk(tree):
        for alias in node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
            whole = isinstance(node, ast.Import)
            module = alias.name if whole else node.module or ""
            file = folder / f"{module.replace('.', '/')}.py"
            if file.is_file():
                imports[alias.asname or alias.name] = (file, "" if whole else alias.name)
    return definitions, imports


def describe_code_changes(record, code):
    """Return a text that names the definitions and packages that have changed since a run was made, or ''."""
    was = record.get("code")
    if was is None:
        return "its metrics.json does not name it"
    changed = [key for key in was if code.get(key) != was[key]]  # a new definition is used by one of these
    return ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "") + (
        f" {'has' if len(changed) == 1 else 'have'} changed" if changed else ""
    )


def remake_command(folder):
    """Return a text that says how to make the folder of a complete run again."""
    file = folder / "metrics.json"
    words = load_record(file)["argv"] if file.is_file() else ["generate_pgd_adversarial.py"]
    words = [word for word in words if word != "--overwrite"]
    return f"To make it again: {command_line(*words, '--overwrite')}"


def code_note(folder):
    """Return a line if other code has made a complete run, or the adversarial images that it was trained on."""
    record = load_record(folder / "metrics.json")
    script = ROOT / Path(record["argv"][0]).name
    if script.is_file() and (changed := describe_code_changes(record, code_checksums(script))):
        return f"{folder} was made by other code ({changed}) and is used as it is. {remake_command(folder)}"
    images = record.get("adversarial_dir")
    return code_note(Path(images)) if images and (Path(images) / "metrics.json").is_file() else None


def save(path, value):
    """Write a file as a whole or not at all: tensors, a PIL image (.png), plain values as JSON, or a text.

    value   for .safetensors ({name: tensor}, {key: text}); for .pt whatever torch.save takes
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            if path.suffix == ".pt":
                torch.save(value, file)
            elif path.suffix == ".safetensors":
                file.write(safetensors.torch.save(*value))
            elif path.suffix == ".png":
                value.save(file, "PNG", compress_level=1)  # level 6 is 5 % smaller and takes 30 % more time
            else:
                if not isinstance(value, str):
                    options = {"ensure_ascii": False, "default": np.ndarray.tolist, "allow_nan": False}
                    value = json.dumps(value, indent=1, **options) + "\n"
                file.write(value.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except RuntimeError as error:  # torch.save hides why the file could not be written
        raise (error.__context__ or error) from None
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# CLIP


class Clip(torch.nn.Module):
    """An open_clip model on its device, for pixels in [0, 1] and captions.

    name        of --model or the checkpoint, for messages
    config      content of its open_clip_config.json: {"model_cfg": {...}, "preprocess_cfg": {...}}
    tokenizer   open_clip's: list of captions -> (B, context_length) int64
    batch_size  images at a time
    precision   the flag; bf16: whether gradients are computed in bfloat16. Scores are always computed in fp32
    geometry    open_clip's preprocessing up to the pixels, as plain values: size, interpolation, resize_mode, ...
    train_ids   set of the COCO ids that its weights were trained on
    notes       what a reader of its figures must know of its weights, a list of texts
    """

    def __init__(self, model, name, model_cfg, tokenizer, device, precision, batch_size, train_ids):
        super().__init__()
        self.model, self.device, self.batch_size = model.to(device).eval(), device, batch_size
        self.name, self.tokenizer = name, tokenizer
        if not all(weights.isfinite().all() for weights in model.state_dict().values()):
            raise ValueError("its weights are not finite: they are damaged, or of a training that diverged")
        able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        self.precision, self.bf16 = precision, precision == "bf16" or (precision == "auto" and able)
        self.geometry = dict(open_clip.get_model_preprocess_cfg(model))
        self.geometry["size"] = to_2tuple(self.geometry["size"])
        preprocess_cfg = {key: value for key, value in self.geometry.items() if key != "size"}
        self.config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
        for key in ("mean", "std"):  # the normalisation is part of the model: attacks change pixels
            self.register_buffer(key, torch.tensor(self.geometry.pop(key), device=device).view(3, 1, 1))
        self.text_cache, self.train_ids, self.notes = {}, train_ids, []
        self.weights = None  # cast_weights()'s
        self.image_steps, self.attack_seconds = 0, 0.0  # of all attacks

    def encode_image(self, images):
        """Encode (B, 3, H, W) float32 in [0, 1] to (B, D) float32, unit norm; differentiable in images and weights.

        With gradients the products are in bf16 if .bf16 is set; under torch.no_grad() all is fp32.
        """
        return self.encoder(self.bf16 and torch.is_grad_enabled(), held=False)(images)

    forward = encode_image  # for DistributedDataParallel

    def attack_encoder(self, bf16=None):
        """Return encode_image of the present weights for attacks: differentiable in the images alone.

        bf16   whether its products are computed in bfloat16, by default .bf16
        """
        return self.encoder(self.bf16 if bf16 is None else bf16, held=True)

    def encoder(self, bf16, held):
        """Return encode_image with products in bfloat16 or float32; held: see fast_tower()."""
        if self.weights and bf16 == self.bf16:
            return run_tower(self.model.visual, self.weights, held)
        dtype = torch.bfloat16 if bf16 else torch.float32
        if tower := fast_tower(self.model.visual, self.mean, self.std, dtype, held):
            return tower

        def encode(images):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                image_features = self.model.encode_image((images - self.mean) / self.std)
            return F.normalize(image_features.float(), dim=-1)

        return encode

    def cast_weights(self):
        """Rearrange and cast the weights for the forward passes with gradients of one training step."""
        if is_plain(self.model.visual):
            dtype = torch.bfloat16 if self.bf16 else torch.float32
            self.weights = tower_weights(self.model.visual, self.mean, self.std, dtype)

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


def fast_tower(visual, mean, std, dtype, held):
    """Return open_clip's plain VisionTransformer in fewer operations, the same function, for a CPU or CUDA.

    Rearranged: normalisation folded into a patch embedding done as one product, one product for q, k and v,
    scaled_dot_product_attention, the last block for the class token only, QuickGELU as a scaled SiLU.

    dtype     of the blocks' products; pixels, residual stream and norms stay float32: in bf16 they made the gradient of
              some photographs useless
    held      treat the weights as constants, so that only pixels get gradients
    returns   (B, 3, H, W) in [0, 1] -> (B, D), unit norm; None for a tower that is not of the plain kind
    """
    return run_tower(visual, tower_weights(visual, mean, std, dtype), held) if is_plain(visual) else None


def tower_weights(visual, mean, std, dtype):
    """Return the weights of a plain tower as run_tower() takes them: of the patch embedding, of each block."""
    quick = isinstance(visual.transformer.resblocks[0].mlp.gelu, open_clip.transformer.QuickGELU)
    scale = 1.702 if quick else 1.0  # x sigmoid(1.702 x) = silu(1.702 x) / 1.702
    kernel = visual.conv1.weight / std  # (W, 3, P, P)
    blocks = []
    for block in visual.transformer.resblocks:
        attention, first, last = block.attn, block.mlp.c_fc, block.mlp.c_proj
        products = attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight, attention.out_proj.bias
        products += first.weight * scale, first.bias * scale, last.weight / scale, last.bias
        norms = block.ln_1.weight, block.ln_1.bias, block.ln_2.weight, block.ln_2.bias
        blocks.append((*norms, *(tensor.to(dtype) for tensor in products)))
    return (kernel.flatten(1), -(kernel * mean).sum((1, 2, 3))), blocks


def run_tower(visual, weights, held):
    """Return the function of fast_tower() with weights from tower_weights()."""
    patch, block = visual.patch_size[0], visual.transformer.resblocks[0]
    quick = isinstance(block.mlp.gelu, open_clip.transformer.QuickGELU)
    settings = block.attn.num_heads, block.ln_1.eps, F.silu if quick else F.gelu
    embedding, blocks = weights
    if held:
        embedding = [tensor.detach() for tensor in embedding]
        blocks = [tuple(tensor.detach() for tensor in tensors) for tensors in blocks]

    def encode(images):
        x = images.unfold(2, patch, patch).unfold(3, patch, patch)  # (B, 3, h, w, P, P)
        x = F.linear(x.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2), *embedding)  # (B, hw, W)
        x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1) + visual.positional_embedding
        x = visual.ln_pre(x)
        again = visual.transformer.grad_checkpointing and torch.is_grad_enabled()
        for i, tensors in enumerate(blocks):
            inputs = x, tensors, *settings, i == len(blocks) - 1
            x = checkpoint(tower_block, *inputs, use_reentrant=False) if again else tower_block(*inputs)
        return F.normalize(visual.ln_post(x[:, 0]) @ visual.proj, dim=-1)

    return encode


def tower_block(x, weights, heads, eps, activation, last):
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
WEIGHTS += ["model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth"]
DELTA_CLIP_TOKENIZER = {  # Delta-CLIP (arXiv:2501.09446) has a tokenizer of its own; this one gives the same ids
    "hf_tokenizer_name": "google-bert/bert-base-uncased",
    "tokenizer_mode": "clips",
    "tokenizer_kwargs": {"bos_token": "[unused0]", "eos_token": "[unused1]"},
}


@lru_cache
def model_folder(name):
    """Return the folder of a local-dir: or hf-hub: model.

    From a hub the configuration, the tokenizer and one file of weights are downloaded; the folder is named by the
    commit.
    """
    if name.startswith("local-dir:"):
        return Path(name.removeprefix("local-dir:"))
    repo = name.removeprefix("hf-hub:")
    folder = Path(huggingface_hub.snapshot_download(repo, allow_patterns=["*.json", "*.txt", "*.model"]))
    for file in WEIGHTS:
        try:
            huggingface_hub.hf_hub_download(repo, file, revision=folder.name)
            break
        except huggingface_hub.errors.LocalEntryNotFoundError as error:  # the hub is out of reach
            unreachable = error
        except huggingface_hub.errors.EntryNotFoundError:
            unreachable = None
    if not any((folder / file).is_file() for file in WEIGHTS) and unreachable:
        raise unreachable
    return folder


def model_checksums(name, pretrained="", flag="--model"):
    """Return what identifies a model beside its name: {file: sha256}, or for the hub {name: commit}.

    flag   the flag that the name comes from, for messages
    """
    files = [pretrained] if is_file(pretrained) else []
    with exit_on_error(f"cannot load {flag} {name}"):
        if name.startswith("hf-hub:"):
            return {name: model_folder(name).name} | file_checksums(files)
        if name.startswith("local-dir:"):
            folder = model_folder(name)
            configs = ["open_clip_config.json", "config.json", "preprocessor_config.json", "processor_config.json"]
            configs += ["tokenizer.json", "tokenizer_config.json", "vocab.txt"]
            files += [folder / file for file in configs if (folder / file).is_file()]
            files += [] if pretrained else [weights_file(folder)]
        return file_checksums(files)


def source_checksums(source):
    """Return model_checksums() of a row of evaluate.py, from local-dir:, hf-hub: or a file of weights."""
    if source.startswith(SCHEMAS):
        return model_checksums(source, flag="--checkpoint")
    with exit_on_error(f"cannot load --checkpoint {source}"):
        return file_checksums([source])


def file_checksums(files):
    """Return {file: sha256} of files, or {FILE::PLACE: sha256::PLACE}."""
    checksums = {}
    for text in files:
        file, place = split_place(str(text))
        mark, about = "" if place is None else f"::{place}", os.stat(file)
        checksums[relative_paths(f"{Path(file)}{mark}")] = checksum(file, about.st_size, about.st_mtime_ns) + mark
    return checksums


def split_place(text):
    """Split FILE::PLACE, PLACE one of the sets of weights in the file; of FILE alone the place is None."""
    file, mark, place = text.partition("::")
    return (file, place) if mark else (text, None)


def is_file(text):
    """Return whether FILE or FILE::PLACE is there."""
    return os.path.isfile(split_place(text)[0])


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
    raise FileNotFoundError(f"{folder} has neither open_clip_config.json nor transformers' config.json")


def is_transformers(folder):
    """Return whether a model's folder is in the format of the transformers library."""
    return not (folder / "open_clip_config.json").is_file() and (folder / "config.json").is_file()


def config_from_transformers(folder):
    """Translate the configuration of a transformers CLIPModel into open_clip's."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != "clip":
        raise ValueError(f"its config.json is of a {config.get('model_type')!r} model, and only 'clip' can be read")
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


def preprocessing_from_transformers(folder, image_size):
    """Translate the preprocessing of a transformers CLIPProcessor into open_clip's; what open_clip lacks is refused."""

    def read(name):
        return json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).is_file() else {}

    # the first is of transformers 5, which prefers it, too; the second of earlier versions
    theirs = read("processor_config.json").get("image_processor") or read("preprocessor_config.json")
    theirs = {name: value for name, value in theirs.items() if value is not None}
    size, crop = theirs.get("size", image_size), image_size
    size = size if isinstance(size, dict) else {"shortest_edge": size}
    if theirs.get("do_center_crop", True):
        crop = theirs.get("crop_size", image_size)
    squash = size.keys() == {"height", "width"}
    sizes = {*size.values(), *(crop.values() if isinstance(crop, dict) else [crop])}
    if sizes != {image_size} or not (squash or size.keys() == {"shortest_edge"}):
        raise ValueError(f"its images are resized to {size}, cut to {crop}, and its model takes {image_size} pixels")
    needed = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_pad": False}
    needed |= {} if squash else {"do_center_crop": True}
    for name, value in needed.items():
        if theirs.get(name, value) != value:
            raise ValueError(f"its images are processed with {name} {theirs[name]}, which open_clip cannot do")
    filters = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
    if theirs.get("resample", 3) not in filters:
        raise ValueError(f"its images are resized by a filter that open_clip lacks, resample {theirs['resample']}")
    preprocess_cfg = {"interpolation": filters[theirs.get("resample", 3)]}
    preprocess_cfg["resize_mode"] = "squash" if squash else "shortest"
    names = {"image_mean": "mean", "image_std": "std"}
    preprocess_cfg |= {ours: theirs[name] for name, ours in names.items() if name in theirs}
    if not theirs.get("do_normalize", True):
        preprocess_cfg |= {"mean": [0.0] * 3, "std": [1.0] * 3}
    return preprocess_cfg


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


def save_model(folder, clip, train_ids):
    """Write a model that open_clip opens as local-dir:FOLDER. If its configuration, written last, exists, all is there.

    train_ids   COCO ids that it was trained on, stored in the metadata of the weights
    """
    config = folder / "open_clip_config.json"
    config.unlink(missing_ok=True)
    weights = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in clip.model.state_dict().items()}
    metadata = {"train_ids": json.dumps(sorted(train_ids))}  # one key: several would be written in a random order
    save(folder / "open_clip_model.safetensors", (weights, metadata))
    if hasattr(clip.tokenizer, "save_pretrained"):  # open_clip looks for a tokenizer of Hugging Face in the folder
        clip.tokenizer.save_pretrained(folder)
    save(config, clip.config)


def shared_preprocessing(name):
    """Return the preprocess_cfg that all published weights of an open_clip architecture have in common, or None."""
    found = []
    for tag in open_clip.list_pretrained_tags_by_model(name):
        published = open_clip.get_pretrained_cfg(name, tag)
        found.append({key: published[key] for key in ("mean", "std", "interpolation", "resize_mode")})
    return found[0] if found and all(one == found[0] for one in found) else None


def load_clip(args, source=None):
    """Load the CLIP of --model and --pretrained, or another one.

    source   local-dir:DIR, hf-hub:ORG/NAME, or a file of weights for --model, FILE or FILE::PLACE: of a whole model, or
             of a visual tower alone, in which case the text tower of --pretrained stays
    """
    name, pretrained = args.model, args.pretrained
    if source and source.startswith(SCHEMAS):
        name, pretrained, source = source, "", None
    torch.manual_seed(args.seed)  # so that --pretrained random gives every script the same weights
    names = f"--model {name} --pretrained {pretrained!r}"
    with exit_on_error(f"cannot load {names}; open_clip.list_pretrained() lists both"):
        if "/" in pretrained:
            os.stat(split_place(pretrained)[0])  # its error says why there is no such file
        make = model_from_folder if name.startswith(SCHEMAS) else model_by_name
        model, model_cfg, tokenizer, weights = make(name, pretrained)
    train_ids, notes = set(), []
    for file, tower_alone in ((weights, False), (source, True)):
        if file:
            with exit_on_error(f"cannot use {file}"):
                ids, unused = load_weights(model, str(file), tower_alone)
            train_ids |= ids
            if unused:
                notes.append(f"{unused} in the file of its weights is not used")
                print(f"note: {file}: {unused} is not used")
    with exit_on_error(f"cannot use {source or weights or pretrained} for {name}"):
        device = pick_device(args.device)
        clip = Clip(model, name, model_cfg, tokenizer, device, args.precision, args.batch_size, train_ids)
    clip.notes = notes
    return clip


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
        tokenizer = open_clip.SimpleTokenizer(**options)
    weights = pretrained if is_file(pretrained) else None if pretrained else weights_file(folder)
    return model, config["model_cfg"], tokenizer, weights


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

    file          FILE or FILE::PLACE: .safetensors, or written by torch.save. The tensors may stand in dictionaries of
                  any depth, under any prefix, which together are their place; PLACE chooses between different ones
    tower_alone   whether a visual tower without a text tower is enough
    returns       the COCO ids that it was trained on; the name of the first tensor that is left out, or None
    """
    path, chosen = split_place(file)
    saved, train_ids = read_tensors(path)
    tensors = rename_from_transformers(flatten(saved))
    if not tensors:
        raise ValueError("it holds no tensors")
    if any(".lora_" in name for name in tensors):
        raise ValueError("it holds factors of LoRA: merge them into the weights first")
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
    with open(file, "rb") as opened:
        start = opened.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise ValueError("it is a Git LFS pointer, not the weights: git lfs pull")
    if start[8:9] == b"{":  # safetensors: after the length of a header in JSON
        with safetensors.safe_open(file, "pt") as opened:
            train_ids = json.loads((opened.metadata() or {}).get("train_ids", "[]"))
            return {key: opened.get_tensor(key) for key in opened.keys()}, {int(i) for i in train_ids}  # noqa: SIM118
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
    return saved, {int(i) for i in saved.get("train_ids", ())}


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


class TrainingImages:
    """Images of a training by their indices: float32 (B, 3, H, W) in [0, 1] on the device.

    pixels   uint8 (N, 3, H, W), numpy or a column of examples; kept on a GPU where they take at most a quarter of its
             free memory, else each batch is copied there. The host does not wait for the GPU either way.
    """

    def __init__(self, pixels, device):
        self.pixels, self.device = pixels, device
        if device.type == "cuda" and len(pixels) * pixels[0].nbytes < torch.cuda.mem_get_info(device)[0] / 4:
            self.pixels = torch.from_numpy(np.array(pixels[:])).to(device)

    def __getitem__(self, indices):
        if isinstance(self.pixels, torch.Tensor):
            return take(self.pixels, indices).float() / 255
        return to_device(torch.from_numpy(np.array(self.pixels[indices])), self.device).float() / 255


def to_device(tensor, device):
    """Copy a tensor from the CPU to a device; the host does not wait for a GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def take(rows, indices):
    """Return rows[indices] of a tensor, on its device; indices are a numpy array."""
    return rows[to_device(torch.from_numpy(indices), rows.device)]


def is_own(source):
    """Return whether a data set is not MMEB: a folder in the ImageFolder format, or COCO's captions_*.json."""
    return source.endswith(".json") or any(os.path.isfile(os.path.join(source, name)) for name in METADATA)


def load_rows(args, split, count=None):
    """Return the first images of a split as a datasets.Dataset with these columns:

    path      of the image, as the data set names it
    name      of the file of its adversarial image
    coco_id   None for an image that is not known to be COCO's
    captions  of the image; caption is the first of them, which is attacked
    texts     the captions to retrieve from with --candidates mmeb
    checksum  of path, captions and the content of the image file, which is not decoded; on a hub the commit stands for
              the content

    count   how many images, by default --num_images, which is set to their number if it was not given
    """
    source, folder = getattr(args, f"{split}_data"), image_folder(args, split)
    rows, commit = read_rows(args, split)
    if count is None:
        args.num_images = count = args.num_images or len(rows)
    with exit_on_error(f"--{split}_data {source}"):
        if len(rows) < count:
            kind = "train2014 images" if split == "train" and not is_own(source) else "images"
            raise ValueError(f"it has {len(rows)} distinct {kind}, and {count} are needed: lower --num_images")
        rows = rows.select(range(count))
        if os.path.isdir(folder):
            found = find_images(folder, rows["path"][:], args.skip_bad_images)
            contents = [content_checksum(*found[path]) if path in found else "missing" for path in rows["path"]]
        else:
            contents = [commit] * count
        checksums = [digest(row) for row in zip(rows["path"], rows["captions"], contents)]
        return rows.add_column("checksum", checksums)


def load_training_rows(args):
    """Return --num_images training images and then --val_images for validation; of own pictures by default a tenth."""
    if args.num_images is None or args.val_images is None:
        count = len(read_rows(args, "train")[0])
        args.val_images = args.val_images or min(PRESETS["val_images"][args.preset], max(1, count // 10))
        args.num_images = args.num_images or max(1, count - args.val_images)
    return load_rows(args, "train", args.num_images + args.val_images)


def known_ids(examples):
    """Return the COCO ids of the images that have one."""
    return [coco_id for coco_id in examples["coco_id"] if coco_id is not None]


def image_folder(args, split):
    """Return the folder of a split's images: --image_root, the folder of a captions_*.json, or the data set itself."""
    source = getattr(args, f"{split}_data")
    folder = os.path.dirname(source) or "." if source.endswith(".json") else source
    roots = image_roots(args)
    given = [root for its, root in roots if its == split] or [root for its, root in roots if its is None] or [folder]
    if len(given) > 1:
        fail(f"--image_root {' '.join(given)}: give one folder, or one for each split: train=DIR eval=DIR")
    return given[0]


def image_roots(args):
    """Return the folders of --image_root: [(split or None for both, folder)]."""
    roots = []
    for root in args.image_root or ():
        split, equals, folder = root.partition("=")
        split, folder = (split, folder) if equals and split in SPLITS else (None, root)
        if not os.path.isdir(folder):
            fail(f"--image_root {root} is not a folder")
        roots.append((split, folder))
    return roots


def content_checksum(files, name):
    """Return a checksum of an image file in a folder, or in a zip, whose directory has one."""
    if isinstance(files, zipfile.ZipFile):
        member = files.getinfo(name)
        return f"{member.CRC:08x} {member.file_size}"
    checksum, size = 0, 0
    with files.open(name) as file:
        while block := file.read(2**20):
            checksum, size = zlib.crc32(block, checksum), size + len(block)
    return f"{checksum:08x} {size}"


def read_rows(args, split):
    """Return all distinct images of a split, as in load_rows(), and the commit of a hub's data set or None."""
    source = getattr(args, f"{split}_data")
    with exit_on_error(f"--{split}_data {source}"):
        if source.endswith(".json"):
            rows, commit = read_coco(source), None
        elif is_own(source):
            rows, commit = read_imagefolder(source), None
        else:
            rows, commit = read_mmeb(source, split)
        kept = {}  # the first row of each image
        for where, path, coco_id, captions, texts in rows:
            if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
                raise ValueError(f"{where} has an empty caption, or one that is no text")
            captions, texts = ([text.strip() for text in part] for part in (captions, texts))
            row = {"path": path, "coco_id": coco_id, "captions": captions, "texts": texts, "caption": captions[0]}
            kept.setdefault(path if is_own(source) else coco_id, row)
        if not kept:
            raise ValueError("it has no image with a caption")
        times = Counter(row["coco_id"] for row in kept.values())
        for position, row in enumerate(kept.values()):
            own_id = row["coco_id"] is not None and times[row["coco_id"]] == 1
            row["name"] = f"{row['coco_id']:012d}" if own_id else f"{position:06d}"
        kinds = {"path": "string", "name": "string", "coco_id": "int64", "caption": "string"}
        kinds = {key: datasets.Value(kind) for key, kind in kinds.items()}
        kinds |= {key: datasets.List(datasets.Value("string")) for key in ("captions", "texts")}
        columns = {key: [row[key] for row in kept.values()] for key in kinds}
        return datasets.Dataset.from_dict(columns, datasets.Features(kinds)), commit


def read_mmeb(source, split):
    """Read MMEB's rows from the hub or a local copy of any part of it: [(where, path, coco_id, captions, texts)]."""
    name, path_column, text_column, wanted = SPLITS[split]
    columns, commit = [path_column, text_column], None
    if os.path.isdir(source):
        tables = [pq.read_table(file, columns=columns) for file in mmeb_files(source, name, columns)]
    elif os.path.exists(source) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        raise ValueError("it is neither a local folder nor a hub id such as TIGER-Lab/MMEB-train")
    else:
        table = datasets.load_dataset(source, CONFIG, split=name, verification_mode="no_checks")  # of a stale row count
        commit = re.search(r"@([0-9a-f]{40})/", " ".join(table.info.download_checksums or ()))
        # arrow's format does not decode images, whatever the data set declares a column to be
        tables = [table.select_columns(columns).with_format("arrow")[:]]
    rows = []
    for table in tables:
        for path, texts in zip(*(table[column].to_pylist() for column in columns)):
            where = f"row {len(rows)}"
            match = re.search(r"(?:^|/)(COCO_(?:train|val)2014_)([0-9]{1,12})\.jpe?g\Z", str(path))
            if not match:
                raise ValueError(f"{where}: {path_column} {str(path)[:99]!r} is not the path of a COCO 2014 image")
            texts = [texts] if isinstance(texts, str) else texts
            rows.append((f"{where}: {text_column}", path, int(match[2]), (texts or [])[:1], texts, match[1]))
    return [row[:-1] for row in rows if row[-1].startswith(wanted)], commit and commit[1]


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


def read_coco(file):
    """Read the rows of COCO's captions_*.json, in the order of its images; its ids count for nothing else."""
    data = json.loads(Path(file).read_text(encoding="utf-8"))
    paths = {}
    for image in data["images"]:
        path = os.path.normpath(image["file_name"])
        if paths.setdefault(str(image["id"]), path) != path:
            raise ValueError(f"two of its images have the id {image['id']}: a caption may be of either")
    captions = {path: [] for path in paths.values()}
    for annotation in data["annotations"]:
        if path := paths.get(str(annotation["image_id"])):
            captions[path].append(annotation["caption"])
    return [(repr(path[:99]), path, coco_id_of(path), texts, texts) for path, texts in captions.items() if texts]


def load_examples(args, split, rows, geometry):
    """Decode the images of rows: a datasets.Dataset with their columns and pixels, uint8 (3, H, W).

    geometry   of a Clip; the images are decoded once for each geometry, into a memory-mapped file in --cache_dir
    """
    source = getattr(args, f"{split}_data")
    with exit_on_error(f"--{split}_data {source}"):
        key = digest([rows.to_dict(), geometry, args.skip_bad_images])
        cache = Path(args.cache_dir, f"{key}.arrow").absolute()
        if RANK:
            gather()  # rank 0 decodes, and the others wait
        examples = None
        with suppress(ValueError, OSError):  # the file is missing or damaged
            examples = datasets.Dataset.from_file(str(cache))
        if examples is None or (len(examples) < len(rows) and not args.skip_bad_images):  # the file is cut
            examples = decode_rows(image_folder(args, split), rows, geometry, args.skip_bad_images, cache)
        if not RANK:
            gather()
        if len(examples) == 0:
            cache.unlink(missing_ok=True)  # so that the next run names the broken images again
            raise ValueError("none of the images could be decoded")
        if len(examples) < len(rows):
            print(f"--{split}_data {source}: {len(rows) - len(examples)} broken or missing images are left out")
        return examples.with_format("numpy", columns=["pixels"], output_all_columns=True, dtype=np.uint8)


def decode_rows(folder, rows, geometry, skip_bad_images, cache):
    """Decode the images of rows into the file cache and return them; exit at a broken image, or leave it out."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    need = 1.1 * len(rows) * 3 * math.prod(geometry["size"])
    if shutil.disk_usage(cache.parent).free < need:
        fail(f"--cache_dir {cache.parent} needs {need / 1e9:.2f} GB for decoded images: free some space first")
    found, transform = find_images(folder, rows["path"][:], skip_bad_images), to_geometry(geometry)
    kinds = datasets.Features(rows.features | {"pixels": datasets.Array3D((3, *geometry["size"]), "uint8")})

    def decode(path):
        try:
            if path not in found:
                raise ValueError("it is missing")
            files, name = found[path]
            with files.open(name) as file:
                data = read_bytes(file)
            return transform(read_image(data))
        except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, ValueError) as error:
            message = f"broken image {path} ({describe(error)})"
            if not skip_bad_images:
                raise ValueError(f"{message}; --skip_bad_images leaves such images out") from None
            print(f"{message}: left out")

    def decode_batch(batch):
        columns = {**batch, "pixels": [decode(path) for path in batch["path"]]}
        sound = [i for i, pixels in enumerate(columns["pixels"]) if pixels is not None]
        return {name: [values[i] for i in sound] for name, values in columns.items()}

    options = {"batched": True, "batch_size": 64, "features": kinds, "new_fingerprint": cache.stem}
    options["load_from_cache_file"] = False  # a file there is damaged
    return rows.map(decode_batch, **options, cache_file_name=str(cache), desc="decode")


def to_geometry(geometry):
    """Return open_clip's own preprocessing up to the pixels: PIL image -> uint8 (3, H, W)."""
    resize = image_transform_v2(PreprocessCfg(**geometry), is_train=False)
    del resize.transforms[-2:]  # the conversion to float and the normalisation
    return lambda image: np.asarray(resize(image)).transpose(2, 0, 1)


def read_bytes(file):
    """Read an opened image file as a whole; ValueError if it is more than its pixels can take, as a zip bomb is."""
    data = file.read(20_000_000)
    if more := file.read(1):
        webp = data[8:12] == b"WEBP"  # which Pillow opens as a whole only
        limit = 200_000_000 if webp else 8 * math.prod(open_image(data, FORMATS).size)
        data += more + file.read(limit)
        if file.read(1):
            raise ValueError(f"more than {len(data) / 1e6:.0f} MB")
    return data


def open_image(data, formats):
    """Open the bytes of an image file, or the first of them, as a PIL image that is not decoded yet."""
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
        width, height = image.size
        if width * height > LARGEST_IMAGE or max(width, height) > 500 * min(width, height):
            raise ValueError(f"{width} x {height} pixels")
        if image.mode[0] in "IF":
            raise ValueError(f"more than 8 bits a channel (mode {image.mode})")
        return image
    except Exception as error:  # a damaged file raises any exception
        raise ValueError(describe(error)) from None


def read_image(data, formats=FORMATS):
    """Decode the bytes of an image file to a PIL image, RGB; ValueError if it is no image of 8 bits a channel."""
    image = open_image(data, formats)
    try:
        ImageOps.exif_transpose(image, in_place=True)  # phones store photographs rotated
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # a damaged file raises any exception
        raise ValueError(describe(error)) from None


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
            looked_into.append(archive)
        except zipfile.BadZipFile as error:  # it may be none that is needed
            looked_into.append(f"{archive} ({describe(error)})")
    for path, nearest in match_files(elsewhere, files).items():
        if len(nearest) > 1 and len({content_checksum(*files[name]) for name in nearest}) > 1:
            advice, choices = "give a folder with the right one alone by --image_root", " or ".join(nearest[:3])
            raise ValueError(f"images of one name differ; {advice}: {path} may be {choices}")
        found[path] = files[nearest[0]]
    missing = [path[-60:] for path in paths if path not in found]
    if missing and not (skip_missing and found):
        advice = "--skip_bad_images leaves them out" if found else "--image_root gives their folder"
        first, places = ", ".join(missing[:5]), ", ".join(looked_into[:5])
        raise ValueError(f"{len(missing)} of {len(paths)} images are missing; {advice}: {first} (looked into {places})")
    return found


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


def load_training_sets(args, rows, geometry):
    """Decode rows into --num_images training images and the validation images after them.

    Exit if one of them is an evaluation image: by its COCO id, compared with the whole evaluation split, or by its
    pixels, compared with the images of the preset's table.
    """
    training = load_examples(args, "train", rows.select(range(args.num_images)), geometry)
    validation = load_examples(args, "train", rows.select(range(args.num_images, len(rows))), geometry)
    if not args.eval_data:
        print("no --eval_data was given: whether evaluation images are trained on is not checked")
        return training, validation
    evaluated, _ = read_rows(args, "eval")
    both = datasets.concatenate_datasets([training, validation])
    if shared := {*both["coco_id"]} & {*evaluated["coco_id"]} - {None}:
        leaked = f"{len(shared)} images of --eval_data {args.eval_data}"
        fail(f"leakage: {leaked} are trained on, such as COCO id {min(shared)}")
    count = len(evaluated)
    if not is_own(args.eval_data):
        count = min(count, PRESETS["eval_images"][args.preset])
    used = load_examples(args, "eval", load_rows(args, "eval", count), geometry)
    path_of = {row["pixels"].tobytes(): row["path"] for row in used}
    for row in both:
        if path := path_of.get(row["pixels"].tobytes()):
            fail(f"leakage: training image {row['path']} has the same pixels as evaluation image {path}")
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


def white_box(eps, steps, through_jpeg=False):
    """Return the attack of the white-box columns."""
    # first step, in radii, and momentum: chosen on training images, of the tiny CLIP and of a real ViT-B/16 tower
    first, momentum = (2, 0.5) if through_jpeg else (1, 0.75)
    return Attack(eps, first * eps, steps, seed=None, momentum=momentum)


def pgd(loss_fn, images, attack, start=None, check_range=True):
    """Search the L-inf ball around images for the pixels that maximise loss_fn.

    images    (B, 3, H, W) float32 in [0, 1], before CLIP's normalisation
    loss_fn   maps such a batch to (B,) losses, one per image, higher = worse for the model
    start     where to begin, like images; it is moved into the ball. None begins at images
    check_range   check that the pixels lie in [0, 1], for which the host waits for the device
    returns   like images, for each the iterate of the highest loss; {what went wrong: in which images, (B,) bool}

    PGD of Madry et al. 2018 (arXiv:1706.06083), except that the best iterate is kept, not the last. With momentum it is
    MI-FGSM of Dong et al. 2018 (arXiv:1710.06081, equations 6 and 7), except that the gradient is divided by its mean
    absolute value, which changes no sign, and that steps shrink by a half cosine from alpha to 3 % of it.

    A loss or gradient that is not finite changes nothing and is reported, as is a gradient that is zero in every
    pixel, so that neither passes for robustness. Pixels outside [0, 1] raise ValueError. No parameter's .grad is
    changed. The caller chooses the model's mode.
    """
    if check_range and (images.min() < 0 or images.max() > 1):
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
    return best, {"images_with_zero_gradients": zero, "images_with_nonfinite_values": nonfinite}


def start_noise(images, eps, seed, indices):
    """Add uniform noise in [-eps, eps] to images, each by its own (seed, index), so that no batch size matters."""
    noise = torch.empty(images.shape)
    for row, index in zip(noise, indices):
        row.uniform_(-1, 1, generator=torch.Generator().manual_seed(seed * 1_000_003 + index))
    return images + eps * noise.to(images.device)


def grey_levels(eps):
    """Return the largest whole number of grey levels inside a radius on the [0, 1] scale."""
    return math.floor(eps * 255 + 1e-6)


def to_pixels(images, pixels, eps):
    """Round images in [0, 1] to uint8 without leaving the ball around pixels: uint8 (B, 3, H, W) on the CPU."""
    pixels = torch.tensor(np.asarray(pixels), device=images.device).int()
    delta = ((images * 255).round().int() - pixels).clamp(-grey_levels(eps), grey_levels(eps))
    return (pixels + delta).clamp(0, 255).byte().cpu()


def attack_images(attack, loss, pixels, clip, start=None, run=None, what="attack", first=0, keys="", precision=None):
    """Attack every image, a batch at a time; under torchrun this process's share: rank 0 has the first images.

    loss        (encode_image, slice of the images) -> loss_fn of them for pgd(), such as partial(own_caption, ...)
    pixels      uint8 (N, 3, H, W), or a column of examples
    start       like pixels: where the attack begins, by default at the images; attack.seed adds noise
    run         stores each batch under (what, attack, its pixels and keys): one that a killed run has stored is not
                attacked again
    first       index of the first image to attack
    keys        what else a result depends on: a list, one text an image, or one text for all
    precision   bf16, tf32 or fp32, of the gradients; by default that of the model
    yields      (slice, pixels_adv uint8 (B, 3, H, W) on the CPU, {possible problem of the attack: number of images})

    Where the memory of a GPU is full, the batch is halved: no image depends on the others of its batch.
    """
    precision = precision or ("bf16" if clip.bf16 else "fp32")
    phases = attack_phases(attack, precision)
    clip.batch_size = min(gather(clip.batch_size))  # one process may have halved its own
    size = max(1, min(clip.batch_size, math.ceil((len(pixels) - first) / PROCESSES)))  # so that all have work
    starts = np.array_split(np.arange(first, len(pixels), size), PROCESSES)[RANK].tolist()
    total = min(len(starts) * size, len(pixels) - first) * sum(phase.steps + 1 for _, phase in phases)

    def attack_slice(here, clean, begin):
        """Attack the images of a slice: pixels_adv, health."""
        images, x = as_images(clean, clip.device), as_images(begin, clip.device)
        if attack.seed is not None:
            x = start_noise(x, attack.eps, attack.seed, range(here.start, here.stop))
        wrong = []
        for phase_precision, phase in phases:
            loss_fn = loss(clip.attack_encoder(phase_precision == "bf16"), here)
            with tf32(phase_precision == "tf32"):
                x, wrong_now = pgd(partial(counted, loss_fn), images, phase, x)
            wrong.append(wrong_now)
        pixels_adv = to_pixels(x, clean, attack.eps)
        linf = linf_grey_levels(clean, pixels_adv)
        health = {"max_abs_delta_grey_levels": int(linf.max()), "images_unmoved": int((linf == 0).sum())}
        return pixels_adv, health | {key: int(sum(each[key] for each in wrong).bool().sum()) for key in wrong[0]}

    with progress(what=what, total=total, unit="image-step") as bar:

        def counted(loss_fn, images):  # the bar moves within a batch
            bar.update(len(images))
            clip.image_steps += len(images)
            return loss_fn(images)

        for at in starts:
            batch = slice(at, min(at + size, len(pixels)))
            clean, begin = (np.asarray(x[batch]) for x in (pixels, pixels if start is None else start))
            own_keys = keys if isinstance(keys, str) else keys[batch]
            content = hashlib.sha256(clean.tobytes() + begin.tobytes()).hexdigest()
            key = [what, own_keys, asdict(attack), precision, at, content]
            done = run and run.load_part(key)
            if not done:
                clock, parts, here = time.perf_counter(), [], batch.start
                while here < batch.stop:
                    part = slice(here, min(here + clip.batch_size, batch.stop))
                    inside = slice(part.start - at, part.stop - at)
                    try:
                        parts.append(attack_slice(part, clean[inside], begin[inside]))
                        here = part.stop
                    except torch.OutOfMemoryError:
                        if part.stop - part.start == 1:
                            raise
                    if here < part.stop:  # outside the except block, which keeps the batch's tensors alive
                        halve_batch(clip, part.stop - part.start)
                clip.attack_seconds += time.perf_counter() - clock
                done = {"pixels": torch.cat([found for found, _ in parts])}
                done["health"] = sum_health([health for _, health in parts])
                if run:
                    run.save_part(key, done)
            yield batch, done["pixels"], done["health"]


def halve_batch(clip, size):
    """Halve a model's batches after one of size images has filled the memory."""
    clip.batch_size = max(1, size // 2)
    torch.cuda.empty_cache()
    print(f"the GPU's memory is full: going on with batches of {clip.batch_size}", flush=True)


def attack_phases(attack, precision):
    """Return how an attack is spent, [(precision, Attack)].

    In bf16 the first 80 % of the steps; the rest starts from the best images so far, in TF32 where there is such a GPU,
    else in fp32. With momentum its steps begin at a quarter of eps.
    """
    last = attack.steps // 5
    if precision != "bf16" or last == 0:
        return [(precision, attack)]
    rest = replace(attack, steps=last, alpha=attack.eps / 4 if attack.momentum else attack.alpha)
    return [("bf16", replace(attack, steps=attack.steps - last)), ("tf32", rest)]


@contextmanager
def tf32(enabled=True):
    """Allow TF32 products on a GPU that has them: for gradients and metadata, never for the scores of a table."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, enabled or matmul.allow_tf32
    try:
        yield
    finally:
        matmul.allow_tf32 = before


TOLERANCE = 0.005  # two attacks are equally strong if their mean losses on the same images differ by at most this
COMPARED_IMAGES = 16


def accept_precision(attack, loss, pixels, clip, start=None, what="attack"):
    """Accept bf16, or else TF32, for an attack by its outcome: on a few images it must end as low as in fp32.

    attack, loss, pixels, start   of attack_images(); the losses of the rounded images are compared, in fp32
    returns                       bf16, tf32 or fp32, for attack_images(); {precision, images, weaker_by}, the latter
                                  {precision: by how much the mean loss of its attack is lower than in fp32}
    """
    if not clip.bf16:
        return "fp32", {"precision": "fp32"}
    few, begin = (None if x is None else x[:COMPARED_IMAGES] for x in (pixels, start))

    def mean_loss(precision):
        options = {"what": f"{what}: {precision} compared", "precision": precision}
        found, _ = attack_all(attack, loss, few, clip, begin, **options)
        with torch.no_grad():
            loss_fn = loss(clip.attack_encoder(bf16=False), slice(0, len(few)))
            return gather(loss_fn(as_images(found, clip.device)).mean().item())[0]  # rank 0's decides for all

    exact, weaker_by = mean_loss("fp32"), {}
    for precision in ("bf16", "tf32") if clip.device.type == "cuda" else ("bf16",):
        weaker_by[precision] = exact - mean_loss(precision)
        if weaker_by[precision] <= TOLERANCE:
            return precision, {"precision": precision, "images": len(few), "weaker_by": weaker_by}
        weaker = f"by {weaker_by[precision]:.3f} on {len(few)} images"
        message = f"{clip.name}: the {precision} attack is weaker than the fp32 one {weaker}"
        if clip.precision == "bf16":
            fail(f"{message}: use --precision fp32 or auto")
        print(f"{message}: going on without it", flush=True)
    return "fp32", {"precision": "fp32", "images": len(few), "weaker_by": weaker_by}


def attack_all(*args, **options):
    """attack_images(), collected from all processes: pixels_adv uint8 (N, 3, H, W) and its health."""
    parts = [part for share in gather(list(attack_images(*args, **options))) for part in share]
    return torch.cat([pixels for _, pixels, _ in parts]), sum_health([health for *_, health in parts])


def own_caption(text_features, encode_image, here=slice(None)):
    """Return the report's loss of the images of a slice: minus the cosine with the own caption, row i of (N, D)."""
    return lambda images: -(encode_image(images) * text_features[here]).sum(-1)


def sum_health(parts):
    """Combine the health of several batches."""
    return {key: (max if key.startswith("max") else sum)(part[key] for part in parts) for key in parts[0]}


def linf_grey_levels(pixels, pixels_adv):
    """Return the largest difference of each image, uint8 (..., 3, H, W) both: (...) whole grey levels."""
    return np.abs(np.asarray(pixels, np.int16) - np.asarray(pixels_adv, np.int16)).max((-3, -2, -1))


def adversarial_folder(args, split):
    """Return --adversarial_dir or its default, after generate_pgd_adversarial.py has made or extended the default."""
    folder = Path(args.adversarial_dir or stage_folder(args, f"adversarial_{split}"))
    words = ["--split", split, "--num_images", args.num_images]
    flags = SHARED if hasattr(args, "lr") else f"{SHARED} batch_size"  # a training's batch size is for the training
    command = command_of("generate_pgd_adversarial.py", args, f"adversarial_{split}", *words, flags=flags)
    record = load_record(folder / "metrics.json") if (folder / "metrics.json").exists() else None
    if record:
        flags = ["model", "pretrained", "eps", "alpha", "steps"]
        flags += [] if args.adversarial_dir else ["seed"]  # a training of another seed may share the images of one
        require_same(folder, args, *flags, command=command)
    if record and record["args"]["num_images"] >= args.num_images:
        return folder
    if args.adversarial_dir:
        what = f"has {record['n']} images" if record else "is no finished folder of generate_pgd_adversarial.py"
        fail(f"--adversarial_dir {folder} {what}, and {args.num_images} are needed. Leave it out to have them made")
    print(f"{folder} {'has too few images and is extended' if record else 'does not exist and is made'} first:")
    run_script(command)
    return folder


def require_same(folder, args, *flags, command):
    """Return the record of the run in folder; exit unless it has the values of these flags in args and its weights.

    command   the command that makes the folder as it should be; the run in it must be of the same script
    """
    record = load_record(folder / "metrics.json")
    weights = model_checksums(args.model, args.pretrained)
    scripts = [f"{key.removesuffix('.main')}.py" for key in record.get("code", ()) if key.endswith(".main")]
    changes = [f"{script}, not {command[0]}" for script in scripts if script != command[0]]
    changes += [other_input(key) for key, value in weights.items() if record["inputs"].get(key) != value]
    for flag in flags:
        was, now = record["args"].get(flag), relative_paths(getattr(args, flag))
        if was != now:
            changes.append(f"--{flag} {flag_text(flag, was)}, not {flag_text(flag, now)}")
    if changes:
        remedy = f"To make it again: {command_line(*command, '--overwrite')}"
        if Path(getattr(args, "adversarial_dir", None) or "") == folder:
            remedy = "Leave --adversarial_dir out to have the right images made"
        fail(f"{folder} was made {made_with(record, changes)}. {remedy}")
    return record


def read_entries(folder):
    """Read the metadata.jsonl of a folder of adversarial images: a list of dictionaries, in the images' order."""
    file = folder / "metadata.jsonl"
    with exit_on_error(f"{file} is damaged. {remake_command(folder)}"):
        entries = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return [{**entry, "sha256": str(entry["sha256"])} for entry in entries]


def adversarial_checksum(folder, rows):
    """Return {what: checksum} of a folder's adversarial images of these rows, for the identity of a run."""
    wanted = {*rows["checksum"]}
    found = [entry["sha256"] for entry in read_entries(folder) if entry.get("source") in wanted]
    return {"adversarial images": digest(found)}


def load_adversarial(folder, examples, args):
    """Load the adversarial images of examples from a folder of generate_pgd_adversarial.py: uint8 (N, 3, H, W).

    Exit if one of them is missing, altered, of another caption or size, or outside the ball.
    """
    remedy, images_adv = remake_command(folder), []
    with exit_on_error(f"{folder / 'metadata.jsonl'} is damaged. {remedy}"):
        checksums = {(entry.get("source"), entry["caption"]): entry["sha256"] for entry in read_entries(folder)}
    for row in progress(examples, "read", unit="image"):
        file = folder / image_file(row["name"])  # a path from the metadata file would not be safe to open
        with exit_on_error(f"{file} is not used. {remedy}"):
            data, clean = file.read_bytes(), row["pixels"]
            if hashlib.sha256(data).hexdigest() != checksums.get((row["checksum"], row["caption"])):
                raise ValueError("it was altered after it was made, or made for another caption")
            image_adv = np.asarray(read_image(data, ["PNG"])).transpose(2, 0, 1)
            if image_adv.shape != clean.shape or linf_grey_levels(image_adv, clean) > grey_levels(args.eps):
                raise ValueError(f"it is of another size than {row['path']}, or not in the ball around it")
            images_adv.append(image_adv)
    return np.stack(images_adv)


def image_file(name):
    """Return the file of an adversarial image; without COCO's val2014, which load_dataset would take for a split."""
    return f"images/{name}.png"


def print_cost(clip, pixels, captions, image_steps):
    """Print the work before the first batch, in image-steps (a forward and backward pass of an image), and its time."""
    while True:
        with suppress(torch.OutOfMemoryError):
            pixel_gradient(clip, pixels, captions)  # a warm-up
            break
        if clip.batch_size == 1:
            fail("the GPU's memory is too small for one image")
        halve_batch(clip, clip.batch_size)
    times, began = [], time.perf_counter()
    while len(times) < 3 and time.perf_counter() - began < 0.5 or not times:  # the least, on a busy machine
        clock = time.perf_counter()
        count = len(pixel_gradient(clip, pixels, captions))
        times.append(time.perf_counter() - clock)
    seconds = min(times) / count * image_steps / PROCESSES
    line = f"work: {image_steps:,} image-steps, about {duration(seconds)} on {PROCESSES} x {clip.device}"
    if clip.device.type == "cpu" and seconds > 1800:
        line += "; without a GPU, the smaller --preset tiny or smoke shows the same in minutes"
    print(line, flush=True)


def pixel_gradient(clip, pixels, captions):
    """Return the gradient of the cosine with the own caption for a first batch, on a CPU a small one: (B, 3 H W)."""
    count = min(clip.batch_size, 8 if clip.device.type == "cpu" else clip.batch_size)
    images, text_features = as_images(pixels[:count], clip.device).requires_grad_(), clip.encode_text(captions[:count])
    (grad,) = torch.autograd.grad(own_caption(text_features, clip.attack_encoder())(images).sum(), images)
    return grad.flatten(1).cpu()


def duration(seconds):
    """Return a time as the table shows it, '-' for None."""
    if seconds is None:
        return "-"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


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
    images of this process. The visual tower is trained; text tower and logit_scale are frozen. The result is the model
    after the last epoch; the validation figures are printed and decide nothing. Random draws depend on the seed and the
    step alone, so that a state saved every --save_every minutes is enough to resume to the same files. Under torchrun
    --batch_size is shared out, and each loss is over the features of all: any number of processes trains the same.

    The host does not wait for the GPU within a step: it reads the figures of a step after it has queued the next one,
    and --loss_threshold is compared with the losses up to the step before.
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
        self.log, self.queued = [], []  # figures of the steps: read, and still on the device
        self.epochs, self.stopped = [], None
        if state := run.load_part("state"):
            self.visual.load_state_dict(state["visual"])
            optimizer.load_state_dict(state["optimizer"])
            self.log, self.epochs = state["log"], state["epochs"]
        online_steps, steps = getattr(args, "online_steps", 0), self.last_step - len(self.log)
        work = steps * self.size * (3 + online_steps)  # a training step on two images takes about three image-steps
        work += math.ceil(steps / self.steps_per_epoch) * len(validation) * args.steps
        print_cost(clip, training[: self.size]["pixels"], captions, work)
        self.text_features = clip.encode_text(captions)  # (N, D)

        model, tower = (sum(p.numel() * 4 for p in module.parameters()) for module in (clip.model, self.visual))
        run.require_space(model + 2 * 3 * tower)  # a state has weights and two moments; the next one is written beside
        if not RANK:
            save(run.dir / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in self.log))

    def __iter__(self):
        self.saved = time.perf_counter()
        with progress(range(len(self.log), self.last_step), "train", unit="step") as self.bar:
            for step in self.bar:
                epoch, position = divmod(step, self.steps_per_epoch)
                order = np.random.default_rng([self.args.seed, epoch]).permutation(len(self.training))
                batch = order[position * self.size : (position + 1) * self.size]
                positions = np.pad(np.arange(len(batch)), (0, -len(batch) % PROCESSES), mode="edge")
                torch.manual_seed(step_seed(self.args.seed, step) + RANK)  # for a tower with patch dropout
                self.train_mode()
                self.clip.cast_weights()
                yield step, batch, np.array_split(positions, PROCESSES)[RANK]
                if self.stopped:
                    return

    def train_mode(self):
        """Put the visual tower into training mode, but for BatchNorm: its statistics would depend on the processes."""
        self.visual.train()
        for module in self.visual.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()

    def encode(self, images, images_changed, count):
        """Encode the batch's clean and its augmented or adversarial images in one forward pass: (count, D) each."""
        features = self.model(torch.cat([images, images_changed])).chunk(2)
        if PROCESSES > 1:  # the features of the other processes carry no gradient
            features = open_clip.loss.gather_features(*features, rank=RANK, world_size=PROCESSES)
        return [x[:count] for x in features]  # without the padding that made all processes' parts equal

    def end_step(self, **figures):
        """Queue the figures of a step, tensors, loss and grad_norm among them; validate after an epoch; save states."""
        args, step = self.args, len(self.log) + len(self.queued) + 1
        self.clip.weights = None  # of this step
        self.read_figures()  # of the step before
        if args.loss_threshold and len(self.log) >= args.loss_window:
            window = gather([entry["loss"] for entry in self.log[-args.loss_window :]])[0]  # all stop at the same step
            if np.mean(window) < args.loss_threshold:
                self.stopped = "loss_threshold"
        if step == self.last_step and not self.stopped:
            self.stopped = "max_steps" if self.last_step == args.max_steps else "epochs"
        self.queued.append({**figures, "lr": self.optimizer.param_groups[0]["lr"]})
        epoch_ends = self.stopped or step % self.steps_per_epoch == 0
        if epoch_ends:
            self.read_figures()
            self.end_epoch()
        if epoch_ends or time.perf_counter() - self.saved >= 60 * args.save_every:
            self.read_figures()
            if not RANK and not self.stopped:
                state = {"visual": self.visual.state_dict(), "optimizer": self.optimizer.state_dict()}
                self.run.save_part("state", state | {"log": self.log, "epochs": self.epochs})
            self.saved = time.perf_counter()

    def read_figures(self):
        """Move the queued figures to the log, for which the host waits until those steps are done."""
        for queued in self.queued:
            step, lr = len(self.log) + 1, queued.pop("lr")
            figures = {key: value.item() for key, value in queued.items()}
            if not math.isfinite(figures["loss"] + figures["grad_norm"]):
                fail(f"the loss of step {step} is not finite: {figures}. Start again with a lower --lr and --overwrite")
            epoch = math.ceil(step / self.steps_per_epoch)
            self.log.append({"step": step, "epoch": epoch, **figures, "lr": lr})
            self.bar.set_postfix(loss=f"{figures['loss']:.3f}", refresh=False)
            if not RANK:
                with open(self.run.dir / "log.jsonl", "a") as file:
                    file.write(json.dumps(self.log[-1]) + "\n")
        self.queued = []

    def end_epoch(self):
        """Print the clean and white-box similarity on the validation images."""
        args, clip, epoch = self.args, self.clip, self.log[-1]["epoch"]
        loss = float(np.mean([entry["loss"] for entry in self.log if entry["epoch"] == epoch]))
        self.visual.eval()
        pixels, text_features = self.validation["pixels"], clip.encode_text(self.validation["caption"][:])
        attack = white_box(args.eps, args.steps)
        pixels_adv, _ = attack_all(attack, partial(own_caption, text_features), pixels, clip, what="validate")
        clean, attacked = ((clip.encode_pixels(x) * text_features).sum(-1).mean().item() for x in (pixels, pixels_adv))
        figures = {"epoch": epoch, "step": len(self.log), "loss": loss, "val_clean": clean, "val_white_box": attacked}
        self.epochs.append(figures)
        write = tqdm.write if sys.stderr.isatty() else print  # above the bar of a terminal
        line = f"epoch {epoch}/{args.epochs}  step {len(self.log)}  loss {loss:.3f}  validation clean {clean:.3f}, "
        write(f"{line}white-box {attacked:.3f}")

    def finish(self, generation_seconds=0, **metrics):
        """Write the model and metrics.json.

        generation_seconds   time that the adversarial images took, which counts as training time
        """
        if not RANK:  # the start weights' training images are its own, too
            save_model(self.run.dir, self.clip, {*known_ids(self.training), *self.clip.train_ids})
        figures = {"n": len(self.training), "n_validation": len(self.validation), "steps": len(self.log)}
        figures |= {"stopped_by": self.stopped, "epochs": self.epochs, "global_batch_size": self.size}
        figures |= {"train_ids": known_ids(self.training), "val_ids": known_ids(self.validation)}
        seconds = self.run.seconds()
        speed = {"training_seconds": seconds + generation_seconds}
        speed["images_per_s"] = 2 * self.size * len(self.log) / seconds
        self.run.finish(self.clip, **figures, **speed, **metrics)
        print(f"to open the model: open_clip.create_model_and_transforms('local-dir:{self.run.dir}')")
