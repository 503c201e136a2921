// The page: what is asked for, and what came of it.

const form = document.querySelector("form");
const status = document.querySelector("#status");
const gallery = document.querySelector("#gallery");
const stop = document.querySelector("#stop");
const worker = new Worker("./worker.js", { type: "module" });
const GRAIN = ["#3b82f6", "#f59e0b", "#ef4444"];
let id = 0;
let manifest = null;
let pictures = [];

function say(text, bad = false) {
  status.textContent = text;
  status.classList.toggle("bad", bad);
}

function busy(yes) {
  form.draw.disabled = yes || !manifest;
  stop.disabled = !yes;
  gallery.setAttribute("aria-busy", yes);
}

function open() {
  manifest = null;
  busy(true);
  say("Opening the engine …");
  worker.postMessage({ id: ++id, kind: "open", name: form.engine.value });
}

function opened() {
  const { layout, class_names: names, defaults } = manifest;
  const labels = Array.from({ length: layout.classes }, (_, i) => new Option(names[i] ?? `label ${i}`, i));
  if (layout.null_label || !layout.classes) labels.push(new Option("anything", ""));
  form.label.replaceChildren(...labels);
  form.temperature.value = defaults.temperature ?? 1;
  form.guidance.value = defaults.guidance ?? 1;
  form.guidance.disabled = !layout.null_label;
  show();
  busy(false);
  say("Ready. Nothing leaves this device.");
}

function show() {
  for (const name of ["temperature", "guidance"]) form[name].nextElementSibling.textContent = Number(form[name].value).toFixed(2);
}

function draw() {
  const n = Number(form.n.value);
  const seed = BigInt(form.seed.value || 0);
  const label = form.label.value === "" ? null : Number(form.label.value);
  const guidance = Number(form.guidance.value);
  const options = { n, label, seed, every: 8, slots: Math.min(4, n) * (guidance === 1 ? 1 : 2) };
  options.temperature = Number(form.temperature.value);
  options.guidance = guidance;
  pictures = Array.from({ length: n }, (_, i) => picture(i, seed));
  gallery.replaceChildren(...pictures.map((one) => one.figure));
  busy(true);
  say("Drawing …");
  worker.postMessage({ id: ++id, kind: "draw", name: form.engine.value, options });
}

function picture(index, seed) {
  const figure = document.querySelector("template").content.firstElementChild.cloneNode(true);
  const canvas = figure.querySelector("canvas");
  const save = figure.querySelector("a");
  canvas.width = canvas.height = 4 * manifest.image_size;
  canvas.setAttribute("aria-label", `image ${index} of seed ${seed}, not drawn yet`);
  save.download = `${form.engine.value}-seed${seed}-${index}.png`;
  return { figure, canvas, save, index, seed, event: null };
}

function paint(one) {
  const { canvas, event } = one;
  const size = manifest.image_size;
  const small = new OffscreenCanvas(size, size);
  small.getContext("2d").putImageData(new ImageData(event.pixels, size, size), 0, 0);
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
  if (form.grain.checked) outline(context, canvas.width, event.cells);
  const filled = event.cells.filter((cell) => cell >= 0).length;
  const share = event.finished ? 1 : filled / (manifest.layout.kept ?? event.cells.length);
  one.figure.style.setProperty("--done", share);
  canvas.setAttribute("aria-label", `image ${one.index} of seed ${one.seed}, ${Math.round(100 * share)} % drawn`);
  if (event.finished) {
    one.figure.querySelector("figcaption span").textContent = `${codes(event.cells)} codes`;
    small.convertToBlob().then((blob) => {
      URL.revokeObjectURL(one.save.href);
      one.save.href = URL.createObjectURL(blob);
      one.save.hidden = false;
    });
  }
}

/** Number of codes: a code of a coarser grid stands in all finest cells that it covers. */
function codes(cells) {
  const { sides, codebook_size: size } = manifest.layout;
  return Math.round(cells.reduce((sum, cell) => sum + (cell < 0 ? 0 : (sides[Math.floor(cell / size)] / sides.at(-1)) ** 2), 0));
}

/** Each cell in the colour of its grid; cells without a code are darkened. */
function outline(context, width, cells) {
  const { sides, codebook_size: size } = manifest.layout;
  const finest = sides.at(-1);
  cells.forEach((cell, i) => {
    const [row, column] = [Math.floor(i / finest), i % finest];
    const step = width / finest;
    if (cell < 0) {
      context.fillStyle = "rgb(10 12 18 / 72%)";
      context.fillRect(column * step, row * step, step, step);
      return;
    }
    const block = finest / sides[Math.floor(cell / size)];
    if (row % block || column % block) return;
    context.strokeStyle = GRAIN[sides.length === 1 ? 1 : Math.floor(cell / size)];
    context.lineWidth = 1.5;
    context.strokeRect(column * step + 1, row * step + 1, block * step - 2, block * step - 2);
  });
}

worker.onmessage = ({ data }) => {
  if (data.id !== id) return;
  if (data.kind === "opened") {
    manifest = data.manifest;
    opened();
  } else if (data.kind === "image") {
    pictures[data.index].event = data;
    paint(pictures[data.index]);
  } else if (data.kind === "end") {
    busy(false);
    say(`${data.tokens} tokens in ${data.seconds.toFixed(1)} s, ${(data.tokens / data.seconds).toFixed(0)} tokens a second`);
  } else {
    busy(false);
    say(data.text, true);
  }
};
worker.onerror = (event) => say(`The worker did not start: ${event.message ?? "is onnxruntime-web in ort/?"}`, true);

form.addEventListener("submit", (event) => {
  event.preventDefault();
  draw();
});
form.engine.addEventListener("change", open);
form.addEventListener("input", show);
form.grain.addEventListener("change", () => pictures.filter((one) => one.event).forEach(paint));
form.dice.addEventListener("click", () => (form.seed.value = Math.floor(Math.random() * 2 ** 31)));
stop.addEventListener("click", () => {
  worker.postMessage({ id: ++id, kind: "stop" });
  busy(false);
  say("Stopped.");
});

const engines = await (await fetch("./engines.json")).json();
form.engine.replaceChildren(...engines.map(({ name, title }) => new Option(title, name)));
open();
