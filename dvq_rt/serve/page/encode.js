// Encoding a picture of one's own: codes, bits, the reconstruction, at any rate.

import { bitmap, call, download, png } from './api.js';
import { mosaic, paint } from './grain.js';

const by = (id) => document.getElementById(id);
const WAIT = 120; // milliseconds after the slider's last move

function figure(words) {
  const element = document.createElement('figure');
  element.innerHTML = '<canvas role="img"></canvas><figcaption></figcaption>';
  element.querySelector('figcaption').textContent = words;
  element.querySelector('canvas').setAttribute('aria-label', words);
  return element;
}

export class Encoding {
  constructor(say, model) {
    this.say = say;
    this.model = model;
    this.turn = 0;
    by('photo').addEventListener('change', () => this.take(by('photo').files[0]));
    by('own').addEventListener('change', () => { by('rate').disabled = by('own').checked; this.run(); });
    by('rate').addEventListener('input', () => { clearTimeout(this.timer); this.timer = setTimeout(() => this.run(), WAIT); });
    const drop = by('drop');
    for (const kind of ['dragenter', 'dragover']) drop.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.add('over'); });
    for (const kind of ['dragleave', 'drop']) drop.addEventListener(kind, () => drop.classList.remove('over'));
    drop.addEventListener('drop', (event) => { event.preventDefault(); this.take(event.dataTransfer.files[0]); });
  }

  take(file) {
    if (!file) return;
    this.file = file;
    this.run();
  }

  refresh() {
    if (!this.answer) return;
    const show = by('grain').checked;
    paint(this.before, this.original, this.answer.codes, false);
    paint(this.after, this.restored, this.answer.codes, show);
  }

  async run() {
    if (!this.file) return;
    const turn = ++this.turn, query = new URLSearchParams({ model: this.model().id });
    if (!by('own').checked) query.set('bits_per_pixel', by('rate').value);
    try {
      const response = await call(`/reconstruct?${query}`, { method: 'POST', body: this.file });
      const answer = await response.json();
      const [original, restored] = await Promise.all([bitmap(answer.original), bitmap(answer.data[0].b64_json)]);
      if (turn !== this.turn) return; // a newer one is under way
      Object.assign(this, { answer, original, restored });
      this.show();
      this.say('');
    } catch (error) {
      if (turn === this.turn) this.say(error.message, true);
    }
  }

  show() {
    const { answer } = this, place = by('coded'), open = place.querySelector('details')?.open;
    const list = document.createElement('dl');
    list.className = 'figures';
    const decibels = answer.psnr === null ? 'exact' : `${answer.psnr.toFixed(2)} dB`;
    const rows = [['Codes', answer.length], ['Bits', Math.round(answer.bits)], ['Bits a pixel', answer.bits_per_pixel.toFixed(3)], ['PSNR', decibels]];
    list.innerHTML = rows.map(([name, value]) => `<div><dt>${name}</dt><dd>${value}</dd></div>`).join('');
    const parts = [figure('The square that is coded'), figure('Through its codes and back'), figure('Its codes, a colour each')];
    const [before, after, codes] = parts.map((part) => part.querySelector('canvas'));
    Object.assign(this, { before, after });
    mosaic(codes, answer.codes);
    const links = document.createElement('div');
    links.className = 'links';
    links.innerHTML = '<button type="button">PNG</button><button type="button">Codes</button>';
    const [picture, file] = links.children;
    picture.setAttribute('aria-label', 'Download the reconstruction as PNG');
    file.setAttribute('aria-label', 'Download the codes');
    picture.onclick = () => download('reconstruction.png', png(answer.data[0].b64_json));
    file.onclick = () => download('codes.json', new Blob([JSON.stringify(answer.codes)], { type: 'application/json' }));
    parts[1].append(links);
    const numbers = document.createElement('details');
    numbers.className = 'numbers';
    numbers.open = Boolean(open);
    numbers.innerHTML = '<summary>The codes as numbers</summary><pre tabindex="0"></pre>';
    const wide = String(answer.codes.layout.codebook_size - 1).length;
    numbers.querySelector('pre').textContent = answer.codes.codes[0].map((row) => row.map((code) => (code < 0 ? '·' : String(code)).padStart(wide)).join(' ')).join('\n');
    place.replaceChildren(list, ...parts, numbers);
    this.refresh();
  }
}
