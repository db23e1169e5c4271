"""Annotations in COCO's format: what is read of them, and what is refused by name."""

import copy
import json

import boxed_sets
import numpy as np
import pytest
from PIL import Image

from lora_jax.data import box_sets


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return boxed_sets.write(tmp_path_factory.mktemp("set"), counts=(4, 2))


def read(folder, name="train.json", images="images", labels=boxed_sets.LABELS, **how):
  return box_sets.read(folder, name, images, labels, 448, **how)


def test_a_record_has_its_boxes_as_fractions_and_the_names_of_their_classes(folder):
  found = read(folder)
  pictures, fields = boxed_sets.make(4, 0)
  assert [row["name"] for row in found] == [f"train/{n}.png" for n in range(4)]
  assert [len(row["boxes"]) for row in found] == [1, 2, 1, 2]
  first = fields["annotations"][0]
  x, y, width, height = first["bbox"]
  wanted = [x / 64, y / 48, (x + width) / 64, (y + height) / 48]
  np.testing.assert_allclose(found[0]["boxes"], [wanted], rtol=1e-6)
  assert found[0]["labels"] == [boxed_sets.LABELS[first["category_id"] - 5]]
  assert found[0]["size"] == (64, 48)
  np.testing.assert_array_equal(found[0]["picture"], pictures[0])


def test_pictures_are_shrunk_and_their_boxes_stay_where_they_are(folder):
  small = box_sets.read(folder, "train.json", "images", boxed_sets.LABELS, 24)
  for one, other in zip(small, read(folder), strict=True):
    assert one["picture"].shape == (24, 32, 3) and one["size"] == (64, 48)
    np.testing.assert_array_equal(one["boxes"], other["boxes"])


def test_pictures_that_are_left_out_are_not_read(folder):
  found = read(folder, leave_out=("train/1.png",))
  assert [row["name"] for row in found] == ["train/0.png", "train/2.png", "train/3.png"]
  with pytest.raises(
    ValueError, match=r"data\.leave_out names 'train/9\.png', which is no picture"
  ):
    read(folder, leave_out=("train/9.png",))


def changed(folder, tmp_path, change):
  """The set with changed annotations."""
  fields = json.loads((folder / "train.json").read_text())
  made = change(copy.deepcopy(fields))
  (tmp_path / "images").symlink_to(folder / "images")
  (tmp_path / "train.json").write_text(made if isinstance(made, str) else json.dumps(made))
  return tmp_path


def put(*place):
  """A change of one value, which comes last."""
  *path, name, value = place

  def change(fields):
    inner = fields
    for each in path:
      inner = inner[each]
    inner[name] = value
    return fields

  return change


def add(name, n):
  """A change that repeats an entry."""

  def change(fields):
    fields[name].append(dict(fields[name][n]))
    return fields

  return change


