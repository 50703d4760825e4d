"""Write small archives in CIFAR's python format, pickled as by Python 2."""

import hashlib
import io
import pickle
import struct
import tarfile

import numpy as np
import torchvision.datasets

NAMES = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}


class Python2Pickler(pickle._Pickler):
    """Pickler of protocol 2 that writes every text as a byte string, as in the published files."""

    dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012

    def save_text(self, text):
        """Write the opcode BINSTRING, which Python 3 reads but does not write."""
        data = text.encode() if isinstance(text, str) else text
        self.write(b"T" + struct.pack("<i", len(data)) + data)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_text


def python2_pickle(content):
    """Return `content` pickled as by Python 2."""
    stream = io.BytesIO()
    Python2Pickler(stream, protocol=2).dump(content)
    return stream.getvalue()


def write_archive(root, name, monkeypatch, per_class=3, packed=False, classes=None):
    """Write an archive of few images under root; torchvision's md5 sums are replaced with those of its files."""
    published = NAMES[name]
    classes = classes or (10 if name == "cifar10" else 100)
    key = "labels" if name == "cifar10" else "fine_labels"
    generator = np.random.default_rng(7)
    files, lists = {}, {}
    for split, batches in (("train", published.train_list), ("test", published.test_list)):
        lists[split] = []
        for file, _ in batches:
            data = generator.integers(0, 256, (per_class * classes, 3072), dtype=np.uint8)
            labels = generator.permutation(np.repeat(np.arange(classes), per_class)).tolist()
            files[file] = python2_pickle({"batch_label": file, key: labels, "data": data, "filenames": ["x.png"]})
            lists[split].append([file, hashlib.md5(files[file]).hexdigest()])
    names = [f"class {i:02d}" for i in range(classes)]
    files[published.meta["filename"]] = python2_pickle({published.meta["key"]: names})
    meta = {**published.meta, "md5": hashlib.md5(files[published.meta["filename"]]).hexdigest()}
    monkeypatch.setattr(published, "train_list", lists["train"])
    monkeypatch.setattr(published, "test_list", lists["test"])
    monkeypatch.setattr(published, "meta", meta)
    root.mkdir(parents=True, exist_ok=True)
    if packed:
        with tarfile.open(root / published.filename, "w:gz") as archive:
            for file, data in files.items():
                member = tarfile.TarInfo(f"{published.base_folder}/{file}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    else:
        (root / published.base_folder).mkdir()
        for file, data in files.items():
            (root / published.base_folder / file).write_bytes(data)
