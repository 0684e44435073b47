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
import errno
import fcntl
import filecmp
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
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import types
import warnings
import weakref
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import datasets
import huggingface_hub
import numpy as np
import open_clip
import torch
import torchvision
import torchvision.transforms.functional as TF
from open_clip.push_to_hf_hub import save_for_hf
from PIL import Image
from torch import distributed
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
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
        "epochs": 3,
        "online_images": 5000,
        "online_lr": 1e-5,
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
        "epochs": 3,
        "online_images": 1200,
        "online_lr": 4e-4,
    },
}

# ---------------------------------------------------------------------------------------------------------------------
# Flags


def fail(message):
    """End with one line that says what is wrong, where, and what to do; exit code 2."""
    if RANK:
        time.sleep(10)  # what rank 0 finds, too, it says: torchrun ends this process meanwhile
    line = " ".join(str(message).split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message}; --help lists the flags")


def pixel_distance(text):
    """argparse type for a distance on the [0, 1] pixel scale, above 0: '8/255' or '0.0314'."""
    over, _, under = text.partition("/")
    try:
        value = float(over) / float(under or 1)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if math.isnan(value):
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
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    group = parser.add_argument_group("run")
    group.add_argument("--preset", choices=PRESETS, default="report", help="sets defaults of the flags below (report)")
    group.add_argument("--output_dir", help="folder for everything written (default: %(default)s)")
    group.add_argument("--overwrite", action="store_true", help="replace a finished run in --output_dir")
    group.add_argument("--seed", type=number(0, 2**31), default=0, help="of all random numbers (default: %(default)s)")
    group.add_argument("--device", default="auto", help="cuda, cuda:1, mps, cpu, or auto: the first there is (auto)")
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="the same bytes twice on a GPU, too, as on a CPU without it: torch's deterministic kernels, which are "
        "slower, and an error where it has none",
    )
    group.add_argument("--profile", action="store_true", help="trace the second batch: trace.json and a summary")

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
    group.add_argument(
        "--batch_size",
        type=lambda text: text if text == "auto" else number(1)(text),
        help="images at a time; auto: on a GPU as many as fit, not for training (default: %(default)s)",
    )
    group.add_argument("--num_workers", type=number(1), default=os.cpu_count(), help="threads (default: %(default)s)")
    group.add_argument("--cache_dir", default="runs/cache", help="for decoded images, uint8 (default: %(default)s)")

    group = parser.add_argument_group("attack: L-inf, pixels in [0, 1], before CLIP's normalisation")
    group.add_argument("--eps", type=pixel_distance, default="8/255", help="radius (default: %(default)s)")
    group.add_argument("--alpha", type=pixel_distance, default="2/255", help="step size (default: %(default)s)")
    group.add_argument("--steps", type=number(1, 10**6), default=20, help="gradient steps (default: %(default)s)")
    return parser


def add_train_args(parser):
    """Flags read by train()."""
    group = parser.add_argument_group("training")
    group.add_argument("--lr", type=number(0, 1, float), help="learning rate of AdamW (default: %(default)s)")
    group.add_argument(
        "--weight_decay", type=number(-1e-9, 100, float), default=0.1, help="on matrices (default: %(default)s)"
    )
    group.add_argument("--epochs", type=number(1, 10**4), help="passes over the training images (default: %(default)s)")
    group.add_argument("--max_steps", type=number(1), help="stop after so many optimizer steps (default: no limit)")
    group.add_argument(
        "--save_every", type=number(-1e-9, kind=float), default=10, help="minutes between states (default: %(default)s)"
    )
    group.add_argument("--grad_checkpointing", action="store_true", help="less memory, a third more time")
    group.add_argument(
        "--export",
        metavar="DIR",
        help="also write best.pt as an open_clip folder and image_tower.pt2; of a finished run, too (default: none)",
    )
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
    for word in sys.argv[1:] if argv is None else argv:
        if word.encode(errors="replace").decode() != word:  # no record could hold it, and no terminal show it
            parser.error(f"{word!r} is not text in UTF-8")
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
    if not args.output_dir:
        parser.error("--output_dir is empty")
    if batch == "train" and args.batch_size == "auto":
        parser.error("--batch_size auto is for attacks: the batch of a training is part of its loss")
    if args.deterministic and args.batch_size == "auto":
        parser.error("--batch_size auto follows the free memory: with --deterministic give a number")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Processes: one, or several under torchrun: rank 0 speaks and writes, all ranks work

RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def join_group():
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
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        time.sleep(10)  # if it comes of another's end: torchrun ends this process meanwhile
        traceback.print_exc()
        code = 1
    if code:  # without leave of the others: NCCL's would wait for them
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    distributed.destroy_process_group()


def barrier():
    if PROCESSES > 1:
        gather(None)  # of objects: needs no GPU


def gather(value):
    """The values of all ranks, in their order."""
    values = [value] * PROCESSES
    if PROCESSES > 1:
        distributed.all_gather_object(values, value)
    return values


@contextmanager
def main_first():
    """Rank 0 goes through the block first, the others when it is done."""
    if RANK:
        barrier()
    yield
    if not RANK:
        barrier()


# ---------------------------------------------------------------------------------------------------------------------
# Runs: one output folder each; metrics.json is written last and marks the folder complete

NOT_IN_RESULT = {  # flags that change no number
    *("output_dir", "overwrite", "num_workers", "cache_dir", "reproduce", "rerun"),
    *("profile", "save_every", "grad_checkpointing", "export"),
}


