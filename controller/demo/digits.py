"""Real handwritten digits as meter readings, and two classifiers of them: one for a device, one for a server.

The data are scikit-learn's 1,797 digits of 8x8 pixels (UCI Optical Recognition of Handwritten Digits, test part). Half
is held out and seen by nothing but the final measurement. Of the other half, two thirds train the nano model; the last
third calibrates the quantizer and the confidence, so that no threshold is fitted on what the model has learnt by heart.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

NANO = "digits-nano"
LARGE = "digits-large"
INPUT = "pixels"
SCORES = "probabilities"
FEATURES = 64
SEED = 0
# Chosen: the update moves most weights by less than one step of int8, as fine-tuning does.
UPDATE_RATE = 2e-4
UPDATE_ROUNDS = 3
# Opset 17 is the newest that skl2onnx and every quantization recipe agree on here.
OPSET = {"": 17, "ai.onnx.ml": 3}


@dataclass(frozen=True, slots=True)
class Digits:
    """Files of the demo's models and data; `labels` are those of the held-out half, in its order."""

    nano: Path
    nano_next: Path
    large: Path
    calibration: Path
    held_out: Path
    labels: npt.NDArray[np.int64]
    dataset: str


def prepare_digits(folder: Path) -> Digits:
    """Split the data, train both models and write everything to `folder`; takes a few seconds, always the same."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels, labels = (digits.data / 16.0).astype(np.float32), digits.target.astype(np.int64)
    training, held_out, training_labels, held_out_labels = train_test_split(
        pixels, labels, test_size=0.5, random_state=SEED, stratify=labels
    )
    fit, calibration, fit_labels, calibration_labels = train_test_split(
        training, training_labels, test_size=1 / 3, random_state=SEED, stratify=training_labels
    )
    folder.mkdir(parents=True, exist_ok=True)
    paths = Digits(
        nano=folder / "nano.onnx",
        nano_next=folder / "nano_next.onnx",
        large=folder / "large.onnx",
        calibration=folder / "calibration.npz",
        held_out=folder / "held_out.npz",
        labels=held_out_labels,
        dataset="scikit-learn load_digits (UCI handwritten digits)",
    )
    np.savez(paths.calibration, inputs=calibration, labels=calibration_labels)
    np.savez(paths.held_out, inputs=held_out, labels=held_out_labels)
    nano = train_nano(fit, fit_labels)
    export(nano, paths.nano)
    export(train_on(nano, fit, fit_labels), paths.nano_next)
    export(train_large(training, training_labels), paths.large)
    return paths


def train_nano(pixels: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> Any:
    """One hidden layer of 32: about 2,400 weights."""
    from sklearn.neural_network import MLPClassifier

    return MLPClassifier(hidden_layer_sizes=(32,), alpha=1.0, max_iter=1000, random_state=SEED).fit(pixels, labels)


def train_on(nano: Any, pixels: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> Any:
    """Go on with a fitted nano model for a few careful rounds, as one would with a few new samples; changes `nano`."""
    nano.set_params(learning_rate_init=UPDATE_RATE)
    for _ in range(UPDATE_ROUNDS):
        nano.partial_fit(pixels, labels)
    return nano


def train_large(pixels: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> Any:
    """Support vectors with a Gaussian kernel: a hundred times the arithmetic, a quarter of the errors."""
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.svm import SVC

    return CalibratedClassifierCV(SVC(C=10.0, gamma=0.5), method="sigmoid", cv=5, ensemble=False).fit(pixels, labels)


def export(model: Any, path: Path) -> None:
    """Write a fitted classifier as ONNX: one input, and its label and probabilities as outputs."""
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import FloatTensorType

    types = [(INPUT, FloatTensorType([None, FEATURES]))]
    with warnings.catch_warnings():
        # skl2onnx 1.20 asks a support-vector model for an attribute that scikit-learn 1.9 is about to drop.
        warnings.filterwarnings("ignore", category=FutureWarning, message="Attribute `prob[AB]_`")
        graph = to_onnx(model, initial_types=types, options={"zipmap": False}, target_opset=OPSET)
    path.write_bytes(graph.SerializeToString())
