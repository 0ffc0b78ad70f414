"""Writes hostile/: files that must be refused, each NAME.onnx with NAME.txt, the
words that the error must hold (what is wrong, and where).

    pip install onnx numpy && python hostile.py
"""
import gzip
import io
import pathlib
import pickle
import zipfile

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OUT = pathlib.Path(__file__).parent / "hostile"


def base():
    rng = np.random.default_rng(0)

    def weights(name, *shape):
        return numpy_helper.from_array(rng.uniform(-1, 1, shape).astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["input", "w1", "b1"], ["c"], "conv", pads=[1, 1, 1, 1], kernel_shape=[3, 3]),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("MaxPool", ["r"], ["p"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w2", "b2"], ["logits"], "gemm", transB=1),
    ]
    graph = helper.make_graph(
        nodes, "base",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 1, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 3])],
        [weights("w1", 2, 1, 3, 3), weights("b1", 2), weights("w2", 3, 8), weights("b2", 3)])
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def write(name, data, *words):
    (OUT / f"{name}.onnx").write_bytes(data)
    (OUT / f"{name}.txt").write_text("\n".join(words) + "\n")


def case(name, change, *words):
    m = base()
    change(m)
    write(name, m.SerializeToString(deterministic=True), *words)


def node(i, **changes):
    def change(m):
        n = m.graph.node[i]
        for key, value in changes.items():
            if key in ("input", "output"):
                del getattr(n, key)[:]
                getattr(n, key).extend(value)
            elif key == "op_type":
                n.op_type = value
            elif key == "domain":
                n.domain = value
            else:
                for a in list(n.attribute):
                    if a.name == key:
                        n.attribute.remove(a)
                n.attribute.append(helper.make_attribute(key, value))
    return change


def tensor(i, f):
    return lambda m: f(m.graph.initializer[i])


def value(i, v):
    def change(t):
        a = numpy_helper.to_array(t).copy()
        a.flat[3] = v
        t.CopyFrom(numpy_helper.from_array(a, t.name))
    return tensor(i, change)


def dims(i, *shape):
    def change(t):
        del t.dims[:]
        t.dims.extend(shape)
    return tensor(i, change)


def external(location):
    def change(t):
        t.ClearField("raw_data")
        t.data_location = TensorProto.EXTERNAL
        entry = t.external_data.add()
        entry.key, entry.value = "location", location
    return tensor(2, change)


OUT.mkdir(exist_ok=True)
for old in OUT.glob("*"):
    old.unlink()



def add(op, inputs, name, at=5, **attributes):
    """A node after base's, or before its place at, whose output is the graph's."""
    def change(m):
        if at == 5:
            m.graph.node[4].output[0] = "z"
        m.graph.node.insert(at, helper.make_node(op, inputs, ["logits" if at == 5 else name], name, **attributes))
    return change


def constant(m, name, array):
    m.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))


