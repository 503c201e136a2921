// Painting a mask over a picture and having that part drawn anew, where the model can.

import { call } from './api.js';
import { STREAMED, blank, fill } from './draw.js';

const by = (id) => document.getElementById(id);

export class Editing {
  constructor(say, model) {
    this.say = say;
    this.model = model;
    this.cards = [];
    by('edit-photo').addEventListener('change', () => this.open(by('edit-photo').files[0]));
    by('clear').addEventListener('click', () => this.reset());
    by('redraw').addEventListener('click', () => this.run());
  }

  refresh() {
    for (const card of this.cards) card.show(by('grain').checked);
  }

  /** Show the centre square of a picture, to be painted on. */
  async open(file) {
    if (!file) return;
    const image = await createImageBitmap(file).catch(() => null);
    if (!image) return this.say('This browser cannot read that picture; choose a PNG or JPEG.', true);
    const side = this.model().image_size, cut = Math.min(image.width, image.height);
    const figure = document.createElement('figure');
    figure.innerHTML = '<canvas class="paint" role="img" aria-label="Paint over what is to be drawn anew"></canvas><figcaption>Paint over what is to be drawn anew</figcaption>';
    this.canvas = figure.querySelector('canvas');
    this.image = new OffscreenCanvas(side, side);
    this.image.getContext('2d').drawImage(image, (image.width - cut) / 2, (image.height - cut) / 2, cut, cut, 0, 0, side, side);
    this.mask = new OffscreenCanvas(side, side);
    this.canvas.width = this.canvas.height = side * Math.max(1, Math.round(512 / side));
    const stroke = (event) => { if (event.buttons || event.type === 'pointerdown') this.stroke(event); };
    this.canvas.addEventListener('pointerdown', (event) => { this.canvas.setPointerCapture(event.pointerId); stroke(event); });
    this.canvas.addEventListener('pointermove', stroke);
    this.cards = [];
    by('edited').replaceChildren(figure);
    this.reset();
    this.say('');
  }

  reset() {
    if (!this.mask) return;
    this.mask.getContext('2d').clearRect(0, 0, this.mask.width, this.mask.height);
    by('redraw').disabled = true;
    this.show();
  }

  stroke(event) {
    const box = this.canvas.getBoundingClientRect(), side = this.mask.width, context = this.mask.getContext('2d');
    context.fillStyle = '#cd1e5f';
    context.beginPath();
    context.arc((event.clientX - box.left) / box.width * side, (event.clientY - box.top) / box.height * side, by('brush').value / 200 * side, 0, 2 * Math.PI);
    context.fill();
    by('redraw').disabled = false;
    this.show();
  }

  show() {
    const context = this.canvas.getContext('2d');
    context.imageSmoothingEnabled = false;
    context.globalAlpha = 1;
    context.drawImage(this.image, 0, 0, this.canvas.width, this.canvas.height);
    context.globalAlpha = 0.6;
    context.drawImage(this.mask, 0, 0, this.canvas.width, this.canvas.height);
  }

  /** As OpenAI's API has it: the mask is transparent where the image is to be drawn anew. */
  async run() {
    if (![by('edit-seed'), by('edit-n')].every((field) => field.reportValidity())) return;
    const mask = new OffscreenCanvas(this.mask.width, this.mask.height), context = mask.getContext('2d');
    context.fillRect(0, 0, mask.width, mask.height);
    context.globalCompositeOperation = 'destination-out';
    context.drawImage(this.mask, 0, 0);
    const form = new FormData();
    form.set('image', await this.image.convertToBlob(), 'image.png');
    form.set('mask', await mask.convertToBlob(), 'mask.png');
    const fields = { ...STREAMED, model: this.model().id, n: by('edit-n').value, seed: by('edit-seed').value };
    if (this.model().prompts) fields.prompt = by('edit-prompt').value;
    if (by('edit-label').value !== '') fields.label = by('edit-label').value;
    for (const [name, value] of Object.entries(fields)) form.set(name, String(value));
    this.cards = blank(Number(fields.n), fields.seed);
    by('edited').replaceChildren(by('edited').firstChild, ...this.cards.map((card) => card.figure));
    this.cards[0].figure.scrollIntoView({ block: 'nearest' }); // it is below the settings on a phone
    by('redraw').disabled = true;
    await fill(this.cards, () => call('/v1/images/edits', { method: 'POST', body: form }), this.say);
    by('redraw').disabled = false;
  }
}
