#!/usr/bin/env python3
"""Make adversarial images with a caption-aware PGD attack, as a data set in the Hugging Face ImageFolder form.

Each image is moved inside an L-inf ball so that its cosine with its own caption falls as low as 20 steps can bring it:
Madry et al. 2018 (arXiv:1706.06083) from a uniform random start, keeping the best iterate. Attacked is the original
model, so these images measure *transfer* when they are shown to a defended one.

    python generate_pgd_adversarial.py --split train      # the images of caption-aware adversarial training
    python generate_pgd_adversarial.py --split eval       # the images of the transfer column

Files written to --output_dir (default runs/<preset>/adversarial_<split>):
    images/*.png     8 bits, rounded inside the ball
    metadata.jsonl   file_name, caption, coco_id, clean and adversarial similarity, linf in grey levels
    metrics.json     the sums, re-measured on the saved files
"""

import json
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

import common
from common import attack_batches, attack_health, encode_all, linf_grey_levels, load_clip, load_examples, own_caption


def parse_args(argv=None):
    parser = common.make_parser(__doc__)
    group = parser.add_argument_group("generation (this script only)")
    group.add_argument("--split", choices=["train", "eval"], default="train", help="images to attack (default: train)")
    group.add_argument("--no_random_start", action="store_true", help="start at the image itself")
    return common.parse_flags(parser, argv, stage="adversarial_{split}", images="{split}", batch="attack")


def write_png(path, pixels):
    """Write uint8 (3, H, W) and return what the file holds. Level 1: level 6 saves 5 % for 30 % more time."""
    Image.fromarray(pixels.transpose(1, 2, 0)).save(path, compress_level=1)
    with Image.open(path) as image:
        return np.asarray(image).transpose(2, 0, 1)


def main(args):
    run = common.Run(args)
    examples = load_examples(args, args.split, args.num_images)
    clip = load_clip(args)
    common.require_disk(run.dir, 1.1 * examples.pixels.nbytes)
    folder = run.dir / "images"
    if folder.exists() and any(folder.iterdir()) and not (run.dir / ".run").exists():
        common.fail(f"{folder} holds files that this script did not make: give another --output_dir")
    run.begin()
    folder.mkdir(exist_ok=True)
    for stale in folder.glob("*.png"):  # of a run with more images
        stale.unlink()
    text_features = clip.encode_text(examples.captions)
    # no COCO_val2014_ in the names: load_dataset would take val for a split and then miss metadata.jsonl
    files = [f"images/{coco_id:012d}.png" for coco_id in examples.coco_ids]
    entries, healths = [], []

    def settle(start, written, attacked):
        """Measure a batch on its saved files."""
        saved = np.stack(list(written))
        here = slice(start, start + len(saved))
        own, clean = text_features[here], examples.pixels[here]
        healths.append(attack_health(clean, saved, attacked))
        cosines = [(encode_all(clip.encode_image, p, len(p), clip.device) * own).sum(-1) for p in (clean, saved)]
        columns = files[here], examples.captions[here], examples.coco_ids[here]
        for *row, clean_cosine, adv_cosine, linf in zip(*columns, *cosines, linf_grey_levels(clean, saved)):
            keys = "file_name", "caption", "coco_id", "clean_similarity", "adversarial_similarity", "linf"
            entries.append(dict(zip(keys, [*row, clean_cosine.item(), adv_cosine.item(), int(linf)])))

    loss_fn = own_caption(text_features)
    batches = attack_batches(clip.frozen(), examples, loss_fn, args, random_start=not args.no_random_start)
    pending, began = deque(), run.seconds()
    with ThreadPoolExecutor(args.num_workers) as pool:  # the next batch is attacked while this one is written
        for start, pixels_adv, attacked in batches:
            paths = [run.dir / name for name in files[start : start + len(pixels_adv)]]
            pending.append((start, pool.map(write_png, paths, pixels_adv.numpy()), attacked))
            if len(pending) > 1:
                settle(*pending.popleft())
        while pending:
            settle(*pending.popleft())
    finished, health = run.seconds(), common.sum_health(healths)
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    common.write_text(run.dir / "metadata.jsonl", lines)
    clean, adversarial = (np.array([e[f"{kind}_similarity"] for e in entries]) for kind in ("clean", "adversarial"))
    run.finish(
        clip.device,
        n=len(entries),
        clean_similarity=clean.mean(),
        adversarial_similarity=adversarial.mean(),
        share_lowered=(adversarial < clean).mean(),
        attack=health,
        images_per_s=len(entries) / (finished - began),
        skipped_images=examples.skipped,
    )
    print(
        f"{run.dir}: {len(entries)} images, similarity {clean.mean():.4f} -> {adversarial.mean():.4f}, lowered on "
        f"{(adversarial < clean).mean():.1%}, largest change {health['max_abs_delta_grey_levels']}/255"
    )


if __name__ == "__main__":
    main(parse_args())
