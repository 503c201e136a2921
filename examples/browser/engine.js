// An engine folder run by ONNX Runtime Web: the loop of docs/engine-format.md, with as many slots as one asks for.

import { uniforms } from "./philox.js";

const OWN = "own"; // each slot's own number
const IDLE = {
  content: 0,
  position: 0,
  length: 0,
  done: 1,
  cells: -1,
  reset: 0,
  label: 0,
  uniforms: 0,
  temperature: 1,
  top_k: 1,
  top_p: 1,
  top_k_position: 1,
  top_p_position: 1,
  ordered: 1,
  partner: OWN,
  partner_weight: 1,
  forced_position: -1,
  forced_content: -1,
  pinned: -1,
  prefix: 0,
  prefix_length: 0,
};
const ARRAYS = {
  bool: Uint8Array,
  int8: Int8Array,
  int32: Int32Array,
  int64: BigInt64Array,
  float16: Uint16Array,
  float32: Float32Array,
};
const MOST = 2 ** 30; // more candidates than there are: all

/** An engine: its manifest, and its graphs as sessions that are opened when they are first asked for. */
export class Engine {
  /**
   * @param ort the module onnxruntime-web
   * @param {(name: string) => Promise<Uint8Array>} read gives a file of the folder
   */
  static async open(ort, read) {
    const manifest = JSON.parse(new TextDecoder().decode(await read("manifest.json")));
    if (manifest.backend !== "onnxruntime") {
      throw new Error(`this engine is for ${manifest.backend}; export one with export.to_onnx`);
    }
    return new Engine(ort, read, manifest);
  }

  constructor(ort, read, manifest) {
    Object.assign(this, { ort, read, manifest, layout: manifest.layout, sessions: {} });
    this.side = this.layout.sides.at(-1);
    this.covering = this.layout.kept === null;
  }

  async session(name) {
    if (!(name in this.sessions)) {
      const file = `${name}.onnx`;
      const bytes = await this.read(file);
      await check(file, bytes, this.manifest.files[file]);
      this.sessions[name] = await this.ort.InferenceSession.create(bytes);
    }
    return this.sessions[name];
  }

  /** A tensor of the manifest's name, type and shape, with the value of idle slots. */
  idle(spec, slots, caches) {
    const value = caches.has(spec.name) ? 0 : IDLE[spec.name];
    if (value === undefined) throw new Error(`the step has an input ${spec.name} that this page does not know`);
    const shape = spec.shape.map((size) => (size === "B" ? slots : size));
    const data = new ARRAYS[spec.dtype](shape.reduce((a, b) => a * b, 1));
    const cast = spec.dtype === "int64" ? BigInt : Number;
    if (value === OWN) data.forEach((_, slot) => (data[slot] = cast(slot)));
    else data.fill(cast(value));
    return new this.ort.Tensor(spec.dtype, data, shape);
  }

