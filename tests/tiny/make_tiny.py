#!/usr/bin/env python3
"""Make the embedded default: rendered scenes in MMEB's layout and a small CLIP that matches them to their captions.

    python tests/tiny/make_tiny.py                 # everything, about 35 minutes on 2 CPU cores
    python tests/tiny/make_tiny.py --data_only     # the two data folders alone, under a minute

A scene is one or two coloured shapes on a textured, unevenly lit background with grain, saved as JPEG, so that an
attack and a JPEG step meet something like a photograph. Its caption says what is seen, in the form of MMEB's COCO
captions: "A large red ring above a small blue star on a grey background."

Files written beside this script:
    MMEB-train/   parquet splits under a dataset card, images in images_zip/MSCOCO_i2t.zip, some val2014 rows
    MMEB-eval/    parquet split with candidates, images in images.zip among AppleDouble and foreign members
    clip/         open_clip_config.json, open_clip_model.safetensors (fp16): open_clip.create_model("local-dir:...")

No evaluation scene, in either word order, is among the scenes that the CLIP or the training rows are made of.
"""

import argparse
import io
import json
import math
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageDraw, ImageFilter
from safetensors.torch import save_file
from torch.nn import functional as F
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
WIDTH, HEIGHT, IMAGE_SIZE = 128, 96, 48  # scenes, and the model's input after resize and centre crop
SUPERSAMPLE = 4
COLOURS = {
    "red": (200, 40, 40), "orange": (235, 135, 30), "yellow": (235, 220, 50), "green": (45, 150, 60),
    "blue": (45, 80, 205), "purple": (135, 55, 165), "white": (240, 240, 240), "black": (25, 25, 25),
}  # fmt: skip
BACKGROUNDS = {
    "grey": (130, 130, 130), "brown": (115, 80, 50), "pink": (230, 160, 185),
    "teal": (70, 145, 150), "beige": (215, 195, 160), "navy": (35, 45, 90),
}  # fmt: skip
SHAPES = ["circle", "ring", "square", "triangle", "star", "cross", "diamond", "heart"]
SIZES = {"small": (10, 14), "large": (18, 23)}  # radius in pixels of the scene
INVERSE = {"above": "below", "below": "above", "to the left of": "to the right of", "to the right of": "to the left of"}
TRAIN_ROWS, VAL2014_ROWS, EVAL_ROWS = 2000, 200, 120
CONFIG = {
    "model_cfg": {
        "embed_dim": 128,
        "quick_gelu": True,
        "vision_cfg": {"image_size": IMAGE_SIZE, "patch_size": 8, "width": 96, "head_width": 32, "layers": 3},
        "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
    },
    "preprocess_cfg": {
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    },
}

# ---------------------------------------------------------------------------------------------------------------------
# Scenes: (background, relation or None, ((size, colour, shape), ...))


def draw_scene(rng):
    """A random scene; three in four have two objects."""

    def thing():
        return str(rng.choice(list(SIZES))), str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))

    background = str(rng.choice(list(BACKGROUNDS)))
    if rng.random() < 0.25:
        return background, None, (thing(),)
    first, second = thing(), thing()
    while first[1:] == second[1:]:  # two red rings of two sizes: legible to nobody at this size
        second = thing()
    return background, str(rng.choice(list(INVERSE))), (first, second)


def meaning(scene):
    """The scene in one canonical order: "a ring above a star" and "a star below a ring" are the same picture."""
    background, relation, things = scene
    if relation is None:
        return scene
    return min(scene, (background, INVERSE[relation], things[::-1]))


def caption(scene):
    background, relation, things = scene
    words = [f"{'an' if ' '.join(t)[0] in 'aeiou' else 'a'} {' '.join(t)}" for t in things]
    text = f" {relation} ".join(words) + f" on a {background} background."
    return text[0].upper() + text[1:]


