"""Two digits classifiers before and after three more passes over their training data, in static int8.

    python -m benchmarks.digits_pair FOLDER ─▶ {before,after}.{digits,digits-wide}.onnx

`digits` has 32 hidden units, as the demo's nano model; `digits-wide` has two layers of 512.
"""

import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from sklearn.neural_network import MLPClassifier

from controller.compression.model import Dataset, ModelBundle
from controller.compression.recipes import quantise
from controller.demo import digits

PASSES = 3
LAYERS: dict[str, tuple[int, ...]] = {"digits": (32,), "digits-wide": (512, 512)}


def main(folder: Path) -> None:
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels, labels = (found.data / 16.0).astype("float32"), found.target
    with tempfile.TemporaryDirectory() as scratch:
        calibration = digits.prepare_digits(Path(scratch) / "data").calibration
        for name, sizes in LAYERS.items():
            model = MLPClassifier(hidden_layer_sizes=sizes, alpha=1.0, max_iter=200, random_state=digits.SEED)
            with warnings.catch_warnings():
                # Stopped before it converges, on purpose.
                warnings.simplefilter("ignore")
                model.fit(pixels[::2], labels[::2])
            write(model, folder / f"before.{name}.onnx", Path(scratch), calibration)
            for _ in range(PASSES):
                model.partial_fit(pixels[::2], labels[::2])
            write(model, folder / f"after.{name}.onnx", Path(scratch), calibration)


def write(model: Any, target: Path, scratch: Path, calibration: Path) -> None:
    digits.export(model, scratch / "model.onnx")
    quantise("int8-static", ModelBundle(scratch, "model.onnx"), target, Dataset(calibration))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
