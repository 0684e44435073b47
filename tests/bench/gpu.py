"""What only a GPU can say, in one run of at most eight minutes: rates, compilers, precision, a table, memory, resuming.

    python tests/bench/gpu.py --before ../checkout_before --json gpu.json
    python tests/bench/gpu.py --table --model local-dir:CLIP --train_data PHOTOGRAPHS --eval_data PHOTOGRAPHS ...
    python tests/bench/gpu.py --small                         # does it still run? On a CPU, too

Pieces, in this order; one that fails is printed and the next one runs; none begins after --seconds:
    rates       image-steps a second of the attack and milliseconds of a training step, of this checkout and of
                --before, each twice, in turn
    compilers   one attack step: as it is, torch.compile of the block, a CUDA graph of the step
    precision   cosines after an attack in fp32, TF32 and bf16, of the tiny CLIP and of a model trained here
    tests       tests/test_cuda.py: agreement with the CPU, resuming, memory
    table       evaluate.py --reproduce with the flags that follow --table, its seconds and its table
"""

import argparse
import json
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # after the checkout of --rates
import common  # noqa: E402
import evaluate  # noqa: E402

BEGAN = time.perf_counter()


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", help="checkout to compare with")
    parser.add_argument("--arch", default="ViT-L-14-quickgelu", help="of the rates, with random weights")
    parser.add_argument("--seconds", type=float, default=420, help="no piece begins after them")
    parser.add_argument("--small", action="store_true", help="ViT-B/32, small batches, few steps")
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--rates", metavar="CHECKOUT", help=argparse.SUPPRESS)  # a process of the piece rates
    parser.add_argument("--table", nargs=argparse.REMAINDER, help="flags of evaluate.py --reproduce")
    return parser.parse_args()


def wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(call, times=5):
    """Median seconds of a call, after one call to warm up."""
    call()
    seconds = []
    for _ in range(times):
        wait()
        clock = time.perf_counter()
        call()
        wait()
        seconds.append(time.perf_counter() - clock)
    return median(seconds)


def load(args):
    words = ["--model", "ViT-B-32-quickgelu" if args.small else args.arch, "--pretrained", "random"]
    return common.load_clip(evaluate.parse_args(words))


def rates_of(clip, batch, small):
    """Return {what: rate} of the checkout that this process imports."""
    images, steps = torch.rand(batch, 3, 224, 224, device=clip.device), 2 if small else 10
    text_features = clip.encode_text([f"caption {i}" for i in range(batch)])
    encode = clip.attack_encoder()
    attack = common.Attack(8 / 255, 2 / 255, steps)
    visual, scale = clip.model.visual, clip.model.logit_scale.detach().exp()
    optimizer = torch.optim.AdamW(visual.parameters(), lr=1e-6, fused=True)

    def train():
        halves = clip.encode_image(torch.cat([images, images])).chunk(2)
        loss = sum(common.contrastive_loss(half, text_features, scale) for half in halves) / 2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    seconds = timed(lambda: common.pgd(lambda x: -(encode(x) * text_features).sum(-1), images, attack), 3)
    found = {f"attack {batch}: image-steps/s": batch * (steps + 1) / seconds}
    return found | ({f"training {batch}+{batch}: ms": 1e3 * timed(train, 3)} if batch <= 64 else {})


def rates(args):
    checkouts = [str(ROOT)] + ([args.before] if args.before else [])
    found = {checkout: [] for checkout in checkouts}
    for checkout in checkouts * 2:  # in turn
        code = f"import runpy, sys\nsys.path.insert(0, {checkout!r})\nimport common\n"
        words = ["gpu.py", "--rates", checkout, "--arch", args.arch, *["--small"] * args.small]
        code += f"sys.argv = {words}\n"
        code += f"runpy.run_path({str(Path(__file__).resolve())!r}, run_name='__main__')"
        done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True)
        found[checkout].append(json.loads(done.stdout.splitlines()[-1]) if not done.returncode else done.stderr[-400:])
    return found


def compilers(args):
    clip, found = load(args), {}
    batch = 2 if args.small else 16
    images = torch.rand(batch, 3, 224, 224, device=clip.device)
    plain_block = common.tower_block

    def step():
        x = images.detach().requires_grad_()
        (grad,) = torch.autograd.grad(encode(x)[:, 0].sum(), x)
        return grad

    encode = clip.attack_encoder()
    expected, found["as it is: ms"] = step(), 1e3 * timed(step)
    try:
        common.tower_block = torch.compile(plain_block)
        encode = clip.attack_encoder()
        agreement = torch.cosine_similarity(step().flatten(), expected.flatten(), 0).item()
        found["gradient of the compiled one: cosine"] = agreement
        found["compiled block: ms"] = 1e3 * timed(step)
    finally:
        common.tower_block = plain_block
    if clip.device.type == "cuda":
        encode, static = clip.attack_encoder(), images.clone().requires_grad_()
        graphed = torch.cuda.make_graphed_callables(lambda x: encode(x), (static,))

        def graph_step():
            x = images.detach().requires_grad_()
            return torch.autograd.grad(graphed(x)[:, 0].sum(), x)

        found["CUDA graph: ms"] = 1e3 * timed(graph_step)
    return found


def precision(args):
    words = ["--preset", "smoke" if args.small else "tiny"]
    command = [sys.executable, ROOT / "defend_clip_pgd_v2.py", *words, "--online_steps", "2"]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    flags, found = evaluate.parse_args(words), {}
    for name, source in (("original", None), ("FARE, online", f"local-dir:{ROOT}/runs/{words[1]}/online")):
        clip = common.load_clip(flags, source)
        images = common.load_images(flags, "eval", clip.geometry)
        text_features = clip.encode_text(images.own_captions)
        attack, loss = common.white_box(flags.eps, flags.attack_steps), partial(common.own_caption, text_features)
        for kind in ("fp32", "tf32", "bf16"):
            pixels_adv, _ = common.attack_all(attack, loss, images.pixels, clip, precision=kind)
            found[f"{name}, {kind}"] = clip.similarity(pixels_adv, text_features).mean().item()
    return found


def tests(args):
    command = [sys.executable, "-m", "pytest", "-n", "0", "tests/test_cuda.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    return done.stdout.decode()[-1500:]


def table(args):
    words = args.table or ["--preset", "smoke" if args.small else "tiny"]
    clock = time.perf_counter()
    done = subprocess.run([sys.executable, ROOT / "evaluate.py", "--reproduce", *words], cwd=ROOT, capture_output=True)
    return {"seconds": time.perf_counter() - clock, "printed": done.stdout.decode()[-4000:]}


def main(args):
    if args.rates:
        found = {}
        for batch in (2,) if args.small else (16, 64, 256):
            found |= rates_of(load(args), batch, args.small)
        print(json.dumps(found))
        return 0
    device = common.pick_device("auto")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    results = {"device": name, "torch": torch.__version__}
    print(results, flush=True)
    for piece in (rates, compilers, precision, tests, table):
        clock = time.perf_counter()
        if clock - BEGAN > args.seconds:
            print(f"{piece.__name__}: no time left", flush=True)
            continue
        try:
            results[piece.__name__] = piece(args)
        except Exception:
            results[piece.__name__] = traceback.format_exc()[-800:]
        print(f"{piece.__name__}, {time.perf_counter() - clock:.0f} s: {results[piece.__name__]}", flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(parse_args()))
