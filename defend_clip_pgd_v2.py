#!/usr/bin/env python3
"""Caption-aware adversarial training: fine-tune CLIP's visual tower on clean and adversarial images.

The adversarial images are made once, offline, against the original model by generate_pgd_adversarial.py (this script
runs it first if --adversarial_dir is not there). Each batch holds every image and its adversarial twin; the loss is the
mean of both halves' contrastive losses, after TeCoA (Mao et al. 2023, arXiv:2212.07016), whose twins are made anew
against the current weights; offline ones can be learnt by heart, so look at the white-box figures.

    python defend_clip_pgd_v2.py --batch_size 16 --lr 1e-5 --epochs 3 --loss_threshold 0.1
    python defend_clip_pgd_v2.py --preset tiny

Files written to --output_dir (default runs/<preset>/pgd):
    best.pt, last.pt   checkpoints that open_clip.create_model(NAME, pretrained=FILE) opens
    log.jsonl          one line per step
    metrics.json       validation figures of every epoch, wall time, the COCO ids trained on
"""
import common


def parse_args(argv=None):
    parser = common.make_parser(__doc__)
    common.add_train_args(parser)
    group = parser.add_argument_group("adversarial images (this script only)")
    group.add_argument("--adversarial_dir", help="of --split train (default: adversarial_train beside --output_dir)")
    return common.parse_flags(parser, argv, stage="pgd", images="train", batch="train")


def main(args):
    folder = common.adversarial_folder(args, "train", args.num_images)
    run = common.Run(args, [folder])
    training, validation = common.load_training_sets(args)
    twins = common.load_adversarial(folder, training, args)
    clip = common.load_clip(args)

    def make_twins(step, indices, images):
        return common.as_images(twins[indices], clip.device)

    record = common.train(args, run, clip, training, validation, make_twins)
    run.finish(clip.device, adversarial_dir=str(folder), **record)


if __name__ == "__main__":
    main(parse_args())
