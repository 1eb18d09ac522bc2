"""Reading photos of every kind, and surviving those that are none."""

from __future__ import annotations

import io
import os
import random
import struct
import zlib

import numpy as np
import pytest

from diffcam_fast.models import photos
from diffcam_fast.models.photos import PhotoError, read_photo

Image = pytest.importorskip("PIL.Image")


def saved(path, image, **options):
    image.save(path, **options)
    return path


def flat(mode, color, size=(8, 6)):
    return Image.new(mode, size, color)


def bomb(width, height):
    """A PNG of a few bytes that says to be huge."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tiff", "gif"])
def test_formats(tmp_path, suffix):
    photo = read_photo(saved(tmp_path / f"photo.{suffix}", flat("RGB", (200, 100, 50))))
    assert (photo.mode, photo.size) == ("RGB", (8, 6))
    assert np.abs(np.asarray(photo).astype(int) - (200, 100, 50)).max() <= 8


def test_the_ending_does_not_matter(tmp_path):
    path = saved(tmp_path / "photo.jpg", flat("RGB", "red"), format="PNG")
    assert read_photo(path).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("LA", (77, 255), (77, 77, 77)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 128), (127, 127, 127)),
    ],
)
def test_modes_of_png(tmp_path, mode, color, expected):
    photo = read_photo(saved(tmp_path / "photo.png", flat(mode, color)))
    assert photo.getpixel((3, 3)) == expected


def test_palettes_with_a_transparent_colour(tmp_path):
    image = flat("RGB", "red").convert("P")
    path = saved(tmp_path / "photo.png", image, transparency=image.getpixel((0, 0)))
    assert read_photo(path).getpixel((0, 0)) == (255, 255, 255)


def test_cmyk(tmp_path):
    photo = read_photo(saved(tmp_path / "photo.jpg", flat("CMYK", (0, 255, 255, 0)), quality=95))
    assert np.abs(np.asarray(photo).astype(int) - (255, 0, 0)).max() <= 8


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits(tmp_path, suffix):
    values = np.array([[0, 128 * 257, 65535]], dtype=np.uint16)
    photo = read_photo(saved(tmp_path / f"photo.{suffix}", Image.fromarray(values)))
    assert [photo.getpixel((column, 0))[0] for column in range(3)] == [0, 128, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_cameras_orientation(tmp_path, orientation):
    image = flat("L", 0, (6, 4))
    image.putpixel((0, 0), 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = read_photo(saved(tmp_path / "photo.png", image, exif=exif))
    assert photo.size == ((6, 4) if orientation < 5 else (4, 6))
    right, bottom = photo.width - 1, photo.height - 1
    corners = [(0, 0), (right, 0), (right, bottom), (0, bottom), (0, 0), (right, 0), (right, bottom), (0, bottom)]
    assert photo.getpixel(corners[orientation - 1]) == (255, 255, 255)


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [flat("RGB", color) for color in ("red", "green", "blue")]
    path = saved(tmp_path / "photo.gif", frames[0], save_all=True, append_images=frames[1:])
    assert read_photo(path).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("size", [(9460, 9460), (30_000, 30_000), (2**31 - 1, 2**31 - 1)])
def test_decompression_bombs_are_refused(tmp_path, size):
    path = tmp_path / "photo.png"
    path.write_bytes(bomb(*size))
    with pytest.raises(PhotoError, match=f"{photos.MAX_PIXELS}"):
        read_photo(path)


def test_the_largest_photo_is_within_pillows_own_limit():
    assert photos.MAX_PIXELS == Image.MAX_IMAGE_PIXELS


def test_files_that_are_too_large(tmp_path, monkeypatch):
    path = saved(tmp_path / "photo.bmp", flat("RGB", "red", (64, 64)))
    monkeypatch.setattr(photos, "MAX_BYTES", 1000)
    with pytest.raises(PhotoError, match="more than the 1000 that are read"):
        read_photo(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an image"),
        (b"no image at all", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image"),
    ],
)
def test_files_that_are_no_photos(tmp_path, content, message):
    path = tmp_path / "photo.png"
    path.write_bytes(content)
    with pytest.raises(PhotoError, match=message):
        read_photo(path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tiff", "gif"])
def test_photos_that_are_cut_short(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = saved(tmp_path / f"photo.{suffix}", Image.fromarray(noise))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(PhotoError):
        read_photo(path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_damaged_bytes_are_a_photo_or_a_photo_error(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, suffix)
    path = tmp_path / "photo"
    dice = random.Random(0)
    for _ in range(60):
        content = bytearray(buffer.getvalue())
        for _ in range(dice.randrange(1, 12)):
            content[dice.randrange(min(len(content), dice.choice((64, 4096))))] = dice.randrange(256)
        path.write_bytes(content)
        try:
            photo = read_photo(path)
        except PhotoError:
            continue
        assert photo.mode == "RGB"


def test_floating_point_pixels(tmp_path):
    path = saved(tmp_path / "photo.tiff", Image.fromarray(np.ones((4, 4), np.float32)))
    with pytest.raises(PhotoError, match="no known white"):
        read_photo(path)


def test_what_is_not_a_file(tmp_path):
    with pytest.raises(PhotoError, match="no such file"):
        read_photo(tmp_path / "missing.png")
    with pytest.raises(PhotoError, match="not a regular file"):
        read_photo(tmp_path)
    with pytest.raises(PhotoError, match="null"):
        read_photo("nul\0byte.png")
    with pytest.raises(PhotoError, match="name too long"):
        read_photo(tmp_path / ("x" * 5000))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "photo.png")
    with pytest.raises(PhotoError, match="not a regular file"):
        read_photo(tmp_path / "photo.png")
