// Runs networks with onnxruntime. Standard input is JSON: a list of {file,
// shape, x}; standard output the list of their logits.
const { InferenceSession, Tensor } = require("onnxruntime-node");

async function main() {
  let text = "";
  for await (const part of process.stdin) text += part;
  const out = [];
  for (const { file, shape, x } of JSON.parse(text)) {
    const session = await InferenceSession.create(file, { intraOpNumThreads: 1, logSeverityLevel: 3 });
    const input = new Tensor("float32", Float32Array.from(x), shape);
    const result = await session.run({ [session.inputNames[0]]: input });
    out.push(Array.from(result[session.outputNames[0]].data));
  }
  process.stdout.write(JSON.stringify(out));
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
