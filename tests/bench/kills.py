"""SIGKILL at seeded random moments: does the same command go on, and end in the files of an undisturbed run?

    python tests/bench/kills.py --kills 14 --seed 0     # minutes; exit code 1 unless all are equal
    python tests/bench/kills.py --only online           # one kind of run; all of them without it
    python tests/bench/kills.py --small                 # does it still run? A kill of each kind, less work

Each kind of run on the tiny preset is first timed undisturbed. The kills are spread over that time, and one to three of
them fall on each run; then the run is let end, and every file of its folder compared, byte for byte. The runs are
processes forked from this one, which has done the imports, so that no moment is spent on imports.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from conftest import VARYING, contents, fork, join  # noqa: E402

import evaluate  # noqa: E402, F401 - it imports what all need


def commands(images=96, steps=5, epochs=3):
    """Return {kind of run: its command}; the first two make what others read."""
    generate = ["generate_pgd_adversarial.py", "--steps", steps, "--batch_size", 16, "--num_images"]
    training = ["--num_images", images, "--val_images", 8, "--epochs", epochs, "--steps", steps, "--save_every", 0.01]
    offline = [*training, "--adversarial_dir", "{shared}/adversarial_train"]
    table = ["--num_images", images // 4, "--steps", steps, "--attack_steps", steps]
    table += ["--adversarial_dir", "{shared}/adversarial_eval"]
    return {
        "adversarial_train": [*generate, images],
        "adversarial_eval": [*generate, images // 4, "--split", "eval"],
        "mat": ["defend_clip_mat_v2.py", *training],
        "offline": ["defend_clip_pgd_v2.py", *offline],
        "online": ["defend_clip_pgd_v2.py", *training, "--online_steps", steps],
        "evaluation": ["evaluate.py", *table, "--trainings", "--qualities", 50, "--sanity"],
        "jpeg": ["eval_jpeg.py", *table, "--batch_size", 8],
    }


def run(words, shared, out, seconds=None):
    """Let it end, or kill it after so many seconds: True if it was killed; an error of its own ends this script."""
    words = [*words, "--preset", "tiny", "--device", "cpu", "--output_dir", out]
    words = [str(word).format(shared=shared) for word in words]
    child, began = fork(f"{out}.log", words, figures=True), time.perf_counter()
    while not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if seconds is not None and time.perf_counter() - began >= seconds:
            os.kill(child, signal.SIGKILL)
            seconds = None
        time.sleep(0.002)
    code, _, lines = join(child, f"{out}.log")
    if code not in (0, -signal.SIGKILL):
        sys.exit(f"{' '.join(words)} ended with exit code {code}: {lines}")
    return code == -signal.SIGKILL


def progress(folder):
    """How far a killed run was, from the files that it left."""
    if not folder.exists():
        return "no folder yet"
    images, log = len(list(folder.glob("images/*.png"))), folder / "log.jsonl"
    kept, temporary = len(list(folder.glob("parts/*.pt"))), len([*folder.rglob("*.tmp")])
    said = [f"{images} images"] if images else []
    said += [f"{len(log.read_text().splitlines())} steps"] if log.exists() else []
    said += [f"{kept} parts kept", *([f"{temporary} half-written files"] if temporary else [])]
    return ", ".join(said) + (", complete" if (folder / "metrics.json").exists() else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=14, help="in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--only", choices=commands(), action="append", help="a kind of run; repeatable (all)")
    parser.add_argument("--small", action="store_true", help="a smoke test: one kill of each kind")
    args = parser.parse_args()
    kinds, rng, began = commands(16, 1, 2) if args.small else commands(), random.Random(args.seed), time.perf_counter()
    chosen = args.only or list(kinds)
    args.kills = len(chosen) if args.small else args.kills
    print(f"ignored in run.json and metrics.json: {', '.join(VARYING)}, args.output_dir", flush=True)
    good = 0
    with tempfile.TemporaryDirectory() as folder:
        shared = Path(folder)
        for kind, words in kinds.items():
            if kind not in [*chosen, "adversarial_train", "adversarial_eval"]:
                continue
            clock, whole = time.perf_counter(), shared / kind
            run(words, shared, whole)
            seconds = time.perf_counter() - clock
            count = len(range(chosen.index(kind), args.kills, len(chosen))) if kind in chosen else 0
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
                    if not run(words, shared, out, moment):
                        print(f"  run {case}: ended before {moment:.2f} s; that kill falls on the next run", flush=True)
                        break
                    killed += 1
                    print(f"  run {case}: killed after {moment:.2f} s, {share:.0%}: {progress(out)}", flush=True)
                if killed < len(mine):  # the machine was faster than when it was timed
                    mine[killed] *= 0.9
                shares = mine[killed:] + shares[len(mine) :]
                run(words, shared, out)
                files, others = contents(out), contents(whole)
                wrong = sorted(name for name in files.keys() | others.keys() if files.get(name) != others.get(name))
                print(f"  run {case}: {f'NOT EQUAL: {wrong}' if wrong else 'equal'}", flush=True)
                good += 0 if wrong else killed
    print(f"\n{good} of {args.kills} equal, {(time.perf_counter() - began) / 60:.1f} min")
    return good != args.kills


if __name__ == "__main__":
    sys.exit(main())