# The graph (case 21).
case("cycle", node(0, input=["p", "w1", "b1"]), 'node 0 "conv" (Conv)', 'reads "p"', "cycle")
case("self-cycle", node(1, input=["r"]), 'node 1 "relu" (Relu)', "cycle")
case("cycle-of-sums", lambda m: (add("Add", ["r", "p"], "sum", 2)(m), node(3, input=["sum"])(m)), 'node 2 "sum" (Add)', "cycle")
case("dead-branch", lambda m: m.graph.node.insert(2, helper.make_node("Tanh", ["r"], ["t"], "side")), 'node 2 "side" (Tanh)', "read by no node")
case("missing-value", node(2, input=["ghost"]), 'node 2 "pool" (MaxPool)', 'reads "ghost"', "nothing makes")
case("no-input", node(1, input=[]), 'node 1 "relu" (Relu)', "0 inputs")
case("no-output", node(1, output=[]), 'node 1 "relu" (Relu)', "no output")
case("second-output", lambda m: (node(2, output=["p", "places"])(m), node(3, input=["places"])(m)), 'node 2 "pool" (MaxPool)', '"places" is read')
case("made-twice", node(2, output=["r"]), 'node 2 "pool" (MaxPool)', "already made")
case("unknown-operator", node(1, op_type="Erf"), 'node 1 "relu" (Erf)', "supported are Add, AveragePool, BatchNormalization,", "MaxPool,", "Relu, Reshape,")
case("foreign-operator", node(1, domain="com.evil"), 'node 1 "relu" (Relu)', 'domain "com.evil"')
case("unknown-attribute", node(1, alpha=0.1), 'node 1 "relu" (Relu)', 'attribute "alpha"')
case("attribute-kind", node(3, axis=1.0), 'node 3 "flatten" (Flatten)', "kind 1, expected 2")
case("attribute-twice", lambda m: m.graph.node[3].attribute.extend([helper.make_attribute("axis", 1)] * 2), "(Flatten)", '"axis" is there twice')
case("group", node(0, group=2), 'node 0 "conv" (Conv)', "2 groups")
case("group-zero", node(0, group=0), 'node 0 "conv" (Conv)', "0 groups")
case("group-overflow", node(0, group=2**63 - 1), 'node 0 "conv" (Conv)', "groups")
case("dilations", node(0, dilations=[2, 3]), 'node 0 "conv" (Conv)', "dilations [2 3]")
case("dilation", node(0, dilations=[2, 2], pads=[0, 0, 0, 0]), 'node 0 "conv" (Conv)', "dilation 2", "do not fit")
case("dilation-zero", node(0, dilations=[0, 0]), 'node 0 "conv" (Conv)', "dilation 0")
case("negative-pads", node(0, pads=[0, 0, -1, 1]), 'node 0 "conv" (Conv)', "pads [0 0 -1 1]")
case("huge-pads", node(0, pads=[2**62] * 4), 'node 0 "conv" (Conv)', "pads")
case("auto-pad", node(0, auto_pad="SAME"), 'node 0 "conv" (Conv)', '"SAME"', "SAME_UPPER")
case("zero-stride", node(0, strides=[0, 0]), 'node 0 "conv" (Conv)', "stride 0")
case("uneven-strides", node(0, strides=[1, 2]), 'node 0 "conv" (Conv)', "strides [1 2]")
case("kernel-mismatch", node(0, kernel_shape=[5, 5]), 'node 0 "conv" (Conv)', "kernel_shape 5", "[2 1 3 3]")
case("conv-of-features", node(0, op_type="Conv", input=["input", "w2"]), 'node 0 "conv" (Conv)', "4 dimensions")
case("pool-dilation", node(2, dilations=[2, 2]), 'node 2 "pool" (MaxPool)', "dilation 2")
case("pool-uneven", node(2, kernel_shape=[2, 3]), 'node 2 "pool" (MaxPool)', "square")
case("pool-too-large", node(2, kernel_shape=[9, 9], strides=[9, 9]), 'node 2 "pool" (MaxPool)', "do not fit")
case("pool-in-padding", node(2, pads=[2, 2, 2, 2]), 'node 2 "pool" (MaxPool)', "padding")
case("pool-without-shape", lambda m: m.graph.node[2].ClearField("attribute"), 'node 2 "pool" (MaxPool)', "kernel_shape")
case("average-ceil-mode", node(2, op_type="AveragePool", ceil_mode=1, kernel_shape=[3, 3], strides=[3, 3]), 'node 2 "pool" (AveragePool)', "ceil_mode")
case("flatten-axis", node(3, axis=2), 'node 3 "flatten" (Flatten)', "axis 2")
case("gemm-transposed", node(4, transA=1), 'node 4 "gemm" (Gemm)', "transA")
case("gemm-unflattened", lambda m: (node(4, input=["p", "w2", "b2"])(m), m.graph.node.pop(3)), "(Gemm)", "Flatten")
case("weight-as-value", node(2, input=["b1"]), 'node 2 "pool" (MaxPool)', 'tensor "b1"')
case("relu-at-the-end", add("Relu", ["z"], "end"), "the last layer must be without relu")
case("softmax-axis", lambda m: node(1, op_type="Softmax", axis=1)(m), 'node 1 "relu" (Softmax)', "axis 1 of [N 2 4 4]")
case("dropout-in-training", lambda m: (constant(m, "half", np.float32(0.5)), constant(m, "on", np.array(True)), add("Dropout", ["r", "half", "on"], "drop", 2)(m), node(3, input=["drop"])(m)), 'node 2 "drop" (Dropout)', "training_mode", "model.eval()")
case("norm-in-training", lambda m: (add("BatchNormalization", ["r", "b1", "b1", "b1", "b1"], "norm", 2, training_mode=1)(m), node(3, input=["norm"])(m)), 'node 2 "norm" (BatchNormalization)', "training_mode", "model.eval()")
case("norm-of-other-channels", lambda m: (add("BatchNormalization", ["r", "b1", "b1", "b1", "b2"], "norm", 2)(m), node(3, input=["norm"])(m)), 'node 2 "norm" (BatchNormalization)', "one number for each channel")
case("norm-variance", lambda m: (constant(m, "v", np.float32([1, -1])), add("BatchNormalization", ["r", "b1", "b1", "b1", "v"], "norm", 2)(m), node(3, input=["norm"])(m)), 'node 2 "norm" (BatchNormalization)', "variance of channel 1")
case("times-zero", lambda m: (constant(m, "k", np.float32(0)), add("Mul", ["r", "k"], "times", 2)(m), node(3, input=["times"])(m)), 'node 2 "times" (Mul)', "by 0")
case("divided-constant", lambda m: (constant(m, "k", np.float32(1)), add("Div", ["k", "r"], "over", 2)(m), node(3, input=["over"])(m)), 'node 2 "over" (Div)', "the other way round")
case("constant-image", lambda m: (constant(m, "k", np.ones((1, 2, 4, 4), np.float32)), add("Add", ["r", "k"], "plus", 2)(m), node(3, input=["plus"])(m)), 'node 2 "plus" (Add)', "[1 2 4 4]", "one for each channel")
case("constant-of-higher-rank", lambda m: (constant(m, "k", np.ones((1, 1, 2, 1, 1), np.float32)), add("Add", ["r", "k"], "plus", 2)(m), node(3, input=["plus"])(m)), 'node 2 "plus" (Add)', "[1 1 2 1 1]")
case("sum-of-other-shapes", lambda m: (add("Add", ["r", "p"], "sum", 3)(m), node(4, input=["sum"])(m)), 'node 3 "sum" (Add)', "inputs 4x4x2 and 2x2x2")
case("concat-axis", lambda m: (add("Concat", ["r", "r"], "join", 2, axis=2)(m), node(3, input=["join"])(m)), 'node 2 "join" (Concat)', "axis 2")
case("concat-batch", lambda m: (add("Concat", ["r", "r"], "join", 2, axis=0)(m), node(3, input=["join"])(m)), 'node 2 "join" (Concat)', "axis 0")
case("concat-doubling", lambda m: ([m.graph.node.insert(2 + i, helper.make_node("Concat", [f"c{i}" if i else "r"] * 2, [f"c{i + 1}"], axis=1)) for i in range(70)], node(72, input=["c70"])(m)), "(Concat)", "too large")
case("pad-doubling", lambda m: (constant(m, "pads", np.int64([0, 0, 1024, 1024, 0, 0, 1024, 1024])), [m.graph.node.insert(2 + i, helper.make_node("Pad", [f"c{i}" if i else "r", "pads"], [f"c{i + 1}"])) for i in range(9)], node(11, input=["c9"])(m)), "(Pad)", "too large")
case("pad-mode", lambda m: (constant(m, "pads", np.int64([0, 0, 1, 1, 0, 0, 1, 1])), add("Pad", ["r", "pads"], "pad", 2, mode="reflect")(m), node(3, input=["pad"])(m)), 'node 2 "pad" (Pad)', '"reflect"')
case("pad-batch", lambda m: (constant(m, "pads", np.int64([1, 0, 1, 1, 0, 0, 1, 1])), add("Pad", ["r", "pads"], "pad", 2)(m), node(3, input=["pad"])(m)), 'node 2 "pad" (Pad)', "only height and width")
case("transposed-batch", lambda m: (add("Transpose", ["r"], "turn", 2, perm=[1, 0, 2, 3])(m), node(3, input=["turn"])(m)), 'node 2 "turn" (Transpose)', "batch")
case("transposed-twice", lambda m: (add("Transpose", ["r"], "turn", 2, perm=[0, 1, 1, 3])(m), node(3, input=["turn"])(m)), 'node 2 "turn" (Transpose)', "perm [0 1 1 3]")
case("reshaped-batch", lambda m: (constant(m, "to", np.int64([2, -1])), node(3, op_type="Reshape", input=["p", "to"])(m), m.graph.node[3].ClearField("attribute")), 'node 3 "flatten" (Reshape)', "[2 -1]", "batch")
case("reshape-overflow", lambda m: (constant(m, "to", np.int64([0, 2**62, 2**62])), node(3, op_type="Reshape", input=["p", "to"])(m), m.graph.node[3].ClearField("attribute")), 'node 3 "flatten" (Reshape)', "1 to 8")
case("reshape-across", lambda m: (constant(m, "to", np.int64([0, 4, 2])), add("Transpose", ["p"], "turn", 3, perm=[0, 2, 3, 1])(m), constant(m, "three", np.int64([0, 8, 1, 1])), node(4, op_type="Reshape", input=["turn", "to"])(m), m.graph.node[4].ClearField("attribute")), 'node 5 "gemm" (Gemm)', "[N 4 2]")
case("reshape-by-a-value", lambda m: (node(3, op_type="Reshape", input=["p", "r"])(m), m.graph.node[3].ClearField("attribute")), 'node 3 "flatten" (Reshape)', '"r" is not a constant')
case("gather-outside", lambda m: (constant(m, "at", np.int64(9)), add("Shape", ["p"], "s", 3)(m), add("Gather", ["s", "at"], "g", 4)(m), node(5, op_type="Reshape", input=["p", "g"])(m), m.graph.node[5].ClearField("attribute")), 'node 4 "g" (Gather)', "index 9 of 4")
case("slice-of-columns", lambda m: (constant(m, "pairs", np.int64([1, 2, 3, 4])), constant(m, "to", np.int64([-1, 3])), add("Reshape", ["pairs", "to"], "table", 3)(m), node(4, op_type="Reshape", input=["p", "table"])(m), m.graph.node[4].ClearField("attribute")), 'node 3 "table" (Reshape)', "[-1 3]")
case("constant-of-huge-shape", lambda m: (constant(m, "n", np.int64([2**40])), add("ConstantOfShape", ["n"], "zeros", 3)(m), node(4, op_type="Reshape", input=["p", "zeros"])(m), m.graph.node[4].ClearField("attribute")), 'node 3 "zeros" (ConstantOfShape)', "at most 8")
case("gather-of-values", lambda m: (constant(m, "at", np.int64(0)), add("Gather", ["r", "at"], "g", 2)(m), node(3, input=["g"])(m)), 'node 2 "g" (Gather)', "shapes, not values")
case("shape-of-many", lambda m: (add("Shape", ["p"], "s0", 3)(m), [m.graph.node.insert(4 + i, helper.make_node("Concat", [f"s{i}"] * 2, [f"s{i + 1}"], axis=0)) for i in range(70)], node(74, op_type="Reshape", input=["p", "s70"])(m), m.graph.node[74].ClearField("attribute")), "(Concat)", "more than 8 dimensions")
case("two-inputs", lambda m: m.graph.input.append(helper.make_tensor_value_info("extra", TensorProto.FLOAT, ["N", 3])), '"input" and "extra"')
case("two-outputs", lambda m: m.graph.output.append(helper.make_tensor_value_info("r", TensorProto.FLOAT, ["N", 3])), "2 outputs")
case("other-output", lambda m: setattr(m.graph.output[0], "name", "f"), 'node 4 "gemm" (Gemm)', 'graph\'s output is "f"')
case("output-shape", lambda m: m.graph.output[0].CopyFrom(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 7])), "[? 7]", "[N 3]")
case("output-of-images", lambda m: (m.graph.node.pop(4), m.graph.node.pop(3), [m.graph.initializer.pop() for _ in "12"], node(2, output=["logits"])(m)), 'output "logits"', "[N 2 2 2]")
case("double-input", lambda m: m.graph.input[0].CopyFrom(helper.make_tensor_value_info("input", TensorProto.DOUBLE, ["N", 1, 4, 4])), "element type 11")
case("free-height", lambda m: m.graph.input[0].CopyFrom(helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 1, "H", 4])), "only the first dimension")
case("huge-input", lambda m: m.graph.input[0].CopyFrom(helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 1, 2**40, 4])), "input")
case("old-opset", lambda m: setattr(m.opset_import[0], "version", 3), "operator set 3")
case("future-opset", lambda m: setattr(m.opset_import[0], "version", 99), "operator set 99")
case("no-nodes", lambda m: m.graph.ClearField("node"), "output")
case("escape-code-in-name", lambda m: setattr(m.graph, "name", "\x1b[2Jgood"), "not printable")
case("functions", lambda m: m.functions.append(helper.make_function("d", "f", ["x"], ["y"], [], [])), "functions")
case("mean-alone", lambda m: helper.set_model_props(m, {"temper.mean": "0.5"}), "temper.std", "both")
case("mean-of-words", lambda m: helper.set_model_props(m, {"temper.mean": "a,b", "temper.std": "1"}), "temper.mean", "numbers")
case("mean-nan", lambda m: helper.set_model_props(m, {"temper.mean": "NaN", "temper.std": "1"}), "mean NaN")
case("std-zero", lambda m: helper.set_model_props(m, {"temper.mean": "0", "temper.std": "0"}), "std 0")
case("mean-of-other-channels", lambda m: helper.set_model_props(m, {"temper.mean": "0,0,0", "temper.std": "1"}), "3 numbers as mean")

