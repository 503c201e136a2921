// Draw on the command line what the page draws, and print it as JSON: cells, pixels and how fast it went.
//
// node draw.mjs ENGINE '{"n": 2, "label": 0, "seed": 1, "slots": 2}'

import { readFile } from "node:fs/promises";
import { join } from "node:path";

import * as ort from "onnxruntime-web/wasm";

import { Engine } from "./engine.js";

const [folder, options = "{}"] = process.argv.slice(2);
const { seed = 0, first = 0, ...rest } = JSON.parse(options);
ort.env.wasm.numThreads = 1;
const engine = await Engine.open(ort, (name) => readFile(join(folder, name)));
await engine.session("step");

const images = [];
let tokens = 0;
const began = performance.now();
for await (const event of engine.draw({ ...rest, seed: BigInt(seed), first: BigInt(first) })) {
  if (event.finished) {
    tokens += event.tokens;
    images[event.index] = { cells: Array.from(event.cells) };
  }
}
const seconds = (performance.now() - began) / 1000;
for (const image of images) {
  image.rgba = Buffer.from(await engine.decode(Int32Array.from(image.cells))).toString("base64");
}
console.log(JSON.stringify({ images, tokens, seconds }));
