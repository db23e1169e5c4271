"""Sets of labeled pictures: arrays of .npz files and folders of classes, and hostile ones."""

import io
import os
import random
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image

from lora_jax.data import image_sets, npz_files, splits

CLASSES = ("cat", "dog", "owl")
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (6, 5, 7, 3), np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2])


def written(path, **arrays):
  np.savez_compressed(path, **arrays)
  return path


def read(path, arrays=("images", "labels"), most=100):
  return image_sets.read(path, arrays, CLASSES, most)


def test_arrays_of_colors_and_of_grey_become_records(tmp_path):
  path = written(tmp_path / "a.npz", images=IMAGES, labels=LABELS, more=np.array(["text"]))
  found = read(path)
  assert [row["label"] for row in found] == ["cat", "dog", "owl"] * 2
  assert [row["name"] for row in found][:2] == ["images[0]", "images[1]"]
  np.testing.assert_array_equal(found[3]["picture"], IMAGES[3])
  for n, labels in enumerate((LABELS.astype(np.uint8)[:, None], LABELS.astype(np.int32))):
    for grey in (IMAGES[..., 0], IMAGES[..., :1]):
      found = read(written(tmp_path / f"{n}.npz", images=grey, labels=labels))
      expected = np.broadcast_to(IMAGES[2, ..., :1], IMAGES[2].shape)
      np.testing.assert_array_equal(found[2]["picture"], expected)
  assert read(path, most=4)[0]["picture"].shape == (4, 6, 3)


def test_the_real_sets_are_read(public_data):
  path = public_data / "cifar10_subset" / "dev1000.npz"
  with np.load(path) as arrays:
    classes, labels = tuple(map(str, arrays["classes"])), arrays["labels"]
    expected = arrays["images"]
  found = image_sets.read(path, ("images", "labels"), classes, 64)
  assert [classes.index(row["label"]) for row in found] == labels.tolist()
  np.testing.assert_array_equal(np.stack([row["picture"] for row in found]), expected)


def test_a_picture_that_comes_twice_stays_in_one_split_and_out_of_the_test(tmp_path, public_data):
  path = public_data / "pneumoniamnist" / "train_val.npz"
  both = [
    image_sets.read(path, (f"{x}_images", f"{x}_labels"), ("normal", "pneumonia"), 64)
    for x in ("train", "val")
  ]
  rest = splits.without(*both, "digest")
  with np.load(path) as arrays:
    train, held_out = ([x.tobytes() for x in arrays[f"{y}_images"]] for y in ("train", "val"))
  copies = sum(picture in set(held_out) for picture in train)
  assert len(both[0]) - len(rest) == copies > 5
  parts = splits.split(rest, "digest", {"train": 0.9, "validation": 0.1})
  digests = [{row["digest"] for row in parts[name]} for name in parts]
  assert digests[0].isdisjoint(digests[1])
  assert len({row["digest"] for row in both[0]}) == len(set(train)) < len(train)


@pytest.mark.parametrize(
  ("arrays", "words"),
  [
    ({"images": IMAGES}, r"has no array 'labels'; it has images"),
    ({"images": IMAGES, "labels": LABELS[:5]}, r"labels is int64 \(5,\), and labels are whole"),
    ({"images": IMAGES, "labels": LABELS * 1.0}, r"labels is float64 \(6,\), and labels are whole"),
    ({"images": IMAGES, "labels": LABELS - 1}, r"labels\[0\] is -1, and task\.labels"),
    ({"images": IMAGES, "labels": LABELS + 1}, r"labels\[2\] is 3, and task\.labels"),
    ({"images": IMAGES / 255, "labels": LABELS}, "images is float64"),
    ({"images": IMAGES[:, :0], "labels": LABELS}, "its pictures have no pixels"),
    ({"images": IMAGES[..., :2], "labels": LABELS}, "with 1 or 3 channels"),
    ({"images": IMAGES[:0], "labels": LABELS[:0]}, "holds no picture"),
    ({"images": np.array([{}] * 6), "labels": LABELS}, "'images' holds object, and not numbers"),
    ({"images": IMAGES, "labels": np.array(list("abcdef"))}, "'labels' holds <U1, and not numbers"),
  ],
)
def test_arrays_that_are_no_labeled_pictures_are_refused(tmp_path, arrays, words):
  with pytest.raises(ValueError, match=rf"a\.npz: {words}|a\.npz: .*{words}"):
    read(written(tmp_path / "a.npz", **arrays))


def test_the_names_of_arrays_are_for_files_alone(tmp_path):
  path = written(tmp_path / "a.npz", images=IMAGES, labels=LABELS)
  with pytest.raises(ValueError, match="name the array of pictures and that of labels"):
    read(path, ())
  with pytest.raises(ValueError, match="is a folder and has no arrays"):
    read(tmp_path)
  with pytest.raises(FileNotFoundError):
    read(tmp_path / "b.npz")


