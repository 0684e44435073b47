"""Is the white-box attack weaker than torchattacks' APGD at 100 steps? On every row of a finished table, both losses.

    python evaluate.py --reproduce --preset tiny --seeds 3
    python tests/bench/strength.py --preset tiny --seeds 3

Ours is evaluate.py's: the cosine attack, and from its result the margin attack where the own caption still comes first.
Theirs has 100 steps under each loss, on all images, from random starts of its own. Both attack the whole defence, JPEG
through the differentiable codec, and are scored alike: rounded to 8 bits inside the ball, on real JPEG bytes; of both
losses' images the worse counts. Takes evaluate.py's flags; the rows are those that it would have. The comparison is
paired, image by image: ours is weaker where the mean difference is above 0.005. The brackets are its 95 % interval.
"""

import sys
from pathlib import Path

import torch
import torchattacks

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: E402
import evaluate  # noqa: E402

THEIR_STEPS = 100


class Defence(torch.nn.Module):
    """A whole defence with the cosines of all captions as logits, or [cosine of the own one, 0] with label 0: the
    gradient of the cross-entropy is then the cosine's times a negative number for each image."""

    def __init__(self, row, encode_image, here, loss):
        super().__init__()  # torchattacks asks the parameters for the device
        self.clip, self.encode_image, self.loss = row.clip, encode_image, loss
        self.text_features = row.clip.encode_text(row.captions)
        own = row.own[here].to(row.clip.device)
        self.own, self.wrong = own, row.wrong_captions(here).to(row.clip.device)
        self.labels = own if loss == "dlr" else torch.zeros_like(own)

    def forward(self, images):
        cosines = self.encode_image(images) @ self.text_features.T
        cosine = cosines.gather(1, self.own[:, None])
        if self.loss == "dlr":
            return cosines.masked_fill(~self.wrong, -1).scatter(1, self.own[:, None], cosine)
        return torch.cat([cosine, torch.zeros_like(cosine)], 1)


def attack_with_torchattacks(loss, row, args):
    """uint8 adversarial images (N, 3, H, W); the loss ce is the cosine's here, and dlr the margin's."""
    parts = []
    for start in range(0, len(row.pixels), args.batch_size):
        here = slice(start, start + args.batch_size)
        images = common.as_images(row.pixels[here], row.clip.device)
        generators = common.generators_for(args.seed + 1, range(start, start + len(images)))
        encode = row.defended(row.clip.encode_image, row.original.encode_image, generators, row.attacks()[0])
        model = Defence(row, encode, here, loss).eval()
        torch.manual_seed(args.seed + start)
        # its last layer gives up at the first wrong label; the run below it keeps the highest loss
        attack = torchattacks.APGD(model, eps=args.eps, steps=THEIR_STEPS, n_restarts=1, eot_iter=1, loss=loss)
        adversarial = attack.attack_single_run(images, model.labels)[0]
        parts.append(common.to_pixels(adversarial.detach(), row.pixels[here], args.eps))
    return torch.cat(parts)


def worst(row, found, seed):
    """Cosine and whether the own caption comes first, the worse of all found images: (N,) each."""
    scored = [evaluate.score(row, pixels, seed) for pixels in found]
    found = evaluate.worst_of(scored)
    return {"cosine": found["similarity"], "R@1": evaluate.first_share(found)}


def main(args):
    data, weaker, lines = evaluate.load_evaluation(args), 0, 0
    print(f"n = {len(data.images)}, ours {args.attack_steps} steps, torchattacks' APGD {THEIR_STEPS}")
    print(f"{'':34}{'ours':>8}{'theirs':>9}   difference, paired")
    for name, spec in evaluate.list_rows(args).items():
        row = evaluate.load_row(args, name, spec, data)
        found, _ = evaluate.attack_both(evaluate.row_attack(args, spec), row, args.seed)
        theirs = [attack_with_torchattacks(loss, row, args) for loss in ("ce", "dlr")]
        ours, theirs = (worst(row, pixels, args.seed) for pixels in (found, theirs))
        for key in ours:
            difference = ours[key] - theirs[key]
            low, high = evaluate.interval(difference, args.seed)
            loses = difference.mean() > evaluate.TOLERANCE
            verdict = "WEAKER" if loses else "stronger" if difference.mean() < -evaluate.TOLERANCE else "equal"
            figures = f"{ours[key].mean():8.4f}{theirs[key].mean():9.4f}"
            interval = f"{difference.mean():+.4f} [{low:+.4f}, {high:+.4f}]"
            print(f"{name + ', ' + key:34}{figures}   {interval}  {verdict}", flush=True)
            weaker, lines = weaker + loses, lines + 1
    print(f"ours is weaker by more than {evaluate.TOLERANCE} on {weaker} of {lines} lines")
    return int(weaker > 0)  # a NumPy bool would be taken for a message


if __name__ == "__main__":
    sys.exit(main(evaluate.parse_args()))