def outline(shape, radius):
    """A mask of one shape, antialiased by drawing large; (2r+1, 2r+1) uint8."""
    size = 2 * radius * SUPERSAMPLE
    mask = Image.new("L", (size, size))
    pen, c, r = ImageDraw.Draw(mask), size / 2, size / 2 - 1

    def polygon(angles, radii):
        pen.polygon([(c + q * math.sin(a), c - q * math.cos(a)) for a, q in zip(angles, radii)], fill=255)

    if shape in ("circle", "ring"):
        pen.ellipse((c - r, c - r, c + r, c + r), fill=255)
        if shape == "ring":
            pen.ellipse((c - r / 2, c - r / 2, c + r / 2, c + r / 2), fill=0)
    elif shape == "square":
        pen.rectangle((c - 0.8 * r, c - 0.8 * r, c + 0.8 * r, c + 0.8 * r), fill=255)
    elif shape == "cross":
        pen.rectangle((c - r, c - r / 3, c + r, c + r / 3), fill=255)
        pen.rectangle((c - r / 3, c - r, c + r / 3, c + r), fill=255)
    elif shape == "triangle":
        polygon([0, math.tau / 3, 2 * math.tau / 3], [r] * 3)
    elif shape == "diamond":
        polygon([0, math.pi / 2, math.pi, 3 * math.pi / 2], [r, 0.7 * r, r, 0.7 * r])
    elif shape == "star":
        polygon([k * math.pi / 5 for k in range(10)], [r if k % 2 == 0 else 0.4 * r for k in range(10)])
    else:  # heart
        t = np.linspace(0, math.tau, 60)
        x = 16 * np.sin(t) ** 3
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        pen.polygon([(c + r * a / 17, c - r * (b + 2) / 17) for a, b in zip(x, y)], fill=255)
    return mask


def smooth_noise(rng, cells):
    """Noise of the scene's size with features of about 1/cells of its width; (HEIGHT, WIDTH), about unit variance."""
    grid = rng.normal(size=(cells, cells)).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))


def texture(rng, colour, strength):
    """A surface of about this colour: cloudy at two scales, unevenly lit; (HEIGHT, WIDTH, 3) float."""
    base = np.asarray(colour, np.float32) + rng.normal(0, 8, 3)
    angle = rng.uniform(0, math.tau)
    y, x = np.mgrid[-1 : 1 : HEIGHT * 1j, -1 : 1 : WIDTH * 1j]
    light = 1 + rng.uniform(0, 0.18) * (math.cos(angle) * x + math.sin(angle) * y)
    clouds = strength * (smooth_noise(rng, 6) + 0.7 * smooth_noise(rng, 24))
    return base * light[..., None] + clouds[..., None]


def render(scene, rng):
    """The scene as a PIL image with grain."""
    background, relation, things = scene
    radii = [int(rng.integers(*SIZES[size], endpoint=True)) for size, _, _ in things]
    centres = [np.array([WIDTH / 2, HEIGHT / 2]) + rng.uniform(-10, 10, 2)]
    if relation is not None:
        axis = 1 if relation in ("above", "below") else 0
        side = -1 if relation in ("above", "to the left of") else 1
        gap, slack = sum(radii) + 2, HEIGHT - 4 - 2 * sum(radii)  # both objects lie inside the central square
        start = 2 + rng.uniform(0, max(slack - 2, 1))
        corner = (WIDTH - HEIGHT) / 2
        centres = [np.zeros(2), np.zeros(2)]
        first, second = (0, 1) if side < 0 else (1, 0)
        offset = corner if axis == 0 else 0.0
        centres[first][axis] = offset + start + radii[first]
        centres[second][axis] = centres[first][axis] + gap
        for centre in centres:
            centre[1 - axis] = (HEIGHT / 2 if axis == 0 else WIDTH / 2) + rng.uniform(-14, 14)
    pixels = texture(rng, BACKGROUNDS[background], 9)
    for (_, colour, shape), radius, centre in zip(things, radii, centres):
        mask = outline(shape, radius).rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC)
        mask = mask.resize((2 * radius, 2 * radius), Image.Resampling.LANCZOS)
        layer = Image.new("L", (WIDTH, HEIGHT))
        layer.paste(mask, tuple(int(round(v - radius)) for v in centre))
        alpha = np.asarray(layer, np.float32)[..., None] / 255
        pixels = pixels * (1 - alpha) + texture(rng, COLOURS[colour], 6) * alpha
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.6)))
    grain = rng.normal(0, rng.uniform(2, 7), (HEIGHT, WIDTH, 3))
    return Image.fromarray((np.asarray(image, np.float32) + grain).round().clip(0, 255).astype(np.uint8))


def jpeg_bytes(scene, seed):
    rng = np.random.default_rng(seed)
    buffer = io.BytesIO()
    render(scene, rng).save(buffer, "JPEG", quality=int(rng.integers(75, 93)))
    return buffer.getvalue()