class Run:
    """Bookkeeping of one script: checks what can be checked early, refuses to overwrite, resumes, writes metrics.json.

    A finished run with the same flags and inputs ends the script at once with exit code 0; an unfinished one goes on
    from what it kept in .partial; a run with other flags or inputs is an error unless --overwrite is given.

    inputs   what this run reads: folders of other runs, files of weights
    show     what to do with a finished run again: (metrics.json as a dict) -> text to print
    """

    def __init__(self, args, inputs=(), show=None):
        self.args, self.dir, self.before, self.clock = args, Path(args.output_dir), 0.0, time.perf_counter()
        self.started = datetime.now(timezone.utc).isoformat()
        if args.deterministic:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # before CUDA starts, which reads it
            torch.use_deterministic_algorithms(True)
        device = pick_device(args.device)
        _, weights = find_weights(args.model, args.pretrained)
        inputs = [*inputs, *model_files(args.model), *([weights] if weights else [])]
        self.inputs, self.commit = {str(path): fingerprint(path) for path in inputs}, git_commit()
        done, self.partial = self.dir / "metrics.json", self.dir / ".partial"
        marker = self.partial / "run.json"
        if not args.overwrite and exists(done):
            finished = read_record(done)
            self.must_equal(finished, "a finished run")  # by however many processes
            if not RANK and exists(marker) and finished["started"] in marker.read_text(errors="replace"):
                self.tidy()  # it was killed after its last file
            try:
                text = show(finished).encode(errors="replace").decode() + "\n" if show else ""
            except Exception as error:  # what else it lacks, or holds of another kind
                fail(f"{done} is damaged ({describe(error)}): make its folder again with --overwrite")
            print(text, end="")
            print(f"{self.dir} is complete and was made with these flags: nothing to do (--overwrite runs it again)")
            raise SystemExit(0)
        if not RANK:
            self.take_folder()
        barrier()
        unfinished = read_record(marker) if marker.exists() else None
        if unfinished and done.exists() and unfinished["started"] in done.read_text(errors="replace"):
            unfinished = None  # ended after its last file, before it was tidied up
        barrier()  # all have read what rank 0 may remove now
        if unfinished and not args.overwrite:
            self.must_equal(unfinished, "an unfinished run")
        if unfinished and not self.differences(unfinished):
            self.started, self.before = unfinished["started"], unfinished.get("seconds", 0)
            print(f"{self.dir} holds an unfinished run: going on after its first {self.before:.0f} s")
            if unfinished.get("commit") != self.commit:
                print(f"note: it was begun by other code, commit {unfinished.get('commit')}; this is {self.commit}")
        elif not RANK and self.partial.exists():
            shutil.rmtree(self.partial)
        barrier()
        self.found = {path.name for path in self.partial.glob("*.pt")}
        reset_peak_memory(device)

    def take_folder(self):
        """Make the folder, see that it can be written, and hold it until this process ends."""
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            write_json(self.dir / ".write_test", {})
            (self.dir / ".write_test").unlink()
        except OSError as error:
            fail(f"cannot write to --output_dir {self.dir}: {error.strerror}")
        folder = os.open(self.dir, os.O_RDONLY)
        self.release = weakref.finalize(self, os.close, folder)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"another run is writing to {self.dir}: wait for it, or give another --output_dir")
        except OSError:
            pass  # a file system without locks

    def differences(self, record):
        """What differs from an earlier run that changes its numbers, as one text; empty if it was the same run."""
        old, new = record["args"], json.loads(json.dumps(vars(self.args)))  # tuples compare as lists
        keys = sorted((old.keys() | new.keys()) - NOT_IN_RESULT)
        said = [f"--{key} {old.get(key)} -> {new.get(key)}" for key in keys if old.get(key) != new.get(key)]
        inputs = record["inputs"]
        said += [f"a new {path}" for path in self.inputs if inputs.get(path) != self.inputs[path]]
        said += [f"without {path}" for path in inputs.keys() - self.inputs.keys()]
        if "argv" not in record and record.get("processes") != PROCESSES:  # of an unfinished run
            said.append(f"{record.get('processes')} -> {PROCESSES} processes")
        return ", ".join(said)

    def must_equal(self, record, what):
        if said := self.differences(record):
            fail(f"{self.dir} holds {what} with other flags or inputs ({said}): --overwrite replaces it")

    def require_disk(self, need):
        """End unless the folder's disk has that many bytes for it; what a killed run left there counts as had."""
        require_disk(self.dir, need - sum(file.stat().st_size for file in self.dir.rglob("*") if file.is_file()))

    def keep(self, key, value):
        """Store a finished part of the work, tensors and plain values, so that a killed run goes on after it."""
        self.partial.mkdir(exist_ok=True)
        if not RANK:
            record = {"args": vars(self.args), "inputs": self.inputs, "processes": PROCESSES, "commit": self.commit}
            write_json(self.partial / "run.json", record | {"started": self.started, "seconds": self.seconds()})
        save_torch(self.partial / f"{digest(key)}.pt", value)

    def kept(self, key):
        """What an earlier, killed process of this run kept under key; None if there is nothing, or it is damaged."""
        file = self.partial / f"{digest(key)}.pt"
        if file.name not in self.found:
            return None
        try:
            with zipfile.ZipFile(file) as archive, warnings.catch_warnings(action="ignore"):
                whole = archive.testzip() is None  # torch does not look at the checksums
            return torch.load(file, map_location="cpu", weights_only=True) if whole else None
        except Exception:  # a damaged file raises anything
            return None

    def begin(self):
        """To be called before the first file is written: from here to finish() the folder is not complete."""
        if not RANK:
            (self.dir / ".run").touch()  # this folder is ours
            (self.dir / "metrics.json").unlink(missing_ok=True)
        barrier()

    def seconds(self):
        """Wall time of this run, without the pauses of a killed one."""
        return self.before + time.perf_counter() - self.clock

    def finish(self, device, **metrics):
        """Write metrics.json: how the run was made, then the script's own figures."""
        versions = {module.__name__: module.__version__ for module in (torch, torchvision, open_clip, datasets, np)}
        on_gpu = device.type == "cuda"
        record = {
            "argv": sys.argv,
            "args": vars(self.args),
            "inputs": self.inputs,
            "commit": self.commit,
            "versions": versions | {"python": platform.python_version()},
            "device": f"{device} ({torch.cuda.get_device_name(device) if on_gpu else platform.machine()})",
            "processes": PROCESSES,
            "started": self.started,
            "seconds": round(self.seconds(), 3),
            "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else peak_memory(),
        }
        if self.args.profile and blocks < 2:
            say("--profile: there was no second batch to trace; --batch_size makes batches smaller")
        if not RANK:
            write_json(self.dir / "metrics.json", record | metrics)
            self.tidy()
            self.release()
        barrier()

    def tidy(self):
        """Remove what was kept, run.json last: it says whose the rest is."""
        for file in self.partial.glob("*.pt"):
            file.unlink()
        shutil.rmtree(self.partial, ignore_errors=True)


def exists(path):
    try:
        return path.exists()
    except OSError as error:
        fail(f"{path}: {error.strerror}")


def read_record(path):
    """A metrics.json, or the start of one in .partial."""
    record, kinds = read_json(path), {"args": dict, "inputs": dict, "started": str}
    sound = isinstance(record, dict) and all(isinstance(record.get(key), kind) for key, kind in kinds.items())
    times = [record.get(key, 0) for key in ("seconds", "training_seconds")] if sound else []
    if not sound or not all(type(time) in (int, float) and 0 <= time < 1e12 for time in times):
        fail(f"{path} is damaged: delete it, or make its folder again with --overwrite")
    return record


