// What llama.cpp computes, through node-llama-cpp:
//
//     node score_llamacpp.mjs NODE_MODULES base.gguf sequences.json out.bin [adapter.gguf]
//
// The sequences are pairs of token ids and a position. Written are the logits of the whole vocabulary from that position
// on, as float32, one row after another.

import {readFileSync, writeFileSync} from "node:fs";
import {pathToFileURL} from "node:url";

const [modules, modelPath, sequences, out, adapter] = process.argv.slice(2);
const {getLlama} = await import(pathToFileURL(`${modules}/node-llama-cpp/dist/index.js`));

const llama = await getLlama({gpu: false, build: "never", skipDownload: true, logLevel: "error"});
const model = await llama.loadModel({modelPath});
const context = await model.createContext({
    contextSize: 256,
    batchSize: 256,
    flashAttention: false,
    experimentalKvCacheKeyType: "F32",
    experimentalKvCacheValueType: "F32",
    ...(adapter === undefined ? {} : {lora: {adapters: [{filePath: adapter, scale: 1}]}})
});
const sequence = context.getSequence();
const rows = [];
for (const [ids, first] of JSON.parse(readFileSync(sequences, "utf-8"))) {
    await sequence.clearHistory();
    const asked = ids.map((id, position) => (position < first ? id : [id, {generateNext: {logits: true}}]));
    const steps = await sequence.controlledEvaluate(asked);
    for (const step of steps.filter((step) => step !== undefined)) {
        const row = new Float32Array(step.next.logits.size);
        for (const [token, logit] of step.next.logits) {
            row[token] = logit;
        }
        rows.push(Buffer.from(row.buffer));
    }
}
writeFileSync(out, Buffer.concat(rows));
process.exit(0);
