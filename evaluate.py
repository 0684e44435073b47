#!/usr/bin/env python3
"""Every model and defence under every attack: the result table and its figures.

    python evaluate.py --reproduce --preset tiny    # the whole report on the embedded CLIP, minutes on a laptop
    python evaluate.py --reproduce                  # the whole report on CLIP ViT-L/14, on a GPU
    python evaluate.py --checkpoint fare4=hf-hub:chs20/fare4-clip --output_dir runs/report/with_fare

Two attacks of one budget. *transfer*: images attacked once on the original model, then shown to the defended one (the
report's protocol). *white-box*: attacked on the defence itself, end to end; for JPEG the adaptive attack of
eval_jpeg.py. --reproduce first runs each missing stage as the command that a user would type.

Files written to --output_dir (default runs/<preset>/evaluation); the stages' folders stand beside it:
    table.md, metrics.json (per image, too), examples.png, histogram.png, table.png
"""
import argparse
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch

import common
from common import attack_all, drop, encode_all, fail, improvement, jpeg, load_clip, load_examples

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

REPORT = {  # Adversarial Robustness Evaluation for CLIP Models, on CLIP ViT-L/14 and MMEB COCO: clean, transfer
    "original": (0.2513, -0.1783),
    "MAT": (0.2417, 0.1067),
    "caption-aware": (0.2507, 0.2349),
    "JPEG 75": (0.2513, 0.1504),
    "JPEG 50": (0.2513, 0.2147),
    "JPEG 30": (0.2513, 0.2329),
}
TRAINED = {"MAT": "mat", "caption-aware": "pgd"}  # row -> stage folder
DRAWS = 10_000  # of the bootstrap


def checkpoint(text):
    """argparse type: NAME=PATH_OR_MODEL."""
    name, _, source = text.partition("=")
    if not name or not source:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE, NAME=local-dir:DIR or NAME=hf-hub:ORG/NAME")
    if not source.startswith(("local-dir:", "hf-hub:")) and not Path(source).is_file():
        raise argparse.ArgumentTypeError(f"{source} is no file; models are given as local-dir:DIR or hf-hub:ORG/NAME")
    return name, source


def parse_args(argv=None):
    parser = common.make_parser(__doc__)
    group = parser.add_argument_group("rows of the table")
    group.add_argument("--qualities", type=int, nargs="*", default=[75, 50, 30], help="JPEG rows (default: 75 50 30)")
    group.add_argument(
        "--checkpoint",
        type=checkpoint,
        action="append",
        default=[],
        metavar="NAME=PATH_OR_MODEL",
        help="a further row: a checkpoint file for --model, local-dir:DIR or hf-hub:ORG/NAME; may be repeated",
    )
    group.add_argument("--adversarial_dir", help="of --split eval (default: adversarial_eval beside --output_dir)")
    group = parser.add_argument_group("reproduction")
    group.add_argument("--reproduce", action="store_true", help="run every missing stage first")
    group.add_argument("--num_train_images", type=common.number(1), help="images trained on (default: %(default)s)")
    group.add_argument("--train_batch_size", type=common.number(1), help="of the trainings (default: %(default)s)")
    group.add_argument("--val_images", type=common.number(1), help="of the trainings (default: %(default)s)")
    group.add_argument("--epochs", type=common.number(1), help="of the trainings (default: %(default)s)")
    group.add_argument("--lr", type=common.number(0, kind=float), help="of the trainings (default: %(default)s)")
    threshold = {"type": common.number(0, kind=float), "default": 0.1}
    group.add_argument("--loss_threshold", **threshold, help="of the caption-aware training (default: %(default)s)")
    return common.parse_flags(parser, argv, stage="evaluation", images="eval", batch="attack")


