#!/usr/bin/env python3
"""Make adversarial images with a caption-aware PGD attack, as a data set in the Hugging Face ImageFolder form.

The attack searches an L-inf ball around each image for the lowest cosine with the image's own caption: PGD of Madry et
al. 2018 (arXiv:1706.06083) from a uniform random start; the best iterate is kept. It attacks the original model, so
these images measure *transfer* when they are shown to a defended model. A folder that has some of the images already
is completed.

    python generate_pgd_adversarial.py --split train           # the images of caption-aware adversarial training
    python generate_pgd_adversarial.py --split eval            # the images of the transfer column
    python generate_pgd_adversarial.py --split eval --fetch    # download what that needs, on a node with a network

Files written to --output_dir (default runs/<preset>/adversarial_<split>):
    images/*.png     8 bits, rounded inside the ball
    metadata.jsonl   file_name, caption, coco_id, clean and adversarial similarity, linf in grey levels, whether a
                     gradient was zero or a value not finite, sha256 of the PNG, checksum of the source
    metrics.json     the means, measured on the saved files
"""

import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

import common

LINE = {"file_name", "caption", "clean_similarity", "adversarial_similarity", "linf", "sha256", "source"}


def parse_args(argv=None, given=None):
    parser = common.make_parser(__doc__)
    flag = parser.add_argument_group("generation (this script only)").add_argument
    flag("--split", choices=["train", "eval"], default="train", help="images to attack")
    flag("--fetch", action="store_true", help="load the model and the images, and end")
    args = parser.parse_args(argv, given)
    return common.fill(args, f"adversarial_{args.split}", args.split)


def main(args):
    run = open_run(args)
    clip = common.load_clip(args, training=args.split == "train")
    images = common.load_images(args, args.split, clip.geometry)
    if args.fetch:
        print(f"the model and {len(images)} images are here")
        return
    complete(run, args, clip, images)
    if not run.begun:
        run.report_done()


def open_run(args):
    return common.Run(args, __file__, "split eps alpha steps seed", ["images", *common.METADATA])


def adversarial_images(args, split, clip, images):
    """Return the adversarial images of another script's images; in the default folder, missing ones are made first.

    args      of the other script
    images    common.Images in the geometry of clip, the original model
    returns   uint8 (N, 3, H, W); {"folder", "seconds" that making them took, "note" on how they were made, or None}
    """
    batch_size = [] if hasattr(args, "lr") else ["--batch_size", args.batch_size]  # a training's is for the training
    own_args = common.stage_args(parse_args, args, f"adversarial_{split}", "--split", split, *batch_size)
    if args.adversarial_dir:
        folder = Path(args.adversarial_dir)
        pixels = read_only(folder, own_args, clip, images)
    else:
        run = open_run(own_args)
        folder, pixels = run.dir, complete(run, own_args, clip, images)
    record = common.read_record(folder / "run.json")
    seconds = record["seconds"] * len(images) / len(read_lines(folder))
    return pixels, {"folder": str(folder), "seconds": seconds, "note": note_on(folder, record, own_args)}


def complete(run, args, clip, images):
    """Make the adversarial images that a folder lacks; return all of them: uint8 (N, 3, H, W)."""
    run.identify(model=clip.digest, precision=clip.precision)
    with common.exit_on_error(f"--output_dir {run.dir}"):
        found = read_folder(run.dir, images, args.eps)
    missing = common.gather([i for i in range(len(images)) if i not in found])[0]  # as rank 0 sees the folder
    if not missing and run.done:
        return np.stack([found[i] for i in range(len(images))])

    clip.encode_text(images.own_captions)  # damaged weights end it here, before the folder is theirs
    clip.encode_pixels(images.pixels[:1])
    run.begin()
    write_lines(run.dir, images)
    if not common.RANK:
        shutil.rmtree(run.dir / "parts", ignore_errors=True)  # of a killed run; their lines are in metadata.jsonl now
    common.gather()
    found |= make(run, args, clip, images, missing)
    lines = write_lines(run.dir, images)
    figures = summarise(lines)
    run.finish(clip.device, **figures, images_per_s=len(lines) / run.seconds())
    mark = "" if figures["share_lowered"] >= 0.99 else " (!)"
    print(
        f"{run.dir}: {figures['n']} images, similarity {figures['clean_similarity']:.4f} -> "
        f"{figures['adversarial_similarity']:.4f}, lowered on {figures['share_lowered']:.1%}{mark}"
    )
    return np.stack([found[i] for i in range(len(images))])


def make(run, args, clip, images, missing):
    """Attack images, write their PNGs, and store their lines with the run: {index: uint8 (3, H, W) as written}."""
    (run.dir / "images").mkdir(exist_ok=True)
    attack = common.Attack(args.eps, args.alpha, args.steps, args.seed)
    text_features = clip.encode_text(images.own_captions)
    batches, made = common.my_batches(missing, args.batch_size), {}
    total = sum(map(len, batches)) * (args.steps + 1)
    with common.progress(what="attack", total=total, unit="image-step") as bar:
        for batch in batches:
            clean = images.pixels[batch]
            loss_fn = common.own_caption(text_features, clip.attack_encoder(), batch)
            step = partial(bar.update, len(batch))
            pixels_adv, wrong = common.attack_batch(attack, loss_fn, clean, clip, batch, after_step=step)

            files = [image_file(images.names[i]) for i in batch]
            with ThreadPoolExecutor(args.num_workers) as pool:
                written = list(pool.map(write_png, [run.dir / file for file in files], pixels_adv.numpy()))
            saved = np.stack([pixels for pixels, _ in written])
            with common.tf32(args.split == "train"):  # no table shows these figures
                similarities = [clip.similarity(pixels, text_features[batch]).tolist() for pixels in (clean, saved)]
            columns = {
                "file_name": files,
                "caption": [images.captions[i][0] for i in batch],
                "coco_id": [images.coco_ids[i] for i in batch],
                "clean_similarity": similarities[0],
                "adversarial_similarity": similarities[1],
                "linf": common.linf_grey_levels(clean, saved).tolist(),
                **{key: values.tolist() for key, values in wrong.items()},
                "sha256": [checksum for _, checksum in written],
                "source": [images.checksums[i] for i in batch],
            }
            run.save_part(files, [dict(zip(columns, values)) for values in zip(*columns.values())])
            made |= dict(zip(batch.tolist(), saved))
    return {i: pixels for part in common.gather(made) for i, pixels in part.items()}


