"""Hypothesis strategies for Open Inference messages, over every datatype, and how to compare tensors."""

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from core.open_inference.messages import InferRequest, InferResponse, RequestedOutput
from core.tensors import NUMPY_DTYPE, Array, Datatype, Tensor

# No deadline per example: these tests share the machine with others.
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

# Surrogates have no UTF-8 form, on any wire.
_characters = st.characters(codec="utf-8")
texts = st.text(_characters, max_size=12)
names = st.text(_characters, min_size=1, max_size=12)
parameter_values = (
    st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats(allow_nan=False, allow_infinity=False) | texts
)
reserved_parameters = {"binary_data_output"}
parameters = st.dictionaries(texts.filter(lambda name: name not in reserved_parameters), parameter_values, max_size=4)
shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
ANY_DATATYPE = tuple(Datatype)
JSON_DATATYPES = tuple(datatype for datatype in Datatype if datatype not in (Datatype.FP16, Datatype.BF16))


@st.composite
def arrays(draw: st.DrawFn, datatype: Datatype, *, json: bool) -> Array:
    shape = draw(shapes)
    if datatype is Datatype.BYTES:
        element = texts.map(str.encode) if json else st.binary(max_size=12)
        flat = draw(st.lists(element, min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
        array = np.empty(len(flat), dtype=object)
        array[:] = flat
        return array.reshape(shape)
    dtype = NUMPY_DTYPE[datatype]
    if dtype.kind == "f":
        width = {2: 16, 4: 32, 8: 64}[dtype.itemsize]
        finite = st.floats(width=width, allow_nan=not json, allow_infinity=not json)  # type: ignore[arg-type]  # a literal
        return draw(hnp.arrays(dtype, shape, elements=finite))
    return draw(hnp.arrays(dtype, shape))


@st.composite
def tensor_tuples(draw: st.DrawFn, *, json: bool = False) -> tuple[Tensor, ...]:
    datatypes = st.sampled_from(JSON_DATATYPES if json else ANY_DATATYPE)
    found = draw(st.lists(names, min_size=1, max_size=3, unique=True))
    tensors = []
    for name in found:
        datatype = draw(datatypes)
        tensors.append(Tensor(name, datatype, draw(arrays(datatype, json=json))))
    return tuple(tensors)


@st.composite
def requests(draw: st.DrawFn, *, json: bool = False) -> InferRequest:
    outputs = draw(st.lists(names, max_size=2, unique=True))
    return InferRequest(
        draw(names),
        draw(tensor_tuples(json=json)),
        draw(texts),
        draw(texts),
        draw(parameters),
        tuple(RequestedOutput(name, draw(st.sampled_from((None, True, False)))) for name in outputs),
        draw(st.booleans()),
    )


def responses(*, json: bool = False) -> st.SearchStrategy[InferResponse]:
    return st.builds(InferResponse, names, texts, tensor_tuples(json=json), texts, parameters)


def same_tensors(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> bool:
    """Say whether two tuples are equal to the bit, NaN and the sign of zero included."""
    return len(left) == len(right) and all(_same(one, other) for one, other in zip(left, right, strict=True))


def _same(one: Tensor, other: Tensor) -> bool:
    heads = [(tensor.name, tensor.datatype, tensor.array.shape, tensor.array.dtype) for tensor in (one, other)]
    if heads[0] != heads[1] or one.array.dtype != NUMPY_DTYPE[one.datatype]:
        return False
    if one.datatype is Datatype.BYTES:
        return one.array.reshape(-1).tolist() == other.array.reshape(-1).tolist()
    return one.array.tobytes() == other.array.tobytes()
