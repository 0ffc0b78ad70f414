"""Asks a running temper serve by KServe's own client, over HTTP and gRPC.

pip install kserve
python kserve_client.py MODEL localhost:8080 localhost:9000
"""
import asyncio
import sys

import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig

model, http, grpc = sys.argv[1:]


def request(shape, binary):
    pixels = np.random.default_rng(1).random([3, *shape], dtype=np.float32)
    tensor = InferInput("input", list(pixels.shape), "FP32")
    tensor.set_data_from_numpy(pixels, binary_data=binary)
    return InferRequest(model_name=model, infer_inputs=[tensor], request_id="17")


async def main():
    rest, base = InferenceRESTClient(RESTConfig(protocol="v2")), "http://" + http
    assert await rest.is_server_live(base) and await rest.is_server_ready(base) and await rest.is_model_ready(base, model)
    over_grpc = InferenceGRPCClient(grpc)
    assert await over_grpc.is_server_live() and await over_grpc.is_server_ready() and await over_grpc.is_model_ready(model)
    shape, answers = [1, 28, 28], []
    for answer in (
        await rest.infer(base, request(shape, binary=False), model_name=model),
        await rest.infer(base, request(shape, binary=True), model_name=model),
        await over_grpc.infer(request(shape, binary=True)),
    ):
        outputs = {o.name: o.as_numpy() for o in answer.outputs}
        assert (outputs["probabilities"].argmax(1) == outputs["label"]).all() and answer.id == "17"
        answers.append(outputs["probabilities"])
    assert all(np.array_equal(a.astype(np.float32), answers[0].astype(np.float32)) for a in answers), "the protocols answer differently"
    await over_grpc.close()
    print("kserve: HTTP (JSON and binary) and gRPC give the same answers")


asyncio.run(main())
