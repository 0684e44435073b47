"""How the attack and a training scale from one process to several: the scripts themselves, under torchrun.

    python tests/bench/scaling.py --json scaling.json     # on an idle machine: 1 and 2 processes, or 1 and all GPUs
    python tests/bench/scaling.py --processes 1 2 4 8
    python tests/bench/scaling.py --small                 # does it still run? Its figures mean nothing

Each process has the same work whatever their number, and one thread on a CPU. A rate is the sum of the processes' own,
from the end of their first batch to that of their last: start, validation and checkpoints are left out. Efficiency is
the rate over that of one process and over their number; the samples are taken in turn. Weights are random, images those
of tests/tiny at the size of the model. With a GPU also: how much of its time generation leaves it idle.
"""

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from speed import machine  # noqa: E402

import common  # noqa: E402

SCRIPTS = {"attack": "generate_pgd_adversarial.py", "training": "defend_clip_mat_v2.py"}
UNITS = {"attack": "image-steps/s", "training": "images/s"}
IDLE_TARGET = 0.05
EPOCH = {"epoch": 1, "val_white_box": 0.0}  # in place of a validation


def command(what, processes, args, folder):
    """The flags of a script whose every process has --batches batches."""
    out = tempfile.mkdtemp(dir=folder)
    words = [SCRIPTS[what], "--preset", "tiny", "--output_dir", out, "--num_workers", "2"]
    words += [] if args.small else ["--model", args.model, "--pretrained", "random"]
    batch, steps = (args.batch_size, args.steps) if what == "attack" else (processes * args.train_batch_size, 1)
    images = args.batches * (processes * batch if what == "attack" else batch)
    words += ["--num_images", images, "--batch_size", batch, "--steps", steps]
    words += ["--split", "train"] if what == "attack" else ["--epochs", 1, "--val_images", 1]
    return list(map(str, words))


def sample(what, processes, args, folder):
    """Units of work a second, all processes together."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    words = json.dumps(command(what, processes, args, folder))
    done = subprocess.run([*start, __file__, "--worker", words], capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"{what}, {processes} processes: {done.stderr[-2000:]}")
    batches = json.loads(done.stdout.strip().splitlines()[-1])
    return batches * (args.batch_size * args.steps if what == "attack" else 2 * args.train_batch_size)


def work(words):
    """Run a script in this process of several; rank 0 prints the batches that all did in a second."""
    ends, trainer = [], common.Trainer

    def clocked(function):
        def call(*given, **options):
            value = function(*given, **options)
            ends.append(time.perf_counter())
            return value

        return call

    common.pgd = clocked(common.pgd)
    trainer.end_step, trainer.end_epoch = clocked(trainer.end_step), lambda self: self.epochs.append(EPOCH)
    sys.argv = words
    with common.process_group():
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        print(sum(common.gather((len(ends) - 1) / (ends[-1] - ends[0]))))


def idle_share(args, folder):
    """Share of the time from the second batch of a generation to its last in which the GPU runs no kernel."""
    import generate_pgd_adversarial as script

    pgd, batches, began, seconds = common.pgd, [], 0.0, 0.0
    on_gpu = torch.cuda.is_available()
    kinds = torch.profiler.ProfilerActivity
    trace = torch.profiler.profile(activities=[kinds.CUDA if on_gpu else kinds.CPU])

    def traced(*given, **options):
        nonlocal began, seconds
        batches.append(1)
        if on_gpu and len(batches) in (2, args.batches):
            torch.cuda.synchronize()
        if len(batches) == args.batches:
            seconds = time.perf_counter() - began
            trace.stop()
        if len(batches) == 2:
            trace.start()
            began = time.perf_counter()
        return pgd(*given, **options)

    words = command("attack", 1, args, folder)[1:]
    common.pgd = traced
    try:
        script.main(script.parse_args(words))
    finally:
        common.pgd = pgd
    busy = 0.0
    for event in trace.key_averages():
        if (event.device_type != torch.autograd.DeviceType.CPU) == on_gpu and not event.is_user_annotation:
            busy += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    return 1 - busy / 1e6 / seconds


def main(argv=None):
    gpus = torch.cuda.device_count()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--processes", type=int, nargs="+", default=[1, max(2, gpus)], help="numbers (1, and 2 or GPUs)"
    )
    parser.add_argument("--model", default="ViT-L-14-quickgelu" if gpus else "ViT-B-32-quickgelu", help="(%(default)s)")
    parser.add_argument("--batch_size", type=int, default=16 if gpus else 4, help="of the attack (%(default)s)")
    parser.add_argument("--train_batch_size", type=int, default=16 if gpus else 4, help="a process (%(default)s)")
    parser.add_argument("--batches", type=int, default=5 if gpus else 3, help="a process, 3 at least (%(default)s)")
    parser.add_argument("--steps", type=int, default=100 if gpus else 5, help="of the attack (%(default)s)")
    parser.add_argument("--idle_batch_size", type=int, default=64, help="where idle time is measured (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="samples of each (%(default)s)")
    parser.add_argument("--small", action="store_true", help="a smoke test: the tiny CLIP, one sample")
    parser.add_argument("--json", type=Path, metavar="PATH", help="every sample and the machine go there (nowhere)")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        return work(args.worker)
    if args.small:
        args.batch_size, args.train_batch_size, args.batches, args.steps, args.repeats = 2, 2, 3, 2, 1
    if args.processes[0] != 1:
        parser.error("--processes starts with 1, to which the others are compared")
    record = machine()
    where = f"{record['gpu']}, nccl" if gpus else f"{record['cpu']}, {os.cpu_count()} cores, gloo, one thread a process"
    print(f"{where}, torch {torch.__version__}\n{record['date']}, medians of {args.repeats}, "
          f"{'the tiny CLIP, --small: figures mean nothing' if args.small else args.model}")  # fmt: skip
    if gpus and max(args.processes) > gpus:
        args.processes = [1]
        print(f"{gpus} GPU here: scaling is not measured")
    record["rates"] = {}
    print(f"{'':<12}{'processes':>10}{'rate':>9}  {'':<14}{'efficiency':>10}   samples")
    with tempfile.TemporaryDirectory() as folder:
        for what in SCRIPTS:
            rates = {n: [] for n in args.processes}
            for _ in range(args.repeats):
                for n in args.processes:
                    rates[n].append(sample(what, n, args, folder))
            for n, samples in rates.items():
                efficiency = median(samples) / median(rates[1]) / n
                taken = " ".join(f"{rate:.4g}" for rate in samples)
                print(
                    f"{what:<12}{n:>10}{median(samples):>9.4g}  {UNITS[what]:<14}{efficiency:>10.0%}   {taken}",
                    flush=True,
                )
            record["rates"][what] = rates
        if gpus:
            args.batch_size, args.batches, args.steps = (2, 3, 2) if args.small else (args.idle_batch_size, 6, 20)
            record["idle"] = idle_share(args, folder)
            verdict = "yes" if record["idle"] < IDLE_TARGET else "NO"
            print(f"GPU idle in generation {record['idle']:.1%}, target below {IDLE_TARGET:.0%}: {verdict}")
        else:
            print("no GPU here: its idle share in generation is not measured")
    if args.json:
        common.save(args.json, record)
    return None


if __name__ == "__main__":
    main()
