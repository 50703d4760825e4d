"""Which files of a folder are images, by their names alone: the same for training, ingest, predict and the load test."""

from __future__ import annotations

from pathlib import PurePath

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# Folders and files that programs leave beside images; those of a desktop hold smaller copies of the images themselves.
TOOL_NAMES = {
    "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "__macosx", "__pycache__",
    "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "picasa.ini", "zbthumbnail.info", "icon\r",
    "@recycle", "@tmp", "#snapshot", "lost.dir",
}  # fmt: skip


def has_image_suffix(path: PurePath) -> bool:
    """Whether a file's name ends as those of the images do that are read."""
    return path.suffix.lower() in SUFFIXES


def is_passed_over(path: PurePath) -> bool:
    """Whether a path below a folder of images is hidden or a tool's own, itself or by a folder on the way to it."""
    return any(part.startswith(".") or part.lower() in TOOL_NAMES for part in path.parts)


def is_utf8(name: str) -> bool:
    """Whether a name can be written into tables and JSON: Python keeps other bytes as surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
