"""Asks a running temper serve by Triton's own client, over HTTP and gRPC.

pip install 'tritonclient[http,grpc]'
python triton.py MODEL localhost:8080 localhost:9000
"""
import sys

import numpy as np
import tritonclient.grpc as over_grpc
import tritonclient.http as over_http
from tritonclient.utils import InferenceServerException

model, http, grpc = sys.argv[1:]
answers = []
for name, module, url in ("http", over_http, http), ("grpc", over_grpc, grpc):
    client = module.InferenceServerClient(url)
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready(model)
    about = client.get_model_metadata(model, **({"as_json": True} if name == "grpc" else {}))
    shape = [int(d) for d in about["inputs"][0]["shape"]][1:]
    assert [o["name"] for o in about["outputs"]] == ["probabilities", "label"], about
    assert client.get_server_metadata(**({"as_json": True} if name == "grpc" else {}))["name"] == "temper-serve"
    pixels = np.random.default_rng(1).random([3, *shape], dtype=np.float32)
    for binary in (True, False) if name == "http" else (True,):
        tensor = module.InferInput("input", list(pixels.shape), "FP32")
        tensor.set_data_from_numpy(pixels, **({"binary_data": binary} if name == "http" else {}))
        outputs = [module.InferRequestedOutput(n, **({"binary_data": binary} if name == "http" else {})) for n in ("probabilities", "label")]
        result = client.infer(model, [tensor], outputs=outputs, request_id="17")
        probabilities, labels = result.as_numpy("probabilities"), result.as_numpy("label")
        assert probabilities.dtype == np.float32 and labels.dtype == np.int64
        assert np.allclose(probabilities.sum(1), 1) and (probabilities.argmax(1) == labels).all()
        answers.append(probabilities)
    # what is wrong is refused, and said so
    tensor = module.InferInput("input", [1, 3], "FP32")
    tensor.set_data_from_numpy(np.zeros([1, 3], np.float32))
    try:
        client.infer(model, [tensor])
        raise AssertionError("a wrong shape was accepted")
    except InferenceServerException as e:
        assert "send [N" in e.message(), e
    try:
        client.infer("other", [tensor])
        raise AssertionError("an unknown model was accepted")
    except InferenceServerException as e:
        assert "unknown model" in e.message(), e
assert all((a == answers[0]).all() for a in answers), "the protocols answer differently"
print("triton: HTTP (JSON and binary) and gRPC give the same answers")
