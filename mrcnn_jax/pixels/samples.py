"""The numbers that a file stores for a pixel, of any depth, as 8 bits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from mrcnn_jax.pixels.tiff_tags import nodata

# Of the values in files of 16 bits: most cameras have 10, 12 or 14, and do not say so.
BIT_DEPTHS = (8, 10, 12, 14, 16)


@dataclass(frozen=True)
class Samples:
    """The numbers that a file stores for a pixel; the defaults are for what Pillow scales."""

    bits: int = 8
    channels: int = 0  # 0: as Pillow says
    white_is_zero: bool = False
    signed: bool = False
    planes: bool = False  # stored one after the other
    multiplied: bool = False  # by alpha
    least_bits: int = 8  # of the values: those of the whole, where this is a part of it
    nodata: int | None = None  # stands for no value

    @staticmethod
    def of(image: ImageFile.ImageFile) -> Samples:
        """Those of an image that is not loaded yet."""
        if not isinstance(image, TiffImageFile):
            return Samples(bits=16 if image.format == "PNG" and ";16" in str(image.tile) else 8)
        tags = image.tag_v2
        return Samples(
            bits=max(tags.get(ExifTags.Base.BitsPerSample, (1,))),
            channels=tags.get(ExifTags.Base.SamplesPerPixel, 1),
            white_is_zero=tags.get(ExifTags.Base.PhotometricInterpretation) == 0,
            signed=2 in tags.get(339, ()),  # SampleFormat
            planes=tags.get(ExifTags.Base.PlanarConfiguration, 1) == 2,
            multiplied="RGBa" in str(image.tile),
            nodata=nodata(tags),
        )


def deep_values(image: Image.Image, samples: Samples, encoded: bytes) -> np.ndarray | None:
    """The values of an image of more than 8 bits; None where Pillow has scaled them for good.

    Args:
        image: loaded.
        samples: of the image before it was loaded.
        encoded: the file's bytes.

    Raises:
        ValueError: they cannot be read.
    """
    if image.mode.startswith("I"):
        return integers(image, samples, encoded)
    # Pillow has taken the upper bytes: enough, unless the values have fewer bits.
    if samples.bits <= 8 or image.mode not in ("RGB", "RGBA"):
        return None
    wide = None if samples.planes or samples.multiplied else _by_opencv(image, encoded)
    if wide is not None and wide.dtype == np.uint16 and wide.ndim == 3:
        return wide[..., 2::-1]
    colours = np.asarray(image)[..., :3]
    if samples.nodata is not None:
        colours = colours[~_absent(colours, samples.nodata >> 8)]
    if colours.size and colours.max() < 1 << BIT_DEPTHS[-2] - 8:  # 14 bits or fewer
        how = "plane by plane" if samples.planes else "in this compression"
        how = "multiplied by alpha" if samples.multiplied else how
        raise ValueError(
            f"its values of 16 bits use fewer, and cannot be read {how} (save it uncompressed, "
            "pixel by pixel, without alpha)"
        )
    return None


def bits_of(values: np.ndarray, nodata: int | None = None) -> int:
    """The least of BIT_DEPTHS that holds the values but `nodata`; 16 if none does."""
    if nodata is not None:
        values = values[~_absent(values, nodata)]
    most = values.max(initial=0)
    return next((depth for depth in BIT_DEPTHS if most < 1 << depth), BIT_DEPTHS[-1])


def _absent(values: np.ndarray, nodata: int) -> np.ndarray:
    """Bool [h, w]: the pixels whose values are all `nodata`."""
    same = values == nodata
    return same.all(axis=2) if same.ndim == 3 else same


def integers(image: Image.Image, samples: Samples, encoded: bytes) -> np.ndarray:
    """The values of an image of 9 to 32 bits and one channel; see `deep_values`."""
    if not samples.signed and samples.bits <= 16:
        return np.asarray(image)
    # Pillow does not swap the bytes of compressed big-endian files.
    values = _by_opencv(image, encoded)
    if values is None or values.ndim != 2 or values.dtype.kind not in "iu":
        raise ValueError(f"its {samples.bits}-bit values cannot be read (save it with 16 bits)")
    return values


def _by_opencv(image: Image.Image, encoded: bytes) -> np.ndarray | None:
    """The values as stored, BGR; None if OpenCV sees another picture than Pillow."""
    import cv2  # late: few files need it, and --help of the converters does without it

    # It would write lines of its own about what is wrong with a file.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    values = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_UNCHANGED)
    return values if values is not None and values.shape[:2] == image.size[::-1] else None


def eight_bits(values: np.ndarray, samples: Samples) -> tuple[np.ndarray, str]:
    """Values of more than 8 bits scaled to uint8, and how; nodata becomes 0.

    Raises:
        ValueError: they are negative or have more than 16 bits.
    """
    values = np.asarray(values, np.int64)
    absent = None if samples.nodata is None else _absent(values, samples.nodata)
    if absent is not None:
        values = values.copy()
        values[absent] = 0
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("its values are negative or have more than 16 bits")
    # A format that says how many bits it has, or that Pillow scaled to all 16.
    bits, stored = (samples.bits, samples.bits) if 8 < samples.bits < 16 else (16, 16)
    if samples.bits >= 16:
        stored = samples.bits
        bits = max(bits_of(values), samples.least_bits)
    scaled = (values >> bits - 8).astype(np.uint8)
    told = f"{stored}-bit" + (f" with values of {bits} bits" if bits < stored else "")
    told += f" (scaled by 1/{1 << bits - 8})" if bits > 8 else " (as they are)"
    if samples.white_is_zero:
        scaled = 255 - scaled
    if absent is not None:
        scaled[absent] = 0
        told += f", nodata ({samples.nodata}) as black"
    return scaled, told
