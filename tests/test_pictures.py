"""Pictures and masks in the ways that users store them."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from clipseg_repro import pictures
from clipseg_repro.errors import InputError
from clipseg_repro.pictures import MAX_PIXELS, load_image, load_mask

# Images

GREY = np.array([[0, 60], [200, 255]], np.uint8)
GREYS = np.repeat(GREY[..., None], 3, 2)
RGB = np.stack([GREY, GREY[::-1], GREY.T], -1)
ALPHA = np.array([[0, 255], [255, 255]], np.uint8)
ON_WHITE = np.where(ALPHA[..., None], RGB, 255)


def _stored(picture, **options):
    """As it comes back from a file."""
    file = io.BytesIO()
    picture.save(file, **{"format": "PNG"} | options)
    return Image.open(file)


def _lab(picture):
    profiles = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
    return ImageCms.profileToProfile(picture, *profiles, outputMode="LAB")


def _through(*modes):
    picture = Image.fromarray(RGB)
    for mode in modes:
        picture = picture.convert(mode)
    return picture


def _palette(indices, colours, transparency=None):
    picture = Image.fromarray(indices.astype(np.uint8)).copy()
    picture = Image.frombytes("P", picture.size, picture.tobytes())
    picture.putpalette(np.array(colours, np.uint8).tobytes())
    return picture if transparency is None else _stored(picture, transparency=transparency)


def _rotated():
    """Stored turned by 90 degrees anticlockwise."""
    picture = Image.fromarray(np.repeat(RGB, 2, axis=1))
    picture.getexif()[0x0112] = 6
    return picture


LUMINANCE = np.asarray(Image.fromarray(RGB).convert("L"))
WEB = np.asarray(_through("P").convert("RGB"))
IMAGES = {
    "1": (Image.fromarray(GREY > 100), np.where(GREYS > 100, 255, 0)),
    "L": (Image.fromarray(GREY), GREYS),
    "L from a file": (_stored(Image.fromarray(GREY)), GREYS),
    "L transparent": (_stored(Image.fromarray(GREY), transparency=60), np.where(GREYS == 60, 255, GREYS)),
    "P": (_through("P"), WEB),
    "P transparent": (_palette(GREY > 100, [[9, 9, 9], [1, 2, 3]], 1), np.where(GREYS > 100, 255, 9)),
    "RGB": (Image.fromarray(RGB), RGB),
    "RGB by EXIF": (_rotated(), np.rot90(np.repeat(RGB, 2, axis=1), -1)),
    "RGBX": (_through("RGBX"), RGB),
    "RGBA": (Image.fromarray(np.dstack([RGB, ALPHA])), ON_WHITE),
    "RGBa": (Image.fromarray(np.dstack([RGB, ALPHA])).convert("RGBa"), ON_WHITE),
    "LA": (Image.fromarray(np.dstack([GREY, ALPHA])), np.where(ALPHA[..., None], GREYS, 255)),
    "La": (Image.fromarray(np.dstack([GREY, ALPHA])).convert("La"), np.where(ALPHA[..., None], GREYS, 255)),
    "PA": (_through("P", "PA"), WEB),
    "CMYK": (_through("CMYK"), RGB),
    "YCbCr": (_through("YCbCr"), np.asarray(_through("YCbCr", "RGB"))),
    "HSV": (_through("HSV"), np.asarray(_through("HSV", "RGB"))),
    "LAB": (_lab(Image.fromarray(GREYS)), GREYS),
    "I;16": (Image.fromarray(GREY * np.uint16(257)), GREYS),
    "I;16 from a file": (_stored(Image.fromarray(GREY * np.uint16(257))), GREYS),
    "I;16 of 8 bits": (Image.fromarray(GREY.astype(np.uint16)), GREYS),
    "I;16L": (_through("L", "I;16L"), LUMINANCE[..., None].repeat(3, 2)),
    "I;16B": (_through("L", "I;16B"), LUMINANCE[..., None].repeat(3, 2)),
    "I;16N": (_through("L", "I;16N"), LUMINANCE[..., None].repeat(3, 2)),
    "I of 16 bits": (Image.fromarray(GREY * np.int32(257)), GREYS),
    "I of 8 bits": (Image.fromarray(GREY.astype(np.int32)), GREYS),
    "F to 1": (_stored(Image.fromarray(GREY / np.float32(255)), format="TIFF"), GREYS),
    "F to 255": (_stored(Image.fromarray(GREY.astype(np.float32)), format="TIFF"), GREYS),
    **{f"array {t}": (RGB.astype(t), RGB) for t in ("uint8", "uint16", "int32", "int64", "float16", "float64", ">u2")},
    "array of floats to 1": (RGB / 255, RGB),
    "array of 16 bits": (RGB * np.uint16(257), RGB),
    "array of bools": (RGB > 100, np.where(RGB > 100, 255, 0)),
    "array of greys": (GREY, GREYS),
    "array of grey floats": (GREY / np.float32(255), GREYS),
    "array with alpha": (np.dstack([RGB, ALPHA]), ON_WHITE),
    "array of floats with alpha": (np.dstack([RGB, ALPHA]) / 255, ON_WHITE),
}


@pytest.mark.parametrize("name", IMAGES)
def test_load_image(name):
    image, expected = IMAGES[name]
    loaded = load_image(image)
    assert loaded.dtype == np.uint8
    np.testing.assert_allclose(loaded.astype(int), expected, atol=1 if name == "LAB" else 0)


def test_every_mode_of_pillow_is_read():
    tried = {image.mode for image, _ in IMAGES.values() if isinstance(image, Image.Image)}
    assert set(Image.MODES) <= tried


def _damaged(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:4000])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    with Image.open(tmp_path / "whole.png") as closed:
        pass
    return Image.open(tmp_path / "half.png"), closed


@pytest.mark.parametrize("load", [load_image, lambda mask: load_mask(mask, (64, 64))])
def test_damaged_pictures_are_refused(load, tmp_path):
    truncated, closed = _damaged(tmp_path)
    for bad, reason in (
        (tmp_path / "nowhere.png", "is no file"),
        ("x" * 5000, "is no file"),
        (tmp_path, "is no file"),
        (tmp_path / "half.png", "half.png' cannot be read .*truncated"),
        (tmp_path / "text.png", "not an image"),
        (tmp_path / "empty.png", "not an image"),
        (truncated, r"\(PIL\) cannot be read .*truncated"),
        (closed, r"\(PIL\) cannot be read .*closed"),
        (Image.new("L", (1, 9)), "1 x 9 pixels: .* at least 2 x 2"),
        (Image.Image(), "0 x 0 pixels"),
        (None, "NoneType"),
        (b"\x89PNG", "bytes"),
    ):
        with pytest.raises(InputError, match=reason) as caught:
            load(bad)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (np.zeros((0, 5, 3), np.uint8), "5 x 0 pixels"),
        (np.zeros((3, 5, 5), np.uint8), r"\(3, 5, 5\)"),
        (np.zeros((5, 5, 1), np.uint8), r"\(5, 5, 1\): give \(H, W\)"),
        (np.full((5, 5), np.nan), "from nan to nan, type float64: scale"),
        (np.linspace(-1, 1, 25).reshape(5, 5), "from -1 to 1"),
        (np.full((5, 5, 3), 255.5), "from 255.5 to 255.5"),
        (np.full((5, 5), 65536), "to 65536, type int64"),
        (np.full((5, 5), -1), "from -1"),
        (np.zeros((5, 5), complex), "complex128"),
        (np.full((5, 5), "a"), "<U1"),
        (Image.fromarray(np.full((5, 5), 1e9, np.float32)), r"\(PIL\) has values from 1e\+09"),
    ],
)
def test_load_image_refuses(image, reason):
    with pytest.raises(InputError, match=reason):
        load_image(image)


# Size


def _header(width, height):
    """A PNG of one bit a pixel that ends where its pixels should start."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))


