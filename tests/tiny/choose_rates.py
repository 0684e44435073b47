#!/usr/bin/env python3
"""Choose the learning rates of the tiny preset on images of the training split that no training or validation sees.

    python tests/tiny/choose_rates.py                                           # all trainings, hours on one CPU core
    python tests/tiny/choose_rates.py --trainings online --rates 4e-4 1.6e-3 --seeds 3 --json online.json

Each training of evaluate.py's table is made at every rate with seed 0. Of the rates that cost at most 5 points of clean
R@1 against the original, or else of the cheapest, the one with the best white-box R@1 is chosen, then cosine. --seeds
adds further seeds at that rate. White-box is the table's: the cosine attack, then the margin attack, from images that
were attacked on the original model. Every training has a folder of its own under --output_dir; one that is complete is
not made again.
"""

import argparse
import importlib
import json
import logging
import shlex
import sys
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: E402
import evaluate  # noqa: E402


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=common.Formatter)
    flag = parser.add_argument
    flag("--trainings", nargs="+", choices=evaluate.TRAININGS, default=[*evaluate.TRAININGS], help="which")
    flag("--rates", nargs="+", type=float, default=[1e-4, 4e-4, 1.6e-3, 6.4e-3], help="learning rates")
    flag("--seeds", type=int, default=1, help="trainings at the chosen rate")
    flag("--num_images", type=int, default=200, help="images to choose on")
    flag("--preset", choices=["tiny", "smoke"], default="tiny", help="smoke: to try this script")
    flag("--output_dir", default="runs/rates", help="folder of the trainings")
    flag("--json", default=common.ROOT / "tests" / "records" / "rates.json", help="the record")
    return parser.parse_args(argv)


def load_row(args, words):
    """Return the flags to measure with, the examples, and the original model's evaluate.Row with transferred images."""
    training = importlib.import_module("defend_clip_mat_v2").parse_args(words)  # all trainings use the same images
    seen = training.num_images + training.val_images
    rows = common.load_rows(training, "train", seen + args.num_images).select(range(seen, seen + args.num_images))
    flags = evaluate.parse_args(words)
    clip = common.load_clip(flags)
    examples = common.load_examples(flags, "train", rows, clip.geometry)
    loss = partial(common.own_caption, clip.encode_text(examples["caption"][:]))
    pixels = examples[:]["pixels"]
    transfer, _ = common.attack_all(common.Attack(flags.eps, flags.alpha, flags.steps), loss, pixels, clip)
    candidates = evaluate.load_candidates("evaluation", examples)
    return flags, examples, evaluate.Row("original", clip, pixels, transfer.numpy(), *candidates)


def train(args, words, name, rate, seed):
    """Make a training that is not complete, and return its folder."""
    _, script, *flags = evaluate.TRAININGS[name]
    folder = Path(args.output_dir, f"{name}_lr{rate:g}_seed{seed}")
    flags += ["--lr", rate, "--seed", seed, "--output_dir", folder]
    if seed and name.startswith("pgd"):  # the seeds share the adversarial images of the first
        flags += ["--adversarial_dir", Path(args.output_dir, "adversarial_train")]
    module = importlib.import_module(Path(script).stem)
    module.main(module.parse_args([*words, *map(str, flags)]))
    return folder


def measure(flags, examples, original, folder=None):
    """Return clean R@1, white-box R@1 and white-box cosine of a training on the examples, or of the original model."""
    source = folder and f"local-dir:{folder}"
    row = evaluate.load_row(flags, str(folder or "original"), evaluate.Spec("", source), original, examples)
    found, _ = evaluate.attack_both(common.white_box(flags.eps, flags.attack_steps), row, flags.seed)
    clean = evaluate.score(row, row.pixels, flags.seed)
    cosine, recall = evaluate.mean_worst([evaluate.score(row, pixels, flags.seed) for pixels in (row.transfer, *found)])
    return {"clean R@1": float((clean["rank_i2t"] == 0).mean()), "white-box R@1": recall, "white-box cosine": cosine}


def choose(clean, found):
    """Return the best rate of {rate: figures}; clean is the original's clean R@1."""
    costs = {rate: clean - figures["clean R@1"] for rate, figures in found.items()}
    allowed = max(0.05, min(costs.values())) + 1e-9  # of shares of a few hundred images
    cheap = [rate for rate in found if costs[rate] <= allowed]
    return max(cheap, key=lambda rate: (found[rate]["white-box R@1"], found[rate]["white-box cosine"]))


def main(args):
    words = ["--preset", args.preset, "--cache_dir", str(Path(args.output_dir, "cache"))]
    flags, examples, original = load_row(args, words)
    command = shlex.join(["python", "tests/tiny/choose_rates.py", *sys.argv[1:]])
    record = {"command": command, "commit": common.git_commit(), "n": len(examples), "trainings": {}}
    record["original"] = measure(flags, examples, original)

    def measured(name, rate, seed):
        figures = measure(flags, examples, original, train(args, words, name, rate, seed))
        print(name, f"{rate:g}", "seed", seed, *(f"{key} {value:.3f}" for key, value in figures.items()), flush=True)
        return figures

    for name in args.trainings:
        found = {rate: measured(name, rate, 0) for rate in args.rates}
        rate = choose(record["original"]["clean R@1"], found)
        seeds = {seed: measured(name, rate, seed) if seed else found[rate] for seed in range(args.seeds)}
        mean = {key: float(np.mean([figures[key] for figures in seeds.values()])) for key in found[rate]}
        record["trainings"][name] = {"rates": found, "chosen": rate, "seeds": seeds, "mean": mean}
        print(f"{name}: chosen {rate:g}", flush=True)
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    logging.disable(logging.ERROR)  # of open_clip, for weights that are read later
    main(parse_args())
