"""Own pictures and captions: each figure is of the picture that is named, and what cannot be read is one line."""

from conftest import lines_of, metrics, shell
from test_pictures import own_pictures


def attack(tmp_path, source, *words, split="eval", code=0):
    """Attack the images of a data set, into tmp_path/out: what is printed, or the lines with which it ends."""
    words = ["--split", split, f"--{split}_data={source}", "--output_dir", tmp_path / "out", *words]
    words = ["--preset", "smoke", "--steps", 1, "--cache_dir", tmp_path / "cache", *words]
    out, err = shell("generate_pgd_adversarial.py", *words, code=code)
    return lines_of(err) if code else out


# Flags


def test_a_home_folder_behind_an_equals_sign_is_own_pictures_of_which_all_are_used(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for count in (17, 3):  # more and less than the preset's 16
        own_pictures(tmp_path / f"of {count}", count)
        attack(tmp_path, f"~/of {count}", "--overwrite")
        assert metrics(tmp_path / "out")["n"] == count
    (tmp_path / "of 3" / "metadata.csv").rename(tmp_path / "metadata.csv")
    (line,) = attack(tmp_path, "~", "--image_root=eval=~/of 3", "--output_dir", tmp_path / "of 3", code=2)
    assert f"{tmp_path}/of 3 is an input, too" in line


def test_a_folder_of_images_may_have_the_name_of_a_split_or_an_equals_sign_in_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (own_pictures(tmp_path / "train", 3) / "metadata.csv").rename(tmp_path / "metadata.csv")
    attack(tmp_path, ".", "--image_root", "train")
    (tmp_path / "train").rename(tmp_path / "a=b")
    attack(tmp_path, ".", "--image_root", "eval=a=b", "--overwrite")
    (line,) = attack(tmp_path, ".", "--image_root", "a=b", "--output_dir", "a=b", code=2)
    assert "a=b is an input, too" in line
    (line,) = attack(tmp_path, ".", "--image_root", "a=b", "out", code=2)
    assert "--image_root a=b out: give one folder" in line