def reproduce(args):
    """Run the stages that are missing or unfinished, each as its own command."""
    default = parse_args(["--preset", args.preset])
    given = {key for key, value in vars(args).items() if value != getattr(default, key)}
    moved = "output_dir" in given

    def command(script, stage, flags, **values):
        words = [script, *(["--preset", args.preset] if args.preset != "report" else [])]
        words += [word for key, value in values.items() for word in (f"--{key}", str(value))]
        for key in flags.split():
            if key in given:
                words += [f"--{key}"] if getattr(args, key) is True else [f"--{key}", str(getattr(args, key))]
        folder = Path(args.output_dir).parent / stage
        return folder, words + (["--output_dir", str(folder)] if moved else [])

    shared = "model pretrained precision device train_data eval_data image_root sample_seed skip_bad_images"
    shared += " num_workers cache_dir eps alpha steps seed"
    attack = f"{shared} batch_size"
    sizes = {"num_images": args.num_train_images} if "num_train_images" in given else {}
    epochs = {"batch_size": args.train_batch_size, "lr": f"{args.lr:.0e}".replace("e-0", "e-"), "epochs": args.epochs}
    threshold = {"loss_threshold": args.loss_threshold}
    stages = [
        command("generate_pgd_adversarial.py", "adversarial_train", attack, split="train", **sizes),
        command("generate_pgd_adversarial.py", "adversarial_eval", f"{attack} num_images", split="eval"),
        command("defend_clip_mat_v2.py", "mat", f"{shared} val_images", **epochs, **sizes),
        command("defend_clip_pgd_v2.py", "pgd", f"{shared} val_images", **epochs, **threshold, **sizes),
        command("eval_jpeg.py", "jpeg", f"{attack} num_images"),
    ]
    for folder, words in stages:
        done = folder / "metrics.json"
        if done.exists() and common.read_json(done).get("argv", [])[1:] == words[1:]:
            print(f"{folder} is complete: skipped")
        else:
            common.run_script(words)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def measure(clip, transform, examples, transfer, args, what):
    """One row: every example clean, transferred and attacked white-box, seen by clip through transform.

    returns   {condition: {"similarity": (N,), "rank_i2t": (N,), "rank_t2i": (N,)}} as lists, ranks from 0;
              the white-box images uint8 (N, 3, S, S); the health of the attack
    """
    text_features = clip.encode_text(examples.captions)
    frozen = clip.frozen()
    white_box, health = attack_all(lambda images: frozen(transform(images)), examples, text_features, args, what=what)
    conditions = {}
    for name, pixels in {"clean": examples.pixels, "transfer": transfer, "white_box": white_box}.items():
        features = encode_all(lambda x: clip.encode_image(transform(x)), pixels, args.batch_size, clip.device)
        cosines = features @ text_features.T  # (N, N)
        if not cosines.isfinite().all():
            fail(f"row {what}: features of the {name} images are not finite; their similarity means nothing")
        conditions[name] = {
            "similarity": cosines.diagonal().tolist(),
            "rank_i2t": ranks(cosines).tolist(),
            "rank_t2i": ranks(cosines.T).tolist(),
        }
    return conditions, white_box, health


def ranks(cosines):
    """How many other entries of its row beat the own entry, the diagonal, 0 the best; (N, N) -> (N,)."""
    return (cosines > cosines.diagonal()[:, None]).sum(1)


def interval(values, seed):
    """95 % percentile bootstrap interval of the mean over images (Efron & Tibshirani 1993): [low, high]."""
    values = np.asarray(values, float)
    picks = np.random.default_rng(seed).integers(len(values), size=(DRAWS, len(values)))
    return np.quantile(values[picks].mean(1), [0.025, 0.975]).tolist()


def summarise(conditions, seed):
    """Means, intervals and recalls of one row."""
    row = {"n": len(conditions["clean"]["similarity"])}
    for name, values in conditions.items():
        row[f"{name}_similarity"] = float(np.mean(values["similarity"]))
        row[f"{name}_interval"] = interval(values["similarity"], seed)
        for direction in ("i2t", "t2i"):
            for k in (1, 5):
                row[f"{name}_recall_{direction}@{k}"] = float(np.mean(np.less(values[f"rank_{direction}"], k)))
    return row


def training_seconds(stages, stage):
    """Wall time of a training, the offline adversarial images included; None if it is not known."""
    seconds = common.read_json(stages / stage / "metrics.json")["training_seconds"]
    if stage == "pgd":
        seconds += common.read_json(stages / "adversarial_train" / "metrics.json")["seconds"]
    return seconds


# ---------------------------------------------------------------------------------------------------------------------
# Showing


