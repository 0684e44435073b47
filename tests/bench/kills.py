"""SIGKILL at seeded random moments: does the same command go on, and end in the files of an undisturbed run?

    python tests/bench/kills.py --kills 30 --seed 0     # minutes; exit code 1 unless all are equal
    python tests/bench/kills.py --only online           # one kind of run; all of them without it

Each kind of run on the tiny preset is first timed undisturbed. The kills are spread over that time, and one to three of
them fall on each run; then the run is let end, and every file of its folder compared, byte for byte. The runs are
processes forked from this one, which has done the imports, so that no moment is spent on imports.
"""

import argparse
import json
import os
import random
import runpy
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import torch  # noqa: E402

import evaluate  # noqa: E402, F401 - it imports what all need

# of metrics.json: when and where, how long, how much memory
IGNORED = ["started", "seconds", "training_seconds", "images_per_s", "image_steps_per_s", "peak_memory_bytes"]
IGNORED += ["commit", "argv"]
IGNORED_ARGS = ["output_dir"]
TRAINING = ["--num_images", 96, "--val_images", 16, "--epochs", 3, "--steps", 5, "--save_every", 0.01]
KINDS = {
    "generation": ["generate_pgd_adversarial.py", "--num_images", 160, "--batch_size", 16, "--steps", 10],
    "offline": ["defend_clip_pgd_v2.py", *TRAINING, "--adversarial_dir", "{shared}/adversarial_train"],
    "online": ["defend_clip_pgd_v2.py", *TRAINING, "--online_steps", 5],
    "evaluation": ["evaluate.py", "--sanity", "--num_images", 24, "--steps", 5, "--attack_steps", 5]
    + ["--qualities", 50, "--adversarial_dir", "{shared}/adversarial_eval"],
}


def start(words, shared, out):
    """The id of a forked process that runs a script; what it says goes to OUT.log."""
    words = [*words, "--preset", "tiny", "--device", "cpu", "--cache_dir", shared / "cache", "--output_dir", out]
    words = [str(word).format(shared=shared) for word in words]
    child = os.fork()
    if child:
        return child
    log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        torch.set_num_threads(1)
        sys.argv = [str(ROOT / words[0]), *words[1:]]
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def run(words, shared, out, seconds=None):
    """Let it end, or kill it after so many seconds: True if it was killed; an error of its own ends this script."""
    child, began = start(words, shared, out), time.perf_counter()
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if seconds is not None and time.perf_counter() - began >= seconds:
            os.kill(child, signal.SIGKILL)
            seconds = None
        time.sleep(0.002)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL):
        sys.exit(f"{' '.join(map(str, words))} ended with exit code {code}:\n{Path(f'{out}.log').read_text()}")
    return code == -signal.SIGKILL


def contents(folder):
    """{path: bytes}, metrics.json parsed and without what is ignored."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    record = json.loads(files["metrics.json"])
    record["args"] = {key: value for key, value in record["args"].items() if key not in IGNORED_ARGS}
    files["metrics.json"] = {key: value for key, value in record.items() if key not in IGNORED}
    return files


def progress(folder):
    """How far a killed run was, from the files that it left."""
    if not folder.exists():
        return "no folder yet"
    images, log = len(list(folder.glob("images/*.png"))), folder / "log.jsonl"
    kept, temporary = len(list(folder.glob(".partial/*.pt"))), len([*folder.rglob("*.tmp")])
    said = [f"{images} images"] if images else []
    said += [f"{len(log.read_text().splitlines())} steps"] if log.exists() else []
    said += [f"{kept} parts kept", *([f"{temporary} half-written files"] if temporary else [])]
    return ", ".join(said) + (", complete" if (folder / "metrics.json").exists() else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--only", choices=KINDS, action="append", help="a kind of run; repeatable (all)")
    args = parser.parse_args()
    kinds, rng, began = args.only or list(KINDS), random.Random(args.seed), time.perf_counter()
    print(f"ignored in metrics.json: {', '.join(IGNORED)}, args.{', args.'.join(IGNORED_ARGS)}", flush=True)
    good = 0
    with tempfile.TemporaryDirectory() as folder:
        shared = Path(folder)
        for split, words in {"train": TRAINING[:2], "eval": ["--num_images", 24]}.items():
            words = ["generate_pgd_adversarial.py", "--split", split, *words, "--steps", 5]
            run(words, shared, shared / f"adversarial_{split}")
        for place, kind in enumerate(kinds):
            clock, whole = time.perf_counter(), shared / kind
            run(KINDS[kind], shared, whole)
            seconds = time.perf_counter() - clock
            count = args.kills // len(kinds) + (place < args.kills % len(kinds))
            print(f"\n{kind}: undisturbed {seconds:.1f} s, {len(contents(whole))} files; {count} kills", flush=True)
            shares = [(i + rng.random()) / count for i in range(count)]  # of the undisturbed time
            rng.shuffle(shares)
            case = 0
            while shares:
                case, out = case + 1, shared / f"{kind}_{case}"
                mine, killed = sorted(shares[: rng.randint(1, 3)]), 0
                for share, before in zip(mine, [0, *mine]):
                    # a process that goes on has less to do, and starts like any other: a twentieth for that
                    moment = (share - before + (0.05 if before else 0)) * seconds
                    if not run(KINDS[kind], shared, out, moment):
                        print(f"  run {case}: ended before {moment:.2f} s; that kill falls on the next run", flush=True)
                        break
                    killed += 1
                    print(f"  run {case}: killed after {moment:.2f} s, {share:.0%}: {progress(out)}", flush=True)
                if killed < len(mine):  # the machine was faster than when it was timed
                    mine[killed] *= 0.9
                shares = mine[killed:] + shares[len(mine) :]
                run(KINDS[kind], shared, out)
                files, others = contents(out), contents(whole)
                wrong = sorted(name for name in files.keys() | others.keys() if files.get(name) != others.get(name))
                print(f"  run {case}: {f'NOT EQUAL: {wrong}' if wrong else 'equal'}", flush=True)
                good += 0 if wrong else killed
    print(f"\n{good} of {args.kills} equal, {(time.perf_counter() - began) / 60:.1f} min")
    return good != args.kills


if __name__ == "__main__":
    sys.exit(main())
