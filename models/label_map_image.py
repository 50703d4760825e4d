"""Colours of class maps, shared by the report and the client: a fixed palette for up to 255 classes."""

from __future__ import annotations


def palette() -> list[int]:
    """256 colours as a flat list of red, green and blue, 0..255.

    The bits of the class number, from the lowest, are dealt to the highest bits of red, green and blue in turn, as in
    PASCAL VOC's palette (Everingham et al. 2010), shifted by one so that no class is black. 255, no class, is black.
    """
    colours: list[int] = []
    for index in range(256):
        bits, channels = (index + 1) % 256, [0, 0, 0]
        for shift in range(7, -1, -1):
            for channel in range(3):
                channels[channel] |= (bits >> channel & 1) << shift
            bits >>= 3
        colours += channels
    return colours
