"""Single files out of zip and tar archives, and archives that mean harm."""

import io
import os
import stat
import tarfile
import zipfile

import pytest

from lora_jax.io import archives


def tar_bytes(files: dict[str, bytes], mode: str = "w:gz") -> bytes:
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode=mode) as file:
    for name, data in files.items():
      if name.endswith("/"):
        info = tarfile.TarInfo(name[:-1])
        info.type = tarfile.DIRTYPE
      else:
        info = tarfile.TarInfo(name)
        info.size = len(data)
      file.addfile(info, io.BytesIO(data))
  return buffer.getvalue()


def zip_bytes(files: dict[str, bytes]) -> bytes:
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
    for name, data in files.items():
      file.writestr(name, data)
  return buffer.getvalue()


@pytest.fixture
def extract(tmp_path):
  def extract(data: bytes, *members: str) -> bytes | None:
    archive, folder = tmp_path / "archive", tmp_path / "out"
    archive.write_bytes(data)
    folder.mkdir(exist_ok=True)
    try:
      parts = [tuple(member.split("/")) for member in members]
      found = archives.extract(archive, parts, folder / "target")
      return (folder / "target").read_bytes() if found else None
    finally:
      assert set(os.listdir(folder)) <= {"target"}

  return extract


@pytest.mark.parametrize("pack", [zip_bytes, tar_bytes, lambda files: tar_bytes(files, "w:xz")])
def test_a_member_is_copied_whole(extract, pack):
  data = pack({"a/": b"", "a/b.txt": b"text", "a/c.txt": b"other"})
  assert extract(data, "a/b.txt") == b"text"
  assert extract(data, "a/d.txt") is None
  assert extract(data, "a") is None


def test_a_member_of_a_zip_may_have_no_name(tmp_path):
  content = zip_bytes({"x": b"1", "y/": b"", "y/z": b"2"})
  (tmp_path / "archive").write_bytes(content.replace(b"x", b"\0"))  # names end at a zero
  assert set(archives.list_zip(tmp_path / "archive")) == {"", "y/z"}


@pytest.mark.parametrize("inner", [zip_bytes, tar_bytes])
@pytest.mark.parametrize("outer", [zip_bytes, tar_bytes])
def test_a_path_leads_through_archives_within_archives(extract, outer, inner):
  deepest = tar_bytes({"t.txt": b"deep"})
  data = outer({"x/": b"", "x/one.pack": inner({"y/two.tgz": deepest})})
  assert extract(data, "x/one.pack/y/two.tgz/t.txt") == b"deep"
  assert extract(data, "x/one.pack/y/two.tgz") == deepest
  assert extract(data, "x/one.pack/y/none.tgz/t.txt") is None


def test_a_plain_tar_that_ends_in_a_zip_is_a_tar(extract):
  data = tar_bytes({"a.txt": b"text", "b.zip": zip_bytes({"c.txt": b"deep"})}, "w")
  assert extract(data, "a.txt") == b"text"
  assert extract(data, "b.zip/c.txt") == b"deep"


def test_the_first_member_that_is_there_is_taken(extract):
  assert extract(zip_bytes({"b": b"2", "c": b"3"}), "a", "c", "b") == b"3"


def test_a_path_into_a_file_that_is_no_archive_is_refused(extract):
  with pytest.raises(ValueError, match=r"b/c: cannot be read from its archive"):
    extract(zip_bytes({"a.txt": b"text"}), "a.txt/b/c")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_refused(extract, kind):
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode="w") as file:
    info = tarfile.TarInfo("data.csv")
    info.type, info.linkname = kind, "/etc/passwd"
    file.addfile(info)
  with pytest.raises(ValueError, match=r"data.csv: is a link and not a regular file"):
    extract(buffer.getvalue(), "data.csv")


def test_links_in_a_zip_are_refused(extract):
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, "w") as file:
    info = zipfile.ZipInfo("data.csv")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    file.writestr(info, "/etc/passwd")
  with pytest.raises(ValueError, match=r"data.csv: is a link"):
    extract(buffer.getvalue(), "data.csv")


def test_a_member_that_claims_more_than_the_limit_is_refused_unread(extract, monkeypatch):
  monkeypatch.setattr(archives, "_MAX_BYTES", 1 << 20)
  for pack in (zip_bytes, tar_bytes):
    with pytest.raises(ValueError, match=r"zeros: claims 2097152 bytes .* over the limit"):
      extract(pack({"zeros": bytes(1 << 21)}), "zeros")