def folder_of(folder, count=2):
  for label in CLASSES:
    (folder / label).mkdir(parents=True)
    for n in range(count):
      Image.fromarray(IMAGES[n]).save(folder / label / f"{n}.png")
  return folder


def test_a_folder_of_class_folders_is_read_in_the_order_of_names(tmp_path):
  folder = folder_of(tmp_path / "set")
  (folder / ".hidden").mkdir()
  found = read(folder, ())
  assert [row["name"] for row in found] == [f"{x}/{n}.png" for x in CLASSES for n in (0, 1)]
  np.testing.assert_array_equal(found[1]["picture"], IMAGES[1])
  shutil.rmtree(folder / "owl")  # a class need not be in every set
  assert len(read(folder, ())) == 4


def test_what_does_not_belong_into_a_folder_is_refused_by_name(tmp_path):
  cases = {
    "emu": lambda x: (x / "emu").mkdir(),
    "labels.csv": lambda x: (x / "labels.csv").write_text("a"),
    "cat/notes.txt": lambda x: (x / "cat" / "notes.txt").write_text("a"),
    "cat/2.png": lambda x: (x / "cat" / "2.png").write_bytes(b"no picture"),
    "cat/3.png": lambda x: (x / "cat" / "3.png").mkdir(),
    "cat/4.png": lambda x: os.mkfifo(x / "cat" / "4.png"),
  }
  for n, (name, change) in enumerate(cases.items()):
    folder = folder_of(tmp_path / str(n))
    change(folder)
    with pytest.raises(ValueError, match=rf"{n}/{name}: is|{n}/{name}: its name"):
      read(folder, ())
  empty = tmp_path / "empty"
  (empty / "cat").mkdir(parents=True)
  with pytest.raises(ValueError, match="empty: holds no picture"):
    read(empty, ())


def npy(header, content=b"", version=b"\x01\x00"):
  text = header.encode("latin1")
  return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text + content


def packed(path, members, **how):
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
    for name, content in members.items():
      file.writestr(name, content, **how)
  return path


def test_headers_that_claim_what_is_not_there_are_refused(tmp_path):
  def header(shape, dtype="|u1", order=False):
    return f"{{'descr': '{dtype}', 'fortran_order': {order}, 'shape': {shape}, }}\n"

  cases = {
    "is not of its bytes": npy(header((10**12,)), b"abc"),
    "is not of its bytes ": npy(header((2,)), b"abc"),
    "holds object": npy(header((2,), "|O"), b"abc"),
    "is of version": npy(header((2,)), b"ab", b"\x09\x00"),
    "not of its bytes  ": npy(header((-3, -1)), b"abc"),
    "[Hh]eader": npy("import os", b"abc"),
    "magic|EOF|cut|expected": b"no array at all, but a text",
  }
  for words, content in cases.items():
    path = packed(tmp_path / "a.npz", {"images.npy": content, "labels.npy": content})
    with pytest.raises(ValueError, match=rf"a\.npz: .*({words.strip()})"):
      read(path)
  by_columns = np.asfortranarray(IMAGES)
  np.savez(tmp_path / "b.npz", images=by_columns)
  np.testing.assert_array_equal(npz_files.read(tmp_path / "b.npz", ["images"])[0], IMAGES)


def test_a_bomb_is_refused_by_its_size(tmp_path):
  header = "{'descr': '|u1', 'fortran_order': False, 'shape': (200000000,), }\n"
  content = npy(header, bytes(200_000_000))
  path = packed(tmp_path / "a.npz", {"images.npy": content, "labels.npy": b""})
  assert path.stat().st_size < 400_000
  with pytest.raises(ValueError, match=r"a\.npz: 'images' has 200,000,.* over the limit"):
    read(path)


def test_damaged_files_are_refused_or_give_pictures(tmp_path):
  buffer = io.BytesIO()
  np.savez(buffer, images=IMAGES, labels=LABELS)
  path, refused = tmp_path / "a.npz", 0
  for n in range(200):
    rng = random.Random(n)
    data = bytearray(buffer.getvalue())
    for _ in range(rng.randint(1, 3)):
      data[rng.randrange(len(data))] = rng.randrange(256)
    if n % 4 == 0:
      del data[rng.randrange(len(data)) :]
    path.write_bytes(data)
    try:
      assert all(row["picture"].dtype == np.uint8 for row in read(path))
    except ValueError as error:
      assert "a.npz" in str(error) and len(str(error)) < 1000
      refused += 1
  assert refused > 60
