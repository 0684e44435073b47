"""Do images that keep their caption in a finished table fall to attacks that the table does not have?

    python tests/bench/survivors.py --preset tiny --seeds 3 --trainings mat pgd online    # the flags of the table

Each survivor is attacked ten times more, from new noise each time, with 100 steps: five times towards each of its five
nearest wrong captions alone (cosine of that caption minus the own one, plain sign steps that halve at 50 and 75 %), and
five times under the cross-entropy over all captions (temperature 1/20, momentum). Printed: how many of how many fall.
"""

import json
import logging
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: E402
import evaluate  # noqa: E402

STARTS, STEPS = 5, 100


def search(loss_fn, images, eps, momentum, seed):
    """Sign steps from noise inside the ball: the images after the last step, rounded to 8 bits."""
    generator = torch.Generator().manual_seed(seed)
    lower, upper = (images - eps).clamp(min=0), (images + eps).clamp(max=1)
    noise = torch.rand(images.shape, generator=generator).to(images.device)
    x, velocity = lower + noise * (upper - lower), 0
    for step in range(STEPS):
        x.requires_grad_()
        (grad,) = torch.autograd.grad(loss_fn(x).sum(), x)
        velocity = momentum * velocity + grad / grad.abs().mean((1, 2, 3), keepdim=True)
        size = eps / 4 / 2 ** ((step >= STEPS // 2) + (step >= 3 * STEPS // 4) + (step >= 9 * STEPS // 10))
        x = (x + size * velocity.sign()).clamp(lower, upper).detach()
    return x


def second_look(row, args):
    """Return which images of a row lose their caption to one of the attacks: (N,) bool."""
    encode, text = row.clip.attack_encoder(), row.clip.encode_text(row.captions)
    images, index = common.as_images(row.pixels, row.clip.device), np.arange(len(row.pixels))
    own, wrong = row.own.to(text.device), row.wrong_captions(index).to(text.device)
    with torch.no_grad():
        nearest = (encode(images) @ text.T).masked_fill(~wrong, -torch.inf).topk(5).indices  # (N, 5)
    fallen = np.zeros(len(images), bool)
    for start in range(STARTS):

        def towards(x, start=start):
            return (encode(x) * (text[nearest[:, start]] - text[own])).sum(-1)

        def entropy(x):
            return F.cross_entropy(20 * encode(x) @ text.T, own, reduction="none")

        for loss, momentum in ((towards, 0.0), (entropy, 0.9)):
            found = common.to_pixels(search(loss, images, args.eps, momentum, 99 + start), row.pixels, args.eps)
            fallen |= evaluate.first_share(evaluate.score(row, found, args.seed)) == 0
    return fallen


def main(args):
    data, record = evaluate.load_evaluation(args), json.loads(Path(args.output_dir, "metrics.json").read_text())
    for name, spec in evaluate.list_rows(args).items():
        ranks = np.array(record["per_image"][name]["white_box"]["rank_i2t"])
        survivors = np.flatnonzero(ranks == 0)
        if len(survivors) and not spec.fronts:
            row = evaluate.load_row(args, name, spec, data).part(survivors)
            print(f"{name}: {second_look(row, args).sum()} of {len(survivors)} fall", flush=True)


if __name__ == "__main__":
    logging.disable(logging.ERROR)  # of open_clip, for weights that are read later
    main(evaluate.parse_args())
