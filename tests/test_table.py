"""What the table says of whom, which captions are wrong answers, what a folder of figures keeps and whom it refuses."""

import fcntl
import json
import math
import os
import re
import shutil
import warnings
import zipfile
from itertools import chain
from pathlib import Path
from unittest.mock import patch

import matplotlib.font_manager
import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, TINY, jsonl, metrics, shell
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from safetensors.torch import load_file, save_file

import common
import evaluate

SMALL = ["--preset", "smoke", "--num_images", 8, "--steps", 1]
TRAINING = ["--batch_size", 4, "--val_images", 2]
TABLE = ["evaluate.py", "--preset", "smoke", "--num_images", 4, "--steps", 1, "--attack_steps", 1, "--qualities"]
GENERATE = ["generate_pgd_adversarial.py", "--preset", "smoke", "--split", "eval", "--steps", 1, "--batch_size", 2]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """--cache_dir of all tests here."""
    return ["--cache_dir", tmp_path_factory.mktemp("cache")]


@pytest.fixture(scope="module")
def scenes():
    """The bundled evaluation images: [(path, its caption)]."""
    (file,) = (TINY / "MMEB-eval" / "MSCOCO_i2t").glob("*.parquet")
    return [(row["qry_img_path"], row["tgt_text"][0]) for row in pq.read_table(file).to_pylist()]


def own_pictures(folder, scenes, captions):
    """A folder of the first scenes with these captions, each a list or one; returns --eval_data and it."""
    folder.mkdir(parents=True)
    with zipfile.ZipFile(TINY / "MMEB-eval" / "images.zip") as archive:
        for number, (path, _) in zip(range(len(captions)), scenes):
            (folder / f"{number}.jpg").write_bytes(archive.read(path))
    lines = [{"file_name": f"{number}.jpg", "text": texts} for number, texts in enumerate(captions)]
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return ["--eval_data", folder]