REFUSED = {
  "a box outside": (
    put("annotations", 0, "bbox", [50, 10, 20, 10]), r"annotations\[0\]: bbox .* is outside of its"
  ),
  "a box before the picture": (put("annotations", 0, "bbox", [-3, 0, 9, 9]), "is outside of its"),
  "a box without width": (put("annotations", 1, "bbox", [5, 5, 0, 9]), r"\[1\]: bbox .* no area"),
  "a negative height": (put("annotations", 1, "bbox", [5, 5, 9, -9]), "has no area"),
  "a box on the edge": (put("annotations", 1, "bbox", [64, 5, 1, 9]), "no area within its picture"),
  "three numbers": (put("annotations", 1, "bbox", [5, 5, 9]), "bbox must be 4 numbers"),
  "a text in a box": (put("annotations", 1, "bbox", [5, 5, 9, "9"]), "bbox must be 4 numbers"),
  "a bool in a box": (put("annotations", 1, "bbox", [5, 5, 9, True]), "bbox must be 4 numbers"),
  "a huge number": (put("annotations", 1, "bbox", [5, 5, 9, 10**12]), "bbox must be 4 numbers"),
  "no box": (put("annotations", 1, "bbox", None), r"annotations\[1\]: bbox must be a list"),
  "no image": (put("annotations", 0, "image_id", 99), "image_id 99 is the id of none of images"),
  "no category": (put("annotations", 0, "category_id", 9), "category_id 9 is the id of no"),
  "another class": (put("categories", 0, "name", "blue"), "is not in task.labels"),
  "a crowd": (put("annotations", 0, "iscrowd", 1), "iscrowd is 1; boxes around many objects"),
  "an id of text": (put("annotations", 0, "id", "7"), "id must be a whole number, not '7'"),
  "an id of bool": (put("images", 0, "id", True), "id must be a whole number, not True"),
  "a fraction for an id": (put("annotations", 0, "image_id", 10.0), "must be a whole number"),
  "a number for a name": (put("images", 0, "file_name", 7), "file_name must be a text, not 7"),
  "an image twice": (add("images", 0), r"images\[4\]: id 10 is that of images\[0\]"),
  "an annotation twice": (add("annotations", 0), r"id 0 is that of annotations\[0\]"),
  "a category twice": (add("categories", 1), r"id 6 is that of categories\[1\]"),
  "two categories of a name": (put("categories", 1, "name", "red"), r"name 'red' is that of"),
  "a file twice": (put("images", 1, "file_name", "train/0.png"), "file_name 'train/0.png' is that"),
  "another size": (put("images", 0, "width", 640), "the width 640, and .*0.png has 64"),
  "a size of text": (put("images", 0, "height", "48"), "the height '48', and .*0.png has 48"),
  "outside of the folder": (put("images", 0, "file_name", "../x.png"), "leads out of the folder"),
  "an absolute name": (put("images", 0, "file_name", "/etc/x.png"), "leads out of the folder"),
  "a name for Windows": (put("images", 0, "file_name", "..\\x.png"), "leads out of the folder"),
  "an empty name": (put("images", 0, "file_name", ""), "leads out of the folder"),
  "images as an object": (put("images", {}), "images must be a list"),
  "an image as a text": (put("images", ["a"]), r"images\[0\] must be an object"),
  "no images": (lambda fields: fields | {"images": [], "annotations": []}, "names no picture"),
  "no annotations": (lambda fields: {"images": []}, "categories must be a list, not None"),
  "a list": (lambda fields: [fields], "not a JSON object, but a list"),
  "no JSON": (lambda fields: "{", "is not annotations in COCO's format: not JSON"),
  "NaN": (lambda fields: json.dumps(fields).replace("48", "NaN", 1), "NaN is no JSON number"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_refused_with_the_file_and_the_entry(folder, tmp_path, name):
  change, words = REFUSED[name]
  with pytest.raises(ValueError, match=f"train.json: .*{words}"):
    read(changed(folder, tmp_path, change))


def test_a_box_up_to_a_pixel_outside_is_clipped(folder, tmp_path):
  own = changed(folder, tmp_path, put("annotations", 0, "bbox", [-0.6, 40, 10.6, 8.9]))
  found = read(own)[0]["boxes"]
  np.testing.assert_allclose(found, [[0, 40 / 48, 10 / 64, 1]], rtol=1e-6)


def test_a_picture_without_boxes_is_kept_and_an_unused_category_needs_no_label(folder, tmp_path):
  def change(fields):
    fields["categories"].append({"id": 8, "name": "blue"})
    kept = [x for x in fields["annotations"] if x["image_id"] != 10]
    return fields | {"annotations": kept}

  found = read(changed(folder, tmp_path, change))
  assert len(found) == 4 and found[0]["boxes"].shape == (0, 4) and not found[0]["labels"]


def test_missing_and_damaged_pictures_are_named(folder, tmp_path):
  own = boxed_sets.write(tmp_path, counts=(3, 1))
  file = own / "images" / "train" / "1.png"
  content = file.read_bytes()
  file.write_bytes(content[: len(content) // 2])
  with pytest.raises(ValueError, match=r"1\.png: is a damaged picture"):
    read(own)
  file.write_text("no picture")
  with pytest.raises(ValueError, match=r"1\.png: is no picture"):
    read(own)
  Image.new("1", (9000, 9000)).save(file)
  with pytest.raises(ValueError, match=r"1\.png: has 9,000 × 9,000 pixels, over the limit"):
    read(own)
  file.unlink()
  with pytest.raises(FileNotFoundError, match=r"1\.png: no such picture, and .*train\.json has it"):
    read(own)
  with pytest.raises(FileNotFoundError, match=r"other\.json"):
    read(own, "other.json")
  with pytest.raises(ValueError, match="is no folder"):
    read(own / "train.json")
  for name in ("../train.json", "/train.json", ""):
    with pytest.raises(ValueError, match=r"annotations '.*' leads out of the folder"):
      read(own, name)


def test_modes_of_pictures_are_converted_and_rotated_ones_have_the_size_that_is_shown(tmp_path):
  pictures, fields = boxed_sets.make(3, 0)
  modes = {"0.png": "P", "1.png": "L", "2.png": "RGBA"}
  for picture, (name, mode) in zip(pictures, modes.items(), strict=True):
    Image.fromarray(picture).convert(mode).save(tmp_path / name)
  fields["images"].append({"id": 7, "file_name": "turned.jpg", "width": 48, "height": 64})
  exif = Image.Exif()
  exif[0x0112] = 6
  Image.fromarray(pictures[0]).save(tmp_path / "turned.jpg", exif=exif)
  (tmp_path / "a.json").write_text(json.dumps(fields))
  found = read(tmp_path, "a.json", "")
  assert [row["picture"].shape for row in found] == [(48, 64, 3)] * 3 + [(64, 48, 3)]
  assert found[-1]["size"] == (48, 64)
  fields["images"][-1] |= {"width": 64, "height": 48}
  (tmp_path / "b.json").write_text(json.dumps(fields))
  with pytest.raises(ValueError, match=r"turned\.jpg' has the width 64, and .* has 48"):
    read(tmp_path, "b.json", "")


def test_the_real_cells_are_read(public_data):
  found = box_sets.read(
    public_data / "bccd", "val.json", "images", ("RBC", "WBC", "Platelets"), 448
  )
  assert len(found) == 87 and sum(len(row["boxes"]) for row in found) == 1137
  assert all(row["size"] == (640, 480) for row in found)
