// Put the page, ONNX Runtime Web and engine folders into site/, which any server of files can serve.
//
// node build.mjs ENGINE...       (the two bundled demos if none is named)

import { cp, mkdir, rm, writeFile, readFile } from "node:fs/promises";
import { basename, join } from "node:path";
import { fileURLToPath } from "node:url";

const here = fileURLToPath(new URL(".", import.meta.url));
const site = join(here, "site");
const folders = process.argv.slice(2);
if (!folders.length) folders.push(...["demo", "demo_mq"].map((name) => join(here, "../../dvq_rt", name)));

await rm(site, { recursive: true, force: true });
await mkdir(join(site, "ort"), { recursive: true });
for (const name of ["index.html", "style.css", "page.js", "worker.js", "engine.js", "philox.js"]) {
  await cp(join(here, name), join(site, name));
}
for (const name of ["ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"]) {
  await cp(join(here, "node_modules/onnxruntime-web/dist", name), join(site, "ort", name));
}
const engines = [];
for (const folder of folders) {
  const manifest = JSON.parse(await readFile(join(folder, "manifest.json"), "utf8"));
  const name = basename(folder);
  for (const file of ["manifest.json", "step.onnx", "decoder.onnx"]) {
    await cp(join(folder, file), join(site, "engines", name, file));
  }
  engines.push({ name, title: `${name} (${manifest.family.toUpperCase()}, ${manifest.image_size} px)` });
}
await writeFile(join(site, "engines.json"), JSON.stringify(engines));
console.log(`site/ has ${engines.map((engine) => engine.name).join(", ")}`);