# Tensors (cases 21 and 22).
case("external-parent", external("../../etc/passwd"), 'tensor "', "another file")
case("external-absolute", external("/etc/passwd"), "another file")
case("external-hardlink", external("weights.bin"), "another file")
case("tensor-larger-than-file", dims(0, 2, 1, 3, 300), "[2 1 3 300] needs 7200 bytes, 72 are there")
case("dimensions-overflow", dims(0, 2**32, 2**32, 1, 1), "more than")
case("dimension-negative", dims(0, -2, -1, 3, 3), 'tensor "w1"', "negative")
case("rank", dims(0, 2, 9), 'node 0 "conv" (Conv)', "[2 9]: 4 dimensions")
case("wrong-shape", dims(2, 8, 3), 'node 4 "gemm" (Gemm)', "[8 3]", "8 biases")
case("bias-shape", tensor(1, lambda t: t.CopyFrom(numpy_helper.from_array(np.ones(3, np.float32), "b1"))), 'bias "b1" has shape [3]', "[2 1 3 3]")
case("float64", tensor(2, lambda t: t.CopyFrom(numpy_helper.from_array(np.ones((3, 8)), "w2"))), 'tensor "w2"', "element type 11")
case("tensor-too-many", lambda m: m.graph.initializer.append(numpy_helper.from_array(np.ones(9, np.float32), "payload")), '"payload"', "a tensor too many")
case("tensor-twice", lambda m: m.graph.initializer.append(m.graph.initializer[0]), 'tensor "w1" is there twice')
case("tensor-missing", lambda m: m.graph.initializer.pop(2), 'node 4 "gemm" (Gemm)', 'reads "w2"', "nothing makes")
case("shared-weight", lambda m: (
    m.graph.initializer.append(numpy_helper.from_array(np.eye(8, dtype=np.float32), "w3")),
    m.graph.node.insert(4, helper.make_node("Gemm", ["f", "w3"], ["g"])),
    m.graph.node.insert(5, helper.make_node("Gemm", ["g", "w3"], ["h"], "again")),
    node(6, input=["h", "w2", "b2"])(m)), 'node 5 "again" (Gemm)', '"w3" is the weight of another node too')
