#!/usr/bin/env python3
"""Make adversarial images with a caption-aware PGD attack, as a data set in the Hugging Face ImageFolder form.

The attack searches an L-inf ball around each image for the lowest cosine with the image's own caption: PGD of Madry et
al. 2018 (arXiv:1706.06083) from a uniform random start; the best iterate is kept. It attacks the original model, so
these images measure *transfer* when they are shown to a defended model.

    python generate_pgd_adversarial.py --split train      # the images of caption-aware adversarial training
    python generate_pgd_adversarial.py --split eval       # the images of the transfer column

Files written to --output_dir (default runs/<preset>/adversarial_<split>):
    images/*.png     8 bits, rounded inside the ball
    metadata.jsonl   file_name, caption, coco_id, clean and adversarial similarity, linf in grey levels, sha256
    metrics.json     the means, measured on the saved files
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from PIL import Image

import common


def parse_args(argv=None):
    parser = common.make_parser(__doc__)
    flag = parser.add_argument_group("generation (this script only)").add_argument
    flag("--split", choices=["train", "eval"], default="train", help="images to attack")
    return common.parse_flags(parser, argv, lambda given: f"adversarial_{given.split}", lambda given: given.split)


def write_png(path, pixels):
    """Write uint8 (3, H, W) to a PNG; return the pixels read back from the file, and its sha256."""
    common.save(path, Image.fromarray(pixels.transpose(1, 2, 0)))
    data = path.read_bytes()
    return np.asarray(common.read_image(data, ["PNG"])).transpose(2, 0, 1), hashlib.sha256(data).hexdigest()


def main(args):
    rows, code = common.load_rows(args, args.split), common.code_checksums(__file__)
    run = common.Run(args, code, extends=["num_images"])
    done = earlier_entries(run, rows, args)
    if run.previous and run.previous["args"]["num_images"] >= args.num_images:
        run.report_complete()
        return
    clip = common.load_clip(args)
    examples = common.load_examples(args, args.split, rows, clip.geometry)
    if [entry["source"] for entry in done] != examples["checksum"][: len(done)]:
        common.fail(f"{run.dir} was made with other images or captions. {common.overwrite_advice()}")
    pixels, captions, ids = examples["pixels"], examples["caption"][:], examples["coco_id"][:]
    common.print_cost(clip, pixels, captions, (len(pixels) - len(done)) * args.steps)
    run.require_space(2.2 * len(pixels) * pixels[0].nbytes)  # the PNGs, and the batches that the run stores
    files = [common.image_file(name) for name in examples["name"]]
    (run.dir / "images").mkdir(exist_ok=True)

    attack, text_features = common.Attack(args.eps, args.alpha, args.steps, args.seed), clip.encode_text(captions)
    loss, entries, healths, writing = partial(common.own_caption, text_features), [], [], []
    precision, compared = common.accept_precision(attack, loss, pixels, clip)
    options = {"run": run, "first": len(done), "keys": examples["checksum"][:], "precision": precision}

    def score(here, written):
        """Score the files of a slice, once they are written, into entries."""
        saved, checksums = zip(*written)
        both = pixels[here], np.stack(saved)
        with common.tf32(args.split == "train"):  # no table shows these figures
            cosines = [(clip.encode_pixels(x) * text_features[here]).sum(-1).tolist() for x in both]
        linf = common.linf_grey_levels(*both).tolist()
        keys = "file_name", "caption", "coco_id", "clean_similarity", "adversarial_similarity", "linf", "sha256"
        columns = files[here], captions[here], ids[here], *cosines, linf, checksums
        sources = examples["checksum"][here]
        entries.extend(dict(zip((*keys, "source"), row)) for row in zip(*columns, sources))

    with ThreadPoolExecutor(args.num_workers) as pool:
        for here, pixels_adv, health in common.attack_images(attack, loss, pixels, clip, **options):
            for slice_before, written in writing:  # while this one was attacked
                score(slice_before, written)
            paths = [run.dir / file for file in files[here]]
            writing = [(here, pool.map(write_png, paths, pixels_adv.numpy()))]
            healths.append(health)
        for slice_before, written in writing:
            score(slice_before, written)
    entries, healths = (sum(shares, []) for shares in zip(*common.gather((entries, healths))))
    entries = done + entries
    health = common.sum_health([run.previous["attack"], *healths] if done else healths)
    if not common.RANK:
        common.save(run.dir / "metadata.jsonl", "".join(json.dumps(entry) + "\n" for entry in entries))
    clean, adversarial = (np.array([e[f"{kind}_similarity"] for e in entries]) for kind in ("clean", "adversarial"))
    run.finish(
        clip,
        n=len(entries),
        row_checksums=rows["checksum"][:],
        clean_similarity=clean.mean(),
        adversarial_similarity=adversarial.mean(),
        share_lowered=(adversarial < clean).mean(),
        attack=health,
        attack_precision=compared,
        images_per_s=(len(entries) - len(done)) / run.seconds(),
    )
    print(
        f"{run.dir}: {len(entries)} images, similarity {clean.mean():.4f} -> {adversarial.mean():.4f}, lowered on "
        f"{(adversarial < clean).mean():.1%}, largest change {health['max_abs_delta_grey_levels']}/255"
    )


def earlier_entries(run, rows, args):
    """Return the lines of metadata.jsonl of a complete run with fewer or more images; [] if there is none.

    Exit if the images that both runs have are not the same.
    """
    if not run.previous:
        return []
    was, now = run.previous["row_checksums"], rows["checksum"][:]
    both = min(len(was), len(now))
    changes = "other images or captions" if was[:both] != now[:both] else ""
    if len(was) < len(now) and run.changed:
        changes = f"other code ({run.changed})"  # the further images would not be comparable
    if changes:
        common.fail(f"{run.dir} was made with {changes}. {common.overwrite_advice()}")
    return common.read_entries(run.dir)[: run.previous["n"]]  # an extension that was killed may have written more


if __name__ == "__main__":
    common.run_main(main, parse_args())