def summarise(lines):
    """Return the figures of metrics.json."""
    columns = {key: np.array([line[key] for line in lines]) for key in lines[0] if key not in ("caption", "coco_id")}
    clean, adversarial = columns["clean_similarity"], columns["adversarial_similarity"]
    return {
        "n": len(lines),
        "clean_similarity": clean.mean(),
        "adversarial_similarity": adversarial.mean(),
        "share_lowered": (adversarial < clean).mean(),
        "max_abs_delta_grey_levels": columns["linf"].max(),
        "images_unmoved": (columns["linf"] == 0).sum(),
        "images_with_zero_gradients": columns["zero_gradient"].sum(),
        "images_with_nonfinite_values": columns["nonfinite"].sum(),
    }


def write_png(path, pixels):
    """Write uint8 (3, H, W) to a PNG; return the pixels read back from the file, and its sha256."""
    common.save(path, Image.fromarray(pixels.transpose(1, 2, 0)))
    data = path.read_bytes()
    return common.to_array(common.read_image(data)), hashlib.sha256(data).hexdigest()


def image_file(name):
    """Return the file of an adversarial image; without COCO's val2014, which load_dataset would take for a split."""
    return f"images/{name}.png"


def read_lines(folder):
    """Return the lines of metadata.jsonl, and those that a killed run has stored: {file_name: line}."""
    file, lines = folder / "metadata.jsonl", []
    try:
        if file.exists():
            lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        sound = all(line.keys() >= LINE and isinstance(line["file_name"], str) for line in lines)
    except (ValueError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise ValueError(f"{file} is damaged: restore it, or remove that folder")
    for part in sorted((folder / "parts").glob("*.pt")):
        lines += common.load_tensors(part) or []
    return {line["file_name"]: line for line in lines}


def write_lines(folder, images):
    """Write metadata.jsonl with the lines of parts, too; return all lines: of these images first, in their order."""
    lines = None
    if not common.RANK:
        found = read_lines(folder)
        wanted = [file for file in map(image_file, images.names) if file in found]
        lines = [found[file] for file in dict.fromkeys([*wanted, *found])]
    if lines:
        common.save(folder / "metadata.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return common.gather(lines)[0]


def read_folder(folder, images, eps, other="choose another --output_dir"):
    """Return the pixels of those of these images that a folder has: {index: uint8 (3, H, W)}.

    Raise ValueError if one of the images is another image's, was altered, or lies outside the ball.

    other   what to do about a folder of other images
    """
    lines, found = read_lines(folder), {}
    for i, name in enumerate(common.progress(images.names, "read", unit="image")):
        file = image_file(name)  # a path from the metadata would not be safe to open
        line = lines.get(file)
        if line is None or not (folder / file).exists():
            continue
        if (line["source"], line["caption"]) != (images.checksums[i], images.captions[i][0]):
            raise ValueError(f"it holds images of another data set, such as {file}: {other}")
        data, clean = (folder / file).read_bytes(), images.pixels[i]
        if hashlib.sha256(data).hexdigest() != line["sha256"]:
            raise ValueError(f"{file} was altered after it was made: restore it, or remove that folder")
        try:
            pixels = common.to_array(common.read_image(data))
        except Exception as error:  # a damaged file raises any exception
            damage = common.describe(error)
            raise ValueError(f"{file} is no image ({damage}): restore it, or remove that folder") from None
        if pixels.shape != clean.shape or common.linf_grey_levels(pixels, clean) > common.grey_levels(eps):
            raise ValueError(f"{file} is of another size than the image, or outside the ball around it")
        found[i] = pixels
    return found


def read_only(folder, args, clip, images):
    """Return the adversarial images of a folder that --adversarial_dir names; exit if one is missing."""
    remedy = "leave the flag out to have the images made"
    with common.exit_on_error(f"--adversarial_dir {folder}"):
        record = common.read_record(folder / "run.json")
        if not record:
            raise ValueError(f"it is no folder of generate_pgd_adversarial.py: {remedy}")
        wanted = {"script": Path(__file__).name, "split": args.split, "eps": args.eps, "model": clip.digest}
        for key, value in wanted.items():
            if record["identity"].get(key) != value:
                raise ValueError(f"it has {common.difference(key, record['identity'].get(key), value)}: {remedy}")
        found = read_folder(folder, images, args.eps, remedy)
        if len(found) < len(images):
            raise ValueError(f"it has {len(found)} of the {len(images)} images: {remedy}")
    return np.stack([found[i] for i in range(len(images))])


def note_on(folder, record, args):
    """Return a note on images of other code, or made with another seed, alpha or number of steps; else None."""
    was = record["identity"]
    changes = [flag for flag in ("alpha", "steps", "seed") if was[flag] != getattr(args, flag)]
    notes = [f"{folder} was made with {common.difference(flag, was[flag], getattr(args, flag))}" for flag in changes]
    if maker := common.other_maker(record, __file__):
        notes.append(f"{folder} was made by {maker}")
    return "; ".join(notes) or None


if __name__ == "__main__":
    common.run_main(main, parse_args())