def fingerprint(path):
    """What changes when a run's folder, or a file, is made anew."""
    if path.is_dir():
        return read_record(path / "metrics.json")["started"]
    return [path.stat().st_size, path.stat().st_mtime_ns]


def digest(value):
    """A name for plain values."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:20]


NO_ROOM = errno.ENOSPC, errno.EDQUOT, errno.EFBIG


@join_group()
def run_main(main, args):
    """main(args); what comes from outside, a full disk, a full memory, Ctrl-C, ends it with one line."""
    try:
        main(args)
    except KeyboardInterrupt:
        if not RANK:
            print("stopped: the same command goes on from what is saved", file=sys.stderr)
        raise SystemExit(130)
    except torch.OutOfMemoryError:
        fail(f"the GPU's memory is too small for --batch_size {args.batch_size}: the same command with a smaller one, "
             "with --batch_size auto for attacks, --grad_checkpointing for training")  # fmt: skip
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        fail(f"no room to write {error.filename or args.output_dir} ({error.strerror}): make room, then give the same "
             "command again; it goes on from what is saved")  # fmt: skip


def reset_peak_memory(device):
    """Count the peak from here: stages of a reproduction share a process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):  # not Linux, or not allowed: then the peak is the process's
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory():
    """Largest resident size of this process, bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the process that started this one
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


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
    """write(temporary path), flushed to disk, then renamed to path: path is whole, or as it was before."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_torch(path, value):
    def write(temporary):
        with open(temporary, "wb") as file:
            try:
                torch.save(value, file)
            except RuntimeError as error:  # hides why the file could not be written
                raise error.__context__ or error

    replace_file(path, write)


def write_text(path, text):
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        fail(f"{path} cannot be read as JSON: {error}")


def run_script(words):
    """Print a command as a user would type it, and run it; an error ends this script, too."""
    print(f"\n$ python {shlex.join(words)}", flush=True)
    argv, sys.argv = sys.argv, words
    try:
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")  # in this process: the imports take seconds
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.argv = argv


def say(text):
    """Print a line, above the progress bars of a terminal."""
    if not RANK:
        tqdm.write(text) if sys.stderr.isatty() else print(text, flush=True)


