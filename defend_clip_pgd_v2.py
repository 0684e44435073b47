#!/usr/bin/env python3
"""Caption-aware adversarial training: fine-tune CLIP's visual tower on clean and adversarial images.

Each batch holds every image and its adversarial twin; the loss is the mean of the clean and the adversarial loss, each
contrastive as in TeCoA (Mao et al. 2023, arXiv:2212.07016), or the distance of FARE (Schlarmann et al. 2024,
arXiv:2402.12336) to the original model's features. The twins are

    offline (the report's, the default): made once against the original model by generate_pgd_adversarial.py, which this
        script runs first if --adversarial_dir is not there. The model can learn them by heart: look at the white-box
        figures, not at the transfer ones;
    online (--online_steps K): made during training against the present weights by K steps of PGD (Madry et al. 2018),
        starting from the offline ones, or from noise with --online_start noise.

    python defend_clip_pgd_v2.py --batch_size 16 --lr 1e-5 --epochs 3 --loss_threshold 0.1
    python defend_clip_pgd_v2.py --preset tiny --online_steps 3 --online_start noise --num_images 1200 --lr 4e-4

Files written to --output_dir (default runs/<preset>/pgd, with --online_steps runs/<preset>/online):
    best.pt, last.pt   checkpoints that open_clip.create_model(NAME, pretrained=FILE) opens
    log.jsonl          one line per step
    metrics.json       validation figures of every epoch, wall time, the COCO ids trained on
--export DIR, of a finished run, too: best.pt as the model local-dir:DIR of open_clip, and DIR/image_tower.pt2 for
torch.export.load and torch.onnx, float32 (B, 3, S, S) in [0, 1] to unit-norm features.
"""

import argparse

import common


def parse_args(argv=None):
    parser = common.make_parser(__doc__)
    common.add_train_args(parser)
    group = parser.add_argument_group("adversarial images (this script only)")
    group.add_argument("--adversarial_dir", help="of --split train (default: adversarial_train beside --output_dir)")
    group.add_argument("--online_steps", type=common.number(0), default=0, help="PGD steps a batch; 0: offline (0)")
    group.add_argument(
        "--online_start",
        choices=["offline", "noise"],
        default="offline",
        help="of the online steps (offline)",
    )
    group.add_argument(
        "--adversarial_loss",
        choices=["contrastive", "fare"],
        help="fare: squared L2 distance of the adversarial feature to the original model's clean one "
        "(default: contrastive offline, fare online)",
    )
    group.add_argument(
        "--clean_loss", choices=["contrastive", "fare"], help="of the clean half (default: that of --adversarial_loss)"
    )
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--online_steps", default="0")
    online = chooser.parse_known_args(argv)[0].online_steps != "0"
    args = common.parse_flags(parser, argv, stage="online" if online else "pgd", images="train", batch="train")
    args.adversarial_loss = args.adversarial_loss or ("fare" if online else "contrastive")
    args.clean_loss = args.clean_loss or args.adversarial_loss
    return args


def main(args):
    common.check_export(args)
    offline = args.online_start == "offline" or not args.online_steps
    folder = common.adversarial_folder(args, "train", args.num_images) if offline else None
    run = common.Run(args, [folder] if folder else [], show=args.export and (lambda _: common.export(args)))
    run.require_disk(common.training_bytes(args.model))
    training, validation = common.load_training_sets(args)
    twins = common.load_adversarial(folder, training, args) if folder else None
    clip = common.load_clip(args)
    text_features = clip.encode_text(training.captions)
    targets = None
    if "fare" in (args.clean_loss, args.adversarial_loss):  # Schlarmann et al. 2024, equation 3, on unit-norm features
        targets = common.encode_all(clip.encode_image, training.pixels, args)
    # as in FARE and TeCoA few steps must be able to cross the ball, whatever --alpha
    alpha = max(args.alpha, 2 * args.eps / max(1, args.online_steps))

    def distance(image_features, indices):
        return (image_features - targets[indices]).square().sum(-1)

    def make_twins(step, indices, images):
        if not args.online_steps:
            return common.as_images(twins[indices], clip.device)
        if twins is not None:
            noise = (common.as_images(twins[indices], clip.device) - images) / args.eps
        else:
            noise = common.start_noise(args.seed + step, indices.tolist(), images.shape[1:]).to(images.device)
        encode_image = clip.frozen()
        own = text_features[indices]

        def loss_fn(x):
            if args.adversarial_loss == "fare":
                return distance(encode_image(x), indices)
            return -(encode_image(x) * own).sum(-1)

        clip.model.visual.eval()  # attack the network that is deployed
        attacked = common.pgd(loss_fn, images, eps=args.eps, alpha=alpha, steps=args.online_steps, noise=noise)
        clip.model.visual.train()
        return attacked.images

    def fare_loss(image_features, indices):
        return distance(image_features, indices).mean()

    losses = [fare_loss if kind == "fare" else None for kind in (args.clean_loss, args.adversarial_loss)]
    record = common.train(args, run, clip, training, validation, make_twins, *losses)
    run.finish(clip.device, adversarial_dir=folder and str(folder), **record)
    if args.export:
        print(common.export(args))


if __name__ == "__main__":
    common.run_main(main, parse_args())
