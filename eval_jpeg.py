#!/usr/bin/env python3
"""Measure JPEG compression as a defence: every image is encoded at a given quality before CLIP sees it.

Three conditions for each quality: clean images; transferred images, attacked on the model without JPEG, as in the
report; and adaptive ones, attacked through a differentiable JPEG codec with as many steps. All are scored on the real
JPEG bytes. evaluate.py has these qualities as rows of its table, with recall.

    python eval_jpeg.py
    python eval_jpeg.py --preset tiny --qualities 75 50 30

Files written to --output_dir (default runs/<preset>/jpeg):
    metrics.json   similarity of each condition, with per-image values
"""

import io
import math
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

import common
import generate_pgd_adversarial as generate
from common import as_images, own_caption


def parse_args(argv=None, given=None):
    parser = common.make_parser(__doc__)
    flag = parser.add_argument_group("JPEG (this script only)").add_argument
    flag("--qualities", type=common.number(1, 95), nargs="+", default=[75, 50, 30], help="1 to 95")
    flag("--attack_steps", type=common.number(1, 10**6), help="steps of the adaptive attack")
    flag("--adversarial_dir", help="made by --split eval; default: adversarial_eval beside --output_dir")
    return common.fill(parser.parse_args(argv, given), "jpeg", "eval")


def jpeg(images, quality):
    """Encode and decode images by Pillow's JPEG, rounded to 8 bits before; without a gradient.

    images    (B, 3, H, W) float32 in [0, 1]
    quality   Pillow's, 1 to 95; one number, or one per image
    returns   the same shape
    """

    def round_trip(image, quality):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=int(quality))
        return np.asarray(Image.open(buffer))

    pixels = (images.detach() * 255).round().byte().cpu().permute(0, 2, 3, 1).numpy()
    decoded = np.stack([round_trip(*pair) for pair in zip(pixels, np.broadcast_to(quality, len(pixels)))])
    return as_images(decoded.transpose(0, 3, 1, 2), images.device)


def differentiable_jpeg(images, quality):
    """Compute jpeg() with a gradient: (B, 3, H, W) float32 in [0, 1], before and after.

    Baseline JPEG as Pillow writes it (4:2:0) and libjpeg reads it, in floats. The forward pass rounds the coefficients;
    the backward pass uses the derivative of the cubic of Shin & Song 2017 ("JPEG-resistant adversarial images"), which
    tells which coefficients a small change can move. The identity in its place (BPDA, Athalye et al. 2018,
    arXiv:1802.00420) is far weaker: of 48 images it was the stronger attack on none.
    """
    height, width = images.shape[2:]
    x = F.pad(images, (0, -width % 16, 0, -height % 16), mode="replicate") * 255
    to_ycc = x.new_tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
    luma, *chroma = torch.einsum("ij,bjhw->bihw", to_ycc, x).split(1, 1)
    n = torch.arange(8, device=x.device)
    dct = torch.cos((2 * n[None] + 1) * n[:, None] * math.pi / 16) * 0.5  # (8, 8), orthonormal
    dct[0] = 8**-0.5
    tables = [quantisation_tables(int(q)) for q in np.broadcast_to(quality, len(x))]

    def quantise(plane, kind):  # (B, 1, H, W)
        table = x.new_tensor([pair[kind] for pair in tables]).view(-1, 1, 1, 8, 8)
        blocks = plane[:, 0].unfold(1, 8, 8).unfold(2, 8, 8)  # (B, H / 8, W / 8, 8, 8)
        c = dct @ blocks @ dct.T / table
        rounded = c.round().detach()
        cubic = (c - rounded) ** 3
        blocks = dct.T @ ((rounded + cubic - cubic.detach()) * table) @ dct
        return blocks.permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)[:, None]

    planes = [quantise(luma - 128, 0) + 128]
    for plane in chroma:
        half = quantise(F.avg_pool2d(plane, 2), 1)
        planes.append(F.interpolate(half, scale_factor=2, mode="bilinear", align_corners=False))
    rgb = torch.einsum("ij,bjhw->bihw", torch.linalg.inv(to_ycc), torch.cat(planes, 1))
    return (rgb[..., :height, :width] / 255).clamp(0, 1)


@lru_cache  # an attack asks for each image in each step
def quantisation_tables(quality):
    """Return Pillow's luma and chroma tables of a quality, 64 numbers each, row by row."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG", quality=quality)
    return [list(table) for table in Image.open(buffer).quantization.values()]


def main(args):
    run = common.Run(args, __file__, "eps attack_steps seed qualities", [])
    clip = common.load_clip(args)
    images = common.load_images(args, "eval", clip.geometry)
    transfer, made = generate.adversarial_images(args, "eval", clip, images)
    run.identify(model=clip.digest, images=images.digest(), transferred_images=common.digest(transfer))
    if run.done:
        run.report_done()
        return
    run.begin()
    text_features = clip.encode_text(images.own_captions)
    attack, qualities, wrong = common.white_box(args.eps, args.attack_steps, through_jpeg=True), {}, {}
    print(f"{len(images)} images       clean  transfer  adaptive")
    for q in args.qualities:
        def loss(encode_image, indices, q=q):
            return own_caption(text_features, lambda images: encode_image(differentiable_jpeg(images, q)), indices)

        def score(pixels, q=q):
            features = clip.encode_pixels(pixels, lambda images: clip.encode_image(jpeg(images, q)))
            return (features * text_features).sum(-1).tolist()

        adaptive, found = common.attack_all(attack, loss, images.pixels, clip, transfer, run, f"JPEG {q}")
        wrong[q] = {key: int(values.sum()) for key, values in found.items()}
        conditions = {"clean": images.pixels, "transfer": transfer, "adaptive": adaptive}
        per_image = {name: score(pixels) for name, pixels in conditions.items()}
        means = {f"{name}_similarity": sum(values) / len(values) for name, values in per_image.items()}
        qualities[q] = means | {"per_image": per_image}
        print(f"JPEG quality {q:<6}" + "".join(f"{value:10.4f}" for value in means.values()), flush=True)
    run.finish(clip.device, n=len(images), qualities=qualities, attack=wrong, transfer_note=made["note"])


if __name__ == "__main__":
    common.run_main(main, parse_args())
