"""Small files that unpack to gigabytes, or to millions of members, each by another way."""

import bz2
import gzip
import io
import lzma
import struct
import tarfile
import zipfile


def zipped(files: dict[str, bytes], method: int) -> bytes:
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, "w", method) as file:
    for name, data in files.items():
      file.writestr(name, data)
  return buffer.getvalue()


def many(data: bytes, count: int, pack=gzip.compress) -> bytes:
  """Data so many times, packed in little time: packed streams may follow each other."""
  return pack(data) * count


def head(name: str, kind: bytes, size: int) -> bytes:
  info = tarfile.TarInfo(name)
  info.type, info.size = kind, size
  return info.tobuf(tarfile.GNU_FORMAT)


def with_sum(header: bytes) -> bytes:
  """A header of a tar with its sum put right."""
  found = header[:148] + b" " * 8 + header[156:]
  return found[:148] + b"%06o\0 " % sum(found) + found[156:]


def records_of_pax(size: int) -> bytes:
  """Attributes of a pax header that take so many bytes."""
  return b"".join(b"16 key%05d=abc\n" % n for n in range(size // 16))


def zip_of_names(count: int) -> bytes:
  """A zip whose directory has as many entries of the one member as asked for."""
  data = zipped({"data/member.bin": b"x"}, zipfile.ZIP_STORED)
  start = data.index(b"PK\x01\x02")
  end = data.index(b"PK\x05\x06")
  entry = data[start:end]
  sizes = (65535, 65535, len(entry) * count, start, 0)
  tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, *sizes)
  return data[:start] + entry * count + tail


ZEROS, MIB = bytes(1 << 24), 1 << 20
END = bytes(1024)
MEMBERS = head("data/x.txt", tarfile.REGTYPE, 0) * (1 << 13)
PAX, GLOBAL, LONG = tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME
SPARSE = head("data/member.bin", tarfile.GNUTYPE_SPARSE, 0)
SPARSE = with_sum(SPARSE[:482] + b"\1" + SPARSE[483:])
BOMBS = {
  "a pax header of gigabytes": lambda: gzip.compress(head("x", PAX, 1 << 33)) + many(ZEROS, 128),
  "a long name of gigabytes": lambda: gzip.compress(head("x", LONG, 1 << 33)) + many(ZEROS, 128),
  "zeros after the end": lambda: gzip.compress(END) + many(ZEROS, 256),
  "zeros after the end, bz2": lambda: bz2.compress(END) + many(ZEROS, 256, bz2.compress),
  "zeros after the end, xz": lambda: lzma.compress(END) + many(ZEROS, 256, lzma.compress),
  "millions of members": lambda: many(MEMBERS, 400),
  "attributes of all members": lambda: many(
    head("x", GLOBAL, 1 << 15) + records_of_pax(1 << 15) + MEMBERS[:512], 1 << 11
  ),
  "headers without end": lambda: many(head("x", PAX, 1) + b"x" + bytes(511), 1 << 17),
  "a map of holes without end": lambda: gzip.compress(SPARSE) + many(b"1" * (1 << 24), 64),
  "a member of gigabytes": lambda: gzip.compress(head("data/member.bin", b"0", 1 << 33))
  + many(ZEROS, 256),
  "a member in a zip": lambda: zipped({"data/member.bin": ZEROS * 12}, zipfile.ZIP_DEFLATED),
  "a member in a zip, bz2": lambda: zipped({"data/member.bin": ZEROS * 12}, zipfile.ZIP_BZIP2),
  "a directory of millions": lambda: zip_of_names(1 << 20),
  "an archive in an archive": lambda: zipped(
    {"data/member.bin": gzip.compress(head("in.txt", b"0", 1 << 33)) + many(ZEROS, 256)},
    zipfile.ZIP_DEFLATED,
  ),
  "lines.jsonl": lambda: many(b'{"a": 1}\n' * MIB, 400),
  "one line.jsonl": lambda: gzip.compress(b'{"a": "') + many(b"x" * (1 << 24), 300),
  "an array.json": lambda: gzip.compress(b"[{}") + many(b",{}" * (1 << 22), 300),
  "an array of an array.json": lambda: gzip.compress(b"[" * (1 << 26)),
  "table.csv": lambda: gzip.compress(b"text\n") + many(b"a\n" * (1 << 23), 300),
  "a quote that stays open.csv": lambda: gzip.compress(b'text\n"') + many(b"a\n" * (1 << 23), 300),
}  # fmt: skip
