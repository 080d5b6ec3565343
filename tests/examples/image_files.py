"""Small files in the formats of the image benchmarks, with random pixels."""

import io
import pickle
import struct
from typing import ClassVar

import numpy as np
from PIL import Image

from examples.comparison.benchmarks import nyuv2
from examples.comparison.benchmarks.chestxray14 import FINDINGS

COARSE = [f"coarse_{k}" for k in range(20)]
HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)


def write_cifar(data, train=60, test=20):
    """The three files of the archive; returns pixels and coarse labels of the training file."""
    folder = data / "cifar-100-python"
    folder.mkdir(parents=True)
    written = {}
    for name, count in (("train", train), ("test", test)):
        generator = np.random.default_rng(count)
        pixels = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
        labels = [int(k) for k in np.arange(count) % 20]
        content = {"data": pixels, "coarse_labels": labels, "fine_labels": labels}
        (folder / name).write_bytes(python2_pickle(content))
        written[name] = pixels, labels
    (folder / "meta").write_bytes(python2_pickle({"coarse_label_names": COARSE}))
    return written["train"]


class _Python2(pickle._Pickler):
    """Text and bytes are byte strings."""

    def save_text(self, value):
        raw = value.encode() if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)

    dispatch: ClassVar = {**pickle._Pickler.dispatch, str: save_text, bytes: save_text}


def python2_pickle(content):
    """A mapping as Python 2 and an old NumPy pickled it."""
    file = io.BytesIO()
    _Python2(file, 2).dump(content)
    return file.getvalue().replace(b"cnumpy._core.", b"cnumpy.core.")


def write_faces(data, count=40, size=48):
    """Faces of all ages and classes; returns ages, gender and ethnicity by file name."""
    folder = data / "UTKFace"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    labels = {}
    for k in range(count):
        age, gender, race = 1 + 2 * (k % 45), k % 2, k % 5
        name = f"{age}_{gender}_{race}_201701161745{k:05d}.jpg.chip.jpg"
        pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
        labels[name] = (age, gender, race)
    return labels


def write_chest(data, patients=24, size=48):
    """Two images per patient, the last fourth of the patients for test; returns rows by name."""
    folder = data / "ChestX-ray14"
    (folder / "images").mkdir(parents=True)
    generator = np.random.default_rng(0)
    rows = {}
    for patient in range(1, patients + 1):
        for visit in range(2):
            name = f"{patient:08d}_{visit:03d}.png"
            chosen = generator.choice(FINDINGS, generator.integers(0, 7), replace=False)
            view = ("PA", "AP")[visit]
            rows[name] = f"{'|'.join(chosen) or 'No Finding'},{visit},{patient},50,M,{view}"
            pixels = generator.integers(0, 256, (size, size), dtype=np.uint8)
            # Some of the real ones have four channels.
            image = Image.fromarray(pixels).convert("RGBA" if patient % 5 == 0 else "L")
            image.save(folder / "images" / name)
    lines = [f"{name},{row},2500,2048,0.168,0.168" for name, row in rows.items()]
    (folder / "Data_Entry_2017_v2020.csv").write_text("\n".join([HEADER, *lines, ""]))
    names = list(rows)
    cut = 2 * (patients - patients // 4)
    (folder / "train_val_list.txt").write_text("\n".join(names[:cut]))
    (folder / "test_list.txt").write_text("\n".join(names[cut:]))
    return rows


ATTRIBUTES = [f"Attribute_{k}" for k in range(40)]


def write_celeba(data, parts=(24, 8, 8), width=178, height=218):
    """Images and both lists as in the archive; returns the attributes of every image, 0 or 1."""
    folder = data / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, (sum(parts), 40))
    names = [f"{k:06d}.jpg" for k in range(1, len(labels) + 1)]
    for name in names:
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "img_align_celeba" / name)
    rows = [" ".join([f"{2 * v - 1:2d}" for v in row]) for row in labels]
    lines = [str(len(names)), " ".join(ATTRIBUTES) + " "]
    lines += [f"{name} {row}" for name, row in zip(names, rows, strict=True)]
    (folder / "list_attr_celeba.txt").write_text("\n".join([*lines, ""]))
    places = np.repeat([0, 1, 2], parts)
    lines = [f"{name} {part}" for name, part in zip(names, places, strict=True)]
    (folder / "list_eval_partition.txt").write_text("\n".join([*lines, ""]))
    return labels


def write_nyuv2(data, train=4, val=2):
    """Arrays as in MTAN's release, each with pixels of which one or more maps know nothing."""
    generator = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for place in range(count):
            normal = generator.normal(size=(*nyuv2.SIZE, 3))
            normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
            maps = {
                "image": generator.random((*nyuv2.SIZE, 3)),
                "label": generator.integers(-1, nyuv2.CLASSES, nyuv2.SIZE).astype("float64"),
                "depth": generator.uniform(0.7, 9, (*nyuv2.SIZE, 1)),
                "normal": normal,
            }
            maps["depth"][:, :9], maps["normal"][:5] = 0, 0
            for kind, values in maps.items():
                folder = data / "nyuv2" / part / kind
                folder.mkdir(parents=True, exist_ok=True)
                dtype = "float32" if place % 2 else "float64"
                np.save(folder / f"{place}.npy", values.astype(dtype))