@pytest.mark.parametrize(
    ("width", "height", "reason"),
    [
        (8000, 6000, "cannot be read"),  # the size is not at fault, the end of the file is
        (12032, 9024, "cannot be read"),
        (13000, 13000, f"13000 x 13000 pixels, more than {MAX_PIXELS:,} in all: make it smaller"),
        (100_000, 100_000, f"too many pixels, more than {MAX_PIXELS:,}"),
    ],
)
@pytest.mark.parametrize("load", [load_image, lambda mask: load_mask(mask, (2, 2))])
def test_the_size_is_checked_before_decoding(load, width, height, reason, tmp_path):
    path = tmp_path / "large.png"
    path.write_bytes(_header(width, height) + b"\0\0\0\0IDAT")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match=reason):
            load(path)


def test_the_size_limit_holds_for_all_sources(monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PIXELS", 15)
    icon = _stored(Image.new("L", (32, 32)), format="ICO", sizes=[(32, 32)])
    for source in (np.zeros((4, 4), np.uint8), Image.new("L", (4, 4)), icon):
        for load in (load_image, lambda mask: load_mask(mask, (4, 4))):
            with pytest.raises(InputError, match="pixels, more than 15 in all"):
                load(source)
    assert load_image(np.zeros((3, 5), np.uint8)).shape == (3, 5, 3)


# Masks

Y, X = np.ogrid[:48, :64]
DISC = np.hypot(Y - 20.3, X - 30.6) < 12.25
DISC_ALPHA = np.where(DISC, 255, 0).astype(np.uint8)
SMOOTH = (np.clip(12.75 - np.hypot(Y - 20.3, X - 30.6), 0, 1) * 255).astype(np.uint8)  # an edge of one pixel


def _painted(background, disc, alpha=None, mode="RGB"):
    picture = Image.fromarray(np.where(DISC[..., None], disc, background).astype(np.uint8)).convert(mode)
    if alpha is not None:
        picture.putalpha(Image.fromarray(alpha.astype(np.uint8)))
    return picture


WHITE, BLACK, RED, BLUE = (255, 255, 255), (0, 0, 0), (128, 0, 0), (0, 0, 128)
VOC = [BLACK, RED, (0, 128, 0), (128, 128, 0), BLUE]
MASKS = {
    **{f"array 0/{v}": np.where(DISC, v, 0) for v in (1, 15, 255, 65535, 70000, 0.5, 1.0, 255.0)},
    "array of bools": DISC,
    **{f"array {t}": DISC.astype(t) for t in ("uint8", "int8", "uint16", ">u2", "float16")},
    "array of smooth floats": SMOOTH / 255,
    **{mode: Image.fromarray(DISC_ALPHA).convert(mode) for mode in ("1", "L", "P", "LA", "PA", "RGB", "RGBA", "RGBX")},
    **{mode: Image.fromarray(DISC_ALPHA).convert(mode) for mode in ("CMYK", "YCbCr", "I", "F", "I;16L", "I;16B")},
    "HSV": _painted(BLACK, WHITE).convert("HSV"),
    "L 0/1": Image.fromarray(DISC.astype(np.uint8)),
    "L 0/15": Image.fromarray(DISC * np.uint8(15)),
    "I;16": Image.fromarray(DISC * np.uint16(65535)),
    "F to 1": Image.fromarray(DISC.astype(np.float32)),
    "RGB 0/1": Image.fromarray(np.repeat(DISC[..., None], 3, 2).astype(np.uint8)),
    "RGB one label": _painted(BLACK, RED),
    "RGB one dark id": _painted(BLACK, (0, 0, 1)),
    "P one label": _palette(DISC * 15, [BLACK] + [RED] * 15),
    "P with a palette of one colour": _palette(DISC, [BLACK, BLACK]),
    "P black and white": _palette(DISC, [BLACK, WHITE]),
    "P white and black": _palette(~DISC, [WHITE, BLACK]),
    "P by quantize(2)": Image.fromarray(DISC_ALPHA).quantize(2),
    "P with smooth edges": Image.fromarray(SMOOTH).convert("RGB").quantize(200),
    "P transparent background": _palette(DISC, [WHITE, RED], transparency=0),
    "P transparent, white on white": _palette(DISC, [WHITE, WHITE], transparency=0),
    "P alpha by colour": _palette(DISC, [BLACK, BLACK], transparency=bytes([0, 255])),
    **{f"{mode} {c} in alpha": _painted(c, c, DISC_ALPHA, mode) for mode in ("RGB", "L") for c in (WHITE, BLACK)},
    "La in smooth alpha": _painted(WHITE, WHITE, SMOOTH, "L").convert("La"),
    "RGBA in faint alpha": _painted(RED, RED, DISC_ALPHA // 3),
    "RGBA in smooth alpha": _painted(WHITE, WHITE, SMOOTH),
    "RGBa in smooth alpha": _painted((200, 30, 30), (200, 30, 30), SMOOTH).convert("RGBa"),
    "RGBA white on transparent black": _painted(BLACK, WHITE, DISC_ALPHA),
    "RGBA half opaque everywhere": _painted(BLACK, WHITE, np.full(DISC.shape, 128)),
    "L smooth": Image.fromarray(SMOOTH),
    "I;16 smooth": Image.fromarray(SMOOTH * np.uint16(257)),
    **{f"JPEG {q}": _stored(Image.fromarray(DISC_ALPHA), format="JPEG", quality=q) for q in (40, 75, 90, 100)},
    "JPEG in colour": _stored(_painted(BLACK, WHITE), format="JPEG", quality=75),
    "WebP": _stored(_painted(BLACK, WHITE), format="WEBP", quality=75),
    "JPEG as palette": _stored(Image.fromarray(DISC_ALPHA), format="JPEG").quantize(256),
}


@pytest.mark.parametrize("name", MASKS)
def test_load_mask(name):
    loaded = load_mask(MASKS[name], DISC.shape)
    assert loaded.dtype == bool
    np.testing.assert_array_equal(loaded, SMOOTH > 127 if "smooth" in name else DISC)


@pytest.mark.parametrize("kind", [".png", ".tif", ".bmp", ".gif", ".jpg", ".webp"])
def test_load_mask_from_files(kind, tmp_path):
    Image.fromarray(DISC_ALPHA).save(tmp_path / f"mask{kind}")
    np.testing.assert_array_equal(load_mask(str(tmp_path / f"mask{kind}"), DISC.shape), DISC)


@pytest.mark.parametrize("full", [True, 1, 255, 1.0, 65535])
def test_a_full_mask_is_one(full):
    assert load_mask(np.full(DISC.shape, full), DISC.shape).all()
    if full in (True, 255):
        assert load_mask(Image.fromarray(np.full(DISC.shape, full, np.asarray(full, "u1").dtype)), DISC.shape).all()


LABELS = np.where(X < 20, 0, np.where(X < 40, 1, 2)) + 0 * Y
VALUES = "is not binary, it has the values "
COLOURS = "is not binary, it has the colours "
REFUSED = {
    "size": (np.ones((48, 63), bool), r"has shape \(48, 63\), its image \(48, 64\)"),
    "channels": (np.ones((48, 64, 3), bool), r"\(48, 64, 3\)"),
    "objects": (np.full(DISC.shape, None), "type object"),
    "empty": (np.zeros(DISC.shape, bool), "mask array is empty"),
    "empty picture": (Image.new("RGB", (64, 48)), "empty"),
    "black and opaque": (Image.new("RGBA", (64, 48), (0, 0, 0, 255)), "empty"),
    "nothing to see": (Image.new("RGBA", (64, 48), (255, 255, 255, 0)), "empty"),
    "palette of index 0": (_palette(0 * LABELS, [WHITE]), "empty"),
    "NaN": (np.where(DISC, np.nan, 0), VALUES + "0.0, nan"),
    "infinite": (np.where(DISC, np.inf, 0), VALUES),
    "negative": (np.where(DISC, 1, -1), VALUES + "-1, 1"),
    "below 0": (np.where(DISC, 0, -1), VALUES),
    "one label, full": (np.full(DISC.shape, 7), VALUES + "7: choose the object, as by `values == 7`"),
    "label and void": (np.choose(LABELS, [0, 15, 255]), VALUES + "0, 15, 255: .*`values == 15`"),
    "0, 1, 255": (np.choose(LABELS, [0, 1, 255]), VALUES + "0, 1, 255"),
    "trimap": (Image.fromarray(np.choose(LABELS, [0, 128, 255]).astype(np.uint8)), VALUES + "0, 128, 255"),
    "labels without 0": (np.choose(LABELS, [1, 1, 2]), VALUES + "1, 2: .*`values == 2`"),
    "palette label map": (_palette(LABELS, VOC), VALUES + "0, 1, 2: .*`values == 1`"),
    "palette label map, transparent": (_palette(LABELS, VOC, 0), "varies in colour and in alpha: keep one"),
    "label map in colour": (
        _palette(LABELS, VOC).convert("RGB"),
        COLOURS + r"\(0, 128, 0\), \(128, 0, 0\), \(0, 0, 0\): .*`\(rgb == \(128, 0, 0\)\)",
    ),
    # both of these colours have grey level 38
    "labels of equal grey": (_palette(LABELS, [BLACK, RED, (0, 64, 0)]).convert("RGB"), COLOURS + r"\(0, 64, 0\), \("),
    "two colours": (_palette(DISC, [WHITE, RED]), COLOURS + r"\(255, 255, 255\), \(128, 0, 0\): "),
    "red on white": (_painted(WHITE, RED), COLOURS),
    "navy on white": (_painted(WHITE, BLUE), COLOURS),
    "colour against alpha": (_painted(BLACK, WHITE, 3 * X + 0 * Y), "varies in colour and in alpha: keep one"),
    "greys": (np.arange(48 * 64).reshape(48, 64) % 256, VALUES + r"0, 1, 2, 3, 4, 5, 6, 7, \.\.\..*`values > 127`"),
    "16-bit greys": (np.arange(48 * 64).reshape(48, 64) * 20, "`values > 32767`"),
    "probabilities": (np.linspace(0, 1, 48 * 64).reshape(48, 64), VALUES),
    "photograph": (
        Image.fromarray(np.dstack([3 * X + 0 * Y, 4 * Y + 0 * X, 0 * LABELS]).astype(np.uint8)),
        "256 colours",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_load_mask_refuses(name):
    mask, reason = REFUSED[name]
    with pytest.raises(InputError, match=reason) as caught:
        load_mask(mask, DISC.shape)
    assert "\n" not in str(caught.value)
