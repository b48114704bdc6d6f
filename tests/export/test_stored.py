"""The stored weights: as many as onnx reads, and in the type of the label."""

import math
from dataclasses import replace

import onnx
import pytest
from onnx import TensorProto

from smolvla_edge.export.stored import stored_contradictions, stored_weights
from smolvla_edge.runtime import Bundle


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_bundle_stores_what_its_label_says_and_no_other_label_is_true(export_case, precision):
    bundle = Bundle.open(export_case("tiny", precision))
    assert stored_contradictions(bundle) == []
    others = [label for label in ("fp32", "fp16", "int8") if label != precision]
    for label in others:
        bundle.manifest = replace(bundle.manifest, precision=label)
        (refused,) = stored_contradictions(bundle)
        assert refused.startswith(f"labelled {label}, but stored are float")


def test_every_matrix_is_counted(export_case):
    folder = export_case("tiny", "fp16")
    for name in ("prefix.onnx", "expert.onnx"):
        graph = onnx.load(folder / name).graph
        half = [t for t in graph.initializer if t.data_type == TensorProto.FLOAT16]
        found = stored_weights(folder / name)
        assert found["float16"] == sum(math.prod(t.dims) for t in half if len(t.dims) > 1)
        assert found["float16"] > 10 * found["float32"] >= 0


def test_int8_weights_are_as_many_as_the_manifest_claims(export_case):
    bundle = Bundle.open(export_case("tiny", "int8"))
    m = bundle.manifest
    assert stored_contradictions(bundle) == []
    fewer = replace(m.int8, weights=m.int8.weights - 1)
    bundle.manifest = replace(m, int8=fewer)
    (refused,) = stored_contradictions(bundle)
    assert refused.startswith("labelled int8, but stored are ")