def duration(seconds):
    if seconds is None:
        return "-"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def console_table(record):
    """The table at 80 columns."""
    lines = [
        setting(record),
        "",
        f"{'':16}{'similarity':^26}{'improvement':^18}{'R@1 i2t':^12}{'train':>8}",
        f"{'':16}{'clean':>7}{'transfer':>9}{'w-box':>10}{'transfer':>9}{'w-box':>9}"
        f"{'clean':>6}{'w-box':>6}{'time':>8}",
    ]
    for name, row in record["rows"].items():
        cells = [f"{name[:15]:16}{row['clean_similarity']:7.3f}{row['transfer_similarity']:9.3f}"]
        cells.append(f"{row['white_box_similarity']:10.3f}")
        cells += [f"{percent(row.get(f'improvement_{kind}')):>9}" for kind in ("transfer", "white_box")]
        cells += [f"{row[f'{kind}_recall_i2t@1']:6.2f}" for kind in ("clean", "white_box")]
        lines.append("".join(cells) + f"{duration(row['training_seconds']):>8}")
    return "\n".join(lines)


def setting(record):
    args = record["args"]
    eps, alpha = (f"{args[key] * 255:.4g}/255" for key in ("eps", "alpha"))
    model = f"{args['model']} {args['pretrained']}".strip()
    attack = f"PGD {args['steps']} steps, eps {eps}, alpha {alpha}"
    return f"{model}, {record['n']} images\n{attack}"


def percent(share):
    return "-" if share is None else f"{share:+.1%}"


NOTES = """\
In brackets 95 % bootstrap intervals over the images. transfer: attacked once on the original model. white-box: attacked
on the defence itself; for JPEG rows the real codec forward, its gradient taken as the identity. improvement: the share
of the original model's drop that the defence takes away. training: wall time, the offline images included.
"""


def markdown_table(record):
    """table.md: with intervals, and the report's figures beside ours where they are comparable."""
    report = REPORT if record["args"]["preset"] == "report" else {}
    header = ["defence", "clean", "transfer", "white-box", "improvement transfer", "improvement white-box"]
    header += ["R@1 clean", "R@1 white-box", "n", "training"]
    header += ["report: clean", "report: transfer", "report: improvement"] if report else []
    lines = [header, ["---"] * len(header)]
    for name, row in record["rows"].items():
        cells = [name]
        for kind in ("clean", "transfer", "white_box"):
            low, high = row[f"{kind}_interval"]
            cells.append(f"{row[f'{kind}_similarity']:.4f} [{low:.3f}, {high:.3f}]")
        cells += [percent(row.get(f"improvement_{kind}")) for kind in ("transfer", "white_box")]
        cells += [f"{row[f'{kind}_recall_i2t@1']:.1%}" for kind in ("clean", "white_box")]
        cells += [str(row["n"]), duration(row["training_seconds"])]
        if name in report:
            gain = None if name == "original" else improvement(*report[name], *report["original"])
            cells += [*(f"{value:.4f}" for value in report[name]), percent(gain)]
        lines.append(cells + [""] * (len(header) - len(cells)))
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{setting(record).replace(chr(10), ', ')}.\n\n{table}\n\n{NOTES}"


