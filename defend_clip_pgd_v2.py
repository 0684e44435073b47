#!/usr/bin/env python3
"""Caption-aware adversarial training: fine-tune CLIP's visual tower on clean and adversarial images.

Each batch holds every image and its adversarial twin; the loss is the mean of the clean and the adversarial loss, each
contrastive as in TeCoA (Mao et al. 2023, arXiv:2212.07016), or the distance of FARE (Schlarmann et al. 2024,
arXiv:2402.12336) to the original model's features. The twins are

    offline (the report's, the default): made once against the original model by generate_pgd_adversarial.py, which this
        script runs first if they are not there. The model can learn them by heart: look at the white-box figures, not
        at the transfer ones;
    online (--online_steps K): made during training against the present weights by K steps of PGD (Madry et al. 2018)
        from noise, with FARE's loss on both halves.

    python defend_clip_pgd_v2.py --batch_size 16 --lr 1e-5 --epochs 3 --loss_threshold 0.1
    python defend_clip_pgd_v2.py --preset tiny --online_steps 2

Files written to --output_dir (default runs/<preset>/pgd, with --online_steps runs/<preset>/online):
    open_clip_model.safetensors, open_clip_config.json   the model after the last epoch, which open_clip opens:
                       open_clip.create_model_and_transforms("local-dir:OUTPUT_DIR")
    log.jsonl          one line per step
    metrics.json       validation figures of every epoch, wall time, the COCO ids trained on
"""

import torch

import common
from common import as_images, contrastive_loss, pgd, start_noise


def parse_args(argv=None):
    parser = common.make_parser(__doc__, batch_size=16)
    common.add_train_args(parser)
    flag = parser.add_argument_group("adversarial images (this script only)").add_argument
    flag("--adversarial_dir", help="of --split train; if not given, adversarial_train beside --output_dir")
    flag("--online_steps", type=common.number(0, 10**6), default=0, help="PGD steps on each batch; 0: offline")
    return common.parse_flags(parser, argv, lambda given: "online" if given.online_steps else "pgd", lambda _: "train")


def main(args):
    if args.online_steps and args.adversarial_dir:
        common.fail("--adversarial_dir is of offline training: leave it or --online_steps out")
    rows = common.load_training_rows(args)
    folder = None if args.online_steps else common.adversarial_folder(args, "train")
    inputs = common.adversarial_checksum(folder, rows.select(range(args.num_images))) if folder else {}
    run = common.Run(args, common.code_checksums(__file__), rows, inputs)
    if run.previous:
        run.report_complete()
        return
    clip = common.load_clip(args)
    training, validation = common.load_training_sets(args, rows, clip.geometry)
    offline = common.load_adversarial(folder, training, args) if folder else None  # uint8 (N, 3, H, W)
    original = clip.encode_pixels(training["pixels"]) if args.online_steps else None  # (N, D), FARE's targets
    visual, pixels = clip.model.visual, training["pixels"]
    matrices, others = ([p for p in visual.parameters() if (p.ndim >= 2) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=clip.device.type in ("cuda", "cpu"))
    trainer = common.Trainer(args, run, clip, optimizer, training, validation)
    # as in FARE and TeCoA few steps must be able to cross the ball, whatever --alpha
    attack = common.Attack(args.eps, max(args.alpha, 2 * args.eps / max(1, args.online_steps)), args.online_steps)

    def distance(image_features, indices):
        """FARE: squared L2 distance to the original model's clean feature (equation 3, on unit-norm features), (B,)."""
        return (image_features - original[indices]).square().sum(-1)

    for step, batch, mine in trainer:  # numbers of the batch's images; of this process's
        for group in optimizer.param_groups:  # falls linearly to 0
            group["lr"] = args.lr * (1 - step / trainer.last_step)
        images = as_images(pixels[mine], clip.device)  # (B, 3, H, W), of this process
        if args.online_steps:
            visual.eval()  # attack the network that is deployed
            encode_image = clip.frozen()
            start = start_noise(images, args.eps, args.seed + step, mine.tolist())
            images_adv, _ = pgd(lambda x: distance(encode_image(x), mine), images, attack, start)  # noqa: B023
            trainer.train_mode()
        else:
            images_adv = as_images(offline[mine], clip.device)

        features = trainer.encode(images, images_adv, len(batch))  # clean, adversarial: (B, D) each, of all processes
        if args.online_steps:
            clean_loss, adv_loss = (distance(x, batch).mean() for x in features)
        else:
            text_features = trainer.text_features[batch]
            clean_loss, adv_loss = (contrastive_loss(x, text_features, clip.model.logit_scale.exp()) for x in features)
        loss = (clean_loss + adv_loss) / 2

        optimizer.zero_grad(set_to_none=True)
        (loss * common.PROCESSES).backward()  # each has its own images' part of the gradient; DDP takes the mean
        grad_norm = torch.nn.utils.clip_grad_norm_(visual.parameters(), 1.0)
        optimizer.step()
        trainer.end_step(loss=loss, clean_loss=clean_loss, twin_loss=adv_loss, grad_norm=grad_norm)
    generation_seconds = 0
    if folder:
        record = common.load_record(folder / "metrics.json")
        generation_seconds = record["seconds"] * args.num_images / record["args"]["num_images"]
    trainer.finish(generation_seconds, adversarial_dir=folder and str(folder))


if __name__ == "__main__":
    common.run_main(main, parse_args())