def files(folder):
    """What lies in a folder and below, {path: bytes}."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def no_attack(*_, **__):
    raise AssertionError("an image was attacked")


def other_weights(file, scale):
    """Write the tiny CLIP with a changed visual tower; returns the file."""
    state = load_file(TINY / "clip" / "open_clip_model.safetensors")
    save_file({key: value * scale if "visual" in key else value for key, value in state.items()}, file)
    return file


# Captions and chance

LONG = "a red ring above a blue star " * 6


def mmeb_pictures(folder, scenes, candidates):
    """A copy of MMEB of the first scenes, with these candidates; returns --eval_data and it."""
    (folder / "MSCOCO_i2t").mkdir(parents=True)
    columns = {"qry_text": [""] * len(candidates), "qry_img_path": [path for path, _ in scenes[: len(candidates)]]}
    columns |= {"tgt_text": candidates, "tgt_img_path": [[""]] * len(candidates)}
    pq.write_table(pa.table(columns), folder / "MSCOCO_i2t" / "test-00000-of-00001.parquet")
    shutil.copy(TINY / "MMEB-eval" / "images.zip", folder)
    return ["--eval_data", folder, "--candidates", "mmeb"]


@pytest.mark.parametrize("kind", ["evaluation", "mmeb"])
def test_ranks_are_those_of_the_plain_way_with_no_equal_caption_as_a_wrong_answer(
    kind, tmp_path, scenes, cache, monkeypatch
):
    own = [caption for _, caption in scenes[:9]]
    captions = [[own[i], f"Scene {i}.", own[i].upper(), "a star"] for i in range(9)]
    captions[2][0] = captions[5][0] = captions[7][1] = "A ring."  # equal ones, of two pictures first and of one not
    captions[3][0], captions[4][0] = f"{LONG} here", f"{LONG} there"  # equal once they are cut
    candidates = [list(chain(*captions))] * 9
    if kind == "mmeb":
        captions = [texts[:1] for texts in captions]
        candidates = [[*captions[i], *own[: i + 1], "a RING.", LONG] for i in range(9)]
    if kind == "evaluation":
        data = own_pictures(tmp_path / "data", scenes, captions)
    else:
        data = mmeb_pictures(tmp_path / "data", scenes, candidates)
    monkeypatch.setattr(evaluate, "RANKED_AT_ONCE", 4)
    words = [*TABLE[1:], *data, "--num_images", 9, *cache, "--trainings", "--output_dir", tmp_path / "table"]
    with patch.object(Figure, "savefig"), patch.object(Figure, "tight_layout"):
        evaluate.main(evaluate.parse_args([str(word) for word in words]))

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{TINY / 'clip'}")
    tokenizer, normalise = open_clip.get_tokenizer(f"local-dir:{TINY / 'clip'}"), preprocess.transforms[-1]
    entries = jsonl(tmp_path / "adversarial_eval" / "metadata.jsonl")
    attacked = [Image.open(tmp_path / "adversarial_eval" / entry["file_name"]) for entry in entries]
    attacked = torch.stack([normalise(torch.tensor(np.array(image)).permute(2, 0, 1) / 255) for image in attacked])
    with zipfile.ZipFile(TINY / "MMEB-eval" / "images.zip") as archive:
        clean = torch.stack([preprocess(Image.open(archive.open(path))) for path, _ in scenes[:9]])

    def tokens(caption):
        return tuple(tokenizer([caption])[0].tolist())

    with torch.no_grad():
        clean, attacked = (model.eval().encode_image(images, normalize=True) for images in (clean, attacked))
        texts = {caption: model.encode_text(tokenizer([caption]), normalize=True)[0] for caption in chain(*candidates)}
    right = [{tokens(caption) for caption in each} for each in captions]
    for condition, features in {"clean": clean, "transfer": attacked}.items():
        found = metrics(tmp_path / "table")["per_image"]["original"][condition]
        for i, image in enumerate(features):
            best = max(image @ texts[caption] for caption in captions[i])
            cosines = [image @ texts[caption] for caption in {*candidates[i]} if tokens(caption) not in right[i]]
            assert found["rank_i2t"][i] == sum(cosine >= best for cosine in cosines)
            ranks = []
            for caption in captions[i]:
                others = [clean[j] for j in range(9) if tokens(caption) not in right[j]]
                ranks.append(sum(other @ texts[caption] >= image @ texts[caption] for other in others))
            assert found["rank_t2i"][i] == ranks
            others = [j for j in range(9) if tokens(captions[i][0]) not in right[j]]
            assert len(others) == (6 if i in (2, 5) and kind == "evaluation" else 7 if i in (2, 3, 4, 5) else 8)


ALONE = {  # captions of three pictures -> the first picture that has no other caption to lose to
    "all are equal": (["a star", "A star", "a star"], "0.jpg"),
    "all are equal once they are cut": ([f"{LONG} {i}" for i in range(3)], "0.jpg"),
    "all are right for one picture": (["a star", ["a ring", "a star", "a dot"], ["a star", "a dot"]], "1.jpg"),
}


@pytest.mark.parametrize("why", ALONE)
def test_an_image_without_another_caption_to_lose_to_is_named_before_the_first_attack(
    why, tmp_path, scenes, cache, monkeypatch
):
    captions, name = ALONE[why]
    data = own_pictures(tmp_path / "mine", scenes, captions)
    monkeypatch.setattr(common, "pgd", no_attack)
    words = [*TABLE, *data, *cache, "--reproduce", "--output_dir", tmp_path / "out" / "table"]
    _, line = shell(*words, "--num_images", 3, code=2)
    assert f"{name} has no other caption to lose to" in line and line.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_candidates_of_mmeb_that_hold_no_wrong_caption_are_refused_and_the_remedy_works(tmp_path, scenes, cache):
    data = mmeb_pictures(tmp_path / "data", scenes, [[caption] for _, caption in scenes[:3]])
    words = [*TABLE, *cache, "--num_images", 3, "--trainings", "--output_dir", tmp_path / "table"]
    assert "leave out --candidates mmeb" in shell(*words, *data, code=2)[1]
    shell(*words, *data[:2])


def test_a_figure_that_does_not_exist_is_null_in_the_file_and_a_dash_in_the_table(tmp_path, cache, monkeypatch):
    """Where the attack moves no image, the original has no drop that a defence could take away."""

    def unmoved(loss_fn, images, *_, **__):
        none = torch.zeros(len(images), dtype=torch.bool)
        return images, {"zero_gradient": none, "nonfinite": none}

    monkeypatch.setattr(common, "pgd", unmoved)
    printed, _ = shell(*TABLE, 50, *cache, "--trainings", "--output_dir", tmp_path / "table")
    row = metrics(tmp_path / "table")["rows"]["JPEG 50"]
    assert row["improvement"] is row["improvement_interval"] is None
    assert re.search(r"JPEG 50 +0\.\d+ +\d+% +0\.\d+ +\d+% +0\.\d+ +\d+% +- +-", printed)
    with pytest.raises(ValueError):  # and what slips through is not written
        common.save(tmp_path / "figures.json", {"margin": math.inf})
    assert not (tmp_path / "figures.json").exists()


@pytest.mark.parametrize("at_chance", ["original", "x"])
def test_a_row_that_is_not_above_chance_is_marked_and_has_no_improvement(at_chance, tmp_path, cache):
    words = [*TABLE, 50, *cache, "--num_images", 12, "--trainings", "--output_dir", tmp_path / "table"]
    if at_chance == "original":
        words += ["--pretrained", "random", "--seed", 1]
    else:
        state = load_file(TINY / "clip" / "open_clip_model.safetensors")
        state = {key: torch.randn_like(value) if "visual" in key else value for key, value in state.items()}
        save_file(state, tmp_path / "x.safetensors")
        words += ["--checkpoint", f"x={tmp_path / 'x.safetensors'}"]
    printed, _ = shell(*words)
    record, blind = metrics(tmp_path / "table"), [at_chance] if at_chance == "x" else ["original", "JPEG 50"]
    for name, row in record["rows"].items():
        assert (f"\n{name} (?) " in printed) == (name in blind) == (row["clean_recall_i2t@1_interval"][0] <= 1 / 12)
        assert (row.get("improvement") is None) == (name in (*blind, "original"))
    for pair in record["paired"]:
        assert (pair["separated"] is None) == (pair["similarity"] is None) == bool({*pair["rows"]} & {*blind})
    said = " ".join(printed.split())
    assert "every pair differs" not in said and "not above chance" in said
    assert all(f"pairs with {name}: -" in said for name in blind)


# Figures


@pytest.fixture
def texts(monkeypatch):
    """The texts of the figures that are written, [(text, colour)]."""
    found, savefig = [], Figure.savefig

    def spy(figure, *args, **options):
        savefig(figure, *args, **options)
        found.extend((text.get_text(), text.get_color()) for text in figure.findobj(Text))

    monkeypatch.setattr(Figure, "savefig", spy)
    return found


def test_a_further_own_caption_is_right_in_the_examples_as_in_the_table(tmp_path, scenes, cache, texts):
    captions = [[re.sub(" on a [a-z]+ background", "", caption), caption] for _, caption in scenes[:4]]
    data = own_pictures(tmp_path / "mine", scenes, captions)
    shell(*TABLE, *data, *cache, "--trainings", "--output_dir", tmp_path / "table", figures=True)
    assert metrics(tmp_path / "table")["per_image"]["original"]["clean"]["rank_i2t"] == [0] * 4
    shown = [text for text in texts if text[0].startswith("clean: ")]
    assert len(shown) == 3 and all(text.endswith("first: own caption") for text, _ in shown)
    assert {colour for _, colour in shown} == {"#2a7a2a"}


def font_with(character, file):
    """Write a font that has one character, a square."""
    builder, pen = FontBuilder(1000, isTTF=True), TTGlyphPen(None)
    for draw, point in ((pen.moveTo, (0, 0)), (pen.lineTo, (0, 700)), (pen.lineTo, (700, 700)), (pen.lineTo, (700, 0))):
        draw(point)
    pen.closePath()
    glyph = pen.glyph()
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({ord(character): "square"})
    builder.setupGlyf({".notdef": glyph, "square": glyph})
    builder.setupHorizontalMetrics({".notdef": (800, 0), "square": (800, 0)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(file)


def test_figures_show_any_caption_without_a_warning(tmp_path, scenes, cache, texts, monkeypatch):
    """A font of this machine has the characters, or ? stands for them."""
    font_with("\u732b", tmp_path / "squares.ttf")
    manager = matplotlib.font_manager.fontManager
    monkeypatch.setattr(manager, "ttflist", [font for font in manager.ttflist if font.name.startswith("DejaVu")])
    manager.addfont(tmp_path / "squares.ttf")
    data = own_pictures(tmp_path / "mine", scenes, ["\u732b \u72ac", "a \U0001f408", "a\tb\x07 c\nd", "a star"])
    state = TINY / "clip" / "open_clip_model.safetensors"
    words = ["--trainings", "--checkpoint", f"\u72ac={state}", "--radii", "8/255", "--output_dir", tmp_path / "table"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(?i).*glyph.*|.*font.*")
        shell(*TABLE, *data, *cache, *words, figures=True)
    shown = [text for text, _ in texts]
    assert {"\u732b ?", "a ?", "a b? c d", "?", "?\n(white-box <=)"} <= {*shown}  # captions, and the row's name
    assert not re.search("[\u72ac\U0001f408\x07\t]", "".join(shown))


# Trainings and the rows that they make


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache):
    """Folders of trainings: as they are for a row, or with other flags; of adversarial images; of a table."""
    folder = tmp_path_factory.mktemp("trained")
    words = [*SMALL, *TRAINING, "--max_steps", 1, "--loss", "features", "--online_steps", 1, *cache]
    shell("defend_clip_pgd_v2.py", *words, "--output_dir", folder / "online")
    shell(*TABLE, *cache, "--trainings", "--output_dir", folder / "evaluation")
    return folder


OTHERS = {"online": "--online_steps 1, not 2", "pgd": "--loss features, not contrastive; --online_steps 1, not 0"}
OTHERS |= {"mat": "script defend_clip_pgd_v2.py, not defend_clip_mat_v2.py"}


@pytest.mark.parametrize("row", OTHERS)
def test_a_training_of_another_script_loss_or_attack_is_no_row_of_the_table(row, trained, tmp_path, cache):
    folder = shutil.copytree(trained, tmp_path / "copy")
    (folder / "online").rename(folder / row)
    before = files(folder)
    _, line = shell(*TABLE, *cache, "--trainings", row, "--output_dir", folder / "evaluation", code=2)
    assert f"{folder / row} is no training of this row: {OTHERS[row]}" in line and line.count("\n") == 1
    assert "remove that folder, or choose another --output_dir" in line and files(folder) == before


CHANGED = {"lr": 1e-9, "epochs": 1, "batch_size": 4, "weight_decay": 0.2, "loss_threshold": 0.5, "num_images": 8}


def test_a_training_with_other_rates_or_images_is_marked_and_noted_under_the_table(trained, tmp_path, cache):
    folder = shutil.copytree(trained, tmp_path / "copy")
    words = [word for flag, value in CHANGED.items() for word in (f"--{flag}", value)]
    words += ["--preset", "smoke", "--steps", 1, "--max_steps", 1, "--val_images", 2, *cache]
    shell("defend_clip_mat_v2.py", *words, "--output_dir", folder / "mat")
    printed, _ = shell(*TABLE, *cache, "--trainings", "mat", "--output_dir", folder / "evaluation")
    note = metrics(folder / "evaluation")["rows"]["MAT"]["note"]
    for flag, value in CHANGED.items():
        assert re.search(rf"--{flag} {value}, not \S+", note)
    assert "--max_steps 1, not none" in note and "--steps" not in note.replace("--max_steps", "")
    assert "\nMAT (*) " in printed and "(*) MAT: trained with --lr 1e-09, not " in printed
    assert r"MAT (\*)" in (folder / "evaluation" / "table.md").read_text()


def test_the_loss_of_an_epoch_is_the_mean_over_its_steps(tmp_path, cache):
    words = ["--epochs", 2, "--loss_window", 1, "--lr", 1e-3, "--output_dir", tmp_path / "mat"]
    printed, _ = shell("defend_clip_mat_v2.py", *SMALL, *TRAINING, *words, *cache)
    log, epochs = jsonl(tmp_path / "mat" / "log.jsonl"), metrics(tmp_path / "mat")["epochs"]
    means = [np.mean([entry["loss"] for entry in log if entry["epoch"] == epoch]) for epoch in (1, 2)]
    assert [epoch["loss"] for epoch in epochs] == pytest.approx(means) and len(log) == 4
    assert re.findall(r"loss ([\d.]+)", printed) == [f"{mean:.3f}" for mean in means]


def test_a_copied_training_is_another_run_in_a_folder_of_its_own_name(tmp_path, cache, monkeypatch):
    """README's recipe for a defence that is trained."""
    monkeypatch.chdir(tmp_path)
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    changed = Path("defend_clip_mat_v2.py").read_text().replace("NOISE_SIGMA = 15", "NOISE_SIGMA = 25")
    Path("defend_clip_mine.py").write_text(changed)
    words = [*SMALL, *TRAINING, "--max_steps", 1, *cache]
    shell(tmp_path / "defend_clip_mat_v2.py", *words)
    before = files(tmp_path / "runs" / "smoke" / "mat")
    shell(tmp_path / "defend_clip_mine.py", *words)
    made = [record.parent for record in tmp_path.glob("runs/smoke/*/metrics.json")]
    assert len(made) == 2 and "mine" in made[0].name + made[1].name
    (mine,) = (folder for folder in made if "mine" in folder.name)
    _, line = shell(tmp_path / "defend_clip_mine.py", *words, "--output_dir", "runs/smoke/mat", code=2)
    assert "defend_clip_mat_v2.py" in line and "choose another --output_dir" in line
    assert files(tmp_path / "runs" / "smoke" / "mat") == before
    shell(*TABLE, *cache, "--trainings", "mat", "--checkpoint", f"mine=local-dir:{mine}")
    rows = metrics(tmp_path / "runs" / "smoke" / "evaluation")["rows"]
    assert rows["mine"]["clean_similarity"] != rows["MAT"]["clean_similarity"]


