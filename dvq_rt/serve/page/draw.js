// Drawing: the settings as a request, the stream on the canvases, and the same call in Python.

import { bitmap, call, download, events, json, png } from './api.js';
import { paint } from './grain.js';

export const STREAMED = { stream: true, partial_images: 12, with_codes: true };
const PLAIN = { temperature: 1, top_k: null, top_p: 1, top_k_position: null, top_p_position: 1, guidance: 1, positions: 'ordered' };
const by = (id) => document.getElementById(id);

/** The form as the body of a request. */
function body(model) {
  const value = { model: model.id, n: Number(by('n').value), seed: Number(by('seed').value) };
  for (const name of Object.keys(PLAIN)) {
    const text = by(name).value;
    value[name] = name === 'positions' ? text : text === '' ? null : Number(text);
  }
  if (!model.guidance) value.guidance = 1;
  if (model.prompts) Object.assign(value, { prompt: by('prompt').value, negative_prompt: by('negative').value });
  if (by('label').value !== '') value.label = Number(by('label').value);
  return value;
}

/** The same call in Python. */
export function python(model) {
  const { n, seed, label, prompt, negative_prompt: negative, ...rest } = body(model);
  const changed = Object.keys(PLAIN).filter((name) => rest[name] !== PLAIN[name]);
  const params = changed.map((name) => `${name}=${rest[name] === null ? 'None' : JSON.stringify(rest[name])}`);
  const given = [`n=${n}`, `seed=${seed}`];
  if (label !== undefined) given.splice(1, 0, `labels=${JSON.stringify(isNaN(model.labels[label]) ? model.labels[label] : label)}`);
  if (prompt) given.push(`prompts=${JSON.stringify(prompt)}`);
  if (negative) given.push(`negative_prompts=${JSON.stringify(negative)}`);
  given.push(`params=dvq_rt.SamplingParams(${params.join(', ')})`);
  return `import dvq_rt\n\ngenerator = dvq_rt.Generator(${JSON.stringify(model.id)})\nsamples = generator.sample(${given.join(', ')})\nsamples.grid().save("samples.png")\n`;
}

class Card {
  constructor(index, seed, large) {
    this.index = index;
    this.seed = seed;
    this.figure = document.createElement('figure');
    this.figure.className = 'waiting';
    this.figure.innerHTML = '<canvas width="64" height="64" role="img"></canvas><div class="bar"><i></i></div>'
      + '<figcaption></figcaption><div class="links"><button type="button">PNG</button><button type="button">Codes</button></div>';
    [this.canvas, this.caption] = [this.figure.querySelector('canvas'), this.figure.querySelector('figcaption')];
    this.bar = this.figure.querySelector('i');
    [this.png, this.file] = this.figure.querySelectorAll('button');
    this.png.disabled = this.file.disabled = true;
    this.png.setAttribute('aria-label', `Download image ${index} as PNG`);
    this.file.setAttribute('aria-label', `Download the codes of image ${index}`);
    this.say('waiting');
  }

  say(words) {
    this.caption.textContent = words;
    this.canvas.setAttribute('aria-label', `Image ${this.index}: ${words}`);
  }

  show(showGrain) {
    if (this.image) paint(this.canvas, this.image, this.codes, showGrain);
  }

  async take(event, showGrain) {
    this.image = await bitmap(event.b64_json);
    this.figure.classList.remove('waiting');
    this.bar.style.width = `${100 * event.progress}%`;
    if (event.type.endsWith('completed')) this.finish(event);
    else this.say(`${Math.round(100 * event.progress)} % of the codes`);
    this.show(showGrain);
  }

  finish(event) {
    this.codes = event.codes;
    this.bar.style.width = '0';
    this.say('');
    this.caption.innerHTML = `<b>${event.length}</b> codes, <b>${event.bits_per_pixel.toFixed(3)}</b> bit/px`;
    this.canvas.setAttribute('aria-label', `Image ${this.index}, ${event.length} codes`);
    const name = `seed-${this.seed}-image-${this.index}`;
    this.png.disabled = this.file.disabled = false;
    this.png.onclick = () => download(`${name}.png`, png(event.b64_json));
    this.file.onclick = () => download(`${name}.json`, new Blob([JSON.stringify(this.codes)], { type: 'application/json' }));
  }
}

/** Cards for so many images of a seed. */
export function blank(count, seed) {
  return Array.from({ length: count }, (_, index) => new Card(index, seed));
}

/** Show the images of a stream as they come; resolves when all are there, or it was stopped or refused. */
export async function fill(cards, ask, say) {
  const began = performance.now();
  let finished = 0;
  try {
    say(`Drawing ${cards.length === 1 ? 'one image' : `${cards.length} images`}.`);
    for await (const event of events(await ask())) {
      await cards[event.index].take(event, by('grain').checked);
      if (event.type.endsWith('completed')) finished += 1;
    }
    const seconds = ((performance.now() - began) / 1000).toFixed(1);
    say(`${finished === 1 ? 'One image' : `${finished} images`} in ${seconds} s.`);
  } catch (error) {
    for (const card of cards) if (!card.codes) card.say('not drawn');
    if (error.name === 'AbortError') say(`Stopped after ${finished} of ${cards.length}.`);
    else say(error.message, true);
  }
}

export class Drawing {
  constructor(say) {
    this.say = say;
    this.cards = [];
  }

  refresh() {
    for (const card of this.cards) card.show(by('grain').checked);
  }

  stop() {
    this.control?.abort();
  }

  /** Draw what the form says. */
  async run(model) {
    const request = { ...body(model), ...STREAMED };
    this.control = new AbortController();
    this.cards = blank(request.n, request.seed);
    by('gallery').classList.toggle('large', model.image_size > 128);
    by('gallery').replaceChildren(...this.cards.map((card) => card.figure));
    await fill(this.cards, () => call('/v1/images/generations', json(request, this.control.signal)), this.say);
  }
}
