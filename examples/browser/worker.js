// Draws away from the page's own thread, so that the page stays quick.

import * as ort from "./ort/ort.wasm.min.mjs";

import { Engine } from "./engine.js";

ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;
ort.env.wasm.numThreads = 1;
const engines = new Map();
let current = 0;

function opened(name) {
  if (!engines.has(name)) {
    const read = async (file) => {
      const answer = await fetch(`./engines/${name}/${file}`);
      if (!answer.ok) throw new Error(`${name}/${file} cannot be read: ${answer.status} ${answer.statusText}`);
      return new Uint8Array(await answer.arrayBuffer());
    };
    engines.set(name, Engine.open(ort, read));
  }
  return engines.get(name);
}

async function draw({ id, name, options }) {
  const engine = await opened(name);
  const began = performance.now();
  let tokens = 0;
  for await (const event of engine.draw(options)) {
    const pixels = await engine.decode(event.cells);
    if (event.finished) tokens += event.tokens;
    postMessage({ id, kind: "image", ...event, pixels });
    await new Promise((resolve) => setTimeout(resolve)); // a newer order may be waiting
    if (current !== id) return;
  }
  postMessage({ id, kind: "end", tokens, seconds: (performance.now() - began) / 1000 });
}

onmessage = async ({ data }) => {
  current = data.id;
  try {
    if (data.kind === "open") postMessage({ id: data.id, kind: "opened", manifest: (await opened(data.name)).manifest });
    if (data.kind === "draw") await draw(data);
  } catch (error) {
    postMessage({ id: data.id, kind: "error", text: error.message ?? String(error) });
  }
};