def model_pixels(scene, seed):
    """What the model sees of the saved scene: (IMAGE_SIZE, IMAGE_SIZE, 3) uint8."""
    image = Image.open(io.BytesIO(jpeg_bytes(scene, seed))).convert("RGB")
    image = image.resize((round(WIDTH * IMAGE_SIZE / HEIGHT), IMAGE_SIZE), Image.Resampling.BICUBIC)
    left = round((image.width - IMAGE_SIZE) / 2)
    return np.asarray(image.crop((left, 0, left + IMAGE_SIZE, IMAGE_SIZE)))


def distinct_scenes(count, rng, taken):
    """That many scenes of different meaning; adds their meanings to taken."""
    scenes = []
    while len(scenes) < count:
        scene = draw_scene(rng)
        if meaning(scene) not in taken:
            taken.add(meaning(scene))
            scenes.append(scene)
    return scenes


# ---------------------------------------------------------------------------------------------------------------------
# MMEB's layout

CARD = "---\nlicense: mit\nconfigs:\n- config_name: MSCOCO_i2t\n  data_files:\n{}---\n\nRendered by make_tiny.py.\n"
SPLIT = "  - split: {0}\n    path: MSCOCO_i2t/{0}-*\n"
INSTRUCTION = "<|image_1|>\nFind an image caption describing the given everyday image.\n"
OTHER_INSTRUCTIONS = ["<|image_1|>\nWhat does this picture show?\n", "<|image_1|>\nPick the caption that fits.\n"]


