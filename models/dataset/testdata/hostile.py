"""Writes hostile/: IDX files that must be refused, each NAME.idx with NAME.txt, the
words that the error must hold.

    python hostile.py
"""
import gzip
import pathlib
import struct

OUT = pathlib.Path(__file__).parent / "hostile"
OUT.mkdir(exist_ok=True)
for old in OUT.glob("*"):
    old.unlink()


def idx(dims, body, kind=0x08, magic=b"\0\0"):
    return magic + bytes([kind, len(dims)]) + b"".join(struct.pack(">I", d) for d in dims) + body


def case(name, data, *words):
    (OUT / f"{name}.idx").write_bytes(data)
    (OUT / f"{name}.txt").write_text("\n".join(words) + "\n")


def packed(data, **footer):
    return gzip.compress(data, mtime=0)


good = idx([2, 2, 2], bytes(8))
case("empty", b"", "no magic number")
case("bad-magic", idx([2], b"ab", magic=b"\x01\0"), "magic number")
case("png", b"\x89PNG\r\n\x1a\n" + bytes(20), "magic number")
case("element-type", idx([2], bytes(8), kind=0x0B), "element type 0x0b", "0x08", "0x0d")
case("no-dimensions", idx([], b""), "0 dimensions")
case("too-many-dimensions", idx([1] * 255, b"a"), "255 dimensions")
case("header-cut", good[:9], "truncated in the dimensions")
case("zero-dimension", idx([0, 28, 28], b""), "none may be zero")
case("truncated", good[:-1], "truncated", "need 8 bytes, 7 are there")
case("trailing", good + b"!", "1 bytes after")
case("dimensions-4GiB", idx([2**32 - 1], b""), "more than")
case("dimensions-overflow", idx([2**32 - 1] * 4, b""), "more than")
case("dimensions-overflow-to-8", idx([2**31, 2**31, 4, 2], bytes(8)), "more than")  # 2^65 = 0 in 64 bits
case("dimensions-overflow-float", idx([2**30, 1], b"", kind=0x0D), "more than")
case("claims-1GiB", idx([2**20, 32, 32], b""), "truncated", "0 are there")
case("float-truncated", idx([2, 1, 1], bytes(7), kind=0x0D), "need 8 bytes, 7 are there")

case("gzip-of-nothing", packed(b""), "no magic number")
case("gzip-header-only", packed(good)[:5], "EOF")
case("gzip-cut", packed(good)[:-12], "idx")
case("gzip-no-checksum", packed(good)[:-8], "idx")
case("gzip-truncated", packed(good[:-1]), "truncated")
case("gzip-trailing", packed(good + b"!"), "1 bytes after")
case("gzip-then-bytes", packed(good) + b"!!!!" + struct.pack("<I", len(good)), "after the end of the gzip stream")
case("gzip-then-gzip", packed(good) + packed(good), "after the end of the gzip stream")
case("gzip-checksum", packed(good)[:-8] + b"\0\0\0\0" + packed(good)[-4:], "checksum")
case("gzip-bomb", packed(good + bytes(20 << 20)), "bytes after the 8")  # 20 MiB from 20 KiB
case("gzip-bomb-honest-footer", packed(idx([1, 1, 1], bytes(20 << 20))), "bytes after the 1")
# The footer and the header claim the same 1 GiB, more than deflate can reach.
claim = idx([2**20, 32, 31], b"")
case("gzip-claims-1GiB", packed(claim)[:-4] + struct.pack("<I", len(claim) + 2**20 * 32 * 31), "cannot hold them")
# A claim that deflate could reach, but does not.
claim = idx([4, 10, 10], b"x")
case("gzip-claims-more", packed(claim)[:-4] + struct.pack("<I", len(claim) - 1 + 400), "truncated")
