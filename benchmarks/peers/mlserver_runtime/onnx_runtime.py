"""The least that MLServer needs to run an ONNX model: one input, one output, on ONNX Runtime in its own process.

Imported by MLServer in its own environment (`deploy/requirements/mlserver.lock`), never by nanofleet.
"""

import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class OnnxModel(MLModel):  # type: ignore[misc]  # that environment is not the one that is checked
    async def load(self) -> bool:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            self.settings.parameters.uri, options, providers=["CPUExecutionProvider"]
        )
        self._input, self._output = self._session.get_inputs()[0].name, self._session.get_outputs()[0].name
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        given = NumpyCodec.decode_input(payload.inputs[0])
        (scores,) = self._session.run([self._output], {self._input: given})
        output = NumpyCodec.encode_output(self._output, scores)
        return InferenceResponse(model_name=self.name, model_version=self.version, id=payload.id, outputs=[output])