def write_parquet(folder, split, columns):
    path = folder / "MSCOCO_i2t" / f"{split}-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def write_zip(path, members):
    """Members (name, bytes) in a zip that is the same to the byte every time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name, (2024, 1, 1, 0, 0, 0)), data)


def make_data(seed, pool):
    """Writes MMEB-train and MMEB-eval; returns the meanings of the evaluation scenes, which nobody may train on."""
    rng = np.random.default_rng(seed)
    taken = set()
    evaluation = distinct_scenes(EVAL_ROWS, rng, taken)
    held_out = set(taken)
    training = distinct_scenes(TRAIN_ROWS, rng, taken)
    jpegs = list(pool.map(jpeg_bytes, training + evaluation, range(seed, seed + TRAIN_ROWS + EVAL_ROWS), chunksize=50))
    ids = rng.permutation(580_000)[: TRAIN_ROWS + EVAL_ROWS] + 1

    out = HERE / "MMEB-train"
    from_val = set(rng.permutation(TRAIN_ROWS)[:VAL2014_ROWS].tolist())  # Karpathy's split has such rows
    names = [f"COCO_{'val' if i in from_val else 'train'}2014_{ids[i]:012d}.jpg" for i in range(TRAIN_ROWS)]
    texts = [caption(scene) for scene in training]
    columns = {
        "qry": [INSTRUCTION] * TRAIN_ROWS,
        "qry_image_path": [f"images/MSCOCO_i2t/Train/{name}" for name in names],
        "pos_text": texts,
        "pos_image_path": [""] * TRAIN_ROWS,
        "neg_text": [""] * TRAIN_ROWS,
        "neg_image_path": [""] * TRAIN_ROWS,
    }
    write_parquet(out, "original", columns)
    other = [OTHER_INSTRUCTIONS[i] for i in rng.integers(len(OTHER_INSTRUCTIONS), size=TRAIN_ROWS)]
    write_parquet(out, "diverse_instruction", columns | {"qry": other})
    write_parquet(out, "train", {key: values[:32] for key, values in columns.items()})  # stale, as on the hub
    (out / "README.md").write_text(CARD.format(SPLIT.format("original") + SPLIT.format("diverse_instruction")))
    write_zip(out / "images_zip" / "MSCOCO_i2t.zip", [(f"MSCOCO_i2t/Train/{n}", j) for n, j in zip(names, jpegs)])

    out = HERE / "MMEB-eval"
    names = [f"MSCOCO_i2t/COCO_val2014_{i:012d}.jpg" for i in ids[TRAIN_ROWS:]]
    texts = [caption(scene) for scene in evaluation]
    columns = {
        "qry_text": [INSTRUCTION] * EVAL_ROWS,
        "qry_img_path": names,
        "tgt_text": [[text] + [t for t in texts if t != text] for text in texts],
        "tgt_img_path": [[""] * EVAL_ROWS for _ in texts],
    }
    write_parquet(out, "test", columns)
    (out / "README.md").write_text(CARD.format(SPLIT.format("test")))
    members = list(zip(names, jpegs[TRAIN_ROWS:]))
    double = [(name.replace("/", "/._"), b"\0\5\x16\7" + bytes(100)) for name in names[:3]]
    write_zip(out / "images.zip", members[:3] + double + members[3:] + [("OtherTask/000.bin", rng.bytes(20_000))])
    return held_out


# ---------------------------------------------------------------------------------------------------------------------
# The CLIP


def recall_at_1(model, tokenizer):
    """Image-to-text recall among the first 100 evaluation captions, from the files written."""
    table = pq.read_table(HERE / "MMEB-eval" / "MSCOCO_i2t" / "test-00000-of-00001.parquet").slice(0, 100).to_pydict()
    with zipfile.ZipFile(HERE / "MMEB-eval" / "images.zip") as archive:
        images = [Image.open(io.BytesIO(archive.read(name))).convert("RGB") for name in table["qry_img_path"]]
    preprocess = open_clip.transform.PreprocessCfg(**CONFIG["preprocess_cfg"], size=IMAGE_SIZE)
    transform = open_clip.transform.image_transform_v2(preprocess, is_train=False)
    with torch.no_grad():
        image_features = model.encode_image(torch.stack([transform(image) for image in images]), normalize=True)
        text_features = model.encode_text(tokenizer([row[0] for row in table["tgt_text"]]), normalize=True)
    cosine = image_features @ text_features.T
    return (cosine.argmax(1) == torch.arange(len(cosine))).float().mean().item(), cosine.diagonal().mean().item()


def train_clip(scenes, args, pool):
    seeds = range(10**6 + args.seed, 10**6 + args.seed + len(scenes))
    pixels = np.empty((len(scenes), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for i, image in enumerate(tqdm(pool.map(model_pixels, scenes, seeds, chunksize=100), "render", len(scenes))):
        pixels[i] = image
    torch.manual_seed(args.seed)
    model = open_clip.CLIP(**CONFIG["model_cfg"])
    tokenizer = open_clip.SimpleTokenizer(context_length=CONFIG["model_cfg"]["text_cfg"]["context_length"])
    tokens = tokenizer([caption(scene) for scene in scenes])
    mean, std = (torch.tensor(CONFIG["preprocess_cfg"][k]).view(3, 1, 1) for k in ("mean", "std"))
    decay = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.train_steps, pct_start=0.1)
    progress = tqdm(range(args.train_steps), "train", unit="step")
    for step in progress:
        batch = torch.randint(len(scenes), (args.batch_size,)).numpy()
        images = torch.from_numpy(pixels[batch]).permute(0, 3, 1, 2).float() / 255  # (B, 3, H, W)
        image_features = model.encode_image((images - mean) / std, normalize=True)
        text_features = model.encode_text(tokens[batch], normalize=True)
        logits = model.logit_scale.exp() * image_features @ text_features.T  # (B, B)
        labels = torch.arange(len(logits))
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}", scale=f"{model.logit_scale.exp().item():.1f}")
    model.eval()
    out = HERE / "clip"
    out.mkdir(exist_ok=True)
    (out / "open_clip_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, out / "open_clip_model.safetensors")
    recall, cosine = recall_at_1(open_clip.create_model(f"local-dir:{out}").eval(), tokenizer)
    print(f"saved model on 100 unseen pairs: R@1 {recall:.2f}, mean cosine {cosine:.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of everything random here (default: %(default)s)")
    parser.add_argument("--scenes", type=int, default=40_000, help="scenes to train on (default: %(default)s)")
    parser.add_argument("--train_steps", type=int, default=1500, help="batches (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=256, help="scenes a batch (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of AdamW (default: %(default)s)")
    parser.add_argument("--data_only", action="store_true", help="leave clip/ as it is")
    args = parser.parse_args()
    with ProcessPoolExecutor() as pool:
        held_out = make_data(args.seed, pool)
        if args.data_only:
            return
        rng = np.random.default_rng(args.seed + 1)
        scenes = []
        while len(scenes) < args.scenes:
            scene = draw_scene(rng)
            if meaning(scene) not in held_out:
                scenes.append(scene)
        train_clip(scenes, args, pool)


if __name__ == "__main__":
    main()
