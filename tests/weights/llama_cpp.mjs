// Asks llama.cpp: `node llama_cpp.mjs FOLDER TEXT` writes into FOLDER/found.jsonl, for each FOLDER/*.gguf, a line with the probabilities
// of the next token behind each of the ids in ids.json there, and the ids that it makes of TEXT.
import fs from "fs";
import path from "path";
import {getLlama, LlamaLogLevel} from "node-llama-cpp";

const [folder, text] = process.argv.slice(2);
const ids = JSON.parse(fs.readFileSync(path.join(folder, "ids.json")));
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error, maxThreads: 1});
for (const name of fs.readdirSync(folder).filter((name) => name.endsWith(".gguf")).sort()) {
  const model = await llama.loadModel({modelPath: path.join(folder, name), gpuLayers: 0});
  const context = await model.createContext({
    contextSize: 64, flashAttention: false, experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32",
  });
  const asked = ids.map((id) => [id, {generateNext: {probabilities: true}}]);
  const found = await context.getSequence().controlledEvaluate(asked);
  const probabilities = found.map((one) => [...one.next.probabilities]);
  const one = {name, probabilities, ids: model.tokenize(text), release: llama.llamaCppRelease.release};
  fs.appendFileSync(path.join(folder, "found.jsonl"), JSON.stringify(one) + "\n");
  await context.dispose();
  await model.dispose();
}
process.exit(0);
