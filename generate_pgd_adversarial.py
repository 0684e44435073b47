#!/usr/bin/env python3
"""Make adversarial images with a caption-aware PGD attack, as a data set in the Hugging Face ImageFolder form.

Each image is moved inside an L-inf ball so that its cosine with its own caption falls as low as 20 steps can bring it:
Madry et al. 2018 (arXiv:1706.06083) from a uniform random start, keeping the best iterate. Attacked is the original
model, so these images measure *transfer* when they are shown to a defended one.

    python generate_pgd_adversarial.py --split train      # the images of caption-aware adversarial training
    python generate_pgd_adversarial.py --split eval       # the images of the transfer column

Files written to --output_dir (default runs/<preset>/adversarial_<split>):
    images/*.png     8 bits, rounded inside the ball
    metadata.jsonl   file_name, caption, coco_id, clean and adversarial similarity, linf in grey levels, sha256
    metrics.json     the sums, re-measured on the saved files
"""

import hashlib
import io
import json
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

import common
from common import attack_batches, attack_health, encode_all, linf_grey_levels, load_clip, load_examples, own_caption

KINDS = {"file_name": str, "caption": str, "coco_id": int, "clean_similarity": float, "adversarial_similarity": float}
KINDS |= {"linf": int, "sha256": str}  # of an entry of metadata.jsonl


def parse_args(argv=None):
    parser = common.make_parser(__doc__)
    group = parser.add_argument_group("generation (this script only)")
    group.add_argument("--split", choices=["train", "eval"], default="train", help="images to attack (default: train)")
    group.add_argument("--no_random_start", action="store_true", help="start at the image itself")
    return common.parse_flags(parser, argv, stage="adversarial_{split}", images="{split}", batch="attack")


def write_png(path, pixels):
    """Write uint8 (3, H, W); returns what the file holds, and its sha256."""
    image = Image.fromarray(pixels.transpose(1, 2, 0))
    # level 6 saves 5 % for 30 % more time
    common.replace_file(path, lambda temporary: image.save(temporary, "PNG", compress_level=1))
    data = path.read_bytes()
    with Image.open(io.BytesIO(data)) as saved:
        return np.asarray(saved).transpose(2, 0, 1), hashlib.sha256(data).hexdigest()


def unaltered(path, checksum):
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == checksum


def main(args):
    run = common.Run(args)
    examples = load_examples(args, args.split, args.num_images)
    clip = load_clip(args)
    common.require_disk(run.dir, 1.1 * examples.pixels.nbytes)
    folder = run.dir / "images"
    if folder.exists() and any(folder.iterdir()) and not (run.dir / ".run").exists():
        common.fail(f"{folder} holds files that this script did not make: give another --output_dir")
    # no COCO_val2014_ in the names: load_dataset would take val for a split and then miss metadata.jsonl
    files = [f"images/{coco_id:012d}.png" for coco_id in examples.coco_ids]
    run.begin()
    if not common.RANK:
        folder.mkdir(exist_ok=True)
        for stale in {*folder.iterdir()} - {run.dir / name for name in files}:  # of a run with more images
            stale.unlink()
    common.barrier()
    text_features = clip.encode_text(examples.captions)
    settled, parts = {}, []

    for start in range(len(files)):  # what a killed run of these flags has done

        def fits(part, start=start):
            here = slice(start, start + len(part["entries"]))
            rows = zip(part["entries"], files[here], examples.captions[here], examples.coco_ids[here], strict=True)
            sound = here.stop > start and common.fits_health(part["health"])
            for entry, *own in rows:
                sound &= {key: type(value) for key, value in entry.items()} == KINDS
                sound &= [entry["file_name"], entry["caption"], entry["coco_id"]] == own
                sound &= unaltered(run.dir / entry["file_name"], entry["sha256"])
            return sound

        if part := run.kept(start, fits):
            settled[start] = start + len(part["entries"])
            parts.append(part)

    def settle(here, written, attacked):
        """Measure a batch on its saved files."""
        saved, checksums = zip(*written)
        saved, own, clean = np.stack(saved), text_features[here], examples.pixels[here]
        cosines = [(encode_all(clip.encode_image, p, args) * own).sum(-1).tolist() for p in (clean, saved)]
        linf = linf_grey_levels(clean, saved).tolist()
        columns = files[here], examples.captions[here], examples.coco_ids[here], *cosines, linf, checksums
        part = {"entries": [dict(zip(KINDS, row)) for row in zip(*columns)]}
        parts.append(part | {"health": attack_health(clean, saved, attacked)})
        run.keep(here.start, parts[-1])

    loss_at = own_caption(clip.frozen(), text_features)
    batches = attack_batches(loss_at, examples, args, random_start=not args.no_random_start, settled=settled)
    pending, began, before = deque(), run.seconds(), sum(len(part["entries"]) for part in parts)
    with ThreadPoolExecutor(args.num_workers) as pool:  # the next batch is attacked while this one is written
        for here, pixels_adv, attacked in batches:
            paths = [run.dir / name for name in files[here]]
            pending.append((here, pool.map(write_png, paths, pixels_adv.numpy()), attacked))
            if len(pending) > 1:
                settle(*pending.popleft())
        while pending:
            settle(*pending.popleft())
    parts = {part["entries"][0]["file_name"]: part for share in common.gather(parts) for part in share}
    entry_of = {entry["file_name"]: entry for part in parts.values() for entry in part["entries"]}
    entries, health = [entry_of[name] for name in files], common.sum_health([p["health"] for p in parts.values()])
    finished = run.seconds()
    clean, adversarial = (np.array([e[f"{kind}_similarity"] for e in entries]) for kind in ("clean", "adversarial"))
    if not common.RANK:
        lines = "".join(json.dumps(entry) + "\n" for entry in entries)
        common.write_text(run.dir / "metadata.jsonl", lines)
    run.finish(
        clip.device,
        n=len(entries),
        clean_similarity=clean.mean(),
        adversarial_similarity=adversarial.mean(),
        share_lowered=(adversarial < clean).mean(),
        attack=health,
        images_per_s=(len(entries) - before) / (finished - began),
        skipped_images=examples.skipped,
    )
    print(
        f"{run.dir}: {len(entries)} images, similarity {clean.mean():.4f} -> {adversarial.mean():.4f}, lowered on "
        f"{(adversarial < clean).mean():.1%}, largest change {health['max_abs_delta_grey_levels']}/255"
    )


if __name__ == "__main__":
    common.run_main(main, parse_args())