  /**
   * Draw images; image i is image `first + i` of the seed, whatever it is drawn beside.
   * @param options `n`, `label` (index, or null for none), `seed` and `first` (BigInt), `slots`, `every` (tokens between
   *   two events of an unfinished image, 0 for none), and sampling parameters that replace the recommended ones
   * @yields {{index: number, cells: Int32Array, tokens: number, finished: boolean}}
   */
  async *draw({ n = 1, label = null, seed = 0n, first = 0n, slots = 2, every = 0, ...params }) {
    const { manifest, layout } = this;
    const chosen = { ...manifest.defaults, ...params };
    const width = (chosen.guidance ?? 1) === 1 ? 1 : 2;
    if (width > 1 && !layout.null_label) throw new Error("this model has no null label, so it cannot be guided");
    if (label === null && layout.classes && !layout.null_label) throw new Error("this model needs a label");
    slots = Math.max(width, Math.min(slots, n * width));

    const step = await this.session("step");
    const { inputs, outputs, caches: pairs } = manifest.step;
    const caches = new Set(pairs.map(([input]) => input));
    const carried = inputs.map((spec) => spec.name).filter((name) => outputs.some((o) => o.name === `${name}_out`));
    const wanted = carried.map((name) => `${name}_out`);
    const feeds = Object.fromEntries(inputs.map((spec) => [spec.name, this.idle(spec, slots, caches)]));
    const set = (name, slot, value) => {
      const { data } = feeds[name];
      data[slot] = data instanceof BigInt64Array ? BigInt(value) : Number(value);
    };
    const table = feeds.uniforms.dims[1];

    const free = Array.from({ length: slots }, (_, slot) => slot);
    const active = [];
    for (let next = 0; next < n || active.length; ) {
      while (next < n && free.length >= width) {
        const own = free.sort((a, b) => a - b).splice(0, width);
        const numbers = uniforms(seed, first + BigInt(next), table);
        own.forEach((slot, i) => {
          set("reset", slot, 1);
          set("label", slot, i || label === null ? layout.classes : label);
          set("partner", slot, own[(i + 1) % width]);
          set("partner_weight", slot, chosen.guidance ?? 1);
          set("temperature", slot, chosen.temperature ?? 1);
          set("ordered", slot, (chosen.positions ?? "ordered") === "ordered" ? 1 : 0);
          for (const name of ["top_k", "top_k_position"]) set(name, slot, chosen[name] ?? MOST);
          for (const name of ["top_p", "top_p_position"]) set(name, slot, chosen[name] ?? 1);
          feeds.uniforms.data.set(numbers, slot * numbers.length);
        });
        active.push({ index: next++, own, tokens: 0 });
      }
      const results = await step.run(feeds, wanted);
      feeds.reset.data.fill(0);
      for (const name of carried) feeds[name] = results[`${name}_out`];
      for (const image of [...active]) {
        image.tokens++;
        const finished = Boolean(feeds.done.data[image.own[0]]);
        if (finished) {
          active.splice(active.indexOf(image), 1);
          free.push(...image.own);
        }
        if (finished || (every && image.tokens % every === 0)) {
          const size = this.side * this.side;
          const cells = feeds.cells.data.slice(image.own[0] * size, (image.own[0] + 1) * size);
          yield { index: image.index, cells, tokens: image.tokens, finished };
        }
      }
    }
  }

  /** The pixels of an image's cells, RGBA; of an unfinished one empty cells take the code of the nearest filled one. */
  async decode(cells) {
    const { ort, side, layout, manifest } = this;
    const codes = BigInt64Array.from(this.covering ? filled(cells, side) : cells, (cell) =>
      BigInt(cell < 0 ? -1 : cell % layout.codebook_size),
    );
    const decoder = await this.session("decoder");
    const { images } = await decoder.run({ codes: new ort.Tensor("int64", codes, [1, side, side]) }, ["images"]);
    const area = manifest.image_size ** 2;
    const pixels = new Uint8ClampedArray(4 * area).fill(255);
    for (let i = 0; i < 3 * area; i++) pixels[4 * (i % area) + Math.floor(i / area)] = byte(images.data[i]);
    return pixels;
  }
}

/** (x + 1) * 127.5 in float32, cut to a byte and rounded to the nearest, halves to even, as Uint8ClampedArray does. */
function byte(value) {
  return Math.fround(Math.fround(value + 1) * 127.5);
}

function filled(cells, side) {
  const full = [...cells.keys()].filter((cell) => cells[cell] >= 0);
  if (!full.length) return new Int32Array(cells.length);
  return cells.map((_, cell) => {
    const distance = (other) =>
      (Math.floor(cell / side) - Math.floor(other / side)) ** 2 + ((cell % side) - (other % side)) ** 2;
    return cells[full.reduce((best, other) => (distance(other) < distance(best) ? other : best))];
  });
}

async function check(name, bytes, entry) {
  if (!globalThis.crypto?.subtle) throw new Error("files can be checked on https and on localhost only; open the page there");
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  const hex = Array.from(digest, (value) => value.toString(16).padStart(2, "0")).join("");
  if (hex !== entry?.sha256) throw new Error(`${name} is not the file that the manifest lists; copy the engine anew`);
}
