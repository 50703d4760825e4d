"""Names of image files in a folder: one rule for training, ingest, prediction and the load test."""

from __future__ import annotations

from pathlib import PurePath

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# Folders and files that programs create beside images. Those of desktop environments hold smaller copies of the images.
TOOL_NAMES = {
    "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "__macosx", "__pycache__",
    "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "picasa.ini", "zbthumbnail.info", "icon\r",
    "@recycle", "@tmp", "#snapshot", "lost.dir",
}  # fmt: skip

NOT_UTF8 = "its name is not UTF-8; rename it, for instance with convmv"
FOLDER_LINK = "is a link to a folder; put the images there, or link them one by one"


def has_image_suffix(path: PurePath) -> bool:
    """Whether the file name has the suffix of a supported image format."""
    return path.suffix.lower() in SUFFIXES


def is_passed_over(path: PurePath) -> bool:
    """Whether a path below a folder of images is skipped: a part of it is hidden or the name of a tool's files."""
    return any(part.startswith(".") or part.lower() in TOOL_NAMES for part in path.parts)


def is_utf8(name: str) -> bool:
    """Whether a name can be written to tables and JSON as UTF-8; Python represents other bytes as surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