# What is refused before anything is made, and what is needed


@pytest.mark.parametrize("mistake", ["defence", "name", "training", "adversarial images", "folder"])
def test_reproduce_names_a_mistake_before_anything_is_made(mistake, trained, tmp_path, cache, monkeypatch):
    words, said = {
        "defence": (["--defence", "pdg+jpeg50"], "pdg"),
        "name": (["--checkpoint", f"MAT={TINY / 'clip' / 'open_clip_model.safetensors'}"], "MAT"),  # is taken
        "training": (["--trainings", "mat", "pgd"], "loss"),  # the second is there, with another one
        "adversarial images": (["--steps", 2], "steps"),
        "folder": ([], "metrics.json"),
    }[mistake]
    if mistake == "training":
        shutil.copytree(trained / "online", tmp_path / "pgd")
    if mistake == "adversarial images":
        shutil.copytree(trained / "adversarial_eval", tmp_path / "adversarial_eval")
    if mistake == "folder":
        (tmp_path / "evaluation").mkdir()
        (tmp_path / "evaluation" / "metrics.json").write_text('{"accuracy": 1}')
    before = files(tmp_path)
    monkeypatch.setattr(common, "pgd", no_attack)
    _, line = shell(*TABLE, *cache, "--reproduce", *words, "--output_dir", tmp_path / "evaluation", code=2)
    assert said in line and line.count("\n") == 1
    assert files(tmp_path) == before


