"""The recordings in a tar archive, read in memory: nothing is unpacked to disk, so no name in it can lead anywhere."""

from __future__ import annotations

import io
import re
import tarfile

RECORDING = re.compile(r"(?:.*/)?recordings/([^/]+\.wav)")


def recordings(archive: bytes) -> dict[str, bytes]:
    """The files `recordings/NAME.wav` of a tar archive, in whatever folder, by NAME, sorted.

    All else in it (links, devices, other files) is passed over.

    Raises:
      ValueError: it is no tar archive, is cut off, or has two recordings of one name.
    """
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as tar:
            for member in tar:
                name = RECORDING.fullmatch(member.name)
                if not (name and member.isreg()):
                    continue
                content = tar.extractfile(member)
                assert content is not None, "a regular file can be read"
                if name[1] in found:
                    raise ValueError(f"it has two recordings {name[1]}")
                found[name[1]] = content.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"it is no whole tar archive ({error})") from error
    return dict(sorted(found.items()))


def canonical(archive: bytes) -> bytes:
    """The recordings alone, each as name, length and bytes: the same however and by whom they were packed.

    Raises:
      ValueError: as `recordings`.
    """
    return b"".join(f"{name} {len(wav)}\n".encode() + wav for name, wav in recordings(archive).items())
