"""Class maps of the model `segmenter`: the graph's output for the prior of each row, and class shares.

Runs in the inference process, with numpy. The classes of a response are the largest ones of the class map, and
`probability` is their share of the image's pixels.
"""

from __future__ import annotations

import numpy as np

# Largest absolute value that is added to a logit: far above all logits, and sums of two stay finite in float32.
LARGEST_ADJUSTMENT = 1e30
OUTPUTS = ("class_map", "confidence")


class Segmenter:
    """Answers parsed requests with class maps.

    names: class names, bytes [C]. top_k: classes in a response. run(images, adjustment, outputs): the graph. rows: most
    images in one call of it.
    """

    def __init__(self, names, top_k, run, rows):
        self.names, self.top_k, self.run, self.rows = names, top_k, run, rows

    def answer(self, parsed, wanted):
        """The outputs of each parsed request, a mapping of arrays, in order. wanted: names of all requested outputs."""
        images = np.concatenate([request.images for request in parsed])
        shapes = [(len(request.images), len(self.names)) for request in parsed]
        adjustment = np.concatenate(
            [np.broadcast_to(r.strength * r.log_prior, shape) for r, shape in zip(parsed, shapes, strict=True)]
        )
        adjustment = np.clip(adjustment, -LARGEST_ADJUSTMENT, LARGEST_ADJUSTMENT).astype(np.float32)
        outputs = [name for name in OUTPUTS if name == "class_map" or name in wanted]
        starts = range(0, len(images), self.rows)
        parts = [self.run(images[s : s + self.rows], adjustment[s : s + self.rows], outputs) for s in starts]
        maps = dict(zip(outputs, map(np.concatenate, zip(*parts, strict=True)), strict=True))
        sizes = np.concatenate([request.sizes for request in parsed])
        shares = np.stack([self.class_shares(*row) for row in zip(maps["class_map"], sizes, strict=True)])
        best = np.argsort(-shares, axis=1, kind="stable")[:, : self.top_k]
        values = {
            "class": self.names[best],
            "index": best.astype(np.int32),
            "probability": np.take_along_axis(shares, best, axis=1).astype(np.float32),
            "size": sizes.astype(np.int32),
            "names": np.broadcast_to(self.names, (len(images), len(self.names))),
            **maps,
        }
        ends = np.cumsum([len(request.images) for request in parsed])
        return [
            {name: rows[end - len(request.images) : end] for name, rows in values.items()}
            for request, end in zip(parsed, ends, strict=True)
        ]

    def class_shares(self, class_map, size):
        """Share of each class in the part of a class map [H,W] that shows the image, of height and width `size`: [C]."""
        inside = class_map[: size[0], : size[1]]
        return np.bincount(inside.ravel(), minlength=len(self.names)) / inside.size