def test_a_step_that_is_no_jpeg_is_named_as_it_was_typed(trained, cache):
    state = TINY / "clip" / "open_clip_model.safetensors"
    words = ["--trainings", "--checkpoint", f"mine={state}", "--defence", "mine+blur2"]
    _, line = shell(*TABLE, *cache, *words, "--output_dir", trained / "evaluation", code=2)
    assert "mine+blur2" in line and "NoneType" not in line


def test_reproduce_attacks_no_training_images_where_no_training_wants_them(tmp_path, cache):
    shell(*TABLE, *cache, "--reproduce", "--trainings", "mat", "--output_dir", tmp_path / "evaluation")
    assert list(metrics(tmp_path / "evaluation")["rows"]) == ["original", "MAT"]
    assert not (tmp_path / "adversarial_train").exists()


def test_a_folder_with_images_of_another_data_set_is_named_before_the_first_step(
    tmp_path, scenes, cache, monkeypatch
):
    words = [*TABLE, *cache, "--trainings"]
    for name, some in (("a", scenes), ("b", scenes[10:])):
        own_pictures(tmp_path / name, some, [caption for _, caption in some[:4]])
    shell(*words, "--eval_data", tmp_path / "a", "--output_dir", tmp_path / "out" / "a")
    before = files(tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(common, "pgd", no_attack)
        _, line = shell(*words, "--eval_data", tmp_path / "b", "--output_dir", tmp_path / "out" / "b", code=2)
    assert "another data set" in line and "choose another --output_dir" in line
    assert line.count("\n") == 1 and files(tmp_path / "out") == before
    shell(*words, "--eval_data", tmp_path / "b", "--output_dir", tmp_path / "other" / "b")


def test_no_time_is_forecast(tmp_path, cache):
    printed, _ = shell(*GENERATE, "--num_images", 2, *cache, "--output_dir", tmp_path / "out")
    assert "work:" not in printed and "about" not in printed


# What makes two runs the same, and what a folder keeps


@pytest.mark.parametrize("flag", ["--device", "--model", "--train_data"])
def test_a_flag_that_says_the_same_or_is_not_read_makes_no_other_run(flag, tmp_path, cache, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY / "clip", "clip")
    (tmp_path / "pictures").mkdir()
    ways = {"--device": [[], ["cpu"]], "--model": [["local-dir:clip"], ["local-dir:./clip"]]}
    ways |= {"--train_data": [[], [tmp_path / "pictures"]]}
    first, second = ([flag, *value] if value else [] for value in ways[flag])
    words = [*GENERATE, "--num_images", 2, *cache, "--output_dir", tmp_path / "out"]
    shell(*words, *first)
    before = files(tmp_path / "out")
    monkeypatch.setattr(common, "pgd", no_attack)
    shell(*words, *second)
    assert files(tmp_path / "out") == before


@pytest.fixture
def extension(tmp_path, cache, monkeypatch):
    """A folder of 4 adversarial images, whose extension to 9 was interrupted at the last one; the command."""
    words = [*GENERATE, *cache, "--output_dir", tmp_path / "out", "--num_images"]
    shell(*words, 4)
    pgd = common.pgd

    def interrupted(loss_fn, images, *rest, **options):
        if len(images) == 1:
            raise KeyboardInterrupt
        return pgd(loss_fn, images, *rest, **options)

    with monkeypatch.context() as patched:
        patched.setattr(common, "pgd", interrupted)
        shell(*words, 9, code=130)
    return tmp_path / "out", [*words, 9]


def test_an_unfinished_extension_goes_on_with_another_number_of_processes(extension, monkeypatch):
    folder, words = extension
    for file in folder.rglob("run.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"processes": 8}))
    attacked, pgd = [], common.pgd
    monkeypatch.setattr(common, "pgd", lambda loss, x, *rest: attacked.append(len(x)) or pgd(loss, x, *rest))
    shell(*words)
    assert sum(attacked) == 1 and metrics(folder)["n"] == 9


def test_an_unfinished_extension_is_refused_after_an_upgrade_and_kept(extension, monkeypatch):
    folder, words = extension
    before = files(folder)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "__version__", "9.9.9")
        _, line = shell(*words, code=2)
    assert "9.9.9" in line and torch.__version__.split("+")[0] in line and line.count("\n") == 1
    assert files(folder) == before
    shell(*words)  # with the old version it goes on


def test_of_two_runs_into_one_folder_in_the_same_instant_one_says_that_the_other_is_writing(
    tmp_path, cache, monkeypatch
):
    """The other one takes the folder's lock, and writes, while this one looks for the lock or writes a first file."""
    folder, replace_file, flock, other = tmp_path / "out", os.replace, fcntl.flock, []

    def start_other(temporary=None, target=None):
        if not other:
            other.append(os.open(folder, os.O_RDONLY))
            flock(other[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
            if temporary:  # its own has another name if this one has the number of the process
                theirs = str(temporary).replace(str(os.getpid()), "other")
                Path(theirs).touch()
                replace_file(theirs, target)

    def replace_second(temporary, target):
        if Path(target).parent == folder:
            start_other(temporary, target)
        replace_file(temporary, target)

    def flock_second(file, how):
        if os.path.samestat(os.fstat(file), os.stat(folder)):
            start_other()
        flock(file, how)

    folder.mkdir()
    monkeypatch.setattr(os, "replace", replace_second)
    monkeypatch.setattr(fcntl, "flock", flock_second)
    _, line = shell(*GENERATE, "--num_images", 2, *cache, "--output_dir", folder, code=2)
    os.close(other[0])
    assert "another run is writing" in line and line.count("\n") == 1


def test_the_images_of_a_row_are_those_behind_its_figures_whatever_its_name(tmp_path, cache):
    words = [*TABLE, *cache, "--trainings", "--output_dir", tmp_path / "table"]
    rows = {"a b": 1.01, "a_b": 0.97}
    for name, scale in rows.items():
        rows[name] = ["--checkpoint", f"{name}={other_weights(tmp_path / f'{scale}.safetensors', scale)}"]
        shell(*words, *rows[name])
    for name in rows:
        shell(*words, *rows[name])
        wanted = metrics(tmp_path / "table")["per_image"][name]["white_box"]["similarity"]
        saved = [jsonl(file)[: len(wanted)] for file in (tmp_path / "table").rglob("metadata.jsonl")]
        assert pytest.approx(wanted) in [[entry["similarity"] for entry in entries] for entries in saved]


def test_what_a_user_puts_beside_the_white_box_images_stays(trained, tmp_path, cache):
    folder = shutil.copytree(trained, tmp_path / "copy")
    for name in (".DS_Store", "notes.txt", "chosen/1.png"):
        (folder / "evaluation" / "white_box" / name).parent.mkdir(exist_ok=True)
        (folder / "evaluation" / "white_box" / name).write_text("mine")
    before = files(folder / "evaluation" / "white_box")
    shell(*TABLE, 50, *cache, "--trainings", "--output_dir", folder / "evaluation")
    assert "JPEG 50" in metrics(folder / "evaluation")["rows"]
    assert files(folder / "evaluation" / "white_box").items() >= before.items()


def test_radii_that_were_measured_once_are_kept_and_shown_when_they_are_asked_for(
    trained, tmp_path, cache, monkeypatch
):
    folder = shutil.copytree(trained, tmp_path / "copy")
    words = [*TABLE, *cache, "--trainings", "--output_dir", folder / "evaluation", "--radii"]
    first, _ = shell(*words, "2/255")
    shell(*words, "4/255")
    monkeypatch.setattr(common, "pgd", no_attack)
    again, _ = shell(*words, "2/255")
    (line,) = (line for line in again.splitlines() if line.startswith("R@1, cosine at"))
    assert line.split()[-2:] == ["clean", "2/255"] and line in first
    both, _ = shell(*words, "4/255", "2/255")
    assert re.search("clean +2/255 +4/255\n", both)
