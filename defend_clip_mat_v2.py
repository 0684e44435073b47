#!/usr/bin/env python3
"""MAT, mixed augmentation training: fine-tune CLIP's visual tower on clean and randomly augmented images.

Each batch holds every image clean and augmented; the loss is the mean of the two contrastive losses. The augmentations
are independent of any attack: brightness and contrast, Gaussian blur, Gaussian noise. The name is the report's; MAT of
arXiv:2405.18770 is multimodal adversarial training, another thing.

It differs from the report's: the learning rate falls linearly to 0, gradients are clipped to norm 1, weight decay acts
on matrices alone, and brightness and contrast have strengths of their own, at most 20 %.

    python defend_clip_mat_v2.py --batch_size 16 --lr 1e-5 --epochs 3
    python defend_clip_mat_v2.py --preset tiny

Files written to --output_dir (default runs/<preset>/mat):
    open_clip_model.safetensors, open_clip_config.json   the model after the last epoch, which open_clip opens:
                       open_clip.create_model_and_transforms("local-dir:OUTPUT_DIR")
    log.jsonl          one line per step
    metrics.json       validation figures of every epoch, wall time
"""

import torch
from torch.nn import functional as F

import common
from common import contrastive_loss

BRIGHTNESS = CONTRAST = 0.2  # factors are uniform in 1 +- this
BLUR_RADII = 0.1, 2.0  # standard deviation of the Gaussian, pixels
NOISE_SIGMA = 15 / 255

IDENTITY = common.TRAIN_FLAGS  # flags that tell two runs apart


def parse_args(argv=None, given=None):
    parser = common.make_parser(__doc__, batch_size=16)
    common.add_train_args(parser)
    return common.fill(parser.parse_args(argv, given), common.stage_name(__file__, "mat"), "train", "mat_lr")


def open_run(args):
    return common.Run(args, __file__, IDENTITY, common.TRAIN_FILES)


def draw_augmentations(count, shape, generator):
    """Draw brightness and contrast factors, blur radii and noise for count images of shape (3, H, W): (count, ...)."""
    options = {"generator": generator, "device": generator.device}

    def uniform(low, high):
        return low + (high - low) * torch.rand(count, 1, 1, 1, **options)

    factors = uniform(1 - BRIGHTNESS, 1 + BRIGHTNESS), uniform(1 - CONTRAST, 1 + CONTRAST)
    return *factors, uniform(*BLUR_RADII), NOISE_SIGMA * torch.randn(count, *shape, **options)


def augment(images, brightness, contrast, blur_radii, noise):
    """Change brightness and contrast, blur, and add noise: (B, 3, H, W) in [0, 1]; see draw_augmentations()."""
    images = images * brightness
    grey = images.mean((1, 2, 3), keepdim=True)
    images = gaussian_blur(grey + contrast * (images - grey), blur_radii)
    return (images + noise).clamp(0, 1)


def gaussian_blur(images, sigma):
    """Blur each image with its own standard deviation in pixels, (B, 1, 1, 1), by two grouped convolutions."""
    reach = 3 * int(BLUR_RADII[1])
    offsets = torch.arange(-reach, reach + 1, device=images.device)
    kernel = torch.exp(-(offsets**2) / (2 * sigma.view(-1, 1) ** 2))
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)  # (3B, K)
    flat = F.pad(images.flatten(0, 1)[None], [reach] * 4, mode="reflect")  # (1, 3B, H + 2 reach, W + 2 reach)
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=len(kernel))
    return F.conv2d(flat, kernel[:, None, None, :], groups=len(kernel)).view_as(images)


def main(args):
    run = open_run(args)
    clip = common.load_clip(args, training=True)
    training, validation = common.load_training_images(args, clip.geometry)
    inputs = {"model": clip.digest, "training_images": training.digest(), "validation_images": validation.digest()}
    run.identify(precision=clip.precision, **inputs)
    if run.done:
        run.report_done()
        return
    visual = clip.model.visual
    matrices, others = ([p for p in visual.parameters() if (p.ndim >= 2) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=clip.device.type in ("cuda", "cpu"))
    trainer = common.Trainer(args, run, clip, optimizer, training, validation)

    for step, batch, part in trainer:  # indices of the batch's images; positions of this process's images in the batch
        for group in optimizer.param_groups:  # falls linearly to 0
            group["lr"] = args.lr * (1 - step / trainer.last_step)
        images = common.as_images(training.pixels[batch[part]], clip.device)  # (B, 3, H, W) of this process
        generator = common.step_generator(args.seed, step, clip.device)
        draws = draw_augmentations(len(batch), images.shape[1:], generator)
        images_aug = augment(images, *(values[part] for values in draws))

        features = trainer.encode(images, images_aug)  # clean, augmented: (B, D) each, of all processes
        text_features = trainer.text_features[batch]
        clean_loss, aug_loss = (contrastive_loss(x, text_features, clip.model.logit_scale.exp()) for x in features)
        loss = (clean_loss + aug_loss) / 2

        optimizer.zero_grad(set_to_none=True)
        (loss * common.PROCESSES).backward()  # each has its own images' part of the gradient; DDP takes the mean
        grad_norm = torch.nn.utils.clip_grad_norm_(visual.parameters(), 1.0)
        optimizer.step()
        trainer.end_step(loss=loss, clean_loss=clean_loss, aug_loss=aug_loss, grad_norm=grad_norm)
    trainer.finish()


if __name__ == "__main__":
    common.run_main(main, parse_args())
