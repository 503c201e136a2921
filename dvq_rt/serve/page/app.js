// The page: models, tabs, and what happens on a click.

import { call } from './api.js';
import { Drawing, python } from './draw.js';
import { Editing } from './edit.js';
import { Encoding } from './encode.js';

const by = (id) => document.getElementById(id);
const models = [];
const model = () => models.find((one) => one.id === by('model').value);

function say(words, bad = false) {
  by('status').textContent = words;
  by('status').classList.toggle('bad', bad);
}

const drawing = new Drawing(say), encoding = new Encoding(say, model), editing = new Editing(say, model);
const parts = { draw: ['gallery', drawing], encode: ['coded', encoding], edit: ['edited', editing] };

// --- tabs -------------------------------------------------------------------------------------------------------
const tabs = [...document.querySelectorAll('[role="tab"]')];

function choose(tab, focus = true) {
  for (const other of tabs) {
    const chosen = other === tab, name = other.id.slice(4);
    other.setAttribute('aria-selected', String(chosen));
    other.tabIndex = chosen ? 0 : -1;
    by(`panel-${name}`).hidden = !chosen;
    by(parts[name][0]).hidden = !chosen;
  }
  say(tab.id === 'tab-draw' ? 'Choose a label and press Draw.' : tab.id === 'tab-encode' ? 'Choose a picture to see its codes.' : 'Choose a picture to paint on.');
  if (focus) tab.focus();
}

document.querySelector('[role="tablist"]').addEventListener('keydown', (event) => {
  const seen = tabs.filter((tab) => !tab.hidden), at = seen.indexOf(document.activeElement);
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: -1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  choose(seen.at(to % seen.length));
});
for (const tab of tabs) tab.addEventListener('click', () => choose(tab));

// --- settings ---------------------------------------------------------------------------------------------------
function showValues() {
  for (const output of document.querySelectorAll('output')) {
    const input = by(output.htmlFor[0]);
    output.value = Number(input.value).toFixed(input.step >= 1 ? 0 : input.step < 0.01 ? 3 : 2);
  }
}

function fit() {
  const { defaults, labels, needs_label: needed, prompts, guidance, edits, bits_per_pixel: [least, most] } = model();
  for (const of of ['', 'edit-']) {
    by(`${of}label`).replaceChildren(...(needed ? [] : [new Option('any', '')]), ...labels.map((name, index) => new Option(name, String(index))));
    by(`${of}label-field`).hidden = !labels.length;
    by(`${of}prompt-field`).hidden = !prompts;
  }
  if (!needed && !prompts && labels.length) by('label').selectedIndex = 1;
  by('negative-field').hidden = !prompts;
  by('guidance-field').hidden = !guidance;
  for (const [name, value] of Object.entries(defaults)) by(name).value = value ?? '';
  Object.assign(by('rate'), { step: 0.001, min: Math.ceil(1000 * least) / 1000, max: Math.ceil(1000 * most) / 1000, value: ((least + most) / 2).toFixed(3) });
  by('tab-edit').hidden = !edits;
  if (!edits && by('tab-edit').getAttribute('aria-selected') === 'true') choose(tabs[0]);
  showValues();
  encoding.run();
}

by('controls').addEventListener('input', showValues);
by('model').addEventListener('change', fit);
by('grain').addEventListener('change', () => { for (const [, part] of Object.values(parts)) part.refresh(); });
for (const dice of document.querySelectorAll('.dice')) {
  dice.addEventListener('click', () => { by(dice.dataset.of).value = crypto.getRandomValues(new Uint32Array(1))[0]; });
}
by('stop').addEventListener('click', () => drawing.stop());

by('controls').addEventListener('submit', async (event) => {
  event.preventDefault();
  if (by('panel-draw').hidden || by('draw').disabled) return;
  by('draw').disabled = true;
  by('stop').hidden = false;
  if (matchMedia('(max-width: 46rem)').matches) by('stage').scrollIntoView(); // it is below the settings there
  await drawing.run(model());
  by('draw').disabled = false;
  by('stop').hidden = true;
});

by('copy').addEventListener('click', async () => {
  const button = by('copy'), words = button.textContent;
  try {
    await navigator.clipboard.writeText(python(model()));
    button.textContent = 'Copied';
  } catch {
    button.textContent = 'The browser refused';
  }
  setTimeout(() => { button.textContent = words; }, 1500);
});

// --- start ------------------------------------------------------------------------------------------------------
try {
  models.push(...(await (await call('/v1/models')).json()).data);
  by('model').replaceChildren(...models.map((one) => new Option(one.id, one.id)));
  fit();
  choose(tabs[0], false);
} catch (error) {
  say(error.message, true);
}
