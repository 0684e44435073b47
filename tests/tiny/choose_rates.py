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
import json
import logging
import shlex
import sys
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: E402
import defend_clip_mat_v2 as mat  # noqa: E402
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


def load_data(args, words):
    """Return the flags to measure with, and the images to choose on, attacked on the original model."""
    training, flags = mat.parse_args(words), evaluate.parse_args(words)
    clip, seen = common.load_clip(flags), training.num_images + training.val_images  # the same of all trainings
    images = common.load_images(training, "train", clip.geometry, seen, args.num_images)
    loss = partial(common.own_caption, clip.encode_text(images.own_captions))
    transfer, _ = common.attack_all(common.Attack(flags.eps, flags.alpha, flags.steps), loss, images.pixels, clip)
    return flags, evaluate.Evaluation(images, transfer.numpy(), None, clip.geometry, clip.digest, clip.weights_digest)


def train(args, words, name, rate, seed):
    """Make a training that is not complete, and return its folder."""
    _, script, flags = evaluate.TRAININGS[name]
    folder = Path(args.output_dir, f"{name}_lr{rate:g}_seed{seed}")
    flags = [*flags.split(), "--lr", rate, "--seed", seed, "--output_dir", folder]
    if seed and name.startswith("pgd"):  # the seeds share the adversarial images of the first
        flags += ["--adversarial_dir", Path(args.output_dir, "adversarial_train")]
    script.main(script.parse_args([*words, *map(str, flags)]))
    return folder


def measure(flags, data, folder=None):
    """Return clean R@1, white-box R@1 and white-box cosine of a training on the data, or of the original model."""
    name, source = str(folder or "original"), folder and f"local-dir:{folder}"
    row = evaluate.load_row(flags, name, evaluate.Spec(name, source), data)
    clean, transfer = (evaluate.score(row, pixels, flags.seed) for pixels in (row.pixels, row.transfer))
    attacked = evaluate.under_attack(row, common.white_box(flags.eps, flags.attack_steps), flags.seed)
    worst = evaluate.worst_of([transfer, attacked])
    recalls = [float((scored["rank_i2t"] == 0).mean()) for scored in (clean, worst)]
    figures = *recalls, float(worst["similarity"].mean())
    return dict(zip(["clean R@1", "white-box R@1", "white-box cosine"], figures))


def choose(clean, found):
    """Return the best rate of {rate: figures}; clean is the original's clean R@1."""
    costs = {rate: clean - figures["clean R@1"] for rate, figures in found.items()}
    allowed = max(0.05, min(costs.values())) + 1e-9  # of shares of a few hundred images
    cheap = [rate for rate in found if costs[rate] <= allowed]
    return max(cheap, key=lambda rate: (found[rate]["white-box R@1"], found[rate]["white-box cosine"]))


def main(args):
    words = ["--preset", args.preset, "--cache_dir", str(Path(args.output_dir, "cache"))]
    flags, data = load_data(args, words)
    command = shlex.join(["python", "tests/tiny/choose_rates.py", *sys.argv[1:]])
    record = {"command": command, "commit": common.git_commit(), "n": len(data.images), "trainings": {}}
    record["original"] = measure(flags, data)

    def measured(name, rate, seed):
        figures = measure(flags, data, train(args, words, name, rate, seed))
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