case("nan", value(0, np.nan), "parameter", "NaN")
case("infinity", value(2, np.inf), "parameter", "Inf")
case("huge-weight", value(2, 1e38), "parameter", "1e+38")
case("all-zero", tensor(2, lambda t: t.CopyFrom(numpy_helper.from_array(np.zeros((3, 8), np.float32), "w2"))), "all zero")

# The wire.
whole = base().SerializeToString(deterministic=True)
write("truncated", whole[:-40], "truncated")
write("graph-twice", whole + b"\x3a\x00", "field 7 is there twice")
write("unknown-field", whole + b"\xf8\x01\x01", "unknown field 31")
write("wire-type", b"\x09" + bytes(8) + whole, "not an ONNX model")
write("empty", b"", "not an ONNX model")
write("text", b"this is not a model\n", "not an ONNX model")

# Other formats (case 23).
weights = {"w": np.ones((3, 8), np.float32)}


class Run:
    def __reduce__(self):
        return print, ("this code ran",)


write("pickle", pickle.dumps(Run(), protocol=4), "not an ONNX model", "pickle")
write("pickle-0", pickle.dumps(weights, protocol=0), "not an ONNX model")
archive = io.BytesIO()
with zipfile.ZipFile(archive, "w") as z:
    z.writestr(zipfile.ZipInfo("archive/data.pkl"), pickle.dumps(Run(), protocol=2))
write("zip", archive.getvalue(), "not an ONNX model", "zip")
write("gzip", gzip.compress(whole, mtime=0), "not an ONNX model", "gzip")
npy = io.BytesIO()
np.save(npy, weights["w"])
write("numpy", npy.getvalue(), "not an ONNX model", "NumPy")
write("json", b'{"model": []}', "not an ONNX model", "JSON")
