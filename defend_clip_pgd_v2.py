#!/usr/bin/env python3
"""Caption-aware adversarial training: fine-tune CLIP's visual tower on clean and adversarial images.

Each batch holds every image clean and adversarial; the loss is the mean of the clean and the adversarial loss. Two
choices make four trainings that differ in one thing each:

    --loss contrastive   the symmetric contrastive loss of the batch, as in TeCoA (Mao et al. 2023, arXiv:2212.07016)
    --loss features      the squared L2 distance to the original model's features of the clean image; it uses no
                         captions. FARE (Schlarmann et al. 2024, arXiv:2402.12336, equation 3) takes features before
                         normalisation and adversarial images alone: here features have unit norm, and clean images
                         count for half of the loss, which was better on the tiny preset (tests/records/README.md)
    --online_steps 0     offline: adversarial images made once against the original model by
                         generate_pgd_adversarial.py, which this script runs first if they are missing. The model can
                         learn them by heart: read the white-box figures, not the transfer ones
    --online_steps K     online: made in each step against the present weights by K steps of PGD (Madry et al. 2018)
                         from noise, which lower the cosine with the own caption (contrastive) or raise the distance
                         (features)

The report's training is the contrastive, offline one, which is the default. Where it differs: here the learning rate
falls linearly to 0, gradients are clipped to norm 1, weight decay acts on matrices alone, and the loss that stops the
training is the mean of --loss_window steps.

    python defend_clip_pgd_v2.py --batch_size 16 --lr 1e-5 --epochs 3 --loss_threshold 0.1
    python defend_clip_pgd_v2.py --preset tiny --online_steps 2

Files written to --output_dir (default runs/<preset>/pgd, pgd_features, online, online_contrastive):
    open_clip_model.safetensors, open_clip_config.json   the model after the last epoch, which open_clip opens:
                       open_clip.create_model_and_transforms("local-dir:OUTPUT_DIR")
    log.jsonl          one line per step
    metrics.json       validation figures of every epoch, wall time
"""

import torch

import common
import generate_pgd_adversarial as generate
from common import contrastive_loss, own_caption, pgd

IDENTITY = f"{common.TRAIN_FLAGS} loss online_steps"  # flags that tell two runs apart


def parse_args(argv=None, given=None):
    parser = common.make_parser(__doc__, batch_size=16)
    common.add_train_args(parser)
    flag = parser.add_argument_group("adversarial training (this script only)").add_argument
    flag("--loss", choices=["contrastive", "features"], help="default: contrastive, with --online_steps features")
    flag("--online_steps", type=common.number(0, 10**6), default=0, help="PGD steps on each batch; 0: offline")
    flag("--adversarial_dir", help="made by --split train; default: adversarial_train beside --output_dir")
    args = parser.parse_args(argv, given)

    name, usual_loss = ("online", "features") if args.online_steps else ("pgd", "contrastive")
    args.loss = args.loss or usual_loss
    name += "" if args.loss == usual_loss else f"_{args.loss}"
    if args.online_steps and args.adversarial_dir:
        parser.error("--adversarial_dir is for offline training: leave out either it or --online_steps")
    if args.loss == "features" and args.loss_threshold:
        parser.error("--loss_threshold is for --loss contrastive: leave out either it or --loss features")
    return common.fill(args, common.stage_name(__file__, name), "train", f"{args.loss}_lr")


def open_run(args):
    return common.Run(args, __file__, IDENTITY, common.TRAIN_FILES)


def main(args):
    run = open_run(args)
    clip = common.load_clip(args, training=True)
    training, validation = common.load_training_images(args, clip.geometry)
    inputs = {"model": clip.digest, "training_images": training.digest(), "validation_images": validation.digest()}
    run.identify(precision=clip.precision, **inputs)
    if not args.online_steps and (args.adversarial_dir or not run.done):
        adversarial, made = generate.adversarial_images(args, "train", clip, training)
        run.identify(adversarial_images=common.digest(adversarial))
    if run.done:
        run.report_done()
        return
    if args.loss == "features":
        original_features = clip.encode_pixels(training.pixels)  # (N, D)
    visual = clip.model.visual
    matrices, others = ([p for p in visual.parameters() if (p.ndim >= 2) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=clip.device.type in ("cuda", "cpu"))
    trainer = common.Trainer(args, run, clip, optimizer, training, validation)
    # as in FARE and TeCoA a few steps must be able to cross the ball, whatever --alpha
    attack = common.Attack(args.eps, max(args.alpha, 2 * args.eps / max(1, args.online_steps)), args.online_steps)

    def feature_loss(image_features, indices):
        """Return the squared L2 distance to the original model's features of the clean images, (B,)."""
        return (image_features - original_features[indices]).square().sum(-1)

    def attack_loss(encode_image, indices):
        if args.loss == "features":
            return lambda images: feature_loss(encode_image(images), indices)
        return own_caption(trainer.text_features[indices], encode_image)

    for step, batch, part in trainer:  # indices of the batch's images; positions of this process's images in the batch
        for group in optimizer.param_groups:  # falls linearly to 0
            group["lr"] = args.lr * (1 - step / trainer.last_step)
        images = common.as_images(training.pixels[batch[part]], clip.device)  # (B, 3, H, W) of this process
        if args.online_steps:
            visual.eval()  # attack the network that is deployed
            generator = common.step_generator(args.seed, step, clip.device)
            noise = torch.rand(len(batch), *images.shape[1:], generator=generator, device=clip.device)
            start = images + (args.eps * (2 * noise - 1))[part]
            loss_fn = attack_loss(clip.attack_encoder(), batch[part])
            images_adv, _ = pgd(loss_fn, images, attack, start)
            trainer.train_mode()
        else:
            images_adv = common.as_images(adversarial[batch[part]], clip.device)

        features = trainer.encode(images, images_adv)  # clean, adversarial: (B, D) each, of all processes
        if args.loss == "features":
            clean_loss, adv_loss = (feature_loss(x, batch).mean() for x in features)
        else:
            text_features, logit_scale = trainer.text_features[batch], clip.model.logit_scale.exp()
            clean_loss, adv_loss = (contrastive_loss(x, text_features, logit_scale) for x in features)
        loss = (clean_loss + adv_loss) / 2

        optimizer.zero_grad(set_to_none=True)
        (loss * common.PROCESSES).backward()  # each has its own images' part of the gradient; DDP takes the mean
        grad_norm = torch.nn.utils.clip_grad_norm_(visual.parameters(), 1.0)
        optimizer.step()
        trainer.end_step(loss=loss, clean_loss=clean_loss, adv_loss=adv_loss, grad_norm=grad_norm)
    if args.online_steps:
        trainer.finish()
    else:
        trainer.finish(made["seconds"], adversarial_dir=made["folder"])


if __name__ == "__main__":
    common.run_main(main, parse_args())