def draw_examples(path, examples, adversarial, clip):
    """Clean, adversarial, delta, and the adversarial image through JPEG 30, with captions and cosines."""
    count = min(4, len(examples))
    text_features = clip.encode_text(examples.captions[:count])
    clean, adv = (common.as_images(p[:count], clip.device) for p in (examples.pixels, adversarial))
    columns = {
        "clean": clean,
        "adversarial": adv,
        "delta, amplified 16 times": (0.5 + 16 * (adv - clean)).clamp(0, 1),
        "adversarial, JPEG 30": jpeg(adv, 30),
    }
    figure, axes = plt.subplots(count, 4, figsize=(11, 2.95 * count), squeeze=False)
    for j, (title, images) in enumerate(columns.items()):
        with torch.no_grad():
            cosines = (clip.encode_image(images) * text_features).sum(-1)
        for i in range(count):
            axes[i, j].imshow(images[i].permute(1, 2, 0).cpu().numpy())
            axes[i, j].set(xticks=[], yticks=[])
            axes[i, j].set_xlabel(title if title.startswith("delta") else f"{title}: {cosines[i]:+.3f}", fontsize=9)
    for i in range(count):
        axes[i, 0].set_title(examples.captions[i], fontsize=9, loc="left")
    figure.suptitle("Cosine of each image with its own caption, original model", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


CONDITIONS = {"clean": ("clean", "#4c72b0"), "transfer": ("transfer", "#dd8452"), "white_box": ("white-box", "#c44e52")}


def draw_histograms(path, record):
    """Distribution of the cosines of every row under every condition."""
    rows = record["rows"]
    every = [v for row in record["per_image"].values() for values in row.values() for v in values["similarity"]]
    edges = np.linspace(min(every), max(every), 41)
    figure, axes = plt.subplots(len(rows), 1, figsize=(8, 1.35 * len(rows) + 0.9), sharex=True, squeeze=False)
    for axis, name in zip(axes[:, 0], rows):
        for condition, (label, colour) in CONDITIONS.items():
            values = record["per_image"][name][condition]["similarity"]
            axis.hist(values, edges, color=colour, alpha=0.55, label=label)
        axis.axvline(0, color="black", linewidth=0.6)
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        axis.set_yticks([])
    axes[0, 0].legend(ncols=3, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    axes[-1, 0].set_xlabel(f"cosine of an image with its own caption, {record['n']} images")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_table(path, record):
    """The table's similarities as bars with their 95 % intervals."""
    rows = record["rows"]
    figure, axis = plt.subplots(figsize=(max(6.5, 1.25 * len(rows)), 4))
    for k, (condition, (label, colour)) in enumerate(CONDITIONS.items()):
        means = np.array([row[f"{condition}_similarity"] for row in rows.values()])
        low, high = np.array([row[f"{condition}_interval"] for row in rows.values()]).T
        at = np.arange(len(rows)) + 0.27 * (k - 1)
        axis.bar(at, means, 0.25, color=colour, label=label, yerr=[means - low, high - means], capsize=2)
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set_xticks(range(len(rows)), rows, fontsize=9)
    axis.set_ylabel("mean cosine with the own caption")
    axis.legend(ncols=3, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------


def main(args):
    if args.reproduce:
        reproduce(args)
    stages = Path(args.output_dir).parent
    transfer_dir = common.adversarial_folder(args, "eval", args.num_images)
    trained = {name: folder for name, folder in TRAINED.items() if (stages / folder / "metrics.json").exists()}
    inputs = [transfer_dir, *(stages / folder for folder in trained.values())]
    run = common.Run(args, inputs, show=console_table)
    for name in TRAINED.keys() - trained.keys():
        print(f"no finished run in {stages / TRAINED[name]}: the row {name} is left out")

    examples = load_examples(args, "eval", args.num_images)
    clip = load_clip(args)
    transfer = torch.from_numpy(common.load_adversarial(transfer_dir, examples, args))
    files = {name: str(stages / folder / "best.pt") for name, folder in trained.items()}
    rows, per_image, health = {}, {}, {}

    def add_row(name, model, transform=lambda images: images, seconds=None):
        per_image[name], white_box, health[name] = measure(model, transform, examples, transfer, args, name)
        rows[name] = row = summarise(per_image[name], args.seed) | {"training_seconds": seconds}
        first = rows["original"]
        for kind in ("transfer", "white_box"):
            row[f"{kind}_drop"] = drop(row["clean_similarity"], row[f"{kind}_similarity"])
            if name != "original":
                figures = [r[f"{k}_similarity"] for r in (row, first) for k in ("clean", kind)]
                row[f"improvement_{kind}"] = improvement(*figures)
        return white_box

    white_box = add_row("original", clip)
    for name, source in [*files.items(), *args.checkpoint]:
        model = load_clip(args, source)
        leaked = model.train_ids & set(examples.coco_ids)
        if leaked:
            fail(f"leakage: {source} was trained on {len(leaked)} of the evaluation images, such as {min(leaked)}")
        add_row(name, model, seconds=training_seconds(stages, trained[name]) if name in trained else None)
    for quality in args.qualities:
        add_row(f"JPEG {quality}", clip, partial(jpeg, quality=quality))

    record = {
        "n": len(examples),
        "rows": rows,
        "attack": health,
        "coco_ids": examples.coco_ids,
        "skipped_images": examples.skipped,
        "per_image": per_image,
    }
    shown = {"args": vars(args)} | record
    draw_examples(run.dir / "examples.png", examples, white_box, clip)
    draw_histograms(run.dir / "histogram.png", shown)
    draw_table(run.dir / "table.png", shown)
    common.write_text(run.dir / "table.md", markdown_table(shown))
    run.finish(clip.device, **record)
    print(f"\n{console_table(shown)}\n\n{run.dir}: table.md, metrics.json, examples.png, histogram.png, table.png")


if __name__ == "__main__":
    main(parse_args())
