// The peer: onnxruntime behind Node's HTTP server, a process for each core.
// It reads the same requests and writes the same answers as temper serve.
const cluster = require("node:cluster");
const http = require("node:http");
const ort = require("onnxruntime-node");

const [model, port] = process.argv.slice(2);
if (cluster.isPrimary) {
  for (let i = 0; i < require("node:os").availableParallelism(); i++) cluster.fork();
} else {
  ort.InferenceSession.create(model, { intraOpNumThreads: 1, interOpNumThreads: 1, executionMode: "sequential" }).then((session) => {
    const [input] = session.inputNames, [output] = session.outputNames;
    http.createServer((request, response) => {
      const parts = [];
      request.on("data", (part) => parts.push(part));
      request.on("end", async () => {
        const body = Buffer.concat(parts), length = request.headers["inference-header-content-length"];
        const message = JSON.parse(length ? body.subarray(0, length) : body);
        const { data, shape } = message.inputs[0];
        const pixels = length ? new Float32Array(body.buffer.slice(body.byteOffset + Number(length), body.byteOffset + body.length)) : Float32Array.from(data);
        const logits = (await session.run({ [input]: new ort.Tensor("float32", pixels, shape) }))[output].data;
        const most = Math.max(...logits), e = Array.from(logits, (v) => Math.exp(v - most)), sum = e.reduce((a, b) => a + b);
        const answer = JSON.stringify({
          model_name: "mnist", model_version: "1", outputs: [
            { name: "probabilities", shape: [1, e.length], datatype: "FP32", data: e.map((v) => Math.fround(v / sum)) },
            { name: "label", shape: [1], datatype: "INT64", data: [logits.indexOf(most)] },
          ],
        });
        response.writeHead(200, { "Content-Type": "application/json", "Content-Length": Buffer.byteLength(answer) });
        response.end(answer);
      });
    }).listen(Number(port), "127.0.0.1");
  });
}