@pytest.mark.parametrize("pack", [zip_bytes, tar_bytes])
def test_a_damaged_archive_is_refused(extract, pack):
  data = bytearray(pack({"a.bin": os.urandom(5000)}))
  data[1000:1100] = bytes(100)
  with pytest.raises(ValueError, match=r"a.bin: cannot be read from its archive"):
    extract(bytes(data), "a.bin")
  with pytest.raises(ValueError, match=r"a.bin: cannot be read from its archive"):
    extract(pack({"a.bin": os.urandom(5000)})[:2000], "a.bin")


ENCRYPTED, ODD_METHOD, PATCHED = 1, 14, 32


def with_field(data: bytes, place: int, local: int, value: int) -> bytes:
  """A zip of one member with a field of its two headers set."""
  found, directory = bytearray(data), data.index(b"PK\x01\x02")
  found[directory + place : directory + place + 2] = value.to_bytes(2, "little")
  found[local : local + 2] = value.to_bytes(2, "little")
  return bytes(found)


@pytest.mark.parametrize(
  ("place", "local", "value", "words"),
  [
    (8, 6, ENCRYPTED, "encrypted"),
    (8, 6, PATCHED, "compressed patched data"),
    (10, 8, ODD_METHOD, ""),
    (10, 8, 9, "compression"),
    (6, 4, 90, "zip file version"),
  ],
)
def test_an_encrypted_or_odd_zip_is_refused(extract, place, local, value, words):
  data = with_field(zip_bytes({"a.txt": b"text" * 100}), place, local, value)
  with pytest.raises(
    ValueError, match=rf"a.txt: cannot be read from its archive: .*{words}|{words}"
  ):
    extract(data, "a.txt")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_the_other_methods_of_a_zip_are_read(extract, method):
  data, buffer = os.urandom(100_000) + bytes(100_000), io.BytesIO()
  with zipfile.ZipFile(buffer, "w", method) as file:
    file.writestr("a.bin", data)
  assert extract(buffer.getvalue(), "a.bin") == data


def test_a_damaged_bz2_is_refused(extract):
  data = bytearray(tar_bytes({"a.bin": os.urandom(5000)}, "w:bz2"))
  assert extract(bytes(data), "a.bin")
  data[2000:2010] = bytes(10)
  with pytest.raises(ValueError, match=r"a.bin: cannot be read from its archive"):
    extract(bytes(data), "a.bin")


@pytest.mark.parametrize("name", ["PKG-INFO", "BZh91AY"])
def test_a_tar_whose_first_name_looks_like_another_archive_is_a_tar(extract, name):
  assert extract(tar_bytes({name: b"1", "a.txt": b"text"}, "w"), "a.txt") == b"text"


def test_a_member_with_holes_is_refused(extract):
  buffer = io.BytesIO()
  info = tarfile.TarInfo("a.bin")
  info.type = tarfile.GNUTYPE_SPARSE
  buffer.write(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
  with pytest.raises(ValueError, match=r"a.bin: is a link and not a regular file"):
    extract(buffer.getvalue(), "a.bin")


def test_of_two_members_of_one_name_the_last_is_taken_as_tar_does(extract):
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode="w:gz") as file:
    for data in (b"first", b"last"):
      info = tarfile.TarInfo("a.txt")
      info.size = len(data)
      file.addfile(info, io.BytesIO(data))
  assert extract(buffer.getvalue(), "a.txt") == b"last"


def test_a_full_disk_is_no_damage_of_the_archive(tmp_path):
  (tmp_path / "archive").write_bytes(zip_bytes({"a.txt": b"text"}))
  with pytest.raises(FileNotFoundError):
    archives.extract(tmp_path / "archive", [("a.txt",)], tmp_path / "absent" / "a.txt")


def test_text_that_packs_well_is_no_bomb(extract):
  line = b'{"prompt": "the same long prompt in every record, again and again", "id": %07d}\n'
  data = b"".join(line % n for n in range(1 << 20))
  assert len(data) > 1 << 26
  assert extract(tar_bytes({"rows.jsonl": data}), "rows.jsonl") == data