def progress(iterable, what, total=None, unit="image"):
    """A progress bar with rate and ETA, shown once something takes longer than two seconds."""
    log = not sys.stderr.isatty()  # there, a line now and then
    every = 30 if log else 0.2
    return tqdm(iterable, what, total, unit=unit, delay=2, mininterval=every, ncols=79, leave=log, disable=RANK > 0)


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

    def forward(self, images):
        """encode_image, for DistributedDataParallel."""
        return self.encode_image(images)

    def encode_image(self, images):
        """(B, 3, H, W) float32 in [0, 1] -> (B, D) float32, unit norm; differentiable in images and weights.

        bf16 is for gradients alone: features that are scored, under torch.no_grad(), are fp32 whatever --precision.
        """
        bf16 = self.bf16 and torch.is_grad_enabled()
        dtype = torch.bfloat16 if bf16 else torch.float32
        tower = fast_tower(self.model.visual, self.mean, self.std, dtype, held=False)
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
            if not features.isfinite().all():
                fail(f"text features of {self.arch} are not finite: its weights are damaged")
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

    def layer(x, norm_1, norm_2, w_qkv, b_qkv, w_out, b_out, w_1, b_1, w_2, b_2, activation, last):
        y = norm_1(x)
        if last:  # the class token alone is read
            x = x[:, :1]
            (q,) = split(F.linear(y[:, :1], w_qkv[:width], b_qkv[:width]))
            k, v = split(F.linear(y, w_qkv[width:], b_qkv[width:]))
        else:
            q, k, v = split(F.linear(y, w_qkv, b_qkv))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + F.linear(y, w_out, b_out)
        return x + F.linear(activation(F.linear(norm_2(x), w_1, b_1)), w_2, b_2)

    def encode(images):
        x = images.to(dtype).unfold(2, patch, patch).unfold(3, patch, patch)  # (B, 3, h, w, P, P)
        x = F.linear(x.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2), *embed)  # (B, hw, W)
        x = before(torch.cat([token.expand(len(x), 1, -1), x], 1) + position)
        for i, weights in enumerate(layers):
            last = i == len(layers) - 1
            if visual.transformer.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, *weights, last, use_reentrant=False)
            else:
                x = layer(x, *weights, last)
        return after(x[:, 0]) @ projection

    return encode


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and PROCESSES > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        if not re.fullmatch(r"(cuda|mps|cpu)(:\d+)?", name):
            raise RuntimeError("write cuda, cuda:1, mps, cpu or auto")
        device = torch.empty(0, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # what is meant by calls that name none
        return device
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
    size = config.get("vision_cfg", {}).get("image_size", 224) if "vision_cfg" in config else None
    if not isinstance(size, int) or not 0 < size < 10_000:
        fail(f"--model {name}: vision_cfg asks for images of {size} pixels: one side of square images is supported")
    return config


def image_size(name):
    """The side of the square images that a model takes, in pixels."""
    return model_config(name)["vision_cfg"].get("image_size", 224)


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


def training_bytes(name):
    """Disk that a model's training needs: best.pt, last.pt and a temporary; twice the weights and two moments."""
    logging.disable(logging.WARNING)
    try:
        with torch.device("meta"):
            model = open_clip.create_model(name, load_weights=False, device="meta")
    except Exception:  # load_clip() will say what is wrong with it
        return 0
    finally:
        logging.disable(logging.NOTSET)
    return 9 * sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def model_files(source):
    """The files of weights behind local-dir:DIR or a path; none behind another name."""
    if source.startswith("local-dir:"):
        files = Path(source.removeprefix("local-dir:")).glob("*")
        return sorted(file for file in files if file.suffix in (".safetensors", ".bin", ".pt"))
    return [Path(source)] if Path(source).is_file() else []


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
    train_ids = exported_ids(name)
    train_ids |= load_checkpoint(model, name, file) if file else set()
    train_ids |= load_checkpoint(model, name, over, tower_alone=True) if over else set()
    sizes = [image_size(n) for n in (name, args.model)]
    if sizes[0] != sizes[1]:
        fail(f"{name} takes images of {sizes[0]} pixels and --model {args.model} of {sizes[1]}: one table, one size")
    return Clip(model, tokenizer, name, pick_device(args.device), args.precision, train_ids)


def exported_ids(name):
    """The COCO ids that the model of an --export folder was trained on."""
    config = Path(name.removeprefix("local-dir:")) / "open_clip_config.json"
    ids = read_json(config).get("train_ids", []) if name.startswith("local-dir:") else []
    if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
        fail(f"{config}: train_ids is not a list of COCO ids")
    return set(ids)


def load_checkpoint(model, name, file, tower_alone=False):
    """Fill model from a .pt or .safetensors file without running code in it; returns the COCO ids it was trained on.

    tower_alone   the file may hold the visual tower alone; the text tower is then the model's
    """
    try:
        if file.suffix == ".safetensors":
            checkpoint = open_clip.factory.load_state_dict(str(file))
        else:
            with warnings.catch_warnings(action="ignore"):  # of the pickle's protocol
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
        if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
            fail(f"{file} holds weights that are not finite: they are of a training that diverged")
        return {int(i) for i in checkpoint.get("train_ids", ())}
    except pickle.UnpicklingError as error:  # whose text would have the reader turn weights_only off
        if re.search("(?i)global|operand 149", str(error)):  # 149 begins a pickle that torch did not write
            fail(f"{file} holds code, or objects that are not plain tensors: not opened, for it could run anything")
        fail(f"{file} is no checkpoint of plain tensors for {name}, and is not used: it is damaged, or something else")
    except Exception as error:  # a damaged, foreign or hostile file raises anything
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
LARGEST_FILE, LARGEST_IMAGE = 20_000_000, 50_000_000  # bytes, pixels: bombs are not unpacked
Image.MAX_IMAGE_PIXELS = None  # read_image() looks itself
for handler in logging.getLogger("datasets").handlers:  # an error is raised as well, and said in one line
    handler.addFilter(lambda record: record.levelno < logging.ERROR)
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
    return pixels.to(device, non_blocking=True).float() / 255


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
        if cache:  # the card may name files anywhere
            files = datasets.load_dataset_builder(source, CONFIG, cache_dir=cache).config.data_files
            root = os.path.abspath(source)  # links are not followed: in the hub's cache every file is one
            outside = [f for f in sum(files.values(), []) if not Path(os.path.abspath(f)).is_relative_to(root)]
            if outside:
                raise ValueError(f"{outside[0]} is outside the folder")
        table = datasets.load_dataset(source, CONFIG, split=split_name, cache_dir=cache)
    except Exception as error:  # datasets raises a class of its own for each missing thing
        fail(f"{flag}: cannot open config {CONFIG}, split {split_name}: {describe(error)}")
    for column in (image_column, caption_column):
        if column not in table.column_names:
            fail(f"{flag}: split {split_name} has no column {column}; it has {', '.join(table.column_names)}")
    rows, seen = [], set()
    for row, path in enumerate(read_column(flag, table, image_column)):
        name = PurePosixPath(path).name if isinstance(path, str) else ""
        match = re.fullmatch(r"COCO_(?:train|val)2014_([0-9]{1,12})\.jpe?g", name)
        if not match:
            fail(f"{flag}: row {row}: {image_column} {path!r} is not the path of a COCO 2014 image")
        if match[0].startswith(wanted) and int(match[1]) not in seen:
            seen.add(int(match[1]))
            rows.append((row, path, int(match[1])))
    if args.sample_seed is not None:
        rows = [rows[i] for i in np.random.default_rng(args.sample_seed).permutation(len(rows))]
    return flag, table, rows


def read_column(flag, table, name):
    """A column as Arrow holds it: nothing is decoded, or opened, that the data set declares its values to be."""
    try:
        return table.select_columns(name).with_format("arrow")[:][name].to_pylist()
    except Exception as error:  # text that is not UTF-8, a name that comes twice, a type that only datasets knows
        fail(f"{flag}: column {name} cannot be read: {describe(error)}")


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
    captions = read_column(flag, table.select([row for row, _, _ in rows]), column)
    captions = [text[0] if isinstance(text, list) and text else text for text in captions]
    for (row, _, _), text in zip(rows, captions):
        if not isinstance(text, str) or not text.strip():
            fail(f"{flag}: row {row}: {column} is empty")
    size = image_size(args.model)
    paths = [path for _, path, _ in rows]
    reader = ImageReader(getattr(args, f"{split}_data"), paths, args.image_root, fetch_all=split == "train")
    key = hashlib.sha256(json.dumps([reader.fingerprint, paths, size]).encode()).hexdigest()[:20]
    cache = Path(args.cache_dir) / f"{key}.npy"
    with main_first():
        if open_cache(cache, paths, size) is None:
            decode_all(reader, size, cache, args)
    pixels, broken = open_cache(cache, paths, size) or fail(f"{cache} was altered while it was read")
    if broken and not args.skip_bad_images:
        path, problem = next(iter(broken.items()))
        fail(f"{path}: broken image ({problem}), {len(broken)} in all; --skip_bad_images leaves them out")
    if broken:
        print(f"{flag}: {len(broken)} broken images left out, the first {next(iter(broken))}")
    kept = [i for i, path in enumerate(paths) if path not in broken]
    return Examples(
        pixels=pixels[: len(kept)],
        captions=[captions[i].strip() for i in kept],
        coco_ids=[rows[i][2] for i in kept],
        names=[PurePosixPath(paths[i]).name for i in kept],
        skipped=list(broken),
    )


def open_cache(cache, paths, size):
    """What decode_all() wrote: the pixels, and {path: problem} of the broken images; None if not there, or damaged."""
    try:
        broken = json.loads(cache.with_suffix(".json").read_bytes())["broken"]
        pixels = np.load(cache, mmap_mode="r")
        sound = pixels.dtype == np.uint8 and pixels.shape == (len(paths), 3, size, size)
        return (pixels, broken) if sound and broken.keys() <= {*paths} else None
    except Exception:  # a damaged file raises anything
        return None


def decode_all(reader, size, cache, args):
    """Decode the reader's images into one uint8 array; the .json beside it, written last, names the broken ones."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    shape = (len(reader.paths), 3, size, size)
    require_disk(cache.parent, 1.1 * math.prod(shape))

    def decode(path):
        try:
            data = reader.read(path)
        except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, ValueError) as error:
            return None, describe(error)
        try:
            return decode_image(data, size), None
        except ValueError as error:
            return None, str(error)

    good, broken = 0, {}
    temporary = cache.with_name(f".{cache.name}.{os.getpid()}")  # others may be decoding the same images
    note = temporary.with_name(f"{temporary.name}.json")
    try:
        reader.open_archive()
        with open(temporary, "wb") as file, ThreadPoolExecutor(args.num_workers) as pool:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            end = file.tell() + math.prod(shape)
            decoded = zip(reader.paths, pool.map(decode, reader.paths))
            for path, (image, problem) in progress(decoded, "decode", len(reader.paths)):
                if problem and not args.skip_bad_images:
                    pool.shutdown(cancel_futures=True)
                    fail(f"{path}: broken image ({problem}); --skip_bad_images leaves such images out")
                if problem:
                    broken[path] = problem
                else:
                    file.write(image.tobytes())
                    good += 1
            file.truncate(end)
            file.flush()
            os.fsync(file.fileno())
        if not good:
            fail(f"none of the {len(reader.paths)} images could be decoded; {path}: {problem}")
        os.replace(temporary, cache)
        write_json(note, {"source": reader.fingerprint[0], "images": good, "broken": broken})
        os.replace(note, cache.with_suffix(".json"))
    except Exception as error:  # the network raises too many classes to list
        if getattr(error, "errno", None) in NO_ROOM:
            raise
        fail(f"cannot read the images of {reader.source}: {describe(error)}")
    finally:
        temporary.unlink(missing_ok=True)


def decode_image(data, size):
    """The bytes of an image file -> uint8 (3, size, size): bicubic resize of the short side, centre crop.

    PIL's resize to 0.01 grey levels on average, done by torch's vectorised one on the interleaved pixels.
    """
    pixels = torch.from_numpy(read_image(data, ["JPEG", "PNG", "WEBP", "BMP", "GIF"]))  # none starts another program
    height, width = pixels.shape[:2]
    shape = [size * height // min(width, height), size * width // min(width, height)]
    pixels = F.interpolate(pixels.permute(2, 0, 1)[None], shape, mode="bicubic", antialias=True)[0]
    return TF.center_crop(pixels, size).numpy()


def read_image(data, formats):
    """An image file's bytes -> uint8 (H, W, 3); ValueError for whatever is no photograph of 8 bits a channel."""
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            width, height = image.size
            if width * height > LARGEST_IMAGE or max(width, height) > 50 * min(width, height):
                raise ValueError(f"{width} x {height} pixels")
            if image.mode[0] in "IF":
                raise ValueError(f"more than 8 bits a channel (mode {image.mode})")
            return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except Exception as error:  # a damaged or hostile file raises anything
        raise ValueError(describe(error))


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
        if path in self.files:
            return self.files[path].read_bytes()
        with self.archive.open(self.members[path]) as member:
            claimed = self.archive.getinfo(self.members[path]).file_size
            data = b"" if claimed > LARGEST_FILE else member.read(LARGEST_FILE + 1)
        if max(claimed, len(data)) > LARGEST_FILE:
            raise ValueError(f"unpacks to more than {LARGEST_FILE / 1e6:.0f} MB")
        return data

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
    parts, inside = PurePosixPath(path).parts, root.resolve()
    for file in [root.joinpath(*parts[i:]) for i in range(len(parts))] + [root / parts[-1].split("_")[1] / parts[-1]]:
        with suppress(OSError, ValueError):  # a path that is too long, or holds a zero byte
            if file.is_file() and file.resolve().is_relative_to(inside):  # neither .., / nor a link leads out
                return file
    return None


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
    rises, last_loss, old_size, old_best = zero_grads.clone(), -best_loss, size, best_loss
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
            stalled = rises <= 0.75 * (step - last_check)  # <= as in the authors' code; the paper has <
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
    """The steps at which APGD looks whether to halve: after 22 % of them, then each time 3 % sooner, down to 6 %.

    Rounded down as in the authors' code, which for 20 steps looks more often than the paper's formula, and is stronger.
    """
    wait, less, least = (max(1, steps * share // 100) for share in (22, 3, 6))
    checks = [wait]
    while checks[-1] < steps:
        wait = max(wait - less, least)
        checks.append(checks[-1] + wait)
    return checks


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
    pixels = torch.tensor(np.asarray(pixels), device=images.device).int()
    delta = ((images * 255).round().int() - pixels).clamp(-grey_levels(eps), grey_levels(eps))
    return (pixels + delta).clamp(0, 255).byte().cpu()


def in_batches(first, last, args, what, work, settled=()):
    """Yield (slice, work(slice)) over first..last, --batch_size at a time.

    auto      on a GPU everything at once, at first; halved, for good, whenever its memory runs out
    settled   {first: last} of batches that need not be done again
    """
    global largest_batch
    with progress(None, what, last - first) as bar:
        while first < last:
            if first in settled:
                bar.update(settled[first] - first)
                first = settled[first]
                continue
            size = args.batch_size
            if size == "auto" and pick_device(args.device).type != "cuda":
                size = PRESETS[args.preset]["batch_size"]["attack"]
            here = slice(first, min([first + (largest_batch if size == "auto" else size), last]))
            try:
                done = work(here)
            except torch.OutOfMemoryError:
                if size != "auto" or here.stop == first + 1:
                    raise
                done = None
            if done is None:  # outside the handler, which keeps the failed batch alive
                largest_batch = min(largest_batch, (here.stop - first) // 2)  # two threads may come here
                torch.cuda.empty_cache()
                continue
            yield here, done
            bar.update(here.stop - first)
            first = here.stop


largest_batch = 1024  # with --batch_size auto; the halving is remembered from one attack to the next


def attack_batches(loss_at, examples, args, random_start=True, seed=0, auto=False, what="attack", settled=()):
    """The attack on every example, --batch_size at a time; under torchrun on this rank's share of the batches.

    loss_at   slice of the examples -> loss_fn of their images for pgd(), such as own_caption()
    seed      added to args.seed for the random start
    settled   as for in_batches()
    yields    (slice, pixels_adv uint8 (B, 3, H, W) on the CPU, Attacked)
    """
    device, budget = pick_device(args.device), {"eps": args.eps, "alpha": args.alpha, "steps": args.steps}
    prepared = {}  # (first, last) of the next batch, made while the GPU works on this one

    def prepare(*span):
        tensors = [torch.from_numpy(np.array(examples.pixels[slice(*span)]))]
        if random_start:
            tensors.append(start_noise(args.seed + seed, range(*span), tensors[0].shape[1:]))
        return [tensor.pin_memory() if device.type == "cuda" else tensor for tensor in tensors]

    def attack(here):
        span, following = (here.start, here.stop), (here.stop, min(2 * here.stop - here.start, last))
        pixels, *noise = prepared.pop(span).result() if span in prepared else prepare(*span)
        prepared.clear()
        if here.stop < last:
            prepared[following] = preparing.submit(prepare, *following)
        noise = noise[0].to(device, non_blocking=True) if noise else None
        with profiled(args):
            attacked = pgd(loss_at(here), as_images(pixels, device), **budget, noise=noise, auto=auto)
        return to_pixels(attacked.images, pixels, args.eps), attacked

    unit = 1 if args.batch_size == "auto" else args.batch_size
    share = unit * math.ceil(len(examples) / unit / PROCESSES)
    first, last = min(RANK * share, len(examples)), min((RANK + 1) * share, len(examples))
    with ThreadPoolExecutor(1) as preparing:
        for here, (pixels_adv, attacked) in in_batches(first, last, args, what, attack, settled):
            yield here, pixels_adv, attacked


def own_caption(encode_image, text_features):
    """The report's loss: minus the cosine with the own caption, row i of text_features (N, D)."""
    return lambda here: lambda images: -(encode_image(images) * text_features[here]).sum(-1)


def attack_all(loss_at, examples, args, **options):
    """attack_batches, collected from all ranks: pixels_adv uint8 (N, 3, H, W) and its attack_health."""
    parts = []
    for here, pixels_adv, attacked in attack_batches(loss_at, examples, args, **options):
        parts.append((pixels_adv, attack_health(examples.pixels[here], pixels_adv, attacked)))
    pixels_adv, healths = zip(*(part for share in gather(parts) for part in share))
    return torch.cat(pixels_adv), sum_health(healths)


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
def encode_all(encode_image, pixels, args, blame=lambda bad: "the model's weights are damaged"):
    """Features of uint8 images (N, 3, H, W), --batch_size at a time: (N, D).

    blame   what the last line says when features are not finite: (numbers of those images) -> text
    """
    device = pick_device(args.device)

    def encode(here):
        return encode_image(as_images(pixels[here], device))

    features = torch.cat([features for _, features in in_batches(0, len(pixels), args, "encode", encode)])
    if bad := (~features.isfinite().all(1)).nonzero()[:, 0].tolist():
        fail(f"image features are not finite, and their similarity means nothing: {blame(bad)}")
    return features


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
        words += [f"--{name}" for name in ("skip_bad_images", "deterministic") if getattr(args, name)]
        print(f"{folder} is not there yet and is made first:")
        run_script([*words, "--output_dir", str(folder)])
    return folder


def load_adversarial(folder, examples, args):
    """The adversarial twins of examples from a folder of generate_pgd_adversarial.py: uint8 (N, 3, S, S).

    Ends with one line if they were made with another attack, or if an image is missing, of another caption or size, or
    outside the ball around its clean twin.
    """
    made = read_record(folder / "metrics.json")["args"]
    for flag in ("model", "pretrained", "eps", "alpha", "steps"):
        if made.get(flag) != getattr(args, flag):
            fail(f"{folder} was made with --{flag} {made.get(flag)}, not {getattr(args, flag)}: give another folder")
    if not (folder / "metadata.jsonl").exists():
        fail(f"{folder} holds no metadata.jsonl: it is not a folder of generate_pgd_adversarial.py")
    entries = {}
    for i, line in enumerate((folder / "metadata.jsonl").read_bytes().strip().split(b"\n"), 1):
        try:
            entry = json.loads(line)
            file = (folder / entry["file_name"]).resolve()
            if not file.is_relative_to(folder.resolve()):
                fail(f"{folder / 'metadata.jsonl'}: line {i}: {entry['file_name']} is outside the folder")
            entries[entry["coco_id"], entry["caption"]] = file, entry["sha256"]
        except (ValueError, KeyError, TypeError, OSError, RecursionError):
            fail(f"{folder / 'metadata.jsonl'}: line {i} is damaged: make the folder again with --overwrite")
    twins = np.empty(examples.pixels.shape, np.uint8)

    def problem_with(i):
        file, checksum = entries.get((examples.coco_ids[i], examples.captions[i]), (None, None))
        if file is None:
            return f"{folder} has no adversarial twin of {examples.names[i]} with its caption"
        try:
            data = file.read_bytes()
        except OSError as error:
            return f"{file}: {describe(error)}"
        if hashlib.sha256(data).hexdigest() != checksum:
            return f"{file} was altered after it was made: its sha256 is not that of metadata.jsonl"
        try:
            twin = read_image(data, ["PNG"]).transpose(2, 0, 1)
        except ValueError as error:
            return f"{file}: {error}"
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
# Profile

KINDS = {  # words in the names of operators and kernels, the first kind that fits
    "data": ("copy", "memset", "nccl", "gloo", "c10d", "comms"),
    "attention": ("attention", "flash", "fmha", "softmax"),
    "products": ("gemm", "addmm", "bmm", "::mm", "linear", "conv", "cutlass", "xmma", "nvjet"),
}
blocks = 0  # that profiled() has seen


@contextmanager
def profiled(args):
    """With --profile, trace the second such block of a script: trace.json, and where its time went in five lines."""
    global blocks
    blocks += args.profile
    if not args.profile or blocks != 2 or RANK:
        yield
        return
    on_gpu, folder = pick_device(args.device).type == "cuda", Path(args.output_dir)
    with torch.profiler.profile() as trace:
        if on_gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        yield
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    trace.export_chrome_trace(str(folder / "trace.json"))
    shares = dict.fromkeys([*KINDS, "elementwise"], 0.0)
    for event in trace.key_averages():
        if (event.device_type == torch.autograd.DeviceType.CPU) == on_gpu or event.is_user_annotation:
            continue  # an operator's device time is that of its kernels, which are events themselves
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        kinds = [kind for kind, words in KINDS.items() if any(word in event.key.lower() for word in words)]
        shares[kinds[0] if kinds else "elementwise"] += spent / 1e6 / seconds
    shares["idle"] = max(0.0, 1 - sum(shares.values()))
    say(f"second batch: {seconds:.3f} s on the {'GPU' if on_gpu else 'CPU'}, traced in {folder / 'trace.json'}")
    for kind, share in shares.items():
        say(f"  {kind:12} {share:6.1%}")


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


def train(args, run, clip, training, validation, make_twins, clean_loss_fn=None, twin_loss_fn=None):
    """Fine-tune the visual tower on clean images and their twins; text tower and logit_scale stay frozen.

    make_twins      (step, indices, images) -> (B, 3, H, W) in [0, 1]: augmented or adversarial versions of the images
    clean_loss_fn   (image_features (B, D), indices) -> scalar, in place of the clean images' contrastive loss
    twin_loss_fn    likewise for the twins'
    returns         what metrics.json says of the training; writes log.jsonl, last.pt and best.pt into run.dir

    The loss is the mean of the clean and the twins' contrastive loss; both halves go through the tower together. The
    best epoch is the one of the highest white-box adversarial similarity on the validation images. Under torchrun the
    batch is --batch_size a process, and each loss is over the features of all. All random draws are functions of
    (seed, step, image): a state kept every --save_every minutes is enough to go on to the same files.
    """
    device, visual, batch_size = clip.device, clip.model.visual, args.batch_size * PROCESSES
    run.begin()
    clip.model.requires_grad_(False)
    visual.requires_grad_(True)
    visual.set_grad_checkpointing(args.grad_checkpointing)
    matrices = [p for p in visual.parameters() if p.ndim >= 2]
    others = [p for p in visual.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=device.type in ("cuda", "cpu"))
    text_features = clip.encode_text(training.captions)  # (N, D)
    ids = {caption: i for i, caption in enumerate(dict.fromkeys(training.captions))}
    caption_ids = torch.tensor([ids[caption] for caption in training.captions], device=device)
    steps_per_epoch = math.ceil(len(training) / batch_size)
    last_step = min(args.epochs * steps_per_epoch, args.max_steps or math.inf)
    if PROCESSES > 1:
        print(f"{PROCESSES} processes, {args.batch_size} images each: a global batch of {batch_size}")

    progressed = run.kept("state") or {"log": [], "epochs": [], "validating": 0.0, "began": run.seconds()}
    log, epochs = progressed["log"], progressed["epochs"]
    if log:
        try:
            visual.load_state_dict(progressed["visual"])
            optimizer.load_state_dict(progressed["optimizer"])
            restore_generators(progressed["generators"])
        except Exception as error:  # tensors of another training raise anything
            fail(f"{run.partial} does not hold a state of this training ({describe(error)}): --overwrite starts anew")

    def where(names):
        return f"images {', '.join(names)}; last good checkpoint: {run.dir / 'last.pt' if epochs else 'none yet'}"

    def save_state():
        tensors = {"visual": visual.state_dict(), "optimizer": optimizer.state_dict(), "generators": generators()}
        run.keep("state", progressed | tensors)

    wrapped = torch.nn.parallel.DistributedDataParallel(clip) if PROCESSES > 1 else clip
    saved, stopped = time.perf_counter(), None
    with (
        open(os.devnull if RANK else run.dir / "log.jsonl", "w", encoding="utf-8", buffering=1) as log_file,
        progress(None, "train", last_step, unit="step") as bar,
        first_interrupt() as interrupted,
    ):
        log_file.writelines(json.dumps(entry) + "\n" for entry in log)
        bar.update(len(log))
        for step in range(len(log), last_step):
            epoch, position = divmod(step, steps_per_epoch)
            order = np.random.default_rng([args.seed, epoch]).permutation(len(training))
            batch = order[position * batch_size : (position + 1) * batch_size]
            draw = np.random.default_rng([args.seed, step, 1]).permutation(len(training))
            draw = draw[~np.isin(draw, batch)][: args.num_negatives]
            own, own_ids = text_features[batch], caption_ids[batch]
            against = own, own_ids, text_features[draw], caption_ids[draw], clip.logit_scale
            visual.train()
            with profiled(args):
                mine = np.array_split(np.pad(batch, (0, -len(batch) % PROCESSES), mode="edge"), PROCESSES)[RANK]
                images = as_images(training.pixels[mine], device)
                twins = make_twins(step, mine, images)
                features = wrapped(torch.cat([images, twins])).chunk(2)  # clean, twins: (B, D) each
                if PROCESSES > 1:  # those of the others without gradient
                    features = open_clip.loss.gather_features(*features, rank=RANK, world_size=PROCESSES)
                clean_loss, twin_loss = (
                    loss_fn(x[: len(batch)], batch) if loss_fn else contrastive_loss(x[: len(batch)], *against)
                    for x, loss_fn in zip(features, (clean_loss_fn, twin_loss_fn))
                )
                loss = (clean_loss + twin_loss) / 2
                optimizer.zero_grad(set_to_none=True)
                (loss * PROCESSES).backward()  # each has its own images' part of the gradient; DDP takes the mean
                grad_norm = torch.nn.utils.clip_grad_norm_(visual.parameters(), args.grad_clip)
                if not (loss.isfinite() and grad_norm.isfinite()):
                    fail(f"step {step + 1} is not finite: loss {loss.item()}, gradient norm {grad_norm.item()}; "
                         f"{where([training.names[i] for i in batch])}")  # fmt: skip
                for group in optimizer.param_groups:
                    group["lr"] = args.lr * min(1, (step + 1) / max(1, args.warmup_steps))
                optimizer.step()
            entry = {"step": step + 1, "epoch": epoch + 1, "loss": loss.item(), "clean_loss": clean_loss.item()}
            log.append(entry | {"twin_loss": twin_loss.item(), "grad_norm": grad_norm.item(), "lr": group["lr"]})
            log_file.write(json.dumps(log[-1]) + "\n")
            bar.set_postfix(loss=f"{entry['loss']:.3f}", refresh=False)
            bar.update()
            window = gather([entry["loss"] for entry in log[-args.loss_window :]])[0]  # all stop at the same step
            if args.loss_threshold and len(window) == args.loss_window and np.mean(window) < args.loss_threshold:
                stopped = "loss_threshold"
            elif step + 1 == last_step:
                stopped = "max_steps" if last_step == args.max_steps else "epochs"
            if stopped or position + 1 == steps_per_epoch:
                figures = {"epoch": epoch + 1, "step": step + 1, "loss": float(np.mean(window))}
                paused = run.seconds()
                figures |= validate(args, clip, validation, lambda names, step=step: f"step {step + 1}; {where(names)}")
                progressed["validating"] += run.seconds() - paused
                best = figures["val_white_box"] > max((past["val_white_box"] for past in epochs), default=-math.inf)
                epochs.append(figures)
                if not RANK:
                    write_checkpoints(run.dir, ["last.pt", "best.pt"] if best else ["last.pt"], clip, args, figures,
                                      training, validation)  # fmt: skip
                say(
                    f"epoch {epoch + 1}/{args.epochs}  step {step + 1}  loss {figures['loss']:.3f}  validation clean "
                    f"{figures['val_clean']:.3f}, white-box {figures['val_white_box']:.3f}{'  *' if best else ''}"
                )
            if stopped:
                break
            leave = any(gather(bool(interrupted)))
            if not RANK and (leave or time.perf_counter() - saved >= 60 * args.save_every):
                save_state()
                saved = time.perf_counter()
            if leave:
                barrier()  # an end of rank 1 would have torchrun end rank 0 while it saves
                raise KeyboardInterrupt
    seconds = run.seconds() - progressed["began"]
    return {
        "n": len(training),
        "n_validation": len(validation),
        "steps": len(log),
        "stopped_by": stopped,
        "best_epoch": max(epochs, key=lambda figures: figures["val_white_box"])["epoch"],
        "epochs": epochs,
        "global_batch_size": batch_size,
        "training_seconds": seconds,
        "images_per_s": 2 * len(training) * len(log) / steps_per_epoch / (seconds - progressed["validating"]),
        "train_ids": training.coco_ids,
        "val_ids": validation.coco_ids,
        "skipped_images": training.skipped,
    }


def write_checkpoints(folder, names, clip, args, figures, training, validation):
    """The model as plain types that open_clip.create_model(name, pretrained=FILE) and weights_only=True open."""
    checkpoint = {
        "epoch": figures["epoch"],
        "name": clip.arch,
        "quick_gelu": bool(model_config(clip.arch).get("quick_gelu", False)),
        "state_dict": {key: value.cpu() for key, value in clip.model.state_dict().items()},
        "train_ids": sorted({*training.coco_ids, *clip.train_ids}),  # of the weights it started from, too
        "val_ids": validation.coco_ids,
        "args": {key: value for key, value in vars(args).items() if key not in NOT_IN_RESULT},
    }
    for name in names:
        save_torch(folder / name, checkpoint)


class ImageTower(torch.nn.Module):
    """open_clip's own image tower from pixels to features: (B, 3, S, S) float32 in [0, 1] -> (B, D), unit norm."""

    def __init__(self, clip):
        super().__init__()
        self.visual, self.mean, self.std = clip.model.visual, clip.mean, clip.std

    def forward(self, images):
        features = self.visual((images - self.mean) / self.std)
        return F.normalize(features[0] if isinstance(features, tuple) else features, dim=-1)


def check_export(args):
    """End unless --export DIR can be written when the training ends: to be called before anything takes hours."""
    if args.export is None or RANK:
        return
    folder, home = Path(args.export).resolve(), Path(args.output_dir).resolve()
    try:
        held = {path.name for path in folder.iterdir()} if folder.exists() else set()
        folder.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=folder.parent).cleanup()
    except OSError as error:
        fail(f"cannot write to --export {args.export}: {error.strerror}")
    if home.is_relative_to(folder) or folder.is_mount() or (held and "image_tower.pt2" not in held):
        fail(f"--export {args.export} is not a folder of its own: give one that is new or empty")
    if held and not args.overwrite and not exists(home / "metrics.json"):
        fail(f"--export {args.export} holds an export already: give another folder, or --overwrite")


def export(args):
    """Write best.pt of the finished run to --export DIR, whole or not at all; returns a line that says so.

    DIR holds open_clip_config.json and open_clip_model.safetensors, opened as local-dir:DIR, and image_tower.pt2, for
    torch.export.load and torch.onnx: float32 (B, 3, S, S) in [0, 1] to unit-norm features, for any B.
    """
    if RANK:
        return ""
    folder, checkpoint_file = Path(args.export).resolve(), Path(args.output_dir) / "best.pt"
    on_cpu = argparse.Namespace(**vars(args) | {"device": "cpu", "precision": "fp32"})
    clip = load_clip(on_cpu, str(checkpoint_file))
    require_disk(folder.parent, 2 * checkpoint_file.stat().st_size)
    no_files = types.SimpleNamespace(save_pretrained=lambda _: None)  # of open_clip's own tokenizer
    tokenizer = clip.tokenizer if hasattr(clip.tokenizer, "save_pretrained") else no_files
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        new, old = Path(temporary) / "new", Path(temporary) / "old"
        config, weights = new / "open_clip_config.json", new / "open_clip_model.safetensors"
        save_for_hf(clip.model, tokenizer, model_config(clip.arch), new, safe_serialization=True)
        write_json(config, read_json(config) | {"train_ids": sorted(clip.train_ids)})  # so that leakage is seen
        weights.chmod(config.stat().st_mode)  # safetensors writes for the owner alone
        images = torch.zeros(2, 3, *[image_size(clip.arch)] * 2)
        try:
            batches = {"images": {0: torch.export.Dim("batch")}}
            with torch.no_grad():
                tower = torch.export.export(ImageTower(clip).eval(), (images,), dynamic_shapes=batches)
            torch.export.save(tower, new / "image_tower.pt2")
        except Exception as error:  # a tower that torch cannot trace raises anything
            fail(f"--export: torch.export cannot take the image tower of {clip.arch}: {describe(error)}")
        if folder.exists():
            if {path.name for path in folder.iterdir()} - {path.name for path in new.iterdir()}:
                fail(f"--export {args.export} holds other files: give a new folder; {args.output_dir} is complete")
            before = folder / weights.name
            if before.exists() and not args.overwrite and not filecmp.cmp(before, weights, shallow=False):
                fail(f"--export {args.export} holds the export of another training: delete it, or give a new folder")
            folder.rename(old)
        new.rename(folder)
    return f"{args.export}: best.pt for open_clip, as local-dir:{args.export}, and for torch.export.load"


def generators():
    """The states of torch's global generators, equal in all processes; a tower with patch dropout draws from them."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]


def restore_generators(states):
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)


@contextmanager
def first_interrupt():
    """Yields a list that the first Ctrl-C fills; a second one ends the process at once."""
    asked = []

    def ask(*_):
        asked.append(True)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if not RANK:
            print("Ctrl-C: saving; once more leaves at once", file=sys.stderr)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def validate(args, clip, validation, where=", ".join):
    """Mean similarity on the validation images, clean and under white-box PGD against the present weights.

    where   names of images whose features are not finite -> what the last line says of them
    """

    def blame(bad):
        return where([validation.names[i] for i in bad])

    clip.model.visual.eval()
    text_features = clip.encode_text(validation.captions)
    pixels_adv, _ = attack_all(own_caption(clip.frozen(), text_features), validation, args, what="validate")
    clean, attacked = (encode_all(clip.encode_image, pixels, args, blame) for pixels in (validation.pixels, pixels_adv))
    return {
        "val_clean": (clean * text_features).sum(-1).mean().item(),
        "val_white_box": (attacked * text_features).sum(-1).mean().item(),
    }
