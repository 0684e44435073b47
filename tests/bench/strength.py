"""Is any attack of ours weaker than torchattacks' of the same budget? PGD and APGD on every row of a finished table.

    python evaluate.py --reproduce --preset tiny
    python tests/bench/strength.py --preset tiny

Both attack the whole defence, on the same images, from random starts of their own; both are scored alike: rounded to 8
bits inside the ball, for JPEG on the real bytes. Takes evaluate.py's flags; the rows are those that it would have. The
difference is ours minus theirs with its paired 95 % bootstrap interval: ours is weaker where all of that is above 0.
"""

import sys
from pathlib import Path

import torch
import torchattacks

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: E402
import evaluate  # noqa: E402


class TwoLogits(torch.nn.Module):
    """A defence with logits [cosine with the own caption, 0]: the gradient of the cross-entropy with label 0 is the
    cosine's times a negative number for each image."""

    def __init__(self, clip, encode_image, text_features):
        super().__init__()  # torchattacks asks the parameters for the device
        self.clip, self.encode_image, self.text_features = clip, encode_image, text_features

    def forward(self, images):
        cosine = (self.encode_image(images) * self.text_features).sum(-1)
        return torch.stack([cosine, torch.zeros_like(cosine)], 1)


def attack_with_torchattacks(method, row, examples, candidates, args, codec):
    """uint8 adversarial images (N, 3, H, W), at --eps, --alpha, --steps."""
    encode, parts = row.view(row.clip.encode_image, args.seed + 1, codec), []
    text_features = row.clip.encode_text(candidates.captions)[candidates.own]
    for start in range(0, len(examples), args.batch_size):
        here = slice(start, start + args.batch_size)
        images = common.as_images(examples.pixels[here], row.clip.device)
        model = TwoLogits(row.clip, encode, text_features[here]).eval()
        labels = torch.zeros(len(images), dtype=torch.long, device=row.clip.device)
        torch.manual_seed(args.seed + start)
        if method == "pgd":
            adversarial = torchattacks.PGD(model, eps=args.eps, alpha=args.alpha, steps=args.steps)(images, labels)
        else:  # its last layer gives up at the first wrong label; the run below it keeps the highest loss
            eot = args.eot if row.randomised else 1
            attack = torchattacks.APGD(model, eps=args.eps, steps=args.steps, n_restarts=1, eot_iter=eot)
            adversarial = attack.attack_single_run(images, labels)[0]
        parts.append(common.to_pixels(adversarial.detach(), examples.pixels[here], args.eps))
    return torch.cat(parts)


def main(args):
    examples = common.load_examples(args, "eval", args.num_images)
    candidates, stages = evaluate.load_candidates(args, examples), Path(args.output_dir).parent
    trained = {name: folder for name, folder in evaluate.TRAINED.items() if (stages / folder / "best.pt").exists()}
    weaker = 0
    print(f"n = {len(examples)}{'':31}ours  torchattacks  difference")
    for row in evaluate.build_rows(args, common.load_clip(args), stages, trained, examples):
        codecs = [common.jpeg, evaluate.differentiable_jpeg] if row.qualities else [common.jpeg]
        for codec in codecs:
            for method in ("pgd", "apgd"):
                _, ours, _ = evaluate.attack_row(row, examples, candidates, args, method=method, codec=codec)
                pixels = attack_with_torchattacks(method, row, examples, candidates, args, codec)
                theirs = evaluate.score(row, pixels, candidates, args)
                apart = ours["similarity"] - theirs["similarity"]
                low, high = evaluate.interval(apart, args.seed)
                weaker += low > 0
                figures = "".join(f"{scored['similarity'].mean():9.4f}" for scored in (ours, theirs))
                name = f"{row.name}, {method}" + (", through" * (codec is common.jpeg) if row.qualities else "")
                verdict = "WEAKER" if low > 0 else "stronger" if high < 0 else "equal"
                print(f"{name:35}{figures}  {apart.mean():+.4f} [{low:+.4f}, {high:+.4f}] {verdict}", flush=True)
    print(f"ours is weaker on {weaker} lines")
    return weaker > 0


if __name__ == "__main__":
    sys.exit(main(evaluate.parse_args()))
