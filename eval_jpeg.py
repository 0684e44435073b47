#!/usr/bin/env python3
"""JPEG compression as a defence: encode every image at a given quality before CLIP sees it.

Three conditions for each quality: clean images, transferred adversarial images (made against the plain model, as in the
report), and an adaptive attack of the same budget that knows of the JPEG step: the real codec in the forward pass, its
gradient taken as the identity (BPDA, Athalye et al. 2018, arXiv:1802.00420). Every score is on the real JPEG bytes.
evaluate.py attacks JPEG harder, with a differentiable codec as well: read its figure before you trust this one.

    python eval_jpeg.py
    python eval_jpeg.py --preset tiny --qualities 75 50 30

Files written to --output_dir (default runs/<preset>/jpeg):
    metrics.json   similarity of each condition, with per-image values
"""

import common
from common import attack_all, encode_all, jpeg, load_clip, load_examples, own_caption


def parse_args(argv=None):
    parser = common.make_parser(__doc__)
    group = parser.add_argument_group("JPEG (this script only)")
    group.add_argument(
        "--qualities", type=common.number(1, 95), nargs="+", default=[75, 50, 30], help="1 to 95 (default: 75 50 30)"
    )
    group.add_argument("--adversarial_dir", help="of --split eval (default: adversarial_eval beside --output_dir)")
    return common.parse_flags(parser, argv, stage="jpeg", images="eval", batch="attack")


def main(args):
    folder = common.adversarial_folder(args, "eval", args.num_images)
    run = common.Run(args, [folder])
    examples = load_examples(args, "eval", args.num_images)
    clip = load_clip(args)
    transfer = common.load_adversarial(folder, examples, args)
    text_features = clip.encode_text(examples.captions)
    print(f"{len(examples)} images       clean  transfer  adaptive")
    qualities, health = {}, {}
    for q in args.qualities:

        def through(encode_image, q=q):
            return lambda images: encode_image(jpeg(images, q))

        loss_at = own_caption(through(clip.frozen()), text_features)
        if kept := run.kept(q, common.fits_attack(examples.pixels, args)):
            adaptive, health[q] = kept["pixels"], kept["health"]
        else:
            adaptive, health[q] = attack_all(loss_at, examples, args, what=f"JPEG {q}")
            if not common.RANK:
                run.keep(q, {"pixels": adaptive, "health": health[q]})
        conditions = {"clean": examples.pixels, "transfer": transfer, "adaptive": adaptive}
        per_image = {
            name: (encode_all(through(clip.encode_image), pixels, args) * text_features).sum(-1).tolist()
            for name, pixels in conditions.items()
        }
        mean = {f"{name}_similarity": sum(values) / len(values) for name, values in per_image.items()}
        qualities[q] = mean | {"per_image": per_image}
        print(f"JPEG quality {q:<6}" + "".join(f"{value:10.4f}" for value in mean.values()), flush=True)
    run.begin()
    run.finish(
        clip.device,
        n=len(examples),
        qualities=qualities,
        attack=health,
        coco_ids=examples.coco_ids,
        skipped_images=examples.skipped,
    )


if __name__ == "__main__":
    common.run_main(main, parse_args())
