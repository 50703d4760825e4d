"""Reasons of an answer: the nearest training images, and the class-activation map of its best class.

Runs in the inference process, with numpy. explain.npz beside this file has the feature index of the release: rows float16
[K,D] of length 1, row_class int32 [K], names of the images, thumbnails or none, and for a map the class matrix [C,D]. The
rows stay in memory as float16; a request converts CHUNK of them at a time.

Nearest: the largest cosines of the feature of an image with the rows. decisions.py, a copy of the module of `models`, has the
arithmetic of the map.
"""

from __future__ import annotations

import hashlib

import numpy as np
import triton_python_backend_utils as pb_utils

FILE = "explain.npz"
MOST = 20  # nearest images of an answer
CHUNK = 16384  # rows that are compared at once
OUTPUTS = ("nearest", "nearest_class", "nearest_cosine")


def open_explanations(folder, manifest, names, maps):
    """The Explanations of a version folder, or None if its release has none. names: of the classes, bytes by index.
    maps: `activation_maps` of decisions.py.

    Raises TritonModelException in one line for a file that is not the one in the manifest, or belongs to another graph.
    """
    if not manifest.get("explain"):
        return None
    path = folder / FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise pb_utils.TritonModelException(f"{path}: {error.strerror}; write the version again") from None
    actual, expected = hashlib.sha256(content).hexdigest(), manifest["files"][FILE]
    if actual != expected:
        raise pb_utils.TritonModelException(
            f"{path}: sha256 is {actual[:12]}..., manifest.json has {expected[:12]}...; write the version again"
        )
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    graph, served = arrays["graph"].item().decode(), manifest["files"]["student.onnx"]
    if graph != served:
        raise pb_utils.TritonModelException(
            f"{path}: is the feature index of graph {graph[:12]}..., this version has {served[:12]}...; export again"
        )
    return Explanations(arrays, names, manifest["image"]["size"] / manifest["image"]["resize_to"], maps)


class Explanations:
    """Nearest images and maps of one release.

    arrays: of explain.npz, by name. names: of the classes, bytes by index. crop: side of the network's centre crop, as a share
    of the shorter side of an image. maps: `activation_maps` of decisions.py.
    """

    def __init__(self, arrays, names, crop, maps):
        self.crop, self.maps = np.float32(crop), maps
        self.rows, self.matrix, self.names = arrays["rows"], arrays.get("matrix"), names
        self.row_names = texts_of(arrays, "names")
        self.row_classes = names[arrays["row_class"]]
        self.thumbnails = texts_of(arrays, "thumbnails") if "thumbnails" in arrays else None
        self.unit = bool(arrays["unit"]) if self.matrix is not None else False
        self.network_outputs = ("feature",) if self.matrix is None else ("feature", "feature_map")

    def outputs(self, wanted, network, best):
        """The output arrays by name. wanted: number of nearest images of each row. network: the network's outputs named in
        network_outputs, a row for each image. best: the best class of each row.
        """
        arrays = {}
        if len(self.rows):
            arrays |= self.nearest(np.asarray(wanted), network[0])
        if self.matrix is not None:
            arrays["activation_map"] = self.maps(self.matrix, network[1], best, self.unit)
            arrays["activation_crop"] = np.full((len(best), 1), self.crop)
        return arrays

    def nearest(self, wanted, features):
        """`nearest`: names of the training images with the largest cosine, filled up with empty texts; their classes, cosines
        and thumbnails. features: of length 1, float32 [n,D].
        """
        parts = [self.rows[start : start + CHUNK] for start in range(0, len(self.rows), CHUNK)]
        cosines = np.concatenate([features @ part.astype(np.float32).T for part in parts], axis=1)
        most = min(int(wanted.max()), len(self.rows))
        order = np.argpartition(-cosines, most - 1, axis=1)[:, :most]
        ranks = np.argsort(-np.take_along_axis(cosines, order, axis=1), axis=1, kind="stable")
        order = np.take_along_axis(order, ranks, axis=1)
        shown = np.arange(most) < wanted[:, None]
        arrays = {
            "nearest": np.where(shown, self.row_names[order], b""),
            "nearest_class": np.where(shown, self.row_classes[order], b""),
            "nearest_cosine": np.where(shown, np.take_along_axis(cosines, order, axis=1), 0).astype(np.float32),
        }
        if self.thumbnails is not None:
            arrays["nearest_image"] = np.where(shown, self.thumbnails[order], b"")
        return arrays


def texts_of(arrays, name):
    """Texts as an object array of bytes [K], from one array of bytes and the end of each text in it."""
    blob, ends = arrays[name].tobytes(), arrays[f"{name}_ends"].tolist()
    texts = np.empty(len(ends), dtype=np.object_)
    texts[:] = [blob[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    return texts
